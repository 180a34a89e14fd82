//! How one node divides its memory. Pure arithmetic; the sum is checked against the total.
//!
//! Invariant: [`Budget::sum`] never exceeds the memory that was given, so that resident memory
//! stays within it plus the allocator's slack (10 % is promised). See `notes/memory.md`.

use std::fmt;

/// Fixed cost of the process: code, runtime, admin address, in bytes.
pub const PROCESS_BYTES: u64 = 24 << 20;
/// Fixed cost of a shard: rings, receive buffers, log batches, flush and compaction buffers.
pub const SHARD_BYTES: u64 = 12 << 20;
/// What an idle connection may cost, in bytes.
pub const CONNECTION_BYTES: u64 = 8 << 10;
/// Memtables of a shard that exist at once: one active, two sealed.
pub const MEMTABLES_PER_SHARD: u64 = 3;
/// Smallest memtable that is proposed, in bytes.
pub const MEMTABLE_PROPOSED_MIN: u64 = 1 << 20;
/// Largest memtable that is proposed, in bytes: beyond it, flushes are no cheaper.
pub const MEMTABLE_PROPOSED_MAX: u64 = 256 << 20;
/// Connections that are proposed where memory allows.
pub const CONNECTIONS_PROPOSED: u32 = 12_000;

/// What is to be divided, and what is already decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetInput {
    /// Memory of the node, in bytes.
    pub memory: u64,
    /// Shards of the node, at least 1.
    pub shards: u32,
    /// Longest value, in bytes.
    pub value_size_max: u64,
    /// Size of one memtable, in bytes, when decided.
    pub memtable_size: Option<u64>,
    /// Block cache of the whole node, in bytes, when decided.
    pub cache_size: Option<u64>,
    /// Most client connections, when decided.
    pub connections_max: Option<u32>,
}

/// How the memory is divided. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Budget {
    /// What was given.
    pub memory: u64,
    /// Shards it is divided among.
    pub shards: u32,
    /// Process and shards, before any data.
    pub fixed: u64,
    /// Most client connections of the node.
    pub connections_max: u32,
    /// What those connections may cost while idle.
    pub connections: u64,
    /// Requests and replies in flight, whole node.
    pub requests: u64,
    /// Size of one memtable of one shard.
    pub memtable_size: u64,
    /// All memtables of the node.
    pub memtables: u64,
    /// Filters and indexes, pinned, whole node.
    pub pinned: u64,
    /// Block cache, whole node.
    pub cache: u64,
}

/// The memory does not suffice. State: nothing was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetError {
    /// What is needed at least, in bytes.
    pub needed: u64,
    /// What was given, in bytes.
    pub memory: u64,
    /// The part that is too large.
    pub what: &'static str,
}

impl fmt::Display for BudgetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "memory of {} MiB does not suffice: {} need {} MiB in all",
            self.memory >> 20,
            self.what,
            self.needed.div_ceil(1 << 20)
        )
    }
}

impl std::error::Error for BudgetError {}

impl Budget {
    /// Divides the memory: first what is fixed, then what was decided, then shares of the rest.
    ///
    /// # Errors
    /// [`BudgetError`] when what was decided does not fit.
    pub fn divide(input: &BudgetInput) -> Result<Budget, BudgetError> {
        let shards = u64::from(input.shards.max(1));
        let mut left = Left { memory: input.memory, used: 0 };

        let fixed = PROCESS_BYTES.saturating_add(shards.saturating_mul(SHARD_BYTES));
        left.take(fixed, "process and shards")?;

        let connections_max = input.connections_max.unwrap_or_else(|| {
            let affordable = left.rest() / 10 / CONNECTION_BYTES;
            u32::try_from(affordable.clamp(16, u64::from(CONNECTIONS_PROPOSED)))
                .expect("clamped to 32 bits")
        });
        let connections = u64::from(connections_max).saturating_mul(CONNECTION_BYTES);
        left.take(connections, "connections")?;

        // Each shard must be able to take in one value of the largest size and to answer one.
        let least = shards.saturating_mul(input.value_size_max).saturating_mul(2);
        let requests = least.max(left.rest() / 10);
        left.take(requests, "requests in flight")?;

        let rest = left.rest();
        let memtable_size = input.memtable_size.unwrap_or_else(|| {
            let share = rest / 100 * 35 / (shards * MEMTABLES_PER_SHARD);
            // Whole MiB read better in reports, and nothing depends on the last bytes.
            (share.min(MEMTABLE_PROPOSED_MAX) & !((1 << 20) - 1)).max(MEMTABLE_PROPOSED_MIN)
        });
        let memtables = memtable_size.saturating_mul(shards * MEMTABLES_PER_SHARD);
        left.take(memtables, "memtables")?;

        let cache = input.cache_size.unwrap_or(left.rest() - left.rest() / 4);
        left.take(cache, "cache")?;
        let pinned = left.rest();
        Ok(Budget {
            memory: input.memory,
            shards: input.shards.max(1),
            fixed,
            connections_max,
            connections,
            requests,
            memtable_size,
            memtables,
            pinned,
            cache,
        })
    }

