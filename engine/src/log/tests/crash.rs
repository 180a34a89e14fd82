//! Power cuts at every moment of a scripted life, and again during the recovery from them.
//!
//! The observer of the simulated disk is called before and after each change takes effect. Each
//! time the test looks at what one power cut would leave: each write that is not durable kept,
//! dropped or torn, each name in either state. Then it recovers, and checks against the model.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::*;

/// What the test knows of a log: which record has which number, and what was promised.
#[derive(Clone, Default)]
struct Model {
    appended: Rc<RefCell<BTreeMap<u64, Seen>>>,
    /// All records up to this one were acknowledged as durable.
    promised: Rc<Cell<u64>>,
    /// All records up to this one are in tables, as the manifest says.
    released: Rc<Cell<u64>>,
    closed: Rc<Cell<bool>>,
}

impl Model {
    fn append(&self, log: &Log, tag: u64, size: usize) -> Lsn {
        let lsn = log.append(&record(tag, size).as_ref()).unwrap();
        self.appended.borrow_mut().insert(lsn.0, Seen::Record(record(tag, size)));
        lsn
    }

    fn append_control(&self, log: &Log, control: Control<'static>) -> Lsn {
        let lsn = log.append_control(control).unwrap();
        self.appended.borrow_mut().insert(lsn.0, Seen::Control(control));
        lsn
    }

    /// Checks what replay found against the model, and makes the model that of the survivor.
    fn survive(&self, end: &ReplayEnd, seen: &[(Lsn, Seen)], context: &str) -> Model {
        let appended = self.appended.borrow();
        let mut next = self.released.get() + 1;
        for (lsn, seen) in seen {
            assert_eq!(lsn.0, next, "{context}: a hole or a repetition");
            match appended.get(&lsn.0) {
                Some(expected) => assert_eq!(seen, expected, "{context}: record {next}"),
                None => assert_eq!(*seen, Seen::Control(Control::Close), "{context}: {next}"),
            }
            next += 1;
        }
        assert!(
            next > self.promised.get(),
            "{context}: {} was acknowledged, replay ends before {next}",
            self.promised.get()
        );
        assert_eq!(end.next.0, next.max(end.next.0), "{context}");
        assert!(end.clean || !self.closed.get(), "{context}: closed, but not clean");
        let survivor = Model::default();
        let kept: BTreeMap<_, _> = seen.iter().map(|(lsn, seen)| (lsn.0, seen.clone())).collect();
        *survivor.appended.borrow_mut() = kept;
        // What a reader may have seen after the recovery must not vanish any more.
        survivor.promised.set(next - 1);
        survivor.released.set(self.released.get());
        survivor
    }
}

async fn start(
    disk: &SimDisk,
    runtime: &SimRuntime,
    options: LogOptions,
    end: ReplayEnd,
    model: &Model,
) -> Result<Log> {
    let promised = Rc::clone(&model.promised);
    let is_sync = options.durability == Durability::Sync;
    let sink: Sink = Box::new(move |lsn, _| {
        if is_sync {
            promised.set(lsn.0);
        }
    });
    CommitLog::start(disk.clone(), runtime.clone(), dir(), options, end, sink).await
}

/// One life of a log: appends of all sizes, rolls, releases, control records, and a close.
async fn script(
    disk: SimDisk,
    runtime: SimRuntime,
    options: LogOptions,
    model: Model,
    seed: u64,
    steps: u64,
) {
    let mut chance = Chance::new(seed);
    let end = read(&disk, Lsn(model.released.get() + 1)).await.unwrap().0;
    let log = start(&disk, &runtime, options, end, &model).await.unwrap();
    for step in 0..steps {
        match chance.below(12) {
            0 => {
                let lsn = model.append(&log, (seed << 20) + step, 6000);
                log.wait_visible(lsn).await.unwrap();
            }
            1 => {
                let sequence = chance.next_u64();
                model.append_control(
                    &log,
                    Control::Ceiling { timestamp: Timestamp(step), sequence },
                );
            }
            2 => {
                log.wait_durable(log.appended()).await.unwrap();
                model.promised.set(model.promised.get().max(log.durable().0));
            }
            3 => {
                let nanos = chance.between(0, 8_000_000);
                runtime.sleep_until(runtime.now().after_nanos(nanos)).await;
            }
            4 => {
                // Tables may only hold what was visible.
                let up_to = chance.between(model.released.get(), log.visible().0);
                model.released.set(up_to);
                log.release(Lsn(up_to));
            }
            5 if step % 5 == 0 => {
                model.append(&log, (seed << 20) + step, 20_000);
            }
            _ => {
                for extra in 0..chance.between(1, 6) {
                    let size = usize::try_from(chance.below(700)).unwrap();
                    model.append(&log, (seed << 20) + (step << 8) + extra, size);
                }
            }
        }
        model.promised.set(model.promised.get().max(log.durable().0));
    }
    log.close().await.unwrap();
    model.promised.set(log.durable().0);
    model.closed.set(true);
}

