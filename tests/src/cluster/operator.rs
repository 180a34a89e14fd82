//! A simulated operator: creates and drops namespaces on any node, through a client's connection.
//!
//! Invariant: it makes one change at a time and notes when it asked and what it was told; the
//! ledger of all operators is then held against the catalogue that the nodes have in the end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use annulus::commands::{Command, Named, NsChange};
use annulus::namespaces::{Catalogue, Settings};
use annulus::pump::ConnectionKey;
use annulus_engine::model::Instant;
use annulus_engine::sim::Chance;
use annulus_net::client_connection::{ClientConnection, Event as WireEvent, Lost};
use annulus_net::wire::hello::Hello;
use annulus_net::wire::request::{Admin, Outgoing};
use annulus_net::wire::status::{Class, Status};

use super::client::Wish;

const MS: u64 = 1_000_000;
/// How long after its deadline an answer may come: others are told of a change before its answer.
const GRACE_NANOS: u64 = 2_500 * MS;
/// Operators have numbers above all clients'.
pub(super) const FIRST: u32 = 1 << 16;
/// Names that all operators want.
const COMMON_NAMES: u64 = 4;

/// What an operator asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ask {
    Create(String),
    Drop(String),
    /// A change of members, which is asked for again until it is answered.
    Members(&'static str, String),
}

/// What it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Done; the id of the namespace.
    Done(u64),
    /// Refused by the namespaces as they are.
    Refused,
    NotStarted,
    Perhaps,
}

struct Waiting {
    id: u32,
    ask: Ask,
    invoked: Instant,
    until: Instant,
}

struct Connection {
    key: ConnectionKey,
    node: u32,
    wire: ClientConnection,
    is_open: bool,
}

/// See the module.
pub(super) struct Operator {
    number: u32,
    nodes: u32,
    chance: Chance,
    connection: Option<Connection>,
    connections_made: u64,
    waiting: Option<Waiting>,
    names_made: u32,
    /// Own names that were created, and not dropped yet.
    own: Vec<String>,
    /// Of one that only changes members: what is left to ask for.
    script: Option<VecDeque<(&'static str, String)>>,
    ledger: Vec<(Ask, Told)>,
    next_at: Instant,
    pub(super) is_quiet: bool,
}

impl Operator {
    pub(super) fn new(index: u32, nodes: u32, seed: u64, now: Instant) -> Operator {
        Operator {
            number: FIRST + index,
            nodes,
            chance: Chance::new(seed),
            connection: None,
            connections_made: 0,
            waiting: None,
            names_made: 0,
            own: Vec::new(),
            script: None,
            ledger: Vec::new(),
            next_at: now,
            is_quiet: false,
        }
    }

    /// One that changes members as it is told.
    pub(super) fn steward(index: u32, nodes: u32, seed: u64, now: Instant) -> Operator {
        let script = Some(VecDeque::new());
        Operator { script, ..Operator::new(index, nodes, seed, now) }
    }

    pub(super) fn ask(&mut self, command: &'static str, arguments: String, now: Instant) {
        if let Some(script) = &mut self.script {
            script.push_back((command, arguments));
            self.next_at = self.next_at.max(now);
        }
    }

    pub(super) fn forget_script(&mut self) {
        if let Some(script) = &mut self.script {
            script.clear();
        }
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        let has_something = self.script.as_ref().is_none_or(|script| !script.is_empty());
        let acts = !self.is_quiet && has_something;
        (acts || self.waiting.is_some()).then_some(self.next_at)
    }

    pub(super) fn wake(&mut self, now: Instant) {
        self.is_quiet = false;
        self.next_at = self.next_at.max(now);
    }

    /// Its time has come.
    pub(super) fn act(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        if let Some(waiting) = &self.waiting {
            if now < waiting.until {
                self.next_at = waiting.until;
                return;
            }
            let node = self.connection.as_ref().map_or(0, |connection| connection.node);
            let what = format!("no answer to {:?}", waiting.ask);
            wishes.push(Wish::Overdue { node, since: waiting.invoked, what });
            return self.disconnect(now, wishes);
        }
        if self.is_quiet {
            return;
        }
        match &self.connection {
            Some(connection) if connection.is_open && !self.chance.one_in(3) => {
                self.change(now, wishes);
            }
            // Another node's turn, or one that does not answer HELLO.
            Some(_) => self.disconnect(now, wishes),
            None => self.connect(now, wishes),
        }
    }

