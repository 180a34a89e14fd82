//! Counters and latencies of a shard, what is sent of them to the admin thread, and the two
//! texts made from that: Prometheus and JSON.
//!
//! Invariant: counting is an addition to a plain integer of the shard's own thread; nothing is
//! shared. A shard answers a request for a [`ShardSnapshot`], a `Send` copy; sums are made by
//! whoever asked. Names of counters are stable: scripts and dashboards read them. Neither keys
//! nor values nor seeds ever appear here.

mod latency;

use std::fmt::Write as _;

use annulus_cluster::membership::MemberView;
use serde::Serialize;
use serde_json::{Map, Value, json};

pub use latency::Latency;

/// Declares the numbers of a shard once: the struct, how it is summed, and names with help.
macro_rules! numbers {
    ($(#[$meta:meta])* $struct:ident, $kind:literal;
     $($(#[doc = $doc:literal])+ $name:ident;)+) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct $struct {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl $struct {
            /// Adds another shard's numbers.
            pub fn merge(&mut self, other: &$struct) {
                $(self.$name += other.$name;)+
            }

            /// Name, help and value of each.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
                [$((stringify!($name), concat!($($doc),+), self.$name)),+].into_iter()
            }
        }
    };
}

numbers! {
    /// What a shard has counted since it started; each only grows.
    Counters, "counter";
    /// Get requests answered, found or not.
    gets;
    /// Get requests that found a value.
    get_hits;
    /// Gets answered without a read of the disk: from memtables and cached blocks.
    get_memory_hits;
    /// Put requests answered with success.
    puts;
    /// Delete requests answered with success.
    deletes;
    /// Batches answered.
    batches;
    /// Pages of scans answered.
    scans;
    /// Requests answered with an error that says nothing was started.
    errors_not_started;
    /// Requests answered with an error that says the write may have been applied.
    errors_may_be_applied;
    /// Requests refused because a queue was full.
    refused_busy;
    /// Writes refused because the disk is full.
    refused_full;
    /// Requests whose deadline had passed before they were started.
    refused_expired;
    /// Requests handed to another shard of this node.
    hops_out;
    /// Requests taken from another shard of this node.
    hops_in;
    /// Connections accepted.
    connections_accepted;
    /// Connections closed because of what the other side sent or did not take.
    connections_shed;
    /// Bytes received from clients.
    received_bytes;
    /// Bytes sent to clients.
    sent_bytes;
    /// Keys and values of acknowledged writes, in bytes.
    user_write_bytes;
    /// Records appended to the commit log.
    log_records;
    /// Batches written to the commit log; each is one device write and sync under `sync`.
    log_batches;
    /// Bytes written to the device for the commit log, padding included.
    log_write_bytes;
    /// Times a shard was opened anew after a failed write or sync of its commit log.
    log_reopened;
    /// Memtables flushed to tables.
    flushes;
    /// Bytes written to the device by flushes.
    flush_write_bytes;
    /// Compaction steps done.
    compactions;
    /// Bytes read from the device by compaction.
    compaction_read_bytes;
    /// Bytes written to the device by compaction.
    compaction_write_bytes;
    /// Reads of table blocks from the device for gets.
    device_reads;
    /// Bytes of those reads.
    device_read_bytes;
    /// Blocks found in the block cache.
    cache_hits;
    /// Blocks not found in the block cache.
    cache_misses;
    /// Blocks or records that failed their checksum.
    corruptions;
    /// Damaged parts of the commit log that this start was told to give up.
    log_losses;
    /// Records in them, as far as anything says how many.
    log_records_lost;
    /// Messages of other nodes' shards.
    peer_messages;
    /// Messages and records of other nodes that were refused.
    peer_refused;
    /// Requests handed on to the nodes that have their keys.
    forwarded;
    /// Records that this replica lacked and another brought.
    synced_records;
    /// Records that comparisons with other replicas have mended here.
    repaired_records;
    /// Records fetched from another replica because a block could not be read.
    refilled_records;
    /// Ranges that could not be read and are whole again.
    ranges_refilled;
    /// Comparisons of a partition with another replica that ended.
    repair_rounds;
    /// Comparisons that found a difference: a fault of disk, memory or program.
    repair_faults;
    /// Keys found to differ from another replica that had seen the same writes.
    repair_keys_differing;
    /// Bytes of messages of comparisons, both ways; records not among them.
    repair_bytes;
    /// Bytes read to compare and to check.
    repair_read_bytes;
    /// Leaves of trees, or pieces of tables, read only to check them.
    scrubbed_leaves;
    /// Scans of comparisons and scrubbing that met damage; blocks, on a node of its own.
    scrub_damaged;
    /// Scans that found other records than were noted.
    scrub_mismatches;
    /// Copies for other nodes that were refused because there was no room for them.
    hints_refused;
    /// Reads that found a replica stale and mended it.
    read_repairs;
    /// Times a ballot for a key of a linearizable namespace was overruled.
    cas_conflicts;
    /// Keys of linearizable namespaces that were settled because a late record could not be merged.
    keys_mended;
    /// Records of linearizable namespaces that were merged here because a majority had them.
    keys_learned;
    /// Nanoseconds during which writes were slowed because compaction was behind.
    write_delay_nanos;
    /// Times the shard's loop ran.
    turns;
    /// Messages sent to shards of other nodes.
    peer_messages_sent;
    /// Messages to shards of other nodes that no link took: it was down, or too much waited.
    peer_messages_refused;
    /// Messages received from shards of other nodes.
    peer_messages_received;
    /// Bytes received from shards of other nodes.
    peer_received_bytes;
    /// Links to shards of other nodes that came to stand.
    peer_links_opened;
    /// Links to shards of other nodes that broke, or did not come to stand.
    peer_links_broken;
    /// Connections between nodes that were refused or ended for a reason of the protocol's.
    peer_refusals;
    /// Probes of other members.
    gossip_probes;
    /// Probes that neither the member nor another answered for.
    gossip_probes_failed;
    /// Accusations of members made by this node.
    gossip_accusations;
    /// Accusations not made, because this node itself hears too little.
    gossip_withheld;
    /// Accusations of this node that it contradicted.
    gossip_contradictions;
    /// Times a member became down.
    gossip_downs;
}

numbers! {
    /// What a shard has at this moment.
    Gauges, "gauge";
    /// Open client connections.
    connections;
    /// Requests in flight.
    requests_in_flight;
    /// Requests of clients that may be in flight while more are asked for than can be done; 0
    /// when nothing is limited.
    requests_allowed;
    /// Bytes of requests and replies in flight.
    request_bytes_in_flight;
    /// Records in memtables.
    memtable_records;
    /// Memory of memtables in bytes.
    memtable_bytes;
    /// Live tables.
    tables;
    /// Bytes of live tables.
    table_bytes;
    /// Records in live tables, superseded ones included.
    table_records;
    /// Bytes of tables above the last level: what compaction still has to merge.
    compaction_debt_bytes;
    /// Live segments of the commit log.
    log_segments;
    /// Bytes of log that a restart would replay.
    log_replay_bytes;
    /// Bytes appended to the log and not yet durable.
    log_pending_bytes;
    /// Memory of the block cache in bytes.
    cache_bytes;
    /// Memory of filters and indexes in bytes.
    pinned_bytes;
    /// Ranges of tables that compaction leaves alone because it cannot read them.
    ranges_unreadable;
    /// 1 when the commit log is poisoned by a failed write or sync.
    log_poisoned;
    /// Partitions that this node holds.
    partitions_held;
    /// Partitions of which all holders have seen the same writes.
    partitions_in_sync;
    /// Partitions of which another replica has writes that this one lacks.
    partitions_behind;
    /// Partitions of which only other holders lack writes.
    partitions_ahead;
    /// Partitions of which a holder has not been heard.
    partitions_unknown;
    /// Partitions of which this node keeps records for their holders.
    partitions_hosted;
    /// Bytes that copies kept for other nodes count as.
    hint_bytes;
    /// Most bytes of such copies.
    hint_bytes_max;
    /// Partitions with a range that cannot be read and is not yet filled again.
    partitions_damaged;
    /// Writes that this node lacks.
    writes_lacked;
    /// Syncs under way.
    syncs;
    /// Pairs of a partition and another holder that are compared in turn.
    repair_pairs;
    /// Of them, those that were compared whole in their last round.
    repair_checked;
    /// Of them, those that differed in their last round.
    repair_differing;
    /// Comparisons under way.
    repair_open;
    /// Leaves of trees that must be read before they are compared.
    repair_dirty_leaves;
    /// Memory of trees in bytes.
    repair_tree_bytes;
    /// Leaves that a scrub on demand has still to read.
    scrub_demanded;
    /// Bytes that a scrub on demand has still to read, on a node of its own.
    scrub_bytes_left;
    /// Links to shards of other nodes that stand.
    peer_links_up;
    /// Connections from shards of other nodes.
    peer_connections;
    /// Of these, those whose handshake is not done.
    peer_connections_half_open;
    /// Local health, as gossip has it: 0 is good, 7 the worst.
    gossip_local_health;
    /// Rumours that wait for a message.
    gossip_rumours;
    /// Members with nothing against them, this one among them.
    members_alive;
    /// Members that somebody could not reach.
    members_suspect;
    /// Members that this node cannot reach, without a second to say so.
    members_unreachable;
    /// Members that are down.
    members_down;
}

/// A shard's numbers and latencies, added to in place by its thread.
#[derive(Clone, Debug, Default)]
pub struct ShardMetrics {
    /// What was counted.
    pub counters: Counters,
    /// From the turn that took a get's frame to the end of the turn that answered it.
    pub read_latency: Latency,
    /// From a write's frame to its reply.
    pub write_latency: Latency,
}

/// A copy of a shard's state for other threads.
#[derive(Clone, Debug, Default)]
pub struct ShardSnapshot {
    /// Index of the shard.
    pub shard: u32,
    /// What was counted, and the latencies.
    pub metrics: ShardMetrics,
    /// What there is at this moment.
    pub gauges: Gauges,
    /// How far it is from being whole.
    pub standing: Standing,
    /// Nodes because of which tombstones wait, with the number of partitions.
    pub tombstones_waiting_for: Vec<(u32, u64)>,
    /// Connections between nodes that were refused or ended, by reason; empty without peers.
    pub peer_refusals: Vec<(&'static str, u64)>,
    /// What the shard was told of the members of its cluster; empty without one.
    pub members: Vec<MemberView>,
}

/// What a shard owes others, and others it; none is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Writes that it keeps for others, and that some home has not said to have.
    pub hints_owed: Option<u64>,
    /// How far the partition that lags most may lag behind, in milliseconds.
    pub as_of_lag_ms: Option<u64>,
}

/// How full the disk is, and what that means for writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskLevel {
    /// Enough space.
    #[default]
    Ok,
    /// Writes are slowed.
    Pace,
    /// New data is refused, deletes are accepted.
    Refuse,
    /// Only what frees space is written.
    Reserve,
}

