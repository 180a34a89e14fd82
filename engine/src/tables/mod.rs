//! The live tables of a shard.

pub mod arcs;
pub mod edit;
pub mod layout;
pub mod manifest;
pub mod ranges;
