//! What befalls the nodes of a cluster, and when: a seeded schedule.
//!
//! Invariant: every trouble that begins also ends within the schedule, or is ended by healing;
//! clocks stay within what the run allows. At most one kind of trouble at one disk at a time.

use std::collections::BTreeSet;

use annulus_engine::model::Instant;
use annulus_engine::sim::{Chance, Fault, Op, Rule};

use crate::cluster::SimCluster;
use crate::network::Weather;

const MS: u64 = 1_000_000;

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// The node's power is cut.
    Crash(u32),
    /// The power of the node is cut during this many further operations of a shard's disk.
    CrashAt {
        /// Which node.
        node: u32,
        /// Whose disk counts.
        shard: u32,
        /// How many operations from now.
        operations: u64,
    },
    /// The node's process is killed.
    Kill(u32),
    /// The node's disks are gone for ever; it comes back with empty ones.
    LoseDisks(u32),
    /// Every node's power is cut in the same instant.
    CrashAll,
    /// The node is stopped cleanly.
    Stop(u32),
    /// The node is started, if it is down.
    Start(u32),
    /// The node stands still.
    Pause(u32),
    /// The node goes on.
    Resume(u32),
    /// Nodes of this side cannot reach the others, nor they them.
    Partition(BTreeSet<u32>),
    /// Nothing from the first reaches the second.
    Cut(u32, u32),
    /// The way from the first to the second goes down and up.
    Flap(u32, u32, u64),
    /// The way from the first to the second takes this many nanoseconds for a byte.
    SlowWay(u32, u32, u64),
    /// The network behaves like this.
    Weather(Weather),
    /// All ways are open, in fair weather.
    HealNetwork,
    /// The node's wall clock jumps to so many microseconds from true time.
    SetClock(u32, i64),
    /// A shard writes its memory to tables, which may be merged then: what may be purged goes.
    Flush(u32, u32),
    /// All shards do.
    FlushAll,
    /// Clients are quiet for so long, and what is in memory is flushed: whoever is up purges what
    /// it may, while others are down or cut off.
    Lull(u64),
    /// A shard's disk does this.
    Disk(u32, u32, Rule),
    /// A shard's disk is well again.
    HealDisk(u32, u32),
    /// A node that is no member yet joins.
    Join,
    /// The node leaves.
    Leave(u32),
    /// The node is given up, and dies if that is said.
    Replace(u32, bool),
}

/// How much of what happens.
#[derive(Clone, Copy, Debug)]
pub struct Severity {
    /// Troubles that begin.
    pub troubles: u64,
    /// Furthest that clocks are set from true time, in microseconds.
    pub skew_us: u64,
    /// Whether disks may fail; else they are only slow.
    pub disks_fail: bool,
    /// Whether disks may be lost for ever.
    pub disks_lost: bool,
}

/// A schedule for a run of this many nanoseconds, in the order of time.
#[must_use]
pub fn draw(
    chance: &mut Chance,
    nodes: u32,
    shards: u32,
    nanos: u64,
    severity: Severity,
) -> Vec<(u64, Trouble)> {
    let mut plan = Vec::new();
    for node in 0..nodes {
        if severity.skew_us > 0 && chance.one_in(2) {
            plan.push((0, Trouble::SetClock(node, skew(chance, severity.skew_us))));
        }
    }
    for _ in 0..chance.below(6) {
        let flush = match chance.one_in(3) {
            true => Trouble::FlushAll,
            false => Trouble::Flush(pick(chance, nodes), pick(chance, shards)),
        };
        plan.push((chance.below(nanos), flush));
    }
    for _ in 0..severity.troubles {
        let at = chance.below(nanos);
        let end = at + chance.between(MS, MS + (nanos - at) * 3 / 2);
        let node = pick(chance, nodes);
        let shard = pick(chance, shards);
        let other = (node + 1 + pick(chance, nodes.max(2) - 1)) % nodes;
        let (begin, finish) = match chance.below(if nodes > 1 { 18 } else { 11 }) {
            0 | 1 => (Trouble::Crash(node), Trouble::Start(node)),
            2 => {
                let operations = chance.between(1, 400);
                (Trouble::CrashAt { node, shard, operations }, Trouble::Start(node))
            }
            3 => (Trouble::Kill(node), Trouble::Start(node)),
            4 => (Trouble::Stop(node), Trouble::Start(node)),
            5 => (Trouble::CrashAll, Trouble::Start(node)),
            6 | 7 => (Trouble::Pause(node), Trouble::Resume(node)),
            8 if severity.skew_us > 0 => {
                let (there, back) =
                    (skew(chance, severity.skew_us), skew(chance, severity.skew_us));
                (Trouble::SetClock(node, there), Trouble::SetClock(node, back))
            }
            8..=10 => {
                let rule = disk_rule(chance, severity.disks_fail);
                (Trouble::Disk(node, shard, rule), Trouble::HealDisk(node, shard))
            }
            11 => (Trouble::Cut(node, other), Trouble::HealNetwork),
            12 => {
                let period = chance.between(50 * MS, 5_000 * MS);
                (Trouble::Flap(node, other, period), Trouble::HealNetwork)
            }
            13 => (Trouble::SlowWay(node, other, chance.between(1, 8_000)), Trouble::HealNetwork),
            14 if severity.disks_lost => (Trouble::LoseDisks(node), Trouble::Start(node)),
            14 => (Trouble::Crash(node), Trouble::Start(node)),
            15 => {
                (Trouble::Weather(Weather::draw(chance)), Trouble::Weather(Weather::draw(chance)))
            }
            _ => {
                let side = (0..nodes).filter(|_| chance.one_in(2)).collect();
                (Trouble::Partition(side), Trouble::HealNetwork)
            }
        };
        plan.push((at, begin));
        plan.push((end, finish));
    }
    plan.retain(|(at, _)| *at < nanos);
    plan.sort_by_key(|(at, _)| *at);
    plan
}

