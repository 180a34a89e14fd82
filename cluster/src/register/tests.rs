//! A register under crashes, loss, doubling, reordering and wrong clocks; and what each rule of the
//! protocol is for, by leaving it out.
//!
//! Invariant: a run follows from its seed. Acceptors have a disk that takes its time; what was not
//! written when an acceptor crashes is written or lost, by chance. Proposers forget everything.

pub(crate) mod history;

use std::collections::BTreeMap;

use annulus_engine::model::{Instant, WallMicros};

use super::*;
use crate::coordinator::Moment;
use crate::member::NodeId;
use history::{Ask, Operation, Told, is_linearizable};

const MS: u64 = 1_000_000;
/// Enough that each rule left out is missed, and quick.
const SEEDS: u64 = 1_500;

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// Acceptors answer before their disk does.
    Durability,
    /// Acceptors accept whatever is above what they have accepted.
    Promises,
    /// One acceptor fewer is a quorum.
    Majorities,
    /// A proposer begins again with the session of before.
    Sessions,
    /// States do not remember what made them.
    Memory,
}

#[derive(Clone, Debug)]
enum Body {
    Prepare(Ballot),
    Prepared(Ballot, PrepareResult),
    Accept(Ballot, Ballot, State),
    Accepted(Ballot, AcceptResult),
}

#[derive(Clone, Debug)]
struct Message {
    /// Of the proposer, so that answers find its present life or nobody.
    proposer: (usize, u64),
    acceptor: usize,
    body: Body,
}

struct AcceptorHost {
    /// What it acts by; the same as `disk` unless a rule is broken.
    memory: Acceptor,
    disk: Acceptor,
    /// What the disk is writing, and what may be said after it.
    writing: Option<(Acceptor, Option<Message>)>,
}

/// A wall clock, as wrong as they come.
#[derive(Clone, Copy)]
enum Clock {
    Ahead(u64),
    /// It shows this, for ever.
    Stopped(u64),
}

struct ProposerHost {
    proposer: Proposer<Ask>,
    life: u64,
    clock: Clock,
    operations: BTreeMap<ChangeId, usize>,
}

struct World {
    broken: Broken,
    chance: u64,
    now: u64,
    acceptors: Vec<AcceptorHost>,
    proposers: Vec<ProposerHost>,
    messages: Vec<Message>,
    history: Vec<Operation>,
    fair: bool,
    /// Percent of the steps in which an acceptor crashes, and a proposer.
    crashes: (usize, usize),
}

impl World {
    fn new(seed: u64, broken: Broken) -> World {
        let mut world = World {
            broken,
            chance: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5EED,
            now: 1_000 * MS,
            acceptors: Vec::new(),
            proposers: Vec::new(),
            messages: Vec::new(),
            history: Vec::new(),
            fair: false,
            crashes: (0, 0),
        };
        world.crashes = ([1, 4, 12][world.below(3)], [0, 1, 6][world.below(3)]);
        let fresh = Acceptor::new(State::default());
        let count = [3, 3, 5][world.below(3)];
        for _ in 0..count {
            let (memory, disk) = (fresh.clone(), fresh.clone());
            world.acceptors.push(AcceptorHost { memory, disk, writing: None });
        }
        for index in 0..[1, 2, 3][world.below(3)] {
            let host = world.start(index, 1);
            world.proposers.push(host);
        }
        world
    }

