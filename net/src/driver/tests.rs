//! Real sockets on loopback against the shard's loop.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use annulus_engine::driver::{HostOptions, RingWaker, Turn, host, start_shard};

use super::*;

mod dialing;

/// A shard on its own thread that answers each line of bytes by itself, until stopped.
struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    waker: RingWaker,
    thread: JoinHandle<Result<SocketStats, String>>,
}

impl Server {
    fn start(
        limits: Limits,
        handler: impl FnMut(&mut Connections, Event<'_>) + Send + 'static,
    ) -> Server {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (tell, told) = std::sync::mpsc::channel();
        let thread = start_shard(Default::default(), move |ring, runtime| async move {
            let mut handler = handler;
            let mut sockets = Sockets::new(&ring, Some(listener), limits).unwrap();
            tell.send(ring.waker()).unwrap();
            host(&ring, &runtime, HostOptions::default(), |now, completions| {
                let busy = sockets.turn(now, completions, &mut handler);
                sockets.connections().flush();
                match (stopped.load(Ordering::Relaxed), busy) {
                    (true, _) => Turn::Stop,
                    (false, true) => Turn::Busy,
                    (false, false) => Turn::Idle,
                }
            })
            .await
            .unwrap();
            sockets.connections().stats()
        })
        .unwrap();
        Server { address, stop, waker: told.recv().unwrap(), thread }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn stop(self) -> SocketStats {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake();
        self.thread.join().unwrap().unwrap()
    }
}

fn echo(connections: &mut Connections, event: Event<'_>) {
    if let Event::Received(id, bytes) = event
        && let Some(out) = connections.out(id)
    {
        out.extend_from_slice(bytes);
    }
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap() ^ salt).collect()
}

/// Reads exactly `len` bytes of the pattern.
fn expect_pattern(stream: &mut TcpStream, len: usize, salt: u8) {
    let mut answer = vec![0; len];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer == pattern(len, salt), "the answer differs");
}

fn expect_end(stream: &mut TcpStream) {
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn many_connections_get_their_own_bytes_back() {
    let server = Server::start(Limits::default(), echo);
    let mut streams: Vec<_> = (0..200).map(|_| server.connect()).collect();
    for round in 0..20 {
        for (i, stream) in (0u8..).zip(&mut streams) {
            stream.write_all(&pattern(64 + round, i)).unwrap();
        }
        for (i, stream) in (0u8..).zip(&mut streams) {
            expect_pattern(stream, 64 + round, i);
        }
    }
    drop(streams);
    assert_eq!(server.stop().opened, 200);
}

#[test]
fn bytes_cut_anywhere_arrive_in_order() {
    let server = Server::start(Limits::default(), echo);
    let mut stream = server.connect();
    for cut in 1..64 {
        for part in pattern(1000, cut).chunks(usize::from(cut)) {
            stream.write_all(part).unwrap();
        }
        expect_pattern(&mut stream, 1000, cut);
    }
    server.stop();
}

#[test]
fn a_reply_larger_than_all_socket_buffers_arrives_whole() {
    let server = Server::start(Limits::default(), |connections, event| {
        if let Event::Received(id, _) = event {
            connections.out(id).unwrap().extend_from_slice(&pattern(20 << 20, 3));
        }
    });
    let mut stream = server.connect();
    stream.write_all(b"x").unwrap();
    expect_pattern(&mut stream, 20 << 20, 3);
    stream.write_all(b"x").unwrap();
    expect_pattern(&mut stream, 20 << 20, 3);
    drop(stream);
    let stats = server.stop();
    assert_eq!(stats.sent_bytes, 40 << 20);
    assert!(stats.buffer_bytes <= 256 * (64 << 10), "a burst's buffers are given back");
}

#[test]
fn a_reader_that_stops_stops_the_server_from_receiving_and_loses_nothing() {
    let limits = Limits { out_pause_bytes: 64 << 10, ..Limits::default() };
    let server = Server::start(limits, echo);
    let mut stream = server.connect();
    let total = 32 << 20;
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || writer.write_all(&pattern(total, 5)).unwrap());
    // Nothing is read until the writer can go no further: both directions are full.
    std::thread::park_timeout(Duration::from_millis(300));
    assert!(!sender.is_finished(), "32 MiB went into a server that could not answer");
    expect_pattern(&mut stream, total, 5);
    sender.join().unwrap();
    assert_eq!(server.stop().shed, 0);
}

