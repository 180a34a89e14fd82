//! Whether a record that a peer sent may be merged: a peer is authenticated, not trusted.
//!
//! Invariant: what passes hashes to its token, so it is where every reader looks for it, and its
//! stamps do not run ahead of this node's clock, so it cannot hide the writes of an hour.

use annulus_engine::model::causality::KeyState;
use annulus_engine::model::limits::{CLOCK_OFFSET_MAX_US, KEY_SIZE_MAX, VALUE_SIZE_CEILING};
use annulus_engine::model::{Kind, PartitionId, RecordRef, Timestamp, Token, WallMicros};
use annulus_net::wire::codec::Malformed;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Why a replica did not take a write. Travels in `WriteResult::Refused`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[doc = $doc])* #[error($text)] $name = $number,)*
        }

        impl Reason {
            /// Every reason, in the order of their numbers: the index of a counter.
            pub const ALL: &'static [Reason] = &[$(Reason::$name),*];

            pub(super) fn from_u8(byte: u8) -> Result<Reason, Malformed> {
                match byte {
                    $($number => Ok(Reason::$name),)*
                    _ => Err(Malformed("unknown reason of a refusal")),
                }
            }
        }
    };
}

reasons! {
    /// The status says it all: busy, full, closing.
    Status = 0, "see the status";
    /// The token is not the hash of the key.
    Token = 1, "token is not the hash of the key";
    /// Key or value over its limit, or empty where it must not be.
    Size = 2, "key or value has a forbidden size";
    /// The stamp is further ahead of the replica's clock than clocks may differ.
    Stamp = 3, "stamp is too far ahead of the clock";
    /// The value of a `Siblings` record is no key state.
    State = 4, "siblings are malformed";
    /// The dot cannot be of that origin.
    Dot = 5, "write of an unknown origin";
    /// The partition is not on the shard that was asked.
    Shard = 6, "partition is on another shard";
    /// The sender's topology is another one.
    Epoch = 7, "topology is another one";
    /// The deadline passed first.
    Deadline = 8, "deadline passed";
    /// No namespace has this number.
    Namespace = 9, "no such namespace";
}

impl Reason {
    pub(super) fn as_u8(self) -> u8 {
        self as u8
    }
}

/// Checks a record from a peer, whatever message it came in; gives its partition, for the caller
/// to check that it is one of this shard. Costs one hash of the key; siblings are decoded once.
///
/// # Errors
/// The first rule broken; the record must not be merged.
pub fn check_record(
    record: &RecordRef<'_>,
    hash_seed: u64,
    partition_bits: u32,
    wall: WallMicros,
) -> Result<PartitionId, Reason> {
    let value_size_max = match record.kind {
        Kind::Put => VALUE_SIZE_CEILING,
        Kind::Delete => 0,
        Kind::Siblings => 2 * VALUE_SIZE_CEILING,
    };
    if !(1..=KEY_SIZE_MAX).contains(&record.key.len()) || record.value.len() > value_size_max {
        return Err(Reason::Size);
    }
    if !is_ahead_at_most(record.timestamp, wall) {
        return Err(Reason::Stamp);
    }
    // A key that is a hash already is its own token. A record does not say which of the two its
    // writer chose, and either places it where the readers of that choice look.
    let is_token = Token::of_key(record.key, hash_seed) == record.token
        || Token::of_hashed_key(record.key) == Some(record.token);
    if !is_token {
        return Err(Reason::Token);
    }
    if record.kind == Kind::Siblings {
        let state = KeyState::of_record(record).map_err(|_| Reason::State)?;
        if !is_ahead_at_most(state.context().timestamp, wall) {
            return Err(Reason::Stamp);
        }
    }
    Ok(record.token.partition(partition_bits))
}

fn is_ahead_at_most(stamp: Timestamp, wall: WallMicros) -> bool {
    stamp.wall().0.saturating_sub(wall.0) <= CLOCK_OFFSET_MAX_US
}
