//! The coordinator on a network that loses, doubles, delays and reorders, with servers that refuse,
//! go down and come back.

use std::collections::BTreeMap;

use annulus_engine::model::{Dot, Kind, NamespaceId, OriginId, Token, WallMicros};
use annulus_net::wire::fields::{Level, OperationFlags};
use proptest::prelude::*;

use super::*;
use crate::message::Want;

const MILLI: u64 = 1_000_000;
const ME: NodeId = NodeId(0);

fn nodes(range: std::ops::Range<u32>) -> Vec<NodeId> {
    range.map(NodeId).collect()
}

fn need(n: u8, w: u8, sloppy: bool) -> Requirement {
    let defaults = Defaults { n, copies: n, w, r: w, sloppy, synced: true, data_centres: 1 };
    let (level, flags) = (Level::Default, OperationFlags(0));
    Requirement::write(&defaults, level, level, level, flags).unwrap()
}

fn need_read(n: u8, r: u8, sloppy: bool) -> Requirement {
    Requirement { durable: 0, ..need(n, r, sloppy) }
}

fn record(version: u64) -> Record {
    Record {
        token: Token(7),
        namespace: NamespaceId(1),
        incarnation: 1,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(1), sequence: version },
        timestamp: Timestamp(version),
        expiry_ms: 0,
        key: b"key".to_vec(),
        value: vec![b'v'; 100],
    }
}

/// A coordinator, and servers that hold versions of one key.
struct Fixture {
    coordinator: Coordinator<u32>,
    out: Vec<Action>,
    now: u64,
    versions: BTreeMap<NodeId, u64>,
    /// Messages sent and not delivered.
    network: Vec<Action>,
    outcomes: BTreeMap<OpId, Outcome>,
    repaired: Vec<NodeId>,
    begun: u32,
}

impl Fixture {
    fn new(options: CoordinatorOptions) -> Fixture {
        Fixture {
            coordinator: Coordinator::new(ME, options, 40),
            out: Vec::new(),
            now: 1000 * MILLI,
            versions: BTreeMap::new(),
            network: Vec::new(),
            outcomes: BTreeMap::new(),
            repaired: Vec::new(),
            begun: 0,
        }
    }

    fn moment(&self) -> Moment {
        // Writes of these tests are old.
        Moment { now: Instant(self.now), wall: WallMicros(1 << 40) }
    }

    fn write(&mut self, need: Requirement, primaries: u32) -> Result<OpId, Refusal> {
        let plan = self.coordinator.plan_write(
            Instant(self.now),
            need,
            &nodes(0..primaries),
            &nodes(primaries..6),
        )?;
        let (moment, deadline) = (self.moment(), Instant(self.now + 100 * MILLI));
        self.begun += 1;
        let payload = self.begun;
        let op = self.coordinator.begin_write(moment, plan, deadline, 100, payload, &mut self.out);
        self.settle();
        Ok(op)
    }

    fn read(&mut self, requirement: Requirement, primaries: u32) -> Result<OpId, Refusal> {
        let request = ReadRequest {
            requirement,
            primaries: &nodes(0..primaries),
            fallbacks: &nodes(primaries..6),
            freshness: None,
            deadline: Instant(self.now + 100 * MILLI),
        };
        let moment = self.moment();
        let begun = self.coordinator.begin_read(moment, &request, |_| true, 0, &mut self.out);
        self.settle();
        begun.map_err(|(refusal, _)| refusal)
    }

    /// Does what the coordinator wants done.
    fn settle(&mut self) {
        for action in std::mem::take(&mut self.out) {
            match action {
                Action::SendWrite { to, op } => {
                    assert!(to != ME && self.coordinator.payload(op).is_some());
                    self.network.push(action);
                }
                Action::SendRead { .. } => self.network.push(action),
                Action::Repair { to, op } => {
                    let merged = self.coordinator.merged(op).expect("repairs come first");
                    let version = self.versions.entry(to).or_default();
                    // Two reads may have found the same lack.
                    *version = merged.dot.sequence.max(*version);
                    self.repaired.push(to);
                }
                Action::Answer { op, outcome } => {
                    assert!(self.outcomes.insert(op, outcome).is_none(), "answered twice");
                    let finished = self.coordinator.finish(op).expect("once");
                    assert!(self.coordinator.finish(op).is_none());
                    let has_state = finished.state.is_some();
                    assert!(
                        !has_state
                            || matches!(outcome, Outcome::Read(_))
                            || outcome.error().is_some()
                    );
                }
            }
        }
    }

