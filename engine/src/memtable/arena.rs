//! Where the memtable's entries lie: chunks that are filled front to back and never move.
//!
//! Invariant: a [`Place`] stays valid until its entry is released or the arena is dropped, because
//! growth adds a chunk and never copies one. A place is 32 bits: chunk number, then offset in
//! units of two bytes. An entry too long for a shared chunk has one of its own, of its exact size.
//! On the write path below `memtable/mod.rs`, on the read path its last step.

/// Offsets are multiples of this many bytes, so that 32 bits reach 8 GiB.
const UNIT: usize = 2;
const CHUNK_SIZE_MIN: usize = 16 << 10;
const CHUNK_SIZE_MAX: usize = 256 << 10;

/// Where an entry begins. Zero is never given, so that a zeroed slot is a free one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(pub(super) u32);

impl Place {
    pub(super) const NONE: Place = Place(0);
}

/// Chunks of memory with a count of all that is allocated.
pub(super) struct Arena {
    chunks: Vec<Vec<u8>>,
    /// Numbers of chunks that were released.
    vacant: Vec<usize>,
    /// The shared chunk being filled, or `usize::MAX`.
    open: usize,
    chunk_size: usize,
    /// Bits of a place that hold the offset inside its chunk.
    offset_bits: u32,
    allocated: usize,
}

impl Arena {
    /// An empty arena, its chunk size fit for `budget` bytes in all.
    pub(super) fn new(budget: usize) -> Arena {
        let chunk_size = (budget / 64).clamp(CHUNK_SIZE_MIN, CHUNK_SIZE_MAX).next_power_of_two();
        Arena {
            chunks: Vec::new(),
            vacant: Vec::new(),
            open: usize::MAX,
            chunk_size,
            offset_bits: (chunk_size / UNIT).ilog2(),
            allocated: 0,
        }
    }

    /// Bytes allocated, used or not, with the chunks' own headers.
    pub(super) fn bytes(&self) -> usize {
        self.allocated
            + self.chunks.capacity() * size_of::<Vec<u8>>()
            + self.vacant.capacity() * size_of::<usize>()
    }

    /// Whether fewer than one in sixteen of all chunk numbers are left.
    pub(super) fn is_nearly_exhausted(&self) -> bool {
        let most = 1usize << (32 - self.offset_bits);
        self.chunks.len() >= most - most / 16
    }

    /// Bytes that an entry of `len` bytes takes up.
    pub(super) fn rounded(len: usize) -> usize {
        len.next_multiple_of(UNIT)
    }

    /// Copies the parts, one after another, to a new place.
    pub(super) fn append(&mut self, parts: [&[u8]; 3]) -> Place {
        let len = Arena::rounded(parts.iter().map(|part| part.len()).sum());
        let chunk = if len > self.chunk_size / 8 {
            self.add_chunk(len)
        } else {
            let room = self.chunks.get(self.open).map_or(0, |chunk| chunk.capacity() - chunk.len());
            if room < len {
                self.open = self.add_chunk(self.chunk_size);
            }
            self.open
        };
        let bytes = &mut self.chunks[chunk];
        let offset = bytes.len();
        for part in parts {
            bytes.extend_from_slice(part);
        }
        bytes.resize(offset + len, 0);
        let number = (chunk << self.offset_bits) | (offset / UNIT);
        Place(u32::try_from(number + 1).expect("sealed before the places run out"))
    }

    /// Bytes of the chunks.
    pub(super) fn held(&self) -> usize {
        self.allocated
    }

    /// Drops chunks of about so many bytes; false when there was none. No place is valid after it.
    pub(super) fn dismantle(&mut self, bytes: usize) -> bool {
        let mut dropped = 0;
        while dropped < bytes
            && let Some(chunk) = self.chunks.pop()
        {
            dropped += chunk.capacity();
        }
        self.allocated -= dropped;
        dropped > 0
    }

    fn add_chunk(&mut self, size: usize) -> usize {
        let chunk = Vec::with_capacity(size);
        self.allocated += chunk.capacity();
        if let Some(number) = self.vacant.pop() {
            self.chunks[number] = chunk;
            return number;
        }
        self.chunks.push(chunk);
        self.chunks.len() - 1
    }

    fn locate(&self, place: Place) -> (usize, usize) {
        debug_assert_ne!(place, Place::NONE);
        let number = (place.0 - 1) as usize;
        (number >> self.offset_bits, (number & ((1 << self.offset_bits) - 1)) * UNIT)
    }

    /// The bytes from this place to the end of what its chunk holds.
    #[inline]
    pub(super) fn tail(&self, place: Place) -> &[u8] {
        let (chunk, offset) = self.locate(place);
        &self.chunks[chunk][offset..]
    }

    /// The same, to write.
    pub(super) fn tail_mut(&mut self, place: Place) -> &mut [u8] {
        let (chunk, offset) = self.locate(place);
        &mut self.chunks[chunk][offset..]
    }

    /// Gives the memory back if the entry had a chunk of its own. `rounded` is its whole size.
    /// An entry in a shared chunk stays as waste, counted until the arena is dropped.
    pub(super) fn release(&mut self, place: Place, rounded: usize) {
        if rounded > self.chunk_size / 8 {
            let (chunk, _) = self.locate(place);
            self.allocated -= self.chunks[chunk].capacity();
            self.chunks[chunk] = Vec::new();
            self.vacant.push(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_distinct_and_keep_their_bytes() {
        let mut arena = Arena::new(0);
        let mut given = Vec::new();
        for i in 0..5000usize {
            let len = if i % 500 == 0 { 40_000 } else { i % 300 };
            let bytes = vec![i.to_le_bytes()[0]; len];
            given.push((arena.append([&bytes, b"x", b""]), bytes));
        }
        for (place, bytes) in &given {
            assert_eq!(&arena.tail(*place)[..bytes.len()], &bytes[..]);
            assert_eq!(arena.tail(*place)[bytes.len()], b'x');
        }
    }

    #[test]
    fn a_released_large_entry_gives_its_memory_back() {
        let mut arena = Arena::new(0);
        arena.append([b"small", b"", b""]);
        let before = arena.bytes();
        let place = arena.append([&vec![7; 1 << 20], b"", b""]);
        assert!(arena.bytes() >= before + (1 << 20));
        arena.release(place, 1 << 20);
        assert!(arena.bytes() < before + 4096);
        let chunks = arena.chunks.len();
        assert_eq!(arena.append([&vec![7; 1 << 20], b"", b""]), place);
        assert_eq!(arena.chunks.len(), chunks);
    }
}
