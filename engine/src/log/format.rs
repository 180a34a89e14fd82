//! Bytes of the commit log: segment header, batch header, record. No I/O.
//!
//! Invariant: whatever the bytes are, decoding ends with a value that was once encoded for this
//! very place (log, life, segment, offset, record number), or with [`Invalid`]; never a panic.
//!
//! All numbers are little-endian; records and headers start at multiples of 8 bytes.
//! History: version 1, the first.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use super::Lsn;
use crate::buffer::AlignedBuf;
use crate::checksum::{salted, salted_parts};
use crate::model::limits::KEY_SIZE_MAX;
use crate::model::{
    Dot, Kind, NamespaceId, OriginId, PartitionId, RecordRef, Timestamp, Token, Value,
};

/// Version of the format, in every segment header.
pub const VERSION: u32 = 1;
/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"ANNLOG\r\n";
/// First bytes after the checksum of a batch: "ALB1".
pub const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"ALB1");
/// Bytes kept for the segment header; the first batch follows. A multiple of every alignment.
pub const SEGMENT_HEADER_SIZE: usize = 4096;
/// Bytes before the first record of a batch.
pub const BATCH_HEADER_SIZE: usize = size_of::<BatchHeader>();
/// Bytes before the key of a record.
pub const RECORD_HEADER_SIZE: usize = size_of::<RecordHeader>();
/// Records and batches start at multiples of this, in bytes.
pub const RECORD_ALIGNMENT: usize = 8;
/// Batches start at multiples of this, in bytes, whatever the device allows.
pub const BATCH_ALIGNMENT_MIN: usize = 512;
/// Most bytes of a batch: one record of any size that the engine ever logs, and room beside it.
/// A greater length in a header is damage.
pub const BATCH_SIZE_CEILING: usize = 64 << 20;

const KIND_CEILING: u8 = 0x81;
const KIND_DROP_PARTITION: u8 = 0x82;
const KIND_CLOSE: u8 = 0x83;
const KIND_SEEN: u8 = 0x84;

/// Why bytes are not what they should be: the first rule broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid(pub &'static str);

/// Which log the bytes belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogIdentity {
    /// The cluster's id.
    pub cluster: u128,
    /// The shard of the node.
    pub shard: u32,
}

impl LogIdentity {
    /// Salt of everything in one segment: batch headers are checked against it and their offset.
    #[must_use]
    pub fn segment_salt(&self, segment_id: u64, life: u64) -> u64 {
        mix(self.file_salt(life), segment_id)
    }

    /// Salt of all records of one life: records are checked against it and their number.
    #[must_use]
    pub fn record_salt(&self, life: u64) -> u64 {
        mix(self.file_salt(life), u64::MAX)
    }

    fn file_salt(&self, life: u64) -> u64 {
        let [low, high] = halves(self.cluster);
        let log = u64::from_le_bytes(*b"ann log\0");
        mix(mix(mix(mix(log, low), high), u64::from(self.shard)), life)
    }
}

/// One step of a 64-bit mix (the finaliser of splitmix64).
fn mix(state: u64, word: u64) -> u64 {
    let mut z = (state ^ word).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn halves(wide: u128) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = wide.to_le_bytes();
    [u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::from_le_bytes([i, j, k, l, m, n, o, p])]
}

/// First bytes of a segment; zeros follow up to [`SEGMENT_HEADER_SIZE`].
///
/// | offset | size | field      | meaning                                                      |
/// |--------|------|------------|--------------------------------------------------------------|
/// | 0      | 8    | magic      | [`SEGMENT_MAGIC`]                                            |
/// | 8      | 4    | version    | [`VERSION`]                                                  |
/// | 12     | 4    | checksum   | CRC32C of bytes 0..12 and 16..80, salted with `segment_id`   |
/// | 16     | 8    | segment_id | the number in the file's name                                |
/// | 24     | 8    | life       | which start of the log wrote it, from 1                      |
/// | 32     | 8    | life_after | last record of the earlier lives when this one began         |
/// | 40     | 8    | life_first | number of this life's first record, above `life_after`       |
/// | 48     | 8    | size       | the file's length when prepared, in bytes                    |
/// | 56     | 16   | cluster    | id of the cluster, low half first                            |
/// | 72     | 4    | shard      | shard of the node                                            |
/// | 76     | 4    | reserved   | 0                                                            |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents the fields")]
pub struct SegmentHeader {
    pub magic: [u8; 8],
    pub version: u32,
    pub checksum: u32,
    pub segment_id: u64,
    pub life: u64,
    pub life_after: u64,
    pub life_first: u64,
    pub size: u64,
    pub cluster: [u64; 2],
    pub shard: u32,
    pub reserved: u32,
}

