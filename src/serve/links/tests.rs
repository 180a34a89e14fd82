//! Links over real sockets on loopback: order, loss of a side, another shard, strangers.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use annulus_engine::driver::{HostOptions, RingWaker, Turn, host, start_shard};
use annulus_net::driver::{Detached, Limits, Mesh, MeshPort, Sockets, listen_for_peers};
use annulus_net::peer_connection::{PeerMember, PeerOptions};
use annulus_net::wire::frame::{FrameHeader, HEADER_SIZE};
use annulus_net::wire::peer::{PEER_CLOSE, PEER_HELLO, PeerHello};
use annulus_net::wire::slices::{FrameWriter, Head};

use annulus_cluster::message::PeerMessage;

use super::*;

const WAIT: Duration = Duration::from_secs(60);
const DIGEST: u64 = 42;

/// What a side tells the test.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Change(LinkChange),
    Message { from: NodeId, shard: u32, lane: u64, id: u64, size: usize },
    Stats(Box<(LinkStats, IncomingStats)>),
}

/// What a test tells a side.
enum Order {
    /// Messages with these ids, as fast as the links take them.
    Send {
        to: NodeId,
        shard: u32,
        lane: Lane,
        ids: std::ops::Range<u64>,
        size: usize,
    },
    /// One message, taken or not.
    Try {
        to: NodeId,
        size: usize,
    },
    Stats,
    /// Ends at once, without a word to anybody.
    Die,
}

/// A shard of a node, with links and nothing else.
struct Side {
    orders: Sender<Order>,
    told: Receiver<Told>,
    waker: RingWaker,
    thread: JoinHandle<Result<(), String>>,
}

