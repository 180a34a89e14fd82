//! One shard in the simulated world, beside its model: verbs for stories.
//!
//! Invariant: nothing is asked of the shard without the model being told, and every answer is
//! held against it at once. A write is in the model from the moment it has its place in the log.
//!
//! Writes to namespace [`SIBLINGS`] keep siblings: there the model's value of a key is the sorted
//! list of them all, for the shard appends whole states, each one made from the last.

#![expect(clippy::unwrap_used, reason = "a store that cannot go on has failed its test")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;

use annulus_engine::identity::Identity;
use annulus_engine::model::siblings::KeyState;
use annulus_engine::model::{Context, Dot, OriginId, Timestamp, WallMicros};
use annulus_engine::options::{CompactionOptions, LogOptions, Options, SpaceOptions};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Applied, Condition, Merge, Mutation, Outcome, Shard};
use annulus_engine::sim::{Chance, SimDisk, SimExecutor, SimRuntime};
use annulus_engine::{Error, Result};

use crate::model::{Contents, Effect, EventId, Fate, KeyName, Model, SiblingModel, name};
use crate::reading::{check_files, contents, join, pages, readable};
use crate::workload::{HASH_SEED, Operation, SIBLINGS, token_of};

/// The shard under test.
pub type SimShard = Shard<SimDisk, SimRuntime>;

/// Where it lives.
#[must_use]
pub fn dir() -> PathBuf {
    PathBuf::from("data/shard-000")
}

/// Options so small that rare things happen all the time.
#[must_use]
pub fn tiny_options() -> Options {
    Options {
        log: LogOptions {
            segment_size: 32 << 10,
            batch_size: 4096,
            overlap_size: 512,
            segments_free_max: 2,
            quiet_mark_ms: 50,
            ..LogOptions::default()
        },
        memtable_size: 64 << 10,
        cache_size: 32 << 10,
        block_size: 1024,
        partition_bits: 3,
        space: SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 },
        compaction: CompactionOptions {
            runs_max: 4,
            table_size: 64 << 10,
            step_size: 4096,
            ..CompactionOptions::default()
        },
        ..Options::default()
    }
}

/// Who the shard is.
#[must_use]
pub fn identity() -> Identity {
    Identity {
        cluster: 7,
        node: OriginId(1),
        shard: 0,
        shard_count: 1,
        hash_seed: HASH_SEED,
        partition_bits: tiny_options().partition_bits,
        created: WallMicros(1),
    }
}

/// Opens the shard on a disk, as a start of the process does.
///
/// # Errors
/// As [`Shard::open`].
pub async fn open(disk: &SimDisk, runtime: &SimRuntime, options: Options) -> Result<SimShard> {
    Shard::open(disk.clone(), runtime.clone(), &dir(), &identity(), options, None).await
}

/// What a client has read of a key with siblings.
#[derive(Clone, Default)]
struct Read {
    context: Context,
    seen: BTreeSet<EventId>,
}

/// The model of everything the shard was asked, shared with observers of the disk.
#[derive(Clone, Default)]
pub struct Book {
    /// What must be read.
    pub model: Model,
    siblings: BTreeMap<KeyName, SiblingModel>,
    reads: BTreeMap<KeyName, Vec<Read>>,
    /// Greatest stamp of a durable write.
    stamp: Timestamp,
    /// Greatest sequence of a durable write, by partition.
    sequences: BTreeMap<u32, u64>,
}

impl Book {
    /// A write was given this version: it must be above all that anybody can have seen, in all
    /// lives. (What was given out and lost before it was durable was never shown to anybody.)
    pub fn note_version(&mut self, key: &KeyName, applied: &Applied) {
        assert!(applied.timestamp > self.stamp, "{}: a stamp went back", name(key));
        let partition = token_of(key).partition(tiny_options().partition_bits).0;
        let last = self.sequences.get(&partition).copied().unwrap_or_default();
        assert!(
            applied.dot.sequence > last,
            "{}: sequence {} of partition {partition} again, {last} was given out",
            name(key),
            applied.dot.sequence
        );
    }

