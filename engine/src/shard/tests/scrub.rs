//! A shard of its own finds damage although nobody reads.

use std::path::PathBuf;

use super::*;
use crate::sim::{Fault, Op, Rule};

const KEYS: usize = 400;
const HOUR: u64 = 3_600_000_000_000;

fn name(i: usize) -> String {
    format!("key{i}")
}

fn long_value(i: usize) -> Vec<u8> {
    [value_of(i), vec![7; 600]].concat()
}

/// A shard with all its records in one table, opened anew: nothing is cached. And that table.
fn cold(replicated: bool) -> (World, TestShard, PathBuf) {
    let mut world = World::new();
    world.options.memtable_size = 4 << 20;
    world.options.compression = crate::options::Compression::None;
    world.options.replicated = replicated;
    let shard = world.open();
    for i in 0..KEYS {
        world.put(&shard, &name(i), &long_value(i));
    }
    world.run(shard.flush()).expect("a flush");
    // Compaction has nothing left to do with it.
    sleep(&world, HOUR / 60);
    world.run(shard.close()).expect("closed");
    drop(shard);
    let shard = world.open();
    shard.state.watch_nanos.set(HOUR);
    let is_table = |path: &PathBuf| path.to_string_lossy().ends_with(".sst");
    let table = world.disk.files().into_iter().map(|(path, _)| path).find(is_table);
    (world, shard, table.expect("a table"))
}

fn sleep(world: &World, nanos: u64) {
    let runtime = world.executor.runtime();
    let end = runtime.now().after_nanos(nanos);
    while runtime.now() < end {
        world.run(runtime.sleep_until(end.min(runtime.now().after_nanos(HOUR / 2))));
    }
}

/// Keys that cannot be read; the others are right.
fn missing(world: &World, shard: &TestShard) -> usize {
    let is_missing = |i: &usize| {
        let token = Token::of_key(name(*i).as_bytes(), 3);
        match world.run(shard.get(token, NS, name(*i).as_bytes())) {
            Ok(found) => {
                assert_eq!(found.expect("never absent").value, long_value(*i));
                false
            }
            Err(Error::Corrupt { .. }) => true,
            Err(error) => panic!("{error}"),
        }
    };
    (0..KEYS).filter(is_missing).count()
}

#[test]
fn a_flipped_bit_in_a_cold_block_is_found_without_any_read() {
    let (world, shard, table) = cold(false);
    world.disk.flip_bit(&table, 8_000 * 8);
    assert!(shard.unknown_ranges().is_empty());
    let mut days = 0;
    while shard.unknown_ranges().is_empty() {
        sleep(&world, 24 * HOUR);
        days += 1;
        assert!(days < 100, "1.5 % a day is all of it in 67 days: {:?}", shard.stats().counters);
    }
    let counters = shard.stats().counters;
    assert_eq!((counters.scrub_damaged, counters.blocks_read), (1, 0), "{counters:?}");
    let unknown = shard.unknown_ranges();
    let found = missing(&world, &shard);
    assert!((1..KEYS / 4).contains(&found), "{found} missing");
    assert_eq!(shard.unknown_ranges(), unknown, "the same that reads meet");
    // It is met again each round, and counted once.
    sleep(&world, 100 * 24 * HOUR);
    assert_eq!(shard.stats().counters.scrub_damaged, 1);
}

#[test]
fn a_small_share_is_read_each_day() {
    let (world, shard, _) = cold(false);
    let bytes = shard.stats().table_bytes;
    let read = |shard: &TestShard| shard.stats().counters.scrubbed_bytes;
    sleep(&world, 200 * 24 * HOUR);
    // Blocks on the border of two pieces are read twice.
    assert!((2 * bytes..5 * bytes).contains(&read(&shard)), "{} of {bytes}", read(&shard));
    assert_eq!(shard.stats().counters.scrub_damaged, 0);
}

#[test]
fn everything_is_read_when_somebody_asks_and_all_damage_is_named() {
    let (world, shard, table) = cold(false);
    for byte in [600, 80_000, 160_000] {
        world.disk.flip_bit(&table, byte * 8);
    }
    assert_eq!(shard.scrub_bytes_left(), 0);
    shard.scrub_all();
    assert!(shard.scrub_bytes_left() > 0);
    sleep(&world, HOUR / 60);
    assert_eq!(shard.scrub_bytes_left(), 0);
    let counters = shard.stats().counters;
    assert_eq!((counters.scrub_damaged, counters.blocks_read), (3, 0), "{counters:?}");
    assert_eq!(shard.unknown_ranges().len(), 3);
    assert!(missing(&world, &shard) > 2);
}

#[test]
fn a_disk_that_cannot_be_read_is_no_damage_and_no_end() {
    let (world, shard, table) = cold(false);
    world.disk.inject(Rule::nth(Op::Read, 1, Fault::Eio).on(".sst").times(3));
    shard.scrub_all();
    sleep(&world, HOUR / 60);
    assert_eq!((shard.scrub_bytes_left(), shard.stats().counters.scrub_damaged), (0, 0));
    world.disk.clear_faults();
    world.disk.flip_bit(&table, 8_000 * 8);
    shard.scrub_all();
    sleep(&world, HOUR / 60);
    assert_eq!(shard.stats().counters.scrub_damaged, 1);
}

#[test]
fn a_member_of_a_cluster_leaves_it_to_the_comparison_of_replicas() {
    let (world, shard, _) = cold(true);
    shard.scrub_all();
    sleep(&world, 100 * 24 * HOUR);
    let left = shard.scrub_bytes_left();
    assert_eq!((shard.stats().counters.scrubbed_pieces, left), (0, 0));
}
