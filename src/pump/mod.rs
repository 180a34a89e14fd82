//! The pump: one shard's loop, apart from sockets and threads. Bytes and messages in, bytes and
//! messages out; generic over the seams, so that tests run it on a simulated disk.
//!
//! ```text
//! received(bytes) -> Request -> read:  memory and cache -> answered at once
//!                            |         else a task that waits for the block
//!                            -> write: the log, answered once it is durable and visible
//!                            -> another shard's key: handed over, answered when it answers
//! turn()  tasks that are done, writes that are visible, messages, deadlines -> answers
//! ```
//! `admission.rs` says where requests wait, and what happens when more come than can be done.
//!
//! Invariants: every request is answered once; a write is answered only when the log says that
//! it is visible; what waits is bounded in number by the connections' own limits.

mod admin;
mod admission;
mod answer;
mod execute;
mod forward;
mod links;
mod replication;
mod revive;
mod scan;
mod sessions;
mod waiting;
mod writes;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use annulus_cluster::Topology;
use annulus_cluster::coordinator::OpId;
use annulus_cluster::message::Want;
use annulus_cluster::repair::{ReadId, Repairer};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::disk::Disk;
use annulus_engine::model::causality::ContextSecret;
use annulus_engine::model::{
    Instant, NamespaceId, Record, Timestamp, Token, VersionVector, WallMicros,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Found, Merge, Outcome, Shard};
use annulus_net::server_connection::{
    Arrival, MemoryBudget, Received, Replies, ServerConnection, ServerFacts, Ticket,
};
use annulus_net::wire::hello::{Node as NodeFact, Run};
use annulus_net::wire::peek;
use annulus_net::wire::request::Request;
use annulus_net::wire::response::{BatchResults, Failure, Page};
use annulus_net::wire::status::Status;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

pub use admin::{AdminDesk, AdminJob, Vote, disk_level};
pub use answer::{Answer, ConnectionKey, Origin};
pub use forward::{Message, ShardMap};
pub use links::{Lane, LinkDown, Links, NoLinks};
pub use replication::{MovesReport, RepairFigures, ReplicationOptions};

use crate::metrics::{ShardMetrics, ShardSnapshot};
use crate::namespaces::{Catalogue, Mode, Namespace};
use admission::Admission;
use execute::Pending;
use replication::{Changed, FilledPage, KeyRead, MergedPage, OwnWrite, Replication};
use revive::Revival;
use sessions::{Session, Sessions};
use waiting::WaitingTasks;
use writes::WriteQueue;

/// Most tasks (disk reads, conditional writes, scans) of one shard at a time.
const TASKS_MAX: usize = 4096;
/// How often deadlines of requests are looked at, in nanoseconds.
const SWEEP_NANOS: u64 = 5_000_000;
/// How often time-outs of connections are looked at, in nanoseconds.
const SESSION_SWEEP_NANOS: u64 = 500_000_000;
/// Most requests of a turn whose memory is asked for in advance.
const FORESEEN_MAX: usize = 1024;
/// A batch's results stop growing here: later reads of it answer BUSY.
const BATCH_RESULT_BYTES_MAX: usize = 8 << 20;

/// Where a connection's output is gathered. The sockets implement it.
pub trait Wires {
    /// The output of a connection, if it still exists. Whatever is appended will be sent.
    fn out(&mut self, connection: ConnectionKey) -> Option<&mut Vec<u8>>;
    /// Bytes of output that the socket has not taken yet.
    fn unsent(&self, connection: ConnectionKey) -> usize;
    /// Receives again from a connection whose verdict was [`Verdict::Pause`].
    fn resume(&mut self, connection: ConnectionKey);
    /// Sends what is in the output, then closes.
    fn close(&mut self, connection: ConnectionKey);
}

/// The other shards of the node. The mesh implements it.
pub trait Peers {
    /// Hands a message over.
    ///
    /// # Errors
    /// The message, when that shard's inbox is full.
    fn send(&mut self, shard: u32, message: Message) -> Result<(), Message>;
}

