//! Announcements over a bad network, and choices at given moments.

use std::cell::Cell;

use annulus_engine::model::Dot;

use super::*;
use crate::message::{PeerMessage, TrackEntry};

mod model;

const MS: u64 = 1_000_000;
const P: PartitionId = PartitionId(0);

/// A replica of one partition on a node.
struct Node {
    seen: Rc<SeenSet>,
    clock: Cell<u64>,
    durable: u64,
    visible: u64,
    gap: bool,
}

impl Node {
    fn new() -> Node {
        Node { seen: Rc::default(), clock: Cell::new(1000), durable: 0, visible: 0, gap: false }
    }

    /// A write comes in. Returns its stamp.
    fn see(&mut self, origin: u32, sequence: u64) {
        let stamp = Timestamp(1000 + sequence * 10);
        self.clock.set(self.clock.get().max(stamp.0 + 1));
        Rc::make_mut(&mut self.seen).see(Dot { origin: OriginId(origin), sequence }, stamp);
        self.visible += 1;
        self.durable += 1;
    }
}

impl Replica for Node {
    fn seen(&self, partition: PartitionId) -> Rc<SeenSet> {
        if partition == P { Rc::clone(&self.seen) } else { Rc::default() }
    }
    fn take_changed(&mut self) -> Vec<PartitionId> {
        vec![P]
    }
    fn clock(&self) -> Timestamp {
        self.clock.set(self.clock.get() + 1);
        Timestamp(self.clock.get())
    }
    fn lost_after(&self) -> Option<Timestamp> {
        self.gap.then_some(Timestamp::ZERO)
    }
    fn has_gap(&self, _: PartitionId) -> bool {
        self.gap
    }
    fn is_busy(&self, _: PartitionId) -> bool {
        false
    }
    fn appended(&self) -> u64 {
        self.visible
    }
    fn visible(&self) -> u64 {
        self.visible
    }
    fn durable(&self) -> u64 {
        self.durable
    }
}

/// A replica of many partitions: of these sets, and of what the node has seen in all others.
struct Many {
    sets: Vec<Rc<SeenSet>>,
    changed: Vec<PartitionId>,
    node: Node,
}

impl Many {
    fn new(sets: Vec<Rc<SeenSet>>) -> Many {
        Many { sets, changed: Vec::new(), node: Node::new() }
    }
}

impl Replica for Many {
    fn seen(&self, partition: PartitionId) -> Rc<SeenSet> {
        Rc::clone(self.sets.get(partition.0 as usize).unwrap_or(&self.node.seen))
    }
    fn take_changed(&mut self) -> Vec<PartitionId> {
        self.changed.clone()
    }
    fn clock(&self) -> Timestamp {
        self.node.clock()
    }
    fn lost_after(&self) -> Option<Timestamp> {
        self.node.lost_after()
    }
    fn has_gap(&self, partition: PartitionId) -> bool {
        self.node.has_gap(partition)
    }
    fn is_busy(&self, partition: PartitionId) -> bool {
        self.node.is_busy(partition)
    }
    fn appended(&self) -> u64 {
        self.node.appended()
    }
    fn visible(&self) -> u64 {
        self.node.visible()
    }
    fn durable(&self) -> u64 {
        self.node.durable()
    }
}

/// A message on its way, owned.
#[derive(Clone)]
struct Sent {
    from: u32,
    to: u32,
    bytes: Vec<u8>,
}

/// Nodes 1 to n; the partition is held by the first `holders`.
struct Net {
    now: Instant,
    nodes: BTreeMap<u32, (Node, Tracking)>,
    wire: Vec<Sent>,
    holders: u32,
    count: u32,
    largest: usize,
}

fn shared(count: u32, holders: u32) -> Shared {
    Shared {
        partition_bits: 0,
        members: (1..=count).map(|node| (NodeId(node), 1)).collect(),
        first: P,
        holders: vec![(1..=holders).map(NodeId).collect()],
        moves: Moves::default(),
    }
}

impl Net {
    fn new(count: u32, holders: u32) -> Net {
        let start = |node: u32| {
            let shared = shared(count, holders);
            (node, (Node::new(), Tracking::new(NodeId(node), 1, Options::default(), shared)))
        };
        let nodes = (1..=count).map(start).collect();
        Net { now: Instant(0), nodes, wire: Vec::new(), holders, count, largest: 0 }
    }

    /// The node starts again with the same replica.
    fn restart(&mut self, node: u32, life: u64) {
        let shared = shared(self.count, self.holders);
        let tracking = Tracking::new(NodeId(node), life, Options::default(), shared);
        self.nodes.get_mut(&node).unwrap().1 = tracking;
    }

    fn see(&mut self, node: u32, origin: u32, sequence: u64) {
        self.nodes.get_mut(&node).unwrap().0.see(origin, sequence);
    }

