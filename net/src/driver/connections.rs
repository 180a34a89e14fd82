//! The table of a shard's connections: what is being sent, who is paused, who is leaving.
//!
//! Invariant: a connection's place and its buffer in flight are given up only when neither a
//! receive nor a send of it is in flight, so a completion always meets its own connection; ids
//! carry a generation on top, so that owners with an old id reach nobody. An idle connection
//! holds no buffer. On the write path: replies gather in `out` and leave with one send in flight
//! a connection; what gathers meanwhile forms the next. `dialing.rs` begins connections,
//! `leaving.rs` ends them.

mod dialing;
mod leaving;

use std::io;
use std::mem;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};

use annulus_engine::driver::Ring;
use annulus_engine::model::Instant;
use io_uring::{opcode, types};

use super::connection::{
    ClosedBy, ConnId, Connection, Detached, Door, GENERATION_MASK, Limits, Notice, Phase, Purpose,
    SocketStats, tag,
};

/// Longest piece of one send, so that a slow reader's progress shows.
const SEND_PIECE: usize = 256 << 10;
/// Buffers above this capacity go back to the allocator after a burst.
const BUFFER_KEPT: usize = 64 << 10;
/// First capacity of a buffer.
const BUFFER_FIRST: usize = 4 << 10;
/// Empty buffers kept for the next connections that need one.
const POOL_SIZE: usize = 256;
/// Longest wait for a closed peer's goodbye, in milliseconds.
const LINGER_MS: u64 = 2_000;
/// How long a connection that is being closed may take no bytes of what is left for it.
const FAREWELL_MS: u64 = 5_000;

/// The connections of one shard. Every call with a stale id is without effect.
pub struct Connections {
    ring: Ring,
    limits: Limits,
    group: u16,
    table: Vec<Connection>,
    free: Vec<u32>,
    /// Connections whose `out` was asked for since the last flush.
    dirty: Vec<u32>,
    /// Connections with held bytes to deliver.
    ready: Vec<u32>,
    /// Connections whose receive found no buffer.
    starved: Vec<u32>,
    pool: Vec<Vec<u8>>,
    notices: Vec<Notice>,
    now: Instant,
    /// Connections that the tick watches: connecting, sending, closing, lingering.
    dialing: usize,
    sending: usize,
    leaving: usize,
    /// Connections between nodes, which have places of their own.
    reserved: usize,
    stats: SocketStats,
}

impl Connections {
    pub(super) fn new(ring: &Ring, group: u16, limits: Limits) -> Connections {
        Connections {
            ring: ring.clone(),
            limits,
            group,
            table: Vec::new(),
            free: Vec::new(),
            dirty: Vec::new(),
            ready: Vec::new(),
            starved: Vec::new(),
            pool: Vec::new(),
            notices: Vec::new(),
            now: Instant(0),
            dialing: 0,
            sending: 0,
            leaving: 0,
            reserved: 0,
            stats: SocketStats::default(),
        }
    }

    fn find(&mut self, id: ConnId) -> Option<&mut Connection> {
        self.table
            .get_mut(id.index as usize)
            .filter(|c| c.generation == id.generation && c.phase != Phase::Free)
    }

    fn find_open(&mut self, id: ConnId) -> Option<&mut Connection> {
        self.find(id).filter(|c| c.phase == Phase::Open)
    }

    fn id(&self, index: u32) -> ConnId {
        ConnId { index, generation: self.table[index as usize].generation }
    }

    /// Whether the connection is open.
    #[must_use]
    pub fn is_open(&self, id: ConnId) -> bool {
        self.table
            .get(id.index as usize)
            .is_some_and(|c| c.generation == id.generation && c.phase == Phase::Open)
    }

