//! The next step: what any member may do to the map, given what the nodes say of themselves.
//!
//! Invariant: a step is only planned from what was said of exactly this map, by nodes that have
//! confirmed it; what they say of it stays true while it is the map. So any node may plan, at any
//! time, and the register takes one step of those that are planned from one map.

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::PartitionId;

use super::{ClusterMap, MemberState, Place, Stage};
use crate::member::NodeId;
use crate::register::holders;
use crate::topology::Topology;

/// Of the partitions one in so many moves at a time, and at least [`MOVING_MIN`].
const MOVING_PARTS: usize = 16;
const MOVING_MIN: usize = 4;

/// What a node has said of itself lately; nothing is known of one that has said nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// The map that it works by, and below which it refuses requests: all its shards.
    pub confirmed: u32,
    /// Partitions that it is a new owner of and ready for the next stage with.
    pub ready: BTreeSet<PartitionId>,
    /// It holds nothing that is not its own.
    pub is_empty: bool,
}

/// The rules, so that tests can leave one out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Each stage waits until the old homes have confirmed the map.
    pub old_homes_confirm: bool,
    /// Stages wait until the new owners are ready.
    pub new_owners_ready: bool,
    /// There is a stage in which both are written to and the new are read.
    pub read_new_first: bool,
    /// Replicas refuse requests of maps before the one that they have confirmed.
    pub fences: bool,
    /// Writes come to the other homes as well while a partition moves, each level of them.
    pub writes_to_both: bool,
}

impl Rules {
    /// All of them.
    pub const ALL: Rules = Rules {
        old_homes_confirm: true,
        new_owners_ready: true,
        read_new_first: true,
        fences: true,
        writes_to_both: true,
    };
}

/// The map that should follow; `None` while there is nothing to do, or nodes must be waited for.
/// `topology` is that of `map`.
#[must_use]
pub fn next(
    map: &ClusterMap,
    cluster: u128,
    topology: &Topology,
    standings: &BTreeMap<NodeId, Standing>,
    rules: Rules,
) -> Option<ClusterMap> {
    if map.is_settled() {
        return None;
    }
    // Step by step together: who is there and has not confirmed the last one is about to.
    let lags = |member: &&super::MapMember| {
        let said = standings.get(&member.info.id);
        said.is_some_and(|said| said.confirmed < map.generation)
    };
    if rules.old_homes_confirm && map.members.iter().any(|member| lags(&member)) {
        return None;
    }
    let planner = Planner { map, topology, standings, rules };
    let mut next = map.clone();
    planner.move_partitions(&mut next);
    planner.change_members(cluster, &mut next);
    if next == *map {
        return None;
    }
    next.generation += 1;
    if next.members.len() < map.members.len() {
        next.removed_at = next.generation;
    }
    next.tidy();
    Some(next)
}

struct Planner<'a> {
    map: &'a ClusterMap,
    topology: &'a Topology,
    standings: &'a BTreeMap<NodeId, Standing>,
    rules: Rules,
}

