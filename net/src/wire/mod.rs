//! The wire format: frames, messages, and their fields. `net/README.md` is its specification.
//!
//! Invariant: a byte that has not passed its checksum is never looked at, and no length is
//! believed before it has been compared with its limit. Nothing here does I/O, reads a clock, or
//! allocates on the way of a GET: requests borrow from the receive buffer.

pub mod batch;
pub mod codec;
pub mod decoder;
pub mod fields;
pub mod frame;
pub mod hello;
pub mod operation;
pub mod peek;
pub mod peer;
pub mod request;
pub mod response;
pub mod scan;
pub mod slices;
pub mod status;

pub use fields::{Condition, Level, OnceId, OperationFlags, Ttl, Version};
pub use frame::{FrameHeader, Opcode};
pub use operation::{Delete, Get, Operation, Put, WriteOptions};
pub use request::{DecodeContext, Request};
pub use status::{Class, Status};

#[cfg(test)]
mod tests;
