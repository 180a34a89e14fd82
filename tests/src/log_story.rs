//! The commit log alone, over several lives, with a crash at each change of the disk.
//!
//! Invariant checked: what replay finds is a prefix of what was appended, reaches at least to
//! what was acknowledged, and is the same when it is read again, also when the power goes once
//! more while the log begins its next life. Pure crashes are never called damage.

#![expect(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use annulus_engine::Result;
use annulus_engine::disk::Disk;
use annulus_engine::log::{CommitLog, Control, LogIdentity, Lsn, ReplayEnd, ReplayItem, replay};
use annulus_engine::model::{Dot, Kind, NamespaceId, RecordRef, Timestamp, Token};
use annulus_engine::options::{Durability, LogOptions};
use annulus_engine::runtime::Runtime;
use annulus_engine::sim::{
    Chance, Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor, SimRuntime,
};

const IDENTITY: LogIdentity = LogIdentity { cluster: 9, shard: 2 };

fn dir() -> PathBuf {
    PathBuf::from("shard/log")
}

fn options(periodic: bool) -> LogOptions {
    let durability =
        if periodic { Durability::Periodic { window_ms: 40 } } else { Durability::Sync };
    LogOptions {
        durability,
        segment_size: 64 << 10,
        batch_size: 4096,
        overlap_size: 512,
        segments_free_max: 2,
        quiet_mark_ms: 50,
        ..LogOptions::default()
    }
}

/// What is known of the log from outside.
#[derive(Default)]
struct Known {
    /// Value of each record appended in the present state of the log; `None` for a control.
    appended: RefCell<BTreeMap<u64, Option<Vec<u8>>>>,
    /// Greatest LSN that must survive.
    acknowledged: Cell<u64>,
    /// Greatest LSN that tables hold.
    released: Cell<u64>,
    periodic: bool,
}

type Log = CommitLog<SimDisk, SimRuntime>;

/// Reads the log. Panics if it is not what was appended.
async fn read(disk: &SimDisk, known: &Known) -> Result<ReplayEnd> {
    let from = Lsn(known.released.get() + 1);
    let mut next = None;
    let end = replay(disk, &dir(), IDENTITY, from, &mut |lsn, item| {
        assert_eq!(lsn.0, next.unwrap_or(lsn.0), "a hole");
        next = Some(lsn.0 + 1);
        match item {
            ReplayItem::Record(record) => {
                let appended = known.appended.borrow();
                let expected = appended.get(&lsn.0).unwrap_or_else(|| panic!("{lsn:?} is new"));
                assert_eq!(
                    Some(record.value),
                    expected.as_deref().map(Into::into),
                    "{lsn:?} has another value"
                );
                assert_eq!(record.dot.sequence, lsn.0);
            }
            ReplayItem::Control(Control::Close) => {}
            ReplayItem::Control(_) => assert_eq!(known.appended.borrow()[&lsn.0], None),
        }
    })
    .await?;
    if let Some(next) = next {
        assert_eq!(end.last.0, next - 1);
    }
    assert!(
        end.last.0.max(known.released.get()) >= known.acknowledged.get(),
        "acknowledged {} but found {}",
        known.acknowledged.get(),
        end.last.0
    );
    Ok(end)
}

async fn start(disk: &SimDisk, runtime: &SimRuntime, end: ReplayEnd, o: LogOptions) -> Result<Log> {
    let last = Cell::new(end.next.0 - 1);
    let sink = move |lsn: Lsn, _: &ReplayItem<'_>| {
        assert!(lsn.0 > last.get(), "the sink goes back");
        last.set(lsn.0);
    };
    CommitLog::start(disk.clone(), runtime.clone(), dir(), o, end, Box::new(sink)).await
}

fn append(log: &Log, known: &Known, value: Vec<u8>) -> Result<Lsn> {
    let next = log.appended().0 + 1;
    let record = RecordRef {
        token: Token(next),
        namespace: NamespaceId(1),
        incarnation: 1,
        kind: Kind::Put,
        dot: Dot { sequence: next, ..Dot::default() },
        timestamp: Timestamp(next),
        expiry_ms: 0,
        key: b"key",
        value: (&value).into(),
    };
    // Before the append: in `Periodic` mode the record may be on its way at once.
    known.appended.borrow_mut().insert(next, Some(value.clone()));
    let appended = log.append(&record);
    match &appended {
        Ok(lsn) => assert_eq!(lsn.0, next),
        Err(_) => drop(known.appended.borrow_mut().remove(&next)),
    }
    appended
}

