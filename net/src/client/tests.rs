//! The client against a server made of `ServerConnection` on loopback, with a map for a store
//! and a few keys that misbehave.

#![expect(clippy::disallowed_types, reason = "threads of the test share the store")]

mod failover;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use annulus_engine::model::{Instant, NamespaceId, Record};

use super::*;
use crate::server_connection::tests::{facts, version};
use crate::server_connection::{
    MemoryBudget, Received, Replies, ServerConnection, ServerFacts, Ticket,
};
use crate::wire::Class;
use crate::wire::fields::{Condition, Version};
use crate::wire::frame::Opcode;
use crate::wire::hello::{FEATURE_ONCE, Mode, NamespaceFact};
use crate::wire::operation::Operation;
use crate::wire::request::Request;
use crate::wire::response::{BatchResults, Failure, Page, ReadFacts, ValueRef, WriteFacts};

/// Values by `(token, key)`; more than one are siblings.
type Values = BTreeMap<(Token, Vec<u8>), Vec<Vec<u8>>>;

/// What the connections of one fake server share.
#[derive(Default)]
struct Store {
    values: Arc<Mutex<Values>>,
    /// Whoever holds it pauses the server.
    pause: Mutex<()>,
    /// Whoever holds it makes it answer nothing that has a key.
    pause_keys: Mutex<()>,
    /// Shard that served a key last.
    served_by: Mutex<BTreeMap<Vec<u8>, u32>>,
    requests: AtomicU64,
    /// Answer this many keyed requests with BUSY.
    busy: AtomicU64,
    /// Pause asked for with it, in milliseconds; 0 is 1.
    busy_pause_ms: AtomicU32,
    /// Close the connection at the next keyed request, without an answer.
    hang_up: AtomicBool,
    /// The same, after the request was carried out.
    apply_and_hang_up: AtomicBool,
    /// Judge conditions as if nothing had been written since the first version.
    is_behind: AtomicBool,
    /// Close connections as they come.
    refuse: AtomicBool,
    /// Connections that were made.
    sockets: Mutex<Vec<TcpStream>>,
    /// Say goodbye to all connections at their next request.
    drain: AtomicBool,
}

struct FakeServer {
    address: String,
    store: Arc<Store>,
}

impl FakeServer {
    fn start() -> FakeServer {
        FakeServer::with(facts())
    }

