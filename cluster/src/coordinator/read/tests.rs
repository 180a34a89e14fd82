//! Every order of answers for up to three copies and a stand-in, held to what a read promises;
//! and random schedules for more copies.

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::causality::{Context, Sibling};
use annulus_engine::model::{NamespaceId, OriginId, Token, VersionVector};
use proptest::prelude::*;

use super::*;

fn nodes(range: std::ops::Range<u32>) -> Vec<NodeId> {
    range.map(NodeId).collect()
}

fn need(n: u8, total: u8, primary: u8, sloppy: bool) -> Requirement {
    let primary = if sloppy { primary } else { total.max(primary) };
    Requirement { n, total, primary, durable: 0, sloppy }
}

/// The `version`-th write of the key; 0 is none.
fn record(version: u64) -> Option<Record> {
    (version > 0).then(|| Record {
        token: Token(7),
        namespace: NamespaceId(1),
        // Counted by each server for itself.
        incarnation: u32::try_from(9 - version % 9).unwrap(),
        kind: if version == 2 { Kind::Delete } else { Kind::Put },
        dot: Dot { origin: OriginId(1), sequence: version },
        timestamp: Timestamp(version),
        expiry_ms: 0,
        key: b"key".to_vec(),
        value: if version == 2 { Vec::new() } else { vec![b'v'] },
    })
}

fn digest_at(version: u64) -> u64 {
    record(version).map_or(0, |record| digest(&record.as_ref()).unwrap())
}

fn as_of(node: NodeId) -> Timestamp {
    Timestamp(100 + u64::from(node.0))
}

/// A read, and what the test knows of it.
#[derive(Clone, Debug)]
struct Fixture {
    op: ReadOp,
    versions: Vec<u64>,
    healthy: BTreeSet<NodeId>,
    asked: BTreeSet<(NodeId, bool)>,
    answered: BTreeSet<(NodeId, bool)>,
    failed: BTreeSet<NodeId>,
    damaged: BTreeSet<NodeId>,
    hedged: bool,
    verdict: Option<Verdict>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Answer(NodeId, bool),
    Fail(NodeId),
    Unknown(NodeId),
    Hedge,
    Deadline,
}

type Key = (
    Inline<Place, PLACES_MAX>,
    u64,
    BTreeSet<(NodeId, bool)>,
    BTreeSet<(NodeId, bool)>,
    BTreeSet<NodeId>,
    BTreeSet<NodeId>,
    bool,
    Option<Verdict>,
);

impl Fixture {
    fn begin(
        need: Requirement,
        freshness: Option<Freshness>,
        versions: Vec<u64>,
        healthy: BTreeSet<NodeId>,
    ) -> Fixture {
        let (n, all) = (u32::from(need.n), u32::try_from(versions.len()).unwrap());
        let op = ReadOp::begin(need, NodeId(0), &nodes(0..n), &nodes(n..all), freshness);
        let mut fixture = Fixture {
            op,
            versions,
            healthy,
            asked: BTreeSet::new(),
            answered: BTreeSet::new(),
            failed: BTreeSet::new(),
            damaged: BTreeSet::new(),
            hedged: false,
            verdict: None,
        };
        fixture.advance();
        fixture
    }

    fn key(&self) -> Key {
        let Fixture { op, asked, answered, failed, damaged, hedged, verdict, .. } = self.clone();
        (op.places, op.merged_digest, asked, answered, failed, damaged, hedged, verdict)
    }

