//! The engine's errors. Few, and each says what state it leaves behind.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;

/// Result of an engine operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an engine operation failed.
///
/// Clones share their source, because one failed sync answers every write that waited for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The system refused an operation on a file. State: unchanged, unless the operation was a
    /// write or sync of the commit log, which then also poisons the log.
    #[error("{operation} {path}: {source}", path = path.display())]
    Io {
        /// What was being done: "open", "read at offset 4096", "sync".
        operation: String,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: Rc<io::Error>,
    },
    /// Bytes on disk fail their check. State: unchanged; the bytes are not used.
    #[error("{path} is damaged at offset {offset}: {what}; {remedy}", path = path.display())]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// Where in it, in bytes from its start.
        offset: u64,
        /// The first rule broken.
        what: String,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// The disk is full or below its reserve. State: unchanged, the write has not started.
    #[error("the disk is full: {what}; free space or add a node, writes resume by themselves")]
    Full {
        /// Which space, how much is left, how much is needed.
        what: String,
    },
    /// An earlier write or sync of the log failed. State: poisoned until the shard is reopened;
    /// writes that waited may or may not survive.
    #[error("the commit log is poisoned: {what}; the shard stops acknowledging until reopened")]
    Poisoned {
        /// The failure that poisoned it.
        what: String,
    },
    /// A file or directory belongs to something else: cluster, node, shard, or a newer format.
    /// State: unchanged, nothing was opened.
    #[error("{path} does not fit: {what}; {remedy}", path = path.display())]
    Mismatch {
        /// The file or directory.
        path: PathBuf,
        /// Expected and found.
        what: String,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// A value of a request or an option is out of range. State: unchanged.
    #[error("{what}")]
    Invalid {
        /// Which value, what is allowed.
        what: String,
    },
    /// The write would leave the key with more siblings than allowed. State: unchanged, the write
    /// has not started.
    #[error("{0}")]
    TooManySiblings(#[from] crate::model::causality::TooManySiblings),
    /// Too much waits already. State: unchanged, the write has not started.
    #[error("busy: {what}")]
    Busy {
        /// Which bound was met.
        what: &'static str,
    },
}

impl Error {
    /// An [`Error::Io`].
    pub fn io(operation: impl Into<String>, path: impl Into<PathBuf>, source: io::Error) -> Error {
        Error::Io { operation: operation.into(), path: path.into(), source: Rc::new(source) }
    }

    /// An [`Error::Corrupt`] whose remedy is the usual one.
    pub fn corrupt(path: impl Into<PathBuf>, offset: u64, what: impl Into<String>) -> Error {
        Error::Corrupt {
            path: path.into(),
            offset,
            what: what.into(),
            remedy: "restore the file from a snapshot or a replica; \
                     `annulus inspect --verify` lists all damage",
        }
    }

    /// Whether the error is the system saying that there is no such file.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the error is the system saying that no space is left.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Error::Full { .. } => true,
            Error::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}
