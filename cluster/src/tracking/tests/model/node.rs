//! A node of the model: one partition's replica with its log, its disk, and its tracking.
//!
//! Its log is periodic: what is appended is visible at once and durable later, in order. A crash
//! takes the end of it. A purge works on what is visible and on the disk alike.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::NodeId;
use crate::tracking::{Options, Replica, Shared, Tracking};
use annulus_engine::model::causality::KeyState;
use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::timestamp::HybridClock;
use annulus_engine::model::{
    Dot, Kind, NamespaceId, OriginId, PartitionId, Record, Timestamp, Token, VersionVector,
    WallMicros,
};

use super::Rules;

pub(super) const PARTITION: PartitionId = PartitionId(0);
const MS: u64 = 1_000_000;

pub(super) fn options() -> Options {
    Options {
        announce_every: 4 * MS,
        announce_line: MS / 4,
        announce_every_max: 8 * MS,
        heartbeat_every: 8 * MS,
        repeat_after: 16 * MS,
        grace: 8 * MS,
        search_every: MS,
        syncs_max: 2,
        back_off_min: 4 * MS,
        back_off_max: 16 * MS,
        message_size_max: 300,
    }
}

/// What a record is for the model: the key is one byte, tokens rise with it.
pub(super) fn plain(key: u8, dot: Dot, timestamp: Timestamp, kind: Kind, expiry_ms: u64) -> Record {
    Record {
        token: Token(u64::from(key)),
        namespace: NamespaceId(1),
        incarnation: 1,
        kind,
        dot,
        timestamp,
        expiry_ms,
        key: vec![key],
        value: if kind == Kind::Delete { vec![] } else { value_of(dot) },
    }
}

pub(super) fn value_of(dot: Dot) -> Vec<u8> {
    format!("{}.{}", dot.origin.0, dot.sequence).into_bytes()
}

#[derive(Clone, Default)]
pub(super) struct State {
    pub(super) records: BTreeMap<u8, Record>,
    pub(super) seen: Rc<SeenSet>,
}

#[derive(Clone)]
pub(super) enum Item {
    /// The key's new record, and which writes it brings.
    Record(Record, Vec<(Dot, Timestamp)>),
    Adopt(SeenSet),
    Void(u64, Timestamp),
    Drop,
}

impl State {
    pub(super) fn apply(&mut self, own: OriginId, item: &Item) {
        let seen = Rc::make_mut(&mut self.seen);
        match item {
            Item::Record(record, dots) => {
                dots.iter().for_each(|(dot, stamp)| {
                    seen.see(*dot, *stamp);
                });
                self.records.insert(record.key[0], record.clone());
            }
            Item::Adopt(other) => seen.union(other),
            Item::Void(sequence, stamp) => seen.void_up_to(own, *sequence, *stamp),
            Item::Drop => *self = State::default(),
        }
    }
}

/// A sync of a needy node.
pub(super) struct Syncing {
    pub(super) id: u64,
    pub(super) helper: u32,
    pub(super) since: u64,
    pub(super) cursor: u8,
    pub(super) first: Option<SeenSet>,
}

pub(super) struct Node {
    pub(super) id: u32,
    pub(super) life: u64,
    pub(super) tracking: Tracking,
    pub(super) view: View,
    pub(super) syncing: Option<Syncing>,
    /// The latest life of each peer that it has heard of.
    pub(super) lives: BTreeMap<u32, u64>,
}

/// The part of a node that its tracking sees.
pub(super) struct View {
    pub(super) own: OriginId,
    pub(super) state: State,
    pub(super) disk: State,
    pub(super) unsynced: Vec<Item>,
    pub(super) appended: u64,
    pub(super) clock: RefCell<HybridClock>,
    pub(super) wall: WallMicros,
    pub(super) sequence: u64,
    /// Durable: none above it was given out.
    pub(super) reserved: u64,
    /// After a crash: the last sequence of the gap, and a bound of what was lost.
    pub(super) gap: Option<(u64, Timestamp)>,
    pub(super) is_durable_at_once: bool,
}

