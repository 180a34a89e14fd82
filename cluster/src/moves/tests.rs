//! The map of members by itself: joins, leaves and replacements, step by step, with nodes that are well,
//! silent or not ready.

use std::collections::BTreeMap;

use annulus_net::wire::codec::Reader;

use super::plan::{Rules, Standing, next};
use super::*;
use crate::topology::Topology;

const CLUSTER: u128 = 7;
const BITS: u32 = 4;

fn info(id: u32) -> NodeInfo {
    NodeInfo {
        id: NodeId(id),
        peer: format!("node-{id}:1"),
        client: String::new(),
        dc: "dc".into(),
        rack: "rack".into(),
        weight: Weight::ONE,
    }
}

fn founded(count: u32) -> ClusterMap {
    ClusterMap::found(CLUSTER, 5, BITS, (1..=count).map(info).collect())
}

fn topology(map: &ClusterMap, own: u32) -> Topology {
    Topology::of_map(NodeId(own), map, [3]).unwrap()
}

fn all() -> impl Iterator<Item = PartitionId> {
    (0..1 << BITS).map(PartitionId)
}

/// What all nodes say that are well, ready with everything.
fn well(map: &ClusterMap, silent: &[u32]) -> BTreeMap<NodeId, Standing> {
    let said = Standing { confirmed: map.generation, ready: all().collect(), is_empty: true };
    let members = map.members.iter().map(|member| member.info.id);
    members.filter(|id| !silent.contains(&id.0)).map(|id| (id, said.clone())).collect()
}

/// Steps until nothing is left to do; each is looked at.
fn settle(map: &mut ClusterMap, silent: &[u32], mut look: impl FnMut(&ClusterMap, &ClusterMap)) {
    for _ in 0..200 {
        let standings = well(map, silent);
        let Some(after) = next(map, CLUSTER, &topology(map, 1), &standings, Rules::ALL) else {
            return;
        };
        assert_eq!(read_back(&after), after);
        look(map, &after);
        *map = after;
    }
    panic!("it goes on for ever");
}

fn read_back(map: &ClusterMap) -> ClusterMap {
    let mut bytes = Vec::new();
    map.encode(&mut bytes);
    let mut reader = Reader::new(&bytes);
    let read = ClusterMap::decode(&mut reader).unwrap();
    assert_eq!(reader.remaining(), 0);
    for cut in 0..bytes.len() {
        assert!(ClusterMap::decode(&mut Reader::new(&bytes[..cut])).is_err());
    }
    read
}

#[test]
fn a_join_moves_a_few_partitions_at_a_time_stage_by_stage_and_is_over() {
    let mut map = founded(3);
    assert!(map.is_settled());
    let id = map.join(info(9)).unwrap();
    assert_eq!((id, map.join(NodeInfo { id: NodeId(0), ..info(9) })), (NodeId(4), Ok(NodeId(4))));
    let mut stages = [0; 4];
    settle(&mut map, &[], |before, after| {
        assert_eq!(after.generation, before.generation + 1);
        let moving = after.places.iter().filter(|place| place.stage != Stage::Settled).count();
        assert!(moving <= 4, "{moving}");
        let many = before.layouts.len() == after.layouts.len();
        for (one, other) in before.places.iter().zip(&after.places).filter(|_| many) {
            let step = (one.stage as u8, other.stage as u8);
            assert!(step.0 == step.1 || (step.0 + 1) % 4 == step.1, "{step:?}");
            stages[usize::from(step.1)] += 1;
        }
    });
    assert!(stages.iter().all(|count| *count > 0));
    assert!(map.is_settled() && map.members.iter().all(|it| it.state == MemberState::Up));
    let share = all().filter(|it| topology(&map, 1).holders(*it).contains(&NodeId(4))).count();
    assert!((10..=14).contains(&share), "{share}");
}

#[test]
fn who_leaves_is_drained_first_and_its_id_is_never_given_again() {
    let mut map = founded(4);
    map.leave(NodeId(2), 3).unwrap();
    let mut last = Vec::new();
    settle(&mut map, &[], |before, after| {
        if after.member(NodeId(2)).is_none() && before.member(NodeId(2)).is_some() {
            assert!(all().all(|it| !topology(before, 1).holders(it).contains(&NodeId(2))));
            assert!(!before.holders.contains(&NodeId(2)) && !before.former.contains(&NodeId(2)));
            assert_eq!(after.removed_at, after.generation);
        }
        last.clone_from(&after.holders);
    });
    assert!(map.is_settled() && map.is_removed(NodeId(2)) && !map.is_removed(NodeId(5)));
    assert_eq!(last, [NodeId(1), NodeId(3), NodeId(4)]);
    assert_eq!(map.join(NodeInfo { id: NodeId(0), ..info(2) }), Ok(NodeId(5)));
}