    fn acked(&mut self, op: OpId, from: NodeId) {
        let moment = self.moment();
        self.coordinator.acked(moment, op, from, true, &mut self.out);
        self.settle();
    }

    /// The server answers.
    fn deliver(&mut self, message: Action) {
        let moment = self.moment();
        match message {
            Action::SendWrite { to, op } => self.acked(op, to),
            Action::SendRead { to, op, want } => {
                let version = self.versions.get(&to).copied().unwrap_or_default();
                let record = (version > 0).then(|| record(version));
                let record = record.as_ref().map(Record::as_ref);
                let as_of = Timestamp(500 + u64::from(to.0));
                let out = &mut self.out;
                if want == Want::Full {
                    self.coordinator.full(moment, op, to, as_of, true, record.as_ref(), out);
                } else {
                    let digest = record.map_or(0, |record| digest(&record).unwrap());
                    self.coordinator.digest(moment, op, to, as_of, true, digest, out);
                }
                self.settle();
            }
            _ => unreachable!("only messages are in the network"),
        }
    }

    fn fail(&mut self, message: Action, failure: Failure) {
        let (Action::SendWrite { to, op } | Action::SendRead { to, op, .. }) = message else {
            unreachable!("only messages are in the network")
        };
        let moment = self.moment();
        self.coordinator.failed(moment, op, to, failure, &mut self.out);
        self.settle();
    }

    fn deliver_all(&mut self) {
        while let Some(message) = self.network.pop() {
            self.deliver(message);
        }
    }

    fn advance(&mut self, nanos: u64) {
        self.now += nanos;
        let moment = self.moment();
        self.coordinator.handle_timeout(moment, &mut self.out);
        let next = self.coordinator.next_timeout();
        assert!(next.is_none_or(|next| next.0 > self.now), "all that was due was done");
        self.settle();
    }

    fn in_flight(&self) -> u32 {
        self.coordinator.health().peers().map(|peer| peer.in_flight).sum()
    }

    fn assert_idle(&self) {
        assert_eq!((self.coordinator.len(), self.coordinator.bytes()), (0, 0));
        assert_eq!(self.in_flight(), 0);
    }
}

fn fixture() -> Fixture {
    Fixture::new(CoordinatorOptions::default())
}

#[test]
fn a_write_is_answered_at_w_and_leaves_when_all_have_answered() {
    let mut t = fixture();
    let op = t.write(need(3, 2, false), 3).unwrap();
    assert_eq!((t.network.len(), t.in_flight()), (2, 3));
    t.acked(op, ME);
    assert!(t.outcomes.is_empty());
    let last = t.network.remove(0);
    t.deliver_all();
    let acks = Acks { total: 2, primary: 2, durable: 2 };
    assert_eq!(t.outcomes[&op], Outcome::Written(acks));
    assert_eq!((t.coordinator.len(), t.coordinator.bytes()), (1, 0));
    t.deliver(last);
    t.assert_idle();
    t.deliver(last);
    assert_eq!(t.coordinator.counters().late, 1);
}

#[test]
fn a_write_without_its_acks_may_be_applied_at_its_deadline() {
    let mut t = fixture();
    let op = t.write(need(3, 2, false), 3).unwrap();
    t.acked(op, ME);
    t.advance(99 * MILLI);
    assert!(t.outcomes.is_empty());
    t.advance(MILLI);
    let acks = Acks { total: 1, primary: 1, durable: 1 };
    assert_eq!(t.outcomes[&op], Outcome::MayBeApplied(acks));
    t.assert_idle();
}

