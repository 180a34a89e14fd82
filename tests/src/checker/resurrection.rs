//! What was deleted stays deleted (P6), last write wins: no late hint, repair or replay brings
//! back a value that its delete beats.
//!
//! Invariant checked: once all replicas held the same and a read showed nothing before anybody
//! wrote the key again, no later read, of whatever level and replica, shows a value that was
//! begun before; and no read after convergence shows a value below the greatest acknowledged
//! delete. `versions.rs` knows only deletes that were acknowledged; this also catches a delete
//! whose fate nobody was told, but which everybody saw. Values that expire are left out: clocks
//! that differ may show them once more.

use std::collections::BTreeMap;

use super::Violation;
use super::duty::{reads_a_holder, survives};
use super::ledger::{Ledger, Write};
use crate::history::{Call, EventId, History, ValueId};

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let ledger = Ledger::of(history);
    let begun: BTreeMap<ValueId, u64> = history
        .events
        .iter()
        .filter_map(|event| match event.call {
            Call::Put { value, .. } => Some((value, event.invoked)),
            _ => None,
        })
        .collect();
    let mut found = Vec::new();
    // By key: when it was last found absent on converged replicas, since when, and by whom.
    let mut gone: BTreeMap<u32, (u64, u64, EventId)> = BTreeMap::new();
    for (id, event, reading) in history.readings() {
        let Some(converged) = history.converged_before(event.invoked) else { continue };
        let writes = ledger.of_key(event.key);
        let Some(seen) = reading.winner() else {
            let quiet = |write: &Write| !(converged..event.returned).contains(&write.invoked);
            let is_newer = gone.get(&event.key).is_none_or(|(_, since, _)| *since < converged);
            let is_told = reads_a_holder(history, reading, converged, event.returned);
            if is_newer && is_told && writes.iter().all(quiet) {
                gone.insert(event.key, (event.returned, converged, id));
            }
            continue;
        };
        if let Some((returned, converged, witness)) = gone.get(&event.key)
            && event.invoked >= *returned
            && seen.expiry_ms == 0
            && begun.get(&seen.value).is_some_and(|begun| begun < converged)
        {
            let what = format!("value {} is back; event {witness} found it gone", seen.value);
            found.push(violation(event.key, id, what));
        }
        let deletes = writes.iter().filter(|write| {
            write.value.is_none()
                && write.acked.is_some_and(|acked| acked <= converged)
                && survives(history, write, event.returned)
        });
        if let Some(delete) = deletes.max_by_key(|write| write.version)
            && delete.version > Some(seen.version)
        {
            let what = format!("value {} is back; event {} deleted it", seen.value, delete.id);
            found.push(violation(event.key, id, what));
        }
    }
    found
}

fn violation(key: u32, id: EventId, what: String) -> Violation {
    Violation { checker: "resurrection", key, event: Some(id), what }
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Bug, caught, clean};
    use super::*;
    use crate::history::Mode;

    #[test]
    fn right_histories_pass() {
        clean(check, Mode::Lww);
    }

    #[test]
    fn a_tombstone_that_goes_too_early_is_caught() {
        caught(check, Mode::Lww, Bug::PurgeEarly);
    }
}
