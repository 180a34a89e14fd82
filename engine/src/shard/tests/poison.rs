//! A failed write or sync of the log, and the second life after it.

use std::collections::BTreeMap;

use super::*;
use crate::model::PartitionId;
use crate::options::Durability;
use crate::sim::{Fault, Op, Rule};

/// What a reader may find of a key: what was acknowledged last, or what came after it and was
/// answered "may be applied".
#[derive(Default)]
struct Expected {
    keys: BTreeMap<String, Vec<Option<Vec<u8>>>>,
}

impl Expected {
    fn acknowledged(&mut self, key: &str, value: Option<&[u8]>) {
        self.keys.insert(key.to_owned(), vec![value.map(<[u8]>::to_vec)]);
    }

    fn perhaps(&mut self, key: &str, value: Option<&[u8]>) {
        let values = self.keys.entry(key.to_owned()).or_insert_with(|| vec![None]);
        values.push(value.map(<[u8]>::to_vec));
    }

    /// Checks all keys; what is found now is what must be found from now on.
    fn check(&mut self, world: &World, shard: &TestShard) {
        for (key, values) in &mut self.keys {
            let found = world.get(shard, key);
            assert!(values.contains(&found), "{key}: {found:?} is none of {values:?}");
            *values = vec![found];
        }
    }
}

/// Writes, and takes note of what was answered.
fn put(world: &World, shard: &TestShard, expected: &mut Expected, key: &str, value: &[u8]) -> bool {
    let mutation = mutation(key, Some(value), 0);
    let wall = world.executor.runtime().wall();
    match shard.apply(&mutation, wall) {
        Ok(applied) => match world.run(shard.wait_visible(applied.lsn)) {
            Ok(()) => expected.acknowledged(key, Some(value)),
            Err(Error::Poisoned { .. }) => {
                expected.perhaps(key, Some(value));
                return false;
            }
            Err(error) => panic!("{error}"),
        },
        Err(Error::Busy { .. } | Error::Full { .. }) => {}
        Err(Error::Poisoned { .. }) => return false,
        Err(error) => panic!("{error}"),
    }
    true
}

fn reopen(world: &World, shard: TestShard) -> TestShard {
    for _ in 0..20 {
        if let Ok(new) = world.run(shard.reopen()) {
            return new;
        }
    }
    panic!("the shard could not be reopened");
}

#[test]
fn a_poisoned_shard_reads_on_and_writes_again_once_it_was_reopened() {
    let mut world = World::new();
    let shard = world.open();
    let mut expected = Expected::default();
    for i in 0..1500 {
        assert!(put(&world, &shard, &mut expected, &format!("key{i}"), &value_of(i)));
    }
    world.disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on(".log"));
    assert!(!put(&world, &shard, &mut expected, "key1", b"lost or not"));
    assert!(shard.is_poisoned());
    let wall = world.executor.runtime().wall();
    let refused = shard.apply(&mutation("key2", Some(b"never"), 0), wall);
    assert!(matches!(refused, Err(Error::Poisoned { .. })), "{refused:?}");
    assert_eq!(world.get(&shard, "key2"), Some(value_of(2)));

    let second = reopen(&world, shard.clone());
    assert!(!second.is_poisoned());
    assert_eq!(world.get(&second, "key2"), Some(value_of(2)));
    expected.check(&world, &second);
    // The first life still answers whoever holds it.
    assert_eq!(world.get(&shard, "key77"), Some(value_of(77)));
    for i in 0..3000 {
        assert!(put(&world, &second, &mut expected, &format!("key{i}"), &value_of(i + 1)));
    }
    for i in (0..1500).step_by(13) {
        let key = format!("key{i}");
        let token = Token::of_key(key.as_bytes(), 3);
        world.run(shard.get(token, NS, key.as_bytes())).expect("its files are left alone");
    }
    drop(shard);
    expected.check(&world, &second);
    let third = world.crash(5);
    expected.check(&world, &third);
}

