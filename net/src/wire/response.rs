//! Replies: encoded by the server straight into the connection's output, read by the client
//! borrowed from its input.
//!
//! Invariant: each reply's size is known before its first byte is written, so a reply is one
//! reservation and one copy; and every reply says what it was worth: version, acknowledgements,
//! freshness.
//!
//! GET (OK, NOT_FOUND):
//!
//! | offset | size | field        | meaning                                             |
//! |--------|------|--------------|-----------------------------------------------------|
//! | 0      | 8    | as_of        | the answer holds every write at or below this stamp; 0: unknown |
//! | 8      | 2    | value_count  | live values: 1, or more when there are siblings; 0 when absent |
//! | 10     | 2    | context_size | bytes of the context                                |
//! | 12     | 1    | answers      | replicas that answered                              |
//! | 13     | 1    | primaries    | of them, home replicas                              |
//! | 14     | 2    | reserved     | 0                                                   |
//! | 16     |      | values       | each: version 20, value size 4, expiry_ms 8, value  |
//! |        |      | context      | give it back with the next write of the key         |
//! |        |      | trace        | the rest: JSON, if asked for                        |
//!
//! PUT, DELETE (OK, CONDITION_FALSE):
//!
//! | offset | size | field        | meaning                                             |
//! |--------|------|--------------|-----------------------------------------------------|
//! | 0      | 20   | version      | OK: of this write; CONDITION_FALSE: of the live value, 0 if none |
//! | 20     | 1    | acks         | nodes that have the write                           |
//! | 21     | 1    | primary      | of them, home replicas                              |
//! | 22     | 1    | durable      | of them, with the write synced to disk              |
//! | 23     | 1    | reserved     | 0                                                   |
//! | 24     | 4    | window_ms    | 0: synced before this answer; else synced within this time |
//! | 28     | 2    | context_size | bytes of the context                                |
//! | 30     | 2    | reserved     | 0                                                   |
//! | 32     |      | context, trace | as above                                          |
//!
//! Errors (every other status):
//!
//! | offset | size | field          | meaning                                           |
//! |--------|------|----------------|---------------------------------------------------|
//! | 0      | 4    | retry_after_ms | do not try again before                           |
//! | 4      | 1    | acks           | MAY_BE_APPLIED: nodes known to have the write     |
//! | 5      | 1    | primary        | of them, home replicas                            |
//! | 6      | 1    | durable        | of them, synced                                   |
//! | 7      | 1    | reserved       | 0                                                 |
//! | 8      | 8    | detail         | a limit, a map version, a shard: see the status   |
//! | 16     |      | message        | UTF-8 for people, at most 1,024 bytes, never a key or value |
//!
//! PING: the request's bytes. STATS, ADMIN: JSON. BATCH: `count` (4), reserved (4), then per
//! result, in any order: index 4, body size 4, status 2, verb 1, reserved 1, body as above.
//! SCAN: in [`Page`].

use annulus_engine::model::value::PIECE_SIZE;
use annulus_engine::model::{
    Kind, NamespaceId, OriginId, Piece, Pieces, RecordRef, Timestamp, Token, Value,
};

use super::codec::{Malformed, Reader, Write, size_u16, size_u32};
use super::fields::Version;
use super::frame::Opcode;
use super::request::Refusal;
use super::status::Status;

/// Longest message of an error, in bytes.
pub const MESSAGE_SIZE_MAX: usize = 1024;
const READ_HEADER_SIZE: usize = 16;
const VALUE_HEADER_SIZE: usize = 32;
const WRITE_HEADER_SIZE: usize = 32;
const ERROR_HEADER_SIZE: usize = 16;

/// What an answer to a read was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ReadFacts<'a> {
    /// Every write at or below it is in the answer; zero when unknown.
    pub as_of: Timestamp,
    /// Replicas that answered.
    pub answers: u8,
    /// Of them, home replicas.
    pub primaries: u8,
    /// Opaque to the client, which passes it back with its next write of the key.
    pub context: &'a [u8],
    /// JSON, if asked for.
    pub trace: &'a [u8],
}

