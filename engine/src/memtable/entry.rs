//! How a record lies in the arena: a word that says how wide each field is, the fields, the key,
//! the value. Most fields are small or zero, so most headers have 16 bytes instead of 43.
//!
//! | field     | bytes         | meaning                                                    |
//! |-----------|---------------|------------------------------------------------------------|
//! | shape     | 4             | key length and the widths of what follows, see the `*_AT`s  |
//! | timestamp | 6 or 8        | distance from the memtable's base, or the stamp itself     |
//! | value_len | 0, 1, 2, 4    | bytes                                                      |
//! | sequence  | 2, 3, 5, 8    |                                                            |
//! | expiry    | 0, 5, 6, 8    | milliseconds                                               |
//! | namespace | 0, 1, 2, 4    |                                                            |
//! | origin    | 0, 1, 2, 4    |                                                            |
//! | incarnation | 0, 1, 2, 4  |                                                            |
//! | key       | 1 to 4096     |                                                            |
//! | value     | `value_len`   |                                                            |
//! | room      | 0 or 4        | size of the place, where it is larger than the entry       |
//!
//! The token is in the slot (`slots.rs`), not here. Memory only: no file has this form, so there
//! is no version and no checksum. Invariant: `decode(encode(r)) == r` for every record.

use super::arena::Arena;
use crate::model::limits::KEY_SIZE_MAX;
use crate::model::{Dot, Kind, NamespaceId, OriginId, RecordRef, Timestamp, Token};

const KEY_LEN_BITS: u32 = 12;
const KIND_AT: u32 = 12;
const VALUE_AT: u32 = 14;
const SEQUENCE_AT: u32 = 16;
const EXPIRY_AT: u32 = 18;
const NAMESPACE_AT: u32 = 20;
const ORIGIN_AT: u32 = 22;
const INCARNATION_AT: u32 = 24;
/// Set when the timestamp has eight bytes.
const WIDE_TIMESTAMP: u32 = 1 << 26;
/// Set when the entry is followed by the size of its place.
const HAS_ROOM: u32 = 1 << 27;

const SMALL_WIDTHS: [u8; 4] = [0, 1, 2, 4];
const SEQUENCE_WIDTHS: [u8; 4] = [2, 3, 5, 8];
const EXPIRY_WIDTHS: [u8; 4] = [0, 5, 6, 8];

const HEADER_SIZE_MAX: usize = 4 + 8 + 4 + 8 + 8 + 4 + 4 + 4;
const ROOM_SIZE: usize = 4;

// The key's length less one has its twelve bits.
const _: () = assert!(KEY_SIZE_MAX <= 1 << KEY_LEN_BITS);

/// Stamps within half of this of the base are stored in six bytes: 9.5 hours on either side.
const NEAR: u64 = 1 << 48;

/// An encoded header.
pub(super) struct Header {
    bytes: [u8; HEADER_SIZE_MAX],
    len: usize,
    shape: u32,
}

