//! `net/README.md` is the specification; this holds it to the code. Every hex dump in it is what
//! the code says, byte for byte, at its place in one conversation, and every status is listed.
//! After a change of the format on purpose: `ANNULUS_BLESS=1 cargo test -p annulus-net --test
//! readme` writes the dumps anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use annulus_engine::model::{
    Dot, Instant, Kind, NamespaceId, OriginId, RecordRef, Timestamp, Token, TokenRange,
};
use annulus_net::peer_connection::{
    PeerDialer, PeerFacts, PeerListener, PeerMember, PeerOptions, PeerTarget,
};
use annulus_net::server_connection::{
    ConnectionOptions, MemoryBudget, ServerConnection, ServerFacts,
};
use annulus_net::wire::decoder::FrameDecoder;
use annulus_net::wire::frame::HEADER_SIZE;
use annulus_net::wire::hello::{
    Hello, Limits, Mode, NamespaceFact, Node, Replica, Run, VERSION, Welcome,
};
use annulus_net::wire::peer::{PeerHello, PeerRefusal};
use annulus_net::wire::request::{Admin, Outgoing};
use annulus_net::wire::response::{BatchResults, Failure, Page, ReadFacts, ValueRef, WriteFacts};
use annulus_net::wire::scan::Scan;
use annulus_net::wire::slices::{FrameWriter, Head};
use annulus_net::wire::{
    Condition, Delete, Get, Level, OnceId, Opcode, Operation, OperationFlags, Put, Request, Status,
    Ttl, Version, WriteOptions,
};

const NAMESPACE: NamespaceId = NamespaceId(1);

fn facts() -> ServerFacts {
    let replica = |shard| Replica { node: OriginId(1), shard };
    ServerFacts {
        welcome: Welcome {
            version: VERSION,
            partition_bits: 12,
            shard_count: 2,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
            hash_seed: 0x5eed,
            map_version: 1,
            wall_us: 60_000_000_000_000,
            limits: Limits::default(),
            runs: vec![
                Run { length: 2048, replicas: vec![replica(0)] },
                Run { length: 2048, replicas: vec![replica(1)] },
            ],
            nodes: vec![Node { id: OriginId(1), shard_count: 2, address: "127.0.0.1:7301".into() }],
            namespaces: vec![NamespaceFact {
                id: NAMESPACE,
                mode: Mode::Lww,
                name: "default".into(),
            }],
        },
        options: ConnectionOptions::default(),
    }
}

fn version(n: u64) -> Version {
    let timestamp = Timestamp(60_000_000_000_000 << 12 | n);
    Version { timestamp, dot: Dot { origin: OriginId(1), sequence: n } }
}

fn get(key: &[u8]) -> Operation<'_> {
    Operation::Get(Get {
        token: Token::MIN,
        namespace: NAMESPACE,
        key,
        level: Level::Quorum,
        primary: Level::Default,
        max_staleness_ms: 0,
        flags: OperationFlags::default(),
    })
}

fn put<'a>(key: &'a [u8], value: &'a [u8], ttl: Ttl, options: WriteOptions<'a>) -> Operation<'a> {
    let value = value.into();
    Operation::Put(Put { token: Token::MIN, namespace: NAMESPACE, key, value, ttl, options })
}

