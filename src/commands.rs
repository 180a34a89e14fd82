//! The named commands of an ADMIN request: what `annulus ns`, `ring`, `status` and `snapshot`
//! ask, and what they get. Both sides of the wire use this file, so they cannot disagree.
//!
//! Invariant: pure. A command that changes something returns what is to be kept; the server
//! keeps it durably before it answers. Arguments and replies are JSON.

use std::collections::BTreeSet;

use annulus_cluster::membership::MemberView;
use annulus_engine::model::{PartitionId, Token};
use annulus_net::wire::Status;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Compression;
use crate::member_commands::{LEAVE, REPLACE, Which};
use crate::metrics::NodeSnapshot;
use crate::namespaces::{Catalogue, Refusal, Settings};

/// Longest name of a snapshot, in bytes.
pub const SNAPSHOT_NAME_SIZE_MAX: usize = 64;

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `ns.list`: all namespaces.
    NsList,
    /// `ns.create`: a new namespace.
    NsCreate(NsChange),
    /// `ns.set`: new settings of a namespace.
    NsSet(NsChange),
    /// `ns.drop`: a namespace and all its records go away.
    NsDrop(Named),
    /// `status`: one row a node.
    Status,
    /// `ring`: who holds what.
    Ring(RingQuery),
    /// `repair`: compares the partitions of the node with their other replicas.
    Repair(RepairQuery),
    /// `repair.status`: how far the replicas agree.
    RepairStatus,
    /// `members.leave`: a member's partitions go to the others, and its process ends.
    MembersLeave(Which),
    /// `members.replace`: a member that will not come back is given up.
    MembersReplace(Which),
    /// `snapshot.create`: hard links of all shards' files, under a name.
    SnapshotCreate(Named),
    /// `snapshot.list`: all snapshots.
    SnapshotList,
    /// `snapshot.delete`: one snapshot goes away.
    SnapshotDelete(Named),
}

/// Arguments that name something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// The name.
    pub name: String,
}

/// Arguments of `ns.create` and `ns.set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NsChange {
    /// The namespace.
    pub name: String,
    /// What to set.
    #[serde(default)]
    pub settings: Settings,
}

/// Arguments of `ring`: one partition, one key, or neither for all partitions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RingQuery {
    /// Only this partition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// The partition of this key, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_base64: Option<String>,
    /// With as many copies as this namespace has; none is `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ns: Option<String>,
}

/// Arguments of `repair`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RepairQuery {
    /// Only what is compared together with this namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Whether all records are read as well, to check them.
    pub scrub: bool,
}

impl Command {
    /// Reads a command as it came.
    ///
    /// # Errors
    /// What is wrong with it; nothing was done.
    pub fn parse(command: &str, arguments: &str) -> Result<Command, String> {
        Ok(match command {
            "ns.list" => Command::NsList,
            "ns.create" => Command::NsCreate(read(arguments)?),
            "ns.set" => Command::NsSet(read(arguments)?),
            "ns.drop" => Command::NsDrop(read(arguments)?),
            "status" => Command::Status,
            "ring" => Command::Ring(read(arguments)?),
            "repair" => Command::Repair(read(arguments)?),
            "repair.status" => Command::RepairStatus,
            LEAVE => Command::MembersLeave(read(arguments)?),
            REPLACE => Command::MembersReplace(read(arguments)?),
            "snapshot.create" => Command::SnapshotCreate(snapshot_name(arguments)?),
            "snapshot.list" => Command::SnapshotList,
            "snapshot.delete" => Command::SnapshotDelete(snapshot_name(arguments)?),
            _ => return Err(format!("unknown command `{}`", command.escape_debug())),
        })
    }

