//! Several fake servers with the same data: what the client does when one of them is paused, slow
//! or gone.

use std::net::Shutdown;
use std::sync::MutexGuard;

use annulus_engine::model::OriginId;

use super::*;
use crate::wire::hello::{Node, Replica, Run};

/// Replicas of one another: node 1 is the first home of every key, then 2, then 3.
struct Cluster {
    nodes: Vec<FakeServer>,
}

impl Cluster {
    fn start() -> Cluster {
        Cluster::told_of(3)
    }

    /// Three nodes, of which each tells clients only of the first so many.
    fn told_of(count: usize) -> Cluster {
        let listeners: Vec<TcpListener> =
            (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let id = |at: usize| OriginId(u32::try_from(at + 1).unwrap());
        let address = |at: usize| listeners[at].local_addr().unwrap().to_string();
        let replica = |at| Replica { node: id(at), shard: 0 };
        let values = Arc::default();
        let start = |at: usize| {
            let mut facts = facts();
            facts.welcome.node = id(at);
            facts.welcome.nodes = (0..count)
                .map(|at| Node { id: id(at), shard_count: 1, address: address(at) })
                .collect();
            let replicas = (0..count).map(replica).collect();
            facts.welcome.runs = vec![Run { length: 16, replicas }];
            let store = Store { values: Arc::clone(&values), ..Store::default() };
            FakeServer::listen(&listeners[at], facts, store)
        };
        Cluster { nodes: (0..3).map(start).collect() }
    }

    fn options(&self) -> ClientOptions {
        ClientOptions {
            addresses: self.nodes.iter().map(|node| node.address.clone()).collect(),
            ..self.nodes[0].options()
        }
    }

    /// A namespace, once the client is connected to all nodes.
    fn namespace(&self, options: ClientOptions) -> BlockingNamespace {
        let space = BlockingClient::connect(options).unwrap().namespace("default").unwrap();
        space.put(b"k", b"v").unwrap();
        let pool = space.asynchronous().client().pool.clone();
        let connected = || pool.lock().slots.values().filter(|slot| slot.link.is_some()).count();
        until("all are connected", || connected() == 3);
        space
    }

    fn pause(&self, node: usize) -> MutexGuard<'_, ()> {
        self.nodes[node].store.pause.lock().unwrap()
    }

    /// Requests with keys that each node took.
    fn requests(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.store.requests.load(Ordering::SeqCst)).collect()
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if holds() {
            return;
        }
        block_on(Timer::start().unwrap().wait_until(Instant(1_000_000))).unwrap();
    }
    panic!("never: {what}");
}

fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    #[expect(clippy::disallowed_methods, reason = "how long it takes is the question")]
    let begin = std::time::Instant::now();
    (run(), begin.elapsed())
}

fn if_version(length: u64) -> WriteOptions {
    WriteOptions { condition: Condition::IfVersion(version(length)), ..Default::default() }
}

#[test]
fn reads_and_later_writes_go_on_when_a_node_pauses_and_it_is_used_again() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    let paused = cluster.pause(0);
    // Reads are hedged until it is known to be silent; a write would wait for it.
    let mut reads = Duration::ZERO;
    while reads < Duration::from_millis(60) {
        reads += timed(|| space.get(b"k").unwrap()).1;
    }
    for length in 1..51 {
        let (value, took) = timed(|| space.get(b"k").unwrap());
        assert_eq!(value.unwrap().len() as u64, length);
        assert!(took < Duration::from_millis(1_000), "read {length}: {took:?}");
        let value = vec![b'v'; usize::try_from(length + 1).unwrap()];
        let (written, took) = timed(|| space.put_with(b"k", &value, &if_version(length)));
        written.unwrap();
        assert!(took < Duration::from_millis(1_000), "write {length}: {took:?}");
    }
    // Known to be silent since the first read: blind writes are not sent to it either.
    space.put(b"k", b"v").unwrap();
    drop(paused);
    let before = cluster.requests();
    until("it is used again", || {
        space.get(b"k").unwrap();
        cluster.requests()[0] > before[0] + 20
    });
}