/// One live value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueRef<'a> {
    /// The write it comes from.
    pub version: Version,
    /// Milliseconds since 2024-01-01 from which it is gone; 0: never.
    pub expiry_ms: u64,
    /// The value; empty when only versions were asked for.
    pub value: Value<'a>,
}

impl<'a> From<&RecordRef<'a>> for ValueRef<'a> {
    #[inline]
    fn from(record: &RecordRef<'a>) -> ValueRef<'a> {
        ValueRef {
            version: Version { timestamp: record.timestamp, dot: record.dot },
            expiry_ms: record.expiry_ms,
            value: record.value,
        }
    }
}

/// What a write was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WriteFacts<'a> {
    /// Of this write; when its condition was false, of the live value.
    pub version: Version,
    /// Nodes that have it.
    pub acks: u8,
    /// Of them, home replicas.
    pub primary: u8,
    /// Of them, with the write synced to disk.
    pub durable: u8,
    /// 0: synced before the answer. Else it will be synced within this many milliseconds.
    pub window_ms: u32,
    /// As in [`ReadFacts`].
    pub context: &'a [u8],
    /// JSON, if asked for.
    pub trace: &'a [u8],
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure<'a> {
    /// Which error; decides what the client may conclude.
    pub status: Status,
    /// Do not try again before this many milliseconds.
    pub retry_after_ms: u32,
    /// MAY_BE_APPLIED: nodes known to have the write.
    pub acks: u8,
    /// Of them, home replicas.
    pub primary: u8,
    /// Of them, synced.
    pub durable: u8,
    /// A limit, a map version, a shard: see the status.
    pub detail: u64,
    /// For people; no keys, no values. Cut at [`MESSAGE_SIZE_MAX`].
    pub message: &'a str,
}

impl<'a> Failure<'a> {
    /// A failure with a message and nothing else to say.
    #[must_use]
    pub fn new(status: Status, message: &'a str) -> Failure<'a> {
        Failure { status, retry_after_ms: 0, acks: 0, primary: 0, durable: 0, detail: 0, message }
    }

    /// The same, with a time before which trying again is useless.
    #[must_use]
    pub fn retry_after(self, retry_after_ms: u32) -> Failure<'a> {
        Failure { retry_after_ms, ..self }
    }

    /// The same, with a detail.
    #[must_use]
    pub fn detail(self, detail: u64) -> Failure<'a> {
        Failure { detail, ..self }
    }
}

impl From<Refusal> for Failure<'static> {
    fn from(refusal: Refusal) -> Failure<'static> {
        Failure::new(refusal.status, refusal.reason).detail(refusal.detail)
    }
}

// ---- bodies, shared by single replies and batches -------------------------------------------

/// Bytes that [`encode_read`] appends.
#[must_use]
pub fn read_size(facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) -> usize {
    READ_HEADER_SIZE
        + values.iter().map(|value| VALUE_HEADER_SIZE + value.value.len()).sum::<usize>()
        + facts.context.len()
        + facts.trace.len()
}

/// Appends the body of an answer to a read.
#[inline]
pub fn encode_read(out: &mut Vec<u8>, facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) {
    put_read_head(out, facts, values);
    for value in values {
        put_value_head(out, value);
        value.value.copy_to(out);
    }
    out.put(facts.context);
    out.put(facts.trace);
}

