//! `ClientConnection`: the client's side of one connection. Requests in, bytes out; bytes in,
//! replies out. The sans-I/O twin of `server_connection.rs`.
//!
//! Invariant: every request ends in exactly one event, a reply or a time-out, or is still in
//! [`ClientConnection::pending`]; never more requests are unanswered than the server's window,
//! and what the server may make it hold is bounded.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use annulus_engine::model::Instant;

use crate::wire::codec::{Malformed, Reader};
use crate::wire::decoder::FrameDecoder;
use crate::wire::frame::{FrameError, FrameHeader, Opcode, REPLY, flag};
use crate::wire::hello::{Hello, Welcome};
use crate::wire::request::{DecodeContext, Outgoing};
use crate::wire::response::{Route, decode_failure};
use crate::wire::slices::{FrameWriter, Gathered, Head, Reassembly, ReassemblyLimits};
use crate::wire::status::Status;

/// Largest reply accepted before the limits are known: the HELLO with the map of a large ring.
const WELCOME_SIZE_MAX: usize = 16 << 20;
/// Replies may be larger than values by siblings, versions, contexts.
const REPLY_SIZE_MAX: usize = 64 << 20;

/// Something that the server said.
#[derive(Debug)]
pub enum Event<'a> {
    /// The connection is open; requests may be sent.
    Welcome(Welcome),
    /// The answer to a request.
    Reply(Reply<'a>),
    /// A row of the partition map that is newer than ours. Comes before the reply it came with.
    Route(Route),
    /// No answer came in time. If one comes later it is dropped.
    TimedOut {
        /// Which request.
        id: u32,
    },
    /// The server will take no more requests; answers to earlier ones may still come.
    Goodbye {
        /// Why.
        status: Status,
        /// For people.
        message: String,
    },
}

/// An answer.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// Which request.
    pub id: u32,
    /// How it ended.
    pub status: Status,
    /// The server says that the key is hot.
    pub hot: bool,
    /// To be read by the functions of `wire/response.rs`, according to request and status.
    pub body: &'a [u8],
}

/// Why a request was not sent. Nothing was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    /// The HELLO has not been answered yet.
    #[error("the connection is not open yet")]
    NotOpen,
    /// As many requests are unanswered as the server allows. Try again after a reply.
    #[error("the server's window is full")]
    WindowFull,
    /// The server said goodbye.
    #[error("the server takes no more requests")]
    Closing,
    /// Larger than the server's limits.
    #[error("the request is larger than the server's limit of {limit} bytes")]
    TooBig {
        /// The limit, in bytes.
        limit: u64,
    },
}

/// The connection is of no more use; pending requests will not be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// What came is not the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// A reply's body is not the protocol.
    #[error("the server broke the protocol: {0}")]
    Body(#[from] Malformed),
    /// The server refused the HELLO.
    #[error("the server refused the connection: {status}: {message}")]
    Refused {
        /// Why.
        status: Status,
        /// For people.
        message: String,
    },
    /// The HELLO was not answered in time.
    #[error("the server did not answer the HELLO in time")]
    NoWelcome,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    cost: u32,
    opcode: u8,
    /// Timed out: nobody waits for the reply, but the server still counts it.
    given_up: bool,
}

/// The client's side of one connection.
#[derive(Debug)]
pub struct ClientConnection {
    decoder: FrameDecoder,
    reassembly: Reassembly,
    writer: FrameWriter,
    /// Ordered, so that the same events give the same history.
    pending: BTreeMap<u32, Pending>,
    pending_bytes: usize,
    waiting: usize,
    /// Deadlines of requests; entries of answered ones are skipped when they come up.
    deadlines: BinaryHeap<Reverse<(Instant, u32)>>,
    next_id: u32,
    window: u32,
    limits: Option<(DecodeContext, usize)>,
    closing: bool,
}

