//! The acceptor: what one holder of a register has promised and accepted.
//!
//! Invariant: a vote says what must be on disk before its answer may leave, so an acceptor is never
//! more than its disk: the caller keeps the old acceptor until the new one is durable, and a vote
//! whose write failed is dropped unanswered. Refusals need no disk. Both kinds of request may be
//! lost, doubled and late: the same request gets the same answer again, or a refusal.

use annulus_engine::model::{Timestamp, WallMicros};

use super::ballot::Ballot;
use super::state::State;

/// How far ahead of this node's clock, and of all it has promised, a ballot may be, in
/// microseconds. More is no clock: it would leave nobody a ballot above it.
const AHEAD_MAX_US: u64 = 24 * 3_600_000_000;

/// One holder's part of a register, as it is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acceptor {
    /// Nothing below it is accepted any more, nothing up to it promised.
    pub promised: Ballot,
    /// With which ballot `state` came; zero: it is what the node had before anything was accepted.
    pub accepted: Ballot,
    /// The state.
    pub state: State,
}

/// What an acceptor answers to PREPARE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrepareResult {
    /// Promised; this is what was accepted last.
    Promised(Ballot, State),
    /// Refused: this was promised or accepted.
    Conflict(Ballot),
}

/// What an acceptor answers to ACCEPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceptResult {
    /// Accepted, and the next ballot promised if one was asked for.
    Accepted,
    /// Refused: this was promised or accepted.
    Conflict(Ballot),
}

/// An answer, and what it rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vote<A> {
    /// What to say.
    pub answer: A,
    /// What must be durable before it is said; `None`: what is durable already.
    pub durable_first: Option<Acceptor>,
}

impl<A> Vote<A> {
    fn at_once(answer: A) -> Vote<A> {
        Vote { answer, durable_first: None }
    }
}

impl Acceptor {
    /// One that has promised and accepted nothing; `state` is what the register begins with here.
    #[must_use]
    pub fn new(state: State) -> Acceptor {
        Acceptor { promised: Ballot::ZERO, accepted: Ballot::ZERO, state }
    }

    /// PREPARE: will nothing below this ballot be accepted, and what was accepted so far?
    #[must_use]
    pub fn handle_prepare(&self, wall: WallMicros, ballot: Ballot) -> Vote<PrepareResult> {
        let seen = self.promised.max(self.accepted);
        let promise = || PrepareResult::Promised(self.accepted, self.state.clone());
        if ballot == self.promised && ballot > self.accepted {
            // Asked again: what was answered has not changed, or `accepted` would have.
            return Vote::at_once(promise());
        }
        if ballot <= seen || !self.is_plausible(wall, ballot) {
            return Vote::at_once(PrepareResult::Conflict(seen));
        }
        let promised = Acceptor { promised: ballot, ..self.clone() };
        Vote { answer: promise(), durable_first: Some(promised) }
    }

    /// ACCEPT: take this state, and promise `next` too, unless it is zero.
    #[must_use]
    pub fn handle_accept(
        &self,
        wall: WallMicros,
        ballot: Ballot,
        next: Ballot,
        state: &State,
    ) -> Vote<AcceptResult> {
        let seen = self.promised.max(self.accepted);
        if ballot == self.accepted && ballot > Ballot::ZERO {
            // Asked again: a ballot has one state, and this is it.
            return Vote::at_once(AcceptResult::Accepted);
        }
        if ballot < seen || ballot == Ballot::ZERO || !self.is_plausible(wall, ballot.max(next)) {
            return Vote::at_once(AcceptResult::Conflict(seen));
        }
        let accepted =
            Acceptor { promised: ballot.max(next), accepted: ballot, state: state.clone() };
        Vote { answer: AcceptResult::Accepted, durable_first: Some(accepted) }
    }

