//! The value of a record that is a register: what it begins with.
//!
//! | size | field | meaning |
//! |---|---|---|
//! | 1 | form | 0: the record's own stamp and dot are its version; 1: these are |
//! | 8 | timestamp | form 1 only |
//! | 4 | origin | form 1 only |
//! | 8 | sequence | form 1 only |
//!
//! Invariant: putting a record again under a greater ballot changes neither its value nor its
//! version, so a condition on the version holds as long as nobody writes. A tombstone has no
//! version that anybody could ask for.

use annulus_engine::model::{Dot, Kind, OriginId, RecordRef, Timestamp, Value};

use super::Version;

/// Bytes before the value whose version is another record's.
const LONG: usize = 21;

/// The bytes of a value written by this very record.
#[must_use]
pub fn fresh(value: Value<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + value.len());
    bytes.push(0);
    value.copy_to(&mut bytes);
    bytes
}

/// The bytes of a record's value under which it is put again.
#[must_use]
pub fn again(record: &RecordRef<'_>) -> Vec<u8> {
    if record.kind != Kind::Put {
        return Vec::new();
    }
    let (timestamp, dot) = version_of(record);
    let mut bytes = Vec::with_capacity(LONG + record.value.len());
    bytes.push(1);
    bytes.extend_from_slice(&timestamp.0.to_le_bytes());
    bytes.extend_from_slice(&dot.origin.0.to_le_bytes());
    bytes.extend_from_slice(&dot.sequence.to_le_bytes());
    let from = bytes.len();
    record.value.copy_to(&mut bytes);
    let head = head_size(record).min(bytes.len() - from);
    bytes.drain(from..from + head);
    bytes
}

/// How many bytes of the stored value are not the client's.
#[must_use]
pub fn head_size(record: &RecordRef<'_>) -> usize {
    match form(record) {
        Some(0) => 1,
        Some(1) if record.value.len() >= LONG => LONG,
        _ => 0,
    }
}

/// The version that clients see of a stored record.
#[must_use]
pub fn version_of(record: &RecordRef<'_>) -> Version {
    if form(record) != Some(1) || record.value.len() < LONG {
        return record.version();
    }
    let mut head = [0; LONG];
    let bytes = record.value.parts().flatten();
    for (place, byte) in head.iter_mut().zip(bytes) {
        *place = *byte;
    }
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&head[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let origin = u32::from_le_bytes([head[9], head[10], head[11], head[12]]);
    (Timestamp(word(1)), Dot { origin: OriginId(origin), sequence: word(13) })
}

/// Whether a record can be one of a register.
#[must_use]
pub fn is_valid(record: &RecordRef<'_>) -> bool {
    match record.kind {
        Kind::Put => head_size(record) > 0,
        Kind::Delete => true,
        Kind::Siblings => false,
    }
}

fn form(record: &RecordRef<'_>) -> Option<u8> {
    if record.kind != Kind::Put {
        return None;
    }
    record.value.parts().flatten().next().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_engine::model::{NamespaceId, Piece, Pieces, Token};

    fn record(value: Value<'_>, stamp: u64) -> RecordRef<'_> {
        RecordRef {
            token: Token(1),
            namespace: NamespaceId(0),
            incarnation: 0,
            kind: Kind::Put,
            dot: Dot { origin: OriginId(2), sequence: stamp + 1 },
            timestamp: Timestamp(stamp),
            expiry_ms: 0,
            key: b"k",
            value,
        }
    }

    #[test]
    fn a_value_that_is_put_again_and_again_keeps_its_version() {
        let first = fresh(Value::Whole(b"some value"));
        let written = record(Value::Whole(&first), 5);
        assert_eq!(version_of(&written), written.version());
        assert_eq!(&first[head_size(&written)..], b"some value");
        let second = again(&written);
        let put_again = record(Value::Whole(&second), 9);
        let third = again(&put_again);
        // In pieces, wherever they are cut.
        for cut in 0..third.len() {
            let (head, tail) = third.split_at(cut);
            let pieces = Pieces::new(vec![Piece::new(head.to_vec()), Piece::new(tail.to_vec())]);
            let pieces = record(Value::Pieces(&pieces), 12);
            assert_eq!(version_of(&pieces), written.version());
            assert_eq!(&pieces.value.to_vec()[head_size(&pieces)..], b"some value");
            assert_eq!(again(&pieces), third);
        }
        assert_eq!(second, third);
    }

    #[test]
    fn what_has_no_head_is_no_register() {
        for value in [&b""[..], &[1; LONG - 1], &[2; 40]] {
            assert!(!is_valid(&record(Value::Whole(value), 5)));
        }
        assert!(is_valid(&record(Value::Whole(&[0]), 5)));
    }
}
