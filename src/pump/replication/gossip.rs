//! Who is there: shard 0 of a node carries its membership machine and tells the other shards.
//!
//! Invariant: every shard of a node believes the same of a member within a second, for it is told
//! all of it at once, at each change and once a second besides; so a message that an inbox did not
//! take costs nothing. What gossip says and whether a link stands stay two things: see
//! `annulus_cluster::coordinator::health`.

use std::sync::Arc;

use annulus_cluster::coordinator::{Moment, Standing};
use annulus_cluster::membership::{
    Chance, Figures, MemberView, Membership, Options, Output, Status,
};
use annulus_cluster::message::{PeerMessage, Vitals};
use annulus_cluster::tracking::PeerShard;
use annulus_cluster::{NodeId, Topology};
use annulus_engine::disk::Disk;
use annulus_engine::model::Instant;
use annulus_engine::runtime::Runtime;

use super::{Letter, Replication};
use crate::metrics::ShardSnapshot;
use crate::pump::{Lane, Message, Pump, disk_level};

/// The shard that speaks for its node.
const SPEAKER: u32 = 0;
/// How often all shards are told everything again, in nanoseconds.
const TELL_NANOS: u64 = 1_000_000_000;

/// What this shard knows of the members.
pub(super) struct Gossip {
    /// On the shard that speaks for the node.
    machine: Option<Membership>,
    /// As it was told last.
    views: Arc<[MemberView]>,
    next_telling: Instant,
}

impl Gossip {
    pub(super) fn new(topology: &Topology, life: u64, shard: u32, now: Instant) -> Gossip {
        let own = topology.own();
        let machine = (shard == SPEAKER).then(|| {
            let seed = (u64::from(own.0) << 32) ^ life;
            let (options, chance) = (Options::default(), Chance::new(seed));
            Membership::new(now, own, life, topology.nodes(), options, chance)
        });
        Gossip { machine, views: Arc::from([]), next_telling: now }
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let machine = self.machine.as_ref()?;
        Some(machine.next_timeout().min(self.next_telling))
    }

    /// What is believed of a member, as far as this shard has been told.
    pub(super) fn view(&self, node: NodeId) -> Option<&MemberView> {
        self.views.iter().find(|view| view.node == node)
    }

    /// Puts the machine's numbers into the shard's.
    fn note_in(&self, snapshot: &mut ShardSnapshot) {
        snapshot.members = self.views.to_vec();
        let Some(machine) = &self.machine else { return };
        let Figures {
            probes,
            probes_failed,
            accusations,
            withheld,
            contradictions,
            downs,
            local_health,
            rumours,
        } = machine.figures();
        let counters = &mut snapshot.metrics.counters;
        counters.gossip_probes = probes;
        counters.gossip_probes_failed = probes_failed;
        counters.gossip_accusations = accusations;
        counters.gossip_withheld = withheld;
        counters.gossip_contradictions = contradictions;
        counters.gossip_downs = downs;
        let with = |status| self.views.iter().filter(|view| view.status == status).count() as u64;
        let gauges = &mut snapshot.gauges;
        gauges.gossip_local_health = u64::from(local_health);
        gauges.gossip_rumours = rumours as u64;
        gauges.members_alive = with(Status::Alive);
        gauges.members_suspect = with(Status::Suspect);
        gauges.members_unreachable = with(Status::Unreachable);
        gauges.members_down = with(Status::Down);
    }
}

/// What the coordinator makes of it. Who cannot be reached is known to the links, sooner.
fn standing_of(status: Status) -> Standing {
    match status {
        Status::Alive => Standing::Healthy,
        Status::Suspect | Status::Unreachable => Standing::Suspected,
        Status::Down => Standing::Down,
    }
}

