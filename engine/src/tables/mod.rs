//! Being written.

pub mod edit;
pub mod manifest;
