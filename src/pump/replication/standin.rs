//! Copies that this shard keeps for the homes of a partition while they cannot be reached.
//!
//! Invariant: a copy is kept only if there is [room](annulus_cluster::room); whoever asked is told that there is none
//! before anything is done. What is kept here is counted at the latest when it is kept, and goes
//! when the homes have it: then the partition is dropped.
//!
//! On the write path of a sloppy quorum: before the merge of another coordinator's record, and
//! before this shard's own append where it coordinates for homes that are all away.

use annulus_cluster::message::PeerMessage;
use annulus_cluster::room::size_of;
use annulus_cluster::tracking::PeerShard;
use annulus_engine::disk::Disk;
use annulus_engine::model::{PartitionId, RecordRef, Token};
use annulus_engine::runtime::Runtime;

use super::exchange::View;
use super::{Letter, Replication};
use crate::metrics::ShardSnapshot;
use crate::pump::{Lane, Pump};

/// The key's partition is another's, and so many bytes are to be kept for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    partition: PartitionId,
    bytes: u64,
}

/// There is no room.
pub(super) struct NoRoom;

impl Replication {
    /// Whether a record of this token is kept for others, and there is room for it.
    pub(super) fn admit_guest(
        &mut self,
        token: Token,
        bytes: u64,
    ) -> Result<Option<Guest>, NoRoom> {
        let partition = token.partition(self.topology.partition_bits());
        if self.tracking.is_holder(partition) {
            return Ok(None);
        }
        // A new owner must have nothing of it, and who leaves would have to hand it over.
        if self.topology.is_leaving() || self.topology.is_preparing(partition) {
            return Err(NoRoom);
        }
        match self.room.admit(bytes) {
            true => Ok(Some(Guest { partition, bytes })),
            false => Err(NoRoom),
        }
    }

    /// A copy that was admitted is being kept.
    pub(super) fn keep_guest(&mut self, guest: Option<Guest>) {
        if let Some(Guest { partition, bytes }) = guest {
            self.room.keep(partition, bytes);
        }
    }

    /// The same for a record of another node's.
    pub(super) fn admit_copy(&mut self, record: &RecordRef<'_>) -> Result<Option<Guest>, NoRoom> {
        self.admit_guest(record.token, size_of(record.key, record.value))
    }

    /// For the operator.
    pub(in crate::pump) fn note_room(&self, snapshot: &mut ShardSnapshot) {
        let room = &self.room;
        snapshot.metrics.counters.hints_refused = room.refused();
        snapshot.gauges.hint_bytes = room.bytes();
        snapshot.gauges.hint_bytes_max = room.bytes_max();
    }
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Counts what is kept for others: at a start, and when homes have become others. Looks at all
    /// partitions, and at those records in memory that are kept for others.
    pub(super) fn count_room(&mut self) {
        let view = View { shard: &self.shard, wall: self.wall };
        let Some(replication) = &mut self.replication else { return };
        let hosted = replication.tracking.hosted(&view);
        let counted: Vec<(PartitionId, u64)> =
            hosted.map(|partition| (partition, self.shard.partition_bytes(partition))).collect();
        replication.room.count_anew(counted);
    }

    /// Partitions of which nothing is kept any more, however that came, do not count.
    pub(super) fn look_at_room(&mut self) {
        let Some(replication) = &mut self.replication else { return };
        let shard = &self.shard;
        let is_gone = |partition: &PartitionId| {
            shard.seen(*partition).is_empty() && !shard.is_busy(*partition)
        };
        let gone: Vec<PartitionId> = replication.room.partitions().filter(is_gone).collect();
        gone.into_iter().for_each(|partition| replication.room.forget(partition));
    }

    /// Tells those who may ask for copies whether there is room, if they must be told now.
    pub(super) fn tell_room(&mut self) {
        let Some(replication) = &mut self.replication else { return };
        let Some(is_left) = replication.room.poll_tell(self.now) else { return };
        let Replication { tracking, letters, peers, .. } = &mut **replication;
        let reached = tracking.peer_shards().filter(|peer| peers.contains_key(&peer.node));
        let message = PeerMessage::Room { is_left };
        letters.extend(reached.map(|to| Letter::new(to, Lane::Foreground, &message)));
    }

    /// A shard of another node has said whether it has room.
    pub(super) fn take_room(&mut self, from: PeerShard, is_left: bool) {
        let now = self.now;
        if let Some(replication) = &mut self.replication {
            replication.coordinator.health_mut().set_room(now, from.node, is_left);
        }
    }
}