impl Planner<'_> {
    fn state(&self, node: NodeId) -> Option<MemberState> {
        self.map.member(node).map(|member| member.state)
    }

    fn has_confirmed(&self, node: NodeId) -> bool {
        self.standings.get(&node).is_some_and(|said| said.confirmed >= self.map.generation)
    }

    /// Whether all nodes that the partition is leaving work by this map; those that are replaced are
    /// not asked.
    fn old_confirmed(&self, partition: PartitionId, at: u8) -> bool {
        let old = self.topology.homes_on(partition, at);
        let must = |node: &&NodeId| self.state(**node) != Some(MemberState::Dead);
        !self.rules.old_homes_confirm
            || old.iter().filter(must).all(|node| self.has_confirmed(*node))
    }

    fn new_owners(&self, partition: PartitionId, place: Place) -> Vec<NodeId> {
        let old = self.topology.homes_on(partition, place.at);
        let new = self.topology.homes_on(partition, place.to);
        new.into_iter().filter(|node| !old.contains(node)).collect()
    }

    fn are_ready(&self, partition: PartitionId, owners: &[NodeId]) -> bool {
        let is_ready = |node: &NodeId| {
            self.has_confirmed(*node)
                && self.standings.get(node).is_some_and(|said| said.ready.contains(&partition))
        };
        !self.rules.new_owners_ready || owners.iter().all(is_ready)
    }

    /// Whether the way there is to be given up: it leads to somebody who is gone.
    fn is_in_vain(&self, owners: &[NodeId]) -> bool {
        owners.iter().any(|node| {
            self.state(*node).is_none_or(|state| state >= MemberState::Leaving)
                || !self.standings.contains_key(node)
        })
    }

    fn move_partitions(&self, next: &mut ClusterMap) {
        let last = self.map.last();
        let mut moving = self.map.places.iter().filter(|p| p.stage != Stage::Settled).count();
        let most = (self.map.places.len() / MOVING_PARTS).max(MOVING_MIN);
        let mut waiting: Vec<(u8, PartitionId)> = Vec::new();
        let partitions = (0..).map(PartitionId);
        for ((partition, place), next) in
            partitions.zip(self.map.places.iter().copied()).zip(&mut next.places)
        {
            let owners = self.new_owners(partition, place);
            match place.stage {
                Stage::Settled if place.at == last => {}
                Stage::Settled => {
                    let to = Place { to: last, ..place };
                    if self.topology.is_same_on(partition, place.at, last) {
                        *next = Place::settled(last);
                    } else if !self.is_in_vain(&self.new_owners(partition, to)) {
                        waiting.push((self.urgency(partition, place.at), partition));
                    }
                }
                Stage::Prepared | Stage::Both if self.is_in_vain(&owners) => {
                    *next = Place::settled(place.at);
                    moving -= 1;
                }
                Stage::Prepared => {
                    if self.old_confirmed(partition, place.at) && self.are_ready(partition, &owners)
                    {
                        next.stage = Stage::Both;
                    }
                }
                Stage::Both if self.are_ready(partition, &owners) => {
                    match self.rules.read_new_first {
                        true => next.stage = Stage::New,
                        false => *next = Place::settled(place.to),
                    }
                }
                Stage::Both => {}
                Stage::New => {
                    if self.old_confirmed(partition, place.at) {
                        *next = Place::settled(place.to);
                        moving -= 1;
                    }
                }
            }
        }
        // Those first that have the fewest copies, then those that somebody waits to be rid of.
        waiting.sort_unstable();
        for (_, partition) in waiting.into_iter().take(most.saturating_sub(moving)) {
            let place = &mut next.places[partition.0 as usize];
            *place = Place { to: last, stage: Stage::Prepared, ..*place };
        }
    }

    fn urgency(&self, partition: PartitionId, at: u8) -> u8 {
        let states = self.topology.homes_on(partition, at).into_iter().map(|it| self.state(it));
        states
            .map(|state| match state {
                None | Some(MemberState::Dead) => 0,
                Some(MemberState::Leaving) => 1,
                Some(_) => 2,
            })
            .min()
            .unwrap_or(2)
    }

    fn change_members(&self, cluster: u128, next: &mut ClusterMap) {
        let last = Place::settled(self.map.last());
        let is_there = next.places.iter().all(|place| *place == last);
        let carries = |node: NodeId| {
            self.map.layouts.last().is_some_and(|layout| layout.iter().any(|it| it.0 == node))
        };
        // Holders first: who goes must not be one any more.
        let eligible: Vec<_> = next
            .members
            .iter()
            .filter(|member| member.state == MemberState::Up)
            .map(|member| member.info.clone())
            .collect();
        let wanted = holders(cluster, &eligible);
        if !next.former.is_empty() {
            next.former.clear();
        } else if !wanted.is_empty() && wanted != next.holders {
            next.former = std::mem::replace(&mut next.holders, wanted);
        }
        if !is_there || !self.map.places.iter().all(|place| *place == last) {
            return;
        }
        for member in &mut next.members {
            let id = member.info.id;
            if member.state == MemberState::Joining && carries(id) {
                member.state = MemberState::Up;
            }
        }
        let holds = |node: NodeId| {
            [&self.map.holders, &self.map.former, &next.holders, &next.former]
                .iter()
                .any(|holders| holders.contains(&node))
        };
        let is_done = |member: &super::MapMember| {
            let id = member.info.id;
            let may_go = match member.state {
                MemberState::Joining | MemberState::Up => false,
                MemberState::Leaving => {
                    self.has_confirmed(id)
                        && self.standings.get(&id).is_some_and(|said| said.is_empty)
                }
                MemberState::Dead => true,
            };
            may_go && !carries(id) && !holds(id)
        };
        let gone: Vec<NodeId> =
            next.members.iter().filter(|it| is_done(it)).map(|it| it.info.id).collect();
        next.members.retain(|member| !gone.contains(&member.info.id));
    }
}
