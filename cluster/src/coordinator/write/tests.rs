//! Every order of events for up to three copies, and random ones for more, against a model that
//! is nothing but sets of servers.

use std::collections::BTreeSet;

use annulus_net::wire::fields::{Level, OperationFlags};
use proptest::prelude::*;

use super::super::quorum::Defaults;
use super::*;

fn nodes(range: std::ops::Range<u32>) -> Vec<NodeId> {
    range.map(NodeId).collect()
}

fn need(n: u8, total: u8, primary: u8, durable: u8, sloppy: bool) -> Requirement {
    let primary = if sloppy { primary } else { total.max(primary).max(durable) };
    Requirement { n, total, primary, durable, sloppy }
}

/// What the test knows: who was sent it, who has said what.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Model {
    sent: BTreeSet<NodeId>,
    accepted: BTreeSet<NodeId>,
    durable: BTreeSet<NodeId>,
    failed: BTreeSet<NodeId>,
    answered: bool,
    expired: bool,
}

impl Model {
    fn of(op: &WriteOp) -> Model {
        Model { sent: op.outstanding().collect(), ..Model::default() }
    }

    fn acks(&self, n: u8) -> Acks {
        let all = self.accepted.union(&self.durable);
        let count = |nodes: usize| u8::try_from(nodes).unwrap();
        Acks {
            total: count(all.clone().count()),
            primary: count(all.filter(|node| node.0 < u32::from(n)).count()),
            durable: count(self.durable.len()),
        }
    }

    /// Whether those that have not failed for good could still make it.
    fn is_possible(&self, need: &Requirement) -> bool {
        let lost = |node: &&NodeId| {
            self.failed.contains(node)
                && !self.accepted.contains(node)
                && !self.durable.contains(node)
        };
        let hope: Vec<&NodeId> = self.sent.iter().filter(|node| !lost(node)).collect();
        let primary = hope.iter().filter(|node| node.0 < u32::from(need.n)).count();
        hope.len() >= usize::from(need.needed()) && primary >= usize::from(need.primary)
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Acked(NodeId, bool),
    Failed(NodeId),
    Deadline,
}

/// Lets an event happen to both, and holds the operation to the promise.
fn happen(
    op: &mut WriteOp,
    model: &mut Model,
    event: Event,
    healthy: &BTreeSet<NodeId>,
) -> Decision {
    let need = op.requirement;
    let decision = match event {
        Event::Acked(node, is_durable) => {
            if model.sent.contains(&node) {
                let set = if is_durable { &mut model.durable } else { &mut model.accepted };
                set.insert(node);
            }
            op.acked(node, is_durable)
        }
        Event::Failed(node) => {
            if model.sent.contains(&node) {
                model.failed.insert(node);
            }
            op.failed(node, 7, |node| healthy.contains(&node))
        }
        Event::Deadline => {
            model.expired = true;
            op.deadline()
        }
    };
    let acks = model.acks(need.n);
    match decision {
        Decision::Wait => assert!(
            model.answered || (!need.is_met(acks) && !model.expired && model.is_possible(&need)),
            "it waits for nothing: {op:?} {model:?} {event:?}"
        ),
        Decision::Also(node) => {
            assert!(!model.answered && healthy.contains(&node));
            assert!(need.sloppy || node.0 < need.n.into(), "{node} is no home replica");
            assert!(model.sent.insert(node), "{node} was sent it twice");
        }
        Decision::Done(reported) => {
            assert!(!model.answered, "answered twice");
            assert_eq!(reported, acks);
            assert!(need.is_met(acks));
            model.answered = true;
        }
        Decision::MayBeApplied(reported) => {
            assert!(!model.answered, "answered twice");
            assert_eq!(reported, acks);
            assert!(!need.is_met(acks));
            assert!(model.expired || !model.is_possible(&need), "given up too early: {model:?}");
            model.answered = true;
        }
    }
    assert_eq!(op.is_answered(), model.answered);
    assert!(!model.expired || model.answered, "nothing waits for ever");
    decision
}

/// Every event that may come next; each server says each thing at most once.
fn possible(op: &WriteOp, model: &Model) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for node in model.sent.iter().copied() {
        if !model.accepted.contains(&node) && !model.durable.contains(&node) {
            events.push(Event::Acked(node, false));
        }
        if !model.durable.contains(&node) {
            events.push(Event::Acked(node, true));
        }
        if !model.failed.contains(&node) && op.outstanding_since(node).is_some() {
            events.push(Event::Failed(node));
        }
    }
    if !model.expired {
        events.push(Event::Deadline);
    }
    events
}

