//! `annulus-bench run`: a load against a server, from flags to figures.
//!
//! ```text
//! flags -> Setup (pure) -> preload -> usage -> threads: load::run each -> usage -> summary
//! ```
//!
//! Invariant: the result is all that goes to stdout; what people need to know besides goes to
//! stderr.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use annulus_net::wire::Level;
use clap::{Args, ValueEnum};
use core_affinity::CoreId;

use crate::annulus::{Levels, Plan, discover};
use crate::keys::{Distribution, Stripe};
use crate::load::{self, Load, Mix, Until};
use crate::report::{Report, Server, Summary};
use crate::resp::Resp;
use crate::usage::{self, Usage};
use crate::verify::{Book, VALUE_SIZE_MIN};

/// Requests outstanding a connection while keys are preloaded, at least.
const PRELOAD_DEPTH: usize = 16;

/// What is sent. The letters are YCSB's core workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// 50 % reads, 50 % writes, zipfian.
    A,
    /// 95 % reads, 5 % writes, zipfian.
    B,
    /// Reads only, zipfian.
    C,
    /// 95 % reads of the latest keys, 5 % inserts.
    D,
    /// 95 % scans of 1 to 100 records, 5 % inserts, zipfian.
    E,
    /// 50 % reads, 50 % read-modify-writes, zipfian.
    F,
    /// Reads only, uniform.
    Get,
    /// Writes only, uniform.
    Put,
    /// `--reads` of reads, the rest writes, uniform.
    Mixed,
}

/// Flags of `run`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  annulus-bench run --workload b --keys 1000000 --preload \
    --conns 50 --duration 10s\n\nExit codes: 0 measured, 1 a wrong value was read, 2 bad usage, 3 no \
    server, 4 every request was refused, 5 a write may have been applied without an answer.")]
pub struct RunArgs {
    /// Server, or several, separated by commas.
    #[arg(long, default_value = "127.0.0.1:7301", value_delimiter = ',')]
    addr: Vec<String>,
    /// Another kind of server: redis://HOST:PORT.
    #[arg(long, conflicts_with = "addr")]
    target: Option<String>,
    /// What is sent.
    #[arg(long, value_enum, default_value = "mixed")]
    workload: Workload,
    /// Fraction of reads of the workload `mixed`.
    #[arg(long, default_value_t = 0.95)]
    reads: f64,
    /// Keys that exist, or are to be made by --preload.
    #[arg(long, default_value_t = 100_000)]
    keys: u64,
    /// Bytes of a key.
    #[arg(long, default_value_t = 16)]
    key_size: usize,
    /// Bytes of a value, or a range, as 100-10240.
    #[arg(long, default_value = "100", value_parser = parse_sizes)]
    value_size: (usize, usize),
    /// uniform, zipf:0.99 or latest. Default: what the workload says.
    #[arg(long)]
    dist: Option<Distribution>,
    /// Connections.
    #[arg(long, default_value_t = 50)]
    conns: usize,
    /// Requests outstanding a connection.
    #[arg(long, default_value_t = 1)]
    depth: usize,
    /// Requests a second, sent when they are due whatever the server does (open loop).
    #[arg(long)]
    rate: Option<f64>,
    /// Time that each request is given, counted from when it was due. Answers within it are the
    /// goodput; what cannot be sent in time counts as not started.
    #[arg(long, value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// How long to measure.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Stop after this many requests instead.
    #[arg(long, conflicts_with = "duration")]
    ops: Option<u64>,
    /// Replicas that must have a write: a number, one, quorum or all.
    #[arg(long, value_parser = parse_level)]
    w: Option<Level>,
    /// Replicas that must answer a read.
    #[arg(long, value_parser = parse_level)]
    r: Option<Level>,
    /// Namespace.
    #[arg(long, default_value = "default")]
    ns: String,
    /// Write each key once before measuring.
    #[arg(long)]
    preload: bool,
    /// Check every value that is read. Preloads, and writes values of at least 16 bytes.
    #[arg(long)]
    verify: bool,
    /// Ask each connection's server for one shard, and send it that shard's keys.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    shard_aware: bool,
    /// Cores of the load's threads, as 1,2 or 4-7: one thread each. Default: one, not pinned.
    #[arg(long, value_parser = parse_cores)]
    cores: Option<Cores>,
    /// Never sleep while waiting for replies.
    #[arg(long)]
    spin: bool,
    /// Seed of everything that is drawn.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The server's process on this host: tells its CPU and the bytes it wrote.
    #[arg(long)]
    server_pid: Option<u32>,
    /// The server's admin address: tells its CPU, disk reads and disk writes.
    #[arg(long)]
    admin: Option<String>,
    /// Write the latency percentiles here, as HdrHistogram's plotters read them.
    #[arg(long)]
    hdr: Option<PathBuf>,
    /// Write a page with plots here.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Core numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(pub Vec<usize>);

fn parse_sizes(text: &str) -> Result<(usize, usize), String> {
    let number = |part: &str| {
        part.trim().parse::<usize>().map_err(|_| format!("{text}: must be as 100 or 100-10240"))
    };
    let (least, most) = match text.split_once('-') {
        Some((least, most)) => (number(least)?, number(most)?),
        None => (number(text)?, number(text)?),
    };
    let order = || format!("{text}: the first size is above the second");
    (least <= most).then_some((least, most)).ok_or_else(order)
}

fn parse_level(text: &str) -> Result<Level, String> {
    match text {
        "one" => Ok(Level::ONE),
        "quorum" => Ok(Level::Quorum),
        "all" => Ok(Level::All),
        _ => match text.parse::<u8>() {
            Ok(count @ 1..=63) => Ok(Level::Count(count)),
            _ => Err(format!("{text}: must be 1 to 63, one, quorum or all")),
        },
    }
}

fn parse_cores(text: &str) -> Result<Cores, String> {
    let number = |part: &str| {
        part.trim().parse::<usize>().map_err(|_| format!("{text}: must be as 1,2 or 4-7"))
    };
    let mut cores = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            Some((first, last)) => cores.extend(number(first)?..=number(last)?),
            None => cores.push(number(part)?),
        }
    }
    if cores.is_empty() { Err(format!("{text}: names no core")) } else { Ok(Cores(cores)) }
}

