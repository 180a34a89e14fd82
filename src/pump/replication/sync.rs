//! Sync: a replica of a partition gets from another all that it lacks.
//!
//! ```text
//! needy                                    helper
//! Sync{seen, from, after}      ->          scans on from there; passes over what the needy has
//!                              <-          SyncPage{records, next, its seen before the scan}
//! merges all of the page, asks for the next ...
//! after the last page, once all is visible: adopts the helper's seen of the first page
//! ```
//!
//! One exchange serves missed writes, a helper's stand-in copies, origins that are gone, gaps of
//! sequences that were never used, and ranges that the needy lost. Invariant: `seen` is adopted
//! only after every record that it stands for is durable here; a session that is cut short has
//! merged some records early and claimed nothing.

use annulus_cluster::message::{PeerMessage, RecordPage};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::log::Lsn;
use annulus_engine::model::causality::KeyState;
use annulus_engine::model::seen::SeenSet;
use annulus_engine::model::{
    Instant, Kind, NamespaceId, PartitionId, RecordRef, Token, TokenRange, VersionVector,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{MergedIn, ScanRequest, Shard};

use super::keys::LateRecords;
use crate::namespaces::Mode;
use crate::pump::{Done, Lane, Pump};

/// About how large a page is, in bytes.
const PAGE_BYTES: u32 = 64 << 10;
/// The least and the most that a helper lets itself be asked for.
const PAGE_BYTES_RANGE: std::ops::RangeInclusive<u32> = (4 << 10)..=(4 << 20);
/// A page that has not come by then will not, in nanoseconds.
const PAGE_TIMEOUT_NANOS: u64 = 10_000_000_000;
/// Records that are merged between two yields, some 50 us: requests do not wait for a page.
const RECORDS_AT_ONCE: usize = 32;
/// Pause of a merge that memory refuses, in nanoseconds.
const BUSY_PAUSE_NANOS: u64 = 5_000_000;

/// A sync under way, on the needy's side.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) partition: PartitionId,
    pub(super) helper: PeerShard,
    /// The helper's seen of the first page.
    adopted: Option<SeenSet>,
    /// The last write merged so far.
    last: Lsn,
    records: u64,
    /// Something could not be merged yet: nothing is to be adopted.
    is_spoiled: bool,
    deadline: Instant,
    /// A page is being merged; no other is awaited.
    merging: bool,
}

/// What merging a page came to.
#[derive(Debug)]
pub(in crate::pump) struct MergedPage {
    /// The last write.
    pub(in crate::pump) last: Lsn,
    /// Records that were news.
    pub(in crate::pump) merged: u64,
    /// A key must be mended first.
    pub(in crate::pump) is_spoiled: bool,
    /// Where the next page begins.
    pub(in crate::pump) next: Option<(Token, NamespaceId, Vec<u8>)>,
}

/// Whether the needy can do without this record: it has merged every write in it.
fn has(seen: &SeenSet, record: &RecordRef<'_>) -> bool {
    if record.kind != Kind::Siblings {
        return seen.contains(record.dot);
    }
    KeyState::of_record(record)
        .is_ok_and(|state| state.siblings().iter().all(|sibling| seen.contains(sibling.dot)))
}

