//! Which writes a read must have seen, and why; and which writes must have survived.
//!
//! Invariant: a duty is claimed only where the manual promises it: home replicas that have the
//! write and home replicas that were read overlap; or all replicas were equal in between; or the
//! answer itself says so (`as_of`). A write counts only with the replicas that must still hold
//! it, after what the crashes of the run may have cost (`RELIABILITY.md` 5.1).

use std::collections::BTreeSet;
use std::fmt;

use super::ledger::Write;
use crate::history::{Event, History, Mark, Reading};

/// Why a read must have seen a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reason {
    /// The home replicas that acknowledged and those that were read overlap.
    Overlap,
    /// All replicas held the same after the write and before the read.
    Converged,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Overlap => "its replicas and those read overlap",
            Reason::Converged => "all replicas held the same in between",
        })
    }
}

/// Nodes that may have lost a write that they acknowledged.
struct Losses {
    /// Crashed before the write had to be synced.
    crashed: BTreeSet<u32>,
    /// Lost their disks.
    bare: BTreeSet<u32>,
}

fn losses(history: &History, write: &Write, until: u64) -> Losses {
    let acked = write.acked.unwrap_or(u64::MAX);
    // A node that stands still syncs nothing meanwhile.
    let stood = |node: u32| -> u64 {
        let times = history.marks.iter().map(|mark| match mark {
            Mark::Stood { node: other, from, until } if *other == node => {
                until.saturating_sub(write.invoked.max(*from))
            }
            _ => 0,
        });
        times.sum()
    };
    let window_end =
        |node| acked.saturating_add(history.rules.window_nanos).saturating_add(stood(node));
    let mut losses = Losses { crashed: BTreeSet::new(), bare: BTreeSet::new() };
    for mark in &history.marks {
        match mark {
            Mark::Crashed { node, at }
                if (write.invoked..=window_end(*node).min(until)).contains(at) =>
            {
                losses.crashed.insert(*node);
            }
            Mark::DiskLost { node, at } if (write.invoked..=until).contains(at) => {
                losses.bare.insert(*node);
            }
            _ => {}
        }
    }
    losses
}

fn count(nodes: &BTreeSet<u32>) -> u8 {
    u8::try_from(nodes.len()).unwrap_or(u8::MAX)
}

/// Whether an acknowledged write must still exist somewhere at `until`.
pub(super) fn survives(history: &History, write: &Write, until: u64) -> bool {
    let Some(receipt) = &write.receipt else { return false };
    let losses = losses(history, write, until);
    // A synced copy goes only with its disk, any other also with a crash.
    let bare = count(&losses.bare);
    let all: BTreeSet<u32> = losses.bare.union(&losses.crashed).copied().collect();
    receipt.durable > bare || receipt.acks > count(&all)
}

/// Home replicas that must still hold the write at `until`, at least.
fn homes(history: &History, write: &Write, until: u64) -> u8 {
    let Some(receipt) = &write.receipt else { return 0 };
    let losses = losses(history, write, until);
    let bare = count(&losses.bare);
    let all: BTreeSet<u32> = losses.bare.union(&losses.crashed).copied().collect();
    let synced_homes = (receipt.primary + receipt.durable).saturating_sub(receipt.acks);
    let left_of_all = receipt.primary.saturating_sub(count(&all));
    left_of_all.max(synced_homes.saturating_sub(bare))
}

/// Why the read must have seen the acknowledged write, if it must.
pub(super) fn must_see(
    history: &History,
    read: &Event,
    reading: &Reading,
    write: &Write,
) -> Option<Reason> {
    let acked = write.acked.filter(|acked| *acked <= read.invoked)?;
    let homes = homes(history, write, read.returned);
    if homes + reading.primaries > history.rules.replicas {
        return Some(Reason::Overlap);
    }
    let converged = history.converged_before(read.invoked)?;
    let is_held = reads_a_holder(history, reading, converged, read.returned);
    (acked <= converged && is_held && survives(history, write, read.returned))
        .then_some(Reason::Converged)
}

/// Whether one of the home replicas that were read still had its disk of the moment when all were
/// equal: one that lost it since may have got nothing back yet.
pub(super) fn reads_a_holder(
    history: &History,
    reading: &Reading,
    converged: u64,
    until: u64,
) -> bool {
    let lost: BTreeSet<u32> = history
        .marks
        .iter()
        .filter_map(|mark| match mark {
            Mark::DiskLost { node, at } if (converged..=until).contains(at) => Some(*node),
            _ => None,
        })
        .collect();
    lost.is_empty() || reading.primaries > count(&lost)
}