/// Recovers from one crash, goes on a little, crashes again at some operation, recovers again.
fn recover_twice(crashed: &SimDisk, options: LogOptions, model: &Model, seed: u64) {
    let (executor, disk, runtime) = after_crash(crashed, seed);
    let context = format!("image {seed:#x}");
    let from = Lsn(model.released.get() + 1);
    let second = executor.run(async {
        let (end, seen) = read(&disk, from).await.unwrap_or_else(|e| panic!("{context}: {e}"));
        let survivor = model.survive(&end, &seen, &context);
        // Reading twice finds the same.
        let (_, again) = read(&disk, from).await.unwrap();
        assert_eq!(seen, again, "{context}");
        survivor
    });
    // Until the start has returned nobody has seen the survivor's records.
    let promised = second.promised.replace(model.promised.get());
    disk.cut_power_at(disk.op_count() + 1 + seed % 60);
    let run = executor.try_run(async {
        let end = read(&disk, from).await.unwrap().0;
        let log = start(&disk, &runtime, options, end, &second).await.unwrap();
        second.promised.set(promised);
        for tag in 0..30 {
            let lsn = second.append(&log, (seed << 8) + tag, 400);
            if tag % 3 == 0 {
                log.wait_visible(lsn).await.unwrap();
            }
        }
        log.wait_durable(log.appended()).await.unwrap();
        second.promised.set(log.durable().0);
    });
    let context = format!("image {seed:#x}, second life {run:?}");
    let (executor, disk, runtime) = after_crash(&disk, seed.rotate_left(17));
    executor.run(async {
        let (end, seen) = read(&disk, from).await.unwrap_or_else(|e| panic!("{context}: {e}"));
        let third = second.survive(&end, &seen, &context);
        let log = start(&disk, &runtime, options, end, &third).await.unwrap();
        third.append(&log, 1, 100);
        log.close().await.unwrap();
        third.promised.set(log.durable().0);
        third.closed.set(true);
        let (end, seen) = read(&disk, from).await.unwrap();
        third.survive(&end, &seen, &context);
        assert!(end.clean, "{context}");
    });
}

/// Runs the script once and crashes at every moment of it.
fn sweep(seed: u64, options: LogOptions, steps: u64) -> u64 {
    sweep_in(world(seed), seed, options, steps)
}

fn sweep_in(
    (executor, disk, runtime): (SimExecutor, SimDisk, SimRuntime),
    seed: u64,
    options: LogOptions,
    steps: u64,
) -> u64 {
    let model = Model::default();
    let images = Rc::new(Cell::new(0));
    let observer = {
        let (model, images) = (model.clone(), Rc::clone(&images));
        move |disk: &SimDisk| {
            let nth = images.get();
            images.set(nth + 1);
            recover_twice(disk, options, &model, (seed << 32) + nth);
        }
    };
    disk.observe(observer);
    executor.run(script(disk.clone(), runtime, options, model.clone(), seed, steps));
    recover_twice(&disk, options, &model, !seed);
    images.get()
}

#[test]
fn a_power_cut_at_any_moment_costs_nothing_acknowledged_and_leaves_no_hole() {
    for seed in 1..=8 {
        let images = sweep(seed, small(), 40);
        assert!(images > 50, "seed {seed}: {images}");
    }
}

