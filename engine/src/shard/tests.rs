//! The shard on the simulated disk, one story a test. Random operations and crash sweeps are in
//! the `tests` crate.

use std::path::Path;

use super::*;
use crate::identity::Identity;
use crate::model::{NamespaceId, OriginId, Record, Token, TokenRange, Value, WallMicros};
use crate::sim::{SimDisk, SimDiskOptions, SimExecutor, SimRuntime};

mod closing;
mod damage;
mod full;
mod loss;
mod poison;
mod replicas;
mod scrub;
mod tail;
mod unknown;

const DIR: &str = "data/shard-000";
const NS: NamespaceId = NamespaceId(0);

/// A small world: one disk, and verbs.
struct World {
    executor: SimExecutor,
    disk: SimDisk,
    options: Options,
}

type TestShard = Shard<SimDisk, SimRuntime>;

impl World {
    fn new() -> World {
        let executor = SimExecutor::new(11);
        let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
        let mut options = Options {
            memtable_size: 64 << 10,
            cache_size: 256 << 10,
            partition_bits: 6,
            ..Options::default()
        };
        options.log.segment_size = 256 << 10;
        options.compaction.table_size = 256 << 10;
        options.space = crate::options::SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 };
        // The server does this for its data directory.
        executor.run(async {
            disk.create_dir(Path::new("data")).await.expect("a new disk");
            disk.sync_dir(Path::new("")).await.expect("a new disk");
        });
        World { executor, disk, options }
    }

    fn identity(&self) -> Identity {
        Identity {
            cluster: 7,
            node: OriginId(1),
            shard: 0,
            shard_count: 1,
            hash_seed: 3,
            partition_bits: self.options.partition_bits,
            // So early that sequences of replicas begin at 1.
            created: WallMicros(0),
        }
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.executor.run(future)
    }

    fn open(&self) -> TestShard {
        let runtime = self.executor.runtime();
        let identity = &self.identity();
        let opening =
            Shard::open(self.disk.clone(), runtime, Path::new(DIR), identity, self.options, None);
        self.run(opening).expect("the shard opens")
    }

    /// Pulls the plug and starts again.
    fn crash(&mut self, seed: u64) -> TestShard {
        self.executor.kill_tasks();
        self.disk = self.disk.crash(seed);
        self.open()
    }

    fn put(&self, shard: &TestShard, key: &str, value: &[u8]) {
        self.write(shard, key, Some(value), 0);
    }

    fn write(&self, shard: &TestShard, key: &str, value: Option<&[u8]>, expiry_ms: u64) {
        let mutation = mutation(key, value, expiry_ms);
        let wall = self.executor.runtime().wall();
        let applied = loop {
            match shard.apply(&mutation, wall) {
                Ok(applied) => break applied,
                Err(Error::Busy { .. }) => self.run(self.executor.runtime().yield_now()),
                Err(error) => panic!("{error}"),
            }
        };
        self.run(shard.wait_visible(applied.lsn)).expect("the write is durable");
    }

    fn get(&self, shard: &TestShard, key: &str) -> Option<Vec<u8>> {
        let token = Token::of_key(key.as_bytes(), 3);
        let found: Option<Record> =
            self.run(shard.get(token, NS, key.as_bytes())).expect("the read works");
        let wall = self.executor.runtime().wall();
        found.filter(|record| record.as_ref().is_live(wall)).map(|record| record.value)
    }

    fn scan(&self, shard: &TestShard, page: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut all = Vec::new();
        let mut range = TokenRange::FULL;
        let mut after = Vec::new();
        loop {
            let mut seen = 0;
            let behind = (!after.is_empty()).then_some((NS, after.as_slice()));
            let request = ScanRequest { range, after: behind, namespace: Some(NS) };
            let next = self.run(shard.scan(&request, &mut |record| {
                all.push((record.key.to_vec(), record.value.to_vec()));
                seen += 1;
                seen < page
            }));
            let Some((token, key)) = next.expect("the scan works") else { return all };
            range.first = token;
            after = key;
        }
    }
}

fn mutation<'a>(key: &'a str, value: Option<&'a [u8]>, expiry_ms: u64) -> Mutation<'a> {
    Mutation {
        token: Token::of_key(key.as_bytes(), 3),
        namespace: NS,
        merge: Merge::LastWriteWins,
        key: key.as_bytes(),
        value: value.map(Value::from),
        expiry_ms,
        context: None,
        condition: Condition::None,
    }
}

