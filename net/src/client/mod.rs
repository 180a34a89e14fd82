//! The client driver: pooled, pipelined, shard-aware, with deadlines and safe retries.
//!
//! [`Client`] is asynchronous and runs on any executor: its own threads do the I/O and wake its
//! futures. [`BlockingClient`] is the same without `async`. Both are cheap to clone and share
//! their connections, one per (node, shard).
//!
//! Invariants: a request that may have happened is never sent again unless that is harmless; no
//! operation outlives its deadline; every error says whether the request may have happened
//! ([`Error::class`]).
//!
//! ```no_run
//! use annulus_net::client::{BlockingClient, ClientOptions, WriteOptions};
//! use annulus_net::wire::Condition;
//!
//! # fn main() -> Result<(), annulus_net::client::Error> {
//! let client = BlockingClient::connect(ClientOptions::new(["127.0.0.1:7301"]))?;
//! let users = client.namespace("default")?;
//! users.put(b"user:1", b"Ada")?;
//! assert_eq!(users.get(b"user:1")?, Some(b"Ada".to_vec()));
//!
//! // Compare and set: only if nobody has written since.
//! let read = users.read(b"user:1", &Default::default())?;
//! let seen = read.values[0].version;
//! let options = WriteOptions { condition: Condition::IfVersion(seen), ..Default::default() };
//! users.put_with(b"user:1", b"Ada Lovelace", &options)?;
//! # Ok(()) }
//! ```

mod blocking;
mod link;
mod pool;
mod retry;
#[cfg(test)]
mod tests;
mod timer;
mod types;

use std::hash::{BuildHasher as _, Hasher as _};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::time::Duration;

use annulus_engine::model::{Instant, NamespaceId, Record, Token, TokenRange};
use futures_channel::oneshot;

pub use blocking::{BlockingClient, BlockingNamespace, Pipeline, Records};
pub use types::{
    BatchAnswer, BatchOperation, ClientOptions, Context, Error, Preset, Read, ReadOptions, Result,
    Sibling, WriteOptions, Written,
};

use crate::client_connection::Unsent;
use crate::wire::fields::{OnceId, OperationFlags, Ttl};
use crate::wire::hello::{FEATURE_ONCE, Mode, Welcome};
use crate::wire::operation::{self, Delete, Get, Operation, Put};
use crate::wire::request::{Admin, Outgoing};
use crate::wire::response::{PageRef, ReadReply, decode_batch, decode_failure, decode_write};
use crate::wire::scan::Scan;
use crate::wire::status::{Class, Status};
use link::{Answer, Ended, Flush};
use pool::Pool;
use timer::Timer;

/// An asynchronous client of one cluster. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    pool: Arc<Pool>,
    flush: Flush,
}

/// What a second execution of a request would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Nothing: reads.
    None,
    /// Nothing more: writes with a once-id.
    Once,
    /// It would happen again.
    Again,
}

impl Client {
    /// Connects to the first address that answers.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when none does in time.
    pub async fn connect(options: ClientOptions) -> Result<Client> {
        let unreachable = |error: std::io::Error| Error::Unreachable { what: error.to_string() };
        let timer = Timer::start().map_err(unreachable)?;
        let seed = options.seed.unwrap_or_else(random_seed);
        let client = Client { pool: Pool::new(options, timer, seed), flush: Flush::Writer };
        client.refresh().await?;
        Ok(client)
    }

    /// A handle of the namespace with this name.
    ///
    /// # Errors
    /// [`Error::NoNamespace`], also after asking the server again.
    pub async fn namespace(&self, name: &str) -> Result<Namespace> {
        if self.pool.namespace(name).is_none() {
            self.refresh().await?;
        }
        let (id, mode) = self
            .pool
            .namespace(name)
            .ok_or_else(|| Error::NoNamespace { name: name.to_owned() })?;
        Ok(Namespace { client: self.clone(), id, mode, name: name.to_owned(), resolver: None })
    }

    /// Asks the server for its facts again: namespaces, nodes, partition map.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when no server answers in time.
    pub async fn refresh(&self) -> Result<()> {
        let deadline = self.deadline(Some(self.pool.options.connect_timeout.saturating_mul(2)));
        self.introduce(deadline).await
    }

