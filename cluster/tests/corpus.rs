//! The fuzz corpus of messages between nodes, replayed on every change.
//!
//! `ANNULUS_BLESS=1 cargo test -p annulus-cluster --test corpus` writes the seeds anew; inputs
//! that a fuzzer found stay beside them.

#[path = "../../tests/fuzz/src/messages.rs"]
mod messages;

use std::path::{Path, PathBuf};

use annulus_cluster::NodeId;
use annulus_cluster::message::{
    Claim, Gossip, PeerMessage, ReadResult, RecordPage, Report, Said, TrackEntry, TreeResult,
    Vitals, Want, WriteResult,
};
use annulus_cluster::register::{AcceptResult, Ballot, PrepareResult, RegisterId, State};
use annulus_engine::model::causality::{KeyState, Sibling};
use annulus_engine::model::{
    Context, Dot, Kind, NamespaceId, OriginId, PartitionId, Record, Timestamp, Token,
};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/messages")
}

fn record(kind: Kind, value: &[u8]) -> Record {
    Record {
        token: Token::of_key(b"key", 7),
        namespace: NamespaceId(1),
        incarnation: 1,
        kind,
        dot: Dot { origin: OriginId(1), sequence: 2 },
        timestamp: Timestamp(3 << 12),
        expiry_ms: 0,
        key: b"key".to_vec(),
        value: value.to_vec(),
    }
}

fn seeds() -> Vec<(String, Vec<u8>)> {
    let (id, deadline_us, epoch, partition) = (1, 1000, 1, PartitionId(3));
    let (put, delete) = (record(Kind::Put, b"value"), record(Kind::Delete, b""));
    let mut state = KeyState::new();
    let sibling = Sibling {
        dot: put.dot,
        timestamp: put.timestamp,
        is_delete: false,
        is_blind: false,
        expiry_ms: 0,
        value: b"value".into(),
    };
    state.write(sibling, &Context::default()).expect("one sibling fits");
    let siblings = record(Kind::Siblings, &state.encode());
    let page: RecordPage = [put.as_ref(), delete.as_ref()].into_iter().collect();
    let (as_of, is_primary) = (Timestamp(9), true);
    let entry = TrackEntry { partition, as_of, seen: b"seen" };
    let claim = |said| Claim { node: NodeId(3), incarnation: 1 << 32, said };
    let gossip = Gossip {
        reports: vec![Report {
            node: NodeId(1),
            incarnation: (2 << 32) | 1,
            heartbeat: 77,
            vitals: Vitals { load: 5, settings_epoch: 3, ..Vitals::default() },
        }],
        claims: vec![
            claim(Said::Alive),
            claim(Said::Suspect { reporter: NodeId(1) }),
            claim(Said::Down { reporters: [NodeId(1), NodeId(2)] }),
        ],
    };
    let register = RegisterId::NAMESPACES;
    let ballot = Ballot { counter: 9, node: NodeId(2), session: 4 };
    let next = Ballot { counter: 10, ..ballot };
    let made = State::default().changed(ballot, 3, b"namespaces".to_vec());
    let messages = [
        PeerMessage::Write { id, deadline_us, epoch, record: put.as_ref() },
        PeerMessage::Write { id: 0, deadline_us, epoch, record: siblings.as_ref() },
        PeerMessage::WriteDone { id, result: WriteResult::Accepted(50) },
        PeerMessage::Read {
            id,
            deadline_us,
            epoch,
            token: put.token,
            namespace: put.namespace,
            key: b"key",
            want: Want::Digest,
        },
        PeerMessage::ReadDone {
            id,
            result: ReadResult::Full { as_of, is_primary, record: Some(delete.as_ref()) },
        },
        PeerMessage::Forward { id, deadline_us, opcode: 4, hops: 1, body: b"body" },
        PeerMessage::ForwardDone { id, status: 0, body: b"body" },
        PeerMessage::Track {
            base_version: 0,
            version: 1,
            hlc: as_of,
            hint_floor: as_of,
            epoch: 1,
            entries: vec![entry, entry],
            full: true,
        },
        PeerMessage::TrackDone { version: 1, hlc: as_of },
        PeerMessage::Sync {
            id,
            partition,
            seen: b"seen",
            from: Token(5),
            after: Some((NamespaceId(1), b"key")),
            bytes_max: 1 << 20,
        },
        PeerMessage::SyncPage {
            id,
            partition,
            records: page.list(),
            next: Some((Token(6), NamespaceId(1), b"key")),
            seen: b"seen",
            helper_incarnation: 1,
        },
        PeerMessage::Tree { id, partition, seen_digest: 7, level: 1, index: 2 },
        PeerMessage::TreeDone { id, result: TreeResult::Leaf(vec![(Token(8), 9)]) },
        PeerMessage::Fetch { id, partition, tokens: vec![Token(1), Token(2)] },
        PeerMessage::Probe { id, sent_wall_us: 1, gossip: gossip.clone() },
        PeerMessage::ProbeDone {
            id,
            sent_wall_us: 1,
            received_wall_us: 2,
            replied_wall_us: 3,
            gossip: Gossip::default(),
        },
        PeerMessage::Settings { client: b"host:1", generation: 3, catalogue: b"namespaces" },
        PeerMessage::ProbeFor { id, target: NodeId(4), gossip: gossip.clone() },
        PeerMessage::ProbeForDone {
            id,
            target: NodeId(4),
            is_reached: true,
            gossip: Gossip::default(),
        },
        PeerMessage::Gossip { is_answer: false, gossip },
        PeerMessage::Room { is_left: true },
        PeerMessage::Moving { generation: 2, confirmed: 1, is_empty: true, ready: vec![partition] },
        PeerMessage::Prepare { register, ballot },
        PeerMessage::Promise {
            register,
            ballot: next,
            result: PrepareResult::Promised(ballot, made.clone()),
        },
        PeerMessage::Accept { register, ballot, next, state: made },
        PeerMessage::Accepted { register, ballot, result: AcceptResult::Conflict(next) },
    ];
    let named = |(index, message): (usize, &PeerMessage<'_>)| {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        (format!("{index:02}-{}", message.name()), bytes)
    };
    messages.iter().enumerate().map(named).collect()
}

#[test]
fn every_stored_input_is_survived() {
    if std::env::var_os("ANNULUS_BLESS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(corpus().join(name), bytes).unwrap();
        }
    }
    let mut count = 0;
    for entry in std::fs::read_dir(corpus()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        messages::messages(&bytes);
        for at in 0..bytes.len().min(300) {
            messages::messages(&bytes[..at]);
            for to in [0, 1, 0x7f, 0xff, bytes[at] ^ 1] {
                let mut changed = bytes.clone();
                changed[at] = to;
                messages::messages(&changed);
            }
        }
        count += 1;
    }
    assert!(count >= seeds().len(), "the corpus has {count} inputs");
}

#[test]
fn the_seeds_in_the_corpus_are_the_messages_of_today() {
    for (name, bytes) in seeds() {
        assert_eq!(std::fs::read(corpus().join(&name)).unwrap(), bytes, "{name} has changed");
    }
}
