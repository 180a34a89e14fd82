//! Judges the facts: what stands in the way, what costs, what is chosen and why.
//!
//! Invariant: pure; the same facts give the same words. A finding that is not [`Grade::Good`]
//! says how to mend it. Only [`Grade::Fatal`] keeps a server from serving.

use crate::budget::{Budget, BudgetInput};
use crate::disk_profile::DiskProfile;
use crate::host::Host;
use crate::kernel::{IoUring, Kernel, MEMLOCK_PER_SHARD};

/// All that is known.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Facts {
    /// Cores and memory.
    pub host: Host,
    /// What the kernel grants.
    pub kernel: Kernel,
    /// The data's disk.
    pub disk: DiskProfile,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Good,
    /// Works, and costs something.
    Costly,
    /// A server cannot start.
    Fatal,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What it is about: `kernel`, `io_uring`, `memlock`, `cores`, `memory`, ...
    pub area: &'static str,
    /// How bad it is.
    pub grade: Grade,
    /// What was found, and what it costs.
    pub fact: String,
    /// How to mend it; empty when there is nothing to mend.
    pub remedy: String,
}

/// One option that is proposed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Choice {
    /// The option's name in a configuration file.
    pub option: &'static str,
    /// Its value, as it would stand there.
    pub value: String,
    /// Why.
    pub reason: String,
}

fn good(area: &'static str, fact: impl Into<String>) -> Finding {
    Finding { area, grade: Grade::Good, fact: fact.into(), remedy: String::new() }
}

fn costly(area: &'static str, fact: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { area, grade: Grade::Costly, fact: fact.into(), remedy: remedy.into() }
}

fn fatal(area: &'static str, fact: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { area, grade: Grade::Fatal, fact: fact.into(), remedy: remedy.into() }
}

/// Judges the facts for a server of so many shards, clients and reserved bytes of disk.
#[must_use]
pub fn judge(facts: &Facts, shards: u32, connections: u32, disk_reserve: u64) -> Vec<Finding> {
    vec![
        judge_kernel(&facts.kernel),
        judge_ring(&facts.kernel),
        judge_memlock(&facts.kernel, shards),
        judge_files(&facts.kernel, connections),
        judge_cores(&facts.host, shards),
        judge_memory(&facts.host, shards),
        judge_numa(&facts.kernel, &facts.host),
        judge_disk(&facts.disk, disk_reserve),
        judge_disk_speed(&facts.disk),
        judge_clock(&facts.kernel),
    ]
}

fn judge_kernel(kernel: &Kernel) -> Finding {
    let release = if kernel.release.is_empty() { "unknown" } else { &kernel.release };
    match kernel.version() {
        Some(version) if version >= (6, 1) => good("kernel", format!("Linux {release}")),
        Some(version) if version >= (5, 19) => costly(
            "kernel",
            format!("Linux {release}: rings without deferred work, about a quarter more CPU"),
            "Linux 6.1 or later has it",
        ),
        Some(_) => fatal(
            "kernel",
            format!("Linux {release}: lacks multishot accept and provided buffer rings"),
            "Linux 5.19 or later is needed, 6.1 or later is better",
        ),
        None => costly("kernel", "the release is unknown", "check that /proc is mounted"),
    }
}

