//! What this replica lacks and who helps; what it need not keep; what it has lost for good.
//!
//! A sync: the needy replica sends what it has seen; the helper streams every record that holds a
//! dot the needy has not seen, page by page, with what the helper had seen when the page began; the
//! needy merges the records and then adopts the set of the **first** page, provided that the set
//! of every later page covers it. `tracking/tests/model.rs` has the rule and its proof by search.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{Instant, PartitionId};

use super::{Peer, PeerShard, Replica, Shared, Tracking, origin_of};
use crate::member::NodeId;

/// Partitions that one search looks at: some 50 us, which a request may have to wait for.
const SEARCHED_AT_ONCE: usize = 256;

/// Peers have had these writes since then, and this replica lacked some of them.
pub(super) struct Behind {
    since: Instant,
    target: SeenSet,
}

/// Syncs under way, and helpers that failed.
#[derive(Default)]
pub(super) struct CatchUp {
    under_way: BTreeMap<PartitionId, NodeId>,
    failed: BTreeMap<(PartitionId, NodeId), Failed>,
    /// Partitions that are behind.
    waiting: BTreeSet<PartitionId>,
    searched_at: Option<Instant>,
    /// The partition that was looked at last, so that none is passed over for ever.
    last: PartitionId,
}

impl CatchUp {
    /// The next of those that are behind, in a circle.
    fn next_waiting(&self) -> Option<PartitionId> {
        let mut after = self.waiting.range((Bound::Excluded(self.last), Bound::Unbounded));
        after.next().or_else(|| self.waiting.first()).copied()
    }

    /// Holders have changed: who has become one may lack everything.
    pub(super) fn look_again(&mut self, shared: &Shared) {
        let new = shared.moves.here_from.keys().copied();
        self.waiting.extend(new);
        self.searched_at = None;
    }
}

struct Failed {
    times: u32,
    until: Instant,
}

/// A sync to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncWanted {
    /// Of which partition.
    pub partition: PartitionId,
    /// From whom.
    pub helper: PeerShard,
}

/// Nothing that this node wrote before a crash is missing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GapClosed {
    /// In which partition.
    pub partition: PartitionId,
    /// All that exists of it is here: the rest may be declared void. A guest may not do so, as it
    /// would say of writes that only the holders have that it has seen them replaced; with it the
    /// gap just ends to hold down the promise.
    pub is_void: bool,
}

impl Tracking {
    /// Notes that a peer has seen this, if it has more than this replica.
    pub(super) fn note_behind(
        &mut self,
        now: Instant,
        partition: PartitionId,
        seen: &SeenSet,
        replica: &impl Replica,
    ) {
        if !self.is_holder(partition) || self.catch_up.waiting.contains(&partition) {
            return;
        }
        if !replica.seen(partition).covers(seen) {
            self.catch_up.waiting.insert(partition);
            let target = seen.clone();
            if let Some(local) = self.local_mut(partition) {
                local.behind = Some(Behind { since: now, target });
            }
        }
    }

    /// Syncs to be started now. Each of them counts as under way until [`Tracking::sync_ended`].
    pub fn sync_wanted(
        &mut self,
        now: Instant,
        replica: &impl Replica,
        is_up: &impl Fn(NodeId) -> bool,
    ) -> Vec<SyncWanted> {
        let mut wanted = Vec::new();
        let searched_at = self.catch_up.searched_at;
        if searched_at.is_some_and(|at| now.nanos_since(at) < self.options.search_every) {
            return wanted;
        }
        self.catch_up.searched_at = Some(now);
        for _ in 0..SEARCHED_AT_ONCE.min(self.catch_up.waiting.len()) {
            if self.catch_up.under_way.len() >= self.options.syncs_max {
                break;
            }
            let Some(partition) = self.catch_up.next_waiting() else { break };
            self.catch_up.last = partition;
            if !self.is_holder(partition) {
                // It was one, before the partition moved.
                self.catch_up.waiting.remove(&partition);
                continue;
            }
            if !self.is_due(now, partition, replica)
                || self.catch_up.under_way.contains_key(&partition)
            {
                continue;
            }
            if let Some(helper) = self.helper(now, partition, &replica.seen(partition), is_up) {
                self.catch_up.under_way.insert(partition, helper.node);
                wanted.push(SyncWanted { partition, helper });
            }
        }
        wanted
    }

    /// Whether the partition has lacked the same writes for longer than they are ever under way.
    fn is_due(&mut self, now: Instant, partition: PartitionId, replica: &impl Replica) -> bool {
        let seen = replica.seen(partition);
        let behind = self.local(partition).and_then(|local| local.behind.as_ref());
        if let Some(behind) = behind.filter(|behind| !seen.covers(&behind.target)) {
            return now.nanos_since(behind.since) >= self.options.grace;
        }
        let mut target = SeenSet::new();
        for (_, peer) in self.others(partition) {
            if let Some(entry) = peer.entries.get(&partition)
                && !seen.covers(&entry.seen)
            {
                target.union(&entry.seen);
            }
        }
        let behind = (!target.is_empty()).then_some(Behind { since: now, target });
        if behind.is_none() {
            self.catch_up.waiting.remove(&partition);
            let partitions = (partition, NodeId(0))..=(partition, NodeId(u32::MAX));
            self.catch_up.failed.retain(|key, _| !partitions.contains(key));
        }
        if let Some(local) = self.local_mut(partition) {
            local.behind = behind;
        }
        false
    }

