//! The shard's raw io_uring ring: everything it asks of the kernel goes out, and everything the
//! kernel answers comes in, once a turn with one `io_uring_enter`.
//!
//! Invariant: memory that an operation in flight points to outlives the operation, even when its
//! future is dropped: the future's keepsake then moves into the operation's slot, and a slot is
//! given to the next operation only after the completion of the last. So a completion always
//! meets its own operation. Network completions (bit [`NETWORK`]) are handed to the caller, who
//! tags them with generations.
//!
//! On the read and write path: the log's writes, block reads, and `net`'s sockets all pass here.
//! Follows Axboe, "Efficient IO with io_uring" (2019), and the measurements in `RUNTIME.md`.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll, Waker};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};

use super::refusal;
use super::signal::{RingWaker, Signal};
use crate::error::Result;

/// Bit of `user_data` that marks an entry whose completions go to the caller of [`Ring::turn`].
pub const NETWORK: u64 = 1 << 63;

/// `user_data` of entries whose completion nobody waits for.
const UNATTENDED: u64 = NETWORK - 1;

/// `user_data` of the poll that ends a wait in the ring.
const WAKE: u64 = NETWORK - 2;

/// Longest wait in the ring: the executor's own timers are looked at again after it.
const WAIT_NANOS_MAX: u32 = 1_000_000;

/// Rounds of 100 ms that tearing down waits for file operations, and again for the rest.
const DRAIN_ROUNDS: usize = 100;

/// Sizes of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries that can be queued between two turns before one more system call is needed.
    pub submission_entries: u32,
    /// Completions that fit before the kernel must buffer them aside.
    pub completion_entries: u32,
}

impl Default for RingConfig {
    fn default() -> RingConfig {
        RingConfig { submission_entries: 1024, completion_entries: 8192 }
    }
}

/// What the kernel says about one network entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the entry was tagged with.
    pub user_data: u64,
    /// Result, or a negated errno.
    pub result: i32,
    /// Flags of the completion.
    pub flags: u32,
}

impl Completion {
    /// Whether a multishot entry stays armed.
    #[must_use]
    pub fn more(&self) -> bool {
        cqueue::more(self.flags)
    }

    /// The provided buffer that holds the bytes.
    #[must_use]
    pub fn buffer(&self) -> Option<u16> {
        cqueue::buffer_select(self.flags)
    }
}

/// What an operation needs to stay alive; told when it completes with nobody waiting.
pub trait KeepAlive: 'static {
    /// The future was dropped, and the operation has now ended with `result`.
    fn abandoned(&mut self, _result: i32) {}
}

impl KeepAlive for () {}

/// How the host treats an operation while it is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Nothing special.
    Plain,
    /// A durable write: the shard yields its core once a turn, or the block layer's worker, which
    /// may run on the same core, starves (4 ms instead of 0.1 ms a commit).
    LogWrite,
}

/// One shard's ring. Clones share it; it never leaves its thread.
#[derive(Clone)]
pub struct Ring(Rc<Inner>);

/// A ring that does not keep itself alive, for what the ring itself may hold.
#[derive(Clone)]
pub(crate) struct WeakRing(Weak<Inner>);

impl WeakRing {
    pub(crate) fn upgrade(&self) -> Option<Ring> {
        self.0.upgrade().map(Ring)
    }
}

struct Inner {
    io: RefCell<IoUring>,
    /// Entries that found the submission queue full, in order.
    backlog: RefCell<VecDeque<squeue::Entry>>,
    slots: RefCell<Slots>,
    /// Reused by each turn: what its completions set free.
    settled: Cell<Vec<Settled>>,
    signal: Arc<Signal>,
    files_in_flight: Cell<usize>,
    network_in_flight: Cell<usize>,
    log_writes: Cell<usize>,
    /// Whether a poll is in flight that another thread's wake-up completes.
    wake_polled: Cell<bool>,
    /// Memory of closed sockets that the kernel may still use.
    retained: RefCell<Vec<Box<dyn Any>>>,
    groups: Cell<u16>,
}

