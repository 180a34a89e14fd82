//! The token: one 64-bit hash per key, and every use of its bits.
//!
//! | question | answer | bits used |
//! |---|---|---|
//! | partition (arc of the ring) | `token >> (64 - q)` | top q |
//! | order in a memtable drain, a table, a scan | `(token, namespace, key)` | all |
//! | Merkle leaf | the next bits below the partition | next 8 to 16 |
//! | memtable slot, cache slot, sketch row | high bits of `remix()` | remixed |
//! | filter block | high half of `remix()` | remixed |
//! | bits inside the filter block | low half of `remix()` | remixed |
//!
//! Invariant: a structure that lives inside a range selected by some bits never uses those bits
//! again. Filter blocks chosen by raw top bits gave 99.99 % false positives in a table that spans
//! 1/16 of the ring; one multiply by an odd constant restores the theory's rate.

use std::fmt;

/// Position of a key on the ring: XXH3-64 of the key under the cluster's seed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Token(pub u64);

/// Odd constant of `remix`: 2^64 divided by the golden ratio (Knuth, TAOCP 6.4).
const REMIX: u64 = 0x9E37_79B9_7F4A_7C15;

/// Most bits a ring may use for partitions: 65,536 partitions.
pub const PARTITION_BITS_MAX: u32 = 16;

impl Token {
    /// The smallest token.
    pub const MIN: Token = Token(0);
    /// The greatest token.
    pub const MAX: Token = Token(u64::MAX);

    /// Hashes a key under the cluster's seed. The only place a key is hashed.
    #[inline]
    #[must_use]
    pub fn of_key(key: &[u8], seed: u64) -> Token {
        Token(twox_hash::XxHash3_64::oneshot_with_seed(seed, key))
    }

    /// The token of a key that is itself a uniform hash: its first 8 bytes, big-endian, so that
    /// token order is the hash's own order. `None` when the key is shorter.
    #[inline]
    #[must_use]
    pub fn of_hashed_key(key: &[u8]) -> Option<Token> {
        key.first_chunk::<8>().map(|first| Token(u64::from_be_bytes(*first)))
    }

    /// The partition that holds this token on a ring of `2^bits` partitions, `bits` in 0..=16.
    #[inline]
    #[must_use]
    pub fn partition(self, bits: u32) -> PartitionId {
        debug_assert!(bits <= PARTITION_BITS_MAX);
        // A shift by 64 overflows, so a ring of one partition is handled by two shifts.
        let high = (self.0 >> 1) >> (63 - bits);
        PartitionId(u32::try_from(high).expect("at most 16 bits remain"))
    }

    /// The Merkle leaf inside the partition: the `leaf_bits` bits below the partition's.
    #[inline]
    #[must_use]
    pub fn merkle_leaf(self, partition_bits: u32, leaf_bits: u32) -> u32 {
        debug_assert!(partition_bits <= PARTITION_BITS_MAX && (1..=16).contains(&leaf_bits));
        u32::try_from((self.0 << partition_bits) >> (64 - leaf_bits)).expect("at most 16 bits")
    }

    /// The token's bits mixed, for structures inside a range of the ring. A bijection.
    #[inline]
    #[must_use]
    pub fn remix(self) -> u64 {
        // The fold brings low bits of the token into the low half of the result as well.
        let folded = self.0 ^ (self.0 >> 32);
        folded.wrapping_mul(REMIX)
    }

    /// Slot in an open-addressed table of `2^bits` slots, `bits` in 1..=63.
    #[inline]
    #[must_use]
    pub fn slot(self, bits: u32) -> usize {
        debug_assert!((1..=63).contains(&bits));
        usize::try_from(self.remix() >> (64 - bits)).expect("64-bit host")
    }

    /// Filter block among `block_count` (1..=2^32) blocks: high half of `remix`, as a fraction.
    #[inline]
    #[must_use]
    pub fn filter_block(self, block_count: u32) -> u32 {
        let high = self.remix() >> 32;
        u32::try_from((high * u64::from(block_count)) >> 32).expect("below block_count")
    }

