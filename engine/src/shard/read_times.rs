//! How long blocks took to read of late, for the pace of background work.
//!
//! Invariant: a tail is told only while reads come in; what is older than a few looks does not
//! count. Buckets a quarter of a power of two wide, recorded with two instructions on the read
//! path.

use std::cell::{Cell, RefCell};

/// Buckets of each power of two.
const PER_POWER: usize = 4;
const BUCKETS: usize = 64 * PER_POWER;

/// Times of block reads, forgetting half at each look.
pub(crate) struct ReadTimes {
    counts: RefCell<[u32; BUCKETS]>,
    /// Whether there was one since the last look.
    fresh: Cell<bool>,
}

impl Default for ReadTimes {
    fn default() -> ReadTimes {
        ReadTimes { counts: RefCell::new([0; BUCKETS]), fresh: Cell::new(false) }
    }
}

fn bucket_of(nanos: u64) -> usize {
    let nanos = nanos.max(4);
    let power = nanos.ilog2();
    let within = usize::try_from((nanos >> (power - 2)) & 3).expect("two bits");
    power as usize * PER_POWER + within
}

/// The smallest time of the next bucket, in nanoseconds.
fn end_of(bucket: usize) -> u64 {
    let (power, within) = (bucket / PER_POWER, bucket as u64 % PER_POWER as u64);
    u64::try_from((u128::from(within) + 5) << (power - 2)).unwrap_or(u64::MAX)
}

impl ReadTimes {
    /// A block was read in so many nanoseconds.
    #[inline]
    pub(crate) fn record(&self, nanos: u64) {
        let count = &mut self.counts.borrow_mut()[bucket_of(nanos)];
        *count = count.saturating_add(1);
        self.fresh.set(true);
    }

    /// The 99th percentile of reads of late, in microseconds; `None` when there were none since
    /// the last look.
    pub(crate) fn take_p99_us(&self) -> Option<u64> {
        let mut counts = self.counts.borrow_mut();
        if !self.fresh.replace(false) {
            counts.fill(0);
            return None;
        }
        let total: u64 = counts.iter().copied().map(u64::from).sum();
        let mut beyond = total / 100;
        let slowest = counts.iter().enumerate().rev().find_map(|(bucket, count)| {
            let count = u64::from(*count);
            if count > beyond {
                return Some(bucket);
            }
            beyond -= count;
            None
        });
        counts.iter_mut().for_each(|count| *count /= 2);
        slowest.map(|bucket| end_of(bucket) / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tail_is_that_of_reads_of_late() {
        let times = ReadTimes::default();
        assert_eq!(times.take_p99_us(), None);
        (0..980).for_each(|_| times.record(100_000));
        (0..20).for_each(|_| times.record(5_000_000));
        assert!((5_000..6_300).contains(&times.take_p99_us().unwrap()));
        for _ in 0..2 {
            (0..1000).for_each(|_| times.record(100_000));
            times.take_p99_us();
        }
        times.record(100_000);
        assert!((100..126).contains(&times.take_p99_us().unwrap()));
        assert_eq!(times.take_p99_us(), None, "no reads, no tail");
    }

    #[test]
    fn a_single_read_is_its_own_tail() {
        let times = ReadTimes::default();
        times.record(3_000_000);
        assert!((3_000..3_751).contains(&times.take_p99_us().unwrap()));
    }

    proptest! {
        #[test]
        fn a_time_lies_in_its_bucket(nanos: u64) {
            let bucket = bucket_of(nanos);
            prop_assert!(bucket < BUCKETS && (nanos < end_of(bucket) || nanos == u64::MAX));
            prop_assert!(bucket <= bucket_of(4) || nanos >= end_of(bucket - 1));
        }
    }
}
