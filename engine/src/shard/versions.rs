//! What stamps a shard's writes: clock, sequences, incarnations, and the ceiling that keeps the first
//! two from ever going backwards (`RELIABILITY.md` decision 1, `ALGORITHMS.md` 5.2).
//!
//! Invariant: no stamp above the reserved ceiling is used before the log has taken a record that says
//! so, and no sequence before that record is durable: a write leaves for other replicas, and in
//! `periodic` mode for the client, before it is on this disk, and a dot must never be given out
//! twice. So sequences are reserved at the start, and again when half of them are used up. After a restart both begin above the ceiling, whatever was lost; only where
//! the log was closed in good order nothing can have been, and sequences of a replica go on without
//! a gap.

use std::collections::VecDeque;

use super::replicas::FIRST_INCARNATION;
use crate::log::{Control, Lsn};
use crate::model::timestamp::HybridClock;
use crate::model::{PartitionId, RecordRef, Timestamp, Token, WallMicros};

/// How far ahead of use stamps are reserved, in microseconds.
const STAMP_RESERVE_US: u64 = 250_000;
/// How far ahead of a stamp that runs ahead of the wall clock, in microseconds.
const STAMP_RESERVE_MIN_US: u64 = 10_000;
/// How many sequences are reserved at a time. Each start after a crash loses as many, and they must
/// not run ahead of the microseconds since the directory was made: a directory that replaces a lost
/// one begins there.
const SEQUENCE_RESERVE: u64 = 1 << 12;

/// Clock and sequences of one shard.
#[derive(Debug)]
pub(crate) struct Versions {
    pub(crate) clock: HybridClock,
    /// Last sequence issued, by partition.
    sequences: Vec<u64>,
    /// The same when this life, or the partition's incarnation, began: those up to there that are
    /// not seen never will be written here.
    starts: Vec<u64>,
    /// Under which incarnation writes are logged, by partition.
    incarnations: Vec<u32>,
    /// This life stamps above it.
    floor: Timestamp,
    ceiling_stamp: Timestamp,
    ceiling_sequence: u64,
    /// The greatest ceilings of both that the log is known to hold durably.
    durable: (Timestamp, u64),
    /// Those on their way there, with their records.
    reserved: VecDeque<(Lsn, Timestamp, u64)>,
}

impl Versions {
    /// Continues above what an earlier life reserved, for a ring of `2^partition_bits`.
    pub(crate) fn starting_above(stamp: Timestamp, sequence: u64, partition_bits: u32) -> Versions {
        Versions {
            clock: HybridClock::starting_above(stamp),
            sequences: vec![sequence; 1 << partition_bits],
            starts: vec![sequence; 1 << partition_bits],
            incarnations: vec![FIRST_INCARNATION; 1 << partition_bits],
            floor: stamp,
            ceiling_stamp: stamp,
            ceiling_sequence: sequence,
            durable: (stamp, sequence),
            reserved: VecDeque::new(),
        }
    }

    /// The next sequence of a partition. It is used up by [`Versions::issue`] alone, so that a
    /// write that the log refused leaves no gap.
    pub(crate) fn next_sequence(&self, partition: PartitionId) -> u64 {
        self.sequences[partition.0 as usize] + 1
    }

    /// Sequences up to this one are used up.
    #[inline]
    pub(crate) fn issue(&mut self, partition: PartitionId, sequence: u64) {
        let slot = &mut self.sequences[partition.0 as usize];
        *slot = (*slot).max(sequence);
    }

    /// A partition goes on where it ended, although the ceiling is higher.
    pub(crate) fn go_on_from(&mut self, partition: PartitionId, sequence: u64) {
        self.sequences[partition.0 as usize] = sequence;
        self.starts[partition.0 as usize] = sequence;
    }

    /// Up to which sequence nothing will be written any more by this origin, of what is not seen,
    /// and a stamp below those of all later writes.
    pub(crate) fn void_end(&self, partition: PartitionId) -> (u64, Timestamp) {
        (self.starts[partition.0 as usize], self.floor)
    }

    /// What is missing of a partition is no longer asked for.
    pub(crate) fn forget_gap(&mut self, partition: PartitionId) {
        self.starts[partition.0 as usize] = 0;
    }

    /// Under which incarnation the partition's writes are logged.
    #[inline]
    pub(crate) fn incarnation(&self, partition: PartitionId) -> u32 {
        self.incarnations[partition.0 as usize]
    }

    /// From now on its writes are logged under this incarnation.
    pub(crate) fn begin(&mut self, partition: PartitionId, incarnation: u32) {
        self.incarnations[partition.0 as usize] = incarnation;
        self.starts[partition.0 as usize] = self.sequences[partition.0 as usize];
    }

