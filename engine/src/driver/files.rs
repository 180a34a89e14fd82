//! [`Disk`] on the shard's ring: direct I/O where the file system has it.
//!
//! Invariant: an operation in flight owns its buffer and its open file, so neither is freed nor
//! closed under it, and a descriptor is closed once, by the last owner. What may take long in the
//! kernel (open with creation, rename, unlink, sync, close) runs on kernel workers by io_uring's
//! own rule; listing, locking and asking for space block, and belong to start-up.
//!
//! On the path: under the commit log, the tables and the manifest. The contract is in `disk.rs`.

use std::cell::Cell;
use std::ffi::CString;
use std::fs;
use std::future::Future;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use io_uring::{opcode, types};

use super::ring::{KeepAlive, Ring, Weight};
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode, Space, WriteMode};
use crate::error::{Error, Result};
use crate::model::limits::DISK_ALIGNMENT;

/// Path in errors that concern no file.
pub(super) const HERE: &str = ".";
/// Alignment of direct I/O where the kernel does not say: enough for any device.
const ALIGNMENT_UNKNOWN: usize = 4096;
/// Longest single read or write, below the kernel's own bound and aligned.
const TRANSFER_MAX: usize = 1 << 30;
/// Name of the lock file in a directory.
const LOCK_NAME: &str = "LOCK";

/// Files of one shard, on its ring. Clones share it.
#[derive(Clone)]
pub struct RingDisk {
    ring: Ring,
    warned: Rc<Cell<bool>>,
}

impl RingDisk {
    /// A disk whose operations complete in the turns of `ring`.
    #[must_use]
    pub fn new(ring: &Ring) -> RingDisk {
        RingDisk { ring: ring.clone(), warned: Rc::default() }
    }

    /// Runs an entry whose result is just success or failure.
    ///
    /// # Safety
    /// As [`Ring::operation`].
    async unsafe fn simple<K: KeepAlive>(
        &self,
        operation: &str,
        path: &Path,
        entry: io_uring::squeue::Entry,
        keep: K,
    ) -> Result<()> {
        // SAFETY: promised by the caller.
        let (result, _keep) = unsafe { self.ring.operation(entry, Weight::Plain, keep) }.await;
        check(result).map(drop).map_err(|source| Error::io(operation, path, source))
    }

    async fn open_flags(&self, path: &Path, flags: i32) -> Result<Rc<OpenFile>> {
        let name = Name(c_path(path)?);
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), name.0.as_ptr())
            .flags(flags | libc::O_CLOEXEC)
            .mode(0o600)
            .build();
        let keep = Opening { _name: name, ring: self.ring.clone() };
        // SAFETY: the name is on the heap, owned by `keep`.
        let (result, _keep) = unsafe { self.ring.operation(entry, Weight::Plain, keep) }.await;
        let fd = check(result).map_err(|source| Error::io("open", path, source))?;
        Ok(Rc::new(OpenFile {
            fd,
            ring: self.ring.clone(),
            path: path.to_owned(),
            alignment: DISK_ALIGNMENT,
            direct: false,
        }))
    }

    fn warn_buffered(&self, path: &Path, why: &io::Error) {
        if !self.warned.replace(true) {
            tracing::warn!(
                path = %path.display(), %why,
                "the file system refuses direct I/O: reads and writes go through the page cache"
            );
        }
    }
}

/// A path for the kernel.
struct Name(CString);

impl KeepAlive for Name {}
impl KeepAlive for (Name, Name) {}

/// What an open in flight needs; closes the file if nobody waits for it any more.
struct Opening {
    _name: Name,
    ring: Ring,
}

impl KeepAlive for Opening {
    fn abandoned(&mut self, result: i32) {
        if result >= 0 {
            self.ring.close(result);
        }
    }
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Invalid { what: format!("path {} holds a zero byte", path.display()) })
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

/// Whether the kernel asks to try the same again.
fn is_transient(result: i32) -> bool {
    result == -libc::EINTR || result == -libc::EAGAIN
}

impl Disk for RingDisk {
    type File = RingFile;
    type Lock = DirectoryLock;