/// The same body in pieces: those of a value that is in pieces are shared, all else is copied.
#[must_use]
pub fn read_in_pieces(facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) -> Pieces {
    let (mut pieces, mut open) = (Vec::new(), Vec::new());
    put_read_head(&mut open, facts, values);
    for value in values {
        put_value_head(&mut open, value);
        match value.value {
            Value::Pieces(shared) => {
                pieces.push(Piece::new(std::mem::take(&mut open)));
                pieces.extend_from_slice(shared.list());
            }
            Value::Whole(bytes) => {
                for part in bytes.chunks(PIECE_SIZE) {
                    if open.len() + part.len() > PIECE_SIZE {
                        pieces.push(Piece::new(std::mem::take(&mut open)));
                    }
                    open.extend_from_slice(part);
                }
            }
        }
    }
    open.put(facts.context);
    open.put(facts.trace);
    pieces.push(Piece::new(open));
    Pieces::new(pieces)
}

#[inline]
fn put_read_head(out: &mut Vec<u8>, facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) {
    // Fixed parts are put together on the stack: one bounds check and one copy each.
    let mut head = [0; READ_HEADER_SIZE];
    head[0..8].copy_from_slice(&facts.as_of.0.to_le_bytes());
    head[8..10].copy_from_slice(&size_u16(values.len()).to_le_bytes());
    head[10..12].copy_from_slice(&size_u16(facts.context.len()).to_le_bytes());
    head[12] = facts.answers;
    head[13] = facts.primaries;
    out.put(&head);
}

#[inline]
fn put_value_head(out: &mut Vec<u8>, value: &ValueRef<'_>) {
    let mut head = [0; VALUE_HEADER_SIZE];
    head[0..20].copy_from_slice(&value.version.to_bytes());
    head[20..24].copy_from_slice(&size_u32(value.value.len()).to_le_bytes());
    head[24..32].copy_from_slice(&value.expiry_ms.to_le_bytes());
    out.put(&head);
}

/// Bytes that [`encode_write`] appends.
#[must_use]
pub fn write_size(facts: &WriteFacts<'_>) -> usize {
    WRITE_HEADER_SIZE + facts.context.len() + facts.trace.len()
}

/// Appends the body of an answer to a write.
#[inline]
pub fn encode_write(out: &mut Vec<u8>, facts: &WriteFacts<'_>) {
    let mut head = [0; WRITE_HEADER_SIZE];
    head[0..20].copy_from_slice(&facts.version.to_bytes());
    head[20..23].copy_from_slice(&[facts.acks, facts.primary, facts.durable]);
    head[24..28].copy_from_slice(&facts.window_ms.to_le_bytes());
    head[28..30].copy_from_slice(&size_u16(facts.context.len()).to_le_bytes());
    out.put(&head);
    out.put(facts.context);
    out.put(facts.trace);
}

/// The message, cut at a character's border.
fn message_of<'a>(failure: &Failure<'a>) -> &'a str {
    &failure.message[..failure.message.floor_char_boundary(MESSAGE_SIZE_MAX)]
}

/// Bytes that [`encode_failure`] appends.
#[must_use]
pub fn failure_size(failure: &Failure<'_>) -> usize {
    ERROR_HEADER_SIZE + message_of(failure).len()
}

/// Appends the body of an error.
pub fn encode_failure(out: &mut Vec<u8>, failure: &Failure<'_>) {
    out.put_u32(failure.retry_after_ms);
    out.put(&[failure.acks, failure.primary, failure.durable, 0]);
    out.put_u64(failure.detail);
    out.put(message_of(failure).as_bytes());
}

