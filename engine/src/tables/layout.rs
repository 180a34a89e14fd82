//! `Layout`: which tables are live, where, and which tokens of them still count. Pure.
//!
//! Invariants: upper tables are sorted newest first; last-level tables by token, and their spans
//! do not overlap; an upper table has tokens left (else an edit has removed it); ids are below
//! `next_table` and orders below `next_order`. `apply` is the only change, and refuses an edit
//! that does not fit, which at replay means damage. The plan, the manifest and the open tables
//! (`TableSet`) all work on this one description.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::arcs::Arcs;
use super::edit::{AddedTable, Consumed, Level, TableSetEdit, TableSummary};
use super::facts::{Facts, Lost, Replica};
use super::ranges::Ranges;
use crate::log::Lsn;
use crate::model::{PartitionId, Token, TokenRange};
use crate::sstable::TableId;

/// One live table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub level: Level,
    /// What it is.
    pub summary: TableSummary,
    /// The tokens that may be read in it.
    pub live: Ranges,
    /// Bytes of its file that still count, about.
    pub live_bytes: u64,
    /// Whether a snapshot shares the file, so that no byte of it may change.
    pub shared: bool,
}

impl Entry {
    fn new(table: &AddedTable) -> Entry {
        Entry {
            level: table.level,
            summary: table.summary,
            live: Ranges::of(table.summary.span),
            live_bytes: table.summary.size,
            shared: false,
        }
    }

    /// The table's id.
    #[must_use]
    pub fn id(&self) -> TableId {
        self.summary.id
    }

    /// Bytes of live records with tokens in `range`, estimated: tokens are hashes, so evenly.
    #[must_use]
    pub fn bytes_within(&self, range: &TokenRange) -> f64 {
        let width = self.live.width();
        if width == 0.0 {
            0.0
        } else {
            to_f64(self.live_bytes) * self.live.width_within(range) / width
        }
    }

    /// Tombstones that still count, estimated like [`Entry::bytes_within`].
    #[must_use]
    pub fn live_tombstones(&self) -> f64 {
        let size = to_f64(self.summary.size).max(1.0);
        to_f64(self.summary.tombstone_count) * (to_f64(self.live_bytes) / size)
    }
}

/// Totals of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LayoutStats {
    /// Upper tables.
    pub upper_tables: usize,
    /// Their live bytes.
    pub upper_bytes: u64,
    /// Last-level tables.
    pub last_tables: usize,
    /// Their bytes.
    pub last_bytes: u64,
    /// Records in all live tables, overwritten ones included.
    pub records: u64,
    /// Most upper tables that hold one token.
    pub depth_max: usize,
}

/// The live tables of a shard.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    upper: Vec<Rc<Entry>>,
    last: Vec<Rc<Entry>>,
    arcs: OnceCell<Arcs>,
    /// Records up to here are in tables.
    pub released: Lsn,
    /// Where the next compaction step starts.
    pub hand: Token,
    /// No table id at or above it has been used.
    pub next_table: u64,
    /// No upper table has this order or a greater one.
    pub next_order: u64,
    /// Records of the log up to here were durable once.
    pub logged: Lsn,
    /// What is lost of tables that were put aside.
    pub lost: Vec<Lost>,
    /// Blocks of live tables, by offset, that cannot be read and are missed no more.
    pub voided: BTreeSet<(TableId, u64)>,
    /// Partitions that have seen something or were dropped, as of `released`.
    pub replicas: Rc<BTreeMap<PartitionId, Replica>>,
}

impl PartialEq for Layout {
    fn eq(&self, other: &Layout) -> bool {
        let key =
            |layout: &Layout| (layout.released, layout.hand, layout.next_table, layout.next_order);
        self.upper == other.upper
            && self.last == other.last
            && key(self) == key(other)
            && (self.logged, &self.lost) == (other.logged, &other.lost)
            && self.voided == other.voided
            && self.replicas == other.replicas
    }
}

