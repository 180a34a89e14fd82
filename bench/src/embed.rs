//! `annulus-bench embed`: the engine of one shard without a network, on one core, under the phases
//! that `bench/rivals` runs on RocksDB. One line of JSON a phase, with the same names.
//!
//! Invariant: keys, values, phases and formulas are those of `bench/rivals/src/main.rs`; "in
//! flight" is concurrent tasks on the one core here, and threads there.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use annulus_engine::disk::Disk;
use annulus_engine::driver::{RingDisk, ShardRuntime, ThreadOptions, drive, start_shard};
use annulus_engine::identity::Identity;
use annulus_engine::model::{Instant, NamespaceId, OriginId, Token};
use annulus_engine::options::{Compression, Durability, Options};
use annulus_engine::runtime::{Class, Runtime};
use annulus_engine::shard::{Condition, Merge, Mutation, Probe, Shard};
use annulus_engine::{Error, Result};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::keys::{Chance, mix};
use crate::usage;

const NAMESPACE: NamespaceId = NamespaceId(0);
const HASH_SEED: u64 = 1;
const SECOND: u64 = 1_000_000_000;
/// Warming before reads are measured.
const WARM_NANOS: u64 = 3 * SECOND;
/// Longest wait for compaction to go quiet.
const SETTLE_NANOS: u64 = 120 * SECOND;
/// Operations that need no wait, after which a task lets others run.
const SLICE: u64 = 16;
const FILLER_SIZE: usize = 1 << 20;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// Writes each key once.
    Load,
    /// Reads keys that exist.
    Get,
    /// Reads keys that do not.
    Absent,
    /// Writes random keys again while paced readers measure.
    Overwrite,
    /// Writes random keys, each acknowledged when it is on the disk.
    Sync,
    /// Opens the shard and reads one key.
    Open,
}

/// Flags of `embed`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  annulus-bench embed load --dir /tmp/annulus-embed && \
    annulus-bench embed get --dir /tmp/annulus-embed --inflight 32 --core 0")]
pub struct EmbedArgs {
    /// What to measure.
    phase: Phase,
    /// Directory of the shard; `load` makes it.
    #[arg(long)]
    dir: PathBuf,
    /// Keys.
    #[arg(long, default_value_t = 5_000_000)]
    keys: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 1024)]
    value_size: usize,
    /// Concurrent reads, or durable writes.
    #[arg(long, default_value_t = 32)]
    inflight: usize,
    /// How long `get`, `absent` and `sync` measure.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Millions of bytes that `overwrite` writes.
    #[arg(long, default_value_t = 2500)]
    overwrite_mb: u64,
    /// Reads a second during `overwrite`.
    #[arg(long, default_value_t = 2000)]
    reads_per_second: u64,
    /// Block cache, in MiB.
    #[arg(long, default_value_t = 256)]
    cache_mb: usize,
    /// Memtable, in MiB.
    #[arg(long, default_value_t = 64)]
    memtable_mb: usize,
    /// Compress blocks with LZ4; the rival's are not compressed.
    #[arg(long)]
    compress: bool,
    /// Core to run on. Default: the kernel's choice.
    #[arg(long)]
    core: Option<usize>,
}

type Engine = Shard<RingDisk, ShardRuntime>;

