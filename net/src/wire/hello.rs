//! HELLO: the first message of each direction. Who is there, what is allowed, where keys live.
//!
//! Invariant: both ends know version, limits, hash seed and partition map before the first data
//! request; a client of another protocol or cluster is refused by its first frame.
//!
//! Request:
//!
//! | offset | size | field           | meaning                                              |
//! |--------|------|-----------------|------------------------------------------------------|
//! | 0      | 8    | magic           | `ANNULUS` and a zero byte                            |
//! | 8      | 2    | version_min     | oldest protocol version the client speaks            |
//! | 10     | 2    | version_max     | newest                                               |
//! | 12     | 4    | shard           | wanted shard of this node; `0xffffffff`: any          |
//! | 16     | 8    | features        | bits the client would like to use                    |
//! | 24     | 16   | cluster         | id of the cluster expected; 0: any                   |
//! | 40     | 4    | wants           | 1 partition map, 2 node list, 4 namespace list       |
//! | 44     | 2    | name_size       | bytes of the client's name, at most 256              |
//! | 46     | 2    | credential_size | bytes of the credential; 0 until there is authentication |
//! | 48     |      | name, credential |                                                     |
//!
//! The reply is in [`Welcome`].

use annulus_engine::model::{NamespaceId, OriginId, PartitionId, Token};

use super::codec::{Malformed, Reader, Write, size_u16, size_u32};

/// First bytes of every HELLO.
pub const MAGIC: [u8; 8] = *b"ANNULUS\0";
/// The version of the protocol spoken here.
pub const VERSION: u16 = 1;
/// "Any shard will do."
pub const ANY_SHARD: u32 = u32::MAX;
/// Size of the fixed part of the request, in bytes.
pub const HELLO_HEADER_SIZE: usize = 48;
/// Feature: the server remembers once-ids, so that a write that carries one can be sent again.
pub const FEATURE_ONCE: u64 = 1 << 0;
/// Longest client or namespace name, in bytes.
pub const NAME_SIZE_MAX: usize = 256;
/// Longest credential, in bytes.
pub const CREDENTIAL_SIZE_MAX: usize = 1024;
/// Longest address, in bytes.
const ADDRESS_SIZE_MAX: usize = 256;
/// Most replicas of one run of the map.
const REPLICAS_MAX: usize = 64;

/// What a client may ask for in HELLO. Each bit is one part of the reply.
pub mod want {
    /// The partition map.
    pub const MAP: u32 = 1 << 0;
    /// The nodes and their addresses.
    pub const NODES: u32 = 1 << 1;
    /// The namespaces.
    pub const NAMESPACES: u32 = 1 << 2;
    /// All parts.
    pub const ALL: u32 = MAP | NODES | NAMESPACES;
}

/// A client's first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Oldest version the client speaks.
    pub version_min: u16,
    /// Newest version the client speaks.
    pub version_max: u16,
    /// The shard it wants to be served by, or [`ANY_SHARD`].
    pub shard: u32,
    /// Features it would like to use.
    pub features: u64,
    /// The cluster it expects; 0 for any.
    pub cluster: u128,
    /// Bits of [`want`].
    pub wants: u32,
    /// For logs and metrics.
    pub name: &'a str,
    /// Empty until there is authentication.
    pub credential: &'a [u8],
}

impl Default for Hello<'_> {
    fn default() -> Self {
        Hello {
            version_min: VERSION,
            version_max: VERSION,
            shard: ANY_SHARD,
            features: 0,
            cluster: 0,
            wants: want::ALL,
            name: "",
            credential: &[],
        }
    }
}

