//! Who is there: each member asks the others in turn, and what one finds out all hear of.
//!
//! Stands beside the coordinator, which it tells whom to ask last and whom not at all; a broken
//! link is not its business (`coordinator/health.rs` has that layer), and who is a member at all
//! is not either. Invariants: nobody is down on the word of one; two accuse it, from two racks
//! where the living are in several, and it has had time to contradict. What a node sends in a
//! second does not grow with the cluster. The machine draws from one seeded generator and reads
//! no clock: the same events give the same messages.
//!
//! ```text
//! probe.rs          every 500 ms the next of a shuffled list; no answer: three others try it
//! suspicion.rs      how long a suspect has to contradict, and whose word is enough
//! member.rs         what is believed of one, and how what is said changes it
//! dissemination.rs  rumours ride on everything that is sent; a window goes round all members
//! ```
//!
//! SWIM (Das, Gupta, Motivala, 2002) with Lifeguard's local health (Dadgar, Phillips, Currey, 2018:
//! a node that misses answers which others should have given is slow itself, so it waits longer
//! and accuses less), heartbeat counters, and the rule of two reporters.

mod dissemination;
mod gossip;
mod member;
mod probe;
mod suspicion;

#[cfg(test)]
mod tests;

use annulus_engine::model::Instant;

pub use crate::chance::Chance;
pub use member::Status;

use crate::coordinator::Moment;
use crate::member::NodeId;
use crate::message::{Claim, PeerMessage, Report, Said, Vitals};
use crate::topology::NodeInfo;
use dissemination::{Cursor, Rumours, times_sent};
use member::{Heard, Row, State, first_incarnation};
use probe::Prober;
use suspicion::Bounds;

/// How often and how long. The defaults are measured in `bench/README.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Between two probes of a node in good health. Default 500 ms.
    pub probe_interval_nanos: u64,
    /// A direct answer is never missed before. Default 100 ms.
    pub probe_timeout_min_nanos: u64,
    /// Who are asked to try a member that does not answer. Default 3.
    pub helpers: usize,
    /// Between two exchanges of gossip, each with one random member. Default a third of a second.
    pub gossip_interval_nanos: u64,
    /// How many must accuse a member before it is down: 2. With 1 a single node's bad link takes
    /// healthy members down; it is here so that a test can show that.
    pub reporters_min: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            probe_interval_nanos: 500_000_000,
            probe_timeout_min_nanos: 100_000_000,
            helpers: 3,
            gossip_interval_nanos: 333_000_000,
            reporters_min: 2,
        }
    }
}

/// What the machine wants done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A message for a member. It may be lost.
    Send(NodeId, PeerMessage<'static>),
    /// This is believed of a member now, and was not before.
    Changed(NodeId, Status),
}

/// What is known of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberView {
    /// Which.
    pub node: NodeId,
    /// What is believed of it.
    pub status: Status,
    /// Of its life (high half) and its contradictions in it (low half); 0: never heard of.
    pub incarnation: u64,
    /// Its counter when it was last heard of; 0: never.
    pub heartbeat: u64,
    /// How long ago that was, in nanoseconds.
    pub heartbeat_age_nanos: u64,
    /// What it said about itself then.
    pub vitals: Vitals,
}

/// Counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Figures {
    /// Probes sent.
    pub probes: u64,
    /// Probes that neither the member nor another answered for.
    pub probes_failed: u64,
    /// Accusations made by this node.
    pub accusations: u64,
    /// Accusations not made, because this node itself hears too little.
    pub withheld: u64,
    /// Accusations of this node that it contradicted.
    pub contradictions: u64,
    /// Members that became down.
    pub downs: u64,
    /// Local health: 0 is good, 7 the worst. Not a counter.
    pub local_health: u32,
    /// Rumours that wait for a message. Not a counter.
    pub rumours: usize,
}

/// A member that wakes so much later than it wanted was stopped: others' answers wait unread.
const LATE_NANOS: u64 = 500_000_000;
/// One exchange in so many is also made with a member that is down, in case it is not.
const DOWN_ONE_IN: u64 = 15;

