//! The compactor: runs the planned steps, one at a time, in the background class.
//!
//! A step reads slices of its input tables in large reads, merges them, writes new tables, syncs
//! them, and commits one edit. Invariant: until the commit returns nothing has changed for any
//! reader, and after it every input slice is either replaced or still live, never both. Failing
//! or stopping in between leaves files that `abandon`, or else the next open, removes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::future::try_join_all;

use super::merge::{Merge, MergeStats, Retention, Source, Step as Want};
use super::output::{Breath, Ended, Outcome, Output, Written, work_of};
use super::pace::Pace;
use super::plan::{Avoid, Cutter, Mode, Place, PlanOptions, Pressure, Step, plan_around};
use super::reclaim::{Reclaim, reclaim};
use crate::disk::{Disk, File};
use crate::error::{Error, Result};
use crate::model::limits::CLOCK_OFFSET_MAX_US;
use crate::model::{Instant, RecordRef, Token, TokenRange, WallMicros};
use crate::options::Options;
use crate::runtime::Runtime;
use crate::shard::is_voided;
use crate::sstable::{Block, Table, TableId, TableOptions, TableScan};
use crate::tables::edit::{Level, TableSetEdit};
use crate::tables::set::TableSet;
use crate::tables::store::Tables;

/// Memory for reading the inputs of a step, in bytes, shared among them.
const READ_MEMORY: usize = 16 << 20;
/// Bounds of one read, in bytes.
const READ_MIN: usize = 64 << 10;
const READ_MAX: usize = 1 << 20;

/// How long a damaged range is left alone before a step tries it again, in nanoseconds.
const DAMAGE_NANOS: u64 = 600_000_000_000;
/// The same for a range that the disk failed to read.
const FAULT_NANOS: u64 = 60_000_000_000;
/// How long after a step found the disk full none as large begins, in nanoseconds.
const NO_ROOM_NANOS: u64 = 10_000_000_000;

/// How to compact.
#[derive(Clone, Debug)]
pub struct CompactorOptions {
    /// The policy's knobs.
    pub plan: PlanOptions,
    /// How upper tables are written.
    pub upper: TableOptions,
    /// How last-level tables are written.
    pub last: TableOptions,
}

impl CompactorOptions {
    /// From a shard's options; `table` says what its tables have in common, the codec above all.
    #[must_use]
    pub fn of(options: &Options, table: &TableOptions) -> CompactorOptions {
        let with_bits = |bits| TableOptions {
            filter_bits_per_key: bits,
            block_size: options.block_size,
            partition_bits: options.partition_bits,
            ..table.clone()
        };
        CompactorOptions {
            plan: PlanOptions::of(options),
            upper: with_bits(options.filter_bits_upper),
            last: with_bits(options.filter_bits_last),
        }
    }
}

/// What compaction has done since the shard was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CompactorStats {
    /// Steps into the last level.
    pub steps: u64,
    /// Steps that merged upper tables among themselves.
    pub tier_steps: u64,
    /// Steps that failed.
    pub failed: u64,
    /// Ranges of tables that are left alone at present, because they could not be read.
    pub avoided: usize,
    /// Bytes read of tables.
    pub bytes_read: u64,
    /// Bytes written to tables.
    pub bytes_written: u64,
    /// Records of all steps.
    pub records: MergeStats,
}

/// The compactor of a shard. The shard runs [`Compactor::step`] in one background task.
pub struct Compactor<D: Disk, R: Runtime> {
    tables: Tables<D>,
    runtime: R,
    options: CompactorOptions,
    retention: Rc<dyn Retention>,
    pace: Rc<RefCell<Pace>>,
    stop: Rc<Cell<bool>>,
    running: Cell<bool>,
    /// The hand has set out in idle time and has not come to rest.
    settling: Cell<bool>,
    /// What could not be read of late.
    avoid: RefCell<Avoid>,
    /// Bytes for which there was no room of late although it looked so, and until when no step
    /// needs as many.
    no_room: Cell<Option<(u64, Instant)>>,
    stats: Cell<CompactorStats>,
}

