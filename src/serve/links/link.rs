//! One link: the dialling end of a connection, and what waits for it.
//!
//! Invariant: it has a `dialer` in every state in which it takes messages, and none in the others.

use std::{fmt, io, mem};

use annulus_engine::model::Instant;
use annulus_net::driver::{ConnId, Connections};
use annulus_net::peer_connection::{PeerDialer, PeerFacts, PeerTarget};
use annulus_net::wire::peer::PeerRefusal;

use crate::pump::Lane;

/// Bytes given to a socket ahead of what it has sent; the rest waits here, where a short message
/// can still overtake a long one.
const SOCKET_BYTES_MAX: usize = 512 << 10;
/// Buffers above this capacity are not kept.
const BUFFER_KEPT: usize = 64 << 10;

/// Where a link is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// To be dialled at this time, or when it is sent to.
    Asleep(Instant),
    /// To be dialled in the next turn.
    Begun,
    Dialling(ConnId),
    /// Waits for the welcome.
    Greeting(ConnId),
    /// Stands, since then.
    Up(ConnId, Instant),
    /// There is nobody to dial, and never will be.
    Gone,
}

impl State {
    pub(super) fn is_up(self) -> bool {
        matches!(self, State::Up(..))
    }

    pub(super) fn is_connected(self) -> bool {
        matches!(self, State::Greeting(_) | State::Up(..))
    }

    pub(super) fn connection(self) -> Option<ConnId> {
        match self {
            State::Dialling(id) | State::Greeting(id) | State::Up(id, _) => Some(id),
            State::Asleep(_) | State::Begun | State::Gone => None,
        }
    }
}

/// Why a link ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The other end closed it without a word.
    ByPeer,
    /// The network, with an errno.
    Network(i32),
    /// A reason of the protocol's, from either end.
    Refused(PeerRefusal),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::ByPeer => f.write_str("it closed the connection"),
            Ended::Network(errno) => io::Error::from_raw_os_error(*errno).fmt(f),
            Ended::Refused(refusal) => refusal.fmt(f),
        }
    }
}

/// A link to one shard of another node, for one lane.
#[derive(Debug)]
pub(super) struct Link {
    /// Its place among the peers.
    pub(super) peer: usize,
    pub(super) lane: Lane,
    pub(super) target: PeerTarget,
    pub(super) state: State,
    pub(super) dialer: Option<PeerDialer>,
    /// Frames that the socket has not been given.
    pub(super) out: Vec<u8>,
    /// Failures in a row.
    pub(super) failures: u32,
    /// Was dialled early because its node had just dialled; not again until it has stood a while.
    pub(super) hastened: bool,
    /// Is in the list of those with something to do.
    pub(super) dirty: bool,
}

impl Link {
    pub(super) fn new(peer: usize, lane: Lane, target: PeerTarget) -> Link {
        Link {
            peer,
            lane,
            target,
            state: State::Asleep(Instant(0)),
            dialer: None,
            out: Vec::new(),
            failures: 0,
            hastened: false,
            dirty: false,
        }
    }

    /// Takes messages from now on.
    pub(super) fn begin(&mut self, now: Instant, facts: &PeerFacts) {
        self.out.clear();
        self.dialer = Some(PeerDialer::new(now, facts, self.target, &mut self.out));
        self.state = State::Begun;
    }

    /// Bytes that wait for it here, beyond what the socket has been given.
    pub(super) fn queued(&self) -> usize {
        let in_dialer = self.dialer.as_ref().map_or(0, PeerDialer::queued_bytes);
        self.out.len() + in_dialer
    }

    /// Whether something waits that a socket could be given.
    pub(super) fn has_output(&self) -> bool {
        let waits = |dialer: &PeerDialer| dialer.welcome().is_some() && dialer.queued_bytes() > 0;
        !self.out.is_empty() || self.dialer.as_ref().is_some_and(waits)
    }

    /// Gives the socket what it can take. Returns whether it took anything.
    pub(super) fn flush(&mut self, id: ConnId, connections: &mut Connections) -> bool {
        let room = SOCKET_BYTES_MAX.saturating_sub(connections.unsent(id));
        if room == 0 {
            return false;
        }
        if let Some(dialer) = &mut self.dialer {
            // At least one slice, so that short messages never keep a long one back for ever.
            let until = room.max(self.out.len() + 1);
            dialer.fill_output(&mut self.out, until);
        }
        if self.out.is_empty() {
            return false;
        }
        let Some(socket) = connections.out(id) else { return false };
        if socket.is_empty() {
            mem::swap(socket, &mut self.out);
        } else {
            socket.extend_from_slice(&self.out);
            self.out.clear();
        }
        if self.out.capacity() > BUFFER_KEPT {
            self.out = Vec::new();
        }
        true
    }

    /// The connection is gone, and what waited for it is lost.
    pub(super) fn drop_output(&mut self) {
        self.dialer = None;
        self.out = Vec::new();
    }
}
