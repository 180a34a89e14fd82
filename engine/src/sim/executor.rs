//! `SimExecutor`: one thread, virtual time, and a seeded choice of which ready task runs next.
//!
//! Invariant: time moves only here: a little with each poll (so a loop that yields until a
//! deadline ends), and in one jump to the next timer when every task waits. So a simulated hour
//! costs what its work costs, and the same seed gives the same order of polls.
//!
//! Wakers are flags that the loop scans: a shard has tens of tasks, and a flag needs no lock.
//!
//! Tasks belong to groups, one for each simulated shard of a cluster. A group has a wall clock of
//! its own, can be paused, and dies alone; one alone is group 0, of [`SimExecutor::runtime`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use super::Chance;
use crate::model::{Instant, WallMicros};
use crate::runtime::{Class, Runtime};

/// Wall time at which every simulation begins: a year after the epoch, in microseconds.
const WALL_START_US: u64 = 365 * 86_400 * 1_000_000;
/// Virtual time after which a run that has not ended is given up: an hour, in nanoseconds.
const RUN_NANOS_MAX: u64 = 3_600 * 1_000_000_000;
/// Looks at the clock within one poll after which the task is said to spin: time stands still
/// while it does not yield.
const LOOKS_PER_POLL_MAX: u64 = 100_000;
/// Polls after which a run that has not ended is given up.
const RUN_POLLS_MAX: u64 = 10_000_000;

/// What [`SimExecutor::step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It polled a task of this group.
    Polled(u32),
    /// Every task waits; the earliest timer, if there is one.
    Idle(Option<Instant>),
    /// A task of this group called [`SimRuntime::halt`]: its power was cut. Nothing was polled.
    Halted(u32),
}

