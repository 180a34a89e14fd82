//! The Annulus protocol as a [`Target`]: `ClientConnection`, and what a load needs around it.
//!
//! Invariant: a request's id at the caller comes back with its reply exactly once, whatever ids
//! the connection uses. What the server's window does not take yet waits here, as in the client
//! driver: in order, or the newest first once the oldest has waited for half of its time; what
//! waits beyond its deadline is not sent at all.
//!
//! A request carries the time that is left until its deadline. Answers that come later are
//! answers all the same: the load loop says what they are worth.

use std::collections::VecDeque;
use std::io::{self, Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use annulus_engine::model::{Instant, NamespaceId, Token, TokenRange};
use annulus_net::client_connection::{ClientConnection, Event};
use annulus_net::wire::hello::{ANY_SHARD, Hello, Welcome};
use annulus_net::wire::request::Outgoing;
use annulus_net::wire::response::{ReadReply, decode_failure};
use annulus_net::wire::scan::Scan;
use annulus_net::wire::{
    Class, Get, Level, Operation, OperationFlags, Put, Status, Ttl, WriteOptions,
};

use crate::target::{Reply, Target, Write};

/// Remaining time that requests carry where the load has no deadline.
const DEADLINE: Instant = Instant(30_000_000_000);
const BEGIN: Instant = Instant(0);
/// How a request ends that was not sent in time.
pub const UNSENT: &str = "its deadline passed before it was sent";

/// What the load's connections share: how to ask, and what the server said of itself.
#[derive(Clone, Debug)]
pub struct Plan {
    namespace: NamespaceId,
    read_level: Level,
    write_level: Level,
    hash_seed: u64,
    partition_bits: u32,
    /// The shard of each partition; empty when connections are not to be told apart.
    shards: Arc<[u32]>,
    shard_count: u32,
}

/// How to ask.
#[derive(Clone, Debug)]
pub struct Levels {
    /// Name of the namespace.
    pub namespace: String,
    /// R of reads.
    pub read: Level,
    /// W of writes.
    pub write: Level,
}

/// Asks a server who it is.
///
/// # Errors
/// Connecting, or what answers does not speak the protocol.
pub fn discover(address: SocketAddr) -> io::Result<Welcome> {
    let broken = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut out = Vec::new();
    let mut connection = ClientConnection::new(&hello(ANY_SHARD), DEADLINE, &mut out);
    stream.write_all(&out)?;
    let mut input = vec![0; 64 << 10];
    let mut welcome = None;
    while welcome.is_none() {
        let size = stream.read(&mut input)?;
        if size == 0 {
            return Err(broken("the server closed the connection at HELLO".to_owned()));
        }
        let mut visit = |event: Event<'_>| {
            if let Event::Welcome(facts) = event {
                welcome = Some(facts);
            }
        };
        connection.receive(&input[..size], &mut visit).map_err(|lost| broken(lost.to_string()))?;
    }
    Ok(welcome.expect("the loop ended with one"))
}

fn hello(shard: u32) -> Hello<'static> {
    Hello { shard, name: "annulus-bench", ..Hello::default() }
}

impl Plan {
    /// A plan for a server; `by_shard`: each connection serves the keys of one shard.
    ///
    /// # Errors
    /// A sentence when the server has no such namespace.
    pub fn new(welcome: &Welcome, levels: &Levels, by_shard: bool) -> Result<Plan, String> {
        let namespace = welcome.namespaces.iter().find(|fact| fact.name == levels.namespace);
        let namespace =
            namespace.ok_or_else(|| format!("there is no namespace {}", levels.namespace))?;
        let own = |replicas: &[annulus_net::wire::hello::Replica]| {
            replicas.iter().find(|replica| replica.node == welcome.node).map(|found| found.shard)
        };
        let mut shards = Vec::new();
        for run in &welcome.runs {
            // Partitions of other nodes go to any connection, and hop.
            let shard = own(&run.replicas).unwrap_or(ANY_SHARD);
            shards.extend(std::iter::repeat_n(shard, run.length as usize));
        }
        let whole = shards.len() == 1 << welcome.partition_bits;
        if !(by_shard && whole && welcome.shard_count > 1) {
            shards.clear();
        }
        Ok(Plan {
            namespace: namespace.id,
            read_level: levels.read,
            write_level: levels.write,
            hash_seed: welcome.hash_seed,
            partition_bits: u32::from(welcome.partition_bits),
            shards: shards.into(),
            shard_count: welcome.shard_count.max(1),
        })
    }

