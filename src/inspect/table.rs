//! A table: its footer, sections and records.
//!
//! Invariant: every section and every block that may still be read is checked when asked to.
//! Blocks of ranges that compaction has consumed may be holes; they are left out when the
//! manifest says which those are.

use std::io::{self, Write};
use std::path::Path;
use std::rc::Rc;

use annulus_engine::disk::{Disk, File, OpenMode};
use annulus_engine::error::Error;
use annulus_engine::model::TokenRange;
use annulus_engine::sstable::format::{Footer, verify_section};
use annulus_engine::sstable::table::read_footer;
use annulus_engine::sstable::{Table, TableId, TableIdentity, TableScan, file_salt};
use annulus_engine::tables::manifest::Owner;
use serde_json::json;

use super::files::{Files, OpenFile, now};
use super::report::{Report, moment};

/// Bytes of one read of blocks, and of a section.
const READ_SIZE: usize = 1 << 20;

/// Prints a table; `live` are the ranges that are read, none when nobody knows.
pub(super) fn inspect<W: Write>(
    path: &Path,
    owner: Owner,
    id: TableId,
    live: Option<&[TokenRange]>,
    report: &mut Report<'_, W>,
) -> io::Result<()> {
    let salt = file_salt(owner.cluster, owner.shard, id);
    let identity = TableIdentity { id, salt, path: path.to_path_buf() };
    let (file, footer) = match open(path, &identity) {
        Ok(opened) => opened,
        Err(error) => return report.damage(&error),
    };
    report.file(
        path,
        "table",
        &json!({
            "table": footer.table_id,
            "size": footer.file_len,
            "blocks": footer.block_count,
            "records": footer.record_count,
            "tombstones": footer.tombstone_count,
            "expiring": footer.expiring_count,
            "raw_bytes": footer.raw_bytes,
            "data_bytes": footer.data_len,
            "filter_bytes": footer.filter_len,
            "index_bytes": footer.index_len,
            "first_token": format!("{:016x}", footer.first_token),
            "last_token": format!("{:016x}", footer.last_token),
            "newest": moment(footer.timestamp_max >> 12),
            "live_ranges": live.map(<[TokenRange]>::len),
        }),
    )?;
    if report.verifies() {
        verify_sections(&file, &identity, &footer, report)?;
    }
    if !report.verifies() && !report.shows_records() {
        return Ok(());
    }
    let table = match now(Table::open(file, identity)) {
        Ok(table) => Rc::new(table),
        Err(error) => return report.damage(&error),
    };
    let whole = [TokenRange::FULL];
    for range in live.unwrap_or(&whole) {
        let mut scan = TableScan::new(table.clone(), *range, READ_SIZE);
        loop {
            let block = match now(scan.next_block()) {
                Ok(Some(block)) => block,
                Ok(None) => break,
                Err(error) => {
                    report.damage(&error)?;
                    // The scan goes on behind a damaged block; another failure repeats itself.
                    if matches!(error, Error::Corrupt { .. }) { continue } else { break }
                }
            };
            let offset = block.handle().offset;
            for record in block.iter_range(*range) {
                report.record(path, ("offset", offset), &record)?;
            }
        }
    }
    Ok(())
}

fn open(path: &Path, identity: &TableIdentity) -> Result<(OpenFile, Footer), Error> {
    now(async {
        let file = Files.open(path, OpenMode::Read).await?;
        let footer = read_footer(&file, identity).await?;
        Ok((file, footer))
    })
}

/// Filter, index and partitions: opening would mend the first two silently.
fn verify_sections<W: Write>(
    file: &OpenFile,
    identity: &TableIdentity,
    footer: &Footer,
    report: &mut Report<'_, W>,
) -> io::Result<()> {
    let sections = [
        ("filter", footer.filter_offset(), footer.filter_len),
        ("index", footer.index_offset(), footer.index_len),
        ("partitions", footer.partitions_offset(), footer.partitions_len),
    ];
    for (name, offset, len) in sections {
        // The footer was checked against the file's length.
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let checked = now(file.read_at(offset, len)).and_then(|bytes| {
            verify_section(&bytes, identity.salt, offset).map_err(|what| {
                Error::corrupt(&identity.path, offset, format!("{name} section: {what}"))
            })
        });
        if let Err(error) = checked {
            report.damage(&error)?;
        }
    }
    Ok(())
}
