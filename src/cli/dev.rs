//! `annulus dev`: a cluster of real processes on this machine, to try things out on.
//!
//! ```text
//! DIR/node-1/          its data directory
//! DIR/node-1.log       what it says on stderr
//! DIR/node-1.pid       its process, while it runs
//! DIR/node-1.stopped   it is meant to be stopped
//! ```
//!
//! One process keeps the others as the marker files want them; `--stop` and `--start` only write
//! and remove markers and wait. Invariant: a node that ended by itself, or was killed, stays down
//! until it is asked for again; when the keeper ends, so do its nodes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use annulus_tuning::host::Host;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::arguments::DevArguments;
use super::output::complain;
use super::{Exit, Failure, Outcome};

/// How often the keeper looks at its nodes, and a waiting command at the files.
const LOOK: Duration = Duration::from_millis(50);
/// Looks until a node must be ready, stopped, or killed: 30 s.
const LOOKS_MAX: u32 = 600;
/// Ports from one node to the next.
const PORT_STEP: u16 = 10;

pub(super) fn run(arguments: DevArguments) -> Outcome {
    let cluster = Cluster { dir: arguments.data_dir.clone() };
    match (arguments.stop, arguments.start) {
        (Some(node), _) => cluster.stop(node),
        (_, Some(node)) => cluster.start(node),
        (None, None) => cluster.keep(&arguments),
    }
}

/// The files of a cluster.
struct Cluster {
    dir: PathBuf,
}

impl Cluster {
    fn file(&self, node: u32, what: &str) -> PathBuf {
        self.dir.join(format!("node-{node}.{what}"))
    }

    fn pid(&self, node: u32) -> Option<libc::pid_t> {
        fs::read_to_string(self.file(node, "pid")).ok()?.trim().parse().ok()
    }

    /// `--stop`: writes the marker, and waits until the node is gone.
    fn stop(&self, node: u32) -> Outcome {
        self.check(node)?;
        let marker = self.file(node, "stopped");
        fs::write(&marker, b"").map_err(|error| trouble(&marker, &error))?;
        wait_until("the node has not stopped", || self.pid(node).is_none())
    }

    /// `--start`: removes the marker, and waits until the node runs.
    fn start(&self, node: u32) -> Outcome {
        self.check(node)?;
        // Killed a moment ago: the keeper is about to see it, and to mark it as stopped.
        let is_seen = || !self.pid(node).is_some_and(has_ended);
        wait_until("the keeper does not look at the node", is_seen)?;
        match fs::remove_file(self.file(node, "stopped")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(trouble(&self.file(node, "stopped"), &error));
            }
            _ => {}
        }
        wait_until("the node has not come up: see its log", || self.pid(node).is_some())
    }

    /// Whether there is such a node, and somebody who keeps it.
    fn check(&self, node: u32) -> Result<(), Failure> {
        let kept = self.pid(0).is_some_and(is_running);
        if !kept {
            let dir = self.dir.display();
            return Err(Failure::usage(format!(
                "no cluster runs in {dir}: start it with `annulus dev --data-dir {dir}`"
            )));
        }
        if node == 0 || !self.dir.join(format!("node-{node}")).exists() {
            return Err(Failure::usage(format!("there is no node {node}; nodes count from 1")));
        }
        Ok(())
    }

    /// Starts the nodes, keeps them as wanted until a signal comes, then stops them all.
    fn keep(&self, arguments: &DevArguments) -> Outcome {
        if self.pid(0).is_some_and(is_running) {
            let dir = self.dir.display();
            return Err(Failure::usage(format!("a cluster runs in {dir} already")));
        }
        fs::create_dir_all(&self.dir).map_err(|error| trouble(&self.dir, &error))?;
        let own = self.file(0, "pid");
        fs::write(&own, std::process::id().to_string()).map_err(|error| trouble(&own, &error))?;
        let kept = self.keep_nodes(arguments);
        // Nobody reads it when that fails.
        let _ = fs::remove_file(own);
        kept
    }

    fn keep_nodes(&self, arguments: &DevArguments) -> Outcome {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop))
                .map_err(|error| Failure::usage(format!("signals: {error}")))?;
        }
        let (say, said) = mpsc::channel();
        let mut nodes: Vec<Node> = Vec::new();
        for number in 1..=arguments.nodes {
            let _ = fs::remove_file(self.file(number, "stopped"));
            let _ = fs::remove_file(self.file(number, "pid"));
            nodes.push(Node { number, child: None });
        }
        let mut ready = 0;
        let mut told = false;
        let failed = loop {
            let mut failed = None;
            for node in &mut nodes {
                let wanted = !self.file(node.number, "stopped").exists();
                match node.look(self, wanted, arguments, &say) {
                    Ok(()) => {}
                    // Before all are up, one that cannot start is the end.
                    Err(what) if !told => failed = Some(what),
                    Err(what) => complain(&what),
                }
            }
            while let Ok((number, line)) = said.try_recv() {
                print_line(&line);
                let pid = nodes[number as usize - 1].child.as_ref().map_or(0, Child::id);
                let path = self.file(number, "pid");
                fs::write(&path, pid.to_string()).map_err(|error| trouble(&path, &error))?;
                ready += 1;
            }
            if !told && ready == arguments.nodes {
                told = true;
                print_line(&format!("cluster ready nodes={}", arguments.nodes));
            }
            if stop.load(Ordering::Relaxed) || failed.is_some() {
                break failed;
            }
            pause();
        };
        for node in &mut nodes {
            node.end(self);
        }
        match failed {
            Some(what) => Err(Failure::new(Exit::NotStarted, what)),
            None => Ok(Exit::Success),
        }
    }
}

