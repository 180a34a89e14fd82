//! How connections end: told to the peer, waited for, or cut off.
//!
//! Invariant: a place is given up only when nothing of its connection is in flight. A close sends
//! what is left, says goodbye and waits for the peer's; an abort ends what is in flight at once.

use std::mem;

use super::{
    ClosedBy, Connection, Connections, Door, FAREWELL_MS, GENERATION_MASK, LINGER_MS, Notice, Phase,
};
use super::{Purpose, tag};
use io_uring::opcode;

impl Connections {
    /// Sheds connections that do not read, gives up those that are not answered, and ends those
    /// that linger too long.
    pub(in crate::driver) fn tick(&mut self) {
        let (now, stall) = (self.now, self.limits.stall_ms * 1_000_000);
        for index in 0..u32::try_from(self.table.len()).expect("fewer connections than 2^32") {
            let connection = &self.table[index as usize];
            let waited = now.nanos_since(connection.progress);
            match connection.phase {
                Phase::Connecting if waited > self.limits.dial_timeout_ms * 1_000_000 => {
                    self.fail(index, ClosedBy::Error(libc::ETIMEDOUT));
                }
                Phase::Lingering if waited > LINGER_MS * 1_000_000 => self.start_aborting(index),
                // Who has already been told to go is not waited for as long.
                Phase::Closing
                    if connection.sending && waited > stall.min(FAREWELL_MS * 1_000_000) =>
                {
                    self.stats.shed += 1;
                    self.fail(index, ClosedBy::SlowReader);
                }
                Phase::Open | Phase::Detaching if connection.sending && waited > stall => {
                    self.stats.shed += 1;
                    self.fail(index, ClosedBy::SlowReader);
                }
                _ => {}
            }
        }
    }

    /// The peer or the network ended it: tells the owner, and sends what is left if possible.
    pub(super) fn end(&mut self, index: u32, by: ClosedBy) {
        if by == ClosedBy::Peer {
            let id = self.id(index);
            self.notify(Notice::Closed(id, by));
            self.table[index as usize].ended = Some(by);
            self.start_closing(index);
        } else {
            self.fail(index, by);
        }
    }

    /// Tells the owner, unless it has left already, and aborts.
    pub(super) fn fail(&mut self, index: u32, by: ClosedBy) {
        if matches!(
            self.table[index as usize].phase,
            Phase::Connecting | Phase::Open | Phase::Detaching
        ) {
            let id = self.id(index);
            self.notify(Notice::Closed(id, by));
        }
        self.start_aborting(index);
    }

    pub(super) fn start_closing(&mut self, index: u32) {
        let connection = &mut self.table[index as usize];
        connection.phase = Phase::Closing;
        connection.held = Vec::new();
        if !connection.sending {
            connection.progress = self.now;
        }
        self.leaving += 1;
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(index);
        }
        self.settle(index);
    }

    pub(super) fn start_aborting(&mut self, index: u32) {
        let connection = &mut self.table[index as usize];
        match connection.phase {
            Phase::Free | Phase::Aborting => return,
            // Counted when the closing began.
            Phase::Closing | Phase::Lingering => {}
            Phase::Connecting => {
                self.leaving += 1;
                self.stats.dials_failed += 1;
            }
            Phase::Open | Phase::Detaching => self.leaving += 1,
        }
        connection.phase = Phase::Aborting;
        connection.held = Vec::new();
        // A reset at close frees the kernel's buffers at once; the shutdown ends both the
        // receive and the send in flight.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: an open descriptor, and a readable struct of the size given. Failures need no
        // answer: the socket is then already dead.
        unsafe {
            let size = libc::socklen_t::try_from(size_of_val(&linger)).expect("eight bytes");
            let option = (&raw const linger).cast();
            libc::setsockopt(connection.fd, libc::SOL_SOCKET, libc::SO_LINGER, option, size);
            libc::shutdown(connection.fd, libc::SHUT_RDWR);
        }
        if connection.connecting {
            let id = self.id(index);
            let entry = opcode::AsyncCancel::new(tag(Purpose::Connect, id))
                .build()
                .user_data(tag(Purpose::Cancel, id));
            // SAFETY: the entry points to no memory.
            unsafe { self.ring.push(entry) };
        }
        if !self.table[index as usize].sending {
            self.drop_output(index);
        }
        self.settle(index);
    }

    pub(super) fn release(&mut self, index: u32) {
        let fd = self.table[index as usize].fd;
        self.leaving -= 1;
        self.ring.close(fd);
        self.forget(index);
    }

    /// Frees the place: nothing of the connection is in flight.
    pub(super) fn forget(&mut self, index: u32) {
        let connection = &mut self.table[index as usize];
        debug_assert!(!connection.sending && !connection.receiving && !connection.connecting);
        let generation = connection.generation.wrapping_add(1) & GENERATION_MASK;
        let (dirty, ready, starved) = (connection.dirty, connection.ready, connection.starved);
        self.reserved -= usize::from(connection.door == Door::Peers);
        let buffers = [mem::take(&mut connection.in_flight), mem::take(&mut connection.out)];
        *connection = Connection {
            phase: Phase::Free,
            dirty,
            ready,
            starved,
            ..Connection::new(-1, generation, Door::Clients)
        };
        for buffer in buffers {
            self.give_back(buffer);
        }
        self.stats.open -= 1;
        self.free.push(index);
    }

    /// Closes all descriptors, for the end of the shard's sockets.
    pub(in crate::driver) fn close_all(&mut self) {
        for connection in &mut self.table {
            if connection.phase != Phase::Free {
                // SAFETY: an open descriptor and no memory; ends what is in flight on it.
                unsafe { libc::shutdown(connection.fd, libc::SHUT_RDWR) };
                self.ring.close(mem::replace(&mut connection.fd, -1));
            }
        }
    }
}
