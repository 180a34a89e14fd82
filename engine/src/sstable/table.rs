//! An open table: filter and index in memory, blocks on the device.
//!
//! Invariant: a point lookup reads exactly one block, and none where the filter says no. What to
//! read is decided by pure code ([`Table::may_contain`], [`Table::locate`]); one await fetches the
//! block; pure code searches it. Damage is `Corrupt`, which means unknown, never absent.

use std::ops::Range;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use super::block::Block;
use super::filter::BlockedBloom;
use super::format::{
    BlockHandle, Footer, Invalid, SECTOR, TableId, TableIdentity, TableMeta, corrupt,
    decode_partitions,
};
use super::index::TokenIndex;
use super::long::{HEAD_SIZE_MAX, Head, PART_SIZE, SHORT_BLOCK_MAX, YieldOnce};
use super::rebuild;
use crate::buffer::AlignedBuf;
use crate::disk::File;
use crate::error::Result;
use crate::model::{NamespaceId, Piece, Record, Token, TokenRange};

/// Bytes that one read of a section takes.
const SECTION_READ: usize = 1 << 20;
/// Bytes of parts that one read takes.
const PART_READ_SIZE: usize = 256 << 10;
const _: () = assert!(HEAD_SIZE_MAX <= PART_READ_SIZE && HEAD_SIZE_MAX <= SHORT_BLOCK_MAX as usize);
/// Such reads at once.
const PART_READS: usize = 4;
/// Bytes of a value that are checked and unpacked between two yields.
const PART_STEP: usize = 64 << 10;
/// Pages of a file system: what lies between their borders can be given back.
const PUNCH_UNIT: u64 = 4096;

/// One open table.
#[derive(Debug)]
pub struct Table<F> {
    file: F,
    identity: TableIdentity,
    meta: TableMeta,
    filter: BlockedBloom,
    index: TokenIndex,
}

impl<F: File> Table<F> {
    /// Opens a table: reads its footer, filter, index and partitions; time and memory are in
    /// proportion to the number of blocks. A damaged filter or index is rebuilt in memory from
    /// the blocks, with a warning in the log.
    ///
    /// # Errors
    /// `Corrupt` when footer, partitions, or what a rebuild needs are damaged; `Mismatch` when it
    /// is another table or a newer format; else of the file. Nothing is changed.
    pub async fn open(file: F, identity: TableIdentity) -> Result<Table<F>> {
        let footer = read_footer(&file, &identity).await?;
        let read = async |offset, len| read_section(&file, &identity, offset, len).await;
        let bytes = read(footer.partitions_offset(), footer.partitions_len).await?;
        let partitions = decode_partitions(&bytes, identity.salt, footer.partitions_offset())
            .map_err(|what| corrupt(&identity.path, footer.partitions_offset(), what))?;
        let bytes = read(footer.index_offset(), footer.index_len).await?;
        let index = match decode_index(&bytes, &footer, identity.salt) {
            Ok(index) => index,
            Err(what) => {
                warn(&identity, footer.index_offset(), what);
                rebuild::index(&file, &identity, &footer).await?
            }
        };
        let bytes = read(footer.filter_offset(), footer.filter_len).await?;
        let filter = match decode_filter(&bytes, &footer, identity.salt) {
            Ok(filter) => filter,
            Err(what) => {
                warn(&identity, footer.filter_offset(), what);
                rebuild::filter(&file, &identity, &footer).await?
            }
        };
        let meta = TableMeta::new(&footer, partitions);
        Ok(Table { file, identity, meta, filter, index })
    }

    /// What is known of the table without reading blocks.
    #[must_use]
    pub fn meta(&self) -> &TableMeta {
        &self.meta
    }

    /// Number of the table.
    #[must_use]
    pub fn id(&self) -> TableId {
        self.identity.id
    }

    /// Which table this is.
    #[must_use]
    pub fn identity(&self) -> &TableIdentity {
        &self.identity
    }

    /// The open file, for the caller who links, punches or removes it.
    #[must_use]
    pub fn file(&self) -> &F {
        &self.file
    }

    /// The index, for planning by bytes and blocks.
    #[must_use]
    pub fn index(&self) -> &TokenIndex {
        &self.index
    }

    /// The filter.
    #[must_use]
    pub fn filter(&self) -> &BlockedBloom {
        &self.filter
    }

