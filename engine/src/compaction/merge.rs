//! K-way merge of sorted sources by `(token, namespace, key)`. Pure: it never waits.
//!
//! Sources hand out records from memory and may run dry; the merge then names the source to
//! refill and goes on where it was. Versions of one key meet in `supersedes`: the sources come
//! newest first. Invariant: records come out in strictly ascending order, and each key of any
//! source comes out exactly once or was allowed to go by [`Retention`]. Off both paths: compaction.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::log::Lsn;
use crate::model::merge::supersedes;
use crate::model::siblings::KeyState;
use crate::model::{Kind, RecordRef, Token, WallMicros};
use crate::sstable::PartitionRun;

/// Sorted records, some of them in memory.
pub trait Source {
    /// Token of the next record, if it is in memory.
    fn token(&self) -> Option<Token>;
    /// The next record.
    ///
    /// # Panics
    /// When [`Source::token`] is `None`.
    fn record(&self) -> RecordRef<'_>;
    /// Goes to the record after the next.
    fn advance(&mut self);
    /// Whether nothing follows what is in memory.
    fn is_finished(&self) -> bool;
}

/// Which records may go. The shard answers; in a cluster from what all replicas have seen.
pub trait Retention {
    /// Whether the record belongs to an incarnation of its partition that was dropped: it goes
    /// wherever it is met, before it is compared with others.
    fn is_dropped(&self, record: &RecordRef<'_>) -> bool;
    /// The same of all records of a partition in a table.
    fn is_dropped_run(&self, _run: &PartitionRun) -> bool {
        false
    }
    /// Whether a tombstone or an expired record may be forgotten. Asked only where the other
    /// records of its key that were logged up to `released` are superseded and go with it.
    fn is_purgeable(&self, record: &RecordRef<'_>, released: Lsn) -> bool;
}

/// Nothing was dropped, and every dead record may go: a shard without replicas.
#[derive(Clone, Copy, Debug, Default)]
pub struct PurgeAll;

impl Retention for PurgeAll {
    fn is_dropped(&self, _record: &RecordRef<'_>) -> bool {
        false
    }
    fn is_purgeable(&self, _record: &RecordRef<'_>, _released: Lsn) -> bool {
        true
    }
}

/// What the merge wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// [`Merge::record`] is the next record; then [`Merge::advance`].
    Ready,
    /// A key went away; ask again. Returned so that long stretches of dead keys can be cut.
    Gone,
    /// Refill this source, then ask again.
    Dry(usize),
    /// Every source has ended.
    Finished,
}

/// Counts of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MergeStats {
    /// Records read.
    pub read: u64,
    /// Records of dropped incarnations.
    pub dropped: u64,
    /// Tombstones and expired records that were forgotten.
    pub purged: u64,
    /// Records given out.
    pub kept: u64,
}

/// A merge of sorted sources.
#[derive(Debug)]
pub struct Merge<S> {
    sources: Vec<S>,
    /// Heads of the sources that are in memory and not in `same`.
    heads: BinaryHeap<Reverse<(Token, usize)>>,
    /// Sources whose head must be looked at anew.
    moved: Vec<usize>,
    /// Sources whose head is the current key.
    same: Vec<usize>,
    /// The source that holds the newest record of the current key.
    winner: Option<usize>,
    /// Records that are dead at this moment may be purged, if anything may.
    now: WallMicros,
    bottom: Option<Lsn>,
    stats: MergeStats,
}

impl<S: Source> Merge<S> {
    /// A merge of sources, newest first, as of `now`. `bottom` says that everything that was logged
    /// up to there, if it is not superseded by something newer, is in the sources: so that dead
    /// records hide nothing that was.
    #[must_use]
    pub fn new(sources: Vec<S>, now: WallMicros, bottom: Option<Lsn>) -> Merge<S> {
        let moved = (0..sources.len()).rev().collect();
        Merge {
            heads: BinaryHeap::with_capacity(sources.len()),
            moved,
            same: Vec::with_capacity(sources.len()),
            winner: None,
            sources,
            now,
            bottom,
            stats: MergeStats::default(),
        }
    }

    /// The sources, to refill one.
    pub fn sources_mut(&mut self) -> &mut [S] {
        &mut self.sources
    }

    /// Counts so far.
    #[must_use]
    pub fn stats(&self) -> MergeStats {
        self.stats
    }

