//! The desk of a simulated node: its namespaces and its votes on their register, on the disk of its
//! first shard.
//!
//! Invariant: it keeps what production's desk keeps, in the same files and in the same order: a
//! vote or a catalogue is durable before anybody hears of it. All shards of a node have one desk,
//! which ends with the node's life.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use annulus::commands::{NsOutcome, apply_named_to_namespaces};
use annulus::config::Compression;
use annulus::namespaces::{self, Catalogue};
use annulus::pump::{AdminDesk, AdminJob, Vote};
use annulus::registers::Registers;
use annulus_cluster::NodeId;
use annulus_engine::model::WallMicros;
use annulus_engine::sim::SimDisk;
use annulus_net::wire::status::Status;
use futures_util::lock::Mutex;

/// Every catalogue that any node ever had, by generation.
#[derive(Debug, Default)]
pub(super) struct Generations {
    known: BTreeMap<u64, Vec<u8>>,
    /// Two of one generation that differ.
    pub(super) forks: Vec<String>,
}

impl Generations {
    /// The newest, and how many there were.
    pub(super) fn newest(&self) -> Option<Catalogue> {
        let (_, bytes) = self.known.last_key_value()?;
        Some(Catalogue::decode(bytes, Path::new(namespaces::FILE_NAME)).expect("it was encoded"))
    }

    /// How many there were.
    pub(super) fn count(&self) -> usize {
        self.known.len()
    }

    pub(super) fn note(&mut self, node: NodeId, catalogue: &Catalogue) {
        let bytes = catalogue.encode();
        let known = self.known.entry(catalogue.generation()).or_insert_with(|| bytes.clone());
        if *known != bytes {
            let generation = catalogue.generation();
            self.forks.push(format!("generation {generation} is another at node {node}"));
        }
    }
}

/// See the module.
pub(super) struct SimDesk {
    node: NodeId,
    disk: SimDisk,
    catalogue: RefCell<Rc<Catalogue>>,
    /// How often the catalogue was replaced.
    changes: Cell<u64>,
    changing: Mutex<()>,
    registers: Mutex<Registers>,
    generations: Rc<RefCell<Generations>>,
}

/// Opened by the first shard of a node that starts, and shared by the others.
pub(super) type SharedDesk = Rc<Mutex<Option<Rc<SimDesk>>>>;

fn dir() -> &'static Path {
    Path::new("data")
}

impl SimDesk {
    /// The desk of a node that starts: from its files, or with `first` on a new disk.
    pub(super) async fn open(
        shared: &SharedDesk,
        (node, disk): (NodeId, SimDisk),
        first: &Catalogue,
        generations: Rc<RefCell<Generations>>,
    ) -> annulus_engine::Result<Rc<SimDesk>> {
        let mut shared = shared.lock().await;
        if let Some(desk) = &*shared {
            return Ok(Rc::clone(desk));
        }
        let catalogue = match Catalogue::load(&disk, dir()).await? {
            Some(catalogue) => catalogue,
            None => {
                first.save(&disk, dir()).await?;
                first.clone()
            }
        };
        let registers = Registers::load(&disk, dir(), node).await?;
        generations.borrow_mut().note(node, &catalogue);
        let desk = Rc::new(SimDesk {
            node,
            disk,
            catalogue: RefCell::new(Rc::new(catalogue)),
            changes: Cell::new(0),
            changing: Mutex::new(()),
            registers: Mutex::new(registers.unwrap_or_else(|| Registers::new(node))),
            generations,
        });
        *shared = Some(Rc::clone(&desk));
        Ok(desk)
    }

    pub(super) fn changes(&self) -> u64 {
        self.changes.get()
    }

    pub(super) fn shared_catalogue(&self) -> Rc<Catalogue> {
        Rc::clone(&self.catalogue.borrow())
    }
}

/// A shard's hold on its node's desk.
#[derive(Clone)]
pub(super) struct DeskOf(pub(super) Rc<SimDesk>);

impl AdminDesk for DeskOf {
    fn begin(&self, _command: &str, _arguments: &str) -> AdminJob {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn client_address(&self) -> String {
        String::new()
    }

    fn note_client(&self, _node: NodeId, _address: &str, _shards: u32) {}

    fn catalogue(&self) -> Catalogue {
        (*self.0.shared_catalogue()).clone()
    }

    fn apply(
        &self,
        command: &str,
        arguments: &str,
        catalogue: &Catalogue,
    ) -> Result<NsOutcome, (Status, String)> {
        apply_named_to_namespaces(command, arguments, catalogue, Compression::None)
    }

    fn vote(&self, wall: WallMicros, request: &[u8]) -> Vote {
        let (desk, request) = (Rc::clone(&self.0), request.to_vec());
        Box::pin(async move {
            let mut registers = desk.registers.lock().await;
            let known = desk.shared_catalogue();
            let vote = registers.vote(&desk.disk, dir(), wall, &request, &known).await;
            vote.map_err(|no_vote| no_vote.to_string())
        })
    }

    fn adopt_catalogue(&self, bytes: &[u8]) -> AdminJob {
        let (desk, bytes) = (Rc::clone(&self.0), bytes.to_vec());
        Box::pin(async move {
            let failed = |error: annulus_engine::Error| (Status::FAILED, error.to_string());
            let path = Path::new(namespaces::FILE_NAME);
            let catalogue = Catalogue::decode(&bytes, path).map_err(failed)?;
            let _one_change_at_a_time = desk.changing.lock().await;
            desk.generations.borrow_mut().note(desk.node, &catalogue);
            if catalogue.generation() > desk.shared_catalogue().generation() {
                catalogue.save(&desk.disk, dir()).await.map_err(failed)?;
                *desk.catalogue.borrow_mut() = Rc::new(catalogue);
                desk.changes.set(desk.changes.get() + 1);
            }
            Ok(Vec::new())
        })
    }
}
