//! What a shard does when it is asked for more than it can do: a pure state machine, told of times
//! and counts.
//!
//! # Where requests wait
//! A shard takes every whole request that a turn's bytes hold, and answers it in that turn or puts
//! it into a stage. So there is no queue in front of it that could be served newest first; what
//! waits, waits here:
//!
//! | place | seen as | bounded by |
//! |---|---|---|
//! | the client, for the window | nothing of it here | the client: newest first, none beyond its deadline |
//! | the socket | the length of the last turn | the windows |
//! | blocks, the log, other replicas ([`Stage`]) | how long each took, when it is done | [`Admission::is_in_vain`] |
//!
//! Stages are served in order by a device or by others, and a request in one can no more be taken
//! back without doubt. So a shard that is asked for too much holds the requests back where nothing
//! has been done for them yet and where they can still be reordered: at the clients. Each answer
//! carries the window, how many requests of its connection may be unanswered; all windows together
//! come to what the shard does in the time for which it may make anybody wait. The driver
//! (`net/src/client/link.rs`) serves what waits for a window in order, and newest first once the
//! oldest has waited too long; what waits beyond its deadline was never sent. What comes all the
//! same, from many connections or from other nodes, is refused before anything is done for it if
//! the stage cannot come to it in time.
//!
//! # When it is too much
//! Controlled delay (Nichols and Jacobson, "Controlling Queue Delay", 2012): a long wait now and
//! then is a burst; if *nobody* came through a stage within [`TARGET_NANOS`] more than it takes when
//! there is no queue, for [`INTERVAL_NANOS`], there is a standing queue, which serves nobody. Then
//! the requests in flight are limited to what was done meanwhile times the target (Little's law);
//! in every interval without such a queue the limit grows by a quarter, until nobody notices it.
//! What a stage takes without a queue is the least that it took lately; while there is a limit it
//! is measured anew now and then, at half of it.
//!
//! Other replicas have windows of their own (`annulus_cluster::coordinator::health`); while most
//! requests are carried to them, the clients' windows together come to the widest of those.
//!
//! Invariants: without a standing queue nothing is refused here, and no window is below the
//! connection's own limit but for other replicas'; windows never close; a request is refused here
//! only before anything was done for it. A request costs some additions, and no clock.

use annulus_engine::model::Instant;

/// How much longer than without a queue a request may wait, in nanoseconds.
pub(super) const TARGET_NANOS: u64 = 5_000_000;
/// How long a queue stands before it is one, in nanoseconds.
pub(super) const INTERVAL_NANOS: u64 = 100_000_000;
/// The limit is never less than this many requests of the shard. Few: where hardly anything is
/// done, as many as a busy disk likes would wait for longer than their deadlines.
const LIMIT_MIN: u32 = 8;
/// Intervals for which the least time of a stage is believed.
const LEAST_INTERVALS: u32 = 50;
/// While there is a limit, one interval in so many runs at half of it.
const PROBE_INTERVALS: u32 = 50;
/// Beyond this a window limits nobody: it is the most that a configuration may allow.
const WINDOW_MAX: u32 = 65_536;

/// Where a request waits after it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// For blocks from the disk, before it can be answered or written.
    Read,
    /// For this shard's log.
    Log,
    /// For other replicas.
    Replicas,
}

/// One place's times.
#[derive(Clone, Copy, Debug)]
struct Stage {
    /// Requests that came through in this interval.
    through: u32,
    /// The shortest that one of them took, in nanoseconds.
    least: u64,
    /// The shortest of this and of the former period.
    quiet: [u64; 2],
    /// While there is a standing queue: so many requests came through, in so many nanoseconds.
    capacity: Option<(u32, u64)>,
}

impl Stage {
    const NEW: Stage =
        Stage { through: 0, least: u64::MAX, quiet: [u64::MAX, u64::MAX], capacity: None };

    fn took(&mut self, nanos: u64) {
        self.through += 1;
        self.least = self.least.min(nanos);
    }

    /// The interval has ended after `nanos`: whether a queue stood in all of it.
    fn close(&mut self, nanos: u64) -> bool {
        let (through, least) = (self.through, self.least);
        (self.through, self.least) = (0, u64::MAX);
        if through == 0 {
            self.capacity = None;
            return false;
        }
        self.quiet[0] = self.quiet[0].min(least);
        let quiet = self.quiet[0].min(self.quiet[1]);
        let stands = least > quiet.saturating_add(TARGET_NANOS);
        self.capacity = stands.then_some((through, nanos));
        stands
    }

