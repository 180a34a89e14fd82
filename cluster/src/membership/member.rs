//! What is believed of one member, and how what is said changes it.
//!
//! Invariant: the greater incarnation wins whatever is said of it, and at equal ones accusations
//! beat "alive" and "down" beats all: so every node that hears the same claims, in any order and
//! any number of times, ends at the same belief (SWIM, Das, Gupta, Motivala, 2002, section 4.2).
//! Only the member itself raises its incarnation. Its high half counts the lives of the node, the
//! low half the contradictions in this life, so a restart contradicts everything before it.

use std::cmp::Ordering;

use annulus_engine::model::Instant;

use super::suspicion::Suspicion;
use crate::member::NodeId;
use crate::message::{Report, Vitals};

/// The first incarnation of a life.
pub(super) fn first_incarnation(life: u64) -> u64 {
    // A life beyond 2^32 starts would need a start a second for a century.
    (life.min(u64::from(u32::MAX - 1)) << 32) | 1
}

/// What is believed of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Alive,
    Suspect(Suspicion),
    Down([NodeId; 2]),
}

/// What a node knows of a member, for people and for the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Status {
    /// Nothing against it.
    #[default]
    Alive,
    /// Somebody could not reach it, and it has not contradicted yet.
    Suspect,
    /// This node cannot reach it, and there are not two who can say so.
    Unreachable,
    /// Two could not reach it, and it did not contradict.
    Down,
}

impl Status {
    /// All, in the order of their numbers.
    pub const ALL: [Status; 4] =
        [Status::Alive, Status::Suspect, Status::Unreachable, Status::Down];

    /// Its name, for operators.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Status::Alive => "alive",
            Status::Suspect => "suspect",
            Status::Unreachable => "unreachable",
            Status::Down => "down",
        }
    }
}

/// What a claim changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing.
    Nothing,
    /// It is alive, at an incarnation that was not known.
    Returned,
    /// It is suspected, and was not.
    Suspected,
    /// One more suspects it.
    Confirmed,
}

/// What is known of a member.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) node: NodeId,
    pub(super) state: State,
    /// This node's own probes do not reach it.
    pub(super) is_unreached: bool,
    /// The status that was told last.
    pub(super) told: Status,
    pub(super) incarnation: u64,
    /// Of its newest report; 0 when there was none.
    pub(super) heartbeat: u64,
    /// The life in which it made that.
    life: u32,
    /// When that came.
    pub(super) reported: Instant,
    pub(super) vitals: Vitals,
}

impl Row {
    pub(super) fn new(node: NodeId, now: Instant) -> Row {
        Row {
            node,
            state: State::Alive,
            is_unreached: false,
            told: Status::Alive,
            incarnation: 0,
            heartbeat: 0,
            life: 0,
            reported: now,
            vitals: Vitals::default(),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        matches!(self.state, State::Alive)
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self.state, State::Down(_))
    }

    pub(super) fn status(&self) -> Status {
        match &self.state {
            State::Down(_) => Status::Down,
            State::Suspect(suspicion) if !(suspicion.is_over && self.is_unreached) => {
                Status::Suspect
            }
            State::Suspect(_) => Status::Unreachable,
            State::Alive if self.is_unreached => Status::Unreachable,
            State::Alive => Status::Alive,
        }
    }

    /// It was alive at this incarnation.
    pub(super) fn hear_alive(&mut self, incarnation: u64) -> Heard {
        if incarnation <= self.incarnation {
            return Heard::Nothing;
        }
        self.incarnation = incarnation;
        self.state = State::Alive;
        self.is_unreached = false;
        Heard::Returned
    }

    /// `reporter` accuses it.
    pub(super) fn hear_suspect(
        &mut self,
        now: Instant,
        incarnation: u64,
        reporter: NodeId,
        rack_of: impl Fn(NodeId) -> u16,
    ) -> Heard {
        match (incarnation.cmp(&self.incarnation), &mut self.state) {
            (Ordering::Less, _) | (Ordering::Equal, State::Down(_)) => Heard::Nothing,
            (Ordering::Equal, State::Suspect(suspicion)) => {
                if suspicion.add(reporter, rack_of) {
                    Heard::Confirmed
                } else {
                    Heard::Nothing
                }
            }
            (Ordering::Equal, State::Alive) | (Ordering::Greater, _) => {
                self.incarnation = incarnation;
                self.state = State::Suspect(Suspicion::new(now, reporter));
                Heard::Suspected
            }
        }
    }

