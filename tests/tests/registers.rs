//! Keys of a linearizable namespace on three real processes: counters that many clients raise by
//! compare-and-set through all nodes, while one is killed and comes back.

#![expect(clippy::unwrap_used, reason = "what is not there fails the test")]
#![expect(clippy::disallowed_methods, reason = "real processes are killed in real time")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use annulus_net::client::{BlockingNamespace, Error, ReadOptions, WriteOptions};
use annulus_net::wire::Condition;
use annulus_tests::nodes::Nodes;
use annulus_tests::server::{eventually, scratch};

/// By then nodes that have started know each other.
const KNOWN: Duration = Duration::from_secs(60);
/// Clients of each node.
const CLIENTS: u16 = 2;

/// What one client did to a counter.
#[derive(Debug, Default)]
struct Raised {
    acknowledged: u64,
    unsure: u64,
    refused: u64,
}

/// Reads the counter, and puts the next number if nobody was faster.
fn raise(keys: &BlockingNamespace, key: &[u8]) -> Result<(), Error> {
    let timeout = Some(Duration::from_secs(5));
    let read = keys.read(key, &ReadOptions { timeout, ..ReadOptions::default() })?;
    let (number, condition) = match read.values.as_slice() {
        [] => (0, Condition::IfAbsent),
        [value] => {
            let number: u64 = String::from_utf8_lossy(&value.value).parse().unwrap();
            (number, Condition::IfVersion(value.version))
        }
        more => panic!("{more:?}"),
    };
    let options = WriteOptions { condition, timeout, ..WriteOptions::default() };
    keys.put_with(key, (number + 1).to_string().as_bytes(), &options).map(drop)
}

fn raise_until(keys: &BlockingNamespace, stop: &AtomicBool, acks: &AtomicU64) -> Raised {
    let mut raised = Raised::default();
    while !stop.load(Ordering::Relaxed) {
        match raise(keys, b"counter") {
            Ok(()) => {
                raised.acknowledged += 1;
                acks.fetch_add(1, Ordering::Relaxed);
            }
            Err(Error::ConditionFailed { .. } | Error::NotStarted { .. }) => raised.refused += 1,
            Err(Error::Unreachable { .. }) => thread::sleep(Duration::from_millis(20)),
            // A read that did not end changes nothing, but is not told apart.
            Err(_) => raised.unsure += 1,
        }
    }
    raised
}

fn value(nodes: &Nodes, node: u16, key: &str) -> u64 {
    let read = nodes.cli(node, &["get", key, "--ns", "counts"]).expect_code(0);
    String::from_utf8_lossy(&read.stdout).parse().unwrap()
}

#[test]
fn a_counter_raised_through_all_nodes_counts_every_acknowledged_raise_though_one_is_killed() {
    let dir = scratch();
    let nodes = Nodes::start(&dir.path().join("dev"), 3);
    let _ = nodes.cli(1, &["ns", "create", "counts", "--mode", "linearizable"]).expect_code(0);
    eventually("the homes have founded their registers", KNOWN, || {
        (1..=3).all(|node| nodes.cli(node, &["put", "begun", "1", "--ns", "counts"]).code == 0)
    });
    // What is no register goes its own way beside them.
    let _ = nodes.cli(1, &["put", "plain", "1", "--w", "all"]).expect_code(0);
    let clients: Vec<BlockingNamespace> = (1..=3)
        .flat_map(|node| (0..CLIENTS).map(move |_| node))
        .map(|node| nodes.namespace(node, "counts"))
        .collect();
    let (stop, acks) = (AtomicBool::new(false), AtomicU64::new(0));
    let reached = |count: u64| {
        eventually("the counter is raised", KNOWN, || acks.load(Ordering::Relaxed) >= count);
    };
    let raised: Vec<Raised> = thread::scope(|scope| {
        let (stop, acks) = (&stop, &acks);
        let raising: Vec<_> =
            clients.iter().map(|keys| scope.spawn(move || raise_until(keys, stop, acks))).collect();
        reached(100);
        nodes.kill_nine(2);
        let before = acks.load(Ordering::Relaxed);
        // Two of three are a majority.
        reached(before + 100);
        nodes.restart(2);
        let before = acks.load(Ordering::Relaxed);
        reached(before + 100);
        stop.store(true, Ordering::Relaxed);
        raising.into_iter().map(|raising| raising.join().unwrap()).collect()
    });
    let acknowledged: u64 = raised.iter().map(|it| it.acknowledged).sum();
    let unsure: u64 = raised.iter().map(|it| it.unsure).sum();
    println!("{raised:?}");
    eventually("all nodes answer", KNOWN, || {
        (1..=3).all(|node| nodes.cli(node, &["get", "counter", "--ns", "counts"]).code == 0)
    });
    for node in 1..=3 {
        let counted = value(&nodes, node, "counter");
        let explained = acknowledged..=acknowledged + unsure;
        assert!(explained.contains(&counted), "{counted} of {explained:?} at node {node}");
    }

    // What scans show is what was put.
    let exported = nodes.cli(1, &["export", "--ns", "counts"]).expect_code(0);
    let exported = String::from_utf8_lossy(&exported.stdout).into_owned();
    assert!(exported.contains("{\"key\":\"begun\",\"value\":\"1\"}"), "{exported}");

    // One of three is no majority: neither reads nor writes are answered, and nothing is done.
    nodes.kill_nine(2);
    nodes.kill_nine(3);
    // At first a request may be on its way to one that is gone; then it is known, and refused at once.
    eventually("reads are refused", KNOWN, || {
        nodes.cli(1, &["get", "begun", "--ns", "counts"]).code == 4
    });
    let put = ["put", "begun", "2", "--ns", "counts"];
    let refused = nodes.cli(1, &put).expect_code(4);
    assert!(refused.stderr.contains("not started"), "{refused:?}");
    for node in [2, 3] {
        nodes.restart(node);
    }
    eventually("what was refused never happened", KNOWN, || {
        let read = nodes.cli(1, &["get", "begun", "--ns", "counts"]);
        read.code == 0 && read.stdout == b"1"
    });
}
