//! What the clones of a client share: the partition map, one slot per (node, shard), and how
//! connections come about. Which of them a request takes is in `nodes.rs`.
//!
//! Invariants: at most one connection is being made per slot, and one introduction at a time, so
//! that a node that comes back is not stormed; a request never waits for a particular shard's
//! connection while another one could carry it, because every shard forwards once.

#![expect(
    clippy::disallowed_types,
    reason = "client threads share state; shards never run this code"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::Duration;

use annulus_engine::model::{Instant, NamespaceId, OriginId};
use futures_channel::oneshot;

use super::hedge::Hedge;
use super::link::Link;
use super::nodes::Watched;
use super::retry::Retry;
use super::timer::Timer;
use super::types::{ClientOptions, Error, Result};
use crate::wire::hello::{ANY_SHARD, FEATURE_ONCE, Hello, Mode, Replica, Welcome, want};
use crate::wire::response::Route;

/// Everything that the clones of a client share.
pub(crate) struct Pool {
    pub(crate) options: ClientOptions,
    pub(crate) timer: Timer,
    state: Mutex<State>,
    retry: Mutex<Retry>,
    /// There is more than one node: they are watched, and stand in for one another.
    many: AtomicBool,
    /// Drawn once; with a count it makes once-ids.
    pub(crate) client_id: u64,
    /// For the closures of links and the threads that connect.
    this: Weak<Pool>,
}

pub(super) struct State {
    pub(super) welcome: Option<Arc<Welcome>>,
    pub(super) rows: Vec<Row>,
    pub(super) addresses: BTreeMap<OriginId, String>,
    pub(super) slots: BTreeMap<(OriginId, u32), Slot>,
    pub(super) watched: BTreeMap<OriginId, Watched>,
    pub(super) hedge: Hedge,
    /// Requests that had no home to go to.
    pub(super) turn: usize,
    /// Every node that is known has been connected to, or this is under way.
    pub(super) is_spread: bool,
    /// No new introduction because of an unknown node before.
    pub(super) next_refresh: Instant,
    /// Those who wait for an introduction that is being made.
    introducing: Option<Vec<oneshot::Sender<Result<()>>>>,
    once_number: u64,
}

/// Where a partition lives.
#[derive(Clone)]
pub(super) struct Row {
    pub(super) version: u64,
    pub(super) replicas: Arc<[Replica]>,
}

#[derive(Default)]
pub(super) struct Slot {
    pub(super) link: Option<Arc<Link>>,
    pub(super) connecting: bool,
    failures: u32,
    pub(super) not_before: Instant,
}

impl Pool {
    pub(crate) fn new(options: ClientOptions, timer: Timer, seed: u64) -> Arc<Pool> {
        let mut retry =
            Retry::new(options.retry_percent, options.backoff, options.backoff_max, seed);
        let client_id = retry.random();
        let pool = Arc::new_cyclic(|this| Pool {
            state: Mutex::new(State {
                welcome: None,
                rows: Vec::new(),
                addresses: BTreeMap::new(),
                slots: BTreeMap::new(),
                watched: BTreeMap::new(),
                hedge: Hedge::new(options.hedge_percent, options.hedge_after_min),
                turn: 0,
                is_spread: false,
                next_refresh: Instant(0),
                introducing: None,
                once_number: 0,
            }),
            options,
            timer,
            retry: Mutex::new(retry),
            many: AtomicBool::new(false),
            client_id,
            this: this.clone(),
        });
        let weak = Arc::downgrade(&pool);
        pool.timer.register(weak);
        pool
    }

