//! The simulated network between the shards of different nodes.
//!
//! Invariant: what becomes of a message follows from the seed and the order of sending; a message
//! arrives whole or not at all, late, twice, or behind a later one. It may arrive at a node that
//! was restarted meanwhile, or come from a life that is over: whoever receives must stand that.
//! Cut off nodes do not learn of it at once: links are known to be down after a while.
//!
//! Times are those of the simulation. The network never acts by itself: [`Network::pop_due`].

use std::collections::{BTreeMap, BTreeSet};

use annulus::pump::Lane;
use annulus_engine::model::Instant;
use annulus_engine::sim::Chance;

const MS: u64 = 1_000_000;
/// Whether drawn weather doubles messages. Real links never do; a request that is handed on to
/// another node is carried out twice when it does, which is to be mended.
const TWICE: bool = false;
/// Most bytes under way from one node to another; beyond them a link refuses.
const UNDER_WAY_MAX: usize = 8 << 20;

/// A shard of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The node's index in the cluster.
    pub node: u32,
    /// The shard.
    pub shard: u32,
}

/// A message under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// Who sent it.
    pub from: Place,
    /// To whom.
    pub to: Place,
    /// On which lane.
    pub lane: Lane,
    /// The encoded message.
    pub bytes: Vec<u8>,
}

/// What the network does by itself, without any fault.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Shortest time of a message, in nanoseconds.
    pub delay_min: u64,
    /// Longest ordinary time, in nanoseconds.
    pub delay_max: u64,
    /// One message in so many takes up to a hundred times as long; 0 for none.
    pub late_one_in: u64,
    /// One in so many is lost; 0 for none.
    pub lost_one_in: u64,
    /// One in so many arrives twice; 0 for none.
    pub twice_one_in: u64,
    /// Whether the messages of a lane arrive in the order of sending, unless they are late.
    pub ordered: bool,
}

impl Weather {
    /// A quiet network: short delays, nothing lost, everything in order.
    #[must_use]
    pub fn fair() -> Weather {
        Weather {
            delay_min: 20_000,
            delay_max: 300_000,
            late_one_in: 0,
            lost_one_in: 0,
            twice_one_in: 0,
            ordered: true,
        }
    }

    /// Some weather, by chance.
    #[must_use]
    pub fn draw(chance: &mut Chance) -> Weather {
        let rate = |chance: &mut Chance| [0, 0, 300, 50, 10, 4][chance.index(6)];
        let delay_max = [200_000, MS, 20 * MS, 200 * MS][chance.index(4)];
        Weather {
            delay_min: 20_000,
            delay_max,
            late_one_in: rate(chance),
            lost_one_in: rate(chance),
            twice_one_in: if TWICE { rate(chance) } else { 0 },
            ordered: chance.one_in(2),
        }
    }
}

/// One direction between two nodes.
type Way = (u32, u32);

/// A way that goes down and up by itself.
#[derive(Clone, Copy, Debug)]
struct Flapping {
    period: u64,
    until: Instant,
}

/// Counts of what became of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Sent.
    pub sent: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Arrived, counting each copy.
    pub arrived: u64,
    /// Lost.
    pub lost: u64,
    /// Sent, or about to arrive, over a way that is cut.
    pub cut: u64,
}

/// The network.
#[derive(Debug)]
pub struct Network {
    chance: Chance,
    weather: Weather,
    /// By arrival, then by order of sending.
    under_way: BTreeMap<(Instant, u64), Parcel>,
    next: u64,
    bytes_under_way: BTreeMap<Way, usize>,
    /// When the last one of a lane arrives, where order is kept.
    lane_ends: BTreeMap<(Place, Place, Lane), Instant>,
    cuts: BTreeSet<Way>,
    flapping: BTreeMap<Way, Flapping>,
    /// Nanoseconds that a way takes for a byte.
    slow: BTreeMap<Way, u64>,
    /// When a slow way is free again.
    busy_until: BTreeMap<Way, Instant>,
    /// Ways that are known to be down, as the sender sees them, since when.
    down: BTreeMap<Way, Instant>,
    traffic: Traffic,
}

