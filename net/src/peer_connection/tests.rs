//! Two ends and a wire that cuts, changes, repeats and forges.

use proptest::prelude::*;

use super::*;
use crate::wire::frame::{Opcode, REPLY};
use crate::wire::peer::{PEER_HELLO, PEER_HELLO_SIZE, PEER_MESSAGE, PEER_WELCOME, PeerWelcome};
use annulus_engine::model::Instant;

const SESSION: u64 = 0xfeed_0000_1234_5678;
const SECOND: u64 = 1_000_000_000;

fn facts(node: u32) -> PeerFacts {
    let member = |node| PeerMember { node: OriginId(node), life: 0 };
    PeerFacts {
        cluster: 77,
        hash_seed: 5,
        partition_bits: 4,
        members_digest: 99,
        members: (1..=3).filter(|other| *other != node).map(member).collect(),
        node: OriginId(node),
        shard: 0,
        shard_count: 2,
        life: 10,
        options: PeerOptions { message_size_max: 300_000, ..PeerOptions::default() },
    }
}

fn target(shard: u32) -> PeerTarget {
    PeerTarget { node: OriginId(2), shard, lane: 1 }
}

/// Node 1 dials node 2.
struct Pair {
    dialer: PeerDialer,
    listener: PeerListener,
    facts: [PeerFacts; 2],
    /// On their way, from the dialer and from the listener.
    there: Vec<u8>,
    back: Vec<u8>,
    received: Vec<Vec<u8>>,
}

impl Pair {
    fn new() -> Pair {
        Pair::with(facts(1), facts(2), target(0))
    }

    fn with(one: PeerFacts, other: PeerFacts, target: PeerTarget) -> Pair {
        let mut there = Vec::new();
        let dialer = PeerDialer::new(Instant(0), &one, target, &mut there);
        let listener = PeerListener::new(Instant(0), &other, SESSION);
        let (back, received) = (Vec::new(), Vec::new());
        Pair { dialer, listener, facts: [one, other], there, back, received }
    }

    fn greeted() -> Pair {
        let mut pair = Pair::new();
        assert_eq!(pair.deliver(), Ok(PeerReceived::Continue));
        assert_eq!(pair.answer(), Ok(true));
        pair
    }

    fn send(&mut self, message: &[u8]) {
        self.dialer.message(&mut message.to_vec(), &mut self.there);
    }

    fn send_all(&mut self) {
        self.dialer.fill_output(&mut self.there, usize::MAX);
    }

    fn deliver(&mut self) -> Result<PeerReceived, PeerRefusal> {
        let bytes = std::mem::take(&mut self.there);
        self.deliver_bytes(&bytes)
    }

    fn deliver_bytes(&mut self, bytes: &[u8]) -> Result<PeerReceived, PeerRefusal> {
        let received = &mut self.received;
        self.listener.receive(Instant(0), bytes, &self.facts[1], &mut self.back, &mut |_, body| {
            received.push(body.to_vec());
        })
    }

    fn answer(&mut self) -> Result<bool, PeerRefusal> {
        let bytes = std::mem::take(&mut self.back);
        self.dialer.receive(&bytes, &self.facts[0], &mut self.there)
    }

    /// The listener refuses for this reason, and tells the dialer.
    fn expect_refusal(&mut self, refusal: PeerRefusal) {
        assert_eq!(self.deliver(), Err(refusal));
        assert_eq!(self.answer(), Err(refusal), "told to the other end");
        assert!(self.received.is_empty());
        self.back.clear();
        assert_eq!(self.deliver_bytes(b"whatever follows"), Ok(PeerReceived::Continue));
        assert!(self.back.is_empty());
    }
}

/// A frame of the dialling end at a position of its stream.
fn frame(position: u64, head: Head, body: &[u8]) -> Vec<u8> {
    let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
    writer.set_position(position);
    writer.message(&mut out, head, body.len(), |out| out.extend_from_slice(body));
    out
}

fn head(opcode: u8) -> Head {
    Head { opcode, ..Head::default() }
}

/// A hello frame, changed.
fn hello(change: impl FnOnce(&mut PeerHello)) -> Vec<u8> {
    let mut hello = facts(1).hello(target(0));
    change(&mut hello);
    let mut body = Vec::new();
    hello.encode(&mut body);
    frame(0, head(PEER_HELLO), &body)
}

#[test]
fn messages_flow_once_both_know_each_other() {
    let mut pair = Pair::new();
    pair.send(b"early");
    assert_eq!(pair.there.len(), HEADER_SIZE + PEER_HELLO_SIZE, "nothing but the hello goes out");
    pair.deliver().unwrap();
    assert_eq!(pair.listener.peer().map(|peer| (peer.node, peer.lane)), Some((OriginId(1), 1)));
    assert_eq!(pair.answer(), Ok(true));
    let welcome = *pair.dialer.welcome().unwrap();
    assert_eq!((welcome.shard_count, welcome.life), (2, 10));
    pair.send(b"late");
    pair.deliver().unwrap();
    assert_eq!(pair.received, [b"early".to_vec(), b"late".to_vec()]);
}