    fn poll(&mut self) {
        for (node, (replica, tracking)) in &mut self.nodes {
            tracking.poll(self.now, replica, &mut |to, message| {
                let mut bytes = Vec::new();
                message.encode(&mut bytes);
                self.largest = self.largest.max(bytes.len());
                self.wire.push(Sent { from: *node, to: to.node.0, bytes });
                true
            });
        }
    }

    fn deliver(&mut self, sent: &Sent) {
        let (replica, tracking) = self.nodes.get_mut(&sent.to).unwrap();
        let from = PeerShard { node: NodeId(sent.from), shard: 0 };
        let message = PeerMessage::decode(&sent.bytes).unwrap();
        let wire = &mut self.wire;
        let mut out = |to: PeerShard, message: &PeerMessage<'_>| {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            wire.push(Sent { from: sent.to, to: to.node.0, bytes });
            true
        };
        tracking.handle(self.now, from, &message, replica, &mut out).unwrap();
    }

    /// Time passes, and everything arrives.
    fn settle(&mut self, rounds: u32) {
        for _ in 0..rounds {
            self.now = self.now.after_nanos(200 * MS);
            self.poll();
            while !self.wire.is_empty() {
                let sent = self.wire.remove(0);
                self.deliver(&sent);
            }
        }
    }

    fn tracking(&mut self, node: u32) -> (&mut Tracking, &mut Node) {
        let (replica, tracking) = self.nodes.get_mut(&node).unwrap();
        (tracking, replica)
    }

    fn wanted(&mut self, node: u32) -> Vec<SyncWanted> {
        let now = self.now;
        let (tracking, replica) = self.tracking(node);
        tracking.sync_wanted(now, replica, &|_| true)
    }
}

#[test]
fn what_everybody_has_may_be_purged_and_nothing_else() {
    let mut net = Net::new(3, 3);
    for node in 1..=3 {
        net.see(node, 1, 1);
    }
    net.settle(12);
    assert!(net.tracking(2).0.purge_floor(P) >= Timestamp(1010));
    net.see(1, 1, 2);
    net.see(2, 1, 2);
    net.settle(12);
    let floor = net.tracking(2).0.purge_floor(P);
    assert!((Timestamp(1010)..Timestamp(1020)).contains(&floor), "node 3 lacks it: {floor:?}");
    assert_eq!(net.tracking(1).0.stable(P).get(OriginId(1)), 1);
    net.see(3, 1, 2);
    net.settle(12);
    assert!(net.tracking(2).0.purge_floor(P) >= Timestamp(1020));
    assert_eq!(net.tracking(1).0.stable(P).get(OriginId(1)), 2);
}

#[test]
fn a_silent_member_holds_back_the_purge_and_is_named() {
    let mut net = Net::new(4, 3);
    for node in 1..=3 {
        net.see(node, 1, 1);
    }
    let silent = net.nodes.remove(&4).unwrap();
    for _ in 0..12 {
        net.now = net.now.after_nanos(200 * MS);
        net.poll();
        while let Some(sent) = net.wire.pop() {
            if sent.to != 4 {
                net.deliver(&sent);
            }
        }
    }
    let (tracking, replica) = net.tracking(1);
    assert_eq!(tracking.purge_floor(P), Timestamp(1010).min(tracking.purge_floor(P)));
    assert_eq!(tracking.tombstones_waiting_for(replica), BTreeMap::from([(NodeId(4), 1)]));
    // For reads it does not matter: it is no holder.
    assert!(tracking.as_of(P, replica) >= Timestamp(1010));
    net.nodes.insert(4, silent);
    net.settle(12);
    let (tracking, replica) = net.tracking(1);
    assert!(tracking.purge_floor(P) >= Timestamp(1010));
    assert!(tracking.tombstones_waiting_for(replica).is_empty());
}

#[test]
fn a_write_missed_for_longer_than_the_grace_is_synced_from_its_origin() {
    let mut net = Net::new(3, 3);
    net.see(1, 1, 1);
    net.see(2, 1, 1);
    net.settle(2);
    assert!(net.wanted(3).is_empty(), "it may be under way");
    net.settle(2);
    let helper = PeerShard { node: NodeId(1), shard: 0 };
    assert_eq!(net.wanted(3), [SyncWanted { partition: P, helper }]);
    net.now = net.now.after_nanos(60 * MS);
    assert!(net.wanted(3).is_empty(), "one at a time");
    // The origin fails, so the other one is asked.
    let now = net.now;
    net.tracking(3).0.sync_ended(now, P, false);
    assert!(net.wanted(3).is_empty(), "its pace is kept");
    net.now = net.now.after_nanos(20 * MS);
    assert_eq!(net.wanted(3)[0].helper.node, NodeId(2));
    net.see(3, 1, 1);
    net.tracking(3).0.sync_ended(now, P, true);
    net.settle(5);
    assert!(net.wanted(3).is_empty());
    let (tracking, replica) = net.tracking(3);
    let figures = tracking.convergence(replica);
    assert_eq!((figures.held, figures.in_sync), (1, 1));
}

