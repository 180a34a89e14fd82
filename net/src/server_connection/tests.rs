//! A fixture that speaks as a client does, then what a connection promises, one test each.

use std::collections::BTreeMap;

use annulus_engine::model::{Dot, NamespaceId, OriginId, Timestamp, Token, TokenRange};
use proptest::prelude::*;

use super::*;

use crate::wire::fields::{Level, Ttl, Version};
use crate::wire::frame::flag;
use crate::wire::hello::{Limits, Mode, NamespaceFact, Node, Replica, Run};
use crate::wire::operation::{Delete, Get, Operation, Put, WriteOptions};
use crate::wire::request::{Admin, Outgoing};
use crate::wire::response::{BatchResults, Page, ReadFacts, ValueRef, WriteFacts};
use crate::wire::response::{PageRef, ReadReply, decode_batch, decode_failure, decode_write};
use crate::wire::scan::Scan;
use crate::wire::slices::Head;

/// Facts of a node with two shards, of which this is the first.
pub(crate) fn facts() -> ServerFacts {
    let replica = |shard| Replica { node: OriginId(1), shard };
    ServerFacts {
        welcome: Welcome {
            version: hello::VERSION,
            partition_bits: 4,
            shard_count: 2,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 0xc1u128,
            hash_seed: 42,
            map_version: 1,
            wall_us: 1_000_000,
            limits: Limits { value_size_max: 300_000, ..Limits::default() },
            runs: vec![
                Run { length: 10, replicas: vec![replica(0)] },
                Run { length: 6, replicas: vec![replica(1)] },
            ],
            nodes: vec![Node { id: OriginId(1), shard_count: 2, address: "127.0.0.1:7301".into() }],
            namespaces: vec![NamespaceFact {
                id: NamespaceId(1),
                mode: Mode::Lww,
                name: "default".into(),
            }],
        },
        options: ConnectionOptions::default(),
    }
}

pub(crate) fn version(n: u64) -> Version {
    Version { timestamp: Timestamp(n << 12), dot: Dot { origin: OriginId(1), sequence: n } }
}

pub(crate) fn get(key: &[u8]) -> Operation<'_> {
    Operation::Get(Get {
        token: Token::MIN,
        namespace: NamespaceId(1),
        key,
        level: Level::Default,
        primary: Level::Default,
        max_staleness_ms: 0,
        flags: Default::default(),
    })
}

pub(crate) fn put<'a>(key: &'a [u8], value: &'a [u8]) -> Operation<'a> {
    Operation::Put(Put {
        token: Token::MIN,
        namespace: NamespaceId(1),
        key,
        value: value.into(),
        ttl: Ttl::Default,
        options: WriteOptions::default(),
    })
}

pub(crate) fn delete(key: &[u8]) -> Operation<'_> {
    Operation::Delete(Delete {
        token: Token::MIN,
        namespace: NamespaceId(1),
        key,
        options: WriteOptions::default(),
    })
}

/// Client's frames of one connection.
#[derive(Default)]
struct Speaker {
    writer: FrameWriter,
    bytes: Vec<u8>,
}

impl Speaker {
    fn say(&mut self, id: u32, request: &Outgoing<'_>) -> &mut Speaker {
        self.say_until(id, 0, request)
    }

    fn say_until(&mut self, id: u32, micros: u32, request: &Outgoing<'_>) -> &mut Speaker {
        let head = Head {
            request_id: id,
            time_or_window: micros,
            opcode: request.opcode().request(),
            ..Head::default()
        };
        self.writer.message(&mut self.bytes, head, request.size(), |out| request.encode(out));
        self.writer.flush_slices(&mut self.bytes, usize::MAX);
        self
    }

