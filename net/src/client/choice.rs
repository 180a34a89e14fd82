//! Which node a request goes to.
//!
//! Invariant: a node that answers comes before one that does not; among equals one that this
//! request has not been sent to, then a home of the key in the map's order, then the others in
//! turn. Pure.

use annulus_engine::model::OriginId;

use super::health::Standing;

/// A node with a connection that takes requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) node: OriginId,
    pub(crate) standing: Standing,
    /// Its place among the key's homes, if it is one.
    pub(crate) home: Option<usize>,
    /// The request has been sent to it already.
    pub(crate) asked: bool,
}

/// What is wanted of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The best there is.
    Best,
    /// A healthy one that has not been asked yet.
    Another,
}

/// The best of them. `turn` counts requests, for those that have no home.
pub(crate) fn best(candidates: &[Candidate], need: Need, turn: usize) -> Option<OriginId> {
    let count = candidates.len();
    let fits =
        |it: &Candidate| need == Need::Best || (it.standing == Standing::Healthy && !it.asked);
    let rank = |(at, it): &(usize, &Candidate)| {
        let place = it.home.unwrap_or(usize::MAX);
        (it.standing, it.asked, place, (at + count - turn % count) % count)
    };
    let fitting = candidates.iter().enumerate().filter(|(_, it)| fits(it));
    fitting.min_by_key(rank).map(|(_, it)| it.node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Standing::{Healthy, Held, Silent};

    fn node(id: u32, standing: Standing, home: Option<usize>) -> Candidate {
        Candidate { node: OriginId(id), standing, home, asked: false }
    }

    fn asked(candidate: Candidate) -> Candidate {
        Candidate { asked: true, ..candidate }
    }

    #[test]
    fn the_first_healthy_home_is_best() {
        let best = |all: &[Candidate]| super::best(all, Need::Best, 5).map(|node| node.0);
        let (far, near) = (node(1, Healthy, None), node(2, Healthy, Some(0)));
        assert_eq!(best(&[far, node(3, Healthy, Some(1)), near]), Some(2));
        assert_eq!(best(&[far, node(3, Healthy, Some(1)), node(2, Silent, Some(0))]), Some(3));
        assert_eq!(best(&[far, node(3, Held, Some(1)), node(2, Silent, Some(0))]), Some(1));
        assert_eq!(best(&[node(1, Silent, None), node(3, Held, Some(1))]), Some(3));
        assert_eq!(best(&[node(1, Silent, None), node(2, Silent, Some(0))]), Some(2));
        assert_eq!(best(&[far, asked(near)]), Some(1), "elsewhere");
        assert_eq!(best(&[asked(near), node(1, Silent, None)]), Some(2), "again");
        assert_eq!(best(&[]), None);
    }

    #[test]
    fn without_homes_healthy_nodes_take_turns() {
        let all = [node(1, Healthy, None), node(2, Silent, None), node(3, Healthy, None)];
        let mut taken: Vec<u32> =
            (0..300).map(|turn| best(&all, Need::Best, turn).unwrap().0).collect();
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken, [1, 3]);
    }

    #[test]
    fn another_one_is_healthy_and_was_not_asked() {
        let another = |all: &[Candidate]| super::best(all, Need::Another, 0).map(|node| node.0);
        let home = asked(node(1, Silent, Some(0)));
        assert_eq!(another(&[home, node(2, Held, Some(1)), node(3, Healthy, Some(2))]), Some(3));
        assert_eq!(another(&[home, node(2, Held, Some(1)), node(3, Silent, None)]), None);
        assert_eq!(another(&[asked(node(1, Healthy, Some(0)))]), None);
    }
}
