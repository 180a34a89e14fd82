//! Tables as a whole: what is written is found, whatever the bytes went through.

mod long;

use std::rc::Rc;

use proptest::prelude::*;

use super::format::{SECTOR, TableMeta};
use super::testing::{MemFile, block_on, get, identity, open, record, write};
use super::{Codec, Table, TableIdentity, TableOptions, TableScan, TableWriter};
use crate::Error;
use crate::model::{Dot, Kind, NamespaceId, OriginId, Record, Timestamp, Token, TokenRange};

fn options(codec: Codec) -> TableOptions {
    TableOptions { codec_of: Rc::new(move |_| codec), ..TableOptions::default() }
}

fn sorted(mut records: Vec<Record>) -> Vec<Record> {
    records.sort_by(|a, b| a.as_ref().cmp_by_key(&b.as_ref()));
    records.dedup_by(|a, b| a.as_ref().cmp_by_key(&b.as_ref()).is_eq());
    records
}

/// Records with tokens spread over the ring.
fn spread(count: u64, value_len: usize) -> Vec<Record> {
    let one = |n: u64| record(Token(n + 1).remix(), &n.to_be_bytes(), &vec![b'v'; value_len]);
    sorted((0..count).map(one).collect())
}

/// Records of one token, and one before and behind.
fn one_token(count: u64, value_len: usize) -> Vec<Record> {
    let one = |n: u64| record(1 << 40, &n.to_be_bytes(), &vec![b'v'; value_len]);
    let mut records: Vec<Record> = (0..count).map(one).collect();
    records.push(record(5, b"before", b""));
    records.push(record(u64::MAX, b"behind", b"end"));
    sorted(records)
}

fn table_of(records: &[Record], options: TableOptions) -> (MemFile, Rc<Table<MemFile>>) {
    let file = MemFile::new(512);
    write(&file, records, options);
    let table = Rc::new(open(&file).unwrap());
    (file, table)
}

fn scan(table: &Rc<Table<MemFile>>, range: TokenRange, read_size: usize) -> Vec<Record> {
    let mut scan = TableScan::new(Rc::clone(table), range, read_size);
    let mut seen = Vec::new();
    while let Some(block) = block_on(scan.next_block()).unwrap() {
        seen.extend(block.iter_range(range).map(|record| record.to_owned()));
    }
    assert_eq!(scan.bytes_left(), 0);
    seen
}

#[test]
fn a_hit_costs_exactly_one_read() {
    for codec in Codec::ALL {
        for alignment in [512, 4096] {
            let file = MemFile::new(alignment);
            let records = spread(3000, 100);
            let meta = write(&file, &records, options(codec));
            let table = Rc::new(open(&file).unwrap());
            assert_eq!(*table.meta(), meta);
            for record in &records {
                file.reads.set(0);
                assert_eq!(get(&table, record).unwrap().as_ref(), Some(record));
                assert_eq!(file.reads.get(), 1);
            }
            assert_eq!(scan(&table, TokenRange::FULL, 64 << 10), records);
        }
    }
}

#[test]
fn a_hit_inside_a_run_of_one_token_costs_one_read_too() {
    let records = one_token(20_000, 10);
    let (file, table) = table_of(&records, TableOptions::default());
    assert!(table.meta().block_count > 100);
    for record in records.iter().step_by(37) {
        file.reads.set(0);
        assert_eq!(get(&table, record).unwrap().as_ref(), Some(record));
        assert_eq!(file.reads.get(), 1);
        let mut absent = record.clone();
        absent.key.push(0);
        assert_eq!(get(&table, &absent).unwrap(), None);
    }
    assert_eq!(scan(&table, TokenRange::FULL, 1), records);
}

#[test]
fn packed_blocks_are_near_the_target_and_smaller_in_sum() {
    let records = spread(5000, 400);
    let (_, plain) = table_of(&records, options(Codec::None));
    for codec in [Codec::Lz4, Codec::Zstd] {
        let (_, packed) = table_of(&records, options(codec));
        let (plain, packed) = (plain.meta(), packed.meta());
        assert!(packed.data_bytes * 3 < plain.data_bytes);
        assert!(packed.block_count * 3 < plain.block_count);
        assert_eq!(packed.raw_bytes, plain.raw_bytes);
    }
}

