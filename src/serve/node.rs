//! What all threads of a node share: who it is, its namespaces, its state, its shards' inboxes.
//!
//! Invariant: nothing here is touched by a request on the hot path. A shard looks at one atomic a
//! turn to learn that something has changed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock, mpsc as std_mpsc};

use annulus_cluster::NodeId;
use annulus_engine::driver::RingWaker;
use annulus_engine::model::causality::ContextSecret;
use annulus_engine::model::{OriginId, WallMicros};
use annulus_net::driver::{Detached, Mesh};
use futures_channel::mpsc;
use futures_channel::oneshot;

use super::map::ClientFacts;
use super::vitals::Vitals;
use crate::admin::Source;
use crate::config::Config;
use crate::metrics::{DiskLevel, NodeSnapshot, Process, ShardSnapshot};
use crate::namespaces::Catalogue;
use crate::pump::Message;
use crate::registers::Registers;

/// Who a node is: from its data directory.
#[derive(Clone)]
pub(crate) struct NodeFacts {
    pub(crate) cluster: u128,
    pub(crate) node: OriginId,
    pub(crate) hash_seed: u64,
    pub(crate) partition_bits: u32,
    pub(crate) shard_count: u32,
    pub(crate) created: WallMicros,
    pub(crate) secret: ContextSecret,
    pub(crate) disk_total: u64,
    /// Of the list of members that its cluster was founded with; none for a node of its own.
    pub(crate) founding: Option<u64>,
    /// How often it has started.
    pub(crate) life: u64,
}

/// Where the node is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Starting = 0,
    Serving = 1,
    Draining = 2,
}

/// What travels between shards.
pub(crate) enum Parcel {
    /// A request or an answer.
    Message(Message),
    /// A connection that asked for the receiver.
    Connection(Detached),
}

/// What other threads ask of a shard.
pub(crate) enum Ask {
    /// Its numbers.
    Snapshot(mpsc::UnboundedSender<ShardSnapshot>),
    /// A round of comparisons with the other replicas.
    Repair {
        /// Only of namespaces with so many copies.
        copies: Option<u8>,
        /// Whether all records are read as well.
        scrub: bool,
    },
    /// A snapshot of its files in this directory.
    Files(std::path::PathBuf, oneshot::Sender<Result<(), String>>),
}

/// A shard's inbox, for threads outside the mesh.
pub(crate) struct Inbox {
    pub(crate) asks: std_mpsc::Sender<Ask>,
    pub(crate) waker: RingWaker,
}

/// The node.
pub(crate) struct Node {
    config: Arc<Config>,
    client: SocketAddr,
    peer: SocketAddr,
    clients: RwLock<BTreeMap<NodeId, ClientFacts>>,
    map_version: AtomicU64,
    facts: OnceLock<(NodeFacts, Arc<Mesh<Parcel>>)>,
    /// One a shard, from when their number is known.
    vitals: OnceLock<Vec<Vitals>>,
    state: AtomicU8,
    /// The node has learned that it is no member of its cluster any more.
    is_removed: AtomicBool,
    /// Counts changes of state, namespaces and inboxes.
    changes: AtomicU64,
    catalogue: RwLock<Arc<Catalogue>>,
    /// Held while the namespaces are being changed.
    pub(crate) changing: futures_util::lock::Mutex<()>,
    /// What the node has promised and accepted as a holder of registers; none on its own.
    pub(crate) registers: futures_util::lock::Mutex<Option<Registers>>,
    inboxes: RwLock<Vec<Option<Inbox>>>,
    disk_free: AtomicU64,
    disk_level: AtomicU8,
    started: std::time::Instant,
}

