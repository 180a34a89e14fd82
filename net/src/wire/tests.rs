//! Laws of all bodies: they read back, their bounds hold at 0, 1, max and max + 1, every
//! truncation is refused, and random bytes never panic.

use annulus_engine::model::{
    Dot, Kind, NamespaceId, OriginId, Piece, Pieces, RecordRef, Timestamp, Token,
};
use annulus_engine::model::{TokenRange, limits};
use proptest::prelude::*;

use super::batch;
use super::fields::{Condition, Level, OnceId, OperationFlags, Ttl, Version};
use super::frame::Opcode;
use super::hello::{self, Hello, Limits, Mode, NamespaceFact, Node, Replica, Run, Welcome};
use super::operation::{CONTEXT_SIZE_MAX, Delete, Get, Operation, Put, WriteOptions};
use super::request::{Admin, DecodeContext, Outgoing, PING_SIZE_MAX, Refusal, Request};
use super::response::{self, BatchResults, Failure, Page, PageRef, ReadFacts, ReadReply};
use super::response::{ValueRef, WriteFacts, decode_batch, decode_failure, decode_write};
use super::scan::{self, Scan};
use super::status::Status;

const CONTEXT: DecodeContext = DecodeContext {
    hash_seed: 42,
    value_size_max: 10_000,
    batch_count_max: 4,
    message_size_max: 100_000,
};

fn levels() -> impl Strategy<Value = Level> {
    prop_oneof![
        Just(Level::Default),
        (1u8..=63).prop_map(Level::Count),
        Just(Level::Quorum),
        Just(Level::All),
        Just(Level::Local),
        Just(Level::Each),
        Just(Level::Global),
        Just(Level::None),
    ]
}

fn versions() -> impl Strategy<Value = Version> {
    (any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(timestamp, sequence, origin)| Version {
        timestamp: Timestamp(timestamp),
        dot: Dot { origin: OriginId(origin), sequence },
    })
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..=max)
}

prop_compose! {
    fn owned_options()(
        level in levels(), primary in levels(), durable in levels(), version in versions(),
        which in 0..3, context in prop::option::of(bytes(CONTEXT_SIZE_MAX)),
        once in prop::option::of((any::<u64>(), any::<u64>())), flags in 0u16..8,
    ) -> (WriteOptions<'static>, Option<Vec<u8>>) {
        let condition = match which {
            0 => Condition::Always,
            1 => Condition::IfAbsent,
            _ => Condition::IfVersion(version),
        };
        // Not both sloppy and strict.
        let flags = OperationFlags(if flags & 6 == 6 { flags & !4 } else { flags } & !1);
        let once = once.map(|(client, number)| OnceId { client, number });
        (WriteOptions { level, primary, durable, condition, context: None, once, flags }, context)
    }
}

fn ttls() -> impl Strategy<Value = Ttl> {
    prop_oneof![
        Just(Ttl::Default),
        Just(Ttl::Never),
        (1..=limits::TTL_MS_MAX).prop_map(Ttl::Millis)
    ]
}

fn encoded(request: &Outgoing<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    request.encode(&mut body);
    assert_eq!(body.len(), request.size(), "announced size");
    body
}

fn decode<'a>(request: &Outgoing<'_>, body: &'a [u8]) -> Result<Request<'a>, Refusal> {
    Request::decode(request.opcode().request(), body, &CONTEXT)
}

/// The operation as it comes out at the server.
fn through(operation: Operation<'_>) -> Result<(), Refusal> {
    let request = Outgoing::Operation(operation);
    let body = encoded(&request);
    let decoded = match decode(&request, &body)? {
        Request::Get(get) => Operation::Get(get),
        Request::Put(put) => Operation::Put(put),
        Request::Delete(delete) => Operation::Delete(delete),
        other => panic!("{other:?}"),
    };
    assert_eq!(decoded, operation);
    for cut in 0..body.len() {
        assert!(decode(&request, &body[..cut]).is_err(), "cut at {cut}");
    }
    let longer = [&body[..], &[0]].concat();
    assert!(decode(&request, &longer).is_err(), "a byte too many");
    Ok(())
}

