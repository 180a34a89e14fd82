//! What an operator asks of the whole cluster, whichever member he asks: the namespaces, the
//! placement, one row a member.
//!
//! ```text
//! ns.create/set/drop  another member's shard -> the lowest id (Forward) -> its desk
//!                     -> ns.adopt to all that can be reached -> their answers, or 2 s
//!                     <- the catalogue and the reply; adopted here before the client hears of it
//! status              own row, and the row of each that can be reached (Forward), or 1 s
//! ring                from the topology that every member computes alike
//! ```
//!
//! Invariant: one member gives out ids of namespaces, so none is given twice; without it a change
//! is refused as not started. A client that was told of a change finds it at the member that told
//! him. What is not known of a member is said to be unknown, never guessed.

use std::collections::BTreeSet;

use annulus_cluster::tracking::PeerShard;
use annulus_cluster::{NodeId, NodeInfo};
use annulus_engine::disk::Disk;
use annulus_engine::model::{Instant, PartitionId};
use annulus_engine::runtime::Runtime;
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::request::{Admin, Outgoing, Request};
use annulus_net::wire::response::Failure;
use annulus_net::wire::status::Status;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_channel::oneshot;
use futures_util::future::join_all;

use crate::commands::{
    Command, Copies, MemberFacts, MemberStatus, Replica, RingQuery, RingReply, StatusReply,
};
use crate::namespaces::DEFAULT_NAME;
use crate::pump::{Answer, Done, Origin, Pump, ShardMap, Wires};

/// Between members only: takes over the catalogue in the arguments, in base64.
const ADOPT: &str = "ns.adopt";
/// How long the other members are waited for before a change is answered, in nanoseconds.
const ADOPT_NANOS: u64 = 2_000_000_000;
/// How long a member's row is waited for, in nanoseconds.
const STATUS_NANOS: u64 = 1_000_000_000;

/// What a member answered: status and body.
pub(in crate::pump) type Told = (Status, Vec<u8>);
type Telling = oneshot::Receiver<Told>;

/// The change of a namespace, done here as the lowest member.
#[derive(Debug)]
pub(in crate::pump) struct Change {
    origin: Origin,
    reply: Vec<u8>,
}

fn changes_namespaces(command: &str) -> bool {
    matches!(command, "ns.create" | "ns.set" | "ns.drop")
}

/// The reply of a forwarded change: the catalogue after it, then what the client is told.
fn with_catalogue(catalogue: &[u8], reply: &[u8]) -> Vec<u8> {
    let size = u32::try_from(catalogue.len()).expect("a catalogue is small");
    let mut body = Vec::with_capacity(4 + catalogue.len() + reply.len());
    body.extend_from_slice(&size.to_le_bytes());
    body.extend_from_slice(catalogue);
    body.extend_from_slice(reply);
    body
}

