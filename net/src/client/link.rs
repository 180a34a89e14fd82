//! One connection of the client: a socket, a reader thread, a writer thread, and the
//! [`ClientConnection`] between them.
//!
//! Invariant: every request that was sent ends: by its reply, by its deadline, or by the loss of
//! the connection. One thread at a time writes to the socket (`flushing`), in the order in which
//! the frames were made. Dropping the link closes the socket, which ends both threads.
//!
//! Requests that the server's window does not take wait here ([`Waiters`]): a server that is asked
//! for too much closes its windows, so this is where the queue is.

#![expect(
    clippy::disallowed_types,
    reason = "client threads share state; shards never run this code"
)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use annulus_engine::model::Instant;
use futures_channel::oneshot;

use super::timer::{Clock, Ticked, Timer};
use super::types::Error;
use crate::client_connection::{ClientConnection, Event, Unsent};
use crate::wire::hello::{Hello, Welcome};
use crate::wire::request::Outgoing;
use crate::wire::response::Route;
use crate::wire::status::Status;

const READ_BUFFER_SIZE: usize = 64 << 10;
/// Frames gathered for one write to the socket, in bytes.
const WRITE_SIZE: usize = 128 << 10;
/// Most that a calling thread writes itself, in bytes.
const CALLER_SIZE_MAX: usize = 64 << 10;

/// An answer that owns its bytes.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) body: Vec<u8>,
}

/// How a request ended.
pub(crate) type Outcome = Result<Answer, Ended>;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The deadline passed.
    TimedOut,
    /// The connection was lost.
    Lost,
}

/// Who writes to the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    /// The calling thread: saves a change of thread, may block for a moment.
    Caller,
    /// The writer thread: never blocks the caller.
    Writer,
}

/// Newer rows of the partition map, as they come.
pub(crate) type OnRoute = Box<dyn Fn(Route) + Send + Sync>;

/// One connection.
pub(crate) struct Link {
    shared: Arc<Shared>,
    timer: Timer,
    /// What the server said of itself.
    pub(crate) welcome: Arc<Welcome>,
}

struct Shared {
    socket: TcpStream,
    state: Mutex<State>,
    /// Told when there is something for the writer thread.
    work: Condvar,
    on_route: OnRoute,
}

struct State {
    connection: ClientConnection,
    out: Vec<u8>,
    /// Swapped with `out` at each write, so that neither is allocated anew.
    spare: Vec<u8>,
    answers: BTreeMap<u32, oneshot::Sender<Outcome>>,
    waiting: Waiters,
    /// Somebody writes to the socket, and will go on until `out` is empty.
    flushing: bool,
    /// The writer thread has been asked to be that somebody.
    writer_asked: bool,
    lost: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection: every request is answered as lost.
    fn lose(&self) {
        let mut state = self.lock();
        state.lost = true;
        let answers = std::mem::take(&mut state.answers);
        state.waiting.0.clear();
        drop(state);
        for sender in answers.into_values() {
            let _ = sender.send(Err(Ended::Lost));
        }
        // May be closed already.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.work.notify_all();
    }

    /// Writes until nothing is left. The caller has set `flushing`.
    fn flush(&self) {
        loop {
            let mut state = self.lock();
            let State { connection, out, .. } = &mut *state;
            connection.fill_output(out, WRITE_SIZE);
            if state.out.is_empty() || state.lost {
                state.flushing = false;
                return;
            }
            let mut bytes = std::mem::take(&mut state.spare);
            std::mem::swap(&mut bytes, &mut state.out);
            drop(state);
            let written = (&self.socket).write_all(&bytes);
            bytes.clear();
            bytes.shrink_to(2 * WRITE_SIZE);
            self.lock().spare = bytes;
            if written.is_err() {
                self.lose();
            }
        }
    }
}

/// Senders that wait for room in the window, oldest first.
///
/// They are served in order until the oldest has waited for half of its time. From then on there
/// are more than can be served, and the newest go first: whoever has waited so long would hardly be
/// answered in time, and everybody behind him neither (Maurer, "Fail at Scale", 2015).
#[derive(Default)]
struct Waiters(VecDeque<Waiter>);

struct Waiter {
    since: Instant,
    deadline: Instant,
    wake: oneshot::Sender<()>,
}

