//! The one merge of records: in the memtable, between tables, and of a peer's record with ours.
//!
//! Invariant: merging is commutative, associative and idempotent, so that the order in which
//! compaction, recovery and peers happen to merge does not matter. Records of an earlier
//! incarnation of the partition give way whole. Two plain records: the last write wins. Where one
//! is a [`KeyState`] both are merged as key states, and nothing unseen is lost.

use super::siblings::KeyState;
use super::{Kind, Record, RecordRef};

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