/// Why [`SimExecutor::try_run`] stopped before its future was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Somebody called [`SimRuntime::halt`]: the power was cut.
    Halted,
    /// Nothing is ready and no timer is set: all wait for what never comes.
    Deadlock,
    /// An hour of virtual time passed, or ten million polls.
    TimeLimit,
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Flag {
    fn new() -> Arc<Flag> {
        Arc::new(Flag(AtomicBool::new(true)))
    }
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct Task {
    id: u64,
    group: u32,
    flag: Arc<Flag>,
    /// `None` while it is being polled, so that nothing is borrowed meanwhile.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

/// A group of tasks.
#[derive(Clone, Copy, Default)]
struct Group {
    /// Added to the wall clock, in microseconds; tests make it jump.
    wall_offset: i64,
    /// None of its tasks is polled; its timers fire, and are seen when it goes on.
    paused: bool,
}

struct Shared {
    chance: RefCell<Chance>,
    now: Cell<Instant>,
    /// By number; those never mentioned are not there.
    groups: RefCell<Vec<Group>>,
    tasks: RefCell<Vec<Task>>,
    next_id: Cell<u64>,
    /// By deadline, then by order of registration.
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    halted: Cell<Option<u32>>,
    polls: Cell<u64>,
    /// Looks at the clock since the last poll began.
    looks: Cell<u64>,
}

/// The executor. Owns the tasks; dropping it drops them, as a kill does.
pub struct SimExecutor {
    runtime: SimRuntime,
}

/// A cheap handle of a [`SimExecutor`]: the simulated `Runtime` of one group.
#[derive(Clone)]
pub struct SimRuntime {
    shared: Rc<Shared>,
    group: u32,
}

impl SimExecutor {
    /// An executor whose every choice follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> SimExecutor {
        let shared = Shared {
            chance: RefCell::new(Chance::new(seed ^ 0x5EED_0F5E_C070_0001)),
            now: Cell::new(Instant(1_000_000)),
            groups: RefCell::default(),
            tasks: RefCell::new(Vec::new()),
            next_id: Cell::new(0),
            timers: RefCell::new(BTreeMap::new()),
            halted: Cell::new(None),
            polls: Cell::new(0),
            looks: Cell::new(0),
        };
        SimExecutor { runtime: SimRuntime { shared: Rc::new(shared), group: 0 } }
    }

    /// The handle that the code under test takes as its `Runtime`.
    #[must_use]
    pub fn runtime(&self) -> SimRuntime {
        self.runtime.clone()
    }

    /// The handle of a group: what it spawns belongs to the group.
    #[must_use]
    pub fn runtime_of(&self, group: u32) -> SimRuntime {
        SimRuntime { shared: Rc::clone(&self.runtime.shared), group }
    }

    /// Polls one ready task, for a loop that has more to drive than tasks. Time does not jump:
    /// see [`SimExecutor::advance_to`].
    pub fn step(&self) -> Step {
        let shared = &self.runtime.shared;
        if let Some(group) = self.take_halted() {
            return Step::Halted(group);
        }
        match shared.choose(false) {
            Choice::Task(index) => Step::Polled(shared.poll_task(index)),
            Choice::Main | Choice::Nothing => {
                Step::Idle(shared.timers.borrow().keys().next().map(|(deadline, _)| *deadline))
            }
        }
    }

    /// Lets a moment pass, as before each poll: for what a loop does between two steps.
    pub fn pass_a_moment(&self) {
        self.runtime.shared.pass_a_moment();
    }

    /// Moves the clocks to `then`, unless they are past it, and fires what falls due.
    pub fn advance_to(&self, then: Instant) {
        let shared = &self.runtime.shared;
        shared.set_now(shared.now.get().max(then));
    }

    /// Stops polling the group's tasks, as SIGSTOP does, or goes on.
    pub fn set_paused(&self, group: u32, paused: bool) {
        self.runtime.shared.with_group(group, |group| group.paused = paused);
    }

    /// Drops every task of the group, as the death of its process does, and ends its pause.
    pub fn kill_group(&self, group: u32) {
        let shared = &self.runtime.shared;
        self.set_paused(group, false);
        // A task's drop may spawn or wake others: they are taken out before they are dropped.
        loop {
            let tasks = std::mem::take(&mut *shared.tasks.borrow_mut());
            let (dying, living): (Vec<Task>, Vec<Task>) =
                tasks.into_iter().partition(|task| task.group == group);
            *shared.tasks.borrow_mut() = living;
            if dying.is_empty() {
                break;
            }
            drop(dying);
        }
        if shared.halted.get() == Some(group) {
            shared.halted.set(None);
        }
    }

    /// Drives `future` to its end, and all spawned tasks beside it.
    ///
    /// # Panics
    /// When it cannot end; see [`Stopped`].
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        match self.try_run(future) {
            Ok(value) => value,
            Err(stopped) => panic!("the simulation stopped: {stopped:?}"),
        }
    }

    /// Drives `future` to its end, and all spawned tasks beside it.
    ///
    /// # Errors
    /// [`Stopped`] when it cannot end. The future is dropped; the tasks are kept.
    pub fn try_run<T>(&self, future: impl Future<Output = T>) -> Result<T, Stopped> {
        let shared = &self.runtime.shared;
        let mut future = pin!(future);
        let flag = Flag::new();
        let waker = Waker::from(flag.clone());
        let give_up = shared.now.get().after_nanos(RUN_NANOS_MAX);
        let polls_max = shared.polls.get() + RUN_POLLS_MAX;
        loop {
            if shared.halted.get().is_some() {
                return Err(Stopped::Halted);
            }
            if shared.now.get() > give_up || shared.polls.get() > polls_max {
                return Err(Stopped::TimeLimit);
            }
            match shared.choose(flag.is_set()) {
                Choice::Main => {
                    flag.take();
                    shared.pass_a_moment();
                    if let Poll::Ready(value) =
                        future.as_mut().poll(&mut Context::from_waker(&waker))
                    {
                        return Ok(value);
                    }
                }
                Choice::Task(index) => {
                    shared.poll_task(index);
                }
                Choice::Nothing => {
                    if !shared.jump_to_next_timer() {
                        return Err(Stopped::Deadlock);
                    }
                }
            }
        }
    }

    /// Lets the tasks run for this much virtual time.
    pub fn run_for_nanos(&self, nanos: u64) {
        let deadline = self.runtime.now().after_nanos(nanos);
        self.run(self.runtime.sleep_until(deadline));
    }

    /// The group whose power was cut since the last step, which is then no longer told.
    pub fn take_halted(&self) -> Option<u32> {
        self.runtime.shared.halted.take()
    }

    /// Drops every task, as the death of the process does, and forgets a halt.
    pub fn kill_tasks(&self) {
        let shared = &self.runtime.shared;
        // A task's drop may spawn or wake others: take them out before dropping.
        loop {
            let tasks = std::mem::take(&mut *shared.tasks.borrow_mut());
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        shared.halted.set(None);
    }

    /// Number of tasks that have not ended.
    #[must_use]
    pub fn task_count(&self) -> usize {
        self.runtime.shared.tasks.borrow().len()
    }

    /// Number of polls so far: equal in two runs of one seed.
    #[must_use]
    pub fn polls(&self) -> u64 {
        self.runtime.shared.polls.get()
    }
}

impl Drop for SimExecutor {
    fn drop(&mut self) {
        // Tasks hold handles of the executor: without this the ring of references would leak.
        self.kill_tasks();
    }
}

enum Choice {
    Main,
    Task(usize),
    Nothing,
}

impl Shared {
    /// One of the ready tasks, each as likely as the others; the main future is one of them.
    fn choose(&self, main_ready: bool) -> Choice {
        let tasks = self.tasks.borrow();
        let groups = self.groups.borrow();
        let runs = |group: u32| !group_of(group, &groups).is_some_and(|group| group.paused);
        let is_ready = |task: &&Task| task.flag.is_set() && runs(task.group);
        let ready = tasks.iter().filter(is_ready).count();
        let candidates = ready + usize::from(main_ready);
        if candidates == 0 {
            return Choice::Nothing;
        }
        let chosen = self.chance.borrow_mut().index(candidates);
        if chosen == ready {
            return Choice::Main;
        }
        let mut ready_indices =
            tasks.iter().enumerate().filter(|(_, task)| is_ready(task)).map(|(index, _)| index);
        Choice::Task(ready_indices.nth(chosen).expect("chosen is below the count of ready tasks"))
    }

    /// Polls the task at this index; its group.
    fn poll_task(&self, index: usize) -> u32 {
        let (id, group, flag, mut future) = {
            let mut tasks = self.tasks.borrow_mut();
            let task = &mut tasks[index];
            let future = task.future.take().expect("a task is polled by one loop only");
            (task.id, task.group, task.flag.clone(), future)
        };
        flag.take();
        self.pass_a_moment();
        let waker = Waker::from(flag);
        let ended = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let finished = {
            let mut tasks = self.tasks.borrow_mut();
            // Tasks are only appended while one is polled, unless the poll killed them all.
            match tasks.iter().position(|task| task.id == id) {
                Some(index) if ended => {
                    tasks.swap_remove(index);
                    Some(future)
                }
                Some(index) => {
                    tasks[index].future = Some(future);
                    None
                }
                None => Some(future),
            }
        };
        // Dropped with nothing borrowed: its drop may spawn or wake.
        drop(finished);
        group
    }

    fn with_group<T>(&self, number: u32, change: impl FnOnce(&mut Group) -> T) -> T {
        let index = usize::try_from(number).expect("a few groups");
        let mut groups = self.groups.borrow_mut();
        if groups.len() <= index {
            groups.resize(index + 1, Group::default());
        }
        change(&mut groups[index])
    }

    fn pass_a_moment(&self) {
        self.polls.set(self.polls.get() + 1);
        self.looks.set(0);
        let nanos = self.chance.borrow_mut().between(20, 400);
        self.set_now(self.now.get().after_nanos(nanos));
    }

    fn jump_to_next_timer(&self) -> bool {
        let next = self.timers.borrow().keys().next().map(|(deadline, _)| *deadline);
        match next {
            Some(deadline) => {
                self.set_now(self.now.get().max(deadline));
                true
            }
            None => false,
        }
    }

    fn set_now(&self, now: Instant) {
        self.now.set(now);
        loop {
            let mut timers = self.timers.borrow_mut();
            match timers.first_entry() {
                Some(first) if first.key().0 <= now => {
                    let waker = first.remove();
                    drop(timers);
                    waker.wake();
                }
                _ => break,
            }
        }
    }

    fn new_id(&self) -> u64 {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        id
    }
}

/// The group with this number, if it was ever mentioned.
fn group_of(number: u32, groups: &[Group]) -> Option<&Group> {
    groups.get(usize::try_from(number).expect("a few groups"))
}

impl SimRuntime {
    /// Moves the group's wall clock by this many microseconds against the monotonic clock.
    pub fn jump_wall(&self, micros: i64) {
        self.shared.with_group(self.group, |group| {
            group.wall_offset = group.wall_offset.saturating_add(micros);
        });
    }

    /// Sets how far the group's wall clock is from true time, in microseconds.
    pub fn set_wall_offset(&self, micros: i64) {
        self.shared.with_group(self.group, |group| group.wall_offset = micros);
    }

    /// True wall time, which no group knows.
    #[must_use]
    pub fn true_wall(&self) -> WallMicros {
        WallMicros(WALL_START_US + self.shared.now.get().0 / 1000)
    }

    /// Moves both clocks forward, firing what falls due.
    pub fn advance_nanos(&self, nanos: u64) {
        self.shared.set_now(self.shared.now.get().after_nanos(nanos));
    }

    /// Stops the run that is going on, as a power cut does; see [`SimExecutor::kill_tasks`].
    pub fn halt(&self) {
        self.shared.halted.set(Some(self.group));
    }
}

impl Runtime for SimRuntime {
    fn now(&self) -> Instant {
        let looks = self.shared.looks.get() + 1;
        self.shared.looks.set(looks);
        assert!(looks < LOOKS_PER_POLL_MAX, "a task spins and does not yield");
        self.shared.now.get()
    }

    fn wall(&self) -> WallMicros {
        let groups = self.shared.groups.borrow();
        let offset = group_of(self.group, &groups).map_or(0, |group| group.wall_offset);
        WallMicros(self.true_wall().0.saturating_add_signed(offset))
    }

    fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()> + 'static {
        Sleep { shared: self.shared.clone(), deadline, registered: None }
    }

    fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        let mut yielded = false;
        std::future::poll_fn(move |context| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    fn spawn(&self, _class: Class, task: impl Future<Output = ()> + 'static) {
        let id = self.shared.new_id();
        let future: Pin<Box<dyn Future<Output = ()>>> = Box::pin(task);
        let task = Task { id, group: self.group, flag: Flag::new(), future: Some(future) };
        self.shared.tasks.borrow_mut().push(task);
    }

    fn seed(&self) -> u64 {
        self.shared.chance.borrow_mut().next_u64()
    }
}

struct Sleep {
    shared: Rc<Shared>,
    deadline: Instant,
    registered: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.shared.now.get() >= self.deadline {
            return Poll::Ready(());
        }
        let id = match self.registered {
            Some(id) => id,
            None => self.shared.new_id(),
        };
        self.registered = Some(id);
        let key = (self.deadline, id);
        self.shared.timers.borrow_mut().insert(key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.registered {
            self.shared.timers.borrow_mut().remove(&(self.deadline, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(seed: u64) -> (Vec<u64>, u64) {
        let executor = SimExecutor::new(seed);
        let runtime = executor.runtime();
        let order = Rc::new(RefCell::new(Vec::new()));
        for id in 0..10u64 {
            let (handle, order) = (runtime.clone(), order.clone());
            runtime.spawn(Class::Background, async move {
                for step in 0..5 {
                    handle.yield_now().await;
                    order.borrow_mut().push(id * 10 + step);
                    handle.sleep_until(handle.now().after_nanos(id * 1000)).await;
                }
            });
        }
        executor.run_for_nanos(1_000_000_000);
        assert_eq!(executor.task_count(), 0);
        (order.take(), runtime.now().0)
    }

    #[test]
    fn the_same_seed_gives_the_same_history() {
        assert_eq!(history(1), history(1));
        assert_ne!(history(1).0, history(2).0);
    }

    #[test]
    fn time_jumps_when_all_wait_and_timers_fire_in_order() {
        let executor = SimExecutor::new(3);
        let runtime = executor.runtime();
        let start = runtime.wall();
        let handle = runtime.clone();
        executor.run(async move {
            handle.sleep_until(handle.now().after_nanos(60_000_000_000)).await;
        });
        let elapsed = runtime.wall().0 - start.0;
        assert!((60_000_000..60_001_000).contains(&elapsed), "{elapsed}");
        assert!(executor.polls() < 10);
    }

    #[test]
    fn a_loop_that_yields_until_a_deadline_ends() {
        let executor = SimExecutor::new(3);
        let handle = executor.runtime();
        executor.run(async move {
            let deadline = handle.now().after_nanos(50_000);
            while handle.now() < deadline {
                handle.yield_now().await;
            }
        });
    }

    #[test]
    fn waiting_for_nothing_is_a_deadlock_and_a_halt_stops_the_run() {
        let executor = SimExecutor::new(3);
        assert_eq!(executor.try_run(std::future::pending::<()>()), Err(Stopped::Deadlock));
        let runtime = executor.runtime();
        let handle = runtime.clone();
        runtime.spawn(Class::Foreground, async move { handle.halt() });
        assert_eq!(executor.try_run(std::future::pending::<()>()), Err(Stopped::Halted));
        executor.kill_tasks();
        executor.run(async {});
    }

    #[test]
    #[should_panic(expected = "a task spins")]
    fn a_loop_that_waits_for_the_clock_without_yielding_is_found() {
        let executor = SimExecutor::new(3);
        let handle = executor.runtime();
        executor.run(async move {
            let deadline = handle.now().after_nanos(50_000);
            while handle.now() < deadline {}
        });
    }

    #[test]
    fn the_wall_clock_may_jump_back() {
        let executor = SimExecutor::new(3);
        let runtime = executor.runtime();
        let (wall, now) = (runtime.wall(), runtime.now());
        runtime.jump_wall(-5_000_000);
        assert_eq!(runtime.wall().0, wall.0 - 5_000_000);
        assert_eq!(runtime.now(), now);
    }

    #[test]
    fn groups_have_their_own_clocks_pauses_and_deaths() {
        let executor = SimExecutor::new(3);
        let polls = Rc::new(RefCell::new([0; 3]));
        for group in 0..3u32 {
            let (runtime, polls) = (executor.runtime_of(group), polls.clone());
            runtime.set_wall_offset(i64::from(group) * 1_000);
            assert_eq!(runtime.wall().0, runtime.true_wall().0 + u64::from(group) * 1_000);
            let handle = runtime.clone();
            runtime.spawn(Class::Background, async move {
                loop {
                    polls.borrow_mut()[group as usize] += 1;
                    handle.sleep_until(handle.now().after_nanos(1_000_000)).await;
                }
            });
        }
        let run = |millis: u64| {
            polls.take();
            let end = executor.runtime().now().after_nanos(millis * 1_000_000);
            while executor.runtime().now() < end {
                match executor.step() {
                    Step::Polled(_) => {}
                    Step::Idle(next) => executor.advance_to(next.unwrap_or(end).min(end)),
                    Step::Halted(group) => panic!("group {group} halted"),
                }
            }
            polls.take().map(|count| count > 0)
        };
        assert_eq!(run(10), [true, true, true]);
        executor.set_paused(1, true);
        assert_eq!(run(10), [true, false, true]);
        executor.set_paused(1, false);
        executor.kill_group(2);
        assert_eq!(run(10), [true, true, false]);
        assert_eq!(executor.task_count(), 2);
        executor.runtime_of(1).halt();
        assert_eq!(executor.step(), Step::Halted(1));
    }
}
