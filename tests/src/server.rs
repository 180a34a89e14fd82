//! The real binary as a test's subject: started, asked, stopped, killed, and started again.
//!
//! Invariant: every process that is started here is ended here, by its own id, also when the test
//! panics; ports are those the system gives; data lies under the build's own directory, on a disk
//! that takes direct I/O. The binary is `ANNULUS_BIN`, or else what cargo builds beside the test.

#![expect(clippy::disallowed_methods, reason = "real processes are waited for in real time")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use annulus_net::client::{BlockingClient, BlockingNamespace, ClientOptions};
use serde_json::Value;

/// How long a server may take to be ready, or to refuse.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server that was told to stop may take; the contract.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What a server under test keeps of the disk: little, so that tests pass where a build has left
/// little. The product's default refuses new data below 1 GiB.
pub(crate) const DISK_RESERVE: &str = "4MiB";

/// The program under test.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(given) = std::env::var_os("ANNULUS_BIN") {
            let path = PathBuf::from(given);
            assert!(path.is_file(), "ANNULUS_BIN: {} is no file", path.display());
            return path;
        }
        build("annulus", "annulus")
    })
}

/// The load generator: beside the program under test, or else built as that is.
pub fn bench() -> &'static Path {
    static BENCH: OnceLock<PathBuf> = OnceLock::new();
    BENCH.get_or_init(|| match std::env::var_os("ANNULUS_BIN").map(PathBuf::from) {
        Some(given) if given.with_file_name("annulus-bench").is_file() => {
            given.with_file_name("annulus-bench")
        }
        _ => build("annulus-bench", "annulus-bench"),
    })
}

/// Builds a program beside this test.
fn build(package: &str, program: &str) -> PathBuf {
    let profile_dir = profile_dir();
    let binary = profile_dir.join(program);
    // A binary that is older than the sources would prove nothing; cargo knows which is.
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "-p", package, "--bin", program]);
    if profile_dir.file_name() == Some(OsStr::new("release")) {
        cargo.arg("--release");
    }
    cargo.arg("--target-dir").arg(profile_dir.parent().expect("target/<profile>"));
    let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
    match built {
        Ok(status) if status.success() => {}
        other => assert!(binary.is_file(), "the binary is not there to be built: {other:?}"),
    }
    binary
}

/// Runs the load generator against a server; the document that it prints.
#[must_use]
pub fn load(server: &Server, arguments: &[&str]) -> Value {
    let output = plain_command(bench())
        .args(["run", "--json", "--addr", &server.client.to_string()])
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .expect("the load generator starts");
    serde_json::from_slice(&output.stdout).expect("it prints one document")
}

/// `target/<profile>`, in which this test's executable lies.
fn profile_dir() -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its executable");
    let deps = own.parent().expect("an executable lies in a directory");
    let dir = if deps.ends_with("deps") { deps.parent().expect("target/<profile>") } else { deps };
    dir.to_owned()
}

/// A new directory for one test, on the disk on which the build lies. Gone with the value.
#[must_use]
pub fn scratch() -> tempfile::TempDir {
    let base = profile_dir().parent().expect("target").join("tmp");
    fs::create_dir_all(&base).expect("the build directory can be written");
    tempfile::Builder::new().prefix("e2e-").tempdir_in(base).expect("a new directory")
}

/// What a command came to.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("the output is text")
    }

    /// The one JSON document that standard output is.
    #[must_use]
    pub fn json(&self) -> Value {
        let text = self.text();
        assert_eq!(text.matches('\n').count(), 1, "one line: {self:?}");
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Itself, after a look at the exit code.
    #[must_use]
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "stdout {:?}, stderr {}", self.text(), self.stderr);
        self
    }
}

/// Runs the program with these arguments and this input.
pub fn annulus_with_input<S: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = S>,
    input: &[u8],
) -> Ran {
    let mut child = plain_command(binary())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let (mut stdin, input) = (child.stdin.take().expect("piped"), input.to_vec());
    // It may end before it has read everything.
    let feed = thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().expect("the program ends");
    feed.join().expect("nothing panics there");
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs the program with these arguments.
pub fn annulus<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    annulus_with_input(arguments, b"")
}

/// A command that no variable of the caller's environment configures.
pub(crate) fn plain_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ANNULUS_") {
            command.env_remove(name);
        }
    }
    command
}

/// How a server is to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    data_dir: PathBuf,
    arguments: Vec<String>,
    wrapper: Vec<String>,
}

