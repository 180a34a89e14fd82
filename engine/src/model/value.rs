//! Values: one slice, or the pieces of a large one, shared by count.
//!
//! Invariant: the bytes of a [`Pieces`] never change and are nowhere copied to be passed on, so a
//! large value is one chain of small allocations from the socket to the memtable, and from a
//! memtable or a block to the socket. Nothing needs a value's bytes side by side but the state of
//! a key with siblings, which is therefore always one slice.
//!
//! Who takes a [`Value`] apart goes through [`Value::parts`]; for one slice that is the slice, and
//! costs a branch.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use crate::buffer::AlignedBuf;

/// Bytes of a piece at most, where pieces are made by copying: what a frame's slice holds. Small
/// enough for the allocator to keep: memory of this size is used again without a page fault.
pub const PIECE_SIZE: usize = (32 << 10) - 8;

/// Memory of a piece. Counted by atomics because a piece may go to another shard with its message;
/// that is one count every 32 KiB.
#[derive(Debug)]
enum Memory {
    Heap(Vec<u8>),
    Read(AlignedBuf),
}

/// A part of some memory that never changes again.
#[derive(Clone)]
pub struct Piece {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
}

impl Piece {
    /// These bytes, without a copy.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Piece {
        let len = bytes.len();
        Piece { memory: Arc::new(Memory::Heap(bytes)), start: 0, len }
    }

    /// A buffer that was read, without a copy.
    #[must_use]
    pub fn read(buf: AlignedBuf) -> Piece {
        let len = buf.len();
        Piece { memory: Arc::new(Memory::Read(buf)), start: 0, len }
    }

    /// A part of the piece, which shares its memory.
    ///
    /// # Panics
    /// If the part does not lie in the piece.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> Piece {
        assert!(start <= self.len && len <= self.len - start, "a part of the piece");
        Piece { memory: Arc::clone(&self.memory), start: self.start + start, len }
    }

    /// The bytes.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let memory: &[u8] = match &*self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Read(buf) => buf,
        };
        &memory[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Piece({} bytes)", self.len)
    }
}

/// Bytes in pieces. Cheap to clone: clones share the list.
#[derive(Clone, Debug)]
pub struct Pieces {
    list: Arc<[Piece]>,
    len: usize,
}

impl Default for Pieces {
    fn default() -> Pieces {
        Pieces { list: Arc::new([]), len: 0 }
    }
}

impl Pieces {
    /// These pieces, one after another; empty ones are left out.
    #[must_use]
    pub fn new(pieces: Vec<Piece>) -> Pieces {
        let len = pieces.iter().map(|piece| piece.len).sum();
        Pieces { list: pieces.into_iter().filter(|piece| piece.len > 0).collect(), len }
    }

    /// A copy of the value in pieces of [`PIECE_SIZE`]; of one that is in pieces already, the
    /// pieces.
    #[must_use]
    pub fn of(value: Value<'_>) -> Pieces {
        match value {
            Value::Pieces(pieces) => pieces.clone(),
            Value::Whole(bytes) => {
                let piece = |bytes: &[u8]| Piece::new(bytes.to_vec());
                Pieces::new(bytes.chunks(PIECE_SIZE).map(piece).collect())
            }
        }
    }

    /// Bytes of all pieces.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    #[must_use]
    pub fn list(&self) -> &[Piece] {
        &self.list
    }

    /// Bytes of memory that the list takes beside the pieces' own bytes.
    #[must_use]
    pub fn overhead(&self) -> usize {
        // What the allocator adds to a piece and to its count is about a cache line each.
        self.list.len() * (size_of::<Piece>() + size_of::<Memory>() + 48) + 32
    }

    /// All but the first `count` bytes, which must be there. Shares the memory.
    #[must_use]
    pub fn skip(&self, count: usize) -> Pieces {
        assert!(count <= self.len, "no more than there is");
        let mut left = count;
        let mut rest = Vec::with_capacity(self.list.len());
        for piece in self.list.iter() {
            let skipped = left.min(piece.len);
            left -= skipped;
            rest.push(piece.part(skipped, piece.len - skipped));
        }
        Pieces::new(rest)
    }

    /// The bytes as a value: one slice if there is but one piece.
    #[inline]
    #[must_use]
    pub fn value(&self) -> Value<'_> {
        match &*self.list {
            [] => Value::Whole(&[]),
            [only] => Value::Whole(only.bytes()),
            _ => Value::Pieces(self),
        }
    }
}

impl From<Vec<u8>> for Pieces {
    fn from(bytes: Vec<u8>) -> Pieces {
        Pieces::new(vec![Piece::new(bytes)])
    }
}

/// A value that lies in somebody else's memory.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    /// Side by side.
    Whole(&'a [u8]),
    /// In pieces.
    Pieces(&'a Pieces),
}

// Records are passed by reference and copied often: the second form must not make them longer.
const _: () = assert!(size_of::<Value<'_>>() == size_of::<&[u8]>());

impl<'a> Value<'a> {
    /// No bytes.
    pub const EMPTY: Value<'static> = Value::Whole(&[]);

    /// Bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Value::Whole(bytes) => bytes.len(),
            Value::Pieces(pieces) => pieces.len(),
        }
    }

    /// Whether there are no bytes.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes if they lie side by side.
    #[inline]
    #[must_use]
    pub fn whole(&self) -> Option<&'a [u8]> {
        match self {
            Value::Whole(bytes) => Some(bytes),
            Value::Pieces(_) => None,
        }
    }

    /// The bytes, part by part.
    #[inline]
    pub fn parts(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let (whole, list) = match *self {
            Value::Whole(bytes) => (Some(bytes), &[][..]),
            Value::Pieces(pieces) => (None, &*pieces.list),
        };
        whole.into_iter().chain(list.iter().map(Piece::bytes))
    }

    /// The bytes side by side; those of pieces are copied. Not for what must not stall.
    #[must_use]
    pub fn side_by_side(&self) -> Cow<'a, [u8]> {
        match self {
            Value::Whole(bytes) => Cow::Borrowed(bytes),
            Value::Pieces(_) => Cow::Owned(self.to_vec()),
        }
    }

    /// A copy, side by side.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        self.copy_to(&mut bytes);
        bytes
    }

    /// Appends the bytes.
    #[inline]
    pub fn copy_to(&self, out: &mut Vec<u8>) {
        match self {
            Value::Whole(bytes) => out.extend_from_slice(bytes),
            Value::Pieces(pieces) => {
                pieces.list.iter().for_each(|piece| out.extend_from_slice(piece.bytes()));
            }
        }
    }
}

