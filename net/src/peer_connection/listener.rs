//! `PeerListener`: the end that was dialled, checks who dials, and takes its messages.
//!
//! Invariant: before the handshake has passed it holds at most `HANDSHAKE_BYTES_MAX`, afterwards
//! a frame and one message of at most `message_size_max`, of which only bytes that have arrived;
//! half-said things end after a bounded time.

use annulus_engine::model::Instant;

use super::{NANOS_PER_MS, PeerFacts, goodbye, is_plain, refusal_of};
use crate::wire::decoder::{Frame, FrameDecoder};
use crate::wire::frame::FRAME_BODY_MAX;
use crate::wire::peer::{
    PEER_HANDSHAKE_BODY_MAX, PEER_HELLO, PEER_LANES, PEER_MESSAGE, PEER_WELCOME, PEER_WELCOME_SIZE,
    PeerHello, PeerRefusal, PeerWelcome,
};
use crate::wire::slices::{FrameWriter, Gathered, Head, Reassembly, ReassemblyLimits};

/// What [`PeerListener::receive`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum PeerReceived {
    /// All bytes are consumed.
    Continue,
    /// Another shard is wanted: hand the socket over, and give these bytes (everything since the
    /// connection began) to a new `PeerListener` there. This one is spent.
    HandOver {
        /// The shard, below `shard_count`.
        shard: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// The end of a connection that was dialled.
#[derive(Debug)]
pub struct PeerListener {
    decoder: FrameDecoder,
    reassembly: Reassembly,
    writer: FrameWriter,
    /// Stream position of the first message.
    session: u64,
    peer: Option<PeerHello>,
    opened: Instant,
    /// When the unfinished frame began.
    partial_since: Option<Instant>,
    /// When the last slice of the unfinished message came.
    slice_at: Option<Instant>,
    closed: bool,
}

impl PeerListener {
    /// The end of a connection that was just accepted. `session` is drawn by chance for each
    /// connection.
    #[must_use]
    pub fn new(now: Instant, facts: &PeerFacts, session: u64) -> PeerListener {
        let message_size_max = facts.options.message_size_max;
        let mut decoder = FrameDecoder::new();
        decoder.set_body_size_max(PEER_HANDSHAKE_BODY_MAX);
        PeerListener {
            decoder,
            reassembly: Reassembly::new(ReassemblyLimits {
                messages_max: 1,
                message_size_max,
                bytes_max: message_size_max,
            }),
            writer: FrameWriter::default(),
            session,
            peer: None,
            opened: now,
            partial_since: None,
            slice_at: None,
            closed: false,
        }
    }

    /// Who dialled, once the handshake has passed.
    #[must_use]
    pub fn peer(&self) -> Option<&PeerHello> {
        self.peer.as_ref()
    }

    /// Takes bytes off the socket. Each whole message goes to `handler`.
    ///
    /// # Errors
    /// [`PeerRefusal`]: send what is in `out`, which tells the other end why, then close.
    pub fn receive(
        &mut self,
        now: Instant,
        bytes: &[u8],
        facts: &PeerFacts,
        out: &mut Vec<u8>,
        handler: &mut impl FnMut(&PeerHello, &[u8]),
    ) -> Result<PeerReceived, PeerRefusal> {
        let (mut input, mut took_frame) = (bytes, false);
        while !self.closed {
            let frame = match self.decoder.next(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => return Err(self.close(out, refusal_of(error))),
            };
            took_frame = true;
            let Some(peer) = &self.peer else {
                match greet(&frame, facts) {
                    Ok(hello) if hello.wanted_shard == facts.shard => {
                        self.welcome(hello, facts, out);
                        continue;
                    }
                    Ok(hello) => {
                        self.closed = true;
                        let bytes = [frame.raw, input].concat();
                        return Ok(PeerReceived::HandOver { shard: hello.wanted_shard, bytes });
                    }
                    Err(refusal) => return Err(self.close(out, refusal)),
                }
            };
            let header = frame.header;
            let gathered = match header.opcode {
                PEER_HELLO => Err(PeerRefusal::RepeatedHello),
                PEER_MESSAGE if !is_plain(&header) => Err(PeerRefusal::Unexpected),
                PEER_MESSAGE if header.is_slice() => gather(&mut self.reassembly, &frame),
                PEER_MESSAGE => {
                    handler(peer, frame.body);
                    continue;
                }
                _ => Err(PeerRefusal::Unexpected),
            };
            match gathered {
                Ok(Some(body)) => {
                    self.slice_at = None;
                    handler(peer, &body);
                }
                Ok(None) => self.slice_at = Some(now),
                Err(refusal) => return Err(self.close(out, refusal)),
            }
        }
        self.partial_since = match self.partial_since {
            _ if !self.decoder.is_inside_frame() => None,
            Some(since) if !took_frame => Some(since),
            _ => Some(now),
        };
        Ok(PeerReceived::Continue)
    }

    /// Ends the connection for a reason of the owner's: `out` tells the other end.
    pub fn refuse(&mut self, refusal: PeerRefusal, out: &mut Vec<u8>) {
        if !self.closed {
            self.close(out, refusal);
        }
    }

    /// When [`PeerListener::handle_timeout`] must be called, if nothing happens before.
    #[must_use]
    pub fn next_timeout(&self, facts: &PeerFacts) -> Option<Instant> {
        self.timeouts(facts).into_iter().flatten().map(|(when, _)| when).min()
    }

    /// Ends the connection if its time is up.
    ///
    /// # Errors
    /// [`PeerRefusal`]: send what is in `out`, then close.
    pub fn handle_timeout(
        &mut self,
        now: Instant,
        facts: &PeerFacts,
        out: &mut Vec<u8>,
    ) -> Result<(), PeerRefusal> {
        let due = self.timeouts(facts).into_iter().flatten().find(|(when, _)| *when <= now);
        due.map_or(Ok(()), |(_, refusal)| Err(self.close(out, refusal)))
    }

    /// Bytes of memory held: for the bounds' tests and the metrics.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.decoder.memory() + self.reassembly.bytes()
    }

    fn timeouts(&self, facts: &PeerFacts) -> [Option<(Instant, PeerRefusal)>; 3] {
        if self.closed {
            return [None; 3];
        }
        let options = &facts.options;
        let due = |since: Instant, ms: u64, refusal| {
            (since.after_nanos(ms.saturating_mul(NANOS_PER_MS)), refusal)
        };
        let handshake = PeerRefusal::HandshakeTimeout;
        let message = PeerRefusal::MessageTimeout;
        [
            self.peer.is_none().then(|| due(self.opened, options.handshake_timeout_ms, handshake)),
            self.partial_since.map(|since| due(since, options.frame_timeout_ms, message)),
            self.slice_at.map(|since| due(since, options.slice_timeout_ms, message)),
        ]
    }

    fn welcome(&mut self, hello: PeerHello, facts: &PeerFacts, out: &mut Vec<u8>) {
        let welcome = PeerWelcome {
            cluster: facts.cluster,
            node: facts.node,
            shard: facts.shard,
            shard_count: facts.shard_count,
            life: facts.life,
            session: self.session,
        };
        let head = Head { opcode: PEER_WELCOME, ..Head::default() };
        self.writer.message(out, head, PEER_WELCOME_SIZE, |out| welcome.encode(out));
        self.decoder.set_position(self.session);
        self.decoder.set_body_size_max(FRAME_BODY_MAX);
        self.peer = Some(hello);
    }

    #[cold]
    fn close(&mut self, out: &mut Vec<u8>, refusal: PeerRefusal) -> PeerRefusal {
        self.closed = true;
        goodbye(&mut self.writer, out, refusal);
        refusal
    }
}