enum Slot {
    Free { next: u32 },
    Waiting(Option<Waker>),
    Done(i32),
    Abandoned(Box<dyn KeepAlive>),
}

struct Slots {
    slots: Vec<(Slot, Weight)>,
    free: u32,
}

const NO_SLOT: u32 = u32::MAX;

impl Slots {
    fn take(&mut self, weight: Weight) -> u32 {
        if self.free == NO_SLOT {
            let index = u32::try_from(self.slots.len()).expect("fewer operations than 2^32");
            self.slots.push((Slot::Waiting(None), weight));
            return index;
        }
        let index = self.free;
        let slot = &mut self.slots[index as usize];
        if let Slot::Free { next } = slot.0 {
            self.free = next;
        }
        *slot = (Slot::Waiting(None), weight);
        index
    }

    fn give_back(&mut self, index: u32) -> Slot {
        let next = std::mem::replace(&mut self.free, index);
        std::mem::replace(&mut self.slots[index as usize].0, Slot::Free { next })
    }
}

enum Settled {
    Wake(Waker),
    Abandoned(Box<dyn KeepAlive>, i32),
}

impl Ring {
    /// Sets up the ring of the calling thread.
    ///
    /// # Errors
    /// `Io` that names which rule of the system refused it and how to allow it; see [`refusal`].
    pub fn new(config: RingConfig) -> Result<Ring> {
        let mut builder = IoUring::builder();
        builder
            .setup_cqsize(config.completion_entries)
            .setup_submit_all()
            .setup_coop_taskrun()
            .setup_single_issuer()
            .setup_taskrun_flag()
            .setup_defer_taskrun();
        let build = || -> io::Result<(IoUring, Arc<Signal>)> {
            let mut io = builder.build(config.submission_entries)?;
            let signal = Signal::new()?;
            io.submitter().register_eventfd(signal.eventfd())?;
            io.completion().disable_eventfd();
            Ok((io, signal))
        };
        let (io, signal) = build().map_err(|source| refusal::error(&source))?;
        Ok(Ring(Rc::new(Inner {
            io: RefCell::new(io),
            backlog: RefCell::default(),
            slots: RefCell::new(Slots { slots: Vec::new(), free: NO_SLOT }),
            settled: Cell::default(),
            signal,
            files_in_flight: Cell::new(0),
            network_in_flight: Cell::new(0),
            log_writes: Cell::new(0),
            wake_polled: Cell::new(false),
            retained: RefCell::default(),
            groups: Cell::new(0),
        })))
    }

    /// Queues an entry; the next turn submits it. Its `user_data` carries [`NETWORK`], and its
    /// completions come out of [`Ring::turn`].
    ///
    /// # Safety
    /// Whatever the entry points to stays valid until its last completion (one without `MORE`);
    /// [`Ring::retain`] helps an owner that must go before.
    pub unsafe fn push(&self, entry: squeue::Entry) {
        let inner = &*self.0;
        let count = match entry.get_user_data() & NETWORK {
            0 => &inner.files_in_flight,
            _ => &inner.network_in_flight,
        };
        count.set(count.get() + 1);
        inner.enqueue(entry);
        inner.signal.wake_if_parked();
    }

    /// Starts an operation; the future gives its result (or negated errno) and `keep` back.
    ///
    /// # Safety
    /// Whatever the entry points to is owned by `keep`, on the heap: valid and at its place until
    /// `keep` is dropped, also when `keep` itself moves.
    pub unsafe fn operation<K: KeepAlive>(
        &self,
        entry: squeue::Entry,
        weight: Weight,
        keep: K,
    ) -> Operation<K> {
        let slot = self.0.slots.borrow_mut().take(weight);
        if weight == Weight::LogWrite {
            self.0.log_writes.set(self.0.log_writes.get() + 1);
        }
        // SAFETY: `keep` lives in the future until the completion, or else in the slot
        // (`Operation::drop`); the slot outlives the operation.
        unsafe { self.push(entry.user_data(u64::from(slot))) };
        Operation { ring: self.clone(), slot, keep: Some(keep) }
    }