#[test]
fn a_server_that_goes_down_ends_what_waited_for_it_alone() {
    let mut t = fixture();
    let ops: Vec<OpId> = (0..10).map(|_| t.write(need(2, 2, false), 2).unwrap()).collect();
    let moment = t.moment();
    t.coordinator.peer_down(moment, NodeId(1), &mut t.out);
    t.settle();
    for op in ops {
        assert!(matches!(t.outcomes[&op], Outcome::MayBeApplied(_)));
        t.acked(op, ME);
    }
    t.assert_idle();
    let refusal = t.write(need(2, 2, false), 2).unwrap_err();
    assert_eq!(refusal.status, Status::UNAVAILABLE);
    t.coordinator.peer_up(NodeId(1));
    assert!(t.write(need(2, 2, false), 2).is_ok());
}

#[test]
fn a_sloppy_write_goes_to_the_next_in_line_when_one_goes_down() {
    let mut t = fixture();
    let op = t.write(need(3, 3, true), 3).unwrap();
    let moment = t.moment();
    t.coordinator.peer_down(moment, NodeId(2), &mut t.out);
    t.settle();
    assert!(t.network.contains(&Action::SendWrite { to: NodeId(3), op }));
    t.network.retain(|message| !matches!(message, Action::SendWrite { to: NodeId(2), .. }));
    t.acked(op, ME);
    t.deliver_all();
    let acks = Acks { total: 3, primary: 2, durable: 3 };
    assert_eq!(t.outcomes[&op], Outcome::Written(acks));
    t.assert_idle();
}

#[test]
fn a_read_repairs_who_lacks_something_before_it_answers() {
    let mut t = fixture();
    t.versions = BTreeMap::from([(ME, 1), (NodeId(1), 3), (NodeId(2), 2)]);
    let op = t.read(need_read(3, 3, false), 3).unwrap();
    t.deliver_all();
    let facts = ReadFacts { as_of: Timestamp(502), answers: 3, primaries: 3 };
    assert_eq!(t.outcomes[&op], Outcome::Read(facts));
    assert_eq!(t.repaired, [ME, NodeId(2)]);
    t.assert_idle();
}

#[test]
fn a_young_write_is_not_repaired_because_it_is_on_its_way() {
    let mut t = fixture();
    let young = WallMicros(1000);
    t.versions = BTreeMap::from([(NodeId(1), 3)]);
    let request = ReadRequest {
        requirement: need_read(2, 2, false),
        primaries: &nodes(0..2),
        fallbacks: &[],
        freshness: None,
        deadline: Instant(t.now + MILLI),
    };
    let moment = Moment { wall: young, ..t.moment() };
    let (coordinator, out) = (&mut t.coordinator, &mut t.out);
    let op = coordinator.begin_read(moment, &request, |_| true, 0, out).unwrap();
    let new = Record { timestamp: Timestamp::new(WallMicros(999), 0), ..record(3) };
    coordinator.full(moment, op, ME, Timestamp(1), true, None, out);
    coordinator.full(moment, op, NodeId(1), Timestamp(1), true, Some(&new.as_ref()), out);
    assert!(!out.iter().any(|action| matches!(action, Action::Repair { .. })), "{out:?}");
    t.settle();
    assert!(matches!(t.outcomes[&op], Outcome::Read(_)));
}

#[test]
fn a_late_answer_is_hedged_inside_the_budget() {
    let mut t = fixture();
    let reads = 1000;
    for _ in 0..reads {
        t.read(need_read(3, 1, false), 3).unwrap();
        // Whoever is asked first hangs; who is asked in its place answers.
        t.network.clear();
        t.advance(health::HEDGE_DELAY_MAX_NANOS);
        t.deliver_all();
        t.advance(100 * MILLI);
    }
    let counters = t.coordinator.counters();
    assert!((reads / 50..=reads / 50 + 1).contains(&counters.hedges), "{counters:?}");
    assert_eq!(counters.hedges + counters.hedges_denied, reads);
    let answered = t.outcomes.values().filter(|outcome| outcome.error().is_none()).count();
    assert_eq!(answered as u64, counters.hedges, "each hedge saved a read");
    t.assert_idle();
}

