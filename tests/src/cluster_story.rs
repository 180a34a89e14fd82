//! Stories of whole clusters: clients, troubles, healing, and the checkers' verdict.
//!
//! A story has chapters. In each, clients call while troubles come and go; then everything is
//! healed, sixty virtual seconds pass, all replicas must be equal (P8), all members alive to all,
//! every node is asked for every key, and all checkers judge all that was seen since the beginning.
//!
//! Invariant: a story follows from its seed; whatever it finds comes with the history of the key.

use annulus_cluster::moves::plan::Rules;
use annulus_engine::options::Durability;
use annulus_engine::sim::Chance;
use annulus_net::wire::fields::{Level, OperationFlags};

use crate::calls::{CallMix, Target};
use crate::checker::{Violation, describe};
use crate::cluster::{ClusterOptions, LWW, REGISTERS, SIBLINGS, SimCluster};
use crate::network::Weather;
use crate::troubles::{self, Severity, Trouble};

const MS: u64 = 1_000_000;
/// Time from the end of all faults to equal replicas, in nanoseconds.
const HEALING_NANOS: u64 = 60_000 * MS;
/// Time for all partitions to come to where they belong, in seconds.
const SETTLING_SECONDS: u64 = 120;
/// Time for all nodes to start, in nanoseconds.
const START_NANOS: u64 = 60_000 * MS;

/// A story.
#[derive(Clone, Debug)]
pub struct ClusterStory {
    /// What the cluster is like.
    pub options: ClusterOptions,
    /// How much happens in a chapter.
    pub severity: Severity,
    /// Chapters.
    pub chapters: u64,
    /// Length of a chapter before healing, in nanoseconds.
    pub nanos: u64,
    /// Changes of members that are asked for in a chapter.
    pub changes: u64,
}

/// What a story was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Calls of all clients.
    pub calls: u64,
    /// Of them, answered with a result.
    pub answered: u64,
    /// Turns of all pumps.
    pub turns: u64,
    /// Changes of namespaces that operators were told are made.
    pub changes: u64,
}

impl ClusterStory {
    /// A small story of everything, as the swarm tells it.
    #[must_use]
    pub fn draw(seed: u64) -> ClusterStory {
        let mut chance = Chance::new(seed ^ 0x5708);
        let nodes = [1, 3, 3, 3, 4, 5][chance.index(6)];
        let replicas = u8::try_from(nodes.min(3)).expect("at most three");
        let shards = [1, 2][chance.index(2)];
        let deletes = chance.below(7);
        let target = |namespace, chance: &mut Chance| Target {
            namespace,
            keys: [2, 6, 12][chance.index(3)],
            weights: [8, 8, deletes, 1, 1],
            ttl_one_in: [0, 0, 4][chance.index(3)],
        };
        let several = if nodes > 1 { vec![Level::Quorum, Level::All] } else { Vec::new() };
        let levels: Vec<Level> = [Level::Default, Level::ONE].into_iter().chain(several).collect();
        let flags = match nodes {
            1 => vec![OperationFlags::default()],
            _ => vec![
                OperationFlags::default(),
                OperationFlags::default(),
                OperationFlags::STRICT,
                OperationFlags::SLOPPY,
            ],
        };
        let mix = CallMix {
            targets: vec![target(LWW, &mut chance), target(SIBLINGS, &mut chance)],
            levels,
            primary: Level::Default,
            flags,
            context_one_in: [0, 2, 2, 1][chance.index(4)],
            contexts_of_writes: false,
            deadline_ms: [(50, 500), (500, 3_000)][chance.index(2)],
        };
        let periodic = chance.one_in(4);
        let durability = match periodic {
            true => Durability::Periodic { window_ms: [100, 1_000][chance.index(2)] },
            false => Durability::Sync,
        };
        let fair = chance.one_in(2);
        // Drawn apart, so that old seeds tell their stories with the same troubles.
        let room = Chance::new(seed ^ 0x4001).index(4);
        let options = ClusterOptions {
            seed,
            nodes,
            spares: 0,
            rules: Rules::ALL,
            shards,
            replicas,
            durability,
            room_bytes_max: [u64::MAX, u64::MAX, 2_000, 0][room],
            disk_nanos_max: [MS / 10, MS / 10, 5 * MS, 50 * MS][chance.index(4)],
            weather: if fair { Weather::fair() } else { Weather::draw(&mut chance) },
            clients: u32::try_from(chance.between(2, 6)).expect("a few"),
            operators: 0,
            mix,
            pause_max: [10, 40, 200][chance.index(3)] * MS,
        };
        let severity = Severity {
            troubles: [0, 2, 5, 10][chance.index(4)],
            skew_us: [0, 0, 100_000, 200_000, 3_000_000][chance.index(5)],
            disks_fail: chance.one_in(3),
            disks_lost: true,
        };
        // Long enough for some hundred calls, however slow the clients are.
        let calls = chance.between(40, 400);
        let a_call = (options.pause_max * 2 / 5 + 2 * MS) / u64::from(options.clients);
        let nanos = (calls * a_call).clamp(300 * MS, 8_000 * MS);
        ClusterStory { options, severity, chapters: chance.between(1, 2), nanos, changes: 0 }
    }

