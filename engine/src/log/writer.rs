//! `CommitLog`: the log's face to its shard. `append` encodes into the open batch and returns;
//! `task.rs` writes batches and calls the sink when records may become visible.
//!
//! Invariant: numbers are given out in the order of the bytes, and the sink sees every record
//! once, in that order: in `Sync` mode only after it and all before it are durable, in `Periodic`
//! mode inside `append`.
//!
//! On the write path, straight above the disk. `append` allocates nothing as long as the disk
//! keeps up (a batch buffer a few hundred times a second otherwise).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::format::{
    BATCH_HEADER_SIZE, BATCH_SIZE_CEILING, Control, encode_control, encode_record, record_size,
};
use super::replay::{Extent, ReplayEnd};
use super::segments::{Life, Segment, SegmentMaker, remove_temporaries};
use super::{Lsn, task};
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::error::{Error, Result};
use crate::model::RecordRef;
use crate::model::limits::KEY_SIZE_MAX;
use crate::options::{Durability, LogOptions};
use crate::runtime::{Class, Runtime};

/// Called once a record, in order, when the record may become visible. Must not append.
pub type Sink = Box<dyn FnMut(Lsn, &RecordRef<'_>)>;

/// Longest record, so that a batch of one always fits [`BATCH_SIZE_CEILING`].
const RECORD_SIZE_MAX: usize = BATCH_SIZE_CEILING / 2;
const _: () =
    assert!(crate::model::limits::VALUE_SIZE_CEILING + 2 * KEY_SIZE_MAX < RECORD_SIZE_MAX);

/// What the log has done in this life, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Batches written.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of the records, headers included.
    pub bytes: u64,
    /// Bytes written to the device for them, padding included.
    pub device_bytes: u64,
    /// Syncs, or writes that were durable when they returned.
    pub syncs: u64,
    /// Segments that hold records not yet released, the current one included.
    pub segments_live: usize,
    /// Segments ready for use.
    pub segments_ready: usize,
    /// Segments waiting to be recycled or removed.
    pub segments_free: usize,
    /// Segments made of zeros; the others were recycled.
    pub segments_created: u64,
}

/// The commit log of one shard. Clones share it; when the last is dropped the log's tasks end.
pub struct CommitLog<D: Disk, R: Runtime> {
    shared: Rc<Shared<D, R>>,
    _owner: Rc<Owner<D, R>>,
}

impl<D: Disk, R: Runtime> Clone for CommitLog<D, R> {
    fn clone(&self) -> Self {
        CommitLog { shared: Rc::clone(&self.shared), _owner: Rc::clone(&self._owner) }
    }
}

/// Tells the tasks when nobody uses the log any more.
struct Owner<D: Disk, R: Runtime>(Rc<Shared<D, R>>);

impl<D: Disk, R: Runtime> Drop for Owner<D, R> {
    fn drop(&mut self) {
        self.0.state.borrow_mut().stop = true;
        self.0.nudge_all();
    }
}

/// What the log's face and its tasks share.
pub(super) struct Shared<D: Disk, R: Runtime> {
    pub(super) runtime: R,
    pub(super) maker: SegmentMaker<D>,
    pub(super) options: LogOptions,
    record_salt: u64,
    periodic: bool,
    /// Number of the last record appended, given to the sink, and durable.
    pub(super) appended: Cell<u64>,
    pub(super) visible: Cell<u64>,
    pub(super) durable: Cell<u64>,
    /// Bytes appended whose write has not returned.
    pub(super) pending: Cell<usize>,
    pub(super) state: RefCell<State<D::File>>,
    pub(super) sink: RefCell<Sink>,
}

/// Records that are written together.
pub(super) struct Batch {
    /// Room for the header, then the records.
    pub(super) buf: AlignedBuf,
    pub(super) first: u64,
    pub(super) count: u32,
    /// Whether it holds the close record, which claims that all before it is durable.
    pub(super) close: bool,
}

/// A segment of this life that batches were written to, or one of an earlier life.
pub(super) struct Used {
    pub(super) id: u64,
    pub(super) path: PathBuf,
    pub(super) last: u64,
    /// Writes under way.
    pub(super) writes: usize,
    /// Whether the log still writes to it.
    pub(super) current: bool,
}