#[test]
fn a_server_whose_own_disk_hangs_asks_others_first() {
    let mut t = fixture();
    let read = |t: &mut Fixture| {
        t.read(need_read(3, 1, false), 3).unwrap();
        let is_own = |message: &Action| matches!(message, Action::SendRead { to: ME, .. });
        let own = t.network.iter().any(is_own);
        t.network.retain(|message| !is_own(message));
        t.deliver_all();
        t.advance(health::HEDGE_DELAY_MAX_NANOS);
        t.deliver_all();
        t.advance(100 * MILLI);
        own
    };
    let own = (0..1000).filter(|_| read(&mut t)).count();
    // It is tried again now and then, lest it be forgotten when it is well.
    assert!((20..500).contains(&own), "{own}");
}

#[test]
fn nothing_is_hedged_while_somebody_is_busy() {
    let mut t = fixture();
    t.read(need_read(3, 2, false), 3).unwrap();
    let to_peer = t.network.pop().unwrap();
    t.fail(to_peer, Failure::Busy);
    t.advance(50 * MILLI);
    let counters = t.coordinator.counters();
    assert_eq!((counters.hedges, counters.asked_again), (0, 1));
}

#[test]
fn what_is_beyond_the_bounds_is_refused_before_it_begins() {
    let mut t = Fixture::new(CoordinatorOptions { operations_max: 3, bytes_max: 250 });
    t.write(need(2, 2, false), 2).unwrap();
    t.write(need(2, 2, false), 2).unwrap();
    t.read(need_read(2, 2, false), 2).unwrap();
    assert_eq!(t.read(need_read(2, 2, false), 2).unwrap_err().status, Status::BUSY);
    assert_eq!(t.write(need(2, 2, false), 2).unwrap_err().status, Status::BUSY);
    let mut t = Fixture::new(CoordinatorOptions { operations_max: 100, bytes_max: 250 });
    for _ in 0..3 {
        t.write(need(2, 2, false), 2).unwrap();
    }
    assert_eq!(t.write(need(2, 2, false), 2).unwrap_err().status, Status::BUSY);
    assert_eq!(t.coordinator.counters().busy, 1);
}

#[test]
fn a_hung_server_stops_being_asked_and_the_others_go_on() {
    let mut t = fixture();
    let mut sent_to_hung = 0;
    for _ in 0..3000 {
        let op = t.write(need(3, 2, false), 3).unwrap();
        t.acked(op, ME);
        sent_to_hung += t
            .network
            .iter()
            .filter(|m| matches!(m, Action::SendWrite { to: NodeId(2), .. }))
            .count();
        t.network.retain(|m| !matches!(m, Action::SendWrite { to: NodeId(2), .. }));
        t.deliver_all();
        assert!(t.outcomes[&op].error().is_none());
        t.advance(MILLI / 10);
    }
    assert!(sent_to_hung < 600, "{sent_to_hung}");
    assert!(t.coordinator.len() < 200);
    t.advance(1000 * MILLI);
    t.assert_idle();
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write { n: u8, w: u8, sloppy: bool },
    Read { n: u8, r: u8, sloppy: bool },
    Deliver(usize),
    Double(usize),
    Lose(usize),
    Fail(usize, Failure),
    Local(usize),
    Down(u32),
    Up(u32),
    Advance(u64),
}

