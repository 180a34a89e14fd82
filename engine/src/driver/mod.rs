//! The production drivers: one raw io_uring ring a shard, hosted in a glommio executor.
//!
//! Invariant: a shard has one ring, made and used on its own thread. All file I/O and (through
//! `net`) all sockets go through it; glommio gives the thread its pinning, its background task
//! queue and its sleep. The pattern and its measurements are in the project's runtime notes.
//!
//! - [`ring`]: the ring, operations as futures. [`buffers`]: receive buffers lent to the kernel.
//! - [`signal`]: wakes a parked shard, from any thread. [`refusal`]: why the kernel said no.
//! - [`files`]: [`crate::disk::Disk`]. [`executor`]: [`crate::runtime::Runtime`].
//! - [`host`](mod@host): the loop that turns, spins, and parks.

pub mod buffers;
pub mod executor;
pub mod files;
pub mod host;
pub mod refusal;
pub mod ring;
pub mod signal;

pub use buffers::BufferRing;
pub use executor::{ShardRuntime, ThreadOptions, start_shard};
pub use files::RingDisk;
pub use host::{HostOptions, Turn, drive, host};
pub use ring::{Completion, NETWORK, Ring, RingConfig};
pub use signal::RingWaker;

#[cfg(test)]
mod tests;
