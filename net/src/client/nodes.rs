//! Which connection a request takes, and what requests tell of the nodes: the pool's part that
//! watches them.
//!
//! Invariants: a node that owes answers gets no new requests while another one answers; it is
//! probed by one PING, or one attempt to connect, at a time; with a single node none of this
//! happens. Deciding is in `health.rs`, `hedge.rs` and `choice.rs`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use annulus_engine::model::{Instant, OriginId, PartitionId, Token};
use futures_channel::oneshot;

use super::choice::{Candidate, Need, best};
use super::health::{Health, Kind, Standing};
use super::link::{Ended, Flush, Link, Outcome};
use super::pool::{Pool, Row, State};
use super::timer::Ticked;
use super::types::ClientOptions;
use crate::wire::hello::Replica;
use crate::wire::request::Outgoing;

/// A connection that does not answer a PING for so long is given up.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// At most one introduction in this time because of a node that nobody has named, in nanoseconds.
const REFRESH_PAUSE: u64 = 1_000_000_000;
/// How long it may take until a probe that is due is made, in nanoseconds.
const PROBE_DELAY: u64 = 2_000_000;

/// A node, its health and the PING under way.
pub(super) struct Watched {
    pub(super) health: Health,
    ping: Option<oneshot::Receiver<Outcome>>,
    /// The connection that gave rise to doubt.
    via: Weak<Link>,
}

/// What an overdue answer means.
pub(crate) struct Overdue {
    /// The request had better go elsewhere.
    pub(crate) elsewhere: bool,
    /// Nanoseconds after which there is more to know.
    pub(crate) look_again: u64,
}

/// A connection for a request, and what goes with it.
pub(crate) struct Chosen {
    pub(crate) link: Arc<Link>,
    pub(crate) node: OriginId,
    /// The hint to send.
    pub(crate) route: u8,
    /// Nanoseconds after which an answer is overdue.
    pub(crate) bound: u64,
    /// Nanoseconds after which a read is worth a hedge, if hedges are made.
    pub(crate) hedge_after: Option<u64>,
}

impl State {
    pub(super) fn watch(
        &mut self,
        node: OriginId,
        now: Instant,
        options: &ClientOptions,
    ) -> &mut Watched {
        self.watched.entry(node).or_insert_with(|| Watched {
            health: Health::new(now, options.suspect_after_min),
            ping: None,
            via: Weak::new(),
        })
    }

    fn row(&self, token: Token) -> Option<Row> {
        let bits = u32::from(self.welcome.as_ref()?.partition_bits);
        let PartitionId(partition) = token.partition(bits);
        self.rows.get(partition as usize).cloned()
    }

    /// A usable connection to a shard.
    fn link(&self, replica: Replica) -> Option<Arc<Link>> {
        let link = self.slots.get(&(replica.node, replica.shard))?.link.as_ref()?;
        link.is_usable().then(|| Arc::clone(link))
    }

    /// A usable connection to a node: any shard forwards.
    fn link_to(&self, node: OriginId) -> Option<Arc<Link>> {
        let slots = self.slots.range((node, 0)..=(node, u32::MAX));
        slots.filter_map(|(_, slot)| slot.link.as_ref()).find(|link| link.is_usable()).cloned()
    }

    fn nodes(&self) -> Vec<OriginId> {
        let mut nodes: Vec<OriginId> = self.slots.keys().map(|(node, _)| *node).collect();
        nodes.dedup();
        nodes
    }
}

impl Pool {
    /// The best connection there is for a token; `None` when there is none as needed. Starts to
    /// connect to a better one in the background. What has no token is for the node that
    /// introduced itself: an operator may mean that one. `asked`: where it was sent before.
    pub(crate) fn choose(
        &self,
        token: Option<Token>,
        kind: Kind,
        asked: &[OriginId],
        need: Need,
    ) -> Option<Chosen> {
        let now = self.timer.clock.now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(token) = token else {
            let introduced = state.welcome.as_ref().and_then(|it| state.link_to(it.node));
            let link = introduced.or_else(|| self.any(state, &[], asked, need, now))?;
            return Some(self.chosen(state, link, None, kind, now));
        };
        if !state.is_spread {
            state.is_spread = true;
            self.connect_to_all(state, now);
        }
        let row = state.row(token);
        let homes: &[Replica] = row.as_ref().map_or(&[], |row| &row.replicas);
        if let Some(&home) = homes.first()
            && asked.is_empty()
            && let Some(link) = state.link(home)
            && state.watch(home.node, now, &self.options).health.standing(now) == Standing::Healthy
        {
            return Some(self.chosen(state, link, row.as_ref(), kind, now));
        }
        self.improve(state, homes, asked, now);
        let stranger = homes.iter().any(|home| !state.addresses.contains_key(&home.node));
        let refresh = stranger && state.next_refresh <= now;
        if refresh {
            state.next_refresh = now.after_nanos(REFRESH_PAUSE);
        }
        let chosen = self
            .any(state, homes, asked, need, now)
            .map(|link| self.chosen(state, link, row.as_ref(), kind, now));
        drop(guard);
        if refresh {
            drop(self.introduce());
        }
        chosen
    }