    async fn open(&self, path: &Path, mode: OpenMode) -> Result<RingFile> {
        let flags = match mode {
            OpenMode::Read => libc::O_RDONLY,
            OpenMode::Write => libc::O_RDWR,
            OpenMode::Create => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
        };
        let mut file = self.open_flags(path, flags).await?;
        let open = Rc::get_mut(&mut file).expect("nobody else has it yet");
        // Switched on after opening: where it is refused, an O_CREAT | O_DIRECT open would leave
        // a new file behind and then fail.
        match open.set_direct() {
            Ok(()) => {}
            Err(why) => self.warn_buffered(path, &why),
        }
        Ok(RingFile(file))
    }

    async fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let names = (Name(c_path(from)?), Name(c_path(to)?));
        let here = types::Fd(libc::AT_FDCWD);
        let entry =
            opcode::RenameAt::new(here, names.0.0.as_ptr(), here, names.1.0.as_ptr()).build();
        // SAFETY: both names are on the heap, owned by the keepsake.
        unsafe { self.simple("rename", from, entry, names) }.await
    }

    async fn link(&self, from: &Path, to: &Path) -> Result<()> {
        let names = (Name(c_path(from)?), Name(c_path(to)?));
        let here = types::Fd(libc::AT_FDCWD);
        let entry = opcode::LinkAt::new(here, names.0.0.as_ptr(), here, names.1.0.as_ptr()).build();
        // SAFETY: both names are on the heap, owned by the keepsake.
        unsafe { self.simple("link", to, entry, names) }.await
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        let name = Name(c_path(path)?);
        let entry = opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), name.0.as_ptr()).build();
        // SAFETY: the name is on the heap, owned by the keepsake.
        unsafe { self.simple("remove", path, entry, name) }.await
    }

    async fn create_dir(&self, path: &Path) -> Result<()> {
        // Blocking: start-up and snapshots only.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| Error::io("create directory", path, source))
    }

    async fn list(&self, dir: &Path) -> Result<Vec<String>> {
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if !entry.file_type()?.is_file() {
                    continue;
                }
                match entry.file_name().into_string() {
                    Ok(name) => names.push(name),
                    Err(name) => tracing::warn!(?name, "ignored: a name that is not UTF-8"),
                }
            }
            names.sort_unstable();
            Ok(names)
        };
        read().map_err(|source| Error::io("list", dir, source))
    }

    async fn sync_dir(&self, dir: &Path) -> Result<()> {
        let open = self.open_flags(dir, libc::O_RDONLY | libc::O_DIRECTORY).await?;
        let entry = opcode::Fsync::new(types::Fd(open.fd)).build();
        // SAFETY: the entry points to no memory; the keepsake keeps the descriptor open.
        unsafe { self.simple("sync directory", dir, entry, open) }.await
    }

    async fn space(&self, path: &Path) -> Result<Space> {
        let name = c_path(path)?;
        let mut facts = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
        // SAFETY: a terminated path, and a writable struct of the right type.
        let answer = unsafe { libc::statvfs(name.as_ptr(), facts.as_mut_ptr()) };
        check_errno(answer).map_err(|source| Error::io("ask for space of", path, source))?;
        // SAFETY: zeroed, then filled by the call that succeeded.
        let facts = unsafe { facts.assume_init() };
        let bytes = |blocks: u64| blocks.saturating_mul(facts.f_frsize);
        Ok(Space { free: bytes(facts.f_bavail), total: bytes(facts.f_blocks) })
    }

    async fn lock(&self, dir: &Path) -> Result<DirectoryLock> {
        let path = dir.join(LOCK_NAME);
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| Error::io("open", &path, source))?;
        // SAFETY: an open descriptor and no memory.
        let answer = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        match check_errno(answer) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut owner = String::new();
                // For the message only: without it, it just says less.
                let _ = (&mut file).take(20).read_to_string(&mut owner);
                return Err(Error::Mismatch {
                    path: dir.to_owned(),
                    what: format!("another process ({}) uses this directory", owner.trim()),
                    remedy: "stop that process, or give this one a directory of its own",
                });
            }
            Err(source) => return Err(Error::io("lock", &path, source)),
        }
        // The lock is the file's, not its text's: a failure here only makes messages poorer.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Ok(DirectoryLock { _file: file })
    }
}

/// Held while this process owns a directory.
pub struct DirectoryLock {
    _file: fs::File,
}

