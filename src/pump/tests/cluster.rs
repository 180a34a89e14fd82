//! Pumps of several nodes, one shard each, whose letters arrive in order a turn later.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use annulus_cluster::tracking::PeerShard;
use annulus_cluster::{NodeId, NodeInfo, Topology, Weight};
use annulus_engine::model::{PartitionId, Timestamp, TokenRange};
use annulus_net::wire::frame::Opcode;
use annulus_net::wire::hello::Node as NodeFact;
use annulus_net::wire::response;
use annulus_net::wire::scan::Scan;
use futures_util::lock::Mutex;
use serde_json::Value;

use super::*;
use crate::commands::{
    Command, Named, NsChange, NsOutcome, Placement, RingQuery, RingReply, StatusReply,
    apply_named_to_namespaces,
};
use crate::metrics::NodeSnapshot;
use crate::namespaces::{self, Settings};
use crate::registers::Registers;

const BITS: u32 = 6;
const MS: u64 = 1_000_000;

/// The desk of a node that keeps its votes on disk, and its namespaces in memory.
struct MemoryDesk {
    node: u32,
    disk: SimDisk,
    registers: Rc<Mutex<Registers>>,
    catalogue: RefCell<Catalogue>,
    changed: Cell<bool>,
}

impl MemoryDesk {
    fn set(&self, catalogue: Catalogue) {
        *self.catalogue.borrow_mut() = catalogue;
        self.changed.set(true);
    }

    fn carry_out(&self, command: &str, arguments: &str) -> Result<Vec<u8>, (Status, String)> {
        let command = Command::parse(command, arguments).unwrap();
        if command == Command::Status {
            let placement = Placement {
                address: format!("h:{}", self.node),
                dc: "dc1".into(),
                rack: "rack1".into(),
                state: "up",
                weight: 100,
                partition_bits: BITS,
            };
            let numbers = NodeSnapshot { node: self.node, ..NodeSnapshot::default() };
            return Ok(serde_json::to_vec(&StatusReply::of_one(&placement, &numbers)).unwrap());
        }
        panic!("{} is not the node's own business", command.name());
    }
}

impl AdminDesk for MemoryDesk {
    fn begin(&self, command: &str, arguments: &str) -> AdminJob {
        Box::pin(std::future::ready(self.carry_out(command, arguments)))
    }

    fn client_address(&self) -> String {
        format!("h:{}", self.node)
    }

    fn note_client(&self, _node: NodeId, _address: &str, _shards: u32) {}

    fn catalogue(&self) -> Catalogue {
        self.catalogue.borrow().clone()
    }

    fn apply(
        &self,
        command: &str,
        arguments: &str,
        catalogue: &Catalogue,
    ) -> Result<NsOutcome, (Status, String)> {
        apply_named_to_namespaces(command, arguments, catalogue, Compression::Lz4)
    }

    fn vote(&self, wall: WallMicros, request: &[u8]) -> Vote {
        let (registers, disk) = (Rc::clone(&self.registers), self.disk.clone());
        let (request, known) = (request.to_vec(), self.catalogue());
        Box::pin(async move {
            let mut registers = registers.lock().await;
            let vote = registers.vote(&disk, Path::new("data"), wall, &request, &known).await;
            vote.map_err(|no_vote| no_vote.to_string())
        })
    }

    fn adopt_catalogue(&self, bytes: &[u8]) -> AdminJob {
        let path = Path::new(namespaces::FILE_NAME);
        let catalogue = Catalogue::decode(bytes, path).unwrap();
        let is_newer = catalogue.generation() > self.catalogue.borrow().generation();
        if is_newer {
            self.set(catalogue);
        }
        Box::pin(std::future::ready(Ok(Vec::new())))
    }
}

/// What leaves a node in a turn.
#[derive(Default)]
struct Post(Vec<(PeerShard, Vec<u8>)>);

impl Links for Post {
    fn send(&mut self, to: PeerShard, _lane: Lane, message: &[u8]) -> Result<(), LinkDown> {
        self.0.push((to, message.to_vec()));
        Ok(())
    }

    fn is_up(&self, _node: NodeId) -> bool {
        true
    }
}

/// Answers by number.
#[derive(Default)]
struct Answers(BTreeMap<u64, (Status, Vec<u8>)>);

