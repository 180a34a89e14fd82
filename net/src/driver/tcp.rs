//! A shard's listener and the turn that makes events of the ring's completions.
//!
//! Invariant: all completions of a turn are handled, then all buffers go back to the kernel
//! together, then starved connections receive again; so the kernel runs out of buffers only for
//! the length of a turn. On the read path: first after the network.

use std::any::Any;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::time::Duration;

use annulus_engine::driver::{BufferRing, Completion, Ring};
use annulus_engine::model::Instant;
use annulus_engine::{Error, Result};
use io_uring::{opcode, types};

use super::connection::{ClosedBy, ConnId, Detached, Limits, NOBODY, Notice, Purpose, tag, untag};
use super::connections::Connections;

/// Receive buffers of a shard.
const BUFFER_COUNT: u16 = 256;
/// Size of each, in bytes.
const BUFFER_SIZE: u32 = 16 << 10;
/// Connections that the kernel accepts ahead of us.
const BACKLOG: i32 = 4096;

/// A peer that vanished without a word is noticed after some two minutes.
const KEEPALIVE: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(10));

/// A listening socket that several shards may share an address with (`SO_REUSEPORT`); the kernel
/// spreads connections over them. What is set here is inherited by accepted connections.
///
/// # Errors
/// `Io` that names the address.
pub fn listen(address: SocketAddr) -> Result<TcpListener> {
    let open = || -> io::Result<TcpListener> {
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&KEEPALIVE)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|source| Error::io("listen on", address.to_string(), source))
}

/// What happened to a connection.
#[derive(Debug)]
pub enum Event<'a> {
    /// It was accepted.
    Opened(ConnId),
    /// Bytes arrived, in order, cut anywhere.
    Received(ConnId, &'a [u8]),
    /// So much was unsent that receiving had stopped; it has gone on.
    Drained(ConnId),
    /// It ended, and not by its owner.
    Closed(ConnId, ClosedBy),
    /// It has left this shard, as asked.
    Detached(ConnId, Detached),
}

/// All sockets of one shard.
pub struct Sockets {
    ring: Ring,
    /// `None` only while being dropped.
    parts: Option<Parts>,
}

/// What the kernel may still use when `Sockets` goes.
struct Parts {
    connections: Connections,
    buffers: BufferRing,
    listener: Option<TcpListener>,
    accepting: bool,
    /// The last accept failed for want of something; the tick tries again.
    accept_later: bool,
    ticking: bool,
    tick: Box<types::Timespec>,
}

impl Sockets {
    /// Sockets on a ring; accepts from `listener` if there is one.
    ///
    /// # Errors
    /// `Io` when the receive buffers cannot be had.
    pub fn new(ring: &Ring, listener: Option<TcpListener>, limits: Limits) -> Result<Sockets> {
        let buffers = BufferRing::new(ring, BUFFER_COUNT, BUFFER_SIZE)?;
        let mut parts = Parts {
            connections: Connections::new(ring, buffers.group(), limits),
            buffers,
            listener,
            accepting: false,
            accept_later: false,
            ticking: false,
            tick: Box::new(types::Timespec::new().sec(1)),
        };
        parts.accept(ring);
        Ok(Sockets { ring: ring.clone(), parts: Some(parts) })
    }

    /// The connections, for the owner's calls between turns.
    pub fn connections(&mut self) -> &mut Connections {
        &mut self.parts_mut().connections
    }

    /// Shows the bytes that the coming [`Sockets::turn`] with the same completions will deliver,
    /// all before the first of them is handled: for prefetching.
    pub fn foresee(&self, completions: &[Completion], mut visit: impl FnMut(&[u8])) {
        let Some(parts) = &self.parts else { return };
        for completion in completions {
            if let (Some(Purpose::Receive), _) = untag(completion.user_data)
                && let Some(buffer) = completion.buffer()
                && let Ok(len) = usize::try_from(completion.result)
            {
                visit(parts.buffers.look(buffer, len));
            }
        }
    }

