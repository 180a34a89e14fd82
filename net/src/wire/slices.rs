//! Long messages: cut into slices on the way out, put together on the way in. Used by both ends.
//!
//! Invariants: a slice is one frame of at most 32 KiB, so a 1 MiB value never stands in the way
//! of a small message for longer than that; [`Reassembly`] allocates only for bytes that have
//! arrived, and its messages, their sizes and their sum are bounded. On neither way does a long
//! message lie in one buffer: it is a chain of pieces of a slice each, and on the way out the
//! pieces of its value are shared with whoever else has them.

use std::collections::VecDeque;

use annulus_engine::model::value::PIECE_SIZE;
use annulus_engine::model::{Piece, Pieces};

use super::codec::{Reader, size_u32};
use super::frame::{
    FRAME_BODY_MAX, FrameError, FrameHeader, HEADER_SIZE, SLICE_HEADER_SIZE, SLICE_SIZE, flag,
};
use crate::wire::decoder::Frame;

// A full slice is a piece as it is.
const _: () = assert!(PIECE_SIZE == SLICE_SIZE);

/// The fields of a header that the message's sender chooses.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "each field is documented in FrameHeader")]
pub struct Head {
    pub request_id: u32,
    pub time_or_window: u32,
    pub code: u16,
    pub opcode: u8,
    pub flags: u8,
}

/// A long message on its way out.
#[derive(Debug)]
struct Outgoing {
    head: Head,
    body: Pieces,
    /// Bytes of `body` already sent.
    offset: usize,
    /// The piece that comes next, and how much of it was sent.
    next: (usize, usize),
}

impl Outgoing {
    /// Appends the next `size` bytes, which are there.
    fn take(&mut self, mut size: usize, out: &mut Vec<u8>) {
        self.offset += size;
        while size > 0 {
            let (index, at) = self.next;
            let rest = &self.body.list()[index].bytes()[at..];
            let taken = rest.len().min(size);
            out.extend_from_slice(&rest[..taken]);
            size -= taken;
            self.next = if taken == rest.len() { (index + 1, 0) } else { (index, at + taken) };
        }
    }
}

/// Turns messages into frames of one direction of a connection.
///
/// Every byte of that direction must come from one `FrameWriter`, in the order it gave them:
/// each frame's checksum covers its position in the stream.
#[derive(Debug, Default)]
pub struct FrameWriter {
    position: u64,
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
}

impl FrameWriter {
    /// Appends a message of exactly `size` body bytes, written by `fill`. A body over 32 KiB is
    /// queued instead, for [`FrameWriter::flush_slices`]. Costs one copy of the body; a long one
    /// two.
    #[inline]
    pub fn message(
        &mut self,
        out: &mut Vec<u8>,
        head: Head,
        size: usize,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        if size <= FRAME_BODY_MAX {
            out.reserve(HEADER_SIZE + size);
            let start = out.len();
            out.extend_from_slice(&[0; HEADER_SIZE]);
            fill(out);
            debug_assert_eq!(out.len() - start - HEADER_SIZE, size, "announced body size");
            self.seal(out, start, head);
        } else {
            let mut body = Vec::with_capacity(size);
            fill(&mut body);
            self.long_message(head, body.into());
        }
    }

    /// Appends a message whose body exists already; a long one is queued without a copy.
    pub fn owned_message(&mut self, out: &mut Vec<u8>, head: Head, body: Vec<u8>) {
        if body.len() <= FRAME_BODY_MAX {
            self.message(out, head, body.len(), |out| out.extend_from_slice(&body));
        } else {
            self.long_message(head, body.into());
        }
    }

