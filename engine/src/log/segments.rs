//! Segment files on the disk: made, recycled, removed. Used by `writer.rs`, in the background.
//!
//! Invariant: a file whose name ends in `.log` has a durable header with the id of its name, at
//! every moment and after every crash. So each step is durable before the next begins: a file
//! loses its `.log` name before its header changes, and gets a new one after.

use std::path::{Path, PathBuf};

use super::Lsn;
use super::format::{
    BATCH_ALIGNMENT_MIN, LogIdentity, SEGMENT_HEADER_SIZE, SegmentHeader, segment_name,
    temporary_name,
};
use super::replay::Extent;
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::error::{Error, Result};

/// Bytes zeroed by one write.
const ZERO_SIZE: usize = 1 << 20;

/// A segment that batches may be written to.
pub(super) struct Segment<F> {
    pub(super) id: u64,
    pub(super) file: F,
    pub(super) path: PathBuf,
    /// Bytes that batches may use, counted from the file's start.
    pub(super) capacity: u64,
    pub(super) salt: u64,
    /// Batches start at multiples of this.
    pub(super) alignment: usize,
}

/// One start of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    pub(super) number: u64,
    /// Last record of the lives before.
    pub(super) after: Lsn,
    /// First record of this one.
    pub(super) first: Lsn,
}

/// Makes segments of one life.
pub(super) struct SegmentMaker<D> {
    pub(super) disk: D,
    pub(super) dir: PathBuf,
    pub(super) identity: LogIdentity,
    pub(super) life: Life,
    pub(super) size: u64,
}

