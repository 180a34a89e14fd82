//! A log tail that is larger than the memory: written to tables while it is replayed.

use super::*;
use crate::sim::{Fault, Rule};

const KEYS: usize = 6000;

/// A world whose log holds much more than the memory that it is opened with next.
fn long_tail() -> World {
    let mut world = World::new();
    world.options.memtable_size = 64 << 20;
    let shard = world.open();
    for i in 0..KEYS {
        let wall = world.executor.runtime().wall();
        let applied = shard.apply(&mutation(&format!("key{i}"), Some(&value_of(i)), 0), wall);
        let applied = applied.expect("taken");
        if i % 50 == 49 || i + 1 == KEYS {
            world.run(shard.wait_visible(applied.lsn)).expect("durable");
        }
    }
    assert_eq!(shard.stats().tables, 0);
    drop(shard);
    world.executor.kill_tasks();
    world.disk = world.disk.crash(9);
    world.options.memtable_size = 64 << 10;
    world
}

fn try_open(world: &World) -> Result<TestShard> {
    let runtime = world.executor.runtime();
    let identity = &world.identity();
    let opening =
        Shard::open(world.disk.clone(), runtime, Path::new(DIR), identity, world.options, None);
    world.run(opening)
}

fn check(world: &World, shard: &TestShard) {
    for i in (0..KEYS).step_by(7) {
        assert_eq!(world.get(shard, &format!("key{i}")), Some(value_of(i)), "key{i}");
    }
}

#[test]
fn it_is_opened_within_the_memory_that_there_is() {
    let mut world = long_tail();
    let shard = world.open();
    let stats = shard.stats();
    let bound = world.options.memtable_size * (world.options.memtables_sealed_max + 2);
    assert!(stats.memory_bytes <= bound, "{stats:?}");
    assert!(stats.tables > 5, "{stats:?}");
    check(&world, &shard);
    let wall = world.executor.runtime().wall();
    let new = shard.apply(&mutation("key3", Some(b"new"), 0), wall).expect("taken");
    world.run(shard.wait_visible(new.lsn)).expect("durable");
    assert!(new.dot.sequence > KEYS as u64 / 64, "{new:?}");
    let shard = world.crash(4);
    assert_eq!(world.get(&shard, "key3").as_deref(), Some(&b"new"[..]));
    let wall = world.executor.runtime().wall();
    let newer = shard.apply(&mutation("key3", Some(b"newer"), 0), wall).expect("taken");
    assert!(newer.dot.sequence > new.dot.sequence && newer.timestamp > new.timestamp);
}

#[test]
fn whatever_fails_meanwhile_the_next_open_finds_all_and_nothing_is_left_over() {
    let count = {
        let world = long_tail();
        let before = world.disk.op_count();
        try_open(&world).expect("opens");
        world.disk.op_count() - before
    };
    for nth in (1..count).step_by(7) {
        let mut world = long_tail();
        world.disk.inject(Rule::nth_of_any(nth, Fault::Eio));
        let first = try_open(&world);
        world.disk.clear_faults();
        if let Ok(shard) = &first {
            check(&world, shard);
        }
        drop(first);
        let shard = world.crash(nth);
        check(&world, &shard);
        let count = |world: &World| {
            let files = world.disk.files();
            files.iter().filter(|(path, _)| path.to_string_lossy().ends_with(".sst")).count()
        };
        // A compaction may be about to remove its inputs.
        let runtime = world.executor.runtime();
        world.run(runtime.sleep_until(runtime.now().after_nanos(60_000_000_000)));
        assert_eq!(count(&world), shard.stats().tables, "operation {nth}");
    }
}
