//! One leaf of the memtable: slots `(token, place)` in token order, with gaps to insert into.
//!
//! A slot's home is its token's position between the leaf's first and last token, scaled to the
//! number of slots. This is linear probing with a hash function that keeps the order, so a lookup
//! touches one or two cache lines like a hash table's, and a walk over the slots is sorted.
//!
//! Invariants: used slots are in token order (the caller orders equal tokens by key); every used
//! slot lies at or after its home with no free slot between; the last slot is free. A leaf holds
//! at most `LEAF_LEN_MAX` slots, so whatever the tokens, no operation costs more than a pass over
//! 6 KiB. The idea of gaps at predicted positions is from ALEX (Ding et al., SIGMOD 2020, 4).

use std::ops::Range;

use super::arena::Place;
use super::prefetch;
use crate::model::Token;

/// Most used slots of a leaf. Larger leaves make the directory smaller and a split longer.
pub(super) const LEAF_LEN_MAX: usize = 1024;

/// Twelve bytes, so that a cache line holds five.
#[derive(Clone, Copy)]
struct Slot {
    token_low: u32,
    token_high: u32,
    place: Place,
}

impl Slot {
    /// Not before any token, so that a search need not ask whether a slot is free.
    const FREE: Slot = Slot { token_low: u32::MAX, token_high: u32::MAX, place: Place::NONE };

    #[expect(clippy::cast_possible_truncation, reason = "the token is cut in two halves")]
    fn new(token: Token, place: Place) -> Slot {
        Slot { token_low: token.0 as u32, token_high: (token.0 >> 32) as u32, place }
    }

    #[inline]
    fn is_free(&self) -> bool {
        self.place == Place::NONE
    }

    #[inline]
    fn token(&self) -> Token {
        Token(u64::from(self.token_high) << 32 | u64::from(self.token_low))
    }
}

/// See the module.
pub(super) struct Leaf {
    slots: Vec<Slot>,
    len: usize,
    homes: Homes,
}

/// The map from tokens to homes: a line through the first and the last token at the last rebuild.
struct Homes {
    first: u64,
    span: u64,
    shift: u32,
    /// Slots for each token, times 2^32.
    slope: u64,
}

impl Homes {
    fn new(first: Token, last: Token, count: usize) -> Homes {
        let span = last.0 - first.0;
        let shift = (64 - span.leading_zeros()).saturating_sub(32);
        Homes { first: first.0, span, shift, slope: ((count as u64) << 32) / ((span >> shift) + 1) }
    }

    /// Monotone, and below the `count` it was made for.
    #[inline]
    fn home(&self, token: Token) -> usize {
        let distance = token.0.saturating_sub(self.first).min(self.span);
        usize::try_from(((distance >> self.shift) * self.slope) >> 32).expect("32 bits remain")
    }
}

impl Leaf {
    pub(super) fn new() -> Leaf {
        Leaf::build(&[])
    }

    /// A leaf of these slots, which are in order, at three quarters full.
    fn build(sorted: &[Slot]) -> Leaf {
        let homes_count = sorted.len() + sorted.len() / 3 + 4;
        let tail = 4 + sorted.len() / 64;
        let (first, last) = match sorted {
            [] => (Token::MIN, Token::MAX),
            [only] => (only.token(), only.token()),
            [first, .., last] => (first.token(), last.token()),
        };
        let homes = Homes::new(first, last, homes_count);
        // Where tokens crowd near the end they are pushed beyond the last home.
        let end = sorted.iter().fold(0, |end, slot| homes.home(slot.token()).max(end) + 1);
        let mut slots = Vec::with_capacity(end.max(homes_count) + tail);
        for slot in sorted {
            slots.resize(homes.home(slot.token()).max(slots.len()), Slot::FREE);
            slots.push(*slot);
        }
        slots.resize(slots.capacity(), Slot::FREE);
        Leaf { slots, len: sorted.len(), homes }
    }