#[test]
fn a_power_cut_of_a_periodic_log_costs_a_suffix_after_the_last_sync() {
    for seed in 101..=106 {
        let options = LogOptions { durability: Durability::Periodic { window_ms: 20 }, ..small() };
        let images = sweep(seed, options, 40);
        assert!(images > 30, "seed {seed}: {images}");
    }
}

#[test]
fn with_one_batch_in_flight_and_no_spare_segments_it_is_the_same() {
    let options =
        LogOptions { batches_in_flight: 1, segments_free_max: 0, quiet_mark_ms: 1, ..small() };
    sweep(201, options, 40);
}

#[test]
fn on_a_device_of_4096_byte_sectors_it_is_the_same() {
    for seed in 211..=213 {
        let executor = SimExecutor::new(seed);
        let options = SimDiskOptions { alignment: 4096, ..SimDiskOptions::seeded(seed) };
        let disk = SimDisk::new(&executor.runtime(), options);
        disk.write_file(&PathBuf::from("data/IDENTITY"), b"");
        let runtime = executor.runtime();
        sweep_in((executor, disk, runtime), seed, small(), 30);
    }
}

#[test]
fn a_log_that_moves_to_larger_sectors_is_made_durable_there() {
    let (executor, disk, runtime) = world(220);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=5 {
            let lsn = log.append(&record(tag, 100).as_ref()).unwrap();
            log.wait_visible(lsn).await.unwrap();
        }
    });
    let options = SimDiskOptions { alignment: 4096, ..SimDiskOptions::default() };
    let moved = SimDisk::new(&runtime, options);
    for (path, _) in disk.files() {
        moved.write_file(&path, &disk.read_file(&path).unwrap());
    }
    executor.run(async {
        let (log, _) = open(&moved, &runtime, small()).await.unwrap();
        log.append(&record(6, 100).as_ref()).unwrap();
        log.close().await.unwrap();
        assert_eq!(read(&moved, Lsn(1)).await.unwrap().1.len(), 7);
    });
}

/// Runs a short life in which the `nth` operation of the disk fails, then the next life.
/// False when there was no such operation.
fn live_with_fault(seed: u64, nth: u64, fault: Fault, options: LogOptions) -> bool {
    let (executor, disk, runtime) = world(seed);
    let model = Model::default();
    let context = format!("seed {seed}, {fault:?} at operation {nth}");
    disk.inject(Rule::nth_of_any(nth, fault));
    let outcome: Result<()> = executor.run(async {
        let end = read(&disk, Lsn(1)).await?.0;
        let log = start(&disk, &runtime, options, end, &model).await?;
        let mut chance = Chance::new(seed);
        let outcome = async {
            for tag in 0..120 {
                let size = usize::try_from(chance.below(900)).unwrap();
                let lsn = log.append(&record(tag, size).as_ref())?;
                model.appended.borrow_mut().insert(lsn.0, Seen::Record(record(tag, size)));
                if chance.one_in(3) {
                    log.wait_durable(lsn).await?;
                    model.promised.set(model.promised.get().max(lsn.0));
                }
                if chance.one_in(20) {
                    model.released.set(log.durable().0);
                    log.release(log.durable());
                }
            }
            Ok(())
        }
        .await;
        let closed = log.close().await;
        if closed.is_ok() {
            model.promised.set(log.durable().0);
            model.closed.set(true);
        }
        outcome.and(closed)
    });
    let struck = disk.op_log().iter().any(|op| op.fault.is_some());
    if let Err(error) = &outcome {
        assert!(struck, "{context}: {error}");
    }
    // Killed or closed, then opened again; and once more after a power cut.
    for (round, crash) in [(1, false), (2, true)] {
        let second = SimExecutor::new(seed + round);
        let found = if crash {
            disk.image_onto(&second.runtime(), seed ^ nth)
        } else {
            disk.fork_onto(&second.runtime())
        };
        let runtime = second.runtime();
        second.run(async {
            let from = Lsn(model.released.get() + 1);
            let (end, seen) = read(&found, from)
                .await
                .unwrap_or_else(|error| panic!("{context}, round {round}: {error}"));
            let next = model.survive(&end, &seen, &context);
            let log = start(&found, &runtime, options, end, &next).await.unwrap();
            next.append(&log, 7, 70);
            log.close().await.unwrap();
            let (end, seen) = read(&found, from).await.unwrap();
            next.promised.set(log.durable().0);
            next.survive(&end, &seen, &context);
        });
    }
    struck
}