impl Peers for Answers {
    fn send(&mut self, _shard: u32, message: Message) -> Result<(), Message> {
        let Message::Answer { id, status, body } = message else { return Err(message) };
        assert!(
            self.0.insert(id, (status, body.value().to_vec())).is_none(),
            "request {id} was answered twice"
        );
        Ok(())
    }
}

struct Node {
    pump: Pump<SimDisk, SimRuntime>,
    disk: SimDisk,
    desk: Rc<MemoryDesk>,
    answers: Answers,
    inbox: Vec<(PeerShard, Vec<u8>)>,
}

struct Cluster {
    executor: SimExecutor,
    nodes: Vec<Node>,
    cut: BTreeSet<u32>,
    next_id: u64,
}

fn topology(own: u32, count: u32) -> Rc<Topology> {
    let nodes = (1..=count).map(|id| NodeInfo {
        id: NodeId(id),
        peer: format!("p:{id}"),
        client: String::new(),
        dc: "dc1".into(),
        rack: "rack1".into(),
        weight: Weight::ONE,
    });
    Rc::new(Topology::new(NodeId(own), BITS, nodes.collect(), [3]).unwrap())
}

impl Cluster {
    fn new(count: u32) -> Cluster {
        let executor = SimExecutor::new(7);
        let nodes = (1..=count).map(|id| Cluster::node(&executor, id, count)).collect();
        let mut cluster = Cluster { executor, nodes, cut: BTreeSet::new(), next_id: 0 };
        for (own, other) in cluster.pairs() {
            cluster.nodes[own as usize - 1].pump.peer_up(NodeId(other), 1);
        }
        cluster.run(500 * MS);
        cluster
    }

