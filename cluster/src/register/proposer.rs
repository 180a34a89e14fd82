//! The proposer: carries the changes of one register out, one after the other.
//!
//! ```text
//! submit -> PREPARE -> a majority promises -> apply -> ACCEPT -> a majority accepts -> Done
//!              ^            | conflict                    | conflict            |
//!              +-- wait ----+-----------------------------+     the next ballot is promised too:
//!                                                               the next change begins at ACCEPT
//! ```
//!
//! Invariant: a change is answered once: as made or kept out, which a majority has accepted; as not
//! started, when no ACCEPT with it ever left, so that it never happens; or as one that may be
//! applied. It happens once or not at all, however often it was tried (`register/mod.rs`).
//!
//! Contention is the weakness of the protocol: proposers that take turns overruling each other.
//! Changes of one proposer wait in line, so only proposers contend; the loser waits a random time
//! that doubles. Nothing is owed after an answer: what comes late is not looked at.

use std::collections::VecDeque;
use std::rc::Rc;

use annulus_engine::model::Instant;

use super::acceptor::{AcceptResult, PrepareResult};
use super::ballot::{Ballot, BallotSource};
use super::holders::majority;
use super::state::{State, Trace};
use crate::chance::Chance;
use crate::coordinator::Moment;
use crate::member::NodeId;

/// Most changes that wait in line.
pub const QUEUE_MAX: usize = 64;

/// A function of a register's state. It may be applied several times, of which one counts.
pub trait Change {
    /// What whoever asked is told.
    type Reply;

    /// What becomes of the state.
    fn apply(&mut self, current: &State) -> Applied<Self::Reply>;

    /// The holders of the register that this state names: a majority of each group must agree.
    /// `None`: those that the proposer was given.
    fn voters(&self, state: &State) -> Option<Vec<Vec<NodeId>>> {
        let _ = state;
        None
    }
}

/// What a change makes of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied<R> {
    /// Another state.
    Write {
        /// Above the current one.
        version: u64,
        /// The new value.
        value: Vec<u8>,
        /// The answer if this is how the change is made.
        reply: R,
    },
    /// Nothing: a read, or a condition that does not hold.
    Keep(R),
}

/// Names a change of a proposer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChangeId(pub u64);

/// How a change ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<R> {
    /// It is made, with this reply; a majority has accepted the state, in which it is.
    Changed(R, Rc<State>),
    /// It changes nothing, with this reply; the state was the register's during the change.
    Kept(R, Rc<State>),
    /// It is not made, and never will be: in time, at most so many acceptors answered a round.
    NotStarted {
        /// How many.
        answered: usize,
    },
    /// It was begun, and what became of it is not known.
    MayBeApplied,
}

/// What the caller is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProposerAction<R> {
    /// Ask an acceptor, which may be this node's own.
    Prepare {
        /// Whom.
        to: NodeId,
        /// The ballot to promise.
        ballot: Ballot,
    },
    /// Ask an acceptor to accept.
    Accept {
        /// Whom.
        to: NodeId,
        /// With which ballot.
        ballot: Ballot,
        /// The ballot to promise with it.
        next: Ballot,
        /// The state.
        state: Rc<State>,
    },
    /// Answer whoever asked for the change.
    Done(ChangeId, Outcome<R>),
}

/// How patient a proposer is.
#[derive(Clone, Copy, Debug)]
pub struct ProposerOptions {
    /// Who has not answered in so long is asked again, in nanoseconds.
    pub resend_nanos: u64,
    /// How long the others are waited for after a refusal, in nanoseconds.
    pub patience_nanos: u64,
    /// The first wait after a conflict is at most this, each later one at most twice as long.
    pub back_off_nanos: u64,
    /// Longest wait after a conflict, in nanoseconds.
    pub back_off_nanos_max: u64,
}

impl Default for ProposerOptions {
    fn default() -> ProposerOptions {
        const MS: u64 = 1_000_000;
        ProposerOptions {
            resend_nanos: 100 * MS,
            patience_nanos: 20 * MS,
            back_off_nanos: 10 * MS,
            back_off_nanos_max: 640 * MS,
        }
    }
}