/// What the example's server answers.
fn serve(
    replies: &mut annulus_net::server_connection::Replies<'_>,
    ticket: annulus_net::server_connection::Ticket,
    request: Request<'_>,
) {
    let reads = ReadFacts {
        as_of: version(9).timestamp,
        answers: 1,
        primaries: 1,
        context: b"ctx",
        trace: b"",
    };
    let value = ValueRef { version: version(7), expiry_ms: 0, value: b"Ada".into() };
    let written = WriteFacts {
        version: version(8),
        acks: 1,
        primary: 1,
        durable: 1,
        window_ms: 0,
        context: b"ctx",
        trace: b"",
    };
    match request {
        Request::Get(get) if get.key == b"nobody" => replies.read(ticket, &reads, &[]),
        Request::Get(get) if get.key == b"hot" => {
            let failure = Failure::new(Status::BUSY, "the shard's queue is full");
            replies.failure(ticket, &failure.retry_after(20));
        }
        Request::Get(_) => replies.read(ticket, &reads, &[value]),
        Request::Put(put) if put.options.condition == Condition::Always => {
            replies.written(ticket, &written);
        }
        Request::Put(_) => {
            let live = WriteFacts { version: version(8), context: b"ctx", ..WriteFacts::default() };
            replies.condition_false(ticket, &live);
        }
        Request::Delete(_) => {
            replies.written(
                ticket,
                &WriteFacts { version: version(10), durable: 0, window_ms: 1000, ..written },
            );
        }
        Request::Batch(batch) => {
            let mut results = BatchResults::new(batch.count());
            results.write(1, Opcode::Put, Status::OK, &written);
            results.read(0, &ReadFacts { context: b"", ..reads }, &[value]);
            replies.batch(ticket, results);
        }
        Request::Scan(scan) => {
            let mut page = Page::new(&scan, 100, 1 << 20);
            let token = Token::of_key(b"user:1", 0x5eed);
            page.push(&RecordRef {
                token,
                namespace: NAMESPACE,
                incarnation: 0,
                kind: Kind::Put,
                dot: version(8).dot,
                timestamp: version(8).timestamp,
                expiry_ms: 0,
                key: b"user:1",
                value: b"Ada".into(),
            });
            replies.page(ticket, page, Some((token, b"user:1")));
        }
        Request::Stats => replies.json(ticket, br#"{"gets":3}"#.to_vec()),
        Request::Admin(_) => replies.json(ticket, br#"[{"name":"default"}]"#.to_vec()),
        Request::Hello(_) | Request::Ping(_) => unreachable!("answered by the connection"),
    }
}

/// The example conversation: name and bytes of each frame, with its position in its stream.
fn conversation() -> BTreeMap<String, (u64, Vec<u8>)> {
    let once = Some(OnceId { client: 0x00c1_1e47, number: 1 });
    let conditional = WriteOptions {
        level: Level::Quorum,
        durable: Level::ONE,
        condition: Condition::IfVersion(version(7)),
        context: Some(b"ctx"),
        once,
        ..WriteOptions::default()
    };
    let delete = Operation::Delete(Delete {
        token: Token::MIN,
        namespace: NAMESPACE,
        key: b"user:1",
        options: WriteOptions::default(),
    });
    let batch = [get(b"user:1"), put(b"user:2", b"Bob", Ttl::Default, WriteOptions::default())];
    let scan = Scan {
        namespace: NAMESPACE,
        count_max: 100,
        bytes_max: 0,
        flags: 0,
        range: TokenRange::FULL,
        after: b"",
    };
    let long = vec![b'x'; 40_000];
    let plain = WriteOptions::default();
    let requests: [(&str, Outgoing<'_>); 13] = [
        ("hello", Outgoing::Hello(Hello { name: "demo", ..Hello::default() })),
        ("ping", Outgoing::Ping(b"echo")),
        ("put", Outgoing::Operation(put(b"user:1", b"Ada", Ttl::Default, plain))),
        ("get", Outgoing::Operation(get(b"user:1"))),
        ("get-absent", Outgoing::Operation(get(b"nobody"))),
        ("get-refused", Outgoing::Operation(get(b"hot"))),
        (
            "put-if-version",
            Outgoing::Operation(put(b"user:1", b"Eve", Ttl::Millis(60_000), conditional)),
        ),
        ("delete", Outgoing::Operation(delete)),
        ("batch", Outgoing::Batch(&batch)),
        ("scan", Outgoing::Scan(scan)),
        ("stats", Outgoing::Stats),
        ("admin", Outgoing::Admin(Admin { command: "ns.list", json: "{}" })),
        ("put-long", Outgoing::Operation(put(b"long", &long, Ttl::Default, plain))),
    ];
    let mut names = Vec::new();
    let (mut writer, mut bytes) = (FrameWriter::default(), Vec::new());
    for (id, (name, request)) in (0u32..).zip(&requests) {
        let head = Head {
            request_id: id,
            time_or_window: 1_000_000,
            opcode: request.opcode().request(),
            ..Head::default()
        };
        writer.message(&mut bytes, head, request.size(), |out| request.encode(out));
        writer.flush_slices(&mut bytes, usize::MAX);
        names.push(*name);
    }
    let facts = facts();
    let mut server = ServerConnection::new(Instant(0), &facts, MemoryBudget::new(1 << 20));
    let mut out = Vec::new();
    server
        .receive(Instant(0), &bytes, &facts, &mut out, &mut |replies, arrival, request| {
            serve(replies, arrival.ticket, request);
        })
        .expect("a good conversation");
    server.drain(&mut out);

    let mut frames = BTreeMap::new();
    for (suffix, stream) in [("request", &bytes), ("reply", &out)] {
        let (mut decoder, mut input, mut position) = (FrameDecoder::new(), &stream[..], 0);
        while let Some(frame) = decoder.next(&mut input).expect("frames of our own") {
            let is_close = frame.header.opcode == Opcode::Close.reply();
            let name = if is_close { "close" } else { names[frame.header.request_id as usize] };
            // Of a long message only the beginning of its first slice is shown.
            let shown = if frame.header.is_slice() { HEADER_SIZE + 32 } else { frame.raw.len() };
            frames
                .entry(format!("{name}-{suffix}"))
                .or_insert_with(|| (position, frame.raw[..shown].to_vec()));
            position += frame.raw.len() as u64;
        }
    }
    frames
}

/// A Write message. `cluster/src/message/tests.rs` holds it to the code that makes it.
const PEER_WRITE: &str = "01080706050403020140420f0001000000cc81c539c4d8b3250500a0acb903000009\
    0000000000000006000000000000000200000003000000040000000500000003000100\
    6b657976616c7565";

/// What two nodes say to each other, in the same form.
fn peer_conversation() -> BTreeMap<String, (u64, Vec<u8>)> {
    let facts = |node: u32| PeerFacts {
        cluster: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
        hash_seed: 7,
        partition_bits: 12,
        members_digest: 0x00d1_6e57,
        members: vec![PeerMember { node: OriginId(3 - node), life: 0 }],
        node: OriginId(node),
        shard: 0,
        shard_count: 2,
        life: 4,
        options: PeerOptions::default(),
    };
    let (one, two, session) = (facts(1), facts(2), 0x5e_5510);
    let target = PeerTarget { node: OriginId(2), shard: 0, lane: 0 };
    let (mut hello, mut welcome, mut write) = (Vec::new(), Vec::new(), Vec::new());
    let mut dialer = PeerDialer::new(Instant(0), &one, target, &mut hello);
    let mut listener = PeerListener::new(Instant(0), &two, session);
    let mut messages = Vec::new();
    let mut handler = |_: &PeerHello, message: &[u8]| messages.push(message.to_vec());
    listener.receive(Instant(0), &hello, &two, &mut welcome, &mut handler).expect("a good hello");
    assert!(dialer.receive(&welcome, &one, &mut write).expect("a good welcome"));
    let digits = PEER_WRITE.as_bytes().chunks(2);
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair).expect("hex is text");
        u8::from_str_radix(text, 16).expect("two hex digits")
    };
    let message: Vec<u8> = digits.map(byte).collect();
    dialer.message(&mut message.clone(), &mut write);
    let mut close = Vec::new();
    listener.receive(Instant(0), &write, &two, &mut close, &mut handler).expect("a message");
    assert_eq!(messages, [message]);
    listener.refuse(PeerRefusal::Replaced, &mut close);
    let close_at = welcome.len() as u64;
    [("hello", 0, hello), ("welcome", 0, welcome), ("write", session, write)]
        .into_iter()
        .chain([("close", close_at, close)])
        .map(|(name, position, bytes)| (format!("peer-{name}"), (position, bytes)))
        .collect()
}

/// Sixteen bytes a line, in front of them their position in the stream.
fn dump(position: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (line, row) in (0u64..).zip(bytes.chunks(16)) {
        let hex: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        let plain: String = row
            .iter()
            .map(|&byte| if (32..127).contains(&byte) { char::from(byte) } else { '.' })
            .collect();
        writeln!(text, "{:06x}  {:<47}  |{plain}|", position + 16 * line, hex.join(" "))
            .expect("a string takes everything");
    }
    text
}

fn readme_path() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")
}

