//! The drivers on the real kernel: files in a temporary folder, tasks and timers on a real shard.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::*;
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::error::Error;
use crate::model::Instant;
use crate::runtime::{Class, Runtime};

mod parking;

const MS: u64 = 1_000_000;

/// Runs a test on a shard's thread with a disk and a folder of its own.
fn on_disk<F, T>(test: impl FnOnce(RingDisk, PathBuf) -> F + Send + 'static) -> T
where
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    on_shard(|ring, runtime| async move {
        let folder = tempfile::tempdir().unwrap();
        let disk = RingDisk::new(&ring);
        drive(&ring, &runtime, test(disk, folder.path().to_owned())).await.unwrap()
    })
}

fn on_shard<F, T>(test: impl FnOnce(Ring, ShardRuntime) -> F + Send + 'static) -> T
where
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    start_shard(ThreadOptions::default(), test).unwrap().join().unwrap().unwrap()
}

fn filled(len: usize, salt: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(len);
    for (i, byte) in buf.iter_mut().enumerate() {
        *byte = u8::try_from(i % 251).unwrap() ^ salt;
    }
    buf
}

async fn create(disk: &RingDisk, path: &Path) -> files::RingFile {
    disk.open(path, OpenMode::Create).await.unwrap()
}

#[test]
fn what_was_written_is_read_back() {
    on_disk(|disk, folder| async move {
        let file = create(&disk, &folder.join("a")).await;
        let unit = file.alignment();
        for (mode, salt) in [(WriteMode::Cached, 1), (WriteMode::Durable, 2)] {
            let (buf, written) = file.write_at(unit as u64, filled(8 * unit, salt), mode).await;
            written.unwrap();
            assert!(buf[..] == filled(8 * unit, salt)[..], "the buffer comes back whole");
            file.sync().await.unwrap();
            let read = file.read_at(unit as u64, 8 * unit).await.unwrap();
            assert!(read[..] == buf[..]);
        }
        assert_eq!(file.len().await.unwrap(), 9 * unit as u64);
        let hole = file.read_at(0, unit).await.unwrap();
        assert!(hole.iter().all(|&byte| byte == 0));
    });
}

#[test]
fn a_read_beyond_the_end_is_short() {
    on_disk(|disk, folder| async move {
        let file = create(&disk, &folder.join("a")).await;
        let unit = file.alignment();
        file.write_at(0, filled(2 * unit, 0), WriteMode::Cached).await.1.unwrap();
        assert_eq!(file.read_at(0, 8 * unit).await.unwrap().len(), 2 * unit);
        assert_eq!(file.read_at(unit as u64, 8 * unit).await.unwrap().len(), unit);
        assert_eq!(file.read_at(64 * unit as u64, unit).await.unwrap().len(), 0);
        // A length off the grid, as a torn file may have: still all that is there.
        file.set_len(unit as u64 + 100).await.unwrap();
        assert_eq!(file.read_at(0, 8 * unit).await.unwrap().len(), unit + 100);
        assert_eq!(file.read_at(0, 0).await.unwrap().len(), 0);
    });
}

#[test]
fn a_large_write_goes_through_whole() {
    on_disk(|disk, folder| async move {
        let file = create(&disk, &folder.join("a")).await;
        let big = filled(33 << 20, 7);
        let (big, written) = file.write_at(4096, big, WriteMode::Durable).await;
        written.unwrap();
        let read = file.read_at(4096, big.len()).await.unwrap();
        assert!(read[..] == big[..]);
    });
}

#[test]
fn misaligned_reads_and_writes_are_refused() {
    on_disk(|disk, folder| async move {
        let file = create(&disk, &folder.join("a")).await;
        assert!(matches!(file.read_at(1, 4096).await, Err(Error::Invalid { .. })));
        assert!(matches!(file.read_at(0, 100).await, Err(Error::Invalid { .. })));
        let (buf, refused) = file.write_at(3, filled(4096, 0), WriteMode::Cached).await;
        assert!(matches!(refused, Err(Error::Invalid { .. })) && buf.len() == 4096);
    });
}

