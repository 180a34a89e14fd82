//! Who has seen what: the replicas of a shard's partitions tell each other, and from that follow
//! when to catch up and with whom, which tombstones may go, and when a stand-in may forget.
//!
//! Stands between the pump, which moves its messages and lets it see the engine ([`Replica`]), and
//! the messages `Track` and `TrackDone`. One instance for each shard of a node; it talks to those
//! shards of other nodes that have partitions in common with it.
//!
//! | file | what |
//! |---|---|
//! | `announce.rs` | announcements: cumulative, acknowledged, whole again after a restart of either side |
//! | `floors.rs` | up to which moment a replica, and all replicas, are complete |
//! | `catch_up.rs` | which partitions to sync and with whom; guests that are done; gaps that are void |
//! | `figures.rs` | how far replicas agree, and who holds back the purge |
//!
//! # What is announced, and what it promises
//! A node that is none of a partition's holders and still has records of it is its *guest*: the
//! same code serves both. An announcement gives for each partition that changed what the replica
//! has seen and up to which stamp it is complete, and for the node a promise: **every write of
//! this node's origin stamped at or below it is in what was announced, and every later one is
//! stamped later.** From the promises of *all* members, guests or not, each replica computes its
//! own completeness: of an origin whose announced writes are all here it reaches to the promise,
//! of any other to the end of what has come without a gap. So a write that only a slow guest has
//! holds back the purge by itself; there is no separate floor of hints.
//!
//! Invariants:
//! - Announced is only what a crash cannot take back: a snapshot waits until the log that holds it
//!   is durable. In `periodic` mode a replica that forgets what it announced would otherwise get
//!   back, from a peer that has purged, a tombstone's dot without the tombstone.
//! - A version names one moment of the sender. What is known of a peer is as of a version, never
//!   a mixture, so its promise fits its sets. Lost, doubled and late messages change nothing.
//! - The upper bits of a version are the sender's life (its starts), so a restarted peer is known
//!   by its first message, and what it said before is forgotten.
//! - A replica's claims may be too small, never too large.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use annulus_engine::model::seen::{InvalidSeen, SeenSet};
use annulus_engine::model::{Instant, OriginId, PartitionId, Timestamp};

use crate::member::NodeId;
use crate::topology::Topology;

mod announce;
mod catch_up;
mod figures;
mod floors;

pub use catch_up::{GapClosed, SyncWanted};
pub use figures::Convergence;
pub use floors::Floor;

/// What tracking sees of the shard's engine. All answers of one call of [`Tracking`] are of the
/// same moment.
pub trait Replica {
    /// What has been merged into the partition, as readers see it.
    fn seen(&self, partition: PartitionId) -> Rc<SeenSet>;

    /// Partitions whose `seen` changed since the last call: all of them, and others at will.
    fn take_changed(&mut self) -> Vec<PartitionId>;

    /// A stamp below that of every own write from now on, also after a crash: the shard's clock,
    /// never above its durable ceiling, and never less than before.
    fn clock(&self) -> Timestamp;

    /// `Some` while a partition has a gap from a crash: every own write that was lost is stamped
    /// later than this. Zero is always true.
    fn lost_after(&self) -> Option<Timestamp>;

    /// Whether own writes of the partition may have been lost in a crash, and others may still
    /// have them: until it is told of [`GapClosed`].
    fn has_gap(&self, partition: PartitionId) -> bool;

    /// Whether anything is under way to the partition's log that `seen` does not show yet.
    fn is_busy(&self, partition: PartitionId) -> bool;

    /// The end of the log: position behind everything that was taken in.
    fn appended(&self) -> u64;

    /// Position up to which `seen` shows what was taken in.
    fn visible(&self) -> u64;

    /// Position up to which the log survives a crash.
    fn durable(&self) -> u64;
}

/// A shard of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerShard {
    /// Which node.
    pub node: NodeId,
    /// Which of its shards.
    pub shard: u32,
}

/// What tracking needs to know of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Logarithm of the number of partitions.
    pub partition_bits: u32,
    /// Every member with its number of shards, this node as well.
    pub members: BTreeMap<NodeId, u32>,
    /// The shard's first partition.
    pub first: PartitionId,
    /// Holders of it and of those that follow it on this shard.
    pub holders: Vec<Vec<NodeId>>,
    /// How members have changed and partitions move.
    pub moves: Moves,
}

/// What tracking needs to know of members that change (`moves/mod.rs`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Of the map; 0 where members never change.
    pub generation: u32,
    /// The generation of the map in which a member was last removed; 0: never.
    pub removed_at: u32,
    /// The old homes of partitions that this node is a new owner of: only from them it takes what
    /// it lacks.
    pub here_from: BTreeMap<PartitionId, Vec<NodeId>>,
}