    /// The command's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Command::NsList => "ns.list",
            Command::NsCreate(_) => "ns.create",
            Command::NsSet(_) => "ns.set",
            Command::NsDrop(_) => "ns.drop",
            Command::Status => "status",
            Command::Ring(_) => "ring",
            Command::Repair(_) => "repair",
            Command::RepairStatus => "repair.status",
            Command::MembersLeave(_) => LEAVE,
            Command::MembersReplace(_) => REPLACE,
            Command::SnapshotCreate(_) => "snapshot.create",
            Command::SnapshotList => "snapshot.list",
            Command::SnapshotDelete(_) => "snapshot.delete",
        }
    }

    /// The command's arguments.
    #[must_use]
    pub fn arguments(&self) -> String {
        let value = match self {
            Command::NsList | Command::Status | Command::RepairStatus | Command::SnapshotList => {
                json!({})
            }
            Command::NsCreate(change) | Command::NsSet(change) => json!(change),
            Command::NsDrop(named)
            | Command::SnapshotCreate(named)
            | Command::SnapshotDelete(named) => json!(named),
            Command::Ring(query) => json!(query),
            Command::Repair(query) => json!(query),
            Command::MembersLeave(which) | Command::MembersReplace(which) => json!(which),
        };
        value.to_string()
    }

    /// Whether the command changes something, so that a lost answer leaves doubt.
    #[must_use]
    pub fn changes(&self) -> bool {
        !matches!(
            self,
            Command::NsList
                | Command::Status
                | Command::RepairStatus
                | Command::Repair(_)
                | Command::Ring(_)
                | Command::SnapshotList
        )
    }
}

fn read<T: DeserializeOwned>(arguments: &str) -> Result<T, String> {
    let arguments = if arguments.trim().is_empty() { "{}" } else { arguments };
    serde_json::from_str(arguments).map_err(|error| format!("bad arguments: {error}"))
}

/// A snapshot's name becomes a directory's, so it is checked like one.
fn snapshot_name(arguments: &str) -> Result<Named, String> {
    let named: Named = read(arguments)?;
    check_snapshot_name(&named.name)?;
    Ok(named)
}

/// Whether a snapshot may have this name.
///
/// # Errors
/// What is allowed.
pub fn check_snapshot_name(name: &str) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if (1..=SNAPSHOT_NAME_SIZE_MAX).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('.')
    {
        return Ok(());
    }
    Err(format!(
        "`{}` is no name of a snapshot: 1 to {SNAPSHOT_NAME_SIZE_MAX} letters, digits, `-`, `_` \
         or `.`, not beginning with a dot",
        name.escape_debug()
    ))
}

impl Refusal {
    /// Status with which the server answers a refused command. FAILED means that what was named
    /// exists already, or does not exist: the tool then exits with 1.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Refusal::Exists(_) | Refusal::NotFound(_) => Status::FAILED,
            Refusal::Invalid(_) => Status::BAD_REQUEST,
        }
    }
}

/// What a namespace command comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct NsOutcome {
    /// The catalogue to save, durably, before the reply is sent; none when nothing changed.
    pub changed: Option<Catalogue>,
    /// The reply.
    pub reply: Value,
}

/// Carries out a namespace command on a copy of the catalogue. None for other commands.
///
/// # Errors
/// [`Refusal`]; nothing changed.
pub fn apply_to_namespaces(
    command: &Command,
    catalogue: &Catalogue,
    compression: Compression,
) -> Option<Result<NsOutcome, Refusal>> {
    let mut changed = catalogue.clone();
    let done = match command {
        Command::NsList => {
            let namespaces: Vec<_> = catalogue.iter().collect();
            let reply = json!({ "namespaces": namespaces });
            return Some(Ok(NsOutcome { changed: None, reply }));
        }
        Command::NsCreate(change) => {
            changed.create(&change.name, &change.settings, compression).map(drop)
        }
        Command::NsSet(change) => changed.set(&change.name, &change.settings),
        Command::NsDrop(named) => {
            let dropped = changed.drop(&named.name);
            let outcome = dropped.map(|id| NsOutcome {
                changed: Some(changed),
                reply: json!({ "dropped": named.name, "id": id.0 }),
            });
            return Some(outcome);
        }
        _ => return None,
    };
    let name = match command {
        Command::NsCreate(change) | Command::NsSet(change) => &change.name,
        _ => return None,
    };
    Some(done.map(|()| {
        let reply = json!(changed.by_name(name));
        NsOutcome { changed: Some(changed), reply }
    }))
}

/// Carries out a namespace command, given as it travels, on a copy of the catalogue.
///
/// # Errors
/// Why it is refused; nothing changed.
pub fn apply_named_to_namespaces(
    command: &str,
    arguments: &str,
    catalogue: &Catalogue,
    compression: Compression,
) -> Result<NsOutcome, (Status, String)> {
    if crate::member_commands::is_one(command) {
        return crate::member_commands::apply(command, arguments, catalogue);
    }
    let command = Command::parse(command, arguments).map_err(|what| (Status::BAD_REQUEST, what))?;
    apply_to_namespaces(&command, catalogue, compression)
        .ok_or_else(|| (Status::FAILED, "not a namespace command".to_owned()))?
        .map_err(|refusal| (refusal.status(), refusal.to_string()))
}

