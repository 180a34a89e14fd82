//! What the log's face and its tasks share: the batches between them, the segments, the counters,
//! and who waits for what.
//!
//! Invariant: nothing here awaits, and no borrow of the state outlives a call; so the face and
//! the tasks see it change in whole steps only.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::task::Waker;

use super::Lsn;
use super::format::{BATCH_HEADER_SIZE, Control, encode_control};
use super::large::Large;
use super::segments::{Segment, SegmentMaker};
use super::writer::{LogStats, Sink};
use crate::buffer::AlignedBuf;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::options::LogOptions;
use crate::runtime::Runtime;

/// What the log's face and its tasks share.
pub(super) struct Shared<D: Disk, R: Runtime> {
    pub(super) runtime: R,
    pub(super) maker: SegmentMaker<D>,
    pub(super) options: LogOptions,
    pub(super) record_salt: u64,
    pub(super) periodic: bool,
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
    /// Its one record, if that is a long one: not in `buf`, but encoded when it is written.
    pub(super) large: Option<Box<Large>>,
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
    pub(super) refuse: bool,
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
    pub(super) next_waiter: u64,
    pub(super) stats: LogStats,
}

impl Batch {
    pub(super) fn new(mut buf: AlignedBuf, first: u64) -> Batch {
        buf.clear();
        buf.extend_from_slice(&[0; BATCH_HEADER_SIZE]);
        Batch { buf, first, count: 0, close: false, large: None }
    }

    /// Bytes of its records; of no meaning once the buffer was padded.
    pub(super) fn records_size(&self) -> usize {
        match &self.large {
            Some(large) => large.size(),
            None => self.buf.len() - BATCH_HEADER_SIZE,
        }
    }

    /// Bytes of header and records.
    pub(super) fn size(&self) -> usize {
        BATCH_HEADER_SIZE + self.records_size()
    }

    /// Number of its last record; of the one before its first when it is empty.
    pub(super) fn last(&self) -> u64 {
        self.first + u64::from(self.count) - 1
    }
}

/// Bytes of the last segment that records do not get on a full disk: padding of the batches in
/// flight, and the few control records without which nothing can be flushed.
const ROOM_KEPT: u64 = 64 << 10;
/// Of these, what control records do not get either.
const ROOM_KEPT_URGENT: u64 = 16 << 10;

/// A buffer that holds a batch without moving.
fn buffer(batch_size: usize) -> AlignedBuf {
    AlignedBuf::with_capacity(batch_size.next_multiple_of(4096))
}

impl<D: Disk, R: Runtime> Shared<D, R> {
    /// `urgent` is what a full log must still take, so that it can be emptied.
    #[inline]
    pub(super) fn append_with(
        &self,
        size: usize,
        urgent: bool,
        encode: impl FnOnce(&mut AlignedBuf, Lsn),
    ) -> Result<Lsn> {
        let mut state = self.state.borrow_mut();
        let pending = self.admit(&state, size, urgent)?;
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

    /// Gives a long record its number, and a batch of its own behind all before it. Costs nothing
    /// that grows with its size: it is encoded when the batch is written.
    #[cold]
    pub(super) fn append_large(&self, large: Large) -> Result<Lsn> {
        let mut state = self.state.borrow_mut();
        let size = large.size();
        let pending = self.admit(&state, size, false)?;
        if state.open.count > 0 {
            self.seal(&mut state);
        }
        let lsn = Lsn(self.appended.get() + 1);
        let (buf, large) = (AlignedBuf::with_capacity(0), Some(Box::new(large)));
        state.sealed.push_back(Batch { buf, first: lsn.0, count: 1, close: false, large });
        state.open.first = lsn.0 + 1;
        self.appended.set(lsn.0);
        self.pending.set(pending + size);
        drop(state);
        self.nudge_writer();
        Ok(lsn)
    }

    /// Whether `size` more bytes may be appended, and how many wait already.
    #[inline]
    fn admit(&self, state: &State<D::File>, size: usize, urgent: bool) -> Result<usize> {
        let pending = self.pending.get();
        if state.refuse {
            state.admit(pending + size, urgent)?;
        }
        // Asked before the record is counted, so that a large one is not kept out by small ones;
        // the bound is exceeded by at most one record.
        if pending >= self.options.pending_size_max && !urgent {
            return Err(Error::Busy { what: "too many bytes wait for the commit log" });
        }
        Ok(pending)
    }

    /// Bytes of a buffer of the pool.
    pub(super) fn chunk_size(&self) -> usize {
        self.options.batch_size.next_multiple_of(4096)
    }

    /// An empty buffer of the pool.
    pub(super) fn buffer(&self) -> AlignedBuf {
        let pooled = self.state.borrow_mut().pool.pop();
        let mut buf = pooled.unwrap_or_else(|| buffer(self.options.batch_size));
        buf.clear();
        buf
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

    /// Takes a buffer back; one of another size than the pool's is freed.
    pub(super) fn give_back(&self, state: &mut State<D::File>, buf: AlignedBuf) {
        let usual = buf.capacity() == self.chunk_size();
        if usual && state.pool.len() < self.options.batches_in_flight + 2 {
            state.pool.push(buf);
        }
    }

    /// Queues the log's last record as a batch of its own, once.
    pub(super) fn append_close(&self, last: Control<'_>) {
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
        encode_control(&mut batch.buf, self.record_salt, lsn, last);
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

    pub(super) fn ended(&self) -> u64 {
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
    /// The state of a log whose next record is `next`, without any segment.
    pub(super) fn new(options: &LogOptions, next: Lsn) -> State<F> {
        State {
            refuse: false,
            poison: None,
            closing: false,
            full: None,
            room: 0,
            stop: false,
            open: Batch::new(buffer(options.batch_size), next.0),
            sealed: VecDeque::with_capacity(64),
            pool: Vec::with_capacity(options.batches_in_flight + 2),
            wake_at: 0,
            nudged: false,
            writer: None,
            preparer: None,
            tasks: 2,
            used: VecDeque::new(),
            ready: VecDeque::new(),
            free: VecDeque::new(),
            next_segment: 1,
            released: 0,
            sync_until: 0,
            starved: false,
            waiters: BTreeMap::new(),
            next_waiter: 0,
            stats: LogStats::default(),
        }
    }

    /// Whether an append may go on although something is wrong.
    #[cold]
    fn admit(&self, pending: usize, urgent: bool) -> Result<()> {
        if let Some(poison) = &self.poison {
            return Err(poison.clone());
        }
        if self.closing {
            return Err(Error::Busy { what: "the commit log is closed" });
        }
        let kept_back = if urgent { ROOM_KEPT_URGENT } else { ROOM_KEPT };
        match &self.full {
            Some(what) if pending as u64 + kept_back > self.room => {
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
