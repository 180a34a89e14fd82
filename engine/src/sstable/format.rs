//! The table's format: what writer and reader share. No I/O, no state.
//!
//! Invariant: each header states its own rules in `check`, and reserved bytes are zero. All
//! checksums are [`crate::checksum::salted`] with the table's salt ([`file_salt`]) and the offset
//! of the header in the file, and cover everything after the checksum field up to the section's
//! end, padding included, so that scrub finds every flipped bit.
//!
//! History: version 1, the first; version 2 adds blocks in parts. A table without such a block is
//! written as version 1.

use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytemuck::{Pod, Zeroable};

use crate::checksum;
use crate::error::{Error, Result};
use crate::model::limits::{DISK_ALIGNMENT, KEY_SIZE_MAX, VALUE_SIZE_CEILING};
use crate::model::{PartitionId, Timestamp, Token, TokenRange};

/// Unit of the sections behind the blocks, and size of the footer, in bytes.
pub const SECTOR: usize = DISK_ALIGNMENT;
/// Unit of offsets and lengths of blocks, in bytes. Not a sector: rounding each block up to one
/// wasted 8 to 11 % on records of 1 KiB; instead a read is rounded out to the device's units, at
/// most one sector more. Keeps headers and token columns aligned for u64.
pub const BLOCK_UNIT: usize = 16;
/// Most bytes of a table's blocks: their units are numbered in 32 bits.
pub const DATA_LEN_MAX: u64 = (1 << 32) * BLOCK_UNIT as u64 - SECTOR as u64;
/// First bytes of a footer.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ANULSST1");
/// Greatest version of the format that this code reads and writes.
pub const FORMAT_VERSION: u32 = 2;
/// Version of a table without blocks in parts.
pub const FORMAT_VERSION_PLAIN: u32 = 1;
/// Most bytes of a block that holds more than one record, before compression: offsets are u16.
pub const SHARED_BLOCK_MAX: usize = 64 << 10;
/// Most bytes of any block's payload, before compression. A block of one record holds a value of
/// up to `VALUE_SIZE_CEILING`, or the siblings of one key, which may reach twice that.
pub const RAW_LEN_MAX: usize = 2 * VALUE_SIZE_CEILING + (1 << 16);
/// Most blocks of a table: their positions, one more for the end, are u32.
pub const BLOCKS_MAX: usize = 1 << 31;

// A block of one record can hold the longest key and twice the longest value.
const _: () = assert!(RAW_LEN_MAX > 2 * VALUE_SIZE_CEILING + KEY_SIZE_MAX + 128);
// Structures are written as they lie in memory; the format is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// Number of a table in its shard; counts up, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct TableId(pub u64);

impl TableId {
    /// Name of the table's file inside the shard's `table` directory.
    #[must_use]
    pub fn file_name(self) -> String {
        format!("{:010}.sst", self.0)
    }

    /// Inverse of [`TableId::file_name`].
    #[must_use]
    pub fn from_file_name(name: &str) -> Option<TableId> {
        let digits = name.strip_suffix(".sst")?;
        let id = digits.parse().ok().map(TableId)?;
        (id.file_name() == name).then_some(id)
    }
}

/// Which table a file is: named in errors, and mixed into every checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableIdentity {
    /// Number of the table.
    pub id: TableId,
    /// From [`file_salt`].
    pub salt: u64,
    /// Where the file is, for error messages.
    pub path: PathBuf,
}

/// The salt of a table's checksums, so that a block of another table, shard or cluster, or of a
/// log, fails its check.
#[must_use]
pub fn file_salt(cluster: u64, shard: u32, id: TableId) -> u64 {
    const KIND: u64 = 0x5353_5442_4c4f_434b;
    let mut mixed = KIND ^ cluster;
    for part in [u64::from(shard), id.0] {
        mixed = (mixed ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^= mixed >> 29;
    }
    mixed
}

/// How a block's payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    #[default]
    None = 0,
    /// LZ4: fast, for data that is read often.
    Lz4 = 1,
    /// Zstandard: smaller, a few times slower to unpack than LZ4.
    Zstd = 2,
}

impl Codec {
    /// All codecs, in the order of their numbers.
    pub const ALL: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd];

    /// The codec with this number, if there is one.
    #[must_use]
    pub fn from_u8(byte: u8) -> Option<Codec> {
        Codec::ALL.get(usize::from(byte)).copied()
    }
}

