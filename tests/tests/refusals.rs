//! What a server refuses to start on, and what it says; what it mends by itself.
//!
//! Each refusal must name the file and leave the directory as it was, so that putting the right
//! file back heals it (RELIABILITY 5.3, 5.4, T11, T12).

#![expect(clippy::unwrap_used, reason = "what is not there fails the test")]

use std::fs;
use std::path::{Path, PathBuf};

use annulus_net::client::{BlockingNamespace, Error, WriteOptions};
use annulus_net::wire::Status;
use annulus_tests::server::{Ran, Setup, annulus, scratch};

const KEYS: u64 = 3_000;

fn setup(dir: &tempfile::TempDir) -> Setup {
    // Small memtables, so that there are tables as well as a log.
    let setup = Setup::new(dir.path().join("data")).with("shards", "1").with("cores", "0");
    setup.with("memtable-size", "512KiB").with("segment-size", "1MiB")
}

fn value_of(number: u64) -> Vec<u8> {
    (0..700).map(|at| (number.wrapping_mul(0x9e37_79b9) >> (at % 24)).to_le_bytes()[0]).collect()
}

fn fill(keys: &BlockingNamespace, numbers: std::ops::Range<u64>) {
    let mut pipeline = keys.pipeline(64);
    for number in numbers {
        let (key, value) = (number.to_le_bytes().to_vec(), value_of(number));
        if let Some((_, written)) = pipeline.put((), key, value, WriteOptions::default()) {
            written.unwrap();
        }
    }
    while let Some((_, written)) = pipeline.finish_one() {
        written.unwrap();
    }
}

fn check(keys: &BlockingNamespace, numbers: std::ops::Range<u64>) {
    for number in numbers {
        assert!(keys.get(&number.to_le_bytes()).unwrap() == Some(value_of(number)), "{number}");
    }
}

/// A directory with tables and a log, killed without warning.
fn filled(dir: &tempfile::TempDir) -> Setup {
    let server = setup(dir).start();
    fill(&server.namespace(), 0..KEYS);
    server.kill_nine()
}

/// The same, stopped in order: every table there is one that the manifest names.
fn settled(dir: &tempfile::TempDir) -> Setup {
    filled(dir).start().terminate().0
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    found.sort();
    found
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_tree(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// It refused, not by a crash, and said why.
fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, 4, "{ran:?}");
    assert!(ran.stdout.is_empty(), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "no {word:?} in: {}", ran.stderr);
    }
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

fn inspect_finds_damage(data: &Path, words: &[&str]) {
    let ran = annulus(["inspect".as_ref(), data.as_os_str(), "--verify".as_ref()]).expect_code(1);
    for word in words {
        assert!(ran.text().contains(word), "no {word:?} in: {}", ran.text());
    }
}

#[test]
fn a_second_process_on_the_same_directory_is_refused_and_the_first_goes_on() {
    let dir = scratch();
    let server = setup(&dir).start();
    let keys = server.namespace();
    keys.put(b"k", b"v").unwrap();
    let ran = setup(&dir).refusal();
    refused(&ran, &["data", "process"]);
    keys.put(b"k", b"w").unwrap();
    assert_eq!(keys.get(b"k").unwrap().as_deref(), Some(&b"w"[..]));
    let (setup, _) = server.terminate();
    assert!(setup.start().namespace().get(b"k").unwrap().is_some());
}

#[test]
fn another_number_of_shards_is_refused_with_the_right_one() {
    let dir = scratch();
    let _ = setup(&dir).start().kill_nine();
    let ran = setup(&dir).with("shards", "2").refusal();
    refused(&ran, &["made with 1 shards", "--shards 1"]);
    let bare = Setup::bare(dir.path().join("data")).with("memory", "256MiB").start();
    assert_eq!(bare.shards, 1);
}

