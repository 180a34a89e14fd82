//! The `Disk` seam: files of one shard, and what survives which crash.
//!
//! Production: `driver/files.rs` (io_uring, direct I/O). Simulation: `sim/disk.rs`.
//!
//! # Contract
//! - Offsets, lengths and memory of reads and writes are multiples of [`File::alignment`].
//! - A write is visible to reads at once. It is durable only after a [`File::sync`] that began
//!   later has returned, or, with [`WriteMode::Durable`], when the write itself has returned.
//! - At a crash each write that is not durable is kept, dropped, or torn at 512 bytes, each for
//!   itself and in any order; so is the file's length.
//! - A name that was created, renamed, linked or removed is durable only after [`Disk::sync_dir`]
//!   of its directory; at a crash it may be in either state, whatever the content's state is.
//! - A failed sync may have dropped what was pending, and the next sync may succeed. So: never
//!   sync the same file again after a failure; see `log/writer.rs`.
//! - Any operation may fail with "no space left", and may be slow.
//! - A future that is dropped leaves its operation running to its end.

use std::future::Future;
use std::path::Path;

use crate::buffer::AlignedBuf;
use crate::error::Result;

/// Whether a write is durable when it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// Durable after a later sync.
    Cached,
    /// Durable when it returns: data, and the length if the file grew.
    Durable,
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Write,
    /// A new file for reading and writing; an error when the name exists.
    Create,
}

/// Free and total space of the file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What an ordinary user may still write.
    pub free: u64,
    /// The size of the file system.
    pub total: u64,
}

/// Files and directories of one shard.
pub trait Disk: Clone + 'static {
    /// An open file. Clones share it; the last one closes it.
    type File: File;
    /// Held while this process owns a directory; dropping it gives the directory up.
    type Lock: 'static;

    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> impl Future<Output = Result<Self::File>>;
    /// Gives a file another name, replacing what has that name.
    fn rename(&self, from: &Path, to: &Path) -> impl Future<Output = Result<()>>;
    /// Gives a file a second name; an error when the name exists.
    fn link(&self, from: &Path, to: &Path) -> impl Future<Output = Result<()>>;
    /// Removes a file's name.
    fn remove(&self, path: &Path) -> impl Future<Output = Result<()>>;
    /// Makes a directory and its missing parents; fine when it exists.
    fn create_dir(&self, path: &Path) -> impl Future<Output = Result<()>>;
    /// Names of the files (not directories) in a directory, sorted.
    fn list(&self, dir: &Path) -> impl Future<Output = Result<Vec<String>>>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> impl Future<Output = Result<()>>;
    /// Space of the file system that holds `path`.
    fn space(&self, path: &Path) -> impl Future<Output = Result<Space>>;
    /// Takes a directory for this process.
    ///
    /// # Errors
    /// `Mismatch` when another process has it.
    fn lock(&self, dir: &Path) -> impl Future<Output = Result<Self::Lock>>;
}

/// One open file.
#[expect(clippy::len_without_is_empty, reason = "asking the system twice would be no better")]
pub trait File: Clone + 'static {
    /// Power of two that divides each offset and length given to reads and writes, in bytes.
    fn alignment(&self) -> usize;
    /// Reads `len` bytes at `offset`. The buffer is shorter when the file ends before.
    fn read_at(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<AlignedBuf>> + 'static;
    /// Writes the whole buffer at `offset`, growing the file if needed, and gives it back.
    fn write_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
        mode: WriteMode,
    ) -> impl Future<Output = (AlignedBuf, Result<()>)> + 'static;
    /// Makes all earlier writes, and the length, durable.
    fn sync(&self) -> impl Future<Output = Result<()>> + 'static;
    /// The file's length in bytes.
    fn len(&self) -> impl Future<Output = Result<u64>> + 'static;
    /// Cuts or extends (with zeros) the file to `len` bytes.
    fn set_len(&self, len: u64) -> impl Future<Output = Result<()>> + 'static;
    /// Gives the space of a range back to the file system; it reads as zeros. Best effort: a
    /// file system that cannot do it returns `Ok` and leaves the range.
    fn punch(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>> + 'static;
}
