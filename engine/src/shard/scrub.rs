//! Reading table blocks only to check them, so that damage is found while a snapshot still has what
//! is lost. For a shard without replicas: members of a cluster read theirs leaf by leaf, to compare
//! it as well.
//!
//! A piece of the token ring is read in all tables that lie there, past the cache, in the background
//! class; then the next. A small share of the data each day, and all of it when somebody asks.
//! Where it has come to is not kept: each life begins elsewhere.
//!
//! Invariant: each block has its turn before any has its second. A block that fails its check is
//! noted as a read notes it, and the rest of the piece is read.

use std::cell::Cell;

use futures_util::future::select;

use super::Shard;
use crate::disk::Disk;
use crate::model::{Instant, Token, TokenRange};
use crate::runtime::Runtime;
use crate::shard::is_voided;
use crate::sstable::TableScan;
use crate::{Error, Result};

const DAY_NANOS: u128 = 86_400_000_000_000;
/// Share of the data that is read in a day, in millionths: 1.5 %, as in a cluster.
const SHARE_PER_DAY_PPM: u128 = 15_000;
/// How often it is looked at what is due, in nanoseconds.
const LOOK_NANOS: u64 = 60_000_000_000;
/// Bytes a second while all of it is read on demand.
const DEMAND_BYTES_PER_SECOND: u128 = 64 << 20;
/// Pieces of the ring, at least, and the bounds of one, in bytes.
const PIECES: u64 = 1 << 14;
const PIECE_MIN: u64 = 16 << 10;
const PIECE_MAX: u64 = 1 << 20;
/// Bytes of a piece on demand: larger, because every piece is a read of every table.
const DEMAND_PIECE: u64 = 8 << 20;
/// Bytes of one read.
const READ_SIZE: usize = 256 << 10;
/// Tokens of the ring.
const RING: u128 = 1 << 64;

/// Where the reading stands.
#[derive(Debug)]
pub(crate) struct Scrub {
    /// The next piece begins here.
    position: Cell<Token>,
    /// Tokens that a reading on demand has still to pass; 0 when none is under way.
    demanded: Cell<u128>,
}

impl Scrub {
    /// Beginning at this token.
    pub(crate) fn new(position: Token) -> Scrub {
        Scrub { position: Cell::new(position), demanded: Cell::new(0) }
    }

    /// Takes the next piece when one is about `share` tokens wide. It ends with the ring.
    fn take(&self, share: u128) -> TokenRange {
        let first = self.position.get();
        let width = share.clamp(1, RING - u128::from(first.0));
        let last = first.0 + u64::try_from(width - 1).expect("within the ring");
        self.position.set(Token(last.wrapping_add(1)));
        self.demanded.set(self.demanded.get().saturating_sub(width));
        TokenRange { first, last: Token(last) }
    }
}

