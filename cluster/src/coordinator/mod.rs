//! The coordinator: reads and writes over the replicas of a key, and who answers how.
//!
//! Stands between the pump, which has the client's request, the local shard and the links, and
//! the machines of single operations ([`write`](mod@write), [`read`]). Events and times go in;
//! [`Action`]s come out. Invariants: every operation that began is answered once, at its deadline
//! at the latest; operations and the bytes they hold are bounded, and what is beyond is refused
//! before anything is done; hedges stay within their budget.
//!
//! ```text
//! write:  plan_write -> Err: NOT_STARTED      append locally      begin_write -> SendWrite ...
//!         acked(me), acked(peer), failed(peer) ...                           -> Answer
//! read:   begin_read -> SendRead ...   full, digest, failed ...  -> Repair ..., Answer
//! both:   handle_timeout; at each Answer: finish(op), once
//! ```
//!
//! An operation stays after its answer until all that were asked have answered, or its time is
//! over: so the health of a slow server is known, and what is in flight to it bounded.
//!
//! [`quorum`] says how many must answer, [`health`] who is asked.

mod action;
pub mod health;
pub mod inline;
pub mod quorum;
pub mod read;
mod table;
pub mod write;

use annulus_engine::model::{Instant, Record, RecordRef, Timestamp};
use annulus_net::wire::request::Refusal;
use annulus_net::wire::status::Status;

pub use action::{
    Action, CoordinatorOptions, Counters, Failure, Finished, Moment, Outcome, ReadRequest,
};
pub use health::{Health, Standing};
pub use quorum::{Acks, Defaults, Preset, Requirement};
pub use read::{Freshness, ReadFacts, ReadOp, digest};
pub use table::OpId;
pub use write::{OtherHomes, WriteOp};

use crate::member::NodeId;
use health::Verb;
use inline::Inline;
use read::{Asks, Verdict, no_asks};
use table::{SLOTS_MAX, Table};
use write::{Decision, PLACES_MAX, unavailable};

/// Reads for each hedge: the budget is 2 %.
const READS_PER_HEDGE: u32 = 50;
/// Hedges that may be saved up.
const HEDGES_SAVED_MAX: u32 = 20;
/// Most hedges of one read.
const HEDGES_PER_READ: u8 = 2;
/// After a server said that it is busy nothing is hedged for this long, in nanoseconds: more
/// requests are what it needs least (Dean and Barroso, "The Tail at Scale", 2013).
const HEDGE_PAUSE_NANOS: u64 = 1_000_000_000;

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the point is that neither allocates")]
enum Op {
    Write(WriteOp),
    Read(ReadOp),
}

impl Op {
    fn verb(&self) -> Verb {
        match self {
            Op::Write(_) => Verb::Write,
            Op::Read(_) => Verb::Read,
        }
    }

    fn outstanding_since(&self, node: NodeId) -> Option<u32> {
        match self {
            Op::Write(op) => op.outstanding_since(node),
            Op::Read(op) => op.outstanding_since(node),
        }
    }

    fn outstanding(&self) -> Inline<NodeId, PLACES_MAX> {
        let mut nodes = Inline::new(NodeId(0));
        let mut push = |node| {
            nodes.push(node);
        };
        match self {
            Op::Write(op) => op.outstanding().for_each(&mut push),
            Op::Read(op) => op.outstanding().for_each(&mut push),
        }
        nodes
    }
}

#[derive(Debug)]
struct Entry<P> {
    op: Op,
    began: Instant,
    deadline: Instant,
    /// Taken when it is finished.
    payload: Option<P>,
    bytes: usize,
    hedges: u8,
}

impl<P> Entry<P> {
    /// Microseconds since the beginning.
    fn elapsed_us(&self, now: Instant) -> u32 {
        u32::try_from(now.nanos_since(self.began) / 1000).unwrap_or(u32::MAX)
    }

    /// Nanoseconds since this server was asked, if it has not answered.
    fn waited(&self, now: Instant, node: NodeId) -> Option<u64> {
        let since = self.op.outstanding_since(node)?;
        Some(now.nanos_since(self.began).saturating_sub(u64::from(since) * 1000))
    }
}

