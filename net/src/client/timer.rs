//! The client's clock and its one timer thread: waits for back-off, ticks for deadlines.
//!
//! Invariant: the thread sleeps without waking while nothing waits for it, and ends when its
//! `Timer` is dropped. Futures of the client need no runtime because this thread wakes them.

#![expect(
    clippy::disallowed_types,
    reason = "client threads share state; shards never run this code"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use annulus_engine::model::Instant;
use futures_channel::oneshot;

/// How late a deadline may be noticed.
const TICK: Duration = Duration::from_millis(5);
/// Alarms ring at multiples of it, in nanoseconds: so the thread wakes once for many of them.
const ALARM_STEP: u64 = 1_000_000;

/// Monotonic time since the client began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: std::time::Instant,
}

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock { start: read_clock() }
    }

    pub(crate) fn now(&self) -> Instant {
        let nanos = read_clock().duration_since(self.start).as_nanos();
        Instant(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    pub(crate) fn after(&self, wait: Duration) -> Instant {
        self.now().after_nanos(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX))
    }
}

#[expect(clippy::disallowed_methods, reason = "the client is a driver: here it reads the clock")]
fn read_clock() -> std::time::Instant {
    std::time::Instant::now()
}

/// Something with deadlines.
pub(crate) trait Ticked: Send + Sync {
    /// Handles what is due. Whether anything still waits.
    fn tick(&self, now: Instant) -> bool;
}

/// Handle of the timer thread.
#[derive(Clone)]
pub(crate) struct Timer {
    shared: Arc<Shared>,
    pub(crate) clock: Clock,
    /// The last handle stops the thread.
    _stop: Arc<Stop>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waits: BTreeMap<(Instant, u64), oneshot::Sender<()>>,
    next: u64,
    ticked: Vec<Weak<dyn Ticked>>,
    /// The thread ticks; otherwise it sleeps until told.
    ticking: bool,
    /// It begins to tick then by itself.
    tick_at: Option<Instant>,
    stop: bool,
}

struct Stop(Arc<Shared>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Timer {
    pub(crate) fn start() -> std::io::Result<Timer> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let clock = Clock::start();
        let thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("annulus-timer".to_owned())
            .spawn(move || run(&thread, clock))?;
        Ok(Timer { _stop: Arc::new(Stop(Arc::clone(&shared))), shared, clock })
    }

    /// Completes when the time has come (or the timer is gone).
    pub(crate) fn wait_until(&self, when: Instant) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.lock();
        let key = (when, state.next);
        state.next += 1;
        state.waits.insert(key, sender);
        if state.waits.keys().next() == Some(&key) {
            self.shared.changed.notify_all();
        }
        receiver
    }

    /// Completes soon after the time has come: cheaper than [`Timer::wait_until`] for waits that
    /// mostly end before.
    pub(crate) fn alarm(&self, when: Instant) -> oneshot::Receiver<()> {
        self.wait_until(Instant(when.0.div_ceil(ALARM_STEP).saturating_mul(ALARM_STEP)))
    }

    /// Makes sure that the thread ticks at that time.
    pub(crate) fn tick_at(&self, when: Instant) {
        let mut state = self.shared.lock();
        if state.tick_at.is_none_or(|at| when < at) {
            state.tick_at = Some(when);
            self.shared.changed.notify_all();
        }
    }

    /// Ticks this from now on, while it wants to.
    pub(crate) fn register(&self, ticked: Weak<dyn Ticked>) {
        self.shared.lock().ticked.push(ticked);
    }

    /// Makes sure that the thread ticks.
    pub(crate) fn wake(&self) {
        let mut state = self.shared.lock();
        if !state.ticking {
            state.ticking = true;
            self.shared.changed.notify_all();
        }
    }
}

fn run(shared: &Shared, clock: Clock) {
    let mut state = shared.lock();
    while !state.stop {
        let now = clock.now();
        while let Some(entry) = state.waits.first_entry()
            && entry.key().0 <= now
        {
            // Nobody may be waiting any more.
            let _ = entry.remove().send(());
        }
        if state.tick_at.is_some_and(|at| at <= now) {
            state.tick_at = None;
            state.ticking = true;
        }
        if state.ticking {
            let ticked: Vec<_> = state.ticked.iter().filter_map(Weak::upgrade).collect();
            state.ticked.retain(|weak| weak.strong_count() > 0);
            state.ticking = false;
            drop(state);
            // Whoever starts to wait during this sets `ticking` again.
            let mut waiting = false;
            for ticked in &ticked {
                waiting |= ticked.tick(now);
            }
            drop(ticked);
            state = shared.lock();
            state.ticking |= waiting;
        }
        let next_wait = state.waits.keys().next().map(|&(when, _)| when);
        let next = next_wait.into_iter().chain(state.tick_at).min();
        let until_next = next.map(|when| Duration::from_nanos(when.nanos_since(clock.now())));
        let wait = if state.ticking {
            Some(until_next.map_or(TICK, |wait| wait.min(TICK)))
        } else {
            until_next
        };
        state = match wait {
            _ if state.stop => state,
            Some(wait) => {
                shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
            }
            None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::block_on;

    #[test]
    fn waits_end_in_the_order_of_their_times() {
        let timer = Timer::start().unwrap();
        let late = timer.wait_until(timer.clock.after(Duration::from_millis(20)));
        let soon = timer.wait_until(timer.clock.after(Duration::from_millis(1)));
        let start = timer.clock.now();
        block_on(soon).unwrap();
        block_on(late).unwrap();
        assert!(timer.clock.now().nanos_since(start) >= 18_000_000);
    }

    #[test]
    fn it_begins_to_tick_at_the_time_asked_for_and_alarms_are_never_early() {
        struct Tell(Mutex<Option<oneshot::Sender<Instant>>>);
        impl Ticked for Tell {
            fn tick(&self, now: Instant) -> bool {
                // Ticked once more by nothing.
                let _ = self.0.lock().unwrap().take().map(|tell| tell.send(now));
                false
            }
        }
        let timer = Timer::start().unwrap();
        let (tell, told) = oneshot::channel();
        let tell = Arc::new(Tell(Mutex::new(Some(tell))));
        let weak = Arc::downgrade(&tell);
        timer.register(weak);
        let when = timer.clock.after(Duration::from_millis(3));
        timer.tick_at(timer.clock.after(Duration::from_secs(3600)));
        timer.tick_at(when);
        assert!(block_on(told).unwrap() >= when);
        let when = timer.clock.after(Duration::from_micros(1_300));
        block_on(timer.alarm(when)).unwrap();
        assert!(timer.clock.now() >= when);
    }

    #[test]
    fn what_waits_when_the_timer_goes_is_released() {
        let timer = Timer::start().unwrap();
        let wait = timer.wait_until(timer.clock.after(Duration::from_secs(3600)));
        drop(timer);
        assert!(block_on(wait).is_err());
    }
}
