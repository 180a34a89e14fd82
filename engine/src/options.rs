//! Every knob of a shard: unit, default, and when to move it. Sizes in bytes, times in ms.
//!
//! Invariant: an [`Options`] that passed [`Options::validate`] is consistent in itself; nothing
//! below checks it again. The server's configuration fills it, `tuning` proposes it.

use crate::error::{Error, Result};
use crate::model::limits::{
    BLOCK_SIZE_DEFAULT, DISK_ALIGNMENT, VALUE_SIZE_CEILING, VALUE_SIZE_DEFAULT,
};
use crate::model::token::PARTITION_BITS_MAX;

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// When it and all writes before it are on the disk. A crash of any kind loses nothing.
    #[default]
    Sync,
    /// At once. The log is handed to the kernel every few milliseconds and synced once a window:
    /// a killed process loses milliseconds, a power cut up to the window, always the newest.
    Periodic {
        /// Longest time between syncs, in ms, 1 to 60,000.
        window_ms: u64,
    },
}

/// How blocks of tables are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Stored as they are. For values that are compressed already.
    None,
    /// Fast both ways, for most data.
    #[default]
    Lz4,
    /// Smaller, at several times the CPU. For data that is rarely read.
    Zstd {
        /// 1 (fast) to 19 (small).
        level: i32,
    },
}

/// Knobs of the commit log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// When a write is acknowledged. Default: sync.
    pub durability: Durability,
    /// Bytes of a segment file. Default 64 MiB. Smaller returns space sooner and rolls more
    /// often; a record that does not fit makes its own segment grow.
    pub segment_size: u64,
    /// Bytes after which a batch is closed and the next begun. Default 256 KiB. Larger batches
    /// raise the throughput of a busy log until the device's limit, and the memory of the pool.
    pub batch_size: usize,
    /// Batches being written at once, 1 to 64. Default 4. Devices reach their commit rate with
    /// 2 to 4; more only makes smaller batches.
    pub batches_in_flight: usize,
    /// While a batch is being written, the next one starts beside it once it has this many
    /// bytes; a smaller one waits for the write to end. Default 4 KiB. Smaller values trade CPU
    /// and device writes for latency under light load.
    pub overlap_size: usize,
    /// Bytes that may wait for the disk before `append` answers busy. Default 16 MiB.
    pub pending_size_max: usize,
    /// Segments kept ready ahead of need, 1 to 16. Default 1.
    pub segments_ready: usize,
    /// Free segments kept for reuse; more are removed. Default 8.
    pub segments_free_max: usize,
    /// Periodic: longest time before bytes are handed to the kernel, in ms. Default 5.
    pub write_delay_ms: u64,
    /// Quiet time after which the log notes on the disk how far it was synced, in ms, so that
    /// replay can tell damage of the last batch from a torn write. Default 1,000; 0 is never.
    pub quiet_mark_ms: u64,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions {
            durability: Durability::Sync,
            segment_size: 64 << 20,
            batch_size: 256 << 10,
            batches_in_flight: 4,
            overlap_size: 4 << 10,
            pending_size_max: 16 << 20,
            segments_ready: 1,
            segments_free_max: 8,
            write_delay_ms: 5,
            quiet_mark_ms: 1000,
        }
    }
}

/// How full the disk may get, as bytes that must stay free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceOptions {
    /// Below this, writes are slowed so that compaction can return space. Default 4 GiB.
    pub pace_below: u64,
    /// Below this, writes of new data answer full; deletes and reads go on. Default 1 GiB.
    pub refuse_below: u64,
    /// Below this nothing is accepted: kept for the log, the manifest and compaction, so that a
    /// full shard can always free itself. Default 256 MiB.
    pub reserve: u64,
}

impl Default for SpaceOptions {
    fn default() -> SpaceOptions {
        SpaceOptions { pace_below: 4 << 30, refuse_below: 1 << 30, reserve: 256 << 20 }
    }
}

