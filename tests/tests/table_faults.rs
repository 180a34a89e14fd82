//! T11, T12, T14, T49 for one table: every damage, every failing operation. The answer is right
//! or an error that names the file; never wrong bytes, never "absent" for what is there.

#![expect(clippy::unwrap_used, reason = "a fixture that fails is a failed test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use annulus_engine::disk::{Disk, OpenMode};
use annulus_engine::model::{
    Dot, Kind, NamespaceId, OriginId, Record, Timestamp, Token, TokenRange,
};
use annulus_engine::sim::{Chance, Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor};
use annulus_engine::sstable::{
    Codec, Table, TableId, TableIdentity, TableOptions, TableScan, TableWriter, file_salt,
};
use annulus_engine::{Error, Result};
use annulus_tests::faults::Damage;

const PATH: &str = "table/0000000001.sst";

fn identity() -> TableIdentity {
    let id = TableId(1);
    TableIdentity { id, salt: file_salt(7, 0, id), path: PATH.into() }
}

/// Records of all kinds and sizes, in order; some share a token, one is larger than a block.
fn records(seed: u64, count: u64) -> Vec<Record> {
    let mut chance = Chance::new(seed);
    let mut records: Vec<Record> = (0..count)
        .map(|number| {
            let key = format!("key-{number}").into_bytes();
            let token = if number % 9 == 0 { Token(1 << 60) } else { Token::of_key(&key, seed) };
            let kind = if number % 7 == 0 { Kind::Delete } else { Kind::Put };
            let len = if number == 5 { 9_000 } else { chance.index(120) };
            let mut value = vec![b'v'; if kind == Kind::Delete { 0 } else { len }];
            if number % 2 == 0 {
                chance.fill(&mut value);
            }
            Record {
                token,
                namespace: NamespaceId(1 + u32::try_from(number % 2).unwrap()),
                incarnation: 1,
                kind,
                dot: Dot { origin: OriginId(1), sequence: number + 1 },
                timestamp: Timestamp(1000 + number),
                expiry_ms: if number % 5 == 0 { 77_000 } else { 0 },
                key,
                value,
            }
        })
        .collect();
    records.sort_by(|a, b| a.as_ref().cmp_by_key(&b.as_ref()));
    records
}

async fn write(disk: &SimDisk, records: &[Record], codec: Codec) -> Result<()> {
    disk.create_dir(Path::new("table")).await?;
    disk.sync_dir(Path::new("")).await?;
    let file = disk.open(Path::new(PATH), OpenMode::Create).await?;
    let options = TableOptions {
        block_size: 1024,
        codec_of: Rc::new(move |_| codec),
        partition_bits: 2,
        ..TableOptions::default()
    };
    let mut writer = TableWriter::new(file, identity(), options);
    for record in records {
        writer.append(&record.as_ref(), &async || ()).await?;
        writer.flush().await?;
    }
    writer.finish().await?;
    disk.sync_dir(Path::new("table")).await
}

async fn open(disk: &SimDisk) -> Result<Rc<Table<<SimDisk as Disk>::File>>> {
    let file = disk.open(Path::new(PATH), OpenMode::Read).await?;
    Ok(Rc::new(Table::open(file, identity()).await?))
}

struct Outcome {
    right: usize,
    errors: usize,
}