fn value_of(i: usize) -> Vec<u8> {
    format!("{i}").repeat(1 + i % 90).into_bytes()
}

#[test]
fn what_was_written_is_read_before_and_after_a_crash() {
    let mut world = World::new();
    let shard = world.open();
    world.put(&shard, "a", b"1");
    world.put(&shard, "b", b"2");
    world.put(&shard, "a", b"3");
    world.write(&shard, "b", None, 0);
    assert_eq!(world.get(&shard, "a").as_deref(), Some(&b"3"[..]));
    let shard = world.crash(1);
    assert_eq!(world.get(&shard, "a").as_deref(), Some(&b"3"[..]));
    assert_eq!(world.get(&shard, "b"), None);
}

#[test]
fn thousands_of_keys_go_through_flush_and_compaction_and_come_back() {
    let mut world = World::new();
    let shard = world.open();
    for round in 0..3 {
        for i in 0..3000 {
            world.put(&shard, &format!("key{i}"), &value_of(i + round));
        }
    }
    let check = |world: &World, shard: &TestShard| {
        for i in (0..3000).step_by(7) {
            let expected = Some(value_of(i + 2));
            assert_eq!(world.get(shard, &format!("key{i}")), expected, "key{i}");
        }
        assert_eq!(world.get(shard, "no such key"), None);
    };
    check(&world, &shard);
    assert!(shard.stats().counters.flushes > 3, "{:?}", shard.stats());
    let shard = world.crash(5);
    check(&world, &shard);
    world.run(shard.flush()).expect("a flush");
    check(&world, &shard);
    for page in [1000, 7] {
        let all = world.scan(&shard, page);
        assert_eq!(all.len(), 3000);
        let tokens: Vec<_> = all.iter().map(|(key, _)| Token::of_key(key, 3)).collect();
        assert!(tokens.is_sorted());
    }
    world.run(shard.close()).expect("closes");
    let shard = world.open();
    check(&world, &shard);
}

#[test]
fn an_expired_key_is_gone_and_its_space_comes_back() {
    let world = World::new();
    let shard = world.open();
    let now_ms = world.executor.runtime().wall().as_millis();
    for i in 0..2000 {
        world.write(&shard, &format!("key{i}"), Some(&[7; 100]), now_ms + 60_000);
    }
    assert!(world.get(&shard, "key5").is_some());
    world.run(shard.flush()).expect("a flush");
    let runtime = world.executor.runtime();
    let later = runtime.now().after_nanos(120_000_000_000);
    world.run(runtime.sleep_until(later));
    assert_eq!(world.get(&shard, "key5"), None);
    for i in 0..3000 {
        world.put(&shard, &format!("other{i}"), &[1; 60]);
    }
    world.run(shard.flush()).expect("a flush");
    let until = world.executor.runtime().now().after_nanos(30_000_000_000);
    world.run(world.executor.runtime().sleep_until(until));
    assert!(shard.stats().table_records < 3500, "{:?}", shard.stats());
}

#[test]
fn conditions_hold_under_concurrent_writers() {
    let world = World::new();
    let shard = world.open();
    let race = |value: &'static [u8]| {
        let shard = shard.clone();
        async move {
            let mutation =
                Mutation { condition: Condition::Absent, ..mutation("k", Some(value), 0) };
            shard.apply_after_read(&mutation).await.expect("no error")
        }
    };
    let outcomes = world.run(futures_util::future::join3(race(b"1"), race(b"2"), race(b"3")));
    let won = [&outcomes.0, &outcomes.1, &outcomes.2]
        .iter()
        .filter(|outcome| matches!(outcome, Outcome::Applied(_)))
        .count();
    assert_eq!(won, 1, "{outcomes:?}");
}

