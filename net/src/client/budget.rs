//! How many more requests than asked for may be sent (a token bucket): a share of those that go
//! well, plus a small burst.
//!
//! Invariant: what is taken is never more than the burst and the share together. Pure.

/// What one costs, in units: each success earns as many as the share has percent.
const COST: u64 = 100;

/// A budget.
#[derive(Debug)]
pub(crate) struct Budget {
    units: u64,
    earned: u64,
    full: u64,
}

impl Budget {
    /// A full one. `percent`: how many a hundred successes earn. `burst`: most that are saved.
    pub(crate) fn new(percent: u32, burst: u64) -> Budget {
        let full = burst * COST;
        Budget { units: full, earned: u64::from(percent), full }
    }

    /// Notes a success.
    pub(crate) fn earn(&mut self) {
        self.units = (self.units + self.earned).min(self.full);
    }

    /// Whether so many could be taken.
    pub(crate) fn holds(&self, count: u64) -> bool {
        self.units >= count * COST
    }

    /// Takes one; false when the budget is spent.
    pub(crate) fn take(&mut self) -> bool {
        let left = self.units.checked_sub(COST);
        self.units = left.unwrap_or(self.units);
        left.is_some()
    }
}
