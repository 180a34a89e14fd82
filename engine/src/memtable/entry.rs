//! How a record lies in the arena: a header of two to six words, the key, the value.
//!
//! Four layouts, each a few words read whole and cut with constant shifts, because decoding is a
//! third of the time of a `get` that hits the cache. Most records fit the first.
//!
//! | word | bits   | layouts | meaning                                                       |
//! |------|--------|---------|---------------------------------------------------------------|
//! | 0    | 0..12  | all     | length of the key, less one                                   |
//! | 0    | 12..14 | all     | kind                                                          |
//! | 0    | 14..16 | all     | layout: `SMALL`, `EXPIRING`, `LARGE`, `WHOLE`                 |
//! | 0    | 16..63 | not `WHOLE` | stamp, as its distance from the memtable's base           |
//! | 0    | 16     | `WHOLE` | whether the value lies apart: 4 bytes in its place are its number (`shared.rs`) |
//! | 0    | 63     | all     | whether the size of the place follows the value, 4 bytes      |
//! | 1    | 0..16  | not `WHOLE` | length of the value                                       |
//! | 1    | 16..40 | not `WHOLE` | sequence, low bits                                        |
//! | 1    | 40..48, 48..56, 56..64 | not `WHOLE` | namespace, origin, incarnation, low bits  |
//! | 2    | 0..40, 40..64 | `EXPIRING`, `LARGE` | expiry; sequence, high bits                |
//! | 3    | 0..24, 24..48, 48..64 | `LARGE` | namespace, origin, incarnation, high bits      |
//! | 1    | 0..32, 32..64 | `WHOLE` | length of the value; namespace                         |
//! | 2    |        | `WHOLE` | stamp                                                         |
//! | 3    |        | `WHOLE` | sequence                                                      |
//! | 4    |        | `WHOLE` | expiry                                                        |
//! | 5    | 0..32, 32..64 | `WHOLE` | origin; incarnation                                    |
//!
//! The token is in the slot (`slots.rs`), not here. Memory only: no file has this form, so there
//! is no version and no checksum. Invariant: `decode(encode(r)) == r` for every record.

use super::arena::Arena;
use super::shared::SharedValues;
use crate::model::limits::KEY_SIZE_MAX;
use crate::model::{Dot, Kind, NamespaceId, OriginId, RecordRef, Timestamp, Token, Value};

const SMALL: u64 = 0;
const EXPIRING: u64 = 1;
const LARGE: u64 = 2;
const WHOLE: u64 = 3;

/// Words of a header, by layout.
const WORDS: [usize; 4] = [2, 3, 4, 6];

/// In word 0 of `WHOLE`: the value lies apart.
const IS_SHARED: u64 = 1 << 16;
/// Bytes of the number of a value that lies apart.
pub(super) const NUMBER_SIZE: usize = 4;

/// In word 0: the size of the place follows the value.
const HAS_ROOM: u64 = 1 << 63;
const ROOM_SIZE: usize = 4;

// The key's length less one has its twelve bits.
const _: () = assert!(KEY_SIZE_MAX <= 1 << 12);

/// Stamps within half of this of the base are stored as their distance: 4.7 hours on either side.
const NEAR: u64 = 1 << 47;

/// `count` bits of a word from bit `from` on.
#[inline]
const fn cut(word: u64, from: u32, count: u32) -> u64 {
    (word >> from) & ((1 << count) - 1)
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "cut to 32 bits or fewer before")]
const fn small(bits: u64) -> u32 {
    bits as u32
}

/// An encoded header.
pub(super) struct Header {
    bytes: [u8; 48],
    len: usize,
}

