//! Makes a table's filter and index again from its blocks, when their sections are damaged.
//!
//! Invariant: a rebuilt index or filter is the one that the writer wrote, so no key that the table
//! holds is missed. A damaged block under a damaged filter leaves a filter that answers "maybe" to
//! everything; under a damaged index the table cannot be opened. Only `table.rs` calls this.

use super::block::{Block, HEADER};
use super::filter::BlockedBloom;
use super::format::{BlockHandle, BlockHeader, Footer, SECTOR, TableIdentity, corrupt};
use super::index::{IndexBuilder, TokenIndex};
use super::table::read_span;
use crate::disk::File;
use crate::error::Result;
use crate::model::{NamespaceId, RecordRef, Token};

/// Where a walk over the blocks stands.
struct Walk<'a, F> {
    file: &'a F,
    identity: &'a TableIdentity,
    offset: u64,
    data_len: u64,
}

impl<F: File> Walk<'_, F> {
    /// The next block; its header says how long it is.
    async fn next(&mut self) -> Result<Option<Block>> {
        if self.offset >= self.data_len {
            return Ok(None);
        }
        let invalid = |what: &str| corrupt(&self.identity.path, self.offset, what);
        let (buf, at) = read_span(self.file, self.identity, self.offset, SECTOR).await?;
        let header = BlockHeader::parse(&buf[at..at + HEADER]).map_err(invalid)?;
        let len = header.block_len();
        if len as u64 > self.data_len - self.offset {
            return Err(invalid("a block reaches past the blocks' end"));
        }
        let (buf, at) = read_span(self.file, self.identity, self.offset, len).await?;
        let len = u32::try_from(len).expect("checked by the header");
        let handle = BlockHandle { offset: self.offset, len };
        let block = Block::parse(buf, at, handle, self.identity.salt).map_err(invalid)?;
        self.offset += u64::from(len);
        Ok(Some(block))
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
    let mut walk = Walk { file, identity, offset: 0, data_len: footer.data_len };
    let mut builder = IndexBuilder::default();
    let mut before: Before = None;
    loop {
        let start = walk.offset;
        let Some(block) = walk.next().await? else { break };
        let first = block.record(0);
        separate(&mut builder, &before, &first);
        let sector = u32::try_from(start / SECTOR as u64).expect("bounded by the footer's check");
        builder.push(first.token, sector);
        let last = block.record(block.len() - 1);
        before = Some((last.token, last.namespace, last.key.to_vec()));
    }
    let offset = footer.index_offset();
    let end = u32::try_from(footer.data_len / SECTOR as u64).unwrap_or(u32::MAX);
    let section = builder.encode(end, Token(footer.last_token), identity.salt, offset);
    TokenIndex::decode(&section, identity.salt, offset, footer.data_len)
        .map_err(|what| corrupt(&identity.path, offset, what))
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
    let mut walk = Walk { file, identity, offset: 0, data_len: footer.data_len };
    loop {
        match walk.next().await {
            Ok(Some(block)) => {
                (0..block.len()).for_each(|index| filter.insert(block.token(index)));
            }
            Ok(None) => return Ok(filter),
            Err(crate::Error::Corrupt { .. }) => return Ok(BlockedBloom::full()),
            Err(error) => return Err(error),
        }
    }
}