impl Moves {
    /// Whether the members are not those that the cluster was made of. Then a holder may have been
    /// another's before, whose writes `as_of` must wait for as well.
    fn have_changed(&self) -> bool {
        self.generation > 1
    }
}

impl Shared {
    /// What a shard of `shard_count` shares with others, which have as many shards.
    #[must_use]
    pub fn new(topology: &Topology, shard: u32, shard_count: u32) -> Shared {
        let bits = topology.partition_bits();
        let of_shard =
            move |partition: &u32| shard_of(PartitionId(*partition), shard_count, bits) == shard;
        let mut partitions = (0..1 << bits).filter(of_shard).map(PartitionId).peekable();
        Shared {
            partition_bits: bits,
            members: topology.nodes().iter().map(|node| (node.id, shard_count)).collect(),
            first: partitions.peek().copied().unwrap_or_default(),
            moves: Moves {
                generation: topology.generation(),
                removed_at: topology.removed_at(),
                here_from: partitions
                    .clone()
                    .filter(|it| topology.holders(*it).contains(&topology.own()))
                    .filter_map(|it| Some((it, topology.moves_here_from(it)?)))
                    .collect(),
            },
            holders: partitions.map(|partition| topology.holders(partition)).collect(),
        }
    }
}

/// The shard of a node with `shard_count` of them on which a partition is.
fn shard_of(partition: PartitionId, shard_count: u32, bits: u32) -> u32 {
    let shard = (u64::from(partition.0) * u64::from(shard_count)) >> bits;
    u32::try_from(shard).expect("below the number of shards")
}

/// Periods in nanoseconds, and bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Between announcements while something changes: at least so long,
    pub announce_every: u64,
    /// and so long for each line of the last round, of which each costs some 8 us in all on two
    /// sides; so a busy shard with thousands of partitions spends 3 % of its time on announcements.
    pub announce_line: u64,
    /// But no longer than this.
    pub announce_every_max: u64,
    /// Between announcements while nothing does.
    pub heartbeat_every: u64,
    /// After which an announcement without an answer is repeated.
    pub repeat_after: u64,
    /// How long a write may be under way before it counts as missed.
    pub grace: u64,
    /// Between searches for partitions to sync. With [`Options::syncs_max`] it is also the pace, so
    /// that a node which comes back leaves its shards and its helpers time for requests.
    pub search_every: u64,
    /// Most syncs under way, and so most that begin in one search.
    pub syncs_max: usize,
    /// Before a helper that failed is asked again; doubled each time.
    pub back_off_min: u64,
    /// The longest of these pauses.
    pub back_off_max: u64,
    /// Largest message, unless one partition's line alone is larger.
    pub message_size_max: usize,
}

impl Default for Options {
    fn default() -> Options {
        const MILLISECOND: u64 = 1_000_000;
        Options {
            announce_every: 200 * MILLISECOND,
            announce_line: MILLISECOND / 4,
            announce_every_max: 4000 * MILLISECOND,
            heartbeat_every: 1000 * MILLISECOND,
            repeat_after: 1000 * MILLISECOND,
            grace: 300 * MILLISECOND,
            search_every: 20 * MILLISECOND,
            syncs_max: 4,
            back_off_min: 500 * MILLISECOND,
            back_off_max: 60_000 * MILLISECOND,
            message_size_max: 64 << 10,
        }
    }
}

/// A partition of this shard, held, hosted, or empty.
struct Local {
    holders: Vec<NodeId>,
    /// The map by which this node became one of them: who works by an older one has not told it all
    /// that it tells a holder, whatever it promises.
    held_since: u32,
    /// Every write of anybody stamped at or below this is here.
    complete: Timestamp,
    /// What others may know: it is durable.
    announced: Announced,
    /// What peers have had for a while and this replica has not.
    behind: Option<catch_up::Behind>,
    /// What follows from all that was heard up to [`Tracking::heard`]: every write that another
    /// holder coordinated and stamped at or below this is here.
    as_of: Cell<(u64, Timestamp)>,
}

#[derive(Clone)]
struct Announced {
    /// Of the last change; 0 if there was nothing to announce yet.
    version: u64,
    seen: Rc<SeenSet>,
    complete: Timestamp,
}

/// A line of a peer's announcements.
struct Entry {
    complete: Timestamp,
    seen: Rc<SeenSet>,
}