    /// The write with this version is durable, and may be seen.
    pub fn note_durable(&mut self, key: &KeyName, applied: &Applied) {
        let partition = token_of(key).partition(tiny_options().partition_bits).0;
        self.stamp = self.stamp.max(applied.timestamp);
        let last = self.sequences.entry(partition).or_default();
        *last = applied.dot.sequence.max(*last);
    }

    /// The winner as the shard will see it when all that is in its log has become visible.
    fn current(&self, key: &KeyName) -> Option<(&Effect, (Timestamp, Dot))> {
        let writes = self.model.writes_of(key);
        let winner =
            writes.filter(|write| write.fate != Fate::Refused).max_by_key(|write| write.version)?;
        Some((&winner.effect, winner.version))
    }
}

/// A shard, its disk, and its book.
pub struct Store {
    /// Drives everything.
    pub executor: SimExecutor,
    /// The disk of this life.
    pub disk: SimDisk,
    /// Writes that were refused because the disk is full.
    pub refused_for_space: u64,
    /// The book of all lives.
    pub book: Rc<RefCell<Book>>,
    options: Options,
    identity: Identity,
    chance: Chance,
    shard: Option<SimShard>,
    /// Writes that wait for their acknowledgement, with their places in the log.
    waiting: Vec<(usize, KeyName, Applied)>,
    /// Whether an operation may fail: then errors are accepted where they are clear.
    faulty: bool,
}

impl Store {
    /// A store on an empty disk, not yet open.
    #[must_use]
    pub fn new(seed: u64, disk: SimDisk, executor: SimExecutor, options: Options) -> Store {
        Store {
            executor,
            disk,
            refused_for_space: 0,
            book: Rc::default(),
            options,
            identity: identity(),
            chance: Chance::new(seed ^ 0x0057_07E5),
            shard: None,
            waiting: Vec::new(),
            faulty: false,
        }
    }

    /// The same store as a shard of another cluster.
    #[must_use]
    pub fn of_cluster(self, cluster: u128) -> Store {
        Store { identity: Identity { cluster, ..identity() }, ..self }
    }

    /// From now on operations may fail.
    pub fn expect_faults(&mut self) {
        self.faulty = true;
    }

    /// From now on no operation may fail.
    pub fn expect_no_faults(&mut self) {
        self.faulty = false;
    }

    /// The open shard.
    ///
    /// # Panics
    /// When it is not open.
    #[must_use]
    pub fn shard(&self) -> SimShard {
        self.shard.clone().expect("the store is open")
    }

