//! What other replicas bring: their records, what they have seen, and the time of their clocks.
//!
//! Invariant: a dot is seen here exactly if its write, or one that replaced it, is merged here or
//! was adopted as such. So a record whose dot is seen is not merged again, and what a key's state
//! lacks up to the partition's base is obsolete (`ALGORITHMS.md` 5.4). Nothing here knows nodes:
//! who sends what to whom is decided above.
//!
//! Plain records are appended blindly, as own writes are: reads and compaction choose the greatest
//! version. Key states are read, filled, merged, stripped and appended.

use super::read::Damage;
use super::replicas::set_of;
use super::{Merge, Shard};
use crate::disk::Disk;
use crate::log::{Control, Lsn};
use crate::model::causality::KeyState;
use crate::model::{
    Dot, Kind, PartitionId, Record, RecordRef, SeenSet, Timestamp, Token, VersionVector,
    WallMicros, limits,
};
use crate::runtime::Runtime;
use crate::{Error, Result};

/// What came of a record from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergedIn {
    /// Its write has been merged before: nothing was written.
    Duplicate,
    /// It counts once the log's `visible` reaches this.
    Applied(Lsn),
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Merges a put or delete of another replica: one append, nothing is read. The record keeps its
    /// dot and stamp. For namespaces in which the last write wins.
    ///
    /// # Errors
    /// `Invalid` (sizes, kind, a stamp too far ahead of the clock), `Full`, `Busy`, `Poisoned`.
    /// State: unchanged.
    pub fn merge_in(&self, record: &RecordRef<'_>, wall: WallMicros) -> Result<MergedIn> {
        if self.has_seen(record.token, record.dot) && !self.is_unknown(record.token) {
            return Ok(MergedIn::Duplicate);
        }
        self.merge_again(record, wall).map(MergedIn::Applied)
    }

    /// The same, also if the write is known: when the record that it made turned out to be missing.
    ///
    /// # Errors
    /// As [`Shard::merge_in`].
    pub fn merge_again(&self, record: &RecordRef<'_>, wall: WallMicros) -> Result<Lsn> {
        if record.kind == Kind::Siblings || record.dot.sequence == 0 {
            return Err(Error::Invalid { what: "not the record of one write".to_owned() });
        }
        if record.value.len() > limits::VALUE_SIZE_CEILING {
            return Err(Error::Invalid {
                what: format!("a value of {} bytes is longer than any", record.value.len()),
            });
        }
        self.admit(record.key, record.value.len(), record.kind == Kind::Put)?;
        self.clock_observe(record.timestamp, wall)?;
        let incarnation = self.state.incarnation_of(record.token);
        let lsn = self.append(&RecordRef { incarnation, ..*record }, false)?;
        self.note_own(record.token, [record.dot]);
        Ok(lsn)
    }

    /// Merges a whole key state of another replica, filled there, or a plain record, into the key's
    /// state. For namespaces that keep siblings.
    ///
    /// # Errors
    /// As [`Shard::merge_in`], and whatever the read met. State: unchanged.
    pub async fn merge_in_state(&self, record: &RecordRef<'_>) -> Result<MergedIn> {
        let bad = |error| Error::Invalid { what: format!("a record from elsewhere: {error}") };
        let theirs = KeyState::of_record(record).map_err(bad)?;
        let is_put = theirs.siblings().iter().any(|sibling| !sibling.is_delete);
        self.admit(record.key, record.value.len(), is_put)?;
        let own_dots = theirs.siblings().iter().map(|it| (it.dot, it.timestamp));
        let dots: Vec<_> = own_dots.chain([(record.dot, record.timestamp)]).collect();
        let newest = dots.iter().map(|(_, stamp)| *stamp).max().unwrap_or_default();
        self.clock_observe(newest, self.state.runtime.wall())?;
        loop {
            let is_known = dots.iter().all(|(dot, _)| self.has_seen(record.token, *dot));
            if is_known && !self.is_unknown(record.token) {
                return Ok(MergedIn::Duplicate);
            }
            let current = self.get_settled(record.token, record.namespace, record.key).await?;
            let Some(current) = current else { continue };
            // From here on nothing awaits, so nobody comes in between.
            let base = self.base_of(record.token);
            let ours = self.state_of(current.as_ref(), &base)?;
            let merged = ours.merge(&theirs);
            let mut noted: Vec<Dot> = Vec::new();
            let mut lsn = None;
            if merged != ours || (current.is_none() && !merged.siblings().is_empty()) {
                noted.extend(merged.siblings().iter().map(|sibling| sibling.dot));
                let incarnation = self.state.incarnation_of(record.token);
                let like = RecordRef { incarnation, ..*record };
                let stored = self.stored(merged, &base, &like, current.as_ref());
                noted.push(stored.dot);
                lsn = Some(self.append(&stored.as_ref(), false)?);
            }
            self.note_own(record.token, dots.iter().map(|(dot, _)| *dot));
            // What was obsolete already has left no trace in the record.
            let rest = dots.iter().filter(|(dot, _)| !noted.contains(dot)).copied();
            let rest = set_of(rest.filter(|(dot, _)| !self.has_seen(record.token, *dot)));
            if !rest.is_empty() {
                lsn = Some(self.adopt_seen(self.partition_of(record.token), &rest)?);
            }
            return Ok(lsn.map_or(MergedIn::Duplicate, MergedIn::Applied));
        }
    }

    /// Puts a key state of another replica beside what is here, as both stand: nothing is taken
    /// for obsolete because the partition has seen it, as the record in which it was replaced may
    /// be what is missing. What cannot be read here is passed over. Gives `Duplicate` if that
    /// changes nothing.
    ///
    /// # Errors
    /// As [`Shard::merge_in_state`].
    pub async fn merge_state_again(&self, record: &RecordRef<'_>) -> Result<MergedIn> {
        let bad = |error| Error::Invalid { what: format!("a record from elsewhere: {error}") };
        let theirs = KeyState::of_record(record).map_err(bad)?;
        let is_put = theirs.siblings().iter().any(|sibling| !sibling.is_delete);
        self.admit(record.key, record.value.len(), is_put)?;
        let stamps = theirs.siblings().iter().map(|sibling| sibling.timestamp);
        let newest = stamps.chain([record.timestamp]).max().unwrap_or_default();
        self.clock_observe(newest, self.state.runtime.wall())?;
        loop {
            let (token, namespace, key) = (record.token, record.namespace, record.key);
            let current = self.get_settled_by(Damage::PassedOver, token, namespace, key).await?;
            let Some(current) = current else { continue };
            // From here on nothing awaits, so nobody comes in between.
            let damaged = |error| Error::corrupt(&self.state.dir, 0, format!("{error}"));
            let ours = match &current {
                Some(current) => KeyState::of_borrowed(current).map_err(damaged)?,
                None => KeyState::new(),
            };
            let merged = ours.merge(&theirs);
            let is_same = merged.siblings() == ours.siblings();
            if is_same || (current.is_none() && merged.siblings().is_empty()) {
                return Ok(MergedIn::Duplicate);
            }
            let noted: Vec<Dot> = merged.siblings().iter().map(|sibling| sibling.dot).collect();
            let incarnation = self.state.incarnation_of(token);
            let like = RecordRef { incarnation, ..*record };
            let stored = self.stored(merged, &self.base_of(token), &like, current.as_ref());
            let lsn = self.append(&stored.as_ref(), false)?;
            self.note_own(token, noted);
            return Ok(MergedIn::Applied(lsn));
        }
    }

    /// What of the token's partition every dot up to there has been merged here: with it a record
    /// is [filled](Shard::filled_by) that is read from now on.
    #[must_use]
    pub fn base(&self, token: Token) -> VersionVector {
        self.base_of(token)
    }

    /// A record that was read in this moment, as it must be sent or answered.
    ///
    /// # Errors
    /// As [`Shard::filled_by`].
    pub fn filled(&self, record: &Record) -> Result<Record> {
        self.filled_by(record, &self.base_of(record.token))
    }

    /// The record as it must be sent or answered: a key state that was stripped is filled again.
    /// `base` is from before the record was read. A later one may cover a write of the key that
    /// came in between: the state would claim to have seen it, and whoever merges it drop it.
    ///
    /// # Errors
    /// `Corrupt` when its value is no key state.
    pub fn filled_by(&self, record: &Record, base: &VersionVector) -> Result<Record> {
        if record.kind != Kind::Siblings {
            return Ok(record.clone());
        }
        let state = self.state_of(Some(record), base)?;
        let filled = state.to_record(&record.as_ref());
        Ok(Record { timestamp: record.timestamp, dot: record.dot, ..filled })
    }

    /// Shows what a partition has seen: exactly the writes that are visible, and what was adopted.
    /// `show` must not call the shard.
    pub fn with_seen<T>(&self, partition: PartitionId, show: impl FnOnce(&SeenSet) -> T) -> T {
        show(&self.state.memory.borrow().replicas().of(partition).seen)
    }

    /// The partition's incarnation: how often it was dropped, plus one.
    #[must_use]
    pub fn incarnation(&self, partition: PartitionId) -> u32 {
        self.state.memory.borrow().replicas().of(partition).incarnation
    }

    /// Counts everything in `seen` as merged here, because it is: every record of it that is still
    /// needed has been merged in. Visible with the LSN.
    ///
    /// # Errors
    /// `Poisoned`, `Busy`, `Full`. State: unchanged.
    pub fn adopt_seen(&self, partition: PartitionId, seen: &SeenSet) -> Result<Lsn> {
        let mut bytes = Vec::new();
        seen.encode(&mut bytes);
        let own = self.state.identity.node;
        let last = seen.last(own);
        let incarnation = {
            let mut versions = self.state.versions.borrow_mut();
            versions.issue(partition, last);
            versions.incarnation(partition)
        };
        let control = Control::Seen { partition, incarnation, seen: &bytes };
        let lsn = self.state.log.append_control(control)?;
        self.state.control_at.set(lsn);
        Ok(lsn)
    }

    /// Declares that no write of this origin from before this life, or before the partition was
    /// dropped, is missing any more: what is not seen was never made, or is lost. To be called when
    /// the peers have given back what they had, or when there are none.
    ///
    /// # Errors
    /// As [`Shard::adopt_seen`].
    pub fn declare_own_void(&self, partition: PartitionId) -> Result<()> {
        let own = self.state.identity.node;
        let (end, stamp) = self.state.versions.borrow().void_end(partition);
        if self.with_seen(partition, |seen| seen.of(own).base() < end) {
            let mut void = SeenSet::new();
            void.void_up_to(own, end, stamp);
            self.adopt_seen(partition, &void)?;
        }
        Ok(())
    }

    /// Gives up the partition: its records and what it has seen are void, now and after any crash
    /// that this outlives. Later writes belong to the next incarnation. Visible with the LSN.
    ///
    /// # Errors
    /// `Poisoned`, `Busy`, `Full`. State: unchanged.
    pub fn drop_partition(&self, partition: PartitionId) -> Result<Lsn> {
        let mut versions = self.state.versions.borrow_mut();
        let incarnation = versions.incarnation(partition);
        let next = incarnation
            .checked_add(1)
            .ok_or(Error::Busy { what: "the partition was dropped too often" })?;
        let lsn =
            self.state.log.append_control(Control::DropPartition { partition, incarnation })?;
        versions.begin(partition, next);
        drop(versions);
        self.state.dropped_at.set(lsn);
        self.state.whole.set(false);
        self.state.keep.forget(partition);
        Ok(lsn)
    }

    /// Everything at or below `floor` that will ever be in this partition, on any node, is merged
    /// here: tombstones and expired records of it may go, once what is visible now is in tables.
    /// Does nothing for a shard that was opened without replicas: there they may go at once.
    pub fn set_purge_floor(&self, partition: PartitionId, floor: Timestamp) {
        let released = self.state.tables.current().layout().released;
        self.state.keep.set_floor(partition, floor, self.state.log.visible(), released);
    }

    /// Every replica of the partition has merged these writes: deleted key states within may go.
    pub fn set_stable(&self, partition: PartitionId, stable: VersionVector) {
        self.state.keep.set_stable(partition, stable);
    }

    /// Takes note of another clock's stamp: later own writes are above it.
    ///
    /// # Errors
    /// `Invalid` when it is too far ahead. State: unchanged.
    pub fn clock_observe(&self, stamp: Timestamp, wall: WallMicros) -> Result<()> {
        let clock = &mut self.state.versions.borrow_mut().clock;
        clock
            .observe(stamp, wall, limits::CLOCK_OFFSET_MAX_US)
            .map_err(|skew| Error::Invalid { what: skew.to_string() })
    }

    /// A stamp below that of every own write from now on, also of those after a crash: it runs
    /// behind the clock while the log is being told of a later ceiling.
    #[must_use]
    pub fn clock_now(&self, wall: WallMicros) -> Timestamp {
        let state = &*self.state;
        let mut versions = state.versions.borrow_mut();
        let now = versions.clock.tick(wall);
        // What the log cannot take now is asked of it again.
        let _ = state.reserve(&mut versions, now, 0, wall);
        state.held_back(now.min(versions.durable_ceilings().0))
    }

    fn has_seen(&self, token: Token, dot: Dot) -> bool {
        let memory = self.state.memory.borrow();
        let replicas = memory.replicas();
        replicas.of(replicas.partition(token)).seen.contains(dot)
    }

    fn partition_of(&self, token: Token) -> PartitionId {
        token.partition(self.state.identity.partition_bits)
    }

    /// Own writes that come back from elsewhere: their sequences are not given out again.
    fn note_own(&self, token: Token, dots: impl IntoIterator<Item = Dot>) {
        let own = self.state.identity.node;
        for dot in dots.into_iter().filter(|dot| dot.origin == own) {
            self.issue(token, dot);
        }
    }

    /// How a namespace's records from elsewhere are merged in.
    ///
    /// # Errors
    /// As [`Shard::merge_in`] and [`Shard::merge_in_state`].
    pub async fn merge_in_by(
        &self,
        merge: Merge,
        record: &RecordRef<'_>,
        wall: WallMicros,
    ) -> Result<MergedIn> {
        if merge == Merge::LastWriteWins && record.kind != Kind::Siblings {
            return self.merge_in(record, wall);
        }
        self.merge_in_state(record).await
    }
}
