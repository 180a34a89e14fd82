//! One operation on a key that is a register: whom it has asked, what they said, what follows.
//!
//! ```text
//! read:  begin -> ASK 0 -> agreed: Ended::Read
//!                       -> not: Line ... turn_came -> ASK 0, whole -> agreed, or as a write
//! write: turn_came -> Ballot ... balloted -> ASK b -> a majority -> condition -> Propose
//!                        ^        conflict: pause  |             -> it is false: Ended
//!                        +-------------------------+   accepted by a majority: Ended
//! ```
//!
//! Invariant: an operation ends once. It ends as not started only if no ACCEPT with its write ever
//! left; if one did and was overruled, it looks whether its write is the key's record: then it is
//! made, else it may be applied. Operations of one key wait in line at their proposer; who is in
//! line, what is drawn, read and appended is the caller's.

use annulus_engine::model::{Instant, Timestamp, WallMicros};

use super::{Shown, Version};
use crate::chance::Chance;
use crate::coordinator::Moment;
use crate::member::NodeId;
use crate::message::Want;
use crate::register::majority;

/// The shortest longest pause after a conflict, in nanoseconds; doubled by each further one.
const PAUSE_NANOS: u64 = 500_000;
/// The longest.
const PAUSE_NANOS_MAX: u64 = 100_000_000;
/// How long a read waits for the last homes when those that have answered differ, in nanoseconds.
const PATIENCE_NANOS: u64 = 2_000_000;

/// What must hold for a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Always,
    /// There is no value.
    Absent,
    /// The value is of this write.
    Version(Version),
}

/// What the operation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The value.
    Read,
    /// A put or delete.
    Write(Expect),
    /// This home is to hold what was chosen, and what it holds then is no older than this stamp: that
    /// of a record which came late and some home has. Where none so new was chosen, what was is put
    /// again above it, or that home would differ from the others for ever.
    Mend(Timestamp),
}

/// What the caller is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask a home, which may be this one.
    Ask {
        /// Whom.
        to: NodeId,
        /// The ballot to promise; zero: none.
        ballot: Timestamp,
        /// Whether the value is wanted.
        want: Want,
    },
    /// Wait for the operations of this key that were begun before; then [`KeyOp::turn_came`].
    Line,
    /// Draw a version, whose stamp may be told; then [`KeyOp::balloted`].
    Ballot,
    /// The version that was drawn will not be used. Nor is it when another is to be drawn or all is
    /// over, without a proposal.
    Void,
    /// Append the client's write under the drawn version, if the promise of it still stands here:
    /// then [`KeyOp::proposed`], else [`KeyOp::not_proposed`].
    ProposeOwn,
    /// The same with what this home showed: its value under its version.
    ProposeSame(NodeId),
    /// Send what was proposed to a home, never this one.
    Accept(NodeId),
    /// Others know of this stamp: draw greater ones.
    Observe(Timestamp),
    /// What this home showed is chosen: merge it here.
    Learn(NodeId),
    /// It is over.
    End(Ended),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The value is what this home showed.
    Read {
        /// Whose.
        from: NodeId,
        /// How many hold it.
        answers: u8,
    },
    /// So many have the write.
    Written(Version, u8),
    /// The condition does not hold; the version found, if there is a value.
    ConditionFalse(Option<Version>),
    /// It is not made, and never will be; at most so many homes answered.
    NotStarted {
        /// How many.
        answered: u8,
        /// Whether its time was over; else it could not succeed any more.
        is_late: bool,
    },
    /// It was begun, and what became of it is not known.
    MayBeApplied(u8),
    /// This home holds what was chosen.
    Mended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vote {
    /// Not answered.
    Silent,
    /// It shows this, and has promised if that was asked for.
    Said(Shown),
    /// It will not.
    Refused,
    /// It cannot be reached, does not know, or will not say.
    Failed,
    /// It has what was proposed.
    Accepted,
}

/// A home, and of which groups: bit `i` for the group of number `i`.
#[derive(Clone, Copy, Debug)]
struct Place {
    node: NodeId,
    vote: Vote,
    groups: u8,
}

