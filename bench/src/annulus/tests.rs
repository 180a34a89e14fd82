//! The target against the server's side of a connection, in memory and over a socket.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpListener;

use annulus_engine::model::OriginId;
use annulus_net::server_connection::{
    ConnectionOptions, MemoryBudget, Replies, ServerConnection, ServerFacts,
};
use annulus_net::wire::Request as Incoming;
use annulus_net::wire::hello::{
    self, Limits, Mode, NamespaceFact, Replica, Run, Welcome as ServerWelcome,
};
use annulus_net::wire::response::{Failure, Page, ReadFacts, ValueRef, WriteFacts};

use super::*;
use crate::keys::{Distribution, Stripe};
use crate::load::{Load, Mix, Until};
use crate::report::Report;
use crate::verify::Book;

/// A server of two shards that keeps what it is told in a map.
fn facts(in_flight_max: u32) -> ServerFacts {
    let replica = |shard| Replica { node: OriginId(1), shard };
    ServerFacts {
        welcome: ServerWelcome {
            version: hello::VERSION,
            partition_bits: 4,
            shard_count: 2,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 7,
            hash_seed: 42,
            map_version: 1,
            wall_us: 1,
            limits: Limits { in_flight_max, value_size_max: 300_000, ..Limits::default() },
            runs: vec![
                Run { length: 10, replicas: vec![replica(0)] },
                Run { length: 6, replicas: vec![replica(1)] },
            ],
            nodes: Vec::new(),
            namespaces: vec![NamespaceFact {
                id: NamespaceId(1),
                mode: Mode::Lww,
                name: "default".into(),
            }],
        },
        options: ConnectionOptions::default(),
    }
}

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

fn serve(
    map: &mut Map,
    replies: &mut Replies<'_>,
    ticket: annulus_net::server_connection::Ticket,
    request: &Incoming<'_>,
) {
    match request {
        Incoming::Put(put) if put.key == b"refused" => {
            replies.failure(ticket, &Failure::new(Status::BUSY, "later"));
        }
        Incoming::Put(put) => {
            map.insert(put.key.to_vec(), put.value.to_vec());
            replies.written(ticket, &WriteFacts::default());
        }
        Incoming::Get(get) => {
            let version = annulus_net::wire::Version::default();
            let found = map.get(get.key).map(|value| ValueRef {
                version,
                expiry_ms: 0,
                value: value.into(),
            });
            replies.read(ticket, &ReadFacts::default(), found.as_slice());
        }
        Incoming::Scan(scan) => replies.page(ticket, Page::new(scan, 100, 1000), None),
        _ => replies.failure(ticket, &Failure::new(Status::UNSUPPORTED, "")),
    }
}

fn levels() -> Levels {
    Levels { namespace: "default".into(), read: Level::Default, write: Level::Default }
}

#[test]
fn every_request_ends_once_however_small_the_window() {
    let facts = facts(3);
    let plan = Plan::new(&facts.welcome, &levels(), false).unwrap();
    let mut server = ServerConnection::new(BEGIN, &facts, MemoryBudget::new(1 << 20));
    let (mut target, mut out, mut seen) = (plan.connect(0), Vec::new(), Vec::new());
    let mut map = Map::new();
    let mut turn = |target: &mut Annulus, out: &mut Vec<u8>, seen: &mut Vec<(u32, String)>| {
        let mut answers = Vec::new();
        let bytes = std::mem::take(out);
        let mut handler = |replies: &mut Replies<'_>,
                           arrival: annulus_net::server_connection::Arrival,
                           request: Incoming<'_>| {
            serve(&mut map, replies, arrival.ticket, &request);
        };
        server.receive(BEGIN, &bytes, &facts, &mut answers, &mut handler).unwrap();
        server.fill_output(&mut answers, usize::MAX);
        let mut done = |id, reply: Reply<'_>| {
            let text = match reply {
                Reply::Value(value) => format!("value of {}", value.len()),
                other => format!("{other:?}"),
            };
            seen.push((id, text));
        };
        target.receive(&answers, out, &mut done).unwrap();
    };
    target.start(&mut out);
    turn(&mut target, &mut out, &mut seen);
    assert!(target.ready());
    assert!(target.check_sizes(16, 300_001).unwrap_err().contains("limit of 300000"));
    let big = vec![7; 200_000];
    target.put(0, &Write { key: b"big", value: &big }, &mut out);
    target.put(1, &Write { key: b"refused", value: b"v" }, &mut out);
    target.get(2, b"none", &mut out);
    target.get(3, b"big", &mut out);
    target.scan(4, b"big", 10, &mut out);
    (0..4).for_each(|_| turn(&mut target, &mut out, &mut seen));
    seen.sort();
    let texts: Vec<_> = seen.iter().map(|(id, text)| (*id, text.as_str())).collect();
    assert_eq!(
        texts,
        [
            (0, "Written"),
            (1, "NotStarted(\"BUSY: later\")"),
            (2, "Absent"),
            (3, "value of 200000"),
            (4, "Scanned(0)"),
        ]
    );
}