/// See the module. `P` is what the pump keeps with an operation: the record, the client.
#[derive(Debug)]
pub struct Coordinator<P> {
    me: NodeId,
    options: CoordinatorOptions,
    table: Table<Entry<P>>,
    health: Health,
    bytes: usize,
    /// In reads: a hedge costs [`READS_PER_HEDGE`].
    hedge_tokens: u32,
    hedges_paused_until: Instant,
    counters: Counters,
}

impl<P> Coordinator<P> {
    /// A coordinator on the server `me`. `first_id` should differ with each start of the server,
    /// best drawn at random: so an answer meant for its former life finds no operation.
    #[must_use]
    pub fn new(me: NodeId, options: CoordinatorOptions, first_id: u64) -> Coordinator<P> {
        let operations_max = options.operations_max.min(SLOTS_MAX / 2);
        Coordinator {
            me,
            options: CoordinatorOptions { operations_max, ..options },
            table: Table::new(first_id),
            health: Health::new(),
            bytes: 0,
            hedge_tokens: READS_PER_HEDGE,
            hedges_paused_until: Instant(0),
            counters: Counters::default(),
        }
    }

    // ---- writes -----------------------------------------------------------------------------

    /// Chooses the targets of a write, before it is appended here. See [`WriteOp::plan`]. A
    /// fallback that has no room for the copy is as one that is not there: a full stand-in costs
    /// no write that would have been taken had there been none.
    ///
    /// # Errors
    /// [`Refusal`]: the write is not started, and nothing needs to be undone.
    pub fn plan_write(
        &mut self,
        now: Instant,
        requirement: Requirement,
        primaries: &[NodeId],
        fallbacks: &[NodeId],
    ) -> Result<WriteOp, Refusal> {
        self.plan_write_to_both(now, requirement, primaries, None, fallbacks)
    }

    /// The same while the key's partition moves. See [`WriteOp::plan_both`].
    ///
    /// # Errors
    /// As [`Coordinator::plan_write`].
    pub fn plan_write_to_both(
        &mut self,
        now: Instant,
        requirement: Requirement,
        primaries: &[NodeId],
        other: Option<OtherHomes<'_>>,
        fallbacks: &[NodeId],
    ) -> Result<WriteOp, Refusal> {
        self.admit()?;
        let health = &self.health;
        let mut roomy = Inline::<NodeId, PLACES_MAX>::new(self.me);
        for node in fallbacks.iter().filter(|node| health.has_room(now, **node)) {
            roomy.push(*node);
        }
        let all_fallbacks = fallbacks;
        let fallbacks = &roomy[..];
        let plan_among = |fallbacks: &[NodeId], may: &dyn Fn(NodeId) -> bool| {
            WriteOp::plan_both(requirement, self.me, primaries, other, fallbacks, may)
        };
        let plan = plan_among(fallbacks, &|node| health.is_healthy(node));
        let Err(refusal) = plan else { return plan };
        let is_there = |node| health.standing(node) != Standing::Down;
        if plan_among(fallbacks, &is_there).is_ok() {
            self.counters.busy += 1;
            return Err(too_much_to_do());
        }
        self.counters.writes_unavailable += 1;
        if plan_among(all_fallbacks, &is_there).is_ok() {
            let what = "too few home replicas can be reached, and those that stand in are full";
            return Err(unavailable(what));
        }
        Err(refusal)
    }

    /// Begins a write that has been appended here; never refused. `bytes` are those that the
    /// payload holds.
    pub fn begin_write(
        &mut self,
        moment: Moment,
        plan: WriteOp,
        deadline: Instant,
        bytes: usize,
        payload: P,
        out: &mut Vec<Action>,
    ) -> OpId {
        self.counters.writes += 1;
        self.bytes += bytes;
        let entry = Entry {
            op: Op::Write(plan),
            began: moment.now,
            deadline,
            payload: Some(payload),
            bytes,
            hedges: 0,
        };
        let op = self.table.insert(deadline, entry);
        for to in plan.outstanding() {
            self.health.sent(to);
            if to != self.me {
                out.push(Action::SendWrite { to, op });
            }
        }
        op
    }