/// One row of `annulus status`. What is not known of a member is null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeRow {
    /// The node's id.
    pub id: u32,
    /// Where clients reach it.
    pub address: Option<String>,
    /// Its data centre.
    pub dc: String,
    /// Its rack.
    pub rack: String,
    /// `up`, `draining`; `joining`, `leaving`, `replaced` while members change; `unreachable`: not
    /// from the node that was asked, but from another; `down`: from none of those that answered.
    pub state: String,
    /// Its share of the data.
    pub weight: u32,
    /// Shards.
    pub shards: Option<u32>,
    /// Partitions of which it holds a copy.
    pub partitions: u32,
    /// Bytes of its tables and logs.
    pub bytes: Option<u64>,
    /// `ok`, `pace`, `refuse`, `reserve`.
    pub disk_level: Option<String>,
    /// p99 of gets and writes since the node serves, in microseconds, the greater one.
    pub p99_us: Option<f64>,
    /// Writes that it keeps for others, and that some home has not said to have.
    pub hints_owed: Option<u64>,
    /// Bytes that it keeps for others.
    pub hint_bytes: Option<u64>,
    /// Most bytes that it would keep for others.
    pub hint_bytes_max: Option<u64>,
    /// How far its data may lag behind, in milliseconds: of the partition that lags most.
    pub as_of_lag_ms: Option<u64>,
    /// What the node that was asked believes of it, as gossip has it: `alive`, `suspect`,
    /// `unreachable`, `down`. Null outside a cluster.
    pub gossip: Option<String>,
    /// Counts its starts (high half) and its contradictions since (low half).
    pub incarnation: Option<u64>,
    /// Its heartbeat counter, as it was last heard of.
    pub heartbeat: Option<u64>,
}

/// The reply of `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReply {
    /// Id of the cluster, in hex.
    pub cluster: String,
    /// One row a node.
    pub nodes: Vec<NodeRow>,
    /// Partitions that are not yet where they belong since members have changed.
    #[serde(default)]
    pub partitions_left: usize,
}

/// What a node knows of itself that its metrics do not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where clients reach it.
    pub address: String,
    /// Its data centre.
    pub dc: String,
    /// Its rack.
    pub rack: String,
    /// `up` or `draining`.
    pub state: &'static str,
    /// Its share of the data.
    pub weight: u32,
    /// The ring has two to this many partitions.
    pub partition_bits: u32,
}

impl StatusReply {
    /// One node's own row, as if it were alone.
    #[must_use]
    pub fn of_one(placement: &Placement, node: &NodeSnapshot) -> StatusReply {
        let gauges = node.gauges();
        let p99 = node
            .shards
            .iter()
            .flat_map(|s| [&s.metrics.read_latency, &s.metrics.write_latency])
            .map(|latency| latency.quantile_nanos(0.99))
            .max()
            .unwrap_or(0);
        let level = json!(node.disk_level);
        let standings = || node.shards.iter().map(|shard| shard.standing);
        let sum = standings()
            .map(|it| it.hints_owed)
            .try_fold(0u64, |sum, owed| owed.map(|owed| sum.saturating_add(owed)));
        let lags: Option<Vec<u64>> = standings().map(|it| it.as_of_lag_ms).collect();
        let lag = lags.map(|lags| lags.into_iter().max().unwrap_or(0));
        let row = NodeRow {
            id: node.node,
            address: Some(placement.address.clone()),
            dc: placement.dc.clone(),
            rack: placement.rack.clone(),
            state: placement.state.to_owned(),
            weight: placement.weight,
            shards: Some(u32::try_from(node.shards.len()).unwrap_or(u32::MAX)),
            partitions: 1 << placement.partition_bits,
            bytes: Some(gauges.table_bytes + gauges.log_replay_bytes),
            disk_level: level.as_str().map(str::to_owned),
            p99_us: Some(p99 as f64 / 1000.0),
            hints_owed: sum,
            hint_bytes: Some(gauges.hint_bytes),
            hint_bytes_max: Some(gauges.hint_bytes_max),
            as_of_lag_ms: lag,
            gossip: None,
            incarnation: None,
            heartbeat: None,
        };
        StatusReply { cluster: node.cluster.clone(), nodes: vec![row], partitions_left: 0 }
    }
}