#[test]
fn a_reader_that_asks_for_more_than_the_bound_is_shed() {
    let limits = Limits { out_shed_bytes: 8 << 20, ..Limits::default() };
    let reasons = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&reasons);
    let server = Server::start(limits, move |connections, event| match event {
        Event::Received(id, _) => {
            if let Some(out) = connections.out(id) {
                out.resize(out.len() + (9 << 20), 0);
            }
        }
        Event::Closed(_, ClosedBy::SlowReader) => {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        _ => {}
    });
    let mut stream = server.connect();
    stream.write_all(b"x").unwrap();
    while reasons.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    drop(stream);
    let stats = server.stop();
    assert_eq!((stats.shed, stats.open, stats.unsent_bytes), (1, 0, 0));
}

#[test]
fn a_reader_that_stalls_is_shed_even_while_the_shard_is_idle() {
    let limits = Limits { stall_ms: 500, ..Limits::default() };
    let server = Server::start(limits, |connections, event| {
        if let Event::Received(id, _) = event {
            connections.out(id).unwrap().resize(16 << 20, 0);
        }
    });
    let mut stream = server.connect();
    stream.write_all(b"x").unwrap();
    std::thread::park_timeout(Duration::from_millis(3500));
    // Shed by a reset, so the rest is not even in the kernel.
    let mut sink = Vec::new();
    let ended = stream.read_to_end(&mut sink);
    assert!(ended.is_err() || sink.len() < 16 << 20, "{} bytes arrived", sink.len());
    assert_eq!(server.stop().shed, 1);
}

#[test]
fn a_paused_connection_is_not_heard_and_loses_nothing() {
    let handled = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&handled);
    let mut paused = Vec::new();
    // The first connection is paused by its own bytes, and resumed by the second's.
    let server = Server::start(Limits::default(), move |connections, event| {
        let Event::Received(id, bytes) = event else { return };
        if bytes == b"resume" {
            for id in paused.drain(..) {
                connections.resume(id);
            }
            return;
        }
        seen.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        connections.out(id).unwrap().extend_from_slice(bytes);
        if bytes.starts_with(b"pause") {
            connections.pause(id);
            paused.push(id);
        }
    });
    let (mut first, mut second) = (server.connect(), server.connect());
    first.write_all(b"pause").unwrap();
    first.read_exact(&mut [0; 5]).unwrap();
    first.write_all(&pattern(100_000, 9)).unwrap();
    std::thread::park_timeout(Duration::from_millis(100));
    assert_eq!(handled.load(Ordering::SeqCst), 5);
    second.write_all(b"resume").unwrap();
    expect_pattern(&mut first, 100_000, 9);
    server.stop();
}

#[test]
fn bytes_before_the_end_of_a_paused_peer_come_before_its_end() {
    let log = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&log);
    let mut paused = None;
    let server = Server::start(Limits::default(), move |connections, event| match event {
        Event::Opened(id, _) if paused.is_none() => {
            connections.pause(id);
            paused = Some(id);
        }
        Event::Received(_, b"resume") => connections.resume(paused.unwrap()),
        Event::Received(id, bytes) => {
            assert_eq!((Some(id), bytes), (paused, &b"last words"[..]));
            seen.fetch_add(1, Ordering::SeqCst);
        }
        Event::Closed(id, ClosedBy::Peer) if Some(id) == paused => {
            seen.fetch_add(10, Ordering::SeqCst);
        }
        _ => {}
    });
    let mut first = server.connect();
    let mut second = server.connect();
    first.write_all(b"last words").unwrap();
    first.shutdown(Shutdown::Write).unwrap();
    std::thread::park_timeout(Duration::from_millis(100));
    assert_eq!(log.load(Ordering::SeqCst), 0);
    second.write_all(b"resume").unwrap();
    expect_end(&mut first);
    assert_eq!(log.load(Ordering::SeqCst), 11);
    server.stop();
}

#[test]
fn a_closed_connection_sends_its_last_words_although_the_peer_talks_on() {
    let server = Server::start(Limits::default(), |connections, event| {
        if let Event::Received(id, _) = event
            && let Some(out) = connections.out(id)
        {
            out.extend_from_slice(&pattern(1 << 20, 4));
            connections.close(id);
            assert!(connections.out(id).is_none(), "closed to its owner");
        }
    });
    let mut stream = server.connect();
    stream.write_all(&vec![0; 3 << 20]).unwrap();
    expect_pattern(&mut stream, 1 << 20, 4);
    expect_end(&mut stream);
    drop(stream);
    server.stop();
}

