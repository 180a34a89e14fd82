//! One connection of a shard, its names, and the bounds it lives under.
//!
//! Invariant: a [`ConnId`] carries the generation of its place, and so does the tag of each entry
//! in flight; a stale one names nobody. The table that moves connections through their phases is
//! in `connections.rs`.

use std::os::fd::{OwnedFd, RawFd};

use annulus_engine::driver::NETWORK;
use annulus_engine::model::Instant;

/// Bounds of a shard's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections of clients at a time; further ones are closed at once.
    pub connections: usize,
    /// Most connections from and to other nodes at a time.
    pub reserve: usize,
    /// Unsent bytes of one connection beyond which nothing more is received from it.
    pub out_pause_bytes: usize,
    /// Unsent bytes of one connection beyond which it is shed.
    pub out_shed_bytes: usize,
    /// Longest time without any progress of a send before the connection is shed, milliseconds.
    pub stall_ms: u64,
    /// Longest wait for an answer when a connection is dialled, in milliseconds.
    pub dial_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 20_000,
            reserve: 4096,
            out_pause_bytes: 1 << 20,
            out_shed_bytes: 64 << 20,
            stall_ms: 30_000,
            dial_timeout_ms: 2_000,
        }
    }
}

/// Names one connection of one shard for ever; a stale id names nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId {
    pub(super) index: u32,
    pub(super) generation: u32,
}

impl ConnId {
    /// Dense number of the connection's place; places are reused.
    #[must_use]
    pub fn index(self) -> usize {
        self.index as usize
    }

    /// The id as one number: the place in the low half, the generation in the high half.
    #[must_use]
    pub fn key(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The id that [`ConnId::key`] gave; any other number names nobody, or somebody else.
    #[must_use]
    pub fn from_key(key: u64) -> ConnId {
        #[expect(clippy::cast_possible_truncation, reason = "the halves are taken apart")]
        let (index, generation) = (key as u32, (key >> 32) as u32);
        ConnId { index, generation }
    }

    /// How often the place had been used before, modulo 2^28.
    #[must_use]
    pub fn generation(self) -> u32 {
        self.generation
    }
}

/// Where a connection came in, and whose protocol is spoken on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The clients' address.
    Clients,
    /// The peers' address; also for connections that were dialled from here.
    Peers,
}

/// Who ended a connection that its owner did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// The peer said that it is done. What is in `out` is still sent.
    Peer,
    /// The network: an errno.
    Error(i32),
    /// We did: it does not read what it asked for.
    SlowReader,
}

/// A connection on its way to another shard.
#[derive(Debug)]
pub struct Detached {
    /// The socket.
    pub socket: OwnedFd,
    /// Bytes received and not yet handled.
    pub received: Vec<u8>,
    /// Where it came in.
    pub door: Door,
}

/// Counters of a shard's sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketStats {
    /// Connections now.
    pub open: usize,
    /// Connections accepted or adopted so far.
    pub opened: u64,
    /// Connections dialled so far.
    pub dials: u64,
    /// Of these, those that did not come to stand.
    pub dials_failed: u64,
    /// Connections refused because of the limit.
    pub refused: u64,
    /// Connections shed because they did not read.
    pub shed: u64,
    /// Times a receive found no free buffer.
    pub starved: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Unsent bytes now.
    pub unsent_bytes: usize,
    /// Memory of the buffers that connections and the pool hold now, in bytes.
    pub buffer_bytes: usize,
}

/// What the table tells its owner beyond received bytes.
#[derive(Debug)]
pub(super) enum Notice {
    Connected(ConnId),
    Closed(ConnId, ClosedBy),
    Drained(ConnId),
    Detached(ConnId, Detached),
}

/// What an entry was for; three bits of its `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Accept,
    Receive,
    Send,
    Cancel,
    Tick,
    Connect,
}

const PURPOSE_SHIFT: u32 = 60;
pub(super) const GENERATION_MASK: u32 = (1 << 28) - 1;

pub(super) fn tag(purpose: Purpose, id: ConnId) -> u64 {
    NETWORK
        | (purpose as u64) << PURPOSE_SHIFT
        | u64::from(id.generation) << 32
        | u64::from(id.index)
}