#[test]
fn what_waits_for_the_window_too_long_is_not_sent_and_the_newest_goes_first() {
    let facts = facts(1);
    let plan = Plan::new(&facts.welcome, &levels(), false).unwrap();
    let mut server = ServerConnection::new(BEGIN, &facts, MemoryBudget::new(1 << 20));
    let (mut target, mut out, mut seen) = (plan.connect(0), Vec::new(), Vec::new());
    let mut map = Map::new();
    let mut turn = |target: &mut Annulus, out: &mut Vec<u8>, seen: &mut Vec<(u32, String)>| {
        let (mut answers, bytes) = (Vec::new(), std::mem::take(out));
        let mut handler = |replies: &mut Replies<'_>,
                           arrival: annulus_net::server_connection::Arrival,
                           request: Incoming<'_>| {
            serve(&mut map, replies, arrival.ticket, &request);
        };
        server.receive(BEGIN, &bytes, &facts, &mut answers, &mut handler).unwrap();
        let mut done = |id, reply: Reply<'_>| seen.push((id, format!("{reply:?}")));
        target.receive(&answers, out, &mut done).unwrap();
    };
    let ms = Duration::from_millis;
    target.start(&mut out);
    turn(&mut target, &mut out, &mut seen);
    // The window is one: the first is sent, the others wait.
    for (id, at) in [(0, 0), (1, 10), (2, 70)] {
        target.set_time(ms(at), ms(at + 100));
        target.get(id, b"none", &mut out);
    }
    // By then the second has waited for more than half of its time.
    target.set_time(ms(75), ms(175));
    turn(&mut target, &mut out, &mut seen);
    target.set_time(ms(120), ms(220));
    turn(&mut target, &mut out, &mut seen);
    let late = format!("{:?}", Reply::NotStarted(UNSENT.to_owned()));
    let expected = [(0, "Absent".to_owned()), (2, "Absent".to_owned()), (1, late)];
    assert_eq!(seen, expected);
    assert!(out.is_empty());
}

#[test]
fn a_connection_serves_the_keys_of_its_shard_alone() {
    let plan = Plan::new(&facts(8).welcome, &levels(), true).unwrap();
    let (first, second) = (plan.connect(0), plan.connect(1));
    assert_eq!((first.lane(), second.lane(), plan.connect(2).lane()), (0, 1, 0));
    for i in 0..1000 {
        let key = format!("key{i}").into_bytes();
        assert!(first.serves(&key) != second.serves(&key));
    }
    let unaware = Plan::new(&facts(8).welcome, &levels(), false).unwrap();
    assert!(unaware.connect(0).serves(b"a") && unaware.connect(1).serves(b"a"));
}

#[test]
fn a_missing_namespace_is_named() {
    let levels = Levels { namespace: "other".into(), ..levels() };
    let error = Plan::new(&facts(8).welcome, &levels, true).unwrap_err();
    assert_eq!(error, "there is no namespace other");
}

/// What is wrong with a server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// Every seventh request is refused.
    Busy,
    /// After 500 requests all values are wrong.
    Lies,
}

/// Serves `connections` connections, one after another in turns, until all are closed.
fn serve_sockets(listener: &TcpListener, connections: usize, flaw: Flaw) {
    let map = RefCell::new(Map::new());
    let mut open: Vec<_> = (0..connections)
        .map(|_| {
            let (stream, _) = listener.accept().unwrap();
            stream.set_nonblocking(true).unwrap();
            (stream, None::<(ServerFacts, ServerConnection)>)
        })
        .collect();
    let mut input = vec![0; 64 << 10];
    let mut answered = 0;
    while !open.is_empty() {
        let mut idle = true;
        open.retain_mut(|(stream, state)| {
            let size = match stream.read(&mut input) {
                Ok(0) => return false,
                Ok(size) => size,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            };
            idle = false;
            // Told apart by the shard that HELLO asks for, at byte 12 of its body.
            let (facts, server) = state.get_or_insert_with(|| {
                let head = annulus_net::wire::frame::HEADER_SIZE + 12;
                let mut facts = facts(8);
                facts.welcome.shard = u32::from(input[head]) & 1;
                let server = ServerConnection::new(BEGIN, &facts, MemoryBudget::new(1 << 20));
                (facts, server)
            });
            let mut out = Vec::new();
            let mut handler = |replies: &mut Replies<'_>,
                               arrival: annulus_net::server_connection::Arrival,
                               request: Incoming<'_>| {
                answered += 1;
                if flaw == Flaw::Lies && answered == 500 {
                    map.borrow_mut().values_mut().for_each(|value| value[20] ^= 1);
                }
                if flaw == Flaw::Busy && answered % 7 == 0 {
                    let busy = Failure::new(Status::BUSY, "later");
                    return replies.failure(arrival.ticket, &busy);
                }
                serve(&mut map.borrow_mut(), replies, arrival.ticket, &request);
            };
            server.receive(BEGIN, &input[..size], facts, &mut out, &mut handler).unwrap();
            server.fill_output(&mut out, usize::MAX);
            let mut rest = &out[..];
            while !rest.is_empty() {
                match stream.write(rest) {
                    Ok(sent) => rest = &rest[sent..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return false,
                }
            }
            true
        });
        if idle {
            std::thread::yield_now();
        }
    }
}

