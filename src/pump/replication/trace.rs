//! The steps of an operation over replicas, for `get --trace` and `put --trace`: who was asked for
//! what, who answered, after how many microseconds.
//!
//! Invariant: without the flag nothing is noted and nothing allocated. Answers that came after the
//! client's are not in it.

use annulus_cluster::NodeId;
use annulus_cluster::coordinator::OpId;
use annulus_engine::model::{Instant, RecordRef, Timestamp};
use annulus_net::wire::fields::OperationFlags;
use serde_json::{Value, json};

use super::Replication;

/// See the module.
#[derive(Debug)]
pub(super) struct Trace {
    began: Instant,
    steps: Vec<Value>,
}

impl Trace {
    /// One that begins now, if the request asks for it.
    pub(super) fn wanted(flags: OperationFlags, now: Instant) -> Option<Box<Trace>> {
        flags.has(OperationFlags::TRACE).then(|| Trace::begun(now))
    }

    pub(super) fn begun(began: Instant) -> Box<Trace> {
        Box::new(Trace { began, steps: Vec::new() })
    }

    fn micros(&self, now: Instant) -> u64 {
        now.nanos_since(self.began) / 1000
    }

    /// The write has its version, and is in this node's log.
    pub(super) fn stamped(&mut self, now: Instant, record: &RecordRef<'_>) {
        let step = json!({
            "step": "stamp",
            "node": record.dot.origin.0,
            "timestamp": record.timestamp.0,
            "sequence": record.dot.sequence,
            "microseconds": self.micros(now),
        });
        self.steps.push(step);
    }

    /// A node was asked for something; this one too.
    pub(super) fn asked(&mut self, now: Instant, node: NodeId, what: &str) {
        let micros = self.micros(now);
        self.steps.push(json!({
            "step": "ask", "node": node.0, "for": what, "microseconds": micros,
        }));
    }

    /// A node has the write.
    pub(super) fn acked(&mut self, now: Instant, node: NodeId, is_durable: bool) {
        let micros = self.micros(now);
        self.steps.push(json!({
            "step": "ack", "node": node.0, "durable": is_durable, "microseconds": micros,
        }));
    }

    /// A node has shown what it has.
    pub(super) fn replied(
        &mut self,
        now: Instant,
        node: NodeId,
        what: &str,
        as_of: Timestamp,
        found: Option<bool>,
    ) {
        let micros = self.micros(now);
        self.steps.push(json!({
            "step": "reply", "node": node.0, "with": what, "found": found,
            "as_of": as_of.0, "microseconds": micros,
        }));
    }

    /// A node has said that it cannot.
    pub(super) fn failed(&mut self, now: Instant, node: NodeId, why: &str) {
        let micros = self.micros(now);
        self.steps.push(json!({
            "step": why, "node": node.0, "microseconds": micros,
        }));
    }

    /// The document, when the client is answered.
    pub(super) fn end(mut self, now: Instant) -> String {
        let micros = self.micros(now);
        self.steps.push(json!({ "step": "answer", "microseconds": micros }));
        json!({ "steps": self.steps }).to_string()
    }
}

impl Replication {
    /// Notes a step of an operation whose client wants to know.
    pub(super) fn note(&mut self, op: OpId, note: impl FnOnce(&mut Trace)) {
        if let Some(operation) = self.coordinator.payload_mut(op)
            && let Some(trace) = &mut operation.trace
        {
            note(trace);
        }
    }
}
