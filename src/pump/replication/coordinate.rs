//! Requests of this shard's clients, carried out over the replicas of their keys.
//!
//! ```text
//! write: plan -> append here, send to the others meanwhile -> acks -> answer
//! read:  own replica at once, digests of the others        -> merge -> answer, mend who is stale
//! ```
//!
//! Invariant: what the coordinator decides is carried out at the end of the turn, never in the
//! middle of a request, so that answers find their connection. A write that was refused as not
//! started was neither appended here nor sent to anybody.

use annulus_cluster::NodeId;
use annulus_cluster::coordinator::{
    Acks, Action, Defaults, Failure as Lack, Finished, Freshness, Moment, OpId, OtherHomes,
    Outcome as Ended, ReadRequest, Requirement, WriteOp,
};
use annulus_cluster::message::{PeerMessage, ReadResult, Want, WriteResult};
use annulus_cluster::room::size_of;
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::model::causality::KeyState;
use annulus_engine::model::{
    Instant, Kind, NamespaceId, PartitionId, Pieces, Record, RecordRef, Timestamp, Token,
    VersionVector, WallMicros,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Applied, Found, Mutation, Outcome, Probe, Shard};
use annulus_net::wire::fields::{OperationFlags, Version};
use annulus_net::wire::operation::{Get, Operation as Request};
use annulus_net::wire::request::Refusal;
use annulus_net::wire::response::{Failure, ReadFacts, WriteFacts};
use annulus_net::wire::status::Status;

use super::Letter;
use super::exchange::View;
use super::forward::micros_until;
use super::keys::Keys;
use super::standin::NoRoom;
use super::trace::Trace;
use crate::namespaces::{Availability, Mode, Namespace};
use crate::pump::admission::Place;
use crate::pump::execute::{Target, failure_of, sign, with_values};
use crate::pump::writes::Waiting;
use crate::pump::{Answer, Done, Lane, Origin, Pump, TASKS_MAX, Wires};

/// When a client may try again whose key's replicas are busy, in milliseconds.
const BUSY_PAUSE_MS: u32 = 2;
/// When a client may try again whose write found no room for a stand-in's copy, in milliseconds.
const FULL_PAUSE_MS: u32 = 1000;

/// What is kept with an operation that other nodes take part in.
#[derive(Debug)]
pub(super) struct Operation {
    origin: Origin,
    token: Token,
    namespace: NamespaceId,
    /// Of the map by which its replicas were chosen.
    epoch: u32,
    what: What,
    /// What happened so far, if the client wants to know.
    pub(super) trace: Option<Box<Trace>>,
}

#[derive(Debug)]
enum What {
    Write {
        /// The message to every replica.
        letter: Vec<u8>,
        version: Version,
        context: Vec<u8>,
    },
    Read {
        key: Vec<u8>,
        flags: OperationFlags,
    },
}

/// A write that read the key first, and what came of it here.
#[derive(Debug)]
pub(in crate::pump) struct OwnWrite {
    /// Its place among those that wait.
    task: u64,
    plan: WriteOp,
    /// Of the map by which it was planned.
    epoch: u32,
    deadline: Instant,
    token: Token,
    namespace: NamespaceId,
    bytes: usize,
    is_put: bool,
    began: Instant,
    traced: bool,
}

/// What must come together, of which homes, while it moves of which others too; who stands in.
type Plan<'a> = (Requirement, &'a [NodeId], Option<OtherHomes<'a>>, &'a [NodeId]);