#[test]
fn a_blind_write_that_a_paused_node_has_is_not_sent_to_another() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    let paused = cluster.pause(0);
    let before = cluster.requests();
    let timeout = Some(Duration::from_millis(300));
    let options = WriteOptions { timeout, ..WriteOptions::default() };
    let (outcome, took) = timed(|| space.put_with(b"k", b"other", &options));
    assert_eq!(outcome.unwrap_err().class(), Class::MayBeApplied);
    assert!(took >= Duration::from_millis(290), "at its deadline: {took:?}");
    let if_absent = WriteOptions { condition: Condition::IfAbsent, ..options };
    assert_eq!(cluster.requests()[1..], before[1..]);
    // The next one goes elsewhere, because the node is known to be silent.
    space.put_with(b"new", b"v", &if_absent).unwrap();
    drop(paused);
}

#[test]
fn a_lost_connection_fails_a_blind_write_at_once() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    cluster.nodes[0].store.hang_up.store(true, Ordering::SeqCst);
    let (outcome, took) = timed(|| space.put(b"k", b"other"));
    assert_eq!(outcome.unwrap_err().class(), Class::MayBeApplied);
    assert!(took < Duration::from_secs(5), "{took:?}");
    cluster.nodes[0].store.hang_up.store(true, Ordering::SeqCst);
    assert_eq!(space.get(b"k").unwrap(), Some(b"v".to_vec()));
}

#[test]
fn a_conditional_write_whose_answer_is_lost_is_unsure_and_not_sent_again() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    // The first node takes the write, and hangs up instead of answering.
    cluster.nodes[0].store.apply_and_hang_up.store(true, Ordering::SeqCst);
    let error = space.put_with(b"k", b"longer", &if_version(1)).unwrap_err();
    assert_eq!(error.class(), Class::MayBeApplied, "{error}");
    assert_eq!(space.get(b"k").unwrap(), Some(b"longer".to_vec()));
    // Where no try is unsure, a false condition is one.
    let error = space.put_with(b"k", b"other", &if_version(1)).unwrap_err();
    assert!(matches!(error, Error::ConditionFailed { .. }), "{error}");
}

#[test]
fn a_node_that_has_not_seen_a_version_does_not_judge_it() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    space.put(b"k", b"long").unwrap();
    cluster.nodes[0].store.is_behind.store(true, Ordering::SeqCst);
    let before = cluster.requests();
    space.put_with(b"k", b"longer", &if_version(4)).unwrap();
    // It is left to catch up.
    space.put_with(b"k", b"the longest", &if_version(6)).unwrap();
    let after = cluster.requests();
    assert_eq!((after[0], after[1]), (before[0] + 1, before[1] + 2));
    // A version that nobody has seen is false in the end.
    let error = space.put_with(b"k", b"v", &if_version(99)).unwrap_err();
    assert!(matches!(error, Error::ConditionFailed { .. }), "{error}");
}

#[test]
fn a_read_that_is_late_is_hedged_and_the_late_answer_harms_nothing() {
    let cluster = Cluster::start();
    // Suspicion would help too, but only after a minute.
    let options = ClientOptions {
        suspect_after_min: Duration::from_secs(60),
        hedge_percent: 100,
        ..cluster.options()
    };
    let space = cluster.namespace(options);
    let slow = cluster.nodes[0].store.pause_keys.lock().unwrap();
    let before = cluster.requests();
    let (value, took) = timed(|| space.get(b"k").unwrap());
    assert_eq!(value, Some(b"v".to_vec()));
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(cluster.requests()[1], before[1] + 1);
    drop(slow);
    for _ in 0..20 {
        space.get(b"k").unwrap();
    }
    assert!(cluster.requests()[0] >= before[0] + 20, "the connection goes on");
}