#[test]
fn names_obey_the_contract() {
    on_disk(|disk, folder| async move {
        let (a, b, c) = (folder.join("a"), folder.join("b"), folder.join("c"));
        assert!(disk.open(&a, OpenMode::Read).await.err().unwrap().is_not_found());
        let file = create(&disk, &a).await;
        file.write_at(0, filled(4096, 1), WriteMode::Cached).await.1.unwrap();
        assert!(disk.open(&a, OpenMode::Create).await.is_err(), "the name exists");
        disk.link(&a, &b).await.unwrap();
        assert!(disk.link(&a, &b).await.is_err(), "the name exists");
        drop(create(&disk, &c).await);
        disk.rename(&a, &c).await.unwrap();
        disk.create_dir(&folder.join("d/e/f")).await.unwrap();
        disk.create_dir(&folder.join("d/e/f")).await.unwrap();
        disk.sync_dir(&folder).await.unwrap();
        assert_eq!(disk.list(&folder).await.unwrap(), ["b", "c"]);
        let moved = disk.open(&c, OpenMode::Read).await.unwrap();
        assert!(moved.read_at(0, 4096).await.unwrap()[..] == filled(4096, 1)[..]);
        disk.remove(&b).await.unwrap();
        disk.remove(&c).await.unwrap();
        assert!(disk.remove(&c).await.err().unwrap().is_not_found());
        assert!(disk.list(&folder.join("none")).await.err().unwrap().is_not_found());
        assert_eq!(moved.read_at(0, 4096).await.unwrap().len(), 4096, "open files outlive names");
    });
}

#[test]
fn files_and_directories_are_private() {
    use std::os::unix::fs::PermissionsExt;
    on_disk(|disk, folder| async move {
        disk.create_dir(&folder.join("d")).await.unwrap();
        drop(create(&disk, &folder.join("d/a")).await);
        let mode =
            |path: &str| std::fs::metadata(folder.join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("d"), mode("d/a")), (0o700, 0o600));
    });
}

#[test]
fn a_punched_range_reads_as_zeros_and_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    on_disk(|disk, folder| async move {
        let path = folder.join("a");
        let file = create(&disk, &path).await;
        file.write_at(0, filled(1 << 20, 9), WriteMode::Durable).await.1.unwrap();
        let before = std::fs::metadata(&path).unwrap().blocks();
        file.punch(0, 512 << 10).await.unwrap();
        let read = file.read_at(0, 1 << 20).await.unwrap();
        assert!(read[..512 << 10].iter().all(|&byte| byte == 0));
        assert!(read[512 << 10..] == filled(1 << 20, 9)[512 << 10..]);
        assert!(std::fs::metadata(&path).unwrap().blocks() <= before - 1000);
        assert_eq!(file.len().await.unwrap(), 1 << 20);
    });
}

#[test]
fn a_directory_has_one_owner() {
    on_disk(|disk, folder| async move {
        let held = disk.lock(&folder).await.unwrap();
        let Err(Error::Mismatch { what, .. }) = disk.lock(&folder).await else {
            panic!("two owners")
        };
        assert!(what.contains(&std::process::id().to_string()), "{what}");
        drop(held);
        disk.lock(&folder).await.unwrap();
        let space = disk.space(&folder).await.unwrap();
        assert!(space.free > 0 && space.free <= space.total);
    });
}

#[test]
fn a_file_system_without_direct_io_is_read_all_the_same() {
    on_disk(|disk, _| async move {
        let file = disk.open(Path::new("/proc/self/status"), OpenMode::Read).await.unwrap();
        assert!(!file.is_direct());
        assert!(file.read_at(0, 512).await.unwrap().starts_with(b"Name:"));
    });
}

#[test]
fn a_path_with_a_zero_byte_is_an_error() {
    on_disk(|disk, _| async move {
        let refused = disk.open(Path::new("a\0b"), OpenMode::Read).await;
        assert!(matches!(refused.err(), Some(Error::Invalid { .. })));
    });
}

