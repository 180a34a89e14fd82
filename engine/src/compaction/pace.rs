//! How fast background work may go, and how much foreground writes must give way. Pure.
//!
//! Two controls, both smooth. [`Pace`] gives compaction a rate: what the debt needs at least, more
//! while foreground reads are quick, less when their tail grows (`rate *= clamp(1 - err / 2)`,
//! ten times a second). [`write_delay`] slows writes when compaction or flush cannot keep up: it
//! rises from zero with the square of the excess, so it starts early and small, and there is no
//! level at which writes stop. Where it equals what compaction needs for the bytes, the debt
//! stands still; that is reached well before space is short.
//!
//! Invariant: both are continuous in the debt; no input, however odd, gives a delay above
//! [`DELAY_FULL_MAX_NANOS`] or a rate outside its bounds.

use super::plan::Pressure;
use crate::model::Instant;
use crate::options::CompactionOptions;
use crate::tables::layout::to_f64;

/// Longest delay of one write, in nanoseconds.
pub const DELAY_MAX_NANOS: u64 = 4_000_000;
/// The same while every memtable is full: with many writes under way at once, short delays would
/// not bring their sum down to what flush takes, and memory would grow without bound.
pub const DELAY_FULL_MAX_NANOS: u64 = 100_000_000;
/// Foreground read latency (99th percentile) that the controller aims at, in microseconds.
const LATENCY_TARGET_US: f64 = 2_000.0;
/// How long measured rates are remembered, in seconds.
const MEMORY_S: f64 = 20.0;
/// Guess of a device's write rate before anything was measured, in bytes a second.
const RATE_GUESS: f64 = 128.0 * 1024.0 * 1024.0;
/// Work that may be done at once after a pause, in nanoseconds of the current rate.
const BURST_NANOS: u64 = 20_000_000;

/// A rate measured from amounts and times, forgetting slowly.
#[derive(Clone, Copy, Debug)]
struct Rate {
    amount: f64,
    seconds: f64,
}

impl Rate {
    fn guess(rate: f64) -> Rate {
        Rate { amount: rate * 0.5, seconds: 0.5 }
    }

    fn add(&mut self, amount: u64, nanos: u64) {
        let seconds = to_f64(nanos) / 1e9;
        let keep = (-seconds / MEMORY_S).exp();
        self.amount = self.amount * keep + to_f64(amount);
        self.seconds = self.seconds * keep + seconds;
    }

    fn per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.amount / self.seconds } else { 0.0 }
    }
}

/// The pace of one shard's background work.
#[derive(Clone, Debug)]
pub struct Pace {
    rate_min: f64,
    rate_max: f64,
    horizon_s: f64,
    /// What the latency controller allows, in bytes a second.
    allowed: f64,
    /// What the debt asks for, in bytes a second.
    needed: f64,
    /// Bytes that writers bring, that flushes write, that compaction writes.
    ingest: Rate,
    flush: Rate,
    compaction: Rate,
    last_flush: Option<Instant>,
    free_at: Instant,
}

impl Pace {
    /// A pace that has seen nothing yet.
    #[must_use]
    pub fn new(options: &CompactionOptions) -> Pace {
        let (rate_min, rate_max) = (to_f64(options.rate_min), to_f64(options.rate_max));
        Pace {
            rate_min,
            rate_max,
            horizon_s: to_f64(options.debt_horizon_ms) / 1e3,
            allowed: rate_min,
            needed: 0.0,
            ingest: Rate { amount: 0.0, seconds: 0.0 },
            flush: Rate::guess(RATE_GUESS),
            compaction: Rate::guess(RATE_GUESS),
            last_flush: None,
            free_at: Instant(0),
        }
    }

    /// Ten times a second: the 99th percentile of foreground reads of the last second, in
    /// microseconds; `None` when there were none.
    pub fn observe_latency(&mut self, p99_us: Option<u64>) {
        let error = p99_us.map_or(-1.0, |p99| to_f64(p99) / LATENCY_TARGET_US - 1.0);
        let factor = (1.0 - 0.5 * error).clamp(0.5, 1.1);
        self.allowed = (self.allowed * factor).clamp(self.rate_min, self.rate_max);
    }