    /// The last sequence issued for a partition.
    pub(crate) fn last_sequence(&self, partition: PartitionId) -> u64 {
        self.sequences[partition.0 as usize]
    }

    /// The control record that must precede a write with this stamp and sequence, if any; once
    /// the log has taken it, [`Versions::reserved`] must be told.
    pub(crate) fn ceiling_to_reserve(
        &self,
        stamp: Timestamp,
        sequence: u64,
        wall: WallMicros,
    ) -> Option<Control<'static>> {
        let is_low = sequence + SEQUENCE_RESERVE / 2 > self.ceiling_sequence;
        if stamp <= self.ceiling_stamp && !is_low {
            return None;
        }
        // Ahead of the wall clock, not of the stamp: each restart begins at the last ceiling, and
        // a shard that restarts again and again must not run further and further ahead.
        let ahead = wall.0 + STAMP_RESERVE_US;
        let least = stamp.wall().0 + STAMP_RESERVE_MIN_US;
        let timestamp = Timestamp::new(WallMicros(ahead.max(least)), 0).max(self.ceiling_stamp);
        let sequence = if is_low { sequence + SEQUENCE_RESERVE } else { self.ceiling_sequence };
        Some(Control::Ceiling { timestamp, sequence })
    }

    /// The log has taken this ceiling, as this record.
    pub(crate) fn reserved(&mut self, ceiling: Control<'_>, at: Lsn) {
        if let Control::Ceiling { timestamp, sequence } = ceiling {
            self.ceiling_stamp = timestamp;
            self.ceiling_sequence = sequence;
            self.reserved.push_back((at, timestamp, sequence));
        }
    }

    /// The log is durable up to there.
    pub(crate) fn settle(&mut self, durable: Lsn) {
        while let Some((at, stamp, sequence)) = self.reserved.front()
            && *at <= durable
        {
            self.durable = (*stamp, *sequence);
            self.reserved.pop_front();
        }
    }

    /// After any crash own stamps and sequences are above these.
    pub(crate) fn durable_ceilings(&self) -> (Timestamp, u64) {
        self.durable
    }

    /// The greatest sequence that a partition has used up.
    pub(crate) fn greatest_sequence(&self) -> u64 {
        self.sequences.iter().copied().max().unwrap_or(0)
    }

    /// Goes on above another life's ceiling too.
    pub(crate) fn raise(&mut self, stamp: Timestamp, sequence: u64) {
        let stamp = stamp.max(self.ceiling_stamp);
        let sequence = sequence.max(self.ceiling_sequence);
        let bits = self.sequences.len().ilog2();
        let incarnations = std::mem::take(&mut self.incarnations);
        *self = Versions { incarnations, ..Versions::starting_above(stamp, sequence, bits) };
    }

    /// The ceiling in force, to be written again before the log forgets the record that set it.
    pub(crate) fn ceiling(&self) -> Control<'static> {
        Control::Ceiling { timestamp: self.ceiling_stamp, sequence: self.ceiling_sequence }
    }
}

/// Writes between log and memory, and how often each token was written lately.
#[derive(Debug)]
pub(crate) struct Unsettled {
    waiting: VecDeque<(Lsn, Token)>,
    /// Those that this shard has stamped: in the order of their stamps.
    own: VecDeque<(Lsn, Timestamp)>,
    /// All that were ever pushed.
    count: u64,
    /// Write counters by remixed token: equal counters mean that the token was not written.
    counters: Box<[u32; 1 << COUNTER_BITS]>,
}

const COUNTER_BITS: u32 = 10;

impl Unsettled {
    pub(crate) fn new() -> Unsettled {
        Unsettled {
            waiting: VecDeque::new(),
            own: VecDeque::new(),
            count: 0,
            counters: Box::new([0; 1 << COUNTER_BITS]),
        }
    }

    /// Takes note of an append, of a record that was stamped here or not; forgets those that are
    /// visible.
    #[inline]
    pub(crate) fn push(&mut self, lsn: Lsn, record: &RecordRef<'_>, is_own: bool, visible: Lsn) {
        let token = record.token;
        self.count += 1;
        let counter = &mut self.counters[token.slot(COUNTER_BITS)];
        *counter = counter.wrapping_add(1);
        self.settle(visible);
        if lsn > visible {
            self.waiting.push_back((lsn, token));
            if is_own {
                self.own.push_back((lsn, record.timestamp));
            }
        }
    }

    #[inline]
    fn settle(&mut self, visible: Lsn) {
        while self.waiting.front().is_some_and(|(oldest, ..)| *oldest <= visible) {
            self.waiting.pop_front();
        }
        while self.own.front().is_some_and(|(oldest, _)| *oldest <= visible) {
            self.own.pop_front();
        }
    }

