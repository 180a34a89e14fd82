//! Tables as a whole: what is written is found, whatever the bytes went through.

use std::rc::Rc;

use super::testing::{MemFile, block_on, get, open, record, write};
use super::{Codec, TableOptions, TableScan};
use crate::model::{Record, Token, TokenRange};

fn options(codec: Codec) -> TableOptions {
    TableOptions { codec_of: Rc::new(move |_| codec), ..TableOptions::default() }
}

/// Records with tokens spread over the ring.
fn spread(count: u64, value_len: usize) -> Vec<Record> {
    let mut records: Vec<Record> = (0..count)
        .map(|n| {
            let token = Token(n + 1).remix();
            record(token, &n.to_be_bytes(), &vec![n as u8; value_len])
        })
        .collect();
    records.sort_by(|a, b| a.as_ref().cmp_by_key(&b.as_ref()));
    records
}

#[test]
fn what_is_written_is_found_and_scanned() {
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
            let mut scan = TableScan::new(Rc::clone(&table), TokenRange::FULL, 64 << 10);
            let mut seen = Vec::new();
            while let Some(block) = block_on(scan.next_block()).unwrap() {
                seen.extend(block.iter().map(|record| record.to_owned()));
            }
            assert_eq!(seen, records);
        }
    }
}
