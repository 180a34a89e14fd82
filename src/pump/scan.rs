//! Scans: one page of one shard's part of a range.
//!
//! Invariant: a page ends at its shard's border, and where its node is no home of what follows;
//! `next` then leads on, so that a client needs to know nothing of borders. Each token is shown by
//! one of its homes, never by a node that only stands in for one.

use annulus_engine::disk::Disk;
use annulus_engine::model::causality::KeyState;
use annulus_engine::model::{
    Instant, Kind, NamespaceId, PartitionId, RecordRef, Token, TokenRange, WallMicros,
};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::ScanRequest;
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::response::Page;
use annulus_net::wire::scan::{Scan, TOMBSTONES};
use annulus_net::wire::status::Status;

use super::admission::Place;
use super::replication::with_client_record;
use super::{Done, Origin, Pump, TASKS_MAX};
use crate::namespaces::Mode;

impl<D: Disk, R: Runtime> Pump<D, R> {
    pub(super) fn route_scan(&mut self, origin: Origin, deadline: Instant, scan: &Scan<'_>) {
        let shard = self.map.shard_of(scan.range.first);
        if shard == self.map.own() {
            return self.start_scan(origin, deadline, 0, scan);
        }
        let mut body = Vec::with_capacity(scan.size());
        scan.encode(&mut body);
        // Refused only when thousands are under way; the deadline then answers.
        if let Err(origin) = self.hand_over(shard, Opcode::Scan, body.into(), deadline, origin) {
            self.tasks.push(Box::pin(std::future::ready(Done::Admin {
                origin,
                reply: Err((Status::BUSY, "the key's shard is overloaded".to_owned())),
            })));
        }
    }

    /// The last of the tokens from `first` on that this shard has as a home; `None` if it has not
    /// even the first.
    pub(super) fn held_from(&self, namespace: NamespaceId, first: Token) -> Option<Token> {
        let Some(replication) = &self.replication else {
            return Some(self.map.last_token_of_shard(first));
        };
        // Of an unknown namespace there is nothing to show: that is said here.
        let Ok(namespace) = self.namespace(namespace) else { return Some(first) };
        let bits = self.map.partition_bits();
        let (topology, n) = (replication.topology(), namespace.n);
        let held = (first.partition(bits).0..1 << bits).map(PartitionId).take_while(|partition| {
            self.map.shard_of_partition(partition.0) == self.map.own()
                && topology.is_home(*partition, n)
        });
        held.last().map(|last| last.range(bits).last)
    }

    /// A page of this shard's tokens: from here, or from a home of the first of them. `hops`: how
    /// often it was handed on.
    pub(super) fn start_scan(
        &mut self,
        origin: Origin,
        deadline: Instant,
        hops: u8,
        scan: &Scan<'_>,
    ) {
        let held = match self.held_from(scan.namespace, scan.range.first) {
            Some(last) => last,
            None => return self.scan_elsewhere(origin, deadline, hops, scan),
        };
        let refusal = match () {
            () if deadline <= self.now => Some((Status::EXPIRED, "the deadline had passed")),
            () if self.tasks.len() >= TASKS_MAX || self.is_in_vain(Place::Read, deadline) => {
                Some((Status::BUSY, "too much waits to come to it before its deadline"))
            }
            () => None,
        };
        if let Some((status, what)) = refusal {
            let reply = Err((status, what.to_owned()));
            return self.spawn(std::future::ready(Done::Admin { origin, reply }));
        }
        let began = self.now;
        let limits = &self.facts.welcome.limits;
        let mut page = Page::new(scan, limits.message_size_max / 64, limits.message_size_max);
        let range = TokenRange { first: scan.range.first, last: scan.range.last.min(held) };
        let beyond = (range.last < scan.range.last).then_some(Token(range.last.0.wrapping_add(1)));
        let (shard, wall) = (self.shard.clone(), self.wall);
        let (namespace, after) = (scan.namespace, scan.after.to_vec());
        let all = scan.flags & TOMBSTONES != 0;
        let known = self.namespace(namespace).is_ok();
        let is_register = self.replication.is_some()
            && self.namespace(namespace).is_ok_and(|it| it.mode == Mode::Linearizable);
        self.metrics.borrow_mut().counters.scans += 1;
        self.spawn(async move {
            if !known {
                let reply = Err((Status::NO_NAMESPACE, "no namespace has this id".to_owned()));
                return Done::Admin { origin, reply };
            }
            let after = (!after.is_empty()).then_some((namespace, after.as_slice()));
            let request = ScanRequest { range, after, namespace: Some(namespace) };
            let next = shard
                .scan(&request, &mut |record| {
                    let is_shown = all || record.kind != Kind::Siblings && record.is_live(wall);
                    if is_shown && is_register {
                        with_client_record(record, |record| page.push(record));
                    } else if is_shown {
                        page.push(record);
                    } else if record.kind == Kind::Siblings {
                        push_siblings(&mut page, record, wall);
                    }
                    !page.is_full()
                })
                .await
                .map(|next| next.or(beyond.map(|token| (token, Vec::new()))));
            Done::Scan { origin, page, next, began }
        });
    }
}

/// A scan shows each live sibling as a record of its own, so that a copy made of it is whole.
fn push_siblings(page: &mut Page, record: &RecordRef<'_>, wall: WallMicros) {
    let Ok(state) = KeyState::of_record(record) else { return };
    for sibling in state.live(wall) {
        page.push(&RecordRef {
            kind: Kind::Put,
            dot: sibling.dot,
            timestamp: sibling.timestamp,
            expiry_ms: sibling.expiry_ms,
            value: sibling.value,
            ..*record
        });
    }
}
