//! Tests of the commit log on the simulated disk: what is acknowledged, what is replayed, what is
//! refused. `crash.rs` cuts the power at every moment, `damage.rs` turns every bit, `golden.rs`
//! holds the bytes of version 1.

mod crash;
mod damage;
mod golden;

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use super::{CommitLog, Control, LogIdentity, Lsn, ReplayEnd, ReplayItem, Sink, replay};
use crate::error::{Error, Result};
use crate::model::{
    Dot, Kind, NamespaceId, OriginId, PartitionId, Piece, Pieces, Record, RecordRef, Timestamp,
    Token, Value,
};
use crate::options::{Durability, LogOptions};
use crate::runtime::Runtime;
use crate::sim::{
    Chance, Fault, Op, OpRecord, Rule, SimDisk, SimDiskOptions, SimExecutor, SimRuntime,
};

const IDENTITY: LogIdentity = LogIdentity { cluster: 0xC0FF_EE00_1234, shard: 3 };

type Log = CommitLog<SimDisk, SimRuntime>;

fn dir() -> PathBuf {
    PathBuf::from("data/log")
}

fn small() -> LogOptions {
    LogOptions { segment_size: 16 << 10, batch_size: 4096, ..LogOptions::default() }
}

fn periodic() -> LogOptions {
    LogOptions { durability: Durability::Periodic { window_ms: 100 }, ..small() }
}

/// What was replayed, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Record(Record),
    Control(Control<'static>),
    Merged(PartitionId, u32, Vec<u8>),
}

/// A record that says which it is: tag and size decide all of it.
fn record(tag: u64, value_size: usize) -> Record {
    let mut value = vec![0; value_size];
    Chance::new(tag).fill(&mut value);
    Record {
        token: Token(tag.wrapping_mul(0x1234_5678_9ABC_DEF1)),
        namespace: NamespaceId(7),
        incarnation: 2,
        kind: if value_size == 0 { Kind::Delete } else { Kind::Put },
        dot: Dot { origin: OriginId(9), sequence: tag },
        timestamp: Timestamp(tag << 12),
        expiry_ms: tag % 3,
        key: tag.to_le_bytes()[..1 + usize::try_from(tag % 8).unwrap()].to_vec(),
        value,
    }
}

/// What the sink was given, shared with the test.
type Sunk = Rc<RefCell<Vec<(Lsn, Record)>>>;

fn sink_into(sunk: &Sunk) -> Sink {
    let sunk = Rc::clone(sunk);
    Box::new(move |lsn, item| {
        if let ReplayItem::Record(record) = item {
            sunk.borrow_mut().push((lsn, record.to_owned()));
        }
    })
}

async fn read(disk: &SimDisk, from: Lsn) -> Result<(ReplayEnd, Vec<(Lsn, Seen)>)> {
    let mut seen = Vec::new();
    let end = replay(disk, &dir(), IDENTITY, from, &mut |lsn, item| {
        seen.push((
            lsn,
            match item {
                ReplayItem::Record(record) => Seen::Record(record.to_owned()),
                ReplayItem::Control(Control::Seen { partition, incarnation, seen }) => {
                    Seen::Merged(partition, incarnation, seen.to_vec())
                }
                ReplayItem::Control(Control::Close) => Seen::Control(Control::Close),
                ReplayItem::Control(Control::Ceiling { timestamp, sequence }) => {
                    Seen::Control(Control::Ceiling { timestamp, sequence })
                }
                ReplayItem::Control(Control::DropPartition { partition, incarnation }) => {
                    Seen::Control(Control::DropPartition { partition, incarnation })
                }
            },
        ));
    })
    .await?;
    Ok((end, seen))
}

async fn open(disk: &SimDisk, runtime: &SimRuntime, options: LogOptions) -> Result<(Log, Sunk)> {
    let (end, _) = read(disk, Lsn(1)).await?;
    let sunk = Sunk::default();
    let sink = sink_into(&sunk);
    let log = CommitLog::start(disk.clone(), runtime.clone(), dir(), options, end, sink).await?;
    Ok((log, sunk))
}

