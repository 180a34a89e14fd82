//! Being written.

pub mod arena;
pub mod slots;
