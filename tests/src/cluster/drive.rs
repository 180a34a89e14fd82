//! The loop of a simulated cluster: which of all that could happen next does.
//!
//! Invariant: one thing at a time, chosen by the seed among what is ready; when nothing is, time
//! jumps to the next moment at which something will be. A paused node's inputs wait for it.

use std::collections::BTreeSet;

use annulus_cluster::NodeId;
use annulus_engine::model::Instant;
use annulus_engine::sim::Step;

use super::client::Wish;
use super::host::{Change, node_id};
use super::wires::{Delivery, Output};
use super::{Route, SimCluster, operator};
use crate::checker::Violation;
use crate::history::Mark;
use crate::network::{Parcel, Place};

/// Steps without any progress of time after which the cluster is said to spin.
const STEPS_MAX: u64 = 20_000_000;

impl SimCluster {
    /// Lets everything happen for this much virtual time.
    pub fn drive(&mut self, nanos: u64) {
        let until = self.now().after_nanos(nanos);
        self.drive_until(until, |_| false);
    }

    /// Lets everything happen until `done` or this moment. Whether it was done.
    ///
    /// # Panics
    /// When the cluster spins without end.
    pub fn drive_until(&mut self, until: Instant, done: impl Fn(&SimCluster) -> bool) -> bool {
        for _ in 0..STEPS_MAX {
            if done(self) {
                return true;
            }
            if self.now() >= until {
                return false;
            }
            self.step(until);
        }
        panic!("the cluster spins");
    }

    fn step(&mut self, until: Instant) {
        let now = self.now();
        if self.next_arrival().is_some_and(|next| next <= now) {
            self.arrive(now);
        }
        let ready: Vec<Place> = self.ready_hosts(now).collect();
        if !ready.is_empty() && self.chance.one_in(2) {
            let place = ready[self.chance.index(ready.len())];
            return self.turn(place);
        }
        match self.executor.step() {
            Step::Polled(group) => self.polled(group),
            Step::Halted(group) => self.halted(group),
            Step::Idle(_) if !ready.is_empty() => {
                let place = ready[self.chance.index(ready.len())];
                self.turn(place);
            }
            Step::Idle(timer) => {
                let next = timer.into_iter().chain(self.next_arrival()).chain(self.next_timeout());
                let next = next.min().map_or(until, |next| next.min(until));
                self.executor.pass_a_moment();
                self.executor.advance_to(next);
            }
        }
    }

    /// The power of a group was cut by an operation of its own.
    pub(super) fn halted(&mut self, group: u32) {
        let place = self.place_of(group);
        self.note(format!("the power of node {} is gone", place.node));
        self.crash(place.node);
    }

    fn place_of(&self, group: u32) -> Place {
        let shards = self.common.shards;
        Place { node: group / shards, shard: group % shards }
    }

