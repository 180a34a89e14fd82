//! One write on its way to the replicas: whom it was sent to, who has it, and what to answer.
//!
//! Stands between the local append, which gave the write its stamp, and the client's answer.
//! Invariants: a write is answered once; *done* only when as many different servers have it as
//! were asked for; and after [`WriteOp::plan`] said that it may begin it is never again *not
//! started*: from then on the worst that is said is *may be applied*.
//!
//! ```text
//! plan -> Err(refusal)                        nothing was done, NOT_STARTED
//!      -> op; append locally; send to targets; acks, failures ... -> Done
//!                                                                 -> MayBeApplied: cannot succeed
//!                                             deadline            -> MayBeApplied
//! ```
//!
//! A failure before the answer is made good: by a home replica that was not well when the write
//! began, or, in a sloppy write, by the next server in line. `DeCandia` et al., "Dynamo: Amazon's
//! Highly Available Key-value Store" (2007), sections 4.5 and 4.6.

use annulus_net::wire::request::Refusal;
use annulus_net::wire::status::Status;

use super::inline::Inline;
use super::quorum::{Acks, COPIES_MAX, Requirement};
use crate::member::NodeId;

/// Most servers that one operation considers.
pub const PLACES_MAX: usize = COPIES_MAX as usize;

/// What has become of the write at one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// Not sent there; it may stand in for one that fails.
    Spare,
    /// Sent, not answered.
    Waiting,
    /// It has the write, in memory.
    Accepted,
    /// It has the write, on disk.
    Durable,
    /// It refused, or cannot be reached. It may have the write all the same.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    node: NodeId,
    /// Microseconds after the operation began.
    sent_us: u32,
    is_primary: bool,
    /// Among the other homes of a partition that moves.
    is_other: bool,
    state: State,
}

impl Place {
    /// Whether it counts for the homes that reads ask: one that is no home stands in for any.
    fn counts_here(&self) -> bool {
        self.is_primary || !self.is_other
    }

    /// Whether it counts for the other homes.
    fn counts_there(&self) -> bool {
        self.is_other || !self.is_primary
    }
}

/// The other homes of a key whose partition moves: a write must come to them as well, each level
/// of it, so that a read that asks them later sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OtherHomes<'a> {
    /// Who.
    pub homes: &'a [NodeId],
    /// What must come together among them.
    pub requirement: Requirement,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing; or it was answered before.
    Wait,
    /// Answer: enough have it.
    Done(Acks),
    /// Answer: it cannot come to enough any more, or not in time. It is known to be there.
    MayBeApplied(Acks),
    /// Send it to this server as well.
    Also(NodeId),
}

/// See the module. 300 bytes and no pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WriteOp {
    requirement: Requirement,
    /// Of the other homes, while the partition moves.
    other: Option<Requirement>,
    is_answered: bool,
    /// This server first, then the other home replicas, then those that may stand in.
    places: Inline<Place, PLACES_MAX>,
}

impl WriteOp {
    /// Chooses the targets of a write that this server, `me`, coordinates and stores first.
    ///
    /// `primaries` are the key's home replicas and `fallbacks` those that stand in, both in order;
    /// `is_healthy` says who takes requests now. Every healthy home replica is a target; in a
    /// sloppy write as many healthy fallbacks as make it `n`.
    ///
    /// # Errors
    /// [`Refusal`] when too few are healthy. Nothing has been done: the write is not started.
    pub fn plan(
        requirement: Requirement,
        me: NodeId,
        primaries: &[NodeId],
        fallbacks: &[NodeId],
        is_healthy: impl Fn(NodeId) -> bool,
    ) -> Result<WriteOp, Refusal> {
        WriteOp::plan_both(requirement, me, primaries, None, fallbacks, is_healthy)
    }

    /// The same while the partition moves: every healthy one of the other homes is a target too.
    ///
    /// # Errors
    /// As [`WriteOp::plan`].
    pub fn plan_both(
        requirement: Requirement,
        me: NodeId,
        primaries: &[NodeId],
        other: Option<OtherHomes<'_>>,
        fallbacks: &[NodeId],
        is_healthy: impl Fn(NodeId) -> bool,
    ) -> Result<WriteOp, Refusal> {
        let others = other.map_or(&[][..], |other| other.homes);
        let place = |node, is_primary, state| {
            let is_other = others.contains(&node);
            Place { node, sent_us: 0, is_primary, is_other, state }
        };
        let is_home = primaries.contains(&me);
        if !is_home && !requirement.sloppy {
            return Err(unavailable("no home replica of the key can be reached"));
        }
        let mut places = Inline::new(place(me, is_home, State::Spare));
        places.push(place(me, is_home, State::Waiting));
        let mut targets = 1;
        for node in primaries.iter().filter(|node| **node != me) {
            let state = if is_healthy(*node) { State::Waiting } else { State::Spare };
            targets += u8::from(state == State::Waiting);
            places.push(place(*node, true, state));
        }
        for node in others.iter().filter(|node| **node != me && !primaries.contains(node)) {
            let state = if is_healthy(*node) { State::Waiting } else { State::Spare };
            places.push(place(*node, false, state));
        }
        for node in fallbacks.iter().filter(|_| requirement.sloppy) {
            if places.iter().any(|place| place.node == *node) {
                continue;
            }
            let is_target = targets < requirement.n && is_healthy(*node);
            targets += u8::from(is_target);
            let state = if is_target { State::Waiting } else { State::Spare };
            places.push(place(*node, false, state));
        }
        let other = other.map(|other| other.requirement);
        let op = WriteOp { requirement, other, is_answered: false, places };
        let hoped = op.hoped();
        if !op.may_be_met_there() {
            let what = "too few of the homes that the key moves to or from can be reached";
            return Err(unavailable(what));
        }
        if hoped.primary < requirement.primary {
            return Err(unavailable("too few home replicas of the key can be reached"));
        }
        if hoped.total < requirement.needed() {
            return Err(unavailable("too few replicas can be reached"));
        }
        Ok(op)
    }

