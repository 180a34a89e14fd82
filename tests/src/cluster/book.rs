//! What the clients of a simulated cluster asked and were told: one history for each namespace.
//!
//! Invariant: a value's bytes follow from its number, so that a read can be traced to its write,
//! and a byte that is wrong anywhere in it is found here, before any checker.

use std::collections::BTreeMap;

use annulus_engine::model::{Instant, NamespaceId, Token};
use annulus_engine::sim::Chance;
use annulus_net::wire::fields::{Condition, Level, OperationFlags, Ttl};
use annulus_net::wire::operation::{Delete, Get, Operation, Put, WriteOptions};
use annulus_net::wire::response::{ReadReply, decode_failure, decode_write};
use annulus_net::wire::status::{Class, Status};

use crate::calls::{PlannedCall, Verb};
use crate::history::{
    Answer, Call, Event, EventId, Expect, History, Mark, Reading, Receipt, Rules, Seen, ValueId,
};
use crate::workload::HASH_SEED;

/// A call that was made and not answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingCall {
    pub(super) namespace: NamespaceId,
    pub(super) key: u32,
    pub(super) event: EventId,
    pub(super) invoked: Instant,
    pub(super) is_read: bool,
}

/// A request that owns its bytes.
#[derive(Debug)]
pub(super) struct OwnedRequest {
    namespace: NamespaceId,
    key: Vec<u8>,
    verb: Verb,
    value: Vec<u8>,
    ttl_ms: u64,
    level: Level,
    primary: Level,
    flags: OperationFlags,
    condition: Condition,
    context: Option<Vec<u8>>,
}

impl OwnedRequest {
    pub(super) fn operation(&self) -> Operation<'_> {
        let (namespace, key) = (self.namespace, self.key.as_slice());
        let token = Token::of_key(key, HASH_SEED);
        let options = WriteOptions {
            level: self.level,
            primary: self.primary,
            durable: Level::Default,
            condition: self.condition,
            context: self.context.as_deref(),
            once: None,
            flags: self.flags,
        };
        match self.verb {
            Verb::Get => Operation::Get(Get {
                token,
                namespace,
                key,
                level: self.level,
                primary: self.primary,
                max_staleness_ms: 0,
                flags: self.flags,
            }),
            Verb::Put | Verb::PutIfAbsent | Verb::PutIfVersion => {
                let ttl = if self.ttl_ms > 0 { Ttl::Millis(self.ttl_ms) } else { Ttl::Never };
                Operation::Put(Put {
                    token,
                    namespace,
                    key,
                    value: (&self.value).into(),
                    ttl,
                    options,
                })
            }
            Verb::Delete => Operation::Delete(Delete { token, namespace, key, options }),
        }
    }
}

/// The name of a key.
pub(super) fn key_name(key: u32) -> Vec<u8> {
    format!("key-{key:03}").into_bytes()
}

