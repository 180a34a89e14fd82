//! Linearizability of each key as a register with get, put, delete and compare-and-set.
//!
//! Invariant checked: there is one order of all operations of a key, in which each stands
//! between its call and its answer, and each answer is what a plain variable would have given.
//! Wing and Gong's search ("Testing and verifying concurrent objects", 1993) with Lowe's memo of
//! (operations done, value) ("Testing for linearizability", 2017). An operation whose answer
//! never came may stand anywhere after its call, or nowhere.
//!
//! The search is exponential at worst; it is given up after a number of steps, and then nothing
//! is said. Keys are checked each on its own, which is enough: linearizability is local.

use std::collections::{BTreeMap, BTreeSet};

use annulus_net::wire::fields::Version;

use super::Violation;
use crate::history::{Answer, Call, EventId, Expect, History, ValueId};

/// Steps after which a key's search is given up.
pub const STEPS_MAX: usize = 300_000;

/// What the search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none. The event is the first answer that no order explains.
    Impossible(EventId),
    /// The search was given up.
    Unknown,
}

/// What an operation does with the variable, and what it answered.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Shows the value.
    Read(Option<ValueId>),
    /// Sets it, if it was as expected: `None` means whatever it was.
    Write { to: Option<ValueId>, from: Option<Option<ValueId>> },
    /// Found it not as expected, and changes nothing.
    Refuse(Option<ValueId>),
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    id: EventId,
    invoked: u64,
    /// `u64::MAX`: no answer, and it may never happen.
    returned: u64,
    step: Step,
}

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let mut keys: Vec<u32> = history.events.iter().map(|event| event.key).collect();
    keys.sort_unstable();
    keys.dedup();
    let judge = |key| match judge(history, key, STEPS_MAX) {
        Verdict::Linearizable | Verdict::Unknown => None,
        Verdict::Impossible(event) => {
            let what = "no order of the operations explains this answer".to_owned();
            Some(Violation { checker: "register", key, event: Some(event), what })
        }
    };
    keys.into_iter().filter_map(judge).collect()
}

/// Judges one key.
#[must_use]
pub fn judge(history: &History, key: u32, steps_max: usize) -> Verdict {
    let operations = operations(history, key);
    search(&operations, steps_max)
}

/// The operations of a key in the order of their calls.
fn operations(history: &History, key: u32) -> Vec<Operation> {
    let mut values: BTreeMap<Version, ValueId> = BTreeMap::new();
    for (_, event) in history.iter().filter(|(_, event)| event.key == key) {
        if let (Some(receipt), Call::Put { value, .. }) = (event.receipt(), event.call) {
            values.insert(receipt.version, value);
        }
        for seen in event.reading().into_iter().flat_map(|reading| &reading.values) {
            values.insert(seen.version, seen.value);
        }
    }
    let mut found = Vec::new();
    for (id, event) in history.iter().filter(|(_, event)| event.key == key) {
        let from = match event.call.expect() {
            Expect::Always => None,
            Expect::Absent => Some(None),
            // A version that nobody saw belongs to no value: `MAX` is never written.
            Expect::Version(version) => {
                Some(Some(values.get(&version).copied().unwrap_or(ValueId::MAX)))
            }
        };
        let to = match event.call {
            Call::Put { value, .. } => Some(value),
            Call::Get | Call::Delete { .. } => None,
        };
        let write = Step::Write { to, from };
        let (step, returned) = match (&event.answer, event.call) {
            (Answer::Values(reading), _) => {
                (Step::Read(reading.winner().map(|seen| seen.value)), event.returned)
            }
            (Answer::Written(_), _) => (write, event.returned),
            (Answer::ConditionFalse, _) => match from {
                Some(from) => (Step::Refuse(from), event.returned),
                None => continue,
            },
            (Answer::Perhaps, Call::Put { .. } | Call::Delete { .. }) => (write, u64::MAX),
            (Answer::NotStarted | Answer::Perhaps, _) => continue,
        };
        found.push(Operation { id, invoked: event.invoked, returned, step });
    }
    found.sort_by_key(|operation| operation.invoked);
    found
}

impl Step {
    /// The value afterwards, if it may happen now.
    fn apply(self, value: Option<ValueId>) -> Option<Option<ValueId>> {
        match self {
            Step::Read(shown) => (shown == value).then_some(value),
            Step::Write { to, from } => from.is_none_or(|from| from == value).then_some(to),
            Step::Refuse(from) => (from != value).then_some(value),
        }
    }
}

/// A set of operations, as bits.
type Done = Vec<u64>;

fn is_done(done: &Done, index: usize) -> bool {
    done[index / 64] >> (index % 64) & 1 == 1
}

fn flip(done: &mut Done, index: usize) {
    done[index / 64] ^= 1 << (index % 64);
}

/// Looks for an order. Depth first, without recursion: `path` holds the operations in it, each
/// with the value before it.
fn search(operations: &[Operation], steps_max: usize) -> Verdict {
    let must_end = operations.iter().filter(|it| it.returned < u64::MAX).count();
    let mut done: Done = vec![0; operations.len().div_ceil(64).max(1)];
    let mut ended = 0;
    let mut value = None;
    let mut path: Vec<(usize, Option<ValueId>)> = Vec::new();
    let mut seen: BTreeSet<(Done, Option<ValueId>)> = BTreeSet::new();
    // The best path explains why no longer one is possible.
    let mut furthest = (0, 0);
    let mut from = 0;
    for _ in 0..steps_max {
        if ended == must_end {
            return Verdict::Linearizable;
        }
        // Whatever comes next was called before the first answer of those to come.
        let first_open = (0..operations.len()).find(|index| !is_done(&done, *index));
        let rest = first_open.map_or(&[][..], |first| &operations[first..]);
        let base = first_open.unwrap_or(0);
        let horizon = rest
            .iter()
            .enumerate()
            .filter(|(offset, _)| !is_done(&done, base + offset))
            .map(|(offset, operation)| (operation.returned, base + offset))
            .min()
            .unwrap_or((u64::MAX, 0));
        if ended >= furthest.0 {
            furthest = (ended, horizon.1);
        }
        let mut next = None;
        for (index, operation) in operations.iter().enumerate().skip(from.max(base)) {
            if operation.invoked > horizon.0 {
                break;
            }
            if is_done(&done, index) {
                continue;
            }
            if let Some(after) = operation.step.apply(value) {
                flip(&mut done, index);
                if seen.insert((done.clone(), after)) {
                    next = Some((index, after));
                    break;
                }
                flip(&mut done, index);
            }
        }
        match next {
            Some((index, after)) => {
                path.push((index, value));
                ended += usize::from(operations[index].returned < u64::MAX);
                value = after;
                from = 0;
            }
            None => {
                let Some((index, before)) = path.pop() else {
                    return Verdict::Impossible(operations[furthest.1].id);
                };
                flip(&mut done, index);
                ended -= usize::from(operations[index].returned < u64::MAX);
                value = before;
                from = index + 1;
            }
        }
    }
    Verdict::Unknown
}

#[cfg(test)]
mod tests;
