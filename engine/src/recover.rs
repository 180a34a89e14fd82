//! Opening a shard: identity, tables, log, in this order; each step's failure names the file.
//!
//! Invariant: time to open grows with the log's tail and the tables' indexes, not with the data.
//! A directory is made only when it is empty; whatever is missing from one that is not empty is
//! damage, never a fresh start.
//!
//! Damage before valid records of the log is refused, unless the caller accepts what is lost with
//! it. Then everything that can be read goes to tables by one edit, which also releases the log and,
//! in a cluster, declares the shard's whole range unknown: until that edit is durable the next
//! start meets the damage again, afterwards it has nothing to do with it.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use crate::cache::BlockCache;
use crate::compaction::flush::FlushOptions;
use crate::compaction::{Compactor, CompactorOptions, Flushed, Pace, WriteThrottle, flush};
use crate::disk::Disk;
use crate::identity::Identity;
use crate::log::{
    CommitLog, Control, LogIdentity, Loss, Lsn, OnDamage, Relief, ReplayEnd, ReplayItem,
    keep_aside, remove_damaged, replay_with,
};
use crate::model::{NamespaceId, Timestamp, Token, TokenRange, WallMicros, limits};
use crate::options::{Compression, Options};
use crate::runtime::Runtime;
use crate::shard::{
    Counters, FIRST_INCARNATION, Keep, Memory, Notify, Replicas, Scrub, Shard, ShardState,
    SpaceWatch, Thresholds, Unsettled, Versions,
};
use crate::sstable::{Codec, TableOptions};
use crate::tables::facts::{Facts, LOG, Lost};
use crate::tables::{Layout, Owner, TableSet, TableSetEdit, Tables};
use crate::{Error, Result};

/// Directory of the log inside a shard's directory.
pub const LOG_DIR: &str = "log";

/// Which codec a namespace's blocks take; the server changes it as namespaces change.
pub type CompressionOf = Rc<dyn Fn(NamespaceId) -> Compression>;

/// Whose log belongs to an identity.
#[must_use]
pub fn log_identity(identity: &Identity) -> LogIdentity {
    LogIdentity { cluster: identity.cluster, shard: identity.shard }
}

/// What replay gathers.
struct Replayed {
    ceiling: Timestamp,
    sequence: u64,
    greatest: Timestamp,
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Opens the shard in `dir`, or makes it when the directory is missing or empty.
    ///
    /// `wanted` says who the shard must be. `compression` is asked for each namespace when tables
    /// are written. The caller holds the lock of the node's directory.
    ///
    /// # Errors
    /// `Mismatch` when the directory is another's, `Corrupt` (file, offset, remedy) when something
    /// that was durable is missing or damaged, `Invalid` for options, `Io`. State: the files are as
    /// they were, except that leftovers of a crash may be gone.
    pub async fn open(
        disk: D,
        runtime: R,
        dir: &Path,
        wanted: &Identity,
        options: Options,
        compression: Option<CompressionOf>,
    ) -> Result<Shard<D, R>> {
        let refuse = OnDamage::Refuse;
        Shard::open_with(disk, runtime, dir, wanted, options, compression, refuse).await
    }

    /// The same, saying what to do about records of the log that were durable and cannot be read.
    /// Where their loss is accepted it is logged and counted, and the bytes of the damaged segments
    /// stay beside the log as `*.log.damaged`. An older value of a key may be shown where a newer
    /// write is lost; the shard of a cluster has all its range unknown instead, until other replicas
    /// have refilled it.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub async fn open_with(
        disk: D,
        runtime: R,
        dir: &Path,
        wanted: &Identity,
        options: Options,
        compression: Option<CompressionOf>,
        on_damage: OnDamage,
    ) -> Result<Shard<D, R>> {
        let shard = prepare(disk, runtime, dir, wanted, options, compression, on_damage).await?;
        shard.reserve_at_start().await;
        shard.start_tasks();
        Ok(shard)
    }
}

