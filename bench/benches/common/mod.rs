//! What the benches share: sizes for a smoke run, records, a table, hashes of results.
//!
//! `BENCH_SMOKE=1` makes each bench small and short: it shows that the bench works and that its
//! result is right, and its times mean nothing.

#![allow(dead_code, unreachable_pub, reason = "each bench uses a part of it")]

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use annulus_bench::keys::mix;
use annulus_engine::disk::{Disk, OpenMode};
use annulus_engine::model::{Dot, Kind, NamespaceId, OriginId, Record, Timestamp, Token};
use annulus_engine::sim::{SimDisk, SimDiskOptions, SimExecutor, SimFile};
use annulus_engine::sstable::{Codec, Table, TableId, TableIdentity, TableOptions, TableWriter};
use criterion::Criterion;

/// The namespace of all records.
pub const NAMESPACE: NamespaceId = NamespaceId(0);
/// The hash seed of all keys.
pub const SEED: u64 = 42;

/// Whether this is a smoke run.
pub fn smoke() -> bool {
    std::env::var_os("BENCH_SMOKE").is_some_and(|value| value != "0")
}

/// The real size, or the one of a smoke run.
pub fn size(real: usize, smoke_size: usize) -> usize {
    if smoke() { smoke_size } else { real }
}

/// Criterion with times fit for the run.
pub fn criterion() -> Criterion {
    let criterion = Criterion::default().without_plots();
    if smoke() {
        criterion
            .sample_size(10)
            .nresamples(1001)
            .warm_up_time(Duration::from_millis(10))
            .measurement_time(Duration::from_millis(50))
    } else {
        criterion.sample_size(30).measurement_time(Duration::from_secs(3))
    }
}

/// Folds what was computed into one number, so that two builds can be seen to agree.
#[derive(Debug, Default)]
pub struct Fold(u64);

impl Fold {
    /// Adds a number.
    pub fn add(&mut self, value: u64) {
        self.0 = mix(self.0 ^ value);
    }

    /// Adds bytes.
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.add(Token::of_key(bytes, SEED).0);
    }

    /// Prints the result.
    pub fn print(&self, of: impl Display) {
        println!("result hash of {of}: {:016x}", self.0);
    }
}

/// The key of an id.
pub fn key(id: u64) -> [u8; 16] {
    let mut key = *b"k000000000000000";
    let digits = format!("{id:015}");
    key[1..].copy_from_slice(digits.as_bytes());
    key
}

/// A record; equal ids make equal records.
pub fn record(id: u64, value_size: usize) -> Record {
    let key = key(id);
    let word = mix(id).to_le_bytes();
    Record {
        token: Token::of_key(&key, SEED),
        namespace: NAMESPACE,
        incarnation: 1,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(1), sequence: id + 1 },
        timestamp: Timestamp((id + 1) << 16),
        expiry_ms: 0,
        key: key.to_vec(),
        value: word.iter().copied().cycle().take(value_size).collect(),
    }
}

/// Records in the order of a table.
pub fn sorted_records(count: usize, value_size: usize) -> Vec<Record> {
    let mut records: Vec<_> = (0..count as u64).map(|id| record(id, value_size)).collect();
    records.sort_by(|a, b| (a.token, &a.key).cmp(&(b.token, &b.key)));
    records
}

/// A table on a simulated disk without latency, and what keeps it alive.
pub struct TableFixture {
    /// Runs what awaits.
    pub executor: SimExecutor,
    /// The table.
    pub table: Table<SimFile>,
}

/// Writes records, which are in order, as a table.
pub fn table(records: &[Record], codec: Codec) -> TableFixture {
    let executor = SimExecutor::new(1);
    let options = SimDiskOptions { latency_nanos_max: 0, ..SimDiskOptions::default() };
    let disk = SimDisk::new(&executor.runtime(), options);
    let path = PathBuf::from("bench.sst");
    let identity = TableIdentity { id: TableId(1), salt: 7, path: path.clone() };
    let options =
        TableOptions { codec_of: std::rc::Rc::new(move |_| codec), ..TableOptions::default() };
    let table = executor.run(async {
        let file = disk.open(&path, OpenMode::Create).await.expect("a new file");
        let mut writer = TableWriter::new(file.clone(), identity.clone(), options);
        for record in records {
            writer.append(&record.as_ref(), &async || ()).await.expect("records are in order");
            if writer.should_flush() {
                writer.flush().await.expect("the disk has no faults");
            }
        }
        writer.finish().await.expect("the disk has no faults");
        Table::open(file, identity).await.expect("the table is whole")
    });
    TableFixture { executor, table }
}

/// The next random position below `count`; a cheap generator for timed loops.
pub fn next(state: &mut u64, count: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let wide = u128::from(mix(*state)) * count as u128;
    usize::try_from(wide >> 64).expect("below count")
}
