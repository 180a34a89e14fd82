//! How full the disk is, in three levels: pace, refuse new data, keep the reserve.
//!
//! Invariant: deletes, compaction and reads go on at every level but the last, where only
//! compaction and reads do; each level ends by itself when space returns.

use std::cell::Cell;

use crate::Error;
use crate::disk::Space;

/// How full the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpaceLevel {
    /// Enough space.
    Normal,
    /// Below `space_pace_bytes`: writes are slowed.
    Pace,
    /// Below `space_refuse_bytes`: new data is refused, deletes are accepted.
    RefuseData,
    /// Below `space_reserve_bytes`: what is left belongs to compaction.
    Reserve,
}

/// Free-space thresholds, in bytes, each at most the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thresholds {
    pub(crate) pace: u64,
    pub(crate) refuse: u64,
    pub(crate) reserve: u64,
}

/// The last look at the disk's space.
#[derive(Debug)]
pub(crate) struct SpaceWatch {
    thresholds: Thresholds,
    last: Cell<Space>,
}

impl SpaceWatch {
    pub(crate) fn new(thresholds: Thresholds, now: Space) -> SpaceWatch {
        SpaceWatch { thresholds, last: Cell::new(now) }
    }

    /// Takes note of what the disk says.
    pub(crate) fn update(&self, now: Space) {
        self.last.set(now);
    }

    /// What the disk said last.
    pub(crate) fn last(&self) -> Space {
        self.last.get()
    }

    /// The present level.
    #[inline]
    pub(crate) fn level(&self) -> SpaceLevel {
        let free = self.last.get().free;
        if free >= self.thresholds.pace {
            SpaceLevel::Normal
        } else if free >= self.thresholds.refuse {
            SpaceLevel::Pace
        } else if free >= self.thresholds.reserve {
            SpaceLevel::RefuseData
        } else {
            SpaceLevel::Reserve
        }
    }

    /// Bytes that a compaction step may write before it gives any back: all that is free, the
    /// reserve too, as that is what it is for; but a flush of a memtable must still find its place,
    /// for tombstones give nothing back before they are in a table.
    pub(crate) fn room(&self, memtable_size: u64) -> u64 {
        self.last.get().free.saturating_sub(memtable_size.min(self.thresholds.reserve / 2))
    }

    /// The error for a write that the present level refuses.
    pub(crate) fn refusal(&self) -> Error {
        let Space { free, total } = self.last.get();
        let kept = match self.level() {
            SpaceLevel::Reserve => self.thresholds.reserve,
            _ => self.thresholds.refuse,
        };
        Error::Full { what: format!("{free} of {total} bytes are free, {kept} are kept back") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_free_space_both_ways() {
        let space = |free| Space { free, total: 1000 };
        let thresholds = Thresholds { pace: 300, refuse: 200, reserve: 100 };
        let watch = SpaceWatch::new(thresholds, space(500));
        for (free, level) in [
            (300, SpaceLevel::Normal),
            (299, SpaceLevel::Pace),
            (200, SpaceLevel::Pace),
            (199, SpaceLevel::RefuseData),
            (100, SpaceLevel::RefuseData),
            (0, SpaceLevel::Reserve),
            (400, SpaceLevel::Normal),
        ] {
            watch.update(space(free));
            assert_eq!(watch.level(), level, "{free} free");
        }
    }
}