    /// Finds the next record, if memory holds enough to say which it is.
    pub fn poll<R: Retention + ?Sized>(&mut self, retention: &R) -> Step {
        if self.winner.is_some() {
            return Step::Ready;
        }
        while let Some(&index) = self.moved.last() {
            let source = &self.sources[index];
            match source.token() {
                Some(token) => self.heads.push(Reverse((token, index))),
                None if source.is_finished() => {}
                None => return Step::Dry(index),
            }
            self.moved.pop();
        }
        if !self.take_next_key() {
            return Step::Finished;
        }
        self.merge_versions(retention);
        let is_kept = match self.winner {
            None => false,
            Some(winner) => {
                let record = self.sources[winner].record();
                let purged = self.bottom.is_some_and(|released| {
                    is_dead(&record, self.now) && retention.is_purgeable(&record, released)
                });
                self.stats.purged += u64::from(purged);
                !purged
            }
        };
        if is_kept {
            self.stats.kept += 1;
            return Step::Ready;
        }
        self.advance();
        Step::Gone
    }

    /// The current record, after [`Step::Ready`].
    ///
    /// # Panics
    /// When `poll` has not said so.
    #[must_use]
    pub fn record(&self) -> RecordRef<'_> {
        self.sources[self.winner.expect("poll said that a record is ready")].record()
    }

    /// Goes past the current key in every source.
    pub fn advance(&mut self) {
        self.winner = None;
        for index in self.same.drain(..) {
            self.sources[index].advance();
            self.stats.read += 1;
            self.moved.push(index);
        }
    }

    /// Moves the sources that hold the smallest key from `heads` to `same`.
    fn take_next_key(&mut self) -> bool {
        let Some(Reverse((token, first))) = self.heads.pop() else { return false };
        self.same.push(first);
        while let Some(&Reverse((other, index))) = self.heads.peek()
            && other == token
        {
            self.heads.pop();
            self.same.push(index);
        }
        if self.same.len() > 1 {
            // Equal tokens are mostly one key; where they are not, the greater ones go back.
            let least = self.same.iter().map(|&index| self.sources[index].record());
            let least = least.min_by(RecordRef::cmp_by_key).expect("two or more");
            let (sources, heads) = (&self.sources, &mut self.heads);
            self.same.retain(|&index| {
                let is_least = sources[index].record().cmp_by_key(&least).is_eq();
                if !is_least {
                    heads.push(Reverse((token, index)));
                }
                is_least
            });
        }
        true
    }

    /// Finds the newest of the heads of `same`; none when all of them were dropped.
    fn merge_versions<R: Retention + ?Sized>(&mut self, retention: &R) {
        self.winner = None;
        for &index in &self.same {
            let record = self.sources[index].record();
            if retention.is_dropped(&record) {
                self.stats.dropped += 1;
                continue;
            }
            let is_newest = self.winner.is_none_or(|best| {
                let best_record = self.sources[best].record();
                // The source that comes first is the later one.
                if index < best {
                    supersedes(&record, &best_record)
                } else {
                    !supersedes(&best_record, &record)
                }
            });
            if is_newest {
                self.winner = Some(index);
            }
        }
    }
}

