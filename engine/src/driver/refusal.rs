//! Turns the kernel's refusal of io_uring into a sentence that says which rule refused, and how to
//! allow it.
//!
//! Invariant: the decision is pure; facts are read once, after a refusal, off any path.

use std::fs;
use std::io;

use crate::error::Error;

/// Memory that one shard's rings lock, in bytes: glommio asks for it at the least.
pub const MEMLOCK_PER_SHARD: u64 = 512 << 10;

/// What the system says about io_uring and limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// `kernel.io_uring_disabled`: 0 allowed, 1 privileged only, 2 nobody. `None` if unreadable.
    pub disabled: Option<u8>,
    /// Whether a seccomp filter is installed in this process.
    pub seccomp: bool,
    /// Soft `RLIMIT_MEMLOCK` in bytes; `None` if unlimited.
    pub memlock: Option<u64>,
    /// Soft `RLIMIT_NOFILE`.
    pub files: u64,
    /// Kernel release.
    pub release: String,
}

impl Facts {
    /// Reads them from the running system.
    #[must_use]
    pub fn read() -> Facts {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let status = text("/proc/self/status");
        let seccomp = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp:"))
            .is_some_and(|mode| mode.trim() != "0");
        Facts {
            disabled: text("/proc/sys/kernel/io_uring_disabled").trim().parse().ok(),
            seccomp,
            memlock: limit(libc::RLIMIT_MEMLOCK),
            files: limit(libc::RLIMIT_NOFILE).unwrap_or(u64::MAX),
            release: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

fn limit(resource: libc::__rlimit_resource_t) -> Option<u64> {
    let mut value = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `value` is a writable rlimit that outlives the call.
    let answer = unsafe { libc::getrlimit(resource, &raw mut value) };
    (answer == 0 && value.rlim_cur != libc::RLIM_INFINITY).then_some(value.rlim_cur)
}

/// Where to look, and what to say, for a refusal of `io_uring_setup` with `errno`.
#[must_use]
pub fn explain(errno: i32, facts: &Facts) -> (&'static str, String) {
    match errno {
        libc::EPERM | libc::EACCES => match facts.disabled {
            Some(level @ 1..) => (
                "/proc/sys/kernel/io_uring_disabled",
                format!(
                    "io_uring is switched off on this host (kernel.io_uring_disabled = {level}); \
                     allow it with `sysctl kernel.io_uring_disabled=0`, or with 1 and this \
                     process's group in kernel.io_uring_group"
                ),
            ),
            _ if facts.seccomp => seccomp(),
            _ => (
                "/proc/self/status",
                "the kernel does not allow this process to use io_uring, and neither \
                 kernel.io_uring_disabled nor seccomp says so; look at the security module \
                 (SELinux: class io_uring; AppArmor: audit log)"
                    .to_owned(),
            ),
        },
        libc::ENOSYS if facts.seccomp => seccomp(),
        libc::ENOSYS => (
            "/proc/sys/kernel/osrelease",
            format!("kernel {} is built without io_uring; 6.1 or newer is needed", facts.release),
        ),
        libc::ENOMEM => (
            "/proc/self/limits",
            format!(
                "too little locked memory: the limit is {}, each shard needs about {} KiB; raise \
                 it (`ulimit -l unlimited`, systemd LimitMEMLOCK=infinity, docker \
                 --ulimit memlock=-1) or run fewer shards",
                facts.memlock.map_or("none".to_owned(), |bytes| format!("{} KiB", bytes / 1024)),
                MEMLOCK_PER_SHARD / 1024
            ),
        ),
        libc::EMFILE | libc::ENFILE => (
            "/proc/self/limits",
            format!(
                "no file descriptor is left: the limit is {}; raise it (`ulimit -n`, systemd \
                 LimitNOFILE=)",
                facts.files
            ),
        ),
        libc::EINVAL => (
            "/proc/sys/kernel/osrelease",
            format!(
                "kernel {} does not know the ring flags Annulus needs (SINGLE_ISSUER, \
                 DEFER_TASKRUN); 6.1 or newer is needed",
                facts.release
            ),
        ),
        _ => ("/proc/sys/kernel/osrelease", io::Error::from_raw_os_error(errno).to_string()),
    }
}

fn seccomp() -> (&'static str, String) {
    (
        "/proc/self/status",
        "a seccomp filter refuses io_uring (container profiles do so by default); allow \
         io_uring_setup, io_uring_enter and io_uring_register in the profile, or start with \
         `--security-opt seccomp=unconfined`"
            .to_owned(),
    )
}

/// The error for a refused ring.
pub(crate) fn error(source: &io::Error) -> Error {
    let errno = source.raw_os_error().unwrap_or(libc::EINVAL);
    let (path, text) = explain(errno, &Facts::read());
    Error::io(
        "set up io_uring, see",
        path,
        io::Error::new(source.kind(), format!("{text} ({source})")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts { files: 1024, release: "6.18".to_owned(), ..Facts::default() }
    }

    #[test]
    fn a_host_wide_switch_is_named_with_its_value() {
        let (path, text) = explain(libc::EPERM, &Facts { disabled: Some(2), ..facts() });
        assert!(path.ends_with("io_uring_disabled") && text.contains("= 2"), "{text}");
    }

    #[test]
    fn a_container_profile_is_named_when_the_switch_allows() {
        for errno in [libc::EPERM, libc::ENOSYS] {
            let facts = Facts { disabled: Some(0), seccomp: true, ..facts() };
            assert!(explain(errno, &facts).1.contains("seccomp"));
        }
    }

    #[test]
    fn locked_memory_is_named_with_the_limit_and_the_need() {
        let (_, text) = explain(libc::ENOMEM, &Facts { memlock: Some(65536), ..facts() });
        assert!(text.contains("64 KiB") && text.contains("512 KiB"), "{text}");
    }

    #[test]
    fn every_refusal_has_a_text() {
        for errno in 1..134 {
            assert!(!explain(errno, &facts()).1.is_empty());
        }
    }
}
