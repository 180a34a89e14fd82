//! `ServerConnection`: the server's side of one connection. Bytes in, requests out; answers in,
//! bytes out.
//!
//! Invariants: whatever a client sends or does not send, a connection holds a bounded amount of
//! memory and ends after a bounded time of half-said things; every request is answered once, by
//! its [`Ticket`]. It does no I/O and reads no clock: the pump feeds it and asks
//! [`ServerConnection::next_timeout`]. On the read path between `wire/decoder.rs` and the pump.

use std::cell::Cell;
use std::rc::Rc;

use annulus_engine::model::{Instant, Token};

use crate::wire::codec::size_u32;
use crate::wire::decoder::{Frame, FrameDecoder};
use crate::wire::frame::{
    FRAME_BODY_MAX, FrameError, FrameHeader, HEADER_SIZE, Opcode, REPLY, flag,
};
use crate::wire::hello::{self, Hello, Welcome};
use crate::wire::request::{DecodeContext, Request};
use crate::wire::response::{
    self, BatchResults, Failure, Page, ReadFacts, Route, ValueRef, WriteFacts,
};
use crate::wire::slices::{FrameWriter, Gathered, Head, Reassembly, ReassemblyLimits};
use crate::wire::status::Status;

/// Largest body of a HELLO, so that a stranger costs little, in bytes.
const HELLO_BODY_MAX: usize =
    hello::HELLO_HEADER_SIZE + hello::NAME_SIZE_MAX + hello::CREDENTIAL_SIZE_MAX;
/// What an unauthenticated connection may hold (`RELIABILITY.md` 5.5).
const _: () = assert!(2 * (HEADER_SIZE + HELLO_BODY_MAX) <= 8 << 10);

const NANOS_PER_MS: u64 = 1_000_000;

/// Times and sizes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionOptions {
    /// Time for the HELLO to arrive, in milliseconds. Default 5,000.
    pub hello_timeout_ms: u64,
    /// Time for one frame to arrive in full, in milliseconds. Default 5,000. Raise it for
    /// clients slower than 7 KB/s.
    pub frame_timeout_ms: u64,
    /// Time for all slices of a message, in milliseconds. Default 30,000.
    pub message_timeout_ms: u64,
    /// A client that takes none of its answers for this long is cut off. Default 10,000.
    pub stall_timeout_ms: u64,
    /// Deadline of requests that name none, in milliseconds. Default 10,000.
    pub default_deadline_ms: u64,
    /// Answers waiting, in bytes, from which no more requests are taken. Default 256 KiB.
    pub pause_bytes: usize,
    /// Most bytes of long answers waiting; a long read beyond them is answered BUSY. Default 4 MiB.
    pub long_reply_bytes_max: usize,
    /// Most bytes of long requests in the making. Default 8 MiB.
    pub long_request_bytes_max: usize,
    /// Most long requests in the making. Default 16.
    pub long_requests_max: usize,
}

impl Default for ConnectionOptions {
    fn default() -> ConnectionOptions {
        ConnectionOptions {
            hello_timeout_ms: 5_000,
            frame_timeout_ms: 5_000,
            message_timeout_ms: 30_000,
            stall_timeout_ms: 10_000,
            default_deadline_ms: 10_000,
            pause_bytes: 256 << 10,
            long_reply_bytes_max: 4 << 20,
            long_request_bytes_max: 8 << 20,
            long_requests_max: 16,
        }
    }
}

/// What all connections of a shard share. The pump keeps it up to date.
#[derive(Clone, Debug)]
pub struct ServerFacts {
    /// The answer to HELLO; `shard` is this shard, `wall_us` is set by the pump once a turn.
    pub welcome: Welcome,
    /// Times and sizes.
    pub options: ConnectionOptions,
}

impl ServerFacts {
    /// What the decoder needs.
    #[inline]
    #[must_use]
    pub fn decode_context(&self) -> DecodeContext {
        DecodeContext {
            hash_seed: self.welcome.hash_seed,
            value_size_max: self.welcome.limits.value_size_max,
            batch_count_max: self.welcome.limits.batch_count_max,
            message_size_max: self.welcome.limits.message_size_max,
        }
    }
}

/// Memory that all connections of a shard may hold together for long messages. A cheap handle.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    left: Rc<Cell<usize>>,
}

