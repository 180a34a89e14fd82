//! How flags become threads and their loads, which flags are refused, and the exit code.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
}

fn args(flags: &str) -> RunArgs {
    Cli::try_parse_from(std::iter::once("x").chain(flags.split_whitespace())).unwrap().run
}

#[test]
fn threads_share_connections_rate_and_requests() {
    let args = args("--cores 1,2-3 --conns 50 --rate 3000 --ops 100");
    let loads = loads(&args, &[]);
    assert_eq!(loads.len(), 3);
    assert_eq!(loads.iter().map(|load| load.connections).sum::<usize>(), 50);
    let sent = |load: &Load| if let Until::Sent(ops) = load.until { ops } else { 0 };
    assert_eq!(loads.iter().map(sent).sum::<u64>(), 100);
    assert!(loads.iter().all(|load| load.rate == Some(1000.0) && load.stripe == Stripe::WHOLE));
}

#[test]
fn threads_that_insert_or_check_do_not_meet() {
    for flags in ["--cores 1,2 --workload d", "--cores 1,2 --verify"] {
        let loads = loads(&args(flags), &[]);
        assert_eq!(loads[1].stripe, Stripe { index: 1, count: 2 });
        assert_eq!(loads.iter().map(|load| load.keys).sum::<u64>(), 100_000);
    }
}

#[test]
fn a_preload_writes_every_key_once_over_all_threads() {
    let args = args("--cores 1,2,3 --keys 1000 --workload c");
    let all = loads(&args, &[]);
    let preloads: Vec<_> =
        all.iter().enumerate().map(|(i, load)| preloading(load, &args, i)).collect();
    assert_eq!(preloads.iter().map(|load| load.keys).sum::<u64>(), 1000);
    assert!(preloads.iter().all(|load| load.sequential && load.rate.is_none()));
}

#[test]
fn bad_flags_are_refused_with_the_rule() {
    for (flags, rule) in [
        ("--keys 0", "--keys"),
        ("--conns 0", "--conns"),
        ("--key-size 4 --keys 100000", "--key-size"),
        ("--reads 2", "--reads"),
        ("--verify --keys 100", "--verify needs at least 200 keys"),
        ("--cores 0-3 --conns 2", "--cores"),
    ] {
        let failed = check(&args(flags)).unwrap_err();
        assert!(failed.code == 2 && failed.message.contains(rule), "{failed:?}");
    }
    assert!(check(&args("")).is_ok());
    assert!(Cli::try_parse_from(["x", "--value-size", "9-3"]).is_err());
    assert!(Cli::try_parse_from(["x", "--dist", "zipf:3"]).is_err());
    assert!(Cli::try_parse_from(["x", "--w", "64"]).is_err());
}

#[test]
fn the_exit_code_tells_how_it_went() {
    let summary = |change: fn(&mut Summary)| {
        let mut summary = Report::default().summary("", "");
        summary.ops = 10;
        change(&mut summary);
        exit_code(&summary)
    };
    assert_eq!(summary(|_| {}), 0);
    assert_eq!(summary(|s| s.wrong = Some(1)), 1);
    assert_eq!(summary(|s| s.lost = Some("x".into())), 3);
    assert_eq!(summary(|s| (s.ops, s.errors) = (0, 3)), 4);
    assert_eq!(summary(|s| s.may_be_applied = 1), 5);
}
