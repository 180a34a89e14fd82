//! What other replicas bring, and what a shard knows of it after a crash at any moment.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::*;
use crate::model::causality::KeyState;
use crate::model::{Context, Dot, Kind, PartitionId, SeenSet, Timestamp, VersionVector};
use crate::options::Durability;
use crate::sim::Chance;

const BITS: u32 = 6;

fn replicated() -> World {
    let mut world = World::new();
    world.options.replicated = true;
    world
}

fn dot(origin: u32, sequence: u64) -> Dot {
    Dot { origin: OriginId(origin), sequence }
}

/// A record as another node sends it.
fn foreign(key: &str, dot: Dot, stamp: u64, value: Option<&[u8]>) -> Record {
    Record {
        token: Token::of_key(key.as_bytes(), 3),
        namespace: NS,
        incarnation: 77,
        kind: if value.is_some() { Kind::Put } else { Kind::Delete },
        dot,
        timestamp: Timestamp(stamp),
        expiry_ms: 0,
        key: key.as_bytes().to_vec(),
        value: value.unwrap_or_default().to_vec(),
    }
}

fn partition_of(key: &str) -> PartitionId {
    Token::of_key(key.as_bytes(), 3).partition(BITS)
}

fn merge_in(world: &World, shard: &TestShard, record: &Record) -> MergedIn {
    let wall = world.executor.runtime().wall();
    let merged = shard.merge_in(&record.as_ref(), wall).expect("taken");
    if let MergedIn::Applied(lsn) = merged {
        world.run(shard.wait_visible(lsn)).expect("durable");
    }
    merged
}

fn merge_state(world: &World, shard: &TestShard, record: &Record) -> MergedIn {
    let merged = world.run(shard.merge_in_state(&record.as_ref())).expect("taken");
    if let MergedIn::Applied(lsn) = merged {
        world.run(shard.wait_visible(lsn)).expect("durable");
    }
    merged
}

