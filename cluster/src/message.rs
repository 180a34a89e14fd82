//! What the shards of different nodes say to each other: [`PeerMessage`] and its bytes.
//!
//! Stands between the coordinator, tracking and repair, which make and take messages, and the
//! connections of `annulus_net::peer_connection`, which carry them. Invariants: every field is
//! checked before it is believed; nothing is allocated beyond what the bytes hold; a message has
//! one encoding, so what decodes encodes to the same bytes. Messages may be lost, doubled, or
//! arrive late and out of order: an exchange that cannot survive that has no message here.
//!
//! Layout: one byte for the kind, then the fields in the order in which the variants declare
//! them, little-endian, without padding. `net/README.md` has the table.

use annulus_engine::model::limits::{KEY_SIZE_MAX, VALUE_SIZE_CEILING};
use annulus_engine::model::token::PARTITION_BITS_MAX;
use annulus_engine::model::{NamespaceId, PartitionId, RecordRef, Timestamp, Token};
use annulus_net::wire::codec::{Malformed, Reader, Write, size_u32};

use crate::member::NodeId;
use crate::register::state::encode_ballot;
use crate::register::{AcceptResult, Ballot, PrepareResult, RegisterId, State};

mod check;
mod gossip;
mod keys;
mod record;
mod register;

pub use check::{Reason, check_record};
pub(crate) use gossip::REPORT_SIZE;
pub use gossip::{Claim, GOSSIP_MESSAGE_SIZE_MAX, Gossip, Report, Said, Vitals};
pub use keys::{KeyAsk, KeyResult};
pub use record::{RECORD_HEADER_SIZE, RecordList, RecordPage};

/// Largest message, in bytes: a record with the largest value that a configuration may allow,
/// twice that for siblings, and room for the fields around it.
pub const MESSAGE_SIZE_MAX: usize = 2 * VALUE_SIZE_CEILING + (64 << 10);
/// How often a request may be handed on from node to node.
pub const FORWARD_HOPS_MAX: u8 = 2;

const _: () = assert!(MESSAGE_SIZE_MAX > VALUE_SIZE_CEILING + RECORD_HEADER_SIZE + KEY_SIZE_MAX);

