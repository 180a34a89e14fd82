//! The signal that keeps a shard from parking, or wakes it when it has parked.
//!
//! Invariant (Dekker's): the waker sets `pending`, then looks at `parked`; the shard sets
//! `parked`, then looks at `pending`; both sequentially consistent. So at least one of them sees
//! the other, and no wake-up is lost. A shard that is awake costs the waker one swap, no syscall.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::thread::{self, ThreadId};

use futures_util::task::AtomicWaker;

/// What the ring, the mesh and the foreground tasks of one shard share with other threads.
#[derive(Debug)]
pub(crate) struct Signal {
    eventfd: OwnedFd,
    owner: ThreadId,
    pending: AtomicBool,
    parked: AtomicBool,
    /// The host task's waker while it is parked; used and dropped on the owner's thread only.
    host: AtomicWaker,
}

impl Signal {
    /// A signal that belongs to the calling thread.
    pub(crate) fn new() -> io::Result<Arc<Signal>> {
        // Not EFD_NONBLOCK: io_uring would answer the parked read with EAGAIN instead of waiting.
        // SAFETY: no pointers are passed; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        let eventfd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Arc::new(Signal {
            eventfd,
            owner: thread::current().id(),
            pending: AtomicBool::new(false),
            parked: AtomicBool::new(false),
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
        if !self.pending.swap(true, Ordering::SeqCst) && self.parked.load(Ordering::SeqCst) {
            self.unpark();
        }
    }

    /// As [`Signal::wake`], for the shard's own thread, free when the shard is awake: what was
    /// changed is looked at before the next parking anyway.
    pub(crate) fn wake_if_parked(&self) {
        if self.parked.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    fn unpark(&self) {
        if thread::current().id() == self.owner {
            self.host.wake();
            return;
        }
        let one = 1u64;
        // SAFETY: eight readable bytes and an open descriptor. The result needs no look: the
        // write fails only when the counter is full, and then the reader wakes all the same.
        unsafe { libc::write(self.eventfd(), (&raw const one).cast(), size_of::<u64>()) };
    }

    /// Whether the shard is parked. On its own thread.
    pub(crate) fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed)
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
        self.parked.store(true, Ordering::SeqCst);
    }

    /// Says whom to wake on the owner's thread.
    pub(crate) fn register(&self, waker: &Waker) {
        self.host.register(waker);
    }

    /// Wakes the host task if it is parked. On the owner's thread.
    pub(crate) fn wake_host(&self) {
        self.host.wake();
    }

    /// Says that the shard is awake, and forgets the host's waker.
    pub(crate) fn clear_parked(&self) {
        self.parked.store(false, Ordering::SeqCst);
        drop(self.host.take());
    }
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
