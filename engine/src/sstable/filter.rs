//! Blocked bloom filter over tokens: may a table hold this key?
//!
//! Invariant: no false negative. A probe touches one 64-byte block, one cache line: the block is
//! chosen by the high half of `remix`, and in it one bit in each of eight 64-bit lanes by the low
//! half. So a block that took `j` keys answers an absent one with "maybe" with probability
//! `(1 - (63/64)^j)^8`, and `j` is Poisson distributed: [`BlockedBloom::expected_rate`].
//!
//! Follows Putze, Sanders, Singler, "Cache-, Hash- and Space-Efficient Bloom Filters" (2007),
//! with a lane for each bit so that the bits of a key never fall together. Eight bits a key suit
//! 8 to 20 bits of memory; at 10 the theory of this form gives 1.05 %, of an unblocked one 0.82 %.

use std::mem::size_of;

use bytemuck::{Pod, Zeroable};

use super::format::{FilterHeader, Invalid, SECTOR, seal_section, verify_section};
use crate::model::Token;

const LANES: usize = 8;
/// Bits of a block.
const BLOCK_BITS: usize = 512;
/// Odd multiplier that turns 32 bits into eight times six: the fraction of the square root of 3,
/// because the one of the golden ratio made the 32 bits already.
const LANE_MIX: u64 = 0xBB67_AE85_84CA_A73B;

/// One block: a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
struct FilterBlock([u64; LANES]);

const _: () = assert!(size_of::<FilterBlock>() == 64 && size_of::<FilterHeader>() == 64);

/// The filter of one table, in memory.
#[derive(Clone, Debug)]
pub struct BlockedBloom {
    blocks: Box<[FilterBlock]>,
    block_count: u32,
    key_count: u64,
}

/// The eight masks of a token, one a lane.
#[inline]
fn masks(token: Token) -> [u64; LANES] {
    let mixed = u64::from(token.filter_bits()).wrapping_mul(LANE_MIX);
    // The top 48 bits, six a lane.
    std::array::from_fn(|lane| 1u64 << ((mixed >> (16 + 6 * lane)) & 63))
}

impl BlockedBloom {
    /// An empty filter for `key_count` keys with about `bits_per_key` bits for each, 4 to 32.
    #[must_use]
    pub fn with_capacity(key_count: usize, bits_per_key: u32) -> BlockedBloom {
        let bits = key_count.saturating_mul(bits_per_key.clamp(4, 32) as usize);
        let block_count = u32::try_from(bits.div_ceil(BLOCK_BITS).max(1)).unwrap_or(u32::MAX);
        let blocks = vec![FilterBlock([0; LANES]); block_count as usize].into_boxed_slice();
        BlockedBloom { blocks, block_count, key_count: 0 }
    }

    /// A filter that holds every token: for a table whose own filter is lost.
    #[must_use]
    pub fn full() -> BlockedBloom {
        let blocks = vec![FilterBlock([u64::MAX; LANES])].into_boxed_slice();
        BlockedBloom { blocks, block_count: 1, key_count: 0 }
    }

    /// Adds a token.
    #[inline]
    pub fn insert(&mut self, token: Token) {
        let block = &mut self.blocks[token.filter_block(self.block_count) as usize];
        for (lane, mask) in block.0.iter_mut().zip(masks(token)) {
            *lane |= mask;
        }
        self.key_count += 1;
    }

    /// Whether a key with this token may be in the table. One cache line.
    #[inline]
    #[must_use]
    pub fn may_contain(&self, token: Token) -> bool {
        let block = &self.blocks[token.filter_block(self.block_count) as usize];
        let mut missing = 0;
        for (lane, mask) in block.0.iter().zip(masks(token)) {
            missing |= !lane & mask;
        }
        missing == 0
    }

    /// Asks the processor to load the line that [`BlockedBloom::may_contain`] will want.
    #[inline]
    pub fn prefetch(&self, token: Token) {
        let block = &self.blocks[token.filter_block(self.block_count) as usize];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch is a hint that reads nothing and cannot fault; the address is
            // that of a live reference.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(block).cast::<i8>()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = block;
    }

    /// Bytes of memory.
    #[must_use]
    pub fn size(&self) -> usize {
        self.blocks.len() * size_of::<FilterBlock>()
    }

    /// Records that were added.
    #[must_use]
    pub fn key_count(&self) -> u64 {
        self.key_count
    }

    /// The false-positive rate that theory gives this form at this filter's mean load.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a rate, not a count")]
    pub fn expected_rate(&self) -> f64 {
        expected_rate(self.key_count as f64 / f64::from(self.block_count))
    }

    /// The section as it is written at `offset`.
    #[must_use]
    pub fn encode(&self, salt: u64, offset: u64) -> Vec<u8> {
        let header = FilterHeader {
            checksum: 0,
            block_count: self.block_count,
            key_count: self.key_count,
            reserved: [0; 48],
        };
        let len = size_of::<FilterHeader>() + self.size();
        let mut section = Vec::with_capacity(len.next_multiple_of(SECTOR));
        section.extend_from_slice(bytemuck::bytes_of(&header));
        section.extend_from_slice(bytemuck::cast_slice(&self.blocks));
        seal_section(&mut section, salt, offset);
        section
    }