/// What becomes of a connection after its bytes were taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Keep,
    /// It goes on, but no more bytes should be received until answers have gone out.
    Pause,
    /// It ends, after its output was sent.
    Close,
    /// Its socket and these bytes belong to another shard.
    HandOver {
        /// That shard.
        shard: u32,
        /// Everything received so far.
        bytes: Vec<u8>,
    },
}

/// A batch whose results come in one by one.
#[derive(Debug)]
struct BatchInProgress {
    connection: ConnectionKey,
    ticket: Option<Ticket>,
    results: BatchResults,
}

/// What a task came to.
enum Done {
    Read {
        task: u64,
        pending: Pending,
        /// Taken before the read began.
        base: VersionVector,
        found: annulus_engine::Result<Found>,
        began: Instant,
    },
    Write {
        task: u64,
        pending: Pending,
        outcome: annulus_engine::Result<Outcome>,
        /// Whether the log had taken it, so that after an error it may be applied.
        begun: bool,
        /// Siblings: the context to give out, encoded.
        context: Vec<u8>,
        began: Instant,
    },
    Scan {
        origin: Origin,
        page: Page,
        next: annulus_engine::Result<Option<(Token, Vec<u8>)>>,
        began: Instant,
    },
    Admin {
        origin: Origin,
        reply: Result<Vec<u8>, (Status, String)>,
    },
    /// A change of the namespaces has ended with their register.
    Changed(Changed),
    /// This node's vote on a register, for whoever asked, or why there is none.
    Voted {
        from: PeerShard,
        vote: Result<Vec<u8>, String>,
    },
    /// A record of a coordinator was merged, and is visible if somebody waits for it.
    Merged {
        origin: Option<(PeerShard, u64)>,
        merged: annulus_engine::Result<()>,
    },
    /// A read for a coordinator on another node.
    ReplicaRead {
        from: PeerShard,
        id: u64,
        want: Want,
        as_of: Timestamp,
        is_primary: bool,
        /// Taken before the read began.
        base: VersionVector,
        found: annulus_engine::Result<Found>,
    },
    /// This shard's own part of a write that read the key first.
    OwnWrite {
        own: Box<OwnWrite>,
        outcome: annulus_engine::Result<Outcome>,
        begun: bool,
        record: Option<Record>,
    },
    /// This shard's own part of a read over the replicas.
    OwnRead {
        op: OpId,
        as_of: Timestamp,
        is_primary: bool,
        /// Taken before the read began.
        base: VersionVector,
        found: annulus_engine::Result<Found>,
    },
    /// A version was drawn for an operation on a register, or could not be.
    KeyBalloted {
        id: u64,
        version: annulus_cluster::keys::Version,
        is_drawn: bool,
    },
    /// A register was read for its proposer.
    KeyRead(KeyRead),
    /// Another node's newer catalogue was made this node's, or could not be.
    Adopted(Result<(), (Status, String)>),
    /// A page for a replica that catches up.
    SyncServed {
        to: PeerShard,
        page: annulus_engine::Result<Vec<u8>>,
    },
    /// A scan for the trees of repair.
    RepairRead {
        factor: u8,
        repairer: Rc<RefCell<Repairer>>,
        id: ReadId,
        read: annulus_engine::Result<u64>,
    },
    /// Records of repair were merged.
    RepairMerged {
        from: PeerShard,
        id: u64,
        merged: annulus_engine::Result<u64>,
    },
    /// A page of what could not be read here was merged.
    Refilled {
        id: u64,
        page: annulus_engine::Result<FilledPage>,
    },
    /// A range was declared whole.
    RefillCleared {
        id: u64,
        cleared: annulus_engine::Result<()>,
    },
    /// A page of a helper was merged, all of it visible.
    SyncMerged {
        id: u64,
        merged: annulus_engine::Result<MergedPage>,
    },
}

