//! What the command line accepts. Help texts are here and nowhere else.
//!
//! Invariant: pure; the structs are what the commands get. Every command has an example.

use std::ffi::OsString;
use std::path::PathBuf;

use annulus_net::wire::Level;
use clap::{Args, Parser, Subcommand};

use crate::config::{Compression, Flags, LISTEN_DEFAULT};
use crate::namespaces::{self, Availability, Mode};
use crate::units::Span;

/// A distributed key-value store for NVMe hosts: server and tools in one program.
#[derive(Debug, Parser)]
#[command(name = "annulus", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(
    after_help = "Start one node and use it:\n  annulus serve &\n  annulus put greeting hello\n  \
    annulus get greeting\n\nExit codes: 0 success, 1 not found or condition false, 2 bad usage or \
    input,\n3 no server reached, 4 refused and not started, 5 may have been applied."
)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run one node. Every option is also a variable and a key of the configuration file.
    #[cfg(feature = "uring")]
    #[command(after_help = "Examples:\n  annulus serve\n  annulus serve --data-dir /srv/annulus \
        --memory 8GiB --cores 2-7\n  annulus serve --config /etc/annulus.toml\n  ANNULUS_SPIN=0s \
        annulus serve\n\nPrints one line when it serves:\n  annulus ready client=... peer=... \
        admin=... shards=N data=...")]
    Serve(Box<ServeArguments>),
    /// Run a cluster of several processes on this machine, to try things out.
    #[cfg(feature = "uring")]
    #[command(after_help = "Examples:\n  annulus dev --nodes 3\n  annulus dev --stop 2\n  \
        annulus put k v --addr 127.0.0.1:7401\n  annulus dev --start 2\n\nNode I serves clients on \
        port 7401 + 10 (I - 1), peers on the next, HTTP on the one after. Options after -- go to \
        every node's `serve`.")]
    Dev(DevArguments),
    /// Look at the host: what is there, what is in the way, what to choose.
    #[command(after_help = "Example:\n  annulus doctor --data-dir /srv/annulus\n\nExits 0 when a \
        node can serve here.")]
    Doctor(Box<DoctorArguments>),
    /// Store a value.
    #[command(after_help = "Examples:\n  annulus put user:7 '{\"name\":\"Ada\"}' --ttl 12h\n  \
        annulus put photo --file ada.jpg\n  date | annulus put now -\n  annulus put seat:12A taken \
        --if-absent")]
    Put(PutArguments),
    /// Print a value.
    #[command(after_help = "Examples:\n  annulus get user:7\n  annulus get photo > ada.jpg\n  \
        annulus get user:7 --json")]
    Get(GetArguments),
    /// Delete a key.
    #[command(after_help = "Example:\n  annulus del user:7")]
    Del(DelArguments),
    /// Store many keys from a file of JSON lines or tab-separated values.
    #[command(after_help = "Examples:\n  annulus import data.jsonl\n  zcat data.tsv.gz | annulus \
        import - --format tsv\n\nJSON lines: {\"key\":\"k\",\"value\":\"v\",\"ttl\":\"12h\"}, or \
        key_base64, value_base64.\nTSV: key, tab, value; \\t \\n \\r \\\\ stand for tab, newline, \
        return, backslash.")]
    Import(ImportArguments),
    /// Print all keys of a namespace as JSON lines, in token order.
    #[command(after_help = "Example:\n  annulus export --ns users > users.jsonl")]
    Export(ExportArguments),
    /// Create, list, change and drop namespaces.
    #[command(
        after_help = "Examples:\n  annulus ns create users --n 3 --mode siblings\n  annulus \
        ns list\n  annulus ns set users --ttl 30d\n  annulus ns drop users"
    )]
    Ns(NsArguments),
    /// Show who holds which partition, or where a key lives.
    #[command(after_help = "Examples:\n  annulus ring --key user:7\n  annulus ring --partition 17")]
    Ring(RingArguments),
    /// Show counters and latencies of a node.
    #[command(after_help = "Example:\n  annulus stats --json")]
    Stats(StatsArguments),
    /// Show one row a node.
    #[command(after_help = "Example:\n  annulus status")]
    Status(StatusArguments),
    /// Compare a node's partitions with their other replicas, check all its data, or show how far
    /// it is. A node of its own can only be checked: --scrub.
    #[command(after_help = "Examples:\n  annulus repair\n  annulus repair --status --json\n  \
        annulus repair --scrub\n\nExit code of --status: 0 when all replicas agree as far as \
        the node knows, else 1.")]
    Repair(RepairArguments),
    /// Let a node leave: its partitions go to the others, then its process ends with exit code 0.
    #[command(after_help = "Example:\n  annulus decommission 4\n\n`annulus status` has the ids, \
        and shows how many partitions are left.")]
    Decommission(MemberArguments),
    /// Give up a node that will not come back: the others make up for its copies.
    #[command(after_help = "Example:\n  annulus replace 2\n\nWhat only that node had is lost. It \
        cannot come back; a new node joins with a new --data-dir.")]
    Replace(MemberArguments),
    /// Print a log segment, table, manifest, identity, namespaces or registers file, or a directory
    /// of them.
    #[command(
        after_help = "Examples:\n  annulus inspect annulus-data/shard-000/IDENTITY\n  annulus \
        inspect annulus-data --verify\n  annulus inspect annulus-data --records --json\n\nReads \
        files only; a running node's files may be caught in the middle of a change."
    )]
    Inspect(InspectArguments),
    /// Create, list and delete snapshots of a node.
    #[command(
        after_help = "Examples:\n  annulus snapshot create monday\n  annulus snapshot list\n  \
        annulus snapshot delete monday"
    )]
    Snapshot(SnapshotArguments),
}

