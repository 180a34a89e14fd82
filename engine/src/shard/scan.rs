//! Scans: the records of a token range in order, page by page, merged from memory and tables.
//!
//! Invariant: every record that was in the shard for the whole of a page's making is seen, once,
//! in its newest version. Between pages anything may happen; the caller goes on behind the last
//! key. Used for export, copies and Merkle trees.
//!
//! Memory is asked anew for each step, because it changes while a page waits for the disk. A page
//! ends early when a memtable was sealed meanwhile: what it held might have moved to a table that
//! the page does not know.

use std::rc::Rc;

use super::Shard;
use super::read::Damage;
use super::unknown::is_voided;
use crate::disk::{Disk, File};
use crate::model::{NamespaceId, Record, RecordRef, Token, TokenRange};
use crate::runtime::Runtime;
use crate::sstable::{Block, TableScan};
use crate::tables::{LiveTable, TableSet};
use crate::{Error, Result};

/// Bytes of one read of a scan.
const READ_SIZE: usize = 256 << 10;
/// Records between two looks at other work.
const STEP_RECORDS: usize = 256;

/// Which records.
#[derive(Clone, Copy, Debug)]
pub struct ScanRequest<'a> {
    /// Their tokens.
    pub range: TokenRange,
    /// Only keys behind this one of that namespace, whose token is `range.first`.
    pub after: Option<(NamespaceId, &'a [u8])>,
    /// Only of this namespace.
    pub namespace: Option<NamespaceId>,
}

/// Where a scan stands in one table: the live ranges still to read, and the block at hand.
struct Cursor<F> {
    set: Rc<TableSet<F>>,
    table: Rc<LiveTable<F>>,
    damage: Damage,
    ranges: std::vec::IntoIter<TokenRange>,
    /// The live range that `scan` reads.
    range: TokenRange,
    scan: Option<TableScan<F>>,
    block: Option<(Block, std::ops::Range<usize>)>,
}

