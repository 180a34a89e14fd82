//! The world of the tests: reference models, seeded workloads, mishaps. Nothing depends on it.
//!
//! Invariant: whatever a test does follows from a seed, which it prints when it fails. Read
//! `model.rs` first: it says what right answers are, in the plainest code that can say it.

pub mod calls;
pub mod checker;
pub mod cluster;
pub mod cluster_story;
pub mod concurrent_story;
pub mod engine_story;
pub mod faults;
pub mod history;
pub mod log_story;
pub mod model;
pub mod network;
pub mod nodes;
pub mod raw;
pub mod reading;
pub mod server;
pub mod store;
pub mod troubles;
pub mod workload;
