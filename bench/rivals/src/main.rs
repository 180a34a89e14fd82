//! RocksDB, embedded, under the phases that `annulus-bench embed` runs on our engine.
//!
//! `annulus-rivals PHASE --dir D [--keys N] [--value-size B] [--inflight T] [--seconds S]`
//! Phases: `load`, `get`, `absent`, `overwrite`, `sync`, `open`. One line of JSON a phase, with
//! the same names as ours. "In flight" is threads here, because RocksDB's gets block.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Longest wait for compaction to go quiet, in seconds.
const SETTLE_SECONDS: u64 = 120;

struct Options {
    dir: String,
    keys: u64,
    value_size: usize,
    inflight: usize,
    seconds: u64,
    overwrite_bytes: u64,
    reads_per_second: u64,
    cache_bytes: usize,
}

fn options(mut args: impl Iterator<Item = String>) -> Options {
    let mut given = BTreeMap::new();
    while let Some(name) = args.next() {
        let value = args.next().unwrap_or_else(|| panic!("{name} needs a value"));
        given.insert(name.trim_start_matches('-').to_owned(), value);
    }
    let number = |name: &str, default: u64| {
        given.get(name).map_or(default, |text| {
            text.parse().unwrap_or_else(|_| panic!("--{name} needs a number, not {text}"))
        })
    };
    Options {
        dir: given.get("dir").expect("--dir DIR").clone(),
        keys: number("keys", 5_000_000),
        value_size: number("value-size", 1024) as usize,
        inflight: number("inflight", 32) as usize,
        seconds: number("seconds", 10),
        overwrite_bytes: number("overwrite-mb", 2500) * 1_000_000,
        reads_per_second: number("reads-per-second", 2000),
        cache_bytes: (number("cache-mb", 256) as usize) << 20,
    }
}

/// splitmix64; the same keys as our side.
fn mix(x: u64) -> u64 {
    let mut h = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ (h >> 31)
}

/// Present keys have even ids, absent ones odd ids, spread among them.
fn key(id: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(id).to_be_bytes());
    bytes[8..].copy_from_slice(&id.to_be_bytes());
    bytes
}

struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

fn open(options: &Options) -> rocksdb::DB {
    use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType};
    let mut config = rocksdb::Options::default();
    config.create_if_missing(true);
    config.set_compression_type(DBCompressionType::None);
    config.set_use_direct_reads(true);
    config.set_use_direct_io_for_flush_and_compaction(true);
    config.set_write_buffer_size(64 << 20);
    config.set_max_write_buffer_number(4);
    config.set_max_background_jobs(2);
    config.set_target_file_size_base(64 << 20);
    config.set_max_bytes_for_level_base(256 << 20);
    config.set_level_compaction_dynamic_level_bytes(true);
    config.set_bytes_per_sync(1 << 20);
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(options.cache_bytes).expect("a cache"));
    table.set_block_size(4096);
    table.set_bloom_filter(10.0, false);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(5);
    config.set_block_based_table_factory(&table);
    // `open_cf` would give the column family default options: no filter, a tiny cache.
    let family = ColumnFamilyDescriptor::new("default", config.clone());
    DB::open_cf_descriptors(&config, &options.dir, [family]).expect("open RocksDB")
}

