//! `TableSetEdit`: one atomic change of the set of live tables, and its encoding.
//!
//! Invariant: an edit names every file it makes live and every file or range it gives up, so that
//! replaying the edits of a manifest gives the same set, file for file. A flush is one edit (a
//! table in, the log released); so is a compaction step (tables in, tables and ranges out).
//!
//! # Format, version 2 (little-endian); version 1 ends before the facts
//!
//! | offset | size | field        | meaning                                                  |
//! |--------|------|--------------|----------------------------------------------------------|
//! | 0      | 4    | checksum     | CRC32C of all that follows                               |
//! | 4      | 2    | version      | 2                                                        |
//! | 6      | 2    | flags        | 1: `hand` counts; 2: `released` counts; 4: a whole state |
//! | 8      | 8    | released     | LSN up to which the log's records are in tables          |
//! | 16     | 8    | hand         | token where the next compaction step starts              |
//! | 24     | 8    | next table   | no table id at or above it has been used                 |
//! | 32     | 8    | next order   | no upper table has this order or a greater one           |
//! | 40     | 16   | counts       | added, removed, consumed, shared: u32 each               |
//! | 56     |      | added        | 88 bytes each, [`AddedTable`]                            |
//! |        |      | removed      | table id, 8 bytes each                                   |
//! |        |      | consumed     | table id, first, last token, bytes: 32 bytes each        |
//! |        |      | shared       | table id, 8 bytes each                                   |
//! |        |      | facts        | what is not about live tables, [`Facts`]                 |

use super::facts::Facts;
use crate::log::Lsn;
use crate::model::{Timestamp, Token, TokenRange};
use crate::sstable::TableId;

/// Version of the encoding.
const VERSION: u16 = 2;
const HEADER_SIZE: usize = 56;
const ADDED_SIZE: usize = 88;
const CONSUMED_SIZE: usize = 32;
const FLAG_HAND: u16 = 1;
const FLAG_RELEASED: u16 = 2;
const FLAG_WHOLE: u16 = 4;

/// Where a table stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Among the upper tables; a greater order means newer records.
    Upper {
        /// Number of the flush that wrote it; of the newest one when several were merged.
        order: u64,
    },
    /// In the last level: no older record of its keys exists anywhere.
    Last,
}

/// What planning and reading need to know of a table without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSummary {
    /// Its id, which is also its file name.
    pub id: TableId,
    /// Length of its file, in bytes.
    pub size: u64,
    /// Its first and last token.
    pub span: TokenRange,
    /// Records in it.
    pub record_count: u64,
    /// Tombstones among them.
    pub tombstone_count: u64,
    /// Records with an expiry among them.
    pub expiring_count: u64,
    /// The first expiry, ms since 2024-01-01; 0 when nothing expires.
    pub min_expiry_ms: u64,
    /// The last expiry, ms since 2024-01-01; 0 when nothing expires.
    pub max_expiry_ms: u64,
    /// The greatest stamp of its records.
    pub max_timestamp: Timestamp,
    /// When it was written, ms since 2024-01-01.
    pub written_ms: u64,
}

/// A table that an edit makes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedTable {
    /// Where it stands.
    pub level: Level,
    /// What it is.
    pub summary: TableSummary,
}

/// Tokens of an upper table whose records are elsewhere now. They are never read again, and
/// their bytes may be given back to the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consumed {
    /// The table.
    pub table: TableId,
    /// The tokens.
    pub range: TokenRange,
    /// Bytes of the file that held them, about.
    pub bytes: u64,
}

/// One atomic change of the live tables.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TableSetEdit {
    /// Whether the edit states everything from nothing (the first of a manifest file does).
    pub whole: bool,
    /// Tables that become live.
    pub added: Vec<AddedTable>,
    /// Tables that are live no more.
    pub removed: Vec<TableId>,
    /// Parts of upper tables that are live no more.
    pub consumed: Vec<Consumed>,
    /// Tables whose file a snapshot shares: no byte of it may change.
    pub shared: Vec<TableId>,
    /// Records up to here are in tables; the log may forget them.
    pub released: Option<Lsn>,
    /// Where the next compaction step starts.
    pub hand: Option<Token>,
    /// Raises the id of the next table.
    pub next_table: u64,
    /// Raises the order of the next flush.
    pub next_order: u64,
    /// What it says beside that.
    pub facts: Facts,
}