/// Found by seed 5611 of the cluster stories: a full disk cost a node of its own, in `periodic` mode
/// and without a crash, writes that it had acknowledged and shown.
#[test]
fn what_was_acknowledged_in_periodic_mode_survives_a_failure_of_the_log() {
    let mut world = World::new();
    world.options.log.durability = Durability::Periodic { window_ms: 1_000 };
    for op in [Op::Write, Op::Sync] {
        let mut expected = Expected::default();
        let shard = world.open();
        for i in 0..300 {
            assert!(put(&world, &shard, &mut expected, &format!("key{i}"), &value_of(i)));
        }
        let runtime = world.executor.runtime();
        let all = shard.state.log.appended();
        world.run(shard.state.log.wait_durable(all)).expect("durable");
        world.disk.inject(Rule::nth(op, 1, Fault::Eio).on(".log"));
        for i in 200..400 {
            put(&world, &shard, &mut expected, &format!("key{i}"), &value_of(i + 1));
        }
        world.run(runtime.sleep_until(runtime.now().after_nanos(3_000_000_000)));
        assert!(shard.is_poisoned());
        let seen: Vec<_> = (0..64).map(|partition| shard.seen(PartitionId(partition))).collect();
        let second = reopen(&world, shard);
        expected.check(&world, &second);
        for (partition, seen) in (0..64).map(PartitionId).zip(seen) {
            assert!(second.seen(partition).covers(&seen), "{partition:?}");
        }
        let all = second.state.log.appended();
        world.run(second.state.log.wait_durable(all)).expect("durable");
        drop(second);
        let third = world.crash(8);
        expected.check(&world, &third);
        drop(third);
        world = World::new();
        world.options.log.durability = Durability::Periodic { window_ms: 1_000 };
    }
}

#[test]
fn stamps_and_sequences_go_on_rising_over_a_second_life() {
    let world = World::new();
    let shard = world.open();
    let wall = world.executor.runtime().wall();
    let before = shard.apply(&mutation("k", Some(b"1"), 0), wall).expect("written");
    world.run(shard.wait_visible(before.lsn)).expect("durable");
    world.disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on(".log"));
    let lost = shard.apply(&mutation("k", Some(b"2"), 0), wall).expect("taken");
    assert!(world.run(shard.wait_visible(lost.lsn)).is_err());
    let second = reopen(&world, shard);
    let after = second.apply(&mutation("k", Some(b"3"), 0), wall).expect("written");
    assert!(after.timestamp > lost.timestamp && after.dot.sequence > lost.dot.sequence);
}

#[test]
fn whichever_operation_fails_nothing_acknowledged_is_lost_and_writes_resume() {
    for nth in (1..160).step_by(3) {
        println!("operation {nth}");
        let mut world = World::new();
        world.options.memtable_size = 64 << 10;
        let mut shard = world.open();
        let mut expected = Expected::default();
        world.disk.inject(Rule::nth_of_any(nth, Fault::Eio));
        let mut lives = 1;
        for i in 0..1200_u32 {
            let value = [i.to_le_bytes()[0]; 150];
            if !put(&world, &shard, &mut expected, &format!("key{}", i % 400), &value) {
                shard = reopen(&world, shard);
                lives += 1;
                expected.check(&world, &shard);
            }
        }
        assert!(lives <= 3, "operation {nth}: {lives} lives");
        assert!(put(&world, &shard, &mut expected, "last", b"v"), "operation {nth}");
        expected.check(&world, &shard);
        let shard = world.crash(nth);
        expected.check(&world, &shard);
    }
}

#[test]
fn while_the_disk_goes_on_failing_reads_go_on_and_the_next_attempt_may_succeed() {
    let world = World::new();
    let shard = world.open();
    let mut expected = Expected::default();
    for i in 0..600 {
        put(&world, &shard, &mut expected, &format!("key{i}"), &value_of(i));
    }
    world.disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on("log/").forever());
    assert!(!put(&world, &shard, &mut expected, "key1", b"lost"));
    for _ in 0..3 {
        assert!(world.run(shard.reopen()).is_err());
        assert_eq!(world.get(&shard, "key3"), Some(value_of(3)));
    }
    world.disk.clear_faults();
    let second = reopen(&world, shard);
    expected.check(&world, &second);
    assert!(put(&world, &second, &mut expected, "key1", b"again"));
}
