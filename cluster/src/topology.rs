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

/// See the module.
#[derive(Clone, Debug)]
pub struct Topology {
    own: NodeId,
    partition_bits: u32,
    nodes: Vec<NodeInfo>,
    /// Ring number `i` places `i + 1` copies; only those in use are there.
    rings: Vec<Option<Ring>>,
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
        let members: Vec<Member> = nodes
            .iter()
            .map(|node| Member {
                id: node.id,
                weight: node.weight,
                dc: node.dc.clone(),
                rack: node.rack.clone(),
            })
            .collect();
        let holding = members.iter().filter(|member| member.weight > Weight(0)).count();
        let mut rings = Vec::new();
        for factor in factors {
            let copies = usize::from(factor).clamp(1, holding.max(1));
            if rings.len() < copies {
                rings.resize(copies, None);
            }
            if rings[copies - 1].is_none() {
                rings[copies - 1] = Some(Ring::new(partition_bits, copies, &members)?);
            }
        }
        Ok(Topology { own, partition_bits, nodes, rings })
    }

    /// The node whose view this is.
    #[must_use]
    pub fn own(&self) -> NodeId {
        self.own
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

    /// How many copies a namespace that asks for `factor` of them really has.
    #[must_use]
    pub fn copies(&self, factor: u8) -> usize {
        usize::from(factor).clamp(1, self.rings.len().max(1))
    }

    fn ring(&self, factor: u8) -> Option<&Ring> {
        self.rings.get(self.copies(factor) - 1)?.as_ref()
    }

    /// The home servers of a partition for namespaces of this many copies, in the order of the
    /// walk. Empty for a factor that is not in use.
    #[must_use]
    pub fn replicas(&self, partition: PartitionId, factor: u8) -> &[NodeId] {
        self.ring(factor).map_or(&[], |ring| ring.replicas(partition))
    }

    /// Home servers, then those that stand in for them, in order.
    #[must_use]
    pub fn preference(&self, partition: PartitionId, factor: u8) -> Vec<NodeId> {
        self.ring(factor).map_or_else(Vec::new, |ring| ring.preference(partition))
    }

    /// Whether this node is a home of the partition for namespaces of this many copies.
    #[must_use]
    pub fn is_home(&self, partition: PartitionId, factor: u8) -> bool {
        self.replicas(partition, factor).contains(&self.own)
    }

    /// Every home of the partition for any factor in use, by id.
    #[must_use]
    pub fn holders(&self, partition: PartitionId) -> Vec<NodeId> {
        let mut holders: Vec<NodeId> = self
            .rings
            .iter()
            .flatten()
            .flat_map(|ring| ring.replicas(partition))
            .copied()
            .collect();
        holders.sort_unstable();
        holders.dedup();
        holders
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
        assert_eq!(topology.copies(3), 1);
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
