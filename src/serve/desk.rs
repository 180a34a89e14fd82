//! The desk: carries out ADMIN commands and STATS for the whole node.
//!
//! Invariant: a change is durable before it is answered, and all shards know of it by then.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use annulus_cluster::NodeId;
use annulus_engine::driver::RingDisk;
use annulus_engine::model::{PartitionId, WallMicros};
use annulus_net::wire::status::Status;
use futures_channel::mpsc;
use futures_channel::oneshot;
use futures_util::StreamExt as _;
use serde_json::json;

use super::map::ClientFacts;
use super::node::{Ask, Node, NodeFacts, State};
use crate::admin::Source as _;
use crate::commands::{
    Command, Copies, NsOutcome, Placement, RepairReply, Replica, RingReply, SnapshotReply,
    SnapshotRow, StatusReply, apply_named_to_namespaces, apply_to_namespaces,
};
use crate::metrics::NodeSnapshot;
use crate::namespaces::{Catalogue, DEFAULT_NAME};
use crate::pump::{AdminDesk, AdminJob, ShardMap, Vote};

/// Directory of the snapshots inside the data directory.
pub(crate) const SNAPSHOT_DIR: &str = "snapshots";

type Reply = Result<Vec<u8>, (Status, String)>;

/// The desk, as one shard sees it.
#[derive(Clone)]
pub(crate) struct Desk {
    pub(crate) node: Arc<Node>,
    pub(crate) disk: RingDisk,
}

impl AdminDesk for Desk {
    fn begin(&self, command: &str, arguments: &str) -> AdminJob {
        if command == "stats" {
            let desk = self.clone();
            return Box::pin(async move { Ok(desk.numbers().await.to_json().to_string().into()) });
        }
        let command = Command::parse(command, arguments);
        let desk = self.clone();
        Box::pin(async move {
            match command {
                Ok(command) => desk.carry_out(command).await,
                Err(what) => Err((Status::BAD_REQUEST, what)),
            }
        })
    }

    fn client_address(&self) -> String {
        self.node.client_address()
    }

    fn note_client(&self, node: NodeId, address: &str, shard_count: u32) {
        self.node.note_client(node, ClientFacts { address: address.to_owned(), shard_count });
    }

    fn catalogue(&self) -> Catalogue {
        (*self.node.catalogue()).clone()
    }

    fn apply(
        &self,
        command: &str,
        arguments: &str,
        catalogue: &Catalogue,
    ) -> Result<NsOutcome, (Status, String)> {
        let compression = self.node.config().compression;
        apply_named_to_namespaces(command, arguments, catalogue, compression)
    }

    fn vote(&self, wall: WallMicros, request: &[u8]) -> Vote {
        let (desk, request) = (self.clone(), request.to_vec());
        Box::pin(async move {
            let mut registers = desk.node.registers.lock().await;
            let registers = registers.as_mut().ok_or("this node is on its own")?;
            let (dir, known) = (&desk.node.config().data_dir, desk.node.catalogue());
            let vote = registers.vote(&desk.disk, dir, wall, &request, &known).await;
            vote.map_err(|no_vote| no_vote.to_string())
        })
    }

    fn adopt_catalogue(&self, bytes: &[u8]) -> AdminJob {
        let (desk, bytes) = (self.clone(), bytes.to_vec());
        Box::pin(async move {
            let path = desk.node.config().data_dir.join(crate::namespaces::FILE_NAME);
            let catalogue = Catalogue::decode(&bytes, &path).map_err(failed)?;
            let _one_change_at_a_time = desk.node.changing.lock().await;
            if catalogue.generation() > desk.node.catalogue().generation() {
                catalogue.save(&desk.disk, &desk.node.config().data_dir).await.map_err(failed)?;
                desk.node.set_catalogue(catalogue);
            }
            Ok(Vec::new())
        })
    }
}

fn failed(what: impl std::fmt::Display) -> (Status, String) {
    (Status::FAILED, what.to_string())
}