    /// Closes a descriptor without waiting, on a kernel worker: the last close of a removed file
    /// frees its blocks.
    pub fn close(&self, fd: RawFd) {
        let entry = opcode::Close::new(types::Fd(fd)).build().flags(squeue::Flags::ASYNC);
        // SAFETY: the entry points to no memory.
        unsafe { self.push(entry.user_data(UNATTENDED)) };
    }

    /// One turn: submits what is queued, runs the kernel's deferred work, wakes the futures of
    /// completed operations, and appends network completions. Never blocks; no system call when
    /// there is nothing to do. Returns how many completions there were.
    pub fn turn(&self, network: &mut Vec<Completion>) -> usize {
        let inner = &*self.0;
        inner.enter();
        inner.reap(network)
    }

    /// Whether entries wait for the next turn, the kernel has something for it, or someone asked
    /// for it. Reads shared memory only.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let mut io = self.0.io.borrow_mut();
        let (_, submission, completion) = io.split();
        let ready = submission.taskrun() || !completion.is_empty() || !submission.is_empty();
        ready || self.0.signal.is_pending()
    }

    /// Submits what is queued now, before the shard gives its core away.
    pub fn submit(&self) {
        if !self.0.io.borrow_mut().submission().is_empty() {
            self.0.enter();
        }
    }

    /// A handle that wakes this shard from any thread.
    #[must_use]
    pub fn waker(&self) -> RingWaker {
        RingWaker(Arc::clone(&self.0.signal))
    }

    /// Asks for another turn before the shard parks.
    pub fn wake(&self) {
        self.0.signal.wake();
    }

    pub(crate) fn signal(&self) -> &Arc<Signal> {
        &self.0.signal
    }

    /// Whether durable writes are in flight, so that each turn yields the core once.
    #[must_use]
    pub fn log_writes_in_flight(&self) -> bool {
        self.0.log_writes.get() > 0
    }

    /// Operations in flight on files, and entries in flight on sockets.
    #[must_use]
    pub fn in_flight(&self) -> (usize, usize) {
        (self.0.files_in_flight.get(), self.0.network_in_flight.get())
    }

    /// Keeps memory until no network entry is in flight any more, or for ever if the kernel
    /// does not let go.
    pub fn retain(&self, memory: Box<dyn Any>) {
        self.0.retained.borrow_mut().push(memory);
    }

    /// Lets the ring's completions write the eventfd, then looks once more for work.
    /// Returns whether the shard may sleep; [`Ring::disarm`] follows in any case.
    pub(crate) fn arm(&self) -> bool {
        self.0.io.borrow_mut().completion().enable_eventfd();
        self.0.signal.set_parked();
        fence(Ordering::SeqCst);
        !self.is_ready()
    }

    /// Ends what [`Ring::arm`] began.
    pub(crate) fn disarm(&self) {
        self.0.signal.clear_parked();
        self.0.io.borrow_mut().completion().disable_eventfd();
    }

    /// Sleeps until a completion, a wake-up from any thread, or `nanos` (1 ms at most), with one
    /// system call and without the executor: no background task may be runnable.
    pub(crate) fn wait(&self, nanos: u64) {
        let inner = &*self.0;
        if !inner.wake_polled.get() {
            let readable = u32::try_from(libc::POLLIN).expect("a small positive flag");
            let eventfd = types::Fd(inner.signal.ring_eventfd());
            let entry = opcode::PollAdd::new(eventfd, readable).build();
            inner.enqueue(entry.user_data(WAKE));
            inner.wake_polled.set(true);
        }
        inner.signal.set_waiting();
        fence(Ordering::SeqCst);
        if !inner.signal.is_pending() {
            let nanos = u32::try_from(nanos).unwrap_or(u32::MAX).min(WAIT_NANOS_MAX);
            let timeout = types::Timespec::new().nsec(nanos);
            let arguments = types::SubmitArgs::new().timespec(&timeout);
            // An error is a time-out, a signal, or what the next turn meets again.
            let _ = inner.io.borrow().submitter().submit_with_args(1, &arguments);
        }
        inner.signal.clear_waiting();
    }

    pub(crate) fn downgrade(&self) -> WeakRing {
        WeakRing(Rc::downgrade(&self.0))
    }

    /// A number for a group of provided buffers, and the system call that registers it.
    ///
    /// # Safety
    /// `entries` points to `count` entries of a buffer ring that stay valid until unregistered,
    /// as do the buffers that they will point to.
    pub(crate) unsafe fn register_buffers(&self, entries: u64, count: u16) -> io::Result<u16> {
        let group = self.0.groups.get();
        let io = self.0.io.borrow();
        // SAFETY: promised by the caller.
        unsafe { io.submitter().register_buf_ring_with_flags(entries, count, group, 0)? };
        self.0.groups.set(group + 1);
        Ok(group)
    }

    pub(crate) fn unregister_buffers(&self, group: u16) -> io::Result<()> {
        self.0.io.borrow().submitter().unregister_buf_ring(group)
    }

    /// Waits, blocking the thread, until every file operation has ended (10 s at most); then
    /// cancels the rest. For the end of a shard's thread only.
    pub fn drain(&self) {
        self.0.drain();
    }
}

