//! The Merkle tree of one partition, kept as sums so that a write needs no path of rehashing.
//!
//! The token bits below the partition's cut it into `2^leaf_bits` leaves, about 512 keys each. A
//! leaf is the sum of what its records add ([`super::sum`]); an inner node is the sum of its
//! leaves, made when asked for. So a tree answers for every coarser one, and replicas that have
//! cut their partition differently compare at the depth that both have.
//!
//! Invariant: a clean leaf is the sum of the partition's visible records. A write whose former
//! version is known moves the sum by the difference; any other write makes its leaf *dirty*, and
//! a dirty leaf answers nothing until its tokens have been read again. So call [`touch`] or
//! [`apply`] at the moment when a write becomes visible and is marked as seen.
//!
//! [`touch`]: MerkleTree::touch
//! [`apply`]: MerkleTree::apply

use std::collections::BTreeMap;

use annulus_engine::model::{PartitionId, RecordRef, Token, TokenRange};

use super::reading::{Detail, Finished, Reading};
use super::sum::{HashSeed, Hour, Sum, for_each_part};

/// How many keys a leaf should have.
pub const KEYS_PER_LEAF: u64 = 512;
/// Most leaves of a tree, as a power of two.
pub const LEAF_BITS_MAX: u8 = 12;
/// Children of a node are so many bits deeper, if the tree is.
pub const FAN_OUT_BITS: u8 = 4;
/// Deepest node that can be named. Below the leaves nodes are made of what a scan reads.
pub const LEVEL_MAX: u8 = 32;

/// A node: the tokens of a partition whose first `level` bits below the partition's are `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Depth in bits, up to [`LEVEL_MAX`]; the root's is 0.
    pub level: u8,
    /// Which of the `2^level` nodes of that depth.
    pub index: u32,
}

impl Node {
    /// The whole partition.
    pub const ROOT: Node = Node { level: 0, index: 0 };

    /// The node of these numbers, if there is one.
    #[must_use]
    pub fn new(level: u8, index: u32) -> Option<Node> {
        let exists = level <= LEVEL_MAX && u64::from(index) < 1 << level;
        exists.then_some(Node { level, index })
    }

    /// The node `level` deep that holds a token.
    #[must_use]
    pub fn of(token: Token, partition_bits: u32, level: u8) -> Node {
        // A shift by 64 overflows, so the root is handled by two shifts.
        let prefix = ((token.0 << partition_bits) >> 1) >> (63 - level);
        Node { level, index: u32::try_from(prefix).expect("at most 32 bits remain") }
    }

    /// The `index`-th of its `2^bits` descendants that are `bits` deeper.
    #[must_use]
    pub fn child(self, bits: u8, index: u32) -> Node {
        debug_assert!(self.level + bits <= LEVEL_MAX && u64::from(index) < 1 << bits);
        let first = u32::try_from(u64::from(self.index) << bits).expect("level is at most 32");
        Node { level: self.level + bits, index: first | index }
    }

    /// Its ancestor at `level`, or itself.
    #[must_use]
    pub fn ancestor(self, level: u8) -> Node {
        let level = level.min(self.level);
        let index = u64::from(self.index) >> (self.level - level);
        Node { level, index: u32::try_from(index).expect("no greater than before") }
    }

    /// Its tokens.
    #[must_use]
    pub fn range(self, partition: PartitionId, partition_bits: u32) -> TokenRange {
        let whole = partition.range(partition_bits);
        let depth = partition_bits + u32::from(self.level);
        if depth == 0 {
            return whole;
        }
        let first = whole.first.0 | u64::from(self.index) << (64 - depth);
        TokenRange { first: Token(first), last: Token(first | u64::MAX.unbounded_shr(depth)) }
    }
}

/// Why a tree does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclear {
    /// Leaves below the node must be read first: [`MerkleTree::dirty_ranges`].
    Dirty,
    /// The tree is not so deep; a [`Reading`] of the node's tokens can tell.
    BelowLeaves,
}

#[derive(Clone, Copy, Debug, Default)]
struct Leaf {
    /// What never expires.
    sum: Sum,
    /// How often the leaf was written, modulo 2^32.
    changes: u32,
    is_dirty: bool,
}

/// See the module. One for each partition of a shard.
#[derive(Clone, Debug)]
pub struct MerkleTree {
    partition: PartitionId,
    partition_bits: u32,
    leaf_bits: u8,
    /// How often the number of leaves has changed: a reading ends with the tree it began with.
    shape: u32,
    seed: HashSeed,
    leaves: Vec<Leaf>,
    dirty_count: u32,
    /// Sums of what expires, by leaf and the hour until which they count. No sum is zero.
    expiring: BTreeMap<(u32, Hour), Sum>,
    /// Sums up to this hour are no longer kept.
    forgotten: Hour,
}