#[test]
fn a_connection_for_another_shard_is_handed_over_with_its_bytes() {
    let mut pair = Pair::with(facts(1), facts(2), target(1));
    let sent = [&pair.there[..], b"more"].concat();
    let received = pair.deliver_bytes(&sent);
    assert_eq!(received, Ok(PeerReceived::HandOver { shard: 1, bytes: sent.clone() }));
    assert!(pair.back.is_empty());
    let other = PeerFacts { shard: 1, ..facts(2) };
    let mut listener = PeerListener::new(Instant(0), &other, SESSION);
    let hello = &sent[..sent.len() - 4];
    listener.receive(Instant(0), hello, &other, &mut pair.back, &mut |_, _| {}).unwrap();
    assert_eq!(pair.answer(), Ok(true));
}

#[test]
fn whoever_does_not_belong_here_is_refused_by_its_first_frame() {
    type Change = fn(&mut PeerHello);
    let cases: [(PeerRefusal, Change); 11] = [
        (PeerRefusal::Cluster, |hello| hello.cluster = 78),
        (PeerRefusal::Digest, |hello| hello.members_digest = 0),
        (PeerRefusal::Digest, |hello| hello.hash_seed = 0),
        (PeerRefusal::Digest, |hello| hello.partition_bits = 5),
        (PeerRefusal::Node, |hello| hello.node = OriginId(4)),
        (PeerRefusal::Node, |hello| hello.node = OriginId(2)),
        (PeerRefusal::Node, |hello| hello.wanted_node = OriginId(3)),
        (PeerRefusal::Life, |hello| hello.life = 8),
        (PeerRefusal::Shard, |hello| hello.wanted_shard = 2),
        (PeerRefusal::Shard, |hello| hello.shard = hello.shard_count),
        (PeerRefusal::Lane, |hello| hello.lane = 2),
    ];
    for (refusal, change) in cases {
        let mut pair = Pair::new();
        pair.facts[1].note_life(OriginId(1), 9);
        pair.there = hello(change);
        pair.expect_refusal(refusal);
    }
}

#[test]
fn another_version_is_refused_whatever_follows_it() {
    let mut body = Vec::new();
    facts(1).hello(target(0)).encode(&mut body);
    body[8] = 2;
    body.extend_from_slice(b"fields of a later version");
    let mut pair = Pair::new();
    pair.there = frame(0, head(PEER_HELLO), &body);
    pair.expect_refusal(PeerRefusal::Version);
}

#[test]
fn a_malformed_hello_is_refused() {
    let mut body = Vec::new();
    facts(1).hello(target(0)).encode(&mut body);
    for bytes in [&body[..79], &[&body[..], b"x"].concat(), &body[..9]] {
        let mut pair = Pair::new();
        pair.there = frame(0, head(PEER_HELLO), bytes);
        pair.expect_refusal(PeerRefusal::BadHello);
    }
}

#[test]
fn clients_and_strangers_are_refused() {
    for (opcode, body) in [
        (Opcode::Hello.request(), &b"ANNULUS\0"[..]),
        (Opcode::Get.request(), b""),
        (PEER_MESSAGE, b"no hello first"),
        (PEER_HELLO, b"no magic"),
    ] {
        let mut pair = Pair::new();
        pair.there = frame(0, head(opcode), body);
        pair.expect_refusal(PeerRefusal::NoHello);
    }
    let mut pair = Pair::new();
    pair.there = b"GET / HTTP/1.1\r\nHost: annulus\r\n\r\n".to_vec();
    pair.expect_refusal(PeerRefusal::Checksum);
}

#[test]
fn a_second_hello_is_refused() {
    let mut pair = Pair::greeted();
    let mut body = Vec::new();
    facts(1).hello(target(0)).encode(&mut body);
    pair.there = frame(SESSION, head(PEER_HELLO), &body);
    pair.expect_refusal(PeerRefusal::RepeatedHello);
}

