//! Damage before valid records: what of the log is lost with it, and where its valid rest goes on.
//!
//! Invariant: a record counts as lost only if something proves that it was durable, and the walk
//! goes on only at a batch that is whole and follows the damage without a second hole: what lies
//! behind an interrupted write stays void, as it is after any crash. The bytes of a damaged
//! segment are kept under another name until an operator removes them.
//!
//! On the recovery path, called by `replay.rs`.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::Lsn;
use super::format::{
    BATCH_ALIGNMENT_MIN, BATCH_HEADER_SIZE, BATCH_MAGIC, BatchHeader, SEGMENT_HEADER_SIZE,
    parse_name, segment_name,
};
use super::replay::{Found, Window, check};
use crate::disk::{Disk, File};
use crate::error::{Error, Result};

/// Ends the name under which the bytes of a damaged segment are kept.
const ASIDE: &str = ".damaged";

/// What replay does where records are missing that were durable once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDamage {
    /// It looks at the rest, without showing it, and ends with an error that names all that is lost.
    Refuse,
    /// It goes on with the valid rest.
    Accept,
}

/// A part of the log that was durable once and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The damaged file, or the directory when a file is missing.
    pub path: PathBuf,
    /// Where in it.
    pub offset: u64,
    /// What is wrong, and what says that there was something.
    pub what: String,
    /// First and last record that are lost, if anything says which.
    pub records: Option<(Lsn, Lsn)>,
    /// Bytes up to where the log goes on, at most.
    pub bytes: u64,
}

impl Loss {
    /// How many records are lost; zero when nothing says it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.records.map_or(0, |(first, last)| last.0 - first.0 + 1)
    }

    /// `records 3 to 5, at most 1024 bytes`.
    #[must_use]
    pub fn extent(&self) -> String {
        match self.records {
            Some((first, last)) => {
                format!("records {} to {}, at most {} bytes", first.0, last.0, self.bytes)
            }
            None => format!("an unknown number of records, at most {} bytes", self.bytes),
        }
    }
}

/// The refusal to open a log with these losses, of which there is at least one; `kept` records of
/// it can be read.
pub(super) fn refusal(losses: &[Loss], kept: u64) -> Error {
    let first = &losses[0];
    let extents: Vec<_> = losses.iter().map(Loss::extent).collect();
    let more =
        if losses.len() > 1 { format!(" in {} places", losses.len()) } else { String::new() };
    Error::Corrupt {
        path: first.path.clone(),
        offset: first.offset,
        what: format!(
            "{}; what may be lost{more}: {}; the {kept} records that can be read would be kept",
            first.what,
            extents.join("; ")
        ),
        remedy: "restore the file from a snapshot or a replica, or give up what may be lost with \
                 `serve --accept-loss`; `annulus inspect --verify` lists all damage",
    }
}

/// What proves that records were durable.
pub(super) struct Claim {
    /// The last of them.
    pub(super) synced: u64,
    /// Name of the file that says so.
    pub(super) by: String,
    /// Where it does.
    pub(super) offset: u64,
}

/// The claim in a segment, from `start` on, that reaches furthest, if one reaches `next`; and how
/// many good batch headers there are. Looks at every place where a batch may start.
pub(super) async fn find_claim<F: File>(
    found: &Found<F>,
    start: u64,
    next: Lsn,
) -> Result<(Option<Claim>, u64)> {
    let mut claim: Option<Claim> = None;
    let mut batches = 0;
    let mut window = Window::new(&found.file, start, found.len);
    for offset in (start..found.len).step_by(BATCH_ALIGNMENT_MIN) {
        let bytes = window.get(offset, BATCH_ALIGNMENT_MIN).await?;
        let Some(header) = header_at(bytes, found.salt, offset) else { continue };
        batches += 1;
        if header.synced >= next.0 && claim.as_ref().is_none_or(|it| it.synced < header.synced) {
            let by = found.path.file_name().unwrap_or_default().display().to_string();
            claim = Some(Claim { synced: header.synced, by, offset });
        }
    }
    Ok((claim, batches))
}

/// The first whole batch of a segment, from `start` on, whose first record is in the range: its
/// offset and that record.
pub(super) async fn find_batch<F: File>(
    found: &Found<F>,
    start: u64,
    wanted: std::ops::RangeInclusive<u64>,
    record_salt: u64,
) -> Result<Option<(u64, Lsn)>> {
    let mut window = Window::new(&found.file, start, found.len);
    for offset in (start..found.len).step_by(BATCH_ALIGNMENT_MIN) {
        let bytes = window.get(offset, BATCH_ALIGNMENT_MIN).await?;
        let Some(header) = header_at(bytes, found.salt, offset) else { continue };
        if !wanted.contains(&header.first) {
            continue;
        }
        let batch = window.get(offset, header.size()).await?;
        let records = batch.get(BATCH_HEADER_SIZE..BATCH_HEADER_SIZE + header.records_size());
        if records.is_some_and(|records| check(records, &header, record_salt).is_ok()) {
            return Ok(Some((offset, Lsn(header.first))));
        }
    }
    Ok(None)
}

fn header_at(bytes: &[u8], salt: u64, offset: u64) -> Option<BatchHeader> {
    if bytes.get(4..8) != Some(&BATCH_MAGIC.to_le_bytes()) {
        return None;
    }
    BatchHeader::decode(bytes, salt, offset).ok()
}

/// Bytes that may have held batches, of a file of this length.
pub(super) fn batch_bytes(len: u64) -> u64 {
    len.saturating_sub(SEGMENT_HEADER_SIZE as u64)
}

/// The name under which a damaged segment is kept.
fn aside(path: &Path) -> PathBuf {
    let mut name = path.file_name().map(OsString::from).unwrap_or_default();
    name.push(ASIDE);
    path.with_file_name(name)
}

/// Gives damaged segments a second name, durably, so that their bytes stay when the log lets go of
/// them.
///
/// # Errors
/// Of the disk. State: the log is as it was; a part of the names may be there.
pub async fn keep_aside<D: Disk>(disk: &D, dir: &Path, damaged: &[PathBuf]) -> Result<()> {
    for path in damaged {
        match disk.link(path, &aside(path)).await {
            // An earlier start was cut short: numbers are not used again, so it is the same file.
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {}
            linked => linked?,
        }
    }
    disk.sync_dir(dir).await
}

/// Takes segments that are kept aside out of the log, durably; everything else of them is in
/// tables.
///
/// # Errors
/// Of the disk. State: some may still be there; a start without a need for them removes them.
pub async fn remove_damaged<D: Disk>(disk: &D, dir: &Path, damaged: &[PathBuf]) -> Result<()> {
    for path in damaged {
        disk.remove(path).await?;
    }
    disk.sync_dir(dir).await
}

/// The segments that are kept aside: they must not be written to again, as their bytes are shared.
pub(super) async fn kept_aside<D: Disk>(disk: &D, dir: &Path) -> Result<Vec<PathBuf>> {
    let names = disk.list(dir).await?;
    let ids = names.iter().filter_map(|name| parse_name(name.strip_suffix(ASIDE)?));
    Ok(ids.map(|id| dir.join(segment_name(id))).collect())
}
