//! Carrying out requests: which shard, which path, and the shape of the answer.
//!
//! Invariant: a request is refused before anything is done, or it gets exactly one answer. The
//! common cases (a read from memory or cache, a blind write) neither allocate nor start a task.

use std::borrow::Cow;

use annulus_cluster::tracking::PeerShard;
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::model::causality::{BoundContext, Context, KeyState};
use annulus_engine::model::{
    Instant, Kind, NamespaceId, Pieces, RecordRef, Timestamp, Token, Value, VersionVector,
    WallMicros,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Condition, Merge, Mutation, Outcome, Probe, Shard};
use annulus_net::server_connection::{Arrival, Replies, Ticket};
use annulus_net::wire::batch::Batch;
use annulus_net::wire::fields::{self, Level, OperationFlags, Ttl, Version};
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::operation::{Delete, Get, Operation, Put, WriteOptions};
use annulus_net::wire::request::Request;
use annulus_net::wire::response::{BatchResults, Failure, ReadFacts, ValueRef, WriteFacts};
use annulus_net::wire::status::Status;

use super::admission::Place;
use super::writes::Waiting;
use super::{
    Answer, BATCH_RESULT_BYTES_MAX, BatchInProgress, ConnectionKey, Done, Message, Origin, Pump,
    TASKS_MAX, Wires,
};

/// What is remembered of a request while a task works for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) namespace: NamespaceId,
    pub(super) token: Token,
    pub(super) flags: OperationFlags,
    pub(super) as_of: Timestamp,
    pub(super) bytes: usize,
    pub(super) is_put: bool,
}

