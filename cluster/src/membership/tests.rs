//! One machine, told this and that; clusters of them are in `cluster/tests/gossip.rs`.

use annulus_engine::model::WallMicros;

use super::*;
use crate::member::Weight;
use crate::message::{GOSSIP_MESSAGE_SIZE_MAX, Gossip};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

/// The machine of node 1 among so many. Nodes 1 and 2 are in rack a, 3 and 4 in rack b, and so on.
struct Fixture {
    machine: Membership,
    now: u64,
}

impl Fixture {
    fn new(nodes: u32) -> Fixture {
        let members: Vec<NodeInfo> = (1..=nodes)
            .map(|node| NodeInfo {
                id: NodeId(node),
                peer: String::new(),
                client: String::new(),
                dc: "dc".into(),
                rack: format!("rack{}", (node - 1) / 2),
                weight: Weight::ONE,
            })
            .collect();
        let (options, chance) = (Options::default(), Chance::new(7));
        let machine = Membership::new(Instant(0), NodeId(1), 3, &members, options, chance);
        Fixture { machine, now: 0 }
    }

    fn moment(&self) -> Moment {
        Moment { now: Instant(self.now), wall: WallMicros(self.now / 1000) }
    }

    fn hear(&mut self, from: u32, message: &PeerMessage<'static>) -> Vec<Output> {
        let mut out = Vec::new();
        self.machine.handle_message(self.moment(), NodeId(from), message, &mut out);
        out
    }

    /// A member passes claims on. Returns what is said back, and what changed.
    fn tell(&mut self, from: u32, claims: &[(u32, Said)]) -> Vec<Output> {
        let claim =
            |(node, said): &(u32, Said)| Claim { node: NodeId(*node), incarnation: 9, said: *said };
        let claims = claims.iter().map(claim).collect();
        let gossip = Gossip { reports: Vec::new(), claims };
        self.hear(from, &PeerMessage::Gossip { is_answer: false, gossip })
    }

    fn status(&self, node: u32) -> Status {
        self.machine.status(NodeId(node)).unwrap()
    }

    /// Lets time pass with nobody answering, and gossip of one member heard, so that the machine
    /// does not take itself for deaf. Returns what was sent.
    fn pass(&mut self, nanos: u64, hears: bool) -> Vec<Output> {
        let end = self.now + nanos;
        let mut all = Vec::new();
        while self.machine.next_timeout().0 <= end {
            self.now = self.machine.next_timeout().0.max(self.now);
            let mut out = Vec::new();
            self.machine.handle_timeout(self.moment(), &mut out);
            all.append(&mut out);
            if hears {
                let gossip = Gossip::default();
                self.hear(2, &PeerMessage::Gossip { is_answer: true, gossip });
            }
        }
        self.now = end;
        all
    }
}

fn suspect(reporter: u32) -> Said {
    Said::Suspect { reporter: NodeId(reporter) }
}

fn down(first: u32, second: u32) -> Said {
    Said::Down { reporters: [NodeId(first), NodeId(second)] }
}

fn gossip_of(output: &Output) -> Option<&Gossip> {
    match output {
        Output::Send(_, PeerMessage::Gossip { gossip, .. } | PeerMessage::Probe { gossip, .. }) => {
            Some(gossip)
        }
        _ => None,
    }
}

#[test]
fn down_is_believed_of_two_racks_and_not_of_one() {
    let mut node = Fixture::new(8);
    node.tell(3, &[(7, Said::Alive), (7, down(3, 4))]);
    assert_eq!(node.status(7), Status::Suspect, "both are in one rack, and others are alive");
    node.tell(3, &[(7, down(4, 5))]);
    assert_eq!(node.status(7), Status::Down);
}

#[test]
fn one_rack_is_enough_where_all_the_living_are_in_it() {
    let mut node = Fixture::new(4);
    node.tell(2, &[(3, suspect(2)), (4, suspect(2))]);
    assert_eq!(node.status(3), Status::Suspect);
    node.tell(2, &[(3, down(1, 2))]);
    assert_eq!(node.status(3), Status::Down);
}

#[test]
fn one_reporter_is_not_enough_however_often_and_for_however_long() {
    let mut node = Fixture::new(8);
    for _ in 0..200 {
        node.tell(5, &[(7, suspect(5))]);
        node.pass(SECOND / 2, false);
        assert_ne!(node.status(7), Status::Down);
    }
}

#[test]
fn a_second_reporter_after_the_time_decides_at_once() {
    let mut node = Fixture::new(8);
    node.tell(5, &[(7, suspect(5))]);
    node.pass(20 * SECOND, false);
    assert_eq!(node.status(7), Status::Unreachable, "it does not answer here either");
    node.tell(3, &[(7, suspect(3))]);
    node.pass(SECOND, false);
    assert_eq!(node.status(7), Status::Down);
}

