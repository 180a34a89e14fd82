//! One client of three real processes while one of them is paused, and while one is killed: what
//! its reads and conditional writes cost.

#![expect(clippy::unwrap_used, reason = "what is not there fails the test")]
#![expect(clippy::disallowed_methods, reason = "real processes are paused in real time")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use annulus_net::client::{
    BlockingClient, BlockingNamespace, ClientOptions, Error, ReadOptions, WriteOptions,
};
use annulus_net::wire::{Class, Condition, Level, Version};
use annulus_tests::nodes::Nodes;
use annulus_tests::server::{StopOnDrop, eventually, scratch};

/// By then the client has noticed.
const NOTICED: Duration = Duration::from_secs(1);
/// And then no request takes longer: a quarter of the pause, and twenty times what is usual, for
/// hosts that are busy with more than this test (at a load of 8 one write took 857 ms).
const SLOW: Duration = Duration::from_secs(1);
const KEYS: usize = 64;

/// A request that was answered or failed.
struct Done {
    began: Instant,
    took: Duration,
    outcome: Result<(), Error>,
}

fn done<T>(outcomes: &mut Vec<Done>, run: impl FnOnce() -> Result<T, Error>) -> Option<T> {
    let began = Instant::now();
    let (value, outcome) = match run() {
        Ok(value) => (Some(value), Ok(())),
        Err(error) => (None, Err(error)),
    };
    outcomes.push(Done { began, took: began.elapsed(), outcome });
    value
}

fn key(number: usize) -> Vec<u8> {
    format!("key-{number}").into_bytes()
}

/// Reads one key after another.
fn read_until(keys: &BlockingNamespace, stop: &AtomicBool) -> Vec<Done> {
    let mut outcomes = Vec::new();
    for number in (0..KEYS).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
        let value = done(&mut outcomes, || keys.get(&key(number)));
        assert_ne!(value, Some(None), "all keys are there");
    }
    outcomes
}

/// Replaces the version that is known of one key after another.
fn write_until(keys: &BlockingNamespace, versions: &mut [Version], stop: &AtomicBool) -> Vec<Done> {
    let mut outcomes = Vec::new();
    let mut count = 0u64;
    for number in (0..KEYS).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
        count += 1;
        let condition = Condition::IfVersion(versions[number]);
        // So that one which may have been applied does not hold up the others for long.
        let timeout = Some(NOTICED);
        let level = Level::Quorum;
        let options = WriteOptions { condition, level, timeout, ..WriteOptions::default() };
        let value = count.to_string();
        let put = || keys.put_with(&key(number), value.as_bytes(), &options);
        match done(&mut outcomes, put) {
            Some(written) => versions[number] = written.version,
            None => {
                let read = keys.read(&key(number), &ReadOptions::default()).unwrap();
                versions[number] = read.values[0].version;
            }
        }
    }
    outcomes
}

/// Runs reads and conditional writes while `trouble` goes on, which says when it began.
fn under_load(
    keys: &BlockingNamespace,
    versions: &mut [Version],
    trouble: impl FnOnce() -> Instant,
) {
    let stop = AtomicBool::new(false);
    let (began, reads, writes) = thread::scope(|scope| {
        let reader = scope.spawn(|| read_until(keys, &stop));
        let writer = scope.spawn(|| write_until(keys, versions, &stop));
        let stopper = StopOnDrop(&stop);
        thread::sleep(Duration::from_millis(1_000));
        let began = trouble();
        drop(stopper);
        (began, reader.join().unwrap(), writer.join().unwrap())
    });
    for (what, outcomes) in [("reads", &reads), ("writes", &writes)] {
        let first =
            outcomes.iter().filter(|it| it.began < began + NOTICED && it.began + it.took > began);
        let later = outcomes.iter().filter(|it| it.began >= began + NOTICED);
        println!(
            "{what}: {} in all; slowest {:?} at first, {:?} later; errors {:?}",
            outcomes.len(),
            first.map(|it| it.took).max(),
            later.clone().map(|it| it.took).max(),
            outcomes
                .iter()
                .filter_map(|it| it
                    .outcome
                    .as_ref()
                    .err()
                    .map(|error| (it.began.saturating_duration_since(began), error)))
                .collect::<Vec<_>>()
        );
        for it in later {
            assert!(it.took < SLOW, "{what}: {:?} after {:?}", it.took, it.began - began);
        }
    }
    assert!(reads.iter().all(|it| it.outcome.is_ok()), "no read fails");
    // The one that was under way may have been applied before its node fell silent; then nobody
    // can tell whose the new version is.
    let failed: Vec<&Error> = writes.iter().filter_map(|it| it.outcome.as_ref().err()).collect();
    assert!(failed.len() <= 1, "{failed:?}");
    assert!(failed.iter().all(|error| error.class() == Class::MayBeApplied), "{failed:?}");
}

/// Reads that a node was asked for by clients.
fn gets(nodes: &Nodes, node: u16) -> u64 {
    let options = ClientOptions {
        timeout: Duration::from_secs(10),
        ..ClientOptions::new([nodes.client_address(node).to_string()])
    };
    let stats = BlockingClient::connect(options).unwrap().stats().unwrap();
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    stats["counters"]["gets"].as_u64().unwrap()
}

#[test]
fn a_paused_node_and_a_killed_one_cost_at_most_the_write_that_was_under_way() {
    let dir = scratch();
    let nodes = Nodes::start(&dir.path().join("dev"), 3);
    // It is told of one node, the one that is paused, and has the others from its HELLO.
    let options = ClientOptions {
        timeout: Duration::from_secs(5),
        ..ClientOptions::new([nodes.client_address(2).to_string()])
    };
    let client = BlockingClient::connect(options).unwrap();
    let keys = client.namespace("default").unwrap();
    let mut versions: Vec<Version> =
        (0..KEYS).map(|number| keys.put(&key(number), b"0").unwrap().version).collect();
    let is_used_again = |node: u16| {
        let before = gets(&nodes, node);
        eventually("it is used again", Duration::from_secs(20), || gets(&nodes, node) > before);
    };
    under_load(&keys, &mut versions, || {
        let began = Instant::now();
        nodes.signal(2, libc::SIGSTOP);
        thread::sleep(Duration::from_secs(4));
        nodes.signal(2, libc::SIGCONT);
        is_used_again(2);
        began
    });
    under_load(&keys, &mut versions, || {
        let began = Instant::now();
        nodes.kill_nine(3);
        thread::sleep(Duration::from_secs(3));
        nodes.restart(3);
        is_used_again(3);
        began
    });
}
