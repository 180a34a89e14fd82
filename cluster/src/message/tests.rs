//! One encoding a message, no bytes that harm, and the record check's verdicts.

use annulus_engine::model::causality::{KeyState, Sibling};
use annulus_engine::model::{Context, Dot, Kind, OriginId, Record, WallMicros};
use proptest::prelude::*;

use super::*;
use crate::keys::{Head, Shown};
use crate::member::NodeId;

const SEED: u64 = 7;
const WALL: WallMicros = WallMicros(1_000_000_000);

fn record(kind: Kind, key: &[u8], value: &[u8]) -> Record {
    Record {
        token: Token::of_key(key, SEED),
        namespace: NamespaceId(3),
        incarnation: 4,
        kind,
        dot: Dot { origin: OriginId(2), sequence: 9 },
        timestamp: Timestamp::new(WALL, 5),
        expiry_ms: 6,
        key: key.to_vec(),
        value: value.to_vec(),
    }
}

fn encoded(message: &PeerMessage<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

fn records() -> impl Strategy<Value = Record> {
    let kinds = prop_oneof![Just(Kind::Put), Just(Kind::Delete), Just(Kind::Siblings)];
    let bytes = prop::collection::vec(any::<u8>(), 0..40);
    let key = prop::collection::vec(any::<u8>(), 1..20);
    (kinds, key, bytes, any::<[u64; 4]>(), any::<[u32; 3]>()).prop_map(
        |(kind, key, value, long, short)| Record {
            token: Token(long[0]),
            namespace: NamespaceId(short[0]),
            incarnation: short[1],
            kind,
            dot: Dot { origin: OriginId(short[2]), sequence: long[1].max(1) },
            timestamp: Timestamp(long[2]),
            expiry_ms: long[3],
            key,
            value: if kind == Kind::Delete { Vec::new() } else { value },
        },
    )
}

/// What a message of any kind can be made of.
#[derive(Debug, Clone)]
struct Parts {
    kind: u8,
    choice: u8,
    long: [u64; 4],
    short: [u32; 3],
    bytes: Vec<u8>,
    key: Vec<u8>,
    records: Vec<Record>,
    page: RecordPage,
    pairs: Vec<(u64, u64)>,
}

fn parts() -> impl Strategy<Value = Parts> {
    let bytes = prop::collection::vec(any::<u8>(), 0..60);
    let key = prop::collection::vec(any::<u8>(), 1..20);
    let pairs = prop::collection::vec(any::<(u64, u64)>(), 0..5);
    let records = prop::collection::vec(records(), 1..4);
    let kinds = prop_oneof![1u8..=20, 32u8..=38];
    (kinds, any::<u8>(), any::<[u64; 4]>(), any::<[u32; 3]>(), bytes, key, records, pairs).prop_map(
        |(kind, choice, long, short, bytes, key, records, pairs)| Parts {
            page: records.iter().map(Record::as_ref).collect(),
            kind,
            choice,
            long,
            short,
            bytes,
            key,
            records,
            pairs,
        },
    )
}

impl Parts {
    fn write_result(&self) -> WriteResult {
        match self.choice % 3 {
            0 => WriteResult::Durable,
            1 => WriteResult::Accepted(self.short[0]),
            _ => WriteResult::Refused(
                self.choice.into(),
                Reason::ALL[usize::from(self.choice) % Reason::ALL.len()],
            ),
        }
    }

    fn read_result(&self) -> ReadResult<'_> {
        let (as_of, is_primary) = (Timestamp(self.long[1]), self.choice & 4 == 0);
        match self.choice % 4 {
            0 => ReadResult::Full {
                as_of,
                is_primary,
                record: (self.choice & 8 == 0).then(|| self.records[0].as_ref()),
            },
            1 => ReadResult::Digest { as_of, is_primary, digest: self.long[2] },
            2 => ReadResult::Refused(self.choice.into()),
            _ => ReadResult::Unknown,
        }
    }

    fn key_result(&self) -> KeyResult<'_> {
        let purged = Timestamp(self.long[1]);
        let dot = Dot { origin: OriginId(self.short[0]), sequence: self.long[3].max(1) };
        let head = Head {
            stored: (Timestamp(self.long[0]), dot),
            version: (Timestamp(self.long[2]), dot),
            is_put: self.choice & 16 == 0,
            expiry_ms: self.long[1],
        };
        let is_there = self.choice & 8 == 0;
        match self.choice % 4 {
            0 => KeyResult::Head(Shown { purged, head: is_there.then_some(head) }),
            1 => KeyResult::Whole { purged, record: is_there.then(|| self.records[0].as_ref()) },
            2 => KeyResult::Conflict(purged),
            _ => KeyResult::Refused(self.choice.into()),
        }
    }

    fn gossip(&self) -> Gossip {
        let [node, reporter, other] = self.short.map(|number| number & 0xffff);
        let incarnation = |number: u64| number.min(u64::MAX - 1);
        let report = |(at, pair): (usize, &(u64, u64))| Report {
            node: NodeId(node),
            incarnation: incarnation(pair.0),
            heartbeat: pair.1,
            vitals: Vitals {
                load: self.long[at % 4],
                heat: pair.0,
                disk_level: pair.1,
                oldest_hint: self.long[3],
                settings_epoch: at as u64,
                members_epoch: self.long[2],
            },
        };
        let claim = |(at, pair): (usize, &(u64, u64))| Claim {
            node: NodeId(node),
            incarnation: incarnation(pair.1),
            said: match at % 3 {
                0 => Said::Alive,
                1 => Said::Suspect { reporter: NodeId(node + 1 + reporter) },
                _ => {
                    let first = node + 1 + reporter;
                    Said::Down { reporters: [NodeId(first), NodeId(first + 1 + other)] }
                }
            },
        };
        Gossip {
            reports: self.pairs.iter().enumerate().map(report).collect(),
            claims: self.pairs.iter().enumerate().map(claim).collect(),
        }
    }

    fn tree_result(&self) -> TreeResult {
        match self.choice % 4 {
            0 => TreeResult::Equal,
            1 => TreeResult::Different(self.pairs.iter().map(|pair| pair.0).collect()),
            2 => TreeResult::Leaf(self.pairs.iter().map(|(t, d)| (Token(*t), *d)).collect()),
            _ => TreeResult::NotComparable,
        }
    }

    /// One that somebody may propose with.
    fn ballot(&self, counter: u64) -> Ballot {
        Ballot {
            counter: (counter >> 2).max(1),
            node: NodeId(self.short[0]),
            session: self.long[3],
        }
    }

    /// The state of a register that so many changes have made.
    fn state(&self) -> State {
        let changes = u64::from(self.choice % 40);
        let state = State { version: self.long[2], ..State::default() };
        (1..=changes).fold(state, |state, change| {
            state.changed(self.ballot(change << 2), self.long[2], self.bytes.clone())
        })
    }

    fn message(&self) -> PeerMessage<'_> {
        let [id, long1, long2, long3] = self.long;
        let [deadline_us, epoch, index] = self.short;
        let partition = PartitionId(index & 0xffff);
        let register = RegisterId(index);
        let entry = |(as_of, _): &(u64, u64)| TrackEntry {
            partition,
            as_of: Timestamp(*as_of),
            seen: &self.bytes,
        };
        match self.kind {
            1 => PeerMessage::Write { id, deadline_us, epoch, record: self.records[0].as_ref() },
            2 => PeerMessage::WriteDone { id, result: self.write_result() },
            3 => PeerMessage::Read {
                id,
                deadline_us,
                epoch,
                token: Token(long1),
                namespace: NamespaceId(index),
                key: &self.key,
                want: if self.choice & 1 == 0 { Want::Full } else { Want::Digest },
            },
            4 => PeerMessage::ReadDone { id, result: self.read_result() },
            5 => PeerMessage::Forward {
                id,
                deadline_us,
                opcode: self.choice,
                hops: 1 + self.choice % FORWARD_HOPS_MAX,
                body: &self.bytes,
            },
            6 => PeerMessage::ForwardDone { id, status: self.choice.into(), body: &self.bytes },
            7 => PeerMessage::Track {
                base_version: id,
                version: long1,
                hlc: Timestamp(long2),
                hint_floor: Timestamp(long3),
                epoch,
                entries: self.pairs.iter().map(entry).collect(),
                full: self.choice & 1 == 0,
            },
            8 => PeerMessage::TrackDone { version: id, hlc: Timestamp(long1) },
            9 => PeerMessage::Sync {
                id,
                partition,
                seen: &self.bytes,
                from: Token(long1),
                after: (self.choice & 1 == 0).then_some((NamespaceId(epoch), &self.key[..])),
                bytes_max: epoch,
            },
            10 => PeerMessage::SyncPage {
                id,
                partition,
                records: if self.choice & 1 == 0 {
                    self.page.list()
                } else {
                    RecordList::default()
                },
                next: (self.choice & 2 == 0).then_some((
                    Token(long1),
                    NamespaceId(epoch),
                    &self.key[..],
                )),
                seen: &self.bytes,
                helper_incarnation: epoch,
            },
            11 => {
                PeerMessage::Tree { id, partition, seen_digest: long1, level: self.choice, index }
            }
            12 => PeerMessage::TreeDone { id, result: self.tree_result() },
            13 => PeerMessage::Fetch {
                id,
                partition,
                tokens: self.pairs.iter().map(|pair| Token(pair.0)).collect(),
            },
            14 => PeerMessage::Probe { id, sent_wall_us: long1, gossip: self.gossip() },
            32 => PeerMessage::Prepare { register, ballot: self.ballot(id) },
            33 => PeerMessage::Promise {
                register,
                ballot: self.ballot(id | 1 << 63),
                result: match self.choice % 3 {
                    0 => PrepareResult::Promised(Ballot::ZERO, self.state()),
                    1 => PrepareResult::Promised(self.ballot(long1 >> 1), self.state()),
                    _ => PrepareResult::Conflict(self.ballot(long1)),
                },
            },
            34 => PeerMessage::Accept {
                register,
                ballot: self.ballot(id >> 1),
                next: self.ballot(id | 1 << 63),
                state: self.state(),
            },
            35 => PeerMessage::Accepted {
                register,
                ballot: self.ballot(id),
                result: match self.choice % 2 {
                    0 => AcceptResult::Accepted,
                    _ => AcceptResult::Conflict(self.ballot(long1)),
                },
            },
            36 => PeerMessage::KeyAsk {
                id,
                epoch,
                ask: KeyAsk {
                    ballot: Timestamp(long2),
                    token: Token(long1),
                    namespace: NamespaceId(index),
                    key: &self.key,
                    want: if self.choice & 1 == 0 { Want::Full } else { Want::Digest },
                },
            },
            37 => PeerMessage::KeySaid { id, ballot: Timestamp(long2), result: self.key_result() },
            38 => PeerMessage::KeyAccept { id, epoch, record: self.records[0].as_ref() },
            16 => PeerMessage::Settings {
                client: &self.key,
                generation: long1,
                catalogue: &self.bytes,
            },
            17 => PeerMessage::ProbeFor { id, target: NodeId(index), gossip: self.gossip() },
            18 => PeerMessage::ProbeForDone {
                id,
                target: NodeId(index),
                is_reached: self.choice & 1 == 0,
                gossip: self.gossip(),
            },
            19 => PeerMessage::Gossip { is_answer: self.choice & 1 == 0, gossip: self.gossip() },
            20 => PeerMessage::Room { is_left: self.choice & 1 == 0 },
            21 => PeerMessage::Moving {
                generation: epoch,
                confirmed: index,
                is_empty: self.choice & 1 == 0,
                ready: vec![PartitionId(epoch & 0xffff); 2],
            },
            _ => PeerMessage::ProbeDone {
                id,
                sent_wall_us: long1,
                received_wall_us: long2,
                replied_wall_us: long3,
                gossip: self.gossip(),
            },
        }
    }
}

