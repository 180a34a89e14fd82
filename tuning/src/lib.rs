//! Facts of the host, and a configuration proposed from them with reasons.
//!
//! Invariant: nothing here is needed in order to serve. It reads `/proc`, `/sys` and the disk,
//! and proposes numbers; a probe that fails is a fact that is unknown, never an error that stops
//! a server. Reading the facts ([`host`], [`kernel`], [`disk_profile`]) and judging them
//! ([`findings`], [`budget`]) are apart: the judges are pure. Each knob has a page in `notes/`.

pub mod budget;
pub mod disk_profile;
pub mod findings;
pub mod host;
pub mod kernel;
mod sys;

pub use budget::{Budget, BudgetError, BudgetInput};
