//! The `IDENTITY` file: which cluster, node and shard a directory belongs to, and what its
//! formats were made with (hash seed, q, shard count). Opened before everything else.
//!
//! Invariant: there are two copies, never rewritten at the same time, so one is whole after any
//! crash. When both are bad the directory is refused; an identity is never invented for a
//! directory that holds anything.

use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};

use crate::buffer::AlignedBuf;
use crate::checksum::salted_parts;
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::error::{Error, Result};
use crate::model::token::PARTITION_BITS_MAX;
use crate::model::{OriginId, WallMicros};

/// The file's name in a shard's directory.
pub const FILE_NAME: &str = "IDENTITY";
/// Version of the format.
pub const VERSION: u32 = 1;

const TEMPORARY_NAME: &str = "IDENTITY.tmp";
const MAGIC: [u8; 8] = *b"ANNIDN\r\n";
const COPY_SIZE: usize = 4096;
const COPIES: usize = 2;
/// Salt of the checksum; an identity is of no file but itself.
const SALT: u64 = u64::from_le_bytes(*b"identity");
const REMEDY: &str = "point the server at the right directory, or restore it from a snapshot";

/// Whom a shard's directory belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's id, drawn when it was made.
    pub cluster: u128,
    /// The node as a source of writes.
    pub node: OriginId,
    /// The shard, 0 to `shard_count - 1`.
    pub shard: u32,
    /// Shards of the node.
    pub shard_count: u32,
    /// Seed of the key hash.
    pub hash_seed: u64,
    /// q: the ring has `2^q` partitions.
    pub partition_bits: u32,
    /// When the directory was made.
    pub created: WallMicros,
}

/// One copy; zeros follow up to 4096 bytes.
///
/// | offset | size | field          | meaning                                                |
/// |--------|------|----------------|--------------------------------------------------------|
/// | 0      | 8    | magic          | `ANNIDN\r\n`                                           |
/// | 8      | 4    | version        | [`VERSION`]                                            |
/// | 12     | 4    | checksum       | CRC32C of bytes 0..12 and 16..80, salted with the offset of the copy |
/// | 16     | 16   | cluster        | low half first                                         |
/// | 32     | 8    | hash_seed      | seed of the key hash                                   |
/// | 40     | 8    | created        | microseconds since 2024-01-01                          |
/// | 48     | 8    | generation     | the copy with the greater one holds                    |
/// | 56     | 4    | node           | origin id                                              |
/// | 60     | 4    | shard          | below `shard_count`                                    |
/// | 64     | 4    | shard_count    | at least 1                                             |
/// | 68     | 4    | partition_bits | 0 to 16                                                |
/// | 72     | 8    | reserved       | 0                                                      |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Copied {
    magic: [u8; 8],
    version: u32,
    checksum: u32,
    cluster: [u64; 2],
    hash_seed: u64,
    created: u64,
    generation: u64,
    node: u32,
    shard: u32,
    shard_count: u32,
    partition_bits: u32,
    reserved: u64,
}

const _: () = assert!(size_of::<Copied>() == 80 && offset_of!(Copied, checksum) == 12);
const _: () = assert!(offset_of!(Copied, node) == 56);

/// Why a copy cannot be used.
enum Bad {
    Damaged(&'static str),
    Newer(u32),
}

impl Copied {
    fn new(identity: &Identity, generation: u64, offset: u64) -> Copied {
        let low = identity.cluster & u128::from(u64::MAX);
        let mut copy = Copied {
            magic: MAGIC,
            version: VERSION,
            checksum: 0,
            cluster: [low, identity.cluster >> 64]
                .map(|half| u64::try_from(half).expect("half of 128 bits")),
            hash_seed: identity.hash_seed,
            created: identity.created.0,
            generation,
            node: identity.node.0,
            shard: identity.shard,
            shard_count: identity.shard_count,
            partition_bits: identity.partition_bits,
            reserved: 0,
        };
        copy.checksum = copy.expected_checksum(offset);
        copy
    }

