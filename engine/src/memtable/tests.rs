//! The memtable against a `BTreeMap`, and the bounds it promises.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::model::{Dot, Kind, OriginId, Record};

type Model = BTreeMap<(Token, NamespaceId, Vec<u8>), Record>;

fn record(token: u64, namespace: u32, key: &[u8], stamp: u64, value: &[u8]) -> Record {
    Record {
        token: Token(token),
        namespace: NamespaceId(namespace),
        incarnation: 0,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(1), sequence: stamp },
        timestamp: Timestamp(stamp),
        expiry_ms: 0,
        key: key.to_vec(),
        value: value.to_vec(),
    }
}

fn insert_model(model: &mut Model, record: &Record) -> Inserted {
    let key = (record.token, record.namespace, record.key.clone());
    let Some(old) = model.get_mut(&key) else {
        model.insert(key, record.clone());
        return Inserted::New;
    };
    let rank = |record: &Record| (record.incarnation, record.timestamp, record.dot);
    if rank(record) < rank(old) {
        return Inserted::Kept;
    }
    *old = record.clone();
    Inserted::Replaced
}

fn check(memtable: &Memtable, model: &Model) {
    assert_eq!(memtable.len(), model.len());
    let walked: Vec<Record> = memtable.sorted().map(|record| record.to_owned()).collect();
    assert!(walked.iter().eq(model.values()), "the walk differs");
    for ((token, namespace, key), record) in model {
        assert_eq!(memtable.get(*token, *namespace, key), Some(record.as_ref()));
    }
}

/// Tokens spread, crowded, and equal; few keys, so that they meet.
fn records() -> impl Strategy<Value = Record> {
    let token = prop_oneof![
        2 => any::<u64>(),
        2 => 0u64..40,
        1 => Just(0),
        1 => Just(u64::MAX),
        2 => Just(0x8000_0000_0000_0000),
    ];
    let value = prop_oneof![
        9 => prop::collection::vec(any::<u8>(), 0..60),
        1 => prop::collection::vec(any::<u8>(), 2000..6000),
    ];
    (token, 0u32..2, prop::collection::vec(0u8..8, 1..4), 1u64..6, value, 0u32..2, 0u64..3)
        .prop_map(|(token, namespace, key, stamp, value, incarnation, expiry_ms)| Record {
            incarnation,
            expiry_ms,
            ..record(token, namespace, &key, stamp, &value)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn behaves_like_a_sorted_map(records in prop::collection::vec(records(), 0..1500), range: (u64, u64), cut in 0usize..1500) {
        let (mut memtable, mut model) = (Memtable::new(1 << 20), Model::new());
        for (i, record) in records.iter().enumerate() {
            prop_assert_eq!(memtable.insert(&record.as_ref()), insert_model(&mut model, record));
            if i == cut {
                let partition = record.token.partition(2);
                let gone = memtable.remove_partition(partition, 2, 0);
                let before = model.len();
                model.retain(|key, kept| key.0.partition(2) != partition || kept.incarnation > 0);
                prop_assert_eq!(gone, before - model.len());
                check(&memtable, &model);
            }
        }
        check(&memtable, &model);

        let range = TokenRange { first: Token(range.0.min(range.1)), last: Token(range.0.max(range.1)) };
        let wanted = model.values().filter(|record| range.contains(record.token));
        let walked: Vec<Record> = memtable.sorted_range(range).map(|record| record.to_owned()).collect();
        prop_assert!(walked.iter().eq(wanted));

        for record in records.iter().take(20) {
            let key = (record.token, record.namespace, record.key.clone());
            let wanted = model.range((std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded));
            let mut after = memtable.sorted_after(record.token, record.namespace, &record.key, Token::MAX);
            prop_assert_eq!(after.next(), wanted.map(|(_, record)| record.as_ref()).next());
        }
    }
}

/// The record of the `i`-th of many keys, as ordinary as they come.
fn ordinary(i: u64, key: &mut [u8; 16]) -> RecordRef<'_> {
    key[8..].copy_from_slice(&i.to_be_bytes());
    RecordRef {
        token: Token::of_key(key, 1),
        namespace: NamespaceId(1),
        incarnation: 1,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(1), sequence: i },
        timestamp: Timestamp((1 << 58) + (i << 12)),
        expiry_ms: 0,
        key,
        value: (&[7; 100]).into(),
    }
}

#[test]
fn a_million_small_records_cost_at_most_36_bytes_each_beyond_key_and_value() {
    let mut memtable = Memtable::new(1 << 30);
    let overhead = |memtable: &Memtable| memtable.bytes() / memtable.len() - 116;
    for i in 0..1_000_000 {
        memtable.insert(&ordinary(i, &mut [0; 16]));
        if i >= 100_000 && i % 10_000 == 0 {
            // At every fill, not only where the table happens to be dense.
            assert!(overhead(&memtable) <= 36, "{} at {i}", overhead(&memtable));
        }
    }
    assert_eq!(memtable.len(), 1_000_000);
}

#[test]
fn bytes_are_what_the_parts_have_allocated() {
    let mut memtable = Memtable::new(1 << 20);
    let mut state = 1u64;
    while !memtable.is_full() {
        state = Token(state + 1).remix();
        let value = vec![1; usize::try_from(state % 5000).unwrap()];
        memtable.insert(&record(state, 0, &(state % 500).to_le_bytes(), state, &value).as_ref());
    }
    let leaves = memtable.directory.leaves().iter().map(slots::Leaf::bytes).sum::<usize>();
    assert!(memtable.bytes() > (1 << 20) && memtable.bytes() < (1 << 20) + 30_000);
    assert!(memtable.directory.bytes() > leaves && memtable.directory.bytes() < leaves + 10_000);
}

