//! The `Runtime` seam: time and tasks of one shard.
//!
//! Production: `driver/executor.rs` (a glommio executor). Simulation: `sim/executor.rs`.
//! Everything here belongs to one thread; nothing is `Send`.

use std::future::Future;

use crate::model::{Instant, WallMicros};

/// How urgent a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A client waits for it: the log writer, point reads.
    Foreground,
    /// Flush, compaction, scrub: few shares, paced.
    Background,
}

/// Time and tasks of one shard.
pub trait Runtime: Clone + 'static {
    /// The monotonic clock. Costs about 25 ns in production: read it once a turn.
    fn now(&self) -> Instant;
    /// The wall clock. May jump.
    fn wall(&self) -> WallMicros;
    /// Waits until the monotonic clock has reached `deadline`.
    fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()> + 'static;
    /// Lets other tasks of the shard run.
    fn yield_now(&self) -> impl Future<Output = ()> + 'static;
    /// Starts a task on this shard. It must end by itself when its owner asks.
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static);
    /// A seed for whatever needs chance; the same in each run of one simulation.
    fn seed(&self) -> u64;
}
