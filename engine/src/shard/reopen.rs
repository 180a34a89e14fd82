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
//!
//! In `periodic` mode the old life has shown, and acknowledged, what its disk had not taken. Only a
//! crash may cost that, and this is none: it is still in memory, and is logged again.

use std::rc::Rc;

use super::{Memory, Shard, ShardState};
use crate::cache::BlockCache;
use crate::disk::Disk;
use crate::log::{Control, OnDamage};
use crate::model::{Record, Token};
use crate::options::Durability;
use crate::recover;
use crate::runtime::Runtime;
use crate::{Error, Result};

/// Records of the old memory that are copied at a time, and their bytes.
const PAGE_RECORDS: usize = 256;
const PAGE_BYTES: usize = 256 << 10;
/// Pause while log or memory have no room for more, in nanoseconds.
const BUSY_NANOS: u64 = 2_000_000;

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
            OnDamage::Refuse,
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
        if matches!(old.options.log.durability, Durability::Periodic { .. })
            && let Err(error) = shard.take_over(old).await
        {
            // The old life keeps all of it, for the next attempt.
            let _ = shard.close().await;
            return Err(error);
        }
        Ok(shard)
    }

    /// Logs what an earlier life of the same directory has in memory and this one has not.
    async fn take_over(&self, old: &ShardState<D, R>) -> Result<()> {
        let partitions = old.memory.borrow().replicas().partitions();
        for partition in partitions {
            let incarnation = old.memory.borrow().replicas().of(partition).incarnation;
            while self.state.versions.borrow().incarnation(partition) < incarnation {
                self.drop_partition(partition)?;
            }
        }
        // Nothing writes to the old memory any more, and nothing is taken out of it.
        let memtables = old.memory.borrow().newest_first().count();
        let mut taken = 0u64;
        for index in (0..memtables).rev() {
            let mut after: Option<Record> = None;
            loop {
                let page = page_of(&old.memory.borrow(), index, after.as_ref());
                let Some(last) = page.last() else { break };
                for record in &page {
                    taken += u64::from(self.take_record(record).await?);
                }
                after = Some(last.clone());
            }
        }
        // What the records do not tell, and only now: they are all here.
        let partitions = old.memory.borrow().replicas().partitions();
        for partition in partitions {
            let seen = Rc::clone(&old.memory.borrow().replicas().of(partition).seen);
            if !self.with_seen(partition, |own| own.covers(&seen)) {
                self.adopt_seen(partition, &seen)?;
            }
        }
        tracing::info!(records = taken, "what the disk had not taken was logged again");
        Ok(())
    }

    /// Logs a record again, unless what is here is as new. Whether it did.
    async fn take_record(&self, record: &Record) -> Result<bool> {
        let version = record.as_ref().version();
        let (token, namespace) = (record.token, record.namespace);
        if record.incarnation < self.incarnation(token.partition(self.partition_bits())) {
            return Ok(false);
        }
        let found = self.get(token, namespace, &record.key).await?;
        if found.is_some_and(|found| found.as_ref().version() >= version) {
            return Ok(false);
        }
        loop {
            let admitted = self.admit(&record.key, record.value.len(), false);
            match admitted.and_then(|()| self.append(&record.as_ref(), false)) {
                Ok(_) => return Ok(true),
                Err(Error::Busy { .. }) => {
                    let runtime = &self.state.runtime;
                    runtime.sleep_until(runtime.now().after_nanos(BUSY_NANOS)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn partition_bits(&self) -> u32 {
        self.state.identity.partition_bits
    }
}

/// The next records of a memtable, counted from the newest.
fn page_of(memory: &Memory, index: usize, after: Option<&Record>) -> Vec<Record> {
    let Some(memtable) = memory.newest_first().nth(index) else { return Vec::new() };
    let records = match after {
        None => memtable.sorted(),
        Some(last) => memtable.sorted_after(last.token, last.namespace, &last.key, Token::MAX),
    };
    let (mut page, mut bytes) = (Vec::new(), 0);
    for record in records {
        bytes += record.key.len() + record.value.len();
        page.push(record.to_owned());
        if page.len() >= PAGE_RECORDS || bytes >= PAGE_BYTES {
            break;
        }
    }
    page
}
