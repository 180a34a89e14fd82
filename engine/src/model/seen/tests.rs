//! The laws of seen-sets, against plain sets of dots.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn dot(origin: u32, sequence: u64) -> Dot {
    Dot { origin: OriginId(origin), sequence }
}

/// Rising with the sequence, as every origin stamps.
fn stamp(dot: Dot) -> Timestamp {
    Timestamp(dot.sequence * 10 + u64::from(dot.origin.0))
}

fn set(dots: &BTreeSet<Dot>) -> SeenSet {
    seen_in_order(dots.iter().copied())
}

fn seen_in_order(dots: impl IntoIterator<Item = Dot>) -> SeenSet {
    let mut seen = SeenSet::new();
    dots.into_iter().for_each(|dot| assert!(seen.see(dot, stamp(dot))));
    seen
}

fn dots() -> impl Strategy<Value = BTreeSet<Dot>> {
    let one = (0u32..3, 1u64..14).prop_map(|(origin, sequence)| dot(origin, sequence));
    prop::collection::btree_set(one, 0..30)
}

/// Any set, of stamps that agree with nothing.
fn sets() -> impl Strategy<Value = SeenSet> {
    let runs = prop::collection::vec((0u32..3, 1u64..14, 0u64..4, 0u64..50), 0..10);
    (runs, prop::collection::vec((0u32..3, 1u64..9, 0u64..50), 0..2)).prop_map(|(runs, voids)| {
        let mut seen = SeenSet::new();
        for (origin, first, more, stamp) in runs {
            for sequence in first..=first + more {
                seen.see(dot(origin, sequence), Timestamp(stamp));
            }
        }
        for (origin, sequence, stamp) in voids {
            seen.void_up_to(OriginId(origin), sequence, Timestamp(stamp));
        }
        seen
    })
}

fn union(a: &SeenSet, b: &SeenSet) -> SeenSet {
    let mut both = a.clone();
    both.union(b);
    both
}

fn encode(seen: &SeenSet) -> Vec<u8> {
    let mut bytes = b"x".to_vec();
    seen.encode(&mut bytes);
    bytes.split_off(1)
}

fn all() -> impl Iterator<Item = Dot> {
    (0..4).flat_map(|origin| (0..20).map(move |sequence| dot(origin, sequence)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn union_is_commutative_associative_and_idempotent(a in sets(), b in sets(), c in sets()) {
        prop_assert_eq!(union(&a, &a), a.clone());
        prop_assert_eq!(union(&a, &b), union(&b, &a));
        prop_assert_eq!(union(&union(&a, &b), &c), union(&a, &union(&b, &c)));
    }

    #[test]
    fn what_is_seen_in_any_order_is_the_same_set(dots in dots(), shuffled in Just(()).prop_perturb(|(), mut random| random.next_u64())) {
        let mut order: Vec<Dot> = dots.iter().copied().collect();
        order.sort_by_key(|dot| (dot.sequence * 31 + u64::from(dot.origin.0)).wrapping_mul(shuffled | 1));
        let seen = seen_in_order(order);
        prop_assert_eq!(&seen, &set(&dots));
        prop_assert_eq!(seen.digest(), set(&dots).digest());
        for dot in all().filter(|dot| dot.sequence > 0) {
            prop_assert_eq!(seen.contains(dot), dots.contains(&dot));
        }
        for origin in (0..3).map(OriginId) {
            let of = |dot: &&Dot| dot.origin == origin;
            let last = dots.iter().filter(of).map(|dot| dot.sequence).max();
            prop_assert_eq!(seen.last(origin), last.unwrap_or(0));
            let base = (1..20).take_while(|sequence| dots.contains(&dot(origin.0, *sequence))).last();
            prop_assert_eq!(seen.base().get(origin), base.unwrap_or(0));
            prop_assert_eq!(seen.of(origin).is_contiguous(), base == last);
        }
    }

    #[test]
    fn a_dot_is_news_once(dots in dots(), again in (0u32..3, 1u64..14)) {
        let mut seen = set(&dots);
        let again = dot(again.0, again.1);
        prop_assert_eq!(seen.see(again, stamp(again)), !dots.contains(&again));
        prop_assert!(!seen.see(again, stamp(again)));
    }

    #[test]
    fn union_covers_and_counts_are_those_of_plain_sets(a in dots(), b in dots()) {
        let (one, other) = (set(&a), set(&b));
        prop_assert_eq!(union(&one, &other), set(&(&a | &b)));
        prop_assert_eq!(one.covers(&other), a.is_superset(&b));
        prop_assert_eq!(one.is_same(&other), a == b);
        prop_assert_eq!(one.digest() == other.digest(), a == b);
        prop_assert_eq!(one.lacked(&other), (&b - &a).len() as u64);
        prop_assert!(one.newest() >= a.iter().copied().map(stamp).max().unwrap_or_default());
    }

    #[test]
    fn all_that_is_lacked_is_stamped_later_and_nothing_sharper_is_true(a in dots(), b in dots()) {
        let lacked = &b - &a;
        let Some(after) = set(&a).lacks(&set(&b)) else {
            prop_assert!(lacked.is_empty());
            return Ok(());
        };
        prop_assert!(lacked.iter().all(|dot| stamp(*dot) > after));
        // It is the stamp of a write before one that is lacked, or of none.
        let is_before = |seen: &&Dot| lacked.iter().any(|dot| dot.origin == seen.origin && dot.sequence > seen.sequence);
        prop_assert!(after == Timestamp::ZERO || a.iter().filter(is_before).any(|dot| stamp(*dot) == after));
    }

    #[test]
    fn a_void_closes_the_gaps_below_it(dots in dots(), sequence in 1u64..16) {
        let mut seen = set(&dots);
        seen.void_up_to(OriginId(1), sequence, stamp(dot(1, sequence)));
        let filled = &dots | &(1..=sequence).map(|sequence| dot(1, sequence)).collect();
        prop_assert_eq!(seen, set(&filled));
    }

    #[test]
    fn sets_come_back_and_cut_ones_are_refused(seen in sets()) {
        let bytes = encode(&seen);
        prop_assert_eq!(SeenSet::decode(&bytes), Ok(seen));
        for cut in 0..bytes.len() {
            prop_assert!(SeenSet::decode(&bytes[..cut]).is_err());
        }
        prop_assert!(SeenSet::decode(&[&bytes[..], b"x"].concat()).is_err());
    }

    #[test]
    fn a_set_cut_to_a_size_claims_nothing_that_the_whole_does_not(seen in sets(), size in 0usize..400) {
        let mut bytes = Vec::new();
        seen.encode_within(&mut bytes, size);
        let part = SeenSet::decode(&bytes).unwrap();
        prop_assert!(seen.covers(&part));
        prop_assert!(part.base() == seen.base());
        prop_assert!(seen.iter().all(|(origin, of)| part.last(origin) == of.last()));
        prop_assert!(bytes.len() <= size + 2 + seen.iter().len() * 60);
    }

    #[test]
    fn any_bytes_are_a_set_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..80), small in any::<bool>()) {
        if small {
            bytes.iter_mut().for_each(|byte| *byte %= 4);
        }
        if let Some(first) = bytes.first_mut() {
            *first = FORMAT;
        }
        if let Ok(mut seen) = SeenSet::decode(&bytes) {
            let again = encode(&seen);
            prop_assert_eq!(SeenSet::decode(&again), Ok(seen.clone()));
            prop_assert_eq!(&again, &bytes);
            // Numbers at the end of all numbers do not overflow.
            let other = seen.clone();
            seen.union(&other);
            prop_assert_eq!(&seen, &other);
            for (origin, of) in other.iter() {
                seen.see(Dot { origin, sequence: of.last().saturating_add(1) }, Timestamp::MAX);
                seen.see(Dot { origin, sequence: u64::MAX }, Timestamp::MAX);
                seen.void_up_to(origin, u64::MAX, Timestamp::MAX);
            }
            let _ = (seen.lacked(&other), other.lacked(&seen), other.lacks(&seen));
        }
    }
}