/// Opens the shard, but starts none of its tasks. An attempt that failed leaves no task behind.
pub(crate) async fn prepare<D: Disk, R: Runtime>(
    disk: D,
    runtime: R,
    dir: &Path,
    wanted: &Identity,
    options: Options,
    compression: Option<CompressionOf>,
    on_damage: OnDamage,
) -> Result<Shard<D, R>> {
    options.validate()?;
    let identity = Identity::open_or_create(&disk, dir, wanted).await?;
    let owner = Owner::of(&identity);
    let tables = open_tables(&disk, dir, owner).await?;
    let set = tables.current();
    let released = set.layout().released;
    let replicas = Replicas::new(identity.partition_bits, &set.layout().replicas);
    let memory = Rc::new(RefCell::new(Memory::new(options.memtable_size, replicas)));
    let log_dir = dir.join(LOG_DIR);
    disk.create_dir(&log_dir).await?;
    disk.sync_dir(dir).await?;

    let table_options = table_options(&options, compression.clone());
    let compactor_options = CompactorOptions::of(&options, &table_options);
    let upper_tables = compactor_options.upper.clone();
    let spill = Spill {
        tables: tables.clone(),
        runtime: runtime.clone(),
        memory: Rc::clone(&memory),
        upper_tables: upper_tables.clone(),
        options,
        spilled: Rc::default(),
    };
    let mut found = Replayed { ceiling: Timestamp::ZERO, sequence: 0, greatest: Timestamp::ZERO };
    let mut visit = |lsn: Lsn, item: ReplayItem<'_>| {
        match item {
            ReplayItem::Record(record) => {
                found.greatest = found.greatest.max(record.timestamp);
                if on_damage == OnDamage::Accept {
                    memory.borrow_mut().follow_incarnation(&record);
                }
            }
            ReplayItem::Control(Control::Ceiling { timestamp, sequence }) => {
                found.ceiling = found.ceiling.max(timestamp);
                found.sequence = found.sequence.max(sequence);
            }
            ReplayItem::Control(_) => {}
        }
        memory.borrow_mut().show(lsn, &item);
    };
    let from = released.next();
    let mut relief = || spill.relief();
    let log_id = log_identity(&identity);
    let replayed = replay_with(&disk, &log_dir, log_id, from, on_damage, &mut visit, &mut relief);
    let end = replayed.await;
    let mut end = match end {
        Ok(end) => end,
        Err(error) => return spill.abandon(error).await,
    };
    if let Some(torn) = &end.torn {
        tracing::info!(
            file = %torn.path.display(),
            offset = torn.offset,
            "the log's torn tail was cut: only writes that were never acknowledged"
        );
    }
    tracing::debug!(dir = %dir.display(), records = end.records, bytes = end.bytes, "replayed");
    let logged = set.layout().logged;
    if end.last < logged {
        let what = format!(
            "the log ends with record {}, but records up to {} were durable once: its last segment is missing",
            end.last.0, logged.0
        );
        if on_damage == OnDamage::Refuse {
            return spill.abandon(Error::corrupt(&log_dir, 0, what)).await;
        }
        end.lose_end(&log_dir, what, logged);
    }
    let losses = std::mem::take(&mut end.losses);
    let damaged = std::mem::take(&mut end.damaged);
    let gave_up = (!losses.is_empty()).then_some(end.last);
    if gave_up.is_some() {
        tell_losses(&losses, &end);
        let kept = match spill.all().await {
            Ok(()) => keep_aside(&disk, &log_dir, &damaged).await,
            failed => failed,
        };
        if let Err(error) = kept {
            return spill.abandon(error).await;
        }
        found.outlast_losses(runtime.wall());
    }
    // Closed in good order, and this is not the log of a snapshot: nothing can have been lost.
    let is_clean = end.clean && logged >= end.last && end.last > Lsn::ZERO;

    let tables_max = greatest_stamp(&set);
    let floor = found.ceiling.max(found.greatest).max(tables_max);
    let space = match disk.space(dir).await {
        Ok(space) => space,
        Err(error) => return spill.abandon(error).await,
    };
    let sink_memory = Rc::clone(&memory);
    let sink = Box::new(move |lsn: Lsn, item: &ReplayItem<'_>| {
        sink_memory.borrow_mut().show(lsn, item);
    });
    let started =
        CommitLog::start(disk.clone(), runtime.clone(), log_dir.clone(), options.log, end, sink)
            .await;
    let log = match started {
        Ok(log) => log,
        Err(error) => return spill.abandon(error).await,
    };
    let versions = versions(&memory, &identity, &options, &found, floor, is_clean);
    let committed = match gave_up {
        None => spill.commit(&log, versions.ceiling()).await,
        Some(last) => match spill.commit_rest(&log, versions.ceiling(), last).await {
            // Nothing asks for the damaged segments any more.
            Ok(at) => remove_damaged(&disk, &log_dir, &damaged).await.map(|()| at),
            failed => failed,
        },
    };
    let ceiling_at = match committed {
        Ok(ceiling_at) => ceiling_at,
        Err(error) => {
            // No task of the log outlives a failed start.
            let _ = log.close().await;
            return Err(error);
        }
    };
    // Each start checks from elsewhere on: a life may be too short to come round.
    let begun = [u64::from(identity.node.0), u64::from(identity.shard), runtime.wall().0];
    let begun: Vec<u8> = begun.iter().flat_map(|part| part.to_le_bytes()).collect();
    let scrub_start = Token::of_key(&begun, identity.hash_seed);
    let counters = Counters {
        log_losses: losses.len() as u64,
        log_records_lost: losses.iter().map(Loss::count).sum(),
        ..Counters::default()
    };
    let tables_max = greatest_stamp(&tables.current());
    let pace = Rc::new(RefCell::new(Pace::new(&options.compaction)));
    let stop = Rc::new(Cell::new(false));
    let keep = Rc::new(Keep::new(Rc::clone(&memory), options.replicated));
    let compactor = Compactor::new(
        tables.clone(),
        runtime.clone(),
        compactor_options,
        Rc::clone(&keep) as Rc<_>,
        Rc::clone(&pace),
        Rc::clone(&stop),
    );
    let thresholds = Thresholds {
        pace: options.space.pace_below,
        refuse: options.space.refuse_below,
        reserve: options.space.reserve,
    };
    let state = Rc::new(ShardState {
        disk,
        runtime,
        dir: dir.to_owned(),
        identity,
        options,
        log,
        memory,
        tables,
        tables_max: Cell::new(tables_max),
        compactor,
        cache: RefCell::new(BlockCache::new(options.cache_size)),
        versions: RefCell::new(versions),
        ceiling_at: Cell::new(ceiling_at),
        control_at: Cell::default(),
        whole: Cell::new(false),
        unsettled: RefCell::new(Unsettled::new()),
        reserved: RefCell::default(),
        space: SpaceWatch::new(thresholds, space),
        scrub: Scrub::new(scrub_start),
        scrub_asked: Notify::default(),
        stats: RefCell::new(counters),
        dropped_at: Cell::new(Lsn::ZERO),
        keep,
        damaged: RefCell::default(),
        compression,
        upper_tables,
        pace,
        delay_per_byte: Cell::new(0.0),
        delay_max: Cell::new(crate::compaction::pace::DELAY_MAX_NANOS),
        bytes_since_pressure: Cell::new(0),
        pressure_epoch: Cell::new(0),
        throttle: RefCell::new(WriteThrottle::default()),
        read_times: crate::shard::ReadTimes::default(),
        watch_nanos: Cell::new(0),
        stop,
        lifecycle: Notify::default(),
        work: Notify::default(),
        tasks_running: Cell::new(0),
        closing: Cell::default(),
        background_error: RefCell::new(None),
    });
    let weak = Rc::downgrade(&state);
    state.tables.on_removed(move |table| {
        if let Some(state) = weak.upgrade() {
            state.cache.borrow_mut().remove_table(table);
        }
    });
    let shard = Shard { state };
    shard.update_pressure();
    Ok(shard)
}

