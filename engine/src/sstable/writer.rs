//! Writes a table: sorted records in, a synced file out.
//!
//! Invariant: a file with a valid footer is complete, because the footer is written last and the
//! sync comes after it; what a crash leaves of an unfinished table has no footer and no name that
//! the manifest knows. Used by flush and compaction in the background class: [`TableWriter::add`]
//! is pure, the caller awaits [`TableWriter::flush`] between records and paces itself there.

use std::mem;
use std::rc::Rc;

use super::block::{self, BlockBuilder};
use super::codec::Packer;
use super::filter::BlockedBloom;
use super::format::{
    BLOCK_UNIT, BLOCKS_MAX, BlockHeader, Codec, DATA_LEN_MAX, FORMAT_VERSION, FORMAT_VERSION_PLAIN,
    Footer, LongHead, LongPart, MAGIC, PartitionRun, RAW_LEN_MAX, SECTOR, TableIdentity, TableMeta,
    encode_partitions,
};
use super::index::IndexBuilder;
use super::long::{self, Parts, YieldOnce};
use crate::buffer::AlignedBuf;
use crate::checksum;
use crate::disk::{File, WriteMode};
use crate::error::{Error, Result};
use crate::model::limits::{BLOCK_SIZE_DEFAULT, KEY_SIZE_MAX};
use crate::model::{Kind, NamespaceId, RecordRef, Token, Value};

/// Bytes that a write to the file gathers.
const CHUNK: usize = 1 << 20;
/// Tokens inserted into the filter between two yields: below 200 us.
const TOKEN_CHUNK: usize = 8 << 10;
/// Greatest target of a block, and most content of a packed one: a half of `SHARED_BLOCK_MAX`.
const BLOCK_SIZE_MAX: usize = 32 << 10;

/// Chooses the codec of a namespace.
pub type CodecOf = Rc<dyn Fn(NamespaceId) -> Codec>;

/// How to write a table.
#[derive(Clone)]
pub struct TableOptions {
    /// Target of a block as stored, in bytes, 512 to 32 KiB. Default 4096. Larger blocks pack
    /// better and cost more a point read.
    pub block_size: usize,
    /// Filter bits for each record, 4 to 32. Default 10: 1.05 % false positives; 12: 0.42 %.
    pub filter_bits_per_key: u32,
    /// Codec by namespace. A block holds neighbours on the ring, of any namespace, and takes the
    /// codec that most of its bytes ask for. Default: none.
    pub codec_of: CodecOf,
    /// Level of zstd, 1 to 19. Default 1: compaction shares its core with requests.
    pub zstd_level: i32,
    /// The ring has 2^this partitions.
    pub partition_bits: u32,
}

impl Default for TableOptions {
    fn default() -> TableOptions {
        TableOptions {
            block_size: BLOCK_SIZE_DEFAULT,
            filter_bits_per_key: 10,
            codec_of: Rc::new(|_| Codec::None),
            zstd_level: 1,
            partition_bits: 0,
        }
    }
}

impl std::fmt::Debug for TableOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableOptions")
            .field("block_size", &self.block_size)
            .field("filter_bits_per_key", &self.filter_bits_per_key)
            .field("zstd_level", &self.zstd_level)
            .field("partition_bits", &self.partition_bits)
            .finish_non_exhaustive()
    }
}

/// The greatest key so far.
#[derive(Debug, Default)]
struct Last {
    token: Token,
    namespace: NamespaceId,
    key: Vec<u8>,
}

/// A table being written. Drop it, and remove the file, to give the table up.
#[derive(Debug)]
pub struct TableWriter<F> {
    file: F,
    identity: TableIdentity,
    options: TableOptions,
    /// Bytes in the file; those of `out` come next.
    written: u64,
    out: AlignedBuf,
    block: BlockBuilder,
    packer: Packer,
    /// Bytes of the open block by the codec that they ask for.
    asked: [usize; Codec::ALL.len()],
    /// What a packed block of this table shrinks to, in 1/256 of its content; moves slowly.
    packed_ratio: usize,
    index: IndexBuilder,
    tokens: Vec<Vec<u64>>,
    partitions: Vec<PartitionRun>,
    last: Last,
    /// Counts and bounds, filled as records arrive.
    footer: Footer,
    failure: Option<Error>,
}

