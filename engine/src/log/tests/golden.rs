//! The bytes of version 1. They must be readable for ever: a change here is a new version.

use super::super::format::{
    BATCH_HEADER_SIZE, BatchHeader, Records, SegmentHeader, encode_control, encode_record,
    parse_name, segment_name,
};
use super::*;
use crate::buffer::AlignedBuf;

fn hex(bytes: &[u8]) -> String {
    let lines = bytes
        .chunks(16)
        .map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_segment_header_has_these_bytes() {
    let header = SegmentHeader::new(IDENTITY, 7, 2, Lsn(40), Lsn(41), 65536);
    let bytes = bytemuck::bytes_of(&header);
    assert_eq!(hex(bytes), SEGMENT);
    assert_eq!(SegmentHeader::decode(bytes), Ok(header));
    assert_eq!(header.identity(), IDENTITY);
}

#[test]
fn the_batch_header_has_these_bytes() {
    let salt = IDENTITY.segment_salt(7, 2);
    let header = BatchHeader {
        checksum: 0,
        magic: 0,
        first: 41,
        synced: 40,
        count: 2,
        records_size: 136,
        size: 512,
        reserved: 0,
    }
    .sealed(salt, 4096);
    let bytes = bytemuck::bytes_of(&header);
    assert_eq!(hex(bytes), BATCH);
    assert_eq!(BatchHeader::decode(bytes, salt, 4096), Ok(header));
    assert!(BatchHeader::decode(bytes, salt, 4608).is_err());
    assert!(BatchHeader::decode(bytes, IDENTITY.segment_salt(8, 2), 4096).is_err());
    assert!(BatchHeader::decode(bytes, IDENTITY.segment_salt(7, 3), 4096).is_err());
}

#[test]
fn the_records_have_these_bytes() {
    let salt = IDENTITY.record_salt(2);
    let put = Record {
        token: Token(0x0807_0605_0403_0201),
        namespace: NamespaceId(0x0A0B),
        incarnation: 5,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(3), sequence: 99 },
        timestamp: Timestamp(0x1111_2222_3333),
        expiry_ms: 1234,
        key: b"key".to_vec(),
        value: b"value".to_vec(),
    };
    let mut buf = AlignedBuf::with_capacity(4096);
    buf.extend_from_slice(&[0; BATCH_HEADER_SIZE]);
    encode_record(&mut buf, salt, Lsn(41), &put.as_ref());
    let controls = [
        Control::Ceiling { timestamp: Timestamp(8), sequence: 9 },
        Control::DropPartition { partition: PartitionId(10), incarnation: 11 },
        Control::Close,
    ];
    for (lsn, control) in (42..).zip(controls) {
        encode_control(&mut buf, salt, Lsn(lsn), control);
    }
    let bytes = &buf[BATCH_HEADER_SIZE..];
    assert_eq!(hex(bytes), RECORDS);
    let read: Vec<_> = Records::checked(bytes, Lsn(41), salt).map(|item| item.unwrap()).collect();
    assert_eq!(read[0], (Lsn(41), ReplayItem::Record(put.as_ref())));
    for (index, control) in (1..).zip(controls) {
        assert_eq!(read[index], (Lsn(41 + index as u64), ReplayItem::Control(control)));
    }
    assert!(Records::checked(bytes, Lsn(42), salt).next().unwrap().is_err());
    assert!(Records::checked(bytes, Lsn(41), IDENTITY.record_salt(3)).next().unwrap().is_err());
}

#[test]
fn names_of_segments_are_their_numbers() {
    assert_eq!(segment_name(7), "0000000007.log");
    assert_eq!(parse_name("0000000007.log"), Some(7));
    assert_eq!(parse_name(&segment_name(u64::MAX)), Some(u64::MAX));
    for bad in [
        "7.log",
        "0000000007.tmp",
        "+000000007.log",
        "0000000007.log.1",
        "99999999999999999999999.log",
        "00000000007.log",
    ] {
        assert_eq!(parse_name(bad), None, "{bad}");
    }
}

const SEGMENT: &str = "\
41 4e 4e 4c 4f 47 0d 0a 01 00 00 00 84 7d a9 9d
07 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00
28 00 00 00 00 00 00 00 29 00 00 00 00 00 00 00
00 00 01 00 00 00 00 00 34 12 00 ee ff c0 00 00
00 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00";
const BATCH: &str = "\
af 8b 34 c6 41 4c 42 31 29 00 00 00 00 00 00 00
28 00 00 00 00 00 00 00 02 00 00 00 88 00 00 00
00 02 00 00 00 00 00 00";
const RECORDS: &str = "\
ac e9 a6 81 05 00 00 00 01 02 03 04 05 06 07 08
33 33 22 22 11 11 00 00 63 00 00 00 00 00 00 00
d2 04 00 00 00 00 00 00 03 00 00 00 0b 0a 00 00
05 00 00 00 03 00 01 00 6b 65 79 76 61 6c 75 65
b1 9d a2 bb 00 00 00 00 00 00 00 00 00 00 00 00
08 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00
00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
00 00 00 00 00 00 81 00 99 ac 0e 42 00 00 00 00
0a 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
00 00 00 00 00 00 00 00 0b 00 00 00 00 00 82 00
04 b4 d1 ae 00 00 00 00 00 00 00 00 00 00 00 00
00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
00 00 00 00 00 00 83 00";
