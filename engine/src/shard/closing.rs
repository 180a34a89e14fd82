//! How far a shard is with closing: for whoever waits for it and must say what it waits for.
//!
//! Invariant: looking costs nothing that the shard would wait for, and changes nothing.

use super::{Shard, ShardState};
use crate::disk::Disk;
use crate::runtime::Runtime;

/// What [`Shard::close`] is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClosingStage {
    /// It has not begun.
    #[default]
    Open,
    /// It waits for the background tasks to end.
    Tasks,
    /// It waits for the log's last writes and its close record.
    Log,
    /// It writes the list of hot blocks.
    WarmList,
    /// It is done.
    Closed,
}

/// Background tasks of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackgroundTask {
    /// Turns memtables into tables.
    Flush,
    /// Merges tables.
    Compaction,
    /// Looks at the disk's space and the pace.
    Watch,
    /// Reads the blocks that were hot before the restart.
    WarmUp,
    /// Reads table blocks to check them.
    Scrub,
}

impl BackgroundTask {
    /// All of them.
    pub const ALL: [BackgroundTask; 5] = [
        BackgroundTask::Flush,
        BackgroundTask::Compaction,
        BackgroundTask::Watch,
        BackgroundTask::WarmUp,
        BackgroundTask::Scrub,
    ];

    /// Its bit in [`Closing::tasks`].
    #[must_use]
    pub fn bit(self) -> u8 {
        match self {
            BackgroundTask::Flush => 1,
            BackgroundTask::Compaction => 2,
            BackgroundTask::Watch => 4,
            BackgroundTask::WarmUp => 8,
            BackgroundTask::Scrub => 16,
        }
    }

    /// Its name, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            BackgroundTask::Flush => "flush",
            BackgroundTask::Compaction => "compaction",
            BackgroundTask::Watch => "watch",
            BackgroundTask::WarmUp => "warm-up",
            BackgroundTask::Scrub => "scrub",
        }
    }
}

/// How far [`Shard::close`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closing {
    /// What it is doing.
    pub stage: ClosingStage,
    /// The [`BackgroundTask::bit`]s of the tasks that run.
    pub tasks: u8,
    /// Bytes appended to the log whose write has not returned.
    pub log_pending_bytes: usize,
    /// Writes of the log under way.
    pub log_writes: usize,
    /// Records of the log that are not yet on the disk.
    pub log_unsynced: u64,
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// How far [`Shard::close`] is.
    #[must_use]
    pub fn closing(&self) -> Closing {
        let state = &*self.state;
        Closing {
            stage: state.closing.get(),
            tasks: state.tasks_running.get(),
            log_pending_bytes: state.log.pending_bytes(),
            log_writes: state.log.stats().writes_in_flight,
            log_unsynced: state.log.appended().0 - state.log.durable().0,
        }
    }
}

impl<D: Disk, R: Runtime> ShardState<D, R> {
    pub(crate) fn set_running(&self, task: BackgroundTask, runs: bool) {
        let others = self.tasks_running.get() & !task.bit();
        self.tasks_running.set(if runs { others | task.bit() } else { others });
    }
}
