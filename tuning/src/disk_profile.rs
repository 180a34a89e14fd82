//! What the data's disk is and how fast it answers: file system, direct I/O, cost of a durable
//! write and of a random read.
//!
//! Invariant: bounded. It writes one file of [`PROBE_BYTES`] beside the data, works on it for at
//! most [`PROBE_TIME`] twice, and removes it, also when it fails. Facts only.

#![expect(clippy::disallowed_methods, reason = "a probe measures time")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use annulus_engine::buffer::AlignedBuf;

use crate::sys;

/// Size of the probe's file, in bytes.
pub const PROBE_BYTES: usize = 16 << 20;
/// How long each of the two measurements may take.
pub const PROBE_TIME: Duration = Duration::from_millis(700);
/// Bytes of each write and read.
const BLOCK: usize = 4096;
/// Most writes and most reads.
const OPERATIONS_MAX: usize = 400;

/// Latencies of one kind of operation, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Times {
    /// How many were measured.
    pub count: usize,
    /// Half took at most this.
    pub p50_us: u64,
    /// 99 of 100 took at most this.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// What is known of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DiskProfile {
    /// The directory that was probed: the data directory, or its nearest parent that exists.
    pub probed: PathBuf,
    /// The file system: `ext4`, `xfs`, `tmpfs`; empty when unknown.
    pub file_system: String,
    /// Bytes an ordinary user may still write.
    pub free_bytes: Option<u64>,
    /// Size of the file system.
    pub total_bytes: Option<u64>,
    /// Whether the block device turns; unknown for what has none.
    pub rotational: Option<bool>,
    /// Whether the device has a volatile cache, which a sync must flush.
    pub volatile_cache: Option<bool>,
    /// Whether files can be opened for direct I/O.
    pub direct_io: Option<bool>,
    /// One 4 KiB write that is durable when it returns, into space already written once.
    pub durable_write: Option<Times>,
    /// One random 4 KiB read.
    pub random_read: Option<Times>,
    /// Why a measurement is missing.
    pub failure: Option<String>,
}

/// Probes the disk of a data directory. Takes up to two seconds.
#[must_use]
pub fn probe(data_dir: &Path) -> DiskProfile {
    let probed = nearest_existing(data_dir);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let absolute = fs::canonicalize(&probed).unwrap_or_else(|_| probed.clone());
    let space = sys::space(&probed).ok();
    let device = fs::metadata(&probed).ok().map(|meta| meta.dev());
    let queue = |name: &str| read_queue(device?, name);
    let mut profile = DiskProfile {
        file_system: file_system_of(&mounts, &absolute).unwrap_or_default(),
        free_bytes: space.map(|space| space.0),
        total_bytes: space.map(|space| space.1),
        rotational: queue("rotational").map(|text| text == "1"),
        volatile_cache: queue("write_cache").map(|text| text == "write back"),
        probed,
        ..DiskProfile::default()
    };
    if let Err(error) = measure(&mut profile) {
        profile.failure = Some(error.to_string());
    }
    profile
}

fn nearest_existing(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    absolute.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")).to_path_buf()
}

/// Removes the probe's file whatever happens.
struct ProbeFile(PathBuf);

impl Drop for ProbeFile {
    fn drop(&mut self) {
        // Nothing can be done about a failure here, and the file is small.
        let _ = fs::remove_file(&self.0);
    }
}

fn measure(profile: &mut DiskProfile) -> io::Result<()> {
    if profile.free_bytes.is_some_and(|free| free < 4 * PROBE_BYTES as u64) {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "too little space for a probe"));
    }
    let path = profile.probed.join(format!(".annulus-probe-{}", std::process::id()));
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // Created by itself and with a name of its own, so an existing file is never touched.
    drop(OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?);
    let held = ProbeFile(path);
    let direct = options.clone().custom_flags(libc::O_DIRECT).open(&held.0);
    profile.direct_io = Some(direct.is_ok());
    let file = match direct {
        Ok(file) => file,
        Err(_) => options.open(&held.0)?,
    };
    fill(&file)?;
    let flags = libc::O_DSYNC | if profile.direct_io == Some(true) { libc::O_DIRECT } else { 0 };
    let durable = options.custom_flags(flags).open(&held.0)?;
    let mut block = AlignedBuf::zeroed(BLOCK);
    block.fill(0xA5);
    profile.durable_write =
        Some(times(|offset, _| durable.write_all_at(&block, offset), Order::Sequential)?);
    let mut block = AlignedBuf::zeroed(BLOCK);
    profile.random_read =
        Some(times(|offset, _| file.read_exact_at(&mut block, offset), Order::Random)?);
    Ok(())
}

