//! One shard's thread: opens the shard, then turns sockets, mesh and pump until told to stop.
//!
//! Invariant: the only place where sockets meet the pump; it decides nothing about a request.

use std::net::ToSocketAddrs as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;

use annulus_cluster::message::MESSAGE_SIZE_MAX;
use annulus_cluster::moves::plan::Rules;
use annulus_cluster::tracking::PeerShard;
use annulus_cluster::{NodeId, Topology};
use annulus_engine::driver::{HostOptions, Ring, RingDisk, ShardRuntime, Turn, drive, host};
use annulus_engine::identity::Identity;
use annulus_engine::log::OnDamage;
use annulus_engine::model::limits::SIBLING_BYTES_MAX;
use annulus_engine::model::{Instant, NamespaceId, OriginId};
use annulus_engine::options::Compression;
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::Shard;
use annulus_net::driver::{
    ConnId, Connections, Door, Event, Limits as SocketLimits, Mesh, MeshPort, Sockets,
};
use annulus_net::peer_connection::{PeerFacts, PeerMember, PeerOptions};
use annulus_net::server_connection::{ConnectionOptions, ServerFacts};
use annulus_net::wire::hello::{self, Limits, Welcome};
use annulus_net::wire::peer::PeerRefusal;

use super::claim::random_numbers;
use super::desk::Desk;
use super::links::{IncomingSet, LinkChange, LinkOptions, LinkSet, PeerAddress, PeerSockets};
use super::map::{self, ClientFacts};
use super::node::{Ask, Inbox, Node, NodeFacts, Parcel, State};
use super::vitals::{self, Load, Phase, Vitals};
use super::{Told, claim};
use crate::metrics::ShardSnapshot;
use crate::namespaces::Catalogue;
use crate::pump::{
    ConnectionKey, Message, NoLinks, Peers, Pump, PumpOptions, ReplicationOptions, ShardMap,
    Verdict, Wires, disk_level,
};

/// How often the numbers that the node shows are refreshed, in nanoseconds.
const NOTE_NANOS: u64 = 250_000_000;
/// How long a drained shard waits for clients to take their last answers, in nanoseconds.
const LEAVE_NANOS: u64 = 1_000_000_000;
/// Results of one batch and long replies of one connection, in bytes.
const LONG_BYTES_MIN: usize = 4 << 20;

/// Bytes of memory that the messages of one turn leave behind for the next.
const LETTERS_KEPT: usize = 1 << 20;

/// What a shard's thread begins with.
pub(crate) struct ShardStart {
    pub(crate) index: u32,
    pub(crate) node: Arc<Node>,
    pub(crate) listener: Option<std::net::TcpListener>,
    /// On the peers' address; only if there are peers.
    pub(crate) peer_listener: Option<std::net::TcpListener>,
}

/// Directory of a shard inside the data directory.
pub(crate) fn dir_name(shard: usize) -> String {
    format!("shard-{shard:03}")
}