/// Bytes that a share of the data a day allows for a time.
fn allowance(bytes: u64, nanos: u64) -> u64 {
    let share = u128::from(bytes) * SHARE_PER_DAY_PPM * u128::from(nanos);
    u64::try_from(share / (DAY_NANOS * 1_000_000)).unwrap_or(u64::MAX)
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Reads all table blocks once, beginning now, at the speed for demands. Asking again begins
    /// anew. Does nothing for a shard with replicas, which are compared instead.
    pub fn scrub_all(&self) {
        if !self.state.options.replicated {
            self.state.scrub.demanded.set(RING);
            self.state.scrub_asked.notify();
        }
    }

    /// Bytes of tables that [`Shard::scrub_all`] has still to read, about; 0 when it is done.
    #[must_use]
    pub fn scrub_bytes_left(&self) -> u64 {
        let bytes = u128::from(self.table_bytes());
        let left = self.state.scrub.demanded.get();
        // In thousandths of the ring, rounded up: what is not done is not nothing.
        let parts = left.div_ceil(RING / 1000).min(1000);
        u64::try_from((bytes * parts).div_ceil(1000)).unwrap_or(u64::MAX).max(u64::from(left > 0))
    }

    fn table_bytes(&self) -> u64 {
        self.state.tables.current().layout().entries().map(|entry| entry.live_bytes).sum()
    }

    pub(super) async fn scrub_loop(&self) {
        let state = &*self.state;
        let mut looked = state.runtime.now();
        let mut credit = 0u64;
        while !state.stop.get() {
            let bytes = self.table_bytes();
            let now = state.runtime.now();
            credit = credit.saturating_add(allowance(bytes, now.nanos_since(looked)));
            looked = now;
            let piece = (bytes / PIECES).clamp(PIECE_MIN, PIECE_MAX);
            let is_asked = state.scrub.demanded.get() > 0;
            if !is_asked && credit < piece {
                self.await_scrub(now.after_nanos(LOOK_NANOS)).await;
                continue;
            }
            let piece = if is_asked { DEMAND_PIECE } else { piece };
            let share = (RING * u128::from(piece)).div_ceil(u128::from(bytes.max(piece)));
            let range = state.scrub.take(share);
            let read = match self.scrub_piece(range).await {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(dir = %state.dir.display(), %error, "scrubbing could not read");
                    piece
                }
            };
            // A piece that held more than was due is paid for before the next.
            credit = credit.saturating_sub(read.max(1));
            if is_asked {
                let pause = u128::from(read) * 1_000_000_000 / DEMAND_BYTES_PER_SECOND;
                self.pause(u64::try_from(pause).unwrap_or(LOOK_NANOS)).await;
            }
        }
    }

    /// Sleeps until then, or until all is to be read, or the end.
    async fn await_scrub(&self, until: Instant) {
        let state = &*self.state;
        let (asked, stopped) = (state.scrub_asked.ticket(), state.lifecycle.ticket());
        if state.stop.get() || state.scrub.demanded.get() > 0 {
            return;
        }
        let asked = std::pin::pin!(state.scrub_asked.changed(asked));
        let stopped = std::pin::pin!(state.lifecycle.changed(stopped));
        let later = std::pin::pin!(state.runtime.sleep_until(until));
        select(select(asked, stopped), later).await;
    }

    /// Reads the blocks of all tables in the range. Gives the bytes read.
    ///
    /// # Errors
    /// The last one of the disk; damage is none.
    async fn scrub_piece(&self, range: TokenRange) -> Result<u64> {
        let state = &*self.state;
        let set = state.tables.current();
        let (mut read, mut failure) = (0, Ok(()));
        for live in set.tables() {
            let parts: Vec<_> = live.entry().live.within(&range).collect();
            for part in parts {
                let mut scan = TableScan::new(std::rc::Rc::clone(live.table()), part, READ_SIZE);
                loop {
                    if state.stop.get() {
                        return failure.map(|()| read);
                    }
                    if !scan.is_ready() {
                        state.runtime.yield_now().await;
                    }
                    match scan.next_block().await {
                        Ok(Some(block)) => read += u64::from(block.handle().len),
                        Ok(None) => break,
                        Err(error @ Error::Corrupt { .. }) => {
                            let now = state.tables.current();
                            if !is_voided(now.layout(), live.id(), &error) {
                                self.note_scrubbed_damage(&error);
                            }
                        }
                        Err(error) => failure = Err(error),
                    }
                }
            }
        }
        let stats = &mut *state.stats.borrow_mut();
        stats.scrubbed_pieces += 1;
        stats.scrubbed_bytes += read;
        failure.map(|()| read)
    }

    fn note_scrubbed_damage(&self, error: &Error) {
        if self.note_damage(error) {
            tracing::error!(%error, "scrubbing met a block that fails its check");
            self.state.stats.borrow_mut().scrub_damaged += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_ring_once_a_round_from_wherever_they_begin() {
        for (first, share) in [(0, RING / 7), (u64::MAX, RING / 3), (1 << 63, RING), (5, 1 << 61)] {
            let scrub = Scrub::new(Token(first));
            scrub.demanded.set(RING);
            let (mut passed, mut next) = (0, first);
            while scrub.demanded.get() > 0 {
                let piece = scrub.take(share);
                assert_eq!(piece.first, Token(next));
                next = piece.last.0.wrapping_add(1);
                passed += u128::from(piece.last.0 - piece.first.0) + 1;
            }
            assert!((RING..RING + share).contains(&passed), "{first} {share}: {passed}");
        }
    }

    #[test]
    fn a_share_of_the_data_is_due_each_day() {
        let day = u64::try_from(DAY_NANOS).expect("a day fits");
        assert_eq!(allowance(1_000_000_000, day), 15_000_000);
        assert_eq!(allowance(1 << 40, LOOK_NANOS), 11_453_246);
        assert_eq!((allowance(0, day), allowance(1 << 30, 0)), (0, 0));
    }
}
