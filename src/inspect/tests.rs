//! A shard is filled on the simulated disk, its files are copied to a temporary directory, and
//! inspected there, whole and damaged.

use std::fs;

use annulus_cluster::message::PeerMessage;
use annulus_cluster::register::RegisterId;
use annulus_engine::model::{NamespaceId, OriginId, Token, WallMicros};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Condition, Merge, Mutation, Shard};
use annulus_engine::sim::{SimDisk, SimDiskOptions, SimExecutor};
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::config::Compression;
use crate::namespaces::Settings;

const SHARD: &str = "shard-000";
const KEYS: usize = 1500;

/// A data directory with tables, a log, a tombstone, and namespaces.
struct Store {
    dir: TempDir,
}

impl Store {
    fn new() -> Store {
        let executor = SimExecutor::new(5);
        let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
        let mut options = annulus_engine::options::Options {
            memtable_size: 64 << 10,
            partition_bits: 4,
            ..Default::default()
        };
        options.log.segment_size = 64 << 10;
        options.space =
            annulus_engine::options::SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 };
        let identity = Identity {
            cluster: 9,
            node: OriginId(1),
            shard: 0,
            shard_count: 1,
            hash_seed: 3,
            partition_bits: 4,
            created: WallMicros(1),
        };
        let shard = executor
            .run(Shard::open(
                disk.clone(),
                executor.runtime(),
                Path::new(SHARD),
                &identity,
                options,
                None,
            ))
            .unwrap();
        let write = |key: &str, value: Option<&[u8]>| {
            let mutation = Mutation {
                token: Token::of_key(key.as_bytes(), 3),
                namespace: NamespaceId(0),
                merge: Merge::LastWriteWins,
                key: key.as_bytes(),
                value: value.map(Into::into),
                expiry_ms: 0,
                context: None,
                condition: Condition::None,
            };
            let applied = shard.apply(&mutation, executor.runtime().wall()).unwrap();
            executor.run(shard.wait_visible(applied.lsn)).unwrap();
        };
        for i in 0..KEYS {
            write(&format!("key-{i}"), Some(format!("value {i}").repeat(9).as_bytes()));
        }
        executor.run(shard.flush()).unwrap();
        write("key-7", None);
        write("late", Some(b"in the log only"));
        // No close: the log is left as a killed process leaves it.
        executor.run(Catalogue::new(Compression::Lz4).save(&disk, Path::new(""))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (path, _) in disk.files() {
            let to = dir.path().join(&path);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::write(to, disk.read_file(&path).unwrap()).unwrap();
        }
        Store { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Files below the directory whose names end so.
    fn files(&self, dir: &str, end: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path(dir)).unwrap();
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.to_string_lossy().ends_with(end))
            .collect();
        paths.sort();
        paths
    }

    fn table(&self) -> PathBuf {
        self.files(&format!("{SHARD}/table"), ".sst").remove(0)
    }
}

fn inspect(path: &Path, options: Options) -> (bool, String) {
    let mut out = Vec::new();
    let whole = run(path, options, &mut out).unwrap();
    (whole, String::from_utf8(out).unwrap())
}