impl Waiters {
    /// Wakes one that still waits. Whether there was one.
    fn wake_one(&mut self, now: Instant) -> bool {
        loop {
            // Those whose time is over wait no more.
            while self.0.pop_front_if(|oldest| oldest.wake.is_canceled()).is_some() {}
            let Some(oldest) = self.0.front() else { return false };
            let newest_first = now.nanos_since(oldest.since) > oldest.deadline.nanos_since(now);
            let next = if newest_first { self.0.pop_back() } else { self.0.pop_front() };
            if next.is_some_and(|next| next.wake.send(()).is_ok()) {
                return true;
            }
        }
    }
}

impl State {
    /// Lets as many waiting senders try as there is room for.
    fn wake_waiting(&mut self, now: Instant) {
        for _ in 0..self.connection.room() {
            if !self.waiting.wake_one(now) {
                return;
            }
        }
    }
}

impl Ticked for Shared {
    fn tick(&self, now: Instant) -> bool {
        let mut guard = self.lock();
        let State { connection, answers, .. } = &mut *guard;
        let mut late = Vec::new();
        let outcome = connection.handle_timeout(now, &mut |event| {
            if let Event::TimedOut { id } = event {
                late.extend(answers.remove(&id));
            }
        });
        guard.wake_waiting(now);
        let waits = guard.connection.waiting() > 0 || !guard.waiting.0.is_empty();
        drop(guard);
        for sender in late {
            let _ = sender.send(Err(Ended::TimedOut));
        }
        if outcome.is_err() {
            self.lose();
        }
        waits
    }
}

impl Link {
    /// Connects, says HELLO, and waits for the welcome. Blocks: call it on a thread of its own.
    pub(crate) fn connect(
        address: &str,
        hello: &Hello<'_>,
        timeout: Duration,
        timer: &Timer,
        on_route: OnRoute,
    ) -> Result<Link, Error> {
        let deadline = timer.clock.after(timeout);
        let unreachable = |what: &dyn std::fmt::Display| Error::Unreachable {
            what: format!("{address}: {what}"),
        };
        let socket = connect_socket(address, timeout).map_err(|error| unreachable(&error))?;
        let mut out = Vec::new();
        let mut connection = ClientConnection::new(hello, deadline, &mut out);
        (&socket).write_all(&out).map_err(|error| unreachable(&error))?;
        out.clear();
        let mut buffer = vec![0; READ_BUFFER_SIZE];
        let mut welcome = None;
        while welcome.is_none() {
            let left = Duration::from_nanos(deadline.nanos_since(timer.clock.now()));
            if left.is_zero() {
                return Err(unreachable(&"no answer to HELLO in time"));
            }
            let read = socket
                .set_read_timeout(Some(left))
                .and_then(|()| (&socket).read(&mut buffer))
                .map_err(|error| unreachable(&error))?;
            if read == 0 {
                return Err(unreachable(&"the server closed the connection"));
            }
            connection
                .receive(&buffer[..read], &mut |event| {
                    if let Event::Welcome(found) = event {
                        welcome = Some(Arc::new(found));
                    }
                })
                .map_err(|lost| unreachable(&lost))?;
        }
        let welcome = welcome.ok_or_else(|| unreachable(&"no welcome"))?;
        socket.set_read_timeout(None).map_err(|error| unreachable(&error))?;
        let shared = Arc::new(Shared {
            socket,
            state: Mutex::new(State {
                connection,
                out,
                spare: Vec::new(),
                answers: BTreeMap::new(),
                waiting: Waiters::default(),
                flushing: false,
                writer_asked: false,
                lost: false,
            }),
            work: Condvar::new(),
            on_route,
        });
        let weak = Arc::downgrade(&shared);
        timer.register(weak);
        let reader = Arc::clone(&shared);
        let clock = timer.clock;
        let writer = Arc::clone(&shared);
        spawn("annulus-read", move || read_loop(&reader, clock, buffer))
            .and_then(|()| spawn("annulus-write", move || write_loop(&writer)))
            .map_err(|error| {
                shared.lose();
                unreachable(&error)
            })?;
        Ok(Link { shared, timer: timer.clone(), welcome })
    }