    /// All parts together; at most `memory`.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.fixed + self.connections + self.requests + self.memtables + self.pinned + self.cache
    }

    /// Block cache of one shard.
    #[must_use]
    pub fn cache_per_shard(&self) -> u64 {
        self.cache / u64::from(self.shards)
    }

    /// Requests and replies in flight of one shard.
    #[must_use]
    pub fn requests_per_shard(&self) -> u64 {
        self.requests / u64::from(self.shards)
    }

    /// The parts by name, for a report, in the order of decision.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64, &'static str); 6] {
        [
            ("fixed", self.fixed, "process, rings, receive buffers, log and flush buffers"),
            ("connections", self.connections, "8 KiB for each connection that is allowed"),
            ("requests", self.requests, "requests and replies in flight"),
            ("memtables", self.memtables, "three a shard: one active, two sealed"),
            ("pinned", self.pinned, "filters and indexes of tables; 2 to 4 bytes a key"),
            ("cache", self.cache, "blocks read from tables"),
        ]
    }
}

struct Left {
    memory: u64,
    used: u64,
}

impl Left {
    fn rest(&self) -> u64 {
        self.memory - self.used
    }

    fn take(&mut self, bytes: u64, what: &'static str) -> Result<(), BudgetError> {
        let needed = self.used.saturating_add(bytes);
        if needed > self.memory {
            return Err(BudgetError { needed, memory: self.memory, what });
        }
        self.used = needed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(memory: u64, shards: u32) -> BudgetInput {
        BudgetInput {
            memory,
            shards,
            value_size_max: 1 << 20,
            memtable_size: None,
            cache_size: None,
            connections_max: None,
        }
    }

    #[test]
    fn the_parts_never_exceed_the_memory() {
        for memory_mib in [64u64, 100, 256, 1 << 10, 3 << 10, 64 << 10, 1 << 20] {
            for shards in [1, 2, 3, 16, 128] {
                let input = input(memory_mib << 20, shards);
                let Ok(budget) = Budget::divide(&input) else {
                    assert!(u64::from(shards) * (SHARD_BYTES + (4 << 20)) > memory_mib << 19);
                    continue;
                };
                assert!(budget.sum() <= input.memory, "{budget:?}");
                assert_eq!(budget.sum(), budget.parts().iter().map(|part| part.1).sum::<u64>());
                assert!(budget.memtable_size >= MEMTABLE_PROPOSED_MIN);
                assert!(budget.requests_per_shard() >= 2 * input.value_size_max);
            }
        }
    }

    #[test]
    fn what_is_decided_is_kept() {
        let decided = BudgetInput {
            memtable_size: Some(8 << 20),
            cache_size: Some(100 << 20),
            connections_max: Some(50),
            ..input(1 << 30, 2)
        };
        let budget = Budget::divide(&decided).unwrap();
        assert_eq!(
            (budget.memtable_size, budget.cache, budget.connections_max),
            (8 << 20, 100 << 20, 50)
        );
        assert_eq!(budget.memtables, 48 << 20);
        assert!(budget.sum() <= 1 << 30);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = Budget::divide(&input(16 << 20, 1)).unwrap_err();
        assert_eq!(error.what, "process and shards");
        let large = BudgetInput { cache_size: Some(2 << 30), ..input(1 << 30, 1) };
        let error = Budget::divide(&large).unwrap_err();
        assert_eq!(error.what, "cache");
        assert!(error.to_string().contains("1024 MiB does not suffice"));
        let absurd = BudgetInput { memtable_size: Some(u64::MAX), ..input(1 << 30, 4) };
        assert_eq!(Budget::divide(&absurd).unwrap_err().what, "memtables");
    }

    #[test]
    fn a_machine_of_8_gib_gets_256_mib_memtables_and_half_of_it_cache() {
        let budget = Budget::divide(&input(8 << 30, 2)).unwrap();
        assert_eq!(budget.memtable_size, 256 << 20);
        assert_eq!(budget.connections_max, CONNECTIONS_PROPOSED);
        assert!(budget.cache > budget.memory / 2);
    }
}
