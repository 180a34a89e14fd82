//! Stories of one shard: random operations, crashes at each change of the disk, failing disks.
//!
//! Invariant checked, after whatever happened: every acknowledged write is there, nothing is
//! there that was never written or was replaced, what a crash cost is a suffix of the log,
//! versions only grow, opening twice gives the same, and no file is left over.

#![expect(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use annulus_engine::Error;
use annulus_engine::disk::Disk;
use annulus_engine::log::format::{BatchHeader, SEGMENT_HEADER_SIZE, SegmentHeader};
use annulus_engine::model::NamespaceId;
use annulus_engine::options::{Options, SpaceOptions};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Condition, Merge, Mutation};
use annulus_engine::sim::{Chance, Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor};

use crate::faults::Damage;
use crate::model::name;
use crate::reading::{check_files, contents, read};
use crate::store::{Book, Store, open, tiny_options};
use crate::workload::{Mix, Operation, Workload, token_of};

pub(crate) fn new_store(seed: u64) -> Store {
    new_store_with(seed, tiny_options())
}

fn new_store_with(seed: u64, options: Options) -> Store {
    let executor = SimExecutor::new(seed);
    let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(seed));
    // The node's directory is there, and locked, before its shards are opened.
    executor.run(async {
        disk.create_dir(Path::new("data")).await.unwrap();
        disk.sync_dir(Path::new("")).await.unwrap();
    });
    Store::new(seed, disk, executor, options)
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
    let mut store = new_store(story.seed);
    let images = watch_crashes(&store, story);
    assert!(store.open());
    for operation in Workload::new(story.seed, story.mix).take(story.operations) {
        store.perform(&operation);
    }
    store.check_all();
    store.disk.observe(|_| {});
    images.get()
}

