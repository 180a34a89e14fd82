//! Checks that replicas which have seen the same writes hold the same records, and repairs them.
//!
//! Catching up is not done here: a replica that has missed writes knows it from its seen-set. What
//! is left are faults: a lost write, a rotten block, a bug. They show as trees that differ where
//! the seen-sets are equal. Invariant: replicas of equal history are never reported as different,
//! whatever is written, purged, lost or delayed meanwhile.
//!
//! [`sum`] has what a record adds to its leaf, [`merkle`] the tree of a partition, [`reading`]
//! what a scan of a few tokens tells about it, [`compare`] one step of a comparison, [`session`]
//! the rounds of a shard against the other replicas, [`scrub`] which data is read next to prove
//! that the tree is the data's, [`status`] what all this has found.

pub mod compare;
mod events;
pub mod merkle;
pub mod reading;
mod reads;
pub mod scrub;
pub mod session;
pub mod status;
pub mod sum;
mod walk;

pub use events::{Local, Moment, Output, RepairOptions, Suspicion, TreeAsked};
pub use merkle::{MerkleTree, Node, Unclear};
pub use reading::{Detail, Finished, Reading};
pub use reads::{Purpose, ReadId};
pub use scrub::{ScrubOptions, ScrubPosition, Scrubber};
pub use session::Repairer;
pub use status::{LastRound, Outcome, RepairStatus};
pub use sum::{HashSeed, Hour, Sum};