    /// A story of namespaces that are created and dropped on all nodes at once.
    #[must_use]
    pub fn draw_with_operators(seed: u64) -> ClusterStory {
        let mut chance = Chance::new(seed ^ 0x0FE2);
        let mut story = ClusterStory::draw(seed);
        let options = &mut story.options;
        options.nodes = [3, 3, 4, 5, 6][chance.index(5)];
        options.replicas = 3;
        options.clients = 2;
        options.operators = u32::try_from(chance.between(2, 5)).expect("a few");
        story.nanos = chance.between(2_000, 10_000) * MS;
        // A holder of the namespaces that forgets its word still votes: see `cluster/README.md`.
        story.severity.disks_lost = false;
        story
    }

    /// A story of a few keys that are linearizable registers.
    #[must_use]
    pub fn draw_registers(seed: u64) -> ClusterStory {
        let mut chance = Chance::new(seed ^ 0x0CA5);
        let mut story = ClusterStory::draw(seed);
        let options = &mut story.options;
        options.nodes = [1, 3, 3, 3, 3, 4, 5, 5][chance.index(8)];
        let copies = [3, 3, 5][chance.index(3)];
        options.replicas = u8::try_from(options.nodes.min(copies)).expect("at most five");
        options.durability = Durability::Sync;
        let target = Target {
            namespace: REGISTERS,
            keys: [2, 3, 5][chance.index(3)],
            weights: [8, 4, chance.below(4), 3, 5],
            ttl_one_in: 0,
        };
        let mut targets = vec![target];
        if chance.one_in(3) {
            targets.extend(options.mix.targets.pop());
        }
        options.mix.targets = targets;
        options.mix.levels = vec![Level::Default, Level::Default, Level::ONE];
        if options.nodes > 1 {
            options.mix.levels.extend([Level::Quorum, Level::All]);
        }
        options.mix.flags = vec![OperationFlags::default()];
        match options.nodes >= 3 && chance.one_in(3) {
            true => story.with_members(&mut chance),
            false => story,
        }
    }

    /// A story of nodes that join, leave and are replaced, with all other troubles.
    #[must_use]
    pub fn draw_with_members(seed: u64) -> ClusterStory {
        let mut chance = Chance::new(seed ^ 0x3E3B);
        let mut story = ClusterStory::draw(seed);
        story.options.nodes = [3, 3, 3, 4, 5][chance.index(5)];
        story.with_members(&mut chance)
    }

    /// The same with nodes that come and go.
    fn with_members(self, chance: &mut Chance) -> ClusterStory {
        let mut story = self;
        let options = &mut story.options;
        options.spares = u32::try_from(chance.between(1, 3)).expect("a few");
        options.replicas = 3;
        options.clients = options.clients.min(4);
        options.pause_max = options.pause_max.max(20 * MS);
        story.nanos = chance.between(4_000, 14_000) * MS;
        story.changes = chance.between(1, 4);
        // A holder of the map that forgets its word still votes: see `cluster/README.md`.
        story.severity.disks_lost = false;
        story
    }

