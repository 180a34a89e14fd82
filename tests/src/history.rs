//! Histories: what clients asked and were told, and what befell the nodes. All that checkers read.
//!
//! Invariant: a history is plain data in the order of invocation, from one namespace of one run;
//! times are true virtual time in nanoseconds, whatever the nodes' clocks said. Every value is
//! written at most once, so a value names its write. The client's view only: nothing in here is
//! taken from a node's inside, except the marks of a mishap and of convergence.

use annulus_engine::model::{OriginId, Timestamp};
use annulus_net::wire::fields::Version;

/// Which event of a history.
pub type EventId = usize;

/// A value: the number that its writer gave it. Never used twice.
pub type ValueId = u64;

/// What the namespace does with versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The greatest version wins.
    Lww,
    /// Concurrent values are all kept.
    Siblings,
    /// Each key is a linearizable register.
    Register,
}

/// What the run promises, so that checkers know what to expect.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Of the namespace.
    pub mode: Mode,
    /// Copies of each key.
    pub replicas: u8,
    /// Furthest that any node's wall clock was from true time, in microseconds.
    pub skew_us: u64,
    /// Furthest ahead that a node accepts stamps, in microseconds.
    pub max_offset_us: u64,
    /// True wall time at time zero, in microseconds since 2024-01-01.
    pub wall_at_zero_us: u64,
    /// Longest time from an acknowledgement that is not durable to its sync, in nanoseconds.
    pub window_nanos: u64,
    /// Furthest that stamps of a right node run ahead of its wall clock, in microseconds: after a
    /// restart they begin above all that it can have used before.
    pub ahead_us: u64,
}

impl Rules {
    /// Three replicas with good clocks that sync before they answer.
    #[must_use]
    pub fn of(mode: Mode) -> Rules {
        Rules {
            mode,
            replicas: 3,
            skew_us: 0,
            max_offset_us: 500_000,
            wall_at_zero_us: 1_000_000_000,
            window_nanos: 0,
            ahead_us: 2_500_000,
        }
    }

    /// True wall time at a time of the history, in microseconds.
    #[must_use]
    pub fn wall_us(&self, nanos: u64) -> u64 {
        self.wall_at_zero_us + nanos / 1000
    }
}

/// What must hold for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Expect {
    /// Nothing.
    #[default]
    Always,
    /// The key has no live value.
    Absent,
    /// The live value is of this version.
    Version(Version),
}

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Read the key.
    Get,
    /// Write a value.
    Put {
        /// The value.
        value: ValueId,
        /// How long it lives, in milliseconds; 0 is for ever.
        ttl_ms: u64,
        /// The event whose answer's context was given.
        after: Option<EventId>,
        /// On what condition.
        expect: Expect,
    },
    /// Delete the key.
    Delete {
        /// The event whose answer's context was given.
        after: Option<EventId>,
        /// On what condition.
        expect: Expect,
    },
}

impl Call {
    /// A put without options.
    #[must_use]
    pub fn put(value: ValueId) -> Call {
        Call::Put { value, ttl_ms: 0, after: None, expect: Expect::Always }
    }

    /// The event whose context was given.
    #[must_use]
    pub fn after(&self) -> Option<EventId> {
        match self {
            Call::Get => None,
            Call::Put { after, .. } | Call::Delete { after, .. } => *after,
        }
    }

    /// On what condition it was to happen.
    #[must_use]
    pub fn expect(&self) -> Expect {
        match self {
            Call::Get => Expect::Always,
            Call::Put { expect, .. } | Call::Delete { expect, .. } => *expect,
        }
    }
}

/// One live value that a read showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    /// Of which write.
    pub version: Version,
    /// The value.
    pub value: ValueId,
    /// From when it is gone, in milliseconds since 2024-01-01; 0 is never.
    pub expiry_ms: u64,
}

/// What a read showed.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Reading {
    /// The live values; none when absent.
    pub values: Vec<Seen>,
    /// Every write at or below it is said to be in the answer; zero when nothing is said.
    pub as_of: Timestamp,
    /// Replicas that answered.
    pub answers: u8,
    /// Of them, home replicas.
    pub primaries: u8,
}

