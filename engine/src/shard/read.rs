//! The read path below the pump: memory, filters, index, cache; one await for the block.
//!
//! Invariant: the answer is the record with the greatest `(timestamp, dot)` among all that the
//! shard held at one moment between the call and its answer. A table is skipped when its greatest
//! timestamp cannot beat what was found.
//!
//! [`Shard::probe`] answers from memory and cache alone and allocates nothing;
//! [`PendingRead::finish`] goes on from where it stopped, with the disk.

use std::rc::Rc;

use super::Shard;
use super::unknown::is_voided;
use crate::disk::{Disk, File};
use crate::model::{Dot, NamespaceId, Pieces, Record, RecordRef, Timestamp, Token, Value};
use crate::runtime::Runtime;
use crate::sstable::{Block, BlockHandle, TableId};
use crate::tables::{Candidates, LiveTable, TableSet};
use crate::{Error, Result};

/// From so many candidate tables on, the lines of their filters are asked for at once: they come
/// side by side then, not one after the other, and each is a miss of its own.
const PREFETCH_TABLES_MIN: usize = 3;

/// What memory and cache say of a key.
#[derive(Debug)]
pub enum Probe<T, F> {
    /// The visitor's answer; no disk was needed.
    Done(T),
    /// At least one block must be read.
    Pending(Box<PendingRead<F>>),
}

/// A key to look for.
#[derive(Clone, Copy, Debug)]
struct Wanted<'a> {
    token: Token,
    namespace: NamespaceId,
    key: &'a [u8],
}

/// The best record found so far, and what keeps its bytes alive.
#[derive(Debug)]
enum Best {
    /// Copied out of a memtable, which may change under a waiting read; without its value, which
    /// is shared if it is in pieces.
    Copied(Record, Pieces),
    /// In a block of a table.
    InBlock(Rc<Block>),
}

impl Best {
    fn copied(record: &RecordRef<'_>) -> Best {
        let head = RecordRef { value: Value::EMPTY, ..*record }.to_owned();
        Best::Copied(head, Pieces::of(record.value))
    }

    fn record<'a>(&'a self, wanted: &Wanted<'_>) -> Option<RecordRef<'a>> {
        match self {
            Best::Copied(record, value) => {
                Some(RecordRef { value: value.value(), ..record.as_ref() })
            }
            Best::InBlock(block) => block.get(wanted.token, wanted.namespace, wanted.key),
        }
    }
}

/// What the next step of a search needs.
enum Step<F> {
    /// Nothing: the best is the answer.
    Done,
    /// This block of this table.
    Read(Rc<LiveTable<F>>, BlockHandle),
}

/// What becomes of a block that fails its check, and of what was lost with tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    /// It is an error.
    Met,
    /// The search goes on as if it were not there.
    PassedOver,
}

/// A search that waits for the disk.
#[derive(Debug)]
pub struct PendingRead<F> {
    set: Rc<TableSet<F>>,
    /// The partition's incarnation when the search began.
    incarnation: u32,
    token: Token,
    namespace: NamespaceId,
    key: Box<[u8]>,
    best: Option<Best>,
    /// Candidate tables that were searched already.
    position: usize,
}

/// The outcome of a search that went to the disk.
#[derive(Debug)]
pub struct Found {
    token: Token,
    namespace: NamespaceId,
    key: Box<[u8]>,
    best: Option<Best>,
}

