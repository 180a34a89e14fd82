//! One shard: its log, memory, tables, and the two paths through them.
//!
//! ```text
//! write: apply -> log (all that waits shares one write and one sync) -> memory, once durable
//! read:  probe -> memory -> filters -> index -> cached block | finish: the one disk read
//! then, in the background class:
//!        full memtable -> table -> manifest -> log segment released
//!        compaction plan (pure) -> compaction run -> manifest
//! ```
//!
//! Invariants: a read never shows a write that a crash could undo (in `sync` mode). A record is
//! in memory until the manifest names the table that holds it. Nothing acknowledged is lost by
//! any crash, and nothing refused ever appears.

mod background;
mod ceiling;
mod closing;
mod memory;
mod notify;
mod progress;
mod read;
mod read_times;
mod reopen;
mod replicas;
mod replicate;
mod reserved;
mod retention;
mod scan;
mod scrub;
mod snapshot;
mod space;
mod touched;
mod unknown;
mod versions;
mod write;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;

pub use closing::{BackgroundTask, Closing, ClosingStage};
pub use read::{Found, PendingRead, Probe};
pub use replicate::MergedIn;
pub use scan::ScanRequest;
pub use space::SpaceLevel;
pub use touched::Touch;
pub use write::{Applied, Condition, Merge, Mutation, Outcome};

pub(crate) use memory::Memory;
pub(crate) use notify::Notify;
pub(crate) use read_times::ReadTimes;
pub(crate) use replicas::{FIRST_INCARNATION, Replicas};
pub(crate) use reserved::Reserved;
pub(crate) use retention::Keep;
pub(crate) use scrub::Scrub;
pub(crate) use space::{SpaceWatch, Thresholds};
pub(crate) use unknown::{Damaged, is_voided};
pub(crate) use versions::{Unsettled, Versions};

use crate::cache::BlockCache;
use crate::compaction::pace::{DELAY_FULL_MAX_NANOS, log_delay};
use crate::compaction::{Compactor, Pace, WriteThrottle};
use crate::disk::Disk;
use crate::identity::Identity;
use crate::log::{CommitLog, LogIdentity, LogStats, Lsn};
use crate::model::{Instant, NamespaceId, Timestamp, Token};
use crate::options::{Durability, Options};
use crate::runtime::Runtime;
use crate::sstable::TableOptions;
use crate::tables::Tables;
use crate::{Error, Result};

/// One shard of a node. Clones share it.
pub struct Shard<D: Disk, R: Runtime> {
    pub(crate) state: Rc<ShardState<D, R>>,
}

impl<D: Disk, R: Runtime> Clone for Shard<D, R> {
    fn clone(&self) -> Shard<D, R> {
        Shard { state: Rc::clone(&self.state) }
    }
}

impl<D: Disk, R: Runtime> std::fmt::Debug for Shard<D, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("dir", &self.state.dir).finish_non_exhaustive()
    }
}

