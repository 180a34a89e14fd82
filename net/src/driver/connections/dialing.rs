//! Connections that begin here: the connect goes through the ring, then they are like any other.
//!
//! Invariant: the address that the kernel reads stays at its place, in the connection's, until
//! the connect has completed, whatever becomes of the connection meanwhile.

use std::io;
use std::net::SocketAddr;
use std::os::fd::IntoRawFd;

use io_uring::{opcode, types};

use super::{ClosedBy, ConnId, Connections, Door, Notice, Phase, Purpose, tag};
use crate::driver::tcp::prepare_peer;

impl Connections {
    /// Begins to connect to an address. `Connected` follows when it stands, `Closed` when it does
    /// not come to that within `Limits::dial_timeout_ms`, up to a second more. Until then the id
    /// names a connection without output, which [`Connections::abort`] gives up.
    ///
    /// # Errors
    /// When there is no socket to be had, or the limit is reached.
    pub fn dial(&mut self, address: SocketAddr) -> io::Result<ConnId> {
        if self.reserved >= self.limits.reserve {
            self.stats.refused += 1;
            return Err(io::Error::other("too many connections to other nodes"));
        }
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        prepare_peer(&socket)?;
        let id = self.open(socket.into_raw_fd(), Phase::Connecting, Door::Peers);
        self.stats.dials += 1;
        self.dialing += 1;
        let now = self.now;
        let connection = &mut self.table[id.index as usize];
        connection.connecting = true;
        connection.progress = now;
        let address = connection.address.insert(Box::new(socket2::SockAddr::from(address)));
        let entry =
            opcode::Connect::new(types::Fd(connection.fd), address.as_ptr().cast(), address.len())
                .build()
                .user_data(tag(Purpose::Connect, id));
        // SAFETY: the address is on the heap and neither changed nor dropped while `connecting`
        // is set: `connect_ended` and `forget` drop it, which run after the completion only. The
        // table itself goes to `Ring::retain` when `Sockets` is dropped.
        unsafe { self.ring.push(entry) };
        Ok(id)
    }

    /// A connect ended, with 0 or a negated errno.
    pub(in crate::driver) fn connect_ended(&mut self, id: ConnId, result: i32) {
        let now = self.now;
        let Some(connection) = self.find(id) else { return };
        connection.connecting = false;
        connection.address = None;
        connection.progress = now;
        self.dialing -= 1;
        match self.table[id.index as usize].phase {
            Phase::Connecting if result == 0 => {
                self.table[id.index as usize].phase = Phase::Open;
                self.notify(Notice::Connected(id));
                self.settle(id.index);
            }
            Phase::Connecting => self.fail(id.index, ClosedBy::Error(-result)),
            _ => self.settle(id.index),
        }
    }
}