    /// Whether the shard is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.shard.is_some()
    }

    /// Milliseconds of the wall clock.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.executor.runtime().wall().as_millis()
    }

    /// Opens the shard. False when that failed and faults are expected.
    pub fn open(&mut self) -> bool {
        let (disk, runtime) = (self.disk.clone(), self.executor.runtime());
        let dir = dir();
        let opening = Shard::open(disk, runtime, &dir, &self.identity, self.options, None);
        let opened = self.executor.run(opening);
        match opened {
            Ok(shard) => self.shard = Some(shard),
            Err(error) => self.accept(&error, "open"),
        }
        self.shard.is_some()
    }

    /// Closes the shard cleanly and opens it again.
    pub fn reopen(&mut self) {
        self.settle();
        let shard = self.shard.take().expect("the store is open");
        let closed = self.executor.run(shard.close());
        if let Err(error) = closed {
            self.accept(&error, "close");
        }
        drop(shard);
        self.executor.kill_tasks();
        if self.open() && self.faulty {
            // The fate of writes that were told "perhaps" is known from now on.
            self.settle_survivors();
        }
    }

    /// Closes the shard cleanly.
    pub fn close(&mut self) {
        self.settle();
        let shard = self.shard.take().expect("the store is open");
        self.executor.run(shard.close()).unwrap();
        drop(shard);
        self.executor.kill_tasks();
    }

    /// Pulls the plug. What survived is settled by the next reading, see [`Store::settle_survivors`].
    pub fn crash(&mut self) {
        self.shard = None;
        self.waiting.clear();
        self.executor.kill_tasks();
        self.disk = self.disk.crash(self.chance.next_u64());
    }

    /// After a crash: finds the cut of the log that explains what is there. Panics if none does.
    pub fn settle_survivors(&mut self) {
        // Reading takes time; what expires meanwhile counts as there for both sides.
        let mut now_ms = self.now_ms();
        let mut seen = self.executor.run(contents(&self.shard(), now_ms));
        if let Err(error) = &seen {
            // It must be known what is there: the disk is mended before its time.
            self.accept(error, "a scan");
            self.disk.clear_faults();
            now_ms = self.now_ms();
            seen = self.executor.run(contents(&self.shard(), now_ms));
        }
        let seen = seen.unwrap();
        let settled = self.book.borrow_mut().settle(&seen, now_ms);
        settled.unwrap_or_else(|problem| panic!("{problem}"));
    }

    fn accept(&self, error: &Error, what: &str) {
        assert!(self.faulty, "{what} failed and nothing was broken: {error}");
    }

    /// Does one operation and holds the answer against the model.
    pub fn perform(&mut self, operation: &Operation) {
        match operation {
            Operation::Get(key) => self.get(key),
            Operation::Put { key, value, ttl_ms } => self.put(key, value, *ttl_ms),
            Operation::Delete(key) => self.write(key, None, 0, Condition::None),
            Operation::PutIfAbsent { key, value } => {
                self.write(key, Some(value), 0, Condition::Absent);
            }
            Operation::PutIfVersion { key, value, back } => {
                let version = {
                    let book = self.book.borrow();
                    let mut versions: Vec<_> =
                        book.model.writes_of(key).map(|write| write.version).collect();
                    versions.sort_unstable();
                    versions.iter().rev().nth(*back).copied()
                };
                if let Some((timestamp, dot)) = version {
                    self.write(key, Some(value), 0, Condition::Version(timestamp, dot));
                }
            }
            Operation::Scan => self.check_all(),
            Operation::Flush => self.flush(),
            Operation::Compact => self.executor.run_for_nanos(6_000_000_000),
            Operation::Wait(ms) => self.executor.run_for_nanos(ms * 1_000_000),
            Operation::Reopen => self.reopen(),
        }
        // Some writes wait together, some alone.
        if self.waiting.len() > 8 || self.chance.one_in(3) {
            self.settle();
        }
    }

    fn put(&mut self, key: &KeyName, value: &[u8], ttl_ms: u64) {
        // A sibling's expiry is its own; the model of siblings does without.
        let mortal = ttl_ms > 0 && key.0 != SIBLINGS;
        let expiry_ms = if mortal { self.now_ms() + ttl_ms } else { 0 };
        self.write(key, Some(value), expiry_ms, Condition::None);
    }

    fn write(&mut self, key: &KeyName, value: Option<&[u8]>, expiry_ms: u64, condition: Condition) {
        let has_siblings = key.0 == SIBLINGS;
        let read = if has_siblings && self.chance.one_in(2) {
            let book = self.book.borrow();
            let reads = book.reads.get(key).cloned().unwrap_or_default();
            (!reads.is_empty()).then(|| reads[self.chance.index(reads.len())].clone())
        } else {
            None
        };
        let mutation = Mutation {
            token: token_of(key),
            namespace: key.0,
            merge: if has_siblings { Merge::Siblings } else { Merge::LastWriteWins },
            key: &key.1,
            value: value.map(Into::into),
            expiry_ms,
            context: read.as_ref().map(|read| &read.context),
            condition,
        };
        let (shard, runtime) = (self.shard(), self.executor.runtime());
        let before_ms = self.now_ms();
        let outcome = if SimShard::needs_read(&mutation) {
            self.executor.run(shard.apply_after_read(&mutation))
        } else {
            shard.apply(&mutation, runtime.wall()).map(Outcome::Applied)
        };
        let after_ms = self.now_ms();
        self.check_condition(key, condition, &outcome, before_ms, after_ms);
        let applied = match outcome {
            Ok(Outcome::Applied(applied)) => applied,
            Ok(Outcome::ConditionFalse(_)) => return,
            Err(Error::Busy { .. }) => return self.settle(),
            Err(Error::Full { .. }) => {
                self.refused_for_space += 1;
                return self.settle();
            }
            Err(Error::TooManySiblings(_)) if has_siblings => return,
            Err(error) => return self.accept(&error, "a write"),
        };
        let mut book = self.book.borrow_mut();
        book.note_version(key, &applied);
        let effect = if has_siblings {
            book.sibling_effect(key, value, read.as_ref())
        } else {
            match value {
                Some(value) => Effect::Put { value: value.to_vec(), expiry_ms },
                None => Effect::Delete,
            }
        };
        let index = book.model.begin(key.clone(), effect, (applied.timestamp, applied.dot));
        drop(book);
        self.waiting.push((index, key.clone(), applied));
    }

    fn check_condition(
        &self,
        key: &KeyName,
        condition: Condition,
        outcome: &Result<Outcome>,
        before_ms: u64,
        after_ms: u64,
    ) {
        let book = self.book.borrow();
        let version_at = |now_ms| {
            let (effect, version) = book.current(key)?;
            effect.value_at(now_ms).map(|_| version)
        };
        let holds_at = |now_ms| match condition {
            Condition::None => true,
            Condition::Absent => version_at(now_ms).is_none(),
            // The version of a key with siblings is that of its newest live one.
            Condition::Version(timestamp, dot) => version_at(now_ms) == Some((timestamp, dot)),
        };
        if key.0 == SIBLINGS && matches!(condition, Condition::Version(..)) {
            return;
        }
        match outcome {
            Ok(Outcome::Applied(_)) => assert!(
                holds_at(before_ms) || holds_at(after_ms),
                "{}: written although {condition:?} is false",
                name(key)
            ),
            Ok(Outcome::ConditionFalse(_)) => assert!(
                !holds_at(before_ms) || !holds_at(after_ms),
                "{}: refused although {condition:?} holds",
                name(key)
            ),
            Err(_) => {}
        }
    }

    /// Waits until all writes are acknowledged, or told that they may not be.
    pub fn settle(&mut self) {
        let Some(shard) = self.shard.clone() else { return };
        for (index, key, applied) in std::mem::take(&mut self.waiting) {
            match self.executor.run(shard.wait_visible(applied.lsn)) {
                Ok(()) => {
                    let mut book = self.book.borrow_mut();
                    book.model.acknowledge(index);
                    book.note_durable(&key, &applied);
                }
                Err(error) => self.accept(&error, "an acknowledgement"),
            }
        }
    }

    fn get(&mut self, key: &KeyName) {
        let (token, before_ms) = (token_of(key), self.now_ms());
        let found = self.executor.run(self.shard().get(token, key.0, &key.1));
        let after_ms = self.now_ms();
        let record = match found {
            Ok(record) => record,
            Err(error) => return self.accept(&error, "a read"),
        };
        let read_at =
            |now_ms: u64| record.as_ref().and_then(|record| readable(&record.as_ref(), now_ms));
        let mut book = self.book.borrow_mut();
        let right = [before_ms, after_ms]
            .iter()
            .any(|now_ms| book.model.allows(key, read_at(*now_ms).as_deref(), *now_ms));
        assert!(right, "{}: a wrong read", name(key));
        if key.0 == SIBLINGS
            && let Some(record) = &record
        {
            let state = KeyState::of_record(&record.as_ref()).unwrap();
            // With open writes it is not known what was seen.
            let settled = book.model.writes_of(key).all(|write| write.fate != Fate::Open);
            if settled {
                let seen = book.siblings.get(key).map(SiblingModel::context).unwrap_or_default();
                let read = Read { context: state.context(), seen };
                book.reads.entry(key.clone()).or_default().push(read);
            }
        }
    }

    fn flush(&mut self) {
        if let Err(error) = self.executor.run(self.shard().flush()) {
            self.accept(&error, "a flush");
        }
    }

    /// Reads everything in all ways there are: a scan, paged scans, each key.
    pub fn check_all(&mut self) {
        self.settle();
        let before_ms = self.now_ms();
        let whole = self.executor.run(contents(&self.shard(), before_ms));
        self.check_contents(whole, before_ms, None);
        for namespace in 1..=3 {
            let namespace = annulus_engine::model::NamespaceId(namespace);
            let before_ms = self.now_ms();
            let page = 1 + self.chance.index(30);
            let paged = self.executor.run(pages(&self.shard(), namespace, page, before_ms));
            self.check_contents(paged, before_ms, Some(namespace));
        }
        let keys: Vec<KeyName> = self.book.borrow().model.keys().cloned().collect();
        for key in keys {
            self.get(&key);
        }
    }

    fn check_contents(
        &self,
        seen: Result<Contents>,
        before_ms: u64,
        namespace: Option<annulus_engine::model::NamespaceId>,
    ) {
        let seen = match seen {
            Ok(seen) => seen,
            Err(error) => return self.accept(&error, "a scan"),
        };
        // What expired meanwhile may be in the answer or not.
        let after_ms = self.now_ms();
        let book = self.book.borrow();
        for key in book.model.keys().filter(|key| namespace.is_none_or(|wanted| wanted == key.0)) {
            let value = seen.get(key).map(Vec::as_slice);
            let right =
                book.model.allows(key, value, before_ms) || book.model.allows(key, value, after_ms);
            assert!(right, "{}: a wrong scan, {} bytes", name(key), value.map_or(0, <[u8]>::len));
        }
        for key in seen.keys() {
            assert!(book.model.writes_of(key).count() > 0, "{}: from nowhere", name(key));
        }
    }

    /// After two starts and some rest no file is left that nothing refers to.
    pub fn check_no_leak(&mut self) {
        for _ in 0..2 {
            self.reopen();
            self.executor.run_for_nanos(8_000_000_000);
        }
        check_files(&self.disk, &self.shard());
    }
}

