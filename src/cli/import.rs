//! `annulus import`: many keys from lines of a file, pipelined.
//!
//! Invariant: every line is counted once, as written or as failed, and named on stderr with its
//! number when it failed (the first [`COMPLAINTS_MAX`] are). A bad line stops nothing unless
//! `--strict`; a server that is gone stops everything. To a server that is busy less is sent at a
//! time; what it has refused for that is written again, with pauses, for at most [`PATIENCE`] a
//! line.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::time::{Duration, Instant};

use annulus_engine::model::limits::{KEY_SIZE_MAX, VALUE_SIZE_CEILING};
use annulus_net::client::{Error, Pipeline, WriteOptions, Written};
use annulus_net::wire::Status;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::arguments::{Format, ImportArguments};
use super::data::ttl;
use super::lines::Line;
use super::output::{Output, complain, finish};
use super::remote::{TIMEOUT_LONG, connect_to_namespace, exit_of};
use super::{Exit, Failure, Outcome};

/// Most writes under way at a time.
const DEPTH_MAX: usize = 256;
/// So many are under way to the busiest server.
const DEPTH_MIN: usize = 8;
/// Longest line: a value of the greatest size, as base64 or escaped, with its key.
const LINE_SIZE_MAX: u64 = 6 * (VALUE_SIZE_CEILING + KEY_SIZE_MAX) as u64;
/// How long a busy server is waited for with one line.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause before a line is written again.
const PAUSE: Duration = Duration::from_millis(20);
/// Failed lines that are named.
const COMPLAINTS_MAX: u64 = 20;

pub(super) fn run(arguments: ImportArguments) -> Outcome {
    let from_stdin = arguments.file.as_os_str() == "-";
    let by_name = match arguments.file.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("tsv") => Format::Tsv,
        _ => Format::Jsonl,
    };
    let (input, size): (Box<dyn Read>, Option<u64>) = if from_stdin {
        (Box::new(io::stdin()), None)
    } else {
        let path = &arguments.file;
        let file = File::open(path)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))?;
        let size = file.metadata().ok().map(|meta| meta.len());
        (Box::new(file), size)
    };
    let namespace = connect_to_namespace(&arguments.server, &arguments.namespace, TIMEOUT_LONG)?;
    let mut import = Import {
        tally: Tally::default(),
        pipeline: namespace.pipeline(DEPTH_MAX),
        under_way: 0,
        depth: DEPTH_MAX,
        answered: 0,
        again: VecDeque::new(),
        pace: arguments.rate.map(Pace::new),
        bar: progress(size),
        strict: arguments.strict,
        format: arguments.format.unwrap_or(by_name),
    };
    #[expect(clippy::disallowed_methods, reason = "the summary says how long it took")]
    let begin = Instant::now();
    let ended = import.read(BufReader::with_capacity(1 << 20, input));
    while import.under_way > 0 || !import.again.is_empty() {
        import.send_again();
        import.finish_one();
    }
    import.bar.finish_and_clear();
    let seconds = begin.elapsed().as_secs_f64();
    let tally = import.tally;
    if tally.failed > COMPLAINTS_MAX {
        complain(&format!("{} more lines failed", tally.failed - COMPLAINTS_MAX));
    }
    let mut output = Output::stdout();
    let document = json!({ "written": tally.written, "failed": tally.failed, "seconds": seconds });
    let printed = output.json(&document);
    finish(output, printed)?;
    ended?;
    Ok(tally.exit())
}

