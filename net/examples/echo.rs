//! A measurement of the drivers alone: an echo server on one core, a closed-loop load on another.
//!
//! `cargo run --release -p annulus-net --example echo -- --conns 50 --depth 16 --spin-us 50`
//!
//! Prints requests per second, the server's CPU per request, and the load's round-trip median.
//! Beside it stands the bare-ring echo of the project's runtime notes, on cores of the same kind,
//! 64-byte requests: 3.4 us a request at 50 connections and depth 1, 0.22 us at depth 16, and a
//! median of 7.6 us for one connection with spinning. Both sides here use the drivers: the load
//! adopts connected sockets.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use annulus_engine::Error;
use annulus_engine::driver::{
    HostOptions, Ring, RingWaker, ShardRuntime, ThreadOptions, Turn, host, start_shard,
};
use annulus_engine::model::Instant;
use annulus_engine::runtime::Runtime;
use annulus_net::driver::{Detached, Door, Event, Limits, Sockets, listen};

type Failure = Box<dyn std::error::Error>;

/// Value of `--name` on the command line.
fn option(name: &str, default: usize) -> Result<usize, Failure> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (None, _) => Ok(default),
        (_, Some(value)) => Ok(value.parse()?),
        (_, None) => Err(format!("{name} needs a number").into()),
    }
}

fn cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a writable timespec that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap_or(0)
}

fn on_core(core: usize, name: &str) -> ThreadOptions {
    ThreadOptions { core: Some(core), name: name.to_owned(), ..ThreadOptions::default() }
}

/// One connection of the load: a batch of `depth` requests is out.
#[derive(Clone, Copy, Default)]
struct Batch {
    sent_at: Instant,
    answered: usize,
}

/// What to measure.
#[derive(Clone, Copy)]
struct Plan {
    conns: usize,
    depth: usize,
    size: usize,
    warm_up_ns: u64,
    measure_ns: u64,
    host: HostOptions,
}

/// What the two threads share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    server: OnceLock<RingWaker>,
    server_cpu_ns: AtomicU64,
}

/// Echoes until told to stop.
async fn serve(
    ring: Ring,
    runtime: ShardRuntime,
    listener: TcpListener,
    plan: Plan,
    shared: &Shared,
) -> Result<(), Error> {
    let mut sockets = Sockets::new(&ring, Some(listener), Limits::default())?;
    shared.server.get_or_init(|| ring.waker());
    let mut read_cpu_at = Instant(0);
    host(&ring, &runtime, plan.host, |now, completions| {
        let busy = sockets.turn(now, completions, |connections, event| {
            if let Event::Received(id, bytes) = event
                && let Some(out) = connections.out(id)
            {
                out.extend_from_slice(bytes);
            }
        });
        sockets.connections().flush();
        if now > read_cpu_at {
            read_cpu_at = now.after_nanos(1_000_000);
            shared.server_cpu_ns.store(cpu_ns(), Ordering::Relaxed);
        }
        match (shared.stop.load(Ordering::Relaxed), busy) {
            (true, _) => Turn::Stop,
            (false, true) => Turn::Busy,
            (false, false) => Turn::Idle,
        }
    })
    .await
}

/// Keeps a batch out on each connection for the planned time; gives the line to print.
async fn load(
    ring: Ring,
    runtime: ShardRuntime,
    address: SocketAddr,
    plan: Plan,
    shared: &Shared,
) -> Result<String, Error> {
    let mut sockets = Sockets::new(&ring, None, Limits::default())?;
    let request = vec![0x5a; plan.size * plan.depth];
    let mut batches = vec![Batch::default(); plan.conns];
    for _ in 0..plan.conns {
        let stream = TcpStream::connect(address)
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .map_err(|source| Error::io("connect to", "echo", source))?;
        let (socket, door) = (stream.into(), Door::Clients);
        let connection = Detached { socket, received: Vec::new(), door };
        let id = sockets.connections().adopt(connection).expect("within the limit");
        sockets.connections().out(id).expect("open").extend_from_slice(&request);
    }
    sockets.connections().flush();
    let (mut begin, mut from_cpu, mut count) = (Instant(0), None, 0u64);
    let mut latencies = Vec::with_capacity(1 << 20);
    let mut end = Instant(u64::MAX);
    host(&ring, &runtime, plan.host, |now, completions| {
        let busy = sockets.turn(now, completions, |connections, event| {
            let Event::Received(id, bytes) = event else { return };
            let batch = &mut batches[id.index()];
            let before = batch.answered / plan.size;
            batch.answered += bytes.len();
            count += (batch.answered / plan.size - before) as u64;
            if batch.answered == request.len() {
                if latencies.len() < latencies.capacity() {
                    latencies.push(now.nanos_since(batch.sent_at));
                }
                *batch = Batch { sent_at: now, answered: 0 };
                connections.out(id).expect("open").extend_from_slice(&request);
            }
        });
        sockets.connections().flush();
        if begin == Instant(0) {
            begin = now.after_nanos(plan.warm_up_ns);
        }
        if from_cpu.is_none() && now >= begin {
            from_cpu = Some(shared.server_cpu_ns.load(Ordering::Relaxed));
            (begin, end, count) = (now, now.after_nanos(plan.measure_ns), 0);
            latencies.clear();
        }
        match () {
            () if now >= end => Turn::Stop,
            () if busy => Turn::Busy,
            () => Turn::Idle,
        }
    })
    .await?;
    let seconds = runtime.now().nanos_since(begin) as f64 / 1e9;
    let cpu_us = shared.server_cpu_ns.load(Ordering::Relaxed) - from_cpu.unwrap_or(0);
    latencies.sort_unstable();
    let quantile = |part: usize| latencies.get(latencies.len() * part / 100).copied().unwrap_or(0);
    Ok(format!(
        "{} connections, depth {}: {:.0} requests/s, server {:.3} us CPU a request, \
         batch p50 {:.1} us, p99 {:.1} us",
        plan.conns,
        plan.depth,
        count as f64 / seconds,
        cpu_us as f64 / 1e3 / count.max(1) as f64,
        quantile(50) as f64 / 1e3,
        quantile(99) as f64 / 1e3,
    ))
}

fn main() -> Result<(), Failure> {
    let plan = Plan {
        conns: option("--conns", 50)?,
        depth: option("--depth", 1)?,
        size: option("--size", 64)?,
        warm_up_ns: option("--warm-up-ms", 300)? as u64 * 1_000_000,
        measure_ns: option("--ms", 2000)? as u64 * 1_000_000,
        host: HostOptions { spin_us: option("--spin-us", 50)? as u64, ..HostOptions::default() },
    };
    let (server_core, load_core) = (option("--core", 0)?, option("--load-core", 1)?);
    let listener = listen("127.0.0.1:0".parse()?)?;
    let address = listener.local_addr()?;
    let shared = Arc::new(Shared::default());

    let ours = Arc::clone(&shared);
    let server = start_shard(on_core(server_core, "echo"), move |ring, runtime| async move {
        serve(ring, runtime, listener, plan, &ours).await.map_err(|error| error.to_string())
    })?;
    let ours = Arc::clone(&shared);
    let load = start_shard(on_core(load_core, "load"), move |ring, runtime| async move {
        load(ring, runtime, address, plan, &ours).await.map_err(|error| error.to_string())
    })?;

    let line = load.join().map_err(|_| "the load's thread panicked")???;
    shared.stop.store(true, Ordering::Relaxed);
    if let Some(waker) = shared.server.get() {
        waker.wake();
    }
    server.join().map_err(|_| "the server's thread panicked")???;
    println!("{line}");
    Ok(())
}
