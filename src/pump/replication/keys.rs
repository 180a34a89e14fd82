//! Keys of linearizable namespaces: this shard as a proposer of their operations, and as the home
//! that other proposers ask.
//!
//! ```text
//! get, put, del -> the first healthy home -> KeyOp -> KeyAsk, KeyAccept -> homes, own among them
//!                                                  <- KeySaid, WriteDone
//!                                         -> answer
//! KeyAsk     -> promise, ceiling, what the key holds   -> KeySaid
//! KeyAccept  -> the promise still stands -> the log    -> WriteDone, when it is durable
//! late.rs       what sync, repair and refilling bring
//! ```
//!
//! Invariant: steps are carried out at the end of the turn, where answers find their connection. A
//! version that was drawn ends as a record or as a void, whatever becomes of its operation. Without
//! a majority of homes an operation is refused in its time; what waits is bounded in number and
//! bytes. `annulus_cluster::keys` has the protocol and why it is right.

mod late;
mod serve;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use annulus_cluster::NodeId;
use annulus_cluster::coordinator::{OpId, Requirement};
use annulus_cluster::keys::{Ended, Expect, Goal, KeyOp, Promises, Shown, Step, Version, value};
use annulus_cluster::message::{FORWARD_HOPS_MAX, KeyAsk, PeerMessage, Want, WriteResult};
use annulus_engine::disk::Disk;
use annulus_engine::model::limits::VALUE_SIZE_CEILING;
use annulus_engine::model::{
    Instant, Kind, NamespaceId, PartitionId, Record, RecordRef, Timestamp, Token, Value,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Applied, Condition};
use annulus_net::wire::fields::{self, OperationFlags};
use annulus_net::wire::operation::{Operation as Request, WriteOptions};
use annulus_net::wire::response::{Failure, ReadFacts, ValueRef, WriteFacts};
use annulus_net::wire::status::Status;

use crate::namespaces::Namespace;
use crate::pump::admission::Place;
use crate::pump::execute::Target;
use crate::pump::writes::Waiting;
use crate::pump::{Answer, Done, Lane, Origin, Pump, Wires};
pub(super) use late::LateRecords;
use late::Wanted;
pub(in crate::pump) use serve::KeyRead;

/// Marks the numbers of these operations among those of all that homes are asked: the coordinator's
/// leave it out.
const KEY_ID: u64 = 1 << 63;
/// Most operations of a shard, and most bytes of their keys and values.
const OPERATIONS_MAX: usize = 8 << 10;
const BYTES_MAX: usize = 64 << 20;
/// Most keys that are mended at a time, and how long one may take, in nanoseconds.
const MENDING_MAX: usize = 64;
const MENDING_NANOS: u64 = 2_000_000_000;
/// A value is put again with so many bytes more at most.
const HEAD_SIZE_MAX: usize = 32;

/// A put or delete.
#[derive(Debug)]
struct Write {
    /// The stored value; `None` to delete.
    value: Option<Vec<u8>>,
    expiry_ms: u64,
}

/// One operation.
#[derive(Debug)]
struct Operation {
    machine: KeyOp,
    /// None for mending.
    origin: Option<Origin>,
    token: Token,
    namespace: NamespaceId,
    key: Vec<u8>,
    write: Option<Write>,
    version_only: bool,
    /// The map by which it knows its homes.
    epoch: u32,
    /// Every write up to it was here before anything was read.
    as_of: Timestamp,
    /// What was drawn and not used.
    version: Option<Version>,
    /// What is proposed.
    record: Option<Record>,
    /// What homes showed that were asked for it.
    whole: BTreeMap<NodeId, Option<Record>>,
    bytes: usize,
    began: Instant,
    /// Its place among the timers.
    due: Instant,
}

