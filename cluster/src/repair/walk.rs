//! One comparison of a partition with one other replica: what is still to ask, and what is open.
//!
//! Invariant: one question at a time, so what waits is at most sixteen nodes a level.

use annulus_engine::model::{Instant, PartitionId, Token};

use super::compare::{Keys, Own, Question};
use super::merkle::Node;
use crate::member::NodeId;

/// Tokens in one request for records.
pub(super) const FETCH_MAX: usize = 256;

/// Scans of one round below the leaves.
const DETAILS_MAX: u32 = 4096;

/// Questions of one round. Two million keys that all differ take about as many.
const QUESTIONS_MAX: u32 = 1 << 17;

/// A partition, and the replica that it is compared with.
pub(super) type Pair = (PartitionId, NodeId);

#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Goes on at once.
    Ready,
    /// Until this node has been read.
    Reading(Node),
    /// Until the answer.
    Asked { id: u64, question: Question, own: Own, sent_at: Instant },
    /// Until this moment: the other side was not comparable.
    Paused(Instant),
    /// Until the records.
    Fetching { id: u64, tokens: Vec<Token>, sent_at: Instant },
}

#[derive(Clone, Debug)]
pub(super) struct Walk {
    pub(super) pair: Pair,
    pub(super) step: Step,
    /// The last one is asked next.
    pub(super) todo: Vec<Question>,
    /// Questions that may still be asked: the other side's answers may make no end.
    pub(super) questions_left: u32,
    /// Dirty leaves that may still be read for it.
    pub(super) reads_left: u32,
    /// Insides of leaves that may still be read: only where replicas differ.
    pub(super) details_left: u32,
    /// Nodes that may still be taken apart to compare what is clean of them.
    pub(super) splits_left: u32,
    /// Attempts at the question that is open or paused for.
    pub(super) tries: u32,
    /// Whether parts were left out.
    pub(super) is_partial: bool,
    pub(super) fetch: Vec<Token>,
    pub(super) push: Vec<Token>,
    /// Keys missing here, missing there, in different versions.
    pub(super) found: [u64; 3],
    pub(super) bytes: u64,
}

impl Walk {
    pub(super) fn new(pair: Pair, reads: u32) -> Walk {
        Walk {
            pair,
            step: Step::Ready,
            todo: vec![Question::ROOT],
            questions_left: QUESTIONS_MAX,
            reads_left: reads,
            details_left: DETAILS_MAX,
            splits_left: reads,
            tries: 0,
            is_partial: false,
            fetch: Vec::new(),
            push: Vec::new(),
            found: [0; 3],
            bytes: 0,
        }
    }

    /// Whether records should be exchanged before more is asked.
    pub(super) fn has_enough(&self) -> bool {
        let found = self.fetch.len().max(self.push.len());
        found >= FETCH_MAX || (found > 0 && self.todo.is_empty())
    }

    pub(super) fn differing(&self) -> u64 {
        self.found.iter().sum()
    }

    pub(super) fn take_note(&mut self, keys: Keys) {
        let counts = [&keys.missing_here, &keys.missing_there, &keys.differing];
        for (found, tokens) in self.found.iter_mut().zip(counts) {
            *found += tokens.len() as u64;
        }
        self.fetch.extend(keys.missing_here);
        self.fetch.extend(&keys.differing);
        self.push.extend(keys.missing_there);
        self.push.extend(keys.differing);
    }

    /// Leaves a node out that is dirty: asks for those of its children that are clean. `bits` is
    /// how much deeper they are; 0 for a leaf, which is left out whole.
    pub(super) fn split(&mut self, node: Node, bits: u8) {
        if bits == 0 || self.splits_left == 0 {
            self.is_partial = true;
            return;
        }
        self.splits_left -= 1;
        let children = (0..1 << bits).map(|index| node.child(bits, index));
        self.todo.extend(children.map(|node| Question { node, is_sum_only: true }));
    }

    /// When it must be looked at again, if nothing comes in.
    pub(super) fn wake_at(&self, timeout_nanos: u64) -> Instant {
        match &self.step {
            Step::Ready => Instant(0),
            // The end of the scan wakes it.
            Step::Reading(_) => Instant(u64::MAX),
            Step::Asked { sent_at, .. } | Step::Fetching { sent_at, .. } => {
                sent_at.after_nanos(timeout_nanos)
            }
            Step::Paused(until) => *until,
        }
    }
}
