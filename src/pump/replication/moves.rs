//! Partitions that move, as this shard takes part in it: it takes over the map, says how far it is,
//! and, on the shard that speaks for the node that has the least id, plans the next step.
//!
//! ```text
//! a newer catalogue -> topology, tracking, links follow at once; after a grace it is confirmed: from
//!                      then on requests of an older map are refused here
//! every 250 ms, while something moves:   Moving -> shard 0 of the living member of the least id
//! there:  all that was said -> plan::next -> map.step, a change of the register as any other
//! ```
//!
//! Invariant: what a shard says of a map it says after it has confirmed that map or keeps to
//! be true of it until it takes over another. While nothing moves none of this does anything.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use annulus_cluster::NodeId;
use annulus_cluster::membership::Status as Belief;
use annulus_cluster::message::PeerMessage;
use annulus_cluster::moves::plan::{Rules, Standing, next};
use annulus_cluster::moves::{ClusterMap, Stage};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::disk::Disk;
use annulus_engine::model::{Instant, PartitionId};
use annulus_engine::runtime::Runtime;
use futures_channel::oneshot;

use super::exchange::View;
use super::repair::is_damaged;
use super::{Lane, Replication};
use crate::member_commands::{STEP, Step};
use crate::pump::{Message, Origin, Pump};

/// How long after a newer map was taken over requests of the one before are still carried out, in
/// nanoseconds: those under way end, and others hear of it.
const GRACE_NANOS: u64 = 300_000_000;
/// How often a shard says how far it is, in nanoseconds.
const REPORT_NANOS: u64 = 250_000_000;
/// After which a node that has said nothing counts as gone, in nanoseconds.
const BELIEVED_NANOS: u64 = 5_000_000_000;
/// Between two attempts at a step, and for how long one is tried, in nanoseconds.
const STEP_NANOS: u64 = 500_000_000;
const STEP_DEADLINE_NANOS: u64 = 3_000_000_000;
/// Soonest next telling of the settings to a node that works by an old map, in nanoseconds.
const TELL_NANOS: u64 = 50_000_000;
/// How long after its start the node that plans reads the register, and how often from then on, in
/// nanoseconds. What a majority has accepted may be known to nobody after all have crashed, and would
/// come to light with the next change only.
const FIRST_READ_NANOS: u64 = 2_000_000_000;
const READ_NANOS: u64 = 20_000_000_000;
/// The shard that plans.
const SPEAKER: u32 = 0;

/// What a shard says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub(super) generation: u32,
    pub(super) confirmed: u32,
    pub(super) is_empty: bool,
    pub(super) ready: BTreeSet<PartitionId>,
}

/// What this shard knows of the moves.
#[derive(Debug)]
pub(super) struct Moves {
    pub(super) rules: Rules,
    /// The map below which requests are refused.
    pub(super) confirmed: u32,
    /// When the present one was taken over, and which tasks had begun by then.
    taken_over: Option<(Instant, u64)>,
    /// Held by whatever merges something in the background since the present map was taken over.
    token: Rc<()>,
    /// The same of maps before, while there are any such.
    older: Vec<Rc<()>>,
    /// Partitions that come here, and the map by which each is known to be written to here.
    coming: BTreeMap<PartitionId, u32>,
    /// On the speaker: what all shards have said.
    said: BTreeMap<PeerShard, (Instant, Report)>,
    next_report: Instant,
    next_step: Instant,
    next_telling: Instant,
    /// On the speaker: when the register is read next, if this node is the one that plans.
    next_read: Instant,
}

impl Moves {
    pub(super) fn new(generation: u32, rules: Rules, now: Instant) -> Moves {
        Moves {
            rules,
            // Nothing is under way yet that an older map has begun.
            confirmed: generation,
            taken_over: None,
            token: Rc::default(),
            older: Vec::new(),
            coming: BTreeMap::new(),
            said: BTreeMap::new(),
            next_report: now,
            next_step: now,
            next_telling: now,
            next_read: now.after_nanos(FIRST_READ_NANOS),
        }
    }
}