/// What a pump of a cluster has for keys that are registers.
pub(super) struct Keys {
    promises: Rc<RefCell<Promises>>,
    wanted: Rc<RefCell<Wanted>>,
    operations: BTreeMap<u64, Operation>,
    lines: BTreeMap<Token, VecDeque<u64>>,
    timers: BTreeSet<(Instant, u64)>,
    mending: BTreeMap<u64, (NamespaceId, Vec<u8>)>,
    /// Steps for the end of the turn.
    steps: Vec<(u64, Step)>,
    bytes: usize,
    next_id: u64,
}

impl Keys {
    /// Of a shard that begins a life. Its numbers differ from those of earlier starts.
    pub(super) fn new(partition_bits: u32, floor: Timestamp, first_id: u64) -> Keys {
        Keys {
            promises: Rc::new(RefCell::new(Promises::new(partition_bits, floor))),
            wanted: Rc::default(),
            operations: BTreeMap::new(),
            lines: BTreeMap::new(),
            timers: BTreeSet::new(),
            mending: BTreeMap::new(),
            steps: Vec::new(),
            bytes: 0,
            next_id: first_id | KEY_ID,
        }
    }

    /// Whether a number is one of these operations.
    pub(super) fn is_key_id(id: u64) -> bool {
        id & KEY_ID != 0
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|(due, _)| *due)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.operations.values().all(|operation| operation.origin.is_none())
    }

    pub(super) fn late(&self) -> LateRecords {
        LateRecords::new(&self.promises, &self.wanted)
    }

    /// Dead records of the partition at or below the floor may go.
    pub(super) fn purge(&self, partition: PartitionId, floor: Timestamp) {
        self.promises.borrow_mut().purge(partition, floor);
    }

    /// Ballots of the partition up to there are refused from now on.
    pub(super) fn raise(&self, partition: PartitionId, floor: Timestamp) {
        self.promises.borrow_mut().raise(partition, floor);
    }

    /// A home begins a life, and may have forgotten what it promised.
    pub(super) fn bar(&self) {
        self.promises.borrow_mut().bar();
    }

    /// Tells an operation's machine something.
    fn tell<T>(
        &mut self,
        id: u64,
        tell: impl FnOnce(&mut KeyOp, &mut Vec<Step>) -> T,
    ) -> Option<T> {
        let operation = self.operations.get_mut(&id)?;
        let mut out = Vec::new();
        let told = tell(&mut operation.machine, &mut out);
        self.steps.extend(out.into_iter().map(|step| (id, step)));
        let due = operation.machine.next_timeout();
        if due != operation.due {
            self.timers.remove(&(operation.due, id));
            self.timers.insert((due, id));
            operation.due = due;
        }
        Some(told)
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Carries out an operation on a key of a linearizable namespace. `hops`: how often it was
    /// handed on.
    pub(super) fn coordinate_key(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        hops: u8,
        request: &Request<'_>,
        namespace: &Namespace,
    ) {
        let Some(replication) = &mut self.replication else { return };
        let token = request.token();
        let partition = token.partition(self.map.partition_bits());
        let topology = Rc::clone(&replication.topology);
        let (own, homes) = (topology.own(), topology.replicas(partition, namespace.n));
        let is_fit = homes.contains(&own)
            && self.shard.is_founded(partition)
            && !self.shard.is_unknown(token);
        // Whoever is first proposes for all, so that they wait in line instead of contending. A read
        // mostly proposes nothing, and any home can ask the others.
        let health = replication.coordinator.health();
        let first = homes.iter().copied().find(|home| match *home == own {
            true => is_fit,
            false => health.is_healthy(*home),
        });
        let other = homes.iter().copied().find(|home| *home != own && health.is_healthy(*home));
        let is_here = is_fit && (hops > 0 || matches!(request, Request::Get(_)));
        let to = if is_here { Some(own) } else { first.or(other) };
        match to {
            Some(home) if home != own && hops < FORWARD_HOPS_MAX => {
                let mut body = Vec::with_capacity(request.size());
                request.encode(&mut body);
                let how = (request.opcode(), hops);
                let origin = target.defer();
                if let Err(origin) = self.forward(home, partition, how, &body, deadline, origin) {
                    self.refuse_later(origin, Status::BUSY, "the key's home cannot take more");
                }
            }
            _ if !is_fit => {
                let what = "no home of the key can be reached that may answer for it";
                let failure = Failure::new(Status::UNAVAILABLE, what).retry_after(100);
                self.refuse_key(target, failure);
            }
            _ => self.propose_for_key(target, deadline, request, namespace, homes),
        }
    }

    fn refuse_key(&self, target: Target<'_, '_>, failure: Failure<'_>) {
        let answer = Answer::Failure(failure);
        self.count_failure(&answer);
        target.answer(&answer);
    }

    fn propose_for_key(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        request: &Request<'_>,
        namespace: &Namespace,
        homes: &[NodeId],
    ) {
        let (levels, options) = match request {
            Request::Get(get) => ((get.level, get.primary, get.flags), None),
            Request::Put(put) => {
                let it = &put.options;
                ((it.level, it.primary, it.flags), Some(it))
            }
            Request::Delete(delete) => {
                let it = &delete.options;
                ((it.level, it.primary, it.flags), Some(it))
            }
        };
        let (level, primary, flags) = levels;
        if self.shard.durability_window_ms() != 0 {
            let what = "a linearizable namespace needs nodes that run with `--durability sync`";
            return self.refuse_key(target, Failure::new(Status::UNSUPPORTED, what));
        }
        if flags.has(OperationFlags::SLOPPY) {
            let what = "nobody stands in for a home of a linearizable key: not `sloppy`";
            return self.refuse_key(target, Failure::new(Status::BAD_REQUEST, what));
        }
        let defaults = self.defaults(namespace, u8::try_from(homes.len()).unwrap_or(u8::MAX));
        let requirement = match options {
            None => Requirement::read(&defaults, level, primary, flags),
            Some(it) => Requirement::write(&defaults, level, primary, it.durable, flags),
        };
        let needed = match requirement {
            Ok(requirement) => usize::from(requirement.needed()),
            Err(refusal) => return self.refuse_key(target, refusal.into()),
        };
        let (goal, write) = match self.goal_of(request, options) {
            Ok(goal) => goal,
            Err(failure) => return self.refuse_key(target, failure),
        };
        if self.is_in_vain(Place::Replicas, deadline) {
            return self.refuse_in_vain(target);
        }
        let (token, namespace, key) = match request {
            Request::Get(get) => (get.token, get.namespace, get.key),
            Request::Put(put) => (put.token, put.namespace, put.key),
            Request::Delete(delete) => (delete.token, delete.namespace, delete.key),
        };
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        if keys.operations.len() >= OPERATIONS_MAX || keys.bytes >= BYTES_MAX {
            let failure = Failure::new(Status::BUSY, "too many operations wait for other homes");
            return self.refuse_key(target, failure.retry_after(2));
        }
        if goal == Goal::Read {
            self.metrics.borrow_mut().counters.gets += 1;
        }
        let begun = Begun { token, namespace, key: key.to_vec(), goal, write, needed };
        self.begin_key(begun, flags, deadline, Some(target.defer()));
    }

    /// What is asked for.
    fn goal_of(
        &self,
        request: &Request<'_>,
        options: Option<&WriteOptions<'_>>,
    ) -> Result<(Goal, Option<Write>), Failure<'static>> {
        let (wanted, value, expiry_ms) = match request {
            Request::Get(_) => return Ok((Goal::Read, None)),
            Request::Put(put) => {
                let expiry_ms = self.expiry(put.namespace, put.ttl)?;
                ((put.token, put.namespace, put.key), Some(put.value), expiry_ms)
            }
            Request::Delete(it) => ((it.token, it.namespace, it.key), None, 0),
        };
        let Some(options) = options else { return Ok((Goal::Read, None)) };
        let size_max = VALUE_SIZE_CEILING - HEAD_SIZE_MAX;
        if value.is_some_and(|value| value.len() > size_max) {
            let what = "the value is too long for a linearizable namespace";
            return Err(Failure::new(Status::TOO_BIG, what).detail(size_max as u64));
        }
        let (mutation, context) = self.mutation(wanted, value, expiry_ms, options)?;
        if let Some(context) = context
            && self.shard.clock_observe(context.timestamp, self.wall).is_err()
        {
            let what = "the context is from a clock that is too far ahead";
            return Err(Failure::new(Status::CLOCK_SKEW, what));
        }
        let expect = match mutation.condition {
            Condition::None => Expect::Always,
            Condition::Absent => Expect::Absent,
            Condition::Version(timestamp, dot) => Expect::Version((timestamp, dot)),
        };
        let write = Write { value: value.map(value::fresh), expiry_ms };
        Ok((Goal::Write(expect), Some(write)))
    }

    fn begin_key(
        &mut self,
        begun: Begun,
        flags: OperationFlags,
        deadline: Instant,
        origin: Option<Origin>,
    ) {
        let now = self.now;
        let partition = begun.token.partition(self.map.partition_bits());
        let (as_of, _) = self.standing(partition, begun.namespace);
        let Some(replication) = &mut self.replication else { return };
        let n = self.catalogue.get(begun.namespace).map_or(1, |namespace| namespace.n);
        let topology = Rc::clone(&replication.topology);
        let own = topology.own();
        let homes = topology.replicas(partition, n);
        let others = topology.other_replicas(partition, n);
        let groups: Vec<&[NodeId]> = std::iter::once(homes).chain(others).collect();
        let keys = &mut replication.keys;
        keys.next_id += 1;
        let id = keys.next_id;
        // Neighbours pause differently.
        let seed = id.rotate_left(32) ^ u64::from(own.0);
        let machine = KeyOp::new(own, &groups, begun.goal, begun.needed, deadline, seed);
        let value = begun.write.as_ref().and_then(|write| write.value.as_ref());
        let bytes = begun.key.len() + value.map_or(0, Vec::len);
        keys.bytes += bytes;
        if matches!(begun.goal, Goal::Mend(_)) {
            keys.mending.insert(id, (begun.namespace, begun.key.clone()));
        }
        let operation = Operation {
            machine,
            origin,
            token: begun.token,
            namespace: begun.namespace,
            key: begun.key,
            write: begun.write,
            version_only: flags.has(OperationFlags::VERSION_ONLY),
            epoch: topology.generation(),
            as_of,
            version: None,
            record: None,
            whole: BTreeMap::new(),
            bytes,
            began: now,
            due: deadline,
        };
        keys.timers.insert((deadline, id));
        keys.operations.insert(id, operation);
        keys.tell(id, |machine, out| machine.begin(out));
    }

    // ---- what was said ----------------------------------------------------------------------

    /// A home has answered an operation's question.
    fn key_shown(
        &mut self,
        from: NodeId,
        id: u64,
        ballot: Timestamp,
        shown: Shown,
        whole: Option<Option<Record>>,
    ) {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        let shown = (shown, whole.is_some());
        let is_news = keys.tell(id, |machine, out| machine.said(moment, from, ballot, shown, out));
        if let (Some(true), Some(whole), Some(operation)) =
            (is_news, whole, keys.operations.get_mut(&id))
        {
            operation.whole.insert(from, whole);
        }
    }

    /// A home has what was proposed, or refuses it.
    pub(super) fn key_accepted(&mut self, from: NodeId, id: u64, result: WriteResult) {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        let proposed = keys.operations.get(&id).and_then(|operation| operation.record.as_ref());
        let Some(ballot) = proposed.map(|record| record.timestamp) else { return };
        keys.tell(id, |machine, out| match result {
            WriteResult::Durable => machine.accepted(moment, from, ballot, out),
            WriteResult::Refused(status, _) if status == Status::CONDITION_FALSE.0 => {
                machine.refused(moment, from, ballot, ballot, out);
            }
            WriteResult::Accepted(_) | WriteResult::Refused(..) => {
                machine.failed(moment, from, out);
            }
        });
    }

    /// This shard's own log has what was proposed, or will not.
    pub(super) fn key_logged(&mut self, id: u64, is_durable: bool) {
        let Some(own) = self.replication.as_ref().map(|it| it.topology.own()) else { return };
        let result = match is_durable {
            true => WriteResult::Durable,
            false => WriteResult::Accepted(0),
        };
        self.key_accepted(own, id, result);
    }

    /// A node cannot be reached, or began another life: what it said counts no more.
    pub(super) fn key_home_lost(&mut self, node: NodeId) {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        let ids: Vec<u64> = keys.operations.keys().copied().collect();
        for id in ids {
            keys.tell(id, |machine, out| machine.failed(moment, node, out));
        }
    }

    /// The version was drawn, and a ceiling is above it.
    pub(in crate::pump) fn key_balloted(&mut self, id: u64, version: Version, is_drawn: bool) {
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        match keys.operations.get(&id).and_then(|operation| operation.version) {
            // Another was drawn since, or it is over.
            drawn if drawn != Some(version) => {}
            _ if is_drawn => {
                keys.tell(id, |machine, out| machine.balloted(version, out));
            }
            _ => {
                keys.tell(id, |machine, out| machine.not_balloted(out));
            }
        }
    }

    // ---- what follows -----------------------------------------------------------------------

    /// What is due, and what was decided.
    pub(super) fn keys_turn(&mut self, wires: &mut dyn Wires) -> bool {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return false };
        let keys = &mut replication.keys;
        while let Some((due, id)) = keys.timers.first().copied()
            && due <= moment.now
        {
            keys.timers.remove(&(due, id));
            keys.tell(id, |machine, out| machine.handle_timeout(moment, out));
            if let Some(operation) = keys.operations.get(&id) {
                keys.timers.insert((operation.due, id));
                if operation.due <= moment.now {
                    break;
                }
            }
        }
        let mut worked = self.mend_keys();
        while let Some(replication) = &mut self.replication
            && !replication.keys.steps.is_empty()
        {
            worked = true;
            for (id, step) in std::mem::take(&mut replication.keys.steps) {
                self.key_step(id, step, wires);
            }
        }
        worked
    }

    /// Begins to mend keys that late records could not be merged into.
    fn mend_keys(&mut self) -> bool {
        let deadline = self.now.after_nanos(MENDING_NANOS);
        let mut worked = false;
        while let Some(replication) = &mut self.replication
            && replication.keys.mending.len() < MENDING_MAX
        {
            let keys = &replication.keys;
            let wanted = keys.wanted.borrow_mut().take();
            let Some(((token, namespace, key), late)) = wanted else { break };
            if keys.mending.values().any(|(other, name)| *other == namespace && *name == key) {
                continue;
            }
            worked = true;
            self.metrics.borrow_mut().counters.keys_mended += 1;
            let (goal, write) = (Goal::Mend(late), None);
            let begun = Begun { token, namespace, key, goal, write, needed: 0 };
            self.begin_key(begun, OperationFlags::default(), deadline, None);
        }
        worked
    }

    fn key_step(&mut self, id: u64, step: Step, wires: &mut dyn Wires) {
        let Some(replication) = &mut self.replication else { return };
        match step {
            Step::Ask { to, ballot, want } => self.ask_home(to, id, ballot, want),
            Step::Line => {
                let keys = &mut replication.keys;
                let Some(operation) = keys.operations.get(&id) else { return };
                let line = keys.lines.entry(operation.token).or_default();
                line.push_back(id);
                if line.len() == 1 {
                    keys.tell(id, |machine, out| machine.turn_came(out));
                }
            }
            Step::Ballot => self.draw_version(id),
            Step::Void => self.void_version(id),
            Step::ProposeOwn => self.propose_record(id, None),
            Step::ProposeSame(of) => self.propose_record(id, Some(of)),
            Step::Accept(to) => self.send_accept(to, id),
            Step::Observe(seen) => {
                // One that is too far ahead is passed when this clock has come so far.
                let _ = self.shard.clock_observe(seen, self.wall);
            }
            Step::Learn(from) => self.learn(id, from),
            Step::End(ended) => self.end_key(id, ended, wires),
        }
    }

    fn ask_home(&mut self, to: NodeId, id: u64, ballot: Timestamp, want: Want) {
        let Some(replication) = &mut self.replication else { return };
        let Some(operation) = replication.keys.operations.get(&id) else { return };
        let (token, namespace, epoch) = (operation.token, operation.namespace, operation.epoch);
        let key = operation.key.clone();
        let ask = KeyAsk { ballot, token, namespace, key: &key, want };
        if to == replication.topology.own() {
            return self.answer_ask(None, id, epoch, &ask);
        }
        let partition = token.partition(replication.topology.partition_bits());
        match replication.peer_shard(to, partition) {
            Some(to) => {
                let message = PeerMessage::KeyAsk { id, epoch, ask };
                self.post(to, Lane::Foreground, &message);
            }
            None => self.home_failed(to, id),
        }
    }

    fn home_failed(&mut self, node: NodeId, id: u64) {
        let moment = self.moment();
        if let Some(replication) = &mut self.replication {
            replication.keys.tell(id, |machine, out| machine.failed(moment, node, out));
        }
    }

    fn draw_version(&mut self, id: u64) {
        self.void_version(id);
        let (wall, shard) = (self.wall, self.shard.clone());
        let Some(replication) = &mut self.replication else { return };
        let Some(operation) = replication.keys.operations.get_mut(&id) else { return };
        let drawn = shard.reserve_version(operation.token, wall);
        let Ok(version) = drawn else {
            replication.keys.tell(id, |machine, out| machine.not_balloted(out));
            return;
        };
        operation.version = Some(version);
        match shard.ceiling_above(version.0, wall) {
            Ok(None) => self.key_balloted(id, version, true),
            Ok(Some(lsn)) => self.spawn(async move {
                let is_drawn = shard.wait_durable(lsn).await.is_ok();
                Done::KeyBalloted { id, version, is_drawn }
            }),
            Err(_) => self.key_balloted(id, version, false),
        }
    }

    fn void_version(&mut self, id: u64) {
        let Some(replication) = &mut self.replication else { return };
        if let Some(operation) = replication.keys.operations.get_mut(&id)
            && let Some(version) = operation.version.take()
        {
            self.shard.void_reserved(operation.token, version);
        }
    }

    /// The log gets the client's write, or again what a home showed, if the promise stands here.
    fn propose_record(&mut self, id: u64, same: Option<NodeId>) {
        let (moment, wall) = (self.moment(), self.wall);
        let Some(replication) = &mut self.replication else { return };
        let confirmed = replication.moves.confirmed;
        let keys = &mut replication.keys;
        let Some(operation) = keys.operations.get_mut(&id) else { return };
        let Some(version) = operation.version else { return };
        if operation.epoch < confirmed {
            // Its homes are not the key's any more.
            keys.tell(id, |machine, out| machine.not_proposed(moment, false, out));
            return;
        }
        if !keys.promises.borrow().accepts(operation.token, version.0) {
            keys.tell(id, |machine, out| machine.not_proposed(moment, true, out));
            return;
        }
        let record = operation.proposal(version, same);
        let record_ref = record.as_ref();
        let lsn = match self.shard.apply_reserved(&record_ref, wall) {
            Ok(lsn) => lsn,
            Err(error) => {
                tracing::debug!(%error, "a write of a register was not taken by the log");
                keys.tell(id, |machine, out| machine.not_proposed(moment, false, out));
                return;
            }
        };
        operation.version = None;
        keys.promises.borrow_mut().merged(record.token, version.0);
        let bytes = record.key.len() + record.value.len();
        let (deadline, is_put) = (operation.machine.deadline(), record.kind == Kind::Put);
        operation.record = Some(record);
        keys.tell(id, |machine, out| machine.proposed(out));
        let delay = self.shard.write_delay_nanos(bytes, self.now);
        self.metrics.borrow_mut().counters.write_delay_nanos += delay;
        self.writes.push(Waiting {
            applied: Applied { lsn, timestamp: version.0, dot: version.1 },
            deadline,
            not_before: self.now.after_nanos(delay),
            began: self.now,
            bytes,
            is_put,
            origin: Some(Origin::Operation(OpId(id))),
            trace: false,
        });
    }

    fn send_accept(&mut self, to: NodeId, id: u64) {
        let Some(replication) = &mut self.replication else { return };
        let Some(operation) = replication.keys.operations.get(&id) else { return };
        let Some(record) = &operation.record else { return };
        let partition = record.token.partition(replication.topology.partition_bits());
        let message =
            PeerMessage::KeyAccept { id, epoch: operation.epoch, record: record.as_ref() };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        match replication.peer_shard(to, partition) {
            Some(to) => self.post_bytes(to, Lane::Foreground, bytes),
            None => self.home_failed(to, id),
        }
    }

    /// What a home showed is chosen, and is merged here.
    fn learn(&mut self, id: u64, from: NodeId) {
        let wall = self.wall;
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        let Some(operation) = keys.operations.get(&id) else { return };
        let Some(Some(record)) = operation.whole.get(&from) else { return };
        if self.shard.merge_again(&record.as_ref(), wall).is_ok() {
            keys.promises.borrow_mut().merged(record.token, record.timestamp);
            self.metrics.borrow_mut().counters.keys_learned += 1;
        }
    }

    fn end_key(&mut self, id: u64, ended: Ended, wires: &mut dyn Wires) {
        self.void_version(id);
        let Some(replication) = &mut self.replication else { return };
        let keys = &mut replication.keys;
        let Some(operation) = keys.operations.remove(&id) else { return };
        keys.timers.remove(&(operation.due, id));
        keys.mending.remove(&id);
        keys.bytes -= operation.bytes;
        if let Some(line) = keys.lines.get_mut(&operation.token) {
            let was_first = line.front() == Some(&id);
            line.retain(|other| *other != id);
            match line.front().copied() {
                None => drop(keys.lines.remove(&operation.token)),
                Some(next) if was_first => {
                    keys.tell(next, |machine, out| machine.turn_came(out));
                }
                Some(_) => {}
            }
        }
        let conflicts = operation.machine.conflicts();
        self.metrics.borrow_mut().counters.cas_conflicts += u64::from(conflicts);
        self.admission.came_through(Place::Replicas, self.now.nanos_since(operation.began));
        self.answer_key(operation, ended, wires);
    }

    fn answer_key(&mut self, operation: Operation, ended: Ended, wires: &mut dyn Wires) {
        let Some(origin) = operation.origin else { return };
        match ended {
            Ended::Read { from, answers } => {
                let found = operation.whole.get(&from).and_then(Option::as_ref);
                let facts = ReadFacts {
                    as_of: operation.as_of,
                    answers,
                    primaries: answers,
                    ..ReadFacts::default()
                };
                let found = found.map(Record::as_ref).filter(|found| found.is_live(self.wall));
                let Some(found) = found else {
                    return self.answer(origin, &Answer::Read(facts, &[]), wires);
                };
                self.metrics.borrow_mut().counters.get_hits += 1;
                with_client_record(&found, |shown| {
                    let mut value = ValueRef::from(shown);
                    if operation.version_only {
                        value.value = Value::EMPTY;
                    }
                    self.answer(origin, &Answer::Read(facts, &[value]), wires);
                });
            }
            Ended::Written((timestamp, dot), acks) => {
                let facts = WriteFacts {
                    version: fields::Version { timestamp, dot },
                    acks,
                    primary: acks,
                    durable: acks,
                    ..WriteFacts::default()
                };
                self.answer(origin, &Answer::Written(facts), wires);
            }
            Ended::ConditionFalse(found) => {
                let (timestamp, dot) = found.unwrap_or_default();
                let version = fields::Version { timestamp, dot };
                let facts = WriteFacts { version, ..WriteFacts::default() };
                self.answer(origin, &Answer::ConditionFalse(facts), wires);
            }
            Ended::NotStarted { answered, is_late } => {
                let when = if is_late { " in time" } else { "" };
                let what = format!(
                    "{answered} homes of the key answered{when}; a majority is needed, and nothing \
                     was done"
                );
                let failure = Failure::new(Status::UNAVAILABLE, &what);
                self.answer(origin, &Answer::Failure(failure), wires);
            }
            Ended::MayBeApplied(acks) => {
                let what = "too few homes of the key have said in time that they have the write";
                let failure = Failure {
                    acks,
                    primary: acks,
                    durable: acks,
                    ..Failure::new(Status::MAY_BE_APPLIED, what)
                };
                self.answer(origin, &Answer::Failure(failure), wires);
            }
            // Only what nobody waits for ends so.
            Ended::Mended => {}
        }
    }

    /// The shard was opened anew: promises are those of its log, and nobody is answered by what
    /// was under way.
    pub(super) fn forget_promises(&mut self) {
        let floor = self.shard.floor();
        let bits = self.map.partition_bits();
        if let Some(replication) = &mut self.replication {
            *replication.keys.promises.borrow_mut() = Promises::new(bits, floor);
        }
    }
}