/// Where a block is: both are multiples of [`BLOCK_UNIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHandle {
    /// Bytes from the file's start.
    pub offset: u64,
    /// Bytes of the block, header and padding included.
    pub len: u32,
}

/// The first rule that some bytes break.
pub type Invalid = &'static str;

/// Header of a block. The stored payload follows, then zeros to a whole
/// [`BLOCK_UNIT`].
///
/// | offset | size | field        | meaning                                              |
/// |--------|------|--------------|------------------------------------------------------|
/// | 0      | 4    | checksum     | of bytes 4.. to the block's end, padding included    |
/// | 4      | 4    | stored_len   | bytes of the payload as stored                       |
/// | 8      | 4    | raw_len      | bytes of the payload unpacked, at most `RAW_LEN_MAX` |
/// | 12     | 2    | record_count | at least 1                                           |
/// | 14     | 1    | codec        | 0 none, 1 LZ4, 2 zstd                                |
/// | 15     | 1    | layout       | 0 the payload, 1 in parts: see [`LongHead`]          |
///
/// The payload unpacked: `record_count` tokens (u64), as many offsets (u16, from the end of the
/// offsets), the records. A record: `kind | has_expiry << 2` (u8), timestamp (u64), then varints
/// (7 bits a byte, low first): namespace, incarnation, origin, sequence, expiry if it has one,
/// key length; the key; the value to the record's end.
///
/// In parts: `record_count` is 1, `raw_len` the length of the record with its value, `stored_len`
/// all behind this header, and the checksum is of bytes 4.. to the head's end only. A [`LongHead`]
/// follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct BlockHeader {
    pub checksum: u32,
    pub stored_len: u32,
    pub raw_len: u32,
    pub record_count: u16,
    pub codec: u8,
    pub layout: u8,
}

const _: () = assert!(size_of::<BlockHeader>() == 16 && offset_of!(BlockHeader, codec) == 14);

impl BlockHeader {
    /// The header at the start of a block, its fields in their ranges.
    ///
    /// # Errors
    /// The first rule broken. The checksum is not verified here.
    pub fn parse(block: &[u8]) -> std::result::Result<BlockHeader, Invalid> {
        let bytes =
            block.get(..size_of::<BlockHeader>()).ok_or("a block is shorter than its header")?;
        let header: BlockHeader = bytemuck::pod_read_unaligned(bytes);
        header.check()?;
        Ok(header)
    }

    /// Length of the whole block in bytes.
    #[must_use]
    pub fn block_len(&self) -> usize {
        (size_of::<BlockHeader>() + self.stored_len as usize).next_multiple_of(BLOCK_UNIT)
    }

    /// Whether the block's one record has its value in parts.
    #[must_use]
    pub fn is_in_parts(&self) -> bool {
        self.layout == 1
    }

    /// Whether the fields are in their ranges.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self) -> std::result::Result<(), Invalid> {
        let (stored, raw) = (self.stored_len as usize, self.raw_len as usize);
        if raw > RAW_LEN_MAX {
            return Err("a block declares more bytes than any block may have");
        }
        if self.record_count == 0 {
            return Err("a block declares no records");
        }
        if self.record_count > 1 && raw > SHARED_BLOCK_MAX {
            return Err("a block of several records declares more than 64 KiB");
        }
        if self.layout > 1 {
            return Err("a block has an unknown layout");
        }
        if self.is_in_parts() {
            return match Codec::from_u8(self.codec) {
                None => Err("a block has an unknown codec"),
                Some(_) if self.record_count > 1 => Err("a block in parts has several records"),
                Some(_) if stored > 2 * RAW_LEN_MAX => Err("a block in parts is longer than any"),
                Some(_) => Ok(()),
            };
        }
        match Codec::from_u8(self.codec) {
            None => Err("a block has an unknown codec"),
            Some(Codec::None) if stored != raw => Err("an unpacked block has two lengths"),
            Some(Codec::Lz4 | Codec::Zstd) if stored >= raw => {
                Err("a packed block is not smaller than its content")
            }
            Some(_) => Ok(()),
        }
    }
}

/// What follows the header of a block in parts. Then: a [`LongPart`] a part, the record without its
/// value, zeros up to `head_size`, the parts one after another, zeros to a whole [`BLOCK_UNIT`].
///
/// | offset | size | field       | meaning                                                  |
/// |--------|------|-------------|----------------------------------------------------------|
/// | 0      | 4    | head_size   | bytes from the block's start to its first part           |
/// | 4      | 4    | value_size  | bytes                                                    |
/// | 8      | 8    | token       | of the record                                            |
/// | 16     | 4    | part_count  | one for each 32 KiB of the value, begun ones included    |
/// | 20     | 4    | record_size | bytes of the record without its value                    |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct LongHead {
    pub head_size: u32,
    pub value_size: u32,
    pub token: u64,
    pub part_count: u32,
    pub record_size: u32,
}

