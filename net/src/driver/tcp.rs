//! A shard's listeners and the turn that makes events of the ring's completions.
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

use super::connection::{
    ClosedBy, ConnId, Detached, Door, Limits, NOBODY, Notice, Purpose, tag, untag,
};
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

/// A node that vanished without a word is noticed after some five seconds.
const PEER_KEEPALIVE: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(2))
    .with_interval(Duration::from_secs(1))
    .with_retries(3);
/// Bytes that a node does not take for this long end the connection to it.
const PEER_PATIENCE: Duration = Duration::from_secs(5);

/// Sets what connections between nodes have.
pub(super) fn prepare_peer(socket: &socket2::Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&PEER_KEEPALIVE)?;
    socket.set_tcp_user_timeout(Some(PEER_PATIENCE))
}

/// A listening socket that several shards may share an address with (`SO_REUSEPORT`); the kernel
/// spreads connections over them. What is set here is inherited by accepted connections.
///
/// # Errors
/// `Io` that names the address.
pub fn listen(address: SocketAddr) -> Result<TcpListener> {
    listen_at(address, Door::Clients)
}

/// [`listen`] for other nodes, which notices sooner that one has vanished.
///
/// # Errors
/// `Io` that names the address.
pub fn listen_for_peers(address: SocketAddr) -> Result<TcpListener> {
    listen_at(address, Door::Peers)
}

fn listen_at(address: SocketAddr, door: Door) -> Result<TcpListener> {
    let open = || -> io::Result<TcpListener> {
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_tcp_nodelay(true)?;
        match door {
            Door::Clients => socket.set_tcp_keepalive(&KEEPALIVE)?,
            Door::Peers => prepare_peer(&socket)?,
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|source| Error::io("listen on", address.to_string(), source))
}

/// What happened to a connection.
#[derive(Debug)]
pub enum Event<'a> {
    /// It was accepted, through this door.
    Opened(ConnId, Door),
    /// It was dialled, and stands.
    Connected(ConnId),
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
    /// One for each door; an accept is tagged with its place.
    listeners: Vec<Listener>,
    ticking: bool,
    tick: Box<types::Timespec>,
}

/// A listening socket, or what is left of it.
struct Listener {
    door: Door,
    socket: Option<TcpListener>,
    accepting: bool,
    /// The last accept failed for want of something; the tick tries again.
    accept_later: bool,
}

impl Sockets {
    /// Sockets on a ring; accepts clients from `listener` if there is one.
    ///
    /// # Errors
    /// `Io` when the receive buffers cannot be had.
    pub fn new(ring: &Ring, listener: Option<TcpListener>, limits: Limits) -> Result<Sockets> {
        let buffers = BufferRing::new(ring, BUFFER_COUNT, BUFFER_SIZE)?;
        let parts = Parts {
            connections: Connections::new(ring, buffers.group(), limits),
            buffers,
            listeners: Vec::new(),
            ticking: false,
            tick: Box::new(types::Timespec::new().sec(1)),
        };
        let mut sockets = Sockets { ring: ring.clone(), parts: Some(parts) };
        if let Some(listener) = listener {
            sockets.accept_from(listener, Door::Clients);
        }
        Ok(sockets)
    }

    /// Accepts from one more listening socket.
    pub fn accept_from(&mut self, listener: TcpListener, door: Door) {
        let ring = self.ring.clone();
        let parts = self.parts_mut();
        let socket = Some(listener);
        parts.listeners.push(Listener { door, socket, accepting: false, accept_later: false });
        parts.accept(&ring, parts.listeners.len() - 1);
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

    /// Accepts no further connections, and closes the listening sockets.
    pub fn stop_accepting(&mut self) {
        let ring = self.ring.clone();
        for (index, listener) in self.parts_mut().listeners.iter_mut().enumerate() {
            let Some(socket) = listener.socket.take() else { continue };
            // Wakes the accept in flight, which holds the socket open until then.
            // SAFETY: an open descriptor and no memory.
            unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
            if listener.accepting {
                let entry = opcode::AsyncCancel::new(tag(Purpose::Accept, place(index)))
                    .build()
                    .user_data(tag(Purpose::Cancel, NOBODY));
                // SAFETY: the entry points to no memory.
                unsafe { ring.push(entry) };
            }
        }
    }

    fn parts_mut(&mut self) -> &mut Parts {
        self.parts.as_mut().expect("there until dropped")
    }
}

impl Parts {
    fn accept(&mut self, ring: &Ring, index: usize) {
        let listener = &mut self.listeners[index];
        let Some(socket) = &listener.socket else { return };
        listener.accepting = true;
        let entry = opcode::AcceptMulti::new(types::Fd(socket.as_raw_fd()))
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(tag(Purpose::Accept, place(index)));
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
            Some(Purpose::Connect) => self.connections.connect_ended(id, completion.result),
            Some(Purpose::Accept) => self.accepted(ring, id, completion, handler),
            Some(Purpose::Tick) => {
                self.ticking = false;
                self.connections.tick();
                for index in 0..self.listeners.len() {
                    let listener = &mut self.listeners[index];
                    if listener.accept_later && !listener.accepting {
                        listener.accept_later = false;
                        self.accept(ring, index);
                    }
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
        place: ConnId,
        completion: Completion,
        handler: &mut impl FnMut(&mut Connections, Event<'_>),
    ) {
        let index = place.index();
        let listener = &mut self.listeners[index];
        if completion.result >= 0 {
            if listener.socket.is_none() {
                ring.close(completion.result);
            } else if let Some(id) = self.connections.accept(completion.result, listener.door) {
                handler(&mut self.connections, Event::Opened(id, listener.door));
            }
        }
        if completion.more() {
            return;
        }
        listener.accepting = false;
        match -completion.result {
            errno @ (libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::warn!(%error, "cannot accept a connection; trying again in a second");
                listener.accept_later = true;
            }
            _ => self.accept(ring, index),
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
                    Notice::Connected(id) => Event::Connected(id),
                    Notice::Closed(id, by) => Event::Closed(id, by),
                    Notice::Drained(id) => Event::Drained(id),
                    Notice::Detached(id, detached) => Event::Detached(id, detached),
                };
                handler(&mut self.connections, event);
            }
        }
    }

    fn arm_tick(&mut self, ring: &Ring) {
        let accepts_later = self.listeners.iter().any(|listener| listener.accept_later);
        if !self.ticking && (accepts_later || self.connections.needs_tick()) {
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

/// The name of a listener's entries: its place.
fn place(index: usize) -> ConnId {
    ConnId { index: u32::try_from(index).expect("a few listeners"), generation: 0 }
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
