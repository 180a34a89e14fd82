//! SCAN: the records of a namespace in a token range, page by page, in `(token, key)` order.
//!
//! Invariant: a page says where the next one begins; a scan holds nothing at the server between
//! pages. Records written meanwhile may or may not be seen; others are seen exactly once.
//!
//! | offset | size | field       | meaning                                                 |
//! |--------|------|-------------|---------------------------------------------------------|
//! | 0      | 4    | namespace   | id of the namespace                                     |
//! | 4      | 4    | count_max   | most records of the page; 0: the server's limit          |
//! | 8      | 4    | bytes_max   | target size of the page; 0: the server's limit           |
//! | 12     | 2    | flags       | 1 keys only, 2 tombstones and expired records as well    |
//! | 14     | 2    | after_size  | bytes of `after`                                        |
//! | 16     | 8    | first       | first token of the range                                |
//! | 24     | 8    | last        | last token of the range, included                       |
//! | 32     |      | after       | if not empty: go on behind this key of token `first`     |

use annulus_engine::model::{NamespaceId, Token, TokenRange, limits};

use super::codec::{Malformed, Reader, Write, size_u16};
use super::request::Refusal;
use super::status::Status;

/// Flag: keys and versions without values.
pub const KEYS_ONLY: u16 = 1 << 0;
/// Flag: tombstones and expired records as well, for copies and comparison.
pub const TOMBSTONES: u16 = 1 << 1;

/// A request for one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan<'a> {
    /// The namespace.
    pub namespace: NamespaceId,
    /// Most records of the page; 0 for the server's limit.
    pub count_max: u32,
    /// Target size of the page in bytes; 0 for the server's limit. At least one record comes.
    pub bytes_max: u32,
    /// [`KEYS_ONLY`], [`TOMBSTONES`].
    pub flags: u16,
    /// The tokens wanted.
    pub range: TokenRange,
    /// If not empty: begin behind this key, whose token is `range.first`.
    pub after: &'a [u8],
}

impl<'a> Scan<'a> {
    /// Reads the body.
    ///
    /// # Errors
    /// [`Refusal`] with the status to answer.
    pub fn decode(body: &'a [u8]) -> Result<Scan<'a>, Refusal> {
        let mut reader = Reader::new(body);
        let namespace = NamespaceId(reader.u32()?);
        let count_max = reader.u32()?;
        let bytes_max = reader.u32()?;
        let flags = reader.u16()?;
        let after_size = usize::from(reader.u16()?);
        let range = TokenRange { first: Token(reader.u64()?), last: Token(reader.u64()?) };
        let after = reader.bytes(after_size)?;
        reader.finish()?;
        if flags & !(KEYS_ONLY | TOMBSTONES) != 0 {
            return Err(Refusal::new(Status::UNSUPPORTED, "unknown flag of a scan"));
        }
        if range.first > range.last {
            return Err(Malformed("scan ends before it begins").into());
        }
        if after.len() > limits::KEY_SIZE_MAX {
            return Err(Refusal::too_big("key", limits::KEY_SIZE_MAX as u64));
        }
        Ok(Scan { namespace, count_max, bytes_max, flags, range, after })
    }

    /// Bytes that [`Scan::encode`] appends.
    #[must_use]
    pub fn size(&self) -> usize {
        32 + self.after.len()
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.namespace.0);
        out.put_u32(self.count_max);
        out.put_u32(self.bytes_max);
        out.put_u16(self.flags);
        out.put_u16(size_u16(self.after.len()));
        out.put_u64(self.range.first.0);
        out.put_u64(self.range.last.0);
        out.put(self.after);
    }
}
