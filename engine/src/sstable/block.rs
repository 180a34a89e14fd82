//! Blocks: the unit that is read, checked, cached and searched.
//!
//! Invariant: a [`Block`] that exists has passed its checksum (salted with table and offset) and
//! every record in it has been decoded once, so [`Block::get`] cannot fail, only miss. On the
//! read path it stands between the cache and `causality.rs`; the layout is in `format.rs`.

use std::mem::size_of;
use std::ops::Range;
use std::rc::Rc;

use super::codec;
use super::format::{
    BlockHandle, BlockHeader, Codec, Invalid, RAW_LEN_MAX, SHARED_BLOCK_MAX, verify_section,
};
use super::long::Head;
use crate::buffer::AlignedBuf;
use crate::checksum;
use crate::model::{
    Dot, Kind, NamespaceId, OriginId, Piece, Pieces, RecordRef, Timestamp, Token, TokenRange, Value,
};

pub(crate) const HEADER: usize = size_of::<BlockHeader>();
/// Bytes of the two columns for each record: token and offset.
const COLUMNS: usize = 8 + 2;
const EXPIRY_FLAG: u8 = 1 << 2;

/// Who owns a block's bytes.
#[derive(Clone, Debug)]
enum Storage {
    /// The buffer that was read.
    Read(AlignedBuf),
    /// A part of a larger read, of a scan.
    Shared(Rc<AlignedBuf>),
    /// Unpacked, or copied because the buffer was much larger than the block.
    Heap(Box<[u8]>),
}

/// A block in memory.
#[derive(Clone, Debug)]
pub struct Block {
    storage: Storage,
    /// Where the payload begins in the storage.
    start: usize,
    raw_len: usize,
    count: usize,
    handle: BlockHandle,
    /// The value of the one record, if the block is in parts; the payload has none then.
    value: Option<Pieces>,
}

impl Block {
    /// A block in parts, from its head and the pieces of its value.
    pub(crate) fn in_parts(
        payload: Box<[u8]>,
        value: Vec<Piece>,
        handle: BlockHandle,
    ) -> Result<Block, Invalid> {
        let raw_len = payload.len();
        let value = Some(Pieces::new(value));
        let storage = Storage::Heap(payload);
        Block { storage, start: 0, raw_len, count: 1, handle, value }.validated()
    }

    /// The same from a block that lies in one buffer: each part is copied or unpacked.
    fn of_parts(bytes: &[u8], handle: BlockHandle, salt: u64) -> Result<Option<Block>, Invalid> {
        let Some(head) = Head::parse(bytes, handle, salt)? else { return Ok(None) };
        let bytes = bytes.get(..handle.len as usize).ok_or("the file ends inside a block")?;
        let piece = |index: usize| {
            let stored = Piece::new(bytes[head.span(index..index + 1)].to_vec());
            head.piece(index, &stored, handle.offset, salt)
        };
        let value = (0..head.count()).map(piece).collect::<Result<Vec<_>, Invalid>>()?;
        Block::in_parts(head.payload, value, handle).map(Some)
    }

    /// Checks and unpacks the block that lies at `at` in `buf`, of the table with this salt.
    ///
    /// # Errors
    /// The first rule broken; the bytes are not used.
    pub fn parse(
        buf: AlignedBuf,
        at: usize,
        handle: BlockHandle,
        salt: u64,
    ) -> Result<Block, Invalid> {
        if let Some(block) = Block::of_parts(buf.get(at..).unwrap_or_default(), handle, salt)? {
            return Ok(block);
        }
        let (header, unpacked) = check(&buf, at, handle, salt)?;
        let start = at + HEADER;
        let raw_len = header.raw_len as usize;
        let (storage, start) = match unpacked {
            Some(bytes) => (Storage::Heap(bytes), 0),
            // A cache of half-empty buffers would hold half as much; copying costs less.
            None if buf.capacity() - buf.capacity() / 8 > handle.len as usize => {
                (Storage::Heap(buf[start..start + raw_len].into()), 0)
            }
            None => (Storage::Read(buf), start),
        };
        let count = header.record_count.into();
        Block { storage, start, raw_len, count, handle, value: None }.validated()
    }

