//! What a shard holds of each partition beside the records: its incarnation and its `seen`.
//!
//! Invariant: all of it is as of the last record that the log has shown. `seen` holds exactly the
//! dots of the records shown, and what control records added; so after a crash it is exact again,
//! by replay on top of what the manifest says of the last flush. An incarnation counts up when the
//! partition is dropped, and takes an empty `seen` with it.
//!
//! On the write path, at the log's sink: a mark in order allocates nothing. The copy that a sealed
//! memtable keeps shares every set until the next mark of it.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::log::{Control, ReplayItem};
use crate::model::causality::KeyState;
use crate::model::seen::SeenSet;
use crate::model::{Dot, Kind, OriginId, PartitionId, RecordRef, Timestamp, Token};
use crate::tables::Replica;

/// The incarnation of a partition that was never dropped.
pub(crate) const FIRST_INCARNATION: u32 = 1;

/// See the module. Clones are cheap: they share the sets.
#[derive(Clone, Debug)]
pub(crate) struct Replicas {
    bits: u32,
    /// By partition.
    entries: Vec<Replica>,
}

impl Replicas {
    /// What the manifest says, for a ring of `2^bits`. Partitions that the ring does not have are
    /// passed over.
    pub(crate) fn new(bits: u32, known: &BTreeMap<PartitionId, Replica>) -> Replicas {
        let mut entries = vec![Replica::default(); 1 << bits];
        for (partition, replica) in known {
            if let Some(entry) = entries.get_mut(partition.0 as usize) {
                *entry = replica.clone();
            }
        }
        Replicas { bits, entries }
    }

    /// The partition of a token.
    #[inline]
    pub(crate) fn partition(&self, token: Token) -> PartitionId {
        token.partition(self.bits)
    }

    /// The bits of the ring.
    pub(crate) fn bits(&self) -> u32 {
        self.bits
    }

    /// Every partition of the ring.
    pub(crate) fn partitions(&self) -> impl Iterator<Item = PartitionId> + use<> {
        (0..1 << self.bits).map(PartitionId)
    }

    /// The state of a partition of the ring.
    #[inline]
    pub(crate) fn of(&self, partition: PartitionId) -> &Replica {
        &self.entries[partition.0 as usize]
    }

    /// The incarnation of the token's partition.
    #[inline]
    pub(crate) fn incarnation(&self, token: Token) -> u32 {
        self.of(self.partition(token)).incarnation
    }

    /// Whether the record is of the present incarnation of its partition.
    #[inline]
    pub(crate) fn is_current(&self, record: &RecordRef<'_>) -> bool {
        record.incarnation >= self.incarnation(record.token)
    }

    /// Marks the write or writes that a record carries.
    #[inline]
    pub(crate) fn mark(&mut self, record: &RecordRef<'_>) {
        let partition = self.partition(record.token);
        let seen = Rc::make_mut(&mut self.entries[partition.0 as usize].seen);
        seen.see(record.dot, record.timestamp);
        if record.kind == Kind::Siblings {
            // Each dot is of one key, so what its state holds has been merged.
            if let Ok(state) = KeyState::of_record(record) {
                for sibling in state.siblings() {
                    seen.see(sibling.dot, sibling.timestamp);
                }
            }
        }
    }

    /// Takes in what a control record says. Gives the partition that it dropped, if it did, and
    /// up to which incarnation.
    pub(crate) fn control(&mut self, control: &Control<'_>) -> Option<(PartitionId, u32)> {
        match *control {
            Control::Seen { partition, incarnation, seen } => {
                let entry = self.entries.get_mut(partition.0 as usize)?;
                match SeenSet::decode(seen) {
                    Ok(seen) if entry.incarnation == incarnation => {
                        Rc::make_mut(&mut entry.seen).union(&seen);
                    }
                    Ok(_) => {}
                    // It has its checksum, so this is a bug elsewhere; to lack dots is safe.
                    Err(error) => tracing::error!(%error, ?partition, "a seen-set in the log"),
                }
                None
            }
            Control::DropPartition { partition, incarnation } => {
                let entry = self.entries.get_mut(partition.0 as usize)?;
                if entry.incarnation > incarnation {
                    return None;
                }
                *entry = Replica { incarnation: incarnation.checked_add(1)?, ..Replica::default() };
                Some((partition, incarnation))
            }
            Control::Ceiling { .. } | Control::Close => None,
        }
    }

    /// Declares all dots of an origin up to `sequence` void or lost, in every partition.
    pub(crate) fn void(&mut self, origin: OriginId, sequence: u64, stamp: Timestamp) {
        for entry in &mut self.entries {
            if entry.seen.of(origin).base() < sequence {
                Rc::make_mut(&mut entry.seen).void_up_to(origin, sequence, stamp);
            }
        }
    }

    /// What an edit must say so that the manifest's `known` becomes this.
    pub(crate) fn changes(
        &self,
        known: &BTreeMap<PartitionId, Replica>,
    ) -> Vec<(PartitionId, Replica)> {
        let nothing = Replica::default();
        let is_changed = |(partition, entry): &(PartitionId, &Replica)| {
            let before = known.get(partition).unwrap_or(&nothing);
            entry.incarnation != before.incarnation
                || !(Rc::ptr_eq(&entry.seen, &before.seen) || entry.seen == before.seen)
        };
        let entries = self.partitions().zip(&self.entries).filter(is_changed);
        entries.map(|(partition, entry)| (partition, entry.clone())).collect()
    }
}

/// Whether an item changes what a shard shows; a ceiling or a close does not.
pub(crate) fn is_shown(item: &ReplayItem<'_>) -> bool {
    !matches!(item, ReplayItem::Control(Control::Ceiling { .. } | Control::Close))
}

/// The set that holds these writes and no others.
pub(crate) fn set_of(dots: impl IntoIterator<Item = (Dot, Timestamp)>) -> SeenSet {
    let mut set = SeenSet::new();
    for (dot, stamp) in dots {
        set.see(dot, stamp);
    }
    set
}
