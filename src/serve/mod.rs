//! `annulus serve`: threads, sockets and signals around the pumps. One executor a shard, pinned.
//!
//! ```text
//! main thread   binds the addresses, starts shard 0, which takes the directory and says who the
//!               node is; starts the others; prints `ready`; waits for a signal; drains; joins
//! shard threads open their shard, then run the pump until told to stop (`shard.rs`)
//! admin thread  answers HTTP from snapshots that it asks the shards for
//! ```
//!
//! Invariant: nothing is printed as ready before every shard has opened and listens; nothing is
//! answered as done after a drain began that is not durable when the process ends.

mod claim;
mod desk;
mod join;
mod links;
mod map;
mod node;
mod shard;
mod vitals;
mod watch;

use std::fmt;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use annulus_engine::driver::{ThreadOptions, start_shard};
use annulus_net::driver::{Mesh, listen, listen_for_peers};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::admin::Admin;
use crate::config::Config;
use node::{Node, NodeFacts, State};
use shard::ShardStart;
use vitals::Phase;
use watch::{StopWatch, Watch, describe};

/// Messages that one shard may have waiting for another.
const MESH_CAPACITY: usize = 4096;
/// A stop ends within 10 s: the drain, which has its own limit, and then closing the shards, for
/// which a slow disk gets all that is left.
const STOP_TIMEOUT: Duration = Duration::from_millis(9_500);
/// How often, and with which pause, a port is asked for that a killed server may still hold.
const PORT_TRIES: u32 = 40;
const PORT_PAUSE: Duration = Duration::from_millis(50);
/// How often threads are looked at that should have said something.
const LOOK_AT_THREADS: Duration = Duration::from_millis(200);

/// Why the server did not start, or stopped by itself.
#[derive(Debug)]
pub struct ServeError {
    what: String,
}

impl ServeError {
    fn new(what: impl fmt::Display) -> ServeError {
        ServeError { what: what.to_string() }
    }
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for ServeError {}

/// What a shard's thread tells the main thread.
pub(crate) enum Told {
    /// Shard 0 has the directory; this is the node.
    Facts(Box<NodeFacts>),
    /// The shard serves.
    Ready,
    /// The shard has ended, in order or not.
    Ended(u32, Result<(), String>),
    /// A signal came.
    Stop,
}

/// Serves until SIGTERM or SIGINT, then drains and returns.
///
/// # Errors
/// What kept it from starting, or made a shard stop. All that was acknowledged is safe.
pub fn serve(config: Config) -> Result<(), ServeError> {
    ignore_signals();
    let config = Arc::new(config);
    let (tell, told) = mpsc::channel();
    check_port(config.listen)?;
    let first_listener = listen(config.listen).map_err(ServeError::new)?;
    let client = first_listener.local_addr().map_err(ServeError::new)?;
    check_port(config.peer_listen)?;
    let first_peer_listener = listen_for_peers(config.peer_listen).map_err(ServeError::new)?;
    let peer = first_peer_listener.local_addr().map_err(ServeError::new)?;
    watch_signals(tell.clone())?;

    let node = Arc::new(Node::new(Arc::clone(&config), client, peer));
    let first = ShardStart {
        index: 0,
        node: Arc::clone(&node),
        listener: Some(first_listener),
        peer_listener: Some(first_peer_listener),
    };
    let mut threads = vec![(0, start_thread(first, &config, &tell)?)];
    let mut watch = Watch::new();
    let facts = loop {
        match next(&told, &mut threads, &node, &mut watch) {
            Told::Facts(facts) => break *facts,
            Told::Ended(_, Err(what)) => return Err(ServeError::new(what)),
            Told::Stop => return finish(&node, threads, &told),
            Told::Ended(_, Ok(())) | Told::Ready => {}
        }
    };
    let shards = facts.shard_count;
    let has_peers = facts.founding.is_some();
    node.set_facts(facts, Mesh::new(shards as usize, MESH_CAPACITY));
    for index in 1..shards {
        let listener = listen(client).map_err(ServeError::new)?;
        let start = ShardStart {
            index,
            node: Arc::clone(&node),
            listener: Some(listener),
            peer_listener: match has_peers {
                true => Some(listen_for_peers(peer).map_err(ServeError::new)?),
                false => None,
            },
        };
        threads.push((index, start_thread(start, &config, &tell)?));
    }
    let mut waiting = shards;
    while waiting > 0 {
        match next(&told, &mut threads, &node, &mut watch) {
            Told::Ready => waiting -= 1,
            Told::Ended(shard, ended) => {
                let what = ended.err().unwrap_or_else(|| "it ended while starting".to_owned());
                let _ = finish(&node, threads, &told);
                return Err(ServeError::new(format!("shard {shard}: {what}")));
            }
            Told::Stop => return finish(&node, threads, &told),
            Told::Facts(_) => {}
        }
    }
    let admin = match config.admin_listen {
        None => None,
        Some(address) => {
            let names = config.advertise.iter().cloned().collect();
            let source = Arc::clone(&node) as Arc<dyn crate::admin::Source>;
            let admin = Admin::start(address, names, source).map_err(|error| {
                ServeError::new(format!("listen on {address} (admin-listen): {error}"))
            });
            match admin {
                Ok(admin) => Some(admin),
                Err(error) => {
                    let _ = finish(&node, threads, &told);
                    return Err(error);
                }
            }
        }
    };
    node.set_state(State::Serving);
    let admin_address =
        admin.as_ref().map_or_else(|| "off".to_owned(), |admin| admin.address().to_string());
    let data = config.data_dir.display();
    // The reader may be gone; serving goes on.
    let _ = writeln!(
        std::io::stdout(),
        "annulus ready client={client} peer={peer} admin={admin_address} shards={shards} data={data}"
    );
    let _ = std::io::stdout().flush();
    tracing::info!(%client, %admin_address, shards, "serving");

    let ended = loop {
        match next(&told, &mut threads, &node, &mut watch) {
            Told::Stop => break None,
            Told::Ended(shard, ended) => {
                let what = ended.err().unwrap_or_else(|| "it ended by itself".to_owned());
                if let Some(vitals) = node.vitals().get(shard as usize) {
                    // Also of one that panicked: nobody waits for it.
                    vitals.set_phase(Phase::Ended);
                }
                break Some(format!("shard {shard}: {what}"));
            }
            Told::Facts(_) | Told::Ready => {}
        }
    };
    let finished = finish(&node, threads, &told);
    drop(admin);
    match ended {
        Some(what) => Err(ServeError::new(what)),
        None => finished,
    }
}

/// Refuses an address that another process listens on. The shards' listeners share their port
/// with one another, so the kernel would let a second server in, and deal out the connections of
/// one address to two stores.
fn check_port(address: SocketAddr) -> Result<(), ServeError> {
    // The kernel lets go of a killed server's sockets a little after the process is gone, because
    // its rings end first: a restart at once must not fail for that.
    for _ in 0..PORT_TRIES {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => pause(PORT_PAUSE),
            Err(error) => return Err(ServeError::new(format!("listen on {address}: {error}"))),
            Ok(_) => return Ok(()),
        }
    }
    Err(ServeError::new(format!("listen on {address}: the address is in use")))
}