/// See the module. One for each node.
#[derive(Clone, Debug)]
pub struct Membership {
    options: Options,
    bounds: Bounds,
    /// How often a rumour is sent.
    times: u32,
    /// Sorted by node, this one among them.
    rows: Vec<Row>,
    own: usize,
    racks: Racks,
    /// Those whose suspicion has not ended.
    suspects: Vec<usize>,
    prober: Prober,
    rumours: Rumours,
    /// All others, in the order of the window.
    order: Vec<usize>,
    reports: Cursor,
    claims: Cursor,
    next_gossip: Instant,
    exchanges: u64,
    /// The earliest end of a suspicion.
    next_end: Option<Instant>,
    chance: Chance,
    figures: Figures,
}

/// In which rack every member is, and how many of each are alive.
#[derive(Clone, Debug)]
struct Racks {
    /// Sorted by node.
    of: Vec<(NodeId, u16)>,
    alive: Vec<u32>,
}

impl Racks {
    fn of(&self, node: NodeId) -> u16 {
        // One that has left since is in a rack of its own.
        self.of.binary_search_by_key(&node, |it| it.0).map_or(u16::MAX, |at| self.of[at].1)
    }

    fn are_several_alive(&self) -> bool {
        self.alive.iter().filter(|count| **count > 0).count() > 1
    }

    fn alive(&self) -> usize {
        self.alive.iter().map(|count| *count as usize).sum()
    }
}

impl Membership {
    /// The machine of `own`, in the life with this number, which is greater than those before.
    /// It begins at once: [`Membership::next_timeout`] is `now`.
    ///
    /// # Panics
    /// When `own` is not among the members.
    #[must_use]
    pub fn new(
        now: Instant,
        own: NodeId,
        life: u64,
        members: &[NodeInfo],
        options: Options,
        mut chance: Chance,
    ) -> Membership {
        let mut names: Vec<(&str, &str)> =
            members.iter().map(|it| (it.dc.as_str(), it.rack.as_str())).collect();
        names.sort_unstable();
        names.dedup();
        let rack_of = |it: &NodeInfo| {
            let at = names.binary_search(&(it.dc.as_str(), it.rack.as_str())).expect("just put in");
            u16::try_from(at).expect("fewer racks than 2^16")
        };
        let mut of: Vec<(NodeId, u16)> = members.iter().map(|it| (it.id, rack_of(it))).collect();
        of.sort_unstable();
        let mut alive = vec![0; names.len()];
        of.iter().for_each(|(_, rack)| alive[usize::from(*rack)] += 1);
        let mut rows: Vec<Row> = of.iter().map(|(node, _)| Row::new(*node, now)).collect();
        let own = rows.binary_search_by_key(&own, |row| row.node).expect("own is a member");
        rows[own].incarnation = first_incarnation(life);
        let mut order: Vec<usize> = (0..rows.len()).filter(|at| *at != own).collect();
        chance.shuffle(&mut order);
        Membership {
            bounds: Bounds::new(rows.len(), options.probe_interval_nanos),
            times: times_sent(rows.len()),
            prober: Prober::new(now, life, order.clone(), &options, &mut chance),
            rows,
            own,
            racks: Racks { of, alive },
            suspects: Vec::new(),
            rumours: Rumours::default(),
            order,
            reports: Cursor::default(),
            claims: Cursor::default(),
            next_gossip: now,
            exchanges: 0,
            next_end: None,
            chance,
            figures: Figures::default(),
            options,
        }
    }

    /// The members are these from now on, this node among them. What is believed of those who stay,
    /// and what this node has said of itself, stays.
    ///
    /// # Panics
    /// When this node is not among them.
    pub fn set_members(&mut self, now: Instant, members: &[NodeInfo]) {
        let own = self.own();
        let (life, chance) = (self.rows[self.own].incarnation >> 32, self.chance.clone());
        let mut next = Membership::new(now, own, life, members, self.options, chance);
        for at in 0..next.rows.len() {
            if let Some(known) = self.find(next.rows[at].node) {
                next.rows[at] = self.rows[known].clone();
            }
            if matches!(next.rows[at].state, State::Suspect(_)) {
                next.suspects.push(at);
            }
            if !next.rows[at].is_alive() {
                next.count_alive(at, true);
            }
        }
        next.prober.go_on_from(&self.prober);
        next.figures = self.figures;
        next.note_ends();
        *self = next;
    }

