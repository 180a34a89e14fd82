//! `TableSet`: an immutable snapshot of the live tables, opened. On the read path.
//!
//! Invariant: `upper[i]` and `last[i]` are the open tables of the layout's entries at the same
//! places. A [`LiveTable`] whose entry did not change is shared between snapshots, and lives as
//! long as any snapshot that holds it: that is how the store knows when a file may be removed or
//! a consumed range given back. So a reader keeps the `Rc<TableSet>` or the `Rc<LiveTable>`, not
//! the bare `Rc<Table>`, across its await.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::rc::Rc;

use super::arcs::ArcTable;
use super::layout::{Entry, Layout};
use crate::model::{Timestamp, Token, TokenRange};
use crate::sstable::{Table, TableId};

/// A table with what may be read in it. Derefs to the table.
#[derive(Debug)]
pub struct LiveTable<F> {
    entry: Rc<Entry>,
    table: Rc<Table<F>>,
}

impl<F> LiveTable<F> {
    /// Where it stands and what of it is live.
    #[must_use]
    pub fn entry(&self) -> &Rc<Entry> {
        &self.entry
    }

    /// The open table. See the module for what to hold across an await.
    #[must_use]
    pub fn table(&self) -> &Rc<Table<F>> {
        &self.table
    }
}

impl<F> Deref for LiveTable<F> {
    type Target = Table<F>;
    fn deref(&self) -> &Table<F> {
        &self.table
    }
}

/// A table that may hold a token.
#[derive(Debug)]
pub struct Candidate<'a, F> {
    /// The table.
    pub table: &'a Rc<LiveTable<F>>,
    /// The greatest stamp in all candidates after this one: a last-write-wins reader that holds
    /// a newer record may stop here.
    pub rest_max: Timestamp,
}

/// The live tables of a shard at one moment.
#[derive(Debug)]
pub struct TableSet<F> {
    layout: Layout,
    upper: Vec<Rc<LiveTable<F>>>,
    last: Vec<Rc<LiveTable<F>>>,
}

impl<F> TableSet<F> {
    /// The set of a layout whose tables are all in `opened`.
    ///
    /// # Panics
    /// When a table is not in `opened`: the caller has lost one.
    #[must_use]
    pub fn new(layout: Layout, opened: &BTreeMap<TableId, Rc<Table<F>>>) -> TableSet<F> {
        let open = |entry: &Rc<Entry>| {
            let table = opened.get(&entry.id()).expect("every live table has been opened");
            Rc::new(LiveTable { entry: Rc::clone(entry), table: Rc::clone(table) })
        };
        let upper = layout.upper().iter().map(open).collect();
        let last = layout.last().iter().map(open).collect();
        // Now, so that the first read does not pay for it.
        let _ = layout.arcs();
        TableSet { layout, upper, last }
    }

    /// The set with another layout; new tables come from `opened`, others from this set.
    ///
    /// # Panics
    /// When a table is in neither.
    #[must_use]
    pub fn with(&self, layout: Layout, opened: &BTreeMap<TableId, Rc<Table<F>>>) -> TableSet<F> {
        let upper = carry(&self.upper, layout.upper(), opened);
        let last = carry(&self.last, layout.last(), opened);
        let _ = layout.arcs();
        TableSet { layout, upper, last }
    }

    /// What is live, without files.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Upper tables, newest first.
    #[must_use]
    pub fn upper(&self) -> &[Rc<LiveTable<F>>] {
        &self.upper
    }

    /// Last-level tables, by token.
    #[must_use]
    pub fn last(&self) -> &[Rc<LiveTable<F>>] {
        &self.last
    }

    /// All tables: upper newest first, then the last level by token.
    pub fn tables(&self) -> impl Iterator<Item = &Rc<LiveTable<F>>> {
        self.upper.iter().chain(&self.last)
    }

    /// The open table with this id, if it is live. Costs O(tables).
    #[must_use]
    pub fn table(&self, id: TableId) -> Option<&Rc<LiveTable<F>>> {
        self.tables().find(|table| table.entry.id() == id)
    }

