//! Being written.

pub mod block;
pub mod filter;
pub mod format;
pub mod index;
pub mod scan;
pub mod table;
pub mod writer;