/// What is known of a shard of another node, and what it knows of this one.
#[derive(Default)]
struct Peer {
    /// The sender's starts.
    life: u64,
    /// Everything below is as of this announcement.
    version: u64,
    /// All that it took in before this moment of its clock is in the announcement.
    clock: Timestamp,
    promise: Timestamp,
    /// All that it took in before it confirmed this map is in the announcement.
    epoch: u32,
    entries: BTreeMap<PartitionId, Entry>,
    /// It has all up to this announcement.
    acked: u64,
    /// It was sent all up to this one.
    sent: u64,
    sent_at: Option<Instant>,
    /// The message was not the last of its round.
    has_more: bool,
    /// Since then it owes an answer.
    waiting_since: Instant,
    /// Its clock when it first answered to this life.
    knows_us_since: Option<Timestamp>,
}

/// See the module.
pub struct Tracking {
    own: NodeId,
    options: Options,
    shared: Shared,
    locals: Vec<Local>,
    peers: BTreeMap<PeerShard, Peer>,
    /// The last version given out.
    version: u64,
    /// Of the announced state, `None` before there is one.
    told: Option<announce::Told>,
    /// The clock at some position of the log that `seen` had not reached then, and the map that was
    /// confirmed then.
    mark: Option<(u64, Timestamp, u32)>,
    /// All that was taken in before this moment is visible.
    visible: Timestamp,
    /// All that was taken in before this map was confirmed is visible.
    visible_epoch: u32,
    /// The map below which this shard refuses requests.
    epoch: u32,
    /// Partitions by the version of their last change.
    changes: BTreeMap<u64, PartitionId>,
    /// Partitions to look at for the next snapshot.
    dirty: BTreeSet<PartitionId>,
    /// Those whose announced completeness has not passed their newest write.
    unsettled: BTreeSet<PartitionId>,
    snapshot: Option<announce::Snapshot>,
    snapshot_at: Option<Instant>,
    /// How long the next one waits.
    announce_pause: u64,
    /// Counts what may raise how far others say that they have told everything.
    heard: u64,
    /// Those of which the floor may have moved.
    moved: BTreeSet<PartitionId>,
    catch_up: catch_up::CatchUp,
}

impl Tracking {
    /// The tracking of one shard of `own` in its `life`-th start.
    #[must_use]
    pub fn new(own: NodeId, life: u64, options: Options, shared: Shared) -> Tracking {
        let mut tracking = Tracking {
            own,
            options,
            shared: Shared {
                holders: Vec::new(),
                members: BTreeMap::new(),
                moves: Moves::default(),
                ..shared
            },
            locals: Vec::new(),
            peers: BTreeMap::new(),
            version: announce::first_version(life),
            told: None,
            mark: None,
            visible: Timestamp::ZERO,
            visible_epoch: 0,
            epoch: 0,
            changes: BTreeMap::new(),
            dirty: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            snapshot: None,
            snapshot_at: None,
            announce_pause: options.announce_every,
            heard: 0,
            moved: BTreeSet::new(),
            catch_up: catch_up::CatchUp::default(),
        };
        tracking.set_shared(shared);
        tracking
    }

    /// Takes note of a change of members, of their shards, or of holders. The shard's own
    /// partitions stay the same. Whoever may have another part in a partition is told of it again,
    /// as news: an answer to what he was told before does not pass for one to this.
    pub fn set_shared(&mut self, shared: Shared) {
        if self.locals.len() != shared.holders.len() {
            self.locals.clear();
            self.locals.resize_with(shared.holders.len(), || Local {
                holders: Vec::new(),
                held_since: 0,
                complete: Timestamp::ZERO,
                announced: Announced { version: 0, seen: Rc::default(), complete: Timestamp::ZERO },
                behind: None,
                as_of: Cell::default(),
            });
        }
        let mut changed = Vec::new();
        for ((partition, local), holders) in
            (shared.first.0..).map(PartitionId).zip(&mut self.locals).zip(&shared.holders)
        {
            if local.holders != *holders {
                changed.push(partition);
            }
            if local.holders.contains(&self.own) != holders.contains(&self.own) {
                // What a guest knew goes with what it had.
                local.complete = Timestamp::ZERO;
                local.held_since = shared.moves.generation;
            }
            local.holders.clone_from(holders);
            local.behind = None;
        }
        self.catch_up.look_again(&shared);
        self.shared = shared;
        self.heard += 1;
        let mut peers = BTreeSet::new();
        for (node, shard_count) in self.shared.members.iter().filter(|(node, _)| **node != self.own)
        {
            let shard = |partition| shard_of(partition, *shard_count, self.shared.partition_bits);
            let shards: BTreeSet<u32> = self.partitions().map(shard).collect();
            peers.extend(shards.into_iter().map(|shard| PeerShard { node: *node, shard }));
        }
        self.peers.retain(|peer, _| peers.contains(peer));
        for peer in peers {
            self.peers.entry(peer).or_default();
        }
        changed.into_iter().for_each(|partition| self.repeat(partition));
        self.dirty.extend(self.partitions().collect::<Vec<_>>());
        self.moved.extend(self.partitions().collect::<Vec<_>>());
    }