impl MemoryBudget {
    /// A budget of this many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> MemoryBudget {
        MemoryBudget { left: Rc::new(Cell::new(bytes)) }
    }

    /// Bytes not taken.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left.get()
    }

    /// Changes what a holder has from `held` to `wanted`, if there is enough.
    fn resize(&self, held: &mut usize, wanted: usize) -> bool {
        let available = self.left.get() + *held;
        if wanted > available {
            return false;
        }
        self.left.set(available - wanted);
        *held = wanted;
        true
    }
}

/// The right and the duty to answer one request, once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every request is answered once"]
pub struct Ticket {
    request_id: u32,
    cost: u32,
    opcode: u8,
}

impl Ticket {
    /// The client's number of the request.
    #[must_use]
    pub fn request_id(&self) -> u32 {
        self.request_id
    }

    /// What was asked for.
    #[must_use]
    pub fn opcode(&self) -> Option<Opcode> {
        Opcode::from_u8(self.opcode)
    }
}

/// A request that has arrived, apart from its body.
#[derive(Debug)]
pub struct Arrival {
    /// Needed to answer.
    pub ticket: Ticket,
    /// After it nobody waits for the answer.
    pub deadline: Instant,
    /// Bits 0..4: index of the replica that the client chose. Bits 4..8: low bits of the version
    /// of the partition's map row that it knows.
    pub route: u8,
}