impl Header {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The header of a record in a memtable whose stamps lie around `base`.
#[inline]
pub(super) fn header(record: &RecordRef<'_>, base: Timestamp) -> Header {
    assert!((1..=KEY_SIZE_MAX).contains(&record.key.len()), "the shard refuses such keys");
    let is_shared = record.value.whole().is_none();
    let value_len = if is_shared { NUMBER_SIZE } else { record.value.len() };
    let value_len = u64::from(u32::try_from(value_len).expect("values are far below 4 GiB"));
    let Dot { origin, sequence } = record.dot;
    let namespace = u64::from(record.namespace.0);
    let (origin, incarnation) = (u64::from(origin.0), u64::from(record.incarnation));
    let distance = record.timestamp.0.wrapping_sub(base.0).wrapping_add(NEAR / 2);

    let (expiry_bits, sequence_bits) = (record.expiry_ms, sequence >> 24);
    let ids = (namespace | origin | incarnation) >> 8;
    let is_whole = distance >= NEAR
        || value_len >> 16 != 0
        || is_shared
        || (expiry_bits >> 40) | (sequence_bits >> 24) | (incarnation >> 24) != 0;
    let layout = match (is_whole, ids != 0, (expiry_bits | sequence_bits) != 0) {
        (true, ..) => WHOLE,
        (_, true, _) => LARGE,
        (_, _, true) => EXPIRING,
        _ => SMALL,
    };
    let shape = (record.key.len() as u64 - 1) | (record.kind as u64) << 12 | layout << 14;
    let words = if is_whole {
        [
            if is_shared { shape | IS_SHARED } else { shape },
            value_len | namespace << 32,
            record.timestamp.0,
            sequence,
            record.expiry_ms,
            origin | incarnation << 32,
        ]
    } else {
        let ids = cut(namespace, 0, 8) << 40 | cut(origin, 0, 8) << 48 | incarnation << 56;
        [
            shape | distance << 16,
            value_len | cut(sequence, 0, 24) << 16 | ids,
            expiry_bits | sequence_bits << 40,
            namespace >> 8 | origin >> 8 << 24 | incarnation >> 8 << 48,
            0,
            0,
        ]
    };
    let mut header = Header { bytes: [0; 48], len: WORDS[small(layout & 3) as usize] * 8 };
    for (bytes, word) in header.bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    header
}

#[inline]
fn word(bytes: &[u8], index: usize) -> u64 {
    let word = bytes[index * 8..].first_chunk().expect("the layout says that the word is there");
    u64::from_le_bytes(*word)
}

/// The record at the front of `bytes`, which an earlier `header`, key and value were written to;
/// or the key and the number of one of the `values`.
#[inline]
pub(super) fn decode<'a>(
    bytes: &'a [u8],
    token: Token,
    base: Timestamp,
    values: &'a SharedValues,
) -> RecordRef<'a> {
    let (shape, fields) = (word(bytes, 0), word(bytes, 1));
    let layout = cut(shape, 14, 2);
    let mut record = RecordRef {
        token,
        namespace: NamespaceId(small(cut(fields, 40, 8))),
        incarnation: small(fields >> 56),
        kind: match cut(shape, 12, 2) {
            1 => Kind::Put,
            2 => Kind::Delete,
            _ => Kind::Siblings,
        },
        dot: Dot { origin: OriginId(small(cut(fields, 48, 8))), sequence: cut(fields, 16, 24) },
        timestamp: Timestamp(cut(shape, 16, 47).wrapping_sub(NEAR / 2).wrapping_add(base.0)),
        expiry_ms: 0,
        key: &[],
        value: Value::EMPTY,
    };
    let mut value_len = small(cut(fields, 0, 16)) as usize;
    if layout != SMALL {
        decode_more(&mut record, &mut value_len, bytes, layout);
    }
    let start = WORDS[small(layout & 3) as usize] * 8;
    let key_len = key_len(shape);
    let (key, value) = bytes[start..start + key_len + value_len].split_at(key_len);
    (record.key, record.value) = (key, Value::Whole(value));
    if layout == WHOLE && shape & IS_SHARED != 0 {
        record.value = values.get(number(value)).value();
    }
    record
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(*bytes.first_chunk().expect("the header says that it is a number"))
}

/// The number of the entry's value, if it lies apart.
pub(super) fn shared(bytes: &[u8]) -> Option<u32> {
    let shape = word(bytes, 0);
    if cut(shape, 14, 2) != WHOLE || shape & IS_SHARED == 0 {
        return None;
    }
    Some(number(&bytes[WORDS[small(WHOLE) as usize] * 8 + key_len(shape)..]))
}

fn key_len(shape: u64) -> usize {
    small(cut(shape, 0, 12)) as usize + 1
}

/// The words of the other layouts.
fn decode_more(record: &mut RecordRef<'_>, value_len: &mut usize, bytes: &[u8], layout: u64) {
    if layout == WHOLE {
        *value_len = small(cut(word(bytes, 1), 0, 32)) as usize;
        record.namespace = NamespaceId(small(word(bytes, 1) >> 32));
        record.timestamp = Timestamp(word(bytes, 2));
        let origin = OriginId(small(cut(word(bytes, 5), 0, 32)));
        record.dot = Dot { origin, sequence: word(bytes, 3) };
        record.expiry_ms = word(bytes, 4);
        record.incarnation = small(word(bytes, 5) >> 32);
        return;
    }
    record.expiry_ms = cut(word(bytes, 2), 0, 40);
    record.dot.sequence |= word(bytes, 2) >> 40 << 24;
    if layout == LARGE {
        record.namespace.0 |= small(cut(word(bytes, 3), 0, 24)) << 8;
        record.dot.origin.0 |= small(cut(word(bytes, 3), 24, 24)) << 8;
        record.incarnation |= small(word(bytes, 3) >> 48) << 8;
    }
}