#[test]
fn every_hex_dump_is_what_the_code_says() {
    let mut readme = std::fs::read_to_string(readme_path()).unwrap();
    let bless = std::env::var_os("ANNULUS_BLESS").is_some();
    let mut frames = conversation();
    frames.append(&mut peer_conversation());
    for (name, (position, bytes)) in &frames {
        let fence = format!("```hex {name}\n");
        let start =
            readme.find(&fence).unwrap_or_else(|| panic!("no dump of {name}")) + fence.len();
        let end = start + readme[start..].find("```").unwrap();
        let expected = dump(*position, bytes);
        if bless {
            readme.replace_range(start..end, &expected);
        } else {
            assert_eq!(&readme[start..end], expected, "{name}");
        }
    }
    assert_eq!(readme.matches("```hex ").count(), frames.len(), "a dump of nothing");
    if bless {
        std::fs::write(readme_path(), readme).unwrap();
    }
}

#[test]
fn every_status_is_in_the_readme() {
    let readme = std::fs::read_to_string(readme_path()).unwrap();
    for status in Status::ALL {
        let row = format!("| {} | `{}` |", status.0, status.name());
        assert!(readme.contains(&row), "no row {row:?}");
    }
    let documented = readme.lines().filter(|line| {
        let mut cells = line.split('|').map(str::trim);
        cells.next();
        let number = cells.next().is_some_and(|cell| cell.parse::<u16>().is_ok());
        number
            && cells.next().is_some_and(|cell| cell.starts_with('`') && cell == cell.to_uppercase())
    });
    assert_eq!(documented.count(), Status::ALL.len(), "a status that is none");
}

#[test]
fn every_reason_to_refuse_a_peer_is_in_the_readme() {
    let readme = std::fs::read_to_string(readme_path()).unwrap();
    for refusal in PeerRefusal::ALL {
        let row = format!("| {} | `{}` |", refusal.number(), refusal.label());
        assert!(readme.contains(&row), "no row {row:?}");
    }
}