    /// Like [`Block::parse`], for one of many blocks in a buffer that a scan has read.
    ///
    /// # Errors
    /// The first rule broken; the bytes are not used.
    pub fn parse_shared(
        buf: &Rc<AlignedBuf>,
        at: usize,
        handle: BlockHandle,
        salt: u64,
    ) -> Result<Block, Invalid> {
        if let Some(block) = Block::of_parts(buf.get(at..).unwrap_or_default(), handle, salt)? {
            return Ok(block);
        }
        let (header, unpacked) = check(buf, at, handle, salt)?;
        let (storage, start) = match unpacked {
            Some(bytes) => (Storage::Heap(bytes), 0),
            None => (Storage::Shared(Rc::clone(buf)), at + HEADER),
        };
        let raw_len = header.raw_len as usize;
        let count = header.record_count.into();
        Block { storage, start, raw_len, count, handle, value: None }.validated()
    }

    /// Decodes everything once, so that no later access can fail.
    fn validated(self) -> Result<Block, Invalid> {
        let payload = self.payload();
        let records = self
            .raw_len
            .checked_sub(self.count * COLUMNS)
            .ok_or("a block is shorter than its columns")?;
        let (tokens, offsets, _) = self.columns(payload);
        if !tokens.is_sorted_by_key(|token| u64::from_le_bytes(*token)) {
            return Err("the tokens of a block are out of order");
        }
        if offsets.first().is_none_or(|first| *first != [0, 0]) {
            return Err("the records of a block do not begin at its start");
        }
        let in_order = offsets.windows(2).all(|pair| {
            let (this, next) = (u16::from_le_bytes(pair[0]), u16::from_le_bytes(pair[1]));
            this < next && usize::from(next) < records
        });
        if !in_order {
            return Err("the offsets of a block are out of order");
        }
        if (0..self.count).any(|index| self.try_record(index).is_none()) {
            return Err("a record of a block cannot be decoded");
        }
        Ok(self)
    }

    #[inline]
    fn payload(&self) -> &[u8] {
        let bytes: &[u8] = match &self.storage {
            Storage::Read(buf) => buf,
            Storage::Shared(buf) => buf,
            Storage::Heap(bytes) => bytes,
        };
        &bytes[self.start..self.start + self.raw_len]
    }

    /// Tokens, offsets, records.
    #[inline]
    fn columns<'a>(&self, payload: &'a [u8]) -> (&'a [[u8; 8]], &'a [[u8; 2]], &'a [u8]) {
        let (tokens, rest) = payload.split_at(self.count * 8);
        let (offsets, records) = rest.split_at(self.count * 2);
        (tokens.as_chunks::<8>().0, offsets.as_chunks::<2>().0, records)
    }

    #[inline]
    fn try_record(&self, index: usize) -> Option<RecordRef<'_>> {
        let (tokens, offsets, records) = self.columns(self.payload());
        let token = Token(u64::from_le_bytes(*tokens.get(index)?));
        let start = usize::from(u16::from_le_bytes(*offsets.get(index)?));
        let end = match offsets.get(index + 1) {
            Some(next) => usize::from(u16::from_le_bytes(*next)),
            None => records.len(),
        };
        let mut record = decode(token, records.get(start..end)?)?;
        if let Some(value) = &self.value {
            record.value = value.value();
        }
        Some(record)
    }

    /// Where the block is in its table.
    #[must_use]
    pub fn handle(&self) -> BlockHandle {
        self.handle
    }

    /// Number of records, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a block always has a record")]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Bytes of memory it occupies; a scan's block counts its own part only.
    #[must_use]
    pub fn size(&self) -> usize {
        let bytes = match &self.storage {
            Storage::Read(buf) => buf.capacity(),
            Storage::Shared(_) => self.raw_len,
            Storage::Heap(bytes) => bytes.len(),
        };
        let value = self.value.as_ref().map_or(0, |value| value.len() + value.overhead());
        bytes + value + size_of::<Block>()
    }

    /// Whether the block is a part of a scan's buffer, which it keeps in memory as a whole.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.storage, Storage::Shared(_))
    }

    /// The record at a position, in 0..`len()`.
    #[inline]
    #[must_use]
    pub fn record(&self, index: usize) -> RecordRef<'_> {
        assert!(index < self.count, "a position below the block's length");
        self.try_record(index).expect("decoded once when the block was made")
    }

    /// The token at a position, in 0..`len()`.
    #[inline]
    #[must_use]
    pub fn token(&self, index: usize) -> Token {
        Token(u64::from_le_bytes(self.columns(self.payload()).0[index]))
    }

    /// Finds a key. About 50 ns: a branchless search of the token column, then one comparison.
    #[inline]
    #[must_use]
    pub fn get(&self, token: Token, namespace: NamespaceId, key: &[u8]) -> Option<RecordRef<'_>> {
        let tokens = self.columns(self.payload()).0;
        let first = lower_bound(tokens, token);
        if tokens.get(first).is_none_or(|found| u64::from_le_bytes(*found) != token.0) {
            return None;
        }
        let run = match tokens.get(first + 1) {
            Some(next) if u64::from_le_bytes(*next) == token.0 => {
                tokens[first..].partition_point(|other| u64::from_le_bytes(*other) == token.0)
            }
            _ => 1,
        };
        // Equal tokens are ordered by key; a long run of them costs a binary search.
        let (mut low, mut high) = (first, first + run);
        while low < high {
            let middle = low + (high - low) / 2;
            let record = self.record(middle);
            match record.namespace.cmp(&namespace).then_with(|| record.key.cmp(key)) {
                std::cmp::Ordering::Equal => return Some(record),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// All records, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = RecordRef<'_>> + ExactSizeIterator {
        (0..self.count).map(|index| self.record(index))
    }

    /// Positions of the records whose tokens lie in the range.
    #[must_use]
    pub fn positions(&self, range: TokenRange) -> Range<usize> {
        let tokens = self.columns(self.payload()).0;
        let first = lower_bound(tokens, range.first);
        let end = tokens.partition_point(|token| u64::from_le_bytes(*token) <= range.last.0);
        first..end.max(first)
    }

    /// The records whose tokens lie in the range, in order.
    pub fn iter_range(&self, range: TokenRange) -> impl Iterator<Item = RecordRef<'_>> {
        self.positions(range).map(|index| self.record(index))
    }
}