    /// Takes a report over if it is newer than the last. Returns whether an epoch grew.
    pub(super) fn take_report(&mut self, now: Instant, report: &Report) -> bool {
        let life = u32::try_from(report.incarnation >> 32).expect("half of 64 bits");
        if (life, report.heartbeat) <= (self.life, self.heartbeat) {
            return false;
        }
        (self.life, self.heartbeat, self.reported) = (life, report.heartbeat, now);
        let before = std::mem::replace(&mut self.vitals, report.vitals);
        self.vitals.settings_epoch > before.settings_epoch
            || self.vitals.members_epoch > before.members_epoch
    }

    /// What it said of itself last, if it ever did.
    pub(super) fn report(&self) -> Option<Report> {
        // A report of an earlier life says nothing of this one.
        let is_current = self.heartbeat > 0 && u64::from(self.life) == self.incarnation >> 32;
        is_current.then_some(Report {
            node: self.node,
            incarnation: self.incarnation,
            heartbeat: self.heartbeat,
            vitals: self.vitals,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant(5);

    fn row() -> Row {
        let mut row = Row::new(NodeId(1), NOW);
        row.hear_alive(7);
        row
    }

    fn suspect(row: &mut Row, incarnation: u64, reporter: u32) -> Heard {
        row.hear_suspect(NOW, incarnation, NodeId(reporter), |_| 0)
    }

    #[test]
    fn an_accusation_holds_until_a_greater_incarnation() {
        let mut row = row();
        assert_eq!(suspect(&mut row, 6, 2), Heard::Nothing, "history");
        assert_eq!(suspect(&mut row, 7, 2), Heard::Suspected);
        assert_eq!(suspect(&mut row, 7, 2), Heard::Nothing, "said before");
        assert_eq!(suspect(&mut row, 7, 3), Heard::Confirmed);
        assert_eq!(row.hear_alive(7), Heard::Nothing, "not a contradiction");
        assert_eq!(row.hear_alive(8), Heard::Returned);
        assert_eq!(row.status(), Status::Alive);
    }

    #[test]
    fn who_is_down_returns_only_by_a_greater_incarnation() {
        let mut row = row();
        row.state = State::Down([NodeId(2), NodeId(3)]);
        assert_eq!(suspect(&mut row, 7, 4), Heard::Nothing);
        assert_eq!(row.hear_alive(7), Heard::Nothing);
        assert!(row.is_down());
        assert_eq!(suspect(&mut row, 9, 4), Heard::Suspected, "it was back at 9");
        assert_eq!(row.hear_alive(first_incarnation(1)), Heard::Returned);
    }

    #[test]
    fn a_life_beats_all_contradictions_of_the_one_before() {
        assert!(first_incarnation(3) > first_incarnation(2) + u64::from(u32::MAX >> 1));
        assert!(first_incarnation(u64::MAX) < u64::MAX);
    }

    #[test]
    fn the_newest_report_stays_and_a_new_life_counts_from_nothing() {
        let mut row = row();
        let report = |life, heartbeat, epoch| Report {
            node: NodeId(1),
            incarnation: first_incarnation(life),
            heartbeat,
            vitals: Vitals { settings_epoch: epoch, ..Vitals::default() },
        };
        assert!(row.take_report(NOW, &report(1, 100, 4)));
        assert!(!row.take_report(NOW, &report(1, 99, 9)), "older");
        assert!(!row.take_report(NOW, &report(1, 101, 4)), "the same epoch");
        assert_eq!(row.report(), None, "its incarnation is not known yet");
        assert!(!row.take_report(NOW, &report(2, 1, 4)));
        row.hear_alive(first_incarnation(2));
        assert_eq!(row.report().map(|report| report.heartbeat), Some(1));
    }
}