pub(super) struct State<F> {
    /// Set when `append` must look at `poison`, `closing` and `full` before it does anything.
    refuse: bool,
    pub(super) poison: Option<Error>,
    pub(super) closing: bool,
    /// Why no segment can be made, while the disk is full.
    pub(super) full: Option<String>,
    /// Bytes left in the current and the ready segments; only kept while the disk is full.
    pub(super) room: u64,
    /// Nobody uses the log any more.
    pub(super) stop: bool,
    /// The open batch.
    pub(super) open: Batch,
    /// Batches that are full and wait for a place in flight.
    pub(super) sealed: VecDeque<Batch>,
    pub(super) pool: Vec<AlignedBuf>,
    /// Size of the open batch from which an append wakes the writer.
    pub(super) wake_at: usize,
    pub(super) nudged: bool,
    pub(super) writer: Option<Waker>,
    pub(super) preparer: Option<Waker>,
    pub(super) tasks: usize,
    pub(super) used: VecDeque<Used>,
    pub(super) ready: VecDeque<Segment<F>>,
    pub(super) free: VecDeque<PathBuf>,
    pub(super) next_segment: u64,
    pub(super) released: u64,
    /// Somebody waits until this record is durable, and not only for the end of the window.
    pub(super) sync_until: u64,
    /// The writer waits for a segment.
    pub(super) starved: bool,
    pub(super) waiters: BTreeMap<(u64, u64), Waker>,
    next_waiter: u64,
    pub(super) stats: LogStats,
}

impl<D: Disk, R: Runtime> CommitLog<D, R> {
    /// Begins a new life of the log in `dir`, after what replay found. Makes durable what replay
    /// could read but nothing proved durable, then opens a new segment; writes nothing else into
    /// the old ones.
    ///
    /// # Errors
    /// `Invalid` for options, or what the disk says. The directory can be replayed again.
    pub async fn start(
        disk: D,
        runtime: R,
        dir: PathBuf,
        options: LogOptions,
        end: ReplayEnd,
        sink: Sink,
    ) -> Result<CommitLog<D, R>> {
        options.validate()?;
        disk.create_dir(&dir).await?;
        if let Some(parent) = dir.parent() {
            disk.sync_dir(parent).await?;
        }
        remove_temporaries(&disk, &dir).await?;
        for extent in &end.unproven {
            rewrite(&disk, extent).await?;
        }
        let life = Life { number: end.life + 1, after: end.last, first: end.next };
        let maker =
            SegmentMaker { disk, dir, identity: end.identity, life, size: options.segment_size };
        let newest_is_free = end.segments.last().is_some_and(|old| old.last == Lsn::ZERO);
        let (mut used, mut free) = (VecDeque::new(), VecDeque::new());
        for old in end.segments {
            if old.last == Lsn::ZERO {
                free.push_back(old.path);
            } else {
                let (path, last) = (old.path, old.last.0);
                used.push_back(Used { id: 0, path, last, writes: 0, current: false });
            }
        }
        // The newest segment is left alone until the new one is there: its header is what the log
        // knows of earlier lives.
        let newest = if newest_is_free { free.pop_back() } else { None };
        let recycled = free.pop_front();
        let first = match &recycled {
            Some(path) => maker.recycle(path, end.next_segment).await?,
            None => maker.create(end.next_segment).await?,
        };
        free.extend(newest);
        let last = end.next.0 - 1;
        let state = State {
            refuse: false,
            poison: None,
            closing: false,
            full: None,
            room: 0,
            stop: false,
            open: Batch::new(buffer(options.batch_size), end.next.0),
            sealed: VecDeque::with_capacity(64),
            pool: Vec::with_capacity(options.batches_in_flight + 2),
            wake_at: 0,
            nudged: false,
            writer: None,
            preparer: None,
            tasks: 2,
            used,
            ready: VecDeque::from([first]),
            free,
            next_segment: end.next_segment + 1,
            released: 0,
            sync_until: 0,
            starved: false,
            waiters: BTreeMap::new(),
            next_waiter: 0,
            stats: LogStats {
                segments_created: u64::from(recycled.is_none()),
                ..LogStats::default()
            },
        };
        let shared = Rc::new(Shared {
            runtime: runtime.clone(),
            record_salt: maker.identity.record_salt(life.number),
            maker,
            options,
            periodic: matches!(options.durability, Durability::Periodic { .. }),
            appended: Cell::new(last),
            visible: Cell::new(last),
            durable: Cell::new(last),
            pending: Cell::new(0),
            state: RefCell::new(state),
            sink: RefCell::new(sink),
        });
        runtime.spawn(Class::Foreground, task::write(Rc::clone(&shared)));
        runtime.spawn(Class::Background, task::prepare(Rc::clone(&shared)));
        Ok(CommitLog { _owner: Rc::new(Owner(Rc::clone(&shared))), shared })
    }