#[test]
fn a_hundred_thousand_equal_tokens_are_found_in_a_few_comparisons() {
    // T41: keys made for one token. Comparisons are counted, because time says little in a test.
    let mut memtable = Memtable::new(1 << 30);
    let token = Token(0x7777);
    for i in 0u64..100_000 {
        let key = Token(i).remix().to_le_bytes();
        let record = record(token.0, 0, &key, i + 1, b"v");
        assert_eq!(memtable.insert(&record.as_ref()), Inserted::New);
    }
    for i in (0..100_000).step_by(97) {
        let key = Token(i).remix().to_le_bytes();
        let comparisons = std::cell::Cell::new(0);
        let found = memtable.directory.find(token, |place| {
            comparisons.set(comparisons.get() + 1);
            memtable.entry(token, place).key.cmp(&key)
        });
        assert!(found.is_ok() && comparisons.get() <= 20, "{}", comparisons.get());
    }
    assert!(memtable.sorted().map(|record| record.key).is_sorted());
    assert_eq!(memtable.sorted().count(), 100_000);
    // Neighbours of the token are not disturbed by it.
    memtable.insert(&record(token.0 - 1, 0, b"before", 1, b"v").as_ref());
    memtable.insert(&record(token.0 + 1, 0, b"after", 1, b"v").as_ref());
    assert_eq!(memtable.sorted().next().unwrap().key, b"before");
    assert_eq!(memtable.sorted().last().unwrap().key, b"after");
}

#[test]
fn tokens_in_rising_order_leave_full_leaves() {
    // A partition that is received in token order, not at random.
    let mut memtable = Memtable::new(1 << 30);
    for i in 0..50_000 {
        memtable.insert(&record(i << 30, 0, b"key", i + 1, b"v").as_ref());
    }
    assert!(memtable.sorted().map(|record| record.token.0).eq((0..50_000).map(|i| i << 30)));
    assert!(memtable.directory.bytes() / memtable.len() < 24);
}

#[test]
fn overwriting_takes_no_more_memory() {
    let mut memtable = Memtable::new(1 << 20);
    let small = record(1, 0, b"small", 1, &[1; 100]);
    let large = record(2, 0, b"large", 1, &[1; 100_000]);
    memtable.insert(&small.as_ref());
    memtable.insert(&large.as_ref());
    let before = memtable.bytes();
    for stamp in 2..1000 {
        let len = usize::try_from(stamp % 101).unwrap();
        let small = record(1, 0, b"small", stamp, &vec![2; len]);
        assert_eq!(memtable.insert(&small.as_ref()), Inserted::Replaced);
        // A large value that grows has its chunk replaced, not left behind.
        let large =
            record(2, 0, b"large", stamp, &vec![2; 100_000 + usize::try_from(stamp).unwrap()]);
        assert_eq!(memtable.insert(&large.as_ref()), Inserted::Replaced);
        assert_eq!(memtable.get(Token(1), NamespaceId(0), b"small"), Some(small.as_ref()));
    }
    assert!(memtable.bytes() < before + 5000, "{} {before}", memtable.bytes());
}

#[test]
fn an_older_record_changes_nothing() {
    let mut memtable = Memtable::new(1 << 20);
    let (old, new) = (record(1, 0, b"k", 1, b"old"), record(1, 0, b"k", 2, b"new"));
    assert_eq!(memtable.insert(&new.as_ref()), Inserted::New);
    assert_eq!(memtable.insert(&old.as_ref()), Inserted::Kept);
    assert_eq!(memtable.insert(&new.as_ref()), Inserted::Replaced);
    assert_eq!(memtable.get(Token(1), NamespaceId(0), b"k"), Some(new.as_ref()));
    assert_eq!(memtable.max_timestamp(), Timestamp(2));
}

#[test]
fn bounds_are_those_of_what_was_stored() {
    let mut memtable = Memtable::new(1 << 20);
    assert_eq!(memtable.expiry_bounds(), None);
    for (token, stamp, expiry_ms) in [(1, 5, 0), (2, 9, 70), (3, 7, 30)] {
        let record = Record { expiry_ms, ..record(token, 0, b"k", stamp, b"") };
        memtable.insert(&record.as_ref());
    }
    assert_eq!(memtable.max_timestamp(), Timestamp(9));
    assert_eq!(memtable.expiry_bounds(), Some((30, 70)));
}

#[test]
fn keys_of_one_token_and_namespaces_of_one_key_are_apart() {
    let mut memtable = Memtable::new(1 << 20);
    for (namespace, key) in [(0, &b"a"[..]), (0, b"b"), (1, b"a")] {
        memtable.insert(&record(5, namespace, key, 1, key).as_ref());
    }
    assert_eq!(memtable.len(), 3);
    assert_eq!(memtable.get(Token(5), NamespaceId(0), b"b").unwrap().value, b"b");
    assert_eq!(memtable.get(Token(5), NamespaceId(1), b"b"), None);
    assert_eq!(memtable.get(Token(6), NamespaceId(0), b"a"), None);
    memtable.prefetch(Token(5));
    memtable.prefetch_entry(Token(5));
}