#[test]
fn who_is_accused_contradicts_in_the_answer() {
    let mut node = Fixture::new(4);
    let before = node.machine.own_report().incarnation;
    let incarnation = before;
    let claim = Claim { node: NodeId(1), incarnation, said: suspect(3) };
    let gossip = Gossip { reports: Vec::new(), claims: vec![claim] };
    let out = node.hear(3, &PeerMessage::Gossip { is_answer: false, gossip: gossip.clone() });
    let answer = gossip_of(&out[0]).unwrap();
    assert_eq!(answer.reports[0].incarnation, before + 1);
    assert!(answer.claims.contains(&Claim { incarnation: before + 1, said: Said::Alive, ..claim }));
    assert_eq!(node.machine.figures().contradictions, 1);
    assert_eq!(node.machine.figures().local_health, 1, "it may be its own fault");
    node.hear(3, &PeerMessage::Gossip { is_answer: false, gossip });
    assert_eq!(node.machine.figures().contradictions, 1, "history");
}

#[test]
fn the_accused_is_told_first_of_all() {
    let mut node = Fixture::new(4);
    node.tell(3, &[(4, suspect(3))]);
    let out = node.tell(4, &[]);
    let claims = &gossip_of(&out[0]).unwrap().claims;
    assert_eq!(claims[0], Claim { node: NodeId(4), incarnation: 9, said: suspect(3) });
}

#[test]
fn strangers_are_not_believed_nor_believed_of() {
    let mut node = Fixture::new(4);
    assert!(node.tell(99, &[(3, down(2, 4))]).is_empty());
    node.tell(2, &[(3, down(98, 99)), (77, suspect(2)), (4, suspect(99))]);
    assert_eq!([2, 3, 4].map(|it| node.status(it)), [Status::Alive; 3]);
}

#[test]
fn nothing_heard_is_no_accusation_but_unreachable() {
    let mut node = Fixture::new(8);
    node.pass(60 * SECOND, false);
    let figures = node.machine.figures();
    assert!(figures.withheld > 0 && figures.accusations <= 3, "{figures:?}");
    assert!((2..=8).all(|other| node.status(other) != Status::Down));
    assert_eq!(figures.local_health, 7);
    let mut hearing = Fixture::new(8);
    hearing.pass(60 * SECOND, true);
    assert!(hearing.machine.figures().accusations > 0);
    let downs = (2..=8).filter(|other| hearing.status(*other) == Status::Down).count();
    assert_eq!(downs, 0, "its own word alone");
}

#[test]
fn a_sleeper_accuses_nobody_for_what_it_slept_through() {
    let mut node = Fixture::new(8);
    node.pass(SECOND, true);
    node.tell(5, &[(7, suspect(5)), (7, suspect(3)), (7, suspect(2))]);
    let accusations = node.machine.figures().accusations;
    node.now += 3600 * SECOND;
    let mut out = Vec::new();
    node.machine.handle_timeout(node.moment(), &mut out);
    assert_eq!(node.status(7), Status::Suspect, "its answer may lie in the inbox");
    assert_eq!(node.machine.figures().accusations, accusations);
}

#[test]
fn a_message_is_bounded_however_much_there_is_to_tell() {
    let mut node = Fixture::new(1000);
    for first in (2..1000).step_by(50) {
        let claims: Vec<(u32, Said)> = (first..first + 50)
            .filter(|it| *it <= 1000)
            .map(|it| (it, down(1, if it == 3 { 5 } else { 3 })))
            .collect();
        node.tell(2, &claims);
    }
    assert!(node.machine.figures().rumours > 900);
    let mut bytes = Vec::new();
    for output in node.pass(20 * SECOND, true) {
        if let Output::Send(_, message) = output {
            bytes.clear();
            message.encode(&mut bytes);
            assert!(bytes.len() <= GOSSIP_MESSAGE_SIZE_MAX);
            assert_eq!(PeerMessage::decode(&bytes), Ok(message));
        }
    }
}

#[test]
fn a_helper_says_yes_or_no() {
    let mut node = Fixture::new(4);
    node.pass(SECOND, true);
    let ask = |id| PeerMessage::ProbeFor { id, target: NodeId(4), gossip: Gossip::default() };
    let asked = node.hear(2, &ask(70));
    let [Output::Send(NodeId(4), PeerMessage::Probe { id, .. })] = asked[..] else {
        panic!("{asked:?}")
    };
    let done = PeerMessage::ProbeDone {
        id,
        sent_wall_us: 0,
        received_wall_us: 0,
        replied_wall_us: 0,
        gossip: Gossip::default(),
    };
    let answered = |out: &[Output], id, reached| {
        out.iter().any(|output| {
            matches!(output, Output::Send(NodeId(2), PeerMessage::ProbeForDone { id: it, is_reached, .. })
                if *it == id && *is_reached == reached)
        })
    };
    assert!(answered(&node.hear(4, &done), 70, true));
    node.hear(2, &ask(71));
    let out = node.pass(SECOND, true);
    assert!(answered(&out, 71, false) && !answered(&out, 71, true));
}

#[test]
fn each_member_is_probed_once_before_any_is_twice() {
    let mut node = Fixture::new(9);
    let out = node.pass(100 * SECOND, true);
    let probed: Vec<NodeId> = out
        .iter()
        .filter_map(|output| match output {
            Output::Send(to, PeerMessage::Probe { .. }) => Some(*to),
            _ => None,
        })
        .collect();
    for round in probed.chunks_exact(8) {
        let mut round = round.to_vec();
        round.sort_unstable();
        round.dedup();
        assert_eq!(round.len(), 8);
    }
    assert!(probed.len() >= 16);
}
