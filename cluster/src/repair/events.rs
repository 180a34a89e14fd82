//! What goes into the repair of a shard and what comes out: options, time, events, things to do.

use annulus_engine::model::{Instant, PartitionId, Token, TokenRange, WallMicros};

use super::reads::{Purpose, ReadId};
use super::scrub::ScrubOptions;
use crate::member::NodeId;
use crate::message::PeerMessage;

/// How often and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepairOptions {
    /// Between two rounds of a partition with the same replica. Default 60 s.
    pub interval_nanos: u64,
    /// Comparisons that talk at once; those that wait for scans come on top. Default 4.
    pub open_max: usize,
    /// Until a message counts as lost. Default 2 s.
    pub timeout_nanos: u64,
    /// Attempts at one question before the round is given up. Default 6.
    pub attempts_max: u32,
    /// Dirty leaves read for one round. Default 16.
    pub reads_max: u32,
    /// Rate of reading for comparisons, in bytes a second. Default 8 MiB.
    pub read_bytes_per_second: u64,
    /// What is read only to check it.
    pub scrub: ScrubOptions,
}

impl Default for RepairOptions {
    fn default() -> RepairOptions {
        RepairOptions {
            interval_nanos: 60_000_000_000,
            open_max: 4,
            timeout_nanos: 2_000_000_000,
            attempts_max: 6,
            reads_max: 16,
            read_bytes_per_second: 8 << 20,
            scrub: ScrubOptions::default(),
        }
    }
}

/// The time of an event, on both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For intervals and time-outs.
    pub now: Instant,
    /// For expiry: the clock by which this shard decides what has expired.
    pub wall: WallMicros,
}

/// What the repair needs to know of its shard at the moment of an event.
pub trait Local {
    /// Digest of the writes seen of a partition: of the dots alone, so that replicas which have
    /// seen the same have the same. `None` if the partition cannot be compared now: it is being
    /// filled, or a part of it is damaged.
    fn seen_digest(&self, partition: PartitionId) -> Option<u64>;
}

/// Why the records of a range are not to be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// A block could not be read.
    Damaged,
    /// The records are not those whose writing was noted.
    Mismatch,
}

/// A `Tree` message that came in; the fields are the message's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is documented in PeerMessage::Tree")]
pub struct TreeAsked {
    pub id: u64,
    pub partition: PartitionId,
    pub seen_digest: u64,
    pub level: u8,
    pub index: u32,
}

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a message on the background lane: `Tree`, `TreeDone` or `Fetch`.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: PeerMessage<'static>,
    },
    /// Send the records that this replica has under these tokens, each as a `Write` with id 0.
    Push {
        /// To whom.
        to: NodeId,
        /// Of which partition.
        partition: PartitionId,
        /// Whose records.
        tokens: Vec<Token>,
    },
    /// Scan a range in the background: `Repairer::read_record` for each record that stands for its
    /// key, then `Repairer::read_done`, or `Repairer::read_failed`.
    Read {
        /// Number of the scan.
        id: ReadId,
        /// Of which partition.
        partition: PartitionId,
        /// Which tokens.
        range: TokenRange,
        /// What for.
        purpose: Purpose,
    },
    /// Replicas with the same history differ: what a round has found, at its end. For the log.
    Fault {
        /// In which partition.
        partition: PartitionId,
        /// This one and that one.
        peer: NodeId,
        /// Keys that only the other has.
        missing_here: u64,
        /// Keys that only this one has.
        missing_there: u64,
        /// Keys of which they have different versions.
        differing: u64,
    },
    /// The records of a range must not be trusted, until they are filled in again from others.
    Unknown {
        /// In which partition.
        partition: PartitionId,
        /// Which tokens.
        range: TokenRange,
        /// Why.
        why: Suspicion,
    },
}