#[test]
fn a_record_from_elsewhere_counts_once_and_the_greatest_version_is_read() {
    let mut world = replicated();
    let shard = world.open();
    let base = Timestamp::new(world.executor.runtime().wall(), 0).0;
    let newer = foreign("k", dot(2, 2), base + 20, Some(b"newer"));
    let older = foreign("k", dot(3, 1), base + 10, Some(b"older"));
    assert!(matches!(merge_in(&world, &shard, &newer), MergedIn::Applied(_)));
    assert_eq!(merge_in(&world, &shard, &newer), MergedIn::Duplicate);
    world.run(shard.flush()).expect("a flush");
    assert!(matches!(merge_in(&world, &shard, &older), MergedIn::Applied(_)));
    assert_eq!(world.get(&shard, "k").as_deref(), Some(&b"newer"[..]));
    let expected: VersionVector = [dot(3, 1)].into_iter().collect();
    shard.with_seen(partition_of("k"), |seen| {
        assert_eq!(seen.base(), expected, "(2,1) is missing");
        assert!(seen.contains(dot(2, 2)));
    });
    // Own writes are above what was observed, and are seen as well.
    world.put(&shard, "k", b"own");
    assert_eq!(world.get(&shard, "k").as_deref(), Some(&b"own"[..]));
    shard.with_seen(partition_of("k"), |seen| assert_eq!(seen.last(OriginId(1)), 1));
    let shard = world.crash(3);
    assert_eq!(world.get(&shard, "k").as_deref(), Some(&b"own"[..]));
    for known in [&newer, &older] {
        assert_eq!(merge_in(&world, &shard, known), MergedIn::Duplicate);
    }
    let wall = world.executor.runtime().wall();
    let far = foreign("k", dot(2, 9), base + (60_000_000 << 12), Some(b"far"));
    let error = shard.merge_in(&far.as_ref(), wall).expect_err("a minute ahead");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[test]
fn a_refused_write_leaves_no_gap_and_a_clean_restart_none_either() {
    let world = replicated();
    let shard = world.open();
    let token = Token::of_key(b"k", 3);
    world.put(&shard, "k", b"1");
    let many: Vec<u8> = vec![0; 1 << 20];
    // Refused by the log or by memory at some point: nothing awaits.
    let wall = world.executor.runtime().wall();
    let mut refused = 0;
    for _ in 0..60 {
        refused += u32::from(shard.apply(&mutation("k", Some(&many), 0), wall).is_err());
    }
    assert!(refused > 0);
    world.run(shard.wait_visible(shard.state.log.appended())).expect("durable");
    world.put(&shard, "k", b"2");
    let issued = shard.issued(token, OriginId(1)).expect("own");
    shard.with_seen(partition_of("k"), |seen| assert_eq!(seen.of(OriginId(1)).base(), issued));
    world.run(shard.close()).expect("closes");
    let shard = world.open();
    world.put(&shard, "k", b"3");
    shard.with_seen(partition_of("k"), |seen| {
        assert_eq!(seen.of(OriginId(1)).base(), issued + 1, "{seen:?}");
    });
}

#[test]
fn what_an_unclean_end_may_have_lost_is_void_only_when_declared() {
    let mut world = replicated();
    let shard = world.open();
    world.put(&shard, "k", b"1");
    let shard = world.crash(5);
    let own = OriginId(1);
    world.put(&shard, "k", b"2");
    let (base, last) =
        shard.with_seen(partition_of("k"), |seen| (seen.of(own).base(), seen.last(own)));
    assert!(base == 1 && last > 1, "{base} {last}");
    shard.declare_own_void(partition_of("k")).expect("logged");
    world.run(shard.wait_visible(shard.state.log.appended())).expect("durable");
    shard.with_seen(partition_of("k"), |seen| assert_eq!(seen.of(own).base(), last));
    let shard = world.crash(6);
    shard.with_seen(partition_of("k"), |seen| assert_eq!(seen.of(own).base(), last));
    // Without replicas nobody else has it: void at once.
    world.options.replicated = false;
    let shard = world.crash(7);
    world.put(&shard, "k", b"3");
    shard.with_seen(partition_of("k"), |seen| {
        assert!(seen.of(own).is_contiguous(), "{seen:?}");
    });
}

fn put_sibling(world: &World, shard: &TestShard, value: &'static [u8], context: Option<&Context>) {
    let mutation = Mutation { merge: Merge::Siblings, context, ..mutation("k", Some(value), 0) };
    let outcome = world.run(shard.apply_after_read(&mutation)).expect("written");
    let Outcome::Applied(applied) = outcome else { panic!("{outcome:?}") };
    world.run(shard.wait_visible(applied.lsn)).expect("durable");
}

/// A node whose directory is gone comes back under its old id. What it wrote before is known to the
/// others alone, so it may not write under those dots again, and has a gap where they lie.
#[test]
fn a_directory_that_is_made_anew_gives_out_no_dot_of_the_lost_one() {
    let mut dots = BTreeSet::new();
    for made_at_us in [5_000_000u64, 9_000_000] {
        let world = replicated();
        let identity = Identity { created: WallMicros(made_at_us), ..world.identity() };
        let runtime = world.executor.runtime();
        let opening = Shard::open(
            world.disk.clone(),
            runtime,
            Path::new(DIR),
            &identity,
            world.options,
            None,
        );
        let shard = world.run(opening).expect("opens");
        assert!(shard.has_gap(partition_of("k")));
        let wall = world.executor.runtime().wall();
        for _ in 0..100 {
            let applied = shard.apply(&mutation("k", Some(b"v"), 0), wall).expect("taken");
            assert!(dots.insert(applied.dot), "{:?} twice", applied.dot);
        }
        // After a clean stop, partitions that nobody wrote to begin there as well.
        world.run(shard.close()).expect("closes");
        drop(shard);
        let runtime = world.executor.runtime();
        let opening = Shard::open(
            world.disk.clone(),
            runtime,
            Path::new(DIR),
            &identity,
            world.options,
            None,
        );
        let shard = world.run(opening).expect("opens");
        let other = (0..).map(|i| format!("other{i}"));
        let other = other.into_iter().find(|key| partition_of(key) != partition_of("k"));
        let other = other.expect("there are many");
        let applied = shard.apply(&mutation(&other, Some(b"v"), 0), wall).expect("taken");
        assert!(applied.dot.sequence > made_at_us, "{:?}", applied.dot);
    }
}

/// Found by seed 17261 of the cluster stories: a write leaves for other replicas before it is on
/// this disk. The first write of a life was numbered above a ceiling that was not durable yet; after
/// a crash at that moment its dot was given out again, for another value, which replicas that had
/// seen the first took for replaced: an acknowledged sibling was lost. In `periodic` mode the moment
/// was a whole window. And a clean stop of the next life, before the others had told what they had
/// of the lost writes, made the one after it go on as if nothing had been lost (seed 3994).
#[test]
fn a_dot_is_given_out_once_although_the_disk_forgets_the_write() {
    for periodic in [false, true] {
        let mut world = replicated();
        if periodic {
            world.options.log.durability = Durability::Periodic { window_ms: 1_000 };
        }
        let mut given = BTreeSet::new();
        let mut shard = world.open();
        for life in 0..20u64 {
            let wall = world.executor.runtime().wall();
            for _ in 0..3 {
                let applied = shard.apply(&mutation("k", Some(b"v"), 0), wall).expect("taken");
                assert!(given.insert(applied.dot), "{:?} twice, in life {life}", applied.dot);
            }
            shard = world.crash(life);
            if life % 2 == 0 {
                world.run(shard.close()).expect("closes");
                drop(shard);
                shard = world.open();
            }
        }
        assert_eq!(given.len(), 60);
    }
}

/// Found by seed 3693 of the cluster stories. After a crash everything up to the reserved ceiling is
/// void, and contexts say so; a clean close forgot it, and sequences went on where the log ended:
/// such a context was refused as naming writes that were never made, and would have covered, unseen,
/// the next million writes of the partition.
#[test]
fn contexts_of_a_life_after_a_crash_are_good_in_the_life_after_a_clean_close() {
    let mut world = World::new();
    let shard = world.open();
    put_sibling(&world, &shard, b"1", None);
    let shard = world.crash(5);
    let context = KeyState::of_record(&filled(&world, &shard).as_ref()).expect("a state").context();
    world.run(shard.close()).expect("closes");
    let shard = world.open();
    let issued = shard.issued(Token::of_key(b"k", 3), OriginId(1)).expect("own");
    assert!(context.vector.get(OriginId(1)) <= issued, "{context:?} {issued}");
    put_sibling(&world, &shard, b"2", None);
    put_sibling(&world, &shard, b"3", Some(&context));
    assert_eq!(values(&filled(&world, &shard)), [b"2".to_vec(), b"3".to_vec()]);
}

fn filled(world: &World, shard: &TestShard) -> Record {
    let record = world.run(shard.get(Token::of_key(b"k", 3), NS, b"k")).expect("reads");
    shard.filled(&record.expect("is there")).expect("a state")
}

fn values(record: &Record) -> Vec<Vec<u8>> {
    let state = KeyState::of_record(&record.as_ref()).expect("a state");
    let mut values: Vec<_> = state.siblings().iter().map(|it| it.value.to_vec()).collect();
    values.sort();
    values
}

fn stored_vector(world: &World, shard: &TestShard) -> VersionVector {
    let record = world.run(shard.get(Token::of_key(b"k", 3), NS, b"k")).expect("reads");
    KeyState::of_record(&record.expect("is there").as_ref()).expect("a state").vector()
}

/// Two shards of two nodes, each with a world of its own.
fn two() -> ((World, TestShard), (World, TestShard)) {
    let (one, other) = (replicated(), replicated());
    let mut identity = other.identity();
    identity.node = OriginId(2);
    let runtime = other.executor.runtime();
    let opening =
        Shard::open(other.disk.clone(), runtime, Path::new(DIR), &identity, other.options, None);
    let second = other.run(opening).expect("the shard opens");
    let first = one.open();
    ((one, first), (other, second))
}

#[test]
fn replicas_that_exchange_key_states_agree_and_store_no_vector_that_the_base_implies() {
    let ((one, a), (other, b)) = two();
    put_sibling(&one, &a, b"a1", None);
    put_sibling(&other, &b, b"b1", None);
    let (from_a, from_b) = (filled(&one, &a), filled(&other, &b));
    merge_state(&one, &a, &from_b);
    merge_state(&other, &b, &from_a);
    assert_eq!(values(&filled(&one, &a)), [b"a1", b"b1"]);
    assert_eq!(values(&filled(&other, &b)), [b"a1", b"b1"]);
    assert_eq!(merge_state(&other, &b, &from_a), MergedIn::Duplicate);
    // The write replaces both, also where the older state comes again after a flush.
    let context = KeyState::of_record(&filled(&other, &b).as_ref()).expect("a state").context();
    put_sibling(&other, &b, b"b2", Some(&context));
    let newest = filled(&other, &b);
    one.run(a.flush()).expect("a flush");
    merge_state(&one, &a, &newest);
    assert_eq!(values(&filled(&one, &a)), [b"b2"]);
    put_sibling(&one, &a, b"a2", None);
    assert_eq!(values(&filled(&one, &a)), [b"a2", b"b2"]);
    one.run(a.flush()).expect("a flush");
    one.run(a.close()).expect("closes");
    let a = one.open();
    assert_eq!(values(&filled(&one, &a)), [b"a2", b"b2"]);
    merge_state(&other, &b, &filled(&one, &a));
    for (world, shard) in [(&one, &a), (&other, &b)] {
        // Only the newest dot, which the base did not imply when it was stored.
        let vector = stored_vector(world, shard);
        assert_eq!(vector, [dot(1, 2)].into_iter().collect());
    }
}

#[test]
fn a_state_that_is_obsolete_already_leaves_its_dots_seen() {
    let ((one, a), (other, b)) = two();
    put_sibling(&one, &a, b"a1", None);
    let old = filled(&one, &a);
    merge_state(&other, &b, &old);
    let context = KeyState::of_record(&old.as_ref()).expect("a state").context();
    put_sibling(&other, &b, b"b1", Some(&context));
    // A third replica hears of the newer one first.
    let mut third = replicated();
    let shard = third.open();
    assert!(matches!(merge_state(&third, &shard, &filled(&other, &b)), MergedIn::Applied(_)));
    // (1,1) is in the vector, but nothing says that it has been merged.
    assert!(!shard.with_seen(partition_of("k"), |seen| seen.contains(dot(1, 1))));
    assert!(matches!(merge_state(&third, &shard, &old), MergedIn::Applied(_)));
    assert!(shard.with_seen(partition_of("k"), |seen| seen.contains(dot(1, 1))));
    let shard = third.crash(8);
    assert!(shard.with_seen(partition_of("k"), |seen| seen.contains(dot(1, 1))));
    assert_eq!(values(&filled(&third, &shard)), [b"b1"]);
}

#[test]
fn an_announced_stamp_is_below_all_later_writes_also_after_a_crash() {
    let mut world = replicated();
    let shard = world.open();
    let mut announced = Timestamp::ZERO;
    let mut shard = shard;
    for round in 0..6u64 {
        for _ in 0..5 {
            let runtime = world.executor.runtime();
            world.run(runtime.sleep_until(runtime.now().after_nanos(900_000_000)));
            let now = shard.clock_now(runtime.wall());
            assert!(now >= announced, "it does not go back");
            announced = now;
        }
        assert!(announced.wall().0 + 3_000_000 > world.executor.runtime().wall().0);
        shard = world.crash(round);
        world.executor.runtime().jump_wall(-1_000_000);
        let wall = world.executor.runtime().wall();
        let applied = shard.apply(&mutation("k", Some(b"v"), 0), wall).expect("taken");
        assert!(applied.timestamp > announced, "{applied:?} {announced:?}");
        world.run(shard.wait_visible(applied.lsn)).expect("durable");
    }
}

#[test]
fn a_tombstone_goes_only_below_the_floor_and_after_what_was_shown_with_it_is_in_tables() {
    let world = replicated();
    let shard = world.open();
    for i in 0..200 {
        world.put(&shard, &format!("key{i}"), &[7; 100]);
        world.write(&shard, &format!("key{i}"), None, 0);
    }
    let settle = || {
        world.run(shard.flush()).expect("a flush");
        let runtime = world.executor.runtime();
        world.run(runtime.sleep_until(runtime.now().after_nanos(20_000_000_000)));
        shard.stats().table_records
    };
    assert_eq!(settle(), 200, "nothing may go yet");
    let floor = Timestamp::new(world.executor.runtime().wall(), 0);
    for round in 0..3 {
        for partition in (0..1 << BITS).map(PartitionId) {
            shard.set_purge_floor(partition, floor);
        }
        // Something to flush, so that the floor counts and compaction has work.
        for i in 0..300 {
            world.put(&shard, &format!("other{round}-{i}"), &[1; 100]);
        }
        settle();
    }
    assert_eq!(shard.stats().table_records, 900, "{:?}", shard.stats());
}

#[test]
fn a_dropped_partition_is_empty_at_once_and_for_ever() {
    let mut world = replicated();
    let mut shard = world.open();
    let key = |i: usize| format!("key{i}");
    for i in 0..600 {
        world.put(&shard, &key(i), &value_of(i));
        if i == 300 {
            world.run(shard.flush()).expect("a flush");
        }
    }
    let gone = partition_of("key1");
    let own = OriginId(1);
    let lsn = shard.drop_partition(gone).expect("logged");
    world.run(shard.wait_visible(lsn)).expect("durable");
    let check = |world: &World, shard: &TestShard, new: &[&str]| {
        for i in 0..600 {
            let key = key(i);
            let expected = match new.contains(&key.as_str()) {
                true => Some(b"new".to_vec()),
                false => (partition_of(&key) != gone).then(|| value_of(i)),
            };
            assert_eq!(world.get(shard, &key), expected, "{key}");
        }
        let live = (0..600).filter(|i| partition_of(&key(*i)) != gone).count() + new.len();
        assert_eq!(world.scan(shard, 50).len(), live);
        assert_eq!(shard.incarnation(gone), 2);
        assert_eq!(shard.incarnation(PartitionId(gone.0 ^ 1)), 1);
    };
    check(&world, &shard, &[]);
    assert!(shard.with_seen(gone, SeenSet::is_empty));
    let issued = shard.issued(Token::of_key(b"key1", 3), own).expect("own");
    world.put(&shard, "key1", b"new");
    assert!(shard.with_seen(gone, |seen| seen.contains(Dot { origin: own, sequence: issued + 1 })));
    check(&world, &shard, &["key1"]);
    shard = world.crash(4);
    check(&world, &shard, &["key1"]);
    world.run(shard.flush()).expect("a flush");
    check(&world, &shard, &["key1"]);
    let runtime = world.executor.runtime();
    world.run(runtime.sleep_until(runtime.now().after_nanos(20_000_000_000)));
    world.run(shard.close()).expect("closes");
    shard = world.open();
    check(&world, &shard, &["key1"]);
    world.put(&shard, "key1", b"new");
    assert!(shard.issued(Token::of_key(b"key1", 3), own).expect("own") > issued + 1);
}

#[test]
fn dropped_partitions_give_their_space_back_on_an_idle_shard() {
    let world = replicated();
    let shard = world.open();
    let settle = |nanos| {
        world.run(shard.flush()).expect("a flush");
        let runtime = world.executor.runtime();
        world.run(runtime.sleep_until(runtime.now().after_nanos(nanos)));
    };
    for i in 0..2000 {
        world.put(&shard, &format!("key{i}"), &[7; 200]);
    }
    settle(20_000_000_000);
    assert_eq!(shard.stats().table_records, 2000);
    let of = |keep: &dyn Fn(PartitionId) -> bool| {
        (0..2000).filter(|i| keep(partition_of(&format!("key{i}")))).count() as u64
    };
    for partition in (0..1 << BITS).map(PartitionId).filter(|id| id.0 % 4 != 0) {
        shard.drop_partition(partition).expect("logged");
    }
    settle(70_000_000_000);
    assert_eq!(shard.stats().table_records, of(&|id| id.0 % 4 == 0), "{:?}", shard.stats());
    for partition in (0..1 << BITS).map(PartitionId).filter(|id| id.0 % 4 == 0) {
        shard.drop_partition(partition).expect("logged");
    }
    settle(70_000_000_000);
    assert_eq!(shard.stats().tables, 0, "{:?}", shard.stats());
}

/// What the log was told, by number.
#[derive(Clone, Debug)]
enum Told {
    Write { key: String, dot: Dot },
    Seen(PartitionId, SeenSet),
    Drop(PartitionId),
}

#[derive(Default)]
struct Book {
    told: RefCell<BTreeMap<u64, Told>>,
    /// Told and known to be durable up to here.
    promised: Cell<u64>,
}

/// What a shard must show that holds the log up to `last`.
#[derive(Default)]
struct Expected {
    keys: BTreeSet<String>,
    seen: BTreeMap<u32, SeenSet>,
    incarnations: BTreeMap<u32, u32>,
}

impl Book {
    fn up_to(&self, last: u64) -> Expected {
        let mut expected = Expected::default();
        for (_, told) in self.told.borrow().range(..=last) {
            match told {
                Told::Write { key, dot } => {
                    expected.keys.insert(key.clone());
                    let seen = expected.seen.entry(partition_of(key).0).or_default();
                    seen.see(*dot, Timestamp(1));
                }
                Told::Seen(partition, set) => {
                    expected.seen.entry(partition.0).or_default().union(set);
                }
                Told::Drop(partition) => {
                    expected.keys.retain(|key| partition_of(key) != *partition);
                    expected.seen.remove(&partition.0);
                    *expected.incarnations.entry(partition.0).or_insert(1) += 1;
                }
            }
        }
        expected
    }

    /// Whether the shard shows exactly what some end of the log at or after the promise says.
    fn check(&self, shard: &TestShard, keys: &BTreeSet<String>) {
        let last = self.told.borrow().last_key_value().map_or(0, |(lsn, _)| *lsn);
        let fits = |expected: &Expected| {
            expected.keys == *keys
                && (0..1 << BITS).all(|id| {
                    let (nothing, partition) = (SeenSet::new(), PartitionId(id));
                    let seen = expected.seen.get(&id).unwrap_or(&nothing);
                    shard.with_seen(partition, |found| found.is_same(seen))
                        && shard.incarnation(partition)
                            == expected.incarnations.get(&id).copied().unwrap_or(1)
                })
        };
        let promised = self.promised.get();
        if (promised..=last.max(promised)).any(|end| fits(&self.up_to(end))) {
            return;
        }
        let nearest = (promised..=last).find(|end| self.up_to(*end).keys == *keys);
        panic!("promised {promised}, told {last}: the keys are those of {nearest:?}, seen is not");
    }
}

fn keys_of(world: &World, shard: &TestShard) -> BTreeSet<String> {
    let all = world.scan(shard, 1000);
    all.into_iter().map(|(key, _)| String::from_utf8(key).expect("text")).collect()
}

/// Own and foreign writes, adopted sets and drops, with flushes between.
fn tell(world: &World, shard: &TestShard, book: &Book, seed: u64, steps: u64) {
    let mut chance = Chance::new(seed);
    let mut next: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    let value = vec![7; 900];
    for step in 0..steps {
        let wall = world.executor.runtime().wall();
        let key = format!("{seed}-{step}");
        let partition = partition_of(&key);
        let lsn = match chance.below(40) {
            0 => {
                let mut set = SeenSet::new();
                for _ in 0..chance.between(1, 4) {
                    set.see(dot(7, chance.between(1, 300)), Timestamp(1));
                }
                let lsn = shard.adopt_seen(partition, &set).expect("taken");
                book.told.borrow_mut().insert(lsn.0, Told::Seen(partition, set));
                lsn
            }
            1 => {
                let lsn = shard.drop_partition(partition).expect("taken");
                book.told.borrow_mut().insert(lsn.0, Told::Drop(partition));
                lsn
            }
            2 => {
                world.run(shard.flush()).expect("a flush");
                continue;
            }
            3..20 => {
                let applied = shard.apply(&mutation(&key, Some(&value), 0), wall).expect("taken");
                let told = Told::Write { key, dot: applied.dot };
                book.told.borrow_mut().insert(applied.lsn.0, told);
                applied.lsn
            }
            _ => {
                let origin = u32::try_from(chance.between(2, 4)).expect("small");
                let last = next.entry((partition.0, origin)).or_default();
                // Gaps that stay.
                *last += chance.between(1, 3) / 2 + 1;
                let dot = dot(origin, *last + (seed << 20));
                let stamp = Timestamp::new(wall, 0).0 - 1000 + step % 7;
                let record = foreign(&key, dot, stamp, Some(&value));
                let merged = shard.merge_in(&record.as_ref(), wall).expect("taken");
                let MergedIn::Applied(lsn) = merged else { panic!("{dot:?} is new") };
                book.told.borrow_mut().insert(lsn.0, Told::Write { key, dot });
                lsn
            }
        };
        if chance.one_in(3) {
            world.run(shard.state.log.wait_durable(lsn)).expect("durable");
            book.promised.set(lsn.0);
        }
    }
    world.run(shard.state.log.wait_durable(shard.state.log.appended())).expect("durable");
    book.promised.set(shard.state.log.appended().0);
}

#[test]
fn after_a_crash_at_any_change_of_the_disk_seen_is_that_of_the_records_that_survived() {
    for seed in 0..4 {
        let mut world = replicated();
        if seed % 2 == 1 {
            world.options.log.durability = Durability::Periodic { window_ms: 50 };
        }
        let shard = world.open();
        let book = Rc::new(Book::default());
        let images = Rc::new(Cell::new(0));
        let (known, counted) = (Rc::clone(&book), Rc::clone(&images));
        let mut chance = Chance::new(seed ^ 0xAB);
        let options = world.options;
        world.disk.observe(move |disk| {
            if !chance.one_in(7) {
                return;
            }
            let executor = SimExecutor::new(chance.next_u64());
            let disk = disk.image_onto(&executor.runtime(), chance.next_u64());
            let mut image = World { executor, disk, options };
            let shard = image.open();
            known.check(&shard, &keys_of(&image, &shard));
            if chance.one_in(3) {
                // Once more, and through a flush of what was replayed.
                image.run(shard.flush()).expect("a flush");
                let shard = image.crash(chance.next_u64());
                known.check(&shard, &keys_of(&image, &shard));
            }
            counted.set(counted.get() + 1);
        });
        tell(&world, &shard, &book, seed, 400);
        world.disk.observe(|_| {});
        assert!(images.get() > 50, "{}", images.get());
        assert!(shard.stats().counters.flushes > 3, "{:?}", shard.stats());
        book.check(&shard, &keys_of(&world, &shard));
        world.run(shard.close()).expect("closes");
        let shard = world.open();
        book.check(&shard, &keys_of(&world, &shard));
    }
}

#[test]
fn a_snapshot_has_seen_what_it_holds() {
    let world = replicated();
    let shard = world.open();
    let book = Book::default();
    tell(&world, &shard, &book, 9, 200);
    world.run(shard.snapshot(Path::new("snap/shard-000"))).expect("a snapshot");
    let promised = book.promised.get();
    tell(&world, &shard, &book, 10, 50);
    book.promised.set(promised);
    let identity = &world.identity();
    let (disk, runtime) = (world.disk.clone(), world.executor.runtime());
    let dir = Path::new("snap/shard-000");
    let old = world.run(Shard::open(disk, runtime, dir, identity, world.options, None));
    let old = old.expect("the snapshot opens");
    book.check(&old, &keys_of(&world, &old));
}

#[test]
fn a_partitions_bytes_are_counted_in_memory_and_in_tables_until_it_is_dropped() {
    let mut world = replicated();
    let shard = world.open();
    let base = Timestamp::new(world.executor.runtime().wall(), 0).0;
    let partition = partition_of("k");
    assert_eq!(shard.partition_bytes(partition), 0);
    let value = [7; 1000];
    merge_in(&world, &shard, &foreign("k", dot(2, 1), base + 1, Some(&value)));
    let one = shard.partition_bytes(partition);
    assert!((1001..1100).contains(&one), "{one}");
    merge_in(&world, &shard, &foreign("k", dot(2, 2), base + 2, Some(&value)));
    assert_eq!(shard.partition_bytes(partition), one, "in memory it was replaced");
    world.run(shard.flush()).expect("a flush");
    let flushed = shard.partition_bytes(partition);
    assert!((1001..1100).contains(&flushed), "{flushed}");
    merge_in(&world, &shard, &foreign("k", dot(2, 3), base + 3, Some(&value)));
    assert_eq!(shard.partition_bytes(partition), one + flushed, "once more");
    let shard = world.crash(3);
    assert_eq!(shard.partition_bytes(partition), one + flushed, "also after a start");
    let lsn = shard.drop_partition(partition).expect("taken");
    world.run(shard.wait_visible(lsn)).expect("durable");
    assert_eq!(shard.partition_bytes(partition), 0);
}
