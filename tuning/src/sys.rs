//! The few system calls that the standard library does not have, each with a safe face.
//!
//! Invariant: each wrapper passes the kernel only memory that it owns, of the size that the call
//! is documented to fill, and closes what it opened.

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Flags of `io_uring_setup`, from the kernel's `include/uapi/linux/io_uring.h`.
pub(crate) const SETUP_SUBMIT_ALL: u32 = 1 << 7;
pub(crate) const SETUP_COOP_TASKRUN: u32 = 1 << 8;
pub(crate) const SETUP_TASKRUN_FLAG: u32 = 1 << 9;
pub(crate) const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
pub(crate) const SETUP_DEFER_TASKRUN: u32 = 1 << 13;

/// `struct io_uring_params`: 120 bytes, of which only the flags are ours to set.
#[repr(C)]
struct RingParams {
    sizes: [u32; 2],
    flags: u32,
    rest: [u32; 27],
}

const _: () = assert!(size_of::<RingParams>() == 120);

/// Sets up an io_uring with these flags and closes it again.
pub(crate) fn try_ring(entries: u32, flags: u32) -> io::Result<()> {
    let mut params = RingParams { sizes: [0; 2], flags, rest: [0; 27] };
    // SAFETY: the kernel reads and fills the 120 bytes of `params`, which live until it returns.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut params) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nobody else knows.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// Free (for an ordinary user) and total bytes of the file system that holds the path.
pub(crate) fn space(path: &Path) -> io::Result<(u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut filled = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `path` ends with a zero byte; the kernel fills at most the one struct.
    if unsafe { libc::statvfs(path.as_ptr(), filled.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and filled by the call.
    let filled = unsafe { filled.assume_init() };
    Ok((filled.f_bavail * filled.f_frsize, filled.f_blocks * filled.f_frsize))
}

/// What the kernel says of its clock: whether it is synchronised, and the greatest error it
/// believes to have, in microseconds.
pub(crate) fn clock_state() -> io::Result<(bool, u64)> {
    let mut state = std::mem::MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: `modes` is zero, so the call only fills the struct.
    let code = unsafe { libc::adjtimex(state.as_mut_ptr()) };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and filled by the call.
    let state = unsafe { state.assume_init() };
    let synced = code != libc::TIME_ERROR && state.status & libc::STA_UNSYNC == 0;
    Ok((synced, u64::try_from(state.maxerror).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_answer() {
        let (free, total) = space(Path::new("/")).unwrap();
        assert!(free <= total && total > 0);
        assert!(space(Path::new("/no/such/place")).is_err());
        clock_state().unwrap();
        // Whether it is allowed depends on the host; an unknown flag never is.
        assert!(try_ring(8, 1 << 31).is_err());
    }
}