fn pick(chance: &mut Chance, count: u32) -> u32 {
    u32::try_from(chance.below(u64::from(count))).expect("below a u32")
}

fn skew(chance: &mut Chance, max_us: u64) -> i64 {
    let micros = i64::try_from(chance.below(max_us + 1)).expect("a small number");
    if chance.one_in(2) { micros } else { -micros }
}

fn disk_rule(chance: &mut Chance, fails: bool) -> Rule {
    let op = [Op::Write, Op::Write, Op::Sync, Op::Read, Op::Open, Op::SyncDir][chance.index(6)];
    let fault = match chance.below(4) {
        0 if fails => Fault::Eio,
        1 if fails && op == Op::Write => Fault::NoSpace,
        _ => Fault::Delay(chance.between(MS, 3_000 * MS)),
    };
    let rule = Rule::nth(op, chance.between(1, 60), fault);
    if chance.one_in(2) { rule } else { rule.times(chance.between(2, 20)) }
}

impl Trouble {
    /// Lets it happen.
    pub fn strike(&self, cluster: &mut SimCluster) {
        match self {
            Trouble::Crash(node) => cluster.crash(*node),
            Trouble::CrashAt { node, shard, operations } => {
                let disk = cluster.disk(*node, *shard);
                disk.cut_power_at(disk.op_count() + operations);
                cluster.note_disturbance(*node);
            }
            Trouble::Kill(node) => cluster.kill(*node),
            Trouble::LoseDisks(node) => cluster.lose_disks(*node),
            Trouble::CrashAll => (0..cluster.node_count()).for_each(|node| cluster.crash(node)),
            Trouble::Stop(node) => cluster.stop(*node),
            Trouble::Start(node) => cluster.start(*node),
            Trouble::Pause(node) => cluster.pause(*node),
            Trouble::Resume(node) => cluster.resume(*node),
            Trouble::Partition(side) => {
                let count = cluster.node_count();
                cluster.network().partition(side, count);
            }
            Trouble::Cut(from, to) => cluster.network().cut(*from, *to),
            Trouble::Flap(from, to, period) => {
                let until = Instant(u64::MAX);
                cluster.network().flap(*from, *to, *period, until);
            }
            Trouble::SlowWay(from, to, nanos) => cluster.network().slow_down(*from, *to, *nanos),
            Trouble::Weather(weather) => cluster.network().set_weather(*weather),
            Trouble::HealNetwork => {
                let now = cluster.now();
                cluster.network().heal(now);
            }
            Trouble::SetClock(node, micros) => cluster.set_clock(*node, *micros),
            Trouble::FlushAll => cluster.flush_all(),
            Trouble::Lull(nanos) => {
                cluster.quiet();
                cluster.flush_all();
                cluster.drive(*nanos);
                cluster.unquiet();
            }
            Trouble::Flush(node, shard) => cluster.flush(*node, *shard),
            Trouble::Disk(node, shard, rule) => cluster.trouble_disk(*node, *shard, rule.clone()),
            Trouble::HealDisk(node, shard) => cluster.heal_disk(*node, *shard),
            Trouble::Join => cluster.join_next(),
            Trouble::Leave(node) => cluster.leave(*node),
            Trouble::Replace(node, dies) => {
                if *dies {
                    cluster.crash(*node);
                }
                cluster.replace(*node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_schedule_in_the_order_of_time() {
        let take = |seed| {
            let severity =
                Severity { troubles: 20, skew_us: 200_000, disks_fail: true, disks_lost: true };
            draw(&mut Chance::new(seed), 3, 2, 5_000 * MS, severity)
        };
        assert_eq!(format!("{:?}", take(1)), format!("{:?}", take(1)));
        assert_ne!(format!("{:?}", take(1)), format!("{:?}", take(2)));
        assert!(take(1).is_sorted_by_key(|(at, _)| *at));
        assert!(take(1).len() > 20);
    }
}
