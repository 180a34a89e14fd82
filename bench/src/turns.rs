//! `annulus-bench turns`: what a value does to everybody else, by its size: the longest turn of a
//! shard's loop while one value is put, got from memory, flushed, and got from disk. In a turn
//! nobody else is served, so it is what a small request may have to wait. The whole path but the
//! sockets: frames, connection, log, memtable, table; on the real disk.
//!
//! Invariant: a turn is what the shard's thread does between two looks at its sockets, in CPU time,
//! so that neighbours on the core do not show. The figures are medians over operations of each
//! one's longest turn; of the flush, the longest turn of all.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::task::{Context, Poll};

use annulus_engine::disk::Disk;
use annulus_engine::driver::{
    HostOptions, Ring, RingDisk, ShardRuntime, ThreadOptions, Turn, host, start_shard,
};
use annulus_engine::identity::Identity;
use annulus_engine::log::Lsn;
use annulus_engine::model::{NamespaceId, OriginId, Token};
use annulus_engine::options::{Compression, Options};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Condition, Merge, Mutation, PendingRead, Probe, Shard};
use annulus_net::server_connection::{
    Arrival, ConnectionOptions, MemoryBudget, Replies, ServerConnection, ServerFacts, Ticket,
};
use annulus_net::wire::fields::{Level, OperationFlags, Ttl};
use annulus_net::wire::hello::{self, Hello, Limits, Welcome};
use annulus_net::wire::operation::{Get, Operation, Put, WriteOptions};
use annulus_net::wire::request::{Outgoing, Request};
use annulus_net::wire::response::{ReadFacts, ValueRef, WriteFacts};
use annulus_net::wire::slices::{FrameWriter, Head};
use clap::Args;

use crate::keys::mix;

/// Flags of `turns`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  annulus-bench turns --dir /tmp --sizes 100,10240,1048576")]
pub struct TurnsArgs {
    /// Where the shards' directories are made, and removed at the end.
    #[arg(long)]
    dir: PathBuf,
    /// Bytes of a value, one case each.
    #[arg(long, value_delimiter = ',', default_values_t = [10_240, 102_400, 1_048_576, 16_777_216])]
    sizes: Vec<usize>,
    /// Bytes of all values of a case, about; 5 to 500 values.
    #[arg(long, default_value_t = 64 << 20)]
    bytes: usize,
    /// Core to run on. Default: the kernel's choice.
    #[arg(long)]
    core: Option<usize>,
}

const SEED: u64 = 42;
const NAMESPACE: NamespaceId = NamespaceId(0);
/// Bytes that a receive brings at most, and that wait to be sent at most.
const SOCKET_BYTES: usize = 64 << 10;

type Engine = Shard<RingDisk, ShardRuntime>;

/// Polls the future once a turn until it is ready, and hands each turn's length to `note`.
async fn run<T>(
    ring: &Ring,
    runtime: &ShardRuntime,
    future: impl Future<Output = T>,
    note: impl Fn(u64),
) -> T {
    let mut future = std::pin::pin!(future);
    let mut output = None;
    let mut context = Context::from_waker(runtime.waker());
    let mut began = cpu_nanos();
    let options = HostOptions { spin_us: 0, ..HostOptions::default() };
    host(ring, runtime, options, |_, _| {
        let now = cpu_nanos();
        note(now.saturating_sub(began));
        began = now;
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => {
                output = Some(value);
                Turn::Stop
            }
            Poll::Pending => Turn::Busy,
        }
    })
    .await
    .expect("the ring works");
    output.expect("the loop stops when the future is ready")
}

/// CPU time of this thread, in nanoseconds: what neighbours on the core take does not count.
fn cpu_nanos() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a writable struct of the right type.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(answer, 0, "every thread has this clock");
    let nanos = |part: i64| u64::try_from(part).expect("a clock is not negative");
    nanos(time.tv_sec) * 1_000_000_000 + nanos(time.tv_nsec)
}