/// An executor and an empty disk.
fn world(seed: u64) -> (SimExecutor, SimDisk, SimRuntime) {
    let executor = SimExecutor::new(seed);
    let runtime = executor.runtime();
    let disk = SimDisk::new(&runtime, SimDiskOptions::seeded(seed));
    // The shard's directory is there before its log.
    disk.write_file(&PathBuf::from("data/IDENTITY"), b"");
    (executor, disk, runtime)
}

/// A disk found after a power cut or a kill, with an executor of its own.
fn after_crash(disk: &SimDisk, seed: u64) -> (SimExecutor, SimDisk, SimRuntime) {
    let executor = SimExecutor::new(seed);
    let runtime = executor.runtime();
    let disk = disk.image_onto(&runtime, seed);
    (executor, disk, runtime)
}

#[test]
fn what_was_appended_is_given_to_the_sink_and_replayed() {
    let (executor, disk, runtime) = world(1);
    executor.run(async {
        let (log, sunk) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=300 {
            let lsn = log.append(&record(tag, 100).as_ref()).unwrap();
            assert_eq!(lsn, Lsn(tag));
        }
        assert_eq!(log.appended(), Lsn(300));
        log.wait_visible(Lsn(300)).await.unwrap();
        assert_eq!(log.durable(), Lsn(300));
        assert_eq!(log.pending_bytes(), 0);
        let expected: Vec<_> = (1..=300).map(|tag| (Lsn(tag), record(tag, 100))).collect();
        assert_eq!(*sunk.borrow(), expected);
        let stats = log.stats();
        assert_eq!(stats.records, 300);
        assert!(stats.batches < 30, "{stats:?}");
        assert!(stats.segments_live > 2, "{stats:?}");
        let (end, seen) = read(&disk, Lsn(101)).await.unwrap();
        assert_eq!((end.last, end.next, end.clean), (Lsn(300), Lsn(301), false));
        let expected: Vec<_> =
            (101..=300).map(|tag| (Lsn(tag), Seen::Record(record(tag, 100)))).collect();
        assert_eq!(seen, expected);
    });
}

/// The same record, its value cut into pieces that fit nothing.
fn in_pieces(record: &Record) -> Pieces {
    Pieces::new(record.value.chunks(777).map(|piece| Piece::new(piece.to_vec())).collect())
}

#[test]
fn long_records_keep_their_place_among_others_and_are_never_copied_for_the_sink() {
    for options in [small(), periodic()] {
        let (executor, disk, runtime) = world(31);
        executor.run(async {
            let shared = Rc::new(RefCell::new(Vec::new()));
            let (end, _) = read(&disk, Lsn(1)).await.unwrap();
            let sink = Rc::clone(&shared);
            let sink: Sink = Box::new(move |lsn, item| {
                if let ReplayItem::Record(RecordRef { value: Value::Pieces(pieces), .. }) = item {
                    sink.borrow_mut().push((lsn, pieces.list()[0].bytes().as_ptr()));
                }
            });
            let log = CommitLog::start(disk.clone(), runtime.clone(), dir(), options, end, sink);
            let log = log.await.unwrap();
            let (mut expected, mut given) = (Vec::new(), Vec::new());
            for tag in 1..=60u64 {
                // Around the size of a batch, of a chunk, and of many.
                let size = [10, 2000, 2100, 4000, 4096, 9000][usize::try_from(tag % 6).unwrap()];
                let record = record(tag, size);
                let pieces = in_pieces(&record);
                let cut = RecordRef { value: pieces.value(), ..record.as_ref() };
                let lsn = log.append(&cut).unwrap();
                assert_eq!(lsn, Lsn(tag));
                if size > 2048 {
                    given.push((lsn, pieces.list()[0].bytes().as_ptr()));
                }
                expected.push((lsn, Seen::Record(record)));
            }
            log.wait_durable(Lsn(60)).await.unwrap();
            assert_eq!(log.pending_bytes(), 0);
            shared.borrow_mut().retain(|(lsn, _)| given.iter().any(|(given, _)| given == lsn));
            assert_eq!(*shared.borrow(), given);
            let (end, seen) = read(&disk, Lsn(1)).await.unwrap();
            assert_eq!((end.last, seen), (Lsn(60), expected));
        });
    }
}