impl<'a> Hello<'a> {
    /// Reads the body.
    ///
    /// # Errors
    /// [`Malformed`]: this is no HELLO.
    pub fn decode(body: &'a [u8]) -> Result<Hello<'a>, Malformed> {
        let mut reader = Reader::new(body);
        if reader.array::<8>()? != MAGIC {
            return Err(Malformed("HELLO without the magic bytes"));
        }
        let version_min = reader.u16()?;
        let version_max = reader.u16()?;
        let shard = reader.u32()?;
        let features = reader.u64()?;
        let cluster = reader.u128()?;
        let wants = reader.u32()?;
        let name_size = usize::from(reader.u16()?);
        let credential_size = usize::from(reader.u16()?);
        if version_min > version_max || version_max == 0 {
            return Err(Malformed("HELLO with an empty range of versions"));
        }
        if name_size > NAME_SIZE_MAX || credential_size > CREDENTIAL_SIZE_MAX {
            return Err(Malformed("name or credential is too long"));
        }
        let name = std::str::from_utf8(reader.bytes(name_size)?)
            .map_err(|_| Malformed("name is not UTF-8"))?;
        let credential = reader.bytes(credential_size)?;
        reader.finish()?;
        Ok(Hello { version_min, version_max, shard, features, cluster, wants, name, credential })
    }

    /// Bytes that [`Hello::encode`] appends.
    #[must_use]
    pub fn size(&self) -> usize {
        HELLO_HEADER_SIZE + self.name.len() + self.credential.len()
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put(&MAGIC);
        out.put_u16(self.version_min);
        out.put_u16(self.version_max);
        out.put_u32(self.shard);
        out.put_u64(self.features);
        out.put_u128(self.cluster);
        out.put_u32(self.wants);
        out.put_u16(size_u16(self.name.len()));
        out.put_u16(size_u16(self.credential.len()));
        out.put(self.name.as_bytes());
        out.put(self.credential);
    }
}

/// Bounds that the server keeps and a client must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest key, in bytes.
    pub key_size_max: u32,
    /// Longest value, in bytes.
    pub value_size_max: u32,
    /// Most operations of a batch.
    pub batch_count_max: u32,
    /// Most bytes of a batch or admin command, and target size of a scan's page.
    pub message_size_max: u32,
    /// Most unanswered requests of a connection.
    pub in_flight_max: u32,
    /// Most bytes of unanswered requests of a connection.
    pub in_flight_bytes_max: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            key_size_max: size_u32(annulus_engine::model::limits::KEY_SIZE_MAX),
            value_size_max: size_u32(annulus_engine::model::limits::VALUE_SIZE_DEFAULT),
            batch_count_max: 1024,
            message_size_max: 1 << 20,
            in_flight_max: 1024,
            in_flight_bytes_max: 8 << 20,
        }
    }
}

/// One replica of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    /// The node.
    pub node: OriginId,
    /// The shard of that node.
    pub shard: u32,
}

/// Neighbouring partitions that live in the same places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many partitions, at least 1.
    pub length: u32,
    /// Where each of them lives, in order of preference.
    pub replicas: Vec<Replica>,
}

/// A node that clients can reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its id.
    pub id: OriginId,
    /// How many shards it has.
    pub shard_count: u32,
    /// `host:port` for clients.
    pub address: String,
}

/// How versions of a namespace are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Mode {
    /// The greatest version wins.
    #[default]
    Lww = 0,
    /// Concurrent values are all kept.
    Siblings = 1,
    /// Each key is a linearizable register.
    Linearizable = 2,
}

impl Mode {
    fn from_u8(byte: u8) -> Result<Mode, Malformed> {
        match byte {
            0 => Ok(Mode::Lww),
            1 => Ok(Mode::Siblings),
            2 => Ok(Mode::Linearizable),
            _ => Err(Malformed("unknown mode of a namespace")),
        }
    }
}

/// A namespace by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceFact {
    /// Its id, used in data requests.
    pub id: NamespaceId,
    /// Its mode.
    pub mode: Mode,
    /// Its name.
    pub name: String,
}