/// Where an answer goes that may be given at once.
pub(super) enum Target<'r, 's> {
    /// A request of the connection whose bytes are being taken.
    Connection(&'r mut Replies<'s>, ConnectionKey, Ticket),
    /// One operation of the batch that is being begun.
    Batch(&'r mut BatchResults, usize, u32, Opcode),
    /// Another shard, by its outbox.
    Shard(&'r mut Vec<(u32, Message)>, u32, u64),
    /// Another node, which handed the request on.
    Forward(&'r mut Vec<(PeerShard, u64, Status, Vec<u8>)>, PeerShard, u64),
}

impl Target<'_, '_> {
    pub(super) fn answer(self, answer: &Answer<'_>) {
        match self {
            Target::Forward(answers, from, id) => {
                let (status, body) = answer.to_bytes();
                answers.push((from, id, status, body));
            }
            Target::Connection(replies, _, ticket) => answer.to_connection(replies, ticket),
            Target::Batch(results, _, index, verb) => answer.to_batch(results, index, verb),
            Target::Shard(outbox, shard, id) => {
                let (status, body) = answer.to_pieces();
                outbox.push((shard, Message::Answer { id, status, body }));
            }
        }
    }

    pub(super) fn defer(self) -> Origin {
        match self {
            Target::Forward(_, from, id) => Origin::Forward { from, id },
            Target::Connection(_, connection, ticket) => Origin::Connection(connection, ticket),
            Target::Batch(_, batch, index, verb) => Origin::Batch { batch, index, verb },
            Target::Shard(_, shard, id) => Origin::Shard { shard, id },
        }
    }
}

/// The engine's refusal as the wire says it.
pub(super) fn failure_of<'a>(error: &Error, message: &'a str) -> Failure<'a> {
    let status = match error {
        Error::Busy { .. } => Status::BUSY,
        Error::Full { .. } => Status::FULL,
        Error::Invalid { .. } => Status::BAD_REQUEST,
        Error::TooManySiblings(_) => Status::SIBLINGS_FULL,
        Error::Corrupt { .. } => Status::CORRUPT,
        Error::Poisoned { .. } | Error::Mismatch { .. } | Error::Io { .. } => Status::UNAVAILABLE,
    };
    let failure = Failure::new(status, message);
    match error {
        Error::Busy { .. } => failure.retry_after(2),
        // The shard is being opened anew.
        Error::Poisoned { .. } => failure.retry_after(100),
        _ => failure,
    }
}

/// What a client that reads this state has seen: all that the state tells, and all that `base`
/// tells, which was taken before the state was read. States are stored without what it tells.
fn context_of(state: &KeyState<'_>, base: &VersionVector) -> Context {
    let mut state = state.clone();
    state.fill(base);
    state.context()
}

/// Shows a found record's live values to `show`, with the context's bytes.
pub(super) fn with_values<T>(
    record: Option<&RecordRef<'_>>,
    wall: WallMicros,
    version_only: bool,
    context: impl FnOnce(&KeyState<'_>) -> Vec<u8>,
    show: impl FnOnce(&[ValueRef<'_>], &[u8]) -> T,
) -> T {
    match record {
        None => show(&[], &[]),
        Some(record) if record.kind == Kind::Siblings => {
            // A state that cannot be decoded would have failed its block's checksum before.
            let Ok(state) = KeyState::of_record(record) else { return show(&[], &[]) };
            let values: Vec<ValueRef<'_>> = state
                .live(wall)
                .map(|sibling| ValueRef {
                    version: Version { timestamp: sibling.timestamp, dot: sibling.dot },
                    expiry_ms: sibling.expiry_ms,
                    value: if version_only { Value::EMPTY } else { sibling.value },
                })
                .collect();
            show(&values, &context(&state))
        }
        Some(record) if record.is_live(wall) => {
            let mut value = ValueRef::from(record);
            if version_only {
                value.value = Value::EMPTY;
            }
            show(&[value], &[])
        }
        Some(_) => show(&[], &[]),
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// One request of a connection.
    pub(super) fn handle(
        &mut self,
        connection: ConnectionKey,
        replies: &mut Replies<'_>,
        arrival: Arrival,
        request: Request<'_>,
    ) {
        let Arrival { ticket, deadline, .. } = arrival;
        self.admission.took();
        let target = Target::Connection(replies, connection, ticket);
        let operation = match request {
            Request::Get(get) => Operation::Get(get),
            Request::Put(put) => Operation::Put(put),
            Request::Delete(delete) => Operation::Delete(delete),
            Request::Batch(batch) => return self.begin_batch(target, deadline, &batch),
            Request::Scan(scan) => {
                let origin = target.defer();
                return self.route_scan(origin, deadline, &scan);
            }
            Request::Stats => return self.begin_admin(target.defer(), deadline, "stats", "{}"),
            Request::Admin(admin) => {
                return self.begin_admin(target.defer(), deadline, admin.command, admin.json);
            }
            // The connection answers these itself.
            Request::Hello(_) | Request::Ping(_) => {
                let failure = Failure::new(Status::UNSUPPORTED, "not expected here");
                return target.answer(&Answer::Failure(failure));
            }
        };
        self.route(target, deadline, &operation);
    }

    /// An operation for which nobody stands by: from another shard.
    pub(super) fn execute_later(
        &mut self,
        origin: Origin,
        deadline: Instant,
        operation: &Operation<'_>,
        wires: &mut dyn Wires,
    ) {
        if let Origin::Shard { shard, id } = origin {
            let mut outbox = std::mem::take(&mut self.outbox);
            self.execute(Target::Shard(&mut outbox, shard, id), deadline, operation);
            outbox.append(&mut self.outbox);
            self.outbox = outbox;
        } else {
            let failure = Failure::new(Status::UNSUPPORTED, "not from a shard");
            self.answer(origin, &Answer::Failure(failure), wires);
        }
    }

    /// An operation that another node handed on, `hops` times in all.
    pub(super) fn execute_forwarded(
        &mut self,
        (from, id): (PeerShard, u64),
        deadline: Instant,
        hops: u8,
        operation: &Operation<'_>,
    ) {
        let mut answers = Vec::new();
        let target = Target::Forward(&mut answers, from, id);
        if deadline <= self.now {
            let failure = Failure::new(Status::EXPIRED, "the deadline had passed");
            target.answer(&Answer::Failure(failure));
        } else if self.map.shard_of(operation.token()) != self.map.own() {
            let failure = Failure::new(Status::UNAVAILABLE, "the key is on another shard");
            target.answer(&Answer::Failure(failure));
        } else {
            self.coordinate(target, deadline, hops, operation);
        }
        for (from, id, status, body) in answers {
            self.answer_forwarded(from, id, status, &body);
        }
    }

    fn route(&mut self, target: Target<'_, '_>, deadline: Instant, operation: &Operation<'_>) {
        let shard = self.map.shard_of(operation.token());
        if shard == self.map.own() {
            return self.execute(target, deadline, operation);
        }
        if self.can_hand_over() {
            let body = operation.to_pieces();
            let handed = self.hand_over(shard, operation.opcode(), body, deadline, target.defer());
            debug_assert!(handed.is_ok(), "checked just above");
        } else {
            target.answer(&Answer::Failure(too_many_forwarded()));
        }
    }

    /// One operation of this shard's keys.
    fn execute(&mut self, target: Target<'_, '_>, deadline: Instant, operation: &Operation<'_>) {
        if deadline <= self.now {
            let failure = Failure::new(Status::EXPIRED, "the deadline had passed");
            self.count_failure(&Answer::Failure(failure));
            return target.answer(&Answer::Failure(failure));
        }
        let levels = match operation {
            Operation::Get(get) => [get.level, get.primary, Level::Default],
            Operation::Put(Put { options, .. }) | Operation::Delete(Delete { options, .. }) => {
                [options.level, options.primary, options.durable]
            }
        };
        if self.replication.is_some() {
            return self.coordinate(target, deadline, 0, operation);
        }
        if levels.iter().any(|level| matches!(level, Level::Count(2..))) {
            let failure = Failure::new(
                Status::UNAVAILABLE,
                "more replicas are asked for than the one node of this cluster",
            );
            self.count_failure(&Answer::Failure(failure));
            return target.answer(&Answer::Failure(failure));
        }
        match operation {
            Operation::Get(get) => self.get(target, deadline, get),
            Operation::Put(put) => {
                let expiry_ms = match self.expiry(put.namespace, put.ttl) {
                    Ok(expiry_ms) => expiry_ms,
                    Err(failure) => return target.answer(&Answer::Failure(failure)),
                };
                let wanted = (put.token, put.namespace, put.key);
                self.write(target, deadline, wanted, Some(put.value), expiry_ms, &put.options);
            }
            Operation::Delete(delete) => {
                let wanted = (delete.token, delete.namespace, delete.key);
                self.write(target, deadline, wanted, None, 0, &delete.options);
            }
        }
    }

    /// The moment from which a value is gone, in milliseconds since 2024-01-01; 0 is never.
    pub(super) fn expiry(&self, namespace: NamespaceId, ttl: Ttl) -> Result<u64, Failure<'static>> {
        let millis = match ttl {
            Ttl::Never => 0,
            Ttl::Default => self.namespace(namespace)?.ttl_ms,
            Ttl::Millis(millis) => millis,
        };
        let longest = annulus_engine::model::limits::TTL_MS_MAX;
        if millis > longest {
            return Err(
                Failure::new(Status::BAD_REQUEST, "the time to live is too long").detail(longest)
            );
        }
        Ok(if millis == 0 { 0 } else { self.wall.as_millis() + millis })
    }

    /// Every write at or below this stamp is in what a read of the key finds now.
    fn as_of(&self, token: Token, namespace: NamespaceId) -> Timestamp {
        match &self.replication {
            None => self.shard.complete_up_to(self.wall),
            Some(_) => self.standing(token.partition(self.map.partition_bits()), namespace).0,
        }
    }

    pub(super) fn get(&mut self, target: Target<'_, '_>, deadline: Instant, get: &Get<'_>) {
        if let Err(failure) = self.namespace(get.namespace) {
            return target.answer(&Answer::Failure(failure));
        }
        let as_of = self.as_of(get.token, get.namespace);
        let (wall, secret) = (self.wall, self.secret);
        let version_only = get.flags.has(OperationFlags::VERSION_ONLY);
        let trace = if get.flags.has(OperationFlags::TRACE) {
            self.shard.explain(get.token, get.namespace, get.key).into_bytes()
        } else {
            Vec::new()
        };
        let mut target = Some(target);
        let shard = &self.shard;
        let probe = shard.probe(get.token, get.namespace, get.key, |found| {
            let context = |state: &KeyState<'_>| {
                let context = context_of(state, &shard.base(get.token));
                sign(context, secret, get.namespace, get.token)
            };
            with_values(found.as_ref(), wall, version_only, context, |values, context| {
                let facts = ReadFacts { as_of, answers: 1, primaries: 1, context, trace: &trace };
                if let Some(target) = target.take() {
                    target.answer(&Answer::Read(facts, values));
                }
                !values.is_empty()
            })
        });
        let counters = &mut self.metrics.borrow_mut().counters;
        counters.gets += 1;
        match (probe, target) {
            (Probe::Done(hit), _) => {
                counters.get_hits += u64::from(hit);
                counters.get_memory_hits += u64::from(hit);
                self.answered_at_once += 1;
                self.admission.answered();
            }
            (Probe::Pending(_), Some(target)) if self.tasks.len() >= TASKS_MAX => {
                counters.refused_busy += 1;
                let failure = Failure::new(Status::BUSY, "too many reads wait for the disk");
                target.answer(&Answer::Failure(failure.retry_after(2)));
            }
            (Probe::Pending(_), Some(target))
                if self.admission.is_in_vain(
                    Place::Read,
                    self.tasks.len(),
                    deadline.nanos_since(self.now),
                ) =>
            {
                counters.refused_busy += 1;
                target.answer(&Answer::Failure(in_vain()));
            }
            (Probe::Pending(read), Some(target)) => {
                let task = self.waiting.add(target.defer(), deadline, Status::EXPIRED);
                let (shard, began) = (self.shard.clone(), self.now);
                let base = shard.base(get.token);
                let pending = Pending {
                    namespace: get.namespace,
                    token: get.token,
                    flags: get.flags,
                    as_of,
                    bytes: 0,
                    is_put: false,
                };
                self.tasks.push(Box::pin(async move {
                    let found = read.finish(&shard).await;
                    Done::Read { task, pending, base, found, began }
                }));
            }
            (Probe::Pending(_), None) => {}
        }
    }

    pub(super) fn write(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        wanted: (Token, NamespaceId, &[u8]),
        value: Option<Value<'_>>,
        expiry_ms: u64,
        options: &WriteOptions<'_>,
    ) {
        let (mutation, context) = match self.mutation(wanted, value, expiry_ms, options) {
            Ok(mutation) => mutation,
            Err(failure) => return target.answer(&Answer::Failure(failure)),
        };
        let mutation = Mutation { context: context.as_ref(), ..mutation };
        let (_, _, key) = wanted;
        let bytes = key.len() + value.map_or(0, |value| value.len());
        if Shard::<D, R>::needs_read(&mutation) {
            return self.write_after_read(target, deadline, &mutation, options.flags);
        }
        if self.is_in_vain(Place::Log, deadline) {
            return self.refuse_in_vain(target);
        }
        let applied = match self.shard.apply(&mutation, self.wall) {
            Ok(applied) => applied,
            Err(error) => {
                let message = error.to_string();
                let answer = Answer::Failure(failure_of(&error, &message));
                self.count_failure(&answer);
                return target.answer(&answer);
            }
        };
        let delay = self.shard.write_delay_nanos(bytes, self.now);
        let trace = options.flags.has(OperationFlags::TRACE);
        if delay == 0 && !trace && self.writes.is_empty() && self.shard.visible() >= applied.lsn {
            self.count_write(self.now, bytes, value.is_some());
            self.admission.answered();
            return target.answer(&Answer::Written(self.write_facts(&applied, &[], &[])));
        }
        self.metrics.borrow_mut().counters.write_delay_nanos += delay;
        self.writes.push(Waiting {
            applied,
            deadline,
            not_before: self.now.after_nanos(delay),
            began: self.now,
            bytes,
            is_put: value.is_some(),
            origin: Some(target.defer()),
            trace,
        });
    }

    /// What is to be written, and the context that came with it, which belongs into it.
    pub(super) fn mutation<'a>(
        &self,
        (token, namespace_id, key): (Token, NamespaceId, &'a [u8]),
        value: Option<Value<'a>>,
        expiry_ms: u64,
        options: &WriteOptions<'_>,
    ) -> Result<(Mutation<'a>, Option<Context>), Failure<'static>> {
        let merge = Self::merge_of(self.namespace(namespace_id)?);
        let context = options
            .context
            .map(|bytes| self.open_context(namespace_id, token, bytes))
            .transpose()?;
        let condition = match options.condition {
            fields::Condition::Always => Condition::None,
            fields::Condition::IfAbsent => Condition::Absent,
            fields::Condition::IfVersion(version) => {
                Condition::Version(version.timestamp, version.dot)
            }
        };
        let mutation = Mutation {
            token,
            namespace: namespace_id,
            merge,
            key,
            value,
            expiry_ms,
            context: None,
            condition,
        };
        Ok((mutation, context))
    }

    fn open_context(
        &self,
        namespace: NamespaceId,
        token: Token,
        bytes: &[u8],
    ) -> Result<Context, Failure<'static>> {
        let refuse = |what| Failure::new(Status::BAD_CONTEXT, what);
        let bound = BoundContext::decode(self.secret, namespace, token, bytes)
            .map_err(|_| refuse("the context is not one that was given out for this key"))?;
        bound
            .check_issued(|origin| self.shard.issued(token, origin))
            .map_err(|_| refuse("the context names writes that were never made"))?;
        Ok(bound.context)
    }

    fn write_after_read(
        &mut self,
        target: Target<'_, '_>,
        deadline: Instant,
        mutation: &Mutation<'_>,
        flags: OperationFlags,
    ) {
        if self.tasks.len() >= TASKS_MAX {
            let failure = Failure::new(Status::BUSY, "too many writes wait for a read");
            return target.answer(&Answer::Failure(failure.retry_after(2)));
        }
        if self.is_in_vain(Place::Read, deadline) {
            return self.refuse_in_vain(target);
        }
        let task = self.waiting.add(target.defer(), deadline, Status::MAY_BE_APPLIED);
        let (shard, began, secret) = (self.shard.clone(), self.now, self.secret);
        let pending = Pending {
            namespace: mutation.namespace,
            token: mutation.token,
            flags,
            as_of: Timestamp::ZERO,
            bytes: mutation.key.len() + mutation.value.map_or(0, |value| value.len()),
            is_put: mutation.value.is_some(),
        };
        let key = mutation.key.to_vec();
        let value = mutation.value.map(Pieces::of);
        let context = mutation.context.cloned();
        let (merge, condition) = (mutation.merge, mutation.condition);
        let expiry_ms = mutation.expiry_ms;
        self.spawn(async move {
            let mutation = Mutation {
                token: pending.token,
                namespace: pending.namespace,
                merge,
                key: &key,
                value: value.as_ref().map(Pieces::value),
                expiry_ms,
                context: context.as_ref(),
                condition,
            };
            let mut outcome = shard.apply_after_read(&mutation).await;
            let mut context = Vec::new();
            let mut begun = false;
            if let Ok(Outcome::Applied(applied)) = outcome {
                begun = true;
                if let Err(error) = shard.wait_visible(applied.lsn).await {
                    outcome = Err(error);
                } else if merge == Merge::Siblings
                    && let Ok(Some(record)) =
                        shard.get(pending.token, pending.namespace, &key).await
                    && let Ok(state) = KeyState::of_record(&record.as_ref())
                {
                    context = sign(state.context(), secret, pending.namespace, pending.token);
                }
            }
            Done::Write { task, pending, outcome, begun, context, began }
        });
    }

    fn begin_batch(&mut self, target: Target<'_, '_>, deadline: Instant, batch: &Batch<'_>) {
        let Target::Connection(replies, connection, ticket) = target else { return };
        self.metrics.borrow_mut().counters.batches += 1;
        let id = self.next_batch;
        self.next_batch += 1;
        let mut results = BatchResults::new(batch.count());
        for (index, operation) in (0u32..).zip(batch.iter()) {
            let verb = operation.opcode();
            if results.size() > BATCH_RESULT_BYTES_MAX {
                let failure = Failure::new(Status::BUSY, "the batch's results are too large");
                results.failure(index, verb, &failure);
                continue;
            }
            self.route(Target::Batch(&mut results, id, index, verb), deadline, &operation);
        }
        if results.is_complete() {
            self.admission.answered();
            replies.batch(ticket, results);
        } else {
            let waiting = BatchInProgress { connection, ticket: Some(ticket), results };
            self.batches.insert(id, waiting);
        }
    }

    /// A task has ended: its answer goes out.
    pub(super) fn finish(&mut self, done: Done, wires: &mut dyn Wires) {
        match done {
            Done::Read { task, pending, base, found, began } => {
                let nanos = self.now.nanos_since(began);
                self.admission.came_through(Place::Read, nanos);
                let Some(origin) = self.waiting.take(task) else { return };
                self.metrics.borrow_mut().read_latency.record(nanos);
                let (wall, secret) = (self.wall, self.secret);
                let found = match found {
                    Ok(found) => found,
                    Err(error) => {
                        tracing::error!(%error, "a read failed");
                        let message = error.to_string();
                        let answer = Answer::Failure(failure_of(&error, &message));
                        return self.answer(origin, &answer, wires);
                    }
                };
                let record = found.record();
                let version_only = pending.flags.has(OperationFlags::VERSION_ONLY);
                let context = |state: &KeyState<'_>| {
                    sign(context_of(state, &base), secret, pending.namespace, pending.token)
                };
                with_values(record.as_ref(), wall, version_only, context, |values, context| {
                    self.metrics.borrow_mut().counters.get_hits += u64::from(!values.is_empty());
                    let trace: Cow<'_, [u8]> = if pending.flags.has(OperationFlags::TRACE) {
                        let key = record.map_or(Vec::new(), |record| record.key.to_vec());
                        let steps = self.shard.explain(pending.token, pending.namespace, &key);
                        Cow::Owned(steps.into_bytes())
                    } else {
                        Cow::Borrowed(&[])
                    };
                    let as_of = pending.as_of;
                    let facts =
                        ReadFacts { as_of, answers: 1, primaries: 1, context, trace: &trace };
                    self.answer(origin, &Answer::Read(facts, values), wires);
                });
            }
            Done::Write { task, pending, outcome, begun, context, began } => {
                self.admission.came_through(Place::Read, self.now.nanos_since(began));
                let Some(origin) = self.waiting.take(task) else { return };
                match outcome {
                    Ok(Outcome::Applied(applied)) => {
                        self.count_write(began, pending.bytes, pending.is_put);
                        let facts = self.write_facts(&applied, &context, &[]);
                        self.answer(origin, &Answer::Written(facts), wires);
                    }
                    Ok(Outcome::ConditionFalse(version)) => {
                        let version = version.unwrap_or_default();
                        let version = Version { timestamp: version.0, dot: version.1 };
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
            Done::Scan { origin, page, next, began } => {
                self.admission.came_through(Place::Read, self.now.nanos_since(began));
                match next {
                    Ok(next) => {
                        let next = next.as_ref().map(|(token, key)| (*token, key.as_slice()));
                        self.answer_page(origin, page, next, wires);
                    }
                    Err(error) => {
                        let message = error.to_string();
                        let answer = Answer::Failure(failure_of(&error, &message));
                        self.answer(origin, &answer, wires);
                    }
                }
            }
            Done::Admin { origin, reply } => self.answer_admin(origin, reply, wires),
            Done::Changed(change) => self.changed(change),
            Done::Voted { from, vote } => self.voted(from, vote),
            Done::Merged { origin, merged } => match (origin, merged) {
                (Some((from, id)), Ok(())) => self.acknowledge(from, id),
                (Some((from, id)), Err(error)) => self.refuse_write(from, id, &error),
                (None, _) => {}
            },
            Done::ReplicaRead { from, id, want, as_of, is_primary, base, found } => {
                self.finish_replica_read(from, id, want, (as_of, is_primary), &base, found);
            }
            Done::OwnWrite { own, outcome, begun, record } => {
                self.own_write_done(&own, outcome, begun, record, wires);
            }
            Done::OwnRead { op, as_of, is_primary, base, found } => {
                self.own_read_done(op, (as_of, is_primary), &base, found);
            }
            Done::KeyBalloted { id, version, is_drawn } => self.key_balloted(id, version, is_drawn),
            Done::KeyRead(read) => self.key_read(read),
            Done::Adopted(adopted) => {
                if let Err((_, what)) = adopted {
                    tracing::warn!(what, "another node's namespaces were not taken over");
                }
            }
            Done::SyncServed { to, page } => self.sync_served(to, page),
            Done::SyncMerged { id, merged } => self.sync_merged(id, merged),
            Done::RepairRead { factor, repairer, id, read } => {
                self.repair_read(factor, &repairer, id, read);
            }
            Done::RepairMerged { from, id, merged } => self.repair_merged(from, id, merged),
            Done::Refilled { id, page } => self.refilled(id, page),
            Done::RefillCleared { id, cleared } => self.refill_cleared(id, cleared),
        }
    }

    /// Whether a request would only wait in that place until its time is over.
    pub(super) fn is_in_vain(&self, place: Place, deadline: Instant) -> bool {
        let waiting = match place {
            Place::Read => self.tasks.len(),
            Place::Log => self.writes.len(),
            Place::Replicas => {
                self.replication.as_ref().map_or(0, |replication| replication.operations())
            }
        };
        self.admission.is_in_vain(place, waiting, deadline.nanos_since(self.now))
    }

    /// Refuses it before anything was done.
    pub(super) fn refuse_in_vain(&self, target: Target<'_, '_>) {
        let answer = Answer::Failure(in_vain());
        self.count_failure(&answer);
        target.answer(&answer);
    }

    fn can_hand_over(&self) -> bool {
        self.forwarded.len() < super::forward::FORWARDED_MAX
    }
}

/// More is asked for than can be done before the request's deadline.
pub(super) fn in_vain() -> Failure<'static> {
    Failure::new(Status::BUSY, "too much waits to come to it before its deadline").retry_after(5)
}

fn too_many_forwarded() -> Failure<'static> {
    Failure::new(Status::BUSY, "the key's shard is overloaded").retry_after(5)
}

pub(super) fn sign(
    context: Context,
    secret: annulus_engine::model::causality::ContextSecret,
    namespace: NamespaceId,
    token: Token,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(48);
    BoundContext { context, epoch: 1 }.encode(secret, namespace, token, &mut bytes);
    bytes
}
