//! A simulated client: production's own side of a connection, and a seeded will.
//!
//! Invariant: it makes one call at a time, and writes in the book what it asked when it asked it,
//! and what it was told when it was told it; so many clients make a concurrent history. It is
//! told nothing that a real client would not learn.

use std::collections::BTreeMap;

use annulus::pump::ConnectionKey;
use annulus_engine::model::{Instant, NamespaceId};
use annulus_engine::sim::Chance;
use annulus_net::client_connection::{ClientConnection, Event as WireEvent};
use annulus_net::wire::hello::Hello;
use annulus_net::wire::request::Outgoing;
use annulus_net::wire::status::{Class, Status};

use super::book::{Book, PendingCall};
use crate::calls::{CallMix, Calls, PlannedCall};
use crate::history::EventId;
use crate::network::Place;

const MS: u64 = 1_000_000;
/// How long after its deadline an answer may come before the server is said to have failed it.
const GRACE_NANOS: u64 = 150 * MS;

/// What a client wants of the world.
#[derive(Debug)]
pub(super) enum Wish {
    /// A connection to a shard of this node.
    Connect(ConnectionKey, u32),
    /// Bytes to the server.
    Send(ConnectionKey, Vec<u8>),
    /// The connection is no use any more.
    Close(ConnectionKey),
    /// An answer did not come in time. If the server was well all the time since then, it broke
    /// its promise (P9).
    Overdue { node: u32, since: Instant, what: String },
}

/// One connection, seen from the client.
#[derive(Debug)]
struct Connection {
    key: ConnectionKey,
    node: u32,
    wire: ClientConnection,
    is_open: bool,
    since: Instant,
}

/// The call that is under way.
#[derive(Debug)]
struct Waiting {
    id: u32,
    plan: PlannedCall,
    call: PendingCall,
    deadline: Instant,
}

/// One client.
#[derive(Debug)]
pub(super) struct Client {
    number: u32,
    nodes: u32,
    chance: Chance,
    calls: Calls,
    /// If set, only these are made, on one node.
    script: Option<(u32, Vec<PlannedCall>)>,
    /// Longest pause between two calls, in nanoseconds.
    pause_max: u64,
    connection: Option<Connection>,
    connections_made: u64,
    waiting: Option<Waiting>,
    /// When it does something next, if nothing comes before.
    next_at: Instant,
    /// It makes no more calls.
    pub(super) is_quiet: bool,
    /// Contexts in hand, by namespace and key.
    contexts: BTreeMap<(NamespaceId, u32), (EventId, Vec<u8>)>,
}

impl Client {
    pub(super) fn new(
        number: u32,
        nodes: u32,
        seed: u64,
        mix: &CallMix,
        pause_max: u64,
        now: Instant,
    ) -> Client {
        let mut chance = Chance::new(seed);
        let calls = Calls::new(chance.next_u64(), mix.clone());
        let next_at = now.after_nanos(chance.between(0, pause_max));
        Client {
            number,
            nodes,
            chance,
            calls,
            script: None,
            pause_max,
            connection: None,
            connections_made: 0,
            waiting: None,
            next_at,
            is_quiet: false,
            contexts: BTreeMap::new(),
        }
    }

    /// One that asks a node for every key, at every level, and is quiet then.
    pub(super) fn auditor(
        number: u32,
        node: u32,
        seed: u64,
        mix: &CallMix,
        now: Instant,
    ) -> Client {
        let mut client = Client::new(number, 1, seed, mix, MS, now);
        // Its number was another's before it.
        client.connections_made = now.0 >> 32;
        client.script = Some((node, mix.reads_of_all()));
        client
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        (!self.is_quiet || self.waiting.is_some()).then_some(self.next_at)
    }

    /// Makes calls again.
    pub(super) fn wake(&mut self, now: Instant) {
        self.is_quiet = false;
        if self.waiting.is_none() {
            self.next_at = now.after_nanos(self.chance.between(0, self.pause_max));
        }
    }

    /// Its time has come.
    pub(super) fn act(&mut self, now: Instant, book: &mut Book, wishes: &mut Vec<Wish>) {
        if let Some(waiting) = &self.waiting {
            let (deadline, over) = (waiting.deadline, waiting.deadline.after_nanos(GRACE_NANOS));
            if now < over {
                self.next_at = over;
                return;
            }
            let node = self.connection.as_ref().map_or(0, |connection| connection.node);
            let what = format!("no answer to {:?} by {deadline:?}", waiting.call);
            wishes.push(Wish::Overdue { node, since: waiting.call.invoked, what });
            // Whoever does not answer is asked no more.
            return self.disconnect(now, book, wishes);
        }
        if self.is_quiet {
            return;
        }
        match &self.connection {
            None => self.connect(now, wishes),
            Some(connection) if !connection.is_open => {
                let since = connection.since;
                if now < since.after_nanos(2_000 * MS) {
                    self.next_at = since.after_nanos(2_000 * MS);
                    return;
                }
                let (node, what) = (connection.node, "no answer to HELLO".to_owned());
                wishes.push(Wish::Overdue { node, since, what });
                self.disconnect(now, book, wishes);
            }
            Some(_) if self.script.is_none() && self.chance.one_in(40) => {
                self.disconnect(now, book, wishes)
            }
            Some(_) => self.call(now, book, wishes),
        }
    }

