//! Cores and memory that this process may use: affinity, cgroup v1 and v2, the machine.
//!
//! Invariant: reading only, and a file that is absent or odd is a fact that is unknown. The
//! parsers are pure and tested on texts; [`Host::probe`] applies them to the running system.

use std::fs;
use std::path::Path;

/// What the process may use of the machine.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Host {
    /// Ids of the cores in the affinity mask, ascending; empty when unknown.
    pub cores_allowed: Vec<usize>,
    /// CPU quota of the cgroup, in cores; none when unlimited or unknown.
    pub cpu_quota_cores: Option<f64>,
    /// Memory of the machine, in bytes.
    pub memory_machine: Option<u64>,
    /// Memory limit of the cgroup, in bytes; none when unlimited or unknown.
    pub memory_cgroup: Option<u64>,
    /// Which hierarchy the cgroup facts come from: 1 or 2.
    pub cgroup: Option<u8>,
}

impl Host {
    /// Reads the facts of this process. Costs a few file reads.
    #[must_use]
    pub fn probe() -> Host {
        Host::probe_at(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }

    /// [`Host::probe`] with other roots for `/proc` and the cgroup mount.
    #[must_use]
    pub fn probe_at(proc_root: &Path, cgroup_root: &Path) -> Host {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let status = read(&proc_root.join("self/status"));
        let meminfo = read(&proc_root.join("meminfo"));
        let membership = read(&proc_root.join("self/cgroup"));
        let limits = cgroup_limits(cgroup_root, &membership);
        Host {
            cores_allowed: field(&status, "Cpus_allowed_list:")
                .and_then(parse_core_list)
                .unwrap_or_default(),
            cpu_quota_cores: limits.cpu_cores,
            memory_machine: field(&meminfo, "MemTotal:").and_then(parse_kib),
            memory_cgroup: limits.memory,
            cgroup: limits.hierarchy,
        }
    }

    /// The cores to put shards on: those allowed, cut to the quota; at least one.
    #[must_use]
    pub fn cores_usable(&self) -> Vec<usize> {
        let mut cores = self.cores_allowed.clone();
        if cores.is_empty() {
            let count = std::thread::available_parallelism().map_or(1, usize::from);
            cores = (0..count).collect();
        }
        if let Some(quota) = self.cpu_quota_cores {
            // A shard that spins on a core it has no quota for is throttled, and stalls.
            let whole = (1..=cores.len()).take_while(|n| *n as f64 <= quota + 0.01).count();
            cores.truncate(whole.max(1));
        }
        cores
    }

    /// The memory limit that binds: of the cgroup if it is below the machine's.
    #[must_use]
    pub fn memory_limit(&self) -> Option<u64> {
        match (self.memory_cgroup, self.memory_machine) {
            (Some(cgroup), Some(machine)) => Some(cgroup.min(machine)),
            (cgroup, machine) => cgroup.or(machine),
        }
    }

    /// The memory to give a node that was told nothing: 3/4 of a cgroup's limit, since the cgroup
    /// was made for it, or half of a machine, since others live there. 512 MiB when unknown.
    #[must_use]
    pub fn memory_proposed(&self) -> u64 {
        match (self.memory_cgroup, self.memory_machine) {
            (Some(cgroup), Some(machine)) if cgroup < machine => cgroup / 4 * 3,
            (Some(cgroup), None) => cgroup / 4 * 3,
            (_, Some(machine)) => machine / 2,
            (None, None) => 512 << 20,
        }
    }
}

/// The rest of the line that begins with `name`, trimmed.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// `0,2-5` as ids, ascending. None when it is not such a list or names more than 65,536 cores.
#[must_use]
pub fn parse_core_list(text: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= 65_536 {
            return None;
        }
        cores.extend(first..=last);
    }
    cores.sort_unstable();
    cores.dedup();
    Some(cores)
}

fn parse_kib(text: &str) -> Option<u64> {
    text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[derive(Default)]
struct Limits {
    cpu_cores: Option<f64>,
    memory: Option<u64>,
    hierarchy: Option<u8>,
}

/// The tightest limits from the process's cgroup up to the root of the mount.
fn cgroup_limits(root: &Path, membership: &str) -> Limits {
    let mut limits = Limits::default();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let path = path.trim_start_matches('/');
        let has = |name: &str| controllers.split(',').any(|controller| controller == name);
        if controllers.is_empty() && root.join("cgroup.controllers").exists() {
            limits.hierarchy = Some(2);
            for dir in up_to_root(root, path) {
                let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
                lower(&mut limits.cpu_cores, parse_cpu_max(&read("cpu.max")));
                lower(&mut limits.memory, read("memory.max").trim().parse().ok());
            }
        } else if has("cpu") || has("memory") {
            limits.hierarchy.get_or_insert(1);
            let mount = root.join(controllers);
            let mount = if mount.exists() {
                mount
            } else if has("cpu") {
                root.join("cpu")
            } else {
                root.join("memory")
            };
            for dir in up_to_root(&mount, path) {
                let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
                if has("cpu") {
                    let (quota, period) = (read("cpu.cfs_quota_us"), read("cpu.cfs_period_us"));
                    let joined = format!("{} {}", quota.trim(), period.trim());
                    lower(&mut limits.cpu_cores, parse_cpu_max(&joined));
                }
                if has("memory") {
                    // Version 1 says "unlimited" by a number near 2^63.
                    let bytes = read("memory.limit_in_bytes").trim().parse().ok();
                    lower(&mut limits.memory, bytes.filter(|bytes: &u64| *bytes < 1 << 60));
                }
            }
        }
    }
    limits
}

