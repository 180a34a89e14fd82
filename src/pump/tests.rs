//! The pump on a simulated disk, spoken to as another shard of the node would.

use std::path::Path;
use std::rc::Rc;

use annulus_engine::disk::Disk;
use annulus_engine::identity::Identity;
use annulus_engine::model::causality::ContextSecret;
use annulus_engine::model::{Instant, NamespaceId, OriginId, Token, WallMicros};
use annulus_engine::options::{Options, SpaceOptions};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::Shard;
use annulus_engine::sim::{Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor, SimRuntime};
use annulus_net::server_connection::{ConnectionOptions, ServerFacts};
use annulus_net::wire::FrameHeader;
use annulus_net::wire::fields::{Condition, Level, OperationFlags, Ttl};
use annulus_net::wire::frame::HEADER_SIZE;
use annulus_net::wire::hello::{Hello, Limits, VERSION, Welcome};
use annulus_net::wire::operation::{Get, Operation, Put, WriteOptions};
use annulus_net::wire::request::Outgoing;
use annulus_net::wire::slices::{FrameWriter, Head};
use annulus_net::wire::status::Status;

use super::*;
use crate::commands::{NsOutcome, apply_named_to_namespaces};
use crate::config::Compression;

/// No connections: everything comes by message.
struct NoWires;

impl Wires for NoWires {
    fn out(&mut self, _connection: ConnectionKey) -> Option<&mut Vec<u8>> {
        None
    }
    fn unsent(&self, _connection: ConnectionKey) -> usize {
        0
    }
    fn resume(&mut self, _connection: ConnectionKey) {}
    fn close(&mut self, _connection: ConnectionKey) {}
}

/// Gathers the answers.
#[derive(Default)]
struct Asker(BTreeMap<u64, Status>);

impl Peers for Asker {
    fn send(&mut self, _shard: u32, message: Message) -> Result<(), Message> {
        let Message::Answer { id, status, .. } = message else { return Err(message) };
        assert!(self.0.insert(id, status).is_none(), "request {id} was answered twice");
        Ok(())
    }
}

mod cluster;

struct NoDesk;

impl AdminDesk for NoDesk {
    fn begin(&self, _command: &str, _arguments: &str) -> AdminJob {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn client_address(&self) -> String {
        String::new()
    }

    fn note_client(&self, _node: annulus_cluster::NodeId, _address: &str, _shards: u32) {}

    fn catalogue(&self) -> Catalogue {
        Catalogue::new(Compression::Lz4)
    }

    fn apply(
        &self,
        command: &str,
        arguments: &str,
        catalogue: &Catalogue,
    ) -> Result<NsOutcome, (Status, String)> {
        apply_named_to_namespaces(command, arguments, catalogue, Compression::Lz4)
    }

    fn vote(&self, _wall: WallMicros, _request: &[u8]) -> Vote {
        Box::pin(std::future::ready(Err("this node is on its own".to_owned())))
    }

    fn adopt_catalogue(&self, _bytes: &[u8]) -> AdminJob {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }
}

struct World {
    executor: SimExecutor,
    disk: SimDisk,
    pump: Pump<SimDisk, SimRuntime>,
    asker: Asker,
    next_id: u64,
}

impl World {
    fn new() -> World {
        let executor = SimExecutor::new(5);
        let runtime = executor.runtime();
        let disk = SimDisk::new(&runtime, SimDiskOptions::default());
        let mut options = Options { partition_bits: 6, cache_size: 1 << 20, ..Options::default() };
        options.memtable_size = 256 << 10;
        options.log.segment_size = 256 << 10;
        options.space = SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 };
        let identity = Identity {
            cluster: 7,
            node: OriginId(1),
            shard: 0,
            shard_count: 1,
            hash_seed: 3,
            partition_bits: 6,
            created: WallMicros(1),
        };
        let dir = Path::new("data/shard-000");
        let shard = executor.run(async {
            disk.create_dir(Path::new("data")).await.expect("a new disk");
            disk.sync_dir(Path::new("")).await.expect("a new disk");
            Shard::open(disk.clone(), runtime.clone(), dir, &identity, options, None).await
        });
        let welcome = Welcome {
            version: VERSION,
            partition_bits: 6,
            shard_count: 1,
            shard: 0,
            node: OriginId(1),
            features: 0,
            cluster: 7,
            hash_seed: 3,
            map_version: 1,
            wall_us: 0,
            limits: Limits::default(),
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: Vec::new(),
        };
        let options = PumpOptions {
            facts: ServerFacts { welcome, options: ConnectionOptions::default() },
            map: ShardMap::new(0, 1, 6),
            secret: ContextSecret([1, 2]),
            catalogue: Rc::new(Catalogue::new(Compression::Lz4)),
            message_memory: 1 << 20,
            desk: Rc::new(NoDesk),
            replication: None,
        };
        let pump = Pump::new(shard.expect("the shard opens"), runtime, options);
        World { executor, disk, pump, asker: Asker::default(), next_id: 0 }
    }

