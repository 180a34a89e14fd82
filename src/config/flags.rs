//! The options as they are given: on the command line, in the environment, in the file.
//!
//! Invariant: an option is declared once, here; its flag, its variable, its key and its help come
//! from that declaration. Nothing is checked beyond its form; `Config::resolve` does that.

use std::path::{Path, PathBuf};

use annulus_engine::options;
use annulus_tuning::host::parse_core_list;
use serde::{Deserialize, Serialize};

use crate::units::{Part, Size, Span};

/// Where clients are served unless told otherwise.
pub const LISTEN_DEFAULT: &str = "127.0.0.1:7301";
/// Where peers are served unless told otherwise.
pub const PEER_LISTEN_DEFAULT: &str = "127.0.0.1:7302";
/// Where HTTP for operators is served unless told otherwise.
pub const ADMIN_LISTEN_DEFAULT: &str = "127.0.0.1:7303";

/// Level of Zstandard: 3 is its own default; higher costs flushes more than it saves.
pub const ZSTD_LEVEL: i32 = 3;

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// When it is on the medium: a power cut loses nothing that was acknowledged.
    #[default]
    Sync,
    /// When it is in memory: a power cut loses up to one periodic window.
    Periodic,
}

/// How blocks of tables are compressed; a block that does not shrink is stored raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// LZ4: cheap, about half the size for text.
    #[default]
    Lz4,
    /// Zstandard: smaller, several times the CPU.
    Zstd,
}

impl From<Compression> for options::Compression {
    fn from(compression: Compression) -> options::Compression {
        match compression {
            Compression::None => options::Compression::None,
            Compression::Lz4 => options::Compression::Lz4,
            Compression::Zstd => options::Compression::Zstd { level: ZSTD_LEVEL },
        }
    }
}

/// A list of core ids: `0,2-5` in a flag, that or an array in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreList(pub Vec<usize>);

impl std::str::FromStr for CoreList {
    type Err = String;

    fn from_str(text: &str) -> Result<CoreList, String> {
        parse_core_list(text)
            .map(CoreList)
            .ok_or_else(|| format!("`{text}` is not a list of cores; write for example 0,2-5"))
    }
}

/// Addresses: `H:P,H:P` in a flag, that or an array in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressList(pub Vec<String>);

impl std::str::FromStr for AddressList {
    type Err = String;

    fn from_str(text: &str) -> Result<AddressList, String> {
        let parts: Vec<String> =
            text.split(',').map(|part| part.trim().to_owned()).filter(|p| !p.is_empty()).collect();
        for part in &parts {
            check_address(part)?;
        }
        Ok(AddressList(parts))
    }
}

