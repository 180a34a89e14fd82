//! What a client believes of one node: whether it answers, how soon, and when to ask it again.
//!
//! A node from which an answer is overdue, or whose connection failed, is *silent*: requests go to
//! others. A probe that is answered brings it back; one that falls silent again and again is *held*
//! for longer each time, so that a node which answers probes and nothing else is not used for ever.
//!
//! Invariants: at most one probe of a node is under way; what was sent before a node came back is
//! no evidence against it; an episode of silence teaches at most one sample, so a long pause does
//! not make the next one hard to notice. Pure: the time is an argument; `client/pool.rs` keeps it.
//! Compare the fast layer of failure detection in `cluster/README.md`: nothing here is announced.

use std::time::Duration;

use annulus_engine::model::Instant;

/// An answer is overdue after this many times what one usually takes.
const OVERDUE_FACTOR: u64 = 8;
/// The smoothed latency moves by one part in this many with each sample.
const SMOOTHING: u64 = 8;
/// A node that was well for so long, in nanoseconds, starts with a clean record.
const FORGIVEN_AFTER: u64 = 10_000_000_000;
/// How long a node is held that fell silent a second time, in nanoseconds; doubles up to 2^6 times.
const HOLD: u64 = 100_000_000;
/// How long a node is held that is behind, in nanoseconds.
const HOLD_BEHIND: u64 = 1_000_000_000;
/// Bound of the pause after a failed probe, in nanoseconds; doubles up to 2^7 times.
const PROBE_PAUSE: u64 = 50_000_000;

/// What kind of request it is: each has its own usual time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of one key.
    Read,
    /// Of one key.
    Write,
    /// Scans, batches, commands, large values: may take any time, so when one is late the node is
    /// probed before it is suspected.
    Long,
}

/// What is believed. The order is that of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// It answers.
    Healthy,
    /// It answers probes, but has been silent too often.
    Held,
    /// It owes answers, or cannot be reached.
    Silent,
}

/// One node.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    floor: u64,
    /// Usual time to an answer, in nanoseconds: reads, writes. 0: none seen.
    smoothed: [u64; 2],
    standing: Standing,
    /// Since when, and for `Held` also until when.
    since: Instant,
    held_until: Instant,
    /// When it fell silent last, and whether a late answer to that has been sampled.
    silent_at: Option<Instant>,
    late_sampled: bool,
    /// Times that it fell silent without being well for long in between.
    strikes: u32,
    /// Something long is late: to be probed, although it is healthy.
    doubted: bool,
    /// The probe under way, since when.
    probe: Option<Instant>,
    probe_failures: u32,
    next_probe: Instant,
}

impl Health {
    /// One that is believed to be well. `floor`: no answer is overdue before.
    pub(crate) fn new(now: Instant, floor: Duration) -> Health {
        Health {
            floor: u64::try_from(floor.as_nanos()).unwrap_or(u64::MAX).max(1),
            smoothed: [0; 2],
            standing: Standing::Healthy,
            since: now,
            held_until: now,
            silent_at: None,
            late_sampled: false,
            strikes: 0,
            doubted: false,
            probe: None,
            probe_failures: 0,
            next_probe: now,
        }
    }

    pub(crate) fn standing(&mut self, now: Instant) -> Standing {
        if self.standing == Standing::Held && now >= self.held_until {
            (self.standing, self.since) = (Standing::Healthy, self.held_until);
        }
        self.standing
    }

    /// Nanoseconds after which an answer is overdue.
    pub(crate) fn bound(&self, kind: Kind) -> u64 {
        let smoothed = match kind {
            Kind::Read | Kind::Long => self.smoothed[0],
            Kind::Write => self.smoothed[1],
        };
        smoothed.saturating_mul(OVERDUE_FACTOR).max(self.floor)
    }

    /// An answer came to what was sent then.
    pub(crate) fn answered(&mut self, now: Instant, kind: Kind, sent: Instant) {
        let bound = self.bound(kind);
        let smoothed = match kind {
            Kind::Read => &mut self.smoothed[0],
            Kind::Write => &mut self.smoothed[1],
            Kind::Long => return,
        };
        let is_late = self.silent_at.is_some_and(|silent_at| sent <= silent_at);
        if is_late && std::mem::replace(&mut self.late_sampled, true) {
            return;
        }
        let sample = now.nanos_since(sent).min(bound.saturating_mul(2)).max(1);
        *smoothed = match *smoothed {
            0 if !is_late => sample,
            old => old - old / SMOOTHING + sample / SMOOTHING,
        };
    }

