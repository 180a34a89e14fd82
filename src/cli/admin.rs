//! `annulus ring`, `stats`, `status`, `repair` and `snapshot`: ask the server, print its answer.
//!
//! Invariant: `--json` prints the server's document as it is; the tables are made from it.

use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::time::SystemTime;

use annulus_engine::model::timestamp::EPOCH_UNIX_MICROS;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::arguments::{
    MemberArguments, RepairArguments, RingArguments, SnapshotArguments, SnapshotCommand,
    StatsArguments, StatusArguments,
};
use super::data::{key, moment};
use super::output::{Output, finish};
use super::remote::{self, TIMEOUT_LONG, connect, failure};
use super::{Exit, Failure, Outcome};
use crate::commands::{
    Command, Named, RepairQuery, RepairReply, Replica, RingQuery, RingReply, SnapshotReply,
    SnapshotRow, StatusReply, check_snapshot_name,
};
use crate::member_commands::Which;
use crate::units::Size;

fn print_json(document: &impl serde::Serialize) -> Outcome {
    let mut output = Output::stdout();
    let printed = output.json(document);
    finish(output, printed)?;
    Ok(Exit::Success)
}

fn print_table(header: &[&str], rows: &[Vec<String>]) -> Outcome {
    let mut output = Output::stdout();
    let printed = output.table(header, rows);
    finish(output, printed)?;
    Ok(Exit::Success)
}

pub(super) fn ring(arguments: RingArguments) -> Outcome {
    let key_base64 = match &arguments.key {
        Some(text) => Some(STANDARD.encode(key(text)?)),
        None => None,
    };
    let query =
        RingQuery { partition: arguments.partition, key_base64, ns: Some(arguments.namespace.ns) };
    let reply: RingReply = remote::command(&arguments.server, &Command::Ring(query))?;
    if arguments.server.json {
        let Some(text) = &arguments.key else { return print_json(&reply) };
        let row = reply.rows.first().ok_or_else(|| Failure::negative("no partition has it"))?;
        return print_json(&serde_json::json!({
            "key_base64": STANDARD.encode(text.as_bytes()),
            "token": reply.token,
            "partition": row.partition,
            "replicas": row.replicas,
            "fallbacks": row.fallbacks,
        }));
    }
    let rows: Vec<Vec<String>> = reply
        .rows
        .iter()
        .map(|row| {
            let one = arguments.key.is_some() || arguments.partition.is_some();
            let token = reply.token.clone().unwrap_or_else(|| "-".to_owned());
            let (first, last) = (row.first.clone(), row.last.clone());
            let (homes, others) = (replicas(&row.replicas, one), replicas(&row.fallbacks, one));
            vec![row.partition.to_string(), token, first, last, homes, others]
        })
        .collect();
    let header = ["PARTITION", "TOKEN", "FIRST", "LAST", "REPLICAS (NODE/SHARD)", "FALLBACKS"];
    print_table(&header, &rows)
}

/// Copies as `node/shard`, with the node's address where there is room for it.
fn replicas(copies: &[Replica], with_address: bool) -> String {
    let shown = |copy: &Replica| {
        let place = format!("{}/{}", copy.node, dash(copy.shard));
        match &copy.address {
            Some(address) if with_address => format!("{place}@{address}"),
            _ => place,
        }
    };
    if copies.is_empty() {
        return "-".to_owned();
    }
    copies.iter().map(shown).collect::<Vec<_>>().join(" ")
}

