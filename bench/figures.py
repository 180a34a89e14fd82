#!/usr/bin/env python3
"""Measures what bench/README.md shows: ours and a rival in turn, in one session.

    bench/figures.py [--runs 5] [--seconds 3] [--dir DIR] SECTION...

Sections:
    get periodic sync rtt     one shard against a Redis server (Debian: redis-server)
    engine overwrite tcp      5 GiB against RocksDB (bench/rivals, built as bench/README.md says)
    values                    small requests beside values of 1 MiB
    n1                        a namespace with one copy in a cluster, against a node of its own
    cluster                   three nodes against one
    etcd                      three nodes against three of etcd (Debian: etcd-server; --etcdload)
    kill catchup              three nodes, one of which goes away and comes back
    overload                  up to ten times of what they can do

Servers run on core 0, the load on core 1; clusters on both. Everything listens on loopback, every
run is bounded in time, and every process that was started is stopped. Believe ratios; throw away
durable runs whose median latency sits on a multiple of 4 ms: a neighbour held both cores.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
BIN = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")) / "release"
ANNULUS, BENCH = str(BIN / "annulus"), str(BIN / "annulus-bench")
RIVALS = os.environ.get("ANNULUS_RIVALS", str(HERE / "rivals/target/release/annulus-rivals"))
KEYS = 1_000_000


class Server:
    """A process that is stopped when the block ends."""

    def __init__(self, command, ready, log):
        self.command, self.ready, self.log = command, ready, log

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        for _ in range(300):
            if self.ready(self):
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"{self.command[0]} did not get ready; see {self.log}")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def pid(self):
        return str(self.process.pid)


def says(text):
    return lambda server: text in open(server.log).read()


def listens(port):
    def ready(_):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0
    return ready


def fresh(name):
    path = ARGS.dir / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def annulus(*options, keep=None):
    path = keep or fresh("annulus")
    command = [ANNULUS, "serve", "--data-dir", str(path / "data"), "--listen", "127.0.0.1:7801",
               "--peer-listen", "127.0.0.1:7802", "--admin-listen", "127.0.0.1:7803",
               "--cores", "0", "--shards", "1", *options]
    return Server(command, says("annulus ready"), path / "log")


def redis(*options):
    path = fresh("redis")
    command = ["taskset", "-c", "0", "redis-server", "--port", "7800", "--bind", "127.0.0.1",
               "--save", "", "--dir", str(path), "--auto-aof-rewrite-percentage", "0", *options]
    return Server(command, listens(7800), path / "log")


def bench(*options, cores="1", server=None, allowed=(0,)):
    command = [BENCH, "run", "--json", *options]
    if cores:
        command += ["--cores", cores]
    if server:
        command += ["--server-pid", server.pid]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode not in allowed:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


OURS = ["--addr", "127.0.0.1:7801"]
THEIRS = ["--target", "redis://127.0.0.1:7800"]


def cpu(run):
    return run["server"]["cpu_us_per_op"]


def rate(run):
    return run["throughput_ops"]


def median(runs, of):
    return statistics.median(of(run) for run in runs)


def span(runs, of):
    found = sorted(of(run) for run in runs)
    return f"{found[0]:.4g}..{found[-1]:.4g}"


def say(*parts):
    print(*parts, flush=True)


def pair(name, ours, theirs, columns, rival="redis"):
    """Medians of both, and ours over theirs."""
    for column, of in columns.items():
        a, b = median(ours, of), median(theirs, of)
        say(f"| {name} | {column} | {rival} {b:.4g} ({span(theirs, of)}) "
            f"| ours {a:.4g} ({span(ours, of)}) | {a / b:.2f} |")


def alternate(name, load, our_options, their_options, columns, preload):
    """Both servers in turn, each run on a server that has all the keys."""
    ours, theirs = [], []
    fill = ["--workload", "put", "--keys", str(KEYS), "--preload", "--ops", "1", "--depth", "16"]
    for _ in range(ARGS.runs):
        with redis(*their_options) as server:
            if preload:
                bench(*THEIRS, *fill)
            theirs.append(bench(*THEIRS, *load, server=server))
        with annulus(*our_options) as server:
            if preload:
                bench(*OURS, *fill)
            ours.append(bench(*OURS, *load, server=server))
    pair(name, ours, theirs, columns)


def load(workload, conns, depth, *more):
    return ["--workload", workload, "--keys", str(KEYS), "--value-size", "100", "--conns",
            str(conns), "--depth", str(depth), "--duration", f"{ARGS.seconds}s", *more]


def section_get():
    for depth in (1, 16):
        alternate(f"GET, 50 connections, depth {depth}", load("get", 50, depth),
                  ["--durability", "periodic"], ["--appendonly", "no"],
                  {"CPU us": cpu, "ops/s": rate}, preload=True)


def section_periodic():
    for depth in (1, 16):
        alternate(f"PUT periodic, 50 connections, depth {depth}", load("put", 50, depth),
                  ["--durability", "periodic"], ["--appendonly", "yes", "--appendfsync", "everysec"],
                  {"CPU us": cpu, "ops/s": rate, "errors": lambda run: run["errors"] + 1},
                  preload=False)


def section_sync():
    for conns in (1, 50):
        alternate(f"PUT sync, {conns} connections", load("put", conns, 1), [],
                  ["--appendonly", "yes", "--appendfsync", "always"],
                  {"CPU us": cpu, "ops/s": rate, "p50 us": lambda run: run["latency_us"]["p50"]},
                  preload=False)


def section_rtt():
    alternate("GET, 1 connection, client spins", load("get", 1, 1, "--spin"),
              ["--durability", "periodic"], ["--appendonly", "no"],
              {"p50 us": lambda run: run["latency_us"]["p50"]}, preload=True)


def embed(phase, *options):
    """A phase of the engine in process, and of RocksDB."""
    results = []
    for command in ([BENCH, "embed", phase, "--dir", str(ARGS.dir / "embed-ours"), *options],
                    ["taskset", "-c", "0", RIVALS, phase, "--dir", str(ARGS.dir / "embed-theirs"),
                     *options]):
        if "embed" in command:
            command += ["--core", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return results


def fields(name, runs, names):
    for field in names:
        def of(run, field=field):
            for part in field.split("."):
                run = run[part]
            return run
        pair(name, [ours for ours, _ in runs], [theirs for _, theirs in runs], {field: of},
             rival="RocksDB")


def section_engine():
    fresh("embed-ours"), fresh("embed-theirs")
    fields("load 5 GiB", [embed("load")],
           ["ops_per_second", "cpu_us_per_op", "write_amplification", "space"])
    for phase in ("get", "absent"):
        runs = [embed(phase, "--inflight", "32", "--seconds", "5") for _ in range(ARGS.runs)]
        fields(f"{phase}, 32 in flight", runs,
               ["ops_per_second", "cpu_us_per_op", "device_reads_per_op"])
    runs = [embed("sync", "--inflight", "32", "--seconds", "3") for _ in range(ARGS.runs)]
    fields("durable puts, 32 writers", runs, ["ops_per_second", "cpu_us_per_op"])


def section_overwrite():
    """After `engine`: on its data."""
    runs = [embed("overwrite") for _ in range(min(ARGS.runs, 3))]
    fields("overwrite 2.5 GB", runs,
           ["ops_per_second", "write_amplification", "space", "put_latency_us.max",
            "get_latency_us.p50", "get_latency_us.p99", "get_latency_us.p999"])


def section_tcp():
    """5 GiB behind a server of one core, against RocksDB in process (after `engine`)."""
    path = fresh("annulus-tcp")
    big = ["--keys", "5000000", "--value-size", "1024"]
    # Of the load's keys, as many blocks in memory as RocksDB's 256 MiB.
    with annulus("--cache-size", "256MiB", "--memtable-size", "64MiB", "--compression", "none",
                 "--durability", "periodic", keep=path) as server:
        bench(*OURS, "--workload", "put", *big, "--preload", "--ops", "1", "--depth", "16",
              allowed=(0, 5))
        time.sleep(20)  # until compaction has settled
        for conns, depth in ((32, 1), (32, 4)):
            ours, theirs = [], []
            for _ in range(ARGS.runs):
                ours.append(bench(*OURS, "--workload", "get", *big, "--conns", str(conns),
                                  "--depth", str(depth), "--duration", f"{ARGS.seconds}s",
                                  "--admin", "127.0.0.1:7803", server=server))
                theirs.append(embed("get", "--inflight", "32", "--seconds", str(ARGS.seconds))[1])
            for column, of, other in (("GETs/s", rate, "ops_per_second"),
                                      ("CPU us", cpu, "cpu_us_per_op")):
                a, b = median(ours, of), statistics.median(run[other] for run in theirs)
                say(f"| GET over TCP, {conns} connections, depth {depth} | {column} "
                    f"| RocksDB in process {b:.4g} | ours {a:.4g} ({span(ours, of)}) | {a / b:.2f} |")
            reads = statistics.median(run["server"]["disk_reads_per_get"] for run in ours)
            say(f"| | device reads a GET | | ours {reads:.3f} | |")


def small(server, name, beside):
    """Latencies of small requests at a fixed rate, beside another load."""
    other = subprocess.Popen([BENCH, "run", "--json", *OURS, "--cores", "1", *beside], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL) if beside else None
    time.sleep(0.5)
    run = bench(*OURS, "--workload", "mixed", "--reads", "0.5", "--keys", "100000", "--conns", "8",
                "--rate", "5000", "--duration", f"{ARGS.seconds}s", server=server)
    if other:
        other.kill()
        other.wait()
    latency = run["latency_us"]
    say(f"| 5,000 small requests a second, {name} | p50 {latency['p50']:.0f} us "
        f"| p99 {latency['p99']:.0f} | p99.9 {latency['p999']:.0f} | max {latency['max']:.0f} |")


def section_values():
    large = ["--keys", "200", "--key-size", "17", "--value-size", "1000000", "--conns", "1",
             "--duration", "60s"]
    with annulus("--durability", "periodic", "--memory", "4GiB") as server:
        bench(*OURS, "--workload", "put", "--keys", "100000", "--preload", "--ops", "1")
        bench(*OURS, "--workload", "put", "--keys", "200", "--key-size", "17", "--value-size",
              "1000000", "--conns", "1", "--preload", "--ops", "1")
        for _ in range(ARGS.runs):
            small(server, "alone", None)
            small(server, "beside GETs of 1 MB", ["--workload", "get", *large])
            small(server, "beside PUTs of 1 MB, 100 a second",
                  ["--workload", "put", "--rate", "100", *large])


def dev(*options):
    path = fresh("dev")
    command = [ANNULUS, "dev", "--nodes", "3", "--data-dir", str(path / "data"), "--base-port",
               "7811", "--", *options]
    return Server(command, says("cluster ready"), path / "log")


def converged(ports=(7813, 7823, 7833), seconds=90):
    """Waits until the nodes have fetched what they missed while a fill overran them."""
    def lacking(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        names = ("annulus_partitions_behind{", "annulus_partitions_ahead{")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))
    for _ in range(seconds * 4):
        if not any(lacking(port) for port in ports):
            return
        time.sleep(0.25)
    sys.exit("the nodes do not converge")


THREE = ["--addr", "127.0.0.1:7811,127.0.0.1:7821,127.0.0.1:7831"]


def settle(seconds=2.0):
    time.sleep(seconds)


def section_cluster():
    """p99 of three nodes on two cores, N=3 W=2 R=2, against one node's."""
    one, three = [], []
    shape = ["--keys", "100000", "--value-size", "100", "--conns", "16", "--depth", "1",
             "--duration", f"{ARGS.seconds}s"]
    fill = ["--workload", "put", "--keys", "100000", "--preload", "--ops", "1"]
    for workload in ("put", "get"):
        one, three = [], []
        for _ in range(ARGS.runs):
            with Server([ANNULUS, "serve", "--data-dir", str(fresh("one") / "data"), "--listen",
                         "127.0.0.1:7801", "--peer-listen", "127.0.0.1:7802", "--admin-listen",
                         "127.0.0.1:7803", "--shards", "1"], says("annulus ready"),
                        ARGS.dir / "one.log"):
                bench(*OURS, *fill, cores=None)
                one.append(bench(*OURS, "--workload", workload, *shape, cores=None))
            with dev():
                settle()
                bench(*THREE, *fill, cores=None)
                converged()
                three.append(bench(*THREE, "--workload", workload, *shape, "--w", "2", "--r", "2",
                                   cores=None))
        pair(f"{workload}, 16 connections, three nodes against one", three, one,
             {"p99 us": lambda run: run["latency_us"]["p99"],
              "p50 us": lambda run: run["latency_us"]["p50"], "ops/s": rate}, rival="one node")


