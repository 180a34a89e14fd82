//! This shard as a home of keys that are registers: it promises, shows and accepts.
//!
//! Invariant: a promise is told when a ceiling on disk is above it and everything that the log had
//! taken of the key before it is in what is shown; a record is accepted only under the promise that
//! was told last, and told when it is durable. Who has not caught up since it lost its disk, or does
//! not know what it holds, says nothing.

use annulus_cluster::keys::{Head, Shown, value};
use annulus_cluster::message::{KeyAsk, KeyResult, PeerMessage, Reason, Want, WriteResult};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::model::{Record, RecordRef, Timestamp, Token};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Applied, Probe};
use annulus_net::wire::status::Status;

use crate::namespaces::Mode;
use crate::pump::execute::failure_of;
use crate::pump::writes::Waiting;
use crate::pump::{Done, Lane, Origin, Pump, TASKS_MAX};

/// A key that was read for a proposer.
#[derive(Debug)]
pub(in crate::pump) struct KeyRead {
    /// Another node, or this shard itself.
    from: Option<PeerShard>,
    id: u64,
    /// Of the map that it was asked by.
    epoch: u32,
    ballot: Timestamp,
    token: Token,
    want: Want,
    found: Result<Option<Record>, Error>,
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// A proposer asks; `None`: this shard's own, operation `id`.
    pub(in crate::pump::replication) fn answer_ask(
        &mut self,
        from: Option<PeerShard>,
        id: u64,
        epoch: u32,
        ask: &KeyAsk<'_>,
    ) {
        let KeyAsk { ballot, token, namespace, key, want } = *ask;
        let refuse = |pump: &mut Self, status: Status| {
            pump.tell_proposer(from, id, ballot, &KeyResult::Refused(status.0));
        };
        let partition = token.partition(self.map.partition_bits());
        let Some(replication) = &self.replication else { return };
        let is_home = self.catalogue.get(namespace).is_some_and(|namespace| {
            namespace.mode == Mode::Linearizable
                && replication.topology.is_home_of(
                    partition,
                    namespace.n,
                    replication.topology.own(),
                )
        });
        let is_own = self.map.shard_of_partition(partition.0) == self.map.own();
        let is_token = token == Token::of_key(key, self.facts.welcome.hash_seed)
            || Token::of_hashed_key(key) == Some(token);
        if !is_home || !is_own || !is_token {
            self.metrics.borrow_mut().counters.peer_refused += 1;
            return refuse(self, Status::BAD_REQUEST);
        }
        if self.is_fenced(epoch, token) {
            if let Some(from) = from {
                self.correct(from);
            }
            return refuse(self, Status::UNAVAILABLE);
        }
        let may_vote = self.shard.is_founded(partition) && self.shard.durability_window_ms() == 0;
        if !may_vote {
            return refuse(self, Status::UNAVAILABLE);
        }
        let mut ceiling = None;
        if ballot > Timestamp::ZERO {
            let promised = replication.keys.promises.borrow_mut().ask(token, ballot);
            if let Err(seen) = promised {
                return self.tell_proposer(from, id, ballot, &KeyResult::Conflict(seen));
            }
            ceiling = match self.shard.ceiling_above(ballot, self.wall) {
                Ok(ceiling) => ceiling,
                Err(error) => return refuse(self, failure_of(&error, "").status),
            };
        }
        let is_settled = ballot == Timestamp::ZERO || !self.shard.is_settling(token);
        let shard = self.shard.clone();
        if ceiling.is_none() && is_settled {
            let mut found = None;
            let probe = shard.probe(token, namespace, key, |record| {
                // What lies here is needed by its proposer, and a head has no value.
                let record = record.map(|record| record.to_owned());
                found = Some(record);
            });
            match (probe, found) {
                (Probe::Done(()), Some(found)) => {
                    let found = Ok(found);
                    return self.key_read(KeyRead { from, id, epoch, ballot, token, want, found });
                }
                (Probe::Pending(read), _) if ballot == Timestamp::ZERO => {
                    if self.tasks.len() >= TASKS_MAX {
                        return refuse(self, Status::BUSY);
                    }
                    return self.spawn(async move {
                        let found = read.finish(&shard).await;
                        let found = found.map(|found| found.record().map(|it| it.to_owned()));
                        Done::KeyRead(KeyRead { from, id, epoch, ballot, token, want, found })
                    });
                }
                _ => {}
            }
        }
        if self.tasks.len() >= TASKS_MAX {
            return refuse(self, Status::BUSY);
        }
        let key = key.to_vec();
        self.spawn(async move {
            let found = async {
                if let Some(ceiling) = ceiling {
                    shard.wait_durable(ceiling).await?;
                }
                shard.get_taken(token, namespace, &key).await
            };
            let found = found.await;
            Done::KeyRead(KeyRead { from, id, epoch, ballot, token, want, found })
        });
    }

