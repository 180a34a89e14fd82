//! Configuration of a node: flags, environment, file and defaults, in that order of precedence.
//!
//! Invariant: every option has one name (`data-dir`), which is the flag `--data-dir`, the
//! variable `ANNULUS_DATA_DIR` and the key `data-dir` of the TOML file; and a [`Config`] that
//! exists is valid. Each option says its unit, its default, and when to change it, here and
//! nowhere else: the same words are the `--help` text.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use annulus_engine::model::limits::{
    BLOCK_SIZE_DEFAULT, DISK_ALIGNMENT, VALUE_SIZE_CEILING, VALUE_SIZE_DEFAULT,
};
use annulus_engine::model::token::PARTITION_BITS_MAX;
use annulus_engine::options::{self, CompactionOptions, LogOptions, Options, SpaceOptions};
use annulus_tuning::host::{Host, parse_core_list};
use annulus_tuning::{Budget, BudgetInput};
use serde::{Deserialize, Serialize};

use crate::units::{Size, Span};

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
fn check_address(text: &str) -> Result<(), String> {
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
    /// Nodes of a cluster to join, with their peer ports [default: none, a cluster of one]
    join: AddressList, "ANNULUS_JOIN", "H:P,...";
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
    /// Size of one memtable of one shard [default: from --memory, at most 64MiB].
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

/// A validated configuration: what [`Flags`] became with defaults and facts of the host.
/// Fields are documented there; here is what changed on the way.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each option is documented in Flags")]
pub struct Config {
    pub data_dir: PathBuf,
    pub listen: SocketAddr,
    pub peer_listen: SocketAddr,
    /// None when switched off.
    pub admin_listen: Option<SocketAddr>,
    pub join: Vec<String>,
    pub advertise: Option<String>,
    pub dc: String,
    pub rack: String,
    pub weight: u32,
    /// How many shards were asked for; none leaves it to the directory, and for a new directory
    /// to the number of cores. See [`Config::shard_count`].
    pub shards: Option<u32>,
    /// Cores for the shards, at least one. Shard i goes to core `cores[i % cores.len()]`.
    pub cores: Vec<usize>,
    pub memory: u64,
    pub durability: Durability,
    pub periodic_window: Duration,
    pub spin: Duration,
    pub slice: Duration,
    pub memtable_size: Option<u64>,
    pub cache_size: Option<u64>,
    pub segment_size: u64,
    pub block_size: u32,
    pub table_size: u64,
    pub compression: Compression,
    pub filter_bits: u32,
    pub value_size_max: u32,
    /// None is by the size of the disk, see [`Config::disk_reserve`].
    pub disk_reserve: Option<u64>,
    /// Bytes a second; none is paced by latency alone.
    pub background_rate: Option<u64>,
    pub connections_max: Option<u32>,
    pub connection_requests_max: u32,
    pub connection_bytes_max: u64,
    pub connection_timeout: Duration,
    /// None keeps idle connections.
    pub idle_timeout: Option<Duration>,
    pub request_timeout: Duration,
    pub drain_timeout: Duration,
    pub partition_bits: u32,
    pub log_level: String,
}

impl Config {
    /// Fills in defaults and checks everything. Host names are looked up.
    ///
    /// # Errors
    /// The first option that is out of range, with what is allowed.
    pub fn resolve(flags: Flags, host: &Host) -> Result<Config, String> {
        let public = flags.insecure_public.unwrap_or(false);
        let listen = address("listen", flags.listen.as_deref().unwrap_or(LISTEN_DEFAULT), public)?;
        let peer_listen = address(
            "peer-listen",
            flags.peer_listen.as_deref().unwrap_or(PEER_LISTEN_DEFAULT),
            public,
        )?;
        let admin_listen = match flags.admin_listen.as_deref().unwrap_or(ADMIN_LISTEN_DEFAULT) {
            "off" | "none" => None,
            text => Some(address("admin-listen", text, public)?),
        };
        let cores = match flags.cores {
            Some(CoreList(cores)) if cores.is_empty() => {
                return Err("cores: the list is empty".into());
            }
            Some(CoreList(cores)) => {
                let allowed = &host.cores_allowed;
                if let Some(core) =
                    cores.iter().find(|core| !allowed.is_empty() && !allowed.contains(core))
                {
                    return Err(format!(
                        "cores: core {core} is not among those this process may use ({allowed:?})"
                    ));
                }
                cores
            }
            None => host.cores_usable(),
        };
        let shards =
            flags.shards.map(|shards| range("shards", shards, 1, SHARDS_MAX)).transpose()?;
        let config = Config {
            data_dir: flags.data_dir.unwrap_or_else(|| PathBuf::from("./annulus-data")),
            listen,
            peer_listen,
            admin_listen,
            join: flags.join.map(|list| list.0).unwrap_or_default(),
            advertise: flags.advertise.map(|host| name("advertise", host)).transpose()?,
            dc: name("dc", flags.dc.unwrap_or_else(|| "dc1".to_owned()))?,
            rack: name("rack", flags.rack.unwrap_or_else(|| "rack1".to_owned()))?,
            weight: range("weight", flags.weight.unwrap_or(100), 1, 1000)?,
            shards,
            cores,
            memory: flags.memory.map_or_else(|| host.memory_proposed(), |size| size.0),
            durability: flags.durability.unwrap_or_default(),
            periodic_window: time("periodic-window", flags.periodic_window, "1s", "5ms", "1s")?,
            spin: time("spin", flags.spin, "50us", "0s", "1ms")?,
            slice: time("slice", flags.slice, "200us", "10us", "10ms")?,
            memtable_size: flags
                .memtable_size
                .map(|size| bytes("memtable-size", size, 64 << 10, 16 << 30))
                .transpose()?,
            cache_size: flags
                .cache_size
                .map(|size| bytes("cache-size", size, 0, 1 << 50))
                .transpose()?,
            segment_size: sized("segment-size", flags.segment_size, 64 << 20, 64 << 10, 1 << 30)?,
            block_size: narrow(sized(
                "block-size",
                flags.block_size,
                BLOCK_SIZE_DEFAULT as u64,
                DISK_ALIGNMENT as u64,
                64 << 10,
            )?),
            table_size: sized("table-size", flags.table_size, 256 << 20, 64 << 10, 4 << 30)?,
            compression: flags.compression.unwrap_or_default(),
            filter_bits: range("filter-bits", flags.filter_bits.unwrap_or(10), 0, 24)?,
            value_size_max: narrow(sized(
                "value-size-max",
                flags.value_size_max,
                VALUE_SIZE_DEFAULT as u64,
                1,
                VALUE_SIZE_CEILING as u64,
            )?),
            disk_reserve: flags
                .disk_reserve
                .map(|size| bytes("disk-reserve", size, 0, 1 << 50))
                .transpose()?,
            background_rate: flags
                .background_rate
                .map(|size| bytes("background-rate", size, 1 << 20, 1 << 40))
                .transpose()?,
            connections_max: flags
                .connections_max
                .map(|count| range("connections-max", count, 1, 1_000_000))
                .transpose()?,
            connection_requests_max: range(
                "connection-requests-max",
                flags.connection_requests_max.unwrap_or(1024),
                1,
                65_536,
            )?,
            connection_bytes_max: sized(
                "connection-bytes-max",
                flags.connection_bytes_max,
                8 << 20,
                64 << 10,
                1 << 30,
            )?,
            connection_timeout: time(
                "connection-timeout",
                flags.connection_timeout,
                "5s",
                "100ms",
                "10m",
            )?,
            idle_timeout: Some(time("idle-timeout", flags.idle_timeout, "0s", "0s", "365d")?)
                .filter(|time| !time.is_zero()),
            request_timeout: time("request-timeout", flags.request_timeout, "10s", "1ms", "1h")?,
            drain_timeout: time("drain-timeout", flags.drain_timeout, "5s", "0s", "9s")?,
            partition_bits: range(
                "partition-bits",
                flags.partition_bits.unwrap_or(12),
                0,
                PARTITION_BITS_MAX,
            )?,
            log_level: flags.log_level.unwrap_or_else(|| "info".to_owned()),
        };
        config.check_relations()?;
        Ok(config)
    }

    /// What no option can say alone.
    fn check_relations(&self) -> Result<(), String> {
        if !(self.block_size as usize).is_multiple_of(DISK_ALIGNMENT) {
            return Err(format!("block-size: must be a multiple of {DISK_ALIGNMENT}"));
        }
        let value = u64::from(self.value_size_max);
        if self.connection_bytes_max < 2 * value.min(VALUE_SIZE_DEFAULT as u64) {
            return Err(format!(
                "connection-bytes-max: {} is too little for two values of {}",
                Size(self.connection_bytes_max),
                Size(value)
            ));
        }
        if !self.segment_size.is_multiple_of(4096) {
            return Err("segment-size: must be a multiple of 4KiB".to_owned());
        }
        let ports = [Some(self.listen), Some(self.peer_listen), self.admin_listen];
        let fixed: Vec<_> = ports.iter().flatten().filter(|address| address.port() != 0).collect();
        if (1..fixed.len()).any(|i| fixed[..i].contains(&fixed[i])) {
            return Err("listen, peer-listen and admin-listen must differ".to_owned());
        }
        self.budget(self.shard_count(None)).map(drop)
    }

    /// How many shards to run, given how many an existing directory has.
    #[must_use]
    pub fn shard_count(&self, existing: Option<u32>) -> u32 {
        let by_cores = || u32::try_from(self.cores.len()).unwrap_or(SHARDS_MAX).min(SHARDS_MAX);
        existing.or(self.shards).unwrap_or_else(by_cores)
    }

    /// Disk space that is kept, on a disk of so many bytes.
    #[must_use]
    pub fn disk_reserve(&self, disk_total: u64) -> u64 {
        self.disk_reserve.unwrap_or((disk_total / 64).min(256 << 20))
    }

    /// The knobs of one of so many shards, on a disk of so many bytes.
    ///
    /// # Errors
    /// What was decided does not fit into `memory`, or the engine refuses a value.
    pub fn engine_options(&self, shards: u32, disk_total: u64) -> Result<Options, String> {
        let budget = self.budget(shards)?;
        let defaults = Options::default();
        let window_ms = Span(self.periodic_window).as_millis();
        let reserve = self.disk_reserve(disk_total);
        let record = u64::from(self.value_size_max) + (64 << 10);
        let batch = defaults.log.batch_size as u64;
        let pending = (budget.requests_per_shard() / 2)
            .min(defaults.log.pending_size_max as u64)
            .max(record.max(batch));
        let host = |size: u64| usize::try_from(size).expect("64-bit host");
        let options = Options {
            log: LogOptions {
                durability: match self.durability {
                    Durability::Sync => options::Durability::Sync,
                    Durability::Periodic => options::Durability::Periodic { window_ms },
                },
                segment_size: self.segment_size,
                pending_size_max: host(pending),
                write_delay_ms: defaults.log.write_delay_ms.min(window_ms),
                ..defaults.log
            },
            memtable_size: host(budget.memtable_size),
            memtables_sealed_max: host(annulus_tuning::budget::MEMTABLES_PER_SHARD - 1),
            cache_size: host(budget.cache_per_shard()),
            block_size: host(u64::from(self.block_size)),
            compression: self.compression.into(),
            filter_bits_last: self.filter_bits,
            // Every read asks the newer runs, so a mistake there costs more.
            filter_bits_upper: if self.filter_bits == 0 { 0 } else { self.filter_bits + 4 },
            value_size_max: host(u64::from(self.value_size_max)),
            space: SpaceOptions {
                reserve,
                refuse_below: reserve.saturating_mul(4),
                pace_below: reserve.saturating_mul(16),
            },
            compaction: CompactionOptions {
                table_size: self.table_size,
                rate_min: defaults
                    .compaction
                    .rate_min
                    .min(self.background_rate.unwrap_or(u64::MAX)),
                rate_max: self.background_rate.unwrap_or(defaults.compaction.rate_max),
                ..defaults.compaction
            },
            partition_bits: self.partition_bits,
        };
        options.validate().map_err(|error| error.to_string())?;
        Ok(options)
    }

    /// How the memory is divided among so many shards.
    ///
    /// # Errors
    /// What was decided does not fit into `memory`.
    pub fn budget(&self, shards: u32) -> Result<Budget, String> {
        Budget::divide(&BudgetInput {
            memory: self.memory,
            shards,
            value_size_max: u64::from(self.value_size_max),
            memtable_size: self.memtable_size,
            cache_size: self.cache_size,
            connections_max: self.connections_max,
        })
        .map_err(|error| {
            format!("memory: {error}; raise --memory, or lower shards, cache-size or memtable-size")
        })
    }
}

/// Most shards of a node.
pub const SHARDS_MAX: u32 = 256;

fn address(option: &str, text: &str, public: bool) -> Result<SocketAddr, String> {
    check_address(text).map_err(|error| format!("{option}: {error}"))?;
    let found = text
        .to_socket_addrs()
        .map_err(|error| format!("{option}: cannot look up {text}: {error}"))?
        .next()
        .ok_or_else(|| format!("{option}: {text} has no address"))?;
    let loopback = match found.ip() {
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip: Ipv4Addr| ip.is_loopback())
        }
        IpAddr::V4(ip) => ip.is_loopback(),
    };
    if loopback || public {
        return Ok(found);
    }
    Err(format!(
        "{option}: {found} is not a loopback address, and this version has neither TLS nor \
         authentication: whoever reaches it owns the data. Listen on 127.0.0.1, or say \
         --insecure-public"
    ))
}

