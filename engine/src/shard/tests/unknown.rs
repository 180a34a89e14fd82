//! Ranges whose records are missing: answered with an error until they were merged in again.

use std::path::PathBuf;

use super::*;
use crate::sim::Chance;

fn token_of(key: &str) -> Token {
    Token::of_key(key.as_bytes(), 3)
}

fn try_get(world: &World, shard: &TestShard, key: &str) -> Result<Option<Record>> {
    world.run(shard.get(token_of(key), NS, key.as_bytes()))
}

fn name(i: usize) -> String {
    format!("key{i}")
}

fn tables(world: &World) -> Vec<PathBuf> {
    let is_table = |path: &PathBuf| path.to_string_lossy().ends_with(".sst");
    world.disk.files().into_iter().map(|(path, _)| path).filter(is_table).collect()
}

/// A world whose memory holds 400 keys.
fn roomy() -> World {
    let mut world = World::new();
    world.options.memtable_size = 256 << 10;
    world
}

/// A shard with 400 keys in one table, what it holds, and the table.
fn flushed(world: &World) -> (TestShard, Vec<Record>, PathBuf) {
    let shard = world.open();
    for i in 0..400 {
        world.put(&shard, &name(i), &value_of(i));
    }
    // From memory, so that no block is in the cache.
    let read = |i| try_get(world, &shard, &name(i)).expect("reads").expect("is there");
    let records = (0..400).map(read).collect();
    world.run(shard.flush()).expect("a flush");
    let tables = tables(world);
    assert_eq!(tables.len(), 1);
    (shard, records, tables[0].clone())
}

/// Which keys cannot be read; the others are right.
fn missing(world: &World, shard: &TestShard) -> Vec<usize> {
    let mut missing = Vec::new();
    for i in 0..400 {
        match try_get(world, shard, &name(i)) {
            Ok(record) => assert_eq!(record.expect("never absent").value, value_of(i)),
            Err(Error::Corrupt { .. }) => missing.push(i),
            Err(error) => panic!("{error}"),
        }
    }
    missing
}

fn try_scan(world: &World, shard: &TestShard) -> (usize, Result<()>) {
    let mut seen = 0;
    let request = ScanRequest { range: TokenRange::FULL, after: None, namespace: Some(NS) };
    let result = world.run(shard.scan(&request, &mut |_| {
        seen += 1;
        true
    }));
    (seen, result.map(drop))
}

fn refill(world: &World, shard: &TestShard, records: &[Record]) {
    let wall = world.executor.runtime().wall();
    for record in records {
        let is_unknown = shard.is_unknown(record.token);
        let merged = shard.merge_in(&record.as_ref(), wall).expect("taken");
        assert_eq!(merged == MergedIn::Duplicate, !is_unknown);
    }
}

fn clear(world: &World, shard: &TestShard) {
    for range in shard.unknown_ranges() {
        world.run(shard.clear_unknown(range)).expect("cleared");
    }
    assert!(shard.unknown_ranges().is_empty());
}

fn settle(world: &World) {
    let runtime = world.executor.runtime();
    world.run(runtime.sleep_until(runtime.now().after_nanos(20_000_000_000)));
}

#[test]
fn a_damaged_block_is_unknown_until_its_records_were_merged_in_again() {
    let mut world = roomy();
    let (shard, records, table) = flushed(&world);
    world.disk.flip_bit(&table, 8 * 9000);
    assert!(shard.unknown_ranges().is_empty(), "nobody has looked");
    let lost = missing(&world, &shard);
    assert!(!lost.is_empty() && lost.len() < 200, "{lost:?}");
    let ranges = shard.unknown_ranges();
    assert_eq!(ranges.len(), 1);
    for i in 0..400 {
        assert!(ranges[0].contains(token_of(&name(i))) || !lost.contains(&i));
    }
    let (seen, result) = try_scan(&world, &shard);
    assert!(seen < 400 && matches!(result, Err(Error::Corrupt { .. })), "{seen} {result:?}");
    // A part that was filled again is not enough.
    let middle = Token(ranges[0].first.0 / 2 + ranges[0].last.0 / 2);
    let half = TokenRange { first: Token::MIN, last: middle };
    world.run(shard.clear_unknown(half)).expect("cleared");
    let left = TokenRange { first: Token(middle.0 + 1), last: ranges[0].last };
    assert_eq!(shard.unknown_ranges(), [left]);
    refill(&world, &shard, &records);
    // The half that was declared whole without being so, by the test.
    let wall = world.executor.runtime().wall();
    for record in records.iter().filter(|record| half.contains(record.token)) {
        shard.merge_again(&record.as_ref(), wall).expect("taken");
    }
    clear(&world, &shard);
    assert_eq!(missing(&world, &shard), [0usize; 0]);
    assert_eq!(try_scan(&world, &shard).0, 400);
    // It outlives a crash, a flush, and the table.
    let shard = world.crash(2);
    world.run(shard.flush()).expect("a flush");
    assert_eq!(missing(&world, &shard), [0usize; 0]);
    assert!(shard.unknown_ranges().is_empty());
    settle(&world);
    let stats = shard.stats();
    assert_eq!((stats.compactions_failed, stats.ranges_unreadable), (0, 0), "{stats:?}");
    assert!(stats.compactions > 0 && !tables(&world).contains(&table), "{stats:?}");
    assert_eq!(missing(&world, &shard), [0usize; 0]);
    assert_eq!(world.scan(&shard, 30).len(), 400);
}