/// What [`ServerConnection::receive`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// All bytes are consumed.
    Continue,
    /// The client wants another shard: hand the socket over, and give these bytes (everything
    /// since the connection began) to a new `ServerConnection` there. This one is spent.
    HandOver {
        /// The shard, below `shard_count`.
        shard: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// The connection must end. The output holds a last frame that tells the client why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("connection closed: {reason}")]
pub struct Close {
    /// As told to the client.
    pub status: Status,
    /// As told to the client, and for the log.
    pub reason: &'static str,
}

/// The server's side of one connection.
#[derive(Debug)]
pub struct ServerConnection {
    decoder: FrameDecoder,
    reassembly: Reassembly,
    /// When the first slice of each unfinished message came.
    slices_since: Vec<(u32, Instant)>,
    state: ReplyState,
    greeted: bool,
    draining: bool,
    closed: bool,
    opened: Instant,
    /// When the unfinished frame began.
    partial_since: Option<Instant>,
    /// Since when the client has taken nothing of what waits for it.
    stalled_since: Option<Instant>,
}

/// The half that answers need.
#[derive(Debug)]
struct ReplyState {
    writer: FrameWriter,
    in_flight: u32,
    in_flight_bytes: usize,
    in_flight_max: u32,
    in_flight_bytes_max: usize,
    window: u32,
    long_reply_bytes_max: usize,
    budget: MemoryBudget,
    /// Taken from the budget, for long requests and long replies.
    held: usize,
    /// Bytes of long requests, as told to the budget.
    gathered: usize,
    /// Goes in front of the next reply.
    route: Option<Route>,
    hot: bool,
}

impl ServerConnection {
    /// A connection that was just accepted.
    #[must_use]
    pub fn new(now: Instant, facts: &ServerFacts, budget: MemoryBudget) -> ServerConnection {
        let options = &facts.options;
        let limits = &facts.welcome.limits;
        let mut decoder = FrameDecoder::new();
        decoder.set_body_size_max(HELLO_BODY_MAX);
        ServerConnection {
            decoder,
            reassembly: Reassembly::new(ReassemblyLimits {
                messages_max: options.long_requests_max,
                message_size_max: facts.decode_context().request_size_max(),
                bytes_max: options
                    .long_request_bytes_max
                    .max(facts.decode_context().request_size_max()),
            }),
            slices_since: Vec::new(),
            state: ReplyState {
                writer: FrameWriter::default(),
                in_flight: 0,
                in_flight_bytes: 0,
                in_flight_max: limits.in_flight_max,
                in_flight_bytes_max: limits.in_flight_bytes_max as usize,
                window: limits.in_flight_max.max(1),
                long_reply_bytes_max: options.long_reply_bytes_max,
                budget,
                held: 0,
                gathered: 0,
                route: None,
                hot: false,
            },
            greeted: false,
            draining: false,
            closed: false,
            opened: now,
            partial_since: None,
            stalled_since: None,
        }
    }

    /// Takes bytes off the socket. Each whole request goes to `handler`, borrowed from `bytes`
    /// where it is whole in them; the handler answers at once through [`Replies`], or keeps the
    /// ticket and answers later. HELLO, PING, and what is refused are answered here.
    ///
    /// # Errors
    /// [`Close`]: send what is in `out`, then close. Requests in flight stay in flight.
    pub fn receive<H>(
        &mut self,
        now: Instant,
        bytes: &[u8],
        facts: &ServerFacts,
        out: &mut Vec<u8>,
        handler: &mut H,
    ) -> Result<Received, Close>
    where
        H: FnMut(&mut Replies<'_>, Arrival, Request<'_>),
    {
        if self.closed {
            return Ok(Received::Continue);
        }
        let context = facts.decode_context();
        let mut input = bytes;
        let mut took_frame = false;
        loop {
            let frame = match self.decoder.next(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => return Err(self.close(out, Close::of(error))),
            };
            took_frame = true;
            let header = frame.header;
            if header.opcode & REPLY != 0 {
                return Err(self.close(out, Close::of(FrameError::WrongDirection)));
            }
            let mut replies = Replies { state: &mut self.state, out };
            if !self.greeted {
                match greet(&mut replies, &frame, facts) {
                    Greeting::Welcome => {
                        self.greeted = true;
                        self.decoder.set_body_size_max(FRAME_BODY_MAX);
                    }
                    Greeting::Elsewhere(shard) => {
                        self.closed = true;
                        let bytes = [frame.raw, input].concat();
                        return Ok(Received::HandOver { shard, bytes });
                    }
                    Greeting::Close(close) => return Err(self.close(out, close)),
                }
                continue;
            }
            let timing = Timing { now, since: now, facts, draining: self.draining };
            if !header.is_slice() {
                replies.request(&header, frame.body, &timing, &context, handler);
                continue;
            }
            match gather(&mut self.reassembly, &mut self.slices_since, &mut replies, &frame, now) {
                Ok(Some((header, body, since))) => {
                    let timing = Timing { since, ..timing };
                    replies.admitted(&header, &body, &timing, &context, handler);
                }
                Ok(None) => {}
                Err(error) => return Err(self.close(out, Close::of(error))),
            }
        }
        self.partial_since = match self.partial_since {
            _ if !self.decoder.is_inside_frame() => None,
            Some(since) if !took_frame => Some(since),
            _ => Some(now),
        };
        Ok(Received::Continue)
    }

    /// The means to answer requests later. `out` must be this connection's output.
    #[inline]
    pub fn replies<'a>(&'a mut self, out: &'a mut Vec<u8>) -> Replies<'a> {
        Replies { state: &mut self.state, out }
    }

    /// Turns long answers into frames while `out` is short. Call when the output runs low.
    pub fn fill_output(&mut self, out: &mut Vec<u8>, until: usize) {
        if self.state.writer.queued_bytes() > 0 {
            self.state.writer.flush_slices(out, until);
            self.state.settle();
        }
    }

    /// Tells how the socket got on: `sent` bytes went out since the last call, `unsent` wait.
    pub fn sent(&mut self, now: Instant, sent: usize, unsent: usize) {
        if unsent == 0 && self.state.writer.queued_bytes() == 0 {
            self.stalled_since = None;
        } else if sent > 0 || self.stalled_since.is_none() {
            self.stalled_since = Some(now);
        }
    }

    /// Whether no more bytes should be received until answers have gone out. `unsent`: bytes in
    /// the output.
    #[must_use]
    pub fn wants_pause(&self, facts: &ServerFacts, unsent: usize) -> bool {
        unsent + self.state.writer.queued_bytes() >= facts.options.pause_bytes
    }

    /// Requests taken and not answered.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.state.in_flight
    }

    /// Whether the HELLO has been answered.
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Whether long answers wait for [`ServerConnection::fill_output`].
    #[must_use]
    pub fn has_queued(&self) -> bool {
        self.state.writer.queued_bytes() > 0
    }

    /// How many requests the client may have unanswered, told with the next answer; at least 1
    /// and at most the limit told in HELLO. Lower it under overload.
    pub fn set_window(&mut self, window: u32) {
        self.state.window = window.clamp(1, self.state.in_flight_max.max(1));
    }

    /// From now on new requests are answered `SHUTTING_DOWN`; the client is told so.
    pub fn drain(&mut self, out: &mut Vec<u8>) {
        if !self.draining && self.greeted {
            self.replies(out).goodbye(Status::SHUTTING_DOWN, "the server is draining");
        }
        self.draining = true;
    }

    /// Whether nothing is left to be answered after [`ServerConnection::drain`].
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.draining && self.state.in_flight == 0 && !self.has_queued()
    }

    /// When [`ServerConnection::handle_timeout`] must be called, if nothing happens before.
    #[must_use]
    pub fn next_timeout(&self, facts: &ServerFacts) -> Option<Instant> {
        if self.closed {
            return None;
        }
        self.timeouts(facts).into_iter().flatten().map(|(when, _)| when).min()
    }

    /// Ends the connection if its time is up.
    ///
    /// # Errors
    /// [`Close`]: send what is in `out`, then close.
    pub fn handle_timeout(
        &mut self,
        now: Instant,
        facts: &ServerFacts,
        out: &mut Vec<u8>,
    ) -> Result<(), Close> {
        let due = self.timeouts(facts).into_iter().flatten().find(|&(when, _)| when <= now);
        match due {
            Some((_, reason)) if !self.closed => {
                Err(self.close(out, Close { status: Status::EXPIRED, reason }))
            }
            _ => Ok(()),
        }
    }

    /// Bytes of memory held apart from the output: for the bounds' tests and the metrics.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.decoder.memory() + self.reassembly.bytes() + self.state.writer.queued_bytes()
    }

    fn timeouts(&self, facts: &ServerFacts) -> [Option<(Instant, &'static str)>; 4] {
        let options = &facts.options;
        let due = |since: Instant, ms: u64, reason| {
            (since.after_nanos(ms.saturating_mul(NANOS_PER_MS)), reason)
        };
        let oldest_slices = self.slices_since.iter().map(|&(_, since)| since).min();
        [
            (!self.greeted).then(|| due(self.opened, options.hello_timeout_ms, "no HELLO in time")),
            self.partial_since.map(|since| {
                due(since, options.frame_timeout_ms, "a frame was not finished in time")
            }),
            oldest_slices.map(|since| {
                due(since, options.message_timeout_ms, "a long message was not finished in time")
            }),
            self.stalled_since.map(|since| {
                due(since, options.stall_timeout_ms, "answers were not taken in time")
            }),
        ]
    }

    #[cold]
    fn close(&mut self, out: &mut Vec<u8>, close: Close) -> Close {
        self.closed = true;
        self.replies(out).goodbye(close.status, close.reason);
        close
    }
}