impl Node {
    #[expect(clippy::disallowed_methods, reason = "the node's age, shown to people")]
    pub(crate) fn new(config: Arc<Config>, client: SocketAddr, peer: SocketAddr) -> Node {
        let catalogue = Catalogue::new(config.compression);
        Node {
            config,
            client,
            peer,
            clients: RwLock::default(),
            map_version: AtomicU64::new(1),
            facts: OnceLock::new(),
            vitals: OnceLock::new(),
            state: AtomicU8::new(State::Starting as u8),
            is_removed: AtomicBool::new(false),
            changes: AtomicU64::new(1),
            catalogue: RwLock::new(Arc::new(catalogue)),
            changing: futures_util::lock::Mutex::new(()),
            registers: futures_util::lock::Mutex::new(None),
            inboxes: RwLock::default(),
            disk_free: AtomicU64::new(0),
            disk_level: AtomicU8::new(0),
            started: std::time::Instant::now(),
        }
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Where clients reach another node.
    pub(super) fn note_client(&self, node: NodeId, facts: ClientFacts) {
        if facts.shard_count == 0 || facts.address.is_empty() {
            return;
        }
        let mut known = self.clients.write().expect("no holder of this lock panics");
        if known.get(&node) != Some(&facts) {
            known.insert(node, facts);
            drop(known);
            self.map_version.fetch_add(1, Ordering::AcqRel);
            self.changed();
        }
    }

    /// Counts changes of what [`Node::clients`] says.
    pub(super) fn map_version(&self) -> u64 {
        self.map_version.load(Ordering::Acquire)
    }

    /// Where clients reach the nodes, as far as they have said.
    pub(super) fn clients(&self) -> BTreeMap<NodeId, ClientFacts> {
        self.clients.read().expect("no holder of this lock panics").clone()
    }

    /// Where peers reach the node, as it is bound.
    pub(crate) fn peer_address(&self) -> SocketAddr {
        self.peer
    }

    /// The same as others are told.
    pub(crate) fn peer_name(&self) -> String {
        match &self.config.advertise {
            Some(host) => {
                let host = host.rsplit_once(':').map_or(host.as_str(), |(host, _)| host);
                format!("{host}:{}", self.peer.port())
            }
            None => self.peer.to_string(),
        }
    }

    /// Where clients reach the node.
    pub(crate) fn client_address(&self) -> String {
        match &self.config.advertise {
            Some(host) if host.contains(':') => host.clone(),
            Some(host) => format!("{host}:{}", self.client.port()),
            None => self.client.to_string(),
        }
    }

    pub(crate) fn set_facts(&self, facts: NodeFacts, mesh: Arc<Mesh<Parcel>>) {
        let _ = self.vitals.set((0..facts.shard_count).map(|_| Vitals::new()).collect());
        // Set once, by the main thread.
        let _ = self.facts.set((facts, mesh));
        self.changed();
    }

    pub(crate) fn facts(&self) -> Option<&NodeFacts> {
        self.facts.get().map(|(facts, _)| facts)
    }

    pub(crate) fn mesh(&self) -> Option<&Arc<Mesh<Parcel>>> {
        self.facts.get().map(|(_, mesh)| mesh)
    }

    /// What each shard is doing; empty while nobody knows how many there are.
    pub(crate) fn vitals(&self) -> &[Vitals] {
        self.vitals.get().map_or(&[], Vec::as_slice)
    }

    /// Whether no shard has a request of its own any more.
    pub(crate) fn is_drained(&self) -> bool {
        self.vitals().iter().all(Vitals::is_drained)
    }

    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Starting,
            1 => State::Serving,
            _ => State::Draining,
        }
    }

    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
        self.changed();
    }

    /// The node is no member any more: it has nothing left to do.
    pub(super) fn note_removed(&self) {
        self.is_removed.store(true, Ordering::Release);
    }

    pub(super) fn is_removed(&self) -> bool {
        self.is_removed.load(Ordering::Acquire)
    }

    /// How many changes there have been; a shard looks closer when it differs from last time.
    #[inline]
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.wake_all();
    }

    pub(crate) fn wake_all(&self) {
        for inbox in self.read_inboxes().iter().flatten() {
            inbox.waker.wake();
        }
    }

    pub(crate) fn catalogue(&self) -> Arc<Catalogue> {
        Arc::clone(&self.catalogue.read().expect("no holder of this lock panics"))
    }

    pub(crate) fn set_catalogue(&self, catalogue: Catalogue) {
        *self.catalogue.write().expect("no holder of this lock panics") = Arc::new(catalogue);
        self.changed();
    }

    pub(crate) fn join(&self, shard: u32, inbox: Inbox) {
        let mut inboxes = self.inboxes.write().expect("no holder of this lock panics");
        let index = shard as usize;
        if inboxes.len() <= index {
            inboxes.resize_with(index + 1, || None);
        }
        inboxes[index] = Some(inbox);
    }

    fn read_inboxes(&self) -> std::sync::RwLockReadGuard<'_, Vec<Option<Inbox>>> {
        self.inboxes.read().expect("no holder of this lock panics")
    }

    /// Asks each shard; those that have ended are passed over. Returns how many were asked.
    pub(crate) fn ask_all(&self, mut ask: impl FnMut(usize) -> Ask) -> usize {
        let inboxes = self.read_inboxes();
        let asked = inboxes.iter().enumerate().filter(|(index, inbox)| {
            let Some(inbox) = inbox else { return false };
            let sent = inbox.asks.send(ask(*index)).is_ok();
            self.changes.fetch_add(1, Ordering::AcqRel);
            inbox.waker.wake();
            sent
        });
        asked.count()
    }

    pub(crate) fn note_disk(&self, free: u64, level: DiskLevel) {
        self.disk_free.store(free, Ordering::Relaxed);
        self.disk_level.store(level as u8, Ordering::Relaxed);
    }
}

impl Source for Node {
    fn shard_count(&self) -> usize {
        self.facts().map_or(0, |facts| facts.shard_count as usize)
    }

    fn ask(&self, reply: mpsc::UnboundedSender<ShardSnapshot>) {
        self.ask_all(|_| Ask::Snapshot(reply.clone()));
    }

    fn describe(&self) -> NodeSnapshot {
        let facts = self.facts();
        NodeSnapshot {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: facts.map_or(0, |facts| facts.node.0),
            cluster: facts.map_or_else(String::new, |facts| format!("{:032x}", facts.cluster)),
            uptime_seconds: self.started.elapsed().as_secs(),
            disk_free_bytes: self.disk_free.load(Ordering::Relaxed),
            disk_total_bytes: facts.map_or(0, |facts| facts.disk_total),
            disk_level: match self.disk_level.load(Ordering::Relaxed) {
                0 => DiskLevel::Ok,
                1 => DiskLevel::Pace,
                2 => DiskLevel::Refuse,
                _ => DiskLevel::Reserve,
            },
            process: Process::probe(),
            shards: Vec::new(),
        }
    }

    fn ready(&self) -> Result<(), String> {
        match self.state() {
            State::Serving => Ok(()),
            State::Starting => Err("starting".to_owned()),
            State::Draining => Err("draining".to_owned()),
        }
    }
}