/// A message between two shards. `id` is chosen by whoever asks, and comes back in the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerMessage<'a> {
    /// Merge this record into your replica.
    Write {
        /// Of the request; 0 when no answer is wanted (read repair).
        id: u64,
        /// Microseconds left for it.
        deadline_us: u32,
        /// Of the sender's topology.
        epoch: u32,
        /// The write, or the key's whole filled state if its kind is `Siblings`.
        record: RecordRef<'a>,
    },
    /// Answers `Write`.
    WriteDone {
        /// Of the request.
        id: u64,
        /// What became of it.
        result: WriteResult,
    },
    /// What does your replica have under this key?
    Read {
        /// Of the request.
        id: u64,
        /// Microseconds left for it.
        deadline_us: u32,
        /// Of the sender's topology.
        epoch: u32,
        /// Hash of the key.
        token: Token,
        /// Of the key.
        namespace: NamespaceId,
        /// The key.
        key: &'a [u8],
        /// Record or digest.
        want: Want,
    },
    /// Answers `Read`.
    ReadDone {
        /// Of the request.
        id: u64,
        /// What was found.
        result: ReadResult<'a>,
    },
    /// Carry out this client's request in my place.
    Forward {
        /// Of the request.
        id: u64,
        /// Microseconds left for it.
        deadline_us: u32,
        /// The client's opcode.
        opcode: u8,
        /// How often it was handed on, this time included: 1 to [`FORWARD_HOPS_MAX`].
        hops: u8,
        /// The client's body.
        body: &'a [u8],
    },
    /// Answers `Forward`.
    ForwardDone {
        /// Of the request.
        id: u64,
        /// The status of the client's reply.
        status: u16,
        /// The body of the client's reply.
        body: &'a [u8],
    },
    /// What the sender's replicas have seen.
    Track {
        /// The announcement that `entries` adds to; 0 with `full`.
        base_version: u64,
        /// Number of this announcement.
        version: u64,
        /// The sender's clock.
        hlc: Timestamp,
        /// No hint that the sender holds is of a write before it.
        hint_floor: Timestamp,
        /// All that the sender took in before it confirmed this map is in its announcements; 0 in
        /// all but the last message of a round.
        epoch: u32,
        /// A line for each partition that changed.
        entries: Vec<TrackEntry<'a>>,
        /// Whether partitions without a line are not held by the sender at all.
        full: bool,
    },
    /// Answers `Track`.
    TrackDone {
        /// The announcement that has arrived.
        version: u64,
        /// The answering clock.
        hlc: Timestamp,
    },
    /// Send me what I lack of this partition.
    Sync {
        /// Of the request.
        id: u64,
        /// Which partition.
        partition: PartitionId,
        /// What the asking replica has seen, encoded.
        seen: &'a [u8],
        /// Only what lies at or behind here.
        from: Token,
        /// Only what lies behind this key of `from`.
        after: Option<(NamespaceId, &'a [u8])>,
        /// About how large a page may be, in bytes.
        bytes_max: u32,
    },
    /// Answers `Sync` and `Fetch`.
    SyncPage {
        /// Of the request.
        id: u64,
        /// Which partition.
        partition: PartitionId,
        /// Records in the order of their keys.
        records: RecordList<'a>,
        /// Behind which key the next page begins; `None`: this is the last one.
        next: Option<(Token, NamespaceId, &'a [u8])>,
        /// What the helper had seen when its scan began, encoded; the same for all pages.
        seen: &'a [u8],
        /// The helper's incarnation of the partition.
        helper_incarnation: u32,
    },
    /// Do our trees agree here?
    Tree {
        /// Of the request.
        id: u64,
        /// Which partition.
        partition: PartitionId,
        /// Of what the sender has seen: trees compare only when it is equal.
        seen_digest: u64,
        /// Depth in the tree, the root is 0.
        level: u8,
        /// Node of that level.
        index: u32,
    },
    /// Answers `Tree`.
    TreeDone {
        /// Of the request.
        id: u64,
        /// What was found.
        result: TreeResult,
    },
    /// Send me your records with these tokens. Answered by `SyncPage`.
    Fetch {
        /// Of the request.
        id: u64,
        /// Which partition.
        partition: PartitionId,
        /// Whose records.
        tokens: Vec<Token>,
    },
    /// Are you there, and what is your time?
    Probe {
        /// Of the request.
        id: u64,
        /// The asking wall clock.
        sent_wall_us: u64,
        /// What the sender knows.
        gossip: Gossip,
    },
    /// Answers `Probe`.
    ProbeDone {
        /// Of the request.
        id: u64,
        /// As asked.
        sent_wall_us: u64,
        /// The answering wall clock when the question came.
        received_wall_us: u64,
        /// The answering wall clock when the answer went.
        replied_wall_us: u64,
        /// What the sender knows.
        gossip: Gossip,
    },
    /// What clients should know of the sender, and the namespaces as it knows them.
    Settings {
        /// Where clients reach the sender.
        client: &'a [u8],
        /// How many changes made the catalogue; the greater is the newer.
        generation: u64,
        /// The namespaces, encoded.
        catalogue: &'a [u8],
    },
    /// Does this member answer you? It does not answer me.
    ProbeFor {
        /// Of the request.
        id: u64,
        /// Who does not answer.
        target: NodeId,
        /// What the sender knows.
        gossip: Gossip,
    },
    /// Answers `ProbeFor`.
    ProbeForDone {
        /// Of the request.
        id: u64,
        /// As asked.
        target: NodeId,
        /// Whether it answered.
        is_reached: bool,
        /// What the sender knows.
        gossip: Gossip,
    },
    /// A part of what the sender knows; answered by another such.
    Gossip {
        /// Whether this is the answer.
        is_answer: bool,
        /// The part.
        gossip: Gossip,
    },
    /// Promise to accept nothing below this ballot.
    Prepare {
        /// Which register.
        register: RegisterId,
        /// The ballot; not zero.
        ballot: Ballot,
    },
    /// Answers `Prepare`.
    Promise {
        /// Which register.
        register: RegisterId,
        /// As asked.
        ballot: Ballot,
        /// Whether it is promised.
        result: PrepareResult,
    },
    /// Accept this state of a register.
    Accept {
        /// Which register.
        register: RegisterId,
        /// With which ballot; not zero.
        ballot: Ballot,
        /// The ballot to promise with it, above `ballot`.
        next: Ballot,
        /// The state.
        state: State,
    },
    /// Answers `Accept`.
    Accepted {
        /// Which register.
        register: RegisterId,
        /// As asked.
        ballot: Ballot,
        /// Whether it is accepted.
        result: AcceptResult,
    },
    /// What do you hold under this key of a linearizable namespace, and do you promise the ballot?
    KeyAsk {
        /// Of the request.
        id: u64,
        /// Of the sender's topology.
        epoch: u32,
        /// The question.
        ask: KeyAsk<'a>,
    },
    /// Answers `KeyAsk`.
    KeySaid {
        /// Of the request.
        id: u64,
        /// As asked.
        ballot: Timestamp,
        /// The answer.
        result: KeyResult<'a>,
    },
    /// Accept this record of a register, if the ballot that is its stamp stands promised. Answered
    /// by `WriteDone`.
    KeyAccept {
        /// Of the request.
        id: u64,
        /// Of the sender's topology.
        epoch: u32,
        /// The record.
        record: RecordRef<'a>,
    },
    /// Whether the sender can keep copies of partitions that it is no home of.
    Room {
        /// It can.
        is_left: bool,
    },
    /// How far the sending shard is with the moves of a map (`moves/mod.rs`).
    Moving {
        /// The map that it works by.
        generation: u32,
        /// The map below which it refuses requests.
        confirmed: u32,
        /// It holds nothing that is not its node's own.
        is_empty: bool,
        /// Partitions that it is a new owner of, and ready for the next stage with.
        ready: Vec<PartitionId>,
    },
}

/// What became of a `Write`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteResult {
    /// It is on the replica's disk.
    Durable,
    /// It is in the replica's memory, and on its disk within so many milliseconds.
    Accepted(u32),
    /// Nothing was written: a status of the client protocol, and why.
    Refused(u16, Reason),
}

