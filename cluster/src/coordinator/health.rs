//! How each server answers: how fast, how much it can take, and what is said of it.
//!
//! Stands beside every request that leaves: it decides who is asked, in which order, and when to
//! ask somebody else as well. Invariants: what is in flight to a server is bounded by its window,
//! so a slow one cannot fill the coordinator; a window closes by failures and by growing latency,
//! and latency alone never closes it below [`WINDOW_LATENCY_FLOOR`]. Layer one of failure
//! detection only: nobody is declared dead here; [`Standing`] is told from outside. What gossip
//! says and whether a link stands are kept apart, and the worse of both counts: a link that comes
//! back does not acquit, and a member that lives but cannot be reached from here takes nothing.
//!
//! The window follows the gradient of latency (Netflix, "Performance Under Load", 2018): it shrinks
//! when recent answers take more than twice as long as they used to, and grows by its square
//! root while it is used.

use annulus_engine::model::Instant;

use crate::member::NodeId;
use crate::room::BELIEVED_NANOS;

/// Requests in flight with which a window begins.
const WINDOW_START: f64 = 128.0;
/// Below this failures do not shrink a window, so that a server that recovers is found out.
const WINDOW_MIN: f64 = 4.0;
/// Below this latency does not shrink a window.
pub const WINDOW_LATENCY_FLOOR: f64 = 32.0;
/// Most requests in flight to one server.
pub const WINDOW_MAX: f64 = 4096.0;
/// A burst of failures shrinks a window once in this time, in nanoseconds.
const SHRINK_INTERVAL_NANOS: u64 = 10_000_000;
/// Latency is assumed until there are this many samples of it.
const SAMPLES_MIN: u32 = 32;
/// The assumed p95 of a server that is not known, in nanoseconds.
const LATENCY_ASSUMED_NANOS: u64 = 10_000_000;
/// No request is hedged earlier, in nanoseconds.
pub const HEDGE_DELAY_MIN_NANOS: u64 = 500_000;
/// What takes longer is late, even where it always does, in nanoseconds.
pub const HEDGE_DELAY_MAX_NANOS: u64 = 20_000_000;
/// This server is asked first unless it takes this many times as long as the next ...
const OWN_FACTOR: u64 = 8;
/// ... and longer than this, in nanoseconds: its disk hangs.
const OWN_SLOW_NANOS: u64 = 5_000_000;
/// In this time without a sample a server's latency is believed half as much, in nanoseconds: so
/// one that was slow once is tried again.
const FORGET_NANOS: u64 = 2_000_000_000;

/// What the failure detector says of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Standing {
    /// Nothing against it.
    #[default]
    Healthy,
    /// Somebody could not reach it: last choice for reads, still written to.
    Suspected,
    /// It takes no requests.
    Down,
}

/// What a request does there. Both are measured apart, because a write waits for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A read.
    Read,
    /// A write.
    Write,
}

/// How long answers took: a histogram of four buckets an octave that forgets half of what it
/// knows whenever it is full. And where they are going: averages over a short and a long time.
#[derive(Clone, Debug)]
struct Latencies {
    buckets: [u16; Latencies::BUCKETS],
    /// In nanoseconds, as the next.
    short: f64,
    long: f64,
    count: u32,
    p50: u64,
    p95: u64,
    p99: u64,
}

impl Latencies {
    /// Latencies from 2^13 ns (8 us) to 2^34 ns (17 s).
    const OCTAVES: usize = 21;
    const BUCKETS: usize = Self::OCTAVES * 4;
    const FULL: u32 = 512;
    /// Quantiles are computed once for this many samples.
    const REFRESH: u32 = 16;

    fn new() -> Latencies {
        let assumed = LATENCY_ASSUMED_NANOS;
        Latencies {
            buckets: [0; Latencies::BUCKETS],
            short: 0.0,
            long: 0.0,
            count: 0,
            p50: assumed / 4,
            p95: assumed,
            p99: 2 * assumed,
        }
    }