#[test]
fn frames_recorded_on_one_connection_are_refused_on_every_other() {
    let mut recorded = Pair::new();
    let mut tape = recorded.there.clone();
    recorded.deliver().unwrap();
    recorded.answer().unwrap();
    recorded.send(b"a write");
    tape.extend_from_slice(&recorded.there);

    // The whole tape, to a listener that drew another session.
    let mut pair = Pair::new();
    pair.listener = PeerListener::new(Instant(0), &pair.facts[1], SESSION + 1);
    pair.there = tape;
    assert_eq!(pair.deliver(), Err(PeerRefusal::Checksum));
    assert!(pair.received.is_empty());

    // One frame, again on the same connection.
    let again = recorded.there.clone();
    recorded.deliver().unwrap();
    assert_eq!(recorded.deliver_bytes(&again), Err(PeerRefusal::Checksum));
    assert_eq!(recorded.received.len(), 1);
}

#[test]
fn a_frame_or_message_over_the_limit_is_refused_before_memory_is_taken() {
    // A hello that announces more than the handshake may hold.
    let mut pair = Pair::new();
    let header = FrameHeader { body_size: 2000, opcode: PEER_HELLO, ..FrameHeader::default() };
    pair.there = header.encode(0).to_vec();
    pair.expect_refusal(PeerRefusal::TooBig);
    // A message beyond the limit.
    let mut pair = Pair::greeted();
    pair.send(&vec![1; 300_001]);
    pair.send_all();
    pair.expect_refusal(PeerRefusal::TooBig);
    assert!(pair.listener.memory() < 64 << 10);
}

#[test]
fn frames_that_have_no_place_there_are_refused() {
    let strange: [Head; 5] = [
        head(Opcode::Get.request()),
        head(PEER_WELCOME),
        Head { request_id: 1, ..head(PEER_MESSAGE) },
        Head { code: 1, ..head(PEER_MESSAGE) },
        Head { flags: flag::HOT, ..head(PEER_MESSAGE) },
    ];
    for head in strange {
        let mut pair = Pair::greeted();
        pair.there = frame(SESSION, head, b"");
        pair.expect_refusal(PeerRefusal::Unexpected);
    }
}

#[test]
fn slices_that_contradict_each_other_are_refused() {
    let slice = |total: u32, offset: u32, piece: &[u8]| {
        [&total.to_le_bytes(), &offset.to_le_bytes(), piece].concat()
    };
    let cases = [
        vec![slice(10, 5, b"12345")],
        vec![slice(10, 0, b"")],
        vec![slice(10, 0, b"12"), slice(10, 0, b"12")],
        vec![slice(10, 0, b"12"), slice(11, 2, b"3")],
    ];
    for case in cases {
        let mut pair = Pair::greeted();
        let mut position = SESSION;
        for body in case {
            let bytes = frame(position, Head { flags: flag::SLICE, ..head(PEER_MESSAGE) }, &body);
            position += bytes.len() as u64;
            pair.there.extend_from_slice(&bytes);
        }
        pair.expect_refusal(PeerRefusal::BadSlice);
    }
}

#[test]
fn a_dialer_speaks_to_the_one_it_meant_only() {
    type Change = fn(&mut PeerWelcome);
    let cases: [(PeerRefusal, Change); 6] = [
        (PeerRefusal::Cluster, |welcome| welcome.cluster = 1),
        (PeerRefusal::Node, |welcome| welcome.node = OriginId(3)),
        (PeerRefusal::Shard, |welcome| welcome.shard = 1),
        (PeerRefusal::Shard, |welcome| welcome.shard_count = 0),
        (PeerRefusal::Life, |welcome| welcome.life = 3),
        (PeerRefusal::RepeatedHello, |_| {}),
    ];
    for (refusal, change) in cases {
        let mut pair = Pair::new();
        pair.facts[0].note_life(OriginId(2), 4);
        let mut welcome = PeerWelcome {
            cluster: 77,
            node: OriginId(2),
            shard: 0,
            shard_count: 2,
            life: 10,
            session: 1,
        };
        change(&mut welcome);
        let mut writer = FrameWriter::default();
        for _ in 0..2 {
            let mut body = Vec::new();
            welcome.encode(&mut body);
            writer.owned_message(&mut pair.back, head(PEER_WELCOME), body);
        }
        assert_eq!(pair.answer(), Err(refusal));
    }
    let mut pair = Pair::new();
    pair.back = frame(0, head(Opcode::Hello.request() | REPLY), b"");
    assert_eq!(pair.answer(), Err(PeerRefusal::Unexpected));
}