    /// Who is up and has most of what is lacked: first an origin of some of it.
    fn helper(
        &self,
        now: Instant,
        partition: PartitionId,
        seen: &SeenSet,
        is_up: &impl Fn(NodeId) -> bool,
    ) -> Option<PeerShard> {
        let is_waiting = |node: NodeId| {
            let failed = self.catch_up.failed.get(&(partition, node));
            failed.is_some_and(|failed| now < failed.until)
        };
        let old_homes = self.shared.moves.here_from.get(&partition);
        let held_since = self.local(partition).map_or(0, |local| local.held_since);
        let candidates = self.others(partition).filter_map(|(node, peer)| {
            let entry = peer.entries.get(&partition)?;
            // Who does not know this node as a home gives it none of what homes have.
            if peer.epoch < held_since {
                return None;
            }
            // What a stand-in keeps may have been deleted, and the tombstone be gone.
            if old_homes.is_some_and(|homes| !homes.contains(&node)) {
                return None;
            }
            let lacked = seen.lacked(&entry.seen);
            if lacked == 0 || !is_up(node) || is_waiting(node) {
                return None;
            }
            let origin = origin_of(node);
            let is_origin = !seen.of(origin).covers(entry.seen.of(origin));
            Some((is_origin, lacked, std::cmp::Reverse(node)))
        });
        let (_, _, std::cmp::Reverse(node)) = candidates.max()?;
        self.peer_shard(node, partition)
    }

    /// A sync has ended: well, with the helper's set adopted, or not.
    pub fn sync_ended(&mut self, now: Instant, partition: PartitionId, is_done: bool) {
        let Some(helper) = self.catch_up.under_way.remove(&partition) else { return };
        let key = (partition, helper);
        if is_done {
            self.catch_up.failed.remove(&key);
            return;
        }
        let times = self.catch_up.failed.get(&key).map_or(0, |failed| failed.times);
        let pause = self.options.back_off_min.saturating_mul(1 << times.min(20));
        let until = now.after_nanos(pause.min(self.options.back_off_max));
        self.catch_up.failed.insert(key, Failed { times: times + 1, until });
    }

    /// Syncs under way.
    #[must_use]
    pub fn syncs(&self) -> usize {
        self.catch_up.under_way.len()
    }

    /// Whether all that this guest has of the partition is on the disk of every holder, so that it
    /// may be dropped now: before anything else is written to it.
    #[must_use]
    pub fn guest_done(&self, partition: PartitionId, replica: &impl Replica) -> bool {
        let seen = replica.seen(partition);
        let Some(local) = self.local(partition) else { return false };
        !local.holders.contains(&self.own)
            && !local.holders.is_empty()
            && !seen.is_empty()
            && !replica.is_busy(partition)
            && self.announced(partition).all(|(_, _, theirs)| theirs.covers(&seen))
    }

    /// Partitions of which this node is a guest and may drop what it has. Looks only at those
    /// that somebody was told about.
    #[must_use]
    pub fn guests_done(&self, replica: &impl Replica) -> Vec<PartitionId> {
        let hosted = self.changes.values().copied().filter(|partition| !self.is_holder(*partition));
        hosted.filter(|partition| self.guest_done(*partition, replica)).collect()
    }

    /// Gaps from a crash that are closed: every member knows of this life, has said since then what
    /// it has of this node's writes, and none of that can be missed any more. From the moment that
    /// a member knows of a life it must take no message of an earlier one.
    #[must_use]
    pub fn gaps_closed(&self, replica: &impl Replica) -> Vec<GapClosed> {
        let gaps = self.partitions().filter(|partition| replica.has_gap(*partition));
        gaps.filter(|partition| self.is_closed(*partition, &replica.seen(*partition)))
            .map(|partition| GapClosed { partition, is_void: self.is_holder(partition) })
            .collect()
    }

    /// Whether this replica has seen all that any other has announced of the partition.
    #[must_use]
    pub fn has_all(&self, partition: PartitionId, replica: &impl Replica) -> bool {
        let seen = replica.seen(partition);
        let mut entries = self.others(partition).filter_map(|(_, p)| p.entries.get(&partition));
        entries.all(|entry| seen.covers(&entry.seen))
    }

    fn is_closed(&self, partition: PartitionId, seen: &SeenSet) -> bool {
        let has_answered = |peer: &Peer| peer.knows_us_since.is_some_and(|at| peer.clock > at);
        if !self.others(partition).all(|(_, peer)| has_answered(peer)) {
            return false;
        }
        if self.is_holder(partition) {
            return self.is_own_among(partition, seen);
        }
        // A guest does not fetch what others have of its writes: each holder must have it.
        self.announced(partition).all(|(_, _, theirs)| {
            let mut kept = seen.clone();
            kept.union(theirs);
            self.is_own_among(partition, &kept)
        })
    }

    /// Whether all own writes that anybody has said to have are among these.
    fn is_own_among(&self, partition: PartitionId, kept: &SeenSet) -> bool {
        let origin = origin_of(self.own);
        let mut entries = self.others(partition).filter_map(|(_, p)| p.entries.get(&partition));
        entries.all(|entry| kept.of(origin).covers(entry.seen.of(origin)))
    }

    /// Whether this node may coordinate a write in mode `siblings`. It says with it that all its
    /// earlier writes of the key which are not in the state were replaced, so it must know them:
    /// not while it has a gap, nor as a guest that has dropped or lost some that others have.
    #[must_use]
    pub fn may_write_siblings(&self, partition: PartitionId, replica: &impl Replica) -> bool {
        let has_all =
            self.is_holder(partition) && !self.shared.moves.here_from.contains_key(&partition);
        !replica.has_gap(partition)
            && (has_all || self.is_own_among(partition, &replica.seen(partition)))
    }
}
