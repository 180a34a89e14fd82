//! A toy store for the checkers' tests: replicas as maps, right by being obvious, with bugs that
//! can be switched on.
//!
//! Invariant: without a bug every history of it keeps every promise; an operation takes effect
//! at one moment between its call and its answer. Writes reach some replicas at once and the
//! others later or at healing, so answers at low levels are old, as they may be.

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::{Dot, OriginId, Timestamp, WallMicros};
use annulus_engine::sim::Chance;
use annulus_net::wire::fields::Version;

use super::Violation;
use crate::history::{
    Answer, Call, Event, EventId, Expect, History, Mark, Mode, Reading, Receipt, Rules, Seen,
};

/// What the store does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    /// Writes answered `NOT_STARTED` are carried out.
    ApplyRefused,
    /// A version's dot is given out twice.
    ReuseDots,
    /// Some acknowledgements come from replicas that do not have the write.
    AckBeforeStore,
    /// One replica less is read than is said.
    ReadTooFew,
    /// What did not reach a replica at once never does.
    DropHints,
    /// `as_of` is the present.
    BoastAsOf,
    /// Tombstones go before all replicas have them.
    PurgeEarly,
    /// Stamps ignore the context.
    IgnoreContext,
    /// Expired values are shown.
    ServeExpired,
    /// Siblings: the write and its context are sent, not the whole state.
    ReplicateEvents,
    /// Siblings: only the newest survives.
    KeepOneSibling,
    /// Siblings: what was replaced is not remembered.
    ForgetReplaced,
}

const KEYS: u32 = 4;
const REPLICAS: usize = 3;

/// One version as a replica holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sibling {
    value: Option<u64>,
    expiry_ms: u64,
}

/// What a replica holds of a key: the versions alive, and all that it ever merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    alive: BTreeMap<Version, Sibling>,
    merged: BTreeSet<Version>,
}

impl State {
    fn merge(&mut self, other: &State, bug: Option<Bug>) {
        let forgetful = bug == Some(Bug::ForgetReplaced);
        self.alive.retain(|version, _| {
            other.alive.contains_key(version) || !other.merged.contains(version)
        });
        for (version, sibling) in &other.alive {
            if forgetful || !self.merged.contains(version) {
                self.alive.insert(*version, *sibling);
            }
        }
        self.merged.extend(&other.merged);
        if bug == Some(Bug::KeepOneSibling)
            && let Some(last) = self.alive.keys().next_back().copied()
        {
            self.alive.retain(|version, _| *version == last);
        }
    }
}

struct Toy {
    chance: Chance,
    bug: Option<Bug>,
    now: u64,
    stamp: Timestamp,
    sequence: u64,
    next_value: u64,
    /// By replica, by key.
    replicas: Vec<BTreeMap<u32, State>>,
    /// To which replica, of which key, what.
    late: Vec<(usize, u32, State)>,
    /// Stamps of the writes that a replica lacks.
    lacks: Vec<BTreeSet<Version>>,
    history: History,
    /// By key, what a client may pass as context.
    known: BTreeMap<u32, Vec<EventId>>,
    /// What a context covers.
    contexts: BTreeMap<EventId, BTreeSet<Version>>,
}

/// A history of this seed.
pub(super) fn tell(seed: u64, mode: Mode, bug: Option<Bug>) -> History {
    let mut toy = Toy {
        chance: Chance::new(seed),
        bug,
        now: 1_000_000,
        stamp: Timestamp::ZERO,
        sequence: 0,
        next_value: 0,
        replicas: vec![BTreeMap::new(); REPLICAS],
        late: Vec::new(),
        lacks: vec![BTreeSet::new(); REPLICAS],
        history: History::new(Rules::of(mode)),
        known: BTreeMap::new(),
        contexts: BTreeMap::new(),
    };
    for _ in 0..3 {
        for _ in 0..30 {
            toy.step();
        }
        toy.heal();
    }
    toy.history
}

/// Many right histories, in which a checker must find nothing.
pub(super) fn clean(check: impl Fn(&History) -> Vec<Violation>, mode: Mode) {
    for seed in 0..200 {
        let history = tell(seed, mode, None);
        let found = check(&history);
        if let Some(violation) = found.first() {
            panic!("seed {seed}: {violation}\n{}", super::describe(&history, violation.key));
        }
    }
}