#[test]
fn who_still_keeps_something_for_others_does_not_go() {
    let mut map = founded(4);
    map.leave(NodeId(2), 3).unwrap();
    for _ in 0..200 {
        let mut standings = well(&map, &[]);
        standings.get_mut(&NodeId(2)).unwrap().is_empty = false;
        match next(&map, CLUSTER, &topology(&map, 1), &standings, Rules::ALL) {
            Some(after) => map = after,
            None => break,
        }
    }
    assert!(map.member(NodeId(2)).is_some() && map.partitions_left() == 0);
}

#[test]
fn a_silent_old_home_holds_a_move_up_until_it_is_replaced() {
    let mut map = founded(5);
    map.join(info(9)).unwrap();
    settle(&mut map, &[3], |_, _| {});
    assert!(!map.is_settled() && map.partitions_left() > 0);
    let trusting = Rules { old_homes_confirm: false, ..Rules::ALL };
    let at =
        |map: &ClusterMap, rules| next(map, CLUSTER, &topology(map, 1), &well(map, &[3]), rules);
    assert!(at(&map, Rules::ALL).is_none() && at(&map, trusting).is_some(), "the rule does it");
    map.replace(NodeId(3), 3).unwrap();
    settle(&mut map, &[3], |_, _| {});
    assert!(map.is_settled() && map.is_removed(NodeId(3)));
    let homes = |it| topology(&map, 1).holders(it);
    assert!(all().all(|it| homes(it).len() == 3 && !homes(it).contains(&NodeId(3))));
}

#[test]
fn a_new_owner_that_is_not_ready_or_gone_is_waited_for_or_given_up() {
    let mut map = founded(3);
    map.join(info(9)).unwrap();
    let step = |map: &ClusterMap, standings: &BTreeMap<NodeId, Standing>| {
        next(map, CLUSTER, &topology(map, 1), standings, Rules::ALL)
    };
    while !map.places.iter().any(|place| place.stage == Stage::Both) {
        map = step(&map, &well(&map, &[])).unwrap();
    }
    let mut standings = well(&map, &[]);
    standings.get_mut(&NodeId(4)).unwrap().ready.clear();
    let both = |map: &ClusterMap| map.places.iter().filter(|it| it.stage == Stage::Both).count();
    let after = step(&map, &standings).unwrap_or_else(|| map.clone());
    assert_eq!(both(&after), both(&map), "it is not ready");
    let after = step(&map, &well(&map, &[4])).unwrap();
    assert_eq!(both(&after), 0, "it is gone");
    assert!(after.places.iter().all(|place| place.stage == Stage::Settled));
}

#[test]
fn what_cannot_be_is_refused() {
    let mut map = founded(3);
    let before = map.clone();
    let taken = Refused::AddressTaken { address: "node-2:1".into(), node: NodeId(2) };
    assert_eq!(map.join(info(2)), Err(taken));
    assert_eq!(map.leave(NodeId(1), 3), Err(Refused::TooFew { left: 2, copies: 3 }));
    assert_eq!(map.replace(NodeId(9), 3), Err(Refused::NoMember(NodeId(9))));
    assert_eq!(map, before);
    map.leave(NodeId(1), 2).unwrap();
    assert!(matches!(map.leave(NodeId(1), 2), Err(Refused::State { .. })));
    assert!(map.replace(NodeId(1), 2).is_ok(), "it may die on its way");
}

#[test]
fn changes_while_partitions_move_add_up_and_are_bounded() {
    let mut map = founded(3);
    let mut refused = false;
    for id in 10..30 {
        let before = map.clone();
        if map.join(info(id)).is_err() {
            assert_eq!(map, before);
            refused = true;
        }
        let standings = well(&map, &[]);
        if let Some(after) = next(&map, CLUSTER, &topology(&map, 1), &standings, Rules::ALL) {
            map = after;
        }
        assert!(map.layouts.len() <= LAYOUTS_MAX);
        assert_eq!(read_back(&map), map);
    }
    settle(&mut map, &[], |_, _| {});
    assert!(map.is_settled() && map.layouts.len() == 1);
    assert!(refused || map.members.len() == 23);
}

/// Every home of a partition that reads may ask at one of two neighbouring maps is written to, each
/// level, by whoever works by the other.
#[test]
fn neighbouring_stages_agree_on_who_must_have_a_write() {
    let mut map = founded(3);
    map.join(info(9)).unwrap();
    settle(&mut map, &[], |before, after| {
        let (one, other) = (topology(before, 1), topology(after, 1));
        for partition in all() {
            let reads = |it: &Topology| it.replicas(partition, 3).to_vec();
            let groups = |it: &Topology| {
                let mut groups = vec![reads(it)];
                groups.extend(it.other_replicas(partition, 3).map(<[NodeId]>::to_vec));
                groups
            };
            // Prepared -> Both adds a group and changes no reader; Both -> New has both groups.
            assert!(groups(&one).contains(&reads(&other)) || before.layouts != after.layouts);
            assert!(groups(&other).contains(&reads(&one)) || one.stage(partition) == Stage::New);
        }
    });
}
