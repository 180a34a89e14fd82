//! When and how long to wait before a retry, and whether one may be made at all.
//!
//! Invariants: retries are at most a share of successes plus a small burst, so that a struggling
//! server is not buried by them (token bucket); a wait is drawn evenly from zero to a bound that
//! doubles (full jitter), so that clients do not come back together. Seeded: the same seed gives
//! the same waits. Pure; `client/mod.rs` keeps it behind a lock.

use std::time::Duration;

use super::budget::Budget;

/// Retries that may be made before any success.
const BURST: u64 = 10;

/// Budget and jitter of one client.
#[derive(Debug)]
pub(crate) struct Retry {
    budget: Budget,
    base: Duration,
    max: Duration,
    random: u64,
}

impl Retry {
    /// A full budget. `percent`: retries earned by a hundred successes.
    pub(crate) fn new(percent: u32, base: Duration, max: Duration, seed: u64) -> Retry {
        Retry { budget: Budget::new(percent, BURST), base, max, random: seed }
    }

    /// Notes a success, which earns a part of a retry.
    pub(crate) fn succeeded(&mut self) {
        self.budget.earn();
    }

    /// Takes one retry from the budget that is made at once, elsewhere; false when it is spent.
    pub(crate) fn take(&mut self) -> bool {
        self.budget.take()
    }

    /// The same for one that is not needed, and leaves half of the burst to those that are.
    pub(crate) fn take_spare(&mut self) -> bool {
        self.budget.holds(BURST / 2 + 1) && self.take()
    }

    /// Takes one retry from the budget, and says how long to wait before it; `None` when the
    /// budget is spent. `attempt` counts from 0.
    pub(crate) fn next(&mut self, attempt: u32, at_least: Duration) -> Option<Duration> {
        if !self.take() {
            return None;
        }
        let bound = self.base.saturating_mul(1 << attempt.min(16)).min(self.max);
        let nanos = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
        let jitter = Duration::from_nanos(self.random() % nanos.saturating_add(1).max(1));
        Some(jitter + at_least)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(seed: u64) -> Retry {
        Retry::new(10, Duration::from_millis(5), Duration::from_millis(500), seed)
    }

    #[test]
    fn retries_are_a_tenth_of_successes_after_the_burst() {
        let mut retry = retry(1);
        let mut taken = 0;
        while retry.next(0, Duration::ZERO).is_some() {
            taken += 1;
        }
        assert_eq!(taken, BURST);
        for _ in 0..95 {
            retry.succeeded();
        }
        let more = (0..100).filter(|_| retry.next(0, Duration::ZERO).is_some()).count();
        assert_eq!(more, 9);
    }

    #[test]
    fn what_is_not_needed_leaves_half_of_the_burst() {
        let mut retry = retry(1);
        assert_eq!((0..100).filter(|_| retry.take_spare()).count() as u64, BURST - BURST / 2);
        assert_eq!((0..100).filter(|_| retry.take()).count() as u64, BURST / 2);
        assert!(retry.next(0, Duration::ZERO).is_none());
    }

    #[test]
    fn waits_double_up_to_the_greatest_and_are_spread() {
        for attempt in 0..40 {
            let bound = Duration::from_millis(5 << attempt.min(7)).min(Duration::from_millis(500));
            let waits: Vec<Duration> =
                (0..50).map(|seed| retry(seed).next(attempt, Duration::ZERO).unwrap()).collect();
            assert!(waits.iter().all(|wait| *wait <= bound));
            assert!(waits.iter().any(|wait| *wait < bound / 4), "jitter is full");
            assert!(waits.iter().any(|wait| *wait > bound / 2));
        }
    }

    #[test]
    fn the_same_seed_waits_the_same_and_not_less_than_told() {
        let least = Duration::from_millis(70);
        assert_eq!(retry(3).next(2, least), retry(3).next(2, least));
        assert!(retry(3).next(0, least).unwrap() >= least);
    }
}
