//! Versions: who wrote what, and which writes a state or a client has seen.
//!
//! [`VersionVector`] is the chapter's vector clock `[server, version]`: its partial order says
//! whether one version is an ancestor of another or its sibling. It is used with explicit dots
//! (`siblings.rs`), as in Almeida et al., "Scalable and Accurate Causality Tracking for Eventually
//! Consistent Stores" (DAIS 2014), and one counter for each partition and origin.
//!
//! Invariant: [`VersionVector::join`] is the least upper bound of the order, so vectors may be
//! merged in any order and any number of times.

use std::cmp::Ordering;

use super::Timestamp;

pub use super::context::{BadContext, BoundContext, ContextSecret};
pub use super::merge::{Merged, merge_records, supersedes};
pub use super::siblings::{InvalidState, KeyState, Pruned, Sibling, TooManySiblings};

/// Identity of a node as a source of writes. Handed out once, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct OriginId(pub u32);

/// One write: the `sequence`-th of `origin` in its partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dot {
    /// Who coordinated the write.
    pub origin: OriginId,
    /// Its place among that origin's writes in the partition, from 1.
    pub sequence: u64,
}

/// For each origin the greatest sequence seen, sorted by origin.
///
/// The order is partial: less is an ancestor, greater a descendant, neither means siblings.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VersionVector {
    entries: Vec<(OriginId, u64)>,
}

impl VersionVector {
    /// The vector that has seen nothing.
    #[must_use]
    pub fn new() -> VersionVector {
        VersionVector::default()
    }

    /// Origins with an entry.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing has been seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries, sorted by origin; no sequence is 0.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Dot> + '_ {
        self.entries.iter().map(|(origin, sequence)| Dot { origin: *origin, sequence: *sequence })
    }

    /// The greatest sequence seen of this origin; 0 if none.
    #[must_use]
    pub fn get(&self, origin: OriginId) -> u64 {
        match self.entries.binary_search_by_key(&origin, |entry| entry.0) {
            Ok(at) => self.entries[at].1,
            Err(_) => 0,
        }
    }

    /// Whether this write has been seen.
    #[must_use]
    pub fn covers(&self, dot: Dot) -> bool {
        dot.sequence <= self.get(dot.origin)
    }

    /// Takes note of a write and all before it of the same origin.
    pub fn observe(&mut self, dot: Dot) {
        if dot.sequence == 0 {
            return;
        }
        match self.entries.binary_search_by_key(&dot.origin, |entry| entry.0) {
            Ok(at) => self.entries[at].1 = self.entries[at].1.max(dot.sequence),
            Err(at) => self.entries.insert(at, (dot.origin, dot.sequence)),
        }
    }

    /// The pointwise greatest of both.
    pub fn join(&mut self, other: &VersionVector) {
        other.iter().for_each(|dot| self.observe(dot));
    }

    /// Whether everything that `other` has seen has been seen here.
    #[must_use]
    pub fn descends(&self, other: &VersionVector) -> bool {
        other.iter().all(|dot| self.covers(dot))
    }
}

impl FromIterator<Dot> for VersionVector {
    fn from_iter<I: IntoIterator<Item = Dot>>(dots: I) -> VersionVector {
        let mut vector = VersionVector::new();
        dots.into_iter().for_each(|dot| vector.observe(dot));
        vector
    }
}

impl PartialOrd for VersionVector {
    fn partial_cmp(&self, other: &VersionVector) -> Option<Ordering> {
        match (self.descends(other), other.descends(self)) {
            (true, true) => Some(Ordering::Equal),
            (true, false) => Some(Ordering::Greater),
            (false, true) => Some(Ordering::Less),
            (false, false) => None,
        }
    }
}

/// What a client has read of a key: passed back with a write, it replaces what it covers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Context {
    /// The events covered.
    pub vector: VersionVector,
    /// The greatest stamp read.
    pub timestamp: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vector(entries: &[(u32, u64)]) -> VersionVector {
        let dot = |(origin, sequence): &(u32, u64)| Dot {
            origin: OriginId(*origin),
            sequence: *sequence,
        };
        entries.iter().map(dot).collect()
    }

    fn vectors() -> impl Strategy<Value = VersionVector> {
        prop::collection::vec((0u32..4, 0u64..4), 0..5).prop_map(|entries| vector(&entries))
    }

    #[test]
    fn the_chapters_ancestor_is_an_ancestor() {
        let (old, new) = (vector(&[(0, 1), (1, 1)]), vector(&[(0, 1), (1, 2)]));
        assert_eq!(old.partial_cmp(&new), Some(Ordering::Less));
        assert_eq!(new.partial_cmp(&old), Some(Ordering::Greater));
    }

    #[test]
    fn the_chapters_siblings_are_siblings() {
        let (one, other) = (vector(&[(0, 1), (1, 2)]), vector(&[(0, 2), (1, 1)]));
        assert_eq!(one.partial_cmp(&other), None);
        assert_eq!(one.partial_cmp(&one), Some(Ordering::Equal));
    }

    proptest! {
        #[test]
        fn join_is_the_least_upper_bound(a in vectors(), b in vectors(), bound in vectors()) {
            let mut joined = a.clone();
            joined.join(&b);
            prop_assert!(joined >= a && joined >= b);
            prop_assert_eq!(bound.descends(&a) && bound.descends(&b), bound.descends(&joined));
            let mut other_way = b.clone();
            other_way.join(&a);
            prop_assert_eq!(joined, other_way);
        }
    }
}