    /// A flush has written `bytes` in `nanos`.
    pub fn flushed(&mut self, now: Instant, bytes: u64, nanos: u64) {
        self.flush.add(bytes, nanos.max(1));
        if let Some(last) = self.last_flush.replace(now) {
            self.ingest.add(bytes, now.nanos_since(last).max(1));
        }
    }

    /// A compaction step has written `bytes` in `nanos`, not counting sleeps for the pace.
    pub fn compacted(&mut self, bytes: u64, nanos: u64) {
        self.compaction.add(bytes, nanos.max(1));
    }

    /// The table set has changed.
    pub fn set_pressure(&mut self, pressure: &Pressure) {
        let running = self.ingest.per_second() * (pressure.write_amplification() - 1.0);
        self.needed = running + pressure.debt() / self.horizon_s;
        // Beyond the target the horizon shrinks: nothing is held back when writers are slowed.
        let late = excess(pressure);
        self.needed += late * self.rate_max;
    }

    /// Bytes a second that compaction may write now.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.allowed.max(self.needed).clamp(self.rate_min, self.rate_max)
    }

    /// Accounts for background bytes just written and says when the next may be.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Instant {
        let start = self.free_at.max(Instant(now.0.saturating_sub(BURST_NANOS)));
        self.free_at = start.after_nanos(nanos(to_f64(bytes) * 1e9 / self.rate()));
        self.free_at
    }

    /// What [`write_delay`] needs of measured rates.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        Capacity {
            compaction: self.compaction.per_second().max(1.0),
            flush: self.flush.per_second().max(1.0),
        }
    }
}

/// What the background can do, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Compaction's writes while it is not held back.
    pub compaction: f64,
    /// Flush's writes.
    pub flush: f64,
}

/// Memory that waits for a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unflushed {
    /// Bytes of all memtables, the active one included.
    pub bytes: u64,
    /// Bytes from which nothing more can be taken.
    pub bytes_max: u64,
    /// Bytes of one memtable: as much is always there.
    pub memtable_size: u64,
}

/// How far the upper tables are beyond what is allowed: 0 at the target and a flush or two above
/// it, 1 where a fifth of the target (at least two memtables) has come on top.
fn excess(pressure: &Pressure) -> f64 {
    let slack = pressure.memtable * 1.5;
    let span = (0.2 * pressure.allowed).max(pressure.memtable * 2.0).max(1.0);
    ((pressure.upper - pressure.allowed - slack) / span).clamp(0.0, 10.0)
}

/// Nanoseconds by which each written byte must be delayed, so that debts stay bounded.
///
/// Of the excess of upper tables: at an excess of 1 the delay is what compaction needs for the
/// byte, so that the debt stands still. Of memtables that wait: the same with flush, reached when
/// three quarters of the room is used.
#[must_use]
pub fn write_delay(pressure: &Pressure, unflushed: &Unflushed, capacity: &Capacity) -> f64 {
    let late = excess(pressure);
    let compaction = late * late * (pressure.write_amplification() - 1.0) / capacity.compaction;
    let room = to_f64(unflushed.bytes_max) - to_f64(unflushed.memtable_size);
    let waiting = to_f64(unflushed.bytes) - to_f64(unflushed.memtable_size);
    let full = if room > 0.0 { (waiting / (0.75 * room)).clamp(0.0, 4.0) } else { 0.0 };
    (compaction + full * full / capacity.flush) * 1e9
}

/// Nanoseconds by which a write must be delayed while `pending` bytes wait for the commit log,
/// which refuses at `pending_max`. Nothing up to a quarter of it, then by the square: whatever
/// the number of writers, at some depth of the queue they bring what the disk takes.
#[inline]
#[must_use]
pub fn log_delay(pending: u64, pending_max: u64) -> u64 {
    let free = pending_max / 4;
    if pending <= free {
        return 0;
    }
    let late = (to_f64(pending - free) / to_f64(pending_max - free)).min(1.0);
    nanos(late * late * to_f64(DELAY_FULL_MAX_NANOS))
}