/// One node's process.
struct Node {
    number: u32,
    child: Option<Child>,
}

impl Node {
    /// Makes the process be as wanted.
    fn look(
        &mut self,
        cluster: &Cluster,
        wanted: bool,
        arguments: &DevArguments,
        say: &mpsc::Sender<(u32, String)>,
    ) -> Result<(), String> {
        let number = self.number;
        let Some(child) = &mut self.child else {
            if wanted {
                let mut child = spawn(cluster, number, arguments)
                    .map_err(|error| format!("node {number} cannot be started: {error}"))?;
                if let Some(stdout) = child.stdout.take() {
                    listen(number, stdout, say.clone());
                }
                self.child = Some(child);
            }
            return Ok(());
        };
        if !wanted {
            terminate(child);
        }
        if let Ok(Some(status)) = child.try_wait() {
            self.child = None;
            let _ = fs::remove_file(cluster.file(number, "pid"));
            if wanted {
                // Only a new wish brings it back, or a broken node would be started for ever.
                let _ = fs::write(cluster.file(number, "stopped"), b"");
                let log = cluster.file(number, "log");
                return Err(format!(
                    "node {number} ended ({status}): see {}; `annulus dev --start {number}` brings \
                     it back",
                    log.display()
                ));
            }
        }
        Ok(())
    }

    /// Stops the process, by force if it does not go.
    fn end(&mut self, cluster: &Cluster) {
        let Some(mut child) = self.child.take() else { return };
        terminate(&child);
        for _ in 0..LOOKS_MAX {
            if !matches!(child.try_wait(), Ok(None)) {
                break;
            }
            pause();
        }
        // Without effect on one that has ended.
        let _ = child.kill();
        let _ = child.wait();
        let _ = fs::remove_file(cluster.file(self.number, "pid"));
    }
}

fn address(base: u16, node: u32, port: u16) -> Option<SocketAddr> {
    let step = u16::try_from(node - 1).ok()?.checked_mul(PORT_STEP)?;
    let port = base.checked_add(step)?.checked_add(port)?;
    Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
}

fn spawn(cluster: &Cluster, node: u32, arguments: &DevArguments) -> io::Result<Child> {
    let port = |node, port| {
        address(arguments.base_port, node, port)
            .map(|address| address.to_string())
            .ok_or_else(|| io::Error::other("the ports do not fit below 65536"))
    };
    let peers: io::Result<Vec<String>> = (1..=arguments.nodes).map(|node| port(node, 1)).collect();
    let log = File::options().create(true).append(true).open(cluster.file(node, "log"))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("serve").args(["--data-dir".into(), cluster.dir.join(format!("node-{node}"))]);
    command.args(["--listen", &port(node, 0)?, "--peer-listen", &port(node, 1)?]);
    command.args(["--admin-listen", &port(node, 2)?]);
    let rack = format!("rack{node}");
    let core = core_of(node, &Host::probe().cores_usable());
    if !is_given("--shards", &arguments.serve) && !is_given("--cores", &arguments.serve) {
        command.args(["--shards", "1", "--cores", &core]);
    }
    let usual = [("--spin", "0s"), ("--memory", "512MiB"), ("--rack", &rack)];
    for (option, value) in usual {
        if !is_given(option, &arguments.serve) {
            command.args([option, value]);
        }
    }
    if arguments.nodes > 1 {
        command.args(["--join", &peers?.join(",")]);
    }
    command.args(&arguments.serve);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()
}

/// The core of a node's one shard, which stays there: each node's another one, as far as they go.
fn core_of(node: u32, usable: &[usize]) -> String {
    usable[(node as usize - 1) % usable.len()].to_string()
}

/// Whether the user says this option himself, as `--option value` or `--option=value`.
fn is_given(option: &str, serve: &[OsString]) -> bool {
    serve.iter().filter_map(|word| word.to_str()).any(|word| {
        word.strip_prefix(option).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// Tells of the ready line, and reads on so that the node is never blocked.
fn listen(node: u32, stdout: ChildStdout, say: mpsc::Sender<(u32, String)>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if line.starts_with("annulus ready ") && say.send((node, line)).is_err() {
                return;
            }
        }
    });
}

fn terminate(child: &Child) {
    if let Ok(pid) = libc::pid_t::try_from(child.id()) {
        // SAFETY: sends a signal to a child that has not been waited for, so the number is its.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

fn is_running(pid: libc::pid_t) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// Whether a process has ended and its parent has not looked yet.
fn has_ended(pid: libc::pid_t) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) -> Outcome {
    for _ in 0..LOOKS_MAX {
        if done() {
            return Ok(Exit::Success);
        }
        pause();
    }
    Err(Failure::negative(what))
}

#[expect(clippy::disallowed_methods, reason = "a tool that waits for processes, not a shard")]
fn pause() {
    std::thread::sleep(LOOK);
}

fn print_line(line: &str) {
    // The reader may be gone; the cluster runs on.
    let _ = writeln!(io::stdout(), "{line}");
}

fn trouble(path: &Path, error: &io::Error) -> Failure {
    Failure::usage(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_different_cores() {
        let cores = [1, 2, 3].map(|node| core_of(node, &[4, 7]));
        assert_eq!(cores, ["4", "7", "4"]);
    }

    #[test]
    fn what_the_user_says_is_not_said_again() {
        let serve = ["--shards", "2", "--spin=1ms", "--racks"].map(OsString::from);
        assert!(is_given("--shards", &serve) && is_given("--spin", &serve));
        assert!(!is_given("--rack", &serve) && !is_given("--memory", &serve));
    }
}
