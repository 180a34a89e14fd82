//! Copies that nodes keep for absent homes, with little room for them (T34).

use annulus_engine::options::Durability;
use annulus_net::wire::fields::{Level, OperationFlags};
use annulus_net::wire::status::Status;
use annulus_tests::calls::{CallMix, Target};
use annulus_tests::cluster::{ClusterOptions, LWW, SIBLINGS, SimCluster};
use annulus_tests::network::Weather;

const SECOND: u64 = 1_000_000_000;
/// Room of a shard: some thirty of the records.
const ROOM: u64 = 4_000;
const NODES: u32 = 5;

/// Five nodes of one shard, three copies of each record, clients that only write.
fn cluster(primary: Level) -> SimCluster {
    let target =
        |namespace| Target { namespace, keys: 60, weights: [1, 8, 1, 0, 0], ttl_one_in: 0 };
    let mut cluster = SimCluster::new(&ClusterOptions {
        seed: 34,
        nodes: NODES,
        spares: 0,
        rules: annulus_cluster::moves::plan::Rules::ALL,
        shards: 1,
        replicas: 3,
        durability: Durability::Sync,
        room_bytes_max: ROOM,
        operators: 0,
        disk_nanos_max: 100_000,
        weather: Weather::fair(),
        clients: 4,
        mix: CallMix {
            targets: vec![target(LWW), target(SIBLINGS)],
            levels: vec![Level::Quorum],
            primary,
            flags: vec![OperationFlags::SLOPPY],
            context_one_in: 0,
            contexts_of_writes: false,
            deadline_ms: (2_000, 2_000),
        },
        pause_max: SECOND / 100,
    });
    (0..NODES).for_each(|node| cluster.start(node));
    cluster.drive(3 * SECOND);
    cluster
}

fn numbers(cluster: &SimCluster, node: u32) -> (u64, u64) {
    let numbers = cluster.numbers(node, 0);
    (numbers.gauges.hint_bytes, numbers.metrics.counters.hints_refused)
}

fn up(cluster: &SimCluster) -> impl Iterator<Item = u32> + '_ {
    (0..NODES).filter(|node| cluster.is_up(*node))
}

/// Bytes kept for others, and copies refused, by all nodes together. None keeps too much.
fn kept(cluster: &SimCluster) -> (u64, u64) {
    up(cluster).fold((0, 0), |(bytes, refused), node| {
        let (own, own_refused) = numbers(cluster, node);
        assert!(own <= ROOM, "node {node} keeps {own} bytes");
        (bytes + own, refused + own_refused)
    })
}

fn answers(cluster: &SimCluster, status: Status) -> u64 {
    cluster.answers().get(&status).copied().unwrap_or(0)
}

/// Nodes come back, and hand over what they keep.
fn heal(cluster: &mut SimCluster) {
    cluster.quiet();
    (0..NODES).for_each(|node| cluster.start(node));
    cluster.drive(40 * SECOND);
    assert_eq!(cluster.differences(), []);
    assert_eq!(kept(cluster).0, 0, "nothing is kept when the homes have it");
    cluster.mark_converged();
    cluster.audit().expect("every node answers");
    assert_eq!(cluster.violations(), []);
}

#[test]
fn a_full_stand_in_costs_no_write_that_homes_can_take() {
    let mut cluster = cluster(Level::Default);
    cluster.kill(4);
    cluster.drive(2 * SECOND);
    let bad = [Status::UNAVAILABLE, Status::FULL, Status::MAY_BE_APPLIED];
    let before = bad.map(|status| answers(&cluster, status));
    let written = answers(&cluster, Status::OK);
    // Overwritten records count too, so that the limit is reached with few keys.
    for _ in 0..24 {
        cluster.drive(SECOND / 2);
        kept(&cluster);
    }
    let (bytes, _) = kept(&cluster);
    assert!(bytes > ROOM, "rooms are filled: {bytes}");
    let full = up(&cluster).filter(|node| numbers(&cluster, *node).0 > ROOM * 15 / 16).count();
    assert!(full > 0, "at least one is full");
    assert!(answers(&cluster, Status::OK) > written + 500, "clients wrote all the time");
    assert_eq!(bad.map(|status| answers(&cluster, status)), before, "nothing was refused");

    // A helper dies, with its power, and returns: what it keeps is counted again.
    let helper = up(&cluster).max_by_key(|node| numbers(&cluster, *node).0).expect("some are up");
    cluster.crash(helper);
    cluster.drive(3 * SECOND);
    cluster.start(helper);
    cluster.drive(3 * SECOND);
    let (bytes, _) = numbers(&cluster, helper);
    assert!((1..=ROOM).contains(&bytes), "{bytes} bytes after the start");
    heal(&mut cluster);
}

#[test]
fn the_only_copies_are_refused_before_they_begin_when_there_is_no_room() {
    let mut cluster = cluster(Level::None);
    // Some keys have two homes left, some one, and some none; none is needed.
    [2, 3, 4].into_iter().for_each(|node| cluster.kill(node));
    cluster.drive(12 * SECOND);
    kept(&cluster);
    let is_full = |node| numbers(&cluster, node).0 > ROOM * 15 / 16;
    assert!(up(&cluster).any(is_full), "who stands in keeps what it can");
    let refused = answers(&cluster, Status::UNAVAILABLE);
    let written = answers(&cluster, Status::OK);
    cluster.drive(5 * SECOND);
    assert!(answers(&cluster, Status::UNAVAILABLE) > refused, "no home is there, and no room");
    assert!(answers(&cluster, Status::OK) > written, "two homes need nobody");
    heal(&mut cluster);
}