    fn node(executor: &SimExecutor, id: u32, count: u32) -> Node {
        let runtime = executor.runtime();
        let disk = SimDisk::new(&runtime, SimDiskOptions::seeded(u64::from(id)));
        let mut options =
            Options { partition_bits: BITS, cache_size: 1 << 20, ..Options::default() };
        options.memtable_size = 256 << 10;
        options.log.segment_size = 256 << 10;
        options.space = SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 };
        options.replicated = true;
        let identity = Identity {
            cluster: 7,
            node: OriginId(id),
            shard: 0,
            shard_count: 1,
            hash_seed: 3,
            partition_bits: BITS,
            created: WallMicros(1),
        };
        let dir = Path::new("data/shard-000");
        let shard = executor.run(async {
            disk.create_dir(Path::new("data")).await.expect("a new disk");
            disk.sync_dir(Path::new("")).await.expect("a new disk");
            Shard::open(disk.clone(), runtime.clone(), dir, &identity, options, None).await
        });
        let known = |id| NodeFact { id: OriginId(id), shard_count: 1, address: format!("h:{id}") };
        let welcome = Welcome {
            version: VERSION,
            partition_bits: u8::try_from(BITS).unwrap(),
            shard_count: 1,
            shard: 0,
            node: OriginId(id),
            features: 0,
            cluster: 7,
            hash_seed: 3,
            map_version: 1,
            wall_us: 0,
            limits: Limits::default(),
            runs: Vec::new(),
            nodes: (1..=count).map(known).collect(),
            namespaces: Vec::new(),
        };
        let catalogue = Catalogue::new(Compression::Lz4);
        let desk = Rc::new(MemoryDesk {
            node: id,
            disk: disk.clone(),
            registers: Rc::new(Mutex::new(Registers::new(NodeId(id)))),
            catalogue: RefCell::new(catalogue.clone()),
            changed: Cell::new(false),
        });
        let options = PumpOptions {
            facts: ServerFacts { welcome, options: ConnectionOptions::default() },
            map: ShardMap::new(0, 1, BITS),
            secret: ContextSecret([1, 2]),
            catalogue: Rc::new(catalogue.clone()),
            message_memory: 1 << 20,
            desk: Rc::clone(&desk) as Rc<dyn AdminDesk>,
            replication: Some(ReplicationOptions {
                topology: topology(id, count),
                life: 1,
                room_bytes_max: u64::MAX,
                rules: annulus_cluster::moves::plan::Rules::ALL,
            }),
        };
        let mut pump = Pump::new(shard.expect("the shard opens"), runtime, options);
        pump.set_catalogue(Rc::new(catalogue));
        Node { pump, disk, desk, answers: Answers::default(), inbox: Vec::new() }
    }

    fn pairs(&self) -> Vec<(u32, u32)> {
        let count = u32::try_from(self.nodes.len()).unwrap();
        (1..=count)
            .flat_map(|a| (1..=count).filter(move |b| *b != a).map(move |b| (a, b)))
            .collect()
    }

    /// Nobody reaches the node any more.
    fn cut_off(&mut self, node: u32) {
        self.cut.insert(node);
        for (own, other) in self.pairs() {
            if own == node || other == node {
                self.nodes[own as usize - 1].pump.peer_down(NodeId(other));
            }
        }
    }

    fn turn(&mut self) {
        let runtime = self.executor.runtime();
        let mut posted = Vec::new();
        for (id, node) in (1..).zip(&mut self.nodes) {
            node.pump.tick(runtime.now());
            if node.desk.changed.take() {
                node.pump.set_catalogue(Rc::new(node.desk.catalogue.borrow().clone()));
            }
            for (from, bytes) in std::mem::take(&mut node.inbox) {
                node.pump.peer_message(from, &bytes, &mut NoWires);
            }
            let mut post = Post::default();
            node.pump.turn(&mut NoWires, &mut node.answers, &mut post);
            let from = PeerShard { node: NodeId(id), shard: 0 };
            posted.extend(post.0.into_iter().map(|(to, bytes)| (from, to, bytes)));
        }
        for (from, to, bytes) in posted {
            if !self.cut.contains(&from.node.0) && !self.cut.contains(&to.node.0) {
                self.nodes[to.node.0 as usize - 1].inbox.push((from, bytes));
            }
        }
        self.executor.run(runtime.sleep_until(runtime.now().after_nanos(MS / 2)));
    }

    fn run(&mut self, nanos: u64) {
        let until = self.executor.runtime().now().after_nanos(nanos);
        while self.executor.runtime().now() < until {
            self.turn();
        }
    }

    fn wait(&mut self, at: u32, id: u64) -> (Status, Vec<u8>) {
        for _ in 0..100_000 {
            if let Some(answer) = self.nodes[at as usize - 1].answers.0.remove(&id) {
                return answer;
            }
            self.turn();
        }
        panic!("request {id} was not answered");
    }

    fn request(&mut self, at: u32, opcode: Opcode, body: Vec<u8>) -> (Status, Vec<u8>) {
        self.next_id += 1;
        let id = self.next_id;
        let now = self.executor.runtime().now();
        let deadline = now.after_nanos(5_000 * MS);
        let body = body.into();
        let message = Message::Request { from: 1, id, deadline, opcode, body };
        let pump = &mut self.nodes[at as usize - 1].pump;
        pump.tick(now);
        pump.message(message, &mut NoWires);
        self.wait(at, id)
    }

    fn operation(&mut self, at: u32, operation: &Operation<'_>) -> (Status, Vec<u8>) {
        let mut body = Vec::new();
        operation.encode(&mut body);
        self.request(at, operation.opcode(), body)
    }

    fn put(
        &mut self,
        at: u32,
        namespace: u32,
        key: &str,
        flags: OperationFlags,
    ) -> (Status, Vec<u8>) {
        self.operation(
            at,
            &Operation::Put(Put {
                token: Token::of_key(key.as_bytes(), 3),
                namespace: NamespaceId(namespace),
                key: key.as_bytes(),
                value: b"value".into(),
                ttl: Ttl::Never,
                options: WriteOptions { flags, ..WriteOptions::default() },
            }),
        )
    }

    fn get(
        &mut self,
        at: u32,
        namespace: u32,
        key: &str,
        flags: OperationFlags,
    ) -> (Status, Vec<u8>) {
        self.operation(
            at,
            &Operation::Get(Get {
                token: Token::of_key(key.as_bytes(), 3),
                namespace: NamespaceId(namespace),
                key: key.as_bytes(),
                level: Level::default(),
                primary: Level::default(),
                max_staleness_ms: 0,
                flags,
            }),
        )
    }

    fn admin(&mut self, at: u32, command: &Command) -> (Status, Vec<u8>) {
        let id = self.begin_admin(at, command);
        self.wait(at, id)
    }

    fn begin_admin(&mut self, at: u32, command: &Command) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        let now = self.executor.runtime().now();
        let pump = &mut self.nodes[at as usize - 1].pump;
        pump.tick(now);
        let origin = Origin::Shard { shard: 1, id };
        let deadline = now.after_nanos(5_000 * MS);
        pump.begin_admin(origin, deadline, command.name(), &command.arguments());
        id
    }

    fn create(&mut self, at: u32, name: &str, settings: Settings) -> (Status, Value) {
        let change = NsChange { name: name.into(), settings };
        let (status, body) = self.admin(at, &Command::NsCreate(change));
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    /// All keys of `default`, page by page; and on how many pages they were.
    fn export(&mut self, at: u32) -> (Vec<String>, u32) {
        let (mut keys, mut pages) = (Vec::new(), 0);
        let mut next = Some((Token::MIN, Vec::new()));
        while let Some((first, after)) = next {
            let range = TokenRange { first, last: Token::MAX };
            let scan = Scan {
                namespace: NamespaceId(0),
                count_max: 20,
                bytes_max: 0,
                flags: 0,
                range,
                after: &after,
            };
            let mut body = Vec::new();
            scan.encode(&mut body);
            let (status, page) = self.request(at, Opcode::Scan, body);
            assert_eq!(status, Status::OK);
            pages += 1;
            let page = response::PageRef::decode(&page, NamespaceId(0)).expect("a page");
            for record in page.records {
                keys.push(String::from_utf8(record.key.to_vec()).unwrap());
            }
            next = page.next.map(|(token, key)| (token, key.to_vec()));
        }
        (keys, pages)
    }
}

