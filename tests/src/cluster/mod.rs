//! `SimCluster`: whole nodes, with production's pump, connections and engine, on simulated disks
//! and a simulated network, in one thread from one seed.
//!
//! Invariant: the same options and the same calls of its verbs give the same history. Everything
//! that happens is a step of [`SimCluster::drive`]: one poll of a task, one turn of a pump, one
//! arrival, one act of a client, in an order that the seed decides.
//!
//! ```text
//! client -- ClientConnection -- bytes in pieces -- ServerConnection -- pump -- shard -- SimDisk
//!                                       mesh of the node <-- pump --> Network, other nodes
//! ```
//!
//! `host.rs` is one shard, `desk.rs` what a node's shards share, `wires.rs` the connections,
//! `client.rs` the clients, `operator.rs` who changes namespaces, `book.rs` what clients saw, `drive.rs` the loop. Nodes have numbers from 0; as origins of writes, from 1.

mod book;
mod client;
mod desk;
mod drive;
mod host;
mod operator;
mod wires;

use std::collections::BTreeMap;
use std::rc::Rc;

use annulus::config::Compression;
use annulus::member_commands;
use annulus::metrics::ShardSnapshot;
use annulus::namespaces::{Catalogue, Level as NamespaceLevel, Mode as NamespaceMode, Settings};
use annulus::pump::ConnectionKey;
use annulus_cluster::membership::{MemberView, Status};
use annulus_cluster::moves::ClusterMap;
use annulus_cluster::moves::plan::Rules as MoveRules;
use annulus_cluster::{NodeInfo, Topology, Weight};
use annulus_engine::model::{Instant, NamespaceId, PartitionId, RecordRef};
use annulus_engine::options::{Durability, Options};
use annulus_engine::runtime::{Class, Runtime as _};
use annulus_engine::shard::ScanRequest;
use annulus_engine::shard::Shard;
use annulus_engine::sim::{Chance, Fault, Rule, SimDisk, SimDiskOptions, SimExecutor, SimRuntime};
use annulus_net::wire::status::Status as ReplyStatus;

use crate::calls::CallMix;
use crate::checker::{self, Dump, Violation};
use crate::history::{History, Mark, Mode, Rules};
use crate::network::{Network, Place, Weather};
use crate::store::tiny_options;
use book::Book;
use client::Client;
use desk::SharedDesk;
use host::{Common, Host};
use operator::Operator;
use wires::Streams;

/// The namespace in which the last write wins.
pub const LWW: NamespaceId = NamespaceId(0);
/// The namespace that keeps siblings.
pub const SIBLINGS: NamespaceId = NamespaceId(1);

/// The namespace whose keys are linearizable registers. There only if the mix of calls asks for it.
pub const REGISTERS: NamespaceId = NamespaceId(2);

/// Time for the final reads, in nanoseconds.
const AUDIT_NANOS: u64 = 120_000_000_000;

/// What a cluster is like.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Everything follows from it.
    pub seed: u64,
    /// Nodes that the cluster is founded with. More than one needs a pump that replicates.
    pub nodes: u32,
    /// Nodes that may join later.
    pub spares: u32,
    /// By which partitions move.
    pub rules: MoveRules,
    /// Shards of each.
    pub shards: u32,
    /// Copies of each record, at most `nodes`.
    pub replicas: u8,
    /// Whether writes are synced before they are acknowledged, or within a window.
    pub durability: Durability,
    /// Most bytes of copies that a shard keeps of partitions that are not its node's.
    pub room_bytes_max: u64,
    /// Longest time of an operation of a disk, in nanoseconds. What takes long is often
    /// interrupted.
    pub disk_nanos_max: u64,
    /// Of the network.
    pub weather: Weather,
    /// Clients.
    pub clients: u32,
    /// Who creates and drops namespaces meanwhile.
    pub operators: u32,
    /// What they ask.
    pub mix: CallMix,
    /// Their longest pause between two calls, in nanoseconds.
    pub pause_max: u64,
}

