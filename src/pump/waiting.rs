//! Who waits for a task: found by the task's number, given up at the deadline.
//!
//! Invariant: an origin is taken once, by the task's end or by its deadline, so that it gets one
//! answer however long the disk takes.

use std::collections::BTreeMap;

use annulus_engine::disk::Disk;
use annulus_engine::model::Instant;
use annulus_engine::runtime::Runtime;
use annulus_net::wire::response::Failure;
use annulus_net::wire::status::Status;

use super::{Answer, Origin, Pump, Wires};

/// One that waits.
#[derive(Debug)]
struct Entry {
    origin: Origin,
    deadline: Instant,
    /// What to answer when the deadline passes.
    late: Status,
}

/// All that wait for tasks.
#[derive(Debug, Default)]
pub(super) struct WaitingTasks {
    entries: BTreeMap<u64, Entry>,
    next: u64,
}

impl WaitingTasks {
    /// Remembers who waits; the number goes with the task.
    pub(super) fn add(&mut self, origin: Origin, deadline: Instant, late: Status) -> u64 {
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, Entry { origin, deadline, late });
        id
    }

    /// Tasks from this number on have not begun.
    pub(super) fn next_id(&self) -> u64 {
        self.next
    }

    /// The oldest task that somebody waits for.
    pub(super) fn first_id(&self) -> Option<u64> {
        self.entries.keys().next().copied()
    }

    /// Who waits for the task, unless the deadline came first.
    pub(super) fn take(&mut self, id: u64) -> Option<Origin> {
        self.entries.remove(&id).map(|entry| entry.origin)
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Answers those whose deadline has passed. Their tasks go on; nobody listens.
    pub(super) fn expire_tasks(&mut self, wires: &mut dyn Wires) -> bool {
        let now = self.now;
        let late = self.waiting.entries.extract_if(.., |_, entry| entry.deadline <= now);
        let late: Vec<Entry> = late.map(|(_, entry)| entry).collect();
        let any = !late.is_empty();
        for Entry { origin, late, .. } in late {
            let failure = Failure::new(late, "the deadline passed while the disk was waited for");
            self.answer(origin, &Answer::Failure(failure), wires);
        }
        any
    }
}