impl Replayed {
    /// Ceilings may be among what is lost. Stamps are reserved at most so far ahead of the clock, and
    /// no partition is ever written once a microsecond: so both begin where none was used.
    fn outlast_losses(&mut self, wall: WallMicros) {
        self.sequence = self.sequence.max(wall.0);
        let ahead = WallMicros(wall.0 + limits::CLOCK_OFFSET_MAX_US / 2);
        self.ceiling = self.ceiling.max(Timestamp::new(ahead, 0));
    }
}

/// Says what is given up, for whoever reads the log of the process.
fn tell_losses(losses: &[Loss], end: &ReplayEnd) {
    for loss in losses {
        tracing::warn!(
            file = %loss.path.display(),
            offset = loss.offset,
            damage = %loss.what,
            lost = %loss.extent(),
            "a part of the commit log is given up; the bytes are kept as *.log.damaged"
        );
    }
    tracing::warn!(records = end.records, "the valid rest of the commit log was kept");
}

/// The greatest stamp of any record in tables, those that were lost to damage included.
fn greatest_stamp<F>(set: &TableSet<F>) -> Timestamp {
    let layout = set.layout();
    let live = layout.entries().map(|entry| entry.summary.max_timestamp);
    live.chain(layout.lost.iter().map(|lost| lost.max_timestamp)).max().unwrap_or_default()
}