/// Runs the shard to its end.
pub(crate) async fn run(
    start: ShardStart,
    ring: Ring,
    runtime: ShardRuntime,
    tell: &mpsc::Sender<Told>,
) -> Result<(), String> {
    let ShardStart { index, node, listener, peer_listener } = start;
    let disk = RingDisk::new(&ring);
    let text = |error: annulus_engine::Error| error.to_string();
    // Held until the thread ends: the directory is this process's.
    let mut _lock = None;
    if index == 0 {
        let claimed =
            drive(&ring, &runtime, claim::claim(&node, &disk, &runtime)).await.map_err(text)?;
        let (lock, facts) = claimed?;
        _lock = Some(lock);
        // The main thread waits for it.
        let _ = tell.send(Told::Facts(Box::new(facts)));
    }
    let (facts, mesh) = wait_for_facts(&node);
    let identity = Identity {
        cluster: facts.cluster,
        node: facts.node,
        shard: index,
        shard_count: facts.shard_count,
        hash_seed: facts.hash_seed,
        partition_bits: facts.partition_bits,
        created: facts.created,
    };
    let mut options = node.config().engine_options(facts.shard_count, facts.disk_total)?;
    options.replicated = facts.founding.is_some();
    let dir = node.config().data_dir.join(dir_name(index as usize));
    let compression = compression_of(&node);
    let on_damage = if node.config().accept_loss { OnDamage::Accept } else { OnDamage::Refuse };
    let (opened_by, compression) = (runtime.clone(), Some(compression));
    let opening =
        Shard::open_with(disk.clone(), opened_by, &dir, &identity, options, compression, on_damage);
    let shard = drive(&ring, &runtime, opening).await.map_err(text)?.map_err(text)?;
    let budget = node.config().budget(facts.shard_count)?;
    let limits = SocketLimits {
        connections: (budget.connections_max / facts.shard_count).max(1) as usize,
        ..SocketLimits::default()
    };
    let mut sockets = Sockets::new(&ring, listener, limits).map_err(text)?;
    // Held even by a node of its own, so that no other process gets the port.
    let mut peer_listener = peer_listener;
    if let Some(listener) = peer_listener.take_if(|_| facts.founding.is_some()) {
        sockets.accept_from(listener, Door::Peers);
    }
    let peer_facts = peer_facts(&node, &facts, index);
    let peers = peers_of(&node, &facts)?;
    let seeds = random_numbers()?;
    let links = LinkSet::new(peer_facts.clone(), &peers, LinkOptions::default(), seeds[0]);
    let incoming = IncomingSet::new(peer_facts, seeds[1]);
    let (asks, inbox) = mpsc::channel();
    node.join(index, Inbox { asks, waker: ring.waker() });
    let map = ShardMap::new(index, facts.shard_count, facts.partition_bits);
    let desk = Rc::new(Desk { node: Arc::clone(&node), disk });
    let known = node.catalogue();
    let catalogue = Rc::new((*known).clone());
    shard.set_dropped_namespaces(catalogue.dropped());
    let mut pump = Pump::new(
        shard,
        runtime.clone(),
        PumpOptions {
            facts: server_facts(&node, &facts, index),
            map,
            secret: facts.secret,
            catalogue: Rc::clone(&catalogue),
            message_memory: usize::try_from(budget.requests_per_shard()).unwrap_or(usize::MAX),
            desk,
            replication: replication(&node, &facts)?,
        },
    );
    pump.set_catalogue(catalogue);
    let own = NodeId(facts.node.0);
    let client = ClientFacts { address: node.client_address(), shard_count: facts.shard_count };
    node.note_client(own, client);
    pump.set_waker(runtime.waker().clone());
    let vitals = &node.vitals()[index as usize];
    vitals.set_phase(Phase::Serving);
    // The main thread waits for it.
    let _ = tell.send(Told::Ready);
    let mut served = Served {
        pump,
        sockets,
        peers: PeerSockets { links, incoming },
        letters: Letters::default(),
        port: mesh.join(index as usize, ring.waker()),
        inbox,
        node: Arc::clone(&node),
        index: index as usize,
        runtime: runtime.clone(),
        changes: 0,
        map_version: 0,
        catalogue: known,
        drain_until: None,
        leave_until: None,
        next_note: Instant(0),
        next_vitals: Instant(0),
    };
    let host_options = HostOptions {
        spin_us: u64::try_from(node.config().spin.as_micros()).unwrap_or(0),
        slice_us: u64::try_from(node.config().slice.as_micros()).unwrap_or(200),
    };
    host(&ring, &runtime, host_options, |now, completions| served.turn(now, completions))
        .await
        .map_err(text)?;
    // Perhaps another one than at the start: see the pump's `revive`.
    let shard = served.pump.shard().clone();
    tracing::debug!(shard = index, idle = served.pump.is_idle(), "drained");
    drop(served);
    let closed = drive(&ring, &runtime, close(&shard, vitals, &runtime)).await.map_err(text)?;
    runtime.shut_down();
    vitals.note_ring(ring.in_flight());
    closed.map_err(text)
}

/// Closes the shard, and notes how far it is.
async fn close(
    shard: &Shard<RingDisk, ShardRuntime>,
    vitals: &Vitals,
    runtime: &ShardRuntime,
) -> annulus_engine::Result<()> {
    let mut closing = std::pin::pin!(shard.close());
    std::future::poll_fn(|context| {
        let polled = closing.as_mut().poll(context);
        vitals.note_closing(shard.closing());
        vitals.note_turn(runtime.now());
        polled
    })
    .await
}

/// Waits, without a spin, until the main thread has said who the node is. Nothing else runs yet.
fn wait_for_facts(node: &Node) -> (NodeFacts, Arc<Mesh<Parcel>>) {
    loop {
        if let (Some(facts), Some(mesh)) = (node.facts(), node.mesh()) {
            return (facts.clone(), Arc::clone(mesh));
        }
        std::thread::yield_now();
    }
}