/// First position whose token is not below `token`.
#[inline]
fn lower_bound(tokens: &[[u8; 8]], token: Token) -> usize {
    tokens.partition_point(|other| u64::from_le_bytes(*other) < token.0)
}

/// A block's header, and its payload if it had to be unpacked.
type Checked = (BlockHeader, Option<Box<[u8]>>);

/// Checks lengths, checksum and header, and unpacks the payload if it is packed.
fn check(buf: &[u8], at: usize, handle: BlockHandle, salt: u64) -> Result<Checked, Invalid> {
    let bytes = buf
        .get(at..)
        .and_then(|rest| rest.get(..handle.len as usize))
        .ok_or("the file ends inside a block")?;
    verify_section(bytes, salt, handle.offset)?;
    let header = BlockHeader::parse(bytes)?;
    if header.block_len() != bytes.len() {
        return Err("a block's length differs from the index");
    }
    let stored = &bytes[HEADER..HEADER + header.stored_len as usize];
    let unpacked = match Codec::from_u8(header.codec) {
        Some(Codec::None) | None => None,
        Some(packed) => Some(codec::unpack(packed, stored, header.raw_len as usize)?),
    };
    Ok((header, unpacked))
}

/// Gathers records until they are a block.
#[derive(Debug, Default)]
pub(crate) struct BlockBuilder {
    tokens: Vec<u64>,
    offsets: Vec<u16>,
    records: Vec<u8>,
    /// Payload and its packed form, kept for their memory.
    payload: Vec<u8>,
    packed: Vec<u8>,
}

impl BlockBuilder {
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Bytes of the payload so far, before compression.
    pub(crate) fn raw_len(&self) -> usize {
        self.tokens.len() * COLUMNS + self.records.len()
    }

    /// The same after one more record of this encoded length.
    pub(crate) fn raw_len_with(&self, record_len: usize) -> usize {
        self.raw_len() + COLUMNS + record_len
    }

    pub(crate) fn first_token(&self) -> Option<Token> {
        self.tokens.first().copied().map(Token)
    }

    /// Whether a record of this encoded length may join the ones here.
    pub(crate) fn has_room(&self, record_len: usize) -> bool {
        self.is_empty() || self.raw_len_with(record_len) <= SHARED_BLOCK_MAX
    }

    /// Appends a record; the caller keeps the order and has asked [`BlockBuilder::has_room`].
    pub(crate) fn push(&mut self, record: &RecordRef<'_>) {
        let offset = u16::try_from(self.records.len()).expect("a shared block is below 64 KiB");
        self.tokens.push(record.token.0);
        self.offsets.push(offset);
        encode(record, &mut self.records);
    }