#[test]
fn siblings_are_kept_until_a_context_covers_them() {
    let world = World::new();
    let shard = world.open();
    let put = |value: &'static [u8], context: Option<crate::model::Context>| {
        let mutation = Mutation {
            merge: Merge::Siblings,
            context: context.as_ref(),
            ..mutation("k", Some(value), 0)
        };
        let outcome = world.run(shard.apply_after_read(&mutation)).expect("written");
        let Outcome::Applied(applied) = outcome else { panic!("{outcome:?}") };
        world.run(shard.wait_visible(applied.lsn)).expect("durable");
    };
    let state = || {
        let token = Token::of_key(b"k", 3);
        let record = world.run(shard.get(token, NS, b"k")).expect("reads").expect("is there");
        let state = crate::model::causality::KeyState::of_record(&record.as_ref()).unwrap();
        let values: Vec<Vec<u8>> =
            state.siblings().iter().map(|sibling| sibling.value.to_vec()).collect();
        (values, state.context())
    };
    put(b"1", None);
    put(b"2", None);
    let (values, context) = state();
    assert_eq!(values, [b"1", b"2"]);
    put(b"3", None);
    put(b"4", Some(context));
    assert_eq!(state().0, [b"3", b"4"]);
}

#[test]
fn a_snapshot_opens_as_a_shard_and_does_not_change() {
    let mut world = World::new();
    let shard = world.open();
    for i in 0..2000 {
        world.put(&shard, &format!("key{i}"), &value_of(i));
    }
    world.run(shard.snapshot(Path::new("snap/shard-000"))).expect("a snapshot");
    for i in 0..2000 {
        world.put(&shard, &format!("key{i}"), b"new");
    }
    world.run(shard.flush()).expect("a flush");
    let identity = &world.identity();
    let opening = Shard::open(
        world.disk.clone(),
        world.executor.runtime(),
        Path::new("snap/shard-000"),
        identity,
        world.options,
        None,
    );
    let old = world.run(opening).expect("the snapshot opens");
    for i in (0..2000).step_by(11) {
        assert_eq!(world.get(&old, &format!("key{i}")), Some(value_of(i)));
        assert_eq!(world.get(&shard, &format!("key{i}")).as_deref(), Some(&b"new"[..]));
    }
    world.put(&old, "key1", b"written to the snapshot");
    let shard = world.crash(3);
    assert_eq!(world.get(&shard, "key1").as_deref(), Some(&b"new"[..]));
}

#[test]
fn what_is_too_long_is_refused_with_the_limit() {
    let world = World::new();
    let shard = world.open();
    let wall = world.executor.runtime().wall();
    let long = vec![0; (1 << 20) + 1];
    let error = shard.apply(&mutation("k", Some(&long), 0), wall).unwrap_err();
    assert!(error.to_string().contains("at most 1048576 bytes"), "{error}");
    let error = shard.apply(&mutation("", Some(b"v"), 0), wall).unwrap_err();
    assert!(error.to_string().contains("1 to 4096 bytes"), "{error}");
}

#[test]
fn a_shard_settles_when_writes_have_ceased_and_not_before() {
    let world = World::new();
    let shard = world.open();
    for i in 0..500 {
        world.put(&shard, &format!("key{i}"), &[7; 200]);
    }
    world.run(shard.flush()).expect("a flush");
    let sleep = |nanos| {
        let runtime = world.executor.runtime();
        world.run(runtime.sleep_until(runtime.now().after_nanos(nanos)));
    };
    for i in 0..100 {
        world.put(&shard, &format!("other{i}"), b"now and then");
        sleep(200_000_000);
    }
    assert_eq!(shard.stats().compactions, 0, "{:?}", shard.stats());
    sleep(4_000_000_000);
    assert!(shard.stats().compactions > 0, "{:?}", shard.stats());
    assert_eq!(shard.stats().debt_bytes, 0);
}

#[test]
fn what_expires_on_an_idle_shard_gives_its_space_back() {
    let world = World::new();
    let shard = world.open();
    let now_ms = world.executor.runtime().wall().as_millis();
    for i in 0..2000 {
        world.write(&shard, &format!("key{i}"), Some(&[7; 100]), now_ms + 60_000);
    }
    world.run(shard.flush()).expect("a flush");
    let runtime = world.executor.runtime();
    world.run(runtime.sleep_until(runtime.now().after_nanos(10_000_000_000)));
    assert_eq!(shard.stats().table_records, 2000, "settled");
    world.run(runtime.sleep_until(runtime.now().after_nanos(120_000_000_000)));
    assert_eq!(shard.stats().table_records, 0, "{:?}", shard.stats());
}