/// Polls a future a single time, then drops it.
async fn begin_and_drop(future: impl Future) {
    let mut future = Box::pin(future);
    std::future::poll_fn(|context| {
        let _ = future.as_mut().poll(context);
        std::task::Poll::Ready(())
    })
    .await;
}

#[test]
fn a_dropped_write_still_arrives_and_its_buffer_lives_until_then() {
    on_shard(|ring, runtime| async move {
        let folder = tempfile::tempdir().unwrap();
        let disk = RingDisk::new(&ring);
        let path = folder.path().join("a");
        let file = drive(&ring, &runtime, create(&disk, &path)).await.unwrap();
        for i in 0..64 {
            let buf = filled(64 << 10, i);
            begin_and_drop(file.write_at(u64::from(i) << 16, buf, WriteMode::Durable)).await;
            // Fresh memory of the same size would be the freed buffer's, were it freed.
            drop(filled(64 << 10, 255));
        }
        ring.drain();
        for i in 0..64 {
            let read = file.read_at(u64::from(i) << 16, 64 << 10);
            let read = drive(&ring, &runtime, read).await.unwrap().unwrap();
            assert!(read[..] == filled(64 << 10, i)[..], "write {i}");
        }
    });
}

/// How many descriptors of this process are open on files below a folder.
fn open_below(folder: &Path) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    entries
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.starts_with(folder))
        .count()
}

#[test]
fn no_descriptor_is_left_behind() {
    on_shard(|ring, runtime| async move {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let disk = RingDisk::new(&ring);
        drive(&ring, &runtime, async {
            let file = create(&disk, &path.join("a")).await;
            assert_eq!(open_below(&path), 1);
            drop(file);
            for _ in 0..20 {
                begin_and_drop(disk.open(&path.join("a"), OpenMode::Read)).await;
                begin_and_drop(disk.sync_dir(&path)).await;
            }
        })
        .await
        .unwrap();
        ring.drain();
        assert_eq!((open_below(&path), ring.in_flight()), (0, (0, 0)));
    });
}

#[test]
fn more_operations_than_the_queues_hold_all_complete() {
    on_shard(|ring, runtime| async move {
        let done = std::rc::Rc::new(std::cell::Cell::new(0));
        for _ in 0..20_000 {
            let (ring, done) = (ring.clone(), done.clone());
            runtime.spawn(Class::Foreground, async move {
                let nop = io_uring::opcode::Nop::new().build();
                // SAFETY: the entry points to no memory.
                let (result, ()) = unsafe { ring.operation(nop, ring::Weight::Plain, ()) }.await;
                assert_eq!(result, 0);
                done.set(done.get() + 1);
            });
        }
        let all = done.clone();
        host(&ring, &runtime, HostOptions::default(), |_, _| match all.get() {
            20_000 => Turn::Stop,
            _ => Turn::Idle,
        })
        .await
        .unwrap();
        assert_eq!(ring.in_flight(), (0, 0));
    });
}

#[test]
fn a_durable_write_counts_as_a_log_write_while_it_is_in_flight() {
    on_shard(|ring, runtime| async move {
        let folder = tempfile::tempdir().unwrap();
        let disk = RingDisk::new(&ring);
        let path = folder.path().join("a");
        let file = drive(&ring, &runtime, create(&disk, &path)).await.unwrap();
        let mut write = Box::pin(file.write_at(0, filled(4096, 1), WriteMode::Durable));
        drive(&ring, &runtime, async {
            std::future::poll_fn(|context| write.as_mut().poll(context).map(drop)).await;
        })
        .await
        .unwrap();
        assert!(!ring.log_writes_in_flight());
        begin_and_drop(file.write_at(0, filled(4096, 2), WriteMode::Durable)).await;
        assert!(ring.log_writes_in_flight());
        ring.drain();
        assert!(!ring.log_writes_in_flight());
    });
}