/// The directories from the cgroup's own up to the mount; a path that the mount does not show
/// (a container's view) is skipped by the reads failing.
fn up_to_root<'a>(mount: &'a Path, path: &str) -> impl Iterator<Item = std::path::PathBuf> + 'a {
    let mut next = Some(mount.join(path));
    std::iter::from_fn(move || {
        let dir = next.take()?;
        if dir != mount {
            next = dir.parent().filter(|parent| parent.starts_with(mount)).map(Path::to_path_buf);
        }
        Some(dir)
    })
}

fn lower<T: PartialOrd + Copy>(limit: &mut Option<T>, found: Option<T>) {
    if let Some(found) = found
        && limit.is_none_or(|limit| found < limit)
    {
        *limit = Some(found);
    }
}

/// `quota period` in microseconds as cores; none for `max` and for version 1's -1.
fn parse_cpu_max(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn core_lists_are_read_with_ranges() {
        assert_eq!(parse_core_list("0"), Some(vec![0]));
        assert_eq!(parse_core_list("0,2-4, 9"), Some(vec![0, 2, 3, 4, 9]));
        for text in ["", "a", "3-1", "1-", "0-99999999"] {
            assert_eq!(parse_core_list(text), None, "{text}");
        }
    }

    #[test]
    fn version_2_limits_are_the_tightest_on_the_way_up() {
        let dir = tempfile::tempdir().unwrap();
        let (proc_root, cgroup) = (dir.path().join("proc"), dir.path().join("cgroup"));
        write(&proc_root, "self/status", "Name:\tx\nCpus_allowed_list:\t0-7\n");
        write(&proc_root, "meminfo", "MemTotal:       8000 kB\nMemFree: 1 kB\n");
        write(&proc_root, "self/cgroup", "0::/a/b\n");
        write(&cgroup, "cgroup.controllers", "cpu memory");
        write(&cgroup, "a/cpu.max", "250000 100000\n");
        write(&cgroup, "a/memory.max", "2000000\n");
        write(&cgroup, "a/b/cpu.max", "max 100000\n");
        write(&cgroup, "a/b/memory.max", "4000000\n");
        let host = Host::probe_at(&proc_root, &cgroup);
        assert_eq!(host.cgroup, Some(2));
        assert_eq!(host.cpu_quota_cores, Some(2.5));
        assert_eq!(host.memory_limit(), Some(2_000_000));
        assert_eq!(host.memory_proposed(), 1_500_000);
        assert_eq!(host.cores_usable(), vec![0, 1]);
    }

    #[test]
    fn version_1_limits_are_read_and_its_unlimited_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (proc_root, cgroup) = (dir.path().join("proc"), dir.path().join("cgroup"));
        write(&proc_root, "self/cgroup", "4:memory:/x\n3:cpu,cpuacct:/x\n");
        write(&cgroup, "memory/x/memory.limit_in_bytes", "9223372036854771712\n");
        write(&cgroup, "cpu,cpuacct/x/cpu.cfs_quota_us", "150000\n");
        write(&cgroup, "cpu,cpuacct/x/cpu.cfs_period_us", "100000\n");
        let host = Host::probe_at(&proc_root, &cgroup);
        assert_eq!((host.cgroup, host.memory_cgroup), (Some(1), None));
        assert_eq!(host.cpu_quota_cores, Some(1.5));
        assert_eq!(host.cores_usable().len(), 1);
    }

    #[test]
    fn a_host_that_shows_nothing_still_gets_a_core_and_some_memory() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::probe_at(dir.path(), dir.path());
        assert_eq!(host, Host::default());
        assert!(!host.cores_usable().is_empty());
        assert_eq!(host.memory_proposed(), 512 << 20);
    }

    #[test]
    fn this_host_is_readable() {
        let host = Host::probe();
        assert!(!host.cores_allowed.is_empty());
        assert!(host.memory_machine.is_some());
    }
}
