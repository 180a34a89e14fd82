//! Announcements, both sides: snapshots that wait for the log, cumulative messages, their answers.
//!
//! A message says: "on top of all up to `base_version` this is all up to `version`". The receiver
//! takes it if it has that base, and always answers with what it has, so a sender whose guess was
//! wrong starts again from there. Clock and promise travel only with the last message of a
//! round, and belong to its version. The sender does not wait for answers between messages.

use std::ops::Bound;
use std::rc::Rc;

use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{Instant, PartitionId, Timestamp};

use super::{Announced, BadTrack, Entry, Options, PeerShard, Replica, Tracking, origin_of};
use crate::message::{PeerMessage, TrackEntry};

/// A version is a life and so many changes in it: 16 million starts, and ten thousand changes a
/// second for three years between two of them.
const LIFE_SHIFT: u32 = 40;
/// Bytes of an entry and of a message beside the sets.
const ENTRY_SIZE: usize = 16;
/// Partitions that are looked at between two polls, and lines of a message: some 100 us of work on
/// either side, which a request may have to wait for. A round takes as many polls as it needs.
const PARTITIONS_AT_ONCE: usize = 64;

pub(super) fn first_version(life: u64) -> u64 {
    (life << LIFE_SHIFT) + 1
}

fn life_of(version: u64) -> u64 {
    version >> LIFE_SHIFT
}

/// What a round says beside its lines.
#[derive(Clone, Copy)]
pub(super) struct Told {
    /// All that was taken in before this moment is in the lines.
    clock: Timestamp,
    /// All own writes stamped at or below this are in the lines.
    promise: Timestamp,
    /// All that was taken in before this map was confirmed is in the lines.
    epoch: u32,
}

/// The state of one moment; others may know it once the log is durable up to `position`.
pub(super) struct Snapshot {
    position: u64,
    told: Told,
    /// Partitions that may have changed, which are still to be looked at.
    candidates: Vec<(PartitionId, Rc<SeenSet>)>,
    has_begun: bool,
}

