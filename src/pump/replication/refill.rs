//! Refill: what a damaged block or a lost table held is fetched again from another replica.
//!
//! ```text
//! Sync{nothing seen, from the range's first token}  ->   a replica that has seen all that we had
//!                                                   <-   SyncPage: all its records there
//! what is new or missing is merged again; what only this replica has and the other has seen was
//! replaced or deleted there: perhaps by a record that was lost here, so it is deleted
//! after the last page the range is declared whole
//! ```
//!
//! Invariant: until then reads of the range fail here and are answered by others; "absent" is
//! never said. While a refill is under way the partition's purge floor stays where it is, so what
//! was deleted in the meantime still hides what an older page brings back.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use annulus_cluster::NodeId;
use annulus_cluster::message::PeerMessage;
use annulus_cluster::tracking::{Floor, PeerShard};
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::log::Lsn;
use annulus_engine::model::causality::KeyState;
use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{
    Dot, Instant, Kind, NamespaceId, PartitionId, Record, RecordRef, Timestamp, Token, TokenRange,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{MergedIn, ScanRequest, Shard};

use super::keys::LateRecords;
use crate::namespaces::Mode;
use crate::pump::{Done, Lane, Pump};

/// Marks the ids of refills among those of `SyncPage`.
const REFILL_ID: u64 = 1 << 62;
/// About how large a page is, in bytes.
const PAGE_BYTES: u32 = 256 << 10;
/// A page that has not come by then will not, in nanoseconds.
const PAGE_TIMEOUT_NANOS: u64 = 10_000_000_000;
/// How often damage is looked for, in nanoseconds.
const LOOK_NANOS: u64 = 1_000_000_000;
/// Pause of a merge that memory refuses, in nanoseconds.
const BUSY_PAUSE_NANOS: u64 = 5_000_000;

/// How often a register is looked at that has to be settled before it can be filled.
const REGISTER_TRIES_MAX: u32 = 400;

/// Where a page begins: behind this key, if there is one.
type Place = (Token, Option<(NamespaceId, Vec<u8>)>);

/// One range that is being filled.
#[derive(Debug)]
struct Filling {
    id: u64,
    partition: PartitionId,
    range: TokenRange,
    helper: PeerShard,
    /// What had been seen here at the beginning: the helper must have seen it too.
    seen: Rc<SeenSet>,
    place: Place,
    deadline: Instant,
    merging: bool,
    records: u64,
    /// A purge floor that waits.
    floor: Option<Floor>,
}

/// The refills of one shard: one at a time.
#[derive(Debug)]
pub(super) struct Refill {
    filling: Option<Filling>,
    next_look: Instant,
    /// Counts attempts, so that ranges and helpers take turns.
    attempts: usize,
}

/// What merging a page came to.
#[derive(Debug)]
pub(in crate::pump) struct FilledPage {
    /// Records that were news.
    pub(in crate::pump) merged: u64,
    /// Where the next page begins, unless the range is done.
    pub(in crate::pump) next: Option<(Token, NamespaceId, Vec<u8>)>,
}

impl Refill {
    pub(super) fn new(now: Instant) -> Refill {
        Refill { filling: None, next_look: now, attempts: 0 }
    }

    /// Keeps a floor back if the partition is being filled.
    pub(super) fn hold(&mut self, floor: Floor) -> Option<Floor> {
        match &mut self.filling {
            Some(filling) if filling.partition == floor.partition => {
                filling.floor = Some(floor);
                None
            }
            _ => Some(floor),
        }
    }
}

/// Whether a `SyncPage` of this id belongs to a refill.
pub(super) fn is_refill_id(id: u64) -> bool {
    id >> 62 == REFILL_ID >> 62
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Damage was met just now.
    pub(super) fn look_for_damage(&mut self) {
        if let Some(replication) = &mut self.replication {
            replication.refill.next_look = self.now;
        }
    }

    /// Begins a refill if one is needed, and ends one whose page does not come.
    pub(super) fn refill_turn(&mut self) {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let refill = &mut replication.refill;
        if let Some(filling) = &refill.filling
            && !filling.merging
            && filling.deadline <= now
        {
            return self.end_refill(false);
        }
        if refill.filling.is_some() || now < refill.next_look {
            return;
        }
        refill.next_look = now.after_nanos(LOOK_NANOS);
        let unknown = self.shard.unknown_ranges();
        if !unknown.is_empty() {
            self.begin_refill(&unknown);
        }
    }

    fn begin_refill(&mut self, unknown: &[TokenRange]) {
        let bits = self.map.partition_bits();
        let Some(own) = self.replication.as_ref().map(|it| it.topology.own()) else { return };
        let parts: Vec<(PartitionId, TokenRange)> = self
            .own_partitions()
            // What is not held here is not missed.
            .filter(|partition| !self.namespaces_of(*partition, own).is_empty())
            .flat_map(|partition| {
                let whole = partition.range(bits);
                let met = unknown.iter().filter(move |range| range.overlaps(&whole));
                met.map(move |range| {
                    let (first, last) = (range.first.max(whole.first), range.last.min(whole.last));
                    (partition, TokenRange { first, last })
                })
            })
            .collect();
        let Some(replication) = &mut self.replication else { return };
        let attempt = replication.refill.attempts;
        replication.refill.attempts = attempt.wrapping_add(1);
        if parts.is_empty() {
            return;
        }
        let (partition, range) = parts[attempt % parts.len()];
        let Some(replication) = &self.replication else { return };
        let held = self.namespaces_of(partition, own);
        let may_help = |node: &NodeId| {
            let theirs = self.namespaces_of(partition, *node);
            *node != own
                && replication.peers.contains_key(node)
                && held.iter().all(|namespace| theirs.contains(namespace))
        };
        let helpers: Vec<NodeId> =
            replication.topology.holders(partition).into_iter().filter(may_help).collect();
        if held.is_empty() || helpers.is_empty() {
            return;
        }
        let helper = helpers[(attempt / parts.len()) % helpers.len()];
        let Some(helper) = replication.peer_shard(helper, partition) else { return };
        let seen = self.shard.seen(partition);
        let Some(replication) = &mut self.replication else { return };
        let id = REFILL_ID | replication.next_id();
        tracing::warn!(
            partition = partition.0,
            first = %range.first,
            last = %range.last,
            node = helper.node.0,
            "records that cannot be read are fetched from another replica"
        );
        replication.refill.filling = Some(Filling {
            id,
            partition,
            range,
            helper,
            seen,
            place: (range.first, None),
            deadline: self.now.after_nanos(PAGE_TIMEOUT_NANOS),
            merging: false,
            records: 0,
            floor: None,
        });
        self.ask_refill_page();
    }

    fn ask_refill_page(&mut self) {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let Some(filling) = &mut replication.refill.filling else { return };
        filling.deadline = now.after_nanos(PAGE_TIMEOUT_NANOS);
        let mut nothing = Vec::new();
        SeenSet::new().encode(&mut nothing);
        let (from, after) = &filling.place;
        let ask = PeerMessage::Sync {
            id: filling.id,
            partition: filling.partition,
            seen: &nothing,
            from: *from,
            after: after.as_ref().map(|(namespace, key)| (*namespace, key.as_slice())),
            bytes_max: PAGE_BYTES,
        };
        let mut bytes = Vec::new();
        ask.encode(&mut bytes);
        let helper = filling.helper;
        replication.post_bytes(helper, Lane::Background, bytes);
    }

    /// A page of the helper has come.
    pub(super) fn take_refill_page(
        &mut self,
        from: PeerShard,
        message: &PeerMessage<'_>,
        raw: &[u8],
    ) {
        let PeerMessage::SyncPage { id, records, next, seen, .. } = message else { return };
        let is_sound = records.iter().all(|record| self.check_peer_record(&record).is_ok());
        let Some(replication) = &self.replication else { return };
        let Some(filling) = &replication.refill.filling else { return };
        if filling.id != *id || filling.helper != from || filling.merging {
            return;
        }
        let their_seen = match SeenSet::decode(seen) {
            Ok(seen) if is_sound => seen,
            _ => {
                self.count_peer_refusal(from);
                return self.end_refill(false);
            }
        };
        // One that lacks something cannot tell what is missing here.
        if !their_seen.covers(&filling.seen) {
            return self.end_refill(false);
        }
        let held = self.namespaces_of(filling.partition, replication.topology.own());
        let modes: BTreeMap<NamespaceId, Mode> = self
            .catalogue
            .iter()
            .filter(|namespace| held.contains(&namespace.id))
            .map(|namespace| (namespace.id, namespace.mode))
            .collect();
        let next = next.map(|(token, namespace, key)| (token, namespace, key.to_vec()));
        let page = Page {
            late: replication.keys.late(),
            shard: self.shard.clone(),
            runtime: self.runtime.clone(),
            range: filling.range,
            place: filling.place.clone(),
            next,
            seen: their_seen,
            modes,
        };
        let (id, raw) = (filling.id, raw.to_vec());
        if let Some(replication) = &mut self.replication
            && let Some(filling) = &mut replication.refill.filling
        {
            filling.merging = true;
        }
        self.spawn(async move { Done::Refilled { id, page: page.merge(&raw).await } });
    }

    /// A page has been merged.
    pub(in crate::pump) fn refilled(&mut self, id: u64, page: Result<FilledPage, Error>) {
        let Some(replication) = &mut self.replication else { return };
        let Some(filling) = &mut replication.refill.filling else { return };
        if filling.id != id {
            return;
        }
        let page = match page {
            Ok(page) => page,
            Err(error) => {
                tracing::warn!(%error, "what was missing here could not be merged");
                return self.end_refill(false);
            }
        };
        filling.merging = false;
        filling.records += page.merged;
        self.metrics.borrow_mut().counters.refilled_records += page.merged;
        if let Some((token, namespace, key)) = page.next {
            filling.place = (token, Some((namespace, key)));
            return self.ask_refill_page();
        }
        filling.merging = true;
        let (shard, range) = (self.shard.clone(), filling.range);
        self.spawn(
            async move { Done::RefillCleared { id, cleared: shard.clear_unknown(range).await } },
        );
    }

    /// The range has been declared whole.
    pub(in crate::pump) fn refill_cleared(&mut self, id: u64, cleared: Result<(), Error>) {
        let filling = self.replication.as_ref().and_then(|it| it.refill.filling.as_ref());
        if filling.is_some_and(|filling| filling.id == id) {
            if let Err(error) = &cleared {
                tracing::warn!(%error, "a range could not be declared whole");
            }
            self.end_refill(cleared.is_ok());
        }
    }

    fn end_refill(&mut self, succeeded: bool) {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let Some(filling) = replication.refill.filling.take() else { return };
        if let Some(floor) = filling.floor {
            self.set_floor(floor);
        }
        if succeeded {
            self.metrics.borrow_mut().counters.ranges_refilled += 1;
            tracing::info!(
                partition = filling.partition.0,
                records = filling.records,
                "what could not be read is whole again"
            );
            // What was accepted here and lost stays promised.
            let promised = self.shard.clock_now(self.wall);
            if let Some(replication) = &self.replication {
                replication.keys.raise(filling.partition, promised);
            }
            self.touch_partition(filling.partition);
            if let Some(replication) = &mut self.replication {
                replication.refill.next_look = now;
            }
        }
    }

    /// The shard is another one: what was under way was about the former.
    pub(super) fn forget_refill(&mut self) {
        if let Some(replication) = &mut self.replication {
            replication.refill.filling = None;
        }
    }

    pub(super) fn set_floor(&self, floor: Floor) {
        if let Some(replication) = &self.replication {
            replication.keys.purge(floor.partition, floor.purge);
        }
        self.shard.set_purge_floor(floor.partition, floor.purge);
        self.shard.set_stable(floor.partition, floor.stable);
    }
}

/// A key with its token and namespace.
type Key = (Token, NamespaceId, Vec<u8>);

fn key_of(record: &RecordRef<'_>) -> Key {
    (record.token, record.namespace, record.key.to_vec())
}

/// A page of the helper, and what is needed to merge it.
struct Page<D: Disk, R: Runtime> {
    late: LateRecords,
    shard: Shard<D, R>,
    runtime: R,
    range: TokenRange,
    /// Where it begins.
    place: Place,
    /// Where the next begins.
    next: Option<Key>,
    /// What the helper had seen before it read.
    seen: SeenSet,
    modes: BTreeMap<NamespaceId, Mode>,
}

impl<D: Disk, R: Runtime> Page<D, R> {
    async fn merge(self, raw: &[u8]) -> Result<FilledPage, Error> {
        let Ok(PeerMessage::SyncPage { records, .. }) = PeerMessage::decode(raw) else {
            return Ok(FilledPage { merged: 0, next: None });
        };
        let mut ours = self.ours().await?;
        let (mut last, mut merged) = (Lsn(0), 0);
        for record in records.iter().filter(|record| self.range.contains(record.token)) {
            let own = ours.remove(&key_of(&record));
            let Some(mode) = self.modes.get(&record.namespace) else { continue };
            let is_state = record.kind == Kind::Siblings || *mode == Mode::Siblings;
            if !is_state && own.is_some_and(|own| own.as_ref().version() >= record.version()) {
                continue;
            }
            if let Some(lsn) = self.again(&record, is_state).await? {
                last = last.max(lsn);
                merged += 1;
            }
        }
        // What is left the helper does not have.
        for (_, own) in ours {
            if let Some(record) = self.without_obsolete(&own) {
                let is_state = record.kind == Kind::Siblings;
                if let Some(lsn) = self.again(&record.as_ref(), is_state).await? {
                    last = last.max(lsn);
                    merged += 1;
                }
            }
        }
        self.shard.wait_visible(last).await?;
        let next = self.next.filter(|(token, ..)| *token <= self.range.last);
        Ok(FilledPage { merged, next })
    }

    /// What can be read here of the keys that the page is about.
    async fn ours(&self) -> Result<BTreeMap<Key, Record>, Error> {
        let (first, after) = &self.place;
        let end = self.next.as_ref();
        let last = end.map_or(self.range.last, |(token, ..)| (*token).min(self.range.last));
        let after = after.as_ref().map(|(namespace, key)| (*namespace, key.as_slice()));
        let range = TokenRange { first: *first, last };
        let held: BTreeSet<NamespaceId> = self.modes.keys().copied().collect();
        let mut ours = BTreeMap::new();
        let request = ScanRequest { range, after, namespace: None };
        self.shard
            .scan_readable(&request, &mut |record| {
                let is_within = end.is_none_or(|(token, namespace, key)| {
                    record.cmp_key(*token, *namespace, key).is_le()
                });
                if is_within && held.contains(&record.namespace) {
                    ours.insert(key_of(record), record.to_owned());
                }
                is_within
            })
            .await?;
        Ok(ours)
    }

    /// What takes away of a key that the helper does not have all that the helper has seen.
    fn without_obsolete(&self, own: &Record) -> Option<Record> {
        let has_seen = |dot: Dot| self.seen.contains(dot);
        if own.kind == Kind::Siblings {
            let state = KeyState::of_borrowed(own).ok()?;
            if !state.siblings().iter().any(|sibling| has_seen(sibling.dot)) {
                return None;
            }
            let mut nothing = KeyState::new();
            nothing.fill(&self.seen.base());
            let record = nothing.to_record(&own.as_ref());
            return Some(Record { timestamp: own.timestamp, dot: own.dot, ..record });
        }
        // Of two records of one version the later one stands.
        let is_obsolete = own.kind == Kind::Put && has_seen(own.dot);
        is_obsolete.then(|| Record {
            kind: Kind::Delete,
            expiry_ms: 0,
            value: Vec::new(),
            ..own.clone()
        })
    }

    async fn again(&self, record: &RecordRef<'_>, is_state: bool) -> Result<Option<Lsn>, Error> {
        debug_assert!(record.timestamp > Timestamp::ZERO);
        let mut tries = 0;
        loop {
            tries += 1;
            let is_register = self.modes.get(&record.namespace) == Some(&Mode::Linearizable);
            let result = match is_state {
                true => self.shard.merge_state_again(record).await,
                false if is_register => self.register_again(record).await,
                false => self.shard.merge_again(record, self.runtime.wall()).map(MergedIn::Applied),
            };
            match result {
                // Of a register that cannot be settled the whole refill is tried again.
                Err(Error::Busy { .. }) if !is_register || tries < REGISTER_TRIES_MAX => {
                    let until = self.runtime.now().after_nanos(BUSY_PAUSE_NANOS);
                    self.runtime.sleep_until(until).await;
                }
                Ok(MergedIn::Applied(lsn)) => return Ok(Some(lsn)),
                Ok(MergedIn::Duplicate) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// A record of a register, which may have to be settled first. `Busy` until then.
    async fn register_again(&self, record: &RecordRef<'_>) -> Result<MergedIn, Error> {
        let found = self.shard.get_readable(record.token, record.namespace, record.key).await?;
        if found.is_some_and(|found| found.as_ref().version() >= record.version()) {
            return Ok(MergedIn::Duplicate);
        }
        let merged = self.late.merge(&self.shard, record, self.runtime.wall())?;
        let busy = Error::Busy { what: "a register is being settled" };
        merged.map(MergedIn::Applied).ok_or(busy)
    }
}