    /// Puts a record into the open batch and gives it its number. Costs a copy and a checksum.
    ///
    /// # Errors
    /// `Busy`, `Full`, `Poisoned` or `Invalid` (size of key or value); the record is not logged.
    #[inline]
    pub fn append(&self, record: &RecordRef<'_>) -> Result<Lsn> {
        let size = record_size(record.key.len(), record.value.len());
        if record.key.is_empty() || record.key.len() > KEY_SIZE_MAX || size > RECORD_SIZE_MAX {
            return Err(bad_size(record));
        }
        let salt = self.shared.record_salt;
        let lsn =
            self.shared.append_with(size, |buf, lsn| encode_record(buf, salt, lsn, record))?;
        if self.shared.periodic {
            self.shared.visible.set(lsn.0);
            (self.shared.sink.borrow_mut())(lsn, record);
        }
        Ok(lsn)
    }

    /// Like [`CommitLog::append`], for what the log says about the shard. The sink is not called.
    ///
    /// # Errors
    /// As `append`; `Invalid` for [`Control::Close`], which only [`CommitLog::close`] writes.
    pub fn append_control(&self, control: Control) -> Result<Lsn> {
        if control == Control::Close {
            return Err(Error::Invalid { what: "only closing the log writes that".to_owned() });
        }
        let salt = self.shared.record_salt;
        let lsn = self.shared.append_with(record_size(0, 0), |buf, lsn| {
            encode_control(buf, salt, lsn, control);
        })?;
        if self.shared.periodic {
            self.shared.visible.set(lsn.0);
        }
        Ok(lsn)
    }

    /// Number of the last record appended.
    #[must_use]
    pub fn appended(&self) -> Lsn {
        Lsn(self.shared.appended.get())
    }

    /// Number of the last record given to the sink.
    #[must_use]
    pub fn visible(&self) -> Lsn {
        Lsn(self.shared.visible.get())
    }

    /// All records up to this one are on the disk.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        Lsn(self.shared.durable.get())
    }

    /// Bytes appended whose write has not returned.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.shared.pending.get()
    }

    /// Waits until the record has been given to the sink.
    ///
    /// # Errors
    /// `Poisoned` when the log failed before: the record may or may not survive.
    pub async fn wait_visible(&self, lsn: Lsn) -> Result<()> {
        self.wait(lsn, |shared| shared.visible.get()).await
    }

    /// Waits until the record is on the disk; in `Periodic` mode syncs now and not at the end of
    /// the window.
    ///
    /// # Errors
    /// `Poisoned` when the log failed before: the record may or may not survive.
    pub async fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        if self.shared.durable.get() < lsn.0 {
            {
                let mut state = self.shared.state.borrow_mut();
                state.sync_until = state.sync_until.max(lsn.0);
            }
            self.shared.nudge_writer();
        }
        self.wait(lsn, |shared| shared.durable.get()).await
    }

    async fn wait(&self, lsn: Lsn, reached: fn(&Shared<D, R>) -> u64) -> Result<()> {
        Wait { shared: &self.shared, lsn, reached, key: None }.await
    }

    /// Says that all records up to `up_to` are in tables: segments that hold only such are
    /// recycled, in the background.
    pub fn release(&self, up_to: Lsn) {
        let freed = {
            let mut state = self.shared.state.borrow_mut();
            state.released = state.released.max(up_to.0);
            state.free_segments()
        };
        if freed {
            self.shared.nudge_preparer();
        }
    }

    /// The failure that ended the log's life, if one did.
    #[must_use]
    pub fn poisoned(&self) -> Option<Error> {
        self.shared.state.borrow().poison.clone()
    }

    /// Whether a failure ended the log's life. Cheap enough to be asked each turn.
    #[inline]
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        let state = self.shared.state.borrow();
        state.refuse && state.poison.is_some()
    }

    /// What the log has done and holds.
    #[must_use]
    pub fn stats(&self) -> LogStats {
        let state = self.shared.state.borrow();
        LogStats {
            segments_live: state.used.len(),
            segments_ready: state.ready.len(),
            segments_free: state.free.len(),
            ..state.stats
        }
    }

    /// Refuses further appends, waits for all before, notes on the disk that the log is whole,
    /// and ends its tasks. After a failure it waits until no operation of the log is under way,
    /// so that the directory can be replayed again in this process. Closing twice is fine.
    ///
    /// # Errors
    /// `Poisoned` when a write or sync failed, before or now.
    pub async fn close(&self) -> Result<()> {
        self.shared.append_close();
        self.shared.nudge_all();
        Wait { shared: &self.shared, lsn: Lsn(1), reached: |shared| shared.ended(), key: None }
            .until_ended()
            .await;
        match self.poisoned() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }
}