impl<D: Disk, R: Runtime> Compactor<D, R> {
    /// A compactor for these tables. `stop` is the shard's: set, it ends a step within 1 MiB.
    #[must_use]
    pub fn new(
        tables: Tables<D>,
        runtime: R,
        options: CompactorOptions,
        retention: Rc<dyn Retention>,
        pace: Rc<RefCell<Pace>>,
        stop: Rc<Cell<bool>>,
    ) -> Compactor<D, R> {
        Compactor {
            tables,
            runtime,
            options,
            retention,
            pace,
            stop,
            running: Cell::new(false),
            settling: Cell::new(false),
            avoid: RefCell::default(),
            no_room: Cell::new(None),
            stats: Cell::default(),
        }
    }

    /// Does the next step, if one is due; false when there was nothing to do, or on a stop.
    ///
    /// # Errors
    /// Of the disk or of damaged inputs. State: as before, the step's files are removed; an input
    /// that could not be read is left alone for a while, so that the next step works elsewhere.
    ///
    /// # Panics
    /// When a step is running: there is one background task.
    pub async fn step(&self, mode: Mode) -> Result<bool> {
        assert!(!self.running.replace(true), "one compaction step at a time");
        let result = self.plan_and_run(mode).await;
        self.running.set(false);
        // What is left when the shard closes is removed at the next open.
        if !self.stop.get() {
            self.tables.collect_garbage().await;
            if mode == Mode::Relieve && matches!(result, Ok(true)) {
                // A file system may give space back only when a removal is durable, and nothing
                // else may be written before.
                let _ = self.tables.sync_dir().await;
            }
        }
        result
    }

    async fn plan_and_run(&self, mode: Mode) -> Result<bool> {
        if self.stop.get() {
            return Ok(false);
        }
        self.tables.settle().await?;
        let set = self.tables.current();
        self.pace.borrow_mut().set_pressure(&self.pressure());
        let mode = match mode {
            Mode::Idle if self.settling.get() => Mode::Settle,
            mode => mode,
        };
        self.forget_avoided(&set);
        let step = {
            let (avoid, now) = (self.avoid.borrow(), self.runtime.wall());
            plan_around(set.layout(), &self.options.plan, now, mode, &avoid)
        };
        if mode != Mode::Busy {
            self.settling.set(step.as_ref().is_some_and(|step| step.hand.is_some()));
        }
        let step = match step {
            Some(step) => step,
            None => {
                let (avoid, now) = (self.avoid.borrow().clone(), self.runtime.wall());
                let found = reclaim(&set, &self.options.plan, &*self.retention, &avoid, now);
                match found {
                    None => return Ok(false),
                    Some(Reclaim::Remove(edit)) => {
                        drop(set);
                        self.tables.commit(Vec::new(), |_| edit).await?;
                        return Ok(true);
                    }
                    Some(Reclaim::Rewrite(step)) => step,
                }
            }
        };
        match self.run(set, &step).await {
            Ok(()) => Ok(true),
            Err(Ended::Stopped) => Ok(false),
            Err(Ended::Failed(error)) => {
                self.count(|stats| stats.failed += 1);
                self.avoid_input(&step, &error);
                if error.is_full() {
                    // Others write to the same disk: something smaller is next.
                    let until = self.runtime.now().after_nanos(NO_ROOM_NANOS);
                    self.no_room.set(Some((step.bytes / 2, until)));
                }
                if let (Error::Corrupt { .. }, Some(hand)) = (&error, step.hand) {
                    let edit = TableSetEdit { hand: Some(hand), ..TableSetEdit::default() };
                    self.tables.commit(Vec::new(), |_| edit).await?;
                }
                Err(error)
            }
        }
    }

    /// Says how many bytes a step may write before it gives any back.
    pub(crate) fn set_room(&self, bytes: u64) {
        let cap = self.no_room.get().filter(|(_, until)| *until > self.runtime.now());
        self.no_room.set(cap);
        self.avoid.borrow_mut().room = cap.map_or(bytes, |(cap, _)| bytes.min(cap));
    }