impl Default for Value<'_> {
    fn default() -> Self {
        Value::EMPTY
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    #[inline]
    fn from(bytes: &'a [u8]) -> Value<'a> {
        Value::Whole(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Value<'a> {
    fn from(bytes: &'a [u8; N]) -> Value<'a> {
        Value::Whole(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Value<'a> {
    fn from(bytes: &'a Vec<u8>) -> Value<'a> {
        Value::Whole(bytes)
    }
}

impl Ord for Value<'_> {
    fn cmp(&self, other: &Value<'_>) -> Ordering {
        if let (Value::Whole(one), Value::Whole(other)) = (self, other) {
            return one.cmp(other);
        }
        let (mut ours, mut theirs) = (self.parts(), other.parts());
        let (mut one, mut two): (&[u8], &[u8]) = (&[], &[]);
        loop {
            if one.is_empty() {
                one = ours.find(|part| !part.is_empty()).unwrap_or_default();
            }
            if two.is_empty() {
                two = theirs.find(|part| !part.is_empty()).unwrap_or_default();
            }
            if one.is_empty() || two.is_empty() {
                return one.len().cmp(&two.len());
            }
            let len = one.len().min(two.len());
            match one[..len].cmp(&two[..len]) {
                Ordering::Equal => (one, two) = (&one[len..], &two[len..]),
                unequal => return unequal,
            }
        }
    }
}

impl PartialOrd for Value<'_> {
    fn partial_cmp(&self, other: &Value<'_>) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Value<'_> {
    #[inline]
    fn eq(&self, other: &Value<'_>) -> bool {
        self.len() == other.len() && self.cmp(other).is_eq()
    }
}

impl Eq for Value<'_> {}

impl PartialEq<[u8]> for Value<'_> {
    fn eq(&self, other: &[u8]) -> bool {
        *self == Value::Whole(other)
    }
}

impl PartialEq<&[u8]> for Value<'_> {
    fn eq(&self, other: &&[u8]) -> bool {
        *self == Value::Whole(other)
    }
}

impl<const N: usize> PartialEq<&[u8; N]> for Value<'_> {
    fn eq(&self, other: &&[u8; N]) -> bool {
        *self == Value::Whole(*other)
    }
}

impl<const N: usize> PartialEq<[u8; N]> for Value<'_> {
    fn eq(&self, other: &[u8; N]) -> bool {
        *self == Value::Whole(other)
    }
}

impl PartialEq<Vec<u8>> for Value<'_> {
    fn eq(&self, other: &Vec<u8>) -> bool {
        *self == Value::Whole(other)
    }
}

impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Whole(bytes) => bytes.fmt(f),
            Value::Pieces(pieces) => pieces.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes in pieces of these sizes, over and over.
    fn cut(bytes: &[u8], sizes: &[usize]) -> Pieces {
        let (mut rest, mut pieces) = (bytes, Vec::new());
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (head, tail) = rest.split_at((*size).min(rest.len()));
            pieces.push(Piece::new(head.to_vec()));
            rest = tail;
        }
        Pieces::new(pieces)
    }

    proptest! {
        #[test]
        fn however_bytes_are_cut_the_value_is_the_same(
            bytes in prop::collection::vec(0u8..3, 0..60),
            other in prop::collection::vec(0u8..3, 0..60),
            sizes in prop::collection::vec(1usize..9, 1..4),
            skip in 0usize..60,
        ) {
            let (pieces, others) = (cut(&bytes, &sizes), cut(&other, &[3]));
            let value = Value::Pieces(&pieces);
            prop_assert_eq!(value, Value::Whole(&bytes));
            prop_assert_eq!(value.to_vec(), &bytes[..]);
            prop_assert_eq!(value.parts().collect::<Vec<_>>().concat(), &bytes[..]);
            prop_assert_eq!(value.cmp(&Value::Pieces(&others)), bytes.cmp(&other));
            prop_assert_eq!(value == Value::Pieces(&others), bytes == other);
            let skip = skip.min(bytes.len());
            prop_assert_eq!(pieces.skip(skip).value().to_vec(), &bytes[skip..]);
        }
    }

    #[test]
    fn a_part_shares_the_memory_of_its_piece() {
        let mut buf = AlignedBuf::with_capacity(8);
        buf.extend_from_slice(b"01234567");
        let piece = Piece::read(buf);
        let part = piece.part(2, 3).part(1, 2);
        assert_eq!(part.bytes(), b"34");
        assert_eq!(part.bytes().as_ptr(), piece.bytes()[3..].as_ptr());
    }

    #[test]
    fn a_copy_has_pieces_of_a_slice() {
        let bytes = vec![7; 2 * PIECE_SIZE + 1];
        let sizes: Vec<usize> =
            Pieces::of(Value::Whole(&bytes)).list().iter().map(|piece| piece.len).collect();
        assert_eq!(sizes, [PIECE_SIZE, PIECE_SIZE, 1]);
    }
}
