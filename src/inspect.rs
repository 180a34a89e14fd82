//! `annulus inspect`: the files of a data directory as text or JSON, and whether they are whole.
//!
//! Invariant: reads only, through the engine's own readers of its formats, and with memory in
//! proportion to one block or batch. What is damaged is named with file and offset, and reading
//! goes on with the next file. With `--verify` every checksum that a server would rely on is
//! checked; a log's torn tail and the given-up parts of a table are no damage.

pub mod files;
mod log;
mod report;
mod shard;
mod table;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use annulus_cluster::NodeId;
use annulus_cluster::register::Ballot;
use annulus_engine::disk::{Disk, File, OpenMode};
use annulus_engine::error::Error;
use annulus_engine::identity::{self, Identity};
use annulus_engine::sstable::TableId;
use annulus_engine::tables::manifest::{Owner, parse_manifest_name};
use serde_json::json;

use crate::namespaces::{self, Catalogue};
use crate::registers::{self, Registers};
use files::{Files, now};
use report::Report;

/// What to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Check every checksum.
    pub verify: bool,
    /// Print JSON, one document a line.
    pub json: bool,
    /// Print records, also of directories. A single file's are printed unless it is verified.
    pub records: bool,
}

/// Inspection came to no result.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The file is not one of ours, or cannot be read alone.
    #[error("{0}")]
    Usage(String),
    /// The result cannot be written.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

/// Inspects a file or directory and writes what it finds to `out`. Returns whether all is whole.
///
/// # Errors
/// [`Failure`]; damage is a result, not an error.
pub fn run(path: &Path, options: Options, out: &mut impl Write) -> Result<bool, Failure> {
    let meta = std::fs::metadata(path)
        .map_err(|error| Failure::Usage(format!("cannot read {}: {error}", path.display())))?;
    let records = options.records || (meta.is_file() && !options.verify);
    let mut report = Report::new(out, Options { records, ..options });
    let done = if meta.is_dir() { directory(path, &mut report) } else { file(path, &mut report) };
    match done.and_then(|()| report.finish().map_err(Failure::Output)) {
        // A reader that has gone (`| head`) wants no more.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(report.is_whole())
        }
        Err(failure) => Err(failure),
        Ok(()) => Ok(report.is_whole()),
    }
}

/// What a file is, by its name; a renamed copy by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    Identity,
    Log,
    Manifest(u64),
    Namespaces,
    Registers,
    Table(TableId),
}

fn kind_of(path: &Path) -> Option<FileKind> {
    let name = path.file_name()?.to_str()?;
    if let Some(kind) = kind_of_name(name) {
        return Some(kind);
    }
    let mut head = [0; 8];
    io::Read::read_exact(&mut std::fs::File::open(path).ok()?, &mut head).ok()?;
    match &head {
        b"ANNIDN\r\n" => Some(FileKind::Identity),
        b"ANNLOG\r\n" => Some(FileKind::Log),
        b"ANLSNMSP" => Some(FileKind::Namespaces),
        b"ANLSREGS" => Some(FileKind::Registers),
        _ => None,
    }
}

fn kind_of_name(name: &str) -> Option<FileKind> {
    match name {
        identity::FILE_NAME => Some(FileKind::Identity),
        namespaces::FILE_NAME => Some(FileKind::Namespaces),
        registers::FILE_NAME => Some(FileKind::Registers),
        _ => annulus_engine::log::format::parse_name(name)
            .map(|_| FileKind::Log)
            .or_else(|| parse_manifest_name(name).map(FileKind::Manifest))
            .or_else(|| TableId::from_file_name(name).map(FileKind::Table)),
    }
}

fn file<W: Write>(path: &Path, report: &mut Report<'_, W>) -> Result<(), Failure> {
    match kind_of(path) {
        Some(FileKind::Identity) => {
            inspect_identity(path, report).map(drop).map_err(Failure::Output)
        }
        Some(FileKind::Log) => Ok(log::inspect(path, report)?),
        Some(FileKind::Namespaces) => Ok(inspect_namespaces(path, report)?),
        Some(FileKind::Registers) => {
            let node = node_of(path)?;
            Ok(inspect_registers(path, node, report)?)
        }
        Some(FileKind::Manifest(id)) => {
            let owner = owner_of(path)?;
            Ok(shard::inspect_manifest(path, owner, id, report).map(drop)?)
        }
        Some(FileKind::Table(id)) => {
            let owner = owner_of(path)?;
            Ok(table::inspect(path, owner, id, None, report)?)
        }
        None => Err(Failure::Usage(format!(
            "{} is no file of a data directory: IDENTITY, MANIFEST-*, NAMESPACES, REGISTERS, \
             *.log, *.sst",
            path.display()
        ))),
    }
}

/// Whose tables and manifest lie here: the checksums need it.
fn owner_of(path: &Path) -> Result<Owner, Failure> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    for dir in absolute.ancestors().skip(1).take(2) {
        let bytes = std::fs::read(dir.join(identity::FILE_NAME)).unwrap_or_default();
        if let Some(identity) = Identity::copies(&bytes).into_iter().find_map(Result::ok) {
            return Ok(Owner::of(&identity));
        }
    }
    Err(Failure::Usage(format!(
        "{} can only be read beside the IDENTITY of its shard: its checksums depend on it",
        path.display()
    )))
}