    fn connect(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        let node = match &self.script {
            Some((node, _)) => *node,
            None => u32::try_from(self.chance.below(u64::from(self.nodes))).expect("a few nodes"),
        };
        self.connections_made += 1;
        // The low half is the slot at the shard, the high half tells its lives apart.
        let key = ConnectionKey(self.connections_made << 32 | u64::from(self.number));
        let mut out = Vec::new();
        let hello = Hello { name: "simulated", ..Hello::default() };
        // It looks at its own time-outs by itself.
        let never = Instant(u64::MAX);
        let wire = ClientConnection::new(&hello, never, &mut out);
        self.connection = Some(Connection { key, node, wire, is_open: false, since: now });
        wishes.push(Wish::Connect(key, node));
        wishes.push(Wish::Send(key, out));
        self.next_at = now.after_nanos(2_000 * MS);
    }

    fn call(&mut self, now: Instant, book: &mut Book, wishes: &mut Vec<Wish>) {
        let Some(connection) = &mut self.connection else { return };
        let plan = match &mut self.script {
            None => self.calls.draw(),
            Some((_, script)) => match script.pop() {
                Some(plan) => plan,
                None => {
                    self.is_quiet = true;
                    return;
                }
            },
        };
        let context = (plan.with_context)
            .then(|| self.contexts.get(&(plan.namespace, plan.key)).cloned())
            .flatten();
        let deadline = now.after_nanos(plan.deadline_ms * MS);
        let (call, request) = book.begin(now, self.number, connection.node, &plan, context);
        let mut out = Vec::new();
        let operation = request.operation();
        let outgoing = Outgoing::Operation(operation);
        match connection.wire.send(now, deadline, 0, &outgoing, &mut out) {
            Ok(id) => {
                connection.wire.fill_output(&mut out, usize::MAX);
                wishes.push(Wish::Send(connection.key, out));
                self.next_at = deadline.after_nanos(GRACE_NANOS);
                self.waiting = Some(Waiting { id, plan, call, deadline });
            }
            // Nothing was sent: it goes elsewhere.
            Err(_) => {
                book.refused(&call, now);
                self.try_again(plan);
                self.disconnect(now, book, wishes);
            }
        }
    }

    /// Gives up the connection, and the call on it.
    fn disconnect(&mut self, now: Instant, book: &mut Book, wishes: &mut Vec<Wish>) {
        if let Some(connection) = self.connection.take() {
            wishes.push(Wish::Close(connection.key));
        }
        self.lost(now, book);
    }

    fn lost(&mut self, now: Instant, book: &mut Book) {
        if let Some(waiting) = self.waiting.take() {
            book.lost(&waiting.call, now);
            self.try_again(waiting.plan);
        }
        self.next_at = now.after_nanos(self.chance.between(MS, 100 * MS));
    }

    /// A script is not done before each of its calls was answered with a result.
    fn try_again(&mut self, plan: PlannedCall) {
        if let Some((_, script)) = &mut self.script {
            script.push(plan);
        }
    }

    /// The connection is over.
    pub(super) fn closed(&mut self, key: ConnectionKey, now: Instant, book: &mut Book) {
        if self.connection.as_ref().is_some_and(|connection| connection.key == key) {
            self.connection = None;
            self.lost(now, book);
        }
    }

    /// Bytes came.
    pub(super) fn received(
        &mut self,
        key: ConnectionKey,
        bytes: &[u8],
        now: Instant,
        book: &mut Book,
        wishes: &mut Vec<Wish>,
    ) {
        let Some(connection) = self.connection.as_mut().filter(|it| it.key == key) else { return };
        let mut answered = None;
        let (mut opened, mut goodbye) = (false, false);
        let mut visit = |event: WireEvent<'_>| match event {
            WireEvent::Welcome(_) => opened = true,
            WireEvent::Reply(reply) => {
                answered = Some((reply.id, reply.status, reply.body.to_vec()))
            }
            WireEvent::Goodbye { .. } => goodbye = true,
            WireEvent::Route(_) | WireEvent::TimedOut { .. } => {}
        };
        let received = connection.wire.receive(bytes, &mut visit);
        if opened {
            connection.is_open = true;
            self.next_at = now.after_nanos(self.chance.between(0, self.pause_max));
        }
        if let Some((id, status, body)) = answered {
            self.answered(id, status, &body, now, book);
        }
        match received {
            Ok(()) if goodbye && self.waiting.is_none() => self.disconnect(now, book, wishes),
            Ok(()) => {}
            // A refused HELLO: the node is stopping, or has too much to do.
            Err(annulus_net::client_connection::Lost::Refused { .. }) => {
                self.disconnect(now, book, wishes);
            }
            Err(lost) => panic!("client {}: {lost}", self.number),
        }
    }

    fn answered(&mut self, id: u32, status: Status, body: &[u8], now: Instant, book: &mut Book) {
        let Some(waiting) = self.waiting.take_if(|waiting| waiting.id == id) else { return };
        if status.class() != Class::Answered {
            self.try_again(waiting.plan);
        }
        let context = book.end(&waiting.call, now, status, body);
        let place = (waiting.call.namespace, waiting.call.key);
        let wanted = self.calls.mix().contexts_of_writes || waiting.call.is_read;
        if let Some(context) = context.filter(|_| wanted) {
            self.contexts.insert(place, (waiting.call.event, context));
        }
        // Now and then at once, mostly after a while.
        let pause = if self.chance.one_in(4) { self.pause_max / 50 } else { self.pause_max };
        self.next_at = now.after_nanos(self.chance.between(0, pause));
    }

    /// The shard that it connects to on a node.
    pub(super) fn place_on(&mut self, node: u32, shards: u32) -> Place {
        let shard = u32::try_from(self.chance.below(u64::from(shards))).expect("a few shards");
        Place { node, shard }
    }
}
