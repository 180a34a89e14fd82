//! A log that is damaged before valid records: refused, unless what may be lost is given up.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::*;
use crate::log::OnDamage;
use crate::model::SeenSet;

/// Keys; each is written twice, one batch a write.
const KEYS: usize = 400;

fn name(i: usize) -> String {
    format!("key{i}")
}

fn old_value(i: usize) -> Vec<u8> {
    [b"old".as_slice(), &value_of(i)].concat()
}

fn segment(id: u64) -> PathBuf {
    Path::new(DIR).join(format!("log/{id:010}.log"))
}

fn aside(id: u64) -> PathBuf {
    Path::new(DIR).join(format!("log/{id:010}.log.damaged"))
}

/// A world whose shard was killed with all its records in the log, in several segments; and the
/// greatest sequence and stamp that it had used.
fn logged(replicated: bool) -> (World, u64, Timestamp) {
    let mut world = World::new();
    world.options.memtable_size = 64 << 20;
    world.options.replicated = replicated;
    let shard = world.open();
    let (mut sequence, mut stamp) = (0, Timestamp::ZERO);
    for i in 0..2 * KEYS {
        let (key, value) = (name(i % KEYS), value_of(i % KEYS));
        let value = if i < KEYS { old_value(i) } else { value };
        let wall = world.executor.runtime().wall();
        let applied = shard.apply(&mutation(&key, Some(&value), 0), wall).expect("taken");
        world.run(shard.wait_visible(applied.lsn)).expect("durable");
        sequence = applied.dot.sequence.max(sequence);
        stamp = stamp.max(applied.timestamp);
    }
    assert_eq!(shard.stats().tables, 0);
    assert!(shard.stats().log.segments_live > 1, "{:?}", shard.stats().log);
    drop(shard);
    world.executor.kill_tasks();
    world.disk = world.disk.crash(9);
    (world, sequence, stamp)
}

fn try_open(world: &World, on_damage: OnDamage) -> Result<TestShard> {
    let (disk, runtime) = (world.disk.clone(), world.executor.runtime());
    let (dir, identity) = (Path::new(DIR), world.identity());
    world.run(Shard::open_with(disk, runtime, dir, &identity, world.options, None, on_damage))
}

/// Pulls the plug.
fn stop(world: &mut World, shard: TestShard, seed: u64) {
    drop(shard);
    world.executor.kill_tasks();
    world.disk = world.disk.crash(seed);
}

/// How many keys show their newer value; each other one its older, or is absent.
fn whole(world: &World, shard: &TestShard) -> usize {
    let newer = |i: &usize| match world.get(shard, &name(*i)) {
        Some(value) if value == value_of(*i) => true,
        Some(value) => {
            assert_eq!(value, old_value(*i), "{i}");
            false
        }
        None => false,
    };
    (0..KEYS).filter(newer).count()
}

type Damage = fn(&SimDisk);

/// Where batches are, and what can happen to them: name, damage, damaged segments that are there,
/// fewest and most records that may be lost.
const DAMAGES: [(&str, Damage, &[u64], [u64; 2]); 7] = [
    ("a record", |disk| disk.flip_bit(&segment(1), (64 << 10) * 8 + 555), &[1], [1, 1]),
    ("the first batch", |disk| disk.overwrite(&segment(1), 4096, &[0; 512]), &[1], [1, 2]),
    (
        "two segments",
        |disk| {
            disk.flip_bit(&segment(1), (100 << 10) * 8 + 3);
            disk.overwrite(&segment(2), 60 << 10, &[0xA5; 9000]);
        },
        &[1, 2],
        [2, 20],
    ),
    (
        "an end and a beginning",
        |disk| {
            disk.overwrite(&segment(1), 250 << 10, &[0; 6 << 10]);
            disk.overwrite(&segment(2), 4096, &[0; 4096]);
        },
        &[1, 2],
        [2, 30],
    ),
    ("a segment's header", |disk| disk.flip_bit(&segment(1), 30 * 8), &[1], [100, 600]),
    ("a missing segment", |disk| assert!(disk.remove_file(&segment(1))), &[], [100, 600]),
    ("a cut segment", |disk| disk.truncate(&segment(1), 200 << 10), &[1], [10, 200]),
];

