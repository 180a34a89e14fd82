//! The load loop: many connections, one thread, closed or open.
//!
//! Closed loop: each connection keeps `depth` requests outstanding. Open loop: requests are due at
//! fixed times whatever the server does, and latency counts from the due time, so a stall is
//! charged to every request it delayed (no coordinated omission).
//!
//! Invariant: every request that was sent is counted exactly once, as done, refused, perhaps
//! applied, or failed.

use std::collections::VecDeque;
use std::io::{self, Read, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use crate::keys::{Chance, Distribution, KeyChooser, write_key};
use crate::report::{Kind, Report};
use crate::target::{Reply, Target, Write};
use crate::verify::{Book, VALUE_SIZE_MIN, fill_value};

/// What to send. Fractions add up to at most 1; the rest are plain writes.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Fraction of reads.
    pub reads: f64,
    /// Fraction of scans.
    pub scans: f64,
    /// Fraction of writes of new keys.
    pub inserts: f64,
    /// Fraction of read-then-write pairs.
    pub read_modify_writes: f64,
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so long.
    Elapsed(Duration),
    /// After so many requests.
    Sent(u64),
}

/// One run.
#[derive(Clone, Debug)]
pub struct Load {
    /// Servers; connections are spread over them.
    pub addresses: Vec<SocketAddr>,
    /// What to send.
    pub mix: Mix,
    /// Which keys.
    pub distribution: Distribution,
    /// How many keys exist when the run begins.
    pub keys: u64,
    /// Bytes of a key.
    pub key_size: usize,
    /// Bytes of a value, from and to, both included.
    pub value_size: (usize, usize),
    /// Connections.
    pub connections: usize,
    /// Requests outstanding a connection.
    pub depth: usize,
    /// Open loop: requests a second.
    pub rate: Option<f64>,
    /// When to stop.
    pub until: Until,
    /// Write each key once, in order, instead of drawing (a preload).
    pub sequential: bool,
    /// Never sleep while waiting for replies.
    pub spin: bool,
    /// Chance.
    pub seed: u64,
}

/// Longest wait for replies after the last request, before they count as failed.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    kind: Kind,
    id: u64,
    /// Read: the least version allowed. Write: the version written.
    version: u32,
    intended: Instant,
    /// The write half of a read-modify-write follows the reply.
    write_after: bool,
}

struct Connection<T> {
    stream: TcpStream,
    target: T,
    out: Vec<u8>,
    out_sent: usize,
    slots: Vec<Option<Outstanding>>,
    free: Vec<u32>,
    /// Waiting for writability.
    blocked: bool,
}

/// Drives the run and records into `report`; with a book, checks every value.
///
/// # Errors
/// Connecting, a broken stream, or a protocol error ends the run.
pub fn run<T: Target>(
    load: &Load,
    mut connect: impl FnMut() -> T,
    report: &mut Report,
    mut book: Option<&mut Book>,
) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let mut connections = Vec::with_capacity(load.connections);
    for index in 0..load.connections {
        let address = load.addresses[index % load.addresses.len()];
        let stream = std::net::TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        let interest = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut stream, Token(index), interest)?;
        let mut connection = Connection {
            stream,
            target: connect(),
            out: Vec::new(),
            out_sent: 0,
            slots: vec![None; load.depth],
            free: (0..u32::try_from(load.depth).expect("a depth fits 32 bits")).rev().collect(),
            blocked: false,
        };
        connection.target.start(&mut connection.out);
        connection.flush()?;
        connections.push(connection);
    }
    let mut input = vec![0; 256 << 10];
    let begin = now();
    while connections.iter().any(|connection| !connection.target.ready()) {
        if begin.elapsed() > DRAIN {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the server did not greet"));
        }
        poll.poll(&mut events, Some(Duration::from_millis(50)))?;
        for connection in &mut connections {
            connection.receive(&mut input, &mut |_, _, _, _| {})?;
            connection.flush()?;
        }
    }
    let mut source = Source::new(load);
    report.begin(now());
    let mut ready: VecDeque<usize> = (0..connections.len()).collect();
    let mut follow: Vec<(usize, u64)> = Vec::new();
    loop {
        let time = now();
        // Fill whatever may be sent now.
        while let Some(&index) = ready.front() {
            let connection = &mut connections[index];
            let Some(intended) = source.due(time) else { break };
            if connection.free.is_empty() {
                ready.pop_front();
                continue;
            }
            source.send(connection, intended, &mut book);
            if load.rate.is_some() {
                // Spread an open loop's requests over the connections.
                ready.rotate_left(1);
            } else if connection.free.is_empty() {
                ready.pop_front();
            }
        }
        for connection in &mut connections {
            connection.flush()?;
        }
        let outstanding = connections.iter().any(|c| c.free.len() < load.depth);
        if source.finished(now()) && !outstanding && follow.is_empty() {
            break;
        }
        if source.ended_at.is_some_and(|end| end.elapsed() > DRAIN) {
            for slot in connections.iter_mut().flat_map(|c| &mut c.slots).filter_map(Option::take) {
                report.unsuccessful(slot.kind, &Reply::MayBeApplied("no reply in 10 s".to_owned()));
            }
            break;
        }
        let wait = if load.spin {
            Duration::ZERO
        } else {
            source.wait(now()).unwrap_or(Duration::from_millis(100))
        };
        match poll.poll(&mut events, Some(wait)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        }
        for event in &events {
            let index = event.token().0;
            let connection = &mut connections[index];
            if event.is_writable() {
                connection.blocked = false;
            }
            let had_free = !connection.free.is_empty();
            let time = now();
            connection.receive(&mut input, &mut |slot: Outstanding, reply, _, _| {
                source.finish(&slot, &reply, time, report, &mut book);
                if slot.write_after {
                    follow.push((index, slot.id));
                }
            })?;
            for (index, id) in follow.drain(..) {
                if book.as_ref().is_some_and(|book| book.is_writing(id)) {
                    continue;
                }
                source.send_write(&mut connections[index], id, time, Kind::Write, &mut book);
            }
            if !had_free && !connections[index].free.is_empty() {
                ready.push_back(index);
            }
        }
    }
    report.end(now());
    Ok(())
}

