//! The background conversation with the other replicas: what each has seen, who fetches what
//! from whom, what may be purged, and what a node says of itself.
//!
//! Invariant: it looks at the clock every [`EXCHANGE_NANOS`] and costs nothing in between; all of
//! it may be lost, doubled or late, because each round says everything that matters again.

use std::collections::BTreeSet;
use std::rc::Rc;

use annulus_cluster::message::PeerMessage;
use annulus_cluster::tracking::{PeerShard, Replica, Shared};
use annulus_cluster::{NodeId, Topology};
use annulus_engine::disk::Disk;
use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{NamespaceId, PartitionId, Timestamp, WallMicros};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::Shard;

use super::Replication;
use super::refill::is_refill_id;
use super::repair::is_repair_id;
use crate::metrics::Standing;
use crate::pump::{Done, Lane, Pump};

/// How often the conversation is looked at, in nanoseconds.
const EXCHANGE_NANOS: u64 = 20_000_000;

/// The same while a round is under way, which is cut in parts so that no request waits for long.
const ROUND_NANOS: u64 = 1_000_000;

/// How often gaps and stand-in copies are looked at, in nanoseconds.
const LOOK_NANOS: u64 = 250_000_000;

/// The shard as tracking sees it.
pub(super) struct View<'a, D: Disk, R: Runtime> {
    pub(super) shard: &'a Shard<D, R>,
    pub(super) wall: WallMicros,
}

impl<D: Disk, R: Runtime> Replica for View<'_, D, R> {
    fn seen(&self, partition: PartitionId) -> Rc<SeenSet> {
        self.shard.seen(partition)
    }

    fn take_changed(&mut self) -> Vec<PartitionId> {
        self.shard.take_changed()
    }

    fn clock(&self) -> Timestamp {
        self.shard.clock_now(self.wall)
    }

    fn lost_after(&self) -> Option<Timestamp> {
        self.shard.lost_after()
    }

    fn has_gap(&self, partition: PartitionId) -> bool {
        self.shard.has_gap(partition)
    }

    fn is_busy(&self, partition: PartitionId) -> bool {
        self.shard.is_busy(partition)
    }

    fn appended(&self) -> u64 {
        self.shard.appended().0
    }

    fn visible(&self) -> u64 {
        self.shard.visible().0
    }

    fn durable(&self) -> u64 {
        self.shard.durable().0
    }
}

