//! What adds to a tree and what does not.

use annulus_engine::model::{Dot, NamespaceId, OriginId, Record, Timestamp, Token};

use super::*;

const SEED: HashSeed = HashSeed(7);

fn record(value: &str) -> Record {
    Record {
        token: Token(99),
        namespace: NamespaceId(1),
        incarnation: 3,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(4), sequence: 17 },
        timestamp: Timestamp::new(WallMicros(5_000_000), 0),
        expiry_ms: 0,
        key: b"key".to_vec(),
        value: value.as_bytes().to_vec(),
    }
}

fn parts(record: &Record) -> Vec<(Hour, Sum)> {
    let mut parts = Vec::new();
    for_each_part(&record.as_ref(), SEED, |until, sum| parts.push((until, sum)));
    parts
}

#[test]
fn a_tombstone_adds_nothing() {
    let tombstone = Record { kind: Kind::Delete, value: Vec::new(), ..record("") };
    assert_eq!(parts(&tombstone), []);
}

#[test]
fn every_field_that_replicas_must_agree_on_changes_the_sum_and_the_incarnation_does_not() {
    let base = record("value");
    let others = [
        Record { token: Token(98), ..base.clone() },
        Record { namespace: NamespaceId(2), ..base.clone() },
        Record { key: b"kex".to_vec(), ..base.clone() },
        Record { value: b"valuf".to_vec(), ..base.clone() },
        Record { timestamp: Timestamp(base.timestamp.0 + 1), ..base.clone() },
        Record { dot: Dot { sequence: 18, ..base.dot }, ..base.clone() },
        Record { dot: Dot { origin: OriginId(5), ..base.dot }, ..base.clone() },
    ];
    for other in others {
        assert_ne!(parts(&base)[0].1.0[0], parts(&other)[0].1.0[0], "{other:?}");
        assert_ne!(parts(&base)[0].1.0[1], parts(&other)[0].1.0[1], "{other:?}");
    }
    assert_eq!(parts(&base), parts(&Record { incarnation: 4, ..base.clone() }));
}

#[test]
fn a_plain_record_adds_what_the_same_write_adds_as_a_key_state() {
    let plain = record("value");
    let state = KeyState::of_record(&plain.as_ref()).unwrap().to_record(&plain.as_ref());
    assert_eq!(state.kind, Kind::Siblings);
    assert_eq!(parts(&plain), parts(&state));
}

#[test]
fn a_state_that_cannot_be_read_differs_from_every_sound_one() {
    let broken = Record { kind: Kind::Siblings, ..record("value") };
    assert_eq!(parts(&broken).len(), 1);
    assert_ne!(parts(&broken), parts(&Record { value: b"other".to_vec(), ..broken.clone() }));
}

#[test]
fn all_lives_of_one_length_end_their_comparison_in_a_few_hours() {
    let written = WallMicros(0);
    let month_ms = 720 * HOUR_MS;
    let mut untils: Vec<Hour> = (0..720)
        .map(|hour| WallMicros(hour * HOUR_MS * 1000))
        .map(|wall| Hour::last_compared(wall, wall.as_millis() + month_ms))
        .collect();
    untils.dedup();
    assert!(untils.len() <= 13, "{}", untils.len());
    // Never after the expiry, and at most an eighth of the life before it.
    for life in [1, 2, 7, 8, 9, 100, 720, 100_000] {
        let Hour(until) = Hour::last_compared(written, life * HOUR_MS);
        assert!(u64::from(until) <= life && u64::from(until) * 8 >= life * 7, "{life}: {until}");
    }
    assert_eq!(Hour::last_compared(written, 0), Hour::NEVER);
    assert_eq!(Hour::last_compared(written, HOUR_MS - 1), Hour(0));
    assert!(Hour::last_compared(written, u64::MAX) < Hour::NEVER);
}

#[test]
fn the_sums_are_the_same_for_ever() {
    // Golden: nodes of different builds compare their trees.
    assert_eq!(
        parts(&record("value"))[0].1,
        Sum([18_220_131_343_934_014_290, 1_491_052_293_009_003_993])
    );
}
