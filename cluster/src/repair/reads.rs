//! What the repair of a shard wants read from disk: one range at a time, at a bounded rate.
//!
//! Three things ask: a comparison for a dirty leaf, a comparison for the inside of a leaf, the
//! scrubber. Invariant: one scan is open at most, and what waits is bounded; what finds no place
//! asks again later.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use annulus_engine::model::{Instant, PartitionId};

use super::merkle::{MerkleTree, Node};
use super::reading::{Detail, Reading};
use super::scrub::{ScrubPartition, Scrubber};
use super::sum::Hour;

/// Most nodes that wait for their turn.
const WAITING_MAX: usize = 256;
/// Details kept: a comparison goes on below what it has read.
const DETAILS_MAX: usize = 16;

/// Number of a scan, as told in `Output::Read`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadId(pub u64);

/// Who wants a range read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A comparison, which waits for it.
    Compare,
    /// Nobody waits: the scrubber's turn.
    Scrub,
}

#[derive(Clone, Debug)]
pub(super) struct Open {
    pub(super) id: ReadId,
    pub(super) partition: PartitionId,
    pub(super) purpose: Purpose,
    pub(super) reading: Reading,
}

#[derive(Clone, Debug)]
pub(super) struct Reads {
    bytes_per_second: u64,
    waiting: VecDeque<(PartitionId, Node)>,
    open: Option<Open>,
    next_id: u64,
    next_at: Instant,
    details: VecDeque<(PartitionId, Rc<Detail>)>,
    pub(super) scrubber: Scrubber,
}

impl Reads {
    pub(super) fn new(bytes_per_second: u64, scrubber: Scrubber) -> Reads {
        Reads {
            bytes_per_second: bytes_per_second.max(1),
            waiting: VecDeque::new(),
            open: None,
            next_id: 0,
            next_at: Instant(0),
            details: VecDeque::new(),
            scrubber,
        }
    }

    /// Queues a node, unless it waits already or the queue is full.
    pub(super) fn want(&mut self, partition: PartitionId, node: Node) {
        let is_open = self.open.as_ref().is_some_and(|open| open.is_of(partition, node));
        let waits = self.waiting.contains(&(partition, node));
        if !is_open && !waits && self.waiting.len() < WAITING_MAX {
            self.waiting.push_back((partition, node));
        }
    }

    /// Whether a node is being read or will be.
    pub(super) fn is_wanted(&self, partition: PartitionId, node: Node) -> bool {
        self.waiting.contains(&(partition, node))
            || self.open.as_ref().is_some_and(|open| open.is_of(partition, node))
    }

    /// The next scan to open at `now`, if it is time for one and none is open.
    pub(super) fn open_next(
        &mut self,
        now: Instant,
        hour: Hour,
        trees: &BTreeMap<PartitionId, MerkleTree>,
    ) -> Option<&Open> {
        if self.open.is_some() {
            return None;
        }
        while now >= self.next_at
            && let Some((partition, node)) = self.waiting.pop_front()
        {
            // Of a tree that is gone, or was cut anew meanwhile: whoever waits asks again.
            let tree = trees.get(&partition).filter(|tree| node.level >= tree.leaf_bits());
            if let Some(tree) = tree {
                let reading = tree.begin_reading(node, hour);
                return Some(self.open(partition, Purpose::Compare, reading));
            }
        }
        let partitions = trees.iter().map(|(partition, tree)| ScrubPartition {
            partition: *partition,
            leaf_bits: tree.leaf_bits(),
        });
        let (partition, node) = self.scrubber.next(now, partitions)?;
        let reading = trees.get(&partition)?.begin_reading(node, hour);
        Some(self.open(partition, Purpose::Scrub, reading))
    }

    fn open(&mut self, partition: PartitionId, purpose: Purpose, reading: Reading) -> &Open {
        self.next_id += 1;
        self.open.insert(Open { id: ReadId(self.next_id), partition, purpose, reading })
    }

    /// The open scan of this number.
    pub(super) fn reading(&mut self, id: ReadId) -> Option<&mut Reading> {
        self.open.as_mut().filter(|open| open.id == id).map(|open| &mut open.reading)
    }

    /// Ends the scan of this number, for which so many bytes were read.
    pub(super) fn close(&mut self, id: ReadId, now: Instant, bytes: u64) -> Option<Open> {
        let open = self.open.take_if(|open| open.id == id)?;
        match open.purpose {
            Purpose::Compare => {
                let pause = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
                self.next_at = now.after_nanos(u64::try_from(pause).unwrap_or(u64::MAX));
            }
            Purpose::Scrub => self.scrubber.done(now, bytes),
        }
        Some(open)
    }

    /// Keeps what a scan has told.
    pub(super) fn keep(&mut self, partition: PartitionId, detail: Detail) {
        self.details.retain(|(id, kept)| *id != partition || kept.node() != detail.node());
        self.details.push_front((partition, Rc::new(detail)));
        self.details.truncate(DETAILS_MAX);
    }

    /// What is known of a node, if no write has made it old.
    pub(super) fn detail(
        &mut self,
        partition: PartitionId,
        tree: &MerkleTree,
        node: Node,
        hour: Hour,
    ) -> Option<Rc<Detail>> {
        self.details.retain(|(id, kept)| *id != partition || tree.is_current(kept, hour));
        let of_partition = self.details.iter().filter(|(id, _)| *id == partition);
        let known = of_partition.clone().find(|(_, kept)| kept.node() == node);
        if let Some((_, detail)) = known {
            return Some(Rc::clone(detail));
        }
        let range = tree.range(node);
        of_partition.clone().find_map(|(_, kept)| kept.narrowed(node, range)).map(Rc::new)
    }

    /// Forgets a partition. Its open scan goes on to its end, which then tells nothing.
    pub(super) fn forget(&mut self, partition: PartitionId) {
        self.waiting.retain(|(id, _)| *id != partition);
        self.details.retain(|(id, _)| *id != partition);
        if let Some(open) = &mut self.open
            && open.partition == partition
        {
            open.purpose = Purpose::Compare;
            open.partition = PartitionId(u32::MAX);
        }
    }

    /// When the next scan may be opened; never while one is open.
    pub(super) fn wake_at(&self) -> Instant {
        match (&self.open, self.waiting.is_empty()) {
            (Some(_), _) => Instant(u64::MAX),
            (None, true) => self.scrubber.next_at(),
            (None, false) => self.next_at.min(self.scrubber.next_at()),
        }
    }
}

impl Open {
    fn is_of(&self, partition: PartitionId, node: Node) -> bool {
        self.partition == partition && self.reading.node() == node
    }
}
