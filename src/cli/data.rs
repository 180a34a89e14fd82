//! `annulus put`, `get` and `del`: one key each.
//!
//! Invariant: without `--json`, `get` prints the value's bytes and nothing else, with a newline
//! only for a person; `put` and `del` print nothing.

use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, UNIX_EPOCH};

use annulus_engine::model::limits::KEY_SIZE_MAX;
use annulus_engine::model::timestamp::EPOCH_UNIX_MICROS;
use annulus_net::client::{Context, Error, Read, ReadOptions, WriteOptions, Written};
use annulus_net::wire::{Condition, OperationFlags, Ttl, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::arguments::{DelArguments, GetArguments, PutArguments, WriteLevel};
use super::output::{Output, complain, finish};
use super::remote::{TIMEOUT_SHORT, connect_to_namespace, failure};
use super::{Exit, Failure, Outcome};
use crate::units::Span;

pub(super) fn put(arguments: PutArguments) -> Outcome {
    let key = key(&arguments.key)?;
    let value = match (&arguments.file, &arguments.value) {
        (Some(path), _) => std::fs::read(path)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))?,
        (None, Some(value)) if value == "-" => {
            let mut value = Vec::new();
            io::stdin()
                .read_to_end(&mut value)
                .map_err(|error| Failure::usage(format!("cannot read stdin: {error}")))?;
            value
        }
        (None, Some(value)) => value.as_bytes().to_vec(),
        (None, None) => return Err(Failure::usage("no value")),
    };
    let condition = match (&arguments.if_version, arguments.if_absent) {
        (Some(version), _) => condition(Some(version))?,
        (None, true) => Condition::IfAbsent,
        (None, false) => Condition::Always,
    };
    let options = WriteOptions {
        ttl: ttl(arguments.ttl),
        flags: trace_flag(arguments.trace),
        ..write_options(&arguments.write, condition)?
    };
    let namespace = connect_to_namespace(&arguments.server, &arguments.namespace, TIMEOUT_SHORT)?;
    written(namespace.put_with(key, &value, &options), arguments.server.json)
}

pub(super) fn del(arguments: DelArguments) -> Outcome {
    let key = key(&arguments.key)?;
    let options = write_options(&arguments.write, condition(arguments.if_version.as_deref())?)?;
    let namespace = connect_to_namespace(&arguments.server, &arguments.namespace, TIMEOUT_SHORT)?;
    written(namespace.delete_with(key, &options), arguments.server.json)
}

pub(super) fn get(arguments: GetArguments) -> Outcome {
    let key = key(&arguments.key)?;
    let options = ReadOptions {
        level: arguments.r.unwrap_or_default(),
        max_staleness: arguments.max_staleness.map(|span| span.0),
        flags: trace_flag(arguments.trace),
        ..ReadOptions::default()
    };
    let namespace = connect_to_namespace(&arguments.server, &arguments.namespace, TIMEOUT_SHORT)?;
    let read = namespace.read(key, &options).map_err(failure)?;
    if let Some(trace) = &read.trace {
        complain_trace(trace);
    }
    let mut output = Output::stdout();
    if arguments.server.json {
        let written = output.json(&read_json(&read));
        finish(output, written)?;
    } else if let [sibling] = read.values.as_slice() {
        let terminal = output.is_terminal();
        let printed = output
            .write_all(&sibling.value)
            .and_then(|()| if terminal { output.write_all(b"\n") } else { Ok(()) });
        finish(output, printed)?;
    }
    match read.values.len() {
        1 => Ok(Exit::Success),
        0 => Ok(Exit::Negative),
        count => Err(Failure::negative(format!(
            "{count} concurrent values; --json shows them, a put with their --context replaces them"
        ))),
    }
}

/// A key's bytes, in their bounds.
pub(super) fn key(text: &OsStr) -> Result<&[u8], Failure> {
    let key = text.as_bytes();
    if (1..=KEY_SIZE_MAX).contains(&key.len()) {
        return Ok(key);
    }
    Err(Failure::usage(format!("a key has 1 to {KEY_SIZE_MAX} bytes, this one {}", key.len())))
}

/// Time to live as the flag says it: zero is for ever, none is the namespace's.
pub(super) fn ttl(span: Option<Span>) -> Ttl {
    match span {
        None => Ttl::Default,
        Some(span) if span.0.is_zero() => Ttl::Never,
        Some(span) => Ttl::Millis(span.as_millis().max(1)),
    }
}

fn trace_flag(trace: bool) -> OperationFlags {
    if trace { OperationFlags::TRACE } else { OperationFlags::default() }
}