impl Replication {
    /// To be held by whatever goes on merging after this turn: the map that it began by is not left
    /// behind before it has ended.
    pub(super) fn merge_token(&self) -> Rc<()> {
        Rc::clone(&self.moves.token)
    }

    /// Whether a request of this map is too old to be carried out for the partition.
    pub(super) fn is_fenced(&self, epoch: u32, partition: PartitionId) -> bool {
        let moves = &self.moves;
        if !moves.rules.fences {
            return false;
        }
        epoch < moves.confirmed
            // A new owner takes nothing from whoever does not write to it as such.
            || moves.coming.get(&partition).is_some_and(|since| epoch < *since)
    }

    /// Partitions that come here: from which map on each is written to here.
    fn note_coming(&mut self, before: u32) {
        let topology = &self.topology;
        let is_next = before + 1 == topology.generation();
        let known = std::mem::take(&mut self.moves.coming);
        let bits = topology.partition_bits();
        for partition in (0..1 << bits).map(PartitionId) {
            let is_written = matches!(topology.stage(partition), Stage::Both | Stage::New);
            if is_written && topology.moves_here_from(partition).is_some() {
                // With a map in between it may have been something else meanwhile.
                let since = known.get(&partition).copied().filter(|_| is_next);
                self.moves.coming.insert(partition, since.unwrap_or(topology.generation()));
            }
        }
    }