    fn version(&self, node: NodeId) -> u64 {
        self.versions[node.0 as usize]
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Answer(node, is_full) => {
                self.answered.insert((node, is_full));
                let version = self.version(node);
                if is_full {
                    let record = record(version);
                    let record = record.as_ref().map(Record::as_ref);
                    self.op.full(node, as_of(node), true, record.as_ref()).unwrap();
                } else {
                    self.op.digest(node, as_of(node), true, digest_at(version));
                }
            }
            Event::Fail(node) => {
                self.failed.insert(node);
                self.op.failed(node);
            }
            Event::Unknown(node) => {
                self.damaged.insert(node);
                self.op.unknown(node);
            }
            Event::Hedge => {
                self.hedged = true;
                let (mut asks, healthy) = (no_asks(), self.healthy.clone());
                self.op.hedge(3, |node| healthy.contains(&node), &mut asks);
                self.sent(&asks);
            }
            Event::Deadline => {
                let verdict = self.op.deadline();
                assert_eq!(verdict.is_some(), self.verdict.is_none(), "answered once");
                self.judge(verdict, true);
            }
        }
        self.advance();
    }

    fn advance(&mut self) {
        let (mut asks, healthy) = (no_asks(), self.healthy.clone());
        let verdict = self.op.advance(1, |node| healthy.contains(&node), &mut asks);
        self.sent(&asks);
        if verdict.is_some() {
            assert!(self.verdict.is_none(), "answered twice");
            assert!(asks.is_empty() || verdict == Some(Verdict::Unavailable) || self.is_stale());
        }
        self.judge(verdict, false);
        if self.verdict.is_none() {
            assert!(self.op.outstanding().next().is_some(), "it waits for nothing: {self:?}");
        }
    }

    fn is_stale(&self) -> bool {
        self.op.freshness.is_some()
    }

    fn sent(&mut self, asks: &Asks) {
        for (node, want) in asks.iter() {
            assert!(node.0 < u32::from(self.op.requirement.n) || self.op.requirement.sloppy);
            assert!(*node == NodeId(0) || self.healthy.contains(node) || self.asked(*node));
            assert!(self.asked.insert((*node, *want == Want::Full)), "asked twice: {self:?}");
        }
    }

    fn asked(&self, node: NodeId) -> bool {
        self.asked.contains(&(node, true)) || self.asked.contains(&(node, false))
    }

    fn is_home(&self, node: NodeId) -> bool {
        node.0 < u32::from(self.op.requirement.n)
    }

    fn judge(&mut self, verdict: Option<Verdict>, is_late: bool) {
        let Some(verdict) = verdict else { return };
        self.verdict = Some(verdict);
        match verdict {
            Verdict::Done(facts) => self.judge_done(facts),
            Verdict::Stale(facts) => {
                let freshness = self.op.freshness.unwrap();
                assert!(!freshness.stale_ok && facts.as_of < freshness.at_least);
            }
            Verdict::Unavailable => assert!(!self.could_succeed(), "given up early: {self:?}"),
            Verdict::Corrupt => {
                assert!(
                    nodes(0..self.op.requirement.n.into())
                        .iter()
                        .all(|node| self.damaged.contains(node))
                );
            }
            Verdict::Expired => assert!(is_late),
        }
    }

    fn judge_done(&self, facts: ReadFacts) {
        let merged = self.op.merged().map_or(0, |record| record.timestamp.0);
        let answered: BTreeSet<NodeId> = self.answered.iter().map(|(node, _)| *node).collect();
        // Whoever answered and has nothing newer; only these may count.
        let within: BTreeSet<NodeId> =
            answered.iter().copied().filter(|node| self.version(*node) <= merged).collect();
        let homes = within.iter().filter(|node| self.is_home(**node));
        assert!(usize::from(facts.answers) <= within.len(), "{self:?}");
        assert!(usize::from(facts.primaries) <= homes.clone().count());
        assert!(self.op.requirement.may_be_met(facts.answers, facts.primaries));
        // as_of never lies: it is that of a home replica all of whose data is in the answer.
        let greatest = homes.map(|node| as_of(*node)).max().unwrap_or_default();
        assert!(facts.as_of <= greatest, "{self:?}");
        if let Some(Freshness { at_least, stale_ok: false }) = self.op.freshness {
            assert!(facts.as_of >= at_least);
        }
        let is_real = merged == 0 || answered.iter().any(|node| self.version(*node) == merged);
        assert!(is_real, "nobody said that");
        // Nobody counts who refused or does not know, unless he answered after all.
        for node in self.op.stale() {
            assert!(self.is_home(node) && self.version(node) < merged && answered.contains(&node));
        }
    }

    /// Whether those that have not failed are enough.
    fn could_succeed(&self) -> bool {
        let all = nodes(0..u32::try_from(self.versions.len()).unwrap());
        let usable = all.iter().filter(|node| {
            let asked = self.asked(**node);
            let is_out = self.op.places.iter().any(|place| {
                place.node == **node && matches!(place.state, State::Failed | State::Unknown)
            });
            let is_well = **node == NodeId(0) || self.healthy.contains(node);
            let may_count = self.op.requirement.sloppy || self.is_home(**node);
            may_count && !is_out && (asked || is_well)
        });
        let homes = usable.clone().filter(|node| self.is_home(**node)).count();
        let need = &self.op.requirement;
        usable.count() >= usize::from(need.needed()) && homes >= usize::from(need.primary)
    }

    fn possible(&self) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::new();
        for (node, is_full) in self.asked.difference(&self.answered) {
            // Also from one that was given up: the answer was only late.
            events.push(Event::Answer(*node, *is_full));
            if self.op.outstanding_since(*node).is_some() {
                events.push(Event::Fail(*node));
                events.push(Event::Unknown(*node));
            }
        }
        if !self.hedged {
            events.push(Event::Hedge);
        }
        events.push(Event::Deadline);
        events
    }

    /// Every order of events, each state once, and one event beyond the answer.
    fn walk(self) -> usize {
        let mut seen = BTreeSet::new();
        let mut stack = vec![self];
        while let Some(fixture) = stack.pop() {
            if !seen.insert(fixture.key()) {
                continue;
            }
            for event in fixture.possible() {
                let mut next = fixture.clone();
                next.happen(event);
                if fixture.verdict.is_none() {
                    stack.push(next);
                }
            }
        }
        seen.len()
    }
}