    /// A key was read: its proposer is answered.
    pub(in crate::pump) fn key_read(&mut self, read: KeyRead) {
        let KeyRead { from, id, epoch, ballot, token, want, found } = read;
        if self.is_fenced(epoch, token) {
            let refused = KeyResult::Refused(Status::UNAVAILABLE.0);
            return self.tell_proposer(from, id, ballot, &refused);
        }
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let status = failure_of(&error, "").status;
                if matches!(error, Error::Corrupt { .. }) {
                    self.look_for_damage();
                }
                return self.tell_proposer(from, id, ballot, &KeyResult::Refused(status.0));
            }
        };
        let Some(replication) = &self.replication else { return };
        let mut promises = replication.keys.promises.borrow_mut();
        let purged = promises.purged_of(token);
        if ballot > Timestamp::ZERO {
            let seen = found.as_ref().map_or(Timestamp::ZERO, |record| record.timestamp);
            if seen >= ballot || !promises.grant(token, ballot) {
                drop(promises);
                let seen = seen.max(ballot);
                return self.tell_proposer(from, id, ballot, &KeyResult::Conflict(seen));
            }
        }
        drop(promises);
        let record = found.as_ref().map(Record::as_ref);
        let Some(from) = from else {
            let shown = Shown { purged, head: record.as_ref().map(Head::of) };
            let Some(own) = self.replication.as_ref().map(|it| it.topology.own()) else { return };
            return self.key_shown(own, id, ballot, shown, Some(found));
        };
        let result = match want {
            Want::Full => KeyResult::Whole { purged, record },
            Want::Digest => KeyResult::Head(Shown { purged, head: record.as_ref().map(Head::of) }),
        };
        self.post(from, Lane::Foreground, &PeerMessage::KeySaid { id, ballot, result });
    }

    fn tell_proposer(
        &mut self,
        from: Option<PeerShard>,
        id: u64,
        ballot: Timestamp,
        result: &KeyResult<'_>,
    ) {
        match from {
            Some(from) => {
                let said = PeerMessage::KeySaid { id, ballot, result: *result };
                self.post(from, Lane::Foreground, &said);
            }
            None => {
                let Some(own) = self.replication.as_ref().map(|it| it.topology.own()) else {
                    return;
                };
                self.key_said(own, id, ballot, result);
            }
        }
    }

    /// A home has answered.
    pub(in crate::pump::replication) fn key_said(
        &mut self,
        from: annulus_cluster::NodeId,
        id: u64,
        ballot: Timestamp,
        result: &KeyResult<'_>,
    ) {
        let moment = self.moment();
        match result {
            KeyResult::Head(shown) => self.key_shown(from, id, ballot, *shown, None),
            KeyResult::Whole { purged, record } => {
                let Some(replication) = &self.replication else { return };
                let Some(operation) = replication.keys.operations.get(&id) else { return };
                let is_of_key = record.is_none_or(|record| {
                    record.token == operation.token
                        && record.namespace == operation.namespace
                        && record.key == operation.key.as_slice()
                        && value::is_valid(&record)
                });
                if !is_of_key {
                    self.metrics.borrow_mut().counters.peer_refused += 1;
                    return self.home_failed(from, id);
                }
                let shown = Shown { purged: *purged, head: record.as_ref().map(Head::of) };
                let whole = record.map(|record| record.to_owned());
                self.key_shown(from, id, ballot, shown, Some(whole));
            }
            KeyResult::Conflict(seen) => {
                let Some(replication) = &mut self.replication else { return };
                let (keys, seen) = (&mut replication.keys, *seen);
                keys.tell(id, |machine, out| machine.refused(moment, from, ballot, seen, out));
            }
            KeyResult::Refused(_) => self.home_failed(from, id),
        }
    }

    /// A proposer wants a record accepted.
    pub(in crate::pump::replication) fn accept_record(
        &mut self,
        from: PeerShard,
        id: u64,
        epoch: u32,
        record: &RecordRef<'_>,
    ) {
        let refuse = |pump: &mut Self, status: Status, reason| {
            let result = WriteResult::Refused(status.0, reason);
            pump.post(from, Lane::Foreground, &PeerMessage::WriteDone { id, result });
        };
        if self.is_fenced(epoch, record.token) {
            self.correct(from);
            return refuse(self, Status::UNAVAILABLE, Reason::Epoch);
        }
        match self.check_peer_record(record) {
            Ok(Mode::Linearizable) if value::is_valid(record) => {}
            Ok(_) => {
                self.metrics.borrow_mut().counters.peer_refused += 1;
                return refuse(self, Status::BAD_REQUEST, Reason::Status);
            }
            Err((status, reason)) => {
                self.metrics.borrow_mut().counters.peer_refused += 1;
                return refuse(self, status, reason);
            }
        }
        let Some(replication) = &self.replication else { return };
        let promises = std::rc::Rc::clone(&replication.keys.promises);
        if !promises.borrow().accepts(record.token, record.timestamp) {
            return refuse(self, Status::CONDITION_FALSE, Reason::Status);
        }
        let lsn = match self.shard.merge_again(record, self.wall) {
            Ok(lsn) => lsn,
            Err(error) => return self.refuse_write(from, id, &error),
        };
        promises.borrow_mut().merged(record.token, record.timestamp);
        self.writes.push(Waiting {
            applied: Applied { lsn, timestamp: record.timestamp, dot: record.dot },
            deadline: annulus_engine::model::Instant(u64::MAX),
            not_before: self.now,
            began: self.now,
            bytes: record.key.len() + record.value.len(),
            is_put: record.kind == annulus_engine::model::Kind::Put,
            origin: Some(Origin::Replica { from, id }),
            trace: false,
        });
    }
}