type Task = Pin<Box<dyn Future<Output = Done>>>;

/// One shard's loop.
pub struct Pump<D: Disk, R: Runtime> {
    shard: Shard<D, R>,
    runtime: R,
    facts: Rc<ServerFacts>,
    map: ShardMap,
    secret: ContextSecret,
    catalogue: Rc<Catalogue>,
    sessions: Sessions,
    /// Connections that are being handed to another shard.
    moving: BTreeMap<ConnectionKey, u32>,
    /// Tokens of the requests of this turn.
    foreseen: Vec<Token>,
    /// Connections whose output must be watched.
    attention: Vec<ConnectionKey>,
    budget: MemoryBudget,
    tasks: FuturesUnordered<Task>,
    waiting: WaitingTasks,
    waker: Waker,
    writes: WriteQueue,
    batches: BTreeMap<usize, BatchInProgress>,
    next_batch: usize,
    forwarded: BTreeMap<u64, (Origin, Instant)>,
    next_forward: u64,
    outbox: Vec<(u32, Message)>,
    desk: Rc<dyn AdminDesk>,
    /// What a member of a cluster has on top; none in a node of its own.
    replication: Option<Box<Replication>>,
    metrics: Rc<RefCell<ShardMetrics>>,
    admission: Admission,
    /// Gets of this turn that needed no disk.
    answered_at_once: u64,
    /// Time of this turn.
    now: Instant,
    wall: WallMicros,
    next_sweep: Instant,
    next_session_sweep: Instant,
    draining: bool,
    revival: Revival<D, R>,
}

/// What a pump needs to begin.
#[expect(missing_debug_implementations, reason = "holds trait objects")]
pub struct PumpOptions {
    /// What clients are told in HELLO, and the connections' limits.
    pub facts: ServerFacts,
    /// Who serves which partition.
    pub map: ShardMap,
    /// Signs contexts.
    pub secret: ContextSecret,
    /// The namespaces.
    pub catalogue: Rc<Catalogue>,
    /// Memory for long messages of all connections, in bytes.
    pub message_memory: usize,
    /// Answers ADMIN and STATS.
    pub desk: Rc<dyn AdminDesk>,
    /// The other members; none for a node of its own.
    pub replication: Option<ReplicationOptions>,
}

