//! The real server over loopback: every operation, every limit, every refusal to start.
//!
//! Invariant: what the client driver promises of each answer is looked at, not only that one came.

#![expect(clippy::disallowed_methods, reason = "real processes are waited for in real time")]

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use annulus_engine::model::TokenRange;
use annulus_engine::model::limits::KEY_SIZE_MAX;
use annulus_net::client::{
    BatchAnswer, BatchOperation, Context, Error, ReadOptions, ScanOptions, WriteOptions,
};
use annulus_net::wire::hello::Hello;
use annulus_net::wire::{Condition, OperationFlags, Status, Ttl, Version, scan};
use annulus_tests::raw::{self, Raw};
use annulus_tests::server::{Setup, eventually, scratch};

fn two_shards(dir: &tempfile::TempDir) -> Setup {
    Setup::new(dir.path().join("data")).with("shards", "2")
}

fn with_condition(condition: Condition) -> WriteOptions {
    WriteOptions { condition, ..WriteOptions::default() }
}

/// Bytes that follow from a number.
fn value_of(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..size).map(|_| next()).collect()
}

#[test]
fn what_was_put_is_got_until_it_is_deleted() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    assert_eq!(server.shards, 2);
    let keys = server.namespace();
    assert_eq!(keys.get(b"k").unwrap(), None);
    let first = keys.put(b"k", b"one").unwrap();
    assert_eq!((first.acks, first.primary, first.durable, first.window_ms), (1, 1, 1, 0));
    assert_eq!(keys.get(b"k").unwrap().as_deref(), Some(&b"one"[..]));
    let second = keys.put(b"k", b"two").unwrap();
    assert!(second.version.timestamp > first.version.timestamp);
    let read = keys.read(b"k", &ReadOptions::default()).unwrap();
    assert_eq!(read.values[0].version, second.version);
    assert_eq!((read.values.len(), read.values[0].value.as_slice()), (1, &b"two"[..]));
    keys.delete(b"k").unwrap();
    assert_eq!(keys.get(b"k").unwrap(), None);
    // A delete of what is not there is done as well.
    keys.delete(b"never").unwrap();
}