def section_n1():
    """CPU per operation of a namespace with one copy: in a cluster of one against a plain shard."""
    for workload in ("get", "put"):
        plain, member = [], []
        for _ in range(ARGS.runs):
            with annulus("--durability", "periodic") as server:
                bench(*OURS, "--workload", "put", "--keys", "100000", "--preload", "--ops", "1")
                plain.append(bench(*OURS, *load(workload, 50, 1)[:2], "--keys", "100000",
                                   *load(workload, 50, 1)[4:], server=server))
            with annulus("--durability", "periodic", "--join", "127.0.0.1:7802") as server:
                bench(*OURS, "--workload", "put", "--keys", "100000", "--preload", "--ops", "1")
                member.append(bench(*OURS, *load(workload, 50, 1)[:2], "--keys", "100000",
                                    *load(workload, 50, 1)[4:], server=server))
        pair(f"{workload}, N=1 in a cluster", member, plain, {"CPU us": cpu}, rival="plain shard")


def etcd():
    path = fresh("etcd")
    members = ",".join(f"n{i}=http://127.0.0.1:784{i}" for i in (1, 2, 3))
    servers = []
    for i in (1, 2, 3):
        client = f"http://127.0.0.1:785{i}"
        servers.append(Server(
            ["etcd", "--name", f"n{i}", "--data-dir", str(path / f"{i}"), "--log-level", "error",
             "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", f"http://127.0.0.1:784{i}", "--initial-advertise-peer-urls",
             f"http://127.0.0.1:784{i}", "--initial-cluster", members, "--initial-cluster-state",
             "new"], lambda _: True, path / f"{i}.log"))
    return servers