/// Whose registers lie here: their checksum needs it, and any shard of the node says it.
fn node_of(path: &Path) -> Result<NodeId, Failure> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let dir = absolute.parent().unwrap_or(&absolute);
    for shard in subdirectories(dir, "shard-") {
        let bytes = std::fs::read(shard.join(identity::FILE_NAME)).unwrap_or_default();
        if let Some(identity) = Identity::copies(&bytes).into_iter().find_map(Result::ok) {
            return Ok(NodeId(identity.node.0));
        }
    }
    Err(Failure::Usage(format!(
        "{} can only be read beside a shard of its node: its checksum depends on it",
        path.display()
    )))
}

/// A data directory, a shard's directory, or one below.
fn directory<W: Write>(dir: &Path, report: &mut Report<'_, W>) -> Result<(), Failure> {
    if dir.join(identity::FILE_NAME).exists() {
        return Ok(shard::inspect(dir, report)?);
    }
    let names = now(Files.list(dir)).map_err(|error| Failure::Usage(error.to_string()))?;
    let shards = subdirectories(dir, "shard-");
    let known: Vec<&String> = names.iter().filter(|name| kind_of_name(name).is_some()).collect();
    if shards.is_empty() && known.is_empty() {
        let what = format!("{} holds no shards and no files of ours", dir.display());
        return Err(Failure::Usage(what));
    }
    for name in known {
        file(&dir.join(name), report)?;
    }
    for shard in shards {
        if shard.join(identity::FILE_NAME).exists() {
            shard::inspect(&shard, report)?;
        } else {
            let path = shard.join(identity::FILE_NAME);
            report.damage(&Error::corrupt(path, 0, "the shard's directory has no IDENTITY"))?;
        }
    }
    for snapshot in subdirectories(&dir.join("snapshots"), "") {
        directory(&snapshot, report)?;
    }
    Ok(())
}

/// Directories whose names begin so, sorted.
fn subdirectories(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Reads a small file whole; damage when it is larger than it can be.
fn read_small(path: &Path, size_max: usize) -> Result<annulus_engine::buffer::AlignedBuf, Error> {
    now(async {
        let file = Files.open(path, OpenMode::Read).await?;
        let len = usize::try_from(file.len().await?).unwrap_or(usize::MAX);
        if len > size_max {
            return Err(Error::corrupt(path, 0, format!("{len} bytes are too many")));
        }
        file.read_at(0, len).await
    })
}

/// Prints an identity, and gives it when a copy is whole.
fn inspect_identity<W: Write>(
    path: &Path,
    report: &mut Report<'_, W>,
) -> io::Result<Option<Identity>> {
    let bytes = match read_small(path, 1 << 20) {
        Ok(bytes) => bytes,
        Err(error) => return report.damage(&error).map(|()| None),
    };
    let copies = Identity::copies(&bytes);
    for (copy, found) in copies.iter().enumerate() {
        if let Err(what) = found {
            let what = format!("copy {copy} of the identity: {what}");
            report.damage(&Error::corrupt(path, copy as u64 * 4096, what))?;
        }
    }
    let Some(identity) = copies.into_iter().find_map(Result::ok) else { return Ok(None) };
    report.file(
        path,
        "identity",
        &json!({
            "cluster": format!("{:032x}", identity.cluster),
            "node": identity.node.0,
            "shard": identity.shard,
            "shard_count": identity.shard_count,
            "partition_bits": identity.partition_bits,
            "created": report::moment(identity.created.0),
        }),
    )?;
    Ok(Some(identity))
}

fn inspect_namespaces<W: Write>(path: &Path, report: &mut Report<'_, W>) -> io::Result<()> {
    let decoded = read_small(path, 16 << 20).and_then(|bytes| Catalogue::decode(&bytes, path));
    match decoded {
        Ok(catalogue) => report.file(
            path,
            "namespaces",
            &json!({
                "generation": catalogue.generation(),
                "namespaces": catalogue.iter().collect::<Vec<_>>(),
            }),
        ),
        Err(error) => report.damage(&error),
    }
}

/// Prints what a member has promised and accepted. A damaged file is refused by the next start.
fn inspect_registers<W: Write>(
    path: &Path,
    node: NodeId,
    report: &mut Report<'_, W>,
) -> io::Result<()> {
    let decoded =
        read_small(path, 16 << 20).and_then(|bytes| Registers::decode(&bytes, path, node));
    let registers = match decoded {
        Ok(registers) => registers,
        Err(error) => return report.damage(&error),
    };
    let count = registers.iter().count();
    report.file(path, "registers", &json!({ "node": node.0, "registers": count }))?;
    let ballot = |ballot: Ballot| json!({ "counter": ballot.counter, "node": ballot.node.0, "session": ballot.session });
    for (register, acceptor) in registers.iter() {
        let names: Vec<String> = registers::catalogue_of(&acceptor.state)
            .map(|catalogue| catalogue.iter().map(|namespace| namespace.name.clone()).collect())
            .unwrap_or_default();
        report.entry(
            path,
            "register",
            &json!({
                "register": register.0,
                "promised": ballot(acceptor.promised),
                "accepted": ballot(acceptor.accepted),
                "version": acceptor.state.version,
                "value_size": acceptor.state.value.len(),
                "namespaces": names,
            }),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
