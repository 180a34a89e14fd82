//! Being written.

pub mod mesh;
pub mod tcp;