    /// What the server last said of itself: limits, hash seed, partition map, namespaces.
    #[must_use]
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.pool.welcome()
    }

    /// Sends nothing much and waits for it to come back. The round trip.
    ///
    /// # Errors
    /// [`Error`] when it does not.
    pub async fn ping(&self) -> Result<Duration> {
        let start = self.pool.timer.clock.now();
        self.call(None, &Outgoing::Ping(b"ping"), Effect::None, None).await?;
        Ok(Duration::from_nanos(self.pool.timer.clock.now().nanos_since(start)))
    }

    /// Counters of a node, as JSON.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn stats(&self) -> Result<String> {
        let answer = self.call(None, &Outgoing::Stats, Effect::None, None).await?;
        json(answer)
    }

    /// Runs an admin command; arguments and result are JSON documents.
    ///
    /// # Errors
    /// [`Error`]; it is not tried again if it may have happened.
    pub async fn admin(
        &self,
        command: &str,
        json_arguments: &str,
        timeout: Option<Duration>,
    ) -> Result<String> {
        if command.len() > crate::wire::request::COMMAND_SIZE_MAX {
            return Err(too_big("command", crate::wire::request::COMMAND_SIZE_MAX));
        }
        let request = Outgoing::Admin(Admin { command, json: json_arguments });
        json(self.call(None, &request, Effect::Again, timeout).await?)
    }

    /// Token of a key, as this cluster hashes it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the key is said to be a hash and is shorter than 8 bytes.
    pub fn token(&self, key: &[u8], flags: OperationFlags) -> Result<Token> {
        if flags.has(OperationFlags::HASHED) {
            return Token::of_hashed_key(key).ok_or_else(|| Error::Refused {
                status: Status::BAD_REQUEST,
                detail: 0,
                message: "hashed key is shorter than 8 bytes".to_owned(),
            });
        }
        let seed = self.pool.welcome().map_or(0, |welcome| welcome.hash_seed);
        Ok(Token::of_key(key, seed))
    }

    fn deadline(&self, timeout: Option<Duration>) -> Instant {
        self.pool.timer.clock.after(timeout.unwrap_or(self.pool.options.timeout))
    }

    async fn introduce(&self, deadline: Instant) -> Result<()> {
        let introduced = self.pool.introduce();
        match self.within(deadline, introduced).await {
            Some(outcome) => outcome,
            None => Err(Error::Unreachable { what: "no server answered in time".to_owned() }),
        }
    }

    /// Waits for the receiver or the deadline.
    async fn within<T>(&self, deadline: Instant, receiver: oneshot::Receiver<T>) -> Option<T> {
        let mut receiver = pin!(receiver);
        let mut timer = pin!(self.pool.timer.wait_until(deadline));
        std::future::poll_fn(|context| {
            if let Poll::Ready(outcome) = receiver.as_mut().poll(context) {
                return Poll::Ready(outcome.ok());
            }
            timer.as_mut().poll(context).map(|_| None)
        })
        .await
    }

    /// Sends a request and waits for its answer, trying again while that is safe, the budget
    /// lasts and there is time.
    async fn call(
        &self,
        token: Option<Token>,
        request: &Outgoing<'_>,
        effect: Effect,
        timeout: Option<Duration>,
    ) -> Result<Answer> {
        let deadline = self.deadline(timeout);
        let mut attempt = 0;
        loop {
            let error = match self.attempt(token, request, effect, deadline, attempt).await {
                Ok(answer) => {
                    self.pool.retry().succeeded();
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let (safe, at_least) = match &error {
                Error::NotStarted { retry_after, .. } => (true, *retry_after),
                Error::Unreachable { .. } => (true, Duration::ZERO),
                Error::MayBeApplied { .. } => (effect != Effect::Again, Duration::ZERO),
                _ => (false, Duration::ZERO),
            };
            if !safe {
                return Err(error);
            }
            let Some(wait) = self.pool.retry().next(attempt, at_least) else { return Err(error) };
            let until = self.pool.timer.clock.after(wait);
            if until >= deadline {
                return Err(error);
            }
            // A timer that is gone releases its waits: the client is being dropped.
            let _ = self.pool.timer.wait_until(until).await;
            attempt += 1;
        }
    }

    /// One attempt at one server.
    async fn attempt(
        &self,
        token: Option<Token>,
        request: &Outgoing<'_>,
        effect: Effect,
        deadline: Instant,
        attempt: u32,
    ) -> Result<Answer> {
        let outcome = self.start(token, request, deadline, attempt).await?.outcome().await;
        let unsure = |what: &str| match effect {
            Effect::None => Error::not_started(Status::UNAVAILABLE, what),
            Effect::Once | Effect::Again => Error::may_be_applied(what),
        };
        match outcome {
            Ok(Ok(answer)) if answer.status.class() == Class::Answered => Ok(answer),
            Ok(Ok(answer)) => Err(match decode_failure(answer.status, &answer.body) {
                Ok(failure) => Error::of(&failure),
                Err(malformed) => unsure(malformed.0),
            }),
            Ok(Err(Ended::TimedOut)) => Err(unsure("no answer before the deadline")),
            Ok(Err(Ended::Lost)) | Err(oneshot::Canceled) => {
                Err(unsure("the connection was lost before the answer"))
            }
        }
    }

    /// Sends a request, waiting for a connection and for room. Nothing was sent on errors.
    async fn start(
        &self,
        token: Option<Token>,
        request: &Outgoing<'_>,
        deadline: Instant,
        attempt: u32,
    ) -> Result<Started> {
        loop {
            let Some(chosen) = self.pool.choose(token, attempt) else {
                self.introduce(deadline).await?;
                if self.pool.choose(token, attempt).is_none() {
                    return Err(Error::Unreachable { what: "the connection was lost".to_owned() });
                }
                continue;
            };
            match chosen.link.send(deadline, chosen.route, request, self.flush) {
                Ok(receiver) => return Ok(Started { receiver, link: chosen.link }),
                Err(Unsent::WindowFull) => {
                    let room = chosen.link.wait_for_room();
                    if self.within(deadline, room).await.is_none()
                        && self.pool.timer.clock.now() >= deadline
                    {
                        let what = "the server took no more requests before the deadline";
                        return Err(Error::not_started(Status::BUSY, what));
                    }
                }
                Err(Unsent::TooBig { limit }) => {
                    return Err(Error::Refused {
                        status: Status::TOO_BIG,
                        detail: limit,
                        message: "request".to_owned(),
                    });
                }
                // The next choice leaves it out.
                Err(Unsent::Closing | Unsent::NotOpen) => {}
            }
        }
    }
}

/// A request that was sent. Holds on to its connection, which would end when it is replaced by
/// another one in its slot.
struct Started {
    receiver: oneshot::Receiver<link::Outcome>,
    link: Arc<link::Link>,
}

impl Started {
    async fn outcome(self) -> std::result::Result<link::Outcome, oneshot::Canceled> {
        let outcome = self.receiver.await;
        drop(self.link);
        outcome
    }
}

/// Reconciles concurrent values of a key into one.
pub type Resolver = Arc<dyn Fn(&[Sibling]) -> Vec<u8> + Send + Sync>;

/// A namespace of a cluster: where keys live. Cheap to clone.
#[derive(Clone)]
pub struct Namespace {
    client: Client,
    id: NamespaceId,
    mode: Mode,
    name: String,
    resolver: Option<Resolver>,
}

impl Namespace {
    /// The same namespace, whose reads of one value reconcile concurrent ones with this function
    /// and write the result back with their context.
    #[must_use]
    pub fn with_resolver(
        mut self,
        resolver: impl Fn(&[Sibling]) -> Vec<u8> + Send + Sync + 'static,
    ) -> Namespace {
        self.resolver = Some(Arc::new(resolver));
        self
    }

    /// Its id on the wire.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// How it keeps versions.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The client it belongs to.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The value of a key; `None` when absent.
    ///
    /// # Errors
    /// [`Error::Siblings`] when there are several and no resolver is set; else as [`Error`] says.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut read = self.read(key, &ReadOptions::default()).await?;
        match (read.values.len(), &self.resolver) {
            (0 | 1, _) => Ok(read.values.pop().map(|sibling| sibling.value)),
            (count, None) => Err(Error::Siblings { count }),
            (_, Some(resolver)) => {
                let value = resolver(&read.values);
                let options = WriteOptions { context: read.context, ..WriteOptions::default() };
                self.put_with(key, &value, &options).await?;
                Ok(Some(value))
            }
        }
    }

    /// Everything there is to know of a key: all live values, context, freshness.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn read(&self, key: &[u8], options: &ReadOptions) -> Result<Read> {
        let get = self.get_operation(key, options)?;
        let request = Outgoing::Operation(get);
        let answer =
            self.client.call(Some(get.token()), &request, Effect::None, options.timeout).await?;
        read_of(&answer.body)
    }

    /// Writes a value.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn put(&self, key: &[u8], value: &[u8]) -> Result<Written> {
        self.put_with(key, value, &WriteOptions::default()).await
    }

    /// Writes a value, under conditions.
    ///
    /// # Errors
    /// [`Error::ConditionFailed`] when the condition is false; else as [`Error`] says.
    pub async fn put_with(
        &self,
        key: &[u8],
        value: &[u8],
        options: &WriteOptions,
    ) -> Result<Written> {
        let once = self.once();
        let put = self.put_operation(key, value, options, once)?;
        self.write(put, once, options.timeout).await
    }

    /// Deletes a key. Deleting what is absent is no error.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn delete(&self, key: &[u8]) -> Result<Written> {
        self.delete_with(key, &WriteOptions::default()).await
    }

    /// Deletes a key, under conditions.
    ///
    /// # Errors
    /// [`Error::ConditionFailed`] when the condition is false; else as [`Error`] says.
    pub async fn delete_with(&self, key: &[u8], options: &WriteOptions) -> Result<Written> {
        let once = self.once();
        let delete = self.delete_operation(key, options, once)?;
        self.write(delete, once, options.timeout).await
    }

    /// Several operations, each with its own result, in order. They are split by where their keys
    /// live; nothing is promised across keys. A part that may have happened is not sent again.
    ///
    /// # Errors
    /// None as a whole: each operation has its own.
    pub async fn batch(
        &self,
        operations: &[BatchOperation],
        timeout: Option<Duration>,
    ) -> Vec<Result<BatchAnswer>> {
        let deadline = self.client.deadline(timeout);
        let mut results: Vec<Option<Result<BatchAnswer>>> = Vec::new();
        results.resize_with(operations.len(), || None);
        let mut sent = Vec::new();
        for part in self.split(operations, &mut results) {
            let wire: Vec<Operation<'_>> = part.iter().map(|&(_, operation)| operation).collect();
            let request = Outgoing::Batch(&wire);
            let token = wire.first().map(Operation::token);
            let outcome = self.client.start(token, &request, deadline, 0).await;
            sent.push((part, outcome));
        }
        for (part, outcome) in sent {
            let answer = match outcome {
                Ok(started) => batch_outcome(started.outcome().await),
                Err(error) => Err(error),
            };
            fill_results(&part, answer, &mut results);
        }
        let missing = || Err(Error::Protocol { what: "an operation has no result".to_owned() });
        results.into_iter().map(|result| result.unwrap_or_else(missing)).collect()
    }

    /// The records of the namespace in `(token, key)` order, page by page.
    #[must_use]
    pub fn scan(&self, options: ScanOptions) -> Scanner {
        Scanner { namespace: self.clone(), next: Some((options.range.first, Vec::new())), options }
    }

    fn once(&self) -> Option<OnceId> {
        let pool = &self.client.pool;
        let features = pool.welcome().map_or(0, |welcome| welcome.features);
        (features & FEATURE_ONCE != 0)
            .then(|| OnceId { client: pool.client_id, number: pool.once_number() })
    }

    async fn write(
        &self,
        operation: Operation<'_>,
        once: Option<OnceId>,
        timeout: Option<Duration>,
    ) -> Result<Written> {
        let effect = if once.is_some() { Effect::Once } else { Effect::Again };
        let request = Outgoing::Operation(operation);
        let answer = self.client.call(Some(operation.token()), &request, effect, timeout).await?;
        written_of(answer.status, &answer.body)
    }

    fn get_operation<'a>(&self, key: &'a [u8], options: &ReadOptions) -> Result<Operation<'a>> {
        check_key(key)?;
        let staleness = options.max_staleness.map_or(0, |bound| bound.as_millis().max(1));
        Ok(Operation::Get(Get {
            token: self.client.token(key, options.flags)?,
            namespace: self.id,
            key,
            level: options.level,
            primary: options.primary,
            max_staleness_ms: u32::try_from(staleness).unwrap_or(u32::MAX),
            flags: options.flags,
        }))
    }

    fn put_operation<'a>(
        &self,
        key: &'a [u8],
        value: &'a [u8],
        options: &'a WriteOptions,
        once: Option<OnceId>,
    ) -> Result<Operation<'a>> {
        let ttl = options.ttl;
        if ttl == Ttl::Millis(0) {
            return Err(Error::Refused {
                status: Status::BAD_REQUEST,
                detail: 0,
                message: "ttl of zero".to_owned(),
            });
        }
        let limit = self.client.welcome().map_or(0, |welcome| welcome.limits.value_size_max);
        if value.len() > limit as usize {
            return Err(too_big("value", limit as usize));
        }
        let token = self.write_token(key, options)?;
        let options = write_options(options, once);
        Ok(Operation::Put(Put { token, namespace: self.id, key, value, ttl, options }))
    }

    fn delete_operation<'a>(
        &self,
        key: &'a [u8],
        options: &'a WriteOptions,
        once: Option<OnceId>,
    ) -> Result<Operation<'a>> {
        let token = self.write_token(key, options)?;
        let options = write_options(options, once);
        Ok(Operation::Delete(Delete { token, namespace: self.id, key, options }))
    }

    fn write_token(&self, key: &[u8], options: &WriteOptions) -> Result<Token> {
        check_key(key)?;
        let context = options.context.as_ref().map_or(0, |context| context.0.len());
        if context > operation::CONTEXT_SIZE_MAX {
            return Err(too_big("context", operation::CONTEXT_SIZE_MAX));
        }
        self.client.token(key, options.flags)
    }

    /// Groups operations by where they go, within the server's limits.
    fn split<'a>(
        &self,
        operations: &'a [BatchOperation],
        results: &mut [Option<Result<BatchAnswer>>],
    ) -> Vec<Vec<(usize, Operation<'a>)>> {
        let Some(welcome) = self.client.welcome() else { return Vec::new() };
        let mut keyed = Vec::new();
        for (index, operation) in operations.iter().enumerate() {
            let made = match operation {
                BatchOperation::Get { key, options } => self.get_operation(key, options),
                BatchOperation::Put { key, value, options } => {
                    self.put_operation(key, value, options, self.once())
                }
                BatchOperation::Delete { key, options } => {
                    self.delete_operation(key, options, self.once())
                }
            };
            match made {
                Ok(operation) => {
                    let home = welcome.replicas(operation.token()).first().copied();
                    keyed.push((home.map(|home| (home.node, home.shard)), index, operation));
                }
                Err(error) => results[index] = Some(Err(error)),
            }
        }
        keyed.sort_by_key(|&(home, index, _)| (home, index));
        let mut parts: Vec<Vec<(usize, Operation<'a>)>> = Vec::new();
        let (mut last_home, mut bytes) = (None, 0);
        for (home, index, operation) in keyed {
            let size = operation.size();
            match parts.last_mut() {
                Some(part)
                    if last_home == Some(home)
                        && part.len() < welcome.limits.batch_count_max as usize
                        && bytes + size <= welcome.limits.message_size_max as usize =>
                {
                    part.push((index, operation));
                    bytes += size;
                }
                _ => {
                    parts.push(vec![(index, operation)]);
                    last_home = Some(home);
                    bytes = crate::wire::batch::BATCH_HEADER_SIZE + size;
                }
            }
        }
        parts
    }
}

