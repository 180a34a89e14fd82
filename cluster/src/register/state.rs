//! What a register holds: a value, how many changes made it, and which were the last.
//!
//! Invariant: `recent` has the ballots of the last changes in growing order, and lacks one only if
//! [`RECENT_MAX`] later ones are in it; a proposer learns from it what became of its attempts.

use annulus_net::wire::codec::{Malformed, Reader, Write, size_u32};

use super::ballot::Ballot;
use crate::member::NodeId;

/// Most changes that a state remembers: a change that is overtaken by as many others while it
/// tries again is answered as one that may be applied.
pub const RECENT_MAX: usize = 32;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Grows with every change.
    pub version: u64,
    /// Ballots of the changes that made it, the last at the end.
    pub recent: Vec<Ballot>,
    /// The value; what it means is the change's business.
    pub value: Vec<u8>,
}

/// What a state says of a change that was attempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// The attempt with this ballot has made it, or one of the states before it.
    Made(Ballot),
    /// None has, nor will one if this state is succeeded.
    NotMade,
    /// Too many changes have been made since.
    Forgotten,
}

impl State {
    /// The state that follows this one by a change.
    #[must_use]
    pub fn changed(&self, by: Ballot, version: u64, value: Vec<u8>) -> State {
        let skip = (self.recent.len() + 1).saturating_sub(RECENT_MAX);
        let recent = self.recent.iter().skip(skip).copied().chain([by]).collect();
        State { version, recent, value }
    }

    /// What became of attempts with these ballots, which grow.
    #[must_use]
    pub fn trace(&self, attempts: &[Ballot]) -> Trace {
        let Some(first) = attempts.first() else { return Trace::NotMade };
        match self.recent.iter().find(|ballot| attempts.contains(ballot)) {
            Some(ballot) => Trace::Made(*ballot),
            None if self.recent.len() >= RECENT_MAX && self.recent[0] > *first => Trace::Forgotten,
            None => Trace::NotMade,
        }
    }

    /// Appends its bytes: version (8), count of ballots (1), the ballots, size (4), value.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(13 + self.recent.len() * Ballot::SIZE + self.value.len());
        out.put_u64(self.version);
        out.put_u8(u8::try_from(self.recent.len()).expect("at most RECENT_MAX"));
        self.recent.iter().for_each(|ballot| encode_ballot(*ballot, out));
        out.put_u32(size_u32(self.value.len()));
        out.put(&self.value);
    }

    /// Reads what [`State::encode`] wrote. Allocates what is there, not what is announced.
    ///
    /// # Errors
    /// [`Malformed`] names the first rule broken.
    pub fn decode(reader: &mut Reader<'_>) -> Result<State, Malformed> {
        let version = reader.u64()?;
        let count = usize::from(reader.u8()?);
        if count > RECENT_MAX {
            return Err(Malformed("a state remembers too many changes"));
        }
        let mut recent: Vec<Ballot> = Vec::with_capacity(count);
        for _ in 0..count {
            let ballot = decode_ballot(reader)?;
            if recent.last().is_some_and(|last| *last >= ballot) {
                return Err(Malformed("the changes of a state are out of order"));
            }
            recent.push(ballot);
        }
        let size = reader.u32()? as usize;
        let value = reader.bytes(size)?.to_vec();
        Ok(State { version, recent, value })
    }
}

/// Appends a ballot's bytes.
pub fn encode_ballot(ballot: Ballot, out: &mut Vec<u8>) {
    out.put_u64(ballot.counter);
    out.put_u64(ballot.session);
    out.put_u32(ballot.node.0);
}

/// Reads a ballot.
///
/// # Errors
/// [`Malformed`] when the bytes end, or the ballot is beyond what anybody may propose with.
pub fn decode_ballot(reader: &mut Reader<'_>) -> Result<Ballot, Malformed> {
    let (counter, session) = (reader.u64()?, reader.u64()?);
    let ballot = Ballot { counter, node: NodeId(reader.u32()?), session };
    match counter {
        // Half of all counters are 71 years of clock: the rest is room to count on.
        counter if counter >> 63 == 0 => Ok(ballot),
        _ => Err(Malformed("a ballot is beyond the end of time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ballot(counter: u64) -> Ballot {
        Ballot { counter, node: NodeId(1), session: 1 }
    }

    #[test]
    fn attempts_are_traced_until_they_are_forgotten() {
        let mut state = State::default();
        for counter in 1..=40u64 {
            state = state.changed(ballot(10 * counter), counter, vec![]);
        }
        assert_eq!((state.version, state.recent.len()), (40, RECENT_MAX));
        assert_eq!(state.trace(&[ballot(205), ballot(300)]), Trace::Made(ballot(300)));
        assert_eq!(state.trace(&[ballot(305)]), Trace::NotMade);
        assert_eq!(state.trace(&[ballot(90)]), Trace::Made(ballot(90)));
        assert_eq!(state.trace(&[ballot(80)]), Trace::Forgotten);
        assert_eq!(state.trace(&[]), Trace::NotMade);
        let few = State::default().changed(ballot(50), 1, vec![]);
        assert_eq!(few.trace(&[ballot(10)]), Trace::NotMade);
    }

    #[test]
    fn a_state_reads_back_and_a_broken_one_is_refused() {
        let state = State::default().changed(ballot(3), 1, b"a".to_vec());
        let state = state.changed(ballot(5), 2, b"bc".to_vec());
        let mut bytes = Vec::new();
        state.encode(&mut bytes);
        let decode = |bytes: &[u8]| State::decode(&mut Reader::new(bytes));
        assert_eq!(decode(&bytes).as_ref(), Ok(&state));
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err());
        }
        let disordered = State { recent: vec![ballot(5), ballot(5)], ..state };
        bytes.clear();
        disordered.encode(&mut bytes);
        assert!(decode(&bytes).is_err());
        bytes[8] = 33;
        assert!(decode(&bytes).is_err());
    }
}