impl Workload {
    fn mix(self, reads: f64) -> Mix {
        let none = Mix { reads: 0.0, scans: 0.0, inserts: 0.0, read_modify_writes: 0.0 };
        match self {
            Workload::A => Mix { reads: 0.5, ..none },
            Workload::B => Mix { reads: 0.95, ..none },
            Workload::C | Workload::Get => Mix { reads: 1.0, ..none },
            Workload::D => Mix { reads: 0.95, inserts: 0.05, ..none },
            Workload::E => Mix { scans: 0.95, inserts: 0.05, ..none },
            Workload::F => Mix { reads: 0.5, read_modify_writes: 0.5, ..none },
            Workload::Put => none,
            Workload::Mixed => Mix { reads, ..none },
        }
    }

    fn distribution(self) -> Distribution {
        match self {
            Workload::A | Workload::B | Workload::C | Workload::E | Workload::F => {
                Distribution::Zipf(0.99)
            }
            Workload::D => Distribution::Latest,
            Workload::Get | Workload::Put | Workload::Mixed => Distribution::Uniform,
        }
    }
}

/// What is driven.
#[derive(Clone, Debug)]
enum Driven {
    Annulus(Plan),
    Redis,
}

/// Why there is no result, and the exit code that says so.
#[derive(Debug)]
pub struct Failed {
    /// For people.
    pub message: String,
    /// 2 or 3.
    pub code: u8,
}

fn usage_error(message: impl Into<String>) -> Failed {
    Failed { message: message.into(), code: 2 }
}

impl Failed {
    fn of(error: &io::Error, what: &str) -> Failed {
        let code = if error.kind() == io::ErrorKind::InvalidInput { 2 } else { 3 };
        Failed { message: format!("{what}: {error}"), code }
    }
}

/// Measures, prints, and says how it went.
#[must_use]
pub fn main(args: &RunArgs) -> ExitCode {
    match measure(args) {
        Ok(summary) => ExitCode::from(exit_code(&summary)),
        Err(failed) => {
            eprintln!("annulus-bench: {}", failed.message);
            ExitCode::from(failed.code)
        }
    }
}

fn exit_code(summary: &Summary) -> u8 {
    if summary.wrong.is_some_and(|wrong| wrong > 0) {
        1
    } else if summary.may_be_applied > 0 {
        5
    } else if summary.lost.is_some() {
        3
    } else if summary.ops == 0 && summary.errors > 0 {
        4
    } else {
        0
    }
}

