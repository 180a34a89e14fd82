//! What inspection prints: a line or JSON document for each file, record and damage.
//!
//! Invariant: keys and values are arbitrary bytes, so as text they are escaped and cut, as JSON
//! they are text or base64 and whole. The hash seed is never printed.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use annulus_engine::error::Error;
use annulus_engine::model::siblings::KeyState;
use annulus_engine::model::timestamp::EPOCH_UNIX_MICROS;
use annulus_engine::model::{Kind, RecordRef};
use annulus_net::wire::Version;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::Options;

/// Bytes of a key or value that text shows.
const SHOWN_MAX: usize = 48;

/// Where the findings go.
pub(super) struct Report<'a, W> {
    out: &'a mut W,
    options: Options,
    files: u64,
    records: u64,
    damages: u64,
}

impl<'a, W: Write> Report<'a, W> {
    pub(super) fn new(out: &'a mut W, options: Options) -> Report<'a, W> {
        Report { out, options, files: 0, records: 0, damages: 0 }
    }

    /// Whether every checksum is to be checked.
    pub(super) fn verifies(&self) -> bool {
        self.options.verify
    }

    /// Whether records are printed.
    pub(super) fn shows_records(&self) -> bool {
        self.options.records
    }

    /// Whether no damage was found.
    pub(super) fn is_whole(&self) -> bool {
        self.damages == 0
    }

    /// Prints a file's facts, an object.
    pub(super) fn file(&mut self, path: &Path, kind: &str, facts: &Value) -> io::Result<()> {
        self.files += 1;
        self.item("file", path, Some(kind), facts)
    }

    /// Prints something that is neither a file's facts nor damage: a torn tail, an orphan.
    pub(super) fn note(&mut self, path: &Path, what: &str) -> io::Result<()> {
        self.item("note", path, None, &json!({ "what": what }))
    }

    /// Prints one entry of a file that is no record: a control record, an edit.
    pub(super) fn entry(&mut self, path: &Path, kind: &str, facts: &Value) -> io::Result<()> {
        self.item("entry", path, Some(kind), facts)
    }

    fn item(
        &mut self,
        kind: &str,
        path: &Path,
        what: Option<&str>,
        facts: &Value,
    ) -> io::Result<()> {
        if self.options.json {
            let mut document = Map::new();
            document.insert("type".into(), kind.into());
            document.insert("path".into(), path.to_string_lossy().into());
            if let Some(what) = what {
                document.insert("kind".into(), what.into());
            }
            document.extend(facts.as_object().cloned().unwrap_or_default());
            return self.line(&Value::Object(document));
        }
        if kind == "entry" {
            write!(self.out, "  {}", what.unwrap_or_default())?;
        } else {
            write!(self.out, "{}: {}", path.display(), what.unwrap_or(kind))?;
        }
        for (name, value) in facts.as_object().into_iter().flatten() {
            match value {
                Value::String(text) => write!(self.out, " {name}={text}")?,
                value => write!(self.out, " {name}={value}")?,
            }
        }
        writeln!(self.out)
    }

    /// Prints a record; `place` says where in the file: an LSN or a block's offset.
    pub(super) fn record(
        &mut self,
        path: &Path,
        place: (&str, u64),
        record: &RecordRef<'_>,
    ) -> io::Result<()> {
        self.records += 1;
        if !self.options.records {
            return Ok(());
        }
        let version = Version { timestamp: record.timestamp, dot: record.dot };
        if self.options.json {
            return self.line(&record_json(path, place, record, version));
        }
        let kind = match record.kind {
            Kind::Put => "put",
            Kind::Delete => "delete",
            Kind::Siblings => "siblings",
        };
        write!(
            self.out,
            "  {}={} {kind} token={} ns={} key={} version={version} at={}",
            place.0,
            place.1,
            record.token,
            record.namespace.0,
            shown(record.key),
            moment(record.timestamp.wall().0),
        )?;
        if record.expiry_ms != 0 {
            write!(self.out, " expires={}", moment(record.expiry_ms.saturating_mul(1000)))?;
        }
        if record.kind != Kind::Delete {
            write!(
                self.out,
                " size={} value={}",
                record.value.len(),
                shown(&record.value.side_by_side())
            )?;
        }
        writeln!(self.out)
    }

    /// Prints damage.
    pub(super) fn damage(&mut self, error: &Error) -> io::Result<()> {
        self.damages += 1;
        if !self.options.json {
            return writeln!(self.out, "DAMAGE {error}");
        }
        let mut document = json!({ "type": "damage", "what": error.to_string() });
        let fields = document.as_object_mut().expect("made as an object");
        match error {
            Error::Corrupt { path, offset, what, .. } => {
                fields.insert("path".into(), path.to_string_lossy().into());
                fields.insert("offset".into(), (*offset).into());
                fields.insert("what".into(), what.clone().into());
            }
            Error::Io { path, .. } | Error::Mismatch { path, .. } => {
                fields.insert("path".into(), path.to_string_lossy().into());
            }
            _ => {}
        }
        self.line(&document)
    }

    /// Prints the sums, after everything else.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if self.options.verify {
            let (files, records, damages) = (self.files, self.records, self.damages);
            if self.options.json {
                self.line(&json!({
                    "type": "summary", "files": files, "records": records, "damages": damages,
                }))?;
            } else {
                let verdict = if damages == 0 {
                    "all whole".to_owned()
                } else {
                    format!("{damages} DAMAGED")
                };
                writeln!(self.out, "{files} files, {records} records: {verdict}")?;
            }
        }
        self.out.flush()
    }

    fn line(&mut self, document: &Value) -> io::Result<()> {
        serde_json::to_writer(&mut *self.out, document)?;
        self.out.write_all(b"\n")
    }
}

