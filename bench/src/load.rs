//! The load loop: many connections, one thread, closed or open.
//!
//! Closed loop: each connection keeps `depth` requests outstanding. Open loop: requests are due at
//! fixed times whatever the server does, and latency counts from the due time, so a stall is
//! charged to every request it delayed (no coordinated omission).
//!
//! With a deadline a request carries what is left of it, counted from when it was due, and one
//! whose deadline passes here is not sent: it counts as not started. An answer that comes later is
//! counted as late, and is no goodput.
//!
//! Invariant: every request that was due is counted exactly once, as done, late, refused, perhaps
//! applied, or failed.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use crate::annulus::UNSENT;
use crate::keys::{Chance, Distribution, KeyChooser, Stripe, write_key};
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
    /// How many keys of the stripe exist when the run begins.
    pub keys: u64,
    /// Which ids this thread uses.
    pub stripe: Stripe,
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
    /// How long after a request is due its answer is worth something.
    pub deadline: Option<Duration>,
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
const INPUT_SIZE: usize = 256 << 10;
/// What requests without a deadline are told.
const DEADLINE_NONE: Duration = Duration::from_secs(30);
/// Draws of a key before the search for a fitting one is given up.
const DRAWS_MAX: usize = 10_000;

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    kind: Kind,
    /// The key's number in the stripe.
    id: u64,
    /// Read: the least version allowed. Write: the version written.
    version: u32,
    intended: Instant,
    /// Bytes of key and value of a write.
    bytes: usize,
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
/// A connection that breaks on the way ends the run, not the measurement: what was outstanding is
/// counted as perhaps applied (writes) or failed (reads), and `report.lost` says why.
///
/// # Errors
/// `InvalidInput` when the server's limits forbid such a load; else connecting or greeting failed.
pub fn run<T: Target>(
    load: &Load,
    connect: impl FnMut(usize) -> T,
    report: &mut Report,
    mut book: Option<&mut Book>,
) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut connections = open(load, connect, &mut poll)?;
    for connection in &connections {
        let sizes = connection.target.check_sizes(load.key_size, load.value_size.1);
        sizes.map_err(|what| io::Error::new(io::ErrorKind::InvalidInput, what))?;
    }
    let mut source = Source::new(load);
    report.begin(source.begin);
    if let Err(error) = drive(&mut source, &mut connections, &mut poll, report, &mut book) {
        abandon(&mut connections, report, "connection lost");
        report.lost = Some(error.to_string());
    }
    report.end(now());
    Ok(())
}

/// Counts what will not be answered any more.
fn abandon<T>(connections: &mut [Connection<T>], report: &mut Report, why: &str) {
    for slot in connections.iter_mut().flat_map(|c| &mut c.slots).filter_map(Option::take) {
        let why = why.to_owned();
        let reply = match slot.kind {
            Kind::Write => Reply::MayBeApplied(why),
            Kind::Read | Kind::Scan => Reply::Refused(why),
        };
        report.unsuccessful(slot.kind, &reply);
    }
}

/// Connects, and waits until each connection may be used.
fn open<T: Target>(
    load: &Load,
    mut connect: impl FnMut(usize) -> T,
    poll: &mut Poll,
) -> io::Result<Vec<Connection<T>>> {
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
            target: connect(index),
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
    let mut input = vec![0; INPUT_SIZE];
    let mut events = Events::with_capacity(1024);
    let begin = now();
    while connections.iter().any(|connection| !connection.target.ready()) {
        if begin.elapsed() > DRAIN {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the server did not greet"));
        }
        poll.poll(&mut events, Some(Duration::from_millis(50)))?;
        for connection in &mut connections {
            connection.blocked = false;
            connection.receive(&mut input, &mut |_, _| {})?;
            connection.flush()?;
        }
    }
    Ok(connections)
}

