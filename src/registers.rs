//! What this node has promised and accepted as a holder of registers, and the `REGISTERS` file
//! that keeps it.
//!
//! Invariant: an answer is given only when what it rests on is durable; what could not be written
//! is forgotten, and was promised to nobody. A register that nothing was accepted for begins with
//! what the node has: the newest catalogue that it knows. Off the hot path.

mod file;

use std::collections::BTreeMap;
use std::path::Path;

use annulus_cluster::NodeId;
use annulus_cluster::message::PeerMessage;
use annulus_cluster::register::{Acceptor, RegisterId, State};
use annulus_engine::disk::Disk;
use annulus_engine::model::WallMicros;

use crate::namespaces::Catalogue;

/// The file, in the data directory.
pub const FILE_NAME: &str = "REGISTERS";
/// Where it is written before it gets its name.
pub const FILE_NAME_NEW: &str = "REGISTERS.new";

/// Why there is no vote. State: as before it was asked for, except that the file may hold more than
/// anybody was told.
#[derive(Debug, thiserror::Error)]
pub enum NoVote {
    /// No member of this cluster asks so.
    #[error("{0}")]
    Refused(&'static str),
    /// It could not be made durable.
    #[error(transparent)]
    Disk(#[from] annulus_engine::Error),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    node: NodeId,
    acceptors: BTreeMap<RegisterId, Acceptor>,
}

impl Registers {
    /// One that has promised and accepted nothing.
    #[must_use]
    pub fn new(node: NodeId) -> Registers {
        Registers { node, acceptors: BTreeMap::new() }
    }

    /// What was promised and accepted for each register that anybody has asked for.
    pub fn iter(&self) -> impl Iterator<Item = (RegisterId, &Acceptor)> {
        self.acceptors.iter().map(|(register, acceptor)| (*register, acceptor))
    }

    /// What was promised and accepted for a register; none when nobody has asked yet.
    #[must_use]
    pub fn acceptor(&self, register: RegisterId) -> Option<&Acceptor> {
        self.acceptors.get(&register)
    }

    /// Answers PREPARE or ACCEPT, when what the answer rests on is durable in `dir`.
    ///
    /// # Errors
    /// [`NoVote`].
    pub async fn vote<D: Disk>(
        &mut self,
        disk: &D,
        dir: &Path,
        wall: WallMicros,
        request: &[u8],
        known: &Catalogue,
    ) -> Result<Vec<u8>, NoVote> {
        let request = PeerMessage::decode(request).map_err(|it| NoVote::Refused(it.0))?;
        let (PeerMessage::Prepare { register, .. } | PeerMessage::Accept { register, .. }) =
            request
        else {
            return Err(NoVote::Refused("no question to a holder of registers"));
        };
        if register != RegisterId::NAMESPACES {
            return Err(NoVote::Refused("there is no such register"));
        }
        let acceptor = match self.acceptors.get(&register) {
            Some(acceptor) => acceptor,
            None => &Acceptor::new(state_of(known)),
        };
        let (answer, durable_first) = match request {
            PeerMessage::Prepare { ballot, .. } => {
                let vote = acceptor.handle_prepare(wall, ballot);
                let result = vote.answer;
                (PeerMessage::Promise { register, ballot, result }, vote.durable_first)
            }
            PeerMessage::Accept { ballot, next, state, .. } => {
                check(register, &state).map_err(NoVote::Refused)?;
                let vote = acceptor.handle_accept(wall, ballot, next, &state);
                let result = vote.answer;
                (PeerMessage::Accepted { register, ballot, result }, vote.durable_first)
            }
            _ => return Err(NoVote::Refused("no question to a holder of registers")),
        };
        if let Some(durable) = durable_first {
            let mut next = self.clone();
            next.acceptors.insert(register, durable);
            next.save(disk, dir).await?;
            *self = next;
        }
        let mut bytes = Vec::new();
        answer.encode(&mut bytes);
        Ok(bytes)
    }
}

/// The register's state that a catalogue is.
#[must_use]
pub fn state_of(catalogue: &Catalogue) -> State {
    State { version: catalogue.generation(), recent: Vec::new(), value: catalogue.encode() }
}

/// The catalogue in a state of the register of namespaces; none when there is none in it.
#[must_use]
pub fn catalogue_of(state: &State) -> Option<Catalogue> {
    let catalogue = Catalogue::decode(&state.value, Path::new(FILE_NAME)).ok()?;
    (catalogue.generation() == state.version && catalogue.encode() == state.value)
        .then_some(catalogue)
}

/// The first rule that a state of a register breaks.
fn check(register: RegisterId, state: &State) -> Result<(), &'static str> {
    match register {
        RegisterId::NAMESPACES if catalogue_of(state).is_some() => Ok(()),
        RegisterId::NAMESPACES => Err("the state of the namespaces is no catalogue"),
        _ => Err("there is no such register"),
    }
}

#[cfg(test)]
mod tests;