impl MerkleTree {
    /// The tree of a partition with about `keys` keys, of which nothing has been read yet: every
    /// leaf is dirty.
    #[must_use]
    pub fn unread(
        partition: PartitionId,
        partition_bits: u32,
        keys: u64,
        seed: HashSeed,
    ) -> MerkleTree {
        let leaf_bits = leaf_bits_for(keys);
        let leaf = Leaf { is_dirty: true, ..Leaf::default() };
        MerkleTree {
            partition,
            partition_bits,
            leaf_bits,
            shape: 0,
            seed,
            leaves: vec![leaf; 1 << leaf_bits],
            dirty_count: 1 << leaf_bits,
            expiring: BTreeMap::new(),
            forgotten: Hour(0),
        }
    }

    /// The tree of a partition without records, clean. `keys` is how many are expected.
    #[must_use]
    pub fn empty(
        partition: PartitionId,
        partition_bits: u32,
        keys: u64,
        seed: HashSeed,
    ) -> MerkleTree {
        let mut tree = MerkleTree::unread(partition, partition_bits, keys, seed);
        tree.leaves.fill(Leaf::default());
        tree.dirty_count = 0;
        tree
    }

    /// Depth of the leaves, in bits.
    #[must_use]
    pub fn leaf_bits(&self) -> u8 {
        self.leaf_bits
    }

    /// The tokens of a node of this partition.
    #[must_use]
    pub fn range(&self, node: Node) -> TokenRange {
        node.range(self.partition, self.partition_bits)
    }

