//! The leaves of the memtable in token order, and which of them a token belongs to.
//!
//! A table by the token's top bits narrows the search to the few leaves that begin there; a
//! shard that owns 1/64 of the ring uses few of the table's entries and searches a little longer.
//!
//! Invariants: `firsts` is sorted and begins with zero; the tokens of leaf `i` lie from
//! `firsts[i]` to before `firsts[i + 1]`, or equal both when several leaves hold one token, and
//! then the leaves are in the order of the keys and hold nothing but this token, except the last.

use std::cmp::Ordering;
use std::ops::Range;

use super::arena::Place;
use super::slots::{LEAF_LEN_MAX, Leaf};
use crate::model::Token;

/// Where an entry is or belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) leaf: usize,
    pub(super) slot: usize,
}

/// See the module.
pub(super) struct Directory {
    firsts: Vec<u64>,
    leaves: Vec<Leaf>,
    /// For each value of the top bits, and one beyond, how many leaves begin below it.
    below: Vec<u32>,
    bits: u32,
    leaf_bytes: usize,
}

impl Directory {
    /// An empty directory; `bits` (1 to 16) of the token select where a search begins.
    pub(super) fn new(bits: u32) -> Directory {
        let mut below = vec![1; (1 << bits) + 1];
        below[0] = 0;
        let leaf = Leaf::new();
        let leaf_bytes = leaf.bytes();
        Directory { firsts: vec![0], leaves: vec![leaf], below, bits, leaf_bytes }
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        self.leaf_bytes
            + self.firsts.capacity() * size_of::<u64>()
            + self.leaves.capacity() * size_of::<Leaf>()
            + self.below.capacity() * size_of::<u32>()
    }

    pub(super) fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    fn bucket(&self, token: u64) -> usize {
        usize::try_from(token >> (64 - self.bits)).expect("at most 16 bits")
    }

    /// The last leaf that may hold the token.
    #[inline]
    pub(super) fn leaf_of(&self, token: Token) -> usize {
        let bucket = self.bucket(token.0);
        let range = self.below[bucket] as usize..self.below[bucket + 1] as usize;
        let begun = self.firsts[range.clone()].partition_point(|first| *first <= token.0);
        range.start + begun - 1
    }

    /// The leaves that hold the token, more than one only if it fills them.
    fn leaves_of(&self, token: Token) -> Range<usize> {
        let last = self.leaf_of(token);
        if last == 0 || self.firsts[last - 1] != token.0 {
            return last..last + 1;
        }
        self.firsts[..last].partition_point(|first| *first < token.0)..last + 1
    }

    /// Where the entry of this token and key is (`Ok`) or belongs (`Err`). `order` compares the
    /// key of an entry with the one sought, and is called only for entries of this very token.
    pub(super) fn find(
        &self,
        token: Token,
        order: impl Fn(Place) -> Ordering,
    ) -> Result<(Spot, Place), Spot> {
        let leaves = self.leaves_of(token);
        let leaf = if leaves.len() == 1 {
            leaves.start
        } else {
            let begins_before = |leaf: &Leaf| {
                leaf.next(0).is_none_or(|(_, _, place)| order(place) != Ordering::Greater)
            };
            let before = self.leaves[leaves.clone()].partition_point(begins_before);
            leaves.start + before.saturating_sub(1)
        };
        let run = self.leaves[leaf].run(token);
        let (mut low, mut high) = (run.start, run.end);
        while low < high {
            let slot = low.midpoint(high);
            let place = self.leaves[leaf].at(slot, token).expect("inside the run");
            match order(place) {
                Ordering::Less => low = slot + 1,
                Ordering::Greater => high = slot,
                Ordering::Equal => return Ok((Spot { leaf, slot }, place)),
            }
        }
        Err(Spot { leaf, slot: low })
    }

    /// Inserts at the spot that `find` gave. False if room had to be made: `find` again.
    #[must_use]
    pub(super) fn insert(&mut self, spot: Spot, token: Token, place: Place) -> bool {
        let leaf = &mut self.leaves[spot.leaf];
        if leaf.insert(spot.slot, token, place) {
            return true;
        }
        self.leaf_bytes -= leaf.bytes();
        if leaf.len() < LEAF_LEN_MAX {
            leaf.rebuild();
            self.leaf_bytes += leaf.bytes();
            return false;
        }
        let (first, upper) = leaf.split();
        let is_one_token = leaf.at(leaf.seek(first), first).is_some();
        if is_one_token && self.firsts[spot.leaf] != first.0 {
            // The halves of one token both begin with it, and smaller tokens keep an empty leaf.
            let lower = std::mem::replace(leaf, Leaf::new());
            self.leaf_bytes += leaf.bytes();
            self.add(spot.leaf + 1, first, lower);
            self.add(spot.leaf + 2, first, upper);
        } else {
            self.leaf_bytes += leaf.bytes();
            self.add(spot.leaf + 1, first, upper);
        }
        false
    }

    fn add(&mut self, index: usize, first: Token, leaf: Leaf) {
        self.leaf_bytes += leaf.bytes();
        self.firsts.insert(index, first.0);
        self.leaves.insert(index, leaf);
        let bucket = self.bucket(first.0);
        self.below[bucket + 1..].iter_mut().for_each(|count| *count += 1);
    }

    /// Points a used slot at another place.
    pub(super) fn replace(&mut self, spot: Spot, place: Place) {
        self.leaves[spot.leaf].replace(spot.slot, place);
    }

    /// Keeps the entries with tokens from `first` to `last` for which `keep` holds, and all
    /// others; gives how many went.
    pub(super) fn retain(
        &mut self,
        first: Token,
        last: Token,
        mut keep: impl FnMut(Token, Place) -> bool,
    ) -> usize {
        let mut gone = 0;
        for index in (self.leaves_of(first).start..self.leaves_of(last).end).rev() {
            let leaf = &mut self.leaves[index];
            self.leaf_bytes -= leaf.bytes();
            gone += leaf.retain(|token, place| token < first || token > last || keep(token, place));
            if leaf.len() > 0 || index == 0 {
                self.leaf_bytes += leaf.bytes();
            } else {
                self.leaves.remove(index);
                let first = self.firsts.remove(index);
                let bucket = self.bucket(first);
                self.below[bucket + 1..].iter_mut().for_each(|count| *count -= 1);
            }
        }
        gone
    }

    /// The first spot with a token at or after this one.
    pub(super) fn seek(&self, token: Token) -> Spot {
        let leaf = self.leaves_of(token).start;
        Spot { leaf, slot: self.leaves[leaf].seek(token) }
    }
}
