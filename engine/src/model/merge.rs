//! The two ways in which records of one key meet: of one shard, and of two replicas.
//!
//! Within a shard, in memory and between tables, [`supersedes`] chooses: the later record wins unless
//! its version is less. A `Siblings` record was made by reading what was there before it, so it
//! already holds the merge, and its vector may be stripped, so it must not be merged again.
//!
//! Between replicas [`merge_records`] merges. //! Invariant: that is commutative, associative and
//! idempotent, so that the order in which peers happen to merge does not matter. Records of an
//! earlier incarnation of the partition give way whole. Two plain records: the last write wins.
//! Where one is a [`KeyState`] both are merged as key states, and nothing unseen is lost.

use super::siblings::KeyState;
use super::{Kind, Record, RecordRef};

/// Whether `later` stands for both: two records of one key that this shard logged in this order.
#[inline]
#[must_use]
pub fn supersedes(later: &RecordRef<'_>, earlier: &RecordRef<'_>) -> bool {
    (later.incarnation, later.version()) >= (earlier.incarnation, earlier.version())
}

/// Which record stands for both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The first, as it is.
    First,
    /// The second, as it is.
    Second,
    /// Neither: both have something that the other lacks.
    New(Record),
}

/// Merges two records of the same key. Where both are the same it is the first.
///
/// States must not be stripped, or have been filled again (`siblings.rs`). A key state that cannot
/// be read gives way to one that can; files are checked before they come here, so that is a bug
/// elsewhere, which must not stop the shard.
#[must_use]
pub fn merge_records(first: &RecordRef<'_>, second: &RecordRef<'_>) -> Merged {
    debug_assert!(first.cmp_by_key(second).is_eq(), "only records of one key are merged");
    if first.incarnation != second.incarnation {
        return greater(first.incarnation > second.incarnation);
    }
    if first.kind != Kind::Siblings && second.kind != Kind::Siblings {
        return greater(rank(first) >= rank(second));
    }
    match (KeyState::of_record(first), KeyState::of_record(second)) {
        (Ok(one), Ok(other)) => {
            let merged = one.merge(&other);
            if merged == one && first.kind == Kind::Siblings {
                Merged::First
            } else if merged == other && second.kind == Kind::Siblings {
                Merged::Second
            } else {
                Merged::New(merged.to_record(first))
            }
        }
        (Err(_), Err(_)) => greater(rank(first) >= rank(second)),
        (one, _) => greater(one.is_ok()),
    }
}

fn greater(is_first: bool) -> Merged {
    if is_first { Merged::First } else { Merged::Second }
}

/// The order of last-write-wins. One dot is one write, so what follows the version only makes the
/// order total for records that nobody should have made.
fn rank<'a>(record: &RecordRef<'a>) -> impl Ord + use<'a> {
    (record.version(), record.kind as u8, record.expiry_ms, record.value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::siblings::{Sibling, tests::states};
    use super::super::{Dot, NamespaceId, OriginId, Timestamp, Token};
    use super::*;

    fn record(kind: Kind, incarnation: u32, value: &[u8]) -> Record {
        Record {
            token: Token(7),
            namespace: NamespaceId(1),
            incarnation,
            kind,
            dot: Dot::default(),
            timestamp: Timestamp(0),
            expiry_ms: 0,
            key: b"key".to_vec(),
            value: value.to_vec(),
        }
    }

    fn merge(first: &Record, second: &Record) -> Record {
        match merge_records(&first.as_ref(), &second.as_ref()) {
            Merged::First => first.clone(),
            Merged::Second => second.clone(),
            Merged::New(merged) => merged,
        }
    }

    /// A plain record, as some write of `siblings::tests` made it.
    fn plain() -> impl Strategy<Value = Record> {
        states().prop_filter_map("a plain record", |state| {
            let sibling: Sibling<'_> = *state.siblings().iter().find(|s| s.is_blind)?;
            let kind = if sibling.is_delete { Kind::Delete } else { Kind::Put };
            let mut plain = record(kind, 0, &sibling.value.to_vec());
            (plain.dot, plain.timestamp) = (sibling.dot, sibling.timestamp);
            Some(plain)
        })
    }

    /// Plain records, key states, and bytes that are none.
    fn records() -> impl Strategy<Value = Record> {
        let state = states().prop_map(|s| s.to_record(&record(Kind::Put, 0, b"").as_ref()));
        let damaged = (0u64..3).prop_map(|sequence| {
            let dot = Dot { origin: OriginId(0), sequence };
            Record { dot, ..record(Kind::Siblings, 0, b"\x09") }
        });
        let any = prop_oneof![4 => plain(), 4 => state, 1 => damaged];
        (any, prop_oneof![4 => Just(1u32), 1 => 0u32..3])
            .prop_map(|(record, incarnation)| Record { incarnation, ..record })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn merge_is_commutative_associative_and_idempotent(a in records(), b in records(), c in records()) {
            prop_assert_eq!(merge(&a, &a), a.clone());
            prop_assert_eq!(merge(&a, &b), merge(&b, &a));
            prop_assert_eq!(merge(&merge(&a, &b), &c), merge(&a, &merge(&b, &c)));
        }

        #[test]
        fn the_last_write_wins_among_plain_records(a in plain(), b in plain()) {
            let winner = if a.as_ref().version() >= b.as_ref().version() { &a } else { &b };
            prop_assert_eq!(&merge(&a, &b), winner);
        }
    }

    #[test]
    fn a_dropped_incarnation_gives_way_whatever_its_stamp() {
        let old = Record { timestamp: Timestamp(99), ..record(Kind::Put, 1, b"old") };
        let new = Record { timestamp: Timestamp(1), ..record(Kind::Put, 2, b"new") };
        assert_eq!(merge(&old, &new), new);
    }

    #[test]
    fn a_namespace_that_changes_its_mode_loses_nothing_unseen() {
        let plain = |stamp: u64, value: &[u8]| Record {
            dot: Dot { origin: OriginId(1), sequence: stamp },
            timestamp: Timestamp(stamp),
            ..record(Kind::Put, 0, value)
        };
        let (first, second) = (plain(1, b"first"), plain(2, b"second"));
        let mut state = KeyState::of_record(&second.as_ref()).unwrap();
        let dot = Dot { origin: OriginId(1), sequence: 3 };
        let write = Sibling {
            dot,
            timestamp: Timestamp(3),
            is_delete: false,
            is_blind: false,
            expiry_ms: 0,
            value: b"third".into(),
        };
        let context = state.context();
        state.write(write, &Default::default()).unwrap();
        assert_eq!(state.siblings().len(), 2, "unseen, so kept");
        state.write(Sibling { dot: Dot { sequence: 4, ..dot }, ..write }, &context).unwrap();
        let with_context = state.to_record(&second.as_ref());
        let merged = merge(&merge(&first, &with_context), &second);
        let merged = KeyState::decode(&merged.value).unwrap();
        assert!(merged.siblings().iter().all(|sibling| sibling.value == b"third"));
    }
}
