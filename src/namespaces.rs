//! The namespaces of a node: what each promises, and the `NAMESPACES` file that keeps them.
//!
//! Invariant: an id is given once and never again, so records of a dropped namespace can never
//! be read as another's; id 0 is `default`, always there. Changes are pure and validated; the
//! file is replaced as a whole (written aside, synced, renamed, directory synced), so a crash
//! leaves the catalogue of before or of after. Off the hot path: requests carry the id.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use annulus_engine::buffer::AlignedBuf;
use annulus_engine::checksum;
use annulus_engine::disk::{Disk, File, OpenMode, WriteMode};
use annulus_engine::error::{Error, Result};
use annulus_engine::model::NamespaceId;
use annulus_engine::model::limits::TTL_MS_MAX;
use serde::{Deserialize, Serialize};

use crate::config::Compression;

/// The file, in the data directory.
pub const FILE_NAME: &str = "NAMESPACES";
/// Where it is written before it gets its name.
pub const FILE_NAME_NEW: &str = "NAMESPACES.new";
/// The namespace that always exists, id 0.
pub const DEFAULT_NAME: &str = "default";
/// Most namespaces that exist at once.
pub const NAMESPACES_MAX: usize = 1024;
/// Longest name of a namespace or a data centre, in bytes.
pub const NAME_SIZE_MAX: usize = 64;
/// Most copies of a record.
pub const REPLICAS_MAX: u8 = 16;
/// Most data centres that a namespace names.
pub const DATA_CENTRES_MAX: usize = 16;

/// How many replicas must answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// This many, at least 1; `one` is 1.
    Count(u8),
    /// A majority of the copies.
    Quorum,
    /// Each copy.
    All,
}

impl Level {
    /// How many of `n` copies that is.
    #[must_use]
    pub fn of(self, n: u8) -> u8 {
        match self {
            Level::Count(count) => count,
            Level::Quorum => n / 2 + 1,
            Level::All => n,
        }
    }

    fn to_u8(self) -> u8 {
        match self {
            Level::Count(count) => count,
            Level::Quorum => 254,
            Level::All => 255,
        }
    }

    fn from_u8(byte: u8) -> Option<Level> {
        match byte {
            1..=REPLICAS_MAX => Some(Level::Count(byte)),
            254 => Some(Level::Quorum),
            255 => Some(Level::All),
            _ => None,
        }
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Level, String> {
        match text {
            "one" => Ok(Level::Count(1)),
            "quorum" => Ok(Level::Quorum),
            "all" => Ok(Level::All),
            _ => match text.parse::<u8>() {
                Ok(count @ 1..=REPLICAS_MAX) => Ok(Level::Count(count)),
                _ => Err(format!(
                    "`{}` is no level; write one, quorum, all, or a number from 1 to {REPLICAS_MAX}",
                    text.escape_debug()
                )),
            },
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Level::Count(1) => f.write_str("one"),
            Level::Count(count) => write!(f, "{count}"),
            Level::Quorum => f.write_str("quorum"),
            Level::All => f.write_str("all"),
        }
    }
}

impl Serialize for Level {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Level, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a namespace does with versions of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Mode {
    /// The greatest version wins.
    Lww = 1,
    /// Concurrent versions are all kept until a write that has seen them.
    Siblings = 2,
    /// Each key is a linearizable register.
    Linearizable = 3,
}

/// What a namespace prefers when replicas cannot reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Availability {
    /// Accept writes on both sides, reconcile later.
    Ap = 1,
    /// Refuse where the asked-for number of home replicas is not reachable.
    Cp = 2,
}

/// One namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// Number, never reused.
    #[serde(serialize_with = "serialize_id")]
    pub id: NamespaceId,
    /// Name: letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// Copies of each record, where the cluster has as many nodes.
    pub n: u8,
    /// Replicas that must acknowledge a write, unless the request says otherwise.
    pub w: Level,
    /// Replicas that must answer a read, unless the request says otherwise.
    pub r: Level,
    /// What happens to versions.
    pub mode: Mode,
    /// What happens under a partition.
    pub availability: Availability,
    /// How its blocks are compressed.
    pub compression: Compression,
    /// Time to live of records that name none, in milliseconds; 0 is for ever.
    pub ttl_ms: u64,
    /// Copies per data centre; empty spreads `n` over all.
    pub dc: BTreeMap<String, u8>,
}