/// From now on looks at what a crash would leave at changes of the store's disk.
pub(crate) fn watch_crashes(store: &Store, story: CrashStory) -> Rc<Cell<Images>> {
    let CrashStory { seed, image_one_in, survivors, .. } = story;
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
    images
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
            // Not `assert_eq`, which would print every byte of both.
            Some(seen) => assert!(*seen == found, "the second start shows something else"),
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
        // A replay may leave memory full; the flush that makes room is under way.
        let applied = loop {
            match shard.apply(&mutation, runtime.wall()) {
                Err(Error::Busy { .. }) => executor.run_for_nanos(10_000_000),
                other => break other.unwrap(),
            }
        };
        book.note_version(&key, &applied);
        executor.run(shard.wait_visible(applied.lsn)).unwrap();
        book.note_durable(&key, &applied);
        let done = executor.run(contents(&shard, now_ms)).unwrap();
        assert!(found == done, "a delete of what is not there changed something");
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

/// T18: the disk fills up, and space returns. Writes are refused, reads go on, nothing is lost,
/// and no restart is needed.
pub fn tell_full(seed: u64, space: SpaceOptions) {
    let capacity = 900 << 10;
    let options = Options { space, ..tiny_options() };
    let mut store = new_store_with(seed, options);
    store.disk.set_capacity(capacity);
    assert!(store.open());
    let mix = Mix {
        key_count: 2_000,
        value_size_max: 2_000,
        weights: [10, 60, 3, 1, 1, 0, 0, 0, 2, 0],
        ttl_one_in: 0,
        ..Mix::default()
    };
    for operation in Workload::new(seed, mix).take(4_000) {
        store.perform(&operation);
        if store.refused_for_space > 20 {
            break;
        }
    }
    assert!(store.refused_for_space > 0, "the disk never got full");
    store.settle();
    assert!(store.shard().poisoned().is_none(), "{:?}", store.shard().poisoned());
    store.check_all();
    // Space returns: everything goes on by itself.
    store.disk.set_capacity(capacity * 8);
    store.executor.run_for_nanos(5_000_000_000);
    let refused = store.refused_for_space;
    for operation in Workload::new(seed + 1, mix).take(300) {
        store.perform(&operation);
    }
    assert_eq!(store.refused_for_space, refused, "space has returned, writes have not");
    store.perform(&Operation::Flush);
    store.perform(&Operation::Compact);
    store.check_all();
    store.crash();
    assert!(store.open());
    store.settle_survivors();
    store.check_all();
    store.check_no_leak();
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

/// What a damaged store did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdicts {
    /// Damages done.
    pub struck: u64,
    /// The start was refused, with a clear error.
    pub refused: u64,
    /// It started, and some answers were clear errors.
    pub partial: u64,
    /// It started, and every answer was right.
    pub whole: u64,
}

/// Strikes each file of a store that was closed cleanly with each damage, one at a time, and
/// reads everything. Panics at a wrong answer, also at "absent" for what is there.
pub fn tell_damage(seed: u64, flips_per_file: u64, wanted: impl Fn(&Path) -> bool) -> Verdicts {
    let (disk, book, executor) = closed_store(seed, 7);
    let mut verdicts = Verdicts::default();
    for (path, len) in disk.files().into_iter().filter(|(path, _)| wanted(path)) {
        for damage in Damage::all(len, (len * 8 / flips_per_file).max(1)) {
            // Without the last segment the log looks as it did before that was begun, and nothing
            // in the other files says otherwise: the one damage that is not met.
            if damage == Damage::Remove && last_segment(&disk).as_ref() == Some(&path) {
                continue;
            }
            let image = disk.fork_onto(&executor.runtime());
            if damage.strike(&image, &path) {
                let what = format!("seed {seed}: {damage:?} of {}", path.display());
                // A page is more than one batch: the mark that proves the last ones may go with
                // them, and then they cannot be told from writes that a crash interrupted.
                let in_log = path.extension().is_some_and(|e| e == "log");
                let mut book = book.clone();
                if in_log && matches!(damage, Damage::ZeroPage(_)) {
                    book.expect_cut(&image, &executor);
                }
                judge(&image, &executor, &book, &path, &what, &mut verdicts);
            }
        }
    }
    verdicts
}

/// Puts files in each other's places, and files of another shard in.
pub fn tell_foreign(seed: u64) -> Verdicts {
    let (disk, book, executor) = closed_store(seed, 7);
    let (other, _, _) = closed_store(seed + 1, 8);
    let mut verdicts = Verdicts::default();
    let files = disk.files();
    let kind = |path: &Path| (path.parent().map(Path::to_owned), path.extension().is_some());
    for (path, _) in &files {
        let alike = files.iter().filter(|(it, _)| it != path && kind(it) == kind(path));
        let own = alike.filter_map(|(it, _)| Some((it.clone(), disk.read_file(it)?)));
        let foreign = other.read_file(path).map(|bytes| (path.clone(), bytes));
        for (from, bytes) in own.chain(foreign) {
            let image = disk.fork_onto(&executor.runtime());
            image.write_file(path, &bytes);
            if image.read_file(path) != disk.read_file(path) {
                let what = format!("{} in place of {}", from.display(), path.display());
                judge(&image, &executor, &book, path, &what, &mut verdicts);
            }
        }
    }
    verdicts
}

impl Book {
    /// Takes a suffix of the log for lost, if that explains what a start finds.
    fn expect_cut(&mut self, image: &SimDisk, executor: &SimExecutor) {
        let (runtime, now_ms) = (executor.runtime(), executor.runtime().wall().as_millis());
        let image = image.fork_onto(&runtime);
        if let Ok(shard) = executor.run(open(&image, &runtime, tiny_options()))
            && let Ok(seen) = executor.run(contents(&shard, now_ms))
        {
            let _ = self.model.settle_from(0, &seen, now_ms);
        }
        executor.kill_tasks();
    }
}

/// The log segment that was written to last.
fn last_segment(disk: &SimDisk) -> Option<PathBuf> {
    let written = |path: &PathBuf| {
        let bytes = disk.read_file(path)?;
        let header = SegmentHeader::decode(&bytes).ok()?;
        let salt = header.identity().segment_salt(header.segment_id, header.life);
        let start = SEGMENT_HEADER_SIZE;
        let offset = u64::try_from(start).unwrap();
        BatchHeader::decode(&bytes[start..], salt, offset).ok()
    };
    let files = disk.files().into_iter().map(|(path, _)| path);
    let mut segments = files.filter(|path| path.extension().is_some_and(|e| e == "log"));
    segments.rfind(|path| written(path).is_some())
}

/// A store with tables of both levels, a manifest with edits and a log, closed cleanly.
fn closed_store(seed: u64, cluster: u128) -> (SimDisk, Book, SimExecutor) {
    let mut store = new_store(seed).of_cluster(cluster);
    assert!(store.open());
    let mix = Mix { value_size_max: 150, large_value: 3_000, ttl_one_in: 0, ..Mix::script() };
    let mut workload = Workload::new(seed, mix);
    for part in 0..4 {
        for operation in workload.by_ref().take(60) {
            store.perform(&operation);
        }
        match part {
            0 => {
                store.perform(&Operation::Flush);
                store.perform(&Operation::Compact);
            }
            1 | 2 => store.perform(&Operation::Flush),
            _ => {}
        }
    }
    store.settle();
    store.close();
    let book = store.book.borrow().clone();
    (store.disk.clone(), book, store.executor)
}

fn judge(
    image: &SimDisk,
    executor: &SimExecutor,
    book: &Book,
    path: &Path,
    what: &str,
    verdicts: &mut Verdicts,
) {
    verdicts.struck += 1;
    let runtime = executor.runtime();
    let now_ms = runtime.wall().as_millis();
    let shard = match executor.run(open(image, &runtime, tiny_options())) {
        Ok(shard) => shard,
        Err(error) => {
            assert_clear(&error, path, what);
            verdicts.refused += 1;
            return;
        }
    };
    let mut errors = 0;
    let keys: Vec<_> = book.model.keys().cloned().collect();
    for key in keys {
        match executor.run(read(&shard, &key, now_ms)) {
            Ok(value) => assert!(
                book.model.allows(&key, value.as_deref(), now_ms),
                "{what}: {} reads as {:?} bytes",
                name(&key),
                value.map(|value| value.len())
            ),
            Err(error) => {
                assert_clear(&error, path, what);
                errors += 1;
            }
        }
    }
    match executor.run(contents(&shard, now_ms)) {
        Ok(seen) => assert!(seen == book.model.contents(now_ms), "{what}: a wrong scan"),
        Err(error) => assert_clear(&error, path, what),
    }
    if errors > 0 {
        verdicts.partial += 1
    } else {
        verdicts.whole += 1
    }
    drop(shard);
    executor.kill_tasks();
}

/// An error about damage names the file, or for a missing one at least its directory.
fn assert_clear(error: &Error, path: &Path, what: &str) {
    let told = error.to_string();
    let dir = path.parent().unwrap().to_str().unwrap();
    assert!(told.contains(dir), "{what}: this does not say where: {told}");
    assert!(
        matches!(error, Error::Corrupt { .. } | Error::Mismatch { .. } | Error::Io { .. }),
        "{what}: {told}"
    );
}