    fn below(&mut self, bound: usize) -> usize {
        self.chance = self.chance.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) % bound as u64).unwrap()
    }

    fn start(&mut self, index: usize, life: u64) -> ProposerHost {
        let acceptors = (0u32..).take(self.acceptors.len()).map(NodeId).collect();
        let session = if self.broken == Broken::Sessions { 1 } else { life };
        let node = NodeId(100 + u32::try_from(index).unwrap());
        let seed = self.below(1 << 30) as u64;
        let source = BallotSource::new(node, session);
        let options = ProposerOptions::default();
        let mut proposer = Proposer::new(acceptors, source, seed, options);
        if self.broken == Broken::Majorities {
            proposer.quorum = Some(majority(proposer.acceptors().len()) - 1);
        }
        let clock = match self.below(3) {
            0 => Clock::Stopped(0),
            1 => Clock::Stopped(5_000_000),
            _ => Clock::Ahead(self.below(4) as u64 * 2_000_000),
        };
        ProposerHost { proposer, life, clock, operations: BTreeMap::new() }
    }

    fn moment(&self, proposer: usize) -> Moment {
        let wall = match self.proposers[proposer].clock {
            Clock::Ahead(us) => self.now / 1000 + us,
            Clock::Stopped(at) => at,
        };
        Moment { now: Instant(self.now), wall: WallMicros(wall) }
    }

    fn submit(&mut self, index: usize, ask: Ask, patience: u64) {
        let moment = self.moment(index);
        let mut out = Vec::new();
        let operation = self.history.len();
        let invoked = self.now;
        self.history.push(Operation { ask, invoked, returned: u64::MAX, told: Told::Perhaps });
        let deadline = moment.now.after_nanos(patience);
        let host = &mut self.proposers[index];
        let id = host.proposer.submit(moment, ask, deadline, &mut out).expect("a short line");
        host.operations.insert(id, operation);
        self.act(index, out);
    }

    fn act(&mut self, index: usize, actions: Vec<ProposerAction<Told>>) {
        let from = (index, self.proposers[index].life);
        let mut send = |to: NodeId, body| {
            let acceptor = to.0 as usize;
            self.messages.push(Message { proposer: from, acceptor, body });
        };
        for action in actions {
            let (id, outcome) = match action {
                ProposerAction::Prepare { to, ballot } => {
                    send(to, Body::Prepare(ballot));
                    continue;
                }
                ProposerAction::Accept { to, ballot, next, state } => {
                    let mut state = (*state).clone();
                    if self.broken == Broken::Memory {
                        state.recent.clear();
                    }
                    send(to, Body::Accept(ballot, next, state));
                    continue;
                }
                ProposerAction::Done(id, outcome) => (id, outcome),
            };
            let operation = self.proposers[index].operations.remove(&id).expect("asked once");
            let operation = &mut self.history[operation];
            operation.returned = self.now;
            operation.told = match outcome {
                Outcome::Changed(told, _) | Outcome::Kept(told, _) => told,
                Outcome::NotStarted { .. } => Told::NotStarted,
                Outcome::MayBeApplied => Told::Perhaps,
            };
        }
    }

    fn deliver(&mut self, message: Message) {
        let Message { proposer: (index, life), acceptor, body } = message;
        let wall = WallMicros(self.now / 1000);
        let host = &mut self.acceptors[acceptor];
        if self.broken == Broken::Promises {
            host.memory.promised = host.memory.accepted;
        }
        let (answer, durable_first) = match body {
            Body::Prepare(ballot) => {
                let vote = host.memory.handle_prepare(wall, ballot);
                (Body::Prepared(ballot, vote.answer), vote.durable_first)
            }
            Body::Accept(ballot, next, state) => {
                let vote = host.memory.handle_accept(wall, ballot, next, &state);
                (Body::Accepted(ballot, vote.answer), vote.durable_first)
            }
            Body::Prepared(..) | Body::Accepted(..) => {
                let moment = self.moment(index);
                let (mut out, from) = (Vec::new(), NodeId(u32::try_from(acceptor).unwrap()));
                let host = &mut self.proposers[index];
                if host.life != life {
                    return;
                }
                match body {
                    Body::Prepared(ballot, result) => {
                        host.proposer.handle_prepared(moment, from, ballot, result, &mut out);
                    }
                    Body::Accepted(ballot, result) => {
                        host.proposer.handle_accepted(moment, from, ballot, result, &mut out);
                    }
                    Body::Prepare(_) | Body::Accept(..) => {}
                }
                return self.act(index, out);
            }
        };
        let answer = Message { proposer: (index, life), acceptor, body: answer };
        match durable_first {
            None => self.messages.push(answer),
            Some(durable) if self.broken == Broken::Durability => {
                host.memory = durable.clone();
                host.writing = Some((durable, None));
                self.messages.push(answer);
            }
            Some(durable) => host.writing = Some((durable, Some(answer))),
        }
    }

    fn written(&mut self, acceptor: usize) {
        let host = &mut self.acceptors[acceptor];
        if let Some((durable, answer)) = host.writing.take() {
            host.memory = durable.clone();
            host.disk = durable;
            self.messages.extend(answer);
        }
    }

    fn crash_acceptor(&mut self, acceptor: usize) {
        let survives = self.below(2) == 0;
        let host = &mut self.acceptors[acceptor];
        if let Some((durable, _)) = host.writing.take().filter(|_| survives) {
            host.disk = durable;
        }
        host.memory = host.disk.clone();
    }

    fn crash_proposer(&mut self, index: usize) {
        let (life, clock) = (self.proposers[index].life + 1, self.proposers[index].clock);
        self.proposers[index] = self.start(index, life);
        if self.below(2) == 0 {
            self.proposers[index].clock = clock;
        }
    }

    fn time_out(&mut self) {
        let due = |host: &ProposerHost| host.proposer.next_timeout();
        let Some(next) = self.proposers.iter().filter_map(due).min() else { return };
        self.now = self.now.max(next.0);
        for index in 0..self.proposers.len() {
            if due(&self.proposers[index]).is_some_and(|at| at.0 <= self.now) {
                let (moment, mut out) = (self.moment(index), Vec::new());
                self.proposers[index].proposer.handle_timeout(moment, &mut out);
                self.act(index, out);
            }
        }
    }

    /// One of all that could happen next.
    fn step(&mut self) {
        self.now += self.below(1_000_000) as u64;
        let (acceptors, proposers) = self.crashes;
        let rare = if self.fair { usize::MAX } else { self.below(100) };
        if rare < acceptors {
            let acceptor = self.below(self.acceptors.len());
            return self.crash_acceptor(acceptor);
        } else if rare < acceptors + proposers {
            let proposer = self.below(self.proposers.len());
            return self.crash_proposer(proposer);
        } else if rare < acceptors + proposers + 1 {
            return self.time_out();
        }
        let writing: Vec<usize> =
            (0..self.acceptors.len()).filter(|a| self.acceptors[*a].writing.is_some()).collect();
        if !writing.is_empty() && self.below(3) == 0 {
            let at = self.below(writing.len());
            return self.written(writing[at]);
        }
        // An acceptor does one thing at a time; a broken one only seems to.
        let ready: Vec<usize> = (0..self.messages.len())
            .filter(|at| {
                let message = &self.messages[*at];
                let asks = matches!(message.body, Body::Prepare(_) | Body::Accept(..));
                !asks || self.acceptors[message.acceptor].writing.is_none()
            })
            .collect();
        if ready.is_empty() {
            return match writing.first() {
                Some(acceptor) => self.written(*acceptor),
                None => self.time_out(),
            };
        }
        let at = ready[self.below(ready.len())];
        match if self.fair { 9 } else { self.below(12) } {
            0 => drop(self.messages.swap_remove(at)),
            1 => self.deliver(self.messages[at].clone()),
            _ => {
                let message = self.messages.swap_remove(at);
                self.deliver(message);
            }
        }
    }

    /// A run, then a time without faults in which a read must be answered. The verdict.
    fn run(mut self) -> Result<World, String> {
        let mut next_value = 0;
        for _ in 0..14 {
            for _ in 0..self.below(25) {
                self.step();
            }
            let index = self.below(self.proposers.len());
            next_value += 1;
            let from = self.history.iter().rev().find_map(|it| match (it.ask, it.told) {
                (_, Told::Value(found)) => Some(found),
                (Ask::Put(to) | Ask::Swap { to, .. }, _) => Some(Some(to)),
                _ => None,
            });
            let ask = match self.below(4) {
                0 => Ask::Read,
                1 => Ask::Put(next_value),
                _ => Ask::Swap { from: from.flatten(), to: next_value },
            };
            let patience = [30, 300, 3_000][self.below(3)] * MS;
            self.submit(index, ask, patience);
        }
        for _ in 0..60 {
            self.step();
        }
        self.fair = true;
        let last = self.history.len();
        self.submit(0, Ask::Read, 3_600_000 * MS);
        for _ in 0..20_000 {
            if self.proposers.iter().all(|host| host.proposer.is_idle()) {
                break;
            }
            self.step();
        }
        match self.history[last].told {
            Told::Value(_) if is_linearizable(&self.history) => Ok(self),
            Told::Value(_) => Err(format!("no order explains {:#?}", self.history)),
            _ => Err(format!("the last read was not answered: {:?}", self.history[last])),
        }
    }
}