impl ClientConnection {
    /// Begins a connection by saying HELLO. `deadline` is that of its answer.
    #[must_use]
    pub fn new(hello: &Hello<'_>, deadline: Instant, out: &mut Vec<u8>) -> ClientConnection {
        let mut connection = ClientConnection {
            decoder: FrameDecoder::new(),
            reassembly: Reassembly::new(ReassemblyLimits {
                messages_max: 1,
                message_size_max: WELCOME_SIZE_MAX,
                bytes_max: WELCOME_SIZE_MAX,
            }),
            writer: FrameWriter::default(),
            pending: BTreeMap::new(),
            pending_bytes: 0,
            waiting: 0,
            deadlines: BinaryHeap::new(),
            next_id: 0,
            window: 1,
            limits: None,
            closing: false,
        };
        connection.enqueue(0, deadline, 0, &Outgoing::Hello(*hello), out);
        connection
    }

    /// Sends a request, and returns its id. `route` is the routing hint of the header.
    ///
    /// # Errors
    /// [`Unsent`]: nothing was sent.
    pub fn send(
        &mut self,
        now: Instant,
        deadline: Instant,
        route: u8,
        request: &Outgoing<'_>,
        out: &mut Vec<u8>,
    ) -> Result<u32, Unsent> {
        let Some((context, bytes_max)) = self.limits else { return Err(Unsent::NotOpen) };
        if self.closing {
            return Err(Unsent::Closing);
        }
        let size = request.size();
        if size > context.request_size_max() {
            return Err(Unsent::TooBig { limit: context.request_size_max() as u64 });
        }
        let full = self.pending.len() >= self.window as usize
            || (self.pending_bytes + size > bytes_max && !self.pending.is_empty());
        if full {
            return Err(Unsent::WindowFull);
        }
        let left_us = deadline.nanos_since(now) / 1000;
        let time = u32::try_from(left_us).unwrap_or(u32::MAX).max(1);
        Ok(self.enqueue(time, deadline, route, request, out))
    }

    /// Turns long requests into frames while `out` is short. Call when the output runs low.
    pub fn fill_output(&mut self, out: &mut Vec<u8>, until: usize) {
        self.writer.flush_slices(out, until);
    }