/// Whether the text has the form `HOST:PORT`; the host is not looked up.
pub(super) fn check_address(text: &str) -> Result<(), String> {
    let refuse =
        || format!("`{text}` is not an address; write HOST:PORT, for example {LISTEN_DEFAULT}");
    let (host, port) = text.rsplit_once(':').ok_or_else(refuse)?;
    port.parse::<u16>().map_err(|_| refuse())?;
    if host.is_empty() { Err(refuse()) } else { Ok(()) }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ListOrText<T> {
    List(Vec<T>),
    Text(String),
}

impl<'de> Deserialize<'de> for CoreList {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<CoreList, D::Error> {
        match ListOrText::deserialize(deserializer)? {
            ListOrText::List(cores) => Ok(CoreList(cores)),
            ListOrText::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for AddressList {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<AddressList, D::Error> {
        let text = match ListOrText::<String>::deserialize(deserializer)? {
            ListOrText::List(parts) => parts.join(","),
            ListOrText::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Declares the options: the struct for flags, environment and file at once, how two of them are
/// laid over one another, and the list of names.
macro_rules! options {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty, $env:literal, $unit:literal
        $(, [$($clap:tt)+])?;)+) => {
        /// The options as given, each perhaps absent.
        #[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
        pub struct Flags {
            $($(#[doc = $doc])+
            #[arg(long, env = $env, value_name = $unit $(, $($clap)+)?)]
            pub $name: Option<$type>,)+
        }

        impl Flags {
            /// The names of all options, as in the struct.
            pub const NAMES: &[&str] = &[$(stringify!($name)),+];

            /// These options, and where one is absent, the other's.
            #[must_use]
            pub fn or(self, other: Flags) -> Flags {
                Flags { $($name: self.$name.or(other.$name)),+ }
            }
        }
    };
}

options! {
    /// Directory of all data of this node [default: ./annulus-data].
    /// Put it on the fastest local disk, with direct I/O (ext4, xfs)
    data_dir: PathBuf, "ANNULUS_DATA_DIR", "DIR";
    /// Address for clients; port 0 takes a free one [default: 127.0.0.1:7301]
    listen: String, "ANNULUS_LISTEN", "H:P";
    /// Address for other nodes [default: 127.0.0.1:7302]
    peer_listen: String, "ANNULUS_PEER_LISTEN", "H:P";
    /// HTTP address for /metrics, /health, /ready, /stats; `off` for none [default: 127.0.0.1:7303]
    admin_listen: String, "ANNULUS_ADMIN_LISTEN", "H:P";
    /// Allow listening on addresses other than loopback without TLS and authentication.
    /// Whoever reaches the port then owns the data: only on a network of your own [default: false]
    insecure_public: bool, "ANNULUS_INSECURE_PUBLIC", "BOOL",
        [num_args = 0..=1, default_missing_value = "true", require_equals = true];
    /// To found a cluster: all its members by their peer addresses, this node among them, the same
    /// list for every member; an entry may name place and weight: H:P@DC/RACK/100. To join one:
    /// any member by the address that clients reach it at.
    /// Read at the first start only [default: none, a cluster of one]
    join: AddressList, "ANNULUS_JOIN", "H:P,...";
    /// File whose content all members of a cluster share and nobody else has, 16 bytes or more.
    /// Identity and secrets of the cluster follow from it [default: from the list of members,
    /// which is no secret; not allowed with insecure-public]
    cluster_key_file: PathBuf, "ANNULUS_CLUSTER_KEY_FILE", "FILE";
    /// Host name or address under which others reach this node.
    /// Change it when the listen address is a wildcard or behind NAT [default: the listen address]
    advertise: String, "ANNULUS_ADVERTISE", "HOST";
    /// Data centre of this node; replicas spread over them [default: dc1]
    dc: String, "ANNULUS_DC", "NAME";
    /// Rack or zone of this node; replicas spread over them [default: rack1]
    rack: String, "ANNULUS_RACK", "NAME";
    /// Share of the data relative to other nodes, 1 to 1000 [default: 100].
    /// Double it on a machine with twice the disk and cores
    weight: u32, "ANNULUS_WEIGHT", "W";
    /// Shards, one thread each; fixed when the directory is made [default: one per usable core].
    /// Fewer leave cores for others
    shards: u32, "ANNULUS_SHARDS", "N";
    /// Cores for the shards, such as 0,2-5 [default: those the process may use].
    /// Name them when the host runs other pinned work
    cores: CoreList, "ANNULUS_CORES", "LIST";
    /// Memory for the whole node [default: 3/4 of the cgroup's limit, or half of the machine].
    /// Raise it on a host of its own: what is left over is cache
    memory: Size, "ANNULUS_MEMORY", "SIZE";
    /// When a write is acknowledged: sync = on the medium, periodic = in memory [default: sync]
    durability: Durability, "ANNULUS_DURABILITY", "LEVEL", [value_enum];
    /// Longest time between syncs under `periodic`, 5ms to 1s: what a power cut may cost
    /// [default: 1s]
    periodic_window: Span, "ANNULUS_PERIODIC_WINDOW", "TIME";
    /// How long an idle shard looks for work before it sleeps, 0 to 1ms [default: 50us].
    /// 0 on shared hosts; more buys latency of lone requests with CPU
    spin: Span, "ANNULUS_SPIN", "TIME";
    /// How long requests may run before background work gets a turn, 10us to 10ms
    /// [default: 200us]
    slice: Span, "ANNULUS_SLICE", "TIME";
    /// Size of one memtable of one shard [default: from --memory, at most 256MiB].
    /// Larger means fewer, larger flushes and a longer restart
    memtable_size: Size, "ANNULUS_MEMTABLE_SIZE", "SIZE";
    /// Block cache of the whole node [default: what is left of --memory]
    cache_size: Size, "ANNULUS_CACHE_SIZE", "SIZE";
    /// Size of one commit-log segment, 64KiB to 1GiB [default: 64MiB].
    /// Small ones return space sooner, and make rolls frequent in tests
    segment_size: Size, "ANNULUS_SEGMENT_SIZE", "SIZE";
    /// Target size of a table block, 512B to 64KiB, a multiple of 512 [default: 4KiB].
    /// Larger compresses better, reads more
    block_size: Size, "ANNULUS_BLOCK_SIZE", "SIZE";
    /// Target size of a table, 64KiB to 4GiB [default: 256MiB].
    /// Small ones move in smaller steps, and are more files
    table_size: Size, "ANNULUS_TABLE_SIZE", "SIZE";
    /// Compression of namespaces that do not name one [default: lz4]
    compression: Compression, "ANNULUS_COMPRESSION", "NAME", [value_enum];
    /// Filter bits per key in the last level, 0 to 24 [default: 10].
    /// Each 1.44 bits halve the reads for absent keys; 0 saves the memory
    filter_bits: u32, "ANNULUS_FILTER_BITS", "BITS";
    /// Longest value that is accepted, up to 16MiB [default: 1MiB]
    value_size_max: Size, "ANNULUS_VALUE_SIZE_MAX", "SIZE";
    /// Disk space kept for log and compaction: nothing is accepted below it, no new data below
    /// four times of it, and writes slow down below 16 times of it.
    /// Raise it on a disk shared with others [default: 1/64 of the disk, at most 256MiB]
    disk_reserve: Size, "ANNULUS_DISK_RESERVE", "SIZE";
    /// Most bytes of copies that this node keeps for others while they are away, or percent of
    /// the disk; 0 keeps none. Beyond it the homes that are there carry a write alone; with
    /// sloppy quorums and PW=0 a write of which no home is there is refused. Raise it for
    /// absences of days [default: 10%]
    hint_size_max: Part, "ANNULUS_HINT_SIZE_MAX", "SIZE|N%";
    /// Bytes a second of background work (flush excepted) per shard, at most [default: paced
    /// by latency alone]. Set it on a shared disk
    background_rate: Size, "ANNULUS_BACKGROUND_RATE", "SIZE";
    /// Most client connections of the node [default: from --memory, at most 12000]
    connections_max: u32, "ANNULUS_CONNECTIONS_MAX", "N";
    /// Most requests in flight of one connection, 1 to 65536 [default: 1024]
    connection_requests_max: u32, "ANNULUS_CONNECTION_REQUESTS_MAX", "N";
    /// Most bytes of requests and replies in flight of one connection [default: 8MiB]
    connection_bytes_max: Size, "ANNULUS_CONNECTION_BYTES_MAX", "SIZE";
    /// Within this time a connection must greet, finish a frame it began, and take its replies,
    /// 100ms to 10m [default: 5s]
    connection_timeout: Span, "ANNULUS_CONNECTION_TIMEOUT", "TIME";
    /// An idle connection is closed after this time; 0s keeps it [default: 0s]
    idle_timeout: Span, "ANNULUS_IDLE_TIMEOUT", "TIME";
    /// Deadline of a request that names none, 1ms to 1h [default: 10s]
    request_timeout: Span, "ANNULUS_REQUEST_TIMEOUT", "TIME";
    /// How long a stopping node waits for requests in flight, at most 9s [default: 5s]
    drain_timeout: Span, "ANNULUS_DRAIN_TIMEOUT", "TIME";
    /// The ring has 2^N partitions, 0 to 16; fixed when the cluster is made [default: 12].
    /// More for clusters beyond 100 nodes
    partition_bits: u32, "ANNULUS_PARTITION_BITS", "N";
    /// What is logged on stderr: error, warn, info, debug, trace, or per module
    /// such as info,annulus_engine=debug [default: info]
    log_level: String, "ANNULUS_LOG_LEVEL", "LEVEL";
}

impl Flags {
    /// Reads a configuration file's text.
    ///
    /// # Errors
    /// What does not parse, with line and column; unknown names are refused.
    pub fn from_toml(text: &str) -> Result<Flags, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    /// These options laid over those of the file, if one is named.
    ///
    /// # Errors
    /// The file cannot be read, or holds what is no configuration.
    pub fn over_file(self, file: Option<&Path>) -> Result<Flags, String> {
        let Some(path) = file else { return Ok(self) };
        let text = std::fs::read_to_string(path).map_err(|error| {
            format!("cannot read the configuration {}: {error}", path.display())
        })?;
        let file =
            Flags::from_toml(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(self.or(file))
    }
}
