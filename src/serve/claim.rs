//! Taking the data directory: who this node is, from what the directory holds, or, in a new one,
//! from the system's generator or the cluster's key.
//!
//! Invariant: a directory that has data never gets another identity; what a first start leaves
//! when it is cut short is completed by the next.

use std::path::Path;

use annulus_cluster::NodeId;
use annulus_cluster::moves::ClusterMap;
use annulus_engine::disk::Disk;
use annulus_engine::driver::RingDisk;
use annulus_engine::identity::{self, Identity};
use annulus_engine::model::causality::ContextSecret;
use annulus_engine::model::{OriginId, WallMicros};
use annulus_engine::runtime::Runtime;

use super::node::{Node, NodeFacts};
use super::shard::dir_name;
use crate::cluster_key::ClusterKey;
use crate::config::Config;
use crate::members::Members;
use crate::namespaces::Catalogue;
use crate::registers::Registers;

/// File of the secret under which contexts are signed: 16 bytes.
const SECRET_NAME: &str = "SECRET";
/// File of the number of starts, as text.
const LIFE_NAME: &str = "LIFE";

/// Copies the secret into a snapshot.
pub(super) fn copy_secret(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::copy(from.join(SECRET_NAME), to.join(SECRET_NAME))
        .map(drop)
        .map_err(|error| format!("{SECRET_NAME}: {error}"))
}

/// Takes the data directory: lock, identity, secret, namespaces. Makes what a new one lacks.
pub(super) async fn claim(
    node: &Node,
    disk: &RingDisk,
    runtime: &impl Runtime,
) -> Result<(<RingDisk as Disk>::Lock, NodeFacts), String> {
    let config = node.config();
    let dir = &config.data_dir;
    let text = |error: annulus_engine::Error| error.to_string();
    disk.create_dir(dir).await.map_err(text)?;
    // Its name must outlive a power cut, as what is in it does.
    if let Some(above) = dir.parent() {
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        disk.sync_dir(above).await.map_err(text)?;
    }
    let lock = disk.lock(dir).await.map_err(text)?;
    let first = dir.join(dir_name(0));
    let existing = match Identity::open(disk, &first, None).await {
        Ok(identity) => Some(identity),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error.to_string()),
    };
    if let (Some(found), Some(wanted)) = (&existing, config.shards)
        && found.shard_count != wanted
    {
        return Err(format!(
            "{} was made with {} shards, not {wanted}: start it with --shards {}, or without \
             --shards",
            dir.display(),
            found.shard_count,
            found.shard_count
        ));
    }
    let space = disk.space(dir).await.map_err(text)?;
    if existing.is_none() {
        refuse_foreign(dir)?;
    }
    let kept = Catalogue::load(disk, dir).await.map_err(text)?;
    if kept.is_none() && facts_have_data(&first) {
        return Err(format!(
            "{} is missing, but there is data: restore it from a snapshot",
            dir.join(crate::namespaces::FILE_NAME).display()
        ));
    }
    let Begun { catalogue, own, shard_count } = match (kept, &existing) {
        // As it was left.
        (Some(kept), Some(found)) => {
            check_alone(&kept, config, dir)?;
            Begun { catalogue: kept, own: found.node, shard_count: None }
        }
        // A start that was cut short before it had an identity begins again.
        _ => {
            let begun = begin(node)?;
            begun.catalogue.save(disk, dir).await.map_err(text)?;
            begun
        }
    };
    let founding = catalogue.map().map(|map| map.founding);
    let key = founding.map(|founding| config.cluster_key(founding)).transpose()?;
    if let (Some(found), Some(key)) = (&existing, &key) {
        check_member(found, key, &catalogue, dir)?;
    }
    let secret = secret(dir, existing.is_some(), key.as_ref())?;
    let life = next_life(dir, runtime.wall())?;
    let facts = match existing {
        Some(found) => NodeFacts {
            cluster: found.cluster,
            node: found.node,
            hash_seed: found.hash_seed,
            partition_bits: found.partition_bits,
            shard_count: found.shard_count,
            created: found.created,
            secret,
            disk_total: space.total,
            founding,
            life,
        },
        None => {
            let random: [u64; 3] = random_numbers()?;
            NodeFacts {
                cluster: key.as_ref().map_or_else(
                    || u128::from(random[0]) << 64 | u128::from(random[1]),
                    ClusterKey::cluster,
                ),
                node: own,
                hash_seed: key.as_ref().map_or(random[2], ClusterKey::hash_seed),
                partition_bits: catalogue
                    .map()
                    .map_or(config.partition_bits, |map| map.partition_bits),
                shard_count: shard_count.unwrap_or_else(|| config.shard_count(None)),
                created: WallMicros(runtime.wall().0),
                secret,
                disk_total: space.total,
                founding,
                life,
            }
        }
    };
    node.set_catalogue(catalogue);
    if facts.founding.is_some() {
        let own = NodeId::from(facts.node);
        let registers = Registers::load(disk, dir, own).await.map_err(text)?;
        let registers = registers.unwrap_or_else(|| Registers::new(own));
        *node.registers.lock().await = Some(registers);
    }
    Ok((lock, facts))
}