fn facts(node: u32, shard: u32, shard_count: u32, life: u64) -> PeerFacts {
    let member = |node| PeerMember { node: OriginId(node), life: 0 };
    PeerFacts {
        cluster: 1,
        hash_seed: 2,
        partition_bits: 4,
        members_digest: DIGEST,
        members: (1..=2).filter(|other| *other != node).map(member).collect(),
        node: OriginId(node),
        shard,
        shard_count,
        life,
        options: PeerOptions::default(),
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = listen_for_peers("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn address_of(node: u32, address: SocketAddr) -> PeerAddress {
    PeerAddress { node: NodeId(node), address }
}

impl Side {
    fn start(facts: PeerFacts, listener: Option<TcpListener>, peers: Vec<PeerAddress>) -> Side {
        Side::start_in(facts, listener, peers, Mesh::new(4, 16))
    }

    fn start_in(
        facts: PeerFacts,
        listener: Option<TcpListener>,
        peers: Vec<PeerAddress>,
        mesh: Arc<Mesh<Detached>>,
    ) -> Side {
        let options = LinkOptions { back_off_ms_max: 100, ..LinkOptions::default() };
        Side::start_with(facts, listener, peers, mesh, options)
    }

    fn start_with(
        facts: PeerFacts,
        listener: Option<TcpListener>,
        peers: Vec<PeerAddress>,
        mesh: Arc<Mesh<Detached>>,
        options: LinkOptions,
    ) -> Side {
        let (orders, inbox) = channel();
        let (tell, told) = channel();
        let (tell_waker, waker) = channel();
        let thread = start_shard(Default::default(), move |ring, runtime| async move {
            let mut sockets = Sockets::new(&ring, None, Limits::default()).unwrap();
            if let Some(listener) = listener {
                sockets.accept_from(listener, annulus_net::driver::Door::Peers);
            }
            let seed = facts.life << 8 | u64::from(facts.node.0);
            let links = LinkSet::new(facts.clone(), &peers, options, seed);
            let incoming = IncomingSet::new(facts.clone(), !seed);
            let mut turning = Turning {
                peers: PeerSockets { links, incoming },
                port: mesh.join(facts.shard as usize, ring.waker()),
                tell,
                inbox,
                jobs: Vec::new(),
            };
            tell_waker.send(ring.waker()).unwrap();
            host(&ring, &runtime, HostOptions::default(), |now, completions| {
                turning.turn(now, &mut sockets, completions)
            })
            .await
            .unwrap();
        });
        let waker = waker.recv_timeout(WAIT).unwrap();
        Side { orders, told, waker, thread: thread.unwrap() }
    }

    fn order(&self, order: Order) {
        self.orders.send(order).unwrap();
        self.waker.wake();
    }

    fn next(&self) -> Told {
        self.told.recv_timeout(WAIT).expect("the other side says something")
    }

    fn expect_change(&self, change: LinkChange) {
        loop {
            match self.next() {
                Told::Change(told) => return assert_eq!(told, change),
                Told::Message { .. } | Told::Stats(_) => {}
            }
        }
    }

    /// The next message, whatever happens before.
    fn next_message(&self) -> (NodeId, u32, u64, u64, usize) {
        loop {
            if let Told::Message { from, shard, lane, id, size } = self.next() {
                return (from, shard, lane, id, size);
            }
        }
    }

    fn stats(&self) -> (LinkStats, IncomingStats) {
        self.order(Order::Stats);
        loop {
            if let Told::Stats(stats) = self.next() {
                return *stats;
            }
        }
    }

    /// Waits until the numbers are so.
    fn wait_for(&self, is_so: impl Fn(&LinkStats, &IncomingStats) -> bool) {
        for _ in 0..500_000 {
            let (links, incoming) = self.stats();
            if is_so(&links, &incoming) {
                return;
            }
            std::thread::yield_now();
        }
        panic!("never: {:?}", self.stats());
    }

    fn die(self) {
        self.order(Order::Die);
        self.thread.join().unwrap().unwrap();
    }
}

/// The loop of a side's thread.
struct Turning {
    peers: PeerSockets,
    port: MeshPort<Detached>,
    tell: Sender<Told>,
    inbox: Receiver<Order>,
    jobs: Vec<(NodeId, u32, Lane, std::ops::Range<u64>, usize)>,
}

impl Turning {
    fn turn(
        &mut self,
        now: Instant,
        sockets: &mut Sockets,
        completions: &[annulus_engine::driver::Completion],
    ) -> Turn {
        let (peers, port, tell) = (&mut self.peers, &self.port, &self.tell);
        let mut worked = sockets.turn(now, completions, |connections, event| {
            let mut receive = |_: &mut LinkSet, from, shard, message: &[u8]| {
                let told = match PeerMessage::decode(message).unwrap() {
                    PeerMessage::Forward { id, opcode, body, .. } => {
                        Told::Message { from, shard, lane: opcode.into(), id, size: body.len() }
                    }
                    other => panic!("{other:?}"),
                };
                // The test may be over.
                let _ = tell.send(told);
            };
            let mut hand_over = |shard: u32, detached| {
                port.send(shard as usize, detached).map_err(drop).unwrap();
            };
            let left = peers.event(now, connections, event, &mut receive, &mut hand_over);
            assert!(left.is_none(), "there are no clients here");
        });
        let connections = sockets.connections();
        worked |= port.drain(|_, detached| {
            let id = connections.adopt(detached).unwrap();
            peers.adopted(now, id, connections);
        }) > 0;
        while let Ok(order) = self.inbox.try_recv() {
            worked = true;
            match order {
                Order::Send { to, shard, lane, ids, size } => {
                    self.jobs.push((to, shard, lane, ids, size));
                }
                Order::Try { to, size } => {
                    let _ = send(&mut peers.links, to, 0, Lane::Foreground, 0, size);
                }
                Order::Stats => {
                    let stats = (peers.links.stats(), peers.incoming.stats());
                    let _ = tell.send(Told::Stats(Box::new(stats)));
                }
                Order::Die => return Turn::Stop,
            }
        }
        for (to, shard, lane, ids, size) in &mut self.jobs {
            for _ in 0..500 {
                let Some(id) = ids.clone().next() else { break };
                if send(&mut peers.links, *to, *shard, *lane, id, *size).is_err() {
                    break;
                }
                ids.next();
            }
        }
        self.jobs.retain(|job| !job.3.is_empty());
        worked |= peers.turn(now, connections);
        for change in peers.links.take_changes() {
            let _ = tell.send(Told::Change(change));
        }
        connections.flush();
        let soon = (!self.jobs.is_empty()).then(|| now.after_nanos(1_000_000));
        let timeouts = [peers.next_timeout(), soon];
        match worked {
            true => Turn::Busy,
            false => timeouts.into_iter().flatten().min().map_or(Turn::Idle, Turn::IdleUntil),
        }
    }
}

fn send(
    links: &mut LinkSet,
    to: NodeId,
    shard: u32,
    lane: Lane,
    id: u64,
    size: usize,
) -> Result<(), LinkDown> {
    let body = vec![7; size];
    let (deadline_us, opcode, hops) = (0, lane.as_u8(), 1);
    let mut message = Vec::new();
    PeerMessage::Forward { id, deadline_us, opcode, hops, body: &body }.encode(&mut message);
    links.send(PeerShard { node: to, shard }, lane, &message)
}

/// Two nodes of one shard each that are linked to each other.
fn pair() -> (Side, Side, SocketAddr) {
    pair_with(facts(1, 0, 1, 1))
}

/// The same, and what the first one is told of itself.
fn pair_with(facts_of_one: PeerFacts) -> (Side, Side, SocketAddr) {
    let (one_listener, one_address) = listener();
    let (two_listener, two_address) = listener();
    let one = Side::start(facts_of_one, Some(one_listener), vec![address_of(2, two_address)]);
    let two = Side::start(facts(2, 0, 1, 1), Some(two_listener), vec![address_of(1, one_address)]);
    one.expect_change(LinkChange::Up(NodeId(2), 1));
    two.expect_change(LinkChange::Up(NodeId(1), 1));
    (one, two, one_address)
}

/// Takes `count` messages of each lane and checks that each lane's are in order, from 0.
fn expect_in_order(side: &Side, from: NodeId, count: u64) {
    let mut next = [0; 2];
    while next != [count; 2] {
        let (node, shard, lane, id, _) = side.next_message();
        let lane = usize::try_from(lane).unwrap();
        assert_eq!((node, shard, id), (from, 0, next[lane]), "lane {lane}");
        next[lane] += 1;
    }
}

#[test]
fn a_hundred_thousand_messages_arrive_in_order_both_ways_in_both_lanes() {
    const COUNT: u64 = 50_000;
    let (one, two, _) = pair();
    for (side, to) in [(&one, NodeId(2)), (&two, NodeId(1))] {
        for lane in Lane::ALL {
            side.order(Order::Send { to, shard: 0, lane, ids: 0..COUNT, size: 20 });
        }
    }
    expect_in_order(&one, NodeId(2), COUNT);
    expect_in_order(&two, NodeId(1), COUNT);
    let (links, incoming) = two.stats();
    assert_eq!((links.up, incoming.open, incoming.half_open), (2, 2, 0));
    assert_eq!((incoming.received, incoming.refusals.iter().sum::<u64>()), (2 * COUNT, 0));
    one.die();
    two.die();
}

#[test]
fn messages_longer_than_frames_and_socket_buffers_arrive_whole() {
    let (one, two, _) = pair();
    let (to, shard) = (NodeId(2), 0);
    for lane in Lane::ALL {
        one.order(Order::Send { to, shard, lane, ids: 0..20, size: 3 << 20 });
    }
    let mut next = [0; 2];
    while next != [20; 2] {
        let (_, _, lane, id, size) = two.next_message();
        let lane = usize::try_from(lane).unwrap();
        assert_eq!((id, size), (next[lane], 3 << 20));
        next[lane] += 1;
    }
    // Longer than the other side takes: not sent at all, and the link stands.
    one.order(Order::Try { to, size: 5 << 20 });
    let (links, _) = one.stats();
    assert_eq!(links.broken, 0);
    one.die();
    two.die();
}

#[test]
fn a_side_that_was_killed_and_started_again_is_linked_again() {
    let (one_listener, one_address) = listener();
    let (two_listener, two_address) = listener();
    let to_two = vec![address_of(2, two_address)];
    let to_one = vec![address_of(1, one_address)];
    let one = Side::start(facts(1, 0, 1, 1), Some(one_listener), to_two);
    let mut two = Side::start(facts(2, 0, 1, 1), Some(two_listener), to_one.clone());
    for life in 2..6 {
        one.expect_change(LinkChange::Up(NodeId(2), 1));
        two.expect_change(LinkChange::Up(NodeId(1), 1));
        for (side, to) in [(&one, NodeId(2)), (&two, NodeId(1))] {
            for lane in Lane::ALL {
                side.order(Order::Send { to, shard: 0, lane, ids: 0..1000, size: 100 });
            }
        }
        expect_in_order(&one, NodeId(2), 1000);
        expect_in_order(&two, NodeId(1), 1000);
        two.die();
        one.expect_change(LinkChange::Down(NodeId(2)));
        // Nothing is taken while the node is away, and nothing piles up.
        one.order(Order::Try { to: NodeId(2), size: 10 });
        let listener = listen_for_peers(two_address).unwrap();
        two = Side::start(facts(2, 0, 1, life), Some(listener), to_one.clone());
    }
    one.expect_change(LinkChange::Up(NodeId(2), 1));
    let (links, _) = one.stats();
    assert!(links.broken >= 8 && links.opened >= 8, "{links:?}");
    one.die();
    two.die();
}

/// What a node that has just come back asks for is answered by links to it: one that slept on
/// while the other direction stood would lose every answer.
#[test]
fn a_node_that_dials_is_dialled_at_once_however_long_its_links_were_to_sleep() {
    let (one_listener, one_address) = listener();
    let (two_listener, two_address) = listener();
    drop(two_listener);
    let an_hour = 3_600_000;
    let options =
        LinkOptions { back_off_ms_min: an_hour, back_off_ms_max: an_hour, ..Default::default() };
    let to_two = vec![address_of(2, two_address)];
    let mesh = Mesh::new(4, 16);
    let one = Side::start_with(facts(1, 0, 1, 1), Some(one_listener), to_two, mesh, options);
    one.wait_for(|links, _| links.broken >= 1);
    for life in 1..4 {
        let listener = listen_for_peers(two_address).unwrap();
        let to_one = vec![address_of(1, one_address)];
        let two = Side::start(facts(2, 0, 1, life), Some(listener), to_one);
        one.expect_change(LinkChange::Up(NodeId(2), 1));
        two.die();
        one.expect_change(LinkChange::Down(NodeId(2)));
    }
    one.die();
}

#[test]
fn a_connection_for_another_shard_gets_there_and_a_shard_that_is_not_there_is_left_alone() {
    let (listener, address) = listener();
    let mesh = Mesh::new(2, 16);
    // Only shard 0 listens, so what is for shard 1 has to be handed over.
    let zero = Side::start_in(facts(2, 0, 2, 1), Some(listener), Vec::new(), Arc::clone(&mesh));
    let first = Side::start_in(facts(2, 1, 2, 1), None, Vec::new(), mesh);
    // The third shard of a node with more shards than the other one.
    let one = Side::start(facts(1, 3, 4, 1), None, vec![address_of(2, address)]);
    one.expect_change(LinkChange::Up(NodeId(2), 2));
    let (to, ids) = (NodeId(2), 0..100);
    for shard in 0..2 {
        for lane in Lane::ALL {
            one.order(Order::Send { to, shard, lane, ids: ids.clone(), size: 1 });
        }
    }
    for side in [&zero, &first] {
        let mut next = [0; 2];
        while next != [100; 2] {
            let (from, shard, lane, id, _) = side.next_message();
            let lane = usize::try_from(lane).unwrap();
            assert_eq!((from, shard, id), (NodeId(1), 3, next[lane]));
            next[lane] += 1;
        }
    }
    let ((links, _), (_, incoming)) = (one.stats(), zero.stats());
    assert_eq!(links.up, 4);
    assert_eq!(links.refusals[usize::from(PeerRefusal::Shard.number())], 1);
    assert_eq!((incoming.handed_over, incoming.open), (2, 2));
    for side in [zero, first, one] {
        side.die();
    }
}

/// The reason in the last frame before the other side hangs up.
fn goodbye(stream: &mut TcpStream) -> PeerRefusal {
    stream.set_read_timeout(Some(WAIT)).unwrap();
    let mut answer = Vec::new();
    // A reset after the goodbye is an end as well.
    let _ = stream.read_to_end(&mut answer);
    let header = answer.first_chunk::<HEADER_SIZE>().expect("a goodbye");
    let header = FrameHeader::decode(header, 0).unwrap();
    assert_eq!(header.opcode, PEER_CLOSE);
    PeerRefusal::from_number(header.code).unwrap()
}

#[test]
fn strangers_are_refused_and_told_why() {
    let options = PeerOptions { handshake_timeout_ms: 1_000, ..PeerOptions::default() };
    let (one, two, address) = pair_with(PeerFacts { options, ..facts(1, 0, 1, 1) });
    let hello = |change: fn(&mut PeerHello)| {
        let mut hello = PeerHello {
            lane: 0,
            partition_bits: 4,
            node: OriginId(2),
            cluster: 1,
            hash_seed: 2,
            members_digest: DIGEST,
            life: 1,
            shard: 0,
            shard_count: 1,
            wanted_node: OriginId(1),
            wanted_shard: 0,
        };
        change(&mut hello);
        let mut body = Vec::new();
        hello.encode(&mut body);
        let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
        writer.owned_message(&mut out, Head { opcode: PEER_HELLO, ..Head::default() }, body);
        out
    };
    let cases = [
        (PeerRefusal::Checksum, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        (PeerRefusal::Cluster, hello(|hello| hello.cluster = 9)),
        (PeerRefusal::Digest, hello(|hello| hello.members_digest = 9)),
        (PeerRefusal::Node, hello(|hello| hello.node = OriginId(9))),
        (PeerRefusal::Life, hello(|hello| hello.life = 0)),
        // Half a hello, and then nothing.
        (PeerRefusal::HandshakeTimeout, hello(|_| {})[..50].to_vec()),
    ];
    for (refusal, bytes) in &cases {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(bytes).unwrap();
        assert_eq!(goodbye(&mut stream), *refusal);
    }
    let (_, incoming) = one.stats();
    for (refusal, _) in &cases {
        assert_eq!(incoming.refusals[usize::from(refusal.number())], 1, "{refusal:?}");
    }
    assert_eq!((incoming.open, incoming.received), (1, 0));
    // The links of those who belong here stand.
    one.order(Order::Send { to: NodeId(2), shard: 0, lane: Lane::Foreground, ids: 0..1, size: 1 });
    assert_eq!(two.next_message().0, NodeId(1));
    assert_eq!(two.stats().0.broken, 0);
    one.die();
    two.die();
}

#[test]
fn a_newer_connection_of_the_same_shard_takes_the_place_of_the_older() {
    let (one, two, address) = pair();
    one.wait_for(|_, incoming| incoming.open == 1);
    // A second process with the same id and a later life: the first is told, and comes back.
    let other = Side::start(facts(2, 0, 1, 5), None, vec![address_of(1, address)]);
    other.expect_change(LinkChange::Up(NodeId(1), 1));
    two.expect_change(LinkChange::Down(NodeId(1)));
    let life = usize::from(PeerRefusal::Life.number());
    let replaced = usize::from(PeerRefusal::Replaced.number());
    two.wait_for(|links, _| links.refusals[replaced] == 1 && links.refusals[life] > 0);
    one.wait_for(|_, incoming| incoming.open == 1 && incoming.refusals[replaced] == 1);
    for side in [one, two, other] {
        side.die();
    }
}

#[test]
fn a_node_that_is_not_there_costs_nothing_but_a_dial_now_and_then() {
    let (taken, address) = listener();
    drop(taken);
    let one = Side::start(facts(1, 0, 1, 1), None, vec![address_of(2, address)]);
    one.wait_for(|links, _| links.broken > 3);
    for _ in 0..100 {
        one.order(Order::Try { to: NodeId(2), size: 1000 });
        one.order(Order::Try { to: NodeId(3), size: 1000 });
    }
    one.wait_for(|links, _| links.broken > 6);
    let (links, _) = one.stats();
    assert!(links.refused >= 100, "the unknown node's at least: {links:?}");
    assert_eq!((links.up, links.opened), (0, 0));
    one.die();
}
