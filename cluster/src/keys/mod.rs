//! Keys as registers: what makes every key of a `linearizable` namespace one.
//!
//! CASPaxos for each key (see [`crate::register`] for the protocol and its proof), with what a store
//! has already in the place of what the paper keeps beside it:
//!
//! | the paper | here |
//! |---|---|
//! | accepted ballot and state | the key's record: its stamp is the ballot, the greatest wins |
//! | promise, on disk | in memory, below a ceiling of stamps that is on disk; after a crash all keys are promised up to it |
//! | a late ACCEPT | a record that sync, repair or refilling brings: taken only where a promise allows it |
//! | removal of a register | the purge floor of the store's tombstones |
//!
//! ```text
//! write: ballot = a stamp of this shard, drawn with its dot
//!        ASK ballot -> homes: promise it, if neither promise, floor nor record is as great
//!        a majority <- their heads; the greatest is the current state; the condition is judged
//!        ACCEPT record(ballot) -> those that promised, in whose memory the promise still stands
//!        a majority <- it is on their disks: done
//! read:  ASK 0 -> homes; a majority that holds the same record: it is chosen, done
//!        otherwise as a write that puts the greatest record again, under its old version
//! ```
//!
//! Why a read needs no more: a record that each of a majority holds is chosen, and whatever was
//! chosen before the read began was held by one of them, so it is no greater. Why a late record may
//! not simply be merged: a proposer that was promised a ballot above it has built on a state
//! without it. A record that is known to be chosen may ([`Step::Learn`]).
//!
//! What of it is needed, each of which a test takes away to see histories break (`tests.rs`): the
//! promise; its ceiling on disk; the rule for late records; that all promises are barred when a
//! home begins another life; that a home which lost its disk is silent until it has caught up; that
//! a read with unequal answers settles them; that nothing passes for a tombstone but what the purge
//! floor says; that a proposer knows its own overruled write again.
//!
//! Purges need no rule of their own. A proposer appends to its own log first, so its promise must
//! stand at home; a tombstone goes when all homes have it, the proposer too, and by having it has
//! broken its promise of any ballot below. What is drawn and not written yet holds back what this
//! node says to be complete, hence the floor (`annulus_engine`, `shard/reserved.rs`).
//!
//! [`acceptor`] has the promises of a shard, [`proposer`] one operation of a client, [`value`] how
//! a version outlives the ballot under which its value is put again.

pub mod acceptor;
pub mod proposer;
pub mod value;

#[cfg(test)]
mod tests;

use annulus_engine::model::{Dot, Kind, RecordRef, Timestamp, WallMicros};

pub use acceptor::Promises;
pub use proposer::{Ended, Expect, Goal, KeyOp, Step};

/// What clients see of a write, and pass back in conditions.
pub type Version = (Timestamp, Dot);

/// A record without key and value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The ballot under which it was accepted, and its dot.
    pub stored: Version,
    /// The write that made the value.
    pub version: Version,
    /// Not a tombstone.
    pub is_put: bool,
    /// Milliseconds since 2024-01-01 from which it is gone; 0 is never.
    pub expiry_ms: u64,
}

impl Head {
    /// Of a record as it is stored.
    #[must_use]
    pub fn of(record: &RecordRef<'_>) -> Head {
        Head {
            stored: record.version(),
            version: value::version_of(record),
            is_put: record.kind == Kind::Put,
            expiry_ms: record.expiry_ms,
        }
    }

    /// Whether there is a value, by this clock.
    #[must_use]
    pub fn is_live(&self, wall: WallMicros) -> bool {
        self.is_put && (self.expiry_ms == 0 || wall.as_millis() < self.expiry_ms)
    }
}

/// What a home holds under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Dead records at or below it may be gone here.
    pub purged: Timestamp,
    /// The record.
    pub head: Option<Head>,
}

impl Shown {
    /// Whether both have the same record, as far as it has not been purged.
    #[must_use]
    pub fn agrees(&self, other: &Shown, wall: WallMicros) -> bool {
        match (&self.head, &other.head) {
            (Some(ours), Some(theirs)) => ours.stored == theirs.stored,
            (None, None) => true,
            (Some(head), None) => !head.is_live(wall) && head.stored.0 <= other.purged,
            (None, Some(head)) => !head.is_live(wall) && head.stored.0 <= self.purged,
        }
    }
}