impl TableSetEdit {
    /// The edit's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 4];
        out.extend_from_slice(&VERSION.to_le_bytes());
        let flags = if self.hand.is_some() { FLAG_HAND } else { 0 }
            | if self.released.is_some() { FLAG_RELEASED } else { 0 }
            | if self.whole { FLAG_WHOLE } else { 0 };
        out.extend_from_slice(&flags.to_le_bytes());
        put(&mut out, self.released.map_or(0, |lsn| lsn.0));
        put(&mut out, self.hand.map_or(0, |token| token.0));
        put(&mut out, self.next_table);
        put(&mut out, self.next_order);
        for count in [self.added.len(), self.removed.len(), self.consumed.len(), self.shared.len()]
        {
            let count = u32::try_from(count).expect("fewer tables than 2^32");
            out.extend_from_slice(&count.to_le_bytes());
        }
        for table in &self.added {
            encode_added(&mut out, table);
        }
        self.removed.iter().for_each(|id| put(&mut out, id.0));
        for part in &self.consumed {
            put(&mut out, part.table.0);
            put(&mut out, part.range.first.0);
            put(&mut out, part.range.last.0);
            put(&mut out, part.bytes);
        }
        self.shared.iter().for_each(|id| put(&mut out, id.0));
        self.facts.encode(&mut out);
        let checksum = crc32c::crc32c(&out[4..]);
        out[..4].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// The edit with these bytes.
    ///
    /// # Errors
    /// The first rule broken. Memory is bounded by the length of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<TableSetEdit, String> {
        let mut reader = Reader { bytes };
        if bytes.len() < HEADER_SIZE {
            return Err(format!(
                "an edit of {} bytes, the shortest has {HEADER_SIZE}",
                bytes.len()
            ));
        }
        let stored = reader.u32();
        let computed = crc32c::crc32c(&bytes[4..]);
        if stored != computed {
            return Err(format!("edit checksum {stored:08x}, computed {computed:08x}"));
        }
        let version = reader.u16();
        if version == 0 || version > VERSION {
            return Err(format!("edit version {version}, this program reads 1 to {VERSION}"));
        }
        let flags = reader.u16();
        if flags & !(FLAG_HAND | FLAG_RELEASED | FLAG_WHOLE) != 0 {
            return Err(format!("unknown edit flags {flags:#x}"));
        }
        let (released, hand) = (reader.u64(), reader.u64());
        let (next_table, next_order) = (reader.u64(), reader.u64());
        let counts: [usize; 4] =
            std::array::from_fn(|_| usize::try_from(reader.u32()).expect("64-bit host"));
        let sizes = [ADDED_SIZE, 8, CONSUMED_SIZE, 8];
        let expected: usize = counts.iter().zip(sizes).map(|(count, size)| count * size).sum();
        let Some((tables, facts)) = reader.bytes.split_at_checked(expected) else {
            return Err(format!(
                "edit counts {counts:?} need {expected} bytes, {} follow",
                reader.bytes.len()
            ));
        };
        let facts = match version {
            1 if facts.is_empty() => Facts::default(),
            1 => return Err(format!("{} bytes follow the edit", facts.len())),
            _ => Facts::decode(facts)?,
        };
        reader.bytes = tables;
        Ok(TableSetEdit {
            whole: flags & FLAG_WHOLE != 0,
            added: (0..counts[0]).map(|_| decode_added(&mut reader)).collect::<Result<_, _>>()?,
            removed: (0..counts[1]).map(|_| TableId(reader.u64())).collect(),
            consumed: (0..counts[2])
                .map(|_| {
                    let table = TableId(reader.u64());
                    Ok(Consumed { table, range: reader.range()?, bytes: reader.u64() })
                })
                .collect::<Result<_, String>>()?,
            shared: (0..counts[3]).map(|_| TableId(reader.u64())).collect(),
            released: (flags & FLAG_RELEASED != 0).then_some(Lsn(released)),
            hand: (flags & FLAG_HAND != 0).then_some(Token(hand)),
            next_table,
            next_order,
            facts,
        })
    }
}