impl Replication {
    /// Posts what the machine wants sent. Returns whether it believes something else now.
    fn post_gossip(&mut self, outputs: Vec<Output>) -> bool {
        let mut is_changed = false;
        for output in outputs {
            match output {
                Output::Send(node, message) => {
                    let to = PeerShard { node, shard: SPEAKER };
                    self.letters.push(Letter::new(to, Lane::Foreground, &message));
                }
                Output::Changed(node, status) => {
                    is_changed = true;
                    tracing::info!(node = node.0, status = status.name(), "a member's status");
                }
            }
        }
        is_changed
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Does what is due.
    pub(super) fn gossip_turn(&mut self) {
        let Some(replication) = &mut self.replication else { return };
        let Some(machine) = &mut replication.gossip.machine else { return };
        let is_told = self.now < replication.gossip.next_telling;
        if machine.next_timeout() > self.now && is_told {
            return;
        }
        let members_epoch = replication.topology.generation().into();
        if !is_told {
            // Nothing measures load, heat and the oldest hint of a whole node yet.
            machine.set_vitals(Vitals {
                disk_level: disk_level(self.shard.stats().space_level) as u64,
                settings_epoch: self.catalogue.generation(),
                members_epoch,
                ..Vitals::default()
            });
        }
        let mut out = Vec::new();
        machine.handle_timeout(Moment { now: self.now, wall: self.wall }, &mut out);
        if replication.post_gossip(out) || !is_told {
            self.tell_views();
        }
    }

    /// A message of another node's machine. Only its speaker has one.
    pub(super) fn hear_gossip(&mut self, from: PeerShard, message: &PeerMessage<'_>) {
        let moment = Moment { now: self.now, wall: self.wall };
        let Some(replication) = &mut self.replication else { return };
        let Some(machine) = &mut replication.gossip.machine else { return };
        if from.shard != SPEAKER {
            return;
        }
        let mut out = Vec::new();
        machine.handle_message(moment, from.node, message, &mut out);
        if replication.post_gossip(out) {
            self.tell_views();
        }
    }

    /// The members are others.
    pub(super) fn gossip_follows(&mut self) {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let topology = &replication.topology;
        if let Some(machine) = &mut replication.gossip.machine
            && topology.node(topology.own()).is_some()
        {
            machine.set_members(now, topology.nodes());
            replication.gossip.next_telling = now;
        }
    }

    /// A link stands again: whoever is behind it should hear at once what is said of it.
    pub(super) fn greet_member(&mut self, node: NodeId) {
        let Some(replication) = &mut self.replication else { return };
        if replication.topology.node(node).is_none() {
            return;
        }
        let Some(machine) = &mut replication.gossip.machine else { return };
        let mut out = Vec::new();
        machine.greet(node, &mut out);
        replication.post_gossip(out);
    }

    /// Tells all shards of this node what is believed of the members.
    fn tell_views(&mut self) {
        let (now, shards) = (self.now, self.map.count());
        let Some(replication) = &mut self.replication else { return };
        let Some(machine) = &replication.gossip.machine else { return };
        replication.gossip.next_telling = now.after_nanos(TELL_NANOS);
        let views: Arc<[MemberView]> = machine.views(now).collect();
        for shard in (0..shards).filter(|shard| *shard != SPEAKER) {
            self.outbox.push((shard, Message::Members(Arc::clone(&views))));
        }
        self.take_views(views);
    }

    /// An inbox was full: it is told again in the next turn.
    pub(in crate::pump) fn views_refused(&mut self) {
        if let Some(replication) = &mut self.replication {
            replication.gossip.next_telling = self.now;
        }
    }

    /// What the node's speaker believes of the members.
    pub(in crate::pump) fn take_views(&mut self, views: Arc<[MemberView]>) {
        let Some(replication) = &mut self.replication else { return };
        let own = replication.topology.own();
        let health = replication.coordinator.health_mut();
        for view in views.iter().filter(|view| view.node != own) {
            health.set_standing(view.node, standing_of(view.status));
        }
        replication.gossip.views = views;
    }

    /// The numbers of the membership machine.
    pub(in crate::pump) fn note_gossip_in(&self, snapshot: &mut ShardSnapshot) {
        if let Some(replication) = &self.replication {
            replication.gossip.note_in(snapshot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_down_takes_no_requests() {
        let standings = Status::ALL.map(standing_of);
        let [healthy, suspected, down] = [Standing::Healthy, Standing::Suspected, Standing::Down];
        assert_eq!(standings, [healthy, suspected, suspected, down]);
    }
}