#[test]
fn conditions_hold_or_nothing_is_written() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    let absent = with_condition(Condition::IfAbsent);
    let first = keys.put_with(b"c", b"1", &absent).unwrap();
    match keys.put_with(b"c", b"2", &absent) {
        Err(Error::ConditionFailed { current, .. }) => assert_eq!(current, first.version),
        other => panic!("{other:?}"),
    }
    let at_first = with_condition(Condition::IfVersion(first.version));
    let second = keys.put_with(b"c", b"2", &at_first).unwrap();
    assert!(matches!(
        keys.put_with(b"c", b"3", &at_first),
        Err(Error::ConditionFailed { current, .. }) if current == second.version
    ));
    assert!(matches!(
        keys.delete_with(b"c", &at_first),
        Err(Error::ConditionFailed { current, .. }) if current == second.version
    ));
    assert_eq!(keys.get(b"c").unwrap().as_deref(), Some(&b"2"[..]));
    keys.delete_with(b"c", &with_condition(Condition::IfVersion(second.version))).unwrap();
    match keys.put_with(b"c", b"4", &with_condition(Condition::IfVersion(second.version))) {
        Err(Error::ConditionFailed { current, .. }) => assert_eq!(current, Version::default()),
        other => panic!("{other:?}"),
    }
    keys.put_with(b"c", b"5", &absent).unwrap();
    // Of many who want to be first, one is.
    let winners: usize = thread::scope(|scope| {
        let racers: Vec<_> = (0..8u8)
            .map(|racer| {
                let (keys, absent) = (keys.clone(), absent.clone());
                scope.spawn(move || usize::from(keys.put_with(b"race", &[racer], &absent).is_ok()))
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    assert_eq!(winners, 1);
}

#[test]
fn an_expired_value_is_not_returned_and_one_that_is_not_is() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    let ttl = |ttl| WriteOptions { ttl, ..WriteOptions::default() };
    let begin = Instant::now();
    keys.put_with(b"short", b"v", &ttl(Ttl::Millis(600))).unwrap();
    keys.put_with(b"long", b"v", &ttl(Ttl::Millis(3_600_000))).unwrap();
    keys.put_with(b"ever", b"v", &ttl(Ttl::Never)).unwrap();
    let seen = keys.get(b"short").unwrap();
    assert!(seen.is_some() || begin.elapsed() > Duration::from_millis(500));
    assert_ne!(keys.read(b"long", &ReadOptions::default()).unwrap().values[0].expiry_ms, 0);
    assert_eq!(keys.read(b"ever", &ReadOptions::default()).unwrap().values[0].expiry_ms, 0);
    thread::sleep(Duration::from_millis(700).saturating_sub(begin.elapsed()));
    assert_eq!(keys.get(b"short").unwrap(), None);
    assert!(keys.get(b"long").unwrap().is_some() && keys.get(b"ever").unwrap().is_some());
    // What has expired is absent for conditions and scans too.
    keys.put_with(b"short", b"w", &with_condition(Condition::IfAbsent)).unwrap();
    keys.put_with(b"gone", b"v", &ttl(Ttl::Millis(1))).unwrap();
    thread::sleep(Duration::from_millis(5));
    let all: Vec<_> = keys.scan(ScanOptions::default()).map(|record| record.unwrap().key).collect();
    assert_eq!(all.len(), 3, "{all:?}");
    assert!(!all.contains(&b"gone".to_vec()));
}

#[test]
fn a_batch_answers_each_of_its_operations() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    keys.put(b"old", b"1").unwrap();
    let read = ReadOptions::default;
    let mut operations = vec![
        BatchOperation::Get { key: b"old".to_vec(), options: read() },
        BatchOperation::Get { key: b"absent".to_vec(), options: read() },
        BatchOperation::Put {
            key: b"old".to_vec(),
            value: b"2".to_vec(),
            options: with_condition(Condition::IfAbsent),
        },
        BatchOperation::Delete { key: b"old".to_vec(), options: WriteOptions::default() },
    ];
    for number in 0..200u64 {
        operations.push(BatchOperation::Put {
            key: format!("many-{number}").into_bytes(),
            value: value_of(number, 100),
            options: WriteOptions::default(),
        });
    }
    let answers = keys.batch(&operations, None);
    assert_eq!(answers.len(), operations.len());
    assert!(matches!(&answers[0], Ok(BatchAnswer::Read(read)) if read.values.len() <= 1));
    assert!(matches!(&answers[1], Ok(BatchAnswer::Read(read)) if read.values.is_empty()));
    assert!(answers[3..].iter().all(|answer| matches!(answer, Ok(BatchAnswer::Written(_)))));
    for number in 0..200u64 {
        let key = format!("many-{number}");
        assert_eq!(keys.get(key.as_bytes()).unwrap(), Some(value_of(number, 100)));
    }
}

#[test]
fn a_scan_gives_each_key_once_in_token_order_over_both_shards() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let client = server.client();
    let keys = client.namespace("default").unwrap();
    let mut expected = BTreeMap::new();
    let mut pipeline = keys.pipeline(128);
    for number in 0..3_000u64 {
        let key = format!("scan-{number}").into_bytes();
        let value = value_of(number, 300);
        expected.insert(key.clone(), value.clone());
        if let Some((_, written)) = pipeline.put((), key, value, WriteOptions::default()) {
            written.unwrap();
        }
    }
    while let Some((_, written)) = pipeline.finish_one() {
        written.unwrap();
    }
    for options in [
        ScanOptions::default(),
        ScanOptions { count_max: 7, ..ScanOptions::default() },
        ScanOptions { count_max: 1, range: TokenRange::FULL, ..ScanOptions::default() },
    ] {
        let records: Vec<_> = keys.scan(options).map(|record| record.unwrap()).collect();
        let order: Vec<_> = records.iter().map(|record| (record.token, &record.key)).collect();
        assert!(order.windows(2).all(|pair| pair[0] < pair[1]));
        let found: BTreeMap<_, _> =
            records.iter().map(|record| (record.key.clone(), record.value.clone())).collect();
        assert_eq!(found.len(), records.len());
        assert!(found == expected, "{} of {} records", found.len(), expected.len());
    }
    let options = ScanOptions { flags: scan::KEYS_ONLY, ..ScanOptions::default() };
    assert!(keys.scan(options).all(|record| record.unwrap().value.is_empty()));
    // The two halves of the ring are the two shards, and make the whole.
    let half = |range| keys.scan(ScanOptions { range, ..ScanOptions::default() }).count();
    let middle = annulus_engine::model::Token(1 << 63);
    let low = half(TokenRange {
        first: TokenRange::FULL.first,
        last: annulus_engine::model::Token(middle.0 - 1),
    });
    let high = half(TokenRange { first: middle, last: TokenRange::FULL.last });
    assert_eq!(low + high, expected.len());
    assert!(low > 1_000 && high > 1_000);
}