    /// From now on the shard refuses requests of maps before this one.
    pub fn set_epoch(&mut self, epoch: u32) {
        self.epoch = self.epoch.max(epoch);
    }

    /// Whether this replica, a new owner of the partition, has all that each of these old homes had
    /// when it confirmed the map of that generation. Later writes come to it by themselves.
    #[must_use]
    pub fn has_all_of(
        &self,
        partition: PartitionId,
        homes: &[NodeId],
        generation: u32,
        replica: &impl Replica,
    ) -> bool {
        let seen = replica.seen(partition);
        homes.iter().filter(|node| **node != self.own).all(|node| {
            let Some(peer) = self.peer(*node, partition) else { return false };
            let theirs = peer.entries.get(&partition);
            peer.epoch >= generation && theirs.is_none_or(|entry| seen.covers(&entry.seen))
        })
    }

    /// The shard's partitions.
    fn partitions(&self) -> impl Iterator<Item = PartitionId> + use<> {
        let first = self.shared.first.0;
        let count = u32::try_from(self.shared.holders.len()).expect("at most 65,536");
        (first..first + count).map(PartitionId)
    }

    fn place(&self, partition: PartitionId) -> Option<usize> {
        let at = partition.0.checked_sub(self.shared.first.0)? as usize;
        (at < self.locals.len()).then_some(at)
    }

    fn local(&self, partition: PartitionId) -> Option<&Local> {
        Some(&self.locals[self.place(partition)?])
    }

    fn local_mut(&mut self, partition: PartitionId) -> Option<&mut Local> {
        let at = self.place(partition)?;
        Some(&mut self.locals[at])
    }

    /// Shards of other nodes that have partitions in common with this one.
    pub fn peer_shards(&self) -> impl Iterator<Item = PeerShard> + '_ {
        self.peers.keys().copied()
    }

    /// Partitions of which this node is a guest: it has something of them and is no holder.
    pub fn hosted(&self, replica: &impl Replica) -> impl Iterator<Item = PartitionId> {
        let others = self.partitions().filter(|partition| !self.is_holder(*partition));
        others.filter(|partition| !replica.seen(*partition).is_empty())
    }

    /// Whether this node is one of the partition's holders.
    #[must_use]
    pub fn is_holder(&self, partition: PartitionId) -> bool {
        self.local(partition).is_some_and(|local| local.holders.contains(&self.own))
    }

    /// The shard of another node that has the partition.
    fn peer_shard(&self, node: NodeId, partition: PartitionId) -> Option<PeerShard> {
        let shard_count = *self.shared.members.get(&node)?;
        let shard = shard_of(partition, shard_count, self.shared.partition_bits);
        Some(PeerShard { node, shard })
    }

    fn peer(&self, node: NodeId, partition: PartitionId) -> Option<&Peer> {
        self.peers.get(&self.peer_shard(node, partition)?)
    }

    fn entry(&self, node: NodeId, partition: PartitionId) -> Option<&Entry> {
        self.peer(node, partition)?.entries.get(&partition)
    }

    /// The other members, with what they announced of the partition.
    fn others(&self, partition: PartitionId) -> impl Iterator<Item = (NodeId, &Peer)> {
        let members = self.shared.members.keys().filter(|node| **node != self.own);
        members.filter_map(move |node| Some((*node, self.peer(*node, partition)?)))
    }

    /// Nodes that are no holders of the partition and have records of it.
    pub fn guests(&self, partition: PartitionId) -> impl Iterator<Item = NodeId> {
        let holders = self.local(partition).map_or(&[][..], |local| &local.holders[..]);
        self.others(partition)
            .filter(move |(node, peer)| {
                !holders.contains(node) && peer.entries.contains_key(&partition)
            })
            .map(|(node, _)| node)
    }
}

fn origin_of(node: NodeId) -> OriginId {
    OriginId(node.0)
}

/// A peer's announcement that cannot be read; nothing of it was taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTrack {
    /// A line's set.
    #[error(transparent)]
    Seen(#[from] InvalidSeen),
    /// It comes from nobody that has partitions in common with this shard.
    #[error("announcement of shard {shard} of node {node}, which has nothing in common with this one", node = .0.node, shard = .0.shard)]
    Stranger(PeerShard),
    /// It names a partition of another shard.
    #[error("announcement of partition {}, which is on another shard", .0.0)]
    Partition(PartitionId),
}

#[cfg(test)]
mod tests;
