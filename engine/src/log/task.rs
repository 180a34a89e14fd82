//! The log's writer task: writes batches, syncs, and acknowledges.
//!
//! Invariant: batches are acknowledged in the order of their records, and after a failed write or
//! sync nothing is: the failure poisons the log and is never retried. What is under way then is
//! waited for, so that no late write can meet a segment's next life.
//!
//! Group commit has no timer in `Sync` mode: a record that finds the disk idle is written at
//! once, and what arrives while batches are being written forms the next one.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use super::Lsn;
use super::format::{BATCH_HEADER_SIZE, BatchHeader, Records, SEGMENT_HEADER_SIZE};
use super::large;
use super::segments::{Segment, never, zero};
use super::state::{Batch, Shared, Used};
use crate::disk::{Disk, File, WriteMode};
use crate::error::Result;
use crate::model::Instant;
use crate::options::Durability;
use crate::runtime::Runtime;

/// Time before space is asked for again on a full disk.
pub(super) const FULL_RETRY_NANOS: u64 = 100_000_000;

type Boxed<T> = Pin<Box<dyn Future<Output = T>>>;

/// A write that has returned.
struct Done<F> {
    batch: Batch,
    records_size: usize,
    segment: u64,
    file: F,
    mode: WriteMode,
    result: Result<()>,
}

enum Event<F> {
    Written(Done<F>),
    Synced(Result<()>),
    /// A deadline passed, or the shard has something new.
    Look,
}

/// The writer task's own state.
struct Writer<D: Disk, R: Runtime> {
    shared: Rc<Shared<D, R>>,
    window_nanos: Option<u64>,
    current: Option<Segment<D::File>>,
    offset: u64,
    flight: FuturesOrdered<Boxed<Done<D::File>>>,
    sync: Option<Boxed<Result<()>>>,
    /// What the sync under way will make durable.
    sync_covers: u64,
    /// Segments with writes that have returned and were not synced.
    dirty: Vec<(u64, D::File)>,
    /// Last record whose write has returned.
    written: u64,
    /// Greatest synced position that a batch on the disk tells.
    claimed: u64,
    /// Since when the open batch that begins with this record waits (periodic).
    open_since: Option<(u64, Instant)>,
    sync_at: Option<Instant>,
    quiet_since: Option<Instant>,
    retry_at: Option<Instant>,
    /// A batch is due, but there is no segment for it.
    blocked: bool,
    timer: Option<(Instant, Boxed<()>)>,
    closed: bool,
}

/// Writes batches until the log is closed, poisoned, or dropped.
pub(super) async fn write<D: Disk, R: Runtime>(shared: Rc<Shared<D, R>>) {
    let window_nanos = match shared.options.durability {
        Durability::Sync => None,
        Durability::Periodic { window_ms } => Some(window_ms * 1_000_000),
    };
    let begun_at = shared.durable.get();
    let mut writer = Writer {
        shared: Rc::clone(&shared),
        window_nanos,
        current: None,
        offset: 0,
        flight: FuturesOrdered::new(),
        sync: None,
        sync_covers: 0,
        dirty: Vec::new(),
        written: begun_at,
        claimed: begun_at,
        open_since: None,
        sync_at: None,
        quiet_since: None,
        retry_at: None,
        blocked: false,
        timer: None,
        closed: false,
    };
    writer.run().await;
    // No operation of the log is under way any more once its tasks have ended.
    while writer.flight.next().await.is_some() {}
    if let Some(sync) = writer.sync.take() {
        let _ = sync.await;
    }
    drop(writer);
    shared.end_task();
}

impl<D: Disk, R: Runtime> Writer<D, R> {
    async fn run(&mut self) {
        while !self.is_over() {
            self.submit().await;
            match self.event().await {
                Event::Written(done) => self.written(done),
                Event::Synced(result) => self.synced(result),
                Event::Look => {}
            }
        }
    }

    fn is_over(&self) -> bool {
        let state = self.shared.state.borrow();
        self.closed || state.stop || state.poison.is_some()
    }

    /// Starts every write and sync that may start now, and says when to look again.
    async fn submit(&mut self) {
        self.blocked = false;
        loop {
            self.note_times();
            self.start_sync();
            if self.flight.len() >= self.shared.options.batches_in_flight {
                self.shared.state.borrow_mut().wake_at = usize::MAX;
                return;
            }
            let Some(size) = self.due() else { return };
            match self.make_room(size).await {
                Ok(true) => {}
                Ok(false) => {
                    self.blocked = true;
                    self.shared.state.borrow_mut().wake_at = usize::MAX;
                    return;
                }
                Err(error) => return self.shared.poison(&error),
            }
            let batch = self.take();
            self.send(batch);
        }
    }

