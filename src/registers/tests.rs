//! The file survives crashes and refuses damage; a vote that was not written was not given.

use annulus_cluster::register::{AcceptResult, Ballot, PrepareResult};
use annulus_engine::sim::{Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor};

use super::*;
use crate::config::Compression;
use crate::namespaces::Settings;

const NODE: NodeId = NodeId(2);
const REGISTER: RegisterId = RegisterId::NAMESPACES;

struct Setup {
    executor: SimExecutor,
    disk: SimDisk,
    registers: Registers,
    catalogue: Catalogue,
}

fn ballot(counter: u64) -> Ballot {
    Ballot { counter, node: NodeId(1), session: 1 }
}

impl Setup {
    fn new() -> Setup {
        let executor = SimExecutor::new(7);
        let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(1));
        executor.run(async {
            disk.create_dir(Path::new("data")).await.unwrap();
            disk.sync_dir(Path::new("")).await.unwrap();
        });
        let catalogue = Catalogue::new(Compression::Lz4);
        Setup { executor, disk, registers: Registers::new(NODE), catalogue }
    }

    fn ask(&mut self, request: &PeerMessage<'_>) -> Result<PeerMessage<'static>, NoVote> {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let Setup { executor, disk, registers, catalogue } = self;
        let dir = Path::new("data");
        let answer = executor.run(registers.vote(disk, dir, WallMicros(0), &bytes, catalogue))?;
        Ok(match PeerMessage::decode(&answer).unwrap() {
            PeerMessage::Promise { register, ballot, result } => {
                PeerMessage::Promise { register, ballot, result }
            }
            PeerMessage::Accepted { register, ballot, result } => {
                PeerMessage::Accepted { register, ballot, result }
            }
            other => panic!("{other:?}"),
        })
    }

    fn prepare(&mut self, counter: u64) -> Result<PrepareResult, NoVote> {
        let ballot = ballot(counter);
        match self.ask(&PeerMessage::Prepare { register: REGISTER, ballot })? {
            PeerMessage::Promise { result, .. } => Ok(result),
            other => panic!("{other:?}"),
        }
    }

    fn accept(&mut self, counter: u64, state: State) -> Result<AcceptResult, NoVote> {
        let (ballot, next) = (ballot(counter), ballot(counter + 1));
        match self.ask(&PeerMessage::Accept { register: REGISTER, ballot, next, state })? {
            PeerMessage::Accepted { result, .. } => Ok(result),
            other => panic!("{other:?}"),
        }
    }

    /// The power is cut, and the node starts again.
    fn crash(&mut self, seed: u64) {
        self.disk = self.disk.crash_onto(&self.executor.runtime(), seed);
        let loaded = Registers::load(&self.disk, Path::new("data"), NODE);
        let loaded = self.executor.run(loaded).expect("the file is whole");
        self.registers = loaded.unwrap_or_else(|| Registers::new(NODE));
    }
}

fn changed(name: &str) -> State {
    let mut catalogue = Catalogue::new(Compression::Lz4);
    catalogue.create(name, &Settings::default(), Compression::None).unwrap();
    State { recent: vec![ballot(3)], ..state_of(&catalogue) }
}

#[test]
fn what_was_answered_survives_a_crash() {
    for seed in 0..20 {
        let mut setup = Setup::new();
        let begun = state_of(&setup.catalogue);
        assert_eq!(setup.prepare(3).unwrap(), PrepareResult::Promised(Ballot::ZERO, begun));
        setup.crash(seed);
        assert_eq!(setup.prepare(2).unwrap(), PrepareResult::Conflict(ballot(3)));
        assert_eq!(setup.accept(3, changed("a")).unwrap(), AcceptResult::Accepted);
        setup.crash(seed);
        let accepted = setup.prepare(9).unwrap();
        assert_eq!(accepted, PrepareResult::Promised(ballot(3), changed("a")));
        assert_eq!(setup.accept(4, changed("b")).unwrap(), AcceptResult::Conflict(ballot(9)));
    }
}

#[test]
fn a_vote_that_could_not_be_written_is_not_given_and_a_crash_leaves_one_of_both() {
    for (at, operation) in (1..).zip([Op::Write, Op::Sync, Op::Rename, Op::SyncDir]) {
        let mut setup = Setup::new();
        setup.prepare(3).unwrap();
        let before = setup.registers.clone();
        setup.disk.inject(Rule::nth(operation, 1, Fault::Eio));
        assert!(matches!(setup.accept(3, changed("a")), Err(NoVote::Disk(_))), "{operation:?}");
        assert_eq!(setup.registers, before);
        setup.disk.clear_faults();
        let mut other = before.clone();
        setup.crash(at);
        let acceptor = Acceptor { promised: ballot(4), accepted: ballot(3), state: changed("a") };
        other.acceptors.insert(REGISTER, acceptor);
        assert!([before, other].contains(&setup.registers), "{operation:?}");
        // Asked again, it is given.
        assert_eq!(setup.accept(3, changed("a")).unwrap(), AcceptResult::Accepted);
    }
}

#[test]
fn a_changed_byte_or_anothers_file_is_refused() {
    let mut setup = Setup::new();
    setup.accept(3, changed("a")).unwrap();
    let bytes = setup.registers.encode();
    let decode = |bytes: &[u8], node| Registers::decode(bytes, Path::new(FILE_NAME), node);
    assert_eq!(decode(&bytes, NODE).unwrap(), setup.registers);
    for at in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 1;
        assert!(decode(&broken, NODE).is_err(), "byte {at}");
        assert!(decode(&bytes[..at], NODE).is_err());
    }
    assert!(decode(&bytes, NodeId(3)).is_err());
}

#[test]
fn what_is_no_catalogue_is_not_accepted() {
    let mut setup = Setup::new();
    let wrong = |mut state: State| {
        state.version += 1;
        state
    };
    for state in [State::default(), wrong(changed("a"))] {
        assert!(matches!(setup.accept(3, state), Err(NoVote::Refused(_))));
    }
    let unknown = PeerMessage::Prepare { register: RegisterId(9), ballot: ballot(1) };
    assert!(matches!(setup.ask(&unknown), Err(NoVote::Refused(_))));
    let none = PeerMessage::Room { is_left: true };
    assert!(matches!(setup.ask(&none), Err(NoVote::Refused(_))));
    assert!(setup.registers.acceptor(REGISTER).is_none());
}