/// Present keys have even ids, absent ones odd ids, spread among them.
fn key(id: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(id).to_be_bytes());
    bytes[8..].copy_from_slice(&id.to_be_bytes());
    bytes
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 600 * SECOND, 3).expect("bounds are valid")
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Latency {
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

fn latency(times: &Histogram<u64>) -> Latency {
    let at = |quantile: f64| times.value_at_quantile(quantile) as f64 / 1000.0;
    let max = times.max() as f64 / 1000.0;
    Latency { p50: at(0.5), p99: at(0.99), p999: at(0.999), max }
}

/// The line of a reading phase.
#[derive(Debug, Serialize)]
struct ReadLine {
    engine: &'static str,
    phase: &'static str,
    inflight: usize,
    ops_per_second: f64,
    cpu_us_per_op: f64,
    device_reads_per_op: f64,
    /// By the engine's own count, which no neighbour disturbs.
    blocks_read_per_op: f64,
    hits: f64,
    latency_us: Latency,
}

/// The line of a writing phase.
#[derive(Debug, Serialize)]
struct WriteLine {
    engine: &'static str,
    phase: &'static str,
    inflight: usize,
    ops_per_second: f64,
    cpu_us_per_op: f64,
    write_amplification: f64,
    /// Flushes and compactions alone, by the engine's own count.
    table_write_amplification: f64,
    space_before_settling: f64,
    space: f64,
    /// Live tables alone: the log's recycled segments are a constant, not a factor.
    table_space: f64,
    put_latency_us: Latency,
    get_latency_us: Latency,
    /// Reads of `overwrite` that came later than they were due do not hide: from the due time.
    get_latency_from_due_us: Latency,
}

/// The line of `open`.
#[derive(Debug, Serialize)]
struct OpenLine {
    engine: &'static str,
    phase: &'static str,
    open_ms: f64,
    hit: bool,
    log_replay_bytes: u64,
}

/// What the process and the device have done so far.
#[derive(Clone, Copy, Debug)]
struct Used {
    at: Instant,
    cpu_us: f64,
    written_bytes: f64,
    device_reads: u64,
    blocks_read: u64,
    table_bytes: u64,
}

fn device_reads() -> u64 {
    let stats = fs::read_to_string("/proc/diskstats").unwrap_or_default();
    let is_disk = |line: &&str| {
        let name = line.split_whitespace().nth(2).unwrap_or_default();
        !name.is_empty() && !name.starts_with("loop") && Path::new("/sys/block").join(name).exists()
    };
    let reads = |line: &str| line.split_whitespace().nth(3)?.parse::<u64>().ok();
    stats.lines().filter(is_disk).filter_map(reads).sum()
}

/// Bytes that a directory's files take, with all below it.
fn disk_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let data = entry.metadata().ok()?;
            Some(if data.is_dir() { disk_bytes(&entry.path()) } else { data.blocks() * 512 })
        })
        .sum()
}

/// A run: the open shard and what its tasks share.
struct Bench {
    args: EmbedArgs,
    shard: Engine,
    runtime: ShardRuntime,
    filler: Vec<u8>,
    stop: Cell<bool>,
    tasks: Cell<usize>,
    failure: RefCell<Option<Error>>,
}

/// What reading tasks gather.
#[derive(Debug)]
struct Reads {
    times: Histogram<u64>,
    from_due: Histogram<u64>,
    hits: u64,
}

impl Reads {
    fn new() -> Reads {
        Reads { times: histogram(), from_due: histogram(), hits: 0 }
    }

    fn add(&mut self, start: Instant, due: Option<Instant>, end: Instant, hit: bool) {
        self.times.saturating_record(end.nanos_since(start));
        if let Some(due) = due {
            self.from_due.saturating_record(end.nanos_since(due));
        }
        self.hits += u64::from(hit);
    }
}

impl Bench {
    fn used(&self) -> Used {
        let process = usage::of_process(std::process::id());
        let stats = self.shard.stats();
        Used {
            at: self.runtime.now(),
            cpu_us: process.cpu_us.unwrap_or(0.0),
            written_bytes: process.written_bytes.unwrap_or(0.0),
            device_reads: device_reads(),
            blocks_read: stats.counters.blocks_read,
            table_bytes: stats.counters.flushed_bytes + stats.compacted_bytes,
        }
    }

    /// Starts a task that ends when it is told to, or at an error.
    fn spawn(self: &Rc<Self>, task: impl Future<Output = Result<()>> + 'static) {
        self.tasks.set(self.tasks.get() + 1);
        let bench = Rc::clone(self);
        self.runtime.spawn(Class::Foreground, async move {
            if let Err(error) = task.await {
                bench.stop.set(true);
                bench.failure.borrow_mut().get_or_insert(error);
            }
            bench.tasks.set(bench.tasks.get() - 1);
        });
    }