    /// The node that plans: of those that are believed to be alive the one of the least id.
    fn planner(&self) -> Option<NodeId> {
        let own = self.topology.own();
        let is_there = |node: NodeId| {
            let belief = self.gossip.view(node).map(|view| view.status);
            node == own || (self.peers.contains_key(&node) && belief == Some(Belief::Alive))
        };
        self.topology.nodes().iter().map(|node| node.id).find(|node| is_there(*node))
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Another map was taken over: what has begun by the one before may end first.
    pub(super) fn moves_follow(&mut self, before: u32) {
        let mark = self.waiting.next_id();
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let moves = &mut replication.moves;
        moves.taken_over = Some((now, mark));
        moves.older.push(std::mem::take(&mut moves.token));
        let given_up: Vec<u64> = replication
            .sessions
            .iter()
            .filter(|session| {
                !replication
                    .topology
                    .holders(session.partition)
                    .contains(&replication.topology.own())
            })
            .map(|session| session.id)
            .collect();
        replication.moves.next_report = now;
        replication.note_coming(before);
        given_up.into_iter().for_each(|id| self.end_sync(id, false));
    }

    /// Does what is due.
    pub(super) fn moves_turn(&mut self) {
        self.confirm_map();
        self.read_register();
        let now = self.now;
        let Some(map) = self.catalogue.map().filter(|map| !map.is_settled()) else { return };
        let Some(replication) = &self.replication else { return };
        if now < replication.moves.next_report || replication.topology.generation() == 0 {
            return;
        }
        let is_speaker = self.map.own() == SPEAKER;
        let planner = replication.planner();
        let report = self.report(map);
        let Some(replication) = &mut self.replication else { return };
        replication.moves.next_report = now.after_nanos(REPORT_NANOS);
        let own = replication.topology.own();
        let from = PeerShard { node: own, shard: self.map.own() };
        match planner {
            Some(node) if node == own && is_speaker => self.take_report(from, report),
            Some(node) if node == own => {
                self.outbox.push((SPEAKER, Message::Moving(from.shard, Box::new(report))));
            }
            Some(node) => {
                let to = PeerShard { node, shard: SPEAKER };
                let message = PeerMessage::Moving {
                    generation: report.generation,
                    confirmed: report.confirmed,
                    is_empty: report.is_empty,
                    ready: report.ready.into_iter().collect(),
                };
                replication.post(to, Lane::Foreground, &message);
            }
            None => {}
        }
        if is_speaker && planner == Some(own) {
            self.plan_step();
        }
    }

    /// From now on this shard refuses what an older map asks for, if nothing of that time is under
    /// way any more.
    fn confirm_map(&mut self) {
        let now = self.now;
        let first = self.waiting.first_id();
        let Some(replication) = &mut self.replication else { return };
        let Some((at, mark)) = replication.moves.taken_over else { return };
        let moves = &mut replication.moves;
        moves.older.retain(|token| Rc::strong_count(token) > 1);
        let is_busy = !moves.older.is_empty() || first.is_some_and(|first| first < mark);
        if now < at.after_nanos(GRACE_NANOS) || is_busy {
            return;
        }
        let generation = replication.topology.generation();
        replication.moves.taken_over = None;
        replication.moves.confirmed = generation;
        replication.tracking.set_epoch(generation);
        replication.moves.next_report = now;
    }

    fn report(&self, map: &ClusterMap) -> Report {
        let Some(replication) = &self.replication else { return Report::default() };
        let Replication { topology, tracking, moves, .. } = &**replication;
        let view = View { shard: &self.shard, wall: self.wall };
        let mut report = Report {
            generation: topology.generation(),
            confirmed: moves.confirmed,
            is_empty: false,
            ready: BTreeSet::new(),
        };
        if map.generation != report.generation {
            return report;
        }
        let bits = topology.partition_bits();
        for partition in self.own_partitions() {
            let stage = topology.stage(partition);
            if stage == Stage::Settled {
                continue;
            }
            let Some(old) = topology.moves_here_from(partition) else { continue };
            let is_ready = match stage {
                Stage::Prepared => {
                    self.shard.seen(partition).is_empty() && !self.shard.is_busy(partition)
                }
                _ => {
                    let since = moves.coming.get(&partition).copied();
                    let since = since.unwrap_or(report.generation);
                    tracking.has_all_of(partition, &old, since, &view)
                        && !is_damaged(&self.shard, partition.range(bits))
                }
            };
            if is_ready {
                report.ready.insert(partition);
            }
        }
        report.is_empty = topology.is_leaving()
            && self.own_partitions().all(|partition| {
                !tracking.is_holder(partition)
                    && self.shard.seen(partition).is_empty()
                    && !self.shard.is_busy(partition)
            });
        report
    }

    /// A shard has said how far it is.
    pub(in crate::pump) fn take_report(&mut self, from: PeerShard, report: Report) {
        let now = self.now;
        if let Some(replication) = &mut self.replication {
            replication.moves.said.insert(from, (now, report));
        }
    }

    /// The same, of another node.
    pub(super) fn hear_moving(&mut self, from: PeerShard, message: &PeerMessage<'_>) {
        let PeerMessage::Moving { generation, confirmed, is_empty, ready } = message else {
            return;
        };
        let report = Report {
            generation: *generation,
            confirmed: *confirmed,
            is_empty: *is_empty,
            ready: ready.iter().copied().collect(),
        };
        self.take_report(from, report);
    }

    /// What the nodes have said of themselves lately, those of which all shards have.
    fn standings(&self) -> BTreeMap<NodeId, Standing> {
        let Some(replication) = &self.replication else { return BTreeMap::new() };
        let (topology, own_count) = (&replication.topology, self.map.count());
        let generation = topology.generation();
        let mut standings = BTreeMap::new();
        'nodes: for node in topology.nodes().iter().map(|node| node.id) {
            let count = match node == topology.own() {
                true => own_count,
                false => match replication.peers.get(&node) {
                    Some(peer) => peer.shard_count,
                    None => continue,
                },
            };
            let mut standing =
                Standing { confirmed: u32::MAX, is_empty: true, ..Standing::default() };
            for shard in 0..count {
                let said = replication.moves.said.get(&PeerShard { node, shard });
                let Some((_, report)) =
                    said.filter(|(at, _)| self.now.nanos_since(*at) < BELIEVED_NANOS)
                else {
                    continue 'nodes;
                };
                let is_of_this = report.generation == generation;
                standing.confirmed = standing.confirmed.min(report.confirmed);
                standing.is_empty &= report.is_empty && is_of_this;
                if is_of_this {
                    standing.ready.extend(report.ready.iter().copied());
                }
            }
            standings.insert(node, standing);
        }
        standings
    }