impl<F: File> Cursor<F> {
    /// Makes sure that the next record, if there is one, is at hand.
    async fn fill(&mut self) -> Result<()> {
        loop {
            if self.block.as_ref().is_some_and(|(_, positions)| !positions.is_empty()) {
                return Ok(());
            }
            self.block = None;
            let Some(scan) = &mut self.scan else {
                let Some(range) = self.ranges.next() else { return Ok(()) };
                self.scan = Some(TableScan::new(Rc::clone(self.table.table()), range, READ_SIZE));
                self.range = range;
                continue;
            };
            match scan.next_block().await {
                Ok(Some(block)) => {
                    let positions = block.positions(self.range);
                    self.block = Some((block, positions));
                }
                Ok(None) => self.scan = None,
                // It was passed over.
                Err(error) if is_voided(self.set.layout(), self.table.id(), &error) => {}
                Err(Error::Corrupt { .. }) if self.damage == Damage::PassedOver => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn peek(&self) -> Option<RecordRef<'_>> {
        let (block, positions) = self.block.as_ref()?;
        Some(block.record(positions.start))
    }

    fn advance(&mut self) {
        if let Some((_, positions)) = &mut self.block {
            positions.start += 1;
        }
    }
}

/// A key behind which a scan goes on.
struct Place {
    token: Token,
    namespace: NamespaceId,
    key: Vec<u8>,
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Shows the records of a range to `visit`, in order, tombstones and expired ones included,
    /// until it returns false. Returns token and key of the last record looked at, or `None` when
    /// the range is done.
    ///
    /// # Errors
    /// Whatever a read met. What was shown before is right.
    pub async fn scan(
        &self,
        request: &ScanRequest<'_>,
        visit: &mut dyn FnMut(&RecordRef<'_>) -> bool,
    ) -> Result<Option<(Token, Vec<u8>)>> {
        self.scan_by(Damage::Met, request, visit).await
    }

    /// As [`Shard::scan`], of what can be read: for who knows from elsewhere what was there.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub async fn scan_readable(
        &self,
        request: &ScanRequest<'_>,
        visit: &mut dyn FnMut(&RecordRef<'_>) -> bool,
    ) -> Result<Option<(Token, Vec<u8>)>> {
        self.scan_by(Damage::PassedOver, request, visit).await
    }

    async fn scan_by(
        &self,
        damage: Damage,
        request: &ScanRequest<'_>,
        visit: &mut dyn FnMut(&RecordRef<'_>) -> bool,
    ) -> Result<Option<(Token, Vec<u8>)>> {
        let token = request.range.first;
        let mut place: Option<Place> =
            request.after.map(|(namespace, key)| Place { token, namespace, key: key.to_vec() });
        loop {
            let epoch = self.state.memory.borrow().epoch();
            let set = self.state.tables.current();
            let first = place.as_ref().map_or(request.range.first, |place| place.token);
            let mut rest = TokenRange { first, last: request.range.last };
            // What is lost of tables that were put aside ends the scan.
            let lost = match damage {
                Damage::Met => self.first_lost(&set, &rest),
                Damage::PassedOver => None,
            };
            if let Some((token, error)) = &lost {
                if *token <= first {
                    return Err(error.clone());
                }
                rest.last = Token(token.0 - 1);
            }
            let mut cursors = cursors_of(&set, rest, damage);
            if let Some(place) = &place {
                self.noting(skip_to(&mut cursors, place).await)?;
            }
            let mut steps = 0;
            loop {
                for cursor in &mut cursors {
                    self.noting(cursor.fill().await)?;
                }
                if self.state.memory.borrow().epoch() != epoch {
                    // Start over behind the last key, with the set as it is now.
                    break;
                }
                let Some((record, is_current)) =
                    self.next_record(&mut cursors, rest, place.as_ref())
                else {
                    return lost.map_or(Ok(None), |(_, error)| Err(error));
                };
                let wanted =
                    is_current && request.namespace.is_none_or(|wanted| wanted == record.namespace);
                let go_on = !wanted || visit(&record.as_ref());
                let (token, key) = (record.token, record.key);
                if !go_on {
                    return Ok(Some((token, key)));
                }
                place = Some(Place { token, namespace: record.namespace, key });
                steps += 1;
                if steps % STEP_RECORDS == 0 {
                    self.state.runtime.yield_now().await;
                }
            }
        }
    }

    fn noting<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| {
            self.note_damage(error);
        })
    }

    /// The record with the least key behind `place`, merged from memory and cursors, which are
    /// moved past it; and whether it is of the present incarnation of its partition.
    fn next_record(
        &self,
        cursors: &mut [Cursor<D::File>],
        range: TokenRange,
        place: Option<&Place>,
    ) -> Option<(Record, bool)> {
        let memory = self.state.memory.borrow();
        let mut least: Option<RecordRef<'_>> = None;
        let better = |candidate: RecordRef<'_>, least: &Option<RecordRef<'_>>| {
            least.as_ref().is_none_or(|least| {
                let order = candidate.cmp_by_key(least);
                let rank = |record: &RecordRef<'_>| (record.incarnation, record.version());
                order.is_lt() || order.is_eq() && rank(&candidate) > rank(least)
            })
        };
        for memtable in memory.newest_first() {
            let next = match place {
                None => memtable.sorted_range(range).next(),
                Some(place) => memtable
                    .sorted_after(place.token, place.namespace, &place.key, range.last)
                    .next(),
            };
            if let Some(record) = next
                && better(record, &least)
            {
                least = Some(record);
            }
        }
        for cursor in &*cursors {
            if let Some(record) = cursor.peek()
                && better(record, &least)
            {
                least = Some(record);
            }
        }
        let record = least?.to_owned();
        let is_current = memory.replicas().is_current(&record.as_ref());
        for cursor in cursors {
            if cursor.peek().is_some_and(|other| other.cmp_by_key(&record.as_ref()).is_eq()) {
                cursor.advance();
            }
        }
        Some((record, is_current))
    }
}

fn cursors_of<F: File>(set: &Rc<TableSet<F>>, range: TokenRange, damage: Damage) -> Vec<Cursor<F>> {
    set.slices(range)
        .map(|(table, ranges)| Cursor {
            set: Rc::clone(set),
            table: Rc::clone(table),
            damage,
            ranges: ranges.into_iter(),
            range,
            scan: None,
            block: None,
        })
        .collect()
}

/// Moves all cursors behind a key. Its token is the first of the range, so few records are passed.
async fn skip_to<F: File>(cursors: &mut [Cursor<F>], place: &Place) -> Result<()> {
    for cursor in cursors {
        loop {
            cursor.fill().await?;
            let behind = cursor.peek().is_none_or(|record| {
                record.cmp_key(place.token, place.namespace, &place.key).is_gt()
            });
            if behind {
                break;
            }
            cursor.advance();
        }
    }
    Ok(())
}