/// What is proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Proposal {
    version: Version,
    /// What is answered when a majority has it.
    then: Ended,
    is_own: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// For its turn.
    Waiting,
    /// For a version.
    Drawing,
    /// For answers; without a ballot if the version's stamp is zero.
    Asking {
        version: Version,
        want: Want,
        /// When those that have answered differ: until then for the others.
        patience: Option<Instant>,
    },
    /// For its place in the log here.
    Proposing(Proposal),
    /// For the others.
    Accepting(Proposal),
    Pausing(Instant),
    Over,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct KeyOp {
    me: NodeId,
    goal: Goal,
    /// How many of each group must have a write, a majority at least.
    needed: usize,
    deadline: Instant,
    places: Vec<Place>,
    /// Homes of each group.
    sizes: Vec<usize>,
    phase: Phase,
    /// The write left under this version, and was overruled.
    sent: Option<Version>,
    conflicts: u32,
    /// Values are asked for as well: something may have to be put again.
    want_whole: bool,
    answered: u8,
    chance: Chance,
    #[cfg(test)]
    forgets: bool,
}

impl KeyOp {
    /// An operation of the home `me` over the homes of a key: those by which it is read, and while
    /// its partition moves those that it is written to as well. Of each of these groups a majority
    /// must agree. `needed` homes of each must have a write, and never less than a majority. `seed`
    /// draws its pauses.
    #[must_use]
    pub fn new(
        me: NodeId,
        groups: &[&[NodeId]],
        goal: Goal,
        needed: usize,
        deadline: Instant,
        seed: u64,
    ) -> KeyOp {
        let mut places: Vec<Place> = Vec::new();
        for (group, homes) in groups.iter().enumerate() {
            for node in *homes {
                match places.iter_mut().find(|place| place.node == *node) {
                    Some(place) => place.groups |= 1 << group,
                    None => {
                        places.push(Place { node: *node, vote: Vote::Silent, groups: 1 << group });
                    }
                }
            }
        }
        KeyOp {
            me,
            goal,
            needed,
            deadline,
            places,
            sizes: groups.iter().map(|homes| homes.len()).collect(),
            phase: Phase::Waiting,
            sent: None,
            conflicts: 0,
            want_whole: matches!(goal, Goal::Mend(_)),
            answered: 0,
            chance: Chance::new(seed),
            #[cfg(test)]
            forgets: false,
        }
    }

    /// What it is for.
    #[must_use]
    pub fn goal(&self) -> Goal {
        self.goal
    }

    /// It will try again as if nothing had left.
    #[cfg(test)]
    pub(super) fn forgets_what_it_sent(&mut self) {
        self.forgets = true;
    }

    /// When it must be over.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// How often it was overruled.
    #[must_use]
    pub fn conflicts(&self) -> u32 {
        self.conflicts
    }

    /// When [`KeyOp::handle_timeout`] must be called though nothing arrives.
    #[must_use]
    pub fn next_timeout(&self) -> Instant {
        let sooner = match self.phase {
            Phase::Pausing(until) => Some(until),
            Phase::Asking { patience, .. } => patience,
            _ => None,
        };
        sooner.map_or(self.deadline, |sooner| sooner.min(self.deadline))
    }

    /// Begins. All but a read wait for their turn.
    pub fn begin(&mut self, out: &mut Vec<Step>) {
        match self.goal {
            Goal::Read => self.ask(Version::default(), Want::Digest, out),
            Goal::Write(_) | Goal::Mend(_) => out.push(Step::Line),
        }
    }

    /// All that came before it in line are over.
    pub fn turn_came(&mut self, out: &mut Vec<Step>) {
        match (self.phase, self.goal) {
            (Phase::Waiting, Goal::Write(_)) => self.draw_ballot(out),
            (Phase::Waiting, _) => self.ask(Version::default(), Want::Full, out),
            _ => {}
        }
    }

    /// A version was drawn.
    pub fn balloted(&mut self, version: Version, out: &mut Vec<Step>) {
        if self.phase == Phase::Drawing {
            let want = if self.want_whole { Want::Full } else { Want::Digest };
            self.ask(version, want, out);
        }
    }

    /// None can be drawn now.
    pub fn not_balloted(&mut self, out: &mut Vec<Step>) {
        if self.phase == Phase::Drawing {
            self.give_up(false, out);
        }
    }

