//! Asking: is the next member there, do others reach it who could not be reached, and is it
//! perhaps this node that is not well?
//!
//! ```text
//! probe   ------------------------------>  answer: it lives, local health improves
//!         no answer in time
//! three others are asked to try  ------->  one reaches it: it lives
//!                                          they answer that they do not: accuse it
//!                                          they do not answer: local health worsens
//! ```
//!
//! Invariants: one probe of its own is under way at a time, and [`RELAYS_MAX`] for others. A node
//! that hears nobody accuses nobody: whoever accuses has heard an answer in the last second, from
//! a helper of this very probe or from anybody. All times are multiplied by the local health
//! (Lifeguard, section IV-A).

use annulus_engine::model::Instant;

use super::gossip::Extent;
use super::member::Row;
use super::{Chance, Membership, Options, Output};
use crate::coordinator::Moment;
use crate::member::NodeId;
use crate::message::PeerMessage;

/// The worst local health.
const LOCAL_HEALTH_MAX: u32 = 7;
/// A direct answer is waited for at most this part of the interval, so that helpers have the rest.
const DIRECT_PARTS: u64 = 2;
/// For how long a helper waits before it says no, in parts of the interval.
const HELPER_PARTS: u64 = 3;
/// Answers whose time is remembered: the longest of so many stands for the 99th percentile.
const ANSWERS_KEPT: usize = 64;
/// The factor over that.
const ANSWER_FACTOR: u64 = 3;
/// Probes for others at a time; more are not taken on.
const RELAYS_MAX: usize = 64;
/// Whoever has heard an answer in this time can hear, in nanoseconds.
const HEARING_NANOS: u64 = 1_000_000_000;
/// Of the last eight probes so many without a word from anybody: this node is nearly deaf.
const SILENT_MAX: u32 = 6;
/// Candidates looked at for each helper wanted.
const CANDIDATES: usize = 4;

/// The probe under way.
#[derive(Clone, Debug)]
struct Probing {
    id: u64,
    target: usize,
    sent: Instant,
    /// When others are asked; `None` once they have been.
    direct_until: Option<Instant>,
    asked: usize,
    refusals: usize,
}

/// A probe for another member.
#[derive(Clone, Debug)]
struct Relay {
    id: u64,
    asker: NodeId,
    asked_id: u64,
    target: usize,
    until: Instant,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Prober {
    /// Whom to probe, in this order.
    list: Vec<usize>,
    place: usize,
    next_id: u64,
    next_probe: Instant,
    probing: Option<Probing>,
    relays: Vec<Relay>,
    /// 0 is good.
    health: u32,
    /// Bit by bit, whether nobody at all answered.
    silent: u8,
    heard: Instant,
    /// Times of the last answers, in microseconds.
    answers: [u32; ANSWERS_KEPT],
    answered: usize,
}

impl Prober {
    /// The members are others: what this node knows of itself stays, and numbers go on.
    pub(super) fn go_on_from(&mut self, before: &Prober) {
        self.next_id = before.next_id + 1;
        (self.health, self.silent, self.heard) = (before.health, before.silent, before.heard);
        (self.answers, self.answered) = (before.answers, before.answered);
        self.next_probe = before.next_probe;
    }

    pub(super) fn new(
        now: Instant,
        life: u64,
        mut list: Vec<usize>,
        options: &Options,
        chance: &mut Chance,
    ) -> Prober {
        chance.shuffle(&mut list);
        Prober {
            list,
            place: 0,
            // So that an answer to an earlier life is none to this.
            next_id: life << 32,
            next_probe: now.after_nanos(chance.below(options.probe_interval_nanos)),
            probing: None,
            relays: Vec::new(),
            health: 0,
            silent: 0,
            heard: now,
            answers: [0; ANSWERS_KEPT],
            answered: 0,
        }
    }

    pub(super) fn local_health(&self) -> u32 {
        self.health
    }

    pub(super) fn worsen(&mut self) {
        self.health = (self.health + 1).min(LOCAL_HEALTH_MAX);
    }

    /// Somebody answered this node.
    pub(super) fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    pub(super) fn next_timeout(&self) -> Instant {
        let direct = self.probing.as_ref().and_then(|probing| probing.direct_until);
        let relays = self.relays.iter().map(|relay| relay.until);
        relays.chain(direct).fold(self.next_probe, Instant::min)
    }

