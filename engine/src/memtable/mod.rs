//! The newest records of a shard, in memory, in token order.
//!
//! ```text
//! token ─► directory.rs ─► slots.rs ─────────► arena.rs
//!          which leaf      which slot in it    entry.rs: header, key, value
//!                                              shared.rs: values in pieces
//! ```
//!
//! Invariant: one entry a key, the newest of all that was inserted for it; a walk is in the order
//! `(token, namespace, key)` without any sorting, so that neither sealing, flushing nor a short
//! scan stalls the shard. Nothing here is ever copied to grow: leaves split, the arena adds
//! chunks. Records arrive after they are in the log, and leave in a table.
//!
//! Beyond key and value a key costs a slot (12 bytes, leaves four fifths full) and a header of
//! about 16 bytes: some 32 bytes in all.

mod arena;
mod directory;
mod entry;
mod prefetch;
mod shared;
mod slots;

use std::cmp::Ordering;

use arena::{Arena, Place};
use directory::{Directory, Spot};
use shared::SharedValues;

use crate::model::causality::supersedes;
use crate::model::{NamespaceId, PartitionId, RecordRef, Timestamp, Token, TokenRange, Value};

/// What an insert did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The key was not there.
    New,
    /// The key was there; it now has the new record.
    Replaced,
    /// The key was there and what it had is newer than the new record: nothing changed.
    Kept,
}

/// Sorted, newest only, bounded by the caller: insert until [`Memtable::is_full`], then seal and flush.
pub struct Memtable {
    arena: Arena,
    /// Values that came in pieces. Apart, so that who has none pays for a pointer.
    values: Box<SharedValues>,
    directory: Directory,
    budget: usize,
    len: usize,
    /// The first record's stamp, around which stamps are stored shortened.
    base: Timestamp,
    max_timestamp: Timestamp,
    expiry_ms: Option<(u64, u64)>,
}

impl Memtable {
    /// An empty memtable that is full at `budget_bytes` allocated in all, at most 4 GiB.
    #[must_use]
    pub fn new(budget_bytes: usize) -> Memtable {
        // One entry of the directory's table for each leaf of a memtable of small records.
        let bits = (budget_bytes >> 16).clamp(16, 1 << 14).ilog2();
        Memtable {
            arena: Arena::new(budget_bytes),
            values: Box::default(),
            directory: Directory::new(bits),
            budget: budget_bytes.min(4 << 30),
            len: 0,
            base: Timestamp::ZERO,
            max_timestamp: Timestamp::ZERO,
            expiry_ms: None,
        }
    }

    /// Takes a record in, if it supersedes what is there. Records come in the order of the log. The
    /// cost is that of a search, and of copying the record if it is kept; a value in pieces is not
    /// copied but shared. An overwrite takes its predecessor's place if it fits there.
    ///
    /// # Panics
    /// If the key is empty or longer than `KEY_SIZE_MAX`: the shard refuses such requests.
    pub fn insert(&mut self, record: &RecordRef<'_>) -> Inserted {
        if self.len == 0 {
            self.base = record.timestamp;
        }
        let found = self.directory.find(record.token, |place| {
            let entry = self.entry(record.token, place);
            entry.namespace.cmp(&record.namespace).then_with(|| entry.key.cmp(record.key))
        });
        match found {
            Ok((spot, place)) => {
                if !supersedes(record, &self.entry(record.token, place)) {
                    return Inserted::Kept;
                }
                self.overwrite(spot, place, record);
                Inserted::Replaced
            }
            Err(spot) => {
                let place = self.append(record);
                let mut spot = spot;
                while !self.directory.insert(spot, record.token, place) {
                    spot = match self.find(record.token, record.namespace, record.key) {
                        Ok(_) => unreachable!("the key was not there"),
                        Err(spot) => spot,
                    };
                }
                self.len += 1;
                Inserted::New
            }
        }
    }

