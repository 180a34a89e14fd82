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
//! With several nodes it goes on when one is dead or answers nothing: new requests go to others,
//! what is harmless to send twice is sent once more, and reads that are late are hedged, all
//! inside a budget ([`ClientOptions::retry_percent`]). See `net/README.md`, "The Rust driver".
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
mod budget;
mod choice;
mod health;
mod hedge;
mod link;
mod namespace;
mod nodes;
mod pool;
mod race;
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

use annulus_engine::model::{Instant, Token};
use futures_channel::oneshot;

pub use blocking::{BlockingClient, BlockingNamespace, Pipeline, Records};
pub use namespace::{Namespace, Resolver, ScanOptions, Scanner};
pub use types::{
    BatchAnswer, BatchOperation, ClientOptions, Context, Error, Preset, Read, ReadOptions, Result,
    Sibling, WriteOptions, Written,
};

use crate::wire::fields::{OperationFlags, Version};
use crate::wire::hello::Welcome;
use crate::wire::request::{Admin, Outgoing};
use crate::wire::status::Status;
use health::Kind;
use link::{Answer, Flush};
use namespace::too_big;
use pool::Pool;
use race::{Ask, Tries};
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
    /// As `Again`; but a node that has not seen the version that is named does not judge it.
    Versioned(Version),
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
        self.call(None, Kind::Long, &Outgoing::Ping(b"ping"), Effect::None, None).await?;
        Ok(Duration::from_nanos(self.pool.timer.clock.now().nanos_since(start)))
    }

    /// Counters of a node, as JSON.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn stats(&self) -> Result<String> {
        let answer = self.call(None, Kind::Long, &Outgoing::Stats, Effect::None, None).await?;
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
        json(self.call(None, Kind::Long, &request, Effect::Again, timeout).await?)
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
    async fn within<T>(
        &self,
        deadline: Instant,
        receiver: impl Future<Output = std::result::Result<T, oneshot::Canceled>>,
    ) -> Option<T> {
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

    /// Sends a request and waits for its answer.
    async fn call(
        &self,
        token: Option<Token>,
        kind: Kind,
        request: &Outgoing<'_>,
        effect: Effect,
        timeout: Option<Duration>,
    ) -> Result<Answer> {
        let deadline = self.deadline(timeout);
        let ask = Ask { token, request, effect, kind, deadline };
        self.settle(&ask, Tries::default()).await
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
