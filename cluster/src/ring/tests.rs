//! Laws of placement, and the figures that the ring is there for.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Servers 1, 2, 3, ... of these weights, all in one rack.
fn members(weights: &[u32]) -> Vec<Member> {
    (1..)
        .zip(weights)
        .map(|(id, weight)| Member {
            id: NodeId(id),
            weight: Weight(*weight),
            dc: "dc1".into(),
            rack: "rack1".into(),
        })
        .collect()
}

fn equal(count: usize) -> Vec<Member> {
    members(&vec![Weight::ONE.0; count])
}

/// Servers 1, 2, 3, ... are dealt out to the racks in turn.
fn in_racks(mut members: Vec<Member>, racks: usize) -> Vec<Member> {
    for (index, member) in members.iter_mut().enumerate() {
        member.rack = format!("rack{}", index % racks);
    }
    members
}

fn loads(ring: &Ring) -> BTreeMap<NodeId, u64> {
    let mut loads = BTreeMap::new();
    for partition in 0..ring.partition_count() {
        for node in ring.replicas(PartitionId(partition)) {
            *loads.entry(*node).or_insert(0) += 1;
        }
    }
    loads
}

/// Replicas that `after` has on servers where `before` had none of that partition.
fn moved(before: &Ring, after: &Ring) -> u64 {
    (0..before.partition_count())
        .map(PartitionId)
        .flat_map(|partition| {
            let old = before.replicas(partition);
            after.replicas(partition).iter().filter(move |node| !old.contains(node))
        })
        .count() as u64
}

#[expect(clippy::cast_precision_loss, reason = "small counts")]
fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_partition_has_distinct_servers_and_no_server_passes_its_cap(
        weights in prop::collection::vec(1u32..3000, 1..16),
        bits in 0u32..=10,
        replicas in 1usize..=5,
    ) {
        let replicas = replicas.min(weights.len());
        let ring = Ring::new(bits, replicas, &members(&weights)).unwrap();
        for partition in 0..ring.partition_count() {
            let mut nodes = ring.replicas(PartitionId(partition)).to_vec();
            nodes.sort_unstable();
            nodes.dedup();
            prop_assert_eq!(nodes.len(), replicas);
        }
        let spread =
            Spread::new(&members(&weights), ring.partition_count().into(), replicas as u64);
        let caps = spread.caps();
        for (node, load) in loads(&ring) {
            prop_assert!(load <= caps[node.0 as usize - 1]);
        }
    }

    #[test]
    fn no_server_has_more_than_three_percent_above_its_share(
        weights in prop::collection::vec(512u32..=2048, 8..20),
        replicas in 1usize..=3,
    ) {
        let ring = Ring::new(12, replicas, &members(&weights)).unwrap();
        let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        let all = u64::from(ring.partition_count()) * replicas as u64;
        for (node, load) in loads(&ring) {
            let weight = u64::from(weights[node.0 as usize - 1]);
            prop_assert!(ratio(load * total, weight * all) <= 1.03, "{node}: {load}");
        }
    }

    #[test]
    fn the_order_in_which_members_are_told_does_not_matter(
        weights in prop::collection::vec(1u32..600, 3..8),
        turn in 0usize..8,
    ) {
        let told = members(&weights);
        let mut otherwise = told.clone();
        otherwise.rotate_left(turn % told.len());
        prop_assert_eq!(Ring::new(8, 3, &told), Ring::new(8, 3, &otherwise));
    }

    #[test]
    fn the_walk_goes_on_to_every_server_once(count in 3usize..10, partition in 0u32..256) {
        let ring = Ring::new(8, 3, &equal(count)).unwrap();
        let mut order = ring.preference(PartitionId(partition));
        prop_assert_eq!(&order[..3], ring.replicas(PartitionId(partition)));
        order.sort_unstable();
        prop_assert_eq!(order, equal(count).iter().map(|member| member.id).collect::<Vec<_>>());
    }
}

#[test]
fn a_join_moves_about_the_new_servers_share() {
    let before = Ring::new(12, 3, &equal(12)).unwrap();
    let after = Ring::new(12, 3, &equal(13)).unwrap();
    let part = ratio(moved(&before, &after), 3 * 4096);
    println!("moved {part:.4}, ideal {:.4}", 1.0 / 13.0);
    assert!(part <= 1.1 / 13.0, "{part}");
}

#[test]
fn servers_of_weights_one_two_and_four_carry_one_two_and_four() {
    let weights: Vec<u32> = [1024, 2048, 4096].repeat(4);
    let loads = loads(&Ring::new(12, 3, &members(&weights)).unwrap());
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    for (node, load) in loads {
        let share = ratio(load * total, u64::from(weights[node.0 as usize - 1]) * 3 * 4096);
        println!("{node}: {share:.3}");
        assert!((0.97..=1.03).contains(&share), "{node}: {share}");
    }
}

#[test]
fn a_server_heavier_than_all_others_has_each_partition_once() {
    let ring = Ring::new(8, 3, &members(&[60_000, 1024, 1024, 1024])).unwrap();
    let loads = loads(&ring);
    assert_eq!(loads[&NodeId(1)], 256);
    for light in 2..=4 {
        assert!((165..=175).contains(&loads[&NodeId(light)]), "{loads:?}");
    }
}

#[test]
fn a_token_is_held_by_the_servers_of_its_partition() {
    let ring = Ring::new(10, 3, &equal(5)).unwrap();
    let token = Token::of_key(b"key", 7);
    assert_eq!(ring.replicas_of(token), ring.replicas(token.partition(10)));
}

#[test]
fn placement_is_the_same_for_ever() {
    // Golden: every member computes the map for itself, so another build must agree.
    let ring = Ring::new(12, 3, &equal(12)).unwrap();
    let firsts: Vec<u32> =
        (0..8).flat_map(|p| ring.replicas(PartitionId(p))).map(|n| n.0).collect();
    let golden = [5, 8, 12, 2, 11, 6, 9, 12, 3, 3, 7, 4, 2, 7, 3, 5, 1, 3, 5, 12, 8, 12, 8, 1];
    assert_eq!(firsts, golden);
}

#[test]
fn what_cannot_be_placed_is_refused() {
    let twins = [equal(1), equal(1)].concat();
    assert_eq!(Ring::new(17, 1, &equal(1)), Err(RingError::TooManyPartitions));
    assert_eq!(Ring::new(8, 0, &equal(1)), Err(RingError::NoReplicas));
    assert_eq!(Ring::new(8, 1, &twins), Err(RingError::DuplicateMember(NodeId(1))));
    assert_eq!(Ring::new(8, 3, &members(&[1, 1, 0])), Err(RingError::TooFewMembers));
    assert_eq!(Ring::new(8, 1, &members(&[65_537])), Err(RingError::TooHeavy(NodeId(1))));
}

mod racks;