const _: () = assert!(size_of::<SegmentHeader>() == 80);
const _: () = assert!(offset_of!(SegmentHeader, checksum) == 12);
const _: () = assert!(offset_of!(SegmentHeader, cluster) == 56);
// The header lies in one sector, so that a crash cannot tear it.
const _: () = assert!(size_of::<SegmentHeader>() <= BATCH_ALIGNMENT_MIN);
const _: () = assert!(cfg!(target_endian = "little"));

impl SegmentHeader {
    /// A header with its checksum.
    #[must_use]
    pub fn new(
        identity: LogIdentity,
        segment_id: u64,
        life: u64,
        after: Lsn,
        first: Lsn,
        size: u64,
    ) -> SegmentHeader {
        let mut header = SegmentHeader {
            magic: SEGMENT_MAGIC,
            version: VERSION,
            checksum: 0,
            segment_id,
            life,
            life_after: after.0,
            life_first: first.0,
            size,
            cluster: halves(identity.cluster),
            shard: identity.shard,
            reserved: 0,
        };
        header.checksum = header.expected_checksum();
        header
    }

    /// Reads and checks a header; the caller compares [`SegmentHeader::version`],
    /// [`SegmentHeader::segment_id`] and [`SegmentHeader::identity`] with what it expects.
    ///
    /// # Errors
    /// [`Invalid`], but only the version is looked at when it is newer than [`VERSION`].
    pub fn decode(bytes: &[u8]) -> Result<SegmentHeader, Invalid> {
        let bytes =
            bytes.get(..size_of::<SegmentHeader>()).ok_or(Invalid("shorter than its header"))?;
        let header: SegmentHeader = bytemuck::pod_read_unaligned(bytes);
        if header.magic != SEGMENT_MAGIC {
            return Err(Invalid("not a log segment (magic)"));
        }
        if header.version > VERSION {
            return Ok(header);
        }
        if header.checksum != header.expected_checksum() {
            return Err(Invalid("segment header checksum"));
        }
        if header.version != VERSION || header.reserved != 0 {
            return Err(Invalid("segment header fields"));
        }
        if header.life == 0 || header.life_first <= header.life_after {
            return Err(Invalid("segment header: impossible life"));
        }
        Ok(header)
    }

    /// The log it belongs to.
    #[must_use]
    pub fn identity(&self) -> LogIdentity {
        let [low, high] = self.cluster;
        LogIdentity { cluster: u128::from(low) | (u128::from(high) << 64), shard: self.shard }
    }

    fn expected_checksum(&self) -> u32 {
        let bytes = bytemuck::bytes_of(self);
        salted_parts(self.segment_id, 0, &bytes[..12], &bytes[16..])
    }
}

/// Header of a batch. Its records follow, then zeros up to `size`.
///
/// | offset | size | field        | meaning                                                    |
/// |--------|------|--------------|------------------------------------------------------------|
/// | 0      | 4    | checksum     | CRC32C of bytes 4..40, salted with segment salt and offset |
/// | 4      | 4    | magic        | [`BATCH_MAGIC`]                                            |
/// | 8      | 8    | first        | number of its first record; with `count` 0, of the next    |
/// | 16     | 8    | synced       | all records up to this one were durable when it was written |
/// | 24     | 4    | count        | records; 0 only tells `synced`                             |
/// | 28     | 4    | records_size | bytes of all records, each padded to 8                     |
/// | 32     | 4    | size         | bytes to the next batch, a multiple of 512                 |
/// | 36     | 4    | reserved     | 0                                                          |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents the fields")]
pub struct BatchHeader {
    pub checksum: u32,
    pub magic: u32,
    pub first: u64,
    pub synced: u64,
    pub count: u32,
    pub records_size: u32,
    pub size: u32,
    pub reserved: u32,
}

const _: () = assert!(size_of::<BatchHeader>() == 40 && align_of::<BatchHeader>() == 8);
const _: () = assert!(offset_of!(BatchHeader, size) == 32);
const _: () = assert!(BATCH_HEADER_SIZE.is_multiple_of(RECORD_ALIGNMENT));