/// How much a `Read` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The record.
    Full,
    /// Its digest.
    Digest,
}

/// What a replica has under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadResult<'a> {
    /// The record itself.
    Full {
        /// Every write acknowledged before this moment is in the answer.
        as_of: Timestamp,
        /// Whether the replica is one of the partition's own.
        is_primary: bool,
        /// Tombstones and filled states as they are; `None`: there is nothing under the key.
        record: Option<RecordRef<'a>>,
    },
    /// Its digest.
    Digest {
        /// As in `Full`.
        as_of: Timestamp,
        /// As in `Full`.
        is_primary: bool,
        /// 0 when there is nothing under the key.
        digest: u64,
    },
    /// A status of the client protocol: the replica does not answer.
    Refused(u16),
    /// The range is damaged: the replica does not know. Not the same as absent.
    Unknown,
}

/// A line of `Track`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackEntry<'a> {
    /// Which partition.
    pub partition: PartitionId,
    /// Every write acknowledged before this moment is in the replica.
    pub as_of: Timestamp,
    /// What the replica has seen, encoded.
    pub seen: &'a [u8],
}

/// What a comparison of two trees gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TreeResult {
    /// The same sums.
    Equal,
    /// Different: the sums of the node's children.
    Different(Vec<u64>),
    /// The node is a leaf: token and digest of the version of each of its records.
    Leaf(Vec<(Token, u64)>),
    /// The replicas have not seen the same writes.
    NotComparable,
}

/// First byte of each message.
mod kind {
    pub(super) const WRITE: u8 = 1;
    pub(super) const WRITE_DONE: u8 = 2;
    pub(super) const READ: u8 = 3;
    pub(super) const READ_DONE: u8 = 4;
    pub(super) const FORWARD: u8 = 5;
    pub(super) const FORWARD_DONE: u8 = 6;
    pub(super) const TRACK: u8 = 7;
    pub(super) const TRACK_DONE: u8 = 8;
    pub(super) const SYNC: u8 = 9;
    pub(super) const SYNC_PAGE: u8 = 10;
    pub(super) const TREE: u8 = 11;
    pub(super) const TREE_DONE: u8 = 12;
    pub(super) const FETCH: u8 = 13;
    pub(super) const PROBE: u8 = 14;
    pub(super) const PROBE_DONE: u8 = 15;
    pub(super) const SETTINGS: u8 = 16;
    pub(super) const PROBE_FOR: u8 = 17;
    pub(super) const PROBE_FOR_DONE: u8 = 18;
    pub(super) const GOSSIP: u8 = 19;

