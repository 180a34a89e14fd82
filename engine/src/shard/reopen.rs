//! A second life in the same process, after a failed write or sync has poisoned the log.
//!
//! The failed file is never synced again nor appended to (`RELIABILITY.md` decision 6): the log is
//! replayed from the medium, and goes on in a new segment. What the medium does not give back
//! counts as not there; it was answered "may be applied".
//!
//! Invariant: before the directory is opened anew nothing of the old life writes to it any more:
//! its tasks have ended, no operation of its log is under way, and its tables take no commit. The
//! old life goes on answering reads from its memory and its open files for as long as somebody
//! holds it, and so long the new one neither removes nor punches what both have open.

use std::rc::Rc;

use super::Shard;
use crate::Result;
use crate::cache::BlockCache;
use crate::disk::Disk;
use crate::log::Control;
use crate::recover;
use crate::runtime::Runtime;

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Opens the same directory anew, on a new log segment after replay. Everything that was
    /// acknowledged is in the new shard; this one must get no more writes, and may be read
    /// until it is dropped. To be called when [`Shard::is_poisoned`], and again after a failure.
    ///
    /// # Errors
    /// As [`Shard::open`]. State: this shard still answers reads; its background work has ended.
    pub async fn reopen(&self) -> Result<Shard<D, R>> {
        let old = &*self.state;
        self.stop_tasks().await;
        // It fails, because the log is poisoned, when no operation of it is under way any more.
        let _ = old.log.close().await;
        old.tables.retire().await;
        let shard = recover::prepare(
            old.disk.clone(),
            old.runtime.clone(),
            &old.dir,
            &old.identity,
            old.options,
            old.compression.clone(),
        )
        .await?;
        let new = &*shard.state;
        if let Control::Ceiling { timestamp, sequence } = old.versions.borrow().ceiling() {
            // What was stamped and lost is not stamped again.
            new.versions.borrow_mut().raise(timestamp, sequence);
        }
        // Tables keep their numbers, so blocks stay what they are.
        new.cache.swap(&old.cache);
        *old.cache.borrow_mut() = BlockCache::new(0);
        *new.stats.borrow_mut() = *old.stats.borrow();
        new.keep.copy_dropped(&old.keep);
        new.watch_nanos.set(old.watch_nanos.get());
        let elder = Rc::downgrade(&self.state);
        new.tables.hold_files(move || elder.strong_count() > 0);
        shard.reserve_at_start().await;
        shard.start_tasks();
        Ok(shard)
    }
}