/// Checks the first frame.
#[cold]
fn greet(frame: &Frame<'_>, facts: &PeerFacts) -> Result<PeerHello, PeerRefusal> {
    let header = &frame.header;
    if header.opcode != PEER_HELLO || header.is_slice() || !is_plain(header) {
        return Err(PeerRefusal::NoHello);
    }
    let hello = PeerHello::decode(frame.body)?;
    if hello.cluster != facts.cluster {
        return Err(PeerRefusal::Cluster);
    }
    if hello.members_digest != facts.members_digest
        || hello.hash_seed != facts.hash_seed
        || hello.partition_bits != facts.partition_bits
    {
        return Err(PeerRefusal::Digest);
    }
    if hello.wanted_node != facts.node {
        return Err(PeerRefusal::Node);
    }
    facts.check_member(hello.node, hello.life)?;
    if hello.lane >= PEER_LANES {
        return Err(PeerRefusal::Lane);
    }
    if hello.shard >= hello.shard_count || hello.wanted_shard >= facts.shard_count {
        return Err(PeerRefusal::Shard);
    }
    Ok(hello)
}

/// Adds a slice. The message, once it is whole.
fn gather(reassembly: &mut Reassembly, frame: &Frame<'_>) -> Result<Option<Vec<u8>>, PeerRefusal> {
    match reassembly.add(frame).map_err(refusal_of)? {
        Gathered::Unfinished { .. } => Ok(None),
        Gathered::Whole(_, body) => Ok(Some(body.value().to_vec())),
        Gathered::TooBig => Err(PeerRefusal::TooBig),
        Gathered::NoRoom | Gathered::Dropped => Err(PeerRefusal::BadSlice),
    }
}