impl<D: Disk> SegmentMaker<D> {
    /// Makes a new segment of zeros, unless `give_up` says meanwhile that nobody needs it.
    ///
    /// # Errors
    /// `Busy` when it gave up, else what the disk says; the file is gone then, as far as the disk lets us.
    pub(super) async fn create(
        &self,
        id: u64,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Segment<D::File>> {
        let temporary = self.dir.join(temporary_name(id));
        let made = async {
            let file = self.disk.open(&temporary, OpenMode::Create).await?;
            self.finish(id, &temporary, file, 0, give_up).await
        }
        .await;
        self.or_remove(id, made).await
    }

    /// Makes a segment of a free one. The old name is gone, whatever happens.
    ///
    /// # Errors
    /// What the disk says; the file is gone then, as far as the disk lets us.
    pub(super) async fn recycle(&self, old: &Path, id: u64) -> Result<Segment<D::File>> {
        let temporary = self.dir.join(temporary_name(id));
        if let Err(error) = self.disk.rename(old, &temporary).await {
            // Free segments are found by their old name: best effort that none is left over.
            let _ = self.disk.remove(old).await;
            return Err(error);
        }
        let made = async {
            // Durable before the header changes: no `.log` file ever has another's header.
            self.disk.sync_dir(&self.dir).await?;
            let file = self.disk.open(&temporary, OpenMode::Write).await?;
            let len = file.len().await?;
            self.finish(id, &temporary, file, len, &never).await
        }
        .await;
        self.or_remove(id, made).await
    }

    /// Zeros what is missing, writes the header, and gives the file its name.
    async fn finish(
        &self,
        id: u64,
        temporary: &Path,
        file: D::File,
        len: u64,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Segment<D::File>> {
        let alignment = file.alignment().max(BATCH_ALIGNMENT_MIN);
        if !SEGMENT_HEADER_SIZE.is_multiple_of(alignment) {
            return Err(Error::Mismatch {
                path: temporary.to_path_buf(),
                what: format!("the device wants writes aligned to {alignment} bytes"),
                remedy: "use a file system with an alignment of at most 4096 bytes",
            });
        }
        if len < self.size {
            zero(&file, len / ZERO_SIZE as u64 * ZERO_SIZE as u64, self.size, give_up).await?;
        }
        let capacity = len.max(self.size);
        let Life { number, after, first } = self.life;
        let header = SegmentHeader::new(self.identity, id, number, after, first, capacity);
        let mut buf = AlignedBuf::with_capacity(SEGMENT_HEADER_SIZE);
        buf.extend_from_slice(bytemuck::bytes_of(&header));
        buf.resize(SEGMENT_HEADER_SIZE);
        file.write_at(0, buf, WriteMode::Durable).await.1?;
        let path = self.dir.join(segment_name(id));
        self.disk.rename(temporary, &path).await?;
        self.disk.sync_dir(&self.dir).await?;
        // Opened again, so that errors name the file by the name it has.
        drop(file);
        let file = self.disk.open(&path, OpenMode::Write).await?;
        let salt = self.identity.segment_salt(id, number);
        Ok(Segment { id, file, path, capacity, salt, alignment })
    }

    async fn or_remove(&self, id: u64, made: Result<Segment<D::File>>) -> Result<Segment<D::File>> {
        if made.is_err() {
            // Best effort, whichever name it has: replay passes over what is left.
            let _ = self.disk.remove(&self.dir.join(temporary_name(id))).await;
            let _ = self.disk.remove(&self.dir.join(segment_name(id))).await;
        }
        made
    }
}

/// For segments that are needed whatever happens.
pub(super) fn never() -> bool {
    false
}

/// Writes zeros over `start..end` of a file and syncs them, so that later writes there change
/// neither the file's length nor its extents: one device write a commit instead of four.
///
/// # Errors
/// `Busy` when `give_up` said so, else what the disk says.
pub(super) async fn zero<F: File>(
    file: &F,
    start: u64,
    end: u64,
    give_up: &dyn Fn() -> bool,
) -> Result<()> {
    let mut buf = AlignedBuf::with_capacity(ZERO_SIZE);
    let mut offset = start;
    while offset < end {
        if give_up() {
            return Err(Error::Busy { what: "the commit log is closing" });
        }
        let len = usize::try_from(end - offset).unwrap_or(ZERO_SIZE).min(ZERO_SIZE);
        buf.resize(len);
        let (given_back, result) = file.write_at(offset, buf, WriteMode::Cached).await;
        result?;
        buf = given_back;
        offset += len as u64;
    }
    file.sync().await
}

/// Writes extents again, unchanged, and syncs them, so that they are durable before a new life
/// builds on them: what could be read may still have lain in a cache, and after a failed sync
/// only bytes written anew are sure to reach the medium. A torn rewrite of the same bytes is the
/// same bytes.
pub(super) async fn make_durable<D: Disk>(disk: &D, extents: &[Extent]) -> Result<()> {
    let mut rest = extents;
    while let Some(first) = rest.first() {
        let file = disk.open(&first.path, OpenMode::Write).await?;
        let in_file = rest.iter().take_while(|extent| extent.path == first.path).count();
        let (mut ours, later) = rest.split_at(in_file);
        while let Some(first) = ours.first() {
            // Neighbours together, as long as they make no huge buffer.
            let mut end = first.offset + first.size;
            let mut count = 1;
            while let Some(next) = ours.get(count)
                && next.offset == end
                && next.offset + next.size - first.offset <= ZERO_SIZE as u64
            {
                end += next.size;
                count += 1;
            }
            // The directory may have moved to a device with a larger alignment.
            let alignment = file.alignment() as u64;
            let start = first.offset / alignment * alignment;
            let size = usize::try_from(end.next_multiple_of(alignment) - start)
                .expect("a batch that was read fits the memory");
            let bytes = file.read_at(start, size).await?;
            file.write_at(start, bytes, WriteMode::Cached).await.1?;
            ours = &ours[count..];
        }
        file.sync().await?;
        rest = later;
    }
    Ok(())
}

/// Removes what an earlier life was still preparing.
pub(super) async fn remove_temporaries<D: Disk>(disk: &D, dir: &Path) -> Result<()> {
    for name in disk.list(dir).await? {
        if name.ends_with(".tmp") {
            disk.remove(&dir.join(name)).await?;
        }
    }
    Ok(())
}
