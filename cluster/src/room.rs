//! Room for what a node keeps for others: stand-in copies of partitions that it is no home of.
//!
//! One for each shard; the node's limit is divided among its shards, so that none asks another.
//! Stands between a coordinator's write, which is refused when it does not fit, and tracking,
//! which says when a partition's homes have everything. Follows `DeCandia` et al., "Dynamo"
//! (2007), section 4.6, with a bound that the paper does not give.
//!
//! Invariant: what is counted is never less than what a partition's records take unpacked, and is
//! at most the limit and one record. It is more by what has been overwritten since the partition
//! was last counted (at a start, and when placement changes), by messages that came twice, and by
//! writes that failed after they were counted.

use std::collections::BTreeMap;

use annulus_engine::model::{Instant, PartitionId, Value};

/// What a record takes beside key and value, in bytes.
const RECORD_OVERHEAD_BYTES: u64 = 48;
/// While there is little room left everybody is told so this often, in nanoseconds.
const TELL_NANOS: u64 = 1_000_000_000;
/// For how long one is believed who says that it has no room, in nanoseconds: some tellings.
pub const BELIEVED_NANOS: u64 = 3 * TELL_NANOS;
/// Others are told while so much is left, or a sixteenth if that is less: what is on its way then
/// still fits, so that no write which has begun is in want of a copy.
const MARGIN_BYTES_MAX: u64 = 64 << 20;

/// Bytes that a record with such a key and value is counted as.
#[must_use]
pub fn size_of(key: &[u8], value: Value<'_>) -> u64 {
    RECORD_OVERHEAD_BYTES + (key.len() + value.len()) as u64
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Room {
    bytes_max: u64,
    kept: BTreeMap<PartitionId, u64>,
    bytes: u64,
    refused: u64,
    /// Others believe that there is room.
    told_room: bool,
    told_at: Instant,
}

impl Room {
    /// An empty one of so many bytes.
    #[must_use]
    pub fn new(bytes_max: u64) -> Room {
        Room {
            bytes_max,
            kept: BTreeMap::new(),
            bytes: 0,
            refused: 0,
            told_room: true,
            told_at: Instant(0),
        }
    }

    /// Whether a copy of this size may be kept; if not, that is counted.
    pub fn admit(&mut self, bytes: u64) -> bool {
        let fits = self.bytes.saturating_add(bytes) <= self.bytes_max;
        self.refused += u64::from(!fits);
        fits
    }

    /// A copy is kept.
    pub fn keep(&mut self, partition: PartitionId, bytes: u64) {
        *self.kept.entry(partition).or_insert(0) += bytes;
        self.bytes += bytes;
    }

    /// The partition's homes have everything, or this node has become one: nothing of it counts.
    pub fn forget(&mut self, partition: PartitionId) {
        self.bytes -= self.kept.remove(&partition).unwrap_or(0);
    }

    /// Counts anew: these partitions are kept for others, and no others.
    pub fn count_anew(&mut self, kept: impl IntoIterator<Item = (PartitionId, u64)>) {
        self.kept = kept.into_iter().collect();
        self.bytes = self.kept.values().fold(0, |sum, bytes| sum.saturating_add(*bytes));
    }

    /// Partitions of which something is kept.
    pub fn partitions(&self) -> impl Iterator<Item = PartitionId> + '_ {
        self.kept.keys().copied()
    }

    /// What the others must be told now: whether to ask for more copies.
    pub fn poll_tell(&mut self, now: Instant) -> Option<bool> {
        let has_room = self.bytes < self.bytes_max - (self.bytes_max / 16).min(MARGIN_BYTES_MAX);
        let again = !has_room && now.nanos_since(self.told_at) >= TELL_NANOS;
        if has_room == self.told_room && !again {
            return None;
        }
        (self.told_room, self.told_at) = (has_room, now);
        Some(has_room)
    }

    /// Bytes that copies count as.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Most bytes of copies.
    #[must_use]
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Copies that did not fit.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn what_does_not_fit_is_refused_until_a_partition_goes_home() {
        let mut room = Room::new(1000);
        for partition in [PartitionId(3), PartitionId(4)] {
            assert!(room.admit(500));
            room.keep(partition, 500);
        }
        assert!(!room.admit(1), "full");
        assert_eq!((room.bytes(), room.refused()), (1000, 1));
        room.forget(PartitionId(3));
        room.forget(PartitionId(3));
        assert!(room.admit(500) && !room.admit(501));
        assert_eq!(room.bytes(), 500);
    }

    #[test]
    fn no_room_at_all_refuses_everything_and_says_so() {
        let mut room = Room::new(0);
        assert!(!room.admit(1));
        assert_eq!(room.poll_tell(Instant(5 * SECOND)), Some(false));
    }

    #[test]
    fn counting_anew_replaces_what_was_counted() {
        let mut room = Room::new(1000);
        room.keep(PartitionId(1), 900);
        room.count_anew([(PartitionId(2), 100), (PartitionId(7), 50)]);
        assert_eq!(room.bytes(), 150);
        assert_eq!(room.partitions().collect::<Vec<_>>(), [PartitionId(2), PartitionId(7)]);
        room.forget(PartitionId(1));
        assert_eq!(room.bytes(), 150);
    }

    #[test]
    fn others_hear_of_little_room_before_there_is_none_again_and_again_and_of_its_end_once() {
        let mut room = Room::new(1600);
        room.keep(PartitionId(1), 1499);
        assert_eq!(room.poll_tell(Instant(SECOND)), None);
        room.keep(PartitionId(1), 1);
        assert!(room.admit(100), "what is on its way still fits");
        assert_eq!(room.poll_tell(Instant(SECOND)), Some(false));
        assert_eq!(room.poll_tell(Instant(SECOND + 1)), None);
        assert_eq!(room.poll_tell(Instant(2 * SECOND)), Some(false));
        room.forget(PartitionId(1));
        assert_eq!(room.poll_tell(Instant(2 * SECOND + 1)), Some(true));
        assert_eq!(room.poll_tell(Instant(9 * SECOND)), None);
    }
}
