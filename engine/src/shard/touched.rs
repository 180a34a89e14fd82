//! Which tokens were written since somebody last looked, for trees that are kept beside the shard.
//!
//! Invariant: a token is told at the latest in the first look after its record became visible and
//! its write was marked as seen; if too many were written in between, their partitions are told
//! instead. Nobody watches a shard without replicas: there a write costs one comparison more.

use super::Shard;
use super::progress::Changed;
use crate::disk::Disk;
use crate::model::{PartitionId, Token};
use crate::runtime::Runtime;

/// Tokens kept one by one between two looks.
const TOKENS_MAX: usize = 4096;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// A record of this token.
    Token(Token),
    /// Any records of this partition.
    Partition(PartitionId),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Touched {
    is_watched: bool,
    tokens: Vec<Token>,
    whole: Changed,
}

impl Touched {
    /// Unwatched, for a ring of `2^bits`.
    pub(crate) fn new(bits: u32) -> Touched {
        Touched { is_watched: false, tokens: Vec::new(), whole: Changed::new(bits) }
    }

    #[inline]
    pub(crate) fn note(&mut self, token: Token, partition: PartitionId) {
        if !self.is_watched {
            return;
        }
        if self.tokens.len() < TOKENS_MAX {
            self.tokens.push(token);
        } else {
            self.whole.note(partition);
        }
    }

    pub(crate) fn note_whole(&mut self, partition: PartitionId) {
        if self.is_watched {
            self.whole.note(partition);
        }
    }

    fn drain(&mut self, mut each: impl FnMut(Touch)) {
        self.tokens.drain(..).for_each(|token| each(Touch::Token(token)));
        if !self.whole.is_empty() {
            self.whole.take().into_iter().for_each(|partition| each(Touch::Partition(partition)));
        }
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// From now on written tokens are kept for [`Shard::drain_touched`].
    pub fn watch_touched(&self) {
        self.state.memory.borrow_mut().touched().is_watched = true;
    }

    /// Shows what was written since the last call. `each` must not call the shard.
    pub fn drain_touched(&self, each: impl FnMut(Touch)) {
        self.state.memory.borrow_mut().touched().drain(each);
    }
}