fn check_errno(answer: i32) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A descriptor and what is known of it; closed by the last owner.
struct OpenFile {
    fd: RawFd,
    ring: Ring,
    path: PathBuf,
    alignment: usize,
    direct: bool,
}

impl KeepAlive for Rc<OpenFile> {}
impl KeepAlive for (AlignedBuf, Rc<OpenFile>) {}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.ring.close(self.fd);
    }
}

impl OpenFile {
    /// Turns direct I/O on and learns its alignment.
    fn set_direct(&mut self) -> io::Result<()> {
        // SAFETY: an open descriptor and no memory, both calls.
        let flags = unsafe { libc::fcntl(self.fd, libc::F_GETFL) };
        check_errno(flags)?;
        // SAFETY: as above.
        check_errno(unsafe { libc::fcntl(self.fd, libc::F_SETFL, flags | libc::O_DIRECT) })?;
        self.direct = true;
        self.alignment = self.ask_alignment();
        Ok(())
    }

    fn ask_alignment(&self) -> usize {
        let mut facts = std::mem::MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: an open descriptor, an empty terminated path, and a writable struct.
        let answer = unsafe {
            let empty = c"".as_ptr();
            let mask = libc::STATX_DIOALIGN;
            libc::statx(self.fd, empty, libc::AT_EMPTY_PATH, mask, facts.as_mut_ptr())
        };
        // SAFETY: zeroed, so initialised whatever the call did.
        let facts = unsafe { facts.assume_init() };
        let offset = facts.stx_dio_offset_align as usize;
        if answer == 0 && facts.stx_mask & libc::STATX_DIOALIGN != 0 && offset.is_power_of_two() {
            offset.max(DISK_ALIGNMENT)
        } else {
            ALIGNMENT_UNKNOWN
        }
    }

    fn error(&self, operation: impl Into<String>, source: io::Error) -> Error {
        Error::io(operation, &self.path, source)
    }

    fn check_aligned(&self, what: &str, offset: u64, len: usize) -> Result<()> {
        let alignment = self.alignment;
        if offset.is_multiple_of(alignment as u64) && len.is_multiple_of(alignment) {
            return Ok(());
        }
        Err(Error::Invalid {
            what: format!(
                "{what} of {len} bytes at offset {offset} of {} is not aligned to {alignment}",
                self.path.display()
            ),
        })
    }

    async fn plain(self: Rc<Self>, what: &str, entry: io_uring::squeue::Entry) -> Result<()> {
        let ring = self.ring.clone();
        // SAFETY: entries given here point to no memory; `self` keeps the descriptor open.
        let (result, this) = unsafe { ring.operation(entry, Weight::Plain, self) }.await;
        check(result).map(drop).map_err(|source| this.error(what, source))
    }
}

/// An open file on the shard's ring. Clones share it.
#[derive(Clone)]
pub struct RingFile(Rc<OpenFile>);

impl RingFile {
    /// Whether reads and writes bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.0.direct
    }
}

impl File for RingFile {
    fn alignment(&self) -> usize {
        self.0.alignment
    }

    fn read_at(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<AlignedBuf>> + 'static {
        read(Rc::clone(&self.0), offset, len)
    }

    fn write_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
        mode: WriteMode,
    ) -> impl Future<Output = (AlignedBuf, Result<()>)> + 'static {
        write(Rc::clone(&self.0), offset, buf, mode)
    }

    fn sync(&self) -> impl Future<Output = Result<()>> + 'static {
        // Data-only: it includes the metadata that reading the data back needs, such as length.
        let entry =
            opcode::Fsync::new(types::Fd(self.0.fd)).flags(types::FsyncFlags::DATASYNC).build();
        Rc::clone(&self.0).plain("sync", entry)
    }

    fn len(&self) -> impl Future<Output = Result<u64>> + 'static {
        let file = Rc::clone(&self.0);
        async move {
            // The inode of an open file is in memory: this does not block.
            let mut facts = std::mem::MaybeUninit::<libc::stat>::zeroed();
            // SAFETY: an open descriptor and a writable struct of the right type.
            let answer = unsafe { libc::fstat(file.fd, facts.as_mut_ptr()) };
            check_errno(answer).map_err(|source| file.error("ask for length of", source))?;
            // SAFETY: zeroed, then filled by the call that succeeded.
            let size = unsafe { facts.assume_init() }.st_size;
            Ok(u64::try_from(size).unwrap_or(0))
        }
    }

    fn set_len(&self, len: u64) -> impl Future<Output = Result<()>> + 'static {
        let entry = opcode::Ftruncate::new(types::Fd(self.0.fd), len).build();
        let file = Rc::clone(&self.0);
        async move {
            match Rc::clone(&file).plain("set length of", entry).await {
                // Kernels before 6.9 do not have the operation.
                Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    let len = i64::try_from(len).unwrap_or(i64::MAX);
                    // SAFETY: an open descriptor and no memory.
                    check_errno(unsafe { libc::ftruncate(file.fd, len) })
                        .map_err(|source| file.error("set length of", source))
                }
                other => other,
            }
        }
    }

    fn punch(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>> + 'static {
        let entry = opcode::Fallocate::new(types::Fd(self.0.fd), len)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build();
        let file = Rc::clone(&self.0);
        async move {
            match file.plain("punch", entry).await {
                Err(Error::Io { source, .. })
                    if source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
                {
                    Ok(())
                }
                other => other,
            }
        }
    }
}

