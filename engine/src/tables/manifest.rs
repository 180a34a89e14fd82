//! `Manifest`: the durable list of edits of the live table set. Nothing else names a table live.
//!
//! A file begins with one edit that states everything, and grows by one durable write an edit. A
//! *roll* writes the whole state to a new file under a temporary name, makes it durable, renames
//! it, syncs the directory, and only then removes the old file: at every moment the file with the
//! greatest number is complete. Small: a few KB for a shard of a few GB.
//!
//! # Format
//! Sectors of 512 bytes, which the device writes whole or not at all. Each edit is written twice
//! in a row, in one write, so that a sector that rots later has a twin:
//!
//! | offset | size | field    | meaning                                                      |
//! |--------|------|----------|--------------------------------------------------------------|
//! | 0      | 4    | checksum | CRC32C of bytes 4..512, salted with file, shard, and offset  |
//! | 4      | 4    | magic    | "AMF1"                                                       |
//! | 8      | 8    | sequence | of the edit; one more than the edit before                   |
//! | 16     | 4    | size     | bytes of the whole edit                                      |
//! | 20     | 4    | part     | which 488 bytes of it these are, from 0                      |
//! | 24     | 488  | payload  | part of the edit, then zeros                                 |
//!
//! # Torn or damaged
//! A crash leaves each sector of the last write whole or zero. So a last edit that lacks sectors
//! is a torn tail, which nobody was told of; a sector that is neither valid nor zero is damage.
//! Damage whose twin is well is repaired by a roll at open; any other is an error that names the
//! place. Never an empty store: a directory without a manifest is not opened.
//!
//! Invariant: what `append` has answered with `Ok` is in every later state; and a state is always
//! a prefix of the appended edits.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::edit::TableSetEdit;
use super::layout::Layout;
use crate::buffer::AlignedBuf;
use crate::checksum;
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::error::{Error, Result};
use crate::identity::Identity;

const SECTOR: usize = 512;
const SECTOR_HEADER: usize = 24;
const PAYLOAD: usize = SECTOR - SECTOR_HEADER;
const MAGIC: [u8; 4] = *b"AMF1";
const NAME: &str = "MANIFEST-";
const TEMPORARY: &str = ".tmp";
/// A file is rolled when it is longer than this and than four whole states.
const ROLL_SIZE: u64 = 1 << 20;
/// No manifest is longer: 16 million tables.
const FILE_SIZE_MAX: u64 = 8 << 30;
const READ_SIZE: usize = 1 << 20;

/// Name of manifest file `id`.
#[must_use]
pub fn manifest_name(id: u64) -> String {
    format!("{NAME}{id:010}")
}

/// Number of a manifest file; `None` for other names, temporary ones included.
#[must_use]
pub fn parse_manifest_name(name: &str) -> Option<u64> {
    let id = name.strip_prefix(NAME)?.parse().ok()?;
    (manifest_name(id) == name).then_some(id)
}

/// Whether the name is that of a manifest that was never finished.
#[must_use]
pub fn is_temporary_manifest(name: &str) -> bool {
    name.strip_suffix(TEMPORARY).is_some_and(|name| parse_manifest_name(name).is_some())
}

/// The salt of manifest file `id` of a shard.
#[must_use]
pub fn file_salt(cluster: u64, shard: u32, id: u64) -> u64 {
    const KIND: u64 = 0x4d41_4e49_4645_5354;
    [u64::from(shard), id].into_iter().fold(KIND ^ cluster, |mixed, part| {
        let mixed = (mixed ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^ (mixed >> 29)
    })
}

/// Whose tables these are; in every checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Identity of the cluster.
    pub cluster: u64,
    /// Number of the shard in its node.
    pub shard: u32,
}

impl Owner {
    /// The owner that an `IDENTITY` names.
    #[must_use]
    pub fn of(identity: &Identity) -> Owner {
        let [low, high] = [0, 64].map(|shift| {
            u64::try_from((identity.cluster >> shift) & u128::from(u64::MAX)).expect("masked")
        });
        Owner { cluster: low ^ high.rotate_left(1), shard: identity.shard }
    }
}

/// The open manifest of a shard. One task appends at a time.
pub struct Manifest<D: Disk> {
    disk: D,
    dir: PathBuf,
    owner: Owner,
    file: D::File,
    id: u64,
    /// Where the next edit goes.
    end: u64,
    /// Sequence of the next edit.
    sequence: u64,
    /// Bytes of the whole state at the file's start.
    whole_size: u64,
    /// An append failed: whether its edit is there is unknown, so the file is never written again.
    doubtful: bool,
    /// Files before this one that may still be there.
    stale: Vec<u64>,
}

