//! A log segment alone: its header, batches and records, and where it ends.
//!
//! Invariant: the same judgement as replay's, for one file: a batch that fails its check is the
//! torn tail, unless a later batch of the same life says that the log was synced beyond it.
//! Then it is damage. (Replay also knows the neighbouring segments; see `shard.rs`.)

use std::io::{self, Write};
use std::path::Path;

use annulus_engine::buffer::AlignedBuf;
use annulus_engine::disk::{Disk, File, OpenMode};
use annulus_engine::error::Error;
use annulus_engine::log::Lsn;
use annulus_engine::log::format::{
    BATCH_ALIGNMENT_MIN, BATCH_HEADER_SIZE, BATCH_MAGIC, BATCH_SIZE_CEILING, BatchHeader, Control,
    Invalid, Records, ReplayItem, SEGMENT_HEADER_SIZE, SegmentHeader, VERSION,
};
use serde_json::{Value, json};

use super::files::{Files, OpenFile, now};
use super::report::Report;

/// Bytes read at a time when looking for later batches.
const READ_SIZE: usize = 1 << 20;

/// Prints a segment.
pub(super) fn inspect<W: Write>(path: &Path, report: &mut Report<'_, W>) -> io::Result<()> {
    match open(path) {
        Ok(segment) => segment.print(path, report),
        Err(error) => report.damage(&error),
    }
}

struct Segment {
    file: OpenFile,
    len: u64,
    header: SegmentHeader,
    salt: u64,
}

fn open(path: &Path) -> Result<Segment, Error> {
    now(async {
        let file = Files.open(path, OpenMode::Read).await?;
        let len = file.len().await?;
        let bytes = file.read_at(0, SEGMENT_HEADER_SIZE).await?;
        let header =
            SegmentHeader::decode(&bytes).map_err(|Invalid(what)| Error::corrupt(path, 0, what))?;
        if header.version > VERSION {
            return Err(Error::Mismatch {
                path: path.to_path_buf(),
                what: format!("version {} of the log format; this is {VERSION}", header.version),
                remedy: "inspect it with the newer release that wrote it",
            });
        }
        let salt = header.identity().segment_salt(header.segment_id, header.life);
        Ok(Segment { file, len, header, salt })
    })
}

impl Segment {
    fn print<W: Write>(&self, path: &Path, report: &mut Report<'_, W>) -> io::Result<()> {
        let header = &self.header;
        report.file(
            path,
            "log segment",
            &json!({
                "segment": header.segment_id,
                "life": header.life,
                "life_after": header.life_after,
                "life_first": header.life_first,
                "size": header.size,
                "cluster": format!("{:032x}", header.identity().cluster),
                "shard": header.shard,
            }),
        )?;
        if self.len < header.size {
            let what = format!("cut short: {} bytes are left of {}", self.len, header.size);
            report.damage(&Error::corrupt(path, self.len, what))?;
        }
        let mut offset = SEGMENT_HEADER_SIZE as u64;
        let (mut batches, mut records) = (0u64, 0u64);
        let mut next: Option<Lsn> = None;
        let why = loop {
            let (batch, bytes) = match self.batch(offset) {
                Ok(batch) => batch,
                Err(why) => break why,
            };
            if next.is_some_and(|next| next.0 != batch.first) {
                break Invalid("another record than the next");
            }
            if let Err(why) = self.print_batch(path, &batch, &bytes, report)? {
                break why;
            }
            batches += 1;
            records += u64::from(batch.count);
            next = Some(batch.next());
            offset += batch.size() as u64;
        };
        report.entry(
            path,
            "end",
            &json!({
                "offset": offset,
                "batches": batches,
                "records": records,
                "last": next.map(|next| next.0 - 1),
            }),
        )?;
        self.judge(path, offset, next, why, report)
    }

