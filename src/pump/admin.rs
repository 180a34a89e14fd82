//! ADMIN and STATS: handed to the desk of the node, answered as JSON.

use std::future::Future;
use std::pin::Pin;

use annulus_cluster::NodeId;
use annulus_engine::disk::Disk;
use annulus_engine::model::{Instant, Token, Value, WallMicros};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{ShardStats, SpaceLevel};
use annulus_net::wire::hello::{self, NamespaceFact};
use annulus_net::wire::response::{Failure, Page};
use annulus_net::wire::status::Status;

use super::{Answer, Done, Origin, Pump, Wires};
use crate::commands::NsOutcome;
use crate::metrics::{Gauges, ShardMetrics, ShardSnapshot, Standing};
use crate::namespaces::{Catalogue, Mode};

/// A command being carried out. Ends with its JSON, or with a status and a sentence.
pub type AdminJob = Pin<Box<dyn Future<Output = Result<Vec<u8>, (Status, String)>>>>;

/// This node's vote on a register. Ends with the answer's bytes, or with why there is none.
pub type Vote = Pin<Box<dyn Future<Output = Result<Vec<u8>, String>>>>;

/// Where admin commands are carried out: it knows the node, the pump knows one shard.
pub trait AdminDesk {
    /// Begins a command; `stats` is the STATS request.
    fn begin(&self, command: &str, arguments: &str) -> AdminJob;

    /// Where clients reach this node.
    fn client_address(&self) -> String;

    /// Where clients reach another node, and how many shards it has; 0 if that is not known.
    fn note_client(&self, node: NodeId, address: &str, shard_count: u32);

    /// The namespaces of this node as they are now.
    fn catalogue(&self) -> Catalogue;

    /// Carries out a command on a catalogue of namespaces, which nobody keeps.
    ///
    /// # Errors
    /// Why it is refused.
    fn apply(
        &self,
        command: &str,
        arguments: &str,
        catalogue: &Catalogue,
    ) -> Result<NsOutcome, (Status, String)>;

    /// Answers a question to a holder of registers, when what the answer rests on is durable.
    fn vote(&self, wall: WallMicros, request: &[u8]) -> Vote;

    /// Another node has a newer catalogue: makes it this node's.
    fn adopt_catalogue(&self, bytes: &[u8]) -> AdminJob;
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    pub(super) fn begin_admin(
        &mut self,
        origin: Origin,
        deadline: Instant,
        command: &str,
        arguments: &str,
    ) {
        let Err(origin) = self.begin_cluster_admin(origin, deadline, command, arguments) else {
            return;
        };
        let job = self.desk.begin(command, arguments);
        self.spawn(async move { Done::Admin { origin, reply: job.await } });
    }

    pub(super) fn answer_admin(
        &mut self,
        origin: Origin,
        reply: Result<Vec<u8>, (Status, String)>,
        wires: &mut dyn Wires,
    ) {
        match (reply, origin) {
            (Ok(json), Origin::Connection(connection, ticket)) => {
                if let Some(session) = self.sessions.get_mut(connection)
                    && let Some(out) = wires.out(connection)
                {
                    session.wire.replies(out).json(ticket, json);
                    Self::attend(&mut self.attention, connection, session);
                }
            }
            (Ok(json), origin) => {
                self.answer(origin, &Answer::Raw(Status::OK, Value::Whole(&json)), wires)
            }
            (Err((status, message)), origin) => {
                let failure = Failure::new(status, &message);
                self.answer(origin, &Answer::Failure(failure), wires);
            }
        }
    }

    pub(super) fn answer_page(
        &mut self,
        origin: Origin,
        page: Page,
        next: Option<(Token, &[u8])>,
        wires: &mut dyn Wires,
    ) {
        if let Origin::Connection(connection, ticket) = origin {
            self.admission.answered();
            if let Some(session) = self.sessions.get_mut(connection)
                && let Some(out) = wires.out(connection)
            {
                session.wire.replies(out).page(ticket, page, next);
                Self::attend(&mut self.attention, connection, session);
            }
        } else {
            let body = page.into_body(next);
            self.answer(origin, &Answer::Raw(Status::OK, Value::Whole(&body)), wires);
        }
    }
}

/// The namespaces as HELLO tells them.
pub(super) fn namespace_facts(catalogue: &Catalogue) -> Vec<NamespaceFact> {
    catalogue
        .iter()
        .map(|namespace| NamespaceFact {
            id: namespace.id,
            mode: match namespace.mode {
                Mode::Lww => hello::Mode::Lww,
                Mode::Siblings => hello::Mode::Siblings,
                Mode::Linearizable => hello::Mode::Linearizable,
            },
            name: namespace.name.clone(),
        })
        .collect()
}

/// One shard's numbers, for other threads.
pub(super) fn snapshot(
    shard: u32,
    metrics: &ShardMetrics,
    stats: &ShardStats,
    (connections, in_flight, held): (u64, u64, u64),
    standing: Standing,
) -> ShardSnapshot {
    let mut metrics = metrics.clone();
    let counters = &mut metrics.counters;
    counters.log_records = stats.log.records;
    counters.log_batches = stats.log.batches;
    counters.log_write_bytes = stats.log.device_bytes;
    counters.flushes = stats.counters.flushes;
    counters.flush_write_bytes = stats.counters.flushed_bytes;
    counters.compactions = stats.compactions;
    counters.compaction_read_bytes = stats.compaction_read_bytes;
    counters.compaction_write_bytes = stats.compacted_bytes;
    counters.device_reads = stats.counters.blocks_read;
    counters.log_losses = stats.counters.log_losses;
    counters.log_records_lost = stats.counters.log_records_lost;
    counters.device_read_bytes = stats.counters.block_bytes_read;
    counters.cache_hits = stats.cache_hits;
    counters.cache_misses = stats.cache_misses;
    let gauges = Gauges {
        connections,
        requests_in_flight: in_flight,
        request_bytes_in_flight: held,
        memtable_records: stats.memory_keys as u64,
        memtable_bytes: stats.memory_bytes as u64,
        tables: stats.tables as u64,
        table_bytes: stats.table_bytes,
        table_records: stats.table_records,
        compaction_debt_bytes: stats.debt_bytes,
        log_segments: stats.log.segments_live as u64,
        log_replay_bytes: stats.log_replay_bytes,
        log_pending_bytes: stats.log_pending_bytes as u64,
        cache_bytes: stats.cache_bytes as u64,
        pinned_bytes: stats.pinned_bytes as u64,
        ranges_unreadable: stats.ranges_unreadable as u64,
        log_poisoned: u64::from(stats.poisoned.is_some()),
        ..Gauges::default()
    };
    ShardSnapshot { shard, metrics, gauges, standing, ..ShardSnapshot::default() }
}

/// The disk's level as the metrics name it.
#[must_use]
pub fn disk_level(level: SpaceLevel) -> crate::metrics::DiskLevel {
    use crate::metrics::DiskLevel;
    match level {
        SpaceLevel::Normal => DiskLevel::Ok,
        SpaceLevel::Pace => DiskLevel::Pace,
        SpaceLevel::RefuseData => DiskLevel::Refuse,
        SpaceLevel::Reserve => DiskLevel::Reserve,
    }
}
