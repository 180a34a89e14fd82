//! The links of a shard to the shards of other nodes: dialled when first needed, dialled again
//! when they break. [`incoming`] has the other direction.
//!
//! ```text
//! asleep --first message, or its time--> dialling --connected--> greeting --welcome--> up
//!    ^-------- after 50 ms to 2 s, by chance ----- whatever goes wrong ------------------'
//!              or as soon as its node dials us
//! ```
//!
//! Invariants: a link holds a bounded number of bytes, and a sender is told at once when its
//! message is not taken; a message is sent once, so what was under way when a link broke is lost.
//! With no other nodes nothing here is ever called. On the write path: after the pump, before the
//! sockets.

mod incoming;
mod link;
mod slots;
mod sockets;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use annulus_cluster::NodeId;
use annulus_cluster::tracking::PeerShard;
use annulus_engine::model::{Instant, OriginId};
use annulus_net::driver::{ClosedBy, ConnId, Connections};
use annulus_net::peer_connection::{PeerFacts, PeerMember, PeerTarget};
use annulus_net::wire::peer::PeerRefusal;

use crate::pump::{Lane, LinkDown, Links};
pub(crate) use incoming::IncomingSet;
#[cfg(test)]
use incoming::IncomingStats;
use link::{Ended, Link, State};
use slots::Slots;
pub(crate) use sockets::PeerSockets;

const NANOS_PER_MS: u64 = 1_000_000;

/// Where another node is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerAddress {
    pub(crate) node: NodeId,
    pub(crate) address: SocketAddr,
}

/// Bounds of a shard's links.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkOptions {
    /// The first wait before a link is dialled again is by chance up to this, in milliseconds.
    pub(crate) back_off_ms_min: u64,
    /// The wait doubles with each failure, up to this.
    pub(crate) back_off_ms_max: u64,
    /// Most bytes that wait for one link; a single message may be longer.
    pub(crate) queue_bytes_max: usize,
}

impl Default for LinkOptions {
    fn default() -> LinkOptions {
        LinkOptions { back_off_ms_min: 50, back_off_ms_max: 2_000, queue_bytes_max: 16 << 20 }
    }
}

/// Counters of a shard's links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkStats {
    /// Links that stand now.
    pub(crate) up: usize,
    /// Links that came to stand.
    pub(crate) opened: u64,
    /// Links that did not come to stand, or broke.
    pub(crate) broken: u64,
    /// Messages sent.
    pub(crate) sent: u64,
    /// Messages that were not taken.
    pub(crate) refused: u64,
    /// Links ended for a reason of the protocol's, by the reason's number.
    pub(crate) refusals: [u64; PeerRefusal::COUNT],
}

/// What the pump is told of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkChange {
    /// A foreground link stands. The node has so many shards.
    Up(NodeId, u32),
    /// The last foreground link is gone.
    Down(NodeId),
}

/// A node that is linked to.
#[derive(Debug)]
struct Peer {
    node: NodeId,
    address: SocketAddr,
    /// Known from its first welcome.
    shard_count: Option<u32>,
    /// The greatest life with which it has dialled.
    life: u64,
    /// Foreground links that stand.
    up: usize,
    /// It is no member any more.
    is_removed: bool,
    /// The last reason told in the log, so that a node that stays away is told of once.
    told: Option<Ended>,
}

/// The outgoing links of one shard.
#[derive(Debug)]
pub(crate) struct LinkSet {
    facts: PeerFacts,
    options: LinkOptions,
    /// In the order in which they were told of; removed ones stay, for links have their places.
    peers: Vec<Peer>,
    links: Vec<Link>,
    index: BTreeMap<(NodeId, u32, Lane), usize>,
    slots: Slots<usize>,
    /// Links with something to send or to begin.
    dirty: Vec<usize>,
    /// When a link must be looked at though nothing happens.
    due: Option<Instant>,
    changes: Vec<LinkChange>,
    now: Instant,
    chance: Chance,
    /// The message being sent.
    scratch: Vec<u8>,
    stats: LinkStats,
}

