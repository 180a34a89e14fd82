//! The state of a key in `siblings` mode: the values nobody has replaced, and what has been seen.
//!
//! Stands between the shard, which reads, merges and writes it, and the records of kind
//! `Siblings`, whose value it is. Invariant: [`KeyState::merge`] is commutative, associative and
//! idempotent, and drops a value only if the other side has seen and replaced it. A dot that is
//! covered by the vector and not among the siblings is obsolete.
//!
//! A plain record (mode `lww`) joins as a *blind* sibling. Of blind siblings only the greatest
//! stays; the `floor` remembers its version even when it is gone, so that no merge order brings
//! an older one back. A namespace may so change its mode, and nothing unseen is lost.
//!
//! Vectors may be stored *stripped* of entries that the partition's seen-set implies. Fill a
//! stripped state before it is merged, sent or answered.

use super::limits::{SIBLING_BYTES_MAX, SIBLINGS_MAX};
use super::varint::{self, Reader};
use super::{
    Context, Dot, Kind, OriginId, Record, RecordRef, Timestamp, Value, VersionVector, WallMicros,
};

/// A value that nobody has replaced, or a delete that nobody has written over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sibling<'a> {
    /// The write that made it.
    pub dot: Dot,
    /// When, in the order of last-write-wins.
    pub timestamp: Timestamp,
    /// Whether it is a delete; its value is then empty.
    pub is_delete: bool,
    /// Whether it was written blindly, in mode `lww`.
    pub is_blind: bool,
    /// Milliseconds since 2024-01-01 from which it reads as deleted; 0 is never.
    pub expiry_ms: u64,
    /// The value.
    pub value: Value<'a>,
}

impl Sibling<'_> {
    /// The total order of last-write-wins.
    #[must_use]
    pub fn version(&self) -> (Timestamp, Dot) {
        (self.timestamp, self.dot)
    }

    /// Whether a reader gets a value from it at `now`.
    #[must_use]
    pub fn is_live(&self, now: WallMicros) -> bool {
        !self.is_delete && (self.expiry_ms == 0 || now.as_millis() < self.expiry_ms)
    }

    /// Makes the choice between two contents of one dot total; only damage makes two of them.
    fn rank(&self) -> impl Ord + '_ {
        (self.timestamp, self.is_delete, self.is_blind, self.expiry_ms, self.value)
    }
}

/// An entry of a key's vector: with the stamp of its last change, by which the oldest is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    origin: OriginId,
    sequence: u64,
    timestamp: Timestamp,
}

/// See the module. Borrows its values, so that decoding and merging copy none.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct KeyState<'a> {
    /// Sorted by dot, no dot twice.
    siblings: Vec<Sibling<'a>>,
    /// Sorted by origin, no origin twice, no sequence 0.
    seen: Vec<Seen>,
    /// The greatest version ever merged in from a plain record.
    floor: Option<(Timestamp, Dot)>,
}

/// A write was refused because the key has too many values. State: unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the key would have {count} siblings of {bytes} bytes; read it, and write with its context"
)]
pub struct TooManySiblings {
    /// How many there would be.
    pub count: usize,
    /// Bytes of all their values.
    pub bytes: usize,
}

/// The bytes are no key state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a key state: {0}")]
pub struct InvalidState(pub &'static str);

/// What [`KeyState::prune`] removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Pruned {
    /// Entries that the base implies: of no consequence.
    pub implied: usize,
    /// Entries that nothing implies: a stale copy may come back as a sibling. To be counted as
    /// `clock_truncated`.
    pub truncated: usize,
}

