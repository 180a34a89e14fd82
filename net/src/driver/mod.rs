//! Sockets and the shard mesh on the shard's ring. The only place of this crate, with `client`,
//! that touches the system.
//!
//! - [`tcp`]: listeners, and the turn that makes events of completions.
//! - [`connections`]: the table of connections: buffers out, back-pressure, dialling, closing,
//!   moving.
//!   [`connection`]: one of them, its names and bounds.
//! - [`mesh`]: bounded queues from every shard to every other.

pub mod connection;
pub mod connections;
pub mod mesh;
pub mod tcp;

pub use connection::{ClosedBy, ConnId, Detached, Door, Limits, SocketStats};
pub use connections::Connections;
pub use mesh::{Mesh, MeshPort};
pub use tcp::{Event, Sockets, listen, listen_for_peers};

#[cfg(test)]
mod tests;