impl Reading {
    /// The value that last-write-wins shows.
    #[must_use]
    pub fn winner(&self) -> Option<&Seen> {
        self.values.iter().max()
    }

    /// Whether a value of this version is shown.
    #[must_use]
    pub fn shows(&self, version: Version) -> bool {
        self.values.iter().any(|seen| seen.version == version)
    }
}

/// What an acknowledged write was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Receipt {
    /// Of the write.
    pub version: Version,
    /// Nodes that have it.
    pub acks: u8,
    /// Of them, home replicas.
    pub primary: u8,
    /// Of them, with the write synced.
    pub durable: u8,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A read's values.
    Values(Reading),
    /// The write is done.
    Written(Receipt),
    /// The condition was false.
    ConditionFalse,
    /// It never happened and never will. A read: no answer.
    NotStarted,
    /// A write: it happens once or not at all; also when no answer came. A read: no answer.
    Perhaps,
}

/// One call of one client.
#[derive(Clone, Debug)]
pub struct Event {
    /// Whose. A client has one call of a key at a time.
    pub client: u32,
    /// Of which key.
    pub key: u32,
    /// Which node was asked.
    pub node: u32,
    /// When it was asked.
    pub invoked: u64,
    /// When it was answered, or given up.
    pub returned: u64,
    /// What was asked.
    pub call: Call,
    /// What was answered.
    pub answer: Answer,
}

impl Event {
    /// What it showed, if it is a read that was answered.
    #[must_use]
    pub fn reading(&self) -> Option<&Reading> {
        match &self.answer {
            Answer::Values(reading) => Some(reading),
            _ => None,
        }
    }

    /// What it was worth, if it is a write that was acknowledged.
    #[must_use]
    pub fn receipt(&self) -> Option<&Receipt> {
        match &self.answer {
            Answer::Written(receipt) => Some(receipt),
            _ => None,
        }
    }

    /// Whether it is a write that took effect, or may have.
    #[must_use]
    pub fn may_have_written(&self) -> bool {
        self.call != Call::Get && matches!(self.answer, Answer::Written(_) | Answer::Perhaps)
    }
}

/// The origin in the dots of a node's writes.
#[must_use]
pub fn origin_of(node: u32) -> OriginId {
    OriginId(node + 1)
}

/// What befell the nodes, as far as promises depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// A node lost what was not synced: its process or its power ended.
    Crashed {
        /// Which.
        node: u32,
        /// When.
        at: u64,
    },
    /// A node stood still, or its disk did, so that what had to be synced was not.
    Stood {
        /// Which.
        node: u32,
        /// Since when.
        from: u64,
        /// Until when.
        until: u64,
    },
    /// A node lost its disks for ever.
    DiskLost {
        /// Which.
        node: u32,
        /// When.
        at: u64,
    },
    /// All replicas held the same, and no write was under way.
    Converged {
        /// When.
        at: u64,
    },
}

/// A run, as seen from outside.
#[derive(Clone, Debug)]
pub struct History {
    /// What it promises.
    pub rules: Rules,
    /// Calls in the order of invocation.
    pub events: Vec<Event>,
    /// In the order of time.
    pub marks: Vec<Mark>,
}

impl History {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(rules: Rules) -> History {
        History { rules, events: Vec::new(), marks: Vec::new() }
    }

    /// Adds a call; its answer may be put in later.
    pub fn push(&mut self, event: Event) -> EventId {
        debug_assert!(self.events.last().is_none_or(|last| last.invoked <= event.invoked));
        self.events.push(event);
        self.events.len() - 1
    }

    /// Events with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (EventId, &Event)> {
        self.events.iter().enumerate()
    }

    /// Reads that were answered.
    pub fn readings(&self) -> impl Iterator<Item = (EventId, &Event, &Reading)> {
        self.iter().filter_map(|(id, event)| Some((id, event, event.reading()?)))
    }

    /// The latest time not after `time` at which all replicas held the same.
    #[must_use]
    pub fn converged_before(&self, time: u64) -> Option<u64> {
        let converged = self.marks.iter().filter_map(|mark| match mark {
            Mark::Converged { at } if *at <= time => Some(*at),
            _ => None,
        });
        converged.max()
    }
}
