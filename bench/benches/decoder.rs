//! Frames and requests out of a pipelined stream, as a busy connection receives it.

mod common;

use annulus_engine::model::{Instant, OriginId, Token};
use annulus_net::client_connection::ClientConnection;
use annulus_net::server_connection::{
    ConnectionOptions, MemoryBudget, Replies, ServerConnection, ServerFacts,
};
use annulus_net::wire::decoder::FrameDecoder;
use annulus_net::wire::hello::{Hello, Limits, VERSION, Welcome};
use annulus_net::wire::request::{Outgoing, Request};
use annulus_net::wire::{Get, Level, Operation, OperationFlags, Put, Ttl, WriteOptions};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const COUNT: u32 = 1024;
const LATER: Instant = Instant(1 << 50);

fn facts() -> ServerFacts {
    ServerFacts {
        welcome: Welcome {
            version: VERSION,
            partition_bits: 0,
            shard_count: 1,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 1,
            hash_seed: common::SEED,
            map_version: 1,
            wall_us: 1,
            limits: Limits { in_flight_max: 2 * COUNT, ..Limits::default() },
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: Vec::new(),
        },
        options: ConnectionOptions::default(),
    }
}

/// A client's stream: HELLO, then `COUNT` requests.
fn stream(facts: &ServerFacts, value: Option<&[u8]>) -> Vec<u8> {
    let (mut out, mut answer) = (Vec::new(), Vec::new());
    let hello = Hello { wants: 0, ..Hello::default() };
    let mut client = ClientConnection::new(&hello, LATER, &mut out);
    let mut server = ServerConnection::new(Instant(0), facts, MemoryBudget::new(1 << 20));
    let mut none = |_: &mut Replies<'_>, _, _: Request<'_>| unreachable!("only HELLO was sent");
    server.receive(Instant(0), &out, facts, &mut answer, &mut none).expect("a good HELLO");
    client.receive(&answer, &mut |_| {}).expect("a good answer");
    for id in 0..u64::from(COUNT) {
        let (key, token, namespace) = (common::key(id), Token::MIN, common::NAMESPACE);
        let operation = match value {
            None => Operation::Get(Get {
                token,
                namespace,
                key: &key,
                level: Level::Default,
                primary: Level::Default,
                max_staleness_ms: 0,
                flags: OperationFlags::default(),
            }),
            Some(value) => Operation::Put(Put {
                token,
                namespace,
                key: &key,
                value: value.into(),
                ttl: Ttl::Default,
                options: WriteOptions::default(),
            }),
        };
        let request = Outgoing::Operation(operation);
        client.send(Instant(0), LATER, 0, &request, &mut out).expect("the window is wide");
    }
    out
}

/// Takes a stream in pieces; the sum of all requests' tokens.
fn decode(stream: &[u8], piece: usize, facts: &ServerFacts) -> u64 {
    let (mut decoder, context) = (FrameDecoder::new(), facts.decode_context());
    let mut sum = 0u64;
    for mut input in stream.chunks(piece) {
        while let Some(frame) = decoder.next(&mut input).expect("a good stream") {
            let request = Request::decode(frame.header.opcode, frame.body, &context);
            sum = sum.wrapping_add(match request.expect("a good request") {
                Request::Get(get) => get.token.0,
                Request::Put(put) => put.token.0 ^ put.value.len() as u64,
                _ => 0,
            });
        }
    }
    sum
}

fn decoders(c: &mut Criterion) {
    let facts = facts();
    let value = [7; 100];
    let mut fold = common::Fold::default();
    let mut group = c.benchmark_group("decoder");
    group.throughput(Throughput::Elements(COUNT.into()));
    for (name, value) in [("get", None), ("put_100", Some(&value[..]))] {
        let stream = stream(&facts, value);
        let whole = decode(&stream, usize::MAX, &facts);
        for (how, piece) in [("whole", usize::MAX), ("pieces_of_1000", 1000)] {
            group.bench_function(format!("{name}/{how}"), |b| {
                b.iter(|| decode(&stream, piece, &facts));
            });
            assert_eq!(decode(&stream, piece, &facts), whole, "pieces change nothing");
        }
        fold.add(whole);
    }
    group.finish();
    fold.print("decoder");
}

criterion_group!(name = benches; config = common::criterion(); targets = decoders);
criterion_main!(benches);
