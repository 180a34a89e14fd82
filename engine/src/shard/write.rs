//! The write path below the pump: stamp, condition, log. Memory is reached by the log's sink.
//!
//! Invariant: what [`Shard::apply`] returned an LSN for happens exactly once, in LSN order, when
//! the log makes it visible; a write that was refused never happens.
//!
//! A blind write is one append. A write that depends on the key's state (a condition, siblings)
//! reads first; it is then appended only if nobody wrote the token in between, else it reads
//! again. That loop ends because each turn of it lets another write of the same key succeed.

use super::read::Damage;
use super::space::SpaceLevel;
use super::{Memory, Shard};
use crate::disk::Disk;
use crate::log::Lsn;
use crate::model::causality::{InvalidState, KeyState, Sibling};
use crate::model::{
    Context, Dot, Kind, NamespaceId, OriginId, Record, RecordRef, Timestamp, Token, Value,
    VersionVector, WallMicros, limits,
};
use crate::options::Durability;
use crate::runtime::Runtime;
use crate::{Error, Result};

/// What a namespace does with concurrent writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// The greatest version wins.
    LastWriteWins,
    /// Values that had not seen each other are kept side by side.
    Siblings,
}

/// What must hold of the key for the write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    None,
    /// The key has no live value.
    Absent,
    /// The key's live value has this version.
    Version(Timestamp, Dot),
}

/// A put or delete.
#[derive(Clone, Copy, Debug)]
pub struct Mutation<'a> {
    /// Hash of the key.
    pub token: Token,
    /// Namespace of the key.
    pub namespace: NamespaceId,
    /// The namespace's way with concurrent writes.
    pub merge: Merge,
    /// 1 to `KEY_SIZE_MAX` bytes.
    pub key: &'a [u8],
    /// The value, or `None` to delete.
    pub value: Option<Value<'a>>,
    /// Milliseconds since 2024-01-01 from which the value is gone; 0 is never.
    pub expiry_ms: u64,
    /// What the client had read.
    pub context: Option<&'a Context>,
    /// When to refuse.
    pub condition: Condition,
}

/// A write that was given its place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Its place; visible, and in `sync` mode durable, once the log's `visible` reaches it.
    pub lsn: Lsn,
    /// Its stamp.
    pub timestamp: Timestamp,
    /// Its dot.
    pub dot: Dot,
}

