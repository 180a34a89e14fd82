//! The reference: what a store that follows the rules may answer.
//!
//! Invariant: nothing here is clever. Last-write-wins is a maximum over a list of writes;
//! siblings are the events that no other event has seen, with histories kept as explicit sets
//! (causal histories, Schwarz and Mattern 1994) instead of vectors and dots.
//!
//! A write is *open* until its answer is known: then it is acknowledged (must be seen), refused
//! (must never be seen), or stays open for ever (may be seen: the answer was an error that says
//! so, or the power went). Promises P1, P2, P3 and P7 of the manual are the methods here.

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::{Dot, NamespaceId, Timestamp};

/// A key with its namespace.
pub type KeyName = (NamespaceId, Vec<u8>);

/// What a write does to its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The key has this value from now on.
    Put {
        /// The value.
        value: Vec<u8>,
        /// Milliseconds since 2024-01-01 from which it reads as deleted; 0 is never.
        expiry_ms: u64,
    },
    /// The key has no value from now on.
    Delete,
}

impl Effect {
    /// What a reader gets of it at `now_ms`.
    #[must_use]
    pub fn value_at(&self, now_ms: u64) -> Option<&[u8]> {
        match self {
            Effect::Put { value, expiry_ms } if *expiry_ms == 0 || now_ms < *expiry_ms => {
                Some(value)
            }
            Effect::Put { .. } | Effect::Delete => None,
        }
    }
}

/// Whether a write has to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// May be seen: no answer yet, or one that leaves it open.
    Open,
    /// Must be seen, or what replaced it.
    Acknowledged,
    /// Must never be seen.
    Refused,
}

/// One write in the order in which the shard was asked.
#[derive(Clone, Debug)]
pub struct Write {
    /// To which key.
    pub key: KeyName,
    /// What.
    pub effect: Effect,
    /// Its place in the order of last-write-wins.
    pub version: (Timestamp, Dot),
    /// What became of it.
    pub fate: Fate,
}

/// All values that a reader sees, by key.
pub type Contents = BTreeMap<KeyName, Vec<u8>>;

/// The reference for last-write-wins.
#[derive(Clone, Debug, Default)]
pub struct Model {
    writes: Vec<Write>,
    by_key: BTreeMap<KeyName, Vec<usize>>,
}

impl Model {
    /// A write is about to be asked for. Its index, for [`Model::acknowledge`] and `refuse`.
    pub fn begin(&mut self, key: KeyName, effect: Effect, version: (Timestamp, Dot)) -> usize {
        let index = self.writes.len();
        self.by_key.entry(key.clone()).or_default().push(index);
        self.writes.push(Write { key, effect, version, fate: Fate::Open });
        index
    }

    /// The write was acknowledged.
    pub fn acknowledge(&mut self, index: usize) {
        self.writes[index].fate = Fate::Acknowledged;
    }

    /// The answer said that the write had not started.
    pub fn refuse(&mut self, index: usize) {
        self.writes[index].fate = Fate::Refused;
    }

    /// The writes, in order.
    #[must_use]
    pub fn writes(&self) -> &[Write] {
        &self.writes
    }

    /// The writes of one key, in order.
    pub fn writes_of(&self, key: &KeyName) -> impl Iterator<Item = &Write> {
        let indices = self.by_key.get(key).map(Vec::as_slice).unwrap_or_default();
        indices.iter().map(|index| &self.writes[*index])
    }

    /// All keys ever written.
    pub fn keys(&self) -> impl Iterator<Item = &KeyName> {
        self.by_key.keys()
    }

    /// The winner among the acknowledged writes of the key.
    #[must_use]
    pub fn winner(&self, key: &KeyName) -> Option<&Write> {
        let indices = self.by_key.get(key)?;
        let writes = indices.iter().map(|index| &self.writes[*index]);
        writes.filter(|write| write.fate == Fate::Acknowledged).max_by_key(|write| write.version)
    }

    /// What the key must read as when no write is open.
    #[must_use]
    pub fn get(&self, key: &KeyName, now_ms: u64) -> Option<&[u8]> {
        self.winner(key).and_then(|write| write.effect.value_at(now_ms))
    }

    /// Whether a read may answer this: the acknowledged winner, or an open write above it.
    #[must_use]
    pub fn allows(&self, key: &KeyName, answer: Option<&[u8]>, now_ms: u64) -> bool {
        let floor = self.winner(key).map(|write| write.version);
        self.allows_from(key, floor, answer, now_ms)
    }

    /// Whether a read may answer this that began when `floor` was the acknowledged winner.
    #[must_use]
    pub fn allows_from(
        &self,
        key: &KeyName,
        floor: Option<(Timestamp, Dot)>,
        answer: Option<&[u8]>,
        now_ms: u64,
    ) -> bool {
        if floor.is_none() && answer.is_none() {
            return true;
        }
        self.writes_of(key).any(|write| {
            write.fate != Fate::Refused
                && Some(write.version) >= floor
                && write.effect.value_at(now_ms) == answer
        })
    }

