//! The commit log: what an acknowledged write rests on until a table holds it.
//!
//! ```text
//! log/0000000007.log            one segment, zeroed once, then recycled under new ids
//! +---------+---------+---------+-------+-- -- -- -----------+
//! | segment | batch   | batch   | batch |   zeros, or what a |
//! | header  |         |         |       |   former life left |
//! | 4 KiB   |         |         |       |                    |
//! +---------+---------+---------+-------+-- -- -- -----------+
//!           |         |
//!           | header 40 B | record | record | ... | zeros to the device's alignment |
//! ```
//!
//! A batch is everything that waited while earlier writes were under way: one device write, one
//! sync. Several batches are in flight at once; they are acknowledged in order only, so a crash
//! costs a suffix of the log and never a hole. A long record is a batch of its own, copied and
//! checked in steps (`large.rs`).
//!
//! # Life of a segment
//! `N.tmp` (being zeroed, or taken from the free ones) -> header written and synced -> renamed
//! `N.log`, directory synced: *ready* -> batches: *current* -> full: *used* -> all its records
//! are in tables: *free* -> `M.tmp`, and round again. A name that ends in `.log` therefore always
//! has a header that says the same id; leftovers that end in `.tmp` are removed at the next start.
//!
//! # Lives of the log
//! Each start of the log is a *life*: it never appends to a segment of an earlier life, and its
//! segment headers say after which record it began. What an earlier life left beyond that record
//! (batches that a crash kept although an earlier one was lost) is void for ever.
//!
//! Invariant: a record with number `n` is acknowledged only when it and all records before it
//! are durable (`Sync`), and replay gives back exactly a prefix of what was appended that holds
//! at least everything acknowledged, or refuses.

pub mod format;
mod large;
pub mod loss;
mod prepare;
pub mod replay;
mod segments;
mod state;
mod task;
mod wait;
pub mod writer;

pub use format::{Control, LogIdentity, ReplayItem};
pub use loss::{Loss, OnDamage, keep_aside, remove_damaged};
pub use replay::{Relief, ReplayEnd, replay, replay_with};
pub use writer::{CommitLog, LogStats, Sink};

/// Number of a record in its shard's log: from 1, strictly increasing, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Before every record.
    pub const ZERO: Lsn = Lsn(0);

    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Lsn {
        Lsn(self.0 + 1)
    }
}

#[cfg(test)]
mod tests;
