//! What a run measured: histograms, counts, a time line; as JSON, as an HDR log, as a page.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::target::Reply;

/// What kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Get.
    Read,
    /// Put.
    Write,
    /// Scan.
    Scan,
}

/// Length of one step of the time line.
const STEP: Duration = Duration::from_millis(250);

/// Latencies of one step of the time line.
#[derive(Debug)]
pub struct Step {
    /// Everything that ended in it.
    pub latency: Histogram<u64>,
}

/// Everything that one run measured.
#[derive(Debug)]
pub struct Report {
    begin: Option<Instant>,
    seconds: f64,
    /// Latencies in nanoseconds: all, reads, writes, scans.
    pub all: Histogram<u64>,
    /// Reads.
    pub reads: Histogram<u64>,
    /// Writes.
    pub writes: Histogram<u64>,
    /// Scans.
    pub scans: Histogram<u64>,
    found: u64,
    not_started: u64,
    may_be_applied: u64,
    failed: u64,
    late: u64,
    reasons: BTreeMap<String, u64>,
    user_bytes: u64,
    /// Why the run ended early, if it did.
    pub lost: Option<String>,
    /// The time line.
    pub steps: Vec<Step>,
}

/// Percentiles of one histogram, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[expect(missing_docs, reason = "named after the percentile")]
pub struct Latency {
    pub count: u64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub p9999: f64,
    pub max: f64,
    pub mean: f64,
}

/// What the server used, per operation.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Server {
    /// CPU of the server's process, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us_per_op: Option<f64>,
    /// Blocks that the engine read for a get, when the admin address is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_reads_per_get: Option<f64>,
    /// Bytes the process wrote to the disk for a byte of key and value, when it can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_write_bytes_per_user_byte: Option<f64>,
}

/// The document that `--json` prints.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names are the contract of the command line")]
pub struct Summary {
    pub target: String,
    pub workload: String,
    pub connections: usize,
    pub depth: usize,
    pub ops: u64,
    pub errors: u64,
    pub not_started: u64,
    pub may_be_applied: u64,
    /// Of `ops`, answered after the deadline.
    pub late: u64,
    pub seconds: f64,
    pub throughput_ops: f64,
    /// Answers within the deadline, a second.
    pub goodput_ops: f64,
    pub hits: f64,
    pub latency_us: Latency,
    pub reads_us: Latency,
    pub writes_us: Latency,
    pub scans_us: Latency,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wrong: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_wrong: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub reasons: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 600_000_000_000, 3).expect("bounds are valid")
}

impl Default for Report {
    fn default() -> Report {
        Report {
            begin: None,
            seconds: 0.0,
            all: histogram(),
            reads: histogram(),
            writes: histogram(),
            scans: histogram(),
            found: 0,
            not_started: 0,
            may_be_applied: 0,
            failed: 0,
            late: 0,
            reasons: BTreeMap::new(),
            user_bytes: 0,
            lost: None,
            steps: Vec::new(),
        }
    }
}

impl Report {
    /// The run begins: what was recorded before does not count.
    pub fn begin(&mut self, at: Instant) {
        *self = Report { begin: Some(at), ..Report::default() };
    }

    /// The run has ended.
    pub fn end(&mut self, at: Instant) {
        self.seconds = self.begin.map_or(0.0, |begin| (at - begin).as_secs_f64());
    }