#[test]
fn a_namespace_is_known_where_it_was_made_and_no_id_is_given_twice() {
    let mut cluster = Cluster::new(3);
    let mut ids = BTreeSet::new();
    for (at, name) in [(3, "a"), (1, "b"), (2, "c"), (3, "d")] {
        let (status, reply) = cluster.create(at, name, Settings::default());
        assert_eq!((status, reply["name"].as_str()), (Status::OK, Some(name)));
        let id = u32::try_from(reply["id"].as_u64().unwrap()).unwrap();
        assert!(ids.insert(id), "{ids:?}");
        // At once, where it was made; the write needs a second replica that knows it, too.
        let (status, _) = cluster.put(at, id, "k", OperationFlags::default());
        assert_eq!(status, Status::OK, "{name}");
    }
    let (status, _) = cluster.create(2, "a", Settings::default());
    assert_eq!(status, Status::FAILED);
    let (status, _) = cluster.admin(2, &Command::NsDrop(Named { name: "a".into() }));
    assert_eq!(status, Status::OK);
    let generations: BTreeSet<u64> =
        cluster.nodes.iter().map(|node| node.desk.catalogue.borrow().generation()).collect();
    assert_eq!(generations.len(), 1);
}

#[test]
fn any_member_may_be_away_and_namespaces_change_without_it() {
    for away in 1..=3u32 {
        let mut cluster = Cluster::new(3);
        cluster.cut_off(away);
        let mut ids = BTreeSet::new();
        for (at, name) in (1..=3u32).filter(|at| *at != away).zip(["a", "b"]) {
            let (status, reply) = cluster.create(at, name, Settings::default());
            assert_eq!(status, Status::OK, "without {away}, at {at}: {reply}");
            assert!(ids.insert(reply["id"].as_u64().unwrap()));
        }
    }
}

#[test]
fn without_a_majority_of_the_holders_namespaces_stay_as_they_are_and_keys_do_not() {
    let mut cluster = Cluster::new(3);
    cluster.cut_off(1);
    cluster.cut_off(3);
    let change = NsChange { name: "a".into(), settings: Settings::default() };
    let (status, body) = cluster.admin(2, &Command::NsCreate(change));
    assert_eq!(status, Status::UNAVAILABLE);
    let failure = response::decode_failure(status, &body).unwrap();
    let expected = "namespaces are changed by 2 of the nodes 1, 2, 3; 1 can be reached";
    assert_eq!(failure.message, expected);
    let (status, _) = cluster.get(2, 0, "k", OperationFlags::default());
    assert_eq!(status, Status::UNAVAILABLE);
    assert!(cluster.nodes.iter().all(|node| node.desk.catalogue.borrow().by_name("a").is_none()));
}

