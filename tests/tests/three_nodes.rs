//! Three real processes as one cluster: stopped, killed and paused under load, and asked
//! afterwards whether they have kept what they acknowledged and come to agree.

#![expect(clippy::unwrap_used, reason = "what is not there fails the test")]
#![expect(clippy::disallowed_methods, reason = "real processes are killed in real time")]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use annulus_engine::model::OriginId;
use annulus_net::client::{BlockingNamespace, Error, WriteOptions, Written};
use annulus_net::wire::Level;
use annulus_net::wire::hello::Hello;
use annulus_net::wire::peer::{PEER_HELLO, PeerHello};
use annulus_net::wire::request::Outgoing;
use annulus_net::wire::slices::Head;
use annulus_tests::nodes::{Nodes, free_ports};
use annulus_tests::raw::Raw;
use annulus_tests::server::{STOP_TIMEOUT, Server, Setup, StopOnDrop, eventually, scratch};

/// By then nodes that can reach each other agree.
const AGREED: Duration = Duration::from_secs(60);

fn line(key: &str, value: &str) -> String {
    format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}")
}

#[test]
fn a_node_that_was_stopped_comes_back_and_catches_up() {
    let dir = scratch();
    let nodes = Nodes::start(&dir.path().join("dev"), 3);
    for key in ["stays", "goes", "changes"] {
        let _ = nodes.cli(1, &["put", key, "1"]).expect_code(0);
    }
    assert_eq!(nodes.cli(2, &["get", "stays", "--r", "all"]).expect_code(0).stdout, b"1");
    // What a namespace is set to is known to all.
    let _ = nodes.cli(1, &["ns", "create", "bank", "--availability", "cp"]).expect_code(0);
    eventually("the others know the namespace", AGREED, || {
        [2, 3].iter().all(|node| nodes.cli(*node, &["put", "a", "1", "--ns", "bank"]).code == 0)
    });

    assert!(nodes.stop(3) < STOP_TIMEOUT);
    let _ = nodes.cli(1, &["put", "changes", "2"]).expect_code(0);
    let _ = nodes.cli(2, &["del", "goes"]).expect_code(0);
    let _ = nodes.cli(1, &["get", "goes"]).expect_code(1);
    nodes.restart(3);
    let expected = BTreeSet::from([line("stays", "1"), line("changes", "2")]);
    let found = nodes.converged("default", AGREED);
    assert_eq!(found.iter().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(nodes.cli(3, &["get", "changes", "--r", "one"]).expect_code(0).stdout, b"2");
    let _ = nodes.cli(3, &["get", "goes", "--r", "one"]).expect_code(1);

    // One of three is no majority: nothing is begun, and what is there can still be read.
    for node in [2, 3] {
        assert!(nodes.stop(node) < STOP_TIMEOUT, "with others that are gone");
    }
    for namespace in ["bank", "default"] {
        let put = ["put", "a", "2", "--ns", namespace, "--w", "quorum"];
        let refused = nodes.cli(1, &put).expect_code(4);
        assert!(refused.stderr.contains("not started"), "{refused:?}");
    }
    let get = ["get", "a", "--ns", "bank", "--r", "one"];
    assert_eq!(nodes.cli(1, &get).expect_code(0).stdout, b"1");
    let _ = nodes.cli(1, &["get", "a", "--ns", "bank", "--r", "quorum"]).expect_code(4);
    let _ = nodes.cli(1, &["put", "alone", "1", "--w", "one"]).expect_code(0);
    for node in [2, 3] {
        nodes.restart(node);
    }
    assert_eq!(nodes.converged("bank", AGREED), [line("a", "1")]);
    let found = nodes.converged("default", AGREED);
    assert!(found.contains(&line("alone", "1")), "{found:?}");
    assert!(!found.contains(&line("a", "2")), "what was refused never happens");
}

/// What became of a load.
#[derive(Debug, Default)]
struct Load {
    acknowledged: BTreeSet<u64>,
    sent: u64,
    not_started: BTreeSet<u64>,
    may_be_applied: u64,
}

fn load_key(number: u64) -> String {
    format!("load-{number}")
}

fn load_line(number: u64) -> String {
    line(&load_key(number), &format!("value-{number}"))
}

/// Writes keys of their own from `first` on, pipelined, until told to stop.
fn put_until(keys: &BlockingNamespace, first: u64, stop: &AtomicBool, acks: &AtomicU64) -> Load {
    let mut load = Load::default();
    let mut pipeline = keys.pipeline::<u64>(64);
    let note = |load: &mut Load, number: u64, result: Result<Written, Error>| match result {
        Ok(written) => {
            assert!(written.acks >= 2, "{written:?}");
            load.acknowledged.insert(number);
            acks.fetch_add(1, Ordering::Relaxed);
        }
        Err(Error::NotStarted { .. }) => drop(load.not_started.insert(number)),
        Err(Error::MayBeApplied { .. }) => load.may_be_applied += 1,
        Err(error) => panic!("write {number}: {error}"),
    };
    while !stop.load(Ordering::Relaxed) {
        let number = first + load.sent;
        load.sent += 1;
        let options = WriteOptions {
            level: Level::Quorum,
            timeout: Some(Duration::from_secs(10)),
            ..WriteOptions::default()
        };
        let (key, value) = (load_key(number), format!("value-{number}"));
        let finished = pipeline.put(number, key.into_bytes(), value.into_bytes(), options);
        if let Some((number, result)) = finished {
            note(&mut load, number, result);
        }
    }
    while let Some((number, result)) = pipeline.finish_one() {
        note(&mut load, number, result);
    }
    load
}

/// All nodes agree, have what was acknowledged and nothing that was refused or never sent.
fn check(nodes: &Nodes, loads: &[(u64, Load)]) {
    let mut found = BTreeSet::new();
    // Each token is shown by one home: all may show the same and one of them lack something still.
    let is_there = |found: &BTreeSet<String>, number: &u64| found.contains(&load_line(*number));
    let until = Instant::now() + AGREED;
    while Instant::now() < until {
        found = nodes.converged("default", AGREED).into_iter().collect();
        if loads.iter().all(|(_, it)| it.acknowledged.iter().all(|it| is_there(&found, it))) {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    let mut may_be = BTreeSet::new();
    for (first, load) in loads {
        for number in &load.acknowledged {
            assert!(is_there(&found, number), "lost: {number}");
        }
        for number in &load.not_started {
            assert!(!found.contains(&load_line(*number)), "refused, and there: {number}");
        }
        may_be.extend((*first..first + load.sent).map(load_line));
    }
    let strange: Vec<&String> = found.difference(&may_be).collect();
    assert!(strange.is_empty(), "never sent: {strange:?}");
}

#[test]
fn what_a_quorum_acknowledged_outlives_kills_and_pauses_of_a_node() {
    let dir = scratch();
    let nodes = Nodes::start(&dir.path().join("dev"), 3);
    let acks = AtomicU64::new(0);
    let mut loads = Vec::new();
    // Each round troubles one node while another takes the load.
    type Trouble = fn(&Nodes);
    let rounds: [(u16, Trouble); 2] = [
        (1, |nodes| {
            nodes.kill_nine(2);
            thread::sleep(Duration::from_millis(700));
            nodes.restart(2);
            // It takes writes at once, from clients and as a replica of others.
            let _ = nodes.cli(2, &["put", "load-0", "value-0", "--w", "quorum"]).expect_code(0);
            eventually("all three take writes", Duration::from_secs(10), || {
                nodes.cli(2, &["put", "load-1", "value-1", "--w", "all"]).code == 0
            });
        }),
        (2, |nodes| {
            nodes.signal(3, libc::SIGSTOP);
            let begin = Instant::now();
            // Two of three are a quorum. The load itself may wait: what its client had sent to the
            // paused node is not sent again.
            for number in 2..7 {
                let (key, value) = (load_key(number), format!("value-{number}"));
                let _ = nodes.cli(2, &["put", &key, &value, "--w", "quorum"]).expect_code(0);
            }
            assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
            thread::sleep(Duration::from_secs(3).saturating_sub(begin.elapsed()));
            nodes.signal(3, libc::SIGCONT);
        }),
    ];
    for ((through, trouble), first) in rounds.into_iter().zip([0, 1 << 32]) {
        let keys = nodes.namespace(through, "default");
        let stop = AtomicBool::new(false);
        let before = acks.load(Ordering::Relaxed);
        let load = thread::scope(|scope| {
            let (stop, acks) = (&stop, &acks);
            let writer = scope.spawn(move || put_until(&keys, first, stop, acks));
            let stopper = StopOnDrop(stop);
            eventually("the load runs", Duration::from_secs(20), || {
                acks.load(Ordering::Relaxed) > before + 200 || writer.is_finished()
            });
            trouble(&nodes);
            thread::sleep(Duration::from_millis(500));
            drop(stopper);
            writer.join().unwrap()
        });
        println!(
            "through node {through}: {} sent, {} acknowledged, {} not started, {} unsure",
            load.sent,
            load.acknowledged.len(),
            load.not_started.len(),
            load.may_be_applied
        );
        loads.push((first, load));
        check(&nodes, &loads);
    }
}

/// A member of a list, alone.
fn member(dir: &tempfile::TempDir, name: &str, peer: u16, join: &[u16]) -> Setup {
    let address = |port: &u16| format!("127.0.0.1:{port}");
    let join: Vec<String> = join.iter().map(address).collect();
    Setup::new(dir.path().join(name))
        .with("shards", "1")
        .with("memory", "128MiB")
        .with("peer-listen", &address(&peer))
        .with("join", &join.join(","))
}

/// How often a connection of another node was refused for this reason.
fn refusals(server: &Server, reason: &str) -> u64 {
    let (status, body) =
        server.http("GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert_eq!(status, 200);
    let wanted = format!("reason=\"{reason}\"");
    let lines = body.lines().filter(|line| {
        line.starts_with("annulus_peer_refusals_by_reason_total{") && line.contains(&wanted)
    });
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_stranger_at_the_peers_port_is_refused_and_counted() {
    let dir = scratch();
    let base = free_ports(3, 1);
    let server = member(&dir, "one", base, &[base, base + 1, base + 2]).start();
    let serves = || {
        let _ = server.cli(&["put", "k", "v", "--w", "one"]).expect_code(0);
        assert_eq!(server.cli(&["get", "k", "--r", "one"]).expect_code(0).stdout, b"v");
    };
    serves();
    let counted = |reason: &str, send: &dyn Fn(&mut Raw)| {
        let before = refusals(&server, reason);
        let mut raw = Raw::connect(server.peer).unwrap();
        send(&mut raw);
        // It says why, if that can be said, and closes.
        let _ = raw.farewell();
        eventually(reason, Duration::from_secs(10), || refusals(&server, reason) > before);
    };
    counted("checksum", &|raw| {
        let mut state = 88_172_645_463_325_252_u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect();
        raw.stream.write_all(&noise).unwrap();
    });
    counted("no_hello", &|raw| raw.send(0, &Outgoing::Hello(Hello::default())).unwrap());
    counted("cluster", &|raw| {
        let hello = PeerHello {
            lane: 0,
            partition_bits: 12,
            node: OriginId(2),
            cluster: 12_345,
            hash_seed: 1,
            members_digest: 1,
            life: 1,
            shard: 0,
            shard_count: 1,
            wanted_node: OriginId(1),
            wanted_shard: 0,
        };
        let head = Head { opcode: PEER_HELLO, ..Head::default() };
        let bytes = raw.frames_of(head, &|body| hello.encode(body));
        raw.stream.write_all(&bytes).unwrap();
    });
    assert!(server.stderr().contains("connection on the peers' port refused"));
    serves();
    let _ = server.terminate();
}

#[test]
fn nodes_that_do_not_belong_together_say_so_and_stay_apart() {
    let dir = scratch();
    let base = free_ports(3, 1);
    let both = [base, base + 1];
    let all = [base, base + 1, base + 2];
    let key = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (one, other) =
        (key("key-1", "a key of the one cluster"), key("key-2", "another's key here"));
    let with_key = |setup: Setup, key: &str| setup.with("cluster-key-file", key);
    let pairs = [
        // Lists that differ; a key of their own makes them one cluster all the same.
        (
            with_key(member(&dir, "a", both[0], &both), &one),
            with_key(member(&dir, "b", both[1], &all), &one),
            "disagree about members",
        ),
        // The same list, other keys.
        (
            with_key(member(&dir, "c", both[0], &both), &one),
            with_key(member(&dir, "d", both[1], &both), &other),
            "another cluster",
        ),
        // Lists that differ, and nothing else that could be shared.
        (member(&dir, "e", both[0], &both), member(&dir, "f", both[1], &all), "another cluster"),
    ];
    for (left, right, why) in pairs {
        let (left, right) = (left.start(), right.start());
        for server in [&left, &right] {
            eventually(why, Duration::from_secs(20), || server.stderr().contains(why));
            assert!(!server.stderr().contains("linked to node"), "{}", server.stderr());
            let refused = server.cli(&["put", "k", "v", "--w", "2"]).expect_code(4);
            assert!(refused.stderr.contains("not started"), "{refused:?}");
        }
        let _ = (left.terminate(), right.terminate());
    }
    // What a directory was made for is what it is good for.
    let refused = with_key(member(&dir, "a", both[0], &both), &other).refusal();
    assert!(refused.code != 0 && refused.stderr.contains("cluster"), "{refused:?}");
    // Who the members are is known by then: a list changes nothing.
    for list in [&all[..], &both[..]] {
        let server = with_key(member(&dir, "a", both[0], list), &one).start();
        let status = server.cli(&["status", "--json"]).expect_code(0).json();
        assert_eq!(status["nodes"].as_array().map(Vec::len), Some(2), "{status}");
        let _ = server.terminate();
    }
}
