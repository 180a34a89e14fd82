//! `ServerConnection`: the server's side of one connection. Bytes in, requests out; answers in,
//! bytes out.
//!
//! Invariants: whatever a client sends or does not send, a connection holds a bounded amount of
//! memory and ends after a bounded time of half-said things; every request is answered once, by
//! its [`Ticket`]. It does no I/O and reads no clock: the pump feeds it and asks
//! [`ServerConnection::next_timeout`]. On the read path between `wire/decoder.rs` and the pump.

mod replies;

use annulus_engine::model::{Instant, Pieces};

pub use replies::{MemoryBudget, Replies, Ticket};

use crate::wire::decoder::{Frame, FrameDecoder};
use crate::wire::frame::{FRAME_BODY_MAX, FrameError, FrameHeader, HEADER_SIZE, Opcode, REPLY};
use crate::wire::hello::{self, Hello, Welcome};
use crate::wire::request::{DecodeContext, Request};
use crate::wire::response::Failure;
use crate::wire::slices::{FrameWriter, Gathered, Reassembly, ReassemblyLimits};
use crate::wire::status::Status;
use replies::{ReplyState, TOO_MANY, Timing};

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
                    replies.admitted_long(&header, &body, &timing, &context, handler);
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
type Whole = (FrameHeader, Pieces, Instant);

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

#[cfg(test)]
pub(crate) mod tests;