impl LinkSet {
    /// Links to these nodes; one to each is dialled at the first turn. `seed` is for the waits.
    pub(crate) fn new(
        facts: PeerFacts,
        peers: &[PeerAddress],
        options: LinkOptions,
        seed: u64,
    ) -> LinkSet {
        let peer = |peer: &PeerAddress| Peer {
            node: peer.node,
            address: peer.address,
            shard_count: None,
            life: 0,
            up: 0,
            is_removed: false,
            told: None,
        };
        let mut peers: Vec<Peer> = peers.iter().map(peer).collect();
        peers.sort_by_key(|peer| peer.node);
        let own = facts.shard;
        let mut set = LinkSet {
            facts,
            options,
            peers,
            links: Vec::new(),
            index: BTreeMap::new(),
            slots: Slots::default(),
            dirty: Vec::new(),
            due: None,
            changes: Vec::new(),
            now: Instant(0),
            chance: Chance(seed),
            scratch: Vec::new(),
            stats: LinkStats::default(),
        };
        // With as many shards as here, the one of the same number has the same partitions.
        for peer in 0..set.peers.len() {
            set.add(peer, own, Lane::Foreground);
        }
        set
    }

    /// The members are others. Links to new ones are dialled; those to nodes that are none any more
    /// are not dialled again.
    pub(crate) fn set_peers(&mut self, members: &[PeerMember], peers: &[PeerAddress]) {
        self.facts.set_members(members);
        for PeerAddress { node, address } in peers {
            if let Some(known) = self.peer(*node) {
                self.peers[known].address = *address;
                continue;
            }
            self.peers.push(Peer {
                node: *node,
                address: *address,
                shard_count: None,
                life: 0,
                up: 0,
                is_removed: false,
                told: None,
            });
            let own = self.facts.shard;
            self.add(self.peers.len() - 1, own, Lane::Foreground);
        }
        for peer in &mut self.peers {
            peer.is_removed = !peers.iter().any(|it| it.node == peer.node);
        }
    }

    /// Whether there is no other node.
    pub(crate) fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Whether the connection is a link of this set.
    pub(crate) fn owns(&self, id: ConnId) -> bool {
        self.slots.get(id).is_some()
    }

    /// Counters.
    pub(crate) fn stats(&self) -> LinkStats {
        let up = self.links.iter().filter(|link| link.state.is_up()).count();
        LinkStats { up, ..self.stats }
    }

    /// What has become of the nodes since the last call.
    pub(crate) fn take_changes(&mut self) -> Vec<LinkChange> {
        std::mem::take(&mut self.changes)
    }

    /// When [`LinkSet::turn`] must be called though nothing arrives.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// A dialled connection stands.
    pub(crate) fn connected(&mut self, id: ConnId) {
        let Some(&mut index) = self.slots.get_mut(id) else { return };
        self.links[index].state = State::Greeting(id);
        self.set_dirty(index);
    }

    /// A node has dialled: it is there, and waits for answers, which leave by the links to it. So
    /// those that sleep are dialled at once. Early once a life, until they have stood for a while:
    /// two nodes whose links always break would wake each other for ever.
    pub(crate) fn arrived(&mut self, node: NodeId, life: u64) {
        let Some(peer) = self.peer(node) else { return };
        let is_news = life > self.peers[peer].life;
        self.peers[peer].life = life.max(self.peers[peer].life);
        for index in 0..self.links.len() {
            let link = &mut self.links[index];
            if link.peer != peer {
                continue;
            }
            link.hastened &= !is_news;
            if matches!(link.state, State::Asleep(_)) && !link.hastened {
                link.hastened = true;
                self.begin(index);
            }
        }
    }

    /// Bytes arrived on a link: the welcome, or a goodbye.
    pub(crate) fn received(&mut self, id: ConnId, bytes: &[u8], connections: &mut Connections) {
        let Some(&mut index) = self.slots.get_mut(id) else { return };
        let link = &mut self.links[index];
        let Some(dialer) = &mut link.dialer else { return };
        match dialer.receive(bytes, &self.facts, &mut link.out) {
            Ok(false) => {}
            Ok(true) => {
                let welcome = *dialer.welcome().expect("just welcomed");
                link.state = State::Up(id, self.now);
                self.stats.opened += 1;
                self.facts.note_life(welcome.node, welcome.life);
                self.raise(index, welcome.shard_count);
                self.set_dirty(index);
            }
            Err(refusal) => {
                connections.abort(id);
                self.end(index, Ended::Refused(refusal));
            }
        }
    }

    /// A link's connection is gone.
    pub(crate) fn closed(&mut self, id: ConnId, by: ClosedBy) {
        let Some(&mut index) = self.slots.get_mut(id) else { return };
        let ended = match by {
            ClosedBy::Peer => Ended::ByPeer,
            ClosedBy::Error(errno) => Ended::Network(errno),
            ClosedBy::SlowReader => Ended::Network(libc::ETIMEDOUT),
        };
        self.end(index, ended);
    }