impl Drop for ServerConnection {
    fn drop(&mut self) {
        let shrunk = self.state.budget.resize(&mut self.state.held, 0);
        debug_assert!(shrunk, "giving back always succeeds");
    }
}

impl Close {
    #[cold]
    fn of(error: FrameError) -> Close {
        let reason = match error {
            FrameError::HeaderChecksum => "frame header fails its checksum",
            FrameError::BodyChecksum => "frame body fails its checksum",
            FrameError::BodyTooBig => "frame body is larger than the limit",
            FrameError::UnknownFlags => "frame has unknown flags",
            FrameError::BadSlice => "slice does not continue its message",
            FrameError::WrongDirection => "a reply came from the client",
            FrameError::NoHello => "the first frame must be HELLO",
            FrameError::BadHello => "the HELLO is malformed",
        };
        Close { status: Status::BAD_REQUEST, reason }
    }
}

/// What becomes of the first frame.
enum Greeting {
    Welcome,
    Elsewhere(u32),
    Close(Close),
}

/// Answers the first frame, which must be a HELLO.
#[cold]
fn greet(replies: &mut Replies<'_>, frame: &Frame<'_>, facts: &ServerFacts) -> Greeting {
    let refuse = |status, reason| Greeting::Close(Close { status, reason });
    let header = &frame.header;
    if header.opcode != Opcode::Hello.request() || header.is_slice() {
        return Greeting::Close(Close::of(FrameError::NoHello));
    }
    let Ok(hello) = Hello::decode(frame.body) else {
        return Greeting::Close(Close::of(FrameError::BadHello));
    };
    let welcome = &facts.welcome;
    if !(hello.version_min..=hello.version_max).contains(&hello::VERSION) {
        return refuse(Status::UNSUPPORTED, "no common protocol version");
    }
    if hello.cluster != 0 && hello.cluster != welcome.cluster {
        return refuse(Status::WRONG_CLUSTER, "this server belongs to another cluster");
    }
    if !hello.credential.is_empty() {
        return refuse(Status::UNSUPPORTED, "this server does not authenticate clients");
    }
    if hello.shard != hello::ANY_SHARD && hello.shard != welcome.shard {
        if hello.shard >= welcome.shard_count {
            return refuse(Status::BAD_REQUEST, "this node has no such shard");
        }
        return Greeting::Elsewhere(hello.shard);
    }
    replies.welcome(header.request_id, &hello, welcome);
    Greeting::Welcome
}