/// Knobs of compaction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompactionOptions {
    /// Bytes of newer runs that may lie above the last level, as a fraction of it, 0.05 to 2.
    /// Default 0.3. Less saves space, more saves writes.
    pub space_target: f64,
    /// Most runs that a read may have to ask, 4 to 256. Default 64: runs cost a read one filter
    /// probe each, merging them earlier costs writes (see `compaction/plan.rs`).
    pub runs_max: usize,
    /// Bytes of a table of the last level, before it is cut. Default 64 MiB. It is also what a
    /// compaction step rewrites, hence its extra space; very large shards want fewer files.
    pub table_size: u64,
    /// Bytes read and merged between two looks at other work. Default 1 MiB.
    pub step_size: usize,
    /// Bytes a second that compaction may write when there is no debt. Default 32 MiB/s.
    pub rate_min: u64,
    /// Bytes a second that it may write at most. Default 2 GiB/s.
    pub rate_max: u64,
    /// Time in which standing debt shall be gone, in ms. Default 600,000.
    pub debt_horizon_ms: u64,
}

impl Default for CompactionOptions {
    fn default() -> CompactionOptions {
        CompactionOptions {
            space_target: 0.3,
            runs_max: 64,
            table_size: 64 << 20,
            step_size: 1 << 20,
            rate_min: 32 << 20,
            rate_max: 2 << 30,
            debt_horizon_ms: 600_000,
        }
    }
}

/// Every knob of one shard.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The commit log.
    pub log: LogOptions,
    /// Bytes of a memtable before it is sealed and flushed. Default 64 MiB. Larger means less
    /// compaction and a longer replay after a crash.
    pub memtable_size: usize,
    /// Sealed memtables that may wait for their flush before writes are slowed. Default 2.
    pub memtables_sealed_max: usize,
    /// Bytes of the block cache. Default 256 MiB.
    pub cache_size: usize,
    /// Target bytes of a table block on disk, a multiple of 512. Default 4 KiB.
    pub block_size: usize,
    /// Compression of blocks, where a namespace does not say otherwise. Default LZ4.
    pub compression: Compression,
    /// Filter bits a key in tables of the last level, 0 to 32. Default 10. Most keys are there,
    /// so this is nearly all the filter memory; it only helps reads of absent keys.
    pub filter_bits_last: u32,
    /// Filter bits a key in newer runs, 0 to 32. Default 18: every read asks all of them, 25 on
    /// average and 49 at most (`compaction/plan.rs`). Of 25 filters of 14 bits 0.047 err a read,
    /// of 16 bits 0.023, of 18 bits 0.012, of 20 bits 0.007; each error is a device read in vain.
    /// Newer runs hold at most 0.3 of the keys, so 18 bits instead of 14 cost 1.2 bits a key of
    /// memory beside the last level's 10.
    pub filter_bits_upper: u32,
    /// Longest value, in bytes, up to 16 MiB. Default 1 MiB.
    pub value_size_max: usize,
    /// How full the disk may get.
    pub space: SpaceOptions,
    /// Compaction.
    pub compaction: CompactionOptions,
    /// q: the ring has `2^q` partitions, 0 to 16. Default 8. Fixed when a cluster is made.
    pub partition_bits: u32,
    /// Whether other nodes hold replicas of this shard's partitions. Default: no. Then nothing is
    /// purged before a floor was set, and what an unclean end may have lost is not declared void
    /// before the node says so.
    pub replicated: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            log: LogOptions::default(),
            memtable_size: 64 << 20,
            memtables_sealed_max: 2,
            cache_size: 256 << 20,
            block_size: BLOCK_SIZE_DEFAULT,
            compression: Compression::Lz4,
            filter_bits_last: 10,
            filter_bits_upper: 18,
            value_size_max: VALUE_SIZE_DEFAULT,
            space: SpaceOptions::default(),
            compaction: CompactionOptions::default(),
            partition_bits: 8,
            replicated: false,
        }
    }
}