const _: () = assert!(size_of::<LongHead>() == 24 && offset_of!(LongHead, record_size) == 20);

impl LongHead {
    /// What `head_size` must be.
    #[must_use]
    pub fn expected_size(&self) -> usize {
        let fixed = size_of::<BlockHeader>() + size_of::<LongHead>();
        let parts = self.part_count as usize * size_of::<LongPart>();
        (fixed + parts + self.record_size as usize).next_multiple_of(BLOCK_UNIT)
    }
}

/// One part of a long value.
///
/// | offset | size | field       | meaning                                                      |
/// |--------|------|-------------|--------------------------------------------------------------|
/// | 0      | 4    | stored_size | bytes; fewer than the part holds: packed by the block's codec |
/// | 4      | 4    | checksum    | of the part as stored, salted with the table's salt and the part's offset in the file; the last one's covers the zeros behind it too |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct LongPart {
    pub stored_size: u32,
    pub checksum: u32,
}

const _: () = assert!(size_of::<LongPart>() == 8);

/// Header of the filter section. The filter's 64-byte blocks follow.
///
/// | offset | size | field       | meaning                                          |
/// |--------|------|-------------|--------------------------------------------------|
/// | 0      | 4    | checksum    | of bytes 4.. to the section's end                |
/// | 4      | 4    | block_count | at least 1                                       |
/// | 8      | 8    | key_count   | records that were added                          |
/// | 16     | 48   | reserved    | 0; keeps the blocks on cache lines               |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct FilterHeader {
    pub checksum: u32,
    pub block_count: u32,
    pub key_count: u64,
    pub reserved: [u8; 48],
}

const _: () = assert!(size_of::<FilterHeader>() == 64);

/// Header of the index section. Then: first token of each block (u64), first unit of each block and
/// the unit after the last (u32; [`BLOCK_UNIT`]), the separators, the separators' keys.
///
/// | offset | size | field           | meaning                                      |
/// |--------|------|-----------------|----------------------------------------------|
/// | 0      | 4    | checksum        | of bytes 4.. to the section's end            |
/// | 4      | 4    | block_count     | at least 1                                   |
/// | 8      | 4    | separator_count | blocks that begin inside a run of one token  |
/// | 12     | 4    | separator_bytes | sum of the separators' keys                  |
/// | 16     | 8    | last_token      | of the table                                 |
/// | 24     | 8    | reserved        | 0                                            |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct IndexHeader {
    pub checksum: u32,
    pub block_count: u32,
    pub separator_count: u32,
    pub separator_bytes: u32,
    pub last_token: u64,
    pub reserved: [u8; 8],
}

const _: () = assert!(size_of::<IndexHeader>() == 32 && offset_of!(IndexHeader, last_token) == 16);

/// One separator: a block whose first token is also the last of the block before. Every key of
/// the run that is at or after `(namespace, key)` lies in this block or later.
///
/// | offset | size | field     | meaning                                       |
/// |--------|------|-----------|-----------------------------------------------|
/// | 0      | 4    | block     | ordinal of the block, at least 1, ascending   |
/// | 4      | 4    | namespace | of the separating key                         |
/// | 8      | 4    | key_end   | where its key ends among the separators' keys |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct SeparatorEntry {
    pub block: u32,
    pub namespace: u32,
    pub key_end: u32,
}

const _: () = assert!(size_of::<SeparatorEntry>() == 12);

/// Header of the partitions section. The [`PartitionRun`]s follow.
///
/// | offset | size | field    | meaning                           |
/// |--------|------|----------|-----------------------------------|
/// | 0      | 4    | checksum | of bytes 4.. to the section's end |
/// | 4      | 4    | count    | runs, at least 1                  |
/// | 8      | 8    | reserved | 0                                 |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct PartitionsHeader {
    pub checksum: u32,
    pub count: u32,
    pub reserved: [u8; 8],
}

const _: () = assert!(size_of::<PartitionsHeader>() == 16);

