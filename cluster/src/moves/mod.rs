//! Members that change and partitions that move: the map that all nodes agree on.
//!
//! The map is one value of the register (`register/mod.rs`): who is a member, the *layouts* that
//! partitions are on or on their way to, and for each partition where it stands between two of
//! them. Who holds what is still a function: of a layout, the ring gives the homes. A change of
//! members adds a layout; then each partition goes over from the one it is on to the last one.
//!
//! ```text
//! stage      writes go to           reads from   goes on when ([`plan`])
//! Settled    old                    old          -
//! Prepared   old                    old          the old homes know it, and new owners have nothing
//!                                                of the partition any more
//! Both       old and new, W in each old          each new owner has all that each old home had when
//!                                                it began to refuse writes that go to old alone
//! New        old and new, W in each new          the old homes refuse reads of old by now
//! Settled    new                    new
//! ```
//!
//! Why it is right. A replica *fences*: it refuses requests of a map older than the one it has
//! confirmed, so what a coordinator with an old map is told by a quorum cannot contradict a newer
//! map: every step forward waits for all old homes, and a quorum has one of them. A write that was
//! acknowledged before `Both` is at an old home, before that one's fence, and so is given to the new
//! owners before `New`; one that came later is at W of the old and W of the new. `Prepared` is for
//! tombstones: from then on the old homes purge none before the new owners have it, and a new
//! owner begins with nothing, takes everything from old homes and keeps no stand-in copies, so
//! no copy from before hides from a purged tombstone.
//!
//! What was moved away goes as a stand-in's copies do: when all homes have all of it the partition's
//! incarnation is dropped. Any step back from `Prepared` and `Both` is safe; `New` only goes forward.
//!
//! Invariants: ids are given once. One change follows the other (the register), and a step is made
//! from exactly the map that it was planned for. Pure.

mod file;
pub mod plan;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use annulus_engine::model::PartitionId;

use crate::member::{NodeId, Weight};
use crate::register::holders;
use crate::topology::NodeInfo;

/// Most members.
pub const MEMBERS_MAX: usize = 1024;
/// Most layouts at a time: their numbers have three bits in a [`Place`].
pub const LAYOUTS_MAX: usize = 8;

/// What a member is to the cluster. Whether it is alive is not said here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum MemberState {
    /// Partitions are on their way to it.
    Joining = 1,
    /// It holds its share.
    Up = 2,
    /// Partitions are on their way from it; then it is no member any more.
    Leaving = 3,
    /// It is replaced: its partitions come from the others, and what it alone had is given up.
    Dead = 4,
}

impl MemberState {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            MemberState::Joining => "joining",
            MemberState::Up => "up",
            MemberState::Leaving => "leaving",
            MemberState::Dead => "replaced",
        }
    }
}

/// A member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapMember {
    /// Where and how heavy.
    pub info: NodeInfo,
    /// What it is to the cluster.
    pub state: MemberState,
}

/// How far a partition is on its way. The module has what each stage means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// On its layout.
    Settled = 0,
    /// Its homes know that it will move.
    Prepared = 1,
    /// Written to both, read from the old.
    Both = 2,
    /// Written to both, read from the new.
    New = 3,
}

/// Where a partition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the layout that it is on.
    pub at: u8,
    /// Number of the layout that it is on the way to; `at` if it is settled.
    pub to: u8,
    /// How far.
    pub stage: Stage,
}

impl Place {
    /// On a layout.
    #[must_use]
    pub fn settled(at: u8) -> Place {
        Place { at, to: at, stage: Stage::Settled }
    }

    fn to_u8(self) -> u8 {
        self.at | self.to << 3 | (self.stage as u8) << 6
    }

    fn from_u8(byte: u8) -> Place {
        let stage = match byte >> 6 {
            0 => Stage::Settled,
            1 => Stage::Prepared,
            2 => Stage::Both,
            _ => Stage::New,
        };
        Place { at: byte & 7, to: byte >> 3 & 7, stage }
    }
}

/// Who carries the data, and how much: the ring follows from it.
pub type Layout = Vec<(NodeId, Weight)>;