impl Options {
    /// Checks every value and the relations between them.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first option that is out of range and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.log.validate()?;
        within("memtable_size", self.memtable_size, 64 << 10, 64 << 30)?;
        within("memtables_sealed_max", self.memtables_sealed_max, 1, 64)?;
        within("cache_size", self.cache_size, 0, 1 << 44)?;
        within("block_size", self.block_size, DISK_ALIGNMENT, 1 << 20)?;
        require(
            self.block_size.is_multiple_of(DISK_ALIGNMENT),
            "block_size must be a multiple of 512 bytes",
        )?;
        if let Compression::Zstd { level } = self.compression {
            within("compression level", level, 1, 19)?;
        }
        within("filter_bits_last", self.filter_bits_last, 0, 32)?;
        within("filter_bits_upper", self.filter_bits_upper, 0, 32)?;
        within("value_size_max", self.value_size_max, 0, VALUE_SIZE_CEILING)?;
        within("partition_bits", self.partition_bits, 0, PARTITION_BITS_MAX)?;
        require(
            self.space.reserve <= self.space.refuse_below
                && self.space.refuse_below <= self.space.pace_below,
            "space limits must rise: reserve <= refuse_below <= pace_below",
        )?;
        let compaction = &self.compaction;
        require(
            (0.05..=2.0).contains(&compaction.space_target),
            "compaction.space_target must be 0.05 to 2",
        )?;
        within("compaction.runs_max", compaction.runs_max, 4, 256)?;
        within("compaction.table_size", compaction.table_size, 64 << 10, 1 << 40)?;
        within("compaction.step_size", compaction.step_size, 4096, 64 << 20)?;
        within("compaction.rate_min", compaction.rate_min, 1, compaction.rate_max)?;
        within("compaction.debt_horizon_ms", compaction.debt_horizon_ms, 1000, 86_400_000)
    }
}

impl LogOptions {
    /// Checks every value and the relations between them.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first option that is out of range and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if let Durability::Periodic { window_ms } = self.durability {
            within("log.durability window_ms", window_ms, 1, 60_000)?;
            within("log.write_delay_ms", self.write_delay_ms, 0, window_ms)?;
        }
        within("log.segment_size", self.segment_size, 16 << 10, 4 << 30)?;
        require(
            self.segment_size.is_multiple_of(4096),
            "log.segment_size must be a multiple of 4096 bytes",
        )?;
        within("log.batch_size", self.batch_size, 4096, 16 << 20)?;
        within("log.batches_in_flight", self.batches_in_flight, 1, 64)?;
        within("log.pending_size_max", self.pending_size_max, self.batch_size, 1 << 30)?;
        within("log.segments_ready", self.segments_ready, 1, 16)?;
        within("log.segments_free_max", self.segments_free_max, 0, 1024)?;
        within("log.quiet_mark_ms", self.quiet_mark_ms, 0, 3_600_000)
    }
}

fn within<T: PartialOrd + std::fmt::Display>(name: &str, value: T, min: T, max: T) -> Result<()> {
    if (&min..=&max).contains(&&value) {
        return Ok(());
    }
    Err(Error::Invalid { what: format!("{name} is {value}; allowed are {min} to {max}") })
}

fn require(holds: bool, rule: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Invalid { what: rule.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        Options::default().validate().unwrap();
    }

    #[test]
    fn a_refusal_names_the_option_and_the_range() {
        let options = Options { partition_bits: 17, ..Options::default() };
        let error = options.validate().unwrap_err().to_string();
        assert_eq!(error, "partition_bits is 17; allowed are 0 to 16");
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let changes: [fn(&mut Options); 5] = [
            |options| options.space.reserve = options.space.refuse_below + 1,
            |options| options.compaction.rate_min = options.compaction.rate_max + 1,
            |options| options.log.segment_size += 1,
            |options| options.compaction.space_target = f64::NAN,
            |options| options.log.durability = Durability::Periodic { window_ms: 1 },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut options = Options::default();
            change(&mut options);
            assert!(options.validate().is_err(), "change {index}");
        }
    }
}
