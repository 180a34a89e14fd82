//! A simulated cluster of membership machines, and nothing else: virtual time, a network that
//! loses, delays and cuts, nodes that die, stop and are slow, all from one seed.
//!
//! Invariant: the same options and the same calls give the same history, whatever the machine it
//! runs on. Every message is encoded, so its size is what a real one has; the header of a frame is
//! counted too. Shared by the tests and by `examples/gossip.rs`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use annulus_cluster::coordinator::Moment;
use annulus_cluster::membership::{Chance, Figures, Membership, Options, Output, Status};
use annulus_cluster::message::{GOSSIP_MESSAGE_SIZE_MAX, PeerMessage};
use annulus_cluster::{NodeId, NodeInfo, Weight};
use annulus_engine::model::{Instant, WallMicros};

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1000 * MS;
/// Bytes of a frame's header.
const FRAME_SIZE: u64 = 24;

/// What the cluster is like.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) seed: u64,
    pub(crate) nodes: u32,
    /// Node `i` is in rack `i % racks`.
    pub(crate) racks: u32,
    /// Messages lost, of a thousand.
    pub(crate) loss: u64,
    /// Of a hundred nodes so many send everything up to [`Setting::slow_nanos`] late.
    pub(crate) slow_percent: u32,
    pub(crate) slow_nanos: u64,
    pub(crate) options: Options,
    /// Whether each message is also decoded and compared.
    pub(crate) check_codec: bool,
}

impl Setting {
    pub(crate) fn new(seed: u64, nodes: u32) -> Setting {
        Setting {
            seed,
            nodes,
            racks: 3,
            loss: 0,
            slow_percent: 0,
            slow_nanos: 3 * SECOND,
            options: Options::default(),
            check_codec: nodes <= 10,
        }
    }
}

enum Event {
    /// A node should look at its clock; of the wake-up with this number.
    Wake(u32, u32),
    Arrive {
        from: u32,
        to: u32,
        message: PeerMessage<'static>,
    },
}

struct Node {
    machine: Option<Membership>,
    life: u64,
    /// Number of the wake-up that counts.
    wake: u32,
    wakes_at: u64,
    /// It does nothing, and what comes waits.
    stopped: Option<Vec<(u32, PeerMessage<'static>)>>,
    is_slow: bool,
}

/// What a world has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) largest: usize,
    /// A running node became down in the eyes of another.
    pub(crate) false_downs: u64,
    /// A running node became suspected in the eyes of another.
    pub(crate) false_suspects: u64,
}

pub(crate) struct World {
    pub(crate) setting: Setting,
    pub(crate) now: u64,
    pub(crate) tally: Tally,
    nodes: Vec<Node>,
    members: Vec<NodeInfo>,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    count: u64,
    random: Random,
    /// The first hears nothing of what is said against it, the second nothing of the first.
    pub(crate) slander: Option<(u32, u32)>,
    /// Ways that are cut.
    cuts: BTreeMap<(u32, u32), ()>,
    /// The last false accusation that went all the way, for a test's message.
    pub(crate) last_false: Option<(u64, u32, u32)>,
    scratch: Vec<u8>,
    out: Vec<Output>,
}

/// `SplitMix64`, as everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

impl World {
    /// All nodes start at about the same time.
    pub(crate) fn new(setting: Setting) -> World {
        let members: Vec<NodeInfo> = (0..setting.nodes)
            .map(|node| NodeInfo {
                id: id(node),
                peer: String::new(),
                client: String::new(),
                dc: "dc".into(),
                rack: format!("rack{}", node % setting.racks),
                weight: Weight::ONE,
            })
            .collect();
        let mut random = Random(setting.seed);
        let slow = |node: u32| {
            node * setting.slow_percent / 100 != (node + 1) * setting.slow_percent / 100
        };
        let nodes = (0..setting.nodes)
            .map(|node| Node {
                machine: None,
                life: 0,
                wake: 0,
                wakes_at: u64::MAX,
                stopped: None,
                is_slow: slow(node),
            })
            .collect();
        random.next();
        let mut world = World {
            now: SECOND,
            tally: Tally::default(),
            nodes,
            members,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            count: 0,
            random,
            slander: None,
            cuts: BTreeMap::new(),
            last_false: None,
            scratch: Vec::new(),
            out: Vec::new(),
            setting,
        };
        for node in 0..world.setting.nodes {
            world.start(node);
        }
        world
    }