/// A cluster on this machine.
#[cfg(feature = "uring")]
#[derive(Clone, Debug, Args)]
pub(crate) struct DevArguments {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) nodes: u32,
    /// Where their files go.
    #[arg(long, value_name = "DIR", default_value = "./annulus-dev")]
    pub(crate) data_dir: PathBuf,
    /// First port of the first node.
    #[arg(long, value_name = "PORT", default_value_t = 7401)]
    pub(crate) base_port: u16,
    /// Stop this node of the running cluster.
    #[arg(long, value_name = "I", conflicts_with = "start")]
    pub(crate) stop: Option<u32>,
    /// Start this node of the running cluster again.
    #[arg(long, value_name = "I")]
    pub(crate) start: Option<u32>,
    /// More options for every node.
    #[arg(last = true, value_name = "SERVE OPTIONS")]
    pub(crate) serve: Vec<OsString>,
}

/// Which server, and how long to wait for it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Server {
    /// Addresses to try, the first that answers is used.
    #[arg(long, env = "ANNULUS_ADDR", value_name = "H:P,...", value_delimiter = ',',
        default_value = LISTEN_DEFAULT)]
    pub(crate) addr: Vec<String>,
    /// How long an operation may take [default: 1s; import, export and admin commands: 30s].
    #[arg(long, env = "ANNULUS_TIMEOUT", value_name = "TIME")]
    pub(crate) timeout: Option<Span>,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which namespace.
#[derive(Clone, Debug, Args)]
pub(crate) struct InNamespace {
    /// Namespace of the keys.
    #[arg(long, env = "ANNULUS_NS", value_name = "NAME", default_value = "default")]
    pub(crate) ns: String,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// Configuration file (TOML); its keys are the names of the options below.
    #[arg(long, env = "ANNULUS_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// For this start: go on without records of the commit log that were acknowledged and cannot
    /// be read. Without it such a start is refused and names them. What can be read is kept, what
    /// cannot is logged and counted, and the damaged files stay as log/*.log.damaged.
    /// A node alone may then show an older value of a key; a member of a cluster answers nothing
    /// for its share until the others have refilled it.
    #[arg(long)]
    pub(crate) accept_loss: bool,
    #[command(flatten)]
    pub(crate) flags: Flags,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    /// Configuration file (TOML), as `serve` would get.
    #[arg(long, env = "ANNULUS_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) flags: Flags,
}

