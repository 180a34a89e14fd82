//! A world for the tests: replicas of one partition in memory, and a network that misbehaves.

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::{
    Dot, Instant, Kind, NamespaceId, OriginId, PartitionId, Record, Timestamp, Token, TokenRange,
    WallMicros,
};

use super::*;
use crate::repair::{HashSeed, Purpose, RepairOptions, ScrubOptions};

pub(super) const PARTITION: PartitionId = PartitionId(0);
const SECOND: u64 = 1_000_000_000;

/// What travels.
#[derive(Clone, Debug)]
enum Letter {
    Repair(PeerMessage<'static>),
    /// Answers a `Fetch`.
    Page(u64, Vec<Record>),
    /// Records sent to repair.
    Push(Vec<Record>),
    /// A client's write on its way to another replica.
    Write(Record),
}

#[derive(Clone, Debug)]
enum Event {
    Arrives {
        from: usize,
        to: usize,
        letter: Letter,
    },
    /// A scan looks at the records from this token on, then ends or goes on.
    Scans {
        at: usize,
        id: ReadId,
        range: TokenRange,
    },
}

/// The digest of what a replica has seen.
#[derive(Clone, Default)]
pub(super) struct Seen {
    dots: BTreeSet<Dot>,
    digest: u64,
    /// The mistake that the rule of equal histories is there against.
    pub(super) is_not_told: bool,
}

impl Local for Seen {
    fn seen_digest(&self, _: PartitionId) -> Option<u64> {
        Some(if self.is_not_told { 0 } else { self.digest })
    }
}

#[derive(Clone)]
pub(super) struct Replica {
    pub(super) data: BTreeMap<Token, Record>,
    pub(super) seen: Seen,
    pub(super) repairer: Repairer,
    /// Scans of these tokens meet damage.
    pub(super) damaged: Option<Token>,
    pub(super) faults: u64,
    pub(super) unknown: Vec<Suspicion>,
    pub(super) scans: u64,
}

impl Replica {
    /// Merges a record, as the engine does: the greatest version stays.
    fn merge(&mut self, record: &Record, knows_old: bool) {
        let rank = |record: &Record| (record.timestamp, record.dot, record.value.clone());
        let old = self.data.get(&record.token);
        if old.is_some_and(|old| rank(old) >= rank(record)) {
            return;
        }
        match knows_old {
            true => {
                let old = old.map(Record::as_ref);
                self.repairer.apply(old.as_ref(), Some(&record.as_ref()));
            }
            false => self.repairer.touch(record.token),
        }
        self.data.insert(record.token, record.clone());
    }

    /// A write arrives, from a client or another replica.
    pub(super) fn write(&mut self, record: &Record, knows_old: bool) {
        if self.seen.dots.insert(record.dot) {
            let word = mixed(u64::from(record.dot.origin.0) << 48 ^ record.dot.sequence);
            self.seen.digest = self.seen.digest.wrapping_add(word);
            self.merge(record, knows_old);
        }
    }
}

pub(super) struct World {
    pub(super) replicas: Vec<Replica>,
    pub(super) now: u64,
    events: BTreeMap<(u64, u64), Event>,
    sent: u64,
    dice: u64,
    /// Of 100 messages, so many are lost, and so many come twice.
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) delay_max: u64,
    next_sequence: u64,
}

pub(super) fn quick() -> RepairOptions {
    RepairOptions {
        read_bytes_per_second: u64::MAX,
        scrub: ScrubOptions { share_per_day_ppm: 0, ..ScrubOptions::default() },
        ..RepairOptions::default()
    }
}

pub(super) fn record(key: u64, sequence: u64, origin: u32, stamp: u64) -> Record {
    Record {
        token: Token(mixed(key)),
        namespace: NamespaceId(0),
        incarnation: 1,
        kind: if sequence % 7 == 3 { Kind::Delete } else { Kind::Put },
        dot: Dot { origin: OriginId(origin), sequence },
        timestamp: Timestamp::new(WallMicros(stamp), 0),
        expiry_ms: 0,
        key: key.to_le_bytes().to_vec(),
        value: if sequence % 7 == 3 { Vec::new() } else { sequence.to_le_bytes().to_vec() },
    }
}