fn put_of<'a>(
    key: &'a [u8],
    value: &'a [u8],
    ttl: Ttl,
    options: WriteOptions<'a>,
) -> Operation<'a> {
    let token = Token::of_key(key, CONTEXT.hash_seed);
    let value = value.into();
    Operation::Put(Put { token, namespace: NamespaceId(7), key, value, ttl, options })
}

fn get_of(key: &[u8], flags: OperationFlags) -> Operation<'_> {
    Operation::Get(Get {
        token: Token::of_key(key, CONTEXT.hash_seed),
        namespace: NamespaceId(7),
        key,
        level: Level::Default,
        primary: Level::Default,
        max_staleness_ms: 0,
        flags,
    })
}

fn status_of(result: Result<(), Refusal>) -> Status {
    result.map_or_else(|refusal| refusal.status, |()| Status::OK)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn writes_read_back((options, context) in owned_options(), key in prop::collection::vec(any::<u8>(), 1..100),
                        value in bytes(200), ttl in ttls()) {
        let options = WriteOptions { context: context.as_deref(), ..options };
        through(put_of(&key, &value, ttl, options)).unwrap();
        // If-absent makes no sense for a delete.
        if options.condition != Condition::IfAbsent {
            let token = Token::of_key(&key, CONTEXT.hash_seed);
            let delete = Delete { token, namespace: NamespaceId(u32::MAX), key: &key, options };
            through(Operation::Delete(delete)).unwrap();
        }
    }

    #[test]
    fn gets_read_back(level in levels(), primary in levels(), max_staleness_ms: u32, key in prop::collection::vec(any::<u8>(), 1..100)) {
        let Operation::Get(get) = get_of(&key, OperationFlags::TRACE.with(OperationFlags::STALE_OK)) else { unreachable!() };
        through(Operation::Get(Get { level, primary, max_staleness_ms, ..get })).unwrap();
    }

    #[test]
    fn a_key_that_is_a_hash_is_its_own_token(key in prop::collection::vec(any::<u8>(), 1..40)) {
        let request = Outgoing::Operation(get_of(&key, OperationFlags::HASHED));
        let body = encoded(&request);
        match decode(&request, &body) {
            Ok(Request::Get(get)) => prop_assert_eq!(Some(get.token), Token::of_hashed_key(&key)),
            Ok(other) => panic!("{other:?}"),
            Err(refusal) => {
                prop_assert!(key.len() < 8);
                prop_assert_eq!(refusal.status, Status::BAD_REQUEST);
            }
        }
    }

    #[test]
    fn batches_read_back(keys in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..50), bytes(50)), 1..=4)) {
        let operations: Vec<Operation<'_>> = keys.iter()
            .map(|(key, value)| put_of(key, value, Ttl::Default, WriteOptions::default()))
            .collect();
        let request = Outgoing::Batch(&operations);
        let body = encoded(&request);
        let Ok(Request::Batch(found)) = decode(&request, &body) else { panic!("no batch") };
        prop_assert_eq!(&found.iter().collect::<Vec<_>>(), &operations);
        for cut in 0..body.len() {
            prop_assert!(decode(&request, &body[..cut]).is_err());
        }
    }

    #[test]
    fn scans_read_back(a: u64, b: u64, count_max: u32, bytes_max: u32, flags in 0u16..4, after in bytes(50)) {
        let range = TokenRange { first: Token(a.min(b)), last: Token(a.max(b)) };
        let scan = Scan { namespace: NamespaceId(3), count_max, bytes_max, flags, range, after: &after };
        let request = Outgoing::Scan(scan);
        let body = encoded(&request);
        let Ok(Request::Scan(found)) = decode(&request, &body) else { panic!("no scan") };
        prop_assert_eq!(found, scan);
    }

    #[test]
    fn hellos_read_back(version_min in 0u16..9, more in 1u16..9, shard: u32, features: u64, cluster: u128,
                        wants: u32, name in "[a-zé]{0,100}", credential in bytes(hello::CREDENTIAL_SIZE_MAX)) {
        let hello = Hello { version_min, version_max: version_min + more, shard, features, cluster, wants,
            name: &name, credential: &credential };
        let request = Outgoing::Hello(hello);
        let body = encoded(&request);
        let Ok(Request::Hello(found)) = decode(&request, &body) else { panic!("no hello") };
        prop_assert_eq!(found, hello);
    }

    #[test]
    fn welcomes_read_back(bits in 0u8..=6, cuts in prop::collection::vec(1u32..64, 0..5), wants in 0u32..8, name in ".{0,50}") {
        let mut left = 1u32 << bits;
        let mut runs = Vec::new();
        for (index, cut) in (0u32..).zip(cuts.into_iter().chain([64])) {
            let length = cut.min(left);
            if length > 0 {
                runs.push(Run { length, replicas: vec![Replica { node: OriginId(index), shard: index * 2 }] });
            }
            left -= length;
        }
        let welcome = Welcome {
            version: 1, partition_bits: bits, shard_count: 4, shard: 2, node: OriginId(9), features: 1,
            cluster: 5, hash_seed: 6, map_version: 7, wall_us: 8, limits: Limits::default(), runs,
            nodes: vec![Node { id: OriginId(9), shard_count: 4, address: "[::1]:7301".into() }],
            namespaces: vec![NamespaceFact { id: NamespaceId(1), mode: Mode::Linearizable, name }],
        };
        let mut body = Vec::new();
        welcome.encode(wants, &mut body);
        let found = Welcome::decode(&body).unwrap();
        if wants == hello::want::ALL {
            prop_assert_eq!(&found, &welcome);
            let token = Token::MAX;
            prop_assert_eq!(found.replicas(token), &welcome.runs.last().unwrap().replicas[..]);
        }
        prop_assert_eq!(found.runs.is_empty(), wants & hello::want::MAP == 0);
        for cut in 0..body.len() {
            prop_assert!(Welcome::decode(&body[..cut]).is_err());
        }
    }

    #[test]
    fn read_replies_read_back(values in prop::collection::vec((versions(), any::<u64>(), bytes(100)), 0..4),
                              as_of: u64, answers: u8, primaries: u8, context in bytes(60), trace in bytes(20)) {
        let facts = ReadFacts { as_of: Timestamp(as_of), answers, primaries, context: &context, trace: &trace };
        let values: Vec<ValueRef<'_>> = values.iter()
            .map(|(version, expiry_ms, value)| ValueRef { version: *version, expiry_ms: *expiry_ms, value: value.into() })
            .collect();
        let mut body = Vec::new();
        response::encode_read(&mut body, &facts, &values);
        prop_assert_eq!(body.len(), response::read_size(&facts, &values));
        prop_assert_eq!(response::read_in_pieces(&facts, &values).value().to_vec(), &body[..]);
        let cut: Vec<Pieces> = values.iter()
            .map(|it| Pieces::new(it.value.to_vec().chunks(7).map(|part| Piece::new(part.to_vec())).collect()))
            .collect();
        let in_pieces: Vec<ValueRef<'_>> = values.iter().zip(&cut)
            .map(|(it, cut)| ValueRef { value: cut.value(), ..*it })
            .collect();
        prop_assert_eq!(response::read_in_pieces(&facts, &in_pieces).value().to_vec(), &body[..]);
        prop_assert_eq!(ReadReply::decode(&body).unwrap(), ReadReply { facts, values });
    }

    #[test]
    fn write_replies_read_back(version in versions(), acks: u8, primary: u8, durable: u8, window_ms: u32,
                               context in bytes(60), trace in bytes(20)) {
        let facts = WriteFacts { version, acks, primary, durable, window_ms, context: &context, trace: &trace };
        let mut body = Vec::new();
        response::encode_write(&mut body, &facts);
        prop_assert_eq!(body.len(), response::write_size(&facts));
        prop_assert_eq!(decode_write(&body).unwrap(), facts);
    }

    #[test]
    fn failures_read_back_and_long_messages_are_cut(status: u16, retry_after_ms: u32, acks: u8, detail: u64, message in ".{0,1200}") {
        let failure = Failure { status: Status(status), retry_after_ms, acks, primary: 1, durable: 2, detail, message: &message };
        let mut body = Vec::new();
        response::encode_failure(&mut body, &failure);
        prop_assert_eq!(body.len(), response::failure_size(&failure));
        let found = decode_failure(failure.status, &body).unwrap();
        prop_assert!(message.starts_with(found.message));
        prop_assert_eq!(Failure { message: &message, ..found }, failure);
    }

    #[test]
    fn pages_read_back(records in prop::collection::vec((any::<u64>(), versions(), any::<u64>(), bytes(30), bytes(60), 1u8..=3), 0..6),
                       next in prop::option::of((any::<u64>(), bytes(20)))) {
        let scan = Scan { namespace: NamespaceId(3), count_max: 0, bytes_max: 0, flags: 0, range: TokenRange::FULL, after: b"" };
        let records: Vec<RecordRef<'_>> = records.iter().map(|(token, version, expiry_ms, key, value, kind)| RecordRef {
            token: Token(*token), namespace: NamespaceId(3), incarnation: 0, kind: Kind::from_u8(*kind).unwrap(),
            dot: version.dot, timestamp: version.timestamp, expiry_ms: *expiry_ms, key, value: value.into(),
        }).collect();
        let mut page = Page::new(&scan, 100, 1 << 20);
        records.iter().for_each(|record| page.push(record));
        let next = next.as_ref().map(|(token, key)| (Token(*token), &key[..]));
        let body = page.into_body(next);
        let found = PageRef::decode(&body, NamespaceId(3)).unwrap();
        prop_assert_eq!(found.records, records);
        prop_assert_eq!(found.next, next);
        for cut in 0..body.len() {
            prop_assert!(PageRef::decode(&body[..cut], NamespaceId(3)).is_err());
        }
    }

    #[test]
    fn random_bodies_never_panic(opcode: u8, verb in 2u8..6, mut body in bytes(200)) {
        let _ = Request::decode(opcode, &body, &CONTEXT);
        // And such that look like an operation, alone and in a batch.
        if let Some(byte) = body.get_mut(7) {
            *byte = verb;
        }
        let _ = Request::decode(verb, &body, &CONTEXT);
        let batch = [&2u32.to_le_bytes(), &[0; 4], &body[..]].concat();
        let _ = Request::decode(Opcode::Batch.request(), &batch, &CONTEXT);
    }
}

