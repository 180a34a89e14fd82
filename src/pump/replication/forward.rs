//! Requests for keys whose homes are other nodes: handed on to one of them, answered back.
//!
//! Invariant: a request is handed on at most [`FORWARD_HOPS_MAX`] times, so disagreement about
//! the homes ends in an answer; what was handed on is answered by the other node, or by its
//! deadline as one that may be applied.

use annulus_cluster::NodeId;
use annulus_cluster::message::{FORWARD_HOPS_MAX, PeerMessage};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::disk::Disk;
use annulus_engine::model::{Instant, PartitionId, Value};
use annulus_engine::runtime::Runtime;
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::response::Failure;
use annulus_net::wire::scan::Scan;
use annulus_net::wire::status::Status;

use crate::pump::{Answer, Lane, Origin, Pump, Wires};

/// Most requests that one shard has handed on and not got back.
const FORWARDED_MAX: usize = 16_384;
/// How much longer than its deadline a request is remembered, in nanoseconds.
const GRACE_NANOS: u64 = 50_000_000;

/// A request that another node carries out.
#[derive(Debug)]
pub(super) struct Forwarded {
    origin: Origin,
    deadline: Instant,
    to: NodeId,
    is_read: bool,
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Hands a request on to a node.
    ///
    /// # Errors
    /// The origin, when it cannot be handed on.
    pub(super) fn forward(
        &mut self,
        to: NodeId,
        partition: PartitionId,
        (opcode, hops): (Opcode, u8),
        body: &[u8],
        deadline: Instant,
        origin: Origin,
    ) -> Result<(), Origin> {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return Err(origin) };
        let Some(target) = replication.peer_shard(to, partition) else { return Err(origin) };
        if replication.forwarded.len() >= FORWARDED_MAX || hops >= FORWARD_HOPS_MAX {
            return Err(origin);
        }
        let id = replication.next_id();
        let is_read = matches!(opcode, Opcode::Get | Opcode::Scan);
        replication.forwarded.insert(id, Forwarded { origin, deadline, to, is_read });
        let message = PeerMessage::Forward {
            id,
            deadline_us: micros_until(now, deadline),
            opcode: opcode.request(),
            hops: hops + 1,
            body,
        };
        replication.post(target, Lane::Foreground, &message);
        Ok(())
    }

    /// Hands a scan on to a home of its first partition, whoever answers soonest.
    pub(in crate::pump) fn scan_elsewhere(
        &mut self,
        origin: Origin,
        deadline: Instant,
        hops: u8,
        scan: &Scan<'_>,
    ) {
        let partition = scan.range.first.partition(self.map.partition_bits());
        let n = self.catalogue.get(scan.namespace).map_or(1, |namespace| namespace.n);
        let Some(replication) = &mut self.replication else { return };
        let topology = std::rc::Rc::clone(&replication.topology);
        let mut order = topology.replicas(partition, n).to_vec();
        let health = replication.coordinator.health();
        health.order(self.now, &mut order);
        let Some(home) = order.iter().copied().find(|home| health.is_healthy(*home)) else {
            let what = "no home of that part of the ring can be reached";
            return self.refuse_later(origin, Status::UNAVAILABLE, what);
        };
        let mut body = Vec::with_capacity(scan.size());
        scan.encode(&mut body);
        let how = (Opcode::Scan, hops);
        if let Err(origin) = self.forward(home, partition, how, &body, deadline, origin) {
            self.refuse_later(origin, Status::BUSY, "the home of that part of the ring is busy");
        }
    }

    /// Another node has carried out a request.
    pub(super) fn forward_done(
        &mut self,
        id: u64,
        status: u16,
        body: &[u8],
        wires: &mut dyn Wires,
    ) {
        let Some(replication) = &mut self.replication else { return };
        if let Some(forwarded) = replication.forwarded.remove(&id) {
            self.answer(forwarded.origin, &Answer::Raw(Status(status), Value::Whole(body)), wires);
        }
    }

    /// Answers the node that handed a request on to this one.
    pub(in crate::pump) fn answer_forwarded(
        &mut self,
        from: PeerShard,
        id: u64,
        status: Status,
        body: &[u8],
    ) {
        let done = PeerMessage::ForwardDone { id, status: status.0, body };
        self.post(from, Lane::Foreground, &done);
    }

    /// Answers requests that were handed on and whose time is over, or whose node is gone.
    pub(super) fn expire_forwards(&mut self, gone: Option<NodeId>, wires: &mut dyn Wires) -> bool {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return false };
        let late = |forwarded: &Forwarded| {
            Some(forwarded.to) == gone || forwarded.deadline.after_nanos(GRACE_NANOS) <= now
        };
        let late: Vec<Forwarded> =
            replication.forwarded.extract_if(.., |_, it| late(it)).map(|(_, it)| it).collect();
        let any = !late.is_empty();
        for Forwarded { origin, is_read, .. } in late {
            let status = if is_read { Status::UNAVAILABLE } else { Status::MAY_BE_APPLIED };
            let failure = Failure::new(status, "the node that has the key did not answer");
            self.answer(origin, &Answer::Failure(failure), wires);
        }
        any
    }
}

/// Microseconds that are left; at least one, because none means the default.
pub(super) fn micros_until(now: Instant, deadline: Instant) -> u32 {
    u32::try_from(deadline.nanos_since(now) / 1000).unwrap_or(u32::MAX).max(1)
}