/// Status of a read with these values.
#[inline]
#[must_use]
pub fn read_status(values: &[ValueRef<'_>]) -> Status {
    if values.is_empty() { Status::NOT_FOUND } else { Status::OK }
}

// ---- batch ----------------------------------------------------------------------------------

/// Gathers the results of a batch, in any order, until each operation has one.
#[derive(Debug)]
pub struct BatchResults {
    body: Vec<u8>,
    remaining: u32,
}

impl BatchResults {
    /// No results yet, of a batch with `count` operations.
    #[must_use]
    pub fn new(count: u32) -> BatchResults {
        let mut body = Vec::with_capacity(8 + 64 * count.min(1024) as usize);
        body.put_u32(count);
        body.put_u32(0);
        BatchResults { body, remaining: count }
    }

    /// The result of a get; no value means absent.
    pub fn read(&mut self, index: u32, facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) {
        let size = read_size(facts, values);
        self.result(index, Opcode::Get, read_status(values), size);
        encode_read(&mut self.body, facts, values);
    }

    /// The result of a put or delete: OK or `CONDITION_FALSE`.
    pub fn write(&mut self, index: u32, verb: Opcode, status: Status, facts: &WriteFacts<'_>) {
        self.result(index, verb, status, write_size(facts));
        encode_write(&mut self.body, facts);
    }

    /// No result.
    pub fn failure(&mut self, index: u32, verb: Opcode, failure: &Failure<'_>) {
        self.result(index, verb, failure.status, failure_size(failure));
        encode_failure(&mut self.body, failure);
    }

    /// A result as another shard encoded it.
    pub fn raw(&mut self, index: u32, verb: Opcode, status: Status, body: &[u8]) {
        self.result(index, verb, status, body.len());
        self.body.put(body);
    }

    /// Whether each operation has its result.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.remaining == 0
    }

    /// Bytes gathered so far; the owner bounds them.
    #[must_use]
    pub fn size(&self) -> usize {
        self.body.len()
    }

    pub(crate) fn into_body(self) -> Vec<u8> {
        debug_assert!(self.is_complete(), "a batch is answered when it is complete");
        self.body
    }

    fn result(&mut self, index: u32, verb: Opcode, status: Status, size: usize) {
        debug_assert!(self.remaining > 0, "one result an operation");
        self.remaining = self.remaining.saturating_sub(1);
        self.body.put_u32(index);
        self.body.put_u32(size_u32(size));
        self.body.put_u16(status.0);
        self.body.put(&[verb.request(), 0]);
    }
}

/// One result of a batch, as the client reads it.
#[derive(Clone, Copy, Debug)]
pub struct BatchResult<'a> {
    /// Which operation.
    pub index: u32,
    /// Its opcode.
    pub verb: u8,
    /// How it ended.
    pub status: Status,
    /// The body of a single reply with this status.
    pub body: &'a [u8],
}

/// Reads a batch's results.
///
/// # Errors
/// [`Malformed`] when the body is none, or an index is out of range.
pub fn decode_batch<'a>(
    body: &'a [u8],
    visit: &mut dyn FnMut(BatchResult<'a>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let mut reader = Reader::new(body);
    let count = reader.u32()?;
    reader.reserved(4)?;
    for _ in 0..count {
        let index = reader.u32()?;
        let size = reader.u32()?;
        let status = Status(reader.u16()?);
        let verb = reader.u8()?;
        reader.reserved(1)?;
        if index >= count {
            return Err(Malformed("index of a batch result is out of range"));
        }
        visit(BatchResult { index, verb, status, body: reader.bytes(size as usize)? })?;
    }
    reader.finish()
}

// ---- scan -----------------------------------------------------------------------------------

/// Gathers one page of a scan.
///
/// | offset | size | field     | meaning                                                  |
/// |--------|------|-----------|----------------------------------------------------------|
/// | 0      | 4    | count     | records of the page                                      |
/// | 4      | 1    | end       | 1: nothing follows; 0: go on at `next`                   |
/// | 5      | 1    | reserved  | 0                                                        |
/// | 6      | 2    | next_size | bytes of the key behind which to go on                   |
/// | 8      | 8    | next      | token of that key: `first` of the next request           |
/// | 16     |      | key       | of the last record seen: `after` of the next request     |
/// |        |      | records   | each: token 8, version 20, value size 4, expiry_ms 8, key size 2, kind 1, reserved 1, key, value |
#[derive(Debug)]
pub struct Page {
    records: Vec<u8>,
    count: u32,
    count_max: u32,
    bytes_max: usize,
    keys_only: bool,
}