#[test]
fn what_does_not_pack_is_stored_as_it_is() {
    let noise =
        |n: u64| (0..50).flat_map(|i| Token(n * 64 + i + 1).remix().to_le_bytes()).collect();
    let mut records = spread(2000, 0);
    for (n, record) in (0..).zip(records.iter_mut()) {
        record.value = noise(n);
    }
    let (_, plain) = table_of(&records, options(Codec::None));
    let (_, packed) = table_of(&records, options(Codec::Lz4));
    assert!(packed.meta().data_bytes <= plain.meta().data_bytes * 21 / 20);
    assert_eq!(scan(&packed, TokenRange::FULL, 1 << 20), records);
}

#[test]
fn records_of_1_kib_take_hardly_more_than_their_bytes() {
    let (_, table) = table_of(&spread(4000, 1024), TableOptions::default());
    let meta = table.meta();
    let share = meta.data_bytes * 100 / meta.raw_bytes;
    assert!(share <= 102, "stored is {share} % of raw");
}

/// Reads that a hit costs: one, or one for each 256 KiB of a long block in parts. Parts end where
/// they end, so that a read has up to a part less. Of more than a value may have, which is not in
/// parts, it is two: the first is a look.
fn reads(table: &Table<MemFile>, record: &Record) -> usize {
    let handle = table.locate(record.token, record.namespace, &record.key).unwrap();
    match handle.len as usize {
        len if len <= 256 << 10 => 1,
        _ if record.kind != Kind::Put || record.value.len() > 16 << 20 => 2,
        len => (len - 1) / (240 << 10) + 1,
    }
}

#[test]
fn large_values_have_blocks_of_their_own() {
    for codec in Codec::ALL {
        let mut records = spread(40, 50);
        records[7].value = vec![3; 1 << 20];
        records[8].value = vec![4; (16 << 20) + 5000];
        records[20].key = vec![9; 4096];
        records[21].value = vec![5; 70_000];
        let (file, table) = table_of(&records, options(codec));
        for record in &records {
            file.reads.set(0);
            assert_eq!(get(&table, record).unwrap().as_ref(), Some(record));
            assert_eq!(file.reads.get(), reads(&table, record));
        }
        assert_eq!(scan(&table, TokenRange::FULL, 256 << 10), records);
    }
}

#[test]
fn what_breaks_the_rules_is_refused_and_changes_nothing() {
    block_on(async {
        let mut writer = TableWriter::new(MemFile::new(512), identity(), TableOptions::default());
        writer.add(&record(5, b"b", b"").as_ref()).unwrap();
        let long_key = vec![1; 4097];
        for bad in [
            record(5, b"b", b""),
            record(5, b"a", b""),
            record(4, b"z", b""),
            record(6, b"", b""),
            record(6, &long_key, b""),
        ] {
            assert!(matches!(writer.add(&bad.as_ref()), Err(Error::Invalid { .. })));
        }
        writer.add(&record(5, b"c", b"").as_ref()).unwrap();
        assert_eq!(writer.finish().await.unwrap().record_count, 2);

        let empty = TableWriter::new(MemFile::new(512), identity(), TableOptions::default());
        assert!(matches!(empty.finish().await, Err(Error::Invalid { .. })));
    });
}

/// A small table with every section in play: several blocks, a run of one token across blocks
/// (separators), an expiry, a tombstone.
fn small(codec: Codec) -> (Vec<u8>, Vec<Record>) {
    let mut records = one_token(40, 8);
    records.extend(spread(40, 20));
    let mut records = sorted(records);
    records[1].expiry_ms = 1 << 39;
    records[2].kind = Kind::Delete;
    records[2].value.clear();
    let file = MemFile::new(512);
    write(&file, &records, TableOptions { block_size: 512, partition_bits: 1, ..options(codec) });
    let bytes = file.bytes.borrow().clone();
    (bytes, records)
}

