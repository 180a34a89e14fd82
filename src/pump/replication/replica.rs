//! What this shard does for coordinators on other nodes: it merges their writes, shows what it
//! has, and carries out requests that were handed on to it.
//!
//! Invariant: nothing of a peer is believed unchecked (token, partition, sizes, stamp); a write
//! is acknowledged only when it is visible here, which in `sync` mode means durable; a range that
//! is damaged is answered as unknown, never as absent.

use annulus_cluster::coordinator::read::digest;
use annulus_cluster::message::{PeerMessage, ReadResult, Reason, Want, WriteResult, check_record};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::model::{
    Instant, Kind, NamespaceId, Record, RecordRef, Timestamp, Token, VersionVector,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Applied, Found, MergedIn, Probe, Shard};
use annulus_net::wire::codec::Reader;
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::operation::Operation;
use annulus_net::wire::response::Failure;
use annulus_net::wire::scan::Scan;
use annulus_net::wire::status::Status;

use super::standin::{Guest, NoRoom};
use crate::namespaces::Mode;
use crate::pump::execute::failure_of;
use crate::pump::writes::Waiting;
use crate::pump::{Answer, Done, Lane, Origin, Pump, TASKS_MAX, Wires};

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// A message from a shard of another node.
    pub fn peer_message(&mut self, from: PeerShard, bytes: &[u8], wires: &mut dyn Wires) {
        let message = match PeerMessage::decode(bytes) {
            Ok(message) if self.replication.is_some() => message,
            Ok(_) => return,
            Err(malformed) => {
                self.metrics.borrow_mut().counters.peer_refused += 1;
                tracing::warn!(node = from.node.0, %malformed, "a peer's message was refused");
                return;
            }
        };
        self.metrics.borrow_mut().counters.peer_messages += 1;
        let is_member =
            |pump: &Self| pump.topology().is_some_and(|it| it.node(from.node).is_some());
        if !is_member(self) {
            // It learns the map that it is not in from the settings, or this node the one with it.
            return match message {
                PeerMessage::Settings { .. } => self.exchange(from, &message, bytes),
                _ => self.correct(from),
            };
        }
        match message {
            PeerMessage::Write { id, epoch, record, .. } if self.is_fenced(epoch, record.token) => {
                if id != 0 {
                    let result = WriteResult::Refused(Status::UNAVAILABLE.0, Reason::Epoch);
                    self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
                }
                self.correct(from);
            }
            PeerMessage::Read { id, epoch, token, .. } if self.is_fenced(epoch, token) => {
                let result = ReadResult::Refused(Status::UNAVAILABLE.0);
                self.post(from, Lane::Foreground, &PeerMessage::ReadDone { id, result });
                self.correct(from);
            }
            PeerMessage::Write { id, deadline_us, record, .. } => {
                self.replica_write(from, id, self.deadline_in(deadline_us), &record);
            }
            PeerMessage::Read { id, token, namespace, key, want, .. } => {
                self.replica_read(from, id, (token, namespace, key), want);
            }
            PeerMessage::Forward { id, deadline_us, opcode, hops, body } => {
                let deadline = self.deadline_in(deadline_us);
                self.carry_out_forwarded((from, id), deadline, (opcode, hops), body, wires);
            }
            PeerMessage::WriteDone { id, result } => self.write_done(from.node, id, result),
            PeerMessage::ReadDone { id, result } => self.read_done(from.node, id, &result),
            PeerMessage::ForwardDone { id, status, body } => {
                self.forward_done(id, status, body, wires);
            }
            PeerMessage::Probe { .. }
            | PeerMessage::ProbeDone { .. }
            | PeerMessage::ProbeFor { .. }
            | PeerMessage::ProbeForDone { .. }
            | PeerMessage::Gossip { .. } => self.hear_gossip(from, &message),
            PeerMessage::Prepare { .. } | PeerMessage::Accept { .. } => self.vote(from, bytes),
            answer @ (PeerMessage::Promise { .. } | PeerMessage::Accepted { .. }) => {
                self.holder_answered(from.node, answer);
            }
            PeerMessage::Room { is_left } => self.take_room(from, is_left),
            PeerMessage::Moving { .. } => self.hear_moving(from, &message),
            background => self.exchange(from, &background, bytes),
        }
    }

    /// Whether a request comes of a map that is too old.
    #[inline]
    fn is_fenced(&self, epoch: u32, token: Token) -> bool {
        let Some(replication) = &self.replication else { return false };
        replication.is_fenced(epoch, token.partition(self.map.partition_bits()))
    }

    fn deadline_in(&self, micros: u32) -> Instant {
        self.now.after_nanos(u64::from(micros) * 1000)
    }

    /// Queues a message for a shard of another node.
    pub(in crate::pump) fn post(&mut self, to: PeerShard, lane: Lane, message: &PeerMessage<'_>) {
        if let Some(replication) = &mut self.replication {
            replication.post(to, lane, message);
        }
    }

    pub(in crate::pump) fn post_bytes(&mut self, to: PeerShard, lane: Lane, bytes: Vec<u8>) {
        if let Some(replication) = &mut self.replication {
            replication.post_bytes(to, lane, bytes);
        }
    }

    pub(super) fn count_peer_refusal(&mut self, from: PeerShard) {
        tracing::warn!(node = from.node.0, "a peer's request was refused");
        self.metrics.borrow_mut().counters.peer_refused += 1;
    }

    /// What a coordinator is told of its write.
    pub(in crate::pump) fn answer_replica(
        &mut self,
        from: PeerShard,
        id: u64,
        answer: &Answer<'_>,
    ) {
        match answer {
            Answer::Failure(failure) => {
                let result = WriteResult::Refused(failure.status.0, Reason::Status);
                self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
            }
            _ => self.acknowledge(from, id),
        }
    }

    /// Merges a coordinator's write. `id` 0: nobody waits for an answer.
    fn replica_write(
        &mut self,
        from: PeerShard,
        id: u64,
        deadline: Instant,
        record: &RecordRef<'_>,
    ) {
        let origin = (id != 0).then_some(Origin::Replica { from, id });
        let mode = match self.check_peer_record(record) {
            Ok(mode) => mode,
            Err((status, reason)) => return self.refuse_peer(from, id, status, reason),
        };
        let Some(replication) = &mut self.replication else { return };
        match replication.admit_copy(record) {
            Ok(guest) => self.merge(mode, origin, deadline, record, guest),
            Err(NoRoom) if id != 0 => {
                let result = WriteResult::Refused(Status::FULL.0, Reason::Status);
                self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
            }
            // Read repair: the homes have it, or get it from whoever has.
            Err(NoRoom) => {}
        }
    }

    fn merge(
        &mut self,
        mode: Mode,
        origin: Option<Origin>,
        deadline: Instant,
        record: &RecordRef<'_>,
        guest: Option<Guest>,
    ) {
        if mode == Mode::Siblings || record.kind == Kind::Siblings {
            return self.merge_state(origin, record, guest);
        }
        self.merge_blind(origin, deadline, record, guest);
    }

    /// Checks a record that came from a peer; gives the mode of its namespace.
    pub(super) fn check_peer_record(
        &self,
        record: &RecordRef<'_>,
    ) -> Result<Mode, (Status, Reason)> {
        let welcome = &self.facts.welcome;
        let bits = u32::from(welcome.partition_bits);
        let partition = check_record(record, welcome.hash_seed, bits, self.wall)
            .map_err(|reason| (Status::BAD_REQUEST, reason))?;
        if self.map.shard_of_partition(partition.0) != self.map.own() {
            return Err((Status::BAD_REQUEST, Reason::Shard));
        }
        match self.catalogue.get(record.namespace) {
            Some(namespace) => Ok(namespace.mode),
            None => Err((Status::NO_NAMESPACE, Reason::Namespace)),
        }
    }

    fn refuse_peer(&mut self, from: PeerShard, id: u64, status: Status, reason: Reason) {
        self.metrics.borrow_mut().counters.peer_refused += 1;
        tracing::warn!(node = from.node.0, ?reason, "a peer's record was refused");
        if id != 0 {
            let result = WriteResult::Refused(status.0, reason);
            self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
        }
    }

    /// Merges what a read found elsewhere and lacked here.
    pub(super) fn merge_here(&mut self, record: &RecordRef<'_>) {
        let Ok(mode) = self.check_peer_record(record) else { return };
        let Some(replication) = &mut self.replication else { return };
        if let Ok(guest) = replication.admit_copy(record) {
            self.merge(mode, None, self.now, record, guest);
        }
    }

    fn merge_blind(
        &mut self,
        origin: Option<Origin>,
        deadline: Instant,
        record: &RecordRef<'_>,
        guest: Option<Guest>,
    ) {
        let bytes = record.key.len() + record.value.len();
        match self.shard.merge_in(record, self.wall) {
            Ok(MergedIn::Applied(lsn)) => {
                if let Some(replication) = &mut self.replication {
                    replication.keep_guest(guest);
                }
                let applied = Applied { lsn, timestamp: record.timestamp, dot: record.dot };
                self.writes.push(Waiting {
                    applied,
                    deadline,
                    not_before: self.now,
                    began: self.now,
                    bytes,
                    is_put: record.kind == Kind::Put,
                    origin,
                    trace: false,
                });
            }
            Ok(MergedIn::Duplicate) => {
                if let Some(Origin::Replica { from, id }) = origin {
                    self.acknowledge(from, id);
                }
            }
            Err(error) => {
                if let Some(Origin::Replica { from, id }) = origin {
                    self.refuse_write(from, id, &error);
                }
            }
        }
    }

    fn merge_state(
        &mut self,
        origin: Option<Origin>,
        record: &RecordRef<'_>,
        guest: Option<Guest>,
    ) {
        if self.tasks.len() < TASKS_MAX
            && let Some(replication) = &mut self.replication
        {
            replication.keep_guest(guest);
        }
        let Some(Origin::Replica { from, id }) = origin else {
            // Read repair: whether it succeeds, the next announcement tells.
            let (shard, record) = (self.shard.clone(), record.to_owned());
            let token = self.replication.as_ref().map(|replication| replication.merge_token());
            self.spawn(async move {
                let merged = shard.merge_in_state(&record.as_ref()).await;
                drop(token);
                Done::Merged { origin: None, merged: merged.map(drop) }
            });
            return;
        };
        if self.tasks.len() >= TASKS_MAX {
            let result = WriteResult::Refused(Status::BUSY.0, Reason::Status);
            return self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
        }
        let (shard, record) = (self.shard.clone(), record.to_owned());
        let token = self.replication.as_ref().map(|replication| replication.merge_token());
        self.spawn(async move {
            let merged = match shard.merge_in_state(&record.as_ref()).await {
                Ok(MergedIn::Applied(lsn)) => shard.wait_visible(lsn).await,
                Ok(MergedIn::Duplicate) => Ok(()),
                Err(error) => Err(error),
            };
            drop(token);
            Done::Merged { origin: Some((from, id)), merged }
        });
    }

    /// The write is here, as durable as this shard makes writes.
    pub(in crate::pump) fn acknowledge(&mut self, from: PeerShard, id: u64) {
        let result = match self.shard.durability_window_ms() {
            0 => WriteResult::Durable,
            window => WriteResult::Accepted(window),
        };
        self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
    }

    /// The write is not here.
    pub(in crate::pump) fn refuse_write(&mut self, from: PeerShard, id: u64, error: &Error) {
        let status = failure_of(error, "").status;
        let result = WriteResult::Refused(status.0, Reason::Status);
        self.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
    }

    fn replica_read(
        &mut self,
        from: PeerShard,
        id: u64,
        (token, namespace, key): (Token, NamespaceId, &[u8]),
        want: Want,
    ) {
        let partition = token.partition(self.map.partition_bits());
        let (as_of, is_primary) = self.standing(partition, namespace);
        let mut bytes = Vec::new();
        let shard = &self.shard;
        let probe = shard.probe(token, namespace, key, |found| {
            let found = found.map(|record| shown(shard, &record));
            let record = found.as_ref().map(Shown::as_ref);
            let result = read_result(record.as_ref(), want, as_of, is_primary);
            PeerMessage::ReadDone { id, result }.encode(&mut bytes);
        });
        match probe {
            Probe::Done(()) => self.post_bytes(from, Lane::Foreground, bytes),
            Probe::Pending(_) if self.tasks.len() >= TASKS_MAX => {
                let result = ReadResult::Refused(Status::BUSY.0);
                self.post(from, Lane::Foreground, &PeerMessage::ReadDone { id, result });
            }
            Probe::Pending(read) => {
                let (shard, base) = (self.shard.clone(), self.shard.base(token));
                self.spawn(async move {
                    let found = read.finish(&shard).await;
                    Done::ReplicaRead { from, id, want, as_of, is_primary, base, found }
                });
            }
        }
    }

    /// A read for another node has come from the disk.
    pub(in crate::pump) fn finish_replica_read(
        &mut self,
        from: PeerShard,
        id: u64,
        want: Want,
        (as_of, is_primary): (Timestamp, bool),
        base: &VersionVector,
        found: Result<Found, Error>,
    ) {
        let shard = self.shard.clone();
        let record = match &found {
            Ok(found) => found.record().map(|record| shown_by(&shard, base, &record)),
            Err(_) => None,
        };
        let record = record.as_ref().map(Shown::as_ref);
        let result = match &found {
            Ok(_) => read_result(record.as_ref(), want, as_of, is_primary),
            Err(Error::Corrupt { .. }) => ReadResult::Unknown,
            Err(error) => ReadResult::Refused(failure_of(error, "").status.0),
        };
        self.post(from, Lane::Foreground, &PeerMessage::ReadDone { id, result });
    }

    fn carry_out_forwarded(
        &mut self,
        (from, id): (PeerShard, u64),
        deadline: Instant,
        (opcode, hops): (u8, u8),
        body: &[u8],
        wires: &mut dyn Wires,
    ) {
        let origin = Origin::Forward { from, id };
        let context = self.facts.decode_context();
        let refusal = match Opcode::from_u8(opcode) {
            Some(Opcode::Scan) => match Scan::decode(body) {
                Ok(scan) if self.map.shard_of(scan.range.first) != self.map.own() => {
                    let failure = Failure::new(Status::UNAVAILABLE, "that is on another shard");
                    return self.answer(origin, &Answer::Failure(failure), wires);
                }
                Ok(scan) => return self.start_scan(origin, deadline, hops, &scan),
                Err(refusal) => refusal,
            },
            Some(Opcode::Get | Opcode::Put | Opcode::Delete) => {
                match Operation::decode(&mut Reader::new(body), &context) {
                    Ok(operation) => {
                        return self.execute_forwarded((from, id), deadline, hops, &operation);
                    }
                    Err(refusal) => refusal,
                }
            }
            Some(Opcode::Admin) => return self.admin_of_member(origin, from, body, wires),
            _ => return self.answer_unsupported(origin, wires),
        };
        self.answer(origin, &Answer::Failure(refusal.into()), wires);
    }

    fn answer_unsupported(&mut self, origin: Origin, wires: &mut dyn Wires) {
        let failure = Failure::new(Status::UNSUPPORTED, "not handed on between nodes");
        self.answer(origin, &Answer::Failure(failure), wires);
    }
}

