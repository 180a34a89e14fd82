//! Ballots: the order in which proposals of a register overrule one another.
//!
//! Invariant: a ballot is used for one state only. The counter alone cannot promise that: a clock
//! may be set back between two starts of a node. So a proposer is a node and a *session*, a number
//! that is durable before it is used and never used again; and within a session counters grow.
//!
//! Counters are readings of the hybrid clock (`engine/src/model/timestamp.rs`), or one more than
//! the greatest seen: a proposer that has seen nothing yet is not refused for it by each acceptor.

use std::fmt;

use annulus_engine::model::{Timestamp, WallMicros};

use crate::member::NodeId;

/// See the module. Ordered by counter, then node, then session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ballot {
    /// A reading of the hybrid clock, or one more than the greatest counter seen.
    pub counter: u64,
    /// Whose ballot it is.
    pub node: NodeId,
    /// Which proposer of that node, in which of its starts.
    pub session: u64,
}

impl Ballot {
    /// Before every ballot that anybody proposes with.
    pub const ZERO: Ballot = Ballot { counter: 0, node: NodeId(0), session: 0 };
    /// Bytes of a ballot on the wire and on disk: counter, session, node.
    pub const SIZE: usize = 20;
}

impl fmt::Debug for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.counter, self.node, self.session)
    }
}

/// Gives out the ballots of one proposer.
#[derive(Clone, Debug)]
pub struct BallotSource {
    node: NodeId,
    session: u64,
    last: u64,
}

impl BallotSource {
    /// Ballots of a session of a node. `session` must be new to the node's whole life.
    #[must_use]
    pub fn new(node: NodeId, session: u64) -> BallotSource {
        BallotSource { node, session, last: 0 }
    }

    /// Whose ballots these are.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// A ballot above all that were given out or seen, and not below the clock.
    pub fn next(&mut self, wall: WallMicros) -> Ballot {
        self.last = (self.last + 1).max(Timestamp::new(wall, 0).0);
        self.ballot()
    }

    /// The ballot right after the last, without a look at the clock.
    pub fn following(&mut self) -> Ballot {
        self.last += 1;
        self.ballot()
    }

    /// Takes note of another's ballot.
    pub fn observe(&mut self, ballot: Ballot) {
        self.last = self.last.max(ballot.counter);
    }

    fn ballot(&self) -> Ballot {
        Ballot { counter: self.last, node: self.node, session: self.session }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ballots_grow_whatever_the_clock_does_and_pass_those_seen() {
        let mut source = BallotSource::new(NodeId(2), 7);
        let mut last = Ballot::ZERO;
        for wall in [5, 5, 3, 9, 0] {
            let ballot = source.next(WallMicros(wall));
            assert!(ballot > last && (ballot.node, ballot.session) == (NodeId(2), 7));
            last = source.following();
            assert!(last > ballot);
        }
        let other = Ballot { counter: u64::MAX >> 1, node: NodeId(9), session: 1 };
        source.observe(other);
        assert!(source.next(WallMicros(1)) > other);
    }
}