impl<'a> KeyState<'a> {
    /// The state of a key that was never written.
    #[must_use]
    pub fn new() -> KeyState<'a> {
        KeyState::default()
    }

    /// The state that a record carries: of a plain record, one blind sibling.
    ///
    /// # Errors
    /// [`InvalidState`] if the value of a `Siblings` record is no key state.
    pub fn of_record(record: &RecordRef<'a>) -> Result<KeyState<'a>, InvalidState> {
        if record.kind == Kind::Siblings {
            let encoded = record.value.whole().ok_or(InvalidState("it is in pieces"))?;
            return KeyState::decode(encoded);
        }
        let sibling = Sibling {
            dot: record.dot,
            timestamp: record.timestamp,
            is_delete: record.kind == Kind::Delete,
            is_blind: true,
            expiry_ms: record.expiry_ms,
            value: record.value,
        };
        Ok(KeyState { siblings: vec![sibling], seen: Vec::new(), floor: Some(record.version()) })
    }

    /// The same, of a record that owns its bytes.
    ///
    /// # Errors
    /// As [`KeyState::of_record`].
    pub fn of_borrowed(record: &'a Record) -> Result<KeyState<'a>, InvalidState> {
        KeyState::of_record(&record.as_ref())
    }

    /// The state as a record of kind `Siblings`, with the key and incarnation of `like`. Its dot
    /// and stamp are those of the newest sibling; it expires with its last sibling.
    #[must_use]
    pub fn to_record(&self, like: &RecordRef<'_>) -> Record {
        let (timestamp, dot) = self.newest().map(Sibling::version).unwrap_or_default();
        let expires = |sibling: &Sibling<'_>| !sibling.is_delete && sibling.expiry_ms == 0;
        let expiry_ms = match self.siblings.iter().any(expires) {
            true => 0,
            false => self.siblings.iter().map(|sibling| sibling.expiry_ms).max().unwrap_or(0),
        };
        Record {
            token: like.token,
            namespace: like.namespace,
            incarnation: like.incarnation,
            kind: Kind::Siblings,
            dot,
            timestamp,
            expiry_ms,
            key: like.key.to_vec(),
            value: self.encode(),
        }
    }

    /// All siblings, deletes and expired ones among them, sorted by dot.
    #[must_use]
    pub fn siblings(&self) -> &[Sibling<'a>] {
        &self.siblings
    }

    /// The siblings that a reader gets at `now`.
    pub fn live(&self, now: WallMicros) -> impl Iterator<Item = &Sibling<'a>> {
        self.siblings.iter().filter(move |sibling| sibling.is_live(now))
    }

    /// The winner if the last write should win.
    #[must_use]
    pub fn newest(&self) -> Option<&Sibling<'a>> {
        self.siblings.iter().max_by_key(|sibling| sibling.version())
    }

    /// The vector as stored.
    #[must_use]
    pub fn vector(&self) -> VersionVector {
        self.seen.iter().map(|seen| Dot { origin: seen.origin, sequence: seen.sequence }).collect()
    }

    /// What a reader of this state has seen: passed back with a write it replaces all of it.
    #[must_use]
    pub fn context(&self) -> Context {
        let mut vector = self.vector();
        self.siblings.iter().for_each(|sibling| vector.observe(sibling.dot));
        let stamps = self.siblings.iter().map(|sibling| sibling.timestamp);
        let stamps = stamps.chain(self.seen.iter().map(|seen| seen.timestamp));
        Context { vector, timestamp: stamps.max().unwrap_or_default() }
    }

    /// Merges two states of one key.
    #[must_use]
    pub fn merge(&self, other: &KeyState<'a>) -> KeyState<'a> {
        let floor = self.floor.max(other.floor);
        let mut siblings = Vec::with_capacity(self.siblings.len() + other.siblings.len());
        for sibling in &self.siblings {
            match other.sibling(sibling.dot) {
                Some(twin) if twin.rank() > sibling.rank() => siblings.push(*twin),
                Some(_) => siblings.push(*sibling),
                None if !other.has_seen(sibling.dot) => siblings.push(*sibling),
                None => {}
            }
        }
        let news = |sibling: &&Sibling<'a>| {
            self.sibling(sibling.dot).is_none() && !self.has_seen(sibling.dot)
        };
        siblings.extend(other.siblings.iter().filter(news));
        siblings.retain(|sibling| !sibling.is_blind || Some(sibling.version()) >= floor);
        siblings.sort_unstable_by_key(|sibling| sibling.dot);
        let mut merged = KeyState { siblings, seen: self.seen.clone(), floor };
        other.seen.iter().for_each(|seen| merged.see(*seen));
        merged
    }

    /// Writes: replaces what the context covers, keeps what it does not. The dot is new, given out
    /// by this replica for this write.
    ///
    /// # Errors
    /// [`TooManySiblings`] if the write would take the key further beyond a limit; a write that
    /// leaves the key alone with it is never refused.
    pub fn write(&mut self, write: Sibling<'a>, context: &Context) -> Result<(), TooManySiblings> {
        let stays = |sibling: &&Sibling<'_>| !context.vector.covers(sibling.dot);
        let size = |sibling: &Sibling<'_>| sibling.value.len();
        let count = self.siblings.iter().filter(stays).count() + 1;
        let bytes = self.siblings.iter().filter(stays).map(size).sum::<usize>() + write.value.len();
        let bytes_before = self.siblings.iter().map(size).sum();
        let has_more = count > SIBLINGS_MAX && count > self.siblings.len();
        let is_larger = bytes > SIBLING_BYTES_MAX && bytes > bytes_before;
        if count > 1 && (has_more || is_larger) {
            return Err(TooManySiblings { count, bytes });
        }
        self.siblings.retain(|sibling| !context.vector.covers(sibling.dot));
        for Dot { origin, sequence } in context.vector.iter() {
            self.see(Seen { origin, sequence, timestamp: context.timestamp });
        }
        let Dot { origin, sequence } = write.dot;
        self.see(Seen { origin, sequence, timestamp: write.timestamp });
        let at = self.siblings.partition_point(|sibling| sibling.dot < write.dot);
        self.siblings.insert(at, write);
        Ok(())
    }

    /// Adds what the partition's seen-set implies: every write up to `base` has been seen here.
    pub fn fill(&mut self, base: &VersionVector) {
        for Dot { origin, sequence } in base.iter() {
            self.see(Seen { origin, sequence, timestamp: Timestamp::ZERO });
        }
    }

    /// Takes out what the partition's seen-set implies; `fill` with the same or a later base brings
    /// it back.
    pub fn strip(&mut self, base: &VersionVector) {
        self.seen.retain(|seen| seen.sequence > base.get(seen.origin));
    }

    /// Shortens the vector to `entries_max`, oldest entry first, as far as it can be done without
    /// dropping a value: never an entry whose origin has a sibling here, and first those that
    /// `base`, the partition's seen-set, implies.
    pub fn prune(&mut self, entries_max: usize, base: &VersionVector) -> Pruned {
        let mut pruned = Pruned::default();
        while self.seen.len() > entries_max {
            let has_sibling =
                |seen: &Seen| self.siblings.iter().any(|sibling| sibling.dot.origin == seen.origin);
            let oldest = self
                .seen
                .iter()
                .enumerate()
                .filter(|(_, seen)| !has_sibling(seen))
                .map(|(at, seen)| {
                    (seen.sequence > base.get(seen.origin), seen.timestamp, seen.origin, at)
                })
                .min();
            let Some((is_needed, _, _, at)) = oldest else { break };
            self.seen.remove(at);
            if is_needed {
                pruned.truncated += 1;
            } else {
                pruned.implied += 1;
            }
        }
        pruned
    }

    fn sibling(&self, dot: Dot) -> Option<&Sibling<'a>> {
        let at = self.siblings.binary_search_by_key(&dot, |sibling| sibling.dot).ok()?;
        Some(&self.siblings[at])
    }

    fn has_seen(&self, dot: Dot) -> bool {
        self.seen
            .binary_search_by_key(&dot.origin, |seen| seen.origin)
            .is_ok_and(|at| dot.sequence <= self.seen[at].sequence)
    }

    fn see(&mut self, seen: Seen) {
        if seen.sequence == 0 {
            return;
        }
        match self.seen.binary_search_by_key(&seen.origin, |entry| entry.origin) {
            // By sequence, then stamp: a chain, so the greater of two is a merge.
            Ok(at) => self.seen[at] = self.seen[at].max(seen),
            Err(at) => self.seen.insert(at, seen),
        }
    }
}

