//! [`Runtime`] of a production shard: its clock, its timers, and its two kinds of tasks.
//!
//! Invariant: foreground tasks are polled only inside the shard's turn, so that what they queue
//! goes out with the turn's one system call; background tasks run in a glommio queue with few
//! shares, between turns and in all time that the shard does not need. Timers of both fire in
//! the turn; a parked shard sleeps no longer than the first of them. On the path: the log writer
//! and point reads are foreground tasks.
//!
//! A parked shard beside a busy background task would wait for glommio to look at its own ring,
//! which it does when no task can run. So each step of a background task ends with a look at
//! what the parked shard waits for, which bounds the wait by one step.
//!
//! glommio's preemption timer is off (`PREEMPTION`): the shard's loop and every background task
//! give way by their own clocks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::task::AtomicWaker;
use glommio::{Latency, LocalExecutorBuilder, Placement, Shares, TaskQueueHandle};

use super::ring::{Ring, RingConfig};
use super::signal::Signal;
use super::{files, refusal};
use crate::error::{Error, Result};
use crate::model::timestamp::EPOCH_UNIX_MICROS;
use crate::model::{Instant, WallMicros};
use crate::runtime::{Class, Runtime};

/// Shares of the shard's own loop and of its background tasks in the executor.
const HOST_SHARES: usize = 1000;
const BACKGROUND_SHARES: usize = 100;
/// Not in this process's life. glommio 0.9 takes a preemption timer that fires before it has run
/// its first task for "no task can run", and then sleeps with tasks that can: a thread that loses
/// its core between the two, as on a busy host, would not wake for requests, timers or a stop.
const PREEMPTION: Duration = Duration::from_secs(1 << 30);
/// glommio's own registered buffers: unused, so as small as it allows, to spare locked memory.
const GLOMMIO_IO_MEMORY: usize = 64 << 10;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Runtime of one shard. Clones share it.
#[derive(Clone)]
pub struct ShardRuntime(Rc<Inner>);

struct Inner {
    signal: Arc<Signal>,
    woken: Arc<ForegroundWaker>,
    waker: Waker,
    foreground: RefCell<FuturesUnordered<Task>>,
    /// Started since the last poll, perhaps by a foreground task that is being polled now.
    started: RefCell<Vec<Task>>,
    polling_foreground: Cell<bool>,
    timers: RefCell<Timers>,
    next_turn: Cell<Option<Instant>>,
    background: TaskQueueHandle,
    background_woken: Arc<AtomicBool>,
    ring: Ring,
    seed: u64,
}

/// Wakes one background task, and notes that there is one to run.
#[derive(Debug)]
struct BackgroundWaker {
    woken: Arc<AtomicBool>,
    task: AtomicWaker,
}

impl Wake for BackgroundWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Relaxed);
        self.task.wake();
    }
}

/// Wakes the set of foreground tasks: notes it, and makes the shard take a turn.
#[derive(Debug)]
struct ForegroundWaker {
    signal: Arc<Signal>,
    woken: AtomicBool,
}

impl Wake for ForegroundWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Released to, and acquired by, the swap in `poll_foreground`.
        self.woken.store(true, Ordering::Release);
        self.signal.wake();
    }
}

#[derive(Default)]
struct Timers {
    queue: BTreeMap<(Instant, u64), Waker>,
    next: u64,
}

impl ShardRuntime {
    /// The runtime of the calling thread, which must be inside a glommio executor.
    #[must_use]
    pub fn new(ring: &Ring, seed: u64) -> ShardRuntime {
        let signal = Arc::clone(ring.signal());
        let woken =
            Arc::new(ForegroundWaker { signal: Arc::clone(&signal), woken: AtomicBool::new(true) });
        let background = glommio::executor().create_task_queue(
            Shares::Static(BACKGROUND_SHARES),
            Latency::NotImportant,
            "background",
        );
        ShardRuntime(Rc::new(Inner {
            signal,
            waker: Waker::from(Arc::clone(&woken)),
            woken,
            foreground: RefCell::default(),
            started: RefCell::default(),
            polling_foreground: Cell::new(false),
            timers: RefCell::default(),
            next_turn: Cell::new(None),
            background,
            background_woken: Arc::default(),
            ring: ring.clone(),
            seed,
        }))
    }