    pub(super) const WITH_GOSSIP: [u8; 5] = [PROBE, PROBE_DONE, PROBE_FOR, PROBE_FOR_DONE, GOSSIP];
    pub(super) const PREPARE: u8 = 32;
    pub(super) const PROMISE: u8 = 33;
    pub(super) const ACCEPT: u8 = 34;
    pub(super) const ACCEPTED: u8 = 35;
    pub(super) const KEY_ASK: u8 = 36;
    pub(super) const KEY_SAID: u8 = 37;
    pub(super) const KEY_ACCEPT: u8 = 38;
    pub(super) const ROOM: u8 = 20;
    pub(super) const MOVING: u8 = 21;
}

impl<'a> PeerMessage<'a> {
    /// The kind's name, for logs and counters.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            PeerMessage::Write { .. } => "write",
            PeerMessage::WriteDone { .. } => "write_done",
            PeerMessage::Read { .. } => "read",
            PeerMessage::ReadDone { .. } => "read_done",
            PeerMessage::Forward { .. } => "forward",
            PeerMessage::ForwardDone { .. } => "forward_done",
            PeerMessage::Track { .. } => "track",
            PeerMessage::TrackDone { .. } => "track_done",
            PeerMessage::Sync { .. } => "sync",
            PeerMessage::SyncPage { .. } => "sync_page",
            PeerMessage::Tree { .. } => "tree",
            PeerMessage::TreeDone { .. } => "tree_done",
            PeerMessage::Fetch { .. } => "fetch",
            PeerMessage::Probe { .. } => "probe",
            PeerMessage::ProbeDone { .. } => "probe_done",
            PeerMessage::Settings { .. } => "settings",
            PeerMessage::ProbeFor { .. } => "probe_for",
            PeerMessage::ProbeForDone { .. } => "probe_for_done",
            PeerMessage::Gossip { .. } => "gossip",
            PeerMessage::Prepare { .. } => "prepare",
            PeerMessage::Promise { .. } => "promise",
            PeerMessage::Accept { .. } => "accept",
            PeerMessage::Accepted { .. } => "accepted",
            PeerMessage::KeyAsk { .. } => "key_ask",
            PeerMessage::KeySaid { .. } => "key_said",
            PeerMessage::KeyAccept { .. } => "key_accept",
            PeerMessage::Room { .. } => "room",
            PeerMessage::Moving { .. } => "moving",
        }
    }

    /// Appends the message's bytes.
    ///
    /// # Panics
    /// When a key is longer than `KEY_SIZE_MAX`, or a list than 2^32: the sender's own limits.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            PeerMessage::Write { id, deadline_us, epoch, record } => {
                out.reserve(17 + RECORD_HEADER_SIZE + record.key.len() + record.value.len());
                out.put_u8(kind::WRITE);
                out.put_u64(*id);
                out.put_u32(*deadline_us);
                out.put_u32(*epoch);
                record::encode(record, out);
            }
            PeerMessage::WriteDone { id, result } => {
                out.put_u8(kind::WRITE_DONE);
                out.put_u64(*id);
                result.encode(out);
            }
            PeerMessage::Read { id, deadline_us, epoch, token, namespace, key, want } => {
                out.put_u8(kind::READ);
                out.put_u64(*id);
                out.put_u32(*deadline_us);
                out.put_u32(*epoch);
                out.put_u64(token.0);
                out.put_u32(namespace.0);
                out.put_short(key);
                out.put_u8(match want {
                    Want::Full => 0,
                    Want::Digest => 1,
                });
            }
            PeerMessage::ReadDone { id, result } => {
                out.put_u8(kind::READ_DONE);
                out.put_u64(*id);
                result.encode(out);
            }
            PeerMessage::Forward { id, deadline_us, opcode, hops, body } => {
                out.reserve(15 + body.len());
                out.put_u8(kind::FORWARD);
                out.put_u64(*id);
                out.put_u32(*deadline_us);
                out.put_u8(*opcode);
                out.put_u8(*hops);
                out.put(body);
            }
            PeerMessage::ForwardDone { id, status, body } => {
                out.reserve(11 + body.len());
                out.put_u8(kind::FORWARD_DONE);
                out.put_u64(*id);
                out.put_u16(*status);
                out.put(body);
            }
            PeerMessage::Track { base_version, version, hlc, hint_floor, epoch, entries, full } => {
                out.put_u8(kind::TRACK);
                out.put_u64(*base_version);
                out.put_u64(*version);
                out.put_u64(hlc.0);
                out.put_u64(hint_floor.0);
                out.put_u32(*epoch);
                out.put_u32(size_u32(entries.len()));
                for entry in entries {
                    out.put_u32(entry.partition.0);
                    out.put_u64(entry.as_of.0);
                    put_long(out, entry.seen);
                }
                out.put_u8(u8::from(*full));
            }
            PeerMessage::TrackDone { version, hlc } => {
                out.put_u8(kind::TRACK_DONE);
                out.put_u64(*version);
                out.put_u64(hlc.0);
            }
            PeerMessage::Sync { id, partition, seen, from, after, bytes_max } => {
                out.put_u8(kind::SYNC);
                out.put_u64(*id);
                out.put_u32(partition.0);
                put_long(out, seen);
                out.put_u64(from.0);
                out.put_u8(u8::from(after.is_some()));
                if let Some((namespace, key)) = after {
                    out.put_u32(namespace.0);
                    out.put_short(key);
                }
                out.put_u32(*bytes_max);
            }
            PeerMessage::SyncPage { id, partition, records, next, seen, helper_incarnation } => {
                out.reserve(64 + records.bytes().len() + seen.len());
                out.put_u8(kind::SYNC_PAGE);
                out.put_u64(*id);
                out.put_u32(partition.0);
                out.put_u32(records.count());
                put_long(out, records.bytes());
                out.put_u8(u8::from(next.is_some()));
                if let Some((token, namespace, key)) = next {
                    out.put_u64(token.0);
                    out.put_u32(namespace.0);
                    out.put_short(key);
                }
                put_long(out, seen);
                out.put_u32(*helper_incarnation);
            }
            PeerMessage::Tree { id, partition, seen_digest, level, index } => {
                out.put_u8(kind::TREE);
                out.put_u64(*id);
                out.put_u32(partition.0);
                out.put_u64(*seen_digest);
                out.put_u8(*level);
                out.put_u32(*index);
            }
            PeerMessage::TreeDone { id, result } => {
                out.put_u8(kind::TREE_DONE);
                out.put_u64(*id);
                result.encode(out);
            }
            PeerMessage::Fetch { id, partition, tokens } => {
                out.put_u8(kind::FETCH);
                out.put_u64(*id);
                out.put_u32(partition.0);
                out.put_u32(size_u32(tokens.len()));
                tokens.iter().for_each(|token| out.put_u64(token.0));
            }
            PeerMessage::Probe { id, sent_wall_us, gossip } => {
                out.put_u8(kind::PROBE);
                out.put_u64(*id);
                out.put_u64(*sent_wall_us);
                gossip.encode(out);
            }
            PeerMessage::ProbeDone {
                id,
                sent_wall_us,
                received_wall_us,
                replied_wall_us,
                gossip,
            } => {
                out.put_u8(kind::PROBE_DONE);
                out.put_u64(*id);
                out.put_u64(*sent_wall_us);
                out.put_u64(*received_wall_us);
                out.put_u64(*replied_wall_us);
                gossip.encode(out);
            }
            PeerMessage::Settings { client, generation, catalogue } => {
                out.put_u8(kind::SETTINGS);
                put_long(out, client);
                out.put_u64(*generation);
                put_long(out, catalogue);
            }
            PeerMessage::ProbeFor { id, target, gossip } => {
                out.put_u8(kind::PROBE_FOR);
                out.put_u64(*id);
                out.put_u32(target.0);
                gossip.encode(out);
            }
            PeerMessage::ProbeForDone { id, target, is_reached, gossip } => {
                out.put_u8(kind::PROBE_FOR_DONE);
                out.put_u64(*id);
                out.put_u32(target.0);
                out.put_u8(u8::from(*is_reached));
                gossip.encode(out);
            }
            PeerMessage::Gossip { is_answer, gossip } => {
                out.put_u8(kind::GOSSIP);
                out.put_u8(u8::from(*is_answer));
                gossip.encode(out);
            }
            PeerMessage::Prepare { register, ballot } => {
                register::encode_head(kind::PREPARE, *register, *ballot, out);
            }
            PeerMessage::Promise { register, ballot, result } => {
                register::encode_head(kind::PROMISE, *register, *ballot, out);
                register::encode_promise(result, out);
            }
            PeerMessage::Accept { register, ballot, next, state } => {
                register::encode_head(kind::ACCEPT, *register, *ballot, out);
                encode_ballot(*next, out);
                state.encode(out);
            }
            PeerMessage::Accepted { register, ballot, result } => {
                register::encode_head(kind::ACCEPTED, *register, *ballot, out);
                register::encode_accepted(*result, out);
            }
            PeerMessage::KeyAsk { id, epoch, ask } => keys::encode_ask(*id, *epoch, ask, out),
            PeerMessage::KeySaid { id, ballot, result } => {
                keys::encode_said(*id, *ballot, result, out);
            }
            PeerMessage::KeyAccept { id, epoch, record } => {
                keys::encode_accept(*id, *epoch, record, out);
            }
            PeerMessage::Room { is_left } => {
                out.put_u8(kind::ROOM);
                out.put_u8(u8::from(*is_left));
            }
            PeerMessage::Moving { generation, confirmed, is_empty, ready } => {
                out.put_u8(kind::MOVING);
                out.put_u32(*generation);
                out.put_u32(*confirmed);
                out.put_u8(u8::from(*is_empty));
                out.put_u32(size_u32(ready.len()));
                ready.iter().for_each(|partition| out.put_u32(partition.0));
            }
        }
    }

    /// Reads a message. Allocates only for lists of numbers and lines, and for the states of
    /// registers, never more than twice the bytes they came in.
    ///
    /// # Errors
    /// [`Malformed`] names the first rule broken. Whether a record fits this cluster is a
    /// question of its own: [`check_record`].
    pub fn decode(bytes: &'a [u8]) -> Result<PeerMessage<'a>, Malformed> {
        if bytes.len() > MESSAGE_SIZE_MAX {
            return Err(Malformed("message is too long"));
        }
        let mut reader = Reader::new(bytes);
        let kind = reader.u8()?;
        if kind::WITH_GOSSIP.contains(&kind) && bytes.len() > GOSSIP_MESSAGE_SIZE_MAX {
            return Err(Malformed("gossip is too long"));
        }
        let message = match kind {
            kind::WRITE => PeerMessage::Write {
                id: reader.u64()?,
                deadline_us: reader.u32()?,
                epoch: reader.u32()?,
                record: record::decode(&mut reader)?,
            },
            kind::WRITE_DONE => PeerMessage::WriteDone {
                id: reader.u64()?,
                result: WriteResult::decode(&mut reader)?,
            },
            kind::READ => PeerMessage::Read {
                id: reader.u64()?,
                deadline_us: reader.u32()?,
                epoch: reader.u32()?,
                token: Token(reader.u64()?),
                namespace: NamespaceId(reader.u32()?),
                key: match key(&mut reader)? {
                    [] => return Err(Malformed("key is empty")),
                    key => key,
                },
                want: match reader.u8()? {
                    0 => Want::Full,
                    1 => Want::Digest,
                    _ => return Err(Malformed("neither record nor digest is wanted")),
                },
            },
            kind::READ_DONE => PeerMessage::ReadDone {
                id: reader.u64()?,
                result: ReadResult::decode(&mut reader)?,
            },
            kind::FORWARD => PeerMessage::Forward {
                id: reader.u64()?,
                deadline_us: reader.u32()?,
                opcode: reader.u8()?,
                hops: match reader.u8()? {
                    hops @ 1..=FORWARD_HOPS_MAX => hops,
                    _ => return Err(Malformed("handed on too often, or not at all")),
                },
                body: reader.rest(),
            },
            kind::FORWARD_DONE => PeerMessage::ForwardDone {
                id: reader.u64()?,
                status: reader.u16()?,
                body: reader.rest(),
            },
            kind::TRACK => track(&mut reader)?,
            kind::TRACK_DONE => {
                PeerMessage::TrackDone { version: reader.u64()?, hlc: Timestamp(reader.u64()?) }
            }
            kind::SYNC => PeerMessage::Sync {
                id: reader.u64()?,
                partition: partition(&mut reader)?,
                seen: long(&mut reader)?,
                from: Token(reader.u64()?),
                after: match flag(&mut reader)? {
                    true => Some((NamespaceId(reader.u32()?), key(&mut reader)?)),
                    false => None,
                },
                bytes_max: reader.u32()?,
            },
            kind::SYNC_PAGE => PeerMessage::SyncPage {
                id: reader.u64()?,
                partition: partition(&mut reader)?,
                records: {
                    let count = reader.u32()?;
                    RecordList::decode(count, long(&mut reader)?)?
                },
                next: match flag(&mut reader)? {
                    true => {
                        Some((Token(reader.u64()?), NamespaceId(reader.u32()?), key(&mut reader)?))
                    }
                    false => None,
                },
                seen: long(&mut reader)?,
                helper_incarnation: reader.u32()?,
            },
            kind::TREE => PeerMessage::Tree {
                id: reader.u64()?,
                partition: partition(&mut reader)?,
                seen_digest: reader.u64()?,
                level: reader.u8()?,
                index: reader.u32()?,
            },
            kind::TREE_DONE => PeerMessage::TreeDone {
                id: reader.u64()?,
                result: TreeResult::decode(&mut reader)?,
            },
            kind::FETCH => PeerMessage::Fetch {
                id: reader.u64()?,
                partition: partition(&mut reader)?,
                tokens: list(&mut reader, 8, |reader| Ok(Token(reader.u64()?)))?,
            },
            kind::PROBE => PeerMessage::Probe {
                id: reader.u64()?,
                sent_wall_us: reader.u64()?,
                gossip: Gossip::decode(&mut reader)?,
            },
            kind::PROBE_DONE => PeerMessage::ProbeDone {
                id: reader.u64()?,
                sent_wall_us: reader.u64()?,
                received_wall_us: reader.u64()?,
                replied_wall_us: reader.u64()?,
                gossip: Gossip::decode(&mut reader)?,
            },
            kind::SETTINGS => PeerMessage::Settings {
                client: long(&mut reader)?,
                generation: reader.u64()?,
                catalogue: long(&mut reader)?,
            },
            kind::PROBE_FOR => PeerMessage::ProbeFor {
                id: reader.u64()?,
                target: NodeId(reader.u32()?),
                gossip: Gossip::decode(&mut reader)?,
            },
            kind::PROBE_FOR_DONE => PeerMessage::ProbeForDone {
                id: reader.u64()?,
                target: NodeId(reader.u32()?),
                is_reached: flag(&mut reader)?,
                gossip: Gossip::decode(&mut reader)?,
            },
            kind::GOSSIP => PeerMessage::Gossip {
                is_answer: flag(&mut reader)?,
                gossip: Gossip::decode(&mut reader)?,
            },
            kind::PREPARE | kind::PROMISE | kind::ACCEPT | kind::ACCEPTED => {
                register::decode(kind, &mut reader)?
            }
            kind::KEY_ASK | kind::KEY_SAID | kind::KEY_ACCEPT => keys::decode(kind, &mut reader)?,
            kind::ROOM => PeerMessage::Room { is_left: flag(&mut reader)? },
            kind::MOVING => PeerMessage::Moving {
                generation: reader.u32()?,
                confirmed: reader.u32()?,
                is_empty: flag(&mut reader)?,
                ready: list(&mut reader, 4, partition)?,
            },
            _ => return Err(Malformed("unknown kind of message")),
        };
        reader.finish()?;
        Ok(message)
    }
}