/// One turn of the loop passes.
async fn turn() {
    let mut passed = false;
    std::future::poll_fn(|_| {
        if std::mem::replace(&mut passed, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// A connection with a shard behind it.
struct Server {
    shard: Engine,
    runtime: ShardRuntime,
    facts: ServerFacts,
    connection: ServerConnection,
    client: FrameWriter,
    out: Vec<u8>,
    /// Longest turn since it was last taken, in nanoseconds.
    longest: Rc<Cell<u64>>,
    sent: u64,
}

fn facts() -> ServerFacts {
    let largest = 16 << 20;
    ServerFacts {
        welcome: Welcome {
            version: hello::VERSION,
            partition_bits: 0,
            shard_count: 1,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 1,
            hash_seed: SEED,
            map_version: 1,
            wall_us: 0,
            limits: Limits {
                value_size_max: largest,
                message_size_max: largest,
                in_flight_bytes_max: 64 << 20,
                ..Limits::default()
            },
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: Vec::new(),
        },
        options: ConnectionOptions {
            long_reply_bytes_max: 64 << 20,
            long_request_bytes_max: 64 << 20,
            ..ConnectionOptions::default()
        },
    }
}

/// What the handler leaves to be done.
enum Next {
    Write(Lsn, Ticket),
    Read(Box<PendingRead<<RingDisk as Disk>::File>>, Ticket),
}

impl Server {
    /// Bytes of a request, as a client sends them.
    fn say(&mut self, request: &Outgoing<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let head = Head { request_id: 1, opcode: request.opcode().request(), ..Head::default() };
        self.client.message(&mut bytes, head, request.size(), |out| request.encode(out));
        self.client.flush_slices(&mut bytes, usize::MAX);
        bytes
    }

    /// Takes a request as the sockets bring it, a turn each time, and answers it to the last byte.
    async fn serve(&mut self, bytes: &[u8]) {
        let next = RefCell::new(None);
        for part in bytes.chunks(SOCKET_BYTES) {
            let (shard, runtime) = (&self.shard, &self.runtime);
            let mut handler =
                |replies: &mut Replies<'_>, arrival: Arrival, request: Request<'_>| {
                    *next.borrow_mut() = match request {
                        Request::Put(put) => {
                            let mutation = Mutation {
                                token: put.token,
                                namespace: put.namespace,
                                merge: Merge::LastWriteWins,
                                key: put.key,
                                value: Some(put.value),
                                expiry_ms: 0,
                                context: None,
                                condition: Condition::None,
                            };
                            let applied = shard.apply(&mutation, runtime.wall()).expect("room");
                            Some(Next::Write(applied.lsn, arrival.ticket))
                        }
                        Request::Get(get) => {
                            let mut ticket = Some(arrival.ticket);
                            match shard.probe(get.token, get.namespace, get.key, |found| {
                                let value = ValueRef::from(&found.expect("it was put"));
                                let ticket = ticket.take().expect("answered once");
                                replies.read(ticket, &ReadFacts::default(), &[value]);
                            }) {
                                Probe::Done(()) => None,
                                Probe::Pending(read) => {
                                    Some(Next::Read(read, ticket.expect("not answered")))
                                }
                            }
                        }
                        _ => unreachable!("nothing else is sent"),
                    };
                };
            let now = self.runtime.now();
            self.connection
                .receive(now, part, &self.facts, &mut self.out, &mut handler)
                .expect("whole frames");
            turn().await;
        }
        match next.into_inner() {
            Some(Next::Write(lsn, ticket)) => {
                self.shard.wait_visible(lsn).await.expect("the disk works");
                let mut replies = self.connection.replies(&mut self.out);
                replies.written(ticket, &WriteFacts::default());
            }
            Some(Next::Read(read, ticket)) => {
                let found = read.finish(&self.shard).await.expect("the disk works");
                let value = ValueRef::from(&found.record().expect("it was put"));
                let mut replies = self.connection.replies(&mut self.out);
                replies.read(ticket, &ReadFacts::default(), &[value]);
            }
            None => {}
        }
        while self.connection.has_queued() || !self.out.is_empty() {
            self.connection.fill_output(&mut self.out, SOCKET_BYTES);
            self.sent += self.out.len() as u64;
            self.out.clear();
            turn().await;
        }
    }

    fn take_longest(&self) -> u64 {
        self.longest.replace(0)
    }
}

fn key(id: u32) -> [u8; 4] {
    id.to_be_bytes()
}

fn get(key: &[u8]) -> Operation<'_> {
    Operation::Get(Get {
        token: Token::MIN,
        namespace: NAMESPACE,
        key,
        level: Level::Default,
        primary: Level::Default,
        max_staleness_ms: 0,
        flags: OperationFlags::default(),
    })
}

fn median(times: &mut [u64]) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Text-like: packs to about a half.
fn value(size: usize) -> Vec<u8> {
    let mut state = 7;
    let mut bytes = Vec::with_capacity(size + 16);
    while bytes.len() < size {
        state = mix(state);
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(b"the same");
    }
    bytes.truncate(size);
    bytes
}

async fn measure(ring: &Ring, runtime: &ShardRuntime, dir: &Path, size: usize, count: u32) {
    let longest = Rc::new(Cell::new(0));
    let noted = Rc::clone(&longest);
    let work = async {
        let options = Options {
            memtable_size: 1 << 30,
            cache_size: 0,
            compression: Compression::Lz4,
            value_size_max: 16 << 20,
            ..Options::default()
        };
        let identity = Identity {
            cluster: 1,
            node: OriginId(1),
            shard: 0,
            shard_count: 1,
            hash_seed: SEED,
            partition_bits: options.partition_bits,
            created: runtime.wall(),
        };
        let disk = RingDisk::new(ring);
        let shard = Shard::open(disk, runtime.clone(), dir, &identity, options, None);
        let facts = facts();
        let budget = MemoryBudget::new(256 << 20);
        let mut server = Server {
            shard: shard.await.expect("a new shard"),
            runtime: runtime.clone(),
            connection: ServerConnection::new(runtime.now(), &facts, budget),
            facts,
            client: FrameWriter::default(),
            out: Vec::new(),
            longest,
            sent: 0,
        };
        let hello = server.say(&Outgoing::Hello(Hello::default()));
        let now = server.runtime.now();
        let Server { connection, facts, out, .. } = &mut server;
        connection.receive(now, &hello, facts, out, &mut |_, _, _| {}).expect("a greeting");
        let value = value(size);
        let (mut puts, mut memory, mut disk) = (Vec::new(), Vec::new(), Vec::new());
        for id in 0..count {
            let key = key(id);
            let put = Operation::Put(Put {
                token: Token::MIN,
                namespace: NAMESPACE,
                key: &key,
                value: value.as_slice().into(),
                ttl: Ttl::Default,
                options: WriteOptions::default(),
            });
            let bytes = server.say(&Outgoing::Operation(put));
            turn().await;
            server.take_longest();
            server.serve(&bytes).await;
            puts.push(server.take_longest());
        }
        for id in 0..count {
            let bytes = server.say(&Outgoing::Operation(get(&key(id))));
            turn().await;
            server.take_longest();
            server.serve(&bytes).await;
            memory.push(server.take_longest());
        }
        server.take_longest();
        server.shard.flush().await.expect("the disk works");
        turn().await;
        let flush = server.take_longest();
        for id in 0..count {
            let bytes = server.say(&Outgoing::Operation(get(&key(id))));
            turn().await;
            server.take_longest();
            server.serve(&bytes).await;
            disk.push(server.take_longest());
        }
        let sent = server.sent;
        server.shard.close().await.expect("the disk works");
        let us = |nanos: u64| nanos / 1000;
        println!(
            "{:>9} bytes, longest turn in us: put {}, get from memory {}, flush {} (the longest of \
             {count} values), get from disk {}",
            size,
            us(median(&mut puts)),
            us(median(&mut memory)),
            us(flush),
            us(median(&mut disk)),
        );
        sent
    };
    let sent = run(ring, runtime, work, |nanos| noted.set(noted.get().max(nanos))).await;
    assert!(sent > 2 * size as u64 * u64::from(count), "all values came back");
}

/// Measures each size, and prints a line of each.
#[must_use]
pub fn main(args: &TurnsArgs) -> ExitCode {
    for &size in &args.sizes {
        let dir = args.dir.join(format!("turns-{size}"));
        let count = u32::try_from((args.bytes / size.max(1)).clamp(5, 500)).expect("clamped");
        let of = dir.clone();
        let thread = ThreadOptions { core: args.core, name: "turns".into(), ..Default::default() };
        let shard = start_shard(thread, move |ring, runtime| async move {
            measure(&ring, &runtime, &of, size, count).await;
        });
        let ended = match shard {
            Ok(thread) => thread.join().expect("the shard's thread does not panic"),
            Err(error) => Err(error.to_string()),
        };
        let removed = std::fs::remove_dir_all(&dir);
        if let Err(error) = ended {
            eprintln!("annulus-bench: {error}");
            return ExitCode::from(2);
        }
        if let Err(error) = removed {
            eprintln!("annulus-bench: {}: {error}", dir.display());
        }
    }
    ExitCode::SUCCESS
}