/// A long record costs others no more than a step at a time: small ones behind it are written
/// meanwhile, though they are acknowledged after it.
#[test]
fn what_comes_behind_a_long_record_is_on_its_way_before_it_is_done() {
    let (executor, disk, runtime) = world(32);
    executor.run(async {
        let options = LogOptions { segment_size: 8 << 20, ..LogOptions::default() };
        let (log, sunk) = open(&disk, &runtime, options).await.unwrap();
        let long = log.append(&record(1, 4 << 20).as_ref()).unwrap();
        let small = log.append(&record(2, 100).as_ref()).unwrap();
        assert!(log.stats().bytes == 0 && log.pending_bytes() > 4 << 20);
        log.wait_visible(long).await.unwrap();
        log.wait_visible(small).await.unwrap();
        let order: Vec<u64> = sunk.borrow().iter().map(|(lsn, _)| lsn.0).collect();
        assert_eq!(order, [1, 2]);
    });
}

#[test]
fn a_clean_close_is_known_after_the_restart_and_numbers_go_on() {
    let (executor, disk, runtime) = world(2);
    executor.run(async {
        for life in 0..3 {
            let (end, _) = read(&disk, Lsn(1)).await.unwrap();
            assert!(end.clean);
            assert_eq!(end.next, Lsn(1 + life * 2));
            let (log, _) = open(&disk, &runtime, small()).await.unwrap();
            log.append(&record(life, 10).as_ref()).unwrap();
            log.close().await.unwrap();
            assert_eq!(log.durable(), Lsn(2 + life * 2));
            assert!(matches!(log.append(&record(0, 1).as_ref()), Err(Error::Busy { .. })));
            log.close().await.unwrap();
        }
        let (end, seen) = read(&disk, Lsn(1)).await.unwrap();
        assert!(end.clean && end.torn.is_none());
        assert_eq!(seen.len(), 6);
        assert_eq!(seen[5], (Lsn(6), Seen::Control(Control::Close)));
    });
    assert_eq!(executor.task_count(), 0, "the log's tasks end with it");
}

#[test]
fn a_dropped_log_ends_its_tasks() {
    let (executor, disk, runtime) = world(3);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        log.append(&record(1, 10).as_ref()).unwrap();
        drop(log.clone());
        log.wait_visible(Lsn(1)).await.unwrap();
    });
    executor.run_for_nanos(5_000_000_000);
    assert_eq!(executor.task_count(), 0);
}

#[test]
fn a_lone_record_is_written_at_once_and_company_shares_a_batch() {
    let (executor, disk, runtime) = world(4);
    executor.run(async {
        let options = LogOptions { quiet_mark_ms: 0, ..small() };
        let (log, _) = open(&disk, &runtime, options).await.unwrap();
        for tag in 1..=5 {
            let lsn = log.append(&record(tag, 100).as_ref()).unwrap();
            log.wait_visible(lsn).await.unwrap();
        }
        assert_eq!(log.stats().batches, 5);
        assert_eq!(log.stats().device_bytes, 5 * 512);
        for tag in 6..=20 {
            log.append(&record(tag, 100).as_ref()).unwrap();
        }
        log.wait_visible(Lsn(20)).await.unwrap();
        assert_eq!(log.stats().batches, 6);
    });
}