/// Below the first sequence of a directory. A node that has lost its directory starts again under
/// the same id, and must not give out a dot that it gave out before, which only the others remember:
/// so sequences begin at the microsecond in which the directory was made, and no partition is ever
/// written once a microsecond. What lies below is a gap like that of a crash: it ends when all
/// members have told what they have of it, and given it back.
pub(crate) fn first_sequence(identity: &Identity, options: &Options) -> u64 {
    if options.replicated { identity.created.0 } else { 0 }
}

/// Where clock, sequences and incarnations begin.
fn versions(
    memory: &RefCell<Memory>,
    identity: &Identity,
    options: &Options,
    found: &Replayed,
    floor: Timestamp,
    is_clean: bool,
) -> Versions {
    let own = identity.node;
    let memory = &mut *memory.borrow_mut();
    let replicas = memory.replicas();
    let first = first_sequence(identity, options);
    let seen = replicas.partitions().map(|id| replicas.of(id).seen.last(own));
    let sequence = seen.fold(found.sequence.max(first), u64::max);
    let mut versions = Versions::starting_above(floor, sequence, identity.partition_bits);
    for partition in replicas.partitions() {
        let replica = replicas.of(partition);
        if replica.incarnation > FIRST_INCARNATION {
            // What the earlier ones had issued is not known: above the ceiling, whatever happened.
            versions.begin(partition, replica.incarnation);
        } else if is_clean && options.replicated {
            versions.go_on_from(partition, replica.seen.last(own).max(first));
        }
    }
    if !options.replicated {
        // Nobody else has what was lost. After a clean close too: the log does not say which of the
        // lives before it began so, and contexts that were given out then go up to its ceiling.
        memory.replicas_mut().void(own, sequence, floor);
    }
    versions
}

/// Flushes that wait for their commit, and up to which record each reaches.
type Spilled<D> = Vec<(Flushed<D>, Lsn)>;

/// Memtables that replay has filled and that do not all fit the memory: written to tables while it
/// goes on.
///
/// The tables become live only when the log has begun its next life and holds the ceiling again,
/// because replay begins behind them from then on. Until then no edit names them: a crash, or
/// damage found later in the log, leaves everything as it was.
struct Spill<D: Disk, R: Runtime> {
    tables: Tables<D>,
    runtime: R,
    memory: Rc<RefCell<Memory>>,
    upper_tables: TableOptions,
    options: Options,
    spilled: Rc<RefCell<Spilled<D>>>,
}

impl<D: Disk, R: Runtime> Spill<D, R> {
    /// The flush of the oldest memtable, when more are sealed than may wait.
    fn relief(&self) -> Option<Relief> {
        self.flush_beyond(self.options.memtables_sealed_max)
    }

    /// Flushes all that is in memory.
    async fn all(&self) -> Result<()> {
        self.memory.borrow_mut().seal();
        while let Some(relief) = self.flush_beyond(0) {
            relief.await?;
        }
        Ok(())
    }

    /// The flush of the oldest memtable, when more than so many are sealed.
    fn flush_beyond(&self, count: usize) -> Option<Relief> {
        let memory = self.memory.borrow();
        if memory.sealed_count() <= count {
            return None;
        }
        let sealed = memory.oldest_sealed()?;
        let options = FlushOptions {
            table: self.upper_tables.clone(),
            table_size: self.options.compaction.table_size,
            order: self.tables.next_order(),
            released: sealed.last,
            replicas: sealed.replicas.clone(),
        };
        let (tables, runtime) = (self.tables.clone(), self.runtime.clone());
        let (memory, spilled) = (Rc::clone(&self.memory), Rc::clone(&self.spilled));
        let retention = Keep::new(Rc::clone(&memory), self.options.replicated);
        Some(Box::pin(async move {
            let never = Rc::new(Cell::new(false));
            let records = sealed.memtable.sorted();
            let written = flush(&tables, &runtime, &retention, records, options, &never).await?;
            let flushed = written.expect("nobody stops it");
            spilled.borrow_mut().push((flushed, sealed.last));
            memory.borrow_mut().remove_oldest_sealed();
            Ok(())
        }))
    }

    /// Removes what was written, because the shard cannot be opened.
    async fn abandon<T>(&self, error: Error) -> Result<T> {
        for (flushed, _) in self.spilled.take() {
            let ids: Vec<_> = flushed.opened.iter().map(|table| table.id()).collect();
            drop(flushed);
            self.tables.abandon(&ids).await;
        }
        Err(error)
    }