impl<F: File> TableWriter<F> {
    /// Begins a table in an empty file.
    #[must_use]
    pub fn new(file: F, identity: TableIdentity, mut options: TableOptions) -> TableWriter<F> {
        options.block_size = options.block_size.clamp(SECTOR, BLOCK_SIZE_MAX);
        let mut footer: Footer = bytemuck::Zeroable::zeroed();
        footer.magic = MAGIC;
        footer.version = FORMAT_VERSION_PLAIN;
        footer.table_id = identity.id.0;
        footer.timestamp_min = u64::MAX;
        footer.expiry_ms_min = u64::MAX;
        footer.partition_bits = options.partition_bits;
        footer.block_size = u32::try_from(options.block_size).expect("at most 32 KiB");
        TableWriter {
            file,
            packer: Packer::new(options.zstd_level),
            identity,
            options,
            written: 0,
            out: AlignedBuf::with_capacity(CHUNK + (64 << 10)),
            block: BlockBuilder::default(),
            asked: [0; Codec::ALL.len()],
            packed_ratio: 256,
            index: IndexBuilder::default(),
            tokens: Vec::new(),
            partitions: Vec::new(),
            last: Last::default(),
            footer,
            failure: None,
        }
    }

    /// Number of records added.
    #[must_use]
    pub fn record_count(&self) -> u64 {
        self.footer.record_count
    }

