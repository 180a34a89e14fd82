//! The repair of one shard: rounds of comparisons with the other replicas of its partitions.
//!
//! Each partition is compared with each other replica once in an interval, spread over it. Both
//! sides answer only if they have seen the same writes at that moment, so a difference is a fault,
//! never a race: our side of a question is kept as it was when the question went out, and the
//! other side answers for the same set of writes or not at all. A round goes from the root down to
//! lists of keys, fetches the keys that the other replica has otherwise, and sends it ours.
//!
//! Invariant: messages may be lost, doubled, late or out of order. Numbers tell an answer that is
//! waited for from any other; what gets no answer is asked again, and in the end left to the next
//! round.
//!
//! The caller gives events and the time, and does what [`Repairer::next_output`] says.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use annulus_engine::model::{Instant, PartitionId, RecordRef, Token};

use super::compare::{Question, compare};
use super::events::{Local, Moment, Output, RepairOptions, Suspicion, TreeAsked};
use super::merkle::{MerkleTree, Node};
use super::reading::Finished;
use super::reads::{ReadId, Reads};
use super::scrub::{ScrubPosition, Scrubber};
use super::status::{LastRound, Outcome, RepairStatus};
use super::sum::{HashSeed, Hour};
use super::walk::{Pair, Step, Walk};
use crate::member::NodeId;
use crate::message::{PeerMessage, TreeResult};

mod rounds;

/// Questions that wait for a scan, of all replicas together.
const ANSWERS_WAITING_MAX: usize = 64;
/// Rounds that may wait for scans or pauses, for each that may talk.
const WAITING_PER_OPEN: usize = 16;
/// Bytes of a frame around a message.
const FRAME_SIZE: u64 = 24;

/// What is missing to answer a question.
#[derive(Clone, Copy, Debug)]
enum Missing {
    /// This dirty leaf, and perhaps others.
    Leaf(Node),
    /// The inside of the node, which lies below the leaves.
    Detail,
    /// The replicas cannot be compared.
    Nothing,
}

/// See the module. One for each shard.
#[derive(Clone, Debug)]
pub struct Repairer {
    options: RepairOptions,
    partition_bits: u32,
    seed: HashSeed,
    /// Spreads the rounds.
    jitter: u64,
    trees: BTreeMap<PartitionId, MerkleTree>,
    /// Where to look for a dirty leaf next.
    cursors: BTreeMap<PartitionId, u32>,
    pairs: BTreeMap<Pair, Option<LastRound>>,
    due: BTreeSet<(Instant, Pair)>,
    down: BTreeSet<NodeId>,
    walks: BTreeMap<Pair, Walk>,
    reads: Reads,
    /// Questions that wait until their node has been read.
    asked: Vec<(NodeId, TreeAsked, Question)>,
    outputs: VecDeque<Output>,
    next_id: u64,
    hour: Hour,
    counters: RepairStatus,
}

impl Repairer {
    /// A repair of no partition yet. `jitter` should differ among nodes and shards; `position` is
    /// where the scrubber had come to.
    #[must_use]
    pub fn new(
        options: RepairOptions,
        partition_bits: u32,
        seed: HashSeed,
        jitter: u64,
        position: ScrubPosition,
        now: Instant,
    ) -> Repairer {
        let scrubber = Scrubber::new(options.scrub, position, now);
        Repairer {
            options,
            partition_bits,
            seed,
            jitter,
            trees: BTreeMap::new(),
            cursors: BTreeMap::new(),
            pairs: BTreeMap::new(),
            due: BTreeSet::new(),
            down: BTreeSet::new(),
            walks: BTreeMap::new(),
            reads: Reads::new(options.read_bytes_per_second, scrubber),
            asked: Vec::new(),
            outputs: VecDeque::new(),
            next_id: 0,
            hour: Hour(0),
            counters: RepairStatus::default(),
        }
    }

