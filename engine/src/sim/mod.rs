//! Being written.

pub mod disk;
pub mod executor;