    /// Bytes of the blocks so far, the open one unpacked: what the table will have as data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.written + self.out.len() as u64 + self.block.raw_len() as u64
    }

    /// Token of the last record added.
    #[must_use]
    pub fn last_token(&self) -> Option<Token> {
        (self.footer.record_count > 0).then_some(self.last.token)
    }

    /// Adds the next record in `(token, namespace, key)` order. A long one gets a block in parts: it
    /// is packed and checked part by part with a `pause` after each, and written as that goes.
    ///
    /// # Errors
    /// As [`TableWriter::add`], and of the file as [`TableWriter::flush`].
    #[inline]
    pub async fn append(&mut self, record: &RecordRef<'_>, pause: &impl AsyncFn()) -> Result<()> {
        if long::is_long(record) { self.add_long(record, pause).await } else { self.add(record) }
    }

    async fn add_long(&mut self, record: &RecordRef<'_>, pause: &impl AsyncFn()) -> Result<()> {
        let len = block::encoded_len(record);
        self.check(record, len + long::HEAD_SIZE_MAX)?;
        self.close_block();
        if self.footer.record_count > 0 && self.last.token == record.token {
            self.index
                .separate((self.last.namespace, &self.last.key), (record.namespace, record.key));
        }
        let codec = (self.options.codec_of)(record.namespace);
        let offset = self.written + self.out.len() as u64;
        let mut encoded = Vec::new();
        block::encode(&RecordRef { value: Value::EMPTY, ..*record }, &mut encoded);
        let count = record.value.len().div_ceil(long::PART_SIZE);
        let mut head = LongHead {
            head_size: 0,
            value_size: len_u32(record.value.len()),
            token: record.token.0,
            part_count: len_u32(count),
            record_size: len_u32(encoded.len()),
        };
        head.head_size = len_u32(head.expected_size());
        let (parts, packed) = self.pack_parts(record.value, codec, offset, &head, pause).await;
        let stored: usize = parts.iter().map(|part| part.stored_size as usize).sum();
        let mut header = BlockHeader {
            checksum: 0,
            stored_len: len_u32(head.expected_size() - size_of::<BlockHeader>() + stored),
            raw_len: len_u32(len),
            record_count: 1,
            codec: if packed.iter().any(Option::is_some) { codec as u8 } else { 0 },
            layout: 1,
        };
        let mut front = bytemuck::bytes_of(&header).to_vec();
        front.extend_from_slice(bytemuck::bytes_of(&head));
        front.extend_from_slice(bytemuck::cast_slice(&parts));
        front.extend_from_slice(&encoded);
        front.resize(head.expected_size(), 0);
        header.checksum = checksum::salted(self.identity.salt, offset, &front[4..]);
        front[..4].copy_from_slice(&header.checksum.to_le_bytes());
        self.out.extend_from_slice(&front);
        let mut raw = Parts::new(record.value);
        for packed in packed {
            let part = raw.next();
            self.out.extend_from_slice(packed.as_deref().unwrap_or(part));
            if self.should_flush() {
                self.flush().await?;
            }
            pause().await;
        }
        self.out.pad_to(BLOCK_UNIT);
        self.footer.version = FORMAT_VERSION;
        self.index.push(record.token, unit(offset));
        self.note(record, len);
        Ok(())
    }

    /// The parts of a value whose block will lie at `offset`, and those of them that packing made
    /// smaller by an eighth. A pause after each: nobody waits for more than one.
    async fn pack_parts(
        &mut self,
        value: Value<'_>,
        codec: Codec,
        offset: u64,
        head: &LongHead,
        pause: &impl AsyncFn(),
    ) -> (Vec<LongPart>, Vec<Option<Vec<u8>>>) {
        let count = head.part_count as usize;
        let (mut parts, mut packed) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut raw = Parts::new(value);
        let mut at = offset + u64::from(head.head_size);
        for index in 0..count {
            let part = raw.next();
            let mut smaller = Vec::new();
            let helps = codec != Codec::None
                && self.packer.pack(codec, part, &mut smaller)
                && smaller.len() <= part.len() - part.len() / 8;
            smaller.shrink_to_fit();
            let stored = if helps { &smaller[..] } else { part };
            let mut sum = checksum::salted(self.identity.salt, at, stored);
            let end = at + stored.len() as u64;
            if index + 1 == count {
                let padding = end.next_multiple_of(BLOCK_UNIT as u64) - end;
                let padding = usize::try_from(padding).expect("below a unit");
                sum = checksum::proceed(sum, &[0; BLOCK_UNIT][..padding]);
            }
            parts.push(LongPart { stored_size: len_u32(stored.len()), checksum: sum });
            packed.push(helps.then_some(smaller));
            at = end;
            pause().await;
        }
        (parts, packed)
    }

    /// Adds the next record in `(token, namespace, key)` order. Buffers; never waits.
    ///
    /// # Errors
    /// `Invalid` when the record is not after the last one, its key is empty or too long, or it is
    /// longer than any record may be. State: as before.
    pub fn add(&mut self, record: &RecordRef<'_>) -> Result<()> {
        let len = block::encoded_len(record);
        self.check(record, len)?;
        let codec = (self.options.codec_of)(record.namespace);
        if !self.block.is_empty() && self.is_full_before(len, codec) {
            self.close_block();
        }
        if self.block.is_empty() && self.footer.record_count > 0 && self.last.token == record.token
        {
            self.index
                .separate((self.last.namespace, &self.last.key), (record.namespace, record.key));
        }
        self.block.push(record);
        self.asked[codec as usize] += len;
        self.note(record, len);
        Ok(())
    }

    fn note(&mut self, record: &RecordRef<'_>, len: usize) {
        self.count(record, len);
        self.last.token = record.token;
        self.last.namespace = record.namespace;
        self.last.key.clear();
        self.last.key.extend_from_slice(record.key);
    }

    fn check(&self, record: &RecordRef<'_>, len: usize) -> Result<()> {
        let invalid = |what: &str| Err(Error::Invalid { what: what.to_owned() });
        let last = &self.last;
        if self.footer.record_count > 0
            && record.cmp_key(last.token, last.namespace, &last.key).is_le()
        {
            return invalid("a table's records must come in the order of token, namespace, key");
        }
        if record.key.is_empty() || record.key.len() > KEY_SIZE_MAX {
            return invalid("a key has 1 to 4096 bytes");
        }
        // The slack holds the record's entry in the columns.
        if len + 64 > RAW_LEN_MAX {
            return invalid("a record is longer than any table block may be");
        }
        if self.index.block_count() >= BLOCKS_MAX || self.index.separator_bytes() > (1 << 31) {
            return invalid("a table has too many blocks");
        }
        if self.data_bytes() + len as u64 + SECTOR as u64 > DATA_LEN_MAX {
            return invalid("a table holds at most 64 GiB");
        }
        Ok(())
    }

    /// Counts and bounds of the footer and the partitions, and the filter's tokens.
    fn count(&mut self, record: &RecordRef<'_>, len: usize) {
        let footer = &mut self.footer;
        if footer.record_count == 0 {
            footer.first_token = record.token.0;
        }
        footer.last_token = record.token.0;
        footer.record_count += 1;
        footer.raw_bytes += len as u64;
        footer.tombstone_count += u64::from(record.kind == Kind::Delete);
        footer.timestamp_min = footer.timestamp_min.min(record.timestamp.0);
        footer.timestamp_max = footer.timestamp_max.max(record.timestamp.0);
        if record.expiry_ms != 0 {
            footer.expiring_count += 1;
            footer.expiry_ms_min = footer.expiry_ms_min.min(record.expiry_ms);
            footer.expiry_ms_max = footer.expiry_ms_max.max(record.expiry_ms);
        }
        let partition = record.token.partition(self.options.partition_bits).0;
        match self.partitions.last_mut() {
            Some(run) if run.partition == partition => {
                run.incarnation_min = run.incarnation_min.min(record.incarnation);
                run.incarnation_max = run.incarnation_max.max(record.incarnation);
                run.record_count += 1;
                run.raw_bytes += len as u64;
            }
            _ => self.partitions.push(PartitionRun {
                partition,
                incarnation_min: record.incarnation,
                incarnation_max: record.incarnation,
                reserved: 0,
                record_count: 1,
                raw_bytes: len as u64,
            }),
        }
        match self.tokens.last_mut() {
            Some(chunk) if chunk.len() < TOKEN_CHUNK => chunk.push(record.token.0),
            _ => {
                let mut chunk = Vec::with_capacity(TOKEN_CHUNK);
                chunk.push(record.token.0);
                self.tokens.push(chunk);
            }
        }
    }

    /// Whether the open block should close before a record of this length.
    fn is_full_before(&self, len: usize, codec: Codec) -> bool {
        let with = self.block.raw_len_with(len);
        if !self.block.has_room(len) {
            return true;
        }
        if codec == Codec::None || self.dominant_codec() == Codec::None {
            return with + block::HEADER > self.options.block_size;
        }
        // Aim at the target after packing, by what the last blocks shrank to; at most four times
        // as much content, because a point read unpacks all of it.
        let aim = self.options.block_size * 256 / self.packed_ratio.max(64);
        with > aim.min(BLOCK_SIZE_MAX)
    }

    /// What most bytes of the open block ask for.
    fn dominant_codec(&self) -> Codec {
        let mut dominant = Codec::None;
        for codec in Codec::ALL {
            if self.asked[codec as usize] > self.asked[dominant as usize] {
                dominant = codec;
            }
        }
        dominant
    }

    fn close_block(&mut self) {
        let Some(first_token) = self.block.first_token() else { return };
        let offset = self.written + self.out.len() as u64;
        let codec = self.dominant_codec();
        let raw_len = self.block.raw_len();
        let handle =
            self.block.finish(&mut self.out, self.identity.salt, offset, &mut self.packer, codec);
        if codec != Codec::None {
            let ratio = (handle.len as usize * 256 / raw_len).clamp(32, 256);
            self.packed_ratio = (self.packed_ratio * 3 + ratio) / 4;
        }
        self.asked = [0; Codec::ALL.len()];
        self.index.push(first_token, unit(offset));
    }

    /// Whether a write's worth of bytes waits: call [`TableWriter::flush`] soon.
    #[must_use]
    pub fn should_flush(&self) -> bool {
        self.out.len() >= CHUNK
    }

    /// Writes the closed blocks that wait, in one write.
    ///
    /// # Errors
    /// Of the file. State: the table is lost, drop it and remove the file.
    pub async fn flush(&mut self) -> Result<()> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let whole = self.out.len() - self.out.len() % self.file.alignment();
        if whole == 0 {
            return Ok(());
        }
        let mut buf = mem::replace(&mut self.out, AlignedBuf::with_capacity(0));
        let rest = buf[whole..].to_vec();
        buf.truncate(whole);
        let (mut buf, result) = self.file.write_at(self.written, buf, WriteMode::Cached).await;
        if let Err(error) = result {
            self.failure = Some(error.clone());
            return Err(error);
        }
        self.written += whole as u64;
        if buf.capacity() > 4 * CHUNK {
            buf = AlignedBuf::with_capacity(CHUNK + (64 << 10));
        }
        buf.clear();
        buf.extend_from_slice(&rest);
        self.out = buf;
        Ok(())
    }

    /// Appends a section in chunks, and returns its length.
    async fn append_section(&mut self, section: &[u8]) -> Result<u64> {
        for part in section.chunks(CHUNK) {
            self.out.extend_from_slice(part);
            if self.should_flush() {
                self.flush().await?;
            }
        }
        Ok(section.len() as u64)
    }

    /// Writes what is left, filter, index, partitions and footer, and syncs the file. The caller
    /// then makes its name durable.
    ///
    /// # Errors
    /// `Invalid` when no record was added; else of the file. State: the table is lost, remove the
    /// file.
    pub async fn finish(mut self) -> Result<TableMeta> {
        if self.footer.record_count == 0 {
            return Err(Error::Invalid { what: "a table has at least one record".to_owned() });
        }
        self.close_block();
        let salt = self.identity.salt;
        let filter = self.build_filter().await;
        let end_unit = unit(self.written + self.out.len() as u64);
        // Flushing keeps what is left below a device unit, so the buffer's length is in step with
        // the file's as far as sectors go.
        self.out.pad_to(SECTOR);
        let data_len = self.written + self.out.len() as u64;
        let filter_len = self.append_section(&filter.encode(salt, data_len)).await?;
        drop(filter);
        let index_at = data_len + filter_len;
        let index = self.index.encode(end_unit, self.last.token, salt, index_at);
        let index_len = self.append_section(&index).await?;
        let partitions = encode_partitions(&self.partitions, salt, index_at + index_len);
        let partitions_len = self.append_section(&partitions).await?;
        // The footer is the last sector of a file that is a whole number of the device's units.
        let end = self.written + self.out.len() as u64;
        let file_len = (end + SECTOR as u64).next_multiple_of(self.file.alignment() as u64);
        let padding = usize::try_from(file_len - SECTOR as u64 - end).expect("below the alignment");
        self.out.resize(self.out.len() + padding);
        let footer = &mut self.footer;
        footer.file_len = file_len;
        footer.data_len = data_len;
        footer.filter_len = filter_len;
        footer.index_len = index_len;
        footer.partitions_len = partitions_len;
        footer.block_count = u32::try_from(self.index.block_count()).expect("checked in add");
        if footer.expiring_count == 0 {
            footer.expiry_ms_min = 0;
        }
        footer.checksum = footer.expected_checksum(salt);
        self.out.extend_from_slice(bytemuck::bytes_of(&self.footer));
        self.flush().await?;
        assert_eq!(self.written, file_len, "the footer ends the file");
        self.file.sync().await?;
        Ok(TableMeta::new(&self.footer, self.partitions.into()))
    }

    async fn build_filter(&mut self) -> BlockedBloom {
        let key_count = usize::try_from(self.footer.record_count).expect("64-bit host");
        let mut filter = BlockedBloom::with_capacity(key_count, self.options.filter_bits_per_key);
        for chunk in mem::take(&mut self.tokens) {
            for token in chunk {
                filter.insert(Token(token));
            }
            YieldOnce::default().await;
        }
        filter
    }
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).expect("a block is below 64 MiB")
}

/// The ordinal of the [`BLOCK_UNIT`] at an offset.
fn unit(offset: u64) -> u32 {
    u32::try_from(offset / BLOCK_UNIT as u64).expect("a table's length is checked in `add`")
}