impl<D: Disk> fmt::Debug for Manifest<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Manifest({} of {}, {} bytes)", self.id, self.dir.display(), self.end)
    }
}

impl<D: Disk> Manifest<D> {
    /// Makes the first manifest of a directory, which states `layout`.
    ///
    /// # Errors
    /// `Mismatch` when the directory has one already, else of the disk. State: no manifest.
    pub async fn create(disk: D, dir: &Path, owner: Owner, layout: &Layout) -> Result<Manifest<D>> {
        if let Some(id) = newest(&disk.list(dir).await?) {
            return Err(Error::Mismatch {
                path: dir.join(manifest_name(id)),
                what: "a manifest exists already".to_owned(),
                remedy: "open the directory instead of creating it",
            });
        }
        let (file, size) = write_whole(&disk, dir, owner, 1, 1, layout).await?;
        Ok(Manifest {
            disk,
            dir: dir.to_owned(),
            owner,
            file,
            id: 1,
            end: size,
            sequence: 2,
            whole_size: size,
            doubtful: false,
            stale: Vec::new(),
        })
    }

    /// Opens the newest manifest of a directory and replays it. Removes what a crash has left of
    /// other manifests; rolls when the tail is torn or a sector had to be repaired.
    ///
    /// # Errors
    /// `Corrupt` when there is no manifest or it is damaged beyond its twins; `Io` of the disk.
    /// State: nothing has been removed.
    pub async fn open(disk: D, dir: &Path, owner: Owner) -> Result<(Manifest<D>, Layout)> {
        let names = disk.list(dir).await?;
        let Some(id) = newest(&names) else {
            return Err(Error::corrupt(dir.join(NAME), 0, "the directory has no manifest"));
        };
        let path = dir.join(manifest_name(id));
        let file = disk.open(&path, OpenMode::Write).await?;
        let replay = replay_file(&file, &path, owner, id).await?;
        let mut manifest = Manifest {
            disk,
            dir: dir.to_owned(),
            owner,
            file,
            id,
            end: replay.end,
            sequence: replay.sequence,
            whole_size: replay.whole_size,
            doubtful: false,
            stale: Vec::new(),
        };
        for name in names {
            if is_temporary_manifest(&name) || parse_manifest_name(&name).is_some_and(|it| it < id)
            {
                manifest.disk.remove(&dir.join(name)).await?;
            }
        }
        if replay.torn || replay.repaired > 0 {
            manifest.roll(&replay.layout).await?;
        } else {
            manifest.confirm(&replay.edits).await?;
        }
        Ok((manifest, replay.layout))
    }

    /// Writes the last edit again where it stands, durably. The append that wrote it may have
    /// failed: then it can be read, and the medium may still lose it, which must not happen under
    /// edits that follow. Needs no space, and a crash tears nothing: the bytes are the same.
    async fn confirm(&self, edits: &[(u64, TableSetEdit)]) -> Result<()> {
        // The first edit states everything, and was durable before the file had its name.
        let [_, .., (at, last)] = edits else { return Ok(()) };
        let salt = file_salt(self.owner.cluster, self.owner.shard, self.id);
        let buf = encode(last, salt, self.sequence - 1, *at, self.file.alignment());
        self.file.write_at(*at, buf, WriteMode::Durable).await.1
    }

    /// Makes an edit durable; `after` is the layout that it leads to. One write, or a roll when
    /// the file has grown long.
    ///
    /// # Errors
    /// Of the disk. State: whether the edit is there is unknown until the next append has
    /// returned `Ok`, which writes a new file without it; so keep every file that either names.
    pub async fn append(&mut self, edit: &TableSetEdit, after: &Layout) -> Result<()> {
        if self.doubtful || self.end > ROLL_SIZE.max(4 * self.whole_size) {
            return self.roll(after).await;
        }
        let id = file_salt(self.owner.cluster, self.owner.shard, self.id);
        let buf = encode(edit, id, self.sequence, self.end, self.file.alignment());
        let size = buf.len() as u64;
        let (_, written) = self.file.write_at(self.end, buf, WriteMode::Durable).await;
        if written.is_err() {
            self.doubtful = true;
            return written;
        }
        self.end += size;
        self.sequence += 1;
        Ok(())
    }

