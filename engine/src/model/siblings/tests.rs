//! The laws of key states, the chapter's examples, the limits, and the threshold.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::limits::{VALUE_SIZE_CEILING, VECTOR_ENTRIES_MAX};
use super::*;

fn dot(origin: u32, sequence: u64) -> Dot {
    Dot { origin: OriginId(origin), sequence }
}

fn put(dot: Dot, value: &[u8]) -> Sibling<'_> {
    // Stamps that agree with neither origin nor sequence.
    let timestamp = Timestamp(10 + dot.sequence * 7 % 5 + u64::from(dot.origin.0) % 2);
    Sibling { dot, timestamp, is_delete: false, is_blind: false, expiry_ms: 0, value: value.into() }
}

fn delete(dot: Dot) -> Sibling<'static> {
    Sibling { is_delete: true, ..put(dot, b"") }
}

fn vector(entries: &[(u32, u64)]) -> VersionVector {
    entries.iter().map(|(origin, sequence)| dot(*origin, *sequence)).collect()
}

/// What a dot's write says is a function of the dot, as everywhere.
fn content(dot: Dot) -> Sibling<'static> {
    const VALUES: [&[u8]; 3] = [b"", b"x", b"a longer value"];
    let number = dot.sequence + u64::from(dot.origin.0);
    let is_delete = number % 5 == 4;
    let value = if is_delete { b"" } else { VALUES[usize::try_from(dot.sequence % 3).unwrap()] };
    Sibling { is_delete, is_blind: dot.sequence.is_multiple_of(2), ..put(dot, value) }
}

fn dots() -> impl Strategy<Value = Dot> {
    (0u32..3, 1u64..6).prop_map(|(origin, sequence)| dot(origin, sequence))
}

/// Any state that replicas can come to, stripped ones among them.
pub(in crate::model) fn states() -> impl Strategy<Value = KeyState<'static>> {
    let seen = prop::collection::vec((dots(), 0u64..4), 0..4);
    (prop::collection::btree_set(dots(), 0..5), seen, prop::option::of(dots())).prop_map(
        |(live, seen, floor)| {
            let mut state = KeyState::new();
            for (Dot { origin, sequence }, stamp) in seen {
                state.see(Seen { origin, sequence, timestamp: Timestamp(stamp) });
            }
            let siblings: Vec<_> = live.into_iter().map(content).collect();
            let blind = siblings.iter().filter(|sibling| sibling.is_blind);
            let floor =
                floor.filter(|dot| content(*dot).is_blind).map(|dot| content(dot).version());
            state.floor = blind.map(Sibling::version).max().max(floor);
            state.siblings = siblings;
            let floor = state.floor;
            state.siblings.retain(|s| !s.is_blind || Some(s.version()) == floor);
            state
        },
    )
}

proptest! {
    #[test]
    fn merge_is_commutative_associative_and_idempotent(a in states(), b in states(), c in states()) {
        prop_assert_eq!(a.merge(&a), a.clone());
        prop_assert_eq!(a.merge(&b), b.merge(&a));
        prop_assert_eq!(a.merge(&b).merge(&c), a.merge(&b.merge(&c)));
        prop_assert_eq!(a.merge(&b).merge(&a), a.merge(&b));
    }

    #[test]
    fn states_come_back_and_cut_ones_are_refused(state in states(), cut in 0usize..200) {
        let bytes = state.encode();
        prop_assert_eq!(KeyState::decode(&bytes), Ok(state));
        if cut < bytes.len() {
            prop_assert!(KeyState::decode(&bytes[..cut]).is_err());
        }
        prop_assert!(KeyState::decode(&[&bytes[..], b"x"].concat()).is_err());
    }

    #[test]
    fn whatever_decodes_is_what_encode_writes(mut bytes in prop::collection::vec(0u8..6, 0..60), junk: u8, at in 0usize..60) {
        if let Some(byte) = bytes.get_mut(at) {
            *byte = junk;
        }
        if let Some(first) = bytes.first_mut() {
            *first = FORMAT;
        }
        if let Ok(state) = KeyState::decode(&bytes) {
            prop_assert_eq!(state.encode(), bytes);
        }
    }

    #[test]
    fn filling_undoes_stripping(state in states(), entries in prop::collection::vec(dots(), 0..4)) {
        let base: VersionVector = entries.into_iter().collect();
        let mut filled = state.clone();
        filled.fill(&base);
        let mut stripped = filled.clone();
        stripped.strip(&base);
        prop_assert!(stripped.seen.len() <= state.seen.len());
        stripped.fill(&base);
        prop_assert_eq!(stripped.vector(), filled.vector());
        prop_assert_eq!(stripped.siblings, filled.siblings);
    }
}