fn check(args: &RunArgs) -> Result<(), Failed> {
    let outstanding = (args.conns * args.depth) as u64;
    let rules = [
        (args.conns > 0 && args.depth > 0, "--conns and --depth must be at least 1".to_owned()),
        (args.keys > 0, "--keys must be at least 1".to_owned()),
        (
            (1..=4096).contains(&args.key_size) && key_size_fits(args),
            format!(
                "--key-size {} must be at most 4096 and hold the digits of --keys",
                args.key_size
            ),
        ),
        ((0.0..=1.0).contains(&args.reads), "--reads must be between 0 and 1".to_owned()),
        (args.rate.is_none_or(|rate| rate > 0.0), "--rate must be above 0".to_owned()),
        (
            args.deadline.is_none_or(|time| (1..=3_600_000).contains(&time.as_millis())),
            "--deadline must be 1ms to 1h".to_owned(),
        ),
        (
            !args.verify || args.keys >= 4 * outstanding,
            format!("--verify needs at least {} keys here, four a request outstanding", {
                4 * outstanding
            }),
        ),
        (threads(args) <= args.conns, "--cores names more cores than there are --conns".to_owned()),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(usage_error(rule)),
        None => Ok(()),
    }
}

/// Keys are digits; inserts may double their number.
fn key_size_fits(args: &RunArgs) -> bool {
    let digits = (2 * args.keys).to_string().len();
    args.key_size >= digits + usize::from(args.key_size > 8)
}

fn threads(args: &RunArgs) -> usize {
    args.cores.as_ref().map_or(1, |cores| cores.0.len())
}

fn resolve(text: &str) -> Result<SocketAddr, Failed> {
    let found = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| usage_error(format!("{text}: not a host and port")))
}

/// The servers, and how to speak with them.
fn find(args: &RunArgs) -> Result<(Vec<SocketAddr>, Driven, String), Failed> {
    if let Some(target) = &args.target {
        let Some(address) = target.strip_prefix("redis://") else {
            return Err(usage_error(format!("{target}: must be as redis://127.0.0.1:6379")));
        };
        if args.workload == Workload::E {
            return Err(usage_error("workload e scans, which a redis server cannot"));
        }
        let address = address.trim_end_matches('/');
        return Ok((vec![resolve(address)?], Driven::Redis, target.clone()));
    }
    let addresses = args.addr.iter().map(|text| resolve(text)).collect::<Result<Vec<_>, _>>()?;
    let welcome = discover(addresses[0]).map_err(|error| Failed::of(&error, &args.addr[0]))?;
    let levels = Levels {
        namespace: args.ns.clone(),
        read: args.r.unwrap_or_default(),
        write: args.w.unwrap_or_default(),
    };
    let each = args.conns / threads(args);
    let by_shard = args.shard_aware && addresses.len() == 1 && each >= welcome.shard_count as usize;
    let plan = Plan::new(&welcome, &levels, by_shard).map_err(usage_error)?;
    Ok((addresses, Driven::Annulus(plan), format!("annulus://{}", args.addr.join(","))))
}

/// The load of one thread.
fn loads(args: &RunArgs, addresses: &[SocketAddr]) -> Vec<Load> {
    let count = threads(args);
    let mix = args.workload.mix(args.reads);
    // Threads that insert or check must not meet; others share the keys, as clients do.
    let apart = args.verify || mix.inserts > 0.0;
    let share = |total: usize, index: usize| total / count + usize::from(index < total % count);
    let of = |index: usize| {
        let stripe =
            if apart { Stripe { index: index as u64, count: count as u64 } } else { Stripe::WHOLE };
        let until = match args.ops {
            None => Until::Elapsed(args.duration),
            Some(ops) => Until::Sent({
                let own = Stripe { index: index as u64, count: count as u64 };
                own.keys(ops)
            }),
        };
        Load {
            addresses: addresses.to_vec(),
            mix,
            distribution: args.dist.unwrap_or(args.workload.distribution()),
            keys: stripe.keys(args.keys),
            stripe,
            key_size: args.key_size,
            value_size: args.value_size,
            connections: share(args.conns, index),
            depth: args.depth,
            rate: args.rate.map(|rate| rate / count as f64),
            deadline: args.deadline,
            until,
            sequential: false,
            spin: args.spin,
            seed: args.seed.wrapping_mul(1000).wrapping_add(index as u64),
        }
    };
    (0..count).map(of).collect()
}