#[test]
fn a_block_that_compaction_meets_is_unknown_and_compaction_goes_on_when_it_was_filled() {
    let world = roomy();
    let (shard, records, table) = flushed(&world);
    world.disk.flip_bit(&table, 8 * 9000);
    settle(&world);
    assert!(shard.stats().compactions_failed > 0);
    assert_eq!(shard.unknown_ranges().len(), 1);
    refill(&world, &shard, &records);
    clear(&world, &shard);
    settle(&world);
    assert_eq!(missing(&world, &shard), [0usize; 0]);
    assert!(!tables(&world).contains(&table));
}

/// A closed store whose only table lacks its footer.
fn without_footer(world: &World) -> (Vec<Record>, PathBuf) {
    let (shard, records, table) = flushed(world);
    world.put(&shard, "key7", &value_of(7));
    world.run(shard.close()).expect("closes");
    let bytes = world.disk.read_file(&table).expect("is there");
    world.disk.write_file(&table, &bytes[..bytes.len() - 512]);
    (records, table)
}

#[test]
fn a_table_that_cannot_be_opened_is_put_aside_and_its_keys_are_unknown() {
    let mut world = roomy();
    let (records, table) = without_footer(&world);
    let mut shard = world.open();
    let aside = PathBuf::from(format!("{}.damaged", table.display()));
    for round in 0..3 {
        let lost = missing(&world, &shard);
        assert_eq!(lost.len(), 399, "key7 is newer");
        let error = try_get(&world, &shard, "key5").expect_err("lost");
        assert!(error.to_string().contains(".sst.damaged"), "{error}");
        assert!(matches!(try_scan(&world, &shard), (0, Err(Error::Corrupt { .. }))));
        assert!(world.disk.read_file(&aside).is_some() && world.disk.read_file(&table).is_none());
        shard = world.crash(round);
    }
    // Newer writes are read; so is what the table never held.
    world.put(&shard, "key5", b"new");
    assert_eq!(world.get(&shard, "key5").as_deref(), Some(&b"new"[..]));
    refill(&world, &shard, &records);
    clear(&world, &shard);
    assert_eq!(world.get(&shard, "key5").as_deref(), Some(&b"new"[..]));
    world.put(&shard, "key5", &value_of(5));
    for _ in 0..2 {
        assert_eq!(missing(&world, &shard), [0usize; 0]);
        assert_eq!(try_get(&world, &shard, "no such key").expect("reads"), None);
        shard = world.crash(9);
    }
    assert!(world.disk.read_file(&aside).is_some(), "it is kept");
}

#[test]
fn a_crash_while_a_table_is_put_aside_neither_loses_it_nor_believes_in_absence() {
    let world = roomy();
    let (_, table) = without_footer(&world);
    let aside = PathBuf::from(format!("{}.damaged", table.display()));
    let images = Rc::new(Cell::new(0));
    let (counted, options, mut chance) = (Rc::clone(&images), world.options, Chance::new(4));
    world.disk.observe(move |disk| {
        for _ in 0..4 {
            let executor = SimExecutor::new(chance.next_u64());
            let disk = disk.image_onto(&executor.runtime(), chance.next_u64());
            let image = World { executor, disk, options };
            let shard = image.open();
            assert_eq!(missing(&image, &shard).len(), 399);
            assert!(image.disk.read_file(&aside).is_some());
            counted.set(counted.get() + 1);
        }
    });
    let shard = world.open();
    world.disk.observe(|_| {});
    assert!(images.get() > 8, "{}", images.get());
    assert_eq!(missing(&world, &shard).len(), 399);
}

#[test]
fn the_removal_of_the_logs_end_is_noticed() {
    for flushes in [false, true] {
        let mut world = roomy();
        world.options.log.segment_size = 1 << 20;
        let shard = world.open();
        for i in 0..100 {
            world.put(&shard, &name(i), &value_of(i));
        }
        if flushes {
            world.run(shard.flush()).expect("a flush");
        }
        world.run(shard.close()).expect("closes");
        let files = world.disk.files().into_iter().map(|(path, _)| path);
        let logs: Vec<_> = files.filter(|path| path.to_string_lossy().ends_with(".log")).collect();
        assert_eq!(logs.len(), 2, "the one in use, and the next: {logs:?}");
        let try_open = |disk: &SimDisk| {
            let executor = SimExecutor::new(1);
            let disk = disk.image_onto(&executor.runtime(), 1);
            let identity = &world.identity();
            let runtime = executor.runtime();
            executor.run(Shard::open(disk, runtime, Path::new(DIR), identity, world.options, None))
        };
        assert!(try_open(&world.disk).is_ok());
        world.disk.remove_file(&logs[0]);
        for _ in 0..2 {
            let error = try_open(&world.disk).expect_err("its end is missing");
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains("log"), "{error}");
            world.disk.remove_file(&logs[1]);
        }
    }
}