/// Why a change of members is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The address is another member's.
    #[error(
        "{address} is the address of member {node}: give the new node another, or `annulus replace {node}` first"
    )]
    AddressTaken {
        /// The address.
        address: String,
        /// Whose.
        node: NodeId,
    },
    /// No such member.
    #[error("{0} is no member; `annulus status` has the members")]
    NoMember(NodeId),
    /// It is going already, or is not the kind of member that this can be done with.
    #[error("member {node} is {state} already")]
    State {
        /// Which.
        node: NodeId,
        /// What it is.
        state: &'static str,
    },
    /// Too few would be left.
    #[error(
        "{left} nodes would be left, but a namespace has n={copies}: let another node join first, or lower n with `annulus ns set`"
    )]
    TooFew {
        /// Nodes that would be left to hold data.
        left: usize,
        /// The greatest number of copies.
        copies: u8,
    },
    /// Members have changed too often while partitions move.
    #[error(
        "partitions still move because of {LAYOUTS_MAX} earlier changes of members: try again when `annulus status` says that they have"
    )]
    TooMany,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterMap {
    /// Counts changes; requests between nodes carry it.
    pub generation: u32,
    /// The next id to give.
    pub next_id: u32,
    /// The generation in which a member was last removed; 0: never.
    pub removed_at: u32,
    /// Of the list of members that the cluster was founded with: the same for all members ever.
    pub founding: u64,
    /// Logarithm of the number of partitions.
    pub partition_bits: u32,
    /// Sorted by id.
    pub members: Vec<MapMember>,
    /// Those that partitions refer to; the last is where all go.
    pub layouts: Vec<Layout>,
    /// By partition; empty when all are settled on the only layout.
    pub places: Vec<Place>,
    /// Who holds the register, by id.
    pub holders: Vec<NodeId>,
    /// Who held it before: while there are any, a majority of them must agree as well.
    pub former: Vec<NodeId>,
}

impl ClusterMap {
    /// The map of a new cluster of these members.
    #[must_use]
    pub fn found(
        cluster: u128,
        founding: u64,
        partition_bits: u32,
        mut members: Vec<NodeInfo>,
    ) -> ClusterMap {
        members.sort_by_key(|member| member.id);
        let next_id = members.last().map_or(1, |last| last.id.0 + 1);
        let holders = holders(cluster, &members);
        let layout = members.iter().map(|member| (member.id, member.weight)).collect();
        let member = |info| MapMember { info, state: MemberState::Up };
        ClusterMap {
            generation: 1,
            next_id,
            removed_at: 0,
            founding,
            partition_bits,
            members: members.into_iter().map(member).collect(),
            layouts: vec![layout],
            places: Vec::new(),
            holders,
            former: Vec::new(),
        }
    }

    /// A member.
    #[must_use]
    pub fn member(&self, node: NodeId) -> Option<&MapMember> {
        let at = self.members.binary_search_by_key(&node, |member| member.info.id).ok()?;
        Some(&self.members[at])
    }

    /// Whether the id was a member's that is none any more: it never will be again.
    #[must_use]
    pub fn is_removed(&self, node: NodeId) -> bool {
        node.0 > 0 && node.0 < self.next_id && self.member(node).is_none()
    }

