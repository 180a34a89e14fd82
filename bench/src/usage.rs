//! What the measured process used, read from `/proc` and from the admin address.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Running totals of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU of all its threads, in microseconds.
    pub cpu_us: Option<f64>,
    /// Bytes it caused to be written to the disk.
    pub written_bytes: Option<f64>,
    /// Blocks that the engine read for gets, from the metrics.
    pub blocks_read: Option<f64>,
}

/// Reads a process's totals. A process that is not there has none.
#[must_use]
pub fn of_process(pid: u32) -> Usage {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let nanos = threads.ok().map(|threads| {
        threads
            .flatten()
            .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
            .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .sum::<u64>()
    });
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Usage {
        cpu_us: nanos.map(|nanos| nanos as f64 / 1000.0),
        written_bytes: written.and_then(|text| text.trim().parse().ok()),
        blocks_read: None,
    }
}

impl Usage {
    /// Adds what a server's metrics say. Its CPU only when asked: the kernel's own count of the
    /// process is finer.
    pub fn add_metrics(&mut self, text: &str, cpu: bool) {
        self.blocks_read = metric(text, "annulus_device_reads_total");
        let writes = ["log", "flush", "compaction"]
            .map(|kind| metric(text, &format!("annulus_{kind}_write_bytes_total")));
        if let [Some(log), Some(flush), Some(compaction)] = writes {
            self.written_bytes = Some(log + flush + compaction);
        }
        if cpu {
            self.cpu_us =
                metric(text, "annulus_process_cpu_seconds_total").map(|seconds| seconds * 1e6);
        }
    }
}

/// Sums a metric over its labels, from Prometheus text.
#[must_use]
pub fn metric(text: &str, name: &str) -> Option<f64> {
    let mut values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.as_bytes().first()? {
            b' ' => rest,
            b'{' => rest.rsplit_once('}')?.1,
            _ => return None,
        };
        value.trim().parse::<f64>().ok()
    });
    let first = values.next()?;
    Some(first + values.sum::<f64>())
}

/// Fetches `/metrics` from an admin address.
///
/// # Errors
/// Connecting or reading fails, or the answer is no success.
pub fn fetch_metrics(admin: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(16 << 20).read_to_string(&mut answer)?;
    if !answer.starts_with("HTTP/1.1 200") {
        let line = answer.lines().next().unwrap_or("nothing").to_owned();
        return Err(io::Error::other(format!("GET /metrics answered: {line}")));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_summed_over_its_labels_and_not_confused_with_longer_names() {
        let text = "a_total{shard=\"0\"} 2\na_total{shard=\"1\"} 3.5\na_total_more 100\nb 7\n";
        assert_eq!(metric(text, "a_total"), Some(5.5));
        assert_eq!(metric(text, "b"), Some(7.0));
        assert_eq!(metric(text, "c"), None);
    }

    #[test]
    fn a_server_tells_its_disk_and_cpu() {
        let text = "annulus_device_reads_total{shard=\"0\"} 2\nannulus_log_write_bytes_total 3\n\
            annulus_flush_write_bytes_total 4\nannulus_compaction_write_bytes_total 5\n\
            annulus_process_cpu_seconds_total 0.5\n";
        let mut usage = Usage::default();
        usage.add_metrics(text, true);
        assert_eq!((usage.blocks_read, usage.written_bytes), (Some(2.0), Some(12.0)));
        assert_eq!(usage.cpu_us, Some(500_000.0));
    }

    #[test]
    fn this_process_has_used_some_cpu() {
        let mut x = 1u64;
        for i in 0..3_000_000u64 {
            x = x.wrapping_mul(i | 1);
        }
        assert!(of_process(std::process::id()).cpu_us > Some(0.0), "{x}");
    }
}