/// A node.
struct Node {
    hosts: Vec<Host>,
    /// Its wall clock against true time, in microseconds.
    wall_offset: i64,
    paused: bool,
    /// It should run: a start has been asked for and no end.
    wanted: bool,
    /// Its disks may fail, so that it may not start.
    ailing: bool,
    /// Since when a disk of it has been slow or failing.
    disk_trouble: Option<Instant>,
    /// When it last changed: start, end, pause, going on, trouble of its disk.
    disturbed: Instant,
    /// The longest that an operation of a troubled disk may take, in nanoseconds.
    disk_delay: u64,
    /// When it was last paused or resumed.
    paused_at: Instant,
}

/// Where a connection leads.
#[derive(Clone, Copy, Debug)]
struct Route {
    client: u32,
    place: Place,
}

/// See the module.
pub struct SimCluster {
    executor: SimExecutor,
    chance: Chance,
    common: Common,
    nodes: Vec<Node>,
    network: Network,
    streams: Streams,
    routes: BTreeMap<ConnectionKey, Route>,
    clients: Vec<Client>,
    operators: Vec<Operator>,
    /// Who changes members; none where nobody does.
    steward: Option<usize>,
    /// The catalogues that were looked at for new and removed members.
    tended: usize,
    /// Nodes that were asked to join, so far.
    asked: u32,
    mix: CallMix,
    replicas: u8,
    /// When the last operation of a slow disk will have ended, as far as known.
    settles_at: Instant,
    disk_nanos_max: u64,
    book: Book,
    /// Promises broken outside of histories.
    broken: Vec<Violation>,
    /// What happened to the nodes, for people.
    diary: Vec<(Instant, String)>,
    turns: u64,
}

impl SimCluster {
    /// A cluster of nodes that are down, on empty disks.
    ///
    /// # Panics
    /// When the namespaces cannot be made.
    #[must_use]
    pub fn new(options: &ClusterOptions) -> SimCluster {
        let mut chance = Chance::new(options.seed ^ 0xC105_7E40);
        let executor = SimExecutor::new(chance.next_u64());
        let mut engine = Options { partition_bits: 3, ..tiny_options() };
        engine.log.durability = options.durability;
        engine.replicated = options.nodes > 1;
        let first = Rc::new(catalogue(options, engine.partition_bits));
        let all = options.nodes + options.spares;
        let common = Common {
            shards: options.shards,
            options: engine,
            room_bytes_max: options.room_bytes_max,
            rules: options.rules,
            catalogues: (0..all).map(|it| (it < options.nodes).then(|| first.clone())).collect(),
            generations: Rc::default(),
        };
        common.generations.borrow_mut().note(host::node_id(0), &first);
        let mut group = 0;
        let mut host = |node, shard, chance: &mut Chance| {
            let seed = chance.next_u64();
            let disk = disk_options(seed, options.disk_nanos_max);
            let host = Host::new(Place { node, shard }, group, &executor, disk, 0);
            group += 1;
            host
        };
        let nodes = (0..all)
            .map(|node| Node {
                hosts: (0..options.shards).map(|shard| host(node, shard, &mut chance)).collect(),
                wall_offset: 0,
                paused: false,
                wanted: false,
                ailing: false,
                disk_trouble: None,
                disturbed: Instant(0),
                disk_delay: 0,
                paused_at: Instant(0),
            })
            .collect();
        let now = executor.runtime().now();
        let clients = (0..options.clients)
            .map(|number| {
                let (seed, pause_max) = (chance.next_u64(), options.pause_max);
                Client::new(number, all, seed, &options.mix, pause_max, now)
            })
            .collect();
        let mut operators: Vec<Operator> = (0..options.operators)
            .map(|index| Operator::new(index, all, chance.next_u64(), now))
            .collect();
        let steward = (options.spares > 0).then_some(operators.len());
        if steward.is_some() {
            operators.push(Operator::steward(options.operators, all, chance.next_u64(), now));
        }
        let mut book = Book::default();
        let window_nanos = match options.durability {
            Durability::Sync => 0,
            // The disk takes its time: for the write, for a sync that is under way when the window
            // has passed, and for the one after it; each of two segments at most. The segments of
            // stories are tiny, and what comes in while one is made, which takes six operations, may
            // fill it and have to wait for the next (members 1493).
            Durability::Periodic { window_ms } => {
                (window_ms + 100) * 1_000_000 + (5 + 2 * 6) * options.disk_nanos_max
            }
        };
        let rules = |mode| Rules {
            replicas: options.replicas,
            wall_at_zero_us: executor.runtime().true_wall().0 - now.0 / 1000,
            window_nanos,
            ..Rules::of(mode)
        };
        book.add_namespace(LWW, rules(Mode::Lww));
        book.add_namespace(SIBLINGS, rules(Mode::Siblings));
        book.add_namespace(REGISTERS, rules(Mode::Register));
        SimCluster {
            network: Network::new(chance.next_u64(), options.weather),
            streams: Streams::new(chance.next_u64(), 400_000),
            routes: BTreeMap::new(),
            executor,
            chance,
            common,
            nodes,
            clients,
            operators,
            steward,
            tended: 0,
            asked: options.nodes,
            mix: options.mix.clone(),
            replicas: options.replicas,
            settles_at: now,
            disk_nanos_max: options.disk_nanos_max,
            book,
            broken: Vec::new(),
            diary: Vec::new(),
            turns: 0,
        }
    }