fn judge_ring(kernel: &Kernel) -> Finding {
    let allow = if kernel.container {
        "in a container, allow the calls io_uring_setup, io_uring_enter and io_uring_register: \
         start it with a seccomp profile that has them, or with \
         --security-opt seccomp=unconfined; in Kubernetes with seccompProfile type Localhost"
    } else {
        "look for a seccomp filter of the service manager (systemd: SystemCallFilter=~@io-uring)"
    };
    match (&kernel.ring, kernel.ring_disabled) {
        (IoUring::Full, _) => good("io_uring", "available, with all that is used"),
        (IoUring::Plain, _) => costly(
            "io_uring",
            "available, without deferred task work: about a quarter more CPU a request",
            "Linux 6.1 or later has it",
        ),
        (_, Some(level @ 1..)) => fatal(
            "io_uring",
            format!("switched off by kernel.io_uring_disabled = {level}"),
            if level == 1 {
                "sysctl -w kernel.io_uring_disabled=0, or put the user into the group named by \
                 kernel.io_uring_group"
            } else {
                "sysctl -w kernel.io_uring_disabled=0, and in /etc/sysctl.d to keep it"
            },
        ),
        (IoUring::Absent, _) => {
            fatal("io_uring", "the system call is absent or hidden (ENOSYS)", allow)
        }
        (IoUring::Denied, _) => fatal("io_uring", "the system call is refused (EPERM)", allow),
        (IoUring::NoMemory, _) => fatal(
            "io_uring",
            "too little memory may be locked for a ring (ENOMEM)",
            "ulimit -l unlimited; systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1",
        ),
        (IoUring::Failed(error), _) => fatal("io_uring", format!("a ring fails: {error}"), allow),
    }
}

fn judge_memlock(kernel: &Kernel, shards: u32) -> Finding {
    let Some(limit) = kernel.memlock else { return good("memlock", "unlimited") };
    let needed = u64::from(shards) * MEMLOCK_PER_SHARD;
    let fact = format!(
        "{} KiB may be locked, {shards} shards need {} KiB; enough for {} shards",
        limit >> 10,
        needed >> 10,
        limit / MEMLOCK_PER_SHARD
    );
    if limit >= needed {
        return good("memlock", fact);
    }
    fatal(
        "memlock",
        fact,
        format!(
            "ulimit -l {}; systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1; or fewer \
             --shards",
            needed >> 10
        ),
    )
}

fn judge_files(kernel: &Kernel, connections: u32) -> Finding {
    // Beyond connections: tables, logs, rings, listeners.
    let needed = u64::from(connections) + 2_000;
    let limit = kernel.open_files_hard.or(kernel.open_files);
    match limit {
        Some(limit) if limit < needed => costly(
            "descriptors",
            format!("{limit} may be open, {connections} connections and the tables need {needed}"),
            format!(
                "ulimit -n {needed}; systemd: LimitNOFILE={needed}; or fewer --connections-max"
            ),
        ),
        Some(limit) => good("descriptors", format!("{limit} may be open, {needed} are needed")),
        None => good("descriptors", "unlimited"),
    }
}

fn judge_cores(host: &Host, shards: u32) -> Finding {
    let usable = host.cores_usable();
    let quota = host
        .cpu_quota_cores
        .map_or(String::new(), |quota| format!(", a cgroup quota of {quota:.1} cores"));
    let fact = format!(
        "{} cores in the affinity mask{quota}: {} usable, {shards} shards",
        host.cores_allowed.len(),
        usable.len()
    );
    if shards as usize > usable.len() {
        return costly(
            "cores",
            format!("{fact}; shards that share a core wait for each other"),
            format!("--shards {}", usable.len()),
        );
    }
    if host.cpu_quota_cores.is_some_and(|quota| quota < 1.0) {
        return costly(
            "cores",
            format!("{fact}; a shard is stopped when the quota of a period is used up"),
            "a quota of whole cores, or a cpuset instead of a quota; --spin 0s",
        );
    }
    good("cores", fact)
}