#[test]
fn keys_are_1_to_4096_bytes() {
    let key = vec![b'k'; limits::KEY_SIZE_MAX + 1];
    let status = |size: usize| {
        // Cheaper than `through`, which cuts at each byte.
        let request = Outgoing::Operation(get_of(&key[..size], OperationFlags::default()));
        status_of(decode(&request, &encoded(&request)).map(drop))
    };
    assert_eq!(status(0), Status::BAD_REQUEST);
    assert_eq!(status(1), Status::OK);
    assert_eq!(status(limits::KEY_SIZE_MAX), Status::OK);
    assert_eq!(status(limits::KEY_SIZE_MAX + 1), Status::TOO_BIG);
}

#[test]
fn values_are_0_to_the_limit() {
    let value = vec![1; 10_001];
    let status = |size: usize| {
        let put = put_of(b"k", &value[..size], Ttl::Default, WriteOptions::default());
        let request = Outgoing::Operation(put);
        status_of(decode(&request, &encoded(&request)).map(drop))
    };
    assert_eq!([0, 1, 10_000].map(status), [Status::OK; 3]);
    assert_eq!(status(10_001), Status::TOO_BIG);
}

#[test]
fn ttls_are_1_to_the_limit_or_for_ever() {
    let status = |millis: u64| {
        status_of(through(put_of(b"k", b"", Ttl::Millis(millis), WriteOptions::default())))
    };
    assert_eq!(status(0), Status::BAD_REQUEST);
    assert_eq!([1, limits::TTL_MS_MAX].map(status), [Status::OK; 2]);
    assert_eq!(status(limits::TTL_MS_MAX + 1), Status::TOO_BIG);
    assert_eq!(
        status_of(through(put_of(b"k", b"", Ttl::Never, WriteOptions::default()))),
        Status::OK
    );
}