#[test]
fn concurrent_writes_of_a_siblings_namespace_are_all_returned_until_reconciled() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let made = server.cli(&["ns", "create", "carts", "--n", "1", "--mode", "siblings"]);
    let _ = made.expect_code(0);
    let carts = server.client().namespace("carts").unwrap();
    carts.put(b"cart", b"milk").unwrap();
    carts.put(b"cart", b"bread").unwrap();
    let read = carts.read(b"cart", &ReadOptions::default()).unwrap();
    let mut values: Vec<_> = read.values.iter().map(|sibling| sibling.value.clone()).collect();
    values.sort();
    assert_eq!(values, [b"bread".to_vec(), b"milk".to_vec()]);
    assert!(matches!(carts.get(b"cart"), Err(Error::Siblings { count: 2 })));
    let seen = WriteOptions { context: read.context.clone(), ..WriteOptions::default() };
    carts.put_with(b"cart", b"bread, milk", &seen).unwrap();
    assert_eq!(carts.get(b"cart").unwrap().as_deref(), Some(&b"bread, milk"[..]));
    // Another who had read the same is concurrent with that.
    carts.put_with(b"cart", b"eggs", &seen).unwrap();
    assert!(matches!(carts.get(b"cart"), Err(Error::Siblings { count: 2 })));
    let resolving = carts.clone().with_resolver(|siblings| {
        let mut all: Vec<_> = siblings.iter().map(|sibling| sibling.value.clone()).collect();
        all.sort();
        all.join(&b", "[..])
    });
    assert_eq!(resolving.get(b"cart").unwrap().as_deref(), Some(&b"bread, milk, eggs"[..]));
    eventually("the resolved value is written back", Duration::from_secs(5), || {
        carts.get(b"cart").is_ok()
    });
    // A context is of its key, and of nobody's making.
    let refused = |key: &[u8], context: Context| {
        let options = WriteOptions { context: Some(context), ..WriteOptions::default() };
        match carts.put_with(key, b"x", &options) {
            Err(Error::Refused { status, .. }) => assert_eq!(status, Status::BAD_CONTEXT),
            other => panic!("{other:?}"),
        }
    };
    let context = read.context.unwrap();
    refused(b"another", context.clone());
    for byte in 0..context.0.len() {
        let mut forged = context.clone();
        forged.0[byte] ^= 1;
        refused(b"cart", forged);
    }
    refused(b"cart", Context(vec![7; 40]));
}

#[test]
fn values_from_nothing_to_a_mebibyte_come_back_and_larger_ones_are_refused() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    let sizes =
        [0, 1, 511, 4096, 32_700, 32_767, 32_768, 32_769, 65_536, 500_000, (1 << 20) - 1, 1 << 20];
    for round in 0..2u64 {
        for size in sizes {
            let key = format!("size-{size}");
            keys.put(key.as_bytes(), &value_of(size as u64 + round, size)).unwrap();
        }
    }
    let check = |keys: &annulus_net::client::BlockingNamespace| {
        for size in sizes {
            let key = format!("size-{size}");
            let value = keys.get(key.as_bytes()).unwrap();
            assert!(value == Some(value_of(size as u64 + 1, size)), "{size}");
        }
    };
    check(&keys);
    match keys.put(b"size-1048576", &vec![0; (1 << 20) + 1]) {
        Err(Error::Refused { status, detail, .. }) => {
            assert_eq!((status, detail), (Status::TOO_BIG, 1 << 20));
        }
        other => panic!("{other:?}"),
    }
    check(&keys);
    let setup = server.kill_nine();
    let server = setup.start();
    check(&server.namespace());
}

