//! The client without `async`: the same operations, on the calling thread.
//!
//! Invariant: nothing here but waiting. The calling thread writes its own requests to the
//! socket, which saves a change of thread; so this is also the faster one for a lone request.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use annulus_engine::model::Record;

use super::link::Flush;
use super::types::{
    BatchAnswer, BatchOperation, ClientOptions, Read, ReadOptions, Result, Sibling, WriteOptions,
    Written,
};
use super::{Client, Namespace, ScanOptions, Scanner, block_on};
use crate::wire::hello::Welcome;

/// A blocking client of one cluster. Cheap to clone; may be used from many threads.
#[derive(Clone)]
pub struct BlockingClient {
    client: Client,
}

impl BlockingClient {
    /// As [`Client::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(options: ClientOptions) -> Result<BlockingClient> {
        let client = block_on(Client::connect(options))?;
        Ok(BlockingClient { client: Client { flush: Flush::Caller, ..client } })
    }

    /// As [`Client::namespace`].
    ///
    /// # Errors
    /// As there.
    pub fn namespace(&self, name: &str) -> Result<BlockingNamespace> {
        Ok(BlockingNamespace { namespace: block_on(self.client.namespace(name))? })
    }

    /// As [`Client::refresh`].
    ///
    /// # Errors
    /// As there.
    pub fn refresh(&self) -> Result<()> {
        block_on(self.client.refresh())
    }

    /// As [`Client::welcome`].
    #[must_use]
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.client.welcome()
    }

    /// As [`Client::ping`].
    ///
    /// # Errors
    /// As there.
    pub fn ping(&self) -> Result<Duration> {
        block_on(self.client.ping())
    }

    /// As [`Client::stats`].
    ///
    /// # Errors
    /// As there.
    pub fn stats(&self) -> Result<String> {
        block_on(self.client.stats())
    }

    /// As [`Client::admin`].
    ///
    /// # Errors
    /// As there.
    pub fn admin(&self, command: &str, json: &str, timeout: Option<Duration>) -> Result<String> {
        block_on(self.client.admin(command, json, timeout))
    }

    /// The asynchronous client that shares this one's connections.
    #[must_use]
    pub fn asynchronous(&self) -> Client {
        Client { flush: Flush::Writer, ..self.client.clone() }
    }
}

/// A namespace of a [`BlockingClient`].
#[derive(Clone)]
pub struct BlockingNamespace {
    namespace: Namespace,
}

impl BlockingNamespace {
    /// As [`Namespace::with_resolver`].
    #[must_use]
    pub fn with_resolver(
        self,
        resolver: impl Fn(&[Sibling]) -> Vec<u8> + Send + Sync + 'static,
    ) -> BlockingNamespace {
        BlockingNamespace { namespace: self.namespace.with_resolver(resolver) }
    }

    /// As [`Namespace::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        block_on(self.namespace.get(key))
    }

    /// As [`Namespace::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, key: &[u8], options: &ReadOptions) -> Result<Read> {
        block_on(self.namespace.read(key, options))
    }

    /// As [`Namespace::put`].
    ///
    /// # Errors
    /// As there.
    pub fn put(&self, key: &[u8], value: &[u8]) -> Result<Written> {
        block_on(self.namespace.put(key, value))
    }

    /// As [`Namespace::put_with`].
    ///
    /// # Errors
    /// As there.
    pub fn put_with(&self, key: &[u8], value: &[u8], options: &WriteOptions) -> Result<Written> {
        block_on(self.namespace.put_with(key, value, options))
    }

    /// As [`Namespace::delete`].
    ///
    /// # Errors
    /// As there.
    pub fn delete(&self, key: &[u8]) -> Result<Written> {
        block_on(self.namespace.delete(key))
    }

    /// As [`Namespace::delete_with`].
    ///
    /// # Errors
    /// As there.
    pub fn delete_with(&self, key: &[u8], options: &WriteOptions) -> Result<Written> {
        block_on(self.namespace.delete_with(key, options))
    }

    /// As [`Namespace::batch`].
    pub fn batch(
        &self,
        operations: &[BatchOperation],
        timeout: Option<Duration>,
    ) -> Vec<Result<BatchAnswer>> {
        block_on(self.namespace.batch(operations, timeout))
    }

    /// The records of the namespace in `(token, key)` order, one by one.
    #[must_use]
    pub fn scan(&self, options: ScanOptions) -> Records {
        Records { scanner: self.namespace.scan(options), page: Vec::new().into_iter(), done: false }
    }

    /// Sends writes without waiting for each, at most `depth` at a time.
    #[must_use]
    pub fn pipeline<T>(&self, depth: usize) -> Pipeline<T> {
        Pipeline {
            namespace: self.namespace.clone(),
            depth: depth.max(1),
            under_way: VecDeque::new(),
        }
    }

    /// The asynchronous namespace that shares this one's connections.
    #[must_use]
    pub fn asynchronous(&self) -> Namespace {
        let client = Client { flush: Flush::Writer, ..self.namespace.client.clone() };
        Namespace { client, ..self.namespace.clone() }
    }
}

