//! A full disk: slowed, then refused, never lost; and all by itself again when space returns.

use super::*;
use crate::sim::{Fault, Op, Rule};

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Done,
    Full,
    Busy,
    Poisoned,
}

fn write(world: &World, shard: &TestShard, key: &str, value: Option<&[u8]>) -> Told {
    let wall = world.executor.runtime().wall();
    match shard.apply(&mutation(key, value, 0), wall) {
        Ok(applied) => match world.run(shard.wait_visible(applied.lsn)) {
            Ok(()) => Told::Done,
            Err(Error::Poisoned { .. }) => Told::Poisoned,
            Err(error) => panic!("{error}"),
        },
        Err(error @ Error::Full { .. }) => {
            assert!(error.to_string().contains("full"), "{error}");
            Told::Full
        }
        Err(Error::Busy { .. }) => Told::Busy,
        Err(Error::Poisoned { .. }) => Told::Poisoned,
        Err(error) => panic!("{error}"),
    }
}

fn byte(i: usize) -> u8 {
    u8::try_from(i % 256).expect("below 256")
}

fn sleep(world: &World, millis: u64) {
    let runtime = world.executor.runtime();
    world.run(runtime.sleep_until(runtime.now().after_nanos(millis * 1_000_000)));
}

/// The files that are there are those that the shard knows of.
fn check_files(world: &World, shard: &TestShard) {
    let stats = shard.stats();
    let count = |end: &str| {
        let files = world.disk.files();
        files.iter().filter(|(path, _)| path.to_string_lossy().contains(end)).count()
    };
    assert_eq!(count(".sst"), stats.tables, "{:?}", world.disk.files());
    assert_eq!(count("MANIFEST"), 1, "{:?}", world.disk.files());
    let segments = stats.log.segments_live + stats.log.segments_ready + stats.log.segments_free;
    assert_eq!(count(".log"), segments, "{:?}", world.disk.files());
    assert_eq!(count(".tmp") + count(".new"), 0, "{:?}", world.disk.files());
}

#[test]
fn the_three_levels_pace_refuse_data_and_keep_the_reserve() {
    let mut world = World::new();
    world.options.compression = crate::options::Compression::None;
    world.options.space = crate::options::SpaceOptions {
        pace_below: 6 << 20,
        refuse_below: 4 << 20,
        reserve: 2 << 20,
    };
    world.disk.set_capacity(12 << 20);
    let shard = world.open();
    let mut written = 0;
    let mut paced = 0;
    let refused = loop {
        let told = write(&world, &shard, &format!("key{written}"), Some(&[byte(written); 900]));
        if told != Told::Done {
            break told;
        }
        if shard.space_level() == SpaceLevel::Pace {
            let now = world.executor.runtime().now();
            assert!(shard.write_delay_nanos(1000, now) > 0, "slowed before it is refused");
            paced += 1;
        }
        written += 1;
        assert!(written < 20_000, "never full");
    };
    assert_eq!(refused, Told::Full);
    assert_eq!(shard.space_level(), SpaceLevel::RefuseData);
    assert!(paced > 0 && written > 1000, "{written} written, {paced} paced");
    // Deletes are taken, reads go on.
    assert_eq!(write(&world, &shard, "key0", None), Told::Done);
    assert_eq!(world.get(&shard, "key0"), None);
    assert_eq!(world.get(&shard, "key1"), Some(vec![1; 900]));
    // Somebody else fills the disk: nothing is taken, reads go on.
    world.disk.set_capacity(world.disk.used() + (1 << 20));
    sleep(&world, 300);
    assert_eq!(shard.space_level(), SpaceLevel::Reserve);
    assert_eq!(write(&world, &shard, "key1", None), Told::Full);
    assert_eq!(write(&world, &shard, "new", Some(b"v")), Told::Full);
    assert_eq!(world.get(&shard, "key2"), Some(vec![2; 900]));
    // Space returns.
    world.disk.set_capacity(64 << 20);
    sleep(&world, 300);
    assert_eq!(shard.space_level(), SpaceLevel::Normal);
    for i in 0..500 {
        assert_eq!(write(&world, &shard, &format!("new{i}"), Some(&[1; 900])), Told::Done);
    }
    for i in 1..written {
        assert_eq!(world.get(&shard, &format!("key{i}")), Some(vec![byte(i); 900]), "key{i}");
    }
    sleep(&world, 5_000);
    check_files(&world, &shard);
}

