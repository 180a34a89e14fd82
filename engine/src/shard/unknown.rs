//! Ranges of tokens whose records are not all readable: a block fails its check, a table was put
//! aside when the shard was opened, or a part of a member's log was given up.
//!
//! Invariant: a key whose record may lie there is answered with `Corrupt`, never with absence, until
//! the range was declared whole again ([`Shard::clear_unknown`]). Then what cannot be read is not
//! missed any more: the manifest says so, reads pass over it, and compaction leaves it behind.
//! Damaged blocks are known from the moment they are met; a restart forgets them until they are met
//! again. Tables that were put aside are in the manifest.

use crate::disk::{Disk, File};
use crate::log::Lsn;
use crate::model::{Timestamp, Token, TokenRange};
use crate::recover::LOG_DIR;
use crate::runtime::Runtime;
use crate::sstable::TableId;
use crate::tables::facts::{Facts, LOG, Lost};
use crate::tables::{Layout, Ranges, TableSet, TableSetEdit, quarantine_name};
use crate::{Error, Result};

use super::Shard;

/// A block that failed its check.
#[derive(Clone, Debug)]
pub(crate) struct Damaged {
    table: TableId,
    offset: u64,
    /// Tokens that it may hold and that have not been cleared.
    left: Ranges,
}

/// Whether an error says that a block of this table is damaged that is not missed any more.
pub(crate) fn is_voided(layout: &Layout, table: TableId, error: &Error) -> bool {
    match error {
        Error::Corrupt { offset, .. } => layout.voided.contains(&(table, *offset)),
        _ => false,
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Ranges in which records are missing. They may overlap.
    #[must_use]
    pub fn unknown_ranges(&self) -> Vec<TokenRange> {
        let set = self.state.tables.current();
        let damaged = self.state.damaged.borrow();
        let live = damaged.iter().filter(|damaged| set.table(damaged.table).is_some());
        let blocks = live.flat_map(|damaged| damaged.left.iter());
        blocks.chain(set.layout().lost.iter().map(|lost| lost.range)).collect()
    }

    /// Whether a record of this token may be missing.
    #[must_use]
    pub fn is_unknown(&self, token: Token) -> bool {
        let damaged = self.state.damaged.borrow();
        let set = self.state.tables.current();
        if damaged.is_empty() && set.layout().lost.is_empty() {
            return false;
        }
        damaged.iter().any(|damaged| damaged.left.contains(token))
            || set.layout().lost.iter().any(|lost| lost.range.contains(token))
    }

    /// Declares the range whole: every record of it that was missing has been merged in again
    /// ([`Shard::merge_in`] takes them although their dots are seen). Waits until they are durable.
    ///
    /// # Errors
    /// Of the log and the disk. State: the range is as unknown as before.
    pub async fn clear_unknown(&self, range: TokenRange) -> Result<()> {
        let state = &*self.state;
        let appended: Lsn = state.log.appended();
        state.log.wait_durable(appended).await?;
        let mut damaged = state.damaged.borrow().clone();
        damaged.iter_mut().for_each(|damaged| damaged.left.subtract(&range));
        let done = |damaged: &&Damaged| damaged.left.is_empty();
        let voided: Vec<_> =
            damaged.iter().filter(done).map(|damaged| (damaged.table, damaged.offset)).collect();
        let edit = |layout: &Layout| {
            let voided = layout.voided.iter().copied().chain(voided.iter().copied());
            let facts = Facts {
                lost: Some(without(&layout.lost, &range)),
                voided: Some(voided.collect()),
                ..Facts::default()
            };
            TableSetEdit { facts, ..TableSetEdit::default() }
        };
        state.tables.commit(Vec::new(), edit).await?;
        // Others may have been met meanwhile.
        for damaged in &mut *state.damaged.borrow_mut() {
            if voided.contains(&(damaged.table, damaged.offset)) {
                damaged.left.subtract(&TokenRange::FULL);
            } else {
                damaged.left.subtract(&range);
            }
        }
        state.damaged.borrow_mut().retain(|damaged| !damaged.left.is_empty());
        state.compactor.try_again(&range);
        state.work.notify();
        Ok(())
    }

    /// Takes note of a block that fails its check. Whether it was not known.
    pub(super) fn note_damage(&self, error: &Error) -> bool {
        let Error::Corrupt { path, offset, .. } = error else { return false };
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(table) = name.and_then(TableId::from_file_name) else { return false };
        let set = self.state.tables.current();
        let Some(live) = set.table(table) else { return false };
        let Some(tokens) = live.tokens_at(*offset) else { return false };
        let mut damaged = self.state.damaged.borrow_mut();
        let known = |known: &Damaged| (known.table, known.offset) == (table, *offset);
        if damaged.iter().any(known) || is_voided(set.layout(), table, error) {
            return false;
        }
        damaged.retain(|damaged| set.table(damaged.table).is_some());
        damaged.push(Damaged { table, offset: *offset, left: Ranges::of(tokens) });
        true
    }

    /// Whether a record of the token that was lost with its table could be newer than this.
    pub(super) fn check_lost(
        &self,
        set: &TableSet<D::File>,
        token: Token,
        found: Option<Timestamp>,
    ) -> Result<()> {
        let hides = |lost: &&Lost| {
            lost.range.contains(token) && found.is_none_or(|found| found < lost.max_timestamp)
        };
        match set.layout().lost.iter().find(hides) {
            None => Ok(()),
            Some(lost) => Err(self.lost_error(lost)),
        }
    }

    /// The first lost range that a scan of `range` meets, and its error.
    pub(super) fn first_lost(
        &self,
        set: &TableSet<D::File>,
        range: &TokenRange,
    ) -> Option<(Token, Error)> {
        let met = set.layout().lost.iter().filter(|lost| lost.range.overlaps(range));
        let first = met.min_by_key(|lost| lost.range.first)?;
        Some((first.range.first, self.lost_error(first)))
    }

    #[cold]
    fn lost_error(&self, lost: &Lost) -> Error {
        if lost.table == LOG {
            let dir = self.state.dir.join(LOG_DIR);
            return Error::corrupt(dir, 0, "the log was damaged and records of it were given up");
        }
        let path = self.state.tables.identity(lost.table).path;
        let path = path.with_file_name(quarantine_name(lost.table));
        Error::corrupt(path, 0, "the table was damaged and put aside; its records are missing")
    }
}

/// What is lost outside of a range.
fn without(lost: &[Lost], range: &TokenRange) -> Vec<Lost> {
    let left = lost.iter().flat_map(|lost| {
        let mut left = Ranges::of(lost.range);
        left.subtract(range);
        left.iter().map(|range| Lost { range, ..*lost }).collect::<Vec<_>>()
    });
    left.collect()
}

impl<F: File> crate::sstable::Table<F> {
    /// The tokens that the block at this offset may hold, both ends included.
    fn tokens_at(&self, offset: u64) -> Option<TokenRange> {
        let index = self.index();
        let block = index.block_at(offset)?;
        let next = block + 1;
        let is_last = next == index.block_count();
        let last = if is_last { index.last_token() } else { index.first_token(next) };
        Some(TokenRange { first: index.first_token(block), last })
    }
}
