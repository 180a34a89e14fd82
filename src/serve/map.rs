//! The partition map as clients are told it: who has which partition, and where they are reached.
//!
//! Invariant: only nodes whose address is known are named, this one among them, so a client that
//! follows the map reaches somebody who carries out its request or hands it on.

use std::collections::BTreeMap;

use annulus_cluster::{NodeId, Topology};
use annulus_engine::model::{OriginId, PartitionId};
use annulus_net::wire::hello::{Node as NodeFact, Replica, Run};

use crate::pump::ShardMap;

/// A node as clients reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClientFacts {
    pub(super) address: String,
    pub(super) shard_count: u32,
}

/// Neighbouring partitions with the same homes, for the greatest number of copies in use, and the
/// nodes that are named.
pub(super) fn partition_map(
    topology: Option<&Topology>,
    own: NodeId,
    partition_bits: u32,
    clients: &BTreeMap<NodeId, ClientFacts>,
) -> (Vec<Run>, Vec<NodeFact>) {
    let maps: BTreeMap<NodeId, ShardMap> = clients
        .iter()
        .map(|(node, facts)| (*node, ShardMap::new(0, facts.shard_count, partition_bits)))
        .collect();
    let mut runs: Vec<Run> = Vec::new();
    for partition in (0..1 << partition_bits).map(PartitionId) {
        let homes = match topology {
            Some(topology) => topology.replicas(partition, u8::MAX),
            None => &[],
        };
        let replica = |node: &NodeId| {
            let shard = maps.get(node)?.shard_of_partition(partition.0);
            Some(Replica { node: OriginId(node.0), shard })
        };
        let mut replicas: Vec<Replica> = homes.iter().filter_map(replica).collect();
        if replicas.is_empty() {
            replicas.extend(replica(&own));
        }
        match runs.last_mut() {
            Some(run) if run.replicas == replicas => run.length += 1,
            _ => runs.push(Run { length: 1, replicas }),
        }
    }
    let nodes = clients
        .iter()
        .map(|(node, facts)| NodeFact {
            id: OriginId(node.0),
            shard_count: facts.shard_count,
            address: facts.address.clone(),
        })
        .collect();
    (runs, nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_of_its_own_has_every_partition_in_runs_by_shard() {
        let facts = ClientFacts { address: "h:1".into(), shard_count: 2 };
        let clients = BTreeMap::from([(NodeId(1), facts)]);
        let (runs, nodes) = partition_map(None, NodeId(1), 4, &clients);
        assert_eq!(
            runs.iter().map(|run| (run.length, run.replicas[0].shard)).collect::<Vec<_>>(),
            [(8, 0), (8, 1)]
        );
        assert_eq!(nodes.len(), 1);
    }
}