/// What a table holds of one partition. Runs are in ring order.
///
/// | offset | size | field           | meaning                               |
/// |--------|------|-----------------|---------------------------------------|
/// | 0      | 4    | partition       | number of the arc                     |
/// | 4      | 4    | incarnation_min | smallest incarnation among the records |
/// | 8      | 4    | incarnation_max | greatest                              |
/// | 12     | 4    | reserved        | 0                                     |
/// | 16     | 8    | record_count    | at least 1                            |
/// | 24     | 8    | raw_bytes       | of the records, unpacked              |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct PartitionRun {
    pub partition: u32,
    pub incarnation_min: u32,
    pub incarnation_max: u32,
    pub reserved: u32,
    pub record_count: u64,
    pub raw_bytes: u64,
}

const _: () = assert!(size_of::<PartitionRun>() == 32 && offset_of!(PartitionRun, raw_bytes) == 24);

impl PartitionRun {
    /// The arc.
    #[must_use]
    pub fn partition(&self) -> PartitionId {
        PartitionId(self.partition)
    }
}

/// The table's last sector.
///
/// | offset | size | field             | meaning                                            |
/// |--------|------|-------------------|----------------------------------------------------|
/// | 0      | 8    | magic             | "ANULSST1"                                         |
/// | 8      | 4    | version           | 1, or 2 if there are blocks in parts               |
/// | 12     | 4    | checksum          | of the sector with this field zero                 |
/// | 16     | 8    | table_id          | number of the table                                |
/// | 24     | 8    | file_len          | bytes of the file, this sector included            |
/// | 32     | 8    | data_len          | bytes of the blocks, padded to a sector            |
/// | 40     | 8    | filter_len        | bytes; the index follows                           |
/// | 48     | 8    | index_len         | bytes; the partitions follow                       |
/// | 56     | 8    | partitions_len    | bytes                                              |
/// | 64     | 8    | record_count      | at least 1                                         |
/// | 72     | 8    | tombstone_count   | records of kind delete                             |
/// | 80     | 8    | expiring_count    | records with an expiry                             |
/// | 88     | 8    | raw_bytes         | of all records, unpacked                           |
/// | 96     | 8    | first_token       | of the first record                                |
/// | 104    | 8    | last_token        | of the last record                                 |
/// | 112    | 8    | timestamp_min     | smallest stamp                                     |
/// | 120    | 8    | timestamp_max     | greatest stamp                                     |
/// | 128    | 8    | expiry_ms_min     | earliest expiry; 0 without expiring records        |
/// | 136    | 8    | expiry_ms_max     | latest expiry; 0 without expiring records          |
/// | 144    | 4    | block_count       | at least 1                                         |
/// | 148    | 4    | partition_bits    | the ring has 2^this partitions                     |
/// | 152    | 4    | block_size        | target, for `inspect`                              |
/// | 156    | 356  | reserved          | 0                                                  |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the table above documents each field")]
pub struct Footer {
    pub magic: u64,
    pub version: u32,
    pub checksum: u32,
    pub table_id: u64,
    pub file_len: u64,
    pub data_len: u64,
    pub filter_len: u64,
    pub index_len: u64,
    pub partitions_len: u64,
    pub record_count: u64,
    pub tombstone_count: u64,
    pub expiring_count: u64,
    pub raw_bytes: u64,
    pub first_token: u64,
    pub last_token: u64,
    pub timestamp_min: u64,
    pub timestamp_max: u64,
    pub expiry_ms_min: u64,
    pub expiry_ms_max: u64,
    pub block_count: u32,
    pub partition_bits: u32,
    pub block_size: u32,
    pub reserved: [u8; 356],
}

const _: () = assert!(size_of::<Footer>() == SECTOR && align_of::<Footer>() == 8);
const _: () = assert!(offset_of!(Footer, expiry_ms_max) == 136);
const _: () = assert!(offset_of!(Footer, reserved) == 156);

impl Footer {
    /// The checksum that this footer ought to have.
    #[must_use]
    pub fn expected_checksum(&self, salt: u64) -> u32 {
        let offset = self.file_len.wrapping_sub(SECTOR as u64);
        let unsummed = Footer { checksum: 0, ..*self };
        checksum::salted(salt, offset, bytemuck::bytes_of(&unsummed))
    }