#[test]
fn deletes_make_room_on_a_full_disk() {
    let mut world = World::new();
    world.options.compression = crate::options::Compression::None;
    world.options.space = crate::options::SpaceOptions {
        pace_below: 5 << 20,
        refuse_below: 4 << 20,
        reserve: 1 << 20,
    };
    world.disk.set_capacity(10 << 20);
    let shard = world.open();
    let mut written = 0;
    while write(&world, &shard, &format!("key{written}"), Some(&[7; 900])) == Told::Done {
        written += 1;
    }
    let before = shard.stats().disk_free_bytes;
    for i in 0..written {
        let mut tries = 0;
        while write(&world, &shard, &format!("key{i}"), None) != Told::Done {
            sleep(&world, 100);
            tries += 1;
            assert!(tries < 100, "key{i}: {:?}", shard.stats());
        }
    }
    world.run(shard.flush()).expect("a flush");
    sleep(&world, 30_000);
    let stats = shard.stats();
    assert!(stats.disk_free_bytes > before, "{stats:?}");
    assert_eq!(stats.space_level, SpaceLevel::Normal, "{stats:?}");
    assert_eq!(write(&world, &shard, "again", Some(&[1; 900])), Told::Done);
}

/// Writes until the shard refuses, checks that it reads, gives the space back, and checks that all
/// resumes and nothing is left behind.
fn fills_up_and_recovers(what: &str, begin: impl FnOnce(&World), end: impl FnOnce(&World)) {
    let world = World::new();
    let mut shard = world.open();
    let mut acknowledged = std::collections::BTreeMap::new();
    let mut perhaps = std::collections::BTreeSet::new();
    let mut put = |shard: &mut TestShard, i: usize| {
        let key = format!("key{}", i % 700);
        let value = value_of(i).repeat(4);
        let told = write(&world, shard, &key, Some(&value));
        match told {
            Told::Done => {
                perhaps.remove(&key);
                acknowledged.insert(key, value);
            }
            Told::Poisoned => {
                perhaps.insert(key);
                for _ in 0..50 {
                    if let Ok(new) = world.run(shard.reopen()) {
                        *shard = new;
                        break;
                    }
                    sleep(&world, 200);
                }
            }
            Told::Full | Told::Busy => {}
        }
        for (key, value) in acknowledged.iter().skip(i % 97).step_by(97) {
            let found = world.get(shard, key);
            assert!(perhaps.contains(key) || found.as_ref() == Some(value), "{what}: {key}");
        }
        told
    };
    for i in 0..700 {
        put(&mut shard, i);
    }
    begin(&world);
    let mut refused = 0;
    for i in 700..3000 {
        let told = put(&mut shard, i);
        refused += usize::from(told != Told::Done);
        if told != Told::Done {
            sleep(&world, 20);
        }
        if refused > 40 {
            break;
        }
    }
    end(&world);
    sleep(&world, 3_000);
    if what.starts_with("Write .log") {
        // Here the log itself was hit; who serves the shard opens it anew.
        put(&mut shard, 3000);
    }
    assert!(!shard.is_poisoned(), "{what}");
    for i in 3000..3700 {
        let mut told = put(&mut shard, i);
        for _ in 0..20 {
            if told == Told::Done {
                break;
            }
            sleep(&world, 100);
            told = put(&mut shard, i);
        }
        assert_eq!(told, Told::Done, "{what}: it resumes by itself: {:?}", shard.stats());
    }
    world.run(shard.flush()).expect("a flush");
    for (key, value) in &acknowledged {
        let found = world.get(&shard, key);
        assert!(perhaps.contains(key) || found.as_ref() == Some(value), "{what}: {key}");
    }
    sleep(&world, 10_000);
    check_files(&world, &shard);
}

#[test]
fn a_disk_that_others_filled_costs_refusals_only() {
    let refused = std::cell::Cell::new(false);
    fills_up_and_recovers(
        "filled",
        |world| world.disk.set_capacity(world.disk.used()),
        |world| {
            refused.set(true);
            world.disk.set_capacity(1 << 40);
        },
    );
    assert!(refused.get());
}

#[test]
fn no_space_at_any_operation_costs_refusals_only() {
    let places = [
        (Op::Open, ".sst"),
        (Op::Write, ".sst"),
        (Op::Sync, ".sst"),
        (Op::SyncDir, "table"),
        (Op::Open, "MANIFEST"),
        (Op::Write, "MANIFEST"),
        (Op::Rename, "MANIFEST"),
        (Op::SyncDir, "shard-000"),
        (Op::Open, "log/"),
        (Op::Write, ".tmp"),
        (Op::Sync, ".tmp"),
        (Op::Rename, "log/"),
        (Op::SyncDir, "log"),
        (Op::Write, ".log"),
    ];
    for (op, path) in places {
        for (nth, times) in [(3, 1), (1, u64::MAX)] {
            let what = format!("{op:?} {path} {nth} {times}");
            println!("{what}");
            let rule = Rule::nth(op, nth, Fault::NoSpace).on(path);
            let rule = if times == u64::MAX { rule.forever() } else { rule.times(times) };
            fills_up_and_recovers(
                &what,
                |world| world.disk.inject(rule),
                |world| world.disk.clear_faults(),
            );
        }
    }
}

