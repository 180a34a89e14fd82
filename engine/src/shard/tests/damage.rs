//! Reads and compaction over blocks that cannot be read: named errors, never "absent".

use super::*;
use crate::sim::{Fault, Op, Rule};

/// A shard with `count` keys in one table, and the table's path.
fn flushed(world: &World, count: usize) -> (TestShard, std::path::PathBuf) {
    let shard = world.open();
    for i in 0..count {
        world.put(&shard, &format!("key{i}"), &value_of(i));
    }
    world.run(shard.flush()).expect("a flush");
    let files = world.disk.files();
    let table = files.iter().find(|(path, _)| path.to_string_lossy().ends_with(".sst"));
    (shard, table.expect("a table").0.clone())
}

fn try_get(world: &World, shard: &TestShard, key: &str) -> Result<Option<Record>> {
    let token = Token::of_key(key.as_bytes(), 3);
    world.run(shard.get(token, NS, key.as_bytes()))
}

#[test]
fn a_read_error_names_file_and_offset_and_is_never_absent() {
    let world = World::new();
    let (shard, _) = flushed(&world, 100);
    world.disk.inject(Rule::nth(Op::Read, 1, Fault::Eio).on(".sst").forever());
    for i in 0..100 {
        let error = try_get(&world, &shard, &format!("key{i}")).expect_err("the disk fails");
        assert!(matches!(error, Error::Io { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(".sst") && text.contains("offset"), "{text}");
    }
    assert_eq!(shard.stats().counters.failed_reads, 100);
    // What is in memory needs no disk, and a passing fault leaves no trace.
    world.put(&shard, "key1", b"new");
    assert_eq!(world.get(&shard, "key1").as_deref(), Some(&b"new"[..]));
    world.disk.clear_faults();
    for i in 2..100 {
        assert_eq!(world.get(&shard, &format!("key{i}")), Some(value_of(i)));
    }
}

#[test]
fn a_damaged_block_fails_its_own_keys_and_no_others() {
    let world = World::new();
    let (shard, table) = flushed(&world, 400);
    world.disk.flip_bit(&table, 8 * 5000);
    let (mut failed, mut found) = (0, 0);
    for i in 0..400 {
        match try_get(&world, &shard, &format!("key{i}")) {
            Ok(record) => {
                assert_eq!(record.expect("never absent").value, value_of(i));
                found += 1;
            }
            Err(Error::Corrupt { path, offset, .. }) => {
                assert_eq!(path, table);
                assert!(offset <= 5000);
                failed += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(failed > 0 && found > failed, "{failed} failed, {found} found");
    assert_eq!(shard.stats().counters.corrupt_reads, failed);
    // Compaction meets it too, leaves it alone, and goes on with the rest.
    for i in 0..3000 {
        world.put(&shard, &format!("other{i}"), &value_of(i));
    }
    world.run(shard.flush()).expect("a flush");
    let runtime = world.executor.runtime();
    world.run(runtime.sleep_until(runtime.now().after_nanos(20_000_000_000)));
    let stats = shard.stats();
    assert!((1..=6).contains(&stats.compactions_failed), "{stats:?}");
    assert!(stats.ranges_unreadable > 0, "{stats:?}");
    for i in 0..3000 {
        assert_eq!(world.get(&shard, &format!("other{i}")), Some(value_of(i)), "other{i}");
    }
    for i in 0..400 {
        match try_get(&world, &shard, &format!("key{i}")) {
            Ok(record) => assert_eq!(record.expect("never absent").value, value_of(i)),
            Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
    }
}
