//! Changes of namespaces: this shard as a proposer of their register, and the way to the node's
//! votes on it.
//!
//! ```text
//! ns.create/set/drop -> Proposer -> PREPARE, ACCEPT -> holders (own: the desk; others: letters)
//!                       a majority has accepted       <- Promise, Accepted
//!                    -> kept here (the desk) -> ns.adopt to all that can be reached, or 2 s -> answer
//! a peer's PREPARE or ACCEPT -> the desk, which makes its vote durable -> answer
//! ```
//!
//! Invariant: a change is acknowledged only when a majority of the holders has it on disk, so it
//! survives any minority of them; without a majority it is refused as not started. Every shard of
//! every member proposes for itself, with ballots of its own; the node has one vote.

use std::collections::BTreeMap;
use std::rc::Rc;

use annulus_cluster::NodeId;
use annulus_cluster::coordinator::Moment;
use annulus_cluster::message::PeerMessage;
use annulus_cluster::moves::ClusterMap;
use annulus_cluster::register::{
    Applied, BallotSource, Change, ChangeId, Outcome, Proposer, ProposerAction, ProposerOptions,
    RegisterId, State, holders, majority,
};
use annulus_cluster::tracking::PeerShard;
use annulus_engine::disk::Disk;
use annulus_engine::model::Instant;
use annulus_engine::runtime::Runtime;
use annulus_net::wire::status::Status;
use futures_util::future::join_all;

use super::ReplicationOptions;
use crate::namespaces::Catalogue;
use crate::pump::{AdminDesk, Done, Lane, Origin, Pump, ShardMap, TASKS_MAX};
use crate::registers::{catalogue_of, state_of};

/// How long the other members are waited for before a change is answered, in nanoseconds; and how
/// long after its deadline that may be.
const SPREAD_NANOS: u64 = 2_000_000_000;
/// Room for the shards of a start in the numbers of its proposers.
const SHARDS_OF_A_START: u64 = 1 << 16;

/// What a change of namespaces is answered with.
type Reply = Result<Vec<u8>, (Status, String)>;

/// A command on the namespaces.
pub(super) struct NamespaceChange {
    desk: Rc<dyn AdminDesk>,
    command: String,
    arguments: String,
}

impl NamespaceChange {
    /// The newest of what the holders and this node know.
    fn newest(&self, state: &State) -> Option<Catalogue> {
        let known = self.desk.catalogue();
        match catalogue_of(state) {
            Some(current) if current.generation() >= known.generation() => Some(current),
            None if state.version > known.generation() => None,
            _ => Some(known),
        }
    }
}

impl Change for NamespaceChange {
    type Reply = Reply;

    fn voters(&self, state: &State) -> Option<Vec<Vec<NodeId>>> {
        self.newest(state)?.map().map(ClusterMap::voters)
    }

    fn apply(&mut self, current: &State) -> Applied<Reply> {
        // What this node knows was accepted by a majority once. It can be ahead of the holders only
        // where they lost what they had, or never had it.
        let Some(current) = self.newest(current) else {
            let what = "the namespaces that a majority agreed on cannot be read";
            return Applied::Keep(Err((Status::FAILED, what.to_owned())));
        };
        let outcome = match self.desk.apply(&self.command, &self.arguments, &current) {
            Ok(outcome) => outcome,
            Err(refusal) => return Applied::Keep(Err(refusal)),
        };
        let reply = Ok(outcome.reply.to_string().into());
        match outcome.changed.map(|changed| state_of(&changed)) {
            Some(State { version, value, .. }) => Applied::Write { version, value, reply },
            None => Applied::Keep(reply),
        }
    }
}

/// A change that ended with the register, and is kept here if it was made.
#[derive(Debug)]
pub(in crate::pump) struct Changed {
    waiting: Waiting,
    reply: Reply,
}

/// Who waits for a change, by the number of his task, and how long.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    task: u64,
    until: Instant,
}

/// What a pump of a cluster has for registers.
pub(super) struct Registers {
    proposer: Proposer<NamespaceChange>,
    /// Who waits for which change.
    waiting: BTreeMap<ChangeId, Waiting>,
    /// What the end of the turn carries out.
    actions: Vec<ProposerAction<Reply>>,
}