    /// Size with padding of the batch that shall be written now, if any; sets `wake_at` if none.
    fn due(&mut self) -> Option<u64> {
        let idle = self.flight.is_empty();
        let now = self.now_if_timed();
        let mut state = self.shared.state.borrow_mut();
        state.wake_at = usize::MAX;
        let len = if let Some(batch) = state.sealed.front() {
            // The close record claims that all before it is durable.
            let held = batch.close && (!idle || self.shared.durable.get() + 1 < batch.first);
            (!held).then(|| batch.size())?
        } else if state.open.count > 0 {
            let due = match self.open_since {
                None => {
                    let overlap = self.shared.options.overlap_size + BATCH_HEADER_SIZE;
                    if !idle {
                        state.wake_at = overlap;
                    }
                    idle || state.open.buf.len() >= overlap
                }
                Some((_, since)) => {
                    let deadline =
                        since.after_nanos(self.shared.options.write_delay_ms * 1_000_000);
                    now >= deadline || state.sync_until >= state.open.first
                }
            };
            due.then(|| state.open.buf.len())?
        } else if idle && self.quiet_deadline().is_some_and(|deadline| now >= deadline) {
            BATCH_HEADER_SIZE
        } else {
            let overlap = self.shared.options.overlap_size + BATCH_HEADER_SIZE;
            state.wake_at = if idle || self.window_nanos.is_some() { 0 } else { overlap };
            return None;
        };
        let alignment = self.current.as_ref().map_or(SEGMENT_HEADER_SIZE, |c| c.alignment);
        Some(len.next_multiple_of(alignment) as u64)
    }

    /// The batch that [`Writer::due`] spoke of; an empty one is a mark of the synced position.
    fn take(&mut self) -> Batch {
        let mut state = self.shared.state.borrow_mut();
        match state.sealed.pop_front() {
            Some(batch) => batch,
            None => {
                self.open_since = None;
                self.shared.take_open(&mut state)
            }
        }
    }

    /// Whether the current segment has room for `size` bytes, after moving on to the next one if
    /// it must. `false` while there is none.
    async fn make_room(&mut self, size: u64) -> Result<bool> {
        if self.current.as_ref().is_some_and(|current| self.offset + size <= current.capacity) {
            return Ok(true);
        }
        let next = self.shared.state.borrow_mut().ready.pop_front();
        let Some(mut next) = next else {
            self.shared.state.borrow_mut().starved = true;
            self.shared.nudge_preparer();
            return Ok(false);
        };
        let needed = SEGMENT_HEADER_SIZE as u64 + size.next_multiple_of(SEGMENT_HEADER_SIZE as u64);
        if needed > next.capacity {
            // A record larger than a segment. Its zeros are written when nothing else is under
            // way, because acknowledgements wait meanwhile.
            let grown = if !self.flight.is_empty() {
                Ok(false)
            } else {
                match zero(&next.file, next.capacity, needed, &never).await {
                    Ok(()) => Ok(true),
                    Err(error) if error.is_full() => {
                        self.shared.set_full(Some(error.to_string()));
                        self.retry_at =
                            Some(self.shared.runtime.now().after_nanos(FULL_RETRY_NANOS));
                        Ok(false)
                    }
                    Err(error) => Err(error),
                }
            };
            if !matches!(grown, Ok(true)) {
                self.shared.state.borrow_mut().ready.push_front(next);
                return grown;
            }
            next.capacity = needed;
            self.retry_at = None;
            self.shared.set_full(None);
        }
        self.roll(next);
        Ok(true)
    }

    fn roll(&mut self, next: Segment<D::File>) {
        {
            let mut state = self.shared.state.borrow_mut();
            let mut last = 0;
            if let Some(old) = state.used.back_mut() {
                old.current = false;
                last = old.last;
            }
            let (id, path) = (next.id, next.path.clone());
            state.used.push_back(Used { id, path, last, writes: 0, current: true });
            state.free_segments();
            state.starved = false;
        }
        self.offset = SEGMENT_HEADER_SIZE as u64;
        self.current = Some(next);
        self.shared.nudge_preparer();
    }

