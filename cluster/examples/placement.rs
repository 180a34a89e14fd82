//! Measures placement: how long it takes and how much memory, how even it is, and how much a join
//! moves. `bench/README.md` has the figures.
//!
//! ```text
//! cargo run --release -p annulus-cluster --example placement -- NODES PARTITION_BITS RACKS
//! ```

#![expect(clippy::disallowed_methods, reason = "it measures how long something takes")]

use std::collections::BTreeMap;
use std::time::Instant;

use annulus_cluster::ring::Ring;
use annulus_cluster::{Member, NodeId, Weight};
use annulus_engine::model::PartitionId;

const REPLICAS: usize = 3;

fn members(count: u32, racks: u32) -> Vec<Member> {
    let member = |id: u32| Member {
        id: NodeId(id),
        weight: Weight::ONE,
        dc: "dc1".into(),
        rack: format!("rack{}", id % racks),
    };
    (1..=count).map(member).collect()
}

/// Most memory that the process has held, in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|it| it.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) >> 10
}

#[expect(clippy::cast_precision_loss, reason = "counts of replicas")]
fn main() {
    let number = |at: usize, usual: u32| {
        std::env::args().nth(at).map_or(usual, |it| it.parse().expect("a number"))
    };
    let (nodes, bits, racks) = (number(1, 5000), number(2, 16), number(3, 1).max(1));
    let begin = Instant::now();
    let before = Ring::new(bits, REPLICAS, &members(nodes, racks)).expect("a placement");
    let (took, memory) = (begin.elapsed(), peak_mib());
    let after = Ring::new(bits, REPLICAS, &members(nodes + 1, racks)).expect("a placement");
    let mut loads: BTreeMap<NodeId, u32> = BTreeMap::new();
    let mut moved = 0;
    for partition in (0..before.partition_count()).map(PartitionId) {
        let old = before.replicas(partition);
        old.iter().for_each(|node| *loads.entry(*node).or_default() += 1);
        moved += after.replicas(partition).iter().filter(|node| !old.contains(node)).count();
    }
    let all = f64::from(before.partition_count()) * REPLICAS as f64;
    let most = loads.values().max().copied().unwrap_or(0);
    println!(
        "{nodes} nodes, {racks} racks, {} partitions: {took:.2?}, {memory} MiB at most, fullest \
         {:.3} of the mean, a join moves {:.2} of the new node's share",
        before.partition_count(),
        f64::from(most) * f64::from(nodes) / all,
        moved as f64 * f64::from(nodes + 1) / all,
    );
}