fn judge_memory(host: &Host, shards: u32) -> Finding {
    let proposed = host.memory_proposed();
    let source = match (host.memory_cgroup, host.memory_machine) {
        (Some(cgroup), Some(machine)) if cgroup < machine => {
            format!("the cgroup allows {} MiB of {} MiB", cgroup >> 20, machine >> 20)
        }
        (Some(cgroup), None) => format!("the cgroup allows {} MiB", cgroup >> 20),
        (_, Some(machine)) => format!("the machine has {} MiB, no cgroup limit", machine >> 20),
        (None, None) => "the size of the memory is unknown".to_owned(),
    };
    let input = BudgetInput {
        memory: proposed,
        shards,
        value_size_max: 1 << 20,
        memtable_size: None,
        cache_size: None,
        connections_max: None,
    };
    match Budget::divide(&input) {
        Ok(budget) => good(
            "memory",
            format!(
                "{source}: {} MiB for a node, {} MiB of it cache",
                proposed >> 20,
                budget.cache >> 20
            ),
        ),
        Err(error) => {
            fatal("memory", format!("{source}: {error}"), "fewer --shards, or more memory")
        }
    }
}

fn judge_numa(kernel: &Kernel, host: &Host) -> Finding {
    let usable = host.cores_usable();
    let used = kernel.numa.iter().filter(|node| node.iter().any(|core| usable.contains(core)));
    match used.count() {
        0 | 1 => good("numa", "one node"),
        count => costly(
            "numa",
            format!(
                "cores of {count} nodes: memory of another node costs about half as much again"
            ),
            "one server a node, each with the node's --cores and started under numactl -m",
        ),
    }
}

fn judge_disk(disk: &DiskProfile, reserve: u64) -> Finding {
    let place = disk.probed.display();
    let kind = if disk.file_system.is_empty() { "unknown" } else { &disk.file_system };
    let free = disk.free_bytes.unwrap_or(0);
    let fact = format!("{kind} at {place}, {} MiB free", free >> 20);
    if disk.free_bytes.is_some_and(|free| free < reserve + (256 << 20)) {
        return fatal(
            "disk",
            format!("{fact}, less than the reserve of {} MiB and a little data", reserve >> 20),
            "free space, or another --data-dir",
        );
    }
    if let Some(failure) = &disk.failure {
        return fatal("disk", format!("{fact}; the probe failed: {failure}"), "another --data-dir");
    }
    match (kind, disk.direct_io) {
        ("tmpfs" | "ramfs", _) => costly(
            "disk",
            format!("{fact}: memory, so nothing survives a restart of the machine"),
            "a --data-dir on a disk, unless this is a test",
        ),
        ("nfs" | "nfs4" | "cifs" | "9p" | "fuseblk", _) => costly(
            "disk",
            format!("{fact}: over a network or a user process, where a sync may promise less"),
            "a --data-dir on a local disk with ext4 or xfs",
        ),
        (_, Some(false)) => costly(
            "disk",
            format!("{fact}: direct I/O is refused, so data is cached twice and flushes stall"),
            "a --data-dir on ext4 or xfs",
        ),
        ("btrfs" | "zfs" | "overlay", _) => costly(
            "disk",
            format!("{fact}: copies on write, which costs each log write"),
            "a --data-dir on ext4 or xfs (in a container: a volume)",
        ),
        _ => good("disk", format!("{fact}, direct I/O")),
    }
}

fn judge_disk_speed(disk: &DiskProfile) -> Finding {
    let (Some(write), Some(read)) = (disk.durable_write, disk.random_read) else {
        return costly("disk speed", "not measured", "");
    };
    let fact = format!(
        "a durable 4 KiB write takes {} us (p99 {} us), a random read {} us (p99 {} us)",
        write.p50_us, write.p99_us, read.p50_us, read.p99_us
    );
    if disk.rotational == Some(true) && read.p50_us > 2_000 {
        return costly("disk speed", format!("{fact}: a turning disk"), "an SSD, NVMe if possible");
    }
    if write.p50_us > 5_000 {
        return costly(
            "disk speed",
            format!("{fact}: each sync write waits that long"),
            "a disk with a protected write cache, or namespaces that can bear --durability periodic",
        );
    }
    if write.p50_us < 15 && disk.direct_io == Some(true) {
        return costly(
            "disk speed",
            format!("{fact}: faster than a device can be, so a layer below may ignore syncs"),
            "check the cache mode of the virtual disk (not `unsafe`)",
        );
    }
    good("disk speed", fact)
}