#[test]
fn control_records_have_numbers_of_their_own_and_are_replayed() {
    let (executor, disk, runtime) = world(5);
    executor.run(async {
        let (log, sunk) = open(&disk, &runtime, small()).await.unwrap();
        let ceiling = Control::Ceiling { timestamp: Timestamp(77), sequence: 1000 };
        let drop = Control::DropPartition { partition: PartitionId(12), incarnation: 4 };
        assert_eq!(log.append_control(ceiling).unwrap(), Lsn(1));
        log.append(&record(2, 0).as_ref()).unwrap();
        assert_eq!(log.append_control(drop).unwrap(), Lsn(3));
        assert!(log.append_control(Control::Close).is_err());
        let merged = Control::Seen { partition: PartitionId(3), incarnation: 2, seen: b"a set" };
        assert_eq!(log.append_control(merged).unwrap(), Lsn(4));
        let seen = &vec![0; 40 << 20];
        let huge = Control::Seen { partition: PartitionId(3), incarnation: 2, seen };
        assert!(matches!(log.append_control(huge), Err(Error::Invalid { .. })));
        log.wait_visible(Lsn(4)).await.unwrap();
        assert_eq!(*sunk.borrow(), vec![(Lsn(2), record(2, 0))]);
        let (_, seen) = read(&disk, Lsn(1)).await.unwrap();
        let expected = [
            Seen::Control(ceiling),
            Seen::Record(record(2, 0)),
            Seen::Control(drop),
            Seen::Merged(PartitionId(3), 2, b"a set".to_vec()),
        ];
        assert_eq!(seen.into_iter().map(|(_, seen)| seen).collect::<Vec<_>>(), expected);
    });
}

#[test]
fn released_segments_are_recycled_and_their_records_gone() {
    let (executor, disk, runtime) = world(6);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=2000 {
            let lsn = log.append(&record(tag, 100).as_ref()).unwrap();
            if tag % 50 == 0 {
                log.wait_visible(lsn).await.unwrap();
                log.release(Lsn(tag - 20));
            }
        }
        let stats = log.stats();
        assert!(stats.segments_live <= 3, "{stats:?}");
        assert!(stats.segments_created <= 6, "{stats:?}");
        let (_, seen) = read(&disk, Lsn(1981)).await.unwrap();
        let expected: Vec<_> =
            (1981..=2000).map(|tag| (Lsn(tag), Seen::Record(record(tag, 100)))).collect();
        assert_eq!(seen, expected);
        assert!(disk.used() <= 10 * (16 << 10));
    });
}

#[test]
fn records_larger_than_a_segment_fit() {
    let (executor, disk, runtime) = world(7);
    executor.run(async {
        let (log, sunk) = open(&disk, &runtime, small()).await.unwrap();
        let sizes = [100, 40_000, 5, 1 << 20, 16 << 20, 300];
        for (tag, size) in (1..).zip(sizes) {
            log.append(&record(tag, size).as_ref()).unwrap();
            if tag % 2 == 0 || size > 1 << 20 {
                log.wait_visible(Lsn(tag)).await.unwrap();
            }
        }
        log.wait_visible(Lsn(6)).await.unwrap();
        assert_eq!(sunk.borrow().len(), 6);
        let (_, seen) = read(&disk, Lsn(1)).await.unwrap();
        let expected: Vec<_> = (1..)
            .zip(sizes)
            .map(|(tag, size)| (Lsn(tag), Seen::Record(record(tag, size))))
            .collect();
        assert!(seen == expected);
        log.close().await.unwrap();
    });
}

#[test]
fn too_large_and_empty_keys_are_refused() {
    let (executor, disk, runtime) = world(8);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        let mut bad = record(1, 10);
        bad.key = Vec::new();
        assert!(matches!(log.append(&bad.as_ref()), Err(Error::Invalid { .. })));
        bad.key = vec![1; 4097];
        assert!(matches!(log.append(&bad.as_ref()), Err(Error::Invalid { .. })));
        bad.key = vec![1; 4096];
        assert_eq!(log.append(&bad.as_ref()).unwrap(), Lsn(1));
        log.wait_visible(Lsn(1)).await.unwrap();
    });
}

#[test]
fn beyond_the_bound_of_waiting_bytes_appends_answer_busy() {
    let (executor, disk, runtime) = world(9);
    executor.run(async {
        let options = LogOptions { pending_size_max: 64 << 10, ..small() };
        let (log, _) = open(&disk, &runtime, options).await.unwrap();
        let mut accepted = 0;
        while log.append(&record(accepted + 1, 1000).as_ref()).is_ok() {
            accepted += 1;
        }
        assert!((55..=65).contains(&accepted), "{accepted}");
        assert!(log.pending_bytes() <= 66 << 10);
        log.wait_visible(Lsn(accepted)).await.unwrap();
        assert_eq!(log.append(&record(accepted + 1, 1000).as_ref()).unwrap(), Lsn(accepted + 1));
    });
}