/// A replica, and what it must hold by the definition of causality: the writes it knows, less
/// those that a known write replaced.
#[derive(Clone, Default)]
struct Replica {
    state: KeyState<'static>,
    known: BTreeSet<Dot>,
}

#[derive(Clone, Debug)]
enum Step {
    /// A client reads at one replica and keeps the context.
    Read { replica: usize, client: usize },
    /// It writes at another, with what it read last.
    Write { replica: usize, client: usize },
    /// It writes without having read.
    WriteBlindly { replica: usize },
    /// One replica's state reaches another.
    Send { from: usize, to: usize },
    /// The origin writes another key of the partition, so that its counter moves on.
    WriteElsewhere { replica: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0usize..3, 0usize..3).prop_map(|(replica, client)| Step::Read { replica, client }),
        (0usize..3, 0usize..3).prop_map(|(replica, client)| Step::Write { replica, client }),
        (0usize..3).prop_map(|replica| Step::WriteBlindly { replica }),
        (0usize..3, 0usize..3).prop_map(|(from, to)| Step::Send { from, to }),
        (0usize..3).prop_map(|replica| Step::WriteElsewhere { replica }),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    #[test]
    fn a_replica_holds_exactly_the_writes_that_nobody_replaced(steps in steps()) {
        let mut replicas: [Replica; 3] = Default::default();
        let mut sequences = [0u64; 3];
        let mut clients: [(Context, BTreeSet<Dot>); 3] = Default::default();
        let mut replaced: BTreeSet<(Dot, Dot)> = BTreeSet::new();
        for step in steps {
            let (replica, (context, read)) = match step {
                Step::Read { replica, client } => {
                    let Replica { state, known } = &replicas[replica];
                    clients[client] = (state.context(), known.clone());
                    continue;
                }
                Step::Send { from, to } => {
                    let Replica { state, known } = replicas[from].clone();
                    replicas[to].state = replicas[to].state.merge(&state);
                    replicas[to].known.extend(known);
                    continue;
                }
                Step::WriteElsewhere { replica } => {
                    sequences[replica] += 1;
                    continue;
                }
                Step::WriteBlindly { replica } => (replica, Default::default()),
                Step::Write { replica, client } => (replica, clients[client].clone()),
            };
            sequences[replica] += 1;
            let new = dot(u32::try_from(replica).unwrap(), sequences[replica]);
            replicas[replica].state.write(put(new, b"v"), &context).unwrap();
            replaced.extend(read.iter().map(|old| (new, *old)));
            replicas[replica].known.extend(read);
            replicas[replica].known.insert(new);
        }
        for Replica { state, known } in &replicas {
            let is_replaced = |old: &Dot| known.iter().any(|new| replaced.contains(&(*new, *old)));
            let wanted: Vec<Dot> = known.iter().copied().filter(|dot| !is_replaced(dot)).collect();
            let held: Vec<Dot> = state.siblings().iter().map(|sibling| sibling.dot).collect();
            prop_assert_eq!(held, wanted);
        }
    }
}