/// One life: appends, waits and releases in a random order.
async fn live(log: &Log, runtime: &SimRuntime, known: &Rc<Known>, chance: &mut Chance, steps: u64) {
    for _ in 0..steps {
        match chance.below(12) {
            0 => {
                let _ = log.wait_visible(log.appended()).await;
            }
            1 => {
                runtime.sleep_until(runtime.now().after_nanos(chance.below(100_000_000))).await;
            }
            2 if chance.one_in(3) => {
                // Tables hold only what is durable, or the log would have a hole after a crash.
                let up_to = log.visible().0.min(known.acknowledged.get());
                known.released.set(up_to.max(known.released.get()));
                log.release(Lsn(known.released.get()));
            }
            3 if chance.one_in(3) => {
                let next = log.appended().0 + 1;
                known.appended.borrow_mut().insert(next, None);
                let ceiling = Control::Ceiling { timestamp: Timestamp(1), sequence: 2 };
                if log.append_control(ceiling).is_err() {
                    known.appended.borrow_mut().remove(&next);
                }
            }
            4 => runtime.yield_now().await,
            _ => {
                let len = if chance.one_in(20) { 20_000 } else { chance.index(900) };
                let mut value = vec![0; len];
                chance.fill(&mut value);
                if append(log, known, value).is_err() {
                    runtime.sleep_until(runtime.now().after_nanos(1_000_000)).await;
                }
            }
        }
        let reached = if known.periodic { log.durable() } else { log.visible() };
        known.acknowledged.set(known.acknowledged.get().max(reached.0));
    }
}

/// Checks an image: read twice, begun again, crashed while beginning, read again.
fn check_image(image: &SimDisk, executor: &SimExecutor, known: &Known, seed: u64) {
    let mut image = image.clone();
    let mut chance = Chance::new(seed);
    let mut last = None;
    for round in 0..3 {
        let end = executor
            .run(read(&image, known))
            .unwrap_or_else(|error| panic!("round {round}: a crash is no damage: {error}"));
        let found = end.last.0.max(known.released.get());
        if let Some(last) = last {
            assert_eq!(found, last, "what was found once stays found");
        }
        // From the second reading on, what was found has been made durable by the start.
        let cut = round == 0 && chance.one_in(2);
        if cut {
            image.cut_power_at(image.op_count() + chance.between(1, 30));
        }
        let started =
            executor.try_run(start(&image, &executor.runtime(), end, options(known.periodic)));
        if let Ok(log) = started {
            let log = log.unwrap();
            let runtime = executor.runtime();
            let pause = runtime.sleep_until(runtime.now().after_nanos(1_000_000));
            let _ = executor.try_run(pause);
            drop(log);
            last = Some(found);
        }
        executor.kill_tasks();
        image = image.crash_onto(&executor.runtime(), chance.next_u64());
    }
}

/// Four lives of a log.
#[derive(Clone, Copy, Debug)]
pub struct LogStory {
    /// Everything follows from it.
    pub seed: u64,
    /// Steps in each life.
    pub steps: u64,
    /// One in so many changes of the disk is looked at with crashes.
    pub image_one_in: u64,
    /// Whether one operation a life fails.
    pub faults: bool,
    /// Whether the log acknowledges before it is on the disk; then only syncs count.
    pub periodic: bool,
}

/// Tells the story. Panics when a promise is broken.
pub fn tell(story: LogStory) {
    let LogStory { seed, steps, image_one_in, faults, periodic } = story;
    let executor = SimExecutor::new(seed);
    let runtime = executor.runtime();
    let mut chance = Chance::new(seed ^ 0x10C);
    let known = Rc::new(Known { periodic, ..Known::default() });
    let mut disk = SimDisk::new(&runtime, SimDiskOptions::seeded(seed));
    executor.run(async {
        disk.create_dir(Path::new("shard")).await.unwrap();
        disk.sync_dir(Path::new("")).await.unwrap();
    });
    for life in 0..4 {
        let observed = known.clone();
        let mut image_chance = chance.fork();
        let images = SimExecutor::new(chance.next_u64());
        disk.observe(move |disk| {
            if image_chance.one_in(image_one_in) {
                let seed = image_chance.next_u64();
                let image = disk.image_onto(&images.runtime(), seed);
                check_image(&image, &images, &observed, seed);
            }
        });
        let mut life_chance = chance.fork();
        if faults && life > 0 {
            let op = [Op::Write, Op::Sync, Op::SyncDir, Op::Rename, Op::Open][chance.index(5)];
            let fault = if chance.one_in(2) { Fault::Eio } else { Fault::NoSpace };
            disk.inject(Rule::nth(op, chance.between(1, 12), fault));
        }
        executor.run(async {
            let end = match read(&disk, &known).await {
                Ok(end) => end,
                Err(error) => {
                    assert!(faults, "life {life}: a crash is no damage: {error}");
                    return;
                }
            };
            // What was not found is void, and its numbers are given out again.
            let last = end.last.0;
            known.appended.borrow_mut().retain(|lsn, _| *lsn <= last);
            let Ok(log) = start(&disk, &runtime, end, options(periodic)).await else {
                assert!(faults, "nothing failed but the log did not start");
                return;
            };
            known.acknowledged.set(known.acknowledged.get().max(last));
            live(&log, &runtime, &known, &mut life_chance, steps).await;
            if life_chance.one_in(3) && log.close().await.is_ok() {
                known.acknowledged.set(log.visible().0.max(known.acknowledged.get()));
            }
        });
        executor.kill_tasks();
        disk = disk.crash(chance.next_u64());
    }
    executor.run(read(&disk, &known)).unwrap();
}
