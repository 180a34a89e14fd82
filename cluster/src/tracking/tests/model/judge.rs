//! The end of a schedule: peace, and the verdict by the whole histories.

use std::collections::BTreeSet;

use annulus_engine::model::causality::KeyState;
use annulus_engine::model::{Dot, Kind, OriginId, WallMicros};

use super::Mode;
use super::node::PARTITION;
use super::world::{MS, World, Write};
use crate::tracking::Replica;

impl World {
    // --- the end ---

    /// No more faults; time passes until there is nothing left to do.
    pub(super) fn make_peace(&mut self) {
        self.rules.loss_percent = 0;
        self.rules.slow_guests = false;
        let ids: Vec<u32> = self.nodes.keys().copied().collect();
        for round in 0..80 {
            self.pass(5 * MS);
            for id in &ids {
                self.poll(*id);
                let all = self.nodes[id].view.unsynced.len();
                self.sync_log(*id, all);
                self.housekeep(*id);
                if round >= 8 || self.lot.percent(50) {
                    self.purge(*id);
                }
            }
            while !self.wire.is_empty() {
                let at = usize::try_from(self.lot.below(self.wire.len() as u64)).unwrap();
                let envelope = self.wire.swap_remove(at);
                self.deliver(envelope);
                if self.lot.percent(20) {
                    let id = self.holder();
                    self.purge(id);
                }
            }
            let is_long = round > if self.rules.is_lively { 80 } else { 20 };
            if round > 4 && (is_long || self.judge_liveness().is_ok()) {
                return;
            }
        }
    }

    /// The values that a holder shows of a key.
    fn shown(&self, id: u32, key: u8, wall: WallMicros) -> BTreeSet<Dot> {
        let Some(record) = self.nodes[&id].view.state.records.get(&key) else {
            return BTreeSet::new();
        };
        if record.kind == Kind::Siblings {
            let state = KeyState::decode(&record.value).unwrap();
            return state.live(wall).map(|sibling| sibling.dot).collect();
        }
        record.as_ref().is_live(wall).then_some(record.dot).into_iter().collect()
    }

    /// Whoever has seen the same shows the same.
    pub(super) fn compare(&mut self) -> Result<(), String> {
        for (one, other) in (1..self.rules.holders).map(|id| (id, id + 1)) {
            let sets = [one, other].map(|id| &self.nodes[&id].view.state.seen);
            if !sets[0].is_same(sets[1]) {
                continue;
            }
            self.counts.compared += 1;
            for key in 0..self.rules.keys {
                // By one clock, and expired ones left out: holders purge them at different times.
                let wall = WallMicros(u64::MAX >> 12);
                let shown = [one, other].map(|id| self.shown(id, key, wall));
                if shown[0] != shown[1] {
                    return Err(format!("equal seen, key {key}: {shown:?}"));
                }
            }
        }
        Ok(())
    }

    pub(super) fn judge(&self) -> Result<(), String> {
        let wall = WallMicros(u64::MAX >> 12);
        for key in 0..self.rules.keys {
            let shown: Vec<BTreeSet<Dot>> =
                (1..=self.rules.holders).map(|id| self.shown(id, key, wall)).collect();
            if shown.iter().any(|other| *other != shown[0]) {
                return Err(format!("diverged, key {key}: {shown:?}"));
            }
            let of_key =
                || self.writes.iter().filter(|(dot, w)| w.key == key && self.safe.contains(dot));
            let expected: BTreeSet<Dot> = match self.rules.mode {
                Mode::LastWrite => of_key()
                    .max_by_key(|(_, write)| write.version)
                    .filter(|(_, write)| !write.is_gone)
                    .map(|(dot, _)| *dot)
                    .into_iter()
                    .collect(),
                Mode::Siblings => {
                    let replaced: BTreeSet<Dot> =
                        of_key().flat_map(|(_, write)| write.past.iter().copied()).collect();
                    let stays =
                        |(dot, write): &(&Dot, &Write)| !write.is_gone && !replaced.contains(dot);
                    of_key().filter(stays).map(|(dot, _)| *dot).collect()
                }
            };
            if let Some(lost) = expected.difference(&shown[0]).next() {
                return Err(format!("lost, key {key}: {lost:?}, shown {:?}", shown[0]));
            }
            if let Some(back) = shown[0].difference(&expected).next() {
                return Err(format!("came back, key {key}: {back:?}, expected {expected:?}"));
            }
        }
        if self.rules.is_lively {
            self.judge_liveness()?;
        }
        Ok(())
    }

    /// All that should have an end has come to it.
    fn judge_liveness(&self) -> Result<(), String> {
        for (id, node) in &self.nodes {
            let figures = node.tracking.convergence(&node.view);
            if figures.in_sync != figures.held || figures.hosted > 0 {
                return Err(format!("node {id} is not in sync: {figures:?}"));
            }
            if node.view.gap.is_some() {
                return Err(format!("node {id} still has its gap"));
            }
            let wall = WallMicros(u64::MAX >> 12);
            let keys = (0..self.rules.keys).filter(|key| self.shown(*id, *key, wall).is_empty());
            for key in keys {
                if let Some(record) = node.view.state.records.get(&key) {
                    let floor = node.tracking.purge_floor(PARTITION);
                    return Err(format!("node {id} keeps {record:?} above {floor:?}"));
                }
            }
            let origin = OriginId(*id);
            let base = node.view.state.seen.of(origin).base();
            if *id <= self.rules.holders && base < node.view.sequence && base > 0 {
                return Err(format!("node {id} has a gap in its own writes"));
            }
            if !node.tracking.tombstones_waiting_for(&node.view).is_empty() {
                return Err(format!("node {id} waits for somebody"));
            }
            let complete = node.tracking.complete(PARTITION, &node.view);
            if *id <= self.rules.holders && complete < node.view.seen(PARTITION).newest() {
                return Err(format!("node {id} is not complete"));
            }
        }
        Ok(())
    }
}