/// What a request needs of so many copies.
fn requirement_of(defaults: &Defaults, request: &Request<'_>) -> Result<Requirement, Refusal> {
    match request {
        Request::Get(get) => Requirement::read(defaults, get.level, get.primary, get.flags),
        Request::Put(put) => {
            let it = &put.options;
            Requirement::write(defaults, it.level, it.primary, it.durable, it.flags)
        }
        Request::Delete(delete) => {
            let it = &delete.options;
            Requirement::write(defaults, it.level, it.primary, it.durable, it.flags)
        }
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    pub(super) fn moment(&self) -> Moment {
        Moment { now: self.now, wall: self.wall }
    }

    /// How many copies the namespace really has, and what it asks of requests that say nothing.
    pub(super) fn defaults(&self, namespace: &Namespace, copies: u8) -> Defaults {
        Defaults {
            n: namespace.n,
            copies,
            w: namespace.w.of(copies).min(copies),
            r: namespace.r.of(copies).min(copies),
            sloppy: namespace.availability == Availability::Ap,
            synced: self.shard.durability_window_ms() == 0,
            data_centres: 1,
        }
    }

    /// Carries out an operation as a member of a cluster. `hops`: how often it was handed on.
    pub(in crate::pump) fn coordinate(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        hops: u8,
        request: &Request<'_>,
    ) {
        let refuse = |pump: &Self, target: Target<'_, '_>, failure: Failure<'_>| {
            let answer = Answer::Failure(failure);
            pump.count_failure(&answer);
            target.answer(&answer);
        };
        let namespace = match self.namespace(request.namespace()) {
            Ok(namespace) => namespace.clone(),
            Err(failure) => return refuse(self, target, failure),
        };
        if namespace.mode == Mode::Linearizable {
            return self.coordinate_key(target, deadline, hops, request, &namespace);
        }
        let Some(replication) = &mut self.replication else { return };
        let partition = request.token().partition(self.map.partition_bits());
        let topology = std::rc::Rc::clone(&replication.topology);
        let homes = topology.replicas(partition, namespace.n);
        let copies = u8::try_from(homes.len()).unwrap_or(u8::MAX);
        let is_home = homes.contains(&topology.own());
        let others = match replication.moves.rules.writes_to_both {
            true => topology.other_replicas(partition, namespace.n),
            false => None,
        };
        if topology.node(topology.own()).is_none() {
            let what = "this node is no member any more: ask another";
            return refuse(self, target, Failure::new(Status::UNAVAILABLE, what));
        }
        // Whoever may lack own writes must not put a vector over them.
        let is_siblings = namespace.mode == Mode::Siblings && !matches!(request, Request::Get(_));
        let view = View { shard: &self.shard, wall: self.wall };
        let must_not = is_siblings && !replication.tracking.may_write_siblings(partition, &view);
        if !is_home || must_not {
            let mut order: Vec<NodeId> =
                homes.iter().copied().filter(|home| *home != topology.own()).collect();
            replication.coordinator.health().order(self.now, &mut order);
            let is_up = |node: &&NodeId| replication.coordinator.health().is_healthy(**node);
            if let Some(home) = order.iter().find(is_up).copied() {
                let mut body = Vec::with_capacity(request.size());
                request.encode(&mut body);
                let how = (request.opcode(), hops);
                let origin = target.defer();
                if let Err(origin) = self.forward(home, partition, how, &body, deadline, origin) {
                    self.refuse_later(origin, Status::BUSY, "the key's home cannot take more");
                }
                return;
            }
            if must_not {
                let what = "no home replica of the key can take a write now";
                let failure = Failure::new(Status::UNAVAILABLE, what).retry_after(100);
                return refuse(self, target, failure);
            }
        }
        let defaults = self.defaults(&namespace, copies);
        let requirement = requirement_of(&defaults, request);
        let requirement = match requirement {
            Ok(requirement) => requirement,
            Err(refusal) => return refuse(self, target, refusal.into()),
        };
        let fallbacks = match requirement.sloppy && topology.nodes().len() > homes.len() {
            true => topology.preference(partition, namespace.n).split_off(homes.len()),
            false => Vec::new(),
        };
        let is_alone = is_home && copies == 1 && fallbacks.is_empty() && others.is_none();
        // While the partition moves, a write has to come to as many of its other homes.
        let other = match others {
            None => None,
            Some(homes) => {
                let there = u8::try_from(homes.len()).unwrap_or(u8::MAX);
                match requirement_of(&self.defaults(&namespace, there), request) {
                    Ok(requirement) => Some(OtherHomes { homes, requirement }),
                    Err(refusal) => return refuse(self, target, refusal.into()),
                }
            }
        };
        match request {
            Request::Get(get) => {
                let alone = requirement.needed() <= 1 && homes.contains(&topology.own());
                if alone && get.max_staleness_ms == 0 {
                    return self.get(target, deadline, get);
                }
                self.read_replicas(target, deadline, get, requirement, homes, &fallbacks);
            }
            Request::Put(put) => {
                let expiry_ms = match self.expiry(put.namespace, put.ttl) {
                    Ok(expiry_ms) => expiry_ms,
                    Err(failure) => return refuse(self, target, failure),
                };
                let wanted = (put.token, put.namespace, put.key);
                let value = Some(put.value);
                if is_alone {
                    return self.write(target, deadline, wanted, value, expiry_ms, &put.options);
                }
                let mutation = self.mutation(wanted, value, expiry_ms, &put.options);
                match mutation {
                    Ok((mutation, context)) => {
                        let mutation = Mutation { context: context.as_ref(), ..mutation };
                        let plan = (requirement, homes, other, &fallbacks[..]);
                        let flags = put.options.flags;
                        self.write_replicas(target, deadline, &mutation, plan, flags);
                    }
                    Err(failure) => refuse(self, target, failure),
                }
            }
            Request::Delete(delete) => {
                let wanted = (delete.token, delete.namespace, delete.key);
                if is_alone {
                    return self.write(target, deadline, wanted, None, 0, &delete.options);
                }
                let mutation = self.mutation(wanted, None, 0, &delete.options);
                match mutation {
                    Ok((mutation, context)) => {
                        let mutation = Mutation { context: context.as_ref(), ..mutation };
                        let plan = (requirement, homes, other, &fallbacks[..]);
                        let flags = delete.options.flags;
                        self.write_replicas(target, deadline, &mutation, plan, flags);
                    }
                    Err(failure) => refuse(self, target, failure),
                }
            }
        }
    }

    /// Answers at the end of the turn.
    pub(super) fn refuse_later(&mut self, origin: Origin, status: Status, what: &'static str) {
        if let Some(replication) = &mut self.replication {
            replication.refusals.push((origin, status, what));
        }
    }

    // ---- writes -----------------------------------------------------------------------------

    fn write_replicas(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        mutation: &Mutation<'_>,
        (requirement, homes, other, fallbacks): Plan<'_>,
        flags: OperationFlags,
    ) {
        if self.is_in_vain(Place::Replicas, deadline) || self.is_in_vain(Place::Log, deadline) {
            return self.refuse_in_vain(target);
        }
        let Some(replication) = &mut self.replication else { return };
        let coordinator = &mut replication.coordinator;
        let plan = coordinator.plan_write_to_both(self.now, requirement, homes, other, fallbacks);
        let plan = match plan {
            Ok(plan) => plan,
            Err(refusal) => {
                let failure = Failure::from(refusal);
                let pause = if failure.status == Status::BUSY { BUSY_PAUSE_MS } else { 0 };
                let answer = Answer::Failure(failure.retry_after(pause));
                self.count_failure(&answer);
                return target.answer(&answer);
            }
        };
        // Only where every home is away does another write for them first.
        let bytes = size_of(mutation.key, mutation.value.unwrap_or_default());
        let guest = match replication.admit_guest(mutation.token, bytes) {
            Ok(guest) => guest,
            Err(NoRoom) => {
                let what = "no home replica of the key can be reached, and there is no room here";
                let failure = Failure::new(Status::UNAVAILABLE, what).retry_after(FULL_PAUSE_MS);
                let answer = Answer::Failure(failure);
                self.count_failure(&answer);
                return target.answer(&answer);
            }
        };
        if Shard::<D, R>::needs_read(mutation) {
            replication.keep_guest(guest);
            return self.write_replicas_after_read(target, deadline, mutation, plan, flags);
        }
        let applied = match self.shard.apply(mutation, self.wall) {
            Ok(applied) => applied,
            Err(error) => {
                let message = error.to_string();
                let answer = Answer::Failure(failure_of(&error, &message));
                self.count_failure(&answer);
                return target.answer(&answer);
            }
        };
        if let Some(replication) = &mut self.replication {
            replication.keep_guest(guest);
        }
        let record = RecordRef {
            token: mutation.token,
            namespace: mutation.namespace,
            incarnation: 0,
            kind: if mutation.value.is_some() { Kind::Put } else { Kind::Delete },
            dot: applied.dot,
            timestamp: applied.timestamp,
            expiry_ms: mutation.expiry_ms,
            key: mutation.key,
            value: mutation.value.unwrap_or_default(),
        };
        let origin = target.defer();
        let trace = Trace::wanted(flags, self.now);
        let epoch = self.map_generation();
        let op = self.begin_write(origin, deadline, plan, &record, Vec::new(), epoch, trace);
        let bytes = record.key.len() + record.value.len();
        let delay = self.shard.write_delay_nanos(bytes, self.now);
        self.metrics.borrow_mut().counters.write_delay_nanos += delay;
        self.writes.push(Waiting {
            applied,
            deadline,
            not_before: self.now.after_nanos(delay),
            began: self.now,
            bytes,
            is_put: mutation.value.is_some(),
            origin: op.map(Origin::Operation),
            trace: false,
        });
    }

    fn map_generation(&self) -> u32 {
        self.replication.as_ref().map_or(0, |replication| replication.topology.generation())
    }

    /// Enters a write that was appended here, and addresses its record to the others.
    #[expect(clippy::too_many_arguments, reason = "all of it is one operation's")]
    fn begin_write(
        &mut self,
        origin: Origin,
        deadline: Instant,
        plan: WriteOp,
        record: &RecordRef<'_>,
        context: Vec<u8>,
        epoch: u32,
        mut trace: Option<Box<Trace>>,
    ) -> Option<OpId> {
        if let Some(trace) = &mut trace {
            trace.stamped(self.now, record);
        }
        let moment = self.moment();
        let replication = self.replication.as_mut()?;
        let version = Version { timestamp: record.timestamp, dot: record.dot };
        let operation = Operation {
            origin,
            token: record.token,
            namespace: record.namespace,
            epoch,
            what: What::Write { letter: Vec::new(), version, context },
            trace,
        };
        let bytes = record.key.len() + record.value.len();
        let actions = &mut replication.actions;
        let op =
            replication.coordinator.begin_write(moment, plan, deadline, bytes, operation, actions);
        let message = PeerMessage::Write {
            id: op.0,
            deadline_us: micros_until(moment.now, deadline),
            epoch,
            record: *record,
        };
        if let Some(Operation { what: What::Write { letter, .. }, .. }) =
            replication.coordinator.payload_mut(op)
        {
            message.encode(letter);
        }
        Some(op)
    }

    fn write_replicas_after_read(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        mutation: &Mutation<'_>,
        plan: WriteOp,
        flags: OperationFlags,
    ) {
        if self.tasks.len() >= TASKS_MAX {
            let failure = Failure::new(Status::BUSY, "too many writes wait for a read");
            return target.answer(&Answer::Failure(failure.retry_after(2)));
        }
        let task = self.waiting.add(target.defer(), deadline, Status::MAY_BE_APPLIED);
        let own = OwnWrite {
            task,
            plan,
            epoch: self.map_generation(),
            deadline,
            token: mutation.token,
            namespace: mutation.namespace,
            bytes: mutation.key.len() + mutation.value.map_or(0, |value| value.len()),
            is_put: mutation.value.is_some(),
            began: self.now,
            traced: flags.has(OperationFlags::TRACE),
        };
        let shard = self.shard.clone();
        let (key, value) = (mutation.key.to_vec(), mutation.value.map(Pieces::of));
        let context = mutation.context.cloned();
        let (merge, condition) = (mutation.merge, mutation.condition);
        let expiry_ms = mutation.expiry_ms;
        self.spawn(async move {
            let mutation = Mutation {
                token: own.token,
                namespace: own.namespace,
                merge,
                key: &key,
                value: value.as_ref().map(Pieces::value),
                expiry_ms,
                context: context.as_ref(),
                condition,
            };
            let mut outcome = shard.apply_after_read(&mutation).await;
            let (mut begun, mut record) = (false, None);
            if let Ok(Outcome::Applied(applied)) = outcome {
                begun = true;
                let written = async {
                    shard.wait_visible(applied.lsn).await?;
                    let base = shard.base(own.token);
                    let found = shard.get(own.token, own.namespace, &key).await?;
                    found.map(|record| shard.filled_by(&record, &base)).transpose()
                };
                match written.await {
                    Ok(found) => record = found,
                    Err(error) => outcome = Err(error),
                }
            }
            Done::OwnWrite { own: Box::new(own), outcome, begun, record }
        });
    }

    /// A write that read the key first is done here: now it goes to the others.
    pub(in crate::pump) fn own_write_done(
        &mut self,
        own: &OwnWrite,
        outcome: Result<Outcome, Error>,
        begun: bool,
        record: Option<Record>,
        wires: &mut dyn Wires,
    ) {
        let Some(origin) = self.waiting.take(own.task) else { return };
        match outcome {
            Ok(Outcome::Applied(applied)) => {
                self.count_write(own.began, own.bytes, own.is_put);
                let Some(record) = record else {
                    let failure = Failure::new(Status::MAY_BE_APPLIED, "the key was dropped");
                    return self.answer(origin, &Answer::Failure(failure), wires);
                };
                let mut context = Vec::new();
                if record.kind == Kind::Siblings
                    && let Ok(state) = KeyState::of_record(&record.as_ref())
                {
                    context = sign(state.context(), self.secret, own.namespace, own.token);
                }
                let record = record.as_ref();
                let trace = own.traced.then(|| Trace::begun(own.began));
                let (deadline, plan, epoch) = (own.deadline, own.plan, own.epoch);
                let op = self.begin_write(origin, deadline, plan, &record, context, epoch, trace);
                if let Some(op) = op {
                    self.set_version(op, &applied);
                    self.own_ack(op);
                }
            }
            Ok(Outcome::ConditionFalse(version)) => {
                let (timestamp, dot) = version.unwrap_or_default();
                let version = Version { timestamp, dot };
                let facts = WriteFacts { version, ..WriteFacts::default() };
                self.answer(origin, &Answer::ConditionFalse(facts), wires);
            }
            Err(error) => {
                let message = error.to_string();
                let mut failure = failure_of(&error, &message);
                if begun {
                    failure.status = Status::MAY_BE_APPLIED;
                }
                self.answer(origin, &Answer::Failure(failure), wires);
            }
        }
    }

    /// The version of the write itself; the state sent may have a newer one in it.
    fn set_version(&mut self, op: OpId, applied: &Applied) {
        if let Some(replication) = &mut self.replication
            && let Some(Operation { what: What::Write { version, .. }, .. }) =
                replication.coordinator.payload_mut(op)
        {
            *version = Version { timestamp: applied.timestamp, dot: applied.dot };
        }
    }

    fn own_ack(&mut self, op: OpId) {
        let (moment, is_durable) = (self.moment(), self.shard.durability_window_ms() == 0);
        let Some(replication) = &mut self.replication else { return };
        let own = replication.topology.own();
        replication.note(op, |trace| trace.acked(moment.now, own, is_durable));
        let actions = &mut replication.actions;
        replication.coordinator.acked(moment, op, own, is_durable, actions);
    }

    /// This shard's own part of a write has ended.
    pub(in crate::pump) fn local_done(&mut self, op: OpId, answer: &Answer<'_>) {
        if Keys::is_key_id(op.0) {
            return self.key_logged(op.0, !matches!(answer, Answer::Failure(_)));
        }
        if !matches!(answer, Answer::Failure(_)) {
            return self.own_ack(op);
        }
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        let own = replication.topology.own();
        replication.note(op, |trace| trace.failed(moment.now, own, "refused"));
        let actions = &mut replication.actions;
        replication.coordinator.failed(moment, op, own, Lack::Refused, actions);
    }

    /// A replica has answered a write.
    pub(super) fn write_done(&mut self, from: NodeId, id: u64, result: WriteResult) {
        if Keys::is_key_id(id) {
            return self.key_accepted(from, id, result);
        }
        let (moment, op) = (self.moment(), OpId(id));
        let Some(replication) = &mut self.replication else { return };
        replication.note(op, |trace| match result {
            WriteResult::Durable => trace.acked(moment.now, from, true),
            WriteResult::Accepted(_) => trace.acked(moment.now, from, false),
            WriteResult::Refused(..) => trace.failed(moment.now, from, "refused"),
        });
        let actions = &mut replication.actions;
        let coordinator = &mut replication.coordinator;
        match result {
            WriteResult::Durable => coordinator.acked(moment, op, from, true, actions),
            WriteResult::Accepted(_) => coordinator.acked(moment, op, from, false, actions),
            WriteResult::Refused(status, _) => {
                if status == Status::FULL.0 {
                    coordinator.health_mut().set_room(moment.now, from, false);
                }
                let lack = if status == Status::BUSY.0 { Lack::Busy } else { Lack::Refused };
                coordinator.failed(moment, op, from, lack, actions);
            }
        }
    }

    // ---- reads ------------------------------------------------------------------------------

    fn read_replicas(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        get: &Get<'_>,
        requirement: Requirement,
        homes: &[NodeId],
        fallbacks: &[NodeId],
    ) {
        if self.is_in_vain(Place::Replicas, deadline) {
            return self.refuse_in_vain(target);
        }
        let moment = self.moment();
        let freshness = (get.max_staleness_ms > 0).then(|| {
            let micros = u64::from(get.max_staleness_ms) * 1000;
            Freshness {
                at_least: Timestamp::new(WallMicros(self.wall.0.saturating_sub(micros)), 0),
                stale_ok: get.flags.has(OperationFlags::STALE_OK),
            }
        });
        self.metrics.borrow_mut().counters.gets += 1;
        let Some(replication) = &mut self.replication else { return };
        let request = ReadRequest { requirement, primaries: homes, fallbacks, freshness, deadline };
        let operation = Operation {
            origin: target.defer(),
            token: get.token,
            namespace: get.namespace,
            epoch: replication.topology.generation(),
            what: What::Read { key: get.key.to_vec(), flags: get.flags },
            trace: Trace::wanted(get.flags, self.now),
        };
        let actions = &mut replication.actions;
        let begun =
            replication.coordinator.begin_read(moment, &request, |_| true, operation, actions);
        if let Err((refusal, operation)) = begun {
            replication.refusals.push((operation.origin, refusal.status, refusal.reason));
        }
    }

    /// A replica has answered a read.
    pub(super) fn read_done(&mut self, from: NodeId, id: u64, result: &ReadResult<'_>) {
        let (moment, op) = (self.moment(), OpId(id));
        let Some(replication) = &mut self.replication else { return };
        replication.note(op, |trace| match result {
            ReadResult::Full { as_of, record, .. } => {
                trace.replied(moment.now, from, "state", *as_of, Some(record.is_some()));
            }
            ReadResult::Digest { as_of, digest, .. } => {
                trace.replied(moment.now, from, "digest", *as_of, Some(*digest != 0));
            }
            ReadResult::Refused(_) => trace.failed(moment.now, from, "refused"),
            ReadResult::Unknown => trace.failed(moment.now, from, "damaged"),
        });
        let coordinator = &mut replication.coordinator;
        let Some(Operation { token, namespace, what: What::Read { key, .. }, .. }) =
            coordinator.payload(op)
        else {
            // Answered already: the news is only how long it took.
            return coordinator.digest(
                moment,
                op,
                from,
                Timestamp::ZERO,
                false,
                0,
                &mut replication.actions,
            );
        };
        let is_of_key = |record: &RecordRef<'_>| {
            record.token == *token && record.namespace == *namespace && record.key == key.as_slice()
        };
        let actions = &mut replication.actions;
        match result {
            ReadResult::Full { record: Some(record), .. } if !is_of_key(record) => {
                coordinator.failed(moment, op, from, Lack::Refused, actions);
            }
            ReadResult::Full { as_of, is_primary, record } => {
                let record = record.as_ref();
                coordinator.full(moment, op, from, *as_of, *is_primary, record, actions);
            }
            ReadResult::Digest { as_of, is_primary, digest } => {
                coordinator.digest(moment, op, from, *as_of, *is_primary, *digest, actions);
            }
            ReadResult::Refused(status) => {
                let lack = if *status == Status::BUSY.0 { Lack::Busy } else { Lack::Refused };
                coordinator.failed(moment, op, from, lack, actions);
            }
            ReadResult::Unknown => coordinator.failed(moment, op, from, Lack::Unknown, actions),
        }
    }

    /// This shard's own part of a read.
    fn read_here(&mut self, op: OpId, token: Token, namespace: NamespaceId, key: &[u8]) {
        let partition = token.partition(self.map.partition_bits());
        let (as_of, is_primary) = self.standing(partition, namespace);
        let (moment, shard) = (self.moment(), self.shard.clone());
        let Some(replication) = &mut self.replication else { return };
        let own = replication.topology.own();
        let mut found_here = None;
        let super::Replication { coordinator, actions, .. } = &mut **replication;
        let probe = shard.probe(token, namespace, key, |found| {
            let found = found.map(|record| super::replica::shown(&shard, &record));
            let record = found.as_ref().map(|record| record.as_ref());
            found_here = Some(record.is_some());
            coordinator.full(moment, op, own, as_of, is_primary, record.as_ref(), actions);
        });
        if found_here.is_some() {
            replication
                .note(op, |trace| trace.replied(moment.now, own, "state", as_of, found_here));
        }
        if let Probe::Pending(read) = probe {
            let base = shard.base(token);
            self.spawn(async move {
                let found = read.finish(&shard).await;
                Done::OwnRead { op, as_of, is_primary, base, found }
            });
        }
    }

    /// This shard's own part of a read has come from the disk.
    pub(in crate::pump) fn own_read_done(
        &mut self,
        op: OpId,
        (as_of, is_primary): (Timestamp, bool),
        base: &VersionVector,
        found: Result<Found, Error>,
    ) {
        let (moment, shard) = (self.moment(), self.shard.clone());
        let Some(replication) = &mut self.replication else { return };
        let own = replication.topology.own();
        replication.note(op, |trace| match &found {
            Ok(found) => {
                let found = found.record().is_some();
                trace.replied(moment.now, own, "state", as_of, Some(found));
            }
            Err(_) => trace.failed(moment.now, own, "unreadable"),
        });
        let super::Replication { coordinator, actions, .. } = &mut **replication;
        match found {
            Ok(found) => {
                let found = found.record();
                let found = found.map(|record| super::replica::shown_by(&shard, base, &record));
                let record = found.as_ref().map(|record| record.as_ref());
                coordinator.full(moment, op, own, as_of, is_primary, record.as_ref(), actions);
            }
            Err(error) => {
                tracing::error!(%error, "a read failed here, and is left to the other replicas");
                let damaged = matches!(error, Error::Corrupt { .. });
                let lack = if damaged { Lack::Unknown } else { Lack::Refused };
                coordinator.failed(moment, op, own, lack, actions);
            }
        }
    }

    // ---- what was decided -------------------------------------------------------------------

    /// Carries out what the coordinator decided. Returns whether there was anything.
    pub(super) fn act(&mut self, wires: &mut dyn Wires) -> bool {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return false };
        if replication.coordinator.next_timeout().is_some_and(|at| at <= moment.now) {
            let actions = &mut replication.actions;
            replication.coordinator.handle_timeout(moment, actions);
        }
        for (origin, status, what) in std::mem::take(&mut replication.refusals) {
            self.answer(origin, &Answer::Failure(Failure::new(status, what)), wires);
        }
        let mut any = false;
        while let Some(replication) = &mut self.replication
            && !replication.actions.is_empty()
        {
            any = true;
            for action in std::mem::take(&mut replication.actions) {
                match action {
                    Action::SendWrite { to, op } => self.send_write(to, op),
                    Action::SendRead { to, op, want } => self.send_read(to, op, want),
                    Action::Repair { to, op } => self.send_repair(to, op),
                    Action::Answer { op, outcome } => self.answer_operation(op, outcome, wires),
                }
            }
        }
        any
    }

    fn partition_of(&self, token: Token) -> PartitionId {
        token.partition(self.map.partition_bits())
    }

    fn send_write(&mut self, to: NodeId, op: OpId) {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        replication.note(op, |trace| trace.asked(moment.now, to, "write"));
        let bits = replication.topology.partition_bits();
        let Some(Operation { token, what: What::Write { letter, .. }, .. }) =
            replication.coordinator.payload(op)
        else {
            return;
        };
        let bytes = letter.clone();
        match replication.peer_shard(to, token.partition(bits)) {
            Some(to) => replication.letters.push(Letter { to, lane: Lane::Foreground, bytes }),
            None => {
                let actions = &mut replication.actions;
                replication.coordinator.failed(moment, op, to, Lack::Lost, actions);
            }
        }
    }

    fn send_read(&mut self, to: NodeId, op: OpId, want: Want) {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        let asked = if want == Want::Full { "state" } else { "digest" };
        replication.note(op, |trace| trace.asked(moment.now, to, asked));
        let deadline = replication.coordinator.deadline(op).unwrap_or(moment.now);
        let Some(Operation { token, namespace, epoch, what: What::Read { key, .. }, .. }) =
            replication.coordinator.payload(op)
        else {
            return;
        };
        let (token, namespace, epoch) = (*token, *namespace, *epoch);
        if to == replication.topology.own() && epoch < replication.moves.confirmed {
            let actions = &mut replication.actions;
            return replication.coordinator.failed(moment, op, to, Lack::Refused, actions);
        }
        if to == replication.topology.own() {
            let key = key.clone();
            return self.read_here(op, token, namespace, &key);
        }
        let message = PeerMessage::Read {
            id: op.0,
            deadline_us: micros_until(moment.now, deadline),
            epoch,
            token,
            namespace,
            key,
            want,
        };
        let bits = replication.topology.partition_bits();
        match replication.peer_shard(to, token.partition(bits)) {
            Some(to) => {
                let letter = Letter::new(to, Lane::Foreground, &message);
                replication.letters.push(letter);
            }
            None => {
                let actions = &mut replication.actions;
                replication.coordinator.failed(moment, op, to, Lack::Lost, actions);
            }
        }
    }

    fn send_repair(&mut self, to: NodeId, op: OpId) {
        self.metrics.borrow_mut().counters.read_repairs += 1;
        let Some(replication) = &mut self.replication else { return };
        let (now, own) = (self.now, replication.topology.own());
        replication.note(op, |trace| trace.asked(now, to, "repair"));
        let Some(record) = replication.coordinator.merged(op).cloned() else { return };
        let record = record.as_ref();
        if to == own {
            return self.merge_here(&record);
        }
        let partition = self.partition_of(record.token);
        let Some(replication) = &mut self.replication else { return };
        if let Some(to) = replication.peer_shard(to, partition) {
            let epoch = replication.topology.generation();
            let message = PeerMessage::Write { id: 0, deadline_us: 1, epoch, record };
            replication.post(to, Lane::Background, &message);
        }
    }

    fn answer_operation(&mut self, op: OpId, outcome: Ended, wires: &mut dyn Wires) {
        let Some(replication) = &mut self.replication else { return };
        let Some(finished) = replication.coordinator.finish(op) else { return };
        let Finished { payload, state, began } = finished;
        self.admission.came_through(Place::Replicas, self.now.nanos_since(began));
        let Operation { origin, token, namespace, what, trace, .. } = payload;
        let trace = trace.map_or_else(String::new, |trace| trace.end(self.now));
        match (outcome, what) {
            (Ended::Written(acks), What::Write { version, context, .. }) => {
                let window_ms = self.shard.durability_window_ms();
                let Acks { total, primary, durable } = acks;
                let facts = WriteFacts {
                    version,
                    acks: total,
                    primary,
                    durable,
                    window_ms,
                    context: &context,
                    trace: trace.as_bytes(),
                };
                self.answer(origin, &Answer::Written(facts), wires);
            }
            (Ended::MayBeApplied(acks), _) => {
                let message = "too few replicas have acknowledged the write in time";
                let failure = Failure {
                    acks: acks.total,
                    primary: acks.primary,
                    durable: acks.durable,
                    ..Failure::new(Status::MAY_BE_APPLIED, message)
                };
                self.answer(origin, &Answer::Failure(failure), wires);
            }
            (Ended::Read(facts), What::Read { flags, .. }) => {
                let (wall, secret) = (self.wall, self.secret);
                let version_only = flags.has(OperationFlags::VERSION_ONLY);
                let record = state.as_ref().map(Record::as_ref);
                let context =
                    |state: &KeyState<'_>| sign(state.context(), secret, namespace, token);
                with_values(record.as_ref(), wall, version_only, context, |values, context| {
                    self.metrics.borrow_mut().counters.get_hits += u64::from(!values.is_empty());
                    let facts = ReadFacts {
                        as_of: facts.as_of,
                        answers: facts.answers,
                        primaries: facts.primaries,
                        context,
                        trace: trace.as_bytes(),
                    };
                    self.answer(origin, &Answer::Read(facts, values), wires);
                });
            }
            (outcome, _) => {
                let status = outcome.error().unwrap_or(Status::UNAVAILABLE);
                let message = match outcome {
                    Ended::Corrupt => "every replica of the key is damaged there",
                    Ended::Stale(_) => "no replica is as fresh as was asked for",
                    Ended::Expired => "the replicas did not answer in time",
                    _ => "too few replicas of the key can answer",
                };
                self.answer(origin, &Answer::Failure(Failure::new(status, message)), wires);
            }
        }
    }
}
