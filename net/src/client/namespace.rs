//! A namespace of a cluster: the operations on keys, batches and scans.
//!
//! Invariant: what is over a limit of the server is refused before it is sent; a batch gives each
//! of its operations one result, in their order.

use std::sync::Arc;
use std::time::Duration;

use annulus_engine::model::{NamespaceId, Record, Token, TokenRange};

use super::health::Kind;
use super::link::Answer;
use super::race::{Ask, Tries};
use super::types::{
    BatchAnswer, BatchOperation, Error, Read, ReadOptions, Result, Sibling, WriteOptions, Written,
};
use super::{Client, Effect};
use crate::wire::fields::{Condition, OnceId, Ttl};
use crate::wire::hello::{FEATURE_ONCE, Mode};
use crate::wire::operation::{self, Delete, Get, Operation, Put};
use crate::wire::request::Outgoing;
use crate::wire::response::{PageRef, ReadReply, decode_batch, decode_failure, decode_write};
use crate::wire::scan::Scan;
use crate::wire::status::{Class, Status};

/// Writes of so many bytes take the time that their bytes take.
const LONG_SIZE_MIN: usize = 32 << 10;

/// Reconciles concurrent values of a key into one.
pub type Resolver = Arc<dyn Fn(&[Sibling]) -> Vec<u8> + Send + Sync>;

/// A namespace of a cluster: where keys live. Cheap to clone.
#[derive(Clone)]
pub struct Namespace {
    pub(super) client: Client,
    pub(super) id: NamespaceId,
    pub(super) mode: Mode,
    pub(super) name: String,
    pub(super) resolver: Option<Resolver>,
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
        let (token, timeout) = (Some(get.token()), options.timeout);
        let answer = self.client.call(token, Kind::Read, &request, Effect::None, timeout).await?;
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
    /// live; nothing is promised across keys. A part with writes that may have happened is not sent
    /// again.
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
        let parts: Vec<(Vec<usize>, Vec<Operation<'_>>)> = self
            .split(operations, &mut results)
            .into_iter()
            .map(Vec::into_iter)
            .map(Iterator::unzip)
            .collect();
        let requests: Vec<Outgoing<'_>> =
            parts.iter().map(|(_, wire)| Outgoing::Batch(wire)).collect();
        let mut sent = Vec::new();
        for ((_, wire), request) in parts.iter().zip(&requests) {
            let only_reads = wire.iter().all(|operation| matches!(operation, Operation::Get(_)));
            let effect = if only_reads { Effect::None } else { Effect::Again };
            let token = wire.first().map(Operation::token);
            let ask = Ask { token, request, effect, kind: Kind::Long, deadline };
            let tries = Tries::begin(&self.client, &ask).await;
            sent.push((ask, tries));
        }
        for ((indexes, wire), (ask, tries)) in parts.iter().zip(sent) {
            let answer = match tries {
                Ok(tries) => self.client.settle(&ask, tries).await,
                Err(error) => Err(error),
            };
            fill_results(indexes, wire, answer, &mut results);
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
        let condition = match &operation {
            Operation::Put(put) => put.options.condition,
            Operation::Delete(delete) => delete.options.condition,
            Operation::Get(_) => Condition::Always,
        };
        let effect = match condition {
            _ if once.is_some() => Effect::Once,
            Condition::IfVersion(version) => Effect::Versioned(version),
            // What is absent can have come and gone in between.
            Condition::IfAbsent | Condition::Always => Effect::Again,
        };
        let kind = if operation.size() > LONG_SIZE_MIN { Kind::Long } else { Kind::Write };
        let request = Outgoing::Operation(operation);
        let token = Some(operation.token());
        let answer = self.client.call(token, kind, &request, effect, timeout).await?;
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
        let value = value.into();
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

/// Distributes the answer to one part of a batch.
fn fill_results(
    indexes: &[usize],
    operations: &[Operation<'_>],
    answer: Result<Answer>,
    results: &mut [Option<Result<BatchAnswer>>],
) {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            for &index in indexes {
                results[index] = Some(Err(error.clone()));
            }
            return;
        }
    };
    // What is malformed leaves its operations without a result, which the caller reports.
    let _ = decode_batch(&answer.body, &mut |result| {
        let at = result.index as usize;
        if let (Some(&index), Some(operation)) = (indexes.get(at), operations.get(at)) {
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
            let (token, timeout) = (Some(*first), self.options.timeout);
            let answer = client.call(token, Kind::Long, &request, Effect::None, timeout).await?;
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

pub(super) fn too_big(what: &str, limit: usize) -> Error {
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