/// Asks the namespaces as they are now for their codec.
fn compression_of(node: &Arc<Node>) -> annulus_engine::recover::CompressionOf {
    let node = Arc::clone(node);
    let default = node.config().compression;
    let seen = std::cell::RefCell::new((0, node.catalogue()));
    Rc::new(move |namespace: NamespaceId| -> Compression {
        let (changes, catalogue) = &mut *seen.borrow_mut();
        if *changes != node.changes() {
            *changes = node.changes();
            *catalogue = node.catalogue();
        }
        catalogue.get(namespace).map_or(default, |found| found.compression).into()
    })
}

/// The other members of the node's cluster, as the pump is told of them.
fn replication(node: &Node, facts: &NodeFacts) -> Result<Option<ReplicationOptions>, String> {
    let catalogue = node.catalogue();
    let Some(map) = catalogue.map() else { return Ok(None) };
    // The namespaces name the numbers of copies as soon as the pump knows them.
    let topology = Topology::of_map(NodeId::from(facts.node), map, [1])
        .map_err(|error| format!("no placement for these members: {error:?}"))?;
    let room = node.config().hint_size_max(facts.disk_total) / u64::from(facts.shard_count);
    Ok(Some(ReplicationOptions {
        topology: Rc::new(topology),
        life: facts.life,
        room_bytes_max: room,
        rules: Rules::ALL,
    }))
}

/// What clients are told, and the connections' limits.
fn server_facts(node: &Node, facts: &NodeFacts, index: u32) -> ServerFacts {
    let config = node.config();
    let defaults = Limits::default();
    let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let value_size_max = config.value_size_max as usize;
    let bytes_max = usize::try_from(config.connection_bytes_max).unwrap_or(usize::MAX);
    ServerFacts {
        welcome: Welcome {
            version: hello::VERSION,
            partition_bits: u8::try_from(facts.partition_bits).expect("at most 16"),
            shard_count: facts.shard_count,
            shard: index,
            node: facts.node,
            features: 0,
            cluster: facts.cluster,
            hash_seed: facts.hash_seed,
            map_version: 1,
            wall_us: 0,
            limits: Limits {
                value_size_max: config.value_size_max,
                message_size_max: defaults.message_size_max.max(config.value_size_max),
                in_flight_max: config.connection_requests_max,
                in_flight_bytes_max: u32::try_from(bytes_max).unwrap_or(u32::MAX),
                ..defaults
            },
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: Vec::new(),
        },
        options: ConnectionOptions {
            hello_timeout_ms: millis(config.connection_timeout),
            frame_timeout_ms: millis(config.connection_timeout),
            default_deadline_ms: millis(config.request_timeout),
            long_reply_bytes_max: LONG_BYTES_MIN.max(4 * value_size_max),
            long_request_bytes_max: bytes_max.max(2 * value_size_max),
            ..ConnectionOptions::default()
        },
    }
}

/// Where the other members are. One whose name is not known is left out, and looked for again with
/// the next change of members.
fn peers_of(node: &Node, facts: &NodeFacts) -> Result<Vec<PeerAddress>, String> {
    let catalogue = node.catalogue();
    let Some(map) = catalogue.map() else { return Ok(Vec::new()) };
    let others = map.members.iter().map(|member| &member.info);
    let mut peers = Vec::new();
    for other in others.filter(|other| other.id.0 != facts.node.0) {
        match other.peer.to_socket_addrs().map(|mut found| found.next()) {
            Ok(Some(address)) => peers.push(PeerAddress { node: other.id, address }),
            Ok(None) => return Err(format!("{}: no address", other.peer)),
            Err(error) => return Err(format!("{}: {error}", other.peer)),
        }
    }
    Ok(peers)
}

/// The other members, as their connections are checked.
fn peer_members(node: &Node, own: OriginId) -> Vec<PeerMember> {
    let catalogue = node.catalogue();
    let members = catalogue.map().map_or(&[][..], |map| &map.members);
    let ids = members.iter().map(|member| OriginId(member.info.id.0)).filter(|id| *id != own);
    ids.map(|node| PeerMember { node, life: 0 }).collect()
}

