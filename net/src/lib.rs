//! Frames and connections: the wire protocol, the server's side of a connection, the client
//! driver. `net/README.md` specifies the protocol.
//!
//! `wire` and the connections are sans-I/O: bytes and events in, bytes and events out. Only
//! `client` and `driver/` touch sockets. Nothing here opens a file or knows what a replica is.

#![cfg_attr(not(feature = "uring"), forbid(unsafe_code))]

pub mod client;
pub mod client_connection;
#[cfg(feature = "uring")]
pub mod driver;
pub mod peer_connection;
pub mod server_connection;
pub mod wire;

/// The examples of `net/README.md` compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeExamples;