/// Opens the bytes and looks every record up: each answer is right or an error.
fn never_wrong(bytes: Vec<u8>, records: &[Record], story: &str) {
    let Ok(table) = open(&MemFile::of(bytes)) else { return };
    for record in records {
        if let Ok(found) = get(&table, record) {
            assert_eq!(found.as_ref(), Some(record), "{story}");
        }
    }
    let mut absent = records[0].clone();
    absent.key.push(1);
    assert_eq!(get(&table, &absent).unwrap_or(None), None, "{story}");
}

#[test]
fn a_flipped_bit_in_any_byte_gives_an_error_or_the_right_answer() {
    for codec in Codec::ALL {
        let (bytes, records) = small(codec);
        // The sections behind the blocks are alike for all codecs.
        let blocks = open(&MemFile::of(bytes.clone())).unwrap().meta().data_bytes;
        let end = if codec == Codec::None { bytes.len() } else { blocks.try_into().unwrap() };
        for at in 0..end {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            never_wrong(damaged, &records, &format!("{codec:?}, byte {at}"));
        }
    }
}

#[test]
fn a_zeroed_or_swapped_sector_gives_an_error_or_the_right_answer() {
    let (bytes, records) = small(Codec::None);
    let sectors = bytes.len() / SECTOR;
    for sector in 0..sectors {
        let mut zeroed = bytes.clone();
        zeroed[sector * SECTOR..][..SECTOR].fill(0);
        never_wrong(zeroed, &records, &format!("sector {sector} zeroed"));
        let mut swapped = bytes.clone();
        let other = (sector + 1) % sectors * SECTOR;
        swapped[other..][..SECTOR].copy_from_slice(&bytes[sector * SECTOR..][..SECTOR]);
        never_wrong(swapped, &records, &format!("sector {sector} written one further"));
    }
}

#[test]
fn a_cut_empty_or_longer_file_is_refused() {
    let (bytes, _) = small(Codec::Lz4);
    let cut = (0..bytes.len()).step_by(SECTOR).chain([1, 511, bytes.len() - 1]);
    let longer = [1, 511, 512, 4096].map(|more| bytes.len() + more);
    for len in cut.chain(longer) {
        let mut changed = bytes.clone();
        changed.resize(len, 0);
        let error = open(&MemFile::of(changed)).expect_err("another length");
        assert!(matches!(error, Error::Corrupt { .. }), "{len}: {error}");
    }
}

#[test]
fn another_table_shard_or_cluster_is_refused() {
    let (bytes, _) = small(Codec::None);
    let open_as = |identity: TableIdentity| {
        block_on(Table::open(MemFile::of(bytes.clone()), identity)).expect_err("not this table")
    };
    let other_id = super::TableId(8);
    let other =
        TableIdentity { id: other_id, salt: super::file_salt(1, 2, other_id), ..identity() };
    assert!(matches!(open_as(other), Error::Mismatch { .. }));
    for salt in [super::file_salt(1, 3, identity().id), super::file_salt(2, 2, identity().id)] {
        assert!(matches!(open_as(TableIdentity { salt, ..identity() }), Error::Corrupt { .. }));
    }
}

/// Where the filter and the index begin.
fn sections(meta: &TableMeta, bytes: &[u8]) -> (usize, usize) {
    let filter = usize::try_from(meta.data_bytes).unwrap();
    let len = u64::from_le_bytes(bytes[bytes.len() - SECTOR + 40..][..8].try_into().unwrap());
    (filter, filter + usize::try_from(len).unwrap())
}

#[test]
fn a_damaged_filter_or_index_is_rebuilt_from_the_blocks() {
    for codec in Codec::ALL {
        let (bytes, records) = small(codec);
        let sound = open(&MemFile::of(bytes.clone())).unwrap();
        let (filter, index) = sections(sound.meta(), &bytes);
        for at in [filter, index, index + 40] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            let table = open(&MemFile::of(damaged)).unwrap();
            for record in &records {
                assert_eq!(get(&table, record).unwrap().as_ref(), Some(record));
            }
            assert_eq!(table.index().block_count(), sound.index().block_count());
            let absent = (0..2000u64).filter(|n| table.may_contain(Token(Token(n + 9999).remix())));
            assert!(absent.count() < 200, "a rebuilt filter filters");
        }
    }
}

