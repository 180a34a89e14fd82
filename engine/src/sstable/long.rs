//! Blocks of one record with a long value: the value lies in parts, each packed and checked alone.
//!
//! Invariant: whoever writes or reads such a block does a bounded piece of work between two
//! awaits, and has no buffer of the value's size: a packed part is [`PART_SIZE`] bytes of the
//! value, and comes into memory as a piece of it. A block that is used has passed all its
//! checksums, as any other. Below `block.rs`, which asks no more than where the record is; `table.rs` reads the
//! parts and `writer.rs` writes them; the layout is in `format.rs`.

use std::future::Future;
use std::mem::{replace, size_of};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::codec;
use super::format::{BLOCK_UNIT, BlockHandle, BlockHeader, Codec, Invalid, LongHead, LongPart};
use crate::checksum;
use crate::model::limits::{KEY_SIZE_MAX, VALUE_SIZE_CEILING};
use crate::model::{Kind, Piece, RecordRef, Value};

/// Bytes of a value that a part holds; the last part may hold fewer. Packing one takes 60 to 150
/// us; a large value in parts of this size packs to within a few percent of what it does whole.
pub(crate) const PART_SIZE: usize = 32 << 10;
/// Longest value of a record that shares a block's layout with others, in bytes.
const SHORT_VALUE_MAX: usize = 2 * PART_SIZE;
/// Blocks above this are looked at before they are read: they may be in parts.
pub(crate) const SHORT_BLOCK_MAX: u32 = 80 << 10;
/// Bytes that hold the head of any block.
pub(crate) const HEAD_SIZE_MAX: usize = 16 << 10;
/// Longest encoded record without key and value.
const RECORD_FIELDS_MAX: usize = 64;

const HEADER: usize = size_of::<BlockHeader>();

const _: () = assert!(
    HEADER
        + size_of::<LongHead>()
        + VALUE_SIZE_CEILING.div_ceil(PART_SIZE) * size_of::<LongPart>()
        + RECORD_FIELDS_MAX
        + KEY_SIZE_MAX
        + BLOCK_UNIT
        <= HEAD_SIZE_MAX
);

/// Whether a record gets a block in parts.
#[inline]
pub(crate) fn is_long(record: &RecordRef<'_>) -> bool {
    (SHORT_VALUE_MAX + 1..=VALUE_SIZE_CEILING).contains(&record.value.len())
        && record.kind == Kind::Put
}

/// The checked head of a block in parts.
#[derive(Debug)]
pub(crate) struct Head {
    codec: Codec,
    value_size: usize,
    parts: Vec<LongPart>,
    /// Where each part begins in the block, and where the last one ends, padding included.
    starts: Vec<usize>,
    /// The payload of a block that has the record without its value.
    pub(crate) payload: Box<[u8]>,
}

impl Head {
    /// Reads and checks the head at the front of `bytes`, which hold at least it. `None` for a
    /// block that is not in parts.
    pub(crate) fn parse(
        bytes: &[u8],
        handle: BlockHandle,
        salt: u64,
    ) -> Result<Option<Head>, Invalid> {
        let header = BlockHeader::parse(bytes)?;
        if !header.is_in_parts() {
            return Ok(None);
        }
        let fields = bytes.get(HEADER..HEADER + size_of::<LongHead>());
        let head: LongHead =
            bytemuck::pod_read_unaligned(fields.ok_or("a block in parts has no head")?);
        let (value_size, count) = (head.value_size as usize, head.part_count as usize);
        if value_size > VALUE_SIZE_CEILING || count != value_size.div_ceil(PART_SIZE) {
            return Err("a block in parts declares another number of them");
        }
        if head.record_size as usize > RECORD_FIELDS_MAX + KEY_SIZE_MAX {
            return Err("a block in parts declares a record longer than any");
        }
        if head.head_size as usize != head.expected_size() {
            return Err("a block in parts declares another length of its head");
        }
        let whole = bytes
            .get(..head.head_size as usize)
            .ok_or("a block in parts is shorter than its head")?;
        if checksum::salted(salt, handle.offset, &whole[4..]) != header.checksum {
            return Err("a checksum does not match: damaged, or not of this table and place");
        }
        let table = HEADER + size_of::<LongHead>();
        let record = table + count * size_of::<LongPart>();
        let parts: Vec<LongPart> = whole[table..record]
            .chunks_exact(size_of::<LongPart>())
            .map(bytemuck::pod_read_unaligned)
            .collect();
        let mut starts = Vec::with_capacity(count + 1);
        let mut end = head.head_size as usize;
        for (index, part) in parts.iter().enumerate() {
            if part.stored_size as usize > part_size(value_size, index) {
                return Err("a part of a block is longer than what it holds");
            }
            starts.push(end);
            end += part.stored_size as usize;
        }
        starts.push(end.next_multiple_of(BLOCK_UNIT));
        if starts.last() != Some(&(handle.len as usize))
            || header.block_len() != handle.len as usize
        {
            return Err("a block's length differs from the index");
        }
        let codec = Codec::from_u8(header.codec).ok_or("a block has an unknown codec")?;
        let end = record + head.record_size as usize;
        let payload = [&head.token.to_le_bytes()[..], &[0; 2], &whole[record..end]].concat();
        Ok(Some(Head { codec, value_size, parts, starts, payload: payload.into() }))
    }