impl Replica for View {
    fn seen(&self, _: PartitionId) -> Rc<SeenSet> {
        Rc::clone(&self.state.seen)
    }
    fn take_changed(&mut self) -> Vec<PartitionId> {
        vec![PARTITION]
    }
    fn clock(&self) -> Timestamp {
        self.clock.borrow_mut().tick(self.wall)
    }
    fn lost_after(&self) -> Option<Timestamp> {
        self.gap.map(|(_, lost_after)| lost_after)
    }
    fn has_gap(&self, _: PartitionId) -> bool {
        self.gap.is_some()
    }
    fn is_busy(&self, _: PartitionId) -> bool {
        false
    }
    fn appended(&self) -> u64 {
        self.appended
    }
    fn visible(&self) -> u64 {
        self.appended
    }
    fn durable(&self) -> u64 {
        self.appended - if self.is_durable_at_once { 0 } else { self.unsynced.len() as u64 }
    }
}

impl View {
    pub(super) fn append(&mut self, item: Item) {
        self.state.apply(self.own, &item);
        self.unsynced.push(item);
        self.appended += 1;
    }

    /// Syncs the first items; gives the writes that are durable now.
    pub(super) fn sync(&mut self, count: usize) -> Vec<Dot> {
        let mut dots = Vec::new();
        for item in self.unsynced.drain(..count) {
            self.disk.apply(self.own, &item);
            if let Item::Record(_, brought) = item {
                dots.extend(brought.into_iter().map(|(dot, _)| dot));
            }
        }
        dots
    }

    pub(super) fn tick(&mut self, seen: Timestamp) -> Timestamp {
        let mut clock = self.clock.borrow_mut();
        let _ = clock.observe(seen, self.wall, u64::MAX);
        clock.tick(self.wall)
    }

    pub(super) fn next_dot(&mut self) -> Dot {
        self.sequence += 1;
        if self.sequence > self.reserved {
            self.reserved = self.sequence + 2;
        }
        Dot { origin: self.own, sequence: self.sequence }
    }

    pub(super) fn base(&self) -> VersionVector {
        self.state.seen.base()
    }

    /// The key's state, filled unless the rules leave that out.
    pub(super) fn filled(&self, key: u8, rules: &Rules) -> KeyState<'_> {
        let record = self.state.records.get(&key);
        let mut state = record.map_or_else(KeyState::new, |record| {
            KeyState::decode(&record.value).expect("the model stores states")
        });
        if rules.fills {
            state.fill(&self.base());
        }
        state
    }

    /// The record that stores a state.
    pub(super) fn stored(&self, key: u8, state: &KeyState<'_>, rules: &Rules) -> Record {
        let mut state = state.clone();
        if rules.fills {
            state.strip(&self.base());
        }
        let like = plain(key, Dot::default(), Timestamp::ZERO, Kind::Siblings, 0);
        state.to_record(&like.as_ref())
    }
}

impl Node {
    pub(super) fn new(id: u32, shared: Shared, rules: &Rules) -> Node {
        Node {
            id,
            life: 1,
            tracking: Tracking::new(NodeId(id), 1, options(), shared),
            view: View {
                own: OriginId(id),
                state: State::default(),
                disk: State::default(),
                unsynced: vec![],
                appended: 0,
                clock: RefCell::default(),
                wall: WallMicros(0),
                sequence: 0,
                reserved: 0,
                gap: None,
                is_durable_at_once: rules.announces_undurable,
            },
            syncing: None,
            lives: BTreeMap::new(),
        }
    }

    pub(super) fn crash(&mut self, shared: Shared, rules: &Rules) {
        self.life += 1;
        let view = &mut self.view;
        view.state = view.disk.clone();
        view.unsynced.clear();
        let own = view.state.seen.of(view.own);
        if rules.reuses_sequences {
            view.sequence = own.last();
        } else {
            // What an earlier crash lost is still lost.
            let lost_after = view.gap.map_or(own.last_stamp(), |gap| gap.1.min(own.last_stamp()));
            view.gap = Some((view.reserved, lost_after));
            view.sequence = view.reserved;
        }
        // The clock's ceiling is durable, so it goes on from where it was.
        self.tracking = Tracking::new(NodeId(self.id), self.life, options(), shared);
        self.syncing = None;
        self.lives.clear();
    }
}
