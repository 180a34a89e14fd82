//! Repair: replicas that have seen the same writes are compared, and mended where they differ.
//!
//! ```text
//! shard's touched tokens -> trees -> Tree, TreeDone with the others -> keys that differ
//! Fetch -> SyncPage, or SyncPage unasked -> merged again, although their writes are seen
//! ```
//!
//! Namespaces of different numbers of copies have different holders, so each number has its own
//! trees and comparisons; the last bits of a message's id say which. Invariant: a tree hears of a
//! write before anything is said about it; a record is merged again only while its sender has seen
//! all that has been seen here, so that nothing that was deleted meanwhile comes back.
//!
//! Two contents of one version are the work of a fault. Here the majority of the replicas wins;
//! of two replicas, the greater one.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use annulus_cluster::NodeId;
use annulus_cluster::message::{PeerMessage, RecordPage, TreeResult};
use annulus_cluster::repair::sum::for_each_part;
use annulus_cluster::repair::{
    HashSeed, Local, Moment, Output, ReadId, RepairOptions, RepairStatus, Repairer, ScrubOptions,
    ScrubPosition, Sum, TreeAsked,
};
use annulus_cluster::tracking::{Convergence, PeerShard};
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::log::Lsn;
use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{
    Dot, Instant, Kind, NamespaceId, PartitionId, RecordRef, Token, TokenRange,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{MergedIn, ScanRequest, Shard, Touch};

use super::exchange::View;
use super::keys::LateRecords;
use crate::metrics::ShardSnapshot;
use crate::namespaces::Mode;
use crate::pump::{Done, Lane, Pump, TASKS_MAX};

/// Marks the ids of repair among those of `SyncPage`.
const REPAIR_ID: u64 = 1 << 63;
/// Soonest next look at what is due, in nanoseconds.
const LOOK_NANOS: u64 = 1_000_000;
/// How often the trees are told how many keys there are, in nanoseconds.
const SIZES_NANOS: u64 = 600_000_000_000;
/// Most bytes of records in one answer.
const PAGE_BYTES_MAX: usize = 4 << 20;
/// Most tokens taken from one request.
const TOKENS_MAX: usize = 1024;
/// What a record costs to read beside key and value, about, in bytes.
const RECORD_OVERHEAD: u64 = 32;
/// Most contents of records that are voted on at a time.
const VOTES_MAX: usize = 4096;

/// The trees of the namespaces with one number of copies.
struct Factor {
    repairer: Rc<RefCell<Repairer>>,
    namespaces: Rc<BTreeSet<NamespaceId>>,
}

/// Who has sent which content of a version.
#[derive(Default)]
struct Votes(BTreeMap<(Token, NamespaceId, Dot, u64), BTreeSet<NodeId>>);

impl Votes {
    /// How many have sent this content.
    fn count(&mut self, record: &RecordRef<'_>, content: Sum, from: NodeId) -> usize {
        if self.0.len() >= VOTES_MAX {
            self.0.clear();
        }
        let voters = self
            .0
            .entry((record.token, record.namespace, record.dot, content.digest()))
            .or_default();
        voters.insert(from);
        voters.len()
    }
}

/// The repair of one shard.
pub(super) struct Repair {
    factors: BTreeMap<u8, Factor>,
    /// Namespaces that were ever seen here: one of them that joins other trees has records.
    known: BTreeSet<NamespaceId>,
    votes: Rc<RefCell<Votes>>,
    /// What all ids of these trees have in common: of this life, and since trees were last made.
    id_base: u64,
    next_look: Instant,
    next_sizes: Instant,
}

/// What repair has to say, for `annulus repair --status` and the metrics.
#[derive(Clone, Debug, Default)]
pub struct RepairFigures {
    /// How far the replicas agree.
    pub convergence: Convergence,
    /// Partitions that wait until a damaged range was filled again.
    pub damaged: u32,
    /// What comparisons and reading have found.
    pub status: RepairStatus,
    /// Nodes because of which tombstones wait, with the number of partitions.
    pub waiting_for: BTreeMap<NodeId, u32>,
}

impl Repair {
    pub(super) fn new(life: u64, now: Instant) -> Repair {
        Repair {
            factors: BTreeMap::new(),
            known: BTreeSet::new(),
            votes: Rc::default(),
            id_base: REPAIR_ID | (life & 0x3FF) << 53,
            next_look: now,
            next_sizes: now.after_nanos(SIZES_NANOS),
        }
    }

    pub(super) fn next_timeout(&self) -> Instant {
        self.next_look
    }

    /// New trees count their questions from the first again: late answers must not pass for
    /// answers to theirs.
    fn begin_ids(&mut self) {
        let generation = ((self.id_base >> 48) + 1) & 0x1F;
        self.id_base = self.id_base >> 53 << 53 | generation << 48;
    }

    fn outer_id(&self, factor: u8, inner: u64) -> u64 {
        self.id_base | (inner & 0xFF_FFFF_FFFF) << 8 | u64::from(factor)
    }

    /// Of which number of copies, and which id, if it is one of this life.
    fn inner_id(&self, outer: u64) -> Option<(u8, u64)> {
        let is_own = outer >> 48 == self.id_base >> 48;
        is_own.then_some((outer.to_le_bytes()[0], outer >> 8 & 0xFF_FFFF_FFFF))
    }
}

/// Whether a `SyncPage` of this id belongs to repair.
pub(super) fn is_repair_id(id: u64) -> bool {
    id & REPAIR_ID != 0
}

/// The shard as the trees see it.
struct Standing<'a, D: Disk, R: Runtime> {
    shard: &'a Shard<D, R>,
    bits: u32,
    namespaces: &'a BTreeSet<NamespaceId>,
}

