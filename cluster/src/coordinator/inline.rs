//! A short list inside its owner: operations are many, and none of them asks the allocator.
//!
//! Invariant: the first `len` items are the list; what lies behind them is filler. A full list
//! takes nothing more, and says so.

use std::ops::{Deref, DerefMut};

/// At most `N` items, `N` below 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Inline<T, const N: usize> {
    len: u8,
    items: [T; N],
}

impl<T: Copy, const N: usize> Inline<T, N> {
    /// An empty list; `filler` is never seen.
    #[must_use]
    pub fn new(filler: T) -> Inline<T, N> {
        const { assert!(N < 256, "the length is one byte") };
        Inline { len: 0, items: [filler; N] }
    }

    /// Appends an item, unless the list is full. Says whether it did.
    pub fn push(&mut self, item: T) -> bool {
        let Some(place) = self.items.get_mut(usize::from(self.len)) else { return false };
        *place = item;
        self.len += 1;
        true
    }

    /// Forgets all items.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

impl<T, const N: usize> Deref for Inline<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items[..usize::from(self.len)]
    }
}

impl<T, const N: usize> DerefMut for Inline<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items[..usize::from(self.len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_list_takes_nothing_more() {
        let mut list: Inline<u8, 2> = Inline::new(0);
        assert!(list.push(1) && list.push(2) && !list.push(3));
        assert_eq!(*list, [1, 2]);
        list.clear();
        assert!(list.is_empty());
    }
}