/// Adds a slice. The whole message and the time of its first slice, once it is whole.
type Whole = (FrameHeader, Vec<u8>, Instant);

fn gather(
    reassembly: &mut Reassembly,
    slices_since: &mut Vec<(u32, Instant)>,
    replies: &mut Replies<'_>,
    frame: &Frame<'_>,
    now: Instant,
) -> Result<Option<Whole>, FrameError> {
    let header = &frame.header;
    let id = header.request_id;
    let gathered = reassembly.add(frame)?;
    replies.state.gathered = reassembly.bytes();
    match gathered {
        Gathered::Unfinished { first } => {
            if first {
                slices_since.push((id, now));
            }
            let admitted = !first || replies.state.admit(0);
            if admitted && replies.state.settle() {
                return Ok(None);
            }
            reassembly.forget(id);
            slices_since.retain(|&(other, _)| other != id);
            replies.state.gathered = reassembly.bytes();
            replies.state.settle();
            let ticket = Ticket { request_id: id, opcode: header.opcode, cost: 0 };
            let busy = Failure::new(Status::BUSY, "no room for another long request");
            if admitted {
                replies.failure(ticket, &busy);
            } else {
                replies.refuse(&ticket, &busy);
            }
            Ok(None)
        }
        Gathered::Whole(first, body) => {
            replies.state.settle();
            let since = slices_since.iter().position(|&(other, _)| other == id);
            match since {
                Some(index) => Ok(Some((first, body, slices_since.swap_remove(index).1))),
                // A message of one slice was never admitted.
                None if replies.state.admit(0) => Ok(Some((first, body, now))),
                None => {
                    let ticket = Ticket { request_id: id, opcode: header.opcode, cost: 0 };
                    replies.refuse(&ticket, &TOO_MANY);
                    Ok(None)
                }
            }
        }
        Gathered::TooBig => {
            let ticket = Ticket { request_id: id, opcode: header.opcode, cost: 0 };
            let limit = reassembly.limits().message_size_max as u64;
            let failure = Failure::new(Status::TOO_BIG, "message").detail(limit);
            replies.refuse(&ticket, &failure);
            Ok(None)
        }
        Gathered::NoRoom => {
            let ticket = Ticket { request_id: id, opcode: header.opcode, cost: 0 };
            replies.refuse(&ticket, &Failure::new(Status::BUSY, "too many long requests at once"));
            Ok(None)
        }
        Gathered::Dropped => Ok(None),
    }
}

const TOO_MANY: Failure<'static> = Failure {
    status: Status::BUSY,
    retry_after_ms: 1,
    acks: 0,
    primary: 0,
    durable: 0,
    detail: 0,
    message: "too many unanswered requests on this connection",
};

/// When a request came, and what that means for it.
struct Timing<'a> {
    now: Instant,
    since: Instant,
    facts: &'a ServerFacts,
    draining: bool,
}

impl Timing<'_> {
    #[inline]
    fn deadline(&self, header: &FrameHeader) -> Instant {
        let nanos = match header.time_or_window {
            0 => self.facts.options.default_deadline_ms.saturating_mul(NANOS_PER_MS),
            micros => u64::from(micros) * 1000,
        };
        self.since.after_nanos(nanos)
    }
}

/// The means to answer requests of one connection. Each answer is appended to the connection's
/// output and carries the window.
#[derive(Debug)]
pub struct Replies<'a> {
    state: &'a mut ReplyState,
    out: &'a mut Vec<u8>,
}

