//! Connections that begin here, and the door that they come in by.

use std::net::TcpListener;

use super::*;

/// Runs a shard's sockets until the handler says that it is done.
fn run(
    limits: Limits,
    doors: Vec<(TcpListener, Door)>,
    begin: impl FnOnce(&mut Connections) + Send + 'static,
    mut handler: impl FnMut(&mut Connections, Event<'_>) -> bool + Send + 'static,
) -> SocketStats {
    let thread = start_shard(Default::default(), move |ring, runtime| async move {
        let mut sockets = Sockets::new(&ring, None, limits).unwrap();
        for (listener, door) in doors {
            sockets.accept_from(listener, door);
        }
        let (mut begin, mut done) = (Some(begin), false);
        host(&ring, &runtime, HostOptions::default(), |now, completions| {
            let busy = sockets.turn(now, completions, |connections, event| {
                done |= handler(connections, event);
            });
            // The first turn has set the clock.
            if let Some(begin) = begin.take() {
                begin(sockets.connections());
                return Turn::Busy;
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
        sockets.connections().stats()
    });
    thread.unwrap().join().unwrap().unwrap()
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// An address where nobody answers: its queue of connections is full.
fn silent() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&any().into()).unwrap();
    socket.listen(1).unwrap();
    let listener: TcpListener = socket.into();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        queued.push(stream);
    }
    (listener, queued, address)
}

#[test]
fn a_dialled_connection_is_like_any_other() {
    let peers = listen_for_peers(any()).unwrap();
    let address = peers.local_addr().unwrap();
    let clients = listen(any()).unwrap();
    let client_address = clients.local_addr().unwrap();
    let (mut dialled, mut answered) = (None, 0);
    let stats = run(
        Limits::default(),
        vec![(clients, Door::Clients), (peers, Door::Peers)],
        move |connections| {
            for address in [address, client_address] {
                let id = connections.dial(address).unwrap();
                assert!(!connections.is_open(id) && connections.out(id).is_none());
            }
        },
        move |connections, event| match event {
            Event::Connected(id) => {
                dialled = dialled.or(Some(id));
                let address = connections.peer(id).unwrap();
                let door = if address == client_address { b"clients" } else { b"peers.." };
                connections.out(id).unwrap().extend_from_slice(door);
                false
            }
            Event::Received(_, b"answer") => {
                answered += 1;
                answered == 2
            }
            Event::Received(id, bytes) => {
                assert!([&b"clients"[..], b"peers.."].contains(&bytes));
                connections.out(id).unwrap().extend_from_slice(b"answer");
                false
            }
            Event::Opened(..) => false,
            other => panic!("{other:?}"),
        },
    );
    assert_eq!((stats.dials, stats.dials_failed, stats.open), (2, 0, 4));
}

#[test]
fn the_door_of_a_connection_is_told() {
    let (peers, clients) = (listen_for_peers(any()).unwrap(), listen(any()).unwrap());
    let addresses = [peers.local_addr().unwrap(), clients.local_addr().unwrap()];
    let client = std::thread::spawn(move || {
        addresses.map(|address| {
            let mut stream = TcpStream::connect(address).unwrap();
            let mut door = [0; 7];
            stream.read_exact(&mut door).unwrap();
            door
        })
    });
    let mut closed = 0;
    run(
        Limits::default(),
        vec![(clients, Door::Clients), (peers, Door::Peers)],
        |_| {},
        move |connections, event| {
            match event {
                Event::Opened(id, door) => {
                    let name = if door == Door::Peers { b"peers.." } else { b"clients" };
                    connections.out(id).unwrap().extend_from_slice(name);
                }
                Event::Closed(..) => closed += 1,
                _ => {}
            }
            closed == 2
        },
    );
    assert_eq!(client.join().unwrap(), [*b"peers..", *b"clients"]);
}

#[test]
fn a_refused_dial_ends_with_the_networks_reason() {
    let address = listen(any()).unwrap().local_addr().unwrap();
    let stats = run(
        Limits::default(),
        Vec::new(),
        move |connections| assert!(connections.dial(address).is_ok()),
        |connections, event| match event {
            Event::Closed(id, by) => {
                assert_eq!(by, ClosedBy::Error(libc::ECONNREFUSED));
                assert!(!connections.is_open(id));
                true
            }
            other => panic!("{other:?}"),
        },
    );
    assert_eq!((stats.dials_failed, stats.open), (1, 0));
}

#[test]
fn a_dial_that_nobody_answers_ends_in_time() {
    let (_listener, _queued, address) = silent();
    let stats = run(
        Limits { dial_timeout_ms: 100, ..Limits::default() },
        Vec::new(),
        move |connections| assert!(connections.dial(address).is_ok()),
        |_, event| match event {
            Event::Closed(_, by) => {
                assert_eq!(by, ClosedBy::Error(libc::ETIMEDOUT));
                true
            }
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(stats.dials_failed, 1);
}

#[test]
fn a_dial_can_be_given_up_and_its_place_used_again() {
    let (_listener, _queued, address) = silent();
    let other = listen_for_peers(any()).unwrap();
    let good = other.local_addr().unwrap();
    let mut first = None;
    let stats = run(
        Limits { reserve: 1, dial_timeout_ms: 100, ..Limits::default() },
        vec![(other, Door::Clients)],
        move |connections| {
            let id = connections.dial(address).unwrap();
            assert!(connections.dial(address).is_err(), "one place only");
            connections.abort(id);
            connections.abort(id);
            // Only clients may come in meanwhile; they are what comes round for us here.
            drop(std::thread::spawn(move || {
                for _ in 0..50 {
                    let _ = TcpStream::connect(good);
                }
            }));
        },
        move |connections, event| {
            match event {
                Event::Opened(..) if first.is_none() => first = connections.dial(good).ok(),
                Event::Connected(id) => assert_eq!(Some(id), first),
                Event::Closed(id, _) => assert_ne!(Some(id), first),
                _ => {}
            }
            matches!(event, Event::Connected(_))
        },
    );
    assert_eq!((stats.dials, stats.dials_failed), (2, 1));
}

#[test]
fn sockets_may_go_while_a_dial_is_under_way() {
    let (_listener, _queued, address) = silent();
    let thread = start_shard(Default::default(), move |ring, _| async move {
        let mut sockets = Sockets::new(&ring, None, Limits::default()).unwrap();
        sockets.connections().dial(address).unwrap();
        ring.turn(&mut Vec::new());
        drop(sockets);
    });
    thread.unwrap().join().unwrap().unwrap();
}
