//! Which connection a request takes: the partition map, one slot per (node, shard), and how
//! connections come about.
//!
//! Invariants: at most one connection is being made per slot, and one introduction at a time, so
//! that a node that comes back is not stormed; a request never waits for a particular shard's
//! connection while another one could carry it, because every shard forwards once.

#![expect(
    clippy::disallowed_types,
    reason = "client threads share state; shards never run this code"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use annulus_engine::model::{Instant, NamespaceId, OriginId, PartitionId, Token};
use futures_channel::oneshot;

use super::link::Link;
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
    /// Drawn once; with a count it makes once-ids.
    pub(crate) client_id: u64,
    /// For the closures of links and the threads that connect.
    this: Weak<Pool>,
}

#[derive(Default)]
struct State {
    welcome: Option<Arc<Welcome>>,
    rows: Vec<Row>,
    addresses: BTreeMap<OriginId, String>,
    slots: BTreeMap<(OriginId, u32), Slot>,
    /// Those who wait for an introduction that is being made.
    introducing: Option<Vec<oneshot::Sender<Result<()>>>>,
    once_number: u64,
}

/// Where a partition lives.
#[derive(Clone)]
struct Row {
    version: u64,
    replicas: Arc<[Replica]>,
}

#[derive(Default)]
struct Slot {
    link: Option<Arc<Link>>,
    connecting: bool,
    failures: u32,
    not_before: Instant,
}

/// A connection for a request, and the hint to send with it.
pub(crate) struct Chosen {
    pub(crate) link: Arc<Link>,
    pub(crate) route: u8,
}

impl Pool {
    pub(crate) fn new(options: ClientOptions, timer: Timer, seed: u64) -> Arc<Pool> {
        let mut retry =
            Retry::new(options.retry_percent, options.backoff, options.backoff_max, seed);
        let client_id = retry.random();
        Arc::new_cyclic(|this| Pool {
            options,
            timer,
            state: Mutex::default(),
            retry: Mutex::new(retry),
            client_id,
            this: this.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
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

    /// The best connection there is for a token; `None` when there is none at all. Starts to
    /// connect to a better one in the background. `attempt` turns to further replicas.
    pub(crate) fn choose(&self, token: Option<Token>, attempt: u32) -> Option<Chosen> {
        let now = self.timer.clock.now();
        let mut state = self.lock();
        let row = token.and_then(|token| {
            let bits = u32::from(state.welcome.as_ref()?.partition_bits);
            let PartitionId(partition) = token.partition(bits);
            state.rows.get(partition as usize).cloned()
        });
        let Some(row) = row.filter(|row| !row.replicas.is_empty()) else {
            return state.any(None).map(|link| Chosen { link, route: 0 });
        };
        let index = attempt as usize % row.replicas.len();
        let wanted = row.replicas[index];
        // Four bits of each, as the header has it.
        let route = u8::try_from((index as u64 & 15) | (row.version & 15) << 4).unwrap_or(0);
        let slot = state.slots.entry((wanted.node, wanted.shard)).or_default();
        if let Some(link) = slot.link.as_ref().filter(|link| link.is_usable()) {
            return Some(Chosen { link: Arc::clone(link), route });
        }
        slot.link = None;
        if !slot.connecting && slot.not_before <= now {
            // Set first: the thread clears it, and may be quicker than this one.
            slot.connecting = true;
            if !self.connect_slot(wanted, &state.addresses)
                && let Some(slot) = state.slots.get_mut(&(wanted.node, wanted.shard))
            {
                slot.connecting = false;
            }
        }
        state.any(Some(wanted.node)).map(|link| Chosen { link, route })
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
        let spawned =
            std::thread::Builder::new().name("annulus-connect".to_owned()).spawn(move || {
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

    /// Tries the addresses in turn.
    fn introduce_by(&self, addresses: &[String]) -> Result<()> {
        let mut last = Error::Unreachable { what: "no address is given".to_owned() };
        for address in addresses {
            match self.connect(address, ANY_SHARD, want::ALL) {
                Ok(link) => {
                    self.install(link, Some(address));
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last)
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
        let Some(address) = introduced_by else { return };
        state.addresses =
            welcome.nodes.iter().map(|node| (node.id, node.address.clone())).collect();
        // The address that worked is better than the one that the node has of itself.
        state.addresses.insert(welcome.node, address.to_owned());
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

    /// Takes a newer row of the map.
    fn learn(&self, route: Route) {
        let mut state = self.lock();
        if let Some(row) = state.rows.get_mut(route.partition as usize)
            && route.version > row.version
        {
            *row = Row { version: route.version, replicas: route.replicas.into() };
        }
    }

    /// Starts to connect to a shard in the background. Whether it did.
    fn connect_slot(&self, wanted: Replica, addresses: &BTreeMap<OriginId, String>) -> bool {
        let Some(address) = addresses.get(&wanted.node).cloned() else { return false };
        let this = self.this.clone();
        let spawned =
            std::thread::Builder::new().name("annulus-connect".to_owned()).spawn(move || {
                let Some(pool) = this.upgrade() else { return };
                match pool.connect(&address, wanted.shard, 0) {
                    Ok(link) => pool.install(link, None),
                    Err(_) => pool.connect_failed(wanted),
                }
            });
        spawned.is_ok()
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
    }
}

impl State {
    /// A usable connection: of this node if possible.
    fn any(&self, node: Option<OriginId>) -> Option<Arc<Link>> {
        let usable = |slot: &Slot| slot.link.clone().filter(|link| link.is_usable());
        let of_node = self
            .slots
            .iter()
            .filter(|((id, _), _)| Some(*id) == node)
            .find_map(|(_, slot)| usable(slot));
        of_node.or_else(|| self.slots.values().find_map(usable))
    }
}