#[test]
fn what_is_half_said_ends_in_time() {
    let limit = Instant(5 * SECOND);
    let mut pair = Pair::new();
    assert_eq!(pair.listener.next_timeout(&pair.facts[1]), Some(limit));
    assert_eq!(pair.dialer.next_timeout(&pair.facts[0]), Some(limit));
    let early = Instant(5 * SECOND - 1);
    pair.listener.handle_timeout(early, &pair.facts[1], &mut pair.back).unwrap();
    let refusal = PeerRefusal::HandshakeTimeout;
    assert_eq!(pair.dialer.handle_timeout(limit, &pair.facts[0]), Err(refusal));
    let ended = pair.listener.handle_timeout(limit, &pair.facts[1], &mut pair.back);
    assert_eq!(ended, Err(refusal));
    assert_eq!(pair.listener.next_timeout(&pair.facts[1]), None);

    // A frame that drips.
    let mut pair = Pair::greeted();
    assert_eq!(pair.listener.next_timeout(&pair.facts[1]), None);
    pair.send(b"drip");
    let bytes = std::mem::take(&mut pair.there);
    for (second, byte) in (0u64..).zip(&bytes[..4]) {
        let now = Instant(second * SECOND);
        let (listener, facts) = (&mut pair.listener, &pair.facts[1]);
        listener.receive(now, &[*byte], facts, &mut pair.back, &mut |_, _| {}).unwrap();
    }
    assert_eq!(pair.listener.next_timeout(&pair.facts[1]), Some(limit));

    // A long message that stops between two slices.
    let mut pair = Pair::greeted();
    pair.send(&vec![1; 100_000]);
    pair.dialer.fill_output(&mut pair.there, 1);
    pair.deliver().unwrap();
    assert_eq!(pair.listener.next_timeout(&pair.facts[1]), Some(Instant(30 * SECOND)));
    pair.send_all();
    pair.deliver().unwrap();
    assert_eq!(pair.listener.next_timeout(&pair.facts[1]), None);
}

#[test]
fn an_owner_may_end_it_and_says_why() {
    let mut pair = Pair::greeted();
    pair.listener.refuse(PeerRefusal::Replaced, &mut pair.back);
    assert_eq!(pair.answer(), Err(PeerRefusal::Replaced));
}

#[test]
fn a_short_message_passes_between_the_slices_of_long_ones_that_keep_their_order() {
    let mut pair = Pair::greeted();
    pair.send(&vec![1; 150_000]);
    pair.send(&vec![2; 40_000]);
    pair.dialer.fill_output(&mut pair.there, 1);
    pair.send(b"short");
    pair.send_all();
    assert_eq!(pair.dialer.queued_bytes(), 0);
    pair.deliver().unwrap();
    let sizes: Vec<usize> = pair.received.iter().map(Vec::len).collect();
    assert_eq!(sizes, [5, 150_000, 40_000]);
    assert_eq!(pair.listener.memory(), 0);
}

fn messages() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let size = prop_oneof![8 => 0usize..200, 1 => 30_000usize..100_000];
    let message = (size, any::<u8>()).prop_map(|(size, byte)| vec![byte; size]);
    prop::collection::vec(message, 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn split_anywhere_gives_the_same_messages(
        messages in messages(),
        early in 0usize..4,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut pair = Pair::new();
        for message in messages.iter().take(early) {
            pair.send(message);
        }
        let hello = std::mem::take(&mut pair.there);
        for byte in &hello {
            pair.deliver_bytes(std::slice::from_ref(byte)).unwrap();
        }
        for byte in std::mem::take(&mut pair.back) {
            pair.dialer.receive(&[byte], &pair.facts[0], &mut pair.there).unwrap();
        }
        for message in messages.iter().skip(early) {
            pair.send(message);
        }
        pair.send_all();
        let bytes = std::mem::take(&mut pair.there);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.sort_unstable();
        let mut start = 0;
        for cut in cuts.into_iter().chain([bytes.len()]) {
            pair.deliver_bytes(&bytes[start..cut]).unwrap();
            start = cut;
        }
        // Short ones in their order, long ones in theirs.
        for is_long in [false, true] {
            let of = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                all.iter().filter(|m| (m.len() > 32 << 10) == is_long).cloned().collect()
            };
            prop_assert_eq!(of(&pair.received), of(&messages));
        }
    }

    #[test]
    fn any_changed_byte_is_found(at: prop::sample::Index, by in 1u8..) {
        let mut pair = Pair::greeted();
        pair.send(b"a message");
        let mut bytes = std::mem::take(&mut pair.there);
        let at = at.index(bytes.len());
        bytes[at] ^= by;
        prop_assert_eq!(pair.deliver_bytes(&bytes), Err(PeerRefusal::Checksum));
        prop_assert!(pair.received.is_empty());
    }

    #[test]
    fn strangers_cost_little_whatever_they_say(pieces in prop::collection::vec(
        prop::collection::vec(any::<u8>(), 0..2000), 0..8,
    )) {
        let mut pair = Pair::new();
        for piece in &pieces {
            if pair.deliver_bytes(piece).is_err() {
                break;
            }
            prop_assert!(pair.listener.memory() <= HANDSHAKE_BYTES_MAX);
        }
        prop_assert!(pair.received.is_empty());
    }
}
