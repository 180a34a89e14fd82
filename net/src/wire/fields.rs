//! Small fields that several messages share: levels, versions, conditions, flags.
//!
//! Invariant: each has exactly one encoding, and decoding refuses every other byte pattern, so
//! that a later version may give those a meaning.

use std::fmt;
use std::str::FromStr;

use annulus_engine::model::{Dot, OriginId, Timestamp};

use super::codec::{Malformed, Reader, Write};

/// How many replicas must answer. One byte on the wire.
///
/// | byte   | level                                                  |
/// |--------|--------------------------------------------------------|
/// | 0      | the namespace's default                                |
/// | 1..=63 | that many                                              |
/// | 64     | a majority of all replicas                             |
/// | 65     | all replicas                                           |
/// | 66     | a majority in the coordinator's data centre            |
/// | 67     | a majority in each data centre                         |
/// | 68     | a majority of all replicas in all data centres         |
/// | 127    | none needed (only where the field allows it: PW, PR, DW) |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Level {
    /// What the namespace says.
    #[default]
    Default,
    /// This many, 1 to 63.
    Count(u8),
    /// A majority of the replicas.
    Quorum,
    /// All of them.
    All,
    /// A majority of those in the coordinator's data centre.
    Local,
    /// A majority in each data centre.
    Each,
    /// A majority over all data centres.
    Global,
    /// None needed.
    None,
}

impl Level {
    /// One replica.
    pub const ONE: Level = Level::Count(1);

    /// The byte on the wire.
    #[inline]
    #[must_use]
    pub fn to_u8(self) -> u8 {
        match self {
            Level::Default => 0,
            Level::Count(count) => count.clamp(1, 63),
            Level::Quorum => 64,
            Level::All => 65,
            Level::Local => 66,
            Level::Each => 67,
            Level::Global => 68,
            Level::None => 127,
        }
    }

    /// The level with this byte.
    ///
    /// # Errors
    /// [`Malformed`] for bytes without a meaning.
    #[inline]
    pub fn from_u8(byte: u8) -> Result<Level, Malformed> {
        Ok(match byte {
            0 => Level::Default,
            1..=63 => Level::Count(byte),
            64 => Level::Quorum,
            65 => Level::All,
            66 => Level::Local,
            67 => Level::Each,
            68 => Level::Global,
            127 => Level::None,
            _ => return Err(Malformed("unknown level")),
        })
    }
}

impl FromStr for Level {
    type Err = String;

    /// As on the command line: a number, or `default one quorum all local each global none`.
    fn from_str(text: &str) -> Result<Level, String> {
        Ok(match text {
            "default" => Level::Default,
            "one" => Level::ONE,
            "quorum" => Level::Quorum,
            "all" => Level::All,
            "local" => Level::Local,
            "each" => Level::Each,
            "global" => Level::Global,
            "none" => Level::None,
            _ => match text.parse() {
                Ok(count @ 1..=63) => Level::Count(count),
                _ => {
                    return Err(format!(
                        "{text:?} is no level: 1 to 63, one, quorum, all, local, each, global, none"
                    ));
                }
            },
        })
    }
}

/// Which write a value comes from: its stamp, and its dot. Ordered as last-write-wins orders.
///
/// 20 bytes on the wire: timestamp 8, sequence 8, origin 4. As text `timestamp-sequence-origin`
/// in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version {
    /// Hybrid logical clock reading of the write.
    pub timestamp: Timestamp,
    /// Origin and sequence of the write.
    pub dot: Dot,
}

impl Version {
    /// Size on the wire, in bytes.
    pub const SIZE: usize = 20;

    /// Whether this is no version at all: the key was never written.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Version::default()
    }

    /// The version's bytes.
    #[inline]
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Version::SIZE] {
        let mut bytes = [0; Version::SIZE];
        bytes[0..8].copy_from_slice(&self.timestamp.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dot.sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.dot.origin.0.to_le_bytes());
        bytes
    }

    /// Appends the version.
    #[inline]
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put(&self.to_bytes());
    }

    /// Reads a version.
    ///
    /// # Errors
    /// [`Malformed`] when bytes are missing.
    #[inline]
    pub fn decode(reader: &mut Reader<'_>) -> Result<Version, Malformed> {
        let timestamp = Timestamp(reader.u64()?);
        let sequence = reader.u64()?;
        let origin = OriginId(reader.u32()?);
        Ok(Version { timestamp, dot: Dot { origin, sequence } })
    }
}

impl From<(Timestamp, Dot)> for Version {
    fn from((timestamp, dot): (Timestamp, Dot)) -> Version {
        Version { timestamp, dot }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}-{:x}", self.timestamp.0, self.dot.sequence, self.dot.origin.0)
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Version, String> {
        let wrong = || format!("{text:?} is no version: three hexadecimal numbers joined by '-'");
        let mut parts = text.split('-');
        let mut number = || u64::from_str_radix(parts.next().unwrap_or(""), 16).ok();
        let timestamp = Timestamp(number().ok_or_else(wrong)?);
        let sequence = number().ok_or_else(wrong)?;
        let origin = number().and_then(|origin| u32::try_from(origin).ok()).ok_or_else(wrong)?;
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Version { timestamp, dot: Dot { origin: OriginId(origin), sequence } })
    }
}

/// Names one intended write, so that sending it again does not do it again. 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OnceId {
    /// Drawn at random by each client.
    pub client: u64,
    /// Counted by that client.
    pub number: u64,
}