    /// The 32 bits from which the bits inside a filter block are derived: low half of `remix`.
    #[inline]
    #[must_use]
    pub fn filter_bits(self) -> u32 {
        u32::try_from(self.remix() & 0xffff_ffff).expect("masked to 32 bits")
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// One of the `2^q` equal arcs of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct PartitionId(pub u32);

impl PartitionId {
    /// The tokens of this partition on a ring of `2^bits`. Inverse of [`Token::partition`].
    #[must_use]
    pub fn range(self, bits: u32) -> TokenRange {
        debug_assert!(bits <= PARTITION_BITS_MAX && u64::from(self.0) < (1u64 << bits));
        if bits == 0 {
            return TokenRange::FULL;
        }
        let first = u64::from(self.0) << (64 - bits);
        TokenRange { first: Token(first), last: Token(first | (u64::MAX >> bits)) }
    }
}

/// Tokens from `first` to `last`, both included, so that the whole ring needs no sentinel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenRange {
    /// The first token in the range.
    pub first: Token,
    /// The last token in the range, at or after `first`.
    pub last: Token,
}

impl TokenRange {
    /// The whole ring.
    pub const FULL: TokenRange = TokenRange { first: Token::MIN, last: Token::MAX };

    /// Whether the range holds the token.
    #[inline]
    #[must_use]
    pub fn contains(&self, token: Token) -> bool {
        self.first <= token && token <= self.last
    }

    /// Whether the two ranges share a token.
    #[must_use]
    pub fn overlaps(&self, other: &TokenRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The tokens in both ranges, if any.
    #[must_use]
    pub fn intersection(&self, other: &TokenRange) -> Option<TokenRange> {
        let range =
            TokenRange { first: self.first.max(other.first), last: self.last.min(other.last) };
        (range.first <= range.last).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_partitions_range_holds_exactly_its_tokens(token: u64, bits in 0u32..=16) {
            let token = Token(token);
            let partition = token.partition(bits);
            let range = partition.range(bits);
            prop_assert!(range.contains(token));
            prop_assert_eq!(range.first.partition(bits), partition);
            prop_assert_eq!(range.last.partition(bits), partition);
            if range.first > Token::MIN {
                prop_assert!(Token(range.first.0 - 1).partition(bits) < partition);
            }
            if range.last < Token::MAX {
                prop_assert!(Token(range.last.0 + 1).partition(bits) > partition);
            }
        }

        #[test]
        fn remix_is_a_bijection(token: u64) {
            // Inverse of the odd multiplier by Newton's iteration; the fold is its own inverse.
            let mut inverse = REMIX;
            for _ in 0..6 {
                inverse = inverse.wrapping_mul(2u64.wrapping_sub(REMIX.wrapping_mul(inverse)));
            }
            let folded = Token(token).remix().wrapping_mul(inverse);
            prop_assert_eq!(folded ^ (folded >> 32), token);
        }

        #[test]
        fn slots_blocks_and_leaves_stay_in_range(token: u64, bits in 1u32..=30, blocks in 1u32..) {
            let token = Token(token);
            prop_assert!(token.slot(bits) < 1usize << bits);
            prop_assert!(token.filter_block(blocks) < blocks);
            prop_assert!(token.merkle_leaf(12, 8) < 256);
        }

        #[test]
        fn intersection_agrees_with_overlaps(a: u64, b: u64, c: u64, d: u64, t: u64) {
            let x = TokenRange { first: Token(a.min(b)), last: Token(a.max(b)) };
            let y = TokenRange { first: Token(c.min(d)), last: Token(c.max(d)) };
            let both = x.intersection(&y);
            prop_assert_eq!(both.is_some(), x.overlaps(&y));
            let t = Token(t);
            prop_assert_eq!(both.is_some_and(|r| r.contains(t)), x.contains(t) && y.contains(t));
        }
    }

    #[test]
    fn tokens_are_xxh3_of_the_key_under_the_seed() {
        // Golden: the hash belongs to the format, so a change of library must not change it.
        assert_eq!(Token::of_key(b"", 0), Token(0x2d06_8005_38d3_94c2));
        assert_ne!(Token::of_key(b"k", 1), Token::of_key(b"k", 2));
    }

    #[test]
    fn slots_spread_inside_one_partition() {
        // Law of the bit budget: tokens of 1/4096 of the ring fill a table's slots evenly.
        let base = PartitionId(7).range(12).first.0;
        let mut counts = [0u32; 64];
        for i in 0..64_000u64 {
            let token = Token(base | (Token::of_key(&i.to_le_bytes(), 3).0 >> 12));
            counts[token.slot(6)] += 1;
        }
        assert!(counts.iter().all(|&count| (800..1200).contains(&count)), "{counts:?}");
    }
}