/// Decodes bytes of any origin; what is accepted has only this encoding.
fn decode_hostile(bytes: &[u8]) {
    if let Ok(message) = PeerMessage::decode(bytes) {
        assert_eq!(encoded(&message), bytes, "{message:?}");
        if let PeerMessage::SyncPage { records, .. } = message {
            assert_eq!(records.iter().count(), records.count() as usize);
        }
    }
}

proptest! {
    #[test]
    fn a_message_reads_back(parts in parts()) {
        let message = parts.message();
        let bytes = encoded(&message);
        let decoded = PeerMessage::decode(&bytes);
        prop_assert_eq!(decoded.as_ref(), Ok(&message));
        if let PeerMessage::SyncPage { records, .. } = &message {
            let expected = &parts.records[..records.count() as usize];
            let found: Vec<Record> = records.iter().map(|record| record.to_owned()).collect();
            prop_assert_eq!(&found, expected);
        }
    }

    #[test]
    fn a_message_cut_short_or_too_long_is_refused(parts in parts(), at: prop::sample::Index) {
        let mut bytes = encoded(&parts.message());
        let cut = &bytes[..at.index(bytes.len())];
        // A forwarded body reaches to the message's end, so a cut one is another message.
        if !matches!(parts.kind, 5 | 6) {
            prop_assert!(PeerMessage::decode(cut).is_err());
            bytes.push(0);
            prop_assert!(PeerMessage::decode(&bytes).is_err());
        } else {
            decode_hostile(cut);
        }
    }

    #[test]
    fn changed_bytes_are_refused_or_another_message(parts in parts(), at: prop::sample::Index, to: u8) {
        let mut bytes = encoded(&parts.message());
        let at = at.index(bytes.len());
        bytes[at] = to;
        decode_hostile(&bytes);
    }

    #[test]
    fn any_bytes_are_refused_or_a_message(kind in 0u8..=39, bytes: Vec<u8>) {
        decode_hostile(&bytes);
        decode_hostile(&[&[kind], &bytes[..]].concat());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a dump in `net/README.md`, header of the frame included.
fn readme_dump(name: &str) -> Vec<u8> {
    let readme = include_str!("../../../net/README.md");
    let (_, dump) = readme.split_once(&format!("```hex {name}\n")).expect("a dump of it");
    let rows = dump.lines().take_while(|row| *row != "```");
    rows.flat_map(|row| {
        let digits = row.split("  ").nth(1).expect("position, digits, text");
        digits.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect::<Vec<u8>>()
    })
    .collect()
}

#[test]
fn the_bytes_of_a_write_never_change() {
    let record = record(Kind::Put, b"key", b"value");
    let write = PeerMessage::Write {
        id: 0x0102_0304_0506_0708,
        deadline_us: 0x000f_4240,
        epoch: 1,
        record: record.as_ref(),
    };
    let expected = [
        "01",                       // write
        "0807060504030201",         // id
        "40420f00",                 // 1 s left
        "01000000",                 // epoch
        "cc81c539c4d8b325",         // token
        "0500a0acb9030000",         // 1,000 s, counter 5
        "0900000000000000",         // sequence
        "0600000000000000",         // expiry
        "020000000300000004000000", // origin, namespace, incarnation
        "05000000",                 // value size
        "03000100",                 // key size, put, reserved
        "6b6579",
        "76616c7565",
    ];
    assert_eq!(hex(&encoded(&write)), expected.concat());
    assert_eq!(hex(&readme_dump("peer-write")[24..]), expected.concat(), "as specified");
}

#[test]
fn every_kind_begins_with_its_number() {
    let parts = Parts {
        kind: 0,
        choice: 0,
        long: [1; 4],
        short: [1; 3],
        bytes: vec![1, 2],
        key: b"key".to_vec(),
        records: vec![record(Kind::Delete, b"k", b"")],
        page: RecordPage::new(),
        pairs: vec![(1, 2)],
    };
    let names: std::collections::BTreeSet<&str> = (1..=20)
        .chain(32..=38)
        .map(|kind| {
            let parts = Parts { kind, ..parts.clone() };
            assert_eq!(encoded(&parts.message())[0], kind);
            parts.message().name()
        })
        .collect();
    assert_eq!(names.len(), 27);
}

#[test]
fn lists_that_announce_more_than_they_hold_cost_nothing() {
    let fetch = PeerMessage::Fetch { id: 1, partition: PartitionId(2), tokens: Vec::new() };
    let mut bytes = encoded(&fetch);
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = PeerMessage::decode(&bytes).unwrap_err();
    assert_eq!(error, Malformed("list is longer than the message"));
}

/// The bytes of an exchange of gossip with one claim.
fn claim_bytes(said: u8, node: u32, incarnation: u64, others: &[u32]) -> Vec<u8> {
    let mut bytes = vec![19, 0, 0, 1, said];
    bytes.put_u32(node);
    bytes.put_u64(incarnation);
    others.iter().for_each(|other| bytes.put_u32(*other));
    bytes
}

#[test]
fn the_bytes_of_gossip_never_change() {
    let report = Report {
        node: NodeId(7),
        incarnation: 0x0102_0304_0506_0708,
        heartbeat: 9,
        vitals: Vitals {
            load: 1,
            heat: 2,
            disk_level: 3,
            oldest_hint: 4,
            settings_epoch: 5,
            members_epoch: 6,
        },
    };
    let said = Said::Down { reporters: [NodeId(2), NodeId(3)] };
    let claim = Claim { node: NodeId(1), incarnation: 4, said };
    let gossip = Gossip { reports: vec![report], claims: vec![claim] };
    let message = PeerMessage::ProbeForDone { id: 5, target: NodeId(6), is_reached: true, gossip };
    let expected = [
        "12",                               // probe_for_done
        "0500000000000000",                 // id
        "0600000001",                       // target, reached
        "01",                               // one report
        "070000000807060504030201",         // node, incarnation
        "0900000000000000",                 // heartbeat
        "01000000000000000200000000000000", // load, heat
        "03000000000000000400000000000000", // disk level, oldest hint
        "05000000000000000600000000000000", // epochs
        "01",                               // one claim
        "02",                               // down
        "010000000400000000000000",         // node, incarnation
        "0200000003000000",                 // reporters
    ];
    assert_eq!(hex(&encoded(&message)), expected.concat());
}

#[test]
fn a_claim_that_cannot_be_is_refused() {
    let verdict = |bytes: &[u8]| PeerMessage::decode(bytes).map(|message| message.name());
    assert_eq!(verdict(&claim_bytes(0, 1, 5, &[])), Ok("gossip"));
    assert_eq!(verdict(&claim_bytes(2, 1, 5, &[2, 3])), Ok("gossip"));
    let itself = Err(Malformed("a member accuses itself"));
    assert_eq!(verdict(&claim_bytes(1, 1, 5, &[1])), itself);
    assert_eq!(verdict(&claim_bytes(2, 3, 5, &[2, 3])), itself);
    for pair in [[2, 2], [3, 2]] {
        let error = Err(Malformed("two reporters are not two, or not in order"));
        assert_eq!(verdict(&claim_bytes(2, 1, 5, &pair)), error);
    }
    let last = Err(Malformed("an incarnation that nobody can follow"));
    assert_eq!(verdict(&claim_bytes(0, 1, u64::MAX, &[])), last);
    assert_eq!(verdict(&claim_bytes(3, 1, 5, &[])), Err(Malformed("unknown kind of claim")));
}

#[test]
fn gossip_longer_than_a_packet_is_refused() {
    let claim = Claim { node: NodeId(1), incarnation: 1, said: Said::Alive };
    let message = |count: usize| PeerMessage::Gossip {
        is_answer: false,
        gossip: Gossip { reports: Vec::new(), claims: vec![claim; count] },
    };
    let most = (GOSSIP_MESSAGE_SIZE_MAX - 4) / 13;
    assert!(PeerMessage::decode(&encoded(&message(most))).is_ok());
    let error = PeerMessage::decode(&encoded(&message(most + 1))).unwrap_err();
    assert_eq!(error, Malformed("gossip is too long"));
}

#[test]
fn a_good_record_passes_and_tells_its_partition() {
    for (kind, value) in [(Kind::Put, &b"v"[..]), (Kind::Delete, b"")] {
        let record = record(kind, b"key", value);
        assert_eq!(
            check_record(&record.as_ref(), SEED, 4, WALL),
            Ok(record.token.partition(4)),
            "{kind:?}"
        );
    }
}

#[test]
fn a_record_with_a_foreign_token_is_refused() {
    let mut forged = record(Kind::Put, b"key", b"");
    forged.token = Token(forged.token.0 ^ 1);
    assert_eq!(check_record(&forged.as_ref(), SEED, 4, WALL), Err(Reason::Token));
    let good = record(Kind::Put, b"key", b"");
    assert_eq!(check_record(&good.as_ref(), SEED + 1, 4, WALL), Err(Reason::Token));
}

#[test]
fn a_key_that_is_a_hash_is_its_own_token() {
    let mut hashed = record(Kind::Put, b"12345678rest", b"");
    hashed.token = Token::of_hashed_key(&hashed.key).unwrap();
    assert!(check_record(&hashed.as_ref(), SEED, 4, WALL).is_ok());
}

#[test]
fn a_stamp_too_far_ahead_is_refused() {
    let mut record = record(Kind::Put, b"key", b"");
    record.timestamp = Timestamp::new(WallMicros(WALL.0 + 500_000), 4095);
    assert!(check_record(&record.as_ref(), SEED, 4, WALL).is_ok());
    record.timestamp = Timestamp::new(WallMicros(WALL.0 + 500_001), 0);
    assert_eq!(check_record(&record.as_ref(), SEED, 4, WALL), Err(Reason::Stamp));
}

#[test]
fn a_record_of_forbidden_size_is_refused() {
    let long = vec![1; KEY_SIZE_MAX + 1];
    let records = [
        record(Kind::Put, b"", b""),
        record(Kind::Put, &long, b""),
        record(Kind::Delete, b"k", b"v"),
    ];
    for record in records {
        assert_eq!(check_record(&record.as_ref(), SEED, 4, WALL), Err(Reason::Size));
        let write = PeerMessage::Write { id: 1, deadline_us: 1, epoch: 1, record: record.as_ref() };
        assert!(PeerMessage::decode(&encoded(&write)).is_err());
    }
}

#[test]
fn siblings_are_checked_one_by_one() {
    let state_at = |wall: u64| {
        let mut state = KeyState::new();
        let sibling = Sibling {
            dot: Dot { origin: OriginId(1), sequence: 1 },
            timestamp: Timestamp::new(WallMicros(wall), 0),
            is_delete: false,
            is_blind: false,
            expiry_ms: 0,
            value: b"v".into(),
        };
        state.write(sibling, &Context::default()).unwrap();
        state.encode()
    };
    let good = record(Kind::Siblings, b"key", &state_at(WALL.0));
    assert!(check_record(&good.as_ref(), SEED, 4, WALL).is_ok());
    // The record's own stamp is right, the one inside is not.
    let ahead = record(Kind::Siblings, b"key", &state_at(2 * WALL.0));
    assert_eq!(check_record(&ahead.as_ref(), SEED, 4, WALL), Err(Reason::Stamp));
    let noise = record(Kind::Siblings, b"key", b"\xff\xff\xff");
    assert_eq!(check_record(&noise.as_ref(), SEED, 4, WALL), Err(Reason::State));
}

#[test]
fn messages_of_registers_that_no_proposer_sends_are_refused() {
    let ballot = Ballot { counter: 7, node: NodeId(1), session: 3 };
    let register = RegisterId::NAMESPACES;
    let state = State::default();
    let zero = PeerMessage::Prepare { register, ballot: Ballot::ZERO };
    let beyond = Ballot { counter: 1 << 63, ..ballot };
    let beyond = PeerMessage::Prepare { register, ballot: beyond };
    let same = PeerMessage::Accept { register, ballot, next: ballot, state: state.clone() };
    let result = PrepareResult::Promised(ballot, state);
    let above = PeerMessage::Promise { register, ballot, result };
    for message in [zero, beyond, same, above] {
        assert!(PeerMessage::decode(&encoded(&message)).is_err(), "{message:?}");
    }
}