fn versions(count: u32) -> impl Iterator<Item = Vec<u64>> {
    (0..3u64.pow(count)).map(move |number| (0..count).map(|i| number / 3u64.pow(i) % 3).collect())
}

#[test]
fn every_order_of_answers_ends_once_and_keeps_the_promise() {
    let mut states = 0;
    for n in 1u8..=3 {
        for r in 1..=n {
            for versions in versions(n.into()) {
                let all = nodes(0..n.into()).into_iter().collect();
                states += Fixture::begin(need(n, r, r, false), None, versions, all).walk();
            }
        }
    }
    assert!(states > 1_000, "{states}");
}

#[test]
fn stand_ins_answer_for_home_replicas_that_do_not() {
    let mut states = 0;
    for n in 1u8..=2 {
        for (r, pr) in (1..=n).flat_map(|r| (0..=r).map(move |pr| (r, pr))) {
            for versions in versions(u32::from(n) + 1) {
                for mask in 0u32..1 << n {
                    let healthy =
                        nodes(0..u32::from(n) + 1).into_iter().filter(|i| mask >> i.0 & 1 == 0);
                    let need = need(n, r, pr, true);
                    let healthy = healthy.collect();
                    states += Fixture::begin(need, None, versions.clone(), healthy).walk();
                }
            }
        }
    }
    assert!(states > 1_000, "{states}");
}

#[test]
fn a_fresh_enough_replica_is_looked_for_and_its_absence_admitted() {
    for stale_ok in [false, true] {
        for at_least in [100, 101, 102, 103] {
            for versions in versions(3) {
                let freshness = Freshness { at_least: Timestamp(at_least), stale_ok };
                let all = nodes(0..3).into_iter().collect();
                let need = need(3, 1, 1, false);
                let fixture = Fixture::begin(need, Some(freshness), versions, all);
                fixture.clone().walk();
                let mut run = fixture;
                while run.verdict.is_none() {
                    let next = *run.asked.difference(&run.answered).next().unwrap();
                    run.happen(Event::Answer(next.0, next.1));
                }
                match run.verdict.unwrap() {
                    Verdict::Done(facts) => {
                        assert!(stale_ok || facts.as_of >= Timestamp(at_least));
                        assert!(facts.as_of >= Timestamp(at_least.min(102)));
                    }
                    verdict => assert!(matches!(verdict, Verdict::Stale(_)) && at_least == 103),
                }
            }
        }
    }
}