/// A node's state, summed from its shards: what `/stats` and the STATS request show.
#[derive(Clone, Debug, Default)]
pub struct NodeSnapshot {
    /// Version of the program.
    pub version: String,
    /// Id of the node in its cluster.
    pub node: u32,
    /// Id of the cluster, in hex.
    pub cluster: String,
    /// Seconds since the node serves.
    pub uptime_seconds: u64,
    /// Free bytes of the file system of the data.
    pub disk_free_bytes: u64,
    /// Size of that file system.
    pub disk_total_bytes: u64,
    /// What that means for writes.
    pub disk_level: DiskLevel,
    /// The process itself.
    pub process: Process,
    /// Each shard.
    pub shards: Vec<ShardSnapshot>,
}

/// What the system says about this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// CPU time of all threads, user and system, in microseconds.
    pub cpu_micros: u64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_files: u64,
    /// Threads.
    pub threads: u64,
}

impl Process {
    /// Reads `/proc/self`; what cannot be read is 0. A few file reads.
    #[must_use]
    pub fn probe() -> Process {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpu_micros, threads) = parse_stat(&read("/proc/self/stat")).unwrap_or_default();
        let resident_bytes = read("/proc/self/status")
            .lines()
            .find_map(|line| {
                line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok()
            })
            .map_or(0, |kib: u64| kib * 1024);
        let open_files = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
        Process { cpu_micros, resident_bytes, open_files, threads }
    }
}

