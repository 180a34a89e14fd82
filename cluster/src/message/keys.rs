//! The messages of keys that are registers: their bytes.
//!
//! Invariant: a head that is shown belongs to a record that somebody wrote; a ballot that is zero
//! asks for no promise.

use annulus_engine::model::{Dot, OriginId, RecordRef, Timestamp, Token};
use annulus_net::wire::codec::{Malformed, Reader, Write};

use super::{PeerMessage, Want, flag, key, kind, record};
use crate::keys::{Head, Shown, Version};

/// What a home says of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyResult<'a> {
    /// The ballot is promised if it was not zero, and this is what the home holds.
    Head(Shown),
    /// The same with the record itself.
    Whole {
        /// As in [`Shown`].
        purged: Timestamp,
        /// The record as it is stored; `None`: there is nothing.
        record: Option<RecordRef<'a>>,
    },
    /// Not promised: this ballot was, or is held.
    Conflict(Timestamp),
    /// A status of the client protocol: it does not answer.
    Refused(u16),
}

/// A question about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyAsk<'a> {
    /// The ballot to promise, or zero.
    pub ballot: Timestamp,
    /// Hash of the key.
    pub token: Token,
    /// Of the key.
    pub namespace: annulus_engine::model::NamespaceId,
    /// The key.
    pub key: &'a [u8],
    /// Whether the value is wanted.
    pub want: Want,
}

pub(super) fn encode_ask(id: u64, epoch: u32, ask: &KeyAsk<'_>, out: &mut Vec<u8>) {
    out.put_u8(kind::KEY_ASK);
    out.put_u64(id);
    out.put_u32(epoch);
    out.put_u64(ask.ballot.0);
    out.put_u64(ask.token.0);
    out.put_u32(ask.namespace.0);
    out.put_short(ask.key);
    out.put_u8(match ask.want {
        Want::Full => 0,
        Want::Digest => 1,
    });
}

pub(super) fn encode_said(id: u64, ballot: Timestamp, result: &KeyResult<'_>, out: &mut Vec<u8>) {
    out.put_u8(kind::KEY_SAID);
    out.put_u64(id);
    out.put_u64(ballot.0);
    match result {
        KeyResult::Head(shown) => {
            out.put_u8(0);
            out.put_u64(shown.purged.0);
            out.put_u8(u8::from(shown.head.is_some()));
            if let Some(head) = &shown.head {
                put_version(head.stored, out);
                put_version(head.version, out);
                out.put_u8(u8::from(head.is_put));
                out.put_u64(head.expiry_ms);
            }
        }
        KeyResult::Whole { purged, record } => {
            out.put_u8(1);
            out.put_u64(purged.0);
            out.put_u8(u8::from(record.is_some()));
            if let Some(record) = record {
                record::encode(record, out);
            }
        }
        KeyResult::Conflict(seen) => {
            out.put_u8(2);
            out.put_u64(seen.0);
        }
        KeyResult::Refused(status) => {
            out.put_u8(3);
            out.put_u16(*status);
        }
    }
}

pub(super) fn encode_accept(id: u64, epoch: u32, record: &RecordRef<'_>, out: &mut Vec<u8>) {
    out.put_u8(kind::KEY_ACCEPT);
    out.put_u64(id);
    out.put_u32(epoch);
    record::encode(record, out);
}

pub(super) fn decode<'a>(kind: u8, reader: &mut Reader<'a>) -> Result<PeerMessage<'a>, Malformed> {
    let id = reader.u64()?;
    Ok(match kind {
        kind::KEY_ASK => PeerMessage::KeyAsk {
            id,
            epoch: reader.u32()?,
            ask: KeyAsk {
                ballot: Timestamp(reader.u64()?),
                token: Token(reader.u64()?),
                namespace: annulus_engine::model::NamespaceId(reader.u32()?),
                key: match key(reader)? {
                    [] => return Err(Malformed("key is empty")),
                    key => key,
                },
                want: match reader.u8()? {
                    0 => Want::Full,
                    1 => Want::Digest,
                    _ => return Err(Malformed("neither record nor head is wanted")),
                },
            },
        },
        kind::KEY_SAID => PeerMessage::KeySaid {
            id,
            ballot: Timestamp(reader.u64()?),
            result: match reader.u8()? {
                0 => KeyResult::Head(Shown {
                    purged: Timestamp(reader.u64()?),
                    head: match flag(reader)? {
                        true => Some(Head {
                            stored: version(reader)?,
                            version: version(reader)?,
                            is_put: flag(reader)?,
                            expiry_ms: reader.u64()?,
                        }),
                        false => None,
                    },
                }),
                1 => KeyResult::Whole {
                    purged: Timestamp(reader.u64()?),
                    record: match flag(reader)? {
                        true => Some(record::decode(reader)?),
                        false => None,
                    },
                },
                2 => KeyResult::Conflict(Timestamp(reader.u64()?)),
                3 => KeyResult::Refused(reader.u16()?),
                _ => return Err(Malformed("unknown answer about a key")),
            },
        },
        _ => PeerMessage::KeyAccept { id, epoch: reader.u32()?, record: record::decode(reader)? },
    })
}

fn put_version((timestamp, dot): Version, out: &mut Vec<u8>) {
    out.put_u64(timestamp.0);
    out.put_u64(dot.sequence);
    out.put_u32(dot.origin.0);
}

fn version(reader: &mut Reader<'_>) -> Result<Version, Malformed> {
    let (timestamp, sequence) = (Timestamp(reader.u64()?), reader.u64()?);
    let origin = OriginId(reader.u32()?);
    if sequence == 0 {
        return Err(Malformed("record without a dot"));
    }
    Ok((timestamp, Dot { origin, sequence }))
}