impl Layout {
    /// Upper tables, newest first.
    #[must_use]
    pub fn upper(&self) -> &[Rc<Entry>] {
        &self.upper
    }

    /// Last-level tables by token.
    #[must_use]
    pub fn last(&self) -> &[Rc<Entry>] {
        &self.last
    }

    /// All tables: upper newest first, then the last level by token.
    pub fn entries(&self) -> impl Iterator<Item = &Rc<Entry>> {
        self.upper.iter().chain(&self.last)
    }

    /// The upper tables of each token. Built at the first call.
    #[must_use]
    pub fn arcs(&self) -> &Arcs {
        self.arcs.get_or_init(|| Arcs::build(&self.upper))
    }

    /// Place in [`Layout::last`] of the table whose span holds the token.
    #[inline]
    #[must_use]
    pub fn last_at(&self, token: Token) -> Option<usize> {
        let after = self.last.partition_point(|entry| entry.summary.span.first <= token);
        let place = after.checked_sub(1)?;
        (token <= self.last[place].summary.span.last).then_some(place)
    }

    /// Live bytes of the upper tables with tokens in `range`, estimated.
    #[must_use]
    pub fn upper_within(&self, range: &TokenRange) -> f64 {
        self.upper.iter().map(|entry| entry.bytes_within(range)).sum()
    }

    /// Totals.
    #[must_use]
    pub fn stats(&self) -> LayoutStats {
        LayoutStats {
            upper_tables: self.upper.len(),
            upper_bytes: self.upper.iter().map(|entry| entry.live_bytes).sum(),
            last_tables: self.last.len(),
            last_bytes: self.last.iter().map(|entry| entry.live_bytes).sum(),
            records: self.entries().map(|entry| entry.summary.record_count).sum(),
            depth_max: self.arcs().depth_max(),
        }
    }

    /// The layout after an edit. Costs O(tables).
    ///
    /// # Errors
    /// The first way in which the edit does not fit this layout.
    pub fn apply(&self, edit: &TableSetEdit) -> Result<Layout, String> {
        let mut next = if edit.whole { Layout::default() } else { self.clone() };
        next.arcs = OnceCell::new();
        next.remove(&edit.removed)?;
        let mut ids: BTreeSet<TableId> = match edit.added.is_empty() {
            true => BTreeSet::new(),
            false => next.entries().map(|entry| entry.id()).collect(),
        };
        let mut last_added = false;
        for table in &edit.added {
            if !ids.insert(table.summary.id) {
                return Err(format!("table {} is added twice", table.summary.id.0));
            }
            next.next_table = next.next_table.max(table.summary.id.0.saturating_add(1));
            match table.level {
                Level::Upper { order } => {
                    next.next_order = next.next_order.max(order.saturating_add(1));
                    next.upper.push(Rc::new(Entry::new(table)));
                }
                Level::Last => {
                    last_added = true;
                    next.last.push(Rc::new(Entry::new(table)));
                }
            }
        }
        next.upper.sort_by_key(|entry| match entry.level {
            Level::Upper { order } => (std::cmp::Reverse(order), entry.summary.span.first),
            Level::Last => unreachable!("only upper tables are pushed to upper"),
        });
        if last_added {
            next.last.sort_by_key(|entry| entry.summary.span.first);
            next.check_last()?;
        }
        next.consume(&edit.consumed)?;
        next.share(&edit.shared)?;
        next.released = next.released.max(edit.released.unwrap_or_default());
        next.hand = edit.hand.unwrap_or(next.hand);
        next.next_table = next.next_table.max(edit.next_table);
        next.next_order = next.next_order.max(edit.next_order);
        next.learn(&edit.facts);
        Ok(next)
    }

