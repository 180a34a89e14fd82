//! A measurement of the drivers alone: durable writes and random reads through `RingDisk`.
//!
//! `cargo run --release -p annulus-engine --example disk -- DIRECTORY [--work-us 20]`
//!
//! Writes a zeroed file of 256 MiB there and removes it again. Prints, for 1 and 4 tasks, durable
//! 512-byte writes with their median, and for 1, 32 and 128 tasks, random 4 KiB reads with their
//! CPU. With `--work-us` each turn of the shard computes that long, as a busy shard would: the
//! commits must not fall from thousands to hundreds a second. Beside it stand the figures of the
//! project's runtime notes: 173 us a lone commit, 3.0 us of CPU a read at depth 32, 2.2 at 128.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use annulus_engine::Error;
use annulus_engine::buffer::AlignedBuf;
use annulus_engine::disk::{Disk, File, OpenMode, WriteMode};
use annulus_engine::driver::{
    HostOptions, Ring, RingDisk, ShardRuntime, ThreadOptions, Turn, drive, host, start_shard,
};
use annulus_engine::runtime::{Class, Runtime};

type Failure = Box<dyn std::error::Error>;

const FILE_SIZE: u64 = 256 << 20;
const ZEROS: usize = 1 << 20;
const SECONDS: u64 = 2;

/// What one round does, again and again, in each of its tasks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Commit,
    Read,
}

fn cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a writable timespec that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap_or(0)
}

async fn make_file(disk: &RingDisk, path: &Path) -> Result<<RingDisk as Disk>::File, Error> {
    let file = disk.open(path, OpenMode::Create).await?;
    let mut zeros = AlignedBuf::zeroed(ZEROS);
    for offset in (0..FILE_SIZE).step_by(ZEROS) {
        let (buf, written) = file.write_at(offset, zeros, WriteMode::Cached).await;
        written?;
        zeros = buf;
    }
    file.sync().await?;
    Ok(file)
}

async fn round<F: File>(
    ring: &Ring,
    runtime: &ShardRuntime,
    file: &F,
    kind: Kind,
    tasks: u64,
    work_ns: u64,
) -> Result<(), Error> {
    let latencies = Rc::new(RefCell::new(Vec::with_capacity(1 << 20)));
    let left = Rc::new(Cell::new(tasks));
    let failure = Rc::new(RefCell::new(None));
    let end = runtime.now().after_nanos(SECONDS * 1_000_000_000);
    let (began, cpu) = (runtime.now(), cpu_ns());
    for task in 0..tasks {
        let (file, clock, latencies) = (file.clone(), runtime.clone(), Rc::clone(&latencies));
        let (left, failure) = (Rc::clone(&left), Rc::clone(&failure));
        runtime.spawn(Class::Foreground, async move {
            let unit = file.alignment() as u64;
            let mut buf = AlignedBuf::zeroed(file.alignment());
            let mut state = 0x9e37_79b9_7f4a_7c15 ^ (task + 1);
            let mut offset = task * (FILE_SIZE / 64 / 4096 * 4096);
            while clock.now() < end {
                let start = clock.now();
                let done = match kind {
                    Kind::Commit => {
                        offset = (offset + unit) % FILE_SIZE;
                        let (back, done) = file.write_at(offset, buf, WriteMode::Durable).await;
                        buf = back;
                        done
                    }
                    Kind::Read => {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        file.read_at(state % (FILE_SIZE / 4096) * 4096, 4096).await.map(drop)
                    }
                };
                if let Err(error) = done {
                    *failure.borrow_mut() = Some(error);
                    break;
                }
                latencies.borrow_mut().push(clock.now().nanos_since(start));
            }
            left.set(left.get() - 1);
        });
    }
    let turn = |_, _: &_| {
        if work_ns > 0 {
            let end = runtime.now().after_nanos(work_ns);
            while runtime.now() < end {}
        }
        match (left.get(), work_ns) {
            (0, _) => Turn::Stop,
            (_, 0) => Turn::Idle,
            _ => Turn::Busy,
        }
    };
    host(ring, runtime, HostOptions::default(), turn).await?;
    if let Some(error) = failure.take() {
        return Err(error);
    }
    let seconds = runtime.now().nanos_since(began) as f64 / 1e9;
    let cpu_us = (cpu_ns() - cpu) as f64 / 1e3;
    let mut latencies = latencies.take();
    latencies.sort_unstable();
    let count = latencies.len();
    let at = |part: usize| latencies.get(count * part / 100).map_or(0.0, |&ns| ns as f64 / 1e3);
    println!(
        "{} with {tasks} in flight: {:.0}/s, p50 {:.0} us, p99 {:.0} us, CPU {:.2} us each",
        if kind == Kind::Commit { "commits" } else { "reads" },
        count as f64 / seconds,
        at(50),
        at(99),
        cpu_us / count.max(1) as f64,
    );
    Ok(())
}

async fn measure(
    ring: Ring,
    runtime: ShardRuntime,
    path: PathBuf,
    work_ns: u64,
) -> Result<(), Error> {
    let disk = RingDisk::new(&ring);
    let file = drive(&ring, &runtime, make_file(&disk, &path)).await??;
    let rounds = [(Kind::Commit, 1), (Kind::Commit, 4), (Kind::Read, 1), (Kind::Read, 32)];
    for (kind, tasks) in rounds.into_iter().chain([(Kind::Read, 128)]) {
        round(&ring, &runtime, &file, kind, tasks, work_ns).await?;
    }
    drive(&ring, &runtime, disk.remove(&path)).await?
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or("which directory?")?;
    let work_us: u64 = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => 0,
        (Some("--work-us"), Some(value)) => value.parse()?,
        _ => return Err("only --work-us N is known".into()),
    };
    let path = Path::new(&directory).join("annulus-disk-measurement");
    let options =
        ThreadOptions { core: Some(0), name: "disk".to_owned(), ..ThreadOptions::default() };
    let shard = start_shard(options, move |ring, runtime| async move {
        measure(ring, runtime, path, work_us * 1000).await.map_err(|error| error.to_string())
    })?;
    shard.join().map_err(|_| "the shard's thread panicked")???;
    Ok(())
}