/// First byte of an encoded state.
const FORMAT: u8 = 1;
const IS_DELETE: u8 = 1;
const IS_BLIND: u8 = 2;

/// # Format, version 1
///
/// | size     | field    | meaning                                                          |
/// |----------|----------|------------------------------------------------------------------|
/// | 1        | format   | 1                                                                |
/// | 1        | floor    | 0, or 1 and stamp (8), origin (varint), sequence (varint)        |
/// | varint   | count    | entries of the vector                                            |
/// | each     | entry    | origin (varint, rising), sequence (varint, not 0), stamp (8)     |
/// | varint   | count    | siblings                                                         |
/// | each     | sibling  | flags (1: delete 1, blind 2), origin, sequence (varints, dots rising), stamp (8), expiry (varint), length (varint), value |
///
/// Nothing follows. The record that carries it has the checksum.
impl<'a> KeyState<'a> {
    /// The state as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let values: usize = self.siblings.iter().map(|sibling| sibling.value.len()).sum();
        let entries = self.siblings.len() + self.seen.len() + 1;
        let mut out = Vec::with_capacity(values + entries * 32);
        out.push(FORMAT);
        out.push(u8::from(self.floor.is_some()));
        if let Some((timestamp, dot)) = self.floor {
            out.extend_from_slice(&timestamp.0.to_le_bytes());
            put_dot(&mut out, dot);
        }
        varint::put(&mut out, self.seen.len() as u64);
        for seen in &self.seen {
            put_dot(&mut out, Dot { origin: seen.origin, sequence: seen.sequence });
            out.extend_from_slice(&seen.timestamp.0.to_le_bytes());
        }
        varint::put(&mut out, self.siblings.len() as u64);
        for sibling in &self.siblings {
            let flags = u8::from(sibling.is_delete) * IS_DELETE;
            out.push(flags | (u8::from(sibling.is_blind) * IS_BLIND));
            put_dot(&mut out, sibling.dot);
            out.extend_from_slice(&sibling.timestamp.0.to_le_bytes());
            varint::put(&mut out, sibling.expiry_ms);
            varint::put(&mut out, sibling.value.len() as u64);
            sibling.value.copy_to(&mut out);
        }
        out
    }

    /// The state in these bytes, which it borrows. Takes only what `encode` can have written.
    ///
    /// # Errors
    /// [`InvalidState`] with the first rule broken.
    pub fn decode(bytes: &'a [u8]) -> Result<KeyState<'a>, InvalidState> {
        let mut reader = Reader::new(bytes);
        if reader.byte() != Some(FORMAT) {
            return Err(InvalidState("its format is not 1"));
        }
        let floor = match reader.byte() {
            Some(0) => None,
            Some(1) => Some(take_version(&mut reader).ok_or(InvalidState("floor cut short"))?),
            _ => return Err(InvalidState("floor is neither absent nor present")),
        };
        let seen = take_seen(&mut reader)?;
        let siblings = take_siblings(&mut reader)?;
        if !reader.is_empty() {
            return Err(InvalidState("bytes follow it"));
        }
        let blind = |sibling: &Sibling<'_>| sibling.is_blind && Some(sibling.version()) != floor;
        if siblings.iter().any(blind) {
            return Err(InvalidState("a blind sibling is not at the floor"));
        }
        Ok(KeyState { siblings, seen, floor })
    }
}