/// The load that writes each key once.
fn preloading(load: &Load, args: &RunArgs, index: usize) -> Load {
    let stripe = Stripe { index: index as u64, count: threads(args) as u64 };
    Load {
        keys: stripe.keys(args.keys),
        stripe,
        sequential: true,
        until: Until::Sent(stripe.keys(args.keys)),
        depth: load.depth.max(PRELOAD_DEPTH),
        rate: None,
        deadline: None,
        seed: !load.seed,
        ..load.clone()
    }
}

/// Runs one load on each thread and adds up what they measured. A book goes with its thread.
fn run_all(
    loads: &[Load],
    driven: &Driven,
    cores: Option<&Cores>,
    books: &mut [Option<Book>],
) -> io::Result<Report> {
    let one = |index: usize, book: Option<&mut Book>| -> io::Result<Report> {
        if let Some(&id) = cores.and_then(|cores| cores.0.get(index))
            && !core_affinity::set_for_current(CoreId { id })
        {
            eprintln!("annulus-bench: could not pin a thread to core {id}");
        }
        let mut report = Report::default();
        let load = &loads[index];
        match driven {
            Driven::Annulus(plan) => load::run(load, |i| plan.connect(i), &mut report, book)?,
            Driven::Redis => load::run(load, |_| Resp::default(), &mut report, book)?,
        }
        Ok(report)
    };
    let parts = std::thread::scope(|scope| {
        let one = &one;
        // Collected before the first join, so that all run at once.
        let threads: Vec<_> = books
            .iter_mut()
            .enumerate()
            .map(|(index, book)| scope.spawn(move || one(index, book.as_mut())))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a load thread does not panic"))
            .collect::<io::Result<Vec<_>>>()
    })?;
    let mut sum = Report::default();
    parts.iter().for_each(|part| sum.merge(part));
    Ok(sum)
}

/// Running totals of the server, from its process and its admin address.
fn usage(args: &RunArgs, admin: Option<SocketAddr>) -> Usage {
    let mut found = args.server_pid.map(usage::of_process).unwrap_or_default();
    if let Some(admin) = admin {
        match usage::fetch_metrics(admin) {
            Ok(text) => found.add_metrics(&text, args.server_pid.is_none()),
            Err(error) => eprintln!("annulus-bench: {admin}: {error}"),
        }
    }
    found
}

/// What the server used between two moments, for what was done in between.
fn server_figures(before: &Usage, after: &Usage, report: &Report) -> Server {
    let per = |used: f64, count: u64| (count > 0 && used >= 0.0).then(|| used / count as f64);
    let between = |pick: fn(&Usage) -> Option<f64>| Some(pick(after)? - pick(before)?);
    let gets = report.reads.len();
    Server {
        cpu_us_per_op: between(|usage| usage.cpu_us).and_then(|cpu| per(cpu, report.all.len())),
        disk_reads_per_get: between(|usage| usage.blocks_read).and_then(|reads| per(reads, gets)),
        disk_write_bytes_per_user_byte: between(|usage| usage.written_bytes)
            .and_then(|bytes| per(bytes, report.user_bytes())),
    }
}

fn measure(args: &RunArgs) -> Result<Summary, Failed> {
    check(args)?;
    let admin = args.admin.as_deref().map(resolve).transpose()?;
    let (addresses, driven, name) = find(args)?;
    let loads = loads(args, &addresses);
    let mut books: Vec<Option<Book>> =
        loads.iter().map(|load| args.verify.then(|| Book::new(load.stripe, load.keys))).collect();
    if args.verify && args.value_size.0 < VALUE_SIZE_MIN {
        eprintln!("annulus-bench: --verify writes values of at least {VALUE_SIZE_MIN} bytes");
    }
    if args.preload || args.verify {
        preload(args, &loads, &driven, &mut books)?;
    }
    let before = usage(args, admin);
    let report = run_all(&loads, &driven, args.cores.as_ref(), &mut books)
        .map_err(|error| Failed::of(&error, &name))?;
    let after = usage(args, admin);

    let workload = args
        .workload
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned());
    let mut summary = report.summary(&name, &workload);
    summary.connections = args.conns;
    summary.depth = args.depth;
    if args.server_pid.is_some() || admin.is_some() {
        summary.server = Some(server_figures(&before, &after, &report));
    }
    for book in books.iter().flatten() {
        let (wrong, first) = book.verdict();
        summary.wrong = Some(summary.wrong.unwrap_or(0) + wrong);
        if summary.first_wrong.is_none() {
            summary.first_wrong = first.map(str::to_owned);
        }
    }
    write_files(args, &report, &summary)?;
    if args.json {
        println!("{}", serde_json::to_string(&summary).expect("a summary is plain data"));
    } else {
        print!("{}", table(&summary));
    }
    Ok(summary)
}

