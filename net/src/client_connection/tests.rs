//! Both ends against each other, in memory.

use annulus_engine::model::NamespaceId;
use proptest::prelude::*;

use super::*;
use crate::server_connection::tests::{delete, facts, get, put, version};
use crate::server_connection::{MemoryBudget, ServerConnection, ServerFacts, Ticket};
use crate::wire::request::Request;
use crate::wire::response::{Failure, ReadFacts, ReadReply, ValueRef, WriteFacts, decode_write};

const LATER: Instant = Instant(1_000_000_000);

/// Two ends and the bytes between them.
struct Pair {
    facts: ServerFacts,
    server: ServerConnection,
    server_out: Vec<u8>,
    client: ClientConnection,
    client_out: Vec<u8>,
    tickets: Vec<Ticket>,
    events: Vec<String>,
    welcome: Option<Welcome>,
}

impl Pair {
    fn new(hello: &Hello<'_>) -> Pair {
        let facts = facts();
        let mut client_out = Vec::new();
        let client = ClientConnection::new(hello, LATER, &mut client_out);
        let server = ServerConnection::new(Instant(0), &facts, MemoryBudget::new(64 << 20));
        Pair {
            facts,
            server,
            server_out: Vec::new(),
            client,
            client_out,
            tickets: Vec::new(),
            events: Vec::new(),
            welcome: None,
        }
    }

    fn open() -> Pair {
        let mut pair = Pair::new(&Hello::default());
        pair.deliver();
        pair.answer().unwrap();
        pair
    }

    /// The client's bytes arrive; requests wait as tickets, puts and gets are answered.
    fn deliver(&mut self) {
        self.client.fill_output(&mut self.client_out, usize::MAX);
        let bytes = std::mem::take(&mut self.client_out);
        let tickets = &mut self.tickets;
        let outcome = self.server.receive(
            Instant(0),
            &bytes,
            &self.facts,
            &mut self.server_out,
            &mut |replies, arrival, request| match request {
                Request::Put(put) if put.key != b"hold" => {
                    let facts = WriteFacts {
                        version: version(put.value.len() as u64),
                        ..WriteFacts::default()
                    };
                    replies.written(arrival.ticket, &facts);
                }
                Request::Get(get) if get.key != b"hold" => {
                    let value = ValueRef {
                        version: version(1),
                        expiry_ms: 0,
                        value: (&[9; 100_000]).into(),
                    };
                    replies.read(arrival.ticket, &ReadFacts::default(), &[value]);
                }
                _ => tickets.push(arrival.ticket),
            },
        );
        if let Err(close) = outcome {
            self.events.push(format!("server: {close}"));
        }
    }

    fn answer(&mut self) -> Result<(), Lost> {
        self.server.fill_output(&mut self.server_out, usize::MAX);
        let bytes = std::mem::take(&mut self.server_out);
        let (events, welcome) = (&mut self.events, &mut self.welcome);
        self.client.receive(&bytes, &mut |event| match event {
            Event::Welcome(found) => *welcome = Some(found),
            Event::Reply(reply) => {
                events.push(format!("{} {:?} {}", reply.id, reply.status, reply.body.len()));
            }
            Event::Route(route) => events.push(format!("route {}", route.partition)),
            Event::TimedOut { id } => events.push(format!("{id} timed out")),
            Event::Goodbye { status, .. } => events.push(format!("goodbye {status}")),
        })
    }

    fn send(&mut self, request: &Outgoing<'_>) -> Result<u32, Unsent> {
        self.client.send(Instant(0), LATER, 0, request, &mut self.client_out)
    }

    fn events(&mut self) -> Vec<String> {
        std::mem::take(&mut self.events)
    }
}

#[test]
fn a_request_waits_for_the_welcome() {
    let mut pair = Pair::new(&Hello::default());
    assert_eq!(pair.send(&Outgoing::Stats), Err(Unsent::NotOpen));
    pair.deliver();
    pair.answer().unwrap();
    assert_eq!(pair.welcome, Some(pair.facts.welcome.clone()));
    assert_eq!(pair.send(&Outgoing::Operation(put(b"k", b"v"))), Ok(1));
    pair.deliver();
    pair.answer().unwrap();
    assert_eq!(pair.events(), ["1 OK(0) 32"]);
    assert_eq!(pair.client.waiting(), 0);
}

#[test]
fn long_messages_go_both_ways() {
    let mut pair = Pair::open();
    let value = vec![3; 250_000];
    pair.send(&Outgoing::Operation(put(b"k", &value))).unwrap();
    pair.send(&Outgoing::Operation(get(b"k"))).unwrap();
    pair.deliver();
    pair.answer().unwrap();
    assert_eq!(pair.events(), ["1 OK(0) 32", "2 OK(0) 100048"]);
}

#[test]
fn replies_may_come_in_any_order() {
    let mut pair = Pair::open();
    for _ in 0..3 {
        pair.send(&Outgoing::Operation(delete(b"hold"))).unwrap();
    }
    pair.deliver();
    for ticket in std::mem::take(&mut pair.tickets).into_iter().rev() {
        let failure = Failure::new(Status::BUSY, "later");
        pair.server.replies(&mut pair.server_out).failure(ticket, &failure);
    }
    pair.answer().unwrap();
    assert_eq!(pair.events(), ["3 BUSY(96) 21", "2 BUSY(96) 21", "1 BUSY(96) 21"]);
}

