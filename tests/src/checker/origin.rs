//! No value from nowhere: P2, and that a version means one write.
//!
//! Invariant checked: whatever a read shows was asked for, of this key, before the read ended;
//! was not answered `NOT_STARTED`; has the version that its writer was told; and no version, no
//! dot, stands for two values.

use std::collections::BTreeMap;

use annulus_engine::model::Dot;
use annulus_net::wire::fields::Version;

use super::Violation;
use crate::history::{Answer, Call, Event, EventId, History, ValueId};

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let puts: BTreeMap<ValueId, (EventId, &Event)> = history
        .iter()
        .filter_map(|(id, event)| match event.call {
            Call::Put { value, .. } => Some((value, (id, event))),
            _ => None,
        })
        .collect();
    let mut versions: BTreeMap<ValueId, Version> = BTreeMap::new();
    // A dot is one write of its key's partition, so two keys never share one either; but keys of
    // different partitions do.
    let mut dots: BTreeMap<(u32, Dot), Option<ValueId>> = BTreeMap::new();
    for (id, event) in history.iter() {
        if let Some(receipt) = event.receipt() {
            let value = match event.call {
                Call::Put { value, .. } => Some(value),
                _ => None,
            };
            if let Some(value) = value {
                versions.insert(value, receipt.version);
            }
            let dot = (event.key, receipt.version.dot);
            if let Some(other) = dots.insert(dot, value) {
                let what = format!("dot {:?} was given to {other:?} and to {value:?}", dot.1);
                found.push(violation(event, id, what));
            }
        }
    }
    for (id, event, reading) in history.readings() {
        for seen in &reading.values {
            let value = seen.value;
            let Some((put_id, put)) = puts.get(&value) else {
                found.push(violation(event, id, format!("value {value} was never written")));
                continue;
            };
            if put.key != event.key {
                found.push(violation(event, id, format!("value {value} is of key {}", put.key)));
            }
            if put.invoked > event.returned {
                found.push(violation(event, id, format!("value {value} is from the future")));
            }
            if matches!(put.answer, Answer::NotStarted | Answer::ConditionFalse) {
                let what = format!(
                    "value {value} of event {put_id} shows, which was answered {:?}",
                    put.answer
                );
                found.push(violation(event, id, what));
            }
            let known = *versions.entry(value).or_insert(seen.version);
            if known != seen.version {
                let what = format!("value {value} is of version {known} and {}", seen.version);
                found.push(violation(event, id, what));
            }
            let owner = *dots.entry((event.key, seen.version.dot)).or_insert(Some(value));
            if owner != Some(value) {
                let what = format!("dot {:?} is {owner:?} and {value}", seen.version.dot);
                found.push(violation(event, id, what));
            }
        }
    }
    found
}

fn violation(event: &Event, id: EventId, what: String) -> Violation {
    Violation { checker: "origin", key: event.key, event: Some(id), what }
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Bug, caught, clean, tell};
    use super::*;
    use crate::history::Mode;

    #[test]
    fn right_histories_pass() {
        clean(check, Mode::Lww);
        clean(check, Mode::Siblings);
    }

    #[test]
    fn a_refused_write_that_shows_is_caught() {
        caught(check, Mode::Lww, Bug::ApplyRefused);
        caught(check, Mode::Siblings, Bug::ApplyRefused);
    }

    #[test]
    fn two_writes_under_one_dot_are_caught() {
        caught(check, Mode::Lww, Bug::ReuseDots);
    }

    #[test]
    fn a_value_of_another_key_or_of_nobody_is_caught() {
        for shift in [1, 1_000_000] {
            let mut history = tell(1, Mode::Lww, None);
            for event in &mut history.events {
                if let Answer::Values(reading) = &mut event.answer {
                    reading.values.iter_mut().for_each(|seen| seen.value += shift);
                }
            }
            assert!(!check(&history).is_empty());
        }
    }
}
