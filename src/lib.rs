//! The annulus server as a library: configuration, the pump of one shard, metrics.
//!
//! `tests` uses it to run a shard's production code without sockets.

pub mod admin;
pub mod cli;
pub mod cluster_key;
pub mod commands;
pub mod config;
pub mod inspect;
pub mod member_commands;
pub mod members;
pub mod metrics;
pub mod namespaces;
pub mod pump;
pub mod registers;
#[cfg(feature = "uring")]
pub mod serve;
pub mod units;