fn batch_outcome(outcome: std::result::Result<link::Outcome, oneshot::Canceled>) -> Result<Answer> {
    match outcome {
        Ok(Ok(answer)) if answer.status == Status::OK => Ok(answer),
        Ok(Ok(answer)) => Err(decode_failure(answer.status, &answer.body).map_or_else(
            |malformed| Error::may_be_applied(malformed.0),
            |failure| Error::of(&failure),
        )),
        Ok(Err(Ended::TimedOut)) => Err(Error::may_be_applied("no answer before the deadline")),
        Ok(Err(Ended::Lost)) | Err(oneshot::Canceled) => {
            Err(Error::may_be_applied("the connection was lost before the answer"))
        }
    }
}

/// Distributes the answer to one part of a batch.
fn fill_results(
    part: &[(usize, Operation<'_>)],
    answer: Result<Answer>,
    results: &mut [Option<Result<BatchAnswer>>],
) {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            for &(index, _) in part {
                results[index] = Some(Err(error.clone()));
            }
            return;
        }
    };
    // What is malformed leaves its operations without a result, which the caller reports.
    let _ = decode_batch(&answer.body, &mut |result| {
        if let Some(&(index, operation)) = part.get(result.index as usize) {
            let answered = result.status.class() == Class::Answered;
            let outcome = match operation {
                _ if !answered => Err(decode_failure(result.status, result.body).map_or_else(
                    |broken| Error::may_be_applied(broken.0),
                    |failure| Error::of(&failure),
                )),
                Operation::Get(_) => read_of(result.body).map(BatchAnswer::Read),
                _ => written_of(result.status, result.body).map(BatchAnswer::Written),
            };
            results[index] = Some(outcome);
        }
        Ok(())
    });
}