impl Tracking {
    /// Does what is due, or a part of it; calls `out` for each message, which returns whether it
    /// went. To be called every few milliseconds, and sooner while a round [is under
    /// way](Tracking::is_under_way); costs little while nothing is due.
    pub fn poll(
        &mut self,
        now: Instant,
        replica: &mut impl Replica,
        out: &mut impl FnMut(PeerShard, &PeerMessage<'_>) -> bool,
    ) {
        self.look_at_log(replica);
        if self.snapshot.is_none()
            && self.snapshot_at.is_none_or(|at| now.nanos_since(at) >= self.announce_pause)
        {
            self.take_snapshot(replica);
            self.snapshot_at = Some(now);
        }
        if let Some(snapshot) = self.snapshot.take_if(|s| s.position <= replica.durable()) {
            self.release(snapshot);
        }
        let peers: Vec<PeerShard> = self.peers.keys().copied().collect();
        for peer in peers {
            self.announce_to(peer, now, out);
        }
    }

    /// What was taken in and is not visible yet is in no snapshot, so neither is the moment at which
    /// it was taken in.
    fn look_at_log(&mut self, replica: &impl Replica) {
        let visible = replica.visible();
        if let Some((_, clock, epoch)) = self.mark.take_if(|mark| mark.0 <= visible) {
            (self.visible, self.visible_epoch) = (clock, epoch);
        }
        let appended = replica.appended();
        let clock = replica.clock();
        match self.mark {
            None if appended <= visible => {
                (self.visible, self.visible_epoch) = (clock, self.epoch);
            }
            None => self.mark = Some((appended, clock, self.epoch)),
            Some(_) => {}
        }
    }

    /// Every own write stamped at or below this is visible, and none will be stamped so any more.
    pub(super) fn own_promise(&self, replica: &impl Replica) -> Timestamp {
        replica.lost_after().map_or(self.visible, |lost_after| lost_after.min(self.visible))
    }

    fn take_snapshot(&mut self, replica: &mut impl Replica) {
        let promise = self.own_promise(replica);
        self.dirty.extend(replica.take_changed());
        let mut candidates = std::mem::take(&mut self.dirty);
        candidates.extend(self.unsettled.iter().copied());
        let of = |partition| (partition, replica.seen(partition));
        let candidates: Vec<_> = candidates.into_iter().map(of).collect();
        let lines = u64::try_from(candidates.len()).expect("at most 65,536");
        let Options { announce_every, announce_line, announce_every_max, .. } = self.options;
        self.announce_pause = announce_every.max((announce_line * lines).min(announce_every_max));
        let position = replica.visible();
        let told = Told { clock: self.visible, promise, epoch: self.visible_epoch };
        self.snapshot = Some(Snapshot { position, told, candidates, has_begun: false });
    }

    /// From now on it may be known, a part in each poll. Lines without the moment that they belong
    /// to are true: they only say more than the round before.
    fn release(&mut self, mut snapshot: Snapshot) {
        let rest = snapshot.candidates.len().saturating_sub(PARTITIONS_AT_ONCE);
        for (partition, seen) in snapshot.candidates.split_off(rest) {
            self.look_at(partition, seen, snapshot.told.promise);
        }
        match rest {
            0 => self.told = Some(snapshot.told),
            _ => self.snapshot = Some(Snapshot { has_begun: true, ..snapshot }),
        }
    }

    /// Makes a change of what had been seen at the moment of the promise, if there is news in it.
    fn look_at(&mut self, partition: PartitionId, seen: Rc<SeenSet>, promise: Timestamp) {
        let Some(at) = self.place(partition) else { return };
        let complete = self.completeness(partition, &seen, promise);
        let local = &mut self.locals[at];
        // A guest's data may be dropped, so what was true of it need not stay true.
        let is_holder = local.holders.contains(&self.own);
        local.complete = if is_holder { local.complete.max(complete) } else { complete };
        let (complete, before) = (local.complete, &local.announced);
        let is_news = !Rc::ptr_eq(&seen, &before.seen) && seen != before.seen;
        // An idle replica is silent once it is complete beyond its newest write: no tombstone
        // of any replica waits for more, unless it is of a write that will be news here.
        let is_complete_further = complete > before.complete && before.complete < seen.newest();
        if !is_news && !is_complete_further {
            return;
        }
        match complete < seen.newest() {
            true => self.unsettled.insert(partition),
            false => self.unsettled.remove(&partition),
        };
        let version = self.next_version(partition);
        self.locals[at].announced = Announced { version, seen, complete };
        self.moved.insert(partition);
    }

    /// Whether a round has begun that the next poll goes on with.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.snapshot.as_ref().is_some_and(|snapshot| snapshot.has_begun)
            || !self.moved.is_empty()
            || self.peers.values().any(|peer| peer.has_more)
    }

    /// A version for the next change of a partition, whose last one is forgotten.
    fn next_version(&mut self, partition: PartitionId) -> u64 {
        if let Some(local) = self.local(partition) {
            let before = local.announced.version;
            self.changes.remove(&before);
        }
        self.version += 1;
        self.changes.insert(self.version, partition);
        self.version
    }

    /// Tells everybody again about a partition: somebody new listens.
    pub(super) fn repeat(&mut self, partition: PartitionId) {
        if self.local(partition).is_some_and(|local| local.announced.version > 0) {
            let version = self.next_version(partition);
            self.local_mut(partition).expect("just seen").announced.version = version;
        }
    }

    /// Whether the node is told about the partition: holders by everybody, guests by holders, and
    /// whoever coordinated something in it, so that he learns what of it was not lost.
    fn is_told(&self, to: PeerShard, partition: PartitionId) -> bool {
        let Some(local) = self.local(partition) else { return false };
        self.peer_shard(to.node, partition) == Some(to)
            && (local.holders.contains(&to.node)
                || (local.holders.contains(&self.own) && self.entry(to.node, partition).is_some())
                || local.announced.seen.last(origin_of(to.node)) > 0)
    }