/// What must hold of the key for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Condition {
    /// Nothing.
    #[default]
    Always,
    /// The key has no live value.
    IfAbsent,
    /// The key's live value is of this version.
    IfVersion(Version),
}

/// How long a value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Ttl {
    /// As long as the namespace says.
    #[default]
    Default,
    /// For ever, whatever the namespace says. On the wire `u64::MAX`.
    Never,
    /// For this many milliseconds, at least 1.
    Millis(u64),
}

/// Flags of an operation. Bits 4 to 8 announce an optional field, in this order.
///
/// | bit | name         | operations       | optional field                      |
/// |-----|--------------|------------------|-------------------------------------|
/// | 0   | HASHED       | all              |                                     |
/// | 1   | SLOPPY       | all              |                                     |
/// | 2   | STRICT       | all              |                                     |
/// | 3   | TRACE        | all              |                                     |
/// | 4   | IF_ABSENT    | put              |                                     |
/// | 5   | IF_VERSION   | put, delete      | version, 20 bytes                   |
/// | 6   | TTL          | put              | milliseconds, 8 bytes               |
/// | 7   | CONTEXT      | put, delete      | size, 2 bytes, and the context      |
/// | 8   | ONCE         | put, delete      | client and number, 16 bytes         |
/// | 9   | VERSION_ONLY | get              |                                     |
/// | 10  | STALE_OK     | get              |                                     |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct OperationFlags(pub u16);

impl OperationFlags {
    /// The key is already a uniform hash: its first 8 bytes are the token.
    pub const HASHED: OperationFlags = OperationFlags(1 << 0);
    /// Fallback nodes may stand in for replicas, whatever the namespace says.
    pub const SLOPPY: OperationFlags = OperationFlags(1 << 1);
    /// Only home replicas count, whatever the namespace says.
    pub const STRICT: OperationFlags = OperationFlags(1 << 2);
    /// The reply tells what was done, as JSON.
    pub const TRACE: OperationFlags = OperationFlags(1 << 3);
    /// Only when the key has no live value.
    pub const IF_ABSENT: OperationFlags = OperationFlags(1 << 4);
    /// Only when the live value is of the version that follows.
    pub const IF_VERSION: OperationFlags = OperationFlags(1 << 5);
    /// A time to live follows.
    pub const TTL: OperationFlags = OperationFlags(1 << 6);
    /// A context follows.
    pub const CONTEXT: OperationFlags = OperationFlags(1 << 7);
    /// A [`OnceId`] follows.
    pub const ONCE: OperationFlags = OperationFlags(1 << 8);
    /// Answer with versions, without values.
    pub const VERSION_ONLY: OperationFlags = OperationFlags(1 << 9);
    /// When nobody is as fresh as asked for, answer with the freshest instead of refusing.
    pub const STALE_OK: OperationFlags = OperationFlags(1 << 10);

    /// Flags that say how, not what: the caller may set them directly.
    pub const CHOICES: OperationFlags = OperationFlags(0b110_0000_1111);
    /// Flags of a get.
    pub(crate) const GET: OperationFlags = OperationFlags(0b110_0000_1111);
    /// Flags of a put.
    pub(crate) const PUT: OperationFlags = OperationFlags(0b001_1111_1111);
    /// Flags of a delete.
    pub(crate) const DELETE: OperationFlags = OperationFlags(0b001_1010_1111);

    /// Whether all flags of `other` are set.
    #[inline]
    #[must_use]
    pub fn has(self, other: OperationFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// These flags and those of `other`.
    #[inline]
    #[must_use]
    pub fn with(self, other: OperationFlags) -> OperationFlags {
        OperationFlags(self.0 | other.0)
    }

    /// The flags that are also in `other`.
    #[inline]
    #[must_use]
    pub fn only(self, other: OperationFlags) -> OperationFlags {
        OperationFlags(self.0 & other.0)
    }

    /// These flags and `other`'s, if `condition` holds.
    #[inline]
    #[must_use]
    pub fn with_if(self, condition: bool, other: OperationFlags) -> OperationFlags {
        if condition { self.with(other) } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_byte_is_one_level_or_none() {
        for byte in 0..=u8::MAX {
            match Level::from_u8(byte) {
                Ok(level) => assert_eq!(level.to_u8(), byte),
                Err(_) => assert!((69..127).contains(&byte) || byte > 127),
            }
        }
    }

    #[test]
    fn levels_read_from_the_command_line() {
        assert_eq!("one".parse(), Ok(Level::Count(1)));
        assert_eq!("3".parse(), Ok(Level::Count(3)));
        assert_eq!("quorum".parse(), Ok(Level::Quorum));
        assert!("0".parse::<Level>().is_err());
        assert!("64".parse::<Level>().is_err());
        assert!("most".parse::<Level>().is_err());
    }

    proptest! {
        #[test]
        fn versions_read_back_as_bytes_and_as_text(timestamp: u64, sequence: u64, origin: u32) {
            let version = Version {
                timestamp: Timestamp(timestamp),
                dot: Dot { origin: OriginId(origin), sequence },
            };
            let mut bytes = Vec::new();
            version.encode(&mut bytes);
            prop_assert_eq!(bytes.len(), Version::SIZE);
            prop_assert_eq!(Version::decode(&mut Reader::new(&bytes)), Ok(version));
            prop_assert_eq!(version.to_string().parse(), Ok(version));
        }
    }

    #[test]
    fn broken_versions_are_refused() {
        for text in ["", "1", "1-2", "1-2-3-4", "1-2-x", "1-2-100000000"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }
}
