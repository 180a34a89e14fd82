//! Versions that are given out before their write: a proposer needs the stamp, which is its ballot,
//! before it knows what it will write, or whether.
//!
//! Invariant: stamps and sequences of an origin rise together, as those of plain writes do, because
//! both are drawn in one step; a version ends as a write or as a void, and until either is visible
//! no promise of this shard ("no write of mine at or below it is missing") passes its stamp. What
//! the log does not take now is voided later.

use std::collections::BTreeMap;

use super::replicas::set_of;
use super::{Shard, ShardState};
use crate::disk::Disk;
use crate::log::Lsn;
use crate::model::{
    Dot, NamespaceId, PartitionId, Record, RecordRef, Timestamp, Token, WallMicros,
};
use crate::runtime::Runtime;
use crate::{Error, Result};

#[derive(Clone, Copy, Debug)]
enum Fate {
    /// Nobody has said yet.
    Open,
    /// It is to be voided, of this token's partition.
    Void(Token, Dot),
    /// It ends with this record of the log.
    Ends(Lsn),
}

/// The versions of this shard that are out.
#[derive(Debug, Default)]
pub(crate) struct Reserved {
    versions: BTreeMap<Timestamp, Fate>,
}

impl Reserved {
    /// The least stamp whose version is out.
    pub(super) fn oldest(&mut self, visible: Lsn) -> Option<Timestamp> {
        while let Some(first) = self.versions.first_entry()
            && matches!(first.get(), Fate::Ends(lsn) if *lsn <= visible)
        {
            first.remove();
        }
        self.versions.first_key_value().map(|(stamp, _)| *stamp)
    }

    fn end(&mut self, stamp: Timestamp, fate: Fate) {
        self.versions.insert(stamp, fate);
    }
}

impl<D: Disk, R: Runtime> ShardState<D, R> {
    /// Not above the stamp of any version that is out.
    pub(super) fn held_back(&self, stamp: Timestamp) -> Timestamp {
        match self.reserved.borrow_mut().oldest(self.log.visible()) {
            Some(oldest) => stamp.min(Timestamp(oldest.0 - 1)),
            None => stamp,
        }
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Draws the version of a write of this token that may follow: it ends with
    /// [`Shard::apply_reserved`] or [`Shard::void_reserved`]. The stamp may be told to others once
    /// [`Shard::ceiling_above`] says so.
    ///
    /// # Errors
    /// `Busy`, `Full`, `Poisoned`. State: unchanged.
    pub fn reserve_version(&self, token: Token, wall: WallMicros) -> Result<(Timestamp, Dot)> {
        self.void_late();
        let mut versions = self.state.versions.borrow_mut();
        let stamp = versions.clock.tick(wall);
        let partition = token.partition(self.state.identity.partition_bits);
        let sequence = versions.next_sequence(partition);
        self.state.reserve(&mut versions, stamp, sequence, wall)?;
        if sequence > versions.durable_ceilings().1 {
            return Err(Error::Busy { what: "sequences of writes are being reserved" });
        }
        versions.issue(partition, sequence);
        drop(versions);
        self.state.reserved.borrow_mut().end(stamp, Fate::Open);
        Ok((stamp, Dot { origin: self.state.identity.node, sequence }))
    }

    /// Gives the write of a reserved version its place in the log.
    ///
    /// # Errors
    /// As [`Shard::merge_again`]. State: unchanged, the version is still out.
    pub fn apply_reserved(&self, record: &RecordRef<'_>, wall: WallMicros) -> Result<Lsn> {
        let lsn = self.merge_again(record, wall)?;
        self.state.reserved.borrow_mut().end(record.timestamp, Fate::Ends(lsn));
        Ok(lsn)
    }

    /// Says that no write has this version: now, or as soon as the log takes it.
    pub fn void_reserved(&self, token: Token, (stamp, dot): (Timestamp, Dot)) {
        self.state.reserved.borrow_mut().end(stamp, Fate::Void(token, dot));
        self.void_late();
    }

    fn void_late(&self) {
        let late: Vec<(Timestamp, Token, Dot)> = {
            let reserved = self.state.reserved.borrow();
            let late = reserved.versions.iter().filter_map(|(stamp, fate)| match fate {
                Fate::Void(token, dot) => Some((*stamp, *token, *dot)),
                Fate::Open | Fate::Ends(_) => None,
            });
            late.collect()
        };
        for (stamp, token, dot) in late {
            let partition = token.partition(self.state.identity.partition_bits);
            let Ok(lsn) = self.adopt_seen(partition, &set_of([(dot, stamp)])) else { return };
            self.state.reserved.borrow_mut().end(stamp, Fate::Ends(lsn));
        }
    }

    /// Asks the log for a ceiling at or above this stamp, so that after any crash [`Shard::floor`]
    /// is not below it. `None`: there is one; else it is there when the log is durable up to this.
    ///
    /// # Errors
    /// `Invalid` when the stamp is too far ahead of the clock; `Busy`, `Full`, `Poisoned`.
    pub fn ceiling_above(&self, stamp: Timestamp, wall: WallMicros) -> Result<Option<Lsn>> {
        self.clock_observe(stamp, wall)?;
        let mut versions = self.state.versions.borrow_mut();
        self.state.reserve(&mut versions, stamp, 0, wall)?;
        if versions.durable_ceilings().0 >= stamp {
            return Ok(None);
        }
        Ok(Some(self.state.ceiling_at.get()))
    }

    /// Waits until the log is durable up to there.
    ///
    /// # Errors
    /// `Poisoned`.
    pub async fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        self.state.log.wait_durable(lsn).await
    }