fn judge_clock(kernel: &Kernel) -> Finding {
    let source = if kernel.clock_source.is_empty() { "unknown" } else { &kernel.clock_source };
    let slow = !matches!(
        source,
        "tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page" | "arch_sys_counter" | "unknown"
    );
    if slow {
        return costly(
            "clock",
            format!("source {source}: reading it is a system call, about 1 us a request"),
            "tsc, if the kernel log does not call it unstable",
        );
    }
    match kernel.clock_synced {
        Some(false) => costly(
            "clock",
            format!("source {source}, not synchronised: last-write-wins follows this clock"),
            "run chrony or systemd-timesyncd; nodes more than 500 ms apart refuse each other's \
             writes",
        ),
        _ => {
            let error = kernel.clock_error_max_us.unwrap_or(0) / 1000;
            good("clock", format!("source {source}, synchronised within {error} ms"))
        }
    }
}

/// Proposes a configuration for this host, only where it differs from the plain defaults or is
/// worth seeing.
#[must_use]
pub fn propose(facts: &Facts) -> Vec<Choice> {
    let cores = facts.host.cores_usable();
    let mut choices = vec![
        Choice {
            option: "shards",
            value: cores.len().to_string(),
            reason: "one for each core that may be used".to_owned(),
        },
        Choice {
            option: "memory",
            value: format!("\"{}MiB\"", facts.host.memory_proposed() >> 20),
            reason: match (facts.host.memory_cgroup, facts.host.memory_machine) {
                (Some(cgroup), Some(machine)) if cgroup < machine => {
                    "3/4 of the cgroup's limit".to_owned()
                }
                _ => "half of the machine; raise it to 3/4 on a host of its own".to_owned(),
            },
        },
    ];
    let mut add = |option, value: &str, reason: String| {
        choices.push(Choice { option, value: value.to_owned(), reason });
    };
    let quota_binds = facts
        .host
        .cpu_quota_cores
        .is_some_and(|quota| quota < facts.host.cores_allowed.len() as f64);
    if quota_binds {
        add("spin", "\"0s\"", "a CPU quota binds: time spent looking for work counts".to_owned());
    }
    if let Some(write) = facts.disk.durable_write
        && write.p50_us > 5_000
    {
        let rate = 1_000_000 / write.p50_us.max(1);
        let reason = format!(
            "stays `sync`, though a lone writer gets about {rate} writes a second; `periodic` \
             would acknowledge before the disk has it"
        );
        add("durability", "\"sync\"", reason);
    }
    if facts.disk.rotational == Some(true)
        && facts.disk.random_read.is_some_and(|read| read.p50_us > 2_000)
    {
        add("block-size", "\"16KiB\"", "a seek costs more than the bytes behind it".to_owned());
    }
    if let Some(total) = facts.disk.total_bytes
        && total > 1 << 40
    {
        add(
            "disk-reserve",
            "\"4GiB\"",
            "a large disk: room for compaction of large tables".to_owned(),
        );
        add("table-size", "\"256MiB\"", "fewer files for a large disk".to_owned());
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_profile::Times;

    fn facts() -> Facts {
        let fast = Times { count: 100, p50_us: 90, p99_us: 200, max_us: 300 };
        Facts {
            host: Host {
                cores_allowed: vec![0, 1],
                memory_machine: Some(8 << 30),
                ..Host::default()
            },
            kernel: Kernel {
                release: "6.1.0-13-amd64".into(),
                ring: IoUring::Full,
                ring_disabled: Some(0),
                container: false,
                memlock: Some(8 << 20),
                open_files: Some(1024),
                open_files_hard: Some(1 << 20),
                numa: vec![vec![0, 1]],
                clock_source: "tsc".into(),
                clock_synced: Some(true),
                clock_error_max_us: Some(2000),
            },
            disk: DiskProfile {
                file_system: "ext4".into(),
                free_bytes: Some(100 << 30),
                total_bytes: Some(200 << 30),
                direct_io: Some(true),
                durable_write: Some(fast),
                random_read: Some(fast),
                ..DiskProfile::default()
            },
        }
    }

    fn finding(facts: &Facts, area: &str) -> Finding {
        let all = judge(facts, 2, 12_000, 256 << 20);
        let found = all.into_iter().find(|finding| finding.area == area).unwrap();
        assert_eq!(found.grade == Grade::Good, found.remedy.is_empty(), "{found:?}");
        found
    }

    #[test]
    fn a_good_host_has_nothing_to_mend() {
        let all = judge(&facts(), 2, 12_000, 256 << 20);
        assert!(all.iter().all(|finding| finding.grade == Grade::Good), "{all:#?}");
        let options: Vec<_> = propose(&facts()).iter().map(|choice| choice.option).collect();
        assert_eq!(options, ["shards", "memory"]);
    }

    #[test]
    fn a_refused_ring_is_fatal_and_says_what_to_allow() {
        for (ring, disabled, container, word) in [
            (IoUring::Denied, Some(0), true, "seccomp"),
            (IoUring::Absent, None, true, "seccomp"),
            (IoUring::Denied, Some(2), false, "sysctl"),
            (IoUring::Denied, Some(1), false, "io_uring_group"),
            (IoUring::Denied, Some(0), false, "SystemCallFilter"),
            (IoUring::NoMemory, Some(0), false, "memlock"),
        ] {
            let mut facts = facts();
            facts.kernel.ring = ring;
            facts.kernel.ring_disabled = disabled;
            facts.kernel.container = container;
            let found = finding(&facts, "io_uring");
            assert_eq!(found.grade, Grade::Fatal);
            assert!(found.remedy.contains(word), "{found:?}");
        }
    }

    #[test]
    fn each_fault_of_a_host_gets_its_grade() {
        type Fault = fn(&mut Facts);
        let faults: [(&str, Grade, Fault); 12] = [
            ("kernel", Grade::Fatal, |f| f.kernel.release = "5.10.0".into()),
            ("kernel", Grade::Costly, |f| f.kernel.release = "5.19.1".into()),
            ("memlock", Grade::Fatal, |f| f.kernel.memlock = Some(64 << 10)),
            ("descriptors", Grade::Costly, |f| f.kernel.open_files_hard = Some(4096)),
            ("cores", Grade::Costly, |f| f.host.cpu_quota_cores = Some(0.5)),
            ("memory", Grade::Fatal, |f| f.host.memory_cgroup = Some(32 << 20)),
            ("numa", Grade::Costly, |f| f.kernel.numa = vec![vec![0], vec![1]]),
            ("disk", Grade::Fatal, |f| f.disk.free_bytes = Some(100 << 20)),
            ("disk", Grade::Costly, |f| f.disk.direct_io = Some(false)),
            ("disk", Grade::Costly, |f| f.disk.file_system = "tmpfs".into()),
            ("disk speed", Grade::Costly, |f| f.disk.durable_write.as_mut().unwrap().p50_us = 9000),
            ("clock", Grade::Costly, |f| f.kernel.clock_synced = Some(false)),
        ];
        for (area, grade, fault) in faults {
            let mut facts = facts();
            fault(&mut facts);
            assert_eq!(finding(&facts, area).grade, grade, "{area}");
        }
    }

    #[test]
    fn a_quota_switches_spinning_off() {
        let mut facts = facts();
        facts.host.cpu_quota_cores = Some(1.0);
        let choices = propose(&facts);
        assert!(choices.iter().any(|choice| choice.option == "spin" && choice.value == "\"0s\""));
        assert_eq!(choices[0].value, "1");
    }
}