    fn bucket(nanos: u64) -> usize {
        let micros = (nanos >> 13).max(1);
        let octave = micros.ilog2() as usize;
        // The two bits behind the leading one.
        let part = (nanos.max(1 << 13) >> (octave + 11)) & 3;
        (octave * 4 + part as usize).min(Latencies::BUCKETS - 1)
    }

    /// The greatest latency of a bucket.
    fn upper(bucket: usize) -> u64 {
        let (octave, part) = (bucket / 4, bucket as u64 % 4);
        (5 + part) << (11 + octave)
    }

    /// How much faster answers used to be, at most twice as fast being no change: 0.5 to 1.
    fn gradient(&self) -> f64 {
        (2.0 * self.long / self.short.max(1.0)).clamp(0.5, 1.0)
    }

    fn add(&mut self, nanos: u64) {
        let sample = f64::from(u32::try_from(nanos).unwrap_or(u32::MAX));
        if self.count == 0 {
            (self.short, self.long) = (sample, sample);
        }
        self.short += (sample - self.short) / 16.0;
        // What used to be is believed again quickly when it gets better, slowly when worse.
        self.long += (sample - self.long) / if sample < self.long { 64.0 } else { 512.0 };
        if self.count >= Latencies::FULL {
            self.buckets.iter_mut().for_each(|bucket| *bucket /= 2);
            self.count = self.buckets.iter().map(|bucket| u32::from(*bucket)).sum();
        }
        self.buckets[Latencies::bucket(nanos)] += 1;
        self.count += 1;
        if self.count >= SAMPLES_MIN && self.count.is_multiple_of(Latencies::REFRESH) {
            self.p50 = self.quantile(50);
            self.p95 = self.quantile(95);
            self.p99 = self.quantile(99);
        }
    }

    fn quantile(&self, percent: u32) -> u64 {
        let wanted = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        let reaches = |bucket: &u16| {
            seen += u32::from(*bucket);
            seen >= wanted
        };
        let at = self.buckets.iter().position(reaches).unwrap_or(Latencies::BUCKETS - 1);
        Latencies::upper(at)
    }
}

/// The whole requests of a window.
fn whole(limit: f64) -> u32 {
    (0..=12).rev().fold(0, |whole, bit| {
        let more = whole | 1 << bit;
        if f64::from(more) <= limit { more } else { whole }
    })
}

/// How much may be in flight.
#[derive(Clone, Debug)]
struct Window {
    limit: f64,
    in_flight: u32,
    answers: u32,
    shrunk: Instant,
}

impl Window {
    fn new() -> Window {
        Window { limit: WINDOW_START, in_flight: 0, answers: 0, shrunk: Instant(0) }
    }

    /// A window takes a quarter more than is told of it ([`Health::window`]): it may have shrunk
    /// since clients were told, at most by an eighth each time.
    fn is_open(&self) -> bool {
        f64::from(self.in_flight) < self.limit * 1.25
    }

    fn answered(&mut self, gradient: f64) {
        self.answers += 1;
        if f64::from(self.answers) < (self.limit / 2.0).max(8.0) {
            return;
        }
        self.answers = 0;
        let is_used = f64::from(self.in_flight) * 2.0 >= self.limit;
        let aim = self.limit * gradient + self.limit.sqrt();
        let next = self.limit + (aim - self.limit) / 4.0;
        if next > self.limit && (is_used || self.limit < WINDOW_LATENCY_FLOOR) {
            self.limit = next.min(WINDOW_MAX);
        } else if next < self.limit {
            self.limit = next.max(WINDOW_LATENCY_FLOOR.min(self.limit));
        }
    }

    fn failed(&mut self, now: Instant) {
        if now.nanos_since(self.shrunk) >= SHRINK_INTERVAL_NANOS {
            self.shrunk = now;
            self.limit = (self.limit * 0.7).max(WINDOW_MIN);
        }
    }
}

#[derive(Clone, Debug)]
struct Peer {
    node: NodeId,
    /// What is said of it.
    said: Standing,
    /// Whether this node has a link to it.
    is_linked: bool,
    distance: u8,
    window: Window,
    reads: Latencies,
    writes: Latencies,
    sampled: Instant,
    /// Until then it is believed to have no room for copies of partitions that are not its own.
    no_room_until: Instant,
}

