//! A member of the cluster, and the share of the ring that it should carry.
//!
//! Invariant: a [`NodeId`] names one server for the cluster's whole life. It is the number that
//! the server also signs its writes with, so an id that was given out is never given again.

use std::fmt;

use annulus_engine::model::OriginId;

/// Identity of a server. The same number as its [`OriginId`] of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct NodeId(pub u32);

impl From<OriginId> for NodeId {
    fn from(origin: OriginId) -> NodeId {
        NodeId(origin.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How much a server should carry, as its number of virtual nodes: 1,024 is an ordinary server,
/// 2,048 one of twice the capacity. Zero holds nothing: a server that is leaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Weight(pub u32);

impl Weight {
    /// An ordinary server.
    pub const ONE: Weight = Weight(1024);
    /// The most that one server may weigh: 64 ordinary ones.
    pub const MAX: Weight = Weight(64 * 1024);
}

/// A server as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which server.
    pub id: NodeId,
    /// Its share, in relation to the others'.
    pub weight: Weight,
    /// Its data centre.
    pub dc: String,
    /// Its rack; racks of the same name in different data centres are different ones.
    pub rack: String,
}