impl Found {
    /// The record, if the key has one (perhaps a tombstone, perhaps expired).
    #[must_use]
    pub fn record(&self) -> Option<RecordRef<'_>> {
        let wanted = Wanted { token: self.token, namespace: self.namespace, key: &self.key };
        self.best.as_ref()?.record(&wanted)
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Looks for a key in memory and in cached blocks, and shows what it found to `visit`.
    ///
    /// The record may be a tombstone or expired: the caller decides what that means.
    pub fn probe<T>(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
        visit: impl FnOnce(Option<RecordRef<'_>>) -> T,
    ) -> Probe<T, D::File> {
        let wanted = Wanted { token, namespace, key };
        let state = &*self.state;
        let memory = state.memory.borrow();
        let in_memory = memory.get(token, namespace, key);
        if let Some(found) = in_memory
            && found.timestamp >= state.tables_max.get()
        {
            return Probe::Done(visit(Some(found)));
        }
        let set = state.tables.current();
        let mut best = None;
        let mut position = 0;
        let floor = in_memory.map(|found| found.version());
        let candidates = set.candidates(token);
        if candidates.len() >= PREFETCH_TABLES_MIN {
            candidates.prefetch(token);
        }
        let incarnation = memory.replicas().incarnation(token);
        let mut search = Search { wanted, incarnation, floor };
        let step = search.run(candidates, &mut best, &mut position, |id, handle| {
            state.cache.borrow_mut().get(id, handle.offset)
        });
        match step {
            // What was lost is spoken of where an error can be.
            Step::Done if set.layout().lost.is_empty() => {
                let in_tables = best.as_ref().and_then(|best: &Best| best.record(&wanted));
                Probe::Done(visit(in_tables.or(in_memory)))
            }
            Step::Done | Step::Read(..) => Probe::Pending(Box::new(PendingRead {
                set,
                incarnation,
                token,
                namespace,
                key: key.into(),
                best: best.or_else(|| in_memory.map(|found| Best::copied(&found))),
                position,
            })),
        }
    }

    /// Looks for a key, waiting for the disk if it must.
    ///
    /// # Errors
    /// Whatever the disk or a block's check says. State: unchanged; "absent" is never answered
    /// for a key whose block could not be read.
    pub async fn get(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Record>> {
        match self.probe(token, namespace, key, |found| found.map(|record| record.to_owned())) {
            Probe::Done(found) => Ok(found),
            Probe::Pending(pending) => {
                Ok(pending.finish(self).await?.record().map(|record| record.to_owned()))
            }
        }
    }

    /// As [`Shard::get`], of what can be read: for who knows from elsewhere what was there.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub async fn get_readable(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Record>> {
        match self.probe(token, namespace, key, |found| found.map(|record| record.to_owned())) {
            Probe::Done(found) => Ok(found),
            Probe::Pending(pending) => {
                let found = pending.finish_by(self, Damage::PassedOver).await?;
                Ok(found.record().map(|record| record.to_owned()))
            }
        }
    }

    /// The steps of a read, as JSON: what was asked, in order, and what it said. For people; costs
    /// an allocation a step, and reads nothing.
    #[must_use]
    pub fn explain(&self, token: Token, namespace: NamespaceId, key: &[u8]) -> String {
        let state = &*self.state;
        let mut steps = vec![format!(r#"{{"step":"token","token":"{token}"}}"#)];
        let in_memory = state.memory.borrow().get(token, namespace, key).map(|r| r.version());
        steps.push(format!(r#"{{"step":"memtable","found":{}}}"#, in_memory.is_some()));
        let set = state.tables.current();
        let decided = in_memory.is_some_and(|(stamp, _)| stamp >= state.tables_max.get());
        for candidate in set.candidates(token) {
            if decided {
                break;
            }
            let table = candidate.table;
            let id = table.id().0;
            if !table.may_contain(token) {
                steps.push(format!(r#"{{"step":"filter","table":{id},"says":"absent"}}"#));
                continue;
            }
            steps.push(format!(r#"{{"step":"filter","table":{id},"says":"perhaps"}}"#));
            if let Some(handle) = table.locate(token, namespace, key) {
                let cached = state.cache.borrow().contains(table.id(), handle.offset);
                steps.push(format!(
                    r#"{{"step":"block","table":{id},"offset":{},"bytes":{},"cached":{cached}}}"#,
                    handle.offset, handle.len
                ));
            }
        }
        format!(r#"{{"steps":[{}]}}"#, steps.join(","))
    }

    /// Starts to bring the memory of these keys nearer, in two rounds so that all misses overlap.
    pub fn prefetch(&self, tokens: &[Token]) {
        let memory = self.state.memory.borrow();
        for token in tokens {
            memory.prefetch(*token);
        }
        for token in tokens {
            memory.prefetch_entry(*token);
        }
    }
}

impl<F: File> PendingRead<F> {
    /// Reads what is missing, block by block, and gives the answer.
    ///
    /// # Errors
    /// As [`Shard::get`].
    pub async fn finish<D, R>(self: Box<Self>, shard: &Shard<D, R>) -> Result<Found>
    where
        D: Disk<File = F>,
        R: Runtime,
    {
        self.finish_by(shard, Damage::Met).await
    }

    async fn finish_by<D, R>(
        mut self: Box<Self>,
        shard: &Shard<D, R>,
        damage: Damage,
    ) -> Result<Found>
    where
        D: Disk<File = F>,
        R: Runtime,
    {
        let state = &*shard.state;
        let mut fresh: Option<(TableId, u64, Rc<Block>)> = None;
        loop {
            let wanted = Wanted { token: self.token, namespace: self.namespace, key: &self.key };
            let floor =
                self.best.as_ref().and_then(|best| best.record(&wanted)).map(|r| r.version());
            let mut search = Search { wanted, incarnation: self.incarnation, floor };
            let step = search.run(
                self.set.candidates(self.token),
                &mut self.best,
                &mut self.position,
                |id, handle| match &fresh {
                    Some((table, offset, block)) if *table == id && *offset == handle.offset => {
                        Some(Rc::clone(block))
                    }
                    _ => state.cache.borrow_mut().get(id, handle.offset),
                },
            );
            let Step::Read(table, handle) = step else {
                if damage == Damage::Met {
                    let floor = search.floor.map(|(stamp, _)| stamp);
                    shard.check_lost(&self.set, self.token, floor)?;
                }
                let PendingRead { token, namespace, key, best, .. } = *self;
                return Ok(Found { token, namespace, key, best });
            };
            let asked = state.runtime.now();
            let block = match table.read_block(handle).await {
                Ok(block) => Rc::new(block),
                Err(error) if is_voided(state.tables.current().layout(), table.id(), &error) => {
                    self.position += 1;
                    continue;
                }
                Err(error) => {
                    shard.note_damage(&error);
                    let corrupt = matches!(error, Error::Corrupt { .. });
                    let stats = &mut *state.stats.borrow_mut();
                    stats.corrupt_reads += u64::from(corrupt);
                    stats.failed_reads += u64::from(!corrupt);
                    if corrupt && damage == Damage::PassedOver {
                        self.position += 1;
                        continue;
                    }
                    return Err(error);
                }
            };
            {
                let stats = &mut *state.stats.borrow_mut();
                stats.blocks_read += 1;
                stats.block_bytes_read += u64::from(handle.len);
            }
            state.read_times.record(state.runtime.now().nanos_since(asked));
            state.cache.borrow_mut().insert(table.id(), Rc::clone(&block));
            fresh = Some((table.id(), handle.offset, block));
        }
    }
}

/// A key to look for in tables.
struct Search<'a> {
    wanted: Wanted<'a>,
    /// Records of earlier incarnations are not there.
    incarnation: u32,
    /// The version that a table must beat.
    floor: Option<(Timestamp, Dot)>,
}

impl Search<'_> {
    /// Goes through the candidate tables from `position` on, newest first, as far as `block_of` can
    /// supply blocks. `best` is replaced when beaten.
    fn run<F: File>(
        &mut self,
        candidates: Candidates<'_, F>,
        best: &mut Option<Best>,
        position: &mut usize,
        mut block_of: impl FnMut(TableId, BlockHandle) -> Option<Rc<Block>>,
    ) -> Step<F> {
        let Search { wanted, incarnation, floor } = self;
        for candidate in candidates.skip(*position) {
            let table = candidate.table;
            let beaten =
                floor.is_some_and(|(stamp, _)| table.entry().summary.max_timestamp < stamp);
            if !beaten
                && table.may_contain(wanted.token)
                && let Some(handle) = table.locate(wanted.token, wanted.namespace, wanted.key)
            {
                let Some(block) = block_of(table.id(), handle) else {
                    return Step::Read(Rc::clone(table), handle);
                };
                let found = block.get(wanted.token, wanted.namespace, wanted.key);
                let found = found.filter(|record| record.incarnation >= *incarnation);
                if let Some(version) = found.map(|record| record.version())
                    && floor.is_none_or(|floor| version > floor)
                {
                    *floor = Some(version);
                    *best = Some(Best::InBlock(block));
                }
            }
            *position += 1;
            if floor.is_some_and(|(stamp, _)| candidate.rest_max < stamp) {
                break;
            }
        }
        Step::Done
    }
}