    /// Tells it.
    ///
    /// # Errors
    /// What was found, for people.
    pub fn tell(&self) -> Result<Told, String> {
        let mut chance = Chance::new(self.options.seed ^ 0x7E11);
        let mut cluster = SimCluster::new(&self.options);
        self.start_all(&mut cluster)?;
        for chapter in 0..self.chapters {
            if chapter > 0 {
                cluster.unquiet();
            }
            let ClusterOptions { nodes, spares, shards, .. } = self.options;
            let nodes = nodes + spares;
            let mut begin = cluster.now();
            let mut plan = troubles::draw(&mut chance, nodes, shards, self.nanos, self.severity);
            if self.has_registers() {
                keep_a_majority(&mut plan);
            }
            if chance.one_in(2) {
                let at = plan.get(chance.index(plan.len() + 1)).map_or(self.nanos, |(at, _)| *at);
                plan.push((at, Trouble::Lull(chance.between(3_000, 6_000) * MS)));
                plan.sort_by_key(|(at, _)| *at);
            }
            plan.extend(self.draw_changes(&mut chance));
            plan.sort_by_key(|(at, _)| *at);
            for (at, trouble) in plan {
                cluster.drive_until(begin.after_nanos(at), |_| false);
                cluster.note(format!("{trouble:?}"));
                let before = cluster.now();
                trouble.strike(&mut cluster);
                begin = begin.after_nanos(cluster.now().nanos_since(before));
            }
            cluster.drive_until(begin.after_nanos(self.nanos), |_| false);
            self.heal(&mut cluster)?;
        }
        let told = Told {
            calls: cluster.histories().map(|(_, history)| history.events.len() as u64).sum(),
            answered: cluster
                .answers()
                .iter()
                .filter(|(status, _)| status.0 < 64)
                .map(|(_, count)| count)
                .sum(),
            turns: cluster.turns(),
            changes: cluster.changes_of_namespaces().0,
        };
        Ok(told)
    }

    fn has_registers(&self) -> bool {
        self.options.mix.targets.iter().any(|target| target.namespace == REGISTERS)
    }

    /// Changes of members, in the first half, so that there is time for them.
    fn draw_changes(&self, chance: &mut Chance) -> Vec<(u64, Trouble)> {
        let mut plan = Vec::new();
        let nodes = u64::from(self.options.nodes + self.options.spares);
        for _ in 0..self.changes {
            let at = chance.below(self.nanos / 2);
            let node = u32::try_from(chance.below(nodes)).expect("a few");
            let change = match chance.below(6) {
                0..=2 => Trouble::Join,
                3 | 4 => Trouble::Leave(node),
                _ => Trouble::Replace(node, chance.one_in(2)),
            };
            plan.push((at, change));
        }
        plan
    }

    /// Waits until nothing moves any more.
    fn settle_members(&self, cluster: &mut SimCluster) -> Result<(), String> {
        if self.options.spares == 0 {
            return Ok(());
        }
        for _ in 0..SETTLING_SECONDS {
            if cluster.map().is_none_or(|map| map.is_settled()) {
                return self.start_all(cluster);
            }
            // Who was to be started meanwhile is.
            for node in cluster.member_numbers() {
                cluster.start(node);
            }
            cluster.drive(1_000 * MS);
        }
        let what = format!("partitions still move:\n{}", cluster.describe_moves());
        Err(self.report(cluster, &what, &cluster.violations()))
    }