    /// Writes so far, of this life.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The stamp of the oldest write of this shard's own that is not visible yet.
    #[inline]
    pub(crate) fn oldest(&mut self, visible: Lsn) -> Option<Timestamp> {
        self.settle(visible);
        self.own.front().map(|(_, timestamp)| *timestamp)
    }

    /// The last write of the token that may not be visible yet.
    pub(crate) fn last_of(&self, token: Token) -> Option<Lsn> {
        self.waiting.iter().rev().find(|(_, other)| *other == token).map(|(lsn, _)| *lsn)
    }

    /// Whether a write of such a token is not visible yet.
    pub(crate) fn has(&self, visible: Lsn, mut is_wanted: impl FnMut(Token) -> bool) -> bool {
        self.waiting.iter().any(|(lsn, token)| *lsn > visible && is_wanted(*token))
    }

    /// A number that changes with each write of the token (and of a few others).
    pub(crate) fn writes_of(&self, token: Token) -> u32 {
        self.counters[token.slot(COUNTER_BITS)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Dot, Kind, NamespaceId, Value};

    #[test]
    fn a_ceiling_is_reserved_before_it_is_passed_and_not_again_below_it() {
        let mut versions = Versions::starting_above(Timestamp::ZERO, 0, 4);
        let stamp = versions.clock.tick(WallMicros(1000));
        let sequence = versions.next_sequence(PartitionId(3));
        versions.issue(PartitionId(3), sequence);
        let ceiling = versions
            .ceiling_to_reserve(stamp, sequence, WallMicros(1000))
            .expect("the first write");
        let Control::Ceiling { timestamp, sequence: reserved } = ceiling else {
            panic!("a ceiling, not {ceiling:?}");
        };
        assert!(timestamp > stamp && reserved > sequence);
        versions.reserved(ceiling, Lsn(7));
        let stamp = versions.clock.tick(WallMicros(1001));
        let sequence = versions.next_sequence(PartitionId(3));
        assert_eq!(versions.ceiling_to_reserve(stamp, sequence, WallMicros(1001)), None);
        versions.settle(Lsn(6));
        assert_eq!(versions.durable_ceilings(), (Timestamp::ZERO, 0));
        versions.settle(Lsn(7));
        assert_eq!(versions.durable_ceilings(), (timestamp, reserved));
        let half = reserved / 2 + 2;
        assert!(versions.ceiling_to_reserve(stamp, half, WallMicros(1001)).is_some());

        let mut restarted = Versions::starting_above(timestamp, reserved, 4);
        assert!(restarted.clock.tick(WallMicros(0)) > timestamp);
        assert_eq!(restarted.next_sequence(PartitionId(5)), reserved + 1);
    }

    #[test]
    fn restarts_in_a_row_do_not_drive_the_clock_ahead() {
        let (mut floor, mut sequence) = (Timestamp::ZERO, 0);
        let wall = WallMicros(7_000_000);
        for _ in 0..20 {
            let mut versions = Versions::starting_above(floor, sequence, 4);
            let stamp = versions.clock.tick(wall);
            let next = versions.next_sequence(PartitionId(0));
            let ceiling = versions.ceiling_to_reserve(stamp, next, wall).expect("a new life");
            versions.reserved(ceiling, Lsn(1));
            (floor, sequence) = (versions.ceiling_stamp, versions.ceiling_sequence);
        }
        assert!(floor.wall().0 <= wall.0 + STAMP_RESERVE_US + 20 * STAMP_RESERVE_MIN_US);
    }

    fn record(token: u64, stamp: u64) -> RecordRef<'static> {
        RecordRef {
            token: Token(token),
            namespace: NamespaceId(0),
            incarnation: 1,
            kind: Kind::Put,
            dot: Dot::default(),
            timestamp: Timestamp(stamp),
            expiry_ms: 0,
            key: b"k",
            value: Value::EMPTY,
        }
    }

    #[test]
    fn unsettled_writes_are_found_until_visible() {
        let mut unsettled = Unsettled::new();
        let before = unsettled.writes_of(Token(7));
        unsettled.push(Lsn(1), &record(7, 10), true, Lsn(0));
        unsettled.push(Lsn(2), &record(9, 4), false, Lsn(0));
        assert_eq!(unsettled.oldest(Lsn(0)), Some(Timestamp(10)));
        assert_eq!(unsettled.last_of(Token(7)), Some(Lsn(1)));
        assert_ne!(unsettled.writes_of(Token(7)), before);
        unsettled.push(Lsn(3), &record(9, 12), true, Lsn(2));
        assert_eq!(unsettled.oldest(Lsn(2)), Some(Timestamp(12)));
        assert_eq!(unsettled.last_of(Token(7)), None);
        assert_eq!(unsettled.last_of(Token(9)), Some(Lsn(3)));
    }
}