/// What every member knows of another without asking it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberFacts {
    /// The node's id.
    pub id: u32,
    /// Where clients reach it, if it has ever said so.
    pub address: Option<String>,
    /// Shards, if it has ever said so.
    pub shards: Option<u32>,
    /// Its data centre.
    pub dc: String,
    /// Its rack.
    pub rack: String,
    /// Its share of the data.
    pub weight: u32,
    /// Partitions of which it has a copy.
    pub partitions: u32,
    /// What it is to the cluster, if it is more than a member: `joining`, `leaving`, `replaced`.
    pub changing: Option<&'static str>,
    /// What gossip says of it.
    pub gossip: Option<MemberView>,
}

/// What a member says of itself when another is asked for the status.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its own row.
    pub row: NodeRow,
    /// Members that it can reach.
    pub reaches: BTreeSet<u32>,
}

impl StatusReply {
    /// The status of the whole cluster, from a node's own and what the others told.
    #[must_use]
    pub fn with_members(mut self, members: &[MemberFacts], told: &[MemberStatus]) -> StatusReply {
        let mut known = std::mem::take(&mut self.nodes);
        known.extend(told.iter().map(|status| status.row.clone()));
        let with_gossip = |member: &MemberFacts, row: NodeRow| NodeRow {
            gossip: member.gossip.map(|view| view.status.name().to_owned()),
            incarnation: member.gossip.map(|view| view.incarnation),
            heartbeat: member.gossip.map(|view| view.heartbeat),
            ..row
        };
        let row = |member: &MemberFacts| match known.iter().find(|row| row.id == member.id) {
            Some(row) => NodeRow {
                partitions: member.partitions,
                state: member.changing.map_or_else(|| row.state.clone(), str::to_owned),
                ..row.clone()
            },
            None => {
                let is_reached = told.iter().any(|status| status.reaches.contains(&member.id));
                NodeRow {
                    id: member.id,
                    address: member.address.clone(),
                    dc: member.dc.clone(),
                    rack: member.rack.clone(),
                    state: if is_reached { "unreachable" } else { "down" }.to_owned(),
                    weight: member.weight,
                    shards: member.shards,
                    partitions: member.partitions,
                    bytes: None,
                    disk_level: None,
                    p99_us: None,
                    hints_owed: None,
                    hint_bytes: None,
                    hint_bytes_max: None,
                    as_of_lag_ms: None,
                    gossip: None,
                    incarnation: None,
                    heartbeat: None,
                }
            }
        };
        self.nodes = members.iter().map(|member| with_gossip(member, row(member))).collect();
        self
    }
}

/// The reply of `repair` and `repair.status`: how far the replicas agree, as one node knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairReply {
    /// The node.
    pub node: u32,
    /// All holders of all partitions have seen the same writes, and nothing is damaged.
    pub converged: bool,
    /// Partitions that the node holds. The next four add up to it.
    pub partitions: u64,
    /// All holders have seen the same writes.
    pub in_sync: u64,
    /// The node lacks writes.
    pub behind: u64,
    /// Only others lack writes.
    pub ahead: u64,
    /// A holder has not been heard.
    pub unknown: u64,
    /// With a range that cannot be read here.
    pub damaged: u64,
    /// Of which the node keeps records for their holders.
    pub hints: u64,
    /// Writes that the node lacks.
    pub writes_lacked: u64,
    /// Syncs under way.
    pub syncs: u64,
    /// Pairs of a partition and another holder.
    pub pairs: u64,
    /// Of them compared whole in their last round.
    pub checked: u64,
    /// Of them different in their last round.
    pub differing: u64,
    /// Comparisons under way.
    pub open: u64,
    /// Comparisons that ended.
    pub rounds: u64,
    /// Keys ever found to differ.
    pub keys_differing: u64,
    /// Records mended here by comparisons.
    pub repaired: u64,
    /// Records fetched because a block could not be read.
    pub refilled: u64,
    /// Bytes of messages of comparisons, both ways.
    pub bytes: u64,
    /// Bytes of records read for it.
    pub read_bytes: u64,
    /// Leaves that a scrub on demand has still to read.
    pub scrub_left: u64,
    /// The same in bytes, for a node of its own.
    #[serde(default)]
    pub scrub_bytes_left: u64,
    /// Damage that comparisons and scrubbing have met.
    #[serde(default)]
    pub scrub_damaged: u64,
}