fn serialize_id<S: serde::Serializer>(
    id: &NamespaceId,
    s: S,
) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_u32(id.0)
}

/// What to set; what is absent keeps its value, or its default in a new namespace. The form in
/// which the settings travel from `annulus ns` to the server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "each field is documented in Namespace")]
pub struct Settings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub w: Option<Level>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<Level>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub availability: Option<Availability>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dc: Option<BTreeMap<String, u8>>,
}

/// Why a change was refused. State: the catalogue is unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A namespace has that name.
    Exists(String),
    /// No namespace has that name.
    NotFound(String),
    /// A value is out of range, or does not fit the others.
    Invalid(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Exists(name) => write!(f, "namespace `{name}` exists"),
            Refusal::NotFound(name) => write!(f, "there is no namespace `{name}`"),
            Refusal::Invalid(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Refusal {}

/// All namespaces of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalogue {
    generation: u64,
    next_id: u32,
    /// Sorted by id.
    namespaces: Vec<Namespace>,
}

impl Catalogue {
    /// The catalogue of a new node: `default` alone, with this compression.
    #[must_use]
    pub fn new(compression: Compression) -> Catalogue {
        let default = Namespace { compression, ..fresh(NamespaceId(0), DEFAULT_NAME) };
        Catalogue { generation: 1, next_id: 1, namespaces: vec![default] }
    }

    /// How many changes made this catalogue; a greater one is newer.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The namespace with this id. None when it was dropped or never existed. O(log n).
    #[must_use]
    pub fn get(&self, id: NamespaceId) -> Option<&Namespace> {
        let index = self.namespaces.binary_search_by_key(&id, |namespace| namespace.id).ok()?;
        self.namespaces.get(index)
    }

    /// The namespace with this name. O(n).
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.iter().find(|namespace| namespace.name == name)
    }

    /// Ids of namespaces that were dropped.
    pub fn dropped(&self) -> impl Iterator<Item = NamespaceId> + '_ {
        (0..self.next_id).map(NamespaceId).filter(|id| self.get(*id).is_none())
    }

    /// All namespaces, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.namespaces.iter()
    }

    /// Whether the id once was a namespace and is no more: its records may be thrown away.
    #[must_use]
    pub fn is_dropped(&self, id: NamespaceId) -> bool {
        id.0 < self.next_id && self.get(id).is_none()
    }

    /// Adds a namespace.
    ///
    /// # Errors
    /// [`Refusal`]; nothing changed.
    pub fn create(
        &mut self,
        name: &str,
        settings: &Settings,
        compression: Compression,
    ) -> std::result::Result<NamespaceId, Refusal> {
        check_name("namespace", name)?;
        if self.by_name(name).is_some() {
            return Err(Refusal::Exists(name.to_owned()));
        }
        if self.namespaces.len() >= NAMESPACES_MAX {
            return Err(Refusal::Invalid(format!("there are {NAMESPACES_MAX} namespaces already")));
        }
        let Some(next_id) = self.next_id.checked_add(1) else {
            return Err(Refusal::Invalid("all ids of namespaces are used".to_owned()));
        };
        let id = NamespaceId(self.next_id);
        let mut namespace = Namespace { compression, ..fresh(id, name) };
        if settings.mode == Some(Mode::Linearizable) {
            namespace.availability = Availability::Cp;
        }
        let namespace = changed(namespace, settings)?;
        self.namespaces.push(namespace);
        self.next_id = next_id;
        self.generation += 1;
        Ok(id)
    }

    /// Changes settings of a namespace.
    ///
    /// # Errors
    /// [`Refusal`]; nothing changed. The mode cannot change, because the records depend on it.
    pub fn set(&mut self, name: &str, settings: &Settings) -> std::result::Result<(), Refusal> {
        let index = self.index(name)?;
        let old = &self.namespaces[index];
        if settings.mode.is_some_and(|mode| mode != old.mode) {
            return Err(Refusal::Invalid(
                "the mode of a namespace is fixed; make another and copy with export and import"
                    .to_owned(),
            ));
        }
        self.namespaces[index] = changed(old.clone(), settings)?;
        self.generation += 1;
        Ok(())
    }

    /// Removes a namespace; its id is never used again.
    ///
    /// # Errors
    /// [`Refusal`]; nothing changed. `default` stays.
    pub fn drop(&mut self, name: &str) -> std::result::Result<NamespaceId, Refusal> {
        let index = self.index(name)?;
        if self.namespaces[index].id == NamespaceId(0) {
            return Err(Refusal::Invalid(format!("`{DEFAULT_NAME}` cannot be dropped")));
        }
        self.generation += 1;
        Ok(self.namespaces.remove(index).id)
    }

    fn index(&self, name: &str) -> std::result::Result<usize, Refusal> {
        let found = self.namespaces.iter().position(|namespace| namespace.name == name);
        found.ok_or_else(|| Refusal::NotFound(name.to_owned()))
    }
}

