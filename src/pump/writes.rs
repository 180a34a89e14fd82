//! Writes between the log and their answers.
//!
//! Invariant: answers leave in the order of the log. A write is answered as done when it is
//! visible and its throttle has passed, or as `MAY_BE_APPLIED` when its deadline passes or the
//! log is poisoned first; whatever comes first, once.

use std::collections::VecDeque;

use annulus_engine::disk::Disk;
use annulus_engine::log::Lsn;
use annulus_engine::model::Instant;
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::Applied;
use annulus_net::wire::fields::Version;
use annulus_net::wire::response::{Failure, WriteFacts};
use annulus_net::wire::status::Status;

use super::admission::Place;
use super::{Answer, Origin, Pump, Wires};

/// One write that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) applied: Applied,
    pub(super) deadline: Instant,
    /// Not answered before: slows writers down when compaction is behind.
    pub(super) not_before: Instant,
    pub(super) began: Instant,
    pub(super) bytes: usize,
    pub(super) is_put: bool,
    /// Taken when it was answered before its turn.
    pub(super) origin: Option<Origin>,
    pub(super) trace: bool,
}

/// Writes in the order of the log.
#[derive(Debug, Default)]
pub(super) struct WriteQueue {
    waiting: VecDeque<Waiting>,
}

impl WriteQueue {
    pub(super) fn push(&mut self, waiting: Waiting) {
        debug_assert!(
            self.waiting.back().is_none_or(|last| last.applied.lsn < waiting.applied.lsn)
        );
        self.waiting.push_back(waiting);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// When the first answer may leave, if only the throttle holds it back.
    pub(super) fn held_until(&self, visible: Lsn) -> Option<Instant> {
        let front = self.waiting.front()?;
        (front.applied.lsn <= visible).then_some(front.not_before)
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Answers the writes that have become visible.
    pub(super) fn answer_writes(&mut self, wires: &mut dyn Wires) -> bool {
        if self.writes.is_empty() {
            return false;
        }
        let visible = self.shard.visible();
        let mut worked = false;
        while let Some(front) = self.writes.waiting.front() {
            if front.applied.lsn > visible || front.not_before > self.now {
                break;
            }
            let Some(waiting) = self.writes.waiting.pop_front() else { break };
            let Waiting { applied, began, bytes, is_put, origin, trace, .. } = waiting;
            worked = true;
            self.admission.came_through(Place::Log, self.now.nanos_since(began));
            self.count_write(began, bytes, is_put);
            let Some(origin) = origin else { continue };
            let trace = if trace { self.trace_of_write(&applied, began) } else { String::new() };
            let facts = self.write_facts(&applied, &[], trace.as_bytes());
            self.answer(origin, &Answer::Written(facts), wires);
        }
        if !self.writes.is_empty()
            && let Some(error) = self.shard.poisoned()
        {
            worked = true;
            self.abandon_writes(wires, &error.to_string());
        }
        worked
    }

    pub(super) fn count_write(&mut self, began: Instant, bytes: usize, is_put: bool) {
        let metrics = &mut *self.metrics.borrow_mut();
        metrics.write_latency.record(self.now.nanos_since(began));
        metrics.counters.user_write_bytes += bytes as u64;
        if is_put {
            metrics.counters.puts += 1;
        } else {
            metrics.counters.deletes += 1;
        }
    }

    /// What a write on this node alone is worth.
    pub(super) fn write_facts<'a>(
        &self,
        applied: &Applied,
        context: &'a [u8],
        trace: &'a [u8],
    ) -> WriteFacts<'a> {
        let window_ms = self.shard.durability_window_ms();
        WriteFacts {
            version: Version { timestamp: applied.timestamp, dot: applied.dot },
            acks: 1,
            primary: 1,
            durable: u8::from(window_ms == 0),
            window_ms,
            context,
            trace,
        }
    }

    fn trace_of_write(&self, applied: &Applied, began: Instant) -> String {
        let window = self.shard.durability_window_ms();
        serde_json::json!({ "steps": [
            { "step": "stamp", "timestamp": applied.timestamp.0, "sequence": applied.dot.sequence },
            { "step": "log", "record": applied.lsn.0,
              "synced": window == 0, "sync_window_ms": window },
            { "step": "memtable" },
            { "step": "answer", "microseconds": self.now.nanos_since(began) / 1000 },
        ]})
        .to_string()
    }

    pub(super) fn abandon_writes(&mut self, wires: &mut dyn Wires, message: &str) {
        for waiting in std::mem::take(&mut self.writes.waiting) {
            if let Some(origin) = waiting.origin {
                let failure = Failure::new(Status::MAY_BE_APPLIED, message);
                self.answer(origin, &Answer::Failure(failure), wires);
            }
        }
    }

    /// Answers writes whose deadline has passed; they keep their place, for the count.
    pub(super) fn expire_writes(&mut self, wires: &mut dyn Wires) -> bool {
        let now = self.now;
        let expired: Vec<Origin> = self
            .writes
            .waiting
            .iter_mut()
            .filter(|waiting| waiting.deadline <= now)
            .filter_map(|waiting| waiting.origin.take())
            .collect();
        let any = !expired.is_empty();
        for origin in expired {
            let message = "the deadline passed while the write waited for the disk";
            let failure = Failure::new(Status::MAY_BE_APPLIED, message);
            self.answer(origin, &Answer::Failure(failure), wires);
        }
        any
    }
}