/// What shards of other nodes are told and asked.
fn peer_facts(node: &Node, facts: &NodeFacts, shard: u32) -> PeerFacts {
    // A client's largest message may be forwarded; a key's siblings may be as large as two values.
    let value_size_max = (node.config().value_size_max as usize).max(SIBLING_BYTES_MAX);
    PeerFacts {
        cluster: facts.cluster,
        hash_seed: facts.hash_seed,
        partition_bits: u8::try_from(facts.partition_bits).expect("at most 16"),
        members_digest: facts.founding.unwrap_or_default(),
        members: peer_members(node, facts.node),
        node: facts.node,
        shard,
        shard_count: facts.shard_count,
        life: facts.life,
        options: PeerOptions {
            message_size_max: (2 * value_size_max + (1 << 20)).min(MESSAGE_SIZE_MAX),
            ..PeerOptions::default()
        },
    }
}

/// Messages of other nodes that came in a turn; the memory stays.
#[derive(Default)]
struct Letters {
    bytes: Vec<u8>,
    /// Who sent them, and where each ends.
    senders: Vec<(PeerShard, usize)>,
}

impl Letters {
    fn push(&mut self, from: PeerShard, message: &[u8]) {
        self.bytes.extend_from_slice(message);
        self.senders.push((from, self.bytes.len()));
    }

    /// Hands out all of them, in order.
    fn open(&mut self, mut read: impl FnMut(PeerShard, &[u8])) {
        let mut begin = 0;
        for (from, end) in self.senders.drain(..) {
            read(from, &self.bytes[begin..end]);
            begin = end;
        }
        self.bytes.clear();
        self.bytes.shrink_to(LETTERS_KEPT);
    }
}

/// The sockets, as the pump sees them.
struct SocketWires<'a>(&'a mut Connections);

fn id_of(connection: ConnectionKey) -> ConnId {
    ConnId::from_key(connection.0)
}

fn key_of(id: ConnId) -> ConnectionKey {
    ConnectionKey(id.key())
}

impl Wires for SocketWires<'_> {
    fn out(&mut self, connection: ConnectionKey) -> Option<&mut Vec<u8>> {
        self.0.out(id_of(connection))
    }

    fn unsent(&self, connection: ConnectionKey) -> usize {
        self.0.unsent(id_of(connection))
    }

    fn resume(&mut self, connection: ConnectionKey) {
        self.0.resume(id_of(connection));
    }

    fn close(&mut self, connection: ConnectionKey) {
        self.0.close(id_of(connection));
    }
}

/// The mesh, as the pump sees it.
struct MeshPeers<'a>(&'a MeshPort<Parcel>);

impl Peers for MeshPeers<'_> {
    fn send(&mut self, shard: u32, message: Message) -> Result<(), Message> {
        self.0.send(shard as usize, Parcel::Message(message)).map_err(|parcel| match parcel {
            Parcel::Message(message) => message,
            Parcel::Connection(_) => unreachable!("a message was sent"),
        })
    }
}

/// A shard that serves.
struct Served {
    pump: Pump<RingDisk, ShardRuntime>,
    sockets: Sockets,
    peers: PeerSockets,
    letters: Letters,
    port: MeshPort<Parcel>,
    inbox: mpsc::Receiver<Ask>,
    node: Arc<Node>,
    runtime: ShardRuntime,
    /// The node's changes as last seen.
    changes: u64,
    /// The namespaces that the pump was given.
    map_version: u64,
    catalogue: Arc<Catalogue>,
    drain_until: Option<Instant>,
    /// When the last answers must have gone out.
    leave_until: Option<Instant>,
    next_note: Instant,
    next_vitals: Instant,
    index: usize,
}