impl Batch {
    pub(super) fn new(mut buf: AlignedBuf, first: u64) -> Batch {
        buf.clear();
        buf.extend_from_slice(&[0; BATCH_HEADER_SIZE]);
        Batch { buf, first, count: 0, close: false }
    }

    /// Bytes of its records.
    pub(super) fn records_size(&self) -> usize {
        self.buf.len() - BATCH_HEADER_SIZE
    }

    /// Number of its last record; of the one before its first when it is empty.
    pub(super) fn last(&self) -> u64 {
        self.first + u64::from(self.count) - 1
    }
}

/// A buffer that holds a batch without moving.
fn buffer(batch_size: usize) -> AlignedBuf {
    AlignedBuf::with_capacity(batch_size.next_multiple_of(4096))
}

impl<D: Disk, R: Runtime> Shared<D, R> {
    #[inline]
    fn append_with(&self, size: usize, encode: impl FnOnce(&mut AlignedBuf, Lsn)) -> Result<Lsn> {
        let mut state = self.state.borrow_mut();
        if state.refuse {
            state.admit(self.pending.get() + size)?;
        }
        // Asked before the record is counted, so that a large one is not kept out by small ones;
        // the bound is exceeded by at most one record.
        let pending = self.pending.get();
        if pending >= self.options.pending_size_max {
            return Err(Error::Busy { what: "too many bytes wait for the commit log" });
        }
        let mut wake = false;
        if state.open.buf.len() + size > self.options.batch_size && state.open.count > 0 {
            self.seal(&mut state);
            wake = true;
        }
        let lsn = Lsn(self.appended.get() + 1);
        encode(&mut state.open.buf, lsn);
        state.open.count += 1;
        self.appended.set(lsn.0);
        self.pending.set(pending + size);
        if wake || state.open.buf.len() >= state.wake_at {
            state.nudged = true;
            if let Some(waker) = state.writer.take() {
                drop(state);
                waker.wake();
            }
        }
        Ok(lsn)
    }

    /// Closes the open batch and begins the next.
    #[cold]
    fn seal(&self, state: &mut State<D::File>) {
        let batch = self.take_open(state);
        state.sealed.push_back(batch);
    }

    /// Takes the open batch and begins the next.
    pub(super) fn take_open(&self, state: &mut State<D::File>) -> Batch {
        let buf = state.pool.pop().unwrap_or_else(|| buffer(self.options.batch_size));
        let next = Batch::new(buf, state.open.last() + 1);
        std::mem::replace(&mut state.open, next)
    }

    /// Takes a batch's buffer back; one that grew for a large record is freed.
    pub(super) fn give_back(&self, state: &mut State<D::File>, buf: AlignedBuf) {
        let usual = buf.capacity() <= self.options.batch_size.next_multiple_of(4096);
        if usual && state.pool.len() < self.options.batches_in_flight + 2 {
            state.pool.push(buf);
        }
    }

    /// Queues the close record as a batch of its own, once.
    fn append_close(&self) {
        let mut state = self.state.borrow_mut();
        if state.closing || state.poison.is_some() {
            return;
        }
        state.closing = true;
        state.refuse = true;
        if state.open.count > 0 {
            self.seal(&mut state);
        }
        let lsn = Lsn(self.appended.get() + 1);
        let mut batch = self.take_open(&mut state);
        encode_control(&mut batch.buf, self.record_salt, lsn, Control::Close);
        batch.count = 1;
        batch.close = true;
        state.open.first = lsn.0 + 1;
        self.appended.set(lsn.0);
        self.pending.set(self.pending.get() + batch.records_size());
        state.sealed.push_back(batch);
        state.sync_until = lsn.0;
    }

    /// Ends the log's life: nothing is acknowledged any more.
    pub(super) fn poison(&self, cause: &Error) {
        let mut state = self.state.borrow_mut();
        if state.poison.is_none() {
            tracing::error!(%cause, dir = %self.maker.dir.display(), "the commit log is poisoned");
            state.poison = Some(Error::Poisoned { what: cause.to_string() });
            state.refuse = true;
        }
        drop(state);
        self.nudge_all();
    }

    /// Notes that the disk is full, or that it is not any more.
    pub(super) fn set_full(&self, why: Option<String>) {
        let mut state = self.state.borrow_mut();
        state.refuse = why.is_some() || state.closing || state.poison.is_some();
        state.full = why;
    }

    fn ended(&self) -> u64 {
        u64::from(self.state.borrow().tasks == 0)
    }