    pub(crate) fn start(&mut self, node: u32) {
        let seed = self.random.next();
        let slot = &mut self.nodes[node as usize];
        slot.life += 1;
        slot.stopped = None;
        slot.machine = Some(Membership::new(
            Instant(self.now),
            id(node),
            slot.life,
            &self.members,
            self.setting.options,
            Chance::new(seed),
        ));
        let delay = self.random.below(50 * MS);
        self.wake_at(node, self.now + delay);
    }

    pub(crate) fn kill(&mut self, node: u32) {
        self.nodes[node as usize].machine = None;
    }

    /// The node does nothing from now on; what is sent to it waits.
    pub(crate) fn stop(&mut self, node: u32) {
        self.nodes[node as usize].stopped = Some(Vec::new());
    }

    /// It goes on: first its clock, then what has waited.
    pub(crate) fn go_on(&mut self, node: u32) {
        let waiting = self.nodes[node as usize].stopped.take().unwrap_or_default();
        self.wake_at(node, self.now);
        for (from, message) in waiting {
            self.schedule(self.now, Event::Arrive { from, to: node, message });
        }
    }

    /// Whether messages of this way are lost from now on.
    pub(crate) fn cut(&mut self, from: u32, to: u32, is_cut: bool) {
        if is_cut {
            self.cuts.insert((from, to), ());
        } else {
            self.cuts.remove(&(from, to));
        }
    }

    /// Cuts or mends every way to the node.
    pub(crate) fn cut_inbound(&mut self, node: u32, is_cut: bool) {
        for other in 0..self.setting.nodes {
            self.cut(other, node, is_cut);
        }
    }

    /// Cuts or mends every way from the node.
    pub(crate) fn cut_outbound(&mut self, node: u32, is_cut: bool) {
        for other in 0..self.setting.nodes {
            self.cut(node, other, is_cut);
        }
    }

    pub(crate) fn machine(&self, node: u32) -> &Membership {
        self.nodes[node as usize].machine.as_ref().expect("it runs")
    }

    pub(crate) fn machine_mut(&mut self, node: u32) -> &mut Membership {
        self.nodes[node as usize].machine.as_mut().expect("it runs")
    }

    pub(crate) fn is_running(&self, node: u32) -> bool {
        self.nodes[node as usize].machine.is_some()
    }

    pub(crate) fn status(&self, of: u32, at: u32) -> Status {
        self.machine(at).status(id(of)).expect("a member")
    }

    /// How many running nodes, not counting itself, see the node so.
    pub(crate) fn seen_as(&self, of: u32, status: Status) -> u32 {
        let others = (0..self.setting.nodes).filter(|at| *at != of && self.is_running(*at));
        others.map(|at| u32::from(self.status(of, at) == status)).sum()
    }

    /// How many pairs of running nodes there are of which one sees the other so.
    pub(crate) fn pairs_seen_as(&self, status: Status) -> u32 {
        let running = (0..self.setting.nodes).filter(|node| self.is_running(*node));
        running.map(|node| self.seen_as(node, status)).sum()
    }

    pub(crate) fn figures(&self, node: u32) -> Figures {
        self.machine(node).figures()
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, nanos: u64) {
        let end = self.now + nanos;
        self.run_until(end, |_| false);
    }

    /// Lets time pass until the condition holds, which is looked at every 50 ms. Returns how long
    /// it took.
    pub(crate) fn wait(&mut self, nanos_max: u64, is_met: impl Fn(&World) -> bool) -> Option<u64> {
        let began = self.now;
        while self.now < began + nanos_max {
            if is_met(self) {
                return Some(self.now - began);
            }
            self.run(50 * MS);
        }
        is_met(self).then_some(self.now - began)
    }

