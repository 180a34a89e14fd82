//! Which writes have been merged into a replica of a partition.
//!
//! A partition's replica is its records and this set. Replication, catching up after a loss, hints
//! and the purge of tombstones all ask it the same question: has this dot been here? The idea is
//! the node clock of Gonçalves, Almeida, Baquero and Fonte, "Anti-Entropy without Merkle Trees,
//! Deletes without Tombstones" (SRDS 2017).
//!
//! Of each origin it keeps *runs* of dots without a gap: the first, from 1 to `base`, and those
//! above it. Every run knows the stamp at its end. An origin stamps its writes in rising order, so
//! whatever follows a run is stamped later than its end; that is what [`SeenSet::lacks`] gives.
//!
//! Invariant: runs neither touch nor overlap, so equal sets have equal forms, and
//! [`SeenSet::union`] is commutative, associative and idempotent. A set may hold less than was
//! merged (it is bounded), never more: to lack a dot costs a repetition, to claim one costs data.
//!
//! # Format, version 1
//!
//! | size   | field  | meaning                                                         |
//! |--------|--------|-----------------------------------------------------------------|
//! | 1      | format | 1                                                               |
//! | varint | count  | origins, at most [`ORIGINS_MAX`]                                |
//! | each   | origin | id (varint, rising), base (varint), its stamp (8), runs (varint) |
//! | each   | run    | dots missing before it (varint, not 0), its length less one (varint), stamp (8) |
//!
//! Nothing follows.

use std::collections::BTreeMap;

use super::varint::{self, Reader};
use super::{Dot, OriginId, Timestamp, VersionVector};

/// Most runs above the base that are kept of one origin.
pub const RUNS_MAX: usize = 1 << 16;
/// Most origins of one set.
pub const ORIGINS_MAX: usize = 4096;

const FORMAT: u8 = 1;
/// Fewest bytes of an encoded origin.
const ORIGIN_SIZE_MIN: usize = 11;
/// Fewest bytes of an encoded run.
const RUN_SIZE_MIN: usize = 10;

/// The bytes are no set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a seen-set: {0}")]
pub struct InvalidSeen(pub &'static str);

/// Dots of one origin without a gap; the first is known from where it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    last: u64,
    stamp: Timestamp,
}

/// What has been seen of one origin.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SeenOrigin {
    base: u64,
    base_stamp: Timestamp,
    /// By first dot; each more than one beyond the end of the one before.
    above: BTreeMap<u64, Run>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct SeenSet {
    /// Sorted by origin; none is empty.
    origins: Vec<(OriginId, SeenOrigin)>,
    unnoted: u64,
}

impl SeenOrigin {
    /// All dots from 1 to here have been seen.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// No write of this origin above the base is stamped at or below this.
    #[must_use]
    pub fn base_stamp(&self) -> Timestamp {
        self.base_stamp
    }