    pub(super) fn nudge_writer(&self) {
        let waker = {
            let mut state = self.state.borrow_mut();
            state.nudged = true;
            state.writer.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    pub(super) fn nudge_preparer(&self) {
        let waker = self.state.borrow_mut().preparer.take();
        waker.into_iter().for_each(Waker::wake);
    }

    /// Wakes whoever waits for a number up to `reached`.
    pub(super) fn wake_waiters(&self, reached: u64) {
        let ready = {
            let mut state = self.state.borrow_mut();
            if state.waiters.first_key_value().is_none_or(|(key, _)| key.0 > reached) {
                return;
            }
            let later = state.waiters.split_off(&(reached + 1, 0));
            std::mem::replace(&mut state.waiters, later)
        };
        ready.into_values().for_each(Waker::wake);
    }

    pub(super) fn nudge_all(&self) {
        self.nudge_writer();
        self.nudge_preparer();
        self.wake_waiters(u64::MAX - 1);
    }
}

impl<F> State<F> {
    /// Whether an append may go on although something is wrong.
    #[cold]
    fn admit(&self, pending: usize) -> Result<()> {
        if let Some(poison) = &self.poison {
            return Err(poison.clone());
        }
        if self.closing {
            return Err(Error::Busy { what: "the commit log is closed" });
        }
        match &self.full {
            Some(what) if pending as u64 + (64 << 10) > self.room => {
                Err(Error::Full { what: what.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Moves segments that are no longer needed to the free ones. Says whether there were any.
    pub(super) fn free_segments(&mut self) -> bool {
        let before = self.free.len();
        while let Some(used) = self.used.front()
            && !used.current
            && used.writes == 0
            && used.last <= self.released
        {
            self.free.extend(self.used.pop_front().map(|used| used.path));
        }
        self.free.len() > before
    }
}

/// Writes an extent again, unchanged, so that it is durable before a new life builds on it. A
/// torn rewrite of the same bytes is the same bytes.
async fn rewrite<D: Disk>(disk: &D, extent: &Extent) -> Result<()> {
    let file = disk.open(&extent.path, OpenMode::Write).await?;
    // The directory may have moved to a device with a larger alignment.
    let alignment = file.alignment() as u64;
    let start = extent.offset / alignment * alignment;
    let end = (extent.offset + extent.size).next_multiple_of(alignment);
    let size = usize::try_from(end - start).expect("a batch that was read fits the memory");
    let bytes = file.read_at(start, size).await?;
    file.write_at(start, bytes, WriteMode::Durable).await.1
}

#[cold]
fn bad_size(record: &RecordRef<'_>) -> Error {
    Error::Invalid {
        what: format!(
            "a record with a key of {} and a value of {} bytes; keys have 1 to {KEY_SIZE_MAX} \
             bytes, records up to {RECORD_SIZE_MAX}",
            record.key.len(),
            record.value.len()
        ),
    }
}

/// Waits for one of the log's counters.
struct Wait<'a, D: Disk, R: Runtime> {
    shared: &'a Shared<D, R>,
    lsn: Lsn,
    reached: fn(&Shared<D, R>) -> u64,
    key: Option<(u64, u64)>,
}

impl<D: Disk, R: Runtime> Wait<'_, D, R> {
    fn register(&mut self, context: &Context<'_>) {
        let mut state = self.shared.state.borrow_mut();
        let key = *self.key.get_or_insert_with(|| {
            state.next_waiter += 1;
            (self.lsn.0, state.next_waiter)
        });
        state.waiters.insert(key, context.waker().clone());
    }

    /// Waits whatever happens to the log.
    async fn until_ended(mut self) {
        std::future::poll_fn(|context| {
            if (self.reached)(self.shared) >= self.lsn.0 {
                return Poll::Ready(());
            }
            self.register(context);
            Poll::Pending
        })
        .await;
    }
}

impl<D: Disk, R: Runtime> Future for Wait<'_, D, R> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        if (self.reached)(self.shared) >= self.lsn.0 {
            return Poll::Ready(Ok(()));
        }
        let failed = {
            let state = self.shared.state.borrow();
            match &state.poison {
                Some(poison) => Some(poison.clone()),
                // Closed in good order: the number was never given out.
                None if state.tasks == 0 => Some(Error::Busy { what: "the commit log is closed" }),
                None => None,
            }
        };
        if let Some(error) = failed {
            return Poll::Ready(Err(error));
        }
        self.register(context);
        Poll::Pending
    }
}

impl<D: Disk, R: Runtime> Drop for Wait<'_, D, R> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.shared.state.borrow_mut().waiters.remove(&key);
        }
    }
}