    /// Bytes of memory, about: 28 a leaf, 48 for each hour in which values of a leaf expire (about
    /// ten for each length of life in use, and never more than the leaf has such values).
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of::<MerkleTree>() + self.leaves.len() * size_of::<Leaf>() + self.expiring.len() * 48
    }

    /// A write to this token has become visible, and what it replaced is not known.
    pub fn touch(&mut self, token: Token) {
        let leaf =
            &mut self.leaves[Node::of(token, self.partition_bits, self.leaf_bits).index as usize];
        leaf.changes = leaf.changes.wrapping_add(1);
        self.dirty_count += u32::from(!leaf.is_dirty);
        leaf.is_dirty = true;
    }

    /// Anything may have been written: nothing is known until it has been read again.
    pub fn touch_all(&mut self) {
        for leaf in &mut self.leaves {
            leaf.changes = leaf.changes.wrapping_add(1);
            leaf.is_dirty = true;
        }
        self.dirty_count = 1 << self.leaf_bits;
    }

    /// A record has become visible in the place of `old`; `None` says that the key is known to
    /// have had, or now to have, no record at all.
    pub fn apply(&mut self, old: Option<&RecordRef<'_>>, new: Option<&RecordRef<'_>>) {
        let Some(either) = new.or(old) else { return };
        debug_assert!(old.is_none_or(|old| old.cmp_by_key(either).is_eq()), "records of one key");
        let index = Node::of(either.token, self.partition_bits, self.leaf_bits).index;
        let leaf = &mut self.leaves[index as usize];
        leaf.changes = leaf.changes.wrapping_add(1);
        if leaf.is_dirty {
            return;
        }
        let mut add = |until: Hour, sum: Sum| match until {
            Hour::NEVER => leaf.sum += sum,
            _ => add_expiring(&mut self.expiring, (index, until), sum),
        };
        if let Some(old) = old {
            for_each_part(old, self.seed, |until, sum| add(until, Sum::ZERO - sum));
        }
        if let Some(new) = new {
            for_each_part(new, self.seed, &mut add);
        }
    }

    /// The sum of a node at `now`.
    ///
    /// # Errors
    /// [`Unclear`].
    pub fn sum(&self, node: Node, now: Hour) -> Result<Sum, Unclear> {
        Ok(self.sums(node, 0, now)?[0])
    }

    /// The sums of a node's children at `now`: 2, 4, 8 or 16 of them, as deep as the tree goes.
    ///
    /// # Errors
    /// [`Unclear`]; [`Unclear::BelowLeaves`] if the node is a leaf.
    pub fn children(&self, node: Node, now: Hour) -> Result<Vec<Sum>, Unclear> {
        let bits = self.leaf_bits.saturating_sub(node.level).min(FAN_OUT_BITS);
        if bits == 0 {
            return Err(Unclear::BelowLeaves);
        }
        self.sums(node, bits, now)
    }

    /// Sums of the `2^bits` descendants of a node that are `bits` deeper.
    fn sums(&self, node: Node, bits: u8, now: Hour) -> Result<Vec<Sum>, Unclear> {
        if node.level + bits > self.leaf_bits {
            return Err(Unclear::BelowLeaves);
        }
        let leaves = self.leaves_of(node);
        let slice = &self.leaves[leaves.start as usize..leaves.end as usize];
        if self.dirty_count > 0 && slice.iter().any(|leaf| leaf.is_dirty) {
            return Err(Unclear::Dirty);
        }
        let share = slice.len() >> bits;
        let mut sums: Vec<Sum> =
            slice.chunks(share).map(|leaves| leaves.iter().map(|leaf| leaf.sum).sum()).collect();
        let range = (leaves.start, Hour(0))..(leaves.end, Hour(0));
        for ((leaf, until), sum) in self.expiring.range(range) {
            if until.counts_at(now) {
                sums[(leaf - leaves.start) as usize / share] += *sum;
            }
        }
        Ok(sums)
    }

    /// Leaves of a node; of a node below the leaves, the one that it lies in.
    fn leaves_of(&self, node: Node) -> std::ops::Range<u32> {
        let top = node.ancestor(self.leaf_bits);
        let deeper = self.leaf_bits - top.level;
        top.index << deeper..(top.index + 1) << deeper
    }

    /// How many leaves must be read before the whole tree answers.
    #[must_use]
    pub fn dirty_count(&self) -> u32 {
        self.dirty_count
    }

    /// The first dirty leaf of a node at or behind leaf `from`, else before it. Of a node below
    /// the leaves, the one that it lies in, if it is dirty.
    #[must_use]
    pub fn first_dirty(&self, node: Node, from: u32) -> Option<Node> {
        let leaves = if self.dirty_count == 0 { 0..0 } else { self.leaves_of(node) };
        let from = from.clamp(leaves.start, leaves.end);
        let mut turn = (from..leaves.end).chain(leaves.start..from);
        let index = turn.find(|leaf| self.leaves[*leaf as usize].is_dirty)?;
        Some(Node { level: self.leaf_bits, index })
    }

    /// The dirty leaves of a node.
    pub fn dirty_leaves(&self, node: Node) -> impl Iterator<Item = Node> {
        let leaves = if self.dirty_count == 0 { 0..0 } else { self.leaves_of(node) };
        let dirty = leaves.filter(|leaf| self.leaves[*leaf as usize].is_dirty);
        dirty.map(|index| Node { level: self.leaf_bits, index })
    }

    /// The tokens that must be read before a node answers: neighbouring leaves as one range.
    #[must_use]
    pub fn dirty_ranges(&self, node: Node) -> Vec<TokenRange> {
        let mut ranges: Vec<TokenRange> = Vec::new();
        for leaf in self.dirty_leaves(node) {
            let range = self.range(leaf);
            match ranges.last_mut() {
                Some(last) if last.last.0.checked_add(1) == Some(range.first.0) => {
                    last.last = range.last;
                }
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Begins to read the tokens of a leaf, or of a node below one, as of `now`.
    ///
    /// # Panics
    /// If the node is above the leaves.
    #[must_use]
    pub fn begin_reading(&self, node: Node, now: Hour) -> Reading {
        assert!(node.level >= self.leaf_bits, "a reading is of one leaf or of a part of it");
        let changes = self.leaf_of(node).changes;
        Reading::new(self.range(node), node, self.seed, now, (self.shape, changes))
    }

    /// Whether nothing was written to the leaf of a detail since its reading began, and it still
    /// tells what counts at `now`.
    #[must_use]
    pub fn is_current(&self, detail: &Detail, now: Hour) -> bool {
        detail.now == now && self.is_unchanged(detail.node(), detail.began)
    }

    fn is_unchanged(&self, node: Node, began: (u32, u32)) -> bool {
        began == (self.shape, self.leaf_of(node).changes)
    }

    /// Ends a reading to which all records of its tokens were shown. One of a whole leaf makes the
    /// leaf clean, unless it was written meanwhile. `now` is the hour of the end.
    pub fn finish_reading(&mut self, reading: &Reading, now: Hour) -> Finished {
        if !self.is_unchanged(reading.node, reading.began) {
            return Finished::Overtaken;
        }
        if reading.node.level > self.leaf_bits {
            return Finished::Part;
        }
        let index = reading.node.index;
        let leaf = &mut self.leaves[index as usize];
        let lanes = self.expiring.range((index, Hour(0))..(index + 1, Hour(0)));
        // What no longer counts may have been purged while the scan went on, or forgotten here.
        let now = now.max(self.forgotten);
        let kept = lanes.filter(|((_, until), _)| until.counts_at(now));
        let kept: BTreeMap<Hour, Sum> = kept.map(|((_, until), sum)| (*until, *sum)).collect();
        let read: BTreeMap<Hour, Sum> = reading
            .expiring
            .iter()
            .filter(|(until, sum)| until.counts_at(now) && **sum != Sum::ZERO)
            .map(|(until, sum)| (*until, *sum))
            .collect();
        let agrees = leaf.sum == reading.sum && kept == read;
        let was_dirty = std::mem::replace(&mut leaf.is_dirty, false);
        leaf.sum = reading.sum;
        self.dirty_count -= u32::from(was_dirty);
        self.forget_expiring(index);
        self.expiring.extend(read.into_iter().map(|(until, sum)| ((index, until), sum)));
        match (was_dirty, agrees) {
            (true, _) => Finished::Cleaned,
            (false, true) => Finished::Agrees,
            (false, false) => Finished::Differs,
        }
    }

    /// Makes a leaf clean from all its records at once. `leaf` counts from the partition's first.
    ///
    /// # Panics
    /// If there is no such leaf.
    pub fn recompute<'a>(
        &mut self,
        leaf: u32,
        now: Hour,
        records: impl IntoIterator<Item = RecordRef<'a>>,
    ) -> Finished {
        assert!((leaf as usize) < self.leaves.len(), "no such leaf");
        let mut reading = self.begin_reading(Node { level: self.leaf_bits, index: leaf }, now);
        records.into_iter().for_each(|record| reading.add(&record));
        self.finish_reading(&reading, now)
    }

    /// The leaf's data is not what the tree says, or cannot be read: it answers nothing for now.
    pub fn mark_dirty(&mut self, node: Node) {
        let range = self.leaves_of(node);
        for index in range {
            let leaf = &mut self.leaves[index as usize];
            leaf.changes = leaf.changes.wrapping_add(1);
            self.dirty_count += u32::from(!leaf.is_dirty);
            leaf.is_dirty = true;
        }
    }

    /// Drops what no longer counts at `now`. Changes no answer for `now` or later.
    pub fn forget_before(&mut self, now: Hour) {
        self.forgotten = self.forgotten.max(now);
        self.expiring.retain(|(_, until), _| until.counts_at(now));
    }

    /// Fits the number of leaves to the number of keys, once it is off by four times. Fewer leaves
    /// are sums of the old ones; more leaves are all dirty. Says whether anything changed.
    pub fn resize(&mut self, keys: u64) -> bool {
        let wanted = leaf_bits_for(keys);
        if wanted.abs_diff(self.leaf_bits) < 2 {
            return false;
        }
        if wanted > self.leaf_bits {
            let shape = self.shape.wrapping_add(1);
            let tree = MerkleTree::unread(self.partition, self.partition_bits, keys, self.seed);
            *self = MerkleTree { shape, ..tree };
            return true;
        }
        let merged = self.leaf_bits - wanted;
        self.shape = self.shape.wrapping_add(1);
        self.leaves = self.leaves.chunks(1 << merged).map(fold).collect();
        self.leaf_bits = wanted;
        self.dirty_count = self.leaves.iter().map(|leaf| u32::from(leaf.is_dirty)).sum();
        for ((leaf, until), sum) in std::mem::take(&mut self.expiring) {
            add_expiring(&mut self.expiring, (leaf >> merged, until), sum);
        }
        true
    }

    fn leaf_of(&self, node: Node) -> &Leaf {
        &self.leaves[node.ancestor(self.leaf_bits).index as usize]
    }

    fn forget_expiring(&mut self, leaf: u32) {
        let range = (leaf, Hour(0))..(leaf + 1, Hour(0));
        let keys: Vec<(u32, Hour)> = self.expiring.range(range).map(|(key, _)| *key).collect();
        for key in keys {
            self.expiring.remove(&key);
        }
    }
}

/// Bits of the smallest number of leaves that have no more than their keys on average.
fn leaf_bits_for(keys: u64) -> u8 {
    let leaves = keys.div_ceil(KEYS_PER_LEAF).clamp(1, 1 << LEAF_BITS_MAX);
    u8::try_from(leaves.next_power_of_two().ilog2()).expect("at most 12")
}

fn fold(leaves: &[Leaf]) -> Leaf {
    Leaf {
        sum: leaves.iter().map(|leaf| leaf.sum).sum(),
        changes: leaves.iter().fold(0, |sum, leaf| sum.wrapping_add(leaf.changes)),
        is_dirty: leaves.iter().any(|leaf| leaf.is_dirty),
    }
}

fn add_expiring(expiring: &mut BTreeMap<(u32, Hour), Sum>, key: (u32, Hour), sum: Sum) {
    let lane = expiring.entry(key).or_default();
    *lane += sum;
    if *lane == Sum::ZERO {
        expiring.remove(&key);
    }
}

#[cfg(test)]
mod tests;
