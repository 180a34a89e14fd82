//! The simulated world of one shard: chance, time, tasks and a disk, all from one seed.
//!
//! Invariant: the same seed and the same calls give the same history, byte for byte. No clock,
//! no address, no hash-map order and no thread has a say. The two twins of the production
//! drivers are [`SimExecutor`] (`Runtime`) and [`SimDisk`] (`Disk`). Off either path: tests only.
//!
//! ```
//! use std::path::Path;
//! use annulus_engine::buffer::AlignedBuf;
//! use annulus_engine::disk::{Disk, File, OpenMode, WriteMode};
//! use annulus_engine::sim::{Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor};
//!
//! let executor = SimExecutor::new(7); // any seed; print it when a test fails
//! let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
//! // `run` drives the future and every spawned task; virtual time jumps when all of them wait.
//! executor.run(async {
//!     disk.create_dir(Path::new("data")).await?;
//!     disk.sync_dir(Path::new("")).await?; // a directory is a name too
//!     let file = disk.open(Path::new("data/a"), OpenMode::Create).await?;
//!     disk.sync_dir(Path::new("data")).await?;
//!     let (_buf, written) = file.write_at(0, AlignedBuf::zeroed(4096), WriteMode::Durable).await;
//!     written
//! })?;
//! // What survives a power cut: each write that is not durable is kept, dropped or torn.
//! let survivor = disk.crash(99); // `disk` and its files are dead now
//! assert_eq!(survivor.read_file(Path::new("data/a")).map(|bytes| bytes.len()), Some(4096));
//! survivor.inject(Rule::nth(Op::Sync, 1, Fault::Eio)); // the first sync from now on fails
//! survivor.flip_bit(Path::new("data/a"), 12_345); // damage while it lies there
//! survivor.cut_power_at(survivor.op_count() + 10); // `try_run` then returns `Stopped::Halted`
//! # Ok::<(), annulus_engine::Error>(())
//! ```
//!
//! A restart is a new executor, or the same one after [`SimExecutor::kill_tasks`].

mod control;
pub mod disk;
pub mod executor;
pub mod fault;
mod file;
mod medium;

pub use disk::{SimDisk, SimDiskOptions, SimLock};
pub use executor::{SimExecutor, SimRuntime, Step, Stopped};
pub use fault::{Fault, Op, OpRecord, Rule};
pub use file::SimFile;

/// A seeded generator: `SplitMix64` (Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014). Not for secrets.
#[derive(Clone, Debug)]
pub struct Chance {
    state: u64,
}

impl Chance {
    /// A generator; equal seeds give equal sequences.
    #[must_use]
    pub fn new(seed: u64) -> Chance {
        Chance { state: seed }
    }

    /// Sixty-four fresh bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `bound - 1`; `bound` is at least 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "an empty range has no number");
        // The bias of the high multiply is below 2^-32 for every bound used here.
        let wide = u128::from(self.next_u64()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("below the bound")
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// An index into something with `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        let bound = u64::try_from(len).expect("a length fits 64 bits");
        usize::try_from(self.below(bound)).expect("below a length")
    }

    /// True once in `n` times, on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Another generator, independent of what this one gives later.
    pub fn fork(&mut self) -> Chance {
        Chance::new(self.next_u64())
    }

    /// Fills a slice with random bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_even_and_repeatable() {
        let (mut one, mut two) = (Chance::new(5), Chance::new(5));
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            let drawn = one.index(7);
            assert_eq!(drawn, two.index(7));
            counts[drawn] += 1;
        }
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
        assert_eq!(one.between(3, 3), 3);
    }
}
