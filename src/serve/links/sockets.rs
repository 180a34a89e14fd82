//! Both directions of a shard's connections with other nodes, as the shard's loop turns them.
//!
//! Invariant: whoever is told of a message may answer it at once, over the links.

use annulus_cluster::NodeId;
use annulus_engine::model::Instant;
use annulus_net::driver::{ConnId, Connections, Detached, Door, Event};

use super::{IncomingSet, LinkSet};

/// See the module.
#[derive(Debug)]
pub(crate) struct PeerSockets {
    pub(crate) links: LinkSet,
    pub(crate) incoming: IncomingSet,
}

impl PeerSockets {
    /// Whether there is no other node.
    pub(crate) fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Takes an event of these connections. Gives it back if it is of a client's.
    pub(crate) fn event<'e>(
        &mut self,
        now: Instant,
        connections: &mut Connections,
        event: Event<'e>,
        receive: &mut impl FnMut(&mut LinkSet, NodeId, u32, &[u8]),
        hand_over: &mut impl FnMut(u32, Detached),
    ) -> Option<Event<'e>> {
        let (links, incoming) = (&mut self.links, &mut self.incoming);
        match event {
            Event::Opened(id, Door::Peers) => incoming.opened(now, id, connections),
            Event::Connected(id) => links.connected(id),
            Event::Received(id, bytes) if links.owns(id) => links.received(id, bytes, connections),
            Event::Received(id, bytes) if incoming.owns(id) => {
                incoming.received(id, bytes, connections, &mut |from, shard, message| {
                    receive(links, from, shard, message);
                });
                for (node, life) in incoming.take_arrived() {
                    links.arrived(node, life);
                }
            }
            Event::Closed(id, by) if links.owns(id) => links.closed(id, by),
            Event::Closed(id, _) if incoming.owns(id) || incoming.is_moving(id) => {
                incoming.closed(id);
            }
            Event::Detached(id, detached) if detached.door == Door::Peers => {
                if let Some(shard) = incoming.take_target(id) {
                    hand_over(shard, detached);
                }
            }
            // The links ask for what is unsent by themselves.
            Event::Drained(id) if links.owns(id) || incoming.owns(id) => {}
            Event::Opened(..)
            | Event::Received(..)
            | Event::Drained(_)
            | Event::Closed(..)
            | Event::Detached(..) => return Some(event),
        }
        None
    }

    /// A connection that another shard has handed over was adopted.
    pub(crate) fn adopted(&mut self, now: Instant, id: ConnId, connections: &mut Connections) {
        self.incoming.opened(now, id, connections);
    }

    /// Dials, sends and ends what is due. Returns whether anything was done. Once a turn, before
    /// the sockets' flush.
    pub(crate) fn turn(&mut self, now: Instant, connections: &mut Connections) -> bool {
        self.incoming.turn(now, connections) | self.links.turn(now, connections)
    }

    /// When [`PeerSockets::turn`] must be called though nothing arrives.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let timeouts = [self.links.next_timeout(), self.incoming.next_timeout()];
        timeouts.into_iter().flatten().min()
    }
}