    /// Dials what is due, and gives the sockets what they can take. Returns whether anything was
    /// done. Once a turn, before the sockets' flush.
    pub(crate) fn turn(&mut self, now: Instant, connections: &mut Connections) -> bool {
        self.now = now;
        let mut worked = false;
        if self.due.is_some_and(|due| due <= now) {
            worked = true;
            self.sweep(connections);
        }
        let mut position = 0;
        while position < self.dirty.len() {
            let index = self.dirty[position];
            let link = &mut self.links[index];
            match link.state {
                State::Begun => {
                    worked = true;
                    self.dial(index, connections);
                }
                State::Greeting(id) | State::Up(id, _) => worked |= link.flush(id, connections),
                State::Asleep(_) | State::Dialling(_) | State::Gone => {}
            }
            let link = &mut self.links[index];
            if link.has_output() && link.state.is_connected() {
                position += 1;
            } else {
                link.dirty = false;
                self.dirty.swap_remove(position);
            }
        }
        worked
    }

    fn peer(&self, node: NodeId) -> Option<usize> {
        self.peers.iter().position(|peer| peer.node == node)
    }

    fn set_dirty(&mut self, index: usize) {
        if !std::mem::replace(&mut self.links[index].dirty, true) {
            self.dirty.push(index);
        }
    }

    /// A link that is dialled at the next turn.
    fn add(&mut self, peer: usize, shard: u32, lane: Lane) -> usize {
        let node = self.peers[peer].node;
        let index = self.links.len();
        let target = PeerTarget { node: OriginId(node.0), shard, lane: lane.as_u8() };
        self.links.push(Link::new(peer, lane, target));
        self.index.insert((node, shard, lane), index);
        self.wait(index, self.now);
        index
    }

    /// Wakes the link at that time.
    fn wait(&mut self, index: usize, until: Instant) {
        self.links[index].state = State::Asleep(until);
        self.note_due(until);
    }

    fn note_due(&mut self, when: Instant) {
        self.due = Some(self.due.map_or(when, |due| due.min(when)));
    }

    /// Looks at all links: wakes those whose time has come, ends those whose time is up.
    fn sweep(&mut self, connections: &mut Connections) {
        self.due = None;
        for index in 0..self.links.len() {
            let link = &mut self.links[index];
            match link.state {
                State::Asleep(until) if until <= self.now => self.begin(index),
                State::Asleep(until) => self.note_due(until),
                State::Begun | State::Dialling(_) | State::Greeting(_) => {
                    let Some(dialer) = &mut link.dialer else { continue };
                    if let Err(refusal) = dialer.handle_timeout(self.now, &self.facts) {
                        if let Some(id) = link.state.connection() {
                            connections.abort(id);
                        }
                        self.end(index, Ended::Refused(refusal));
                    } else if let Some(when) = dialer.next_timeout(&self.facts) {
                        self.note_due(when);
                    }
                }
                State::Up(..) | State::Gone => {}
            }
        }
    }

    /// The link may be written to from now on; it is dialled in this turn or the next.
    fn begin(&mut self, index: usize) {
        self.links[index].begin(self.now, &self.facts);
        let timeout = self.links[index].dialer.as_ref().and_then(|d| d.next_timeout(&self.facts));
        if let Some(when) = timeout {
            self.note_due(when);
        }
        self.set_dirty(index);
    }

    fn dial(&mut self, index: usize, connections: &mut Connections) {
        let address = self.peers[self.links[index].peer].address;
        match connections.dial(address) {
            Ok(id) => {
                self.links[index].state = State::Dialling(id);
                self.slots.insert(id, index);
            }
            Err(error) => {
                self.end(index, Ended::Network(error.raw_os_error().unwrap_or(libc::EMFILE)));
            }
        }
    }