    /// Polls the foreground tasks that were woken. Returns whether there were any.
    pub fn poll_foreground(&self) -> bool {
        let inner = &*self.0;
        if !inner.woken.woken.load(Ordering::Relaxed) && inner.started.borrow().is_empty() {
            return false;
        }
        inner.woken.woken.swap(false, Ordering::Acquire);
        inner.polling_foreground.set(true);
        let mut tasks = inner.foreground.borrow_mut();
        let mut context = Context::from_waker(&inner.waker);
        loop {
            tasks.extend(inner.started.borrow_mut().drain(..));
            while let Poll::Ready(Some(())) = tasks.poll_next_unpin(&mut context) {}
            if inner.started.borrow().is_empty() {
                break;
            }
        }
        inner.polling_foreground.set(false);
        true
    }

    /// Wakes every timer that is due. Returns whether there were any.
    pub(crate) fn fire(&self, now: Instant) -> bool {
        let mut any = false;
        loop {
            let mut timers = self.0.timers.borrow_mut();
            let Some(first) = timers.queue.first_entry().filter(|first| first.key().0 <= now)
            else {
                return any;
            };
            let waker = first.remove();
            drop(timers);
            waker.wake();
            any = true;
        }
    }

    /// When the next timer is due, or the next turn is wanted.
    pub(crate) fn next_wake_up(&self) -> Option<Instant> {
        let timer = self.0.timers.borrow().queue.first_key_value().map(|(&(at, _), _)| at);
        match (timer, self.0.next_turn.get()) {
            (Some(timer), Some(turn)) => Some(timer.min(turn)),
            (timer, turn) => timer.or(turn),
        }
    }

    /// When the shard's own code wants its next turn at the latest.
    pub(crate) fn set_next_turn(&self, at: Option<Instant>) {
        self.0.next_turn.set(at);
    }

    /// A waker that makes the shard take another turn, also when it is parked: for futures that
    /// the turn itself polls.
    #[must_use]
    pub fn waker(&self) -> &Waker {
        &self.0.waker
    }

    /// Whether a background task was woken since the last call, so that the core is better
    /// given to it than spent on spinning.
    pub(crate) fn take_background_woken(&self) -> bool {
        let woken = &self.0.background_woken;
        woken.load(Ordering::Relaxed) && woken.swap(false, Ordering::Relaxed)
    }

    /// After a step of a background task: if the shard is parked and something waits for it,
    /// wakes it and lets its queue go first.
    fn give_way(&self) {
        let inner = &*self.0;
        if !inner.signal.is_parked() {
            return;
        }
        let due = self.next_wake_up().is_some_and(|at| at <= self.now());
        if due || inner.ring.is_ready() {
            inner.signal.wake_here();
            let executor = glommio::executor();
            // Polled once for its effect, the mark on the running queue; its wake-up is not
            // wanted, for the task may be waiting for something else.
            let mut context = Context::from_waker(Waker::noop());
            let _ = std::pin::pin!(executor.yield_task_queue_now()).poll(&mut context);
        }
    }

    /// Drops the foreground tasks that are left, and with them what they hold. For the end of a
    /// shard's thread.
    pub fn shut_down(&self) {
        let started = self.0.started.take();
        let foreground = self.0.foreground.take();
        drop((started, foreground));
    }
}

impl Runtime for ShardRuntime {
    fn now(&self) -> Instant {
        Instant(clock(libc::CLOCK_MONOTONIC))
    }

    fn wall(&self) -> WallMicros {
        WallMicros((clock(libc::CLOCK_REALTIME) / 1000).saturating_sub(EPOCH_UNIX_MICROS))
    }

    fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()> + 'static {
        Sleep { runtime: self.clone(), deadline, key: None }
    }

    fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        let runtime = self.clone();
        async move {
            if runtime.0.polling_foreground.get() {
                YieldOnce(false).await;
            } else {
                // The whole queue gives way, so that the shard's loop gets its turn.
                glommio::executor().yield_task_queue_now().await;
            }
        }
    }

    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) {
        match class {
            Class::Foreground => {
                self.0.started.borrow_mut().push(Box::pin(task));
                self.0.signal.wake();
            }
            Class::Background => {
                let waker = Arc::new(BackgroundWaker {
                    woken: Arc::clone(&self.0.background_woken),
                    task: AtomicWaker::new(),
                });
                let task_waker = Waker::from(Arc::clone(&waker));
                let mut task = Box::pin(task);
                let runtime = self.clone();
                self.0.background_woken.store(true, Ordering::Relaxed);
                let stepped = poll_fn(move |context| {
                    waker.task.register(context.waker());
                    let polled = task.as_mut().poll(&mut Context::from_waker(&task_waker));
                    runtime.give_way();
                    polled
                });
                glommio::spawn_local_into(stepped, self.0.background)
                    .expect("the queue lives as long as the runtime")
                    .detach();
            }
        }
    }

    fn seed(&self) -> u64 {
        self.0.seed
    }
}

