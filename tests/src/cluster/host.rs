//! One shard of one node: its disk, its pump, and what has arrived for it.
//!
//! Invariant: the pump is the one of production, and is called as the thread of a shard calls it:
//! one turn at a time, inputs first. What a turn gives out is handed to the caller; nothing
//! arrives anywhere within the same turn.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::rc::Rc;

use annulus::metrics::ShardSnapshot;
use annulus::namespaces::Catalogue;
use annulus::pump::{
    ConnectionKey, Lane, Message, Pump, PumpOptions, ReplicationOptions, ShardMap, Verdict,
    Wires as _,
};
use annulus_cluster::moves::plan::Rules;
use annulus_cluster::tracking::PeerShard;
use annulus_cluster::{NodeId, Topology};
use annulus_engine::Result;
use annulus_engine::disk::Disk as _;
use annulus_engine::identity::Identity;
use annulus_engine::model::causality::ContextSecret;
use annulus_engine::model::{Instant, WallMicros};
use annulus_engine::options::Options;
use annulus_engine::runtime::{Class, Runtime as _};
use annulus_engine::shard::Shard;
use annulus_engine::sim::{Chance, SimDisk, SimDiskOptions, SimExecutor, SimRuntime};
use annulus_net::server_connection::{ConnectionOptions, ServerFacts};
use annulus_net::wire::hello::{Limits, VERSION, Welcome};

use super::desk::{DeskOf, Generations, SharedDesk, SimDesk};
use super::wires::{Input, SimLinks, SimMesh, SimWires};
use crate::history::origin_of;
use crate::network::{Parcel, Place};
use crate::workload::HASH_SEED;

/// Longest time from the beginning of a clean stop to its end, in nanoseconds.
const DRAIN_NANOS: u64 = 10_000_000_000;
/// Signs contexts on all nodes.
pub(super) const SECRET: ContextSecret = ContextSecret([3, 4]);
/// Id of the cluster.
pub(super) const CLUSTER: u128 = 7;

pub(super) type SimShard = Shard<SimDisk, SimRuntime>;
type SimPump = Pump<SimDisk, SimRuntime>;
/// Where a task leaves what it came to.
type Slot<T> = Rc<RefCell<Option<T>>>;

/// How far the shard is.
enum Stage {
    Down,
    Opening(Slot<Result<(SimShard, Rc<SimDesk>)>>),
    Up(Box<SimPump>),
    Draining(Box<SimPump>, Instant),
    Closing(Slot<Result<()>>),
}

/// What happened to a host's stage.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Opened,
    /// With the error.
    NotOpened(String),
    /// Whether its log was closed in good order.
    Stopped(bool),
}

/// What all hosts of a cluster share.
pub(super) struct Common {
    pub(super) shards: u32,
    pub(super) options: Options,
    /// Of copies that a shard keeps for others.
    pub(super) room_bytes_max: u64,
    /// By which partitions move.
    pub(super) rules: Rules,
    /// By node, what it begins with on a new disk; none for one that has not joined.
    pub(super) catalogues: Vec<Option<Rc<Catalogue>>>,
    /// Of the catalogues of all nodes, ever.
    pub(super) generations: Rc<RefCell<Generations>>,
}

/// What a turn gave out.
#[derive(Default)]
pub(super) struct TurnOutput {
    pub(super) bytes: Vec<(ConnectionKey, Vec<u8>)>,
    pub(super) closed: Vec<ConnectionKey>,
    pub(super) mesh: Vec<(u32, Message)>,
    /// Its node has learned that it is no member any more.
    pub(super) is_removed: bool,
    pub(super) letters: Vec<(PeerShard, Lane, Vec<u8>)>,
}