impl Replies<'_> {
    /// Answers a read: no value means absent.
    #[inline]
    pub fn read(&mut self, ticket: Ticket, facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) {
        let size = response::read_size(facts, values);
        if !self.has_room(size) {
            return self.failure(ticket, &NO_REPLY_ROOM);
        }
        self.reply(&ticket, response::read_status(values), size, |out| {
            response::encode_read(out, facts, values);
        });
    }

    /// Answers a write that was done.
    #[inline]
    pub fn written(&mut self, ticket: Ticket, facts: &WriteFacts<'_>) {
        self.reply(&ticket, Status::OK, response::write_size(facts), |out| {
            response::encode_write(out, facts);
        });
    }

    /// Answers a write whose condition was false; the version is the live value's.
    pub fn condition_false(&mut self, ticket: Ticket, facts: &WriteFacts<'_>) {
        self.reply(&ticket, Status::CONDITION_FALSE, response::write_size(facts), |out| {
            response::encode_write(out, facts);
        });
    }

    /// Answers with an error.
    pub fn failure(&mut self, ticket: Ticket, failure: &Failure<'_>) {
        self.reply(&ticket, failure.status, response::failure_size(failure), |out| {
            response::encode_failure(out, failure);
        });
    }

    /// Answers with what another shard encoded.
    pub fn raw(&mut self, ticket: Ticket, status: Status, body: &[u8]) {
        if !self.has_room(body.len()) {
            return self.failure(ticket, &NO_REPLY_ROOM);
        }
        self.reply(&ticket, status, body.len(), |out| out.extend_from_slice(body));
    }

    /// Answers STATS or ADMIN.
    pub fn json(&mut self, ticket: Ticket, json: Vec<u8>) {
        self.owned(ticket, json);
    }

    /// Answers a BATCH, all of whose operations have a result.
    pub fn batch(&mut self, ticket: Ticket, results: BatchResults) {
        self.owned(ticket, results.into_body());
    }

    /// Answers a SCAN. `next`: token and key of the last record seen, `None` at the end.
    pub fn page(&mut self, ticket: Ticket, page: Page, next: Option<(Token, &[u8])>) {
        self.owned(ticket, page.into_body(next));
    }

    /// The next answer tells the client where the partition lives, because its map is old.
    pub fn attach_route(&mut self, route: Route) {
        self.state.route = Some(route);
    }

    /// The next answer tells the client that the key is hot.
    pub fn mark_hot(&mut self) {
        self.state.hot = true;
    }

    fn owned(&mut self, ticket: Ticket, body: Vec<u8>) {
        if !self.has_room(body.len()) {
            return self.failure(ticket, &NO_REPLY_ROOM);
        }
        self.state.release(&ticket);
        let (head, prefix) = self.head(&ticket, Status::OK);
        let body = if prefix.is_empty() { body } else { [prefix, body].concat() };
        self.state.writer.owned_message(self.out, head, body);
        self.state.settle();
    }

    /// An answer to a request that was admitted.
    #[inline]
    fn reply(
        &mut self,
        ticket: &Ticket,
        status: Status,
        size: usize,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        self.state.release(ticket);
        let (head, prefix) = self.head(ticket, status);
        self.state.writer.message(self.out, head, prefix.len() + size, |out| {
            out.extend_from_slice(&prefix);
            fill(out);
        });
        if size > FRAME_BODY_MAX {
            self.state.settle();
        }
    }

    /// An answer to a request that was never admitted.
    #[cold]
    fn refuse(&mut self, ticket: &Ticket, failure: &Failure<'_>) {
        let (head, _) = self.head(ticket, failure.status);
        self.state.writer.message(self.out, head, response::failure_size(failure), |out| {
            response::encode_failure(out, failure);
        });
    }

    #[inline]
    fn head(&mut self, ticket: &Ticket, status: Status) -> (Head, Vec<u8>) {
        let mut head = Head {
            request_id: ticket.request_id,
            time_or_window: self.state.window,
            code: status.0,
            opcode: ticket.opcode | REPLY,
            flags: 0,
        };
        let mut prefix = Vec::new();
        if let Some(route) = self.state.route.take() {
            route.encode(&mut prefix);
            head.flags |= flag::ROUTE;
        }
        if std::mem::take(&mut self.state.hot) {
            head.flags |= flag::HOT;
        }
        (head, prefix)
    }

    /// Whether a body of this size may wait for the client to take it.
    #[inline]
    fn has_room(&self, size: usize) -> bool {
        let state = &self.state;
        let queued = state.writer.queued_bytes();
        size <= FRAME_BODY_MAX
            || ((queued == 0 || queued + size <= state.long_reply_bytes_max)
                && size <= state.budget.left())
    }

    fn welcome(&mut self, request_id: u32, hello: &Hello<'_>, welcome: &Welcome) {
        let mut body = Vec::new();
        let common = Welcome { features: welcome.features & hello.features, ..welcome.clone() };
        common.encode(hello.wants, &mut body);
        let ticket = Ticket { request_id, opcode: Opcode::Hello.request(), cost: 0 };
        let (head, _) = self.head(&ticket, Status::OK);
        self.state.writer.owned_message(self.out, head, body);
        // The map of a large ring may be long; it is sent whole, before anything else.
        self.state.writer.flush_slices(self.out, usize::MAX);
    }

    #[cold]
    fn goodbye(&mut self, status: Status, reason: &str) {
        let ticket = Ticket { request_id: 0, opcode: Opcode::Close.request(), cost: 0 };
        self.refuse(&ticket, &Failure::new(status, reason));
    }

    /// Admits, decodes and passes on a request that came in one frame.
    #[inline]
    fn request<H>(
        &mut self,
        header: &FrameHeader,
        body: &[u8],
        timing: &Timing<'_>,
        context: &DecodeContext,
        handler: &mut H,
    ) where
        H: FnMut(&mut Replies<'_>, Arrival, Request<'_>),
    {
        if !self.state.admit(header.frame_size()) {
            let ticket = Ticket { request_id: header.request_id, opcode: header.opcode, cost: 0 };
            return self.refuse(&ticket, &TOO_MANY);
        }
        self.admitted(header, body, timing, context, handler);
    }

    /// Decodes and passes on a request that counts as in flight already.
    #[inline]
    fn admitted<H>(
        &mut self,
        header: &FrameHeader,
        body: &[u8],
        timing: &Timing<'_>,
        context: &DecodeContext,
        handler: &mut H,
    ) where
        H: FnMut(&mut Replies<'_>, Arrival, Request<'_>),
    {
        let cost = if header.is_slice() { 0 } else { header.frame_size() };
        let ticket =
            Ticket { request_id: header.request_id, opcode: header.opcode, cost: size_u32(cost) };
        if timing.draining {
            return self
                .failure(ticket, &Failure::new(Status::SHUTTING_DOWN, "the server is draining"));
        }
        let deadline = timing.deadline(header);
        if deadline < timing.now {
            let late =
                Failure::new(Status::EXPIRED, "the deadline passed before the last slice came");
            return self.failure(ticket, &late);
        }
        let Ok(route) = u8::try_from(header.code) else {
            let failure =
                Failure::new(Status::BAD_REQUEST, "reserved bits of the routing hint are not zero");
            return self.failure(ticket, &failure);
        };
        match Request::decode(header.opcode, body, context) {
            Ok(Request::Ping(payload)) => {
                self.reply(&ticket, Status::OK, payload.len(), |out| {
                    out.extend_from_slice(payload)
                });
            }
            Ok(Request::Hello(_)) => {
                self.failure(ticket, &Failure::new(Status::BAD_REQUEST, "a second HELLO"));
            }
            Ok(request) => handler(self, Arrival { ticket, deadline, route }, request),
            Err(refusal) => self.failure(ticket, &refusal.into()),
        }
    }
}

const NO_REPLY_ROOM: Failure<'static> = Failure {
    status: Status::BUSY,
    retry_after_ms: 10,
    acks: 0,
    primary: 0,
    durable: 0,
    detail: 0,
    message: "too many long answers wait to be taken",
};

impl ReplyState {
    /// Counts a request as in flight, if there is room. A lone request always has room.
    #[inline]
    fn admit(&mut self, cost: usize) -> bool {
        let fits = self.in_flight_bytes + cost <= self.in_flight_bytes_max;
        if self.in_flight >= self.in_flight_max || !(fits || self.in_flight == 0) {
            return false;
        }
        self.in_flight += 1;
        self.in_flight_bytes += cost;
        true
    }

    #[inline]
    fn release(&mut self, ticket: &Ticket) {
        debug_assert!(self.in_flight > 0, "a ticket is a request in flight");
        self.in_flight = self.in_flight.saturating_sub(1);
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(ticket.cost as usize);
    }

    /// Brings what is taken from the shared budget in line with what is held.
    fn settle(&mut self) -> bool {
        let wanted = self.gathered + self.writer.queued_bytes();
        self.budget.resize(&mut self.held, wanted)
    }
}

#[cfg(test)]
pub(crate) mod tests;
