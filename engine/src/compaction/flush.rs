//! Flush: a sealed memtable, sorted, becomes one upper table (more when it is large).
//!
//! The edit is returned, not committed: the shard commits it, which makes the tables visible, and
//! only then forgets the memtable and releases the log. Until then a crash leaves files that no
//! edit names, and the log still has the records. On the write path, in the background.

use std::cell::Cell;
use std::rc::Rc;

use super::merge::Retention;
use super::output::{Breath, Ended, Outcome, Output, work_of};
use super::plan::Cutter;
use crate::disk::Disk;
use crate::error::Result;
use crate::log::Lsn;
use crate::model::RecordRef;
use crate::runtime::Runtime;
use crate::shard::Replicas;
use crate::sstable::{Table, TableOptions};
use crate::tables::edit::{Level, TableSetEdit};
use crate::tables::store::Tables;

/// What to flush, and how.
#[derive(Clone, Debug)]
pub struct FlushOptions {
    /// How upper tables are written.
    pub table: TableOptions,
    /// Bytes after which a new table is begun at the next partition.
    pub table_size: u64,
    /// From [`Tables::next_order`], taken in the order in which memtables were sealed.
    pub order: u64,
    /// Everything up to here is in this memtable or in tables.
    pub released: Lsn,
    /// The partitions as they were then.
    pub(crate) replicas: Replicas,
}

/// A flush that waits for its commit.
pub struct Flushed<D: Disk> {
    /// The new tables, open.
    pub opened: Vec<Rc<Table<D::File>>>,
    /// Adds them, and says how far the log may be released.
    pub edit: TableSetEdit,
    /// The partitions as of then.
    replicas: Replicas,
    /// Bytes written.
    pub bytes: u64,
    /// Time it took, in nanoseconds.
    pub nanos: u64,
}

impl<D: Disk> Flushed<D> {
    /// Makes the flush durable and visible. The log is known to be durable up to `logged`.
    ///
    /// # Errors
    /// As [`Tables::commit`]: nothing is visible; flush again.
    pub async fn commit(self, tables: &Tables<D>, logged: Lsn) -> Result<()> {
        let Flushed { opened, mut edit, replicas, .. } = self;
        tables
            .commit(opened, |layout| {
                edit.facts.replicas = replicas.changes(&layout.replicas);
                edit.facts.logged = logged;
                edit
            })
            .await
    }
}

/// Writes `records`, in `(token, namespace, key)` order and without duplicates, to new upper
/// tables. Yields after each MiB and each 200 us. `None` when `stop` was set meanwhile.
///
/// # Errors
/// Of the disk, `Full` included. State: nothing is visible, the files are removed.
pub async fn flush<'a, D: Disk, R: Runtime>(
    tables: &Tables<D>,
    runtime: &R,
    retention: &dyn Retention,
    records: impl Iterator<Item = RecordRef<'a>>,
    options: FlushOptions,
    stop: &Rc<Cell<bool>>,
) -> Result<Option<Flushed<D>>> {
    let mut breath = Breath::new(runtime.clone(), Rc::clone(stop));
    // How much is to come is not known.
    let cutter = Cutter::new(options.table.partition_bits, options.table_size, u64::MAX);
    let level = Level::Upper { order: options.order };
    let mut output =
        Output::new(tables.clone(), options.table.clone(), level, runtime.wall(), cutter);
    let written = match write(&mut output, &mut breath, retention, records).await {
        Ok(()) => output.finish().await.map_err(Ended::from),
        Err(ended) => Err(ended),
    };
    match written {
        Ok((added, opened)) => {
            let bytes = added.iter().map(|table| table.summary.size).sum();
            let next_order = options.order + 1;
            let released = Some(options.released);
            let edit = TableSetEdit { added, released, next_order, ..TableSetEdit::default() };
            let (replicas, nanos) = (options.replicas, breath.worked());
            Ok(Some(Flushed { opened, edit, replicas, bytes, nanos }))
        }
        Err(ended) => {
            output.abandon().await;
            match ended {
                Ended::Stopped => Ok(None),
                Ended::Failed(error) => Err(error),
            }
        }
    }
}

async fn write<'a, D: Disk, R: Runtime>(
    output: &mut Output<D>,
    breath: &mut Breath<R>,
    retention: &dyn Retention,
    records: impl Iterator<Item = RecordRef<'a>>,
) -> Outcome<()> {
    for record in records {
        if retention.is_dropped(&record) {
            continue;
        }
        if output.needs_table(&record) {
            output.next_table().await?;
        }
        if output.add(&record, breath).await? {
            output.flush().await?;
            breath.take(None).await?;
        } else if breath.is_due(work_of(&record)) {
            breath.take(None).await?;
        }
    }
    Ok(())
}