    fn expected_checksum(&self, offset: u64) -> u32 {
        let bytes = bytemuck::bytes_of(self);
        salted_parts(SALT, offset, &bytes[..12], &bytes[16..])
    }

    fn decode(file: &[u8], offset: usize) -> std::result::Result<(u64, Identity), Bad> {
        let bytes =
            file.get(offset..offset + size_of::<Copied>()).ok_or(Bad::Damaged("cut short"))?;
        let copy: Copied = bytemuck::pod_read_unaligned(bytes);
        if copy.magic != MAGIC {
            return Err(Bad::Damaged("not an identity (magic)"));
        }
        if copy.version > VERSION {
            return Err(Bad::Newer(copy.version));
        }
        if copy.checksum != copy.expected_checksum(offset as u64) {
            return Err(Bad::Damaged("checksum"));
        }
        let identity = Identity {
            cluster: u128::from(copy.cluster[0]) | (u128::from(copy.cluster[1]) << 64),
            node: OriginId(copy.node),
            shard: copy.shard,
            shard_count: copy.shard_count,
            hash_seed: copy.hash_seed,
            partition_bits: copy.partition_bits,
            created: WallMicros(copy.created),
        };
        if copy.version != VERSION || copy.reserved != 0 || !identity.is_possible() {
            return Err(Bad::Damaged("impossible fields"));
        }
        Ok((copy.generation, identity))
    }
}

impl Identity {
    /// Makes the identity of a new shard in `dir`, which is made if it is missing.
    ///
    /// # Errors
    /// `Mismatch` when the directory holds any file already, `Invalid` for impossible fields,
    /// `Io`. A crash leaves the directory without identity or with this one.
    pub async fn create<D: Disk>(disk: &D, dir: &Path, identity: &Identity) -> Result<()> {
        if !identity.is_possible() {
            return Err(Error::Invalid { what: format!("no shard can be {identity:?}") });
        }
        disk.create_dir(dir).await?;
        if let Some(path) = first_file(disk, dir).await? {
            return Err(Error::Mismatch {
                path: dir.to_path_buf(),
                what: format!("it is not empty: it holds {}", path.display()),
                remedy: REMEDY,
            });
        }
        let temporary = dir.join(TEMPORARY_NAME);
        // What a crash left of an earlier attempt.
        match disk.remove(&temporary).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let file = disk.open(&temporary, OpenMode::Create).await?;
        for copy in 0..COPIES {
            write_copy(&file, identity, 1, copy).await?;
        }
        file.sync().await?;
        disk.rename(&temporary, &dir.join(FILE_NAME)).await?;
        disk.sync_dir(dir).await?;
        match dir.parent() {
            Some(parent) => disk.sync_dir(parent).await,
            None => Ok(()),
        }
    }

    /// Reads the identity in `dir`, mends a damaged copy from the other, and compares it with
    /// what is expected, if anything is (all fields but `created`).
    ///
    /// # Errors
    /// `Io` (not found) when there is none; `Corrupt` when both copies are bad; `Mismatch` when
    /// it is another's, or newer than this program.
    pub async fn open<D: Disk>(
        disk: &D,
        dir: &Path,
        expected: Option<&Identity>,
    ) -> Result<Identity> {
        let path = dir.join(FILE_NAME);
        let file = disk.open(&path, OpenMode::Write).await?;
        let bytes = file.read_at(0, COPIES * COPY_SIZE).await?;
        let copies = [0, 1].map(|copy| Copied::decode(&bytes, copy * COPY_SIZE));
        if let Some(newer) = copies.iter().find_map(|copy| match copy {
            Err(Bad::Newer(version)) => Some(version),
            _ => None,
        }) {
            return Err(Error::Mismatch {
                path,
                what: format!("version {newer} of the format; this program knows {VERSION}"),
                remedy: "open it with the newer release that wrote it",
            });
        }
        let (generation, identity) = match &copies {
            [Ok(first), Ok(second)] => {
                if first.0 >= second.0 {
                    *first
                } else {
                    *second
                }
            }
            [Ok(good), Err(_)] | [Err(_), Ok(good)] => *good,
            [Err(Bad::Damaged(what)), _] => {
                return Err(Error::Corrupt {
                    path,
                    offset: 0,
                    what: format!("both copies of the identity are damaged: {what}"),
                    remedy: "restore the file from a snapshot; it is never made anew, because \
                             the data could then be read with the wrong seed",
                });
            }
            [Err(Bad::Newer(_)), _] => unreachable!("refused above"),
        };
        if let Some(expected) = expected {
            identity.check(expected, &path)?;
        }
        for (copy, found) in copies.iter().enumerate() {
            if !matches!(found, Ok(found) if *found == (generation, identity)) {
                tracing::warn!(path = %path.display(), copy, "a copy of the identity is mended");
                write_copy(&file, &identity, generation, copy).await?;
            }
        }
        Ok(identity)
    }

