//! Being written.

pub mod merge;
pub mod plan;
pub mod run;