#[test]
fn a_failed_write_poisons_and_nothing_after_it_is_acknowledged() {
    for nth in 1..=6 {
        let (executor, disk, runtime) = world(10 + nth);
        executor.run(async {
            let options = LogOptions { segment_size: 1 << 20, ..small() };
            let (log, sunk) = open(&disk, &runtime, options).await.unwrap();
            disk.inject(Rule::nth(Op::Write, nth, Fault::Eio).on("001.log"));
            for tag in 1..=100 {
                log.append(&record(tag, 200).as_ref()).unwrap();
            }
            let error = log.wait_visible(Lsn(100)).await.unwrap_err();
            assert!(matches!(&error, Error::Poisoned { what } if what.contains("0000000001.log")));
            assert!(matches!(log.append(&record(1, 1).as_ref()), Err(Error::Poisoned { .. })));
            assert!(log.poisoned().is_some());
            let visible = log.visible().0;
            assert!(visible < 100);
            assert!(matches!(log.close().await, Err(Error::Poisoned { .. })));
            assert_eq!(log.visible().0, visible);
            assert_eq!(sunk.borrow().len() as u64, visible);
            // The same process may open the directory again: on new segments.
            let (log, _) = open(&disk, &runtime, small()).await.unwrap();
            assert!(log.appended().0 >= visible);
            log.append(&record(500, 10).as_ref()).unwrap();
            // Closed, because a log that lives recycles segments while they are read.
            log.close().await.unwrap();
            let (_, seen) = read(&disk, Lsn(1)).await.unwrap();
            for (lsn, seen) in &seen[..seen.len() - 2] {
                assert_eq!(*seen, Seen::Record(record(lsn.0, 200)));
            }
        });
    }
}

#[test]
fn closing_after_a_failure_waits_for_writes_under_way() {
    let (executor, disk, runtime) = world(18);
    executor.run(async {
        let options = LogOptions { segment_size: 1 << 20, ..small() };
        let (log, _) = open(&disk, &runtime, options).await.unwrap();
        disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on("001.log"));
        disk.inject(Rule::nth(Op::Write, 2, Fault::Delay(80_000_000)).on("001.log"));
        for tag in 1..=40 {
            log.append(&record(tag, 300).as_ref()).unwrap();
        }
        let before = runtime.now();
        assert!(log.close().await.is_err());
        let writes = disk.op_log().into_iter().filter(|op| op.path.ends_with("0000000001.log"));
        let faults = writes.filter(|op| op.fault.is_some()).count();
        let waited = runtime.now().nanos_since(before);
        assert!(faults == 2 && waited > 80_000_000, "{faults} {waited}");
    });
}

#[test]
fn a_segment_is_not_recycled_while_a_write_to_it_is_under_way() {
    let (executor, disk, runtime) = world(19);
    executor.run(async {
        let options = LogOptions { quiet_mark_ms: 1, ..small() };
        let (log, _) = open(&disk, &runtime, options).await.unwrap();
        log.append(&record(1, 100).as_ref()).unwrap();
        log.wait_visible(Lsn(1)).await.unwrap();
        // The note of the synced position takes long; meanwhile the log rolls.
        disk.inject(Rule::nth(Op::Write, 1, Fault::Delay(100_000_000)).on("001.log"));
        runtime.sleep_until(runtime.now().after_nanos(5_000_000)).await;
        log.append(&record(2, 11_900).as_ref()).unwrap();
        runtime.sleep_until(runtime.now().after_nanos(5_000_000)).await;
        log.release(Lsn(1));
        assert_eq!((log.stats().segments_live, log.stats().segments_free), (2, 0));
        log.wait_visible(Lsn(2)).await.unwrap();
        assert_eq!(log.stats().segments_live, 1);
    });
}

