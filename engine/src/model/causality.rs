//! Versions: dots, version vectors, contexts, siblings, and the one `merge`.

use super::Timestamp;

/// Identity of a node as a source of writes. Handed out once, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct OriginId(pub u32);

/// One write: the `sequence`-th of `origin` in its partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dot {
    /// Who coordinated the write.
    pub origin: OriginId,
    /// Its place among that origin's writes in the partition, from 1.
    pub sequence: u64,
}

/// For each origin the greatest sequence seen, sorted by origin.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VersionVector {
    entries: Vec<(OriginId, u64)>,
}

/// What a client has read of a key: passed back with a write, it replaces what it covers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Context {
    /// The events covered.
    pub vector: VersionVector,
    /// The greatest stamp read.
    pub timestamp: Timestamp,
}