/// How many of the seeds go wrong, and the first.
fn failures(broken: Broken) -> (u64, Option<u64>) {
    let failed: Vec<u64> =
        (0..SEEDS).filter(|seed| World::new(*seed, broken).run().is_err()).collect();
    (failed.len() as u64, failed.first().copied())
}

#[test]
fn a_register_is_linearizable_through_crashes_loss_and_wrong_clocks() {
    let (mut made, mut perhaps, mut conflicts) = (0, 0, 0);
    for seed in 0..4 * SEEDS {
        let world = World::new(seed, Broken::Nothing).run();
        let world = world.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let count = |told| world.history.iter().filter(|it| it.told == told).count();
        made += count(Told::Made);
        perhaps += count(Told::Perhaps);
        conflicts += world.proposers.iter().map(|it| it.proposer.conflicts()).sum::<u64>();
    }
    println!("{made} changes made, {perhaps} perhaps, {conflicts} conflicts");
    // The runs were about something.
    assert!(made > 10_000 && perhaps > 10_000 && conflicts > 10_000);
}

#[test]
fn each_rule_is_missed_when_it_is_left_out() {
    for broken in [Broken::Durability, Broken::Promises, Broken::Majorities, Broken::Memory] {
        let (failed, first) = failures(broken);
        println!("without {broken:?}: {failed} of {SEEDS} runs go wrong, first seed {first:?}");
        assert!(failed > 0, "{broken:?} was not missed in {SEEDS} runs");
    }
}

