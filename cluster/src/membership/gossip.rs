//! What arrives and what leaves: the messages of a membership machine.
//!
//! Invariant: whatever leaves carries the sender's own report, what is said against the receiver
//! (so that it can contradict at once), and the rumours that have room, in that order; an exchange
//! carries a window of the members on top, and nothing is longer than a message may be.

use annulus_engine::model::Instant;

use super::dissemination::Rumour;
use super::member::{Row, State};
use super::{DOWN_ONE_IN, Membership, Output};
use crate::coordinator::Moment;
use crate::member::NodeId;
use crate::message::{Claim, GOSSIP_MESSAGE_SIZE_MAX, Gossip, PeerMessage, REPORT_SIZE, Said};

/// Reports of others in an exchange.
const WINDOW_REPORTS: usize = 3;
/// Claims about others in an exchange.
const WINDOW_CLAIMS: usize = 8;
/// Room for the fields around gossip: those of the answer to a probe, and two counts.
const AROUND_SIZE: usize = 1 + 4 * 8 + 2;
/// How often a random choice among all is tried before a walk finds one.
const TRIES: usize = 8;

const _: () = assert!(
    AROUND_SIZE + (1 + WINDOW_REPORTS) * REPORT_SIZE + WINDOW_CLAIMS * 21
        < GOSSIP_MESSAGE_SIZE_MAX / 2,
    "an exchange leaves half of a message to rumours"
);

/// What a message carries besides rumours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// Nothing.
    Rumours,
    /// A window of the members.
    Window,
}

impl Membership {
    /// A message of another member. One from a stranger, or of another kind, does nothing.
    pub fn handle_message(
        &mut self,
        moment: Moment,
        from: NodeId,
        message: &PeerMessage<'_>,
        out: &mut Vec<Output>,
    ) {
        let now = moment.now;
        let Some(at) = self.find(from).filter(|at| *at != self.own) else { return };
        match message {
            PeerMessage::Probe { id, sent_wall_us, gossip } => {
                self.take(now, gossip, out);
                let wall = moment.wall.0;
                let done = PeerMessage::ProbeDone {
                    id: *id,
                    sent_wall_us: *sent_wall_us,
                    received_wall_us: wall,
                    replied_wall_us: wall,
                    gossip: self.gossip_for(at, Extent::Rumours),
                };
                out.push(Output::Send(from, done));
            }
            PeerMessage::ProbeDone { id, gossip, .. } => {
                self.take(now, gossip, out);
                self.probe_answered(now, at, *id, out);
            }
            PeerMessage::ProbeFor { id, target, gossip } => {
                self.take(now, gossip, out);
                self.probe_for(moment, from, *id, *target, out);
            }
            PeerMessage::ProbeForDone { id, target, is_reached, gossip } => {
                self.take(now, gossip, out);
                self.helper_answered(now, *id, *target, *is_reached, out);
            }
            PeerMessage::Gossip { is_answer, gossip } => {
                self.take(now, gossip, out);
                if *is_answer {
                    self.prober.heard(now);
                } else {
                    self.exchange(at, true, out);
                }
            }
            _ => {}
        }
    }

    /// The member can be reached again, or for the first time: exchanges with it at once.
    pub fn greet(&mut self, node: NodeId, out: &mut Vec<Output>) {
        if let Some(at) = self.find(node).filter(|at| *at != self.own) {
            self.exchange(at, false, out);
        }
    }

    /// Believes what it should of what came.
    fn take(&mut self, now: Instant, gossip: &Gossip, out: &mut Vec<Output>) {
        for report in &gossip.reports {
            let said = Said::Alive;
            let Some(at) = self.find(report.node) else { continue };
            if report.incarnation != self.rows[at].incarnation {
                let (node, incarnation) = (report.node, report.incarnation);
                self.hear(now, Claim { node, incarnation, said }, out);
            }
            if at != self.own && self.rows[at].take_report(now, report) {
                self.rumours.epochs(report.node);
            }
        }
        gossip.claims.iter().for_each(|claim| self.hear(now, *claim, out));
    }

