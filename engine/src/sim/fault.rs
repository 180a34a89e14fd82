//! Which operations of a simulated disk go wrong, and how; and the record of what was asked.
//!
//! Invariant: a rule counts only the operations that match it, from the moment it was injected,
//! so "the third sync of the log from now on" means the same in each run of a seed.

use std::path::{Path, PathBuf};

/// Kinds of operations on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is the method of `Disk` or `File` with its name")]
pub enum Op {
    Open,
    Rename,
    Link,
    Remove,
    CreateDir,
    List,
    SyncDir,
    Space,
    Lock,
    Read,
    Write,
    Sync,
    Len,
    SetLen,
    Punch,
}

impl Op {
    /// Whether the operation can change what a crash leaves.
    pub(super) fn changes(self) -> bool {
        !matches!(self, Op::List | Op::Space | Op::Lock | Op::Read | Op::Len)
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation fails with EIO. A write may have been done in part; a sync keeps, drops or
    /// tears each pending write, and the next sync succeeds.
    Eio,
    /// The operation fails with ENOSPC. A write may have been done in part.
    NoSpace,
    /// The operation takes this much longer, in nanoseconds.
    Delay(u64),
    /// The operation never ends.
    Hang,
    /// A read returns one wrong bit. Ignored by other operations.
    FlipBit,
    /// A read returns the bytes at another offset of the same file, so many bytes away.
    /// Ignored by other operations.
    Misdirect(i64),
    /// Power fails during the operation: before or after its effect, never after its answer.
    PowerCut,
}

/// When a fault strikes.
#[derive(Clone, Debug)]
pub struct Rule {
    op: Option<Op>,
    path_contains: Option<String>,
    first: u64,
    last: u64,
    fault: Fault,
    seen: u64,
}

impl Rule {
    /// What it does.
    #[must_use]
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// Strikes the `nth` operation of this kind, counted from 1, once.
    #[must_use]
    pub fn nth(op: Op, nth: u64, fault: Fault) -> Rule {
        Rule { op: Some(op), path_contains: None, first: nth, last: nth, fault, seen: 0 }
    }

    /// Strikes the `nth` operation of any kind, counted from 1, once.
    #[must_use]
    pub fn nth_of_any(nth: u64, fault: Fault) -> Rule {
        Rule { op: None, path_contains: None, first: nth, last: nth, fault, seen: 0 }
    }

    /// Only counts operations on paths that contain this text.
    #[must_use]
    pub fn on(mut self, path_contains: &str) -> Rule {
        self.path_contains = Some(path_contains.to_owned());
        self
    }

    /// Strikes this many matching operations in a row instead of one.
    #[must_use]
    pub fn times(mut self, times: u64) -> Rule {
        self.last = self.first.saturating_add(times.saturating_sub(1));
        self
    }

    /// Strikes from the first time on for ever, until [`super::SimDisk::clear_faults`].
    #[must_use]
    pub fn forever(mut self) -> Rule {
        self.last = u64::MAX;
        self
    }

    /// Counts the operation if it matches; the fault if it strikes.
    pub(super) fn strike(&mut self, op: Op, path: &Path) -> Option<Fault> {
        if self.op.is_some_and(|wanted| wanted != op) {
            return None;
        }
        if let Some(text) = &self.path_contains
            && !path.to_string_lossy().contains(text.as_str())
        {
            return None;
        }
        self.seen += 1;
        (self.first..=self.last).contains(&self.seen).then_some(self.fault)
    }
}

/// One operation that was asked of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpRecord {
    /// Its ordinal on this disk, from 1.
    pub number: u64,
    /// What.
    pub op: Op,
    /// On which file or directory.
    pub path: PathBuf,
    /// At which offset, in bytes; 0 where there is none.
    pub offset: u64,
    /// How many bytes; 0 where there are none.
    pub len: u64,
    /// What went wrong with it.
    pub fault: Option<Fault>,
}