    /// Parts.
    pub(crate) fn count(&self) -> usize {
        self.parts.len()
    }

    /// Where in the block these parts lie; the last part of all with the padding behind it.
    pub(crate) fn span(&self, parts: Range<usize>) -> Range<usize> {
        self.starts[parts.start]..self.starts[parts.end]
    }

    /// The parts that end in the first `len` bytes of the block.
    pub(crate) fn before(&self, len: usize) -> Range<usize> {
        0..self.starts[1..].partition_point(|end| *end <= len)
    }

    /// The parts from this one on that lie in at most `bytes` bytes; at least one.
    pub(crate) fn fitting(&self, first: usize, bytes: usize) -> Range<usize> {
        let start = self.starts[first];
        let more =
            (first + 1..self.count()).take_while(|end| self.starts[end + 1] - start <= bytes);
        first..more.last().unwrap_or(first) + 1
    }

    /// Checks a part as stored, of the block at `block_offset`, and makes it a piece of the value.
    /// A part that is not packed is not copied.
    pub(crate) fn piece(
        &self,
        index: usize,
        stored: &Piece,
        block_offset: u64,
        salt: u64,
    ) -> Result<Piece, Invalid> {
        let offset = block_offset + self.starts[index] as u64;
        if checksum::salted(salt, offset, stored.bytes()) != self.parts[index].checksum {
            return Err("a checksum does not match: damaged, or not of this table and place");
        }
        let (size, raw_size) =
            (self.parts[index].stored_size as usize, part_size(self.value_size, index));
        if size == raw_size {
            return Ok(stored.part(0, size));
        }
        if self.codec == Codec::None {
            return Err("an unpacked block has packed parts");
        }
        let raw = codec::unpack(self.codec, &stored.bytes()[..size], raw_size)?;
        Ok(Piece::new(raw.into_vec()))
    }
}

/// Bytes of the value that a part holds.
fn part_size(value_size: usize, index: usize) -> usize {
    PART_SIZE.min(value_size - index * PART_SIZE)
}

/// Hands out a value part by part, side by side.
pub(crate) struct Parts<'a> {
    value: Box<dyn Iterator<Item = &'a [u8]> + 'a>,
    rest: &'a [u8],
    gathered: Vec<u8>,
}

impl<'a> Parts<'a> {
    pub(crate) fn new(value: Value<'a>) -> Parts<'a> {
        Parts { value: Box::new(value.parts()), rest: &[], gathered: Vec::new() }
    }

    /// The next [`PART_SIZE`] bytes, or what is left of them; empty at the end.
    pub(crate) fn next(&mut self) -> &[u8] {
        self.gathered.clear();
        while self.gathered.len() < PART_SIZE {
            if self.rest.is_empty() {
                let Some(rest) = self.value.next() else { break };
                self.rest = rest;
            }
            let wanted = (PART_SIZE - self.gathered.len()).min(self.rest.len());
            let (head, rest) = self.rest.split_at(wanted);
            self.rest = rest;
            if self.gathered.is_empty() && head.len() == PART_SIZE {
                return head;
            }
            self.gathered.extend_from_slice(head);
        }
        &self.gathered
    }
}

/// Lets other tasks run once.
#[derive(Default)]
pub(super) struct YieldOnce {
    yielded: bool,
}

impl Future for YieldOnce {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if replace(&mut self.yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