/// Nanoseconds on one of the system's clocks.
fn clock(which: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a writable timespec that outlives the call. Both clocks always exist.
    unsafe { libc::clock_gettime(which, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

struct YieldOnce(bool);

impl Future for YieldOnce {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

struct Sleep {
    runtime: ShardRuntime,
    deadline: Instant,
    key: Option<(Instant, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let runtime = self.runtime.clone();
        if runtime.now() >= self.deadline {
            return Poll::Ready(());
        }
        let key = self.key.unwrap_or_else(|| {
            let mut timers = runtime.0.timers.borrow_mut();
            timers.next += 1;
            (self.deadline, timers.next)
        });
        self.key = Some(key);
        runtime.0.timers.borrow_mut().queue.insert(key, context.waker().clone());
        // A parked shard must learn of a timer that may be before the one it sleeps for.
        runtime.0.signal.wake_if_parked();
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let waker = self.runtime.0.timers.borrow_mut().queue.remove(&key);
            drop(waker);
        }
    }
}

/// Where a shard's thread runs.
#[derive(Clone, Debug, Default)]
pub struct ThreadOptions {
    /// Core to pin it to; `None` leaves it to the kernel.
    pub core: Option<usize>,
    /// Name of the thread.
    pub name: String,
    /// Sizes of the shard's ring.
    pub ring: RingConfig,
    /// Seed of [`Runtime::seed`].
    pub seed: u64,
}

/// Starts a thread with an executor, a ring and a runtime, and runs `main` in it to its end.
/// `main` opens its shard under [`super::drive`] and then serves under [`super::host()`].
///
/// # Errors
/// `Io` when the thread cannot start; the join handle gives `Io` when the system refuses a ring,
/// with the rule that refused and how to allow it.
pub fn start_shard<F, G, T>(
    options: ThreadOptions,
    main: G,
) -> Result<thread::JoinHandle<std::result::Result<T, String>>>
where
    G: FnOnce(Ring, ShardRuntime) -> F + Send + 'static,
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    thread::Builder::new()
        .name(options.name.clone())
        .spawn(move || run(&options, main).map_err(|error| error.to_string()))
        .map_err(|source| Error::io("start a thread", "shard", source))
}

fn run<F, G, T>(options: &ThreadOptions, main: G) -> Result<T>
where
    G: FnOnce(Ring, ShardRuntime) -> F + 'static,
    F: Future<Output = T> + 'static,
    T: 'static,
{
    // Made first: its refusal explains itself, and glommio's would be the same.
    let ring = Ring::new(options.ring)?;
    let placement = options.core.map_or(Placement::Unbound, Placement::Fixed);
    let executor = LocalExecutorBuilder::new(placement)
        .name(&options.name)
        .io_memory(GLOMMIO_IO_MEMORY)
        .preempt_timer(PREEMPTION)
        .make()
        .map_err(|error| refused(&error))?;
    executor.run(async move {
        let queue = glommio::executor().create_task_queue(
            Shares::Static(HOST_SHARES),
            Latency::NotImportant,
            "shard",
        );
        let runtime = ShardRuntime::new(&ring, options.seed);
        let kept = (ring.clone(), runtime.clone());
        let output = glommio::spawn_local_into(async move { main(ring, runtime).await }, queue)
            .expect("the queue was just made")
            .await;
        let (ring, runtime) = kept;
        runtime.shut_down();
        ring.drain();
        Ok(output)
    })
}

/// glommio wraps the kernel's refusal; its text says which ring.
fn refused<T>(error: &glommio::GlommioError<T>) -> Error {
    let text = error.to_string();
    let memory = text.contains("memlock").then_some(libc::ENOMEM);
    match memory.or(error.raw_os_error()) {
        Some(errno) => refusal::error(&std::io::Error::from_raw_os_error(errno)),
        None => Error::io("start an executor", files::HERE, std::io::Error::other(text)),
    }
}
