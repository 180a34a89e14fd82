//! Convergence (P8): when faults have stopped, all replicas of a partition hold the same.
//!
//! Invariant checked: of each key the replicas hold the same in the namespace's own sense: the
//! same winner, or the same set of siblings, to the byte. Tombstones and values whose time is
//! over count as nothing, because replicas may purge them at different times.

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::siblings::KeyState;
use annulus_engine::model::{Kind, NamespaceId, PartitionId, RecordRef, WallMicros};
use annulus_net::wire::fields::Version;

use super::Violation;

/// One live version of a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// Of which write.
    pub version: Version,
    /// From when it is gone, in milliseconds; 0 is never.
    pub expiry_ms: u64,
    /// The value.
    pub value: Vec<u8>,
}

/// What one replica of one partition holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    /// Live versions by namespace and key.
    pub keys: BTreeMap<(NamespaceId, Vec<u8>), BTreeSet<Held>>,
}

impl Dump {
    /// Takes a record of a scan, as a reader at `now` would see it.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn add(&mut self, record: &RecordRef<'_>, now: WallMicros) -> Result<(), String> {
        let mut live = BTreeSet::new();
        if record.kind == Kind::Siblings {
            let state = KeyState::of_record(record).map_err(|error| error.to_string())?;
            for sibling in state.live(now) {
                live.insert(Held {
                    version: (sibling.timestamp, sibling.dot).into(),
                    expiry_ms: sibling.expiry_ms,
                    value: sibling.value.to_vec(),
                });
            }
        } else if record.is_live(now) {
            live.insert(Held {
                version: record.version().into(),
                expiry_ms: record.expiry_ms,
                value: record.value.to_vec(),
            });
        }
        if !live.is_empty() {
            self.keys.insert((record.namespace, record.key.to_vec()), live);
        }
        Ok(())
    }
}

/// Everything in which the replicas of a partition differ. `key` of a violation is the partition.
#[must_use]
pub fn check(partition: PartitionId, replicas: &[(u32, Dump)]) -> Vec<Violation> {
    let mut found = Vec::new();
    let Some(((first, one), rest)) = replicas.split_first() else { return found };
    for (node, other) in rest {
        let keys: BTreeSet<_> = one.keys.keys().chain(other.keys.keys()).collect();
        for key in keys {
            let (here, there) = (one.keys.get(key), other.keys.get(key));
            if here != there {
                let versions = |held: Option<&BTreeSet<Held>>| -> Vec<String> {
                    held.into_iter().flatten().map(|held| held.version.to_string()).collect()
                };
                let what = format!(
                    "namespace {} key {:?}: node {first} has {:?}, node {node} has {:?}",
                    key.0.0,
                    String::from_utf8_lossy(&key.1),
                    versions(here),
                    versions(there)
                );
                found.push(Violation { checker: "converge", key: partition.0, event: None, what });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_engine::model::siblings::Sibling;
    use annulus_engine::model::{Context, Dot, OriginId, Timestamp, Token};

    fn record<'a>(kind: Kind, stamp: u64, expiry_ms: u64, value: &'a [u8]) -> RecordRef<'a> {
        RecordRef {
            token: Token(5),
            namespace: NamespaceId(1),
            incarnation: 1,
            kind,
            dot: Dot { origin: OriginId(1), sequence: stamp },
            timestamp: Timestamp(stamp),
            expiry_ms,
            key: b"key",
            value: value.into(),
        }
    }

    fn dump(record: &RecordRef<'_>) -> Dump {
        let mut dump = Dump::default();
        dump.add(record, WallMicros(10_000)).unwrap();
        dump
    }

    fn differ(one: &RecordRef<'_>, other: &RecordRef<'_>) -> bool {
        let replicas = [(0, dump(one)), (1, dump(one)), (2, dump(other))];
        !check(PartitionId(0), &replicas).is_empty()
    }

    #[test]
    fn the_same_records_are_equal_and_others_are_not() {
        let one = record(Kind::Put, 1, 0, b"value");
        assert!(!differ(&one, &one));
        assert!(differ(&one, &record(Kind::Put, 2, 0, b"value")));
        assert!(differ(&one, &record(Kind::Put, 1, 0, b"other")));
        assert!(differ(&one, &record(Kind::Put, 1, 99, b"value")));
        assert!(differ(&one, &record(Kind::Delete, 2, 0, b"")));
    }

    #[test]
    fn what_readers_do_not_get_makes_no_difference() {
        let tombstone = record(Kind::Delete, 1, 0, b"");
        assert!(!differ(&tombstone, &record(Kind::Delete, 2, 0, b"")));
        assert!(!differ(&tombstone, &record(Kind::Put, 2, 9, b"expired at 9 ms")));
        assert!(differ(&tombstone, &record(Kind::Put, 2, 11, b"lives until 11 ms")));
    }

    #[test]
    fn siblings_are_compared_as_a_set_without_their_vector() {
        let like = record(Kind::Siblings, 0, 0, b"");
        let state = |stamps: &[u64]| {
            let mut state = KeyState::new();
            for stamp in stamps {
                let sibling = Sibling {
                    dot: Dot { origin: OriginId(1), sequence: *stamp },
                    timestamp: Timestamp(*stamp),
                    is_delete: false,
                    is_blind: false,
                    expiry_ms: 0,
                    value: b"value".into(),
                };
                state.write(sibling, &Context::default()).unwrap();
            }
            state.to_record(&like)
        };
        let (two, three) = (state(&[1, 2]), state(&[1, 2, 3]));
        assert!(!differ(&two.as_ref(), &two.as_ref()));
        assert!(differ(&two.as_ref(), &three.as_ref()));
        let stripped = {
            let record = two.as_ref();
            let mut state = KeyState::of_record(&record).unwrap();
            let base = [Dot { origin: OriginId(1), sequence: 2 }].into_iter().collect();
            state.strip(&base);
            state.to_record(&record)
        };
        assert!(!differ(&two.as_ref(), &stripped.as_ref()));
    }
}