impl<D: Disk, R: Runtime> std::fmt::Debug for Pump<D, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pump").field("sessions", &self.sessions.len()).finish_non_exhaustive()
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// A pump over an open shard.
    pub fn new(shard: Shard<D, R>, runtime: R, options: PumpOptions) -> Pump<D, R> {
        let (now, wall) = (runtime.now(), runtime.wall());
        let cluster = options.facts.welcome.cluster;
        if options.replication.is_some() {
            shard.watch_touched();
        }
        let floor = shard.floor();
        Pump {
            shard,
            runtime,
            facts: Rc::new(options.facts),
            map: options.map,
            secret: options.secret,
            catalogue: options.catalogue,
            sessions: Sessions::default(),
            moving: BTreeMap::new(),
            foreseen: Vec::new(),
            attention: Vec::new(),
            budget: MemoryBudget::new(options.message_memory),
            tasks: FuturesUnordered::new(),
            waiting: WaitingTasks::default(),
            waker: Waker::noop().clone(),
            writes: WriteQueue::default(),
            batches: BTreeMap::new(),
            next_batch: 0,
            forwarded: BTreeMap::new(),
            next_forward: 0,
            outbox: Vec::new(),
            desk: options.desk,
            replication: options
                .replication
                .map(|it| Box::new(Replication::new(it, cluster, options.map, floor, now))),
            metrics: Rc::default(),
            admission: Admission::new(now),
            answered_at_once: 0,
            now,
            wall,
            next_sweep: now,
            next_session_sweep: now,
            draining: false,
            revival: Revival::default(),
        }
    }

    /// The shard behind it.
    pub fn shard(&self) -> &Shard<D, R> {
        &self.shard
    }

    /// What wakes the loop when a task can go on; without it the loop must come round by itself.
    pub fn set_waker(&mut self, waker: Waker) {
        self.waker = waker;
    }

    /// The time for all that happens until the next call.
    pub fn tick(&mut self, now: Instant) {
        self.now = now;
        self.wall = self.runtime.wall();
        self.admission.begin_turn(now);
        if let Some(replication) = &self.replication {
            self.admission.set_replicas(replication.window());
        }
        Rc::make_mut(&mut self.facts).welcome.wall_us = self.wall.0;
    }

    /// A connection was accepted.
    pub fn accepted(&mut self, connection: ConnectionKey) {
        let mut wire = ServerConnection::new(self.now, &self.facts, self.budget.clone());
        if self.draining {
            // It has not greeted: there is nothing to say yet.
            wire.drain(&mut Vec::new());
        }
        self.sessions.insert(connection, Session::new(wire));
        self.metrics.borrow_mut().counters.connections_accepted += 1;
    }

    /// Remembers to which shard a connection is on its way.
    pub fn note_target(&mut self, connection: ConnectionKey, shard: u32) {
        self.moving.insert(connection, shard);
    }

    /// The shard to which a connection is on its way.
    pub fn take_target(&mut self, connection: ConnectionKey) -> Option<u32> {
        self.moving.remove(&connection)
    }

    /// A connection is gone. Requests in flight go on; their answers are dropped.
    pub fn closed(&mut self, connection: ConnectionKey) {
        self.moving.remove(&connection);
        self.sessions.take(connection);
    }

    /// Bytes that will be received this turn: the memory of their keys is asked for.
    pub fn foresee(&mut self, bytes: &[u8]) {
        let (map, foreseen) = (self.map, &mut self.foreseen);
        let seed = self.facts.welcome.hash_seed;
        peek::tokens(bytes, seed, &mut |token| {
            if foreseen.len() < FORESEEN_MAX && map.shard_of(token) == map.own() {
                foreseen.push(token);
            }
        });
    }

    /// All bytes of the turn were foreseen.
    pub fn fetch_foreseen(&mut self) {
        // One request has nothing to overlap with.
        if self.foreseen.len() > 1 {
            self.shard.prefetch(&self.foreseen);
        }
        self.foreseen.clear();
    }

    /// Bytes arrived. Each whole request is carried out, or begun.
    pub fn received(
        &mut self,
        connection: ConnectionKey,
        bytes: &[u8],
        out: &mut Vec<u8>,
        unsent: usize,
    ) -> Verdict {
        // The session is taken out for the call, so that the handler may use the rest of us.
        let Some(mut session) = self.sessions.take(connection) else { return Verdict::Close };
        self.metrics.borrow_mut().counters.received_bytes += bytes.len() as u64;
        let now = self.now;
        let facts = Rc::clone(&self.facts);
        session.wire.set_window(self.admission.window(&mut session.interval));
        let mut handler = |replies: &mut Replies<'_>, arrival: Arrival, request: Request<'_>| {
            self.handle(connection, replies, arrival, request);
        };
        let received = session.wire.receive(now, bytes, &facts, out, &mut handler);
        drop(facts);
        let verdict = match received {
            Ok(Received::Continue) if session.wire.wants_pause(&self.facts, unsent + out.len()) => {
                session.paused = true;
                Verdict::Pause
            }
            Ok(Received::Continue) => Verdict::Keep,
            Ok(Received::HandOver { shard, bytes }) => return Verdict::HandOver { shard, bytes },
            Err(close) => {
                tracing::debug!(connection = connection.0, %close, "connection closed");
                self.metrics.borrow_mut().counters.connections_shed += 1;
                // Nobody tells of the end of what is ended here; answers find nobody.
                return Verdict::Close;
            }
        };
        Self::attend(&mut self.attention, connection, &mut session);
        self.sessions.insert(connection, session);
        verdict
    }

    /// Connections whose output was too much to be sent at once: turns long answers into frames
    /// as the socket takes them, and lets paused ones go on.
    fn serve_output(&mut self, wires: &mut dyn Wires) -> bool {
        let mut worked = false;
        let mut index = 0;
        while index < self.attention.len() {
            let connection = self.attention[index];
            let waits = match self.sessions.get_mut(connection) {
                None => false,
                Some(session) => {
                    let unsent = wires.unsent(connection);
                    let moved = session.unsent.saturating_sub(unsent);
                    worked |= moved > 0;
                    session.wire.sent(self.now, moved, unsent);
                    session.unsent = unsent;
                    if session.wire.has_queued()
                        && unsent < self.facts.options.pause_bytes
                        && let Some(out) = wires.out(connection)
                    {
                        worked = true;
                        session.wire.fill_output(out, self.facts.options.pause_bytes);
                        session.unsent = wires.unsent(connection);
                    }
                    if session.paused && !session.wire.wants_pause(&self.facts, session.unsent) {
                        session.paused = false;
                        worked = true;
                        wires.resume(connection);
                    }
                    session.attended = session.paused || session.wire.has_queued();
                    session.attended
                }
            };
            if waits {
                index += 1;
            } else {
                self.attention.swap_remove(index);
            }
        }
        worked
    }

    /// Takes note of a connection whose output must be watched.
    fn attend(
        attention: &mut Vec<ConnectionKey>,
        connection: ConnectionKey,
        session: &mut Session,
    ) {
        if !session.attended && (session.paused || session.wire.has_queued()) {
            session.attended = true;
            attention.push(connection);
        }
    }

    /// Does what is due: finished tasks, visible writes, deadlines. Returns whether anything was.
    pub fn turn(
        &mut self,
        wires: &mut dyn Wires,
        peers: &mut dyn Peers,
        links: &mut dyn Links,
    ) -> bool {
        let mut worked = self.poll_tasks(wires);
        worked |= self.answer_writes(wires);
        if self.shard.is_poisoned() {
            worked |= self.revive(wires);
        }
        if !self.attention.is_empty() {
            worked |= self.serve_output(wires);
        }
        if self.now >= self.next_sweep {
            self.next_sweep = self.now.after_nanos(SWEEP_NANOS);
            worked |= self.expire_writes(wires);
            worked |= self.expire_forwarded(wires);
            worked |= self.expire_tasks(wires);
        }
        if self.now >= self.next_session_sweep {
            self.next_session_sweep = self.now.after_nanos(SESSION_SWEEP_NANOS);
            worked |= self.sweep_sessions(wires);
        }
        if self.replication.is_some() {
            worked |= self.replicate(wires, links);
        }
        self.send_messages(wires, peers) | worked
    }

    /// A turn has ended, with its answers on their way: what was answered in it took so long.
    pub fn end_turn(&mut self) {
        let metrics = &mut *self.metrics.borrow_mut();
        metrics.counters.turns += 1;
        if self.answered_at_once > 0 {
            let nanos = self.runtime.now().nanos_since(self.now);
            metrics.read_latency.record_many(nanos, self.answered_at_once);
            self.answered_at_once = 0;
        }
    }

    /// Takes note of the bytes sent on all connections so far.
    pub fn note_sent(&mut self, sent_bytes: u64) {
        self.metrics.borrow_mut().counters.sent_bytes = sent_bytes;
    }

    /// When [`Pump::turn`] must be called though nothing arrives: deadlines of what waits.
    #[must_use]
    pub fn next_timeout(&mut self) -> Option<Instant> {
        let replication = self.replication.as_mut().map(|replication| replication.next_timeout());
        let waits = !self.writes.is_empty() || !self.tasks.is_empty() || !self.forwarded.is_empty();
        if waits {
            let held = self.writes.held_until(self.shard.visible());
            return replication.into_iter().chain(held).chain([self.next_sweep]).min();
        }
        let sessions = (!self.sessions.is_empty()).then_some(self.next_session_sweep);
        sessions.into_iter().chain(self.revival.next_timeout()).chain(replication).min()
    }

    /// New requests are refused from now on; those in flight are finished.
    pub fn drain(&mut self, wires: &mut dyn Wires) {
        self.draining = true;
        for (connection, session) in self.sessions.iter_mut() {
            if let Some(out) = wires.out(connection) {
                session.wire.drain(out);
            }
        }
    }

    /// Whether nothing is in flight any more.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.writes.is_empty()
            && self.tasks.is_empty()
            && self.forwarded.is_empty()
            && self.outbox.is_empty()
            && self.replication.as_ref().is_none_or(|replication| replication.is_idle())
            && self.sessions.values().all(|session| session.wire.in_flight() == 0)
    }

    /// Clients are told of another partition map from now on.
    pub fn set_map(&mut self, version: u64, runs: Vec<Run>, nodes: Vec<NodeFact>) {
        let welcome = &mut Rc::make_mut(&mut self.facts).welcome;
        (welcome.map_version, welcome.runs, welcome.nodes) = (version, runs, nodes);
    }

    /// Members and placement; none for a node of its own.
    #[must_use]
    pub fn topology(&self) -> Option<&Topology> {
        self.replication.as_ref().map(|replication| replication.topology())
    }

    /// Whether the node is no member of its cluster any more: it has nothing left to do.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.topology().is_some_and(|topology| topology.node(topology.own()).is_none())
    }

    /// Whether no answer waits to be cut into frames.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.sessions.values().all(|session| !session.wire.has_queued())
    }

    /// Connections, and requests that are not answered yet: of these connections, and those that
    /// wait here for the log, the disk or another shard.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        let own: usize = self.sessions.values().map(|s| s.wire.in_flight() as usize).sum();
        let waiting = self.writes.len() + self.tasks.len() + self.forwarded.len();
        (self.sessions.len(), own.max(waiting))
    }

    /// The namespaces have changed.
    pub fn set_catalogue(&mut self, catalogue: Rc<Catalogue>) {
        Rc::make_mut(&mut self.facts).welcome.namespaces = admin::namespace_facts(&catalogue);
        self.catalogue = catalogue;
        self.spread_settings();
    }

    /// The shard's numbers, for other threads.
    #[must_use]
    pub fn snapshot(&self) -> ShardSnapshot {
        let in_flight = self.sessions.values().map(|s| u64::from(s.wire.in_flight())).sum();
        let held = self.sessions.values().map(|s| s.wire.memory() as u64).sum();
        let mut snapshot = admin::snapshot(
            self.map.own(),
            &self.metrics.borrow(),
            &self.shard.stats(),
            (self.sessions.len() as u64, in_flight, held),
            self.standing_of_shard(),
        );
        snapshot.gauges.requests_allowed = self.admission.limit().map_or(0, u64::from);
        if let Some(replication) = &self.replication {
            replication.note_room(&mut snapshot);
        }
        match self.repair_figures() {
            Some(figures) => figures.note_in(&mut snapshot),
            None => self.note_scrub_in(&mut snapshot),
        }
        self.note_gossip_in(&mut snapshot);
        snapshot
    }

    /// The namespace of a request.
    fn namespace(&self, id: NamespaceId) -> Result<&Namespace, Failure<'static>> {
        self.catalogue
            .get(id)
            .ok_or_else(|| Failure::new(Status::NO_NAMESPACE, "no namespace has this id"))
    }

    fn merge_of(namespace: &Namespace) -> Merge {
        match namespace.mode {
            Mode::Siblings => Merge::Siblings,
            Mode::Lww | Mode::Linearizable => Merge::LastWriteWins,
        }
    }

    fn spawn(&mut self, task: impl Future<Output = Done> + 'static) {
        self.tasks.push(Box::pin(task));
    }

    /// Polls the tasks that were woken.
    fn poll_tasks(&mut self, wires: &mut dyn Wires) -> bool {
        if self.tasks.is_empty() {
            return false;
        }
        let mut worked = false;
        let waker = self.waker.clone();
        let mut context = Context::from_waker(&waker);
        while let Poll::Ready(Some(done)) = self.tasks.poll_next_unpin(&mut context) {
            worked = true;
            self.finish(done, wires);
        }
        worked
    }

    /// Gives an answer to whoever waits for it.
    fn answer(&mut self, origin: Origin, answer: &Answer<'_>, wires: &mut dyn Wires) {
        self.count_failure(answer);
        match origin {
            Origin::Connection(connection, ticket) => {
                self.admission.answered();
                if let Some(session) = self.sessions.get_mut(connection)
                    && let Some(out) = wires.out(connection)
                {
                    answer.to_connection(&mut session.wire.replies(out), ticket);
                    Self::attend(&mut self.attention, connection, session);
                }
            }
            Origin::Batch { batch, index, verb } => {
                let Some(waiting) = self.batches.get_mut(&batch) else { return };
                answer.to_batch(&mut waiting.results, index, verb);
                if waiting.results.is_complete() {
                    self.finish_batch(batch, wires);
                }
            }
            Origin::Shard { shard, id } => {
                let (status, body) = answer.to_pieces();
                self.outbox.push((shard, Message::Answer { id, status, body }));
            }
            Origin::Replica { from, id } => self.answer_replica(from, id, answer),
            Origin::Forward { from, id } => {
                let (status, body) = answer.to_bytes();
                self.answer_forwarded(from, id, status, &body);
            }
            Origin::Operation(operation) => self.local_done(operation, answer),
            // The task may have ended.
            Origin::Task(tell) => drop(tell.send(answer.to_bytes())),
        }
    }

    fn finish_batch(&mut self, batch: usize, wires: &mut dyn Wires) {
        let Some(mut done) = self.batches.remove(&batch) else { return };
        self.admission.answered();
        if let Some(ticket) = done.ticket.take()
            && let Some(session) = self.sessions.get_mut(done.connection)
            && let Some(out) = wires.out(done.connection)
        {
            session.wire.replies(out).batch(ticket, done.results);
            Self::attend(&mut self.attention, done.connection, session);
        }
    }

    fn count_failure(&self, answer: &Answer<'_>) {
        let Answer::Failure(failure) = answer else { return };
        let counters = &mut self.metrics.borrow_mut().counters;
        match failure.status {
            Status::BUSY => counters.refused_busy += 1,
            Status::FULL => counters.refused_full += 1,
            Status::EXPIRED => counters.refused_expired += 1,
            Status::CORRUPT => counters.corruptions += 1,
            Status::MAY_BE_APPLIED => counters.errors_may_be_applied += 1,
            _ => {}
        }
        if failure.status != Status::MAY_BE_APPLIED {
            counters.errors_not_started += 1;
        }
    }

    /// The connections' own time-outs.
    fn sweep_sessions(&mut self, wires: &mut dyn Wires) -> bool {
        let mut worked = false;
        let mut ending = Vec::new();
        for (connection, session) in self.sessions.iter_mut() {
            if session.wire.next_timeout(&self.facts).is_none_or(|when| when > self.now) {
                continue;
            }
            let Some(out) = wires.out(connection) else { continue };
            if session.wire.handle_timeout(self.now, &self.facts, out).is_err() {
                ending.push(connection);
            }
        }
        for connection in ending {
            worked = true;
            self.metrics.borrow_mut().counters.connections_shed += 1;
            wires.close(connection);
            // Nobody tells of the end of what was ended here.
            self.closed(connection);
        }
        worked
    }
}
