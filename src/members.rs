//! The members of a cluster whose list is fixed: given with `--join`, kept in the file `MEMBERS`.
//!
//! Every member is given the same list, in any order, itself included. Invariant: ids follow from
//! the list alone (the place of an address in its order, from 1), so all members agree on them
//! without a word; the digest of the list is part of every handshake, so two lists never mix.
//!
//! An entry is `HOST:PORT`, the address of the member's peer port, and may go on with its place
//! and its share: `HOST:PORT@DC/RACK/WEIGHT`, of which the end may be left out.

use std::fs;
use std::io::{self, Write as _};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;

use annulus_cluster::{NodeId, NodeInfo, Weight};
use annulus_engine::checksum;

/// The file, in the data directory: one entry a line.
pub const FILE_NAME: &str = "MEMBERS";
/// Where it is written before it gets its name.
pub const FILE_NAME_NEW: &str = "MEMBERS.new";
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

    /// The entries of the list that the directory was made with; `None` if it has none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load(dir: &Path) -> Result<Option<Vec<String>>, String> {
        let path = dir.join(FILE_NAME);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.lines().map(str::to_owned).collect())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(fail(&path, &error)),
        }
    }

    /// Keeps the list. Durable when it returns.
    ///
    /// # Errors
    /// What the file system said. State: the list of before, or this one.
    pub fn save(&self, dir: &Path) -> Result<(), String> {
        let (path, new) = (dir.join(FILE_NAME), dir.join(FILE_NAME_NEW));
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&new)?;
            file.write_all(self.to_text().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            fs::File::open(dir)?.sync_all()
        };
        write().map_err(|error| fail(&path, &error))
    }

    /// Refuses a list that is not the one that the directory was made with.
    ///
    /// # Errors
    /// Which list it was.
    pub fn check_unchanged(&self, kept: &[String], dir: &Path) -> Result<(), String> {
        let now = self.to_text();
        if now.lines().eq(kept.iter().map(String::as_str)) {
            return Ok(());
        }
        Err(format!(
            "{} was made for the members {}; the list cannot be changed",
            dir.display(),
            kept.join(",")
        ))
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

fn fail(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
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

    #[test]
    fn a_kept_list_comes_back_and_another_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Members::load(dir.path()).unwrap(), None);
        let entries = list(&["127.0.0.1:7402@dc1/a/50", "127.0.0.1:7412"]);
        let members = Members::resolve(&entries, own(), None).unwrap();
        members.save(dir.path()).unwrap();
        let kept = Members::load(dir.path()).unwrap().unwrap();
        assert_eq!(Members::resolve(&kept, own(), None).unwrap(), members);
        members.check_unchanged(&kept, dir.path()).unwrap();
        let other = Members::resolve(&list(&["127.0.0.1:7402"]), own(), None).unwrap();
        assert!(other.check_unchanged(&kept, dir.path()).is_err());
    }
}