    /// How far the tables are from their targets.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        let avoid = self.avoid.borrow();
        Pressure::around(self.tables.current().layout(), &self.options.plan, &avoid)
    }

    /// After a failed step: if it was an input that could not be read, no step tries that table
    /// in that range for a while.
    fn avoid_input(&self, step: &Step, error: &Error) {
        let (path, nanos) = match error {
            Error::Corrupt { path, .. } => (path, DAMAGE_NANOS),
            Error::Io { path, .. } => (path, FAULT_NANOS),
            _ => return,
        };
        let mut inputs = step.upper.iter().chain(&step.last);
        let Some(&table) = inputs.find(|&&id| self.tables.identity(id).path == *path) else {
            return;
        };
        tracing::error!(
            %error,
            minutes = nanos / 60_000_000_000,
            "compaction leaves this table alone where it cannot be read; what is whole is served"
        );
        let until = self.runtime.now().after_nanos(nanos);
        let avoid = &mut *self.avoid.borrow_mut();
        avoid.places.push(Place { table, range: step.range, until });
        self.count(|stats| stats.avoided = avoid.places.len());
    }

    /// What could not be read in this range may be tried again at once.
    pub(crate) fn try_again(&self, range: &TokenRange) {
        let avoid = &mut *self.avoid.borrow_mut();
        avoid.places.retain(|place| !place.range.overlaps(range));
        self.count(|stats| stats.avoided = avoid.places.len());
    }

    /// Forgets what is to be tried again, and tables that are gone.
    fn forget_avoided(&self, set: &TableSet<D::File>) {
        let avoid = &mut *self.avoid.borrow_mut();
        if avoid.places.is_empty() {
            return;
        }
        let now = self.runtime.now();
        avoid.places.retain(|place| place.until > now && set.table(place.table).is_some());
        self.count(|stats| stats.avoided = avoid.places.len());
    }

    /// What has been done.
    #[must_use]
    pub fn stats(&self) -> CompactorStats {
        self.stats.get()
    }

    fn count(&self, change: impl FnOnce(&mut CompactorStats)) {
        let mut stats = self.stats.get();
        change(&mut stats);
        self.stats.set(stats);
    }

    async fn run(&self, set: Rc<TableSet<D::File>>, step: &Step) -> Outcome<()> {
        let mut breath = Breath::new(self.runtime.clone(), Rc::clone(&self.stop));
        let mut merge = self.open_inputs(&set, step);
        let mut output = self.open_output(step);
        let written = match self.write(&mut merge, &mut output, &mut breath).await {
            Ok(()) => output.finish().await.map_err(Ended::from),
            Err(ended) => Err(ended),
        };
        let (added, opened): Written<D> = match written {
            Ok(written) => written,
            Err(ended) => {
                output.abandon().await;
                return Err(ended);
            }
        };
        let bytes: u64 = added.iter().map(|table| table.summary.size).sum();
        let mut read: BTreeMap<TableId, u64> = BTreeMap::new();
        for source in merge.sources_mut() {
            *read.entry(source.table.id()).or_default() += source.bytes;
        }
        let records = merge.stats();
        // The inputs are let go before the commit, so that their files can be removed after it.
        drop((merge, set));
        let of = |id| read.get(&id).copied().unwrap_or(0);
        self.tables.commit(opened, |layout| step.edit(layout, added, &of)).await?;
        self.count(|stats| {
            *(if step.is_bottom() { &mut stats.steps } else { &mut stats.tier_steps }) += 1;
            stats.bytes_read += read.values().sum::<u64>();
            stats.bytes_written += bytes;
            stats.records.read += records.read;
            stats.records.dropped += records.dropped;
            stats.records.purged += records.purged;
            stats.records.kept += records.kept;
        });
        self.pace.borrow_mut().compacted(bytes, breath.worked());
        Ok(())
    }

    fn open_inputs(&self, set: &Rc<TableSet<D::File>>, step: &Step) -> Merge<Slice<D::File>> {
        let inputs: Vec<_> = set
            .tables()
            .filter(|live| {
                let id = live.entry().id();
                step.upper.contains(&id) || step.last.contains(&id)
            })
            .flat_map(|live| {
                let ranges: Vec<_> = live.entry().live.within(&step.range).collect();
                ranges.into_iter().map(|range| (Rc::clone(live.table()), range))
            })
            .collect();
        let read_size = (READ_MEMORY / inputs.len().max(1)).clamp(READ_MIN, READ_MAX);
        let slices = inputs
            .into_iter()
            .map(|(table, range)| Slice::new(table, range, read_size, set))
            .collect();
        // Replicas let a record expire at the same moment, as well as their clocks agree on it.
        let now = self.runtime.wall().0.saturating_sub(CLOCK_OFFSET_MAX_US);
        let bottom = step.is_bottom().then_some(set.layout().released);
        Merge::new(slices, WallMicros(now), bottom)
    }

    fn open_output(&self, step: &Step) -> Output<D> {
        let options = match step.into {
            Level::Upper { .. } => &self.options.upper,
            Level::Last => &self.options.last,
        };
        let plan = &self.options.plan;
        let cutter = Cutter::new(plan.partition_bits, plan.table_size, step.bytes);
        let now = self.runtime.wall();
        Output::new(self.tables.clone(), options.clone(), step.into, now, cutter)
    }

    async fn write(
        &self,
        merge: &mut Merge<Slice<D::File>>,
        output: &mut Output<D>,
        breath: &mut Breath<R>,
    ) -> Outcome<()> {
        // The first reads of all inputs together; later ones come as each runs dry.
        try_join_all(merge.sources_mut().iter_mut().map(Slice::refill)).await?;
        loop {
            match merge.poll(&*self.retention) {
                Want::Ready => {
                    let record = merge.record();
                    let work = work_of(&record);
                    if output.needs_table(&record) {
                        output.next_table().await?;
                    }
                    let is_full = output.add(&record, breath).await?;
                    merge.advance();
                    if is_full {
                        let bytes = output.flush().await?;
                        let not_before = self.pace.borrow_mut().take(self.runtime.now(), bytes);
                        breath.take(Some(not_before)).await?;
                    } else if breath.is_due(work) {
                        breath.take(None).await?;
                    }
                }
                Want::Gone => {
                    if breath.is_due(40) {
                        breath.take(None).await?;
                    }
                }
                Want::Dry(index) => {
                    merge.sources_mut()[index].refill().await?;
                    if self.stop.get() {
                        return Err(Ended::Stopped);
                    }
                }
                Want::Finished => return Ok(()),
            }
        }
    }
}