impl Served {
    fn turn(&mut self, now: Instant, completions: &[annulus_engine::driver::Completion]) -> Turn {
        self.pump.tick(now);
        if self.node.changes() != self.changes {
            self.look_at_changes(now);
        }
        let (pump, port, peers) = (&mut self.pump, &self.port, &mut self.peers);
        let letters = &mut self.letters;
        self.sockets.foresee(completions, |bytes| pump.foresee(bytes));
        pump.fetch_foreseen();
        let mut worked = self.sockets.turn(now, completions, |connections, event| {
            let mut receive = |_: &mut LinkSet, node: NodeId, shard: u32, message: &[u8]| {
                letters.push(PeerShard { node, shard }, message);
            };
            let mut hand_over = |shard: u32, detached| {
                // A full mesh drops the socket, which closes it; the node dials again.
                let _ = port.send(shard as usize, Parcel::Connection(detached));
            };
            let event = peers.event(now, connections, event, &mut receive, &mut hand_over);
            if let Some(event) = event {
                handle(pump, port, connections, event);
            }
        });
        let connections = self.sockets.connections();
        letters.open(|from, message| {
            pump.peer_message(from, message, &mut SocketWires(connections));
        });
        worked |= port.drain(|_, parcel| match parcel {
            Parcel::Message(message) => pump.message(message, &mut SocketWires(connections)),
            Parcel::Connection(detached) => {
                // At the limit the socket is dropped, which closes it.
                let door = detached.door;
                if let Ok(id) = connections.adopt(detached) {
                    match door {
                        Door::Clients => pump.accepted(key_of(id)),
                        Door::Peers => peers.adopted(now, id, connections),
                    }
                }
            }
        }) > 0;
        if peers.is_empty() {
            let no_links = &mut NoLinks;
            worked |= pump.turn(&mut SocketWires(connections), &mut MeshPeers(port), no_links);
        } else {
            for change in peers.links.take_changes() {
                match change {
                    LinkChange::Up(node, shard_count) => pump.peer_up(node, shard_count),
                    LinkChange::Down(node) => pump.peer_down(node),
                }
            }
            let wires = &mut SocketWires(connections);
            worked |= pump.turn(wires, &mut MeshPeers(port), &mut peers.links);
            worked |= peers.turn(now, connections);
        }
        connections.flush();
        self.pump.end_turn();
        if now >= self.next_note {
            self.next_note = now.after_nanos(NOTE_NANOS);
            let stats = self.pump.shard().stats();
            self.node.note_disk(stats.disk_free_bytes, disk_level(stats.space_level));
            let sent_bytes = self.sockets.connections().stats().sent_bytes;
            self.pump.note_sent(sent_bytes);
        }
        if now >= self.next_vitals {
            self.next_vitals = now.after_nanos(vitals::NOTE_NANOS);
            self.note_vitals(now);
        }
        if let Some(until) = self.drain_until
            && (now >= until || self.may_leave(now))
        {
            return Turn::Stop;
        }
        if worked {
            return Turn::Busy;
        }
        let timeouts = [self.pump.next_timeout(), self.peers.next_timeout()];
        timeouts.into_iter().flatten().min().map_or(Turn::Idle, Turn::IdleUntil)
    }

    fn vitals(&self) -> &Vitals {
        &self.node.vitals()[self.index]
    }

    fn note_vitals(&mut self, now: Instant) {
        self.vitals().note_turn(now);
        if self.drain_until.is_some() {
            let unsent_bytes = self.sockets.connections().unsent_bytes();
            let (sessions, requests) = self.pump.load();
            self.vitals().note_load(Load { sessions, requests, unsent_bytes });
        }
    }

    /// Whether this shard is drained, no other may still need it for an answer, and what it
    /// answered last has gone out, as far as its clients take it.
    fn may_leave(&mut self, now: Instant) -> bool {
        if !self.pump.is_idle() {
            return false;
        }
        if !self.vitals().is_drained() {
            self.vitals().set_phase(Phase::Drained);
            self.node.wake_all();
        }
        if !self.node.is_drained() {
            return false;
        }
        let until = match self.leave_until {
            Some(until) => until,
            None => {
                let until = now.after_nanos(LEAVE_NANOS);
                self.wake_at(until);
                *self.leave_until.insert(until)
            }
        };
        let gone = self.pump.is_written() && self.sockets.connections().unsent_bytes() == 0;
        gone || now >= until
    }

    /// Makes the loop come round at that time at the latest.
    fn wake_at(&self, at: Instant) {
        let sleep = self.runtime.sleep_until(at);
        self.runtime.spawn(annulus_engine::runtime::Class::Foreground, sleep);
    }

    /// Tells clients from now on what is known of the nodes.
    fn tell_map(&mut self) {
        let Some(facts) = self.node.facts() else { return };
        let (own, bits) = (NodeId(facts.node.0), facts.partition_bits);
        let clients = self.node.clients();
        let (runs, nodes) = map::partition_map(self.pump.topology(), own, bits, &clients);
        self.pump.set_map(self.map_version, runs, nodes);
    }

    /// Links follow the members.
    fn follow_members(&mut self) {
        let Some(facts) = self.node.facts() else { return };
        if self.catalogue.map().is_none() {
            return;
        }
        if self.pump.is_removed() {
            return self.node.note_removed();
        }
        let members = peer_members(&self.node, facts.node);
        self.peers.incoming.set_members(&members);
        match peers_of(&self.node, facts) {
            Ok(peers) => self.peers.links.set_peers(&members, &peers),
            Err(what) => tracing::error!(what, "a member cannot be found"),
        }
    }

