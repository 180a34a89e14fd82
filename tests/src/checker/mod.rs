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

use crate::history::{EventId, History, Mode};
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

/// A history's part about one key, for people.
#[must_use]
pub fn describe(history: &History, key: u32) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for (id, event) in history.iter().filter(|(_, event)| event.key == key) {
        let (from, to) = (event.invoked / 1000, event.returned / 1000);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{id:5} {from:>12}..{to:<12} us client {} node {}: {:?} -> {:?}",
            event.client, event.node, event.call, event.answer
        );
    }
    for mark in &history.marks {
        let _ = writeln!(text, "      {mark:?}");
    }
    text
}
