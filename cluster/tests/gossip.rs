//! Stories of simulated clusters of membership machines: deaths, cuts, slow nodes, loss.
//!
//! Invariant: each story follows from its seed, which it names when it fails. What a cluster of
//! 1,000 does, and for how long nothing goes wrong, is measured by `examples/gossip.rs`; the
//! figures are in `bench/README.md`.

#[path = "gossip/world.rs"]
mod world;

use annulus_cluster::membership::{Options, Status};
use annulus_cluster::message::Vitals;
use world::{MS, SECOND, Setting, World, id};

/// Everybody has heard of everybody, and the talk about it is over.
fn settled(setting: Setting) -> World {
    let mut world = World::new(setting);
    world.run(30 * SECOND);
    world.tally = world::Tally::default();
    world
}

fn with_loss(seed: u64, nodes: u32, loss: u64) -> World {
    settled(Setting { loss, ..Setting::new(seed, nodes) })
}

#[test]
fn in_peace_everybody_is_alive_to_everybody() {
    for nodes in [2, 3, 10] {
        let world = settled(Setting::new(1, nodes));
        assert_eq!(world.pairs_seen_as(Status::Alive), nodes * (nodes - 1));
        for view in world.machine(0).views(annulus_engine::model::Instant(world.now)) {
            assert!(view.incarnation > 0 && view.heartbeat > 60, "{nodes}: {view:?}");
            assert!(view.heartbeat_age_nanos < 2 * SECOND, "{nodes}: {view:?}");
        }
    }
}

#[test]
fn a_death_is_known_to_all_in_time_whatever_is_lost() {
    for (nodes, loss, seconds) in
        [(3, 0, 6), (3, 50, 12), (10, 10, 6), (10, 50, 8), (10, 200, 20), (100, 10, 9)]
    {
        for seed in 1..=if nodes > 10 { 2 } else { 10 } {
            let mut world = with_loss(seed, nodes, loss);
            let victim = u32::try_from(seed).unwrap() % nodes;
            world.kill(victim);
            let took = world.wait(60 * SECOND, |it| it.seen_as(victim, Status::Down) == nodes - 1);
            let took = took.unwrap_or_else(|| panic!("{nodes} nodes, loss {loss}, seed {seed}"));
            assert!(took <= seconds * SECOND, "{nodes} {loss} {seed}: {} ms", took / MS);
        }
    }
}

#[test]
fn half_a_cluster_dies_and_the_rest_knows() {
    let mut world = with_loss(4, 60, 10);
    (0..30).for_each(|node| world.kill(node * 2));
    let all_known = |it: &World| (0..30).all(|node| it.seen_as(node * 2, Status::Down) == 30);
    let took = world.wait(120 * SECOND, all_known).expect("those who live find out");
    assert!(took < 60 * SECOND, "{} ms", took / MS);
    assert_eq!(world.tally.false_downs, 0, "{:?}", world.last_false);
}

#[test]
fn who_starts_again_is_alive_at_once() {
    for seed in 1..=5 {
        let mut world = with_loss(seed, 10, 10);
        world.kill(4);
        world.wait(60 * SECOND, |it| it.seen_as(4, Status::Down) == 9).expect("a death is known");
        world.start(4);
        let took = world.wait(10 * SECOND, |it| it.seen_as(4, Status::Alive) == 9);
        assert!(took.is_some_and(|took| took <= 2 * SECOND), "{seed}: {took:?}");
    }
}

#[test]
fn no_living_node_is_down_in_an_hour_of_loss() {
    for (seed, nodes) in [(1, 3), (2, 10)] {
        let mut world = with_loss(seed, nodes, 10);
        world.run(3600 * SECOND);
        assert_eq!(world.tally.false_downs, 0, "{seed}: {:?}", world.last_false);
    }
}

/// A node whose way from every other is cut accuses nobody for long: it hears that it hears
/// nothing. And its word alone takes nobody down.
#[test]
fn a_node_that_hears_nothing_soon_accuses_nobody() {
    for seed in 1..=5 {
        let mut world = with_loss(seed, 10, 0);
        world.cut_inbound(3, true);
        world.run(5 * SECOND);
        let before = world.figures(3);
        world.run(120 * SECOND);
        let after = world.figures(3);
        assert_eq!(after.accusations, before.accusations, "{seed}");
        assert!(after.withheld > before.withheld, "it goes on asking");
        assert_eq!(after.local_health, 7, "{seed}");
        assert_eq!(world.seen_as(3, Status::Down), 9, "the others cannot reach it: {seed}");
        let living = (0..10).filter(|node| *node != 3);
        for node in living {
            assert_ne!(world.status(node, 3), Status::Down, "on its own word, {seed}");
        }
        world.cut_inbound(3, false);
        let back = world.wait(60 * SECOND, |it| it.pairs_seen_as(Status::Alive) == 90);
        assert!(back.is_some(), "{seed}: {:?}", world.figures(3));
    }
}

#[test]
fn a_node_that_nobody_hears_is_down_and_returns() {
    let mut world = with_loss(1, 10, 0);
    world.cut_outbound(3, true);
    world.wait(30 * SECOND, |it| it.seen_as(3, Status::Down) == 9).expect("as good as dead");
    world.cut_outbound(3, false);
    world.wait(60 * SECOND, |it| it.pairs_seen_as(Status::Alive) == 90).expect("back");
}

