//! Large values of a memtable: not copied into the arena, but shared with whoever brought them.
//!
//! Invariant: a number names its value until it is released, and an entry of the arena holds the
//! number in its value's place. Reached only by entries of the longest layout (`entry.rs`), so a
//! small record pays nothing for it.

use crate::model::Pieces;

/// Values by number.
#[derive(Default)]
pub(super) struct SharedValues {
    values: Vec<Option<Pieces>>,
    /// Numbers that were released.
    vacant: Vec<u32>,
    allocated: usize,
}

impl SharedValues {
    /// Takes a value in.
    pub(super) fn keep(&mut self, value: &Pieces) -> u32 {
        self.allocated += size_of(value);
        if let Some(number) = self.vacant.pop() {
            self.values[number as usize] = Some(value.clone());
            return number;
        }
        self.values.push(Some(value.clone()));
        u32::try_from(self.values.len() - 1).expect("sealed long before")
    }

    pub(super) fn release(&mut self, number: u32) {
        let value = self.values[number as usize].take().expect("released once");
        self.allocated -= size_of(&value);
        self.vacant.push(number);
    }

    pub(super) fn get(&self, number: u32) -> &Pieces {
        self.values[number as usize].as_ref().expect("its entry is still there")
    }

    /// Drops values of about so many bytes, or the last one of them; false when there was none.
    pub(super) fn dismantle(&mut self, bytes: usize) -> bool {
        let mut dropped = 0;
        while dropped < bytes
            && let Some(value) = self.values.pop()
        {
            dropped += value.as_ref().map_or(0, size_of);
        }
        self.allocated -= dropped;
        dropped > 0
    }

    /// Bytes that the values take, whoever else shares them.
    pub(super) fn bytes(&self) -> usize {
        self.allocated
            + self.values.capacity() * std::mem::size_of::<Option<Pieces>>()
            + self.vacant.capacity() * std::mem::size_of::<u32>()
    }
}

fn size_of(value: &Pieces) -> usize {
    value.len() + value.overhead()
}