/// One copy, its home away: the member that was asked wrote it to its own disk, and said that the home
/// had it.
#[test]
fn a_strict_write_of_one_copy_is_refused_while_its_home_is_away() {
    let mut cluster = Cluster::new(3);
    let settings = Settings { n: Some(1), ..Settings::default() };
    assert_eq!(cluster.create(1, "one", settings).0, Status::OK);
    cluster.run(1_000 * MS);
    cluster.cut_off(3);
    let mut statuses = std::collections::BTreeMap::new();
    for i in 0..40 {
        let (status, _) = cluster.put(1, 1, &format!("key{i}"), OperationFlags::STRICT);
        *statuses.entry(status).or_insert(0) += 1;
    }
    let refused = statuses.get(&Status::UNAVAILABLE).copied().unwrap_or(0);
    assert!(refused > 0 && statuses.get(&Status::OK) == Some(&(40 - refused)), "{statuses:?}");
}

#[test]
fn members_that_change_namespaces_at_once_give_no_id_twice() {
    let mut cluster = Cluster::new(5);
    let mut asked = Vec::new();
    for at in 1..=5 {
        for name in ["same".to_owned(), format!("own-{at}")] {
            let change = NsChange { name: name.clone(), settings: Settings::default() };
            asked.push((at, name, cluster.begin_admin(at, &Command::NsCreate(change))));
        }
    }
    let mut made = BTreeMap::new();
    for (at, name, id) in asked {
        let (status, body) = cluster.wait(at, id);
        match status {
            Status::OK => {
                let reply: Value = serde_json::from_slice(&body).unwrap();
                let id = reply["id"].as_u64().unwrap();
                assert!(made.insert(id, name.clone()).is_none(), "{id} is given twice");
            }
            _ => assert_eq!((status, name.as_str()), (Status::FAILED, "same")),
        }
    }
    assert_eq!(made.len(), 6);
    for node in &cluster.nodes {
        let catalogue = node.desk.catalogue.borrow();
        assert_eq!(catalogue.generation(), 7);
        assert_eq!(made.len(), catalogue.iter().filter(|it| it.id.0 > 0).count());
        assert!(catalogue.iter().skip(1).all(|it| made[&u64::from(it.id.0)] == it.name));
    }
}

#[test]
fn a_catalogue_that_a_node_missed_comes_by_itself() {
    let mut cluster = Cluster::new(3);
    cluster.cut_off(3);
    let (status, _) = cluster.create(2, "a", Settings::default());
    assert_eq!(status, Status::OK);
    cluster.cut.clear();
    for node in [1, 2] {
        cluster.nodes[2].pump.peer_up(NodeId(node), 1);
        cluster.nodes[node as usize - 1].pump.peer_up(NodeId(3), 1);
    }
    // The first message is lost; it is said again.
    cluster.cut.insert(3);
    cluster.run(MS);
    cluster.cut.clear();
    cluster.run(11_000 * MS);
    assert!(cluster.nodes[2].desk.catalogue.borrow().by_name("a").is_some());
}

#[test]
fn every_member_exports_the_whole_ring() {
    let mut cluster = Cluster::new(5);
    let mut all = BTreeSet::new();
    for i in 0..150 {
        let key = format!("key{i}");
        let (status, _) = cluster.put(i % 5 + 1, 0, &key, OperationFlags::default());
        assert_eq!(status, Status::OK);
        all.insert(key);
    }
    // A home reads what it has: let the last write reach all of them.
    cluster.run(200 * MS);
    let mut orders = BTreeSet::new();
    for at in 1..=5 {
        let (keys, _) = cluster.export(at);
        assert_eq!((keys.len(), keys.iter().cloned().collect()), (all.len(), all.clone()), "{at}");
        orders.insert(keys);
    }
    assert_eq!(orders.len(), 1, "in token order everywhere");
    // Three of five homes are enough for any page.
    cluster.cut_off(2);
    cluster.cut_off(4);
    assert_eq!(cluster.export(5).0.len(), all.len());
}