    fn any(
        &self,
        state: &mut State,
        homes: &[Replica],
        asked: &[OriginId],
        need: Need,
        now: Instant,
    ) -> Option<Arc<Link>> {
        state.turn = state.turn.wrapping_add(1);
        let mut candidates = Vec::new();
        let mut links = Vec::new();
        for node in state.nodes() {
            let home = homes.iter().position(|home| home.node == node);
            let of_shard = home.and_then(|at| state.link(homes[at]));
            let Some(link) = of_shard.or_else(|| state.link_to(node)) else { continue };
            let standing = state.watch(node, now, &self.options).health.standing(now);
            candidates.push(Candidate { node, standing, home, asked: asked.contains(&node) });
            links.push(link);
        }
        let node = best(&candidates, need, state.turn)?;
        let at = candidates.iter().position(|candidate| candidate.node == node)?;
        Some(links.swap_remove(at))
    }

    fn chosen(
        &self,
        state: &mut State,
        link: Arc<Link>,
        row: Option<&Row>,
        kind: Kind,
        now: Instant,
    ) -> Chosen {
        let node = link.welcome.node;
        let route = row.map_or(0, |row| {
            let index = row.replicas.iter().position(|replica| replica.node == node).unwrap_or(0);
            // Four bits of each, as the header has it.
            u8::try_from((index as u64 & 15) | (row.version & 15) << 4).unwrap_or(0)
        });
        let bound = state.watch(node, now, &self.options).health.bound(kind);
        Chosen { link, node, route, bound, hedge_after: state.hedge.after() }
    }

    /// Starts to connect to the shard that the request would best go to. Nodes that are silent
    /// are left to their probes.
    fn improve(&self, state: &mut State, homes: &[Replica], asked: &[OriginId], now: Instant) {
        let wanted = homes.iter().copied().find(|home| {
            let health = &mut state.watch(home.node, now, &self.options).health;
            !asked.contains(&home.node) && health.standing(now) != Standing::Silent
        });
        if let Some(wanted) = wanted
            && state.link(wanted).is_none()
        {
            if let Some(slot) = state.slots.get_mut(&(wanted.node, wanted.shard)) {
                slot.link = None;
            }
            self.connect_slot(state, wanted, now);
        }
    }

    /// Starts to connect to each node that there is no connection to: so that each can stand in
    /// for another at once.
    fn connect_to_all(&self, state: &mut State, now: Instant) {
        let nodes: Vec<OriginId> = state.addresses.keys().copied().collect();
        for node in nodes {
            if state.link_to(node).is_none() {
                let shard = self.shard_of(state, node);
                self.connect_slot(state, Replica { node, shard }, now);
            }
        }
        let given = &self.options.addresses;
        if state.addresses.len() < given.len() {
            let known = |address: &&String| state.addresses.values().any(|it| it == *address);
            self.meet(given.iter().filter(|address| !known(address)).cloned().collect());
        }
    }

    /// Some shard of a node, not the same for all clients.
    fn shard_of(&self, state: &State, node: OriginId) -> u32 {
        let nodes = state.welcome.as_ref().map_or(&[][..], |welcome| &welcome.nodes);
        let count = nodes.iter().find(|it| it.id == node).map_or(1, |it| it.shard_count.max(1));
        u32::try_from(self.client_id % u64::from(count)).unwrap_or(0)
    }

    /// A node answered what was sent then. `took`: for a read, nanoseconds since it began.
    pub(crate) fn answered(&self, node: OriginId, kind: Kind, sent: Instant, took: Option<u64>) {
        if self.is_many() {
            let now = self.timer.clock.now();
            let mut state = self.lock();
            state.watch(node, now, &self.options).health.answered(now, kind, sent);
            if let Some(took) = took {
                state.hedge.read(took);
            }
        }
    }

