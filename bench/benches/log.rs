//! Group commit on the real disk: durable appends of concurrent writers, alone and beside a shard
//! that is busy with other work. Files go to `TMPDIR`.

mod common;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use annulus_engine::driver::{RingDisk, ShardRuntime, ThreadOptions, drive, start_shard};
use annulus_engine::log::{CommitLog, LogIdentity, Lsn, ReplayEnd, ReplayItem, replay};
use annulus_engine::model::Timestamp;
use annulus_engine::options::LogOptions;
use annulus_engine::runtime::{Class, Runtime};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const VALUE_SIZE: usize = 100;
const IDENTITY: LogIdentity = LogIdentity { cluster: 1, shard: 0 };
/// How long the busy shard computes before it lets others run, in nanoseconds.
const BUSY_NANOS: u64 = 100_000;

/// Computes in slices until told to stop, as reads and compaction would.
async fn be_busy(runtime: ShardRuntime, stop: Rc<Cell<bool>>) {
    while !stop.get() {
        let end = runtime.now().after_nanos(BUSY_NANOS);
        let mut x = 0;
        while runtime.now() < end {
            x = std::hint::black_box(annulus_bench::keys::mix(x));
        }
        runtime.yield_now().await;
    }
}

/// Time of `count` durable appends by `writers` tasks.
async fn append_all(
    log: CommitLog<RingDisk, ShardRuntime>,
    runtime: ShardRuntime,
    writers: u64,
    count: u64,
) -> Duration {
    let given = Rc::new(Cell::new(0));
    let running = Rc::new(Cell::new(writers));
    let begin = runtime.now();
    for _ in 0..writers {
        let (log, given, running) = (log.clone(), Rc::clone(&given), Rc::clone(&running));
        runtime.spawn(Class::Foreground, async move {
            while given.get() < count {
                let id = given.replace(given.get() + 1);
                let record = common::record(id, VALUE_SIZE);
                let lsn = log.append(&record.as_ref()).expect("few bytes wait");
                log.wait_visible(lsn).await.expect("the disk works");
            }
            running.set(running.get() - 1);
        });
    }
    while running.get() > 0 {
        runtime.sleep_until(runtime.now().after_nanos(20_000)).await;
    }
    Duration::from_nanos(runtime.now().nanos_since(begin))
}

/// One measurement in a shard's thread of its own; also the records that a replay finds.
fn measure(writers: u64, busy: bool, count: u64) -> (Duration, u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let dir: PathBuf = folder.path().join("log");
    let main = async move |runtime: ShardRuntime, disk: RingDisk| {
        let options = LogOptions { segment_size: 16 << 20, ..LogOptions::default() };
        let seen = Rc::new(RefCell::new(Timestamp::ZERO));
        let sink = Rc::clone(&seen);
        let log = CommitLog::start(
            disk.clone(),
            runtime.clone(),
            dir.clone(),
            options,
            ReplayEnd::fresh(IDENTITY, Lsn(1)),
            Box::new(move |_, item| {
                if let ReplayItem::Record(record) = item {
                    *sink.borrow_mut() = record.timestamp;
                }
            }),
        )
        .await
        .expect("a new log");
        let stop = Rc::new(Cell::new(!busy));
        if busy {
            let busy = be_busy(runtime.clone(), Rc::clone(&stop));
            runtime.spawn(Class::Background, busy);
        }
        let taken = append_all(log.clone(), runtime.clone(), writers, count).await;
        stop.set(true);
        log.close().await.expect("the disk works");
        let end = replay(&disk, &dir, IDENTITY, Lsn(1), &mut |_, _| {}).await;
        (taken, end.expect("a whole log").records)
    };
    let shard = start_shard(ThreadOptions::default(), move |ring, runtime| async move {
        let disk = RingDisk::new(&ring);
        drive(&ring, &runtime, main(runtime.clone(), disk)).await.expect("the loop runs")
    });
    let result = shard.expect("a thread").join().expect("no panic").expect("a ring");
    drop(folder);
    result
}

fn commits(c: &mut Criterion) {
    let mut group = c.benchmark_group("log");
    group.sample_size(10).throughput(Throughput::Elements(1));
    for (name, writers, busy) in [
        ("durable/1", 1, false),
        ("durable/16", 16, false),
        ("durable/128", 128, false),
        ("durable_busy_shard/1", 1, true),
        ("durable_busy_shard/16", 16, true),
    ] {
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| {
                // Fewer would leave writers without work.
                let count = iterations.max(8 * writers);
                let taken = measure(writers, busy, count).0;
                taken.mul_f64(iterations as f64 / count as f64)
            });
        });
    }
    group.finish();
    let mut fold = common::Fold::default();
    fold.add(measure(16, false, 1000).1);
    fold.print("log");
}

criterion_group!(name = benches; config = common::criterion(); targets = commits);
criterion_main!(benches);
