//! The lines of `import` and `export`: JSON objects or tab-separated values, one key a line.
//!
//! Invariant: what `export` writes, `import` reads back to the same bytes, whatever the bytes
//! are: what is not UTF-8 goes as base64. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::arguments::Format;
use crate::units::Span;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// The key.
    pub(crate) key: Vec<u8>,
    /// The value; none deletes the key.
    pub(crate) value: Option<Vec<u8>>,
    /// How long it lives; none leaves it to the namespace, zero is for ever.
    pub(crate) ttl: Option<Span>,
    /// The write it comes from, as text; not looked at by `import`.
    pub(crate) version: Option<String>,
}

/// A line as JSON. `key` or `key_base64`, `value` or `value_base64` or `deleted`.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    deleted: bool,
}

impl Line {
    /// Reads a line without its end. None for a line without content.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(line: &[u8], format: Format) -> Result<Option<Line>, String> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        match format {
            Format::Jsonl => parse_json(line).map(Some),
            Format::Tsv => parse_tsv(line).map(Some),
        }
    }

    /// The line as JSON, with its end.
    pub(crate) fn to_json(&self) -> String {
        let mut document =
            Document { ttl: self.ttl, version: self.version.clone(), ..Document::default() };
        (document.key, document.key_base64) = text_or_base64(&self.key);
        match &self.value {
            Some(value) => (document.value, document.value_base64) = text_or_base64(value),
            None => document.deleted = true,
        }
        let mut line = serde_json::to_string(&document).expect("text and base64 are JSON");
        line.push('\n');
        line
    }
}

fn text_or_base64(bytes: &[u8]) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (None, Some(STANDARD.encode(bytes))),
    }
}

fn one_of(
    name: &str,
    text: Option<String>,
    base64: Option<String>,
) -> Result<Option<Vec<u8>>, String> {
    match (text, base64) {
        (Some(_), Some(_)) => Err(format!("both `{name}` and `{name}_base64`")),
        (Some(text), None) => Ok(Some(text.into_bytes())),
        (None, Some(base64)) => STANDARD
            .decode(base64)
            .map(Some)
            .map_err(|error| format!("`{name}_base64` is not base64: {error}")),
        (None, None) => Ok(None),
    }
}

fn parse_json(line: &[u8]) -> Result<Line, String> {
    let document: Document = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let key = one_of("key", document.key, document.key_base64)?.ok_or("no `key`")?;
    let value = one_of("value", document.value, document.value_base64)?;
    match (&value, document.deleted) {
        (None, false) => return Err("no `value`".to_owned()),
        (Some(_), true) => return Err("both a value and `deleted`".to_owned()),
        _ => {}
    }
    Ok(Line { key, value, ttl: document.ttl, version: document.version })
}

fn parse_tsv(line: &[u8]) -> Result<Line, String> {
    let mut fields = line.splitn(2, |byte| *byte == b'\t');
    let key = unescape(fields.next().unwrap_or_default())?;
    let value = unescape(fields.next().ok_or("no tab between key and value")?)?;
    Ok(Line { key, value: Some(value), ttl: None, version: None })
}

fn unescape(field: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.iter();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next() {
                Some(b't') => b'\t',
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b'\\') => b'\\',
                _ => return Err("a backslash must be followed by t, n, r or \\".to_owned()),
            },
            b'\t' => return Err("more than one tab; write \\t inside a value".to_owned()),
            byte => *byte,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json(line: &str) -> Result<Line, String> {
        Line::parse(line.as_bytes(), Format::Jsonl).map(|line| line.expect("not empty"))
    }

    proptest! {
        #[test]
        fn what_is_exported_imports_to_the_same_bytes(
            key in prop::collection::vec(any::<u8>(), 1..40),
            value in prop::option::of(prop::collection::vec(any::<u8>(), 0..40)),
            ttl in prop::option::of(0u64..1 << 40),
        ) {
            let ttl = ttl.map(|ms| Span(std::time::Duration::from_millis(ms)));
            let line = Line { key, value, ttl, version: None };
            let text = line.to_json();
            let text = text.strip_suffix('\n').unwrap();
            prop_assert!(!text.contains('\n'));
            prop_assert_eq!(json(text), Ok(line));
        }

        #[test]
        fn no_line_panics(line in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Line::parse(&line, Format::Jsonl);
            let _ = Line::parse(&line, Format::Tsv);
        }
    }

    #[test]
    fn the_documented_forms_are_read() {
        let line = json(r#"{"key":"k","value":"v","ttl":"12h"}"#).unwrap();
        assert_eq!((line.key, line.value), (b"k".to_vec(), Some(b"v".to_vec())));
        assert_eq!(line.ttl.unwrap().as_millis(), 12 * 3_600_000);
        let line = json(r#"{"key":"k","value_base64":"AP8="}"#).unwrap();
        assert_eq!(line.value, Some(vec![0, 255]));
        assert_eq!(Line::parse(b"  \r", Format::Jsonl), Ok(None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, word) in [
            ("{", "EOF"),
            (r#"{"value":"v"}"#, "no `key`"),
            (r#"{"key":"k"}"#, "no `value`"),
            (r#"{"key":"k","value":"v","value_base64":"eA=="}"#, "both"),
            (r#"{"key":"k","value_base64":"?"}"#, "base64"),
            (r#"{"key":"k","vaule":"v"}"#, "vaule"),
            (r#"{"key":"k","value":"v","ttl":5}"#, "unit"),
            (r#"{"key":"k","value":"v","deleted":true}"#, "both"),
        ] {
            let error = json(line).unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn tabs_separate_and_escapes_stand_for_what_they_say() {
        let tsv = |line: &[u8]| Line::parse(line, Format::Tsv).map(|line| line.unwrap());
        let line = tsv(b"a\\tb\tline\\nback\\\\slash \xff").unwrap();
        assert_eq!(line.key, b"a\tb");
        assert_eq!(line.value.unwrap(), b"line\nback\\slash \xff");
        for bad in [&b"no tab"[..], b"a\tb\tc", b"a\tb\\", b"a\tb\\x"] {
            assert!(tsv(bad).is_err());
        }
    }
}
