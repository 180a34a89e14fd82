//! The signal that keeps a shard from parking, or wakes it when it has parked.
//!
//! Invariant (Dekker's): the waker sets `pending`, then looks at `asleep`; the shard sets
//! `asleep`, then looks at `pending`; both sequentially consistent. So at least one of them sees
//! the other, and no wake-up is lost. A shard that is awake costs the waker one swap, no syscall.
//!
//! A shard sleeps in one of two places, each with an eventfd of its own that ends the sleep: in
//! the executor (*parked*), or in its own ring (*waiting*), which is quicker but lets no
//! background task run.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::Waker;
use std::thread::{self, ThreadId};

use futures_util::task::AtomicWaker;

/// The shard is awake.
const AWAKE: u8 = 0;
/// It sleeps in the executor.
const PARKED: u8 = 1;
/// It sleeps in its ring.
const WAITING: u8 = 2;

/// What the ring, the mesh and the foreground tasks of one shard share with other threads.
#[derive(Debug)]
pub(crate) struct Signal {
    eventfd: OwnedFd,
    /// Ends a wait in the ring; only the ring polls and reads it.
    ring_eventfd: OwnedFd,
    owner: ThreadId,
    pending: AtomicBool,
    asleep: AtomicU8,
    /// The host task's waker while it is parked; used and dropped on the owner's thread only.
    host: AtomicWaker,
}

impl Signal {
    /// A signal that belongs to the calling thread.
    pub(crate) fn new() -> io::Result<Arc<Signal>> {
        Ok(Arc::new(Signal {
            // Not EFD_NONBLOCK: io_uring would answer the parked read with EAGAIN instead of
            // waiting.
            eventfd: eventfd(libc::EFD_CLOEXEC)?,
            ring_eventfd: eventfd(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
            owner: thread::current().id(),
            pending: AtomicBool::new(false),
            asleep: AtomicU8::new(AWAKE),
            host: AtomicWaker::new(),
        }))
    }

    /// The eventfd, which the ring also writes while its notification is enabled.
    pub(crate) fn eventfd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// A second descriptor of the eventfd.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.eventfd.try_clone()
    }

    /// Makes the shard take another turn soon. From any thread.
    pub(crate) fn wake(&self) {
        if !self.pending.swap(true, Ordering::SeqCst) {
            match self.asleep.load(Ordering::SeqCst) {
                AWAKE => {}
                WAITING => write_one(&self.ring_eventfd),
                _ => self.unpark(),
            }
        }
    }

    /// As [`Signal::wake`], for the shard's own thread, free when the shard is awake: what was
    /// changed is looked at before the next parking anyway.
    pub(crate) fn wake_if_parked(&self) {
        if self.is_parked() {
            self.wake();
        }
    }

    fn unpark(&self) {
        if thread::current().id() == self.owner {
            self.host.wake();
            return;
        }
        write_one(&self.eventfd);
    }

    /// The eventfd that ends a wait in the ring.
    pub(crate) fn ring_eventfd(&self) -> RawFd {
        self.ring_eventfd.as_raw_fd()
    }

    /// Sets that eventfd back, so that it can end another wait.
    pub(crate) fn reset_ring_eventfd(&self) {
        let mut count = 0u64;
        // SAFETY: eight writable bytes and an open descriptor. It does not block, and a failure
        // says that there was nothing to set back.
        unsafe { libc::read(self.ring_eventfd(), (&raw mut count).cast(), size_of::<u64>()) };
    }

    /// Whether the shard is parked. On its own thread.
    pub(crate) fn is_parked(&self) -> bool {
        self.asleep.load(Ordering::Relaxed) == PARKED
    }

    /// Whether someone asked for a turn.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes note of all requests so far. What they announced is looked at after this call.
    pub(crate) fn clear(&self) {
        if self.pending.load(Ordering::Relaxed) {
            self.pending.swap(false, Ordering::SeqCst);
        }
    }

    /// Says that the shard is about to park; the caller looks once more for work after this.
    pub(crate) fn set_parked(&self) {
        self.asleep.store(PARKED, Ordering::SeqCst);
    }

    /// As [`Signal::set_parked`], for a sleep in the ring.
    pub(crate) fn set_waiting(&self) {
        self.asleep.store(WAITING, Ordering::SeqCst);
    }

    /// Ends what [`Signal::set_waiting`] began.
    pub(crate) fn clear_waiting(&self) {
        self.asleep.store(AWAKE, Ordering::SeqCst);
    }

    /// Says whom to wake on the owner's thread.
    pub(crate) fn register(&self, waker: &Waker) {
        self.host.register(waker);
    }

    /// As [`Signal::wake`], for the shard's own thread, and also when somebody has asked before:
    /// his write to the eventfd is seen only when the thread sleeps.
    pub(crate) fn wake_here(&self) {
        self.pending.store(true, Ordering::SeqCst);
        self.wake_host();
    }

    /// Wakes the host task if it is parked. On the owner's thread.
    pub(crate) fn wake_host(&self) {
        self.host.wake();
    }

    /// Says that the shard is awake, and forgets the host's waker.
    pub(crate) fn clear_parked(&self) {
        self.asleep.store(AWAKE, Ordering::SeqCst);
        drop(self.host.take());
    }
}

fn eventfd(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; the result is checked.
    let fd = unsafe { libc::eventfd(0, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn write_one(eventfd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight readable bytes and an open descriptor. The result needs no look: the write
    // fails only when the counter is full, and then the reader wakes all the same.
    unsafe { libc::write(eventfd.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
}

/// Wakes a shard from any thread.
#[derive(Clone, Debug)]
pub struct RingWaker(pub(crate) Arc<Signal>);

impl RingWaker {
    /// Makes the shard take another turn soon. Cheap when it is awake or already asked.
    pub fn wake(&self) {
        self.0.wake();
    }
}
