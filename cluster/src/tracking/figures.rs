//! How far the replicas agree, for `repair --status`, and who holds back the purge.

use std::collections::BTreeMap;

use annulus_engine::model::{PartitionId, Timestamp};

use super::{Replica, Tracking};
use crate::member::NodeId;

/// Figures of one shard's partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Convergence {
    /// Partitions that this node holds. The next four add up to it.
    pub held: u32,
    /// All holders have seen the same writes, as far as they have said.
    pub in_sync: u32,
    /// Some other replica has writes that this one lacks.
    pub behind: u32,
    /// Only other holders lack something.
    pub ahead: u32,
    /// A holder has said nothing since it or this node started.
    pub unknown: u32,
    /// Partitions of which this node is a guest.
    pub hosted: u32,
    /// Writes that this node lacks.
    pub writes_lacked: u64,
    /// Syncs under way.
    pub syncs: u32,
}

impl Convergence {
    /// Adds another shard's figures.
    pub fn add(&mut self, other: &Convergence) {
        self.held += other.held;
        self.in_sync += other.in_sync;
        self.behind += other.behind;
        self.ahead += other.ahead;
        self.unknown += other.unknown;
        self.hosted += other.hosted;
        self.writes_lacked = self.writes_lacked.saturating_add(other.writes_lacked);
        self.syncs += other.syncs;
    }
}

impl Tracking {
    /// How far the replicas of this shard's partitions agree. Looks at all of them.
    #[must_use]
    pub fn convergence(&self, replica: &impl Replica) -> Convergence {
        let syncs = u32::try_from(self.syncs()).unwrap_or(u32::MAX);
        let mut figures = Convergence { syncs, ..Convergence::default() };
        for partition in self.partitions() {
            let seen = replica.seen(partition);
            if !self.is_holder(partition) {
                figures.hosted += u32::from(!seen.is_empty());
                continue;
            }
            figures.held += 1;
            let entries = self.others(partition).filter_map(|(_, p)| p.entries.get(&partition));
            let lacked = entries.map(|entry| seen.lacked(&entry.seen)).max().unwrap_or(0);
            let others = || self.announced(partition).filter(|(node, ..)| *node != self.own);
            if lacked > 0 {
                figures.behind += 1;
                figures.writes_lacked = figures.writes_lacked.saturating_add(lacked);
            } else if others().any(|(node, ..)| !self.is_heard(node, partition)) {
                figures.unknown += 1;
            } else if others().any(|(_, _, theirs)| !theirs.covers(&seen)) {
                figures.ahead += 1;
            } else {
                figures.in_sync += 1;
            }
        }
        figures
    }

    /// Whether the node has said all that it has to say of the partition.
    fn is_heard(&self, node: NodeId, partition: PartitionId) -> bool {
        self.peer(node, partition).is_some_and(|peer| peer.clock > Timestamp::ZERO)
    }

    /// Nodes because of which tombstones may have to wait, each with the number of partitions.
    #[must_use]
    pub fn tombstones_waiting_for(&self, replica: &impl Replica) -> BTreeMap<NodeId, u32> {
        let mut waiting = BTreeMap::new();
        for partition in self.partitions().filter(|partition| self.is_holder(*partition)) {
            let newest = replica.seen(partition).newest();
            if self.purge_floor(partition) >= newest {
                continue;
            }
            let silent = |node: &NodeId| {
                let peer = self.peer(*node, partition);
                peer.is_none_or(|peer| peer.promise < newest)
            };
            let members = self.shared.members.keys().copied().filter(|node| *node != self.own);
            let mut to_blame: Vec<NodeId> = members.filter(silent).collect();
            if to_blame.is_empty() {
                // All could be known, so it is whoever has not taken it in.
                let late = self.announced(partition).filter(|(_, complete, _)| *complete < newest);
                to_blame = late.map(|(node, ..)| node).collect();
            }
            for node in to_blame {
                *waiting.entry(node).or_insert(0) += 1;
            }
        }
        waiting
    }

    /// Writes that this node keeps as a guest and some holder has not said to have.
    #[must_use]
    pub fn hints_owed(&self, replica: &impl Replica) -> u64 {
        let hosted = self.partitions().filter(|partition| !self.is_holder(*partition));
        let owed = hosted.map(|partition| {
            let seen = replica.seen(partition);
            let lacked = self.announced(partition).map(|(_, _, theirs)| theirs.lacked(&seen));
            lacked.max().unwrap_or(0)
        });
        owed.fold(0, u64::saturating_add)
    }

    /// The promise of each other member's shard, as last heard.
    pub fn promises(&self) -> impl Iterator<Item = (NodeId, Timestamp)> {
        self.peers.iter().map(|(peer, known)| (peer.node, known.promise))
    }

    /// The partition's guests and holders that lack something of what this replica has seen.
    #[must_use]
    pub fn lagging(&self, partition: PartitionId, replica: &impl Replica) -> Vec<NodeId> {
        let seen = replica.seen(partition);
        let holders = self.announced(partition).filter(|(node, ..)| *node != self.own);
        holders.filter(|(_, _, theirs)| !theirs.covers(&seen)).map(|(node, ..)| node).collect()
    }
}