impl Book {
    fn sibling_effect(
        &mut self,
        key: &KeyName,
        value: Option<&[u8]>,
        read: Option<&Read>,
    ) -> Effect {
        let id = self.model.writes().len();
        let siblings = self.siblings.entry(key.clone()).or_default();
        let seen = match (read, value) {
            (Some(read), _) => read.seen.clone(),
            // A delete without context deletes what is there.
            (None, None) => siblings.context(),
            (None, Some(_)) => BTreeSet::new(),
        };
        siblings.write(id, value.map(<[u8]>::to_vec), &seen);
        match join(siblings.siblings()) {
            Some(value) => Effect::Put { value, expiry_ms: 0 },
            None => Effect::Delete,
        }
    }

    /// Finds the cut that explains what a crash left; see [`Model::settle_after_crash`].
    ///
    /// # Errors
    /// What is wrong.
    pub fn settle(&mut self, seen: &Contents, now_ms: u64) -> std::result::Result<usize, String> {
        let cut = self.model.settle_after_crash(seen, now_ms)?;
        for siblings in self.siblings.values_mut() {
            siblings.forget_from(cut);
        }
        for reads in self.reads.values_mut() {
            reads.retain(|read| read.seen.iter().all(|event| *event < cut));
        }
        Ok(cut)
    }
}
