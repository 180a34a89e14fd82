//! Being written.

pub mod executor;
pub mod files;
pub mod ring;
