//! Being written.

pub mod format;
pub mod replay;
pub mod writer;
