//! Real processes: a fourth node joins three by one address, is killed on its way and goes on; then
//! one of the first leaves and ends by itself. Meanwhile somebody writes and reads all the time.

#![expect(clippy::unwrap_used, reason = "what is not there fails the test")]
#![expect(clippy::disallowed_methods, reason = "real processes are waited for in real time")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use annulus_net::client::{BlockingClient, BlockingNamespace, ClientOptions, Error};
use annulus_tests::nodes::free_ports;
use annulus_tests::server::{Server, Setup, eventually, scratch};
use serde_json::Value;

/// By then all partitions are where they belong.
const SETTLED: Duration = Duration::from_secs(240);
/// Keys that are written over and over.
const KEYS: u64 = 400;

fn founded(base: u16, dir: &std::path::Path, index: u16, all: &str) -> Setup {
    let peer = format!("127.0.0.1:{}", base + index);
    Setup::new(dir.join(format!("node-{}", index + 1)))
        .with("shards", "2")
        .with("partition-bits", "6")
        .with("peer-listen", &peer)
        .with("join", all)
}

fn namespace(addresses: &[&Server]) -> BlockingNamespace {
    let options = ClientOptions {
        timeout: Duration::from_secs(20),
        connect_timeout: Duration::from_secs(10),
        ..ClientOptions::new(addresses.iter().map(|server| server.client.to_string()))
    };
    BlockingClient::connect(options).unwrap().namespace("default").unwrap()
}

fn status(server: &Server) -> Value {
    server.cli(&["status", "--json"]).expect_code(0).json()
}

fn is_settled(server: &Server, members: usize) -> bool {
    let status = status(server);
    let rows = status["nodes"].as_array().unwrap();
    status["partitions_left"] == 0
        && rows.len() == members
        && rows.iter().all(|row| row["state"] == "up")
}

/// A read; again for a while if it was not started: a node that has just left says so.
fn read(store: &BlockingNamespace, name: &str) -> Option<Vec<u8>> {
    for _ in 0..100 {
        match store.get(name.as_bytes()) {
            Err(Error::NotStarted { .. }) => thread::sleep(Duration::from_millis(50)),
            found => return found.unwrap(),
        }
    }
    panic!("{name} is not read");
}

#[test]
fn a_node_joins_by_one_address_and_another_leaves_while_all_is_used() {
    let dir = scratch();
    let base = free_ports(3, 1);
    let all: Vec<String> = (0..3).map(|index| format!("127.0.0.1:{}", base + index)).collect();
    let all = all.join(",");
    let mut first: Vec<Server> = thread::scope(|scope| {
        let start = |index| founded(base, dir.path(), index, &all).start();
        let starting: Vec<_> = (0..3).map(|index| scope.spawn(move || start(index))).collect();
        starting.into_iter().map(|it| it.join().unwrap()).collect()
    });
    eventually("the three know one another", SETTLED, || is_settled(&first[0], 3));

    let (is_over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let store = namespace(&[&first[0], &first[1], &first[2]]);
    let (leaver, joiner) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            // Of each key the last value that was acknowledged, and none that comes later is lost.
            let mut rounds = 0u64;
            while !is_over.load(Ordering::Relaxed) {
                rounds += 1;
                for key in 0..KEYS {
                    let name = format!("key-{key}");
                    let value = format!("{rounds}");
                    // What may be applied is written again in the next round.
                    if store.put(name.as_bytes(), value.as_bytes()).is_ok() {
                        written.fetch_add(1, Ordering::Relaxed);
                        let found = read(&store, &name);
                        assert_eq!(found, Some(value.into_bytes()), "{name}");
                    }
                }
            }
            rounds
        });
        let done = catch_unwind(AssertUnwindSafe(|| {
            eventually("there is something to move", SETTLED, || {
                written.load(Ordering::Relaxed) > KEYS
            });
            let setup = Setup::new(dir.path().join("node-4"))
                .with("peer-listen", &format!("127.0.0.1:{}", free_ports(1, 1)))
                .with("join", &first[1].client.to_string());
            let joiner = setup.start();
            eventually("the fourth is a member", SETTLED, || {
                status(&first[0])["nodes"].as_array().unwrap().len() == 4
            });
            // On its way it is killed, and goes on where it was.
            thread::sleep(Duration::from_secs(2));
            let joiner = joiner.kill_nine().start();
            eventually("the fourth has its share", SETTLED, || is_settled(&first[0], 4));
            let row = status(&first[0])["nodes"][3].clone();
            assert!(row["partitions"].as_u64().unwrap() >= 40, "{row}");

            let mut leaver = first.remove(2);
            let id = status(&leaver)["nodes"]
                .as_array()
                .unwrap()
                .iter()
                .find(|row| row["address"] == leaver.client.to_string())
                .and_then(|row| row["id"].as_u64())
                .unwrap();
            let _ = joiner.cli(&["decommission", &id.to_string()]).expect_code(0);
            let ended = leaver.wait(SETTLED).expect("it ends by itself");
            assert_eq!(ended.code(), Some(0));
            let again = leaver.setup().clone();
            drop(leaver);
            eventually("three are left", SETTLED, || is_settled(&first[0], 3));
            (again, joiner)
        }));
        is_over.store(true, Ordering::Relaxed);
        let wrote = writer.join();
        let done = done.unwrap_or_else(|what| resume_unwind(what));
        assert!(wrote.unwrap() > 1);
        done
    });
    // It was removed, and says so.
    let refused = leaver.refusal();
    assert!(refused.stderr.contains("cannot come back"), "{refused:?}");
    // Everything is there, on every node of three copies.
    let store = namespace(&[&joiner]);
    for key in 0..KEYS {
        assert!(store.get(format!("key-{key}").as_bytes()).unwrap().is_some());
    }
    drop(first);
}