    /// All members, by id.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.members.iter().map(|member| member.info.clone()).collect()
    }

    /// Where a partition stands.
    #[must_use]
    pub fn place(&self, partition: PartitionId) -> Place {
        let only = Place::settled(0);
        self.places.get(partition.0 as usize).copied().unwrap_or(only)
    }

    /// Partitions that are not on the last layout yet.
    #[must_use]
    pub fn partitions_left(&self) -> usize {
        let last = Place::settled(self.last());
        self.places.iter().filter(|place| **place != last).count()
    }

    /// Whether nothing moves and nobody comes or goes: then nobody has anything to do.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.places.is_empty()
            && self.layouts.len() == 1
            && self.former.is_empty()
            && self.members.iter().all(|member| member.state == MemberState::Up)
    }

    /// The groups of holders of the register a majority of each of which must agree.
    #[must_use]
    pub fn voters(&self) -> Vec<Vec<NodeId>> {
        let groups = [&self.holders, &self.former];
        groups.into_iter().filter(|group| !group.is_empty()).cloned().collect()
    }

    fn last(&self) -> u8 {
        u8::try_from(self.layouts.len().saturating_sub(1)).unwrap_or(u8::MAX)
    }

    /// Lets a node join. Asked again for the same address it gives the same id, until that node
    /// holds its share.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn join(&mut self, info: NodeInfo) -> Result<NodeId, Refused> {
        let same = |member: &&MapMember| member.info.peer == info.peer;
        if let Some(known) = self.members.iter().find(same) {
            let node = known.info.id;
            return match known.state {
                MemberState::Joining => Ok(node),
                _ => Err(Refused::AddressTaken { address: info.peer, node }),
            };
        }
        if self.members.len() >= MEMBERS_MAX {
            return Err(Refused::TooMany);
        }
        let id = NodeId(self.next_id);
        let mut next = self.clone();
        next.members.push(MapMember { info: NodeInfo { id, ..info }, state: MemberState::Joining });
        next.next_id += 1;
        next.lay_out()?;
        *self = next;
        Ok(id)
    }

    /// Lets a member leave: its partitions go to the others first. `copies`: the greatest number
    /// of copies that a namespace has.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn leave(&mut self, node: NodeId, copies: u8) -> Result<(), Refused> {
        self.go(node, MemberState::Leaving, copies)
    }

    /// Gives a member up that will not come back: the others make up for its copies.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn replace(&mut self, node: NodeId, copies: u8) -> Result<(), Refused> {
        self.go(node, MemberState::Dead, copies)
    }

    fn go(&mut self, node: NodeId, state: MemberState, copies: u8) -> Result<(), Refused> {
        let mut next = self.clone();
        let found = next.members.iter_mut().find(|member| member.info.id == node);
        let member = found.ok_or(Refused::NoMember(node))?;
        if member.state >= state {
            return Err(Refused::State { node, state: member.state.name() });
        }
        member.state = state;
        let carries = |member: &&MapMember| member.state <= MemberState::Up;
        let left = next.members.iter().filter(carries).count();
        let had = self.members.iter().filter(carries).count();
        // A cluster that has always had too few may have one fewer, but not none.
        if left == 0 || (left < usize::from(copies) && had >= usize::from(copies)) {
            return Err(Refused::TooFew { left, copies });
        }
        next.lay_out()?;
        *self = next;
        Ok(())
    }

    /// Takes note of a member's new address.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn readdress(&mut self, node: NodeId, peer: &str) -> Result<(), Refused> {
        let other = |member: &&MapMember| member.info.peer == peer && member.info.id != node;
        if let Some(other) = self.members.iter().find(other) {
            return Err(Refused::AddressTaken { address: peer.to_owned(), node: other.info.id });
        }
        let found = self.members.iter_mut().find(|member| member.info.id == node);
        let member = found.ok_or(Refused::NoMember(node))?;
        if member.info.peer != peer {
            peer.clone_into(&mut member.info.peer);
            self.generation += 1;
        }
        Ok(())
    }

    /// From now on partitions go to where the members that stay would have them.
    fn lay_out(&mut self) -> Result<(), Refused> {
        let carries = |member: &&MapMember| member.state <= MemberState::Up;
        let carriers = self.members.iter().filter(carries);
        let layout: Layout = carriers.map(|it| (it.info.id, it.info.weight)).collect();
        if self.places.is_empty() {
            self.places = vec![Place::settled(0); 1 << self.partition_bits];
        }
        self.generation += 1;
        if self.layouts.last() != Some(&layout) {
            self.layouts.push(layout);
        }
        self.tidy();
        if self.layouts.len() > LAYOUTS_MAX {
            return Err(Refused::TooMany);
        }
        Ok(())
    }

    /// Forgets layouts that nothing refers to any more; the last one stays.
    fn tidy(&mut self) {
        let last = self.layouts.len() - 1;
        let mut used: BTreeSet<usize> = BTreeSet::from([last]);
        for place in &self.places {
            used.extend([usize::from(place.at), usize::from(place.to)]);
        }
        let number = |old: u8| {
            let at = used.iter().position(|used| *used == usize::from(old));
            u8::try_from(at.expect("what is referred to is used")).expect("a few layouts")
        };
        for place in &mut self.places {
            *place = Place { at: number(place.at), to: number(place.to), ..*place };
        }
        let mut at = 0;
        self.layouts.retain(|_| {
            at += 1;
            used.contains(&(at - 1))
        });
        if self.layouts.len() == 1 && self.places.iter().all(|it| *it == Place::settled(0)) {
            self.places.clear();
        }
    }
}