    fn connect(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        let node = u32::try_from(self.chance.below(u64::from(self.nodes))).expect("a few nodes");
        self.connections_made += 1;
        let key = ConnectionKey(self.connections_made << 32 | u64::from(self.number));
        let mut out = Vec::new();
        let hello = Hello { name: "operator", ..Hello::default() };
        let wire = ClientConnection::new(&hello, Instant(u64::MAX), &mut out);
        self.connection = Some(Connection { key, node, wire, is_open: false });
        wishes.push(Wish::Connect(key, node));
        wishes.push(Wish::Send(key, out));
        self.next_at = now.after_nanos(1_000 * MS);
    }

    fn draw(&mut self) -> Ask {
        if let Some((command, arguments)) = self.script.as_ref().and_then(VecDeque::front) {
            return Ask::Members(command, arguments.clone());
        }
        match self.chance.below(4) {
            0 if !self.own.is_empty() => {
                Ask::Drop(self.own.swap_remove(self.chance.index(self.own.len())))
            }
            1 => Ask::Create(format!("common-{}", self.chance.below(COMMON_NAMES))),
            _ => {
                self.names_made += 1;
                Ask::Create(format!("own-{}-{}", self.number - FIRST, self.names_made))
            }
        }
    }

    fn change(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        let ask = self.draw();
        let Some(connection) = &mut self.connection else { return };
        let (command, arguments) = match &ask {
            Ask::Members(command, arguments) => (*command, arguments.clone()),
            Ask::Create(name) => {
                // The same number of copies as all have, so that homes stay where they are.
                let settings = Settings { n: Some(3), ..Settings::default() };
                let create = Command::NsCreate(NsChange { name: name.clone(), settings });
                (create.name(), create.arguments())
            }
            Ask::Drop(name) => {
                let drop = Command::NsDrop(Named { name: name.clone() });
                (drop.name(), drop.arguments())
            }
        };
        let deadline = now.after_nanos(self.chance.between(300, 4_000) * MS);
        let outgoing = Outgoing::Admin(Admin { command, json: &arguments });
        let mut out = Vec::new();
        match connection.wire.send(now, deadline, 0, &outgoing, &mut out) {
            Ok(id) => {
                connection.wire.fill_output(&mut out, usize::MAX);
                wishes.push(Wish::Send(connection.key, out));
                let until = deadline.after_nanos(GRACE_NANOS);
                self.waiting = Some(Waiting { id, ask, invoked: now, until });
                self.next_at = until;
            }
            Err(_) => {
                self.settle(ask, Told::NotStarted);
                self.disconnect(now, wishes);
            }
        }
    }

    fn settle(&mut self, ask: Ask, told: Told) {
        if let Some(script) = &mut self.script {
            let is_over = matches!(told, Told::Done(_) | Told::Refused);
            if is_over
                && script.front().is_some_and(|front| ask == Ask::Members(front.0, front.1.clone()))
            {
                script.pop_front();
            }
            return;
        }
        if let (Ask::Create(name), Told::Done(_)) = (&ask, told)
            && name.starts_with("own")
        {
            self.own.push(name.clone());
        }
        self.ledger.push((ask, told));
    }

    fn disconnect(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        if let Some(connection) = self.connection.take() {
            wishes.push(Wish::Close(connection.key));
        }
        self.lost(now);
    }

    fn lost(&mut self, now: Instant) {
        if let Some(waiting) = self.waiting.take() {
            self.settle(waiting.ask, Told::Perhaps);
        }
        self.next_at = now.after_nanos(self.chance.between(MS, 100 * MS));
    }

    pub(super) fn closed(&mut self, key: ConnectionKey, now: Instant) {
        if self.connection.as_ref().is_some_and(|connection| connection.key == key) {
            self.connection = None;
            self.lost(now);
        }
    }