    /// The shard holds a partition of about `keys` keys, of which `peers` are the other replicas.
    /// Called again when any of it changes. A new one is unread, or empty if `keys` is 0.
    pub fn set_partition(
        &mut self,
        partition: PartitionId,
        keys: u64,
        peers: &[NodeId],
        now: Instant,
    ) {
        let (bits, seed) = (self.partition_bits, self.seed);
        match self.trees.get_mut(&partition) {
            Some(tree) => {
                if tree.resize(keys) {
                    self.start_over(partition, now);
                }
            }
            None if keys == 0 => {
                self.trees.insert(partition, MerkleTree::empty(partition, bits, keys, seed));
            }
            None => {
                self.trees.insert(partition, MerkleTree::unread(partition, bits, keys, seed));
            }
        }
        let range = (partition, NodeId(0))..=(partition, NodeId(u32::MAX));
        let known: Vec<Pair> = self.pairs.range(range).map(|(pair, _)| *pair).collect();
        for pair in known.iter().filter(|(_, peer)| !peers.contains(peer)) {
            self.forget_pair(*pair);
        }
        for peer in peers {
            let pair = (partition, *peer);
            if let Entry::Vacant(place) = self.pairs.entry(pair) {
                place.insert(None);
                let wait = self.chance(pair) % self.options.interval_nanos.max(1);
                self.due.insert((now.after_nanos(wait), pair));
            }
        }
    }

    /// The tree of a partition was cut anew: what was to be read of it is no leaf any more.
    fn start_over(&mut self, partition: PartitionId, now: Instant) {
        self.cursors.remove(&partition);
        self.reads.forget(partition);
        self.asked.retain(|(_, asked, _)| asked.partition != partition);
        for walk in self.walks.values_mut().filter(|walk| walk.pair.0 == partition) {
            if matches!(walk.step, Step::Reading(_)) {
                walk.step = Step::Paused(now);
            }
        }
    }

    /// The shard no longer holds a partition.
    pub fn drop_partition(&mut self, partition: PartitionId) {
        self.trees.remove(&partition);
        self.start_over(partition, Instant(0));
        let range = (partition, NodeId(0))..=(partition, NodeId(u32::MAX));
        let pairs: Vec<Pair> = self.pairs.range(range).map(|(pair, _)| *pair).collect();
        pairs.into_iter().for_each(|pair| self.forget_pair(pair));
    }

    fn forget_pair(&mut self, pair: Pair) {
        self.pairs.remove(&pair);
        self.walks.remove(&pair);
        self.due.retain(|(_, due)| *due != pair);
    }

    /// A write has become visible and is marked as seen; what it replaced is not known.
    pub fn touch(&mut self, token: Token) {
        if let Some(tree) = self.trees.get_mut(&token.partition(self.partition_bits)) {
            tree.touch(token);
        }
    }

    /// Anything may have been written to the partition.
    pub fn touch_all(&mut self, partition: PartitionId) {
        if let Some(tree) = self.trees.get_mut(&partition) {
            tree.touch_all();
        }
    }

