//! `annulus export`: the keys of a namespace as JSON lines, in token order.
//!
//! Invariant: what it prints, `import` reads back. Concurrent values of a key are one line each.
//! A failure in the middle ends it with an error after what was printed, never silently.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use annulus_engine::model::siblings::KeyState;
use annulus_engine::model::timestamp::EPOCH_UNIX_MICROS;
use annulus_engine::model::{PartitionId, Record, TokenRange, WallMicros};
use annulus_net::client::ScanOptions;
use annulus_net::wire::{Version, scan};
use indicatif::{ProgressBar, ProgressDrawTarget};

use super::arguments::ExportArguments;
use super::lines::Line;
use super::output::{Output, finish};
use super::remote::{TIMEOUT_LONG, connect, failure};
use super::{Exit, Failure, Outcome};
use crate::units::Span;

pub(super) fn run(arguments: ExportArguments) -> Outcome {
    let client = connect(&arguments.server, TIMEOUT_LONG)?;
    let namespace = client.namespace(&arguments.namespace.ns).map_err(failure)?;
    let range = match arguments.partition {
        None => TokenRange::FULL,
        Some(partition) => {
            let bits = client.welcome().map_or(0, |welcome| u32::from(welcome.partition_bits));
            if u64::from(partition) >= 1 << bits {
                let message = format!("partition {partition} is not on a ring of {}", 1u64 << bits);
                return Err(Failure::usage(message));
            }
            PartitionId(partition).range(bits)
        }
    };
    let flags = if arguments.versions { scan::TOMBSTONES } else { 0 };
    let records = namespace.scan(ScanOptions { range, flags, ..ScanOptions::default() });
    let bar = if io::stderr().is_terminal() && !io::stdout().is_terminal() {
        let bar = ProgressBar::new_spinner();
        bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(5));
        bar
    } else {
        ProgressBar::hidden()
    };
    let mut output = Output::stdout();
    let mut count = 0u64;
    let mut failed = None;
    let printed = (|| {
        for record in records {
            let record = match record.map_err(failure) {
                Ok(record) => record,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            match lines_of(&record, now(), arguments.versions) {
                Ok(lines) => {
                    for line in lines {
                        output.write_all(line.to_json().as_bytes())?;
                        count += 1;
                    }
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
            if count.is_multiple_of(1024) {
                bar.set_message(format!("{count} keys"));
            }
        }
        Ok(())
    })();
    bar.finish_and_clear();
    finish(output, printed)?;
    failed.map_or(Ok(Exit::Success), Err)
}

#[expect(clippy::disallowed_methods, reason = "a tool compares expiry with the real clock")]
fn now() -> WallMicros {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let micros = u64::try_from(unix.as_micros()).unwrap_or(u64::MAX);
    WallMicros(micros.saturating_sub(EPOCH_UNIX_MICROS))
}

/// One line for each value that a reader would get; with versions also for deletes.
fn lines_of(record: &Record, now: WallMicros, versions: bool) -> Result<Vec<Line>, Failure> {
    let record = record.as_ref();
    let state = KeyState::of_record(&record).map_err(|error| {
        Failure::new(Exit::Unreachable, format!("the server sent a record that is none: {error}"))
    })?;
    let lines = state.siblings().iter().filter(|sibling| versions || sibling.is_live(now));
    Ok(lines
        .map(|sibling| {
            let left = sibling.expiry_ms.saturating_sub(now.as_millis());
            Line {
                key: record.key.to_vec(),
                value: sibling.is_live(now).then(|| sibling.value.to_vec()),
                ttl: (sibling.expiry_ms != 0 && left > 0)
                    .then(|| Span(Duration::from_millis(left))),
                version: versions.then(|| Version::from(sibling.version()).to_string()),
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_engine::model::{Dot, Kind, NamespaceId, OriginId, Timestamp, Token};

    fn record(kind: Kind, expiry_ms: u64) -> Record {
        Record {
            token: Token(1),
            namespace: NamespaceId(0),
            incarnation: 0,
            kind,
            dot: Dot { origin: OriginId(1), sequence: 2 },
            timestamp: Timestamp(0xabc),
            expiry_ms,
            key: b"k".to_vec(),
            value: if kind == Kind::Delete { Vec::new() } else { b"v".to_vec() },
        }
    }

    #[test]
    fn deletes_and_expired_values_appear_only_with_versions() {
        let now = WallMicros(5_000_000);
        for record in [record(Kind::Delete, 0), record(Kind::Put, 5_000)] {
            assert!(lines_of(&record, now, false).unwrap().is_empty());
            let lines = lines_of(&record, now, true).unwrap();
            assert_eq!(lines[0].value, None);
            assert_eq!(lines[0].version.as_deref(), Some("abc-2-1"));
        }
    }

    #[test]
    fn a_live_value_keeps_the_time_it_has_left() {
        let lines = lines_of(&record(Kind::Put, 8_000), WallMicros(5_000_000), false).unwrap();
        assert_eq!(lines[0].ttl.unwrap().as_millis(), 3_000);
        let lines = lines_of(&record(Kind::Put, 0), WallMicros(5_000_000), false).unwrap();
        assert_eq!((lines[0].ttl, lines[0].version.clone()), (None, None));
    }

    #[test]
    fn a_record_that_is_none_is_an_error() {
        let bad = Record { value: vec![9; 3], ..record(Kind::Siblings, 0) };
        assert!(lines_of(&bad, WallMicros(1), false).is_err());
    }
}