/// | offset | size | field | meaning |
/// |---|---|---|---|
/// | 0 | 8 | level | 0 last level, else 1 + order |
/// | 8 | 8 | id | |
/// | 16 | 8 | size | of the file |
/// | 24 | 16 | span | first and last token |
/// | 40 | 8 | records | |
/// | 48 | 4 + 4 | tombstones, expiring | u32 each, saturating |
/// | 56 | 16 | expiry | least and greatest |
/// | 72 | 8 | timestamp | the greatest |
/// | 80 | 8 | written | ms |
fn encode_added(out: &mut Vec<u8>, table: &AddedTable) {
    let summary = &table.summary;
    put(
        out,
        match table.level {
            Level::Last => 0,
            Level::Upper { order } => order + 1,
        },
    );
    put(out, summary.id.0);
    put(out, summary.size);
    put(out, summary.span.first.0);
    put(out, summary.span.last.0);
    put(out, summary.record_count);
    for count in [summary.tombstone_count, summary.expiring_count] {
        out.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
    }
    put(out, summary.min_expiry_ms);
    put(out, summary.max_expiry_ms);
    put(out, summary.max_timestamp.0);
    put(out, summary.written_ms);
}

fn decode_added(reader: &mut Reader<'_>) -> Result<AddedTable, String> {
    let level = match reader.u64() {
        0 => Level::Last,
        order => Level::Upper { order: order - 1 },
    };
    let (id, size) = (TableId(reader.u64()), reader.u64());
    let span = reader.range()?;
    Ok(AddedTable {
        level,
        summary: TableSummary {
            id,
            size,
            span,
            record_count: reader.u64(),
            tombstone_count: u64::from(reader.u32()),
            expiring_count: u64::from(reader.u32()),
            min_expiry_ms: reader.u64(),
            max_expiry_ms: reader.u64(),
            max_timestamp: Timestamp(reader.u64()),
            written_ms: reader.u64(),
        },
    })
}