/// What W + R > N means: whatever the order of answers, a read sees what W replicas have.
#[test]
fn a_read_sees_what_a_quorum_has() {
    for (w, r) in [(1usize, 3u8), (2, 2), (3, 1), (2, 3), (3, 3)] {
        for versions in versions(3) {
            if versions.iter().filter(|version| **version == 2).count() < w {
                continue;
            }
            let all = nodes(0..3).into_iter().collect();
            let mut seen = BTreeSet::new();
            let mut stack = vec![Fixture::begin(need(3, r, r, false), None, versions, all)];
            while let Some(fixture) = stack.pop() {
                if let Some(Verdict::Done(_)) = fixture.verdict {
                    assert_eq!(fixture.op.merged().unwrap().timestamp, Timestamp(2));
                }
                if fixture.verdict.is_some() || !seen.insert(fixture.key()) {
                    continue;
                }
                for event in fixture.possible() {
                    let mut next = fixture.clone();
                    next.happen(event);
                    stack.push(next);
                }
            }
        }
    }
}

#[test]
fn equal_digests_need_one_state_and_differing_ones_are_fetched_once_each() {
    let all: BTreeSet<NodeId> = nodes(0..3).into_iter().collect();
    let equal = Fixture::begin(need(3, 3, 3, false), None, vec![1, 1, 1], all.clone());
    let full = |fixture: &Fixture| fixture.asked.iter().filter(|(_, full)| *full).count();
    let run = |mut fixture: Fixture| {
        while let Some((node, is_full)) = fixture.asked.difference(&fixture.answered).next() {
            let event = Event::Answer(*node, *is_full);
            fixture.happen(event);
        }
        fixture
    };
    assert_eq!(full(&run(equal)), 1);
    let newer = Fixture::begin(need(3, 3, 3, false), None, vec![0, 1, 1], all);
    let newer = run(newer);
    assert_eq!(full(&newer), 2, "of two that have the same, one is asked");
    assert_eq!(newer.op.stale().collect::<Vec<_>>(), [NodeId(0)]);
}

#[test]
fn a_damaged_range_is_never_absent() {
    let mut fixture =
        Fixture::begin(need(1, 1, 1, false), None, vec![0], nodes(0..1).into_iter().collect());
    fixture.happen(Event::Unknown(NodeId(0)));
    assert_eq!(fixture.verdict, Some(Verdict::Corrupt));
    let all: BTreeSet<NodeId> = nodes(0..3).into_iter().collect();
    let mut fixture = Fixture::begin(need(3, 1, 1, false), None, vec![1, 1, 1], all);
    fixture.happen(Event::Unknown(NodeId(0)));
    fixture.happen(Event::Fail(NodeId(1)));
    assert!(fixture.verdict.is_none());
    fixture.happen(Event::Answer(NodeId(2), true));
    assert!(matches!(fixture.verdict, Some(Verdict::Done(facts)) if facts.answers == 1));
}

#[test]
fn a_state_that_cannot_be_read_counts_as_no_answer() {
    let all: BTreeSet<NodeId> = nodes(0..2).into_iter().collect();
    let mut fixture = Fixture::begin(need(2, 1, 1, false), None, vec![1, 1], all);
    let broken = Record { kind: Kind::Siblings, value: vec![9], ..record(1).unwrap() };
    let broken = Some(&broken.as_ref()).copied();
    assert!(fixture.op.full(NodeId(0), Timestamp(1), true, broken.as_ref()).is_err());
    fixture.advance();
    fixture.happen(Event::Answer(NodeId(1), true));
    assert!(matches!(fixture.verdict, Some(Verdict::Done(_))));
}

#[test]
fn a_state_of_another_key_counts_as_no_answer() {
    let mut op = ReadOp::begin(need(2, 2, 2, false), NodeId(0), &nodes(0..2), &[], None);
    let mut asks = no_asks();
    op.advance(0, |_| true, &mut asks);
    let (right, wrong) =
        (record(1).unwrap(), Record { key: b"other".to_vec(), ..record(2).unwrap() });
    op.full(NodeId(0), Timestamp(1), true, Some(&right.as_ref())).unwrap();
    assert!(op.full(NodeId(1), Timestamp(1), true, Some(&wrong.as_ref())).is_err());
    assert_eq!(op.advance(0, |_| true, &mut asks), Some(Verdict::Unavailable));
}