impl Network {
    /// A network of this seed, with nothing under way.
    #[must_use]
    pub fn new(seed: u64, weather: Weather) -> Network {
        Network {
            chance: Chance::new(seed ^ 0x0E70_0517_E0F0_0001),
            weather,
            under_way: BTreeMap::new(),
            next: 0,
            bytes_under_way: BTreeMap::new(),
            lane_ends: BTreeMap::new(),
            cuts: BTreeSet::new(),
            flapping: BTreeMap::new(),
            slow: BTreeMap::new(),
            busy_until: BTreeMap::new(),
            down: BTreeMap::new(),
            traffic: Traffic::default(),
        }
    }

    /// What became of messages so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Other weather from now on.
    pub fn set_weather(&mut self, weather: Weather) {
        self.weather = weather;
    }

    /// Nothing from `from` reaches `to` any more; the other direction is as it was.
    pub fn cut(&mut self, from: u32, to: u32) {
        self.cuts.insert((from, to));
    }

    /// Cuts both ways between each node of `side` and each that is not in it, of `count` nodes.
    pub fn partition(&mut self, side: &BTreeSet<u32>, count: u32) {
        for one in 0..count {
            for other in (0..count).filter(|other| side.contains(&one) != side.contains(other)) {
                self.cut(one, other);
            }
        }
    }

    /// From now until then the way is down every second period of this many nanoseconds.
    pub fn flap(&mut self, from: u32, to: u32, period: u64, until: Instant) {
        self.flapping.insert((from, to), Flapping { period: period.max(1), until });
    }

    /// The way takes this many nanoseconds for each byte, one message after the other.
    pub fn slow_down(&mut self, from: u32, to: u32, nanos_per_byte: u64) {
        self.slow.insert((from, to), nanos_per_byte);
    }

    /// All ways are open again, in fair weather. What is under way arrives within a second.
    pub fn heal(&mut self, now: Instant) {
        let soon = now.after_nanos(1_000 * MS);
        let late = self.under_way.split_off(&(soon, 0));
        for (_, parcel) in late {
            let arrival = now.after_nanos(self.chance.between(0, 1_000 * MS));
            self.under_way.insert((arrival, self.next), parcel);
            self.next += 1;
        }
        self.lane_ends.clear();
        self.busy_until.clear();
        self.cuts.clear();
        self.flapping.clear();
        self.slow.clear();
        self.weather = Weather::fair();
    }

    /// Whether messages get from one node to the other now.
    #[must_use]
    pub fn is_open(&self, from: u32, to: u32, now: Instant) -> bool {
        let way = (from, to);
        let flaps_down = self
            .flapping
            .get(&way)
            .is_some_and(|flap| now < flap.until && (now.0 / flap.period) % 2 == 1);
        !self.cuts.contains(&way) && !flaps_down
    }

    /// Sends a message. False when the link refuses, because too much is under way.
    pub fn send(&mut self, now: Instant, parcel: Parcel) -> bool {
        let way = (parcel.from.node, parcel.to.node);
        let waiting = self.bytes_under_way.entry(way).or_default();
        if *waiting + parcel.bytes.len() > UNDER_WAY_MAX {
            return false;
        }
        self.traffic.sent += 1;
        self.traffic.bytes += parcel.bytes.len() as u64;
        if !self.is_open(way.0, way.1, now) {
            self.traffic.cut += 1;
            return true;
        }
        if strikes(&mut self.chance, self.weather.lost_one_in) {
            self.traffic.lost += 1;
            return true;
        }
        if strikes(&mut self.chance, self.weather.twice_one_in) {
            self.launch(now, parcel.clone());
        }
        self.launch(now, parcel);
        true
    }