/// Node 5, and nobody else, gets no answer of node 0, by itself or through others; and node 0,
/// which would contradict at once, never hears of it.
fn a_slanderer(seed: u64, options: Options) -> World {
    // What one reporter alone would make of it has no encoding.
    let check_codec = options == Options::default();
    let mut world = settled(Setting { options, check_codec, ..Setting::new(seed, 6) });
    world.slander = Some((0, 5));
    world.run(60 * SECOND);
    world
}

#[test]
fn one_accuser_alone_takes_nobody_down() {
    for seed in 1..=5 {
        let world = a_slanderer(seed, Options::default());
        assert!(world.figures(5).accusations > 0, "it does accuse: {seed}");
        assert_eq!(world.tally.false_downs, 0, "{seed}: {:?}", world.last_false);
        // The same story without the rule: what it is for.
        let lone = a_slanderer(seed, Options { reporters_min: 1, ..Options::default() });
        assert!(lone.tally.false_downs > 0, "the rule makes the difference: {seed}");
    }
}

#[test]
fn two_nodes_never_say_down() {
    let mut world = with_loss(1, 2, 0);
    world.kill(1);
    let took = world.wait(60 * SECOND, |it| it.status(1, 0) == Status::Unreachable);
    assert!(took.is_some());
    world.run(600 * SECOND);
    assert_eq!(world.status(1, 0), Status::Unreachable);
    world.start(1);
    world.wait(5 * SECOND, |it| it.status(1, 0) == Status::Alive).expect("back");
}

#[test]
fn a_lost_rack_does_not_lose_the_others() {
    // Racks are 0, 3, 6, 9 | 1, 4, 7 | 2, 5, 8.
    let rack = |node: u32| node % 3;
    let mut world = with_loss(7, 10, 0);
    let ways = |world: &mut World, is_cut| {
        for from in 0..10 {
            for to in (0..10).filter(|to| (rack(*to) == 2) != (rack(from) == 2)) {
                world.cut(from, to, is_cut);
            }
        }
    };
    ways(&mut world, true);
    world.run(60 * SECOND);
    for lost in [2, 5, 8] {
        assert_eq!(world.seen_as(lost, Status::Down), 7, "{lost}");
    }
    ways(&mut world, false);
    world.wait(60 * SECOND, |it| it.pairs_seen_as(Status::Alive) == 90).expect("whole again");
}

#[test]
fn a_node_that_stopped_for_a_while_comes_back_and_accuses_nobody() {
    for (seed, seconds) in [(1, 1), (2, 5), (3, 60)] {
        let mut world = with_loss(seed, 6, 10);
        let before = world.figures(2).accusations;
        world.stop(2);
        world.run(seconds * SECOND);
        world.go_on(2);
        let back = world.wait(20 * SECOND, |it| it.pairs_seen_as(Status::Alive) == 30);
        assert!(back.is_some(), "{seed}");
        assert_eq!(world.figures(2).accusations, before, "{seed}");
    }
}

#[test]
fn flapping_ways_take_nobody_down() {
    let mut world = with_loss(11, 10, 10);
    for round in 0..200u32 {
        let (from, to) = (round % 10, (round * 7 + 3) % 10);
        world.cut(from, to, true);
        world.run(SECOND);
        world.cut(from, to, false);
        world.run(SECOND / 2);
    }
    assert_eq!(world.tally.false_downs, 0, "{:?}", world.last_false);
}

#[test]
fn slow_nodes_take_nobody_else_down() {
    let mut world = settled(Setting { loss: 10, slow_percent: 5, ..Setting::new(5, 20) });
    world.run(600 * SECOND);
    // Node 19 is slow. The others do not pay for it.
    let last = world.last_false.map(|it| it.1);
    assert!(last.is_none_or(|of| of == 19), "{last:?}");
    let slow = world.figures(19);
    assert!(slow.local_health > 0, "it notices: {slow:?}");
}

#[test]
fn what_is_sent_does_not_grow_with_the_cluster() {
    let idle = |nodes: u32, seconds: u64| {
        let mut world = settled(Setting::new(1, nodes));
        world.run(seconds * SECOND);
        world.tally.bytes / u64::from(nodes) / seconds
    };
    let (few, some, many) = (idle(3, 60), idle(10, 60), idle(100, 20));
    assert!(few <= some && some.abs_diff(many) * 20 < some, "{few} {some} {many}");
    assert!(many < 5_000, "{many}");
}

#[test]
fn a_greater_epoch_is_everywhere_within_seconds() {
    let mut world = with_loss(3, 100, 10);
    let vitals = Vitals { settings_epoch: 9, load: 4, ..Vitals::default() };
    world.machine_mut(7).set_vitals(vitals);
    let now = |world: &World| annulus_engine::model::Instant(world.now);
    let took = world.wait(30 * SECOND, |it| {
        (0..100).all(|node| {
            it.machine(node).views(now(it)).find(|view| view.node == id(7)).unwrap().vitals
                == vitals
        })
    });
    assert!(took.is_some_and(|took| took <= 5 * SECOND), "{took:?}");
}