fn without_catalogue(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (size, rest) = body.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(u32::from_le_bytes(*size)).ok()?)
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Begins a command that more than this node takes part in.
    ///
    /// # Errors
    /// The origin: it is this node's own business.
    pub(in crate::pump) fn begin_cluster_admin(
        &mut self,
        origin: Origin,
        deadline: Instant,
        command: &str,
        arguments: &str,
    ) -> Result<(), Origin> {
        let Some(replication) = &self.replication else { return Err(origin) };
        match command {
            _ if changes_namespaces(command) => {
                match replication.lowest() {
                    lowest if lowest == replication.topology.own() => {
                        self.change_namespaces(origin, command, arguments);
                    }
                    lowest => self.change_elsewhere(origin, lowest, deadline, command, arguments),
                }
                Ok(())
            }
            "status" => {
                self.gather_status(origin);
                Ok(())
            }
            "ring" => {
                let reply = self.ring(arguments);
                self.spawn(async move { Done::Admin { origin, reply } });
                Ok(())
            }
            _ => Err(origin),
        }
    }

    /// A command that another member handed on.
    pub(super) fn admin_of_member(
        &mut self,
        origin: Origin,
        from: PeerShard,
        body: &[u8],
        wires: &mut dyn Wires,
    ) {
        let context = self.facts.decode_context();
        let Ok(Request::Admin(admin)) = Request::decode(Opcode::Admin.request(), body, &context)
        else {
            let failure = Failure::new(Status::BAD_REQUEST, "no command");
            return self.answer(origin, &Answer::Failure(failure), wires);
        };
        let Some(replication) = &self.replication else { return };
        match admin.command {
            ADOPT => {
                let Ok(catalogue) = STANDARD.decode(admin.json) else {
                    self.count_peer_refusal(from);
                    let failure = Failure::new(Status::BAD_REQUEST, "no catalogue");
                    return self.answer(origin, &Answer::Failure(failure), wires);
                };
                let job = self.desk.adopt_catalogue(&catalogue);
                self.spawn(async move { Done::Admin { origin, reply: job.await } });
            }
            "status" => {
                let reaches = replication.peers.keys().map(|node| node.0).collect();
                let job = self.desk.begin("status", "{}");
                self.spawn(async move {
                    let reply = job.await.and_then(|json| member_status(&json, reaches));
                    Done::Admin { origin, reply }
                });
            }
            command if !changes_namespaces(command) => {
                let failure = Failure::new(Status::UNSUPPORTED, "not handed on between nodes");
                self.answer(origin, &Answer::Failure(failure), wires);
            }
            command if replication.lowest() == replication.topology.own() => {
                self.change_namespaces(origin, command, admin.json);
            }
            _ => {
                let failure = Failure::new(Status::UNAVAILABLE, "another node changes namespaces");
                self.answer(origin, &Answer::Failure(failure), wires);
            }
        }
    }

    // ---- namespaces -------------------------------------------------------------------------

    /// Makes the change here, as the member with the lowest id.
    fn change_namespaces(&mut self, origin: Origin, command: &str, arguments: &str) {
        let job = self.desk.begin(command, arguments);
        self.spawn(async move {
            match job.await {
                Ok(reply) => Done::Changed(Change { origin, reply }),
                Err(refusal) => Done::Admin { origin, reply: Err(refusal) },
            }
        });
    }

    /// The change is made and durable: all that can be reached take it over before it is answered.
    pub(in crate::pump) fn changed(&mut self, Change { origin, reply }: Change) {
        let catalogue = self.desk.catalogue();
        let asker = match &origin {
            Origin::Forward { from, .. } => Some(from.node),
            _ => None,
        };
        let Some(replication) = &self.replication else { return };
        // The one that handed it on gets the catalogue with the answer.
        let others: Vec<NodeId> =
            replication.peers.keys().copied().filter(|node| Some(*node) != asker).collect();
        let (arguments, deadline) =
            (STANDARD.encode(&catalogue), self.now.after_nanos(ADOPT_NANOS));
        let asked: Vec<Telling> = others
            .into_iter()
            .filter_map(|node| self.ask_member(node, deadline, ADOPT, &arguments))
            .collect();
        let reply = if asker.is_some() { with_catalogue(&catalogue, &reply) } else { reply };
        self.spawn(async move {
            // Who has not answered hears of it with the settings, as soon as he can be reached.
            join_all(asked).await;
            Done::Admin { origin, reply: Ok(reply) }
        });
    }

    /// Hands the change on to the lowest member; what it answers is known here before the client
    /// is told.
    fn change_elsewhere(
        &mut self,
        origin: Origin,
        lowest: NodeId,
        deadline: Instant,
        command: &str,
        arguments: &str,
    ) {
        let Some(telling) = self.ask_member(lowest, deadline, command, arguments) else {
            let what = format!(
                "namespaces are changed by node {}, the lowest id, which cannot be reached",
                lowest.0
            );
            let reply = Err((Status::UNAVAILABLE, what));
            return self.spawn(async move { Done::Admin { origin, reply } });
        };
        let desk = std::rc::Rc::clone(&self.desk);
        self.spawn(async move {
            let doubt = |what: &str| Err((Status::MAY_BE_APPLIED, what.to_owned()));
            let reply = match telling.await {
                Ok((Status::OK, body)) => match without_catalogue(&body) {
                    Some((catalogue, reply)) => match desk.adopt_catalogue(catalogue).await {
                        Ok(_) => Ok(reply.to_vec()),
                        Err((_, what)) => {
                            doubt(&format!("changed, but this node could not keep it: {what}"))
                        }
                    },
                    None => doubt("the answer of the node that changes namespaces is none"),
                },
                Ok((status, body)) => return Done::Told { origin, status, body },
                Err(oneshot::Canceled) => doubt("the node that changes namespaces is gone"),
            };
            Done::Admin { origin, reply }
        });
    }

    // ---- status and ring --------------------------------------------------------------------

    fn gather_status(&mut self, origin: Origin) {
        let Some(replication) = &self.replication else { return };
        let members = self.member_facts();
        let reached: Vec<NodeId> = replication.peers.keys().copied().collect();
        let deadline = self.now.after_nanos(STATUS_NANOS);
        let asked: Vec<(u32, Telling)> = reached
            .iter()
            .filter_map(|node| Some((node.0, self.ask_member(*node, deadline, "status", "{}")?)))
            .collect();
        let own = self.desk.begin("status", "{}");
        self.spawn(async move {
            let own = match own.await {
                Ok(own) => own,
                Err(refusal) => return Done::Admin { origin, reply: Err(refusal) },
            };
            let mut told: Vec<MemberStatus> = Vec::new();
            for (node, telling) in asked {
                if let Ok((Status::OK, body)) = telling.await
                    && let Ok(status) = serde_json::from_slice::<MemberStatus>(&body)
                    && status.row.id == node
                {
                    told.push(status);
                }
            }
            let reply = serde_json::from_slice::<StatusReply>(&own)
                .map(|own| own.with_members(&members, &told))
                .and_then(|status| serde_json::to_vec(&status))
                .map_err(|error| (Status::FAILED, error.to_string()));
            Done::Admin { origin, reply }
        });
    }

    /// What this node knows of every member without asking it.
    fn member_facts(&self) -> Vec<MemberFacts> {
        let Some(replication) = &self.replication else { return Vec::new() };
        let topology = &replication.topology;
        let mut held = vec![0u32; topology.nodes().len()];
        for partition in (0..1 << topology.partition_bits()).map(PartitionId) {
            for holder in topology.holders(partition) {
                if let Ok(at) = topology.nodes().binary_search_by_key(&holder, |node| node.id) {
                    held[at] += 1;
                }
            }
        }
        let facts = |(node, partitions): (&NodeInfo, u32)| {
            let known = self.facts.welcome.nodes.iter().find(|known| known.id.0 == node.id.0);
            MemberFacts {
                id: node.id.0,
                address: known.map(|known| known.address.clone()),
                shards: known.map(|known| known.shard_count),
                dc: node.dc.clone(),
                rack: node.rack.clone(),
                weight: crate::members::percent(node.weight),
                partitions,
                gossip: replication.gossip.view(node.id).copied(),
            }
        };
        topology.nodes().iter().zip(held).map(facts).collect()
    }

    fn ring(&self, arguments: &str) -> Result<Vec<u8>, (Status, String)> {
        let bad = |what: String| (Status::BAD_REQUEST, what);
        let query = match Command::parse("ring", arguments).map_err(bad)? {
            Command::Ring(query) => query,
            _ => RingQuery::default(),
        };
        let name = query.ns.as_deref().unwrap_or(DEFAULT_NAME);
        let namespace = self.catalogue.by_name(name).ok_or_else(|| {
            (Status::FAILED, format!("there is no namespace `{}`", name.escape_debug()))
        })?;
        let Some(replication) = &self.replication else {
            return Err((Status::FAILED, "this node is on its own".to_owned()));
        };
        let (topology, welcome) = (&replication.topology, &self.facts.welcome);
        let bits = topology.partition_bits();
        let copies = |partition: PartitionId| {
            let replica = |node: &NodeId| {
                let known = welcome.nodes.iter().find(|known| known.id.0 == node.0);
                let shards = known.map(|known| ShardMap::new(0, known.shard_count, bits));
                Replica {
                    node: node.0,
                    shard: shards.map(|map| map.shard_of_partition(partition.0)),
                    address: known.map(|known| known.address.clone()),
                }
            };
            let homes = topology.replicas(partition, namespace.n);
            let preference = topology.preference(partition, namespace.n);
            Copies {
                replicas: homes.iter().map(replica).collect(),
                fallbacks: preference.iter().skip(homes.len()).map(replica).collect(),
            }
        };
        let ring = RingReply::answer(&query, bits, welcome.hash_seed, copies).map_err(bad)?;
        serde_json::to_vec(&ring).map_err(|error| (Status::FAILED, error.to_string()))
    }

    // ---- asking -----------------------------------------------------------------------------

    /// Asks another member to carry out a command; its answer, or that there is none in time, comes
    /// out at the other end. `None`: it cannot be asked, and nothing was begun.
    fn ask_member(
        &mut self,
        node: NodeId,
        deadline: Instant,
        command: &str,
        arguments: &str,
    ) -> Option<Telling> {
        let (tell, telling) = oneshot::channel();
        let mut body = Vec::new();
        Outgoing::Admin(Admin { command, json: arguments }).encode(&mut body);
        let partition = self.map.first_partition();
        let how = (Opcode::Admin, 0);
        self.forward(node, partition, how, &body, deadline, Origin::Task(tell)).ok()?;
        Some(telling)
    }
}

impl super::Replication {
    /// The member that changes namespaces.
    fn lowest(&self) -> NodeId {
        self.topology.nodes().first().map_or(self.topology.own(), |node| node.id)
    }
}

/// A member's own row, with whom it reaches.
fn member_status(json: &[u8], reaches: BTreeSet<u32>) -> Result<Vec<u8>, (Status, String)> {
    let failed = |error: serde_json::Error| (Status::FAILED, error.to_string());
    let status: StatusReply = serde_json::from_slice(json).map_err(failed)?;
    let row = status.nodes.into_iter().next();
    let row = row.ok_or_else(|| (Status::FAILED, "no row".to_owned()))?;
    serde_json::to_vec(&MemberStatus { row, reaches }).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalogue_travels_in_front_of_the_reply() {
        let body = with_catalogue(b"abc", b"{}");
        assert_eq!(without_catalogue(&body), Some((&b"abc"[..], &b"{}"[..])));
        assert_eq!(without_catalogue(&[9, 0, 0, 0, 1]), None);
        assert_eq!(without_catalogue(&[1, 0]), None);
    }
}