impl Peer {
    fn new(node: NodeId) -> Peer {
        Peer {
            node,
            said: Standing::Healthy,
            is_linked: true,
            distance: 0,
            window: Window::new(),
            reads: Latencies::new(),
            writes: Latencies::new(),
            sampled: Instant(0),
            no_room_until: Instant(0),
        }
    }

    fn standing(&self) -> Standing {
        if self.is_linked { self.said } else { Standing::Down }
    }

    /// Latency of a read there, in nanoseconds; less and less when it is long ago.
    fn believed(&self, now: Instant) -> u64 {
        let age = now.nanos_since(self.sampled) / FORGET_NANOS;
        self.reads.p50.checked_shr(u32::try_from(age).unwrap_or(64)).unwrap_or(0)
    }

    fn latencies(&mut self, verb: Verb) -> &mut Latencies {
        match verb {
            Verb::Read => &mut self.reads,
            Verb::Write => &mut self.writes,
        }
    }
}

/// What is known of one server, for the operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeerHealth {
    /// Which.
    pub node: NodeId,
    /// What is said of it.
    pub standing: Standing,
    /// Requests in flight.
    pub in_flight: u32,
    /// Most requests that may be.
    pub window: f64,
    /// Latency of reads that 95 of 100 keep, in nanoseconds.
    pub read_p95: u64,
    /// The same of 99 of 100.
    pub read_p99: u64,
    /// Latency of writes that 99 of 100 keep, in nanoseconds.
    pub write_p99: u64,
}

/// See the module. One for each shard; peers are few, and sorted.
#[derive(Clone, Debug, Default)]
pub struct Health {
    peers: Vec<Peer>,
}

impl Health {
    /// Knows nobody, and thinks well of everybody.
    #[must_use]
    pub fn new() -> Health {
        Health::default()
    }

    /// Says what the failure detector says.
    pub fn set_standing(&mut self, node: NodeId, standing: Standing) {
        self.peer(node).said = standing;
    }

    /// Says whether a link to the server stands: without one it takes no requests from here.
    pub fn set_linked(&mut self, node: NodeId, is_linked: bool) {
        self.peer(node).is_linked = is_linked;
    }

    /// Says how far away a server is: 0 in the same rack, 1 in the same data centre, 2 beyond.
    /// Reads ask the nearest first.
    pub fn set_distance(&mut self, node: NodeId, distance: u8) {
        self.peer(node).distance = distance;
    }

    /// Forgets servers that are no members any more.
    pub fn retain(&mut self, is_member: impl Fn(NodeId) -> bool) {
        self.peers.retain(|peer| is_member(peer.node));
    }

    /// How a server stands, seen from here.
    #[must_use]
    pub fn standing(&self, node: NodeId) -> Standing {
        self.find(node).map_or(Standing::Healthy, Peer::standing)
    }

    /// Whether a server takes requests now: it is not down, and its window is open.
    #[inline]
    #[must_use]
    pub fn is_healthy(&self, node: NodeId) -> bool {
        self.find(node)
            .is_none_or(|peer| peer.standing() != Standing::Down && peer.window.is_open())
    }

    /// A server says whether it can keep copies of partitions that are not its own.
    pub fn set_room(&mut self, now: Instant, node: NodeId, is_left: bool) {
        let until = if is_left { Instant(0) } else { now.after_nanos(BELIEVED_NANOS) };
        self.peer(node).no_room_until = until;
    }

    /// Whether a server has not lately said that it has no room to stand in for others.
    #[must_use]
    pub fn has_room(&self, now: Instant, node: NodeId) -> bool {
        self.find(node).is_none_or(|peer| peer.no_room_until <= now)
    }

    /// A request has been sent.
    #[inline]
    pub fn sent(&mut self, node: NodeId) {
        self.peer(node).window.in_flight += 1;
    }

    /// It was answered, `nanos` after it had been sent.
    #[inline]
    pub fn answered(&mut self, now: Instant, node: NodeId, verb: Verb, nanos: u64) {
        let peer = self.peer(node);
        peer.window.in_flight = peer.window.in_flight.saturating_sub(1);
        peer.sampled = now;
        let latencies = peer.latencies(verb);
        latencies.add(nanos);
        let gradient = latencies.gradient();
        peer.window.answered(gradient);
    }

