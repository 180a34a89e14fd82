//! What the repair of a shard has done and found: for `annulus repair --status` and the metrics.

use annulus_engine::model::{PartitionId, WallMicros};

use super::scrub::ScrubProgress;
use crate::member::NodeId;

/// How a round ended: one comparison of a partition with one other replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it was compared, and was equal.
    Equal,
    /// All of it was compared; keys that differed were asked for, or sent.
    Repaired,
    /// Parts were compared; the others are written faster than they are read.
    Partly,
    /// The replicas had not seen the same writes, or one cannot answer for the partition now.
    NotComparable,
    /// No answer.
    Unreachable,
    /// An answer that is none, and what is wrong with it.
    Malformed(&'static str),
}

/// The last round of a partition with another replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRound {
    /// Which partition.
    pub partition: PartitionId,
    /// With whom.
    pub peer: NodeId,
    /// When it ended.
    pub ended: WallMicros,
    /// How.
    pub outcome: Outcome,
    /// Keys that differed.
    pub differing: u64,
    /// Bytes of messages, both ways; records not among them.
    pub bytes: u64,
}

/// Counters since the start, and gauges of now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RepairStatus {
    /// Pairs of a partition and another replica that are compared in turn.
    pub pairs: u64,
    /// Of them, those that have been compared whole in their last round.
    pub checked: u64,
    /// Of them, those that differed in their last round.
    pub differing: u64,
    /// Comparisons under way.
    pub open: u64,
    /// Rounds that ended.
    pub rounds: u64,
    /// Of them without a difference.
    pub equal: u64,
    /// Of them with keys that differed. Each is a fault of disk, memory or program.
    pub faults: u64,
    /// Of them in which a part could not be compared.
    pub partly: u64,
    /// Of them without a comparison, because the replicas had not seen the same.
    pub not_comparable: u64,
    /// Of them without an answer.
    pub unreachable: u64,
    /// Of them with an answer that is none.
    pub malformed: u64,
    /// Keys found to differ.
    pub keys_differing: u64,
    /// Of them asked for and received.
    pub keys_fetched: u64,
    /// Of them sent to the other replica.
    pub keys_pushed: u64,
    /// Bytes of messages sent.
    pub bytes_sent: u64,
    /// Bytes of messages received.
    pub bytes_received: u64,
    /// When the last round ended.
    pub last_round: Option<WallMicros>,
    /// Scans that ended.
    pub reads: u64,
    /// Bytes read by them.
    pub read_bytes: u64,
    /// Scans that met damage.
    pub damaged: u64,
    /// Scans that showed that a tree was not the data's.
    pub mismatches: u64,
    /// Leaves that must be read before they answer.
    pub dirty_leaves: u64,
    /// Leaves of all trees.
    pub leaves: u64,
    /// Memory of all trees, in bytes.
    pub tree_bytes: u64,
    /// What is read only to check it.
    pub scrub: ScrubProgress,
}
