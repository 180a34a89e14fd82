//! A disk that runs full and gets space again: writes are refused before they begin, reads and
//! deletes go on, and nobody has to restart anything (RELIABILITY 5.4, T18).
//!
//! The disk is a small tmpfs in a mount namespace of the server's own, so that nothing of it is
//! left behind, whatever happens to the test. Where that is not allowed, the test says loudly
//! that it was skipped. tmpfs has no direct I/O; the server says so and goes on.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use annulus_net::client::{BlockingNamespace, Error, WriteOptions};
use annulus_net::wire::{Class, Status};
use annulus_tests::server::{Server, Setup, eventually, scratch, skip};

const SCRIPT: &str = "mount -t tmpfs -o size=192m tmpfs \"$0\" && exec \"$@\"";

fn namespaces_are_allowed() -> bool {
    let tried = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        .args(["mount -t tmpfs -o size=1m tmpfs /tmp"])
        .output();
    tried.is_ok_and(|output| output.status.success())
}

/// A file on the server's disk, as seen from outside its mount namespace.
fn seen_from_here(server: &Server, name: &str) -> PathBuf {
    let inside = server.setup().data_dir().parent().expect("the mount point").join(name);
    PathBuf::from(format!("/proc/{}/root{}", server.pid(), inside.display()))
}

fn put(keys: &BlockingNamespace, number: u64, size: usize) -> Result<(), Error> {
    let byte = number.to_le_bytes()[0];
    let options = WriteOptions { timeout: Some(Duration::from_secs(5)), ..WriteOptions::default() };
    keys.put_with(&number.to_le_bytes(), &vec![byte; size], &options).map(drop)
}

