//! A node that joins a living cluster: it asks any member to be made one, and learns who it is. It has
//! as many shards as the others, because shards of the same number have the same partitions.
//!
//! Invariant: it is asked before anything is kept; asked again for the same address the cluster gives
//! the same id, so a join that was cut short is taken up by the next start. Once at a start, before
//! any shard serves; off every hot path.

use std::time::Duration;

use annulus_engine::model::OriginId;
use annulus_net::client::{BlockingClient, ClientOptions};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use annulus_cluster::Weight;

use super::claim::Begun;
use super::node::Node;
use crate::member_commands::{JOIN, Join, Joined};
use crate::namespaces::Catalogue;

/// How long members are asked.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Becomes a member: the namespaces with the map, and the id.
///
/// # Errors
/// No member answered, or why it is refused.
pub(super) fn join(node: &Node) -> Result<Begun, String> {
    let config = node.config();
    let addresses: Vec<String> = config
        .join
        .iter()
        .map(|entry| entry.split_once('@').map_or(entry.as_str(), |(address, _)| address))
        .map(str::to_owned)
        .collect();
    let named = addresses.join(",");
    let failed = |what: String| {
        format!(
            "join: {named}: {what}; name any member by the address that clients reach it at, or, to \
             found a cluster, all its members by their peer addresses, this one too"
        )
    };
    let weight = (config.weight * Weight::ONE.0).div_ceil(100);
    let join =
        Join { peer: node.peer_name(), dc: config.dc.clone(), rack: config.rack.clone(), weight };
    let wanted = config.shards;
    let arguments = serde_json::to_string(&join).map_err(|error| failed(error.to_string()))?;
    // The driver blocks, and this is a shard's thread; nothing else runs on it yet.
    let asking = std::thread::Builder::new().name("annulus-join".into()).spawn(move || {
        let options = ClientOptions {
            timeout: TIMEOUT,
            name: "annulus-join".to_owned(),
            ..ClientOptions::new(addresses.iter().map(String::as_str))
        };
        let client = BlockingClient::connect(options).map_err(|error| error.to_string())?;
        let theirs = client.welcome().map(|welcome| welcome.shard_count).ok_or("no welcome")?;
        if wanted.is_some_and(|wanted| wanted != theirs) {
            return Err(format!(
                "its nodes have {theirs} shards each: start this one with --shards {theirs}, or \
                 without --shards"
            ));
        }
        let reply = client.admin(JOIN, &arguments, None).map_err(|error| error.to_string())?;
        Ok((reply, theirs))
    });
    let asking = asking.map_err(|error| failed(error.to_string()))?;
    let (reply, shards) =
        asking.join().map_err(|_| failed("it panicked".to_owned()))?.map_err(failed)?;
    let joined: Joined = serde_json::from_str(&reply).map_err(|error| failed(error.to_string()))?;
    let bytes = STANDARD.decode(&joined.catalogue_base64).map_err(|e| failed(e.to_string()))?;
    let path = config.data_dir.join(crate::namespaces::FILE_NAME);
    let catalogue = Catalogue::decode(&bytes, &path).map_err(|error| failed(error.to_string()))?;
    tracing::info!(node = joined.id, "this node has joined the cluster");
    Ok(Begun { catalogue, own: OriginId(joined.id), shard_count: Some(shards) })
}