fn fresh(id: NamespaceId, name: &str) -> Namespace {
    Namespace {
        id,
        name: name.to_owned(),
        n: 3,
        w: Level::Quorum,
        r: Level::Quorum,
        mode: Mode::Lww,
        availability: Availability::Ap,
        compression: Compression::Lz4,
        ttl_ms: 0,
        dc: BTreeMap::new(),
    }
}

fn check_name(what: &str, name: &str) -> std::result::Result<(), Refusal> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if (1..=NAME_SIZE_MAX).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(Refusal::Invalid(format!(
        "`{}` is no name of a {what}: 1 to {NAME_SIZE_MAX} letters, digits, `-`, `_` or `.`",
        name.escape_debug()
    )))
}

/// The namespace with the settings laid over it, when they fit together.
fn changed(
    mut namespace: Namespace,
    settings: &Settings,
) -> std::result::Result<Namespace, Refusal> {
    if let Some(dc) = &settings.dc {
        namespace.dc.clone_from(dc);
        // The data centres say how many copies there are, unless that is said as well.
        if !dc.is_empty() && settings.n.is_none() {
            let sum = dc.values().try_fold(0u8, |sum, copies| sum.checked_add(*copies));
            namespace.n = sum.unwrap_or(u8::MAX);
        }
    }
    namespace.n = settings.n.unwrap_or(namespace.n);
    namespace.w = settings.w.unwrap_or(namespace.w);
    namespace.r = settings.r.unwrap_or(namespace.r);
    namespace.mode = settings.mode.unwrap_or(namespace.mode);
    namespace.availability = settings.availability.unwrap_or(namespace.availability);
    namespace.compression = settings.compression.unwrap_or(namespace.compression);
    namespace.ttl_ms = settings.ttl_ms.unwrap_or(namespace.ttl_ms);
    check(&namespace)?;
    Ok(namespace)
}

