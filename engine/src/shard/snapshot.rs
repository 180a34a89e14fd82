//! Snapshots: a directory that can be opened as a shard's own, made of hard links.
//!
//! Invariant: a snapshot holds everything that was visible when it was begun, and its tables'
//! bytes never change, because the live set copies before it punches what a snapshot shares.
//! What is in memory is flushed first, so that the snapshot needs no log but an empty one.

use std::path::Path;

use super::Shard;
use crate::disk::Disk;
use crate::identity::Identity;
use crate::log::{CommitLog, Lsn, ReplayEnd, ReplayItem};
use crate::options::LogOptions;
use crate::runtime::Runtime;
use crate::{Error, Result};

/// The snapshot's log begins with one small segment.
const SEGMENT_SIZE: u64 = 64 << 10;

impl<D: Disk, R: Runtime> Shard<D, R> {
    /// Makes a snapshot of the shard in `to`, which must not exist.
    ///
    /// # Errors
    /// Of the flush and of the disk. State: the shard is unchanged; `to` may hold a part and must
    /// be removed.
    pub async fn snapshot(&self, to: &Path) -> Result<()> {
        self.flush().await?;
        Identity::create(&self.state.disk, to, &self.state.identity).await?;
        let set = self.state.tables.snapshot(to).await?;
        let released = set.layout().released;
        let end = ReplayEnd::fresh(self.state.log_identity(), released.next());
        let options = LogOptions { segment_size: SEGMENT_SIZE, ..self.state.options.log };
        let options = LogOptions { segments_ready: 1, segments_free_max: 0, ..options };
        let (disk, runtime) = (self.state.disk.clone(), self.state.runtime.clone());
        let sink = Box::new(|_: Lsn, _: &ReplayItem<'_>| {});
        let dir = to.join(crate::recover::LOG_DIR);
        let log = CommitLog::start(disk.clone(), runtime, dir, options, end, sink).await?;
        let ceiling = self.state.versions.borrow().ceiling();
        let lsn = log.append_control(ceiling)?;
        log.wait_durable(lsn).await?;
        log.close().await?;
        disk.sync_dir(to).await?;
        match to.parent() {
            Some(parent) => disk.sync_dir(parent).await,
            None => Err(Error::Invalid { what: "a snapshot needs a directory of its own".into() }),
        }
    }
}
