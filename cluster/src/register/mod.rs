//! Registers that are linearizable: what all members must agree on, one value a register.
//!
//! CASPaxos: D. Rystsov, "CASPaxos: Replicated State Machines without logs" (2018, arXiv
//! 1802.07000), which is the Synod protocol of Lamport's "Paxos Made Simple" (2001) without a log:
//! a value is replaced by a function of itself, and every replacement is a decree of its own.
//!
//! ```text
//! change f:  PREPARE b  -> acceptors: promise b, if none greater was promised or accepted
//!            a majority  <- (accepted ballot, state); the state of the greatest is the current
//!            ACCEPT b, f(current), and PREPARE of the next ballot with it
//!            a majority  <- accepted: the change is made, and the next needs one round trip
//! ```
//!
//! Invariant: if a majority has accepted a state with ballot `b`, every state accepted with a
//! greater ballot was made from it. Why: whoever proposes with `c > b` has heard from a majority,
//! so from an acceptor `A` of the majority of `b`. `A` accepted `b` before it promised `c` (after
//! it, it would have refused), so the greatest accepted ballot that the proposer saw is at least
//! `b`; by induction over the ballots between, its state was made from that of `b`. What this
//! needs, each of which a test takes away to see histories break (`tests.rs`):
//!
//! - an acceptor's promise and state are on its disk before its answer leaves;
//! - it refuses what is below its promise;
//! - two majorities meet;
//! - no ballot is used for two states: its proposer is a node *and* its start ([`ballot`]).
//!
//! One thing is not in the paper. A change whose ACCEPT was overtaken may yet survive at a minority
//! and be taken up by another proposer; whoever simply tried again would make it twice, or be told
//! that its own doing is in its way. So a state carries the ballots of the last changes that made
//! it ([`state`]): who tries again sees whether one of his attempts is among them. An attempt that
//! is not can no longer follow one that is, so a change happens once or not at all.
//!
//! [`acceptor`] is a function of one acceptor's durable state; [`proposer`] carries changes out;
//! [`mod@holders`] says who the acceptors are. Losing a majority of them stops changes, nothing else.

pub mod acceptor;
pub mod ballot;
pub mod holders;
pub mod proposer;
pub mod state;

#[cfg(test)]
pub(crate) mod tests;

pub use acceptor::{AcceptResult, Acceptor, PrepareResult, Vote};
pub use ballot::{Ballot, BallotSource};
pub use holders::{holders, majority};
pub use proposer::{Applied, Change, ChangeId, Outcome, Proposer, ProposerAction, ProposerOptions};
pub use state::State;

/// Names a register; the same to all members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct RegisterId(pub u32);

impl RegisterId {
    /// The catalogue of namespaces. Its version is the catalogue's generation.
    pub const NAMESPACES: RegisterId = RegisterId(1);
}
