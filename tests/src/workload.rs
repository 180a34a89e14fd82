//! Seeded operations on one shard: few keys, odd sizes, everything mixed.
//!
//! Invariant: the same seed and mix give the same operations, whatever the store answers. Keys
//! are few, so that they are overwritten, deleted and read again; some share one token (legal,
//! and a place where bugs live), some are one byte long and some the longest allowed.

use annulus_engine::model::limits::KEY_SIZE_MAX;
use annulus_engine::model::{NamespaceId, Token};
use annulus_engine::sim::Chance;

use crate::model::KeyName;

/// Seed of the tokens in simulated shards.
pub const HASH_SEED: u64 = 0x70AE_5EED;

/// One thing to do to a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read a key.
    Get(KeyName),
    /// Write a value; expiry in milliseconds from now, 0 for never.
    Put {
        /// To which key.
        key: KeyName,
        /// The value.
        value: Vec<u8>,
        /// Time to live in milliseconds; 0 is for ever.
        ttl_ms: u64,
    },
    /// Delete a key, whether it is there or not.
    Delete(KeyName),
    /// A put that is to happen only if the key has no value.
    PutIfAbsent {
        /// To which key.
        key: KeyName,
        /// The value.
        value: Vec<u8>,
    },
    /// A put that is to happen only if the key has the version that it had this many of its own
    /// writes ago; 0 is the present one.
    PutIfVersion {
        /// To which key.
        key: KeyName,
        /// The value.
        value: Vec<u8>,
        /// How old the version is that the writer knows.
        back: usize,
    },
    /// Read everything in token order, in pages.
    Scan,
    /// Seal the memtable and write it to a table.
    Flush,
    /// Do compaction work until there is none.
    Compact,
    /// Let this much time pass, in milliseconds.
    Wait(u64),
    /// Close cleanly and open again.
    Reopen,
}

/// Relative frequencies of operations, and sizes.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Number of different keys.
    pub key_count: usize,
    /// Largest ordinary value, in bytes; one in fifty may be `large_value`.
    pub value_size_max: usize,
    /// Largest rare value, in bytes.
    pub large_value: usize,
    /// How often each kind of operation comes: get, put, delete, put if absent, put if version,
    /// scan, flush, compact, wait, reopen.
    pub weights: [u64; 10],
    /// One put in so many has a time to live; 0 for none.
    pub ttl_one_in: u64,
}

impl Default for Mix {
    fn default() -> Mix {
        Mix {
            key_count: 80,
            value_size_max: 300,
            large_value: 20_000,
            weights: [30, 40, 10, 4, 4, 1, 2, 1, 3, 1],
            ttl_one_in: 5,
        }
    }
}

impl Mix {
    /// Writes only, with now and then a flush or a compaction: for crash sweeps.
    #[must_use]
    pub fn script() -> Mix {
        Mix {
            key_count: 40,
            value_size_max: 200,
            large_value: 6_000,
            weights: [0, 60, 15, 2, 2, 0, 3, 1, 0, 0],
            ttl_one_in: 0,
        }
    }
}

/// An endless sequence of operations.
#[derive(Clone, Debug)]
pub struct Workload {
    chance: Chance,
    mix: Mix,
    keys: Vec<KeyName>,
    writes: u64,
}

impl Workload {
    /// The operations of this seed.
    #[must_use]
    pub fn new(seed: u64, mix: Mix) -> Workload {
        let mut chance = Chance::new(seed);
        let keys = (0..mix.key_count).map(|number| draw_key(&mut chance, number)).collect();
        Workload { chance, mix, keys, writes: 0 }
    }

    /// All keys that may be written.
    #[must_use]
    pub fn keys(&self) -> &[KeyName] {
        &self.keys
    }

    fn key(&mut self) -> KeyName {
        // The square of a uniform draw: a few hot keys, a long tail.
        let count = self.keys.len();
        let (one, two) = (self.chance.index(count), self.chance.index(count));
        self.keys[one * two / count].clone()
    }