/// A proposer and what it asks, step by step.
fn alone(seed: u64) -> World {
    let mut world = World::new(seed, Broken::Nothing);
    world.fair = true;
    world.proposers.truncate(1);
    world
}

#[test]
fn a_lone_proposer_needs_one_round_trip_after_the_first() {
    let mut world = alone(1);
    let count = world.acceptors.len();
    world.submit(0, Ask::Put(1), 1_000 * MS);
    assert_eq!(world.messages.len(), count);
    while !world.proposers[0].proposer.is_idle() {
        world.step();
    }
    world.messages.clear();
    world.submit(0, Ask::Swap { from: Some(1), to: 2 }, 1_000 * MS);
    assert!(world.messages.iter().all(|it| matches!(it.body, Body::Accept(..))));
    assert_eq!(world.messages.len(), count);
    while !world.proposers[0].proposer.is_idle() {
        world.step();
    }
    assert!(world.history.iter().all(|it| it.told == Told::Made));
}

#[test]
fn without_a_majority_a_change_is_refused_as_not_started_at_its_deadline() {
    let mut world = alone(1);
    let count = world.acceptors.len();
    world.submit(0, Ask::Put(1), 500 * MS);
    for _ in 0..200 {
        // Only the last acceptor answers.
        world.messages.retain(|it| it.acceptor == count - 1);
        if world.proposers[0].proposer.is_idle() {
            break;
        }
        world.step();
    }
    let told = world.history[0];
    assert_eq!(told.told, Told::NotStarted);
    assert!(told.returned >= told.invoked + 500 * MS);
}

impl World {
    /// Has everything happen that these acceptors take part in, and nothing else.
    fn pass(&mut self, acceptors: &[usize], until: impl Fn(&World) -> bool) {
        while !until(self) {
            self.messages.retain(|message| acceptors.contains(&message.acceptor));
            (0..self.acceptors.len()).for_each(|acceptor| self.written(acceptor));
            let Some(message) = (!self.messages.is_empty()).then(|| self.messages.remove(0)) else {
                return;
            };
            self.now += MS;
            self.deliver(message);
        }
    }

    fn read(&mut self, proposer: usize, acceptors: &[usize]) {
        self.now += MS;
        self.submit(proposer, Ask::Read, 1_000 * MS);
        self.pass(acceptors, |world| world.proposers[proposer].proposer.is_idle());
    }
}

/// A proposer's clock stands. It is killed when one acceptor has accepted; then it asks the others
/// for another change, with ballots that begin where they began before.
fn killed_while_accepting(broken: Broken) -> bool {
    let mut world = World::new(0, Broken::Nothing);
    (world.broken, world.fair) = (broken, true);
    world.acceptors.truncate(3);
    let start = |world: &mut World, index, life| {
        let mut host = world.start(index, life);
        host.clock = Clock::Stopped(0);
        host
    };
    world.proposers = (0..3).map(|index| start(&mut world, index, 1)).collect();
    world.submit(0, Ask::Put(1), 1_000 * MS);
    let accepts = |world: &World| {
        world.messages.iter().any(|message| matches!(message.body, Body::Accept(..)))
    };
    world.pass(&[0, 1, 2], accepts);
    world.pass(&[0], |world| world.acceptors[0].writing.is_some());
    world.written(0);
    world.messages.clear();
    world.proposers[0] = start(&mut world, 0, 2);
    world.submit(0, Ask::Put(2), 1_000 * MS);
    world.pass(&[1, 2], |world| world.proposers[0].proposer.is_idle());
    assert_eq!(world.history[1].told, Told::Made);
    for (reader, acceptors) in [(1, [0, 1]), (2, [1, 2])] {
        world.proposers[reader].clock = Clock::Ahead(reader as u64 * 1_000_000);
        world.read(reader, &acceptors);
        assert!(matches!(world.history.last().unwrap().told, Told::Value(Some(_))));
    }
    is_linearizable(&world.history)
}

#[test]
fn a_killed_proposer_does_not_use_a_ballot_again() {
    assert!(killed_while_accepting(Broken::Nothing));
    assert!(!killed_while_accepting(Broken::Sessions));
}
