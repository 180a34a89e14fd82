//! A record inside a message, and lists of them.
//!
//! Invariant: a [`RecordList`] was checked from end to end when it was made, so reading it again
//! cannot fail; its records borrow from the message, so a page of a million costs no allocation.

use annulus_engine::model::limits::{KEY_SIZE_MAX, VALUE_SIZE_CEILING};
use annulus_engine::model::{Dot, Kind, NamespaceId, OriginId, RecordRef, Timestamp, Token, Value};
use annulus_net::wire::codec::{Malformed, Reader, Write, size_u16, size_u32};

/// Bytes of a record before its key.
///
/// | offset | size | field       | meaning                                                     |
/// |--------|------|-------------|-------------------------------------------------------------|
/// | 0      | 8    | token       | hash of the key                                             |
/// | 8      | 8    | timestamp   | hybrid logical clock                                        |
/// | 16     | 8    | sequence    | with `origin` the record's dot; not 0 in a put or delete    |
/// | 24     | 8    | expiry_ms   | milliseconds since 2024-01-01, 0 is never                   |
/// | 32     | 4    | origin      | who coordinated the write                                   |
/// | 36     | 4    | namespace   | of the key                                                  |
/// | 40     | 4    | incarnation | of the partition at the sender                              |
/// | 44     | 4    | value_size  | bytes; 0 in a delete                                        |
/// | 48     | 2    | key_size    | bytes, 1 to `KEY_SIZE_MAX`                                  |
/// | 50     | 1    | kind        | 1 put, 2 delete, 3 siblings                                 |
/// | 51     | 1    | reserved    | 0                                                           |
pub const RECORD_HEADER_SIZE: usize = 52;

/// Largest value of a record on the wire: a put's own limit, and twice it for siblings.
const fn value_size_max(kind: Kind) -> usize {
    match kind {
        Kind::Put => VALUE_SIZE_CEILING,
        Kind::Delete => 0,
        Kind::Siblings => 2 * VALUE_SIZE_CEILING,
    }
}

/// Appends a record.
pub(super) fn encode(record: &RecordRef<'_>, out: &mut Vec<u8>) {
    out.put_u64(record.token.0);
    out.put_u64(record.timestamp.0);
    out.put_u64(record.dot.sequence);
    out.put_u64(record.expiry_ms);
    out.put_u32(record.dot.origin.0);
    out.put_u32(record.namespace.0);
    out.put_u32(record.incarnation);
    out.put_u32(size_u32(record.value.len()));
    out.put_u16(size_u16(record.key.len()));
    out.put_u8(record.kind as u8);
    out.put_u8(0);
    out.put(record.key);
    record.value.copy_to(out);
}

/// Reads a record and checks what can be checked without knowing the cluster.
pub(super) fn decode<'a>(reader: &mut Reader<'a>) -> Result<RecordRef<'a>, Malformed> {
    let token = Token(reader.u64()?);
    let timestamp = Timestamp(reader.u64()?);
    let sequence = reader.u64()?;
    let expiry_ms = reader.u64()?;
    let origin = OriginId(reader.u32()?);
    let namespace = NamespaceId(reader.u32()?);
    let incarnation = reader.u32()?;
    let value_size = reader.u32()? as usize;
    let key_size = usize::from(reader.u16()?);
    let kind = Kind::from_u8(reader.u8()?).ok_or(Malformed("unknown kind of record"))?;
    reader.reserved(1)?;
    if key_size == 0 || key_size > KEY_SIZE_MAX {
        return Err(Malformed("key of a record is empty or too long"));
    }
    if value_size > value_size_max(kind) {
        return Err(Malformed("value of a record is too long"));
    }
    // A state without siblings has no newest one, hence no dot.
    if sequence == 0 && kind != Kind::Siblings {
        return Err(Malformed("record without a dot"));
    }
    Ok(RecordRef {
        token,
        namespace,
        incarnation,
        kind,
        dot: Dot { origin, sequence },
        timestamp,
        expiry_ms,
        key: reader.bytes(key_size)?,
        value: Value::Whole(reader.bytes(value_size)?),
    })
}

/// Records of a message, read one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RecordList<'a> {
    count: u32,
    bytes: &'a [u8],
}

impl<'a> RecordList<'a> {
    /// Checks a list of `count` records.
    pub(super) fn decode(count: u32, bytes: &'a [u8]) -> Result<RecordList<'a>, Malformed> {
        if count as usize > bytes.len() / RECORD_HEADER_SIZE {
            return Err(Malformed("list is longer than the message"));
        }
        let mut reader = Reader::new(bytes);
        for _ in 0..count {
            decode(&mut reader)?;
        }
        reader.finish()?;
        Ok(RecordList { count, bytes })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Their bytes, one after the other.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The records, in their order.
    pub fn iter(&self) -> impl Iterator<Item = RecordRef<'a>> + use<'a> {
        let mut reader = Reader::new(self.bytes);
        (0..self.count).map(move |_| decode(&mut reader).expect("checked when the list was made"))
    }
}

/// Collects the records of a [`RecordList`], so that nobody has to hold what they borrow from.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RecordPage {
    count: u32,
    bytes: Vec<u8>,
}

impl RecordPage {
    /// A page without records.
    #[must_use]
    pub fn new() -> RecordPage {
        RecordPage::default()
    }

    /// Adds a record behind the others.
    pub fn push(&mut self, record: &RecordRef<'_>) {
        encode(record, &mut self.bytes);
        self.count += 1;
    }

    /// Bytes of the records so far.
    #[must_use]
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets the records, keeps the memory.
    pub fn clear(&mut self) {
        self.count = 0;
        self.bytes.clear();
    }

    /// The records, for a message.
    #[must_use]
    pub fn list(&self) -> RecordList<'_> {
        RecordList { count: self.count, bytes: &self.bytes }
    }
}

impl<'r> FromIterator<RecordRef<'r>> for RecordPage {
    fn from_iter<I: IntoIterator<Item = RecordRef<'r>>>(records: I) -> RecordPage {
        let mut page = RecordPage::new();
        records.into_iter().for_each(|record| page.push(&record));
        page
    }
}
