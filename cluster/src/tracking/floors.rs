//! Up to which moment a replica has everything, and what all replicas have.
//!
//! Invariant: a bound that was true stays true, so bounds only rise. All writes stamped at or
//! below a partition's purge floor are on the disk of every holder; nothing older can come any
//! more, so a tombstone at or below it has nothing left to hide.

use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{Dot, PartitionId, Timestamp, VersionVector};

use super::{Local, Peer, Replica, Tracking, origin_of};
use crate::member::NodeId;

/// Floors that are computed between two polls.
const FLOORS_AT_ONCE: usize = 64;

/// What may be purged from a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Floor {
    /// Which partition.
    pub partition: PartitionId,
    /// Tombstones and expired values stamped at or below it may go. Enough for every kind of
    /// record, key states as well.
    pub purge: Timestamp,
    /// Every holder has seen all these writes. For a key state all of whose siblings are
    /// tombstones it suffices that it lies below this with all its dots and its *stripped* vector:
    /// what the stripping took out is in this replica's own base.
    pub stable: VersionVector,
}

impl Tracking {
    /// Up to which stamp all writes of an origin are in a replica that has `seen`.
    fn bound(
        &self,
        partition: PartitionId,
        seen: &SeenSet,
        node: NodeId,
        peer: &Peer,
    ) -> Timestamp {
        let origin = origin_of(node);
        let here = seen.of(origin);
        let lacked_after = peer.entries.get(&partition).and_then(|e| here.lacks(e.seen.of(origin)));
        // All that it announced is here, up to where something is lacked; and of what is stamped
        // up to the promise there is nothing that it did not announce.
        let promised = peer.promise.min(lacked_after.unwrap_or(Timestamp::MAX));
        promised.max(here.base_stamp())
    }

    /// Up to which stamp every write of every member is in a replica that has `seen`.
    pub(super) fn completeness(
        &self,
        partition: PartitionId,
        seen: &SeenSet,
        promise: Timestamp,
    ) -> Timestamp {
        let since = match self.local(partition) {
            Some(local) if local.holders.contains(&self.own) => local.held_since,
            _ => 0,
        };
        let bounds = self.others(partition).map(|(node, peer)| match peer.epoch < since {
            true => Timestamp::ZERO,
            false => self.bound(partition, seen, node, peer),
        });
        bounds.fold(promise, Timestamp::min).min(self.bound_of_removed(partition, seen))
    }

    /// Up to which stamp all writes of origins that are no members any more are in a replica that
    /// has `seen`. None comes from them since all members have confirmed that they are gone; what
    /// members have of theirs they have announced then.
    fn bound_of_removed(&self, partition: PartitionId, seen: &SeenSet) -> Timestamp {
        let removed_at = self.shared.moves.removed_at;
        if removed_at == 0 {
            return Timestamp::MAX;
        }
        let bound = |peer: &Peer| {
            if peer.epoch < removed_at {
                return Timestamp::ZERO;
            }
            let lacked = peer.entries.get(&partition).and_then(|entry| seen.lacks(&entry.seen));
            lacked.unwrap_or(Timestamp::MAX)
        };
        let bounds = self.others(partition).map(|(_, peer)| bound(peer));
        bounds.fold(Timestamp::MAX, Timestamp::min)
    }

    /// Every write that a holder coordinated and stamped at or below this is in the replica:
    /// every one acknowledged with PW >= 1. For the answer to a read.
    #[must_use]
    pub fn as_of(&self, partition: PartitionId, replica: &impl Replica) -> Timestamp {
        if self.shared.moves.have_changed() {
            // A holder of before may have acknowledged what the holders of now do not know of.
            return self.complete(partition, replica);
        }
        let Some(local) = self.local(partition) else { return Timestamp::ZERO };
        self.others_as_of(partition, local, replica)
            .min(self.own_promise(replica))
            .max(local.complete)
    }

    /// The same of the writes of other holders. A holder works it out once for all that it has
    /// heard, since what was true stays true; what a guest has seen may be dropped.
    fn others_as_of(
        &self,
        partition: PartitionId,
        local: &Local,
        replica: &impl Replica,
    ) -> Timestamp {
        let is_holder = local.holders.contains(&self.own);
        if is_holder && local.as_of.get().0 == self.heard {
            return local.as_of.get().1;
        }
        let seen = replica.seen(partition);
        let others = local.holders.iter().filter(|node| **node != self.own);
        let bounds = others.map(|node| match self.peer(*node, partition) {
            Some(peer) => self.bound(partition, &seen, *node, peer),
            None => Timestamp::ZERO,
        });
        let as_of = bounds.fold(Timestamp::MAX, Timestamp::min);
        local.as_of.set((self.heard, as_of));
        as_of
    }

    /// Every write of anybody, guests as well, stamped at or below this is in the replica. For the
    /// answer to a read where PW may be 0.
    #[must_use]
    pub fn complete(&self, partition: PartitionId, replica: &impl Replica) -> Timestamp {
        let Some(local) = self.local(partition) else { return Timestamp::ZERO };
        self.completeness(partition, &replica.seen(partition), self.own_promise(replica))
            .max(local.complete)
    }

    /// Up to which stamp every holder has said that it has everything. A guest purges nothing.
    #[must_use]
    pub fn purge_floor(&self, partition: PartitionId) -> Timestamp {
        if !self.is_holder(partition) {
            return Timestamp::ZERO;
        }
        self.announced(partition).map(|(_, complete, _)| complete).min().unwrap_or_default()
    }

    /// Which writes every holder has said that it has seen, without a gap.
    #[must_use]
    pub fn stable(&self, partition: PartitionId) -> VersionVector {
        if !self.is_holder(partition) {
            return VersionVector::new();
        }
        let sets: Vec<&SeenSet> = self.announced(partition).map(|(_, _, seen)| seen).collect();
        let Some((first, others)) = sets.split_first() else { return VersionVector::new() };
        let least = |dot: Dot| {
            let bases = others.iter().map(|seen| seen.of(dot.origin).base());
            Dot { sequence: bases.fold(dot.sequence, u64::min), ..dot }
        };
        first.base().iter().map(least).collect()
    }

    /// Floors of partitions where something happened since the last call; some of them, if there are
    /// many.
    pub fn take_floors(&mut self) -> Vec<Floor> {
        let count = self.moved.len().min(FLOORS_AT_ONCE);
        let moved: Vec<PartitionId> = (0..count).filter_map(|_| self.moved.pop_first()).collect();
        let floor = |partition| Floor {
            partition,
            purge: self.purge_floor(partition),
            stable: self.stable(partition),
        };
        moved.into_iter().map(floor).collect()
    }

    /// What each holder announced, this node among them; nothing of those not heard.
    pub(super) fn announced(
        &self,
        partition: PartitionId,
    ) -> impl Iterator<Item = (NodeId, Timestamp, &SeenSet)> {
        let holders = self.local(partition).map_or(&[][..], |local| &local.holders[..]);
        holders.iter().map(move |node| {
            if *node == self.own {
                let announced = &self.local(partition).expect("it has holders").announced;
                return (*node, announced.complete, &*announced.seen);
            }
            match self.entry(*node, partition) {
                Some(entry) => (*node, entry.complete, &*entry.seen),
                None => (*node, Timestamp::ZERO, &NOTHING),
            }
        })
    }
}

/// What a holder has seen that has said nothing.
static NOTHING: SeenSet = SeenSet::new();