fn record_json(path: &Path, place: (&str, u64), record: &RecordRef<'_>, version: Version) -> Value {
    let mut document = Map::new();
    let mut put = |name: &str, value: Value| document.insert(name.to_owned(), value);
    put("type", "record".into());
    put("path", path.to_string_lossy().into());
    put(place.0, place.1.into());
    put("token", record.token.to_string().into());
    put("namespace", record.namespace.0.into());
    put("incarnation", record.incarnation.into());
    let (name, value) = text_or_base64("key", record.key);
    put(&name, value);
    put("version", version.to_string().into());
    put("at", moment(record.timestamp.wall().0).into());
    if record.expiry_ms != 0 {
        put("expires_at", moment(record.expiry_ms.saturating_mul(1000)).into());
    }
    match record.kind {
        Kind::Put => {
            put("kind", "put".into());
            let (name, value) = text_or_base64("value", &record.value.side_by_side());
            put(&name, value);
        }
        Kind::Delete => {
            put("kind", "delete".into());
            put("tombstone", true.into());
        }
        Kind::Siblings => {
            put("kind", "siblings".into());
            match KeyState::of_record(record) {
                Ok(state) => put("siblings", siblings_json(&state)),
                Err(error) => put("invalid", error.to_string().into()),
            };
        }
    }
    Value::Object(document)
}

fn siblings_json(state: &KeyState<'_>) -> Value {
    let siblings: Vec<Value> = state
        .siblings()
        .iter()
        .map(|sibling| {
            let mut document = Map::new();
            let version = Version::from(sibling.version()).to_string();
            document.insert("version".into(), version.into());
            if sibling.is_delete {
                document.insert("tombstone".into(), true.into());
            } else {
                let (name, value) = text_or_base64("value", &sibling.value.side_by_side());
                document.insert(name, value);
            }
            if sibling.expiry_ms != 0 {
                let expires = moment(sibling.expiry_ms.saturating_mul(1000));
                document.insert("expires_at".into(), expires.into());
            }
            Value::Object(document)
        })
        .collect();
    siblings.into()
}

fn text_or_base64(name: &str, bytes: &[u8]) -> (String, Value) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (name.to_owned(), text.into()),
        Err(_) => (format!("{name}_base64"), STANDARD.encode(bytes).into()),
    }
}

/// Bytes as one quoted word, escaped, cut when long.
fn shown(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(SHOWN_MAX)];
    let more = if cut.len() < bytes.len() { "..." } else { "" };
    format!("\"{}\"{more}", cut.escape_ascii())
}

/// A moment in microseconds since 2024-01-01 as people write it.
pub(super) fn moment(micros: u64) -> String {
    let unix = Duration::from_micros(micros.saturating_add(EPOCH_UNIX_MICROS));
    // Beyond the year 9999 the format ends.
    let last = Duration::from_secs(253_402_300_799);
    humantime::format_rfc3339_micros(UNIX_EPOCH + unix.min(last)).to_string()
}