/// What to scan.
#[derive(Clone, Copy, Debug)]
pub struct ScanOptions {
    /// The tokens wanted.
    pub range: TokenRange,
    /// Most records of a page; 0 for the server's limit.
    pub count_max: u32,
    /// `KEYS_ONLY`, `TOMBSTONES` of `wire::scan`.
    pub flags: u16,
    /// Time for each page; `None` for the client's.
    pub timeout: Option<Duration>,
}

impl Default for ScanOptions {
    fn default() -> ScanOptions {
        ScanOptions { range: TokenRange::FULL, count_max: 0, flags: 0, timeout: None }
    }
}

/// A scan under way. Holds nothing at the server.
#[derive(Clone)]
pub struct Scanner {
    namespace: Namespace,
    options: ScanOptions,
    next: Option<(Token, Vec<u8>)>,
}

impl Scanner {
    /// The next page, never empty; `None` at the end.
    ///
    /// # Errors
    /// [`Error`]; the same page can be asked for again.
    pub async fn next_page(&mut self) -> Result<Option<Vec<Record>>> {
        while let Some((first, after)) = &self.next {
            let scan = Scan {
                namespace: self.namespace.id,
                count_max: self.options.count_max,
                bytes_max: 0,
                flags: self.options.flags,
                range: TokenRange { first: *first, last: self.options.range.last },
                after,
            };
            let client = &self.namespace.client;
            let request = Outgoing::Scan(scan);
            let answer =
                client.call(Some(*first), &request, Effect::None, self.options.timeout).await?;
            let page = PageRef::decode(&answer.body, self.namespace.id).map_err(broken)?;
            let records: Vec<Record> =
                page.records.iter().map(|record| record.to_owned()).collect();
            let next = page.next.map(|(token, key)| (token, key.to_vec()));
            let stuck = next.as_ref() == self.next.as_ref() && records.is_empty();
            if stuck || next.as_ref().is_some_and(|next| next < &(*first, Vec::new())) {
                return Err(Error::Protocol { what: "a scan goes backwards".to_owned() });
            }
            self.next = next.filter(|(token, _)| *token <= self.options.range.last);
            if !records.is_empty() {
                return Ok(Some(records));
            }
        }
        Ok(None)
    }
}