#[test]
fn three_members_with_three_copies_export_from_their_own() {
    let mut cluster = Cluster::new(3);
    for i in 0..30 {
        let (status, _) = cluster.put(1, 0, &format!("key{i}"), OperationFlags::default());
        assert_eq!(status, Status::OK);
    }
    cluster.run(200 * MS);
    cluster.cut_off(3);
    assert_eq!(cluster.export(3), (cluster.export(1).0, 2));
}

#[test]
fn the_ring_is_the_same_from_every_member_and_names_who_stands_in() {
    let mut cluster = Cluster::new(5);
    let (status, _) = cluster.create(1, "two", Settings { n: Some(2), ..Settings::default() });
    assert_eq!(status, Status::OK);
    for (ns, copies) in [(None, 3), (Some("two".to_owned()), 2)] {
        let query = Command::Ring(RingQuery { ns, partition: Some(17), ..RingQuery::default() });
        let rings: BTreeSet<Vec<u8>> = (1..=5).map(|at| cluster.admin(at, &query).1).collect();
        assert_eq!(rings.len(), 1);
        let ring: RingReply = serde_json::from_slice(rings.first().unwrap()).unwrap();
        let row = &ring.rows[0];
        assert_eq!((row.replicas.len(), row.fallbacks.len()), (copies, 5 - copies));
        let all = row.replicas.iter().chain(&row.fallbacks);
        let nodes: BTreeSet<u32> = all.clone().map(|copy| copy.node).collect();
        assert_eq!(nodes, BTreeSet::from([1, 2, 3, 4, 5]));
        for copy in all {
            assert_eq!(
                (copy.shard, copy.address.clone()),
                (Some(0), Some(format!("h:{}", copy.node)))
            );
        }
    }
    let query = Command::Ring(RingQuery { ns: Some("none".into()), ..RingQuery::default() });
    assert_eq!(cluster.admin(2, &query).0, Status::FAILED);
}

#[test]
fn status_has_a_row_a_member_and_guesses_nothing() {
    let mut cluster = Cluster::new(4);
    cluster.cut_off(3);
    // The second has lost sight of the fourth, which the first still sees.
    cluster.nodes[1].pump.peer_down(NodeId(4));
    let (status, body) = cluster.admin(2, &Command::Status);
    assert_eq!(status, Status::OK);
    let status: StatusReply = serde_json::from_slice(&body).unwrap();
    let states: Vec<&str> = status.nodes.iter().map(|row| row.state.as_str()).collect();
    assert_eq!(states, ["up", "up", "down", "unreachable"]);
    let (known, unknown) = (&status.nodes[0], &status.nodes[2]);
    assert!(known.bytes.is_some() && unknown.bytes.is_none() && unknown.p99_us.is_none());
    assert_eq!(unknown.address.as_deref(), Some("h:3"));
    let held: u32 = status.nodes.iter().map(|row| row.partitions).sum();
    assert_eq!(held, 3 << BITS);
}

#[test]
fn status_says_what_gossip_has_of_each_member_and_coordinators_believe_it() {
    let mut cluster = Cluster::new(4);
    cluster.run(3_000 * MS);
    let rows = |cluster: &mut Cluster| {
        let (_, body) = cluster.admin(2, &Command::Status);
        serde_json::from_slice::<StatusReply>(&body).unwrap().nodes
    };
    for row in rows(&mut cluster) {
        assert_eq!(row.gossip.as_deref(), Some("alive"), "{}", row.id);
        assert_eq!(row.incarnation, Some((1 << 32) + 1));
        assert!(row.heartbeat.is_some_and(|heartbeat| heartbeat > 3), "{row:?}");
    }
    // Its links stand, and nothing comes through them.
    cluster.cut.insert(3);
    cluster.run(15_000 * MS);
    let gossip: Vec<String> = rows(&mut cluster).into_iter().filter_map(|row| row.gossip).collect();
    assert_eq!(gossip, ["alive", "alive", "down", "alive"]);
    // Nobody waits for it: a write that all homes must have is refused or has other copies.
    let before = cluster.executor.runtime().now();
    for key in ["a", "b", "c", "d", "e", "f"] {
        let (status, _) = cluster.put(1, 0, key, OperationFlags::SLOPPY);
        assert_eq!(status, Status::OK, "{key}");
    }
    assert!(cluster.executor.runtime().now().nanos_since(before) < 200 * MS);
    cluster.cut.clear();
    cluster.run(15_000 * MS);
    assert!(rows(&mut cluster).iter().all(|row| row.gossip.as_deref() == Some("alive")));
}