/// How often everybody is told the settings again, in nanoseconds: the one message that is not
/// repeated by itself might have been lost.
const SETTINGS_NANOS: u64 = 10_000_000_000;

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Does what is due. What it says to others leaves with the letters.
    pub(in crate::pump) fn exchange_turn(&mut self) {
        let Some(replication) = &mut self.replication else { return };
        if self.now < replication.next_exchange {
            return;
        }
        let mut view = View { shard: &self.shard, wall: self.wall };
        let Replication { tracking, letters, peers, next_look, next_exchange, .. } =
            &mut **replication;
        tracking.poll(self.now, &mut view, &mut |to, message| {
            let is_up = peers.contains_key(&to.node);
            if is_up {
                letters.push(super::Letter::new(to, Lane::Background, message));
            }
            is_up
        });
        let wanted = tracking.sync_wanted(self.now, &view, &|node| peers.contains_key(&node));
        let floors = tracking.take_floors();
        let pause = if tracking.is_under_way() { ROUND_NANOS } else { EXCHANGE_NANOS };
        *next_exchange = self.now.after_nanos(pause);
        // Both look at every partition, and neither is in a hurry.
        let (mut closed, mut done) = (Vec::new(), Vec::new());
        let is_time_to_look = self.now >= *next_look;
        if is_time_to_look {
            *next_look = self.now.after_nanos(LOOK_NANOS);
            done = tracking.guests_done(&view);
            if self.shard.lost_after().is_some() {
                closed = tracking.gaps_closed(&view);
                // A new directory in the place of a lost one is whole when it has what the others
                // have, and votes on registers from then on.
                closed.retain(|gap| {
                    !gap.is_void
                        || self.shard.is_founded(gap.partition)
                        || tracking.has_all(gap.partition, &view)
                });
            }
        }
        for floor in floors {
            let refill = self.replication.as_mut().map(|replication| &mut replication.refill);
            if let Some(floor) = refill.and_then(|refill| refill.hold(floor)) {
                self.set_floor(floor);
            }
        }
        for gap in closed {
            match gap.is_void {
                // Tried again in the next round when the log cannot take it now.
                true => drop(self.shard.declare_own_void(gap.partition)),
                false => self.shard.forget_gap(gap.partition),
            }
        }
        for partition in done {
            tracing::debug!(partition = partition.0, "the holders have all that was kept for them");
            let _ = self.shard.drop_partition(partition);
        }
        if is_time_to_look {
            self.look_at_room();
        }
        self.tell_room();
        for wanted in wanted {
            self.begin_sync(wanted.partition, wanted.helper);
        }
        self.expire_syncs();
        self.refill_turn();
        if self.map.own() == 0 && self.is_time_for_settings() {
            self.tell_all_settings();
        }
    }

    fn is_time_for_settings(&mut self) -> bool {
        let Some(replication) = &mut self.replication else { return false };
        let is_due = self.now >= replication.next_settings;
        if is_due {
            replication.next_settings = self.now.after_nanos(SETTINGS_NANOS);
        }
        is_due
    }

    /// A message of the background conversation.
    pub(super) fn exchange(&mut self, from: PeerShard, message: &PeerMessage<'_>, raw: &[u8]) {
        match message {
            PeerMessage::Track { .. } | PeerMessage::TrackDone { .. } => {
                if let Some(replication) = &self.replication
                    && replication.tracking.begins_life(from, message)
                {
                    // Before it hears that its life is known here.
                    replication.keys.bar();
                    self.key_home_lost(from.node);
                }
                let Some(replication) = &mut self.replication else { return };
                let view = View { shard: &self.shard, wall: self.wall };
                let Replication { tracking, letters, .. } = &mut **replication;
                let handled = tracking.handle(self.now, from, message, &view, &mut |to, reply| {
                    letters.push(super::Letter::new(to, Lane::Background, reply));
                    true
                });
                if let Err(error) = handled {
                    tracing::warn!(node = from.node.0, %error, "an announcement was refused");
                    self.metrics.borrow_mut().counters.peer_refused += 1;
                }
            }
            PeerMessage::Sync { .. } => self.serve_sync(from, message),
            PeerMessage::SyncPage { id, .. } if is_repair_id(*id) => {
                self.take_repair_page(from, message, raw);
            }
            PeerMessage::SyncPage { id, .. } if is_refill_id(*id) => {
                self.take_refill_page(from, message, raw);
            }
            PeerMessage::SyncPage { .. } => self.take_sync_page(from, message, raw),
            PeerMessage::Settings { client, generation, catalogue } => {
                self.take_settings(from, client, *generation, catalogue);
            }
            other => self.repair_message(from, other),
        }
    }

    /// A node can be reached: it is told of the settings here.
    pub fn peer_up(&mut self, node: NodeId, shard_count: u32) {
        let shard = self.map.own();
        let Some(replication) = &mut self.replication else { return };
        replication.peers.insert(node, super::Peer { shard_count });
        replication.coordinator.peer_up(node);
        self.repair_peer_up(node);
        self.greet_member(node);
        if shard < shard_count {
            self.tell_settings(PeerShard { node, shard });
        }
    }

    /// A node cannot be reached: nobody waits for it any more.
    pub fn peer_down(&mut self, node: NodeId) {
        let Some(replication) = &mut self.replication else { return };
        if replication.peers.remove(&node).is_some() {
            let moment = self.moment();
            let Some(replication) = &mut self.replication else { return };
            let actions = &mut replication.actions;
            replication.coordinator.peer_down(moment, node, actions);
            self.key_home_lost(node);
            self.repair_peer_down(node);
        }
    }

    pub(super) fn tell_settings(&mut self, to: PeerShard) {
        let catalogue = self.catalogue.encode();
        let client = self.desk.client_address();
        let settings = PeerMessage::Settings {
            client: client.as_bytes(),
            generation: self.catalogue.generation(),
            catalogue: &catalogue,
        };
        self.post(to, Lane::Background, &settings);
    }

    /// The namespaces have changed here: placement follows, and everybody is told.
    pub(in crate::pump) fn spread_settings(&mut self) {
        let Some(replication) = &mut self.replication else { return };
        let factors: BTreeSet<u8> = self.catalogue.iter().map(|namespace| namespace.n).collect();
        let before = Rc::clone(&replication.topology);
        let generation = self.catalogue.map().map_or(before.generation(), |map| map.generation);
        if replication.factors != factors || generation != before.generation() {
            let (bits, nodes) = (before.partition_bits(), before.nodes().to_vec());
            let topology = match self.catalogue.map() {
                Some(map) => Topology::of_map(before.own(), map, factors.iter().copied()),
                None => Topology::new(before.own(), bits, nodes, factors.iter().copied()),
            };
            match topology {
                Ok(topology) => {
                    let shared = Shared::new(&topology, self.map.own(), self.map.count());
                    replication.tracking.set_shared(shared);
                    replication.topology = Rc::new(topology);
                    replication.factors = factors;
                    self.members_follow(&before);
                    self.count_room();
                }
                Err(error) => tracing::error!(?error, "no placement for these namespaces"),
            }
        }
        self.tell_all_settings();
    }

    /// The map may be another one: whatever knows members follows.
    fn members_follow(&mut self, before: &Topology) {
        let moment = self.moment();
        let voters = self.catalogue.map().map(annulus_cluster::moves::ClusterMap::voters);
        let Some(replication) = &mut self.replication else { return };
        if let Some(voters) = voters {
            replication.registers.set_voters(moment, voters);
        }
        let topology = Rc::clone(&replication.topology);
        let ids = |topology: &Topology| -> Vec<NodeId> {
            topology.nodes().iter().map(|node| node.id).collect()
        };
        if ids(&topology) != ids(before) {
            for node in ids(&topology).into_iter().filter(|node| before.node(*node).is_none()) {
                let is_linked = replication.peers.contains_key(&node);
                replication.coordinator.health_mut().set_linked(node, is_linked);
            }
            self.gossip_follows();
        }
        self.moves_follow(before.generation());
    }

    fn tell_all_settings(&mut self) {
        let Some(replication) = &self.replication else { return };
        let own = self.map.own();
        let peers: Vec<PeerShard> = replication
            .peers
            .iter()
            .filter(|(_, peer)| own < peer.shard_count)
            .map(|(node, _)| PeerShard { node: *node, shard: own })
            .collect();
        for peer in peers {
            self.tell_settings(peer);
        }
        self.place_trees();
    }

    fn take_settings(&mut self, from: PeerShard, client: &[u8], generation: u64, bytes: &[u8]) {
        let Some(replication) = &self.replication else { return };
        if let Ok(client) = std::str::from_utf8(client) {
            let shard_count = replication.peers.get(&from.node).map_or(0, |it| it.shard_count);
            self.desk.note_client(from.node, client, shard_count);
        }
        if generation > self.catalogue.generation() {
            let job = self.desk.adopt_catalogue(bytes);
            self.spawn(async move { Done::Adopted(job.await.map(drop)) });
        }
    }

    /// Namespaces of which the node is a home of the partition.
    pub(super) fn namespaces_of(&self, partition: PartitionId, node: NodeId) -> Vec<NamespaceId> {
        let Some(replication) = &self.replication else { return Vec::new() };
        let topology = &replication.topology;
        let is_home = |n: u8| topology.is_home_of(partition, n, node);
        self.catalogue.iter().filter(|it| is_home(it.n)).map(|it| it.id).collect()
    }

    /// What this shard owes others, and how far it may lag behind them. Looks at all partitions.
    pub(in crate::pump) fn standing_of_shard(&self) -> Standing {
        let Some(replication) = &self.replication else {
            return Standing { hints_owed: Some(0), as_of_lag_ms: Some(0) };
        };
        let view = View { shard: &self.shard, wall: self.wall };
        let topology = &replication.topology;
        let own = topology.own();
        let lag = (self.map.first_partition().0..1 << self.map.partition_bits())
            .take_while(|partition| self.map.shard_of_partition(*partition) == self.map.own())
            .map(PartitionId)
            .filter(|partition| topology.holders(*partition).contains(&own))
            .map(|partition| match replication.tracking.as_of(partition, &view) {
                // Some home has said nothing yet.
                Timestamp::ZERO => None,
                as_of => Some(self.wall.0.saturating_sub(as_of.wall().0) / 1000),
            })
            .try_fold(0, |most: u64, lag| Some(most.max(lag?)));
        let hints_owed = Some(replication.tracking.hints_owed(&view));
        Standing { hints_owed, as_of_lag_ms: lag }
    }

    /// What this replica's answer about a key of the partition is worth.
    pub(in crate::pump) fn standing(
        &self,
        partition: PartitionId,
        namespace: NamespaceId,
    ) -> (Timestamp, bool) {
        let Some(replication) = &self.replication else { return (Timestamp::ZERO, false) };
        let n = self.catalogue.get(namespace).map_or(1, |namespace| namespace.n);
        let view = View { shard: &self.shard, wall: self.wall };
        let as_of = replication.tracking.as_of(partition, &view);
        let topology = &replication.topology;
        (as_of, topology.is_home_of(partition, n, topology.own()))
    }
}