    /// The answer to what was sent then is overdue. Whether the request should go elsewhere.
    pub(crate) fn overdue(&mut self, now: Instant, kind: Kind, sent: Instant) -> bool {
        let standing = self.standing(now);
        if kind == Kind::Long {
            self.doubted |= standing == Standing::Healthy;
            return standing != Standing::Healthy;
        }
        if standing == Standing::Healthy && sent >= self.since {
            self.fall_silent(now);
        }
        true
    }

    /// A connection was lost or could not be made.
    pub(crate) fn lost(&mut self, now: Instant) {
        if self.standing(now) != Standing::Silent {
            self.fall_silent(now);
        }
    }

    fn fall_silent(&mut self, now: Instant) {
        if now.nanos_since(self.since) >= FORGIVEN_AFTER && self.standing == Standing::Healthy {
            self.strikes = 0;
        }
        self.strikes += 1;
        (self.standing, self.since) = (Standing::Silent, now);
        (self.silent_at, self.late_sampled) = (Some(now), false);
        (self.doubted, self.next_probe) = (false, now);
    }

    /// It answered from data that is behind: it has been away, and is left to catch up.
    pub(crate) fn behind(&mut self, now: Instant) {
        if self.standing(now) == Standing::Healthy {
            (self.standing, self.since) = (Standing::Held, now);
            self.held_until = now.after_nanos(HOLD_BEHIND);
        }
    }

    /// When the next probe is due, if one is wanted and none is under way.
    pub(crate) fn next_probe(&self) -> Option<Instant> {
        let wanted = self.doubted || self.standing == Standing::Silent;
        (wanted && self.probe.is_none()).then_some(self.next_probe)
    }

    /// Whether a probe is to be made now. If so, it is under way.
    pub(crate) fn begin_probe(&mut self, now: Instant) -> bool {
        let due = self.next_probe().is_some_and(|at| at <= now);
        if due {
            self.probe = Some(now);
        }
        due
    }

    /// Looks at a probe under way: a doubted node that does not answer it either is silent.
    pub(crate) fn check_probe(&mut self, now: Instant) {
        let bound = self.bound(Kind::Read);
        if self.doubted && self.probe.is_some_and(|since| now.nanos_since(since) > bound) {
            self.fall_silent(now);
        }
    }

    /// A probe was answered, or a connection was made.
    pub(crate) fn probe_answered(&mut self, now: Instant) {
        (self.probe, self.probe_failures, self.doubted) = (None, 0, false);
        // Something long that is late again is not worth a probe at once.
        self.next_probe = now.after_nanos(self.floor);
        if self.standing == Standing::Silent {
            let hold = match self.strikes {
                0 | 1 => 0,
                strikes => HOLD << (strikes - 2).min(6),
            };
            self.held_until = now.after_nanos(hold);
            (self.standing, self.since) = (Standing::Held, now);
            let _ = self.standing(now);
        }
    }