/// The live records of one table in one range.
struct Slice<F> {
    set: Rc<TableSet<F>>,
    table: Rc<Table<F>>,
    scan: TableScan<F>,
    range: TokenRange,
    block: Option<Block>,
    /// Positions in the block that are still to come.
    next: usize,
    end: usize,
    finished: bool,
    /// Bytes of the blocks read.
    bytes: u64,
}

impl<F: File> Slice<F> {
    fn new(
        table: Rc<Table<F>>,
        range: TokenRange,
        read_size: usize,
        set: &Rc<TableSet<F>>,
    ) -> Slice<F> {
        let set = Rc::clone(set);
        let scan = TableScan::new(Rc::clone(&table), range, read_size);
        Slice { set, table, scan, range, block: None, next: 0, end: 0, finished: false, bytes: 0 }
    }

    /// Reads on until a record of the range is in memory, or the end.
    async fn refill(&mut self) -> Result<()> {
        while self.next == self.end && !self.finished {
            self.block = match self.scan.next_block().await {
                // What it held was merged in again: it is left behind.
                Err(error) if is_voided(self.set.layout(), self.table.id(), &error) => continue,
                block => block?,
            };
            match &self.block {
                Some(block) => {
                    let positions = block.positions(self.range);
                    (self.next, self.end) = (positions.start, positions.end);
                    self.bytes += u64::from(block.handle().len);
                }
                None => self.finished = true,
            }
        }
        Ok(())
    }
}

impl<F: File> Source for Slice<F> {
    #[inline]
    fn token(&self) -> Option<Token> {
        if self.next == self.end {
            return None;
        }
        self.block.as_ref().map(|block| block.token(self.next))
    }

    #[inline]
    fn record(&self) -> RecordRef<'_> {
        self.block.as_ref().expect("asked after `token` was some").record(self.next)
    }

    #[inline]
    fn advance(&mut self) {
        self.next += 1;
    }

    fn is_finished(&self) -> bool {
        self.finished
    }
}

#[cfg(test)]
#[cfg(feature = "sim")]
mod tests;