    /// The edit that states this layout from nothing.
    #[must_use]
    pub fn to_edit(&self) -> TableSetEdit {
        let added = self
            .entries()
            .map(|entry| AddedTable { level: entry.level, summary: entry.summary })
            .collect();
        TableSetEdit {
            whole: true,
            added,
            removed: Vec::new(),
            consumed: self.upper.iter().flat_map(|entry| consumed_parts(entry)).collect(),
            shared: self.entries().filter(|entry| entry.shared).map(|entry| entry.id()).collect(),
            released: Some(self.released),
            hand: Some(self.hand),
            next_table: self.next_table,
            next_order: self.next_order,
            facts: Facts {
                logged: self.logged,
                lost: Some(self.lost.clone()),
                voided: Some(self.voided.iter().copied().collect()),
                replicas: self.replicas.iter().map(|(id, it)| (*id, it.clone())).collect(),
            },
        }
    }

    fn learn(&mut self, facts: &Facts) {
        self.logged = self.logged.max(facts.logged);
        if let Some(lost) = &facts.lost {
            self.lost.clone_from(lost);
        }
        if let Some(voided) = &facts.voided {
            self.voided = voided.iter().copied().collect();
        }
        if !self.voided.is_empty() {
            let live: BTreeSet<TableId> = self.entries().map(|entry| entry.id()).collect();
            self.voided.retain(|(table, _)| live.contains(table));
        }
        if !facts.replicas.is_empty() {
            let replicas = Rc::make_mut(&mut self.replicas);
            replicas.extend(facts.replicas.iter().cloned());
        }
    }

    fn remove(&mut self, removed: &[TableId]) -> Result<(), String> {
        let mut left: BTreeSet<TableId> = removed.iter().copied().collect();
        if !left.is_empty() {
            self.upper.retain(|entry| !left.remove(&entry.id()));
            self.last.retain(|entry| !left.remove(&entry.id()));
        }
        left.first().map_or(Ok(()), |id| Err(format!("removed table {} is not live", id.0)))
    }

    fn share(&mut self, shared: &[TableId]) -> Result<(), String> {
        let mut left: BTreeSet<TableId> = shared.iter().copied().collect();
        if !left.is_empty() {
            for entry in self.upper.iter_mut().chain(&mut self.last) {
                if left.remove(&entry.id()) && !entry.shared {
                    Rc::make_mut(entry).shared = true;
                }
            }
        }
        left.first().map_or(Ok(()), |id| Err(format!("shared table {} is not live", id.0)))
    }

    fn consume(&mut self, parts: &[Consumed]) -> Result<(), String> {
        for part in parts {
            let entry = self.upper.iter_mut().find(|entry| entry.id() == part.table);
            let entry =
                entry.ok_or(format!("consumed upper table {} is not live", part.table.0))?;
            let entry = Rc::make_mut(entry);
            entry.live.subtract(&part.range);
            entry.live_bytes = entry.live_bytes.saturating_sub(part.bytes);
            if entry.live.is_empty() {
                return Err(format!("table {} has no token left, but stays", part.table.0));
            }
        }
        Ok(())
    }

    fn check_last(&self) -> Result<(), String> {
        for pair in self.last.windows(2) {
            if pair[0].summary.span.overlaps(&pair[1].summary.span) {
                return Err(format!(
                    "last-level tables {} and {} overlap",
                    pair[0].id().0,
                    pair[1].id().0
                ));
            }
        }
        Ok(())
    }
}

/// What has been consumed of an entry, as edit records; the bytes are on the first.
fn consumed_parts(entry: &Entry) -> Vec<Consumed> {
    let mut gone = Ranges::of(entry.summary.span);
    entry.live.iter().for_each(|range| gone.subtract(&range));
    let mut bytes = entry.summary.size - entry.live_bytes;
    gone.iter()
        .map(|range| Consumed { table: entry.id(), range, bytes: std::mem::take(&mut bytes) })
        .collect()
}