    fn is_plausible(&self, wall: WallMicros, ballot: Ballot) -> bool {
        let latest = Timestamp::new(WallMicros(wall.0.saturating_add(AHEAD_MAX_US)), 0).0;
        ballot.counter <= latest.max(self.promised.counter.saturating_add(1 << 20))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::NodeId;

    const WALL: WallMicros = WallMicros(0);

    fn ballot(counter: u64, node: u32) -> Ballot {
        Ballot { counter, node: NodeId(node), session: 1 }
    }

    fn state(number: u8) -> State {
        State { value: vec![number], ..State::default() }
    }

    #[derive(Clone, Copy, Debug)]
    enum Request {
        Prepare(Ballot),
        Accept(Ballot, Ballot),
    }

    /// What an acceptor has said, by which it can be held to its word.
    #[derive(Clone, Default)]
    struct Said {
        promised: Vec<(Ballot, Ballot)>,
        accepted: Vec<Ballot>,
    }

    impl Said {
        fn note(&mut self, acceptor: &mut Acceptor, request: Request) {
            let (promised, accepted) = (acceptor.promised, acceptor.accepted);
            let durable_first = match request {
                Request::Prepare(ballot) => {
                    let vote = acceptor.handle_prepare(WALL, ballot);
                    if let PrepareResult::Promised(base, _) = vote.answer {
                        // The same promise twice says the same.
                        assert!(self.promised.iter().all(|(b, a)| *b != ballot || *a == base));
                        assert!(base < ballot);
                        self.promised.push((ballot, base));
                    }
                    vote.durable_first
                }
                Request::Accept(ballot, next) => {
                    let number = u8::try_from(ballot.counter).unwrap();
                    let vote = acceptor.handle_accept(WALL, ballot, next, &state(number));
                    if vote.answer == AcceptResult::Accepted && !self.accepted.contains(&ballot) {
                        // Nothing is accepted between a promise and what it told of.
                        let is_kept =
                            |(to, base): &(Ballot, Ballot)| ballot >= *to || ballot <= *base;
                        assert!(self.promised.iter().all(is_kept), "{ballot:?}");
                        self.accepted.push(ballot);
                        if next > ballot {
                            self.promised.push((next, ballot));
                        }
                    }
                    vote.durable_first
                }
            };
            if let Some(durable) = durable_first {
                *acceptor = durable;
            }
            assert!(acceptor.promised >= promised && acceptor.accepted >= accepted);
            assert!(acceptor.promised >= acceptor.accepted);
        }
    }

    fn explore(depth: u32, requests: &[Request], acceptor: &Acceptor, said: &Said) -> u64 {
        if depth == 0 {
            return 1;
        }
        let mut paths = 0;
        for request in requests {
            let (mut acceptor, mut said) = (acceptor.clone(), said.clone());
            said.note(&mut acceptor, *request);
            paths += explore(depth - 1, requests, &acceptor, &said);
        }
        paths
    }

    #[test]
    fn every_order_of_requests_leaves_an_acceptor_true_to_its_word() {
        let ballots = [ballot(1, 1), ballot(1, 2), ballot(2, 1), ballot(3, 2)];
        let mut requests: Vec<Request> = ballots.iter().copied().map(Request::Prepare).collect();
        requests.extend(ballots.iter().map(|ballot| Request::Accept(*ballot, Ballot::ZERO)));
        requests.push(Request::Accept(ballot(1, 1), ballot(2, 1)));
        requests.push(Request::Accept(ballot(2, 2), ballot(3, 1)));
        let fresh = Acceptor::new(State::default());
        assert_eq!(explore(5, &requests, &fresh, &Said::default()), 100_000);
    }

    #[test]
    fn a_ballot_from_beyond_any_clock_is_refused() {
        let acceptor = Acceptor::new(state(0));
        let day = Timestamp::new(WallMicros(AHEAD_MAX_US), 0).0;
        let refused = acceptor.handle_prepare(WALL, ballot(day + 1, 1));
        assert_eq!(refused.answer, PrepareResult::Conflict(Ballot::ZERO));
        let vote = acceptor.handle_prepare(WALL, ballot(day, 1));
        let acceptor = vote.durable_first.unwrap();
        // Whoever has promised so much can be overruled by the next.
        assert!(acceptor.handle_prepare(WALL, ballot(day + 1, 1)).durable_first.is_some());
        let far = acceptor.handle_accept(WALL, ballot(day, 1), ballot(2 * day, 1), &state(1));
        assert_eq!(far.answer, AcceptResult::Conflict(ballot(day, 1)));
    }
}
