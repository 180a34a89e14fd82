#!/bin/sh
# What large values cost small requests: latency of small GETs and PUTs on one shard at a fixed
# rate, alone and beside one connection that puts or gets large values all the time.
#
#   cargo build --release -p annulus -p annulus-bench
#   bench/large-values.sh
#
# One line a case, in microseconds from the time when a request was due: `annulus-bench run` with
# --rate for the small ones, a closed loop of one request for the large ones. `from disk` reads
# tables past a cache that keeps no large block.
#
# SIZE: bytes of a large value (1048576). COUNT: how many there are (64 in memory, 256 on disk).
# RATE: small requests a second (2000). SECONDS: of each case (5). BIN: directory of the binaries.
# SERVER_CORE, LOAD_CORE: 0 and 1. DIR: where the data goes (a temporary directory).
set -eu

bin=${BIN:-target/release}
size=${SIZE:-1048576}
rate=${RATE:-2000}
seconds=${SECONDS_EACH:-5}
server_core=${SERVER_CORE:-0}
load_core=${LOAD_CORE:-1}
port=${PORT:-7961}
dir=$(mktemp -d "${DIR:-${TMPDIR:-/tmp}}/large-values.XXXXXX")
server=

stop() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
}
trap 'stop; rm -rf "$dir"' EXIT INT TERM

start() {
    "$bin/annulus" serve --data-dir "$dir/data" --listen "127.0.0.1:$port" \
        --peer-listen "127.0.0.1:$((port + 1))" --admin-listen off --shards 1 \
        --cores "$server_core" --value-size-max 16MiB --log-level warn "$@" >"$dir/log" 2>&1 &
    server=$!
    until "$bin/annulus" status --addr "127.0.0.1:$port" >/dev/null 2>&1; do
        kill -0 "$server" || { cat "$dir/log" >&2; exit 1; }
        sleep 0.1
    done
}

load() {
    "$bin/annulus-bench" run --addr "127.0.0.1:$port" --cores "$load_core" --json "$@"
}

# Percentiles of all requests, out of the JSON document.
figures() {
    tr -d ' \n' <"$1" | sed -e 's/.*"ops":\([0-9]*\).*"errors":\([0-9]*\).*"latency_us":{\([^}]*\)}.*/\1 \2 \3/' |
        awk -v name="$2" '{
            n = split($3, fields, ",")
            for (i = 1; i <= n; i++) { split(fields[i], pair, ":"); gsub(/"/, "", pair[1]); at[pair[1]] = pair[2] }
            printf "%-44s %8d %6d %9.0f %9.0f %9.0f %9.0f\n", name, $1, $2, at["p50"], at["p99"], at["p999"], at["max"]
        }'
}

# Small requests of one kind; the large load, if any, runs beside them.
measure() {
    name=$1 kind=$2
    shift 2
    beside=
    if [ $# -gt 0 ]; then
        load --conns 1 --duration "$((seconds + 2))s" --value-size "$size" --key-size 20 "$@" >"$dir/large.json" &
        beside=$!
        sleep 1
    fi
    load --workload "$kind" --keys 10000 --conns 8 --depth 4 --rate "$rate" --duration "${seconds}s" >"$dir/small.json" || true
    figures "$dir/small.json" "$kind, $name"
    if [ -n "$beside" ]; then
        wait "$beside" || true
        figures "$dir/large.json" "    the large ones"
    fi
}

printf '%-44s %8s %6s %9s %9s %9s %9s\n' "small requests ($rate/s), large of $size B" count errors p50 p99 p99.9 max

# Large keys have 20 bytes, small ones 16: they never meet.
small_keys() { load --workload get --keys 10000 --preload --conns 8 --ops 1000 >/dev/null; }

start
small_keys
count=${COUNT:-64}
for kind in get put; do measure "alone" "$kind"; done
for kind in get put; do measure "beside large puts" "$kind" --workload put --keys "$count"; done
stop
rm -rf "$dir/data"

# All large values fit the active memtable.
memory=$((size * 8))
[ "$memory" -gt 16777216 ] || memory=16777216
start --memtable-size "$((memory * 4))"
small_keys
load --workload get --keys 8 --preload --conns 1 --value-size "$size" --key-size 20 --ops 8 >/dev/null
for kind in get put; do measure "beside large gets from memory" "$kind" --workload get --keys 8; done
stop
rm -rf "$dir/data"

count=${COUNT:-256}
start --memtable-size 16MiB --cache-size 4MiB
small_keys
load --workload get --keys "$count" --preload --conns 1 --value-size "$size" --key-size 20 --ops 8 >/dev/null
for kind in get put; do measure "beside large gets from disk" "$kind" --workload get --keys "$count"; done
