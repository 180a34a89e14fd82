//! Last write wins: a read sees the winner of all writes that it must have seen, or a newer one.
//!
//! Invariant checked (`RELIABILITY.md` 5.1, 5.2): let F be the greatest version of a write that
//! `duty.rs` says the read must have seen. Then the read shows a version not below F; or it shows
//! nothing, and there is a delete, or a value whose time is over, that may be above F. So also no
//! acknowledged write is lost: after convergence every read must have seen all of them.
//!
//! What this lets pass: nothing shown, while a delete whose fate nobody knows was under way. A
//! workload that wants to be sure has keys that are never deleted.

use annulus_engine::model::Timestamp;
use annulus_net::wire::fields::Version;

use super::Violation;
use super::duty::must_see;
use super::ledger::{Ledger, Write};
use crate::history::{Event, EventId, History, Reading};

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let ledger = Ledger::of(history);
    let mut found = Vec::new();
    for (id, event, reading) in history.readings() {
        let writes = ledger.of_key(event.key);
        let mut floor: Option<(&Write, String)> = None;
        for write in writes {
            let higher = floor.as_ref().is_none_or(|(floor, _)| floor.version < write.version);
            if higher && let Some(reason) = must_see(history, event, reading, write) {
                floor = Some((write, reason.to_string()));
            }
        }
        let Some((floor, reason)) = floor else { continue };
        if let Some(what) = misses(history, writes, event, reading, floor) {
            let what = format!("{what}; it must have seen event {}: {reason}", floor.id);
            found.push(violation(event, id, what));
        }
    }
    found
}

/// What is wrong with a read that must have seen `floor`, or a write that wins over it.
pub(super) fn misses(
    history: &History,
    writes: &[Write],
    event: &Event,
    reading: &Reading,
    floor: &Write,
) -> Option<String> {
    let version = floor.version?;
    if let Some(seen) = reading.winner() {
        let older = seen.version < version;
        return older.then(|| format!("shows {}, which is older than {version}", seen.version));
    }
    let explained = writes.iter().any(|write| {
        let newer = write.version.is_none_or(|other| other >= version);
        newer && write.invoked < event.returned && write.may_read_as_absent(history, event.returned)
    });
    (!explained).then(|| format!("shows nothing, and nothing deleted {version}"))
}

/// The greatest stamp that makes a version below or equal to it.
pub(super) fn is_at_or_below(version: Version, stamp: Timestamp) -> bool {
    version.timestamp <= stamp
}

fn violation(event: &Event, id: EventId, what: String) -> Violation {
    Violation { checker: "versions", key: event.key, event: Some(id), what }
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Bug, caught, clean, tell};
    use super::*;
    use crate::history::{Answer, Call, Mark, Mode, Receipt};

    #[test]
    fn right_histories_pass() {
        clean(check, Mode::Lww);
    }

    #[test]
    fn an_acknowledgement_before_the_write_is_caught() {
        caught(check, Mode::Lww, Bug::AckBeforeStore);
    }

    #[test]
    fn a_quorum_read_of_too_few_is_caught() {
        caught(check, Mode::Lww, Bug::ReadTooFew);
    }

    #[test]
    fn hints_that_are_dropped_are_caught_after_healing() {
        caught(check, Mode::Lww, Bug::DropHints);
    }

    #[test]
    fn a_crash_may_cost_what_was_not_synced_and_nothing_else() {
        // One write, acknowledged by two, not synced; both crash at once; then nothing is read.
        let lost = |durable, window_nanos| {
            let mut history = tell(3, Mode::Lww, None);
            history.rules.window_nanos = window_nanos;
            history.events.retain(|event| event.receipt().is_some());
            history.events.truncate(1);
            history.marks.clear();
            let write = &mut history.events[0];
            write.call = Call::put(1);
            write.answer = Answer::Written(Receipt {
                version: write.receipt().unwrap().version,
                acks: 2,
                primary: 2,
                durable,
            });
            let end = write.returned;
            let mut read = write.clone();
            for node in 0..2 {
                history.marks.push(Mark::Crashed { node, at: end + 10 });
            }
            (read.invoked, read.returned) = (end + 1000, end + 2000);
            (read.call, read.answer) = (
                Call::Get,
                Answer::Values(Reading { primaries: 3, answers: 3, ..Reading::default() }),
            );
            history.push(read);
            check(&history).len()
        };
        assert_eq!(lost(0, 100), 0, "within the window both copies may be gone");
        assert_eq!(lost(0, 5), 1, "the window was over");
        assert_eq!(lost(2, 100), 1, "both were synced");
        assert_eq!(lost(1, 100), 1, "one was synced, and all were read");
    }
}
