//! Many clients of one shard at once, while memtables are flushed and tables come and go.
//!
//! Invariant checked: a read that began after a write was acknowledged shows that write or a
//! newer one, and nothing that was never asked for; so does each key of a scan. A crash at any
//! moment of it costs no more than a suffix of what was not acknowledged.

#![expect(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use annulus_engine::model::{Dot, NamespaceId, RecordRef, Timestamp, TokenRange};
use annulus_engine::runtime::{Class, Runtime};
use annulus_engine::shard::{Condition, Merge, Mutation, ScanRequest};
use annulus_engine::sim::{Chance, SimRuntime};
use annulus_engine::{Error, Result};

use crate::engine_story::{CrashStory, Images, new_store, watch_crashes};
use crate::model::{Effect, KeyName, name};
use crate::reading::readable;
use crate::store::{Book, SimShard};
use crate::workload::{SIBLINGS, Workload, token_of};

type Version = (Timestamp, Dot);

/// One of the clients.
struct Client {
    shard: SimShard,
    runtime: SimRuntime,
    book: Rc<RefCell<Book>>,
    keys: Rc<Vec<KeyName>>,
    chance: Chance,
    value_size_max: usize,
    ttl_one_in: u64,
}

/// The story: `clients` at once, with crashes looked at as in [`crate::engine_story`].
pub fn tell(story: CrashStory, clients: usize) -> Images {
    let mut store = new_store(story.seed);
    let images = watch_crashes(&store, story);
    assert!(store.open());
    let mut chance = Chance::new(story.seed ^ 0xC11E);
    let keys = Workload::new(story.seed, story.mix).keys().to_vec();
    let keys: Vec<KeyName> = keys.into_iter().filter(|key| key.0 != SIBLINGS).collect();
    let keys = Rc::new(keys);
    let running = Rc::new(Cell::new(clients));
    let runtime = store.executor.runtime();
    for _ in 0..clients {
        let client = Client {
            shard: store.shard(),
            runtime: runtime.clone(),
            book: store.book.clone(),
            keys: keys.clone(),
            chance: chance.fork(),
            value_size_max: story.mix.value_size_max,
            ttl_one_in: story.mix.ttl_one_in,
        };
        let (running, operations) = (running.clone(), story.operations / clients);
        runtime.spawn(Class::Foreground, async move {
            client.run(operations).await;
            running.set(running.get() - 1);
        });
    }
    store.executor.run(async {
        while running.get() > 0 {
            runtime.sleep_until(runtime.now().after_nanos(10_000_000)).await;
        }
    });
    store.check_all();
    store.disk.observe(|_| {});
    store.check_no_leak();
    store.check_all();
    images.get()
}

impl Client {
    async fn run(mut self, operations: usize) {
        for _ in 0..operations {
            let key = self.keys[self.chance.index(self.keys.len())].clone();
            match self.chance.below(40) {
                0 => self.scan().await,
                1 => self.shard.flush().await.unwrap(),
                2 => {
                    let pause = self.chance.between(1_000, 3_000_000_000);
                    self.runtime.sleep_until(self.runtime.now().after_nanos(pause)).await;
                }
                3..=18 => self.get(&key).await,
                19..=23 => self.write(&key, None).await,
                _ => {
                    let mut value = vec![0; self.chance.index(self.value_size_max + 1)];
                    self.chance.fill(&mut value);
                    self.write(&key, Some(value)).await;
                }
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.runtime.wall().as_millis()
    }

    fn floor(&self, key: &KeyName) -> Option<Version> {
        self.book.borrow().model.winner(key).map(|write| write.version)
    }

    async fn get(&self, key: &KeyName) {
        let (floor, before_ms) = (self.floor(key), self.now_ms());
        let record = self.shard.get(token_of(key), key.0, &key.1).await.unwrap();
        let value_at =
            |now_ms| record.as_ref().and_then(|record| readable(&record.as_ref(), now_ms));
        let (book, after_ms) = (self.book.borrow(), self.now_ms());
        let right = [before_ms, after_ms].iter().any(|now_ms| {
            book.model.allows_from(key, floor, value_at(*now_ms).as_deref(), *now_ms)
        });
        assert!(right, "{}: a read went back", name(key));
    }

    async fn write(&mut self, key: &KeyName, value: Option<Vec<u8>>) {
        let mortal = value.is_some() && self.ttl_one_in > 0 && self.chance.one_in(self.ttl_one_in);
        let expiry_ms = if mortal { self.now_ms() + self.chance.between(1, 4_000) } else { 0 };
        let mutation = Mutation {
            token: token_of(key),
            namespace: key.0,
            merge: Merge::LastWriteWins,
            key: &key.1,
            value: value.as_deref().map(Into::into),
            expiry_ms,
            context: None,
            condition: Condition::None,
        };
        let applied = match self.shard.apply(&mutation, self.runtime.wall()) {
            Ok(applied) => applied,
            Err(Error::Busy { .. }) => return self.runtime.yield_now().await,
            Err(error) => panic!("a write failed and nothing was broken: {error}"),
        };
        let effect = value.map_or(Effect::Delete, |value| Effect::Put { value, expiry_ms });
        let index = {
            let mut book = self.book.borrow_mut();
            book.note_version(key, &applied);
            book.model.begin(key.clone(), effect, (applied.timestamp, applied.dot))
        };
        self.shard.wait_visible(applied.lsn).await.unwrap();
        let mut book = self.book.borrow_mut();
        book.model.acknowledge(index);
        book.note_durable(key, &applied);
    }

    async fn scan(&self) {
        let floors: BTreeMap<KeyName, Version> =
            self.keys.iter().filter_map(|key| Some((key.clone(), self.floor(key)?))).collect();
        let namespace = NamespaceId(1);
        let before_ms = self.now_ms();
        let mut found = BTreeMap::new();
        self.scan_into(namespace, &mut found).await.unwrap();
        let (book, after_ms) = (self.book.borrow(), self.now_ms());
        for key in self.keys.iter().filter(|key| key.0 == namespace) {
            let floor = floors.get(key).copied();
            let right = [before_ms, after_ms].iter().any(|now_ms| {
                let value = found.get(key).filter(|(_, expiry)| *expiry == 0 || now_ms < expiry);
                let value = value.map(|(value, _)| value.as_slice());
                book.model.allows_from(key, floor, value, *now_ms)
            });
            assert!(right, "{}: a scan went back", name(key));
        }
    }

    /// Live values with their expiry.
    async fn scan_into(
        &self,
        namespace: NamespaceId,
        found: &mut BTreeMap<KeyName, (Vec<u8>, u64)>,
    ) -> Result<()> {
        let request =
            ScanRequest { range: TokenRange::FULL, after: None, namespace: Some(namespace) };
        let mut visit = |record: &RecordRef<'_>| {
            if let Some(value) = readable(record, 0) {
                found.insert((record.namespace, record.key.to_vec()), (value, record.expiry_ms));
            }
            true
        };
        self.shard.scan(&request, &mut visit).await.map(|_| ())
    }
}
