//! What each shard is doing, for the main thread to tell when it takes too long.
//!
//! Invariant: a shard writes its own vitals and nobody waits for it; numbers are as of its last
//! note, and consistent only one by one. A shard notes at most ten times a second.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use annulus_engine::model::Instant;
use annulus_engine::shard::{BackgroundTask, Closing, ClosingStage};

/// Shortest time between two notes, in nanoseconds.
pub(crate) const NOTE_NANOS: u64 = 100_000_000;

/// Where a shard is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Its thread starts, or it opens its directory.
    Opening = 0,
    /// It serves.
    Serving,
    /// It finishes the requests it has.
    Draining,
    /// It has none of its own, and answers the other shards until they have none either.
    Drained,
    /// Its sockets are closed; background tasks end.
    StoppingTasks,
    /// The log ends.
    ClosingLog,
    /// It writes down which blocks are hot.
    SavingWarmList,
    /// Everything is on the disk; the kernel gives the ring's operations back.
    LeavingRing,
    /// Its thread has nothing more to do.
    Ended,
}

impl Phase {
    const ALL: [Phase; 9] = [
        Phase::Opening,
        Phase::Serving,
        Phase::Draining,
        Phase::Drained,
        Phase::StoppingTasks,
        Phase::ClosingLog,
        Phase::SavingWarmList,
        Phase::LeavingRing,
        Phase::Ended,
    ];
}

/// What a shard still has to finish before it is drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) sessions: usize,
    pub(crate) requests: usize,
    pub(crate) unsent_bytes: usize,
}

/// One shard's vitals.
#[derive(Debug)]
pub(crate) struct Vitals {
    phase: AtomicU8,
    /// The shard's clock at its last note.
    turned: AtomicU64,
    sessions: AtomicUsize,
    requests: AtomicUsize,
    unsent_bytes: AtomicUsize,
    tasks: AtomicU8,
    log_pending_bytes: AtomicUsize,
    log_writes: AtomicUsize,
    log_unsynced: AtomicU64,
    ring_files: AtomicUsize,
    ring_sockets: AtomicUsize,
    /// The watch has told that it takes no turns.
    told: AtomicBool,
}

impl Vitals {
    pub(crate) fn new() -> Vitals {
        Vitals {
            phase: AtomicU8::new(Phase::Opening as u8),
            turned: AtomicU64::new(0),
            sessions: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            unsent_bytes: AtomicUsize::new(0),
            tasks: AtomicU8::new(0),
            log_pending_bytes: AtomicUsize::new(0),
            log_writes: AtomicUsize::new(0),
            log_unsynced: AtomicU64::new(0),
            ring_files: AtomicUsize::new(0),
            ring_sockets: AtomicUsize::new(0),
            told: AtomicBool::new(false),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Acquire))]
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// The shard takes turns.
    pub(crate) fn note_turn(&self, now: Instant) {
        self.turned.store(now.0, Ordering::Relaxed);
    }

    /// What the shard's clock showed at its last note.
    pub(crate) fn turned(&self) -> u64 {
        self.turned.load(Ordering::Relaxed)
    }

    /// What the shard still has to finish.
    pub(crate) fn note_load(&self, load: Load) {
        self.sessions.store(load.sessions, Ordering::Relaxed);
        self.requests.store(load.requests, Ordering::Relaxed);
        self.unsent_bytes.store(load.unsent_bytes, Ordering::Relaxed);
    }

    /// How far the shard is with closing.
    pub(crate) fn note_closing(&self, closing: Closing) {
        self.tasks.store(closing.tasks, Ordering::Relaxed);
        self.log_pending_bytes.store(closing.log_pending_bytes, Ordering::Relaxed);
        self.log_writes.store(closing.log_writes, Ordering::Relaxed);
        self.log_unsynced.store(closing.log_unsynced, Ordering::Relaxed);
        self.set_phase(match closing.stage {
            ClosingStage::Open | ClosingStage::Tasks => Phase::StoppingTasks,
            ClosingStage::WarmList => Phase::SavingWarmList,
            ClosingStage::Log => Phase::ClosingLog,
            ClosingStage::Closed => Phase::LeavingRing,
        });
    }

    /// Operations on files and sockets that the kernel has not given back.
    pub(crate) fn note_ring(&self, (files, sockets): (usize, usize)) {
        self.ring_files.store(files, Ordering::Relaxed);
        self.ring_sockets.store(sockets, Ordering::Relaxed);
    }

    /// Whether the shard has no request of its own, now and for ever.
    pub(crate) fn is_drained(&self) -> bool {
        !matches!(self.phase(), Phase::Serving | Phase::Draining)
    }

    /// Whether the shard should take turns when it is asked to.
    pub(crate) fn takes_turns(&self) -> bool {
        (Phase::Serving..Phase::LeavingRing).contains(&self.phase())
    }

    /// Whether it was told that it takes none; says so from now on.
    pub(crate) fn tell(&self, told: bool) -> bool {
        self.told.swap(told, Ordering::Relaxed)
    }
}

