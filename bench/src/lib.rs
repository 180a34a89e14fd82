//! Load generation and measuring: `annulus-bench`, and what the micro benches share.

pub mod annulus;
#[cfg(feature = "uring")]
pub mod embed;
pub mod keys;
pub mod load;
pub mod page;
pub mod report;
pub mod resp;
pub mod run;
pub mod target;
#[cfg(feature = "uring")]
pub mod turns;
pub mod usage;
pub mod verify;