fn progress(size: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match size {
        Some(size) => (
            ProgressBar::new(size),
            "{wide_bar} {bytes}/{total_bytes} {msg} {binary_bytes_per_sec} {eta}",
        ),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes} {msg} {binary_bytes_per_sec}"),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(5));
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

struct Import {
    tally: Tally,
    pipeline: Pipeline<Sent>,
    /// Writes that the pipeline has.
    under_way: usize,
    /// How many it may have: halved when the server is busy, one more for each such number of
    /// answers.
    depth: usize,
    answered: usize,
    /// Lines that a busy server has refused, the oldest first.
    again: VecDeque<Sent>,
    pace: Option<Pace>,
    bar: ProgressBar,
    strict: bool,
    format: Format,
}

impl Import {
    fn read(&mut self, mut input: impl BufRead) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        for number in 1u64.. {
            bytes.clear();
            let read = (&mut input).take(LINE_SIZE_MAX).read_until(b'\n', &mut bytes);
            let len = read.map_err(|error| Failure::usage(format!("cannot read on: {error}")))?;
            if len == 0 {
                break;
            }
            self.bar.inc(len as u64);
            if bytes.last() == Some(&b'\n') {
                bytes.pop();
            } else if len as u64 == LINE_SIZE_MAX {
                return Err(Failure::usage(format!("line {number} is too long")));
            }
            match Line::parse(&bytes, self.format).and_then(|line| line.map(check).transpose()) {
                Ok(None) => {}
                Ok(Some(line)) => self.write(number, line),
                Err(error) => {
                    self.tally.fail(number, Exit::Usage, &error);
                    if self.strict {
                        return Err(Failure::usage("stopped at the first bad line (--strict)"));
                    }
                }
            }
            if self.tally.exits.contains(&Exit::Unreachable) {
                return Err(Failure::new(Exit::Unreachable, "the server is gone"));
            }
        }
        Ok(())
    }

    fn write(&mut self, number: u64, line: Line) {
        if let Some(pace) = &mut self.pace {
            pace.wait();
        }
        self.send(Sent { number, line, first_refused: None, due: None });
        self.send_again();
        self.bar.set_message(format!("{} keys", self.tally.written));
    }

    fn send(&mut self, sent: Sent) {
        while self.under_way >= self.depth {
            self.finish_one();
        }
        let options = WriteOptions { ttl: ttl(sent.line.ttl), ..WriteOptions::default() };
        let key = sent.line.key.clone();
        let finished = match sent.line.value.clone() {
            Some(value) => self.pipeline.put(sent, key, value, options),
            None => self.pipeline.delete(sent, key, options),
        };
        self.under_way += 1;
        if let Some((sent, result)) = finished {
            self.finished(sent, result);
        }
    }

    /// Sends what was refused and has paused; waits for the pauses when nothing else can be done.
    #[expect(clippy::disallowed_methods, reason = "a tool may sleep; no shard runs here")]
    fn send_again(&mut self) {
        while let Some(due) = self.again.front().and_then(|sent| sent.due) {
            let pause = due.saturating_duration_since(Instant::now());
            if !pause.is_zero() {
                if self.under_way > 0 && self.again.len() < self.depth {
                    return;
                }
                std::thread::sleep(pause);
            }
            if let Some(sent) = self.again.pop_front() {
                self.send(sent);
            }
        }
    }

    fn finish_one(&mut self) {
        if let Some((sent, result)) = self.pipeline.finish_one() {
            self.finished(sent, result);
        }
    }

    /// Counts a line's result; with a busy server only after it has been tried long enough.
    #[expect(clippy::disallowed_methods, reason = "a tool's patience follows the real clock")]
    fn finished(&mut self, mut sent: Sent, result: Result<Written, Error>) {
        self.under_way -= 1;
        if let Err(Error::NotStarted { status: Status::BUSY, retry_after, .. }) = &result {
            let now = Instant::now();
            let first = *sent.first_refused.get_or_insert(now);
            if now.duration_since(first) < PATIENCE {
                // What was sent together is refused together, and halves it once.
                if self.again.is_empty() {
                    self.depth = (self.depth / 2).max(DEPTH_MIN);
                }
                sent.due = Some(now + PAUSE.max(*retry_after));
                return self.again.push_back(sent);
            }
        }
        self.answered += 1;
        if self.answered >= self.depth {
            self.answered = 0;
            self.depth = (self.depth + 1).min(DEPTH_MAX);
        }
        self.tally.count(sent.number, result);
    }
}

/// A line under way.
struct Sent {
    number: u64,
    line: Line,
    /// When a busy server refused it for the first time.
    first_refused: Option<Instant>,
    /// When it may be sent again.
    due: Option<Instant>,
}

fn check(line: Line) -> Result<Line, String> {
    if (1..=KEY_SIZE_MAX).contains(&line.key.len()) {
        return Ok(line);
    }
    Err(format!("a key has 1 to {KEY_SIZE_MAX} bytes, this one {}", line.key.len()))
}

/// What became of the lines.
#[derive(Debug, Default)]
struct Tally {
    written: u64,
    failed: u64,
    /// Which ways of failing there were.
    exits: std::collections::BTreeSet<Exit>,
}

impl Tally {
    fn count(&mut self, line: u64, result: Result<Written, Error>) {
        match result {
            Ok(_) => self.written += 1,
            Err(error) => self.fail(line, exit_of(&error), &error.to_string()),
        }
    }

    fn fail(&mut self, line: u64, exit: Exit, why: &str) {
        self.failed += 1;
        self.exits.insert(exit);
        if self.failed <= COMPLAINTS_MAX {
            complain(&format!("line {line}: {why}"));
        }
    }

    /// The worst for whoever must decide what to do next: doubt, then no server, then refusal.
    fn exit(&self) -> Exit {
        let order = [Exit::MayBeApplied, Exit::Unreachable, Exit::NotStarted, Exit::Usage];
        let worst = order.into_iter().find(|exit| self.exits.contains(exit));
        worst.unwrap_or(if self.failed > 0 { Exit::Negative } else { Exit::Success })
    }
}

/// Keeps writes to a rate.
struct Pace {
    interval: Duration,
    next: Instant,
}

impl Pace {
    #[expect(clippy::disallowed_methods, reason = "a tool's pace follows the real clock")]
    fn new(rate: u64) -> Pace {
        Pace {
            interval: Duration::from_secs(1) / u32::try_from(rate).unwrap_or(u32::MAX),
            next: Instant::now(),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a tool may sleep; no shard runs here")]
    fn wait(&mut self) {
        let now = Instant::now();
        if self.next > now {
            std::thread::sleep(self.next - now);
        }
        // Time lost is not made up for by a burst of more than a tenth of a second.
        let earliest = now.checked_sub(Duration::from_millis(100)).unwrap_or(now);
        self.next = self.next.max(earliest) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_failure_decides_the_exit_code() {
        let mut tally = Tally::default();
        assert_eq!(tally.exit(), Exit::Success);
        tally.fail(1, Exit::Usage, "bad");
        assert_eq!(tally.exit(), Exit::Usage);
        tally.count(2, Err(Error::NoNamespace { name: "x".into() }));
        assert_eq!(tally.exit(), Exit::NotStarted);
        tally.fail(3, Exit::MayBeApplied, "doubt");
        tally.count(4, Ok(Written::default()));
        assert_eq!((tally.exit(), tally.written, tally.failed), (Exit::MayBeApplied, 1, 3));
    }
}