    /// What this node says about itself from now on. Greater epochs are told to all at once.
    pub fn set_vitals(&mut self, vitals: Vitals) {
        let own = &mut self.rows[self.own];
        let before = std::mem::replace(&mut own.vitals, vitals);
        if vitals.settings_epoch > before.settings_epoch
            || vitals.members_epoch > before.members_epoch
        {
            self.rumours.epochs(own.node);
        }
    }

    /// What is believed of all members, this one among them, by id.
    pub fn views(&self, now: Instant) -> impl Iterator<Item = MemberView> + '_ {
        self.rows.iter().map(move |row| view(row, now, row.node == self.own()))
    }

    /// What is believed of a member.
    #[must_use]
    pub fn status(&self, node: NodeId) -> Option<Status> {
        self.find(node).map(|at| self.rows[at].status())
    }

    /// Counters.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let local_health = self.prober.local_health();
        Figures { local_health, rumours: self.rumours.len(), ..self.figures }
    }

    /// When [`Membership::handle_timeout`] must be called though nothing arrives.
    #[must_use]
    pub fn next_timeout(&self) -> Instant {
        let soonest = self.prober.next_timeout().min(self.next_gossip);
        self.next_end.map_or(soonest, |end| end.min(soonest))
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, moment: Moment, out: &mut Vec<Output>) {
        let now = moment.now;
        let late = now.nanos_since(self.next_timeout());
        if late > LATE_NANOS {
            self.was_stopped(now, late);
        }
        self.probe_turn(moment, out);
        self.gossip_turn(now, out);
        if self.next_end.is_some_and(|end| end <= now) {
            self.judge(now, out);
        }
    }

    fn own(&self) -> NodeId {
        self.rows[self.own].node
    }

    fn find(&self, node: NodeId) -> Option<usize> {
        self.rows.binary_search_by_key(&node, |row| row.node).ok()
    }

    /// This node slept, and nobody could answer or contradict in that time.
    fn was_stopped(&mut self, now: Instant, nanos: u64) {
        self.prober.was_stopped(now);
        for at in &self.suspects {
            if let State::Suspect(suspicion) = &mut self.rows[*at].state {
                suspicion.since = suspicion.since.after_nanos(nanos);
            }
        }
        self.note_ends();
    }

    /// A claim of anybody's.
    fn hear(&mut self, now: Instant, claim: Claim, out: &mut Vec<Output>) {
        let Some(at) = self.find(claim.node) else { return };
        if at == self.own {
            return self.hear_of_self(claim);
        }
        match claim.said {
            Said::Alive => self.hear_alive(at, claim.incarnation, out),
            Said::Suspect { reporter } => self.accused(now, at, claim.incarnation, reporter, out),
            // Believed only where its two reporters are enough here too.
            Said::Down { reporters } => {
                for reporter in reporters {
                    self.accused(now, at, claim.incarnation, reporter, out);
                }
                if claim.incarnation == self.rows[at].incarnation {
                    self.convict(at, out);
                }
            }
        }
    }

    /// Somebody accuses this node, or remembers a life of it that it does not.
    fn hear_of_self(&mut self, claim: Claim) {
        let own = &mut self.rows[self.own];
        let is_accused = claim.said != Said::Alive && claim.incarnation >= own.incarnation;
        if !is_accused && claim.incarnation <= own.incarnation {
            return;
        }
        own.incarnation = claim.incarnation + 1;
        let (node, incarnation) = (own.node, own.incarnation);
        if is_accused {
            self.prober.worsen();
            self.figures.contradictions += 1;
        }
        self.rumours.claim(Claim { node, incarnation, said: Said::Alive });
    }

    fn hear_alive(&mut self, at: usize, incarnation: u64, out: &mut Vec<Output>) {
        let was_alive = self.rows[at].is_alive();
        if self.rows[at].hear_alive(incarnation) == Heard::Returned {
            self.count_alive(at, was_alive);
            let node = self.rows[at].node;
            self.rumours.forget(node);
            self.rumours.claim(Claim { node, incarnation, said: Said::Alive });
            self.settle(at, out);
        }
    }

    fn accused(
        &mut self,
        now: Instant,
        at: usize,
        incarnation: u64,
        reporter: NodeId,
        out: &mut Vec<Output>,
    ) {
        let Membership { rows, racks, .. } = self;
        if rows.binary_search_by_key(&reporter, |row| row.node).is_err() {
            return;
        }
        let was_alive = rows[at].is_alive();
        let node = rows[at].node;
        match rows[at].hear_suspect(now, incarnation, reporter, |node| racks.of(node)) {
            Heard::Nothing | Heard::Returned => return,
            Heard::Suspected => {
                self.count_alive(at, was_alive);
                self.rumours.forget(node);
                if !self.suspects.contains(&at) {
                    self.suspects.push(at);
                }
            }
            Heard::Confirmed => {}
        }
        self.rumours.claim(Claim { node, incarnation, said: Said::Suspect { reporter } });
        self.note_ends();
        self.settle(at, out);
    }

    /// Keeps the number of the living of each rack.
    fn count_alive(&mut self, at: usize, was_alive: bool) {
        let count = &mut self.racks.alive[usize::from(self.racks.of[at].1)];
        match (was_alive, self.rows[at].is_alive()) {
            (false, true) => *count += 1,
            (true, false) => *count -= 1,
            _ => {}
        }
    }

    /// The suspect is down if enough have said so. Whether it is.
    fn convict(&mut self, at: usize, out: &mut Vec<Output>) -> bool {
        let State::Suspect(suspicion) = self.rows[at].state else { return false };
        // Who is suspected bears no witness and counts among nobody's living.
        let must_differ = self.racks.are_several_alive();
        let enough = suspicion.witnesses(must_differ, |node| self.racks.of(node));
        let alone = || {
            let first = suspicion.reporters()[0];
            (self.options.reporters_min < 2).then_some([first, first])
        };
        let Some(reporters) = enough.or_else(alone) else { return false };
        let row = &mut self.rows[at];
        row.state = State::Down(reporters);
        let (node, incarnation) = (row.node, row.incarnation);
        self.figures.downs += 1;
        self.rumours.forget(node);
        self.rumours.claim(Claim { node, incarnation, said: Said::Down { reporters } });
        self.settle(at, out);
        true
    }

    /// Suspicions whose time is over: down, or "unreachable" until more is known.
    fn judge(&mut self, now: Instant, out: &mut Vec<Output>) {
        let possible = self.racks.alive();
        for at in std::mem::take(&mut self.suspects) {
            let State::Suspect(suspicion) = self.rows[at].state else { continue };
            let is_over = suspicion.ends(self.bounds, possible) <= now;
            if is_over && self.convict(at, out) {
                continue;
            }
            if let State::Suspect(suspicion) = &mut self.rows[at].state {
                suspicion.is_over |= is_over;
            }
            self.suspects.push(at);
            self.settle(at, out);
        }
        self.note_ends();
    }

    /// Finds the earliest end of a suspicion. Those that are over are looked at with each exchange
    /// of gossip: who else is alive may have changed.
    fn note_ends(&mut self) {
        let possible = self.racks.alive();
        let ends = self.suspects.iter().filter_map(|at| match &self.rows[*at].state {
            State::Suspect(suspicion) if !suspicion.is_over => {
                Some(suspicion.ends(self.bounds, possible))
            }
            _ => None,
        });
        self.next_end = ends.min();
    }

    /// Tells the status of a member if it is another than before.
    fn settle(&mut self, at: usize, out: &mut Vec<Output>) {
        let row = &mut self.rows[at];
        let status = row.status();
        if std::mem::replace(&mut row.told, status) != status {
            out.push(Output::Changed(row.node, status));
        }
    }

    fn own_report(&self) -> Report {
        let own = &self.rows[self.own];
        Report {
            node: own.node,
            incarnation: own.incarnation,
            heartbeat: own.heartbeat,
            vitals: own.vitals,
        }
    }
}

fn view(row: &Row, now: Instant, is_own: bool) -> MemberView {
    MemberView {
        node: row.node,
        status: row.status(),
        incarnation: row.incarnation,
        heartbeat: row.heartbeat,
        heartbeat_age_nanos: if is_own { 0 } else { now.nanos_since(row.reported) },
        vitals: row.vitals,
    }
}