/// A byte count as a weight.
#[expect(clippy::cast_precision_loss, reason = "a weight; 53 bits are plenty")]
pub(crate) fn to_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::Timestamp;

    pub(crate) fn table(id: u64, level: Level, span: (u64, u64), size: u64) -> AddedTable {
        AddedTable {
            level,
            summary: TableSummary {
                id: TableId(id),
                size,
                span: TokenRange { first: Token(span.0), last: Token(span.1) },
                record_count: size / 1024,
                tombstone_count: 0,
                expiring_count: 0,
                min_expiry_ms: 0,
                max_expiry_ms: 0,
                max_timestamp: Timestamp(id),
                written_ms: 0,
            },
        }
    }

    fn adding(tables: &[AddedTable]) -> TableSetEdit {
        TableSetEdit { added: tables.to_vec(), ..TableSetEdit::default() }
    }

    fn consumed(table: u64, range: (u64, u64), bytes: u64) -> Consumed {
        let range = TokenRange { first: Token(range.0), last: Token(range.1) };
        Consumed { table: TableId(table), range, bytes }
    }

    const UPPER: fn(u64) -> Level = |order| Level::Upper { order };

    #[test]
    fn upper_tables_stand_newest_first_and_last_ones_by_token() {
        let layout = Layout::default()
            .apply(&adding(&[
                table(1, UPPER(1), (0, 9), 10),
                table(2, Level::Last, (50, 99), 10),
                table(3, UPPER(2), (0, 9), 10),
                table(4, Level::Last, (0, 49), 10),
            ]))
            .unwrap();
        let ids = |level: &[Rc<Entry>]| level.iter().map(|e| e.id().0).collect::<Vec<_>>();
        assert_eq!((ids(layout.upper()), ids(layout.last())), (vec![3, 1], vec![4, 2]));
        assert_eq!((layout.next_table, layout.next_order), (5, 3));
        assert_eq!(layout.last_at(Token(50)), Some(1));
        assert_eq!(layout.last_at(Token(100)), None);
    }

    #[test]
    fn edits_that_do_not_fit_are_refused() {
        let base = Layout::default()
            .apply(&adding(&[table(1, UPPER(0), (0, 9), 10), table(2, Level::Last, (0, 9), 10)]))
            .unwrap();
        let edit = TableSetEdit::default;
        for (wrong, why) in [
            (adding(&[table(1, UPPER(3), (0, 1), 1)]), "added twice"),
            (adding(&[table(3, Level::Last, (9, 10), 1)]), "overlap"),
            (TableSetEdit { removed: vec![TableId(7)], ..edit() }, "not live"),
            (TableSetEdit { consumed: vec![consumed(2, (0, 1), 1)], ..edit() }, "not live"),
            (TableSetEdit { consumed: vec![consumed(1, (0, 9), 1)], ..edit() }, "no token left"),
            (TableSetEdit { shared: vec![TableId(7)], ..edit() }, "not live"),
        ] {
            let error = base.apply(&wrong).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_layout_states_itself_in_one_edit() {
        let layout = Layout::default()
            .apply(&adding(&[table(1, UPPER(0), (0, 99), 100), table(2, Level::Last, (0, 9), 10)]))
            .unwrap()
            .apply(&TableSetEdit {
                consumed: vec![consumed(1, (10, 19), 7), consumed(1, (40, 49), 8)],
                shared: vec![TableId(2)],
                released: Some(Lsn(77)),
                hand: Some(Token(50)),
                next_table: 9,
                next_order: 4,
                facts: Facts {
                    logged: Lsn(99),
                    lost: Some(vec![Lost {
                        table: TableId(7),
                        range: TokenRange::FULL,
                        max_timestamp: Timestamp(3),
                    }]),
                    voided: Some(vec![(TableId(1), 4096), (TableId(8), 0)]),
                    replicas: vec![(PartitionId(3), Replica::default())],
                },
                ..TableSetEdit::default()
            })
            .unwrap();
        assert_eq!(layout.upper()[0].live_bytes, 85);
        assert_eq!(layout.voided, BTreeSet::from([(TableId(1), 4096)]), "only of live tables");
        assert_eq!(Layout::default().apply(&layout.to_edit()), Ok(layout));
    }
}