fn steps() -> impl Strategy<Value = Step> {
    let levels = || (1u8..=3).prop_flat_map(|n| (Just(n), 1..=n, any::<bool>()));
    let failure = prop_oneof![
        Just(Failure::Busy),
        Just(Failure::Refused),
        Just(Failure::Unknown),
        Just(Failure::Lost)
    ];
    prop_oneof![
        3 => levels().prop_map(|(n, w, sloppy)| Step::Write { n, w, sloppy }),
        3 => levels().prop_map(|(n, r, sloppy)| Step::Read { n, r, sloppy }),
        8 => any::<usize>().prop_map(Step::Deliver),
        1 => any::<usize>().prop_map(Step::Double),
        1 => any::<usize>().prop_map(Step::Lose),
        1 => (any::<usize>(), failure).prop_map(|(at, failure)| Step::Fail(at, failure)),
        4 => any::<usize>().prop_map(Step::Local),
        1 => (1u32..6).prop_map(Step::Down),
        1 => (1u32..6).prop_map(Step::Up),
        2 => (0u64..40).prop_map(|ms| Step::Advance(ms * MILLI)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn random_histories_answer_each_operation_once_and_leave_nothing_behind(
        steps in prop::collection::vec(steps(), 0..120),
        versions in prop::collection::vec(0u64..4, 6),
    ) {
        let mut t = fixture();
        t.versions = (0..6).map(|i| (NodeId(i), versions[i as usize])).collect();
        let mut ops = Vec::new();
        for step in steps {
            let pick = |at: usize, len: usize| (len > 0).then(|| at % len);
            match step {
                Step::Write { n, w, sloppy } => ops.extend(t.write(need(n, w, sloppy), n.into())),
                Step::Read { n, r, sloppy } => ops.extend(t.read(need_read(n, r, sloppy), n.into())),
                Step::Deliver(at) => {
                    if let Some(at) = pick(at, t.network.len()) {
                        let message = t.network.swap_remove(at);
                        t.deliver(message);
                    }
                }
                Step::Double(at) => {
                    if let Some(at) = pick(at, t.network.len()) {
                        t.deliver(t.network[at]);
                    }
                }
                Step::Lose(at) => {
                    if let Some(at) = pick(at, t.network.len()) {
                        t.network.swap_remove(at);
                    }
                }
                Step::Fail(at, failure) => {
                    if let Some(at) = pick(at, t.network.len()) {
                        let message = t.network.swap_remove(at);
                        t.fail(message, failure);
                    }
                }
                Step::Local(at) => {
                    if let Some(at) = pick(at, ops.len()) {
                        t.acked(ops[at], ME);
                    }
                }
                Step::Down(node) => {
                    let moment = t.moment();
                    t.coordinator.peer_down(moment, NodeId(node), &mut t.out);
                    t.settle();
                }
                Step::Up(node) => t.coordinator.peer_up(NodeId(node)),
                Step::Advance(nanos) => t.advance(nanos),
            }
            prop_assert!(t.outcomes.len() <= ops.len());
        }
        t.advance(1000 * MILLI);
        prop_assert_eq!(t.outcomes.len(), ops.len(), "each was answered");
        prop_assert!(t.coordinator.next_timeout().is_none());
        t.assert_idle();
    }
}

#[test]
fn a_stand_in_without_room_is_as_none_and_one_that_has_room_again_stands_in() {
    let mut fixture = Fixture::new(CoordinatorOptions::default());
    let down = |fixture: &mut Fixture, node| {
        fixture.coordinator.health_mut().set_standing(NodeId(node), Standing::Down);
    };
    // Homes are 0 to 2, of which this is one; 3 to 5 may stand in.
    down(&mut fixture, 2);
    let now = Instant(fixture.now);
    for node in 3..6 {
        fixture.coordinator.health_mut().set_room(now, NodeId(node), false);
    }
    let targets = |fixture: &mut Fixture, need| {
        let now = Instant(fixture.now);
        let plan = fixture.coordinator.plan_write(now, need, &nodes(0..3), &nodes(3..6));
        plan.map(|plan| plan.outstanding().collect::<Vec<_>>())
    };
    let two = need(3, 2, true);
    assert_eq!(targets(&mut fixture, two).unwrap(), nodes(0..2), "two homes are enough");
    down(&mut fixture, 1);
    let refusal = targets(&mut fixture, two).unwrap_err();
    assert_eq!(refusal.status, Status::UNAVAILABLE);
    assert!(refusal.reason.contains("full"), "{}", refusal.reason);
    let one = need(3, 1, true);
    assert_eq!(targets(&mut fixture, one).unwrap(), nodes(0..1));
    fixture.coordinator.health_mut().set_room(now, NodeId(4), true);
    assert_eq!(targets(&mut fixture, two).unwrap(), [NodeId(0), NodeId(4)]);
    // One who says nothing more is believed for some seconds.
    fixture.now += crate::room::BELIEVED_NANOS;
    assert_eq!(targets(&mut fixture, two).unwrap(), [NodeId(0), NodeId(3), NodeId(4)]);
}