#[test]
fn hedges_can_be_turned_off_and_one_node_has_none() {
    let cluster = Cluster::start();
    let options = ClientOptions {
        suspect_after_min: Duration::from_secs(60),
        hedge_percent: 0,
        ..cluster.options()
    };
    let space = cluster.namespace(options);
    let alone = FakeServer::start();
    let before = cluster.requests();
    let timeout = Some(Duration::from_millis(100));
    let options = ReadOptions { timeout, ..ReadOptions::default() };
    for space in [space, alone.namespace()] {
        let error = space.read(b"never", &options).unwrap_err();
        assert_eq!(error.class(), Class::NotStarted, "{error}");
    }
    assert_eq!(cluster.requests()[1..], before[1..]);
    assert_eq!(alone.store.requests.load(Ordering::SeqCst), 1);
}

#[test]
fn scans_and_batches_of_reads_leave_a_paused_node() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    let paused = cluster.pause(0);
    let records = space.scan(ScanOptions::default()).collect::<Result<Vec<_>>>().unwrap();
    assert_eq!(records.len(), 1);
    drop(paused);
    until("it is used again", || {
        let before = cluster.requests();
        space.get(b"k").unwrap();
        cluster.requests()[0] > before[0]
    });
    let paused = cluster.pause(0);
    let get = BatchOperation::Get { key: b"k".to_vec(), options: ReadOptions::default() };
    let (results, took) = timed(|| space.batch(&[get], None));
    assert!(matches!(&results[..], [Ok(BatchAnswer::Read(_))]), "{results:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop(paused);
}

#[test]
fn a_paused_seed_does_not_hold_up_the_others() {
    let cluster = Cluster::start();
    let paused = cluster.pause(0);
    let options = ClientOptions { connect_timeout: Duration::from_secs(20), ..cluster.options() };
    let (client, took) = timed(|| BlockingClient::connect(options).unwrap());
    assert!(took < Duration::from_secs(15), "{took:?}");
    client.ping().unwrap();
    drop(paused);
}

#[test]
fn addresses_that_no_server_names_are_nodes_too() {
    let cluster = Cluster::told_of(1);
    let space = cluster.namespace(cluster.options());
    let paused = cluster.pause(0);
    assert_eq!(space.get(b"k").unwrap(), Some(b"v".to_vec()));
    drop(paused);
}

#[test]
fn a_node_that_is_gone_is_left_and_found_again_at_its_address() {
    let cluster = Cluster::start();
    let space = cluster.namespace(cluster.options());
    let pool = space.asynchronous().client().pool.clone();
    cluster.nodes[0].store.refuse.store(true, Ordering::SeqCst);
    for socket in cluster.nodes[0].store.sockets.lock().unwrap().drain(..) {
        // May be closed already.
        let _ = socket.shutdown(Shutdown::Both);
    }
    for _ in 0..20 {
        assert_eq!(space.get(b"k").unwrap(), Some(b"v".to_vec()));
    }
    until("it is known to be gone", || !pool.is_healthy(OriginId(1)));
    let before = cluster.requests();
    space.get(b"k").unwrap();
    assert_eq!(cluster.requests()[0], before[0]);
    cluster.nodes[0].store.refuse.store(false, Ordering::SeqCst);
    until("it is used again", || {
        space.get(b"k").unwrap();
        cluster.requests()[0] > before[0]
    });
}

#[test]
fn nobody_there_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = BlockingClient::connect(ClientOptions::new([address])).err().unwrap();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

#[test]
fn the_second_address_is_used_when_the_first_is_dead() {
    let server = FakeServer::start();
    let addresses = ["127.0.0.1:1".to_owned(), server.address.clone()];
    let client = BlockingClient::connect(ClientOptions::new(addresses)).unwrap();
    client.ping().unwrap();
}
