//! `CommitLog`: the log's face to its shard. `append` encodes into the open batch and returns
//! (`state.rs`); `task.rs` writes batches and calls the sink when records may become visible.
//!
//! Invariant: numbers are given out in the order of the bytes, and the sink sees every record
//! once, in that order: in `Sync` mode only after it and all before it are durable, in `Periodic`
//! mode inside `append`.
//!
//! On the write path, straight above the disk. `append` allocates nothing as long as the disk
//! keeps up (a batch buffer a few hundred times a second otherwise).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;

use super::format::{
    BATCH_SIZE_CEILING, Control, ReplayItem, encode_control, encode_record, record_size,
};
use super::large::Large;
use super::loss::kept_aside;
use super::replay::ReplayEnd;
use super::segments::{Life, SegmentMaker, make_durable, never, remove_temporaries};
use super::state::{Shared, State, Used};
use super::wait::Wait;
use super::{Lsn, prepare, task};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::model::limits::KEY_SIZE_MAX;
use crate::model::{Kind, RecordRef};
use crate::options::{Durability, LogOptions};
use crate::runtime::{Class, Runtime};

/// Called once a record, control records among them, in order, when it may become visible. Must not
/// append.
pub type Sink = Box<dyn FnMut(Lsn, &ReplayItem<'_>)>;

/// Longest record, so that a batch of one always fits [`BATCH_SIZE_CEILING`].
const RECORD_SIZE_MAX: usize = BATCH_SIZE_CEILING / 2;
const _: () =
    assert!(crate::model::limits::VALUE_SIZE_CEILING + 2 * KEY_SIZE_MAX < RECORD_SIZE_MAX);

/// A record above one in this many of a batch's bytes is long: it gets a batch of its own.
const LARGE_PART: usize = 2;

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
    /// Writes under way.
    pub writes_in_flight: usize,
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
        make_durable(&disk, &end.unproven).await?;
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
        // A start that gave up damaged segments was cut short before it could remove them.
        let aside = kept_aside(&maker.disk, &maker.dir).await?;
        let (kept, mut free): (VecDeque<_>, VecDeque<_>) =
            free.into_iter().partition(|path| aside.contains(path));
        let recycled = free.pop_front();
        let first = match &recycled {
            Some(path) => maker.recycle(path, end.next_segment).await?,
            None => maker.create(end.next_segment, &never).await?,
        };
        for path in kept.iter().chain(newest.iter().filter(|path| aside.contains(path))) {
            maker.disk.remove(path).await?;
        }
        free.extend(newest.filter(|path| !aside.contains(path)));
        let last = end.next.0 - 1;
        let mut state = State::new(&options, end.next);
        state.used = used;
        state.free = free;
        state.ready.push_back(first);
        state.next_segment = end.next_segment + 1;
        state.stats.segments_created = u64::from(recycled.is_none());
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
        runtime.spawn(Class::Background, prepare::prepare(Rc::clone(&shared)));
        Ok(CommitLog { _owner: Rc::new(Owner(Rc::clone(&shared))), shared })
    }

    /// Puts a record into the open batch and gives it its number. Costs a copy and a checksum; of
    /// a long record with a value in pieces neither, see `large.rs`.
    ///
    /// # Errors
    /// `Busy`, `Full`, `Poisoned` or `Invalid` (size of key or value); the record is not logged.
    #[inline]
    pub fn append(&self, record: &RecordRef<'_>) -> Result<Lsn> {
        let size = record_size(record.key.len(), record.value.len());
        if record.key.is_empty() || record.key.len() > KEY_SIZE_MAX || size > RECORD_SIZE_MAX {
            return Err(bad_size(record));
        }
        // States of siblings stay in one slice; they are as bounded.
        if size > self.shared.options.batch_size / LARGE_PART && record.kind == Kind::Put {
            return self.append_large(record);
        }
        let salt = self.shared.record_salt;
        let lsn = self
            .shared
            .append_with(size, false, |buf, lsn| encode_record(buf, salt, lsn, record))?;
        if self.shared.periodic {
            self.shared.visible.set(lsn.0);
            (self.shared.sink.borrow_mut())(lsn, &ReplayItem::Record(*record));
        }
        Ok(lsn)
    }

    /// The same for a record that would take up most of a batch.
    #[cold]
    fn append_large(&self, record: &RecordRef<'_>) -> Result<Lsn> {
        let large = Large::new(record);
        let value = large.value.clone();
        let lsn = self.shared.append_large(large)?;
        if self.shared.periodic {
            self.shared.visible.set(lsn.0);
            let record = RecordRef { value: value.value(), ..*record };
            (self.shared.sink.borrow_mut())(lsn, &ReplayItem::Record(record));
        }
        Ok(lsn)
    }

    /// Like [`CommitLog::append`], for what the log says about the shard. It is taken when records no
    /// longer are, because without it no memtable can be flushed.
    ///
    /// # Errors
    /// As `append`; `Invalid` for [`Control::Close`], which only [`CommitLog::close`] writes.
    pub fn append_control(&self, control: Control<'_>) -> Result<Lsn> {
        if control == Control::Close {
            return Err(Error::Invalid { what: "only closing the log writes that".to_owned() });
        }
        let salt = self.shared.record_salt;
        let size = control.size();
        if size > RECORD_SIZE_MAX {
            return Err(Error::Invalid { what: format!("a control record of {size} bytes") });
        }
        let lsn = self.shared.append_with(size, true, |buf, lsn| {
            encode_control(buf, salt, lsn, control);
        })?;
        if self.shared.periodic {
            self.shared.visible.set(lsn.0);
            (self.shared.sink.borrow_mut())(lsn, &ReplayItem::Control(control));
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
        Wait::new(&self.shared, lsn, reached).await
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
        self.shared.state.borrow().poison.is_some()
    }

    /// What the log has done and holds.
    #[must_use]
    pub fn stats(&self) -> LogStats {
        let state = self.shared.state.borrow();
        LogStats {
            writes_in_flight: state.used.iter().map(|used| used.writes).sum(),
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
        self.close_with(Control::Close).await
    }

    /// Ends the log as durably as [`CommitLog::close`], with another last record: the next start
    /// finds all that was written, and does not find that it ended in good order.
    ///
    /// # Errors
    /// As [`CommitLog::close`].
    pub async fn close_with(&self, last: Control<'_>) -> Result<()> {
        self.shared.append_close(last);
        self.shared.nudge_all();
        Wait::new(&self.shared, Lsn(1), Shared::ended).until_ended().await;
        match self.poisoned() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }
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
