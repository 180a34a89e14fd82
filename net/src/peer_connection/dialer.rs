//! `PeerDialer`: the end that dials, introduces itself, and sends messages.
//!
//! Invariant: nothing but the PEER_HELLO goes out before the PEER_WELCOME has come. Messages of
//! up to a frame leave in their order; longer ones leave in theirs, one after the other, slice by
//! slice, and short ones pass between the slices.

use std::collections::VecDeque;
use std::mem;

use annulus_engine::model::{Instant, OriginId};

use super::{NANOS_PER_MS, PeerFacts, refusal_of};
use crate::wire::decoder::FrameDecoder;
use crate::wire::frame::FRAME_BODY_MAX;
use crate::wire::peer::{
    PEER_CLOSE, PEER_HANDSHAKE_BODY_MAX, PEER_HELLO, PEER_HELLO_SIZE, PEER_MESSAGE, PEER_WELCOME,
    PeerRefusal, PeerWelcome,
};
use crate::wire::slices::{FrameWriter, Head};

/// Whom a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerTarget {
    /// The node that should answer.
    pub node: OriginId,
    /// Which of its shards.
    pub shard: u32,
    /// Which lane.
    pub lane: u8,
}

/// The dialling end of a connection.
#[derive(Debug)]
pub struct PeerDialer {
    decoder: FrameDecoder,
    writer: FrameWriter,
    /// Messages that wait: all of them before the welcome, long ones afterwards.
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    target: PeerTarget,
    welcome: Option<PeerWelcome>,
    opened: Instant,
    closed: bool,
}

impl PeerDialer {
    /// An end whose socket has just been connected: `out` begins with the PEER_HELLO.
    #[must_use]
    pub fn new(
        now: Instant,
        facts: &PeerFacts,
        target: PeerTarget,
        out: &mut Vec<u8>,
    ) -> PeerDialer {
        let mut decoder = FrameDecoder::new();
        decoder.set_body_size_max(PEER_HANDSHAKE_BODY_MAX);
        let mut writer = FrameWriter::default();
        let head = Head { opcode: PEER_HELLO, ..Head::default() };
        writer.message(out, head, PEER_HELLO_SIZE, |out| facts.hello(target).encode(out));
        PeerDialer {
            decoder,
            writer,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            target,
            welcome: None,
            opened: now,
            closed: false,
        }
    }

    /// Whom it is for.
    #[must_use]
    pub fn target(&self) -> PeerTarget {
        self.target
    }

    /// The other end's answer, once it has come.
    #[must_use]
    pub fn welcome(&self) -> Option<&PeerWelcome> {
        self.welcome.as_ref()
    }

    /// Takes bytes off the socket. Returns whether the connection has become ready; then what
    /// waited is in `out`.
    ///
    /// # Errors
    /// [`PeerRefusal`]: the other end's reason, or what is wrong with what it says. The
    /// connection must be closed; what waited is lost.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        facts: &PeerFacts,
        out: &mut Vec<u8>,
    ) -> Result<bool, PeerRefusal> {
        let (mut input, mut ready) = (bytes, false);
        while !self.closed {
            let frame = match self.decoder.next(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => return Err(self.close(refusal_of(error))),
            };
            let header = frame.header;
            let refusal = match header.opcode {
                PEER_CLOSE => {
                    PeerRefusal::from_number(header.code).unwrap_or(PeerRefusal::Unexpected)
                }
                PEER_WELCOME if self.welcome.is_some() => PeerRefusal::RepeatedHello,
                PEER_WELCOME if super::is_plain(&header) && !header.is_slice() => {
                    match check(frame.body, self.target, facts) {
                        Ok(welcome) => {
                            self.writer.set_position(welcome.session);
                            self.welcome = Some(welcome);
                            self.send_waiting(out);
                            ready = true;
                            continue;
                        }
                        Err(refusal) => refusal,
                    }
                }
                _ => PeerRefusal::Unexpected,
            };
            return Err(self.close(refusal));
        }
        Ok(ready)
    }

    /// Sends a message, or keeps it until it can be sent. Takes the bytes out of `body`, and its
    /// memory too if they have to wait.
    pub fn message(&mut self, body: &mut Vec<u8>, out: &mut Vec<u8>) {
        if self.welcome.is_some() && body.len() <= FRAME_BODY_MAX {
            self.writer.message(out, HEAD, body.len(), |out| out.extend_from_slice(body));
            body.clear();
        } else {
            self.waiting_bytes += body.len();
            self.waiting.push_back(mem::take(body));
        }
    }

    /// Turns long messages into frames while `out` is shorter than `until`.
    pub fn fill_output(&mut self, out: &mut Vec<u8>, until: usize) {
        if self.welcome.is_none() {
            return;
        }
        loop {
            self.writer.flush_slices(out, until);
            if self.writer.queued_bytes() > 0 {
                return;
            }
            // One long message at a time, so that the other end puts together only one.
            let Some(body) = self.waiting.pop_front() else { return };
            self.waiting_bytes -= body.len();
            self.writer.owned_message(out, HEAD, body);
        }
    }

    /// Bytes that wait here.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.waiting_bytes + self.writer.queued_bytes()
    }

    /// When [`PeerDialer::handle_timeout`] must be called, if nothing happens before.
    #[must_use]
    pub fn next_timeout(&self, facts: &PeerFacts) -> Option<Instant> {
        let limit = facts.options.handshake_timeout_ms.saturating_mul(NANOS_PER_MS);
        (self.welcome.is_none() && !self.closed).then(|| self.opened.after_nanos(limit))
    }

    /// Ends the connection if its time is up.
    ///
    /// # Errors
    /// [`PeerRefusal::HandshakeTimeout`]; the connection must be closed.
    pub fn handle_timeout(&mut self, now: Instant, facts: &PeerFacts) -> Result<(), PeerRefusal> {
        match self.next_timeout(facts) {
            Some(when) if when <= now => Err(self.close(PeerRefusal::HandshakeTimeout)),
            _ => Ok(()),
        }
    }

    /// The welcome has come: frames for what waited, except for long messages.
    fn send_waiting(&mut self, out: &mut Vec<u8>) {
        for mut body in mem::take(&mut self.waiting) {
            self.waiting_bytes -= body.len();
            self.message(&mut body, out);
        }
    }

    fn close(&mut self, refusal: PeerRefusal) -> PeerRefusal {
        self.closed = true;
        refusal
    }
}

const HEAD: Head =
    Head { request_id: 0, time_or_window: 0, code: 0, opcode: PEER_MESSAGE, flags: 0 };

/// Whether the one who answers is the one who was meant.
fn check(body: &[u8], target: PeerTarget, facts: &PeerFacts) -> Result<PeerWelcome, PeerRefusal> {
    let welcome = PeerWelcome::decode(body).map_err(|_| PeerRefusal::BadHello)?;
    if welcome.cluster != facts.cluster {
        return Err(PeerRefusal::Cluster);
    }
    if welcome.node != target.node {
        return Err(PeerRefusal::Node);
    }
    if welcome.shard != target.shard || welcome.shard >= welcome.shard_count {
        return Err(PeerRefusal::Shard);
    }
    facts.check_member(welcome.node, welcome.life)?;
    Ok(welcome)
}
