//! Requests for keys of other shards: handed over once, answered back.
//!
//! Invariant: a message is never handed on a second time; a request that was handed over is
//! answered by the other shard, or by its deadline.

use std::sync::Arc;

use annulus_cluster::membership::MemberView;
use annulus_cluster::tracking::PeerShard;
use annulus_engine::disk::Disk;
use annulus_engine::model::{Instant, PartitionId, Pieces, Token};
use annulus_engine::runtime::Runtime;
use annulus_net::wire::codec::Reader;
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::operation::Operation;
use annulus_net::wire::request::Request;
use annulus_net::wire::response::Failure;
use annulus_net::wire::scan::Scan;
use annulus_net::wire::status::Status;

use super::replication::MovesReport;
use super::{Answer, Origin, Peers, Pump, Wires};

/// Most requests that one shard may have handed over and not got back.
pub(super) const FORWARDED_MAX: usize = 16_384;
/// How much longer than its deadline a handed-over request is remembered, in nanoseconds.
const GRACE_NANOS: u64 = 50_000_000;

/// Who serves which partition: equal runs of partitions, one a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardMap {
    own: u32,
    count: u32,
    partition_bits: u32,
}

impl ShardMap {
    /// The map of shard `own` of `count` on a ring of `2^partition_bits`.
    #[must_use]
    pub fn new(own: u32, count: u32, partition_bits: u32) -> ShardMap {
        debug_assert!(own < count);
        ShardMap { own, count, partition_bits }
    }

    /// This shard.
    #[must_use]
    pub fn own(&self) -> u32 {
        self.own
    }

    /// Logarithm of the number of partitions.
    #[must_use]
    pub fn partition_bits(&self) -> u32 {
        self.partition_bits
    }

    /// How many shards there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The shard of a partition.
    #[inline]
    #[must_use]
    pub fn shard_of_partition(&self, partition: u32) -> u32 {
        let scaled = (u64::from(partition) * u64::from(self.count)) >> self.partition_bits;
        u32::try_from(scaled).expect("below the count")
    }

    /// The first partition of this shard.
    #[must_use]
    pub fn first_partition(&self) -> PartitionId {
        let first = (u64::from(self.own) << self.partition_bits).div_ceil(u64::from(self.count));
        PartitionId(u32::try_from(first).expect("below the number of partitions"))
    }

    /// The shard of a token.
    #[inline]
    #[must_use]
    pub fn shard_of(&self, token: Token) -> u32 {
        if self.count == 1 {
            return 0;
        }
        self.shard_of_partition(token.partition(self.partition_bits).0)
    }

    /// The last token of the shard that holds `token`.
    #[must_use]
    pub fn last_token_of_shard(&self, token: Token) -> Token {
        let shard = self.shard_of(token);
        let partitions = 1u32 << self.partition_bits;
        let from = token.partition(self.partition_bits).0;
        let last = (from..partitions)
            .take_while(|partition| self.shard_of_partition(*partition) == shard)
            .last()
            .unwrap_or(from);
        PartitionId(last).range(self.partition_bits).last
    }
}

/// What shards of one node say to each other.
#[derive(Debug)]
pub enum Message {
    /// Carry this out and answer.
    Request {
        /// Who asks.
        from: u32,
        /// His number for it.
        id: u64,
        /// After it nobody waits.
        deadline: Instant,
        /// GET, PUT, DELETE or SCAN.
        opcode: Opcode,
        /// The request's body.
        body: Pieces,
    },
    /// The answer to a request.
    Answer {
        /// The asker's number.
        id: u64,
        /// Its status.
        status: Status,
        /// Its body.
        body: Pieces,
    },
    /// What the shard that speaks for the node believes of the members of its cluster.
    Members(Arc<[MemberView]>),
    /// How far a shard of this node is with the moves of partitions.
    Moving(u32, Box<MovesReport>),
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Hands a request to another shard.
    ///
    /// # Errors
    /// The origin, when too many are under way already.
    pub(super) fn hand_over(
        &mut self,
        shard: u32,
        opcode: Opcode,
        body: Pieces,
        deadline: Instant,
        origin: Origin,
    ) -> Result<(), Origin> {
        if self.forwarded.len() >= FORWARDED_MAX {
            return Err(origin);
        }
        let id = self.next_forward;
        self.next_forward += 1;
        self.forwarded.insert(id, (origin, deadline));
        self.metrics.borrow_mut().counters.hops_out += 1;
        let from = self.map.own();
        self.outbox.push((shard, Message::Request { from, id, deadline, opcode, body }));
        Ok(())
    }

