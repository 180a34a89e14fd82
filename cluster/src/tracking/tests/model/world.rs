//! A cluster of the model: nodes, a network that loses, doubles and reorders, clients, and the
//! histories by which the end is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::NodeId;
use crate::message::PeerMessage;
use crate::tracking::{PeerShard, Shared};
use annulus_engine::model::causality::{KeyState, Sibling};
use annulus_engine::model::merge::{Merged, merge_records};
use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{
    Context, Dot, Instant, Kind, Record, Timestamp, VersionVector, WallMicros,
};

use super::node::{Item, Node, PARTITION, Syncing, plain, value_of};
use super::{Mode, Purge, Rules};

/// Numbers that look drawn by lot: the same for the same seed (Steele, Lea, Flood: splitmix64).
pub(super) struct Lot(pub(super) u64);

impl Lot {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, count: u64) -> u64 {
        self.next() % count.max(1)
    }

    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone)]
enum Body {
    Track(Vec<u8>),
    Write(Record),
    Sync { id: u64, seen: Rc<SeenSet>, cursor: u8 },
    Page { id: u64, cursor: u8, records: Vec<Record>, next: Option<u8>, seen: Rc<SeenSet> },
}

#[derive(Clone)]
pub(super) struct Envelope {
    from: u32,
    life: u64,
    to: u32,
    /// It will be on its way for long.
    is_slow: bool,
    body: Body,
}

/// A client's write, and all writes of its key that it knew to be replaced.
pub(super) struct Write {
    pub(super) key: u8,
    pub(super) version: (Timestamp, Dot),
    pub(super) is_gone: bool,
    pub(super) past: BTreeSet<Dot>,
}

#[derive(Clone, Default)]
struct Known {
    context: Context,
    past: BTreeSet<Dot>,
}

#[derive(Default, Debug)]
pub(super) struct Counts {
    pub(super) purged: u64,
    pub(super) synced: u64,
    pub(super) skipped: u64,
    pub(super) dropped: u64,
    pub(super) voided: u64,
    pub(super) crashed: u64,
    pub(super) compared: u64,
}

pub(super) struct World {
    pub(super) rules: Rules,
    pub(super) lot: Lot,
    now: u64,
    pub(super) nodes: BTreeMap<u32, Node>,
    skews: BTreeMap<u32, u64>,
    pub(super) wire: Vec<Envelope>,
    pub(super) writes: BTreeMap<Dot, Write>,
    /// Durable somewhere at some time.
    pub(super) safe: BTreeSet<Dot>,
    clients: Vec<BTreeMap<u8, Known>>,
    ids: u64,
    age: u64,
    pub(super) counts: Counts,
}

pub(super) const MS: u64 = 1_000_000;
/// Model time begins late enough for skews.
const WALL: u64 = 1_000_000;
const SKEW_MAX_US: u64 = 6_000;

impl World {
    pub(super) fn new(seed: u64, rules: Rules) -> World {
        let mut lot = Lot(seed);
        let ids: Vec<u32> = (1..=rules.holders + rules.guests).collect();
        let skews = ids.iter().map(|id| (*id, lot.below(3) * SKEW_MAX_US / 2)).collect();
        let shared = shared(&rules);
        let node = |id: &u32| (*id, Node::new(*id, shared.clone(), &rules));
        let nodes = ids.iter().map(node).collect();
        let mut world = World {
            rules,
            lot,
            now: 0,
            nodes,
            skews,
            wire: vec![],
            writes: BTreeMap::new(),
            safe: BTreeSet::new(),
            clients: vec![BTreeMap::new(); 3],
            ids: 0,
            age: 0,
            counts: Counts::default(),
        };
        world.pass(0);
        world
    }

    /// A whole schedule: chance, then peace, then the verdict.
    pub(super) fn run(&mut self, steps: usize) -> Result<(), String> {
        for _ in 0..steps {
            self.step();
            if self.rules.compares_always {
                self.compare()?;
            }
        }
        self.make_peace();
        self.judge()
    }

    pub(super) fn pass(&mut self, nanos: u64) {
        self.now += nanos;
        for (id, node) in &mut self.nodes {
            node.view.wall = WallMicros(WALL + self.now / 1000 + self.skews[id]);
        }
    }

    fn any_node(&mut self) -> u32 {
        1 + u32::try_from(self.lot.below(self.nodes.len() as u64)).unwrap()
    }

    pub(super) fn holder(&mut self) -> u32 {
        1 + u32::try_from(self.lot.below(u64::from(self.rules.holders))).unwrap()
    }