/// Whether the record gives no reader a value at `now`.
fn is_dead(record: &RecordRef<'_>, now: WallMicros) -> bool {
    match record.kind {
        Kind::Siblings => {
            KeyState::of_record(record).is_ok_and(|state| state.live(now).next().is_none())
        }
        Kind::Put | Kind::Delete => !record.is_live(now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Dot, NamespaceId, OriginId, Record, Timestamp};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Records that come into memory a few at a time.
    struct Batches {
        records: Vec<Record>,
        next: usize,
        in_memory: usize,
        batch: usize,
    }

    impl Source for Batches {
        fn token(&self) -> Option<Token> {
            (self.next < self.in_memory).then(|| self.records[self.next].token)
        }
        fn record(&self) -> RecordRef<'_> {
            assert!(self.next < self.in_memory);
            self.records[self.next].as_ref()
        }
        fn advance(&mut self) {
            self.next += 1;
        }
        fn is_finished(&self) -> bool {
            self.in_memory == self.records.len()
        }
    }

    type Key = (Token, NamespaceId, Vec<u8>);

    fn record() -> impl Strategy<Value = Record> {
        // Few tokens and keys, so that versions, and different keys of one token, meet often. All
        // else follows from the stamp, because one write has one content.
        (0u64..4, 0u32..2, 0u8..4, 1u64..60, 0u32..3).prop_map(
            |(token, namespace, key, stamp, incarnation)| {
                let live = !stamp.is_multiple_of(3);
                Record {
                    token: Token(token << 60),
                    namespace: NamespaceId(namespace),
                    incarnation,
                    kind: if live { Kind::Put } else { Kind::Delete },
                    dot: Dot { origin: OriginId(incarnation), sequence: stamp },
                    timestamp: Timestamp(stamp),
                    expiry_ms: if live { (stamp * 7) % 20 } else { 0 },
                    key: vec![key + 1],
                    value: if live { stamp.to_le_bytes().to_vec() } else { Vec::new() },
                }
            },
        )
    }

    struct Rules;
    impl Retention for Rules {
        fn is_dropped(&self, record: &RecordRef<'_>) -> bool {
            record.incarnation == 0
        }
        fn is_purgeable(&self, record: &RecordRef<'_>, released: Lsn) -> bool {
            assert_eq!(released, Lsn(7));
            record.timestamp.0.is_multiple_of(2)
        }
    }

    fn key_of(record: &Record) -> Key {
        (record.token, record.namespace, record.key.clone())
    }

    /// Sources with each key at most once, as tables have it.
    fn sources(tables: &[Vec<Record>], batch: usize) -> Vec<Batches> {
        tables
            .iter()
            .map(|table| {
                let sorted: BTreeMap<Key, Record> =
                    table.iter().map(|record| (key_of(record), record.clone())).collect();
                Batches { records: sorted.into_values().collect(), next: 0, in_memory: 0, batch }
            })
            .collect()
    }

    fn run(mut merge: Merge<Batches>) -> (Vec<Record>, MergeStats) {
        let mut merged = Vec::new();
        loop {
            match merge.poll(&Rules) {
                Step::Ready => {
                    merged.push(merge.record().to_owned());
                    merge.advance();
                }
                Step::Gone => {}
                Step::Dry(index) => {
                    let source = &mut merge.sources_mut()[index];
                    source.in_memory = (source.in_memory + source.batch).min(source.records.len());
                }
                Step::Finished => return (merged, merge.stats()),
            }
        }
    }

    proptest! {
        #[test]
        fn a_merge_is_what_a_map_of_newest_versions_holds(
            tables in prop::collection::vec(prop::collection::vec(record(), 0..20), 0..7),
            batch in 1usize..5, now in 0u64..20_000, is_bottom: bool,
        ) {
            let now = WallMicros(now);
            let mut model: BTreeMap<Key, Record> = BTreeMap::new();
            let made = sources(&tables, batch);
            let read: usize = made.iter().map(|source| source.records.len()).sum();
            for record in made.iter().flat_map(|source| &source.records) {
                if record.incarnation == 0 {
                    continue;
                }
                let best = model.entry(key_of(record)).or_insert_with(|| record.clone());
                let rank = |record: &Record| (record.incarnation, record.as_ref().version());
                if rank(record) > rank(best) {
                    *best = record.clone();
                }
            }
            model.retain(|_, record| {
                !is_bottom || record.as_ref().is_live(now) || record.timestamp.0 % 2 == 1
            });
            let (merged, stats) = run(Merge::new(made, now, is_bottom.then_some(Lsn(7))));
            let expected: Vec<_> = model.into_values().map(|r| (key_of(&r), r.as_ref().version().0)).collect();
            let found: Vec<_> = merged.iter().map(|r| (key_of(r), r.as_ref().version().0)).collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!((stats.read, stats.kept), (read as u64, merged.len() as u64));
        }
    }

    #[test]
    fn of_two_states_of_one_version_the_later_one_stays() {
        // A merge that found only older siblings has its predecessor's version.
        let state = |value: &[u8]| Record {
            token: Token(7),
            namespace: NamespaceId(0),
            incarnation: 1,
            kind: Kind::Siblings,
            dot: Dot { origin: OriginId(1), sequence: 9 },
            timestamp: Timestamp(9),
            expiry_ms: 0,
            key: b"k".to_vec(),
            value: value.to_vec(),
        };
        for (newer, older) in [(b"aa", b"zz"), (b"zz", b"aa")] {
            let tables = [vec![state(newer)], vec![state(older)], vec![state(b"mm")]];
            let (merged, _) = run(Merge::new(sources(&tables, 9), WallMicros(0), None));
            assert_eq!(merged, [state(newer)]);
        }
    }

    #[test]
    fn many_keys_of_one_token_come_out_in_the_order_of_keys() {
        let record = |key: u32, stamp: u64| Record {
            token: Token(7),
            namespace: NamespaceId(0),
            incarnation: 1,
            kind: Kind::Put,
            dot: Dot { origin: OriginId(1), sequence: stamp },
            timestamp: Timestamp(stamp),
            expiry_ms: 0,
            key: key.to_be_bytes().to_vec(),
            value: Vec::new(),
        };
        let tables: Vec<Vec<Record>> =
            (1..=3).map(|n| (0..2000).map(|key| record(key * n, u64::from(n))).collect()).collect();
        let (merged, _) = run(Merge::new(sources(&tables, 100), WallMicros(0), Some(Lsn(7))));
        assert!(merged.is_sorted_by(|a, b| a.key < b.key));
        // Keys 0..2000, the evens to 4000, the multiples of 3 to 6000.
        assert_eq!(merged.len(), 2000 + 1000 + 667 - 333 + 1000 - 334 + 333 - 333);
    }
}