    fn launch(&mut self, now: Instant, parcel: Parcel) {
        let weather = self.weather;
        let way = (parcel.from.node, parcel.to.node);
        let mut delay = self.chance.between(weather.delay_min, weather.delay_max);
        let late = strikes(&mut self.chance, weather.late_one_in);
        if late {
            delay = delay.saturating_mul(self.chance.between(2, 100)).min(30_000 * MS);
        }
        let mut start = now;
        if let Some(nanos_per_byte) = self.slow.get(&way) {
            let free = self.busy_until.entry(way).or_default();
            start = start.max(*free).after_nanos(parcel.bytes.len() as u64 * nanos_per_byte);
            *free = start;
        }
        let mut arrival = start.after_nanos(delay);
        if weather.ordered && !late {
            let end = self.lane_ends.entry((parcel.from, parcel.to, parcel.lane)).or_default();
            arrival = arrival.max(end.after_nanos(1));
            *end = arrival;
        }
        *self.bytes_under_way.entry(way).or_default() += parcel.bytes.len();
        self.under_way.insert((arrival, self.next), parcel);
        self.next += 1;
    }

    /// When the next message arrives.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.under_way.keys().next().map(|(arrival, _)| *arrival)
    }

    /// The next message that has arrived by now.
    pub fn pop_due(&mut self, now: Instant) -> Option<Parcel> {
        while let Some(entry) = self.under_way.first_entry() {
            let (arrival, _) = *entry.key();
            if arrival > now {
                return None;
            }
            let parcel = entry.remove();
            let way = (parcel.from.node, parcel.to.node);
            let waiting = self.bytes_under_way.entry(way).or_default();
            *waiting = waiting.saturating_sub(parcel.bytes.len());
            if self.is_open(way.0, way.1, arrival) {
                self.traffic.arrived += 1;
                return Some(parcel);
            }
            self.traffic.cut += 1;
        }
        None
    }

    /// A node's process has ended: the others' links to it break soon. By chance, what is under
    /// way from and to it goes down with its connections, or arrives late.
    pub fn node_ended(&mut self, node: u32) {
        if self.chance.one_in(2) {
            self.under_way.retain(|_, it| it.from.node != node && it.to.node != node);
            self.bytes_under_way.retain(|way, _| way.0 != node && way.1 != node);
        }
    }

    /// Whether `from` knows that it cannot send to `to`; `alive`: the process there runs. A dead
    /// process is noticed within some milliseconds, a cut way after seconds, an open one soon.
    pub fn is_known_down(&mut self, from: u32, to: u32, alive: bool, now: Instant) -> bool {
        let open = self.is_open(from, to, now) && self.is_open(to, from, now);
        let notice = match (alive, open) {
            (true, true) => {
                self.down.remove(&(from, to));
                return false;
            }
            (false, true) => self.chance.between(MS, 50 * MS),
            (_, false) => self.chance.between(500 * MS, 5_000 * MS),
        };
        let since = *self.down.entry((from, to)).or_insert_with(|| now.after_nanos(notice));
        now >= since
    }
}

