//! Both ends of a connection between shards of different nodes: [`PeerDialer`] says who it is and
//! then sends messages; [`PeerListener`] checks it and then takes them.
//!
//! ```text
//! dialer    PEER_HELLO ----------------->   listener: checks; refuses, hands over, or
//!           <----------------- PEER_WELCOME (or PEER_CLOSE with the reason)
//!           PEER_MESSAGE, PEER_MESSAGE ->   messages, for the connection's whole life
//! ```
//!
//! Invariants: messages go one way only, so that a connection has one writer and one reader of
//! them; none is handled, and none is sent, before the handshake has passed; a listener holds a
//! frame and one unfinished message, never more. The listener draws the stream position of the
//! first message by chance, so frames recorded on one connection fail their checksum on every
//! other. Neither end does I/O, reads a clock, or draws chance. The bytes are in `wire/peer.rs`.

mod dialer;
mod listener;

use annulus_engine::model::OriginId;

pub use dialer::{PeerDialer, PeerTarget};
pub use listener::{PeerListener, PeerReceived};

use crate::wire::frame::{FrameError, FrameHeader, HEADER_SIZE, flag};
use crate::wire::peer::{PEER_CLOSE, PEER_HANDSHAKE_BODY_MAX, PeerHello, PeerRefusal};
use crate::wire::slices::{FrameWriter, Head};

/// What a connection may hold before its handshake has passed (`RELIABILITY.md` 9).
pub const HANDSHAKE_BYTES_MAX: usize = 8 << 10;

const _: () = assert!(2 * (HEADER_SIZE + PEER_HANDSHAKE_BODY_MAX) <= HANDSHAKE_BYTES_MAX);

const NANOS_PER_MS: u64 = 1_000_000;

/// Times of a connection between peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerOptions {
    /// Time for the handshake, in milliseconds. Default 5,000.
    pub handshake_timeout_ms: u64,
    /// Time for one frame to arrive in full, in milliseconds. Default 5,000.
    pub frame_timeout_ms: u64,
    /// Longest wait for the next slice of a message, in milliseconds. Default 30,000.
    pub slice_timeout_ms: u64,
    /// Largest message, in bytes. Default 4 MiB; at least that of the largest value and its
    /// siblings.
    pub message_size_max: usize,
}

impl Default for PeerOptions {
    fn default() -> PeerOptions {
        PeerOptions {
            handshake_timeout_ms: 5_000,
            frame_timeout_ms: 5_000,
            slice_timeout_ms: 30_000,
            message_size_max: 4 << 20,
        }
    }
}

/// Another node as the handshake knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerMember {
    /// Which node.
    pub node: OriginId,
    /// The greatest life that it has shown so far; an earlier one is refused. 0: not seen yet.
    pub life: u64,
}

/// What all peer connections of a shard share. Their owner keeps it up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerFacts {
    /// Id of the cluster.
    pub cluster: u128,
    /// Under which keys are hashed.
    pub hash_seed: u64,
    /// The ring has 2^bits partitions.
    pub partition_bits: u8,
    /// Of the members as this node knows them.
    pub members_digest: u64,
    /// The other nodes.
    pub members: Vec<PeerMember>,
    /// This node.
    pub node: OriginId,
    /// This shard.
    pub shard: u32,
    /// How many shards this node has.
    pub shard_count: u32,
    /// How often this node has started.
    pub life: u64,
    /// Times and sizes.
    pub options: PeerOptions,
}

impl PeerFacts {
    /// Takes note of the life that a node has shown.
    pub fn note_life(&mut self, node: OriginId, life: u64) {
        if let Some(member) = self.members.iter_mut().find(|member| member.node == node) {
            member.life = member.life.max(life);
        }
    }

    /// The other nodes are these from now on; what is known of the lives of those that stay stays.
    pub fn set_members(&mut self, members: &[PeerMember]) {
        let before = std::mem::replace(&mut self.members, members.to_vec());
        before.into_iter().for_each(|member| self.note_life(member.node, member.life));
    }

    /// Whether a node with this life may be spoken to.
    fn check_member(&self, node: OriginId, life: u64) -> Result<(), PeerRefusal> {
        match self.members.iter().find(|member| member.node == node) {
            Some(member) if node != self.node && life >= member.life => Ok(()),
            Some(_) if node != self.node => Err(PeerRefusal::Life),
            _ => Err(PeerRefusal::Node),
        }
    }

    /// What this shard says first.
    fn hello(&self, target: PeerTarget) -> PeerHello {
        PeerHello {
            lane: target.lane,
            partition_bits: self.partition_bits,
            node: self.node,
            cluster: self.cluster,
            hash_seed: self.hash_seed,
            members_digest: self.members_digest,
            life: self.life,
            shard: self.shard,
            shard_count: self.shard_count,
            wanted_node: target.node,
            wanted_shard: target.shard,
        }
    }
}

/// What a broken stream is called here.
fn refusal_of(error: FrameError) -> PeerRefusal {
    match error {
        FrameError::HeaderChecksum | FrameError::BodyChecksum => PeerRefusal::Checksum,
        FrameError::BodyTooBig => PeerRefusal::TooBig,
        FrameError::BadSlice => PeerRefusal::BadSlice,
        FrameError::UnknownFlags | FrameError::WrongDirection => PeerRefusal::Unexpected,
        FrameError::NoHello => PeerRefusal::NoHello,
        FrameError::BadHello => PeerRefusal::BadHello,
    }
}

/// Whether a frame has only what frames between peers may have.
fn is_plain(header: &FrameHeader) -> bool {
    let fields = header.request_id | header.time_or_window | u32::from(header.code);
    fields == 0 && header.flags & !flag::SLICE == 0
}

/// The last frame of a listener: why.
fn goodbye(writer: &mut FrameWriter, out: &mut Vec<u8>, refusal: PeerRefusal) {
    let head = Head { opcode: PEER_CLOSE, code: refusal.number(), ..Head::default() };
    writer.owned_message(out, head, refusal.to_string().into_bytes());
}

#[cfg(test)]
mod tests;