#[test]
fn foreground_timers_fire_in_order_while_the_shard_is_parked() {
    let (order, took) = on_shard(|ring, runtime| async move {
        let order = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let start = runtime.now();
        for ms in [30, 10, 20] {
            let (order, sleeper) = (order.clone(), runtime.clone());
            runtime.spawn(Class::Foreground, async move {
                sleeper.sleep_until(start.after_nanos(ms * MS)).await;
                assert!(sleeper.now() >= start.after_nanos(ms * MS), "never early");
                order.borrow_mut().push(ms);
            });
        }
        let seen = order.clone();
        let options = HostOptions { spin_us: 0, slice_us: 200 };
        host(&ring, &runtime, options, |_, _| match seen.borrow().len() {
            3 => Turn::Stop,
            _ => Turn::Idle,
        })
        .await
        .unwrap();
        (order.take(), runtime.now().nanos_since(start))
    });
    assert_eq!(order, [10, 20, 30]);
    assert!(took < 5_000 * MS, "the shard slept {took} ns");
}

#[test]
fn a_background_task_sleeps_and_reads_while_the_shard_is_parked() {
    on_shard(|ring, runtime| async move {
        let folder = tempfile::tempdir().unwrap();
        let disk = RingDisk::new(&ring);
        let path = folder.path().join("a");
        let done = std::rc::Rc::new(std::cell::Cell::new(false));
        let (told, inner) = (done.clone(), runtime.clone());
        runtime.spawn(Class::Background, async move {
            let file = create(&disk, &path).await;
            for i in 0..20 {
                inner.sleep_until(inner.now().after_nanos(MS)).await;
                file.write_at(0, filled(4096, i), WriteMode::Cached).await.1.unwrap();
                inner.yield_now().await;
                assert_eq!(file.read_at(0, 4096).await.unwrap()[0], i);
            }
            // A background task may wake a foreground one.
            let told = told.clone();
            inner.spawn(Class::Foreground, async move { told.set(true) });
        });
        host(&ring, &runtime, HostOptions::default(), |_, _| match done.get() {
            true => Turn::Stop,
            false => Turn::Idle,
        })
        .await
        .unwrap();
    });
}

#[test]
fn the_shard_gets_its_turn_beside_a_busy_background_task() {
    on_shard(|ring, runtime| async move {
        let stop = std::rc::Rc::new(std::cell::Cell::new(false));
        let (stopped, inner) = (stop.clone(), runtime.clone());
        runtime.spawn(Class::Background, async move {
            while !stopped.get() {
                let end = inner.now().after_nanos(MS / 5);
                while inner.now() < end {}
                inner.yield_now().await;
            }
        });
        let sleeper = runtime.clone();
        let ticks = drive(&ring, &runtime, async move {
            let mut ticks = 0;
            let end = sleeper.now().after_nanos(200 * MS);
            while sleeper.now() < end {
                sleeper.sleep_until(sleeper.now().after_nanos(MS)).await;
                ticks += 1;
            }
            stop.set(true);
            ticks
        })
        .await
        .unwrap();
        assert!(ticks > 20, "{ticks} ticks of 1 ms in 200 ms");
    });
}

#[test]
fn yielding_lets_other_foreground_tasks_run() {
    on_shard(|ring, runtime| async move {
        let turns = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        for name in 0..2 {
            let (turns, inner) = (turns.clone(), runtime.clone());
            runtime.spawn(Class::Foreground, async move {
                for _ in 0..3 {
                    turns.borrow_mut().push(name);
                    inner.yield_now().await;
                }
            });
        }
        let seen = turns.clone();
        host(&ring, &runtime, HostOptions::default(), |_, _| match seen.borrow().len() {
            6 => Turn::Stop,
            _ => Turn::Idle,
        })
        .await
        .unwrap();
        assert_eq!(*turns.borrow(), [0, 1, 0, 1, 0, 1]);
    });
}