impl Desk {
    /// The numbers of all shards.
    async fn numbers(&self) -> NodeSnapshot {
        let (reply, mut replies) = mpsc::unbounded();
        let mut left = self.node.ask_all(|_| Ask::Snapshot(reply.clone()));
        drop(reply);
        let mut numbers = self.node.describe();
        while left > 0
            && let Some(shard) = replies.next().await
        {
            numbers.shards.push(shard);
            left -= 1;
        }
        numbers.shards.sort_by_key(|shard| shard.shard);
        numbers
    }

    async fn carry_out(&self, command: Command) -> Reply {
        let facts = self.node.facts().ok_or_else(|| failed("the node is starting"))?;
        match &command {
            Command::Status => {
                let status = StatusReply::of_one(&self.placement(facts), &self.numbers().await);
                Ok(json!(status).to_string().into())
            }
            Command::Ring(query) => {
                // A member of a cluster answers from its topology: see the pump.
                let name = query.ns.as_deref().unwrap_or(DEFAULT_NAME);
                if self.node.catalogue().by_name(name).is_none() {
                    let name = name.escape_debug();
                    return Err(failed(format!("there is no namespace `{name}`")));
                }
                let map = ShardMap::new(0, facts.shard_count, facts.partition_bits);
                let copies = |partition: PartitionId| {
                    let shard = map.shard_of_partition(partition.0);
                    let address = Some(self.node.client_address());
                    let own = Replica { node: facts.node.0, shard: Some(shard), address };
                    Copies { replicas: vec![own], fallbacks: Vec::new() }
                };
                let ring = RingReply::answer(query, facts.partition_bits, facts.hash_seed, copies);
                let ring = ring.map_err(|what| (Status::BAD_REQUEST, what))?;
                Ok(json!(ring).to_string().into())
            }
            Command::Repair(query) => {
                let catalogue = self.node.catalogue();
                let copies = match &query.namespace {
                    None => None,
                    Some(name) => Some(
                        catalogue
                            .by_name(name)
                            .ok_or_else(|| failed(format!("there is no namespace `{name}`")))?
                            .n,
                    ),
                };
                self.node.ask_all(|_| Ask::Repair { copies, scrub: query.scrub });
                let reply = RepairReply::of_node(&self.numbers().await);
                Ok(json!(reply).to_string().into())
            }
            Command::RepairStatus => {
                let reply = RepairReply::of_node(&self.numbers().await);
                Ok(json!(reply).to_string().into())
            }
            Command::SnapshotCreate(named) => self.create_snapshot(&named.name).await,
            Command::SnapshotList => {
                let dir = self.node.config().data_dir.join(SNAPSHOT_DIR);
                let snapshots = on_a_thread(move || list_snapshots(&dir)).await?;
                Ok(json!(SnapshotReply { snapshots }).to_string().into())
            }
            Command::SnapshotDelete(named) => {
                let dir = self.node.config().data_dir.join(SNAPSHOT_DIR).join(&named.name);
                let name = named.name.clone();
                on_a_thread(move || {
                    if !dir.is_dir() {
                        return Err(format!("there is no snapshot `{name}`"));
                    }
                    std::fs::remove_dir_all(&dir).map_err(|error| error.to_string())
                })
                .await?;
                Ok(json!({ "deleted": named.name }).to_string().into())
            }
            // Of a member the pump takes care of it.
            Command::MembersLeave(_) | Command::MembersReplace(_) => {
                Err(failed("this node is on its own: nobody can take over what it has"))
            }
            Command::NsList | Command::NsCreate(_) | Command::NsSet(_) | Command::NsDrop(_) => {
                self.namespaces(&command).await
            }
        }
    }

    fn placement(&self, facts: &NodeFacts) -> Placement {
        let config = self.node.config();
        Placement {
            address: self.node.client_address(),
            dc: config.dc.clone(),
            rack: config.rack.clone(),
            state: if self.node.state() == State::Draining { "draining" } else { "up" },
            weight: config.weight,
            partition_bits: facts.partition_bits,
        }
    }

