//! One read at the replicas: whom it asked for what, what they said, and what that comes to.
//!
//! Stands between the client's get and the replicas' answers. One replica is asked for the key's
//! whole state, the others for its digest; where a digest differs its state is fetched as well,
//! and all states are merged. Invariants: a read is answered once; *done* only when as many
//! different servers as were asked for hold nothing that the answer has not got; a replica that
//! refused, cannot be reached or does not know (its range is damaged) counts as no answer, and
//! never as one that says *absent*.
//!
//! ```text
//! ReadOp::begin -> Full from the best, Digest from as many more as needed
//!   answers, failures, hedge -> advance -> more to ask, or the verdict
//! ```
//!
//! `as_of` is the greatest that a home replica gave whose whole data is in the answer. It covers
//! every write with PW of 1 or more; where PW may be 0 the caller lowers it to the hint floor.

use annulus_engine::model::causality::{InvalidState, KeyState, Merged, merge_records};
use annulus_engine::model::{Dot, Kind, Record, RecordRef, Timestamp};

use super::inline::Inline;
use super::quorum::Requirement;
use super::write::PLACES_MAX;
use crate::member::NodeId;
use crate::message::Want;

/// The digest of what a replica has under a key: equal for states with the same values. Zero is
/// kept for *nothing*.
///
/// What each value is follows from its dot. What a state says it has seen beyond its values is
/// left out, because it differs among replicas that have the same values.
///
/// # Errors
/// [`InvalidState`] if the value of a `Siblings` record is no key state.
pub fn digest(record: &RecordRef<'_>) -> Result<u64, InvalidState> {
    let start = 0x9e37_79b9_7f4a_7c15;
    let sum = match record.kind {
        Kind::Put | Kind::Delete => mix_version(start, record.timestamp, record.dot),
        Kind::Siblings => KeyState::of_record(record)?
            .siblings()
            .iter()
            .fold(start, |sum, sibling| mix_version(sum, sibling.timestamp, sibling.dot)),
    };
    Ok(sum.max(1))
}

fn mix_version(sum: u64, timestamp: Timestamp, dot: Dot) -> u64 {
    mix(mix(mix(sum, timestamp.0), u64::from(dot.origin.0)), dot.sequence)
}

/// Finalizer of splitmix64 (Steele, Lea and Flood, 2014), over both.
fn mix(sum: u64, word: u64) -> u64 {
    let mut z = sum.rotate_left(25) ^ word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The digest of a state that is to be merged with another.
fn digest_beside(merged: Option<&Record>, record: &RecordRef<'_>) -> Result<u64, InvalidState> {
    if merged.is_some_and(|merged| merged.as_ref().cmp_by_key(record).is_ne()) {
        return Err(InvalidState("it is of another key"));
    }
    digest(record)
}

/// What is known of one server's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// Not asked.
    Spare,
    /// Asked for the digest.
    Digesting,
    /// Its digest is known.
    Digested,
    /// Asked for the state.
    Reading,
    /// Its digest is known, and it has been asked for the state as well.
    Fetching,
    /// Its state is merged in.
    Full,
    /// It refused, or cannot be reached.
    Failed,
    /// Its range is damaged: it does not know.
    Unknown,
}

impl State {
    fn is_outstanding(self) -> bool {
        matches!(self, State::Digesting | State::Reading | State::Fetching)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    digest: u64,
    as_of: Timestamp,
    node: NodeId,
    /// Microseconds after the operation began.
    sent_us: u32,
    is_primary: bool,
    state: State,
}

/// How fresh an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Freshness {
    /// Every write at or below it must be in the answer.
    pub at_least: Timestamp,
    /// When nobody is as fresh: answer with the freshest rather than refuse.
    pub stale_ok: bool,
}

/// What an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ReadFacts {
    /// Every write at or below it is in the answer; zero when unknown.
    pub as_of: Timestamp,
    /// Servers whose data is in the answer.
    pub answers: u8,
    /// Of them, home replicas.
    pub primaries: u8,
}

