//! Long records: a batch of its own each, copied and checked in steps while it is written.
//!
//! Invariant: on the disk such a batch is like any other, and it is acknowledged in its turn. What
//! differs is how it gets there: in chunks of a pooled buffer, several in flight, each filled by
//! steps of [`STEP`] with a yield between; the first chunk, which holds the checksums, comes last.
//! What a crash leaves of them is what it leaves of one write that was torn.
//!
//! So a value of any size takes no buffer of its size, and holds nobody up for longer than a step;
//! the memtable then shares the value's pieces (`task.rs` hands them to the sink).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::Lsn;
use super::format::{BATCH_HEADER_SIZE, BatchHeader, RECORD_ALIGNMENT, RecordHeader, record_size};
use super::state::Shared;
use crate::buffer::AlignedBuf;
use crate::checksum::{proceed, salted};
use crate::disk::{Disk, File, WriteMode};
use crate::error::Result;
use crate::model::{Pieces, RecordRef};
use crate::runtime::Runtime;

/// Bytes that are copied and checked between two yields: some 15 us, and the executor may take a
/// few steps in one turn.
const STEP: usize = 64 << 10;
/// Chunks in flight at once: what a long record takes of memory beside its value.
const CHUNKS_IN_FLIGHT: usize = 8;

/// A record that waits to be encoded.
pub(super) struct Large {
    /// Its checksum is not known yet.
    pub(super) header: RecordHeader,
    pub(super) key: Box<[u8]>,
    pub(super) value: Pieces,
}

impl Large {
    pub(super) fn new(record: &RecordRef<'_>) -> Large {
        let value = Pieces::of(record.value);
        Large { header: RecordHeader::of(record), key: record.key.into(), value }
    }

    /// Bytes that it takes in a batch.
    pub(super) fn size(&self) -> usize {
        record_size(self.key.len(), self.value.len())
    }
}

/// Where the batch lies, and how its chunks are written.
pub(super) struct Place<F> {
    pub(super) file: F,
    pub(super) offset: u64,
    pub(super) mode: WriteMode,
}

/// Writes the batch that has this header and this one record.
pub(super) async fn write<D: Disk, R: Runtime>(
    shared: &Shared<D, R>,
    place: Place<D::File>,
    header: &BatchHeader,
    large: &Large,
) -> Result<()> {
    let mut chunks = Chunks {
        shared,
        writes: FuturesUnordered::new(),
        next: place.offset,
        place,
        open: shared.buffer(),
        first: None,
        result: Ok(()),
        stepped: 0,
    };
    let mut record = large.header;
    let head = bytemuck::bytes_of(&record);
    chunks.append(bytemuck::bytes_of(header)).await;
    chunks.append(head).await;
    chunks.append(&large.key).await;
    let mut sum = salted(shared.record_salt, Lsn(header.first).0, &head[4..]);
    sum = proceed(sum, &large.key);
    for part in large.value.value().parts() {
        for step in part.chunks(STEP) {
            sum = proceed(sum, step);
            chunks.append(step).await;
        }
    }
    record.checksum = sum;
    let written = large.key.len() + large.value.len() + size_of::<RecordHeader>();
    debug_assert_eq!(written.next_multiple_of(RECORD_ALIGNMENT), header.records_size());
    chunks.finish(header.size() - BATCH_HEADER_SIZE - written, &record).await
}

type Write = Pin<Box<dyn Future<Output = (AlignedBuf, Result<()>)>>>;

/// The chunks of a batch on their way to the disk.
struct Chunks<'a, D: Disk, R: Runtime> {
    shared: &'a Shared<D, R>,
    place: Place<D::File>,
    /// Where the open chunk goes.
    next: u64,
    open: AlignedBuf,
    /// Held back until the checksum is known.
    first: Option<AlignedBuf>,
    writes: FuturesUnordered<Write>,
    /// The first failure; nothing is written after it.
    result: Result<()>,
    /// Bytes since the last yield.
    stepped: usize,
}

impl<D: Disk, R: Runtime> Chunks<'_, D, R> {
    /// Appends at most a [`STEP`] of bytes, or a key.
    async fn append(&mut self, mut bytes: &[u8]) {
        self.stepped += bytes.len();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at(bytes.len().min(self.room()));
            self.open.extend_from_slice(head);
            bytes = rest;
            if self.room() == 0 {
                let full = std::mem::replace(&mut self.open, self.shared.buffer());
                self.close(full).await;
            }
        }
        if self.stepped >= STEP {
            self.stepped = 0;
            self.shared.runtime.yield_now().await;
        }
    }

    fn room(&self) -> usize {
        self.shared.chunk_size() - self.open.len()
    }

    /// Holds the first chunk back, and begins to write any other.
    async fn close(&mut self, chunk: AlignedBuf) {
        if self.first.is_none() {
            self.next += chunk.len() as u64;
            self.first = Some(chunk);
            return;
        }
        while self.writes.len() >= CHUNKS_IN_FLIGHT {
            self.take_one().await;
        }
        let offset = self.next;
        self.next += chunk.len() as u64;
        self.write(offset, chunk).await;
    }

    /// Begins a write, and takes those back that have ended.
    async fn write(&mut self, offset: u64, chunk: AlignedBuf) {
        if self.result.is_err() {
            return;
        }
        let write = self.place.file.write_at(offset, chunk, self.place.mode);
        self.writes.push(Box::pin(write));
        // A write begins when it is polled.
        let mut ended = Vec::new();
        poll_fn(|context| {
            while let Poll::Ready(Some(end)) = self.writes.poll_next_unpin(context) {
                ended.push(end);
            }
            Poll::Ready(())
        })
        .await;
        ended.into_iter().for_each(|end| self.note(end));
    }

    async fn take_one(&mut self) {
        if let Some(end) = self.writes.next().await {
            self.note(end);
        }
    }

    fn note(&mut self, (chunk, result): (AlignedBuf, Result<()>)) {
        self.shared.give_back(&mut self.shared.state.borrow_mut(), chunk);
        if self.result.is_ok() {
            self.result = result;
        }
    }

    /// Pads with zeros, and writes what is left, the first chunk last.
    async fn finish(mut self, padding: usize, record: &RecordHeader) -> Result<()> {
        let mut padding = padding;
        while padding > 0 {
            let zeros = padding.min(self.room());
            self.open.resize(self.open.len() + zeros);
            padding -= zeros;
            if self.room() == 0 && padding > 0 {
                let full = std::mem::replace(&mut self.open, self.shared.buffer());
                self.close(full).await;
            }
        }
        let last = std::mem::replace(&mut self.open, AlignedBuf::with_capacity(0));
        if !last.is_empty() {
            self.close(last).await;
        }
        let mut first = self.first.take().expect("a batch has a header");
        first[BATCH_HEADER_SIZE..BATCH_HEADER_SIZE + size_of::<RecordHeader>()]
            .copy_from_slice(bytemuck::bytes_of(record));
        self.write(self.place.offset, first).await;
        while !self.writes.is_empty() {
            self.take_one().await;
        }
        self.result
    }
}