/// Sixteen times the default, and after a restart that leaves nothing in memory: long values are
/// whole in log, memtable and tables, and whichever shard is asked.
#[test]
fn values_of_the_highest_limit_come_back_from_memory_and_from_disk() {
    let dir = scratch();
    let limit = 16 << 20;
    let setup = two_shards(&dir)
        .with("value-size-max", "16MiB")
        .with("memtable-size", "16MiB")
        .with("cache-size", "1MiB");
    let mut server = setup.start();
    let sizes = [65_536, 65_537, 131_072, 300_000, 1 << 20, limit - 1, limit];
    // One value packs well, the next does not.
    let value = |index: usize, size: usize| match index % 2 {
        0 => value_of(size as u64, size),
        _ => value_of(size as u64, 1000).into_iter().cycle().take(size).collect(),
    };
    for restarts in 0..2 {
        let keys = server.namespace();
        for (index, &size) in sizes.iter().enumerate() {
            let key = format!("long-{size}");
            if restarts == 0 {
                keys.put(key.as_bytes(), &value(index, size)).unwrap();
            }
            let found = keys.get(key.as_bytes()).unwrap();
            assert!(found == Some(value(index, size)), "{size} bytes after {restarts} restarts");
        }
        match keys.put(b"too-long", &vec![0; limit + 1]) {
            Err(Error::Refused { status, detail, .. }) => {
                assert_eq!((status, detail), (Status::TOO_BIG, 16 << 20));
            }
            other => panic!("{other:?}"),
        }
        server = server.terminate().0.start();
    }
}

#[test]
fn keys_of_any_bytes_from_1_to_4096_of_them_are_kept_apart() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    let mut all: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    all.extend([vec![0, 0], b"\r\n".to_vec(), b"\0a".to_vec(), "\u{1f600}".into()]);
    all.extend([2, 16, 255, 256, 4095, KEY_SIZE_MAX].map(|size| value_of(9, size)));
    all.push(vec![0; KEY_SIZE_MAX]);
    all.push(vec![0xff; KEY_SIZE_MAX]);
    for key in &all {
        keys.put(key, &[b"of ", key.as_slice()].concat()).unwrap();
    }
    for key in &all {
        assert_eq!(keys.get(key).unwrap(), Some([b"of ", key.as_slice()].concat()));
    }
    assert_eq!(keys.scan(ScanOptions::default()).count(), all.len());
    assert!(matches!(keys.put(b"", b"v"), Err(Error::Refused { .. })));
    match keys.get(&vec![1; KEY_SIZE_MAX + 1]) {
        Err(Error::Refused { status, .. }) => assert_eq!(status, Status::TOO_BIG),
        other => panic!("{other:?}"),
    }
}

#[test]
fn any_shard_answers_for_any_key_and_a_connection_gets_the_shard_it_asks_for() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys: Vec<Vec<u8>> = (0..64u32).map(|n| format!("hop-{n}").into_bytes()).collect();
    let mut connections: Vec<Raw> = (0..2)
        .map(|shard| {
            let hello = Hello { shard, ..Hello::default() };
            let (raw, welcome) = Raw::greeted(server.client, &hello).unwrap();
            assert_eq!((welcome.shard, welcome.shard_count), (shard, 2));
            raw
        })
        .collect();
    for (number, key) in keys.iter().enumerate() {
        let id = u32::try_from(number).unwrap();
        let writer = &mut connections[number % 2];
        writer.send(id, &raw::put(key, key)).unwrap();
        assert_eq!(writer.frame().unwrap().unwrap().status(), Status::OK);
        for reader in &mut connections {
            reader.send(id, &raw::get(key)).unwrap();
            let got = reader.frame().unwrap().unwrap();
            assert_eq!((got.header.request_id, got.status()), (id, Status::OK));
            assert!(got.body.windows(key.len()).any(|part| part == key.as_slice()));
        }
    }
    let stats = server.stats();
    let sum = |name: &str| -> u64 {
        let shards = stats["shards"].as_array().unwrap();
        shards.iter().map(|shard| shard["counters"][name].as_u64().unwrap()).sum()
    };
    assert_eq!(sum("gets"), 128);
    assert_eq!(sum("puts"), 64);
    let hello = Hello { shard: 2, ..Hello::default() };
    let mut raw = Raw::connect(server.client).unwrap();
    raw.send(0, &annulus_net::wire::request::Outgoing::Hello(hello)).unwrap();
    let farewell = raw.farewell().unwrap().expect("a reason");
    assert!(farewell.message().contains("no such shard"), "{}", farewell.message());
}

