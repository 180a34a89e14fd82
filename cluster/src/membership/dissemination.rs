//! What is told to whom: rumours, each so many times, and a window that goes round all members.
//!
//! Invariants: a rumour rides on the next messages that have room and is sent a bounded number of
//! times, least often sent first and the newest of those; there are at most as many rumours of a
//! member as it may have reporters, and two more. What a message carries does not depend on how
//! many members there are: a whole list would.
//!
//! SWIM, section 4.1: what is passed on `c x log(n)` times by everybody reaches everybody with
//! high probability. What a rumour has missed, the window brings later.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::suspicion::log10_milli;
use crate::member::NodeId;
use crate::message::{Claim, Said};

/// How often a rumour is sent: `4 x log10(members + 1)`, rounded up.
pub(super) fn times_sent(members: usize) -> u32 {
    let milli = 4 * log10_milli(members + 1);
    u32::try_from(milli.div_ceil(1000)).expect("a logarithm is small").max(1)
}

/// What a rumour is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Topic {
    /// The member is alive, or down.
    State,
    /// This one accuses it.
    Accused(NodeId),
    /// The member's report has a greater epoch than before.
    Epochs,
}

/// A rumour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rumour {
    /// A claim.
    Claim(Claim),
    /// Whatever the member's newest report is.
    Report(NodeId),
}

/// Least often sent first, then the newest.
type Place = (u32, Reverse<u64>);

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Rumours {
    queue: BTreeMap<Place, (NodeId, Topic, Rumour)>,
    places: BTreeMap<(NodeId, Topic), Place>,
    count: u64,
}

impl Rumours {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// A claim to pass on. One that is not a further accusation replaces what was said before.
    pub(super) fn claim(&mut self, claim: Claim) {
        let topic = match claim.said {
            Said::Suspect { reporter } => Topic::Accused(reporter),
            Said::Alive | Said::Down { .. } => {
                self.forget_accusations(claim.node);
                Topic::State
            }
        };
        self.add(claim.node, topic, Rumour::Claim(claim));
    }

    /// Accusations of an earlier incarnation are history, and that it was alive.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.forget_accusations(node);
        self.remove(node, Topic::State);
    }

    /// The member's epochs have grown.
    pub(super) fn epochs(&mut self, node: NodeId) {
        self.add(node, Topic::Epochs, Rumour::Report(node));
    }

    fn forget_accusations(&mut self, node: NodeId) {
        let range = (node, Topic::Accused(NodeId(0)))..(node, Topic::Epochs);
        let topics: Vec<Topic> = self.places.range(range).map(|(key, _)| key.1).collect();
        topics.into_iter().for_each(|topic| self.remove(node, topic));
    }

    fn remove(&mut self, node: NodeId, topic: Topic) {
        if let Some(place) = self.places.remove(&(node, topic)) {
            self.queue.remove(&place);
        }
    }

    fn add(&mut self, node: NodeId, topic: Topic, rumour: Rumour) {
        self.remove(node, topic);
        self.count += 1;
        self.put((0, Reverse(self.count)), (node, topic, rumour));
    }

    fn put(&mut self, place: Place, entry: (NodeId, Topic, Rumour)) {
        self.places.insert((entry.0, entry.1), place);
        self.queue.insert(place, entry);
    }

    /// Gives rumours to `take` until it has no room for one, or has seen all. Those that it took
    /// count as sent once more, and are gone after `times`.
    pub(super) fn send(&mut self, times: u32, mut take: impl FnMut(Rumour) -> bool) {
        let mut sent = Vec::new();
        for (place, (_, _, rumour)) in &self.queue {
            if !take(*rumour) {
                break;
            }
            sent.push(*place);
        }
        for place in sent {
            let entry = self.queue.remove(&place).expect("just seen");
            let next = (place.0 + 1, place.1);
            if next.0 < times {
                self.put(next, entry);
            } else {
                self.places.remove(&(entry.0, entry.1));
            }
        }
    }
}

/// A walk round all members, a few at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor(usize);

impl Cursor {
    /// The next index below `len`.
    pub(super) fn next(&mut self, len: usize) -> usize {
        let at = self.0 % len.max(1);
        self.0 = at + 1;
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alive(node: u32, incarnation: u64) -> Claim {
        Claim { node: NodeId(node), incarnation, said: Said::Alive }
    }

    fn accused(node: u32, reporter: u32) -> Claim {
        let said = Said::Suspect { reporter: NodeId(reporter) };
        Claim { node: NodeId(node), incarnation: 1, said }
    }

    /// Sends to a message with room for so many.
    fn send(rumours: &mut Rumours, times: u32, room: usize) -> Vec<Rumour> {
        let mut sent = Vec::new();
        rumours.send(times, |rumour| {
            let fits = sent.len() < room;
            if fits {
                sent.push(rumour);
            }
            fits
        });
        sent
    }

    #[test]
    fn how_often_grows_with_the_logarithm() {
        assert_eq!([1, 3, 10, 99, 999].map(times_sent), [2, 3, 5, 8, 12]);
    }

    #[test]
    fn a_rumour_is_sent_so_many_times_and_the_newest_first() {
        let mut rumours = Rumours::default();
        rumours.claim(alive(1, 1));
        rumours.claim(alive(2, 1));
        let sent: Vec<Rumour> = (0..6).flat_map(|_| send(&mut rumours, 3, 1)).collect();
        assert_eq!(sent[0], Rumour::Claim(alive(2, 1)));
        assert_eq!(sent[1], Rumour::Claim(alive(1, 1)));
        for node in [1, 2] {
            let count = sent.iter().filter(|it| **it == Rumour::Claim(alive(node, 1))).count();
            assert_eq!(count, 3);
        }
        assert!(send(&mut rumours, 3, 1).is_empty() && rumours.len() == 0);
    }

    #[test]
    fn accusers_stand_beside_each_other_and_a_contradiction_ends_them() {
        let mut rumours = Rumours::default();
        rumours.claim(accused(1, 2));
        rumours.claim(accused(1, 3));
        rumours.claim(accused(4, 3));
        rumours.epochs(NodeId(1));
        assert_eq!(rumours.len(), 4);
        rumours.claim(alive(1, 2));
        let left = send(&mut rumours, 9, 9);
        assert_eq!(
            left,
            [Rumour::Claim(alive(1, 2)), Rumour::Report(NodeId(1)), Rumour::Claim(accused(4, 3))]
        );
        rumours.forget(NodeId(1));
        assert_eq!(rumours.len(), 2);
    }
}