/// What all tasks of a shard share. No borrow of a cell crosses an await.
pub(crate) struct ShardState<D: Disk, R: Runtime> {
    pub(crate) disk: D,
    pub(crate) runtime: R,
    pub(crate) dir: PathBuf,
    pub(crate) identity: Identity,
    pub(crate) options: Options,
    pub(crate) log: CommitLog<D, R>,
    pub(crate) memory: Rc<RefCell<Memory>>,
    pub(crate) tables: Tables<D>,
    /// Greatest stamp in any table that ever was live: what memory must beat to answer alone.
    pub(crate) tables_max: Cell<Timestamp>,
    pub(crate) compactor: Compactor<D, R>,
    pub(crate) cache: RefCell<BlockCache>,
    pub(crate) versions: RefCell<Versions>,
    /// Which record of the log holds the ceiling in force; zero when none of this life does.
    pub(crate) ceiling_at: Cell<Lsn>,
    /// The last record that says something of a partition's `seen`.
    pub(crate) control_at: Cell<Lsn>,
    /// No own write of an earlier life can be missing: see `progress.rs`.
    pub(crate) whole: Cell<bool>,
    pub(crate) unsettled: RefCell<Unsettled>,
    /// Versions that were given out before their write.
    pub(crate) reserved: RefCell<Reserved>,
    pub(crate) space: SpaceWatch,
    pub(crate) stats: RefCell<Counters>,
    /// Where the log holds the last drop of a partition.
    pub(crate) dropped_at: Cell<Lsn>,
    /// Which records may go.
    pub(crate) keep: Rc<Keep>,
    /// Blocks that failed their check.
    pub(crate) damaged: RefCell<Vec<Damaged>>,
    /// What a reopening asks again.
    pub(crate) compression: Option<crate::recover::CompressionOf>,
    /// How upper tables are written.
    pub(crate) upper_tables: TableOptions,
    pub(crate) pace: Rc<RefCell<Pace>>,
    /// By how many nanoseconds each written byte is slowed now.
    pub(crate) delay_per_byte: Cell<f64>,
    /// No write is slowed by more, in nanoseconds, while there is room in memory.
    pub(crate) delay_max: Cell<u64>,
    /// Bytes written since, and the memtables as they were, when that was last computed.
    pub(crate) bytes_since_pressure: Cell<usize>,
    pub(crate) pressure_epoch: Cell<u64>,
    pub(crate) throttle: RefCell<WriteThrottle>,
    /// How long point reads waited for their blocks of late.
    pub(crate) read_times: ReadTimes,
    /// How often the disk's space is looked at, in nanoseconds; simulations slow it down.
    pub(crate) watch_nanos: Cell<u64>,
    /// Set once: all tasks end.
    pub(crate) stop: Rc<Cell<bool>>,
    /// Told when closing begins and when a background task ends.
    pub(crate) lifecycle: Notify,
    /// Which blocks are read next, only to check them.
    pub(crate) scrub: Scrub,
    /// Told when all of them are to be read.
    pub(crate) scrub_asked: Notify,
    /// Told when a flush has brought compaction something to do.
    pub(crate) work: Notify,
    /// [`BackgroundTask::bit`]s.
    pub(crate) tasks_running: Cell<u8>,
    pub(crate) closing: Cell<ClosingStage>,
    /// The last failure of a background task, until it succeeds again.
    pub(crate) background_error: RefCell<Option<Error>>,
}

/// Running counts of one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Table blocks read from the disk for point reads.
    pub blocks_read: u64,
    /// Their bytes.
    pub block_bytes_read: u64,
    /// Memtables flushed.
    pub flushes: u64,
    /// Bytes of tables written by flushes.
    pub flushed_bytes: u64,
    /// Reads that met a block that fails its check.
    pub corrupt_reads: u64,
    /// Reads that the disk failed.
    pub failed_reads: u64,
    /// Pieces of the tables that were read only to check them.
    pub scrubbed_pieces: u64,
    /// Their bytes.
    pub scrubbed_bytes: u64,
    /// Blocks that were found damaged by that.
    pub scrub_damaged: u64,
    /// Parts of the log that were given up when the shard was opened.
    pub log_losses: u64,
    /// Records in them, as far as anything says how many.
    pub log_records_lost: u64,
}

/// Where a shard stands, for metrics and `stats`.
#[derive(Clone, Debug)]
pub struct ShardStats {
    /// Running counts.
    pub counters: Counters,
    /// The commit log's counts.
    pub log: LogStats,
    /// Bytes appended to the log and not yet written.
    pub log_pending_bytes: usize,
    /// Bytes of segments that a restart would read, at most.
    pub log_replay_bytes: u64,
    /// Keys in memory, counting a key once a memtable.
    pub memory_keys: usize,
    /// Bytes of memtables.
    pub memory_bytes: usize,
    /// Memtables that wait for a flush.
    pub memtables_sealed: usize,
    /// Bytes of blocks in the cache.
    pub cache_bytes: usize,
    /// Cache hits and misses of point reads.
    pub cache_hits: u64,
    /// See `cache_hits`.
    pub cache_misses: u64,
    /// Live tables.
    pub tables: usize,
    /// Bytes of live tables.
    pub table_bytes: u64,
    /// Records in live tables, counting each version.
    pub table_records: u64,
    /// Memory of filters and indexes.
    pub pinned_bytes: usize,
    /// Compaction steps done.
    pub compactions: u64,
    /// Steps that failed.
    pub compactions_failed: u64,
    /// Ranges of tables that compaction leaves alone at present, because it cannot read them.
    pub ranges_unreadable: usize,
    /// Ranges of tokens in which records are known to be missing.
    pub ranges_unknown: usize,
    /// Bytes that compaction has read.
    pub compaction_read_bytes: u64,
    /// Bytes that compaction has written.
    pub compacted_bytes: u64,
    /// Bytes of newer runs above the last level.
    pub debt_bytes: u64,
    /// Free bytes of the file system.
    pub disk_free_bytes: u64,
    /// Size of the file system.
    pub disk_total_bytes: u64,
    /// How full the disk is.
    pub space_level: SpaceLevel,
    /// Whether the log is poisoned, and by what.
    pub poisoned: Option<String>,
    /// What keeps a background task from going on.
    pub background_error: Option<String>,
}