    /// Handles the turn's completions; `handler` gets the connections to answer with. Replies
    /// leave at [`Connections::flush`]. Returns whether anything happened.
    pub fn turn(
        &mut self,
        now: Instant,
        completions: &[Completion],
        mut handler: impl FnMut(&mut Connections, Event<'_>),
    ) -> bool {
        let ring = self.ring.clone();
        let parts = self.parts_mut();
        parts.connections.set_now(now);
        let mut any = false;
        for (id, held) in parts.connections.take_ready() {
            any = true;
            if !held.is_empty() {
                handler(&mut parts.connections, Event::Received(id, &held));
            }
            parts.connections.delivered(id);
        }
        for completion in completions {
            parts.complete(&ring, *completion, &mut handler);
        }
        if !completions.is_empty() {
            parts.buffers.publish();
            parts.connections.feed_starved();
        }
        any |= parts.tell(&mut handler);
        parts.arm_tick(&ring);
        any || !completions.is_empty()
    }

    /// Accepts no further connections, and closes the listening socket.
    pub fn stop_accepting(&mut self) {
        let ring = self.ring.clone();
        let parts = self.parts_mut();
        let Some(listener) = parts.listener.take() else { return };
        // Wakes the accept in flight, which holds the socket open until then.
        // SAFETY: an open descriptor and no memory.
        unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        if parts.accepting {
            let entry = opcode::AsyncCancel::new(tag(Purpose::Accept, NOBODY))
                .build()
                .user_data(tag(Purpose::Cancel, NOBODY));
            // SAFETY: the entry points to no memory.
            unsafe { ring.push(entry) };
        }
    }

    fn parts_mut(&mut self) -> &mut Parts {
        self.parts.as_mut().expect("there until dropped")
    }
}

impl Parts {
    fn accept(&mut self, ring: &Ring) {
        let Some(listener) = &self.listener else { return };
        self.accepting = true;
        let entry = opcode::AcceptMulti::new(types::Fd(listener.as_raw_fd()))
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(tag(Purpose::Accept, NOBODY));
        // SAFETY: the entry points to no memory.
        unsafe { ring.push(entry) };
    }

    fn complete(
        &mut self,
        ring: &Ring,
        completion: Completion,
        handler: &mut impl FnMut(&mut Connections, Event<'_>),
    ) {
        let (purpose, id) = untag(completion.user_data);
        match purpose {
            Some(Purpose::Receive) => self.receive(id, completion, handler),
            Some(Purpose::Send) => self.connections.send_ended(id, completion.result),
            Some(Purpose::Accept) => self.accepted(ring, completion, handler),
            Some(Purpose::Tick) => {
                self.ticking = false;
                self.connections.tick();
                if self.accept_later && !self.accepting {
                    self.accept_later = false;
                    self.accept(ring);
                }
            }
            Some(Purpose::Cancel) | None => {}
        }
    }

    fn receive(
        &mut self,
        id: ConnId,
        completion: Completion,
        handler: &mut impl FnMut(&mut Connections, Event<'_>),
    ) {
        if let (Some(buffer), Ok(len)) = (completion.buffer(), usize::try_from(completion.result)) {
            let bytes = self.buffers.claim(buffer, len);
            if len > 0 && self.connections.received(id, bytes) {
                handler(&mut self.connections, Event::Received(id, bytes));
            }
            self.buffers.recycle(buffer);
        }
        if !completion.more() {
            // A multishot that ended after data ended for no reason of the connection's.
            let result = if completion.result > 0 { -libc::EAGAIN } else { completion.result };
            self.connections.receive_ended(id, result);
        }
    }

    fn accepted(
        &mut self,
        ring: &Ring,
        completion: Completion,
        handler: &mut impl FnMut(&mut Connections, Event<'_>),
    ) {
        if completion.result >= 0 {
            if self.listener.is_none() {
                ring.close(completion.result);
            } else if let Some(id) = self.connections.accept(completion.result) {
                handler(&mut self.connections, Event::Opened(id));
            }
        }
        if completion.more() {
            return;
        }
        self.accepting = false;
        match -completion.result {
            errno @ (libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::warn!(%error, "cannot accept a connection; trying again in a second");
                self.accept_later = true;
            }
            _ => self.accept(ring),
        }
    }

    /// Hands notices to the owner, and those that it causes.
    fn tell(&mut self, handler: &mut impl FnMut(&mut Connections, Event<'_>)) -> bool {
        let mut any = false;
        loop {
            let notices = self.connections.take_notices();
            if notices.is_empty() {
                return any;
            }
            any = true;
            for notice in notices {
                let event = match notice {
                    Notice::Closed(id, by) => Event::Closed(id, by),
                    Notice::Drained(id) => Event::Drained(id),
                    Notice::Detached(id, detached) => Event::Detached(id, detached),
                };
                handler(&mut self.connections, event);
            }
        }
    }

    fn arm_tick(&mut self, ring: &Ring) {
        if !self.ticking && (self.accept_later || self.connections.needs_tick()) {
            self.ticking = true;
            let entry = opcode::Timeout::new(&raw const *self.tick)
                .build()
                .user_data(tag(Purpose::Tick, NOBODY));
            // SAFETY: the time is on the heap, never changed, and goes to `Ring::retain` when
            // `Sockets` is dropped.
            unsafe { ring.push(entry) };
        }
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.stop_accepting();
        if let Some(mut parts) = self.parts.take() {
            parts.connections.close_all();
            // Sends and receives in flight may still use the buffers.
            self.ring.retain(Box::new(parts) as Box<dyn Any>);
        }
    }
}
