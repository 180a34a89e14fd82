//! Measures the gossip of simulated clusters: what it costs, how soon a death is known, how often
//! a living node is taken for dead. `bench/README.md` has the figures.
//!
//! ```text
//! cargo run --release -p annulus-cluster --example gossip -- idle          bytes a second
//! cargo run --release -p annulus-cluster --example gossip -- deaths [seeds] [nodes ...]
//! cargo run --release -p annulus-cluster --example gossip -- hours NODES HOURS [loss ‰] [seed]
//! ```
//!
//! Invariant: the figures are virtual, and the same on every machine.

#[expect(dead_code, reason = "the tests use more of it")]
#[path = "../tests/gossip/world.rs"]
mod world;

use annulus_cluster::membership::Status;
use annulus_engine::model::Instant;
use world::{MS, SECOND, Setting, Tally, World};

fn settled(setting: Setting) -> World {
    let mut world = World::new(Setting { check_codec: false, ..setting });
    world.run(60 * SECOND);
    world.tally = Tally::default();
    world
}

/// What a node sends while nothing happens, and how old its knowledge of others' load is.
fn idle() {
    println!(
        "| nodes | bytes a node a second | messages a node a second | largest | age of a report, median | 99 of 100 |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for nodes in [2u32, 3, 5, 10, 30, 100, 300, 1000, 5000] {
        let seconds = if nodes >= 300 { 20 } else { 60 };
        let mut world = settled(Setting::new(1, nodes));
        world.run(seconds * SECOND);
        let Tally { messages, bytes, largest, .. } = world.tally;
        let whole = f64::from(nodes) * seconds as f64;
        let mut ages: Vec<u64> = (0..nodes.min(20))
            .flat_map(|node| world.machine(node).views(Instant(world.now)).collect::<Vec<_>>())
            .map(|view| view.heartbeat_age_nanos / MS)
            .collect();
        ages.sort_unstable();
        println!(
            "| {nodes} | {:.0} | {:.1} | {largest} | {:.1} s | {:.1} s |",
            bytes as f64 / whole,
            messages as f64 / whole,
            ages[ages.len() / 2] as f64 / 1000.0,
            ages[ages.len() * 99 / 100] as f64 / 1000.0,
        );
    }
}

/// Time until the first and until all others know that a node is dead.
fn deaths(seeds: u64, sizes: &[u32]) {
    println!(
        "| nodes | loss | slow nodes | deaths | first knows | all know, median | worst | down though alive |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for &nodes in sizes {
        for (loss, slow_percent) in [(0, 0), (10, 0), (50, 0), (200, 0), (10, 5)] {
            let (mut first, mut all, mut wrong) = (Vec::new(), Vec::new(), 0);
            for seed in 1..=seeds {
                let setting = Setting { loss, slow_percent, ..Setting::new(seed, nodes) };
                let mut world = settled(setting);
                let victim = u32::try_from(seed * 7919 % u64::from(nodes)).expect("a node");
                world.kill(victim);
                let knows =
                    |least: u32| move |it: &World| it.seen_as(victim, Status::Down) >= least;
                let begin = world.now;
                if world.wait(300 * SECOND, knows(1)).is_none() {
                    continue;
                }
                first.push(world.now - begin);
                if world.wait(300 * SECOND, knows(nodes - 1)).is_some() {
                    all.push(world.now - begin);
                }
                wrong += world.tally.false_downs;
            }
            first.sort_unstable();
            all.sort_unstable();
            let seconds = |it: Option<&u64>| {
                it.map_or("never".into(), |it| format!("{:.1} s", *it as f64 / SECOND as f64))
            };
            println!(
                "| {nodes} | {} % | {slow_percent} % | {} of {seeds} | {} | {} | {} | {wrong} |",
                loss as f64 / 10.0,
                all.len(),
                seconds(first.get(first.len() / 2)),
                seconds(all.get(all.len() / 2)),
                seconds(all.last()),
            );
        }
    }
}

/// Living nodes that were taken for dead, and those suspected, in so many hours.
fn hours(nodes: u32, hours: u64, loss: u64, seed: u64) {
    let mut world = settled(Setting { loss, ..Setting::new(seed, nodes) });
    for hour in 1..=hours {
        world.run(3600 * SECOND);
        let Tally { false_downs, false_suspects, messages, .. } = world.tally;
        println!(
            "{nodes} nodes, loss {} %, seed {seed}, hour {hour}: {messages} messages, \
             {false_suspects} times a living node was suspected by a node, {false_downs} times down {:?}",
            loss as f64 / 10.0,
            world.last_false,
        );
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |at: usize, usual: u64| arguments.get(at).map_or(usual, |it| it.parse().expect("a number"));
    let small = |at: usize, usual: u32| u32::try_from(number(at, usual.into())).expect("small");
    match arguments.first().map(String::as_str) {
        Some("idle") => idle(),
        Some("deaths") => {
            let sizes: Vec<u32> = (2..arguments.len()).map(|at| small(at, 0)).collect();
            let usual = [3, 10, 100, 1000];
            deaths(number(1, 10), if sizes.is_empty() { &usual } else { &sizes });
        }
        Some("hours") => hours(small(1, 100), number(2, 24), number(3, 10), number(4, 1)),
        _ => eprintln!(
            "idle, deaths [seeds] [nodes ...], or hours NODES HOURS [loss per mille] [seed]"
        ),
    }
}
