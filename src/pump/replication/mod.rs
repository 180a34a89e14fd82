//! This shard as one of many: it coordinates requests over the replicas of their keys, and it is
//! the replica that other coordinators ask.
//!
//! ```text
//! client's request -> coordinate.rs   plan, apply here, send -> acks -> answer
//! peer's message   -> replica.rs      check, merge or read   -> answer to the peer
//!                     standin.rs      copies for absent homes, as many as there is room for
//! background       -> exchange.rs     announcements, and sync with whoever has what is missing
//!                     repair.rs       replicas that should be equal are compared
//!                     refill.rs       what a damaged disk held comes from others
//!                     gossip.rs       who is there
//! linearizable keys   -> keys.rs      a register each, over its homes
//!                     moves.rs        partitions that move to other members
//! operator's command  -> admin.rs, registers.rs   what all members agree on
//! ```
//!
//! Invariant: nothing is sent from where a message is made; letters are gathered and leave at the
//! end of the turn, so that no handler needs the links. A pump without peers has no such state.

mod admin;
mod coordinate;
mod exchange;
mod forward;
mod gossip;
mod keys;
mod moves;
mod refill;
mod registers;
mod repair;
mod replica;
mod standin;
mod sync;
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use annulus_cluster::coordinator::{Action, Coordinator, CoordinatorOptions};
use annulus_cluster::message::PeerMessage;
use annulus_cluster::moves::plan::Rules;
use annulus_cluster::room::Room;
use annulus_cluster::tracking::{self, PeerShard, Shared, Tracking};
use annulus_cluster::{NodeId, Topology};
use annulus_engine::disk::Disk;
use annulus_engine::model::{Instant, PartitionId, Timestamp};
use annulus_engine::runtime::Runtime;
use annulus_net::wire::status::Status;

use super::{Lane, Links, Origin, Pump, ShardMap, Wires};
use coordinate::Operation;
pub(super) use coordinate::OwnWrite;
use forward::Forwarded;
use gossip::Gossip;
use keys::Keys;
pub(super) use keys::{KeyRead, with_client_record};
use moves::Moves;
pub use moves::Report as MovesReport;
pub(super) use refill::FilledPage;
use refill::Refill;
pub(super) use registers::Changed;
use registers::Registers;
use repair::Repair;
pub use repair::RepairFigures;
pub(super) use sync::MergedPage;
use sync::Session;

/// What a pump of a cluster needs to know.
#[derive(Clone, Debug)]
pub struct ReplicationOptions {
    /// Members and placement.
    pub topology: Rc<Topology>,
    /// Counts the starts of this node, so that peers know its lives apart.
    pub life: u64,
    /// Most bytes of copies that this shard keeps of partitions that it is no home of.
    pub room_bytes_max: u64,
    /// By which partitions move: all of them, but in tests that show what each is for.
    pub rules: Rules,
}

/// A message that leaves at the end of the turn.
struct Letter {
    to: PeerShard,
    lane: Lane,
    bytes: Vec<u8>,
}

impl Letter {
    fn new(to: PeerShard, lane: Lane, message: &PeerMessage<'_>) -> Letter {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        Letter { to, lane, bytes }
    }
}

/// A node that can be reached.
#[derive(Clone, Copy, Debug)]
struct Peer {
    shard_count: u32,
}