    async fn sleep(&self, nanos: u64) {
        self.runtime.sleep_until(self.runtime.now().after_nanos(nanos)).await;
    }

    /// Waits for the tasks to end.
    async fn join(&self) -> Result<()> {
        while self.tasks.get() > 0 {
            self.sleep(1_000_000).await;
        }
        self.failure.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Reads one key; whether it was there, and whether the disk was asked.
    async fn read(&self, id: u64) -> Result<(bool, bool)> {
        let key = key(id);
        let token = Token::of_key(&key, HASH_SEED);
        match self.shard.probe(token, NAMESPACE, &key, |found| found.is_some()) {
            Probe::Done(hit) => Ok((hit, false)),
            Probe::Pending(pending) => {
                Ok((pending.finish(&self.shard).await?.record().is_some(), true))
            }
        }
    }

    /// Reads random keys in a closed loop, or, with a rate, no faster than that.
    async fn reader(
        self: Rc<Self>,
        index: u64,
        odd: u64,
        rate: Option<f64>,
        reads: Rc<RefCell<Reads>>,
    ) -> Result<()> {
        let mut chance = Chance::new(mix(index + 77));
        let begin = self.runtime.now();
        let (mut count, mut quick) = (0u64, 0);
        while !self.stop.get() {
            let mut due = None;
            if let Some(rate) = rate {
                let at = begin.after_nanos(nanos(count as f64 / rate * SECOND as f64));
                self.runtime.sleep_until(at).await;
                due = Some(at);
            }
            count += 1;
            let id = chance.below(self.args.keys) * 2 + odd;
            let start = self.runtime.now();
            let (hit, waited) = self.read(id).await?;
            let end = self.runtime.now();
            reads.borrow_mut().add(start, due, end, hit);
            quick = if waited { 0 } else { quick + 1 };
            if quick == SLICE {
                quick = 0;
                self.runtime.yield_now().await;
            }
        }
        Ok(())
    }

    /// Writes one key; returns when a client would be answered.
    async fn put(&self, id: u64, value: &[u8], durable: bool) -> Result<()> {
        let key = key(id);
        let mutation = Mutation {
            token: Token::of_key(&key, HASH_SEED),
            namespace: NAMESPACE,
            merge: Merge::LastWriteWins,
            key: &key,
            value: Some(value.into()),
            expiry_ms: 0,
            context: None,
            condition: Condition::None,
        };
        let applied = loop {
            match self.shard.apply(&mutation, self.runtime.wall()) {
                // As a server's client would: again, a little later.
                Err(Error::Busy { .. }) => self.sleep(100_000).await,
                other => break other?,
            }
        };
        let now = self.runtime.now();
        let delay = self.shard.write_delay_nanos(key.len() + value.len(), now);
        if durable {
            self.shard.wait_visible(applied.lsn).await?;
        }
        if delay > 0 {
            self.runtime.sleep_until(now.after_nanos(delay)).await;
        }
        Ok(())
    }

    /// Writes until `limit` bytes were given out.
    async fn writer(
        self: Rc<Self>,
        index: u64,
        limit: u64,
        given: Rc<Cell<u64>>,
        times: Rc<RefCell<Histogram<u64>>>,
    ) -> Result<()> {
        let record = 16 + self.args.value_size as u64;
        let (load, durable) = (self.args.phase == Phase::Load, self.args.phase == Phase::Sync);
        let mut chance = Chance::new(mix(index + 5));
        let mut count = 0;
        while !self.stop.get() && given.get() < limit {
            let written = given.replace(given.get() + record);
            let id = if load { written / record } else { chance.below(self.args.keys) };
            let from = usize::try_from(chance.below(FILLER_SIZE as u64)).expect("a small size");
            let value = &self.filler[from..from + self.args.value_size];
            let start = self.runtime.now();
            self.put(id * 2, value, durable).await?;
            let taken = self.runtime.now().nanos_since(start);
            times.borrow_mut().saturating_record(taken);
            count += 1;
            if count % SLICE == 0 {
                self.runtime.yield_now().await;
            }
        }
        Ok(())
    }

    /// Flushes, and waits until compaction has nothing more to do.
    async fn settle(&self) -> Result<()> {
        self.shard.flush().await?;
        let begin = self.runtime.now();
        let (mut quiet, mut last) = (0, (0, 0));
        while quiet < 10 && self.runtime.now().nanos_since(begin) < SETTLE_NANOS {
            let stats = self.shard.stats();
            let done = (stats.compaction_read_bytes, stats.compacted_bytes);
            quiet = if done == last { quiet + 1 } else { 0 };
            last = done;
            self.sleep(SECOND / 10).await;
        }
        Ok(())
    }

    async fn run_reads(self: &Rc<Self>) -> Result<ReadLine> {
        let odd = u64::from(self.args.phase == Phase::Absent);
        let reads = Rc::new(RefCell::new(Reads::new()));
        for index in 0..self.args.inflight as u64 {
            let reads = Rc::clone(&reads);
            self.spawn(Rc::clone(self).reader(index, odd, None, reads));
        }
        self.sleep(WARM_NANOS).await;
        *reads.borrow_mut() = Reads::new();
        let before = self.used();
        self.sleep(self.args.seconds * SECOND).await;
        let after = self.used();
        let reads = std::mem::replace(&mut *reads.borrow_mut(), Reads::new());
        self.stop.set(true);
        self.join().await?;
        let ops = reads.times.len().max(1) as f64;
        Ok(ReadLine {
            engine: "annulus",
            phase: if odd == 1 { "absent" } else { "get" },
            inflight: self.args.inflight,
            ops_per_second: ops / seconds(&before, &after),
            cpu_us_per_op: (after.cpu_us - before.cpu_us) / ops,
            device_reads_per_op: (after.device_reads - before.device_reads) as f64 / ops,
            blocks_read_per_op: (after.blocks_read - before.blocks_read) as f64 / ops,
            hits: reads.hits as f64 / ops,
            latency_us: latency(&reads.times),
        })
    }

    async fn run_writes(self: &Rc<Self>) -> Result<WriteLine> {
        let record = 16 + self.args.value_size as u64;
        let (limit, phase) = match self.args.phase {
            Phase::Load => (self.args.keys * record, "load"),
            Phase::Overwrite => (self.args.overwrite_mb * 1_000_000, "overwrite"),
            _ => (u64::MAX, "sync"),
        };
        let durable = phase == "sync";
        let writers = if durable { self.args.inflight } else { 2 };
        let given = Rc::new(Cell::new(0));
        let times = Rc::new(RefCell::new(histogram()));
        let reads = Rc::new(RefCell::new(Reads::new()));
        let before = self.used();
        for index in 0..writers as u64 {
            let (given, times) = (Rc::clone(&given), Rc::clone(&times));
            self.spawn(Rc::clone(self).writer(index, limit, given, times));
        }
        let readers = Rc::new(Cell::new(0usize));
        if phase == "overwrite" {
            let rate = self.args.reads_per_second as f64 / 2.0;
            for index in 0..2 {
                let (readers, reads) = (Rc::clone(&readers), Rc::clone(&reads));
                readers.set(readers.get() + 1);
                self.spawn(Rc::clone(self).reader(index, 0, Some(rate), reads));
            }
        }
        if durable {
            self.sleep(self.args.seconds * SECOND).await;
            self.stop.set(true);
        }
        // The readers go on until the last write.
        while self.tasks.get() > readers.get() && !self.stop.get() {
            self.sleep(1_000_000).await;
        }
        self.stop.set(true);
        self.join().await?;
        let written = self.used();
        let space_before = disk_bytes(&self.args.dir);
        self.settle().await?;
        let after = self.used();
        let (times, reads) = (times.borrow(), reads.borrow());
        let ops = times.len().max(1) as f64;
        let live = (self.args.keys * record) as f64;
        let user_bytes = ops * record as f64;
        Ok(WriteLine {
            engine: "annulus",
            phase,
            inflight: writers,
            ops_per_second: ops / seconds(&before, &written),
            cpu_us_per_op: (after.cpu_us - before.cpu_us) / ops,
            write_amplification: (after.written_bytes - before.written_bytes) / user_bytes,
            table_write_amplification: (after.table_bytes - before.table_bytes) as f64 / user_bytes,
            space_before_settling: space_before as f64 / live,
            space: disk_bytes(&self.args.dir) as f64 / live,
            table_space: self.shard.stats().table_bytes as f64 / live,
            put_latency_us: latency(&times),
            get_latency_us: latency(&reads.times),
            get_latency_from_due_us: latency(&reads.from_due),
        })
    }
}

fn seconds(before: &Used, after: &Used) -> f64 {
    after.at.nanos_since(before.at) as f64 / SECOND as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time ahead, in ns")]
fn nanos(value: f64) -> u64 {
    value as u64
}

fn options(args: &EmbedArgs) -> Options {
    let mut options = Options {
        cache_size: args.cache_mb << 20,
        memtable_size: args.memtable_mb << 20,
        compression: if args.compress { Compression::Lz4 } else { Compression::None },
        ..Options::default()
    };
    // RocksDB's default: a killed process loses nothing, a power cut may.
    if args.phase != Phase::Sync {
        options.log.durability = Durability::Periodic { window_ms: 1000 };
    }
    options
}

async fn measure(disk: RingDisk, runtime: ShardRuntime, args: EmbedArgs) -> Result<String> {
    disk.create_dir(&args.dir).await?;
    let _lock = disk.lock(&args.dir).await?;
    let options = options(&args);
    let identity = Identity {
        cluster: 1,
        node: OriginId(1),
        shard: 0,
        shard_count: 1,
        hash_seed: HASH_SEED,
        partition_bits: options.partition_bits,
        created: runtime.wall(),
    };
    let dir = args.dir.join("shard-000");
    let begin = runtime.now();
    let shard = Shard::open(disk, runtime.clone(), &dir, &identity, options, None).await?;
    let mut chance = Chance::new(9);
    let filler = (0..(FILLER_SIZE + args.value_size).div_ceil(8))
        .flat_map(|_| chance.next_u64().to_le_bytes())
        .collect();
    let phase = args.phase;
    let bench = Rc::new(Bench {
        args,
        shard,
        runtime,
        filler,
        stop: Cell::new(false),
        tasks: Cell::new(0),
        failure: RefCell::new(None),
    });
    let line = match phase {
        Phase::Get | Phase::Absent => to_json(&bench.run_reads().await?),
        Phase::Load | Phase::Overwrite | Phase::Sync => to_json(&bench.run_writes().await?),
        Phase::Open => {
            let hit = bench.read(0).await?.0;
            let taken = bench.runtime.now().nanos_since(begin);
            to_json(&OpenLine {
                engine: "annulus",
                phase: "open",
                open_ms: taken as f64 / 1e6,
                hit,
                log_replay_bytes: bench.shard.stats().log_replay_bytes,
            })
        }
    };
    bench.shard.close().await?;
    Ok(line)
}

fn to_json(line: &impl Serialize) -> String {
    serde_json::to_string(line).expect("a line is plain data")
}

/// Measures one phase and prints its line.
#[must_use]
pub fn main(args: &EmbedArgs) -> ExitCode {
    let args = args.clone();
    let thread = ThreadOptions { core: args.core, name: "embed".into(), ..Default::default() };
    let run = start_shard(thread, move |ring, runtime| async move {
        let disk = RingDisk::new(&ring);
        match drive(&ring, &runtime, measure(disk, runtime.clone(), args)).await {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(error)) | Err(error) => Err(error.to_string()),
        }
    });
    let line = match run {
        Ok(thread) => thread.join().expect("the shard's thread does not panic").flatten(),
        Err(error) => Err(error.to_string()),
    };
    match line {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("annulus-bench: {error}");
            ExitCode::from(2)
        }
    }
}
