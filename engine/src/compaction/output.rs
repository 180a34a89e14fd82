//! What flush and compaction share: breathing between pieces, and writing a row of tables.
//!
//! Invariant: a table that is returned by [`Output::finish`] is complete, synced, and its name
//! is durable; until then only `abandon` or the next open know of the files.

use std::cell::Cell;
use std::rc::Rc;

use super::plan::Cutter;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::model::{Instant, RecordRef, WallMicros};
use crate::runtime::Runtime;
use crate::sstable::{Table, TableId, TableMeta, TableOptions, TableWriter};
use crate::tables::edit::{AddedTable, Level, TableSummary};
use crate::tables::store::Tables;

/// Longest work between two yields, in nanoseconds.
const SLICE_NANOS: u64 = 200_000;
/// Bytes of work between two looks at the clock.
const LOOK_BYTES: usize = 16 << 10;
/// Bytes of work after which it yields whatever the clock says.
const SLICE_BYTES: usize = 1 << 20;

/// Longest sleep before the next look whether it shall stop, in nanoseconds.
const STOP_LOOK_NANOS: u64 = 100_000_000;

/// Why background work ended before its end.
#[derive(Debug)]
pub(super) enum Ended {
    /// The shard is closing.
    Stopped,
    Failed(Error),
}

/// Result of background work that may be stopped.
pub(super) type Outcome<T> = std::result::Result<T, Ended>;

impl From<Error> for Ended {
    fn from(error: Error) -> Ended {
        Ended::Failed(error)
    }
}

/// Lets others run between pieces of work, and notices a stop.
pub(super) struct Breath<R> {
    runtime: R,
    stop: Rc<Cell<bool>>,
    /// When it last yielded.
    started: Instant,
    since_look: usize,
    since_yield: usize,
    began: Instant,
    /// Time slept to keep the pace, in nanoseconds.
    slept: u64,
}

impl<R: Runtime> Breath<R> {
    pub(super) fn new(runtime: R, stop: Rc<Cell<bool>>) -> Breath<R> {
        let started = runtime.now();
        Breath { runtime, stop, started, since_look: 0, since_yield: 0, began: started, slept: 0 }
    }

    /// Whether it is time for [`Breath::take`], after `bytes` more of work.
    #[inline]
    pub(super) fn is_due(&mut self, bytes: usize) -> bool {
        self.since_look += bytes;
        if self.since_look < LOOK_BYTES {
            return false;
        }
        self.since_yield += std::mem::take(&mut self.since_look);
        self.since_yield >= SLICE_BYTES
            || self.runtime.now().nanos_since(self.started) >= SLICE_NANOS
    }

    /// Lets others run; waits until `not_before` if there is a pace.
    pub(super) async fn take(&mut self, not_before: Option<Instant>) -> Outcome<()> {
        let now = self.runtime.now();
        match not_before {
            Some(at) if at > now => {
                while self.runtime.now() < at && !self.stop.get() {
                    let look = self.runtime.now().after_nanos(STOP_LOOK_NANOS);
                    self.runtime.sleep_until(at.min(look)).await;
                }
                self.slept += self.runtime.now().nanos_since(now);
            }
            _ => self.runtime.yield_now().await,
        }
        self.started = self.runtime.now();
        (self.since_look, self.since_yield) = (0, 0);
        if self.stop.get() { Err(Ended::Stopped) } else { Ok(()) }
    }

    /// Time it took without the pace, in nanoseconds; giving way to others counts, because that
    /// is what background work can do beside them.
    pub(super) fn worked(&self) -> u64 {
        self.runtime.now().nanos_since(self.began).saturating_sub(self.slept)
    }
}

/// Bytes of work that a record is, about.
#[inline]
pub(super) fn work_of(record: &RecordRef<'_>) -> usize {
    record.key.len() + record.value.len() + 40
}

/// Tables that were written, not yet committed.
pub(super) type Written<D> = (Vec<AddedTable>, Vec<Rc<Table<<D as Disk>::File>>>);