#[test]
fn contexts_and_pings_and_batches_have_limits() {
    let context = vec![9; CONTEXT_SIZE_MAX + 1];
    let status = |size: usize| {
        let options = WriteOptions { context: Some(&context[..size]), ..WriteOptions::default() };
        status_of(through(put_of(b"k", b"", Ttl::Default, options)))
    };
    assert_eq!([0, 1, CONTEXT_SIZE_MAX].map(status), [Status::OK; 3]);
    assert_eq!(status(CONTEXT_SIZE_MAX + 1), Status::TOO_BIG);

    let ping = |size: usize| status_of(decode(&Outgoing::Ping(&[]), &vec![0; size]).map(drop));
    assert_eq!([0, 1, PING_SIZE_MAX].map(ping), [Status::OK; 3]);
    assert_eq!(ping(PING_SIZE_MAX + 1), Status::TOO_BIG);

    let one = get_of(b"k", OperationFlags::default());
    let batch = |count: usize| {
        let request = Outgoing::Batch(&[one; 5][..count]);
        status_of(decode(&request, &encoded(&request)).map(drop))
    };
    assert_eq!(batch(0), Status::BAD_REQUEST);
    assert_eq!([1, 4].map(batch), [Status::OK; 2]);
    assert_eq!(batch(5), Status::TOO_BIG);
}