/// CPU time in microseconds and threads from the text of `/proc/self/stat`. The name of the
/// process may contain spaces and brackets, so counting starts after the last bracket.
fn parse_stat(text: &str) -> Option<(u64, u64)> {
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    let field = |index: usize| fields.get(index)?.parse::<u64>().ok();
    // Linux reports these in hundredths of a second, whatever the kernel's own tick is.
    Some(((field(11)? + field(12)?) * 10_000, field(17)?))
}

impl NodeSnapshot {
    /// All shards' counters together.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.shards.iter().for_each(|shard| sum.merge(&shard.metrics.counters));
        sum
    }

    /// All shards' gauges together.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        let mut sum = Gauges::default();
        self.shards.iter().for_each(|shard| sum.merge(&shard.gauges));
        sum
    }

    /// One latency of all shards together.
    fn latency(&self, pick: impl Fn(&ShardMetrics) -> &Latency) -> Latency {
        let mut sum = Latency::default();
        self.shards.iter().for_each(|shard| sum.merge(pick(&shard.metrics)));
        sum
    }

    /// The document of `/stats` and of `annulus stats --json`. Latencies in microseconds.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let sums = ShardMetrics {
            counters: self.counters(),
            read_latency: self.latency(|m| &m.read_latency),
            write_latency: self.latency(|m| &m.write_latency),
        };
        let shards: Vec<Value> = self
            .shards
            .iter()
            .map(|shard| {
                let mut document = numbers_json(&shard.metrics, &shard.gauges);
                document.insert("shard".into(), shard.shard.into());
                Value::Object(document)
            })
            .collect();
        let mut document = numbers_json(&sums, &self.gauges());
        document.insert("version".into(), self.version.clone().into());
        document.insert("node".into(), self.node.into());
        document.insert("cluster".into(), self.cluster.clone().into());
        document.insert("uptime_seconds".into(), self.uptime_seconds.into());
        document.insert("disk_free_bytes".into(), self.disk_free_bytes.into());
        document.insert("disk_total_bytes".into(), self.disk_total_bytes.into());
        document.insert("disk_level".into(), json!(self.disk_level));
        document.insert("process".into(), json!(self.process));
        document.insert("amplification".into(), self.amplification());
        document.insert("shards".into(), shards.into());
        Value::Object(document)
    }

    /// What the device does for what the user asked; null where nothing was asked yet.
    fn amplification(&self) -> Value {
        let c = self.counters();
        let part = |above: u64, below: u64| (below > 0).then(|| above as f64 / below as f64);
        let written = c.log_write_bytes + c.flush_write_bytes + c.compaction_write_bytes;
        json!({
            "disk_write_bytes": written,
            "disk_write_bytes_per_user_byte": part(written, c.user_write_bytes),
            "table_write_bytes_per_user_byte":
                part(c.flush_write_bytes + c.compaction_write_bytes, c.user_write_bytes),
            "disk_reads_per_get": part(c.device_reads, c.gets),
            "cache_hit_ratio": part(c.cache_hits, c.cache_hits + c.cache_misses),
        })
    }

    /// The text of `/metrics`, in Prometheus' exposition format 0.0.4.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        let mut text = String::with_capacity(16 << 10);
        for (index, (name, help, _)) in Counters::default().each().enumerate() {
            heading(&mut text, &format!("{name}_total"), help, "counter");
            for shard in &self.shards {
                let value = shard.metrics.counters.each().nth(index).map_or(0, |each| each.2);
                line(&mut text, &format!("{name}_total"), shard.shard, value);
            }
        }
        for (index, (name, help, _)) in Gauges::default().each().enumerate() {
            heading(&mut text, name, help, "gauge");
            for shard in &self.shards {
                let value = shard.gauges.each().nth(index).map_or(0, |each| each.2);
                line(&mut text, name, shard.shard, value);
            }
        }
        self.peer_refusals_to_prometheus(&mut text);
        self.waiting_for_to_prometheus(&mut text);
        self.members_to_prometheus(&mut text);
        self.latencies_to_prometheus(&mut text);
        let node: [(&str, &str, &str, String); 8] = [
            (
                "uptime_seconds",
                "Seconds since the node serves.",
                "gauge",
                self.uptime_seconds.to_string(),
            ),
            (
                "disk_free_bytes",
                "Free space of the data's file system.",
                "gauge",
                self.disk_free_bytes.to_string(),
            ),
            (
                "disk_total_bytes",
                "Size of the data's file system.",
                "gauge",
                self.disk_total_bytes.to_string(),
            ),
            (
                "disk_level",
                "0 ok, 1 pace, 2 refuse, 3 reserve.",
                "gauge",
                (self.disk_level as u8).to_string(),
            ),
            (
                "process_cpu_seconds_total",
                "CPU time of the process.",
                "counter",
                format!("{}", self.process.cpu_micros as f64 / 1e6),
            ),
            (
                "process_resident_bytes",
                "Resident memory.",
                "gauge",
                self.process.resident_bytes.to_string(),
            ),
            (
                "process_open_files",
                "Open file descriptors.",
                "gauge",
                self.process.open_files.to_string(),
            ),
            ("process_threads", "Threads.", "gauge", self.process.threads.to_string()),
        ];
        for (name, help, kind, value) in node {
            heading(&mut text, name, help, kind);
            writeln!(text, "annulus_{name} {value}").expect("a string takes all");
        }
        heading(&mut text, "build_info", "1, with the version as a label.", "gauge");
        writeln!(text, "annulus_build_info{{version=\"{}\"}} 1", self.version)
            .expect("a string takes all");
        text
    }

    fn peer_refusals_to_prometheus(&self, text: &mut String) {
        let name = "peer_refusals_by_reason_total";
        if self.shards.iter().any(|shard| !shard.peer_refusals.is_empty()) {
            let help = "Connections between nodes that were refused or ended, by reason.";
            heading(text, name, help, "counter");
        }
        for shard in &self.shards {
            for (reason, count) in &shard.peer_refusals {
                let number = shard.shard;
                writeln!(text, "annulus_{name}{{shard=\"{number}\",reason=\"{reason}\"}} {count}")
                    .expect("a string takes all");
            }
        }
    }

    fn members_to_prometheus(&self, text: &mut String) {
        // All shards are told the same.
        let members = self.shards.first().map_or(&[][..], |shard| &shard.members);
        let name = "member_status";
        if !members.is_empty() {
            let help = "0 alive, 1 suspect, 2 unreachable, 3 down, as gossip has it.";
            heading(text, name, help, "gauge");
        }
        for member in members {
            let (node, status) = (member.node, member.status as u8);
            writeln!(text, "annulus_{name}{{member=\"{node}\"}} {status}")
                .expect("a string takes all");
        }
    }

    fn waiting_for_to_prometheus(&self, text: &mut String) {
        let name = "tombstones_waiting_for";
        if self.shards.iter().any(|shard| !shard.tombstones_waiting_for.is_empty()) {
            let help = "Partitions whose tombstones wait for news of this node.";
            heading(text, name, help, "gauge");
        }
        for shard in &self.shards {
            for (node, count) in &shard.tombstones_waiting_for {
                let number = shard.shard;
                writeln!(text, "annulus_{name}{{shard=\"{number}\",node=\"{node}\"}} {count}")
                    .expect("a string takes all");
            }
        }
    }

    fn latencies_to_prometheus(&self, text: &mut String) {
        type Pick = fn(&ShardMetrics) -> &Latency;
        let all: [(&str, &str, Pick); 2] = [
            ("read_latency_seconds", "From a get's frame to its reply.", |m| &m.read_latency),
            ("write_latency_seconds", "From a write's frame to its reply.", |m| &m.write_latency),
        ];
        for (name, help, pick) in all {
            heading(text, name, help, "histogram");
            for shard in &self.shards {
                let latency = pick(&shard.metrics);
                // Powers of two of nanoseconds are borders of buckets, so the counts are exact:
                // 1 us to 8.6 s.
                for power in 10..=33 {
                    let le = (1u64 << power) as f64 / 1e9;
                    let below = latency.count_below_power(power);
                    writeln!(
                        text,
                        "annulus_{name}_bucket{{shard=\"{}\",le=\"{le}\"}} {below}",
                        shard.shard
                    )
                    .expect("a string takes all");
                }
                let shard = shard.shard;
                let (count, sum) = (latency.count(), latency.sum_nanos() as f64 / 1e9);
                writeln!(text, "annulus_{name}_bucket{{shard=\"{shard}\",le=\"+Inf\"}} {count}")
                    .and_then(|()| writeln!(text, "annulus_{name}_sum{{shard=\"{shard}\"}} {sum}"))
                    .and_then(|()| {
                        writeln!(text, "annulus_{name}_count{{shard=\"{shard}\"}} {count}")
                    })
                    .expect("a string takes all");
            }
        }
    }
}

