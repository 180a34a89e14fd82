//! Background work on tables: flush and compaction.
//!
//! ```text
//! sealed memtable --flush.rs--> upper table(s) --.
//!                                                +--plan.rs--> Step --run.rs--> tables, edit
//! last level tables -----------------------------'    pure           merge.rs inside
//! ```
//!
//! Both read and write in pieces of at most 1 MiB, yield between them and after 200 us of work,
//! and leave nothing visible until one edit of the manifest makes it so ([`crate::tables`]).
//! [`pace`] says how fast they go and how much writers must give way; nothing ever stops writes
//! at once.

pub mod flush;
pub mod merge;
mod output;
pub mod pace;
pub mod plan;
mod reclaim;
pub mod run;

pub use flush::{Flushed, flush};
pub use merge::{Merge, MergeStats, PurgeAll, Retention};
pub use pace::{Pace, Unflushed, WriteThrottle, write_delay};
pub use plan::{Mode, PlanOptions, Pressure, Step, plan};
pub use run::{Compactor, CompactorOptions, CompactorStats};