    /// Inverse of [`BlockedBloom::encode`].
    ///
    /// # Errors
    /// The first rule broken.
    pub fn decode(section: &[u8], salt: u64, offset: u64) -> Result<BlockedBloom, Invalid> {
        verify_section(section, salt, offset)?;
        let (head, tail) = section
            .split_at_checked(size_of::<FilterHeader>())
            .ok_or("the filter is shorter than its header")?;
        let header: FilterHeader = bytemuck::pod_read_unaligned(head);
        if header.block_count == 0 || header.reserved != [0; 48] {
            return Err("the filter's header is out of range");
        }
        let len = (header.block_count as usize).saturating_mul(size_of::<FilterBlock>());
        let bytes = tail.get(..len).ok_or("the filter is shorter than declared")?;
        let blocks = bytes
            .chunks_exact(size_of::<FilterBlock>())
            .map(bytemuck::pod_read_unaligned)
            .collect::<Box<[FilterBlock]>>();
        Ok(BlockedBloom { blocks, block_count: header.block_count, key_count: header.key_count })
    }
}

/// False-positive rate of the blocked form at a mean of `load` keys a block: a Poisson mixture
/// over what single blocks hold.
#[must_use]
pub fn expected_rate(load: f64) -> f64 {
    let (mut rate, mut share) = (0.0, (-load).exp());
    let mut empty = 1.0f64; // chance that a given bit of a lane is still clear after j keys
    for keys in 0..2000u32 {
        rate += share * (1.0 - empty).powi(8);
        empty *= 63.0 / 64.0;
        share *= load / f64::from(keys + 1);
    }
    rate
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Chance;
    use proptest::prelude::*;

    /// Keys and absent probes of the rate tests; a debug build is some 30 times slower.
    const KEYS: usize = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
    const PROBES: usize = if cfg!(debug_assertions) { 1_500_000 } else { 20_000_000 };

    /// Random tokens of the `2^-bits` of the ring with this number.
    fn tokens(seed: u64, count: usize, bits: u32, number: u64) -> impl Iterator<Item = Token> {
        let mut chance = Chance::new(seed);
        let slice = if bits == 0 { 0 } else { number << (64 - bits) };
        (0..count).map(move |_| Token(slice | (chance.next_u64() >> bits)))
    }

    fn filter_of(tokens: impl Iterator<Item = Token>, bits_per_key: u32) -> BlockedBloom {
        let mut filter = BlockedBloom::with_capacity(KEYS, bits_per_key);
        tokens.for_each(|token| filter.insert(token));
        filter
    }

    /// Measured false positives over those that theory expects.
    fn ratio(bits_per_key: u32, bits: u32, number: u64) -> f64 {
        let filter = filter_of(tokens(1, KEYS, bits, number), bits_per_key);
        // Other 64-bit tokens: the chance that one of them is a key is nil.
        let wrong = tokens(2, PROBES, bits, number).filter(|token| filter.may_contain(*token));
        wrong.count() as f64 / PROBES as f64 / filter.expected_rate()
    }

    #[test]
    fn false_positives_are_within_a_tenth_of_theory_on_the_whole_ring() {
        for bits_per_key in [8, 10, 12] {
            let ratio = ratio(bits_per_key, 0, 0);
            assert!((0.9..1.1).contains(&ratio), "{bits_per_key} bits: {ratio} of theory");
        }
    }

    #[test]
    fn false_positives_are_within_a_tenth_of_theory_in_any_slice_of_the_ring() {
        for (bits, number) in [(4, 9), (6, 0), (6, 37), (6, 63), (16, 54_321)] {
            let ratio = ratio(10, bits, number);
            assert!((0.9..1.1).contains(&ratio), "slice {number} of 2^{bits}: {ratio} of theory");
        }
    }

    #[test]
    fn the_theory_gives_the_known_rates() {
        // (1 - (63/64)^j)^8 under a Poisson of 512 / bits keys a block, computed apart.
        for (bits, rate) in [(8.0, 0.02931), (10.0, 0.01049), (12.0, 0.00422), (16.0, 0.00091)] {
            assert!((expected_rate(512.0 / bits) - rate).abs() < 0.000_01);
        }
        assert!(expected_rate(0.0) < 1e-12);
    }

    #[test]
    fn no_key_is_ever_denied() {
        let count = if cfg!(debug_assertions) { 1_000_000 } else { 100_000_000 };
        for (bits, number) in [(0, 0), (6, 37)] {
            let mut filter = BlockedBloom::with_capacity(count / 2, 10);
            tokens(3, count / 2, bits, number).for_each(|token| filter.insert(token));
            assert!(tokens(3, count / 2, bits, number).all(|token| filter.may_contain(token)));
        }
    }

    #[test]
    fn a_full_filter_denies_nothing() {
        assert!(tokens(4, 1000, 0, 0).all(|token| BlockedBloom::full().may_contain(token)));
    }

    proptest! {
        #[test]
        fn any_tokens_are_found_again_after_encoding(
            tokens in prop::collection::vec(any::<u64>(), 0..500),
            bits_per_key in 0u32..50, salt: u64,
        ) {
            let mut filter = BlockedBloom::with_capacity(tokens.len(), bits_per_key);
            tokens.iter().for_each(|token| filter.insert(Token(*token)));
            let section = filter.encode(salt, 512);
            prop_assert!(section.len().is_multiple_of(SECTOR));
            let read = BlockedBloom::decode(&section, salt, 512).unwrap();
            prop_assert!(tokens.iter().all(|token| read.may_contain(Token(*token))));
            prop_assert_eq!(&read.blocks, &filter.blocks);
            prop_assert!(BlockedBloom::decode(&section, salt, 1024).is_err());
            prop_assert!(BlockedBloom::decode(&section[..section.len() - 1], salt, 512).is_err());
        }

        #[test]
        fn forged_sections_are_refused_or_read(mut bytes in prop::collection::vec(any::<u8>(), 64..600)) {
            seal_section(&mut bytes, 1, 0);
            if let Ok(filter) = BlockedBloom::decode(&bytes, 1, 0) {
                let _ = filter.may_contain(Token(1));
            }
        }
    }
}