pub(super) fn untag(user_data: u64) -> (Option<Purpose>, ConnId) {
    let purpose = match user_data >> PURPOSE_SHIFT & 7 {
        0 => Some(Purpose::Accept),
        1 => Some(Purpose::Receive),
        2 => Some(Purpose::Send),
        3 => Some(Purpose::Cancel),
        4 => Some(Purpose::Tick),
        5 => Some(Purpose::Connect),
        _ => None,
    };
    #[expect(clippy::cast_possible_truncation, reason = "the halves of the tag are taken apart")]
    let (index, high) = (user_data as u32, (user_data >> 32) as u32);
    (purpose, ConnId { index, generation: high & GENERATION_MASK })
}

pub(super) const NOBODY: ConnId = ConnId { index: 0, generation: 0 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Free,
    /// Dialled, and not answered yet.
    Connecting,
    Open,
    /// Sends what is in `out`, then says so to the peer; what still arrives is thrown away.
    Closing,
    /// All is sent and the peer knows; waits for its goodbye, so that our last bytes are not
    /// destroyed by a reset.
    Lingering,
    /// Ends as soon as nothing is in flight.
    Aborting,
    /// Leaves as soon as nothing is in flight and `out` is sent.
    Detaching,
}

pub(super) struct Connection {
    pub(super) fd: RawFd,
    pub(super) generation: u32,
    pub(super) phase: Phase,
    pub(super) door: Door,
    pub(super) connecting: bool,
    pub(super) receiving: bool,
    pub(super) cancelling: bool,
    pub(super) sending: bool,
    /// By the owner.
    pub(super) paused: bool,
    /// By us: too much is unsent.
    pub(super) choked: bool,
    /// Its last receive found no buffer.
    pub(super) starved: bool,
    pub(super) dirty: bool,
    /// Waits in `ready` for its held bytes to be delivered.
    pub(super) ready: bool,
    /// The peer is gone, but held bytes come first.
    pub(super) ended: Option<ClosedBy>,
    /// Whom the connect in flight is for.
    pub(super) address: Option<Box<socket2::SockAddr>>,
    /// When the connect or send in flight, or the closing, last moved.
    pub(super) progress: Instant,
    pub(super) out: Vec<u8>,
    pub(super) in_flight: Vec<u8>,
    pub(super) sent: usize,
    pub(super) held: Vec<u8>,
}

impl Connection {
    pub(super) fn new(fd: RawFd, generation: u32, door: Door) -> Connection {
        Connection {
            fd,
            generation,
            phase: Phase::Open,
            door,
            connecting: false,
            receiving: false,
            cancelling: false,
            sending: false,
            paused: false,
            choked: false,
            starved: false,
            dirty: false,
            ready: false,
            ended: None,
            address: None,
            progress: Instant(0),
            out: Vec::new(),
            in_flight: Vec::new(),
            sent: 0,
            held: Vec::new(),
        }
    }

    pub(super) fn unsent(&self) -> usize {
        self.out.len() + self.in_flight.len() - self.sent
    }

    pub(super) fn wants_bytes(&self) -> bool {
        let open = match self.phase {
            Phase::Open => !self.paused && !self.choked,
            Phase::Closing | Phase::Lingering => true,
            Phase::Free | Phase::Connecting | Phase::Aborting | Phase::Detaching => false,
        };
        open && self.ended.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_tag_gives_back_what_it_was_made_of(index: u32, generation in 0..=GENERATION_MASK) {
            let id = ConnId { index, generation };
            prop_assert_eq!(ConnId::from_key(id.key()), id);
            for purpose in [
                Purpose::Accept,
                Purpose::Receive,
                Purpose::Send,
                Purpose::Cancel,
                Purpose::Tick,
                Purpose::Connect,
            ] {
                let user_data = tag(purpose, id);
                prop_assert_eq!(user_data & NETWORK, NETWORK);
                prop_assert_eq!(untag(user_data), (Some(purpose), id));
            }
        }
    }
}