#[test]
fn a_directory_of_something_else_is_refused_and_left_alone() {
    let dir = scratch();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("thesis.tex"), "precious").unwrap();
    refused(&setup(&dir).refusal(), &["thesis.tex", "--data-dir"]);
    assert_eq!(fs::read_to_string(data.join("thesis.tex")).unwrap(), "precious");
    assert!(!data.join("shard-000").exists());
    fs::remove_dir_all(&data).unwrap();
    fs::write(&data, "a file").unwrap();
    refused(&setup(&dir).refusal(), &["data"]);
}

#[test]
fn bad_configuration_is_bad_usage() {
    let dir = scratch();
    for (option, value, word) in [
        ("shards", "0", "shards"),
        ("segment-size", "1000", "segment-size"),
        ("listen", "0.0.0.0:0", "insecure-public"),
        ("listen", "nowhere", "HOST:PORT"),
        ("memory", "1MiB", "memory"),
        ("durability", "sometimes", "durability"),
        ("cores", "4096", "core"),
    ] {
        let ran = setup(&dir).with(option, value).refusal();
        assert_eq!(ran.code, 2, "{ran:?}");
        assert!(ran.stderr.contains(word), "{option}={value}: {}", ran.stderr);
    }
    assert!(!dir.path().join("data/shard-000").exists());
}

#[test]
fn one_damaged_copy_of_the_identity_does_no_harm_and_two_are_refused() {
    let dir = scratch();
    let setup = filled(&dir);
    let path = setup.data_dir().join("shard-000/IDENTITY");
    let whole = fs::read(&path).unwrap();
    flip(&path, 16);
    inspect_finds_damage(setup.data_dir(), &["IDENTITY"]);
    let setup = setup.start().kill_nine();
    fs::write(&path, &whole).unwrap();
    flip(&path, 4096 + 16);
    check(&setup.start().namespace(), 0..100);
    fs::write(&path, &whole).unwrap();
    flip(&path, 16);
    flip(&path, 4096 + 16);
    refused(&setup.refusal(), &["IDENTITY"]);
    fs::write(&path, []).unwrap();
    refused(&setup.refusal(), &["IDENTITY"]);
    // Without it, what lies there must not be taken for a new directory.
    fs::remove_file(&path).unwrap();
    refused(&setup.refusal(), &["shard-000", "not empty"]);
    fs::write(&path, &whole).unwrap();
    check(&setup.start().namespace(), 0..KEYS);
}

#[test]
fn an_identity_of_another_store_is_refused() {
    let (dir, other) = (scratch(), scratch());
    let setup = settled(&dir);
    let foreign = settled(&other);
    let path = |setup: &Setup| setup.data_dir().join("shard-000/IDENTITY");
    let own = fs::read(path(&setup)).unwrap();
    fs::copy(path(&foreign), path(&setup)).unwrap();
    refused(&setup.refusal(), &["shard-000"]);
    fs::write(path(&setup), own).unwrap();
    // So is a table of another store under a name that the manifest knows.
    let table = |setup: &Setup| files(&setup.data_dir().join("shard-000/table"), "sst")[0].clone();
    fs::copy(table(&foreign), table(&setup)).unwrap();
    check_unknown(&setup.start().namespace());
}

#[test]
fn a_damaged_or_missing_manifest_is_refused_and_never_an_empty_store() {
    let dir = scratch();
    let setup = filled(&dir);
    let shard = setup.data_dir().join("shard-000");
    let manifest = fs::read_dir(&shard)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("MANIFEST-"))
        .unwrap();
    let whole = fs::read(&manifest).unwrap();
    // Each edit is there twice, sector by sector: one damaged copy is repaired at the start.
    let one_of_two = dir.path().join("one-of-two");
    copy_tree(setup.data_dir(), &one_of_two);
    flip(&one_of_two.join("shard-000").join(manifest.file_name().unwrap()), 100);
    let repaired = Setup::bare(&one_of_two).with("memory", "256MiB").start();
    check(&repaired.namespace(), 0..KEYS);
    drop(repaired);
    for at in (0..whole.len().min(4096)).step_by(512) {
        flip(&manifest, at + 100);
    }
    inspect_finds_damage(setup.data_dir(), &["MANIFEST-"]);
    refused(&setup.refusal(), &["MANIFEST-"]);
    fs::write(&manifest, []).unwrap();
    refused(&setup.refusal(), &["MANIFEST-"]);
    fs::remove_file(&manifest).unwrap();
    refused(&setup.refusal(), &["the manifest is missing"]);
    fs::write(&manifest, &whole).unwrap();
    check(&setup.start().namespace(), 0..KEYS);
}