    /// A server has the write; this server says so itself when its log has it. May be said twice:
    /// in memory, then on disk.
    pub fn acked(
        &mut self,
        moment: Moment,
        op: OpId,
        from: NodeId,
        is_durable: bool,
        out: &mut Vec<Action>,
    ) {
        let Some(entry) = self.table.get_mut(op) else {
            self.counters.late += 1;
            return;
        };
        if let Some(waited) = entry.waited(moment.now, from) {
            self.health.answered(moment.now, from, Verb::Write, waited);
        }
        let Op::Write(write) = &mut entry.op else { return };
        let decision = write.acked(from, is_durable);
        self.decide(op, decision, out);
        self.release(op);
    }

    fn decide(&mut self, op: OpId, decision: Decision, out: &mut Vec<Action>) {
        match decision {
            Decision::Wait => {}
            Decision::Done(acks) => {
                out.push(Action::Answer { op, outcome: Outcome::Written(acks) });
            }
            Decision::MayBeApplied(acks) => {
                self.counters.writes_may_be_applied += 1;
                out.push(Action::Answer { op, outcome: Outcome::MayBeApplied(acks) });
            }
            Decision::Also(to) => {
                self.counters.replacements += 1;
                self.health.sent(to);
                out.push(Action::SendWrite { to, op });
            }
        }
    }

    // ---- reads ------------------------------------------------------------------------------

    /// Begins a read. `is_likely_fresh` is asked only when the request wants freshness: those of
    /// whom it is true are asked first.
    ///
    /// # Errors
    /// [`Refusal`], and the payload back: too few are healthy, or there is too much to do.
    pub fn begin_read(
        &mut self,
        moment: Moment,
        request: &ReadRequest<'_>,
        is_likely_fresh: impl Fn(NodeId) -> bool,
        payload: P,
        out: &mut Vec<Action>,
    ) -> Result<OpId, (Refusal, P)> {
        if let Err(refusal) = self.admit() {
            return Err((refusal, payload));
        }
        let order = self.order(moment.now, request, is_likely_fresh);
        let ReadRequest { requirement, fallbacks, freshness, deadline, .. } = *request;
        let mut read = ReadOp::begin(requirement, self.me, &order, fallbacks, freshness);
        let (health, mut asks) = (&self.health, no_asks());
        if read.advance(0, |node| health.is_healthy(node), &mut asks).is_some() {
            let mut again = ReadOp::begin(requirement, self.me, &order, fallbacks, freshness);
            let is_there = |node| health.standing(node) != Standing::Down;
            if again.advance(0, is_there, &mut no_asks()).is_none() {
                self.counters.busy += 1;
                return Err((too_much_to_do(), payload));
            }
            self.counters.reads_unavailable += 1;
            return Err((unavailable("too few replicas of the key can be reached"), payload));
        }
        self.counters.reads += 1;
        self.hedge_tokens = (self.hedge_tokens + 1).min(HEDGES_SAVED_MAX * READS_PER_HEDGE);
        let due = self.hedge_due(moment.now, &read, &asks).min(deadline);
        let op = self.table.insert(
            due,
            Entry {
                op: Op::Read(read),
                began: moment.now,
                deadline,
                payload: Some(payload),
                bytes: 0,
                hedges: 0,
            },
        );
        self.send(op, &asks, out);
        Ok(op)
    }

    /// A server gave its state; `None` is *nothing*. The caller has checked that it is of the
    /// read's key.
    #[expect(clippy::too_many_arguments, reason = "the fields of one message, borrowed from it")]
    pub fn full(
        &mut self,
        moment: Moment,
        op: OpId,
        from: NodeId,
        as_of: Timestamp,
        is_primary: bool,
        record: Option<&RecordRef<'_>>,
        out: &mut Vec<Action>,
    ) {
        let Some(read) = self.answered_read(moment, op, from) else { return };
        if read.full(from, as_of, is_primary, record).is_err() {
            self.counters.malformed += 1;
        }
        self.advance(moment, op, out);
    }