/// Reads every key, some absent ones, and everything by a scan. Panics at a wrong answer.
async fn read_all(disk: &SimDisk, records: &[Record], what: &str) -> Outcome {
    let mut outcome = Outcome { right: 0, errors: 0 };
    let table = match open(disk).await {
        Ok(table) => table,
        Err(error) => {
            assert_named(&error, what);
            return Outcome { right: 0, errors: 1 };
        }
    };
    for record in records {
        match table.get(record.token, record.namespace, &record.key).await {
            Ok(found) => {
                assert_eq!(found.as_ref(), Some(record), "{what}: a wrong answer");
                outcome.right += 1;
            }
            Err(error) => {
                assert_named(&error, what);
                outcome.errors += 1;
            }
        }
    }
    for number in 0..20u64 {
        let key = format!("absent-{number}").into_bytes();
        let found = table.get(Token::of_key(&key, 3), NamespaceId(1), &key).await;
        assert!(!matches!(found, Ok(Some(_))), "{what}: a key from nowhere");
    }
    let by_key: BTreeMap<_, _> = records.iter().map(|r| ((r.namespace, &r.key), r)).collect();
    let mut scan = TableScan::new(table, TokenRange::FULL, 4096);
    let (mut scanned, mut whole) = (0, true);
    loop {
        match scan.next_block().await {
            Ok(Some(block)) => {
                for record in block.iter() {
                    let expected = by_key[&(record.namespace, &record.key.to_vec())];
                    assert_eq!(&record.to_owned(), expected, "{what}: a wrong scan");
                    scanned += 1;
                }
            }
            Ok(None) => break,
            Err(error) => {
                assert_named(&error, what);
                whole = false;
            }
        }
    }
    assert!(!whole || scanned == records.len(), "{what}: the scan left records out silently");
    outcome
}

fn assert_named(error: &Error, what: &str) {
    assert!(error.to_string().contains("sst"), "{what}: which file? {error}");
}

fn damaged_answers_are_right_or_errors(codec: Codec, bit_stride: u64) {
    let executor = SimExecutor::new(1);
    let records = records(3, 60);
    let healthy = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
    executor.run(write(&healthy, &records, codec)).unwrap();
    let (path, len) = healthy.files()[0].clone();
    let outcome = executor.run(read_all(&healthy, &records, "healthy"));
    assert_eq!((outcome.right, outcome.errors), (60, 0));
    let (mut struck, mut noticed, mut served) = (0, 0, 0);
    for damage in Damage::all(len, bit_stride) {
        let disk = healthy.fork_onto(&executor.runtime());
        if damage.strike(&disk, &path) {
            let outcome = executor.run(read_all(&disk, &records, &format!("{damage:?}")));
            struck += 1;
            noticed += usize::from(outcome.errors > 0);
            served += usize::from(outcome.right > 0);
        }
    }
    println!("{codec:?}: {len} bytes, {struck} damages, {noticed} met, {served} served the rest");
    assert!(noticed * 2 > struck && served * 3 > struck);
}

#[test]
fn damage_of_a_plain_table_is_never_a_wrong_answer() {
    damaged_answers_are_right_or_errors(Codec::None, 97);
}

#[test]
fn damage_of_a_packed_table_is_never_a_wrong_answer() {
    damaged_answers_are_right_or_errors(Codec::Lz4, 211);
    damaged_answers_are_right_or_errors(Codec::Zstd, 211);
}

#[test]
fn reads_that_lie_are_never_believed() {
    let executor = SimExecutor::new(1);
    let records = records(3, 60);
    let healthy = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
    executor.run(write(&healthy, &records, Codec::Lz4)).unwrap();
    for fault in [Fault::FlipBit, Fault::Misdirect(512), Fault::Misdirect(-1024), Fault::Eio] {
        for nth in 1..40 {
            let disk = healthy.fork_onto(&executor.runtime());
            disk.inject(Rule::nth(Op::Read, nth, fault));
            executor.run(read_all(&disk, &records, &format!("{fault:?} at read {nth}")));
        }
    }
}

#[test]
fn a_write_that_fails_anywhere_is_an_error_and_leaves_no_table_to_believe_in() {
    let executor = SimExecutor::new(1);
    let records = records(3, 60);
    for fault in [Fault::Eio, Fault::NoSpace] {
        for nth in 1.. {
            let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(nth));
            disk.inject(Rule::nth_of_any(nth, fault));
            let written = executor.run(write(&disk, &records, Codec::Lz4));
            let struck = disk.op_log().iter().any(|record| record.fault.is_some());
            assert_eq!(written.is_err(), struck, "operation {nth}");
            if !struck {
                break;
            }
            disk.clear_faults();
            executor.run(async {
                if disk.read_file(Path::new(PATH)).is_some() {
                    read_all(&disk, &records, &format!("{fault:?} at operation {nth}")).await;
                }
            });
        }
    }
}