fn name(option: &str, text: String) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:[]".contains(&b);
    if !text.is_empty() && text.len() <= 64 && text.bytes().all(plain) {
        return Ok(text);
    }
    Err(format!(
        "{option}: `{}` must be 1 to 64 letters, digits, `-`, `_` or `.`",
        text.escape_debug()
    ))
}

fn range(option: &str, value: u32, least: u32, most: u32) -> Result<u32, String> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(format!("{option}: {value} is not within {least} to {most}"))
}

fn bytes(option: &str, size: Size, least: u64, most: u64) -> Result<u64, String> {
    if (least..=most).contains(&size.0) {
        return Ok(size.0);
    }
    Err(format!("{option}: {size} is not within {} to {}", Size(least), Size(most)))
}

fn sized(
    option: &str,
    size: Option<Size>,
    default: u64,
    least: u64,
    most: u64,
) -> Result<u64, String> {
    bytes(option, size.unwrap_or(Size(default)), least, most)
}

fn narrow(size: u64) -> u32 {
    u32::try_from(size).expect("checked against a limit below 4 GiB")
}

fn time(
    option: &str,
    value: Option<Span>,
    default: &str,
    least: &str,
    most: &str,
) -> Result<Duration, String> {
    let parse = |text: &str| text.parse::<Span>().expect("a time in the source is well formed");
    let value = value.unwrap_or_else(|| parse(default));
    if (parse(least)..=parse(most)).contains(&value) {
        return Ok(value.0);
    }
    Err(format!("{option}: {value} is not within {least} to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    fn host() -> Host {
        Host { cores_allowed: vec![0, 1], memory_machine: Some(8 << 30), ..Host::default() }
    }

    fn resolve(line: &str) -> Result<Config, String> {
        let line = Line::try_parse_from(format!("annulus {line}").split_whitespace())
            .map_err(|error| error.to_string())?;
        Config::resolve(line.flags, &host())
    }

    fn refusal(line: &str) -> String {
        resolve(line).expect_err(line)
    }

    #[test]
    fn nothing_given_means_the_documented_defaults() {
        let config = resolve("").unwrap();
        assert_eq!(config.data_dir, PathBuf::from("./annulus-data"));
        assert_eq!(config.listen.to_string(), LISTEN_DEFAULT);
        assert_eq!(config.admin_listen.unwrap().to_string(), ADMIN_LISTEN_DEFAULT);
        assert_eq!((config.shard_count(None), config.shard_count(Some(5))), (2, 5));
        assert_eq!(config.memory, 4 << 30);
        assert_eq!(config.durability, Durability::Sync);
        assert!(config.budget(2).unwrap().sum() <= config.memory);
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = Flags::from_toml(
            "shards = 3\nmemory = \"1GiB\"\njoin = [\"a:1\", \"b:2\"]\ncores = \"0-1\"\nspin = 0",
        )
        .unwrap();
        let line = Line::try_parse_from(["annulus", "--shards", "1"]).unwrap();
        let config = Config::resolve(line.flags.or(file), &host()).unwrap();
        assert_eq!(config.shards, Some(1));
        assert_eq!(config.memory, 1 << 30);
        assert_eq!(config.join, ["a:1", "b:2"]);
        assert!(config.spin.is_zero());
        assert_eq!(config.weight, 100);
    }

    #[test]
    fn every_option_is_a_flag_a_variable_and_a_key_of_one_name() {
        use clap::CommandFactory;
        let command = Line::command();
        for name in Flags::NAMES {
            let argument = command.get_arguments().find(|a| a.get_id() == name).unwrap();
            assert_eq!(argument.get_long(), Some(name.replace('_', "-").as_str()));
            let variable = format!("ANNULUS_{}", name.to_uppercase());
            assert_eq!(argument.get_env().unwrap(), variable.as_str());
            let help = argument.get_help().unwrap().to_string();
            let long = argument.get_long_help().map(ToString::to_string).unwrap_or(help);
            assert!(long.contains("[default:"), "{name}: {long}");
            let error =
                Flags::from_toml(&format!("{} = {{}}", name.replace('_', "-"))).unwrap_err();
            assert!(!error.contains("unknown field"), "{name}: {error}");
        }
    }

    #[test]
    fn every_option_has_a_page() {
        let notes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tuning/notes");
        let index = std::fs::read_to_string(notes.join("README.md")).unwrap();
        for name in Flags::NAMES {
            let option = format!("`{}`", name.replace('_', "-"));
            let row = index.lines().find(|line| line.contains(&option)).expect(&option);
            let page = row.split(['(', ')']).nth(1).unwrap();
            let text = std::fs::read_to_string(notes.join(page)).unwrap();
            assert!(text.contains(&option), "{page} does not speak of {option}");
        }
    }

    #[test]
    fn the_file_refuses_names_it_does_not_know_and_says_where() {
        let error = Flags::from_toml("memory = \"1GiB\"\nmemroy = \"2GiB\"\n").unwrap_err();
        assert!(error.contains("memroy") && error.contains("line 2"), "{error}");
        let error = Flags::from_toml("request-timeout = 5").unwrap_err();
        assert!(error.contains("lacks a unit"), "{error}");
    }

    #[test]
    fn public_addresses_need_to_be_asked_for_by_name() {
        for option in ["listen", "peer-listen", "admin-listen"] {
            let error = refusal(&format!("--{option} 0.0.0.0:9000"));
            assert!(error.contains(option) && error.contains("--insecure-public"), "{error}");
            resolve(&format!("--{option} 0.0.0.0:9000 --insecure-public")).unwrap();
        }
        resolve("--listen [::1]:0 --peer-listen localhost:0 --admin-listen off").unwrap();
    }

    #[test]
    fn the_engine_accepts_what_was_accepted_here() {
        for line in [
            "",
            "--durability periodic --periodic-window 5ms --memory 100MiB --shards 2",
            "--filter-bits 0 --background-rate 1MiB --disk-reserve 0 --value-size-max 16MiB",
            "--filter-bits 24 --segment-size 64KiB --table-size 64KiB --memtable-size 64KiB",
            "--block-size 512B --compression zstd --partition-bits 0 --cache-size 0",
        ] {
            let config = resolve(line).unwrap();
            for disk in [0, 1 << 30, 1 << 40] {
                let options = config.engine_options(config.shard_count(None), disk).unwrap();
                assert!(options.space.reserve <= disk / 64 || config.disk_reserve.is_some());
                assert!(options.log.pending_size_max > options.value_size_max);
            }
        }
    }

    #[test]
    fn values_out_of_range_are_refused_with_the_range() {
        for (line, expected) in [
            ("--shards 0", "1 to 256"),
            ("--weight 0", "1 to 1000"),
            ("--partition-bits 17", "0 to 16"),
            ("--spin 1s", "0s to 1ms"),
            ("--block-size 1000", "multiple of 512"),
            ("--value-size-max 17MiB", "1B to 16MiB"),
            ("--segment-size 1000000B", "multiple of 4KiB"),
            ("--drain-timeout 10s", "0s to 9s"),
            ("--cores 7", "core 7"),
            ("--cores x", "list of cores"),
            ("--listen 7301", "HOST:PORT"),
            ("--listen 127.0.0.1:7302", "must differ"),
            ("--memory 20MiB", "does not suffice"),
            ("--rack a/b", "rack"),
            ("--join nowhere", "HOST:PORT"),
            ("--memory lots", "64MiB"),
        ] {
            let error = refusal(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
