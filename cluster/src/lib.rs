//! Who holds what: the nouns of a cluster, and the ring that places partitions on servers.
//!
//! Invariant: pure. Nothing here reads a clock, draws chance, or does I/O, so every member that
//! knows the same facts computes the same placement. The guarantees are in `cluster/README.md`.
//!
//! [`member`] has who there is; [`ring`] has who holds which partition; [`topology`] has both as
//! one node sees them; [`message`] has what shards of different nodes say to each other;
//! [`repair`] checks that those who have seen the same writes hold the same records, and
//! [`tracking`] knows who has seen which; [`coordinator`] carries reads and writes over the
//! replicas of a key, and [`membership`] knows who is there. [`register`] is what all members must
//! agree on, one value a register; [`moves`] is the greater part of that value: members that change
//! and partitions that move. [`keys`] makes registers of the keys of a namespace. [`room`] bounds
//! what a node keeps for others.

#![forbid(unsafe_code)]

mod chance;
pub mod coordinator;
pub mod keys;
pub mod member;
pub mod membership;
pub mod message;
pub mod moves;
pub mod register;
pub mod repair;
pub mod ring;
pub mod room;
pub mod topology;
pub mod tracking;

pub use member::{Member, NodeId, Weight};
pub use ring::{Ring, RingError, VirtualNode};
pub use topology::{NodeInfo, Topology};
