//! Time: hybrid logical clock readings, wall time, and the monotonic clock.
//!
//! Invariant: a [`HybridClock`] never gives the same or a smaller [`Timestamp`] twice, whatever
//! the wall clock does. Follows Kulkarni et al., "Logical Physical Clocks" (2014), with the two
//! parts packed in 64 bits: 52 bits of microseconds since 2024-01-01, 12 bits of counter.

use std::fmt;

/// Unix time of the epoch of all wall times here, 2024-01-01T00:00:00Z, in microseconds.
pub const EPOCH_UNIX_MICROS: u64 = 1_704_067_200_000_000;

const COUNTER_BITS: u32 = 12;
const COUNTER_MAX: u64 = (1 << COUNTER_BITS) - 1;

/// Physical time in microseconds since 2024-01-01. May jump; never used for order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct WallMicros(pub u64);

impl WallMicros {
    /// The same moment in milliseconds since 2024-01-01, the unit of expiry.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        self.0 / 1000
    }
}

/// A reading of the monotonic clock in nanoseconds from an arbitrary start. Never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Instant(pub u64);

impl Instant {
    /// This instant moved forward, saturating.
    #[must_use]
    pub fn after_nanos(self, nanos: u64) -> Instant {
        Instant(self.0.saturating_add(nanos))
    }

    /// Nanoseconds from `earlier` to this instant; 0 when `earlier` is later.
    #[must_use]
    pub fn nanos_since(self, earlier: Instant) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A hybrid logical clock reading. Zero means "before every write".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Before every write.
    pub const ZERO: Timestamp = Timestamp(0);
    /// After every write.
    pub const MAX: Timestamp = Timestamp(u64::MAX);

    /// From wall time and counter (0..4096).
    #[must_use]
    pub fn new(wall: WallMicros, counter: u64) -> Timestamp {
        debug_assert!(counter <= COUNTER_MAX);
        Timestamp((wall.0 << COUNTER_BITS) | counter)
    }

    /// The wall part.
    #[must_use]
    pub fn wall(self) -> WallMicros {
        WallMicros(self.0 >> COUNTER_BITS)
    }

    /// The counter part, 0..4096.
    #[must_use]
    pub fn counter(self) -> u64 {
        self.0 & COUNTER_MAX
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.wall().0, self.counter())
    }
}

/// A stamp from a clock that is too far ahead of ours. State: the clock is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "timestamp is {ahead_us} us ahead of this node's clock, more than the limit of {limit_us} us"
)]
pub struct ClockSkew {
    /// How far ahead the stamp is, in microseconds.
    pub ahead_us: u64,
    /// The limit, in microseconds.
    pub limit_us: u64,
}

/// One shard's hybrid logical clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct HybridClock {
    last: Timestamp,
}

impl HybridClock {
    /// A clock whose next reading is above `floor` (the durable ceiling after a restart).
    #[must_use]
    pub fn starting_above(floor: Timestamp) -> HybridClock {
        HybridClock { last: floor }
    }

    /// The next reading, above every earlier reading and observation.
    pub fn tick(&mut self, now: WallMicros) -> Timestamp {
        let physical = Timestamp::new(now, 0);
        // Adding one carries from the counter into the microseconds by itself.
        self.last = physical.max(Timestamp(self.last.0 + 1));
        self.last
    }

    /// Takes note of another clock's stamp, so that the next reading is above it.
    ///
    /// # Errors
    /// [`ClockSkew`] when the stamp is above all of this clock's and more than `limit_us` ahead of
    /// `now`; it is not merged. A stamp that this clock has passed is never too far ahead: after
    /// a restart the clock itself runs ahead of the wall for a while.
    pub fn observe(
        &mut self,
        seen: Timestamp,
        now: WallMicros,
        limit_us: u64,
    ) -> Result<(), ClockSkew> {
        let ahead_us = seen.wall().0.saturating_sub(now.0);
        if seen > self.last && ahead_us > limit_us {
            return Err(ClockSkew { ahead_us, limit_us });
        }
        self.last = self.last.max(seen);
        Ok(())
    }

    /// The greatest stamp given or observed.
    #[must_use]
    pub fn last(&self) -> Timestamp {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ticks_strictly_increase_whatever_the_wall_clock_does(walls in prop::collection::vec(0u64..1 << 50, 1..50)) {
            let mut clock = HybridClock::default();
            let mut last = Timestamp::ZERO;
            for wall in walls {
                let stamp = clock.tick(WallMicros(wall));
                prop_assert!(stamp > last);
                last = stamp;
            }
        }

        #[test]
        fn a_tick_is_above_what_was_observed(seen in 0u64..1 << 60, now in 0u64..1 << 50) {
            let mut clock = HybridClock::default();
            let seen = Timestamp(seen);
            match clock.observe(seen, WallMicros(now), 500_000) {
                Ok(()) => prop_assert!(clock.tick(WallMicros(now)) > seen),
                Err(skew) => {
                    prop_assert!(skew.ahead_us > 500_000);
                    prop_assert_eq!(clock.last(), Timestamp::ZERO);
                }
            }
        }
    }

    #[test]
    fn a_clock_that_restarted_ahead_of_the_wall_accepts_its_own_stamps() {
        // A client that read and wrote back within two seconds of a restart was refused.
        let mut clock = HybridClock::starting_above(Timestamp::new(WallMicros(5_000_000), 0));
        let own = clock.tick(WallMicros(3_000_000));
        assert_eq!(clock.observe(own, WallMicros(3_000_000), 500_000), Ok(()));
        let foreign = Timestamp(own.0 + 1);
        assert!(clock.observe(foreign, WallMicros(3_000_000), 500_000).is_err());
    }

    #[test]
    fn a_full_counter_carries_into_the_microseconds() {
        let mut clock = HybridClock::starting_above(Timestamp::new(WallMicros(9), COUNTER_MAX));
        assert_eq!(clock.tick(WallMicros(9)), Timestamp::new(WallMicros(10), 0));
    }
}