#[test]
fn a_failed_sync_poisons_and_is_not_retried() {
    let (executor, disk, runtime) = world(20);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, periodic()).await.unwrap();
        for tag in 1..=50 {
            log.append(&record(tag, 200).as_ref()).unwrap();
        }
        log.wait_durable(Lsn(50)).await.unwrap();
        disk.inject(Rule::nth(Op::Sync, 1, Fault::Eio).on(".log"));
        for tag in 51..=60 {
            log.append(&record(tag, 200).as_ref()).unwrap();
        }
        assert!(matches!(log.wait_durable(Lsn(60)).await, Err(Error::Poisoned { .. })));
        let count_syncs = || {
            let is_sync = |op: &&OpRecord| op.op == Op::Sync && op.path.ends_with("0000000001.log");
            disk.op_log().iter().filter(is_sync).count()
        };
        let syncs = count_syncs();
        runtime.sleep_until(runtime.now().after_nanos(1_000_000_000)).await;
        assert_eq!(count_syncs(), syncs);
        assert_eq!(log.durable(), Lsn(50));
        assert!(log.close().await.is_err());
    });
}

#[test]
fn periodic_writes_are_visible_at_once_and_durable_after_the_window() {
    let (executor, disk, runtime) = world(21);
    executor.run(async {
        let (log, sunk) = open(&disk, &runtime, periodic()).await.unwrap();
        for tag in 1..=10 {
            log.append(&record(tag, 100).as_ref()).unwrap();
            assert_eq!(sunk.borrow().len() as u64, tag);
        }
        assert_eq!((log.visible(), log.durable()), (Lsn(10), Lsn(0)));
        runtime.sleep_until(runtime.now().after_nanos(7_000_000)).await;
        assert_eq!(log.pending_bytes(), 0, "handed to the kernel after 5 ms");
        assert_eq!((log.stats().batches, log.durable()), (1, Lsn(0)));
        runtime.sleep_until(runtime.now().after_nanos(100_000_000)).await;
        assert_eq!(log.durable(), Lsn(10));
        let lsn = log.append(&record(11, 100).as_ref()).unwrap();
        let before = runtime.now();
        log.wait_durable(lsn).await.unwrap();
        assert!(runtime.now().nanos_since(before) < 5_000_000, "who waits is not made to wait");
        log.append(&record(12, 100).as_ref()).unwrap();
        log.close().await.unwrap();
        assert!(read(&disk, Lsn(1)).await.unwrap().0.clean);
    });
}

#[test]
fn under_a_steady_stream_each_window_is_synced() {
    let (executor, disk, runtime) = world(22);
    executor.run(async {
        let options = LogOptions { segment_size: 1 << 20, ..periodic() };
        let (log, _) = open(&disk, &runtime, options).await.unwrap();
        for step in 0..1000u64 {
            log.append(&record(step, 100).as_ref()).unwrap();
            runtime.sleep_until(runtime.now().after_nanos(1_000_000)).await;
            assert!(log.durable().0 + 110 >= log.appended().0, "at most a window is at risk");
        }
        let stats = log.stats();
        assert!((5..=12).contains(&stats.syncs), "{stats:?}");
        assert!((100..=210).contains(&stats.batches), "{stats:?}");
        log.release(Lsn(990));
        log.close().await.unwrap();
    });
}

#[test]
fn a_full_disk_refuses_before_anything_is_done_and_ends_by_itself() {
    let (executor, disk, runtime) = world(23);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        disk.set_capacity(disk.used() + (20 << 10));
        let mut accepted = 0;
        let error = loop {
            match log.append(&record(accepted + 1, 1000).as_ref()) {
                Ok(lsn) => {
                    accepted += 1;
                    log.wait_visible(lsn).await.unwrap();
                }
                Err(error) => break error,
            }
            runtime.sleep_until(runtime.now().after_nanos(1_000_000)).await;
        };
        assert!(matches!(&error, Error::Full { .. }), "{error}");
        assert!(log.poisoned().is_none());
        disk.set_capacity(1 << 30);
        runtime.sleep_until(runtime.now().after_nanos(500_000_000)).await;
        let lsn = log.append(&record(accepted + 1, 1000).as_ref()).unwrap();
        log.wait_visible(lsn).await.unwrap();
        // Or space returns because tables hold the records.
        disk.set_capacity(disk.used());
        for tag in 0..200 {
            match log.append(&record(tag, 1000).as_ref()) {
                Ok(lsn) => {
                    log.wait_visible(lsn).await.unwrap();
                    log.release(lsn);
                }
                Err(_) => runtime.sleep_until(runtime.now().after_nanos(50_000_000)).await,
            }
        }
        assert!(log.stats().records > 100);
        log.close().await.unwrap();
    });
}