/// One piece of a longer transfer, in bytes, as the kernel counts.
fn piece(left: usize) -> u32 {
    u32::try_from(left.min(TRANSFER_MAX)).expect("TRANSFER_MAX fits in 32 bits")
}

async fn read(file: Rc<OpenFile>, offset: u64, len: usize) -> Result<AlignedBuf> {
    file.check_aligned("read", offset, len)?;
    let ring = file.ring.clone();
    let mut keep = (AlignedBuf::with_capacity(len), file);
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        // SAFETY: `done < len <= capacity`, so the pointer stays inside the buffer.
        let start = unsafe { keep.0.as_mut_ptr().add(done) };
        let entry =
            opcode::Read::new(types::Fd(keep.1.fd), start, piece(len - done)).offset(at).build();
        // SAFETY: the buffer's memory is on the heap and owned by `keep`, which nobody else
        // reads or writes while the operation has it; so is the open file.
        let (result, returned) = unsafe { ring.operation(entry, Weight::Plain, keep) }.await;
        keep = returned;
        if is_transient(result) {
            continue;
        }
        let read = check(result).map_err(|source| {
            keep.1.error(format!("read {len} bytes at offset {at} of"), source)
        })?;
        let read = usize::try_from(read).expect("checked to be positive");
        done += read;
        // Nothing, or a piece that does not end on the device's grid: the file ends here.
        if read == 0 || !done.is_multiple_of(keep.1.alignment) {
            break;
        }
    }
    let mut buf = keep.0;
    // SAFETY: the kernel has written the first `done <= len` bytes.
    unsafe { buf.set_len(done.min(len)) };
    Ok(buf)
}

async fn write(
    file: Rc<OpenFile>,
    offset: u64,
    buf: AlignedBuf,
    mode: WriteMode,
) -> (AlignedBuf, Result<()>) {
    if let Err(error) = file.check_aligned("write", offset, buf.len()) {
        return (buf, Err(error));
    }
    let (flags, weight) = match mode {
        WriteMode::Cached => (0, Weight::Plain),
        WriteMode::Durable => (libc::RWF_DSYNC, Weight::LogWrite),
    };
    let ring = file.ring.clone();
    let mut keep = (buf, file);
    let mut done = 0;
    while done < keep.0.len() {
        let at = offset + done as u64;
        let left = &keep.0[done..];
        let entry = opcode::Write::new(types::Fd(keep.1.fd), left.as_ptr(), piece(left.len()))
            .offset(at)
            .rw_flags(flags)
            .build();
        // SAFETY: the buffer's memory is on the heap and owned by `keep`, which nobody else
        // writes while the operation has it; so is the open file.
        let (result, returned) = unsafe { ring.operation(entry, weight, keep) }.await;
        keep = returned;
        if is_transient(result) {
            continue;
        }
        let error = match check(result).map(usize::try_from) {
            Ok(Ok(written @ 1..)) => {
                done += written;
                continue;
            }
            Ok(_) => io::Error::from(io::ErrorKind::WriteZero),
            Err(error) => error,
        };
        let what = format!("write {} bytes at offset {at} of", keep.0.len() - done);
        let error = keep.1.error(what, error);
        return (keep.0, Err(error));
    }
    (keep.0, Ok(()))
}
