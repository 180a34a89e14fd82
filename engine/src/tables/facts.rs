//! What the manifest says beside the live tables: how far the log was durable, what each partition
//! has seen, and which records were lost to damage.
//!
//! It stands in the same edits, because each of it must change in the same moment as the tables: a
//! flush lets the log forget its records and the marks they made.
//!
//! # Format, at the end of an edit of version 2 (numbers are varints, stamps and tokens 8 bytes)
//!
//! | size   | field    | meaning                                                             |
//! |--------|----------|---------------------------------------------------------------------|
//! | varint | logged   | records of the log up to here were durable when the edit was made   |
//! | 1      | lost     | 1: a count follows, and so many times table, first, last token, greatest stamp; 0: as before |
//! | 1      | voided   | 1: a count follows, and so many times table, offset of a block; 0: as before |
//! | varint | replicas | count                                                               |
//! | each   | replica  | partition, incarnation, length of the set, the set (`seen.rs`)      |

use std::rc::Rc;

use crate::log::Lsn;
use crate::model::seen::SeenSet;
use crate::model::varint::{self, Reader};
use crate::model::{PartitionId, Timestamp, Token, TokenRange};
use crate::sstable::TableId;

/// What a shard knows of its replica of a partition, beside the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Counts up when the partition is dropped; records of earlier ones are void.
    pub incarnation: u32,
    /// Which writes have been merged in.
    pub seen: Rc<SeenSet>,
}

impl Default for Replica {
    /// A partition that was never dropped and has seen nothing.
    fn default() -> Replica {
        Replica { incarnation: 1, seen: Rc::default() }
    }
}

/// In the place of a table's number: the commit log, a part of which was given up. No table has it.
pub const LOG: TableId = TableId(0);

/// Tokens whose records in one table are lost, because the table was put aside; or in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The table, or [`LOG`].
    pub table: TableId,
    /// Its tokens that were live, or a part of them.
    pub range: TokenRange,
    /// The greatest stamp in the table: a newer record of a key is not hidden by the loss.
    pub max_timestamp: Timestamp,
}

/// The part of an edit that is not about live tables.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Facts {
    /// Raises how far the log is known to have been durable.
    pub logged: Lsn,
    /// All that is lost, if that changes.
    pub lost: Option<Vec<Lost>>,
    /// All blocks (table, offset) that cannot be read and are missed no more, if that changes.
    pub voided: Option<Vec<(TableId, u64)>>,
    /// Partitions that changed.
    pub replicas: Vec<(PartitionId, Replica)>,
}

impl Facts {
    /// Appends the bytes.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        varint::put(out, self.logged.0);
        put_list(out, self.lost.as_deref(), |out, lost| {
            varint::put(out, lost.table.0);
            for fixed in [lost.range.first.0, lost.range.last.0, lost.max_timestamp.0] {
                out.extend_from_slice(&fixed.to_le_bytes());
            }
        });
        put_list(out, self.voided.as_deref(), |out, (table, offset)| {
            varint::put(out, table.0);
            varint::put(out, *offset);
        });
        varint::put(out, self.replicas.len() as u64);
        let mut set = Vec::new();
        for (partition, replica) in &self.replicas {
            varint::put(out, u64::from(partition.0));
            varint::put(out, u64::from(replica.incarnation));
            set.clear();
            replica.seen.encode(&mut set);
            varint::put(out, set.len() as u64);
            out.extend_from_slice(&set);
        }
    }

    /// The facts in these bytes.
    ///
    /// # Errors
    /// The first rule broken. Memory is bounded by the length of `bytes`.
    pub(super) fn decode(bytes: &[u8]) -> Result<Facts, String> {
        let mut reader = Reader::new(bytes);
        let facts = take(&mut reader).ok_or("facts cut short or out of range")?;
        if !reader.is_empty() {
            return Err("bytes follow the facts".to_owned());
        }
        let mut replicas = Vec::with_capacity(facts.1.len());
        for (partition, incarnation, set) in facts.1 {
            let seen = SeenSet::decode(set)
                .map_err(|error| format!("partition {}: {error}", partition.0))?;
            replicas.push((partition, Replica { incarnation, seen: Rc::new(seen) }));
        }
        Ok(Facts { replicas, ..facts.0 })
    }
}

fn put_list<T>(out: &mut Vec<u8>, list: Option<&[T]>, put: impl Fn(&mut Vec<u8>, &T)) {
    out.push(u8::from(list.is_some()));
    if let Some(list) = list {
        varint::put(out, list.len() as u64);
        list.iter().for_each(|item| put(out, item));
    }
}

fn take_list<'a, T>(
    reader: &mut Reader<'a>,
    take: impl Fn(&mut Reader<'a>) -> Option<T>,
) -> Option<Option<Vec<T>>> {
    match reader.byte()? {
        0 => Some(None),
        1 => {
            // Each item has bytes of its own, so the count is bounded by what is there.
            let count = reader.length()?;
            Some(Some((0..count).map(|_| take(reader)).collect::<Option<_>>()?))
        }
        _ => None,
    }
}

/// Partition, incarnation, and the bytes of a set.
type EncodedReplica<'a> = (PartitionId, u32, &'a [u8]);

fn take<'a>(reader: &mut Reader<'a>) -> Option<(Facts, Vec<EncodedReplica<'a>>)> {
    let logged = Lsn(reader.number()?);
    let lost = take_list(reader, |reader| {
        let table = TableId(reader.number()?);
        let range = TokenRange { first: Token(reader.fixed()?), last: Token(reader.fixed()?) };
        let max_timestamp = Timestamp(reader.fixed()?);
        (range.first <= range.last).then_some(Lost { table, range, max_timestamp })
    })?;
    let voided = take_list(reader, |reader| Some((TableId(reader.number()?), reader.number()?)))?;
    let count = reader.length()?;
    let replicas = (0..count).map(|_| {
        let (partition, incarnation) = (PartitionId(reader.small()?), reader.small()?);
        let size = reader.length()?;
        Some((partition, incarnation, reader.bytes(size)?))
    });
    let replicas = replicas.collect::<Option<_>>()?;
    Some((Facts { logged, lost, voided, replicas: Vec::new() }, replicas))
}