impl Registers {
    pub(super) fn new(options: &ReplicationOptions, cluster: u128, map: ShardMap) -> Registers {
        let topology = &options.topology;
        let session = options.life * SHARDS_OF_A_START + u64::from(map.own());
        let own = topology.own();
        // Neighbours wait differently.
        let seed = session.rotate_left(32) ^ u64::from(own.0);
        Registers {
            proposer: Proposer::new(
                holders(cluster, topology.nodes()),
                BallotSource::new(own, session),
                seed,
                ProposerOptions::default(),
            ),
            waiting: BTreeMap::new(),
            actions: Vec::new(),
        }
    }

    /// Others hold the register.
    pub(super) fn set_voters(&mut self, moment: Moment, groups: Vec<Vec<NodeId>>) {
        self.proposer.set_voters(moment, groups);
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.proposer.next_timeout()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }
}

fn names(nodes: &[NodeId]) -> String {
    let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    names.join(", ")
}

impl<D: Disk, R: Runtime> Pump<D, R> {
    /// Begins a change of the namespaces.
    pub(super) fn change_namespaces(
        &mut self,
        origin: Origin,
        deadline: Instant,
        command: &str,
        arguments: &str,
    ) {
        let moment = self.moment();
        let desk = Rc::clone(&self.desk);
        let Some(replication) = &mut self.replication else { return };
        let own = replication.topology.own();
        let peers = &replication.peers;
        let Registers { proposer, waiting, actions } = &mut replication.registers;
        let holders = proposer.acceptors();
        let is_reached = |node: &&NodeId| **node == own || peers.contains_key(node);
        let (reached, needed) =
            (holders.iter().filter(is_reached).count(), majority(holders.len()));
        let refusal = if reached < needed {
            let what = format!(
                "namespaces are changed by {needed} of the nodes {}; {reached} can be reached",
                names(holders)
            );
            Some((Status::UNAVAILABLE, what))
        } else {
            let change = NamespaceChange {
                desk,
                command: command.to_owned(),
                arguments: arguments.to_owned(),
            };
            match proposer.submit(moment, change, deadline, actions) {
                Ok(id) => {
                    let until = deadline.after_nanos(SPREAD_NANOS);
                    let task = self.waiting.add(origin, until, Status::MAY_BE_APPLIED);
                    waiting.insert(id, Waiting { task, until });
                    return;
                }
                Err(_) => Some((Status::BUSY, "too many changes of namespaces wait".to_owned())),
            }
        };
        if let Some(refusal) = refusal {
            self.spawn(async move { Done::Admin { origin, reply: Err(refusal) } });
        }
    }