    /// Asks the holders whether there is a newer map than is known here, which is then taken over.
    fn read_register(&mut self) {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        if self.map.own() != SPEAKER || now < replication.moves.next_read {
            return;
        }
        replication.moves.next_read = now.after_nanos(READ_NANOS);
        if replication.planner() != Some(replication.topology.own()) {
            return;
        }
        // A step to the map that is known changes nothing.
        if let Some(known) = self.catalogue.map().map(Step::to) {
            self.submit_step(&known);
        }
    }

    fn submit_step(&mut self, step: &Step) {
        let Ok(arguments) = serde_json::to_string(step) else { return };
        // Nobody waits: what comes of it shows in the map.
        let (tell, _) = oneshot::channel();
        let deadline = self.now.after_nanos(STEP_DEADLINE_NANOS);
        self.change_namespaces(Origin::Task(tell), deadline, STEP, &arguments);
    }

    /// Plans the next step, and has the register take it.
    fn plan_step(&mut self) {
        let now = self.now;
        let cluster = self.facts.welcome.cluster;
        let standings = self.standings();
        let Some(replication) = &mut self.replication else { return };
        if now < replication.moves.next_step {
            return;
        }
        let Some(map) = self.catalogue.map() else { return };
        if map.generation != replication.topology.generation() {
            return;
        }
        let Some(step) =
            next(map, cluster, &replication.topology, &standings, replication.moves.rules)
        else {
            return;
        };
        replication.moves.next_step = now.after_nanos(STEP_NANOS);
        self.submit_step(&Step::to(&step));
    }

    /// Where this shard stands, for people.
    #[must_use]
    pub fn describe_moves(&self) -> String {
        let Some(map) = self.catalogue.map() else { return String::new() };
        let Some(replication) = &self.replication else { return String::new() };
        let Replication { topology, tracking, moves, sessions, .. } = &**replication;
        let view = View { shard: &self.shard, wall: self.wall };
        let mut text = format!(
            "map {} confirmed {} older {} planner {:?} ready {:?} said {:?}",
            topology.generation(),
            moves.confirmed,
            moves.older.len(),
            replication.planner(),
            self.report(map).ready,
            self.standings().iter().map(|(n, s)| (n.0, s.confirmed)).collect::<Vec<_>>(),
        );
        for partition in self.own_partitions() {
            if topology.stage(partition) != Stage::Settled
                && let Some(old) = topology.moves_here_from(partition)
            {
                text.push_str(&format!(
                    "; p{} {:?} from {old:?} holder {} empty {} busy {} all {} gap {} lag {:?} sync {} damaged {}",
                    partition.0,
                    topology.stage(partition),
                    tracking.is_holder(partition),
                    self.shard.seen(partition).is_empty(),
                    self.shard.is_busy(partition),
                    tracking.has_all_of(partition, &old, moves.confirmed, &view),
                    self.shard.has_gap(partition),
                    tracking.lagging(partition, &view),
                    sessions.iter().filter(|it| it.partition == partition).count(),
                    is_damaged(&self.shard, partition.range(topology.partition_bits())),
                ));
            }
        }
        text
    }

    /// A node works by an old map: it is told of the present one, not too often.
    pub(super) fn correct(&mut self, node: PeerShard) {
        let now = self.now;
        let own_shard = self.map.own();
        let Some(replication) = &mut self.replication else { return };
        if now >= replication.moves.next_telling {
            replication.moves.next_telling = now.after_nanos(TELL_NANOS);
            self.tell_settings(PeerShard { shard: own_shard.min(node.shard), ..node });
        }
    }
}