#[test]
fn an_aborted_connection_ends_at_once() {
    let server = Server::start(Limits::default(), |connections, event| {
        if let Event::Received(id, _) = event {
            connections.out(id).unwrap().extend_from_slice(b"never sent");
            connections.abort(id);
        }
    });
    for _ in 0..20 {
        let mut stream = server.connect();
        stream.write_all(b"x").unwrap();
        assert!(!matches!(stream.read(&mut [0; 16]), Ok(1..)));
    }
    // The last one's place may still wait for its receive to end.
    assert!(server.stop().open <= 1);
}

#[test]
fn a_peer_that_has_said_all_still_gets_its_answer() {
    let server = Server::start(Limits::default(), echo);
    let mut stream = server.connect();
    stream.write_all(&pattern(50_000, 1)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    expect_pattern(&mut stream, 50_000, 1);
    expect_end(&mut stream);
    assert_eq!(server.stop().open, 0);
}

#[test]
fn connections_beyond_the_limit_are_closed_and_a_place_is_used_again() {
    let ids = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&ids);
    let mut first = None;
    let server =
        Server::start(Limits { connections: 1, ..Limits::default() }, move |connections, event| {
            if let Event::Opened(id, _) = event {
                let first = *first.get_or_insert(id);
                if first != id {
                    assert_eq!(id.index(), first.index());
                    assert_ne!(id.generation(), first.generation());
                    assert!(!connections.is_open(first) && connections.out(first).is_none());
                    connections.close(first);
                    assert!(connections.is_open(id), "a stale id reaches nobody");
                    seen.store(1, Ordering::SeqCst);
                }
            }
            echo(connections, event);
        });
    let mut one = server.connect();
    one.write_all(&pattern(10, 0)).unwrap();
    expect_pattern(&mut one, 10, 0);
    let mut two = server.connect();
    assert!(!matches!(two.read(&mut [0]), Ok(1..)), "over the limit");
    one.shutdown(Shutdown::Both).unwrap();
    drop(one);
    while ids.load(Ordering::SeqCst) == 0 {
        let mut next = server.connect();
        if next.write_all(&pattern(10, 0)).is_ok() && next.read_exact(&mut [0; 10]).is_ok() {
            break;
        }
    }
    assert_eq!(ids.load(Ordering::SeqCst), 1);
    assert!(server.stop().refused >= 1);
}

#[test]
fn more_senders_than_buffers_are_all_served() {
    let server = Server::start(Limits::default(), echo);
    let mut streams: Vec<_> = (0..600).map(|_| server.connect()).collect();
    let request = pattern(60_000, 2);
    for stream in &mut streams {
        stream.write_all(&request).unwrap();
    }
    for stream in &mut streams {
        expect_pattern(stream, request.len(), 2);
    }
    server.stop();
}

#[test]
fn idle_connections_hold_no_buffers() {
    let server = Server::start(Limits::default(), echo);
    let mut streams: Vec<_> = (0..1000).map(|_| server.connect()).collect();
    for stream in &mut streams {
        stream.write_all(&pattern(30_000, 8)).unwrap();
    }
    for stream in &mut streams {
        expect_pattern(stream, 30_000, 8);
    }
    let stats = server.stop();
    assert_eq!(stats.open, 1000);
    assert!(stats.buffer_bytes <= 256 * (64 << 10), "{} bytes", stats.buffer_bytes);
}

