//! What a shard does by itself: flush, compaction, a look at the disk's space, the warm list.
//!
//! Invariant: each task ends soon after `stop` is set, and leaves nothing half visible. A flush
//! commits before its memtable is forgotten, and the log is released after that.

use std::path::Path;
use std::rc::Rc;

use futures_util::future::select;

use super::{BackgroundTask, Shard, ShardState, SpaceLevel};
use crate::buffer::AlignedBuf;
use crate::cache::{decode_warm_list, encode_warm_list};
use crate::compaction::Mode;
use crate::compaction::flush::{FlushOptions, flush};
use crate::compaction::pace::{DELAY_FULL_MAX_NANOS, delay_max};
use crate::compaction::{Unflushed, write_delay};
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::model::Instant;
use crate::runtime::{Class, Runtime};
use crate::{Error, Result};

const NANOS_PER_MS: u64 = 1_000_000;
/// How long a failed flush or compaction waits before it tries again.
const RETRY_NANOS: u64 = 500 * NANOS_PER_MS;
/// How often the disk's space and the pace are looked at.
const WATCH_NANOS: u64 = 100 * NANOS_PER_MS;
/// How often a memtable is flushed early for its space when the disk is nearly full.
const RELIEF_NANOS: u64 = 1_000 * NANOS_PER_MS;
/// Log that a memtable may always keep, in bytes.
const LOG_KEPT_BYTES: u64 = 256 << 20;
/// An idle shard settles its debts after so long without a write.
const SETTLE_NANOS: u64 = 2_000 * NANOS_PER_MS;
/// An idle shard that owes nothing looks again after so long whether records have expired.
const IDLE_LOOK_NANOS: u64 = 30_000 * NANOS_PER_MS;
/// Blocks read at once when the cache is warmed.
const WARM_BLOCKS_MAX: usize = 16_384;
/// Name of the warm list.
const WARM_NAME: &str = "WARM";
const WARM_NAME_NEW: &str = "WARM.new";

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Starts the shard's own tasks.
    pub(crate) fn start_tasks(&self) {
        use BackgroundTask::{Compaction, Flush, Scrub, WarmUp, Watch};
        self.start(Flush, |shard| async move { shard.flush_loop().await });
        self.start(Compaction, |shard| async move { shard.compaction_loop().await });
        self.start(Watch, |shard| async move { shard.watch_loop().await });
        self.start(WarmUp, |shard| async move { shard.warm_up().await });
        if !self.state.options.replicated {
            self.start(Scrub, |shard| async move { shard.scrub_loop().await });
        }
    }

    fn start<F: Future<Output = ()> + 'static>(
        &self,
        name: BackgroundTask,
        task: impl FnOnce(Shard<D, R>) -> F,
    ) {
        let state = Rc::clone(&self.state);
        state.set_running(name, true);
        let running = task(self.clone());
        self.state.runtime.spawn(Class::Background, async move {
            running.await;
            state.set_running(name, false);
            state.lifecycle.notify();
        });
    }

    /// Asks all tasks to end and waits until they have.
    pub(crate) async fn stop_tasks(&self) {
        self.state.stop.set(true);
        self.state.memory.borrow().changed.notify();
        self.state.lifecycle.notify();
        loop {
            let ticket = self.state.lifecycle.ticket();
            if self.state.tasks_running.get() == 0 {
                return;
            }
            self.state.lifecycle.changed(ticket).await;
        }
    }

    /// Sleeps, but not beyond the order to stop.
    pub(super) async fn pause(&self, nanos: u64) {
        let until = self.state.runtime.now().after_nanos(nanos);
        let ticket = self.state.lifecycle.ticket();
        if self.state.stop.get() {
            return;
        }
        let sleep = self.state.runtime.sleep_until(until);
        let stopped = self.state.lifecycle.changed(ticket);
        let (sleep, stopped) = (std::pin::pin!(sleep), std::pin::pin!(stopped));
        select(sleep, stopped).await;
    }

    async fn flush_loop(&self) {
        let state = &*self.state;
        let changed = Rc::clone(&state.memory.borrow().changed);
        while !state.stop.get() {
            let ticket = changed.ticket();
            if state.memory.borrow().sealed_count() == 0 {
                changed.changed(ticket).await;
                continue;
            }
            match self.flush_oldest().await {
                Ok(()) => {
                    let failed = state.background_error.borrow_mut().take();
                    if failed.is_some() {
                        tracing::info!(dir = %state.dir.display(), "flushes succeed again");
                    }
                    state.work.notify();
                }
                Err(error) => {
                    let before = state.background_error.borrow_mut().replace(error.clone());
                    if is_news(before.as_ref(), &error) {
                        tracing::error!(
                            dir = %state.dir.display(), %error, "a flush failed; it is tried again"
                        );
                    }
                    changed.notify();
                    self.update_pressure();
                    self.pause(RETRY_NANOS).await;
                }
            }
        }
    }

    /// Writes the oldest sealed memtable to a table, makes it live, and releases its log.
    async fn flush_oldest(&self) -> Result<()> {
        let state = &*self.state;
        let Some(sealed) = state.memory.borrow().oldest_sealed() else { return Ok(()) };
        // Once the flush is committed, replay begins behind the memtable: the log must hold the
        // ceiling again there before that.
        // A flush that is tried again finds it there, or a full log would fill with ceilings.
        if state.ceiling_at.get() <= sealed.last {
            let ceiling = state.versions.borrow().ceiling();
            state.ceiling_at.set(state.log.append_control(ceiling)?);
        }
        state.log.wait_durable(state.ceiling_at.get()).await?;
        state.tables.settle().await?;
        let options = FlushOptions {
            table: state.upper_tables.clone(),
            table_size: state.options.compaction.table_size,
            order: state.tables.next_order(),
            released: sealed.last,
            replicas: sealed.replicas.clone(),
        };
        let retention = &*state.keep;
        let records = sealed.memtable.sorted();
        let written =
            flush(&state.tables, &state.runtime, retention, records, options, &state.stop).await?;
        let Some(flushed) = written else { return Ok(()) };
        let (bytes, nanos) = (flushed.bytes, flushed.nanos);
        flushed.commit(&state.tables, state.log.durable()).await?;
        state.tables_max.set(state.tables_max.get().max(sealed.memtable.max_timestamp()));
        state.memory.borrow_mut().remove_oldest_sealed();
        state.pace.borrow_mut().flushed(state.runtime.now(), bytes, nanos);
        {
            let stats = &mut *state.stats.borrow_mut();
            stats.flushes += 1;
            stats.flushed_bytes += bytes;
        }
        state.log.release(sealed.last);
        self.update_pressure();
        // Unless a scan still holds it: then that drops it.
        if let Ok(mut sealed) = Rc::try_unwrap(sealed) {
            while sealed.memtable.dismantle() {
                state.runtime.yield_now().await;
            }
        }
        Ok(())
    }

    async fn compaction_loop(&self) {
        let state = &*self.state;
        // Writes so far as last counted, and since when there was none. Not all records of the
        // log: a member of a cluster moves its ceiling on for ever.
        let mut written = state.unsettled.borrow().count();
        let mut quiet_since = state.runtime.now();
        let mut failed: Option<Error> = None;
        while !state.stop.get() {
            let ticket = state.work.ticket();
            let now = state.runtime.now();
            let count = state.unsettled.borrow().count();
            if count != written {
                (written, quiet_since) = (count, now);
            }
            let idle = now.nanos_since(quiet_since) >= SETTLE_NANOS;
            if let Ok(space) = state.disk.space(&state.dir).await {
                state.space.update(space);
            }
            state.compactor.set_room(state.space.room(state.options.memtable_size as u64));
            // With new data refused, what deletes and overwrites leave behind is all the room
            // there will be.
            let mode = match (state.space.level() >= SpaceLevel::RefuseData, idle) {
                (true, _) => Mode::Relieve,
                (false, true) => Mode::Idle,
                (false, false) => Mode::Busy,
            };
            match state.compactor.step(mode).await {
                Ok(true) => {
                    failed = None;
                    self.update_pressure();
                }
                Ok(false) if idle => {
                    // Nothing is owed: the next flush brings new work.
                    let stopped = state.lifecycle.ticket();
                    if state.stop.get() {
                        break;
                    }
                    // Time alone makes work too: records expire.
                    let later = state.runtime.now().after_nanos(IDLE_LOOK_NANOS);
                    let work = std::pin::pin!(state.work.changed(ticket));
                    let stop = std::pin::pin!(state.lifecycle.changed(stopped));
                    let later = std::pin::pin!(state.runtime.sleep_until(later));
                    select(select(work, stop), later).await;
                }
                Ok(false) => self.pause(SETTLE_NANOS / 4).await,
                Err(error) => {
                    self.note_damage(&error);
                    if is_news(failed.as_ref(), &error) {
                        tracing::error!(dir = %state.dir.display(), %error, "a compaction failed");
                    }
                    failed = Some(error);
                    self.pause(RETRY_NANOS).await;
                }
            }
        }
    }

    /// Computes anew by how much writers must give way.
    pub(crate) fn update_pressure(&self) {
        let state = &*self.state;
        let options = &state.options;
        state.bytes_since_pressure.set(0);
        state.pressure_epoch.set(state.memory.borrow().epoch());
        let room = options.memtable_size as u64 * (1 + options.memtables_sealed_max as u64);
        let unflushed = Unflushed {
            bytes: state.memory.borrow().bytes() as u64,
            bytes_max: room,
            memtable_size: options.memtable_size as u64,
        };
        let capacity = state.pace.borrow().capacity();
        let pressure = state.compactor.pressure();
        let mut delay = write_delay(&pressure, &unflushed, &capacity);
        let mut delay_most = delay_max(&pressure);
        if state.space.level() != super::SpaceLevel::Normal {
            // Compaction must win: writers get a tenth of what flush could take.
            delay = delay.max(1e9 * 10.0 / capacity.flush.max(1.0));
            delay_most = DELAY_FULL_MAX_NANOS;
        }
        state.delay_max.set(delay_most);
        state.delay_per_byte.set(delay);
    }

    async fn watch_loop(&self) {
        let state = &*self.state;
        let mut failures = 0u32;
        let mut relieved = state.runtime.now();
        while !state.stop.get() {
            self.pause(state.watch_nanos.get().max(WATCH_NANOS)).await;
            match state.disk.space(&state.dir).await {
                Ok(space) => {
                    failures = 0;
                    state.space.update(space);
                }
                Err(error) if failures == 0 => {
                    failures = 1;
                    tracing::warn!(%error, "the disk's space cannot be told");
                }
                Err(_) => {}
            }
            self.give_log_back(&mut relieved);
            state.pace.borrow_mut().observe_latency(state.read_times.take_p99_us());
            self.update_pressure();
        }
    }

    /// Seals the memtable when it keeps too much log, though it is not full: overwrites of few keys
    /// fill the log alone, and a lone writer's small records a sector or more each. When space is short, whatever is in it is flushed, so
    /// that log and deleted records give theirs back. `last` is when that was done last.
    fn give_log_back(&self, last: &mut Instant) {
        let state = &*self.state;
        let mut memory = state.memory.borrow_mut();
        if memory.sealed_count() > 0 {
            return;
        }
        let options = &state.options;
        let segments = state.log.stats().segments_live;
        let kept = segments as u64 * options.log.segment_size;
        let most = (2 * options.memtable_size as u64)
            .max(4 * options.log.segment_size)
            .max(LOG_KEPT_BYTES);
        let now = state.runtime.now();
        // Deletes are accepted on, and one by one they fill megabytes of log a second.
        let short = state.space.level() >= SpaceLevel::RefuseData
            && (segments > 2 || now.nanos_since(*last) >= RELIEF_NANOS);
        if short || kept > most {
            *last = now;
            memory.seal();
        }
    }

    /// Reads the blocks that were hot before the restart, as far as they still exist.
    async fn warm_up(&self) {
        let state = &*self.state;
        let Ok(list) = state.load_warm_list().await else { return };
        let set = state.tables.current();
        for (table, offset) in list.into_iter().take(WARM_BLOCKS_MAX) {
            if state.stop.get() {
                return;
            }
            let Some(live) = set.table(table) else { continue };
            let Some(handle) = live.handle_at(offset) else { continue };
            if state.cache.borrow().contains(table, offset) {
                continue;
            }
            if let Ok(block) = live.read_block(handle).await {
                state.cache.borrow_mut().insert(table, Rc::new(block));
            }
        }
    }
}