impl Setup {
    /// A small server on this directory: two shards, little memory, small segments, so that rolls
    /// and flushes are frequent.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Setup {
        let setup = Setup::bare(data_dir);
        setup.with("memory", "256MiB").with("segment-size", "4MiB").with("memtable-size", "2MiB")
    }

    /// A server with the product's defaults, but for ports, directory and what it keeps of the disk.
    #[must_use]
    pub fn bare(data_dir: impl Into<PathBuf>) -> Setup {
        let setup = Setup { data_dir: data_dir.into(), arguments: vec![], wrapper: vec![] };
        let any = "127.0.0.1:0";
        setup
            .with("listen", any)
            .with("peer-listen", any)
            .with("admin-listen", any)
            .with("disk-reserve", DISK_RESERVE)
    }

    /// With this option; the last one of a name counts.
    #[must_use]
    pub fn with(mut self, option: &str, value: &str) -> Setup {
        let begin = format!("--{option}=");
        self.arguments.retain(|argument| !argument.starts_with(&begin));
        self.arguments.push(begin + value);
        self
    }

    /// With this option for one start.
    #[must_use]
    pub fn accepting_loss(mut self) -> Setup {
        self.arguments.push("--accept-loss".to_owned());
        self
    }

    /// Started by this command, which must replace itself by what follows.
    #[must_use]
    pub fn under(mut self, wrapper: &[&str]) -> Setup {
        self.wrapper = wrapper.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn command(&self) -> Command {
        let mut command = match self.wrapper.split_first() {
            Some((first, rest)) => {
                let mut command = plain_command(first);
                command.args(rest).arg(binary());
                command
            }
            None => plain_command(binary()),
        };
        command.arg("serve").arg("--data-dir").arg(&self.data_dir).args(&self.arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    #[track_caller]
    pub fn start(&self) -> Server {
        self.try_start().unwrap_or_else(|ran| panic!("the server did not start: {ran:?}"))
    }

    /// Starts a server that must refuse to start.
    ///
    /// # Panics
    /// When it serves.
    #[must_use]
    #[track_caller]
    pub fn refusal(&self) -> Ran {
        match self.try_start() {
            Ok(server) => panic!("it serves: {}", server.ready),
            Err(ran) => ran,
        }
    }

    /// Starts it and waits until it is ready or has ended.
    ///
    /// # Errors
    /// How it ended.
    pub fn try_start(&self) -> Result<Server, Ran> {
        let log = self.data_dir.with_extension("stderr");
        let stderr = File::options().create(true).append(true).open(&log).expect("a log file");
        let said_before = stderr.metadata().expect("a log file").len();
        let child = self.command().stdout(Stdio::piped()).stderr(stderr).spawn();
        let mut server = Server {
            child: child.expect("the program starts"),
            setup: self.clone(),
            ready: String::new(),
            client: nowhere(),
            peer: nowhere(),
            admin: nowhere(),
            shards: 0,
            log,
            said_before,
            rest_of_stdout: None,
        };
        let stdout = server.child.stdout.take().expect("piped");
        let (tell, told) = mpsc::channel();
        server.rest_of_stdout = Some(thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            // An error is an empty line, which no server says.
            let _ = stdout.read_line(&mut line);
            let _ = tell.send(line);
            let mut rest = Vec::new();
            let _ = stdout.read_to_end(&mut rest);
            rest
        }));
        let line = told.recv_timeout(START_TIMEOUT).unwrap_or_default();
        if line.starts_with("annulus ready ") {
            server.read_ready(line.trim_end());
            return Ok(server);
        }
        let status = server.wait(Duration::from_secs(10));
        let stdout = line.into_bytes();
        let code = status.and_then(|status| status.code()).unwrap_or(-1);
        Err(Ran { code, stdout, stderr: server.stderr() })
    }
}

/// Tells threads to stop when it goes, also by a panic, after which a scope waits for them.
#[derive(Debug)]
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn nowhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A server that runs. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    setup: Setup,
    /// Its ready line.
    pub ready: String,
    /// Address for clients.
    pub client: SocketAddr,
    /// Address for other nodes.
    pub peer: SocketAddr,
    /// Address for HTTP.
    pub admin: SocketAddr,
    /// Its shards.
    pub shards: u32,
    log: PathBuf,
    said_before: u64,
    rest_of_stdout: Option<thread::JoinHandle<Vec<u8>>>,
}

