//! Commands that change the members of a cluster, or move its partitions a step further.
//!
//! Invariant: pure, as `commands.rs`: each is a function of the catalogue, in which the map is. The
//! register carries it out (`pump/replication/registers.rs`), so one follows the other. Arguments and
//! replies are JSON; `map.step` comes from nodes only.

use annulus_cluster::member::Weight;
use annulus_cluster::moves::ClusterMap;
use annulus_cluster::{NodeId, NodeInfo};
use annulus_net::wire::codec::Reader;
use annulus_net::wire::status::Status;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::commands::NsOutcome;
use crate::namespaces::Catalogue;

/// A node joins: [`Join`]. The reply is a [`Joined`].
pub const JOIN: &str = "members.join";
/// A member leaves: [`Which`].
pub const LEAVE: &str = "members.leave";
/// A member that will not come back is replaced: [`Which`].
pub const REPLACE: &str = "members.replace";
/// A member has another address: [`Readdress`].
pub const READDRESS: &str = "members.address";
/// The next step of the moves: [`Step`].
pub const STEP: &str = "map.step";

/// Longest name or address, in bytes.
const TEXT_SIZE_MAX: usize = 64;

/// Arguments of [`JOIN`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of a member")]
pub struct Join {
    pub peer: String,
    pub dc: String,
    pub rack: String,
    pub weight: u32,
}

/// The reply of [`JOIN`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The new member's id.
    pub id: u32,
    /// The namespaces and the map, with the new member in it, in base64.
    pub catalogue_base64: String,
}

/// Arguments of [`LEAVE`] and [`REPLACE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    /// The member's id.
    pub node: u32,
}

/// Arguments of [`READDRESS`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Readdress {
    /// The member's id.
    pub node: u32,
    /// Where peers reach it now.
    pub peer: String,
}

/// Arguments of [`STEP`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The map that should follow, in base64: of the generation after the one it follows.
    pub map_base64: String,
}

impl Step {
    /// The step to this map.
    #[must_use]
    pub fn to(map: &ClusterMap) -> Step {
        let mut bytes = Vec::new();
        map.encode(&mut bytes);
        Step { map_base64: STANDARD.encode(bytes) }
    }
}

/// Whether a command is one of these.
#[must_use]
pub fn is_one(command: &str) -> bool {
    [JOIN, LEAVE, REPLACE, READDRESS, STEP].contains(&command)
}

/// Whether an operator or a new node may ask for it.
#[must_use]
pub fn is_for_clients(command: &str) -> bool {
    is_one(command) && command != STEP
}

fn read<T: DeserializeOwned>(arguments: &str) -> Result<T, (Status, String)> {
    serde_json::from_str(arguments).map_err(|error| (Status::BAD_REQUEST, error.to_string()))
}

fn text(what: &str, text: &str) -> Result<(), (Status, String)> {
    if (1..=TEXT_SIZE_MAX).contains(&text.len()) && !text.contains(char::is_whitespace) {
        return Ok(());
    }
    let text = text.escape_debug();
    let why = format!("`{text}` is no {what}: 1 to {TEXT_SIZE_MAX} letters without blanks");
    Err((Status::BAD_REQUEST, why))
}

/// Carries one of these commands out on a copy of the catalogue.
///
/// # Errors
/// Why it is refused; nothing changed.
pub fn apply(
    command: &str,
    arguments: &str,
    catalogue: &Catalogue,
) -> Result<NsOutcome, (Status, String)> {
    let refused = |why: annulus_cluster::moves::Refused| (Status::FAILED, why.to_string());
    let Some(known) = catalogue.map() else {
        let what = "this node is on its own: start a cluster with `--join` and all its members";
        return Err((Status::FAILED, what.to_owned()));
    };
    let (mut map, copies) = (known.clone(), catalogue.copies_max());
    let mut reply = json!({});
    let mut joined = None;
    match command {
        JOIN => {
            let join: Join = read(arguments)?;
            text("address", &join.peer)?;
            text("data centre", &join.dc)?;
            text("rack", &join.rack)?;
            let weight = Weight(join.weight);
            if weight == Weight(0) || weight > Weight::MAX {
                return Err((Status::BAD_REQUEST, "a weight is 1 to 64 times 1024".to_owned()));
            }
            let Join { peer, dc, rack, .. } = join;
            let id = NodeId(0);
            let info = NodeInfo { id, peer, client: String::new(), dc, rack, weight };
            joined = Some(map.join(info).map_err(refused)?);
        }
        LEAVE => {
            let Which { node } = read(arguments)?;
            map.leave(NodeId(node), copies).map_err(refused)?;
            reply = json!({ "leaving": node });
        }
        REPLACE => {
            let Which { node } = read(arguments)?;
            map.replace(NodeId(node), copies).map_err(refused)?;
            reply = json!({ "replaced": node });
        }
        READDRESS => {
            let Readdress { node, peer } = read(arguments)?;
            text("address", &peer)?;
            map.readdress(NodeId(node), &peer).map_err(refused)?;
        }
        _ => {
            let Step { map_base64 } = read(arguments)?;
            let bad = || (Status::BAD_REQUEST, "no map".to_owned());
            let bytes = STANDARD.decode(map_base64).map_err(|_| bad())?;
            let mut reader = Reader::new(&bytes);
            map = ClusterMap::decode(&mut reader).map_err(|_| bad())?;
            if map.generation != known.generation + 1 || map.founding != known.founding {
                // Somebody else was sooner.
                return Ok(NsOutcome { changed: None, reply });
            }
        }
    }
    let mut changed = catalogue.clone();
    if map != *known {
        changed.set_map(map);
    }
    if let Some(id) = joined {
        let catalogue_base64 = STANDARD.encode(changed.encode());
        reply = json!(Joined { id: id.0, catalogue_base64 });
    }
    let is_news = changed != *catalogue;
    Ok(NsOutcome { changed: is_news.then_some(changed), reply })
}
