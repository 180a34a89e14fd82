//! A histogram of latencies, after HdrHistogram: buckets of constant relative width.
//!
//! Invariant: every latency is counted once, in a bucket at most 3 % wide; recording is a count of
//! leading zeros and an addition, on the hot path of each request that is timed.

use serde_json::{Value, json};

/// Bits of precision of a latency: 2^5 buckets per power of two, so at most 3 % off.
const PRECISION_BITS: u32 = 5;
const PER_POWER: usize = 1 << PRECISION_BITS;
/// Latencies of 2^40 ns (18 minutes) and more share the last bucket.
const POWER_MAX: u32 = 40;
const BUCKETS: usize = PER_POWER * (POWER_MAX - PRECISION_BITS + 1) as usize;

/// A histogram of latencies in nanoseconds, after HdrHistogram: buckets of constant relative
/// width. Recording costs a count of leading zeros and an addition. 9 KiB.
#[derive(Clone, PartialEq, Eq)]
pub struct Latency {
    counts: Box<[u64; BUCKETS]>,
    count: u64,
    sum_nanos: u64,
    max_nanos: u64,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency { counts: Box::new([0; BUCKETS]), count: 0, sum_nanos: 0, max_nanos: 0 }
    }
}

impl std::fmt::Debug for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Latency({} of at most {} ns)", self.count, self.max_nanos)
    }
}

/// The bucket of a latency.
#[inline]
fn bucket_of(nanos: u64) -> usize {
    if nanos < PER_POWER as u64 {
        return usize::try_from(nanos).expect("below 32");
    }
    let power = 63 - nanos.leading_zeros();
    if power >= POWER_MAX {
        return BUCKETS - 1;
    }
    let shift = power - PRECISION_BITS;
    let within = usize::try_from(nanos >> shift).expect("64-bit host") - PER_POWER;
    (shift as usize + 1) * PER_POWER + within
}

/// The smallest latency of the next bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket < PER_POWER {
        return bucket as u64 + 1;
    }
    let shift = bucket / PER_POWER - 1;
    ((bucket % PER_POWER + PER_POWER + 1) as u64) << shift
}

impl Latency {
    /// Counts one latency. O(1).
    #[inline]
    pub fn record(&mut self, nanos: u64) {
        self.counts[bucket_of(nanos)] += 1;
        self.count += 1;
        self.sum_nanos = self.sum_nanos.saturating_add(nanos);
        self.max_nanos = self.max_nanos.max(nanos);
    }

    /// Counts `times` equal latencies. O(1).
    #[inline]
    pub fn record_many(&mut self, nanos: u64, times: u64) {
        if times == 0 {
            return;
        }
        self.counts[bucket_of(nanos)] += times;
        self.count += times;
        self.sum_nanos = self.sum_nanos.saturating_add(nanos.saturating_mul(times));
        self.max_nanos = self.max_nanos.max(nanos);
    }

    /// Adds what another histogram has counted.
    pub fn merge(&mut self, other: &Latency) {
        for (count, more) in self.counts.iter_mut().zip(other.counts.iter()) {
            *count += more;
        }
        self.count += other.count;
        self.sum_nanos = self.sum_nanos.saturating_add(other.sum_nanos);
        self.max_nanos = self.max_nanos.max(other.max_nanos);
    }

    /// How many were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All of them together, in nanoseconds, saturating.
    #[must_use]
    pub fn sum_nanos(&self) -> u64 {
        self.sum_nanos
    }

    /// The greatest, in nanoseconds, exactly.
    #[must_use]
    pub fn max_nanos(&self) -> u64 {
        self.max_nanos
    }

    /// The latency below or at which this part (0 to 1) of all lies, within 3 %, in nanoseconds.
    #[must_use]
    pub fn quantile_nanos(&self, part: f64) -> u64 {
        #[expect(clippy::cast_possible_truncation, reason = "at most the count, which is a u64")]
        let rank = (part.clamp(0.0, 1.0) * self.count as f64).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= rank {
                return (bucket_end(bucket) - 1).min(self.max_nanos);
            }
        }
        self.max_nanos
    }

    /// How many were below `2^power` ns, exactly.
    pub(super) fn count_below_power(&self, power: u32) -> u64 {
        self.counts[..bucket_of(1 << power)].iter().sum()
    }

    pub(super) fn to_json(&self) -> Value {
        let us = |nanos: u64| nanos as f64 / 1000.0;
        let mean = if self.count == 0 { 0.0 } else { us(self.sum_nanos) / self.count as f64 };
        json!({
            "count": self.count,
            "p50": us(self.quantile_nanos(0.50)),
            "p90": us(self.quantile_nanos(0.90)),
            "p99": us(self.quantile_nanos(0.99)),
            "p999": us(self.quantile_nanos(0.999)),
            "p9999": us(self.quantile_nanos(0.9999)),
            "max": us(self.max_nanos),
            "mean": mean,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_one_another_without_gaps() {
        let mut end = 0;
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(end), bucket, "bucket of {end}");
            assert_eq!(bucket_of(bucket_end(bucket) - 1), bucket);
            end = bucket_end(bucket);
        }
        assert_eq!((end, bucket_of(u64::MAX)), (1 << POWER_MAX, BUCKETS - 1));
    }

    #[test]
    fn quantiles_are_within_three_percent_and_never_below() {
        let mut latency = Latency::default();
        for nanos in 1..=100_000u64 {
            latency.record(nanos * 10);
        }
        for (part, exact) in [(0.5, 500_000u64), (0.9, 900_000), (0.99, 990_000), (1.0, 1_000_000)]
        {
            let found = latency.quantile_nanos(part);
            assert!(found >= exact && found - exact <= exact / 32, "{part}: {found}");
        }
        assert_eq!(Latency::default().quantile_nanos(0.99), 0);
    }

    #[test]
    fn merging_is_recording_in_one() {
        let (mut one, mut two, mut all) =
            (Latency::default(), Latency::default(), Latency::default());
        for nanos in [1, 31, 32, 1000, 1 << 30, u64::MAX] {
            one.record(nanos);
            all.record(nanos);
        }
        for nanos in [5, 77_777] {
            two.record(nanos);
            all.record(nanos);
        }
        one.merge(&two);
        assert_eq!(one, all);
    }
}