impl<D: Disk, R: Runtime> Local for Standing<'_, D, R> {
    fn seen_digest(&self, partition: PartitionId) -> Option<u64> {
        if is_damaged(self.shard, partition.range(self.bits)) {
            return None;
        }
        let mut digest = self.shard.with_seen(partition, SeenSet::digest);
        for namespace in self.namespaces {
            digest = (digest.rotate_left(5) ^ u64::from(namespace.0))
                .wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        Some(digest)
    }
}

/// Whether records of the range may be missing.
pub(super) fn is_damaged<D: Disk, R: Runtime>(shard: &Shard<D, R>, range: TokenRange) -> bool {
    shard.unknown_ranges().iter().any(|unknown| unknown.overlaps(&range))
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Partitions of this shard.
    pub(super) fn own_partitions(&self) -> impl Iterator<Item = PartitionId> + use<D, R> {
        let map = self.map;
        let all = (0..1u32 << map.partition_bits()).map(PartitionId);
        all.filter(move |partition| map.shard_of_partition(partition.0) == map.own())
    }

    /// Namespaces or placement have changed, or the shard is another one: trees follow.
    pub(super) fn place_trees(&mut self) {
        let (now, bits, own) = (self.now, self.map.partition_bits(), self.map.own());
        let seed = HashSeed(self.facts.welcome.hash_seed);
        let first = self.own_partitions().next();
        let Some(replication) = &mut self.replication else { return };
        let mut sets: BTreeMap<u8, BTreeSet<NamespaceId>> = BTreeMap::new();
        for namespace in self.catalogue.iter() {
            sets.entry(namespace.n).or_default().insert(namespace.id);
        }
        let repair = &mut replication.repair;
        repair.factors.retain(|factor, _| sets.contains_key(factor));
        let count = u32::try_from(sets.len().max(1)).unwrap_or(u32::MAX);
        for (factor, set) in sets {
            let is_new = |id: &&NamespaceId| !repair.known.contains(*id);
            if let Some(known) = repair.factors.get_mut(&factor)
                && set.is_superset(&known.namespaces)
                && set.difference(&known.namespaces).all(|id| is_new(&id))
            {
                known.namespaces = Rc::new(set);
                continue;
            }
            repair.begin_ids();
            let mut options = RepairOptions::default();
            let share = ScrubOptions::default().share_per_day_ppm / count;
            options.scrub.share_per_day_ppm = share;
            let jitter = u64::from(replication.topology.own().0) << 32
                | u64::from(own) << 8
                | u64::from(factor);
            // Where an earlier life had come to is not known: each begins elsewhere.
            let part = u32::try_from(repair.id_base >> 48 & 0x7FFF).unwrap_or(0);
            let part = part.wrapping_mul(0x9E37_79B9);
            let position = ScrubPosition { partition: first.unwrap_or_default(), part };
            let mut repairer = Repairer::new(options, bits, seed, jitter, position, now);
            let moment = Moment { now, wall: self.wall };
            for node in replication.topology.nodes().iter().map(|node| node.id) {
                if !replication.peers.contains_key(&node) {
                    repairer.peer_down(node, moment);
                }
            }
            let repairer = Rc::new(RefCell::new(repairer));
            repair.factors.insert(factor, Factor { repairer, namespaces: Rc::new(set) });
        }
        repair.known.extend(self.catalogue.iter().map(|namespace| namespace.id));
        self.size_trees();
    }

    /// All trees are made anew: the shard was opened again.
    pub(in crate::pump) fn replant_trees(&mut self) {
        let Some(replication) = &mut self.replication else { return };
        replication.repair.factors.clear();
        self.forget_refill();
        self.shard.watch_touched();
        self.place_trees();
    }

    /// Tells the trees their partitions, holders and sizes.
    fn size_trees(&mut self) {
        let stats = self.shard.stats();
        let keys = stats.table_records + stats.memory_keys as u64;
        let partitions: Vec<PartitionId> = self.own_partitions().collect();
        let each = (keys / (partitions.len() as u64).max(1)).max(u64::from(keys > 0));
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let topology = Rc::clone(&replication.topology);
        for (factor, trees) in &replication.repair.factors {
            let mut repairer = trees.repairer.borrow_mut();
            for partition in &partitions {
                let holders = topology.replicas(*partition, *factor);
                if holders.contains(&topology.own()) {
                    let others = holders.iter().copied().filter(|node| *node != topology.own());
                    repairer.set_partition(*partition, each, &others.collect::<Vec<_>>(), now);
                } else {
                    repairer.drop_partition(*partition);
                }
            }
        }
        replication.repair.next_look = now;
    }

    /// Trees hear of everything that became visible.
    fn hear_touched(&mut self) {
        let Some(replication) = &self.replication else { return };
        let factors = &replication.repair.factors;
        self.shard.drain_touched(|touch| {
            for Factor { repairer, .. } in factors.values() {
                match touch {
                    Touch::Token(token) => repairer.borrow_mut().touch(token),
                    Touch::Partition(partition) => repairer.borrow_mut().touch_all(partition),
                }
            }
        });
    }

    /// The records of a partition have changed otherwise than by writes.
    pub(super) fn touch_partition(&mut self, partition: PartitionId) {
        let Some(replication) = &self.replication else { return };
        for Factor { repairer, .. } in replication.repair.factors.values() {
            repairer.borrow_mut().touch_all(partition);
        }
    }

    /// Tells the trees of one number of copies of an event, and does what follows from it.
    fn repair(&mut self, factor: u8, act: impl FnOnce(&mut Repairer, Moment, &dyn Local)) {
        self.hear_touched();
        let moment = Moment { now: self.now, wall: self.wall };
        let Some(replication) = &self.replication else { return };
        let Some(trees) = replication.repair.factors.get(&factor) else { return };
        let repairer = Rc::clone(&trees.repairer);
        let bits = self.map.partition_bits();
        let local = Standing { shard: &self.shard, bits, namespaces: &trees.namespaces };
        act(&mut repairer.borrow_mut(), moment, &local);
        loop {
            // Not in the loop's head: the borrow would last for the body.
            let output = repairer.borrow_mut().next_output();
            let Some(output) = output else { break };
            self.carry_out_repair(factor, &repairer, output);
        }
        let wake = repairer.borrow().wake_at().max(self.now.after_nanos(LOOK_NANOS));
        if let Some(replication) = &mut self.replication {
            replication.repair.next_look = replication.repair.next_look.min(wake);
        }
    }

    /// Does what is due.
    pub(super) fn repair_turn(&mut self) {
        self.hear_touched();
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let repair = &mut replication.repair;
        if now >= repair.next_sizes {
            repair.next_sizes = now.after_nanos(SIZES_NANOS);
            return self.size_trees();
        }
        if now < repair.next_look {
            return;
        }
        repair.next_look = Instant(u64::MAX);
        let factors: Vec<u8> = repair.factors.keys().copied().collect();
        for factor in factors {
            self.repair(factor, |repairer, moment, local| repairer.poll(moment, local));
        }
    }

    /// Compares all partitions now, those of one number of copies or of all; reads all if `scrub`.
    /// A node of its own has nothing to compare with.
    pub fn start_repair(&mut self, only: Option<u8>, scrub: bool) {
        let Some(replication) = &self.replication else {
            if scrub {
                self.shard.scrub_all();
            }
            return;
        };
        let factors: Vec<u8> = replication.repair.factors.keys().copied().collect();
        for factor in factors.into_iter().filter(|factor| only.is_none_or(|it| it == *factor)) {
            self.repair(factor, |repairer, moment, local| {
                repairer.start_all(moment.now, scrub);
                repairer.poll(moment, local);
            });
        }
    }

    pub(super) fn repair_peer_down(&mut self, node: NodeId) {
        let Some(replication) = &self.replication else { return };
        let factors: Vec<u8> = replication.repair.factors.keys().copied().collect();
        for factor in factors {
            self.repair(factor, |repairer, moment, _| repairer.peer_down(node, moment));
        }
    }

    pub(super) fn repair_peer_up(&mut self, node: NodeId) {
        let Some(replication) = &self.replication else { return };
        for Factor { repairer, .. } in replication.repair.factors.values() {
            repairer.borrow_mut().peer_up(node);
        }
    }

    fn carry_out_repair(&mut self, factor: u8, repairer: &Rc<RefCell<Repairer>>, output: Output) {
        match output {
            Output::Send { to, message } => self.send_compared(factor, to, message),
            Output::Push { to, partition, tokens } => {
                let Some(replication) = &self.replication else { return };
                let Some(to) = replication.peer_shard(to, partition) else { return };
                self.serve_tokens(to, REPAIR_ID, partition, tokens);
            }
            Output::Read { id, range, .. } => self.read_for_trees(factor, repairer, id, range),
            Output::Fault { partition, peer, missing_here, missing_there, differing } => {
                tracing::warn!(
                    partition = partition.0,
                    node = peer.0,
                    missing_here,
                    missing_there,
                    differing,
                    "replicas that have seen the same writes held different records"
                );
            }
            Output::Unknown { partition, range, why } => {
                tracing::warn!(
                    partition = partition.0,
                    first = %range.first,
                    last = %range.last,
                    ?why,
                    "records are not to be trusted"
                );
                self.look_for_damage();
            }
        }
    }

    fn send_compared(&mut self, factor: u8, to: NodeId, mut message: PeerMessage<'static>) {
        let own = self.map.own();
        let Some(replication) = &mut self.replication else { return };
        if let PeerMessage::Tree { id, .. } | PeerMessage::Fetch { id, .. } = &mut message {
            *id = replication.repair.outer_id(factor, *id);
        }
        // Shards that compare have the same number, as those that announce to each other.
        if replication.peers.get(&to).is_some_and(|peer| own < peer.shard_count) {
            replication.post(PeerShard { node: to, shard: own }, Lane::Background, &message);
        }
    }

    fn read_for_trees(
        &mut self,
        factor: u8,
        repairer: &Rc<RefCell<Repairer>>,
        id: ReadId,
        range: TokenRange,
    ) {
        let Some(replication) = &self.replication else { return };
        let Some(trees) = replication.repair.factors.get(&factor) else { return };
        let (shard, namespaces) = (self.shard.clone(), Rc::clone(&trees.namespaces));
        let repairer = Rc::clone(repairer);
        self.spawn(async move {
            let mut bytes = 0;
            let request = ScanRequest { range, after: None, namespace: None };
            let scanned = shard
                .scan(&request, &mut |record| {
                    bytes += (record.key.len() + record.value.len()) as u64 + RECORD_OVERHEAD;
                    if namespaces.contains(&record.namespace) {
                        repairer.borrow_mut().read_record(id, record);
                    }
                    true
                })
                .await;
            Done::RepairRead { factor, repairer, id, read: scanned.map(|_| bytes) }
        });
    }

    /// A scan for the trees has ended.
    pub(in crate::pump) fn repair_read(
        &mut self,
        factor: u8,
        repairer: &Rc<RefCell<Repairer>>,
        id: ReadId,
        read: Result<u64, Error>,
    ) {
        let Some(replication) = &self.replication else { return };
        let trees = replication.repair.factors.get(&factor);
        if trees.is_none_or(|trees| !Rc::ptr_eq(&trees.repairer, repairer)) {
            return;
        }
        self.repair(factor, |repairer, moment, local| match read {
            Ok(bytes) => repairer.read_done(id, bytes, moment, local),
            Err(error) => {
                tracing::warn!(%error, "records could not be read to compare them");
                repairer.read_failed(id, moment, local);
            }
        });
    }

    /// A message of repair.
    pub(super) fn repair_message(&mut self, from: PeerShard, message: &PeerMessage<'_>) {
        match message {
            PeerMessage::Tree { id, partition, seen_digest, level, index } => {
                let factor = id.to_le_bytes()[0];
                let asked = TreeAsked {
                    id: *id,
                    partition: *partition,
                    seen_digest: *seen_digest,
                    level: *level,
                    index: *index,
                };
                self.repair(factor, |repairer, moment, local| {
                    repairer.tree_asked(from.node, asked, moment, local);
                });
            }
            PeerMessage::TreeDone { id, result } => self.tree_done(from, *id, result),
            PeerMessage::Fetch { id, partition, tokens } => {
                let range = partition.range(self.map.partition_bits());
                let is_ours = self.map.shard_of_partition(partition.0) == self.map.own();
                if !is_ours
                    || !is_repair_id(*id)
                    || tokens.iter().any(|token| !range.contains(*token))
                {
                    return self.count_peer_refusal(from);
                }
                let tokens = tokens.iter().copied().take(TOKENS_MAX).collect();
                self.serve_tokens(from, *id, *partition, tokens);
            }
            _ => {}
        }
    }

    fn tree_done(&mut self, from: PeerShard, id: u64, result: &TreeResult) {
        let Some(replication) = &self.replication else { return };
        let Some((factor, inner)) = replication.repair.inner_id(id) else { return };
        self.repair(factor, |repairer, moment, local| {
            repairer.tree_answered(from.node, inner, result, moment, local);
        });
    }

    /// Sends the records of these tokens, as they are stored, of namespaces that both hold.
    fn serve_tokens(
        &mut self,
        to: PeerShard,
        id: u64,
        partition: PartitionId,
        mut tokens: Vec<Token>,
    ) {
        if self.tasks.len() >= TASKS_MAX {
            return;
        }
        let own = self.map.own();
        let Some(replication) = &self.replication else { return };
        let mut wanted = self.namespaces_of(partition, replication.topology.own());
        let theirs = self.namespaces_of(partition, to.node);
        wanted.retain(|namespace| theirs.contains(namespace));
        debug_assert_eq!(self.map.shard_of_partition(partition.0), own);
        tokens.sort_unstable();
        tokens.dedup();
        // As of before the records are read: what it holds they show.
        let mut seen = Vec::new();
        self.shard.with_seen(partition, |set| set.encode(&mut seen));
        let (shard, incarnation) = (self.shard.clone(), self.shard.incarnation(partition));
        self.spawn(async move {
            let mut page = RecordPage::new();
            for token in tokens {
                let range = TokenRange { first: token, last: token };
                let request = ScanRequest { range, after: None, namespace: None };
                let scanned = shard
                    .scan(&request, &mut |record| {
                        if wanted.contains(&record.namespace) {
                            page.push(record);
                        }
                        page.size() < PAGE_BYTES_MAX
                    })
                    .await;
                if let Err(error) = scanned {
                    return Done::SyncServed { to, page: Err(error) };
                }
                if page.size() >= PAGE_BYTES_MAX {
                    break;
                }
            }
            let mut bytes = Vec::with_capacity(page.size() + seen.len() + 64);
            PeerMessage::SyncPage {
                id,
                partition,
                records: page.list(),
                next: None,
                seen: &seen,
                helper_incarnation: incarnation,
            }
            .encode(&mut bytes);
            Done::SyncServed { to, page: Ok(bytes) }
        });
    }

    /// Records have come that were asked for, or that the sender believes to be missing here.
    pub(super) fn take_repair_page(
        &mut self,
        from: PeerShard,
        message: &PeerMessage<'_>,
        raw: &[u8],
    ) {
        let PeerMessage::SyncPage { id, partition, records, seen, .. } = message else { return };
        let Some(replication) = &self.replication else { return };
        let fetched = replication.repair.inner_id(*id);
        let is_pushed = *id == REPAIR_ID;
        let is_awaited = fetched.is_some_and(|(factor, inner)| {
            let trees = replication.repair.factors.get(&factor);
            trees.is_some_and(|trees| trees.repairer.borrow().is_fetch(from.node, inner))
        });
        if !(is_pushed || is_awaited) || self.tasks.len() >= TASKS_MAX {
            return;
        }
        let partition = *partition;
        let is_ours = self.map.shard_of_partition(partition.0) == self.map.own();
        let range = partition.range(self.map.partition_bits());
        let is_sound = |record: &RecordRef<'_>| {
            range.contains(record.token) && self.check_peer_record(record).is_ok()
        };
        let (true, Ok(seen)) = (is_ours, SeenSet::decode(seen)) else {
            return self.count_peer_refusal(from);
        };
        if !records.iter().all(|record| is_sound(&record)) {
            return self.count_peer_refusal(from);
        }
        let held = self.namespaces_of(partition, replication.topology.own());
        let copies = |n: u8| replication.topology.replicas(partition, n).len();
        let namespaces: BTreeMap<NamespaceId, (Mode, usize)> = self
            .catalogue
            .iter()
            .filter(|namespace| held.contains(&namespace.id))
            .map(|namespace| (namespace.id, (namespace.mode, copies(namespace.n))))
            .collect();
        let merge = MergeAgain {
            late: replication.keys.late(),
            shard: self.shard.clone(),
            runtime: self.runtime.clone(),
            partition,
            from: from.node,
            seen,
            namespaces,
            seed: HashSeed(self.facts.welcome.hash_seed),
            votes: Rc::clone(&replication.repair.votes),
        };
        let (raw, id) = (raw.to_vec(), *id);
        self.spawn(async move {
            let merged = merge.page(&raw).await;
            Done::RepairMerged { from, id, merged }
        });
    }

    /// Records of repair have been merged.
    pub(in crate::pump) fn repair_merged(
        &mut self,
        from: PeerShard,
        id: u64,
        merged: Result<u64, Error>,
    ) {
        let count = match merged {
            Ok(count) => count,
            Err(error) => {
                tracing::warn!(%error, "what repair brought could not be merged");
                0
            }
        };
        self.metrics.borrow_mut().counters.repaired_records += count;
        let Some(replication) = &self.replication else { return };
        if let Some((factor, inner)) = replication.repair.inner_id(id) {
            self.repair(factor, |repairer, moment, local| {
                repairer.fetched(from.node, inner, count, moment, local);
            });
        }
    }

    /// What repair has to say. Looks at every partition.
    #[must_use]
    pub fn repair_figures(&self) -> Option<RepairFigures> {
        let replication = self.replication.as_ref()?;
        let view = View { shard: &self.shard, wall: self.wall };
        let mut status = RepairStatus::default();
        for Factor { repairer, .. } in replication.repair.factors.values() {
            add_status(&mut status, &repairer.borrow().status());
        }
        let damaged = self.damaged_partitions();
        Some(RepairFigures {
            convergence: replication.tracking.convergence(&view),
            damaged,
            status,
            waiting_for: replication.tracking.tombstones_waiting_for(&view),
        })
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Partitions of this shard with a range that cannot be read.
    pub(in crate::pump) fn damaged_partitions(&self) -> u32 {
        let unknown = self.shard.unknown_ranges();
        if unknown.is_empty() {
            return 0;
        }
        let bits = self.map.partition_bits();
        let is_damaged = |partition: &PartitionId| {
            unknown.iter().any(|range| range.overlaps(&partition.range(bits)))
        };
        u32::try_from(self.own_partitions().filter(is_damaged).count()).unwrap_or(u32::MAX)
    }

    /// What a node of its own has to say instead of [`RepairFigures`].
    pub(in crate::pump) fn note_scrub_in(&self, snapshot: &mut ShardSnapshot) {
        let scrubbed = self.shard.stats().counters;
        let counters = &mut snapshot.metrics.counters;
        counters.scrubbed_leaves = scrubbed.scrubbed_pieces;
        counters.scrub_damaged = scrubbed.scrub_damaged;
        counters.repair_read_bytes = scrubbed.scrubbed_bytes;
        snapshot.gauges.scrub_bytes_left = self.shard.scrub_bytes_left();
        snapshot.gauges.partitions_damaged = self.damaged_partitions().into();
    }
}