    /// Reads the footer of a file of `file_len` bytes from its last sector.
    ///
    /// # Errors
    /// `Corrupt` when it is no footer or damaged, `Mismatch` when it is another table's or of a
    /// newer version. Nothing has been used of it.
    pub fn parse(sector: &[u8], file_len: u64, identity: &TableIdentity) -> Result<Footer> {
        let at = file_len.saturating_sub(SECTOR as u64);
        let corrupt = |what: &str| Error::corrupt(&identity.path, at, what);
        if sector.len() != SECTOR {
            return Err(corrupt("the footer is cut short"));
        }
        let footer: Footer = bytemuck::pod_read_unaligned(sector);
        if footer.magic != MAGIC {
            return Err(corrupt(
                "the last sector is no table footer: the file is cut, or longer than written",
            ));
        }
        if !(FORMAT_VERSION_PLAIN..=FORMAT_VERSION).contains(&footer.version)
            && footer.checksum == footer.expected_checksum(identity.salt)
        {
            return Err(Error::Mismatch {
                path: identity.path.clone(),
                what: format!(
                    "table format {}, this program reads up to {FORMAT_VERSION}",
                    footer.version
                ),
                remedy: "use the program version that wrote it, or a newer one",
            });
        }
        if footer.checksum != footer.expected_checksum(identity.salt) {
            return Err(if footer.table_id == identity.id.0 {
                corrupt(
                    "the footer's checksum does not match its content, table, shard and cluster",
                )
            } else {
                Error::Mismatch {
                    path: identity.path.clone(),
                    what: format!("expected table {}, found {}", identity.id.0, footer.table_id),
                    remedy: "put the file back where it belongs, or restore this one from a snapshot",
                }
            });
        }
        footer.check(file_len, identity.id).map_err(corrupt)?;
        Ok(footer)
    }

    /// Whether the fields agree with each other and the file.
    fn check(&self, file_len: u64, id: TableId) -> std::result::Result<(), Invalid> {
        let sections = [self.data_len, self.filter_len, self.index_len, self.partitions_len];
        let mut end = 0u64;
        for len in sections {
            if len == 0 || !len.is_multiple_of(SECTOR as u64) {
                return Err("a section's length is not a whole number of sectors");
            }
            end = end.checked_add(len).ok_or("the sections are longer than any file")?;
        }
        if self.table_id != id.0 {
            return Err("the footer names another table");
        }
        if self.file_len != file_len || end > file_len - SECTOR as u64 {
            return Err("the sections do not fit the file");
        }
        if self.record_count == 0
            || self.tombstone_count > self.record_count
            || self.expiring_count > self.record_count
            || u64::from(self.block_count) > self.record_count
            || u64::from(self.block_count) > self.data_len / BLOCK_UNIT as u64
            || self.data_len > DATA_LEN_MAX + SECTOR as u64
            || self.block_count == 0
        {
            return Err("the footer's counts contradict each other");
        }
        if self.first_token > self.last_token
            || self.timestamp_min > self.timestamp_max
            || self.expiry_ms_min > self.expiry_ms_max
        {
            return Err("the footer's bounds are reversed");
        }
        if self.partition_bits > crate::model::token::PARTITION_BITS_MAX {
            return Err("the footer has too many partition bits");
        }
        if self.reserved != [0; 356] {
            return Err("reserved bytes of the footer are not zero");
        }
        Ok(())
    }

    /// Where the filter begins.
    #[must_use]
    pub fn filter_offset(&self) -> u64 {
        self.data_len
    }

    /// Where the index begins.
    #[must_use]
    pub fn index_offset(&self) -> u64 {
        self.data_len + self.filter_len
    }

    /// Where the partitions begin.
    #[must_use]
    pub fn partitions_offset(&self) -> u64 {
        self.data_len + self.filter_len + self.index_len
    }
}

/// What is known of a table without reading its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableMeta {
    /// Number of the table.
    pub id: TableId,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes of the blocks, as stored.
    pub data_bytes: u64,
    /// Bytes of the records, unpacked and without block headers and columns.
    pub raw_bytes: u64,
    /// Number of blocks.
    pub block_count: u32,
    /// Number of records.
    pub record_count: u64,
    /// Records that are tombstones.
    pub tombstone_count: u64,
    /// Records with an expiry.
    pub expiring_count: u64,
    /// Token of the first record.
    pub first_token: Token,
    /// Token of the last record.
    pub last_token: Token,
    /// Smallest stamp.
    pub min_timestamp: Timestamp,
    /// Greatest stamp: a reader that holds something newer need not look here.
    pub max_timestamp: Timestamp,
    /// Earliest expiry of the expiring records, 0 when there is none.
    pub min_expiry_ms: u64,
    /// Latest expiry of the expiring records, 0 when there is none.
    pub max_expiry_ms: u64,
    /// The ring has 2^this partitions.
    pub partition_bits: u32,
    /// The partitions that have records here, in ring order.
    pub partitions: Rc<[PartitionRun]>,
}