    /// The `index`-th connection.
    #[must_use]
    pub fn connect(&self, index: usize) -> Annulus {
        let count = self.shard_count as usize;
        let shard = if self.shards.is_empty() {
            ANY_SHARD
        } else {
            u32::try_from(index % count).expect("below a shard count")
        };
        Annulus {
            plan: self.clone(),
            shard,
            connection: None,
            welcome: None,
            asked: AHashMap::new(),
            backlog: VecDeque::new(),
            now: BEGIN,
            deadline: DEADLINE,
        }
    }

    fn shard_of(&self, key: &[u8]) -> u32 {
        let partition = Token::of_key(key, self.hash_seed).partition(self.partition_bits);
        self.shards.get(partition.0 as usize).copied().unwrap_or(ANY_SHARD)
    }
}

/// What was asked, to read the answer by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Get,
    Put,
    Scan,
}

/// A request that the server's window does not take yet.
#[derive(Debug)]
struct Held {
    id: u32,
    asked: Asked,
    key: Vec<u8>,
    value: Vec<u8>,
    count: u32,
    since: Instant,
    deadline: Instant,
}

/// One connection.
#[derive(Debug)]
pub struct Annulus {
    plan: Plan,
    shard: u32,
    connection: Option<ClientConnection>,
    welcome: Option<Welcome>,
    /// The caller's id by the connection's.
    asked: AHashMap<u32, (u32, Asked)>,
    backlog: VecDeque<Held>,
    now: Instant,
    /// Of requests that are made now.
    deadline: Instant,
}

impl Annulus {
    /// Sends, unless the window is full or the server has said goodbye.
    fn try_send(&mut self, held: &Request<'_>, out: &mut Vec<u8>) -> bool {
        let plan = &self.plan;
        let token = Token::MIN; // Not sent: the server makes its own.
        let namespace = plan.namespace;
        let outgoing = match held.asked {
            Asked::Get => Outgoing::Operation(Operation::Get(Get {
                token,
                namespace,
                key: held.key,
                level: plan.read_level,
                primary: Level::Default,
                max_staleness_ms: 0,
                flags: OperationFlags::default(),
            })),
            Asked::Put => Outgoing::Operation(Operation::Put(Put {
                token,
                namespace,
                key: held.key,
                value: held.value.into(),
                ttl: Ttl::Default,
                options: WriteOptions { level: plan.write_level, ..WriteOptions::default() },
            })),
            Asked::Scan => Outgoing::Scan(Scan {
                namespace,
                count_max: held.count,
                bytes_max: 0,
                flags: 0,
                range: TokenRange {
                    first: Token::of_key(held.key, plan.hash_seed),
                    last: Token::MAX,
                },
                after: &[],
            }),
        };
        let Some(connection) = &mut self.connection else { return false };
        let Ok(id) = connection.send(self.now, held.deadline, 0, &outgoing, out) else {
            return false;
        };
        connection.fill_output(out, usize::MAX);
        self.asked.insert(id, (held.id, held.asked));
        true
    }

    fn send(&mut self, request: &Request<'_>, out: &mut Vec<u8>) {
        if !self.backlog.is_empty() || !self.try_send(request, out) {
            self.backlog.push_back(Held {
                id: request.id,
                asked: request.asked,
                key: request.key.to_vec(),
                value: request.value.to_vec(),
                count: request.count,
                since: self.now,
                deadline: request.deadline,
            });
        }
    }

    fn send_backlog(&mut self, out: &mut Vec<u8>, done: &mut dyn FnMut(u32, Reply<'_>)) {
        let now = self.now;
        while let Some(late) = self.backlog.pop_front_if(|held| held.deadline <= now) {
            done(late.id, Reply::NotStarted(UNSENT.to_owned()));
        }
        while let Some(oldest) = self.backlog.front() {
            let newest_first = now.nanos_since(oldest.since) > oldest.deadline.nanos_since(now);
            let next =
                if newest_first { self.backlog.pop_back() } else { self.backlog.pop_front() };
            let Some(held) = next else { return };
            let request = Request {
                id: held.id,
                asked: held.asked,
                key: &held.key,
                value: &held.value,
                count: held.count,
                deadline: held.deadline,
            };
            if !self.try_send(&request, out) {
                match newest_first {
                    true => self.backlog.push_back(held),
                    false => self.backlog.push_front(held),
                }
                return;
            }
        }
    }
}

/// A request as it is made.
struct Request<'a> {
    id: u32,
    asked: Asked,
    key: &'a [u8],
    value: &'a [u8],
    count: u32,
    deadline: Instant,
}

impl Target for Annulus {
    fn start(&mut self, out: &mut Vec<u8>) {
        self.connection = Some(ClientConnection::new(&hello(self.shard), DEADLINE, out));
    }

    fn ready(&self) -> bool {
        self.welcome.is_some()
    }