    /// The record of this key.
    #[inline]
    #[must_use]
    pub fn get(&self, token: Token, namespace: NamespaceId, key: &[u8]) -> Option<RecordRef<'_>> {
        let leaf = &self.directory.leaves()[self.directory.leaf_of(token)];
        let slot = leaf.seek(token);
        let record = self.entry(token, leaf.at(slot, token)?);
        if record.is_key(namespace, key) {
            return Some(record);
        }
        // Another key of the same token: a search by key, also among leaves before this one.
        let (_, place) = self.find(token, namespace, key).ok()?;
        Some(self.entry(token, place))
    }

    /// Starts to bring the slot of this token nearer to the processor, and waits for nothing.
    /// Worth calling for all requests of a batch before the first of them is answered, then
    /// [`Memtable::prefetch_entry`] for all.
    #[inline]
    pub fn prefetch(&self, token: Token) {
        self.directory.leaves()[self.directory.leaf_of(token)].prefetch(token);
    }

    /// Starts to bring the token's entry nearer. Waits for the slot unless it was prefetched.
    #[inline]
    pub fn prefetch_entry(&self, token: Token) {
        let leaf = &self.directory.leaves()[self.directory.leaf_of(token)];
        if let Some(place) = leaf.at(leaf.seek(token), token) {
            prefetch::line(self.arena.tail(place));
        }
    }

    /// Bytes allocated: index, entries, and what is reserved for both.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of::<Memtable>() + self.arena.bytes() + self.values.bytes() + self.directory.bytes()
    }

    /// Whether the memtable has used up its budget and should be sealed.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.bytes() >= self.budget || self.arena.is_nearly_exhausted()
    }

    /// Keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The greatest stamp of all records that were stored, also of those replaced since.
    #[must_use]
    pub fn max_timestamp(&self) -> Timestamp {
        self.max_timestamp
    }

    /// Least and greatest expiry, in milliseconds since 2024-01-01, of all records stored so far
    /// that expire at all.
    #[must_use]
    pub fn expiry_bounds(&self) -> Option<(u64, u64)> {
        self.expiry_ms
    }

    /// Takes out the records of a partition (of a ring of `2^bits`) with this incarnation or an
    /// earlier one, and says how many went. Their space comes back when the memtable is dropped.
    /// Costs a pass over the partition's entries.
    pub fn remove_partition(
        &mut self,
        partition: PartitionId,
        bits: u32,
        incarnation: u32,
    ) -> usize {
        let TokenRange { first, last } = partition.range(bits);
        let (arena, values, base) = (&self.arena, &self.values, self.base);
        let gone = self.directory.retain(first, last, |token, place| {
            entry::decode(arena.tail(place), token, base, values).incarnation > incarnation
        });
        self.len -= gone;
        gone
    }

    /// Gives a part of the memory back, a MiB or so, of a memtable that is no longer needed; false
    /// when no more than that is left. Dropping tens of MiB at once would take milliseconds. Only
    /// drop it after.
    pub(crate) fn dismantle(&mut self) -> bool {
        self.values.bytes() + self.arena.held() > DISMANTLE_SIZE
            && (self.values.dismantle(DISMANTLE_SIZE) || self.arena.dismantle(DISMANTLE_SIZE))
    }

    /// All records, in the order `(token, namespace, key)`.
    #[must_use]
    pub fn sorted(&self) -> Sorted<'_> {
        self.sorted_range(TokenRange::FULL)
    }

    /// The records of the range, in the same order. Costs a search, then a step a record.
    #[must_use]
    pub fn sorted_range(&self, range: TokenRange) -> Sorted<'_> {
        Sorted { memtable: self, spot: self.directory.seek(range.first), last: range.last }
    }

    /// The records after this key and not beyond token `last`: where a scan goes on after a pause
    /// during which the memtable may have changed.
    #[must_use]
    pub fn sorted_after(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
        last: Token,
    ) -> Sorted<'_> {
        let spot = match self.find(token, namespace, key) {
            Ok((spot, _)) => Spot { slot: spot.slot + 1, ..spot },
            Err(spot) => spot,
        };
        Sorted { memtable: self, spot, last }
    }

    #[inline]
    fn entry(&self, token: Token, place: Place) -> RecordRef<'_> {
        entry::decode(self.arena.tail(place), token, self.base, &self.values)
    }

    fn find(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<(Spot, Place), Spot> {
        self.directory.find(token, |place| -> Ordering {
            let entry = self.entry(token, place);
            entry.namespace.cmp(&namespace).then_with(|| entry.key.cmp(key))
        })
    }

    fn note(&mut self, record: &RecordRef<'_>) {
        self.max_timestamp = self.max_timestamp.max(record.timestamp);
        if record.expiry_ms != 0 {
            let (least, greatest) = self.expiry_ms.unwrap_or((u64::MAX, 0));
            self.expiry_ms = Some((least.min(record.expiry_ms), greatest.max(record.expiry_ms)));
        }
    }

    fn append(&mut self, record: &RecordRef<'_>) -> Place {
        self.note(record);
        let header = entry::header(record, self.base);
        match record.value {
            Value::Whole(value) => self.arena.append([header.bytes(), record.key, value]),
            Value::Pieces(pieces) => {
                let number = self.values.keep(pieces).to_le_bytes();
                self.arena.append([header.bytes(), record.key, &number])
            }
        }
    }

    fn overwrite(&mut self, spot: Spot, place: Place, record: &RecordRef<'_>) {
        let header = entry::header(record, self.base);
        let value_len = record.value.whole().map_or(entry::NUMBER_SIZE, <[u8]>::len);
        let needed = header.bytes().len() + record.key.len() + value_len;
        let room = entry::room(self.arena.tail(place));
        if let Some(number) = entry::shared(self.arena.tail(place)) {
            self.values.release(number);
        }
        if needed <= room {
            self.note(record);
            let number;
            let value = match record.value {
                Value::Whole(value) => value,
                Value::Pieces(pieces) => {
                    number = self.values.keep(pieces).to_le_bytes();
                    &number[..]
                }
            };
            entry::overwrite(self.arena.tail_mut(place), room, &header, record.key, value);
        } else {
            let grown = self.append(record);
            self.directory.replace(spot, grown);
            self.arena.release(place, room);
        }
    }
}

/// Bytes that are given back at once.
const DISMANTLE_SIZE: usize = 1 << 20;

/// Slots that a walk looks ahead.
const READ_AHEAD: usize = 10;

/// Iterator over a memtable's records in order.
#[derive(Clone)]
pub struct Sorted<'a> {
    memtable: &'a Memtable,
    spot: Spot,
    last: Token,
}

impl<'a> Iterator for Sorted<'a> {
    type Item = RecordRef<'a>;

    fn next(&mut self) -> Option<RecordRef<'a>> {
        let leaves = self.memtable.directory.leaves();
        loop {
            let leaf = leaves.get(self.spot.leaf)?;
            if let Some((slot, token, place)) = leaf.next(self.spot.slot) {
                if token > self.last {
                    return None;
                }
                self.spot.slot = slot + 1;
                // Entries lie in the order of their arrival: each is a cache miss of its own.
                if let Some(place) = leaf.peek(slot + READ_AHEAD) {
                    prefetch::line(self.memtable.arena.tail(place));
                }
                return Some(self.memtable.entry(token, place));
            }
            self.spot = Spot { leaf: self.spot.leaf + 1, slot: 0 };
        }
    }
}

#[cfg(test)]
mod tests;