    /// Bytes of memory that the open table holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.filter.size()
            + self.index.size()
            + size_of_val(&*self.meta.partitions)
            + size_of::<Table<F>>()
    }

    /// Whether the table may hold a key with this token. False is certain.
    #[inline]
    #[must_use]
    pub fn may_contain(&self, token: Token) -> bool {
        self.meta.first_token <= token
            && token <= self.meta.last_token
            && self.filter.may_contain(token)
    }

    /// Asks the processor for the memory that [`Table::may_contain`] will want.
    #[inline]
    pub fn prefetch(&self, token: Token) {
        self.filter.prefetch(token);
    }

    /// The one block that may hold the key. `None` when the token lies outside the table.
    #[inline]
    #[must_use]
    pub fn locate(&self, token: Token, namespace: NamespaceId, key: &[u8]) -> Option<BlockHandle> {
        self.index.locate(token, namespace, key)
    }

    /// The block that begins at this offset, if one does: for warm lists.
    #[must_use]
    pub fn handle_at(&self, offset: u64) -> Option<BlockHandle> {
        self.index.handle_at(offset)
    }

    /// Bytes of the blocks that may hold tokens of the range, as stored.
    #[must_use]
    pub fn bytes_touching(&self, range: TokenRange) -> u64 {
        let bytes = self.index.bytes(self.index.touching(range));
        bytes.end - bytes.start
    }

    /// Where in the file the blocks lie whose tokens are all in the range: what may be punched
    /// when the range has been consumed. Rounded in to the pages of a file system.
    #[must_use]
    pub fn bytes_inside(&self, range: TokenRange) -> Range<u64> {
        let bytes = self.index.bytes(self.index.inside(range));
        let start = bytes.start.next_multiple_of(PUNCH_UNIT);
        start..(bytes.end - bytes.end % PUNCH_UNIT).max(start)
    }

    /// What to read in order to hold a block: offset and length, rounded out to the device's units.
    #[must_use]
    pub fn read_range(&self, handle: BlockHandle) -> (u64, usize) {
        let (start, _, len) = round_out(&self.file, handle.offset, handle.len as usize);
        (start, len)
    }

    /// Reads one block and checks it. One device read; of a long block in parts one for each 256 KiB,
    /// with a yield after each 64 KiB of the value that were checked.
    ///
    /// # Errors
    /// `Corrupt` when the block fails its check, else of the file. Nothing is changed.
    pub async fn read_block(&self, handle: BlockHandle) -> Result<Block> {
        let len = handle.len as usize;
        let first = if handle.len > SHORT_BLOCK_MAX { len.min(PART_READ_SIZE) } else { len };
        let (mut buf, mut at) = read_span(&self.file, &self.identity, handle.offset, first).await?;
        if handle.len > SHORT_BLOCK_MAX {
            let head = Head::parse(&buf[at..], handle, self.identity.salt);
            if let Some(head) = self.valid(handle, head)? {
                return self.read_parts(handle, head, (buf, at), first).await;
            }
        }
        if first < len {
            (buf, at) = read_span(&self.file, &self.identity, handle.offset, len).await?;
        }
        self.check(handle, Block::parse(buf, at, handle, self.identity.salt))
    }

    /// The block whose head and first `len` bytes, at `at` of a buffer, were read.
    async fn read_parts(
        &self,
        handle: BlockHandle,
        head: Head,
        (buf, at): (AlignedBuf, usize),
        len: usize,
    ) -> Result<Block> {
        let mut value = Vec::with_capacity(head.count());
        let known = head.before(len);
        let mut asked = known.end;
        self.take_parts(handle, &head, known, (buf, at), 0, &mut value).await?;
        let mut reads = FuturesOrdered::new();
        loop {
            while asked < head.count() && reads.len() < PART_READS {
                let parts = head.fitting(asked, PART_READ_SIZE);
                asked = parts.end;
                let span = head.span(parts.clone());
                let offset = handle.offset + span.start as u64;
                reads.push_back(async move {
                    let read = read_span(&self.file, &self.identity, offset, span.len()).await?;
                    Result::Ok((parts, read, span.start))
                });
            }
            let Some(read) = reads.next().await else { break };
            let (parts, read, start) = read?;
            self.take_parts(handle, &head, parts, read, start, &mut value).await?;
        }
        self.valid(handle, Block::in_parts(head.payload, value, handle))
    }

    /// Checks and unpacks parts; what is at `at` of the buffer lies at `start` of the block.
    async fn take_parts(
        &self,
        handle: BlockHandle,
        head: &Head,
        parts: Range<usize>,
        (buf, at): (AlignedBuf, usize),
        start: usize,
        value: &mut Vec<Piece>,
    ) -> Result<()> {
        let buf = Piece::read(buf);
        for index in parts {
            let span = head.span(index..index + 1);
            let stored = buf.part(at + span.start - start, span.len());
            let piece = head.piece(index, &stored, handle.offset, self.identity.salt);
            value.push(self.valid(handle, piece)?);
            if ((index + 1) * PART_SIZE).is_multiple_of(PART_STEP) {
                YieldOnce::default().await;
            }
        }
        Ok(())
    }

    /// Checks the bytes that [`Table::read_range`] names, for a caller who reads by himself.
    ///
    /// # Errors
    /// `Corrupt` when the block fails its check.
    pub fn parse_block(&self, bytes: AlignedBuf, handle: BlockHandle) -> Result<Block> {
        let (_, at, _) = round_out(&self.file, handle.offset, handle.len as usize);
        self.check(handle, Block::parse(bytes, at, handle, self.identity.salt))
    }

    pub(crate) fn check(
        &self,
        handle: BlockHandle,
        parsed: std::result::Result<Block, Invalid>,
    ) -> Result<Block> {
        self.valid(handle, parsed)
    }

    fn valid<T>(&self, handle: BlockHandle, parsed: std::result::Result<T, Invalid>) -> Result<T> {
        parsed.map_err(|what| corrupt(&self.identity.path, handle.offset, what))
    }

    /// Looks a key up, past the cache: for tools and tests.
    ///
    /// # Errors
    /// As [`Table::read_block`].
    pub async fn get(
        &self,
        token: Token,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Record>> {
        if !self.may_contain(token) {
            return Ok(None);
        }
        let Some(handle) = self.locate(token, namespace, key) else { return Ok(None) };
        let block = self.read_block(handle).await?;
        Ok(block.get(token, namespace, key).map(|record| record.to_owned()))
    }
}