fn state(writes: &[(u32, u64)], context: &[(u32, u64)]) -> Record {
    let mut state = KeyState::new();
    let vector: VersionVector = context
        .iter()
        .map(|(origin, sequence)| Dot { origin: OriginId(*origin), sequence: *sequence })
        .collect();
    for (origin, sequence) in writes {
        let write = Sibling {
            dot: Dot { origin: OriginId(*origin), sequence: *sequence },
            timestamp: Timestamp(*sequence),
            is_delete: false,
            is_blind: false,
            expiry_ms: 0,
            value: b"value".into(),
        };
        state.write(write, &Context { vector: vector.clone(), timestamp: Timestamp(1) }).unwrap();
    }
    state.to_record(&record(1).unwrap().as_ref())
}

#[test]
fn digests_tell_values_apart_and_not_what_replicas_have_seen() {
    let plain = state(&[(1, 5)], &[]);
    assert_eq!(digest(&plain.as_ref()), digest(&state(&[(1, 5)], &[(2, 9)]).as_ref()));
    assert_ne!(digest(&plain.as_ref()), digest(&state(&[(2, 5)], &[]).as_ref()));
    assert_ne!(digest(&plain.as_ref()), digest(&state(&[(1, 5), (2, 6)], &[]).as_ref()));
    let all: BTreeMap<u64, u64> = (0..1000).map(|version| (digest_at(version), version)).collect();
    assert_eq!(all.len(), 1000);
    assert_eq!(all[&0], 0);
}

#[test]
fn concurrent_values_are_merged_and_both_replicas_repaired() {
    let (one, other) = (state(&[(1, 5)], &[]), state(&[(2, 6)], &[]));
    let mut op = ReadOp::begin(need(2, 2, 2, false), NodeId(0), &nodes(0..2), &[], None);
    let mut asks = no_asks();
    assert_eq!(op.advance(0, |_| true, &mut asks), None);
    assert_eq!(*asks, [(NodeId(0), Want::Full), (NodeId(1), Want::Digest)]);
    op.full(NodeId(0), Timestamp(10), true, Some(&one.as_ref())).unwrap();
    op.digest(NodeId(1), Timestamp(11), true, digest(&other.as_ref()).unwrap());
    asks.clear();
    assert_eq!(op.advance(0, |_| true, &mut asks), None);
    assert_eq!(*asks, [(NodeId(1), Want::Full)]);
    op.full(NodeId(1), Timestamp(12), true, Some(&other.as_ref())).unwrap();
    let facts = ReadFacts { as_of: Timestamp(12), answers: 2, primaries: 2 };
    assert_eq!(op.advance(0, |_| true, &mut asks), Some(Verdict::Done(facts)));
    assert_eq!(op.stale().collect::<Vec<_>>(), [NodeId(0), NodeId(1)]);
    let merged = op.take_merged().unwrap();
    assert_eq!(KeyState::decode(&merged.value).unwrap().siblings().len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn random_schedules_end_once_and_keep_the_promise(
        n in 1u8..=12,
        levels in any::<(u8, u8, bool)>(),
        versions in prop::collection::vec(0u64..5, 16),
        well in any::<u32>(),
        picks in prop::collection::vec(any::<(u8, u8)>(), 0..60),
    ) {
        let (r, pr, sloppy) = (levels.0 % n + 1, levels.1 % (n + 1), levels.2);
        let healthy = nodes(0..16).into_iter().filter(|node| well >> node.0 & 3 != 0).collect();
        let mut fixture = Fixture::begin(need(n, r, pr, sloppy), None, versions, healthy);
        for (pick, kind) in picks {
            let events = fixture.possible();
            // Answers are commoner than the rest.
            let answers: Vec<&Event> =
                events.iter().filter(|event| matches!(event, Event::Answer(..))).collect();
            let event = match answers.is_empty() || kind < 60 {
                true => events[usize::from(pick) % events.len()],
                false => *answers[usize::from(pick) % answers.len()],
            };
            fixture.happen(event);
        }
        fixture.happen(Event::Deadline);
        prop_assert!(fixture.verdict.is_some());
    }
}
