//! The `NAMESPACES` file: its bytes, and how it is read and replaced.
//!
//! Invariant: what decodes is a catalogue that keeps all rules; a crash while saving leaves the
//! file of before or of after. Off the hot path: read at start, written at each change.
//!
//! Header, 64 bytes:
//!
//! | offset | size | field      | meaning                                                   |
//! |--------|------|------------|-----------------------------------------------------------|
//! | 0      | 8    | magic      | `ANLSNMSP`                                                |
//! | 8      | 4    | format     | 1                                                         |
//! | 12     | 4    | body_len   | bytes after the header                                    |
//! | 16     | 8    | generation | how many changes made it                                  |
//! | 24     | 4    | next_id    | the next id to give                                       |
//! | 28     | 4    | count      | namespaces in the body                                    |
//! | 32     | 4    | map_len    | bytes of the body's end that are the map; 0: none         |
//! | 36     | 24   | reserved   | 0                                                         |
//! | 60     | 4    | checksum   | CRC32C of bytes 0..60 and the body, salted                |
//!
//! Each namespace, by ascending id: id 4, `ttl_ms` 8, n 1, w 1, r 1, mode 1, availability 1,
//! compression 1, name length 1, data centres 1, name; for each data centre: length 1, copies 1,
//! name. Levels: 1..=16 a count, 254 quorum, 255 all. The map: `cluster/src/moves/file.rs`. Then
//! zeros up to the device's alignment.

use std::collections::BTreeMap;
use std::path::Path;

use annulus_cluster::moves::ClusterMap;
use annulus_engine::buffer::AlignedBuf;
use annulus_engine::checksum;
use annulus_engine::disk::{Disk, File, OpenMode, WriteMode};
use annulus_engine::error::{Error, Result};
use annulus_engine::model::NamespaceId;
use annulus_net::wire::codec::Reader as MapReader;

use super::{
    Availability, Catalogue, DATA_CENTRES_MAX, DEFAULT_NAME, FILE_NAME, FILE_NAME_NEW, Level, Mode,
    NAME_SIZE_MAX, NAMESPACES_MAX, Namespace, check,
};
use crate::config::Compression;

const MAGIC: [u8; 8] = *b"ANLSNMSP";
const FORMAT: u32 = 1;
const HEADER_SIZE: usize = 64;
const ENTRY_FIXED_SIZE: usize = 20;
const ENTRY_SIZE_MAX: usize =
    ENTRY_FIXED_SIZE + NAME_SIZE_MAX + DATA_CENTRES_MAX * (2 + NAME_SIZE_MAX);
const MAP_SIZE_MAX: usize = 1 << 20;
const BODY_SIZE_MAX: usize = NAMESPACES_MAX * ENTRY_SIZE_MAX + MAP_SIZE_MAX;
/// Stands for the file's id in its checksum.
const SALT: u64 = u64::from_le_bytes(MAGIC);

// A body's length fits its field, and the whole file one read of a few MiB.
const _: () = assert!(BODY_SIZE_MAX + HEADER_SIZE < 4 << 20);