impl Header {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push(&mut self, value: u64, width: usize) {
        // All eight bytes are written and `width` of them kept: no copy of variable length.
        if let Some(space) = self.bytes.get_mut(self.len..self.len + 8) {
            space.copy_from_slice(&value.to_le_bytes());
        } else {
            self.bytes[self.len..self.len + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        self.len += width;
    }

    fn push_sized(&mut self, value: u64, widths: [u8; 4], at: u32) {
        let needed = (71 - value.leading_zeros()) / 8;
        let code = widths.iter().position(|&width| u32::from(width) >= needed);
        let code = code.expect("the last width holds every value of the field");
        self.shape |= u32::try_from(code).expect("below four") << at;
        self.push(value, usize::from(widths[code]));
    }
}

/// The header of a record in a memtable whose stamps lie around `base`.
#[inline]
pub(super) fn header(record: &RecordRef<'_>, base: Timestamp) -> Header {
    assert!((1..=KEY_SIZE_MAX).contains(&record.key.len()), "the shard refuses such keys");
    let key_len = u32::try_from(record.key.len() - 1).expect("asserted above");
    let shape = key_len | ((record.kind as u32) << KIND_AT);
    let mut header = Header { bytes: [0; HEADER_SIZE_MAX], len: 4, shape };
    let distance = record.timestamp.0.wrapping_sub(base.0).wrapping_add(NEAR / 2);
    if distance < NEAR {
        header.push(distance, 6);
    } else {
        header.shape |= WIDE_TIMESTAMP;
        header.push(record.timestamp.0, 8);
    }
    let value_len = u32::try_from(record.value.len()).expect("values are far below 4 GiB");
    header.push_sized(u64::from(value_len), SMALL_WIDTHS, VALUE_AT);
    header.push_sized(record.dot.sequence, SEQUENCE_WIDTHS, SEQUENCE_AT);
    header.push_sized(record.expiry_ms, EXPIRY_WIDTHS, EXPIRY_AT);
    header.push_sized(u64::from(record.namespace.0), SMALL_WIDTHS, NAMESPACE_AT);
    header.push_sized(u64::from(record.dot.origin.0), SMALL_WIDTHS, ORIGIN_AT);
    header.push_sized(u64::from(record.incarnation), SMALL_WIDTHS, INCARNATION_AT);
    let shape = header.shape;
    header.bytes[..4].copy_from_slice(&shape.to_le_bytes());
    header
}

/// Reads fields of one to eight bytes, front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    #[inline]
    fn take(&mut self, width: usize) -> u64 {
        let word = match self.bytes.get(self.at..self.at + 8) {
            Some(word) => u64::from_le_bytes(word.try_into().expect("eight bytes")),
            None => self.last_word(),
        };
        self.at += width;
        // Two shifts, because a shift by 64 overflows.
        word & !((u64::MAX << (width * 4)) << (width * 4))
    }

    /// Fewer than eight bytes are left in the chunk: its last entry.
    #[cold]
    fn last_word(&self) -> u64 {
        let mut word = [0; 8];
        let rest = &self.bytes[self.at..];
        word[..rest.len()].copy_from_slice(rest);
        u64::from_le_bytes(word)
    }

    #[inline]
    fn take_sized(&mut self, shape: u32, widths: [u8; 4], at: u32) -> u64 {
        self.take(usize::from(widths[(shape >> at) as usize & 3]))
    }

    #[inline]
    fn take_small(&mut self, shape: u32, at: u32) -> u32 {
        u32::try_from(self.take_sized(shape, SMALL_WIDTHS, at)).expect("at most four bytes")
    }
}

/// The record at the front of `bytes`, which an earlier `header`, key and value were written to.
#[inline]
pub(super) fn decode(bytes: &[u8], token: Token, base: Timestamp) -> RecordRef<'_> {
    decode_with_end(bytes, token, base).0
}

#[inline]
fn decode_with_end(bytes: &[u8], token: Token, base: Timestamp) -> (RecordRef<'_>, usize) {
    let mut cursor = Cursor { bytes, at: 0 };
    let shape = u32::try_from(cursor.take(4)).expect("four bytes");
    let timestamp = if shape & WIDE_TIMESTAMP == 0 {
        cursor.take(6).wrapping_sub(NEAR / 2).wrapping_add(base.0)
    } else {
        cursor.take(8)
    };
    let value_len = cursor.take_small(shape, VALUE_AT) as usize;
    let sequence = cursor.take_sized(shape, SEQUENCE_WIDTHS, SEQUENCE_AT);
    let expiry_ms = cursor.take_sized(shape, EXPIRY_WIDTHS, EXPIRY_AT);
    let namespace = NamespaceId(cursor.take_small(shape, NAMESPACE_AT));
    let origin = OriginId(cursor.take_small(shape, ORIGIN_AT));
    let incarnation = cursor.take_small(shape, INCARNATION_AT);
    let kind = match (shape >> KIND_AT) & 3 {
        1 => Kind::Put,
        2 => Kind::Delete,
        _ => Kind::Siblings,
    };
    let key_len = (shape as usize & ((1 << KEY_LEN_BITS) - 1)) + 1;
    let (key, rest) = bytes[cursor.at..].split_at(key_len);
    let record = RecordRef {
        token,
        namespace,
        incarnation,
        kind,
        dot: Dot { origin, sequence },
        timestamp: Timestamp(timestamp),
        expiry_ms,
        key,
        value: &rest[..value_len],
    };
    (record, cursor.at + key_len + value_len)
}

