//! The `REGISTERS` file: its bytes, and how it is read and replaced.
//!
//! Invariant: what decodes keeps all rules and is this node's; the file is written aside, synced,
//! renamed, and the directory synced, so a crash leaves what was voted before or after. A damaged
//! one is refused, never begun anew: a holder that forgets its word can undo what a majority did.
//!
//! Header, 64 bytes:
//!
//! | offset | size | field    | meaning                                                     |
//! |--------|------|----------|-------------------------------------------------------------|
//! | 0      | 8    | magic    | `ANLSREGS`                                                  |
//! | 8      | 4    | format   | 1                                                           |
//! | 12     | 4    | body_len | bytes after the header                                      |
//! | 16     | 4    | count    | registers in the body                                       |
//! | 20     | 40   | reserved | 0                                                           |
//! | 60     | 4    | checksum | CRC32C of bytes 0..60 and the body, salted with the node's id |
//!
//! Each register, by ascending id: id 4, promised ballot 20, accepted ballot 20, state as in
//! `cluster/src/register/state.rs`. Then zeros up to the device's alignment.

use std::collections::BTreeMap;
use std::path::Path;

use annulus_cluster::NodeId;
use annulus_cluster::register::state::{decode_ballot, encode_ballot};
use annulus_cluster::register::{Acceptor, RegisterId, State};
use annulus_engine::buffer::AlignedBuf;
use annulus_engine::checksum;
use annulus_engine::disk::{Disk, File, OpenMode, WriteMode};
use annulus_engine::error::{Error, Result};
use annulus_net::wire::codec::{Malformed, Reader, Write};

use super::{FILE_NAME, FILE_NAME_NEW, Registers, check};

const MAGIC: [u8; 8] = *b"ANLSREGS";
const FORMAT: u32 = 1;
const HEADER_SIZE: usize = 64;
/// A catalogue has at most 2 MiB (`namespaces/file.rs`); there is one register.
const BODY_SIZE_MAX: usize = 8 << 20;
/// With the node's id it stands for the file's id in its checksum.
const SALT: u64 = u64::from_le_bytes(MAGIC);

impl Registers {
    /// The content of the file, without padding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for (register, acceptor) in &self.acceptors {
            body.put_u32(register.0);
            encode_ballot(acceptor.promised, &mut body);
            encode_ballot(acceptor.accepted, &mut body);
            acceptor.state.encode(&mut body);
        }
        let small = |count: usize| u32::try_from(count).expect("a few small registers");
        let mut bytes = Vec::with_capacity(HEADER_SIZE + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.put_u32(FORMAT);
        bytes.put_u32(small(body.len()));
        bytes.put_u32(small(self.acceptors.len()));
        bytes.resize(HEADER_SIZE - 4, 0);
        let sum = checksum::salted_parts(SALT, self.node.0.into(), &bytes, &body);
        bytes.put_u32(sum);
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the content of a node's file; what follows the body is not looked at.
    ///
    /// # Errors
    /// `Corrupt` with the first rule broken, `Mismatch` for a newer format.
    pub fn decode(bytes: &[u8], path: &Path, node: NodeId) -> Result<Registers> {
        let corrupt = |offset: usize, what: &str| Error::corrupt(path, offset as u64, what);
        let header: &[u8; HEADER_SIZE] =
            bytes.first_chunk().ok_or_else(|| corrupt(0, "shorter than its header"))?;
        if header[..8] != MAGIC {
            return Err(corrupt(0, "not a file of registers"));
        }
        let u32_at = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let body_len = u32_at(12) as usize;
        let body = bytes[HEADER_SIZE..]
            .get(..body_len)
            .filter(|_| body_len <= BODY_SIZE_MAX)
            .ok_or_else(|| corrupt(12, "the body is cut off"))?;
        if checksum::salted_parts(SALT, node.0.into(), &header[..60], body) != u32_at(60) {
            return Err(corrupt(60, "the checksum does not match, or it is another node's"));
        }
        if u32_at(8) != FORMAT {
            return Err(Error::Mismatch {
                path: path.to_path_buf(),
                what: format!("format {}, this version reads {FORMAT}", u32_at(8)),
                remedy: "start the version that wrote it, or a newer one",
            });
        }
        if header[20..60].iter().any(|byte| *byte != 0) {
            return Err(corrupt(20, "reserved bytes are not zero"));
        }
        let mut reader = Reader::new(body);
        let acceptors = decode_body(&mut reader, u32_at(16))
            .map_err(|rule| corrupt(HEADER_SIZE + body.len() - reader.remaining(), rule.0))?;
        Ok(Registers { node, acceptors })
    }

    /// Reads the registers of a node's data directory; none when the file is absent.
    ///
    /// # Errors
    /// As [`Registers::decode`], and `Io`.
    pub async fn load<D: Disk>(disk: &D, dir: &Path, node: NodeId) -> Result<Option<Registers>> {
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
        Registers::decode(&bytes, &path, node).map(Some)
    }

    /// Replaces the registers of a data directory, durably. A crash leaves the old or the new.
    ///
    /// # Errors
    /// `Io` and `Full`; the directory then has the old registers, or the new ones undurably.
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

fn decode_body(
    reader: &mut Reader<'_>,
    count: u32,
) -> std::result::Result<BTreeMap<RegisterId, Acceptor>, Malformed> {
    let mut acceptors = BTreeMap::new();
    for _ in 0..count {
        let register = RegisterId(reader.u32()?);
        let (promised, accepted) = (decode_ballot(reader)?, decode_ballot(reader)?);
        let state = State::decode(reader)?;
        check(register, &state).map_err(Malformed)?;
        if promised < accepted {
            return Err(Malformed("less is promised than was accepted"));
        }
        if acceptors.last_key_value().is_some_and(|(last, _)| *last >= register) {
            return Err(Malformed("the registers are out of order"));
        }
        acceptors.insert(register, Acceptor { promised, accepted, state });
    }
    reader.finish()?;
    Ok(acceptors)
}
