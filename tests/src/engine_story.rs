//! Stories of one shard: random operations, crashes at each change of the disk, failing disks.
//!
//! Invariant checked, after whatever happened: every acknowledged write is there, nothing is
//! there that was never written or was replaced, what a crash cost is a suffix of the log,
//! versions only grow, opening twice gives the same, and no file is left over.

#![expect(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use annulus_engine::disk::Disk;
use annulus_engine::model::NamespaceId;
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Condition, Merge, Mutation};
use annulus_engine::sim::{Chance, Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor};

use crate::store::{Book, Store, check_files, contents, open, tiny_options};
use crate::workload::{Mix, Workload, token_of};

fn new_store(seed: u64) -> Store {
    let executor = SimExecutor::new(seed);
    let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(seed));
    // The node's directory is there, and locked, before its shards are opened.
    executor.run(async {
        disk.create_dir(Path::new("data")).await.unwrap();
        disk.sync_dir(Path::new("")).await.unwrap();
    });
    Store::new(seed, disk, executor, tiny_options())
}

/// Random operations, each answer held against the model; nothing breaks.
pub fn tell_model(seed: u64, operations: usize, mix: Mix) {
    let mut store = new_store(seed);
    assert!(store.open());
    for operation in Workload::new(seed, mix).take(operations) {
        store.perform(&operation);
    }
    store.check_all();
    store.reopen();
    store.check_all();
    store.check_no_leak();
    store.check_all();
}

/// A crash story.
#[derive(Clone, Copy, Debug)]
pub struct CrashStory {
    /// Everything follows from it.
    pub seed: u64,
    /// Operations in the script.
    pub operations: usize,
    /// One in so many changes of the disk is looked at.
    pub image_one_in: u64,
    /// Ways of surviving that are tried for each.
    pub survivors: u64,
    /// The operations.
    pub mix: Mix,
}

/// What became of the images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Images {
    /// Changes of the disk looked at, times survivors.
    pub checked: u64,
    /// Of these, how many cost writes that were not acknowledged.
    pub cut: u64,
}

/// A script, with crashes at the changes of the disk. Panics when a promise is broken.
pub fn tell_crash(story: CrashStory) -> Images {
    let CrashStory { seed, operations, image_one_in, survivors, mix } = story;
    let mut store = new_store(seed);
    let (book, mut chance) = (store.book.clone(), Chance::new(seed ^ 0xC4A5));
    let images = Rc::new(Cell::new(Images::default()));
    let (counted, wall) = (images.clone(), store.executor.runtime());
    store.disk.observe(move |disk| {
        if !chance.one_in(image_one_in) {
            return;
        }
        for _ in 0..survivors {
            let seed = chance.next_u64();
            let executor = SimExecutor::new(seed);
            // The wall clock goes on where it was.
            executor.runtime().advance_nanos(wall.now().0);
            let image = disk.image_onto(&executor.runtime(), seed);
            let cut = check_image(&image, executor, &book, seed);
            let mut images = counted.get();
            images.checked += 1;
            images.cut += u64::from(cut);
            counted.set(images);
        }
    });
    assert!(store.open());
    for operation in Workload::new(seed, mix).take(operations) {
        store.perform(&operation);
    }
    store.check_all();
    store.disk.observe(|_| {});
    images.get()
}

/// Opens an image and checks it; crashes once more while opening, by chance; opens again.
/// Whether writes were cut off.
fn check_image(
    image: &SimDisk,
    executor: SimExecutor,
    book: &Rc<RefCell<Book>>,
    seed: u64,
) -> bool {
    let mut chance = Chance::new(seed);
    let mut image = image.clone();
    let mut book = book.borrow().clone();
    let total = book.model.writes().len();
    let runtime = executor.runtime();
    // Power fails again while it starts, up to three times.
    for _ in 0..chance.below(4) {
        image.cut_power_at(image.op_count() + chance.between(1, 60));
        let opened = executor.try_run(open(&image, &runtime, tiny_options()));
        if let Ok(opened) = &opened {
            let error = opened.as_ref().err();
            assert!(error.is_none(), "a crash is no damage: {}", error.unwrap());
        }
        drop(opened);
        executor.kill_tasks();
        image = image.crash(chance.next_u64());
    }
    let mut seen = None;
    let mut cut = total;
    for round in 0..2 {
        let shard = executor
            .run(open(&image, &runtime, tiny_options()))
            .unwrap_or_else(|error| panic!("start {round}: a crash is no damage: {error}"));
        let now_ms = runtime.wall().as_millis();
        let found = executor.run(contents(&shard, now_ms)).unwrap();
        match &seen {
            None => {
                cut = book.settle(&found, now_ms).unwrap_or_else(|problem| panic!("{problem}"));
            }
            Some(seen) => assert_eq!(seen, &found, "the second start shows something else"),
        }
        // What is written now has a version above all that were ever given out.
        let key = (NamespaceId(1), format!("after-{round}").into_bytes());
        let mutation = Mutation {
            token: token_of(&key),
            namespace: key.0,
            merge: Merge::LastWriteWins,
            key: &key.1,
            value: None,
            expiry_ms: 0,
            context: None,
            condition: Condition::None,
        };
        let applied = shard.apply(&mutation, runtime.wall()).unwrap();
        book.note_version(&key, &applied);
        executor.run(shard.wait_visible(applied.lsn)).unwrap();
        book.note_durable(&key, &applied);
        let done = executor.run(contents(&shard, now_ms)).unwrap();
        assert_eq!(found, done, "a delete of what is not there changed something");
        seen = Some(found);
        if round == 1 {
            executor.run_for_nanos(8_000_000_000);
            check_files(&image, &shard);
        }
        drop(shard);
        executor.kill_tasks();
        image = image.crash(chance.next_u64());
    }
    cut < total
}

/// Several lives on a disk that fails now and then.
pub fn tell_faults(seed: u64, operations: usize, mix: Mix, rules: &[Rule]) {
    let mut store = new_store(seed);
    assert!(store.open());
    let mut workload = Workload::new(seed, mix);
    for operation in workload.by_ref().take(operations / 3) {
        store.perform(&operation);
    }
    store.settle();
    store.expect_faults();
    rules.iter().for_each(|rule| store.disk.inject(rule.clone()));
    for operation in workload.take(operations - operations / 3) {
        if !store.is_open() {
            break;
        }
        store.perform(&operation);
    }
    store.settle();
    store.disk.clear_faults();
    store.expect_no_faults();
    store.crash();
    assert!(store.open());
    store.settle_survivors();
    store.check_all();
    store.check_no_leak();
    store.check_all();
}

/// Every kind of failure at the `nth` operation of each kind, from the second third on.
#[must_use]
pub fn single_faults(nth: u64) -> Vec<Rule> {
    let kinds = [
        Op::Open,
        Op::Rename,
        Op::Remove,
        Op::SyncDir,
        Op::Read,
        Op::Write,
        Op::Sync,
        Op::Len,
        Op::SetLen,
        Op::Punch,
        Op::Link,
        Op::List,
        Op::Space,
        Op::CreateDir,
    ];
    let with = |fault| kinds.map(|op| Rule::nth(op, nth, fault));
    with(Fault::Eio).into_iter().chain(with(Fault::NoSpace)).collect()
}
