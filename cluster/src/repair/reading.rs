//! What a scan of a leaf, or of a part of one, tells: its sum, and what lies below the tree.
//!
//! A [`Reading`] is shown the records while the scan goes on, which may take a while; the tree
//! tells at the end whether a write came between. Then a [`Detail`] of it has the sums of the
//! node's sixteen parts, and token and sum of each key if there are not too many.
//! Invariant: memory is bounded, however many records a leaf has.

use std::collections::BTreeMap;

use annulus_engine::model::{RecordRef, Token, TokenRange};

use super::merkle::{FAN_OUT_BITS, LEVEL_MAX, Node};
use super::sum::{HashSeed, Hour, Sum, for_each_part};

/// Most tokens that a reading keeps apart.
pub const ENTRIES_MAX: usize = 4096;
/// A node with no more tokens than this is answered as a list of them.
pub const LIST_MAX: usize = 48;

/// What the end of a reading meant for the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// A write came between. Nothing changed; read again.
    Overtaken,
    /// It was a part of a leaf; the tree learnt nothing.
    Part,
    /// The leaf was dirty and is clean.
    Cleaned,
    /// The leaf was clean, and its sum is the data's.
    Agrees,
    /// The leaf was clean, but its sum was not the data's. It is now.
    Differs,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Reading {
    range: TokenRange,
    pub(super) node: Node,
    seed: HashSeed,
    pub(super) now: Hour,
    /// The tree's shape and the leaf's changes when the reading began.
    pub(super) began: (u32, u32),
    /// What never expires.
    pub(super) sum: Sum,
    /// What expires, by the hour until which it counts.
    pub(super) expiring: BTreeMap<Hour, Sum>,
    parts: [Sum; 1 << FAN_OUT_BITS],
    /// The first tokens with what counts at `now`.
    entries: BTreeMap<Token, Sum>,
    has_more: bool,
}

impl Reading {
    pub(super) fn new(
        range: TokenRange,
        node: Node,
        seed: HashSeed,
        now: Hour,
        began: (u32, u32),
    ) -> Reading {
        Reading {
            range,
            node,
            seed,
            now,
            began,
            sum: Sum::ZERO,
            expiring: BTreeMap::new(),
            parts: [Sum::ZERO; 1 << FAN_OUT_BITS],
            entries: BTreeMap::new(),
            has_more: false,
        }
    }

    /// The node that is being read.
    #[must_use]
    pub fn node(&self) -> Node {
        self.node
    }

    /// The tokens to scan.
    #[must_use]
    pub fn range(&self) -> TokenRange {
        self.range
    }

    /// Takes note of a record: the one that stands for its key, once. Those with tokens elsewhere
    /// are passed over.
    pub fn add(&mut self, record: &RecordRef<'_>) {
        if !self.range.contains(record.token) {
            return;
        }
        let (sum, expiring, now) = (&mut self.sum, &mut self.expiring, self.now);
        let mut counted = Sum::ZERO;
        let mut counts = false;
        for_each_part(record, self.seed, |until, part| {
            match until {
                Hour::NEVER => *sum += part,
                _ => *expiring.entry(until).or_default() += part,
            }
            if until.counts_at(now) {
                counted += part;
                counts = true;
            }
        });
        if counts {
            self.parts[part_of(self.range, record.token)] += counted;
            *self.entries.entry(record.token).or_default() += counted;
            if self.entries.len() > ENTRIES_MAX {
                self.entries.pop_last();
                self.has_more = true;
            }
        }
    }

    /// What was read, to compare with another replica.
    #[must_use]
    pub fn into_detail(self) -> Detail {
        Detail {
            node: self.node,
            range: self.range,
            parts: self.parts,
            entries: self.entries.into_iter().collect(),
            has_more: self.has_more,
            now: self.now,
            began: self.began,
        }
    }
}

/// The inside of a node at one moment, as read from the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detail {
    node: Node,
    range: TokenRange,
    parts: [Sum; 1 << FAN_OUT_BITS],
    /// Sorted by token. Keys that share one are added up.
    entries: Vec<(Token, Sum)>,
    /// There are more tokens behind the last entry.
    has_more: bool,
    pub(super) now: Hour,
    pub(super) began: (u32, u32),
}

impl Detail {
    /// Of which node.
    #[must_use]
    pub fn node(&self) -> Node {
        self.node
    }

    /// The sum of the node.
    #[must_use]
    pub fn sum(&self) -> Sum {
        self.parts.iter().copied().sum()
    }

    /// The sums of its sixteen children.
    #[must_use]
    pub fn children(&self) -> &[Sum] {
        &self.parts
    }

    /// Token and sum of each of its keys; `None` if there are more than [`ENTRIES_MAX`] and the
    /// node has children that can be asked for instead.
    #[must_use]
    pub fn entries(&self) -> Option<&[(Token, Sum)]> {
        let is_last = self.node.level + FAN_OUT_BITS > LEVEL_MAX;
        (!self.has_more || is_last).then_some(&self.entries)
    }

    /// The last token up to which the entries are all that there is.
    #[must_use]
    pub fn known_up_to(&self) -> Token {
        match self.entries.last() {
            Some((last, _)) if self.has_more => *last,
            _ => self.range.last,
        }
    }

    /// Whether it should be answered as a list.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.node.level + FAN_OUT_BITS > LEVEL_MAX
            || !self.has_more && self.entries.len() <= LIST_MAX
    }

    /// The detail of a node inside this one, if it is known.
    #[must_use]
    pub fn narrowed(&self, node: Node, range: TokenRange) -> Option<Detail> {
        let is_inside =
            node.level >= self.node.level && node.ancestor(self.node.level) == self.node;
        if !is_inside || self.has_more {
            return None;
        }
        let from = self.entries.partition_point(|(token, _)| *token < range.first);
        let to = self.entries.partition_point(|(token, _)| *token <= range.last);
        let entries = self.entries[from..to].to_vec();
        let mut parts = [Sum::ZERO; 1 << FAN_OUT_BITS];
        for (token, sum) in &entries {
            parts[part_of(range, *token)] += *sum;
        }
        Some(Detail { node, range, parts, entries, ..*self })
    }
}

/// Which sixteenth of a range holds a token. A range is a power of two of tokens, at least 16.
pub(super) fn part_of(range: TokenRange, token: Token) -> usize {
    let shift = (range.last.0 - range.first.0).count_ones() - u32::from(FAN_OUT_BITS);
    usize::try_from((token.0 - range.first.0) >> shift).expect("below 16")
}