fn preload(
    args: &RunArgs,
    loads: &[Load],
    driven: &Driven,
    books: &mut [Option<Book>],
) -> Result<(), Failed> {
    let loads: Vec<Load> =
        loads.iter().enumerate().map(|(i, load)| preloading(load, args, i)).collect();
    let report = run_all(&loads, driven, args.cores.as_ref(), books)
        .map_err(|error| Failed::of(&error, "preload"))?;
    let summary = report.summary("", "");
    if let Some(lost) = summary.lost {
        return Err(Failed { message: format!("preload: {lost}"), code: 3 });
    }
    eprintln!(
        "annulus-bench: preloaded {} keys in {:.1} s, {:.0} a second, {} errors{}",
        summary.ops,
        summary.seconds,
        summary.throughput_ops,
        summary.errors,
        summary.reasons.keys().next().map(|reason| format!(" ({reason})")).unwrap_or_default()
    );
    if summary.errors > 0 {
        return Err(Failed { message: "preload: not every key was written".to_owned(), code: 4 });
    }
    Ok(())
}

fn write_files(args: &RunArgs, report: &Report, summary: &Summary) -> Result<(), Failed> {
    let files = [
        (&args.hdr, args.hdr.is_some().then(|| report.hdr_text())),
        (&args.html, args.html.is_some().then(|| crate::page::render(report, summary))),
    ];
    for (path, text) in files {
        if let (Some(path), Some(text)) = (path, text) {
            std::fs::write(path, text)
                .map_err(|error| usage_error(format!("{}: {error}", path.display())))?;
        }
    }
    Ok(())
}

/// The result for people.
fn table(summary: &Summary) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut line = |args: std::fmt::Arguments<'_>| {
        writeln!(text, "{args}").expect("a string takes all");
    };
    line(format_args!(
        "{} on {}: {} connections, depth {}",
        summary.workload, summary.target, summary.connections, summary.depth
    ));
    line(format_args!(
        "{} operations in {:.2} s: {:.0} a second; {} errors ({} not started, {} may be applied)",
        summary.ops,
        summary.seconds,
        summary.throughput_ops,
        summary.errors,
        summary.not_started,
        summary.may_be_applied
    ));
    if summary.late > 0 || summary.goodput_ops < summary.throughput_ops {
        line(format_args!(
            "{} answers came after their deadline; in time: {:.0} a second",
            summary.late, summary.goodput_ops
        ));
    }
    line(format_args!(
        "{:8} {:>12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "us", "count", "mean", "p50", "p90", "p99", "p99.9", "p99.99", "max"
    ));
    let rows = [
        ("all", &summary.latency_us),
        ("reads", &summary.reads_us),
        ("writes", &summary.writes_us),
        ("scans", &summary.scans_us),
    ];
    for (name, row) in rows {
        if row.count > 0 {
            line(format_args!(
                "{name:8} {:>12} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1}",
                row.count, row.mean, row.p50, row.p90, row.p99, row.p999, row.p9999, row.max
            ));
        }
    }
    if summary.reads_us.count > 0 {
        line(format_args!("reads that found a value: {:.2} %", summary.hits * 100.0));
    }
    if let Some(server) = &summary.server {
        let figures = [
            ("CPU", server.cpu_us_per_op, "us an operation"),
            ("disk reads", server.disk_reads_per_get, "a get"),
            ("disk writes", server.disk_write_bytes_per_user_byte, "bytes a byte of key and value"),
        ];
        for (name, figure, unit) in figures {
            if let Some(figure) = figure {
                line(format_args!("server {name}: {figure:.3} {unit}"));
            }
        }
    }
    if let Some(wrong) = summary.wrong {
        let first = summary.first_wrong.as_deref().unwrap_or("every value is as written");
        line(format_args!("wrong values: {wrong} ({first})"));
    }
    for (reason, count) in &summary.reasons {
        line(format_args!("{count} times: {reason}"));
    }
    if let Some(lost) = &summary.lost {
        line(format_args!("the run ended early: {lost}"));
    }
    text
}

#[cfg(test)]
mod tests;