    fn step(&mut self) {
        let nanos = self.lot.below(3 * MS);
        self.pass(nanos);
        // Times with many writes, and quiet ones in which things come to rest.
        self.age += 1;
        let is_quiet = self.age % 80 >= 30;
        if is_quiet {
            self.pass(2 * MS);
            let node = self.any_node();
            self.poll(node);
            if self.lot.percent(self.rules.quiet_sync_percent) {
                let all = self.nodes[&node].view.unsynced.len();
                self.sync_log(node, all);
            }
            self.housekeep(node);
            (0..6).for_each(|_| self.deliver_one());
        }
        if self.rules.knows_all {
            let node = self.holder();
            self.purge(node);
        }
        match self.lot.below(100) {
            0..22 if !is_quiet => self.client_write(),
            22..30 if !is_quiet => self.client_read(),
            0..66 => self.deliver_one(),
            66..78 => {
                let node = self.any_node();
                self.poll(node);
            }
            78..84 => {
                let node = self.any_node();
                let all = self.nodes[&node].view.unsynced.len();
                let count = self.lot.below(all as u64 + 1);
                self.sync_log(node, usize::try_from(count).unwrap());
            }
            84..90 => {
                let node = self.any_node();
                self.housekeep(node);
            }
            90..97 => {
                let node = self.any_node();
                self.purge(node);
            }
            _ => {
                let node = self.any_node();
                if self.lot.percent(self.rules.crash_percent) {
                    self.crash(node);
                }
            }
        }
    }

    fn crash(&mut self, node: u32) {
        self.counts.crashed += 1;
        let shared = shared(&self.rules);
        self.nodes.get_mut(&node).unwrap().crash(shared, &self.rules);
        if self.rules.voids_at_once {
            self.declare_void(node);
        }
    }

    // --- clients ---

    fn client_write(&mut self) {
        let is_guest = self.rules.guests > 0 && self.lot.percent(self.rules.guest_percent);
        let node = if is_guest {
            self.rules.holders
                + 1
                + u32::try_from(self.lot.below(u64::from(self.rules.guests))).unwrap()
        } else {
            self.holder()
        };
        let key = u8::try_from(self.lot.below(u64::from(self.rules.keys))).unwrap();
        let is_delete = self.lot.percent(45);
        let expires = !is_delete && self.lot.percent(20);
        let client = usize::try_from(self.lot.below(3)).unwrap();
        let known = match self.lot.below(10) {
            0..1 => Known::default(),
            1..7 => self.read(node, key),
            _ => self.clients[client].get(&key).cloned().unwrap_or_default(),
        };
        let expiry_ms =
            if expires { (WALL + self.now / 1000) / 1000 + 1 + self.lot.below(20) } else { 0 };
        let Node { tracking, view, .. } = self.nodes.get_mut(&node).unwrap();
        let may_write = match self.rules.mode {
            Mode::LastWrite => true,
            Mode::Siblings => tracking.may_write_siblings(PARTITION, view),
        };
        if !may_write && !self.rules.writes_with_gaps {
            return;
        }
        let dot = view.next_dot();
        let timestamp = view.tick(known.context.timestamp);
        let kind = if is_delete { Kind::Delete } else { Kind::Put };
        let (record, item) = match self.rules.mode {
            Mode::LastWrite => {
                let record = plain(key, dot, timestamp, kind, expiry_ms);
                let winner = winner(view.state.records.get(&key), &record);
                (record, Item::Record(winner, vec![(dot, timestamp)]))
            }
            Mode::Siblings => {
                let value = if is_delete { vec![] } else { value_of(dot) };
                let write = Sibling {
                    dot,
                    timestamp,
                    is_delete,
                    is_blind: false,
                    expiry_ms,
                    value: (&value).into(),
                };
                let mut state = view.filled(key, &self.rules);
                if state.write(write, &known.context).is_err() {
                    return;
                }
                let stored = view.stored(key, &state, &self.rules);
                let sent = if self.rules.replicates_events {
                    let mut event = KeyState::new();
                    event.write(write, &known.context).unwrap();
                    event
                } else {
                    state
                };
                let like = plain(key, dot, timestamp, Kind::Siblings, 0);
                let mut sent = sent.to_record(&like.as_ref());
                (sent.dot, sent.timestamp) = (dot, timestamp);
                (sent, Item::Record(stored, vec![(dot, timestamp)]))
            }
        };
        view.append(item);
        let write = Write {
            key,
            version: (timestamp, dot),
            is_gone: is_delete || expires,
            past: known.past,
        };
        assert!(self.rules.reuses_sequences || !self.writes.contains_key(&dot), "a dot twice");
        self.writes.insert(dot, write);
        let copies: Vec<u32> = self.nodes.keys().copied().filter(|to| *to != node).collect();
        for to in copies {
            // Holders get it, guests now and then.
            if to <= self.rules.holders || self.lot.percent(15) {
                self.send(node, to, Body::Write(record.clone()));
            }
        }
    }