#[test]
fn a_missing_table_is_refused_by_name_and_a_cut_one_is_put_aside() {
    let dir = scratch();
    let setup = settled(&dir);
    let table = files(&setup.data_dir().join("shard-000/table"), "sst").pop().unwrap();
    let name = table.file_name().unwrap().to_str().unwrap();
    let whole = fs::read(&table).unwrap();
    fs::remove_file(&table).unwrap();
    refused(&setup.refusal(), &[name]);
    fs::write(&table, &whole).unwrap();
    let server = setup.start();
    check(&server.namespace(), 0..KEYS);
    let (setup, _) = server.terminate();
    fs::write(&table, &whole[..whole.len() / 2]).unwrap();
    check_unknown(&setup.start().namespace());
}

/// The keys of a table that was put aside are unknown, which is not absent; the others are there.
fn check_unknown(keys: &BlockingNamespace) {
    let unknown = (0..KEYS).filter(|number| match keys.get(&number.to_le_bytes()) {
        Ok(found) => {
            assert!(found == Some(value_of(*number)), "{number}");
            false
        }
        Err(Error::Refused { status: Status::CORRUPT, .. }) => true,
        Err(error) => panic!("{error}"),
    });
    assert!(unknown.count() > 0);
}

#[test]
fn a_damaged_block_is_unknown_not_absent_and_the_rest_is_served() {
    let dir = scratch();
    let setup = filled(&dir);
    // What is in the log is also in memory after a start: let everything reach tables first.
    let server = setup.start();
    fill(&server.namespace(), KEYS..2 * KEYS);
    let (setup, _) = server.terminate();
    let largest = files(&setup.data_dir().join("shard-000/table"), "sst")
        .into_iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    flip(&largest, 9_000);
    inspect_finds_damage(setup.data_dir(), &[".sst"]);
    let server = setup.start();
    let keys = server.namespace();
    let mut unknown = 0;
    for number in 0..2 * KEYS {
        match keys.get(&number.to_le_bytes()) {
            Ok(found) => assert!(found == Some(value_of(number)), "{number}: wrong or absent"),
            Err(Error::Refused { status: Status::CORRUPT, message, .. }) => {
                assert!(message.len() > 10, "{message}");
                unknown += 1;
            }
            Err(error) => panic!("{number}: {error}"),
        }
    }
    assert!((1..200).contains(&unknown), "{unknown} unknown");
    // A new write of a key that is unknown makes it known.
    fill(&keys, 0..2 * KEYS);
    check(&keys, 0..2 * KEYS);
}

#[test]
fn a_node_alone_is_scrubbed_on_demand_and_says_what_it_found() {
    let dir = scratch();
    let setup = settled(&dir);
    let largest = files(&setup.data_dir().join("shard-000/table"), "sst")
        .into_iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    flip(&largest, 9_000);
    let server = setup.start();
    let address = server.client.to_string();
    let repair = |option: &str| annulus(["repair", option, "--json", "--addr", address.as_str()]);
    let before = repair("--status").expect_code(0).json();
    assert_eq!((&before["scrub_damaged"], &before["damaged"]), (&0.into(), &0.into()));
    let _ = repair("--scrub").expect_code(0);
    // Each question takes a process, and the data is small.
    let found = (0..2_000).map(|_| repair("--status")).find(|ran| ran.code == 1);
    let status = found.expect("it is found").json();
    // The block's tokens lie in many partitions.
    assert!(status["scrub_damaged"] == 1 && status["damaged"].as_u64() > Some(0), "{status}");
    let done = (0..2_000).map(|_| repair("--status").json()).find(|it| it["scrub_bytes_left"] == 0);
    assert!(done.expect("it ends")["read_bytes"].as_u64().unwrap() > 100_000);
    let name = largest.file_name().unwrap().to_str().unwrap();
    let said = server.stderr();
    assert!(said.contains("scrubbing met") && said.contains(name), "{said}");
    assert!(said.contains("offset"), "{said}");
    let table = annulus(["repair", "--status", "--addr", address.as_str()]).expect_code(1);
    assert!(table.text().contains("damage found"), "{}", table.text());
}

