//! Which records may go: of dropped namespaces and incarnations at once, and of tombstones and
//! expired records those that no replica can miss any more (`ALGORITHMS.md` 5.5).
//!
//! Invariant: a plain record goes only at or below a floor below which everything that will ever
//! be had been shown here, and was in tables when the compaction began: an older record of its key
//! that came late is then among the inputs and goes with it, or was superseded. So a floor counts
//! only once what was shown when it was set has been flushed.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::Memory;
use crate::compaction::Retention;
use crate::log::Lsn;
use crate::model::causality::KeyState;
use crate::model::{Kind, NamespaceId, PartitionId, RecordRef, Timestamp, VersionVector};
use crate::sstable::PartitionRun;

/// What may be purged in one partition.
#[derive(Clone, Debug)]
struct Floor {
    /// Everything at or below it is in tables.
    settled: Timestamp,
    /// Everything at or below the stamp was shown up to this record.
    next: (Timestamp, Lsn),
    /// What every replica has seen.
    stable: Rc<VersionVector>,
}

impl Floor {
    fn of(&self, released: Lsn) -> Timestamp {
        if self.next.1 <= released { self.next.0 } else { self.settled }
    }
}

/// The shard's answers to its compactions.
pub(crate) struct Keep {
    memory: Rc<RefCell<Memory>>,
    namespaces: RefCell<BTreeSet<NamespaceId>>,
    /// By partition; empty where there are no replicas: nobody else could bring an older record
    /// back, and own stamps only rise.
    floors: RefCell<Vec<Floor>>,
}

impl Keep {
    pub(crate) fn new(memory: Rc<RefCell<Memory>>, replicated: bool) -> Keep {
        let nothing = Floor {
            settled: Timestamp::ZERO,
            next: (Timestamp::ZERO, Lsn::ZERO),
            stable: Rc::default(),
        };
        let count = memory.borrow().replicas().partitions().count();
        let floors = if replicated { vec![nothing; count] } else { Vec::new() };
        Keep { memory, namespaces: RefCell::default(), floors: RefCell::new(floors) }
    }

    pub(crate) fn set_dropped(&self, namespaces: impl IntoIterator<Item = NamespaceId>) {
        *self.namespaces.borrow_mut() = namespaces.into_iter().collect();
    }

    pub(crate) fn copy_dropped(&self, other: &Keep) {
        self.namespaces.borrow_mut().clone_from(&other.namespaces.borrow());
    }

    /// Everything at or below `floor` that will ever be has been shown, up to `visible`; `released`
    /// is in tables.
    pub(crate) fn set_floor(
        &self,
        partition: PartitionId,
        floor: Timestamp,
        visible: Lsn,
        released: Lsn,
    ) {
        if let Some(entry) = self.floors.borrow_mut().get_mut(partition.0 as usize)
            && entry.next.1 <= released
        {
            // Until then the one before waits for its flush; the next call brings a later one.
            *entry = Floor {
                settled: entry.next.0,
                next: (floor.max(entry.next.0), visible),
                stable: Rc::clone(&entry.stable),
            };
        }
    }

    pub(crate) fn set_stable(&self, partition: PartitionId, stable: VersionVector) {
        if let Some(entry) = self.floors.borrow_mut().get_mut(partition.0 as usize) {
            entry.stable = Rc::new(stable);
        }
    }

    /// Begins anew with a partition that was dropped.
    pub(crate) fn forget(&self, partition: PartitionId) {
        if let Some(entry) = self.floors.borrow_mut().get_mut(partition.0 as usize) {
            entry.settled = Timestamp::ZERO;
            entry.next = (Timestamp::ZERO, Lsn::ZERO);
            entry.stable = Rc::default();
        }
    }
}

impl Retention for Keep {
    fn is_dropped(&self, record: &RecordRef<'_>) -> bool {
        let namespaces = self.namespaces.borrow();
        (!namespaces.is_empty() && namespaces.contains(&record.namespace))
            || !self.memory.borrow().replicas().is_current(record)
    }

    fn is_dropped_run(&self, run: &PartitionRun) -> bool {
        let memory = self.memory.borrow();
        let replicas = memory.replicas();
        let partition = run.partition();
        partition.0 < 1 << replicas.bits()
            && run.incarnation_max < replicas.of(partition).incarnation
    }

    fn is_purgeable(&self, record: &RecordRef<'_>, released: Lsn) -> bool {
        let floors = self.floors.borrow();
        let partition = self.memory.borrow().replicas().partition(record.token);
        let Some(floor) = floors.get(partition.0 as usize) else { return true };
        if record.kind != Kind::Siblings {
            return record.timestamp <= floor.of(released);
        }
        // What its vector was stripped of is in this replica's base, and needs no record.
        KeyState::of_record(record).is_ok_and(|state| {
            floor.stable.covers(record.dot)
                && floor.stable.descends(&state.vector())
                && state.siblings().iter().all(|sibling| floor.stable.covers(sibling.dot))
        })
    }
}