fn settle(db: &rocksdb::DB) {
    db.flush().expect("flush");
    let property = |name: &str| db.property_int_value(name).expect("property").unwrap_or(0);
    let begin = Instant::now();
    let mut quiet = 0;
    while quiet < 5 && begin.elapsed().as_secs() < SETTLE_SECONDS {
        let busy = property("rocksdb.num-running-compactions")
            + property("rocksdb.compaction-pending")
            + property("rocksdb.num-running-flushes")
            + property("rocksdb.mem-table-flush-pending");
        quiet = if busy == 0 { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What the process has used so far.
#[derive(Clone, Copy)]
struct Usage {
    at: Instant,
    cpu_us: f64,
    written_bytes: u64,
    device_reads: u64,
}

fn usage() -> Usage {
    // SAFETY: an all-zero rusage is valid, and the call only fills it.
    let used = unsafe {
        let mut used: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut used);
        used
    };
    let micros = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes:"));
    let stats = std::fs::read_to_string("/proc/diskstats").unwrap_or_default();
    let reads = stats
        .lines()
        .filter(|line| {
            let name = line.split_whitespace().nth(2).unwrap_or("");
            Path::new("/sys/block").join(name).exists() && !name.starts_with("loop")
        })
        .filter_map(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok())
        .sum();
    Usage {
        at: Instant::now(),
        cpu_us: micros(used.ru_utime) + micros(used.ru_stime),
        written_bytes: written.and_then(|n| n.trim().parse().ok()).unwrap_or(0),
        device_reads: reads,
    }
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|data| data.blocks() * 512).sum()
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 600_000_000_000, 3).expect("bounds are valid")
}

fn latency(histogram: &Histogram<u64>) -> String {
    let at = |q: f64| histogram.value_at_quantile(q) as f64 / 1000.0;
    format!(
        r#"{{"p50":{:.1},"p99":{:.1},"p999":{:.1},"max":{:.1}}}"#,
        at(0.5),
        at(0.99),
        at(0.999),
        histogram.max() as f64 / 1000.0
    )
}

