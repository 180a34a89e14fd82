//! The cluster as one node knows it: members, and the ring of each replication factor.
//!
//! Immutable: a change of members or namespaces makes a new one, and shards are handed it whole.
//! Invariant: two nodes with the same members and factors answer every question alike, because
//! the answers are a pure function of both.
//!
//! Namespaces differ in their number of copies, and each number has its own ring, so that each is
//! balanced. What the replicas of a partition owe one another (what they have seen, what they
//! lack) is owed among its *holders*: all that any namespace puts there.

use annulus_engine::model::PartitionId;

use crate::member::{Member, NodeId, Weight};
use crate::moves::{ClusterMap, Layout, MemberState, Place, Stage};
use crate::ring::{Ring, RingError};

/// A server, with all that others need in order to reach and to place it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Which server.
    pub id: NodeId,
    /// Where peers reach it, `host:port`.
    pub peer: String,
    /// Where clients reach it, `host:port`; empty until it has said so.
    pub client: String,
    /// Data centre.
    pub dc: String,
    /// Rack inside the data centre.
    pub rack: String,
    /// Its share of the ring.
    pub weight: Weight,
}

/// The rings of one layout: number `i` places `i + 1` copies; only those in use are there.
#[derive(Clone, Debug)]
struct Rings(Vec<Option<Ring>>);

impl Rings {
    fn new(partition_bits: u32, members: &[Member], factors: &[u8]) -> Result<Rings, RingError> {
        let holding = members.iter().filter(|member| member.weight > Weight(0)).count();
        let mut rings = Vec::new();
        for factor in factors {
            let copies = usize::from(*factor).clamp(1, holding.max(1));
            if rings.len() < copies {
                rings.resize(copies, None);
            }
            if rings[copies - 1].is_none() {
                rings[copies - 1] = Some(Ring::new(partition_bits, copies, members)?);
            }
        }
        Ok(Rings(rings))
    }

    fn of(&self, factor: u8) -> Option<&Ring> {
        let copies = usize::from(factor).clamp(1, self.0.len().max(1));
        self.0.get(copies - 1)?.as_ref()
    }

    fn replicas(&self, partition: PartitionId, factor: u8) -> &[NodeId] {
        self.of(factor).map_or(&[], |ring| ring.replicas(partition))
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Topology {
    own: NodeId,
    partition_bits: u32,
    generation: u32,
    removed_at: u32,
    nodes: Vec<NodeInfo>,
    /// Members that are replaced.
    replaced: Vec<NodeId>,
    /// Whether all partitions leave `own`, or have left it.
    is_leaving: bool,
    /// Numbers of copies in use.
    factors: Vec<u8>,
    /// One a layout of the map.
    layouts: Vec<Rings>,
    /// By partition; empty while all are settled on the only layout.
    places: Vec<Place>,
}

fn member_of(node: &NodeInfo, weight: Weight) -> Member {
    Member { id: node.id, weight, dc: node.dc.clone(), rack: node.rack.clone() }
}

impl Topology {
    /// The topology as `own` sees it, with a ring for each of the factors (numbers of copies), cut
    /// down to the number of members that may hold something.
    ///
    /// # Errors
    /// [`RingError`] when there is no such ring.
    pub fn new(
        own: NodeId,
        partition_bits: u32,
        mut nodes: Vec<NodeInfo>,
        factors: impl IntoIterator<Item = u8>,
    ) -> Result<Topology, RingError> {
        nodes.sort_by_key(|node| node.id);
        let members: Vec<Member> = nodes.iter().map(|it| member_of(it, it.weight)).collect();
        let factors: Vec<u8> = factors.into_iter().collect();
        let layouts = vec![Rings::new(partition_bits, &members, &factors)?];
        let (places, generation, removed_at) = (Vec::new(), 1, 0);
        Ok(Topology {
            own,
            partition_bits,
            generation,
            removed_at,
            nodes,
            replaced: Vec::new(),
            is_leaving: false,
            factors,
            layouts,
            places,
        })
    }

    /// The topology that a map says, as `own` sees it.
    ///
    /// # Errors
    /// [`RingError`] when a layout has no such ring.
    pub fn of_map(
        own: NodeId,
        map: &ClusterMap,
        factors: impl IntoIterator<Item = u8>,
    ) -> Result<Topology, RingError> {
        let factors: Vec<u8> = factors.into_iter().collect();
        let rings = |layout: &Layout| {
            let members: Vec<Member> = layout
                .iter()
                .filter_map(|(id, weight)| Some(member_of(&map.member(*id)?.info, *weight)))
                .collect();
            Rings::new(map.partition_bits, &members, &factors)
        };
        let layouts = map.layouts.iter().map(rings).collect::<Result<Vec<_>, _>>()?;
        Ok(Topology {
            own,
            partition_bits: map.partition_bits,
            generation: map.generation,
            removed_at: map.removed_at,
            nodes: map.nodes(),
            replaced: map
                .members
                .iter()
                .filter(|member| member.state == MemberState::Dead)
                .map(|member| member.info.id)
                .collect(),
            is_leaving: !map.layouts.last().is_some_and(|it| it.iter().any(|it| it.0 == own)),
            layouts,
            places: map.places.clone(),
            factors,
        })
    }

    /// The node whose view this is.
    #[must_use]
    pub fn own(&self) -> NodeId {
        self.own
    }

    /// Of the map.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The generation in which a member was last removed; 0: never.
    #[must_use]
    pub fn removed_at(&self) -> u32 {
        self.removed_at
    }

    /// Logarithm of the number of partitions.
    #[must_use]
    pub fn partition_bits(&self) -> u32 {
        self.partition_bits
    }

    /// All members, by id.
    #[must_use]
    pub fn nodes(&self) -> &[NodeInfo] {
        &self.nodes
    }

    /// A member.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeInfo> {
        let at = self.nodes.binary_search_by_key(&id, |node| node.id).ok()?;
        Some(&self.nodes[at])
    }

    /// Whether there is nobody else.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.nodes.len() <= 1
    }