    fn ready_hosts(&self, now: Instant) -> impl Iterator<Item = Place> + '_ {
        let running = self.nodes.iter().filter(|node| !node.paused);
        running
            .flat_map(|node| &node.hosts)
            .filter(move |host| host.dirty || host.timeout.is_some_and(|timeout| timeout <= now))
            .map(|host| host.place)
    }

    /// When a pump wants to be called.
    fn next_timeout(&self) -> Option<Instant> {
        let running = self.nodes.iter().filter(|node| !node.paused);
        running.flat_map(|node| &node.hosts).filter_map(|host| host.timeout).min()
    }

    /// When the next thing arrives, or a client acts.
    fn next_arrival(&self) -> Option<Instant> {
        let clients = self.clients.iter().filter_map(|client| client.next_at());
        let operators = self.operators.iter().filter_map(|operator| operator.next_at());
        clients.chain(operators).chain(self.network.next_due()).chain(self.streams.next_due()).min()
    }

    /// A task of the group was polled.
    fn polled(&mut self, group: u32) {
        let place = self.place_of(group);
        let host = &mut self.nodes[place.node as usize].hosts[place.shard as usize];
        host.dirty = host.takes_input();
        match host.look(&self.common) {
            None => {}
            Some(Change::Opened) => {
                self.note(format!("{place:?} serves"));
                self.note_disturbance(place.node);
            }
            Some(Change::Stopped(in_good_order)) => {
                self.note(format!("{place:?} has stopped"));
                if !in_good_order {
                    // What a failing disk had not taken ends with the process, as in a crash.
                    let (node, at) = (place.node, self.now().0);
                    self.book.mark(Mark::Crashed { node, at });
                }
                let host = &mut self.nodes[place.node as usize].hosts[place.shard as usize];
                let keys = host.end(&self.executor);
                self.hang_up(&keys);
            }
            Some(Change::NotOpened(error)) => self.not_opened(place, error),
        }
    }

    /// A shard did not open: its node does not start.
    fn not_opened(&mut self, place: Place, error: String) {
        self.note(format!("{place:?} does not start: {error}"));
        if !self.nodes[place.node as usize].ailing {
            let what = format!("{place:?} does not start: {error}");
            self.broken.push(Violation { checker: "start", key: 0, event: None, what });
        }
        self.kill(place.node);
    }

    fn hang_up(&mut self, keys: &[annulus::pump::ConnectionKey]) {
        let now = self.now();
        for key in keys {
            if let Some(route) = self.routes.remove(key) {
                self.streams.closed_by_shard(now, *key, route.client);
            }
        }
    }

    fn turn(&mut self, place: Place) {
        self.executor.pass_a_moment();
        self.turns += 1;
        let reachable = self.reachable_from(place.node);
        let node = &mut self.nodes[place.node as usize];
        let waiting: Vec<usize> = node.hosts.iter().map(|host| host.mesh_waiting()).collect();
        let output = node.hosts[place.shard as usize].turn(
            &waiting,
            &reachable,
            self.common.shards,
            &mut self.chance,
        );
        let is_removed = output.is_removed;
        for (shard, message) in output.mesh {
            node.hosts[shard as usize].push_mesh(message);
        }
        let now = self.now();
        for (to, lane, bytes) in output.letters {
            let to = Place { node: to.node.0 - 1, shard: to.shard };
            // One that is refused is lost, as by a link that breaks.
            self.network.send(now, Parcel { from: place, to, lane, bytes });
        }
        for (key, bytes) in output.bytes {
            if let Some(route) = self.routes.get(&key) {
                self.streams.send_down(now, key, route.client, bytes);
            }
        }
        self.hang_up(&output.closed);
        if is_removed && self.is_up(place.node) {
            self.note(format!("node {} is removed", place.node));
            self.stop(place.node);
        }
        self.tend();
    }

    /// The nodes to which links of this one stand, as far as it knows.
    fn reachable_from(&mut self, node: u32) -> BTreeSet<NodeId> {
        let now = self.now();
        let others = (0..self.node_count()).filter(|other| *other != node);
        others
            .filter(|other| {
                let alive = self.nodes[*other as usize].hosts.iter().any(|host| host.takes_input());
                !self.network.is_known_down(node, *other, alive, now)
            })
            .map(node_id)
            .collect()
    }

    /// Everything that is due arrives, and clients whose time has come act.
    fn arrive(&mut self, now: Instant) {
        while let Some(parcel) = self.network.pop_due(now) {
            let host = &mut self.nodes[parcel.to.node as usize].hosts[parcel.to.shard as usize];
            if host.takes_input() {
                host.push_parcel(parcel);
            }
        }
        let mut wishes = Vec::new();
        while let Some(delivery) = self.streams.pop_due(now) {
            match delivery {
                Delivery::ToShard(place, input) => {
                    let host = &mut self.nodes[place.node as usize].hosts[place.shard as usize];
                    if host.takes_input() {
                        host.push_input(input);
                    }
                }
                Delivery::ToClient(client, key, output) if client >= operator::FIRST => {
                    let operator = &mut self.operators[(client - operator::FIRST) as usize];
                    match output {
                        Output::Bytes(bytes) => operator.received(key, &bytes, now, &mut wishes),
                        Output::Closed => operator.closed(key, now),
                    }
                    self.grant(&mut wishes, now);
                }
                Delivery::ToClient(client, key, output) => {
                    let Some(client) = self.clients.get_mut(client as usize) else { continue };
                    match output {
                        Output::Bytes(bytes) => {
                            client.received(key, &bytes, now, &mut self.book, &mut wishes);
                        }
                        Output::Closed => client.closed(key, now, &mut self.book),
                    }
                    self.grant(&mut wishes, now);
                }
            }
        }
        for index in 0..self.clients.len() {
            if self.clients[index].next_at().is_some_and(|next| next <= now) {
                self.clients[index].act(now, &mut self.book, &mut wishes);
                self.grant(&mut wishes, now);
            }
        }
        for index in 0..self.operators.len() {
            if self.operators[index].next_at().is_some_and(|next| next <= now) {
                self.operators[index].act(now, &mut wishes);
                self.grant(&mut wishes, now);
            }
        }
    }

    /// The shard of a node that a client or operator connects to.
    fn place_for(&mut self, number: u32, node: u32) -> Place {
        let shards = self.common.shards;
        match number.checked_sub(operator::FIRST) {
            None => self.clients[number as usize].place_on(node, shards),
            Some(index) => Place { node, shard: self.operators[index as usize].shard_of(shards) },
        }
    }

    /// Does what a client or operator wishes.
    fn grant(&mut self, wishes: &mut Vec<Wish>, now: Instant) {
        for wish in wishes.drain(..) {
            match wish {
                Wish::Connect(key, node) => {
                    // The low half of the key is the client's number.
                    let number = u32::try_from(key.0 & 0xffff_ffff).expect("half of a key");
                    let place = self.place_for(number, node);
                    let is_up = self.nodes[node as usize].hosts[place.shard as usize].is_up();
                    if is_up {
                        self.routes.insert(key, Route { client: number, place });
                        self.streams.open(now, key, place);
                    } else {
                        self.streams.closed_by_shard(now, key, number);
                    }
                }
                Wish::Send(key, bytes) => {
                    if let Some(route) = self.routes.get(&key) {
                        self.streams.send_up(now, key, route.place, bytes);
                    }
                }
                Wish::Close(key) => {
                    if let Some(route) = self.routes.remove(&key) {
                        self.streams.closed_by_client(now, key, route.place);
                    }
                }
                Wish::Overdue { node, since, what } => {
                    let asked = &self.nodes[node as usize];
                    let well = !asked.paused && asked.wanted && asked.disturbed < since;
                    if well {
                        let what = format!("node {node}: {what}");
                        let checker = "deadline";
                        self.broken.push(Violation { checker, key: 0, event: None, what });
                    }
                }
            }
        }
    }
}
