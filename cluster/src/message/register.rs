//! The messages of registers: their bytes.
//!
//! Invariant: a ballot that is asked for is one that somebody may propose with, never zero, and
//! what is promised with ACCEPT is above it; so what decodes may be handed to an acceptor.

use annulus_net::wire::codec::{Malformed, Reader, Write};

use super::{PeerMessage, kind};
use crate::register::state::{decode_ballot, encode_ballot};
use crate::register::{AcceptResult, Ballot, PrepareResult, RegisterId, State};

/// What all four begin with: kind, register (4), ballot (20).
pub(super) fn encode_head(kind: u8, register: RegisterId, ballot: Ballot, out: &mut Vec<u8>) {
    out.put_u8(kind);
    out.put_u32(register.0);
    encode_ballot(ballot, out);
}

pub(super) fn encode_promise(result: &PrepareResult, out: &mut Vec<u8>) {
    match result {
        PrepareResult::Promised(accepted, state) => {
            out.put_u8(0);
            encode_ballot(*accepted, out);
            state.encode(out);
        }
        PrepareResult::Conflict(seen) => {
            out.put_u8(1);
            encode_ballot(*seen, out);
        }
    }
}

pub(super) fn encode_accepted(result: AcceptResult, out: &mut Vec<u8>) {
    match result {
        AcceptResult::Accepted => out.put_u8(0),
        AcceptResult::Conflict(seen) => {
            out.put_u8(1);
            encode_ballot(seen, out);
        }
    }
}

pub(super) fn decode<'a>(kind: u8, reader: &mut Reader<'_>) -> Result<PeerMessage<'a>, Malformed> {
    let register = RegisterId(reader.u32()?);
    let ballot = decode_ballot(reader)?;
    if ballot.counter == 0 {
        return Err(Malformed("nobody proposes with ballot zero"));
    }
    Ok(match kind {
        kind::PREPARE => PeerMessage::Prepare { register, ballot },
        kind::PROMISE => {
            let result = match reader.u8()? {
                0 => {
                    PrepareResult::Promised(below(ballot, decode_ballot(reader)?)?, state(reader)?)
                }
                1 => PrepareResult::Conflict(decode_ballot(reader)?),
                _ => return Err(Malformed("neither promised nor refused")),
            };
            PeerMessage::Promise { register, ballot, result }
        }
        kind::ACCEPT => {
            let next = decode_ballot(reader)?;
            if next <= ballot {
                return Err(Malformed("the next ballot is not above the present one"));
            }
            PeerMessage::Accept { register, ballot, next, state: state(reader)? }
        }
        _ => {
            let result = match reader.u8()? {
                0 => AcceptResult::Accepted,
                1 => AcceptResult::Conflict(decode_ballot(reader)?),
                _ => return Err(Malformed("neither accepted nor refused")),
            };
            PeerMessage::Accepted { register, ballot, result }
        }
    })
}

fn state(reader: &mut Reader<'_>) -> Result<State, Malformed> {
    State::decode(reader)
}

fn below(ballot: Ballot, accepted: Ballot) -> Result<Ballot, Malformed> {
    match accepted < ballot {
        true => Ok(accepted),
        false => Err(Malformed("a promise tells of a ballot that is not below its own")),
    }
}