    /// What an earlier life of this shard has stamped, stored, or let a ceiling be asked for, is at
    /// or below it.
    #[must_use]
    pub fn floor(&self) -> Timestamp {
        self.state.versions.borrow().void_end(PartitionId(0)).1
    }

    /// Whether a write of the token is between log and memory.
    #[must_use]
    pub fn is_settling(&self, token: Token) -> bool {
        let visible = self.state.log.visible();
        let last = self.state.unsettled.borrow().last_of(token);
        last.max(Some(self.state.dropped_at.get())).is_some_and(|lsn| lsn > visible)
    }

    /// What is under a key, with every write that the log had taken before this returns.
    ///
    /// # Errors
    /// Whatever the read met.
    pub async fn get_taken(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Record>> {
        loop {
            if let Some(found) = self.get_settled(token, namespace, key).await? {
                return Ok(found);
            }
        }
    }

    /// Whether this directory is not one that replaces a lost one and has not caught up since. It
    /// begins with a gap in every partition; [`Shard::declare_own_void`] or [`Shard::forget_gap`]
    /// close it when all is here that others have. Later gaps, of crashes, take nothing away that
    /// was durable, and are told by what was declared void before. What was here and has moved away
    /// leaves no gap: the partition may come back.
    #[must_use]
    pub fn is_founded(&self, partition: PartitionId) -> bool {
        let first = crate::recover::first_sequence(&self.state.identity, &self.state.options);
        !self.has_gap(partition)
            || self.with_seen(partition, |seen| seen.of(self.state.identity.node).base() >= first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_wait_for_versions_that_are_out_in_any_order() {
        let mut reserved = Reserved::default();
        for stamp in [5, 7, 9] {
            reserved.end(Timestamp(stamp), Fate::Open);
        }
        reserved.end(Timestamp(7), Fate::Ends(Lsn(1)));
        assert_eq!(reserved.oldest(Lsn(1)), Some(Timestamp(5)));
        reserved.end(Timestamp(5), Fate::Ends(Lsn(2)));
        assert_eq!(reserved.oldest(Lsn(1)), Some(Timestamp(5)));
        assert_eq!(reserved.oldest(Lsn(2)), Some(Timestamp(9)));
    }
}
