//! What is known of connections, found by their ids in one step.
//!
//! Invariant: an id whose connection is gone finds nothing, even if its place is used again.

use annulus_net::driver::ConnId;

/// A value for each of some connections.
#[derive(Debug)]
pub(super) struct Slots<T> {
    places: Vec<Option<(ConnId, T)>>,
    count: usize,
}

impl<T> Default for Slots<T> {
    fn default() -> Slots<T> {
        Slots { places: Vec::new(), count: 0 }
    }
}

impl<T> Slots<T> {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn insert(&mut self, id: ConnId, value: T) {
        let index = id.index();
        if self.places.len() <= index {
            self.places.resize_with(index + 1, || None);
        }
        let before = self.places[index].replace((id, value));
        self.count += usize::from(before.is_none());
    }

    #[inline]
    pub(super) fn get(&self, id: ConnId) -> Option<&T> {
        let (found, value) = self.places.get(id.index())?.as_ref()?;
        (*found == id).then_some(value)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut T> {
        let (found, value) = self.places.get_mut(id.index())?.as_mut()?;
        (*found == id).then_some(value)
    }

    pub(super) fn take(&mut self, id: ConnId) -> Option<T> {
        self.get(id)?;
        self.count -= 1;
        self.places[id.index()].take().map(|(_, value)| value)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (ConnId, &mut T)> {
        self.places.iter_mut().flatten().map(|(id, value)| (*id, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_finds_its_own_value_only() {
        let (old, new) = (ConnId::from_key(3), ConnId::from_key(1 << 32 | 3));
        let mut slots = Slots::default();
        slots.insert(old, "old");
        assert_eq!((slots.get(old), slots.get(new), slots.len()), (Some(&"old"), None, 1));
        assert_eq!(slots.take(new), None);
        slots.insert(new, "new");
        assert_eq!(slots.get(old), None);
        assert_eq!((slots.take(new), slots.len()), (Some("new"), 0));
        assert_eq!(slots.get(ConnId::from_key(99)), None);
    }
}