impl RepairFigures {
    /// Puts it beside the shard's other numbers.
    pub(in crate::pump) fn note_in(&self, snapshot: &mut ShardSnapshot) {
        let RepairFigures { convergence, damaged, status, waiting_for } = self;
        let counters = &mut snapshot.metrics.counters;
        counters.repair_rounds = status.rounds;
        counters.repair_faults = status.faults;
        counters.repair_keys_differing = status.keys_differing;
        counters.repair_bytes = status.bytes_sent + status.bytes_received;
        counters.repair_read_bytes = status.read_bytes;
        counters.scrubbed_leaves = status.scrub.leaves;
        counters.scrub_damaged = status.damaged;
        counters.scrub_mismatches = status.mismatches;
        let gauges = &mut snapshot.gauges;
        gauges.partitions_held = convergence.held.into();
        gauges.partitions_in_sync = convergence.in_sync.into();
        gauges.partitions_behind = convergence.behind.into();
        gauges.partitions_ahead = convergence.ahead.into();
        gauges.partitions_unknown = convergence.unknown.into();
        gauges.partitions_hosted = convergence.hosted.into();
        gauges.partitions_damaged = (*damaged).into();
        gauges.writes_lacked = convergence.writes_lacked;
        gauges.syncs = convergence.syncs.into();
        gauges.repair_pairs = status.pairs;
        gauges.repair_checked = status.checked;
        gauges.repair_differing = status.differing;
        gauges.repair_open = status.open;
        gauges.repair_dirty_leaves = status.dirty_leaves;
        gauges.repair_tree_bytes = status.tree_bytes;
        gauges.scrub_demanded = status.scrub.demanded;
        snapshot.tombstones_waiting_for =
            waiting_for.iter().map(|(node, count)| (node.0, (*count).into())).collect();
    }
}