/// All that a pump of a cluster has on top.
pub(super) struct Replication {
    topology: Rc<Topology>,
    /// Numbers of copies that it has rings for; empty until the namespaces are known.
    factors: BTreeSet<u8>,
    coordinator: Coordinator<Operation>,
    tracking: Tracking,
    /// This node's start, and how often this shard was opened anew since.
    life: (u64, u64),
    /// Nodes to which a link stands.
    peers: BTreeMap<NodeId, Peer>,
    /// Requests that were handed on to another node.
    forwarded: BTreeMap<u64, Forwarded>,
    sessions: Vec<Session>,
    repair: Repair,
    refill: Refill,
    gossip: Gossip,
    registers: Registers,
    keys: Keys,
    moves: Moves,
    /// For copies of partitions that are not this node's.
    room: Room,
    letters: Vec<Letter>,
    /// What the coordinator decided and the end of the turn carries out.
    actions: Vec<Action>,
    /// Requests to be refused at the end of the turn.
    refusals: Vec<(Origin, Status, &'static str)>,
    /// When requests that were handed on are looked at again.
    next_sweep: Instant,
    next_id: u64,
    next_exchange: Instant,
    /// When everybody is told the settings again.
    next_settings: Instant,
    next_look: Instant,
}

impl Replication {
    pub(super) fn new(
        options: ReplicationOptions,
        cluster: u128,
        map: ShardMap,
        floor: Timestamp,
        now: Instant,
    ) -> Replication {
        let own = options.topology.own();
        let shared = Shared::new(&options.topology, map.own(), map.count());
        let first_id = options.life << 32;
        let registers = Registers::new(&options, cluster, map);
        let mut coordinator = Coordinator::new(own, CoordinatorOptions::default(), first_id);
        for node in options.topology.nodes().iter().filter(|node| node.id != own) {
            coordinator.health_mut().set_linked(node.id, false);
        }
        let keys = Keys::new(options.topology.partition_bits(), floor, first_id);
        let gossip = Gossip::new(&options.topology, options.life, map.own(), now);
        let moves = Moves::new(options.topology.generation(), options.rules, now);
        let mut tracking = Tracking::new(
            own,
            life_of_tracking(options.life, 0),
            tracking::Options::default(),
            shared,
        );
        tracking.set_epoch(moves.confirmed);
        Replication {
            coordinator,
            tracking,
            moves,
            life: (options.life, 0),
            topology: options.topology,
            factors: BTreeSet::new(),
            peers: BTreeMap::new(),
            forwarded: BTreeMap::new(),
            sessions: Vec::new(),
            repair: Repair::new(options.life, now),
            refill: Refill::new(now),
            gossip,
            registers,
            keys,
            room: Room::new(options.room_bytes_max),
            letters: Vec::new(),
            actions: Vec::new(),
            refusals: Vec::new(),
            next_sweep: now,
            next_id: first_id,
            next_exchange: now,
            next_settings: now,
            next_look: now,
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn post(&mut self, to: PeerShard, lane: Lane, message: &PeerMessage<'_>) {
        self.letters.push(Letter::new(to, lane, message));
    }

    fn post_bytes(&mut self, to: PeerShard, lane: Lane, bytes: Vec<u8>) {
        self.letters.push(Letter { to, lane, bytes });
    }

    /// The shard of another node that has the partition, if the node can be reached.
    fn peer_shard(&self, node: NodeId, partition: PartitionId) -> Option<PeerShard> {
        let peer = self.peers.get(&node)?;
        let bits = self.topology.partition_bits();
        let shard = ShardMap::new(0, peer.shard_count, bits).shard_of_partition(partition.0);
        Some(PeerShard { node, shard })
    }
}

/// How often a shard may be opened anew in one start of its node and still count its lives.
const LIVES_OF_A_START: u64 = 64;

/// A start has several lives of a shard: each follows those before, and comes before the next
/// start's.
fn life_of_tracking(start: u64, revivals: u64) -> u64 {
    start * LIVES_OF_A_START + revivals.min(LIVES_OF_A_START - 1)
}

/// How often requests that were handed on are looked at, in nanoseconds.
const SWEEP_NANOS: u64 = 5_000_000;

impl Replication {
    /// When the pump must come round though nothing arrives.
    pub(super) fn next_timeout(&mut self) -> Instant {
        let operations = self.coordinator.next_timeout();
        let forwards = (!self.forwarded.is_empty()).then_some(self.next_sweep);
        let registers = self.registers.next_timeout();
        let keys = self.keys.next_timeout();
        let soonest = operations.into_iter().chain(forwards).chain(registers).chain(keys).min();
        let background = self.next_exchange.min(self.repair.next_timeout());
        let background = self.gossip.next_timeout().map_or(background, |at| at.min(background));
        soonest.map_or(background, |at| at.min(background))
    }

    pub(super) fn topology(&self) -> &Topology {
        &self.topology
    }

    /// How many requests the other replica takes now that takes the most.
    pub(super) fn window(&self) -> Option<u32> {
        self.coordinator.health().window(self.topology.own())
    }

    /// Operations over replicas that are under way.
    pub(super) fn operations(&self) -> usize {
        self.coordinator.len()
    }

    /// Whether nobody waits for another node.
    pub(super) fn is_idle(&self) -> bool {
        self.forwarded.is_empty()
            && self.actions.is_empty()
            && self.coordinator.is_empty()
            && self.registers.is_idle()
            && self.keys.is_idle()
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// The shard was opened anew, which to the other replicas is a restart: what was not on disk
    /// is gone, purge floors are not known to it, gaps may have opened. So tracking begins a new
    /// life, and others tell it everything again.
    pub(super) fn replicate_anew(&mut self) {
        let (own_shard, shard_count) = (self.map.own(), self.map.count());
        let Some(replication) = &mut self.replication else { return };
        let shared = Shared::new(&replication.topology, own_shard, shard_count);
        // What is on its way for them merges into the shard of before, which takes nothing.
        replication.sessions.clear();
        replication.life.1 += 1;
        let (start, revivals) = replication.life;
        if revivals >= LIVES_OF_A_START {
            // Out of numbers: floors are told anew, and what was known stays.
            replication.tracking.set_shared(shared);
        } else {
            let (own, life) = (replication.topology.own(), life_of_tracking(start, revivals));
            replication.tracking = Tracking::new(own, life, tracking::Options::default(), shared);
            replication.tracking.set_epoch(replication.moves.confirmed);
        }
        self.count_room();
        self.forget_promises();
    }

    /// The end of a turn: what was decided is carried out, and all letters leave.
    pub(super) fn replicate(&mut self, wires: &mut dyn Wires, links: &mut dyn Links) -> bool {
        let mut worked = self.act(wires);
        worked |= self.keys_turn(wires);
        worked |= self.registers_turn();
        self.exchange_turn();
        self.moves_turn();
        self.repair_turn();
        self.gossip_turn();
        let now = self.now;
        let Some(replication) = &mut self.replication else { return worked };
        if now >= replication.next_sweep {
            replication.next_sweep = now.after_nanos(SWEEP_NANOS);
            worked |= self.expire_forwards(None, wires);
        }
        let Some(replication) = &mut self.replication else { return worked };
        for Letter { to, lane, bytes } in replication.letters.drain(..) {
            worked = true;
            // A letter that is lost is what every exchange survives.
            let _ = links.send(to, lane, &bytes);
        }
        worked
    }
}