#[test]
fn a_batch_that_lies_about_its_count_is_refused() {
    let mut body = Vec::new();
    batch::encode(&[get_of(b"k", OperationFlags::default())], &mut body);
    for count in [0u32, 2, 3, u32::MAX] {
        body[..4].copy_from_slice(&count.to_le_bytes());
        assert!(Request::decode(Opcode::Batch.request(), &body, &CONTEXT).is_err(), "{count}");
    }
}

/// The fuzzer found that the check of a batch let such a key pass, which then had no token: the
/// batch had fewer operations than its count, and would never have been answered.
#[test]
fn a_batch_with_a_hashed_key_that_is_too_short_is_refused() {
    let hashed = get_of(b"1234567", OperationFlags::HASHED);
    let operations = [get_of(b"k", OperationFlags::default()), hashed];
    let request = Outgoing::Batch(&operations);
    assert_eq!(status_of(decode(&request, &encoded(&request)).map(drop)), Status::BAD_REQUEST);
}

#[test]
fn every_flag_is_known_for_the_verb_or_refused() {
    let key = b"12345678";
    for (verb, allowed) in [(3u8, 0b110_0000_1111u16), (4, 0b1_1111_1111), (5, 0b1_1010_1111)] {
        for bit in 0..16 {
            let flags = 1u16 << bit;
            let mut body = vec![0; 7];
            body.push(verb);
            body.extend_from_slice(&flags.to_le_bytes());
            body.extend_from_slice(&[8, 0, 0, 0, 0, 0]);
            // Room for whatever optional field the flag announces.
            match flags {
                0b10_0000 => body.extend_from_slice(&[1; 20]),
                0b100_0000 => body.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]),
                0b1000_0000 => body.extend_from_slice(&[0, 0]),
                0b1_0000_0000 => body.extend_from_slice(&[1; 16]),
                _ => {}
            }
            body.extend_from_slice(key);
            let status = status_of(Request::decode(verb, &body, &CONTEXT).map(drop));
            let known = allowed & flags != 0;
            assert_eq!(status == Status::OK, known, "verb {verb} bit {bit}: {status}");
            assert_eq!(status == Status::UNSUPPORTED, !known, "verb {verb} bit {bit}: {status}");
        }
    }
}

#[test]
fn contradictions_are_refused() {
    let sloppy_and_strict = OperationFlags::SLOPPY.with(OperationFlags::STRICT);
    assert_eq!(status_of(through(get_of(b"k", sloppy_and_strict))), Status::BAD_REQUEST);
    let request = Outgoing::Operation(get_of(b"k", OperationFlags::default()));
    let mut body = encoded(&request);
    // Another verb than the opcode.
    assert!(Request::decode(Opcode::Put.request(), &body, &CONTEXT).is_err());
    // A durable level.
    body[6] = 1;
    assert!(decode(&request, &body).is_err());
    let mut delete = encoded(&Outgoing::Operation(Operation::Delete(Delete {
        token: Token::MIN,
        namespace: NamespaceId(1),
        key: b"k",
        options: WriteOptions::default(),
    })));
    delete[12] = 1;
    assert!(Request::decode(Opcode::Delete.request(), &delete, &CONTEXT).is_err());
}