    /// Whether there is more than one node.
    pub(crate) fn is_many(&self) -> bool {
        self.many.load(Ordering::Relaxed)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn retry(&self) -> MutexGuard<'_, Retry> {
        self.retry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the server last said of itself.
    pub(crate) fn welcome(&self) -> Option<Arc<Welcome>> {
        self.lock().welcome.clone()
    }

    /// The next number of a once-id.
    pub(crate) fn once_number(&self) -> u64 {
        let mut state = self.lock();
        state.once_number += 1;
        state.once_number
    }

    /// The namespace of this name, as far as known.
    pub(crate) fn namespace(&self, name: &str) -> Option<(NamespaceId, Mode)> {
        let welcome = self.welcome()?;
        let fact = welcome.namespaces.iter().find(|fact| fact.name == name)?;
        Some((fact.id, fact.mode))
    }

    /// Waits for an introduction: a connection to any node, with all facts. Starts one if none
    /// is being made.
    pub(crate) fn introduce(&self) -> oneshot::Receiver<Result<()>> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        if let Some(waiting) = &mut state.introducing {
            waiting.push(sender);
            return receiver;
        }
        state.introducing = Some(vec![sender]);
        let mut addresses = self.options.addresses.clone();
        for address in state.addresses.values() {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        drop(state);
        let this = self.this.clone();
        let spawned = spawn_connect(move || {
            if let Some(pool) = this.upgrade() {
                let outcome = pool.introduce_by(&addresses);
                pool.introduced(&outcome);
            }
        });
        if let Err(error) = spawned {
            self.introduced(&Err(Error::Unreachable { what: error.to_string() }));
        }
        receiver
    }

    fn introduced(&self, outcome: &Result<()>) {
        let waiting = self.lock().introducing.take();
        for sender in waiting.into_iter().flatten() {
            let _ = sender.send(outcome.clone());
        }
    }

    /// Tries the addresses in turn; the next one also when the one before takes long.
    fn introduce_by(&self, addresses: &[String]) -> Result<()> {
        let mut last = Error::Unreachable { what: "no address is given".to_owned() };
        let (tell, told) = mpsc::channel();
        let (mut rest, mut under_way) = (addresses.iter(), 0);
        loop {
            if let Some(address) = rest.next().cloned() {
                let (this, tell) = (self.this.clone(), tell.clone());
                let spawned = spawn_connect(move || {
                    let Some(pool) = this.upgrade() else { return };
                    let link = pool.connect(&address, ANY_SHARD, want::ALL);
                    // Another one may have been quicker: then this one ends here.
                    let _ = tell.send((address, link));
                });
                match spawned {
                    Ok(()) => under_way += 1,
                    Err(error) => last = Error::Unreachable { what: error.to_string() },
                }
            } else if under_way == 0 {
                return Err(last);
            }
            let patience = self.options.connect_timeout / if rest.len() > 0 { 4 } else { 1 };
            match told.recv_timeout(patience) {
                Ok((address, Ok(link))) => {
                    self.install(link, Some(&address));
                    return Ok(());
                }
                Ok((_, Err(error))) => (last, under_way) = (error, under_way - 1),
                Err(_) => {}
            }
        }
    }

    fn connect(&self, address: &str, shard: u32, wants: u32) -> Result<Link> {
        let cluster = self.welcome().map_or(self.options.cluster, |welcome| welcome.cluster);
        let name = &self.options.name;
        let features = FEATURE_ONCE;
        let hello = Hello { shard, wants, cluster, name, features, ..Hello::default() };
        let this = self.this.clone();
        let on_route = Box::new(move |route| {
            if let Some(pool) = this.upgrade() {
                pool.learn(route);
            }
        });
        Link::connect(address, &hello, self.options.connect_timeout, &self.timer, on_route)
    }

    /// Puts a new connection in its slot; with an address it was an introduction, and its
    /// welcome has the map.
    fn install(&self, link: Link, introduced_by: Option<&str>) {
        let link = Arc::new(link);
        let welcome = Arc::clone(&link.welcome);
        let now = self.timer.clock.now();
        let mut state = self.lock();
        let slot = state.slots.entry((welcome.node, welcome.shard)).or_default();
        // An introduction and a connection to the shard may have crossed: the first one stays.
        if !slot.link.as_ref().is_some_and(|link| link.is_usable()) {
            slot.link = Some(link);
        }
        slot.failures = 0;
        if introduced_by.is_none() {
            slot.connecting = false;
        }
        state.watch(welcome.node, now, &self.options).health.probe_answered(now);
        let Some(address) = introduced_by else { return };
        for node in &welcome.nodes {
            state.addresses.insert(node.id, node.address.clone());
        }
        // The address that worked is better than the one that the node has of itself.
        state.addresses.insert(welcome.node, address.to_owned());
        self.many.store(state.addresses.len() > 1, Ordering::Relaxed);
        state.is_spread = false;
        state.rows = welcome
            .runs
            .iter()
            .flat_map(|run| {
                let replicas: Arc<[Replica]> = run.replicas.as_slice().into();
                let row = Row { version: welcome.map_version, replicas };
                std::iter::repeat_n(row, run.length as usize)
            })
            .collect();
        state.welcome = Some(welcome);
    }

    /// Connects, in the background, to addresses that the caller gave and no server named, to
    /// learn whose they are.
    pub(super) fn meet(&self, addresses: Vec<String>) {
        let this = self.this.clone();
        let meet = move || {
            for address in addresses {
                let Some(pool) = this.upgrade() else { return };
                let Ok(link) = pool.connect(&address, ANY_SHARD, 0) else { continue };
                let node = link.welcome.node;
                pool.install(link, None);
                let mut state = pool.lock();
                state.addresses.entry(node).or_insert(address);
                pool.many.store(state.addresses.len() > 1, Ordering::Relaxed);
            }
        };
        // Without a thread these nodes stay unknown until the next introduction.
        let _ = spawn_connect(meet);
    }

    /// Takes a newer row of the map.
    fn learn(&self, route: Route) {
        let mut state = self.lock();
        if let Some(row) = state.rows.get_mut(route.partition as usize)
            && route.version > row.version
        {
            *row = Row { version: route.version, replicas: route.replicas.into() };
        }
    }

    /// Starts to connect to a shard in the background, unless that is under way or too soon.
    pub(super) fn connect_slot(&self, state: &mut State, wanted: Replica, now: Instant) -> bool {
        let Some(address) = state.addresses.get(&wanted.node).cloned() else { return false };
        let slot = state.slots.entry((wanted.node, wanted.shard)).or_default();
        if slot.connecting || now < slot.not_before {
            return slot.connecting;
        }
        let this = self.this.clone();
        let spawned = spawn_connect(move || {
            let Some(pool) = this.upgrade() else { return };
            match pool.connect(&address, wanted.shard, 0) {
                Ok(link) => pool.install(link, None),
                Err(_) => pool.connect_failed(wanted),
            }
        });
        // The thread waits for the lock before it clears this.
        slot.connecting = spawned.is_ok();
        slot.connecting
    }

    /// Waits longer each time, with jitter, before the slot is tried again.
    fn connect_failed(&self, wanted: Replica) {
        let random = self.retry().random();
        let now = self.timer.clock.now();
        let mut state = self.lock();
        let slot = state.slots.entry((wanted.node, wanted.shard)).or_default();
        slot.connecting = false;
        let bound = Duration::from_millis(50 << slot.failures.min(7));
        slot.failures += 1;
        let nanos = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
        slot.not_before = now.after_nanos(random % nanos.max(1));
        if self.is_many() {
            state.watch(wanted.node, now, &self.options).health.probe_failed(now, random);
            self.timer.wake();
        }
    }
}

fn spawn_connect(run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name("annulus-connect".to_owned()).spawn(run).map(drop)
}
