//! Answers of one connection: tickets, what counts as in flight, and the means to answer.
//!
//! Invariant: a request is counted when it is admitted and released by its one answer; whatever
//! waits for the client, in frames or in long messages, is bounded per connection and, for long
//! messages, per shard.

use std::cell::Cell;
use std::rc::Rc;

use annulus_engine::model::{Instant, Piece, Pieces, Token, Value};

use super::{Arrival, NANOS_PER_MS, ServerFacts};
use crate::wire::codec::size_u32;
use crate::wire::frame::{FRAME_BODY_MAX, FrameHeader, Opcode, REPLY, flag};
use crate::wire::hello::{Hello, Welcome};
use crate::wire::request::{DecodeContext, Refusal, Request};
use crate::wire::response::{
    self, BatchResults, Failure, Page, ReadFacts, Route, ValueRef, WriteFacts,
};
use crate::wire::slices::{FrameWriter, Head};
use crate::wire::status::Status;

/// The right and the duty to answer one request, once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every request is answered once"]
pub struct Ticket {
    pub(super) request_id: u32,
    pub(super) cost: u32,
    pub(super) opcode: u8,
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
    pub(super) fn resize(&self, held: &mut usize, wanted: usize) -> bool {
        let available = self.left.get() + *held;
        if wanted > available {
            return false;
        }
        self.left.set(available - wanted);
        *held = wanted;
        true
    }
}

/// The half that answers need.
#[derive(Debug)]
pub(super) struct ReplyState {
    pub(super) writer: FrameWriter,
    pub(super) in_flight: u32,
    pub(super) in_flight_bytes: usize,
    pub(super) in_flight_max: u32,
    pub(super) in_flight_bytes_max: usize,
    pub(super) window: u32,
    pub(super) long_reply_bytes_max: usize,
    pub(super) budget: MemoryBudget,
    /// Taken from the budget, for long requests and long replies.
    pub(super) held: usize,
    /// Bytes of long requests, as told to the budget.
    pub(super) gathered: usize,
    /// Goes in front of the next reply.
    pub(super) route: Option<Route>,
    pub(super) hot: bool,
}

pub(super) const TOO_MANY: Failure<'static> = Failure {
    status: Status::BUSY,
    retry_after_ms: 1,
    acks: 0,
    primary: 0,
    durable: 0,
    detail: 0,
    message: "too many unanswered requests on this connection",
};

/// When a request came, and what that means for it.
pub(super) struct Timing<'a> {
    pub(super) now: Instant,
    pub(super) since: Instant,
    pub(super) facts: &'a ServerFacts,
    pub(super) draining: bool,
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
    pub(super) state: &'a mut ReplyState,
    pub(super) out: &'a mut Vec<u8>,
}

impl Replies<'_> {
    /// Answers a read: no value means absent.
    #[inline]
    pub fn read(&mut self, ticket: Ticket, facts: &ReadFacts<'_>, values: &[ValueRef<'_>]) {
        let size = response::read_size(facts, values);
        if !self.has_room(size) {
            return self.failure(ticket, &NO_REPLY_ROOM);
        }
        if size > FRAME_BODY_MAX {
            let body = response::read_in_pieces(facts, values);
            return self.long(&ticket, response::read_status(values), body);
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
    pub fn raw(&mut self, ticket: Ticket, status: Status, body: Value<'_>) {
        if !self.has_room(body.len()) {
            return self.failure(ticket, &NO_REPLY_ROOM);
        }
        if body.len() > FRAME_BODY_MAX {
            return self.long(&ticket, status, Pieces::of(body));
        }
        self.reply(&ticket, status, body.len(), |out| body.copy_to(out));
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

    /// An answer of more than a frame, which waits in pieces until the client takes it.
    fn long(&mut self, ticket: &Ticket, status: Status, body: Pieces) {
        self.state.release(ticket);
        let (head, prefix) = self.head(ticket, status);
        let body = if prefix.is_empty() {
            body
        } else {
            Pieces::new([&[Piece::new(prefix)], body.list()].concat())
        };
        self.state.writer.long_message(head, body);
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
    pub(super) fn refuse(&mut self, ticket: &Ticket, failure: &Failure<'_>) {
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

    pub(super) fn welcome(&mut self, request_id: u32, hello: &Hello<'_>, welcome: &Welcome) {
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
    pub(super) fn goodbye(&mut self, status: Status, reason: &str) {
        let ticket = Ticket { request_id: 0, opcode: Opcode::Close.request(), cost: 0 };
        self.refuse(&ticket, &Failure::new(status, reason));
    }

    /// Admits, decodes and passes on a request that came in one frame.
    #[inline]
    pub(super) fn request<H>(
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
        let request = Request::decode(header.opcode, body, context);
        self.decoded(header, request, timing, handler);
    }

    /// The same for one that came in slices, which counts as in flight already. The value of a put
    /// stays in its pieces; any other body is put together.
    pub(super) fn admitted_long<H>(
        &mut self,
        header: &FrameHeader,
        body: &Pieces,
        timing: &Timing<'_>,
        context: &DecodeContext,
        handler: &mut H,
    ) where
        H: FnMut(&mut Replies<'_>, Arrival, Request<'_>),
    {
        match Request::value_of_put(header.opcode, body, context) {
            Some(at) => {
                let (head, value) = (&body.list()[0].bytes()[..at], body.skip(at));
                let request = Request::decode_put(head, &value, context);
                self.decoded(header, request, timing, handler);
            }
            None => {
                let body = body.value().side_by_side();
                let request = Request::decode(header.opcode, &body, context);
                self.decoded(header, request, timing, handler);
            }
        }
    }

    /// Passes on a request that counts as in flight.
    #[inline]
    fn decoded<H>(
        &mut self,
        header: &FrameHeader,
        request: Result<Request<'_>, Refusal>,
        timing: &Timing<'_>,
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
        match request {
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
    pub(super) fn admit(&mut self, cost: usize) -> bool {
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
    pub(super) fn settle(&mut self) -> bool {
        let wanted = self.gathered + self.writer.queued_bytes();
        self.budget.resize(&mut self.held, wanted)
    }
}
