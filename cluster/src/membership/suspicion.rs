//! One suspicion: who accuses, since when, and how long the accused has to contradict.
//!
//! Invariant: a reporter counts once, and the time allowed only shrinks while reporters are added.
//! Follows Lifeguard (Dadgar, Phillips, Currey, 2018), section IV-B: the time begins long, for one
//! reporter may be the one who is at fault, and each independent reporter shortens it. The
//! logarithmic rule is memberlist's:
//!
//! ```text
//! timeout = max - ln(n + 1) / ln(k + 1) x (max - min)     n reporters beyond the first, n <= k
//! min     = 4 x max(1, log10(members)) x 0.5 s            max = 6 x min
//! k       = 2, or fewer where so many could not report
//! ```

use annulus_engine::model::Instant;

use crate::member::NodeId;

/// Reporters that are remembered; the rule needs two, and one more from another rack.
pub(super) const REPORTERS_KEPT: usize = 4;
/// Reporters beyond the first with which the timeout is the shortest.
const EXPECTED: usize = 2;
/// How much shorter it is, in thousandths: `ln(n + 1) / ln(k + 1)`, by `k` and `n`.
const SHORTENED: [[u64; EXPECTED + 1]; EXPECTED + 1] = [[0, 0, 0], [0, 1000, 1000], [0, 631, 1000]];
/// Times the probe interval, and times `log10` of the members.
const MIN_FACTOR: u64 = 4;
/// `max` in units of `min`.
const MAX_FACTOR: u64 = 6;

/// `log10` in thousandths.
pub(super) fn log10_milli(count: usize) -> u64 {
    let log = (count.max(1) as f64).log10() * 1000.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 20,000")]
    let milli = log.round() as u64;
    milli
}

/// What a cluster of this size allows a suspect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) min_nanos: u64,
    pub(super) max_nanos: u64,
}

impl Bounds {
    pub(super) fn new(members: usize, probe_interval_nanos: u64) -> Bounds {
        let min_nanos = MIN_FACTOR * probe_interval_nanos * log10_milli(members).max(1000) / 1000;
        Bounds { min_nanos, max_nanos: MAX_FACTOR * min_nanos }
    }

    /// After how long it is over: `reporters` accuse, of `possible` who could.
    fn timeout(&self, reporters: usize, possible: usize) -> u64 {
        let expected = possible.saturating_sub(1).min(EXPECTED);
        let more = reporters.saturating_sub(1).min(EXPECTED);
        let shortened = SHORTENED[expected][more];
        self.max_nanos - (self.max_nanos - self.min_nanos) * shortened / 1000
    }
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suspicion {
    pub(super) since: Instant,
    reporters: [NodeId; REPORTERS_KEPT],
    count: u8,
    /// The time is over, and there were not two to tell of it.
    pub(super) is_over: bool,
}

impl Suspicion {
    pub(super) fn new(now: Instant, reporter: NodeId) -> Suspicion {
        let reporters = [reporter; REPORTERS_KEPT];
        Suspicion { since: now, reporters, count: 1, is_over: false }
    }

    pub(super) fn reporters(&self) -> &[NodeId] {
        &self.reporters[..usize::from(self.count)]
    }

    /// Another reporter. Returns whether that is news: it was not known, and one more matters.
    pub(super) fn add(&mut self, reporter: NodeId, rack_of: impl Fn(NodeId) -> u16) -> bool {
        if self.reporters().contains(&reporter) {
            return false;
        }
        let count = usize::from(self.count);
        if count < REPORTERS_KEPT {
            self.reporters[count] = reporter;
            self.count += 1;
            return true;
        }
        // All are from one rack: whoever is from another is worth more than one of them.
        let rack = rack_of(self.reporters[0]);
        let all_there = self.reporters().iter().all(|it| rack_of(*it) == rack);
        let matters = all_there && rack_of(reporter) != rack;
        if matters {
            self.reporters[count - 1] = reporter;
        }
        matters
    }

    pub(super) fn ends(&self, bounds: Bounds, possible: usize) -> Instant {
        self.since.after_nanos(bounds.timeout(self.reporters().len(), possible))
    }

    /// Two reporters who are enough: different, and from different racks if `must_differ`.
    pub(super) fn witnesses(
        &self,
        must_differ: bool,
        rack_of: impl Fn(NodeId) -> u16,
    ) -> Option<[NodeId; 2]> {
        let reporters = self.reporters();
        let pairs = reporters.iter().enumerate().flat_map(|(at, first)| {
            reporters[at + 1..].iter().map(move |second| [*first, *second])
        });
        let enough = |pair: &[NodeId; 2]| !must_differ || rack_of(pair[0]) != rack_of(pair[1]);
        let mut pair = pairs.into_iter().find(enough)?;
        pair.sort_unstable();
        Some(pair)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF_SECOND: u64 = 500_000_000;

    fn rack(node: NodeId) -> u16 {
        u16::try_from(node.0 / 10).unwrap()
    }

    #[test]
    fn the_table_is_the_formula() {
        for (k, row) in SHORTENED.iter().enumerate().skip(1) {
            for (n, milli) in row.iter().enumerate().take(k + 1) {
                let exact = ((n + 1) as f64).ln() / ((k + 1) as f64).ln() * 1000.0;
                assert!((exact - *milli as f64).abs() < 1.0, "{k} {n}");
            }
        }
    }

    #[test]
    fn each_reporter_shortens_the_time_down_to_its_minimum() {
        let bounds = Bounds::new(1000, HALF_SECOND);
        assert_eq!((bounds.min_nanos, bounds.max_nanos), (6_000_000_000, 36_000_000_000));
        let timeouts = [1, 2, 3, 4].map(|reporters| bounds.timeout(reporters, 998));
        assert!(timeouts[0] == bounds.max_nanos && timeouts[0] > timeouts[1]);
        assert!(timeouts[1] > timeouts[2] && timeouts[2] == bounds.min_nanos);
        assert_eq!(timeouts[3], bounds.min_nanos);
    }

    #[test]
    fn two_are_all_that_three_nodes_can_have() {
        let bounds = Bounds::new(3, HALF_SECOND);
        assert_eq!(bounds.timeout(2, 2), 2_000_000_000);
        assert_eq!(bounds.timeout(1, 1), bounds.max_nanos);
    }

    #[test]
    fn a_reporter_counts_once_and_one_from_another_rack_displaces_one() {
        let mut suspicion = Suspicion::new(Instant(0), NodeId(1));
        assert!(!suspicion.add(NodeId(1), rack));
        for node in 2..=4 {
            assert!(suspicion.add(NodeId(node), rack));
        }
        assert!(!suspicion.add(NodeId(5), rack), "enough of that rack");
        assert_eq!(suspicion.witnesses(true, rack), None);
        assert!(suspicion.add(NodeId(11), rack));
        assert!(!suspicion.add(NodeId(12), rack), "two racks are enough");
        assert_eq!(suspicion.witnesses(true, rack), Some([NodeId(1), NodeId(11)]));
    }

    #[test]
    fn one_is_no_witness() {
        let suspicion = Suspicion::new(Instant(0), NodeId(1));
        assert_eq!(suspicion.witnesses(false, rack), None);
    }
}
