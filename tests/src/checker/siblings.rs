//! Siblings: every value that nobody replaced is there, and none that somebody did.
//!
//! Invariant checked (`RELIABILITY.md` 5.2): a write replaces what its client had read, by the
//! context, and nothing else. So a read that must have seen a put (`duty.rs`) shows its value,
//! unless a write of a client that had read it may have replaced it; and a read that must have
//! seen a write shows nothing that this write replaced; nor does any read show both.
//!
//! What a client had read is taken from the history alone, not from the context's bytes: the
//! values in the answer, and what those had replaced. A delete without a context replaces what
//! its coordinator finds, so it excuses the absence of everything begun before it ended.

use std::collections::{BTreeMap, BTreeSet};

use super::Violation;
use super::duty::must_see;
use super::ledger::{Ledger, Write};
use crate::history::{Call, Event, EventId, History, ValueId};

/// Who replaced what.
#[derive(Debug)]
pub(super) struct Replacements<'h> {
    history: &'h History,
    /// By the event of a write: the values that its client had seen.
    seen_by: BTreeMap<EventId, BTreeSet<ValueId>>,
    /// By value: the writes whose clients had seen it.
    replacers: BTreeMap<ValueId, Vec<EventId>>,
    /// Deletes without a context, by key.
    blind_deletes: BTreeMap<u32, Vec<EventId>>,
}

impl<'h> Replacements<'h> {
    pub(super) fn of(history: &'h History, ledger: &Ledger) -> Replacements<'h> {
        let mut made = Replacements {
            history,
            seen_by: BTreeMap::new(),
            replacers: BTreeMap::new(),
            blind_deletes: BTreeMap::new(),
        };
        let mut by_value: BTreeMap<ValueId, EventId> = BTreeMap::new();
        let keys: BTreeSet<u32> = history.events.iter().map(|event| event.key).collect();
        // In the order of invocation: what a write's client had seen was written before.
        let mut writes: Vec<(u32, &Write)> =
            keys.iter().flat_map(|key| ledger.of_key(*key).iter().map(|w| (*key, w))).collect();
        writes.sort_unstable_by_key(|(_, write)| write.id);
        for (key, write) in writes {
            if write.value.is_none() && write.after.is_none() {
                made.blind_deletes.entry(key).or_default().push(write.id);
            }
            let mut seen = BTreeSet::new();
            for value in known_after(history, write.after) {
                seen.insert(value);
                if let Some(earlier) = by_value.get(&value) {
                    seen.extend(made.seen_by.get(earlier).into_iter().flatten());
                }
            }
            for value in &seen {
                made.replacers.entry(*value).or_default().push(write.id);
            }
            made.seen_by.insert(write.id, seen);
            by_value.extend(write.value.map(|value| (value, write.id)));
        }
        made
    }

    /// Whether the read may miss the write's value because somebody replaced it.
    pub(super) fn may_be_replaced(&self, read: &Event, write: &Write) -> bool {
        let before = |id: &EventId| self.history.events[*id].invoked < read.returned;
        let replaced = write
            .value
            .and_then(|value| self.replacers.get(&value))
            .is_some_and(|replacers| replacers.iter().any(before));
        let blindly = self.blind_deletes.get(&read.key).is_some_and(|deletes| {
            deletes.iter().filter(|id| before(id)).any(|id| {
                let delete = &self.history.events[*id];
                // One whose answer never came may have been carried out at any time.
                delete.receipt().is_none() || write.invoked < delete.returned
            })
        });
        replaced || blindly
    }

    /// The values that the write replaces wherever it arrives.
    pub(super) fn replaced_by(&self, write: EventId) -> impl Iterator<Item = ValueId> + '_ {
        self.seen_by.get(&write).into_iter().flatten().copied()
    }
}

/// The values that a client knows by the answer of this event.
fn known_after(history: &History, event: Option<EventId>) -> Vec<ValueId> {
    let Some(event) = event.map(|id| &history.events[id]) else { return Vec::new() };
    match event.reading() {
        Some(reading) => reading.values.iter().map(|seen| seen.value).collect(),
        // The context of a write's answer: its own value, and what it was written over.
        None => {
            let own = match event.call {
                Call::Put { value, .. } => Some(value),
                _ => None,
            };
            let before = known_after(history, event.call.after());
            own.into_iter().chain(before).collect()
        }
    }
}

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let ledger = Ledger::of(history);
    let replacements = Replacements::of(history, &ledger);
    let mut found = Vec::new();
    for (id, event, reading) in history.readings() {
        let mut report = |what| {
            found.push(Violation { checker: "siblings", key: event.key, event: Some(id), what });
        };
        let shown: BTreeSet<ValueId> = reading.values.iter().map(|seen| seen.value).collect();
        if shown.len() != reading.values.len() {
            report("shows a value twice".to_owned());
        }
        for write in ledger.of_key(event.key) {
            let is_shown = write.value.is_some_and(|value| shown.contains(&value));
            let reason = must_see(history, event, reading, write);
            if let (Some(value), Some(reason)) = (write.value, reason)
                && !is_shown
                && !write.may_have_expired(history, event.returned)
                && !replacements.may_be_replaced(event, write)
            {
                report(format!("value {value} of event {} is missing: {reason}", write.id));
            }
            if is_shown || reason.is_some() {
                for value in replacements.replaced_by(write.id).filter(|v| shown.contains(v)) {
                    let why = reason.map_or("it is shown as well".to_owned(), |r| r.to_string());
                    report(format!("value {value}, which event {} replaced: {why}", write.id));
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Bug, caught, clean};
    use super::*;
    use crate::history::Mode;

    #[test]
    fn right_histories_pass() {
        clean(check, Mode::Siblings);
    }

    #[test]
    fn a_lost_sibling_is_caught() {
        caught(check, Mode::Siblings, Bug::AckBeforeStore);
        caught(check, Mode::Siblings, Bug::KeepOneSibling);
        caught(check, Mode::Siblings, Bug::DropHints);
    }

    #[test]
    fn replication_of_events_instead_of_states_is_caught() {
        caught(check, Mode::Siblings, Bug::ReplicateEvents);
    }

    #[test]
    fn a_replaced_value_that_comes_back_is_caught() {
        caught(check, Mode::Siblings, Bug::ForgetReplaced);
    }
}