#[test]
fn the_window_is_kept_and_opens_again() {
    let mut pair = Pair::open();
    pair.server.set_window(2);
    pair.send(&Outgoing::Ping(b"")).unwrap();
    pair.deliver();
    pair.answer().unwrap();
    pair.events();
    assert_eq!(pair.client.room(), 2);
    pair.send(&Outgoing::Operation(get(b"hold"))).unwrap();
    pair.send(&Outgoing::Operation(get(b"hold"))).unwrap();
    assert_eq!(pair.send(&Outgoing::Ping(b"")), Err(Unsent::WindowFull));
    pair.deliver();
    let ticket = pair.tickets.remove(0);
    pair.server.replies(&mut pair.server_out).read(ticket, &ReadFacts::default(), &[]);
    pair.answer().unwrap();
    assert!(pair.send(&Outgoing::Ping(b"")).is_ok());
}

#[test]
fn a_late_reply_is_dropped() {
    let mut pair = Pair::open();
    pair.send(&Outgoing::Operation(get(b"hold"))).unwrap();
    pair.deliver();
    assert_eq!(pair.client.next_timeout(), Some(LATER));
    let mut late = Vec::new();
    pair.client.handle_timeout(LATER, &mut |event| late.push(format!("{event:?}"))).unwrap();
    assert_eq!(late, ["TimedOut { id: 1 }"]);
    assert_eq!((pair.client.waiting(), pair.client.next_timeout()), (0, None));
    let ticket = pair.tickets.remove(0);
    pair.server.replies(&mut pair.server_out).read(ticket, &ReadFacts::default(), &[]);
    pair.answer().unwrap();
    assert!(pair.events().is_empty());
}

#[test]
fn an_unanswered_hello_is_a_lost_connection() {
    let mut pair = Pair::new(&Hello::default());
    assert_eq!(pair.client.handle_timeout(LATER, &mut |_| {}), Err(Lost::NoWelcome));
}

#[test]
fn a_refused_hello_says_why() {
    let mut pair = Pair::new(&Hello { cluster: 9, ..Hello::default() });
    pair.deliver();
    let Err(Lost::Refused { status, .. }) = pair.answer() else { panic!("not refused") };
    assert_eq!(status, Status::WRONG_CLUSTER);
}

#[test]
fn a_draining_server_answers_what_it_has_and_takes_no_more() {
    let mut pair = Pair::open();
    pair.send(&Outgoing::Operation(get(b"hold"))).unwrap();
    pair.deliver();
    pair.server.drain(&mut pair.server_out);
    assert!(!pair.server.is_drained());
    // Sent before the goodbye arrived.
    pair.send(&Outgoing::Operation(get(b"k"))).unwrap();
    pair.deliver();
    let ticket = pair.tickets.remove(0);
    pair.server.replies(&mut pair.server_out).read(ticket, &ReadFacts::default(), &[]);
    assert!(pair.server.is_drained());
    pair.answer().unwrap();
    assert_eq!(
        pair.events(),
        ["goodbye SHUTTING_DOWN", "2 SHUTTING_DOWN(102) 38", "1 NOT_FOUND(1) 16"]
    );
    assert_eq!(pair.send(&Outgoing::Stats), Err(Unsent::Closing));
}

#[test]
fn routes_and_heat_come_with_the_reply() {
    let mut pair = Pair::open();
    pair.send(&Outgoing::Operation(get(b"hold"))).unwrap();
    pair.deliver();
    let ticket = pair.tickets.remove(0);
    let mut replies = pair.server.replies(&mut pair.server_out);
    replies.attach_route(Route { partition: 3, version: 2, replicas: Vec::new() });
    replies.mark_hot();
    replies.read(ticket, &ReadFacts::default(), &[]);
    let (mut seen, bytes) = (Vec::new(), std::mem::take(&mut pair.server_out));
    pair.client
        .receive(&bytes, &mut |event| match event {
            Event::Route(route) => seen.push(route.partition.to_string()),
            Event::Reply(reply) => {
                assert!(ReadReply::decode(reply.body).unwrap().values.is_empty());
                seen.push(format!("hot {}", reply.hot));
            }
            other => panic!("{other:?}"),
        })
        .unwrap();
    assert_eq!(seen, ["3", "hot true"]);
}

#[test]
fn what_the_server_never_may_say_loses_the_connection() {
    let reply = |id, opcode: u8| {
        let (mut writer, mut out) = (FrameWriter::default(), Vec::new());
        let head = Head { request_id: id, opcode, ..Head::default() };
        writer.message(&mut out, head, 0, |_| {});
        out
    };
    for bytes in [reply(5, 0x83), reply(0, 0x03), reply(0, 0x83), reply(0, 0x81)] {
        let mut client = ClientConnection::new(&Hello::default(), LATER, &mut Vec::new());
        assert!(client.receive(&bytes, &mut |_| {}).is_err());
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut client = ClientConnection::new(&Hello::default(), LATER, &mut Vec::new());
        let _ = client.receive(&bytes, &mut |_| {});
        let _ = Welcome::decode(&bytes);
        let _ = decode_write(&bytes);
        let _ = ReadReply::decode(&bytes);
        let _ = decode_failure(Status::BUSY, &bytes);
        let _ = crate::wire::response::PageRef::decode(&bytes, NamespaceId(0));
        let _ = crate::wire::response::decode_batch(&bytes, &mut |_| Ok(()));
        let _ = Route::decode(&mut Reader::new(&bytes));
    }
}