/// A change in line.
struct Pending<C: Change> {
    id: ChangeId,
    change: C,
    deadline: Instant,
    /// Ballots with which it was proposed, and what to reply if that was it.
    attempts: Vec<(Ballot, C::Reply)>,
    conflicts: u32,
    /// Most acceptors that answered a round.
    answered: usize,
}

enum Phase<R> {
    Prepare {
        /// What the greatest ballot was accepted with, among those that have promised.
        best: Option<(Ballot, State)>,
        /// Whether all of them have accepted the same ballot last.
        is_unanimous: bool,
    },
    Accept {
        next: Ballot,
        state: Rc<State>,
        purpose: Purpose<R>,
    },
}

enum Purpose<R> {
    /// The state has the attempt of this ballot in it.
    Made(Ballot),
    /// The change kept the state as it was.
    Keep(R),
}

struct Round<R> {
    ballot: Ballot,
    phase: Phase<R>,
    /// Who has promised or accepted.
    agreed: Vec<NodeId>,
    refused: Vec<NodeId>,
    resend_at: Instant,
    /// Set by the first refusal.
    give_up_at: Option<Instant>,
}

/// See the module.
pub struct Proposer<C: Change> {
    /// All holders, by id.
    acceptors: Vec<NodeId>,
    /// A majority of each must agree; while holders change there are two.
    groups: Vec<Vec<NodeId>>,
    /// Fewer than a majority of a group, where a test wants to see what comes of that.
    pub(super) quorum: Option<usize>,
    source: BallotSource,
    options: ProposerOptions,
    chance: Chance,
    queue: VecDeque<Pending<C>>,
    /// Of the first in line.
    round: Option<Round<C::Reply>>,
    /// A ballot that a majority has promised after it accepted this state.
    promised: Option<(Ballot, Rc<State>)>,
    waits_until: Option<Instant>,
    next_id: u64,
    conflicts: u64,
}

impl<C: Change> std::fmt::Debug for Proposer<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proposer").field("source", &self.source).finish_non_exhaustive()
    }
}

impl<C: Change> Proposer<C> {
    /// A proposer of a register that these acceptors hold. `seed` draws its waits.
    #[must_use]
    pub fn new(
        acceptors: Vec<NodeId>,
        source: BallotSource,
        seed: u64,
        options: ProposerOptions,
    ) -> Proposer<C> {
        Proposer {
            groups: vec![acceptors.clone()],
            quorum: None,
            acceptors,
            source,
            options,
            chance: Chance::new(seed),
            queue: VecDeque::new(),
            round: None,
            promised: None,
            waits_until: None,
            next_id: 0,
            conflicts: 0,
        }
    }

    /// Who holds the register.
    #[must_use]
    pub fn acceptors(&self) -> &[NodeId] {
        &self.acceptors
    }

    /// Others hold the register from now on. A round that is under way begins again with them.
    pub fn set_voters(&mut self, moment: Moment, groups: Vec<Vec<NodeId>>) {
        if self.take_voters(groups) && self.round.take().is_some() {
            self.waits_until = Some(moment.now);
        }
    }

    /// Whether they are others. What was promised before is nothing to them.
    fn take_voters(&mut self, groups: Vec<Vec<NodeId>>) -> bool {
        if groups == self.groups || groups.iter().all(Vec::is_empty) {
            return false;
        }
        self.acceptors = groups.iter().flatten().copied().collect();
        self.acceptors.sort_unstable();
        self.acceptors.dedup();
        (self.groups, self.promised) = (groups, None);
        true
    }

    /// Whether these are enough: a majority of each group.
    fn is_quorum(&self, agreed: &[NodeId]) -> bool {
        self.groups.iter().all(|group| {
            let count = group.iter().filter(|node| agreed.contains(node)).count();
            count >= self.quorum.unwrap_or(majority(group.len()))
        })
    }

    /// How often a round was overruled.
    #[must_use]
    pub fn conflicts(&self) -> u64 {
        self.conflicts
    }

