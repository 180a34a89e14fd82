//! Seeded calls of a cluster's clients: few keys, several namespaces, all levels.
//!
//! Invariant: the same seed and mix give the same calls, whatever is answered. Every third key is
//! never deleted and never expires, so that checkers need no excuse for its absence.

use annulus_engine::model::NamespaceId;
use annulus_engine::sim::Chance;
use annulus_net::wire::fields::{Level, OperationFlags};

/// What is done to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is what its name says")]
pub enum Verb {
    Get,
    Put,
    Delete,
    PutIfAbsent,
    PutIfVersion,
}

/// One namespace of a mix.
#[derive(Clone, Debug)]
pub struct Target {
    /// The namespace.
    pub namespace: NamespaceId,
    /// How many keys it has.
    pub keys: u32,
    /// How often each [`Verb`] comes, in their order.
    pub weights: [u64; 5],
    /// One put in so many expires; 0 for none.
    pub ttl_one_in: u64,
}

/// Frequencies and levels.
#[derive(Clone, Debug)]
pub struct CallMix {
    /// Where to; each as likely as the others.
    pub targets: Vec<Target>,
    /// Levels of calls; each as likely as the others.
    pub levels: Vec<Level>,
    /// How many of those must be homes, of calls that do not ask for one.
    pub primary: Level,
    /// Flags of calls; each as likely as the others.
    pub flags: Vec<OperationFlags>,
    /// One write in so many gives the context that its client last got; 0 for none.
    pub context_one_in: u64,
    /// Whether contexts of writes' answers are kept as well as those of reads.
    pub contexts_of_writes: bool,
    /// Shortest and longest deadline, in milliseconds.
    pub deadline_ms: (u64, u64),
}

impl CallMix {
    /// A read of every key at every level.
    #[must_use]
    pub fn reads_of_all(&self) -> Vec<PlannedCall> {
        let mut reads = Vec::new();
        for target in &self.targets {
            for (key, level) in
                (0..target.keys).flat_map(|key| self.levels.iter().map(move |level| (key, level)))
            {
                reads.push(PlannedCall {
                    namespace: target.namespace,
                    key,
                    verb: Verb::Get,
                    ttl_ms: 0,
                    level: *level,
                    primary: Level::Default,
                    flags: OperationFlags::default(),
                    with_context: false,
                    deadline_ms: 5_000,
                });
            }
        }
        reads
    }
}

/// A call to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is documented where the wire has it")]
pub struct PlannedCall {
    pub namespace: NamespaceId,
    pub key: u32,
    pub verb: Verb,
    /// 0: for ever.
    pub ttl_ms: u64,
    pub level: Level,
    pub primary: Level,
    pub flags: OperationFlags,
    pub with_context: bool,
    pub deadline_ms: u64,
}

/// An endless sequence of calls.
#[derive(Clone, Debug)]
pub struct Calls {
    chance: Chance,
    mix: CallMix,
}

impl Calls {
    /// The calls of this seed.
    #[must_use]
    pub fn new(seed: u64, mix: CallMix) -> Calls {
        Calls { chance: Chance::new(seed ^ 0xCA11), mix }
    }

    /// What they are drawn from.
    #[must_use]
    pub fn mix(&self) -> &CallMix {
        &self.mix
    }

    /// The next call.
    pub fn draw(&mut self) -> PlannedCall {
        let chance = &mut self.chance;
        let target = &self.mix.targets[chance.index(self.mix.targets.len())];
        let key = u32::try_from(chance.below(u64::from(target.keys))).expect("below a u32");
        let mut lot = chance.below(target.weights.iter().sum());
        let verbs = [Verb::Get, Verb::Put, Verb::Delete, Verb::PutIfAbsent, Verb::PutIfVersion];
        let mut verb = Verb::Get;
        for (candidate, weight) in verbs.into_iter().zip(target.weights) {
            verb = candidate;
            if lot < weight {
                break;
            }
            lot -= weight;
        }
        let is_lasting = key.is_multiple_of(3);
        if is_lasting && verb == Verb::Delete {
            verb = Verb::Put;
        }
        let mortal = !is_lasting && target.ttl_one_in > 0 && chance.one_in(target.ttl_one_in);
        let (shortest, longest) = self.mix.deadline_ms;
        let (one_in, reads) = (self.mix.context_one_in, verb == Verb::Get);
        PlannedCall {
            namespace: target.namespace,
            key,
            verb,
            ttl_ms: if mortal { chance.between(1, 8_000) } else { 0 },
            level: self.mix.levels[chance.index(self.mix.levels.len())],
            primary: if chance.one_in(4) { Level::ONE } else { self.mix.primary },
            flags: self.mix.flags[chance.index(self.mix.flags.len())],
            with_context: !reads && one_in > 0 && chance.one_in(one_in),
            deadline_ms: chance.between(shortest, longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_same_seed_gives_the_same_calls_and_every_verb_occurs() {
        let mix = CallMix {
            targets: vec![Target {
                namespace: NamespaceId(0),
                keys: 6,
                weights: [4, 4, 2, 1, 1],
                ttl_one_in: 5,
            }],
            levels: vec![Level::ONE, Level::Quorum],
            primary: Level::Default,
            flags: vec![OperationFlags::default()],
            context_one_in: 2,
            contexts_of_writes: false,
            deadline_ms: (100, 200),
        };
        let take = |seed| {
            let mut calls = Calls::new(seed, mix.clone());
            (0..500).map(|_| calls.draw()).collect::<Vec<_>>()
        };
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
        let verbs: BTreeSet<Verb> = take(1).iter().map(|call| call.verb).collect();
        assert_eq!(verbs.len(), 5);
        let lasting = take(1).into_iter().filter(|call| call.key % 3 == 0);
        assert!(lasting.into_iter().all(|call| call.ttl_ms == 0 && call.verb != Verb::Delete));
    }
}