    /// A home has answered, and promised the ballot unless that is zero. `is_whole`: with the record,
    /// not its head alone, which a question for the record is not answered by: it may be late, to an
    /// earlier one. Whether it is news: what it showed is kept until it shows something that is.
    pub fn said(
        &mut self,
        moment: Moment,
        from: NodeId,
        ballot: Timestamp,
        (shown, is_whole): (Shown, bool),
        out: &mut Vec<Step>,
    ) -> bool {
        if matches!(self.phase, Phase::Asking { want: Want::Full, .. }) && !is_whole {
            return false;
        }
        if self.ballot() != Some(ballot) || !self.note(from, Vote::Said(shown)) {
            return false;
        }
        match self.phase {
            Phase::Asking { .. } => self.look(moment, out),
            // One more that may have it.
            Phase::Accepting(_) => out.push(Step::Accept(from)),
            _ => {}
        }
        true
    }

    /// A home has promised or holds as great a ballot as this, or greater.
    pub fn refused(
        &mut self,
        moment: Moment,
        from: NodeId,
        ballot: Timestamp,
        seen: Timestamp,
        out: &mut Vec<Step>,
    ) {
        if self.ballot() == Some(ballot) && self.note(from, Vote::Refused) {
            out.push(Step::Observe(seen));
            self.look(moment, out);
        }
    }

    /// A home has what was proposed under this ballot on its disk.
    pub fn accepted(
        &mut self,
        moment: Moment,
        from: NodeId,
        ballot: Timestamp,
        out: &mut Vec<Step>,
    ) {
        let is_awaited = matches!(self.phase, Phase::Accepting(_));
        if is_awaited && self.ballot() == Some(ballot) && self.note(from, Vote::Accepted) {
            self.look(moment, out);
        }
    }

    /// A home cannot be reached, does not know the key, or began another life: what it said counts
    /// no more.
    pub fn failed(&mut self, moment: Moment, from: NodeId, out: &mut Vec<Step>) {
        let place = self.places.iter_mut().find(|place| place.node == from);
        let Some(place) = place.filter(|place| place.vote != Vote::Failed) else { return };
        place.vote = Vote::Failed;
        self.look(moment, out);
    }

    /// The proposal has its place in the log here: now it is sent.
    pub fn proposed(&mut self, out: &mut Vec<Step>) {
        let Phase::Proposing(proposal) = self.phase else { return };
        self.phase = Phase::Accepting(proposal);
        let others = self.places.iter().filter(|place| place.node != self.me);
        let promised = others.filter(|place| matches!(place.vote, Vote::Said(_)));
        out.extend(promised.map(|place| Step::Accept(place.node)));
    }