    /// What readers see when no write is open.
    #[must_use]
    pub fn contents(&self, now_ms: u64) -> Contents {
        let live = |key: &KeyName| Some((key.clone(), self.get(key, now_ms)?.to_vec()));
        self.by_key.keys().filter_map(live).collect()
    }

    /// P1: what a crash costs is a suffix of the log, never a hole. The cut that explains
    /// `seen`: all writes before it are there, and none from it on; with `Sync` it must lie
    /// behind every acknowledged write. Open writes before the cut count as done from then on.
    ///
    /// # Errors
    /// What is wrong, when no cut explains it.
    pub fn settle_after_crash(&mut self, seen: &Contents, now_ms: u64) -> Result<usize, String> {
        let acknowledged = self.writes.iter().rposition(|w| w.fate == Fate::Acknowledged);
        let lowest = acknowledged.map_or(0, |index| index + 1);
        self.settle_from(lowest, seen, now_ms)
    }

    /// [`Model::settle_after_crash`] for `Periodic`: the cut must lie at or behind `lowest`;
    /// acknowledged writes from the cut on are gone.
    ///
    /// # Errors
    /// What is wrong, when no cut explains it.
    pub fn settle_from(
        &mut self,
        lowest: usize,
        seen: &Contents,
        now_ms: u64,
    ) -> Result<usize, String> {
        // The latest cut first: most of what was asked for is there.
        for cut in (lowest..=self.writes.len()).rev() {
            if self.contents_up_to(cut, now_ms) == *seen {
                self.by_key.values_mut().for_each(|indices| indices.retain(|index| *index < cut));
                for (index, write) in self.writes.iter_mut().enumerate() {
                    let happened = index < cut && write.fate != Fate::Refused;
                    write.fate = if happened { Fate::Acknowledged } else { Fate::Refused };
                }
                return Ok(cut);
            }
        }
        Err(self.explain(lowest, seen, now_ms))
    }

    /// What readers see when exactly the writes before `cut` happened, refused ones excepted.
    fn contents_up_to(&self, cut: usize, now_ms: u64) -> Contents {
        let mut contents = Contents::new();
        for (key, indices) in &self.by_key {
            let writes = indices.iter().filter(|index| **index < cut);
            let winner = writes
                .map(|index| &self.writes[*index])
                .filter(|write| write.fate != Fate::Refused)
                .max_by_key(|write| write.version);
            if let Some(value) = winner.and_then(|write| write.effect.value_at(now_ms)) {
                contents.insert(key.clone(), value.to_vec());
            }
        }
        contents
    }

    fn explain(&self, lowest: usize, seen: &Contents, now_ms: u64) -> String {
        let (least, most) =
            (self.contents_up_to(lowest, now_ms), self.contents_up_to(self.writes.len(), now_ms));
        let keys: BTreeSet<&KeyName> = seen.keys().chain(least.keys()).chain(most.keys()).collect();
        let mut lines = vec![format!(
            "no cut between {lowest} and {} explains what is there:",
            self.writes.len()
        )];
        for key in keys {
            let found = seen.get(key);
            if least.get(key) != found {
                let from: Vec<usize> = self.by_key.get(key).cloned().unwrap_or_default();
                let matching: Vec<usize> = from
                    .iter()
                    .copied()
                    .filter(|index| {
                        self.writes[*index].effect.value_at(now_ms) == found.map(Vec::as_slice)
                    })
                    .collect();
                lines.push(format!(
                    "  key {}: {} found; written by {from:?}, this is the effect of {matching:?}",
                    name(key),
                    found.map_or("nothing".to_owned(), |value| format!("{} bytes", value.len())),
                ));
            }
        }
        lines.join("\n")
    }
}

/// A key as one can read it in a failure.
#[must_use]
pub fn name(key: &KeyName) -> String {
    let shown: String = String::from_utf8_lossy(&key.1).chars().take(24).collect();
    format!("{}/{shown:?} ({} bytes)", key.0.0, key.1.len())
}

/// An event of one key: a write that created a sibling, or a delete.
pub type EventId = usize;

/// The reference for siblings: one key.
#[derive(Clone, Debug, Default)]
pub struct SiblingModel {
    events: BTreeMap<EventId, SiblingEvent>,
}

#[derive(Clone, Debug)]
struct SiblingEvent {
    /// `None` for a delete.
    value: Option<Vec<u8>>,
    /// All events that the writer had seen.
    history: BTreeSet<EventId>,
}

