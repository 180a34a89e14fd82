//! How a request ended, and what a client may conclude from the number alone.
//!
//! Invariant: the class is in the number, so a client that meets a status it has never heard of
//! still knows whether the request may have happened and whether to try again.

use std::fmt;

/// The outcome of a request, as sent in a reply's header.
///
/// | numbers   | class                                                          |
/// |-----------|----------------------------------------------------------------|
/// | 0..64     | answered: the request was carried out, this is its result       |
/// | 64..96    | not started, and trying again unchanged will not help           |
/// | 96..128   | not started; trying again later, or elsewhere, may help         |
/// | 128..     | may be applied: the request may or may not have happened        |
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Status(pub u16);

/// What a status means for a request's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Carried out; the answer is final.
    Answered,
    /// Never happened and never will; the same request will be refused again.
    Refused,
    /// Never happened and never will; the same request may be accepted later or elsewhere.
    NotStarted,
    /// Happens once or not at all, possibly later.
    MayBeApplied,
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status($number);)*

            /// Every status of this version, in the order of their numbers.
            pub const ALL: &'static [Status] = &[$(Status::$name),*];

            /// The name, as in `net/README.md`; "UNKNOWN" for numbers of later versions.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Status::$name => stringify!($name),)*
                    _ => "UNKNOWN",
                }
            }
        }
    };
}

statuses! {
    /// Done.
    OK = 0;
    /// The key has no live value.
    NOT_FOUND = 1;
    /// The condition (expected version, if-absent) does not hold; nothing was written.
    CONDITION_FALSE = 2;

    /// The body breaks the format's rules; the message says which.
    BAD_REQUEST = 64;
    /// Unknown opcode, version, flag or feature.
    UNSUPPORTED = 65;
    /// Not allowed for this client.
    DENIED = 66;
    /// Key, value, batch or message over its limit; `detail` is the limit.
    TOO_BIG = 67;
    /// The context is of another key or namespace, or has numbers that nobody issued.
    BAD_CONTEXT = 68;
    /// The data that could answer fails its checksum; not the same as absent.
    CORRUPT = 69;
    /// No namespace has this id or name.
    NO_NAMESPACE = 70;
    /// The key has too many siblings for a write without a context.
    SIBLINGS_FULL = 71;
    /// The server belongs to another cluster than the client expects.
    WRONG_CLUSTER = 72;
    /// The admin command failed for a reason of its own; the message says which.
    FAILED = 73;

    /// A queue is full; try again after `retry_after_ms`.
    BUSY = 96;
    /// Too few replicas can be reached for the levels asked for.
    UNAVAILABLE = 97;
    /// This key is asked for faster than its limit.
    RATE_LIMITED = 98;
    /// The disk is below its reserve; reads and deletes go on.
    FULL = 99;
    /// The client's partition map is too old; `detail` is the map version.
    STALE_EPOCH = 100;
    /// A clock is off by more than the limit; another node may do.
    CLOCK_SKEW = 101;
    /// The server is draining; use another connection.
    SHUTTING_DOWN = 102;
    /// The deadline passed before anything was done.
    EXPIRED = 103;
    /// The partition is on another shard, and this one could not forward; `detail` is the shard.
    WRONG_SHARD = 104;
    /// No replica is as fresh as `max_staleness` asks for.
    STALE_UNAVAILABLE = 105;

    /// Something failed after the write began: it happens once or not at all, possibly later.
    MAY_BE_APPLIED = 128;
}

impl Status {
    /// What the number says about the request's effect.
    #[inline]
    #[must_use]
    pub fn class(self) -> Class {
        match self.0 {
            0..64 => Class::Answered,
            64..96 => Class::Refused,
            96..128 => Class::NotStarted,
            _ => Class::MayBeApplied,
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            "UNKNOWN" => write!(f, "status {}", self.0),
            name => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_ordered_and_classed() {
        assert!(Status::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(Status::OK.class(), Class::Answered);
        assert_eq!(Status::BAD_CONTEXT.class(), Class::Refused);
        assert_eq!(Status::BUSY.class(), Class::NotStarted);
        assert_eq!(Status::MAY_BE_APPLIED.class(), Class::MayBeApplied);
    }

    #[test]
    fn an_unknown_status_still_has_a_class() {
        assert_eq!(Status(127).class(), Class::NotStarted);
        assert_eq!(Status(u16::MAX).class(), Class::MayBeApplied);
        assert_eq!(Status(127).to_string(), "status 127");
    }
}
