//! The loop of a shard: turn, spin a little, park.
//!
//! Invariant: each round submits and reaps with at most one system call, and whatever anybody
//! queued, woke or sent before the shard parks is seen before it sleeps (`signal.rs`). An idle
//! shard sleeps in the kernel until a completion, a message, or its first timer.
//!
//! Where the microseconds go, as measured: parking and waking costs a lone request 65 us, so the
//! shard spins first, but only as long as spinning has lately paid. While the disk is busy with
//! durable writes or many reads it sleeps in its own ring instead, with one system call: a lone
//! durable put then takes as long as with spinning at half the CPU (70 us instead of 130), and
//! neighbours disturb it less. A lone read takes 45 us with spinning and 68 us without. A log
//! write in flight needs the core once a turn, so a turn that leads to the next at once yields it.

use std::future::{Future, poll_fn};
use std::hint;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use glommio::io::BufferedFile;
use glommio::timer::Timer;

use super::executor::ShardRuntime;
use super::ring::{Completion, Ring};
use super::signal::Signal;
use crate::error::{Error, Result};
use crate::model::Instant;
use crate::runtime::Runtime;

/// What a turn of the shard's own code did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There was work; there may be more at once.
    Busy,
    /// Nothing to do until a completion, a wake-up, or a timer.
    Idle,
    /// As `Idle`, and the next turn is wanted at that time at the latest.
    IdleUntil(Instant),
    /// The shard is done.
    Stop,
}

/// How the loop shares its core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Longest spin before parking, in microseconds. 50 by default; 0 on hosts that share their
    /// cores. It shrinks by itself to nothing while spinning does not pay.
    pub spin_us: u64,
    /// Longest time between two turns of the executor's other tasks, in microseconds.
    pub slice_us: u64,
}

impl Default for HostOptions {
    fn default() -> HostOptions {
        HostOptions { spin_us: 50, slice_us: 200 }
    }
}

/// Operations on files from which on the shard does not spin: each sleep brings several on.
const SLEEP_OPERATIONS_MIN: usize = 8;
/// Slices after which a shard that waits for the disk looks at the executor's other tasks.
const IDLE_SLICES: u64 = 10;

/// Runs a shard until its turn says stop. Each round reaps completions, fires timers, polls the
/// foreground tasks, calls `turn` with the time and the network's completions, and polls the
/// foreground tasks again for what the turn woke; the next round submits what all of them queued.
///
/// # Errors
/// `Io` when the shard's eventfd cannot be had.
pub async fn host(
    ring: &Ring,
    runtime: &ShardRuntime,
    options: HostOptions,
    mut turn: impl FnMut(Instant, &[Completion]) -> Turn,
) -> Result<()> {
    let mut completions = Vec::with_capacity(1024);
    let mut parking = Parking::new(ring)?;
    let mut spin = Spin::new(options.spin_us * 1000);
    let slice = options.slice_us * 1000;
    let executor = glommio::executor();
    let mut slice_start = runtime.now();
    loop {
        ring.signal().clear();
        completions.clear();
        let mut busy = ring.turn(&mut completions) > 0;
        let now = runtime.now();
        busy |= runtime.fire(now);
        busy |= runtime.poll_foreground();
        match turn(now, &completions) {
            Turn::Busy => busy = true,
            Turn::Idle => runtime.set_next_turn(None),
            Turn::IdleUntil(at) => runtime.set_next_turn(Some(at)),
            Turn::Stop => break,
        }
        busy |= runtime.poll_foreground();
        if busy || ring.is_ready() {
            if ring.log_writes_in_flight() {
                yield_core();
            }
            if now.nanos_since(slice_start) > slice {
                ring.submit();
                executor.yield_task_queue_now().await;
                slice_start = runtime.now();
            }
            continue;
        }
        // Idle time belongs to background tasks first. They wake the shard after the step in
        // which work for it came.
        if runtime.take_background_woken() {
            if parking.park(ring, runtime).await {
                slice_start = runtime.now();
            }
        } else if ring.log_writes_in_flight() || ring.in_flight().0 >= SLEEP_OPERATIONS_MIN {
            // A spinning shard would keep the core from the kernel's own part of a durable write,
            // and when much is in flight the sleep is short. A lone read is awaited spinning.
            let now = runtime.now();
            if now.nanos_since(slice_start) > IDLE_SLICES * slice {
                // Should a background task be runnable all the same.
                executor.yield_task_queue_now().await;
                slice_start = now;
            } else {
                ring.wait(runtime.next_wake_up().map_or(u64::MAX, |at| at.nanos_since(now)));
            }
        } else if spin_until_ready(ring, runtime, spin.budget()) {
            spin.hit();
        } else {
            let before = runtime.now();
            if parking.park(ring, runtime).await {
                slice_start = runtime.now();
                spin.parked(slice_start.nanos_since(before));
            }
        }
    }
    runtime.set_next_turn(None);
    ring.submit();
    Ok(())
}

/// Runs `future` to its end with the ring turning, where no [`host`] loop runs: at start, at the
/// end, in tools and tests. Network completions are dropped, so no sockets may be open on this
/// ring.
///
/// # Errors
/// As [`host`].
pub async fn drive<T>(
    ring: &Ring,
    runtime: &ShardRuntime,
    future: impl Future<Output = T>,
) -> Result<T> {
    let mut future = std::pin::pin!(future);
    let mut output = None;
    let mut context = Context::from_waker(runtime.waker());
    host(ring, runtime, HostOptions::default(), |_, _| match future.as_mut().poll(&mut context) {
        Poll::Ready(value) => {
            output = Some(value);
            Turn::Stop
        }
        Poll::Pending => Turn::Idle,
    })
    .await?;
    Ok(output.expect("the loop stops when the future is ready"))
}