impl BatchHeader {
    /// Fills in magic and checksum for the place where the batch will lie.
    #[must_use]
    pub fn sealed(mut self, segment_salt: u64, offset: u64) -> BatchHeader {
        self.magic = BATCH_MAGIC;
        self.checksum = salted(segment_salt, offset, &bytemuck::bytes_of(&self)[4..]);
        self
    }

    /// Reads and checks a header that lies at `offset`.
    ///
    /// # Errors
    /// [`Invalid`]: never written there, torn, or damaged.
    pub fn decode(bytes: &[u8], segment_salt: u64, offset: u64) -> Result<BatchHeader, Invalid> {
        let bytes = bytes.get(..BATCH_HEADER_SIZE).ok_or(Invalid("batch header cut off"))?;
        let header: BatchHeader = bytemuck::pod_read_unaligned(bytes);
        if header.magic != BATCH_MAGIC {
            return Err(Invalid("no batch header"));
        }
        if header.checksum != salted(segment_salt, offset, &bytes[4..]) {
            return Err(Invalid("batch header checksum"));
        }
        let (records, size) = (header.records_size(), header.size());
        let count = usize::try_from(header.count).unwrap_or(usize::MAX);
        let fits = header.reserved == 0
            && size <= BATCH_SIZE_CEILING
            && size.is_multiple_of(BATCH_ALIGNMENT_MIN)
            && records.is_multiple_of(RECORD_ALIGNMENT)
            && records <= size.saturating_sub(BATCH_HEADER_SIZE)
            && count <= records / RECORD_HEADER_SIZE
            && header.first > header.synced
            && header.first.checked_add(u64::from(header.count)).is_some();
        if fits { Ok(header) } else { Err(Invalid("batch header fields")) }
    }

    /// Bytes of the records.
    #[must_use]
    pub fn records_size(&self) -> usize {
        usize::try_from(self.records_size).unwrap_or(usize::MAX)
    }

    /// Bytes to the next batch.
    #[must_use]
    pub fn size(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }

    /// Number of the record after the batch.
    #[must_use]
    pub fn next(&self) -> Lsn {
        Lsn(self.first + u64::from(self.count))
    }
}

/// Header of a record. Key and value follow, then zeros up to a multiple of 8.
///
/// | offset | size | field       | meaning                                                     |
/// |--------|------|-------------|-------------------------------------------------------------|
/// | 0      | 4    | checksum    | CRC32C of bytes 4.., key and value, salted with life and record number |
/// | 4      | 4    | value_size  | bytes                                                       |
/// | 8      | 8    | token       | of the key; trusted, so replay never hashes                 |
/// | 16     | 8    | timestamp   | hybrid logical clock                                        |
/// | 24     | 8    | sequence    | with `origin` the record's dot                              |
/// | 32     | 8    | expiry_ms   | milliseconds since 2024-01-01, 0 is never                   |
/// | 40     | 4    | origin      | who coordinated the write                                   |
/// | 44     | 4    | namespace   | of the key                                                  |
/// | 48     | 4    | incarnation | of the partition                                            |
/// | 52     | 2    | key_size    | bytes, 1 to `KEY_SIZE_MAX`; 0 in a control record           |
/// | 54     | 1    | kind        | 1 put, 2 delete, 3 siblings; control: 0x81 ceiling (timestamp, sequence), 0x82 drop partition (token: its number, incarnation), 0x83 close, 0x84 seen (token and incarnation as before, value: the set) |
/// | 55     | 1    | reserved    | 0                                                           |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents the fields")]
pub struct RecordHeader {
    pub checksum: u32,
    pub value_size: u32,
    pub token: u64,
    pub timestamp: u64,
    pub sequence: u64,
    pub expiry_ms: u64,
    pub origin: u32,
    pub namespace: u32,
    pub incarnation: u32,
    pub key_size: u16,
    pub kind: u8,
    pub reserved: u8,
}

const _: () = assert!(size_of::<RecordHeader>() == 56 && align_of::<RecordHeader>() == 8);
const _: () = assert!(offset_of!(RecordHeader, kind) == 54);
const _: () = assert!(KEY_SIZE_MAX <= u16::MAX as usize);