/// A directory without identity may hold only what a first start leaves when it is cut short.
fn refuse_foreign(dir: &Path) -> Result<(), String> {
    let ours = |name: &str| {
        [SECRET_NAME, "SECRET.new", "LOCK", "NAMESPACES", "NAMESPACES.new", LIFE_NAME, "LIFE.new"]
            .contains(&name)
            || [crate::registers::FILE_NAME, crate::registers::FILE_NAME_NEW].contains(&name)
            || name.starts_with("shard-")
            || name == super::desk::SNAPSHOT_DIR
    };
    let entries = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    for entry in entries {
        let name = entry.map_err(|error| error.to_string())?.file_name();
        let name = name.to_string_lossy();
        if !ours(&name) {
            return Err(format!(
                "{} is not empty and no data directory: it holds {name}; choose another with \
                 --data-dir",
                dir.display()
            ));
        }
    }
    Ok(())
}

/// Whether the first shard's directory holds more than a first start that was cut short leaves.
fn facts_have_data(first: &Path) -> bool {
    first.join(identity::FILE_NAME).exists()
}

/// Reads the secret, or makes it in a new directory.
fn secret(dir: &Path, must_exist: bool, key: Option<&ClusterKey>) -> Result<ContextSecret, String> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = dir.join(SECRET_NAME);
    let fail = |error: std::io::Error| format!("{}: {error}", path.display());
    match std::fs::read(&path) {
        Ok(bytes) => {
            let halves: [u8; 16] = bytes.try_into().map_err(|bytes: Vec<u8>| {
                format!(
                    "{} has {} bytes, not 16: restore it from a snapshot, or remove it, which \
                     makes clients read again before they write with a context",
                    path.display(),
                    bytes.len()
                )
            })?;
            let half = |at: usize| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&halves[at..at + 8]);
                u64::from_le_bytes(bytes)
            };
            Ok(ContextSecret([half(0), half(8)]))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if must_exist {
                tracing::warn!("the secret is gone: contexts given out before are refused");
            }
            let secret = match key {
                Some(key) => key.secret(),
                None => {
                    let random = random_numbers()?;
                    [random[0], random[1]]
                }
            };
            let new = dir.join("SECRET.new");
            let mut options = std::fs::OpenOptions::new();
            options.create(true).write(true).truncate(true).mode(0o600);
            let mut file = options.open(&new).map_err(fail)?;
            file.write_all(&secret[0].to_le_bytes()).map_err(fail)?;
            file.write_all(&secret[1].to_le_bytes()).map_err(fail)?;
            file.sync_all().map_err(fail)?;
            std::fs::rename(&new, &path).map_err(fail)?;
            std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail)?;
            Ok(ContextSecret(secret))
        }
        Err(error) => Err(fail(error)),
    }
}