#[test]
fn a_full_disk_while_a_record_needs_a_larger_segment_only_delays_it() {
    let (executor, disk, runtime) = world(24);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        runtime.sleep_until(runtime.now().after_nanos(10_000_000)).await;
        disk.set_capacity(disk.used() + 1000);
        let lsn = log.append(&record(1, 100_000).as_ref()).unwrap();
        runtime.sleep_until(runtime.now().after_nanos(300_000_000)).await;
        assert_eq!(log.visible(), Lsn(0));
        assert!(matches!(log.append(&record(2, 10).as_ref()), Err(Error::Full { .. })));
        disk.set_capacity(1 << 30);
        log.wait_visible(lsn).await.unwrap();
        log.append(&record(2, 10).as_ref()).unwrap();
        log.close().await.unwrap();
    });
}

#[test]
fn batches_in_flight_are_acknowledged_in_order_only() {
    for seed in 30..60 {
        let (executor, disk, runtime) = world(seed);
        executor.run(async {
            let options = LogOptions { segment_size: 1 << 20, ..small() };
            let (log, sunk) = open(&disk, &runtime, options).await.unwrap();
            // The first write takes long; those beside it have to wait.
            disk.inject(Rule::nth(Op::Write, 1, Fault::Delay(50_000_000)).on("001.log"));
            for tag in 1..=60 {
                log.append(&record(tag, 300).as_ref()).unwrap();
            }
            runtime.sleep_until(runtime.now().after_nanos(20_000_000)).await;
            let ops = disk.op_log();
            let writes: Vec<_> = ops
                .iter()
                .filter(|op| op.op == Op::Write && op.path.ends_with("0000000001.log"))
                .collect();
            // Each batch but the last holds 11 records and is 4 KiB long.
            let late = writes.iter().find(|op| op.fault.is_some()).unwrap();
            let before = (late.offset - 4096) / 4096;
            assert_eq!(log.visible().0, 11 * before);
            assert_eq!(writes.len() as u64, (before + 4).min(5), "four are in flight");
            log.wait_visible(Lsn(60)).await.unwrap();
            assert!(sunk.borrow().iter().zip(1..).all(|((lsn, _), n)| lsn.0 == n));
        });
    }
}

#[test]
fn replay_of_nothing_is_a_fresh_log_but_an_emptied_one_is_refused() {
    let (executor, disk, runtime) = world(60);
    executor.run(async {
        let (end, _) = read(&disk, Lsn(9)).await.unwrap();
        assert_eq!((end.next, end.clean), (Lsn(9), true));
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        log.close().await.unwrap();
        for (path, _) in disk.files() {
            disk.remove_file(&path);
        }
        assert!(disk.files().is_empty());
        assert!(matches!(read(&disk, Lsn(9)).await, Err(Error::Corrupt { .. })));
    });
}

#[test]
fn tables_may_be_ahead_of_a_periodic_log_after_a_crash() {
    let (executor, disk, runtime) = world(61);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, periodic()).await.unwrap();
        for tag in 1..=40 {
            log.append(&record(tag, 100).as_ref()).unwrap();
        }
        drop(log);
    });
    // The manifest says that tables hold 40 records; the log lost them all.
    let (executor, disk, runtime) = after_crash(&disk, 5);
    executor.run(async {
        let (end, seen) = read(&disk, Lsn(41)).await.unwrap();
        assert_eq!((end.next, seen.len()), (Lsn(41), 0));
        let sunk = Sunk::default();
        let log = CommitLog::start(
            disk.clone(),
            runtime.clone(),
            dir(),
            periodic(),
            end,
            sink_into(&sunk),
        )
        .await
        .unwrap();
        assert_eq!(log.append(&record(41, 100).as_ref()).unwrap(), Lsn(41));
        log.close().await.unwrap();
        let (_, seen) = read(&disk, Lsn(41)).await.unwrap();
        assert_eq!(seen[0], (Lsn(41), Seen::Record(record(41, 100))));
    });
}
