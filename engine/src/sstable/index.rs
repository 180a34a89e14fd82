//! The token index: which one block may hold a key, decided in memory.
//!
//! Invariant: [`TokenIndex::locate`] names exactly one block for a key, the only one that can
//! hold it. A column of first tokens is searched through a radix directory over the table's own
//! interval: one load, then about one probe in a table that fills its interval evenly, a few in
//! one that holds scattered arcs of the ring. Not interpolation: with partial ownership it took
//! 34 probes on average. Where a run of equal tokens crosses from block to block, separators
//! (shortest keys between the blocks) tell them apart. On the read path after the filter.

use std::mem::size_of;
use std::ops::Range;

use super::format::{
    BLOCK_UNIT, BLOCKS_MAX, BlockHandle, IndexHeader, Invalid, RAW_LEN_MAX, SECTOR, SeparatorEntry,
    seal_section, verify_section,
};
use crate::model::{NamespaceId, Token, TokenRange};

/// [`BLOCK_UNIT`] in the type of a block's length.
const UNIT: u32 = 16;
const _: () = assert!(UNIT as usize == BLOCK_UNIT);

/// A block that begins inside a run of one token, and the key that begins it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Separator {
    block: u32,
    namespace: NamespaceId,
    key: Box<[u8]>,
}

/// A block: its first token and first unit. Side by side, so that what a lookup compares and
/// what it returns come with one cache line; in three words, so that none is lost to padding.
#[derive(Clone, Copy, Debug)]
struct Entry {
    token_low: u32,
    token_high: u32,
    unit: u32,
}

const _: () = assert!(size_of::<Entry>() == 12);

impl Entry {
    #[inline]
    fn token(self) -> u64 {
        (u64::from(self.token_high) << 32) | u64::from(self.token_low)
    }
}

/// The index of one table, in memory: 16 bytes a block, 20 at most.
#[derive(Clone, Debug)]
pub struct TokenIndex {
    /// The blocks, in order, and one entry behind the last for where it ends. Equal first tokens
    /// are a run across blocks.
    entries: Box<[Entry]>,
    separators: Box<[Separator]>,
    last_token: Token,
    directory: Directory,
}

/// Where in the column each equal slice of the table's interval begins.
#[derive(Clone, Debug)]
struct Directory {
    base: u64,
    shift: u32,
    /// Position of the first token at or above each slice's start; one more at the end.
    starts: Box<[u32]>,
}

impl Directory {
    /// About one slice a block.
    fn new(first_tokens: &[u64]) -> Directory {
        let base = first_tokens[0];
        let span = first_tokens[first_tokens.len() - 1] - base;
        let bits = first_tokens.len().next_power_of_two().ilog2();
        // Smallest shift that leaves less than 2^bits slices, at least one.
        let shift = (64 - span.leading_zeros()).saturating_sub(bits).min(63);
        let slices = usize::try_from(span >> shift).expect("below two per block") + 1;
        let mut starts = Vec::with_capacity(slices + 1);
        for (position, &token) in first_tokens.iter().enumerate() {
            let slice = usize::try_from((token - base) >> shift).expect("below the slices");
            let position = u32::try_from(position).expect("at most 2^31 blocks");
            while starts.len() <= slice {
                starts.push(position);
            }
        }
        starts.push(u32::try_from(first_tokens.len()).expect("at most 2^31 blocks"));
        Directory { base, shift, starts: starts.into_boxed_slice() }
    }

    /// Positions among which the first token above `token` lies, the end included.
    #[inline]
    fn slice(&self, token: u64) -> Range<usize> {
        let slice = usize::try_from((token - self.base) >> self.shift).unwrap_or(usize::MAX);
        let last = self.starts.len() - 1;
        // A token behind the last block's first lies behind all slices: the last block.
        let slice = slice.min(last - 1);
        self.starts[slice] as usize..self.starts[slice + 1] as usize
    }
}

impl TokenIndex {
    /// Positions of the first token above `token`: that is one more than the last block that may
    /// begin at or before it.
    #[inline]
    fn blocks_up_to(&self, token: Token) -> usize {
        if token.0 < self.directory.base {
            return 0;
        }
        let slice = self.directory.slice(token.0);
        slice.start + self.entries[slice].partition_point(|entry| entry.token() <= token.0)
    }