    /// What is due, and what was decided: questions leave, changes end.
    pub(super) fn registers_turn(&mut self) -> bool {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return false };
        let Registers { proposer, actions, .. } = &mut replication.registers;
        if proposer.next_timeout().is_some_and(|at| at <= moment.now) {
            proposer.handle_timeout(moment, actions);
        }
        let actions = std::mem::take(actions);
        let worked = !actions.is_empty();
        let register = RegisterId::NAMESPACES;
        for action in actions {
            match action {
                ProposerAction::Prepare { to, ballot } => {
                    self.ask_holder(to, &PeerMessage::Prepare { register, ballot });
                }
                ProposerAction::Accept { to, ballot, next, state } => {
                    let state = (*state).clone();
                    self.ask_holder(to, &PeerMessage::Accept { register, ballot, next, state });
                }
                ProposerAction::Done(id, outcome) => self.change_ended(id, outcome),
            }
        }
        worked
    }

    /// Asks a holder for its vote; whoever cannot be reached is asked again.
    fn ask_holder(&mut self, to: NodeId, request: &PeerMessage<'_>) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let partition = self.map.first_partition();
        let Some(replication) = &self.replication else { return };
        if to == replication.topology.own() {
            let from = PeerShard { node: to, shard: self.map.own() };
            self.vote(from, &bytes);
        } else if let Some(peer) = replication.peer_shard(to, partition) {
            self.post_bytes(peer, Lane::Foreground, bytes);
        }
    }

    /// A proposer, of this node or another, asks for this node's vote.
    pub(super) fn vote(&mut self, from: PeerShard, request: &[u8]) {
        // Who is not answered asks again.
        if self.tasks.len() < TASKS_MAX {
            let job = self.desk.vote(self.wall, request);
            self.spawn(async move { Done::Voted { from, vote: job.await } });
        }
    }

    /// This node's vote is durable, or there is none.
    pub(in crate::pump) fn voted(&mut self, from: PeerShard, vote: Result<Vec<u8>, String>) {
        let own = self.replication.as_ref().map(|replication| replication.topology.own());
        match vote {
            Ok(bytes) if Some(from.node) == own => {
                if let Ok(answer) = PeerMessage::decode(&bytes) {
                    self.holder_answered(from.node, answer);
                }
            }
            Ok(bytes) => self.post_bytes(from, Lane::Foreground, bytes),
            Err(what) => {
                self.metrics.borrow_mut().counters.peer_refused += 1;
                tracing::warn!(node = from.node.0, what, "no vote on a register");
            }
        }
    }

    /// A holder has answered.
    pub(super) fn holder_answered(&mut self, from: NodeId, answer: PeerMessage<'_>) {
        let moment = self.moment();
        let Some(replication) = &mut self.replication else { return };
        let Registers { proposer, actions, .. } = &mut replication.registers;
        match answer {
            PeerMessage::Promise { register: RegisterId::NAMESPACES, ballot, result } => {
                proposer.handle_prepared(moment, from, ballot, result, actions);
            }
            PeerMessage::Accepted { register: RegisterId::NAMESPACES, ballot, result } => {
                proposer.handle_accepted(moment, from, ballot, result, actions);
            }
            _ => {}
        }
    }

    /// What a change came to: this node takes over the catalogue before anybody is told.
    fn change_ended(&mut self, id: ChangeId, outcome: Outcome<Reply>) {
        let own_generation = self.desk.catalogue().generation();
        let Some(replication) = &mut self.replication else { return };
        let holders = replication.registers.proposer.acceptors();
        let (needed, of) = (majority(holders.len()), names(holders));
        let Some(waiting) = replication.registers.waiting.remove(&id) else { return };
        let (reply, state) = match outcome {
            Outcome::Changed(reply, state) => (reply, state),
            // Nothing is changed, but somebody else may have.
            Outcome::Kept(reply, state) if state.version > own_generation => (reply, state),
            Outcome::Kept(reply, _) => return self.end_change(waiting, reply),
            Outcome::NotStarted { answered } => {
                let what = format!(
                    "namespaces are changed by {needed} of the nodes {of}; {answered} answered in \
                     time, and nothing was changed"
                );
                return self.end_change(waiting, Err((Status::UNAVAILABLE, what)));
            }
            Outcome::MayBeApplied => {
                let what = format!("too few of the nodes {of} said in time that they have it");
                return self.end_change(waiting, Err((Status::MAY_BE_APPLIED, what)));
            }
        };
        let job = self.desk.adopt_catalogue(&state.value);
        self.spawn(async move {
            let reply = match (job.await, reply) {
                (Err((_, what)), Ok(_)) => {
                    let what = format!("changed, but this node could not keep it: {what}");
                    Err((Status::MAY_BE_APPLIED, what))
                }
                (_, reply) => reply,
            };
            Done::Changed(Changed { waiting, reply })
        });
    }

    fn end_change(&mut self, waiting: Waiting, reply: Reply) {
        // Or he was answered when his time was over.
        if let Some(origin) = self.waiting.take(waiting.task) {
            self.spawn(async move { Done::Admin { origin, reply } });
        }
    }

    /// A change is made and kept here: all that can be reached take it over before it is answered.
    pub(in crate::pump) fn changed(&mut self, Changed { waiting, reply }: Changed) {
        if reply.is_err() {
            return self.end_change(waiting, reply);
        }
        let deadline = self.now.after_nanos(SPREAD_NANOS).min(waiting.until);
        let told = self.tell_catalogue(deadline);
        if let Some(origin) = self.waiting.take(waiting.task) {
            self.spawn(async move {
                // Who has not answered hears of it with the settings, as soon as he can be reached.
                join_all(told).await;
                Done::Admin { origin, reply }
            });
        }
    }
}