    /// Sends a request. The outcome comes through the receiver.
    ///
    /// # Errors
    /// [`Unsent`]: nothing was sent.
    pub(crate) fn send(
        &self,
        deadline: Instant,
        route: u8,
        request: &Outgoing<'_>,
        flush: Flush,
    ) -> Result<oneshot::Receiver<Outcome>, Unsent> {
        let now = self.timer.clock.now();
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        if state.lost {
            return Err(Unsent::Closing);
        }
        let first = state.answers.is_empty();
        let id = state.connection.send(now, deadline, route, request, &mut state.out)?;
        let (sender, receiver) = oneshot::channel();
        state.answers.insert(id, sender);
        // What is long could block the caller, past its deadline if the server takes nothing.
        let is_short = state.out.len() + state.connection.queued_bytes() <= CALLER_SIZE_MAX;
        let flush_here = !state.flushing && flush == Flush::Caller && is_short;
        if !state.flushing {
            state.flushing = true;
            if !flush_here {
                state.writer_asked = true;
                self.shared.work.notify_one();
            }
        }
        drop(guard);
        if first {
            self.timer.wake();
        }
        if flush_here {
            self.shared.flush();
        }
        Ok(receiver)
    }

    /// Completes when there may be room in the window for a request with this deadline.
    pub(crate) fn wait_for_room(&self, deadline: Instant) -> oneshot::Receiver<()> {
        let since = self.timer.clock.now();
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.lock();
        if state.connection.room() > 0 && state.answers.is_empty() {
            // Nothing is on its way that would wake it.
            let _ = sender.send(());
        } else {
            state.waiting.0.push_back(Waiter { since, deadline, wake: sender });
        }
        receiver
    }

    /// Ends the connection: what was sent on it ends as lost.
    pub(crate) fn end(&self) {
        self.shared.lose();
    }

    /// Whether requests can still be sent.
    pub(crate) fn is_usable(&self) -> bool {
        let state = self.shared.lock();
        !state.lost && !state.connection.is_closing()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.lose();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

fn connect_socket(address: &str, timeout: Duration) -> std::io::Result<TcpStream> {
    let mut last = None;
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                socket.set_write_timeout(Some(Duration::from_secs(10)))?;
                return Ok(socket);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other("the name has no address")))
}

fn read_loop(shared: &Shared, clock: Clock, mut buffer: Vec<u8>) {
    let mut done = Vec::new();
    let mut routes = Vec::new();
    loop {
        let read = match (&shared.socket).read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let mut guard = shared.lock();
        let State { connection, answers, .. } = &mut *guard;
        let outcome = connection.receive(&buffer[..read], &mut |event| match event {
            Event::Reply(reply) => {
                if let Some(sender) = answers.remove(&reply.id) {
                    let answer = Answer { status: reply.status, body: reply.body.to_vec() };
                    done.push((sender, answer));
                }
            }
            Event::Route(route) => routes.push(route),
            Event::Welcome(_) | Event::TimedOut { .. } | Event::Goodbye { .. } => {}
        });
        if !guard.waiting.0.is_empty() {
            guard.wake_waiting(clock.now());
        }
        let finished = guard.lost || (guard.connection.is_closing() && guard.answers.is_empty());
        drop(guard);
        // Outside the lock, because a woken task may come straight back with its next request.
        for (sender, answer) in done.drain(..) {
            let _ = sender.send(Ok(answer));
        }
        routes.drain(..).for_each(&shared.on_route);
        if outcome.is_err() || finished {
            break;
        }
    }
    shared.lose();
}

fn write_loop(shared: &Shared) {
    loop {
        let mut state = shared.lock();
        while !state.writer_asked && !state.lost {
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.lost {
            return;
        }
        state.writer_asked = false;
        drop(state);
        shared.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// One that came at `since` and has 100 ms.
    fn wait(waiters: &mut Waiters, since: u64) -> oneshot::Receiver<()> {
        let (wake, woken) = oneshot::channel();
        let deadline = Instant((since + 100) * MS);
        waiters.0.push_back(Waiter { since: Instant(since * MS), deadline, wake });
        woken
    }

    fn is_woken(woken: &mut oneshot::Receiver<()>) -> bool {
        matches!(woken.try_recv(), Ok(Some(())))
    }

    #[test]
    fn those_that_wait_go_in_order_until_the_oldest_has_waited_for_half_of_its_time() {
        let mut waiters = Waiters::default();
        let mut all: Vec<_> = (0..5).map(|at| wait(&mut waiters, at)).collect();
        assert!(waiters.wake_one(Instant(40 * MS)) && is_woken(&mut all[0]));
        assert!(waiters.wake_one(Instant(60 * MS)) && is_woken(&mut all[4]), "the newest");
        assert!(waiters.wake_one(Instant(60 * MS)) && is_woken(&mut all[3]));
        // The two that are left give up, and one comes.
        all.clear();
        let mut last = wait(&mut waiters, 110);
        assert!(waiters.wake_one(Instant(110 * MS)) && is_woken(&mut last));
        assert!(!waiters.wake_one(Instant(111 * MS)));
    }
}