impl World {
    /// Replicas whose trees are cut for so many keys each.
    pub(super) fn new(keys: &[u64], options: RepairOptions, seed: u64) -> World {
        let count = u32::try_from(keys.len()).unwrap();
        let replicas = (0..count)
            .zip(keys)
            .map(|(at, keys)| {
                let others: Vec<NodeId> = (0..count).filter(|o| *o != at).map(NodeId).collect();
                let jitter = seed ^ u64::from(at) << 40;
                let position = ScrubPosition::default();
                let mut repairer =
                    Repairer::new(options, 0, HashSeed(9), jitter, position, Instant(0));
                repairer.set_partition(PARTITION, *keys, &others, Instant(0));
                Replica {
                    data: BTreeMap::new(),
                    seen: Seen::default(),
                    repairer,
                    damaged: None,
                    faults: 0,
                    unknown: Vec::new(),
                    scans: 0,
                }
            })
            .collect();
        World {
            replicas,
            now: 0,
            events: BTreeMap::new(),
            sent: 0,
            dice: seed,
            lost: 0,
            doubled: 0,
            delay_max: 1_000_000,
            next_sequence: 0,
        }
    }

    pub(super) fn roll(&mut self, below: u64) -> u64 {
        self.dice = self.dice.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed(self.dice) % below
    }

    pub(super) fn moment(&self) -> Moment {
        Moment { now: Instant(self.now), wall: WallMicros(self.now / 1000) }
    }

    /// A write that every replica has at once.
    pub(super) fn write_everywhere(&mut self, key: u64) {
        self.next_sequence += 1;
        let record = record(key, self.next_sequence, 0, self.next_sequence);
        self.replicas.iter_mut().for_each(|replica| replica.write(&record, true));
    }

    /// A write at one replica, which sends it to the others; they have it sooner or later.
    pub(super) fn write(&mut self, at: usize, key: u64) {
        self.next_sequence += 1;
        let origin = u32::try_from(at).unwrap();
        // Clocks differ by up to a tenth of a second.
        let stamp = self.now / 1000 + self.roll(100_000);
        let record = record(key, self.next_sequence, origin, stamp);
        let knows_old = self.roll(2) == 0;
        self.replicas[at].write(&record, knows_old);
        for to in (0..self.replicas.len()).filter(|to| *to != at) {
            let wait = self.roll(self.delay_max * 4);
            let letter = Letter::Write(record.clone());
            self.at(wait, Event::Arrives { from: at, to, letter });
        }
    }

    fn at(&mut self, wait: u64, event: Event) {
        self.sent += 1;
        self.events.insert((self.now + wait, self.sent), event);
    }

    fn send(&mut self, from: usize, to: usize, letter: Letter) {
        let copies =
            u32::from(self.roll(100) >= self.lost) + u32::from(self.roll(100) < self.doubled);
        for _ in 0..copies {
            let wait = self.roll(self.delay_max) + 1;
            self.at(wait, Event::Arrives { from, to, letter: letter.clone() });
        }
    }

    /// Lets time pass: events and timers in their order, writes of the caller's between them.
    pub(super) fn run(&mut self, seconds: u64) {
        self.run_nanos(seconds * SECOND);
    }

