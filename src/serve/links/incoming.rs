//! Connections from the shards of other nodes: checked, handed to the shard that they want, and
//! heard.
//!
//! Invariants: whoever has not passed the handshake costs at most 8 KiB and five seconds, and
//! there are at most a thousand of them; of each shard and lane of another node there is one
//! connection, the newest. On the write path at a replica: first after the sockets.

use std::collections::BTreeMap;

use annulus_cluster::NodeId;
use annulus_engine::model::{Instant, OriginId};
use annulus_net::driver::{ConnId, Connections};
use annulus_net::peer_connection::{PeerFacts, PeerListener, PeerMember, PeerReceived};
use annulus_net::wire::peer::{PeerHello, PeerRefusal};

use super::Chance;
use super::slots::Slots;

/// Most connections whose handshake is not done.
const HALF_OPEN_MAX: usize = 1000;
/// Most lines about refused connections in the log, in a second.
const LINES_MAX: u32 = 10;
const SECOND_NANOS: u64 = 1_000_000_000;

/// Counters of a shard's incoming connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct IncomingStats {
    /// Connections now.
    pub(crate) open: usize,
    /// Of these, those whose handshake is not done.
    pub(crate) half_open: usize,
    /// Handshakes that passed.
    pub(crate) welcomed: u64,
    /// Connections handed to another shard.
    pub(crate) handed_over: u64,
    /// Messages received.
    pub(crate) received: u64,
    /// Bytes received.
    pub(crate) received_bytes: u64,
    /// Connections refused or ended, by the reason's number.
    pub(crate) refusals: [u64; PeerRefusal::COUNT],
}

/// The incoming connections of one shard.
#[derive(Debug)]
pub(crate) struct IncomingSet {
    facts: PeerFacts,
    slots: Slots<PeerListener>,
    /// Who has passed: node, shard and lane.
    senders: BTreeMap<(OriginId, u32, u8), ConnId>,
    /// Connections that are leaving for another shard.
    moving: BTreeMap<ConnId, u32>,
    half_open: usize,
    now: Instant,
    /// When a connection must be looked at though nothing happens.
    due: Option<Instant>,
    chance: Chance,
    /// What is answered.
    reply: Vec<u8>,
    lines: u32,
    lines_since: Instant,
    stats: IncomingStats,
    /// Nodes that have just passed the handshake, each with its life.
    arrived: Vec<(NodeId, u64)>,
}

impl IncomingSet {
    /// Nobody yet. `seed` must not be known to anybody else: sessions begin where it says.
    pub(crate) fn new(facts: PeerFacts, seed: u64) -> IncomingSet {
        IncomingSet {
            facts,
            slots: Slots::default(),
            senders: BTreeMap::new(),
            moving: BTreeMap::new(),
            half_open: 0,
            now: Instant(0),
            due: None,
            chance: Chance(seed),
            reply: Vec::new(),
            lines: 0,
            lines_since: Instant(0),
            stats: IncomingStats::default(),
            arrived: Vec::new(),
        }
    }

    /// The members are others: from now on strangers are refused, and those who are none any more.
    pub(crate) fn set_members(&mut self, members: &[PeerMember]) {
        self.facts.set_members(members);
    }

    /// Who has passed the handshake since the last call, with its life.
    pub(crate) fn take_arrived(&mut self) -> Vec<(NodeId, u64)> {
        std::mem::take(&mut self.arrived)
    }

    /// Whether the connection is one of these.
    pub(crate) fn owns(&self, id: ConnId) -> bool {
        self.slots.get(id).is_some()
    }

    /// Counters.
    pub(crate) fn stats(&self) -> IncomingStats {
        IncomingStats { open: self.slots.len(), half_open: self.half_open, ..self.stats }
    }

    /// When [`IncomingSet::turn`] must be called though nothing arrives.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// A connection came in, or was handed over by another shard.
    pub(crate) fn opened(&mut self, now: Instant, id: ConnId, connections: &mut Connections) {
        self.now = now;
        if self.half_open >= HALF_OPEN_MAX {
            self.note_refusal(PeerRefusal::TooMany, None, id, connections);
            connections.abort(id);
            return;
        }
        self.half_open += 1;
        let listener = PeerListener::new(now, &self.facts, self.chance.next());
        self.note_due(listener.next_timeout(&self.facts));
        self.slots.insert(id, listener);
    }