#[test]
fn the_more_a_round_has_to_say_the_longer_the_next_one_waits() {
    let mut replica = Many::new(Vec::new());
    replica.changed = (0..4096).map(PartitionId).collect();
    let holders = vec![vec![NodeId(1), NodeId(2)]; 4096];
    let shared = Shared { partition_bits: 12, holders, ..shared(2, 2) };
    let mut tracking = Tracking::new(NodeId(1), 1, Options::default(), shared);
    // A write to every partition between any two polls.
    let (mut lines, mut sequence) = (0, 0);
    for millis in 0..10_000 {
        sequence += 1;
        replica.node.see(1, sequence);
        tracking.poll(Instant(millis * MS), &mut replica, &mut |_, message| {
            if let PeerMessage::Track { entries, .. } = message {
                lines += entries.len();
            }
            true
        });
    }
    let rounds = lines as f64 / 4096.0;
    assert!((8.0..12.0).contains(&rounds), "about one in 1,024 ms: {rounds}");
}

#[test]
fn writes_always_under_way_are_not_missed() {
    let mut net = Net::new(2, 2);
    for sequence in 1..50 {
        net.see(1, 1, sequence);
        net.settle(1);
        assert!(net.wanted(2).is_empty());
        net.see(2, 1, sequence);
    }
}

#[test]
fn a_guest_is_done_when_every_holder_has_on_disk_what_it_has() {
    let mut net = Net::new(4, 3);
    net.see(4, 4, 1);
    net.settle(4);
    assert_eq!(net.tracking(1).0.guests(P).collect::<Vec<_>>(), [NodeId(4)]);
    let floor = net.tracking(1).0.purge_floor(P);
    assert!(floor < Timestamp(1010), "the guest's write holds back the purge: {floor:?}");
    for node in 1..=3 {
        assert_eq!(net.wanted(node).len(), 1);
        let (tracking, replica) = net.tracking(4);
        assert!(tracking.guests_done(replica).is_empty());
        net.see(node, 4, 1);
        net.nodes.get_mut(&node).unwrap().0.durable = 0;
    }
    net.settle(4);
    let (tracking, replica) = net.tracking(4);
    assert!(tracking.guests_done(replica).is_empty(), "a crash could take it from them");
    for node in 1..=3 {
        net.nodes.get_mut(&node).unwrap().0.durable = 1;
    }
    net.settle(4);
    let (tracking, replica) = net.tracking(4);
    assert_eq!(tracking.guests_done(replica), [P]);
    assert!(tracking.may_write_siblings(P, replica));
    replica.seen = Rc::default();
    net.settle(12);
    let (tracking, replica) = net.tracking(4);
    assert!(!tracking.may_write_siblings(P, replica), "holders have writes of it that it has not");
    assert_eq!(net.tracking(1).0.guests(P).count(), 0);
    assert!(net.tracking(1).0.purge_floor(P) >= Timestamp(1010));
}

#[test]
fn a_restarted_node_learns_everything_again_and_says_it_again() {
    let mut net = Net::new(3, 3);
    for node in 1..=3 {
        net.see(node, 1, 1);
        net.see(node, 2, 1);
    }
    net.settle(12);
    let old: Vec<Sent> = {
        net.see(2, 2, 2);
        net.now = net.now.after_nanos(200 * MS);
        net.poll();
        std::mem::take(&mut net.wire)
    };
    net.restart(2, 2);
    assert_eq!(net.tracking(2).0.purge_floor(P), Timestamp::ZERO);
    net.settle(12);
    assert!(net.tracking(2).0.purge_floor(P) >= Timestamp(1010));
    assert_eq!(net.tracking(1).0.stable(P).get(OriginId(1)), 1);
    // What its earlier life said arrives now, and is not believed.
    let before = net.tracking(1).0.purge_floor(P);
    old.iter().for_each(|sent| net.deliver(sent));
    assert_eq!(net.tracking(1).0.purge_floor(P), before);
    net.settle(12);
    let (tracking, replica) = net.tracking(3);
    let figures = tracking.convergence(replica);
    assert_eq!((figures.behind, figures.writes_lacked), (1, 1));
}