/// Adds a record; a key state is filled, because the needy does not know what is obsolete here.
/// `base` is that of before the scan, so every dot in it that the state lacks is obsolete.
fn push_filled(page: &mut RecordPage, record: &RecordRef<'_>, base: &VersionVector) {
    match KeyState::of_record(record) {
        Ok(mut state) if record.kind == Kind::Siblings => {
            state.fill(base);
            let filled = state.to_record(record);
            let (timestamp, dot) = record.version();
            page.push(&RecordRef { timestamp, dot, ..filled.as_ref() });
        }
        _ => page.push(record),
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Begins to fetch what this replica lacks of the partition.
    pub(super) fn begin_sync(&mut self, partition: PartitionId, helper: PeerShard) {
        let Some(replication) = &mut self.replication else { return };
        let id = replication.next_id();
        let session = Session {
            id,
            partition,
            helper,
            adopted: None,
            last: Lsn(0),
            records: 0,
            is_spoiled: false,
            deadline: self.now.after_nanos(PAGE_TIMEOUT_NANOS),
            merging: false,
        };
        replication.sessions.push(session);
        let first = partition.range(self.map.partition_bits()).first;
        self.ask_page(id, partition, helper, first, None);
    }

    fn ask_page(
        &mut self,
        id: u64,
        partition: PartitionId,
        helper: PeerShard,
        from: Token,
        after: Option<(NamespaceId, &[u8])>,
    ) {
        let mut seen = Vec::new();
        self.shard.with_seen(partition, |set| set.encode(&mut seen));
        let ask =
            PeerMessage::Sync { id, partition, seen: &seen, from, after, bytes_max: PAGE_BYTES };
        self.post(helper, Lane::Background, &ask);
    }

    /// The helper's side: one page of what the asker may lack.
    pub(super) fn serve_sync(&mut self, from: PeerShard, message: &PeerMessage<'_>) {
        let PeerMessage::Sync { id, partition, seen, from: first, after, bytes_max } = *message
        else {
            return;
        };
        let range = partition.range(self.map.partition_bits());
        let Ok(needy) = SeenSet::decode(seen) else { return self.count_peer_refusal(from) };
        if self.map.shard_of_partition(partition.0) != self.map.own() || !range.contains(first) {
            return self.count_peer_refusal(from);
        }
        let mut own_seen = Vec::new();
        let (floor, base) = self.shard.with_seen(partition, |own| {
            own.encode(&mut own_seen);
            (needy.lacks(own), own.base())
        });
        let wanted: Vec<NamespaceId> = self.namespaces_of(partition, from.node);
        if wanted.is_empty() {
            // By an older map, or a newer one: a page of nothing would say that there is nothing.
            return self.correct(from);
        }
        let bytes_max = bytes_max.clamp(*PAGE_BYTES_RANGE.start(), *PAGE_BYTES_RANGE.end());
        let after = after.map(|(namespace, key)| (namespace, key.to_vec()));
        let range = TokenRange { first, last: range.last };
        let (shard, incarnation) = (self.shard.clone(), self.shard.incarnation(partition));
        self.spawn(async move {
            let mut page = RecordPage::new();
            let mut last_namespace = NamespaceId(0);
            let mut next = None;
            if let Some(floor) = floor {
                let after = after.as_ref().map(|(namespace, key)| (*namespace, key.as_slice()));
                let request = ScanRequest { range, after, namespace: None };
                let scanned = shard
                    .scan(&request, &mut |record| {
                        last_namespace = record.namespace;
                        if record.timestamp > floor
                            && wanted.contains(&record.namespace)
                            && !has(&needy, record)
                        {
                            push_filled(&mut page, record, &base);
                        }
                        page.size() < bytes_max as usize
                    })
                    .await;
                match scanned {
                    Ok(place) => next = place,
                    // Without a page the asker turns to somebody else.
                    Err(error) => return Done::SyncServed { to: from, page: Err(error) },
                }
            }
            let mut bytes = Vec::with_capacity(page.size() + own_seen.len() + 64);
            PeerMessage::SyncPage {
                id,
                partition,
                records: page.list(),
                next: next.as_ref().map(|(token, key)| (*token, last_namespace, key.as_slice())),
                seen: &own_seen,
                helper_incarnation: incarnation,
            }
            .encode(&mut bytes);
            Done::SyncServed { to: from, page: Ok(bytes) }
        });
    }

    /// A page for another replica has been read.
    pub(in crate::pump) fn sync_served(&mut self, to: PeerShard, page: Result<Vec<u8>, Error>) {
        match page {
            Ok(bytes) => self.post_bytes(to, Lane::Background, bytes),
            Err(error) => tracing::warn!(%error, "a replica's page could not be read"),
        }
    }

    /// A page has come: merges it beside everything else.
    pub(super) fn take_sync_page(
        &mut self,
        from: PeerShard,
        message: &PeerMessage<'_>,
        raw: &[u8],
    ) {
        let PeerMessage::SyncPage { id, records, next, seen, .. } = message else { return };
        // Everything is checked before anything is merged.
        let mut refused = None;
        for record in records.iter() {
            if let Err((_, reason)) = self.check_peer_record(&record) {
                refused = Some(reason);
                break;
            }
        }
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let Some(session) = replication
            .sessions
            .iter_mut()
            .find(|session| session.id == *id && session.helper == from && !session.merging)
        else {
            return;
        };
        let (id, helper) = (session.id, session.helper);
        let seen = match SeenSet::decode(seen) {
            Ok(seen) if refused.is_none() => seen,
            _ => {
                tracing::warn!(node = helper.node.0, ?refused, "a page of a sync was refused");
                return self.end_sync(id, false);
            }
        };
        // The first page's is the one to adopt; a helper that has less by now has crashed, or has
        // dropped its copy, and what it showed since proves nothing.
        if !seen.covers(session.adopted.get_or_insert_with(|| seen.clone())) {
            return self.end_sync(id, false);
        }
        session.merging = true;
        session.deadline = now.after_nanos(PAGE_TIMEOUT_NANOS);
        let token = replication.merge_token();
        let next = next.map(|(token, namespace, key)| (token, namespace, key.to_vec()));
        let modes: Vec<(NamespaceId, Mode)> =
            self.catalogue.iter().map(|namespace| (namespace.id, namespace.mode)).collect();
        let late = replication.keys.late();
        let (shard, runtime, raw) = (self.shard.clone(), self.runtime.clone(), raw.to_vec());
        self.spawn(async move {
            let mut page = MergedPage { last: Lsn(0), merged: 0, is_spoiled: false, next };
            let merged = merge_page(&shard, &runtime, &raw, &modes, &late, &mut page).await;
            drop(token);
            let merged = merged.map(|()| page);
            Done::SyncMerged { id, merged }
        });
    }

    /// A page has been merged: asks for the next, or adopts what the helper had seen.
    pub(in crate::pump) fn sync_merged(&mut self, id: u64, merged: Result<MergedPage, Error>) {
        let Some(replication) = &mut self.replication else { return };
        let Some(session) = replication.sessions.iter_mut().find(|session| session.id == id) else {
            return;
        };
        session.merging = false;
        let page = match merged {
            Ok(page) => page,
            Err(error) => {
                tracing::warn!(%error, "what a sync brought could not be merged");
                return self.end_sync(id, false);
            }
        };
        session.last = session.last.max(page.last);
        session.records += page.merged;
        session.is_spoiled |= page.is_spoiled;
        let is_spoiled = session.is_spoiled;
        self.metrics.borrow_mut().counters.synced_records += page.merged;
        let (partition, helper, last) = (session.partition, session.helper, session.last);
        if let Some((token, namespace, key)) = page.next {
            return self.ask_page(id, partition, helper, token, Some((namespace, &key)));
        }
        if is_spoiled {
            return self.end_sync(id, false);
        }
        let Some(seen) = session.adopted.take() else { return };
        debug_assert!(last <= self.shard.visible(), "a page ends when it is visible");
        let adopted = self.shard.adopt_seen(partition, &seen);
        if let Err(error) = &adopted {
            tracing::warn!(%error, "what a sync brought could not be noted");
        }
        self.end_sync(id, adopted.is_ok());
    }

    /// Ends sessions whose page does not come.
    pub(super) fn expire_syncs(&mut self) {
        let now = self.now;
        let Some(replication) = &self.replication else { return };
        let late = |session: &&Session| !session.merging && session.deadline <= now;
        let late: Vec<u64> = replication.sessions.iter().filter(late).map(|s| s.id).collect();
        for id in late {
            self.end_sync(id, false);
        }
    }

    pub(super) fn end_sync(&mut self, id: u64, succeeded: bool) {
        let now = self.now;
        let Some(replication) = &mut self.replication else { return };
        let Some(at) = replication.sessions.iter().position(|session| session.id == id) else {
            return;
        };
        let session = replication.sessions.swap_remove(at);
        replication.tracking.sync_ended(now, session.partition, succeeded);
    }
}

/// Merges the records of a page in order and waits until all of it is visible.
async fn merge_page<D: Disk, R: Runtime>(
    shard: &Shard<D, R>,
    runtime: &R,
    raw: &[u8],
    modes: &[(NamespaceId, Mode)],
    late: &LateRecords,
    page: &mut MergedPage,
) -> Result<(), Error> {
    let Ok(PeerMessage::SyncPage { records, .. }) = PeerMessage::decode(raw) else {
        return Ok(());
    };
    for (at, record) in records.iter().enumerate() {
        if at % RECORDS_AT_ONCE == RECORDS_AT_ONCE - 1 {
            runtime.yield_now().await;
        }
        let mode = modes.iter().find(|(id, _)| *id == record.namespace).map(|(_, mode)| *mode);
        let siblings = record.kind == Kind::Siblings || mode == Some(Mode::Siblings);
        let result = loop {
            let result = match mode {
                _ if siblings => shard.merge_in_state(&record).await,
                Some(Mode::Linearizable) => {
                    merge_register(shard, runtime, late, &record, page).await
                }
                _ => shard.merge_in(&record, runtime.wall()),
            };
            match result {
                Err(Error::Busy { .. }) => {
                    runtime.sleep_until(runtime.now().after_nanos(BUSY_PAUSE_NANOS)).await;
                }
                result => break result,
            }
        };
        if let MergedIn::Applied(lsn) = result? {
            page.last = page.last.max(lsn);
            page.merged += 1;
        }
    }
    shard.wait_visible(page.last).await
}

/// Merges a record of a register, if a promise allows it and it is news.
async fn merge_register<D: Disk, R: Runtime>(
    shard: &Shard<D, R>,
    runtime: &R,
    late: &LateRecords,
    record: &RecordRef<'_>,
    page: &mut MergedPage,
) -> Result<MergedIn, Error> {
    let found = shard.get_taken(record.token, record.namespace, record.key).await;
    match found {
        Ok(Some(found)) if found.as_ref().version() >= record.version() => {
            return Ok(MergedIn::Duplicate);
        }
        Ok(_) | Err(Error::Corrupt { .. }) => {}
        Err(error) => return Err(error),
    }
    match late.merge(shard, record, runtime.wall())? {
        Some(lsn) => Ok(MergedIn::Applied(lsn)),
        None => {
            page.is_spoiled = true;
            Ok(MergedIn::Duplicate)
        }
    }
}