/// A server of one shard with its data on a file system of its own, mounted below `dir`.
fn on_a_small_disk(dir: &Path) -> Setup {
    let mount = dir.join("mount");
    std::fs::create_dir(&mount).expect("a fresh directory");
    let mount = mount.to_str().expect("a plain path");
    Setup::new(PathBuf::from(mount).join("data"))
        .under(&["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, mount])
        .with("shards", "1")
        .with("cores", "0")
        .with("segment-size", "1MiB")
        .with("memtable-size", "512KiB")
        .with("disk-reserve", "4MiB")
}

#[test]
fn a_full_disk_refuses_new_data_serves_the_rest_and_recovers_by_itself() {
    if !namespaces_are_allowed() {
        skip("disk_full", "this host lets nobody mount a tmpfs of their own");
        return;
    }
    let dir = scratch();
    let server = on_a_small_disk(dir.path()).start();
    let keys = server.namespace();
    for number in 0..200 {
        put(&keys, number, 4096).unwrap();
    }
    // Somebody else fills the disk to below what is kept for the reserve, fourfold.
    let fill = |bytes: usize, name: &str| {
        let mut file = File::create(seen_from_here(&server, name)).unwrap();
        let piece = vec![7; 1 << 20];
        let mut left = bytes;
        while left > 0 && file.write_all(&piece[..left.min(piece.len())]).is_ok() {
            left -= left.min(piece.len());
        }
    };
    let free = || {
        let stats = server.stats();
        stats["disk_free_bytes"].as_u64().map_or(0, |free| usize::try_from(free).unwrap())
    };
    eventually("free space is known", Duration::from_secs(5), || free() > 0);
    let before = free();
    fill(before - (9 << 20), "somebody-elses");
    let (mut refused, mut asked) = (None, 1_000);
    eventually("new data is refused", Duration::from_secs(20), || {
        asked += 1;
        refused = put(&keys, asked, 4096).err();
        refused.is_some()
    });
    let Some(Error::NotStarted { status, message, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!((status, status.class()), (Status::FULL, Class::NotStarted), "{message}");
    assert!(message.contains("free"), "{message}");
    // What was refused is not there; what was there is; deletes are done.
    for number in 0..200u64 {
        let value = keys.get(&number.to_le_bytes()).unwrap();
        assert_eq!(value.map(|value| value.len()), Some(4096), "{number}");
    }
    for number in 0..50u64 {
        keys.delete(&number.to_le_bytes()).unwrap();
        assert_eq!(keys.get(&number.to_le_bytes()).unwrap(), None);
    }
    let _ = server.cli(&["put", "k", "v"]).expect_code(4);
    let (status, health) =
        server.http("GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert!(health.contains("\"disk_level\""), "{status} {health}");
    // To the last byte: reads go on, writes say that they did not begin.
    fill(usize::MAX, "to-the-last-byte");
    for number in 300..340 {
        if let Err(error) = put(&keys, number, 4096) {
            assert_eq!(error.class(), Class::NotStarted, "{error}");
        }
    }
    assert!(keys.get(&100u64.to_le_bytes()).unwrap().is_some());
    // Space returns, and with it everything else.
    std::fs::remove_file(seen_from_here(&server, "to-the-last-byte")).unwrap();
    std::fs::remove_file(seen_from_here(&server, "somebody-elses")).unwrap();
    eventually("writes are accepted again", Duration::from_secs(20), || {
        put(&keys, 20_000, 4096).is_ok()
    });
    for number in 20_001..20_400 {
        put(&keys, number, 4096).unwrap();
    }
    for number in 50..200u64 {
        assert!(keys.get(&number.to_le_bytes()).unwrap().is_some(), "{number}");
    }
    assert!(keys.get(&asked.to_le_bytes()).unwrap().is_none(), "what was refused is there");
    let _ = server.terminate();
}

/// The data itself fills the disk, to the reserve and no further.
#[test]
fn data_that_fills_the_disk_stops_above_the_reserve_and_overwrites_leave_room() {
    if !namespaces_are_allowed() {
        skip("disk_full", "this host lets nobody mount a tmpfs of their own");
        return;
    }
    let dir = scratch();
    let server =
        on_a_small_disk(dir.path()).with("table-size", "2MiB").with("compression", "none").start();
    let keys = server.namespace();
    let mut pipeline = keys.pipeline(32);
    let (mut written, mut full) = (Vec::new(), 0u64);
    let mut note = |finished: Option<(u64, Result<_, Error>)>| match finished {
        None => 0,
        Some((number, Ok(_))) => {
            written.push(number);
            0
        }
        Some((_, Err(Error::NotStarted { status: Status::FULL, .. }))) => 1,
        // A writer that is slowed down may find its time over before it began.
        Some((_, Err(error))) if error.class() == Class::NotStarted => 0,
        Some((number, Err(error))) => panic!("{number}: {error}"),
    };
    for number in 0..20_000u64 {
        let value = vec![number.to_le_bytes()[0]; 16 << 10];
        let options = WriteOptions { timeout: Some(Duration::from_secs(20)), ..Default::default() };
        full += note(pipeline.put(number, number.to_le_bytes().to_vec(), value, options));
        if full > 40 {
            break;
        }
    }
    while let Some(finished) = pipeline.finish_one() {
        full += note(Some(finished));
    }
    assert!(full > 40, "{full} refused, {} written", written.len());
    let (numbers, written) = (written.clone(), written.len());
    assert!(written > 4_000, "{written} values of 16 KiB on a disk of 192 MiB");
    let gauge = |name: &str| server.stats()["shards"][0]["gauges"][name].as_u64().unwrap();
    assert!(gauge("memtable_bytes") < 3 << 20, "memtables hold {}", gauge("memtable_bytes"));
    for number in numbers.iter().step_by(97) {
        assert!(keys.get(&number.to_le_bytes()).unwrap().is_some(), "{number} of {written}");
    }
    // Deletes make room without anybody's help. While compaction uses the reserve, even they wait.
    for number in &numbers {
        eventually("a delete is accepted", Duration::from_secs(20), || {
            match keys.delete(&number.to_le_bytes()) {
                Ok(_) => true,
                Err(error) if error.class() == Class::NotStarted => false,
                Err(error) => panic!("{number}: {error}"),
            }
        });
    }
    eventually("compaction makes room", Duration::from_secs(60), || put(&keys, 1, 4096).is_ok());
    let _ = server.terminate();
}