/// A filled store whose server was killed, and the first segment of its log.
fn killed(dir: &tempfile::TempDir) -> (Setup, PathBuf) {
    let setup = setup(dir).with("memtable-size", "8MiB");
    let server = setup.start();
    fill(&server.namespace(), 0..KEYS);
    let setup = server.kill_nine();
    let first = files(&setup.data_dir().join("shard-000/log"), "log").swap_remove(0);
    (setup, first)
}

#[test]
fn a_damaged_log_is_refused_where_it_would_lose_what_was_acknowledged() {
    let dir = scratch();
    let (setup, first) = killed(&dir);
    let first = &first;
    let whole = fs::read(first).unwrap();
    flip(first, 64 << 10);
    inspect_finds_damage(setup.data_dir(), &[".log"]);
    let name = first.file_name().unwrap().to_str().unwrap();
    refused(&setup.refusal(), &[name, "offset"]);
    fs::write(first, &whole).unwrap();
    fs::remove_file(first).unwrap();
    refused(&setup.refusal(), &["log"]);
    fs::write(first, &whole).unwrap();
    check(&setup.start().namespace(), 0..KEYS);
}

#[test]
fn what_a_damaged_log_still_holds_is_kept_once_the_loss_is_accepted() {
    let dir = scratch();
    let (setup, first) = killed(&dir);
    let first = &first;
    flip(first, 64 << 10);
    let damaged = fs::read(first).unwrap();
    let name = first.file_name().unwrap().to_str().unwrap();
    let refusal = setup.refusal();
    refused(&refusal, &[name, "offset", "may be lost: records", "bytes", "--accept-loss"]);
    let server = setup.clone().accepting_loss().start();
    let keys = server.namespace();
    let count = |keys: &BlockingNamespace| {
        let found = (0..KEYS).filter(|number| match keys.get(&number.to_le_bytes()).unwrap() {
            Some(value) => {
                assert!(value == value_of(*number), "{number}");
                true
            }
            None => false,
        });
        found.count() as u64
    };
    let kept = count(&keys);
    let stats = server.stats();
    let number = |name: &str| stats["counters"][name].as_u64().unwrap();
    assert_eq!((number("log_losses"), number("log_records_lost")), (1, KEYS - kept));
    assert!((KEYS - 200..KEYS).contains(&kept), "{kept} kept");
    let said = server.stderr();
    assert!(said.contains("is given up") && said.contains(name), "{said}");
    let aside = setup.data_dir().join(format!("shard-000/log/{name}.damaged"));
    assert!(fs::read(&aside).unwrap() == damaged, "the damaged bytes are kept");
    // No later start needs the flag, however this one ends.
    let _ = server.kill_nine();
    let server = setup.start();
    assert_eq!(count(&server.namespace()), kept);
    fill(&server.namespace(), 0..KEYS);
    check(&server.namespace(), 0..KEYS);
    let _ = server.terminate();
    check(&setup.start().namespace(), 0..KEYS);
    assert!(fs::read(&aside).unwrap() == damaged, "the damaged bytes are kept");
}

#[test]
fn namespaces_that_are_gone_are_not_made_anew_over_data() {
    let dir = scratch();
    let setup = filled(&dir);
    let path = setup.data_dir().join("NAMESPACES");
    let whole = fs::read(&path).unwrap();
    flip(&path, 20);
    refused(&setup.refusal(), &["NAMESPACES"]);
    fs::remove_file(&path).unwrap();
    refused(&setup.refusal(), &["NAMESPACES"]);
    fs::write(&path, whole).unwrap();
    check(&setup.start().namespace(), 0..KEYS);
}