/// The longest delay of one write. Short while debts are near their targets; when they are far
/// beyond, writes under way are so many that short delays do not bring their sum down.
#[must_use]
pub fn delay_max(pressure: &Pressure) -> u64 {
    let late = excess(pressure).max(1.0);
    nanos(to_f64(DELAY_MAX_NANOS) * late * late).min(DELAY_FULL_MAX_NANOS)
}

/// Turns a delay a byte into a delay of each write, whatever number of writers there are: they
/// share one clock, which each write moves on.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteThrottle {
    free_at: Instant,
}

impl WriteThrottle {
    /// When a write of `bytes` that arrives at `now` may go on; `now` itself without a delay. No
    /// delay is longer than `nanos_max`.
    pub fn admit(
        &mut self,
        now: Instant,
        bytes: usize,
        nanos_per_byte: f64,
        nanos_max: u64,
    ) -> Instant {
        if nanos_per_byte <= 0.0 {
            self.free_at = now;
            return now;
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let delayed = self.free_at.max(now).after_nanos(nanos(to_f64(bytes) * nanos_per_byte));
        // Bounded: beyond this, the writers that wait are themselves the brake.
        self.free_at = delayed.min(now.after_nanos(nanos_max));
        self.free_at
    }
}

/// A duration, rounded and kept within an hour.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped just before")]
fn nanos(value: f64) -> u64 {
    if value.is_nan() { 0 } else { value.clamp(0.0, 3.6e12) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: f64 = 1048576.0;

    /// The 5 GiB store with memtables of 64 MiB.
    fn pressure(upper_mib: f64) -> Pressure {
        Pressure {
            upper: upper_mib * MIB,
            last: 5120.0 * MIB,
            allowed: 1536.0 * MIB,
            memtable: 64.0 * MIB,
        }
    }

    fn unflushed(memtables: f64) -> Unflushed {
        let bytes = nanos(memtables * 64.0 * MIB);
        Unflushed { bytes, bytes_max: 192 << 20, memtable_size: 64 << 20 }
    }

    const CAPACITY: Capacity = Capacity { compaction: 200.0 * MIB, flush: 400.0 * MIB };

    #[test]
    fn within_the_target_no_write_is_delayed() {
        for upper in [0.0, 1000.0, 1536.0, 1600.0] {
            assert_eq!(write_delay(&pressure(upper), &unflushed(1.0), &CAPACITY), 0.0);
        }
    }

    #[test]
    fn writers_at_full_speed_settle_below_a_third_over_the_target() {
        // Writers bring 400 MiB/s if nothing holds them; compaction writes 200 MiB/s. In turns of
        // 20 ms the upper tables grow by what comes in and shrink by what was merged.
        let (mut upper, mut slowest, mut before) = (1536.0, f64::MAX, 0.0);
        for _ in 0..20_000 {
            let now = pressure(upper);
            let delay = write_delay(&now, &unflushed(1.0), &CAPACITY) / 1e9;
            // Never a cliff: from one turn to the next writers lose a tenth of their speed at most.
            assert!((delay - before).abs() < 0.1 / (400.0 * MIB), "{before} {delay}");
            before = delay;
            let ingest = 1.0 / (1.0 / (400.0 * MIB) + delay) / MIB;
            slowest = ingest.min(slowest);
            let merged: f64 = 200.0 / (now.write_amplification() - 1.0);
            upper += 0.02 * (ingest - merged);
        }
        println!("upper {upper} slowest {slowest}");
        assert!((1536.0..1536.0 * 1.33).contains(&upper), "{upper}");
        assert!(slowest > 50.0, "{slowest} MiB/s");
    }

    proptest! {
        #[test]
        fn the_delay_rises_with_the_debt_and_without_steps(upper in 0.0f64..20_000.0, more in 0.0f64..8.0, memtables in 0.0f64..3.0) {
            let delay = |upper, memtables| write_delay(&pressure(upper), &unflushed(memtables), &CAPACITY);
            let (here, there) = (delay(upper, memtables), delay(upper + more, memtables));
            prop_assert!(here <= there);
            // 8 MiB more of debt never cost a writer of 1 KiB more than 10 us.
            prop_assert!((there - here) * 1024.0 < 10_000.0, "{} {}", here, there);
            let fuller = delay(upper, memtables + more / 800.0);
            prop_assert!(here <= fuller && (fuller - here) * 1024.0 < 1_000.0);
        }

        #[test]
        fn odd_inputs_stay_within_the_bounds(
            n in prop::array::uniform4(any::<f64>()), p99 in prop::option::of(any::<u64>()),
            now: u64, bytes: u64, nanos_per_byte: f64,
        ) {
            let options = CompactionOptions::default();
            let mut pace = Pace::new(&options);
            pace.set_pressure(&Pressure { upper: n[0], last: n[1], allowed: n[2], memtable: n[3] });
            pace.observe_latency(p99);
            prop_assert!(pace.rate() >= to_f64(options.rate_min) && pace.rate() <= to_f64(options.rate_max));
            pace.take(Instant(now), bytes);
            let mut throttle = WriteThrottle::default();
            let at = throttle.admit(Instant(now), 1 << 20, nanos_per_byte, DELAY_MAX_NANOS);
            prop_assert!(at.nanos_since(Instant(now)) <= DELAY_MAX_NANOS);
        }
    }

    #[test]
    fn slow_reads_halve_the_rate_and_quick_ones_raise_it_a_tenth() {
        let mut pace = Pace::new(&CompactionOptions::default());
        (0..100).for_each(|_| pace.observe_latency(None));
        let fast = pace.rate();
        assert_eq!(fast, to_f64(CompactionOptions::default().rate_max));
        pace.observe_latency(Some(100_000));
        assert_eq!(pace.rate(), fast / 2.0);
        pace.observe_latency(Some(100));
        assert!((pace.rate() / (fast / 2.0) - 1.1).abs() < 1e-9);
        // But never below what the debt needs.
        pace.set_pressure(&pressure(9000.0));
        (0..100).for_each(|_| pace.observe_latency(Some(1_000_000)));
        assert!(pace.rate() > 512.0 * MIB, "{}", pace.rate());
    }

    #[test]
    fn work_is_spread_at_the_rate() {
        let mut pace = Pace::new(&CompactionOptions::default());
        let mut now = Instant(1_000_000_000);
        for _ in 0..320 {
            now = now.max(pace.take(now, 1 << 20));
        }
        // 320 MiB at 32 MiB/s: ten seconds, less the first burst.
        let seconds = to_f64(now.0 - 1_000_000_000) / 1e9;
        assert!((9.9..=10.01).contains(&seconds), "{seconds}");
    }

    #[test]
    fn many_writers_share_one_delay() {
        let mut throttle = WriteThrottle::default();
        let now = Instant(500);
        let last = (0..100).map(|_| throttle.admit(now, 1000, 10.0, DELAY_MAX_NANOS)).last();
        assert_eq!(last, Some(now.after_nanos(100 * 1000 * 10)));
        assert_eq!(throttle.admit(now, 1000, 0.0, DELAY_MAX_NANOS), now);
    }

    #[test]
    fn a_log_that_falls_behind_slows_writers_before_it_refuses_them() {
        // 800 writers in a closed loop bring 170 bytes each as soon as they are answered, up to
        // 200 bytes/us; the disk takes nothing for half a second, then 50 bytes/us.
        let (pending_max, mut pending) = (16u64 << 20, 0u64);
        for step in 0..20_000u64 {
            let nanos = log_delay(pending, pending_max).max(680_000);
            pending += 800 * 170 * 100_000 / nanos;
            pending -= if step < 5000 { 0 } else { pending.min(5000) };
            assert!(pending < pending_max, "refused at step {step}");
        }
        assert!(pending < pending_max / 2, "{pending}");
        assert_eq!(log_delay(pending_max / 4, pending_max), 0);
        assert_eq!(log_delay(u64::MAX, pending_max), DELAY_FULL_MAX_NANOS);
        assert_eq!(log_delay(0, 0), 0);
    }

    #[test]
    fn the_longest_delay_grows_only_with_a_debt_far_beyond_its_target() {
        let target = pressure(0.0);
        assert_eq!(delay_max(&target), DELAY_MAX_NANOS);
        let far = pressure(1e6);
        assert_eq!(delay_max(&far), DELAY_FULL_MAX_NANOS);
    }
}