    /// Starts the write of a batch at the end of the current segment.
    fn send(&mut self, mut batch: Batch) {
        let segment = self.current.as_ref().expect("room was made in it");
        let synced = self.shared.durable.get();
        let records_size = batch.records_size();
        let size = batch.size().next_multiple_of(segment.alignment);
        let header = BatchHeader {
            checksum: 0,
            magic: 0,
            first: batch.first,
            synced,
            count: batch.count,
            records_size: u32::try_from(records_size).expect("bounded by the largest record"),
            size: u32::try_from(size).expect("bounded by the largest record"),
            reserved: 0,
        }
        .sealed(segment.salt, self.offset);
        let size = size as u64;
        // A mark is durable at once: what is written behind it could not be found without it.
        let durable = self.window_nanos.is_none() || batch.close || batch.count == 0;
        let mode = if durable { WriteMode::Durable } else { WriteMode::Cached };
        {
            let mut state = self.shared.state.borrow_mut();
            let used = state.used.back_mut().expect("the current segment is in use");
            used.last = used.last.max(batch.last());
            used.writes += 1;
            let ready: u64 = state.ready.iter().map(|ready| ready.capacity).sum();
            state.room = segment.capacity - self.offset - size + ready;
            state.stats.batches += 1;
            state.stats.records += u64::from(batch.count);
            state.stats.bytes += records_size as u64;
            state.stats.device_bytes += size;
            state.stats.syncs += u64::from(durable);
        }
        self.claimed = self.claimed.max(synced);
        self.quiet_since = None;
        let (file, offset, id) = (segment.file.clone(), self.offset, segment.id);
        let alignment = segment.alignment;
        self.offset += size;
        if batch.large.is_some() {
            let shared = Rc::clone(&self.shared);
            self.flight.push_back(Box::pin(async move {
                let place = large::Place { file: file.clone(), offset, mode };
                let record = batch.large.as_ref().expect("asked above");
                let result = large::write(&shared, place, &header, record).await;
                Done { batch, records_size, segment: id, file, mode, result }
            }));
            return;
        }
        batch.buf.pad_to(alignment);
        batch.buf[..BATCH_HEADER_SIZE].copy_from_slice(bytemuck::bytes_of(&header));
        self.flight.push_back(Box::pin(async move {
            let Batch { buf, first, count, close, large } = batch;
            let (buf, result) = file.write_at(offset, buf, mode).await;
            let batch = Batch { buf, first, count, close, large };
            Done { batch, records_size, segment: id, file, mode, result }
        }));
    }

    /// A write has returned, and all before it have.
    fn written(&mut self, done: Done<D::File>) {
        let Done { batch, records_size, segment, file, mode, result } = done;
        let freed = {
            let mut state = self.shared.state.borrow_mut();
            if let Some(used) = state.used.iter_mut().find(|used| used.id == segment) {
                used.writes -= 1;
            }
            state.free_segments()
        };
        if freed {
            self.shared.nudge_preparer();
        }
        if let Err(error) = result {
            return self.shared.poison(&error);
        }
        self.written = batch.last();
        self.shared.pending.set(self.shared.pending.get() - records_size);
        if batch.count == 0 {
            // A mark says nothing of the records before it that were written and not synced.
        } else if mode == WriteMode::Durable {
            self.shared.durable.set(self.written);
            self.acknowledge(&batch, records_size);
        } else if self.dirty.iter().all(|(id, _)| *id != segment) {
            self.dirty.push((segment, file));
        }
        self.closed = batch.close;
        let mut state = self.shared.state.borrow_mut();
        self.shared.give_back(&mut state, batch.buf);
    }

    /// Gives the records of a durable batch to the sink, unless they were given in `append`.
    fn acknowledge(&self, batch: &Batch, records_size: usize) {
        if self.window_nanos.is_none()
            && let Some(large) = &batch.large
        {
            let item = large.header.item(&large.key, large.value.value());
            self.shared.visible.set(batch.first);
            let mut sink = self.shared.sink.borrow_mut();
            sink(Lsn(batch.first), &item.expect("the log made it"));
        } else if self.window_nanos.is_none() {
            let records = &batch.buf[BATCH_HEADER_SIZE..BATCH_HEADER_SIZE + records_size];
            let mut sink = self.shared.sink.borrow_mut();
            for item in Records::trusted(records, Lsn(batch.first)) {
                let (lsn, item) = item.expect("the log encoded it");
                self.shared.visible.set(lsn.0);
                sink(lsn, &item);
            }
        }
        self.shared.visible.set(self.shared.visible.get().max(batch.last()));
        self.shared.wake_waiters(batch.last());
    }