/// The one place where the generator reads the clock.
#[expect(clippy::disallowed_methods, reason = "a load generator measures time; it is no shard")]
fn now() -> Instant {
    Instant::now()
}

impl<T: Target> Connection<T> {
    fn flush(&mut self) -> io::Result<()> {
        while !self.blocked && self.out_sent < self.out.len() {
            match self.stream.write(&self.out[self.out_sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => self.out_sent += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.blocked = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.out_sent == self.out.len() {
            self.out.clear();
            self.out_sent = 0;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        input: &mut [u8],
        done: &mut dyn FnMut(Outstanding, Reply<'_>, &mut Vec<u8>, u32),
    ) -> io::Result<()> {
        loop {
            let size = match self.stream.read(input) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the server closed a connection",
                    ));
                }
                Ok(size) => size,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let (slots, free) = (&mut self.slots, &mut self.free);
            let mut unused = Vec::new();
            let mut finish = |id: u32, reply: Reply<'_>| {
                let slot = slots.get_mut(id as usize).and_then(Option::take);
                if let Some(slot) = slot {
                    free.push(id);
                    done(slot, reply, &mut unused, id);
                }
            };
            self.target
                .receive(&input[..size], &mut self.out, &mut finish)
                .map_err(|what| io::Error::new(io::ErrorKind::InvalidData, what))?;
            if size < input.len() {
                return Ok(());
            }
        }
    }
}

/// Decides what is sent next, and when.
struct Source<'a> {
    load: &'a Load,
    chance: Chance,
    chooser: KeyChooser,
    newest: u64,
    sent: u64,
    begin: Instant,
    ended_at: Option<Instant>,
    key: Vec<u8>,
    value: Vec<u8>,
    filler: Vec<u8>,
}