#[test]
fn a_refusal_names_what_is_lost_and_its_acceptance_keeps_the_rest_for_all_later_starts() {
    for (what, damage, damaged, [fewest, most]) in DAMAGES {
        let (mut world, sequence, stamp) = logged(false);
        damage(&world.disk);
        let bytes = |world: &World, path: fn(u64) -> PathBuf| {
            let read = |id: &u64| world.disk.read_file(&path(*id));
            damaged.iter().map(read).collect::<Option<Vec<_>>>()
        };
        let before = bytes(&world, segment);
        assert!(before.is_some(), "{what}");
        let refused = try_open(&world, OnDamage::Refuse).expect_err(what);
        assert!(matches!(refused, Error::Corrupt { .. }), "{what}: {refused}");
        let told = refused.to_string();
        for part in ["offset", "may be lost", "records", "bytes", "--accept-loss"] {
            assert!(told.contains(part), "{what}: {told}");
        }
        let shard = try_open(&world, OnDamage::Accept).expect(what);
        let counters = shard.stats().counters;
        assert!(counters.log_losses > 0, "{what}: {counters:?}");
        assert!((fewest..=most).contains(&counters.log_records_lost), "{what}: {counters:?}");
        let newer = whole(&world, &shard);
        assert!(newer as u64 + most >= KEYS as u64, "{what}: {newer} newer values");
        // What was given out in the lost part is not given out again.
        let wall = world.executor.runtime().wall();
        let applied = shard.apply(&mutation("new", Some(b"v"), 0), wall).expect("taken");
        assert!(applied.dot.sequence > sequence && applied.timestamp > stamp, "{what}");
        world.run(shard.wait_visible(applied.lsn)).expect("durable");
        assert_eq!(bytes(&world, aside), before, "{what}: the damaged bytes are kept");
        stop(&mut world, shard, 3);
        let shard = try_open(&world, OnDamage::Refuse).expect(what);
        assert_eq!(whole(&world, &shard), newer, "{what}");
        assert_eq!(shard.stats().counters.log_losses, 0, "{what}");
        assert_eq!(world.get(&shard, "new").as_deref(), Some(&b"v"[..]), "{what}");
        // Segments are recycled round and round, but not these.
        for i in 0..2 * KEYS {
            world.put(&shard, &name(i), &value_of(i));
        }
        world.run(shard.flush()).expect("a flush");
        assert_eq!(bytes(&world, aside), before, "{what}: the damaged bytes are kept");
        world.run(shard.close()).expect("closed");
        drop(shard);
        let shard = try_open(&world, OnDamage::Refuse).expect(what);
        assert_eq!(whole(&world, &shard), KEYS, "{what}");
    }
}

#[test]
fn a_whole_log_is_opened_with_the_flag_as_without_it() {
    let (world, ..) = logged(false);
    let shard = try_open(&world, OnDamage::Accept).expect("whole");
    assert_eq!(whole(&world, &shard), KEYS);
    assert_eq!((shard.stats().counters.log_losses, shard.stats().tables), (0, 0));
}

#[test]
fn power_cuts_at_any_operation_leave_a_refusal_or_a_shard_that_has_recovered() {
    let (two, header) = (DAMAGES[2], DAMAGES[4]);
    for (what, damage, damaged, _) in [two, header] {
        let (original, ..) = logged(false);
        damage(&original.disk);
        let before: Vec<_> =
            damaged.iter().map(|id| original.disk.read_file(&segment(*id))).collect();
        let fork = || {
            let world = World::new();
            let disk = original.disk.fork_onto(&world.executor.runtime());
            World { disk, options: original.options, ..world }
        };
        let world = fork();
        let (start, shard) = (world.disk.op_count(), try_open(&world, OnDamage::Accept));
        let newer = whole(&world, &shard.expect("opened"));
        let count = world.disk.op_count() - start;
        let (mut refused, mut recovered) = (0, 0);
        for nth in 1..count {
            let mut world = fork();
            world.disk.cut_power_at(world.disk.op_count() + nth);
            let (disk, runtime) = (world.disk.clone(), world.executor.runtime());
            let (identity, accept) = (world.identity(), OnDamage::Accept);
            let dir = Path::new(DIR);
            let opening =
                Shard::open_with(disk, runtime, dir, &identity, world.options, None, accept);
            let _ = world.executor.try_run(opening);
            world.executor.kill_tasks();
            let executor = SimExecutor::new(nth);
            world.disk = world.disk.crash_onto(&executor.runtime(), nth);
            world.executor = executor;
            let shard = match try_open(&world, OnDamage::Refuse) {
                Ok(shard) => {
                    recovered += 1;
                    shard
                }
                Err(error) => {
                    assert!(matches!(error, Error::Corrupt { .. }), "{what} {nth}: {error}");
                    refused += 1;
                    try_open(&world, OnDamage::Accept).expect("accepted again")
                }
            };
            assert_eq!(whole(&world, &shard), newer, "{what} {nth}");
            let kept: Vec<_> = damaged.iter().map(|id| world.disk.read_file(&aside(*id))).collect();
            assert_eq!(kept, before, "{what} {nth}");
            stop(&mut world, shard, nth);
            let shard = try_open(&world, OnDamage::Refuse).expect("no flag is needed");
            assert_eq!(whole(&world, &shard), newer, "{what} {nth}");
        }
        assert!(refused > 10 && recovered > 0, "{what}: {refused} refused, {recovered} recovered");
    }
}