/// Adds other trees' figures.
fn add_status(sum: &mut RepairStatus, other: &RepairStatus) {
    macro_rules! add {
        ($($name:ident),+) => { $(sum.$name += other.$name;)+ };
    }
    add!(pairs, checked, differing, open, rounds, equal, faults, partly, not_comparable);
    add!(unreachable, malformed, keys_differing, keys_fetched, keys_pushed, bytes_sent);
    add!(bytes_received, reads, read_bytes, damaged, mismatches, dirty_leaves, leaves, tree_bytes);
    sum.last_round = sum.last_round.max(other.last_round);
    sum.scrub.leaves += other.scrub.leaves;
    sum.scrub.bytes += other.scrub.bytes;
    sum.scrub.cycles += other.scrub.cycles;
    sum.scrub.demanded += other.scrub.demanded;
}

/// A page of records to be merged although their writes are seen.
struct MergeAgain<D: Disk, R: Runtime> {
    late: LateRecords,
    shard: Shard<D, R>,
    runtime: R,
    partition: PartitionId,
    from: NodeId,
    /// What the sender had seen before it read them.
    seen: SeenSet,
    /// Those held here: their mode, and how many copies there are.
    namespaces: BTreeMap<NamespaceId, (Mode, usize)>,
    seed: HashSeed,
    votes: Rc<RefCell<Votes>>,
}