#[test]
fn periodic_durability_is_named_in_the_answer_and_a_stop_loses_nothing() {
    let dir = scratch();
    let setup = two_shards(&dir).with("durability", "periodic").with("periodic-window", "500ms");
    let server = setup.start();
    let keys = server.namespace();
    for number in 0..500u64 {
        let written = keys.put(&number.to_le_bytes(), b"v").unwrap();
        assert_eq!((written.acks, written.durable, written.window_ms), (1, 0, 500));
    }
    let (setup, _) = server.terminate();
    let server = setup.start();
    let keys = server.namespace();
    for number in 0..500u64 {
        assert!(keys.get(&number.to_le_bytes()).unwrap().is_some(), "{number}");
    }
    // Killed after the window and a little, it loses nothing either.
    keys.put(b"late", b"v").unwrap();
    thread::sleep(Duration::from_millis(1_500));
    let server = server.kill_nine().start();
    assert!(server.namespace().get(b"late").unwrap().is_some());
}

#[test]
fn a_stop_under_load_drains_and_keeps_what_it_acknowledged() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    let idle = Raw::greeted(server.client, &Hello::default()).unwrap();
    let mute = Raw::connect(server.client).unwrap();
    let writer = thread::spawn(move || {
        let mut acknowledged = Vec::new();
        for number in 0u64.. {
            match keys.put(&number.to_le_bytes(), &value_of(number, 50)) {
                Ok(_) => acknowledged.push(number),
                Err(_) => break,
            }
        }
        acknowledged
    });
    thread::sleep(Duration::from_millis(500));
    let (setup, took) = server.terminate();
    drop((idle, mute));
    let acknowledged = writer.join().unwrap();
    assert!(!acknowledged.is_empty());
    assert!(took < Duration::from_secs(8), "{took:?}");
    let server = setup.start();
    let keys = server.namespace();
    for number in acknowledged {
        assert_eq!(keys.get(&number.to_le_bytes()).unwrap(), Some(value_of(number, 50)));
    }
}

#[test]
fn a_stop_waits_for_no_answer_of_a_shard_that_has_gone() {
    let dir = scratch();
    // On one core, so that one shard may end while the other has not seen the order.
    let mut setup = two_shards(&dir).with("cores", "0");
    for _ in 0..6 {
        let server = setup.start();
        let (mut raw, _) = Raw::greeted(server.client, &Hello::default()).unwrap();
        // One connection asks its shard for keys of both, all the time; the other shard has
        // nothing of its own to do.
        let asker = thread::spawn(move || {
            let mut asked = 0u32;
            loop {
                for number in 0..512u64 {
                    asked += 1;
                    let key = number.to_le_bytes();
                    if raw.send(asked, &raw::get(&key)).is_err() {
                        return asked;
                    }
                }
                for _ in 0..512 {
                    if !matches!(raw.frame(), Ok(Some(_))) {
                        return asked;
                    }
                }
            }
        });
        thread::sleep(Duration::from_millis(300));
        let took;
        (setup, took) = server.terminate();
        assert!(asker.join().unwrap() > 64);
        assert!(took < Duration::from_secs(4), "{took:?}");
    }
}

#[test]
fn dropped_namespaces_are_gone_and_new_ones_of_the_name_are_empty() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let _ = server.cli(&["ns", "create", "users", "--n", "1"]).expect_code(0);
    let users = server.client().namespace("users").unwrap();
    users.put(b"k", b"old").unwrap();
    let _ = server.cli(&["ns", "drop", "users"]).expect_code(0);
    match users.get(b"k") {
        Err(Error::Refused { status, .. }) => assert_eq!(status, Status::NO_NAMESPACE),
        other => panic!("{other:?}"),
    }
    let _ = server.cli(&["ns", "create", "users", "--n", "1"]).expect_code(0);
    let server = server.kill_nine().start();
    let users = server.client().namespace("users").unwrap();
    assert_eq!(users.get(b"k").unwrap(), None);
    assert!(matches!(server.client().namespace("nobody"), Err(Error::NoNamespace { .. })));
}

#[test]
fn a_trace_names_the_steps_of_both_paths() {
    let dir = scratch();
    let server = two_shards(&dir).start();
    let keys = server.namespace();
    let write = WriteOptions { flags: OperationFlags::TRACE, ..WriteOptions::default() };
    let written = keys.put_with(b"t", b"v", &write).unwrap();
    assert!(written.trace.is_some_and(|trace| trace.contains("log")));
    let read = ReadOptions { flags: OperationFlags::TRACE, ..ReadOptions::default() };
    let read = keys.read(b"t", &read).unwrap();
    assert!(read.trace.is_some_and(|trace| trace.contains("memtable")));
}