    /// The one block that may hold a key. `None` when the token lies outside the table.
    #[inline]
    #[must_use]
    pub fn locate(&self, token: Token, namespace: NamespaceId, key: &[u8]) -> Option<BlockHandle> {
        if token > self.last_token {
            return None;
        }
        let last = self.blocks_up_to(token).checked_sub(1)?;
        if self.separators.is_empty() || self.entries[last].token() != token.0 {
            return Some(self.handle(last));
        }
        Some(self.handle(self.locate_in_run(last, token, namespace, key)))
    }

    /// As [`TokenIndex::locate`], where `last` begins with the token itself and the table has
    /// runs of one token across blocks.
    #[cold]
    fn locate_in_run(
        &self,
        last: usize,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> usize {
        let starts_run = |separator: &Separator| self.entries[separator.block as usize].token();
        let first = self.separators.partition_point(|separator| starts_run(separator) < token.0);
        let run = &self.separators[first..];
        let run = &run[..run.partition_point(|separator| starts_run(separator) == token.0)];
        let Some(head) = run.first() else { return last };
        let passed = run.partition_point(|separator| {
            separator.namespace.cmp(&namespace).then_with(|| separator.key[..].cmp(key)).is_le()
        });
        // Before the first separator: the block in which the run begins.
        match passed.checked_sub(1) {
            Some(passed) => run[passed].block as usize,
            None => head.block as usize - 1,
        }
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> usize {
        self.entries.len() - 1
    }

    /// The blocks, without the entry behind the last.
    fn blocks(&self) -> &[Entry] {
        &self.entries[..self.block_count()]
    }

    /// The block at a position.
    #[inline]
    #[must_use]
    pub fn handle(&self, block: usize) -> BlockHandle {
        let (start, end) = (self.entries[block].unit, self.entries[block + 1].unit);
        BlockHandle { offset: u64::from(start) * BLOCK_UNIT as u64, len: (end - start) * UNIT }
    }

    /// The block that begins at this offset, if one does.
    #[must_use]
    pub fn handle_at(&self, offset: u64) -> Option<BlockHandle> {
        self.block_at(offset).map(|block| self.handle(block))
    }

    /// Position of the block that begins at this offset.
    #[must_use]
    pub fn block_at(&self, offset: u64) -> Option<usize> {
        let unit = u32::try_from(offset / BLOCK_UNIT as u64).ok()?;
        let block = self.blocks().binary_search_by_key(&unit, |entry| entry.unit).ok()?;
        (block < self.block_count() && self.handle(block).offset == offset).then_some(block)
    }

    /// Positions of the blocks that may hold a token of the range.
    #[must_use]
    pub fn touching(&self, range: TokenRange) -> Range<usize> {
        if range.first > self.last_token || range.last.0 < self.directory.base {
            return 0..0;
        }
        // The block before the first one that begins at or above the range may reach into it.
        let start = self.blocks().partition_point(|entry| entry.token() < range.first.0);
        start.saturating_sub(1)..self.blocks_up_to(range.last)
    }

    /// Positions of the blocks all of whose tokens are known to lie in the range.
    #[must_use]
    pub fn inside(&self, range: TokenRange) -> Range<usize> {
        let start = self.blocks().partition_point(|entry| entry.token() < range.first.0);
        let end = if self.last_token <= range.last {
            self.block_count()
        } else {
            // A block reaches at most to the first token of the next.
            self.blocks_up_to(range.last).saturating_sub(1)
        };
        start..end.max(start)
    }

    /// Bytes of the file that these blocks take.
    #[must_use]
    pub fn bytes(&self, blocks: Range<usize>) -> Range<u64> {
        let offset = |block: usize| u64::from(self.entries[block].unit) * BLOCK_UNIT as u64;
        offset(blocks.start)..offset(blocks.end)
    }

    /// First token of a block.
    #[must_use]
    pub fn first_token(&self, block: usize) -> Token {
        Token(self.blocks()[block].token())
    }

    /// Last token of the table.
    #[must_use]
    pub fn last_token(&self) -> Token {
        self.last_token
    }

    /// Bytes of memory.
    #[must_use]
    pub fn size(&self) -> usize {
        let separators: usize =
            self.separators.iter().map(|entry| entry.key.len() + size_of::<Separator>()).sum();
        self.entries.len() * size_of::<Entry>() + self.directory.starts.len() * 4 + separators
    }

    /// Decodes an index section at `offset` of a table with `data_len` bytes of blocks.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn decode(
        section: &[u8],
        salt: u64,
        offset: u64,
        data_len: u64,
    ) -> Result<TokenIndex, Invalid> {
        verify_section(section, salt, offset)?;
        let mut rest = section;
        let header: IndexHeader =
            bytemuck::pod_read_unaligned(take(&mut rest, size_of::<IndexHeader>())?);
        let count = header.block_count as usize;
        if count == 0 || count > BLOCKS_MAX || header.reserved != [0; 8] {
            return Err("the index's header is out of range");
        }
        let tokens = take(&mut rest, count * 8)?.as_chunks::<8>().0;
        let units = take(&mut rest, (count + 1) * 4)?.as_chunks::<4>().0;
        let separators =
            take(&mut rest, header.separator_count as usize * size_of::<SeparatorEntry>())?;
        let keys = take(&mut rest, header.separator_bytes as usize)?;
        let separators = decode_separators(separators, keys, count)?;
        let tokens: Box<[u64]> = tokens.iter().map(|token| u64::from_le_bytes(*token)).collect();
        if !tokens.is_sorted() {
            return Err("the index's tokens are out of order");
        }
        let index = TokenIndex {
            entries: entries(&tokens, units),
            directory: Directory::new(&tokens),
            separators,
            last_token: Token(header.last_token),
        };
        index.check(data_len)?;
        Ok(index)
    }

    fn check(&self, data_len: u64) -> Result<(), Invalid> {
        let units = |pair: &[Entry]| (u64::from(pair[0].unit), u64::from(pair[1].unit));
        let end = u64::from(self.entries[self.block_count()].unit) * BLOCK_UNIT as u64;
        if self.entries[0].unit != 0 || end.next_multiple_of(SECTOR as u64) != data_len {
            return Err("the index does not cover the blocks");
        }
        let units_max = (RAW_LEN_MAX / BLOCK_UNIT) as u64 + 2;
        let in_order = self.entries.windows(2).all(|pair| {
            let (start, end) = units(pair);
            start < end && end - start < units_max
        });
        if !in_order {
            return Err("the index's blocks are out of order or too long");
        }
        if self.last_token < self.first_token(self.block_count() - 1) {
            return Err("the index's last token is before its last block");
        }
        Ok(())
    }
}

/// The columns as they are searched. `units` is one longer.
#[expect(clippy::cast_possible_truncation, reason = "a token is taken apart into its two halves")]
fn entries(tokens: &[u64], units: &[[u8; 4]]) -> Box<[Entry]> {
    let tokens = tokens.iter().copied().chain([u64::MAX]);
    let pairs = tokens.zip(units);
    pairs
        .map(|(token, unit)| Entry {
            token_low: token as u32,
            token_high: (token >> 32) as u32,
            unit: u32::from_le_bytes(*unit),
        })
        .collect()
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Result<&'a [u8], Invalid> {
    let (taken, rest) = bytes.split_at_checked(len).ok_or("the index is shorter than declared")?;
    *bytes = rest;
    Ok(taken)
}

fn decode_separators(
    entries: &[u8],
    keys: &[u8],
    block_count: usize,
) -> Result<Box<[Separator]>, Invalid> {
    let mut start = 0;
    let mut separators: Vec<Separator> = Vec::new();
    for entry in entries.chunks_exact(size_of::<SeparatorEntry>()) {
        let entry: SeparatorEntry = bytemuck::pod_read_unaligned(entry);
        let end = entry.key_end as usize;
        let key = keys.get(start..end).ok_or("a separator's key lies outside the index")?;
        let above = separators.last().map_or(0, |before| before.block);
        if entry.block <= above || entry.block as usize >= block_count {
            return Err("the separators are out of order");
        }
        let namespace = NamespaceId(entry.namespace);
        separators.push(Separator { block: entry.block, namespace, key: key.into() });
        start = end;
    }
    Ok(separators.into_boxed_slice())
}

/// Gathers the index while a table is written.
#[derive(Debug, Default)]
pub(crate) struct IndexBuilder {
    first_tokens: Vec<u64>,
    units: Vec<u32>,
    separators: Vec<SeparatorEntry>,
    separator_keys: Vec<u8>,
}

impl IndexBuilder {
    pub(crate) fn block_count(&self) -> usize {
        self.first_tokens.len()
    }