fn steps(trace: &[u8]) -> Vec<(String, u64)> {
    let trace: Value = serde_json::from_slice(trace).expect("a trace is JSON");
    let step = |step: &Value| {
        assert!(step["microseconds"].is_u64(), "{step}");
        (step["step"].as_str().unwrap().to_owned(), step["node"].as_u64().unwrap_or(0))
    };
    trace["steps"].as_array().unwrap().iter().map(step).collect()
}

#[test]
fn a_trace_says_who_was_asked_and_who_answered() {
    let mut cluster = Cluster::new(3);
    let (status, body) = cluster.put(1, 0, "k", OperationFlags::TRACE);
    assert_eq!(status, Status::OK);
    let facts = response::decode_write(&body).unwrap();
    assert!(facts.acks >= 2 && facts.primary >= 2 && facts.durable >= 2, "{facts:?}");
    let taken = steps(facts.trace);
    assert_eq!(taken[0], ("stamp".to_owned(), 1));
    let count = |what: &str| taken.iter().filter(|(step, _)| step == what).count();
    // An acknowledgement of the same moment may be noted beyond those that were needed.
    assert_eq!(count("ask"), 2);
    assert!(count("ack") >= usize::from(facts.acks), "{taken:?}");
    // By then all have told how far they are.
    cluster.run(2_000 * MS);
    let (status, body) = cluster.get(2, 0, "k", OperationFlags::TRACE);
    assert_eq!(status, Status::OK);
    let read = response::ReadReply::decode(&body).unwrap();
    assert!(read.facts.primaries >= 2 && read.facts.as_of > Timestamp::ZERO);
    let taken = steps(read.facts.trace);
    assert!(taken.contains(&("reply".to_owned(), 2)) && taken.contains(&("ask".to_owned(), 2)));
    let (_, body) = cluster.get(2, 0, "k", OperationFlags::default());
    assert!(response::ReadReply::decode(&body).unwrap().facts.trace.is_empty());
}

#[test]
fn a_shard_that_was_opened_anew_asks_everybody_again_before_it_closes_its_gap() {
    let mut cluster = Cluster::new(3);
    let partition = Token::of_key(b"k", 3).partition(BITS);
    let (status, _) = cluster.put(1, 0, "k", OperationFlags::default());
    assert_eq!(status, Status::OK);
    cluster.run(3_000 * MS);
    assert!(cluster.nodes[0].pump.shard().lost_after().is_none());
    // Nothing reaches the others any more, nor do they answer.
    cluster.cut.insert(1);
    cluster.nodes[0].disk.inject(Rule::nth(Op::Write, 1, Fault::Eio).on(".log"));
    let (status, _) = cluster.put(1, 0, "k", OperationFlags::default());
    assert_eq!(status, Status::MAY_BE_APPLIED);
    cluster.run(3_000 * MS);
    assert_eq!(cluster.nodes[0].pump.snapshot().metrics.counters.log_reopened, 1);
    // They might have the write that was lost here; what they said before is no answer.
    assert!(cluster.nodes[0].pump.shard().lost_after().is_some());
    cluster.cut.clear();
    cluster.run(5_000 * MS);
    assert!(cluster.nodes[0].pump.shard().lost_after().is_none());
    for at in 1..=3 {
        let (status, _) = cluster.put(at, 0, "k", OperationFlags::default());
        assert_eq!(status, Status::OK, "at {at}");
    }
    cluster.run(3_000 * MS);
    let seen = |node: usize| cluster.nodes[node].pump.shard().seen(PartitionId(partition.0));
    assert!(seen(0).covers(&seen(1)) && seen(2).covers(&seen(0)));
    let lag = cluster.nodes[0].pump.snapshot().standing.as_of_lag_ms;
    assert!(lag.is_some_and(|lag| lag < 2_000), "{lag:?}");
}
