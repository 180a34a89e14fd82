//! What is fuzzed: each function takes any bytes and must not panic, hang, or hold much memory.
//! Used by the fuzz targets and, over the stored corpus, by `net/tests/corpus.rs`.
//!
//! Random bytes never pass a checksum, so `server` and `client` make well-sealed frames of them:
//! opcode (1), flags (1), request id (1), code (1), size (2, little-endian), body. What does not
//! fit is given to the other end as it is.

use annulus_engine::model::{Instant, NamespaceId, OriginId};
use annulus_net::client_connection::ClientConnection;
use annulus_net::peer_connection::{
    HANDSHAKE_BYTES_MAX, PeerDialer, PeerFacts, PeerListener, PeerMember, PeerOptions, PeerTarget,
};
use annulus_net::server_connection::{
    ConnectionOptions, MemoryBudget, ServerConnection, ServerFacts,
};
use annulus_net::wire::hello::{Hello, Limits, Mode, NamespaceFact, Welcome, want};
use annulus_net::wire::peer::{PeerHello, PeerWelcome};
use annulus_net::wire::request::{DecodeContext, Outgoing, Request};
use annulus_net::wire::response::{
    self, BatchResults, Failure, Page, PageRef, ReadFacts, ReadReply, Route, WriteFacts,
};
use annulus_net::wire::slices::{FrameWriter, Head};
use annulus_net::wire::{Opcode, Status, codec::Reader};

fn facts() -> ServerFacts {
    ServerFacts {
        welcome: Welcome {
            version: 1,
            partition_bits: 4,
            shard_count: 2,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 1,
            hash_seed: 2,
            map_version: 3,
            wall_us: 4,
            limits: Limits {
                value_size_max: 50_000,
                in_flight_max: 8,
                message_size_max: 50_000,
                ..Limits::default()
            },
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: vec![NamespaceFact {
                id: NamespaceId(1),
                mode: Mode::Lww,
                name: "default".into(),
            }],
        },
        options: ConnectionOptions { long_requests_max: 3, ..ConnectionOptions::default() },
    }
}

/// Frames made of `data`, all of them requests or all replies.
fn frames(mut data: &[u8], direction: u8, writer: &mut FrameWriter, out: &mut Vec<u8>) {
    while let [opcode, flags, id, code, low, high, rest @ ..] = data {
        let size = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, after) = rest.split_at(size);
        let head = Head {
            request_id: u32::from(*id),
            time_or_window: 1 + u32::from(*code),
            code: u16::from(*code),
            opcode: opcode & 0x7f | direction,
            flags: flags & 0b1011,
        };
        writer.message(out, head, body.len(), |out| out.extend_from_slice(body));
        data = after;
    }
    out.extend_from_slice(data);
}

/// A server hears a client that says anything.
pub(crate) fn server(data: &[u8]) {
    let facts = facts();
    let (mut writer, mut bytes) = (FrameWriter::default(), Vec::new());
    let hello = Outgoing::Hello(Hello::default());
    let (cut, data) = data.split_first().map_or((1, data), |(cut, rest)| (*cut, rest));
    // The highest bit leaves the HELLO out.
    if cut & 0x80 == 0 {
        let head = Head { opcode: 1, ..Head::default() };
        writer.message(&mut bytes, head, hello.size(), |out| hello.encode(out));
    }
    frames(data, 0, &mut writer, &mut bytes);
    let budget = MemoryBudget::new(100_000);
    let mut connection = ServerConnection::new(Instant(0), &facts, budget.clone());
    let mut out = Vec::new();
    let mut held = Vec::new();
    for piece in bytes.chunks(1 + usize::from(cut & 0x7f) * 97) {
        let outcome = connection.receive(
            Instant(0),
            piece,
            &facts,
            &mut out,
            &mut |replies, arrival, request| {
                let ticket = arrival.ticket;
                match request {
                    Request::Get(get) if get.key == b"hold" => held.push(ticket),
                    Request::Get(_) => replies.read(ticket, &ReadFacts::default(), &[]),
                    Request::Put(_) | Request::Delete(_) => {
                        replies.written(ticket, &WriteFacts::default());
                    }
                    Request::Batch(batch) => {
                        let mut results = BatchResults::new(batch.count());
                        let mut count = 0;
                        for operation in batch.iter() {
                            let failure = Failure::new(Status::BUSY, "busy");
                            results.failure(count, operation.opcode(), &failure);
                            count += 1;
                        }
                        assert_eq!(count, batch.count(), "a checked batch can be read");
                        replies.batch(ticket, results);
                    }
                    Request::Scan(scan) => replies.page(ticket, Page::new(&scan, 1, 1), None),
                    Request::Stats | Request::Admin(_) => replies.json(ticket, Vec::new()),
                    Request::Hello(_) | Request::Ping(_) => unreachable!("answered already"),
                }
            },
        );
        assert!(connection.memory() < 400_000, "memory is bounded");
        if outcome.is_err() {
            break;
        }
    }
    for ticket in held {
        connection.replies(&mut out).read(ticket, &ReadFacts::default(), &[]);
    }
    connection.fill_output(&mut out, usize::MAX);
    let _ = connection.handle_timeout(Instant(u64::MAX), &facts, &mut out);
    drop(connection);
    assert_eq!(budget.left(), 100_000, "what was taken is given back");
}

