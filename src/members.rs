//! The members that a cluster is founded with, given with `--join`. Who joins later gives addresses of
//! any members, and is in no such list; from the founding on the members are in the map
//! (`annulus_cluster::moves`).
//!
//! Every founding member is given the same list, in any order, itself included. Invariant: ids follow from
//! the list alone (the place of an address in its order, from 1), so all members agree on them
//! without a word; the digest of the list is part of every handshake, so two lists never mix.
//!
//! An entry is `HOST:PORT`, the address of the member's peer port, and may go on with its place
//! and its share: `HOST:PORT@DC/RACK/WEIGHT`, of which the end may be left out.

use std::net::{SocketAddr, ToSocketAddrs};

use annulus_cluster::{NodeId, NodeInfo, Weight};
use annulus_engine::checksum;

/// Most members of a fixed list.
pub const MEMBERS_MAX: usize = 64;
/// What `--weight 100` is on the ring.
const WEIGHT_ORDINARY: u32 = 100;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// In the order of their ids.
    nodes: Vec<NodeInfo>,
    own: NodeId,
}

impl Members {
    /// The members that the entries name, seen from the one whose peer port is `own`, or whose
    /// entry has the host that it advertises.
    ///
    /// # Errors
    /// What is wrong with the list, and how it should look.
    pub fn resolve(
        entries: &[String],
        own: SocketAddr,
        advertise: Option<&str>,
    ) -> Result<Members, String> {
        let mut nodes = entries.iter().map(|entry| parse(entry)).collect::<Result<Vec<_>, _>>()?;
        nodes.sort_by(|a, b| a.peer.cmp(&b.peer));
        if nodes.len() > MEMBERS_MAX {
            return Err(format!("join: at most {MEMBERS_MAX} members"));
        }
        if let Some(pair) = nodes.windows(2).find(|pair| pair[0].peer == pair[1].peer) {
            return Err(format!("join: {} is named twice", pair[0].peer));
        }
        for (id, node) in (1..).zip(&mut nodes) {
            node.id = NodeId(id);
        }
        let advertised = advertise.map(|host| format!("{host}:{}", own.port()));
        let is_own = |node: &&NodeInfo| {
            Some(&node.peer) == advertised.as_ref()
                || node.peer == own.to_string()
                || node.peer.to_socket_addrs().is_ok_and(|mut found| found.any(|a| a == own))
        };
        let own = nodes.iter().find(is_own).map(|node| node.id).ok_or_else(|| {
            format!(
                "join: the list names every member by its peer address, this node too, but {own} \
                 is not among them; see peer-listen and advertise"
            )
        })?;
        Ok(Members { nodes, own })
    }

    /// Whether the list has this node in it: then a cluster is founded by it. Else the node joins one.
    #[must_use]
    pub fn names(entries: &[String], own: SocketAddr, advertise: Option<&str>) -> bool {
        Members::resolve(entries, own, advertise).is_ok()
            || entries.iter().any(|entry| parse(entry).is_err())
    }

    /// All members, by id.
    #[must_use]
    pub fn nodes(&self) -> &[NodeInfo] {
        &self.nodes
    }

    /// This node.
    #[must_use]
    pub fn own(&self) -> NodeId {
        self.own
    }

    /// The member that makes the cluster's identity at the first start.
    #[must_use]
    pub fn founder(&self) -> &NodeInfo {
        &self.nodes[0]
    }

    /// Equal for equal lists only.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let text = self.to_text();
        let low = checksum::salted(1, 0, text.as_bytes());
        u64::from(checksum::salted(2, 0, text.as_bytes())) << 32 | u64::from(low)
    }

    fn to_text(&self) -> String {
        let line = |node: &NodeInfo| {
            format!("{}@{}/{}/{}\n", node.peer, node.dc, node.rack, percent(node.weight))
        };
        self.nodes.iter().map(line).collect()
    }
}

/// A weight as `--weight` says it.
pub(crate) fn percent(weight: Weight) -> u32 {
    weight.0 * WEIGHT_ORDINARY / Weight::ONE.0
}

fn parse(entry: &str) -> Result<NodeInfo, String> {
    let bad = |why: &str| {
        format!(
            "join: `{}`: {why}; write HOST:PORT or HOST:PORT@DC/RACK/WEIGHT",
            entry.escape_debug()
        )
    };
    let (peer, place) = entry.split_once('@').unwrap_or((entry, ""));
    let (host, port) = peer.rsplit_once(':').ok_or_else(|| bad("no port"))?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(bad("no host and port"));
    }
    let mut parts = place.split('/');
    let mut name = |default: &str| match parts.next() {
        None | Some("") => Ok(default.to_owned()),
        Some(name) if name.len() <= 64 && !name.contains(char::is_whitespace) => {
            Ok(name.to_owned())
        }
        Some(_) => Err(bad("a name of a place has at most 64 letters and no blanks")),
    };
    let (dc, rack) = (name("dc1")?, name("rack1")?);
    let weight = match parts.next() {
        None => WEIGHT_ORDINARY,
        Some(text) => match text.parse() {
            Ok(weight @ 1..=1000) => weight,
            _ => return Err(bad("a weight is 1 to 1000, 100 is ordinary")),
        },
    };
    if parts.next().is_some() {
        return Err(bad("something follows the weight"));
    }
    let weight = Weight((weight * Weight::ONE.0).div_ceil(WEIGHT_ORDINARY));
    Ok(NodeInfo { id: NodeId(0), peer: peer.to_owned(), client: String::new(), dc, rack, weight })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Vec<String> {
        entries.iter().map(|entry| (*entry).to_owned()).collect()
    }

    fn own() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 7402))
    }

    #[test]
    fn every_member_gives_everyone_the_same_id() {
        let entries = list(&["127.0.0.1:7412", "127.0.0.1:7402", "127.0.0.1:7422@dc2/r9/200"]);
        let mut turned = entries.clone();
        turned.reverse();
        let a = Members::resolve(&entries, own(), None).unwrap();
        let b = Members::resolve(&turned, SocketAddr::from(([127, 0, 0, 1], 7422)), None).unwrap();
        assert_eq!(a.nodes(), b.nodes());
        assert_eq!(a.digest(), b.digest());
        assert_eq!((a.own(), b.own()), (NodeId(1), NodeId(3)));
        assert_eq!(a.nodes()[2].weight, Weight(2048));
        assert_eq!((a.nodes()[2].dc.as_str(), a.nodes()[2].rack.as_str()), ("dc2", "r9"));
    }

    #[test]
    fn a_list_without_this_node_or_with_one_twice_is_refused() {
        let refused = |entries: &[&str]| Members::resolve(&list(entries), own(), None).unwrap_err();
        assert!(refused(&["127.0.0.1:1", "127.0.0.1:2"]).contains("not among them"));
        assert!(refused(&["127.0.0.1:7402", "127.0.0.1:7402"]).contains("twice"));
        for entry in ["localhost", ":7402", "h:99999", "h:1@dc/r/0", "h:1@dc/r/100/x"] {
            assert!(refused(&[entry]).contains("HOST:PORT"), "{entry}");
        }
    }
}
