//! The operations in flight, by id, and when each next wants to be looked at.
//!
//! Invariants: an id is given out once in a life of this table, so a late answer finds the
//! operation it belongs to or none; an operation has one time at which it is due. Slots are
//! reused, and so is the memory of the queue: an operation that comes and goes allocates
//! nothing once the table has been as full before.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use annulus_engine::model::Instant;

/// Names an operation in flight; what peers send back. Never 0, which asks for no answer, and without
/// the highest bit, by which operations on registers are told from these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct OpId(pub u64);

/// Low bits of an id: the slot. The rest counts operations.
const INDEX_BITS: u32 = 20;
/// Most slots of a table.
pub(super) const SLOTS_MAX: usize = 1 << INDEX_BITS;
/// Times that are no longer wanted stay in the queue until they are more than the others and this.
const STALE_MAX: usize = 64;

impl OpId {
    fn index(self) -> usize {
        usize::try_from(self.0 & (SLOTS_MAX as u64 - 1)).expect("20 bits")
    }
}

#[derive(Debug)]
struct Slot<T> {
    id: OpId,
    due: Instant,
    item: T,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    counter: u64,
    queue: BinaryHeap<Reverse<(Instant, OpId)>>,
}

impl<T> Table<T> {
    /// An empty table whose ids count from `first`.
    pub(super) fn new(first: u64) -> Table<T> {
        Table { slots: Vec::new(), free: Vec::new(), counter: first, queue: BinaryHeap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds an item that is due at a time.
    pub(super) fn insert(&mut self, due: Instant, item: T) -> OpId {
        let index = self.free.pop().unwrap_or_else(|| {
            assert!(self.slots.len() < SLOTS_MAX, "the owner keeps the number below it");
            self.slots.push(None);
            self.slots.len() - 1
        });
        // Zero in the high bits is skipped, so that no id is zero.
        self.counter = (self.counter + 1) & (u64::MAX >> (INDEX_BITS + 1));
        self.counter = self.counter.max(1);
        let id = OpId((self.counter << INDEX_BITS) | index as u64);
        self.slots[index] = Some(Slot { id, due, item });
        self.enqueue(due, id);
        id
    }

    pub(super) fn get(&self, id: OpId) -> Option<&T> {
        self.slot(id).map(|slot| &slot.item)
    }

    pub(super) fn get_mut(&mut self, id: OpId) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.index())?.as_mut()?;
        (slot.id == id).then_some(&mut slot.item)
    }

    pub(super) fn remove(&mut self, id: OpId) -> Option<T> {
        self.slot(id)?;
        let slot = self.slots[id.index()].take()?;
        self.free.push(id.index());
        Some(slot.item)
    }

    /// Changes the time at which an item is due.
    pub(super) fn set_due(&mut self, id: OpId, due: Instant) {
        if let Some(Some(slot)) = self.slots.get_mut(id.index())
            && slot.id == id
            && slot.due != due
        {
            slot.due = due;
            self.enqueue(due, id);
        }
    }

    /// Takes the next item that is due. It stays in the table, and is not due again until
    /// [`Table::set_due`] says so.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<OpId> {
        if self.next_due()? > now {
            return None;
        }
        let Reverse((_, id)) = self.queue.pop()?;
        if let Some(Some(slot)) = self.slots.get_mut(id.index()) {
            slot.due = Instant(u64::MAX);
        }
        Some(id)
    }

    /// When the next item is due.
    pub(super) fn next_due(&mut self) -> Option<Instant> {
        while let Some(Reverse((due, id))) = self.queue.peek().copied() {
            if self.slot(id).is_some_and(|slot| slot.due == due) {
                return Some(due);
            }
            self.queue.pop();
        }
        None
    }

    /// The id in a slot, for walks over all of them.
    pub(super) fn id_at(&self, index: usize) -> Option<OpId> {
        self.slots.get(index)?.as_ref().map(|slot| slot.id)
    }

    /// Slots there are, used or not.
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    fn slot(&self, id: OpId) -> Option<&Slot<T>> {
        self.slots.get(id.index())?.as_ref().filter(|slot| slot.id == id)
    }

    fn enqueue(&mut self, due: Instant, id: OpId) {
        if self.queue.len() > 2 * self.len() + STALE_MAX {
            let slots = &self.slots;
            self.queue.retain(|Reverse((due, id))| {
                let slot = slots[id.index()].as_ref();
                slot.is_some_and(|slot| slot.id == *id && slot.due == *due)
            });
        }
        self.queue.push(Reverse((due, id)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_finds_its_own_item_or_none() {
        // Starts are counted from the seconds since 2024, so a first number has many bits: once the
        // highest was set, and acknowledgements were taken for those of registers.
        let mut table = Table::new(u64::MAX - 1);
        let mut seen = Vec::new();
        for number in 0..100 {
            let id = table.insert(Instant(number), number);
            assert!(id.0 != 0 && id.0 >> 63 == 0 && !seen.contains(&id));
            assert_eq!(table.remove(id), Some(number));
            assert_eq!(table.remove(id), None);
            seen.push(id);
            assert!(seen.iter().all(|id| table.get(*id).is_none()));
        }
        assert_eq!((table.len(), table.slots()), (0, 1));
    }

    proptest! {
        #[test]
        fn items_are_due_when_they_were_last_said_to_be(steps in prop::collection::vec((0u8..4, 0u64..50), 0..300)) {
            let mut table = Table::new(7);
            let mut model: BTreeMap<OpId, u64> = BTreeMap::new();
            for (what, number) in steps {
                let at = usize::try_from(number).unwrap();
                let some = model.keys().nth(at % model.len().max(1)).copied();
                match (what, some) {
                    (1, Some(id)) => {
                        table.set_due(id, Instant(number));
                        model.insert(id, number);
                    }
                    (2, Some(id)) => {
                        table.remove(id);
                        model.remove(&id);
                    }
                    (3, _) => {
                        while let Some(id) = table.pop_due(Instant(number)) {
                            prop_assert!(table.remove(id).is_some());
                            prop_assert!(model.remove(&id).is_some_and(|due| due <= number));
                        }
                        prop_assert!(model.values().all(|due| *due > number));
                    }
                    _ => {
                        model.insert(table.insert(Instant(number), ()), number);
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.next_due(), model.values().min().map(|due| Instant(*due)));
                prop_assert!(table.queue.len() <= 2 * table.len() + 2 * STALE_MAX + 4);
            }
        }
    }
}