#[test]
fn another_thread_wakes_a_parked_shard() {
    let (tell, told) = mpsc::channel();
    let turns = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&turns);
    let shard = start_shard(ThreadOptions::default(), move |ring, runtime| async move {
        tell.send(ring.waker()).unwrap();
        let options = HostOptions { spin_us: 0, slice_us: 200 };
        host(&ring, &runtime, options, |_, _| match counted.fetch_add(1, Ordering::SeqCst) {
            200.. => Turn::Stop,
            _ => Turn::Idle,
        })
        .await
        .unwrap();
    })
    .unwrap();
    let waker = told.recv().unwrap();
    while turns.load(Ordering::SeqCst) <= 200 {
        let before = turns.load(Ordering::SeqCst);
        waker.wake();
        let mut tries = 0u64;
        while turns.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
            tries += 1;
            assert!(tries < 100_000_000, "the wake-up was lost");
        }
    }
    shard.join().unwrap().unwrap();
}

/// CPU time of the calling thread, in nanoseconds.
fn cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a writable timespec that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[test]
fn an_idle_shard_with_a_background_task_costs_next_to_nothing() {
    let (cpu, wall) = on_shard(|ring, runtime| async move {
        let inner = runtime.clone();
        runtime.spawn(Class::Background, async move {
            loop {
                inner.sleep_until(inner.now().after_nanos(100 * MS)).await;
            }
        });
        let sleeper = runtime.clone();
        // The first half second is for the spin to fade.
        let (mut from, mut start) = (0, Instant(0));
        drive(&ring, &runtime, async {
            sleeper.sleep_until(sleeper.now().after_nanos(300 * MS)).await;
            (from, start) = (cpu_ns(), sleeper.now());
            sleeper.sleep_until(sleeper.now().after_nanos(1000 * MS)).await;
        })
        .await
        .unwrap();
        (cpu_ns() - from, sleeper.now().nanos_since(start))
    });
    assert!(cpu * 200 < wall, "idle took {cpu} ns of {wall} ns");
}

#[test]
fn another_thread_ends_a_wait_in_the_ring_each_time() {
    on_shard(|ring, _| async move {
        let (done, is_done) = mpsc::channel::<()>();
        let waker = ring.waker();
        let other = std::thread::spawn(move || {
            let pause = Duration::from_micros(300);
            while is_done.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Timeout) {
                waker.wake();
            }
        });
        // A wait that nothing ends lasts a millisecond, so most of these end by a wake-up.
        let (mut woken, mut completions) = (0, Vec::new());
        while woken < 100 {
            ring.signal().clear();
            ring.turn(&mut completions);
            ring.wait(u64::MAX);
            woken += u32::from(ring.is_ready());
        }
        drop(done);
        other.join().unwrap();
        // With nobody to wake it, a wait ends by itself.
        for _ in 0..2 {
            ring.signal().clear();
            ring.turn(&mut completions);
        }
        ring.wait(100_000);
        assert!(!ring.is_ready() && completions.is_empty());
    });
}

#[test]
fn an_error_names_operation_and_file() {
    on_disk(|disk, folder| async move {
        let path = folder.join("a");
        drop(create(&disk, &path).await);
        let file = disk.open(&path, OpenMode::Read).await.unwrap();
        let (_, refused) = file.write_at(4096, filled(4096, 0), WriteMode::Cached).await;
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("write 4096 bytes at offset 4096") && text.contains("/a"), "{text}");
    });
}

#[test]
fn a_turn_that_asks_for_a_time_gets_it_while_the_shard_is_parked() {
    let (turns, took) = on_shard(|ring, runtime| async move {
        let start = runtime.now();
        let wanted = start.after_nanos(20 * MS);
        let mut turns = 0;
        host(&ring, &runtime, HostOptions::default(), |now, _| {
            turns += 1;
            if now >= wanted { Turn::Stop } else { Turn::IdleUntil(wanted) }
        })
        .await
        .unwrap();
        (turns, runtime.now().nanos_since(start))
    });
    assert!(took >= 20 * MS && turns < 20, "{turns} turns in {took} ns");
}