    /// A message from another shard.
    pub fn message(&mut self, message: Message, wires: &mut dyn Wires) {
        match message {
            Message::Answer { id, status, body } => {
                if let Some((origin, _)) = self.forwarded.remove(&id) {
                    self.answer(origin, &Answer::Raw(status, body.value()), wires);
                }
            }
            Message::Request { from, id, deadline, opcode, body } => {
                self.metrics.borrow_mut().counters.hops_in += 1;
                let origin = Origin::Shard { shard: from, id };
                self.carry_out(origin, deadline, opcode, &body, wires);
            }
            Message::Members(views) => self.take_views(views),
            Message::Moving(shard, report) => {
                if let Some(own) = self.topology().map(annulus_cluster::Topology::own) {
                    self.take_report(PeerShard { node: own, shard }, *report);
                }
            }
        }
    }

    fn carry_out(
        &mut self,
        origin: Origin,
        deadline: Instant,
        opcode: Opcode,
        body: &Pieces,
        wires: &mut dyn Wires,
    ) {
        let context = self.facts.decode_context();
        let (head, value);
        let refusal = if opcode == Opcode::Scan {
            match Scan::decode(&body.value().side_by_side()) {
                Ok(scan) => return self.start_scan(origin, deadline, 0, &scan),
                Err(refusal) => refusal,
            }
        } else {
            let operation = match Request::value_of_put(opcode.request(), body, &context) {
                Some(at) => {
                    value = body.skip(at);
                    Operation::decode_put(&body.list()[0].bytes()[..at], &value, &context)
                }
                None => {
                    head = body.value().side_by_side();
                    Operation::decode(&mut Reader::new(&head), &context)
                }
            };
            match operation {
                Ok(operation) => return self.execute_later(origin, deadline, &operation, wires),
                Err(refusal) => refusal,
            }
        };
        self.answer(origin, &Answer::Failure(refusal.into()), wires);
    }

    /// Sends what was gathered; what finds an inbox full stays for the next turn.
    pub(super) fn send_messages(&mut self, wires: &mut dyn Wires, peers: &mut dyn Peers) -> bool {
        if self.outbox.is_empty() {
            return false;
        }
        let mut refused = Vec::new();
        for (shard, message) in std::mem::take(&mut self.outbox) {
            if let Err(message) = peers.send(shard, message) {
                refused.push((shard, message));
            }
        }
        let all = refused.is_empty();
        for (shard, message) in refused {
            match message {
                Message::Request { id, .. } => {
                    if let Some((origin, _)) = self.forwarded.remove(&id) {
                        let busy = Failure::new(Status::BUSY, "the key's shard is overloaded");
                        self.answer(origin, &Answer::Failure(busy.retry_after(5)), wires);
                    }
                }
                answer @ Message::Answer { .. } => self.outbox.push((shard, answer)),
                Message::Members(_) => self.views_refused(),
                // It is said again soon.
                Message::Moving(..) => {}
            }
        }
        all
    }

    /// Answers handed-over requests that are long past their deadline.
    pub(super) fn expire_forwarded(&mut self, wires: &mut dyn Wires) -> bool {
        let now = self.now;
        let expired: Vec<u64> = self
            .forwarded
            .iter()
            .filter(|(_, (_, deadline))| deadline.after_nanos(GRACE_NANOS) <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in &expired {
            if let Some((origin, _)) = self.forwarded.remove(id) {
                let message = "the key's shard did not answer within the deadline";
                let failure = Failure::new(Status::MAY_BE_APPLIED, message);
                self.answer(origin, &Answer::Failure(failure), wires);
            }
        }
        !expired.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_partition_has_one_shard_and_runs_are_whole() {
        for count in 1..=7 {
            let map = ShardMap::new(0, count, 8);
            let shards: Vec<u32> = (0..256).map(|p| map.shard_of_partition(p)).collect();
            assert!(shards.is_sorted());
            assert_eq!((shards[0], shards[255]), (0, count - 1));
            for own in 0..count {
                let first = ShardMap::new(own, count, 8).first_partition().0 as usize;
                assert_eq!(shards.iter().position(|shard| *shard == own), Some(first));
            }
            let last = map.last_token_of_shard(Token::MIN);
            assert_eq!(map.shard_of(last), 0);
            if last < Token::MAX {
                assert_eq!(map.shard_of(Token(last.0 + 1)), 1);
            }
        }
    }
}
