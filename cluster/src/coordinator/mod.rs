//! The coordinator of reads and writes over the replicas of a key.

pub mod quorum;
