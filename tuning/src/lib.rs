//! Facts of the host, and a configuration proposed from them with reasons.
//!
//! Invariant: nothing here is needed in order to serve. It reads `/proc`, `/sys` and the disk,
//! and proposes numbers; a probe that fails is a fact that is unknown, never an error that stops
//! a server. Each knob has a page in `notes/`.

pub mod budget;
pub mod host;

pub use budget::{Budget, BudgetError, BudgetInput};