    /// The buffer that replies are appended to; the next [`Connections::flush`] sends it. `None`
    /// when the connection is gone.
    #[inline]
    pub fn out(&mut self, id: ConnId) -> Option<&mut Vec<u8>> {
        let index = id.index;
        let connection = self
            .table
            .get_mut(index as usize)
            .filter(|c| c.generation == id.generation && c.phase == Phase::Open)?;
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(index);
        }
        if connection.out.capacity() == 0 {
            let fresh = || Vec::with_capacity(BUFFER_FIRST);
            connection.out = self.pool.pop().unwrap_or_else(fresh);
        }
        Some(&mut connection.out)
    }

    /// Bytes appended to `out` and not yet taken by the kernel.
    #[must_use]
    pub fn unsent(&self, id: ConnId) -> usize {
        match self.table.get(id.index as usize) {
            Some(c) if c.generation == id.generation => c.unsent(),
            _ => 0,
        }
    }

    /// [`Connections::unsent`] of all connections. Costs a walk over them.
    #[must_use]
    pub fn unsent_bytes(&self) -> usize {
        self.table.iter().map(Connection::unsent).sum()
    }

    /// Queues a send for each connection that has something to send and none in flight. Called
    /// once at the end of each turn.
    pub fn flush(&mut self) {
        let mut dirty = mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            let connection = &mut self.table[index as usize];
            connection.dirty = false;
            if connection.phase == Phase::Free {
                continue;
            }
            let unsent = connection.unsent();
            if unsent > self.limits.out_shed_bytes {
                self.stats.shed += 1;
                self.fail(index, ClosedBy::SlowReader);
                continue;
            }
            if unsent > self.limits.out_pause_bytes && !connection.choked {
                connection.choked = true;
                self.settle(index);
            }
            if !self.table[index as usize].sending {
                self.send_next(index);
            }
        }
        self.dirty = dirty;
    }

    /// Stops receiving from a connection. Bytes that are on their way are kept and delivered
    /// after [`Connections::resume`].
    pub fn pause(&mut self, id: ConnId) {
        if let Some(connection) = self.find_open(id) {
            connection.paused = true;
            self.settle(id.index);
        }
    }

    /// Receives again.
    pub fn resume(&mut self, id: ConnId) {
        if let Some(connection) = self.find_open(id) {
            connection.paused = false;
            if !connection.held.is_empty() || connection.ended.is_some() {
                self.set_ready(id.index);
            }
            self.settle(id.index);
        }
    }

    /// Ends a connection after what is in `out` has been sent. No event follows.
    pub fn close(&mut self, id: ConnId) {
        match self.find(id).map(|c| c.phase) {
            Some(Phase::Open) => self.start_closing(id.index),
            Some(Phase::Connecting) => self.start_aborting(id.index),
            _ => {}
        }
    }

    /// Ends a connection at once. No event follows.
    pub fn abort(&mut self, id: ConnId) {
        if self.find(id).is_some_and(|c| c.phase != Phase::Aborting) {
            self.start_aborting(id.index);
        }
    }

    /// Takes a connection out of this shard: when `out` is sent and no receive is in flight,
    /// the event `Detached` hands it over with all bytes that nobody has handled, `unhandled`
    /// first. No other event of it follows, except `Closed` if it fails meanwhile.
    pub fn detach(&mut self, id: ConnId, unhandled: &[u8]) {
        let Some(connection) = self.find_open(id) else { return };
        connection.phase = Phase::Detaching;
        connection.held.splice(0..0, unhandled.iter().copied());
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(id.index);
        }
        self.settle(id.index);
    }

    /// Takes over a connection that another shard has detached. Its bytes are delivered in the
    /// next turn.
    ///
    /// # Errors
    /// The connection, when the limit is reached.
    pub fn adopt(&mut self, detached: Detached) -> Result<ConnId, Detached> {
        if !self.has_room(detached.door) {
            self.stats.refused += 1;
            return Err(detached);
        }
        let id = self.open(detached.socket.into_raw_fd(), Phase::Open, detached.door);
        if !detached.received.is_empty() {
            self.table[id.index as usize].held = detached.received;
            self.set_ready(id.index);
        }
        Ok(id)
    }

    /// The peer's address.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn peer(&mut self, id: ConnId) -> io::Result<SocketAddr> {
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let fd = self.find(id).ok_or_else(gone)?.fd;
        // SAFETY: the descriptor is open, and `ManuallyDrop` leaves it to the table.
        let stream = mem::ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) });
        stream.peer_addr()
    }

    /// Counters. Costs a walk over all connections.
    #[must_use]
    pub fn stats(&self) -> SocketStats {
        let of = |c: &Connection| c.out.capacity() + c.in_flight.capacity() + c.held.capacity();
        let pooled: usize = self.pool.iter().map(Vec::capacity).sum();
        SocketStats {
            unsent_bytes: self.unsent_bytes(),
            buffer_bytes: pooled + self.table.iter().map(of).sum::<usize>(),
            ..self.stats
        }
    }

    /// How many connections there are, closing ones included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.stats.open
    }

    /// Ids of all open connections.
    pub fn ids(&self) -> impl Iterator<Item = ConnId> {
        (0u32..)
            .zip(&self.table)
            .filter(|(_, c)| c.phase == Phase::Open)
            .map(|(index, c)| ConnId { index, generation: c.generation })
    }

    // From here on: the side of `Sockets`.

    /// A new connection, or the descriptor back when the limit is reached.
    pub(super) fn accept(&mut self, fd: RawFd, door: Door) -> Option<ConnId> {
        if !self.has_room(door) {
            self.stats.refused += 1;
            self.ring.close(fd);
            return None;
        }
        Some(self.open(fd, Phase::Open, door))
    }

    /// Whether one more may come in through this door. Clients never take the peers' places.
    fn has_room(&self, door: Door) -> bool {
        match door {
            Door::Clients => self.stats.open - self.reserved < self.limits.connections,
            Door::Peers => self.reserved < self.limits.reserve,
        }
    }

    fn open(&mut self, fd: RawFd, phase: Phase, door: Door) -> ConnId {
        let index = self.free.pop().unwrap_or_else(|| {
            let fresh = Connection::new(-1, 0, Door::Clients);
            self.table.push(Connection { phase: Phase::Free, ..fresh });
            u32::try_from(self.table.len() - 1).expect("fewer connections than 2^32")
        });
        let place = &mut self.table[index as usize];
        *place = Connection { phase, ..Connection::new(fd, place.generation, door) };
        self.reserved += usize::from(door == Door::Peers);
        self.stats.open += 1;
        self.stats.opened += 1;
        self.settle(index);
        self.id(index)
    }

    pub(super) fn set_now(&mut self, now: Instant) {
        self.now = now;
    }

    pub(super) fn take_notices(&mut self) -> Vec<Notice> {
        mem::take(&mut self.notices)
    }

    /// Whether the tick has something to watch.
    pub(super) fn needs_tick(&self) -> bool {
        self.dialing + self.sending + self.leaving > 0
    }

    fn notify(&mut self, notice: Notice) {
        self.notices.push(notice);
        self.ring.wake();
    }

    fn set_ready(&mut self, index: u32) {
        let connection = &mut self.table[index as usize];
        if !mem::replace(&mut connection.ready, true) {
            self.ready.push(index);
            self.ring.wake();
        }
    }

    /// Connections whose held bytes may be delivered now.
    pub(super) fn take_ready(&mut self) -> Vec<(ConnId, Vec<u8>)> {
        let mut deliver = Vec::new();
        for index in mem::take(&mut self.ready) {
            let id = self.id(index);
            let connection = &mut self.table[index as usize];
            connection.ready = false;
            if connection.phase == Phase::Open && !connection.paused {
                deliver.push((id, mem::take(&mut connection.held)));
            }
        }
        deliver
    }

    /// After held bytes were delivered: the end that had to wait for them.
    pub(super) fn delivered(&mut self, id: ConnId) {
        let Some(connection) = self.find_open(id) else { return };
        if !connection.paused
            && connection.held.is_empty()
            && let Some(by) = connection.ended
        {
            self.end(id.index, by);
        }
    }

    /// Bytes arrived. Returns whether they go to the owner now; else they have been kept or
    /// thrown away.
    pub(super) fn received(&mut self, id: ConnId, bytes: &[u8]) -> bool {
        self.stats.received_bytes += bytes.len() as u64;
        let Some(connection) = self.find(id) else { return false };
        match connection.phase {
            Phase::Open if !connection.paused && connection.held.is_empty() => true,
            Phase::Open | Phase::Detaching => {
                connection.held.extend_from_slice(bytes);
                false
            }
            _ => false,
        }
    }

    /// A receive ended, with 0 or a negated errno, or because the kernel dropped the multishot.
    pub(super) fn receive_ended(&mut self, id: ConnId, result: i32) {
        let Some(connection) = self.find(id) else { return };
        connection.receiving = false;
        connection.cancelling = false;
        let ended = match -result {
            0 => Some(ClosedBy::Peer),
            libc::ENOBUFS => {
                if !mem::replace(&mut connection.starved, true) {
                    self.starved.push(id.index);
                    self.stats.starved += 1;
                }
                return;
            }
            libc::ECANCELED | libc::EINTR | libc::EAGAIN => None,
            errno if errno > 0 => Some(ClosedBy::Error(errno)),
            _ => None,
        };
        if let Some(by) = ended {
            match connection.phase {
                Phase::Open if connection.held.is_empty() && !connection.paused => {
                    self.end(id.index, by);
                    return;
                }
                // A detached connection takes its end along: the next shard's receive finds it.
                Phase::Detaching => {}
                _ => connection.ended = Some(by),
            }
        }
        self.settle(id.index);
    }

    /// Buffers are free again: starved connections receive again.
    pub(super) fn feed_starved(&mut self) {
        for index in mem::take(&mut self.starved) {
            self.table[index as usize].starved = false;
            self.settle(index);
        }
    }

    /// A send ended, with the bytes sent or a negated errno.
    pub(super) fn send_ended(&mut self, id: ConnId, result: i32) {
        let now = self.now;
        let Some(connection) = self.find(id) else { return };
        connection.sending = false;
        connection.progress = now;
        self.sending -= 1;
        let index = id.index;
        match usize::try_from(result) {
            Ok(sent) => {
                let connection = &mut self.table[index as usize];
                connection.sent += sent;
                self.stats.sent_bytes += sent as u64;
            }
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => {}
            Err(_) => {
                self.drop_output(index);
                if self.table[index as usize].phase == Phase::Aborting {
                    self.settle(index);
                } else {
                    self.fail(index, ClosedBy::Error(-result));
                }
                return;
            }
        }
        if self.table[index as usize].phase == Phase::Aborting {
            self.drop_output(index);
            self.settle(index);
            return;
        }
        self.send_next(index);
        let connection = &mut self.table[index as usize];
        if connection.choked && connection.unsent() <= self.limits.out_pause_bytes / 2 {
            connection.choked = false;
            if connection.phase == Phase::Open {
                let id = self.id(index);
                self.notify(Notice::Drained(id));
            }
        }
        self.settle(index);
    }

    /// Queues the next piece to send, if there is one; gives buffers back if there is none.
    fn send_next(&mut self, index: u32) {
        let id = self.id(index);
        let connection = &mut self.table[index as usize];
        debug_assert!(!connection.sending);
        if matches!(connection.phase, Phase::Free | Phase::Aborting) {
            return;
        }
        if connection.sent == connection.in_flight.len() {
            connection.in_flight.clear();
            connection.sent = 0;
            mem::swap(&mut connection.in_flight, &mut connection.out);
        }
        if connection.in_flight.is_empty() {
            let buffers = [mem::take(&mut connection.in_flight), mem::take(&mut connection.out)];
            for buffer in buffers {
                self.give_back(buffer);
            }
            self.settle(index);
            return;
        }
        let piece = &connection.in_flight[connection.sent..];
        let len = u32::try_from(piece.len().min(SEND_PIECE)).expect("SEND_PIECE fits in 32 bits");
        let entry = opcode::Send::new(types::Fd(connection.fd), piece.as_ptr(), len)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
            .build()
            .user_data(tag(Purpose::Send, id));
        connection.sending = true;
        connection.progress = self.now;
        self.sending += 1;
        // SAFETY: `in_flight` is neither grown, shrunk, swapped nor dropped while `sending` is
        // set: this function and `drop_output` are the only ones that touch it, and both run
        // only after the completion. Growing `table` moves the vector's header, not its heap
        // memory; the table itself goes to `Ring::retain` when `Sockets` is dropped.
        unsafe { self.ring.push(entry) };
    }

    fn give_back(&mut self, mut buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        if capacity > 0 && capacity <= BUFFER_KEPT && self.pool.len() < POOL_SIZE {
            buffer.clear();
            self.pool.push(buffer);
        }
    }

    fn drop_output(&mut self, index: u32) {
        let connection = &mut self.table[index as usize];
        debug_assert!(!connection.sending);
        connection.sent = 0;
        connection.out = Vec::new();
        connection.in_flight = Vec::new();
    }

    /// Starts or stops the receive as the state wants it, and completes what waited for nothing
    /// to be in flight.
    fn settle(&mut self, index: u32) {
        let id = self.id(index);
        let connection = &mut self.table[index as usize];
        let wants = connection.wants_bytes() && !connection.starved;
        if wants && !connection.receiving {
            connection.receiving = true;
            let entry = opcode::RecvMulti::new(types::Fd(connection.fd), self.group)
                .build()
                .user_data(tag(Purpose::Receive, id));
            // SAFETY: the entry points to no memory; the buffers of the group are `Sockets`',
            // which hands them to `Ring::retain` when it is dropped.
            unsafe { self.ring.push(entry) };
            return;
        }
        if !wants && connection.receiving && !connection.cancelling {
            connection.cancelling = true;
            let entry = opcode::AsyncCancel::new(tag(Purpose::Receive, id))
                .build()
                .user_data(tag(Purpose::Cancel, id));
            // SAFETY: the entry points to no memory.
            unsafe { self.ring.push(entry) };
            return;
        }
        if connection.connecting
            || connection.sending
            || (connection.receiving && connection.phase != Phase::Closing)
        {
            return;
        }
        match connection.phase {
            Phase::Closing if connection.unsent() == 0 => {
                if connection.ended.is_some() {
                    if !connection.receiving {
                        self.release(index);
                    }
                    return;
                }
                connection.phase = Phase::Lingering;
                connection.progress = self.now;
                // SAFETY: an open descriptor and no memory.
                unsafe { libc::shutdown(connection.fd, libc::SHUT_WR) };
            }
            Phase::Lingering if connection.ended.is_some() => self.release(index),
            Phase::Aborting => self.release(index),
            Phase::Detaching if connection.unsent() == 0 => {
                let (received, door) = (mem::take(&mut connection.held), connection.door);
                let fd = mem::replace(&mut connection.fd, -1);
                // SAFETY: the table owned the open descriptor and has just forgotten it.
                let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                self.forget(index);
                self.notify(Notice::Detached(id, Detached { socket, received, door }));
            }
            _ => {}
        }
    }
}