    /// The proposal has no place in the log here, and nobody was sent it: a greater ballot was
    /// promised meanwhile, or the log does not take it.
    pub fn not_proposed(&mut self, moment: Moment, is_overruled: bool, out: &mut Vec<Step>) {
        if !matches!(self.phase, Phase::Proposing(_)) {
            return;
        }
        match is_overruled {
            true => self.retreat(moment, out),
            false => self.give_up(false, out),
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, moment: Moment, out: &mut Vec<Step>) {
        match self.phase {
            Phase::Over => {}
            _ if self.deadline <= moment.now => self.give_up(true, out),
            Phase::Pausing(until) if until <= moment.now => self.draw_ballot(out),
            Phase::Asking { patience: Some(until), .. } if until <= moment.now => self.settle(out),
            _ => {}
        }
    }

    // ---- what follows -----------------------------------------------------------------------

    /// Under which ballot it waits for answers; zero: none.
    fn ballot(&self) -> Option<Timestamp> {
        match self.phase {
            Phase::Asking { version, .. } => Some(version.0),
            Phase::Proposing(proposal) | Phase::Accepting(proposal) => Some(proposal.version.0),
            Phase::Waiting | Phase::Drawing | Phase::Pausing(_) | Phase::Over => None,
        }
    }

    /// Homes of each group of which this holds, and how many there are.
    fn by_group(&self, holds: impl Fn(&Vote) -> bool) -> impl Iterator<Item = (usize, usize)> {
        self.sizes.iter().enumerate().map(move |(group, size)| {
            let of_group = self.places.iter().filter(|place| place.groups & 1 << group != 0);
            (of_group.filter(|place| holds(&place.vote)).count(), *size)
        })
    }

    /// Whether it holds of a majority of each group.
    fn have_majority(&self, holds: impl Fn(&Vote) -> bool) -> bool {
        self.by_group(holds).all(|(count, size)| count >= majority(size))
    }

    /// Whether it holds of so many of a group that the others are no majority.
    fn miss_majority(&self, holds: impl Fn(&Vote) -> bool) -> bool {
        self.by_group(holds).any(|(count, size)| count > size - majority(size))
    }

    /// Whether it supersedes what came late.
    fn is_new_enough(&self, shown: &Shown) -> bool {
        match self.goal {
            Goal::Mend(late) => shown.head.map_or(shown.purged, |head| head.stored.0) >= late,
            Goal::Read | Goal::Write(_) => true,
        }
    }

    /// Whether a majority of each group shows this record.
    fn is_chosen(&self, shown: &Shown, wall: WallMicros) -> bool {
        self.have_majority(|vote| matches!(vote, Vote::Said(other) if other.agrees(shown, wall)))
    }

    fn count(&self, is_counted: impl Fn(&Vote) -> bool) -> usize {
        self.places.iter().filter(|place| is_counted(&place.vote)).count()
    }

    /// Notes a vote; says whether it is news.
    fn note(&mut self, from: NodeId, vote: Vote) -> bool {
        let Some(place) = self.places.iter_mut().find(|place| place.node == from) else {
            return false;
        };
        let is_news = matches!(
            (place.vote, vote),
            (Vote::Silent, Vote::Said(_) | Vote::Refused | Vote::Accepted)
                | (Vote::Said(_), Vote::Refused | Vote::Accepted)
        );
        if is_news {
            place.vote = vote;
            let answered = self.count(|vote| matches!(vote, Vote::Said(_) | Vote::Refused));
            self.answered = self.answered.max(u8::try_from(answered).unwrap_or(u8::MAX));
        }
        is_news
    }

    fn ask(&mut self, version: Version, want: Want, out: &mut Vec<Step>) {
        self.phase = Phase::Asking { version, want, patience: None };
        for place in &mut self.places {
            place.vote = Vote::Silent;
            // What lies here is as easily had whole.
            let want = if place.node == self.me { Want::Full } else { want };
            out.push(Step::Ask { to: place.node, ballot: version.0, want });
        }
    }

    fn draw_ballot(&mut self, out: &mut Vec<Step>) {
        self.phase = Phase::Drawing;
        out.push(Step::Ballot);
    }

    /// Those that have answered, with what they show.
    fn shown(&self) -> impl Iterator<Item = (NodeId, Shown)> + '_ {
        self.places.iter().filter_map(|place| match place.vote {
            Vote::Said(shown) => Some((place.node, shown)),
            _ => None,
        })
    }

    /// Who shows the greatest record, and how many agree with it. Of equals this home, whose value
    /// needs no asking.
    fn greatest(&self, wall: WallMicros) -> Option<(NodeId, Shown, usize)> {
        let key = |(node, shown): &(NodeId, Shown)| {
            (shown.head.map(|head| head.stored), *node == self.me)
        };
        let (node, shown) = self.shown().max_by_key(key)?;
        let agreed = self.shown().filter(|(_, other)| other.agrees(&shown, wall)).count();
        Some((node, shown, agreed))
    }

    fn look(&mut self, moment: Moment, out: &mut Vec<Step>) {
        match self.phase {
            Phase::Asking { version, want, .. } if version.0 == Timestamp::ZERO => {
                self.look_at_answers(moment, want, out);
            }
            Phase::Asking { version, want, .. } => {
                self.look_at_promises(moment, version, want, out);
            }
            Phase::Accepting(proposal) => self.look_at_acceptance(moment, proposal, out),
            _ => {}
        }
    }

