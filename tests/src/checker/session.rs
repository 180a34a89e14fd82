//! Sessions: a write that passes back a context beats all that its client had read.
//!
//! Invariant checked (`RELIABILITY.md` 5.2): the stamp of a write with a context is above the
//! stamps of every value in the answer the context came from, whatever the clocks of the nodes
//! say; so a client that passes its context along reads its writes, as far as `versions.rs` and
//! `siblings.rs` oblige its reads. Also after a write whose answer gave the context.

use super::Violation;
use super::ledger::Ledger;
use crate::history::{EventId, History};

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let ledger = Ledger::of(history);
    let mut found = Vec::new();
    let mut keys: Vec<u32> = history.events.iter().map(|event| event.key).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys {
        for write in ledger.of_key(key) {
            let (Some(version), Some(after)) = (write.version, write.after) else { continue };
            let known = &history.events[after];
            let shown = known.reading().into_iter().flat_map(|reading| &reading.values);
            let before = shown
                .map(|seen| seen.version)
                .chain(known.receipt().map(|receipt| receipt.version))
                .max();
            if let Some(before) = before
                && version.timestamp <= before.timestamp
            {
                let what = format!(
                    "the write's stamp {:?} is not above {:?}, which its client had read by \
                     event {after}",
                    version.timestamp, before.timestamp
                );
                found.push(violation(key, write.id, what));
            }
        }
    }
    found
}

fn violation(key: u32, id: EventId, what: String) -> Violation {
    Violation { checker: "session", key, event: Some(id), what }
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Bug, caught, clean};
    use super::*;
    use crate::history::Mode;

    #[test]
    fn right_histories_pass() {
        clean(check, Mode::Lww);
        clean(check, Mode::Siblings);
    }

    #[test]
    fn a_clock_that_does_not_observe_contexts_is_caught() {
        caught(check, Mode::Lww, Bug::IgnoreContext);
    }
}