impl<D: Disk, R: Runtime> ShardState<D, R> {
    /// The incarnation under which the token's partition takes writes.
    #[inline]
    pub(crate) fn incarnation_of(&self, token: Token) -> u32 {
        let partition = token.partition(self.identity.partition_bits);
        self.versions.borrow().incarnation(partition)
    }

    /// Whose log it is.
    pub(crate) fn log_identity(&self) -> LogIdentity {
        crate::recover::log_identity(&self.identity)
    }

    pub(crate) fn writes_of(&self, token: Token) -> u32 {
        self.unsettled.borrow().writes_of(token)
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Who this shard is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.state.identity
    }

    /// The directory of this shard.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.state.dir
    }

    /// The knobs it was opened with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.state.options
    }

    /// All writes up to here can be read, and in `sync` mode are durable.
    #[inline]
    #[must_use]
    pub fn visible(&self) -> Lsn {
        self.state.log.visible()
    }

    /// Waits until the write with this LSN can be read.
    ///
    /// # Errors
    /// `Poisoned`: the write may or may not survive.
    pub async fn wait_visible(&self, lsn: Lsn) -> Result<()> {
        self.state.log.wait_visible(lsn).await
    }

    /// What poisoned the log, if something did.
    #[must_use]
    pub fn poisoned(&self) -> Option<Error> {
        self.state.log.poisoned()
    }

    /// Whether [`Shard::poisoned`] has something to say. Cheap enough to be asked each turn.
    #[inline]
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.state.log.is_poisoned()
    }

    /// Writes a flush of all records in memory, and waits for it.
    ///
    /// # Errors
    /// What the flush met. State: the records stay in memory and in the log.
    pub async fn flush(&self) -> Result<()> {
        self.state.memory.borrow_mut().seal();
        loop {
            let changed = Rc::clone(&self.state.memory.borrow().changed);
            let ticket = changed.ticket();
            if self.state.memory.borrow().sealed_count() == 0 {
                return Ok(());
            }
            if let Some(error) = self.state.background_error.borrow().clone() {
                return Err(error);
            }
            if self.state.stop.get() {
                return Err(Error::Busy { what: "the shard is closing" });
            }
            changed.changed(ticket).await;
        }
    }

    /// Ends all tasks, closes the log cleanly, and saves the warm list.
    ///
    /// Records in memory stay in the log: the next open replays them.
    ///
    /// # Errors
    /// `Poisoned` or `Io` if the log could not be closed; nothing that was synced is lost.
    pub async fn close(&self) -> Result<()> {
        let stage = |stage| self.state.closing.set(stage);
        stage(ClosingStage::Tasks);
        self.stop_tasks().await;
        // First what the next start needs; the list of hot blocks only makes it quicker.
        stage(ClosingStage::Log);
        // What an earlier life may have lost is not found by a clean end of this one: its numbers
        // must not be given out in the next.
        let closed = match self.lost_after() {
            None => self.state.log.close().await,
            Some(_) => {
                let ceiling = self.state.versions.borrow().ceiling();
                self.state.log.close_with(ceiling).await
            }
        };
        if closed.is_ok()
            // From now on a missing end of the log is noticed.
            && let Err(error) = self.state.tables.note_logged(self.state.log.durable()).await
        {
            tracing::warn!(%error, "the manifest does not know where the log was closed");
        }
        stage(ClosingStage::WarmList);
        if let Err(error) = self.state.save_warm_list().await {
            tracing::warn!(%error, "the list of hot blocks was not saved: the next start is cold");
        }
        stage(ClosingStage::Closed);
        closed
    }

    /// By how many nanoseconds the answer to a write of `bytes` must be held back, so that debts
    /// stay bounded. Each call moves the shared brake on.
    #[inline]
    #[must_use]
    pub fn write_delay_nanos(&self, bytes: usize, now: Instant) -> u64 {
        // Memory may fill within one of the looks that the clock brings.
        let written = self.state.bytes_since_pressure.get() + bytes;
        self.state.bytes_since_pressure.set(written);
        if written >= self.state.options.memtable_size / 16
            || self.state.pressure_epoch.get() != self.state.memory.borrow().epoch()
        {
            self.update_pressure();
        }
        let log_nanos = self.log_delay_nanos();
        let per_byte = self.state.delay_per_byte.get();
        if per_byte <= 0.0 {
            return log_nanos;
        }
        let (nanos_min, nanos_max) = self.delay_bounds();
        let nanos_min = nanos_min.max(log_nanos);
        let mut throttle = self.state.throttle.borrow_mut();
        throttle.admit(now, bytes, per_byte, nanos_max).nanos_since(now).max(nanos_min)
    }

    /// Least delay of a write for the bytes that the log has not written yet: its bound refuses.
    /// In `sync` mode every answer waits for the log as it is.
    fn log_delay_nanos(&self) -> u64 {
        let log = &self.state.options.log;
        match log.durability {
            Durability::Sync => 0,
            Durability::Periodic { .. } => {
                log_delay(self.state.log.pending_bytes() as u64, log.pending_size_max as u64)
            }
        }
    }

    /// Least and greatest delay of a write. While the last memtable fills they rise: beyond it
    /// writes are refused, so time is gained for flush, however quick it was until now.
    fn delay_bounds(&self) -> (u64, u64) {
        let options = &self.state.options;
        let memory = self.state.memory.borrow();
        if memory.sealed_count() < options.memtables_sealed_max {
            return (0, self.state.delay_max.get());
        }
        let size = options.memtable_size as u64;
        let last = (memory.bytes() as u64)
            .saturating_sub(size * options.memtables_sealed_max as u64)
            .min(size);
        // Nothing in its first half, then by the square.
        let late = (2 * last).saturating_sub(size) * 1000 / size;
        (late * late * (DELAY_FULL_MAX_NANOS / 1_000_000), DELAY_FULL_MAX_NANOS)
    }

    /// Namespaces whose records go away at the next flush or compaction.
    pub fn set_dropped_namespaces(&self, namespaces: impl IntoIterator<Item = NamespaceId>) {
        self.state.keep.set_dropped(namespaces);
    }

    /// How full the disk is.
    #[must_use]
    pub fn space_level(&self) -> SpaceLevel {
        self.state.space.level()
    }

    /// Where the shard stands.
    #[must_use]
    pub fn stats(&self) -> ShardStats {
        let state = &*self.state;
        let memory = state.memory.borrow();
        let cache = state.cache.borrow().stats();
        let set = state.tables.current();
        let tables = set.layout().stats();
        let compactor = state.compactor.stats();
        let log = state.log.stats();
        ShardStats {
            counters: *state.stats.borrow(),
            log,
            log_pending_bytes: state.log.pending_bytes(),
            log_replay_bytes: log.segments_live as u64 * state.options.log.segment_size,
            memory_keys: memory.keys(),
            memory_bytes: memory.bytes(),
            memtables_sealed: memory.sealed_count(),
            cache_bytes: state.cache.borrow().bytes(),
            cache_hits: cache.hits,
            cache_misses: cache.misses,
            tables: tables.upper_tables + tables.last_tables,
            table_bytes: tables.upper_bytes + tables.last_bytes,
            table_records: tables.records,
            pinned_bytes: set.tables().map(|table| table.memory()).sum(),
            compactions: compactor.steps + compactor.tier_steps,
            compactions_failed: compactor.failed,
            ranges_unreadable: compactor.avoided,
            ranges_unknown: self.unknown_ranges().len(),
            compaction_read_bytes: compactor.bytes_read,
            compacted_bytes: compactor.bytes_written,
            debt_bytes: tables.upper_bytes,
            disk_free_bytes: state.space.last().free,
            disk_total_bytes: state.space.last().total,
            space_level: state.space.level(),
            poisoned: state.log.poisoned().map(|error| error.to_string()),
            background_error: state.background_error.borrow().as_ref().map(Error::to_string),
        }
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
