//! What a record adds to the tree of its partition: two 64-bit hashes for each live value.
//!
//! Invariant: addition modulo 2^64 in each lane, so the order in which records are added does not
//! matter, and what was added can be taken away again. Not XOR: there the same change made twice
//! cancels, and two equal faults hide each other.
//!
//! Tombstones add nothing, so replicas may purge them at different times. A value with an expiry
//! is added under the hour from which it is no longer compared, for the same reason. Values are
//! hashed too, so that a value altered behind the store's back shows.

use std::ops::{Add, AddAssign, Sub, SubAssign};

use annulus_engine::model::causality::{KeyState, Sibling};
use annulus_engine::model::{Kind, RecordRef, WallMicros};
use twox_hash::XxHash3_64;

/// Milliseconds of an hour.
const HOUR_MS: u64 = 3_600_000;
/// Odd constants that make several hash functions out of one seed.
const SALTS: [u64; 4] =
    [0xa076_1d64_78bd_642f, 0xe703_7ed1_a0b4_28db, 0x8ebc_6af0_9c88_c6e3, 0x5899_65cc_7537_4cc3];

/// The cluster's hash seed. The same on all members, else no two trees agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashSeed(pub u64);

/// A sum of record hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Sum(pub [u64; 2]);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Sum = Sum([0; 2]);

    /// The lane that stands for the sum where 64 bits are enough: in lists of keys.
    #[must_use]
    pub fn digest(self) -> u64 {
        self.0[0]
    }
}

impl Add for Sum {
    type Output = Sum;

    fn add(self, other: Sum) -> Sum {
        Sum([self.0[0].wrapping_add(other.0[0]), self.0[1].wrapping_add(other.0[1])])
    }
}

impl Sub for Sum {
    type Output = Sum;

    fn sub(self, other: Sum) -> Sum {
        Sum([self.0[0].wrapping_sub(other.0[0]), self.0[1].wrapping_sub(other.0[1])])
    }
}

impl AddAssign for Sum {
    fn add_assign(&mut self, other: Sum) {
        *self = *self + other;
    }
}

impl SubAssign for Sum {
    fn sub_assign(&mut self, other: Sum) {
        *self = *self - other;
    }
}

impl std::iter::Sum for Sum {
    fn sum<I: Iterator<Item = Sum>>(sums: I) -> Sum {
        sums.fold(Sum::ZERO, Add::add)
    }
}

/// Hours since 2024-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Hour(pub u32);

impl Hour {
    /// The hour of values that never expire.
    pub const NEVER: Hour = Hour(u32::MAX);

    /// The hour that has begun at `wall`.
    #[must_use]
    pub fn of(wall: WallMicros) -> Hour {
        Hour::of_millis(wall.as_millis())
    }

    /// The last hour that there is stands for all later ones; `NEVER` stays apart.
    fn of_millis(millis: u64) -> Hour {
        Hour(u32::try_from(millis / HOUR_MS).unwrap_or(u32::MAX - 1).min(u32::MAX - 1))
    }

    /// The hour from which a value written at `written` is no longer compared: the expiry's, or an
    /// earlier one so that about ten serve for all lives of one length. Both replicas find the
    /// same, for it depends on the write alone.
    fn last_compared(written: WallMicros, expiry_ms: u64) -> Hour {
        if expiry_ms == 0 {
            return Hour::NEVER;
        }
        let life_hours = expiry_ms.saturating_sub(written.as_millis()) / HOUR_MS;
        // The greatest power of two up to an eighth of the life: 8 to 17 steps a life.
        let step_log = (life_hours / 8).max(1).ilog2().min(31);
        let Hour(expiry) = Hour::of_millis(expiry_ms);
        Hour((expiry >> step_log) << step_log)
    }

    /// Whether what is added under this hour still counts at `now`: it may not yet have expired on
    /// any replica whose clock shows the same hour.
    #[must_use]
    pub fn counts_at(self, now: Hour) -> bool {
        self > now
    }
}

/// Calls `each` for every value of a record that is no delete, with what it adds and until when.
pub fn for_each_part(record: &RecordRef<'_>, seed: HashSeed, mut each: impl FnMut(Hour, Sum)) {
    let hash = |sibling: &Sibling<'_>| {
        let until = Hour::last_compared(sibling.timestamp.wall(), sibling.expiry_ms);
        (until, of_value(record, sibling, seed))
    };
    match KeyState::of_record(record) {
        Ok(state) => {
            for sibling in state.siblings().iter().filter(|sibling| !sibling.is_delete) {
                let (until, sum) = hash(sibling);
                each(until, sum);
            }
        }
        // Files are checked, so this is damage: as it is, it differs from every sound replica.
        Err(_) => {
            let as_is = RecordRef { kind: Kind::Put, expiry_ms: 0, ..*record };
            let state = KeyState::of_record(&as_is).expect("a plain record is always a state");
            let (until, sum) = hash(&state.siblings()[0]);
            each(until, sum);
        }
    }
}

/// The two hashes of (namespace, token, key, dot, stamp, expiry, value).
fn of_value(record: &RecordRef<'_>, sibling: &Sibling<'_>, seed: HashSeed) -> Sum {
    let hash = |bytes: &[u8], salt: usize| {
        XxHash3_64::oneshot_with_seed(seed.0.wrapping_add(SALTS[salt]), bytes)
    };
    let mut words = [0; 7 * 8];
    let fields = [
        u64::from(record.namespace.0) << 32 | u64::from(sibling.dot.origin.0),
        // With the token, which is a hash of the key under another seed, 128 bits of the key.
        record.token.0,
        hash(record.key, 0),
        sibling.dot.sequence,
        sibling.timestamp.0,
        sibling.expiry_ms,
        hash(&sibling.value.side_by_side(), 1),
    ];
    for (word, field) in words.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
        *word = field.to_le_bytes();
    }
    Sum([hash(&words, 2), hash(&words, 3)])
}

#[cfg(test)]
mod tests;
