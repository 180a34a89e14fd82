//! Failure detection in whole simulated nodes: what production's pumps believe of each other.
//! The machines alone, in hundreds, are in `cluster/tests/gossip.rs`.

use std::collections::BTreeSet;

use annulus_cluster::membership::Status;
use annulus_engine::options::Durability;
use annulus_net::wire::fields::{Level, OperationFlags};
use annulus_tests::calls::{CallMix, Target};
use annulus_tests::cluster::{ClusterOptions, LWW, SimCluster};
use annulus_tests::network::Weather;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
const SHARDS: u32 = 2;

/// A cluster that serves, without clients.
fn started(seed: u64, nodes: u32) -> SimCluster {
    let target = Target { namespace: LWW, keys: 2, weights: [1; 5], ttl_one_in: 0 };
    let mut cluster = SimCluster::new(&ClusterOptions {
        seed,
        nodes,
        spares: 0,
        rules: annulus_cluster::moves::plan::Rules::ALL,
        shards: SHARDS,
        replicas: u8::try_from(nodes.min(3)).expect("at most three"),
        durability: Durability::Sync,
        disk_nanos_max: MS / 10,
        weather: Weather::fair(),
        clients: 0,
        operators: 0,
        room_bytes_max: 1 << 30,
        mix: CallMix {
            targets: vec![target],
            levels: vec![Level::Default],
            flags: vec![OperationFlags::default()],
            primary: Level::Default,
            context_one_in: 0,
            contexts_of_writes: false,
            deadline_ms: (500, 3_000),
        },
        pause_max: SECOND,
    });
    (0..nodes).for_each(|node| cluster.start(node));
    wait(&mut cluster, 30, |it| (0..nodes).all(|node| it.is_up(node)));
    cluster.drive(5 * SECOND);
    assert!(cluster.doubts().is_empty(), "{:?}", cluster.doubts());
    cluster
}

fn wait(cluster: &mut SimCluster, seconds: u64, done: impl Fn(&SimCluster) -> bool) {
    let until = cluster.now().after_nanos(seconds * SECOND);
    while !done(cluster) && cluster.now() < until {
        cluster.drive(100 * MS);
    }
    assert!(done(cluster), "not in {seconds} s: {:?}", cluster.doubts());
}

/// As what all shards of a node see a member.
fn seen(cluster: &SimCluster, at: u32, of: u32) -> BTreeSet<Status> {
    let members = (0..SHARDS).flat_map(|shard| cluster.members(at, shard));
    members.filter(|view| view.node.0 == of + 1).map(|view| view.status).collect()
}

fn is_seen(cluster: &SimCluster, at: u32, of: u32, status: Status) -> bool {
    seen(cluster, at, of) == BTreeSet::from([status])
}

#[test]
fn a_killed_node_is_down_to_every_shard_and_alive_once_it_is_back() {
    for seed in 1..=3 {
        let mut cluster = started(seed, 4);
        cluster.kill(2);
        wait(&mut cluster, 15, |it| [0, 1, 3].iter().all(|at| is_seen(it, *at, 2, Status::Down)));
        assert_eq!(cluster.doubts().len(), 3 * SHARDS as usize, "{:?}", cluster.doubts());
        cluster.start(2);
        wait(&mut cluster, 30, |it| it.is_up(2));
        wait(&mut cluster, 5, |it| it.doubts().is_empty());
        let before = cluster.members(2, 0)[2].heartbeat;
        cluster.drive(2 * SECOND);
        assert!(cluster.members(0, 1)[2].heartbeat > before, "told to the other shards too");
    }
}

#[test]
fn a_paused_node_comes_back_and_holds_nothing_against_anybody() {
    for (seed, seconds) in [(1, 2), (2, 20)] {
        let mut cluster = started(seed, 4);
        cluster.pause(1);
        cluster.drive(seconds * SECOND);
        if seconds > 10 {
            assert!([0, 2, 3].iter().all(|at| is_seen(&cluster, *at, 1, Status::Down)), "{seed}");
        }
        let before = cluster.numbers(1, 0).metrics.counters.gossip_accusations;
        cluster.resume(1);
        wait(&mut cluster, 20, |it| it.doubts().is_empty());
        assert_eq!(cluster.numbers(1, 0).metrics.counters.gossip_accusations, before);
    }
}

#[test]
fn a_node_that_hears_nobody_takes_nobody_down() {
    for seed in 1..=3 {
        let mut cluster = started(seed, 5);
        (0..4).for_each(|from| cluster.network().cut(from, 4));
        let mut suspected = 0;
        for _ in 0..60 {
            cluster.drive(SECOND);
            for (at, of) in (0..5).flat_map(|at| (0..4).map(move |of| (at, of))) {
                assert!(!seen(&cluster, at, of).contains(&Status::Down), "{seed}: {of} at {at}");
                // It may accuse others before it notices that it hears nobody; they deny it.
                let seen = seen(&cluster, at, of);
                assert!(at == 4 || !seen.contains(&Status::Unreachable), "{seed}: {of} at {at}");
                suspected += u32::from(at != 4 && seen.contains(&Status::Suspect));
            }
        }
        assert!(suspected <= 10, "{seed}: {suspected} of 960 looks");
        assert!((0..4).all(|at| is_seen(&cluster, at, 4, Status::Down)), "{seed}");
        assert!((0..4).all(|of| is_seen(&cluster, 4, of, Status::Unreachable)), "{seed}");
        let now = cluster.now();
        cluster.network().heal(now);
        wait(&mut cluster, 40, |it| it.doubts().is_empty());
    }
}

#[test]
fn the_other_of_two_nodes_is_unreachable_and_never_down() {
    let mut cluster = started(1, 2);
    cluster.kill(1);
    wait(&mut cluster, 30, |it| is_seen(it, 0, 1, Status::Unreachable));
    for _ in 0..120 {
        cluster.drive(SECOND);
        assert!(is_seen(&cluster, 0, 1, Status::Unreachable));
    }
    cluster.start(1);
    wait(&mut cluster, 30, |it| it.is_up(1));
    wait(&mut cluster, 10, |it| it.doubts().is_empty());
}