impl<'a> Source<'a> {
    fn new(load: &'a Load) -> Source<'a> {
        let mut chance = Chance::new(load.seed);
        let filler = (0..(load.value_size.1 + 65_536) / 8)
            .flat_map(|_| chance.next().to_le_bytes())
            .collect();
        Source {
            load,
            chooser: KeyChooser::new(load.distribution, load.keys),
            chance,
            newest: load.keys,
            sent: 0,
            begin: now(),
            ended_at: None,
            key: Vec::new(),
            value: Vec::new(),
            filler,
        }
    }

    fn finished(&mut self, time: Instant) -> bool {
        let over = match self.load.until {
            Until::Elapsed(limit) => time - self.begin >= limit,
            Until::Sent(limit) => self.sent >= limit,
        };
        if over {
            self.ended_at.get_or_insert(time);
        }
        over
    }

    /// The intended time of the next request, if it is due.
    fn due(&mut self, time: Instant) -> Option<Instant> {
        if self.finished(time) {
            return None;
        }
        let Some(rate) = self.load.rate else { return Some(time) };
        let due = self.begin + Duration::from_secs_f64(self.sent as f64 / rate);
        (due <= time).then_some(due)
    }

    /// How long until the next request is due; `None` when only replies can make one.
    fn wait(&mut self, time: Instant) -> Option<Duration> {
        let rate = self.load.rate?;
        if self.finished(time) {
            return None;
        }
        let due = self.begin + Duration::from_secs_f64(self.sent as f64 / rate);
        Some(due.saturating_duration_since(time))
    }

    fn send<T: Target>(
        &mut self,
        connection: &mut Connection<T>,
        intended: Instant,
        book: &mut Option<&mut Book>,
    ) {
        let mix = self.load.mix;
        let draw = if self.load.sequential { 1.0 } else { self.chance.unit() };
        let inserts_from = mix.reads + mix.scans;
        let pairs_from = inserts_from + mix.inserts;
        self.sent += 1;
        if draw < mix.reads {
            let id = self.chooser.next(self.newest, &mut self.chance);
            self.send_read(connection, id, intended, false, book);
        } else if draw < inserts_from {
            let id = self.chooser.next(self.newest, &mut self.chance);
            let count = 1 + u32::try_from(self.chance.below(100)).expect("below 100");
            write_key(id, self.load.key_size, &mut self.key);
            let slot =
                Outstanding { kind: Kind::Scan, id, version: 0, intended, write_after: false };
            let request = connection.take(slot);
            if !connection.target.scan(request, &self.key, count, &mut connection.out) {
                connection.target.get(request, &self.key, &mut connection.out);
            }
        } else if draw < pairs_from {
            let id = self.newest;
            self.newest += 1;
            self.send_write(connection, id, intended, Kind::Write, book);
        } else if draw < pairs_from + mix.read_modify_writes {
            let id = self.unwritten(book);
            self.send_read(connection, id, intended, true, book);
        } else {
            let id = if self.load.sequential {
                (self.sent - 1) % self.load.keys
            } else {
                self.unwritten(book)
            };
            self.send_write(connection, id, intended, Kind::Write, book);
        }
    }

    /// A key that has no write on its way, as far as the book knows.
    fn unwritten(&mut self, book: &Option<&mut Book>) -> u64 {
        let mut id = self.chooser.next(self.newest, &mut self.chance);
        while book.as_ref().is_some_and(|book| book.is_writing(id)) {
            id = self.chance.below(self.newest);
        }
        id
    }

    fn send_read<T: Target>(
        &mut self,
        connection: &mut Connection<T>,
        id: u64,
        intended: Instant,
        write_after: bool,
        book: &mut Option<&mut Book>,
    ) {
        let version = book.as_ref().map_or(0, |book| book.floor(id));
        write_key(id, self.load.key_size, &mut self.key);
        let request =
            connection.take(Outstanding { kind: Kind::Read, id, version, intended, write_after });
        connection.target.get(request, &self.key, &mut connection.out);
    }

    fn send_write<T: Target>(
        &mut self,
        connection: &mut Connection<T>,
        id: u64,
        intended: Instant,
        kind: Kind,
        book: &mut Option<&mut Book>,
    ) {
        let (least, most) = self.load.value_size;
        let spread = u64::try_from(most - least).expect("sizes fit 64 bits") + 1;
        let size = least + usize::try_from(self.chance.below(spread)).expect("below most");
        let version = book.as_mut().map_or(0, |book| book.next_version(id));
        if book.is_some() {
            fill_value(id, version, size.max(VALUE_SIZE_MIN), &mut self.value);
        } else {
            let from = usize::try_from(self.chance.below(65_536 / 8)).expect("small");
            self.value.clear();
            self.value.extend_from_slice(&self.filler[from..from + size]);
        }
        write_key(id, self.load.key_size, &mut self.key);
        let slot = Outstanding { kind, id, version, intended, write_after: false };
        let request = connection.take(slot);
        let write = Write { key: &self.key, value: &self.value };
        connection.target.put(request, &write, &mut connection.out);
    }

    fn finish(
        &mut self,
        slot: &Outstanding,
        reply: &Reply<'_>,
        time: Instant,
        report: &mut Report,
        book: &mut Option<&mut Book>,
    ) {
        let latency = time.saturating_duration_since(slot.intended);
        match reply {
            Reply::Value(_) | Reply::Absent => {
                let value = if let Reply::Value(value) = reply { Some(*value) } else { None };
                if let (Some(book), Kind::Read) = (book.as_mut(), slot.kind) {
                    book.check(slot.id, slot.version, value);
                }
                report.done(slot.kind, latency, time, value.is_some());
            }
            Reply::Written => {
                if let Some(book) = book.as_mut() {
                    book.acknowledge(slot.id, slot.version);
                }
                report.done(slot.kind, latency, time, true);
            }
            Reply::Scanned(count) => report.done(slot.kind, latency, time, *count > 0),
            Reply::NotStarted(_) | Reply::MayBeApplied(_) | Reply::Refused(_)
                if slot.kind == Kind::Write =>
            {
                if let Some(book) = book.as_mut() {
                    book.give_up(slot.id);
                }
                report.unsuccessful(slot.kind, reply);
            }
            other => report.unsuccessful(slot.kind, other),
        }
    }
}
impl<T> Connection<T> {
    fn take(&mut self, slot: Outstanding) -> u32 {
        // A read-modify-write's second half may find all slots taken: it gets one more.
        let request = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("a depth fits 32 bits")
        });
        self.slots[request as usize] = Some(slot);
        request
    }
}