    /// Virtual time.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.executor.runtime().now()
    }

    /// How many nodes there are.
    #[must_use]
    pub fn node_count(&self) -> u32 {
        u32::try_from(self.nodes.len()).expect("a few nodes")
    }

    /// The newest map of members that any node has; none in a cluster of one.
    #[must_use]
    pub fn map(&self) -> Option<ClusterMap> {
        self.common.generations.borrow().newest()?.map().cloned()
    }

    /// Nodes that are members now, by number.
    #[must_use]
    pub fn member_numbers(&self) -> Vec<u32> {
        match self.map() {
            Some(map) => map.members.iter().map(|member| member.info.id.0 - 1).collect(),
            None => vec![0],
        }
    }

    /// Where each shard stands with the moves of partitions, for people.
    #[must_use]
    pub fn describe_moves(&self) -> String {
        let hosts = self.nodes.iter().flat_map(|node| &node.hosts);
        hosts.map(|host| format!("{:?}: {}\n", host.place, host.describe_moves())).collect()
    }

    /// Has a change of members made, by whoever does that: one after the other, until each is
    /// answered.
    pub fn change_members(&mut self, command: &'static str, arguments: String) {
        let now = self.now();
        if let Some(steward) = self.steward {
            self.operators[steward].ask(command, arguments, now);
        }
    }

    /// Lets the next spare node join. Nothing if there is none.
    pub fn join_next(&mut self) {
        if self.asked >= self.node_count() {
            return;
        }
        let peer = format!("node-{}:1", self.asked);
        self.asked += 1;
        let (dc, rack) = ("dc".to_owned(), "rack".to_owned());
        let join = member_commands::Join { peer, dc, rack, weight: Weight::ONE.0 };
        let arguments = serde_json::to_string(&join).expect("plain text");
        self.change_members(member_commands::JOIN, arguments);
    }

    /// Lets a node leave, if it is a member.
    pub fn leave(&mut self, node: u32) {
        self.change_members(member_commands::LEAVE, which(node));
    }

    /// Gives a node up: what it alone has is lost.
    pub fn replace(&mut self, node: u32) {
        let at = self.now().0;
        self.book.mark(Mark::DiskLost { node, at });
        self.change_members(member_commands::REPLACE, which(node));
    }

    /// No more changes of members are asked for; one that is under way goes on.
    pub fn end_changes(&mut self) {
        if let Some(steward) = self.steward {
            self.operators[steward].forget_script();
        }
    }

    /// Starts nodes that have joined, and takes note of those that are removed.
    fn tend(&mut self) {
        let count = self.common.generations.borrow().count();
        if self.steward.is_none() || count == self.tended {
            return;
        }
        self.tended = count;
        let newest = self.common.generations.borrow().newest();
        let Some(newest) = newest.map(Rc::new) else { return };
        let Some(map) = newest.map() else { return };
        let at = self.now().0;
        self.note(format!("map {}", summary(map)));
        for node in 0..self.node_count() {
            let first = &mut self.common.catalogues[node as usize];
            if first.is_none() && map.member(host::node_id(node)).is_some() {
                *first = Some(Rc::clone(&newest));
                self.note(format!("node {node} has joined"));
                self.start(node);
            } else if map.is_removed(host::node_id(node)) {
                // Whatever it has acknowledged alone until now is gone with it.
                self.book.mark(Mark::DiskLost { node, at });
            }
        }
    }

    /// The network between the nodes.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    /// The disk of a shard, as it is now: a crash gives it another.
    #[must_use]
    pub fn disk(&self, node: u32, shard: u32) -> &SimDisk {
        &self.nodes[node as usize].hosts[shard as usize].disk
    }

    /// The engine behind a shard that serves.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn shard(&self, node: u32, shard: u32) -> Shard<SimDisk, SimRuntime> {
        self.nodes[node as usize].hosts[shard as usize].shard().expect("a shard that serves")
    }

    /// The numbers of a shard that serves.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn numbers(&self, node: u32, shard: u32) -> ShardSnapshot {
        self.nodes[node as usize].hosts[shard as usize].snapshot().expect("a shard that serves")
    }

    /// Runs something of the engine's to its end, beside everything else.
    pub fn run<T>(&self, task: impl Future<Output = T>) -> T {
        self.executor.run(task)
    }

    /// The clock of everything.
    #[must_use]
    pub fn runtime(&self) -> SimRuntime {
        self.executor.runtime()
    }

    /// Lets a node compare everything with the others, and read everything if `scrub`.
    pub fn start_repair(&mut self, node: u32, scrub: bool) {
        self.nodes[node as usize].hosts.iter_mut().for_each(|host| host.start_repair(scrub));
    }

    /// Whether all shards of the node serve.
    #[must_use]
    pub fn is_up(&self, node: u32) -> bool {
        self.nodes[node as usize].hosts.iter().all(Host::is_up)
    }

    /// Whether no shard of the node runs.
    #[must_use]
    pub fn is_down(&self, node: u32) -> bool {
        self.nodes[node as usize].hosts.iter().all(Host::is_down)
    }

    /// Writes something into the diary.
    pub fn note(&mut self, what: String) {
        self.diary.push((self.now(), what));
    }

    /// What happened to the nodes.
    #[must_use]
    pub fn diary(&self) -> &[(Instant, String)] {
        &self.diary
    }

    /// Turns of all pumps so far: equal in two runs of one seed.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Answers so far, by status.
    #[must_use]
    pub fn answers(&self) -> &BTreeMap<ReplyStatus, u64> {
        &self.book.answers
    }

    /// The histories so far, by namespace.
    pub fn histories(&self) -> impl Iterator<Item = (NamespaceId, &History)> {
        self.book.histories()
    }

    /// Begins to start a node. Nothing if it runs.
    pub fn start(&mut self, node: u32) {
        let now = self.now();
        if !self.member_numbers().contains(&node) || self.common.catalogues[node as usize].is_none()
        {
            return;
        }
        let (node, common) = (&mut self.nodes[node as usize], &self.common);
        if node.hosts.iter().all(Host::is_down) {
            node.wanted = true;
            node.disturbed = now;
            let (shared, disk) = (SharedDesk::default(), node.hosts[0].disk.clone());
            node.hosts.iter_mut().for_each(|host| host.start(common, &shared, &disk));
        }
    }

    /// Begins to stop a node cleanly. Nothing if it does not serve.
    pub fn stop(&mut self, node: u32) {
        let now = self.now();
        if self.is_up(node) {
            let node = &mut self.nodes[node as usize];
            node.wanted = false;
            node.disturbed = now;
            node.hosts.iter_mut().for_each(Host::drain);
        }
    }

    /// Cuts a node's power: what was not synced is lost, torn, or kept, each shard's on its own.
    /// Nothing if it is down.
    pub fn crash(&mut self, node: u32) {
        if self.is_down(node) {
            return;
        }
        self.end(node);
        let seed = self.chance.next_u64();
        for (index, host) in (0..).zip(&mut self.nodes[node as usize].hosts) {
            host.disk = host.disk.crash_onto(&host.runtime, seed ^ index);
        }
    }

    /// Kills a node's process: what it had written is there, synced or not. Nothing if it is down.
    pub fn kill(&mut self, node: u32) {
        if self.is_down(node) {
            return;
        }
        self.end(node);
        for host in &mut self.nodes[node as usize].hosts {
            host.disk = host.disk.fork_onto(&host.runtime);
        }
    }

    /// Takes a node's disks away for ever; it starts again with empty ones.
    pub fn lose_disks(&mut self, node: u32) {
        self.crash(node);
        let at = self.now().0;
        let seed = self.chance.next_u64();
        for host in &mut self.nodes[node as usize].hosts {
            let Host { place, group, life, .. } = *host;
            let disk = disk_options(seed ^ u64::from(group), self.disk_nanos_max);
            *host = Host::new(place, group, &self.executor, disk, life);
        }
        self.book.mark(Mark::DiskLost { node, at });
    }

    fn end(&mut self, node: u32) {
        let now = self.now();
        self.resume(node);
        self.end_of_disk_trouble(node);
        self.book.mark(Mark::Crashed { node, at: now.0 });
        self.network.node_ended(node);
        let ended = &mut self.nodes[node as usize];
        ended.wanted = false;
        ended.disturbed = now;
        for host in &mut ended.hosts {
            for key in host.end(&self.executor) {
                if let Some(route) = self.routes.remove(&key) {
                    self.streams.closed_by_shard(now, key, route.client);
                }
            }
        }
    }

    /// Stops a node as SIGSTOP does: it does nothing, and does not know it.
    pub fn pause(&mut self, node: u32) {
        self.set_paused(node, true);
    }

    /// Lets a paused node go on.
    pub fn resume(&mut self, node: u32) {
        self.set_paused(node, false);
    }

    fn set_paused(&mut self, number: u32, paused: bool) {
        let now = self.now();
        let node = &mut self.nodes[number as usize];
        if node.paused != paused && !(paused && node.hosts.iter().all(Host::is_down)) {
            if !paused {
                let (from, until) = (node.paused_at.0, now.0);
                self.book.mark(Mark::Stood { node: number, from, until });
            }
            (node.paused, node.paused_at, node.disturbed) = (paused, now, now);
            for host in &node.hosts {
                self.executor.set_paused(host.group, paused);
            }
        }
    }

    fn end_of_disk_trouble(&mut self, node: u32) {
        // An operation that has begun to take long goes on to, after the disk is well again.
        let late = std::mem::take(&mut self.nodes[node as usize].disk_delay);
        if let Some(from) = self.nodes[node as usize].disk_trouble.take() {
            let until = self.now().after_nanos(late);
            self.settles_at = self.settles_at.max(until);
            self.book.mark(Mark::Stood { node, from: from.0, until: until.0 });
        }
    }

    /// Moves a node's wall clock by this many microseconds.
    pub fn jump_clock(&mut self, node: u32, micros: i64) {
        let offset = self.nodes[node as usize].wall_offset.saturating_add(micros);
        self.set_clock(node, offset);
    }

    /// Sets a node's wall clock this many microseconds ahead of true time.
    pub fn set_clock(&mut self, node: u32, micros: i64) {
        self.book.note_skew(micros.unsigned_abs());
        let node = &mut self.nodes[node as usize];
        node.wall_offset = micros;
        node.hosts.iter().for_each(|host| host.runtime.set_wall_offset(micros));
    }

    /// Has a shard write its memory to tables, beside everything else. Nothing if it is down.
    pub fn flush(&mut self, node: u32, shard: u32) {
        let host = &self.nodes[node as usize].hosts[shard as usize];
        if let Some(shard) = host.shard() {
            host.runtime.spawn(Class::Background, async move {
                // A failure shows in what is read later.
                let _ = shard.flush().await;
            });
        }
    }

    /// Has every shard write its memory to tables.
    pub fn flush_all(&mut self) {
        for node in 0..self.node_count() {
            (0..self.common.shards).for_each(|shard| self.flush(node, shard));
        }
    }

    /// Lets a shard's disk fail by this rule.
    pub fn trouble_disk(&mut self, node: u32, shard: u32, rule: Rule) {
        let now = self.now();
        let troubled = &mut self.nodes[node as usize];
        troubled.ailing = true;
        troubled.disk_trouble.get_or_insert(now);
        if let Fault::Delay(nanos) = rule.fault() {
            troubled.disk_delay = troubled.disk_delay.max(nanos);
        }
        self.disk(node, shard).inject(rule);
        self.note_disturbance(node);
    }

    /// A shard's disk fails no more.
    pub fn heal_disk(&mut self, node: u32, shard: u32) {
        self.disk(node, shard).clear_faults();
        self.disk(node, shard).cut_power_at(u64::MAX);
        self.note_disturbance(node);
        self.end_of_disk_trouble(node);
    }

    /// Everything is well again, clocks too, except that nodes which are down stay so.
    pub fn heal(&mut self) {
        if let Some(group) = self.executor.take_halted() {
            self.halted(group);
        }
        self.network.heal(self.now());
        for node in 0..self.node_count() {
            self.resume(node);
            (0..self.common.shards).for_each(|shard| self.heal_disk(node, shard));
            self.nodes[node as usize].ailing = false;
            self.set_clock(node, 0);
        }
    }

    /// Says that something may be wrong with a node from now on, or has been until now, so that
    /// nobody expects answers in time.
    pub fn note_disturbance(&mut self, node: u32) {
        self.nodes[node as usize].disturbed = self.now();
    }

    /// Clients make no more calls; those under way go on.
    pub fn quiet(&mut self) {
        self.clients.iter_mut().for_each(|client| client.is_quiet = true);
        self.operators.iter_mut().for_each(|operator| operator.is_quiet = true);
    }

    /// Clients make calls again.
    pub fn unquiet(&mut self) {
        let now = self.now();
        for client in &mut self.clients {
            client.wake(now);
        }
        for operator in &mut self.operators {
            operator.wake(now);
        }
    }

    /// Asks every node for every key, at every level of the mix, and waits for the answers.
    ///
    /// # Errors
    /// When one was not answered with a result, however often it was tried: nothing is wrong with
    /// the nodes.
    pub fn audit(&mut self) -> Result<(), String> {
        let now = self.now();
        let drivers = self.clients.len();
        for node in self.member_numbers() {
            let number = u32::try_from(self.clients.len()).expect("a few clients");
            let seed = self.chance.next_u64();
            self.clients.push(Client::auditor(number, node, seed, &self.mix, now));
        }
        let until = now.after_nanos(AUDIT_NANOS);
        let done = |cluster: &SimCluster| {
            cluster.clients[drivers..].iter().all(|client| client.next_at().is_none())
        };
        let ended = self.drive_until(until, done);
        self.clients.truncate(drivers);
        let auditors = drivers..operator::FIRST as usize;
        let is_over = |route: &Route| auditors.contains(&(route.client as usize));
        let over = self.routes.extract_if(.., |_, route| is_over(route));
        for (key, route) in over {
            self.streams.closed_by_client(now, key, route.place);
        }
        if ended { Ok(()) } else { Err("final reads were not answered".to_owned()) }
    }

    /// What a node's shards hold of a partition: what a reader at `now` would see.
    ///
    /// # Errors
    /// Whatever the scan met.
    ///
    /// # Panics
    /// When the node does not serve.
    pub fn dump(&self, node: u32, partition: PartitionId) -> Result<Dump, String> {
        let bits = self.common.options.partition_bits;
        let range = partition.range(bits);
        let shard = (partition.0 * self.common.shards) >> bits;
        let host = &self.nodes[node as usize].hosts[shard as usize];
        let shard = host.shard().expect("a node that serves");
        let now = self.executor.runtime().true_wall();
        let mut dump = Dump::default();
        let mut wrong = None;
        let request = ScanRequest { range, after: None, namespace: None };
        let mut visit = |record: &RecordRef<'_>| {
            wrong = dump.add(record, now).err();
            wrong.is_none()
        };
        let scanned = self.executor.run(shard.scan(&request, &mut visit));
        scanned.map_err(|error| error.to_string())?;
        wrong.map_or(Ok(dump), Err)
    }

    /// The nodes that hold a partition.
    fn replicas_of(&self, partition: PartitionId) -> Vec<u32> {
        match self.map() {
            Some(map) => {
                // All namespaces have the same number of copies.
                let topology = Topology::of_map(host::node_id(0), &map, [self.replicas]);
                let topology = topology.expect("a few equal members have a ring");
                let homes = topology.replicas(partition, u8::MAX);
                homes.iter().map(|node| node.0 - 1).collect()
            }
            None => vec![0],
        }
    }

    /// In which partitions the replicas differ now.
    #[must_use]
    pub fn differences(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        for partition in (0..1 << self.common.options.partition_bits).map(PartitionId) {
            let mut dumps = Vec::new();
            for node in self.replicas_of(partition) {
                match self.dump(node, partition) {
                    Ok(dump) => dumps.push((node, dump)),
                    Err(error) => found.push(Violation {
                        checker: "converge",
                        key: partition.0,
                        event: None,
                        what: format!("node {node} cannot be scanned: {error}"),
                    }),
                }
            }
            found.extend(checker::converge::check(partition, &dumps));
            found.extend(self.left_overs(partition));
        }
        let catalogues = self.catalogues();
        if catalogues.windows(2).any(|pair| pair[0] != pair[1]) {
            let generations: Vec<u64> = catalogues.iter().map(|it| it.generation()).collect();
            let what = format!("the nodes have namespaces of generations {generations:?}");
            found.push(Violation { checker: "namespaces", key: 0, event: None, what });
        }
        found
    }

    /// What a shard was told of the members, by node; empty in a cluster of one.
    ///
    /// # Panics
    /// When the shard does not serve.
    #[must_use]
    pub fn members(&self, node: u32, shard: u32) -> Vec<MemberView> {
        self.numbers(node, shard).members
    }

    /// Where a shard of a node that serves believes anything of a member but that it is alive.
    #[must_use]
    pub fn doubts(&self) -> Vec<Violation> {
        let nodes = self.member_numbers().into_iter().filter(|node| self.is_up(*node));
        let places = nodes.flat_map(|node| (0..self.common.shards).map(move |shard| (node, shard)));
        places
            .flat_map(|(node, shard)| {
                let members = self.members(node, shard);
                let doubted = members.into_iter().filter(|view| view.status != Status::Alive);
                doubted.map(move |view| Violation {
                    checker: "gossip",
                    key: view.node.0,
                    event: None,
                    what: format!("to shard {shard} of node {node}: {view:?}"),
                })
            })
            .collect()
    }

    /// The namespaces as each node that serves has them.
    #[must_use]
    pub fn catalogues(&self) -> Vec<Rc<Catalogue>> {
        self.nodes.iter().filter_map(|node| node.hosts[0].catalogue()).collect()
    }

    /// How many changes of namespaces operators were told are made, and how many may be.
    #[must_use]
    pub fn changes_of_namespaces(&self) -> (u64, u64) {
        operator::counts(&self.operators)
    }

    /// Which changes of namespaces were lost, made twice, or made although they were not started.
    /// Asked when all nodes serve and have the same.
    #[must_use]
    pub fn wrong_changes(&self) -> Vec<Violation> {
        let wrong = self
            .catalogues()
            .first()
            .map_or_else(Vec::new, |catalogue| operator::check(&self.operators, catalogue));
        let violation = |what| Violation { checker: "namespaces", key: 0, event: None, what };
        wrong.into_iter().map(violation).collect()
    }

    /// What nodes hold of a partition that is not theirs: they should have handed it over.
    fn left_overs(&self, partition: PartitionId) -> Vec<Violation> {
        let homes = self.replicas_of(partition);
        let guests =
            (0..self.node_count()).filter(|node| !homes.contains(node) && self.is_up(*node));
        guests
            .filter_map(|node| {
                let held = self.dump(node, partition).ok()?.keys.len();
                let what = format!("node {node} holds {held} keys that are not its own");
                let checker = "converge";
                (held > 0).then_some(Violation { checker, key: partition.0, event: None, what })
            })
            .collect()
    }

    /// Which key of which namespace a violation is about.
    #[must_use]
    pub fn subject(&self, violation: &Violation) -> Option<(NamespaceId, u32)> {
        let keys = self
            .mix
            .targets
            .iter()
            .flat_map(|target| (0..target.keys).map(move |key| (target.namespace, key)));
        let mut keys = keys.filter(|(namespace, key)| {
            let place = match violation.event {
                // Checkers of a history name its key by number.
                Some(_) if *key != violation.key => return false,
                Some(_) => format!("namespace {}:", namespace.0),
                // Comparisons of replicas name it as the store does.
                None => {
                    let name = String::from_utf8_lossy(&book::key_name(*key)).into_owned();
                    format!("namespace {} key {name:?}", namespace.0)
                }
            };
            violation.what.starts_with(&place)
        });
        keys.next()
    }

    /// When nothing is under way any more that began while a disk was slow: until then a write
    /// whose fate nobody was told may still take effect.
    #[must_use]
    pub fn settles_at(&self) -> Instant {
        self.settles_at
    }

    /// Says that all replicas are equal now and nothing is under way.
    pub fn mark_converged(&mut self) {
        let at = self.now().0;
        self.book.mark(Mark::Converged { at });
    }

    /// Everything that is wrong with the run so far.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        let mut found = self.broken.clone();
        found.extend(self.common.generations.borrow().forks.iter().map(|what| Violation {
            checker: "namespaces",
            key: 0,
            event: None,
            what: what.clone(),
        }));
        found.extend(self.book.wrong.iter().map(|what| Violation {
            checker: "bytes",
            key: 0,
            event: None,
            what: what.clone(),
        }));
        for (namespace, history) in self.histories() {
            found.extend(checker::check(history).into_iter().map(|it| Violation {
                what: format!("namespace {}: {}", namespace.0, it.what),
                ..it
            }));
        }
        found
    }
}