impl Page {
    /// An empty page within the limits of the request and the server's.
    #[must_use]
    pub fn new(scan: &super::scan::Scan<'_>, count_max: u32, bytes_max: u32) -> Page {
        let least = |asked: u32, limit: u32| if asked == 0 { limit } else { asked.min(limit) };
        Page {
            records: Vec::new(),
            count: 0,
            count_max: least(scan.count_max, count_max).max(1),
            bytes_max: least(scan.bytes_max, bytes_max) as usize,
            keys_only: scan.flags & super::scan::KEYS_ONLY != 0,
        }
    }

    /// Whether the page wants no more records.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.count >= self.count_max || self.records.len() >= self.bytes_max
    }

    /// Records on the page.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Adds a record. The page may grow beyond its target by this one record.
    pub fn push(&mut self, record: &RecordRef<'_>) {
        let value = if self.keys_only { Value::EMPTY } else { record.value };
        self.records.put_u64(record.token.0);
        Version { timestamp: record.timestamp, dot: record.dot }.encode(&mut self.records);
        self.records.put_u32(size_u32(value.len()));
        self.records.put_u64(record.expiry_ms);
        self.records.put_u16(size_u16(record.key.len()));
        self.records.put(&[record.kind as u8, 0]);
        self.records.put(record.key);
        value.copy_to(&mut self.records);
        self.count += 1;
    }

    /// The body; `next` is the token and key behind which the next page begins, `None` at the end.
    #[must_use]
    pub fn into_body(self, next: Option<(Token, &[u8])>) -> Vec<u8> {
        let (token, key) = next.unwrap_or((Token::MIN, &[]));
        let mut body = Vec::with_capacity(16 + key.len() + self.records.len());
        body.put_u32(self.count);
        body.put(&[u8::from(next.is_none()), 0]);
        body.put_u16(size_u16(key.len()));
        body.put_u64(token.0);
        body.put(key);
        body.put(&self.records);
        body
    }
}

/// A page as the client reads it.
#[derive(Clone, Debug)]
pub struct PageRef<'a> {
    /// Where the next page begins: `range.first` and `after`. `None` at the end.
    pub next: Option<(Token, &'a [u8])>,
    /// The records, in order. Their incarnation is not told and reads 0.
    pub records: Vec<RecordRef<'a>>,
}

impl<'a> PageRef<'a> {
    /// Reads a page.
    ///
    /// # Errors
    /// [`Malformed`] when the body is none.
    pub fn decode(body: &'a [u8], namespace: NamespaceId) -> Result<PageRef<'a>, Malformed> {
        let mut reader = Reader::new(body);
        let count = reader.u32()?;
        let end = reader.u8()?;
        reader.reserved(1)?;
        let next_size = usize::from(reader.u16()?);
        let token = Token(reader.u64()?);
        let key = reader.bytes(next_size)?;
        if end > 1 {
            return Err(Malformed("end of a page is neither 0 nor 1"));
        }
        let mut records = Vec::new();
        for _ in 0..count {
            let token = Token(reader.u64()?);
            let version = Version::decode(&mut reader)?;
            let value_size = reader.u32()? as usize;
            let expiry_ms = reader.u64()?;
            let key_size = usize::from(reader.u16()?);
            let kind = Kind::from_u8(reader.u8()?).ok_or(Malformed("unknown kind of record"))?;
            reader.reserved(1)?;
            records.push(RecordRef {
                token,
                namespace,
                incarnation: 0,
                kind,
                dot: version.dot,
                timestamp: version.timestamp,
                expiry_ms,
                key: reader.bytes(key_size)?,
                value: Value::Whole(reader.bytes(value_size)?),
            });
        }
        reader.finish()?;
        Ok(PageRef { next: (end == 0).then_some((token, key)), records })
    }
}

// ---- what the client reads ------------------------------------------------------------------

/// The answer to a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReply<'a> {
    /// What it was worth.
    pub facts: ReadFacts<'a>,
    /// The live values; none when absent.
    pub values: Vec<ValueRef<'a>>,
}