    /// Starts a new file that states `layout`, and removes the old one.
    ///
    /// # Errors
    /// Of the disk. State: the old or the new file counts; the next append rolls again.
    pub async fn roll(&mut self, layout: &Layout) -> Result<()> {
        self.doubtful = true;
        self.stale.push(self.id);
        self.id += 1;
        let (file, size) =
            write_whole(&self.disk, &self.dir, self.owner, self.id, self.sequence, layout).await?;
        (self.file, self.end, self.whole_size) = (file, size, size);
        self.sequence += 1;
        self.doubtful = false;
        for old in std::mem::take(&mut self.stale) {
            // A failure leaves a file that the next open removes.
            let _ = self.disk.remove(&self.dir.join(manifest_name(old))).await;
        }
        Ok(())
    }

    /// Whether the last append failed.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Number of the current file.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes of the current file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.end
    }
}

/// What a manifest file says.
#[derive(Clone, Debug)]
pub struct Replay {
    /// The tables after all edits.
    pub layout: Layout,
    /// The edits with the offsets where they begin, the first stating everything.
    pub edits: Vec<(u64, TableSetEdit)>,
    /// Sectors that are damaged and have a twin that is not.
    pub repaired: usize,
    /// Whether the file ends in an edit that was never finished.
    pub torn: bool,
    end: u64,
    sequence: u64,
    whole_size: u64,
}

/// Reads a manifest file, for [`Manifest::open`] and for tools.
///
/// # Errors
/// `Corrupt` with the offset of the first damage that has no twin; `Io` of the file.
pub async fn replay_file<F: File>(file: &F, path: &Path, owner: Owner, id: u64) -> Result<Replay> {
    let len = file.len().await?;
    if len > FILE_SIZE_MAX {
        return Err(Error::corrupt(path, FILE_SIZE_MAX, "longer than any manifest"));
    }
    let mut sectors = Sectors::new(file_salt(owner.cluster, owner.shard, id));
    let mut offset = 0;
    while offset < len {
        let buf = file.read_at(offset, READ_SIZE).await?;
        if buf.is_empty() {
            break;
        }
        sectors.read(offset, &buf);
        offset += buf.len() as u64;
    }
    sectors.replay(file.alignment(), path)
}

/// An edit as it stands in the file: both copies, padded.
fn encode(edit: &TableSetEdit, salt: u64, sequence: u64, at: u64, alignment: usize) -> AlignedBuf {
    let bytes = edit.encode();
    let size = u32::try_from(bytes.len()).expect("an edit is below 4 GiB");
    let mut buf = AlignedBuf::with_capacity(extent(bytes.len(), alignment));
    for _copy in 0..2 {
        for (part, payload) in (0u32..).zip(bytes.chunks(PAYLOAD)) {
            let mut sector = [0; SECTOR];
            sector[4..8].copy_from_slice(&MAGIC);
            sector[8..16].copy_from_slice(&sequence.to_le_bytes());
            sector[16..20].copy_from_slice(&size.to_le_bytes());
            sector[20..24].copy_from_slice(&part.to_le_bytes());
            sector[SECTOR_HEADER..SECTOR_HEADER + payload.len()].copy_from_slice(payload);
            let checksum = checksum::salted(salt, at + buf.len() as u64, &sector[4..]);
            sector[..4].copy_from_slice(&checksum.to_le_bytes());
            buf.extend_from_slice(&sector);
        }
    }
    buf.pad_to(alignment);
    buf
}

/// Bytes that an edit of `size` bytes takes in the file.
fn extent(size: usize, alignment: usize) -> usize {
    (size.div_ceil(PAYLOAD) * 2 * SECTOR).next_multiple_of(alignment)
}

