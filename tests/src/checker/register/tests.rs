//! Histories that a register allows, and ones that it does not.

use annulus_engine::model::{Dot, OriginId, Timestamp};
use annulus_engine::sim::Chance;

use super::*;
use crate::history::{Event, Mode, Reading, Receipt, Rules, Seen};

fn version(value: ValueId) -> Version {
    Version { timestamp: Timestamp(value), dot: Dot { origin: OriginId(1), sequence: value } }
}

fn reading(value: Option<ValueId>) -> Answer {
    let seen = value.map(|value| Seen { version: version(value), value, expiry_ms: 0 });
    Answer::Values(Reading { values: seen.into_iter().collect(), ..Reading::default() })
}

fn written(value: ValueId) -> Answer {
    Answer::Written(Receipt { version: version(value), ..Receipt::default() })
}

fn cas(from: Expect, value: ValueId) -> Call {
    Call::Put { value, ttl_ms: 0, after: None, expect: from }
}

/// From call, answer and both times.
fn history(calls: &[(u64, u64, Call, Answer)]) -> History {
    let mut history = History::new(Rules::of(Mode::Register));
    for (client, (invoked, returned, call, answer)) in (0..).zip(calls.iter().cloned()) {
        let (invoked, returned) = (invoked, returned);
        history.push(Event { client, key: 0, node: 0, invoked, returned, call, answer });
    }
    history
}

fn allowed(calls: &[(u64, u64, Call, Answer)]) -> bool {
    match judge(&history(calls), 0, STEPS_MAX) {
        Verdict::Linearizable => true,
        Verdict::Impossible(_) => false,
        Verdict::Unknown => panic!("a small history is judged"),
    }
}

#[test]
fn one_after_the_other() {
    let one = (0, 10, Call::put(1), written(1));
    assert!(allowed(&[(0, 1, Call::Get, reading(None))]));
    assert!(allowed(&[one.clone(), (11, 12, Call::Get, reading(Some(1)))]));
    assert!(!allowed(&[one.clone(), (11, 12, Call::Get, reading(None))]));
    assert!(!allowed(&[one, (11, 12, Call::Get, reading(Some(2)))]));
}

#[test]
fn concurrent_writes_take_any_order_but_one_for_all() {
    let two = [(0, 10, Call::put(1), written(1)), (0, 10, Call::put(2), written(2))];
    let then = |reads: &[(u64, ValueId)]| {
        let mut calls = two.to_vec();
        let reads = reads.iter().map(|(at, v)| (*at, *at, Call::Get, reading(Some(*v))));
        calls.extend(reads);
        allowed(&calls)
    };
    assert!(then(&[(11, 1), (12, 1)]));
    assert!(then(&[(11, 2), (12, 2)]));
    assert!(!then(&[(11, 1), (12, 2)]), "new, then old");
    assert!(then(&[(5, 1), (12, 2)]), "while both are under way");
    assert!(!then(&[(5, 1), (6, 2), (7, 1)]), "back and forth");
}

#[test]
fn what_was_never_answered_may_happen_late_once_or_never() {
    let lost = (0, 10, Call::put(1), Answer::Perhaps);
    let at = |at, value| (at, at, Call::Get, reading(value));
    assert!(allowed(&[lost.clone(), at(20, None)]));
    assert!(allowed(&[lost.clone(), at(20, None), at(30, Some(1))]));
    assert!(!allowed(&[lost.clone(), at(20, Some(1)), at(30, None)]));
    let two = (40, 50, Call::put(2), written(2));
    assert!(!allowed(&[lost, at(20, Some(1)), two, at(60, Some(1))]), "twice");
    let refused = (0, 10, Call::put(1), Answer::NotStarted);
    assert!(!allowed(&[refused, at(20, Some(1))]));
}