/// A row of new tables, cut by a [`Cutter`].
pub(super) struct Output<D: Disk> {
    tables: Tables<D>,
    options: TableOptions,
    level: Level,
    written_at: WallMicros,
    cutter: Cutter,
    current: Option<TableWriter<D::File>>,
    /// Every file that was begun.
    begun: Vec<TableId>,
    added: Vec<AddedTable>,
    opened: Vec<Rc<Table<D::File>>>,
    bytes: u64,
}

impl<D: Disk> Output<D> {
    pub(super) fn new(
        tables: Tables<D>,
        options: TableOptions,
        level: Level,
        written_at: WallMicros,
        cutter: Cutter,
    ) -> Output<D> {
        Output {
            tables,
            options,
            level,
            written_at,
            cutter,
            current: None,
            begun: Vec::new(),
            added: Vec::new(),
            opened: Vec::new(),
            bytes: 0,
        }
    }

    /// Whether [`Output::next_table`] must come before this record. Asked once a record.
    #[inline]
    pub(super) fn needs_table(&mut self, record: &RecordRef<'_>) -> bool {
        let size = u64::try_from(work_of(record)).expect("a record is small");
        let written = self.current.as_ref().map_or(0, TableWriter::data_bytes);
        self.cutter.starts_table(record.token, size, written) || self.current.is_none()
    }

    /// Finishes the current table, if there is one, and begins the next.
    pub(super) async fn next_table(&mut self) -> Result<()> {
        self.finish_current().await?;
        let id = self.tables.next_table_id();
        self.begun.push(id);
        let file = self.tables.create_file(id).await?;
        let identity = self.tables.identity(id);
        self.current = Some(TableWriter::new(file, identity, self.options.clone()));
        Ok(())
    }

    /// Adds a record; true when [`Output::flush`] is due.
    #[inline]
    pub(super) async fn add<R: Runtime>(
        &mut self,
        record: &RecordRef<'_>,
        breath: &Breath<R>,
    ) -> Result<bool> {
        let writer = self.current.as_mut().expect("needs_table was asked");
        writer.append(record, &async || breath.runtime.yield_now().await).await?;
        Ok(writer.should_flush())
    }

    /// Writes what is gathered. Returns the bytes.
    pub(super) async fn flush(&mut self) -> Result<u64> {
        let Some(writer) = self.current.as_mut() else { return Ok(0) };
        let before = self.bytes;
        writer.flush().await?;
        self.bytes =
            self.added.iter().map(|table| table.summary.size).sum::<u64>() + writer.data_bytes();
        Ok(self.bytes.saturating_sub(before))
    }

    async fn finish_current(&mut self) -> Result<()> {
        let Some(writer) = self.current.take() else { return Ok(()) };
        let meta = writer.finish().await?;
        // Read back from the disk: filter and index are checked before anything relies on them.
        self.opened.push(self.tables.open_file(meta.id).await?);
        self.added.push(AddedTable { level: self.level, summary: summary(&meta, self.written_at) });
        Ok(())
    }

    /// Finishes the last table and makes the names durable.
    pub(super) async fn finish(&mut self) -> Result<Written<D>> {
        self.finish_current().await?;
        if !self.added.is_empty() {
            self.tables.sync_dir().await?;
        }
        Ok((std::mem::take(&mut self.added), std::mem::take(&mut self.opened)))
    }

    /// Removes every file that was begun.
    pub(super) async fn abandon(mut self) {
        self.current = None;
        self.opened.clear();
        self.tables.abandon(&self.begun).await;
    }
}

fn summary(meta: &TableMeta, written_at: WallMicros) -> TableSummary {
    TableSummary {
        id: meta.id,
        size: meta.size,
        span: crate::model::TokenRange { first: meta.first_token, last: meta.last_token },
        record_count: meta.record_count,
        tombstone_count: meta.tombstone_count,
        expiring_count: meta.expiring_count,
        min_expiry_ms: meta.min_expiry_ms,
        max_expiry_ms: meta.max_expiry_ms,
        max_timestamp: meta.max_timestamp,
        written_ms: written_at.as_millis(),
    }
}