#[test]
fn a_scan_backwards_is_refused() {
    let range = TokenRange { first: Token(2), last: Token(1) };
    let scan =
        Scan { namespace: NamespaceId(1), count_max: 0, bytes_max: 0, flags: 0, range, after: b"" };
    let request = Outgoing::Scan(scan);
    assert!(decode(&request, &encoded(&request)).is_err());
    let flags = Scan { flags: 4, range: TokenRange::FULL, ..scan };
    let request = Outgoing::Scan(flags);
    assert_eq!(status_of(decode(&request, &encoded(&request)).map(drop)), Status::UNSUPPORTED);
}

#[test]
fn a_page_keeps_its_bounds_and_leaves_values_out_when_told() {
    let record = RecordRef {
        token: Token(1),
        namespace: NamespaceId(1),
        incarnation: 0,
        kind: Kind::Put,
        dot: Dot::default(),
        timestamp: Timestamp(0),
        expiry_ms: 0,
        key: b"k",
        value: (&[0; 1000]).into(),
    };
    let all = Scan {
        namespace: NamespaceId(1),
        count_max: 3,
        bytes_max: 0,
        flags: scan::KEYS_ONLY,
        range: TokenRange::FULL,
        after: b"",
    };
    let mut page = Page::new(&all, 100, 10_000);
    while !page.is_full() {
        page.push(&record);
    }
    assert_eq!(page.count(), 3);
    let body = page.into_body(Some((Token(1), b"k")));
    assert!(PageRef::decode(&body, NamespaceId(1)).unwrap().records[0].value.is_empty());

    let small = Scan { count_max: 0, bytes_max: 1500, flags: 0, ..all };
    let mut page = Page::new(&small, 100, 10_000);
    while !page.is_full() {
        page.push(&record);
    }
    assert_eq!(page.count(), 2);
}

#[test]
fn admin_commands_are_plain_words() {
    let status = |command: &str, json: &str| {
        let request = Outgoing::Admin(Admin { command, json });
        status_of(decode(&request, &encoded(&request)).map(drop))
    };
    assert_eq!(status("ns.create", r#"{"name":"é"}"#), Status::OK);
    assert_eq!(status(&"a".repeat(64), ""), Status::OK);
    for bad in ["", "Ns", "a b", "a\n", "é", &"a".repeat(65)] {
        assert_eq!(status(bad, "{}"), Status::BAD_REQUEST, "{bad:?}");
    }
    let body = [&[1, 0, b'a'][..], &[0xff]].concat();
    assert!(Request::decode(Opcode::Admin.request(), &body, &CONTEXT).is_err());
}

#[test]
fn batch_results_read_back_in_any_order() {
    let mut results = BatchResults::new(3);
    let failure = Failure::new(Status::BUSY, "later");
    results.failure(2, Opcode::Delete, &failure);
    let value = ValueRef { version: Version::default(), expiry_ms: 0, value: b"v".into() };
    results.read(0, &ReadFacts::default(), &[value]);
    assert!(!results.is_complete());
    results.write(1, Opcode::Put, Status::CONDITION_FALSE, &WriteFacts::default());
    assert!(results.is_complete());
    let body = results.into_body();
    let mut found = Vec::new();
    decode_batch(&body, &mut |result| {
        found.push((result.index, result.verb, result.status));
        Ok(())
    })
    .unwrap();
    assert_eq!(found, [(2, 5, Status::BUSY), (0, 3, Status::OK), (1, 4, Status::CONDITION_FALSE)]);
    for cut in 0..body.len() {
        assert!(decode_batch(&body[..cut], &mut |_| Ok(())).is_err());
    }
}

#[test]
fn hellos_of_something_else_are_refused() {
    let body = encoded(&Outgoing::Hello(Hello::default()));
    for (at, byte) in [(0, b'B'), (7, 1), (8, 9), (44, 1), (46, 1), (45, 2), (47, 5)] {
        let mut broken = body.clone();
        broken[at] = byte;
        assert!(Hello::decode(&broken).is_err(), "byte {at}");
    }
    assert!(Hello::decode(&[&body[..], &[0]].concat()).is_err());
}

#[test]
fn neighbours_in_the_same_place_are_one_run() {
    let at = |shard| vec![Replica { node: OriginId(1), shard }];
    let runs = hello::runs_of([at(0), at(0), at(1), at(0)]);
    assert_eq!(runs.iter().map(|run| run.length).collect::<Vec<_>>(), [2, 1, 1]);
}