    /// Something about the node has changed: namespaces, state, or questions have come.
    fn look_at_changes(&mut self, now: Instant) {
        self.changes = self.node.changes();
        let catalogue = self.node.catalogue();
        if !Arc::ptr_eq(&catalogue, &self.catalogue) {
            self.pump.shard().set_dropped_namespaces(catalogue.dropped());
            self.pump.set_catalogue(Rc::new((*catalogue).clone()));
            self.catalogue = catalogue;
            self.follow_members();
            // The greatest number of copies may be another one.
            self.tell_map();
        }
        let map_version = self.node.map_version();
        if self.map_version != map_version {
            self.map_version = map_version;
            self.tell_map();
        }
        while let Ok(ask) = self.inbox.try_recv() {
            match ask {
                Ask::Snapshot(reply) => {
                    // The asker may have given up.
                    let _ = reply.unbounded_send(self.snapshot());
                }
                Ask::Repair { copies, scrub } => self.pump.start_repair(copies, scrub),
                Ask::Files(dir, reply) => self.snapshot_files(dir, reply),
            }
        }
        if self.node.state() == State::Draining && self.drain_until.is_none() {
            let nanos = u64::try_from(self.node.config().drain_timeout.as_nanos());
            let until = now.after_nanos(nanos.unwrap_or(u64::MAX));
            self.drain_until = Some(until);
            self.vitals().set_phase(Phase::Draining);
            self.next_vitals = now;
            self.sockets.stop_accepting();
            self.pump.drain(&mut SocketWires(self.sockets.connections()));
            self.wake_at(until);
        }
    }

    /// The pump's numbers and those of the connections with other nodes.
    fn snapshot(&self) -> ShardSnapshot {
        let mut snapshot = self.pump.snapshot();
        let (links, incoming) = (self.peers.links.stats(), self.peers.incoming.stats());
        let refused = |index: usize| links.refusals[index] + incoming.refusals[index];
        let counters = &mut snapshot.metrics.counters;
        counters.peer_messages_sent = links.sent;
        counters.peer_messages_refused = links.refused;
        counters.peer_messages_received = incoming.received;
        counters.peer_received_bytes = incoming.received_bytes;
        counters.peer_links_opened = links.opened;
        counters.peer_links_broken = links.broken;
        counters.peer_refusals = (0..PeerRefusal::COUNT).map(refused).sum();
        snapshot.gauges.peer_links_up = links.up as u64;
        snapshot.gauges.peer_connections = incoming.open as u64;
        snapshot.gauges.peer_connections_half_open = incoming.half_open as u64;
        if !self.peers.is_empty() {
            let named = PeerRefusal::ALL.iter().enumerate();
            snapshot.peer_refusals =
                named.map(|(index, refusal)| (refusal.label(), refused(index))).collect();
        }
        snapshot
    }

    fn snapshot_files(
        &self,
        dir: PathBuf,
        reply: futures_channel::oneshot::Sender<Result<(), String>>,
    ) {
        let shard = self.pump.shard().clone();
        self.runtime.spawn(annulus_engine::runtime::Class::Foreground, async move {
            let made = shard.snapshot(&dir).await.map_err(|error| error.to_string());
            // The asker may have given up.
            let _ = reply.send(made);
        });
    }
}

fn handle(
    pump: &mut Pump<RingDisk, ShardRuntime>,
    port: &MeshPort<Parcel>,
    connections: &mut Connections,
    event: Event<'_>,
) {
    match event {
        Event::Opened(id, _) => pump.accepted(key_of(id)),
        Event::Received(id, bytes) => {
            let unsent = connections.unsent(id);
            let Some(out) = connections.out(id) else { return };
            match pump.received(key_of(id), bytes, out, unsent) {
                Verdict::Keep => {}
                Verdict::Pause => connections.pause(id),
                Verdict::Close => connections.close(id),
                Verdict::HandOver { shard, bytes } => {
                    pump.closed(key_of(id));
                    pump.note_target(key_of(id), shard);
                    connections.detach(id, &bytes);
                }
            }
        }
        // The pump asks for what is unsent by itself, and dials nobody.
        Event::Drained(_) | Event::Connected(_) => {}
        Event::Closed(id, _) => pump.closed(key_of(id)),
        Event::Detached(id, detached) => {
            if let Some(shard) = pump.take_target(key_of(id)) {
                // A full mesh drops the socket, which closes it; the client connects again.
                let _ = port.send(shard as usize, Parcel::Connection(detached));
            }
        }
    }
}