    /// Appends slices of the queued messages, one of each in turn, until `out` has `until` bytes
    /// or nothing is queued. Call whenever `out` runs low.
    pub fn flush_slices(&mut self, out: &mut Vec<u8>, until: usize) {
        while out.len() < until {
            let Some(mut message) = self.queue.pop_front() else { return };
            let size = SLICE_SIZE.min(message.body.len() - message.offset);
            let start = out.len();
            out.reserve(HEADER_SIZE + SLICE_HEADER_SIZE + SLICE_SIZE);
            out.extend_from_slice(&[0; HEADER_SIZE]);
            out.extend_from_slice(&size_u32(message.body.len()).to_le_bytes());
            out.extend_from_slice(&size_u32(message.offset).to_le_bytes());
            message.take(size, out);
            let head = Head { flags: message.head.flags | flag::SLICE, ..message.head };
            self.seal(out, start, head);
            self.queued_bytes -= size;
            if message.offset < message.body.len() {
                self.queue.push_back(message);
            }
        }
    }

    /// Bytes of long messages not yet turned into frames.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Both ends have agreed that the stream goes on at another position.
    pub fn set_position(&mut self, position: u64) {
        self.position = position;
    }

    /// Queues a message of more than 32 KiB for [`FrameWriter::flush_slices`]. Copies nothing.
    pub fn long_message(&mut self, head: Head, body: Pieces) {
        debug_assert!(body.len() > FRAME_BODY_MAX, "others are one frame");
        self.queued_bytes += body.len();
        self.queue.push_back(Outgoing { head, body, offset: 0, next: (0, 0) });
    }

    /// Writes the header of the frame whose body is `out[start + HEADER_SIZE..]`.
    #[inline]
    fn seal(&mut self, out: &mut [u8], start: usize, head: Head) {
        let body = &out[start + HEADER_SIZE..];
        let header = FrameHeader {
            body_size: size_u32(body.len()),
            request_id: head.request_id,
            time_or_window: head.time_or_window,
            code: head.code,
            opcode: head.opcode,
            flags: head.flags,
            body_checksum: crc32c::crc32c(body),
        };
        let size = header.frame_size();
        out[start..start + HEADER_SIZE].copy_from_slice(&header.encode(self.position));
        self.position = self.position.wrapping_add(size as u64);
    }
}

/// Bounds of a [`Reassembly`].
#[derive(Clone, Copy, Debug)]
pub struct ReassemblyLimits {
    /// Messages in the making at once.
    pub messages_max: usize,
    /// Size of one message, in bytes.
    pub message_size_max: usize,
    /// Bytes held for all of them together.
    pub bytes_max: usize,
}

/// What became of a slice.
#[derive(Debug)]
pub enum Gathered {
    /// More slices must come.
    Unfinished {
        /// Whether this slice was the first of its message.
        first: bool,
    },
    /// The message is whole: the header of its first slice, and its body.
    Whole(FrameHeader, Pieces),
    /// The first slice of a message that is larger than the limit. Its other slices are dropped.
    TooBig,
    /// The first slice, but no room: too many messages or bytes. Its other slices are dropped.
    NoRoom,
    /// A slice of a message that was refused at its first slice.
    Dropped,
}

/// A message in the making.
#[derive(Debug)]
struct Incoming {
    header: FrameHeader,
    total: usize,
    pieces: Vec<Piece>,
    /// What came last, not yet a piece: slices that are shorter than they could be are gathered.
    open: Vec<u8>,
    /// Bytes that have arrived.
    size: usize,
}

impl Incoming {
    fn new(header: FrameHeader, total: usize, slice: &[u8]) -> Incoming {
        let (pieces, open, size) = (Vec::new(), slice.to_vec(), slice.len());
        Incoming { header, total, pieces, open, size }
    }

    fn add(&mut self, slice: &[u8]) {
        self.size += slice.len();
        if self.open.len() + slice.len() > PIECE_SIZE {
            self.close();
            self.open = slice.to_vec();
        } else {
            self.open.extend_from_slice(slice);
        }
    }

    fn close(&mut self) {
        // Short slices made it grow by doubling; what it grew too much is given back.
        self.open.shrink_to_fit();
        self.pieces.push(Piece::new(std::mem::take(&mut self.open)));
    }

    fn whole(mut self) -> (FrameHeader, Pieces) {
        self.close();
        (self.header, Pieces::new(self.pieces))
    }
}

