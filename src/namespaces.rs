//! The namespaces of a node: what each promises, and the `NAMESPACES` file that keeps them.
//!
//! Invariant: an id is given once and never again, so records of a dropped namespace can never
//! be read as another's; id 0 is `default`, always there. Changes are pure and validated; the
//! file is replaced as a whole (written aside, synced, renamed, directory synced), so a crash
//! leaves the catalogue of before or of after. Off the hot path: requests carry the id.

mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use annulus_cluster::moves::ClusterMap;
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

    fn from_str(text: &str) -> Result<Level, String> {
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
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Level, D::Error> {
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

fn serialize_id<S: serde::Serializer>(id: &NamespaceId, s: S) -> Result<S::Ok, S::Error> {
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
    /// Members and placement; none of a node of its own. It is kept with the namespaces because
    /// both are one value of one register: so the register's holders change with its value.
    map: Option<ClusterMap>,
}

impl Catalogue {
    /// The catalogue of a new node: `default` alone, with this compression.
    #[must_use]
    pub fn new(compression: Compression) -> Catalogue {
        let default = Namespace { compression, ..fresh(NamespaceId(0), DEFAULT_NAME) };
        Catalogue { generation: 1, next_id: 1, namespaces: vec![default], map: None }
    }

    /// How many changes made this catalogue; a greater one is newer.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The members of the cluster and where its partitions are; none of a node of its own.
    #[must_use]
    pub fn map(&self) -> Option<&ClusterMap> {
        self.map.as_ref()
    }

    /// The same catalogue in a cluster that begins with this map.
    #[must_use]
    pub fn founded(self, map: ClusterMap) -> Catalogue {
        Catalogue { map: Some(map), ..self }
    }

    /// Replaces the map by one that follows it.
    pub fn set_map(&mut self, map: ClusterMap) {
        self.map = Some(map);
        self.generation += 1;
    }

    /// The greatest number of copies that a namespace asks for.
    #[must_use]
    pub fn copies_max(&self) -> u8 {
        self.namespaces.iter().map(|namespace| namespace.n).max().unwrap_or(1)
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
    ) -> Result<NamespaceId, Refusal> {
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
    pub fn set(&mut self, name: &str, settings: &Settings) -> Result<(), Refusal> {
        let index = self.index(name)?;
        let old = &self.namespaces[index];
        if settings.mode.is_some_and(|mode| mode != old.mode) {
            return Err(Refusal::Invalid(
                "the mode of a namespace is fixed; make another and copy with export and import"
                    .to_owned(),
            ));
        }
        if old.mode == Mode::Linearizable && settings.n.is_some_and(|n| n != old.n) {
            return Err(Refusal::Invalid(
                "n of a linearizable namespace is fixed, because majorities of its homes must meet; make \
                 another and copy with export and import"
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
    pub fn drop(&mut self, name: &str) -> Result<NamespaceId, Refusal> {
        let index = self.index(name)?;
        if self.namespaces[index].id == NamespaceId(0) {
            return Err(Refusal::Invalid(format!("`{DEFAULT_NAME}` cannot be dropped")));
        }
        self.generation += 1;
        Ok(self.namespaces.remove(index).id)
    }

    fn index(&self, name: &str) -> Result<usize, Refusal> {
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

fn check_name(what: &str, name: &str) -> Result<(), Refusal> {
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
fn changed(mut namespace: Namespace, settings: &Settings) -> Result<Namespace, Refusal> {
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
fn check(namespace: &Namespace) -> Result<(), Refusal> {
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

#[cfg(test)]
mod tests;
