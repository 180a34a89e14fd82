//! Real sockets on loopback against the shard's loop.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use annulus_engine::driver::{HostOptions, RingWaker, Turn, host, start_shard};

use super::*;

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
    (0..len).map(|i| (i % 251) as u8 ^ salt).collect()
}

fn exchange(stream: &mut TcpStream, request: &[u8]) {
    stream.write_all(request).unwrap();
    let mut answer = vec![0; request.len()];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer == request, "the echo differs");
}

#[test]
fn many_connections_get_their_own_bytes_back() {
    let server = Server::start(Limits::default(), echo);
    let mut streams: Vec<_> = (0..200).map(|_| server.connect()).collect();
    for round in 0..20 {
        for (i, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&pattern(64 + round, i as u8)).unwrap();
        }
        for (i, stream) in streams.iter_mut().enumerate() {
            let mut answer = vec![0; 64 + round];
            stream.read_exact(&mut answer).unwrap();
            assert!(answer == pattern(64 + round, i as u8), "stream {i} in round {round}");
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
        let request = pattern(1000, cut);
        for part in request.chunks(usize::from(cut)) {
            stream.write_all(part).unwrap();
        }
        let mut answer = vec![0; request.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, request);
    }
    server.stop();
}