/// Puts slices together again.
#[derive(Debug)]
pub struct Reassembly {
    limits: ReassemblyLimits,
    messages: Vec<Incoming>,
    /// Bytes that have arrived of unfinished messages.
    bytes: usize,
    /// Bytes that unfinished messages will have in the end; what `bytes_max` bounds.
    announced: usize,
}

impl Reassembly {
    /// Nothing in the making. Allocates nothing.
    #[must_use]
    pub fn new(limits: ReassemblyLimits) -> Reassembly {
        Reassembly { limits, messages: Vec::new(), bytes: 0, announced: 0 }
    }

    /// The bounds.
    #[must_use]
    pub fn limits(&self) -> ReassemblyLimits {
        self.limits
    }

    /// Changes the bounds, for messages that begin later.
    pub fn set_limits(&mut self, limits: ReassemblyLimits) {
        self.limits = limits;
    }

    /// Bytes that have arrived of unfinished messages.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether no message is in the making.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Gives up an unfinished message; its other slices are dropped.
    pub fn forget(&mut self, request_id: u32) {
        if let Some(index) = self.messages.iter().position(|m| m.header.request_id == request_id) {
            let message = self.messages.swap_remove(index);
            self.bytes -= message.size;
            self.announced -= message.total;
        }
    }