#[test]
fn a_member_of_a_cluster_has_not_seen_what_was_lost_until_the_others_have_refilled_it() {
    let (mut world, sequence, _) = logged(true);
    let all: Vec<Record> = {
        let shard = world.open();
        let read = |i| {
            let token = Token::of_key(name(i).as_bytes(), 3);
            let found = world.run(shard.get(token, NS, name(i).as_bytes())).expect("read");
            found.expect("there")
        };
        let all = (0..KEYS).map(read).collect();
        // Says behind the damage that all of it counts as merged.
        for partition in (0..64).map(crate::model::PartitionId) {
            let seen: SeenSet = (*shard.seen(partition)).clone();
            let lsn = shard.adopt_seen(partition, &seen).expect("taken");
            world.run(shard.wait_visible(lsn)).expect("durable");
        }
        stop(&mut world, shard, 5);
        all
    };
    world.disk.overwrite(&segment(2), 60 << 10, &[0xA5; 40_000]);
    try_open(&world, OnDamage::Refuse).expect_err("damaged");
    let shard = try_open(&world, OnDamage::Accept).expect("accepted");
    assert!(shard.stats().counters.log_records_lost > 5);
    assert_eq!(shard.unknown_ranges(), [TokenRange::FULL]);
    let is_seen = |shard: &TestShard, record: &Record| {
        shard.seen(record.token.partition(6)).contains(record.dot)
    };
    let lost: BTreeSet<_> = (0..KEYS).filter(|&i| !is_seen(&shard, &all[i])).collect();
    assert!((5..KEYS / 2).contains(&lost.len()), "{} lost", lost.len());
    let wall = world.executor.runtime().wall();
    let applied = shard.apply(&mutation("new", Some(b"v"), 0), wall).expect("taken");
    assert!(applied.dot.sequence > sequence);
    // A crash in between forgets none of it; reads are refused meanwhile, and are no absence.
    world.run(shard.wait_visible(applied.lsn)).expect("durable");
    stop(&mut world, shard, 6);
    let shard = world.open();
    assert_eq!(shard.unknown_ranges(), [TokenRange::FULL]);
    for (i, record) in all.iter().enumerate() {
        let read = world.run(shard.get(record.token, NS, &record.key));
        assert!(matches!(read, Err(Error::Corrupt { .. })), "{i}");
        assert_eq!(!is_seen(&shard, record), lost.contains(&i), "{i}");
    }
    for record in &all {
        let wall = world.executor.runtime().wall();
        let merged = world.run(shard.merge_in_by(Merge::LastWriteWins, &record.as_ref(), wall));
        merged.expect("merged again");
    }
    world.run(shard.clear_unknown(TokenRange::FULL)).expect("cleared");
    assert_eq!((shard.unknown_ranges(), whole(&world, &shard)), (vec![], KEYS));
    stop(&mut world, shard, 7);
    let shard = world.open();
    assert_eq!((shard.unknown_ranges(), whole(&world, &shard)), (vec![], KEYS));
    assert!(all.iter().all(|record| is_seen(&shard, record)));
}