    /// It was refused for a reason that says nothing about the server's load.
    pub fn refused(&mut self, node: NodeId) {
        let window = &mut self.peer(node).window;
        window.in_flight = window.in_flight.saturating_sub(1);
    }

    /// It was refused as too much, lost, or not answered within `nanos`.
    pub fn failed(&mut self, now: Instant, node: NodeId, verb: Verb, nanos: u64) {
        let peer = self.peer(node);
        peer.window.in_flight = peer.window.in_flight.saturating_sub(1);
        peer.window.failed(now);
        peer.sampled = now;
        let latencies = peer.latencies(verb);
        latencies.add(nanos.max(latencies.p95));
    }

    /// Puts servers in the order in which a read should ask them: not suspected, open, near, fast
    /// and idle first. Those that are equal stay in their order.
    pub fn order(&self, now: Instant, nodes: &mut [NodeId]) {
        // Few, nearly sorted, and compared by numbers that are cheap to find: insertion sort.
        for end in 1..nodes.len() {
            let mut at = end;
            while at > 0 && self.rank(now, nodes[at]) < self.rank(now, nodes[at - 1]) {
                nodes.swap(at, at - 1);
                at -= 1;
            }
        }
    }

    /// Whether this server, `me`, is so slow that `next` should be asked first.
    #[must_use]
    pub fn is_too_slow(&self, now: Instant, me: NodeId, next: NodeId) -> bool {
        let assumed = LATENCY_ASSUMED_NANOS / 4;
        let latency = |node| self.find(node).map_or(assumed, |peer| peer.believed(now));
        let (own, next) = (latency(me), latency(next));
        own > OWN_SLOW_NANOS && own / OWN_FACTOR > next
    }

    fn rank(&self, now: Instant, node: NodeId) -> impl Ord {
        let Some(peer) = self.find(node) else { return (Standing::Healthy, false, 0, 0) };
        let load = peer.believed(now).saturating_mul(4 + u64::from(peer.window.in_flight));
        (peer.standing(), !peer.window.is_open(), peer.distance, load)
    }

    /// How long to wait for a server's answer before another is asked as well, in nanoseconds.
    #[must_use]
    pub fn hedge_delay(&self, node: NodeId) -> u64 {
        let p95 = self.find(node).map_or(LATENCY_ASSUMED_NANOS, |peer| peer.reads.p95);
        p95.clamp(HEDGE_DELAY_MIN_NANOS, HEDGE_DELAY_MAX_NANOS)
    }

    /// Latency of writes that 99 of 100 keep, in nanoseconds.
    #[must_use]
    pub fn write_p99(&self, node: NodeId) -> u64 {
        self.find(node).map_or(2 * LATENCY_ASSUMED_NANOS, |peer| peer.writes.p99)
    }

    /// Requests that may be in flight to the server with the widest window, other than `me` and
    /// those that are down: with more than that from clients all may be closed. The widest, because
    /// one that is slow or hangs is passed over as long as others are enough. `None` where there is
    /// no other.
    #[must_use]
    pub fn window(&self, me: NodeId) -> Option<u32> {
        let others = self.peers.iter().filter(|peer| peer.node != me);
        let there = others.filter(|peer| peer.standing() != Standing::Down);
        // Between WINDOW_MIN and WINDOW_MAX.
        there.map(|peer| whole(peer.window.limit)).max()
    }

