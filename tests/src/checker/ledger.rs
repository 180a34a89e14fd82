//! The writes of each key, with all that the history tells about them from any side.
//!
//! Invariant: holds every write that may have happened and none that certainly did not; a
//! version is known from the write's own answer, or from any read that showed its value.

use std::collections::BTreeMap;

use annulus_net::wire::fields::Version;

use crate::history::{Answer, Call, EventId, History, Receipt, ValueId};

/// One write of a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write {
    pub(super) id: EventId,
    pub(super) invoked: u64,
    /// When it was acknowledged; `None` if it never was.
    pub(super) acked: Option<u64>,
    /// `None`: a delete.
    pub(super) value: Option<ValueId>,
    pub(super) ttl_ms: u64,
    pub(super) after: Option<EventId>,
    /// If anybody ever learnt it.
    pub(super) version: Option<Version>,
    pub(super) receipt: Option<Receipt>,
}

/// All writes, by key.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    writes: BTreeMap<u32, Vec<Write>>,
}

impl Ledger {
    pub(super) fn of(history: &History) -> Ledger {
        let mut shown: BTreeMap<ValueId, Version> = BTreeMap::new();
        for (_, _, reading) in history.readings() {
            shown.extend(reading.values.iter().map(|seen| (seen.value, seen.version)));
        }
        let mut ledger = Ledger::default();
        for (id, event) in history.iter().filter(|(_, event)| event.may_have_written()) {
            let (value, ttl_ms) = match event.call {
                Call::Put { value, ttl_ms, .. } => (Some(value), ttl_ms),
                Call::Delete { .. } | Call::Get => (None, 0),
            };
            let receipt = event.receipt().copied();
            let learnt = value.and_then(|value| shown.get(&value).copied());
            ledger.writes.entry(event.key).or_default().push(Write {
                id,
                invoked: event.invoked,
                acked: matches!(event.answer, Answer::Written(_)).then_some(event.returned),
                value,
                ttl_ms,
                after: event.call.after(),
                version: receipt.map(|receipt| receipt.version).or(learnt),
                receipt,
            });
        }
        ledger
    }

    /// The writes of a key, in the order of invocation.
    pub(super) fn of_key(&self, key: u32) -> &[Write] {
        self.writes.get(&key).map_or(&[], Vec::as_slice)
    }
}

impl Write {
    /// Whether it may have left the key without a value by `returned`: a delete, or a value whose
    /// time may be over.
    pub(super) fn may_read_as_absent(&self, history: &History, returned: u64) -> bool {
        self.value.is_none() || self.may_have_expired(history, returned)
    }

    /// Whether a node could hold its value to be expired before `returned`.
    pub(super) fn may_have_expired(&self, history: &History, returned: u64) -> bool {
        let rules = &history.rules;
        let slack_us = rules.max_offset_us + 2 * rules.skew_us;
        let earliest_us = rules.wall_us(self.invoked) + self.ttl_ms * 1000;
        self.ttl_ms > 0 && earliest_us <= rules.wall_us(returned) + slack_us
    }
}
