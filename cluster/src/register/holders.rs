//! Who holds the registers: a few members, the same ones in everybody's eyes.
//!
//! Invariant: a pure function of the members and the cluster's id, so no one is elected and no one
//! has another role than the rest. Two different lists of members may give holders whose
//! majorities do not meet: whoever changes members must carry the registers over first.

use std::collections::BTreeMap;

use annulus_engine::model::Token;

use crate::member::NodeId;
use crate::topology::NodeInfo;

/// How many holders there are in a cluster of so many members: odd where it can be, and as many
/// as may fail at once without a second thought.
#[must_use]
pub fn count_of(members: usize) -> usize {
    match members {
        0..=2 => members,
        3..=4 => 3,
        5..=31 => 5,
        _ => 7,
    }
}

/// How many of so many holders are a majority.
#[must_use]
pub fn majority(holders: usize) -> usize {
    holders / 2 + 1
}

/// The holders, by id: data centres take turns, in each the members of the lowest hash of cluster
/// and id come first. O(members).
#[must_use]
pub fn holders(cluster: u128, members: &[NodeInfo]) -> Vec<NodeId> {
    let mut centres: BTreeMap<&str, Vec<(Token, NodeId)>> = BTreeMap::new();
    for member in members {
        let mut key = cluster.to_le_bytes().to_vec();
        key.extend_from_slice(&member.id.0.to_le_bytes());
        centres.entry(&member.dc).or_default().push((Token::of_key(&key, 0), member.id));
    }
    // By turn first, then by hash: no data centre gets a second before each has one.
    let mut order: Vec<(usize, Token, NodeId)> = Vec::with_capacity(members.len());
    for members in centres.values_mut() {
        members.sort_unstable();
        order.extend(members.iter().enumerate().map(|(turn, (hash, id))| (turn, *hash, *id)));
    }
    order.sort_unstable();
    order.truncate(count_of(members.len()));
    let mut holders: Vec<NodeId> = order.into_iter().map(|(_, _, id)| id).collect();
    holders.sort_unstable();
    holders
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::Weight;

    fn members(count: u32, centres: u32) -> Vec<NodeInfo> {
        let member = |id: u32| NodeInfo {
            id: NodeId(id),
            peer: String::new(),
            client: String::new(),
            dc: format!("dc{}", id % centres),
            rack: "rack".into(),
            weight: Weight::ONE,
        };
        (1..=count).map(member).collect()
    }

    #[test]
    fn holders_are_few_the_same_for_all_and_differ_between_clusters() {
        for (count, expected) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (12, 5), (40, 7)] {
            let list = members(count, 1);
            let mut turned = list.clone();
            turned.reverse();
            assert_eq!(holders(7, &list).len(), expected);
            assert_eq!(holders(7, &list), holders(7, &turned));
        }
        let list = members(40, 1);
        assert_ne!(holders(7, &list), holders(8, &list));
        // For ever: members of one cluster may run different builds.
        assert_eq!(holders(7, &members(12, 1)), HOLDERS_OF_TWELVE.map(NodeId));
    }

    const HOLDERS_OF_TWELVE: [u32; 5] = [2, 3, 5, 6, 11];

    #[test]
    fn each_data_centre_has_a_holder_before_one_has_two_more() {
        let holders = holders(7, &members(40, 3));
        for dc in 0..3 {
            let here = holders.iter().filter(|id| id.0 % 3 == dc).count();
            assert!((2..=3).contains(&here), "{holders:?}");
        }
    }

    #[test]
    fn two_majorities_meet() {
        for count in 1..=7 {
            assert!(2 * majority(count) > count && majority(count) <= count);
        }
    }
}