fn put_dot(out: &mut Vec<u8>, dot: Dot) {
    varint::put(out, u64::from(dot.origin.0));
    varint::put(out, dot.sequence);
}

fn take_dot(reader: &mut Reader<'_>) -> Option<Dot> {
    Some(Dot { origin: OriginId(reader.small()?), sequence: reader.number()? })
}

fn take_version(reader: &mut Reader<'_>) -> Option<(Timestamp, Dot)> {
    Some((Timestamp(reader.fixed()?), take_dot(reader)?))
}

fn take_seen(reader: &mut Reader<'_>) -> Result<Vec<Seen>, InvalidState> {
    let cut = InvalidState("vector cut short");
    // Each entry has ten bytes or more, so the count is bounded by what is there.
    let count = reader.length().ok_or(cut)?;
    let mut entries: Vec<Seen> = Vec::with_capacity(count.min(reader.len() / 10));
    for _ in 0..count {
        let Dot { origin, sequence } = take_dot(reader).ok_or(cut)?;
        let timestamp = Timestamp(reader.fixed().ok_or(cut)?);
        if sequence == 0 || entries.last().is_some_and(|last| last.origin >= origin) {
            return Err(InvalidState("vector out of order"));
        }
        entries.push(Seen { origin, sequence, timestamp });
    }
    Ok(entries)
}

fn take_siblings<'a>(reader: &mut Reader<'a>) -> Result<Vec<Sibling<'a>>, InvalidState> {
    let cut = InvalidState("siblings cut short");
    let count = reader.length().ok_or(cut)?;
    let mut siblings: Vec<Sibling<'a>> = Vec::with_capacity(count.min(reader.len() / 13));
    for _ in 0..count {
        let flags = reader.byte().ok_or(cut)?;
        let dot = take_dot(reader).ok_or(cut)?;
        let timestamp = Timestamp(reader.fixed().ok_or(cut)?);
        let expiry_ms = reader.number().ok_or(cut)?;
        let len = reader.length().ok_or(cut)?;
        let value = reader.bytes(len).ok_or(cut)?;
        if flags > (IS_DELETE | IS_BLIND) || (flags & IS_DELETE != 0 && !value.is_empty()) {
            return Err(InvalidState("a sibling with unknown flags, or a delete with a value"));
        }
        if siblings.last().is_some_and(|last| last.dot >= dot) {
            return Err(InvalidState("siblings out of order"));
        }
        siblings.push(Sibling {
            dot,
            timestamp,
            is_delete: flags & IS_DELETE != 0,
            is_blind: flags & IS_BLIND != 0,
            expiry_ms,
            value: Value::Whole(value),
        });
    }
    Ok(siblings)
}

#[cfg(test)]
pub(super) mod tests;
