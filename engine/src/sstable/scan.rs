//! Sequential reading of a table in token order, in large reads, past the cache.
//!
//! Invariant: yields every block that may hold a token of the range, in order, each once; the
//! records at either end may lie outside the range ([`Block::iter_range`] leaves them out). A long
//! block is read by itself, in parts.
//! Compaction, export, Merkle leaves and scrub read tables this way.

use std::ops::Range;
use std::rc::Rc;

use super::block::Block;
use super::format::BlockHandle;
use super::long::SHORT_BLOCK_MAX;
use super::table::{Table, read_span};
use crate::buffer::AlignedBuf;
use crate::disk::File;
use crate::error::Result;
use crate::model::TokenRange;

/// What was read last.
#[derive(Debug)]
struct Chunk {
    buf: Rc<AlignedBuf>,
    /// Position of the first block in the buffer.
    at: usize,
    /// Offset of the first block in the file.
    offset: u64,
    /// Positions of the blocks that are whole in it.
    blocks: Range<usize>,
}

/// A scan of one table. Blocks share the buffer of the read they came with, so hold few of them.
#[derive(Debug)]
pub struct TableScan<F> {
    table: Rc<Table<F>>,
    blocks: Range<usize>,
    read_size: usize,
    chunk: Option<Chunk>,
}

impl<F: File> TableScan<F> {
    /// A scan of the blocks that may hold tokens of `range`, with reads of about `read_size`
    /// bytes (at least one block each).
    #[must_use]
    pub fn new(table: Rc<Table<F>>, range: TokenRange, read_size: usize) -> TableScan<F> {
        let blocks = table.index().touching(range);
        TableScan { table, blocks, read_size, chunk: None }
    }

    /// Bytes of the blocks that are still to come.
    #[must_use]
    pub fn bytes_left(&self) -> u64 {
        let bytes = self.table.index().bytes(self.blocks.clone());
        bytes.end - bytes.start
    }

    /// Whether the next call of [`TableScan::next_block`] needs no read.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.blocks.is_empty() || self.chunk_of(self.blocks.start).is_some()
    }

    /// The next block, or `None` at the end.
    ///
    /// # Errors
    /// `Corrupt` for a damaged block, else of the file. State: the block is passed over, and the
    /// next call goes on behind it, so that a scrub can name all damage; whoever needs every
    /// record must stop.
    pub async fn next_block(&mut self) -> Result<Option<Block>> {
        let Some(block) = self.blocks.next() else { return Ok(None) };
        let handle = self.table.index().handle(block);
        if handle.len > SHORT_BLOCK_MAX {
            return self.table.read_block(handle).await.map(Some);
        }
        if self.chunk_of(block).is_none() {
            self.chunk = None;
            self.chunk = Some(self.read(block, handle).await?);
        }
        let chunk = self.chunk.as_ref().expect("read just now");
        let at =
            chunk.at + usize::try_from(handle.offset - chunk.offset).expect("inside the chunk");
        let salt = self.table.identity().salt;
        self.table.check(handle, Block::parse_shared(&chunk.buf, at, handle, salt)).map(Some)
    }

    fn chunk_of(&self, block: usize) -> Option<&Chunk> {
        self.chunk.as_ref().filter(|chunk| chunk.blocks.contains(&block))
    }

    /// Reads from this block on, as many whole blocks as fit the read size.
    async fn read(&self, block: usize, handle: BlockHandle) -> Result<Chunk> {
        let index = self.table.index();
        let mut end = block + 1;
        let mut len = handle.len as usize;
        while end < self.blocks.end {
            let next = index.handle(end).len as usize;
            if len + next > self.read_size || next > SHORT_BLOCK_MAX as usize {
                break;
            }
            len += next;
            end += 1;
        }
        let table = &self.table;
        let (buf, at) = read_span(table.file(), table.identity(), handle.offset, len).await?;
        Ok(Chunk { buf: Rc::new(buf), at, offset: handle.offset, blocks: block..end })
    }
}
