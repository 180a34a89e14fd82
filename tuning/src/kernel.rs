//! What the kernel grants: io_uring, locked memory, descriptors, NUMA nodes, the clock.
//!
//! Invariant: reading and one trial ring that is closed at once; nothing is changed. Facts only,
//! `findings.rs` judges them.

use std::fs;
use std::io;
use std::path::Path;

use crate::host::{field, parse_core_list};
use crate::sys;

/// Locked memory that one executor needs, in bytes.
pub const MEMLOCK_PER_SHARD: u64 = 512 << 10;

/// Whether io_uring can be set up.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IoUring {
    /// With all the flags that the server asks for.
    Full,
    /// Only without them: the kernel is older than 6.1. Works, with about a quarter less.
    Plain,
    /// The system call does not exist: an old kernel, or a filter that hides it.
    Absent,
    /// The system call exists and refuses.
    Denied,
    /// Too little memory may be locked.
    NoMemory,
    /// Something else.
    Failed(String),
}

/// What the kernel grants this process.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Kernel {
    /// Its release, such as `6.1.0-13-amd64`; empty when unknown.
    pub release: String,
    /// Whether a ring could be set up.
    #[serde(rename = "io_uring")]
    pub ring: IoUring,
    /// `kernel.io_uring_disabled`: 0 allowed, 1 for privileged or one group, 2 for nobody.
    #[serde(rename = "io_uring_disabled")]
    pub ring_disabled: Option<u8>,
    /// Whether this is a container, as far as can be seen.
    pub container: bool,
    /// Memory that may be locked, in bytes; none is unlimited.
    pub memlock: Option<u64>,
    /// Descriptors that may be open; none is unlimited or unknown.
    pub open_files: Option<u64>,
    /// To how many descriptors the process may raise its limit by itself.
    pub open_files_hard: Option<u64>,
    /// Cores of each NUMA node; one node or none is no NUMA.
    pub numa: Vec<Vec<usize>>,
    /// What the clock counts: `tsc`, `kvm-clock`, `hpet`; empty when unknown.
    pub clock_source: String,
    /// Whether the kernel believes its clock to be synchronised.
    pub clock_synced: Option<bool>,
    /// The greatest error the kernel believes its clock to have, in microseconds.
    pub clock_error_max_us: Option<u64>,
}

impl Kernel {
    /// Reads the facts of this process, and tries to set up a ring.
    #[must_use]
    pub fn probe() -> Kernel {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let limits = read("/proc/self/limits");
        let clock = sys::clock_state().ok();
        Kernel {
            release: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            ring: probe_ring(),
            ring_disabled: read("/proc/sys/kernel/io_uring_disabled").trim().parse().ok(),
            container: ["/.dockerenv", "/run/.containerenv"].iter().any(|p| Path::new(p).exists())
                || std::env::var_os("container").is_some()
                || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
            memlock: parse_limit(&limits, "Max locked memory").and_then(|limit| limit.0),
            open_files: parse_limit(&limits, "Max open files").and_then(|limit| limit.0),
            open_files_hard: parse_limit(&limits, "Max open files").and_then(|limit| limit.1),
            numa: numa_nodes(Path::new("/sys/devices/system/node")),
            clock_source: read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
                .trim()
                .to_owned(),
            clock_synced: clock.map(|(synced, _)| synced),
            clock_error_max_us: clock.map(|(_, error)| error),
        }
    }

    /// Major and minor number of the release.
    #[must_use]
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut parts = self.release.split(|c: char| !c.is_ascii_digit());
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

fn probe_ring() -> IoUring {
    let wanted = sys::SETUP_SINGLE_ISSUER
        | sys::SETUP_DEFER_TASKRUN
        | sys::SETUP_COOP_TASKRUN
        | sys::SETUP_TASKRUN_FLAG
        | sys::SETUP_SUBMIT_ALL;
    let judged = |error: &io::Error| match error.raw_os_error() {
        Some(libc::ENOSYS) => IoUring::Absent,
        Some(libc::EPERM | libc::EACCES) => IoUring::Denied,
        Some(libc::ENOMEM) => IoUring::NoMemory,
        _ => IoUring::Failed(error.to_string()),
    };
    match sys::try_ring(256, wanted) {
        Ok(()) => IoUring::Full,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => match sys::try_ring(256, 0) {
            Ok(()) => IoUring::Plain,
            Err(error) => judged(&error),
        },
        Err(error) => judged(&error),
    }
}

/// Soft and hard limit from the text of `/proc/self/limits`; the inner none is unlimited.
fn parse_limit(text: &str, name: &str) -> Option<(Option<u64>, Option<u64>)> {
    let mut values = field(text, name)?.split_whitespace();
    let mut next = || match values.next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    Some((next()?, next()?))
}

fn numa_nodes(root: &Path) -> Vec<Vec<usize>> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut nodes: Vec<(usize, Vec<usize>)> = entries
        .flatten()
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let list = fs::read_to_string(entry.path().join("cpulist")).ok()?;
            Some((id, parse_core_list(list.trim())?))
        })
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, cores)| cores).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_with_unlimited() {
        let text = "Limit   Soft Limit   Hard Limit   Units\n\
                    Max open files            1024        524288    files\n\
                    Max locked memory         unlimited   unlimited bytes\n";
        assert_eq!(parse_limit(text, "Max open files"), Some((Some(1024), Some(524_288))));
        assert_eq!(parse_limit(text, "Max locked memory"), Some((None, None)));
        assert_eq!(parse_limit(text, "Max nonsense"), None);
    }

    #[test]
    fn numa_nodes_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for (node, list) in [("node1", "4-7"), ("node0", "0-3"), ("power", "x")] {
            fs::create_dir(dir.path().join(node)).unwrap();
            fs::write(dir.path().join(node).join("cpulist"), list).unwrap();
        }
        assert_eq!(numa_nodes(dir.path()), vec![vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
        assert!(numa_nodes(Path::new("/no/such/place")).is_empty());
    }

    #[test]
    fn this_kernel_is_readable() {
        let kernel = Kernel::probe();
        assert!(kernel.version().is_some_and(|version| version > (3, 0)), "{kernel:?}");
        assert!(kernel.clock_synced.is_some());
    }
}