    /// A server gave the digest of its state; 0 is *nothing*.
    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub fn digest(
        &mut self,
        moment: Moment,
        op: OpId,
        from: NodeId,
        as_of: Timestamp,
        is_primary: bool,
        digest: u64,
        out: &mut Vec<Action>,
    ) {
        let Some(read) = self.answered_read(moment, op, from) else { return };
        read.digest(from, as_of, is_primary, digest);
        self.advance(moment, op, out);
    }

    /// The merged state of a read in flight, for repairs.
    #[must_use]
    pub fn merged(&self, op: OpId) -> Option<&Record> {
        match &self.table.get(op)?.op {
            Op::Read(read) => read.merged(),
            Op::Write(_) => None,
        }
    }

    /// The read that an answer belongs to, the answer noted.
    fn answered_read(&mut self, moment: Moment, op: OpId, from: NodeId) -> Option<&mut ReadOp> {
        let Some(entry) = self.table.get_mut(op) else {
            self.counters.late += 1;
            return None;
        };
        if let Some(waited) = entry.waited(moment.now, from) {
            self.health.answered(moment.now, from, Verb::Read, waited);
        }
        match &mut entry.op {
            Op::Read(read) => Some(read),
            Op::Write(_) => None,
        }
    }

    fn advance(&mut self, moment: Moment, op: OpId, out: &mut Vec<Action>) {
        let Some(entry) = self.table.get_mut(op) else { return };
        let elapsed = entry.elapsed_us(moment.now);
        let Op::Read(read) = &mut entry.op else { return };
        let (health, mut asks) = (&self.health, no_asks());
        let verdict = read.advance(elapsed, |node| health.is_healthy(node), &mut asks);
        let bytes = read.merged().map_or(0, |record| record.key.len() + record.value.len());
        self.bytes = self.bytes - entry.bytes + bytes;
        entry.bytes = bytes;
        if let Some(verdict) = verdict {
            self.conclude(moment, op, verdict, out);
        } else {
            self.counters.asked_again += asks.len() as u64;
            self.send(op, &asks, out);
        }
        self.release(op);
    }

    fn conclude(&mut self, moment: Moment, op: OpId, verdict: Verdict, out: &mut Vec<Action>) {
        let outcome = match verdict {
            Verdict::Done(facts) => {
                self.repair(moment, op, out);
                Outcome::Read(facts)
            }
            Verdict::Stale(facts) => {
                self.counters.reads_stale += 1;
                Outcome::Stale(facts)
            }
            Verdict::Unavailable => {
                self.counters.reads_unavailable += 1;
                Outcome::Unavailable
            }
            Verdict::Corrupt => Outcome::Corrupt,
            Verdict::Expired => {
                self.counters.reads_expired += 1;
                Outcome::Expired
            }
        };
        out.push(Action::Answer { op, outcome });
        // From now on only the deadline matters.
        if let Some(deadline) = self.table.get(op).map(|entry| entry.deadline) {
            self.table.set_due(op, deadline);
        }
    }

    /// Sends the merged state to replicas that lack some of it, unless the write is so young that
    /// it is likely on its way there.
    fn repair(&mut self, moment: Moment, op: OpId, out: &mut Vec<Action>) {
        let Some(Entry { op: Op::Read(read), .. }) = self.table.get(op) else { return };
        let Some(merged) = read.merged() else { return };
        let age_us = moment.wall.0.saturating_sub(merged.timestamp.wall().0);
        for to in read.stale() {
            let is_settled = age_us.saturating_mul(1000) >= 2 * self.health.write_p99(to);
            if is_settled && (to == self.me || self.health.is_healthy(to)) {
                self.counters.repairs += 1;
                out.push(Action::Repair { to, op });
            }
        }
    }

    fn send(&mut self, op: OpId, asks: &Asks, out: &mut Vec<Action>) {
        for (to, want) in asks.iter().copied() {
            self.health.sent(to);
            out.push(Action::SendRead { to, op, want });
        }
    }