/// Bytes of the place that the entry at the front of `bytes` occupies.
pub(super) fn room(bytes: &[u8]) -> usize {
    let (_, end) = decode_with_end(bytes, Token::MIN, Timestamp::ZERO);
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4) & u64::from(HAS_ROOM) == 0 {
        return Arena::rounded(end);
    }
    cursor.at = end;
    cursor.take(ROOM_SIZE) as usize
}

/// Writes an entry over another whose place has `room` bytes; the caller has checked that it fits.
pub(super) fn overwrite(bytes: &mut [u8], room: usize, header: &Header, key: &[u8], value: &[u8]) {
    let head = header.bytes();
    let (key_end, end) = (head.len() + key.len(), head.len() + key.len() + value.len());
    bytes[..head.len()].copy_from_slice(head);
    bytes[head.len()..key_end].copy_from_slice(key);
    bytes[key_end..end].copy_from_slice(value);
    // Without the note the place would shrink for ever to this entry's size; a difference too
    // small for the note is given up, it is below two units.
    if let Some(note) = bytes[..room].get_mut(end..end + ROOM_SIZE) {
        note.copy_from_slice(&u32::try_from(room).expect("entries are below 4 GiB").to_le_bytes());
        bytes[..4].copy_from_slice(&(header.shape | HAS_ROOM).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers of every width, small ones as often as large ones.
    fn sized() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0u32..64).prop_map(|(value, shift)| value >> shift)
    }

    proptest! {
        #[test]
        fn every_record_comes_back(
            kind in 1u8..4, fields in [sized(), sized(), sized()], small in any::<[u32; 3]>(), shifts in [0u32..32, 0u32..32, 0u32..32],
            base in sized(), key in prop::collection::vec(any::<u8>(), 1..=300), value in prop::collection::vec(any::<u8>(), 0..70_000),
            token: u64, later in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let record = RecordRef {
                token: Token(token),
                namespace: NamespaceId(small[0] >> shifts[0]),
                incarnation: small[1] >> shifts[1],
                kind: Kind::from_u8(kind).unwrap(),
                dot: Dot { origin: OriginId(small[2] >> shifts[2]), sequence: fields[0] },
                timestamp: Timestamp(fields[1]),
                expiry_ms: fields[2],
                key: &key,
                value: &value,
            };
            let header = header(&record, Timestamp(base));
            let bytes = [header.bytes(), &key, &value, &later].concat();
            prop_assert_eq!(decode(&bytes, record.token, Timestamp(base)), record);
            prop_assert_eq!(room(&bytes), Arena::rounded(bytes.len() - later.len()));
            let room_before = bytes.len() + 9;
            let mut place = vec![0xee; room_before];
            overwrite(&mut place, room_before, &header, &key, &value);
            prop_assert_eq!(decode(&place, record.token, Timestamp(base)), record);
            prop_assert_eq!(room(&place), room_before);
        }
    }

    #[test]
    fn an_ordinary_header_has_sixteen_bytes() {
        let stamp = Timestamp::new(crate::model::WallMicros(1 << 46), 0);
        let record = RecordRef {
            token: Token(1),
            namespace: NamespaceId(1),
            incarnation: 1,
            kind: Kind::Put,
            dot: Dot { origin: OriginId(1), sequence: 50_000 },
            timestamp: Timestamp(stamp.0 + (1 << 40)),
            expiry_ms: 0,
            key: b"0123456789abcdef",
            value: &[0; 100],
        };
        assert_eq!(header(&record, stamp).bytes().len(), 16);
    }
}
