//! The fuzz corpus, replayed: every stored input, through every target, on every change.
//!
//! `ANNULUS_BLESS=1 cargo test -p annulus-net --test corpus` writes the seeds anew; inputs that a
//! fuzzer found stay beside them.

#[path = "../../tests/fuzz/src/targets.rs"]
mod targets;

use std::path::{Path, PathBuf};

use annulus_engine::model::{NamespaceId, Token, TokenRange};
use annulus_net::wire::hello::Hello;
use annulus_net::wire::request::{Admin, Outgoing};
use annulus_net::wire::scan::Scan;
use annulus_net::wire::{
    Condition, Delete, Get, Operation, OperationFlags, Put, Ttl, WriteOptions,
};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus")
}

/// Bodies of one good request each, with their opcodes.
fn good_bodies() -> Vec<(&'static str, u8, Vec<u8>)> {
    let (token, namespace, options) = (Token::MIN, NamespaceId(1), WriteOptions::default());
    let get = Operation::Get(Get {
        token,
        namespace,
        key: b"hold",
        level: Default::default(),
        primary: Default::default(),
        max_staleness_ms: 5,
        flags: OperationFlags::TRACE,
    });
    let key = b"key";
    let put =
        Operation::Put(Put { token, namespace, key, value: b"v".into(), ttl: Ttl::Never, options });
    let all = WriteOptions {
        condition: Condition::IfVersion(Default::default()),
        context: Some(b"context"),
        ..options
    };
    let delete = Operation::Delete(Delete { token, namespace, key, options: all });
    let batch = [get, put, delete];
    let range = TokenRange::FULL;
    let scan = Scan { namespace, count_max: 3, bytes_max: 0, flags: 1, range, after: b"a" };
    let requests = [
        ("hello", Outgoing::Hello(Hello { name: "seed", ..Hello::default() })),
        ("ping", Outgoing::Ping(b"ping")),
        ("get", Outgoing::Operation(get)),
        ("put", Outgoing::Operation(put)),
        ("delete", Outgoing::Operation(delete)),
        ("batch", Outgoing::Batch(&batch)),
        ("scan", Outgoing::Scan(scan)),
        ("stats", Outgoing::Stats),
        ("admin", Outgoing::Admin(Admin { command: "ns.list", json: "{}" })),
    ];
    let body = |request: &Outgoing<'_>| {
        let mut body = Vec::new();
        request.encode(&mut body);
        body
    };
    requests
        .iter()
        .map(|(name, request)| (*name, request.opcode().request(), body(request)))
        .collect()
}

/// A frame as the `server` and `client` targets take it.
fn frame(opcode: u8, flags: u8, id: u8, body: &[u8]) -> Vec<u8> {
    let size = u16::try_from(body.len()).expect("seeds are small").to_le_bytes();
    [&[opcode, flags, id, 0, size[0], size[1]], body].concat()
}

fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut all = vec![3];
    for (index, (name, opcode, body)) in (1u8..).zip(good_bodies()) {
        seeds.push((format!("bodies/{name}"), body.clone()));
        seeds
            .push((format!("server/{name}"), [&[1], &frame(opcode, 0, index, &body)[..]].concat()));
        all.extend_from_slice(&frame(opcode, 0, index, &body));
    }
    seeds.push(("server/conversation".to_owned(), all));
    // A put in three slices, and one that lies about its size.
    let mut slices = vec![2];
    for (offset, piece) in [(0u32, &[1; 30][..]), (30, &[2; 30]), (60, &[3; 10])] {
        let body = [&70u32.to_le_bytes(), &offset.to_le_bytes(), piece].concat();
        slices.extend_from_slice(&frame(4, 1, 9, &body));
    }
    seeds.push(("server/slices".to_owned(), slices));
    let lie = [&u32::MAX.to_le_bytes(), &0u32.to_le_bytes(), &[0; 8][..]].concat();
    seeds.push(("server/slice-lies".to_owned(), [&[0], &frame(4, 1, 9, &lie)[..]].concat()));
    seeds.push(("server/http".to_owned(), b"\x80GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()));
    let busy = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'b'];
    let replies =
        [&[2], &frame(8, 0, 1, b"{}")[..], &frame(2, 2, 2, &busy), &frame(8, 8, 3, &busy)];
    seeds.push(("client/replies".to_owned(), replies.concat()));
    seeds.push(("client/goodbye".to_owned(), [&[2], &frame(0x7f, 0, 0, &busy)[..]].concat()));
    seeds.push(("peer/hello".to_owned(), vec![7]));
    let message = [&[7, 0x40, 0, 5, 0], &b"hello"[..], &[0x40, 0, 3, 0], b"you"].concat();
    seeds.push(("peer/messages".to_owned(), message));
    let mut slices = vec![3];
    for (offset, piece) in [(0u32, &[1; 30][..]), (30, &[2; 30]), (60, &[3; 10])] {
        let size = u8::try_from(8 + piece.len()).expect("small");
        slices.extend_from_slice(&[0x40, 1, size, 0]);
        slices.extend_from_slice(&70u32.to_le_bytes());
        slices.extend_from_slice(&offset.to_le_bytes());
        slices.extend_from_slice(piece);
    }
    seeds.push(("peer/slices".to_owned(), slices));
    seeds.push(("peer/second-hello".to_owned(), vec![9, 0x41, 0, 0, 0]));
    seeds.push(("peer/stranger".to_owned(), b"\x80\x01\0\x08\0ANNULUS\0".to_vec()));
    seeds
}

#[test]
fn every_stored_input_is_survived_by_every_target() {
    if std::env::var_os("ANNULUS_BLESS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(corpus().join(name), bytes).unwrap();
        }
    }
    let mut count = 0;
    for folder in ["server", "client", "bodies", "peer"] {
        for entry in std::fs::read_dir(corpus().join(folder)).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            targets::server(&bytes);
            targets::client(&bytes);
            targets::bodies(&bytes);
            targets::peer(&bytes);
            // Cut anywhere and with each byte changed, as a fuzzer would begin.
            for at in 0..bytes.len().min(300) {
                targets::server(&bytes[..at]);
                let mut changed = bytes.clone();
                changed[at] ^= 0xff;
                targets::server(&changed);
                targets::client(&changed);
                targets::bodies(&changed);
                targets::peer(&bytes[..at]);
                targets::peer(&changed);
            }
            count += 1;
        }
    }
    assert!(count >= seeds().len(), "the corpus has {count} inputs");
}
