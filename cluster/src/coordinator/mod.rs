//! The coordinator of reads and writes over the replicas of a key.
//!
//! Invariant: pure state machines; servers, answers and times are arguments. [`quorum`] says how
//! many must answer, [`write`](mod@write) and [`read`] carry one operation each, [`health`] knows
//! how each server answers.

pub mod health;
pub mod inline;
pub mod quorum;
pub mod read;
pub mod write;
