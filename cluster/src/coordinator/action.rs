//! What the coordinator is given and what it gives back: events' arguments, actions, outcomes.
//!
//! Invariant: an action names its operation by id, so it is small, and one that comes too late
//! finds nothing. Bulky things, records and clients, stay in the operation.

use annulus_engine::model::{Instant, Record, WallMicros};
use annulus_net::wire::status::Status;

use super::quorum::{Acks, Requirement};
use super::read::{Freshness, ReadFacts};
use super::table::OpId;
use crate::member::NodeId;
use crate::message::Want;

/// Bounds.
#[derive(Clone, Copy, Debug)]
pub struct CoordinatorOptions {
    /// Most operations in flight; beyond it BUSY. At most 2^20.
    pub operations_max: usize,
    /// Most bytes that they may hold, before it is BUSY: records to send, states received.
    pub bytes_max: usize,
}

impl Default for CoordinatorOptions {
    fn default() -> CoordinatorOptions {
        CoordinatorOptions { operations_max: 16 << 10, bytes_max: 64 << 20 }
    }
}

/// Both clocks at the moment of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For deadlines and latencies.
    pub now: Instant,
    /// For the age of writes.
    pub wall: WallMicros,
}

/// What the pump is to do. In order: a read's repairs come before its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the write's record to a server, never this one.
    SendWrite {
        /// Whom.
        to: NodeId,
        /// Which write.
        op: OpId,
    },
    /// Ask a server for the key; this server too, which answers with its state.
    SendRead {
        /// Whom.
        to: NodeId,
        /// Which read.
        op: OpId,
        /// What for.
        want: Want,
    },
    /// Send the read's merged state ([`merged`](super::Coordinator::merged)) to a replica that lacks some of it;
    /// this server too. No answer is wanted.
    Repair {
        /// Whom.
        to: NodeId,
        /// Which read.
        op: OpId,
    },
    /// Answer the client, and call [`finish`](super::Coordinator::finish).
    Answer {
        /// Which operation.
        op: OpId,
        /// How it ended.
        outcome: Outcome,
    },
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As many have the write as were asked for.
    Written(Acks),
    /// It is known to be there, but that is not enough, or not in time.
    MayBeApplied(Acks),
    /// The merged state is the answer; without one the key is absent.
    Read(ReadFacts),
    /// Nobody is as fresh as the read asked for.
    Stale(ReadFacts),
    /// Too few replicas can answer the read.
    Unavailable,
    /// All home replicas are damaged there.
    Corrupt,
    /// The read's time is over.
    Expired,
}

impl Outcome {
    /// The status of an error; `None` where there is a result.
    #[must_use]
    pub fn error(&self) -> Option<Status> {
        match self {
            Outcome::Written(_) | Outcome::Read(_) => None,
            Outcome::MayBeApplied(_) => Some(Status::MAY_BE_APPLIED),
            Outcome::Stale(_) => Some(Status::STALE_UNAVAILABLE),
            Outcome::Unavailable => Some(Status::UNAVAILABLE),
            Outcome::Corrupt => Some(Status::CORRUPT),
            Outcome::Expired => Some(Status::EXPIRED),
        }
    }
}

/// Why a server gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It has too much to do.
    Busy,
    /// It refused for another reason.
    Refused,
    /// Its range is damaged there: it does not know.
    Unknown,
    /// The link broke, or never was.
    Lost,
}

/// What [`finish`](super::Coordinator::finish) gives back.
#[derive(Debug)]
pub struct Finished<P> {
    /// What was given when the operation began.
    pub payload: P,
    /// The merged state of a read.
    pub state: Option<Record>,
    /// When it began.
    pub began: Instant,
}

/// A read that is to begin.
#[derive(Clone, Copy, Debug)]
pub struct ReadRequest<'a> {
    /// How many must answer.
    pub requirement: Requirement,
    /// The key's home replicas, in the order of the ring.
    pub primaries: &'a [NodeId],
    /// Those that may stand in, in order.
    pub fallbacks: &'a [NodeId],
    /// How fresh the answer must be.
    pub freshness: Option<Freshness>,
    /// When it must be answered.
    pub deadline: Instant,
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counters {
    /// Writes begun.
    pub writes: u64,
    /// Of them, answered as may be applied.
    pub writes_may_be_applied: u64,
    /// Writes refused because too few are healthy.
    pub writes_unavailable: u64,
    /// Servers that were sent a write in place of one that failed.
    pub replacements: u64,
    /// Reads begun.
    pub reads: u64,
    /// Reads that too few could answer, at their beginning or later.
    pub reads_unavailable: u64,
    /// Reads whose time was over.
    pub reads_expired: u64,
    /// Reads for which nobody was fresh enough.
    pub reads_stale: u64,
    /// States fetched because a digest differed, or more servers had to be asked.
    pub asked_again: u64,
    /// Late answers for which another server was asked.
    pub hedges: u64,
    /// Late answers for which none was asked, for want of budget.
    pub hedges_denied: u64,
    /// Replicas that were sent what they lacked.
    pub repairs: u64,
    /// Operations refused for their number or bytes.
    pub busy: u64,
    /// Answers to operations that were gone.
    pub late: u64,
    /// Answers that were no states of their key.
    pub malformed: u64,
}
