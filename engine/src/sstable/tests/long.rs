//! Blocks in parts: what comes back, what damage is found, how often others get their turn.

use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::disk::File;
use crate::sstable::long::{PART_SIZE, YieldOnce};

/// Half of each part packs well, the other half does not.
fn mixed(len: usize) -> Vec<u8> {
    let mut bytes = noise(9, len);
    for (index, half) in bytes.chunks_mut(PART_SIZE / 2).enumerate() {
        if index % 4 != 1 {
            half.fill(3);
        }
    }
    bytes
}

/// Small records around one with this value.
fn records(value: Vec<u8>) -> Vec<Record> {
    vec![
        record(1, b"before", b"small"),
        record(7, b"a", b"of the same token"),
        record(7, &[b'k'; 4096], &value),
        record(7, b"z", b"of the same token"),
        record(9, b"after", b"small"),
    ]
}

#[test]
fn a_long_value_comes_back_whole_whatever_its_codec_and_length() {
    let lens = [2 * PART_SIZE, 2 * PART_SIZE + 1, 3 * PART_SIZE, 3 * PART_SIZE + 5, 700_001];
    for (codec, alignment) in [(Codec::None, 512), (Codec::Lz4, 4096), (Codec::Zstd, 512)] {
        for len in lens {
            for value in [vec![0; len], noise(len as u64, len), mixed(len)] {
                let records = records(value);
                let file = MemFile::new(alignment);
                write(&file, &records, options(codec));
                let table = Rc::new(open(&file).unwrap());
                for record in &records {
                    assert_eq!(get(&table, record).unwrap().as_ref(), Some(record));
                }
                assert_eq!(scan(&table, TokenRange::FULL, 1 << 20), records);
                let handle = table.locate(Token(7), NamespaceId(1), &[b'k'; 4096]).unwrap();
                let (offset, len) = table.read_range(handle);
                let bytes = block_on(file.read_at(offset, len)).unwrap();
                let whole = table.parse_block(bytes, handle).unwrap();
                let found = whole.get(Token(7), NamespaceId(1), &[b'k'; 4096]).unwrap();
                assert_eq!(found, records[2].as_ref());
            }
        }
    }
}

#[test]
fn packing_parts_makes_a_table_smaller() {
    let size = |codec| {
        let file = MemFile::new(512);
        write(&file, &records(mixed(1 << 20)), options(codec));
        file.bytes.borrow().len()
    };
    assert!(size(Codec::Lz4) < size(Codec::None) / 2);
}

#[test]
fn a_flipped_bit_anywhere_in_a_long_block_is_found() {
    for codec in [Codec::None, Codec::Lz4] {
        let records = records(mixed(5 * PART_SIZE + 3));
        let file = MemFile::new(512);
        write(&file, &records, options(codec));
        let table = open(&file).unwrap();
        let handle = table.locate(Token(7), NamespaceId(1), &records[2].key).unwrap();
        let first = usize::try_from(handle.offset).unwrap();
        let last = first + handle.len as usize - 1;
        // Every byte of the head, and more than one of each part and of the padding.
        for at in (first..first + 4300).chain((first..last).step_by(4001)).chain(last - 40..=last) {
            file.bytes.borrow_mut()[at] ^= 4;
            let read = block_on(table.read_block(handle));
            assert!(matches!(read, Err(Error::Corrupt { .. })), "byte {} of the block", at - first);
            file.bytes.borrow_mut()[at] ^= 4;
        }
        assert_eq!(get(&table, &records[2]).unwrap().as_ref(), Some(&records[2]));
    }
}

/// Found by nobody yet: a part that was written elsewhere must not pass for another.
#[test]
fn parts_cannot_change_places() {
    let file = MemFile::new(512);
    let records = records(vec![5; 4 * PART_SIZE]);
    write(&file, &records, options(Codec::None));
    let table = open(&file).unwrap();
    let handle = table.locate(Token(7), NamespaceId(1), &records[2].key).unwrap();
    // All parts have the same bytes, so their checksums differ by their places alone.
    let sums: std::collections::BTreeSet<[u8; 4]> = (0..4usize)
        .map(|part| {
            let at = usize::try_from(handle.offset).unwrap() + 16 + 24 + part * 8 + 4;
            file.bytes.borrow()[at..at + 4].try_into().unwrap()
        })
        .collect();
    assert_eq!(sums.len(), 4);
}

#[test]
fn others_get_their_turn_after_each_part() {
    let file = MemFile::new(512);
    let records = records(mixed(1 << 20));
    let mut writer = TableWriter::new(file.clone(), identity(), options(Codec::Lz4));
    let turns = |future: &mut dyn FnMut(&mut Context<'_>) -> bool| {
        let mut context = Context::from_waker(Waker::noop());
        let mut turns = 0;
        while !future(&mut context) {
            turns += 1;
        }
        turns
    };
    let writing = {
        let record = records[2].as_ref();
        let pause = async || YieldOnce::default().await;
        let mut append = pin!(writer.append(&record, &pause));
        turns(&mut |context| matches!(append.as_mut().poll(context), Poll::Ready(Ok(()))))
    };
    // Each of the 32 parts is packed in one, and written in another.
    assert_eq!(writing, 64);
    block_on(writer.finish()).unwrap();
    let file = MemFile::new(512);
    write(&file, &records, options(Codec::None));
    let table = open(&file).unwrap();
    let handle = table.locate(Token(7), NamespaceId(1), &records[2].key).unwrap();
    let mut read = pin!(table.read_block(handle));
    let reading = turns(&mut |context| matches!(read.as_mut().poll(context), Poll::Ready(Ok(_))));
    assert_eq!(reading, 16);
}

/// A value of three parts, all zeros but for a few bytes, so that the dump is short.
fn golden_records() -> Vec<Record> {
    let mut value = vec![0; 2 * PART_SIZE + 100];
    (value[0], value[PART_SIZE], value[2 * PART_SIZE + 99]) = (1, 2, 3);
    let mut long = record(0x8000_0000_0000_0000, b"long", &value);
    long.expiry_ms = 0x12_3456_7890;
    vec![record(0x1111_1111_1111_1111, b"first", b"value one"), long]
}

#[test]
fn bytes_of_version_2_are_as_they_were_and_can_be_read() {
    let golden = include_str!("../golden_v2.txt");
    let file = MemFile::new(512);
    let options = TableOptions { block_size: 512, partition_bits: 1, ..TableOptions::default() };
    write(&file, &golden_records(), options);
    let kept: String = golden
        .lines()
        .filter(|line| !line.starts_with('#'))
        .fold(String::new(), |text, line| text + line + "\n");
    assert_eq!(dump(&file.bytes.borrow()), kept, "the format changed: a new version");
    let table = Rc::new(open(&MemFile::of(undump(golden))).unwrap());
    assert_eq!(scan(&table, TokenRange::FULL, 1 << 20), golden_records());
}