fn disk_options(seed: u64, latency_nanos_max: u64) -> SimDiskOptions {
    SimDiskOptions { latency_nanos_max, ..SimDiskOptions::seeded(seed) }
}

/// A map in a line: its generation, the layouts, and where the partitions are.
fn summary(map: &ClusterMap) -> String {
    let nodes: Vec<Vec<u32>> =
        map.layouts.iter().map(|it| it.iter().map(|it| it.0.0 - 1).collect()).collect();
    let places: Vec<String> = map
        .places
        .iter()
        .map(|place| format!("{}{:?}{}", place.at, place.stage, place.to))
        .collect();
    let holders = (&map.holders, &map.former);
    format!(
        "{}: layouts {nodes:?}, ids of holders {holders:?}, {}",
        map.generation,
        places.join(" ")
    )
}

fn which(node: u32) -> String {
    let which = member_commands::Which { node: host::node_id(node).0 };
    serde_json::to_string(&which).expect("a number")
}

/// What every simulated cluster begins with: its namespaces, and its members if it has several.
fn catalogue(options: &ClusterOptions, partition_bits: u32) -> Catalogue {
    let replicas = options.replicas;
    let mut catalogue = Catalogue::new(Compression::Lz4);
    let settings = Settings {
        n: Some(replicas),
        w: Some(NamespaceLevel::Quorum),
        r: Some(NamespaceLevel::Quorum),
        ..Settings::default()
    };
    catalogue.set("default", &settings).expect("plain settings");
    let siblings = Settings { mode: Some(NamespaceMode::Siblings), ..settings.clone() };
    let made = catalogue.create("siblings", &siblings, Compression::None);
    assert_eq!(made, Ok(SIBLINGS));
    if options.mix.targets.iter().any(|target| target.namespace == REGISTERS) {
        let registers = Settings { mode: Some(NamespaceMode::Linearizable), ..settings };
        let made = catalogue.create("registers", &registers, Compression::None);
        assert_eq!(made, Ok(REGISTERS));
    }
    if options.nodes < 2 {
        return catalogue;
    }
    let member = |node| NodeInfo {
        id: host::node_id(node),
        peer: format!("node-{node}:1"),
        client: String::new(),
        dc: "dc".to_owned(),
        rack: "rack".to_owned(),
        weight: Weight::ONE,
    };
    let members = (0..options.nodes).map(member).collect();
    catalogue.founded(ClusterMap::found(host::CLUSTER, 1, partition_bits, members))
}
