//! Who is owed an answer, and how it reaches him.
//!
//! A request comes from a connection, from a batch, or from another shard; its answer is the same
//! three ways. Invariant: an [`Origin`] is consumed by exactly one answer.

use annulus_cluster::coordinator::OpId;
use annulus_cluster::tracking::PeerShard;
use annulus_engine::model::{Pieces, Value};
use annulus_net::server_connection::{Replies, Ticket};
use annulus_net::wire::frame::{FRAME_BODY_MAX, Opcode};
use annulus_net::wire::response::{self, BatchResults, Failure, ReadFacts, ValueRef, WriteFacts};
use annulus_net::wire::status::Status;
use futures_channel::oneshot;

/// Names a connection of this shard for as long as it lives; never reused while answers to it may
/// be on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionKey(pub u64);

/// Who waits for an answer.
#[derive(Debug)]
pub enum Origin {
    /// A request of a connection.
    Connection(ConnectionKey, Ticket),
    /// One operation of a batch.
    Batch {
        /// The batch, in the pump's table.
        batch: usize,
        /// Which operation.
        index: u32,
        /// Its verb.
        verb: Opcode,
    },
    /// A request that another shard handed over.
    Shard {
        /// That shard.
        shard: u32,
        /// Its number for the request.
        id: u64,
    },
    /// A write that a coordinator on another node wants merged here.
    Replica {
        /// The coordinator.
        from: PeerShard,
        /// Its number for the write.
        id: u64,
    },
    /// A client's request that another node handed on.
    Forward {
        /// That node's shard.
        from: PeerShard,
        /// Its number for the request.
        id: u64,
    },
    /// This shard's own part of a write that it coordinates.
    Operation(OpId),
    /// A task of this shard that asked another node.
    Task(oneshot::Sender<(Status, Vec<u8>)>),
}

/// What to answer.
#[derive(Debug)]
pub enum Answer<'a> {
    /// The values of a key; none means absent.
    Read(ReadFacts<'a>, &'a [ValueRef<'a>]),
    /// A write was done.
    Written(WriteFacts<'a>),
    /// A condition was false; the version is the live value's.
    ConditionFalse(WriteFacts<'a>),
    /// It failed.
    Failure(Failure<'a>),
    /// What another shard answered, as it stands.
    Raw(Status, Value<'a>),
}

impl Answer<'_> {
    /// Answers a connection's request.
    pub(super) fn to_connection(&self, replies: &mut Replies<'_>, ticket: Ticket) {
        match self {
            Answer::Read(facts, values) => replies.read(ticket, facts, values),
            Answer::Written(facts) => replies.written(ticket, facts),
            Answer::ConditionFalse(facts) => replies.condition_false(ticket, facts),
            Answer::Failure(failure) => replies.failure(ticket, failure),
            Answer::Raw(status, body) => replies.raw(ticket, *status, *body),
        }
    }

    /// Adds the result to a batch's.
    pub(super) fn to_batch(&self, results: &mut BatchResults, index: u32, verb: Opcode) {
        match self {
            Answer::Read(facts, values) => results.read(index, facts, values),
            Answer::Written(facts) => results.write(index, verb, Status::OK, facts),
            Answer::ConditionFalse(facts) => {
                results.write(index, verb, Status::CONDITION_FALSE, facts);
            }
            Answer::Failure(failure) => results.failure(index, verb, failure),
            Answer::Raw(status, body) => {
                results.raw(index, verb, *status, &body.side_by_side());
            }
        }
    }

    /// Status and body, for another shard to pass on. A long value's pieces are shared with it.
    pub(super) fn to_pieces(&self) -> (Status, Pieces) {
        match self {
            Answer::Read(facts, values) if response::read_size(facts, values) > FRAME_BODY_MAX => {
                (response::read_status(values), response::read_in_pieces(facts, values))
            }
            _ => {
                let (status, body) = self.to_bytes();
                (status, body.into())
            }
        }
    }

    /// Status and body, for another node to pass on.
    pub(super) fn to_bytes(&self) -> (Status, Vec<u8>) {
        let mut body = Vec::new();
        let status = match self {
            Answer::Read(facts, values) => {
                response::encode_read(&mut body, facts, values);
                response::read_status(values)
            }
            Answer::Written(facts) => {
                response::encode_write(&mut body, facts);
                Status::OK
            }
            Answer::ConditionFalse(facts) => {
                response::encode_write(&mut body, facts);
                Status::CONDITION_FALSE
            }
            Answer::Failure(failure) => {
                response::encode_failure(&mut body, failure);
                failure.status
            }
            Answer::Raw(status, bytes) => {
                bytes.copy_to(&mut body);
                *status
            }
        };
        (status, body)
    }
}