    /// The greatest dot seen.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.above.last_key_value().map_or(self.base, |(_, run)| run.last)
    }

    /// No write of this origin above the last one is stamped at or below this.
    #[must_use]
    pub fn last_stamp(&self) -> Timestamp {
        self.above.last_key_value().map_or(self.base_stamp, |(_, run)| run.stamp)
    }

    /// Whether every dot up to the last has been seen.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        self.above.is_empty()
    }

    /// Runs of dots above the base.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.above.len()
    }

    /// Whether this dot has been seen.
    #[must_use]
    pub fn contains(&self, sequence: u64) -> bool {
        sequence <= self.base
            || self
                .above
                .range(..=sequence)
                .next_back()
                .is_some_and(|(_, run)| sequence <= run.last)
    }

    /// Whether every dot that the other has seen has been seen here.
    #[must_use]
    pub fn covers(&self, other: &SeenOrigin) -> bool {
        self.first_lacked(other).is_none()
    }

    /// `Some(t0)` if the other has seen dots that are not here: all of them are stamped later, and
    /// all that it has seen before them is here.
    #[must_use]
    pub fn lacks(&self, other: &SeenOrigin) -> Option<Timestamp> {
        self.first_lacked(other).map(|sequence| self.stamp_before(sequence))
    }

    /// `(first, last, stamp)` of every run, rising.
    fn runs(&self) -> impl Iterator<Item = (u64, u64, Timestamp)> + '_ {
        let base = (self.base > 0).then_some((1, self.base, self.base_stamp));
        base.into_iter().chain(self.above.iter().map(|(first, run)| (*first, run.last, run.stamp)))
    }

    fn is_empty(&self) -> bool {
        self.base == 0 && self.base_stamp == Timestamp::ZERO && self.above.is_empty()
    }

    /// Notes a dot that is not contained. `false` if there is no room.
    fn note(&mut self, sequence: u64, stamp: Timestamp) -> bool {
        if sequence == self.base + 1 {
            self.raise(sequence, stamp);
            return true;
        }
        // In order above a gap: the last run grows, and nothing is allocated.
        if let Some((first, run)) = self.above.range_mut(..sequence).next_back()
            && run.last + 1 == sequence
        {
            let first = *first;
            *run = Run { last: sequence, stamp: run.stamp.max(stamp) };
            if let Some(next) = self.above.remove(&sequence.saturating_add(1)) {
                let stamp = next.stamp.max(stamp);
                self.above.insert(first, Run { last: next.last, stamp });
            }
            return true;
        }
        let next = self.above.remove(&sequence.saturating_add(1));
        if next.is_none() && self.above.len() >= RUNS_MAX {
            return false;
        }
        let run = next.unwrap_or(Run { last: sequence, stamp });
        self.above.insert(sequence, Run { stamp: run.stamp.max(stamp), ..run });
        true
    }

    /// All dots up to `base` have been seen.
    fn raise(&mut self, base: u64, stamp: Timestamp) {
        self.base = self.base.max(base);
        self.base_stamp = self.base_stamp.max(stamp);
        while let Some(entry) = self.above.first_entry()
            && *entry.key() <= self.base.saturating_add(1)
        {
            let run = entry.remove();
            self.base = self.base.max(run.last);
            self.base_stamp = self.base_stamp.max(run.stamp);
        }
    }

    fn add_run(&mut self, first: u64, last: u64, stamp: Timestamp) {
        if first <= self.base.saturating_add(1) {
            return self.raise(last, stamp);
        }
        let mut joined = (first, Run { last, stamp });
        // All that touch or overlap: they begin no later than just behind the end of this one.
        while let Some((begin, run)) = self.above.range(..=last.saturating_add(1)).next_back()
            && run.last.saturating_add(1) >= first
        {
            let (begin, run) = (*begin, *run);
            self.above.remove(&begin);
            joined.0 = joined.0.min(begin);
            joined.1.last = joined.1.last.max(run.last);
            joined.1.stamp = joined.1.stamp.max(run.stamp);
        }
        self.above.insert(joined.0, joined.1);
    }

    /// Takes in all that the other has; gives how many runs found no room.
    fn union(&mut self, other: &SeenOrigin) -> u64 {
        self.raise(other.base, other.base_stamp);
        for (first, run) in &other.above {
            self.add_run(*first, run.last, run.stamp);
        }
        let mut dropped = 0;
        while self.above.len() > RUNS_MAX {
            // The greatest: those that are left are the first to join the base.
            self.above.pop_last();
            dropped += 1;
        }
        dropped
    }

    /// The first dot that the other has and this has not.
    fn first_lacked(&self, other: &SeenOrigin) -> Option<u64> {
        let mut own = self.runs().peekable();
        for (first, last, _) in other.runs() {
            while own.next_if(|run| run.1 < first).is_some() {}
            match own.peek() {
                Some((begin, end, _)) if *begin <= first => {
                    // Runs do not touch, so what follows the end is not in this set.
                    if last > *end {
                        return Some(end + 1);
                    }
                }
                _ => return Some(first),
            }
        }
        None
    }

    /// Dots that the other has and this has not.
    fn lacked(&self, other: &SeenOrigin) -> u64 {
        let mut own = self.runs().peekable();
        let mut lacked = 0;
        for (first, last, _) in other.runs() {
            lacked += last - first + 1;
            while own.next_if(|run| run.1 < first).is_some() {}
            while let Some((begin, end, _)) = own.peek()
                && *begin <= last
            {
                lacked -= last.min(*end) - first.max(*begin) + 1;
                if *end > last {
                    break;
                }
                own.next();
            }
        }
        lacked
    }

    /// The stamp at the end of the last run before this dot.
    fn stamp_before(&self, sequence: u64) -> Timestamp {
        match self.above.range(..sequence).next_back() {
            Some((_, run)) => run.stamp,
            None => self.base_stamp,
        }
    }
}

/// What is seen of an origin of which nothing is.
static NOTHING: SeenOrigin =
    SeenOrigin { base: 0, base_stamp: Timestamp::ZERO, above: BTreeMap::new() };

impl SeenSet {
    /// The set without a dot.
    #[must_use]
    pub const fn new() -> SeenSet {
        SeenSet { origins: Vec::new(), unnoted: 0 }
    }