impl Inner {
    fn enqueue(&self, entry: squeue::Entry) {
        if !self.backlog.borrow().is_empty() {
            self.backlog.borrow_mut().push_back(entry);
            return;
        }
        // SAFETY: callers of `Ring::push` promise that what the entry points to stays valid
        // until its completion.
        let push = || unsafe { self.io.borrow_mut().submission().push(&entry) };
        if push().is_err() {
            self.enter();
            if push().is_err() {
                self.backlog.borrow_mut().push_back(entry);
            }
        }
    }

    /// Submits and runs deferred work; a system call only when there is some.
    fn enter(&self) {
        let mut io = self.io.borrow_mut();
        let (submitter, mut submission, _) = io.split();
        let mut backlog = self.backlog.borrow_mut();
        while let Some(entry) = backlog.front() {
            // SAFETY: as in `enqueue`.
            if unsafe { submission.push(entry) }.is_err() {
                break;
            }
            backlog.pop_front();
        }
        submission.sync();
        let queued = u32::try_from(submission.len()).expect("the queue has at most 2^15 entries");
        if queued == 0 && !submission.taskrun() && !submission.cq_overflow() {
            return;
        }
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument structure is passed.
        let entered = unsafe { submitter.enter::<libc::sigset_t>(queued, 0, flags, None) };
        if let Err(error) = entered {
            // Short of memory or completions not yet drained: the next turn tries again.
            let transient = [libc::EINTR, libc::EAGAIN, libc::EBUSY, libc::ENOMEM];
            let errno = error.raw_os_error().unwrap_or(0);
            assert!(transient.contains(&errno), "io_uring_enter must not fail: {error}");
        }
    }

    fn reap(&self, network: &mut Vec<Completion>) -> usize {
        let mut settled = self.settled.take();
        let mut count = 0;
        {
            let mut io = self.io.borrow_mut();
            let mut slots = self.slots.borrow_mut();
            for cqe in io.completion() {
                count += 1;
                let (user_data, result, flags) = (cqe.user_data(), cqe.result(), cqe.flags());
                if user_data & NETWORK != 0 {
                    if !cqueue::more(flags) {
                        self.network_in_flight.set(self.network_in_flight.get() - 1);
                    }
                    network.push(Completion { user_data, result, flags });
                    continue;
                }
                if user_data == WAKE {
                    self.wake_polled.set(false);
                    self.signal.reset_ring_eventfd();
                    continue;
                }
                self.files_in_flight.set(self.files_in_flight.get() - 1);
                if user_data != UNATTENDED {
                    let index = u32::try_from(user_data).expect("slots are numbered in 32 bits");
                    settled.extend(self.settle(&mut slots, index, result));
                }
            }
        }
        // No borrow is held here: wakers and keepsakes may run any code.
        for done in settled.drain(..) {
            match done {
                Settled::Wake(waker) => waker.wake(),
                Settled::Abandoned(mut keep, result) => keep.abandoned(result),
            }
        }
        self.settled.set(settled);
        if self.network_in_flight.get() == 0 && !self.retained.borrow().is_empty() {
            drop(self.retained.take());
        }
        count
    }