    fn hello() -> Speaker {
        let mut speaker = Speaker::default();
        speaker.say(0, &Outgoing::Hello(Hello::default()));
        speaker
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// A server with a map for a store, answering at once.
struct Fixture {
    facts: ServerFacts,
    budget: MemoryBudget,
    connection: ServerConnection,
    out: Vec<u8>,
    /// Replies as they came, from the first byte on: positions are part of the checksums.
    decoder: FrameDecoder,
    store: BTreeMap<Vec<u8>, (u64, Vec<u8>)>,
    writes: u64,
    /// Hold tickets back instead of answering.
    hold: bool,
    held: Vec<Ticket>,
    tokens: Vec<Token>,
}

#[derive(Debug, PartialEq)]
struct Reply {
    id: u32,
    opcode: u8,
    status: Status,
    window: u32,
    body: Vec<u8>,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture::with(facts())
    }

    fn with(facts: ServerFacts) -> Fixture {
        let budget = MemoryBudget::new(4 << 20);
        Fixture {
            connection: ServerConnection::new(Instant(0), &facts, budget.clone()),
            facts,
            budget,
            out: Vec::new(),
            decoder: FrameDecoder::new(),
            store: BTreeMap::new(),
            writes: 0,
            hold: false,
            held: Vec::new(),
            tokens: Vec::new(),
        }
    }

    fn hear(&mut self, bytes: &[u8]) -> Result<Received, Close> {
        self.hear_at(Instant(0), bytes)
    }

    fn hear_at(&mut self, now: Instant, bytes: &[u8]) -> Result<Received, Close> {
        let Fixture { facts, connection, out, store, writes, hold, held, tokens, .. } = self;
        connection.receive(now, bytes, facts, out, &mut |replies, arrival, request| {
            let ticket = arrival.ticket;
            if *hold {
                return held.push(ticket);
            }
            match request {
                Request::Get(get) => {
                    tokens.push(get.token);
                    let found = store.get(get.key);
                    let values: Vec<ValueRef<'_>> = found
                        .map(|(n, value)| ValueRef {
                            version: version(*n),
                            expiry_ms: 0,
                            value: value.into(),
                        })
                        .into_iter()
                        .collect();
                    replies.read(
                        ticket,
                        &ReadFacts { answers: 1, ..ReadFacts::default() },
                        &values,
                    );
                }
                Request::Put(put) => {
                    tokens.push(put.token);
                    *writes += 1;
                    store.insert(put.key.to_vec(), (*writes, put.value.to_vec()));
                    let facts =
                        WriteFacts { version: version(*writes), acks: 1, ..Default::default() };
                    replies.written(ticket, &facts);
                }
                Request::Delete(delete) => {
                    store.remove(delete.key);
                    replies.written(ticket, &WriteFacts::default());
                }
                Request::Batch(batch) => {
                    let mut results = BatchResults::new(batch.count());
                    // Backwards, because any order is allowed.
                    let operations: Vec<_> = batch.iter().collect();
                    for (index, operation) in operations.iter().enumerate().rev() {
                        let index = u32::try_from(index).unwrap();
                        match operation {
                            Operation::Get(_) => results.read(index, &ReadFacts::default(), &[]),
                            other => results.write(
                                index,
                                other.opcode(),
                                Status::OK,
                                &WriteFacts::default(),
                            ),
                        }
                    }
                    replies.batch(ticket, results);
                }
                Request::Scan(scan) => {
                    let page = Page::new(&scan, 10, 1000);
                    replies.page(ticket, page, None);
                }
                Request::Stats => replies.json(ticket, b"{}".to_vec()),
                Request::Admin(admin) => replies.json(ticket, admin.json.as_bytes().to_vec()),
                Request::Hello(_) | Request::Ping(_) => unreachable!("answered by the connection"),
            }
        })
    }

    fn replies(&mut self) -> Vec<Reply> {
        self.connection.fill_output(&mut self.out, usize::MAX);
        let bytes = std::mem::take(&mut self.out);
        read_replies(&mut self.decoder, &bytes)
    }
}

fn read_replies(decoder: &mut FrameDecoder, bytes: &[u8]) -> Vec<Reply> {
    let (mut input, mut replies) = (bytes, Vec::new());
    let mut reassembly = Reassembly::new(ReassemblyLimits {
        messages_max: 100,
        message_size_max: 10 << 20,
        bytes_max: 100 << 20,
    });
    let reply = |header: &FrameHeader, body: &[u8]| Reply {
        id: header.request_id,
        opcode: header.opcode & !REPLY,
        status: header.status(),
        window: header.time_or_window,
        body: body.to_vec(),
    };
    while let Some(frame) = decoder.next(&mut input).unwrap() {
        if !frame.header.is_slice() {
            replies.push(reply(&frame.header, frame.body));
        } else if let Gathered::Whole(header, body) = reassembly.add(&frame).unwrap() {
            replies.push(reply(&header, &body.value().side_by_side()));
        }
    }
    replies
}

#[test]
fn hello_put_get_delete_answer_in_order() {
    let mut server = Fixture::new();
    let mut client = Speaker::hello();
    client
        .say(1, &Outgoing::Operation(put(b"key", b"value")))
        .say(2, &Outgoing::Operation(get(b"key")))
        .say(3, &Outgoing::Operation(delete(b"key")))
        .say(4, &Outgoing::Operation(get(b"key")))
        .say(5, &Outgoing::Ping(b"echo"));
    assert_eq!(server.hear(&client.take()), Ok(Received::Continue));
    let replies = server.replies();
    let ids: Vec<u32> = replies.iter().map(|reply| reply.id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
    assert_eq!(Welcome::decode(&replies[0].body).unwrap(), server.facts.welcome);
    assert_eq!(decode_write(&replies[1].body).unwrap().version, version(1));
    let read = ReadReply::decode(&replies[2].body).unwrap();
    assert_eq!((replies[2].status, read.values[0].value), (Status::OK, b"value".into()));
    assert_eq!(replies[4].status, Status::NOT_FOUND);
    assert_eq!(replies[5].body, b"echo");
    assert_eq!(server.connection.in_flight(), 0);
    assert!(server.tokens.iter().all(|&token| token == Token::of_key(b"key", 42)));
}

#[test]
fn batch_scan_stats_and_admin_answer() {
    let mut server = Fixture::new();
    let mut client = Speaker::hello();
    let operations = [put(b"a", b"1"), get(b"b"), delete(b"c")];
    let scan = Scan {
        namespace: NamespaceId(1),
        count_max: 0,
        bytes_max: 0,
        flags: 0,
        range: TokenRange::FULL,
        after: b"",
    };
    client
        .say(1, &Outgoing::Batch(&operations))
        .say(2, &Outgoing::Scan(scan))
        .say(3, &Outgoing::Stats)
        .say(4, &Outgoing::Admin(Admin { command: "ns.list", json: "[1]" }));
    server.hear(&client.take()).unwrap();
    let replies = server.replies();
    let mut found = BTreeMap::new();
    decode_batch(&replies[1].body, &mut |result| {
        found.insert(result.index, (result.verb, result.status));
        Ok(())
    })
    .unwrap();
    let expected = [(0, (4, Status::OK)), (1, (3, Status::NOT_FOUND)), (2, (5, Status::OK))];
    assert_eq!(found, BTreeMap::from(expected));
    assert!(PageRef::decode(&replies[2].body, NamespaceId(1)).unwrap().next.is_none());
    assert_eq!(replies[3].body, b"{}");
    assert_eq!(replies[4].body, b"[1]");
}

#[test]
fn a_connection_for_another_shard_is_handed_over_with_all_its_bytes() {
    let mut client = Speaker::default();
    client.say(0, &Outgoing::Hello(Hello { shard: 1, ..Hello::default() }));
    client.say(1, &Outgoing::Operation(put(b"key", b"value")));
    let bytes = client.take();
    let mut first = Fixture::new();
    // Cut inside the HELLO, so that it is gathered before it is handed over.
    assert_eq!(first.hear(&bytes[..30]), Ok(Received::Continue));
    let Ok(Received::HandOver { shard: 1, bytes: handed }) = first.hear(&bytes[30..]) else {
        panic!("not handed over");
    };
    assert_eq!(handed, bytes);
    assert!(first.out.is_empty());
    let mut facts = facts();
    facts.welcome.shard = 1;
    let mut second = Fixture::with(facts);
    second.hear(&handed).unwrap();
    assert_eq!(second.replies().len(), 2);
}

#[test]
fn strangers_are_refused_by_their_first_frame() {
    let refused = |hello: Hello<'_>| {
        let mut client = Speaker::default();
        client.say(0, &Outgoing::Hello(hello));
        let mut server = Fixture::new();
        let close = server.hear(&client.take()).unwrap_err();
        let last = server.replies().pop().unwrap();
        assert_eq!((last.opcode, last.status), (0x7f, close.status));
        assert_eq!(decode_failure(last.status, &last.body).unwrap().message, close.reason);
        close.status
    };
    assert_eq!(
        refused(Hello { version_min: 2, version_max: 9, ..Hello::default() }),
        Status::UNSUPPORTED
    );
    assert_eq!(refused(Hello { cluster: 7, ..Hello::default() }), Status::WRONG_CLUSTER);
    assert_eq!(refused(Hello { shard: 2, ..Hello::default() }), Status::BAD_REQUEST);
    assert_eq!(refused(Hello { credential: b"x", ..Hello::default() }), Status::UNSUPPORTED);

    let mut server = Fixture::new();
    assert!(server.hear(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").is_err());
    let mut server = Fixture::new();
    let mut client = Speaker::default();
    client.say(0, &Outgoing::Ping(b""));
    assert_eq!(server.hear(&client.take()), Err(Close::of(FrameError::NoHello)));
    assert_eq!(server.hear(b"more"), Ok(Received::Continue), "a closed connection hears nothing");
}

fn millis(ms: u64) -> Instant {
    Instant(ms * NANOS_PER_MS)
}

/// A server that has heard a HELLO, with these options.
fn greeted(change: impl FnOnce(&mut ServerFacts)) -> (Fixture, Speaker) {
    let mut facts = facts();
    change(&mut facts);
    let mut server = Fixture::with(facts);
    let mut client = Speaker::hello();
    server.hear(&client.take()).unwrap();
    server.replies();
    (server, client)
}

fn statuses(replies: &[Reply]) -> Vec<(u32, Status)> {
    replies.iter().map(|reply| (reply.id, reply.status)).collect()
}

#[test]
fn a_stranger_holds_less_than_8_kib() {
    let mut server = Fixture::new();
    let mut client = Speaker::default();
    let name = "n".repeat(hello::NAME_SIZE_MAX);
    client.say(0, &Outgoing::Hello(Hello { name: &name, ..Hello::default() }));
    for byte in client.take() {
        server.hear(&[byte]).unwrap();
        assert!(server.connection.memory() < 8 << 10);
    }
    assert!(server.connection.is_greeted());
    assert!(size_of::<ServerConnection>() < 1024, "{}", size_of::<ServerConnection>());

    // A long first frame is refused by its header, before its body is waited for.
    let mut server = Fixture::new();
    let mut client = Speaker::default();
    let credential = vec![0; 3000];
    client.say(0, &Outgoing::Hello(Hello { credential: &credential, ..Hello::default() }));
    let bytes = client.take();
    assert_eq!(server.hear(&bytes[..24]), Err(Close::of(FrameError::BodyTooBig)));
}

#[test]
fn an_idle_connection_holds_almost_nothing_again() {
    let (mut server, mut client) = greeted(|_| {});
    client.say(1, &Outgoing::Operation(put(b"k", &[1; 20_000])));
    let bytes = client.take();
    server.hear(&bytes[..100]).unwrap();
    server.hear(&bytes[100..]).unwrap();
    client.say(2, &Outgoing::Operation(put(b"k", &[1; 250_000])));
    server.hear(&client.take()).unwrap();
    server.hear(&[]).unwrap();
    assert!(server.connection.memory() <= 512, "{}", server.connection.memory());
    assert_eq!(server.budget.left(), 4 << 20);
}

#[test]
fn half_said_things_end_in_time() {
    // No HELLO.
    let mut server = Fixture::new();
    assert_eq!(server.connection.next_timeout(&server.facts), Some(millis(5_000)));
    let Fixture { connection, facts, out, .. } = &mut server;
    assert_eq!(connection.handle_timeout(millis(4_999), facts, out), Ok(()));
    let close = connection.handle_timeout(millis(5_000), facts, out).unwrap_err();
    assert_eq!(close.reason, "no HELLO in time");
    assert_eq!(connection.next_timeout(facts), None);

    // A frame that comes byte by byte, one a second.
    let (mut server, mut client) = greeted(|_| {});
    assert_eq!(server.connection.next_timeout(&server.facts), None);
    client.say(1, &Outgoing::Operation(put(b"k", b"v")));
    for (second, byte) in (0..4).zip(client.take()) {
        server.hear_at(millis(second * 1000), &[byte]).unwrap();
        assert_eq!(server.connection.next_timeout(&server.facts), Some(millis(5_000)));
    }

    // A frame that ends while another begins starts the time anew.
    let (mut server, mut client) = greeted(|_| {});
    client.say(1, &Outgoing::Ping(b"")).say(2, &Outgoing::Ping(b""));
    let bytes = client.take();
    server.hear_at(millis(0), &bytes[..10]).unwrap();
    server.hear_at(millis(1000), &bytes[10..30]).unwrap();
    assert_eq!(server.connection.next_timeout(&server.facts), Some(millis(6_000)));
    server.hear_at(millis(2000), &bytes[30..]).unwrap();
    assert_eq!(server.connection.next_timeout(&server.facts), None);

    // A long message that never ends.
    let (mut server, mut client) = greeted(|_| {});
    client.say(1, &Outgoing::Operation(put(b"k", &[0; 100_000])));
    let bytes = client.take();
    server.hear_at(millis(7), &bytes[..HEADER_SIZE + FRAME_BODY_MAX]).unwrap();
    assert_eq!(server.connection.next_timeout(&server.facts), Some(millis(30_007)));
}

#[test]
fn who_takes_no_answers_is_cut_off() {
    let (mut server, _) = greeted(|_| {});
    server.connection.sent(millis(10), 100, 50);
    server.connection.sent(millis(20), 0, 50);
    assert_eq!(server.connection.next_timeout(&server.facts), Some(millis(10_010)));
    server.connection.sent(millis(30), 10, 40);
    assert_eq!(server.connection.next_timeout(&server.facts), Some(millis(10_030)));
    server.connection.sent(millis(40), 40, 0);
    assert_eq!(server.connection.next_timeout(&server.facts), None);
    assert!(!server.connection.wants_pause(&server.facts, 1000));
    assert!(server.connection.wants_pause(&server.facts, 256 << 10));
}

#[test]
fn requests_beyond_the_window_are_refused_before_anything_is_done() {
    let (mut server, mut client) = greeted(|facts| facts.welcome.limits.in_flight_max = 2);
    server.hold = true;
    for id in 1..=4 {
        client.say(id, &Outgoing::Operation(get(b"k")));
    }
    server.hear(&client.take()).unwrap();
    assert_eq!(statuses(&server.replies()), [(3, Status::BUSY), (4, Status::BUSY)]);
    assert_eq!(server.connection.in_flight(), 2);
    let ticket = server.held.pop().unwrap();
    server.connection.replies(&mut server.out).read(ticket, &ReadFacts::default(), &[]);
    client.say(5, &Outgoing::Operation(get(b"k")));
    server.hear(&client.take()).unwrap();
    assert_eq!(server.connection.in_flight(), 2);
}

#[test]
fn bytes_in_flight_are_bounded_but_one_request_always_fits() {
    let (mut server, mut client) = greeted(|facts| facts.welcome.limits.in_flight_bytes_max = 1000);
    server.hold = true;
    client
        .say(1, &Outgoing::Operation(put(b"k", &[0; 5000])))
        .say(2, &Outgoing::Operation(put(b"k", &[0; 10])));
    server.hear(&client.take()).unwrap();
    assert_eq!(statuses(&server.replies()), [(2, Status::BUSY)]);
    let ticket = server.held.pop().unwrap();
    server.connection.replies(&mut server.out).written(ticket, &WriteFacts::default());
    client.say(3, &Outgoing::Operation(put(b"k", &[0; 10])));
    server.hear(&client.take()).unwrap();
    assert_eq!(server.held.len(), 1);
}

#[test]
fn a_value_over_the_limit_is_refused_at_its_first_slice_and_others_live_on() {
    let (mut server, mut client) = greeted(|facts| facts.welcome.limits.message_size_max = 1000);
    client.say(1, &Outgoing::Operation(put(b"k", &[0; 400_000])));
    client.say(2, &Outgoing::Ping(b"alive"));
    let bytes = client.take();
    server.hear(&bytes[..HEADER_SIZE + FRAME_BODY_MAX]).unwrap();
    let replies = server.replies();
    assert_eq!(statuses(&replies), [(1, Status::TOO_BIG)]);
    assert_eq!(server.connection.memory(), 0);
    server.hear(&bytes[HEADER_SIZE + FRAME_BODY_MAX..]).unwrap();
    assert_eq!(statuses(&server.replies()), [(2, Status::OK)]);
    assert_eq!(server.connection.in_flight(), 0);
}

#[test]
fn long_requests_share_the_budget_of_the_shard() {
    let facts = facts();
    let budget = MemoryBudget::new(100_000);
    let (mut first, mut second) = (Fixture::with(facts.clone()), Fixture::with(facts.clone()));
    first.connection = ServerConnection::new(Instant(0), &facts, budget.clone());
    second.connection = ServerConnection::new(Instant(0), &facts, budget.clone());
    let mut client = Speaker::hello();
    client.say(1, &Outgoing::Operation(put(b"k", &[0; 90_000])));
    let bytes = client.take();
    // All but the last byte: the message is held, the budget nearly spent.
    first.hear(&bytes[..bytes.len() - 1]).unwrap();
    assert!(budget.left() < 40_000);
    second.hear(&bytes).unwrap();
    assert_eq!(statuses(&second.replies()), [(0, Status::OK), (1, Status::BUSY)]);
    assert_eq!(second.connection.memory(), 0);
    assert_eq!(second.connection.in_flight(), 0);
    drop(first);
    assert_eq!(budget.left(), 100_000);
}

#[test]
fn too_many_long_requests_at_once_are_refused() {
    let mut facts = facts();
    facts.options.long_requests_max = 2;
    let mut server = Fixture::with(facts);
    server.hear(&first_slices(3)).unwrap();
    assert_eq!(server.connection.in_flight(), 2);
    assert_eq!(statuses(&server.replies()), [(0, Status::OK), (3, Status::BUSY)]);
}

/// A HELLO, and the first slice of each of `count` long requests, in one stream.
fn first_slices(count: u32) -> Vec<u8> {
    let mut client = Speaker::hello();
    let mut body = 40_000u32.to_le_bytes().to_vec();
    body.extend_from_slice(&[0; 4]);
    body.extend_from_slice(&[1; 20_000]);
    for request_id in 1..=count {
        let head = Head { request_id, opcode: 4, flags: flag::SLICE, ..Head::default() };
        client.writer.message(&mut client.bytes, head, body.len(), |out| {
            out.extend_from_slice(&body);
        });
    }
    client.take()
}

#[test]
fn long_answers_that_nobody_takes_become_busy() {
    let (mut server, mut client) = greeted(|facts| facts.options.long_reply_bytes_max = 500_000);
    client.say(1, &Outgoing::Operation(put(b"k", &[7; 290_000])));
    server.hear(&client.take()).unwrap();
    for id in 2..=5 {
        client.say(id, &Outgoing::Operation(get(b"k")));
    }
    server.hear(&client.take()).unwrap();
    assert!(server.connection.memory() < 300_000, "one long answer waits");
    assert!(server.budget.left() < (4 << 20) - 290_000);
    let replies = statuses(&server.replies());
    let busy = [3, 4, 5].map(|id| (id, Status::BUSY));
    assert_eq!(replies, [&[(1, Status::OK)], &busy[..], &[(2, Status::OK)]].concat());
    assert!(server.connection.memory() < 1000);
    assert_eq!(server.budget.left(), 4 << 20);
    assert_eq!(server.connection.in_flight(), 0);
}

#[test]
fn slices_that_come_after_the_deadline_are_expired() {
    let (mut server, mut client) = greeted(|_| {});
    client.say_until(1, 1_000, &Outgoing::Operation(put(b"k", &[0; 40_000])));
    let bytes = client.take();
    let cut = HEADER_SIZE + FRAME_BODY_MAX;
    server.hear_at(millis(0), &bytes[..cut]).unwrap();
    server.hear_at(millis(2), &bytes[cut..]).unwrap();
    assert!(server.store.is_empty());
    assert_eq!(server.connection.in_flight(), 0);
    assert_eq!(statuses(&server.replies()), [(1, Status::EXPIRED)]);
}

#[test]
fn what_is_refused_leaves_the_connection_alive() {
    let mut server = Fixture::new();
    let mut client = Speaker::hello();
    let raw = |client: &mut Speaker, id: u32, opcode: u8, code: u16, body: &[u8]| {
        let head = Head { request_id: id, opcode, code, ..Head::default() };
        client.writer.message(&mut client.bytes, head, body.len(), |out| {
            out.extend_from_slice(body);
        });
    };
    raw(&mut client, 1, 99, 0, b"");
    raw(&mut client, 2, Opcode::Get.request(), 0, b"short");
    raw(&mut client, 3, Opcode::Stats.request(), 0x100, b"");
    raw(&mut client, 4, Opcode::Hello.request(), 0, b"");
    client.say(5, &Outgoing::Hello(Hello::default()));
    client.say(6, &Outgoing::Ping(b""));
    server.hear(&client.take()).unwrap();
    assert_eq!(
        statuses(&server.replies()),
        [
            (0, Status::OK),
            (1, Status::UNSUPPORTED),
            (2, Status::BAD_REQUEST),
            (3, Status::BAD_REQUEST),
            (4, Status::BAD_REQUEST),
            (5, Status::BAD_REQUEST),
            (6, Status::OK)
        ]
    );
    assert_eq!(server.connection.in_flight(), 0);
}

#[test]
fn replies_from_a_client_close_the_connection() {
    let (mut server, mut client) = greeted(|_| {});
    let head = Head { request_id: 1, opcode: Opcode::Get.reply(), ..Head::default() };
    client.writer.message(&mut client.bytes, head, 0, |_| {});
    assert_eq!(server.hear(&client.take()), Err(Close::of(FrameError::WrongDirection)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn split_anywhere_gives_the_same_answers(
        requests in prop::collection::vec((0u8..6, 0u8..4, 0usize..300), 1..12),
        long in 0usize..70_000,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut client = Speaker::hello();
        let value = vec![5; 300.max(long)];
        for (id, (what, key, size)) in (1u32..).zip(&requests) {
            let key = [*key];
            let operations = [put(&key, &value[..*size]), get(&key)];
            match what {
                0 => client.say(id, &Outgoing::Operation(put(&key, &value[..*size]))),
                1 => client.say(id, &Outgoing::Operation(get(&key))),
                2 => client.say(id, &Outgoing::Operation(put(&key, &value[..long]))),
                3 => client.say(id, &Outgoing::Operation(delete(&key))),
                4 => client.say(id, &Outgoing::Batch(&operations)),
                _ => client.say(id, &Outgoing::Ping(&value[..*size])),
            };
        }
        let bytes = client.take();
        let mut whole = Fixture::new();
        whole.hear(&bytes).unwrap();
        whole.connection.fill_output(&mut whole.out, usize::MAX);

        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.sort_unstable();
        let (mut pieces, mut start) = (Fixture::new(), 0);
        for cut in cuts.into_iter().chain([bytes.len()]) {
            pieces.hear(&bytes[start..cut]).unwrap();
            start = cut;
        }
        pieces.connection.fill_output(&mut pieces.out, usize::MAX);
        prop_assert_eq!(&pieces.out, &whole.out);
        prop_assert_eq!(pieces.store, whole.store);
        prop_assert_eq!(pieces.connection.in_flight(), 0);
    }

    #[test]
    fn frames_with_random_bodies_are_answered_once_each(
        frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..100), any::<u16>()), 0..20)
    ) {
        let mut server = Fixture::new();
        let mut client = Speaker::hello();
        for (id, (opcode, body, code)) in (1u32..).zip(&frames) {
            let head = Head { request_id: id, opcode: opcode & 0x7f, code: *code & 0x1ff, ..Head::default() };
            client.writer.message(&mut client.bytes, head, body.len(), |out| out.extend_from_slice(body));
        }
        prop_assert_eq!(server.hear(&client.take()), Ok(Received::Continue));
        let ids: Vec<u32> = server.replies().iter().map(|reply| reply.id).collect();
        let expected: Vec<u32> = (0..=u32::try_from(frames.len()).unwrap()).collect();
        prop_assert_eq!(ids, expected);
    }

    #[test]
    fn random_slices_never_panic_and_stay_bounded(
        slices in prop::collection::vec((0u32..4, 0u32..200, 0u32..200, prop::collection::vec(any::<u8>(), 0..100)), 0..20)
    ) {
        let mut server = Fixture::new();
        let mut client = Speaker::hello();
        for (request_id, total, offset, piece) in slices {
            let body = [&total.to_le_bytes()[..], &offset.to_le_bytes(), &piece].concat();
            let head = Head { request_id, opcode: 4, flags: flag::SLICE, ..Head::default() };
            client.writer.message(&mut client.bytes, head, body.len(), |out| out.extend_from_slice(&body));
        }
        let _ = server.hear(&client.take());
        prop_assert!(server.connection.memory() < 4 * 200 + 512 + 64);
        prop_assert!(server.connection.in_flight() <= 4);
    }
}