/// The first rule that a namespace breaks. Also the check of what a file holds.
fn check(namespace: &Namespace) -> std::result::Result<(), Refusal> {
    let invalid = |what: String| Err(Refusal::Invalid(what));
    check_name("namespace", &namespace.name)?;
    let n = namespace.n;
    if !(1..=REPLICAS_MAX).contains(&n) {
        return invalid(format!("n is {n}, but must be 1 to {REPLICAS_MAX}"));
    }
    for (what, level) in [("w", namespace.w), ("r", namespace.r)] {
        if !(1..=n).contains(&level.of(n)) {
            return invalid(format!("{what} is {level}, but must be 1 to n, which is {n}"));
        }
    }
    if namespace.mode == Mode::Linearizable && namespace.availability == Availability::Ap {
        return invalid(
            "a linearizable namespace cannot be ap: a minority would have to lie".into(),
        );
    }
    if namespace.ttl_ms > TTL_MS_MAX {
        return invalid(format!("ttl is {} ms, but may be {TTL_MS_MAX} at most", namespace.ttl_ms));
    }
    if namespace.dc.len() > DATA_CENTRES_MAX {
        return invalid(format!("more than {DATA_CENTRES_MAX} data centres"));
    }
    for name in namespace.dc.keys() {
        check_name("data centre", name)?;
    }
    let sum: u32 = namespace.dc.values().map(|copies| u32::from(*copies)).sum();
    if !namespace.dc.is_empty() && (sum != u32::from(n) || namespace.dc.values().any(|c| *c == 0)) {
        return invalid(format!("the data centres have {sum} copies in all, but n is {n}"));
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// The file.
//
// Header, 64 bytes:
// | offset | size | field      | meaning                                                   |
// |--------|------|------------|-----------------------------------------------------------|
// | 0      | 8    | magic      | `ANLSNMSP`                                                |
// | 8      | 4    | format     | 1                                                         |
// | 12     | 4    | body_len   | bytes after the header                                    |
// | 16     | 8    | generation | how many changes made it                                  |
// | 24     | 4    | next_id    | the next id to give                                       |
// | 28     | 4    | count      | namespaces in the body                                    |
// | 32     | 28   | reserved   | 0                                                         |
// | 60     | 4    | checksum   | CRC32C of bytes 0..60 and the body, salted                |
//
// Each namespace, by ascending id: id 4, ttl_ms 8, n 1, w 1, r 1, mode 1, availability 1,
// compression 1, name length 1, data centres 1, name; for each data centre: length 1, copies 1,
// name. Levels: 1..=16 a count, 254 quorum, 255 all. Then zeros up to the device's alignment.

const MAGIC: [u8; 8] = *b"ANLSNMSP";
const FORMAT: u32 = 1;
const HEADER_SIZE: usize = 64;
const ENTRY_FIXED_SIZE: usize = 20;
const ENTRY_SIZE_MAX: usize =
    ENTRY_FIXED_SIZE + NAME_SIZE_MAX + DATA_CENTRES_MAX * (2 + NAME_SIZE_MAX);
const BODY_SIZE_MAX: usize = NAMESPACES_MAX * ENTRY_SIZE_MAX;
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
        let mut bytes = Vec::with_capacity(HEADER_SIZE + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&count_u32(body.len()).to_le_bytes());
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.next_id.to_le_bytes());
        bytes.extend_from_slice(&count_u32(self.namespaces.len()).to_le_bytes());
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
        Ok(Catalogue { generation, next_id, namespaces })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn catalogue() -> Catalogue {
        let mut catalogue = Catalogue::new(Compression::Lz4);
        let settings = Settings {
            mode: Some(Mode::Siblings),
            dc: Some(BTreeMap::from([("east".into(), 3), ("west".into(), 2)])),
            ttl_ms: Some(60_000),
            w: Some(Level::Count(1)),
            ..Settings::default()
        };
        catalogue.create("carts", &settings, Compression::Zstd).unwrap();
        catalogue
    }

    fn decode(bytes: &[u8]) -> Result<Catalogue> {
        Catalogue::decode(bytes, Path::new(FILE_NAME))
    }

    #[test]
    fn what_is_encoded_decodes_also_with_padding() {
        let catalogue = catalogue();
        let mut bytes = catalogue.encode();
        assert_eq!(decode(&bytes).unwrap(), catalogue);
        bytes.resize(4096, 0);
        assert_eq!(decode(&bytes).unwrap(), catalogue);
    }

    #[test]
    fn the_bytes_of_the_first_format_stay_readable() {
        // Golden: the file of a node with `default` alone.
        let bytes = Catalogue::new(Compression::None).encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = "414e4c534e4d535001000000\
            1b00000001000000000000000100000001000000\
            00000000000000000000000000000000000000000000000000000000c0d83304\
            00000000000000000000000003fefe0101000700\
            64656661756c74";
        assert_eq!(hex, golden);
    }

    #[test]
    fn each_flipped_bit_and_each_cut_is_an_error() {
        let bytes = catalogue().encode();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn ids_are_never_given_twice() {
        let mut catalogue = catalogue();
        let first = catalogue.drop("carts").unwrap();
        let second = catalogue.create("carts", &Settings::default(), Compression::None).unwrap();
        assert!(second > first);
        assert!(catalogue.is_dropped(first) && !catalogue.is_dropped(second));
        let reread = decode(&catalogue.encode()).unwrap();
        assert!(reread.is_dropped(first) && !reread.is_dropped(NamespaceId(99)));
        assert!(reread.generation() == 4);
    }

    #[test]
    fn settings_that_do_not_fit_are_refused_and_change_nothing() {
        let mut catalogue = catalogue();
        let before = catalogue.clone();
        let invalid = |settings: Settings| {
            let mut copy = before.clone();
            let refused = copy.set("carts", &settings);
            assert!(matches!(refused, Err(Refusal::Invalid(_))), "{settings:?}: {refused:?}");
            assert_eq!(copy, before);
        };
        let none = Settings::default;
        invalid(Settings { n: Some(0), ..none() });
        invalid(Settings { n: Some(17), ..none() });
        invalid(Settings { n: Some(3), ..none() });
        invalid(Settings { w: Some(Level::Count(6)), ..none() });
        invalid(Settings { mode: Some(Mode::Lww), ..none() });
        invalid(Settings { ttl_ms: Some(u64::MAX), ..none() });
        invalid(Settings { dc: Some(BTreeMap::from([("a b".into(), 3)])), ..none() });
        invalid(Settings {
            dc: Some(BTreeMap::from([("a".into(), 255), ("b".into(), 9)])),
            ..none()
        });
        assert!(matches!(catalogue.drop(DEFAULT_NAME), Err(Refusal::Invalid(_))));
        assert_eq!(catalogue.drop("x"), Err(Refusal::NotFound("x".into())));
        let again = catalogue.create("carts", &none(), Compression::None);
        assert_eq!(again, Err(Refusal::Exists("carts".into())));
        for name in ["", "a b", "a/b", "ä", &"x".repeat(65)] {
            assert!(catalogue.create(name, &none(), Compression::None).is_err(), "{name}");
        }
        assert_eq!(catalogue, before);
    }

    #[test]
    fn a_linearizable_namespace_is_cp() {
        let mut catalogue = Catalogue::new(Compression::None);
        let settings = Settings { mode: Some(Mode::Linearizable), ..Settings::default() };
        let id = catalogue.create("bank", &settings, Compression::None).unwrap();
        assert_eq!(catalogue.get(id).unwrap().availability, Availability::Cp);
        let ap = Settings { availability: Some(Availability::Ap), ..Settings::default() };
        assert!(catalogue.set("bank", &ap).is_err());
    }

    #[test]
    fn levels_count_replicas() {
        for (text, n, count) in
            [("one", 3, 1), ("quorum", 3, 2), ("quorum", 4, 3), ("all", 5, 5), ("2", 3, 2)]
        {
            let level: Level = text.parse().unwrap();
            assert_eq!((level.of(n), level.to_string().as_str()), (count, text));
        }
        for text in ["", "0", "17", "most", "-1"] {
            assert!(text.parse::<Level>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_crash_while_saving_leaves_the_old_or_the_new() {
        use annulus_engine::sim::{SimDisk, SimDiskOptions, SimExecutor};
        let (old, new) = (Catalogue::new(Compression::Lz4), catalogue());
        let dir = Path::new("data");
        for power_lost_at in 0..40 {
            let executor = SimExecutor::new(power_lost_at);
            let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
            executor.run(async {
                disk.create_dir(dir).await.unwrap();
                disk.sync_dir(Path::new("")).await.unwrap();
                old.save(&disk, dir).await.unwrap();
            });
            disk.cut_power_at(disk.op_count() + 1 + power_lost_at);
            let saved = executor.try_run(async { new.save(&disk, dir).await });
            let restarted = SimExecutor::new(1);
            let disk = disk.crash_onto(&restarted.runtime(), power_lost_at);
            let found = restarted.run(Catalogue::load(&disk, dir)).unwrap().unwrap();
            let durable = matches!(saved, Ok(Ok(())));
            assert!(found == new || (found == old && !durable), "at {power_lost_at}");
        }
    }
}