impl RepairReply {
    /// What the node's numbers say.
    #[must_use]
    pub fn of_node(node: &NodeSnapshot) -> RepairReply {
        let (gauges, counters) = (node.gauges(), node.counters());
        let away = gauges.partitions_behind
            + gauges.partitions_ahead
            + gauges.partitions_unknown
            + gauges.partitions_hosted
            + gauges.partitions_damaged
            + gauges.ranges_unreadable
            + gauges.repair_differing;
        RepairReply {
            node: node.node,
            converged: away == 0,
            partitions: gauges.partitions_held,
            in_sync: gauges.partitions_in_sync,
            behind: gauges.partitions_behind,
            ahead: gauges.partitions_ahead,
            unknown: gauges.partitions_unknown,
            damaged: gauges.partitions_damaged,
            hints: gauges.partitions_hosted,
            writes_lacked: gauges.writes_lacked,
            syncs: gauges.syncs,
            pairs: gauges.repair_pairs,
            checked: gauges.repair_checked,
            differing: gauges.repair_differing,
            open: gauges.repair_open,
            rounds: counters.repair_rounds,
            keys_differing: counters.repair_keys_differing,
            repaired: counters.repaired_records,
            refilled: counters.refilled_records,
            bytes: counters.repair_bytes,
            read_bytes: counters.repair_read_bytes,
            scrub_left: gauges.scrub_demanded,
            scrub_bytes_left: gauges.scrub_bytes_left,
            scrub_damaged: counters.scrub_damaged,
        }
    }
}

/// One copy of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The node.
    pub node: u32,
    /// The shard on that node; null until it has said how many it has.
    pub shard: Option<u32>,
    /// Where clients reach that node; null until it has said so.
    pub address: Option<String>,
}

/// Who holds a partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// Its homes, in the order of the walk.
    pub replicas: Vec<Replica>,
    /// Who stands in for them, in order.
    pub fallbacks: Vec<Replica>,
}

/// One partition and its copies, in the order of preference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingRow {
    /// The partition.
    pub partition: u32,
    /// Its first token, 16 hex digits.
    pub first: String,
    /// Its last token.
    pub last: String,
    /// Its homes, in order of preference.
    pub replicas: Vec<Replica>,
    /// Who stands in for them when they cannot be reached, in order.
    pub fallbacks: Vec<Replica>,
}

/// The reply of `ring`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingReply {
    /// The ring has two to this many partitions.
    pub partition_bits: u32,
    /// Token of the key that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub token: Option<String>,
    /// The partitions that were asked for.
    pub rows: Vec<RingRow>,
}

impl RingReply {
    /// Answers a query. `copies` names the holders of a partition.
    ///
    /// # Errors
    /// The partition is not on the ring, or the key is not base64.
    pub fn answer(
        query: &RingQuery,
        partition_bits: u32,
        hash_seed: u64,
        copies: impl Fn(PartitionId) -> Copies,
    ) -> Result<RingReply, String> {
        use base64::Engine as _;
        let row = |partition: PartitionId| {
            let range = partition.range(partition_bits);
            let Copies { replicas, fallbacks } = copies(partition);
            RingRow {
                partition: partition.0,
                first: range.first.to_string(),
                last: range.last.to_string(),
                replicas,
                fallbacks,
            }
        };
        let count = 1u32 << partition_bits;
        if let Some(key) = &query.key_base64 {
            let key = base64::engine::general_purpose::STANDARD
                .decode(key)
                .map_err(|error| format!("the key is not base64: {error}"))?;
            let token = Token::of_key(&key, hash_seed);
            let rows = vec![row(token.partition(partition_bits))];
            return Ok(RingReply { partition_bits, token: Some(token.to_string()), rows });
        }
        let rows = match query.partition {
            Some(partition) if partition < count => vec![row(PartitionId(partition))],
            Some(partition) => {
                return Err(format!("partition {partition} is not on a ring of {count}"));
            }
            None => (0..count).map(|partition| row(PartitionId(partition))).collect(),
        };
        Ok(RingReply { partition_bits, token: None, rows })
    }
}

