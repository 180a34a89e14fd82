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
    match merge_records(&old.as_ref(), &record.as_ref()) {
        Merged::First => return Inserted::Kept,
        Merged::Second => *old = record.clone(),
        Merged::New(merged) => *old = merged,
    }
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
