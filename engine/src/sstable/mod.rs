//! Sorted tables: immutable files of records in `(token, namespace, key)` order.
//!
//! ```text
//! offset 0          data_len                                             len - 512   len
//! | block | block | ... | filter | index | partitions | zeros to alignment | footer  |
//!   each a whole number of 16 bytes, the sections of 512; each with a salted checksum
//! ```
//!
//! | section | in memory while open | file |
//! |---|---|---|
//! | blocks: token column, offsets, records; none, LZ4 or zstd | no, `cache.rs` holds some | `block.rs` |
//! | of them, those of a long value: in parts, each packed and checked alone | no | `long.rs` |
//! | filter: blocked bloom, one cache line a probe | yes | `filter.rs` |
//! | index: first token and place of each block | yes, with a radix directory | `index.rs` |
//! | partitions: which arcs and incarnations, how much of each | yes | `format.rs` |
//! | footer: where the sections are, counts, bounds | yes, as [`TableMeta`] | `format.rs` |
//!
//! Invariant: a lookup decides in memory which single block may hold a key (`Table::may_contain`,
//! `Table::locate`), so a hit costs exactly one device read. The read path's pure parts
//! (`filter`, `index`, `block`) never touch a file; `table`, `writer` and `scan` do.
//! The writer's side is used by flush and by compaction, both in the background class.

pub mod block;
mod codec;
pub mod filter;
pub mod format;
pub mod index;
mod long;
mod rebuild;
pub mod scan;
pub mod table;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod writer;

pub use block::Block;
pub use filter::BlockedBloom;
pub use format::{BlockHandle, Codec, PartitionRun, TableId, TableIdentity, TableMeta, file_salt};
pub use index::TokenIndex;
pub use scan::TableScan;
pub use table::Table;
pub use writer::{TableOptions, TableWriter};