    /// The home replicas in the order in which to ask them.
    fn order(
        &self,
        now: Instant,
        request: &ReadRequest<'_>,
        is_likely_fresh: impl Fn(NodeId) -> bool,
    ) -> Inline<NodeId, PLACES_MAX> {
        let mut order = Inline::new(self.me);
        for node in request.primaries {
            order.push(*node);
        }
        // What lies here costs no message.
        let own = order.iter().position(|node| *node == self.me);
        if let Some(own) = own {
            order.swap(0, own);
        }
        let first = usize::from(own.is_some());
        self.health.order(now, &mut order[first..]);
        if first == 1 && order.len() > 1 && self.health.is_too_slow(now, self.me, order[1]) {
            order[..2].reverse();
        }
        if request.freshness.is_some() {
            order.sort_by_key(|node| !is_likely_fresh(*node));
        }
        order
    }

    // ---- failures and time ------------------------------------------------------------------

    /// A server gave no answer: it refused, or what was sent could not be sent.
    pub fn failed(
        &mut self,
        moment: Moment,
        op: OpId,
        from: NodeId,
        failure: Failure,
        out: &mut Vec<Action>,
    ) {
        let Some(entry) = self.table.get_mut(op) else {
            self.counters.late += 1;
            return;
        };
        let Some(waited) = entry.waited(moment.now, from) else { return };
        if failure == Failure::Busy {
            self.health.failed(moment.now, from, entry.op.verb(), waited);
            self.hedges_paused_until = moment.now.after_nanos(HEDGE_PAUSE_NANOS);
        } else {
            self.health.refused(from);
        }
        let elapsed = entry.elapsed_us(moment.now);
        match &mut entry.op {
            Op::Write(write) => {
                let health = &self.health;
                let decision = write.failed(from, elapsed, |node| health.is_healthy(node));
                self.decide(op, decision, out);
                self.release(op);
            }
            Op::Read(read) => {
                match failure {
                    Failure::Unknown => read.unknown(from),
                    _ => read.failed(from),
                }
                self.advance(moment, op, out);
            }
        }
    }

    /// A server can no longer be reached: what was under way to it is lost, and it is asked
    /// nothing until [`Coordinator::peer_up`].
    pub fn peer_down(&mut self, moment: Moment, node: NodeId, out: &mut Vec<Action>) {
        self.health.set_linked(node, false);
        for index in 0..self.table.slots() {
            if let Some(op) = self.table.id_at(index) {
                self.failed(moment, op, node, Failure::Lost, out);
            }
        }
    }

    /// A server can be reached again.
    pub fn peer_up(&mut self, node: NodeId) {
        self.health.set_linked(node, true);
    }

    /// When [`Coordinator::handle_timeout`] is next wanted.
    pub fn next_timeout(&mut self) -> Option<Instant> {
        self.table.next_due()
    }

    /// Hedges what is late, and answers what has no time left.
    pub fn handle_timeout(&mut self, moment: Moment, out: &mut Vec<Action>) {
        while let Some(op) = self.table.pop_due(moment.now) {
            let Some(entry) = self.table.get(op) else { continue };
            if entry.deadline <= moment.now {
                self.expire(moment, op, out);
            } else {
                self.hedge(moment, op, out);
            }
        }
    }

    fn expire(&mut self, moment: Moment, op: OpId, out: &mut Vec<Action>) {
        let Some(entry) = self.table.get_mut(op) else { return };
        match &mut entry.op {
            Op::Write(write) => {
                let decision = write.deadline();
                self.decide(op, decision, out);
            }
            Op::Read(read) => {
                if let Some(verdict) = read.deadline() {
                    self.conclude(moment, op, verdict, out);
                }
            }
        }
        let Some(entry) = self.table.get_mut(op) else { return };
        for node in entry.op.outstanding().iter() {
            let waited = entry.waited(moment.now, *node).unwrap_or(0);
            self.health.failed(moment.now, *node, entry.op.verb(), waited);
        }
        match &mut entry.op {
            Op::Write(write) => write.give_up(),
            Op::Read(read) => read.give_up(),
        }
        self.release(op);
    }