    /// Adds the next block, which begins at `unit`.
    pub(crate) fn push(&mut self, first_token: Token, unit: u32) {
        self.first_tokens.push(first_token.0);
        self.units.push(unit);
    }

    /// Says that the block that will be pushed next begins with the token that the block before
    /// ends with: `before` and `first` are the keys on either side, `before` the smaller.
    pub(crate) fn separate(&mut self, before: (NamespaceId, &[u8]), first: (NamespaceId, &[u8])) {
        // The shortest key that is above `before` and not above `first`.
        let len = if before.0 == first.0 {
            let common = before.1.iter().zip(first.1).take_while(|(a, b)| a == b).count();
            common + 1
        } else {
            0
        };
        self.separator_keys.extend_from_slice(&first.1[..len]);
        self.separators.push(SeparatorEntry {
            block: u32::try_from(self.block_count()).expect("at most 2^31 blocks"),
            namespace: first.0.0,
            key_end: u32::try_from(self.separator_keys.len()).expect("checked by the writer"),
        });
    }

    /// Bytes of the separators' keys so far.
    pub(crate) fn separator_bytes(&self) -> usize {
        self.separator_keys.len()
    }

    /// The section as it is written at `offset`; the blocks end before `end_unit`.
    pub(crate) fn encode(
        &self,
        end_unit: u32,
        last_token: Token,
        salt: u64,
        offset: u64,
    ) -> Vec<u8> {
        let count = |len: usize| u32::try_from(len).expect("checked by the writer");
        let header = IndexHeader {
            checksum: 0,
            block_count: count(self.first_tokens.len()),
            separator_count: count(self.separators.len()),
            separator_bytes: count(self.separator_keys.len()),
            last_token: last_token.0,
            reserved: [0; 8],
        };
        let mut section = bytemuck::bytes_of(&header).to_vec();
        section.extend_from_slice(bytemuck::cast_slice(&self.first_tokens));
        section.extend_from_slice(bytemuck::cast_slice(&self.units));
        section.extend_from_slice(&end_unit.to_le_bytes());
        section.extend_from_slice(bytemuck::cast_slice(&self.separators));
        section.extend_from_slice(&self.separator_keys);
        seal_section(&mut section, salt, offset);
        section
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Chance;
    use proptest::prelude::*;

    const DATA_LEN: u64 = 1 << 20;

    /// An index of blocks with these first tokens, 16 bytes each.
    fn index_of(first_tokens: &[u64], last: u64) -> TokenIndex {
        let mut builder = IndexBuilder::default();
        for (unit, token) in (0u32..).zip(first_tokens) {
            builder.push(Token(*token), unit);
        }
        let end = u32::try_from(first_tokens.len()).unwrap();
        let data_len = u64::from(end * UNIT).next_multiple_of(SECTOR as u64);
        let section = builder.encode(end, Token(last), 1, DATA_LEN);
        TokenIndex::decode(&section, 1, DATA_LEN, data_len).unwrap()
    }

    fn block_of(index: &TokenIndex, token: u64) -> Option<usize> {
        let handle = index.locate(Token(token), NamespaceId(0), b"k")?;
        Some(usize::try_from(handle.offset / u64::from(UNIT)).unwrap())
    }

    /// Probes that the search of a slice takes.
    fn probes(index: &TokenIndex, token: u64) -> u32 {
        let slice = index.directory.slice(token);
        (slice.len() + 1).next_power_of_two().ilog2()
    }

    /// Mean and greatest number of probes over these tokens.
    fn probe_counts(index: &TokenIndex, tokens: &[u64]) -> (f64, u32) {
        let counts = || tokens.iter().map(|token| probes(index, *token));
        (f64::from(counts().sum::<u32>()) / tokens.len() as f64, counts().max().unwrap())
    }

    fn sorted_tokens(count: usize, arcs: &[(u64, u64)]) -> Vec<u64> {
        let mut chance = Chance::new(7);
        let mut tokens: Vec<u64> = (0..count)
            .map(|_| {
                let (start, len) = arcs[chance.index(arcs.len())];
                start + chance.below(len)
            })
            .collect();
        tokens.sort_unstable();
        tokens
    }

    #[test]
    fn a_table_of_the_whole_ring_or_one_partition_takes_about_one_probe() {
        for arc in [(0, u64::MAX), (37 << 58, 1 << 58), (12345 << 48, 1 << 48)] {
            let tokens = sorted_tokens(100_000, &[arc]);
            let index = index_of(&tokens, tokens[tokens.len() - 1]);
            let (mean, most) = probe_counts(&index, &tokens);
            assert!(mean < 1.6 && most <= 4, "mean {mean}, most {most}");
        }
    }

    #[test]
    fn a_table_of_scattered_arcs_takes_a_few_probes() {
        // A node among 48 with 3 replicas and 16 virtual nodes: 5 % of the ring in 48 arcs.
        let mut chance = Chance::new(3);
        let arcs: Vec<(u64, u64)> = (0..48).map(|_| (chance.next_u64() / 2, 1 << 54)).collect();
        let tokens = sorted_tokens(100_000, &arcs);
        let index = index_of(&tokens, tokens[tokens.len() - 1]);
        let (mean, most) = probe_counts(&index, &tokens);
        assert!(mean < 7.0 && most <= 9, "mean {mean}, most {most}");
    }

    #[test]
    fn the_directory_takes_at_most_eight_bytes_a_block() {
        for count in [1, 2, 3, 1000, 1025, 65_536, 70_000] {
            let tokens = sorted_tokens(count, &[(0, u64::MAX)]);
            let index = index_of(&tokens, u64::MAX);
            assert!(index.directory.starts.len() <= 2 * count + 2);
        }
    }

    proptest! {
        #[test]
        fn locate_names_the_last_block_that_begins_at_or_before(
            mut tokens in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..100, Just(u64::MAX)], 1..200),
            probes in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..100, Just(u64::MAX)], 50),
            more in 0u64..3,
        ) {
            tokens.sort_unstable();
            let last = tokens[tokens.len() - 1].saturating_add(more);
            let index = index_of(&tokens, last);
            for token in probes.iter().chain(&tokens).copied() {
                let expected = tokens.partition_point(|first| *first <= token).checked_sub(1);
                prop_assert_eq!(block_of(&index, token), expected.filter(|_| token <= last));
            }
        }

        #[test]
        fn a_separator_lies_between_its_neighbours(
            mut keys in prop::collection::vec((0u32..2, prop::collection::vec(0u8..3, 1..6)), 2),
        ) {
            keys.sort();
            prop_assume!(keys[0] != keys[1]);
            let mut builder = IndexBuilder::default();
            builder.push(Token(5), 0);
            let side = |(namespace, key): &(u32, Vec<u8>)| (NamespaceId(*namespace), key.clone());
            let (before, first) = (side(&keys[0]), side(&keys[1]));
            builder.separate((before.0, &before.1), (first.0, &first.1));
            let key = builder.separator_keys.clone();
            prop_assert!((before.0, before.1) < (first.0, key.clone()));
            prop_assert!(key <= first.1);
        }

        #[test]
        fn forged_sections_are_refused_or_read(
            mut bytes in prop::collection::vec(any::<u8>(), 32..600), blocks in 0u32..20,
            separators in 0u32..3, sorted in any::<bool>(),
        ) {
            bytes[4..8].copy_from_slice(&blocks.to_le_bytes());
            bytes[8..12].copy_from_slice(&separators.to_le_bytes());
            bytes[12..16].copy_from_slice(&(separators * 2).to_le_bytes());
            bytes[24..32].fill(0);
            if sorted {
                bytes[32..].fill(0);
                for (unit, place) in (0u32..).zip(bytes[32..].chunks_exact_mut(4).skip(2 * blocks as usize)) {
                    place.copy_from_slice(&unit.to_le_bytes());
                }
            }
            seal_section(&mut bytes, 1, 0);
            let data_len = (u64::from(blocks) * 16).next_multiple_of(512);
            if let Ok(index) = TokenIndex::decode(&bytes, 1, 0, data_len) {
                for token in [0, 1, u64::MAX] {
                    let _ = index.locate(Token(token), NamespaceId(0), b"key");
                }
            }
        }
    }
}
