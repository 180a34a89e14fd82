//! The main thread's eye on the shards: tells when one takes no turns, and what a stop waits for.
//!
//! Invariant: it only looks, wakes and tells; nothing that a shard does depends on it.

use std::time::{Duration, Instant};

use super::node::Node;
use super::vitals::Vitals;

/// How often the shards are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row at which a shard had not turned since it was woken, before that is told. An
/// idle shard turns ten times a second; looks are counted and not seconds, so that a pause of the
/// whole process is not blamed on a shard.
const LOOKS: u32 = 2;
/// It is told again after so many further looks.
const LOOKS_AGAIN: u32 = 30;

/// Looks at each shard once a second.
pub(super) struct Watch {
    next: Instant,
    /// What each shard's clock showed at the last look, and the looks since it changed.
    seen: Vec<(u64, u32)>,
}

#[expect(clippy::disallowed_methods, reason = "the main thread's own time")]
fn now() -> Instant {
    Instant::now()
}

impl Watch {
    pub(super) fn new() -> Watch {
        Watch { next: now() + LOOK, seen: Vec::new() }
    }

    /// To be called often; does something once a second.
    pub(super) fn look(&mut self, node: &Node) {
        let now = now();
        if now < self.next {
            return;
        }
        self.next = now + LOOK;
        let mut stalled = false;
        for (shard, vitals) in node.vitals().iter().enumerate() {
            if self.seen.len() <= shard {
                self.seen.resize(shard + 1, (0, 0));
            }
            let (turned, looks) = &mut self.seen[shard];
            if vitals.turned() != *turned || !vitals.takes_turns() {
                (*turned, *looks) = (vitals.turned(), 0);
                if vitals.tell(false) {
                    tracing::warn!(shard, doing = %vitals, "the shard takes turns again");
                }
                continue;
            }
            *looks += 1;
            stalled = true;
            if *looks == LOOKS || *looks % LOOKS_AGAIN == 0 {
                vitals.tell(true);
                tracing::warn!(
                    shard,
                    seconds = *looks,
                    doing = %vitals,
                    "the shard has taken no turn though it was woken: its thread is held up, by \
                     the system or by work that does not give way"
                );
            }
        }
        if stalled {
            // What is only asleep turns now, and is seen to have at the next look.
            node.wake_all();
        }
    }
}

/// Tells what a stop waits for when it takes long.
pub(super) struct StopWatch {
    begun: Instant,
    limit: Duration,
    told: usize,
    woken: Instant,
}

/// When a stop tells what it waits for, besides its limit.
const TELL: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(6)];

impl StopWatch {
    pub(super) fn new(limit: Duration) -> StopWatch {
        let begun = now();
        StopWatch { begun, limit, told: 0, woken: begun }
    }

    /// To be called often. Returns whether there is time left.
    pub(super) fn look(&mut self, node: &Node) -> bool {
        let now = now();
        let took = now.duration_since(self.begun);
        if now.duration_since(self.woken) >= LOOK {
            // So that what is told is of now.
            self.woken = now;
            node.wake_all();
        }
        let due = TELL.iter().filter(|after| took >= **after).count();
        if due > self.told {
            self.told = due;
            tell_all(node, took);
        }
        if took >= self.limit {
            tell_all(node, took);
            return false;
        }
        true
    }
}

fn tell_all(node: &Node, took: Duration) {
    for (shard, vitals) in node.vitals().iter().enumerate() {
        let seconds = took.as_secs_f32();
        tracing::warn!(shard, seconds, doing = %vitals, "stopping takes long");
    }
}

/// What each of these shards is doing, in one line.
pub(super) fn describe(vitals: &[Vitals], shards: impl Iterator<Item = u32>) -> String {
    let line = |shard: u32| {
        let doing = vitals.get(shard as usize).map_or_else(String::new, ToString::to_string);
        format!("shard {shard} is {doing}")
    };
    shards.map(line).collect::<Vec<_>>().join("; ")
}
