//! One shard's records: commit log, memtable, SSTables, compaction, cache.
//!
//! The engine knows records and files. It never knows nodes, sockets, requests, or quorums.
//! Everything outside comes through two seams: [`disk::Disk`] and [`runtime::Runtime`], each
//! with a production driver (`driver/`, feature `uring`) and a simulated twin (`sim/`).
//! Start reading at `shard.rs`.

pub mod buffer;
pub mod cache;
pub mod checksum;
pub mod compaction;
pub mod disk;
#[cfg(feature = "uring")]
pub mod driver;
pub mod error;
pub mod identity;
pub mod log;
pub mod memtable;
pub mod model;
pub mod options;
pub mod recover;
pub mod runtime;
pub mod shard;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod sstable;
pub mod tables;

pub use error::{Error, Result};