#[test]
fn a_damaged_block_under_a_damaged_filter_hides_nothing() {
    let (bytes, records) = small(Codec::None);
    let sound = open(&MemFile::of(bytes.clone())).unwrap();
    let (filter, index) = sections(sound.meta(), &bytes);
    let mut damaged = bytes.clone();
    damaged[filter + 70] ^= 1;
    damaged[20] ^= 1;
    let table = open(&MemFile::of(damaged.clone())).unwrap();
    assert!(matches!(get(&table, &records[0]), Err(Error::Corrupt { offset: 0, .. })));
    let last = records.last().unwrap();
    assert_eq!(get(&table, last).unwrap().as_ref(), Some(last));
    // Under a damaged index the place of the other blocks is not known.
    damaged[index] ^= 1;
    assert!(matches!(open(&MemFile::of(damaged)), Err(Error::Corrupt { .. })));
}

#[test]
fn a_scan_names_the_damage_and_goes_on_behind_it() {
    let (bytes, records) = small(Codec::None);
    let sound = open(&MemFile::of(bytes.clone())).unwrap();
    let second = sound.index().handle(1);
    let mut damaged = bytes;
    damaged[usize::try_from(second.offset).unwrap() + 100] ^= 1;
    let table = Rc::new(open(&MemFile::of(damaged)).unwrap());
    let mut scan = TableScan::new(table, TokenRange::FULL, 1 << 20);
    let (mut found, mut errors) = (0, Vec::new());
    loop {
        match block_on(scan.next_block()) {
            Ok(Some(block)) => found += block.len(),
            Ok(None) => break,
            Err(error) => errors.push(error.to_string()),
        }
    }
    assert_eq!(errors.len(), 1);
    let place = format!("0000000007.sst is damaged at offset {}", second.offset);
    assert!(errors[0].contains(&place), "{errors:?}");
    assert!(found < records.len() && found > records.len() / 2);
}

#[test]
fn a_newer_format_is_named_as_such() {
    let (mut bytes, _) = small(Codec::None);
    let at = bytes.len() - SECTOR;
    let mut footer: super::format::Footer = bytemuck::pod_read_unaligned(&bytes[at..]);
    footer.version = 3;
    footer.checksum = footer.expected_checksum(identity().salt);
    bytes[at..].copy_from_slice(bytemuck::bytes_of(&footer));
    let error = open(&MemFile::of(bytes)).expect_err("version 3");
    assert!(matches!(&error, Error::Mismatch { what, .. } if what.contains("format 3")), "{error}");
}

/// A dump of the lines that are not all zero: offset, sixteen bytes.
fn dump(bytes: &[u8]) -> String {
    let mut text = format!("length {}\n", bytes.len());
    for (line, part) in bytes.chunks(16).enumerate() {
        if part.iter().any(|byte| *byte != 0) {
            let hex: Vec<String> = part.iter().map(|byte| format!("{byte:02x}")).collect();
            text += &format!("{:06x} {}\n", line * 16, hex.join(" "));
        }
    }
    text
}

fn undump(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(len) = line.strip_prefix("length ") {
            bytes.resize(len.parse().unwrap(), 0);
            continue;
        }
        let (offset, hex) = line.split_once(' ').unwrap();
        let offset = usize::from_str_radix(offset, 16).unwrap();
        for (index, byte) in hex.split(' ').enumerate() {
            bytes[offset + index] = u8::from_str_radix(byte, 16).unwrap();
        }
    }
    bytes
}