/// One snapshot, in the reply of `snapshot.list` and `snapshot.create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRow {
    /// Its name.
    pub name: String,
    /// When it was made, milliseconds of Unix time.
    pub created_unix_ms: u64,
    /// Sum of its files' sizes; most share their space with the live data.
    pub bytes: u64,
    /// Where it is; can be served with `--data-dir` after the original is stopped.
    pub path: String,
}

/// The reply of `snapshot.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReply {
    /// All snapshots by name.
    pub snapshots: Vec<SnapshotRow>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_travels_unchanged() {
        let settings = Settings { n: Some(5), ttl_ms: Some(9), ..Settings::default() };
        for command in [
            Command::NsList,
            Command::NsCreate(NsChange { name: "a".into(), settings: settings.clone() }),
            Command::NsSet(NsChange { name: "a".into(), settings }),
            Command::NsDrop(Named { name: "a".into() }),
            Command::Status,
            Command::Ring(RingQuery { partition: Some(3), ..RingQuery::default() }),
            Command::SnapshotCreate(Named { name: "monday".into() }),
            Command::SnapshotList,
            Command::SnapshotDelete(Named { name: "monday".into() }),
        ] {
            assert_eq!(Command::parse(command.name(), &command.arguments()), Ok(command));
        }
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for (command, arguments) in [
            ("ns.explode", "{}"),
            ("ns.create", ""),
            ("ns.create", "{\"name\":1}"),
            ("ns.create", "{\"name\":\"a\",\"settings\":{\"nn\":1}}"),
            ("ns.drop", "[["),
            ("snapshot.create", "{\"name\":\"../x\"}"),
            ("snapshot.create", "{\"name\":\".hidden\"}"),
            ("snapshot.delete", "{\"name\":\"\"}"),
        ] {
            assert!(Command::parse(command, arguments).is_err(), "{command} {arguments}");
        }
    }

    #[test]
    fn namespace_commands_leave_the_old_catalogue_alone() {
        let catalogue = Catalogue::new(Compression::None);
        let create = Command::parse("ns.create", "{\"name\":\"a\"}").unwrap();
        let apply = |command: &Command, catalogue: &Catalogue| {
            apply_to_namespaces(command, catalogue, Compression::Zstd).unwrap()
        };
        let created = apply(&create, &catalogue).unwrap();
        assert_eq!(
            (&created.reply["id"], &created.reply["compression"]),
            (&json!(1), &json!("zstd"))
        );
        assert!(catalogue.by_name("a").is_none());
        let catalogue = created.changed.unwrap();
        assert_eq!(apply(&create, &catalogue), Err(Refusal::Exists("a".into())));
        let listed = apply(&Command::NsList, &catalogue).unwrap();
        assert!(listed.changed.is_none());
        assert_eq!(listed.reply["namespaces"].as_array().unwrap().len(), 2);
        let drop = Command::NsDrop(Named { name: "a".into() });
        assert_eq!(apply(&drop, &catalogue).unwrap().reply["id"], 1);
        assert!(apply_to_namespaces(&Command::Status, &catalogue, Compression::None).is_none());
    }

    #[test]
    fn the_ring_answers_for_keys_partitions_and_all() {
        let copies = |partition: PartitionId| {
            let own = Replica { node: 1, shard: Some(partition.0 % 2), address: None };
            Copies { replicas: vec![own], fallbacks: Vec::new() }
        };
        let ask = |query: RingQuery| RingReply::answer(&query, 4, 7, copies);
        let all = ask(RingQuery::default()).unwrap();
        assert_eq!((all.rows.len(), all.rows[15].last.as_str()), (16, "ffffffffffffffff"));
        let key = RingQuery { key_base64: Some("aGVsbG8=".into()), ..RingQuery::default() };
        let reply = ask(key).unwrap();
        let token = Token::of_key(b"hello", 7);
        assert_eq!(reply.token, Some(token.to_string()));
        assert_eq!(reply.rows, vec![all.rows[token.partition(4).0 as usize].clone()]);
        assert!(ask(RingQuery { partition: Some(16), ..RingQuery::default() }).is_err());
        assert!(ask(RingQuery { key_base64: Some("?".into()), ..RingQuery::default() }).is_err());
    }
}