    fn with(mut facts: ServerFacts) -> FakeServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        facts.welcome.nodes[0].address = listener.local_addr().unwrap().to_string();
        FakeServer::listen(&listener, facts, Store::default())
    }

    fn listen(listener: &TcpListener, facts: ServerFacts, store: Store) -> FakeServer {
        let address = listener.local_addr().unwrap().to_string();
        let listener = listener.try_clone().unwrap();
        let store = Arc::new(store);
        let shared = Arc::clone(&store);
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let (facts, store) = (facts.clone(), Arc::clone(&shared));
                let socket = socket.unwrap();
                if store.refuse.load(Ordering::SeqCst) {
                    continue;
                }
                store.sockets.lock().unwrap().push(socket.try_clone().unwrap());
                std::thread::spawn(move || {
                    serve(&socket, facts, &store);
                    // Also for the copy above.
                    let _ = socket.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        FakeServer { address, store }
    }

    fn options(&self) -> ClientOptions {
        ClientOptions {
            seed: Some(7),
            timeout: Duration::from_secs(10),
            ..ClientOptions::new([&self.address])
        }
    }

    fn client(&self) -> BlockingClient {
        BlockingClient::connect(self.options()).unwrap()
    }

    fn namespace(&self) -> BlockingNamespace {
        self.client().namespace("default").unwrap()
    }
}

fn serve(mut socket: &TcpStream, mut facts: ServerFacts, store: &Store) {
    let budget = MemoryBudget::new(64 << 20);
    let mut connection = ServerConnection::new(Instant(0), &facts, budget.clone());
    let (mut out, mut buffer) = (Vec::new(), vec![0; 16 << 10]);
    let mut handed: Option<Vec<u8>> = None;
    loop {
        let bytes = match handed.take() {
            Some(bytes) => bytes,
            None => match socket.read(&mut buffer) {
                Ok(read) if read > 0 => buffer[..read].to_vec(),
                _ => return,
            },
        };
        drop(store.pause.lock().unwrap());
        let mut hang_up = false;
        let shard = facts.welcome.shard;
        let outcome = connection.receive(
            Instant(0),
            &bytes,
            &facts,
            &mut out,
            &mut |replies, arrival, request| {
                hang_up |= !handle(store, shard, replies, arrival.ticket, &request);
            },
        );
        if hang_up {
            return;
        }
        if store.drain.swap(false, Ordering::SeqCst) {
            connection.drain(&mut out);
        }
        match outcome {
            Ok(Received::HandOver { shard, bytes }) => {
                facts.welcome.shard = shard;
                connection = ServerConnection::new(Instant(0), &facts, budget.clone());
                handed = Some(bytes);
            }
            Ok(Received::Continue) => {}
            Err(_) => {
                let _ = socket.write_all(&out);
                return;
            }
        }
        connection.fill_output(&mut out, usize::MAX);
        if socket.write_all(&out).is_err() || connection.is_drained() {
            return;
        }
        out.clear();
    }
}

/// Answers a request. False: hang up instead.
fn handle(
    store: &Store,
    shard: u32,
    replies: &mut Replies<'_>,
    ticket: Ticket,
    request: &Request<'_>,
) -> bool {
    store.requests.fetch_add(1, Ordering::SeqCst);
    let note = |key: &[u8]| {
        store.served_by.lock().unwrap().insert(key.to_vec(), shard);
    };
    let keyed = matches!(request, Request::Get(_) | Request::Put(_) | Request::Delete(_));
    if keyed && store.hang_up.swap(false, Ordering::SeqCst) {
        return false;
    }
    if keyed && store.busy.load(Ordering::SeqCst) > 0 {
        store.busy.fetch_sub(1, Ordering::SeqCst);
        let pause = store.busy_pause_ms.load(Ordering::SeqCst).max(1);
        replies.failure(ticket, &Failure::new(Status::BUSY, "as told").retry_after(pause));
        return true;
    }
    if keyed {
        drop(store.pause_keys.lock().unwrap());
    }
    let mut values = store.values.lock().unwrap();
    match *request {
        Request::Get(get) if get.key == b"never" => {}
        Request::Put(put) if put.key == b"never" => {}
        Request::Get(get) => {
            note(get.key);
            let found = values.get(&(get.token, get.key.to_vec()));
            let found: Vec<ValueRef<'_>> = found
                .into_iter()
                .flatten()
                .map(|value| ValueRef {
                    version: version(value.len() as u64),
                    expiry_ms: 0,
                    value: value.into(),
                })
                .collect();
            let facts = ReadFacts { context: b"ctx", answers: 1, ..ReadFacts::default() };
            replies.read(ticket, &facts, &found);
        }
        Request::Put(put) => {
            note(put.key);
            let siblings = values.entry((put.token, put.key.to_vec())).or_default();
            let mut live = siblings.first().map_or(Version::default(), |v| version(v.len() as u64));
            if store.is_behind.load(Ordering::SeqCst) {
                live = version(1);
            }
            let holds = match put.options.condition {
                Condition::Always => true,
                Condition::IfAbsent => siblings.is_empty(),
                Condition::IfVersion(wanted) => wanted == live,
            };
            if !holds {
                let facts = WriteFacts { version: live, ..WriteFacts::default() };
                replies.condition_false(ticket, &facts);
                return true;
            }
            if put.key.starts_with(b"sibling") && put.options.context.is_none() {
                siblings.push(put.value.to_vec());
            } else {
                *siblings = vec![put.value.to_vec()];
            }
            let version = version(put.value.len() as u64);
            replies.written(
                ticket,
                &WriteFacts { version, acks: 1, durable: 1, ..Default::default() },
            );
        }
        Request::Delete(delete) => {
            values.remove(&(delete.token, delete.key.to_vec()));
            replies.written(ticket, &WriteFacts::default());
        }
        Request::Batch(batch) => {
            let mut results = BatchResults::new(batch.count());
            for (index, operation) in (0..).zip(batch.iter()) {
                note(operation.key().1);
                match operation {
                    Operation::Get(get) if get.key == b"busy" => {
                        let failure = Failure::new(Status::BUSY, "this one");
                        results.failure(index, Opcode::Get, &failure);
                    }
                    Operation::Get(get) => {
                        let found = values.get(&(get.token, get.key.to_vec()));
                        let found: Vec<ValueRef<'_>> = found
                            .into_iter()
                            .flatten()
                            .map(|value| ValueRef {
                                version: version(1),
                                expiry_ms: 0,
                                value: value.into(),
                            })
                            .collect();
                        results.read(index, &ReadFacts::default(), &found);
                    }
                    Operation::Put(put) => {
                        values.insert((put.token, put.key.to_vec()), vec![put.value.to_vec()]);
                        results.write(index, Opcode::Put, Status::OK, &WriteFacts::default());
                    }
                    Operation::Delete(_) => {
                        results.write(index, Opcode::Delete, Status::OK, &WriteFacts::default());
                    }
                }
            }
            replies.batch(ticket, results);
        }
        Request::Scan(scan) => {
            let mut page = Page::new(&scan, 7, 100_000);
            let mut last = None;
            for ((token, key), value) in values.range((scan.range.first, scan.after.to_vec())..) {
                if *token > scan.range.last || (*token, &key[..]) == (scan.range.first, scan.after)
                {
                    continue;
                }
                if page.is_full() {
                    return {
                        replies.page(ticket, page, last);
                        true
                    };
                }
                page.push(&annulus_engine::model::RecordRef {
                    token: *token,
                    namespace: scan.namespace,
                    incarnation: 0,
                    kind: annulus_engine::model::Kind::Put,
                    dot: Default::default(),
                    timestamp: Default::default(),
                    expiry_ms: 0,
                    key,
                    value: (&value[0]).into(),
                });
                last = Some((*token, &key[..]));
            }
            replies.page(ticket, page, None);
        }
        Request::Stats => replies.json(ticket, br#"{"gets":1}"#.to_vec()),
        Request::Admin(admin) if admin.command == "fail" => {
            replies.failure(ticket, &Failure::new(Status::FAILED, "no such thing"));
        }
        Request::Admin(admin) => {
            replies.json(ticket, format!("{}:{}", admin.command, admin.json).into_bytes());
        }
        Request::Hello(_) | Request::Ping(_) => unreachable!("answered by the connection"),
    }
    !(keyed && store.apply_and_hang_up.swap(false, Ordering::SeqCst))
}

#[test]
fn values_are_put_got_and_deleted() {
    let server = FakeServer::start();
    let space = server.namespace();
    assert_eq!(space.get(b"k").unwrap(), None);
    let written = space.put(b"k", b"value").unwrap();
    assert_eq!((written.version, written.acks, written.durable), (version(5), 1, 1));
    assert_eq!(space.get(b"k").unwrap(), Some(b"value".to_vec()));
    let read = space.read(b"k", &ReadOptions::default()).unwrap();
    assert_eq!(read.context, Some(Context(b"ctx".to_vec())));
    space.delete(b"k").unwrap();
    assert_eq!(space.get(b"k").unwrap(), None);
}

#[test]
fn long_values_travel_in_slices() {
    let server = FakeServer::start();
    let space = server.namespace();
    let value: Vec<u8> = (0..250_000u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
    space.put(b"long", &value).unwrap();
    assert_eq!(space.get(b"long").unwrap(), Some(value));
}

#[test]
fn what_is_over_a_limit_is_refused_before_it_is_sent() {
    let server = FakeServer::start();
    let space = server.namespace();
    let sent = server.store.requests.load(Ordering::SeqCst);
    for error in [
        space.put(b"k", &vec![0; 300_001]).unwrap_err(),
        space.put(&[0; 4097], b"").unwrap_err(),
        space.put(b"", b"").unwrap_err(),
        space.get(b"").unwrap_err(),
    ] {
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
    assert_eq!(server.store.requests.load(Ordering::SeqCst), sent);
}

#[test]
fn requests_go_to_the_shard_of_their_key() {
    let server = FakeServer::start();
    let space = server.namespace();
    let welcome = server.client().welcome().unwrap();
    let keys: Vec<Vec<u8>> = (0..40u8).map(|i| vec![b'k', i]).collect();
    let home = |key: &[u8]| welcome.replicas(Token::of_key(key, 42))[0].shard;
    assert!(keys.iter().any(|key| home(key) == 0) && keys.iter().any(|key| home(key) == 1));
    // The connection to the second shard is made in the background; until then the first serves.
    let mut rounds = 0;
    loop {
        for key in &keys {
            space.get(key).unwrap();
        }
        let served = server.store.served_by.lock().unwrap().clone();
        if keys.iter().all(|key| served[key] == home(key)) {
            break;
        }
        rounds += 1;
        assert!(rounds < 10_000, "the second shard was never used");
    }
}

#[test]
fn many_requests_share_the_connections() {
    let server = FakeServer::start();
    let space = server.namespace().asynchronous();
    let mut tasks: Vec<_> = (0..200u32)
        .map(|i| {
            let space = space.clone();
            Box::pin(async move {
                let key = i.to_le_bytes();
                space.put(&key, &key).await?;
                space.get(&key).await
            })
        })
        .collect();
    let mut done = Vec::new();
    // Polls all, as a runtime's join would.
    block_on(std::future::poll_fn(|context| {
        let mut index = 0;
        while index < tasks.len() {
            match tasks[index].as_mut().poll(context) {
                Poll::Ready(outcome) => {
                    done.push(outcome.unwrap().unwrap());
                    drop(tasks.swap_remove(index));
                }
                Poll::Pending => index += 1,
            }
        }
        if tasks.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }));
    assert_eq!(done.len(), 200);
}

#[test]
fn a_narrow_window_is_kept_and_nothing_fails() {
    let mut facts = facts();
    facts.welcome.limits.in_flight_max = 2;
    let server = FakeServer::with(facts);
    let space = server.namespace();
    let mut pipeline = space.pipeline(50);
    let mut results = Vec::new();
    for tag in 0..300u32 {
        let key = tag.to_le_bytes().to_vec();
        results.extend(pipeline.put(tag, key, b"v".to_vec(), WriteOptions::default()));
    }
    while let Some(result) = pipeline.finish_one() {
        results.push(result);
    }
    let tags: Vec<u32> = results.iter().map(|(tag, _)| *tag).collect();
    assert_eq!(tags, (0..300).collect::<Vec<_>>());
    assert!(results.iter().all(|(_, result)| result.is_ok()), "{results:?}");
}

#[test]
fn busy_is_tried_again_within_the_budget() {
    let server = FakeServer::start();
    let space = server.namespace();
    server.store.busy.store(3, Ordering::SeqCst);
    space.put(b"k", b"v").unwrap();
    // Of the burst of ten retries seven are left.
    server.store.busy.store(1_000, Ordering::SeqCst);
    let before = server.store.requests.load(Ordering::SeqCst);
    let error = space.put(b"k", b"v").unwrap_err();
    assert!(matches!(error, Error::NotStarted { status: Status::BUSY, .. }), "{error}");
    let tried = server.store.requests.load(Ordering::SeqCst) - before;
    assert_eq!(tried, 1 + 7, "one attempt and what the budget had");
}

#[test]
fn writes_of_a_pipeline_that_are_refused_as_busy_pause_together() {
    let server = FakeServer::start();
    let space = server.namespace();
    server.store.busy.store(8, Ordering::SeqCst);
    server.store.busy_pause_ms.store(250, Ordering::SeqCst);
    let options = WriteOptions { timeout: Some(Duration::from_secs(20)), ..Default::default() };
    let mut pipeline = space.pipeline(8);
    #[expect(clippy::disallowed_methods, reason = "how long it takes is the question")]
    let begin = std::time::Instant::now();
    for tag in 0..8u32 {
        let key = tag.to_le_bytes().to_vec();
        assert!(pipeline.put(tag, key, b"v".to_vec(), options.clone()).is_none());
    }
    while let Some((_, result)) = pipeline.finish_one() {
        result.unwrap();
    }
    // One after another they would take two seconds.
    let took = begin.elapsed();
    assert!(took < Duration::from_millis(1_500), "{took:?}");
}

#[test]
fn a_lost_connection_leaves_a_write_unsure_and_a_read_is_tried_again() {
    let server = FakeServer::start();
    let space = server.namespace();
    server.store.hang_up.store(true, Ordering::SeqCst);
    let error = space.put(b"k", b"v").unwrap_err();
    assert_eq!(error.class(), Class::MayBeApplied, "{error}");
    space.put(b"k", b"v").unwrap();
    server.store.hang_up.store(true, Ordering::SeqCst);
    assert_eq!(space.get(b"k").unwrap(), Some(b"v".to_vec()));
}

#[test]
fn a_write_with_a_once_id_is_tried_again() {
    let mut facts = facts();
    facts.welcome.features = FEATURE_ONCE;
    let server = FakeServer::with(facts);
    let space = server.namespace();
    server.store.hang_up.store(true, Ordering::SeqCst);
    space.put(b"k", b"v").unwrap();
}

#[test]
fn no_operation_outlives_its_deadline() {
    let server = FakeServer::start();
    let space = server.namespace();
    let timeout = Some(Duration::from_millis(50));
    let error = space.read(b"never", &ReadOptions { timeout, ..Default::default() }).unwrap_err();
    assert_eq!(error.class(), Class::NotStarted, "{error}");
    let options = WriteOptions { timeout, ..Default::default() };
    let error = space.put_with(b"never", b"v", &options).unwrap_err();
    assert_eq!(error.class(), Class::MayBeApplied, "{error}");
}

#[test]
fn a_false_condition_tells_the_live_version() {
    let server = FakeServer::start();
    let space = server.namespace();
    let if_absent = WriteOptions { condition: Condition::IfAbsent, ..Default::default() };
    space.put_with(b"k", b"one", &if_absent).unwrap();
    let error = space.put_with(b"k", b"two", &if_absent).unwrap_err();
    assert_eq!(error, Error::ConditionFailed { current: version(3), context: None });
    let condition = Condition::IfVersion(version(3));
    space.put_with(b"k", b"four", &WriteOptions { condition, ..Default::default() }).unwrap();
}

#[test]
fn siblings_are_an_error_or_are_resolved_and_written_back() {
    let server = FakeServer::start();
    let space = server.namespace();
    space.put(b"sibling", b"a").unwrap();
    space.put(b"sibling", b"b").unwrap();
    assert_eq!(space.get(b"sibling").unwrap_err(), Error::Siblings { count: 2 });
    let join = |siblings: &[Sibling]| {
        siblings.iter().flat_map(|sibling| sibling.value.clone()).collect::<Vec<u8>>()
    };
    let resolving = space.clone().with_resolver(join);
    assert_eq!(resolving.get(b"sibling").unwrap(), Some(b"ab".to_vec()));
    assert_eq!(space.get(b"sibling").unwrap(), Some(b"ab".to_vec()), "written back");
}

#[test]
fn a_batch_is_split_by_shard_and_answered_in_order() {
    let server = FakeServer::start();
    let space = server.namespace();
    let key = |i: u8| vec![b'b', i];
    let mut operations: Vec<BatchOperation> = (0..30)
        .map(|i| BatchOperation::Put { key: key(i), value: vec![i], options: Default::default() })
        .collect();
    assert!(space.batch(&operations, None).iter().all(Result::is_ok));
    operations =
        (0..30).map(|i| BatchOperation::Get { key: key(i), options: Default::default() }).collect();
    operations.push(BatchOperation::Get { key: b"busy".to_vec(), options: Default::default() });
    operations.push(BatchOperation::Get { key: Vec::new(), options: Default::default() });
    let results = space.batch(&operations, None);
    for i in 0..30u8 {
        let Ok(BatchAnswer::Read(read)) = &results[usize::from(i)] else { panic!("{results:?}") };
        assert_eq!(read.values[0].value, [i]);
    }
    assert!(matches!(results[30], Err(Error::NotStarted { .. })));
    assert!(matches!(results[31], Err(Error::Refused { .. })));
}

#[test]
fn a_scan_sees_every_record_once_in_order() {
    let server = FakeServer::start();
    let space = server.namespace();
    for i in 0..100u8 {
        space.put(&[b's', i], &[i]).unwrap();
    }
    let records: Vec<Record> = space.scan(ScanOptions::default()).collect::<Result<_>>().unwrap();
    assert_eq!(records.len(), 100);
    let order = |record: &Record| (record.token, record.key.clone());
    assert!(records.windows(2).all(|pair| order(&pair[0]) < order(&pair[1])));
}

#[test]
fn stats_admin_and_ping_answer() {
    let server = FakeServer::start();
    let client = server.client();
    assert_eq!(client.stats().unwrap(), r#"{"gets":1}"#);
    assert_eq!(client.admin("ns.list", "{}", None).unwrap(), "ns.list:{}");
    let error = client.admin("fail", "{}", None).unwrap_err();
    assert!(matches!(error, Error::Refused { status: Status::FAILED, .. }), "{error}");
    client.ping().unwrap();
}

#[test]
fn a_draining_server_is_left_without_an_error() {
    let server = FakeServer::start();
    let space = server.namespace();
    server.store.drain.store(true, Ordering::SeqCst);
    for i in 0..20u8 {
        space.put(&[i], b"v").unwrap();
    }
}

#[test]
fn an_unknown_namespace_is_named() {
    let mut facts = facts();
    facts.welcome.namespaces.push(NamespaceFact {
        id: NamespaceId(2),
        mode: Mode::Siblings,
        name: "carts".to_owned(),
    });
    let client = FakeServer::with(facts).client();
    let error = client.namespace("nobody").err().unwrap();
    assert_eq!(error, Error::NoNamespace { name: "nobody".to_owned() });
    let carts = client.namespace("carts").unwrap().asynchronous();
    assert_eq!((carts.id(), carts.mode(), carts.name()), (NamespaceId(2), Mode::Siblings, "carts"));
}
