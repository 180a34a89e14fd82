//! A shard's directory: identity, manifest, the tables that it names, and the log.
//!
//! Invariant: what a server would read is checked, and nothing else: tables that no manifest
//! names and manifests that a newer one replaced are leftovers, not damage.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use annulus_engine::disk::{Disk, OpenMode};
use annulus_engine::error::Error;
use annulus_engine::identity;
use annulus_engine::log::{LogIdentity, Lsn, ReplayItem, replay};
use annulus_engine::model::TokenRange;
use annulus_engine::sstable::TableId;
use annulus_engine::tables::manifest::{
    Owner, Replay, manifest_name, parse_manifest_name, replay_file,
};
use serde_json::json;

use super::files::{Files, now};
use super::report::Report;
use super::{inspect_identity, log, table};

const LOG_DIR: &str = "log";
const TABLE_DIR: &str = "table";

/// Prints a shard's directory.
pub(super) fn inspect<W: Write>(dir: &Path, report: &mut Report<'_, W>) -> io::Result<()> {
    let Some(identity) = inspect_identity(&dir.join(identity::FILE_NAME), report)? else {
        return report.note(dir, "without an identity nothing here can be checked");
    };
    let owner = Owner::of(&identity);
    let names = list(dir, report)?;
    let newest = names.iter().filter_map(|name| parse_manifest_name(name)).max();
    let replayed = match newest {
        None => {
            let path = dir.join(manifest_name(1));
            report.damage(&Error::corrupt(path, 0, "the shard has no manifest"))?;
            None
        }
        Some(id) => inspect_manifest(&dir.join(manifest_name(id)), owner, id, report)?,
    };
    inspect_tables(&dir.join(TABLE_DIR), owner, replayed.as_ref(), report)?;
    let released = replayed.map_or(Lsn::ZERO, |replayed| replayed.layout.released);
    let of = LogIdentity { cluster: identity.cluster, shard: identity.shard };
    inspect_log(&dir.join(LOG_DIR), of, released.next(), report)
}

fn list<W: Write>(dir: &Path, report: &mut Report<'_, W>) -> io::Result<Vec<String>> {
    match now(Files.list(dir)) {
        Ok(names) => Ok(names),
        Err(error) => report.damage(&error).map(|()| Vec::new()),
    }
}

/// Prints a manifest, and gives what it says when it is whole.
pub(super) fn inspect_manifest<W: Write>(
    path: &Path,
    owner: Owner,
    id: u64,
    report: &mut Report<'_, W>,
) -> io::Result<Option<Replay>> {
    let replayed = now(async {
        let file = Files.open(path, OpenMode::Read).await?;
        replay_file(&file, path, owner, id).await
    });
    let replayed = match replayed {
        Ok(replayed) => replayed,
        Err(error) => return report.damage(&error).map(|()| None),
    };
    let stats = replayed.layout.stats();
    report.file(
        path,
        "manifest",
        &json!({
            "manifest": id,
            "edits": replayed.edits.len(),
            "upper_tables": stats.upper_tables,
            "upper_bytes": stats.upper_bytes,
            "last_tables": stats.last_tables,
            "last_bytes": stats.last_bytes,
            "released": replayed.layout.released.0,
            "logged": replayed.layout.logged.0,
            "partitions_seen": replayed.layout.replicas.len(),
            "ranges_lost": replayed.layout.lost.len(),
            "blocks_voided": replayed.layout.voided.len(),
            "next_table": replayed.layout.next_table,
        }),
    )?;
    if replayed.repaired > 0 {
        let what = format!("{} damaged sectors, each with a whole twin", replayed.repaired);
        report.damage(&Error::corrupt(path, 0, what))?;
    }
    if replayed.torn {
        report.note(path, "ends in an edit that was never finished; the next start removes it")?;
    }
    if report.shows_records() {
        for (offset, edit) in &replayed.edits {
            let ids = |ids: &[TableId]| ids.iter().map(|id| id.0).collect::<Vec<_>>();
            report.entry(
                path,
                "edit",
                &json!({
                    "offset": offset,
                    "whole": edit.whole,
                    "added": edit.added.iter().map(|table| table.summary.id.0).collect::<Vec<_>>(),
                    "removed": ids(&edit.removed),
                    "consumed": edit.consumed.iter().map(|part| part.table.0).collect::<Vec<_>>(),
                    "released": edit.released.map(|lsn| lsn.0),
                }),
            )?;
        }
    }
    Ok(Some(replayed))
}

/// Prints the live tables, and names what is missing or left over.
fn inspect_tables<W: Write>(
    dir: &Path,
    owner: Owner,
    replayed: Option<&Replay>,
    report: &mut Report<'_, W>,
) -> io::Result<()> {
    let names = list(dir, report)?;
    let found: Vec<TableId> =
        names.iter().filter_map(|name| TableId::from_file_name(name)).collect();
    let Some(replayed) = replayed else {
        for id in found {
            table::inspect(&dir.join(id.file_name()), owner, id, None, report)?;
        }
        return Ok(());
    };
    let live: BTreeMap<TableId, Vec<TokenRange>> =
        replayed.layout.entries().map(|entry| (entry.id(), entry.live.iter().collect())).collect();
    for entry in replayed.layout.entries() {
        let (id, size) = (entry.id(), entry.summary.size);
        let path = dir.join(id.file_name());
        match std::fs::metadata(&path) {
            Ok(meta) if meta.len() == size => {
                table::inspect(&path, owner, id, live.get(&id).map(Vec::as_slice), report)?;
            }
            Ok(meta) => {
                let len = meta.len();
                let what = format!("the manifest says {size} bytes, the file has {len}");
                report.damage(&Error::corrupt(&path, len.min(size), what))?;
            }
            Err(error) => {
                let what = format!("the manifest names this table: {error}");
                report.damage(&Error::corrupt(&path, 0, what))?;
            }
        }
    }
    for id in found.iter().filter(|id| !live.contains_key(id)) {
        let path = dir.join(id.file_name());
        report.note(&path, "no manifest names this table; the next start removes it")?;
    }
    Ok(())
}

/// Prints the log's records from `from` on, as a start would replay them.
fn inspect_log<W: Write>(
    dir: &Path,
    identity: LogIdentity,
    from: Lsn,
    report: &mut Report<'_, W>,
) -> io::Result<()> {
    if !report.verifies() && !report.shows_records() {
        for name in list(dir, report)?.iter().filter(|name| name.ends_with(".log")) {
            log::inspect(&dir.join(name), report)?;
        }
        return Ok(());
    }
    let mut written = Ok(());
    let replayed = now(replay(&Files, dir, identity, from, &mut |lsn, item| {
        if let (ReplayItem::Record(record), Ok(())) = (item, &written) {
            written = report.record(dir, ("lsn", lsn.0), &record);
        }
    }));
    written?;
    match replayed {
        Ok(end) => {
            report.file(
                dir,
                "log",
                &json!({
                    "from": from.0,
                    "last": end.last.0,
                    "records": end.records,
                    "bytes": end.bytes,
                    "clean": end.clean,
                }),
            )?;
            match end.torn {
                Some(torn) => {
                    let what = format!("torn tail at offset {}: never acknowledged", torn.offset);
                    report.note(&torn.path, &what)
                }
                None => Ok(()),
            }
        }
        Err(error) => report.damage(&error),
    }
}