/// Iterator of a scan. After an error it ends.
pub struct Records {
    scanner: Scanner,
    page: std::vec::IntoIter<Record>,
    done: bool,
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        if let Some(record) = self.page.next() {
            return Some(Ok(record));
        }
        if self.done {
            return None;
        }
        match block_on(self.scanner.next_page()) {
            Ok(Some(page)) => self.page = page.into_iter(),
            Ok(None) => self.done = true,
            Err(error) => {
                self.done = true;
                return Some(Err(error));
            }
        }
        self.page.next().map(Ok)
    }
}

type Writing = Pin<Box<dyn Future<Output = Result<Written>> + Send>>;

/// Writes under way, each with a tag by which its result is told. Results come in the order of
/// the writes. Two writes of one key may overtake each other when one is tried again.
pub struct Pipeline<T> {
    namespace: Namespace,
    depth: usize,
    under_way: VecDeque<(T, Writing)>,
}

impl<T> Pipeline<T> {
    /// Starts to write a value. When `depth` writes are under way, waits for the oldest first
    /// and returns its result.
    pub fn put(
        &mut self,
        tag: T,
        key: Vec<u8>,
        value: Vec<u8>,
        options: WriteOptions,
    ) -> Option<(T, Result<Written>)> {
        let namespace = self.namespace.clone();
        self.start(tag, async move { namespace.put_with(&key, &value, &options).await })
    }

    /// Starts to delete a key, as [`Pipeline::put`].
    pub fn delete(
        &mut self,
        tag: T,
        key: Vec<u8>,
        options: WriteOptions,
    ) -> Option<(T, Result<Written>)> {
        let namespace = self.namespace.clone();
        self.start(tag, async move { namespace.delete_with(&key, &options).await })
    }

    /// Waits for the oldest write under way; `None` when there is none. Call until then.
    pub fn finish_one(&mut self) -> Option<(T, Result<Written>)> {
        let (tag, mut oldest) = self.under_way.pop_front()?;
        let others = &mut self.under_way;
        let mut was_woken = false;
        let outcome = block_on(std::future::poll_fn(|context| {
            let polled = oldest.as_mut().poll(context);
            // Woken and not done: it is being tried again, and so may others be. Without a look
            // at them their pauses would follow one another.
            if std::mem::replace(&mut was_woken, true) && polled.is_pending() {
                for (_, writing) in others.iter_mut() {
                    if let Poll::Ready(outcome) = writing.as_mut().poll(context) {
                        *writing = Box::pin(std::future::ready(outcome));
                    }
                }
            }
            polled
        }));
        Some((tag, outcome))
    }

    fn start(
        &mut self,
        tag: T,
        writing: impl Future<Output = Result<Written>> + Send + 'static,
    ) -> Option<(T, Result<Written>)> {
        let finished = if self.under_way.len() >= self.depth { self.finish_one() } else { None };
        let mut writing: Writing = Box::pin(writing);
        // The first poll sends the request. `finish_one` polls again with a waker of its own.
        let writing = match writing.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => Box::pin(std::future::ready(outcome)),
            Poll::Pending => writing,
        };
        self.under_way.push_back((tag, writing));
        finished
    }
}