    pub(super) fn received(
        &mut self,
        key: ConnectionKey,
        bytes: &[u8],
        now: Instant,
        wishes: &mut Vec<Wish>,
    ) {
        let Some(connection) = self.connection.as_mut().filter(|it| it.key == key) else { return };
        let (mut answered, mut opened, mut goodbye) = (None, false, false);
        let mut visit = |event: WireEvent<'_>| match event {
            WireEvent::Welcome(_) => opened = true,
            WireEvent::Reply(reply) => {
                answered = Some((reply.id, reply.status, reply.body.to_vec()));
            }
            WireEvent::Goodbye { .. } => goodbye = true,
            WireEvent::Route(_) | WireEvent::TimedOut { .. } => {}
        };
        let received = connection.wire.receive(bytes, &mut visit);
        if opened {
            connection.is_open = true;
            self.next_at = now.after_nanos(self.chance.between(0, 50 * MS));
        }
        if let Some((id, status, body)) = answered
            && let Some(waiting) = self.waiting.take_if(|waiting| waiting.id == id)
        {
            self.settle(waiting.ask, told(status, &body));
            self.next_at = now.after_nanos(self.chance.between(0, 200 * MS));
        }
        match received {
            Ok(()) if goodbye && self.waiting.is_none() => self.disconnect(now, wishes),
            Ok(()) => {}
            Err(Lost::Refused { .. }) => self.disconnect(now, wishes),
            Err(lost) => panic!("operator {}: {lost}", self.number),
        }
    }

    /// The shard that it connects to on a node.
    pub(super) fn shard_of(&mut self, shards: u32) -> u32 {
        u32::try_from(self.chance.below(u64::from(shards))).expect("a few shards")
    }
}

fn told(status: Status, body: &[u8]) -> Told {
    match status.class() {
        Class::Answered => {
            let reply: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
            Told::Done(reply["id"].as_u64().unwrap_or_default())
        }
        _ if status == Status::FAILED => Told::Refused,
        Class::Refused | Class::NotStarted => Told::NotStarted,
        Class::MayBeApplied => Told::Perhaps,
    }
}

/// What was asked, and told so far.
fn all(operators: &[Operator]) -> impl Iterator<Item = (&Ask, Told)> {
    operators.iter().flat_map(|operator| {
        let waiting = operator.waiting.iter().map(|waiting| (&waiting.ask, Told::Perhaps));
        operator.ledger.iter().map(|(ask, told)| (ask, *told)).chain(waiting)
    })
}

/// How many changes the operators were told are made, and how many may be.
pub(super) fn counts(operators: &[Operator]) -> (u64, u64) {
    let count = |is: fn(Told) -> bool| all(operators).filter(|(_, told)| is(*told)).count() as u64;
    (count(|told| matches!(told, Told::Done(_))), count(|told| told == Told::Perhaps))
}

/// What is wrong with the catalogue that all nodes have in the end.
pub(super) fn check(operators: &[Operator], catalogue: &Catalogue) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut ids: BTreeMap<u64, &str> = BTreeMap::new();
    let mut made: BTreeSet<&str> = BTreeSet::new();
    let dropped: BTreeSet<&str> = all(operators)
        .filter_map(|(ask, told)| match ask {
            Ask::Drop(name) if told != Told::NotStarted => Some(name.as_str()),
            _ => None,
        })
        .collect();
    for (ask, told) in all(operators) {
        let (Ask::Create(name) | Ask::Drop(name)) = ask else { continue };
        let found = catalogue.by_name(name).map(|it| u64::from(it.id.0));
        // Nobody else wants such a name.
        let is_own = name.starts_with("own");
        match (ask, told) {
            (Ask::Create(_), Told::Done(id)) => {
                if let Some(other) = ids.insert(id, name) {
                    wrong.push(format!("{id} was given to {other} and to {name}"));
                }
                if !made.insert(name) {
                    wrong.push(format!("{name} was created twice"));
                }
                if !dropped.contains(name.as_str()) && found != Some(id) {
                    wrong.push(format!("{name} was created as {id} and is {found:?}"));
                }
            }
            (Ask::Drop(_), Told::Done(_)) if found.is_some() => {
                wrong.push(format!("{name} was dropped and is there"));
            }
            (Ask::Create(_), Told::NotStarted) if found.is_some() && is_own => {
                wrong.push(format!("{name} was not started and is there"));
            }
            (Ask::Create(_), Told::Refused) if is_own => {
                wrong.push(format!("{name} was refused, and nobody else wants it"));
            }
            (Ask::Drop(_), Told::Refused) => {
                wrong.push(format!("{name} could not be dropped, and nobody else would"));
            }
            _ => {}
        }
    }
    wrong
}
