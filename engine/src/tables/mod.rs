//! The live tables of a shard: which files there are, what may be read in them, and in what order.
//!
//! ```text
//! token        0 ................... hand ......................... 2^64-1
//! upper  new   |-----------------------------------------------------|   flushed last
//!              |------------------]........consumed......[-----------|   flushed before
//!        old   |------]..........................[-------------------|
//! last level   |---| |-----| |----| |------| |----| |-----| |--------|   each key at most once
//! ```
//!
//! A read of a token walks the upper tables that are live there, newest first ([`arcs`]), then the
//! one last-level table. [`TableSet`] is immutable and shared (`LevelDB`'s Version): a reader takes
//! the current one, and what it names stays readable until the reader lets go. [`layout`] is the
//! pure half: what is live; [`edit`] its one way to change; [`manifest`] makes edits durable;
//! [`store`] ties them to the files.
//!
//! Invariant: a range that has been consumed is never read, because its bytes may be gone.

pub mod arcs;
pub mod edit;
pub mod facts;
pub mod layout;
pub mod manifest;
pub mod ranges;
pub mod set;
pub mod store;

pub use edit::{AddedTable, Consumed, Level, TableSetEdit, TableSummary};
pub use facts::{Facts, Lost, Replica};
pub use layout::{Entry, Layout, LayoutStats};
pub use manifest::{Manifest, Owner};
pub use ranges::Ranges;
pub use set::{Candidate, Candidates, LiveTable, TableSet};
pub use store::{Tables, quarantine_name};