/// How a read ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The merged state is the answer.
    Done(ReadFacts),
    /// Enough answered, but nobody is as fresh as was asked for.
    Stale(ReadFacts),
    /// Too few can answer.
    Unavailable,
    /// No home replica knows: all of them are damaged there.
    Corrupt,
    /// Its time is over.
    Expired,
}

/// Servers to ask now, and for what.
pub type Asks = Inline<(NodeId, Want), PLACES_MAX>;

/// No servers to ask.
#[must_use]
pub fn no_asks() -> Asks {
    Inline::new((NodeId(0), Want::Digest))
}

/// See the module. Owns at most one state: what has been merged so far.
#[derive(Clone, Debug)]
pub struct ReadOp {
    requirement: Requirement,
    me: NodeId,
    freshness: Option<Freshness>,
    is_answered: bool,
    /// In the order in which they are asked: home replicas, then those that may stand in.
    places: Inline<Place, PLACES_MAX>,
    merged: Option<Record>,
    merged_digest: u64,
}

impl ReadOp {
    /// A read that nobody has been asked for yet: call [`ReadOp::advance`].
    ///
    /// `primaries` are the key's home replicas in the order in which to ask them, this server
    /// first if it is one; `fallbacks` may stand in for them if the requirement is sloppy.
    #[must_use]
    pub fn begin(
        requirement: Requirement,
        me: NodeId,
        primaries: &[NodeId],
        fallbacks: &[NodeId],
        freshness: Option<Freshness>,
    ) -> ReadOp {
        let place = |node, is_primary| Place {
            digest: 0,
            as_of: Timestamp::ZERO,
            node,
            sent_us: 0,
            is_primary,
            state: State::Spare,
        };
        let mut places = Inline::new(place(me, false));
        for node in primaries {
            places.push(place(*node, true));
        }
        for node in fallbacks.iter().filter(|_| requirement.sloppy) {
            if !places.iter().any(|place| place.node == *node) {
                places.push(place(*node, false));
            }
        }
        ReadOp {
            requirement,
            me,
            freshness,
            is_answered: false,
            places,
            merged: None,
            merged_digest: 0,
        }
    }

    // ---- events -----------------------------------------------------------------------------

    /// A server gave its state; `None` is *nothing*, from one that knows. The caller has checked
    /// that it is of this key. Copies the value only if it is merged in.
    ///
    /// # Errors
    /// [`InvalidState`] when it is none; the server then counts as failed.
    pub fn full(
        &mut self,
        node: NodeId,
        as_of: Timestamp,
        is_primary: bool,
        record: Option<&RecordRef<'_>>,
    ) -> Result<(), InvalidState> {
        let is_answered = self.is_answered;
        let merged = self.merged.as_ref();
        let place = self.places.iter_mut().find(|place| place.node == node);
        let Some(place) = place else { return Ok(()) };
        if matches!(place.state, State::Spare | State::Full) {
            return Ok(());
        }
        let digest = match record.map_or(Ok(0), |record| digest_beside(merged, record)) {
            Ok(digest) => digest,
            Err(invalid) => {
                place.state = State::Failed;
                return Err(invalid);
            }
        };
        place.state = State::Full;
        place.is_primary &= is_primary;
        (place.digest, place.as_of) = (digest, as_of);
        if let Some(record) = record
            && !is_answered
        {
            self.merge(record, digest);
        }
        Ok(())
    }

    /// A server gave its digest; 0 is *nothing*, from one that knows.
    pub fn digest(&mut self, node: NodeId, as_of: Timestamp, is_primary: bool, digest: u64) {
        let Some(place) = self.place(node) else { return };
        match place.state {
            // Given up before, and here after all.
            State::Digesting | State::Failed | State::Unknown => {
                place.state = State::Digested;
                place.is_primary &= is_primary;
                (place.digest, place.as_of) = (digest, as_of);
            }
            // A message that came twice, or late.
            _ => {}
        }
    }

    /// A server refused, or cannot be reached.
    pub fn failed(&mut self, node: NodeId) {
        self.set_out(node, State::Failed);
    }

    /// The key's range is damaged at a server.
    pub fn unknown(&mut self, node: NodeId) {
        self.set_out(node, State::Unknown);
    }