impl Catalogue {
    /// The content of the file, without padding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.namespaces.len() * 64);
        for namespace in &self.namespaces {
            body.extend_from_slice(&namespace.id.0.to_le_bytes());
            body.extend_from_slice(&namespace.ttl_ms.to_le_bytes());
            body.extend_from_slice(&[
                namespace.n,
                namespace.w.to_u8(),
                namespace.r.to_u8(),
                namespace.mode as u8,
                namespace.availability as u8,
                compression_to_u8(namespace.compression),
                small(namespace.name.len()),
                small(namespace.dc.len()),
            ]);
            body.extend_from_slice(namespace.name.as_bytes());
            for (name, copies) in &namespace.dc {
                body.extend_from_slice(&[small(name.len()), *copies]);
                body.extend_from_slice(name.as_bytes());
            }
        }
        let namespaces_len = body.len();
        if let Some(map) = &self.map {
            map.encode(&mut body);
        }
        let map_len = body.len() - namespaces_len;
        let mut bytes = Vec::with_capacity(HEADER_SIZE + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&count_u32(body.len()).to_le_bytes());
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.next_id.to_le_bytes());
        bytes.extend_from_slice(&count_u32(self.namespaces.len()).to_le_bytes());
        bytes.extend_from_slice(&count_u32(map_len).to_le_bytes());
        bytes.resize(HEADER_SIZE - 4, 0);
        let sum = checksum::salted_parts(SALT, 0, &bytes, &body);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the content of the file; what follows the body is not looked at.
    ///
    /// # Errors
    /// `Corrupt` with the first rule broken, `Mismatch` for a newer format.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Catalogue> {
        let corrupt = |offset: usize, what: &str| Error::corrupt(path, offset as u64, what);
        let header: &[u8; HEADER_SIZE] =
            bytes.first_chunk().ok_or_else(|| corrupt(0, "shorter than its header"))?;
        if header[..8] != MAGIC {
            return Err(corrupt(0, "not a namespaces file"));
        }
        let u32_at = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let format = u32_at(8);
        let body_len = u32_at(12) as usize;
        let body = bytes[HEADER_SIZE..]
            .get(..body_len)
            .filter(|_| body_len <= BODY_SIZE_MAX)
            .ok_or_else(|| corrupt(12, "the body is cut off"))?;
        if checksum::salted_parts(SALT, 0, &header[..60], body) != u32_at(60) {
            return Err(corrupt(60, "the checksum does not match"));
        }
        if format != FORMAT {
            return Err(Error::Mismatch {
                path: path.to_path_buf(),
                what: format!("format {format}, this version reads {FORMAT}"),
                remedy: "start the version that wrote it, or a newer one",
            });
        }
        let generation = u64::from(u32_at(16)) | (u64::from(u32_at(20)) << 32);
        let next_id = u32_at(24);
        let (body, map) = body
            .split_at_checked(body_len.wrapping_sub(u32_at(32) as usize))
            .ok_or_else(|| corrupt(32, "the map is longer than the body"))?;
        let map = match map {
            [] => None,
            bytes => {
                let mut reader = MapReader::new(bytes);
                let map = ClusterMap::decode(&mut reader).and_then(|map| {
                    reader.finish()?;
                    Ok(map)
                });
                Some(map.map_err(|rule| corrupt(HEADER_SIZE + body.len(), rule.0))?)
            }
        };
        let mut reader = Reader { bytes: body, at: 0 };
        let mut namespaces: Vec<Namespace> = Vec::new();
        for _ in 0..u32_at(28) {
            let at = HEADER_SIZE + reader.at;
            let namespace = decode_entry(&mut reader)
                .ok_or_else(|| corrupt(at, "a namespace is cut off or has an unknown value"))?;
            check(&namespace).map_err(|refusal| corrupt(at, &refusal.to_string()))?;
            if namespaces.last().is_some_and(|last| last.id >= namespace.id)
                || namespaces.iter().any(|other| other.name == namespace.name)
                || namespace.id.0 >= next_id
            {
                return Err(corrupt(at, "the ids or names of namespaces are out of order"));
            }
            namespaces.push(namespace);
        }
        let has_default = namespaces
            .first()
            .is_some_and(|first| first.id == NamespaceId(0) && first.name == DEFAULT_NAME);
        if !has_default || reader.at != body.len() {
            return Err(corrupt(
                HEADER_SIZE,
                "the default namespace is missing, or bytes are left",
            ));
        }
        Ok(Catalogue { generation, next_id, namespaces, map })
    }

    /// Reads the catalogue of a data directory; none when the file is absent.
    ///
    /// # Errors
    /// As [`Catalogue::decode`], and `Io`.
    pub async fn load<D: Disk>(disk: &D, dir: &Path) -> Result<Option<Catalogue>> {
        let path = dir.join(FILE_NAME);
        let file = match disk.open(&path, OpenMode::Read).await {
            Ok(file) => file,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let len = usize::try_from(file.len().await?).unwrap_or(usize::MAX);
        if len > 2 * BODY_SIZE_MAX {
            return Err(Error::corrupt(path, 0, format!("{len} bytes are too many")));
        }
        let bytes = file.read_at(0, len.next_multiple_of(file.alignment())).await?;
        Catalogue::decode(&bytes, &path).map(Some)
    }

    /// Replaces the catalogue of a data directory, durably. A crash leaves the old or the new.
    ///
    /// # Errors
    /// `Io` and `Full`; the directory then has the old catalogue, or the new one undurably.
    pub async fn save<D: Disk>(&self, disk: &D, dir: &Path) -> Result<()> {
        let (path, aside) = (dir.join(FILE_NAME), dir.join(FILE_NAME_NEW));
        match disk.remove(&aside).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let file = disk.open(&aside, OpenMode::Create).await?;
        let content = self.encode();
        let mut buf = AlignedBuf::with_capacity(content.len());
        buf.extend_from_slice(&content);
        buf.pad_to(file.alignment());
        file.write_at(0, buf, WriteMode::Cached).await.1?;
        file.sync().await?;
        drop(file);
        disk.rename(&aside, &path).await?;
        disk.sync_dir(dir).await
    }
}

fn decode_entry(reader: &mut Reader<'_>) -> Option<Namespace> {
    let id = NamespaceId(u32::from_le_bytes(reader.take()?));
    let ttl_ms = u64::from_le_bytes(reader.take()?);
    let [n, w, r, mode, availability, compression, name_len, dc_count] = reader.take()?;
    let name = reader.text(name_len)?;
    let mut dc = BTreeMap::new();
    for _ in 0..dc_count {
        let [len, copies] = reader.take()?;
        if dc.insert(reader.text(len)?, copies).is_some() {
            return None;
        }
    }
    Some(Namespace {
        id,
        name,
        n,
        w: Level::from_u8(w)?,
        r: Level::from_u8(r)?,
        mode: match mode {
            1 => Mode::Lww,
            2 => Mode::Siblings,
            3 => Mode::Linearizable,
            _ => return None,
        },
        availability: match availability {
            1 => Availability::Ap,
            2 => Availability::Cp,
            _ => return None,
        },
        compression: match compression {
            0 => Compression::None,
            1 => Compression::Lz4,
            2 => Compression::Zstd,
            _ => return None,
        },
        ttl_ms,
        dc,
    })
}

fn compression_to_u8(compression: Compression) -> u8 {
    match compression {
        Compression::None => 0,
        Compression::Lz4 => 1,
        Compression::Zstd => 2,
    }
}

fn small(count: usize) -> u8 {
    u8::try_from(count).expect("checked against a limit below 256")
}

fn count_u32(count: usize) -> u32 {
    u32::try_from(count).expect("checked against a limit below 2^32")
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let found = *self.bytes.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(found)
    }

    fn text(&mut self, len: u8) -> Option<String> {
        let bytes = self.bytes.get(self.at..)?.get(..usize::from(len))?;
        self.at += bytes.len();
        String::from_utf8(bytes.to_vec()).ok()
    }
}
