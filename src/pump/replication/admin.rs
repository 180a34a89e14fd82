//! What an operator asks of the whole cluster, whichever member he asks: the namespaces, the
//! placement, one row a member.
//!
//! ```text
//! ns.create/set/drop  the register of namespaces: registers.rs. When it is changed:
//!                     -> ns.adopt to all that can be reached -> their answers, or 2 s
//!                     <- the reply; adopted here before the client hears of it
//! status              own row, and the row of each that can be reached (Forward), or 1 s
//! ring                from the topology that every member computes alike
//! ```
//!
//! Invariant: a client that was told of a change finds it at the member that told him. What is not
//! known of a member is said to be unknown, never guessed.

use std::collections::BTreeSet;

use annulus_cluster::moves::MemberState;
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

use crate::commands::{
    Command, Copies, MemberFacts, MemberStatus, Replica, RingQuery, RingReply, StatusReply,
};
use crate::member_commands::is_for_clients;
use crate::namespaces::DEFAULT_NAME;
use crate::pump::{Answer, Done, Origin, Pump, ShardMap, Wires};

/// Between members only: takes over the catalogue in the arguments, in base64.
const ADOPT: &str = "ns.adopt";
/// How long a member's row is waited for, in nanoseconds.
const STATUS_NANOS: u64 = 1_000_000_000;

/// What a member answered: status and body.
pub(in crate::pump) type Told = (Status, Vec<u8>);
pub(super) type Telling = oneshot::Receiver<Told>;

fn changes_namespaces(command: &str) -> bool {
    matches!(command, "ns.create" | "ns.set" | "ns.drop")
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
        if self.replication.is_none() {
            return Err(origin);
        }
        match command {
            _ if changes_namespaces(command) || is_for_clients(command) => {
                self.change_namespaces(origin, deadline, command, arguments);
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
            _ => {
                let failure = Failure::new(Status::UNSUPPORTED, "not handed on between nodes");
                self.answer(origin, &Answer::Failure(failure), wires);
            }
        }
    }

    // ---- namespaces -------------------------------------------------------------------------

    /// Has all that can be reached take over this node's catalogue; ends with each one's answer.
    pub(super) fn tell_catalogue(&mut self, deadline: Instant) -> Vec<Telling> {
        let arguments = STANDARD.encode(self.desk.catalogue().encode());
        let Some(replication) = &self.replication else { return Vec::new() };
        let others: Vec<NodeId> = replication.peers.keys().copied().collect();
        let ask = |node| self.ask_member(node, deadline, ADOPT, &arguments);
        others.into_iter().filter_map(ask).collect()
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
        let partitions_left = self.catalogue.map().map_or(0, |map| map.partitions_left());
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
                .map(|own| StatusReply { partitions_left, ..own.with_members(&members, &told) })
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
                changing: self
                    .catalogue
                    .map()
                    .and_then(|map| map.member(node.id))
                    .filter(|member| member.state != MemberState::Up)
                    .map(|member| member.state.name()),
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

/// A member's own row, with whom it reaches.
fn member_status(json: &[u8], reaches: BTreeSet<u32>) -> Result<Vec<u8>, (Status, String)> {
    let failed = |error: serde_json::Error| (Status::FAILED, error.to_string());
    let status: StatusReply = serde_json::from_slice(json).map_err(failed)?;
    let row = status.nodes.into_iter().next();
    let row = row.ok_or_else(|| (Status::FAILED, "no row".to_owned()))?;
    serde_json::to_vec(&MemberStatus { row, reaches }).map_err(failed)
}