    /// Opens the identity in `dir`, or makes it if the directory is missing or empty.
    ///
    /// # Errors
    /// As [`Identity::create`] and [`Identity::open`].
    pub async fn open_or_create<D: Disk>(
        disk: &D,
        dir: &Path,
        wanted: &Identity,
    ) -> Result<Identity> {
        match Identity::open(disk, dir, Some(wanted)).await {
            Err(error) if error.is_not_found() => {
                Identity::create(disk, dir, wanted).await?;
                Identity::open(disk, dir, Some(wanted)).await
            }
            other => other,
        }
    }

    /// Changes the identity in `dir`, one copy after the other: a node that restored its data
    /// takes a new origin id.
    ///
    /// # Errors
    /// As [`Identity::open`]; the old or the new identity holds then, never a mixture.
    pub async fn replace<D: Disk>(disk: &D, dir: &Path, identity: &Identity) -> Result<()> {
        if !identity.is_possible() {
            return Err(Error::Invalid { what: format!("no shard can be {identity:?}") });
        }
        // Mends a bad copy first, so that the one not being written is good.
        Identity::open(disk, dir, None).await?;
        let file = disk.open(&dir.join(FILE_NAME), OpenMode::Write).await?;
        let bytes = file.read_at(0, COPIES * COPY_SIZE).await?;
        let generation = [0, 1]
            .iter()
            .filter_map(|copy| Copied::decode(&bytes, copy * COPY_SIZE).ok())
            .map(|(generation, _)| generation)
            .max()
            .unwrap_or(0);
        for copy in 0..COPIES {
            write_copy(&file, identity, generation + 1, copy).await?;
        }
        Ok(())
    }

    /// Both copies as they stand in the bytes of the file, for tools: nothing is mended.
    pub fn copies(file: &[u8]) -> [std::result::Result<Identity, String>; COPIES] {
        [0, 1].map(|copy| match Copied::decode(file, copy * COPY_SIZE) {
            Ok((_, identity)) => Ok(identity),
            Err(Bad::Damaged(what)) => Err(what.to_owned()),
            Err(Bad::Newer(version)) => Err(format!("version {version}, newer than {VERSION}")),
        })
    }

    fn is_possible(&self) -> bool {
        self.shard < self.shard_count && self.partition_bits <= PARTITION_BITS_MAX
    }

