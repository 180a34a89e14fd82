//! When the shard's log is poisoned: reads go on, and the shard is opened anew beside them.
//!
//! A failed write or sync ends the life of the log. Whoever waited was told that the write may be
//! applied, later writes are refused as not started. Here the shard gets its second life: at
//! once the first time, then after longer and longer pauses while the disk goes on failing.
//!
//! Invariant: at most one attempt is under way, and the pump changes over between two requests;
//! tasks that began on the old shard end on it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use annulus_engine::Result;
use annulus_engine::disk::Disk;
use annulus_engine::model::Instant;
use annulus_engine::runtime::{Class, Runtime};
use annulus_engine::shard::Shard;
use futures_channel::oneshot;

use super::{Pump, Wires};

/// Pause after the first failure, in nanoseconds; doubled with each further one.
const PAUSE_NANOS: u64 = 100_000_000;
/// Longest pause, in nanoseconds.
const PAUSE_NANOS_MAX: u64 = 10_000_000_000;
/// A shard that lived so long starts without a pause when it fails again.
const HEALTHY_NANOS: u64 = 30_000_000_000;

type Attempt<D, R> = oneshot::Receiver<Result<Shard<D, R>>>;

/// How far the second life is.
enum Stage<D: Disk, R: Runtime> {
    /// The shard is well, or nobody has seen yet that it is not.
    Well,
    /// The next attempt is made then.
    Pause(Instant),
    /// An attempt is under way.
    Opening(Attempt<D, R>),
}

/// The state of the shard's second life.
pub(super) struct Revival<D: Disk, R: Runtime> {
    stage: Stage<D, R>,
    /// Attempts since the shard was last well for long.
    attempts: u32,
    /// When the shard last came back.
    since: Option<Instant>,
}

impl<D: Disk, R: Runtime> Default for Revival<D, R> {
    fn default() -> Revival<D, R> {
        Revival { stage: Stage::Well, attempts: 0, since: None }
    }
}

impl<D: Disk, R: Runtime> Revival<D, R> {
    /// When the pump must come round for it.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        match self.stage {
            Stage::Pause(until) => Some(until),
            // A finished attempt wakes the pump.
            Stage::Well | Stage::Opening(_) => None,
        }
    }

    fn pause(&self) -> u64 {
        match self.attempts {
            0 => 0,
            failures => (PAUSE_NANOS << (failures - 1).min(10)).min(PAUSE_NANOS_MAX),
        }
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Takes the next step towards a shard that writes. To be called while the log is poisoned.
    #[cold]
    pub(super) fn revive(&mut self, wires: &mut dyn Wires) -> bool {
        match &mut self.revival.stage {
            Stage::Well => {
                let since = self.revival.since.take();
                if since.is_none_or(|since| self.now.nanos_since(since) >= HEALTHY_NANOS) {
                    self.revival.attempts = 0;
                }
                self.revival.stage = Stage::Pause(self.now.after_nanos(self.revival.pause()));
                let what = self.shard.poisoned().map_or(String::new(), |error| error.to_string());
                tracing::error!(
                    shard = self.map.own(),
                    %what,
                    "writes are refused until the shard was opened anew; reads go on"
                );
                true
            }
            Stage::Pause(until) if *until > self.now => false,
            Stage::Pause(_) => {
                let (tell, attempt) = oneshot::channel();
                let shard = self.shard.clone();
                self.runtime.spawn(Class::Background, async move {
                    let opened = shard.reopen().await;
                    drop(shard);
                    // Nobody listens when the node has stopped; then the shard ends here.
                    let _ = tell.send(opened);
                });
                self.revival.attempts += 1;
                self.revival.stage = Stage::Opening(attempt);
                true
            }
            Stage::Opening(attempt) => {
                let mut context = Context::from_waker(&self.waker);
                let Poll::Ready(told) = Pin::new(attempt).poll(&mut context) else { return false };
                match told {
                    Ok(Ok(shard)) => self.change_over(shard, wires),
                    Ok(Err(error)) => self.note_failed_attempt(&error.to_string()),
                    Err(oneshot::Canceled) => self.note_failed_attempt("the attempt was dropped"),
                }
                true
            }
        }
    }

    fn note_failed_attempt(&mut self, error: &str) {
        let pause = self.revival.pause();
        tracing::error!(
            shard = self.map.own(),
            error,
            retry_in_ms = pause / 1_000_000,
            "the shard could not be opened anew; reads go on, writes stay refused"
        );
        self.revival.stage = Stage::Pause(self.now.after_nanos(pause));
    }

    fn change_over(&mut self, shard: Shard<D, R>, wires: &mut dyn Wires) {
        // Nothing waits on the old log any more: this only keeps it so.
        self.abandon_writes(wires, "the shard was opened anew");
        // They may have changed meanwhile.
        shard.set_dropped_namespaces(self.catalogue.dropped());
        self.shard = shard;
        self.replicate_anew();
        self.replant_trees();
        self.revival.stage = Stage::Well;
        self.revival.since = Some(self.now);
        self.metrics.borrow_mut().counters.log_reopened += 1;
        tracing::warn!(
            shard = self.map.own(),
            attempts = self.revival.attempts,
            "the shard was opened anew on a new log segment; writes are taken again"
        );
    }
}
