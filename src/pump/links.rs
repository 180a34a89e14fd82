//! The seam between the pump and the shards of other nodes.
//!
//! Invariant: a message is sent once and never again by whoever carries it; it arrives whole or
//! not at all. Over one lane messages arrive in the order of sending, except that a short one may
//! overtake one longer than a frame. What was under way when a link broke is lost.

use annulus_cluster::NodeId;
use annulus_cluster::tracking::PeerShard;

/// Messages of one lane never wait for those of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Somebody waits for it: reads, writes, what clients forward, probes.
    Foreground,
    /// Nobody does: sync, repair, tracking.
    Background,
}

impl Lane {
    /// Both.
    pub const ALL: [Lane; 2] = [Lane::Foreground, Lane::Background];

    /// The number that the peers' handshake knows it by.
    #[must_use]
    pub fn as_u8(self) -> u8 {
        match self {
            Lane::Foreground => 0,
            Lane::Background => 1,
        }
    }

    /// The lane with this number.
    #[must_use]
    pub fn from_u8(byte: u8) -> Option<Lane> {
        match byte {
            0 => Some(Lane::Foreground),
            1 => Some(Lane::Background),
            _ => None,
        }
    }
}

/// The message was not sent and will not be: the node cannot be reached now, or too much waits
/// for it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the link to the node is down")]
pub struct LinkDown;

/// The shards of other nodes. The sockets implement it, and so does the simulated network.
pub trait Links {
    /// Sends a message, encoded, to a shard of another node.
    ///
    /// # Errors
    /// [`LinkDown`]: it was dropped.
    fn send(&mut self, to: PeerShard, lane: Lane, message: &[u8]) -> Result<(), LinkDown>;

    /// Whether a foreground link to the node stands.
    fn is_up(&self, node: NodeId) -> bool;
}

/// The links of a node that has no peers.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLinks;

impl Links for NoLinks {
    fn send(&mut self, _: PeerShard, _: Lane, _: &[u8]) -> Result<(), LinkDown> {
        Err(LinkDown)
    }

    fn is_up(&self, _: NodeId) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_known_by_its_number() {
        assert_eq!(Lane::ALL.map(|lane| Lane::from_u8(lane.as_u8())), Lane::ALL.map(Some));
        assert_eq!(Lane::from_u8(2), None);
    }
}