def section_etcd():
    """Durable puts of 50 clients: ours with W=2, sync, against etcd."""
    ours, theirs = [], []
    for _ in range(ARGS.runs):
        servers = etcd()
        for server in servers:
            server.__enter__()
        time.sleep(5)
        pids = ",".join(server.pid for server in servers)
        done = subprocess.run([ARGS.etcdload, ",".join(f"http://127.0.0.1:785{i}" for i in (1, 2, 3)),
                               "50", str(ARGS.seconds), "100", "put", pids],
                              capture_output=True, text=True, timeout=120)
        say("    etcd:", done.stdout.strip(), done.stderr.strip()[-300:])
        theirs.append(done.stdout)
        for server in servers:
            server.__exit__()
        with dev():
            settle()
            ours.append(bench(*THREE, "--workload", "put", "--keys", "100000", "--value-size",
                              "100", "--conns", "50", "--w", "2", "--duration",
                              f"{ARGS.seconds}s", cores=None))
    say(f"| PUT sync W=2, 50 connections | ops/s | | ours {median(ours, rate):.0f} "
        f"({span(ours, rate)}) p50 {median(ours, lambda run: run['latency_us']['p50']):.0f} us | |")


def section_kill():
    """p99 at half the peak while one of three nodes is killed and returns."""
    shape = ["--workload", "mixed", "--reads", "0.5", "--keys", "100000", "--conns", "16"]
    with dev() as server:
        data = server.command[server.command.index("--data-dir") + 1]
        settle()
        bench(*THREE, "--workload", "put", "--keys", "100000", "--preload", "--ops", "1", cores=None)
        peak = rate(bench(*THREE, *shape, "--duration", "3s", cores=None))
        say(f"    peak {peak:.0f} ops/s")
        for part in ("quiet", "killed", "away", "returns"):
            run = subprocess.Popen(
                [BENCH, "run", "--json", *THREE[:1], "127.0.0.1:7811,127.0.0.1:7821", *shape,
                 "--depth", "16", "--rate", str(int(peak / 2)), "--duration", "8s"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if part == "killed":
                time.sleep(2)
                os.kill(int(open(f"{data}/node-3.pid").read()), signal.SIGKILL)
            if part == "returns":
                time.sleep(2)
                subprocess.run([ANNULUS, "dev", "--data-dir", data, "--base-port", "7811",
                                "--start", "3"], check=True, stdout=subprocess.DEVNULL)
            found = json.loads(run.communicate(timeout=60)[0].strip().splitlines()[-1])
            latency = found["latency_us"]
            say(f"| half the peak, one of three {part} | p99 {latency['p99'] / 1000:.2f} ms "
                f"| p99.9 {latency['p999'] / 1000:.2f} | max {latency['max'] / 1000:.1f} "
                f"| errors {found['errors']} of {found['ops']} |")


def section_catchup():
    """A node comes back after 60 s of missed writes at 5,000 a second."""
    shape = ["--workload", "put", "--keys", "1000000", "--conns", "16", "--depth", "16", "--rate",
             "5000"]
    two = ["--addr", "127.0.0.1:7811,127.0.0.1:7821"]
    with dev() as server:
        data = server.command[server.command.index("--data-dir") + 1]
        settle()
        quiet = bench(*two, *shape, "--duration", "8s", cores=None)
        subprocess.run([ANNULUS, "dev", "--data-dir", data, "--base-port", "7811", "--stop", "3"],
                       check=True, stdout=subprocess.DEVNULL)
        bench(*two, *shape, "--duration", "60s", "--seed", "2", cores=None, allowed=(0, 5))
        subprocess.run([ANNULUS, "dev", "--data-dir", data, "--base-port", "7811", "--start", "3"],
                       check=True, stdout=subprocess.DEVNULL)
        began = time.monotonic()
        load = subprocess.Popen([BENCH, "run", "--json", *two, *shape, "--duration", "30s",
                                 "--seed", "3"], stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.DEVNULL)
        caught = None
        while time.monotonic() - began < 90 and caught is None:
            status = json.loads(subprocess.run(
                [ANNULUS, "status", "--addr", "127.0.0.1:7831", "--json"],
                capture_output=True, text=True).stdout or "{}")
            rows = status.get("nodes", [])
            own = [row for row in rows if str(row.get("address", "")).endswith(":7831")
                   or row.get("self")]
            lag = own[0].get("as_of_lag_ms") if own else None
            if lag is not None and lag < 4000:
                caught = time.monotonic() - began
            time.sleep(0.2)
        found = json.loads(load.communicate(timeout=120)[0].strip().splitlines()[-1])
        a, b = found["latency_us"]["p99"], quiet["latency_us"]["p99"]
        say(f"| back after 60 s of 5,000 missed writes a second | caught up after "
            f"{caught if caught is None else round(caught, 1)} s | p99 meanwhile {a:.0f} us, quiet "
            f"{b:.0f} us | {a / b:.2f} |")


def overload(name, options, peak_options, where, server, cores):
    """Answers in time at multiples of the peak, as a part of it."""
    shape = ["--keys", "50000", *options]
    peak = rate(bench(*where, *shape, *peak_options, "--duration", f"{ARGS.seconds}s",
                      server=server, cores=cores))
    say(f"    {name}: peak {peak:.0f} a second")
    for times in (0.8, 1, 2, 10, 0.8):
        run = bench(*where, *shape, "--depth", "2048", "--deadline", "100ms", "--rate",
                    str(int(peak * times)), "--duration", f"{ARGS.seconds}s", server=server,
                    cores=cores, allowed=(0, 4, 5))
        good = run["goodput_ops"] / peak
        say(f"| {name}, {times} x | in time {good:.2f} "
            f"| p99 {run['latency_us']['p99'] / 1000:.0f} ms | {run.get('reasons', {})} |")


def section_overload():
    """Goodput at up to ten times the peak; deadline 100 ms."""
    fill = ["--workload", "put", "--keys", "50000", "--preload", "--ops", "1", "--depth", "16"]
    for name, options in (("scans", ["--workload", "e", "--conns", "50"]),
                          ("durable puts of 1,000 bytes",
                           ["--workload", "put", "--value-size", "1000", "--conns", "50"])):
        with annulus() as server:
            bench(*OURS, *fill)
            overload(name, options, ["--depth", "16"], OURS, server, "1")
    with dev() as server:
        settle()
        bench(*THREE, *fill, cores=None)
        overload("three nodes", ["--workload", "a", "--conns", "30"], ["--depth", "2"], THREE,
                 None, None)


SECTIONS = {name[8:]: run for name, run in globals().items() if name.startswith("section_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=sorted(SECTIONS), metavar="SECTION")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/tmp/annulus-figures"))
    parser.add_argument("--etcdload", default="etcdload",
                        help="a program: ENDPOINTS CLIENTS SECONDS VALUE_SIZE put PIDS")
    ARGS = parser.parse_args()
    for name in ARGS.sections:
        say(f"== {name} ({time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f})")
        SECTIONS[name]()