    /// Takes bytes off the socket and tells what they say.
    ///
    /// # Errors
    /// [`Lost`]: close the socket. What is in [`ClientConnection::pending`] has no answer.
    pub fn receive(&mut self, bytes: &[u8], visit: &mut impl FnMut(Event<'_>)) -> Result<(), Lost> {
        let mut input = bytes;
        // Taken out so that frames, which borrow from it, can be handled by `self`.
        let mut decoder = std::mem::take(&mut self.decoder);
        let result = loop {
            match decoder.next(&mut input) {
                Ok(Some(frame)) if frame.header.is_slice() => match self.reassembly.add(&frame) {
                    Ok(Gathered::Whole(header, body)) => {
                        let body = body.value().side_by_side();
                        if let Err(lost) = self.message(&header, &body, visit) {
                            break Err(lost);
                        }
                    }
                    Ok(Gathered::Unfinished { .. }) => {}
                    // A server never sends more than this end has room for.
                    Ok(_) => break Err(FrameError::BadSlice.into()),
                    Err(error) => break Err(error.into()),
                },
                Ok(Some(frame)) => {
                    if let Err(lost) = self.message(&frame.header, frame.body, visit) {
                        break Err(lost);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        self.decoder = decoder;
        result
    }

    /// The earliest deadline of an unanswered request.
    pub fn next_timeout(&mut self) -> Option<Instant> {
        while let Some(&Reverse((when, id))) = self.deadlines.peek() {
            if self.pending.get(&id).is_some_and(|pending| !pending.given_up) {
                return Some(when);
            }
            self.deadlines.pop();
        }
        None
    }

    /// Gives up the requests whose deadline has passed.
    ///
    /// # Errors
    /// [`Lost::NoWelcome`] when one of them is the HELLO.
    pub fn handle_timeout(
        &mut self,
        now: Instant,
        visit: &mut impl FnMut(Event<'_>),
    ) -> Result<(), Lost> {
        while let Some(when) = self.next_timeout()
            && when <= now
        {
            let Some(Reverse((_, id))) = self.deadlines.pop() else { break };
            if self.limits.is_none() {
                return Err(Lost::NoWelcome);
            }
            if let Some(pending) = self.pending.get_mut(&id) {
                pending.given_up = true;
                self.waiting -= 1;
                visit(Event::TimedOut { id });
            }
        }
        Ok(())
    }

    /// Requests that somebody waits for.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many more requests the server takes now; a long one may still be refused.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.closing || self.limits.is_none() {
            return 0;
        }
        (self.window as usize).saturating_sub(self.pending.len())
    }

    /// Whether the server said goodbye.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// Ids of the requests without an answer that somebody waits for.
    pub fn pending(&self) -> impl Iterator<Item = u32> + '_ {
        self.pending.iter().filter(|(_, pending)| !pending.given_up).map(|(&id, _)| id)
    }

    /// Bytes of long requests that wait for [`ClientConnection::fill_output`].
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.writer.queued_bytes()
    }

    fn enqueue(
        &mut self,
        time: u32,
        deadline: Instant,
        route: u8,
        request: &Outgoing<'_>,
        out: &mut Vec<u8>,
    ) -> u32 {
        let id = self.next_id;
        // Ids come round after 2^32 requests; those still unanswered are skipped.
        self.next_id = self.next_id.wrapping_add(1);
        while self.pending.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let size = request.size();
        let opcode = request.opcode().request();
        let head =
            Head { request_id: id, time_or_window: time, code: u16::from(route), opcode, flags: 0 };
        self.writer.message(out, head, size, |out| request.encode(out));
        let cost = u32::try_from(size).unwrap_or(u32::MAX);
        self.pending.insert(id, Pending { cost, opcode, given_up: false });
        self.pending_bytes += cost as usize;
        self.waiting += 1;
        // Answered requests leave their entry behind; sweep before they outnumber the others.
        if self.deadlines.len() > 2 * self.pending.len() + 1024 {
            let pending = &self.pending;
            self.deadlines.retain(|Reverse((_, id))| pending.contains_key(id));
        }
        self.deadlines.push(Reverse((deadline, id)));
        id
    }

    fn message(
        &mut self,
        header: &FrameHeader,
        body: &[u8],
        visit: &mut impl FnMut(Event<'_>),
    ) -> Result<(), Lost> {
        if header.opcode & REPLY == 0 {
            return Err(FrameError::WrongDirection.into());
        }
        let mut reader = Reader::new(body);
        if header.flags & flag::ROUTE != 0 {
            visit(Event::Route(Route::decode(&mut reader)?));
        }
        let body = reader.rest();
        let status = header.status();
        if Opcode::from_u8(header.opcode) == Some(Opcode::Close) {
            let message = decode_failure(status, body)?.message.to_owned();
            self.closing = true;
            if self.limits.is_none() {
                return Err(Lost::Refused { status, message });
            }
            visit(Event::Goodbye { status, message });
            return Ok(());
        }
        let id = header.request_id;
        let Some(pending) = self.pending.remove(&id) else {
            return Err(Malformed("reply to a request that was not made").into());
        };
        self.pending_bytes -= pending.cost as usize;
        self.window = header.time_or_window.max(1);
        if header.opcode & !REPLY != pending.opcode {
            return Err(Malformed("reply with another opcode than its request").into());
        }
        if pending.given_up {
            return Ok(());
        }
        self.waiting -= 1;
        if pending.opcode == Opcode::Hello.request() {
            if status != Status::OK {
                let message = decode_failure(status, body)?.message.to_owned();
                return Err(Lost::Refused { status, message });
            }
            let welcome = Welcome::decode(body)?;
            self.open(&welcome);
            visit(Event::Welcome(welcome));
            return Ok(());
        }
        visit(Event::Reply(Reply { id, status, hot: header.flags & flag::HOT != 0, body }));
        Ok(())
    }

    fn open(&mut self, welcome: &Welcome) {
        let limits = &welcome.limits;
        let context = DecodeContext {
            hash_seed: welcome.hash_seed,
            value_size_max: limits.value_size_max,
            batch_count_max: limits.batch_count_max,
            message_size_max: limits.message_size_max,
        };
        self.limits = Some((context, limits.in_flight_bytes_max as usize));
        self.reassembly.set_limits(ReassemblyLimits {
            messages_max: limits.in_flight_max as usize,
            message_size_max: REPLY_SIZE_MAX,
            bytes_max: 4 * REPLY_SIZE_MAX,
        });
    }
}

#[cfg(test)]
mod tests;