fn verified(by_shard: bool, flaw: Flaw) -> (Report, Report, u64) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        serve_sockets(&listener, 4, Flaw::Busy);
        serve_sockets(&listener, 4, flaw);
    });
    // The second server starts empty, so the run is a preload and a run over one book's keys.
    let plan = Plan::new(&facts(8).welcome, &levels(), by_shard).unwrap();
    let load = Load {
        addresses: vec![address],
        mix: Mix { reads: 0.5, scans: 0.05, inserts: 0.1, read_modify_writes: 0.2 },
        distribution: Distribution::Zipf(0.9),
        keys: 200,
        stripe: Stripe { index: 1, count: 3 },
        key_size: 16,
        value_size: (40, 80),
        connections: 4,
        depth: 3,
        rate: None,
        deadline: None,
        until: Until::Sent(200),
        sequential: true,
        spin: false,
        seed: 5,
    };
    let (mut preload, mut report) = (Report::default(), Report::default());
    let mut unused = Book::new(load.stripe, load.keys);
    crate::load::run(&load, |i| plan.connect(i), &mut preload, Some(&mut unused)).unwrap();
    let mut book = Book::new(load.stripe, load.keys);
    let load = Load { sequential: false, until: Until::Sent(3000), ..load };
    crate::load::run(&load, |i| plan.connect(i), &mut report, Some(&mut book)).unwrap();
    server.join().unwrap();
    (preload, report, book.verdict().0)
}

#[test]
fn a_load_writes_each_key_once_though_some_are_refused_and_finds_every_value() {
    for by_shard in [false, true] {
        let (preload, report, wrong) = verified(by_shard, Flaw::None);
        let preload = preload.summary("", "");
        assert_eq!((preload.writes_us.count, preload.errors), (200, 0));
        let summary = report.summary("", "");
        assert_eq!((summary.errors, wrong, summary.lost), (0, 0, None));
        // Each read-modify-write is two operations.
        assert!(summary.ops > 3000 && summary.scans_us.count > 0);
    }
}

#[test]
fn a_server_that_damages_values_is_caught() {
    let (_, report, wrong) = verified(false, Flaw::Lies);
    assert!(wrong > 0, "{:?}", report.summary("", ""));
}

#[test]
fn a_lost_connection_leaves_writes_that_may_be_applied() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let facts = facts(8);
        let mut server = ServerConnection::new(BEGIN, &facts, MemoryBudget::new(1 << 20));
        let (mut input, mut out) = (vec![0; 64 << 10], Vec::new());
        let size = stream.read(&mut input).unwrap();
        let mut handler = |_: &mut Replies<'_>, _, _: Incoming<'_>| {};
        server.receive(BEGIN, &input[..size], &facts, &mut out, &mut handler).unwrap();
        stream.write_all(&out).unwrap();
        let _ = stream.read(&mut input).unwrap();
    });
    let plan = Plan::new(&facts(8).welcome, &levels(), false).unwrap();
    let load = Load {
        addresses: vec![address],
        mix: Mix { reads: 0.0, scans: 0.0, inserts: 0.0, read_modify_writes: 0.0 },
        distribution: Distribution::Uniform,
        keys: 100,
        stripe: Stripe::WHOLE,
        key_size: 16,
        value_size: (10, 10),
        connections: 1,
        depth: 2,
        rate: None,
        deadline: None,
        until: Until::Sent(100),
        sequential: false,
        spin: false,
        seed: 5,
    };
    let mut report = Report::default();
    crate::load::run(&load, |i| plan.connect(i), &mut report, None).unwrap();
    server.join().unwrap();
    let summary = report.summary("", "");
    assert_eq!((summary.ops, summary.may_be_applied), (0, 2));
    assert!(summary.lost.is_some());
}