    /// Bytes arrived. Each whole message goes to `receive`, with its node and shard.
    pub(crate) fn received(
        &mut self,
        id: ConnId,
        bytes: &[u8],
        connections: &mut Connections,
        receive: &mut impl FnMut(NodeId, u32, &[u8]),
    ) {
        let Some(listener) = self.slots.get_mut(id) else { return };
        self.stats.received_bytes += bytes.len() as u64;
        let was_known = listener.peer().is_some();
        let count = &mut self.stats.received;
        let mut handler = |peer: &PeerHello, message: &[u8]| {
            *count += 1;
            receive(NodeId::from(peer.node), peer.shard, message);
        };
        let received =
            listener.receive(self.now, bytes, &self.facts, &mut self.reply, &mut handler);
        let (peer, due) = (listener.peer().copied(), listener.next_timeout(&self.facts));
        self.note_due(due);
        if let Some(peer) = peer.filter(|_| !was_known) {
            self.half_open -= 1;
            self.stats.welcomed += 1;
            self.take_place(id, &peer, connections);
        }
        self.send_reply(id, connections);
        match received {
            Ok(PeerReceived::Continue) => {}
            Ok(PeerReceived::HandOver { shard, bytes }) => {
                self.drop_slot(id);
                self.stats.handed_over += 1;
                self.moving.insert(id, shard);
                connections.detach(id, &bytes);
            }
            Err(refusal) => {
                self.note_refusal(refusal, peer, id, connections);
                self.drop_slot(id);
                connections.close(id);
            }
        }
    }

    /// A connection is gone.
    pub(crate) fn closed(&mut self, id: ConnId) {
        self.moving.remove(&id);
        self.drop_slot(id);
    }

    /// Whether the connection is leaving for another shard.
    pub(crate) fn is_moving(&self, id: ConnId) -> bool {
        self.moving.contains_key(&id)
    }

    /// The shard to which a connection is on its way.
    pub(crate) fn take_target(&mut self, id: ConnId) -> Option<u32> {
        self.moving.remove(&id)
    }

    /// Ends what takes too long. Returns whether there was any. Once a turn.
    pub(crate) fn turn(&mut self, now: Instant, connections: &mut Connections) -> bool {
        self.now = now;
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        let (mut due, mut ending) = (None, Vec::new());
        for (id, listener) in self.slots.iter_mut() {
            let mut reply = Vec::new();
            match listener.handle_timeout(now, &self.facts, &mut reply) {
                Ok(()) => due = due.into_iter().chain(listener.next_timeout(&self.facts)).min(),
                Err(refusal) => ending.push((id, refusal, listener.peer().copied(), reply)),
            }
        }
        self.due = due;
        for (id, refusal, peer, reply) in ending {
            self.reply = reply;
            self.send_reply(id, connections);
            self.note_refusal(refusal, peer, id, connections);
            self.drop_slot(id);
            connections.close(id);
        }
        true
    }

    fn note_due(&mut self, when: Option<Instant>) {
        self.due = self.due.into_iter().chain(when).min();
    }

    fn send_reply(&mut self, id: ConnId, connections: &mut Connections) {
        if !self.reply.is_empty() {
            if let Some(out) = connections.out(id) {
                out.extend_from_slice(&self.reply);
            }
            self.reply.clear();
        }
    }

    /// Who has just passed takes the place of its older connection: that one is dead, or its
    /// node has started again.
    fn take_place(&mut self, id: ConnId, peer: &PeerHello, connections: &mut Connections) {
        self.facts.note_life(peer.node, peer.life);
        self.arrived.push((NodeId::from(peer.node), peer.life));
        let before = self.senders.insert((peer.node, peer.shard, peer.lane), id);
        let Some(old) = before.filter(|old| *old != id) else { return };
        if let Some(mut listener) = self.slots.take(old) {
            let refusal = PeerRefusal::Replaced;
            self.stats.refusals[usize::from(refusal.number())] += 1;
            if let Some(out) = connections.out(old) {
                listener.refuse(refusal, out);
            }
            connections.close(old);
        }
    }

    fn drop_slot(&mut self, id: ConnId) {
        let Some(listener) = self.slots.take(id) else { return };
        match listener.peer() {
            None => self.half_open -= 1,
            Some(peer) => {
                let key = (peer.node, peer.shard, peer.lane);
                if self.senders.get(&key) == Some(&id) {
                    self.senders.remove(&key);
                }
            }
        }
    }

    /// Counts, and writes a line to the log unless there are too many of them.
    fn note_refusal(
        &mut self,
        refusal: PeerRefusal,
        peer: Option<PeerHello>,
        id: ConnId,
        connections: &mut Connections,
    ) {
        self.stats.refusals[usize::from(refusal.number())] += 1;
        if self.now.nanos_since(self.lines_since) >= SECOND_NANOS {
            self.lines_since = self.now;
            self.lines = 0;
        }
        self.lines += 1;
        if self.lines > LINES_MAX {
            return;
        }
        let address = connections.peer(id).map_or_else(|_| String::new(), |from| from.to_string());
        let node = peer.map_or(0, |peer| peer.node.0);
        tracing::warn!(%address, node, reason = %refusal, "connection on the peers' port refused");
    }
}