impl WriteResult {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            WriteResult::Durable => out.put_u8(0),
            WriteResult::Accepted(window_ms) => {
                out.put_u8(1);
                out.put_u32(*window_ms);
            }
            WriteResult::Refused(status, reason) => {
                out.put_u8(2);
                out.put_u16(*status);
                out.put_u8(reason.as_u8());
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<WriteResult, Malformed> {
        Ok(match reader.u8()? {
            0 => WriteResult::Durable,
            1 => WriteResult::Accepted(reader.u32()?),
            2 => WriteResult::Refused(reader.u16()?, Reason::from_u8(reader.u8()?)?),
            _ => return Err(Malformed("unknown result of a write")),
        })
    }
}

impl<'a> ReadResult<'a> {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ReadResult::Full { as_of, is_primary, record } => {
                out.put_u8(0);
                out.put_u64(as_of.0);
                out.put_u8(u8::from(*is_primary));
                out.put_u8(u8::from(record.is_some()));
                if let Some(record) = record {
                    record::encode(record, out);
                }
            }
            ReadResult::Digest { as_of, is_primary, digest } => {
                out.put_u8(1);
                out.put_u64(as_of.0);
                out.put_u8(u8::from(*is_primary));
                out.put_u64(*digest);
            }
            ReadResult::Refused(status) => {
                out.put_u8(2);
                out.put_u16(*status);
            }
            ReadResult::Unknown => out.put_u8(3),
        }
    }

    fn decode(reader: &mut Reader<'a>) -> Result<ReadResult<'a>, Malformed> {
        Ok(match reader.u8()? {
            0 => ReadResult::Full {
                as_of: Timestamp(reader.u64()?),
                is_primary: flag(reader)?,
                record: match flag(reader)? {
                    true => Some(record::decode(reader)?),
                    false => None,
                },
            },
            1 => ReadResult::Digest {
                as_of: Timestamp(reader.u64()?),
                is_primary: flag(reader)?,
                digest: reader.u64()?,
            },
            2 => ReadResult::Refused(reader.u16()?),
            3 => ReadResult::Unknown,
            _ => return Err(Malformed("unknown result of a read")),
        })
    }
}