    /// What a message to the member carries.
    pub(super) fn gossip_for(&mut self, to: usize, extent: Extent) -> Gossip {
        let mut room = GOSSIP_MESSAGE_SIZE_MAX - AROUND_SIZE;
        let mut gossip = Gossip { reports: vec![self.own_report()], claims: Vec::new() };
        room -= REPORT_SIZE;
        let against = claim_of(&self.rows[to], 0).filter(|it| it.said != Said::Alive);
        if let Some(claim) = against {
            room -= claim.size();
            gossip.claims.push(claim);
        }
        if extent == Extent::Window {
            self.add_window(to, &mut gossip, &mut room);
        }
        let Membership { rumours, rows, own, .. } = self;
        rumours.send(self.times, |rumour| {
            let size = match &rumour {
                Rumour::Claim(claim) => claim.size(),
                Rumour::Report(_) => REPORT_SIZE,
            };
            if size > room {
                return false;
            }
            match rumour {
                Rumour::Claim(claim) => gossip.claims.push(claim),
                Rumour::Report(node) => {
                    let at = rows.binary_search_by_key(&node, |row| row.node).ok();
                    // This node's own is in already.
                    let report = at.filter(|at| at != own).and_then(|at| rows[at].report());
                    let Some(report) = report else { return true };
                    gossip.reports.push(report);
                }
            }
            room -= size;
            true
        });
        gossip
    }

    /// The next few of all members: a walk, so what is sent least recently comes next.
    fn add_window(&mut self, to: usize, gossip: &mut Gossip, room: &mut usize) {
        let others = self.order.len();
        let before = gossip.reports.len();
        for _ in 0..others.min(4 * WINDOW_REPORTS) {
            if gossip.reports.len() - before == WINDOW_REPORTS {
                break;
            }
            let at = self.order[self.reports.next(others)];
            let row = &self.rows[at];
            if at != to && !row.is_down() {
                gossip.reports.extend(row.report());
            }
        }
        *room -= (gossip.reports.len() - before) * REPORT_SIZE;
        for _ in 0..others.min(WINDOW_CLAIMS) {
            let at = self.order[self.claims.next(others)];
            let draw = self.chance.index(super::suspicion::REPORTERS_KEPT);
            if at != to
                && let Some(claim) = claim_of(&self.rows[at], draw)
            {
                *room -= claim.size();
                gossip.claims.push(claim);
            }
        }
    }

    /// Exchanges with a random member, and from time to time with one that is down.
    pub(super) fn gossip_turn(&mut self, now: Instant, out: &mut Vec<Output>) {
        if now < self.next_gossip {
            return;
        }
        self.rows[self.own].heartbeat += 1;
        // The first is at once, the others spread: nodes that start together do not stay together.
        let interval = self.options.gossip_interval_nanos;
        self.next_gossip = match self.exchanges {
            0 => now.after_nanos(self.chance.below(interval)),
            _ => now.after_nanos(interval),
        };
        self.exchanges += 1;
        if let Some(to) = self.draw(|row| !row.is_down()) {
            self.exchange(to, false, out);
        }
        if self.exchanges.is_multiple_of(DOWN_ONE_IN)
            && let Some(to) = self.draw(Row::is_down)
        {
            self.exchange(to, false, out);
        }
        if !self.suspects.is_empty() {
            self.judge(now, out);
        }
    }

    fn exchange(&mut self, to: usize, is_answer: bool, out: &mut Vec<Output>) {
        let gossip = self.gossip_for(to, Extent::Window);
        out.push(Output::Send(self.rows[to].node, PeerMessage::Gossip { is_answer, gossip }));
    }

    /// A random other member of a kind.
    pub(super) fn draw(&mut self, is_meant: impl Fn(&Row) -> bool) -> Option<usize> {
        let others = self.order.len();
        if others == 0 {
            return None;
        }
        let first = self.chance.index(others);
        let random = std::iter::once(first).chain((1..TRIES).map(|_| self.chance.index(others)));
        let found = random.map(|place| self.order[place]).find(|at| is_meant(&self.rows[*at]));
        found.or_else(|| {
            let walk = (0..others).map(|step| self.order[(first + step) % others]);
            walk.into_iter().find(|at| is_meant(&self.rows[*at]))
        })
    }
}

/// What is believed of the member, as a claim; of several reporters the one that `draw` says.
/// None of one that was never heard of.
fn claim_of(row: &Row, draw: usize) -> Option<Claim> {
    let said = match &row.state {
        State::Alive if row.incarnation == 0 => return None,
        State::Alive => Said::Alive,
        State::Suspect(suspicion) => {
            let reporters = suspicion.reporters();
            Said::Suspect { reporter: reporters[draw % reporters.len()] }
        }
        State::Down(reporters) => Said::Down { reporters: *reporters },
    };
    Some(Claim { node: row.node, incarnation: row.incarnation, said })
}