#[test]
fn the_chapters_walk_from_d1_to_d5() {
    const SX: u32 = 0;
    const SY: u32 = 1;
    const SZ: u32 = 2;
    let values = |state: &KeyState<'_>| {
        let mut values: Vec<Vec<u8>> =
            state.live(WallMicros(0)).map(|s| s.value.to_vec()).collect();
        values.sort();
        values
    };

    // A client writes D1, handled by Sx.
    let mut state = KeyState::new();
    state.write(put(dot(SX, 1), b"D1"), &Context::default()).unwrap();
    assert_eq!(state.vector(), vector(&[(SX, 1)]));

    // It reads D1 and writes D2 by Sx; D2 descends from D1 and replaces it.
    let context = state.context();
    state.write(put(dot(SX, 2), b"D2"), &context).unwrap();
    assert_eq!(state.vector(), vector(&[(SX, 2)]));
    assert_eq!(values(&state), [b"D2"]);

    // Two clients read D2. One writes D3 by Sy, the other D4 by Sz.
    let context = state.context();
    let (mut at_y, mut at_z) = (state.clone(), state.clone());
    at_y.write(put(dot(SY, 1), b"D3"), &context).unwrap();
    at_z.write(put(dot(SZ, 1), b"D4"), &context).unwrap();
    assert_eq!(at_y.vector(), vector(&[(SX, 2), (SY, 1)]));
    assert_eq!(at_z.vector(), vector(&[(SX, 2), (SZ, 1)]));
    assert_eq!(at_y.vector().partial_cmp(&at_z.vector()), None);

    // A reader gets both and reconciles them by Sx: D5.
    let mut state = at_y.merge(&at_z);
    assert_eq!(values(&state), [b"D3", b"D4"]);
    let context = state.context();
    state.write(put(dot(SX, 3), b"D5"), &context).unwrap();
    assert_eq!(values(&state), [b"D5"]);
    assert_eq!(state.vector(), vector(&[(SX, 3), (SY, 1), (SZ, 1)]));
    // Late copies of D3 and D4 change nothing.
    assert_eq!(state.merge(&at_y).merge(&at_z), state);
}

#[test]
fn interleaved_writers_at_one_origin_do_not_explode() {
    // Sibling explosion: with plain per-server vectors the key would end with 100 values.
    let mut state = KeyState::new();
    let (mut one, mut other) = (Context::default(), Context::default());
    for sequence in (1..100).step_by(2) {
        state.write(put(dot(0, sequence), b"one"), &one).unwrap();
        one = state.context();
        state.write(put(dot(0, sequence + 1), b"other"), &other).unwrap();
        other = state.context();
        assert!(state.siblings().len() <= 2);
    }
}

#[test]
fn a_delete_replaces_what_was_read_and_nothing_else() {
    let mut state = KeyState::new();
    state.write(put(dot(0, 1), b"read"), &Context::default()).unwrap();
    let context = state.context();
    state.write(put(dot(1, 1), b"unread"), &Context::default()).unwrap();
    state.write(delete(dot(0, 2)), &context).unwrap();
    let live: Vec<Vec<u8>> =
        state.live(WallMicros(0)).map(|sibling| sibling.value.to_vec()).collect();
    assert_eq!(live, [b"unread"]);
}

#[test]
fn the_winner_by_last_write_is_the_newest_sibling() {
    let mut state = KeyState::new();
    let old = Sibling { timestamp: Timestamp(5), ..put(dot(9, 1), b"old") };
    let new = Sibling { timestamp: Timestamp(6), ..put(dot(2, 1), b"new") };
    state.write(new, &Context::default()).unwrap();
    state.write(old, &Context::default()).unwrap();
    assert_eq!(state.newest(), Some(&new));
}

#[test]
fn a_write_that_adds_beyond_a_limit_is_refused_and_one_that_reduces_never() {
    let mut state = KeyState::new();
    for sequence in 1..=SIBLINGS_MAX as u64 {
        state.write(put(dot(0, sequence), b"v"), &Context::default()).unwrap();
    }
    let before = state.clone();
    let refused = state.write(put(dot(0, 65), b"v"), &Context::default());
    assert_eq!(refused, Err(TooManySiblings { count: 65, bytes: 65 }));
    assert_eq!(state, before);

    let context = Context { vector: vector(&[(0, 1)]), timestamp: Timestamp(0) };
    state.write(put(dot(0, 65), b"v"), &context).unwrap();
    assert_eq!(state.siblings().len(), SIBLINGS_MAX);

    // Merging never refuses: 128 siblings after a partition, which a reader reduces at once.
    let mut other = KeyState::new();
    for sequence in 1..=SIBLINGS_MAX as u64 {
        other.write(put(dot(1, sequence), b"v"), &Context::default()).unwrap();
    }
    let mut merged = state.merge(&other);
    assert_eq!(merged.siblings().len(), 2 * SIBLINGS_MAX);
    let context = Context { vector: vector(&[(1, 2)]), timestamp: Timestamp(0) };
    merged.write(put(dot(0, 66), b"v"), &context).unwrap();
    assert_eq!(merged.siblings().len(), 2 * SIBLINGS_MAX - 1);
}

