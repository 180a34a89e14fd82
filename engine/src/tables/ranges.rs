//! A set of tokens as sorted, disjoint ranges: what is left to read of an upper table.
//!
//! Invariant: ranges are sorted, do not overlap, and no two of them touch.

use crate::model::{Token, TokenRange};

/// A set of tokens.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Ranges(Vec<TokenRange>);

impl Ranges {
    /// The tokens of one range.
    #[must_use]
    pub fn of(range: TokenRange) -> Ranges {
        Ranges(vec![range])
    }

    /// Whether no token is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = TokenRange> + '_ {
        self.0.iter().copied()
    }

    /// Whether the token is in the set.
    #[must_use]
    pub fn contains(&self, token: Token) -> bool {
        let after = self.0.partition_point(|range| range.first <= token);
        after > 0 && self.0[after - 1].contains(token)
    }

    /// Whether any token of `range` is in the set.
    #[must_use]
    pub fn overlaps(&self, range: &TokenRange) -> bool {
        self.within(range).next().is_some()
    }

    /// The parts of the set inside `range`, ascending.
    pub fn within(&self, range: &TokenRange) -> impl Iterator<Item = TokenRange> + '_ {
        let range = *range;
        let start = self.0.partition_point(|own| own.last < range.first);
        self.0[start..].iter().map_while(move |own| own.intersection(&range))
    }

    /// Takes the tokens of `range` out.
    pub fn subtract(&mut self, range: &TokenRange) {
        let mut left = Vec::with_capacity(self.0.len() + 1);
        for own in &self.0 {
            if !own.overlaps(range) {
                left.push(*own);
                continue;
            }
            if own.first < range.first {
                left.push(TokenRange { first: own.first, last: Token(range.first.0 - 1) });
            }
            if range.last < own.last {
                left.push(TokenRange { first: Token(range.last.0 + 1), last: own.last });
            }
        }
        self.0 = left;
    }

    /// Number of tokens in the set, as a float: it only weighs plans.
    #[must_use]
    pub fn width(&self) -> f64 {
        self.0.iter().map(width).sum()
    }

    /// Number of tokens of the set inside `range`.
    #[must_use]
    pub fn width_within(&self, range: &TokenRange) -> f64 {
        self.within(range).map(|part| width(&part)).sum()
    }
}

/// Number of tokens in a range.
#[expect(clippy::cast_precision_loss, reason = "a weight; 53 bits are plenty")]
fn width(range: &TokenRange) -> f64 {
    (range.last.0 - range.first.0) as f64 + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(a: u64, b: u64) -> TokenRange {
        TokenRange { first: Token(a.min(b)), last: Token(a.max(b)) }
    }

    proptest! {
        #[test]
        fn subtracting_leaves_exactly_the_other_tokens(
            cuts in prop::collection::vec((0u64..64, 0u64..64), 0..8), look in (0u64..64, 0u64..64),
        ) {
            let mut set = Ranges::of(range(3, 60));
            let mut model = [false; 64];
            model[3..=60].fill(true);
            for (a, b) in cuts {
                set.subtract(&range(a, b));
                for token in a.min(b)..=a.max(b) {
                    model[usize::try_from(token).unwrap()] = false;
                }
            }
            for (token, &expected) in (0u64..).zip(&model) {
                prop_assert_eq!(set.contains(Token(token)), expected);
            }
            let look = range(look.0, look.1);
            let inside = (0u64..).zip(&model).filter(|(t, is)| **is && look.contains(Token(*t))).count();
            prop_assert_eq!(set.width_within(&look), inside as f64);
            prop_assert_eq!(set.overlaps(&look), inside > 0);
            prop_assert_eq!(set.is_empty(), model.iter().all(|is| !is));
        }
    }

    #[test]
    fn the_ends_of_the_ring_do_not_overflow() {
        let mut set = Ranges::of(TokenRange::FULL);
        set.subtract(&range(0, 0));
        set.subtract(&range(u64::MAX, u64::MAX));
        assert_eq!(set.iter().collect::<Vec<_>>(), [range(1, u64::MAX - 1)]);
        set.subtract(&TokenRange::FULL);
        assert!(set.is_empty());
    }
}