    /// Whether nothing has been seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.origins.is_empty()
    }

    /// Every origin of which something has been seen, rising.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (OriginId, &SeenOrigin)> + '_ {
        self.origins.iter().map(|(origin, seen)| (*origin, seen))
    }

    /// What has been seen of this origin.
    #[must_use]
    pub fn of(&self, origin: OriginId) -> &SeenOrigin {
        match self.place(origin) {
            Ok(at) => &self.origins[at].1,
            Err(_) => &NOTHING,
        }
    }

    /// Notes a write, and says whether it is news. Dots in order cost no allocation. Beyond
    /// [`RUNS_MAX`] gaps it is news that is not noted; a sync heals that.
    pub fn see(&mut self, dot: Dot, stamp: Timestamp) -> bool {
        if dot.sequence == 0 || self.contains(dot) {
            return false;
        }
        let is_noted = match self.place_for(dot.origin) {
            Some(at) => self.origins[at].1.note(dot.sequence, stamp),
            None => false,
        };
        self.unnoted += u64::from(!is_noted);
        true
    }

    /// Whether this write has been seen.
    #[must_use]
    pub fn contains(&self, dot: Dot) -> bool {
        self.of(dot.origin).contains(dot.sequence)
    }

    /// For each origin the dot up to which all have been seen.
    #[must_use]
    pub fn base(&self) -> VersionVector {
        self.iter().map(|(origin, seen)| Dot { origin, sequence: seen.base }).collect()
    }

    /// The greatest dot seen of this origin; 0 if none.
    #[must_use]
    pub fn last(&self, origin: OriginId) -> u64 {
        self.of(origin).last()
    }

    /// The greatest stamp of all ends of runs: no write in the set is stamped later.
    #[must_use]
    pub fn newest(&self) -> Timestamp {
        self.iter().map(|(_, seen)| seen.last_stamp()).max().unwrap_or_default()
    }

    /// Takes in everything that the other has seen.
    pub fn union(&mut self, other: &SeenSet) {
        for (origin, seen) in other.iter() {
            self.unnoted += match self.place_for(origin) {
                Some(at) => self.origins[at].1.union(seen),
                None => 1,
            };
        }
    }

    /// Whether everything that the other has seen has been seen here.
    #[must_use]
    pub fn covers(&self, other: &SeenSet) -> bool {
        other.iter().all(|(origin, seen)| self.of(origin).covers(seen))
    }

    /// Whether both have seen the same writes.
    #[must_use]
    pub fn is_same(&self, other: &SeenSet) -> bool {
        self.covers(other) && other.covers(self)
    }

    /// `Some(t0)` if the other has seen writes that this set lacks: all of them are stamped later
    /// than `t0`. It is not touched by gaps that the other has as well.
    #[must_use]
    pub fn lacks(&self, other: &SeenSet) -> Option<Timestamp> {
        other.iter().filter_map(|(origin, seen)| self.of(origin).lacks(seen)).min()
    }

    /// How many writes the other has seen that this set lacks.
    #[must_use]
    pub fn lacked(&self, other: &SeenSet) -> u64 {
        let count = |(origin, seen)| self.of(origin).lacked(seen);
        other.iter().map(count).fold(0, u64::saturating_add)
    }

    /// Declares that no write of this origin up to `sequence` is missing: those that are not here
    /// were never made, or are lost. Only the origin may say so. Later ones are stamped later
    /// than `stamp`.
    pub fn void_up_to(&mut self, origin: OriginId, sequence: u64, stamp: Timestamp) {
        if sequence == 0 {
            return;
        }
        match self.place_for(origin) {
            Some(at) => self.origins[at].1.raise(sequence, stamp),
            None => self.unnoted += 1,
        }
    }

    /// How often something found no room. Not part of the set.
    #[must_use]
    pub fn unnoted(&self) -> u64 {
        self.unnoted
    }

    /// The same for all sets of the same writes.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut bytes = Vec::with_capacity(64);
        for (origin, seen) in self.iter().filter(|(_, seen)| seen.last() > 0) {
            varint::put(&mut bytes, u64::from(origin.0));
            varint::put(&mut bytes, seen.base);
            for (first, run) in &seen.above {
                varint::put(&mut bytes, *first);
                varint::put(&mut bytes, run.last);
            }
            // No run begins at 0, so this ends them.
            bytes.push(0);
        }
        twox_hash::XxHash3_64::oneshot(&bytes)
    }

    /// Appends the set.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.encode_within(out, usize::MAX);
    }

    /// Appends the set, or as much of it as finds room in about `size_max` bytes: less is always
    /// true. Bases and the last run of each origin are always there.
    pub fn encode_within(&self, out: &mut Vec<u8>, size_max: usize) {
        let mut room = size_max / (2 * RUN_SIZE_MIN + 8);
        out.push(FORMAT);
        varint::put(out, self.origins.len() as u64);
        for (origin, seen) in self.iter() {
            varint::put(out, u64::from(origin.0));
            varint::put(out, seen.base);
            out.extend_from_slice(&seen.base_stamp.0.to_le_bytes());
            let kept = seen.above.len().saturating_sub(1).min(room);
            room -= kept;
            let last = seen.above.last_key_value();
            varint::put(out, (kept + usize::from(last.is_some())) as u64);
            let mut end = seen.base;
            for (first, run) in seen.above.iter().take(kept).chain(last) {
                varint::put(out, first - end - 1);
                varint::put(out, run.last - first);
                out.extend_from_slice(&run.stamp.0.to_le_bytes());
                end = run.last;
            }
        }
    }

    /// The set in these bytes, which may be anybody's.
    ///
    /// # Errors
    /// [`InvalidSeen`] unless they are exactly what `encode` writes.
    pub fn decode(bytes: &[u8]) -> Result<SeenSet, InvalidSeen> {
        let mut reader = Reader::new(bytes);
        if reader.byte() != Some(FORMAT) {
            return Err(InvalidSeen("its format is not 1"));
        }
        let count = reader.length().filter(|count| *count <= ORIGINS_MAX);
        let count = count.ok_or(InvalidSeen("too many origins"))?;
        let mut origins: Vec<(OriginId, SeenOrigin)> =
            Vec::with_capacity(count.min(reader.len() / ORIGIN_SIZE_MIN));
        for _ in 0..count {
            let origin = OriginId(reader.small().ok_or(InvalidSeen("cut short"))?);
            if origins.last().is_some_and(|last| last.0 >= origin) {
                return Err(InvalidSeen("origins out of order"));
            }
            let seen = take_origin(&mut reader)?;
            if seen.is_empty() {
                return Err(InvalidSeen("an origin of which nothing is seen"));
            }
            origins.push((origin, seen));
        }
        if !reader.is_empty() {
            return Err(InvalidSeen("bytes follow it"));
        }
        Ok(SeenSet { origins, unnoted: 0 })
    }

    fn place(&self, origin: OriginId) -> Result<usize, usize> {
        self.origins.binary_search_by_key(&origin, |entry| entry.0)
    }

    fn place_for(&mut self, origin: OriginId) -> Option<usize> {
        match self.place(origin) {
            Ok(at) => Some(at),
            Err(_) if self.origins.len() >= ORIGINS_MAX => None,
            Err(at) => {
                self.origins.insert(at, (origin, SeenOrigin::default()));
                Some(at)
            }
        }
    }
}