    /// The servers to which it has been sent, or is to be sent now, without an answer so far.
    pub fn outstanding(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.places.iter().filter(|place| place.state == State::Waiting).map(|place| place.node)
    }

    /// When it was sent to this server, in microseconds after it began, if that has not answered.
    #[must_use]
    pub fn outstanding_since(&self, node: NodeId) -> Option<u32> {
        let place = self.places.iter().find(|place| place.node == node)?;
        (place.state == State::Waiting).then_some(place.sent_us)
    }

    /// A server has the write, this one included. It may say so twice: first that it has it in
    /// memory, then on disk. One that had been given up counts as well.
    pub fn acked(&mut self, node: NodeId, is_durable: bool) -> Decision {
        let Some(place) = self.place(node) else { return Decision::Wait };
        let state = if is_durable { State::Durable } else { State::Accepted };
        if place.state == State::Spare || place.state == State::Durable {
            return Decision::Wait;
        }
        place.state = state;
        let is_met = self.requirement.is_met(self.acks_here()) && self.is_met_there();
        if self.is_answered || !is_met {
            return Decision::Wait;
        }
        let acks = self.acks();
        self.is_answered = true;
        Decision::Done(acks)
    }

    /// A server refused, or can no longer be reached. `now_us` is the time after the beginning.
    pub fn failed(
        &mut self,
        node: NodeId,
        now_us: u32,
        is_healthy: impl Fn(NodeId) -> bool,
    ) -> Decision {
        let Some(place) = self.place(node) else { return Decision::Wait };
        if place.state != State::Waiting {
            return Decision::Wait;
        }
        place.state = State::Failed;
        if self.is_answered {
            return Decision::Wait;
        }
        let spare = |place: &&mut Place| place.state == State::Spare && is_healthy(place.node);
        let also = self.places.iter_mut().find(spare).map(|place| {
            (place.state, place.sent_us) = (State::Waiting, now_us);
            place.node
        });
        let hoped = self.hoped();
        let may_be_met = self.requirement.may_be_met(hoped.total, hoped.primary);
        if !may_be_met || !self.may_be_met_there() {
            // Nobody is asked in vain.
            if let Some(place) = also.and_then(|node| self.place(node)) {
                place.state = State::Spare;
            }
            self.is_answered = true;
            return Decision::MayBeApplied(self.acks());
        }
        also.map_or(Decision::Wait, Decision::Also)
    }

    /// Its time is over.
    pub fn deadline(&mut self) -> Decision {
        if self.is_answered {
            return Decision::Wait;
        }
        self.is_answered = true;
        Decision::MayBeApplied(self.acks())
    }

    /// Waits for nobody any more. What comes all the same is still counted.
    pub fn give_up(&mut self) {
        debug_assert!(self.is_answered, "first comes the deadline");
        for place in self.places.iter_mut().filter(|place| place.state == State::Waiting) {
            place.state = State::Failed;
        }
    }

    /// Who has it so far. While the partition moves, so many at least of the homes that reads ask now
    /// and of those that they ask later: what a client reckons with.
    #[must_use]
    pub fn acks(&self) -> Acks {
        let here = self.acks_here();
        if self.other.is_none() {
            return here;
        }
        let there = self.acks_there();
        Acks {
            total: here.total.min(there.total),
            primary: here.primary.min(there.primary),
            durable: here.durable.min(there.durable),
        }
    }

    fn acks_here(&self) -> Acks {
        self.acks_of(Place::counts_here, |place| place.is_primary)
    }

    fn acks_there(&self) -> Acks {
        self.acks_of(Place::counts_there, |place| place.is_other)
    }

    fn acks_of(&self, counts: fn(&Place) -> bool, is_home: fn(&Place) -> bool) -> Acks {
        let mut acks = Acks::default();
        let has_it = |place: &&Place| matches!(place.state, State::Accepted | State::Durable);
        for place in self.places.iter().filter(has_it).filter(|place| counts(place)) {
            acks.total += 1;
            acks.primary += u8::from(is_home(place));
            acks.durable += u8::from(place.state == State::Durable);
        }
        acks
    }

    /// Whether enough of the other homes have it, if there are any.
    fn is_met_there(&self) -> bool {
        self.other.is_none_or(|other| other.is_met(self.acks_there()))
    }

    fn may_be_met_there(&self) -> bool {
        self.other.is_none_or(|other| {
            let hoped = self.hoped_of(Place::counts_there, |place| place.is_other);
            other.may_be_met(hoped.total, hoped.primary)
        })
    }

    /// Who may have it in the end, of those it was sent to.
    fn hoped(&self) -> Acks {
        self.hoped_of(Place::counts_here, |place| place.is_primary)
    }

    fn hoped_of(&self, counts: fn(&Place) -> bool, is_home: fn(&Place) -> bool) -> Acks {
        let mut hoped = Acks::default();
        let may = |place: &&Place| !matches!(place.state, State::Spare | State::Failed);
        for place in self.places.iter().filter(may).filter(|place| counts(place)) {
            hoped.total += 1;
            hoped.primary += u8::from(is_home(place));
        }
        Acks { durable: hoped.total, ..hoped }
    }

    /// Whether it has been answered.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.is_answered
    }

    fn place(&mut self, node: NodeId) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| place.node == node)
    }
}

pub(super) fn unavailable(reason: &'static str) -> Refusal {
    Refusal::new(Status::UNAVAILABLE, reason)
}

#[cfg(test)]
mod tests;