/// A client hears a server that says anything.
pub(crate) fn client(data: &[u8]) {
    let mut sent = Vec::new();
    let mut connection = ClientConnection::new(&Hello::default(), Instant(1000), &mut sent);
    let (mut writer, mut bytes) = (FrameWriter::default(), Vec::new());
    let (first, data) = data.split_first().map_or((1, data), |(first, rest)| (*first, rest));
    if first & 0x80 == 0 {
        let mut body = Vec::new();
        facts().welcome.encode(want::ALL, &mut body);
        let head = Head { opcode: 0x81, time_or_window: 8, ..Head::default() };
        writer.owned_message(&mut bytes, head, body);
        if connection.receive(&bytes, &mut |_| {}).is_err() {
            unreachable!("a good welcome");
        }
        bytes.clear();
        for opcode in [0, 1, 2] {
            let request = [Outgoing::Stats, Outgoing::Ping(b"p"), Outgoing::Stats][opcode];
            let _ = connection.send(Instant(0), Instant(1000), 0, &request, &mut sent);
        }
    }
    frames(data, 0x80, &mut writer, &mut bytes);
    for piece in bytes.chunks(1 + usize::from(first & 0x7f) * 97) {
        let outcome = connection.receive(piece, &mut |event| {
            if let annulus_net::client_connection::Event::Reply(reply) = event {
                bodies(reply.body);
            }
        });
        if outcome.is_err() {
            break;
        }
    }
    let _ = connection.handle_timeout(Instant(2000), &mut |_| {});
    assert!(connection.pending().count() == 0 || first & 0x80 != 0);
}

/// A shard hears a peer that says anything, and dials one that answers anything. The frames are
/// as for `server`, without fields that must be zero; the highest bit of the first byte leaves
/// the PEER_HELLO out.
pub(crate) fn peer(data: &[u8]) {
    let facts = |node: u32| PeerFacts {
        cluster: 1,
        hash_seed: 2,
        partition_bits: 4,
        members_digest: 3,
        members: vec![PeerMember { node: OriginId(3 - node), life: 1 }],
        node: OriginId(node),
        shard: 0,
        shard_count: 1,
        life: 1,
        options: PeerOptions { message_size_max: 50_000, ..PeerOptions::default() },
    };
    let (dialing, listening) = (facts(1), facts(2));
    let (cut, mut data) = data.split_first().map_or((1, data), |(cut, rest)| (*cut, rest));
    let mut bytes = Vec::new();
    let target = PeerTarget { node: OriginId(2), shard: 0, lane: 0 };
    let mut dialer = PeerDialer::new(Instant(0), &dialing, target, &mut bytes);
    let mut writer = FrameWriter::default();
    if cut & 0x80 == 0 {
        writer.set_position(9);
    } else {
        bytes.clear();
    }
    while let [opcode, flags, low, high, rest @ ..] = data {
        let size = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, after) = rest.split_at(size);
        let head = Head { opcode: *opcode, flags: flags & 0b1011, ..Head::default() };
        writer.message(&mut bytes, head, body.len(), |out| out.extend_from_slice(body));
        data = after;
    }
    bytes.extend_from_slice(data);
    let mut listener = PeerListener::new(Instant(0), &listening, 9);
    let mut out = Vec::new();
    for piece in bytes.chunks(1 + usize::from(cut & 0x7f) * 97) {
        let mut count = 0;
        let received =
            listener.receive(Instant(0), piece, &listening, &mut out, &mut |peer, body| {
                assert_eq!(peer.node, OriginId(1), "nobody else is let in");
                count += body.len();
            });
        assert!(count == 0 || listener.peer().is_some());
        let bound = if listener.peer().is_some() { 200_000 } else { HANDSHAKE_BYTES_MAX };
        assert!(listener.memory() <= bound, "memory is bounded");
        if received.is_err() {
            break;
        }
    }
    let _ = listener.handle_timeout(Instant(u64::MAX), &listening, &mut out);
    // The same bytes as an answer, after the true one or instead of it.
    let mut sent = Vec::new();
    let _ = dialer.receive(&out, &dialing, &mut sent);
    let _ = dialer.receive(&bytes, &dialing, &mut sent);
    dialer.message(&mut vec![1; 40_000], &mut sent);
    dialer.fill_output(&mut sent, usize::MAX);
}

/// Every body there is, of any bytes.
pub(crate) fn bodies(data: &[u8]) {
    let context = DecodeContext {
        hash_seed: 1,
        value_size_max: 1000,
        batch_count_max: 100,
        message_size_max: 10_000,
    };
    for opcode in 0..=u8::MAX {
        if Opcode::from_u8(opcode).is_some()
            && let Ok(Request::Batch(batch)) = Request::decode(opcode, data, &context)
        {
            assert_eq!(batch.iter().count(), batch.count() as usize);
        }
    }
    let _ = Hello::decode(data);
    let _ = PeerHello::decode(data);
    let _ = PeerWelcome::decode(data);
    let _ = Welcome::decode(data);
    let _ = ReadReply::decode(data);
    let _ = response::decode_write(data);
    let _ = response::decode_failure(Status::BUSY, data);
    let _ = response::decode_batch(data, &mut |_| Ok(()));
    let _ = PageRef::decode(data, NamespaceId(1));
    let _ = Route::decode(&mut Reader::new(data));
}
