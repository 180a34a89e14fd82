//! The room that is left on each server, and whether taking one more still lets all be placed.
//!
//! Invariant: all partitions to come can be placed within the caps and bounds of [`Spread`].
//!
//! # Why the walk never gets stuck
//! Let `T` partitions be left, this one included. Suppose there are whole numbers `x`, one for
//! each place of the tree and adding up along it, with `T least <= x <= T most` and no more than
//! the room on each server. Then `x / T` replicas of this partition, and `x (T-1) / T` of those to
//! come, are within all bounds. Sums along a tree with whole bounds have a whole solution where
//! they have any, so there is a choice of whole servers too that leaves such an `x` for `T - 1`.
//! It starts with the shares, which the caps exceed. Each step picks servers in the order of the
//! walk, and only those that some such choice has along with all picked before.
//!
//! Whether it has is known exactly. Picking a *tight* server, one with room for all partitions to
//! come, loses nothing, since it could not use that room otherwise; any other costs one. What the
//! parts of a place lose, it loses but for the excess of their room over `most`, and it may lose
//! no more than leaves `least` for every partition to come. So the loss by the number of picks
//! inside a place is always flat first, then rises by one each: a [`Loss`].

use super::spread::Spread;

/// The loss for each possible number of replicas of this partition in a place.
#[derive(Clone, Copy, Debug, Default)]
struct Loss {
    /// The fewest and
    least: u64,
    /// the most that are possible.
    most: u64,
    /// What the fewest lose.
    base: u64,
    /// How many more are free; each further one loses one more.
    free: u64,
}

impl Loss {
    /// The loss of two places together.
    fn and(self, other: Loss) -> Loss {
        Loss {
            least: self.least + other.least,
            most: self.most + other.most,
            base: self.base + other.base,
            free: self.free + other.free,
        }
    }

    /// Takes back [`Loss::and`].
    fn without(self, other: Loss) -> Loss {
        Loss {
            least: self.least - other.least,
            most: self.most - other.most,
            base: self.base - other.base,
            free: self.free - other.free,
        }
    }
}

/// A place in this step.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// The loss of the parts together.
    parts: Loss,
    /// The loss of the place.
    own: Loss,
    /// What the parts have for the partitions after this one, if nothing is lost.
    capacity: u64,
    /// How much of the parts' loss does not matter.
    excess: u64,
    /// How much may be lost.
    budget: u64,
    least: u64,
    most: u64,
}

impl State {
    /// The loss of the place, from that of its parts. None if nothing is possible.
    fn bound(&self, parts: Loss) -> Option<Loss> {
        let Loss { mut least, mut base, mut free, .. } = parts;
        let absorbed = self.excess.min(base);
        base -= absorbed;
        free += self.excess - absorbed;
        let more = self.least.saturating_sub(least);
        least += more;
        base += more.saturating_sub(free);
        free = free.saturating_sub(more);
        let affordable = least + free + self.budget.checked_sub(base)?;
        let most = parts.most.min(self.most).min(affordable);
        free = free.min(most.checked_sub(least)?);
        Some(Loss { least, most, base, free })
    }
}

/// See the module.
pub(super) struct Rooms<'a> {
    spread: &'a Spread,
    rooms: Vec<u64>,
    states: Vec<State>,
}

impl<'a> Rooms<'a> {
    /// All empty.
    pub(super) fn new(spread: &'a Spread) -> Rooms<'a> {
        let states = spread
            .places
            .iter()
            .map(|place| State { least: place.least, most: place.most, ..State::default() })
            .collect();
        Rooms { spread, rooms: spread.caps(), states }
    }

    /// Begins the next partition; `to_come` counts it and those after it.
    pub(super) fn begin(&mut self, to_come: u64) {
        let later = to_come - 1;
        for state in &mut self.states {
            (state.parts, state.capacity) = (Loss::default(), 0);
        }
        for index in (0..self.states.len()).rev() {
            let state = &mut self.states[index];
            if let Some(server) = index.checked_sub(self.spread.servers) {
                let room = self.rooms[server];
                let free = u64::from(room >= to_come);
                state.own = Loss { least: 0, most: room.min(1), base: 0, free };
                state.capacity = room.min(later);
            } else {
                let capacity = state.capacity.min(state.most * later);
                state.excess = state.capacity - capacity;
                state.budget = capacity - state.least * later;
                state.capacity = capacity;
                state.own = state.bound(state.parts).expect("a choice remains, see the module");
            }
            if index > 0 {
                let State { own, capacity, .. } = *state;
                let parent = &mut self.states[self.spread.places[index].parent];
                parent.parts = parent.parts.and(own);
                parent.capacity += capacity;
            }
        }
    }

    /// Puts a replica of this partition on the server, if it has none yet and all can be placed.
    pub(super) fn take(&mut self, server: usize) -> bool {
        let mut index = self.spread.servers + server;
        let own = self.states[index].own;
        if own.least == 1 || own.most == 0 {
            return false;
        }
        let mut new = Loss { least: 1, most: 1, base: 1 - own.free, free: 0 };
        // Server, rack, data centre, cluster: nothing is changed before all have agreed.
        let mut path = [(index, Loss::default(), new); 4];
        for step in &mut path[1..] {
            let old = self.states[index].own;
            index = self.spread.places[index].parent;
            let state = &self.states[index];
            let parts = state.parts.without(old).and(new);
            let Some(bound) = state.bound(parts) else { return false };
            new = bound;
            *step = (index, parts, new);
        }
        for (index, parts, own) in path {
            self.states[index].parts = parts;
            self.states[index].own = own;
        }
        self.rooms[server] -= 1;
        true
    }
}