#[expect(clippy::disallowed_methods, reason = "the main thread before any shard runs")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

type Thread = std::thread::JoinHandle<Result<(), String>>;

/// What a shard tells next. A thread that ended without a word (no ring could be had) is told of
/// as well.
fn next(
    told: &mpsc::Receiver<Told>,
    threads: &mut Vec<(u32, Thread)>,
    node: &Node,
    watch: &mut Watch,
) -> Told {
    loop {
        watch.look(node);
        if let Ok(told) = told.recv_timeout(LOOK_AT_THREADS) {
            return told;
        }
        if node.is_removed() {
            tracing::info!(
                "this node is no member of its cluster any more: it holds nothing, and ends"
            );
            return Told::Stop;
        }
        if let Some(index) = threads.iter().position(|(_, thread)| thread.is_finished()) {
            // It may have spoken between the two looks.
            if let Ok(told) = told.try_recv() {
                return told;
            }
            let (shard, thread) = threads.swap_remove(index);
            return Told::Ended(shard, joined(thread));
        }
    }
}

fn joined(thread: Thread) -> Result<(), String> {
    thread.join().unwrap_or_else(|_| Err("the thread panicked".to_owned()))
}

fn start_thread(
    start: ShardStart,
    config: &Arc<Config>,
    tell: &mpsc::Sender<Told>,
) -> Result<Thread, ServeError> {
    let index = start.index;
    let options = ThreadOptions {
        core: Some(config.cores[index as usize % config.cores.len()]),
        name: format!("annulus-{index}"),
        seed: u64::from(index),
        ..ThreadOptions::default()
    };
    let tell_end = tell.clone();
    let tell = tell.clone();
    start_shard(options, move |ring, runtime| async move {
        let ended = shard::run(start, ring, runtime, &tell).await;
        // The main thread is there until every shard has ended.
        let _ = tell_end.send(Told::Ended(index, ended));
    })
    .map_err(ServeError::new)
}

/// Asks all shards to drain and waits for them.
fn finish(
    node: &Node,
    mut threads: Vec<(u32, Thread)>,
    told: &mpsc::Receiver<Told>,
) -> Result<(), ServeError> {
    node.set_state(State::Draining);
    let mut problems = Vec::new();
    let mut watch = StopWatch::new(STOP_TIMEOUT);
    while !threads.is_empty() && watch.look(node) {
        if let Ok(Told::Ended(shard, Err(what))) = told.recv_timeout(LOOK_AT_THREADS / 20) {
            problems.push(format!("shard {shard}: {what}"));
        }
        for index in (0..threads.len()).rev() {
            if threads[index].1.is_finished() {
                let (shard, thread) = threads.swap_remove(index);
                if let Err(what) = joined(thread) {
                    problems.push(format!("shard {shard}: {what}"));
                }
                if let Some(vitals) = node.vitals().get(shard as usize) {
                    // Also of one that could not say so itself: nobody waits for it.
                    vitals.set_phase(Phase::Ended);
                    node.wake_all();
                }
            }
        }
    }
    if !threads.is_empty() {
        problems.push(format!(
            "a shard did not end in time; its log has all it acknowledged: {}",
            describe(node.vitals(), threads.iter().map(|(shard, _)| *shard))
        ));
    }
    if problems.is_empty() { Ok(()) } else { Err(ServeError::new(problems.join("; "))) }
}

fn watch_signals(tell: mpsc::Sender<Told>) -> Result<(), ServeError> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(ServeError::new)?;
    let watch = move || {
        for _ in signals.forever() {
            if tell.send(Told::Stop).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("annulus-signals".into()).spawn(watch);
    thread.map(drop).map_err(ServeError::new)
}

/// A closed pipe or a file over its size limit is an error of that write, not the end of us.
fn ignore_signals() {
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: ignoring a signal installs no handler and touches no memory of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_shards_of_another_process_share_is_refused() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let theirs = listen(any).unwrap();
        let address = theirs.local_addr().unwrap();
        assert!(listen(address).is_ok(), "shards share their port");
        assert!(check_port(address).unwrap_err().to_string().contains("in use"));
        drop(theirs);
        assert!(check_port(address).is_ok());
        assert!(check_port(any).is_ok());
    }
}