fn verify(path: &Path) -> (bool, String) {
    inspect(path, Options { verify: true, ..Options::default() })
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_whole_directory_is_whole() {
    let store = Store::new();
    let (whole, text) = verify(store.dir.path());
    assert!(whole, "{text}");
    for kind in ["identity", "manifest", "table", "log", "namespaces", "all whole"] {
        assert!(text.contains(kind), "{kind} is missing: {text}");
    }
}

#[test]
fn json_shows_every_record_with_its_version_and_tombstones() {
    let store = Store::new();
    let (whole, text) =
        inspect(store.dir.path(), Options { json: true, records: true, ..Options::default() });
    assert!(whole);
    let documents: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let records: Vec<&Value> = documents.iter().filter(|d| d["type"] == "record").collect();
    assert!(records.iter().all(|record| record["version"].is_string()));
    for i in 0..KEYS {
        let key = format!("key-{i}");
        assert!(records.iter().any(|record| record["key"] == key.as_str()), "{key}");
    }
    let deleted = records.iter().find(|record| record["tombstone"] == true).unwrap();
    assert_eq!((&deleted["key"], &deleted["kind"]), (&"key-7".into(), &"delete".into()));
    let late = records.iter().find(|record| record["key"] == "late").unwrap();
    assert_eq!(late["value"], "in the log only");
    assert!(late["lsn"].is_u64());
}

#[test]
fn damage_in_any_file_is_found_and_named() {
    let store = Store::new();
    let manifest = store
        .files(SHARD, "")
        .into_iter()
        .find(|path| path.to_string_lossy().contains("MANIFEST"))
        .unwrap();
    let table = store.table();
    let len = fs::read(&table).unwrap().len();
    let identity = store.path(&format!("{SHARD}/IDENTITY"));
    let namespaces = store.path("NAMESPACES");
    let mut places: Vec<(PathBuf, usize)> = vec![
        (identity.clone(), 20),
        (identity, 4096 + 20),
        (manifest, 100),
        (namespaces.clone(), 3),
        (namespaces, 70),
    ];
    // Header, block bodies, filter, index, partitions, footer.
    places.extend((0..len).step_by(509).map(|at| (table.clone(), at)));
    let mut padding = 0;
    for (path, at) in places {
        let before = fs::read(&path).unwrap();
        flip(&path, at);
        let (whole, text) = verify(store.dir.path());
        let name = path.file_name().unwrap().to_string_lossy();
        let named = text.lines().any(|line| line.starts_with("DAMAGE") && line.contains(&*name));
        // Zeros between the last block and the next sector belong to nothing.
        let sector_end = (at + 1).next_multiple_of(512).min(before.len());
        let is_padding = whole && before[at..sector_end].iter().all(|byte| *byte == 0);
        padding += usize::from(is_padding);
        assert!(is_padding || (!whole && named), "{name} at {at}: {text}");
        fs::write(&path, before).unwrap();
    }
    assert!(verify(store.dir.path()).0);
    assert!(padding <= 3, "{padding} places are checked by nothing");
}

#[test]
fn a_log_tells_its_torn_tail_from_damage() {
    let store = Store::new();
    // The segment with most batches; recycled ones hold stale batches of their former life.
    let field = |text: &str, name: &str| -> usize {
        let rest = text.split(&format!("{name}=")).nth(1).unwrap();
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    let segments = store.files(&format!("{SHARD}/log"), ".log");
    let found = segments.into_iter().map(|path| {
        let text = verify(&path).1;
        let end = text.lines().find(|line| line.starts_with("  end ")).unwrap();
        (field(end, "batches"), field(end, "offset"), path)
    });
    let (batches, end, segment) = found.max().unwrap();
    assert!(batches > 2);
    // A lone write is one sector.
    let last = end - 512;
    let before = fs::read(&segment).unwrap();
    flip(&segment, last + 60);
    let (whole, text) = verify(&segment);
    assert!(whole && text.contains("ends at offset"), "{text}");
    fs::write(&segment, &before).unwrap();
    flip(&segment, 4096 + 60);
    let (whole, text) = verify(&segment);
    assert!(!whole && text.contains("was synced after it"), "{text}");
}

#[test]
fn missing_and_left_over_tables_are_told_apart() {
    let store = Store::new();
    let table = store.table();
    fs::copy(&table, table.with_file_name("0000099999.sst")).unwrap();
    let (whole, text) = verify(store.dir.path());
    assert!(whole && text.contains("no manifest names this table"), "{text}");
    fs::remove_file(&table).unwrap();
    let (whole, text) = verify(store.dir.path());
    assert!(!whole && text.contains("the manifest names this table"), "{text}");
}

#[test]
fn single_files_are_read_by_name_or_by_their_first_bytes() {
    let store = Store::new();
    let (whole, text) = inspect(&store.table(), Options::default());
    assert!(whole && text.contains("put token="), "{text}");
    let copy = store.path("copy-of-namespaces");
    fs::copy(store.path("NAMESPACES"), &copy).unwrap();
    assert!(inspect(&copy, Options::default()).1.contains("default"));
    let alone = store.path("0000000001.sst");
    fs::copy(store.table(), &alone).unwrap();
    let error = run(&alone, Options::default(), &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("beside the IDENTITY"), "{error}");
    fs::write(store.path("notes.txt"), "hello").unwrap();
    assert!(run(&store.path("notes.txt"), Options::default(), &mut Vec::new()).is_err());
    assert!(run(&store.path("nothing"), Options::default(), &mut Vec::new()).is_err());
}

#[test]
fn keys_are_escaped_and_the_hash_seed_is_not_shown() {
    let store = Store::new();
    let (_, text) = inspect(&store.path(&format!("{SHARD}/IDENTITY")), Options::default());
    assert!(text.contains("cluster=") && !text.contains("seed"), "{text}");
}

/// A store of a member that was asked once for its promise and once for its vote.
fn with_registers() -> (Store, PathBuf) {
    let store = Store::new();
    let executor = SimExecutor::new(5);
    let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
    let mut registers = Registers::new(NodeId(1));
    let known = Catalogue::new(Compression::Lz4);
    let ballot = |counter| Ballot { counter, node: NodeId(7), session: 42 };
    let mut next = known.clone();
    next.create("boats", &Settings::default(), Compression::None).unwrap();
    let (register, state) = (RegisterId::NAMESPACES, registers::state_of(&next));
    let accept = PeerMessage::Accept { register, ballot: ballot(3), next: ballot(5), state };
    for request in [PeerMessage::Prepare { register, ballot: ballot(3) }, accept] {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let vote = registers.vote(&disk, Path::new(""), WallMicros(0), &bytes, &known);
        executor.run(vote).unwrap();
    }
    let path = store.path(registers::FILE_NAME);
    fs::write(&path, disk.read_file(Path::new(registers::FILE_NAME)).unwrap()).unwrap();
    (store, path)
}

#[test]
fn registers_are_shown_with_what_was_promised_and_accepted() {
    let (store, path) = with_registers();
    let (whole, text) = verify(store.dir.path());
    assert!(whole && text.contains("REGISTERS"), "{text}");
    let (whole, text) = inspect(&path, Options { json: true, ..Options::default() });
    assert!(whole, "{text}");
    let documents: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| documents.iter().find(|it| it["kind"] == kind).unwrap();
    assert_eq!((&of("registers")["node"], &of("registers")["registers"]), (&1.into(), &1.into()));
    let register = of("register");
    assert_eq!(register["accepted"], json!({ "counter": 3, "node": 7, "session": 42 }));
    assert_eq!(register["promised"]["counter"], 5);
    assert_eq!(register["namespaces"], json!(["default", "boats"]));
    let (_, text) = inspect(&path, Options::default());
    assert!(text.contains("register") && text.contains("boats"), "{text}");
    // A copy is known by its first bytes; elsewhere its checksum cannot be told.
    let copy = store.path("copy-of-registers");
    fs::copy(&path, &copy).unwrap();
    assert_eq!(inspect(&copy, Options::default()).1.lines().count(), text.lines().count());
    let elsewhere = tempfile::tempdir().unwrap();
    let alone = elsewhere.path().join("REGISTERS");
    fs::copy(&path, &alone).unwrap();
    let error = run(&alone, Options::default(), &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("beside a shard"), "{error}");
}

#[test]
fn damaged_registers_are_named_whichever_bit_it_is() {
    let (store, path) = with_registers();
    let before = fs::read(&path).unwrap();
    let used = 64 + u32::from_le_bytes(before[12..16].try_into().unwrap()) as usize;
    for at in 0..used {
        flip(&path, at);
        let (whole, text) = verify(&path);
        let is_named = text.lines().any(|it| it.starts_with("DAMAGE") && it.contains("REGISTERS"));
        assert!(!whole && is_named, "{at}: {text}");
        fs::write(&path, &before).unwrap();
    }
    fs::write(&path, &before[..used - 1]).unwrap();
    assert!(!verify(store.dir.path()).0);
    fs::write(&path, &before).unwrap();
    assert!(verify(store.dir.path()).0);
}