impl TreeResult {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            TreeResult::Equal => out.put_u8(0),
            TreeResult::Different(sums) => {
                out.put_u8(1);
                out.put_u32(size_u32(sums.len()));
                sums.iter().for_each(|sum| out.put_u64(*sum));
            }
            TreeResult::Leaf(records) => {
                out.put_u8(2);
                out.put_u32(size_u32(records.len()));
                for (token, digest) in records {
                    out.put_u64(token.0);
                    out.put_u64(*digest);
                }
            }
            TreeResult::NotComparable => out.put_u8(3),
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<TreeResult, Malformed> {
        Ok(match reader.u8()? {
            0 => TreeResult::Equal,
            1 => TreeResult::Different(list(reader, 8, Reader::u64)?),
            2 => TreeResult::Leaf(list(reader, 16, |r| Ok((Token(r.u64()?), r.u64()?)))?),
            3 => TreeResult::NotComparable,
            _ => return Err(Malformed("unknown result of a comparison")),
        })
    }
}

fn track<'a>(reader: &mut Reader<'a>) -> Result<PeerMessage<'a>, Malformed> {
    Ok(PeerMessage::Track {
        base_version: reader.u64()?,
        version: reader.u64()?,
        hlc: Timestamp(reader.u64()?),
        hint_floor: Timestamp(reader.u64()?),
        epoch: reader.u32()?,
        entries: list(reader, 16, |reader| {
            Ok(TrackEntry {
                partition: partition(reader)?,
                as_of: Timestamp(reader.u64()?),
                seen: long(reader)?,
            })
        })?,
        full: flag(reader)?,
    })
}

