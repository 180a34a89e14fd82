//! Reserving stamps and sequences in the log: [`Versions`] says when, this says how.
//!
//! Invariant: a reservation is in the log before what it covers is used, and what is durable of it
//! is known to `Versions`. A start reserves sequences before the shard takes writes.

use futures_util::future::select;

use super::{Shard, ShardState, Versions};
use crate::Result;
use crate::disk::Disk;
use crate::log::Lsn;
use crate::model::{Timestamp, WallMicros};
use crate::runtime::Runtime;

/// How long a start waits for its reservation, in nanoseconds: a full or stuck disk does not keep a
/// shard from serving reads.
const START_NANOS: u64 = 1_000_000_000;

impl<D: Disk, R: Runtime> ShardState<D, R> {
    /// Reserves what a write with this stamp and sequence needs, if it must.
    ///
    /// # Errors
    /// The log did not take it. State: unchanged.
    #[inline]
    pub(super) fn reserve(
        &self,
        versions: &mut Versions,
        stamp: Timestamp,
        sequence: u64,
        wall: WallMicros,
    ) -> Result<Option<Lsn>> {
        versions.settle(self.log.durable());
        let Some(ceiling) = versions.ceiling_to_reserve(stamp, sequence, wall) else {
            return Ok(None);
        };
        let at = self.log.append_control(ceiling)?;
        versions.reserved(ceiling, at);
        self.ceiling_at.set(at);
        Ok(Some(at))
    }
}

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Reserves the first sequences of a life. If the disk takes long, writes are refused as busy
    /// until it has them.
    pub(crate) async fn reserve_at_start(&self) {
        let state = &*self.state;
        let reserved = {
            let mut versions = state.versions.borrow_mut();
            let (stamp, greatest) = (versions.durable_ceilings().0, versions.greatest_sequence());
            state.reserve(&mut versions, stamp, greatest + 1, state.runtime.wall())
        };
        // What the log did not take, the first write asks for again.
        if let Ok(Some(at)) = reserved {
            let until = state.runtime.now().after_nanos(START_NANOS);
            let durable = std::pin::pin!(state.log.wait_durable(at));
            let late = std::pin::pin!(state.runtime.sleep_until(until));
            select(durable, late).await;
        }
    }
}