#[test]
fn a_gap_is_closed_when_everybody_who_knows_of_this_life_has_nothing_of_it() {
    let mut net = Net::new(4, 3);
    for node in 1..=3 {
        net.see(node, 1, 1);
    }
    // Two other nodes have what the first has lost, one of them as a guest.
    net.see(2, 1, 2);
    net.see(4, 1, 3);
    net.settle(12);
    net.restart(1, 2);
    net.nodes.get_mut(&1).unwrap().0.gap = true;
    net.settle(12);
    let (tracking, replica) = net.tracking(1);
    assert!(tracking.gaps_closed(replica).is_empty());
    net.see(1, 1, 2);
    let (tracking, replica) = net.tracking(1);
    assert!(tracking.gaps_closed(replica).is_empty());
    net.see(1, 1, 3);
    let (tracking, replica) = net.tracking(1);
    assert_eq!(tracking.gaps_closed(replica), [GapClosed { partition: P, is_void: true }]);
    net.restart(1, 3);
    let (tracking, replica) = net.tracking(1);
    assert!(tracking.gaps_closed(replica).is_empty(), "nobody knows of this life yet");
}

#[test]
fn a_large_state_travels_in_messages_of_bounded_size() {
    let count = 600;
    let shared = |own: u32| {
        let shared = Shared {
            partition_bits: 10,
            members: (1..=2).map(|node| (NodeId(node), 1)).collect(),
            first: P,
            holders: vec![vec![NodeId(1), NodeId(2)]; count],
            moves: Moves::default(),
        };
        Tracking::new(NodeId(own), 1, Options::default(), shared)
    };
    let mut sets: Vec<Rc<SeenSet>> = (0..count).map(|_| Rc::default()).collect();
    for (at, set) in sets.iter_mut().enumerate() {
        // Holes, so that a set is some hundred bytes; the first has far too many.
        for run in 0..if at == 0 { 20_000 } else { 20 } {
            let dot = Dot { origin: OriginId(1), sequence: 2 + run * 2 };
            Rc::make_mut(set).see(dot, Timestamp(run));
        }
    }
    let mut sender = (Many::new(sets.clone()), shared(1));
    let empty = (0..count).map(|_| Rc::default()).collect();
    let mut receiver = (Many::new(empty), shared(2));
    let now = Instant(0);
    let mut wire = Vec::new();
    for _ in 0..100 {
        let before = wire.len();
        sender.1.poll(now, &mut sender.0, &mut |_, message| {
            let PeerMessage::Track { entries, .. } = message else { panic!("{message:?}") };
            assert!(entries.len() <= 64, "or it takes the receiver long");
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            wire.push(bytes);
            true
        });
        assert!(wire.len() <= before + 1, "or it takes the sender long");
        if !wire.is_empty() && wire.len() == before {
            break;
        }
    }
    assert!(wire.len() >= 10 && wire.iter().all(|bytes| bytes.len() <= 66 << 10));
    let from = PeerShard { node: NodeId(1), shard: 0 };
    for (at, bytes) in wire.iter().enumerate() {
        let message = PeerMessage::decode(bytes).unwrap();
        receiver.1.handle(now, from, &message, &receiver.0, &mut |_, _| true).unwrap();
        let promise = receiver.1.promises().next().unwrap().1;
        assert_eq!(promise > Timestamp::ZERO, at + 1 == wire.len(), "only with the last one");
    }
    let partitions = (0..600).map(PartitionId);
    for partition in partitions {
        let known = &receiver.1.entry(NodeId(1), partition).unwrap().seen;
        let set = &sets[partition.0 as usize];
        assert!(set.covers(known) && (partition == P || known.covers(set)));
        assert_eq!(known.last(OriginId(1)), set.last(OriginId(1)));
    }
}

#[test]
fn bad_announcements_are_refused_whole() {
    let mut net = Net::new(2, 2);
    let (tracking, replica) = net.tracking(1);
    let from = PeerShard { node: NodeId(2), shard: 0 };
    let mut good = Vec::new();
    SeenSet::new().encode(&mut good);
    let entry = |partition, seen| TrackEntry { partition, as_of: Timestamp(1), seen };
    let message = |entries| PeerMessage::Track {
        base_version: 0,
        version: 1 << 40,
        hlc: Timestamp(9),
        hint_floor: Timestamp(9),
        epoch: 0,
        entries,
        full: true,
    };
    let mut none = |_: PeerShard, _: &PeerMessage<'_>| -> bool { panic!("it is not answered") };
    let mut handle = |from, message: PeerMessage<'_>| {
        tracking.handle(Instant(0), from, &message, replica, &mut none).unwrap_err()
    };
    let error = handle(from, message(vec![entry(P, &good), entry(P, b"bad")]));
    assert!(matches!(error, BadTrack::Seen(_)));
    let error = handle(from, message(vec![entry(PartitionId(1), &good)]));
    assert_eq!(error, BadTrack::Partition(PartitionId(1)));
    let stranger = PeerShard { node: NodeId(7), shard: 0 };
    assert_eq!(handle(stranger, message(vec![])), BadTrack::Stranger(stranger));
    assert!(tracking.promises().all(|(_, promise)| promise == Timestamp::ZERO));
}