#[test]
fn whatever_operation_fails_what_was_promised_is_found_again() {
    for (seed, fault) in [(1, Fault::Eio), (2, Fault::NoSpace)] {
        for options in [small(), periodic()] {
            let mut nth = 1;
            while live_with_fault(seed, nth, fault, options) {
                nth += 1;
            }
            assert!(nth > 60, "{nth}");
        }
    }
}

#[test]
fn a_kill_keeps_what_was_handed_to_the_kernel() {
    let (executor, disk, runtime) = world(300);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, periodic()).await.unwrap();
        for tag in 1..=20 {
            log.append(&record(tag, 100).as_ref()).unwrap();
        }
        runtime.sleep_until(runtime.now().after_nanos(8_000_000)).await;
        log.append(&record(21, 100).as_ref()).unwrap();
    });
    let executor = SimExecutor::new(1);
    let disk = disk.fork_onto(&executor.runtime());
    let (end, seen) = executor.run(read(&disk, Lsn(1))).unwrap();
    assert_eq!((end.next, seen.len()), (Lsn(21), 20));
}

#[test]
fn what_a_restart_after_a_kill_has_served_survives_a_later_power_cut() {
    for seed in 310..330 {
        let (executor, disk, runtime) = world(seed);
        // Many small segments, or one whose tail takes several writes to make durable.
        let (size, segment_size) = if seed % 2 == 0 { (400, 16 << 10) } else { (60_000, 8 << 20) };
        let options = LogOptions { segment_size, ..periodic() };
        executor.run(async {
            let (log, _) = open(&disk, &runtime, options).await.unwrap();
            for tag in 1..=40 {
                log.append(&record(tag, size).as_ref()).unwrap();
            }
            runtime.sleep_until(runtime.now().after_nanos(8_000_000)).await;
            if seed % 3 == 0 {
                // The sync forgets some of what it was to make durable, and the next will not
                // remember: only what is written again is sure to be written.
                disk.inject(Rule::nth(Op::Sync, 1, Fault::Eio).on(".log").forever());
                assert!(log.wait_durable(Lsn(40)).await.is_err());
                disk.clear_faults();
            }
        });
        // The process dies; what it had written lies in caches, not on the medium.
        executor.kill_tasks();
        let served = executor.run(async {
            let (end, seen) = read(&disk, Lsn(1)).await.unwrap();
            let sunk = Sunk::default();
            let sink = sink_into(&sunk);
            let started =
                CommitLog::start(disk.clone(), runtime.clone(), dir(), options, end, sink);
            drop(started.await.unwrap());
            seen
        });
        assert_eq!(served.len(), 40);
        let (executor, disk, _) = after_crash(&disk, seed);
        let (_, seen) = executor.run(read(&disk, Lsn(1))).unwrap();
        assert_eq!(seen, served, "seed {seed}");
    }
}

#[test]
fn crashes_in_a_row_do_not_make_recovery_longer() {
    let (executor, disk, runtime) = world(301);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=100 {
            log.append(&record(tag, 100).as_ref()).unwrap();
        }
        log.wait_visible(Lsn(100)).await.unwrap();
    });
    let mut disk = disk;
    let mut costs = Vec::new();
    for life in 0..12 {
        let (executor, image, runtime) = after_crash(&disk, life);
        executor.run(async {
            let (end, seen) = read(&image, Lsn(1)).await.unwrap();
            assert_eq!(seen.len(), 100);
            let (log, _) = open(&image, &runtime, small()).await.unwrap();
            costs.push((end.bytes, image.files().len()));
            drop(log);
        });
        disk = image;
    }
    assert_eq!(costs[4], costs[11], "{costs:?}");
}