/// The server's answer to HELLO.
///
/// | offset | size | field            | meaning                                              |
/// |--------|------|------------------|------------------------------------------------------|
/// | 0      | 8    | magic            | as in the request                                    |
/// | 8      | 2    | version          | the version of this connection                       |
/// | 10     | 2    | partition_bits   | q: the ring has `2^q` partitions, at most 16          |
/// | 12     | 4    | shard_count      | shards of this node                                  |
/// | 16     | 4    | shard            | the shard that serves this connection                |
/// | 20     | 4    | node             | id of this node                                      |
/// | 24     | 8    | features         | those both ends have                                 |
/// | 32     | 16   | cluster          | id of the cluster                                    |
/// | 48     | 8    | hash_seed        | token = XXH3-64(key, seed)                           |
/// | 56     | 8    | map_version      | version of the partition map                         |
/// | 64     | 8    | wall_us          | the server's clock, microseconds since 2024-01-01     |
/// | 72     | 24   | limits           | the six of [`Limits`], 4 bytes each                   |
/// | 96     | 4    | run_count        | entries of the map; 0 when not asked for             |
/// | 100    | 2    | node_count       | entries of the node list                             |
/// | 102    | 2    | namespace_count  | entries of the namespace list                        |
/// | 104    |      | runs             | each: length 4, replica count 2, reserved 2, and per replica node 4, shard 4 |
/// |        |      | nodes            | each: id 4, shard count 4, address size 2, address   |
/// |        |      | namespaces       | each: id 4, mode 1, reserved 1, name size 2, name    |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version of this connection.
    pub version: u16,
    /// q: the ring has `2^q` partitions.
    pub partition_bits: u8,
    /// Shards of this node.
    pub shard_count: u32,
    /// The shard that serves this connection.
    pub shard: u32,
    /// Id of this node.
    pub node: OriginId,
    /// Features that both ends have.
    pub features: u64,
    /// Id of the cluster.
    pub cluster: u128,
    /// Seed of the hash.
    pub hash_seed: u64,
    /// Version of the partition map.
    pub map_version: u64,
    /// The server's wall clock in microseconds since 2024-01-01.
    pub wall_us: u64,
    /// Bounds.
    pub limits: Limits,
    /// The partition map, run-length encoded, from partition 0 on.
    pub runs: Vec<Run>,
    /// The nodes of the map.
    pub nodes: Vec<Node>,
    /// The namespaces there are.
    pub namespaces: Vec<NamespaceFact>,
}

impl Welcome {
    /// Where a token's partition lives; empty when the map does not cover it. O(runs).
    #[must_use]
    pub fn replicas(&self, token: Token) -> &[Replica] {
        let PartitionId(mut left) = token.partition(u32::from(self.partition_bits));
        for run in &self.runs {
            if left < run.length {
                return &run.replicas;
            }
            left -= run.length;
        }
        &[]
    }

    /// The same facts without the parts that `wants` does not name.
    #[must_use]
    fn parts(&self, wants: u32) -> (&[Run], &[Node], &[NamespaceFact]) {
        (
            if wants & want::MAP != 0 { &self.runs } else { &[] },
            if wants & want::NODES != 0 { &self.nodes } else { &[] },
            if wants & want::NAMESPACES != 0 { &self.namespaces } else { &[] },
        )
    }

    /// Appends the body, with the parts that `wants` names.
    pub fn encode(&self, wants: u32, out: &mut Vec<u8>) {
        let (runs, nodes, namespaces) = self.parts(wants);
        out.put(&MAGIC);
        out.put_u16(self.version);
        out.put_u16(u16::from(self.partition_bits));
        out.put_u32(self.shard_count);
        out.put_u32(self.shard);
        out.put_u32(self.node.0);
        out.put_u64(self.features);
        out.put_u128(self.cluster);
        out.put_u64(self.hash_seed);
        out.put_u64(self.map_version);
        out.put_u64(self.wall_us);
        out.put_u32(self.limits.key_size_max);
        out.put_u32(self.limits.value_size_max);
        out.put_u32(self.limits.batch_count_max);
        out.put_u32(self.limits.message_size_max);
        out.put_u32(self.limits.in_flight_max);
        out.put_u32(self.limits.in_flight_bytes_max);
        out.put_u32(size_u32(runs.len()));
        out.put_u16(size_u16(nodes.len()));
        out.put_u16(size_u16(namespaces.len()));
        for run in runs {
            out.put_u32(run.length);
            out.put_u16(size_u16(run.replicas.len()));
            out.put_u16(0);
            for replica in &run.replicas {
                out.put_u32(replica.node.0);
                out.put_u32(replica.shard);
            }
        }
        for node in nodes {
            out.put_u32(node.id.0);
            out.put_u32(node.shard_count);
            out.put_short(node.address.as_bytes());
        }
        for namespace in namespaces {
            out.put_u32(namespace.id.0);
            out.put(&[namespace.mode as u8, 0]);
            out.put_short(namespace.name.as_bytes());
        }
    }