fn check_key(key: &[u8]) -> Result<()> {
    let limit = annulus_engine::model::limits::KEY_SIZE_MAX;
    match key.len() {
        0 => Err(Error::Refused {
            status: Status::BAD_REQUEST,
            detail: 0,
            message: "key is empty".to_owned(),
        }),
        size if size > limit => Err(too_big("key", limit)),
        _ => Ok(()),
    }
}

fn too_big(what: &str, limit: usize) -> Error {
    Error::Refused { status: Status::TOO_BIG, detail: limit as u64, message: what.to_owned() }
}

fn write_options(options: &WriteOptions, once: Option<OnceId>) -> operation::WriteOptions<'_> {
    operation::WriteOptions {
        level: options.level,
        primary: options.primary,
        durable: options.durable,
        condition: options.condition,
        context: options.context.as_ref().map(|context| context.0.as_slice()),
        once,
        flags: options.flags,
    }
}

fn broken(malformed: crate::wire::codec::Malformed) -> Error {
    Error::Protocol { what: malformed.0.to_owned() }
}

fn read_of(body: &[u8]) -> Result<Read> {
    ReadReply::decode(body).map(|reply| Read::of(&reply)).map_err(broken)
}

fn written_of(status: Status, body: &[u8]) -> Result<Written> {
    // The write was answered, but how is unreadable.
    let facts = decode_write(body).map_err(|malformed| Error::may_be_applied(malformed.0))?;
    let written = Written::of(&facts);
    match status {
        Status::CONDITION_FALSE => {
            Err(Error::ConditionFailed { current: written.version, context: written.context })
        }
        _ => Ok(written),
    }
}

fn json(answer: Answer) -> Result<String> {
    String::from_utf8(answer.body)
        .map_err(|_| Error::Protocol { what: "JSON is not UTF-8".to_owned() })
}

/// A seed that differs from process to process, from the standard library's own.
fn random_seed() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// Runs a future on the calling thread.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = TaskContext::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}