/// Bytes of the place that the entry at the front of `bytes` occupies.
pub(super) fn room(bytes: &[u8]) -> usize {
    let (shape, fields) = (word(bytes, 0), word(bytes, 1));
    let layout = cut(shape, 14, 2);
    let value_len = small(cut(fields, 0, if layout == WHOLE { 32 } else { 16 })) as usize;
    let end = WORDS[small(layout & 3) as usize] * 8 + key_len(shape) + value_len;
    if shape & HAS_ROOM == 0 {
        return Arena::rounded(end);
    }
    let note = bytes[end..].first_chunk().expect("the header says that it follows");
    u32::from_le_bytes(*note) as usize
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
        let shape = word(bytes, 0) | HAS_ROOM;
        bytes[..8].copy_from_slice(&shape.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Piece, Pieces};
    use proptest::prelude::*;

    /// Numbers of every width up to `bits`, those of `usual` bits or fewer as often as all others.
    fn sized(bits: u32, usual: u32) -> impl Strategy<Value = u64> {
        (any::<u64>(), prop_oneof![9 => 0..=usual, 1 => 0..=bits])
            .prop_map(|(value, bits)| value.checked_shr(64 - bits).unwrap_or(0))
    }

    fn ids() -> impl Strategy<Value = [u32; 3]> {
        [sized(32, 8), sized(32, 8), sized(32, 8)].prop_map(|ids| ids.map(small))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn every_record_comes_back(
            kind in 1u8..4, sequence in sized(64, 24), expiry_ms in sized(64, 0), ids in ids(),
            base in sized(64, 60), distance in sized(64, 46), token: u64,
            key in prop::collection::vec(any::<u8>(), 1..=300),
            value in prop_oneof![9 => 0usize..300, 1 => 65_530usize..65_540],
            later in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let value = vec![9; value];
            let record = RecordRef {
                token: Token(token),
                namespace: NamespaceId(ids[0]),
                incarnation: ids[1],
                kind: Kind::from_u8(kind).unwrap(),
                dot: Dot { origin: OriginId(ids[2]), sequence },
                timestamp: Timestamp(base.wrapping_add(distance)),
                expiry_ms,
                key: &key,
                value: Value::Whole(&value),
            };
            let header = header(&record, Timestamp(base));
            let bytes = [header.bytes(), &key, &value, &later].concat();
            let apart = SharedValues::default();
            prop_assert_eq!(decode(&bytes, record.token, Timestamp(base), &apart), record);
            prop_assert_eq!(shared(&bytes), None);
            prop_assert_eq!(room(&bytes), Arena::rounded(bytes.len() - later.len()));
            let room_before = bytes.len() + 9;
            let mut place = vec![0xee; room_before];
            overwrite(&mut place, room_before, &header, &key, &value);
            prop_assert_eq!(decode(&place, record.token, Timestamp(base), &apart), record);
            prop_assert_eq!(room(&place), room_before);
            let (mut apart, pieces) = (apart, Pieces::new(vec![Piece::new(value.clone()); 2]));
            let record = RecordRef { value: Value::Pieces(&pieces), ..record };
            let number = apart.keep(&pieces);
            let header = super::header(&record, Timestamp(base));
            let bytes = [header.bytes(), &key, &number.to_le_bytes(), &later].concat();
            prop_assert_eq!(decode(&bytes, record.token, Timestamp(base), &apart), record);
            prop_assert_eq!(shared(&bytes), Some(number));
            prop_assert_eq!(room(&bytes), Arena::rounded(bytes.len() - later.len()));
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
            dot: Dot { origin: OriginId(1), sequence: 16_000_000 },
            timestamp: Timestamp(stamp.0 + (1 << 45)),
            expiry_ms: 0,
            key: b"0123456789abcdef",
            value: Value::Whole(&[0; 100]),
        };
        assert_eq!(header(&record, stamp).bytes().len(), 16);
    }
}