/// An operation that is to begin.
struct Begun {
    token: Token,
    namespace: NamespaceId,
    key: Vec<u8>,
    goal: Goal,
    write: Option<Write>,
    needed: usize,
}

impl Operation {
    /// The record of a proposal: the client's, or again that of a home.
    fn proposal(&self, (timestamp, dot): Version, same: Option<NodeId>) -> Record {
        let shown = same.and_then(|of| self.whole.get(&of)).and_then(Option::as_ref);
        let (kind, expiry_ms, value) = match (same, shown, &self.write) {
            (Some(_), Some(shown), _) => {
                let shown = shown.as_ref();
                (shown.kind, shown.expiry_ms, value::again(&shown))
            }
            (None, _, Some(Write { value: Some(value), expiry_ms })) => {
                (Kind::Put, *expiry_ms, value.clone())
            }
            _ => (Kind::Delete, 0, Vec::new()),
        };
        Record {
            token: self.token,
            namespace: self.namespace,
            incarnation: 0,
            kind,
            dot,
            timestamp,
            expiry_ms,
            key: self.key.clone(),
            value,
        }
    }
}

/// Shows a stored record of a register as its clients see it: the value they put, under the version
/// that they were given.
pub(in crate::pump) fn with_client_record<T>(
    record: &RecordRef<'_>,
    show: impl FnOnce(&RecordRef<'_>) -> T,
) -> T {
    let (timestamp, dot) = value::version_of(record);
    let head = value::head_size(record);
    match record.value {
        Value::Whole(bytes) => {
            let value = Value::Whole(&bytes[head..]);
            show(&RecordRef { timestamp, dot, value, ..*record })
        }
        Value::Pieces(pieces) => {
            let rest = pieces.skip(head);
            show(&RecordRef { timestamp, dot, value: rest.value(), ..*record })
        }
    }
}