fn put(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Reads fields off bytes whose total length was checked before.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.bytes.split_first_chunk().expect("the length was checked");
        self.bytes = rest;
        *field
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn range(&mut self) -> Result<TokenRange, String> {
        let (first, last) = (Token(self.u64()), Token(self.u64()));
        if first > last {
            return Err(format!("token range from {first} to {last}"));
        }
        Ok(TokenRange { first, last })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::facts::{Lost, Replica};
    use super::*;
    use crate::model::{Dot, OriginId, PartitionId, SeenSet};
    use proptest::prelude::*;
    use std::rc::Rc;

    fn range() -> impl Strategy<Value = TokenRange> {
        (any::<u64>(), any::<u64>())
            .prop_map(|(a, b)| TokenRange { first: Token(a.min(b)), last: Token(a.max(b)) })
    }

    fn added() -> impl Strategy<Value = AddedTable> {
        let level = prop::option::of(0u64..1 << 60)
            .prop_map(|order| order.map_or(Level::Last, |order| Level::Upper { order }));
        (level, range(), any::<[u64; 6]>(), any::<[u32; 2]>()).prop_map(
            |(level, span, n, counts)| AddedTable {
                level,
                summary: TableSummary {
                    id: TableId(n[0]),
                    size: n[1],
                    span,
                    record_count: n[2],
                    tombstone_count: counts[0].into(),
                    expiring_count: counts[1].into(),
                    min_expiry_ms: n[3],
                    max_expiry_ms: n[4],
                    max_timestamp: Timestamp(n[5]),
                    written_ms: n[2] ^ n[3],
                },
            },
        )
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let lost = (any::<u64>(), range(), any::<u64>()).prop_map(|(id, range, stamp)| Lost {
            table: TableId(id),
            range,
            max_timestamp: Timestamp(stamp),
        });
        let voided = (any::<u64>().prop_map(TableId), any::<u64>());
        let seen = prop::collection::vec((0u32..4, 1u64..30), 0..10).prop_map(|dots| {
            let mut seen = SeenSet::new();
            for (origin, sequence) in dots {
                let dot = Dot { origin: OriginId(origin), sequence };
                seen.see(dot, Timestamp(sequence));
            }
            Rc::new(seen)
        });
        let replica = (any::<u32>().prop_map(PartitionId), any::<u32>(), seen)
            .prop_map(|(id, incarnation, seen)| (id, Replica { incarnation, seen }));
        (
            any::<u64>().prop_map(Lsn),
            prop::option::of(prop::collection::vec(lost, 0..4)),
            prop::option::of(prop::collection::vec(voided, 0..4)),
            prop::collection::vec(replica, 0..4),
        )
            .prop_map(|(logged, lost, voided, replicas)| Facts {
                logged,
                lost,
                voided,
                replicas,
            })
    }

    pub(crate) fn edit() -> impl Strategy<Value = TableSetEdit> {
        let ids = || prop::collection::vec(any::<u64>().prop_map(TableId), 0..5);
        let consumed = (any::<u64>(), range(), any::<u64>())
            .prop_map(|(id, range, bytes)| Consumed { table: TableId(id), range, bytes });
        (
            (any::<bool>(), any::<u64>(), any::<u64>()),
            prop::collection::vec(added(), 0..5),
            (ids(), ids()),
            prop::collection::vec(consumed, 0..5),
            prop::option::of(any::<u64>().prop_map(Lsn)),
            prop::option::of(any::<u64>().prop_map(Token)),
            facts(),
        )
            .prop_map(|(scalars, added, ids, consumed, released, hand, facts)| {
                TableSetEdit {
                    whole: scalars.0,
                    added,
                    removed: ids.0,
                    consumed,
                    shared: ids.1,
                    released,
                    hand,
                    next_table: scalars.1,
                    next_order: scalars.2,
                    facts,
                }
            })
    }

    proptest! {
        #[test]
        fn an_edit_reads_back_as_written(edit in edit()) {
            prop_assert_eq!(TableSetEdit::decode(&edit.encode()), Ok(edit));
        }

        #[test]
        fn an_edit_of_version_1_is_read(edit in edit()) {
            let edit = TableSetEdit { facts: Facts::default(), ..edit };
            let mut bytes = edit.encode();
            let mut facts = Vec::new();
            edit.facts.encode(&mut facts);
            bytes.truncate(bytes.len() - facts.len());
            bytes[4..6].copy_from_slice(&1u16.to_le_bytes());
            let checksum = crc32c::crc32c(&bytes[4..]);
            bytes[..4].copy_from_slice(&checksum.to_le_bytes());
            prop_assert_eq!(TableSetEdit::decode(&bytes), Ok(edit));
        }

        #[test]
        fn a_flipped_bit_or_a_cut_is_an_error(edit in edit(), at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = edit.encode();
            prop_assert!(TableSetEdit::decode(&bytes[..at.index(bytes.len())]).is_err());
            let place = at.index(bytes.len());
            bytes[place] ^= 1 << bit;
            prop_assert!(TableSetEdit::decode(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_an_error_at_worst(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = TableSetEdit::decode(&bytes);
            // With a right checksum too, so that what follows it is reached.
            if bytes.len() >= 6 {
                bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
                let checksum = crc32c::crc32c(&bytes[4..]);
                bytes[..4].copy_from_slice(&checksum.to_le_bytes());
                let _ = TableSetEdit::decode(&bytes);
            }
        }
    }
}
