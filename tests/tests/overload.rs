//! A real server that is asked for twice as much as it can do, and then for less (T44).
//!
//! The floors are far below what a quiet machine shows (`bench/README.md`): they are there to tell
//! congestion collapse, where hardly anything is answered in time, from a server that goes on.

use annulus_tests::server::{Server, Setup, load, scratch};
use serde_json::Value;

/// One shard, so that one load generator is enough for it.
fn server(dir: &tempfile::TempDir) -> Server {
    Setup::new(dir.path().join("data")).with("shards", "1").with("cores", "0").start()
}

/// Work that costs the server far more than whoever asks: scans of up to a hundred records.
const WORK: [&str; 8] =
    ["--workload", "e", "--keys", "20000", "--conns", "32", "--deadline", "100ms"];

fn run(server: &Server, more: &[&str]) -> Value {
    load(server, &[&WORK[..], more].concat())
}

fn number(document: &Value, name: &str) -> f64 {
    document[name].as_f64().unwrap_or_else(|| panic!("no {name} in {document}"))
}

#[test]
fn at_twice_its_capacity_a_server_answers_most_of_what_it_can_in_time() {
    let dir = scratch();
    let server = server(&dir);
    let closed = run(&server, &["--preload", "--depth", "4", "--duration", "3s"]);
    let peak = number(&closed, "throughput_ops");
    assert!(peak > 0.0 && number(&closed, "errors") == 0.0, "{closed}");
    let open = |times: f64, duration: &str| {
        let rate = format!("{}", (peak * times).max(1.0));
        run(&server, &["--depth", "2048", "--rate", &rate, "--duration", duration])
    };
    let much = open(2.0, "5s");
    let goodput = number(&much, "goodput_ops");
    assert!(goodput > peak / 3.0, "a peak of {peak}, and at twice of it {goodput}: {much}");
    assert_eq!(number(&much, "may_be_applied"), 0.0, "what is refused has not begun: {much}");
    let less = open(0.3, "3s");
    let (asked, good) = (peak * 0.3, number(&less, "goodput_ops"));
    assert!(good > asked * 0.6, "asked for {asked}, answered {good}: {less}");
}