impl TableMeta {
    /// From the first to the last token.
    #[must_use]
    pub fn token_range(&self) -> TokenRange {
        TokenRange { first: self.first_token, last: self.last_token }
    }

    /// Whether every record has expired at `now_ms` (milliseconds since 2024-01-01).
    #[must_use]
    pub fn is_all_expired(&self, now_ms: u64) -> bool {
        self.expiring_count == self.record_count && now_ms >= self.max_expiry_ms
    }

    /// The meta that a footer and the partitions section describe.
    #[must_use]
    pub fn new(footer: &Footer, partitions: Rc<[PartitionRun]>) -> TableMeta {
        TableMeta {
            id: TableId(footer.table_id),
            size: footer.file_len,
            data_bytes: footer.data_len,
            raw_bytes: footer.raw_bytes,
            block_count: footer.block_count,
            record_count: footer.record_count,
            tombstone_count: footer.tombstone_count,
            expiring_count: footer.expiring_count,
            first_token: Token(footer.first_token),
            last_token: Token(footer.last_token),
            min_timestamp: Timestamp(footer.timestamp_min),
            max_timestamp: Timestamp(footer.timestamp_max),
            min_expiry_ms: footer.expiry_ms_min,
            max_expiry_ms: footer.expiry_ms_max,
            partition_bits: footer.partition_bits,
            partitions,
        }
    }
}

/// Encodes the partitions section, padded to a sector, its checksum for `offset`.
#[must_use]
pub fn encode_partitions(runs: &[PartitionRun], salt: u64, offset: u64) -> Vec<u8> {
    let count = u32::try_from(runs.len()).expect("at most 65,536 partitions");
    let header = PartitionsHeader { checksum: 0, count, reserved: [0; 8] };
    let mut bytes = bytemuck::bytes_of(&header).to_vec();
    bytes.extend_from_slice(bytemuck::cast_slice(runs));
    seal_section(&mut bytes, salt, offset);
    bytes
}

/// Decodes the partitions section.
///
/// # Errors
/// The first rule broken.
pub fn decode_partitions(
    section: &[u8],
    salt: u64,
    offset: u64,
) -> std::result::Result<Rc<[PartitionRun]>, Invalid> {
    verify_section(section, salt, offset)?;
    let (head, tail) = section
        .split_at_checked(size_of::<PartitionsHeader>())
        .ok_or("the partitions are shorter than their header")?;
    let header: PartitionsHeader = bytemuck::pod_read_unaligned(head);
    let len = (header.count as usize).saturating_mul(size_of::<PartitionRun>());
    let runs = tail.get(..len).ok_or("the partitions are shorter than declared")?;
    let runs: Vec<PartitionRun> =
        runs.chunks_exact(size_of::<PartitionRun>()).map(bytemuck::pod_read_unaligned).collect();
    if header.count == 0 || header.reserved != [0; 8] || runs.iter().any(|run| run.reserved != 0) {
        return Err("the partitions' header is out of range");
    }
    if !runs.windows(2).all(|pair| pair[0].partition < pair[1].partition) {
        return Err("the partitions are out of order");
    }
    Ok(runs.into())
}

/// Pads a section to whole sectors and writes its checksum into its first four bytes.
pub fn seal_section(section: &mut Vec<u8>, salt: u64, offset: u64) {
    section.resize(section.len().next_multiple_of(SECTOR), 0);
    let sum = checksum::salted(salt, offset, &section[4..]);
    section[..4].copy_from_slice(&sum.to_le_bytes());
}

/// Verifies the checksum in a section's (or a block's) first four bytes.
///
/// # Errors
/// The rule broken.
#[inline]
pub fn verify_section(section: &[u8], salt: u64, offset: u64) -> std::result::Result<(), Invalid> {
    let Some((sum, covered)) = section.split_first_chunk::<4>() else {
        return Err("a section is shorter than its checksum");
    };
    if u32::from_le_bytes(*sum) != checksum::salted(salt, offset, covered) {
        return Err("the checksum does not match");
    }
    Ok(())
}

/// An [`Error::Corrupt`] about a table.
pub(crate) fn corrupt(path: &Path, offset: u64, what: &str) -> Error {
    Error::corrupt(path, offset, what)
}