    fn settle(&self, slots: &mut Slots, index: u32, result: i32) -> Option<Settled> {
        let (slot, weight) = &mut slots.slots[index as usize];
        if *weight == Weight::LogWrite {
            self.log_writes.set(self.log_writes.get() - 1);
        }
        match slot {
            Slot::Waiting(waker) => {
                let waker = waker.take();
                *slot = Slot::Done(result);
                waker.map(Settled::Wake)
            }
            Slot::Abandoned(_) => match slots.give_back(index) {
                Slot::Abandoned(keep) => Some(Settled::Abandoned(keep, result)),
                _ => None,
            },
            Slot::Free { .. } | Slot::Done(_) => {
                unreachable!("one completion an operation, and a slot per operation in flight")
            }
        }
    }

    fn drain(&self) {
        let mut network = Vec::new();
        let mut cancelled = false;
        for round in 0..2 * DRAIN_ROUNDS {
            self.enter();
            self.reap(&mut network);
            if !cancelled && (self.files_in_flight.get() == 0 || round >= DRAIN_ROUNDS) {
                cancelled = true;
                let all = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
                self.network_in_flight.set(self.network_in_flight.get() + 1);
                self.enqueue(all.user_data(NETWORK));
                continue;
            }
            if self.files_in_flight.get() + self.network_in_flight.get() == 0 {
                return;
            }
            let timeout = types::Timespec::new().nsec(100_000_000);
            let arguments = types::SubmitArgs::new().timespec(&timeout);
            // An error is a time-out or a signal; the loop is bounded either way.
            let _ = self.io.borrow().submitter().submit_with_args(1, &arguments);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.drain();
        if self.files_in_flight.get() + self.network_in_flight.get() > 0 {
            // The kernel did not let go within bounds: leak what it may still write to.
            std::mem::forget(self.retained.take());
            let none = Slots { slots: Vec::new(), free: NO_SLOT };
            std::mem::forget(self.slots.replace(none));
        }
    }
}

/// An operation in flight. Dropping it leaves the operation running to its end.
#[must_use = "the operation runs anyway, but its result is lost"]
pub struct Operation<K: KeepAlive> {
    ring: Ring,
    slot: u32,
    /// Taken when the result is given out.
    keep: Option<K>,
}

// Nothing in `Operation` is pinned: what the kernel points to is on the heap.
impl<K: KeepAlive> Unpin for Operation<K> {}

impl<K: KeepAlive> Future for Operation<K> {
    type Output = (i32, K);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<(i32, K)> {
        let index = self.slot;
        let result = {
            let mut slots = self.ring.0.slots.borrow_mut();
            match &mut slots.slots[index as usize].0 {
                Slot::Done(result) => {
                    let result = *result;
                    slots.give_back(index);
                    result
                }
                Slot::Waiting(waker) => {
                    match waker {
                        Some(known) => known.clone_from(context.waker()),
                        None => *waker = Some(context.waker().clone()),
                    }
                    return Poll::Pending;
                }
                _ => unreachable!("polled after it was ready"),
            }
        };
        let keep = self.keep.take().expect("given out once, with the result");
        Poll::Ready((result, keep))
    }
}

impl<K: KeepAlive> Drop for Operation<K> {
    fn drop(&mut self) {
        let Some(mut keep) = self.keep.take() else { return };
        let mut slots = self.ring.0.slots.borrow_mut();
        let slot = &mut slots.slots[self.slot as usize].0;
        if let Slot::Done(result) = *slot {
            slots.give_back(self.slot);
            drop(slots);
            keep.abandoned(result);
        } else {
            let waiting = std::mem::replace(slot, Slot::Abandoned(Box::new(keep)));
            drop(slots);
            drop(waiting);
        }
    }
}