    fn start_all(&self, cluster: &mut SimCluster) -> Result<(), String> {
        // One that was stopping, or does not start at once, gets another chance.
        for _ in 0..10 {
            cluster.member_numbers().into_iter().for_each(|node| cluster.start(node));
            let until = cluster.now().after_nanos(START_NANOS / 10);
            let all_up = |cluster: &SimCluster| {
                cluster.member_numbers().into_iter().all(|node| cluster.is_up(node))
            };
            if cluster.drive_until(until, all_up) {
                return Ok(());
            }
        }
        let members = cluster.member_numbers().into_iter();
        let down = members.filter(|node| !cluster.is_up(*node)).collect::<Vec<_>>();
        Err(self.report(cluster, &format!("nodes {down:?} do not start"), &cluster.violations()))
    }

    /// Ends all troubles, waits, reads everything everywhere, and judges.
    fn heal(&self, cluster: &mut SimCluster) -> Result<(), String> {
        cluster.end_changes();
        cluster.quiet();
        cluster.heal();
        // The power goes during an operation, which may have begun before.
        cluster.drive(self.options.disk_nanos_max);
        self.start_all(cluster)?;
        cluster.drive_until(cluster.settles_at(), |_| false);
        self.settle_members(cluster)?;
        // Mostly they are equal much earlier.
        let begin = cluster.now();
        let mut differences = Vec::new();
        for millis in [2_000, 4_000, 8_000, 16_000, 30_000] {
            cluster.drive(millis * MS);
            if let Some(node) =
                cluster.member_numbers().into_iter().find(|node| !cluster.is_up(*node))
            {
                let what = format!("node {node} ended although nothing was wrong with it");
                return Err(self.report(cluster, &what, &cluster.violations()));
            }
            differences = cluster.differences();
            if differences.is_empty() {
                break;
            }
        }
        debug_assert!(cluster.now() <= begin.after_nanos(HEALING_NANOS + 1_000 * MS));
        if !differences.is_empty() {
            return Err(self.report(cluster, "replicas differ after healing", &differences));
        }
        let until = begin.after_nanos(HEALING_NANOS);
        while !cluster.doubts().is_empty() && cluster.now() < until {
            cluster.drive(500 * MS);
        }
        if !cluster.doubts().is_empty() {
            return Err(self.report(cluster, "members doubt members", &cluster.doubts()));
        }
        cluster.mark_converged();
        let audited = cluster.audit();
        let mut violations = cluster.violations();
        violations.extend(cluster.wrong_changes());
        match audited {
            Err(problem) => Err(self.report(cluster, &problem, &violations)),
            Ok(()) if violations.is_empty() => Ok(()),
            Ok(()) => Err(self.report(cluster, "promises are broken", &violations)),
        }
    }

    fn report(&self, cluster: &SimCluster, what: &str, violations: &[Violation]) -> String {
        let seed = self.options.seed;
        let mut text = format!("seed {seed}: {what}\n");
        for violation in violations.iter().take(8) {
            text.push_str(&format!("{violation}\n"));
        }
        let ClusterOptions { nodes, shards, replicas, durability, disk_nanos_max, .. } =
            self.options;
        text.push_str(&format!(
            "{nodes} nodes of {shards} shards, {replicas} copies, {durability:?}, disks of up to {} us\n",
            disk_nanos_max / 1000
        ));
        text.push_str("what happened:\n");
        for (at, what) in cluster.diary() {
            text.push_str(&format!("{:>12} us {what}\n", at.0 / 1000));
        }
        for (namespace, key) in violations.first().into_iter().filter_map(|it| cluster.subject(it))
        {
            if let Some((_, history)) = cluster.histories().find(|(id, _)| *id == namespace) {
                let described = describe(history, key);
                text.push_str(&format!("namespace {} key {key}:\n{described}", namespace.0));
            }
        }
        text
    }
}

/// What a majority of disks held is lost with a majority of them, and no register outlives that: one
/// loss a chapter, before the others catch up.
fn keep_a_majority(plan: &mut [(u64, Trouble)]) {
    let losses = plan.iter_mut().filter(|(_, trouble)| matches!(trouble, Trouble::LoseDisks(_)));
    for (_, trouble) in losses.skip(1) {
        if let Trouble::LoseDisks(node) = trouble {
            *trouble = Trouble::Crash(*node);
        }
    }
}