/// How a write is to be done.
#[derive(Clone, Debug, Args)]
pub(crate) struct WriteLevel {
    /// Replicas that must acknowledge: a number, one, quorum, all [default: the namespace's].
    #[arg(long, env = "ANNULUS_W", value_name = "LEVEL")]
    pub(crate) w: Option<Level>,
    /// What an earlier `get --json` gave as `context`: this write replaces what that saw.
    #[arg(long, value_name = "HEX")]
    pub(crate) context: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PutArguments {
    /// The key, 1 to 4096 bytes.
    pub(crate) key: OsString,
    /// The value; `-` reads it from stdin.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    pub(crate) value: Option<OsString>,
    /// Read the value from a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// The key is gone after this time; 0s is never [default: the namespace's].
    #[arg(long, value_name = "TIME")]
    pub(crate) ttl: Option<Span>,
    /// Only if the key has this version.
    #[arg(long, value_name = "VERSION", conflicts_with = "if_absent")]
    pub(crate) if_version: Option<String>,
    /// Only if the key has no value.
    #[arg(long)]
    pub(crate) if_absent: bool,
    /// Print each step of the write on stderr.
    #[arg(long)]
    pub(crate) trace: bool,
    #[command(flatten)]
    pub(crate) write: WriteLevel,
    #[command(flatten)]
    pub(crate) namespace: InNamespace,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct GetArguments {
    /// The key, 1 to 4096 bytes.
    pub(crate) key: OsString,
    /// Replicas that must answer: a number, one, quorum, all [default: the namespace's].
    #[arg(long, env = "ANNULUS_R", value_name = "LEVEL")]
    pub(crate) r: Option<Level>,
    /// Accept an answer that may be this old.
    #[arg(long, value_name = "TIME")]
    pub(crate) max_staleness: Option<Span>,
    /// Print each step of the read on stderr.
    #[arg(long)]
    pub(crate) trace: bool,
    #[command(flatten)]
    pub(crate) namespace: InNamespace,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct DelArguments {
    /// The key, 1 to 4096 bytes.
    pub(crate) key: OsString,
    /// Only if the key has this version.
    #[arg(long, value_name = "VERSION")]
    pub(crate) if_version: Option<String>,
    #[command(flatten)]
    pub(crate) write: WriteLevel,
    #[command(flatten)]
    pub(crate) namespace: InNamespace,
    #[command(flatten)]
    pub(crate) server: Server,
}

/// How a file of keys is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// One JSON object a line.
    Jsonl,
    /// Key, tab, value.
    Tsv,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArguments {
    /// A file of JSON lines, or of TSV if its name ends so; `-` is stdin.
    pub(crate) file: PathBuf,
    /// How the file is written [default: by its name, else JSON lines].
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
    /// Most keys a second.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rate: Option<u64>,
    /// Stop at the first bad line.
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) namespace: InNamespace,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// Only this partition.
    #[arg(long, value_name = "P")]
    pub(crate) partition: Option<u32>,
    /// Print versions too, and deleted keys.
    #[arg(long)]
    pub(crate) versions: bool,
    #[command(flatten)]
    pub(crate) namespace: InNamespace,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct NsArguments {
    #[command(subcommand)]
    pub(crate) command: NsCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NsCommand {
    /// Make a namespace.
    #[command(after_help = "Example:\n  annulus ns create carts --n 3 --mode siblings --ttl 30d")]
    Create(NsChangeArguments),
    /// List all namespaces.
    #[command(after_help = "Example:\n  annulus ns list --json")]
    List(OnlyServer),
    /// Change settings of a namespace; what is not named stays.
    #[command(after_help = "Example:\n  annulus ns set carts --ttl 60d")]
    Set(NsChangeArguments),
    /// Remove a namespace with all its records.
    #[command(after_help = "Example:\n  annulus ns drop carts")]
    Drop(NameArguments),
}

#[derive(Debug, Args)]
pub(crate) struct OnlyServer {
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct NameArguments {
    /// The name.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct NsChangeArguments {
    /// Name: 1 to 64 letters, digits, `-`, `_`, `.`.
    pub(crate) name: String,
    /// Copies of each record, 1 to 16 [default: 3].
    #[arg(long)]
    pub(crate) n: Option<u8>,
    /// Replicas that must acknowledge a write [default: quorum].
    #[arg(long, value_name = "LEVEL")]
    pub(crate) w: Option<namespaces::Level>,
    /// Replicas that must answer a read [default: quorum].
    #[arg(long, value_name = "LEVEL")]
    pub(crate) r: Option<namespaces::Level>,
    /// What happens to concurrent versions; fixed at creation [default: lww]. `linearizable`: there
    /// are none, each key is a register; needs `--durability sync`, and fixes n.
    #[arg(long, value_enum)]
    pub(crate) mode: Option<Mode>,
    /// What happens when replicas cannot reach each other [default: ap; linearizable: cp].
    #[arg(long, value_enum)]
    pub(crate) availability: Option<Availability>,
    /// How blocks are compressed [default: the node's].
    #[arg(long, value_enum)]
    pub(crate) compression: Option<Compression>,
    /// Time to live of records that name none; 0s is for ever [default: 0s].
    #[arg(long, value_name = "TIME")]
    pub(crate) ttl: Option<Span>,
    /// Copies per data centre; their sum is n.
    #[arg(long, value_name = "NAME=N,...", value_delimiter = ',')]
    pub(crate) dc: Vec<String>,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct RingArguments {
    /// Only this partition.
    #[arg(long, value_name = "P", conflicts_with = "key")]
    pub(crate) partition: Option<u32>,
    /// Where this key lives.
    #[arg(long)]
    pub(crate) key: Option<OsString>,
    #[command(flatten)]
    pub(crate) namespace: InNamespace,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArguments {
    /// The node to ask, instead of --addr.
    #[arg(long, value_name = "H:P")]
    pub(crate) node: Option<String>,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct RepairArguments {
    /// Only what is compared together with this namespace: those with as many copies.
    #[arg(long, value_name = "NS", conflicts_with = "status")]
    pub(crate) ns: Option<String>,
    /// Start nothing, show how far the replicas agree; exit 1 when they do not.
    #[arg(long)]
    pub(crate) status: bool,
    /// Read all records as well, to check them.
    #[arg(long, conflicts_with = "status")]
    pub(crate) scrub: bool,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct MemberArguments {
    /// The node's id.
    pub(crate) node: u32,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// A file of a data directory, or a directory of such files.
    pub(crate) path: PathBuf,
    /// Check every checksum; exit 1 when damage is found.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print JSON, one document a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print records too, also of directories.
    #[arg(long)]
    pub(crate) records: bool,
}

impl InspectArguments {
    /// What `inspect` is to do.
    pub(crate) fn options(&self) -> crate::inspect::Options {
        crate::inspect::Options { verify: self.verify, json: self.json, records: self.records }
    }
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    #[command(subcommand)]
    pub(crate) command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Make a snapshot: hard links, so it costs no space at first.
    #[command(after_help = "Example:\n  annulus snapshot create monday")]
    Create(SnapshotCreateArguments),
    /// List all snapshots.
    #[command(after_help = "Example:\n  annulus snapshot list --json")]
    List(OnlyServer),
    /// Delete a snapshot.
    #[command(after_help = "Example:\n  annulus snapshot delete monday")]
    Delete(NameArguments),
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotCreateArguments {
    /// The name [default: the time, such as 2026-01-31T12-00-00Z].
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) server: Server,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Command, String> {
        Arguments::try_parse_from(line.split_whitespace())
            .map(|arguments| arguments.command)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_holds_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("annulus "), "{} has no example", command.get_name());
            command.get_subcommands().for_each(check);
        }
        check(&Arguments::command());
    }

    #[test]
    fn a_value_comes_from_one_place() {
        assert!(parse("annulus put k v").is_ok());
        assert!(parse("annulus put k -").is_ok());
        assert!(parse("annulus put k --file f").is_ok());
        assert!(parse("annulus put k").is_err());
        assert!(parse("annulus put k v --file f").is_err());
        assert!(parse("annulus put k v --if-absent --if-version 1-1-1").is_err());
    }

    #[test]
    fn addresses_levels_and_times_are_read() {
        let Ok(Command::Get(get)) =
            parse("annulus get k --addr a:1,b:2 --r quorum --timeout 250ms --ns users")
        else {
            panic!("does not parse");
        };
        assert_eq!(get.server.addr, ["a:1", "b:2"]);
        assert_eq!(get.r, Some(Level::Quorum));
        assert_eq!(get.server.timeout.unwrap().as_millis(), 250);
        assert_eq!(get.namespace.ns, "users");
        for line in
            ["annulus get k --r most", "annulus get k --timeout 5", "annulus fly", "annulus"]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