#[test]
fn memory_stays_within_its_bound_while_flushes_are_slow_or_fail() {
    for fault in [Fault::NoSpace, Fault::Eio, Fault::Delay(3_000_000_000)] {
        let world = World::new();
        let shard = world.open();
        world.disk.inject(Rule::nth(Op::Write, 1, fault).on(".sst").forever());
        let options = &world.options;
        let bound = options.memtable_size * (options.memtables_sealed_max + 2);
        let runtime = world.executor.runtime();
        let (mut slowed, mut refused, mut taken) = (false, 0, 0);
        for i in 0..6000 {
            let wall = runtime.wall();
            // Forty at a time, and nobody waits for an answer.
            if i % 40 == 0 {
                world.run(runtime.sleep_until(runtime.now().after_nanos(300_000)));
            }
            match shard.apply(&mutation(&format!("key{i}"), Some(&[7; 300]), 0), wall) {
                Ok(_) => {
                    taken += 1;
                    slowed |= shard.write_delay_nanos(300, runtime.now()) > 0;
                }
                Err(Error::Busy { .. } | Error::Full { .. }) => {
                    assert!(slowed, "{fault:?}: refused before it was slowed");
                    refused += 1;
                    world.run(runtime.yield_now());
                }
                Err(error) => panic!("{error}"),
            }
            let held = shard.stats().memory_bytes;
            assert!(held <= bound, "{fault:?}: {held} bytes of {bound} after {i}");
        }
        assert!(refused > 1000 && taken > 300, "{fault:?}: {taken} taken, {refused} refused");
        world.disk.clear_faults();
        sleep(&world, 10_000);
        assert_eq!(write(&world, &shard, "after", Some(b"v")), Told::Done);
    }
}

#[test]
fn compaction_does_what_fits_when_the_hands_next_step_does_not() {
    let mut world = World::new();
    world.options.compression = crate::options::Compression::None;
    world.options.memtable_size = 1 << 20;
    world.options.compaction.table_size = 512 << 10;
    world.options.log.segment_size = 64 << 10;
    world.options.space = crate::options::SpaceOptions {
        pace_below: 500 << 10,
        refuse_below: 450 << 10,
        reserve: 60 << 10,
    };
    let shard = world.open();
    let token = |i: usize| Token::of_key(format!("key{i}").as_bytes(), 3);
    for i in 0..3_000 {
        assert_eq!(write(&world, &shard, &format!("key{i}"), Some(&[byte(i); 900])), Told::Done);
    }
    world.run(shard.flush()).expect("a flush");
    sleep(&world, 60_000);
    // Deletes lie far from the hand; at the hand little is written anew. And the disk fills up.
    let hand = shard.state.tables.current().layout().hand;
    let from_hand = |i: &usize| token(*i).0.wrapping_sub(hand.0);
    let mut keys: Vec<usize> = (0..3_000).collect();
    keys.sort_by_key(from_hand);
    let (kept, deleted) = keys.split_at(2_000);
    for i in kept.iter().step_by(40) {
        assert_eq!(write(&world, &shard, &format!("key{i}"), Some(&[1; 900])), Told::Done);
    }
    world.run(shard.flush()).expect("a flush");
    for i in deleted {
        assert_eq!(write(&world, &shard, &format!("key{i}"), None), Told::Done);
    }
    world.run(shard.flush()).expect("a flush");
    assert!(shard.stats().debt_bytes > 0, "nothing was compacted meanwhile");
    world.disk.set_capacity(world.disk.used() + (300 << 10));
    sleep(&world, 60_000);
    let stats = shard.stats();
    assert_eq!(stats.compactions_failed, 0, "{stats:?}");
    assert_eq!(stats.space_level, SpaceLevel::Normal, "{stats:?}");
    for i in kept.iter().skip(1).step_by(40) {
        assert_eq!(world.get(&shard, &format!("key{i}")), Some(vec![byte(*i); 900]));
    }
    for i in deleted.iter().step_by(7) {
        assert_eq!(world.get(&shard, &format!("key{i}")), None);
    }
    check_files(&world, &shard);
}
