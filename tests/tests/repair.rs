//! Replicas that no writes are on the way to, and what befalls them behind the store's back.

use annulus_engine::Error;
use annulus_engine::log::OnDamage;
use annulus_engine::model::{Kind, NamespaceId, Record, RecordRef, Token};
use annulus_engine::options::Durability;
use annulus_engine::runtime::Runtime as _;
use annulus_engine::shard::{Condition, Merge, Mutation, Shard};
use annulus_net::wire::fields::Level;
use annulus_tests::calls::CallMix;
use annulus_tests::cluster::{ClusterOptions, LWW, SIBLINGS, SimCluster};
use annulus_tests::network::Weather;
use annulus_tests::workload::HASH_SEED;

const SECOND: u64 = 1_000_000_000;
/// Keys of each namespace.
const KEYS: usize = 300;

fn key_of(index: usize) -> Vec<u8> {
    format!("key{index}").into_bytes()
}

fn token_of(index: usize) -> Token {
    Token::of_key(&key_of(index), HASH_SEED)
}

/// Three nodes of one shard that hold the same records, written at all of them.
fn cluster() -> SimCluster {
    let mix = CallMix {
        targets: Vec::new(),
        levels: Vec::new(),
        primary: Level::Default,
        flags: Vec::new(),
        context_one_in: 0,
        contexts_of_writes: false,
        deadline_ms: (1000, 1000),
    };
    let mut cluster = SimCluster::new(&ClusterOptions {
        seed: 11,
        nodes: 3,
        spares: 0,
        rules: annulus_cluster::moves::plan::Rules::ALL,
        shards: 1,
        replicas: 3,
        durability: Durability::Sync,
        room_bytes_max: u64::MAX,
        disk_nanos_max: 100_000,
        weather: Weather::fair(),
        clients: 0,
        operators: 0,
        mix,
        pause_max: SECOND,
    });
    (0..3).for_each(|node| cluster.start(node));
    cluster.drive(3 * SECOND);
    for index in 0..KEYS {
        let node = u32::try_from(index % 3).expect("below 3");
        let shard = cluster.shard(node, 0);
        for (namespace, merge) in [(LWW, Merge::LastWriteWins), (SIBLINGS, Merge::Siblings)] {
            let (key, value) = (key_of(index), vec![7; 100 + index]);
            let mutation = Mutation {
                token: token_of(index),
                namespace,
                merge,
                key: &key,
                value: Some((&value).into()),
                expiry_ms: 0,
                context: None,
                condition: Condition::None,
            };
            cluster.run(shard.apply_after_read(&mutation)).expect("a write");
        }
    }
    cluster.drive(10 * SECOND);
    assert_eq!(cluster.differences(), []);
    cluster
}

/// Until every pair was compared at least twice.
fn compare(cluster: &mut SimCluster) {
    for _ in 0..4 {
        (0..3).for_each(|node| cluster.start_repair(node, false));
        cluster.drive(20 * SECOND);
    }
}

fn record(cluster: &SimCluster, node: u32, namespace: NamespaceId, index: usize) -> Record {
    let shard = cluster.shard(node, 0);
    let found = cluster.run(shard.get(token_of(index), namespace, &key_of(index)));
    found.expect("a read").expect("the key")
}

fn counter_of(cluster: &SimCluster, node: u32, name: &str) -> u64 {
    let numbers = cluster.numbers(node, 0);
    let mut all = numbers.metrics.counters.each().chain(numbers.gauges.each());
    all.find(|(each, ..)| *each == name).expect("a name").2
}

fn counter(cluster: &SimCluster, name: &str) -> u64 {
    (0..3).map(|node| counter_of(cluster, node, name)).sum()
}

#[test]
fn what_was_altered_behind_the_stores_back_is_found_and_mended() {
    let mut cluster = cluster();
    let shard = cluster.shard(2, 0);
    let wall = cluster.runtime().wall();
    // One value is another, one key is gone, and nothing says so.
    let good = [record(&cluster, 2, LWW, 5), record(&cluster, 2, LWW, 6)];
    let altered = Record { value: vec![8; 9], ..good[0].clone() };
    shard.merge_again(&altered.as_ref(), wall).expect("taken");
    let gone = RecordRef { kind: Kind::Delete, value: (&[]).into(), ..good[1].as_ref() };
    shard.merge_again(&gone, wall).expect("taken");
    cluster.drive(SECOND);
    assert_eq!(record(&cluster, 2, LWW, 5).value, altered.value);
    assert!(!cluster.differences().is_empty());
    compare(&mut cluster);
    assert_eq!(cluster.differences(), []);
    for node in 0..3 {
        assert_eq!(record(&cluster, node, LWW, 5).value, good[0].value);
        assert_eq!(record(&cluster, node, LWW, 6).value, good[1].value);
    }
    assert!(counter(&cluster, "repair_faults") > 0);
    // The sound ones took nothing, not even for a while. The other may have been sent a key by both
    // of them, asked and unasked, before the first of it was visible.
    assert_eq!([0, 1].map(|node| counter_of(&cluster, node, "repaired_records")), [0, 0]);
    assert!((2..=8).contains(&counter_of(&cluster, 2, "repaired_records")));
}