fn condition(version: Option<&str>) -> Result<Condition, Failure> {
    match version.map(str::parse::<Version>) {
        None => Ok(Condition::Always),
        Some(Ok(version)) => Ok(Condition::IfVersion(version)),
        Some(Err(error)) => Err(Failure::usage(error)),
    }
}

fn write_options(write: &WriteLevel, condition: Condition) -> Result<WriteOptions, Failure> {
    let context = write.context.as_deref().map(str::parse::<Context>).transpose();
    Ok(WriteOptions {
        level: write.w.unwrap_or_default(),
        condition,
        context: context.map_err(Failure::usage)?,
        ..WriteOptions::default()
    })
}

fn written(result: Result<Written, Error>, json: bool) -> Outcome {
    let written = match result {
        Ok(written) => written,
        Err(error) => {
            if json && let Error::ConditionFailed { current, context } = &error {
                let mut output = Output::stdout();
                let absent = current.is_none();
                let printed = output.json(&json!({
                    "condition": false,
                    "version": (!absent).then(|| current.to_string()),
                    "context": context.as_ref().map(ToString::to_string),
                }));
                finish(output, printed)?;
            }
            return Err(failure(error));
        }
    };
    if let Some(trace) = &written.trace {
        complain_trace(trace);
    }
    if json {
        let mut output = Output::stdout();
        let printed = output.json(&json!({
            "version": written.version.to_string(),
            "acks": written.acks,
            "primary": written.primary,
            "durable": written.durable,
            "window_ms": written.window_ms,
            "context": written.context.as_ref().map(ToString::to_string),
        }));
        finish(output, printed)?;
    }
    Ok(Exit::Success)
}

/// A trace goes to stderr: one step a line.
fn complain_trace(trace: &str) {
    let document: Value = serde_json::from_str(trace).unwrap_or_default();
    match document["steps"].as_array() {
        Some(steps) => steps.iter().for_each(|step| complain(&format!("trace: {step}"))),
        None => complain(&format!("trace: {trace}")),
    }
}

fn read_json(read: &Read) -> Value {
    let values: Vec<Value> = read
        .values
        .iter()
        .map(|sibling| {
            json!({
                "value_base64": STANDARD.encode(&sibling.value),
                "version": sibling.version.to_string(),
                "expires_at": (sibling.expiry_ms != 0).then(|| moment(sibling.expiry_ms * 1000)),
            })
        })
        .collect();
    let as_of = (read.as_of.0 != 0).then_some(read.as_of);
    json!({
        "values": values,
        "context": read.context.as_ref().map(ToString::to_string),
        "as_of": as_of.map(|stamp| moment(stamp.wall().0)),
        "as_of_timestamp": as_of.map(|stamp| format!("{:x}", stamp.0)),
        "primaries_read": read.primaries_read,
    })
}

/// A moment in microseconds since 2024-01-01 as people write it.
pub(super) fn moment(micros: u64) -> String {
    let unix = Duration::from_micros(micros.saturating_add(EPOCH_UNIX_MICROS));
    // Beyond the year 9999 the format ends.
    let last = Duration::from_secs(253_402_300_799);
    humantime::format_rfc3339_millis(UNIX_EPOCH + unix.min(last)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_in_utc() {
        assert_eq!(moment(0), "2024-01-01T00:00:00.000Z");
        assert_eq!(moment(u64::MAX), "9999-12-31T23:59:59.000Z");
    }

    #[test]
    fn a_ttl_of_zero_is_for_ever() {
        assert_eq!(ttl(None), Ttl::Default);
        assert_eq!(ttl(Some("0s".parse().unwrap())), Ttl::Never);
        assert_eq!(ttl(Some("1us".parse().unwrap())), Ttl::Millis(1));
        assert_eq!(ttl(Some("12h".parse().unwrap())), Ttl::Millis(43_200_000));
    }

    #[test]
    fn a_read_shows_what_it_was_worth() {
        let document = read_json(&Read::default());
        assert_eq!(document["values"], json!([]));
        assert!(document["context"].is_null() && document["as_of"].is_null());
        assert_eq!(document["primaries_read"], 0);
    }

    #[test]
    fn keys_have_their_bounds() {
        assert!(key(OsStr::new("")).is_err());
        assert!(key(OsStr::new(&"k".repeat(4097))).is_err());
        assert_eq!(key(OsStr::from_bytes(&[0xff, 1])).unwrap(), &[0xff, 1]);
    }
}