    fn announce_to(
        &mut self,
        to: PeerShard,
        now: Instant,
        out: &mut impl FnMut(PeerShard, &PeerMessage<'_>) -> bool,
    ) {
        let options = self.options;
        let Some(peer) = self.peers.get_mut(&to) else { return };
        let quiet = peer.sent_at.map_or(u64::MAX, |at| now.nanos_since(at));
        if peer.acked == peer.sent {
            peer.waiting_since = now;
        } else if now.nanos_since(peer.waiting_since) >= options.repeat_after {
            (peer.sent, peer.waiting_since) = (peer.acked, now);
        }
        // What a round changes is told at once, when all of it is known.
        let is_complete = self.snapshot.as_ref().is_none_or(|snapshot| !snapshot.has_begun);
        let is_due = std::mem::take(&mut peer.has_more)
            || quiet >= options.heartbeat_every
            || (is_complete
                && peer.sent != self.version
                && quiet >= options.announce_every.min(options.repeat_after));
        let (true, Some(told)) = (is_due, self.told) else { return };
        peer.sent_at = Some(now);
        let base_version = peer.sent;
        let mut sets = Vec::new();
        let mut lines: Vec<(PartitionId, Timestamp, usize, usize)> = Vec::new();
        let mut version = self.version;
        let mut is_last = true;
        let after = (Bound::Excluded(base_version), Bound::Unbounded);
        for (number, partition) in self.changes.range(after) {
            if !self.is_told(to, *partition) {
                continue;
            }
            let announced = &self.local(*partition).expect("of this shard").announced;
            let begin = sets.len();
            announced.seen.encode_within(&mut sets, options.message_size_max / 2);
            let size = sets.len() + (lines.len() + 4) * ENTRY_SIZE;
            let is_full = size > options.message_size_max && !lines.is_empty();
            if is_full || lines.len() >= PARTITIONS_AT_ONCE {
                sets.truncate(begin);
                // All before this one; the next message goes on with it.
                (version, is_last) = (number - 1, false);
                break;
            }
            lines.push((*partition, announced.complete, begin, sets.len()));
        }
        let line = |line: &(PartitionId, Timestamp, usize, usize)| TrackEntry {
            partition: line.0,
            as_of: line.1,
            seen: &sets[line.2..line.3],
        };
        let of_round = |stamp| if is_last { stamp } else { Timestamp::ZERO };
        let message = PeerMessage::Track {
            base_version,
            version,
            hlc: of_round(told.clock),
            hint_floor: of_round(told.promise),
            epoch: if is_last { told.epoch } else { 0 },
            entries: lines.iter().map(line).collect(),
            full: base_version == 0,
        };
        if out(to, &message)
            && let Some(peer) = self.peers.get_mut(&to)
        {
            (peer.sent, peer.has_more) = (version, !is_last);
        }
    }

    /// Takes a `Track` or `TrackDone` in. Other messages are none of its business.
    ///
    /// # Errors
    /// [`BadTrack`]; the message was not taken in, and is not answered.
    pub fn handle(
        &mut self,
        now: Instant,
        from: PeerShard,
        message: &PeerMessage<'_>,
        replica: &impl Replica,
        out: &mut impl FnMut(PeerShard, &PeerMessage<'_>) -> bool,
    ) -> Result<(), BadTrack> {
        if !self.peers.contains_key(&from) {
            return Err(BadTrack::Stranger(from));
        }
        match message {
            PeerMessage::Track { base_version, version, hlc, hint_floor, epoch, entries, full } => {
                let entries = self.read_entries(from, entries)?;
                let base = if *full { 0 } else { *base_version };
                let Some(has) = self.take_round(now, from, base, *version, entries, replica) else {
                    return Ok(());
                };
                let peer = self.peers.get_mut(&from).ok_or(BadTrack::Stranger(from))?;
                if has == *version {
                    // Zero in all but the last message of a round.
                    peer.clock = peer.clock.max(*hlc);
                    peer.promise = peer.promise.max(*hint_floor);
                    if *epoch > peer.epoch {
                        peer.epoch = *epoch;
                        // Completeness may wait for it.
                        self.dirty.extend(self.unsettled.iter().copied());
                    }
                }
                out(from, &PeerMessage::TrackDone { version: has, hlc: replica.clock() });
            }
            PeerMessage::TrackDone { version, hlc } => {
                let life = life_of(self.version);
                let peer = self.peers.get_mut(&from).ok_or(BadTrack::Stranger(from))?;
                // Zero is a peer that has nothing of this life yet. An answer from before a later
                // one only makes some of it travel again.
                if *version == 0 || (life_of(*version) == life && *version <= self.version) {
                    if *version < peer.acked {
                        peer.sent = *version;
                    }
                    if *version > peer.acked {
                        peer.waiting_since = now;
                    }
                    peer.acked = *version;
                    peer.sent = peer.sent.max(*version);
                }
                if life_of(*version) == life && *version > 0 {
                    peer.knows_us_since.get_or_insert(*hlc);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn read_entries(
        &self,
        from: PeerShard,
        entries: &[TrackEntry<'_>],
    ) -> Result<Vec<(PartitionId, Entry)>, BadTrack> {
        let read = |entry: &TrackEntry<'_>| {
            if self.peer_shard(from.node, entry.partition) != Some(from)
                || self.place(entry.partition).is_none()
            {
                return Err(BadTrack::Partition(entry.partition));
            }
            let seen = Rc::new(SeenSet::decode(entry.seen)?);
            Ok((entry.partition, Entry { complete: entry.as_of, seen }))
        };
        entries.iter().map(read).collect()
    }

    /// Whether the message tells of a life of the peer that was not known: it may have forgotten
    /// what it said before.
    #[must_use]
    pub fn begins_life(&self, from: PeerShard, message: &PeerMessage<'_>) -> bool {
        let PeerMessage::Track { version, .. } = message else { return false };
        self.peers.get(&from).is_some_and(|peer| life_of(*version) > peer.life)
    }

    /// Takes in the lines if they follow on what is here. Gives the version that is here now, or
    /// `None` if the message is from before the peer's last start.
    fn take_round(
        &mut self,
        now: Instant,
        from: PeerShard,
        base_version: u64,
        version: u64,
        entries: Vec<(PartitionId, Entry)>,
        replica: &impl Replica,
    ) -> Option<u64> {
        self.heard += 1;
        let peer = self.peers.get_mut(&from)?;
        if life_of(version) < peer.life {
            return None;
        }
        if life_of(version) > peer.life {
            // It has started again: it has forgotten what it was told, and may have to say less
            // than before.
            let forgotten = std::mem::take(peer);
            peer.life = life_of(version);
            self.moved.extend(forgotten.entries.into_keys());
        }
        if base_version > peer.version {
            return Some(peer.version);
        }
        if version > peer.version {
            peer.version = version;
            for (partition, entry) in entries {
                self.take_entry(now, from, partition, entry, replica);
            }
        }
        self.peers.get(&from).map(|peer| peer.version)
    }

    fn take_entry(
        &mut self,
        now: Instant,
        from: PeerShard,
        partition: PartitionId,
        entry: Entry,
        replica: &impl Replica,
    ) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        self.moved.insert(partition);
        // Completeness may follow from it.
        self.dirty.insert(partition);
        if entry.seen.is_empty() {
            // A guest that has handed everything over.
            peer.entries.remove(&partition);
            return;
        }
        let seen = Rc::clone(&entry.seen);
        let is_new = peer.entries.insert(partition, entry).is_none();
        let is_holder = self.local(partition).is_some_and(|l| l.holders.contains(&from.node));
        if is_new && !is_holder {
            self.repeat(partition);
        }
        self.note_behind(now, partition, &seen, replica);
    }
}
