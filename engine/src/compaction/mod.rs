//! Compaction: what to merge next, the merge, the runner, and its pace.

pub mod merge;
pub mod plan;
pub mod run;
