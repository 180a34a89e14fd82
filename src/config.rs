//! Configuration of a node: flags, environment, file and defaults, in that order of precedence.
//!
//! Invariant: every option has one name (`data-dir`), which is the flag `--data-dir`, the
//! variable `ANNULUS_DATA_DIR` and the key `data-dir` of the TOML file; and a [`Config`] that
//! exists is valid. Each option says its unit, its default, and when to change it, in
//! [`Flags`] and nowhere else: the same words are the `--help` text.

mod flags;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use annulus_engine::model::limits::{
    BLOCK_SIZE_DEFAULT, DISK_ALIGNMENT, VALUE_SIZE_CEILING, VALUE_SIZE_DEFAULT,
};
use annulus_engine::model::token::PARTITION_BITS_MAX;
use annulus_engine::options::{self, CompactionOptions, LogOptions, Options, SpaceOptions};
use annulus_tuning::host::Host;
use annulus_tuning::{Budget, BudgetInput};

pub use flags::{
    ADMIN_LISTEN_DEFAULT, AddressList, Compression, CoreList, Durability, Flags, LISTEN_DEFAULT,
    PEER_LISTEN_DEFAULT, ZSTD_LEVEL,
};

use crate::cluster_key::ClusterKey;
use crate::units::{Part, Size, Span};
use flags::check_address;

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
    pub cluster_key_file: Option<PathBuf>,
    pub insecure_public: bool,
    /// Only of the command line: true for one start, never by a file or variable.
    pub accept_loss: bool,
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
    /// See [`Config::hint_size_max`].
    pub hint_size_max: Part,
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
            cluster_key_file: flags.cluster_key_file,
            insecure_public: public,
            accept_loss: false,
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
            hint_size_max: flags.hint_size_max.unwrap_or(Part::Percent(10)),
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

    /// The key of the cluster that was founded by the list of members with this digest.
    ///
    /// # Errors
    /// The file cannot be used, or is missing where the members' list is known to strangers.
    pub fn cluster_key(&self, founding: u64) -> Result<ClusterKey, String> {
        match &self.cluster_key_file {
            Some(path) => ClusterKey::read(path),
            None if self.insecure_public => {
                Err("cluster-key-file: needed where others than this machine reach the peers' port"
                    .to_owned())
            }
            None => Ok(ClusterKey::of_members(founding)),
        }
    }

    /// Disk space that is kept, on a disk of so many bytes.
    #[must_use]
    pub fn disk_reserve(&self, disk_total: u64) -> u64 {
        self.disk_reserve.unwrap_or((disk_total / 64).min(256 << 20))
    }

    /// Most bytes of copies that the node keeps for others, on a disk of so many bytes.
    #[must_use]
    pub fn hint_size_max(&self, disk_total: u64) -> u64 {
        self.hint_size_max.of(disk_total)
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
            // As `Options` has them by default, 18 for 10: see there for why.
            filter_bits_upper: if self.filter_bits == 0 { 0 } else { self.filter_bits + 8 },
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
            // The node says so when it has peers.
            replicated: defaults.replicated,
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
mod tests;