fn strikes(chance: &mut Chance, one_in: u64) -> bool {
    one_in > 0 && chance.one_in(one_in)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel(from: u32, to: u32, number: u8) -> Parcel {
        let place = |node| Place { node, shard: 0 };
        let bytes = vec![number; 10];
        Parcel { from: place(from), to: place(to), lane: Lane::Foreground, bytes }
    }

    fn later(millis: u64) -> Instant {
        Instant(millis * MS)
    }

    fn arrivals(network: &mut Network, until: Instant) -> Vec<u8> {
        std::iter::from_fn(|| network.pop_due(until)).map(|parcel| parcel.bytes[0]).collect()
    }

    #[test]
    fn in_fair_weather_all_arrive_once_and_in_order() {
        let mut network = Network::new(1, Weather::fair());
        (0..100).for_each(|i| assert!(network.send(later(0), parcel(0, 1, i))));
        assert_eq!(network.pop_due(later(0)), None);
        assert_eq!(arrivals(&mut network, later(100)), (0..100).collect::<Vec<u8>>());
        assert_eq!(network.next_due(), None);
    }

    #[test]
    fn the_same_seed_gives_the_same_arrivals_and_foul_weather_shows() {
        let run = |seed| {
            let weather = Weather {
                late_one_in: 10,
                lost_one_in: 5,
                twice_one_in: 5,
                ordered: false,
                ..Weather::fair()
            };
            let mut network = Network::new(seed, weather);
            (0..200).for_each(|i| assert!(network.send(later(0), parcel(0, 1, i))));
            arrivals(&mut network, later(100_000))
        };
        let got = run(7);
        assert_eq!(got, run(7));
        assert_ne!(got, run(8));
        let distinct: BTreeSet<u8> = got.iter().copied().collect();
        assert!(distinct.len() < 190, "some are lost");
        assert!(got.len() > distinct.len(), "some come twice");
        assert!(!got.is_sorted(), "some overtake others");
    }

    #[test]
    fn a_cut_is_one_way_a_partition_both_and_healing_opens_all() {
        let mut network = Network::new(1, Weather::fair());
        network.cut(0, 1);
        network.send(later(0), parcel(0, 1, 1));
        network.send(later(0), parcel(1, 0, 2));
        assert_eq!(arrivals(&mut network, later(10)), [2]);
        network.partition(&BTreeSet::from([2]), 3);
        for (from, to) in [(0, 2), (1, 2), (2, 0), (2, 1)] {
            assert!(!network.is_open(from, to, later(0)));
        }
        assert!(network.is_open(1, 0, later(0)));
        network.send(later(10), parcel(1, 0, 3));
        network.cut(1, 0);
        assert_eq!(arrivals(&mut network, later(20)), [0; 0], "cut while it was under way");
        network.heal(later(0));
        network.send(later(20), parcel(0, 1, 4));
        assert_eq!(arrivals(&mut network, later(30)), [4]);
    }

    #[test]
    fn a_flapping_way_is_open_half_of_the_time_and_then_always() {
        let mut network = Network::new(1, Weather::fair());
        network.flap(0, 1, MS, later(100));
        let open = (0..200).filter(|at| network.is_open(0, 1, later(*at))).count();
        assert_eq!(open, 50 + 100);
    }

    #[test]
    fn a_slow_way_takes_its_time_for_each_byte_and_refuses_what_is_too_much() {
        let mut network = Network::new(1, Weather::fair());
        network.slow_down(0, 1, MS);
        (0..3).for_each(|i| assert!(network.send(later(0), parcel(0, 1, i))));
        assert_eq!(arrivals(&mut network, later(22)), [0, 1]);
        assert_eq!(arrivals(&mut network, later(40)), [2]);
        let large = Parcel { bytes: vec![0; UNDER_WAY_MAX - 5], ..parcel(0, 1, 0) };
        assert!(network.send(later(50), large));
        assert!(!network.send(later(50), parcel(0, 1, 9)));
    }

    #[test]
    fn a_link_is_known_to_be_down_after_a_while_and_to_be_up_at_once() {
        let mut network = Network::new(1, Weather::fair());
        assert!(!network.is_known_down(0, 1, true, later(0)));
        network.cut(1, 0);
        assert!(!network.is_known_down(0, 1, true, later(0)));
        assert!(network.is_known_down(0, 1, true, later(6_000)));
        network.heal(later(0));
        assert!(!network.is_known_down(0, 1, true, later(6_001)));
        assert!(!network.is_known_down(0, 1, false, later(6_002)));
        assert!(network.is_known_down(0, 1, false, later(6_060)), "a dead process is soon noticed");
    }

    #[test]
    fn what_is_under_way_may_outlive_its_sender() {
        let mut kept = 0;
        for seed in 0..40 {
            let mut network = Network::new(seed, Weather::fair());
            network.send(later(0), parcel(0, 1, 1));
            network.node_ended(0);
            kept += arrivals(&mut network, later(100)).len();
        }
        assert!((5..35).contains(&kept), "{kept}");
    }
}