    /// All that are known, by id.
    pub fn peers(&self) -> impl Iterator<Item = PeerHealth> + '_ {
        self.peers.iter().map(|peer| PeerHealth {
            node: peer.node,
            standing: peer.standing(),
            in_flight: peer.window.in_flight,
            window: peer.window.limit,
            read_p95: peer.reads.p95,
            read_p99: peer.reads.p99,
            write_p99: peer.writes.p99,
        })
    }

    fn find(&self, node: NodeId) -> Option<&Peer> {
        let at = self.peers.binary_search_by_key(&node, |peer| peer.node).ok()?;
        Some(&self.peers[at])
    }

    fn peer(&mut self, node: NodeId) -> &mut Peer {
        let at = match self.peers.binary_search_by_key(&node, |peer| peer.node) {
            Ok(at) => at,
            Err(at) => {
                self.peers.insert(at, Peer::new(node));
                at
            }
        };
        &mut self.peers[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NODE: NodeId = NodeId(1);
    const MILLI: u64 = 1_000_000;

    fn at(milliseconds: u64) -> Instant {
        Instant(milliseconds * MILLI)
    }

    fn window(health: &Health) -> f64 {
        health.peers().find(|peer| peer.node == NODE).unwrap().window
    }

    /// As many writes in flight as may be, for so many rounds, each answered after `nanos`.
    fn load(health: &mut Health, rounds: u64, nanos: u64) -> usize {
        let mut sent = 0;
        for round in 0..rounds {
            let mut batch = 0;
            while health.is_healthy(NODE) {
                health.sent(NODE);
                batch += 1;
            }
            for _ in 0..batch {
                health.answered(Instant(round * nanos), NODE, Verb::Write, nanos);
            }
            sent = batch;
        }
        sent
    }

    #[test]
    fn a_window_that_is_used_grows_and_is_bounded() {
        let mut health = Health::new();
        let sent = load(&mut health, 2000, MILLI);
        assert!(sent > 1000, "{sent}");
        assert!(window(&health) <= WINDOW_MAX);
    }

    #[test]
    fn a_window_shrinks_when_answers_come_later_but_not_to_nothing() {
        let mut health = Health::new();
        load(&mut health, 50, MILLI);
        let before = window(&health);
        load(&mut health, 5, 20 * MILLI);
        let after = window(&health);
        assert!(after < before && after >= WINDOW_LATENCY_FLOOR, "{before} {after}");
    }

    #[test]
    fn failures_close_a_window_to_a_few_and_answers_open_it_again() {
        let mut health = Health::new();
        for milliseconds in 0..1000 {
            health.sent(NODE);
            health.failed(at(milliseconds), NODE, Verb::Write, MILLI);
        }
        assert!(window(&health) <= WINDOW_MIN + 1.0);
        assert!(health.is_healthy(NODE), "a few are let through, to find out");
        load(&mut health, 500, MILLI);
        assert!(window(&health) >= WINDOW_LATENCY_FLOOR);
    }

    #[test]
    fn who_keeps_to_what_is_told_never_meets_a_closed_window() {
        let mut health = Health::new();
        assert_eq!(health.window(NodeId(9)), None);
        health.sent(NODE);
        health.answered(Instant(0), NODE, Verb::Write, MILLI);
        assert_eq!(health.window(NodeId(9)), Some(128));
        assert_eq!(health.window(NODE), None, "its own does not count");
        // One client with as many requests in flight as it was told, some answers ago. They take
        // the longer the more there are, so that the window grows, and shrinks again.
        let (mut told, mut in_flight) = (128, 0u32);
        let mut on_the_way = std::collections::VecDeque::from([128; 16]);
        for round in 0..20_000u64 {
            while in_flight < told {
                assert!(health.is_healthy(NODE), "round {round}: {in_flight} of {told}");
                health.sent(NODE);
                in_flight += 1;
            }
            let slow = if round % 4_000 > 3_000 { 50 } else { 1 };
            let nanos = slow * (MILLI + u64::from(in_flight) * 2_000);
            health.answered(Instant(round * 10_000), NODE, Verb::Write, nanos);
            in_flight -= 1;
            on_the_way.push_back(health.window(NodeId(9)).unwrap());
            told = on_the_way.pop_front().unwrap();
        }
        assert!(told >= 32);
        health.set_standing(NodeId(2), Standing::Healthy);
        let own = whole(window(&health));
        assert_eq!(health.window(NodeId(9)), Some(own.max(128)), "the widest");
        for node in [NODE, NodeId(2)] {
            health.set_standing(node, Standing::Down);
        }
        assert_eq!(health.window(NodeId(9)), None);
    }

    #[test]
    fn a_thousand_failures_at_one_moment_are_one() {
        let mut health = Health::new();
        (0..100).for_each(|_| health.sent(NODE));
        (0..100).for_each(|_| health.failed(at(50), NODE, Verb::Write, MILLI));
        assert!(window(&health) > WINDOW_START * 0.6);
    }

    #[test]
    fn a_server_that_answers_nothing_is_no_longer_asked() {
        let mut health = Health::new();
        let sent = (0..10_000).take_while(|_| {
            health.sent(NODE);
            health.is_healthy(NODE)
        });
        assert!(sent.count() < 200);
        health.set_standing(NODE, Standing::Down);
        (0..200).for_each(|_| health.refused(NODE));
        assert!(!health.is_healthy(NODE));
        health.set_standing(NODE, Standing::Suspected);
        assert!(health.is_healthy(NODE), "still written to");
    }

    #[test]
    fn a_link_and_what_is_said_are_two_things() {
        let mut health = Health::new();
        health.set_linked(NODE, false);
        health.set_standing(NODE, Standing::Suspected);
        assert_eq!(health.standing(NODE), Standing::Down, "unreachable from here");
        health.set_linked(NODE, true);
        assert_eq!(health.standing(NODE), Standing::Suspected, "a link does not acquit");
        health.set_standing(NODE, Standing::Down);
        assert!(!health.is_healthy(NODE));
    }

    #[test]
    fn reads_ask_the_fast_first_and_the_suspected_last() {
        let mut health = Health::new();
        for (node, nanos) in [(1, 900_000), (2, 100_000), (3, 50_000)] {
            for _ in 0..64 {
                health.sent(NodeId(node));
                health.answered(at(1), NodeId(node), Verb::Read, nanos);
            }
        }
        health.set_standing(NodeId(3), Standing::Suspected);
        let mut nodes = [NodeId(1), NodeId(3), NodeId(2)];
        health.order(at(1), &mut nodes);
        assert_eq!(nodes, [NodeId(2), NodeId(1), NodeId(3)]);
        health.set_distance(NodeId(2), 1);
        health.order(at(1), &mut nodes);
        assert_eq!(nodes, [NodeId(1), NodeId(2), NodeId(3)]);
    }

    #[test]
    fn who_was_slow_is_tried_again_after_a_while() {
        let mut health = Health::new();
        for (node, nanos) in [(1, 8 * MILLI), (2, MILLI)] {
            for _ in 0..64 {
                health.sent(NodeId(node));
                health.answered(at(1), NodeId(node), Verb::Read, nanos);
            }
        }
        let mut nodes = [NodeId(1), NodeId(2)];
        health.order(at(2), &mut nodes);
        assert_eq!(nodes, [NodeId(2), NodeId(1)]);
        health.sent(NodeId(2));
        health.answered(at(20_000), NodeId(2), Verb::Read, MILLI);
        health.order(at(20_000), &mut nodes);
        assert_eq!(nodes, [NodeId(1), NodeId(2)]);
    }

    proptest! {
        #[test]
        fn a_quantile_is_right_within_a_quarter(mut nanos in prop::collection::vec(8_192u64..1 << 33, 32..500)) {
            let mut latencies = Latencies::new();
            nanos.iter().for_each(|nanos| latencies.add(*nanos));
            nanos.sort_unstable();
            for percent in [50, 95, 99] {
                let index = (nanos.len() * percent as usize).div_ceil(100) - 1;
                let (exact, found) = (nanos[index], latencies.quantile(percent));
                prop_assert!(found >= exact && found <= exact + exact / 4 + 1, "{exact} {found}");
            }
        }
    }

    #[test]
    fn any_latency_has_a_bucket_and_old_ones_are_forgotten() {
        let mut latencies = Latencies::new();
        [0, 1, u64::MAX].iter().for_each(|nanos| latencies.add(*nanos));
        (0..5000).for_each(|_| latencies.add(64 * MILLI));
        (0..5000).for_each(|_| latencies.add(MILLI));
        assert!(latencies.p99 < 2 * MILLI && latencies.count <= Latencies::FULL + 1);
    }
}
