//! The connections of clients, and the mesh between the shards of a node, in memory.
//!
//! Invariant: a connection is two ordered streams of bytes. They arrive in pieces of any size
//! after any time, none is lost while the connection lives, and both ends learn of its end, the
//! client perhaps late, perhaps never.

use std::collections::{BTreeMap, BTreeSet};

use annulus::pump::{ConnectionKey, Lane, LinkDown, Links, Message, Peers, Wires};
use annulus_cluster::NodeId;
use annulus_cluster::tracking::PeerShard;
use annulus_engine::model::Instant;
use annulus_engine::sim::Chance;

use crate::network::Place;

/// Messages in a shard's inbox from which others are refused.
const INBOX_MAX: usize = 4096;

/// What arrives at a shard.
#[derive(Debug)]
pub(super) enum Input {
    /// A client connects.
    Opened(ConnectionKey),
    /// Bytes of a client.
    Bytes(ConnectionKey, Vec<u8>),
    /// A client is gone.
    Closed(ConnectionKey),
}

/// What arrives at a client.
#[derive(Debug)]
pub(super) enum Output {
    /// Bytes of the server.
    Bytes(Vec<u8>),
    /// The connection is over.
    Closed,
}

/// What is under way between clients and shards.
#[derive(Debug)]
pub(super) enum Delivery {
    ToShard(Place, Input),
    ToClient(u32, ConnectionKey, Output),
}

/// All streams.
#[derive(Debug)]
pub(super) struct Streams {
    chance: Chance,
    /// Longest time of a piece, in nanoseconds.
    delay_max: u64,
    under_way: BTreeMap<(Instant, u64), Delivery>,
    next: u64,
    /// When the last piece of a stream arrives; true is towards the shard.
    ends: BTreeMap<(ConnectionKey, bool), Instant>,
}

impl Streams {
    pub(super) fn new(seed: u64, delay_max: u64) -> Streams {
        Streams {
            chance: Chance::new(seed ^ 0x57EA_0000_0000_0001),
            delay_max,
            under_way: BTreeMap::new(),
            next: 0,
            ends: BTreeMap::new(),
        }
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.under_way.keys().next().map(|(arrival, _)| *arrival)
    }

    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Delivery> {
        let entry = self.under_way.first_entry().filter(|entry| entry.key().0 <= now)?;
        Some(entry.remove())
    }

    /// A client's connection reaches the shard.
    pub(super) fn open(&mut self, now: Instant, key: ConnectionKey, place: Place) {
        self.launch(now, key, true, Delivery::ToShard(place, Input::Opened(key)));
    }

    /// Bytes towards the shard.
    pub(super) fn send_up(
        &mut self,
        now: Instant,
        key: ConnectionKey,
        place: Place,
        bytes: Vec<u8>,
    ) {
        for piece in self.pieces(bytes) {
            self.launch(now, key, true, Delivery::ToShard(place, Input::Bytes(key, piece)));
        }
    }

    /// Bytes towards the client.
    pub(super) fn send_down(
        &mut self,
        now: Instant,
        key: ConnectionKey,
        client: u32,
        bytes: Vec<u8>,
    ) {
        for piece in self.pieces(bytes) {
            let delivery = Delivery::ToClient(client, key, Output::Bytes(piece));
            self.launch(now, key, false, delivery);
        }
    }

    /// The shard closed, or died: the client learns it after what was sent before.
    pub(super) fn closed_by_shard(&mut self, now: Instant, key: ConnectionKey, client: u32) {
        self.launch(now, key, false, Delivery::ToClient(client, key, Output::Closed));
    }

    /// The client closed: the shard learns it after what was sent before.
    pub(super) fn closed_by_client(&mut self, now: Instant, key: ConnectionKey, place: Place) {
        self.launch(now, key, true, Delivery::ToShard(place, Input::Closed(key)));
    }

    fn pieces(&mut self, mut bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        // Mostly whole, now and then cut anywhere.
        while bytes.len() > 1 && pieces.len() < 4 && self.chance.one_in(16) {
            let rest = bytes.split_off(self.chance.index(bytes.len() - 1) + 1);
            pieces.push(std::mem::replace(&mut bytes, rest));
        }
        pieces.push(bytes);
        pieces
    }

    fn launch(&mut self, now: Instant, key: ConnectionKey, up: bool, delivery: Delivery) {
        let delay = self.chance.between(5_000, self.delay_max.max(5_000));
        let end = self.ends.entry((key, up)).or_default();
        let arrival = now.after_nanos(delay).max(end.after_nanos(1));
        *end = arrival;
        if self.ends.len() > 1024 {
            self.ends.retain(|_, end| *end > now);
        }
        self.under_way.insert((arrival, self.next), delivery);
        self.next += 1;
    }
}