/// Numbers from the system's generator.
pub(super) fn random_numbers() -> Result<[u64; 3], String> {
    use std::io::Read as _;
    let mut bytes = [0; 24];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|error| format!("/dev/urandom: {error}"))?;
    let number = |at: usize| {
        let mut part = [0; 8];
        part.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(part)
    };
    Ok([number(0), number(8), number(16)])
}

/// What a node begins with.
pub(super) struct Begun {
    pub(super) catalogue: Catalogue,
    pub(super) own: OriginId,
    /// As many as the other members have, if it joins them.
    pub(super) shard_count: Option<u32>,
}

/// What a new directory begins with, and the id of its node: a node of its own, a member that founds
/// a cluster with the others of its list, or one that joins a living cluster, which says how many
/// shards it has.
fn begin(node: &Node) -> Result<Begun, String> {
    let config = node.config();
    let (join, advertise) = (config.join.as_slice(), config.advertise.as_deref());
    let catalogue = Catalogue::new(config.compression);
    if join.is_empty() {
        return Ok(Begun { catalogue, own: OriginId(1), shard_count: None });
    }
    if !Members::names(join, node.peer_address(), advertise) {
        return super::join::join(node);
    }
    let members = Members::resolve(join, node.peer_address(), advertise)?;
    let key = config.cluster_key(members.digest())?;
    let nodes = members.nodes().to_vec();
    let map = ClusterMap::found(key.cluster(), members.digest(), config.partition_bits, nodes);
    let own = OriginId(members.own().0);
    Ok(Begun { catalogue: catalogue.founded(map), own, shard_count: None })
}

/// Refuses to make a node of its own a member.
fn check_alone(kept: &Catalogue, config: &Config, dir: &Path) -> Result<(), String> {
    if kept.map().is_some() || config.join.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{} was made by a node of its own: a node joins with a new directory, and its data by \
         `annulus export` and `annulus import`",
        dir.display()
    ))
}

/// Refuses a directory of another cluster, or of a node that is no member any more.
fn check_member(
    found: &Identity,
    key: &ClusterKey,
    catalogue: &Catalogue,
    dir: &Path,
) -> Result<(), String> {
    if found.cluster != key.cluster() || found.hash_seed != key.hash_seed() {
        return Err(format!(
            "{} was made with another cluster key: see cluster-key-file",
            dir.display()
        ));
    }
    if catalogue.map().is_some_and(|map| map.member(NodeId(found.node.0)).is_none()) {
        return Err(format!(
            "{} is that of node {}, which was removed from its cluster and cannot come back: start \
             with a new --data-dir to join as another",
            dir.display(),
            found.node.0,
        ));
    }
    Ok(())
}

/// Counts this start. Durable when it returns, so that no two lives have one number. The count of a
/// new directory begins at the second in which it is made: a node that has lost its directory is
/// in a later life than any that its peers remember.
fn next_life(dir: &Path, wall: WallMicros) -> Result<u64, String> {
    use std::io::Write as _;
    let path = dir.join(LIFE_NAME);
    let fail = |error: std::io::Error| format!("{}: {error}", path.display());
    let life = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().map_err(|_| {
            format!("{}: not a number; write a greater one than it ever was", path.display())
        })?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => wall.0 / 1_000_000,
        Err(error) => return Err(fail(error)),
    };
    let life = life.saturating_add(1);
    let new = dir.join("LIFE.new");
    let mut file = std::fs::File::create(&new).map_err(fail)?;
    writeln!(file, "{life}").map_err(fail)?;
    file.sync_all().map_err(fail)?;
    std::fs::rename(&new, &path).map_err(fail)?;
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail)?;
    Ok(life)
}