    fn ask(&mut self, operation: &Operation<'_>) -> u64 {
        let runtime = self.executor.runtime();
        self.pump.tick(runtime.now());
        let body = operation.to_pieces();
        self.next_id += 1;
        let (id, opcode) = (self.next_id, operation.opcode());
        let deadline = runtime.now().after_nanos(60_000_000_000);
        let message = Message::Request { from: 1, id, deadline, opcode, body };
        self.pump.message(message, &mut NoWires);
        id
    }

    fn put(&mut self, key: &str, condition: Condition) -> u64 {
        let key = key.as_bytes();
        self.ask(&Operation::Put(Put {
            token: Token::of_key(key, 3),
            namespace: NamespaceId(0),
            key,
            value: (&[7; 100]).into(),
            ttl: Ttl::Never,
            options: WriteOptions { condition, ..WriteOptions::default() },
        }))
    }

    fn get(&mut self, key: &str) -> u64 {
        let key = key.as_bytes();
        self.ask(&Operation::Get(Get {
            token: Token::of_key(key, 3),
            namespace: NamespaceId(0),
            key,
            level: Level::default(),
            primary: Level::default(),
            max_staleness_ms: 0,
            flags: OperationFlags::default(),
        }))
    }

    /// One turn, then a while of the shard's own tasks.
    fn turn(&mut self) -> Instant {
        let runtime = self.executor.runtime();
        self.pump.tick(runtime.now());
        self.pump.turn(&mut NoWires, &mut self.asker, &mut NoLinks);
        self.executor.run(runtime.sleep_until(runtime.now().after_nanos(300_000)));
        runtime.now()
    }

    fn answer(&mut self, id: u64) -> Status {
        for _ in 0..100_000 {
            if let Some(status) = self.asker.0.remove(&id) {
                return status;
            }
            self.turn();
        }
        panic!("request {id} was not answered");
    }

    fn poisoned(&self) -> u64 {
        self.pump.snapshot().gauges.log_poisoned
    }
}