/// The sockets of one shard.
#[derive(Debug, Default)]
pub(super) struct SimWires {
    /// Outputs of live connections.
    out: BTreeMap<ConnectionKey, Vec<u8>>,
    /// To be closed when their output is sent.
    closing: Vec<ConnectionKey>,
    /// Pieces that wait, because the pump paused the connection.
    held: BTreeMap<ConnectionKey, Vec<Vec<u8>>>,
    resumed: Vec<ConnectionKey>,
}

impl SimWires {
    pub(super) fn open(&mut self, key: ConnectionKey) {
        self.out.insert(key, Vec::new());
    }

    pub(super) fn is_open(&self, key: ConnectionKey) -> bool {
        self.out.contains_key(&key)
    }

    pub(super) fn forget(&mut self, key: ConnectionKey) {
        self.out.remove(&key);
        self.held.remove(&key);
    }

    /// Receives no more from the connection until the pump resumes it.
    pub(super) fn pause(&mut self, key: ConnectionKey) {
        self.held.entry(key).or_default();
    }

    /// Keeps bytes of a paused connection; gives them back if it is not.
    pub(super) fn hold(&mut self, key: ConnectionKey, bytes: Vec<u8>) -> Option<Vec<u8>> {
        match self.held.get_mut(&key) {
            Some(held) => {
                held.push(bytes);
                None
            }
            None => Some(bytes),
        }
    }

    /// Bytes of connections that were resumed.
    pub(super) fn take_resumed(&mut self) -> Vec<(ConnectionKey, Vec<u8>)> {
        let mut taken = Vec::new();
        for key in std::mem::take(&mut self.resumed) {
            for bytes in self.held.remove(&key).unwrap_or_default() {
                taken.push((key, bytes));
            }
        }
        taken
    }

    /// What has been written since, by connection; then those that are over.
    pub(super) fn flush(&mut self) -> (Vec<(ConnectionKey, Vec<u8>)>, Vec<ConnectionKey>) {
        let sent = self
            .out
            .iter_mut()
            .filter(|(_, out)| !out.is_empty())
            .map(|(key, out)| (*key, std::mem::take(out)))
            .collect();
        let closing = std::mem::take(&mut self.closing);
        closing.iter().for_each(|key| self.forget(*key));
        (sent, closing)
    }

    /// All live connections.
    pub(super) fn keys(&self) -> Vec<ConnectionKey> {
        self.out.keys().copied().collect()
    }
}

impl Wires for SimWires {
    fn out(&mut self, connection: ConnectionKey) -> Option<&mut Vec<u8>> {
        self.out.get_mut(&connection)
    }

    fn unsent(&self, connection: ConnectionKey) -> usize {
        self.out.get(&connection).map_or(0, Vec::len)
    }

    fn resume(&mut self, connection: ConnectionKey) {
        self.resumed.push(connection);
    }

    fn close(&mut self, connection: ConnectionKey) {
        self.closing.push(connection);
    }
}

/// The links to other nodes, as one turn of a shard sees them.
pub(super) struct SimLinks<'a> {
    /// Nodes to which links stand.
    pub(super) up: &'a BTreeSet<NodeId>,
    pub(super) sent: Vec<(PeerShard, Lane, Vec<u8>)>,
}

impl Links for SimLinks<'_> {
    fn send(&mut self, to: PeerShard, lane: Lane, message: &[u8]) -> Result<(), LinkDown> {
        if !self.is_up(to.node) {
            return Err(LinkDown);
        }
        self.sent.push((to, lane, message.to_vec()));
        Ok(())
    }

    fn is_up(&self, node: NodeId) -> bool {
        self.up.contains(&node)
    }
}

/// The mesh between the shards of a node, as one turn of a shard sees it.
pub(super) struct SimMesh<'a> {
    /// Messages that wait, by shard.
    pub(super) waiting: &'a [usize],
    pub(super) sent: Vec<(u32, Message)>,
    pub(super) chance: &'a mut Chance,
}

impl Peers for SimMesh<'_> {
    fn send(&mut self, shard: u32, message: Message) -> Result<(), Message> {
        let waiting = self.waiting.get(shard as usize).copied().unwrap_or(INBOX_MAX);
        if waiting >= INBOX_MAX || self.chance.one_in(1000) {
            return Err(message);
        }
        self.sent.push((shard, message));
        Ok(())
    }
}
