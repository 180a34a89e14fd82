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
const WORK: [&str; 6] = ["--workload", "e", "--keys", "20000", "--conns", "32"];

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
    // In time is what takes no longer than twice what nearly all took then: on a machine where
    // others take the core away, waits are longer than any server makes them.
    let usual_us = closed["latency_us"]["p99"].as_f64().expect("a percentile");
    let deadline = format!("{}ms", (usual_us / 500.0).clamp(100.0, 2_000.0).ceil());
    let open = |times: f64, duration: &str| {
        let rate = format!("{}", (peak * times).max(1.0));
        let more = ["--depth", "2048", "--deadline", &deadline, "--rate", &rate];
        run(&server, &[&more[..], &["--duration", duration]].concat())
    };
    let much = open(2.0, "5s");
    let goodput = number(&much, "goodput_ops");
    assert!(goodput > peak / 3.0, "a peak of {peak}, and at twice of it {goodput}: {much}");
    // A write that began in time may meet a disk that stalls; what is refused has not begun.
    let (refused, begun) = (number(&much, "not_started"), number(&much, "may_be_applied"));
    assert!(refused > 0.0 && begun * 20.0 <= refused, "{much}");
    let less = open(0.3, "3s");
    let (asked, good) = (peak * 0.3, number(&less, "goodput_ops"));
    assert!(good > asked * 0.6, "asked for {asked}, answered {good}: {less}");
}
