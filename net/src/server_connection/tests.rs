//! A fixture that speaks as a client does, then what a connection promises, one test each.

use std::collections::BTreeMap;

use annulus_engine::model::{Dot, NamespaceId, OriginId, Timestamp, TokenRange};

use super::*;
use crate::wire::fields::{Level, Ttl, Version};
use crate::wire::hello::{Limits, Mode, NamespaceFact, Node, Replica, Run};
use crate::wire::operation::{Delete, Get, Operation, Put, WriteOptions};
use crate::wire::request::{Admin, Outgoing};
use crate::wire::response::{PageRef, ReadReply, decode_batch, decode_failure, decode_write};
use crate::wire::scan::Scan;

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
        value,
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
                        .map(|(n, value)| ValueRef { version: version(*n), expiry_ms: 0, value })
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
        read_replies(&bytes)
    }
}

fn read_replies(bytes: &[u8]) -> Vec<Reply> {
    let (mut decoder, mut input, mut replies) = (FrameDecoder::new(), bytes, Vec::new());
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
            replies.push(reply(&header, &body));
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
    assert_eq!((replies[2].status, read.values[0].value), (Status::OK, &b"value"[..]));
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