    fn client_read(&mut self) {
        let node = self.any_node();
        let key = u8::try_from(self.lot.below(u64::from(self.rules.keys))).unwrap();
        let client = usize::try_from(self.lot.below(3)).unwrap();
        let known = self.read(node, key);
        self.clients[client].insert(key, known);
    }

    fn read(&self, node: u32, key: u8) -> Known {
        let view = &self.nodes[&node].view;
        let mut known = Known::default();
        match self.rules.mode {
            Mode::LastWrite => {
                let record = view.state.records.get(&key);
                known.context.timestamp = record.map_or(Timestamp::ZERO, |r| r.timestamp);
            }
            Mode::Siblings => {
                let state = view.filled(key, &self.rules);
                known.context = state.context();
                let of_key = self.writes.iter().filter(|(_, write)| write.key == key);
                for (dot, write) in of_key.filter(|(dot, _)| known.context.vector.covers(**dot)) {
                    known.past.insert(*dot);
                    if state.siblings().iter().any(|sibling| sibling.dot == *dot) {
                        known.past.extend(&write.past);
                    }
                }
            }
        }
        known
    }

    // --- network ---

    fn send(&mut self, from: u32, to: u32, body: Body) {
        let life = self.nodes[&from].life;
        let copies = match self.lot.below(100) {
            n if n < self.rules.loss_percent => 0,
            n if n > 90 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            let is_slow =
                matches!(body, Body::Write(_)) && self.lot.percent(self.rules.slow_percent);
            self.wire.push(Envelope { from, life, to, is_slow, body: body.clone() });
        }
    }

    fn deliver_one(&mut self) {
        if self.wire.is_empty() {
            return;
        }
        let at = usize::try_from(self.lot.below(self.wire.len() as u64)).unwrap();
        let envelope = &self.wire[at];
        let is_guests = self.rules.slow_guests
            && envelope.from > self.rules.holders
            && matches!(envelope.body, Body::Write(_) | Body::Page { .. });
        if (is_guests || envelope.is_slow) && !self.lot.percent(3) {
            return;
        }
        let envelope = self.wire.swap_remove(at);
        self.deliver(envelope);
    }