    /// A majority that holds the same record: that is chosen.
    fn look_at_answers(&mut self, moment: Moment, want: Want, out: &mut Vec<Step>) {
        let is_said = |vote: &Vote| matches!(vote, Vote::Said(_));
        if let Some((from, shown, agreed)) = self.greatest(moment.wall)
            && self.is_chosen(&shown, moment.wall)
            && self.is_new_enough(&shown)
        {
            let own = self.shown().find(|(node, _)| *node == self.me);
            let is_here = own.is_some_and(|(_, own)| own.agrees(&shown, moment.wall));
            if is_here || want == Want::Full {
                if !is_here && (own.is_some() || matches!(self.goal, Goal::Mend(_))) {
                    out.push(Step::Learn(from));
                }
                return self.end_as(from, agreed, out);
            }
        }
        let done = self.count(|vote| *vote == Vote::Failed) + self.count(is_said);
        if self.miss_majority(|vote| *vote == Vote::Failed) {
            self.give_up(false, out);
        } else if done == self.places.len() {
            self.settle(out);
        } else if self.have_majority(is_said)
            && let Phase::Asking { patience, .. } = &mut self.phase
        {
            patience.get_or_insert(moment.now.after_nanos(PATIENCE_NANOS));
        }
    }

    /// The answers differ, or the value is not here.
    fn settle(&mut self, out: &mut Vec<Step>) {
        if self.want_whole {
            return self.draw_ballot(out);
        }
        self.want_whole = true;
        self.phase = Phase::Waiting;
        out.push(Step::Line);
    }

    fn look_at_promises(
        &mut self,
        moment: Moment,
        version: Version,
        want: Want,
        out: &mut Vec<Step>,
    ) {
        let is_failed = |vote: &Vote| *vote == Vote::Failed;
        let is_lost = |vote: &Vote| matches!(vote, Vote::Failed | Vote::Refused);
        let is_said = |vote: &Vote| matches!(vote, Vote::Said(_));
        let own = self.places.iter().find(|place| place.node == self.me);
        match own.map(|place| place.vote) {
            Some(Vote::Said(_)) if self.have_majority(is_said) => {
                self.promised(moment, version, want, out);
            }
            Some(Vote::Refused) => self.retreat(moment, out),
            Some(Vote::Failed) | None => self.give_up(false, out),
            _ if self.miss_majority(is_failed) => self.give_up(false, out),
            _ if self.miss_majority(is_lost) => self.retreat(moment, out),
            _ => {}
        }
    }

    /// A majority, this home among it, has promised the ballot.
    fn promised(&mut self, moment: Moment, version: Version, want: Want, out: &mut Vec<Step>) {
        let Some((from, shown, agreed)) = self.greatest(moment.wall) else { return };
        let is_chosen = self.is_chosen(&shown, moment.wall) && self.is_new_enough(&shown);
        let answers = u8::try_from(agreed).unwrap_or(u8::MAX);
        let again = |then| (Step::ProposeSame(from), Proposal { version, then, is_own: false });
        let (step, proposal) = match (self.goal, self.sent) {
            (Goal::Read | Goal::Mend(_), _) if is_chosen => return self.end_as(from, agreed, out),
            (Goal::Mend(_), _) => again(Ended::Mended),
            (Goal::Read, _) => again(Ended::Read { from, answers }),
            (Goal::Write(_), Some(sent)) => {
                let is_made = shown.head.is_some_and(|head| head.version == sent);
                match (is_made, is_chosen) {
                    (true, false) => again(Ended::Written(sent, answers)),
                    (true, true) => return self.end(Ended::Written(sent, answers), out),
                    (false, _) => return self.end(Ended::MayBeApplied(0), out),
                }
            }
            (Goal::Write(expect), None) => {
                let live = shown.head.filter(|head| head.is_live(moment.wall));
                let found = live.map(|head| head.version);
                let holds = match expect {
                    Expect::Always => true,
                    Expect::Absent => found.is_none(),
                    Expect::Version(version) => found == Some(version),
                };
                let then = Ended::Written(version, 0);
                match (holds, is_chosen) {
                    (true, _) => (Step::ProposeOwn, Proposal { version, then, is_own: true }),
                    (false, true) => return self.end(Ended::ConditionFalse(found), out),
                    (false, false) if want == Want::Full => again(Ended::ConditionFalse(found)),
                    (false, false) => {
                        self.want_whole = true;
                        return self.draw_ballot(out);
                    }
                }
            }
        };
        self.phase = Phase::Proposing(proposal);
        out.push(step);
    }

