//! Space of dropped incarnations: tables that hold much of them are rewritten or removed, though
//! nobody writes there any more. Pure.
//!
//! Invariant: only records that nobody can read any more go this way, so nothing about versions or
//! floors matters here. Asked when the plan has nothing to do.

use super::merge::Retention;
use super::plan::{Avoid, PlanOptions, Step, step_over};
use crate::disk::File;
use crate::model::WallMicros;
use crate::sstable::TableMeta;
use crate::tables::edit::TableSetEdit;
use crate::tables::layout::to_f64;
use crate::tables::set::TableSet;

/// What gives space back.
#[derive(Debug)]
pub(super) enum Reclaim {
    /// A table without a readable record leaves the set.
    Remove(TableSetEdit),
    /// A last-level table is written anew, with what lies above it.
    Rewrite(Step),
}

/// What to do about the table that holds most of dropped incarnations, if any does.
pub(super) fn reclaim<F: File>(
    set: &TableSet<F>,
    options: &PlanOptions,
    retention: &dyn Retention,
    avoid: &Avoid,
    now: WallMicros,
) -> Option<Reclaim> {
    let share = |table: &TableMeta| {
        let (mut dropped, mut all) = (0, 0);
        for run in &*table.partitions {
            all += run.raw_bytes;
            if retention.is_dropped_run(run) {
                dropped += run.raw_bytes;
            }
        }
        (dropped, all)
    };
    let dead = set.tables().find(|live| {
        let (dropped, all) = share(live.table().meta());
        dropped > 0 && dropped == all
    });
    if let Some(dead) = dead {
        let removed = vec![dead.entry().id()];
        return Some(Reclaim::Remove(TableSetEdit { removed, ..TableSetEdit::default() }));
    }
    let is_due = |dropped: u64, all: u64| to_f64(dropped) >= options.expired_target * to_f64(all);
    set.last()
        .iter()
        .filter(|live| {
            let (dropped, all) = share(live.table().meta());
            dropped > 0 && is_due(dropped, all)
        })
        .map(|live| step_over(set.layout(), live.entry().summary.span, None))
        .find(|step| avoid.allows(set.layout(), step, now))
        .map(Reclaim::Rewrite)
}