    /// A request was answered.
    pub fn done(&mut self, kind: Kind, latency: Duration, at: Instant, found: bool) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.all.saturating_record(nanos);
        let own = match kind {
            Kind::Read => &mut self.reads,
            Kind::Write => &mut self.writes,
            Kind::Scan => &mut self.scans,
        };
        own.saturating_record(nanos);
        self.found += u64::from(found && kind == Kind::Read);
        let since = self.begin.map_or(Duration::ZERO, |begin| at.saturating_duration_since(begin));
        let step = usize::try_from(since.as_nanos() / STEP.as_nanos()).unwrap_or(0).min(100_000);
        self.step(step).latency.saturating_record(nanos);
    }

    /// A request that is also counted as done was answered after its deadline.
    pub fn late(&mut self) {
        self.late += 1;
    }

    /// A write of so many bytes of key and value was acknowledged.
    pub fn wrote(&mut self, bytes: usize) {
        self.user_bytes += bytes as u64;
    }

    /// Bytes of keys and values in acknowledged writes.
    #[must_use]
    pub fn user_bytes(&self) -> u64 {
        self.user_bytes
    }

    /// Adds what another thread measured in the same run.
    pub fn merge(&mut self, other: &Report) {
        let pairs = [
            (&mut self.all, &other.all),
            (&mut self.reads, &other.reads),
            (&mut self.writes, &other.writes),
            (&mut self.scans, &other.scans),
        ];
        for (own, others) in pairs {
            own.add(others).expect("equal bounds");
        }
        self.seconds = self.seconds.max(other.seconds);
        self.found += other.found;
        self.not_started += other.not_started;
        self.may_be_applied += other.may_be_applied;
        self.failed += other.failed;
        self.late += other.late;
        self.user_bytes += other.user_bytes;
        for (reason, count) in &other.reasons {
            *self.reasons.entry(reason.clone()).or_default() += count;
        }
        if self.lost.is_none() {
            self.lost.clone_from(&other.lost);
        }
        for (index, step) in other.steps.iter().enumerate() {
            self.step(index).latency.add(&step.latency).expect("equal bounds");
        }
    }

    fn step(&mut self, index: usize) -> &mut Step {
        while self.steps.len() <= index {
            let latency = Histogram::new_with_bounds(1000, 600_000_000_000, 2);
            self.steps.push(Step { latency: latency.expect("bounds are valid") });
        }
        &mut self.steps[index]
    }

    /// A request was not answered as asked.
    pub fn unsuccessful(&mut self, _kind: Kind, reply: &Reply<'_>) {
        let reason = match reply {
            Reply::NotStarted(reason) => {
                self.not_started += 1;
                reason
            }
            Reply::MayBeApplied(reason) => {
                self.may_be_applied += 1;
                reason
            }
            Reply::Refused(reason) => {
                self.failed += 1;
                reason
            }
            Reply::Value(_) | Reply::Absent | Reply::Written | Reply::Scanned(_) => return,
        };
        // A server could make up endless reasons: keep the first few apart.
        if self.reasons.len() < 20 || self.reasons.contains_key(reason) {
            *self.reasons.entry(reason.clone()).or_default() += 1;
        }
    }

    /// The document of this run; the caller fills in what it alone knows.
    #[must_use]
    pub fn summary(&self, target: &str, workload: &str) -> Summary {
        let ops = self.all.len();
        let rate = |count: u64| if self.seconds > 0.0 { count as f64 / self.seconds } else { 0.0 };
        Summary {
            target: target.to_owned(),
            workload: workload.to_owned(),
            connections: 0,
            depth: 0,
            ops,
            errors: self.not_started + self.may_be_applied + self.failed,
            not_started: self.not_started,
            may_be_applied: self.may_be_applied,
            late: self.late,
            seconds: self.seconds,
            throughput_ops: rate(ops),
            goodput_ops: rate(ops - self.late.min(ops)),
            hits: self.found as f64 / (self.reads.len().max(1)) as f64,
            latency_us: latency(&self.all),
            reads_us: latency(&self.reads),
            writes_us: latency(&self.writes),
            scans_us: latency(&self.scans),
            server: None,
            wrong: None,
            first_wrong: None,
            reasons: self.reasons.clone(),
            lost: self.lost.clone(),
        }
    }

    /// The percentile distribution in the text form that HdrHistogram's plotters read.
    #[must_use]
    pub fn hdr_text(&self) -> String {
        let mut text = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
        let mut count = 0;
        for value in self.all.iter_quantiles(5) {
            count += value.count_since_last_iteration();
            let quantile = value.quantile_iterated_to();
            let micros = value.value_iterated_to() as f64 / 1000.0;
            let odds = 1.0 / (1.0 - quantile);
            text.push_str(&format!("{micros:12.3} {quantile:2.12} {count:10} {odds:14.2}\n"));
        }
        text.push_str(&format!(
            "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n#[Max     = {:12.3}, Total count    = {:12}]\n",
            self.all.mean() / 1000.0,
            self.all.stdev() / 1000.0,
            self.all.max() as f64 / 1000.0,
            self.all.len()
        ));
        text
    }

    /// Seconds of one step of the time line.
    #[must_use]
    pub fn step_seconds() -> f64 {
        STEP.as_secs_f64()
    }
}

/// Percentiles of a histogram of nanoseconds, in microseconds.
#[must_use]
pub fn latency(histogram: &Histogram<u64>) -> Latency {
    if histogram.is_empty() {
        return Latency::default();
    }
    let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1000.0;
    Latency {
        count: histogram.len(),
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p999: at(0.999),
        p9999: at(0.9999),
        max: histogram.max() as f64 / 1000.0,
        mean: histogram.mean() / 1000.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a report is about wall-clock instants")]
    fn counts_and_percentiles_add_up() {
        let mut report = Report::default();
        let begin = Instant::now();
        report.begin(begin);
        for i in 1..=1000u64 {
            let at = begin + Duration::from_millis(i);
            report.done(Kind::Read, Duration::from_micros(i), at, i % 2 == 0);
        }
        report.unsuccessful(Kind::Write, &Reply::NotStarted("BUSY".to_owned()));
        report.end(begin + Duration::from_secs(1));
        let summary = report.summary("t", "get");
        assert_eq!((summary.ops, summary.errors, summary.not_started), (1000, 1, 1));
        assert!((summary.hits - 0.5).abs() < 1e-9);
        assert!((summary.latency_us.p50 - 500.0).abs() < 2.0, "{}", summary.latency_us.p50);
        assert!((summary.throughput_ops - 1000.0).abs() < 1e-6);
        assert_eq!(report.steps.len(), 5);
        assert!(report.hdr_text().contains("Total count    =         1000"));

        let mut both = Report::default();
        both.merge(&report);
        both.merge(&report);
        let summary = both.summary("t", "get");
        assert_eq!((summary.ops, summary.errors, summary.late), (2000, 2, 0));
        both.late();
        let summary = both.summary("t", "get");
        assert_eq!((summary.ops, summary.late), (2000, 1));
        assert!(summary.goodput_ops < summary.throughput_ops);
        assert_eq!(both.steps.iter().map(|step| step.latency.len()).sum::<u64>(), 2000);
    }
}