/// Walks every order of events, each state once, and one event beyond the answer.
fn walk(op: WriteOp, model: Model, healthy: &BTreeSet<NodeId>) -> usize {
    let mut seen = BTreeSet::new();
    let mut stack = vec![(op, model)];
    while let Some((op, model)) = stack.pop() {
        if !seen.insert((op, model.clone())) {
            continue;
        }
        for event in possible(&op, &model) {
            let (mut next, mut after) = (op, model.clone());
            happen(&mut next, &mut after, event, healthy);
            if !model.answered {
                stack.push((next, after));
            }
        }
    }
    seen.len()
}

fn subsets(nodes: &[NodeId]) -> impl Iterator<Item = BTreeSet<NodeId>> + '_ {
    (0u32..1 << nodes.len()).map(|set| {
        nodes.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1).map(|(_, node)| *node).collect()
    })
}

#[test]
fn every_order_of_events_answers_once_and_keeps_the_promise() {
    let (mut begun, mut refused, mut states) = (0, 0, 0);
    for n in 1u8..=3 {
        let primaries = nodes(0..n.into());
        let last = if n < 3 { n + 2 } else { n + 1 };
        let fallbacks = nodes(n.into()..last.into());
        let all = nodes(0..last.into());
        for (w, pw, dw) in
            (1..=n).flat_map(|w| (0..=n).flat_map(move |pw| [0, n].map(move |dw| (w, pw, dw))))
        {
            // Strict writes count home replicas only, whatever PW says.
            for sloppy in if pw == 0 { &[false, true][..] } else { &[true] } {
                let sloppy = *sloppy;
                let need = need(n, w, pw, dw, sloppy);
                for me in [NodeId(0), NodeId(n.into())] {
                    for healthy in subsets(&all).filter(|healthy| healthy.contains(&me)) {
                        let is_healthy = |node| healthy.contains(&node);
                        match WriteOp::plan(need, me, &primaries, &fallbacks, is_healthy) {
                            Ok(op) => {
                                begun += 1;
                                states += walk(op, Model::of(&op), &healthy);
                            }
                            Err(refusal) => {
                                refused += 1;
                                assert_eq!(refusal.status, Status::UNAVAILABLE);
                                refused_rightly(&need, me, &healthy, &all);
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(begun > 100 && refused > 100 && states > 100_000, "{begun} {refused} {states}");
}

/// A write is only refused when those that are well could not have met the requirement.
fn refused_rightly(need: &Requirement, me: NodeId, healthy: &BTreeSet<NodeId>, all: &[NodeId]) {
    let is_home = |node: NodeId| node.0 < u32::from(need.n);
    let there = all.iter().filter(|node| **node == me || healthy.contains(node));
    let homes = there.clone().filter(|node| is_home(**node)).count();
    let usable = if need.sloppy { there.count() } else { homes };
    let is_enough = usable >= usize::from(need.needed()) && homes >= usize::from(need.primary);
    assert!(!is_enough || (!need.sloppy && !is_home(me)), "{need:?} {me} {healthy:?}");
}

#[test]
fn two_of_three_are_enough_and_the_third_is_still_counted() {
    let need = need(3, 2, 2, 2, false);
    let mut op = WriteOp::plan(need, NodeId(0), &nodes(0..3), &[], |_| true).unwrap();
    assert_eq!(op.acked(NodeId(0), true), Decision::Wait);
    let done = Acks { total: 2, primary: 2, durable: 2 };
    assert_eq!(op.acked(NodeId(2), true), Decision::Done(done));
    assert_eq!(op.outstanding().collect::<Vec<_>>(), [NodeId(1)]);
    assert_eq!(op.acked(NodeId(1), true), Decision::Wait);
    assert_eq!(op.acks().total, 3);
}

/// A client that has three acknowledgements may read from any one home: also when the homes have
/// become others meanwhile (seed 11 of the members' story).
#[test]
fn while_the_partition_moves_no_more_acks_are_told_than_either_homes_have() {
    let need = need(3, 2, 2, 2, false);
    let homes = nodes(1..4);
    let other = OtherHomes { homes: &homes, requirement: need };
    let mut op =
        WriteOp::plan_both(need, NodeId(0), &nodes(0..3), Some(other), &[], |_| true).unwrap();
    assert_eq!(op.acked(NodeId(0), true), Decision::Wait);
    assert_eq!(op.acked(NodeId(1), true), Decision::Wait, "only one of those that come");
    let done = Acks { total: 2, primary: 2, durable: 2 };
    assert_eq!(op.acked(NodeId(2), true), Decision::Done(done));
    assert_eq!(op.acks(), done, "three of the old, two of the new");
    assert_eq!(op.acked(NodeId(3), true), Decision::Wait);
    assert_eq!(op.acks().total, 3);
}

#[test]
fn an_ack_that_comes_twice_counts_once() {
    let need = need(3, 3, 3, 0, false);
    let mut op = WriteOp::plan(need, NodeId(0), &nodes(0..3), &[], |_| true).unwrap();
    for _ in 0..5 {
        assert_eq!(op.acked(NodeId(1), true), Decision::Wait);
        assert_eq!(op.acked(NodeId(9), true), Decision::Wait);
    }
    assert_eq!(op.acks().total, 1);
}

#[test]
fn a_sloppy_write_takes_the_next_in_line_for_one_that_fails() {
    let need = need(3, 2, 1, 0, true);
    let down = |node| node != NodeId(1) && node != NodeId(3);
    let mut op = WriteOp::plan(need, NodeId(0), &nodes(0..3), &nodes(3..6), down).unwrap();
    let targets = [NodeId(0), NodeId(2), NodeId(4)];
    assert_eq!(op.outstanding().collect::<Vec<_>>(), targets);
    assert_eq!(op.failed(NodeId(2), 5, down), Decision::Also(NodeId(5)));
    assert_eq!(op.outstanding_since(NodeId(5)), Some(5));
    assert_eq!(op.acked(NodeId(0), true), Decision::Wait);
    let done = Acks { total: 2, primary: 1, durable: 2 };
    assert_eq!(op.acked(NodeId(5), true), Decision::Done(done));
}

#[test]
fn a_strict_write_without_its_majority_is_not_begun() {
    let need = need(3, 2, 2, 2, false);
    let alone = |_| false;
    let plan = |me| WriteOp::plan(need, NodeId(me), &nodes(0..3), &nodes(3..6), alone);
    assert_eq!(plan(0).unwrap_err().status, Status::UNAVAILABLE);
    assert_eq!(plan(4).unwrap_err().status, Status::UNAVAILABLE);
}

#[test]
fn without_home_replicas_only_a_write_that_asks_for_none_is_begun() {
    let no_home = |node: NodeId| node.0 >= 3;
    let plan =
        |pw| WriteOp::plan(need(3, 2, pw, 0, true), NodeId(4), &nodes(0..3), &nodes(3..8), no_home);
    assert!(plan(1).is_err());
    let targets: Vec<NodeId> = plan(0).unwrap().outstanding().collect();
    assert_eq!(targets, [NodeId(4), NodeId(3), NodeId(5)]);
}

#[test]
fn defaults_and_plan_agree_on_what_can_be_met() {
    for n in 1u8..=5 {
        for (w, sloppy) in (1..=n).flat_map(|w| [(w, false), (w, true)]) {
            let defaults =
                Defaults { n, copies: n, w, r: 1, sloppy, synced: true, data_centres: 1 };
            let (level, none) = (Level::Default, OperationFlags(0));
            let need = Requirement::write(&defaults, level, level, level, none).unwrap();
            let primaries = nodes(0..n.into());
            assert!(WriteOp::plan(need, NodeId(0), &primaries, &[], |_| true).is_ok());
        }
    }
}

#[derive(Clone, Debug)]
struct Schedule {
    need: Requirement,
    me: u32,
    healthy: u32,
    events: Vec<(u8, u32)>,
}

fn schedules() -> impl Strategy<Value = Schedule> {
    (1u8..=16).prop_flat_map(|n| {
        let events = prop::collection::vec((0u8..8, 0u32..20), 0..60);
        (1..=n, 0..=n, 0..=n, any::<bool>(), 0u32..20, any::<u32>(), events).prop_map(
            move |(w, pw, dw, sloppy, me, healthy, events)| {
                let need = need(n, w, if pw % 2 == 0 { 0 } else { pw }, dw, sloppy);
                Schedule { need, me, healthy, events }
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn random_schedules_answer_once_and_keep_the_promise(schedule in schedules()) {
        let n = u32::from(schedule.need.n);
        let healthy: BTreeSet<NodeId> =
            (0..20).filter(|i| schedule.healthy >> i & 1 == 1).map(NodeId).collect();
        let is_healthy = |node| healthy.contains(&node);
        let me = NodeId(schedule.me);
        let planned =
            WriteOp::plan(schedule.need, me, &nodes(0..n), &nodes(n..20), is_healthy);
        let Ok(mut op) = planned else { return Ok(()) };
        let mut model = Model::of(&op);
        for (what, node) in schedule.events {
            let node = NodeId(node);
            let event = match what {
                0..=2 => Event::Acked(node, true),
                3 => Event::Acked(node, false),
                4..=6 if op.outstanding_since(node).is_some() => Event::Failed(node),
                4..=6 => continue,
                _ => Event::Deadline,
            };
            happen(&mut op, &mut model, event, &healthy);
        }
        happen(&mut op, &mut model, Event::Deadline, &healthy);
        prop_assert!(op.is_answered());
    }
}