fn take_origin(reader: &mut Reader<'_>) -> Result<SeenOrigin, InvalidSeen> {
    let cut = InvalidSeen("cut short");
    let base = reader.number().ok_or(cut)?;
    let base_stamp = Timestamp(reader.fixed().ok_or(cut)?);
    let count = reader.number().ok_or(cut)?;
    let room = (reader.len() / RUN_SIZE_MIN).min(RUNS_MAX);
    if usize::try_from(count).map_or(true, |count| count > room) {
        return Err(InvalidSeen("too many runs"));
    }
    let mut above = BTreeMap::new();
    let mut end = base;
    for _ in 0..count {
        let missing = reader.number().filter(|missing| *missing > 0);
        let missing = missing.ok_or(InvalidSeen("a run without a gap before it"))?;
        let first = end.checked_add(missing).and_then(|first| first.checked_add(1));
        let first = first.ok_or(InvalidSeen("a run beyond all numbers"))?;
        let length = reader.number().ok_or(cut)?;
        let last = first.checked_add(length).ok_or(InvalidSeen("a run beyond all numbers"))?;
        let stamp = Timestamp(reader.fixed().ok_or(cut)?);
        above.insert(first, Run { last, stamp });
        end = last;
    }
    Ok(SeenOrigin { base, base_stamp, above })
}

/// The same writes under the same stamps.
impl PartialEq for SeenSet {
    fn eq(&self, other: &SeenSet) -> bool {
        self.origins == other.origins
    }
}

impl Eq for SeenSet {}

#[cfg(test)]
mod tests;