    /// Compares with what is expected.
    fn check(&self, expected: &Identity, path: &Path) -> Result<()> {
        let differs = |name: &str, found: String, wanted: String| {
            (found != wanted).then(|| format!("{name} is {found}, expected {wanted}"))
        };
        let hex = |id: u128| format!("{id:032x}");
        let what = differs("cluster", hex(self.cluster), hex(expected.cluster))
            .or(differs("node", self.node.0.to_string(), expected.node.0.to_string()))
            .or(differs("shard", self.shard.to_string(), expected.shard.to_string()))
            .or(differs(
                "shard count",
                self.shard_count.to_string(),
                expected.shard_count.to_string(),
            ))
            .or(differs(
                "partition bits",
                self.partition_bits.to_string(),
                expected.partition_bits.to_string(),
            ))
            // The seed is a secret of the cluster and is not printed.
            .or((self.hash_seed != expected.hash_seed).then(|| "hash seed differs".to_owned()));
        match what {
            None => Ok(()),
            Some(what) => Err(Error::Mismatch { path: path.to_path_buf(), what, remedy: REMEDY }),
        }
    }
}

/// A file in `dir`, or in one of the directories that a shard makes, other than a leftover of
/// [`Identity::create`].
async fn first_file<D: Disk>(disk: &D, dir: &Path) -> Result<Option<PathBuf>> {
    for dir in [dir.to_path_buf(), dir.join("log"), dir.join("table")] {
        match disk.list(&dir).await {
            Ok(names) => {
                if let Some(name) = names.iter().find(|name| *name != TEMPORARY_NAME) {
                    return Ok(Some(dir.join(name)));
                }
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

async fn write_copy<F: File>(
    file: &F,
    identity: &Identity,
    generation: u64,
    copy: usize,
) -> Result<()> {
    let offset = (copy * COPY_SIZE) as u64;
    let mut buf = AlignedBuf::with_capacity(COPY_SIZE);
    buf.extend_from_slice(bytemuck::bytes_of(&Copied::new(identity, generation, offset)));
    buf.resize(COPY_SIZE);
    file.write_at(offset, buf, WriteMode::Durable).await.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{SimDisk, SimDiskOptions, SimExecutor};

    fn identity() -> Identity {
        Identity {
            cluster: 0x0011_2233_4455_6677_8899_AABB_CCDD_EEFF,
            node: OriginId(5),
            shard: 1,
            shard_count: 2,
            hash_seed: 0xFEED,
            partition_bits: 8,
            created: WallMicros(77),
        }
    }

    fn dir() -> PathBuf {
        PathBuf::from("data/shard-001")
    }

    fn path() -> PathBuf {
        dir().join(FILE_NAME)
    }

    fn world(seed: u64) -> (SimExecutor, SimDisk) {
        let executor = SimExecutor::new(seed);
        let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(seed));
        disk.write_file(Path::new("data/LOCK"), b"");
        (executor, disk)
    }

    fn made(seed: u64) -> (SimExecutor, SimDisk) {
        let (executor, disk) = world(seed);
        executor.run(Identity::create(&disk, &dir(), &identity())).unwrap();
        (executor, disk)
    }

    fn open(executor: &SimExecutor, disk: &SimDisk) -> Result<Identity> {
        executor.run(Identity::open(disk, &dir(), Some(&identity())))
    }

    #[test]
    fn what_was_made_is_opened_also_after_a_power_cut() {
        let (executor, disk) = made(1);
        let disk = disk.crash(1);
        assert_eq!(open(&executor, &disk).unwrap(), identity());
    }

    #[test]
    fn a_power_cut_while_it_is_made_leaves_it_whole_or_absent() {
        for number in 1..20 {
            for seed in 0..10 {
                let (executor, disk) = world(seed);
                disk.cut_power_at(number);
                let _ = executor.try_run(Identity::create(&disk, &dir(), &identity()));
                executor.kill_tasks();
                let disk = disk.crash(seed);
                let (dir, wanted) = (dir(), identity());
                let again = executor.run(Identity::open_or_create(&disk, &dir, &wanted));
                assert_eq!(again.unwrap(), wanted, "at {number}, seed {seed}");
            }
        }
    }

    #[test]
    fn any_damaged_byte_of_one_copy_is_mended_from_the_other() {
        let (executor, disk) = made(2);
        let whole = disk.read_file(&path()).unwrap();
        for byte in (0..80).chain(4096..4176) {
            disk.flip_bit(&path(), byte * 8 + byte % 8);
            match open(&executor, &disk) {
                Ok(found) => {
                    assert_eq!(found, identity());
                    assert_eq!(disk.read_file(&path()).unwrap(), whole, "byte {byte}");
                }
                Err(Error::Mismatch { what, .. }) => {
                    assert!((8..12).contains(&(byte % 4096)) && what.contains("version"));
                    disk.overwrite(&path(), 0, &whole);
                }
                Err(other) => panic!("byte {byte}: {other}"),
            }
        }
    }

    #[test]
    fn two_damaged_copies_are_refused_and_never_made_anew() {
        let (executor, disk) = made(3);
        disk.flip_bit(&path(), 40 * 8);
        disk.flip_bit(&path(), (4096 + 30) * 8);
        let error = open(&executor, &disk).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { path: named, .. } if *named == path()));
        let again = executor.run(Identity::open_or_create(&disk, &dir(), &identity()));
        assert!(matches!(again, Err(Error::Corrupt { .. })));
        disk.truncate(&path(), 0);
        assert!(matches!(open(&executor, &disk), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_directory_that_holds_anything_gets_no_new_identity() {
        for name in ["MANIFEST-0000000001", "log/0000000001.log", "table/0000000001.sst"] {
            let (executor, disk) = world(4);
            disk.write_file(&dir().join(name), b"data");
            let result = executor.run(Identity::open_or_create(&disk, &dir(), &identity()));
            assert!(matches!(result, Err(Error::Mismatch { .. })), "{name}");
        }
    }

    #[test]
    fn anothers_directory_is_refused_and_the_field_named() {
        let (executor, disk) = made(5);
        let others: [(&str, Identity); 6] = [
            ("cluster", Identity { cluster: 1, ..identity() }),
            ("node is 5, expected 6", Identity { node: OriginId(6), ..identity() }),
            ("shard is 1, expected 0", Identity { shard: 0, ..identity() }),
            ("shard count is 2, expected 4", Identity { shard_count: 4, ..identity() }),
            ("partition bits is 8, expected 9", Identity { partition_bits: 9, ..identity() }),
            ("hash seed", Identity { hash_seed: 1, ..identity() }),
        ];
        for (field, wanted) in others {
            let result = executor.run(Identity::open(&disk, &dir(), Some(&wanted)));
            let error = result.unwrap_err().to_string();
            assert!(error.contains(field) && !error.contains("65261"), "{error}");
        }
        let later = Identity { created: WallMicros(1), ..identity() };
        assert!(executor.run(Identity::open(&disk, &dir(), Some(&later))).is_ok());
    }

    #[test]
    fn a_power_cut_during_a_replacement_leaves_the_old_or_the_new() {
        let new = Identity { node: OriginId(6), ..identity() };
        for number in 1..16 {
            for seed in 0..10 {
                let (executor, disk) = made(seed);
                disk.cut_power_at(disk.op_count() + number);
                let replaced = executor.try_run(Identity::replace(&disk, &dir(), &new));
                executor.kill_tasks();
                let disk = disk.crash(seed);
                let found = executor.run(Identity::open(&disk, &dir(), None)).unwrap();
                assert!(found == new || (found == identity() && replaced.is_err()));
            }
        }
    }

    #[test]
    fn the_file_has_these_bytes() {
        let (_, disk) = made(6);
        let bytes = disk.read_file(&path()).unwrap();
        assert_eq!(bytes.len(), 8192);
        let copy = Copied::new(&identity(), 1, 0);
        let golden = [
            0x41, 0x4e, 0x4e, 0x49, 0x44, 0x4e, 0x0d, 0x0a, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xee,
            0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0xed,
            0xfe, 0, 0, 0, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1,
            0, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes[..12], golden[..12]);
        assert_eq!(u32::from_le_bytes(bytes[12..16].try_into().unwrap()), copy.checksum);
        assert_eq!(bytes[16..80], golden[16..80]);
        assert_eq!(copy.checksum, CHECKSUM);
        assert!(bytes[80..4096].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[4096..4108], golden[..12]);
    }

    const CHECKSUM: u32 = 3_367_632_961;
}