/// Writes a new manifest file in steps of which each leaves a complete one.
async fn write_whole<D: Disk>(
    disk: &D,
    dir: &Path,
    owner: Owner,
    id: u64,
    sequence: u64,
    layout: &Layout,
) -> Result<(D::File, u64)> {
    let name = manifest_name(id);
    let (path, temporary) = (dir.join(&name), dir.join(format!("{name}{TEMPORARY}")));
    match disk.remove(&temporary).await {
        Err(error) if !error.is_not_found() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let file = disk.open(&temporary, OpenMode::Create).await?;
    let salt = file_salt(owner.cluster, owner.shard, id);
    let buf = encode(&layout.to_edit(), salt, sequence, 0, file.alignment());
    let size = buf.len() as u64;
    let named = match file.write_at(0, buf, WriteMode::Durable).await.1 {
        Ok(()) => disk.rename(&temporary, &path).await,
        Err(error) => Err(error),
    };
    if let Err(error) = named {
        // On a full disk each attempt would leave another one.
        let _ = disk.remove(&temporary).await;
        return Err(error);
    }
    disk.sync_dir(dir).await?;
    Ok((file, size))
}

fn newest(names: &[String]) -> Option<u64> {
    names.iter().filter_map(|name| parse_manifest_name(name)).max()
}

/// One edit being put together from its sectors.
struct Assembly {
    offset: u64,
    size: usize,
    parts: BTreeMap<usize, [u8; PAYLOAD]>,
}

impl Assembly {
    fn is_complete(&self) -> bool {
        self.parts.len() == self.size.div_ceil(PAYLOAD)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.parts.values().flatten().copied().collect();
        bytes.truncate(self.size);
        bytes
    }
}

/// All sectors of a file, sorted out.
struct Sectors {
    salt: u64,
    assemblies: BTreeMap<u64, Assembly>,
    damaged: Vec<u64>,
}

impl Sectors {
    fn new(salt: u64) -> Sectors {
        Sectors { salt, assemblies: BTreeMap::new(), damaged: Vec::new() }
    }

    fn read(&mut self, offset: u64, bytes: &[u8]) {
        for (at, sector) in (offset..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
            if sector.iter().any(|&byte| byte != 0) && self.take(at, sector).is_none() {
                self.damaged.push(at);
            }
        }
    }

    /// Files a sector away; `None` when it is damaged.
    fn take(&mut self, offset: u64, sector: &[u8]) -> Option<()> {
        let sector: &[u8; SECTOR] = sector.try_into().ok()?;
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| sector[at + byte]));
        if u32_at(0) != checksum::salted(self.salt, offset, &sector[4..]) || sector[4..8] != MAGIC {
            return None;
        }
        let sequence = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
        let size = usize::try_from(u32_at(16)).ok()?;
        let part = usize::try_from(u32_at(20)).ok()?;
        let assembly = self.assemblies.entry(sequence);
        let assembly =
            assembly.or_insert_with(|| Assembly { offset, size, parts: BTreeMap::new() });
        if assembly.size != size || part >= size.div_ceil(PAYLOAD) {
            return None;
        }
        let payload = sector.last_chunk::<PAYLOAD>().expect("a sector is longer than its payload");
        assembly.parts.entry(part).or_insert(*payload);
        Some(())
    }

    fn replay(self, alignment: usize, path: &Path) -> Result<Replay> {
        let corrupt = |offset, what: String| Err(Error::corrupt(path, offset, what));
        let mut layout = Layout::default();
        let mut edits = Vec::new();
        let (mut end, mut sequence, mut whole_size, mut torn) = (0, 0, 0, false);
        let mut damaged = self.damaged.iter().copied().peekable();
        let mut repaired = 0;
        for (&number, assembly) in &self.assemblies {
            if torn || (sequence != 0 && number != sequence) {
                return corrupt(end, format!("edit {sequence} is missing, later ones follow"));
            }
            if !assembly.is_complete() {
                // Torn, if it is the last and only lacks sectors: the loop's end sees to the rest.
                torn = true;
                continue;
            }
            let bytes = assembly.bytes();
            let after = end + extent(bytes.len(), alignment) as u64;
            while damaged.next_if(|&offset| offset < after).is_some() {
                repaired += 1;
            }
            let applied = TableSetEdit::decode(&bytes).and_then(|edit| {
                if edit.whole != edits.is_empty() {
                    return Err("the whole state is not at the file's start".to_owned());
                }
                Ok((layout.apply(&edit)?, edit))
            });
            match applied {
                Ok((next, edit)) => {
                    layout = next;
                    edits.push((assembly.offset, edit));
                }
                Err(what) => return corrupt(assembly.offset, what),
            }
            (end, sequence) = (after, number + 1);
            if edits.len() == 1 {
                whole_size = end;
            }
        }
        if let Some(offset) = damaged.next() {
            return corrupt(
                offset,
                "a sector fails its check, and its copy is not there".to_owned(),
            );
        }
        if edits.is_empty() {
            return corrupt(
                0,
                "no complete edit; the file is cut or was never finished".to_owned(),
            );
        }
        Ok(Replay { layout, edits, repaired, torn, end, sequence, whole_size })
    }
}

#[cfg(test)]
#[cfg(feature = "sim")]
mod tests;