    /// Adds a slice.
    ///
    /// # Errors
    /// [`FrameError::BadSlice`] when it contradicts what came before; the connection must close.
    pub fn add(&mut self, frame: &Frame<'_>) -> Result<Gathered, FrameError> {
        let header = frame.header;
        let mut reader = Reader::new(frame.body);
        let total = reader.u32()? as usize;
        let offset = reader.u32()? as usize;
        let piece = reader.rest();
        let end = offset.checked_add(piece.len()).ok_or(FrameError::BadSlice)?;
        if piece.is_empty() || end > total {
            return Err(FrameError::BadSlice);
        }
        let index = self.messages.iter().position(|m| m.header.request_id == header.request_id);
        match (index, offset) {
            (None, 0) if total > self.limits.message_size_max => Ok(Gathered::TooBig),
            (None, 0)
                if self.messages.len() >= self.limits.messages_max
                    || self.announced + total > self.limits.bytes_max =>
            {
                Ok(Gathered::NoRoom)
            }
            (None, 0) => {
                if end == total {
                    return Ok(Gathered::Whole(header, piece.to_vec().into()));
                }
                self.bytes += piece.len();
                self.announced += total;
                self.messages.push(Incoming::new(header, total, piece));
                Ok(Gathered::Unfinished { first: true })
            }
            (None, _) => Ok(Gathered::Dropped),
            (Some(index), _) => {
                let message = &mut self.messages[index];
                if message.total != total
                    || message.size != offset
                    || message.header.opcode != header.opcode
                {
                    return Err(FrameError::BadSlice);
                }
                message.add(piece);
                self.bytes += piece.len();
                if end < total {
                    return Ok(Gathered::Unfinished { first: false });
                }
                let message = self.messages.swap_remove(index);
                self.bytes -= total;
                self.announced -= total;
                let (header, body) = message.whole();
                Ok(Gathered::Whole(header, body))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::decoder::FrameDecoder;
    use proptest::prelude::*;

    const LIMITS: ReassemblyLimits =
        ReassemblyLimits { messages_max: 4, message_size_max: 200_000, bytes_max: 400_000 };

    fn head(request_id: u32) -> Head {
        Head { request_id, opcode: 4, ..Head::default() }
    }

    /// All messages of a stream: whole frames as they are, slices put together.
    fn messages(bytes: &[u8], reassembly: &mut Reassembly) -> Vec<(u32, Vec<u8>)> {
        let (mut decoder, mut input, mut found) = (FrameDecoder::new(), bytes, Vec::new());
        while let Some(frame) = decoder.next(&mut input).unwrap() {
            if !frame.header.is_slice() {
                found.push((frame.header.request_id, frame.body.to_vec()));
            } else if let Gathered::Whole(header, body) = reassembly.add(&frame).unwrap() {
                found.push((header.request_id, body.value().to_vec()));
            }
        }
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn long_messages_arrive_whole_whatever_their_size(sizes in prop::collection::vec(0usize..100_000, 1..4)) {
            let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
            let mut expected = Vec::new();
            for (id, &size) in sizes.iter().enumerate() {
                let id = u32::try_from(id).unwrap();
                let body: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
                writer.message(&mut out, head(id), size, |out| out.extend_from_slice(&body));
                expected.push((id, body));
            }
            writer.flush_slices(&mut out, usize::MAX);
            prop_assert_eq!(writer.queued_bytes(), 0);
            let mut reassembly = Reassembly::new(LIMITS);
            let mut found = messages(&out, &mut reassembly);
            found.sort();
            prop_assert_eq!(found, expected);
            prop_assert_eq!((reassembly.bytes(), reassembly.is_empty()), (0, true));
        }
    }

    #[test]
    fn a_small_message_overtakes_a_long_one() {
        let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
        writer.owned_message(&mut out, head(1), vec![1; 150_000]);
        writer.flush_slices(&mut out, 1);
        writer.message(&mut out, head(2), 1, |out| out.push(2));
        writer.flush_slices(&mut out, usize::MAX);
        let order: Vec<u32> =
            messages(&out, &mut Reassembly::new(LIMITS)).iter().map(|m| m.0).collect();
        assert_eq!(order, [2, 1]);
    }

    #[test]
    fn long_messages_take_turns() {
        let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
        writer.owned_message(&mut out, head(1), vec![1; 150_000]);
        writer.owned_message(&mut out, head(2), vec![2; 40_000]);
        writer.flush_slices(&mut out, usize::MAX);
        let order: Vec<u32> =
            messages(&out, &mut Reassembly::new(LIMITS)).iter().map(|m| m.0).collect();
        assert_eq!(order, [2, 1]);
    }

    #[test]
    fn what_is_over_a_bound_is_refused_at_its_first_slice_and_then_dropped() {
        let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
        writer.owned_message(&mut out, head(1), vec![1; 200_001]);
        writer.flush_slices(&mut out, usize::MAX);
        let (mut decoder, mut input, mut reassembly) =
            (FrameDecoder::new(), &out[..], Reassembly::new(LIMITS));
        let first = decoder.next(&mut input).unwrap().unwrap();
        assert!(matches!(reassembly.add(&first).unwrap(), Gathered::TooBig));
        while let Some(frame) = decoder.next(&mut input).unwrap() {
            assert!(matches!(reassembly.add(&frame).unwrap(), Gathered::Dropped));
        }
        assert_eq!(reassembly.bytes(), 0);
    }

    #[test]
    fn slices_that_contradict_each_other_are_refused() {
        let slice = |total: u32, offset: u32, piece: &[u8]| {
            let mut body = total.to_le_bytes().to_vec();
            body.extend_from_slice(&offset.to_le_bytes());
            body.extend_from_slice(piece);
            body
        };
        let header = FrameHeader { request_id: 1, flags: flag::SLICE, ..FrameHeader::default() };
        let cases = [
            vec![slice(10, 0, b"")],
            vec![slice(10, 0, b"12345678901")],
            vec![slice(10, u32::MAX, b"1")],
            vec![slice(10, 0, b"12"), slice(10, 3, b"4")],
            vec![slice(10, 0, b"12"), slice(11, 2, b"3")],
            vec![slice(10, 0, b"12"), slice(10, 0, b"12")],
            vec![b"1234567".to_vec()],
        ];
        for case in cases {
            let mut reassembly = Reassembly::new(LIMITS);
            let mut last = Ok(Gathered::Dropped);
            for body in &case {
                last = reassembly.add(&Frame { header, body, raw: &[] });
            }
            assert_eq!(last.unwrap_err(), FrameError::BadSlice, "{case:?}");
        }
    }
}