    /// What was under way while this node slept proves nothing.
    pub(super) fn was_stopped(&mut self, now: Instant) {
        self.probing = None;
        self.relays.clear();
        self.next_probe = self.next_probe.max(now);
        self.worsen();
    }

    fn factor(&self) -> u64 {
        u64::from(1 + self.health)
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn note_time(&mut self, nanos: u64) {
        self.answers[self.answered % ANSWERS_KEPT] =
            u32::try_from(nanos / 1000).unwrap_or(u32::MAX);
        self.answered += 1;
    }

    /// How long a direct answer is waited for, before the local health is counted in.
    fn timeout(&self, options: &Options) -> u64 {
        let longest = self.answers.iter().max().map_or(0, |micros| u64::from(*micros) * 1000);
        let most = options.probe_interval_nanos / DIRECT_PARTS;
        (ANSWER_FACTOR * longest).max(options.probe_timeout_min_nanos).min(most)
    }
}

impl Membership {
    /// Helpers that are late, the end of a probe, the beginning of the next.
    pub(super) fn probe_turn(&mut self, moment: Moment, out: &mut Vec<Output>) {
        let now = moment.now;
        self.expire_relays(now, out);
        let direct = self.prober.probing.as_ref().and_then(|probing| probing.direct_until);
        if now < self.prober.next_probe {
            if direct.is_some_and(|until| until <= now) {
                self.ask_helpers(out);
            }
            return;
        }
        if let Some(probing) = self.prober.probing.take() {
            self.probe_failed(now, &probing, out);
        }
        let interval = self.options.probe_interval_nanos * self.prober.factor();
        self.prober.next_probe = now.after_nanos(interval);
        let Some(target) = self.next_target() else { return };
        let timeout = self.prober.timeout(&self.options) * self.prober.factor();
        let id = self.prober.id();
        self.prober.probing = Some(Probing {
            id,
            target,
            sent: now,
            direct_until: Some(now.after_nanos(timeout)),
            asked: 0,
            refusals: 0,
        });
        self.figures.probes += 1;
        self.send_probe(moment, id, target, out);
    }

    fn send_probe(&mut self, moment: Moment, id: u64, target: usize, out: &mut Vec<Output>) {
        let gossip = self.gossip_for(target, Extent::Rumours);
        let probe = PeerMessage::Probe { id, sent_wall_us: moment.wall.0, gossip };
        out.push(Output::Send(self.rows[target].node, probe));
    }

    /// The next of the list that is not down; each comes once before any comes twice.
    fn next_target(&mut self) -> Option<usize> {
        for _ in 0..self.prober.list.len() {
            if self.prober.place == self.prober.list.len() {
                self.prober.place = 0;
                self.chance.shuffle(&mut self.prober.list);
            }
            let target = self.prober.list[self.prober.place];
            self.prober.place += 1;
            if !self.rows[target].is_down() {
                return Some(target);
            }
        }
        None
    }

    fn ask_helpers(&mut self, out: &mut Vec<Output>) {
        let Some(probing) = &self.prober.probing else { return };
        let (id, target) = (probing.id, probing.target);
        let helpers = self.draw_helpers(target);
        if let Some(probing) = &mut self.prober.probing {
            probing.direct_until = None;
            probing.asked = helpers.len();
        }
        for helper in helpers {
            let gossip = self.gossip_for(helper, Extent::Rumours);
            let target = self.rows[target].node;
            let ask = PeerMessage::ProbeFor { id, target, gossip };
            out.push(Output::Send(self.rows[helper].node, ask));
        }
    }

    /// Random members that should answer, those of other racks first: their way is another.
    fn draw_helpers(&mut self, target: usize) -> Vec<usize> {
        let may_help = |row: &Row| row.is_alive() && !row.is_unreached;
        let mut found: Vec<usize> = Vec::new();
        let wanted = CANDIDATES * self.options.helpers;
        if self.order.len() <= wanted {
            let able = self.order.iter().filter(|at| **at != target && may_help(&self.rows[**at]));
            found = able.copied().collect();
            self.chance.shuffle(&mut found);
        } else {
            for _ in 0..wanted {
                let drawn = self.draw(may_help);
                found.extend(drawn.filter(|at| *at != target && !found.contains(at)));
            }
        }
        let own = self.racks.of[self.own].1;
        found.sort_by_key(|at| self.racks.of[*at].1 == own);
        found.truncate(self.options.helpers);
        found
    }