impl<D: Disk, R: Runtime> MergeAgain<D, R> {
    /// Merges them, and waits until all is visible. Gives how many were news.
    async fn page(&self, raw: &[u8]) -> Result<u64, Error> {
        let (mut last, mut count) = (Lsn(0), 0);
        let Ok(PeerMessage::SyncPage { records, .. }) = PeerMessage::decode(raw) else {
            return Ok(0);
        };
        for record in records.iter() {
            if let Some(lsn) = self.merge(&record).await? {
                last = last.max(lsn);
                count += 1;
            }
        }
        self.shard.wait_visible(last).await?;
        Ok(count)
    }

    async fn merge(&self, record: &RecordRef<'_>) -> Result<Option<Lsn>, Error> {
        let Some((mode, copies)) = self.namespaces.get(&record.namespace) else { return Ok(None) };
        let is_current = || self.seen.covers(&self.shard.seen(self.partition));
        if record.kind == Kind::Siblings || *mode == Mode::Siblings {
            if !is_current() {
                return Ok(None);
            }
            return Ok(match self.shard.merge_state_again(record).await? {
                MergedIn::Applied(lsn) => Some(lsn),
                MergedIn::Duplicate => None,
            });
        }
        let found = self.shard.get(record.token, record.namespace, record.key).await;
        let found = match found {
            Ok(found) => found,
            // Its whole range is filled again otherwise.
            Err(Error::Corrupt { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let is_wanted = match &found {
            None => true,
            Some(ours) if ours.as_ref().version() != record.version() => {
                record.version() > ours.as_ref().version()
            }
            Some(ours) => self.prefers(record, &ours.as_ref(), *copies),
        };
        // From the check on nothing awaits, so nobody comes in between.
        if !is_wanted || !is_current() {
            return Ok(None);
        }
        let wall = self.runtime.wall();
        match mode {
            Mode::Linearizable => self.late.merge(&self.shard, record, wall),
            Mode::Lww | Mode::Siblings => self.shard.merge_again(record, wall).map(Some),
        }
    }

    /// Whether of two contents of one version the other is to stand.
    fn prefers(&self, theirs: &RecordRef<'_>, ours: &RecordRef<'_>, copies: usize) -> bool {
        let sum_of = |record: &RecordRef<'_>| {
            let mut sum = Sum::ZERO;
            for_each_part(record, self.seed, |_, part| sum += part);
            sum
        };
        let (content, own) = (sum_of(theirs), sum_of(ours));
        if content == own {
            return false;
        }
        let votes = self.votes.borrow_mut().count(theirs, content, self.from);
        if copies <= 2 { content.0 > own.0 } else { votes > copies / 2 }
    }
}