    /// The link has broken, or never came to stand.
    fn end(&mut self, index: usize, ended: Ended) {
        self.stats.broken += 1;
        if let Ended::Refused(refusal) = ended {
            self.stats.refusals[usize::from(refusal.number())] += 1;
        }
        let link = &mut self.links[index];
        let (was_up, target) = (link.state.is_up(), link.target);
        if let Some(id) = link.state.connection() {
            self.slots.take(id);
        }
        let held_ms = match link.state {
            State::Up(_, since) => self.now.nanos_since(since) / NANOS_PER_MS,
            _ => 0,
        };
        link.drop_output();
        // A link that breaks as soon as it stands is not to be dialled all the time.
        if held_ms >= self.options.back_off_ms_max {
            (link.failures, link.hastened) = (0, false);
        }
        let most = self.options.back_off_ms_min << link.failures.min(16);
        link.failures += 1;
        let wait_ms = self.chance.below(most.min(self.options.back_off_ms_max) * 1000);
        let (peer, lane) = (link.peer, link.lane);
        self.wait(index, self.now.after_nanos(wait_ms * (NANOS_PER_MS / 1000)));
        if was_up {
            self.lower(peer, lane);
        }
        self.tell(peer, ended);
        if self.peers[peer].is_removed {
            self.links[index].state = State::Gone;
            self.index.remove(&(self.peers[peer].node, target.shard, lane));
        } else if ended == Ended::Refused(PeerRefusal::Shard) {
            self.forget(index, target.shard);
        }
    }

    /// The node has no such shard: nobody should ask for it again.
    fn forget(&mut self, index: usize, shard: u32) {
        let (peer, lane) = (self.links[index].peer, self.links[index].lane);
        self.links[index].state = State::Gone;
        self.index.remove(&(self.peers[peer].node, shard, lane));
        let first = (self.peers[peer].node, 0, Lane::Foreground);
        if shard != 0 && !self.index.contains_key(&first) {
            self.add(peer, 0, Lane::Foreground);
        }
    }

    fn raise(&mut self, index: usize, shard_count: u32) {
        let (peer, lane) = (self.links[index].peer, self.links[index].lane);
        let peer = &mut self.peers[peer];
        peer.shard_count = Some(shard_count);
        if lane == Lane::Foreground {
            peer.up += 1;
            if peer.up == 1 {
                tracing::info!(node = peer.node.0, address = %peer.address, "linked to node");
                peer.told = None;
                self.changes.push(LinkChange::Up(peer.node, shard_count));
            }
        }
    }

    fn lower(&mut self, peer: usize, lane: Lane) {
        let peer = &mut self.peers[peer];
        if lane == Lane::Foreground {
            peer.up -= 1;
            if peer.up == 0 {
                self.changes.push(LinkChange::Down(peer.node));
            }
        }
    }

    /// One line a reason, until the node is up again.
    fn tell(&mut self, peer: usize, ended: Ended) {
        let peer = &mut self.peers[peer];
        if peer.told != Some(ended) {
            peer.told = Some(ended);
            tracing::warn!(node = peer.node.0, address = %peer.address, reason = %ended, "no link to node");
        }
    }
}

impl Links for LinkSet {
    fn send(&mut self, to: PeerShard, lane: Lane, message: &[u8]) -> Result<(), LinkDown> {
        let sent = self.try_send(to.node, to.shard, lane, message);
        match sent {
            Some(()) => self.stats.sent += 1,
            None => self.stats.refused += 1,
        }
        sent.ok_or(LinkDown)
    }

    fn is_up(&self, node: NodeId) -> bool {
        self.peer(node).is_some_and(|peer| self.peers[peer].up > 0)
    }
}

impl LinkSet {
    fn try_send(&mut self, to: NodeId, shard: u32, lane: Lane, message: &[u8]) -> Option<()> {
        let index = match self.index.get(&(to, shard, lane)) {
            Some(index) => *index,
            None => {
                let peer = self.peer(to)?;
                if self.peers[peer].shard_count.is_some_and(|count| shard >= count) {
                    return None;
                }
                let index = self.add(peer, shard, lane);
                self.begin(index);
                index
            }
        };
        // What waits for its next dial has just failed.
        if matches!(self.links[index].state, State::Asleep(_) | State::Gone) {
            return None;
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(message);
        let link = &mut self.links[index];
        let waits = link.queued();
        if self.scratch.len() > self.facts.options.message_size_max
            || (waits > 0 && waits + self.scratch.len() > self.options.queue_bytes_max)
        {
            return None;
        }
        link.dialer.as_mut()?.message(&mut self.scratch, &mut link.out);
        self.set_dirty(index);
        Some(())
    }
}

/// A seeded generator (SplitMix64): waits, and the positions at which sessions begin.
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number from 0 to `most`.
    fn below(&mut self, most: u64) -> u64 {
        self.next() % most.saturating_add(1)
    }
}
