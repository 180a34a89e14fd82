//! Checkers: pure functions from a history to what is wrong with it.
//!
//! Invariant: a checker is sound: what it reports breaks a promise of the manual (P1 to P9),
//! whatever else happened in the run. It is not complete: what it cannot know, it lets pass.
//! Each is tested on histories of a toy store (`toy.rs`): thousands of right ones, in which it
//! must find nothing, and ones from the same store with a bug, which it must find.
//!
//! | file            | promise                                                             |
//! |-----------------|---------------------------------------------------------------------|
//! | `origin.rs`     | no value from nowhere, none `NOT_STARTED`, one version for each     |
//! | `versions.rs`   | last write wins: a read sees the newest it must have seen           |
//! | `siblings.rs`   | siblings: complete, and none that was replaced                      |
//! | `as_of.rs`      | `as_of` never lies                                                  |
//! | `resurrection.rs` | what was deleted stays deleted                                    |
//! | `session.rs`    | a write beats what its client had read                              |
//! | `ttl.rs`        | a value is gone when its time is over, and not before               |
//! | `register.rs`   | linearizability                                                     |
//! | `converge.rs`   | all replicas hold the same after healing                            |

pub mod as_of;
pub mod converge;
mod duty;
mod ledger;
pub mod origin;
pub mod register;
pub mod resurrection;
pub mod session;
pub mod siblings;
#[cfg(test)]
mod toy;
pub mod ttl;
pub mod versions;

use std::fmt;

use crate::history::{Answer, Call, EventId, History, Mode, Reading, Receipt, Seen};
pub use converge::{Dump, Held};

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which checker found it.
    pub checker: &'static str,
    /// In which key's history.
    pub key: u32,
    /// The read that shows it.
    pub event: Option<EventId>,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: key {}", self.checker, self.key)?;
        if let Some(event) = self.event {
            write!(f, ", event {event}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// Everything that is wrong with a history.
#[must_use]
pub fn check(history: &History) -> Vec<Violation> {
    let mut found = origin::check(history);
    found.extend(ttl::check(history));
    match history.rules.mode {
        Mode::Lww => {
            found.extend(versions::check(history));
            found.extend(session::check(history));
            found.extend(as_of::check(history));
            found.extend(resurrection::check(history));
        }
        Mode::Siblings => {
            found.extend(siblings::check(history));
            found.extend(session::check(history));
            found.extend(as_of::check(history));
        }
        Mode::Register => found.extend(register::check(history)),
    }
    found
}

/// A history's part about one key, for people: one line a call, times in microseconds. Reads that
/// show what the one before showed are left out.
#[must_use]
pub fn describe(history: &History, key: u32) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let (mut shown, mut left_out): (Option<&Vec<Seen>>, u32) = (None, 0);
    for (id, event) in history.iter().filter(|(_, event)| event.key == key) {
        let last = event.reading().map(|reading| &reading.values);
        if last.is_some() && last == shown {
            left_out += 1;
            continue;
        }
        shown = last;
        // Writing to a string cannot fail.
        if left_out > 0 {
            let _ = writeln!(text, "      {left_out} more like it");
            left_out = 0;
        }
        let (from, to) = (event.invoked / 1000, event.returned / 1000);
        let call = match event.call {
            Call::Get => "get".to_owned(),
            Call::Put { value, ttl_ms, after, expect } => {
                format!("put {value} ttl {ttl_ms} after {after:?} if {expect:?}")
            }
            Call::Delete { after, expect } => format!("delete after {after:?} if {expect:?}"),
        };
        let answer = match &event.answer {
            Answer::Values(Reading { values, as_of, answers, primaries }) => {
                let values: Vec<String> = values
                    .iter()
                    .map(|it| format!("{} ({} {})", it.value, it.version, it.expiry_ms))
                    .collect();
                let values = values.join(", ");
                format!("[{values}] as of {:x} of {answers}, homes {primaries}", as_of.0)
            }
            Answer::Written(Receipt { version, acks, primary, durable }) => {
                format!("{version} acks {acks} homes {primary} durable {durable}")
            }
            other => format!("{other:?}"),
        };
        let who = format!("client {} node {}", event.client, event.node);
        let _ = writeln!(text, "{id:5} {from:>11}..{to:<11} {who}: {call} -> {answer}");
    }
    for mark in &history.marks {
        let _ = writeln!(text, "      {mark:?}");
    }
    text
}