    /// The tables that may hold the token: upper ones newest first, then the last level's. Their
    /// filters have not been asked. Two binary searches, then a slice.
    #[inline]
    #[must_use]
    pub fn candidates(&self, token: Token) -> Candidates<'_, F> {
        let last = self.layout.last_at(token).map(|place| &self.last[place]);
        Candidates {
            upper: &self.upper,
            arc: self.layout.arcs().at(token),
            last,
            last_max: last.map_or(Timestamp::ZERO, |table| table.entry.summary.max_timestamp),
        }
    }

    /// For a scan: each table with live tokens in `range`, newest first, with those tokens. Scans
    /// merge the records of all of them by key.
    pub fn slices(
        &self,
        range: TokenRange,
    ) -> impl Iterator<Item = (&Rc<LiveTable<F>>, Vec<TokenRange>)> {
        self.tables().filter_map(move |table| {
            let parts: Vec<_> = table.entry.live.within(&range).collect();
            (!parts.is_empty()).then_some((table, parts))
        })
    }
}

/// Open tables for `entries`: those of `old` whose entry is the same one, else new ones.
fn carry<F>(
    old: &[Rc<LiveTable<F>>],
    entries: &[Rc<Entry>],
    opened: &BTreeMap<TableId, Rc<Table<F>>>,
) -> Vec<Rc<LiveTable<F>>> {
    let mut next = 0;
    let mut by_id = None;
    let mut carried = Vec::with_capacity(entries.len());
    for entry in entries {
        // Both sides keep their order, so nearly every entry is found by walking along.
        let ahead = old[next..].iter().take(8).position(|live| Rc::ptr_eq(&live.entry, entry));
        if let Some(ahead) = ahead {
            next += ahead + 1;
            carried.push(Rc::clone(&old[next - 1]));
            continue;
        }
        let by_id = by_id.get_or_insert_with(|| {
            old.iter().map(|live| (live.entry.id(), live)).collect::<BTreeMap<_, _>>()
        });
        let before = by_id.get(&entry.id());
        carried.push(match before {
            Some(live) if Rc::ptr_eq(&live.entry, entry) => Rc::clone(live),
            _ => {
                let table = before.map(|live| &live.table).or_else(|| opened.get(&entry.id()));
                let table = Rc::clone(table.expect("a live table is open or was just written"));
                Rc::new(LiveTable { entry: Rc::clone(entry), table })
            }
        });
    }
    carried
}

/// See [`TableSet::candidates`].
#[derive(Debug)]
pub struct Candidates<'a, F> {
    upper: &'a [Rc<LiveTable<F>>],
    arc: &'a [ArcTable],
    last: Option<&'a Rc<LiveTable<F>>>,
    last_max: Timestamp,
}

impl<'a, F: crate::disk::File> Candidates<'a, F> {
    /// Asks the processor for the memory of every candidate's filter.
    pub fn prefetch(&self, token: Token) {
        for table in self.arc {
            self.upper[place(table)].prefetch(token);
        }
        if let Some(last) = self.last {
            last.prefetch(token);
        }
    }
}

impl<'a, F> Iterator for Candidates<'a, F> {
    type Item = Candidate<'a, F>;

    #[inline]
    fn next(&mut self) -> Option<Candidate<'a, F>> {
        if let Some((first, rest)) = self.arc.split_first() {
            self.arc = rest;
            let rest_max = first.rest_max.max(self.last_max);
            return Some(Candidate { table: &self.upper[place(first)], rest_max });
        }
        self.last.take().map(|table| Candidate { table, rest_max: Timestamp::ZERO })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = self.arc.len() + usize::from(self.last.is_some());
        (len, Some(len))
    }
}

impl<F> ExactSizeIterator for Candidates<'_, F> {}

#[inline]
fn place(table: &ArcTable) -> usize {
    usize::try_from(table.place).expect("64-bit host")
}