    /// Whether no change is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Puts a change in line.
    ///
    /// # Errors
    /// The change, when the line is full; nothing was begun.
    pub fn submit(
        &mut self,
        moment: Moment,
        change: C,
        deadline: Instant,
        out: &mut Vec<ProposerAction<C::Reply>>,
    ) -> Result<ChangeId, C> {
        if self.queue.len() >= QUEUE_MAX {
            return Err(change);
        }
        self.next_id += 1;
        let id = ChangeId(self.next_id);
        let attempts = Vec::new();
        self.queue.push_back(Pending { id, change, deadline, attempts, conflicts: 0, answered: 0 });
        if self.queue.len() == 1 {
            self.begin(moment, out);
        }
        Ok(id)
    }

    /// An acceptor has answered PREPARE of this ballot.
    pub fn handle_prepared(
        &mut self,
        moment: Moment,
        from: NodeId,
        ballot: Ballot,
        result: PrepareResult,
        out: &mut Vec<ProposerAction<C::Reply>>,
    ) {
        let Some(round) = self.round_of(from, ballot) else { return };
        let Phase::Prepare { best, is_unanimous } = &mut round.phase else { return };
        let (accepted, state) = match result {
            PrepareResult::Promised(accepted, state) => (accepted, state),
            PrepareResult::Conflict(seen) => return self.overruled(moment, from, seen),
        };
        // Of states that were never accepted, the one of the highest version is the newest known.
        let (ballot_of, version) =
            best.as_ref().map_or((accepted, 0), |(ballot, best)| (*ballot, best.version));
        *is_unanimous &= accepted == ballot_of && accepted > Ballot::ZERO;
        if best.is_none() || (accepted, state.version) > (ballot_of, version) {
            *best = Some((accepted, state));
        }
        round.agreed.push(from);
        let agreed = round.agreed.clone();
        if !self.is_quorum(&agreed) {
            return;
        }
        let Some(round) = &mut self.round else { return };
        let Phase::Prepare { best, is_unanimous } = &mut round.phase else { return };
        let is_chosen = *is_unanimous;
        let current = best.take().map(|(_, state)| state).unwrap_or_default();
        self.note_answers();
        let named = self.queue.front().and_then(|pending| pending.change.voters(&current));
        if named.is_some_and(|named| self.take_voters(named)) {
            // Others hold it by now, and they may know of later changes.
            self.round = None;
            return self.begin(moment, out);
        }
        self.propose(moment, ballot, Rc::new(current), is_chosen, out);
    }

    /// An acceptor has answered ACCEPT with this ballot.
    pub fn handle_accepted(
        &mut self,
        moment: Moment,
        from: NodeId,
        ballot: Ballot,
        result: AcceptResult,
        out: &mut Vec<ProposerAction<C::Reply>>,
    ) {
        let Some(round) = self.round_of(from, ballot) else { return };
        if !matches!(round.phase, Phase::Accept { .. }) {
            return;
        }
        if let AcceptResult::Conflict(seen) = result {
            return self.overruled(moment, from, seen);
        }
        round.agreed.push(from);
        let agreed = round.agreed.clone();
        if !self.is_quorum(&agreed) {
            return;
        }
        self.note_answers();
        let round = self.round.take().expect("it was found above");
        let Phase::Accept { next, state, purpose } = round.phase else { return };
        self.promised = Some((next, Rc::clone(&state)));
        // What was accepted by the holders of before and of now is followed by those of now.
        if let Some(named) = self.queue.front().and_then(|it| it.change.voters(&state)) {
            self.take_voters(named);
        }
        let outcome = self.accepted(purpose, state);
        self.finish(moment, outcome, out);
    }