/// Whether a failure should be told: while the disk is full one line is enough, though every
/// attempt names another file.
fn is_news(before: Option<&Error>, now: &Error) -> bool {
    before.is_none_or(|before| {
        before.is_full() != now.is_full()
            || (!now.is_full() && before.to_string() != now.to_string())
    })
}

impl<D: Disk, R: Runtime> ShardState<D, R> {
    /// Writes down which blocks are hot. Losing it costs nothing but warmth.
    pub(crate) async fn save_warm_list(&self) -> Result<()> {
        let bytes = encode_warm_list(&self.cache.borrow().warm_list());
        let (new, name) = (self.dir.join(WARM_NAME_NEW), self.dir.join(WARM_NAME));
        match self.disk.remove(&new).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let written = async {
            let file = self.disk.open(&new, OpenMode::Create).await?;
            let mut buf = AlignedBuf::with_capacity(bytes.len() + 4096);
            buf.extend_from_slice(&bytes);
            buf.pad_to(file.alignment());
            file.write_at(0, buf, WriteMode::Cached).await.1?;
            file.set_len(bytes.len() as u64).await?;
            file.sync().await?;
            self.disk.rename(&new, &name).await
        };
        if let Err(error) = written.await {
            // Nothing half written stays.
            let _ = self.disk.remove(&new).await;
            return Err(error);
        }
        self.disk.sync_dir(&self.dir).await
    }

    async fn load_warm_list(&self) -> Result<Vec<(crate::sstable::TableId, u64)>> {
        let path = self.dir.join(WARM_NAME);
        let file = self.disk.open(&path, OpenMode::Read).await?;
        let len = file.len().await?;
        let size = usize::try_from(len.min(64 << 20)).unwrap_or(0);
        let bytes = file.read_at(0, size.next_multiple_of(file.alignment())).await?;
        let bytes = &bytes[..size.min(bytes.len())];
        decode_warm_list(bytes).ok_or_else(|| Error::corrupt(Path::new(&path), 0, "warm list"))
    }
}