    fn place(&self, partition: PartitionId) -> Place {
        let only = Place::settled(0);
        self.places.get(partition.0 as usize).copied().unwrap_or(only)
    }

    /// Where the partition stands between two layouts.
    #[must_use]
    pub fn stage(&self, partition: PartitionId) -> Stage {
        self.place(partition).stage
    }

    fn on(&self, layout: u8) -> Option<&Rings> {
        self.layouts.get(usize::from(layout))
    }

    /// The layout by which the partition is read.
    fn current(&self, partition: PartitionId) -> Option<&Rings> {
        let place = self.place(partition);
        self.on(if place.stage == Stage::New { place.to } else { place.at })
    }

    /// The home servers of a partition for namespaces of this many copies, in the order of the
    /// walk: those that reads ask. Empty for a factor that is not in use.
    #[must_use]
    pub fn replicas(&self, partition: PartitionId, factor: u8) -> &[NodeId] {
        self.current(partition).map_or(&[], |rings| rings.replicas(partition, factor))
    }

    /// The other homes that a write must come to as well, each level of it, while the partition
    /// moves.
    #[must_use]
    pub fn other_replicas(&self, partition: PartitionId, factor: u8) -> Option<&[NodeId]> {
        if self.places.is_empty() {
            return None;
        }
        let place = self.place(partition);
        let other = match place.stage {
            Stage::Settled | Stage::Prepared => return None,
            Stage::Both => place.to,
            Stage::New => place.at,
        };
        Some(self.on(other)?.replicas(partition, factor))
    }

    /// Home servers, then those that stand in for them, in order.
    #[must_use]
    pub fn preference(&self, partition: PartitionId, factor: u8) -> Vec<NodeId> {
        let ring = self.current(partition).and_then(|rings| rings.of(factor));
        ring.map_or_else(Vec::new, |ring| ring.preference(partition))
    }

    /// Whether reads of the partition ask `own`, for namespaces of this many copies.
    #[must_use]
    pub fn is_home(&self, partition: PartitionId, factor: u8) -> bool {
        self.replicas(partition, factor).contains(&self.own)
    }

    /// Whether a node is a home of the partition for namespaces of this many copies: one that is
    /// written to.
    #[must_use]
    pub fn is_home_of(&self, partition: PartitionId, factor: u8, node: NodeId) -> bool {
        self.replicas(partition, factor).contains(&node)
            || self.other_replicas(partition, factor).is_some_and(|it| it.contains(&node))
    }

