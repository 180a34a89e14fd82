//! Which data is read next, only to prove that the tree is still the data's.
//!
//! A tree that is kept up by differences proves that the counters of two replicas agree, not that
//! their disks do. So a small share of the data is read each day, leaf by leaf in the order of the
//! tokens, and now and then, when somebody asks, all of it.
//! Invariant: each leaf has its turn before any has its second.

use annulus_engine::model::{Instant, PartitionId};

use super::merkle::Node;

const DAY_NANOS: u128 = 86_400_000_000_000;
/// A shard without partitions is asked again after so long.
const EMPTY_NANOS: u64 = 1_000_000_000;

/// How fast data is read for no other reason than to check it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOptions {
    /// Share of the data read in a day, in millionths; 0 reads none. Default 15,000: 1.5 %.
    pub share_per_day_ppm: u32,
    /// Bytes a second while all of it is read on demand. Default 64 MiB.
    pub demand_bytes_per_second: u64,
}

impl Default for ScrubOptions {
    fn default() -> ScrubOptions {
        ScrubOptions { share_per_day_ppm: 15_000, demand_bytes_per_second: 64 << 20 }
    }
}

/// Where the reading has come to. Kept over a restart, so that each leaf has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ScrubPosition {
    /// The partition that is read.
    pub partition: PartitionId,
    /// Its leaf that comes next, as the part of the partition before it: 2^32 would be all.
    pub part: u32,
}

/// A partition to read: its id, and the depth of its leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubPartition {
    /// Which one.
    pub partition: PartitionId,
    /// As [`super::MerkleTree::leaf_bits`].
    pub leaf_bits: u8,
}

/// What has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ScrubProgress {
    /// Leaves read since the start.
    pub leaves: u64,
    /// Bytes read since the start.
    pub bytes: u64,
    /// Times that the end of the data was reached.
    pub cycles: u64,
    /// Leaves that a reading on demand has still to do; 0 when none is under way.
    pub demanded: u64,
}

/// See the module. One for each shard.
#[derive(Clone, Debug)]
pub struct Scrubber {
    options: ScrubOptions,
    position: ScrubPosition,
    next_at: Instant,
    progress: ScrubProgress,
}

impl Scrubber {
    /// One that goes on at `position`; its first reading is due at `first_at`.
    #[must_use]
    pub fn new(options: ScrubOptions, position: ScrubPosition, first_at: Instant) -> Scrubber {
        Scrubber { options, position, next_at: first_at, progress: ScrubProgress::default() }
    }

    /// The leaf to read at `now`, if it is time. `partitions` are all of the shard, in order.
    /// The pace is set by the number of leaves, which hold about as much each.
    pub fn next(
        &mut self,
        now: Instant,
        partitions: impl Iterator<Item = ScrubPartition> + Clone,
    ) -> Option<(PartitionId, Node)> {
        let share = u128::from(self.options.share_per_day_ppm);
        if now < self.next_at || (share == 0 && self.progress.demanded == 0) {
            return None;
        }
        let found = partitions.clone().find(|one| one.partition >= self.position.partition);
        let Some(chosen) = found.or_else(|| partitions.clone().next()) else {
            self.next_at = now.after_nanos(EMPTY_NANOS);
            return None;
        };
        if found.is_none() {
            self.progress.cycles += 1;
            self.position = ScrubPosition::default();
        }
        if chosen.partition > self.position.partition {
            self.position = ScrubPosition { partition: chosen.partition, part: 0 };
        }
        let bits = u32::from(chosen.leaf_bits);
        let index = self.position.part.checked_shr(32 - bits).unwrap_or(0);
        self.position.part = match (u64::from(index) + 1) << (32 - bits) {
            next if next >> 32 == 0 => u32::try_from(next).expect("just checked"),
            _ => {
                self.position.partition.0 += 1;
                0
            }
        };
        let leaves: u128 = partitions.map(|one| 1u128 << one.leaf_bits).sum();
        if self.progress.demanded == 0 {
            let pause = DAY_NANOS * 1_000_000 / (leaves * share);
            // From when it was due, so that the share is kept; but no long pause is made up for.
            let pause = u64::try_from(pause).unwrap_or(u64::MAX);
            self.next_at = self.next_at.after_nanos(pause).max(now);
        }
        Some((chosen.partition, Node { level: chosen.leaf_bits, index }))
    }