fn numbers_json(metrics: &ShardMetrics, gauges: &Gauges) -> Map<String, Value> {
    let mut document = Map::new();
    document.insert("counters".into(), json!(metrics.counters));
    document.insert("gauges".into(), json!(gauges));
    document.insert(
        "latency_us".into(),
        json!({
            "read": metrics.read_latency.to_json(),
            "write": metrics.write_latency.to_json(),
        }),
    );
    document
}

fn heading(text: &mut String, name: &str, help: &str, kind: &str) {
    writeln!(text, "# HELP annulus_{name} {}\n# TYPE annulus_{name} {kind}", help.trim())
        .expect("a string takes all");
}

fn line(text: &mut String, name: &str, shard: u32, value: u64) {
    writeln!(text, "annulus_{name}{{shard=\"{shard}\"}} {value}").expect("a string takes all");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeSnapshot {
        let shard = |shard, gets| {
            let mut snapshot = ShardSnapshot { shard, ..ShardSnapshot::default() };
            snapshot.metrics.counters.gets = gets;
            snapshot.metrics.counters.device_reads = 1;
            snapshot.metrics.read_latency.record(1500);
            snapshot.gauges.tables = 2;
            snapshot
        };
        NodeSnapshot { shards: vec![shard(0, 3), shard(1, 5)], ..NodeSnapshot::default() }
    }

    #[test]
    fn json_has_sums_and_each_shard() {
        let document = node().to_json();
        assert_eq!(document["counters"]["gets"], 8);
        assert_eq!(document["gauges"]["tables"], 4);
        assert_eq!(document["shards"][1]["counters"]["gets"], 5);
        assert_eq!(document["latency_us"]["read"]["count"], 2);
        assert_eq!(document["amplification"]["disk_reads_per_get"], 0.25);
        assert!(document["amplification"]["disk_write_bytes_per_user_byte"].is_null());
    }

    #[test]
    fn prometheus_text_is_well_formed() {
        let text = node().to_prometheus();
        assert!(text.contains("\nannulus_gets_total{shard=\"1\"} 5\n"), "{text}");
        assert!(
            text.contains(
                "annulus_read_latency_seconds_bucket{shard=\"0\",le=\"0.000001024\"} 0\n"
            )
        );
        assert!(
            text.contains(
                "annulus_read_latency_seconds_bucket{shard=\"0\",le=\"0.000002048\"} 1\n"
            )
        );
        let mut announced = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert!(announced.insert(rest.split(' ').next().unwrap()), "{line}");
            } else if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let name = name.split('{').next().unwrap();
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
                assert!(announced.contains(name) || base.is_some_and(|n| announced.contains(n)));
            }
        }
    }

    #[test]
    fn the_process_can_be_read() {
        let process = Process::probe();
        assert!(process.resident_bytes > 0 && process.threads > 0 && process.open_files > 2);
        let stat = "7 (a (b) c) S 1 7 7 0 -1 0 1 2 3 4 150 50 0 0 20 0 9 0 100";
        assert_eq!(parse_stat(stat), Some((2_000_000, 9)));
    }
}