    /// What was sent to a node then is overdue.
    pub(crate) fn overdue(
        &self,
        node: OriginId,
        link: &Arc<Link>,
        kind: Kind,
        sent: Instant,
    ) -> Overdue {
        let now = self.timer.clock.now();
        let mut state = self.lock();
        let watched = state.watch(node, now, &self.options);
        let health = &mut watched.health;
        let elsewhere = health.overdue(now, kind, sent);
        // By then a probe that begins now is overdue.
        let look_again = health.bound(Kind::Read) + PROBE_DELAY;
        if watched.health.next_probe().is_some_and(|at| at <= now) {
            watched.via = Arc::downgrade(link);
            self.timer.wake();
        }
        Overdue { elsewhere, look_again }
    }

    /// A connection to a node was lost.
    pub(crate) fn lost(&self, node: OriginId) {
        if self.is_many() {
            let now = self.timer.clock.now();
            self.lock().watch(node, now, &self.options).health.lost(now);
            self.timer.wake();
        }
    }

    /// A node answered from data that is behind.
    pub(crate) fn behind(&self, node: OriginId) {
        let now = self.timer.clock.now();
        self.lock().watch(node, now, &self.options).health.behind(now);
    }

    /// Whether a node is believed to answer.
    pub(crate) fn is_healthy(&self, node: OriginId) -> bool {
        let now = self.timer.clock.now();
        let standing = self.lock().watch(node, now, &self.options).health.standing(now);
        standing == Standing::Healthy
    }

    /// A server said that it is busy: no hedges for a while.
    pub(crate) fn busy(&self) {
        let now = self.timer.clock.now();
        self.lock().hedge.busy(now);
    }

    /// Whether one more read may be sent because one is late. If so, it is paid for.
    pub(crate) fn take_hedge(&self) -> bool {
        let now = self.timer.clock.now();
        self.lock().hedge.take(now) && self.retry().take_spare()
    }

    /// Looks at the PING of a node that is under way, if there is one. Returns the connections to
    /// be ended.
    fn look_at_ping(
        state: &mut State,
        node: OriginId,
        now: Instant,
        random: u64,
    ) -> Vec<Arc<Link>> {
        let Some(watched) = state.watched.get_mut(&node) else { return Vec::new() };
        let outcome = match watched.ping.as_mut().map(oneshot::Receiver::try_recv) {
            None => return Vec::new(),
            Some(Ok(None)) => {
                watched.health.check_probe(now);
                return Vec::new();
            }
            Some(Ok(Some(outcome))) => outcome,
            Some(Err(oneshot::Canceled)) => Err(Ended::Lost),
        };
        watched.ping = None;
        if outcome.is_ok() {
            watched.health.probe_answered(now);
            return Vec::new();
        }
        watched.health.probe_failed(now, random);
        // TCP would go on for a quarter of an hour.
        let slots = state.slots.range_mut((node, 0)..=(node, u32::MAX));
        slots.filter_map(|(_, slot)| slot.link.take()).collect()
    }

    /// Sends a PING on a connection to a node, or starts to make one.
    fn probe(&self, state: &mut State, node: OriginId, now: Instant, random: u64) {
        let doubted = state.watched.get(&node).and_then(|watched| watched.via.upgrade());
        let link = doubted.filter(|link| link.is_usable()).or_else(|| state.link_to(node));
        let under_way = match link {
            Some(link) => {
                let deadline = self.timer.clock.after(PING_TIMEOUT);
                let sent = link.send(deadline, 0, &Outgoing::Ping(b"probe"), Flush::Writer).ok();
                let is_sent = sent.is_some();
                state.watch(node, now, &self.options).ping = sent;
                is_sent
            }
            None => {
                let shard = self.shard_of(state, node);
                self.connect_slot(state, Replica { node, shard }, now)
            }
        };
        if !under_way {
            state.watch(node, now, &self.options).health.probe_failed(now, random);
        }
    }
}

impl Ticked for Pool {
    /// Makes the probes that are due and looks at those under way.
    fn tick(&self, now: Instant) -> bool {
        if !self.is_many() {
            return false;
        }
        let random = self.retry().random();
        let mut guard = self.lock();
        let state = &mut *guard;
        let nodes: Vec<OriginId> = state.watched.keys().copied().collect();
        let (mut waits, mut next, mut ended) = (false, None, Vec::new());
        for node in nodes {
            ended.extend(Pool::look_at_ping(state, node, now, random));
            if state.watch(node, now, &self.options).health.begin_probe(now) {
                self.probe(state, node, now, random);
            }
            let watched = state.watch(node, now, &self.options);
            waits |= watched.ping.is_some();
            next = next.into_iter().chain(watched.health.next_probe()).min();
        }
        drop(guard);
        // Outside the lock, because it wakes whoever waits for them.
        ended.iter().for_each(|link| link.end());
        if let Some(next) = next {
            self.timer.tick_at(next);
        }
        waits
    }
}