/// Gives the core to whoever waits for it, once.
fn yield_core() {
    // SAFETY: no arguments, no memory.
    unsafe { libc::sched_yield() };
}

/// Spins on shared memory for at most `budget` nanoseconds. Returns whether work came.
fn spin_until_ready(ring: &Ring, runtime: &ShardRuntime, budget: u64) -> bool {
    if budget == 0 {
        return false;
    }
    let mut end = runtime.now().after_nanos(budget);
    let wake_up = runtime.next_wake_up();
    if let Some(at) = wake_up {
        end = end.min(at);
    }
    loop {
        for _ in 0..8 {
            if ring.is_ready() {
                return true;
            }
            hint::spin_loop();
        }
        if runtime.now() >= end {
            return wake_up.is_some_and(|at| at <= end);
        }
    }
}

/// How long to spin: as long as allowed while that pays, halved at each miss, down to nothing.
#[derive(Clone, Copy, Debug)]
struct Spin {
    full: u64,
    budget: u64,
}

/// A budget below this is not worth a clock reading.
const SPIN_NS_MIN: u64 = 2_000;

impl Spin {
    fn new(full: u64) -> Spin {
        Spin { full, budget: full }
    }

    fn budget(&self) -> u64 {
        self.budget
    }

    fn hit(&mut self) {
        self.budget = self.full;
    }

    /// The shard slept for `slept` nanoseconds, of which waking up took its part.
    fn parked(&mut self, slept: u64) {
        self.budget = match () {
            () if slept <= self.full * 2 => self.full,
            () if self.budget / 2 < SPIN_NS_MIN => 0,
            () => self.budget / 2,
        };
    }
}

type EventfdRead = Pin<Box<dyn Future<Output = ()>>>;

/// Sleeps inside glommio. The read of the eventfd outlives a parking that a timer or a local
/// waker ended, so that none is ever cancelled and no wake-up is swallowed by a dead read.
struct Parking {
    eventfd: Rc<BufferedFile>,
    read: Option<EventfdRead>,
    /// Woken when the read has ended.
    ended: Arc<ReadEnded>,
    timer: Option<(Instant, Timer)>,
}

/// Notes that the read of the eventfd can go on, and wakes the shard if it is parked. The read is
/// polled for that alone: glommio keeps a waker for each poll until the read ends, and counts a
/// task's wakers in 15 bits, which an idle shard's sleeps would exhaust within the hour.
struct ReadEnded {
    signal: Arc<Signal>,
    noted: AtomicBool,
}

impl Wake for ReadEnded {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.noted.store(true, Ordering::Relaxed);
        self.signal.wake_host();
    }
}

/// Disarms the ring also when the host's future is dropped while parked.
struct Armed<'a>(&'a Ring);

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.0.disarm();
    }
}

impl Parking {
    fn new(ring: &Ring) -> Result<Parking> {
        let duplicate = ring
            .signal()
            .duplicate()
            .map_err(|source| Error::io("duplicate", "eventfd", source))?;
        // SAFETY: the descriptor is ours alone, and the file takes it over.
        let eventfd = unsafe { BufferedFile::from_raw_fd(duplicate.into_raw_fd()) };
        let signal = Arc::clone(ring.signal());
        let ended = Arc::new(ReadEnded { signal, noted: AtomicBool::new(false) });
        Ok(Parking { eventfd: Rc::new(eventfd), read: None, ended, timer: None })
    }

    /// Returns whether it slept, and others may have run; else there was work at once.
    async fn park(&mut self, ring: &Ring, runtime: &ShardRuntime) -> bool {
        let armed = Armed(ring);
        if !armed.0.arm() {
            return false;
        }
        self.set_timer(runtime);
        poll_fn(|context| {
            ring.signal().register(context.waker());
            if ring.signal().is_pending() || self.poll_timer(context) || self.poll_read() {
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
        true
    }

    fn set_timer(&mut self, runtime: &ShardRuntime) {
        let next = runtime.next_wake_up();
        if self.timer.as_ref().map(|(at, _)| *at) != next {
            self.timer = next.map(|at| {
                let wait = Duration::from_nanos(at.nanos_since(runtime.now()));
                (at, Timer::new(wait))
            });
        }
    }

    fn poll_timer(&mut self, context: &mut Context<'_>) -> bool {
        let Some((_, timer)) = &mut self.timer else { return false };
        let due = Pin::new(timer).poll(context).is_ready();
        if due {
            self.timer = None;
        }
        due
    }

    fn poll_read(&mut self) -> bool {
        let is_new = self.read.is_none();
        if !is_new && !self.ended.noted.swap(false, Ordering::Relaxed) {
            return false;
        }
        let read = self.read.get_or_insert_with(|| {
            let eventfd = Rc::clone(&self.eventfd);
            Box::pin(async move {
                if let Err(error) = eventfd.read_at(0, size_of::<u64>()).await {
                    panic!("an eventfd can always be read: {error}");
                }
            })
        });
        let waker = Waker::from(Arc::clone(&self.ended));
        let woken = read.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        if woken {
            self.read = None;
        }
        woken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_that_does_not_pay_fades_to_nothing() {
        let mut spin = Spin::new(50_000);
        for _ in 0..6 {
            spin.parked(10_000_000);
        }
        assert_eq!(spin.budget(), 0);
    }

    #[test]
    fn a_short_sleep_brings_the_whole_spin_back() {
        let mut spin = Spin { full: 50_000, budget: 0 };
        spin.parked(80_000);
        assert_eq!(spin.budget(), 50_000);
    }

    #[test]
    fn a_spin_of_zero_stays_zero() {
        let mut spin = Spin::new(0);
        spin.parked(1);
        spin.hit();
        assert_eq!(spin.budget(), 0);
    }
}