impl SiblingModel {
    /// A write by somebody who had read `seen`.
    pub fn write(&mut self, id: EventId, value: Option<Vec<u8>>, seen: &BTreeSet<EventId>) {
        // Whoever has seen an event has seen what that event had seen.
        let mut history = seen.clone();
        for event in seen {
            if let Some(event) = self.events.get(event) {
                history.extend(event.history.iter().copied());
            }
        }
        self.events.insert(id, SiblingEvent { value, history });
    }

    /// The values a reader gets: of the events that no other event has seen, sorted.
    #[must_use]
    pub fn siblings(&self) -> Vec<Vec<u8>> {
        let seen: BTreeSet<EventId> =
            self.events.values().flat_map(|event| event.history.iter().copied()).collect();
        let mut values: Vec<Vec<u8>> = self
            .events
            .iter()
            .filter(|(id, _)| !seen.contains(id))
            .filter_map(|(_, event)| event.value.clone())
            .collect();
        values.sort();
        values
    }

    /// What a reader has seen: the context it passes back with its next write.
    #[must_use]
    pub fn context(&self) -> BTreeSet<EventId> {
        self.events.keys().copied().collect()
    }

    /// A crash took the events from this one on.
    pub fn forget_from(&mut self, first: EventId) {
        self.events.retain(|id, _| *id < first);
    }

    /// Another replica's events arrive.
    pub fn merge(&mut self, other: &SiblingModel) {
        for (id, event) in &other.events {
            self.events.entry(*id).or_insert_with(|| event.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> KeyName {
        (NamespaceId(1), name.as_bytes().to_vec())
    }

    fn put(value: &str, expiry_ms: u64) -> Effect {
        Effect::Put { value: value.as_bytes().to_vec(), expiry_ms }
    }

    fn at(stamp: u64) -> (Timestamp, Dot) {
        (Timestamp(stamp), Dot::default())
    }

    #[test]
    fn the_greatest_version_wins_whatever_the_order_of_arrival() {
        let mut model = Model::default();
        for (stamp, value) in [(5, "new"), (3, "old")] {
            let index = model.begin(key("k"), put(value, 0), at(stamp));
            model.acknowledge(index);
        }
        assert_eq!(model.get(&key("k"), 0), Some(&b"new"[..]));
        let open = model.begin(key("k"), Effect::Delete, at(9));
        assert!(model.allows(&key("k"), Some(b"new"), 0) && model.allows(&key("k"), None, 0));
        assert!(!model.allows(&key("k"), Some(b"old"), 0));
        model.refuse(open);
        assert!(!model.allows(&key("k"), None, 0));
    }

    #[test]
    fn a_value_is_gone_from_its_expiry_on() {
        let mut model = Model::default();
        let index = model.begin(key("k"), put("v", 100), at(1));
        model.acknowledge(index);
        assert_eq!(model.get(&key("k"), 99), Some(&b"v"[..]));
        assert_eq!(model.get(&key("k"), 100), None);
    }

    #[test]
    fn a_crash_may_cost_a_suffix_of_open_writes_but_no_hole() {
        let mut model = Model::default();
        let first = model.begin(key("a"), put("1", 0), at(1));
        model.begin(key("b"), put("2", 0), at(2));
        model.begin(key("c"), put("3", 0), at(3));
        model.acknowledge(first);
        let seen = |keys: &[&str]| -> Contents {
            let values = ["1", "2", "3"];
            ["a", "b", "c"]
                .iter()
                .zip(values)
                .filter(|(name, _)| keys.contains(name))
                .map(|(name, value)| (key(name), value.as_bytes().to_vec()))
                .collect()
        };
        assert_eq!(model.clone().settle_after_crash(&seen(&["a", "b", "c"]), 0), Ok(3));
        assert_eq!(model.clone().settle_after_crash(&seen(&["a"]), 0), Ok(1));
        assert!(model.clone().settle_after_crash(&seen(&["a", "c"]), 0).is_err());
        assert!(model.clone().settle_after_crash(&seen(&[]), 0).is_err());
        assert_eq!(model.settle_from(0, &seen(&[]), 0), Ok(0));
        assert!(model.allows(&key("a"), None, 0) && !model.allows(&key("a"), Some(b"1"), 0));
    }

    #[test]
    fn siblings_are_what_nobody_has_seen() {
        let mut model = SiblingModel::default();
        model.write(0, Some(b"x".to_vec()), &BTreeSet::new());
        let seen = model.context();
        model.write(1, Some(b"y".to_vec()), &BTreeSet::new());
        assert_eq!(model.siblings(), [b"x".to_vec(), b"y".to_vec()]);
        model.write(2, Some(b"z".to_vec()), &seen);
        assert_eq!(model.siblings(), [b"y".to_vec(), b"z".to_vec()]);
        let mut other = SiblingModel::default();
        other.write(3, None, &model.context());
        model.merge(&other);
        assert!(model.siblings().is_empty());
    }
}