/// The loop: fill what may be sent, wait, take what came.
fn drive<T: Target>(
    source: &mut Source<'_>,
    connections: &mut [Connection<T>],
    poll: &mut Poll,
    report: &mut Report,
    book: &mut Option<&mut Book>,
) -> io::Result<()> {
    let load = source.load;
    let mut events = Events::with_capacity(1024);
    let mut input = vec![0; INPUT_SIZE];
    let mut ready: VecDeque<usize> = (0..connections.len()).collect();
    let mut follow: Vec<u64> = Vec::new();
    loop {
        source.fill(connections, &mut ready, report, book);
        for connection in &mut *connections {
            connection.flush()?;
        }
        let outstanding = connections.iter().any(|c| c.free.len() < c.slots.len());
        if source.finished(now()) && !outstanding {
            return Ok(());
        }
        if source.ended_at.is_some_and(|end| end.elapsed() > DRAIN) {
            abandon(connections, report, "no reply in 10 s");
            return Ok(());
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
            source.tell_time(connection, time, time);
            connection.receive(&mut input, &mut |slot, reply| {
                source.finish(&slot, &reply, time, report, book);
                if slot.write_after {
                    follow.push(slot.id);
                }
            })?;
            for id in follow.drain(..) {
                if book.as_ref().is_some_and(|book| book.is_writing(id)) {
                    continue;
                }
                source.send_write(connection, id, time, book);
            }
            // One that had nothing more to send may have it again.
            let again = had_free && !source.refused.is_empty() && !ready.contains(&index);
            if (!had_free || again) && !connection.free.is_empty() {
                ready.push_back(index);
            }
        }
    }
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
        done: &mut dyn FnMut(Outstanding, Reply<'_>),
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
            let mut finish = |id: u32, reply: Reply<'_>| {
                let slot = slots.get_mut(id as usize).and_then(Option::take);
                if let Some(slot) = slot {
                    free.push(id);
                    done(slot, reply);
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
    /// The next key to insert.
    newest: u64,
    /// All keys below were written: those that are read, as in YCSB.
    readable: u64,
    /// Inserted keys that were answered out of order.
    answered: BTreeSet<u64>,
    sent: u64,
    begin: Instant,
    ended_at: Option<Instant>,
    /// Keys of a preload whose writes were refused before anything was done, to be sent again.
    refused: Vec<u64>,
    /// How many more refused writes of a preload are sent again.
    retries: u64,
    /// How far a preload has come in each lane.
    cursors: Vec<u64>,
    key: Vec<u8>,
    value: Vec<u8>,
    filler: Vec<u8>,
}

impl<'a> Source<'a> {
    fn new(load: &'a Load) -> Source<'a> {
        let mut chance = Chance::new(load.seed);
        let filler = (0..(load.value_size.1 + 65_536) / 8)
            .flat_map(|_| chance.next_u64().to_le_bytes())
            .collect();
        Source {
            load,
            chooser: KeyChooser::new(load.distribution, load.keys),
            chance,
            newest: load.keys,
            readable: load.keys,
            answered: BTreeSet::new(),
            sent: 0,
            begin: now(),
            ended_at: None,
            refused: Vec::new(),
            retries: 10_000 + 10 * load.keys,
            cursors: Vec::new(),
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

    /// Whether what was due then is not worth sending any more.
    fn is_late(&self, intended: Instant, time: Instant) -> bool {
        self.load.deadline.is_some_and(|deadline| time >= intended + deadline)
    }

    /// Tells a connection the time, and until when what was due then must be answered.
    fn tell_time<T: Target>(
        &self,
        connection: &mut Connection<T>,
        time: Instant,
        intended: Instant,
    ) {
        let allowed = self.load.deadline.unwrap_or(DEADLINE_NONE);
        connection.target.set_time(time - self.begin, intended + allowed - self.begin);
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

    /// Sends all that is due and that the connections have room for.
    fn fill<T: Target>(
        &mut self,
        connections: &mut [Connection<T>],
        ready: &mut VecDeque<usize>,
        report: &mut Report,
        book: &mut Option<&mut Book>,
    ) {
        let time = now();
        while let Some(&index) = ready.front() {
            let connection = &mut connections[index];
            let Some(intended) = self.due(time) else { break };
            if self.is_late(intended, time) {
                self.sent += 1;
                report.unsuccessful(Kind::Read, &Reply::NotStarted(UNSENT.to_owned()));
                continue;
            }
            self.tell_time(connection, time, intended);
            if connection.free.is_empty() || !self.send(connection, intended, book) {
                ready.pop_front();
                continue;
            }
            if self.load.rate.is_some() {
                // Spread an open loop's requests over the connections.
                ready.rotate_left(1);
            } else if connection.free.is_empty() {
                ready.pop_front();
            }
        }
    }

    /// Sends one request; false when this connection's lane has nothing more to send, ever.
    fn send<T: Target>(
        &mut self,
        connection: &mut Connection<T>,
        intended: Instant,
        book: &mut Option<&mut Book>,
    ) -> bool {
        if self.load.sequential {
            let Some(id) = self.next_in_order(&connection.target) else { return false };
            self.sent += 1;
            self.send_write(connection, id, intended, book);
            return true;
        }
        let mix = self.load.mix;
        let draw = self.chance.unit();
        let inserts_from = mix.reads + mix.scans;
        let pairs_from = inserts_from + mix.inserts;
        self.sent += 1;
        if draw < mix.reads {
            self.send_read(connection, intended, false, book);
        } else if draw < inserts_from {
            self.send_scan(connection, intended);
        } else if draw < pairs_from {
            // Goes to any connection: a new key's place cannot be chosen.
            let id = self.newest;
            self.newest += 1;
            if let Some(book) = book {
                book.grow(id);
            }
            self.send_write(connection, id, intended, book);
        } else if draw < pairs_from + mix.read_modify_writes {
            self.send_read(connection, intended, true, book);
        } else {
            let fits = |id| book.as_ref().is_none_or(|book| !book.is_writing(id));
            match self.pick(&connection.target, fits) {
                Some(id) => self.send_write(connection, id, intended, book),
                None => self.send_read(connection, intended, false, book),
            }
        }
        true
    }

    /// The next key of a preload that the connection serves. Connections of one lane share a
    /// cursor, so that each key is written once.
    fn next_in_order<T: Target>(&mut self, target: &T) -> Option<u64> {
        let lane = target.lane();
        if self.cursors.len() <= lane {
            self.cursors.resize(lane + 1, 0);
        }
        for index in (0..self.refused.len()).rev() {
            write_key(self.load.stripe.id(self.refused[index]), self.load.key_size, &mut self.key);
            if target.serves(&self.key) {
                return Some(self.refused.swap_remove(index));
            }
        }
        while self.cursors[lane] < self.load.keys {
            let id = self.cursors[lane];
            self.cursors[lane] += 1;
            write_key(self.load.stripe.id(id), self.load.key_size, &mut self.key);
            if target.serves(&self.key) {
                return Some(id);
            }
        }
        None
    }

    /// Draws keys until the connection serves one and it fits.
    fn pick<T: Target>(&mut self, target: &T, fits: impl Fn(u64) -> bool) -> Option<u64> {
        for draw in 0..DRAWS_MAX {
            // A popular key that does not fit would be drawn again and again.
            let id = if draw < 100 {
                self.chooser.next(self.readable, &mut self.chance)
            } else {
                self.chance.below(self.readable)
            };
            write_key(self.load.stripe.id(id), self.load.key_size, &mut self.key);
            if target.serves(&self.key) && fits(id) {
                return Some(id);
            }
        }
        None
    }

    fn send_scan<T: Target>(&mut self, connection: &mut Connection<T>, intended: Instant) {
        let id = self.chooser.next(self.readable, &mut self.chance);
        let count = 1 + u32::try_from(self.chance.below(100)).expect("below 100");
        write_key(self.load.stripe.id(id), self.load.key_size, &mut self.key);
        let kind = Kind::Scan;
        let slot = Outstanding { kind, id, version: 0, intended, bytes: 0, write_after: false };
        let request = connection.take(slot);
        if !connection.target.scan(request, &self.key, count, &mut connection.out) {
            connection.target.get(request, &self.key, &mut connection.out);
        }
    }

    fn send_read<T: Target>(
        &mut self,
        connection: &mut Connection<T>,
        intended: Instant,
        write_after: bool,
        book: &Option<&mut Book>,
    ) {
        // What was never acknowledged may still hold a value of an earlier run.
        let fits = |id| {
            book.as_ref()
                .is_none_or(|book| book.is_written(id) && !(write_after && book.is_writing(id)))
        };
        let id = self.pick(&connection.target, fits).unwrap_or_else(|| {
            write_key(self.load.stripe.id(0), self.load.key_size, &mut self.key);
            0
        });
        let version = book.as_ref().map_or(0, |book| book.floor(id));
        let slot = Outstanding { kind: Kind::Read, id, version, intended, bytes: 0, write_after };
        let request = connection.take(slot);
        connection.target.get(request, &self.key, &mut connection.out);
    }

    fn send_write<T: Target>(
        &mut self,
        connection: &mut Connection<T>,
        id: u64,
        intended: Instant,
        book: &mut Option<&mut Book>,
    ) {
        let (least, most) = self.load.value_size;
        let spread = u64::try_from(most - least).expect("sizes fit 64 bits") + 1;
        let size = least + usize::try_from(self.chance.below(spread)).expect("below most");
        let version = book.as_mut().map_or(0, |book| book.next_version(id));
        let name = self.load.stripe.id(id);
        if book.is_some() {
            fill_value(name, version, size.max(VALUE_SIZE_MIN), &mut self.value);
        } else {
            let from = usize::try_from(self.chance.below(65_536 / 8)).expect("small");
            self.value.clear();
            self.value.extend_from_slice(&self.filler[from..from + size]);
        }
        write_key(name, self.load.key_size, &mut self.key);
        let bytes = self.key.len() + self.value.len();
        let kind = Kind::Write;
        let slot = Outstanding { kind, id, version, intended, bytes, write_after: false };
        let request = connection.take(slot);
        let write = Write { key: &self.key, value: &self.value };
        connection.target.put(request, &write, &mut connection.out);
    }

    /// Notes that the insert of a key was answered, if it was one. A refused one counts too: it
    /// must not hide all later ones from the readers.
    fn answered_insert(&mut self, id: u64) {
        if id >= self.readable {
            self.answered.insert(id);
            while self.answered.remove(&self.readable) {
                self.readable += 1;
            }
        }
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
        let is_result =
            matches!(reply, Reply::Value(_) | Reply::Absent | Reply::Written | Reply::Scanned(_));
        if is_result && self.is_late(slot.intended, time) {
            report.late();
        }
        if slot.kind == Kind::Write {
            self.answered_insert(slot.id);
        }
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
                report.wrote(slot.bytes);
                report.done(slot.kind, latency, time, true);
            }
            Reply::Scanned(count) => report.done(slot.kind, latency, time, *count > 0),
            Reply::NotStarted(_) | Reply::MayBeApplied(_) | Reply::Refused(_)
                if slot.kind == Kind::Write =>
            {
                if let Some(book) = book.as_mut() {
                    book.give_up(slot.id);
                }
                if self.load.sequential && self.retries > 0 && matches!(reply, Reply::NotStarted(_))
                {
                    self.retries -= 1;
                    self.sent -= 1;
                    self.ended_at = None;
                    self.refused.push(slot.id);
                    return;
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
