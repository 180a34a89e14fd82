//! Several real nodes as a test's subject: `annulus dev` with its processes, told to stop and
//! start, killed, paused and compared.
//!
//! Invariant: every process is ended here, also when the test panics; the ports were free when
//! they were chosen, and others are chosen when somebody was faster.

#![expect(clippy::disallowed_methods, reason = "real processes are waited for in real time")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use annulus_net::client::{BlockingClient, BlockingNamespace, ClientOptions};

use crate::server::{
    DISK_RESERVE, Ran, annulus, annulus_with_input, binary, eventually, plain_command,
};

/// How long a cluster may take to be ready.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Ports from one node of `annulus dev` to the next.
const PORT_STEP: u16 = 10;

/// So many free ports on loopback, `step` apart, outside the range from which the system gives.
#[must_use]
pub fn free_ports(count: u16, step: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let own = u16::try_from(std::process::id() % 120).expect("below 120") * 100;
    for _ in 0..1_000 {
        let turn = NEXT.fetch_add(count * step, Ordering::Relaxed);
        let base = 20_000 + (own + turn) % 12_000;
        let is_free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        let all = (0..count).all(|at| (0..3).all(|more| is_free(base + at * step + more)));
        if all {
            return base;
        }
    }
    panic!("no free ports");
}

/// `annulus dev` and its nodes, which count from 1. Killed when dropped.
#[derive(Debug)]
pub struct Nodes {
    keeper: Child,
    dir: PathBuf,
    base: u16,
    count: u16,
}

impl Nodes {
    /// Starts so many nodes in this directory, and waits until all are ready.
    ///
    /// # Panics
    /// When they are not.
    #[must_use]
    pub fn start(dir: &Path, count: u16) -> Nodes {
        for _ in 0..5 {
            let base = free_ports(count, PORT_STEP);
            if let Some(nodes) = Nodes::try_start(dir, count, base) {
                return nodes;
            }
        }
        panic!("the cluster did not start: {:?}", fs::read_to_string(dir.join("node-1.log")));
    }

    fn try_start(dir: &Path, count: u16, base: u16) -> Option<Nodes> {
        let mut command = plain_command(binary());
        command.args(["dev", "--nodes", &count.to_string(), "--base-port", &base.to_string()]);
        command.arg("--data-dir").arg(dir).arg("--");
        command.args(["--segment-size=4MiB", "--memtable-size=2MiB", "--partition-bits=8"]);
        command.args(["--disk-reserve", DISK_RESERVE]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut keeper = command.spawn().expect("the program starts");
        let stdout = keeper.stdout.take().expect("piped");
        let nodes = Nodes { keeper, dir: dir.to_owned(), base, count };
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The test may have ended.
                let _ = tell.send(line);
            }
        });
        let until = Instant::now() + START_TIMEOUT;
        loop {
            match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line == format!("cluster ready nodes={count}") => return Some(nodes),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// Address for clients of a node.
    #[must_use]
    pub fn client_address(&self, node: u16) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.base + (node - 1) * PORT_STEP))
    }

    /// A client of one node.
    #[must_use]
    pub fn namespace(&self, node: u16, name: &str) -> BlockingNamespace {
        let options = ClientOptions {
            timeout: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(10),
            ..ClientOptions::new([self.client_address(node).to_string()])
        };
        let client = BlockingClient::connect(options).expect("the node answers");
        client.namespace(name).expect("the namespace is there")
    }

    /// Runs a command of the command line against one node.
    #[must_use]
    pub fn cli(&self, node: u16, arguments: &[&str]) -> Ran {
        self.cli_with_input(node, arguments, b"")
    }

    /// The same with input.
    #[must_use]
    pub fn cli_with_input(&self, node: u16, arguments: &[&str], input: &[u8]) -> Ran {
        let address = self.client_address(node).to_string();
        let timeout = ["--addr", &address, "--timeout", "20s"];
        annulus_with_input([arguments, &timeout[..]].concat(), input)
    }

    /// Tells the keeper to stop a node, and gives the time that it took.
    pub fn stop(&self, node: u16) -> Duration {
        let begin = Instant::now();
        let _ = self.dev("--stop", node).expect_code(0);
        begin.elapsed()
    }

    /// Tells the keeper to start a node again, and waits until it is ready.
    pub fn restart(&self, node: u16) {
        let _ = self.dev("--start", node).expect_code(0);
    }

    fn dev(&self, what: &str, node: u16) -> Ran {
        let dir = self.dir.to_str().expect("a path of ours is text");
        annulus(["dev", what, &node.to_string(), "--data-dir", dir])
    }

    fn pid(&self, node: u16) -> Option<libc::pid_t> {
        let path = self.dir.join(format!("node-{node}.pid"));
        fs::read_to_string(path).ok()?.trim().parse().ok().filter(|pid| *pid > 1)
    }

    /// Sends a signal to a node's process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, node: u16, signal: i32) {
        let pid = self.pid(node).expect("it runs");
        // SAFETY: only sends a signal; the keeper removes the number when the process has ended.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0, "it runs");
    }

    /// Ends a node at once. It may be started again before its keeper knows.
    pub fn kill_nine(&self, node: u16) {
        self.signal(node, libc::SIGKILL);
    }

    /// What a node says of its own records, in the order in which it has them.
    #[must_use]
    pub fn export(&self, node: u16, namespace: &str) -> Vec<String> {
        let ran = self.cli(node, &["export", "--ns", namespace]).expect_code(0);
        ran.text().lines().map(str::to_owned).collect()
    }

    /// Waits until all nodes have the same records, and gives them.
    ///
    /// # Panics
    /// When they do not in time.
    #[must_use]
    pub fn converged(&self, namespace: &str, timeout: Duration) -> Vec<String> {
        let mut all = Vec::new();
        eventually("all nodes have the same records", timeout, || {
            all = (1..=self.count).map(|node| self.export(node, namespace)).collect();
            all.windows(2).all(|pair| pair[0] == pair[1])
        });
        all.swap_remove(0)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        if thread::panicking() {
            for node in 1..=self.count {
                let log = fs::read_to_string(self.dir.join(format!("node-{node}.log")));
                eprintln!("log of node {node}:\n{}", log.unwrap_or_default());
            }
        }
        for node in 1..=self.count {
            if let Some(pid) = self.pid(node) {
                // SAFETY: only sends a signal; see `signal`.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
        let keeper = libc::pid_t::try_from(self.keeper.id()).expect("a process id");
        // SAFETY: a signal to our own child, which has not been waited for.
        unsafe { libc::kill(keeper, libc::SIGTERM) };
        // Its nodes have ended, so it soon does.
        let _ = self.keeper.wait();
    }
}