    /// Appends the block to `out`, as it will lie at `offset`, and starts anew. Packed only when
    /// that saves an eighth.
    pub(crate) fn finish(
        &mut self,
        out: &mut AlignedBuf,
        salt: u64,
        offset: u64,
        packer: &mut codec::Packer,
        codec: Codec,
    ) -> BlockHandle {
        assert!(!self.is_empty(), "a block has a record");
        self.payload.clear();
        self.payload.extend_from_slice(bytemuck::cast_slice(&self.tokens));
        self.payload.extend_from_slice(bytemuck::cast_slice(&self.offsets));
        self.payload.extend_from_slice(&self.records);
        let raw_len = self.payload.len();
        assert!(raw_len <= RAW_LEN_MAX, "a record's length was checked when it was added");
        let helps = codec != Codec::None
            && packer.pack(codec, &self.payload, &mut self.packed)
            && self.packed.len() <= raw_len - raw_len / 8;
        let (codec, stored) =
            if helps { (codec, &self.packed) } else { (Codec::None, &self.payload) };
        let header = BlockHeader {
            checksum: 0,
            stored_len: len_u32(stored.len()),
            raw_len: len_u32(raw_len),
            record_count: u16::try_from(self.tokens.len()).expect("64 KiB hold fewer records"),
            codec: codec as u8,
            layout: 0,
        };
        let start = out.len();
        out.extend_from_slice(bytemuck::bytes_of(&header));
        out.extend_from_slice(stored);
        out.resize(start + header.block_len());
        let sum = checksum::salted(salt, offset, &out[start + 4..]);
        out[start..start + 4].copy_from_slice(&sum.to_le_bytes());
        self.tokens.clear();
        self.offsets.clear();
        self.records.clear();
        BlockHandle { offset, len: len_u32(header.block_len()) }
    }
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).expect("a block is below 64 MiB")
}

/// Length of a record inside a block, without its entry in the columns.
pub(crate) fn encoded_len(record: &RecordRef<'_>) -> usize {
    let expiry = if record.expiry_ms == 0 { 0 } else { varint_len(record.expiry_ms) };
    let key_len = record.key.len() as u64;
    9 + varint_len(record.namespace.0.into())
        + varint_len(record.incarnation.into())
        + varint_len(record.dot.origin.0.into())
        + varint_len(record.dot.sequence)
        + expiry
        + varint_len(key_len)
        + record.key.len()
        + record.value.len()
}

/// Appends the record's bytes; the token goes to its column.
pub(crate) fn encode(record: &RecordRef<'_>, out: &mut Vec<u8>) {
    let flag = if record.expiry_ms == 0 { 0 } else { EXPIRY_FLAG };
    out.push(record.kind as u8 | flag);
    out.extend_from_slice(&record.timestamp.0.to_le_bytes());
    put_varint(out, record.namespace.0.into());
    put_varint(out, record.incarnation.into());
    put_varint(out, record.dot.origin.0.into());
    put_varint(out, record.dot.sequence);
    if record.expiry_ms != 0 {
        put_varint(out, record.expiry_ms);
    }
    put_varint(out, record.key.len() as u64);
    out.extend_from_slice(record.key);
    record.value.copy_to(out);
}

/// The record in these bytes, or `None` when they are none.
#[inline]
fn decode(token: Token, bytes: &[u8]) -> Option<RecordRef<'_>> {
    let (&first, rest) = bytes.split_first()?;
    let kind = Kind::from_u8(first & (EXPIRY_FLAG - 1))?;
    if first & !(EXPIRY_FLAG | (EXPIRY_FLAG - 1)) != 0 {
        return None;
    }
    let (timestamp, mut rest) = rest.split_first_chunk::<8>()?;
    let namespace = u32::try_from(take_varint(&mut rest)?).ok()?;
    let incarnation = u32::try_from(take_varint(&mut rest)?).ok()?;
    let origin = u32::try_from(take_varint(&mut rest)?).ok()?;
    let sequence = take_varint(&mut rest)?;
    let expiry_ms = if first & EXPIRY_FLAG != 0 { take_varint(&mut rest)? } else { 0 };
    let key_len = usize::try_from(take_varint(&mut rest)?).ok()?;
    let (key, value) = rest.split_at_checked(key_len)?;
    Some(RecordRef {
        token,
        namespace: NamespaceId(namespace),
        incarnation,
        kind,
        dot: Dot { origin: OriginId(origin), sequence },
        timestamp: Timestamp(u64::from_le_bytes(*timestamp)),
        expiry_ms,
        key,
        value: Value::Whole(value),
    })
}