    /// A member answered a probe of this node's, for itself or for another.
    pub(super) fn probe_answered(
        &mut self,
        now: Instant,
        from: usize,
        id: u64,
        out: &mut Vec<Output>,
    ) {
        self.prober.heard(now);
        if self.rows[from].is_unreached {
            self.rows[from].is_unreached = false;
            self.settle(from, out);
        }
        if let Some(at) = self.prober.relays.iter().position(|relay| relay.id == id) {
            let relay = self.prober.relays.swap_remove(at);
            self.answer_asker(&relay, true, out);
        }
        let is_current = |probing: &Probing| probing.id == id && probing.target == from;
        if let Some(probing) = self.prober.probing.take_if(|it| is_current(it)) {
            let prober = &mut self.prober;
            prober.note_time(now.nanos_since(probing.sent));
            prober.silent <<= 1;
            if probing.direct_until.is_some() {
                prober.health = prober.health.saturating_sub(1);
            }
        }
    }

    /// A helper reached the member, or says that it did not.
    pub(super) fn helper_answered(
        &mut self,
        now: Instant,
        id: u64,
        target: NodeId,
        is_reached: bool,
        out: &mut Vec<Output>,
    ) {
        self.prober.heard(now);
        let Some(probing) = &mut self.prober.probing else { return };
        let at = probing.target;
        if probing.id != id || self.rows[at].node != target {
            return;
        }
        if !is_reached {
            probing.refusals += 1;
            return;
        }
        self.prober.probing = None;
        self.prober.silent <<= 1;
        if std::mem::replace(&mut self.rows[at].is_unreached, false) {
            self.settle(at, out);
        }
    }

    /// Neither the member nor those who tried it brought an answer from it.
    fn probe_failed(&mut self, now: Instant, probing: &Probing, out: &mut Vec<Output>) {
        self.figures.probes_failed += 1;
        let prober = &mut self.prober;
        prober.silent = prober.silent << 1 | u8::from(probing.refusals == 0);
        if probing.refusals < probing.asked {
            prober.worsen();
        }
        let has_heard = probing.refusals > 0 || now.nanos_since(prober.heard) <= HEARING_NANOS;
        let is_deaf = prober.silent.count_ones() >= SILENT_MAX;
        let at = probing.target;
        self.rows[at].is_unreached = true;
        if has_heard && !is_deaf {
            let (reporter, incarnation) = (self.own(), self.rows[at].incarnation);
            self.figures.accusations += 1;
            self.accused(now, at, incarnation, reporter, out);
        } else {
            self.figures.withheld += 1;
            self.prober.worsen();
        }
        self.settle(at, out);
    }

    /// Another member asks this one to try.
    pub(super) fn probe_for(
        &mut self,
        moment: Moment,
        asker: NodeId,
        asked_id: u64,
        target: NodeId,
        out: &mut Vec<Output>,
    ) {
        let Some(target) = self.find(target) else { return };
        if self.prober.relays.len() >= RELAYS_MAX {
            return;
        }
        let id = self.prober.id();
        let wait = self.options.probe_interval_nanos / HELPER_PARTS;
        let wait = self.prober.timeout(&self.options).min(wait);
        let until = moment.now.after_nanos(wait);
        let relay = Relay { id, asker, asked_id, target, until };
        if target == self.own {
            return self.answer_asker(&relay, true, out);
        }
        self.prober.relays.push(relay);
        self.send_probe(moment, id, target, out);
    }

    fn expire_relays(&mut self, now: Instant, out: &mut Vec<Output>) {
        let late = |relay: &mut Relay| relay.until <= now;
        let late: Vec<Relay> = self.prober.relays.extract_if(.., late).collect();
        late.iter().for_each(|relay| self.answer_asker(relay, false, out));
    }

    fn answer_asker(&mut self, relay: &Relay, is_reached: bool, out: &mut Vec<Output>) {
        let Some(asker) = self.find(relay.asker) else { return };
        let answer = PeerMessage::ProbeForDone {
            id: relay.asked_id,
            target: self.rows[relay.target].node,
            is_reached,
            gossip: self.gossip_for(asker, Extent::Rumours),
        };
        out.push(Output::Send(relay.asker, answer));
    }
}