    pub(super) fn run_nanos(&mut self, nanos: u64) {
        let end = self.now + nanos;
        loop {
            self.carry_out();
            let event = self.events.keys().next().map_or(u64::MAX, |(at, _)| *at);
            let timer = self.replicas.iter().map(|replica| replica.repairer.wake_at().0).min();
            let next = event.min(timer.unwrap_or(u64::MAX)).max(self.now);
            if next > end {
                self.now = end;
                return;
            }
            self.now = next;
            if event == next
                && let Some((_, event)) = self.events.pop_first()
            {
                self.handle(event);
            }
            let moment = self.moment();
            for replica in &mut self.replicas {
                replica.repairer.poll(moment, &replica.seen);
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let moment = self.moment();
        match event {
            Event::Scans { at, id, range } => {
                let replica = &mut self.replicas[at];
                if replica.damaged.is_some_and(|token| range.contains(token)) {
                    replica.repairer.read_failed(id, moment, &replica.seen);
                    return;
                }
                // A part of the range at a time, so that writes come between.
                let size = range.last.0 - range.first.0;
                let is_last = size < 1 << 50;
                let end = if is_last { range.last } else { Token(range.first.0 + size / 2) };
                for (_, record) in replica.data.range(range.first..=end) {
                    replica.repairer.read_record(id, &record.as_ref());
                }
                if is_last {
                    replica.scans += 1;
                    replica.repairer.read_done(id, 4096, moment, &replica.seen);
                } else {
                    let first = Token(end.0 + 1);
                    let wait = self.roll(100_000);
                    let range = TokenRange { first, ..range };
                    self.at(wait, Event::Scans { at, id, range });
                }
            }
            Event::Arrives { to, .. } if to >= self.replicas.len() => {}
            Event::Arrives { from, to, letter } => {
                let node = NodeId(u32::try_from(from).unwrap());
                let knows_old = self.roll(2) == 0;
                let replica = &mut self.replicas[to];
                match letter {
                    Letter::Write(record) => replica.write(&record, knows_old),
                    Letter::Push(records) => {
                        records.iter().for_each(|record| replica.merge(record, knows_old));
                    }
                    Letter::Page(id, records) => {
                        if replica.repairer.is_fetch(node, id) {
                            records.iter().for_each(|record| replica.merge(record, knows_old));
                            let count = records.len() as u64;
                            replica.repairer.fetched(node, id, count, moment, &replica.seen);
                        }
                    }
                    Letter::Repair(message) => self.receive(node, to, message),
                }
            }
        }
    }

    fn receive(&mut self, from: NodeId, to: usize, message: PeerMessage<'static>) {
        let moment = self.moment();
        let replica = &mut self.replicas[to];
        match message {
            PeerMessage::Tree { id, partition, seen_digest, level, index } => {
                let asked = TreeAsked { id, partition, seen_digest, level, index };
                replica.repairer.tree_asked(from, asked, moment, &replica.seen);
            }
            PeerMessage::TreeDone { id, result } => {
                replica.repairer.tree_answered(from, id, &result, moment, &replica.seen);
            }
            PeerMessage::Fetch { id, tokens, .. } => {
                let records = tokens.iter().filter_map(|t| replica.data.get(t).cloned()).collect();
                self.send(to, from.0 as usize, Letter::Page(id, records));
            }
            other => panic!("not of the repair: {other:?}"),
        }
    }

    fn carry_out(&mut self) {
        for at in 0..self.replicas.len() {
            while let Some(output) = self.replicas[at].repairer.next_output() {
                match output {
                    Output::Send { to, message } => {
                        self.send(at, to.0 as usize, Letter::Repair(message));
                    }
                    Output::Push { to, tokens, .. } => {
                        let data = &self.replicas[at].data;
                        let records = tokens.iter().filter_map(|t| data.get(t).cloned()).collect();
                        self.send(at, to.0 as usize, Letter::Push(records));
                    }
                    Output::Read { id, range, purpose, .. } => {
                        assert!(matches!(purpose, Purpose::Compare | Purpose::Scrub));
                        let wait = self.roll(100_000);
                        self.at(wait, Event::Scans { at, id, range });
                    }
                    Output::Fault { missing_here, missing_there, differing, .. } => {
                        self.replicas[at].faults += missing_here + missing_there + differing;
                    }
                    Output::Unknown { why, .. } => self.replicas[at].unknown.push(why),
                }
            }
        }
    }

    /// Whether all replicas hold the same live records.
    pub(super) fn agrees(&self) -> bool {
        let live = |replica: &Replica| -> Vec<Record> {
            let is_put = |record: &&Record| record.kind == Kind::Put;
            replica.data.values().filter(is_put).cloned().collect()
        };
        let first = live(&self.replicas[0]);
        self.replicas.iter().all(|replica| live(replica) == first)
    }

    pub(super) fn faults(&self) -> u64 {
        self.replicas.iter().map(|replica| replica.faults).sum()
    }
}