/// The records of the golden table.
fn golden_records() -> Vec<Record> {
    let mut records = vec![
        record(0x1111_1111_1111_1111, b"first", b"value one"),
        record(0x8000_0000_0000_0000, b"run", &[0; 500]),
        record(0x8000_0000_0000_0000, b"run, too", b"a run of one token crosses blocks"),
        record(0x9999_9999_9999_9999, b"gone", b""),
    ];
    records[1].expiry_ms = 0x12_3456_7890;
    records[1].incarnation = 300;
    records[3].kind = Kind::Delete;
    records[3].namespace = NamespaceId(7);
    records[3].dot = Dot { origin: OriginId(9), sequence: 1 << 20 };
    records[3].timestamp = Timestamp(0x0102_0304_0506_0708);
    records
}

#[test]
fn bytes_of_version_1_are_as_they_were_and_can_be_read() {
    let golden = include_str!("golden_v1.txt");
    let file = MemFile::new(512);
    let options = TableOptions { block_size: 512, partition_bits: 1, ..TableOptions::default() };
    write(&file, &golden_records(), options);
    let written = dump(&file.bytes.borrow());
    let kept: String = golden
        .lines()
        .filter(|line| !line.starts_with('#'))
        .fold(String::new(), |text, line| text + line + "\n");
    assert_eq!(written, kept, "the format changed: a new version, and keep this file");
    let table = Rc::new(open(&MemFile::of(undump(golden))).unwrap());
    assert_eq!(scan(&table, TokenRange::FULL, 1 << 20), golden_records());
}

fn any_key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => prop::collection::vec(any::<u8>(), 1..12),
        1 => (any::<u8>(), 4000usize..=4096).prop_map(|(byte, len)| vec![byte; len]),
    ]
}

fn any_value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        60 => Just(Vec::new()),
        120 => prop::collection::vec(any::<u8>(), 0..200),
        60 => (any::<u8>(), 1usize..6000).prop_map(|(byte, len)| vec![byte; len]),
        20 => (any::<u64>(), 30_000usize..80_000).prop_map(|(seed, len)| noise(seed, len)),
        1 => any::<u8>().prop_map(|byte| vec![byte; 1 << 20]),
    ]
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|n| Token(seed ^ n << 8).remix().to_be_bytes()[0]).collect()
}

fn any_record() -> impl Strategy<Value = Record> {
    // Few tokens, so that runs of equal ones span blocks; or any.
    let token = prop_oneof![3 => 0u64..6, 1 => any::<u64>(), 1 => Just(u64::MAX)];
    let version = (any::<u32>(), any::<u64>(), any::<u64>(), any::<u32>());
    let kind = prop_oneof![Just(Kind::Put), Just(Kind::Delete), Just(Kind::Siblings)];
    let expiry = prop_oneof![Just(0), 1u64..1 << 45];
    (token, 0u32..3, kind, version, expiry, any_key(), any_value()).prop_map(
        |(token, namespace, kind, version, expiry_ms, key, value)| Record {
            token: Token(token),
            namespace: NamespaceId(namespace),
            incarnation: version.0,
            kind,
            dot: Dot { origin: OriginId(version.3), sequence: version.1 },
            timestamp: Timestamp(version.2),
            expiry_ms,
            key,
            value,
        },
    )
}