/// Histories with a bug, of which a checker must find one at least.
pub(super) fn caught(check: impl Fn(&History) -> Vec<Violation>, mode: Mode, bug: Bug) {
    let bad = (0..100).filter(|seed| !check(&tell(*seed, mode, Some(bug))).is_empty()).count();
    assert!(bad > 0, "{bug:?} was not caught in 100 histories");
}

impl Toy {
    fn mode(&self) -> Mode {
        self.history.rules.mode
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    fn wall_ms(&self) -> u64 {
        self.history.rules.wall_us(self.now) / 1000
    }

    fn step(&mut self) {
        let longest = if self.chance.one_in(3) { 20_000_000 } else { 700_000_000 };
        self.now += self.chance.between(1_000_000, longest);
        if self.chance.one_in(4) && !self.late.is_empty() && !self.has(Bug::DropHints) {
            let index = self.chance.index(self.late.len());
            self.deliver(index);
        }
        let key = u32::try_from(self.chance.below(u64::from(KEYS))).unwrap();
        match self.chance.below(10) {
            0..=4 => self.read(key, None),
            // Keys 0 and 1 are never deleted.
            5 if key >= 2 => self.write(key, true),
            _ => self.write(key, false),
        }
    }

    /// Merges a message into a replica.
    fn apply(&mut self, replica: usize, key: u32, state: &State) {
        let (bug, mode) = (self.bug, self.mode());
        let here = self.replicas[replica].entry(key).or_default();
        here.merge(state, bug);
        let merged = &here.merged;
        self.lacks[replica].retain(|version| !merged.contains(version));
        if mode == Mode::Lww {
            let last = here.alive.keys().next_back().copied();
            here.alive.retain(|version, _| Some(*version) == last);
        }
        if bug == Some(Bug::PurgeEarly) && here.alive.values().all(|it| it.value.is_none()) {
            *here = State::default();
        }
    }

    fn deliver(&mut self, index: usize) {
        let (replica, key, state) = self.late.swap_remove(index);
        self.apply(replica, key, &state);
    }

    fn version(&mut self, after: Option<EventId>) -> Version {
        // Nodes' clocks differ by up to 100 ms.
        let skewed = self.history.rules.wall_us(self.now) - self.chance.below(100_000);
        let mut stamp = Timestamp::new(WallMicros(skewed), 0);
        if !self.has(Bug::IgnoreContext)
            && let Some(seen) = after.and_then(|id| self.contexts[&id].iter().next_back())
        {
            stamp = stamp.max(Timestamp(seen.timestamp.0 + 1));
        }
        if stamp == self.stamp {
            stamp = Timestamp(stamp.0 + 1);
        }
        self.stamp = stamp;
        self.sequence += u64::from(!(self.has(Bug::ReuseDots) && self.chance.one_in(3)));
        Version { timestamp: stamp, dot: Dot { origin: OriginId(1), sequence: self.sequence } }
    }

    fn write(&mut self, key: u32, is_delete: bool) {
        let known = self.known.get(&key).map_or(0, Vec::len);
        let after = (known > 0 && self.chance.one_in(2))
            .then(|| self.known[&key][known - 1 - self.chance.index(known.min(4))]);
        let ttl_ms = if !is_delete && self.chance.one_in(5) { self.chance.below(900) } else { 0 };
        let call = if is_delete {
            Call::Delete { after, expect: Expect::Always }
        } else {
            self.next_value += 1;
            Call::Put { value: self.next_value, ttl_ms, after, expect: Expect::Always }
        };
        // The replicas that get it at once; the first is the origin.
        let mut order: Vec<usize> = (0..REPLICAS).collect();
        (1..REPLICAS).for_each(|at| order.swap(at, self.chance.index(at + 1)));
        let reached = 1 + self.chance.index(REPLICAS);
        let refused = self.chance.one_in(8);
        let version = self.version(after);
        let id = self.history.events.len();
        let context = after.map(|id| self.contexts[&id].clone()).unwrap_or_default();
        let context = match (is_delete, after) {
            // A delete without a context deletes what its origin has.
            (true, None) => self.replicas[order[0]].get(&key).cloned().unwrap_or_default().merged,
            _ => context,
        };
        if !refused || self.has(Bug::ApplyRefused) {
            let value = (!is_delete).then_some(self.next_value);
            let expiry_ms = if ttl_ms > 0 { self.wall_ms() + ttl_ms } else { 0 };
            let mut state = self.replicas[order[0]].get(&key).cloned().unwrap_or_default();
            if self.has(Bug::ReplicateEvents) {
                state = State { alive: BTreeMap::new(), merged: state.merged };
            }
            state.alive.retain(|version, _| !context.contains(version));
            state.merged.extend(&context);
            state.merged.insert(version);
            state.alive.insert(version, Sibling { value, expiry_ms });
            if self.mode() == Mode::Lww {
                state.alive.retain(|other, _| *other == version);
                state.merged = BTreeSet::from([version]);
            }
            self.lacks.iter_mut().for_each(|lacks| {
                lacks.insert(version);
            });
            for (place, replica) in order.iter().enumerate() {
                let at_once = place < reached
                    && (place == 0 || !self.has(Bug::AckBeforeStore) || self.chance.one_in(2));
                match at_once {
                    true => self.apply(*replica, key, &state),
                    false => self.late.push((*replica, key, state.clone())),
                }
            }
        }
        let acks = u8::try_from(reached).unwrap();
        let answer = match refused {
            true => Answer::NotStarted,
            false if self.chance.one_in(8) => Answer::Perhaps,
            false => Answer::Written(Receipt { version, acks, primary: acks, durable: acks }),
        };
        if matches!(answer, Answer::Written(_)) {
            self.known.entry(key).or_default().push(id);
            self.contexts.insert(id, context.into_iter().chain([version]).collect());
        }
        self.note(key, call, answer);
    }

    /// Reads one to all replicas, or this one.
    fn read(&mut self, key: u32, only: Option<usize>) {
        let mut order: Vec<usize> = (0..REPLICAS).collect();
        (1..REPLICAS).for_each(|at| order.swap(at, self.chance.index(at + 1)));
        let said = 1 + self.chance.index(REPLICAS);
        let mut asked = order[..said].to_vec();
        if let Some(only) = only {
            asked = vec![only];
        } else if self.has(Bug::ReadTooFew) && said > 1 {
            asked.pop();
        }
        let mut state = State::default();
        for replica in &asked {
            if let Some(here) = self.replicas[*replica].get(&key) {
                state.merge(here, None);
            }
        }
        if self.mode() == Mode::Lww
            && let Some(last) = state.alive.keys().next_back().copied()
        {
            state.alive.retain(|version, _| *version == last);
        }
        let now_ms = self.wall_ms();
        let serve_expired = self.has(Bug::ServeExpired);
        let values = state.alive.iter().filter_map(|(version, it)| {
            let live = it.expiry_ms == 0 || now_ms < it.expiry_ms || serve_expired;
            let value = it.value.filter(|_| live)?;
            Some(Seen { version: *version, value, expiry_ms: it.expiry_ms })
        });
        // Complete up to just below the oldest write that a replica lacks, and not further than
        // the slowest clock that may yet stamp one.
        let wall_us = self.history.rules.wall_us(self.now) - 100_000;
        let slowest = Timestamp::new(WallMicros(wall_us), 0);
        let complete = |replica: &usize| match self.lacks[*replica].first() {
            Some(oldest) => slowest.min(Timestamp(oldest.timestamp.0 - 1)),
            None => slowest,
        };
        let as_of = match self.has(Bug::BoastAsOf) {
            true => self.stamp,
            false => asked.iter().map(complete).max().unwrap(),
        };
        let primaries = u8::try_from(if only.is_some() { 1 } else { said }).unwrap();
        let reading = Reading { values: values.collect(), as_of, answers: primaries, primaries };
        let id = self.history.events.len();
        self.known.entry(key).or_default().push(id);
        self.contexts.insert(id, state.merged);
        self.note(key, Call::Get, Answer::Values(reading));
    }

    fn note(&mut self, key: u32, call: Call, answer: Answer) {
        let returned = self.now + self.chance.below(500_000);
        let node = u32::try_from(self.chance.below(3)).unwrap();
        let (client, invoked) = (node, self.now - 500_000);
        self.history.push(Event { client, key, node, invoked, returned, call, answer });
    }

    /// Everything arrives; then every key is read from every replica.
    fn heal(&mut self) {
        if self.has(Bug::DropHints) {
            self.late.clear();
        }
        while !self.late.is_empty() {
            let index = self.chance.index(self.late.len());
            self.deliver(index);
        }
        self.now += 60_000_000_000;
        self.history.marks.push(Mark::Converged { at: self.now });
        for key in 0..KEYS {
            for replica in 0..REPLICAS {
                self.now += 1_000_000;
                self.read(key, Some(replica));
            }
        }
    }
}