    /// The leaf has been read, and so many bytes for it.
    pub fn done(&mut self, now: Instant, bytes: u64) {
        self.progress.leaves += 1;
        self.progress.bytes += bytes;
        if self.progress.demanded > 0 {
            self.progress.demanded -= 1;
            let per_second = u128::from(self.options.demand_bytes_per_second.max(1));
            let pause = u128::from(bytes) * 1_000_000_000 / per_second;
            self.next_at = now.after_nanos(u64::try_from(pause).unwrap_or(u64::MAX));
        }
    }

    /// Reads `leaves` leaves from here on, as many as there are, at the speed for demands.
    pub fn demand(&mut self, now: Instant, leaves: u64) {
        self.progress.demanded = leaves;
        self.next_at = now;
    }

    /// When the next leaf is due.
    #[must_use]
    pub fn next_at(&self) -> Instant {
        let is_idle = self.options.share_per_day_ppm == 0 && self.progress.demanded == 0;
        if is_idle { Instant(u64::MAX) } else { self.next_at }
    }

    /// Where it has come to.
    #[must_use]
    pub fn position(&self) -> ScrubPosition {
        self.position
    }

    /// What has been read.
    #[must_use]
    pub fn progress(&self) -> ScrubProgress {
        self.progress
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const HOUR: u64 = 3_600_000_000_000;

    fn partitions(bits: &[(u32, u8)]) -> Vec<ScrubPartition> {
        bits.iter()
            .map(|(id, leaf_bits)| ScrubPartition {
                partition: PartitionId(*id),
                leaf_bits: *leaf_bits,
            })
            .collect()
    }

    #[test]
    fn each_leaf_has_its_turn_and_a_share_of_them_each_day() {
        let partitions = partitions(&[(3, 0), (5, 4), (9, 7)]);
        let options = ScrubOptions { share_per_day_ppm: 20_000, ..ScrubOptions::default() };
        let mut scrubber = Scrubber::new(options, ScrubPosition::default(), Instant(0));
        let mut read = BTreeSet::new();
        for hour in 0..24 * 50 {
            while let Some(leaf) = scrubber.next(Instant(hour * HOUR), partitions.iter().copied()) {
                assert!(read.insert(leaf), "{leaf:?} twice in hour {hour}");
                scrubber.done(Instant(hour * HOUR), 100);
            }
        }
        // 2 % a day are all in fifty days, but for the rounding of this test's hours.
        assert!((140..=145).contains(&read.len()), "{}", read.len());
        assert_eq!(scrubber.progress().bytes, read.len() as u64 * 100);
    }

    #[test]
    fn on_demand_all_of_it_is_read_at_its_own_speed() {
        let partitions = partitions(&[(0, 3), (1, 2)]);
        let options = ScrubOptions { share_per_day_ppm: 0, demand_bytes_per_second: 1000 };
        let mut scrubber = Scrubber::new(options, ScrubPosition::default(), Instant(0));
        assert_eq!(scrubber.next(Instant(HOUR), partitions.iter().copied()), None);
        assert_eq!(scrubber.next_at(), Instant(u64::MAX));
        scrubber.demand(Instant(HOUR), 12);
        let (mut now, mut read) = (Instant(HOUR), BTreeSet::new());
        while scrubber.progress().demanded > 0 {
            read.extend(scrubber.next(now, partitions.iter().copied()));
            scrubber.done(now, 500);
            now = scrubber.next_at().min(now.after_nanos(HOUR));
        }
        assert_eq!(read.len(), 12);
        assert_eq!(now.nanos_since(Instant(HOUR)), 11 * 500_000_000 + HOUR);
    }

    #[test]
    fn a_place_in_the_data_outlives_another_number_of_leaves_and_lost_partitions() {
        let options = ScrubOptions::default();
        let position = ScrubPosition { partition: PartitionId(4), part: 1 << 31 };
        let mut scrubber = Scrubber::new(options, position, Instant(0));
        let leaf = scrubber.next(Instant(0), partitions(&[(4, 2)]).into_iter());
        assert_eq!(leaf, Some((PartitionId(4), Node { level: 2, index: 2 })));
        let mut scrubber = Scrubber::new(options, position, Instant(0));
        let leaf = scrubber.next(Instant(0), partitions(&[(2, 1), (7, 1)]).into_iter());
        assert_eq!(leaf, Some((PartitionId(7), Node { level: 1, index: 0 })));
        let mut scrubber = Scrubber::new(options, position, Instant(0));
        let leaf = scrubber.next(Instant(0), partitions(&[(2, 1)]).into_iter());
        assert_eq!(leaf, Some((PartitionId(2), Node { level: 1, index: 0 })));
        assert_eq!(scrubber.next(Instant(0), partitions(&[]).into_iter()), None);
    }
}