/// What is not known is a dash.
fn dash(value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Bytes kept for others, of how many.
fn kept_for_others((bytes, bytes_max): (u64, u64)) -> String {
    match bytes_max {
        0 => "0B".to_owned(),
        _ => format!("{} of {}", Size(bytes).rounded(), Size(bytes_max).rounded()),
    }
}

pub(super) fn status(arguments: StatusArguments) -> Outcome {
    let reply: StatusReply = remote::command(&arguments.server, &Command::Status)?;
    if arguments.server.json {
        return print_json(&reply);
    }
    let rows: Vec<Vec<String>> = reply
        .nodes
        .iter()
        .map(|node| {
            vec![
                node.id.to_string(),
                dash(node.address.as_ref()),
                node.dc.clone(),
                node.rack.clone(),
                node.state.clone(),
                dash(node.gossip.as_ref()),
                node.weight.to_string(),
                dash(node.shards),
                node.partitions.to_string(),
                dash(node.bytes.map(|bytes| Size(bytes).rounded())),
                dash(node.disk_level.as_ref()),
                dash(node.p99_us.map(|us| format!("{us:.0}us"))),
                dash(node.hints_owed),
                dash(node.hint_bytes.zip(node.hint_bytes_max).map(kept_for_others)),
                dash(node.as_of_lag_ms.map(|ms| format!("{ms}ms"))),
            ]
        })
        .collect();
    let header = [
        "ID",
        "ADDRESS",
        "DC",
        "RACK",
        "STATE",
        "GOSSIP",
        "WEIGHT",
        "SHARDS",
        "PARTITIONS",
        "BYTES",
        "DISK",
        "P99",
        "HINTS",
        "HINT BYTES",
        "LAG",
    ];
    print_table(&header, &rows)
}

/// What the server says of a change of members.
type Changed = serde_json::Map<String, serde_json::Value>;

pub(super) fn decommission(arguments: MemberArguments) -> Outcome {
    change_member(&arguments, &Command::MembersLeave(Which { node: arguments.node }))
}

pub(super) fn replace(arguments: MemberArguments) -> Outcome {
    change_member(&arguments, &Command::MembersReplace(Which { node: arguments.node }))
}

fn change_member(arguments: &MemberArguments, command: &Command) -> Outcome {
    let reply: Changed = remote::command(&arguments.server, command)?;
    match arguments.server.json {
        true => print_json(&reply),
        false => Ok(Exit::Success),
    }
}

pub(super) fn repair(arguments: RepairArguments) -> Outcome {
    let command = match arguments.status {
        true => Command::RepairStatus,
        false => Command::Repair(RepairQuery { namespace: arguments.ns, scrub: arguments.scrub }),
    };
    let reply: RepairReply = remote::command(&arguments.server, &command)?;
    let printed = match arguments.server.json {
        true => print_json(&reply),
        false => print_table(&["WHAT", "NUMBER"], &repair_rows(&reply)),
    };
    printed?;
    let shows_difference = arguments.status && !reply.converged;
    Ok(if shows_difference { Exit::Negative } else { Exit::Success })
}

fn repair_rows(reply: &RepairReply) -> Vec<Vec<String>> {
    let row = |what: &str, number: String| vec![what.to_owned(), number];
    vec![
        row("converged", if reply.converged { "yes" } else { "no" }.to_owned()),
        row("partitions", reply.partitions.to_string()),
        row("partitions in sync", reply.in_sync.to_string()),
        row("partitions behind", reply.behind.to_string()),
        row("partitions ahead", reply.ahead.to_string()),
        row("partitions unknown", reply.unknown.to_string()),
        row("partitions damaged", reply.damaged.to_string()),
        row("partitions kept for others", reply.hints.to_string()),
        row("writes lacked", reply.writes_lacked.to_string()),
        row("syncs under way", reply.syncs.to_string()),
        row("replicas to compare with", reply.pairs.to_string()),
        row("of them checked", reply.checked.to_string()),
        row("of them differing", reply.differing.to_string()),
        row("comparisons under way", reply.open.to_string()),
        row("keys found to differ", reply.keys_differing.to_string()),
        row("records repaired", reply.repaired.to_string()),
        row("records refilled", reply.refilled.to_string()),
        row("bytes of comparisons", Size(reply.bytes).rounded()),
        row("bytes read for them", Size(reply.read_bytes).rounded()),
        row("leaves left to scrub", reply.scrub_left.to_string()),
        row("bytes left to scrub", Size(reply.scrub_bytes_left).rounded()),
        row("damage found", reply.scrub_damaged.to_string()),
    ]
}

pub(super) fn stats(mut arguments: StatsArguments) -> Outcome {
    if let Some(node) = arguments.node.take() {
        arguments.server.addr = vec![node];
    }
    let client = connect(&arguments.server, TIMEOUT_LONG)?;
    let document: Value = remote::parse(&client.stats().map_err(failure)?)?;
    if arguments.server.json {
        return print_json(&document);
    }
    let mut output = Output::stdout();
    let printed = (|| {
        output.table(&STATS_HEADER, &stats_rows(&document))?;
        let figure = |path: &str| document.pointer(path).and_then(Value::as_f64);
        let shown = |path: &str| figure(path).map_or("-".to_owned(), |value| format!("{value:.3}"));
        writeln!(
            output,
            "\nuptime {}s, {} resident, disk {} ({} free)",
            figure("/uptime_seconds").unwrap_or(0.0),
            size(&document, "/process/resident_bytes"),
            document["disk_level"].as_str().unwrap_or("-"),
            size(&document, "/disk_free_bytes"),
        )?;
        writeln!(
            output,
            "device reads a get {}, device bytes written a user byte {}, cache hits {}",
            shown("/amplification/disk_reads_per_get"),
            shown("/amplification/disk_write_bytes_per_user_byte"),
            shown("/amplification/cache_hit_ratio"),
        )
    })();
    finish(output, printed)?;
    Ok(Exit::Success)
}

const STATS_HEADER: [&str; 13] = [
    "SHARD",
    "GETS",
    "HITS",
    "PUTS",
    "DELETES",
    "BUSY",
    "READ P50",
    "P99",
    "WRITE P50",
    "P99",
    "TABLES",
    "MEMTABLE",
    "CONNECTIONS",
];

fn size(document: &Value, path: &str) -> String {
    Size(document.pointer(path).and_then(Value::as_u64).unwrap_or(0)).rounded()
}

/// A row a shard, and one for all.
fn stats_rows(document: &Value) -> Vec<Vec<String>> {
    let shards = document["shards"].as_array().map(Vec::as_slice).unwrap_or_default();
    let row = |name: String, part: &Value| {
        let count =
            |path: &str| part.pointer(path).and_then(Value::as_u64).unwrap_or(0).to_string();
        let micros = |path: &str| {
            format!("{:.0}us", part.pointer(path).and_then(Value::as_f64).unwrap_or(0.0))
        };
        vec![
            name,
            count("/counters/gets"),
            count("/counters/get_hits"),
            count("/counters/puts"),
            count("/counters/deletes"),
            count("/counters/refused_busy"),
            micros("/latency_us/read/p50"),
            micros("/latency_us/read/p99"),
            micros("/latency_us/write/p50"),
            micros("/latency_us/write/p99"),
            count("/gauges/tables"),
            size(part, "/gauges/memtable_bytes"),
            count("/gauges/connections"),
        ]
    };
    let mut rows: Vec<Vec<String>> =
        shards.iter().map(|shard| row(shard["shard"].to_string(), shard)).collect();
    rows.push(row("all".to_owned(), document));
    rows
}

pub(super) fn snapshot(arguments: SnapshotArguments) -> Outcome {
    match arguments.command {
        SnapshotCommand::Create(create) => {
            let name = create.name.unwrap_or_else(name_of_now);
            check_snapshot_name(&name).map_err(Failure::usage)?;
            let command = Command::SnapshotCreate(Named { name });
            let row: SnapshotRow = remote::command(&create.server, &command)?;
            if create.server.json {
                return print_json(&row);
            }
            print_snapshots(&[row])
        }
        SnapshotCommand::List(only) => {
            let reply: SnapshotReply = remote::command(&only.server, &Command::SnapshotList)?;
            if only.server.json {
                return print_json(&reply);
            }
            print_snapshots(&reply.snapshots)
        }
        SnapshotCommand::Delete(named) => {
            check_snapshot_name(&named.name).map_err(Failure::usage)?;
            let command = Command::SnapshotDelete(Named { name: named.name });
            let reply: Value = remote::command(&named.server, &command)?;
            if named.server.json { print_json(&reply) } else { Ok(Exit::Success) }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a tool names a snapshot by the real clock")]
fn name_of_now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace(':', "-")
}

fn print_snapshots(snapshots: &[SnapshotRow]) -> Outcome {
    let rows: Vec<Vec<String>> = snapshots
        .iter()
        .map(|row| {
            let since_2024 = row.created_unix_ms.saturating_sub(EPOCH_UNIX_MICROS / 1000);
            vec![
                row.name.clone(),
                moment(since_2024.saturating_mul(1000)),
                Size(row.bytes).rounded(),
                row.path.clone(),
            ]
        })
        .collect();
    print_table(&["NAME", "CREATED", "BYTES", "PATH"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{NodeSnapshot, ShardSnapshot};

    #[test]
    fn stats_have_a_row_a_shard_and_one_for_all() {
        let mut shard = ShardSnapshot { shard: 1, ..ShardSnapshot::default() };
        shard.metrics.counters.gets = 5;
        shard.gauges.memtable_bytes = 2 << 20;
        let node = NodeSnapshot {
            shards: vec![ShardSnapshot::default(), shard],
            ..NodeSnapshot::default()
        };
        let rows = stats_rows(&node.to_json());
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|row| row.len() == STATS_HEADER.len()));
        assert_eq!(
            (rows[1][0].as_str(), rows[1][1].as_str(), rows[1][11].as_str()),
            ("1", "5", "2MiB")
        );
        assert_eq!((rows[2][0].as_str(), rows[2][1].as_str()), ("all", "5"));
    }

    #[test]
    fn a_snapshot_named_by_the_time_has_a_good_name() {
        check_snapshot_name(&name_of_now()).unwrap();
    }
}