    /// Makes the tables live. Returns the record of the log that holds the ceiling, if one does.
    async fn commit(&self, log: &CommitLog<D, R>, ceiling: Control<'_>) -> Result<Lsn> {
        let spilled = self.spilled.take();
        let Some((_, last)) = spilled.last() else { return Ok(Lsn::ZERO) };
        let last = *last;
        tracing::info!(tables = spilled.len(), "replay wrote what did not fit the memory");
        let ceiling_at = log.append_control(ceiling)?;
        log.wait_durable(ceiling_at).await?;
        for (flushed, _) in spilled {
            flushed.commit(&self.tables, log.durable()).await?;
        }
        log.release(last);
        Ok(ceiling_at)
    }

    /// After [`Spill::all`]: makes everything live that could be read of a log up to `last`, and
    /// lets it go, by one edit. In a cluster it also says that records of any token may be missing.
    /// Returns the record of the log that holds the ceiling.
    async fn commit_rest(
        &self,
        log: &CommitLog<D, R>,
        ceiling: Control<'_>,
        last: Lsn,
    ) -> Result<Lsn> {
        let ceiling_at = log.append_control(ceiling)?;
        log.wait_durable(ceiling_at).await?;
        let spilled = self.spilled.take();
        let opened = spilled.iter().flat_map(|(flushed, _)| flushed.opened.clone()).collect();
        let added = spilled.iter().flat_map(|(flushed, _)| flushed.edit.added.clone()).collect();
        let Control::Ceiling { timestamp: max_timestamp, .. } = ceiling else {
            unreachable!("nothing else is a ceiling")
        };
        let replicas = self.memory.borrow().replicas().clone();
        let edit = |layout: &Layout| {
            let lost = self.options.replicated.then(|| {
                let earlier = layout.lost.iter().filter(|lost| lost.table != LOG).copied();
                let lose = |range| Lost { table: LOG, range, max_timestamp };
                earlier.chain(written_ranges(&replicas).into_iter().map(lose)).collect()
            });
            let replicas = replicas.changes(&layout.replicas);
            let facts = Facts { logged: log.durable(), lost, replicas, ..Facts::default() };
            TableSetEdit { added, released: Some(last), facts, ..TableSetEdit::default() }
        };
        self.tables.commit(opened, edit).await?;
        log.release(last);
        Ok(ceiling_at)
    }
}

/// The tokens of all partitions that have seen anything. Of the others this shard has no replica, or
/// one that lacks everything, and is sent everything.
fn written_ranges(replicas: &Replicas) -> Vec<TokenRange> {
    let mut ranges: Vec<TokenRange> = Vec::new();
    for partition in replicas.partitions().filter(|id| !replicas.of(*id).seen.is_empty()) {
        let range = partition.range(replicas.bits());
        match ranges.last_mut() {
            Some(before) if before.last.0.wrapping_add(1) == range.first.0 => {
                before.last = range.last;
            }
            _ => ranges.push(range),
        }
    }
    ranges
}

/// Opens the live tables; makes an empty set only where nothing but the identity is.
async fn open_tables<D: Disk>(disk: &D, dir: &Path, owner: Owner) -> Result<Tables<D>> {
    let names = disk.list(dir).await?;
    if names.iter().any(|name| crate::tables::manifest::parse_manifest_name(name).is_some()) {
        return Tables::open(disk.clone(), dir, owner).await;
    }
    // The first start may have been cut short before the manifest: then there is no log either.
    let log = match disk.list(&dir.join(LOG_DIR)).await {
        Err(error) if error.is_not_found() => Vec::new(),
        names => names?,
    };
    if !log.is_empty() {
        return Err(Error::corrupt(
            dir,
            0,
            "the manifest is missing, but there is a log: this is no new shard",
        ));
    }
    Tables::create(disk.clone(), dir, owner).await
}

fn table_options(options: &Options, compression: Option<CompressionOf>) -> TableOptions {
    let default = options.compression;
    let codec = |compression| match compression {
        Compression::None => Codec::None,
        Compression::Lz4 => Codec::Lz4,
        Compression::Zstd { .. } => Codec::Zstd,
    };
    let zstd_level = if let Compression::Zstd { level } = default { level } else { 1 };
    TableOptions {
        codec_of: Rc::new(move |namespace| {
            codec(compression.as_ref().map_or(default, |compression| compression(namespace)))
        }),
        zstd_level,
        ..TableOptions::default()
    }
}
