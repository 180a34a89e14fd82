//! The ring: which servers hold which partition. A pure function of the members.
//!
//! The ring is cut into `P = 2^q` equal arcs, the partitions. Every member puts virtual nodes on
//! it in proportion to its weight. The replicas of an arc are the first N distinct servers met on
//! the walk clockwise from its start, passing over those that already carry their cap ("consistent
//! hashing with bounded loads", Mirrokni, Thorup, Zadimoghaddam, 2018). The walk goes on: that is
//! the order in which other servers stand in.
//!
//! Invariant: each partition has N distinct servers, in distinct data centres while there are
//! untouched ones, then in distinct racks while there are untouched ones, and no server carries
//! more than its cap, 1.02 of its share. Shares are by weight as far as that allows, see
//! `ring/spread.rs`; why the walk always finds its servers, see `ring/rooms.rs`.

use std::collections::BTreeSet;

use annulus_engine::model::token::PARTITION_BITS_MAX;
use annulus_engine::model::{PartitionId, Token};

use crate::member::{Member, NodeId, Weight};

mod rooms;
mod spread;

use rooms::Rooms;
use spread::{Spread, distinct, homes};

/// A server's point on the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VirtualNode {
    /// Where: XXH3-64 of the server's id and the point's number.
    pub token: Token,
    /// Whose.
    pub node: NodeId,
}

impl VirtualNode {
    /// The `index`-th point of a server. Does not depend on who else there is, which is why few
    /// partitions move when a server comes or goes.
    #[must_use]
    pub fn new(node: NodeId, index: u32) -> VirtualNode {
        let mut name = [0; 8];
        name[..4].copy_from_slice(&node.0.to_le_bytes());
        name[4..].copy_from_slice(&index.to_le_bytes());
        VirtualNode { token: Token::of_key(&name, 0), node }
    }
}

/// Why there is no ring of these members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// More than 65,536 partitions.
    TooManyPartitions,
    /// A partition needs at least one replica.
    NoReplicas,
    /// The same id twice.
    DuplicateMember(NodeId),
    /// A weight above [`Weight::MAX`].
    TooHeavy(NodeId),
    /// Fewer members with a weight than replicas.
    TooFewMembers,
}

/// Placement of every partition. Immutable; a change of members makes a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    partition_bits: u32,
    replica_count: usize,
    /// Members with a weight, by id.
    members: Vec<Member>,
    /// All points, in the ring's order.
    points: Vec<VirtualNode>,
    /// `replica_count` servers a partition, in the order of the walk.
    replicas: Vec<NodeId>,
}

impl Ring {
    /// Places `2^partition_bits` partitions, each on `replica_count` of the members. The order of
    /// the members does not matter. About 1 ms for 12 servers and 4,096 partitions, 33 ms for 48 in
    /// 6 racks and 65,536.
    ///
    /// # Errors
    /// [`RingError`] when no such placement exists.
    pub fn new(
        partition_bits: u32,
        replica_count: usize,
        members: &[Member],
    ) -> Result<Ring, RingError> {
        if partition_bits > PARTITION_BITS_MAX {
            return Err(RingError::TooManyPartitions);
        }
        if replica_count == 0 {
            return Err(RingError::NoReplicas);
        }
        let mut seen = BTreeSet::new();
        for member in members {
            if !seen.insert(member.id) {
                return Err(RingError::DuplicateMember(member.id));
            }
            if member.weight > Weight::MAX {
                return Err(RingError::TooHeavy(member.id));
            }
        }
        let mut members: Vec<Member> =
            members.iter().filter(|member| member.weight > Weight(0)).cloned().collect();
        members.sort_unstable_by_key(|member| member.id);
        if members.len() < replica_count {
            return Err(RingError::TooFewMembers);
        }
        let mut points: Vec<VirtualNode> = members
            .iter()
            .flat_map(|member| (0..member.weight.0).map(|i| VirtualNode::new(member.id, i)))
            .collect();
        points.sort_unstable();
        let mut ring = Ring { partition_bits, replica_count, members, points, replicas: vec![] };
        ring.place();
        Ok(ring)
    }

    /// Number of partitions.
    #[must_use]
    pub fn partition_count(&self) -> u32 {
        1 << self.partition_bits
    }

    /// The home servers of a partition, first the one whose point comes first.
    ///
    /// # Panics
    /// If the ring has no such partition.
    #[must_use]
    pub fn replicas(&self, partition: PartitionId) -> &[NodeId] {
        let first = partition.0 as usize * self.replica_count;
        &self.replicas[first..first + self.replica_count]
    }

    /// The home servers of a token.
    #[must_use]
    pub fn replicas_of(&self, token: Token) -> &[NodeId] {
        self.replicas(token.partition(self.partition_bits))
    }

    /// Every server: the partition's own, then those that stand in for them, in order.
    #[must_use]
    pub fn preference(&self, partition: PartitionId) -> Vec<NodeId> {
        let mut order = self.replicas(partition).to_vec();
        for node in self.walk(partition) {
            if order.len() == self.members.len() {
                break;
            }
            if !order.contains(&node) {
                order.push(node);
            }
        }
        order
    }

    /// How many partitions have two replicas in one data centre or rack while another one has
    /// none: none at all, unless a data centre or rack is too light to carry its part.
    #[must_use]
    pub fn crowded(&self) -> u32 {
        let homes = homes(&self.members);
        let dcs = distinct(homes.iter().map(|home| home.dc)).len().min(self.replica_count);
        let racks = distinct(homes.iter().map(|home| home.rack)).len().min(self.replica_count);
        let crowded = |partition: u32| {
            let replicas = self.replicas(PartitionId(partition)).iter();
            let of = distinct(replicas.map(|node| homes[self.index_of(*node)]));
            of.len() < racks || distinct(of.iter().map(|home| home.dc)).len() < dcs
        };
        (0..self.partition_count()).map(|p| u32::from(crowded(p))).sum()
    }

    /// Owners of the points from the start of the partition's arc once round, with repeats.
    fn walk(&self, partition: PartitionId) -> impl Iterator<Item = NodeId> {
        let start = partition.range(self.partition_bits).first;
        let first = self.points.partition_point(|point| point.token < start);
        let (before, after) = self.points.split_at(first);
        after.iter().chain(before).map(|point| point.node)
    }

    fn place(&mut self) {
        let partitions = self.partition_count();
        let spread = Spread::new(&self.members, partitions.into(), self.replica_count as u64);
        let mut rooms = Rooms::new(&spread);
        let mut replicas = Vec::with_capacity(partitions as usize * self.replica_count);
        for partition in 0..partitions {
            rooms.begin(u64::from(partitions - partition));
            let walk = self.walk(PartitionId(partition));
            replicas.extend(
                walk.filter(|node| rooms.take(self.index_of(*node))).take(self.replica_count),
            );
        }
        assert_eq!(
            replicas.len(),
            partitions as usize * self.replica_count,
            "a choice remains, see the proof in ring/rooms.rs"
        );
        self.replicas = replicas;
    }

    fn index_of(&self, node: NodeId) -> usize {
        self.members
            .binary_search_by_key(&node, |member| member.id)
            .expect("points are of members only")
    }
}

#[cfg(test)]
mod tests;