    /// Every home of the partition on a layout, for any factor in use, by id.
    #[must_use]
    pub fn homes_on(&self, partition: PartitionId, layout: u8) -> Vec<NodeId> {
        let rings = self.on(layout).into_iter().flat_map(|rings| rings.0.iter().flatten());
        let mut homes: Vec<NodeId> =
            rings.flat_map(|ring| ring.replicas(partition)).copied().collect();
        homes.sort_unstable();
        homes.dedup();
        homes
    }

    /// Whether the partition has the same homes on both layouts, for each factor in use.
    #[must_use]
    pub fn is_same_on(&self, partition: PartitionId, one: u8, other: u8) -> bool {
        let homes = |layout: u8, factor: u8| {
            let rings = self.on(layout);
            let mut homes = rings.map_or(&[][..], |it| it.replicas(partition, factor)).to_vec();
            homes.sort_unstable();
            homes
        };
        self.factors.iter().all(|factor| homes(one, *factor) == homes(other, *factor))
    }

    /// Every home of the partition for any factor in use, by id: those from which nothing may be
    /// missing before it is forgotten. A new owner is one from the beginning, in the eyes of all
    /// but itself: it has to get rid of what it keeps for others first.
    #[must_use]
    pub fn holders(&self, partition: PartitionId) -> Vec<NodeId> {
        let place = self.place(partition);
        if place.stage == Stage::Prepared
            && let Some(old) = self.moves_here_from(partition)
        {
            // To those who have to have what it keeps: neither other new owners, which begin with
            // nothing, nor who is replaced.
            return old;
        }
        let mut holders = self.homes_on(partition, place.at);
        if place.stage != Stage::Settled {
            holders.extend(self.homes_on(partition, place.to));
            holders.sort_unstable();
            holders.dedup();
        }
        holders
    }

    /// Whether all partitions leave `own`, or have left it: it keeps nothing more for others.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.is_leaving
    }

    /// Whether `own` is a new owner of the partition that has to have nothing of it before it begins.
    #[must_use]
    pub fn is_preparing(&self, partition: PartitionId) -> bool {
        !self.places.is_empty()
            && self.stage(partition) == Stage::Prepared
            && self.moves_here_from(partition).is_some()
    }

    /// The old homes that are not replaced, if `own` is a new owner of the partition that is on its
    /// way.
    #[must_use]
    pub fn moves_here_from(&self, partition: PartitionId) -> Option<Vec<NodeId>> {
        let place = self.place(partition);
        if place.stage == Stage::Settled {
            return None;
        }
        let mut old = self.homes_on(partition, place.at);
        let is_new =
            !old.contains(&self.own) && self.homes_on(partition, place.to).contains(&self.own);
        old.retain(|node| !self.replaced.contains(node));
        is_new.then_some(old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: u32) -> Vec<NodeInfo> {
        (1..=count)
            .map(|id| NodeInfo {
                id: NodeId(id),
                peer: format!("127.0.0.1:{}", 7000 + id),
                client: String::new(),
                dc: "dc1".into(),
                rack: "rack1".into(),
                weight: Weight::ONE,
            })
            .collect()
    }

    #[test]
    fn a_lone_node_holds_everything_whatever_is_asked_for() {
        let topology = Topology::new(NodeId(1), 4, nodes(1), [3]).unwrap();
        assert!(topology.is_alone());
        assert_eq!(topology.replicas(PartitionId(7), 3), [NodeId(1)]);
    }

    #[test]
    fn holders_are_the_homes_of_every_factor() {
        let topology = Topology::new(NodeId(2), 6, nodes(5), [3, 1]).unwrap();
        for partition in (0..64).map(PartitionId) {
            let holders = topology.holders(partition);
            for factor in [1, 3] {
                assert_eq!(topology.replicas(partition, factor).len(), usize::from(factor));
                assert!(topology.replicas(partition, factor).iter().all(|n| holders.contains(n)));
            }
            assert!((3..=4).contains(&holders.len()));
            assert_eq!(topology.preference(partition, 3).len(), 5);
        }
    }

    #[test]
    fn a_factor_that_is_not_in_use_has_no_homes() {
        let topology = Topology::new(NodeId(1), 4, nodes(4), [3]).unwrap();
        assert!(topology.replicas(PartitionId(0), 2).is_empty());
        assert_eq!(topology.replicas(PartitionId(0), 16).len(), 3);
    }
}