    fn check_sizes(&self, key_size: usize, value_size: usize) -> Result<(), String> {
        let Some(limits) = self.welcome.as_ref().map(|welcome| welcome.limits) else {
            return Ok(());
        };
        let checks = [
            ("keys", key_size, limits.key_size_max),
            ("values", value_size, limits.value_size_max),
        ];
        match checks.into_iter().find(|(_, size, limit)| *size > *limit as usize) {
            None => Ok(()),
            Some((what, size, limit)) => {
                Err(format!("{what} of {size} bytes are above the server's limit of {limit}"))
            }
        }
    }

    fn serves(&self, key: &[u8]) -> bool {
        if self.plan.shards.is_empty() {
            return true;
        }
        let shard = self.plan.shard_of(key);
        shard == self.shard || shard == ANY_SHARD
    }

    fn lane(&self) -> usize {
        if self.plan.shards.is_empty() { 0 } else { self.shard as usize }
    }

    fn set_time(&mut self, now: Duration, deadline: Duration) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        (self.now, self.deadline) = (Instant(nanos(now)), Instant(nanos(deadline)));
    }

    fn get(&mut self, id: u32, key: &[u8], out: &mut Vec<u8>) {
        let deadline = self.deadline;
        self.send(&Request { id, asked: Asked::Get, key, value: &[], count: 0, deadline }, out);
    }

    fn put(&mut self, id: u32, write: &Write<'_>, out: &mut Vec<u8>) {
        let (key, value, deadline) = (write.key, write.value, self.deadline);
        self.send(&Request { id, asked: Asked::Put, key, value, count: 0, deadline }, out);
    }

    fn scan(&mut self, id: u32, key: &[u8], count: u32, out: &mut Vec<u8>) -> bool {
        let deadline = self.deadline;
        self.send(&Request { id, asked: Asked::Scan, key, value: &[], count, deadline }, out);
        true
    }

    fn receive(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
        done: &mut dyn FnMut(u32, Reply<'_>),
    ) -> Result<(), String> {
        let Annulus { connection: Some(connection), welcome, asked, .. } = self else {
            return Err("bytes came before HELLO was said".to_owned());
        };
        let mut malformed = None;
        let mut visit = |event: Event<'_>| match event {
            Event::Welcome(facts) => *welcome = Some(facts),
            Event::Reply(reply) => {
                let Some((id, asked)) = asked.remove(&reply.id) else { return };
                if let Err(what) = answer(id, asked, reply.status, reply.body, done) {
                    malformed = Some(what);
                }
            }
            Event::TimedOut { id } => {
                let Some((id, asked)) = asked.remove(&id) else { return };
                done(id, unanswered(asked, "timed out"));
            }
            // Newer routes cost a hop until the next run; a goodbye is followed by the end.
            Event::Route(_) | Event::Goodbye { .. } => {}
        };
        connection.receive(bytes, &mut visit).map_err(|lost| lost.to_string())?;
        if let Some(what) = malformed {
            return Err(what);
        }
        self.send_backlog(out, done);
        Ok(())
    }
}

/// How a request without an answer ended.
fn unanswered(asked: Asked, why: &str) -> Reply<'static> {
    match asked {
        Asked::Put => Reply::MayBeApplied(why.to_owned()),
        Asked::Get | Asked::Scan => Reply::Refused(why.to_owned()),
    }
}

/// Reads an answer and passes it on.
fn answer(
    id: u32,
    asked: Asked,
    status: Status,
    body: &[u8],
    done: &mut dyn FnMut(u32, Reply<'_>),
) -> Result<(), String> {
    let broken = |malformed: annulus_net::wire::codec::Malformed| {
        format!("the server broke the protocol: {malformed}")
    };
    match (asked, status) {
        (Asked::Get, Status::OK) => {
            let read = ReadReply::decode(body).map_err(broken)?;
            match read.values.first() {
                Some(first) => done(id, Reply::Value(&first.value.side_by_side())),
                None => done(id, Reply::Absent),
            }
        }
        (Asked::Get, Status::NOT_FOUND) => done(id, Reply::Absent),
        (Asked::Put, Status::OK) => done(id, Reply::Written),
        (Asked::Scan, Status::OK) => {
            // A page begins with its count.
            let count = body.first_chunk().ok_or("a page without a count")?;
            done(id, Reply::Scanned(u32::from_le_bytes(*count)));
        }
        (_, status) => {
            let failure = decode_failure(status, body).map_err(broken)?;
            let reason = if failure.message.is_empty() {
                status.to_string()
            } else {
                format!("{status}: {}", failure.message)
            };
            done(
                id,
                match status.class() {
                    Class::NotStarted => Reply::NotStarted(reason),
                    Class::MayBeApplied => Reply::MayBeApplied(reason),
                    Class::Answered | Class::Refused => Reply::Refused(reason),
                },
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