fn warn(identity: &TableIdentity, offset: u64, what: Invalid) {
    tracing::warn!(
        path = %identity.path.display(), offset, what,
        "a table's filter or index is damaged and is rebuilt from its blocks"
    );
}

fn decode_index(
    bytes: &[u8],
    footer: &Footer,
    salt: u64,
) -> std::result::Result<TokenIndex, Invalid> {
    let index = TokenIndex::decode(bytes, salt, footer.index_offset(), footer.data_len)?;
    if index.block_count() != footer.block_count as usize
        || index.first_token(0).0 != footer.first_token
        || index.last_token().0 != footer.last_token
    {
        return Err("the index and the footer contradict each other");
    }
    Ok(index)
}

fn decode_filter(
    bytes: &[u8],
    footer: &Footer,
    salt: u64,
) -> std::result::Result<BlockedBloom, Invalid> {
    let filter = BlockedBloom::decode(bytes, salt, footer.filter_offset())?;
    if filter.key_count() != footer.record_count {
        return Err("the filter and the footer contradict each other");
    }
    Ok(filter)
}

/// Reads the footer of a table file.
///
/// # Errors
/// As [`Table::open`].
pub async fn read_footer<F: File>(file: &F, identity: &TableIdentity) -> Result<Footer> {
    let len = file.len().await?;
    let sector = SECTOR as u64;
    if len < 2 * sector || !len.is_multiple_of(sector) {
        let what = "the file is cut: its length is not that of any table";
        return Err(corrupt(&identity.path, len, what));
    }
    let (buf, at) = read_span(file, identity, len - sector, SECTOR).await?;
    Footer::parse(&buf[at..at + SECTOR], len, identity)
}

/// A span rounded out to the device's units: where it starts, where the span begins in it, length.
fn round_out<F: File>(file: &F, offset: u64, len: usize) -> (u64, usize, usize) {
    let unit = file.alignment();
    let start = offset - offset % unit as u64;
    let at = usize::try_from(offset - start).expect("below the alignment");
    (start, at, (at + len).next_multiple_of(unit))
}

/// Reads a span, rounded out to the device's units; the span begins at the
/// returned position of the buffer and is complete.
pub(crate) async fn read_span<F: File>(
    file: &F,
    identity: &TableIdentity,
    offset: u64,
    len: usize,
) -> Result<(AlignedBuf, usize)> {
    let (start, at, rounded) = round_out(file, offset, len);
    let buf = file.read_at(start, rounded).await?;
    if buf.len() < at + len {
        return Err(corrupt(&identity.path, offset, "the file ends before its footer says"));
    }
    Ok((buf, at))
}

/// Reads a section, whose length the footer's check has bounded by the file's.
async fn read_section<F: File>(
    file: &F,
    identity: &TableIdentity,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(len).expect("64-bit host"));
    while (bytes.len() as u64) < len {
        let done = bytes.len() as u64;
        let part = usize::try_from(len - done).map_or(SECTION_READ, |left| left.min(SECTION_READ));
        let (buf, at) = read_span(file, identity, offset + done, part).await?;
        bytes.extend_from_slice(&buf[at..at + part]);
    }
    Ok(bytes)
}