/// Bytes of a varint: 7 bits each, 1 to 10.
fn varint_len(number: u64) -> usize {
    let bits = 64 - (number | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

/// Takes a varint from the front; `None` when it is cut, too long, or longer than needed.
#[inline]
fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let (&first, rest) = bytes.split_first()?;
    if first < 0x80 {
        *bytes = rest;
        return Some(first.into());
    }
    take_long_varint(bytes)
}

fn take_long_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (index, &byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * index;
        if index == 9 && bits > 1 {
            return None;
        }
        number |= bits << shift;
        if byte < 0x80 {
            if byte == 0 {
                return None;
            }
            *bytes = &bytes[index + 1..];
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Record;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varints_come_back_and_have_the_length_said(number: u64, shift in 0u32..64) {
            let number = number >> shift;
            let mut bytes = Vec::new();
            put_varint(&mut bytes, number);
            prop_assert_eq!(bytes.len(), varint_len(number));
            let mut rest = bytes.as_slice();
            prop_assert_eq!(take_varint(&mut rest), Some(number));
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn any_bytes_as_a_record_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = decode(Token(1), &bytes);
        }

        #[test]
        fn any_bytes_as_a_block_never_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 600),
            count in 1u16..40, codec in 0u8..3, stored in 0u32..700, raw in 0u32..700,
        ) {
            // Forged with a right checksum, as an attacker with the disk could.
            let header = BlockHeader {
                checksum: 0, stored_len: stored, raw_len: raw, record_count: count, codec,
                layout: 0,
            };
            bytes[..HEADER].copy_from_slice(bytemuck::bytes_of(&header));
            let mut buf = AlignedBuf::with_capacity(1024);
            buf.extend_from_slice(&bytes);
            buf.resize(1024);
            let sum = checksum::salted(5, 512, &buf[4..]);
            buf[..4].copy_from_slice(&sum.to_le_bytes());
            let handle = BlockHandle { offset: 512, len: 1024 };
            if let Ok(block) = Block::parse(buf, 0, handle, 5) {
                let _ = block.iter().count();
            }
        }
    }

    fn record(token: u64, key: &[u8]) -> Record {
        Record {
            token: Token(token),
            namespace: NamespaceId(1),
            incarnation: 1,
            kind: Kind::Put,
            dot: Dot { origin: OriginId(7), sequence: 300 },
            timestamp: Timestamp(1 << 40),
            expiry_ms: 0,
            key: key.to_vec(),
            value: b"value".to_vec(),
        }
    }

    fn block_of(records: &[Record]) -> Block {
        let mut builder = BlockBuilder::default();
        for record in records {
            assert_eq!(encoded_len(&record.as_ref()), {
                let mut bytes = Vec::new();
                encode(&record.as_ref(), &mut bytes);
                bytes.len()
            });
            builder.push(&record.as_ref());
        }
        let mut out = AlignedBuf::with_capacity(0);
        let mut packer = codec::Packer::new(1);
        let handle = builder.finish(&mut out, 9, 1024, &mut packer, Codec::None);
        Block::parse(out, 0, handle, 9).unwrap()
    }

    #[test]
    fn equal_tokens_are_told_apart_by_key() {
        let keys: Vec<Vec<u8>> = (0..200u32).map(|n| n.to_be_bytes().to_vec()).collect();
        let records: Vec<Record> = keys.iter().map(|key| record(42, key)).collect();
        let block = block_of(&records);
        for key in &keys {
            assert_eq!(block.get(Token(42), NamespaceId(1), key).unwrap().key, key.as_slice());
        }
        assert!(block.get(Token(42), NamespaceId(2), &keys[3]).is_none());
        assert!(block.get(Token(42), NamespaceId(1), b"absent").is_none());
        assert!(block.get(Token(41), NamespaceId(1), &keys[3]).is_none());
        assert!(block.get(Token(43), NamespaceId(1), &keys[3]).is_none());
    }

    #[test]
    fn positions_follow_the_range() {
        let block = block_of(&[record(1, b"a"), record(5, b"b"), record(5, b"c"), record(9, b"d")]);
        let range = |first, last| TokenRange { first: Token(first), last: Token(last) };
        assert_eq!(block.positions(range(0, 10)), 0..4);
        assert_eq!(block.positions(range(5, 5)), 1..3);
        assert_eq!(block.positions(range(6, 8)), 3..3);
        assert_eq!(block.positions(range(10, 11)), 4..4);
    }
}