    /// What was the shortest a period ago is so no more.
    fn age(&mut self) {
        self.quiet = [u64::MAX, self.quiet[0]];
    }

    fn quiet(&self) -> u64 {
        let quiet = self.quiet[0].min(self.quiet[1]);
        if quiet == u64::MAX { 0 } else { quiet }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Admission {
    stages: [Stage; 3],
    /// The shortest turn that took requests in this interval, in nanoseconds.
    least_turn: u64,
    turn_began: Instant,
    /// Requests that this turn took.
    taken: u32,
    /// Requests that were answered in this interval.
    answered: u32,
    interval: u32,
    interval_began: Instant,
    /// Connections from which requests came in this interval, and in the one before.
    active: [u32; 2],
    /// Most requests of clients that may be in flight.
    limit: Option<u32>,
    window: u32,
    /// Most requests that other replicas take now.
    replicas: Option<u32>,
    /// Whether what clients ask for is mostly carried to other replicas.
    asks_replicas: bool,
}

impl Admission {
    /// Nothing has happened yet.
    pub(super) fn new(now: Instant) -> Admission {
        Admission {
            stages: [Stage::NEW; 3],
            least_turn: u64::MAX,
            turn_began: now,
            taken: 0,
            answered: 0,
            // A connection that is new was in no interval.
            interval: 1,
            interval_began: now,
            active: [0, 0],
            limit: None,
            window: u32::MAX,
            replicas: None,
            asks_replicas: true,
        }
    }

    /// How many requests the other replica takes that takes the most. The windows pass it on, so
    /// that clients wait for it and are not refused.
    pub(super) fn set_replicas(&mut self, requests: Option<u32>) {
        self.replicas = requests;
    }

    /// A turn begins. What comes in it has waited in the sockets since the last one began, if that
    /// one had something to do.
    pub(super) fn begin_turn(&mut self, now: Instant) {
        if self.taken > 0 {
            self.least_turn = self.least_turn.min(now.nanos_since(self.turn_began));
        }
        (self.turn_began, self.taken) = (now, 0);
        let nanos = now.nanos_since(self.interval_began);
        if nanos >= INTERVAL_NANOS {
            self.close_interval(nanos);
            self.interval_began = now;
        }
    }

    /// A request was taken from a client.
    #[inline]
    pub(super) fn took(&mut self) {
        self.taken += 1;
    }

    /// Bytes came from a connection that last sent some in the interval `seen`, which is noted. How
    /// many requests it may have unanswered.
    #[inline]
    pub(super) fn window(&mut self, seen: &mut u32) -> u32 {
        if *seen != self.interval {
            *seen = self.interval;
            self.active[0] += 1;
        }
        match self.replicas {
            Some(requests) if self.asks_replicas => {
                let active = self.active[0].max(self.active[1]).max(1);
                self.window.min((requests / active).max(1))
            }
            _ => self.window,
        }
    }

    /// A request that waited in this place was answered, `nanos` after it was taken.
    pub(super) fn came_through(&mut self, place: Place, nanos: u64) {
        self.stages[place as usize].took(nanos);
    }

    /// A client's request was answered, whatever it waited for.
    #[inline]
    pub(super) fn answered(&mut self) {
        self.answered += 1;
    }

    /// Whether a request that has `left` nanoseconds would wait in a place, where so many wait
    /// already, until its time is over. Only while a queue stands there.
    #[inline]
    pub(super) fn is_in_vain(&self, place: Place, waiting: usize, left: u64) -> bool {
        self.stages[place as usize].capacity.is_some_and(|(through, nanos)| {
            waiting as u128 * u128::from(nanos) > u128::from(through) * u128::from(left)
        })
    }

    /// Most requests of clients that may be in flight; `None` while there is no standing queue.
    pub(super) fn limit(&self) -> Option<u32> {
        self.limit
    }

    fn close_interval(&mut self, nanos: u64) {
        let turns_long = self.least_turn != u64::MAX && self.least_turn > TARGET_NANOS;
        let mut stands = turns_long;
        let mut wait = 0;
        if self.answered > 0 {
            let through = self.stages[Place::Replicas as usize].through;
            self.asks_replicas = through.saturating_mul(2) >= self.answered;
        }
        for stage in &mut self.stages {
            stands |= stage.close(nanos);
            wait = wait.max(stage.quiet());
        }
        // Windows of one request do not make a queue shorter, so it would pass for quiet in time.
        if self.interval.is_multiple_of(LEAST_INTERVALS) && self.window > 1 {
            self.stages.iter_mut().for_each(Stage::age);
        }
        let allowed =
            u64::from(self.answered).saturating_mul(wait.saturating_add(TARGET_NANOS)) / nanos;
        let active = self.active[0].max(self.active[1]).max(1);
        self.limit = match self.limit {
            _ if stands => Some(u32::try_from(allowed).unwrap_or(u32::MAX).max(LIMIT_MIN)),
            None => None,
            // Nobody has noticed it.
            Some(limit) if limit / active > WINDOW_MAX => None,
            Some(limit) => Some(limit.saturating_add(limit / 4)),
        };
        self.interval = self.interval.wrapping_add(1).max(1);
        let is_probe = self.interval.is_multiple_of(PROBE_INTERVALS);
        self.window = self.limit.map_or(u32::MAX, |limit| {
            let limit = if is_probe { limit / 2 } else { limit };
            (limit / active).max(1)
        });
        (self.least_turn, self.answered) = (u64::MAX, 0);
        self.active = [0, self.active[0]];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A shard that does one request in `cost`, and clients of `connections` that ask for `rate` a
    /// second each as far as their windows allow.
    struct Shop {
        admission: Admission,
        now: u64,
        /// Since when the requests in the stage are there, oldest first.
        stage: std::collections::VecDeque<u64>,
        seen: Vec<u32>,
        windows: Vec<u32>,
        waits: Vec<u64>,
    }

    impl Shop {
        fn new(connections: usize) -> Shop {
            Shop {
                admission: Admission::new(Instant(0)),
                now: 0,
                stage: std::collections::VecDeque::new(),
                seen: vec![0; connections],
                windows: vec![1024; connections],
                waits: Vec::new(),
            }
        }

        /// One millisecond in which `arrive` requests come, as far as windows allow, and `served`
        /// are done.
        fn step(&mut self, arrive: usize, served: usize) {
            self.admission.begin_turn(Instant(self.now));
            for (seen, window) in self.seen.iter_mut().zip(&mut self.windows) {
                *window = self.admission.window(seen).min(1024);
            }
            let room: usize = self.windows.iter().map(|window| *window as usize).sum();
            for _ in 0..arrive.min(room.saturating_sub(self.stage.len())) {
                self.admission.took();
                self.stage.push_back(self.now);
            }
            for _ in 0..served {
                let Some(since) = self.stage.pop_front() else { break };
                let nanos = self.now - since;
                self.waits.push(nanos);
                self.admission.came_through(Place::Read, nanos);
                self.admission.answered();
            }
            self.now += MS;
        }

        fn run(&mut self, millis: u64, arrive: usize, served: usize) -> usize {
            self.waits.clear();
            (0..millis).for_each(|_| self.step(arrive, served));
            self.waits.len()
        }

        fn worst_ms(&self) -> u64 {
            self.waits.iter().max().copied().unwrap_or(0) / MS
        }
    }

    #[test]
    fn at_or_below_its_capacity_nothing_is_limited() {
        let mut shop = Shop::new(50);
        shop.run(5_000, 80, 100);
        shop.run(5_000, 100, 100);
        assert_eq!(shop.admission.limit(), None);
        assert!(shop.windows.iter().all(|window| *window == 1024));
    }

    #[test]
    fn at_twice_its_capacity_all_is_done_that_can_be_and_nobody_waits_long() {
        let mut shop = Shop::new(50);
        shop.run(1_000, 80, 100);
        shop.run(2_000, 200, 100);
        let done = shop.run(10_000, 200, 100);
        assert!(done >= 990_000, "{done}");
        assert!(shop.worst_ms() <= 15, "{} ms", shop.worst_ms());
    }

    #[test]
    fn when_the_load_is_less_again_the_limit_goes_within_seconds() {
        let mut shop = Shop::new(50);
        shop.run(5_000, 1000, 100);
        assert!(shop.admission.limit().is_some());
        shop.run(10_000, 80, 100);
        assert_eq!(shop.admission.limit(), None);
        assert!(shop.waits.iter().rev().take(1000).all(|wait| *wait <= MS));
    }

    #[test]
    fn a_burst_is_no_standing_queue() {
        let mut shop = Shop::new(50);
        for _ in 0..50 {
            shop.run(1, 2_000, 100);
            shop.run(99, 50, 100);
            assert_eq!(shop.admission.limit(), None);
        }
    }

    #[test]
    fn a_place_that_always_takes_long_is_slow_and_not_overloaded() {
        let mut admission = Admission::new(Instant(0));
        for turn in 0..2_000u64 {
            admission.begin_turn(Instant(turn * MS));
            admission.came_through(Place::Log, 40 * MS + turn % 3 * MS);
            assert!(!admission.is_in_vain(Place::Log, 1_000_000, 1));
        }
        assert_eq!(admission.limit(), None);
    }

    #[test]
    fn only_in_a_standing_queue_and_only_what_cannot_be_in_time_is_in_vain() {
        let mut shop = Shop::new(1);
        shop.run(1_000, 80, 100);
        assert!(!shop.admission.is_in_vain(Place::Read, 1_000_000, 1));
        let mut admission = Admission::new(Instant(0));
        admission.came_through(Place::Read, MS);
        admission.begin_turn(Instant(INTERVAL_NANOS));
        (0..100).for_each(|_| admission.came_through(Place::Read, 50 * MS));
        admission.begin_turn(Instant(2 * INTERVAL_NANOS));
        // One a millisecond.
        assert!(admission.is_in_vain(Place::Read, 60, 50 * MS));
        assert!(!admission.is_in_vain(Place::Read, 40, 50 * MS));
        assert!(!admission.is_in_vain(Place::Log, 60, 50 * MS), "another place");
    }

    #[test]
    fn clients_are_told_what_other_replicas_take_while_they_ask_for_it() {
        let mut admission = Admission::new(Instant(0));
        let mut seen = [0; 4];
        admission.set_replicas(Some(128));
        assert_eq!(admission.window(&mut seen[0]), 128);
        seen.iter_mut().for_each(|seen| _ = admission.window(seen));
        assert_eq!(admission.window(&mut seen[0]), 32);
        let mut interval = |at, replicas| {
            (0..100).for_each(|_| admission.answered());
            (0..replicas).for_each(|_| admission.came_through(Place::Replicas, MS));
            admission.begin_turn(Instant(at * INTERVAL_NANOS));
            admission.window(&mut seen[0])
        };
        assert_eq!(interval(1, 10), u32::MAX, "mostly answered here");
        assert_eq!(interval(2, 90), 128, "of one connection alone");
    }

    #[test]
    fn a_queue_that_windows_cannot_shorten_never_passes_for_none() {
        let mut shop = Shop::new(1_000);
        shop.run(1_000, 80, 100);
        shop.run(15_000, 1_000, 100);
        // A thousand wait, ten milliseconds each.
        assert!(shop.admission.is_in_vain(Place::Read, 1_000, 8 * MS));
        assert!(!shop.admission.is_in_vain(Place::Read, 1_000, 20 * MS));
    }

    #[test]
    fn turns_that_are_always_long_close_the_windows_but_never_quite() {
        let mut admission = Admission::new(Instant(0));
        let mut seen = [0; 1000];
        let mut now = 0;
        let mut window = u32::MAX;
        for _ in 0..100 {
            admission.begin_turn(Instant(now));
            for seen in &mut seen {
                window = admission.window(seen);
                (0..10).for_each(|_| admission.took());
                (0..10).for_each(|_| admission.answered());
            }
            now += 20 * MS;
        }
        // Half a million a second: 2,500 in five milliseconds, over a thousand connections.
        assert!((1..=3).contains(&window), "{window}");
        // Within some seconds nothing is left of it.
        for _ in 0..400 {
            admission.begin_turn(Instant(now));
            seen.iter_mut().for_each(|seen| _ = admission.window(seen));
            now += 20 * MS;
        }
        assert_eq!(admission.window(&mut seen[0]), u32::MAX);
    }
}
