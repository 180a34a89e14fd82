//! BATCH: several keyed operations in one message, each with its own result.
//!
//! Invariant: a [`Batch`] was checked from end to end when it was decoded, so iterating cannot
//! fail; keys are hashed while iterating, once. Nothing is promised across keys.
//!
//! | offset | size | field    | meaning                                  |
//! |--------|------|----------|------------------------------------------|
//! | 0      | 4    | count    | operations, 1 to the server's limit      |
//! | 4      | 4    | reserved | 0                                        |
//! | 8      |      | entries  | each as in `operation.rs`, one after another |

use super::codec::{Reader, Write, size_u32};
use super::operation::Operation;
use super::request::{DecodeContext, Refusal};

/// Size of the fixed part, in bytes.
pub const BATCH_HEADER_SIZE: usize = 8;

/// A checked batch, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    count: u32,
    entries: &'a [u8],
    context: DecodeContext,
}

impl<'a> Batch<'a> {
    /// Reads and checks a batch.
    ///
    /// # Errors
    /// [`Refusal`]: the first rule that one of the operations breaks; none of them is done.
    pub fn decode(body: &'a [u8], context: &DecodeContext) -> Result<Batch<'a>, Refusal> {
        let mut reader = Reader::new(body);
        let count = reader.u32()?;
        reader.reserved(4)?;
        if count == 0 {
            return Err(Refusal::bad("batch is empty"));
        }
        if count > context.batch_count_max {
            return Err(Refusal::too_big("batch", u64::from(context.batch_count_max)));
        }
        let mut entries = reader;
        for _ in 0..count {
            Operation::check(&mut entries, context)?;
        }
        entries.finish()?;
        Ok(Batch { count, entries: reader.rest(), context: *context })
    }

    /// Number of operations.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The operations in order. Hashes each key: iterate once.
    pub fn iter(&self) -> impl Iterator<Item = Operation<'a>> + use<'a> {
        let mut reader = Reader::new(self.entries);
        let context = self.context;
        (0..self.count).map_while(move |_| Operation::decode(&mut reader, &context).ok())
    }
}

/// Bytes that [`encode`] appends.
#[must_use]
pub fn size(operations: &[Operation<'_>]) -> usize {
    BATCH_HEADER_SIZE + operations.iter().map(Operation::size).sum::<usize>()
}

/// Appends a batch of these operations.
pub fn encode(operations: &[Operation<'_>], out: &mut Vec<u8>) {
    out.put_u32(size_u32(operations.len()));
    out.put_u32(0);
    for operation in operations {
        operation.encode(out);
    }
}