    /// The batch at an offset, its header checked.
    fn batch(&self, offset: u64) -> Result<(BatchHeader, AlignedBuf), Invalid> {
        let unreadable = |_| Invalid("cannot be read");
        let head = now(self.file.read_at(offset, BATCH_ALIGNMENT_MIN)).map_err(unreadable)?;
        let header = BatchHeader::decode(&head, self.salt, offset)?;
        // Bounded by the format; more than the file has is never read.
        let size = header.size().min(BATCH_SIZE_CEILING);
        let bytes = now(self.file.read_at(offset, size)).map_err(unreadable)?;
        Ok((header, bytes))
    }

    fn print_batch<W: Write>(
        &self,
        path: &Path,
        batch: &BatchHeader,
        bytes: &AlignedBuf,
        report: &mut Report<'_, W>,
    ) -> io::Result<Result<(), Invalid>> {
        let end = BATCH_HEADER_SIZE + batch.records_size();
        let Some(bytes) = bytes.get(BATCH_HEADER_SIZE..end) else {
            return Ok(Err(Invalid("the batch reaches past the file's end")));
        };
        let salt = self.header.identity().record_salt(self.header.life);
        let mut count = 0;
        for record in Records::checked(bytes, Lsn(batch.first), salt) {
            match record {
                Ok((lsn, ReplayItem::Record(record))) => {
                    report.record(path, ("lsn", lsn.0), &record)?
                }
                Ok((lsn, ReplayItem::Control(control))) if report.shows_records() => {
                    report.entry(path, "control", &control_json(lsn, control))?;
                }
                Ok(_) => {}
                Err(why) => return Ok(Err(why)),
            }
            count += 1;
        }
        let complete = count == batch.count;
        Ok(if complete { Ok(()) } else { Err(Invalid("fewer records than the batch says")) })
    }

    /// Says what the end is: nothing, a torn tail, or damage.
    fn judge<W: Write>(
        &self,
        path: &Path,
        offset: u64,
        next: Option<Lsn>,
        why: Invalid,
        report: &mut Report<'_, W>,
    ) -> io::Result<()> {
        let next = next.unwrap_or(Lsn(self.header.life_first));
        match self.proof_beyond(offset, next) {
            Ok(Some(later)) => {
                let what =
                    format!("{}, but a later batch at offset {later} was synced after it", why.0);
                report.damage(&Error::corrupt(path, offset, what))
            }
            Ok(None) if why == Invalid("no batch header") => Ok(()),
            Ok(None) => report.note(path, &format!("the log ends at offset {offset}: {}", why.0)),
            Err(error) => report.damage(&error),
        }
    }

    /// Where a later batch of this life lies that says the log was synced up to `next` or beyond.
    fn proof_beyond(&self, offset: u64, next: Lsn) -> Result<Option<u64>, Error> {
        let mut at = offset + BATCH_ALIGNMENT_MIN as u64;
        while at < self.len {
            let bytes = now(self.file.read_at(at, READ_SIZE))?;
            for (index, sector) in bytes.chunks_exact(BATCH_ALIGNMENT_MIN).enumerate() {
                if sector[4..8] != BATCH_MAGIC.to_le_bytes() {
                    continue;
                }
                let found = at + (index * BATCH_ALIGNMENT_MIN) as u64;
                let header = BatchHeader::decode(sector, self.salt, found);
                if header.is_ok_and(|header| header.synced >= next.0) {
                    return Ok(Some(found));
                }
            }
            at += READ_SIZE as u64;
        }
        Ok(None)
    }
}

fn control_json(lsn: Lsn, control: Control<'_>) -> Value {
    match control {
        Control::Ceiling { timestamp, sequence } => json!({
            "lsn": lsn.0,
            "control": "ceiling",
            "timestamp": format!("{:x}", timestamp.0),
            "sequence": sequence,
        }),
        Control::DropPartition { partition, incarnation } => json!({
            "lsn": lsn.0,
            "control": "drop partition",
            "partition": partition.0,
            "incarnation": incarnation,
        }),
        Control::Seen { partition, incarnation, seen } => json!({
            "lsn": lsn.0,
            "control": "seen",
            "partition": partition.0,
            "incarnation": incarnation,
            "bytes": seen.len(),
        }),
        Control::Close => json!({ "lsn": lsn.0, "control": "close" }),
    }
}
