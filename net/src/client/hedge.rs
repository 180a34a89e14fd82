//! When a read that is late is sent once more to another node (a hedge), and how often.
//!
//! Invariants: hedges are at most a share of reads plus a small burst (token bucket), and none is
//! made while servers say that they are busy: then more requests would only make it worse. A read
//! is late when it has taken longer than about 97 of 100 recent ones; the estimate is one number,
//! raised by an eighth by each read above it and lowered by a 256th by each below, so it rests
//! where 1 read in 33 is above. Pure: the time is an argument; `client/pool.rs` keeps it.
//! After Dean and Barroso, "The Tail at Scale", 2013.

use std::time::Duration;

use annulus_engine::model::Instant;

use super::budget::Budget;

/// Hedges that may be made before any read.
const BURST: u64 = 5;
/// No estimate is above it, in nanoseconds.
const ESTIMATE_MAX: u64 = 1_000_000_000;
/// No hedges for so long after a server said that it is busy, in nanoseconds.
const QUIET_AFTER_BUSY: u64 = 1_000_000_000;

/// Estimate and budget of one client.
#[derive(Debug)]
pub(crate) struct Hedge {
    is_on: bool,
    budget: Budget,
    floor: u64,
    estimate: u64,
    quiet_until: Instant,
}

impl Hedge {
    /// `percent`: hedges earned by a hundred reads; 0 for none ever. `floor`: no read is late
    /// before.
    pub(crate) fn new(percent: u32, floor: Duration) -> Hedge {
        let floor = u64::try_from(floor.as_nanos()).unwrap_or(u64::MAX).max(1);
        Hedge {
            is_on: percent > 0,
            budget: Budget::new(percent, BURST),
            floor,
            // A guess until the first reads bring it down.
            estimate: floor.saturating_mul(10).min(ESTIMATE_MAX),
            quiet_until: Instant(0),
        }
    }

    /// Notes a read that was answered, which earns a part of a hedge.
    pub(crate) fn read(&mut self, took: u64) {
        self.budget.earn();
        self.estimate = if took > self.estimate {
            self.estimate.saturating_add(self.estimate / 8 + 1).min(ESTIMATE_MAX)
        } else {
            self.estimate - self.estimate / 256
        };
    }

    /// Nanoseconds after which a read is late; `None` when there are no hedges.
    pub(crate) fn after(&self) -> Option<u64> {
        self.is_on.then(|| self.estimate.max(self.floor))
    }

    /// A server said that it is busy.
    pub(crate) fn busy(&mut self, now: Instant) {
        self.quiet_until = now.after_nanos(QUIET_AFTER_BUSY);
    }

    /// Whether a hedge may be made now; if so, it is paid for.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.is_on && now >= self.quiet_until && self.budget.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;
    const MS: u64 = 1_000_000;

    fn hedge(percent: u32) -> Hedge {
        Hedge::new(percent, Duration::from_millis(1))
    }

    /// Pseudo-random numbers below `bound`.
    fn draw(state: &mut u64, bound: u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*state >> 33) % bound
    }

    #[test]
    fn the_estimate_rests_where_few_reads_are_above_and_follows_them() {
        let (mut hedge, mut state) = (hedge(5), 1);
        for scale in [20 * MS, 4 * MS, 60 * MS] {
            for _ in 0..5_000 {
                hedge.read(draw(&mut state, scale));
            }
            let mut above = 0;
            for _ in 0..10_000 {
                let took = draw(&mut state, scale);
                above += u64::from(took > hedge.after().unwrap());
                hedge.read(took);
            }
            assert!((150..=500).contains(&above), "{above} of 10000 above at {scale}");
        }
    }

    #[test]
    fn no_read_is_late_before_the_floor() {
        let mut hedge = hedge(5);
        for _ in 0..10_000 {
            hedge.read(80 * US);
        }
        assert_eq!(hedge.after(), Some(MS));
        // And it has not forgotten how to rise.
        for _ in 0..100_000 {
            hedge.read(30 * MS);
            if hedge.after().unwrap() > 25 * MS {
                return;
            }
        }
        panic!("{:?}", hedge.after());
    }

    #[test]
    fn hedges_are_a_twentieth_of_reads_after_the_burst() {
        let mut hedge = hedge(5);
        let mut taken = 0;
        for _ in 0..10_000 {
            hedge.read(100 * MS);
            taken += u64::from(hedge.take(Instant(0)));
        }
        assert!((500..=500 + BURST).contains(&taken), "{taken}");
    }

    #[test]
    fn none_are_made_while_servers_are_busy_or_when_turned_off() {
        let mut hedge = hedge(5);
        hedge.busy(Instant(MS));
        assert!(!hedge.take(Instant(500 * MS)));
        assert!(hedge.take(Instant(1_001 * MS)));
        let mut off = super::Hedge::new(0, Duration::ZERO);
        off.read(MS);
        assert_eq!(off.after(), None);
        assert!(!off.take(Instant(0)));
    }
}