impl Server {
    fn read_ready(&mut self, line: &str) {
        self.ready = line.to_owned();
        let field = |name: &str| {
            let begin = format!(" {name}=");
            let at = line.find(&begin).unwrap_or_else(|| panic!("no {name} in {line}"));
            let rest = &line[at + begin.len()..];
            rest.split(' ').next().expect("split gives a part").to_owned()
        };
        let address = |name: &str| field(name).parse().expect("an address");
        (self.client, self.peer) = (address("client"), address("peer"));
        self.admin = field("admin").parse().unwrap_or_else(|_| nowhere());
        self.shards = field("shards").parse().expect("a number");
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it was started.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// What it has said on stderr since it started.
    #[must_use]
    pub fn stderr(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let from = usize::try_from(self.said_before).expect("a log fits memory").min(bytes.len());
        String::from_utf8_lossy(&bytes[from..]).into_owned()
    }

    /// A client of it.
    #[must_use]
    pub fn client(&self) -> BlockingClient {
        let options = ClientOptions {
            timeout: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(10),
            ..ClientOptions::new([self.client.to_string()])
        };
        BlockingClient::connect(options).expect("the server answers")
    }

    /// The default namespace, through a client of its own.
    #[must_use]
    pub fn namespace(&self) -> BlockingNamespace {
        self.client().namespace("default").expect("it is always there")
    }

    /// Runs a command of the command line against it.
    #[must_use]
    pub fn cli(&self, arguments: &[&str]) -> Ran {
        self.cli_with_input(arguments, b"")
    }

    /// The same with input.
    #[must_use]
    pub fn cli_with_input(&self, arguments: &[&str], input: &[u8]) -> Ran {
        let address = self.client.to_string();
        // Behind the arguments, but before values that begin like options.
        let end = arguments.iter().position(|word| *word == "--").unwrap_or(arguments.len());
        let mut all = arguments[..end].to_vec();
        all.extend(["--addr", &address, "--timeout", "20s"]);
        all.extend(&arguments[end..]);
        annulus_with_input(all, input)
    }

    /// Its counters.
    #[must_use]
    pub fn stats(&self) -> Value {
        self.cli(&["stats", "--json"]).expect_code(0).json()
    }

    /// Ends it as a power cut would end the process: at once, by SIGKILL.
    pub fn kill_nine(mut self) -> Setup {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
        self.setup.clone()
    }

    /// Tells it to stop, and gives the time that it took.
    ///
    /// # Panics
    /// When it takes longer than it may, does not exit with 0, or has said more on stdout than
    /// that it is ready.
    pub fn terminate(mut self) -> (Setup, Duration) {
        let begin = Instant::now();
        self.signal(libc::SIGTERM);
        let status = self.wait(STOP_TIMEOUT + Duration::from_secs(5));
        let took = begin.elapsed();
        let stderr = self.stderr();
        assert_eq!(status.and_then(|status| status.code()), Some(0), "stderr: {stderr}");
        assert!(took < STOP_TIMEOUT, "it took {took:?}");
        let rest = self.rest_of_stdout.take().expect("once").join().expect("it only reads");
        assert!(rest.is_empty(), "stdout: {}", String::from_utf8_lossy(&rest));
        (self.setup.clone(), took)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.pid()).expect("a process id");
        // SAFETY: a signal to our own child, which has not been waited for, so the id is its own.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0, "the child is there until it is waited for");
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + timeout;
        loop {
            match self.child.try_wait().expect("it is our child") {
                Some(status) => return Some(status),
                None if Instant::now() >= until => return None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Resident memory in bytes.
    #[must_use]
    pub fn resident(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it is listed");
        let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        kib.expect("a number of KiB") << 10
    }

    /// Open descriptors.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs").count()
    }

    /// Processor time used so far, of all its threads.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        let stat = self.proc("stat");
        let after_name = stat.rsplit_once(')').expect("the name is in brackets").1;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
        // Fields 14 and 15, counted from 1; the first two are before the bracket. 100 a second.
        Duration::from_millis((ticks(11) + ticks(12)) * 10)
    }

    fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid())).expect("it runs")
    }

    /// Asks the admin address; gives the status and the body.
    #[must_use]
    pub fn http(&self, request: &str) -> (u16, String) {
        let mut stream = std::net::TcpStream::connect(self.admin).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a time-out is set");
        // It may refuse and close before it has read everything.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
        (status, body)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // It may end by itself meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() {
            eprintln!("stderr of the server:\n{}", self.stderr());
        }
    }
}

/// Waits until something holds.
///
/// # Panics
/// When it does not in time.
#[track_caller]
pub fn eventually(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + timeout;
    while !holds() {
        assert!(Instant::now() < until, "not within {timeout:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Says that a test did not run, so that nobody takes it for a success.
pub fn skip(test: &str, why: &str) {
    // Not `eprintln!`, which the test harness would keep to itself.
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED {test}: {why}\n");
}