impl fmt::Display for Vitals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |number: &AtomicUsize| number.load(Ordering::Relaxed);
        match self.phase() {
            Phase::Opening => f.write_str("opening"),
            Phase::Serving => f.write_str("serving"),
            Phase::Draining => write!(
                f,
                "draining: {} sessions, {} requests in flight, {} bytes unsent",
                of(&self.sessions),
                of(&self.requests),
                of(&self.unsent_bytes)
            ),
            Phase::Drained => {
                write!(
                    f,
                    "drained: waits for the other shards, {} bytes unsent",
                    of(&self.unsent_bytes)
                )
            }
            Phase::StoppingTasks => {
                f.write_str("stopping background tasks:")?;
                let running = self.tasks.load(Ordering::Relaxed);
                let mut none = true;
                for task in BackgroundTask::ALL {
                    if running & task.bit() != 0 {
                        write!(f, " {}", task.name())?;
                        none = false;
                    }
                }
                if none { f.write_str(" all have ended") } else { Ok(()) }
            }
            Phase::SavingWarmList => f.write_str("saving the list of hot blocks"),
            Phase::ClosingLog => write!(
                f,
                "closing the log: {} bytes pending, {} writes in flight, {} records not synced",
                of(&self.log_pending_bytes),
                of(&self.log_writes),
                self.log_unsynced.load(Ordering::Relaxed)
            ),
            Phase::LeavingRing => write!(
                f,
                "closed: the kernel still has {} operations on files and {} on sockets",
                of(&self.ring_files),
                of(&self.ring_sockets)
            ),
            Phase::Ended => f.write_str("ended"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_is_what_was_set_and_says_what_it_waits_for() {
        let vitals = Vitals::new();
        for phase in Phase::ALL {
            vitals.set_phase(phase);
            assert_eq!(vitals.phase(), phase);
            assert!(!vitals.to_string().is_empty());
        }
        vitals.set_phase(Phase::Draining);
        vitals.note_load(Load { sessions: 3, requests: 2, unsent_bytes: 17 });
        let line = vitals.to_string();
        assert_eq!(line, "draining: 3 sessions, 2 requests in flight, 17 bytes unsent");
    }

    #[test]
    fn closing_tells_the_tasks_that_run_and_what_the_log_waits_for() {
        let vitals = Vitals::new();
        let tasks = BackgroundTask::Flush.bit() | BackgroundTask::Watch.bit();
        vitals.note_closing(Closing { stage: ClosingStage::Tasks, tasks, ..Closing::default() });
        assert_eq!(vitals.to_string(), "stopping background tasks: flush watch");
        vitals.note_closing(Closing {
            stage: ClosingStage::Log,
            tasks: 0,
            log_pending_bytes: 9,
            log_writes: 1,
            log_unsynced: 4,
        });
        let line = vitals.to_string();
        assert!(line.ends_with("9 bytes pending, 1 writes in flight, 4 records not synced"));
    }

    #[test]
    fn only_a_shard_that_serves_or_drains_is_waited_for() {
        let vitals = Vitals::new();
        let waited: Vec<Phase> = Phase::ALL
            .into_iter()
            .filter(|phase| {
                vitals.set_phase(*phase);
                !vitals.is_drained()
            })
            .collect();
        assert_eq!(waited, [Phase::Serving, Phase::Draining]);
    }
}