/// Gets in a closed loop from `inflight` threads until told to stop.
fn readers(
    db: &Arc<rocksdb::DB>,
    options: &Options,
    odd: u64,
    pace: Option<u64>,
    threads: usize,
    stop: &Arc<AtomicBool>,
) -> Vec<std::thread::JoinHandle<(Histogram<u64>, u64)>> {
    let spawn = |thread: usize| {
        let (db, stop, keys) = (Arc::clone(db), Arc::clone(stop), options.keys);
        let per_thread = pace.map(|rate| rate as f64 / threads as f64);
        std::thread::spawn(move || {
            let (mut times, mut hits, mut count) = (histogram(), 0, 0u64);
            let mut chance = Chance(mix(thread as u64 + 77));
            let begin = Instant::now();
            while !stop.load(Relaxed) {
                if let Some(rate) = per_thread {
                    let due = begin + Duration::from_secs_f64(count as f64 / rate);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                count += 1;
                let id = chance.below(keys) * 2 + odd;
                let start = Instant::now();
                hits += u64::from(db.get_pinned(key(id)).expect("get").is_some());
                times.saturating_record(start.elapsed().as_nanos() as u64);
            }
            (times, hits)
        })
    };
    (0..threads).map(spawn).collect()
}

fn get(options: &Options, odd: u64) {
    let db = Arc::new(open(options));
    let warm = Arc::new(AtomicBool::new(false));
    let warmers = readers(&db, options, odd, None, options.inflight, &warm);
    std::thread::sleep(Duration::from_secs(3));
    warm.store(true, Relaxed);
    warmers.into_iter().for_each(|thread| drop(thread.join()));
    let stop = Arc::new(AtomicBool::new(false));
    let before = usage();
    let threads = readers(&db, options, odd, None, options.inflight, &stop);
    std::thread::sleep(Duration::from_secs(options.seconds));
    stop.store(true, Relaxed);
    let (mut times, mut hits) = (histogram(), 0);
    for thread in threads {
        let (part, found) = thread.join().expect("a reader");
        times.add(part).expect("equal bounds");
        hits += found;
    }
    let after = usage();
    let ops = times.len() as f64;
    println!(
        r#"{{"engine":"rocksdb","phase":"{}","inflight":{},"ops_per_second":{:.0},"cpu_us_per_op":{:.2},"device_reads_per_op":{:.4},"hits":{:.4},"latency_us":{}}}"#,
        if odd == 1 { "absent" } else { "get" },
        options.inflight,
        ops / (after.at - before.at).as_secs_f64(),
        (after.cpu_us - before.cpu_us) / ops,
        (after.device_reads - before.device_reads) as f64 / ops,
        hits as f64 / ops,
        latency(&times)
    );
}

fn write(options: &Options, phase: &str) {
    let db = Arc::new(open(options));
    let durable = phase == "sync";
    let record = 16 + options.value_size as u64;
    let limit = match phase {
        "load" => options.keys * record,
        "overwrite" => options.overwrite_bytes,
        _ => u64::MAX,
    };
    let threads = if durable { options.inflight } else { 2 };
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let times = Arc::new(Mutex::new(histogram()));
    let before = usage();
    let writers: Vec<_> = (0..threads)
        .map(|thread| {
            let (db, stop, done) = (Arc::clone(&db), Arc::clone(&stop), Arc::clone(&done));
            let (times, keys, size) = (Arc::clone(&times), options.keys, options.value_size);
            let load = phase == "load";
            std::thread::spawn(move || {
                let mut chance = Chance(mix(thread as u64 + 5));
                let filler: Vec<u8> = (0..(1 << 20) + size).map(|_| chance.next() as u8).collect();
                let mut mine = histogram();
                let mut how = rocksdb::WriteOptions::default();
                how.set_sync(durable);
                while !stop.load(Relaxed) {
                    let written = done.fetch_add(record, Relaxed);
                    if written >= limit {
                        break;
                    }
                    let id = if load { written / record } else { chance.below(keys) };
                    let from = chance.below(1 << 20) as usize;
                    let start = Instant::now();
                    db.put_opt(key(id * 2), &filler[from..from + size], &how).expect("put");
                    mine.saturating_record(start.elapsed().as_nanos() as u64);
                }
                times.lock().expect("no panic").add(mine).expect("equal bounds");
            })
        })
        .collect();
    let reading = if phase == "overwrite" {
        readers(&db, options, 0, Some(options.reads_per_second), 2, &stop)
    } else {
        Vec::new()
    };
    if durable {
        std::thread::sleep(Duration::from_secs(options.seconds));
        stop.store(true, Relaxed);
    }
    writers.into_iter().for_each(|thread| thread.join().expect("a writer"));
    stop.store(true, Relaxed);
    let seconds = before.at.elapsed().as_secs_f64();
    let mut reads = histogram();
    for thread in reading {
        reads.add(thread.join().expect("a reader").0).expect("equal bounds");
    }
    let space_before = disk_bytes(Path::new(&options.dir));
    settle(&db);
    let after = usage();
    let times = times.lock().expect("no panic");
    let live = options.keys * record;
    let user_bytes = times.len() * record;
    println!(
        r#"{{"engine":"rocksdb","phase":"{phase}","inflight":{threads},"ops_per_second":{:.0},"cpu_us_per_op":{:.2},"write_amplification":{:.2},"space_before_settling":{:.3},"space":{:.3},"put_latency_us":{},"get_latency_us":{}}}"#,
        times.len() as f64 / seconds,
        (after.cpu_us - before.cpu_us) / times.len() as f64,
        (after.written_bytes - before.written_bytes) as f64 / user_bytes as f64,
        space_before as f64 / live as f64,
        disk_bytes(Path::new(&options.dir)) as f64 / live as f64,
        latency(&times),
        latency(&reads)
    );
}

fn main() {
    let mut args = std::env::args().skip(1);
    let phase = args.next().expect("load, get, absent, overwrite, sync or open");
    let options = options(args);
    match phase.as_str() {
        "get" => get(&options, 0),
        "absent" => get(&options, 1),
        "load" | "overwrite" | "sync" => write(&options, &phase),
        "open" => {
            let begin = Instant::now();
            let db = open(&options);
            let hit = db.get_pinned(key(0)).expect("get").is_some();
            let ms = begin.elapsed().as_secs_f64() * 1e3;
            println!(r#"{{"engine":"rocksdb","phase":"open","open_ms":{ms:.1},"hit":{hit}}}"#);
        }
        other => panic!("no phase {other}: load, get, absent, overwrite, sync or open"),
    }
}