#[test]
fn a_count_beyond_the_bytes_reserves_nothing() {
    assert!(SeenSet::decode(b"\x01\xff\xff\xff\xff\x0f").is_err());
    let mut bytes = b"\x01\x01\x05\x02".to_vec();
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
    assert_eq!(SeenSet::decode(&bytes), Err(InvalidSeen("too many runs")));
}

#[test]
fn a_gap_that_never_closes_costs_one_run() {
    // An origin that crashed goes on behind its ceiling, and its own gap stays until it is void.
    let mut seen = seen_in_order((1..=9).chain(20..=500).map(|sequence| dot(1, sequence)));
    assert_eq!(seen.of(OriginId(1)).run_count(), 1);
    let other = seen_in_order((1..=9).chain(20..=510).map(|sequence| dot(1, sequence)));
    // What is lacked begins behind the run, not behind the gap that both have.
    assert_eq!(seen.lacks(&other), Some(stamp(dot(1, 500))));
    seen.void_up_to(OriginId(1), 19, stamp(dot(1, 9)));
    assert_eq!(seen.of(OriginId(1)).base(), 500);
    assert_eq!(seen.of(OriginId(1)).base_stamp(), stamp(dot(1, 500)));
}

#[test]
fn what_finds_no_room_is_counted_and_not_claimed() {
    let mut seen = SeenSet::new();
    for run in 1..=RUNS_MAX as u64 {
        assert!(seen.see(dot(1, run * 2), Timestamp(run)));
    }
    assert_eq!(seen.unnoted(), 0);
    let late = dot(1, RUNS_MAX as u64 * 2 + 5);
    assert!(seen.see(late, Timestamp(1)) && !seen.contains(late));
    assert_eq!(seen.unnoted(), 1);
    // What joins runs still finds room, and makes some.
    assert!(seen.see(dot(1, 3), Timestamp(1)) && seen.contains(dot(1, 3)));
    assert!(seen.see(late, Timestamp(1)) && seen.contains(late));
    let other = seen_in_order((0..9).map(|at| dot(1, at * 2 + (1 << 40))));
    let mut both = seen.clone();
    both.union(&other);
    assert_eq!(both.of(OriginId(1)).run_count(), RUNS_MAX);
    assert!(both.covers(&seen) && both.unnoted() == 10);
}
