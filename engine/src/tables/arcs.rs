//! `Arcs`: for each token the upper tables that may hold it, newest first.
//!
//! The ring is cut wherever a live range of an upper table begins or ends; between two cuts the
//! list is the same for every token, so a read does one binary search over a few hundred u64 and
//! then walks a slice. Invariant: arc `i` covers `starts[i] ..= starts[i + 1] - 1`, the first
//! starts at zero, and a table is in an arc's list if and only if its live ranges hold all tokens
//! of the arc. On the read path, before the filters.

use std::collections::BTreeSet;
use std::rc::Rc;

use super::layout::Entry;
use crate::model::{Timestamp, Token, TokenRange};

/// An upper table in an arc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArcTable {
    /// Its place in the layout's upper tables.
    pub place: u32,
    /// The greatest stamp in the tables of this arc that follow it.
    pub rest_max: Timestamp,
}

/// The upper tables of each token.
#[derive(Clone, Debug, Default)]
pub struct Arcs {
    starts: Vec<u64>,
    /// `tables[ends[i - 1] .. ends[i]]` belongs to arc `i`.
    ends: Vec<usize>,
    tables: Vec<ArcTable>,
    depth_max: usize,
}

impl Arcs {
    /// Cuts the ring for these upper tables, newest first.
    pub(super) fn build(upper: &[Rc<Entry>]) -> Arcs {
        // At a token: these tables begin or end (true, false) to be live.
        let mut cuts: Vec<(u64, bool, u32)> = Vec::with_capacity(upper.len() * 4);
        for (place, entry) in (0u32..).zip(upper) {
            for range in entry.live.iter() {
                cuts.push((range.first.0, true, place));
                if let Some(after) = range.last.0.checked_add(1) {
                    cuts.push((after, false, place));
                }
            }
        }
        cuts.sort_unstable();
        let mut arcs = Arcs::default();
        let mut live = BTreeSet::new();
        if cuts.first().is_none_or(|cut| cut.0 > 0) {
            arcs.push(0, &live, upper);
        }
        let mut index = 0;
        while index < cuts.len() {
            let token = cuts[index].0;
            while index < cuts.len() && cuts[index].0 == token {
                let (_, begins, place) = cuts[index];
                if begins {
                    live.insert(place)
                } else {
                    live.remove(&place)
                };
                index += 1;
            }
            arcs.push(token, &live, upper);
        }
        arcs
    }

    fn push(&mut self, start: u64, live: &BTreeSet<u32>, upper: &[Rc<Entry>]) {
        let from = self.tables.len();
        let entry = |place: u32| &upper[usize::try_from(place).expect("64-bit host")];
        self.tables.extend(live.iter().map(|&place| ArcTable { place, rest_max: Timestamp::ZERO }));
        let mut rest_max = Timestamp::ZERO;
        for table in self.tables[from..].iter_mut().rev() {
            table.rest_max = rest_max;
            rest_max = rest_max.max(entry(table.place).summary.max_timestamp);
        }
        self.starts.push(start);
        self.ends.push(self.tables.len());
        self.depth_max = self.depth_max.max(live.len());
    }

    /// The upper tables that may hold the token, newest first.
    #[inline]
    #[must_use]
    pub fn at(&self, token: Token) -> &[ArcTable] {
        match self.starts.partition_point(|&start| start <= token.0) {
            0 => &[],
            after => self.tables_of(after - 1),
        }
    }

    /// The upper tables of arc `index`, newest first.
    #[must_use]
    pub fn tables_of(&self, index: usize) -> &[ArcTable] {
        let from = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tables[from..self.ends[index]]
    }

    /// The tokens of arc `index`.
    #[must_use]
    pub fn range(&self, index: usize) -> TokenRange {
        let last = self.starts.get(index + 1).map_or(Token::MAX, |next| Token(next - 1));
        TokenRange { first: Token(self.starts[index]), last }
    }

    /// Number of arcs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is no arc: only before `build`.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Most upper tables of one token.
    #[must_use]
    pub fn depth_max(&self) -> usize {
        self.depth_max
    }
}

#[cfg(test)]
mod tests {
    use super::super::edit::{Consumed, Level, TableSetEdit};
    use super::super::layout::{Layout, tests::table};
    use super::*;
    use crate::sstable::TableId;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_token_sees_exactly_the_tables_where_it_is_live(
            spans in prop::collection::vec((0u64..40, 0u64..40), 0..6),
            cuts in prop::collection::vec((0usize..6, 0u64..40, 0u64..40), 0..8),
        ) {
            let mut layout = Layout::default();
            for (order, (a, b)) in (0u64..).zip(&spans) {
                let level = Level::Upper { order };
                // One table in three reaches the end of the ring.
                let last = if order % 3 == 2 { u64::MAX } else { *a.max(b) };
                let added = vec![table(order, level, (*a.min(b), last), 100)];
                layout = layout.apply(&TableSetEdit { added, ..TableSetEdit::default() }).unwrap();
            }
            for (table, a, b) in cuts {
                let range = TokenRange { first: Token(a.min(b)), last: Token(a.max(b)) };
                let consumed = vec![Consumed { table: TableId(table as u64), range, bytes: 1 }];
                let edit = TableSetEdit { consumed, ..TableSetEdit::default() };
                layout = layout.apply(&edit).unwrap_or(layout);
            }
            for token in (0..42).chain([u64::MAX]).map(Token) {
                let seen: Vec<_> = layout.arcs().at(token).iter().map(|t| t.place as usize).collect();
                let expected: Vec<_> =
                    (0..layout.upper().len()).filter(|&p| layout.upper()[p].live.contains(token)).collect();
                prop_assert_eq!(&seen, &expected);
                for (index, arc_table) in layout.arcs().at(token).iter().enumerate() {
                    let rest = seen[index + 1..].iter().map(|&p| layout.upper()[p].summary.max_timestamp);
                    prop_assert_eq!(arc_table.rest_max, rest.max().unwrap_or_default());
                }
                prop_assert!(seen.len() <= layout.arcs().depth_max());
            }
        }
    }
}
