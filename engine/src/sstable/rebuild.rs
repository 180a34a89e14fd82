//! Makes a table's filter and index again from its blocks, when their sections are damaged.
//!
//! Invariant: a rebuilt index or filter is the one that the writer wrote, so no key that the table
//! holds is missed. A damaged block under a damaged filter leaves a filter that answers "maybe" to
//! everything; under a damaged index the table cannot be opened. Only `table.rs` calls this.

use std::rc::Rc;

use super::block::{Block, HEADER};
use super::filter::BlockedBloom;
use super::format::{BLOCK_UNIT, BlockHandle, BlockHeader, Footer, TableIdentity, corrupt};
use super::index::{IndexBuilder, TokenIndex};
use super::table::read_span;
use crate::buffer::AlignedBuf;
use crate::disk::File;
use crate::error::{Error, Result};
use crate::model::{NamespaceId, RecordRef, Token};

/// Bytes that one read of a walk takes.
const WALK_READ: usize = 1 << 20;

/// Where a walk over the blocks stands.
struct Walk<'a, F> {
    file: &'a F,
    identity: &'a TableIdentity,
    offset: u64,
    data_len: u64,
    blocks_left: u32,
    /// What was read last, and where in the file it begins.
    chunk: Rc<AlignedBuf>,
    chunk_offset: u64,
}

impl<'a, F: File> Walk<'a, F> {
    fn new(file: &'a F, identity: &'a TableIdentity, footer: &Footer) -> Walk<'a, F> {
        let chunk = Rc::new(AlignedBuf::with_capacity(0));
        Walk {
            file,
            identity,
            offset: 0,
            data_len: footer.data_len,
            blocks_left: footer.block_count,
            chunk,
            chunk_offset: 0,
        }
    }

    /// The next block; its header says how long it is.
    async fn next(&mut self) -> Result<Option<Block>> {
        if self.blocks_left == 0 {
            return Ok(None);
        }
        let at = self.fill(HEADER).await?;
        let header = BlockHeader::parse(&self.chunk[at..]).map_err(|what| self.invalid(what))?;
        let len = header.block_len();
        let at = self.fill(len).await?;
        let len = u32::try_from(len).expect("checked by the header");
        let handle = BlockHandle { offset: self.offset, len };
        let block = Block::parse_shared(&self.chunk, at, handle, self.identity.salt)
            .map_err(|what| self.invalid(what))?;
        self.offset += u64::from(len);
        self.blocks_left -= 1;
        Ok(Some(block))
    }

    /// Makes the chunk hold `len` bytes from where the walk stands, and says where in it.
    async fn fill(&mut self, len: usize) -> Result<usize> {
        if len as u64 > self.data_len - self.offset {
            return Err(self.invalid("a block reaches past the blocks' end"));
        }
        let end = self.chunk_offset + self.chunk.len() as u64;
        if self.offset < self.chunk_offset || self.offset + len as u64 > end {
            let left = usize::try_from(self.data_len - self.offset).unwrap_or(usize::MAX);
            let want = len.max(WALK_READ.min(left));
            let (buf, at) = read_span(self.file, self.identity, self.offset, want).await?;
            self.chunk = Rc::new(buf);
            self.chunk_offset = self.offset - at as u64;
        }
        Ok(usize::try_from(self.offset - self.chunk_offset).expect("inside the chunk"))
    }

    fn invalid(&self, what: &str) -> Error {
        corrupt(&self.identity.path, self.offset, what)
    }
}

/// Last key of the block before.
type Before = Option<(Token, NamespaceId, Vec<u8>)>;

/// Rebuilds the index.
///
/// # Errors
/// `Corrupt` when a block is damaged too.
pub(super) async fn index<F: File>(
    file: &F,
    identity: &TableIdentity,
    footer: &Footer,
) -> Result<TokenIndex> {
    let mut walk = Walk::new(file, identity, footer);
    let mut builder = IndexBuilder::default();
    let mut before: Before = None;
    loop {
        let start = walk.offset;
        let Some(block) = walk.next().await? else { break };
        let first = block.record(0);
        separate(&mut builder, &before, &first);
        builder.push(first.token, unit(start));
        let last = block.record(block.len() - 1);
        before = Some((last.token, last.namespace, last.key.to_vec()));
    }
    let offset = footer.index_offset();
    let section =
        builder.encode(unit(walk.offset), Token(footer.last_token), identity.salt, offset);
    TokenIndex::decode(&section, identity.salt, offset, footer.data_len)
        .map_err(|what| corrupt(&identity.path, offset, what))
}

fn unit(offset: u64) -> u32 {
    u32::try_from(offset / BLOCK_UNIT as u64).expect("bounded by the footer's check")
}

fn separate(builder: &mut IndexBuilder, before: &Before, first: &RecordRef<'_>) {
    if let Some((token, namespace, key)) = before
        && *token == first.token
    {
        builder.separate((*namespace, key), (first.namespace, first.key));
    }
}

/// Rebuilds the filter, with as many blocks as the damaged one had room for.
///
/// # Errors
/// Of the file; never `Corrupt`.
pub(super) async fn filter<F: File>(
    file: &F,
    identity: &TableIdentity,
    footer: &Footer,
) -> Result<BlockedBloom> {
    let key_count = usize::try_from(footer.record_count).expect("64-bit host");
    let bits = footer.filter_len.saturating_mul(8) / footer.record_count;
    let bits = u32::try_from(bits.clamp(4, 32)).expect("clamped");
    let mut filter = BlockedBloom::with_capacity(key_count, bits);
    let mut walk = Walk::new(file, identity, footer);
    loop {
        match walk.next().await {
            Ok(Some(block)) => {
                (0..block.len()).for_each(|index| filter.insert(block.token(index)));
            }
            Ok(None) => return Ok(filter),
            Err(Error::Corrupt { .. }) => return Ok(BlockedBloom::full()),
            Err(error) => return Err(error),
        }
    }
}