    /// Used slots.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes allocated beside the leaf itself, with what the allocator adds.
    pub(super) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + 16
    }

    /// The first slot at or after the token's home that is not before the token: where the token
    /// is, or where it belongs.
    ///
    /// From the home on, slots before the token come first: what lies beyond a free slot has a
    /// later home, hence a greater token. So comparisons may be counted, four at a time without a
    /// branch, or halved.
    #[inline]
    pub(super) fn seek(&self, token: Token) -> usize {
        let mut at = self.homes.home(token);
        for _ in 0..4 {
            let Some(window) = self.slots.get(at..at + 4) else { break };
            let before = window.iter().map(|slot| usize::from(slot.token() < token)).sum::<usize>();
            at += before;
            if before < 4 {
                return at;
            }
        }
        at + self.slots[at..].partition_point(|slot| slot.token() < token)
    }

    /// Starts to bring the token's home nearer to the processor.
    #[inline]
    pub(super) fn prefetch(&self, token: Token) {
        prefetch::line(&self.slots[self.homes.home(token)..]);
    }

    /// The entry of this slot, if it is used and has the token.
    #[inline]
    pub(super) fn at(&self, at: usize, token: Token) -> Option<Place> {
        let slot = self.slots.get(at)?;
        (!slot.is_free() && slot.token() == token).then_some(slot.place)
    }

    /// The entry of this slot, if there is such a slot and it is used.
    #[inline]
    pub(super) fn peek(&self, at: usize) -> Option<Place> {
        self.slots.get(at).map(|slot| slot.place).filter(|place| *place != Place::NONE)
    }

    /// Puts another place into a used slot.
    pub(super) fn replace(&mut self, at: usize, place: Place) {
        debug_assert!(!self.slots[at].is_free());
        self.slots[at].place = place;
    }

    /// The slots with this token: empty at the place where it belongs if there is none.
    pub(super) fn run(&self, token: Token) -> Range<usize> {
        let start = self.seek(token);
        let is_other = |slot: &Slot| slot.is_free() || slot.token() != token;
        if self.slots.get(start + 1).is_none_or(is_other) {
            return start..start + usize::from(self.at(start, token).is_some());
        }
        let equal = self.slots[start..].partition_point(|slot| !is_other(slot));
        start..start + equal
    }

    /// Inserts before slot `at`, which is in the run of the token or at its end. False if the
    /// leaf must be rebuilt or split first; then nothing has changed.
    #[must_use]
    pub(super) fn insert(&mut self, at: usize, token: Token, place: Place) -> bool {
        if self.len >= LEAF_LEN_MAX || (self.len + 1) * 8 > self.slots.len() * 7 {
            return false;
        }
        let Some(run) = self.slots[at..].iter().position(Slot::is_free) else { return false };
        let free = at + run;
        if free + 1 == self.slots.len() {
            return false;
        }
        self.slots.copy_within(at..free, at + 1);
        self.slots[at] = Slot::new(token, place);
        self.len += 1;
        true
    }

    fn sorted(&self) -> Vec<Slot> {
        self.slots.iter().filter(|slot| !slot.is_free()).copied().collect()
    }

    /// Spreads the slots over more room, after which an insert finds space.
    pub(super) fn rebuild(&mut self) {
        *self = Leaf::build(&self.sorted());
    }

    /// Cuts a leaf of two slots or more in two and gives the upper one with its first token. The
    /// cut is where the token changes nearest to the middle; only a leaf of one token alone is cut
    /// inside it.
    pub(super) fn split(&mut self) -> (Token, Leaf) {
        let sorted = self.sorted();
        let middle = sorted.len() / 2;
        let changes = |at: &usize| sorted[*at - 1].token() != sorted[*at].token();
        let below = (1..=middle).rev().find(changes);
        let above = (middle..sorted.len()).find(changes);
        let cut = match (below, above) {
            (Some(below), Some(above)) if middle - below > above - middle => above,
            (Some(below), _) => below,
            (None, above) => above.unwrap_or(middle),
        };
        let (lower, upper) = sorted.split_at(cut);
        *self = Leaf::build(lower);
        (upper[0].token(), Leaf::build(upper))
    }

    /// Keeps the entries for which `keep` holds; gives how many went.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(Token, Place) -> bool) -> usize {
        let mut sorted = self.sorted();
        sorted.retain(|slot| keep(slot.token(), slot.place));
        let gone = self.len - sorted.len();
        if gone > 0 {
            *self = Leaf::build(&sorted);
        }
        gone
    }

    /// The first used slot at or after `from`: its number and content.
    #[inline]
    pub(super) fn next(&self, from: usize) -> Option<(usize, Token, Place)> {
        let skipped = self.slots.get(from..)?.iter().position(|slot| !slot.is_free())?;
        let slot = &self.slots[from + skipped];
        Some((from + skipped, slot.token(), slot.place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(leaf: &Leaf) {
        assert!(leaf.slots.last().unwrap().is_free());
        let mut last = Token::MIN;
        let mut used = 0;
        for (at, slot) in leaf.slots.iter().enumerate().filter(|(_, slot)| !slot.is_free()) {
            assert!(last <= slot.token());
            last = slot.token();
            used += 1;
            let home = leaf.homes.home(slot.token());
            assert!(home <= at && leaf.slots[home..at].iter().all(|slot| !slot.is_free()));
        }
        assert_eq!(used, leaf.len());
    }

    fn fill(tokens: &[u64]) -> Leaf {
        let mut leaf = Leaf::new();
        for (i, token) in tokens.iter().enumerate() {
            let (token, place) = (Token(*token), Place(u32::try_from(i).unwrap() + 1));
            if !leaf.insert(leaf.run(token).end, token, place) {
                leaf.rebuild();
                assert!(leaf.insert(leaf.run(token).end, token, place));
            }
            check(&leaf);
        }
        leaf
    }

    /// Tokens spread, crowded at a few spots, equal, and at the ends.
    fn tokens() -> impl Strategy<Value = Vec<u64>> {
        let token = prop_oneof![
            any::<u64>(),
            (0u64..4, 0u64..20).prop_map(|(spot, near)| (spot << 62) | near),
            Just(u64::MAX),
        ];
        prop::collection::vec(token, 0..200)
    }

    proptest! {
        #[test]
        fn any_tokens_are_kept_in_order_and_found(tokens in tokens()) {
            let leaf = fill(&tokens);
            let mut wanted: Vec<(u64, u32)> = tokens.iter().zip(1..).map(|(t, i)| (*t, i)).collect();
            wanted.sort_unstable();
            let (mut at, mut found) = (0, Vec::new());
            while let Some((slot, token, place)) = leaf.next(at) {
                found.push((token.0, place.0));
                at = slot + 1;
            }
            prop_assert_eq!(found, wanted);
            for token in tokens {
                prop_assert!(leaf.at(leaf.seek(Token(token)), Token(token)).is_some());
            }
        }

        #[test]
        fn a_split_never_parts_equal_tokens_unless_all_are_equal(tokens in tokens()) {
            prop_assume!(tokens.len() > 1);
            let mut lower = fill(&tokens);
            let (first, upper) = lower.split();
            check(&lower);
            check(&upper);
            prop_assert_eq!(lower.len() + upper.len(), tokens.len());
            prop_assert!(lower.len() > 0 && upper.len() > 0);
            prop_assert_eq!(upper.next(0).unwrap().1, first);
            let all_equal = tokens.iter().all(|token| *token == tokens[0]);
            prop_assert_eq!(lower.at(lower.seek(first), first).is_some(), all_equal);
        }
    }

    #[test]
    fn slots_stay_two_thirds_full_or_better() {
        let mut state = 1u64;
        let tokens: Vec<u64> = (0..LEAF_LEN_MAX)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                Token(state).remix()
            })
            .collect();
        for len in (50..=LEAF_LEN_MAX).step_by(10) {
            let leaf = fill(&tokens[..len]);
            assert!(leaf.slots.capacity() * 2 <= len * 3, "{} for {len}", leaf.slots.capacity());
        }
    }
}