    fn set_out(&mut self, node: NodeId, state: State) {
        if let Some(place) = self.place(node)
            && place.state.is_outstanding()
        {
            place.state = state;
        }
    }

    /// An answer is late: asks one more server, if there is one.
    pub fn hedge(&mut self, now_us: u32, is_healthy: impl Fn(NodeId) -> bool, asks: &mut Asks) {
        if !self.is_answered {
            let has_state = self.places.iter().any(|place| place.state == State::Full);
            let want = if has_state { Want::Digest } else { Want::Full };
            self.ask_one_more(false, want, now_us, &is_healthy, asks);
        }
    }

    /// Its time is over.
    pub fn deadline(&mut self) -> Option<Verdict> {
        if self.is_answered {
            return None;
        }
        self.is_answered = true;
        let tally = self.tally();
        let is_enough = self.requirement.may_be_met(tally.facts.answers, tally.facts.primaries);
        let stale_ok = self.freshness.is_some_and(|freshness| freshness.stale_ok);
        Some(if is_enough && stale_ok { Verdict::Done(tally.facts) } else { Verdict::Expired })
    }

    /// Waits for nobody any more.
    pub fn give_up(&mut self) {
        debug_assert!(self.is_answered, "first comes the deadline");
        for place in self.places.iter_mut().filter(|place| place.state.is_outstanding()) {
            place.state = State::Failed;
        }
    }

    /// What follows from all that happened so far: the verdict, once, or `asks` to send out.
    pub fn advance(
        &mut self,
        now_us: u32,
        is_healthy: impl Fn(NodeId) -> bool,
        asks: &mut Asks,
    ) -> Option<Verdict> {
        if self.is_answered {
            return None;
        }
        loop {
            let tally = self.tally();
            let need = &self.requirement;
            let (facts, hoped) = (tally.facts, tally.hoped);
            let is_enough = need.may_be_met(facts.answers, facts.primaries);
            let (only_primaries, verdict) = if is_enough {
                let Freshness { at_least, stale_ok } = self
                    .freshness
                    .unwrap_or(Freshness { at_least: Timestamp::ZERO, stale_ok: true });
                if facts.as_of >= at_least {
                    return Some(self.answer(Verdict::Done(facts)));
                }
                if hoped.primaries > facts.primaries {
                    break;
                }
                // R is raised by one more home replica, which may be fresher.
                (true, if stale_ok { Verdict::Done(facts) } else { Verdict::Stale(facts) })
            } else if need.may_be_met(hoped.answers, hoped.primaries) {
                break;
            } else {
                let verdict = match tally.damaged >= need.n {
                    true => Verdict::Corrupt,
                    false => Verdict::Unavailable,
                };
                (hoped.primaries < need.primary, verdict)
            };
            let want = if tally.has_state { Want::Digest } else { Want::Full };
            if !self.ask_one_more(only_primaries, want, now_us, &is_healthy, asks) {
                return Some(self.answer(verdict));
            }
        }
        self.fetch_what_differs(now_us, asks);
        None
    }

    // ---- what it has come to ----------------------------------------------------------------

    /// The merged state; `None` while nothing was found.
    #[must_use]
    pub fn merged(&self) -> Option<&Record> {
        self.merged.as_ref()
    }

    /// Takes the merged state out, once answered.
    pub fn take_merged(&mut self) -> Option<Record> {
        debug_assert!(self.is_answered, "states that arrive later are not merged");
        self.merged.take()
    }

    /// The home replicas known to lack something of the merged state.
    pub fn stale(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.places
            .iter()
            .filter(|place| place.is_primary && self.is_covered(place))
            .filter(|place| place.digest != self.merged_digest)
            .map(|place| place.node)
    }

    /// The servers that have been asked and have not answered.
    pub fn outstanding(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.places.iter().filter(|place| place.state.is_outstanding()).map(|place| place.node)
    }

    /// When this server was asked, in microseconds after the beginning, if it has not answered.
    #[must_use]
    pub fn outstanding_since(&self, node: NodeId) -> Option<u32> {
        let place = self.places.iter().find(|place| place.node == node)?;
        place.state.is_outstanding().then_some(place.sent_us)
    }