    /// The partitions of which trees are kept.
    pub fn partitions(&self) -> impl Iterator<Item = PartitionId> + '_ {
        self.trees.keys().copied()
    }

    /// As [`Repairer::touch`], where the former record is known; `None`: there was none, or is
    /// none any more.
    pub fn apply(&mut self, old: Option<&RecordRef<'_>>, new: Option<&RecordRef<'_>>) {
        let Some(token) = new.or(old).map(|record| record.token) else { return };
        if let Some(tree) = self.trees.get_mut(&token.partition(self.partition_bits)) {
            tree.apply(old, new);
        }
    }

    /// The tree of a partition.
    #[must_use]
    pub fn tree(&self, partition: PartitionId) -> Option<&MerkleTree> {
        self.trees.get(&partition)
    }

    /// A node cannot be reached: nothing is asked of it for now.
    pub fn peer_down(&mut self, node: NodeId, moment: Moment) {
        self.down.insert(node);
        let pairs: Vec<Pair> =
            self.walks.keys().filter(|(_, peer)| *peer == node).copied().collect();
        for pair in pairs {
            if let Some(walk) = self.walks.remove(&pair) {
                self.end(walk, Outcome::Unreachable, moment);
            }
        }
    }

    /// A node can be reached again.
    pub fn peer_up(&mut self, node: NodeId) {
        self.down.remove(&node);
    }

    /// Compares everything now, and reads everything if `scrub`.
    pub fn start_all(&mut self, now: Instant, scrub: bool) {
        let open = &self.walks;
        self.due = self.pairs.keys().filter(|p| !open.contains_key(p)).map(|p| (now, *p)).collect();
        if scrub {
            let leaves = self.trees.values().map(|tree| 1 << tree.leaf_bits()).sum();
            self.reads.scrubber.demand(now, leaves);
        }
    }

    /// Does what is due. To be called at [`Repairer::wake_at`] and after each event.
    pub fn poll(&mut self, moment: Moment, local: &dyn Local) {
        self.note_hour(moment);
        self.expire_walks(moment, local);
        while self.may_start()
            && let Some((due, pair)) = self.due.first().copied()
            && due <= moment.now
        {
            self.due.remove(&(due, pair));
            if self.down.contains(&pair.1) {
                self.end(Walk::new(pair, 0), Outcome::Unreachable, moment);
            } else {
                self.advance(Walk::new(pair, self.options.reads_max), moment, local);
            }
        }
        if let Some(open) = self.reads.open_next(moment.now, self.hour, &self.trees) {
            self.outputs.push_back(Output::Read {
                id: open.id,
                partition: open.partition,
                range: open.reading.range(),
                purpose: open.purpose,
            });
        }
    }

    /// Whether one more round may begin. Those that wait for scans do not hold up the others.
    fn may_start(&self) -> bool {
        let talks = |walk: &&Walk| matches!(walk.step, Step::Asked { .. } | Step::Fetching { .. });
        self.walks.values().filter(talks).count() < self.options.open_max
            && self.walks.len() < self.options.open_max * WAITING_PER_OPEN
    }

    /// When [`Repairer::poll`] has something to do, if no event comes before.
    #[must_use]
    pub fn wake_at(&self) -> Instant {
        let walks = self.walks.values().map(|walk| walk.wake_at(self.options.timeout_nanos));
        let due = self.due.first().filter(|_| self.may_start()).map(|(due, _)| *due);
        let wake = walks.chain(due).min().unwrap_or(Instant(u64::MAX));
        wake.min(self.reads.wake_at())
    }

    /// What the caller has to do next.
    pub fn next_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// `Tree` came in.
    pub fn tree_asked(
        &mut self,
        from: NodeId,
        asked: TreeAsked,
        moment: Moment,
        local: &dyn Local,
    ) {
        self.note_hour(moment);
        let TreeAsked { id, partition, seen_digest, level, index } = asked;
        let message = PeerMessage::Tree { id, partition, seen_digest, level, index };
        self.counters.bytes_received += size_of_message(&message);
        match Question::of_message(level, index) {
            Ok(question) => self.answer(from, asked, question, true, local),
            Err(_) => self.counters.malformed += 1,
        }
        self.poll(moment, local);
    }

    /// `TreeDone` came in.
    pub fn tree_answered(
        &mut self,
        from: NodeId,
        id: u64,
        result: &TreeResult,
        moment: Moment,
        local: &dyn Local,
    ) {
        self.note_hour(moment);
        let bytes = size_of_message(&PeerMessage::TreeDone { id, result: result.clone() });
        self.counters.bytes_received += bytes;
        let is_awaited = |walk: &&Walk| {
            walk.pair.1 == from && matches!(walk.step, Step::Asked { id: open, .. } if open == id)
        };
        let Some(pair) = self.walks.values().find(is_awaited).map(|walk| walk.pair) else {
            // Late or doubled.
            return;
        };
        let Some(mut walk) = self.walks.remove(&pair) else { return };
        walk.bytes += bytes;
        if let Step::Asked { question, own, .. } = std::mem::replace(&mut walk.step, Step::Ready) {
            let range = question.node.range(pair.0, self.partition_bits);
            self.compared(walk, question, compare(question, range, &own, result), moment, local);
        }
        self.poll(moment, local);
    }

    /// Whether a `SyncPage` with this number answers a `Fetch` of ours.
    #[must_use]
    pub fn is_fetch(&self, from: NodeId, id: u64) -> bool {
        self.fetching(from, id).is_some()
    }

    fn fetching(&self, from: NodeId, id: u64) -> Option<Pair> {
        let is_it = |walk: &&Walk| {
            walk.pair.1 == from
                && matches!(walk.step, Step::Fetching { id: open, .. } if open == id)
        };
        self.walks.values().find(is_it).map(|walk| walk.pair)
    }

    /// The `SyncPage` that answers a `Fetch` came in, and its records have been merged.
    pub fn fetched(
        &mut self,
        from: NodeId,
        id: u64,
        records: u64,
        moment: Moment,
        local: &dyn Local,
    ) {
        self.note_hour(moment);
        let walk = self.fetching(from, id).and_then(|pair| self.walks.remove(&pair));
        if let Some(mut walk) = walk {
            self.counters.keys_fetched += records;
            walk.step = Step::Ready;
            walk.tries = 0;
            self.advance(walk, moment, local);
        }
        self.poll(moment, local);
    }

    /// A record of an open scan.
    pub fn read_record(&mut self, id: ReadId, record: &RecordRef<'_>) {
        if let Some(reading) = self.reads.reading(id) {
            reading.add(record);
        }
    }

    /// An open scan has shown all its records, for which `bytes` were read.
    pub fn read_done(&mut self, id: ReadId, bytes: u64, moment: Moment, local: &dyn Local) {
        self.note_hour(moment);
        let Some(open) = self.reads.close(id, moment.now, bytes) else { return };
        self.counters.reads += 1;
        self.counters.read_bytes += bytes;
        let partition = open.partition;
        let Some(tree) = self.trees.get_mut(&partition) else { return };
        let finished = tree.finish_reading(&open.reading, self.hour);
        if finished == Finished::Differs {
            self.counters.mismatches += 1;
            let (range, why) = (open.reading.range(), Suspicion::Mismatch);
            self.outputs.push_back(Output::Unknown { partition, range, why });
        }
        let node = open.reading.node();
        if finished != Finished::Overtaken {
            self.cursors.insert(partition, node.ancestor(tree.leaf_bits()).index + 1);
            self.reads.keep(partition, open.reading.into_detail());
        }
        self.go_on_after(partition, node, moment, local);
    }

    /// An open scan met a block that cannot be read.
    pub fn read_failed(&mut self, id: ReadId, moment: Moment, local: &dyn Local) {
        self.note_hour(moment);
        let Some(open) = self.reads.close(id, moment.now, 0) else { return };
        self.counters.damaged += 1;
        let (partition, node) = (open.partition, open.reading.node());
        let Some(tree) = self.trees.get_mut(&partition) else { return };
        if node.level >= tree.leaf_bits() {
            tree.mark_dirty(node);
        }
        let (range, why) = (open.reading.range(), Suspicion::Damaged);
        self.outputs.push_back(Output::Unknown { partition, range, why });
        for pair in self.waiting_for(partition, node) {
            if let Some(walk) = self.walks.remove(&pair) {
                self.end(walk, Outcome::NotComparable, moment);
            }
        }
        self.go_on_after(partition, node, moment, local);
    }

    /// Continues what waited for a scan of this node.
    fn go_on_after(
        &mut self,
        partition: PartitionId,
        node: Node,
        moment: Moment,
        local: &dyn Local,
    ) {
        for pair in self.waiting_for(partition, node) {
            if let Some(walk) = self.walks.remove(&pair) {
                self.advance(walk, moment, local);
            }
        }
        let asked = std::mem::take(&mut self.asked);
        for (from, asked, question) in asked {
            if asked.partition == partition && question.node == node {
                self.answer(from, asked, question, false, local);
            } else {
                self.asked.push((from, asked, question));
            }
        }
        self.poll(moment, local);
    }

    fn waiting_for(&self, partition: PartitionId, node: Node) -> Vec<Pair> {
        let waits = |walk: &&Walk| {
            walk.pair.0 == partition && matches!(walk.step, Step::Reading(on) if on == node)
        };
        self.walks.values().filter(waits).map(|walk| walk.pair).collect()
    }

    /// Answers a question, now or when its node has been read.
    fn answer(
        &mut self,
        from: NodeId,
        asked: TreeAsked,
        question: Question,
        may_wait: bool,
        local: &dyn Local,
    ) {
        let partition = asked.partition;
        let is_same = self.digest(partition, local) == Some(asked.seen_digest);
        let own = if is_same { self.own(partition, question) } else { Err(Missing::Nothing) };
        let result = match own {
            Ok(own) => own.answer(question),
            Err(Missing::Detail) => {
                self.reads.want(partition, question.node);
                let waits = may_wait && self.reads.is_wanted(partition, question.node);
                if waits && self.asked.len() < ANSWERS_WAITING_MAX {
                    self.asked.push((from, asked, question));
                    return;
                }
                TreeResult::NotComparable
            }
            Err(Missing::Leaf(first)) => {
                // It will be asked again; by then as many are clean as one round may read.
                self.reads.want(partition, first);
                if let Some(tree) = self.trees.get(&partition) {
                    let dirty =
                        tree.dirty_leaves(question.node).take(self.options.reads_max as usize);
                    dirty.for_each(|leaf| self.reads.want(partition, leaf));
                }
                TreeResult::NotComparable
            }
            Err(Missing::Nothing) => TreeResult::NotComparable,
        };
        self.send(from, PeerMessage::TreeDone { id: asked.id, result });
    }

    /// Digest of what was seen and of the hour: what expires is left out from the same hour on.
    fn digest(&self, partition: PartitionId, local: &dyn Local) -> Option<u64> {
        let seen = local.seen_digest(partition)?;
        Some(mixed(seen ^ mixed(u64::from(self.hour.0))))
    }

    fn note_hour(&mut self, moment: Moment) {
        // A wall clock that steps back must not bring back what was left out.
        let hour = Hour::of(moment.wall).max(self.hour);
        if hour != self.hour {
            self.hour = hour;
            self.trees.values_mut().for_each(|tree| tree.forget_before(hour));
        }
    }

    fn send(&mut self, to: NodeId, message: PeerMessage<'static>) -> u64 {
        let bytes = size_of_message(&message);
        self.counters.bytes_sent += bytes;
        self.outputs.push_back(Output::Send { to, message });
        bytes
    }

    /// A number that differs for each pair and round.
    fn chance(&self, (partition, peer): Pair) -> u64 {
        let pair = u64::from(partition.0) << 32 | u64::from(peer.0);
        mixed(self.jitter ^ mixed(pair ^ mixed(self.counters.rounds)))
    }

    /// Counters and gauges. Costs a look at every pair and tree.
    #[must_use]
    pub fn status(&self) -> RepairStatus {
        let last = || self.pairs.values().flatten();
        let whole =
            |round: &&LastRound| matches!(round.outcome, Outcome::Equal | Outcome::Repaired);
        RepairStatus {
            pairs: self.pairs.len() as u64,
            checked: last().filter(whole).count() as u64,
            differing: last().filter(|round| round.differing > 0).count() as u64,
            open: self.walks.len() as u64,
            dirty_leaves: self.trees.values().map(|tree| u64::from(tree.dirty_count())).sum(),
            leaves: self.trees.values().map(|tree| 1 << tree.leaf_bits()).sum(),
            tree_bytes: self.trees.values().map(|tree| tree.bytes() as u64).sum(),
            scrub: self.reads.scrubber.progress(),
            ..self.counters
        }
    }

    /// The last round of each partition with each other replica.
    pub fn last_rounds(&self) -> impl Iterator<Item = &LastRound> {
        self.pairs.values().flatten()
    }

    /// Where the scrubber has come to, to be kept over a restart.
    #[must_use]
    pub fn scrub_position(&self) -> ScrubPosition {
        self.reads.scrubber.position()
    }
}

fn size_of_message(message: &PeerMessage<'_>) -> u64 {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    FRAME_SIZE + bytes.len() as u64
}

/// The finisher of SplitMix64 (Steele, Lea, Flood, 2014): a bijection that spreads every bit.
fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
