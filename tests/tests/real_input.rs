//! Real input: every package that Debian knows, in at one end and out at the other, with a kill
//! without warning in between, compared byte for byte.
//!
//! `bench/corpus.sh` makes the input from this host's package lists; a host without them skips
//! the test and says so. The comparison is of lines: what `import` was given is compared with
//! what `export` prints, both as (key, value) bytes, both sorted.

#![expect(clippy::disallowed_methods, reason = "real processes are timed in real time")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use annulus_tests::server::{Setup, scratch, skip};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

fn corpus(into: &Path) -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("ANNULUS_CORPUS") {
        return Some(given.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("bench/corpus.sh");
    let path = into.join("corpus.jsonl");
    let file = std::fs::File::create(&path).ok()?;
    let made = Command::new("sh").arg(script).stdout(file).output().ok()?;
    let size = std::fs::metadata(&path).map_or(0, |meta| meta.len());
    if !made.status.success() || size == 0 {
        eprintln!("{}", String::from_utf8_lossy(&made.stderr));
        return None;
    }
    Some(path)
}

/// The records of a file of lines. The last line of a key counts.
fn records(text: &[u8]) -> (BTreeMap<Vec<u8>, Vec<u8>>, usize) {
    let (mut found, mut lines) = (BTreeMap::new(), 0);
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).expect("a JSON document a line");
        let field = |name: &str| match (&line[name], &line[format!("{name}_base64")]) {
            (Value::String(text), _) => text.clone().into_bytes(),
            (_, Value::String(base64)) => STANDARD.decode(base64).expect("base64"),
            _ => panic!("no {name} in {line}"),
        };
        found.insert(field("key"), field("value"));
        lines += 1;
    }
    (found, lines)
}

#[test]
fn every_package_of_debian_survives_import_kill_and_export_byte_for_byte() {
    let dir = scratch();
    let Some(path) = corpus(dir.path()) else {
        skip("real_input", "no package lists on this host: run `apt-get update` first");
        return;
    };
    let input = std::fs::read(&path).unwrap();
    let (expected, lines) = records(&input);
    assert!(lines > 1_000, "{lines} lines are no corpus");
    let setup = Setup::new(dir.path().join("data"))
        .with("shards", "2")
        .with("memory", "512MiB")
        .with("memtable-size", "8MiB")
        .with("segment-size", "16MiB");
    let server = setup.start();
    let begin = Instant::now();
    let summary = server.cli(&["import", path.to_str().unwrap()]).expect_code(0).json();
    let imported = begin.elapsed();
    assert_eq!((&summary["written"], &summary["failed"]), (&lines.into(), &0.into()));
    let setup = server.kill_nine();
    let begin = Instant::now();
    let server = setup.start();
    let restarted = begin.elapsed();
    let exported = server.cli(&["export"]).expect_code(0);
    assert!(exported.stderr.is_empty(), "{}", exported.stderr);
    let (found, printed) = records(&exported.stdout);
    assert_eq!((found.len(), printed), (expected.len(), expected.len()));
    let wrong = expected.iter().find(|(key, value)| found.get(*key) != Some(value));
    let wrong = wrong.map(|(key, _)| String::from_utf8_lossy(key).into_owned());
    assert_eq!(wrong, None, "is not what was imported");
    let (setup, _) = server.terminate();
    let data = setup.data_dir();
    let verified =
        annulus_tests::server::annulus(["inspect".as_ref(), data.as_os_str(), "--verify".as_ref()]);
    let _ = verified.expect_code(0);
    println!(
        "{lines} lines, {} MiB, imported in {imported:?}, restarted in {restarted:?}",
        input.len() >> 20
    );
}