#[test]
fn a_poisoned_log_costs_what_waited_and_the_shard_comes_back_by_itself() {
    let mut world = World::new();
    for i in 0..300 {
        let id = world.put(&format!("key{i}"), Condition::Always);
        assert_eq!(world.answer(id), Status::OK);
    }
    // The disk fails for the log, and fails again where it would be opened anew.
    world.disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on("log/").forever());
    let blind = world.put("blind", Condition::Always);
    let conditional = world.put("conditional", Condition::IfAbsent);
    assert_eq!(world.answer(blind), Status::MAY_BE_APPLIED);
    assert_eq!(world.answer(conditional), Status::MAY_BE_APPLIED);
    assert_eq!(world.poisoned(), 1);
    let begun = world.executor.runtime().now();
    let mut turns = 0;
    while world.executor.runtime().now().nanos_since(begun) < 2_000_000_000 {
        turns += 1;
        if turns % 500 == 0 {
            let (read, absent) = (world.get("key7"), world.get("no such key"));
            let refused = world.put("refused", Condition::Always);
            let refused_too = world.put("refused", Condition::IfAbsent);
            assert_eq!(world.answer(read), Status::OK);
            assert_eq!(world.answer(absent), Status::NOT_FOUND);
            assert_eq!(world.answer(refused), Status::UNAVAILABLE);
            assert_eq!(world.answer(refused_too), Status::UNAVAILABLE);
        }
        world.turn();
    }
    assert_eq!(world.poisoned(), 1);
    world.disk.clear_faults();
    let healed = world.executor.runtime().now();
    while world.poisoned() == 1 {
        let waited = world.turn().nanos_since(healed);
        assert!(waited < 15_000_000_000, "it came not back");
    }
    assert_eq!(world.pump.snapshot().metrics.counters.log_reopened, 1);
    let id = world.put("after", Condition::Always);
    assert_eq!(world.answer(id), Status::OK);
    let id = world.get("refused");
    assert_eq!(world.answer(id), Status::NOT_FOUND);
    for i in 0..300 {
        let id = world.get(&format!("key{i}"));
        assert_eq!(world.answer(id), Status::OK, "key{i}");
    }
}

#[test]
fn one_failure_is_over_in_a_blink() {
    let mut world = World::new();
    let id = world.put("before", Condition::Always);
    assert_eq!(world.answer(id), Status::OK);
    world.disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on(".log"));
    let id = world.put("waits", Condition::Always);
    assert_eq!(world.answer(id), Status::MAY_BE_APPLIED);
    let begun = world.executor.runtime().now();
    while world.poisoned() == 1 {
        world.turn();
    }
    let nanos = world.executor.runtime().now().nanos_since(begun);
    assert!(nanos < 200_000_000, "{nanos}");
    let id = world.get("before");
    assert_eq!(world.answer(id), Status::OK);
    let id = world.put("waits", Condition::Always);
    assert_eq!(world.answer(id), Status::OK);
}

#[test]
fn a_connection_that_was_closed_for_what_it_sent_leaves_nothing_behind() {
    let mut world = World::new();
    let key = ConnectionKey(7);
    world.pump.accepted(key);
    assert_eq!(world.pump.load().0, 1);
    let verdict = world.pump.received(key, &[0xff; 64], &mut Vec::new(), 0);
    assert_eq!(verdict, Verdict::Close);
    assert_eq!(world.pump.load(), (0, 0), "its requests in flight would hold up every stop");
    assert!(world.pump.is_idle());
}

#[test]
fn a_connection_that_comes_while_the_shard_drains_has_its_requests_refused() {
    let mut world = World::new();
    world.pump.drain(&mut NoWires);
    let key = ConnectionKey(7);
    world.pump.accepted(key);
    let (mut writer, mut bytes, mut out) = (FrameWriter::default(), Vec::new(), Vec::new());
    for request in [Outgoing::Hello(Hello::default()), Outgoing::Stats] {
        let head = Head { opcode: request.opcode().request(), ..Head::default() };
        let mut body = Vec::new();
        request.encode(&mut body);
        writer.owned_message(&mut bytes, head, body);
    }
    writer.flush_slices(&mut bytes, usize::MAX);
    assert_eq!(world.pump.received(key, &bytes, &mut out, 0), Verdict::Keep);
    let mut statuses = Vec::new();
    let mut at = 0;
    while let Some(head) = out[at..].first_chunk::<HEADER_SIZE>() {
        let header = FrameHeader::decode(head, at as u64).expect("a frame");
        statuses.push(header.status());
        at += header.frame_size();
    }
    assert_eq!(statuses, [Status::OK, Status::SHUTTING_DOWN]);
    assert!(world.pump.is_idle());
}