fn any_options() -> impl Strategy<Value = TableOptions> {
    (prop_oneof![Just(512), Just(4096), Just(32 << 10)], 4u32..20, 0u32..=16, 0usize..4).prop_map(
        |(block_size, filter_bits_per_key, partition_bits, codec)| TableOptions {
            block_size,
            filter_bits_per_key,
            partition_bits,
            // Codec 3: one codec a namespace.
            codec_of: Rc::new(move |namespace| {
                Codec::ALL[if codec == 3 { namespace.0 as usize % 3 } else { codec }]
            }),
            ..TableOptions::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_table_answers_like_a_sorted_list(
        records in prop::collection::vec(any_record(), 1..150),
        absent in prop::collection::vec(any_record(), 1..20),
        options in any_options(),
        wide in any::<bool>(), first: u64, last: u64, low in 0u64..7, high in 0u64..7,
        read_size in 1usize..100_000,
    ) {
        let records = sorted(records);
        let file = MemFile::new(if wide { 4096 } else { 512 });
        let meta = write(&file, &records, options);
        let table = Rc::new(open(&file).unwrap());
        prop_assert_eq!(&meta, table.meta());
        check_meta(&meta, &records);

        for record in &records {
            file.reads.set(0);
            prop_assert_eq!(get(&table, record).unwrap(), Some(record.clone()));
            prop_assert_eq!(file.reads.get(), reads(&table, record));
        }
        for record in &absent {
            let known = records.iter().find(|known| known.as_ref().cmp_by_key(&record.as_ref()).is_eq());
            prop_assert_eq!(get(&table, record).unwrap(), known.cloned());
        }
        for (first, last) in [(first.min(last), first.max(last)), (low.min(high), low.max(high))] {
            let range = TokenRange { first: Token(first), last: Token(last) };
            let inside: Vec<Record> =
                records.iter().filter(|record| range.contains(record.token)).cloned().collect();
            prop_assert_eq!(scan(&table, range, read_size), inside);
            check_bytes_inside(&table, range);
        }
        prop_assert_eq!(scan(&table, TokenRange::FULL, read_size), records);
    }
}

fn check_meta(meta: &TableMeta, records: &[Record]) {
    let count = |test: fn(&Record) -> bool| records.iter().filter(|r| test(r)).count() as u64;
    assert_eq!(meta.record_count, records.len() as u64);
    assert_eq!(meta.tombstone_count, count(|record| record.kind == Kind::Delete));
    assert_eq!(meta.expiring_count, count(|record| record.expiry_ms != 0));
    assert_eq!(meta.first_token, records[0].token);
    assert_eq!(meta.last_token, records[records.len() - 1].token);
    assert_eq!(Some(meta.max_timestamp), records.iter().map(|record| record.timestamp).max());
    assert_eq!(Some(meta.min_timestamp), records.iter().map(|record| record.timestamp).min());
    let expiries = || records.iter().map(|record| record.expiry_ms).filter(|ms| *ms != 0);
    assert_eq!(meta.min_expiry_ms, expiries().min().unwrap_or(0));
    assert_eq!(meta.max_expiry_ms, expiries().max().unwrap_or(0));
    for run in meta.partitions.iter() {
        let range = run.partition().range(meta.partition_bits);
        let here = || records.iter().filter(|record| range.contains(record.token));
        assert_eq!(run.record_count, here().count() as u64);
        assert_eq!(Some(run.incarnation_min), here().map(|record| record.incarnation).min());
        assert_eq!(Some(run.incarnation_max), here().map(|record| record.incarnation).max());
    }
    assert_eq!(meta.partitions.iter().map(|run| run.record_count).sum::<u64>(), meta.record_count);
    assert_eq!(meta.partitions.iter().map(|run| run.raw_bytes).sum::<u64>(), meta.raw_bytes);
}

/// What may be punched holds nothing of other ranges, and lies in what the range touches.
fn check_bytes_inside(table: &Rc<Table<MemFile>>, range: TokenRange) {
    let index = table.index();
    for block in index.inside(range) {
        let handle = index.handle(block);
        let block = block_on(table.read_block(handle)).unwrap();
        assert!(block.iter().all(|record| range.contains(record.token)));
        assert_eq!(table.handle_at(handle.offset), Some(handle));
    }
    let bytes = table.bytes_inside(range);
    assert!(bytes.end - bytes.start <= table.bytes_touching(range));
    let raw = index.bytes(index.inside(range));
    assert!(bytes.is_empty() || (raw.start <= bytes.start && bytes.end <= raw.end));
}

mod on_the_simulated_disk {
    //! Crashes and failing operations, on the disk that takes the contract at its word.
    use std::path::Path;

    use super::*;
    use crate::disk::{Disk, File, OpenMode};
    use crate::error::Result;
    use crate::sim::{Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor};

    const PATH: &str = "table/0000000007.sst";

    async fn write_table<D: Disk>(disk: &D, records: &[Record]) -> Result<()> {
        disk.create_dir(Path::new("table")).await?;
        let file = disk.open(Path::new(PATH), OpenMode::Create).await?;
        let mut writer = TableWriter::new(file, identity(), options(Codec::Lz4));
        for record in records {
            writer.append(&record.as_ref(), &async || ()).await?;
            if writer.data_bytes() % 8192 < 300 {
                writer.flush().await?;
            }
        }
        writer.finish().await?;
        disk.sync_dir(Path::new("table")).await?;
        disk.sync_dir(Path::new("")).await
    }

    /// Every record is there; or an error says why not.
    async fn read_table<D: Disk>(disk: &D, records: &[Record]) -> Result<()> {
        let file = disk.open(Path::new(PATH), OpenMode::Read).await?;
        let table = Table::open(file, identity()).await?;
        for record in records {
            let found = table.get(record.token, record.namespace, &record.key).await?;
            assert_eq!(found.as_ref(), Some(record));
        }
        Ok(())
    }

    fn disk(seed: u64) -> (SimExecutor, SimDisk) {
        let executor = SimExecutor::new(seed);
        let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(seed));
        (executor, disk)
    }

    #[test]
    fn a_finished_table_survives_the_crash_and_an_unfinished_one_is_no_table() {
        let records = spread(600, 90);
        for seed in 0..6 {
            let (executor, whole) = disk(seed);
            executor.run(write_table(&whole, &records)).unwrap();
            let ops = whole.op_count();
            let survivor = whole.crash(seed);
            executor.run(read_table(&survivor, &records)).expect("finished and synced");
            for number in 1..=ops {
                let (executor, disk) = disk(seed);
                disk.cut_power_at(number);
                let _ = executor.try_run(write_table(&disk, &records));
                executor.kill_tasks();
                let survivor = disk.crash(seed + number);
                // Right or an error, never a wrong or a missing record.
                let _ = executor.run(read_table(&survivor, &records));
            }
        }
    }

    #[test]
    fn a_failing_write_or_sync_fails_the_table() {
        let records = spread(600, 90);
        for (op, fault) in
            [(Op::Write, Fault::Eio), (Op::Write, Fault::NoSpace), (Op::Sync, Fault::Eio)]
        {
            let (executor, disk) = disk(3);
            disk.inject(Rule::nth(op, 1, fault));
            let error = executor.run(write_table(&disk, &records)).expect_err("the disk failed");
            assert!(matches!(error, Error::Io { .. } | Error::Full { .. }), "{error}");
        }
    }

    #[test]
    fn a_read_that_lies_is_caught() {
        let records = spread(300, 90);
        for nth in 1..40 {
            for fault in [Fault::FlipBit, Fault::Misdirect(512), Fault::Misdirect(-512), Fault::Eio]
            {
                let (executor, disk) = disk(nth);
                executor.run(write_table(&disk, &records)).unwrap();
                disk.inject(Rule::nth(Op::Read, nth, fault));
                let _ = executor.run(read_table(&disk, &records));
            }
        }
    }

    #[test]
    fn a_punched_range_reads_as_damage_and_the_rest_as_it_was() {
        let records = spread(2000, 90);
        let (executor, disk) = disk(1);
        executor.run(async {
            write_table(&disk, &records).await.unwrap();
            let file = disk.open(Path::new(PATH), OpenMode::Write).await.unwrap();
            let table = Rc::new(Table::open(file, identity()).await.unwrap());
            let range = TokenRange { first: Token(0), last: Token(u64::MAX / 3) };
            let bytes = table.bytes_inside(range);
            table.file().punch(bytes.start, bytes.end - bytes.start).await.unwrap();
            let first = &records[0];
            let found = table.get(first.token, first.namespace, &first.key).await;
            assert!(matches!(found, Err(Error::Corrupt { .. })));
            let rest = TokenRange { first: Token(u64::MAX / 3 + 1), last: Token::MAX };
            let mut scan = TableScan::new(table, rest, 64 << 10);
            let mut seen = 0;
            while let Some(block) = scan.next_block().await.unwrap() {
                seen += block.positions(rest).len();
            }
            assert_eq!(seen, records.iter().filter(|r| rest.contains(r.token)).count());
        });
    }
}