#[test]
fn deletes_and_conditions() {
    let put = (0, 1, Call::put(1), written(1));
    let delete = Call::Delete { after: None, expect: Expect::Always };
    let gone = (2, 3, delete, written(2));
    assert!(allowed(&[put.clone(), gone.clone(), (4, 5, Call::Get, reading(None))]));
    assert!(!allowed(&[put.clone(), gone.clone(), (4, 5, Call::Get, reading(Some(1)))]));
    let old = cas(Expect::Version(version(1)), 3);
    assert!(allowed(&[put.clone(), (2, 3, old, written(3))]));
    assert!(!allowed(&[put.clone(), gone.clone(), (4, 5, old, written(3))]));
    assert!(allowed(&[put.clone(), gone, (4, 5, old, Answer::ConditionFalse)]));
    let absent = cas(Expect::Absent, 4);
    assert!(!allowed(&[put.clone(), (2, 3, absent, written(4))]));
    assert!(allowed(&[put.clone(), (2, 3, absent, Answer::ConditionFalse)]));
    assert!(!allowed(&[put, (2, 3, old, Answer::ConditionFalse)]));
    // Of two who expect the same, one succeeds.
    let both = |other| {
        [(0, 10, cas(Expect::Absent, 1), written(1)), (0, 10, cas(Expect::Absent, 2), other)]
    };
    assert!(allowed(&both(Answer::ConditionFalse)));
    assert!(!allowed(&both(written(2))));
}

/// Clients at once on a variable; the answers are taken at a moment between call and answer.
fn simulate(seed: u64, clients: u64, operations: u64) -> History {
    let mut chance = Chance::new(seed);
    let mut moments: Vec<(u64, u64, u64, u64, Call)> = Vec::new();
    let mut next = 0;
    for client in 0..clients {
        let mut now = 0;
        for _ in 0..operations {
            let invoked = now + chance.between(1, 30);
            let moment = invoked + chance.between(0, 40);
            let returned = moment + chance.between(0, 40);
            now = returned;
            next += 1;
            let call = match chance.below(4) {
                0 | 1 => Call::Get,
                2 => Call::put(next),
                _ => cas(Expect::Absent, next),
            };
            moments.push((moment, client, invoked, returned, call));
        }
    }
    moments.sort_unstable_by_key(|it| (it.0, it.1));
    let mut value = None;
    let mut events = Vec::new();
    for (_, client, invoked, returned, call) in moments {
        let holds = call.expect() != Expect::Absent || value.is_none();
        let answer = match call {
            Call::Get => reading(value),
            Call::Put { .. } if chance.one_in(9) => Answer::NotStarted,
            Call::Put { value: new, .. } if holds => {
                value = Some(new);
                if chance.one_in(6) { Answer::Perhaps } else { written(new) }
            }
            _ => Answer::ConditionFalse,
        };
        let client = u32::try_from(client).unwrap();
        events.push(Event { client, key: 0, node: 0, invoked, returned, call, answer });
    }
    events.sort_by_key(|event| event.invoked);
    let mut history = History::new(Rules::of(Mode::Register));
    history.events = events;
    history
}

#[test]
fn every_history_of_a_variable_is_allowed() {
    for seed in 0..150 {
        let history = simulate(seed, 6, 25);
        assert_eq!(judge(&history, 0, STEPS_MAX), Verdict::Linearizable, "seed {seed}");
    }
}

#[test]
fn a_read_that_went_back_is_caught() {
    let mut caught = 0;
    for seed in 0..100 {
        let mut history = simulate(seed, 4, 20);
        // The last read shows what an earlier one showed.
        let reads: Vec<usize> = history
            .readings()
            .filter(|(.., it)| !it.values.is_empty())
            .map(|(id, ..)| id)
            .collect();
        let (Some(first), Some(last)) = (reads.first(), reads.last()) else { continue };
        let old = history.events[*first].answer.clone();
        if old == history.events[*last].answer {
            continue;
        }
        history.events[*last].answer = old;
        caught += u32::from(!check(&history).is_empty());
    }
    assert!(caught > 80, "{caught}");
}

#[test]
fn a_search_that_takes_too_long_is_given_up() {
    assert_eq!(judge(&simulate(1, 6, 20), 0, 5), Verdict::Unknown);
}