    /// When [`Proposer::handle_timeout`] must be called though nothing arrives.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        let deadlines = self.queue.iter().map(|pending| pending.deadline);
        let round = self
            .round
            .iter()
            .flat_map(|round| std::iter::once(round.resend_at).chain(round.give_up_at));
        deadlines.chain(round).chain(self.waits_until).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, moment: Moment, out: &mut Vec<ProposerAction<C::Reply>>) {
        let now = moment.now;
        self.expire(moment, out);
        if self.waits_until.is_some_and(|until| until <= now) {
            self.waits_until = None;
            self.begin(moment, out);
        }
        let resend_nanos = self.options.resend_nanos;
        let Some(round) = &mut self.round else { return };
        if round.give_up_at.is_some_and(|at| at <= now) {
            return self.back_off(now);
        }
        if round.resend_at <= now {
            round.resend_at = now.after_nanos(resend_nanos);
            self.send(out);
        }
    }

    /// The first in line begins: at ACCEPT, if its ballot is promised already.
    fn begin(&mut self, moment: Moment, out: &mut Vec<ProposerAction<C::Reply>>) {
        if self.queue.is_empty() {
            return;
        }
        if let Some((ballot, state)) = self.promised.take() {
            // Others may have changed it since: only a majority that accepts says they have not.
            return self.propose(moment, ballot, state, false, out);
        }
        let ballot = self.source.next(moment.wall);
        self.start(moment, ballot, Phase::Prepare { best: None, is_unanimous: true }, out);
    }

    /// A majority has promised `ballot`, and this is the state that its changes follow.
    fn propose(
        &mut self,
        moment: Moment,
        ballot: Ballot,
        current: Rc<State>,
        is_chosen: bool,
        out: &mut Vec<ProposerAction<C::Reply>>,
    ) {
        let Some(pending) = self.queue.front_mut() else { return };
        let attempts: Vec<Ballot> = pending.attempts.iter().map(|(ballot, _)| *ballot).collect();
        let (state, purpose) = match current.trace(&attempts) {
            Trace::Forgotten => {
                self.promised = Some((ballot, current));
                return self.finish(moment, Outcome::MayBeApplied, out);
            }
            Trace::Made(attempt) => (current, Purpose::Made(attempt)),
            Trace::NotMade => match pending.change.apply(&current) {
                Applied::Keep(reply) => (current, Purpose::Keep(reply)),
                Applied::Write { version, value, reply } => {
                    assert!(version > current.version, "versions grow");
                    let state = Rc::new(current.changed(ballot, version, value));
                    pending.attempts.push((ballot, reply));
                    (state, Purpose::Made(ballot))
                }
            },
        };
        // A state that names other holders is accepted by them as well as by those of before.
        if let Some(named) = self.queue.front().and_then(|it| it.change.voters(&state))
            && named.iter().any(|group| !self.groups.contains(group))
        {
            let mut groups = self.groups.clone();
            groups.extend(named.into_iter().filter(|group| !self.groups.contains(group)));
            self.take_voters(groups);
        }
        // What a majority has accepted last needs no second acceptance to be told.
        let is_told = is_chosen && !matches!(purpose, Purpose::Made(by) if by == ballot);
        if is_told {
            self.promised = Some((ballot, Rc::clone(&state)));
            let outcome = self.accepted(purpose, state);
            return self.finish(moment, outcome, out);
        }
        let next = self.source.following();
        self.start(moment, ballot, Phase::Accept { next, state, purpose }, out);
    }

    /// How the first in line ends when a majority has accepted.
    fn accepted(&mut self, purpose: Purpose<C::Reply>, state: Rc<State>) -> Outcome<C::Reply> {
        let attempts = self.queue.front_mut().map(|pending| &mut pending.attempts);
        match (purpose, attempts) {
            (Purpose::Keep(reply), _) => Outcome::Kept(reply, state),
            (Purpose::Made(by), Some(attempts)) => {
                let at = attempts.iter().position(|(ballot, _)| *ballot == by);
                let (_, reply) = attempts.swap_remove(at.expect("only attempts are looked for"));
                Outcome::Changed(reply, state)
            }
            (Purpose::Made(_), None) => Outcome::MayBeApplied,
        }
    }

    /// Answers the first in line, and goes on with the next.
    fn finish(
        &mut self,
        moment: Moment,
        outcome: Outcome<C::Reply>,
        out: &mut Vec<ProposerAction<C::Reply>>,
    ) {
        (self.round, self.waits_until) = (None, None);
        if let Some(pending) = self.queue.pop_front() {
            out.push(ProposerAction::Done(pending.id, outcome));
        }
        self.begin(moment, out);
    }

    fn start(
        &mut self,
        moment: Moment,
        ballot: Ballot,
        phase: Phase<C::Reply>,
        out: &mut Vec<ProposerAction<C::Reply>>,
    ) {
        self.round = Some(Round {
            ballot,
            phase,
            agreed: Vec::new(),
            refused: Vec::new(),
            resend_at: moment.now.after_nanos(self.options.resend_nanos),
            give_up_at: None,
        });
        self.send(out);
    }

    /// Asks whoever has not answered yet.
    fn send(&self, out: &mut Vec<ProposerAction<C::Reply>>) {
        let Some(round) = &self.round else { return };
        let ballot = round.ballot;
        let silent = |to: &&NodeId| !round.agreed.contains(to) && !round.refused.contains(to);
        out.extend(self.acceptors.iter().filter(silent).map(|to| match &round.phase {
            Phase::Prepare { .. } => ProposerAction::Prepare { to: *to, ballot },
            Phase::Accept { next, state, .. } => {
                ProposerAction::Accept { to: *to, ballot, next: *next, state: Rc::clone(state) }
            }
        }));
    }

    /// The round, if this is an acceptor's first answer in it.
    fn round_of(&mut self, from: NodeId, ballot: Ballot) -> Option<&mut Round<C::Reply>> {
        let is_acceptor = self.acceptors.contains(&from);
        let round = self.round.as_mut().filter(|round| round.ballot == ballot && is_acceptor)?;
        (!round.agreed.contains(&from)).then_some(round)
    }

    /// An acceptor has refused. The others may still be enough.
    fn overruled(&mut self, moment: Moment, from: NodeId, seen: Ballot) {
        self.source.observe(seen);
        let patient = moment.now.after_nanos(self.options.patience_nanos);
        let Some(round) = &mut self.round else { return };
        if !round.refused.contains(&from) {
            round.refused.push(from);
        }
        round.give_up_at.get_or_insert(patient);
        let left: Vec<NodeId> =
            self.acceptors.iter().copied().filter(|it| !round.refused.contains(it)).collect();
        if !self.is_quorum(&left) {
            self.back_off(moment.now);
        }
    }

    fn back_off(&mut self, now: Instant) {
        self.note_answers();
        self.round = None;
        self.conflicts += 1;
        let Some(pending) = self.queue.front_mut() else { return };
        let most = self.options.back_off_nanos << pending.conflicts.min(16);
        pending.conflicts += 1;
        let most = most.min(self.options.back_off_nanos_max);
        self.waits_until = Some(now.after_nanos(self.chance.up_to(most)));
    }

    /// Who is past his deadline is answered, the first in line by what was begun for him.
    fn expire(&mut self, moment: Moment, out: &mut Vec<ProposerAction<C::Reply>>) {
        let now = moment.now;
        self.note_answers();
        let head = self.queue.front().map(|pending| pending.id);
        let is_over = |pending: &Pending<C>| pending.deadline <= now;
        if !self.queue.iter().any(is_over) {
            return;
        }
        self.queue.retain(|pending| {
            if is_over(pending) {
                let outcome = match pending.attempts.is_empty() {
                    true => Outcome::NotStarted { answered: pending.answered },
                    false => Outcome::MayBeApplied,
                };
                out.push(ProposerAction::Done(pending.id, outcome));
            }
            !is_over(pending)
        });
        if self.queue.front().map(|pending| pending.id) != head {
            (self.round, self.waits_until) = (None, None);
            self.begin(moment, out);
        }
    }

    fn note_answers(&mut self) {
        if let (Some(round), Some(pending)) = (&self.round, self.queue.front_mut()) {
            pending.answered = pending.answered.max(round.agreed.len() + round.refused.len());
        }
    }
}