    /// A probe failed: it cannot be reached. The next one after a random part of a bound that
    /// doubles.
    pub(crate) fn probe_failed(&mut self, now: Instant, random: u64) {
        self.lost(now);
        self.probe = None;
        let bound = PROBE_PAUSE << self.probe_failures.min(7);
        self.probe_failures += 1;
        self.next_probe = now.after_nanos(bound / 8 + random % bound);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const FLOOR: Duration = Duration::from_millis(50);

    fn at(ms: u64) -> Instant {
        Instant(ms * MS)
    }

    fn health() -> Health {
        Health::new(at(0), FLOOR)
    }

    /// Falls silent at `ms`, and answers a probe `after` milliseconds later.
    fn pause(health: &mut Health, ms: u64, after: u64) {
        assert!(health.overdue(at(ms), Kind::Read, at(ms - 50)));
        assert_eq!(health.standing(at(ms)), Standing::Silent);
        assert!(health.begin_probe(at(ms)));
        health.probe_answered(at(ms + after));
    }

    #[test]
    fn an_answer_is_overdue_after_eight_times_the_usual_and_not_before_the_floor() {
        let mut health = health();
        assert_eq!(health.bound(Kind::Read), 50 * MS);
        health.answered(at(1), Kind::Read, at(0));
        assert_eq!(health.bound(Kind::Read), 50 * MS);
        for ms in 0..100 {
            health.answered(at(ms + 20), Kind::Write, at(ms));
        }
        let writes = health.bound(Kind::Write);
        assert!((155 * MS..=160 * MS).contains(&writes), "{writes}");
        assert_eq!(health.bound(Kind::Read), 50 * MS, "reads have their own");
    }

    #[test]
    fn an_overdue_answer_makes_a_node_silent_until_a_probe_is_answered() {
        let mut health = health();
        assert_eq!(health.next_probe(), None);
        assert!(health.overdue(at(50), Kind::Write, at(0)));
        assert_eq!(health.standing(at(50)), Standing::Silent);
        assert!(health.begin_probe(at(50)));
        assert!(!health.begin_probe(at(5_000)), "one at a time");
        assert_eq!(health.standing(at(5_000)), Standing::Silent);
        health.probe_answered(at(5_001));
        assert_eq!(health.standing(at(5_001)), Standing::Healthy);
        // What was sent before it came back goes elsewhere, and is not held against it.
        assert!(health.overdue(at(5_002), Kind::Read, at(49)));
        assert_eq!(health.standing(at(5_002)), Standing::Healthy);
    }

    #[test]
    fn a_node_that_falls_silent_again_and_again_is_held_for_longer_until_it_is_forgiven() {
        let mut health = health();
        let mut ms = 100;
        let mut holds = Vec::new();
        for _ in 0..10 {
            pause(&mut health, ms, 1);
            let back = (ms + 1..).find(|ms| health.standing(at(*ms)) == Standing::Healthy);
            holds.push(back.unwrap() - ms - 1);
            ms = back.unwrap() + 60;
        }
        assert_eq!(holds, [0, 100, 200, 400, 800, 1600, 3200, 6400, 6400, 6400]);
        pause(&mut health, ms + 10_000, 1);
        assert_eq!(health.standing(at(ms + 10_001)), Standing::Healthy);
    }

    #[test]
    fn a_node_that_is_behind_is_left_alone_for_a_second() {
        let mut health = health();
        health.behind(at(10));
        assert_eq!(health.standing(at(1_009)), Standing::Held);
        assert_eq!(health.next_probe(), None);
        assert_eq!(health.standing(at(1_010)), Standing::Healthy);
    }

    #[test]
    fn probes_that_fail_are_made_less_and_less_often() {
        let mut health = health();
        health.lost(at(10));
        let mut probes = 0;
        for ms in 10..60_010 {
            if health.begin_probe(at(ms)) {
                probes += 1;
                health.probe_failed(at(ms), 25 * MS * (probes % 3));
            }
        }
        assert!((10..200).contains(&probes), "{probes} probes in a minute");
        assert_eq!(health.standing(at(60_010)), Standing::Silent);
    }

    #[test]
    fn something_long_that_is_late_is_no_evidence_but_a_probe_that_is_late_too_is() {
        let mut health = health();
        assert!(!health.overdue(at(50), Kind::Long, at(0)));
        assert_eq!(health.standing(at(50)), Standing::Healthy);
        assert!(health.begin_probe(at(50)));
        health.check_probe(at(99));
        assert_eq!(health.standing(at(99)), Standing::Healthy);
        health.check_probe(at(101));
        assert_eq!(health.standing(at(101)), Standing::Silent);
        assert!(health.overdue(at(102), Kind::Long, at(0)), "now it goes elsewhere");
        assert!(!health.begin_probe(at(102)), "that probe is still under way");
    }

    #[test]
    fn an_answered_probe_clears_the_doubt_and_is_not_repeated_at_once() {
        let mut health = health();
        assert!(!health.overdue(at(50), Kind::Long, at(0)));
        assert!(health.begin_probe(at(50)));
        health.probe_answered(at(51));
        assert!(!health.overdue(at(52), Kind::Long, at(0)));
        assert!(!health.begin_probe(at(52)));
        assert!(health.begin_probe(at(101)));
    }

    #[test]
    fn a_long_pause_does_not_make_the_next_one_hard_to_notice() {
        let mut health = health();
        for ms in 0..50 {
            health.answered(at(ms + 1), Kind::Read, at(ms));
        }
        assert!(health.overdue(at(100), Kind::Read, at(50)));
        for sent in 50..100 {
            health.answered(at(60_000), Kind::Read, at(sent));
        }
        assert!(health.bound(Kind::Read) <= 110 * MS, "{}", health.bound(Kind::Read));
    }

    #[test]
    fn a_node_that_always_takes_longer_than_the_floor_is_learned() {
        let mut health = health();
        let mut ms = 0;
        for _ in 0..100 {
            let sent = ms;
            if health.bound(Kind::Write) < 70 * MS {
                pause(&mut health, ms + 50, 1);
            }
            health.answered(at(sent + 70), Kind::Write, at(sent));
            ms += 100;
        }
        assert!(health.bound(Kind::Write) > 300 * MS);
        assert_eq!(health.standing(at(ms)), Standing::Healthy);
    }
}
