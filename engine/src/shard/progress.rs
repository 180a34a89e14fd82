//! How far this shard's replicas are: what the tracking of a cluster asks of it.
//!
//! Invariant: nothing here changes a record. A partition is told as changed after its `seen`
//! changed, at least once.

use std::rc::Rc;

use super::Shard;
use crate::disk::Disk;
use crate::log::Lsn;
use crate::log::format::RECORD_HEADER_SIZE;
use crate::model::{PartitionId, SeenSet, Timestamp};
use crate::runtime::Runtime;

/// Partitions of which something was told since the last look, each once.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    list: Vec<PartitionId>,
    is_listed: Vec<bool>,
}

impl Changed {
    /// For a ring of `2^bits`.
    pub(crate) fn new(bits: u32) -> Changed {
        Changed { list: Vec::new(), is_listed: vec![false; 1 << bits] }
    }

    #[inline]
    pub(crate) fn note(&mut self, partition: PartitionId) {
        if let Some(is_listed) = self.is_listed.get_mut(partition.0 as usize)
            && !*is_listed
        {
            *is_listed = true;
            self.list.push(partition);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn take(&mut self) -> Vec<PartitionId> {
        for partition in &self.list {
            self.is_listed[partition.0 as usize] = false;
        }
        std::mem::take(&mut self.list)
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// What the partition has seen, shared.
    #[must_use]
    pub fn seen(&self, partition: PartitionId) -> Rc<SeenSet> {
        Rc::clone(&self.state.memory.borrow().replicas().of(partition).seen)
    }

    /// Partitions whose `seen` may have changed since the last call.
    #[must_use]
    pub fn take_changed(&self) -> Vec<PartitionId> {
        self.state.memory.borrow_mut().changed_partitions().take()
    }

    /// While own writes of earlier lives may be missing: a stamp below all of theirs. Zero, because
    /// a gap of a life before the last may be as old as the shard.
    #[must_use]
    pub fn lost_after(&self) -> Option<Timestamp> {
        let state = &*self.state;
        if !state.whole.get() {
            let replicas = state.memory.borrow().replicas().clone();
            if replicas.partitions().any(|partition| self.has_gap(partition)) {
                return Some(Timestamp::ZERO);
            }
            state.whole.set(true);
        }
        None
    }

    /// Nobody asks any more for what is missing of a partition that others hold: see
    /// [`Shard::has_gap`].
    pub fn forget_gap(&self, partition: PartitionId) {
        self.state.versions.borrow_mut().forget_gap(partition);
    }

    /// Whether own writes of the partition may have been lost in a crash and have not been
    /// declared void: see [`Shard::declare_own_void`].
    #[must_use]
    pub fn has_gap(&self, partition: PartitionId) -> bool {
        let (end, _) = self.state.versions.borrow().void_end(partition);
        self.with_seen(partition, |seen| seen.of(self.state.identity.node).base() < end)
    }

    /// Whether anything is under way to the partition's log that `seen` does not show yet.
    #[must_use]
    pub fn is_busy(&self, partition: PartitionId) -> bool {
        let visible = self.state.log.visible();
        let bits = self.state.identity.partition_bits;
        self.state.control_at.get() > visible
            || self
                .state
                .unsettled
                .borrow()
                .has(visible, |token| token.partition(bits) == partition)
    }

    /// Bytes of the partition's records that are kept here, unpacked: in memory each key once, in
    /// tables with what newer ones have superseded. Looks at all of it that is in memory.
    #[must_use]
    pub fn partition_bytes(&self, partition: PartitionId) -> u64 {
        let memory = self.state.memory.borrow();
        let incarnation = memory.replicas().of(partition).incarnation;
        let range = partition.range(self.state.identity.partition_bits);
        let records = memory.newest_first().flat_map(|memtable| memtable.sorted_range(range));
        let in_memory: usize = records
            .filter(|record| record.incarnation >= incarnation)
            .map(|record| RECORD_HEADER_SIZE + record.key.len() + record.value.len())
            .sum();
        let set = self.state.tables.current();
        let runs = set.tables().filter_map(|live| {
            let runs = &live.table().meta().partitions;
            let at = runs.binary_search_by_key(&partition, |run| run.partition()).ok()?;
            (runs[at].incarnation_max >= incarnation).then_some(runs[at].raw_bytes)
        });
        runs.fold(in_memory as u64, u64::saturating_add)
    }

    /// The last record that the log has taken.
    #[must_use]
    pub fn appended(&self) -> Lsn {
        self.state.log.appended()
    }

    /// The log survives a crash up to here.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.state.log.durable()
    }
}