    /// Periodic: starts a sync when the window has passed or somebody waits for one.
    fn start_sync(&mut self) {
        let Some(window) = self.window_nanos else { return };
        let durable = self.shared.durable.get();
        if self.sync.is_some() || self.written == durable {
            return;
        }
        let now = self.shared.runtime.now();
        let wanted = self.shared.state.borrow().sync_until > durable;
        if !wanted && self.sync_at.is_some_and(|at| now < at) {
            return;
        }
        let files: Vec<D::File> = self.dirty.drain(..).map(|(_, file)| file).collect();
        self.sync_covers = self.written;
        self.sync_at = (!self.flight.is_empty()).then(|| now.after_nanos(window));
        self.shared.state.borrow_mut().stats.syncs += files.len() as u64;
        self.sync = Some(Box::pin(async move {
            for file in files {
                file.sync().await?;
            }
            Ok(())
        }));
    }

    fn synced(&mut self, result: Result<()>) {
        if let Err(error) = result {
            return self.shared.poison(&error);
        }
        self.shared.durable.set(self.sync_covers);
        self.shared.wake_waiters(self.sync_covers);
    }

    /// Notes since when the open batch waits, and since when nothing happens.
    fn note_times(&mut self) {
        let (open, count) = {
            let state = self.shared.state.borrow();
            (state.open.first, state.open.count)
        };
        if count == 0 {
            // It may have been sealed by an append meanwhile.
            self.open_since = None;
        } else if let Some(window) = self.window_nanos
            && self.open_since.is_none()
        {
            let now = self.shared.runtime.now();
            self.open_since = Some((open, now));
            self.sync_at.get_or_insert(now.after_nanos(window));
        }
        if count == 0 && self.flight.is_empty() && self.claimed < self.shared.durable.get() {
            self.quiet_since.get_or_insert_with(|| self.shared.runtime.now());
        }
    }

    fn quiet_deadline(&self) -> Option<Instant> {
        let quiet = self.shared.options.quiet_mark_ms * 1_000_000;
        self.quiet_since.filter(|_| quiet > 0).map(|since| since.after_nanos(quiet))
    }

    /// The time, if anything here depends on it.
    fn now_if_timed(&self) -> Instant {
        if self.open_since.is_some() || self.quiet_since.is_some() {
            self.shared.runtime.now()
        } else {
            Instant(0)
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let delay = self.shared.options.write_delay_ms * 1_000_000;
        let open = self.open_since.map(|(_, since)| since.after_nanos(delay));
        let may_write = !self.blocked && self.flight.len() < self.shared.options.batches_in_flight;
        let open = open.filter(|_| may_write);
        // The mark is for times when nothing is to be written; a close record that is held back
        // waits for a sync, not for the clock.
        let nothing_waits = {
            let state = self.shared.state.borrow();
            state.sealed.is_empty() && state.open.count == 0
        };
        let sync = self
            .sync_at
            .filter(|_| self.sync.is_none() && self.written > self.shared.durable.get());
        let idle = self.flight.is_empty();
        let quiet = self.quiet_deadline().filter(|_| may_write && idle && nothing_waits);
        // Growing a segment waits until nothing is under way, whatever the clock says.
        let retry = self.retry_at.filter(|_| idle);
        [open, sync, quiet, retry].into_iter().flatten().min()
    }

    /// Waits for the next thing that concerns the writer. A deadline that has passed must be one
    /// that [`Writer::submit`] can act on, or the task would spin and never yield.
    async fn event(&mut self) -> Event<D::File> {
        if let Some(deadline) = self.deadline()
            && self.timer.as_ref().is_none_or(|(at, _)| *at > deadline)
        {
            let sleep = self.shared.runtime.sleep_until(deadline);
            self.timer = Some((deadline, Box::pin(sleep)));
        }
        poll_fn(|context| {
            if !self.flight.is_empty()
                && let Poll::Ready(Some(done)) = self.flight.poll_next_unpin(context)
            {
                return Poll::Ready(Event::Written(done));
            }
            if let Some(sync) = &mut self.sync
                && let Poll::Ready(result) = sync.as_mut().poll(context)
            {
                self.sync = None;
                return Poll::Ready(Event::Synced(result));
            }
            if let Some((_, timer)) = &mut self.timer
                && timer.as_mut().poll(context).is_ready()
            {
                self.timer = None;
                return Poll::Ready(Event::Look);
            }
            let mut state = self.shared.state.borrow_mut();
            if state.nudged {
                state.nudged = false;
                return Poll::Ready(Event::Look);
            }
            if !state.writer.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                state.writer = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}