/// Two shards; the first hands each connection to the second after its first bytes, and back
/// whenever a piece starts with the mark.
#[test]
fn a_connection_moves_between_shards_while_bytes_flow() {
    let mesh = Mesh::<Detached>::new(2, 64);
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = Some(listener);
    let stop = Arc::new(AtomicBool::new(false));
    let (tell, told) = std::sync::mpsc::channel();
    let threads: Vec<_> = (0..2)
        .map(|shard| {
            let (mesh, stop, tell) = (Arc::clone(&mesh), Arc::clone(&stop), tell.clone());
            let listener = listener.take();
            start_shard(Default::default(), move |ring, runtime| async move {
                let port = mesh.join(shard, ring.waker());
                let mut sockets = Sockets::new(&ring, listener, Limits::default()).unwrap();
                tell.send(ring.waker()).unwrap();
                let mut moves = 0u64;
                host(&ring, &runtime, HostOptions::default(), |now, completions| {
                    let connections = sockets.connections();
                    let arrived = port.drain(|_, detached| {
                        connections.adopt(detached).unwrap();
                    });
                    let mut busy = arrived > 0;
                    busy |= sockets.turn(now, completions, |connections, event| match event {
                        // Half is answered here, the rest unseen goes along.
                        Event::Received(id, bytes) => {
                            let (here, there) = bytes.split_at(bytes.len() / 2);
                            connections.out(id).unwrap().extend_from_slice(here);
                            connections.detach(id, there);
                        }
                        Event::Detached(_, detached) => {
                            moves += 1;
                            port.send(1 - shard, detached).map_err(drop).unwrap();
                        }
                        _ => {}
                    });
                    sockets.connections().flush();
                    match (stop.load(Ordering::Relaxed), busy) {
                        (true, _) => Turn::Stop,
                        (false, true) => Turn::Busy,
                        (false, false) => Turn::Idle,
                    }
                })
                .await
                .unwrap();
                moves
            })
            .unwrap()
        })
        .collect();
    let wakers = [told.recv().unwrap(), told.recv().unwrap()];
    let clients: Vec<_> = (0..8u8)
        .map(|salt| {
            std::thread::spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                let mut writer = stream.try_clone().unwrap();
                let sender = std::thread::spawn(move || {
                    for part in pattern(200_000, salt).chunks(777) {
                        writer.write_all(part).unwrap();
                    }
                });
                // An odd byte stays with the shards: half of one byte is none.
                expect_pattern(&mut stream, 199_999, salt);
                sender.join().unwrap();
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    wakers.iter().for_each(RingWaker::wake);
    let moves: u64 = threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).sum();
    assert!(moves > 100, "{moves} moves");
}

#[test]
fn sockets_dropped_in_the_middle_of_everything_end_cleanly() {
    for _ in 0..5 {
        let server = Server::start(Limits::default(), |connections, event| {
            if let Event::Received(id, _) = event {
                connections.out(id).unwrap().resize(4 << 20, 7);
            }
        });
        let mut streams: Vec<_> = (0..20).map(|_| server.connect()).collect();
        for stream in &mut streams {
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0; 10]).unwrap();
        }
        assert_eq!(server.stop().open, 20);
        for stream in &mut streams {
            let mut rest = Vec::new();
            // Ends, with what had been sent or with a reset; never hangs.
            let _ = stream.read_to_end(&mut rest);
            assert!(rest.iter().all(|&byte| byte == 7));
        }
    }
}

#[test]
fn a_shard_that_stops_accepting_serves_on() {
    let server = Server::start(Limits::default(), echo);
    let mut stream = server.connect();
    stream.write_all(&pattern(10, 0)).unwrap();
    expect_pattern(&mut stream, 10, 0);
    server.stop();

    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = Some(listener);
    start_shard(Default::default(), move |ring, runtime| async move {
        let mut sockets = Sockets::new(&ring, listener.take(), Limits::default()).unwrap();
        let client = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"stop").unwrap();
            expect_pattern(&mut stream, 4, b's');
            while TcpStream::connect(address).is_ok() {}
            stream.write_all(b"done").unwrap();
            expect_pattern(&mut stream, 4, b's');
        });
        let mut done = false;
        host(&ring, &runtime, HostOptions::default(), |now, completions| {
            let mut stop = false;
            let busy = sockets.turn(now, completions, |connections, event| match event {
                Event::Received(id, bytes) => {
                    stop |= bytes == b"stop";
                    connections.out(id).unwrap().extend_from_slice(&pattern(4, b's'));
                }
                Event::Closed(..) => done = true,
                _ => {}
            });
            if stop {
                sockets.stop_accepting();
            }
            sockets.connections().flush();
            match (done, busy) {
                (true, _) => Turn::Stop,
                (_, true) => Turn::Busy,
                _ => Turn::Idle,
            }
        })
        .await
        .unwrap();
        client.join().unwrap();
    })
    .unwrap()
    .join()
    .unwrap()
    .unwrap();
}