    fn look_at_acceptance(&mut self, moment: Moment, proposal: Proposal, out: &mut Vec<Step>) {
        let acks = self.count(|vote| *vote == Vote::Accepted);
        let needed = if proposal.is_own { self.needed } else { 0 };
        let has_enough = self
            .by_group(|vote| *vote == Vote::Accepted)
            .all(|(count, size)| count >= needed.clamp(majority(size), size));
        if has_enough {
            let acks = u8::try_from(acks).unwrap_or(u8::MAX);
            return match proposal.then {
                Ended::Written(version, _) => self.end(Ended::Written(version, acks), out),
                then => self.end(then, out),
            };
        }
        if self.miss_majority(|vote| matches!(vote, Vote::Refused | Vote::Failed)) {
            if proposal.is_own {
                (self.sent, self.want_whole) = (Some(proposal.version), true);
                #[cfg(test)]
                if self.forgets {
                    self.sent = None;
                }
            }
            self.pause(moment);
        }
    }

    /// The ballot is not used, and another is tried after a while.
    fn retreat(&mut self, moment: Moment, out: &mut Vec<Step>) {
        out.push(Step::Void);
        self.pause(moment);
    }

    fn pause(&mut self, moment: Moment) {
        let most = (PAUSE_NANOS << self.conflicts.min(10)).min(PAUSE_NANOS_MAX);
        self.conflicts += 1;
        let nanos = self.chance.up_to(most);
        self.phase = Phase::Pausing(moment.now.after_nanos(nanos));
    }

    fn give_up(&mut self, is_late: bool, out: &mut Vec<Step>) {
        let is_out = matches!(self.phase, Phase::Accepting(Proposal { is_own: true, .. }));
        let acks = self.count(|vote| *vote == Vote::Accepted);
        let ended = match is_out || self.sent.is_some() {
            true => Ended::MayBeApplied(u8::try_from(acks).unwrap_or(u8::MAX)),
            false => Ended::NotStarted { answered: self.answered, is_late },
        };
        self.end(ended, out);
    }

    fn end_as(&mut self, from: NodeId, agreed: usize, out: &mut Vec<Step>) {
        let answers = u8::try_from(agreed).unwrap_or(u8::MAX);
        match self.goal {
            Goal::Mend(_) => self.end(Ended::Mended, out),
            Goal::Read | Goal::Write(_) => self.end(Ended::Read { from, answers }, out),
        }
    }

    fn end(&mut self, ended: Ended, out: &mut Vec<Step>) {
        self.phase = Phase::Over;
        out.push(Step::End(ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_engine::model::{Dot, OriginId};

    use crate::keys::Head;

    fn moment(now: u64) -> Moment {
        Moment { now: Instant(now), wall: WallMicros(1) }
    }

    fn shown(stamp: u64) -> Shown {
        let stored = (Timestamp(stamp), Dot { origin: OriginId(1), sequence: stamp });
        let head = Head { stored, version: stored, is_put: true, expiry_ms: 0 };
        Shown { purged: Timestamp::ZERO, head: Some(head) }
    }

    /// Seed 1234 of the stories of registers: a read that found the homes different asked again for
    /// the value, took a late head of its first question for an answer, and told "absent".
    #[test]
    fn a_late_head_does_not_answer_a_question_for_the_value() {
        let homes = [NodeId(1), NodeId(2), NodeId(3)];
        let mut op = KeyOp::new(NodeId(1), &[&homes], Goal::Read, 0, Instant(u64::MAX), 7);
        let mut out = Vec::new();
        op.begin(&mut out);
        let zero = Timestamp::ZERO;
        assert!(op.said(moment(0), NodeId(1), zero, (shown(5), true), &mut out));
        assert!(op.said(moment(0), NodeId(2), zero, (shown(9), false), &mut out));
        op.handle_timeout(moment(PATIENCE_NANOS), &mut out);
        assert_eq!(out.pop(), Some(Step::Line));
        op.turn_came(&mut out);
        out.clear();
        assert!(!op.said(moment(1), NodeId(3), zero, (shown(9), false), &mut out));
        assert!(op.said(moment(1), NodeId(2), zero, (shown(9), true), &mut out));
        assert_eq!(out, []);
        assert!(op.said(moment(1), NodeId(3), zero, (shown(9), true), &mut out));
        let read = Ended::Read { from: NodeId(3), answers: 2 };
        assert_eq!(out, [Step::End(read)]);
    }
}