    /// Whether there is a server that has not been asked.
    #[must_use]
    pub fn has_spare(&self) -> bool {
        self.places.iter().any(|place| place.state == State::Spare)
    }

    /// Whether it has been answered.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.is_answered
    }

    // ---- inside -----------------------------------------------------------------------------

    fn answer(&mut self, verdict: Verdict) -> Verdict {
        self.is_answered = true;
        verdict
    }

    fn place(&mut self, node: NodeId) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| place.node == node)
    }

    fn merge(&mut self, record: &RecordRef<'_>, digest: u64) {
        // Each server counts incarnations for itself; among servers they mean nothing.
        let record = &RecordRef { incarnation: 0, ..*record };
        let Some(merged) = &self.merged else {
            (self.merged, self.merged_digest) = (Some(record.to_owned()), digest);
            return;
        };
        match merge_records(&merged.as_ref(), record) {
            Merged::First => {}
            Merged::Second => {
                (self.merged, self.merged_digest) = (Some(record.to_owned()), digest);
            }
            Merged::New(both) => {
                // What two readable states give is readable.
                self.merged_digest = self::digest(&both.as_ref()).unwrap_or(0);
                self.merged = Some(both);
            }
        }
    }

    /// Whether all that a server has is in the merged state.
    fn is_covered(&self, place: &Place) -> bool {
        let has_same = |other: &Place| other.state == State::Full && other.digest == place.digest;
        match place.state {
            State::Full => true,
            State::Digested => {
                place.digest == 0
                    || place.digest == self.merged_digest
                    || self.places.iter().any(has_same)
            }
            _ => false,
        }
    }

    fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for place in self.places.iter() {
            let primary = u8::from(place.is_primary);
            let is_covered = self.is_covered(place);
            if is_covered {
                tally.facts.answers += 1;
                tally.facts.primaries += primary;
            }
            if is_covered && place.is_primary {
                tally.facts.as_of = tally.facts.as_of.max(place.as_of);
            }
            if is_covered || place.state.is_outstanding() || place.state == State::Digested {
                tally.hoped.answers += 1;
                tally.hoped.primaries += primary;
            }
            let has_state = matches!(place.state, State::Reading | State::Fetching | State::Full);
            tally.has_state |= has_state;
            tally.damaged += u8::from(place.state == State::Unknown) * primary;
        }
        tally
    }

    /// Asks the next server that is well. Says whether there was one.
    fn ask_one_more(
        &mut self,
        only_primaries: bool,
        want: Want,
        now_us: u32,
        is_healthy: &impl Fn(NodeId) -> bool,
        asks: &mut Asks,
    ) -> bool {
        let me = self.me;
        let next = self.places.iter_mut().find(|place| {
            let fits = place.is_primary || !only_primaries;
            place.state == State::Spare && fits && (place.node == me || is_healthy(place.node))
        });
        let Some(place) = next else { return false };
        // What lies here is as easily had whole.
        let want = if place.node == me { Want::Full } else { want };
        place.state = if want == Want::Full { State::Reading } else { State::Digesting };
        place.sent_us = now_us;
        asks.push((place.node, want))
    }

    /// Asks for the states behind digests that differ: one server for each such digest. While the
    /// first state is on its way nothing is known to differ.
    fn fetch_what_differs(&mut self, now_us: u32, asks: &mut Asks) {
        let any = |state| self.places.iter().any(|place| place.state == state);
        if any(State::Reading) && !any(State::Full) {
            return;
        }
        for at in 0..self.places.len() {
            let place = self.places[at];
            let is_fetched =
                |other: &Place| other.state == State::Fetching && other.digest == place.digest;
            let differs = place.state == State::Digested && !self.is_covered(&place);
            if differs && !self.places.iter().any(is_fetched) {
                self.places[at].state = State::Fetching;
                self.places[at].sent_us = now_us;
                asks.push((place.node, Want::Full));
            }
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Whose data is in the merged state.
    facts: ReadFacts,
    /// The same, when all that are asked answer.
    hoped: ReadFacts,
    /// Whether somebody was asked for the state and has not failed.
    has_state: bool,
    /// Home replicas whose range is damaged.
    damaged: u8,
}

#[cfg(test)]
mod tests;