    async fn namespaces(&self, command: &Command) -> Reply {
        let _one_change_at_a_time = self.node.changing.lock().await;
        let catalogue = self.node.catalogue();
        let compression = self.node.config().compression;
        let outcome = apply_to_namespaces(command, &catalogue, compression)
            .ok_or_else(|| failed("not a namespace command"))?
            .map_err(|refusal| (refusal.status(), refusal.to_string()))?;
        if let Some(changed) = outcome.changed {
            changed.save(&self.disk, &self.node.config().data_dir).await.map_err(failed)?;
            self.node.set_catalogue(changed);
        }
        Ok(outcome.reply.to_string().into())
    }

    async fn create_snapshot(&self, name: &str) -> Reply {
        let data_dir = &self.node.config().data_dir;
        let dir = data_dir.join(SNAPSHOT_DIR).join(name);
        let made = dir.clone();
        on_a_thread(move || {
            if made.exists() {
                return Err("a snapshot of this name exists".to_owned());
            }
            std::fs::create_dir_all(&made).map_err(|error| error.to_string())
        })
        .await?;
        let written = self.fill_snapshot(data_dir, &dir).await;
        if written.is_err() {
            let leftover = dir.clone();
            let _ = on_a_thread(move || {
                std::fs::remove_dir_all(&leftover).map_err(|error| error.to_string())
            })
            .await;
        }
        written?;
        let row = on_a_thread(move || row_of(&dir)).await?;
        Ok(json!(row).to_string().into())
    }

    async fn fill_snapshot(&self, data_dir: &Path, dir: &Path) -> Result<(), (Status, String)> {
        let _no_change_meanwhile = self.node.changing.lock().await;
        let (mut replies, shards) = (Vec::new(), self.node.shard_count());
        let asked = self.node.ask_all(|shard| {
            let (reply, replied) = oneshot::channel();
            replies.push(replied);
            Ask::Files(dir.join(super::shard::dir_name(shard)), reply)
        });
        if asked < shards {
            return Err(failed("a shard is not serving"));
        }
        for replied in replies {
            replied.await.map_err(|_| failed("a shard stopped"))?.map_err(failed)?;
        }
        self.node.catalogue().save(&self.disk, dir).await.map_err(failed)?;
        let (from, to) = (data_dir.to_owned(), dir.to_owned());
        on_a_thread(move || super::claim::copy_secret(&from, &to)).await
    }
}

/// Runs what may block on a thread of its own: the shard goes on meanwhile.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, (Status, String)> {
    let (tell, told) = oneshot::channel();
    let thread = std::thread::Builder::new().name("annulus-desk".into()).spawn(move || {
        // The asker may have gone away; the work is done all the same.
        let _ = tell.send(work());
    });
    thread.map_err(failed)?;
    told.await.map_err(|_| failed("the work was not finished"))?.map_err(failed)
}

fn list_snapshots(dir: &Path) -> Result<Vec<SnapshotRow>, String> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
    };
    let mut rows = Vec::new();
    for entry in entries {
        rows.push(row_of(&entry.map_err(|error| error.to_string())?.path())?);
    }
    rows.sort_by(|a: &SnapshotRow, b| a.name.cmp(&b.name));
    Ok(rows)
}

fn row_of(dir: &Path) -> Result<SnapshotRow, String> {
    let metadata = std::fs::metadata(dir).map_err(|error| error.to_string())?;
    let created =
        metadata.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    Ok(SnapshotRow {
        name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        created_unix_ms: created
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
        bytes: size_of_tree(dir)?,
        path: dir.display().to_string(),
    })
}

fn size_of_tree(root: &Path) -> Result<u64, String> {
    let (mut bytes, mut dirs): (u64, Vec<PathBuf>) = (0, vec![root.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).map_err(|error| error.to_string())? {
            let entry = entry.map_err(|error| error.to_string())?;
            let metadata = entry.metadata().map_err(|error| error.to_string())?;
            if metadata.is_dir() {
                dirs.push(entry.path());
            } else {
                bytes += metadata.len();
            }
        }
    }
    Ok(bytes)
}