    /// Reads the body. Allocates in proportion to its size.
    ///
    /// # Errors
    /// [`Malformed`]: this is no answer to a HELLO.
    pub fn decode(body: &[u8]) -> Result<Welcome, Malformed> {
        let mut reader = Reader::new(body);
        if reader.array::<8>()? != MAGIC {
            return Err(Malformed("HELLO without the magic bytes"));
        }
        let version = reader.u16()?;
        let partition_bits = u8::try_from(reader.u16()?)
            .ok()
            .filter(|&bits| u32::from(bits) <= annulus_engine::model::token::PARTITION_BITS_MAX)
            .ok_or(Malformed("more than 16 partition bits"))?;
        let mut welcome = Welcome {
            version,
            partition_bits,
            shard_count: reader.u32()?,
            shard: reader.u32()?,
            node: OriginId(reader.u32()?),
            features: reader.u64()?,
            cluster: reader.u128()?,
            hash_seed: reader.u64()?,
            map_version: reader.u64()?,
            wall_us: reader.u64()?,
            limits: Limits {
                key_size_max: reader.u32()?,
                value_size_max: reader.u32()?,
                batch_count_max: reader.u32()?,
                message_size_max: reader.u32()?,
                in_flight_max: reader.u32()?,
                in_flight_bytes_max: reader.u32()?,
            },
            runs: Vec::new(),
            nodes: Vec::new(),
            namespaces: Vec::new(),
        };
        let run_count = reader.u32()?;
        let node_count = reader.u16()?;
        let namespace_count = reader.u16()?;
        let mut partitions = 0u64;
        for _ in 0..run_count {
            let run = decode_run(&mut reader)?;
            partitions += u64::from(run.length);
            welcome.runs.push(run);
        }
        if run_count != 0 && partitions != 1 << partition_bits {
            return Err(Malformed("the map does not cover the ring"));
        }
        for _ in 0..node_count {
            welcome.nodes.push(Node {
                id: OriginId(reader.u32()?),
                shard_count: reader.u32()?,
                address: reader.name(ADDRESS_SIZE_MAX)?.to_owned(),
            });
        }
        for _ in 0..namespace_count {
            let id = NamespaceId(reader.u32()?);
            let mode = Mode::from_u8(reader.u8()?)?;
            reader.reserved(1)?;
            let name = reader.name(NAME_SIZE_MAX)?.to_owned();
            welcome.namespaces.push(NamespaceFact { id, mode, name });
        }
        reader.finish()?;
        Ok(welcome)
    }
}

fn decode_run(reader: &mut Reader<'_>) -> Result<Run, Malformed> {
    let length = reader.u32()?;
    let count = usize::from(reader.u16()?);
    reader.reserved(2)?;
    if length == 0 || count > REPLICAS_MAX {
        return Err(Malformed("a run of the map is empty or has too many replicas"));
    }
    let mut replicas = Vec::with_capacity(count);
    for _ in 0..count {
        replicas.push(Replica { node: OriginId(reader.u32()?), shard: reader.u32()? });
    }
    Ok(Run { length, replicas })
}

/// Joins neighbouring partitions that live in the same places.
#[must_use]
pub fn runs_of(partitions: impl IntoIterator<Item = Vec<Replica>>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for replicas in partitions {
        match runs.last_mut() {
            Some(run) if run.replicas == replicas => run.length += 1,
            _ => runs.push(Run { length: 1, replicas }),
        }
    }
    runs
}