/// One shard of one node.
pub(super) struct Host {
    pub(super) place: Place,
    /// Of the executor.
    pub(super) group: u32,
    pub(super) runtime: SimRuntime,
    pub(super) disk: SimDisk,
    stage: Stage,
    /// Of its node, while the shard is up, and how often its catalogue had changed when the pump
    /// was told of it.
    desk: Option<(Rc<SimDesk>, u64)>,
    inputs: VecDeque<Input>,
    mesh: VecDeque<Message>,
    parcels: VecDeque<Parcel>,
    wires: SimWires,
    /// Nodes that the pump knows to be reachable.
    links: BTreeSet<NodeId>,
    /// Which life of its node this is.
    pub(super) life: u64,
    /// When its disk was new.
    created: WallMicros,
    /// A turn may have something to do.
    pub(super) dirty: bool,
    /// When the pump wants to be called though nothing arrives.
    pub(super) timeout: Option<Instant>,
}

impl Host {
    /// A shard on a new disk, down; its node has had so many lives.
    pub(super) fn new(
        place: Place,
        group: u32,
        executor: &SimExecutor,
        disk: SimDiskOptions,
        life: u64,
    ) -> Host {
        let runtime = executor.runtime_of(group);
        // True time, whatever the node's own clock says.
        let created = WallMicros(1 + runtime.now().0 / 1000);
        let disk = SimDisk::new(&runtime, disk);
        Host {
            place,
            group,
            runtime,
            disk,
            stage: Stage::Down,
            desk: None,
            inputs: VecDeque::new(),
            mesh: VecDeque::new(),
            parcels: VecDeque::new(),
            wires: SimWires::default(),
            links: BTreeSet::new(),
            life,
            created,
            dirty: false,
            timeout: None,
        }
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self.stage, Stage::Down)
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Up(_))
    }

    pub(super) fn shard(&self) -> Option<SimShard> {
        match &self.stage {
            Stage::Up(pump) => Some(pump.shard().clone()),
            _ => None,
        }
    }

    pub(super) fn snapshot(&self) -> Option<ShardSnapshot> {
        match &self.stage {
            Stage::Up(pump) => Some(pump.snapshot()),
            _ => None,
        }
    }

    /// Where it stands with the moves of partitions.
    pub(super) fn describe_moves(&self) -> String {
        match &self.stage {
            Stage::Up(pump) => pump.describe_moves(),
            _ => "not up".to_owned(),
        }
    }

    pub(super) fn start_repair(&mut self, scrub: bool) {
        if let Stage::Up(pump) = &mut self.stage {
            pump.tick(self.runtime.now());
            pump.start_repair(None, scrub);
            self.dirty = true;
        }
    }

    /// The namespaces as its node has them; none if it does not serve.
    pub(super) fn catalogue(&self) -> Option<Rc<Catalogue>> {
        self.desk.as_ref().map(|(desk, _)| desk.shared_catalogue())
    }

    /// Begins to open the shard; the first to come opens the node's desk, on its first disk.
    pub(super) fn start(&mut self, common: &Common, shared: &SharedDesk, desk_disk: &SimDisk) {
        assert!(self.is_down(), "a shard is started when it is down");
        self.life += 1;
        let slot = Slot::default();
        let (disk, runtime) = (self.disk.clone(), self.runtime.clone());
        let identity = Identity { created: self.created, ..identity(self.place, common) };
        let options = common.options;
        let (told, shared) = (Rc::clone(&slot), Rc::clone(shared));
        let owner = (node_id(self.place.node), desk_disk.clone());
        let first = common.catalogues[self.place.node as usize].clone();
        let first = first.expect("only members are started");
        let generations = Rc::clone(&common.generations);
        self.runtime.spawn(Class::Foreground, async move {
            let open = async {
                let shard = open(disk, runtime, &identity, options).await?;
                let desk = SimDesk::open(&shared, owner, &first, generations).await?;
                Ok((shard, desk))
            };
            let opened = open.await;
            *told.borrow_mut() = Some(opened);
        });
        self.stage = Stage::Opening(slot);
    }

    /// Ends at once; what was under way inside is lost. Connections that it had are given back.
    pub(super) fn end(&mut self, executor: &SimExecutor) -> Vec<ConnectionKey> {
        (self.stage, self.desk) = (Stage::Down, None);
        executor.kill_group(self.group);
        self.inputs.clear();
        self.mesh.clear();
        self.parcels.clear();
        self.links.clear();
        (self.dirty, self.timeout) = (false, None);
        std::mem::take(&mut self.wires).keys()
    }

    /// Begins a clean stop.
    pub(super) fn drain(&mut self) {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Down) {
            Stage::Up(mut pump) => {
                pump.drain(&mut self.wires);
                Stage::Draining(pump, self.runtime.now().after_nanos(DRAIN_NANOS))
            }
            other => other,
        };
        self.dirty = true;
    }

    /// Looks whether a task of the stage has ended.
    pub(super) fn look(&mut self, common: &Common) -> Option<Change> {
        match &self.stage {
            Stage::Opening(slot) => {
                let opened = slot.borrow_mut().take()?;
                match opened {
                    Ok((shard, desk)) => {
                        let options = self.pump_options(common, &desk);
                        let mut pump = Pump::new(shard, self.runtime.clone(), options);
                        pump.set_catalogue(desk.shared_catalogue());
                        self.desk = Some((Rc::clone(&desk), desk.changes()));
                        self.stage = Stage::Up(Box::new(pump));
                        self.dirty = true;
                        Some(Change::Opened)
                    }
                    Err(error) => {
                        self.stage = Stage::Down;
                        Some(Change::NotOpened(error.to_string()))
                    }
                }
            }
            Stage::Closing(slot) => {
                let closed = slot.borrow_mut().take()?;
                Some(Change::Stopped(closed.is_ok()))
            }
            Stage::Down | Stage::Up(_) | Stage::Draining(..) => None,
        }
    }

    /// One that is going down takes nothing more.
    pub(super) fn takes_input(&self) -> bool {
        matches!(self.stage, Stage::Up(_) | Stage::Draining(..))
    }

    pub(super) fn push_input(&mut self, input: Input) {
        self.inputs.push_back(input);
        self.dirty = true;
    }

    pub(super) fn push_mesh(&mut self, message: Message) {
        self.mesh.push_back(message);
        self.dirty = true;
    }

    pub(super) fn push_parcel(&mut self, parcel: Parcel) {
        self.parcels.push_back(parcel);
        self.dirty = true;
    }

    pub(super) fn mesh_waiting(&self) -> usize {
        self.mesh.len()
    }

    /// One turn of the shard's loop.
    /// `reachable`: the nodes to which links stand.
    pub(super) fn turn(
        &mut self,
        mesh_waiting: &[usize],
        reachable: &BTreeSet<NodeId>,
        shards: u32,
        chance: &mut Chance,
    ) -> TurnOutput {
        let (pump, drain_until) = match &mut self.stage {
            Stage::Up(pump) => (pump, None),
            Stage::Draining(pump, until) => (pump, Some(*until)),
            Stage::Down | Stage::Opening(_) | Stage::Closing(_) => {
                self.dirty = false;
                return TurnOutput::default();
            }
        };
        let now = self.runtime.now();
        pump.tick(now);
        if let Some((desk, told)) = &mut self.desk
            && *told != desk.changes()
        {
            *told = desk.changes();
            pump.set_catalogue(desk.shared_catalogue());
        }
        let is_removed = pump.is_removed();
        for input in self.inputs.drain(..) {
            take_input(pump, &mut self.wires, input);
        }
        for (key, bytes) in self.wires.take_resumed() {
            take_input(pump, &mut self.wires, Input::Bytes(key, bytes));
        }
        for message in self.mesh.drain(..) {
            pump.message(message, &mut self.wires);
        }
        for node in self.links.symmetric_difference(reachable).copied().collect::<Vec<_>>() {
            match reachable.contains(&node) {
                true => pump.peer_up(node, shards),
                false => pump.peer_down(node),
            }
        }
        self.links.clone_from(reachable);
        for Parcel { from, bytes, .. } in self.parcels.drain(..) {
            let from = PeerShard { node: node_id(from.node), shard: from.shard };
            pump.peer_message(from, &bytes, &mut self.wires);
        }
        let mut mesh = SimMesh { waiting: mesh_waiting, sent: Vec::new(), chance };
        let mut links = SimLinks { up: reachable, sent: Vec::new() };
        let worked = pump.turn(&mut self.wires, &mut mesh, &mut links);
        let (sent, letters) = (mesh.sent, links.sent);
        pump.end_turn();
        self.dirty = worked;
        self.timeout = pump.next_timeout();
        let (bytes, closed) = self.wires.flush();
        let ready = drain_until.is_some_and(|until| pump.is_idle() || now >= until);
        if let Some(until) = drain_until {
            self.timeout = Some(self.timeout.map_or(until, |timeout| timeout.min(until)));
        }
        if ready {
            self.close();
        }
        TurnOutput { bytes, closed, mesh: sent, is_removed, letters }
    }

    fn close(&mut self) {
        let Stage::Draining(pump, _) = std::mem::replace(&mut self.stage, Stage::Down) else {
            return;
        };
        let shard = pump.shard().clone();
        drop(pump);
        let slot = Slot::default();
        let told = Rc::clone(&slot);
        self.runtime.spawn(Class::Foreground, async move {
            let closed = shard.close().await;
            drop(shard);
            *told.borrow_mut() = Some(closed);
        });
        (self.stage, self.timeout, self.dirty) = (Stage::Closing(slot), None, false);
    }

    fn pump_options(&self, common: &Common, desk: &Rc<SimDesk>) -> PumpOptions {
        let Identity { shard_count, partition_bits, hash_seed, node, cluster, .. } =
            identity(self.place, common);
        let welcome = Welcome {
            version: VERSION,
            partition_bits: u8::try_from(partition_bits).expect("at most 16"),
            shard_count,
            shard: self.place.shard,
            node,
            features: 0,
            cluster,
            hash_seed,
            map_version: 1,
            wall_us: 0,
            limits: Limits::default(),
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: Vec::new(),
        };
        PumpOptions {
            facts: ServerFacts { welcome, options: ConnectionOptions::default() },
            map: ShardMap::new(self.place.shard, shard_count, partition_bits),
            secret: SECRET,
            catalogue: desk.shared_catalogue(),
            message_memory: 4 << 20,
            desk: Rc::new(DeskOf(Rc::clone(desk))),
            replication: desk.shared_catalogue().map().map(|map| {
                let topology = Topology::of_map(node_id(self.place.node), map, [1]);
                ReplicationOptions {
                    topology: Rc::new(topology.expect("a few equal members have a ring")),
                    life: self.life,
                    room_bytes_max: common.room_bytes_max,
                    rules: common.rules,
                }
            }),
        }
    }
}