    fn value(&mut self) -> Vec<u8> {
        self.writes += 1;
        let max =
            if self.chance.one_in(50) { self.mix.large_value } else { self.mix.value_size_max };
        let len = if self.chance.one_in(20) { 0 } else { self.chance.index(max + 1) };
        let mut value = vec![0; len];
        if self.chance.one_in(2) {
            self.chance.fill(&mut value);
        }
        // Every value that has room names its write, so that no two are equal.
        for (byte, of_id) in value.iter_mut().zip(self.writes.to_be_bytes().into_iter().rev()) {
            *byte = of_id;
        }
        value
    }
}

impl Iterator for Workload {
    type Item = Operation;

    fn next(&mut self) -> Option<Operation> {
        let total: u64 = self.mix.weights.iter().sum();
        let mut drawn = self.chance.below(total);
        let kind = self.mix.weights.iter().position(|weight| {
            let here = drawn < *weight;
            drawn = drawn.saturating_sub(*weight);
            here
        });
        Some(match kind.expect("drawn below the total") {
            0 => Operation::Get(self.key()),
            1 => {
                let (key, value) = (self.key(), self.value());
                let mortal = self.mix.ttl_one_in > 0 && self.chance.one_in(self.mix.ttl_one_in);
                let ttl_ms = if mortal { self.chance.between(1, 5_000) } else { 0 };
                Operation::Put { key, value, ttl_ms }
            }
            2 => Operation::Delete(self.key()),
            3 => {
                let (key, value) = (self.key(), self.value());
                Operation::PutIfAbsent { key, value }
            }
            4 => {
                let (key, value) = (self.key(), self.value());
                let back = if self.chance.one_in(3) { 1 } else { 0 };
                Operation::PutIfVersion { key, value, back }
            }
            5 => Operation::Scan,
            6 => Operation::Flush,
            7 => Operation::Compact,
            8 => Operation::Wait(self.chance.between(1, 2_000)),
            _ => Operation::Reopen,
        })
    }
}

fn draw_key(chance: &mut Chance, number: usize) -> KeyName {
    let namespace = NamespaceId(u32::try_from(number % 3).expect("below three") + 1);
    let name = match chance.below(20) {
        // One byte, but told apart by number; other kinds of keys never have one byte.
        0 if number < 256 => vec![u8::try_from(number).expect("below 256")],
        1 => {
            let mut long = format!("{number:06}").into_bytes();
            long.resize(KEY_SIZE_MAX, b'x');
            long
        }
        2 => format!("twin-{number}").into_bytes(),
        _ => format!("key-{number:05}").into_bytes(),
    };
    (namespace, name)
}

/// The namespace whose keys have siblings; in the others the last write wins.
pub const SIBLINGS: NamespaceId = NamespaceId(3);

/// The token of a key in these tests: its hash, except that twins all have one token.
#[must_use]
pub fn token_of(key: &KeyName) -> Token {
    let hashed = if key.1.starts_with(b"twin-") { b"twin" } else { &key.1[..] };
    Token::of_key(hashed, HASH_SEED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_same_seed_gives_the_same_operations_and_all_kinds_occur() {
        let take = |seed| Workload::new(seed, Mix::default()).take(2_000).collect::<Vec<_>>();
        let operations = take(4);
        assert_eq!(operations, take(4));
        assert_ne!(operations, take(5));
        let kinds: BTreeSet<_> =
            operations.iter().map(|op| format!("{:?}", std::mem::discriminant(op))).collect();
        assert_eq!(kinds.len(), 10);
    }

    #[test]
    fn keys_differ_and_some_share_a_token() {
        let workload = Workload::new(4, Mix { key_count: 500, ..Mix::default() });
        let keys: BTreeSet<_> = workload.keys().iter().collect();
        let tokens: BTreeSet<_> = workload.keys().iter().map(token_of).collect();
        assert_eq!(keys.len(), 500);
        assert!(tokens.len() < 490);
    }
}