#[test]
fn a_damaged_block_is_never_absent_and_is_filled_again() {
    let mut cluster = cluster();
    let shard = cluster.shard(1, 0);
    cluster.run(shard.flush()).expect("a flush");
    let disk = cluster.disk(1, 0).clone();
    let mut tables = disk.files();
    tables.retain(|(path, _)| path.to_string_lossy().ends_with(".sst"));
    tables.sort_by_key(|(_, size)| *size);
    let (table, size) = tables.last().expect("a table");
    disk.flip_bit(table, size / 3 * 8);
    let mut unreadable = 0;
    for index in 0..KEYS {
        for namespace in [LWW, SIBLINGS] {
            match cluster.run(shard.get(token_of(index), namespace, &key_of(index))) {
                Ok(found) => assert!(found.is_some(), "{index} is absent"),
                Err(Error::Corrupt { .. }) => unreadable += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(unreadable > 0 && unreadable < 2 * KEYS, "{unreadable}");
    assert!(counter(&cluster, "partitions_damaged") > 0);
    cluster.drive(10 * SECOND);
    assert_eq!(shard.unknown_ranges(), []);
    assert_eq!(cluster.differences(), []);
    for index in 0..KEYS {
        record(&cluster, 1, LWW, index);
        record(&cluster, 1, SIBLINGS, index);
    }
    assert!(counter(&cluster, "ranges_refilled") > 0);
    // One that was missed before, and was being fetched, comes by that way.
    let refilled = counter(&cluster, "refilled_records");
    let synced = counter(&cluster, "synced_records");
    assert!(refilled > 0 && refilled + synced >= unreadable as u64, "{refilled}, {synced}");
    compare(&mut cluster);
    assert_eq!(counter(&cluster, "repair_faults"), 0);
}

#[test]
fn what_was_given_up_of_a_members_log_comes_back_from_the_others() {
    let mut cluster = cluster();
    let shard = cluster.shard(1, 0);
    let (identity, options) = (*shard.identity(), *shard.options());
    let dir = shard.dir().to_owned();
    drop(shard);
    cluster.kill(1);
    let disk = cluster.disk(1, 0).clone();
    // Some segments are not in use; what lies in tables already is not missed.
    for (path, _) in disk.files() {
        if path.to_string_lossy().ends_with(".log") {
            disk.overwrite(&path, 8_192, &[0xA5; 4_000]);
        }
    }
    let open = |on_damage| {
        let (disk, runtime) = (disk.clone(), cluster.runtime());
        cluster.run(Shard::open_with(disk, runtime, &dir, &identity, options, None, on_damage))
    };
    let error = open(OnDamage::Refuse).expect_err("damaged").to_string();
    assert!(error.contains("--accept-loss"), "{error}");
    let shard = open(OnDamage::Accept).expect("accepted");
    assert!(shard.stats().counters.log_records_lost > 10);
    assert!(!shard.unknown_ranges().is_empty());
    cluster.run(shard.close()).expect("closed");
    drop(shard);
    cluster.start(1);
    cluster.drive(30 * SECOND);
    assert_eq!(cluster.shard(1, 0).unknown_ranges(), []);
    assert_eq!(cluster.differences(), []);
    for index in 0..KEYS {
        record(&cluster, 1, LWW, index);
        record(&cluster, 1, SIBLINGS, index);
    }
    assert!(counter(&cluster, "refilled_records") > 10);
    compare(&mut cluster);
    assert_eq!(counter(&cluster, "repair_faults"), 0);
}

#[test]
fn a_round_over_equal_replicas_reads_nothing() {
    let mut cluster = cluster();
    compare(&mut cluster);
    assert_eq!(counter(&cluster, "repair_dirty_leaves"), 0);
    let read = counter(&cluster, "repair_read_bytes");
    let (rounds, bytes) = (counter(&cluster, "repair_rounds"), counter(&cluster, "repair_bytes"));
    assert!(read > 0);
    (0..3).for_each(|node| cluster.start_repair(node, false));
    cluster.drive(10 * SECOND);
    assert_eq!(counter(&cluster, "repair_read_bytes"), read);
    let rounds = counter(&cluster, "repair_rounds") - rounds;
    assert!(rounds >= 8 * 6, "{rounds}");
    // Question and answer, each counted where it is sent and where it comes in.
    assert!((counter(&cluster, "repair_bytes") - bytes) / rounds <= 4 * 80);
    assert_eq!(counter(&cluster, "repair_faults"), 0);
    assert_eq!(counter(&cluster, "repair_checked"), 8 * 6);
    // On demand everything is read, and is what the trees say.
    (0..3).for_each(|node| cluster.start_repair(node, true));
    cluster.drive(10 * SECOND);
    assert!(counter(&cluster, "repair_read_bytes") > read);
    assert_eq!(counter(&cluster, "scrub_mismatches"), 0);
}
