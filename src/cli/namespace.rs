//! `annulus ns create|list|set|drop`.
//!
//! Invariant: pure but for the one command that it sends; the server decides.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::arguments::{NsArguments, NsChangeArguments, NsCommand};
use super::output::{Output, finish};
use super::remote;
use super::{Exit, Failure, Outcome};
use crate::commands::{Command, Named, NsChange};
use crate::namespaces::Settings;
use crate::units::Span;

pub(super) fn run(arguments: NsArguments) -> Outcome {
    match arguments.command {
        NsCommand::Create(change) => {
            let command = Command::NsCreate(to_change(&change)?);
            print_reply(remote::command(&change.server, &command)?, change.server.json)
        }
        NsCommand::Set(change) => {
            let command = Command::NsSet(to_change(&change)?);
            print_reply(remote::command(&change.server, &command)?, change.server.json)
        }
        NsCommand::Drop(named) => {
            let command = Command::NsDrop(Named { name: named.name });
            print_reply(remote::command(&named.server, &command)?, named.server.json)
        }
        NsCommand::List(only) => {
            let reply: Value = remote::command(&only.server, &Command::NsList)?;
            if only.server.json { print_reply(reply, true) } else { list(reply) }
        }
    }
}

fn to_change(arguments: &NsChangeArguments) -> Result<NsChange, Failure> {
    let dc = if arguments.dc.is_empty() { None } else { Some(copies(&arguments.dc)?) };
    let settings = Settings {
        n: arguments.n,
        w: arguments.w,
        r: arguments.r,
        mode: arguments.mode,
        availability: arguments.availability,
        compression: arguments.compression,
        ttl_ms: arguments.ttl.map(Span::as_millis),
        dc,
    };
    Ok(NsChange { name: arguments.name.clone(), settings })
}

/// `NAME=N` each.
fn copies(parts: &[String]) -> Result<BTreeMap<String, u8>, Failure> {
    let mut copies = BTreeMap::new();
    for part in parts {
        let refuse = || Failure::usage(format!("--dc: `{part}` is not NAME=N, such as east=3"));
        let (name, count) = part.split_once('=').ok_or_else(refuse)?;
        let count = count.parse().map_err(|_| refuse())?;
        if copies.insert(name.to_owned(), count).is_some() {
            return Err(Failure::usage(format!("--dc names `{name}` twice")));
        }
    }
    Ok(copies)
}

fn print_reply(reply: Value, json: bool) -> Outcome {
    if json {
        let mut output = Output::stdout();
        let printed = output.json(&reply);
        finish(output, printed)?;
    }
    Ok(Exit::Success)
}

#[derive(Deserialize)]
struct Row {
    id: u32,
    name: String,
    n: u8,
    w: String,
    r: String,
    mode: String,
    availability: String,
    compression: String,
    ttl_ms: u64,
    dc: BTreeMap<String, u8>,
}

fn list(reply: Value) -> Outcome {
    #[derive(Deserialize)]
    struct Reply {
        namespaces: Vec<Row>,
    }
    let reply: Reply = remote::parse(&reply.to_string())?;
    let rows: Vec<Vec<String>> = reply.namespaces.into_iter().map(cells).collect();
    let mut output = Output::stdout();
    let header =
        ["ID", "NAME", "N", "W", "R", "MODE", "AVAILABILITY", "COMPRESSION", "TTL", "COPIES"];
    let printed = output.table(&header, &rows);
    finish(output, printed)?;
    Ok(Exit::Success)
}

fn cells(row: Row) -> Vec<String> {
    let ttl = match row.ttl_ms {
        0 => "-".to_owned(),
        ms => Span(std::time::Duration::from_millis(ms)).to_string(),
    };
    let dc: Vec<String> = row.dc.iter().map(|(name, copies)| format!("{name}={copies}")).collect();
    let copies = if dc.is_empty() { "-".to_owned() } else { dc.join(",") };
    vec![
        row.id.to_string(),
        row.name,
        row.n.to_string(),
        row.w,
        row.r,
        row.mode,
        row.availability,
        row.compression,
        ttl,
        copies,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Compression;
    use crate::namespaces::Catalogue;

    #[test]
    fn copies_are_read_once_each() {
        let parts = ["east=3".to_owned(), "west=2".to_owned()];
        assert_eq!(copies(&parts).unwrap()["west"], 2);
        for bad in [vec!["east"], vec!["east=x"], vec!["east=1", "east=2"]] {
            let parts: Vec<String> = bad.into_iter().map(str::to_owned).collect();
            assert!(copies(&parts).is_err());
        }
    }

    #[test]
    fn the_servers_list_can_be_printed() {
        let catalogue = Catalogue::new(Compression::Lz4);
        let reply = serde_json::json!(catalogue.iter().next());
        let row: Row = serde_json::from_value(reply).unwrap();
        let cells = cells(row);
        assert_eq!(cells[..6], ["0", "default", "3", "quorum", "quorum", "lww"]);
    }
}