    fn run_until(&mut self, end: u64, stop: impl Fn(&World) -> bool) {
        while let Some(Reverse((at, _, slot))) = self.queue.peek().copied() {
            if at > end || stop(self) {
                break;
            }
            self.queue.pop();
            self.now = self.now.max(at);
            let event = self.events[slot].take().expect("scheduled once");
            self.free.push(slot);
            self.happen(event);
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, event: Event) {
        let moment = Moment { now: Instant(self.now), wall: WallMicros(self.now / 1000) };
        let mut out = std::mem::take(&mut self.out);
        let node = match event {
            Event::Wake(node, number) => {
                let slot = &mut self.nodes[node as usize];
                if slot.wake == number
                    && slot.stopped.is_none()
                    && let Some(machine) = &mut slot.machine
                {
                    slot.wakes_at = u64::MAX;
                    machine.handle_timeout(moment, &mut out);
                }
                node
            }
            Event::Arrive { from, to, message } => {
                let slot = &mut self.nodes[to as usize];
                if let Some(waiting) = &mut slot.stopped {
                    waiting.push((from, message));
                } else if let Some(machine) = &mut slot.machine {
                    machine.handle_message(moment, id(from), &message, &mut out);
                }
                to
            }
        };
        for output in out.drain(..) {
            self.carry_out(node, output);
        }
        self.out = out;
        let slot = &self.nodes[node as usize];
        if slot.stopped.is_none()
            && let Some(machine) = &slot.machine
        {
            let next = machine.next_timeout().0.max(self.now);
            if next < slot.wakes_at {
                self.wake_at(node, next);
            }
        }
    }

    fn carry_out(&mut self, node: u32, output: Output) {
        match output {
            Output::Changed(of, status) => {
                let of = of.0 - 1;
                let is_wrong = self.is_running(of) && self.nodes[of as usize].stopped.is_none();
                if is_wrong && status == Status::Down {
                    self.tally.false_downs += 1;
                    self.last_false = Some((self.now, of, node));
                }
                self.tally.false_suspects += u64::from(is_wrong && status == Status::Suspect);
            }
            Output::Send(to, mut message) => {
                self.scratch.clear();
                message.encode(&mut self.scratch);
                let size = self.scratch.len();
                assert!(size <= GOSSIP_MESSAGE_SIZE_MAX, "{size} bytes: {message:?}");
                if self.setting.check_codec {
                    assert_eq!(PeerMessage::decode(&self.scratch).as_ref(), Ok(&message));
                }
                self.tally.messages += 1;
                self.tally.bytes += size as u64 + FRAME_SIZE;
                self.tally.largest = self.tally.largest.max(size);
                let to = to.0 - 1;
                let is_lost = self.random.below(1000) < self.setting.loss;
                if is_lost || self.cuts.contains_key(&(node, to)) {
                    return;
                }
                if let Some(slander) = self.slander
                    && is_kept_back(slander, node, to, &mut message)
                {
                    return;
                }
                let delay = self.delay(node);
                self.schedule(self.now + delay, Event::Arrive { from: node, to, message });
            }
        }
    }

    /// 0.1 to 0.5 ms; one message in a hundred up to 20 ms; of a slow node up to seconds.
    fn delay(&mut self, from: u32) -> u64 {
        let usual = MS / 10 + self.random.below(4 * MS / 10);
        if self.nodes[from as usize].is_slow {
            usual + self.random.below(self.setting.slow_nanos)
        } else if self.random.below(100) == 0 {
            usual + self.random.below(20 * MS)
        } else {
            usual
        }
    }

    fn wake_at(&mut self, node: u32, at: u64) {
        let slot = &mut self.nodes[node as usize];
        slot.wake = slot.wake.wrapping_add(1);
        slot.wakes_at = at;
        let number = slot.wake;
        self.schedule(at, Event::Wake(node, number));
    }

    fn schedule(&mut self, at: u64, event: Event) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[slot] = Some(event);
        self.count += 1;
        self.queue.push(Reverse((at, self.count, slot)));
    }
}

/// Takes what the victim of a slander must not hear out of a message. Whether it is the slanderer
/// who must not have it at all.
fn is_kept_back(
    (victim, slanderer): (u32, u32),
    from: u32,
    to: u32,
    message: &mut PeerMessage<'static>,
) -> bool {
    let is_word_of_victim = match message {
        PeerMessage::ProbeForDone { target, is_reached, .. } => {
            *target == id(victim) && *is_reached
        }
        _ => from == victim,
    };
    let (PeerMessage::Probe { gossip, .. }
    | PeerMessage::ProbeDone { gossip, .. }
    | PeerMessage::ProbeFor { gossip, .. }
    | PeerMessage::ProbeForDone { gossip, .. }
    | PeerMessage::Gossip { gossip, .. }) = message
    else {
        return false;
    };
    if to == victim {
        gossip.claims.retain(|claim| claim.node != id(victim));
    }
    to == slanderer && is_word_of_victim
}

/// Nodes count from 0, members from 1.
pub(crate) fn id(node: u32) -> NodeId {
    NodeId(node + 1)
}