impl<'a> ReadReply<'a> {
    /// Reads the body.
    ///
    /// # Errors
    /// [`Malformed`] when it is none.
    pub fn decode(body: &'a [u8]) -> Result<ReadReply<'a>, Malformed> {
        let mut reader = Reader::new(body);
        let as_of = Timestamp(reader.u64()?);
        let count = reader.u16()?;
        let context_size = usize::from(reader.u16()?);
        let answers = reader.u8()?;
        let primaries = reader.u8()?;
        reader.reserved(2)?;
        let mut values = Vec::new();
        for _ in 0..count {
            let version = Version::decode(&mut reader)?;
            let size = reader.u32()? as usize;
            let expiry_ms = reader.u64()?;
            let value = Value::Whole(reader.bytes(size)?);
            values.push(ValueRef { version, expiry_ms, value });
        }
        let context = reader.bytes(context_size)?;
        let trace = reader.rest();
        Ok(ReadReply { facts: ReadFacts { as_of, answers, primaries, context, trace }, values })
    }
}

/// Reads the answer to a write.
///
/// # Errors
/// [`Malformed`] when the body is none.
pub fn decode_write(body: &[u8]) -> Result<WriteFacts<'_>, Malformed> {
    let mut reader = Reader::new(body);
    let version = Version::decode(&mut reader)?;
    let [acks, primary, durable, reserved] = reader.array()?;
    let window_ms = reader.u32()?;
    let context_size = usize::from(reader.u16()?);
    reader.reserved(2)?;
    if reserved != 0 {
        return Err(Malformed("reserved bytes are not zero"));
    }
    let context = reader.bytes(context_size)?;
    let trace = reader.rest();
    Ok(WriteFacts { version, acks, primary, durable, window_ms, context, trace })
}

/// Reads an error.
///
/// # Errors
/// [`Malformed`] when the body is none.
pub fn decode_failure(status: Status, body: &[u8]) -> Result<Failure<'_>, Malformed> {
    let mut reader = Reader::new(body);
    let retry_after_ms = reader.u32()?;
    let [acks, primary, durable, reserved] = reader.array()?;
    let detail = reader.u64()?;
    if reserved != 0 {
        return Err(Malformed("reserved bytes are not zero"));
    }
    let message =
        std::str::from_utf8(reader.rest()).map_err(|_| Malformed("message is not UTF-8"))?;
    if message.len() > MESSAGE_SIZE_MAX {
        return Err(Malformed("message is too long"));
    }
    Ok(Failure { status, retry_after_ms, acks, primary, durable, detail, message })
}

/// A row of the partition map, sent in front of a reply's body when the client's is old.
///
/// partition 4, replica count 2, reserved 2, map version 8, then per replica node 4, shard 4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The partition.
    pub partition: u32,
    /// Version of its row.
    pub version: u64,
    /// Where it lives, in order of preference.
    pub replicas: Vec<super::hello::Replica>,
}

impl Route {
    /// Appends the row.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.partition);
        out.put_u16(size_u16(self.replicas.len()));
        out.put_u16(0);
        out.put_u64(self.version);
        for replica in &self.replicas {
            out.put_u32(replica.node.0);
            out.put_u32(replica.shard);
        }
    }

    /// Reads the row in front of a reply's body.
    ///
    /// # Errors
    /// [`Malformed`] when it is none.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Route, Malformed> {
        let partition = reader.u32()?;
        let count = usize::from(reader.u16()?);
        reader.reserved(2)?;
        let version = reader.u64()?;
        if count > 64 {
            return Err(Malformed("more than 64 replicas"));
        }
        let mut replicas = Vec::with_capacity(count);
        for _ in 0..count {
            replicas.push(super::hello::Replica {
                node: OriginId(reader.u32()?),
                shard: reader.u32()?,
            });
        }
        Ok(Route { partition, version, replicas })
    }
}
