//! A shard's records that are not yet in tables: the active memtable and the sealed ones; and what
//! it has of its partitions beside the records.
//!
//! Invariant: a record is in here exactly while its LSN is above what the manifest says was
//! released. The newest version of a key is found first: active, then sealed from the newest.
//! Records of a dropped incarnation are never found; the active memtable holds none.

use std::collections::VecDeque;
use std::rc::Rc;

use super::notify::Notify;
use super::progress::Changed;
use super::replicas::{Replicas, is_shown};
use super::touched::Touched;
use crate::log::{Control, Lsn, ReplayItem};
use crate::memtable::Memtable;
use crate::model::{NamespaceId, RecordRef, Timestamp, Token};

/// A memtable that takes no more records and waits to be flushed.
pub(crate) struct Sealed {
    /// Its records.
    pub(crate) memtable: Memtable,
    /// All records up to here are in this memtable or in older ones.
    pub(crate) last: Lsn,
    /// The partitions as they were then.
    pub(crate) replicas: Replicas,
}

/// The active memtable and the sealed ones.
pub(crate) struct Memory {
    active: Memtable,
    last: Lsn,
    /// Where the last sealed memtable ends.
    sealed_last: Lsn,
    replicas: Replicas,
    budget_bytes: usize,
    /// Counts seals, so that a scan notices that records may have moved.
    epoch: u64,
    /// Oldest first.
    sealed: VecDeque<Rc<Sealed>>,
    /// Greatest stamp in any sealed memtable.
    sealed_max: Timestamp,
    changed_partitions: Changed,
    touched: Touched,
    /// Told when a memtable was sealed or a sealed one went away.
    pub(crate) changed: Rc<Notify>,
}

impl Memory {
    /// Empty, each memtable sealed at `budget_bytes`, with partitions as the manifest knows them.
    pub(crate) fn new(budget_bytes: usize, replicas: Replicas) -> Memory {
        let changed_partitions = Changed::new(replicas.bits());
        let touched = Touched::new(replicas.bits());
        Memory {
            active: Memtable::new(budget_bytes),
            changed_partitions,
            touched,
            last: Lsn::default(),
            sealed_last: Lsn::default(),
            replicas,
            budget_bytes,
            epoch: 0,
            sealed: VecDeque::new(),
            sealed_max: Timestamp::ZERO,
            changed: Rc::default(),
        }
    }

    /// Takes in what the log shows; seals the active memtable when it is full.
    pub(crate) fn show(&mut self, lsn: Lsn, item: &ReplayItem<'_>) {
        debug_assert!(lsn > self.last);
        match item {
            ReplayItem::Record(record) => {
                self.last = lsn;
                if !self.replicas.is_current(record) {
                    return;
                }
                self.replicas.mark(record);
                let partition = self.replicas.partition(record.token);
                self.changed_partitions.note(partition);
                self.touched.note(record.token, partition);
                self.active.insert(record);
                if self.active.is_full() {
                    self.seal();
                }
            }
            ReplayItem::Control(control) if is_shown(item) => {
                self.last = lsn;
                if let Control::Seen { partition, .. } | Control::DropPartition { partition, .. } =
                    control
                {
                    self.changed_partitions.note(*partition);
                }
                if let Some((partition, incarnation)) = self.replicas.control(control) {
                    let bits = self.replicas.bits();
                    self.active.remove_partition(partition, bits, incarnation);
                    self.touched.note_whole(partition);
                }
            }
            ReplayItem::Control(_) => {}
        }
    }

    /// Behind a hole in the log: a record of a later incarnation than is known says that the drop of
    /// its partition is among what is lost.
    pub(crate) fn follow_incarnation(&mut self, record: &RecordRef<'_>) {
        let partition = self.replicas.partition(record.token);
        if let Some(incarnation) = record.incarnation.checked_sub(1)
            && incarnation >= self.replicas.of(partition).incarnation
        {
            let bits = self.replicas.bits();
            self.replicas.control(&Control::DropPartition { partition, incarnation });
            self.active.remove_partition(partition, bits, incarnation);
            self.touched.note_whole(partition);
        }
    }

    /// Seals the active memtable if anything was shown since the last time.
    pub(crate) fn seal(&mut self) {
        if self.last == self.sealed_last {
            return;
        }
        let memtable = std::mem::replace(&mut self.active, Memtable::new(self.budget_bytes));
        self.epoch += 1;
        self.sealed_max = self.sealed_max.max(memtable.max_timestamp());
        self.sealed_last = self.last;
        let (last, replicas) = (self.last, self.replicas.clone());
        self.sealed.push_back(Rc::new(Sealed { memtable, last, replicas }));
        self.changed.notify();
    }

    /// The partitions as of the last record shown.
    #[inline]
    pub(crate) fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    /// Partitions that were told as changed and not yet asked for.
    pub(crate) fn changed_partitions(&mut self) -> &mut Changed {
        &mut self.changed_partitions
    }

    /// Tokens that were written and not yet asked for.
    pub(crate) fn touched(&mut self) -> &mut Touched {
        &mut self.touched
    }

    /// The same, to declare something that no record says.
    pub(crate) fn replicas_mut(&mut self) -> &mut Replicas {
        &mut self.replicas
    }

    /// The oldest sealed memtable, which is the next to flush.
    pub(crate) fn oldest_sealed(&self) -> Option<Rc<Sealed>> {
        self.sealed.front().cloned()
    }

    /// Forgets the oldest sealed memtable, after its tables went live.
    pub(crate) fn remove_oldest_sealed(&mut self) {
        self.epoch += 1;
        self.sealed.pop_front().expect("a flush ends with the memtable that it began with");
        self.sealed_max = self
            .sealed
            .iter()
            .map(|sealed| sealed.memtable.max_timestamp())
            .max()
            .unwrap_or(Timestamp::ZERO);
        self.changed.notify();
    }

    /// The newest record of a key in memory.
    ///
    /// The active memtable answers alone unless a sealed one could hold a greater stamp.
    #[inline]
    pub(crate) fn get(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Option<RecordRef<'_>> {
        let mut best = self.active.get(token, namespace, key);
        if self.sealed.is_empty() || best.is_some_and(|found| found.timestamp >= self.sealed_max) {
            return best;
        }
        for sealed in self.sealed.iter().rev() {
            if let Some(found) = sealed.memtable.get(token, namespace, key)
                && self.replicas.is_current(&found)
                && best.is_none_or(|best| found.version() > best.version())
            {
                best = Some(found);
            }
        }
        best
    }

    /// Asks the processor to fetch the cache line where a key's search begins.
    #[inline]
    pub(crate) fn prefetch(&self, token: Token) {
        self.active.prefetch(token);
    }

    /// The next step, after [`Memory::prefetch`] of the whole batch.
    #[inline]
    pub(crate) fn prefetch_entry(&self, token: Token) {
        self.active.prefetch_entry(token);
    }

    /// The memtables, newest first.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = &Memtable> {
        std::iter::once(&self.active).chain(self.sealed.iter().rev().map(|sealed| &sealed.memtable))
    }

    /// Changes when the active memtable is sealed or a sealed one goes away.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Sealed memtables that wait for a flush.
    pub(crate) fn sealed_count(&self) -> usize {
        self.sealed.len()
    }

    /// Memory held, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.newest_first().map(Memtable::bytes).sum()
    }

    /// Keys held, counting a key once a memtable.
    pub(crate) fn keys(&self) -> usize {
        self.newest_first().map(Memtable::len).sum()
    }
}