/// A record as others may see it: a key state with all that its partition implies.
pub(super) enum Shown<'a> {
    Plain(RecordRef<'a>),
    Filled(Record),
}

impl Shown<'_> {
    pub(super) fn as_ref(&self) -> RecordRef<'_> {
        match self {
            Shown::Plain(record) => *record,
            Shown::Filled(record) => record.as_ref(),
        }
    }
}

/// A record that is read in this moment.
pub(super) fn shown<'a, D: Disk, R: Runtime>(
    shard: &Shard<D, R>,
    record: &RecordRef<'a>,
) -> Shown<'a> {
    if record.kind != Kind::Siblings {
        return Shown::Plain(*record);
    }
    shown_by(shard, &shard.base(record.token), record)
}

/// A record that was read after `base` was taken.
pub(super) fn shown_by<'a, D: Disk, R: Runtime>(
    shard: &Shard<D, R>,
    base: &VersionVector,
    record: &RecordRef<'a>,
) -> Shown<'a> {
    if record.kind != Kind::Siblings {
        return Shown::Plain(*record);
    }
    // One that cannot be decoded goes as it is, and is refused by whoever gets it.
    let owned = record.to_owned();
    Shown::Filled(shard.filled_by(&owned, base).unwrap_or(owned))
}

fn read_result<'a>(
    found: Option<&RecordRef<'a>>,
    want: Want,
    as_of: Timestamp,
    is_primary: bool,
) -> ReadResult<'a> {
    match want {
        Want::Full => ReadResult::Full { as_of, is_primary, record: found.copied() },
        Want::Digest => match found.map_or(Ok(0), digest) {
            Ok(digest) => ReadResult::Digest { as_of, is_primary, digest },
            Err(_) => ReadResult::Unknown,
        },
    }
}