    fn hedge(&mut self, moment: Moment, op: OpId, out: &mut Vec<Action>) {
        let Some(entry) = self.table.get_mut(op) else { return };
        let (elapsed, deadline) = (entry.elapsed_us(moment.now), entry.deadline);
        let mut due = deadline;
        if let Op::Read(read) = &mut entry.op
            && !read.is_answered()
        {
            let is_paused = moment.now < self.hedges_paused_until;
            if is_paused || self.hedge_tokens < READS_PER_HEDGE {
                self.counters.hedges_denied += 1;
            } else {
                let (health, mut asks) = (&self.health, no_asks());
                read.hedge(elapsed, |node| health.is_healthy(node), &mut asks);
                entry.hedges += 1;
                let more = entry.hedges < HEDGES_PER_READ && !asks.is_empty();
                if let Some(Entry { op: Op::Read(read), .. }) = self.table.get(op)
                    && more
                {
                    due = self.hedge_due(moment.now, read, &asks).min(deadline);
                }
                let hedges = u32::try_from(asks.len()).expect("at most one");
                self.hedge_tokens -= READS_PER_HEDGE * hedges;
                self.counters.hedges += u64::from(hedges);
                self.send(op, &asks, out);
            }
        }
        self.table.set_due(op, due);
    }

    /// When the answers to what was just asked are late, if another server could be asked then.
    fn hedge_due(&self, now: Instant, read: &ReadOp, asks: &Asks) -> Instant {
        let delay = asks.iter().map(|(node, _)| self.health.hedge_delay(*node)).max();
        match delay {
            Some(delay) if read.has_spare() => now.after_nanos(delay),
            _ => Instant(u64::MAX),
        }
    }

    // ---- the table --------------------------------------------------------------------------

    /// What the pump keeps with an operation; `None` when it is finished or gone.
    #[must_use]
    pub fn payload(&self, op: OpId) -> Option<&P> {
        self.table.get(op)?.payload.as_ref()
    }

    /// The same, to change.
    pub fn payload_mut(&mut self, op: OpId) -> Option<&mut P> {
        self.table.get_mut(op)?.payload.as_mut()
    }

    /// When an operation must be answered.
    #[must_use]
    pub fn deadline(&self, op: OpId) -> Option<Instant> {
        Some(self.table.get(op)?.deadline)
    }

    /// Takes what an answered operation holds. To be called once for each [`Action::Answer`]; the
    /// operation goes when all that were asked have answered.
    pub fn finish(&mut self, op: OpId) -> Option<Finished<P>> {
        let entry = self.table.get_mut(op)?;
        let (payload, began) = (entry.payload.take()?, entry.began);
        let state = match &mut entry.op {
            Op::Read(read) => read.take_merged(),
            Op::Write(_) => None,
        };
        self.bytes -= std::mem::take(&mut entry.bytes);
        self.release(op);
        Some(Finished { payload, state, began })
    }

    /// Removes an operation that nobody waits for and that waits for nobody.
    fn release(&mut self, op: OpId) {
        if let Some(entry) = self.table.get(op)
            && entry.payload.is_none()
            && entry.op.outstanding().is_empty()
        {
            self.table.remove(op);
        }
    }

    fn admit(&mut self) -> Result<(), Refusal> {
        let is_full = self.table.len() >= self.options.operations_max;
        if is_full || self.bytes >= self.options.bytes_max {
            self.counters.busy += 1;
            return Err(Refusal::new(Status::BUSY, "too many operations wait for other servers"));
        }
        Ok(())
    }

    /// Operations in flight, those among them that are answered and wait for the rest.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether nothing is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that operations in flight hold.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How each server answers.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// The same, to be told what others say of a server.
    pub fn health_mut(&mut self) -> &mut Health {
        &mut self.health
    }

    /// What has happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }
}

/// The replicas are there, and their windows are closed.
fn too_much_to_do() -> Refusal {
    Refusal::new(Status::BUSY, "the replicas of the key have too much to do")
}

#[cfg(test)]
mod tests;