fn fill(file: &File) -> io::Result<()> {
    let mut chunk = AlignedBuf::zeroed(1 << 20);
    chunk.fill(0x5A);
    for at in (0..PROBE_BYTES).step_by(chunk.len()) {
        file.write_all_at(&chunk, at as u64)?;
    }
    file.sync_all()
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    Sequential,
    Random,
}

fn times(
    mut operation: impl FnMut(u64, usize) -> io::Result<()>,
    order: Order,
) -> io::Result<Times> {
    let blocks = PROBE_BYTES / BLOCK;
    let begin = Instant::now();
    let mut found = Vec::with_capacity(OPERATIONS_MAX);
    for index in 0..OPERATIONS_MAX {
        // An odd step visits each block once, and never the neighbour of the last.
        let block = if order == Order::Random { index * 1_367 % blocks } else { index % blocks };
        let start = Instant::now();
        operation((block * BLOCK) as u64, index)?;
        found.push(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
        if begin.elapsed() > PROBE_TIME {
            break;
        }
    }
    Ok(summary(found))
}

fn summary(mut found: Vec<u64>) -> Times {
    found.sort_unstable();
    let at = |percent: usize| found.get((found.len() * percent / 100).min(found.len() - 1));
    Times {
        count: found.len(),
        p50_us: at(50).copied().unwrap_or(0),
        p99_us: at(99).copied().unwrap_or(0),
        max_us: found.last().copied().unwrap_or(0),
    }
}

/// The type of the file system with the longest mount point above the path, from the text of
/// `/proc/self/mountinfo`.
fn file_system_of(mounts: &str, path: &Path) -> Option<String> {
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(point) = before.split(' ').nth(4) else { continue };
        let Some(kind) = after.split(' ').next() else { continue };
        // Spaces in mount points are written as \040.
        let point = point.replace("\\040", " ");
        // A later mount on the same point hides the earlier one.
        if path.starts_with(&point) && best.is_none_or(|(len, _)| point.len() >= len) {
            best = Some((point.len(), kind));
        }
    }
    best.map(|(_, kind)| kind.to_owned())
}

/// A setting of the block device's queue; a partition has its parent's.
fn read_queue(device: u64, name: &str) -> Option<String> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let root = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    [root.join("queue"), root.join("../queue")]
        .iter()
        .find_map(|queue| fs::read_to_string(queue.join(name)).ok())
        .map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_measures_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let profile = probe(&dir.path().join("not/yet/there"));
        assert_eq!(profile.probed, dir.path());
        assert_eq!(profile.failure, None);
        assert!(profile.random_read.is_some_and(|times| times.count > 0));
        assert!(profile.durable_write.is_some_and(|times| times.p99_us >= times.p50_us));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_longest_mount_point_names_the_file_system() {
        let mounts = "22 27 0:21 / / rw - ext4 /dev/a rw\n\
                      23 22 0:22 / /data rw shared:1 - xfs /dev/b rw\n\
                      24 22 0:23 / /da rw - tmpfs t rw\n\
                      25 23 0:24 / /data/with\\040space rw - btrfs /dev/c rw\n";
        let of = |path: &str| file_system_of(mounts, Path::new(path)).unwrap();
        assert_eq!(of("/data/x"), "xfs");
        assert_eq!(of("/database"), "ext4");
        assert_eq!(of("/data/with space/y"), "btrfs");
        assert_eq!(file_system_of("", Path::new("/")), None);
    }

    #[test]
    fn a_summary_has_the_right_ranks() {
        let times = summary((1..=100).rev().collect());
        assert_eq!((times.p50_us, times.p99_us, times.max_us), (51, 100, 100));
    }
}
