//! A record: everything a key's state carries from the frame to the log, the memtable, the
//! tables, and to peers. The fields never change for the cluster, because they are all here.
//!
//! Records are ordered by `(token, namespace, key)` everywhere; equality is decided by
//! `(namespace, key)`, never by the token alone.

use std::cmp::Ordering;

use super::{Dot, Timestamp, Token, Value, WallMicros};

/// A namespace, numbered when created and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct NamespaceId(pub u32);

/// What a record says about its key. Zero is never written: preallocated space reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The key has this value.
    Put = 1,
    /// The key is deleted (a tombstone); the value is empty.
    Delete = 2,
    /// The value is an encoded `KeyState`: several siblings and their version vector.
    Siblings = 3,
}

impl Kind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u8(byte: u8) -> Option<Kind> {
        match byte {
            1 => Some(Kind::Put),
            2 => Some(Kind::Delete),
            3 => Some(Kind::Siblings),
            _ => None,
        }
    }
}

/// A record whose key and value lie in somebody else's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordRef<'a> {
    /// Hash of the key.
    pub token: Token,
    /// Namespace of the key.
    pub namespace: NamespaceId,
    /// Incarnation of the partition that took the write; a dropped incarnation is never read.
    pub incarnation: u32,
    /// What the record says.
    pub kind: Kind,
    /// Which write this is: origin and sequence.
    pub dot: Dot,
    /// When the write happened, in the order of last-write-wins.
    pub timestamp: Timestamp,
    /// Milliseconds since 2024-01-01 from which the record reads as deleted; 0 is never.
    pub expiry_ms: u64,
    /// The key, 1 to `KEY_SIZE_MAX` bytes.
    pub key: &'a [u8],
    /// The value, up to the configured limit; empty for a tombstone. Of a key with siblings it is
    /// one slice, never pieces.
    pub value: Value<'a>,
}

impl RecordRef<'_> {
    /// The record's place in the one order of all files.
    #[inline]
    #[must_use]
    pub fn cmp_key(&self, token: Token, namespace: NamespaceId, key: &[u8]) -> Ordering {
        self.token
            .cmp(&token)
            .then_with(|| self.namespace.cmp(&namespace))
            .then_with(|| self.key.cmp(key))
    }

    /// Order of two records by key, ignoring their versions.
    #[inline]
    #[must_use]
    pub fn cmp_by_key(&self, other: &RecordRef<'_>) -> Ordering {
        self.cmp_key(other.token, other.namespace, other.key)
    }

    /// Whether the record is about this key.
    #[inline]
    #[must_use]
    pub fn is_key(&self, namespace: NamespaceId, key: &[u8]) -> bool {
        self.namespace == namespace && self.key == key
    }

    /// The total order of last-write-wins: stamp, then origin, then sequence.
    #[inline]
    #[must_use]
    pub fn version(&self) -> (Timestamp, Dot) {
        (self.timestamp, self.dot)
    }

    /// Whether the record has expired at `now`.
    #[inline]
    #[must_use]
    pub fn is_expired(&self, now: WallMicros) -> bool {
        self.expiry_ms != 0 && now.as_millis() >= self.expiry_ms
    }

    /// Whether the record gives a reader a value at `now`.
    #[inline]
    #[must_use]
    pub fn is_live(&self, now: WallMicros) -> bool {
        self.kind != Kind::Delete && !self.is_expired(now)
    }

    /// A copy that owns its bytes.
    #[must_use]
    pub fn to_owned(&self) -> Record {
        Record {
            token: self.token,
            namespace: self.namespace,
            incarnation: self.incarnation,
            kind: self.kind,
            dot: self.dot,
            timestamp: self.timestamp,
            expiry_ms: self.expiry_ms,
            key: self.key.to_vec(),
            value: self.value.to_vec(),
        }
    }
}

/// A record that owns its key and value. Fields as in [`RecordRef`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is documented in RecordRef")]
pub struct Record {
    pub token: Token,
    pub namespace: NamespaceId,
    pub incarnation: u32,
    pub kind: Kind,
    pub dot: Dot,
    pub timestamp: Timestamp,
    pub expiry_ms: u64,
    pub key: Vec<u8>,
    pub value: Vec<u8>,
}

impl Record {
    /// The record, borrowed.
    #[must_use]
    pub fn as_ref(&self) -> RecordRef<'_> {
        RecordRef {
            token: self.token,
            namespace: self.namespace,
            incarnation: self.incarnation,
            kind: self.kind,
            dot: self.dot,
            timestamp: self.timestamp,
            expiry_ms: self.expiry_ms,
            key: &self.key,
            value: Value::Whole(&self.value),
        }
    }
}
