//! A `Disk` over plain system calls that only reads, so that offline tools use the engine's own
//! readers.
//!
//! Invariant: nothing is ever changed; whatever would write is refused. Its futures are ready at
//! once, so [`now`] runs them without an executor.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use annulus_engine::buffer::AlignedBuf;
use annulus_engine::disk::{Disk, File, OpenMode, Space, WriteMode};
use annulus_engine::error::{Error, Result};

/// Alignment that is told to readers, in bytes: what the formats assume at least.
const ALIGNMENT: usize = 512;

/// Runs a future that waits for nothing but [`Files`].
pub fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return done;
        }
    }
}

/// Files of this machine, for reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct Files;

/// One open file.
#[derive(Clone, Debug)]
pub struct OpenFile {
    file: Arc<std::fs::File>,
    path: PathBuf,
}

fn refused<T>(path: &Path) -> Result<T> {
    let source = io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "inspection only reads");
    Err(Error::io("change", path, source))
}

impl Disk for Files {
    type File = OpenFile;
    type Lock = ();

    async fn open(&self, path: &Path, mode: OpenMode) -> Result<OpenFile> {
        if mode == OpenMode::Create {
            return refused(path);
        }
        let file = std::fs::File::open(path).map_err(|error| Error::io("open", path, error))?;
        Ok(OpenFile { file: Arc::new(file), path: path.to_path_buf() })
    }

    async fn rename(&self, from: &Path, _: &Path) -> Result<()> {
        refused(from)
    }

    async fn link(&self, from: &Path, _: &Path) -> Result<()> {
        refused(from)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        refused(path)
    }

    async fn create_dir(&self, path: &Path) -> Result<()> {
        refused(path)
    }

    async fn list(&self, dir: &Path) -> Result<Vec<String>> {
        let failed = |error| Error::io("list", dir, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    async fn sync_dir(&self, dir: &Path) -> Result<()> {
        refused(dir)
    }

    async fn space(&self, path: &Path) -> Result<Space> {
        refused(path)
    }

    async fn lock(&self, dir: &Path) -> Result<()> {
        refused(dir)
    }
}

impl File for OpenFile {
    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn read_at(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<AlignedBuf>> + 'static {
        let OpenFile { file, path } = self.clone();
        async move {
            let failed =
                |error| Error::io(format!("read at offset {offset} of"), path.clone(), error);
            // Never more memory than the file has bytes, whatever was asked for.
            let there = file.metadata().map_err(failed)?.len().saturating_sub(offset);
            let len = usize::try_from(there).unwrap_or(usize::MAX).min(len);
            let mut buf = AlignedBuf::zeroed(len);
            let mut done = 0;
            while done < len {
                match file.read_at(&mut buf[done..], offset + done as u64) {
                    Ok(0) => break,
                    Ok(count) => done += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(failed(error)),
                }
            }
            buf.truncate(done);
            Ok(buf)
        }
    }

    fn write_at(
        &self,
        _: u64,
        buf: AlignedBuf,
        _: WriteMode,
    ) -> impl Future<Output = (AlignedBuf, Result<()>)> + 'static {
        std::future::ready((buf, refused(&self.path)))
    }

    fn sync(&self) -> impl Future<Output = Result<()>> + 'static {
        std::future::ready(refused(&self.path))
    }

    fn len(&self) -> impl Future<Output = Result<u64>> + 'static {
        let len = self.file.metadata().map(|meta| meta.len());
        std::future::ready(len.map_err(|error| Error::io("length of", &self.path, error)))
    }

    fn set_len(&self, _: u64) -> impl Future<Output = Result<()>> + 'static {
        std::future::ready(refused(&self.path))
    }

    fn punch(&self, _: u64, _: u64) -> impl Future<Output = Result<()>> + 'static {
        std::future::ready(refused(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 1000]).unwrap();
        let file = now(Files.open(&path, OpenMode::Write)).unwrap();
        assert_eq!(now(file.len()).unwrap(), 1000);
        assert_eq!(now(file.read_at(512, 4096)).unwrap().len(), 488);
        assert_eq!(now(file.read_at(1 << 40, usize::MAX)).unwrap().len(), 0);
        assert!(now(file.write_at(0, AlignedBuf::zeroed(512), WriteMode::Cached)).1.is_err());
        assert!(now(Files.remove(&path)).is_err());
        assert!(now(Files.open(&dir.path().join("new"), OpenMode::Create)).is_err());
        assert_eq!(now(Files.list(dir.path())).unwrap(), ["f"]);
    }
}