/// A list preceded by its count in 32 bits; `size_min` is the least that an element takes.
fn list<'a, T>(
    reader: &mut Reader<'a>,
    size_min: usize,
    element: impl Fn(&mut Reader<'a>) -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    let count = reader.u32()? as usize;
    if count > reader.remaining() / size_min {
        return Err(Malformed("list is longer than the message"));
    }
    let mut elements = Vec::with_capacity(count);
    for _ in 0..count {
        elements.push(element(reader)?);
    }
    Ok(elements)
}

fn flag(reader: &mut Reader<'_>) -> Result<bool, Malformed> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed("flag is neither 0 nor 1")),
    }
}

fn partition(reader: &mut Reader<'_>) -> Result<PartitionId, Malformed> {
    match reader.u32()? {
        number if number >> PARTITION_BITS_MAX == 0 => Ok(PartitionId(number)),
        _ => Err(Malformed("no ring has this partition")),
    }
}

/// A key that may be empty.
fn key<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], Malformed> {
    match reader.short_bytes()? {
        key if key.len() > KEY_SIZE_MAX => Err(Malformed("key is too long")),
        key => Ok(key),
    }
}

/// Bytes preceded by their count in 32 bits.
fn long<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], Malformed> {
    let size = reader.u32()? as usize;
    reader.bytes(size)
}

fn put_long(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u32(size_u32(bytes.len()));
    out.put(bytes);
}

#[cfg(test)]
mod tests;