/// The bytes of a value: its number, and as many more as follow from it.
pub(super) fn value_bytes(value: ValueId) -> Vec<u8> {
    let mut chance = Chance::new(value ^ 0x7A1E);
    let size = match chance.below(40) {
        0 => chance.index(6_000),
        1..=5 => 0,
        _ => chance.index(200),
    };
    // Eight more at least, by which the number is known to be right.
    let mut bytes = vec![0; 16 + size];
    chance.fill(&mut bytes[8..]);
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// The value with these bytes.
pub(super) fn value_of(bytes: &[u8]) -> Result<ValueId, String> {
    let number = bytes.first_chunk::<8>().map(|bytes| ValueId::from_le_bytes(*bytes));
    match number {
        Some(number) if value_bytes(number) == bytes => Ok(number),
        _ => Err(format!("{} bytes that nobody wrote", bytes.len())),
    }
}

/// All histories of a run.
#[derive(Debug, Default)]
pub(super) struct Book {
    histories: BTreeMap<NamespaceId, History>,
    next_value: ValueId,
    /// The versions that reads showed last, for conditional writes.
    shown: BTreeMap<(NamespaceId, u32), annulus_net::wire::fields::Version>,
    /// What was wrong with an answer's bytes.
    pub(super) wrong: Vec<String>,
    /// Answers by status, to see what a run was made of.
    pub(super) answers: BTreeMap<Status, u64>,
}

impl Book {
    pub(super) fn add_namespace(&mut self, namespace: NamespaceId, rules: Rules) {
        self.histories.insert(namespace, History::new(rules));
    }

    pub(super) fn histories(&self) -> impl Iterator<Item = (NamespaceId, &History)> {
        self.histories.iter().map(|(namespace, history)| (*namespace, history))
    }

    pub(super) fn mark(&mut self, mark: Mark) {
        self.histories.values_mut().for_each(|history| history.marks.push(mark));
    }

    pub(super) fn note_skew(&mut self, skew_us: u64) {
        for history in self.histories.values_mut() {
            history.rules.skew_us = history.rules.skew_us.max(skew_us);
        }
    }

    /// A client makes a call.
    pub(super) fn begin(
        &mut self,
        now: Instant,
        client: u32,
        node: u32,
        plan: &PlannedCall,
        context: Option<(EventId, Vec<u8>)>,
    ) -> (PendingCall, OwnedRequest) {
        let place = (plan.namespace, plan.key);
        let (after, context) = context.unzip();
        let (expect, condition) = match plan.verb {
            Verb::PutIfAbsent => (Expect::Absent, Condition::IfAbsent),
            Verb::PutIfVersion => {
                let version = self.shown.get(&place).copied().unwrap_or_default();
                (Expect::Version(version), Condition::IfVersion(version))
            }
            Verb::Get | Verb::Put | Verb::Delete => (Expect::Always, Condition::Always),
        };
        let call = match plan.verb {
            Verb::Get => Call::Get,
            Verb::Delete => Call::Delete { after, expect },
            Verb::Put | Verb::PutIfAbsent | Verb::PutIfVersion => {
                self.next_value += 1;
                Call::Put { value: self.next_value, ttl_ms: plan.ttl_ms, after, expect }
            }
        };
        let value = match call {
            Call::Put { value, .. } => value_bytes(value),
            Call::Get | Call::Delete { .. } => Vec::new(),
        };
        let history = self.histories.get_mut(&plan.namespace).expect("a namespace of the run");
        let event = history.push(Event {
            client,
            key: plan.key,
            node,
            invoked: now.0,
            // Until it is answered.
            returned: u64::MAX,
            call,
            answer: Answer::Perhaps,
        });
        let request = OwnedRequest {
            namespace: plan.namespace,
            key: key_name(plan.key),
            verb: plan.verb,
            value,
            ttl_ms: plan.ttl_ms,
            level: plan.level,
            primary: plan.primary,
            flags: plan.flags,
            condition,
            context,
        };
        let is_read = plan.verb == Verb::Get;
        let (namespace, key) = place;
        (PendingCall { namespace, key, event, invoked: now, is_read }, request)
    }

    fn settle(&mut self, call: &PendingCall, now: Instant, answer: Answer) {
        let history = self.histories.get_mut(&call.namespace).expect("a namespace of the run");
        let event = &mut history.events[call.event];
        (event.returned, event.answer) = (now.0, answer);
    }

    /// It was never sent.
    pub(super) fn refused(&mut self, call: &PendingCall, now: Instant) {
        self.settle(call, now, Answer::NotStarted);
    }

    /// No answer will come.
    pub(super) fn lost(&mut self, call: &PendingCall, now: Instant) {
        self.settle(call, now, Answer::Perhaps);
    }

    /// The answer came. The context in it, if there is one.
    pub(super) fn end(
        &mut self,
        call: &PendingCall,
        now: Instant,
        status: Status,
        body: &[u8],
    ) -> Option<Vec<u8>> {
        *self.answers.entry(status).or_default() += 1;
        let (answer, context) = match status.class() {
            Class::Answered if call.is_read => self.reading(call, body),
            Class::Answered => written(status, body).unwrap_or_else(|wrong| {
                self.wrong.push(wrong);
                (Answer::Perhaps, Vec::new())
            }),
            Class::Refused | Class::NotStarted => (Answer::NotStarted, Vec::new()),
            Class::MayBeApplied => (Answer::Perhaps, Vec::new()),
        };
        let rules = self.histories[&call.namespace].rules;
        // A node whose clock is behind refuses contexts of one whose clock is ahead.
        let clocks_agree = 2 * rules.skew_us <= rules.max_offset_us;
        if [Status::CORRUPT, Status::BAD_CONTEXT].contains(&status)
            || (status == Status::BAD_REQUEST && clocks_agree)
        {
            let message = decode_failure(status, body).map_or("?", |failure| failure.message);
            self.wrong.push(format!("key {}: {status}: {message}", call.key));
        }
        self.settle(call, now, answer);
        (!context.is_empty()).then_some(context)
    }

    fn reading(&mut self, call: &PendingCall, body: &[u8]) -> (Answer, Vec<u8>) {
        let reply = match ReadReply::decode(body) {
            Ok(reply) => reply,
            Err(malformed) => {
                self.wrong.push(format!("key {}: {malformed}", call.key));
                return (Answer::Perhaps, Vec::new());
            }
        };
        let mut values = Vec::new();
        for shown in &reply.values {
            match value_of(&shown.value.side_by_side()) {
                Ok(value) => {
                    values.push(Seen { version: shown.version, value, expiry_ms: shown.expiry_ms })
                }
                Err(wrong) => self.wrong.push(format!("key {}: {wrong}", call.key)),
            }
        }
        if let Some(newest) = values.iter().max() {
            self.shown.insert((call.namespace, call.key), newest.version);
        }
        let facts = reply.facts;
        let reading = Reading {
            values,
            as_of: facts.as_of,
            answers: facts.answers,
            primaries: facts.primaries,
        };
        (Answer::Values(reading), facts.context.to_vec())
    }
}

fn written(status: Status, body: &[u8]) -> Result<(Answer, Vec<u8>), String> {
    let facts = decode_write(body).map_err(|malformed| malformed.to_string())?;
    if status == Status::CONDITION_FALSE {
        return Ok((Answer::ConditionFalse, Vec::new()));
    }
    let receipt = Receipt {
        version: facts.version,
        acks: facts.acks,
        primary: facts.primary,
        durable: facts.durable,
    };
    Ok((Answer::Written(receipt), facts.context.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_known_by_its_bytes_and_a_wrong_byte_is_found() {
        for value in 1..300 {
            let mut bytes = value_bytes(value);
            assert_eq!(value_of(&bytes), Ok(value));
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            assert!(value_of(&bytes).is_err());
            bytes.pop();
            assert!(value_of(&bytes).is_err());
        }
        assert!(value_of(b"short").is_err());
    }
}
