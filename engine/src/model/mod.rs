//! The nouns that every crate shares: token, record, version, time, limits.
//!
//! Nothing here does I/O, reads a clock, or allocates behind the caller's back.

pub mod causality;
pub mod context;
pub mod limits;
pub mod merge;
pub mod record;
pub mod seen;
pub mod siblings;
pub mod timestamp;
pub mod token;
pub mod value;
pub(crate) mod varint;

pub use causality::{Context, Dot, OriginId, VersionVector};
pub use record::{Kind, NamespaceId, Record, RecordRef};
pub use seen::{InvalidSeen, SeenOrigin, SeenSet};
pub use timestamp::{Instant, Timestamp, WallMicros};
pub use token::{PartitionId, Token, TokenRange};
pub use value::{Piece, Pieces, Value};
