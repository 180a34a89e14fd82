//! `as_of` never lies (P5): no write at or below it is missing from the answer that carries it.
//!
//! Invariant checked: for each write whose version anybody ever learnt and whose stamp is at or
//! below a read's `as_of`, acknowledged or not, before or after: the read shows it, or a write
//! that wins over it (last write wins) or replaced it (siblings). And `as_of` is never further
//! ahead of true time than clocks may be.

use super::Violation;
use super::duty::survives;
use super::ledger::{Ledger, Write};
use super::siblings::Replacements;
use super::versions::{is_at_or_below, misses};
use crate::history::{Event, EventId, History, Mark, Mode, Reading, origin_of};

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let ledger = Ledger::of(history);
    let replacements = Replacements::of(history, &ledger);
    let disks_lost = history.marks.iter().any(|mark| matches!(mark, Mark::DiskLost { .. }));
    let mut found = Vec::new();
    for (id, event, reading) in history.readings() {
        let rules = &history.rules;
        let ahead_us = reading.as_of.wall().0.saturating_sub(rules.wall_us(event.returned));
        if ahead_us > rules.skew_us + rules.max_offset_us + rules.ahead_us {
            let what = format!("as_of is {ahead_us} us in the future");
            found.push(violation(event, id, what));
        }
        let writes = ledger.of_key(event.key);
        let covered = writes.iter().filter(|write| {
            write.version.is_some_and(|version| is_at_or_below(version, reading.as_of))
        });
        for write in covered {
            // A write that was shown and never acknowledged is on one replica at least, synced;
            // it is gone when that one's disk is.
            let lasts = match write.acked {
                Some(_) => survives(history, write, event.returned),
                None => !disks_lost && rules.window_nanos == 0,
            };
            if !lasts || is_of_a_forgetful_origin(history, reading, write) {
                continue;
            }
            let what = match rules.mode {
                Mode::Siblings => missing(history, &replacements, event, reading, write),
                Mode::Lww | Mode::Register => misses(history, writes, event, reading, write),
            };
            if let Some(what) = what {
                let what = format!(
                    "{what}; as_of {:?} covers event {} of {:?}",
                    reading.as_of,
                    write.id,
                    write.version.map(|version| version.timestamp)
                );
                found.push(violation(event, id, what));
                break;
            }
        }
    }
    found
}

/// Whether the origin lost its disks before it stamped the write, and with them the memory of what
/// it had promised, and the answer may rest on a promise from before.
fn is_of_a_forgetful_origin(history: &History, reading: &Reading, write: &Write) -> bool {
    let rules = &history.rules;
    let slack = rules.skew_us + rules.max_offset_us + rules.ahead_us;
    let forgot = |node: u32, at: u64| {
        write.version.is_some_and(|version| version.dot.origin == origin_of(node))
            && at <= write.invoked
            && reading.as_of.wall().0 <= rules.wall_us(at) + slack
    };
    history.marks.iter().any(|mark| match mark {
        Mark::DiskLost { node, at } => forgot(*node, *at),
        _ => false,
    })
}

fn missing(
    history: &History,
    replacements: &Replacements<'_>,
    event: &Event,
    reading: &Reading,
    write: &Write,
) -> Option<String> {
    let version = write.version?;
    let excused = write.value.is_none()
        || reading.shows(version)
        || write.may_have_expired(history, event.returned)
        || replacements.may_be_replaced(event, write);
    (!excused).then(|| format!("value {:?} is missing", write.value))
}

fn violation(event: &Event, id: EventId, what: String) -> Violation {
    Violation { checker: "as_of", key: event.key, event: Some(id), what }
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Bug, caught, clean};
    use super::*;

    #[test]
    fn right_histories_pass() {
        clean(check, Mode::Lww);
        clean(check, Mode::Siblings);
    }

    #[test]
    fn a_reply_that_calls_itself_complete_and_is_not_is_caught() {
        caught(check, Mode::Lww, Bug::BoastAsOf);
        caught(check, Mode::Siblings, Bug::BoastAsOf);
    }
}