    pub(super) fn deliver(&mut self, envelope: Envelope) {
        let Envelope { from, life, to, body, .. } = envelope;
        let node = self.nodes.get_mut(&to).unwrap();
        let known = node.lives.entry(from).or_default();
        if life < *known && !self.rules.takes_old_lives {
            return;
        }
        *known = life.max(*known);
        match body {
            Body::Track(bytes) => {
                let message = PeerMessage::decode(&bytes).unwrap();
                let from = PeerShard { node: NodeId(from), shard: 0 };
                let mut answers = vec![];
                let mut out = |_: PeerShard, message: &PeerMessage<'_>| {
                    let mut bytes = vec![];
                    message.encode(&mut bytes);
                    answers.push(bytes);
                    true
                };
                let now = Instant(self.now);
                node.tracking.handle(now, from, &message, &node.view, &mut out).unwrap();
                for bytes in answers {
                    self.send(to, from.node.0, Body::Track(bytes));
                }
            }
            Body::Write(record) => self.merge(to, &record),
            Body::Sync { id, seen, cursor } => self.help(to, from, id, &seen, cursor),
            Body::Page { id, cursor, records, next, seen } => {
                self.take_page(to, id, cursor, records, next, &seen);
            }
        }
    }

    /// The duplicate rule, the merge, the mark.
    fn merge(&mut self, to: u32, record: &Record) {
        let rules = &self.rules;
        let view = &mut self.nodes.get_mut(&to).unwrap().view;
        let seen = &view.state.seen;
        view.clock.borrow_mut().observe(record.timestamp, view.wall, u64::MAX).unwrap();
        let key = record.key[0];
        let item = match rules.mode {
            Mode::LastWrite => {
                if seen.contains(record.dot) {
                    return;
                }
                let winner = winner(view.state.records.get(&key), record);
                Item::Record(winner, vec![(record.dot, record.timestamp)])
            }
            Mode::Siblings if rules.replicates_events => {
                if seen.contains(record.dot) {
                    return;
                }
                // Applies "this write replaces what its client had read" to what is here.
                let event = KeyState::decode(&record.value).unwrap();
                let mut state = view.filled(key, rules);
                let write = *event.siblings().first().unwrap();
                let is_old = state.vector().covers(write.dot);
                let context = Context { vector: event.vector(), ..Context::default() };
                if !is_old {
                    let _ = state.write(write, &context);
                }
                let stored = view.stored(key, &state, rules);
                Item::Record(stored, vec![(write.dot, write.timestamp)])
            }
            Mode::Siblings => {
                let state = KeyState::decode(&record.value).unwrap();
                let mut dots: Vec<(Dot, Timestamp)> =
                    state.siblings().iter().map(|s| (s.dot, s.timestamp)).collect();
                dots.push((record.dot, record.timestamp));
                if dots.iter().all(|(dot, _)| seen.contains(*dot)) {
                    return;
                }
                let merged = view.filled(key, rules).merge(&state);
                Item::Record(view.stored(key, &merged, rules), dots)
            }
        };
        view.append(item);
    }

    // --- sync ---

    /// The helper's side: a page of at most two keys.
    fn help(&mut self, helper: u32, needy: u32, id: u64, needs: &SeenSet, cursor: u8) {
        let rules = &self.rules;
        let view = &self.nodes[&helper].view;
        let seen = Rc::clone(&view.state.seen);
        let after = needs.lacks(&seen);
        let mut records = vec![];
        let mut next = None;
        for (key, record) in view.state.records.range(cursor..) {
            if records.len() == 2 {
                next = Some(*key);
                break;
            }
            let record = match rules.mode {
                Mode::LastWrite => record.clone(),
                Mode::Siblings => {
                    let like = plain(*key, Dot::default(), Timestamp::ZERO, Kind::Siblings, 0);
                    view.filled(*key, rules).to_record(&like.as_ref())
                }
            };
            let is_seen = match rules.mode {
                Mode::LastWrite => needs.contains(record.dot),
                Mode::Siblings if rules.skips_by_newest => needs.contains(record.dot),
                Mode::Siblings => {
                    let state = KeyState::decode(&record.value).unwrap();
                    state.siblings().iter().all(|sibling| needs.contains(sibling.dot))
                }
            };
            let is_old = after.is_none_or(|after| record.timestamp <= after);
            assert!(is_seen || !is_old || !rules.is_lively, "what is lacked is stamped later");
            if is_seen || is_old {
                self.counts.skipped += 1;
            } else {
                records.push(record);
            }
        }
        self.send(helper, needy, Body::Page { id, cursor, records, next, seen });
    }

    fn take_page(
        &mut self,
        to: u32,
        id: u64,
        cursor: u8,
        records: Vec<Record>,
        next: Option<u8>,
        seen: &SeenSet,
    ) {
        let rules = &self.rules;
        let node = self.nodes.get_mut(&to).unwrap();
        let Some(syncing) = &mut node.syncing else { return };
        if syncing.id != id || syncing.cursor != cursor {
            return;
        }
        let helper = syncing.helper;
        let keeps = syncing.first.as_ref().is_none_or(|first| seen.covers(first));
        if !keeps {
            // The helper has forgotten something since: a crash, or it has dropped its copy.
            node.syncing = None;
            node.tracking.sync_ended(Instant(self.now), PARTITION, false);
            return;
        }
        if syncing.first.is_none() || rules.adopts_last {
            syncing.first = Some(seen.clone());
        }
        if let Some(next) = next {
            syncing.cursor = next;
        }
        records.iter().for_each(|record| self.merge(to, record));
        self.counts.synced += records.len() as u64;
        match next {
            Some(next) => {
                let seen = Rc::clone(&self.nodes[&to].view.state.seen);
                self.send(to, helper, Body::Sync { id, seen, cursor: next });
            }
            None => {
                let node = self.nodes.get_mut(&to).unwrap();
                let first = node.syncing.take().unwrap().first.unwrap();
                node.view.append(Item::Adopt(first));
                node.tracking.sync_ended(Instant(self.now), PARTITION, true);
            }
        }
    }

    // --- a node's own work ---

    pub(super) fn poll(&mut self, id: u32) {
        let node = self.nodes.get_mut(&id).unwrap();
        let now = Instant(self.now);
        let mut out = vec![];
        node.tracking.poll(now, &mut node.view, &mut |to, message| {
            let mut bytes = vec![];
            message.encode(&mut bytes);
            out.push((to.node.0, bytes));
            true
        });
        for (to, bytes) in out {
            self.send(id, to, Body::Track(bytes));
        }
        let node = self.nodes.get_mut(&id).unwrap();
        if node.syncing.as_ref().is_some_and(|s| self.now - s.since > 30 * MS) {
            node.syncing = None;
            node.tracking.sync_ended(now, PARTITION, false);
        }
        if !self.rules.syncs {
            return;
        }
        for wanted in node.tracking.sync_wanted(now, &node.view, &|_| true) {
            self.ids += 1;
            let helper = wanted.helper.node.0;
            let node = self.nodes.get_mut(&id).unwrap();
            let syncing = Syncing { id: self.ids, helper, since: self.now, cursor: 0, first: None };
            node.syncing = Some(syncing);
            let seen = Rc::clone(&node.view.state.seen);
            self.send(id, helper, Body::Sync { id: self.ids, seen, cursor: 0 });
        }
    }

    pub(super) fn sync_log(&mut self, id: u32, count: usize) {
        let view = &mut self.nodes.get_mut(&id).unwrap().view;
        self.safe.extend(view.sync(count));
    }

    /// Gaps that are void, data of a guest that is done.
    pub(super) fn housekeep(&mut self, id: u32) {
        let node = &self.nodes[&id];
        if !node.tracking.gaps_closed(&node.view).is_empty() {
            self.declare_void(id);
        }
        let node = self.nodes.get_mut(&id).unwrap();
        if !node.tracking.guests_done(&node.view).is_empty() {
            self.counts.dropped += 1;
            node.view.append(Item::Drop);
        }
    }

    fn declare_void(&mut self, id: u32) {
        let view = &mut self.nodes.get_mut(&id).unwrap().view;
        if let Some((last, _)) = view.gap.take()
            && id <= self.rules.holders
        {
            self.counts.voided += 1;
            let stamp = view.state.seen.of(view.own).last_stamp();
            view.append(Item::Void(last, stamp));
        }
    }

    pub(super) fn purge(&mut self, id: u32) {
        if id > self.rules.holders {
            return;
        }
        let holders: Vec<&Node> = (1..=self.rules.holders).map(|id| &self.nodes[&id]).collect();
        let as_of =
            holders.iter().map(|node| node.tracking.as_of(PARTITION, &node.view)).min().unwrap();
        let node = &self.nodes[&id];
        let floor = node.tracking.purge_floor(PARTITION);
        let stable = match self.rules.knows_all {
            false => node.tracking.stable(PARTITION),
            true => {
                let bases = holders.iter().map(|node| node.view.base());
                bases.reduce(least).expect("there are holders")
            }
        };
        // Expired by every clock.
        let wall = WallMicros(WALL + self.now / 1000 - SKEW_MAX_US);
        let may_go = |timestamp: Timestamp, dot: Dot| match self.rules.purge {
            Purge::AtOnce => true,
            Purge::DotEverywhere | Purge::Stable | Purge::DotOnly => stable.covers(dot),
            Purge::Holders => timestamp <= as_of,
            Purge::Floor => timestamp <= floor,
        };
        let mut gone = vec![];
        for (key, record) in &node.view.state.records {
            let is_gone = match record.kind {
                Kind::Siblings => {
                    let state = KeyState::decode(&record.value).unwrap();
                    let vector = state.vector();
                    state.siblings().iter().all(|s| !s.is_live(wall) && may_go(s.timestamp, s.dot))
                        && (self.rules.purge != Purge::Stable || stable.descends(&vector))
                }
                _ => !record.as_ref().is_live(wall) && may_go(record.timestamp, record.dot),
            };
            if is_gone {
                gone.push(*key);
            }
        }
        let view = &mut self.nodes.get_mut(&id).unwrap().view;
        for key in gone {
            self.counts.purged += 1;
            let record = view.state.records.remove(&key);
            if view.disk.records.get(&key) == record.as_ref() {
                view.disk.records.remove(&key);
            }
        }
    }
}

fn least(one: VersionVector, other: VersionVector) -> VersionVector {
    one.iter().map(|dot| Dot { sequence: dot.sequence.min(other.get(dot.origin)), ..dot }).collect()
}

fn winner(here: Option<&Record>, record: &Record) -> Record {
    let Some(here) = here else { return record.clone() };
    match merge_records(&here.as_ref(), &record.as_ref()) {
        Merged::First => here.clone(),
        Merged::Second => record.clone(),
        Merged::New(record) => record,
    }
}

fn shared(rules: &Rules) -> Shared {
    Shared {
        partition_bits: 0,
        members: (1..=rules.holders + rules.guests).map(|id| (NodeId(id), 1)).collect(),
        first: PARTITION,
        holders: vec![(1..=rules.holders).map(NodeId).collect()],
        moves: crate::tracking::Moves::default(),
    }
}