#[test]
fn bytes_are_limited_but_a_single_value_is_not() {
    let large = vec![0; VALUE_SIZE_CEILING];
    let mut state = KeyState::new();
    state.write(put(dot(0, 1), &large), &Context::default()).unwrap();
    let refused = state.write(put(dot(0, 2), b"v"), &Context::default());
    assert_eq!(refused, Err(TooManySiblings { count: 2, bytes: VALUE_SIZE_CEILING + 1 }));
    let context = state.context();
    state.write(put(dot(0, 2), &large), &context).unwrap();
    assert_eq!(state.siblings().len(), 1);
}

#[test]
fn a_thousand_origins_leave_a_short_vector_and_the_value() {
    // T37 of the test plan.
    let mut state = KeyState::new();
    let mut truncated = 0;
    for origin in 0..1000 {
        let context = state.context();
        let stamp = Timestamp(u64::from(origin));
        let write = Sibling { timestamp: stamp, ..put(dot(origin, 1), b"v") };
        state.write(write, &context).unwrap();
        truncated += state.prune(VECTOR_ENTRIES_MAX, &VersionVector::new()).truncated;
        assert_eq!(state.siblings(), [write]);
        assert!(state.vector().len() <= VECTOR_ENTRIES_MAX);
    }
    assert_eq!(truncated, 1000 - VECTOR_ENTRIES_MAX);
    // The oldest went, the newest stayed.
    assert_eq!(state.vector().iter().next(), Some(dot(976, 1)));
}

/// A key written once by each of origins 0 to 4, each time over all before it.
fn chain() -> (Vec<KeyState<'static>>, KeyState<'static>) {
    let mut states = vec![KeyState::new()];
    for origin in 0..5 {
        let mut state = states[states.len() - 1].clone();
        let context = state.context();
        let stamp = Timestamp(u64::from(origin));
        state.write(Sibling { timestamp: stamp, ..put(dot(origin, 1), b"v") }, &context).unwrap();
        states.push(state);
    }
    let newest = states.pop().unwrap();
    (states, newest)
}

#[test]
fn pruning_what_the_base_implies_has_no_consequence() {
    let (olds, mut state) = chain();
    let whole = state.clone();
    // Origin 1 is implied though younger than origin 0: it goes first.
    let base = vector(&[(1, 1), (2, 1)]);
    assert_eq!(state.prune(3, &base), Pruned { implied: 2, truncated: 0 });
    assert_eq!(state.vector(), vector(&[(0, 1), (3, 1), (4, 1)]));
    state.fill(&base);
    for old in &olds {
        assert_eq!(state.merge(old).siblings(), whole.siblings());
    }
}

#[test]
fn pruning_what_nothing_implies_is_counted_and_costs_a_sibling_never_a_value() {
    let (olds, mut state) = chain();
    let value = state.siblings().to_vec();
    assert_eq!(state.prune(3, &VersionVector::new()), Pruned { implied: 0, truncated: 2 });
    assert_eq!(state.siblings(), value);
    // What it costs: the stale copy of origin 0 is a sibling again, beside the value.
    let merged = state.merge(&olds[1]);
    assert_eq!(merged.siblings().len(), 2);
    assert!(merged.siblings().contains(&value[0]));
    // A stale copy of an origin that was kept is still known as obsolete.
    assert_eq!(state.merge(&olds[3]).siblings(), value);
}

#[test]
fn an_entry_with_a_sibling_is_never_pruned() {
    let mut state = KeyState::new();
    for origin in 0..30 {
        state.write(put(dot(origin, 1), b"v"), &Context::default()).unwrap();
    }
    let before = state.clone();
    assert_eq!(state.prune(VECTOR_ENTRIES_MAX, &VersionVector::new()), Pruned::default());
    assert_eq!(state, before);
}

#[test]
fn the_format_is_version_1() {
    let mut state = KeyState::new();
    let context = Context { vector: vector(&[(300, 2)]), timestamp: Timestamp(0x0102) };
    state.write(Sibling { expiry_ms: 129, ..put(dot(1, 5), b"hi") }, &context).unwrap();
    state.floor = Some((Timestamp(3), dot(4, 5)));
    let golden = [
        &[1, 1, 3, 0, 0, 0, 0, 0, 0, 0, 4, 5][..],
        &[2, 1, 5, 11, 0, 0, 0, 0, 0, 0, 0, 0xac, 2, 2, 2, 1, 0, 0, 0, 0, 0, 0],
        &[1, 0, 1, 5, 11, 0, 0, 0, 0, 0, 0, 0, 0x81, 1, 2, b'h', b'i'],
    ];
    assert_eq!(state.encode(), golden.concat());
}