/// What the log says about the shard rather than about one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control<'a> {
    /// No stamp above `timestamp` and no sequence above `sequence` was used before a later one.
    Ceiling {
        /// Bound of stamps.
        timestamp: Timestamp,
        /// Bound of sequences.
        sequence: u64,
    },
    /// The shard gave up this incarnation of a partition: its records are void.
    DropPartition {
        /// Which partition.
        partition: PartitionId,
        /// Which of its incarnations.
        incarnation: u32,
    },
    /// These writes count as merged in this incarnation of a partition, besides those whose records
    /// the log holds.
    Seen {
        /// Which partition.
        partition: PartitionId,
        /// Which of its incarnations.
        incarnation: u32,
        /// An encoded `SeenSet`.
        seen: &'a [u8],
    },
    /// The log was closed in good order; all before it is durable.
    Close,
}

impl Control<'_> {
    /// Bytes that it takes in a batch.
    pub(super) fn size(&self) -> usize {
        match self {
            Control::Seen { seen, .. } => record_size(0, seen.len()),
            _ => record_size(0, 0),
        }
    }
}

/// What replay finds under one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayItem<'a> {
    /// A record of a key.
    Record(RecordRef<'a>),
    /// A control record.
    Control(Control<'a>),
}

/// Bytes that a record with this key and value takes in a batch.
#[inline]
#[must_use]
pub fn record_size(key_size: usize, value_size: usize) -> usize {
    (RECORD_HEADER_SIZE + key_size + value_size).next_multiple_of(RECORD_ALIGNMENT)
}

/// Appends a record to a batch. The caller has checked the sizes of key and value.
#[inline]
pub fn encode_record(buf: &mut AlignedBuf, salt: u64, lsn: Lsn, record: &RecordRef<'_>) {
    encode_parts(buf, salt, lsn, &RecordHeader::of(record), record.key, record.value);
}

/// Appends a control record to a batch.
pub fn encode_control(buf: &mut AlignedBuf, salt: u64, lsn: Lsn, control: Control<'_>) {
    let mut header = RecordHeader::zeroed();
    let mut value = Value::EMPTY;
    match control {
        Control::Ceiling { timestamp, sequence } => {
            header.kind = KIND_CEILING;
            header.timestamp = timestamp.0;
            header.sequence = sequence;
        }
        Control::DropPartition { partition, incarnation } => {
            header.kind = KIND_DROP_PARTITION;
            header.token = u64::from(partition.0);
            header.incarnation = incarnation;
        }
        Control::Seen { partition, incarnation, seen } => {
            header.kind = KIND_SEEN;
            header.token = u64::from(partition.0);
            header.incarnation = incarnation;
            header.value_size = u32::try_from(seen.len()).expect("checked against the limit");
            value = Value::Whole(seen);
        }
        Control::Close => header.kind = KIND_CLOSE,
    }
    encode_parts(buf, salt, lsn, &header, &[], value);
}

#[inline]
fn encode_parts(
    buf: &mut AlignedBuf,
    salt: u64,
    lsn: Lsn,
    header: &RecordHeader,
    key: &[u8],
    value: Value<'_>,
) {
    let start = buf.len();
    buf.extend_from_slice(bytemuck::bytes_of(header));
    buf.extend_from_slice(key);
    match value {
        Value::Whole(bytes) => buf.extend_from_slice(bytes),
        Value::Pieces(_) => value.parts().for_each(|part| buf.extend_from_slice(part)),
    }
    // One pass over bytes that have just been copied and are in the nearest cache.
    let checksum = salted(salt, lsn.0, &buf[start + 4..]);
    buf[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
    let padding = buf.len().next_multiple_of(RECORD_ALIGNMENT) - buf.len();
    buf.extend_from_slice(&[0; RECORD_ALIGNMENT][..padding]);
}

/// Walks the records of a batch. Ends after the first [`Invalid`].
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    next: u64,
    /// Salt of the checksums, if they are to be checked.
    salt: Option<u64>,
}

impl<'a> Records<'a> {
    /// Records of a batch from the disk: `bytes` are those after its header, as many as
    /// [`BatchHeader::records_size`] says; each is checked.
    #[must_use]
    pub fn checked(bytes: &'a [u8], first: Lsn, record_salt: u64) -> Records<'a> {
        Records { rest: bytes, next: first.0, salt: Some(record_salt) }
    }

    /// Records whose checksums are known to hold.
    #[must_use]
    pub fn trusted(bytes: &'a [u8], first: Lsn) -> Records<'a> {
        Records { rest: bytes, next: first.0, salt: None }
    }

    #[inline]
    fn take(&mut self) -> Result<(Lsn, ReplayItem<'a>), Invalid> {
        let cut_off = Invalid("record cut off");
        let lsn = Lsn(self.next);
        let header: RecordHeader =
            bytemuck::pod_read_unaligned(self.rest.get(..RECORD_HEADER_SIZE).ok_or(cut_off)?);
        let key_end = RECORD_HEADER_SIZE + usize::from(header.key_size);
        let value_size = usize::try_from(header.value_size).map_err(|_| cut_off)?;
        let end = key_end.checked_add(value_size).ok_or(cut_off)?;
        let bytes = self.rest.get(..end).ok_or(cut_off)?;
        if let Some(salt) = self.salt
            && header.checksum != salted(salt, lsn.0, &bytes[4..])
        {
            return Err(Invalid("record checksum"));
        }
        let value = Value::Whole(&bytes[key_end..]);
        let item = header.item(&bytes[RECORD_HEADER_SIZE..key_end], value)?;
        self.rest = self.rest.get(end.next_multiple_of(RECORD_ALIGNMENT)..).ok_or(cut_off)?;
        self.next = lsn.0.checked_add(1).ok_or(Invalid("record number overflows"))?;
        Ok((lsn, item))
    }
}

impl RecordHeader {
    /// The header of a record, without its checksum. The sizes of key and value are checked.
    #[inline]
    pub(super) fn of(record: &RecordRef<'_>) -> RecordHeader {
        RecordHeader {
            checksum: 0,
            value_size: u32::try_from(record.value.len()).expect("checked against the limit"),
            token: record.token.0,
            timestamp: record.timestamp.0,
            sequence: record.dot.sequence,
            expiry_ms: record.expiry_ms,
            origin: record.dot.origin.0,
            namespace: record.namespace.0,
            incarnation: record.incarnation,
            key_size: u16::try_from(record.key.len()).expect("checked against the limit"),
            kind: record.kind as u8,
            reserved: 0,
        }
    }

    /// What the header says of this key and value.
    #[inline]
    pub(super) fn item<'a>(
        &self,
        key: &'a [u8],
        value: Value<'a>,
    ) -> Result<ReplayItem<'a>, Invalid> {
        if let Some(kind) = Kind::from_u8(self.kind) {
            if key.is_empty() || key.len() > KEY_SIZE_MAX || self.reserved != 0 {
                return Err(Invalid("record header fields"));
            }
            return Ok(ReplayItem::Record(RecordRef {
                token: Token(self.token),
                namespace: NamespaceId(self.namespace),
                incarnation: self.incarnation,
                kind,
                dot: Dot { origin: OriginId(self.origin), sequence: self.sequence },
                timestamp: Timestamp(self.timestamp),
                expiry_ms: self.expiry_ms,
                key,
                value,
            }));
        }
        if !key.is_empty() || (!value.is_empty() && self.kind != KIND_SEEN) || self.reserved != 0 {
            return Err(Invalid("control record fields"));
        }
        let partition = || u32::try_from(self.token).map(PartitionId);
        match self.kind {
            KIND_CEILING => Ok(ReplayItem::Control(Control::Ceiling {
                timestamp: Timestamp(self.timestamp),
                sequence: self.sequence,
            })),
            KIND_DROP_PARTITION => Ok(ReplayItem::Control(Control::DropPartition {
                partition: partition().map_err(|_| Invalid("partition number"))?,
                incarnation: self.incarnation,
            })),
            KIND_SEEN => Ok(ReplayItem::Control(Control::Seen {
                partition: partition().map_err(|_| Invalid("partition number"))?,
                incarnation: self.incarnation,
                seen: value.whole().ok_or(Invalid("control record fields"))?,
            })),
            KIND_CLOSE => Ok(ReplayItem::Control(Control::Close)),
            _ => Err(Invalid("record kind")),
        }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<(Lsn, ReplayItem<'a>), Invalid>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let taken = self.take();
        if taken.is_err() {
            self.rest = &[];
        }
        Some(taken)
    }
}

/// The number in the name of a segment file, `0000000007.log`.
#[must_use]
pub fn parse_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    let id = (digits.len() >= 10 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())??;
    (segment_name(id) == name).then_some(id)
}

/// The name of a segment file.
#[must_use]
pub fn segment_name(id: u64) -> String {
    format!("{id:010}.log")
}

/// The name of a segment file that is being prepared.
#[must_use]
pub fn temporary_name(id: u64) -> String {
    format!("{id:010}.tmp")
}