/// What came of a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has its place in the log.
    Applied(Applied),
    /// The condition does not hold; nothing was written. The version found, if the key is live.
    ConditionFalse(Option<(Timestamp, Dot)>),
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Whether the mutation must be given to [`Shard::apply_after_read`].
    #[must_use]
    pub fn needs_read(mutation: &Mutation<'_>) -> bool {
        mutation.merge == Merge::Siblings || mutation.condition != Condition::None
    }

    /// Gives a blind write its place in the log. Costs one append, reads nothing.
    ///
    /// # Errors
    /// `Invalid` (sizes, a context from the future), `Full`, `Busy`, `Poisoned`. State: unchanged,
    /// the write has not started.
    pub fn apply(&self, mutation: &Mutation<'_>, wall: WallMicros) -> Result<Applied> {
        debug_assert!(!Self::needs_read(mutation));
        self.admit_mutation(mutation)?;
        let (timestamp, dot) = self.stamp(mutation, wall)?;
        let record = self.record_of(mutation, timestamp, dot);
        let lsn = self.append(&record, true)?;
        self.issue(mutation.token, dot);
        Ok(Applied { lsn, timestamp, dot })
    }

    /// Reads the key, checks the condition, merges siblings, and gives the result its place.
    ///
    /// # Errors
    /// As [`Shard::apply`], and whatever the read met. State: unchanged.
    pub async fn apply_after_read(&self, mutation: &Mutation<'_>) -> Result<Outcome> {
        self.admit_mutation(mutation)?;
        loop {
            let current =
                self.get_settled(mutation.token, mutation.namespace, mutation.key).await?;
            let Some(current) = current else { continue };
            // From here to the append nothing awaits, so nobody comes in between.
            let wall = self.state.runtime.wall();
            let version = current.as_ref().and_then(|record| live_version(&record.as_ref(), wall));
            let holds = match mutation.condition {
                Condition::None => true,
                Condition::Absent => version.is_none(),
                Condition::Version(timestamp, dot) => version == Some((timestamp, dot)),
            };
            if !holds {
                return Ok(Outcome::ConditionFalse(version));
            }
            let applied = match mutation.merge {
                Merge::LastWriteWins => {
                    self.apply(&Mutation { condition: Condition::None, ..*mutation }, wall)?
                }
                Merge::Siblings => self.apply_siblings(mutation, current.as_ref(), wall)?,
            };
            return Ok(Outcome::Applied(applied));
        }
    }

    fn apply_siblings(
        &self,
        mutation: &Mutation<'_>,
        current: Option<&Record>,
        wall: WallMicros,
    ) -> Result<Applied> {
        let (timestamp, dot) = self.stamp(mutation, wall)?;
        let written = self.record_of(mutation, timestamp, dot);
        let base = self.base_of(mutation.token);
        let mut state = self.state_of(current, &base)?;
        let sibling = Sibling {
            dot,
            timestamp,
            is_delete: mutation.value.is_none(),
            is_blind: false,
            expiry_ms: mutation.expiry_ms,
            value: written.value,
        };
        let everything;
        let context = match (mutation.context, mutation.value) {
            (Some(context), _) => context,
            // A delete without context deletes what is there (`ALGORITHMS.md` 5.3).
            (None, None) => {
                everything = state.context();
                &everything
            }
            (None, Some(_)) => &Context::default(),
        };
        state.write(sibling, context)?;
        let record = self.stored(state, &base, &written, current);
        let lsn = self.append(&record.as_ref(), true)?;
        self.issue(mutation.token, dot);
        Ok(Applied { lsn, timestamp, dot })
    }

    /// What of the token's partition every dot up to there has been merged here.
    pub(super) fn base_of(&self, token: Token) -> VersionVector {
        let memory = self.state.memory.borrow();
        let replicas = memory.replicas();
        replicas.of(replicas.partition(token)).seen.base()
    }

    /// The key's state as it is here, filled.
    pub(super) fn state_of<'a>(
        &self,
        current: Option<&'a Record>,
        base: &VersionVector,
    ) -> Result<KeyState<'a>> {
        let path = &self.state.dir;
        let damaged = |error: InvalidState| Error::corrupt(path, 0, error.to_string());
        let mut state = match current {
            Some(record) => KeyState::of_borrowed(record).map_err(damaged)?,
            None => KeyState::new(),
        };
        state.fill(base);
        Ok(state)
    }

    /// The record of a state to be stored, stripped. It supersedes what it was made from: its
    /// version is not less, though it may hold older siblings only.
    pub(super) fn stored(
        &self,
        mut state: KeyState<'_>,
        base: &VersionVector,
        like: &RecordRef<'_>,
        current: Option<&Record>,
    ) -> Record {
        state.prune(limits::VECTOR_ENTRIES_MAX, base);
        state.strip(base);
        let mut record = state.to_record(like);
        if let Some(current) = current {
            let newest = record.as_ref().version().max(current.as_ref().version());
            (record.timestamp, record.dot) = newest;
        }
        record
    }

    /// The greatest sequence that an origin is known to have issued for the token's partition;
    /// `None` for other origins: what was seen of them may lag behind what a client has read
    /// elsewhere, so it bounds nothing.
    #[must_use]
    pub fn issued(&self, token: Token, origin: OriginId) -> Option<u64> {
        let own = origin == self.state.identity.node;
        let partition = token.partition(self.state.identity.partition_bits);
        own.then(|| self.state.versions.borrow().last_sequence(partition))
    }

    /// Every write stamped by this shard at or below this stamp that will ever be is visible now:
    /// later ones are stamped above it, whatever crashes and wall clocks do meanwhile. So after a
    /// long silence it lags behind the clock once, until the log has a later ceiling.
    #[must_use]
    pub fn complete_up_to(&self, wall: WallMicros) -> Timestamp {
        let visible = self.state.log.visible();
        let unsettled = self.state.unsettled.borrow_mut().oldest(visible);
        match unsettled {
            Some(oldest) => self.state.held_back(Timestamp(oldest.0 - 1)),
            None => self.clock_now(wall),
        }
    }

    /// How long an acknowledged write may wait for its sync, in ms; 0: it is synced before.
    #[inline]
    #[must_use]
    pub fn durability_window_ms(&self) -> u32 {
        match self.state.options.log.durability {
            Durability::Sync => 0,
            Durability::Periodic { window_ms } => u32::try_from(window_ms).unwrap_or(u32::MAX),
        }
    }

    /// Refuses what cannot be written, before anything is done.
    fn admit_mutation(&self, mutation: &Mutation<'_>) -> Result<()> {
        let size = mutation.value.map_or(0, |value| value.len());
        let size_max = self.state.options.value_size_max;
        if size > size_max {
            return Err(Error::Invalid {
                what: format!(
                    "a value has at most {size_max} bytes (`value-size-max`), this one has {size}",
                ),
            });
        }
        self.admit(mutation.key, size, mutation.value.is_some())
    }

    /// The same for a record from anywhere, whose value is `size` bytes long.
    pub(super) fn admit(&self, key: &[u8], size: usize, is_put: bool) -> Result<()> {
        if key.is_empty() || key.len() > limits::KEY_SIZE_MAX {
            return Err(Error::Invalid {
                what: format!(
                    "a key has 1 to {} bytes, this one has {}",
                    limits::KEY_SIZE_MAX,
                    key.len()
                ),
            });
        }
        let memory = self.state.memory.borrow();
        if !self.fits_memory(&memory, key.len() + size) {
            return Err(self.memory_refusal());
        }
        drop(memory);
        match self.state.space.level() {
            SpaceLevel::Reserve => Err(self.state.space.refusal()),
            SpaceLevel::RefuseData if is_put => Err(self.state.space.refusal()),
            _ => Ok(()),
        }
    }

    /// Whether memory stays within the active memtable, the sealed ones that may wait, and one
    /// more: what the log has taken and not yet shown is counted, because it will come too.
    fn fits_memory(&self, memory: &Memory, bytes: usize) -> bool {
        let options = &self.state.options;
        let sealed_max = options.memtables_sealed_max;
        let coming = match options.log.durability {
            Durability::Sync => self.state.log.pending_bytes(),
            Durability::Periodic { .. } => 0,
        };
        let bytes_max = options.memtable_size.saturating_mul(sealed_max + 2);
        let fits = memory.bytes() + coming + bytes <= bytes_max;
        // A record larger than all that comes in when nothing else does.
        memory.sealed_count() <= sealed_max && (fits || (memory.sealed_count() == 0 && coming == 0))
    }

    /// Why memory is not emptied.
    #[cold]
    fn memory_refusal(&self) -> Error {
        match &*self.state.background_error.borrow() {
            Some(error) if error.is_full() => {
                Error::Full { what: format!("memory is full and cannot be flushed: {error}") }
            }
            Some(_) => Error::Busy { what: "memory is full and flushes fail: see the log" },
            None => Error::Busy { what: "memory is full until the next flush is done" },
        }
    }

    /// The stamp and dot of a new write; reserves a new ceiling in the log when it must. The dot is
    /// used up by [`Shard::issue`], when the log has taken the write.
    fn stamp(&self, mutation: &Mutation<'_>, wall: WallMicros) -> Result<(Timestamp, Dot)> {
        let mut versions = self.state.versions.borrow_mut();
        if let Some(context) = mutation.context {
            versions
                .clock
                .observe(context.timestamp, wall, limits::CLOCK_OFFSET_MAX_US)
                .map_err(|skew| Error::Invalid { what: format!("the context's {skew}") })?;
        }
        let timestamp = versions.clock.tick(wall);
        let partition = mutation.token.partition(self.state.identity.partition_bits);
        let sequence = versions.next_sequence(partition);
        self.state.reserve(&mut versions, timestamp, sequence, wall)?;
        if sequence > versions.durable_ceilings().1 {
            return Err(Error::Busy { what: "sequences of writes are being reserved" });
        }
        Ok((timestamp, Dot { origin: self.state.identity.node, sequence }))
    }

    /// Uses up a dot of this shard's own.
    pub(super) fn issue(&self, token: Token, dot: Dot) {
        let partition = token.partition(self.state.identity.partition_bits);
        self.state.versions.borrow_mut().issue(partition, dot.sequence);
    }

    /// The record that a mutation becomes under this stamp.
    fn record_of<'a>(
        &self,
        mutation: &Mutation<'a>,
        timestamp: Timestamp,
        dot: Dot,
    ) -> RecordRef<'a> {
        RecordRef {
            token: mutation.token,
            namespace: mutation.namespace,
            incarnation: self.state.incarnation_of(mutation.token),
            kind: if mutation.value.is_some() { Kind::Put } else { Kind::Delete },
            dot,
            timestamp,
            expiry_ms: mutation.expiry_ms,
            key: mutation.key,
            value: mutation.value.unwrap_or_default(),
        }
    }

    /// Gives a record its place in the log; `is_own` if it was stamped here.
    pub(super) fn append(&self, record: &RecordRef<'_>, is_own: bool) -> Result<Lsn> {
        let lsn = self.state.log.append(record)?;
        self.state.unsettled.borrow_mut().push(lsn, record, is_own, self.state.log.visible());
        Ok(lsn)
    }

    /// The record of a key when no write of it is between log and memory: until the caller awaits
    /// again, it is what a write must be built on. The outer `None`: it changed; ask again.
    pub(super) async fn get_settled(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Option<Record>>> {
        self.get_settled_by(Damage::Met, token, namespace, key).await
    }

    /// The same, by what becomes of damage.
    pub(super) async fn get_settled_by(
        &self,
        damage: Damage,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Option<Record>>> {
        let state = &*self.state;
        loop {
            let last = state.unsettled.borrow().last_of(token).max(Some(state.dropped_at.get()));
            match last {
                Some(lsn) if lsn > state.log.visible() => state.log.wait_visible(lsn).await?,
                _ => break,
            }
        }
        let before = (state.writes_of(token), state.dropped_at.get());
        let current = match damage {
            Damage::Met => self.get(token, namespace, key).await?,
            Damage::PassedOver => self.get_readable(token, namespace, key).await?,
        };
        let after = (state.writes_of(token), state.dropped_at.get());
        Ok((before == after).then_some(current))
    }
}

/// The version of a record's live value; of siblings, of the newest live one.
fn live_version(record: &RecordRef<'_>, wall: WallMicros) -> Option<(Timestamp, Dot)> {
    if record.kind != Kind::Siblings {
        return record.is_live(wall).then(|| record.version());
    }
    let state = KeyState::of_record(record).ok()?;
    state.live(wall).map(Sibling::version).max()
}