/// Opens a shard, on a new disk too.
async fn open(
    disk: SimDisk,
    runtime: SimRuntime,
    identity: &Identity,
    options: Options,
) -> Result<SimShard> {
    disk.create_dir(Path::new("data")).await?;
    disk.sync_dir(Path::new("")).await?;
    let dir = Path::new("data").join(format!("shard-{:03}", identity.shard));
    Shard::open(disk, runtime, &dir, identity, options, None).await
}

/// A node's number among the members: from 1.
pub(super) fn node_id(node: u32) -> NodeId {
    NodeId(origin_of(node).0)
}

/// Who a shard is.
pub(super) fn identity(place: Place, common: &Common) -> Identity {
    Identity {
        cluster: CLUSTER,
        node: origin_of(place.node),
        shard: place.shard,
        shard_count: common.shards,
        hash_seed: HASH_SEED,
        partition_bits: common.options.partition_bits,
        created: WallMicros(1),
    }
}

fn take_input(pump: &mut SimPump, wires: &mut SimWires, input: Input) {
    match input {
        Input::Opened(key) => {
            wires.open(key);
            pump.accepted(key);
        }
        Input::Closed(key) => {
            wires.forget(key);
            pump.closed(key);
        }
        Input::Bytes(key, bytes) => {
            let Some(bytes) = wires.hold(key, bytes) else { return };
            if !wires.is_open(key) {
                return;
            }
            let unsent = wires.unsent(key);
            let Some(out) = wires.out(key) else { return };
            match pump.received(key, &bytes, out, unsent) {
                Verdict::Keep => {}
                Verdict::Pause => wires.pause(key),
                Verdict::Close => {
                    pump.closed(key);
                    wires.close(key);
                }
                Verdict::HandOver { .. } => unreachable!("clients ask for any shard"),
            }
        }
    }
}
