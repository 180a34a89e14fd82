//! Values that expire (P7): gone when their time is over, and not before.
//!
//! Invariant checked: a value shows the expiry that its writer asked for, by the clock of a node
//! within the skew; a read that began later than that, by more than clocks may differ, does not
//! show it. That a value is not missing earlier is `versions.rs` and `siblings.rs`, which excuse
//! an absence only from then on.

use std::collections::BTreeMap;

use super::Violation;
use crate::history::{Call, Event, EventId, History, ValueId};

/// Everything that is wrong.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let rules = &history.rules;
    // The clocks of the node that stamped it and of the one that serves it.
    let slack_ms = (rules.max_offset_us + 2 * rules.skew_us) / 1000 + 1;
    let puts: BTreeMap<ValueId, (&Event, u64)> = history
        .events
        .iter()
        .filter_map(|event| match event.call {
            Call::Put { value, ttl_ms, .. } => Some((value, (event, ttl_ms))),
            _ => None,
        })
        .collect();
    let mut found = Vec::new();
    for (id, event, reading) in history.readings() {
        for seen in &reading.values {
            let Some((put, ttl_ms)) = puts.get(&seen.value) else { continue };
            if (*ttl_ms == 0) != (seen.expiry_ms == 0) {
                let what = format!("expiry {} for a time to live of {ttl_ms} ms", seen.expiry_ms);
                found.push(violation(event, id, what));
                continue;
            }
            if *ttl_ms == 0 {
                continue;
            }
            let earliest = (rules.wall_us(put.invoked) / 1000 + ttl_ms).saturating_sub(slack_ms);
            let is_known = put.receipt().is_some();
            let latest = rules.wall_us(put.returned) / 1000 + ttl_ms + slack_ms;
            if seen.expiry_ms < earliest || (is_known && seen.expiry_ms > latest) {
                let what = format!(
                    "value {} expires at {} ms, not between {earliest} and {latest}",
                    seen.value, seen.expiry_ms
                );
                found.push(violation(event, id, what));
            }
            let began_ms = rules.wall_us(event.invoked) / 1000;
            if began_ms > seen.expiry_ms + slack_ms {
                let what = format!(
                    "value {} shows {} ms after its time",
                    seen.value,
                    began_ms - seen.expiry_ms
                );
                found.push(violation(event, id, what));
            }
        }
    }
    found
}

fn violation(event: &Event, id: EventId, what: String) -> Violation {
    Violation { checker: "ttl", key: event.key, event: Some(id), what }
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
    fn a_value_that_outlives_its_time_is_caught() {
        caught(check, Mode::Lww, Bug::ServeExpired);
    }
}
