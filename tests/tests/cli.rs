//! The command line as scripts see it: exit codes, JSON documents, and nothing else on stdout.
//! The contract is the manual's; each test here is a line of it.

#![expect(clippy::disallowed_methods, reason = "the real clock says when a ttl is over")]

use std::fs;
use std::thread;
use std::time::Duration;

use annulus_tests::server::{Setup, annulus, annulus_with_input, binary, scratch};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

fn setup(dir: &tempfile::TempDir) -> Setup {
    Setup::new(dir.path().join("data")).with("shards", "2")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON document a line")).collect()
}

#[test]
fn every_command_has_help_with_an_example_and_bad_usage_is_2() {
    let commands: &[&[&str]] = &[
        &["serve"],
        &["doctor"],
        &["put"],
        &["get"],
        &["del"],
        &["import"],
        &["export"],
        &["ns", "create"],
        &["ns", "list"],
        &["ns", "set"],
        &["ns", "drop"],
        &["ring"],
        &["stats"],
        &["status"],
        &["snapshot", "create"],
        &["snapshot", "list"],
        &["snapshot", "delete"],
        &["inspect"],
    ];
    for command in commands {
        let ran = annulus([*command, &["--help"]].concat()).expect_code(0);
        assert!(ran.text().contains("xample"), "{command:?}: {}", ran.text());
        assert!(ran.stderr.is_empty(), "{command:?}: {}", ran.stderr);
        let ran = annulus([*command, &["--no-such-flag"]].concat()).expect_code(2);
        assert!(ran.stdout.is_empty() && ran.stderr.contains("no-such-flag"), "{ran:?}");
    }
    let _ = annulus(["frobnicate"]).expect_code(2);
    let empty: [&str; 0] = [];
    let _ = annulus(empty).expect_code(2);
    assert!(annulus(["--version"]).expect_code(0).text().starts_with("annulus "));
}

#[test]
fn without_a_server_every_command_says_so_with_3() {
    // A port that was free a moment ago, and is not listened on.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let commands: &[&[&str]] = &[
        &["put", "k", "v"],
        &["get", "k"],
        &["del", "k"],
        &["export"],
        &["ns", "list"],
        &["status"],
        &["stats"],
        &["ring"],
        &["snapshot", "list"],
    ];
    for command in commands {
        let ran = annulus([*command, &["--addr", &address, "--timeout", "500ms"]].concat());
        let ran = ran.expect_code(3);
        assert!(ran.stdout.is_empty() && ran.stderr.contains(&address), "{ran:?}");
    }
}

#[test]
fn put_get_and_del_print_values_or_nothing() {
    let dir = scratch();
    let server = setup(&dir).start();
    let quiet = server.cli(&["put", "k", "v"]).expect_code(0);
    assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty(), "{quiet:?}");
    assert_eq!(server.cli(&["get", "k"]).expect_code(0).stdout, b"v");
    let absent = server.cli(&["get", "nothing"]).expect_code(1);
    assert!(absent.stdout.is_empty(), "{absent:?}");
    let _ = server.cli(&["del", "k"]).expect_code(0);
    let _ = server.cli(&["get", "k"]).expect_code(1);
    // Bytes of all kinds, by a file and by stdin.
    let bytes: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
    let file = dir.path().join("value");
    fs::write(&file, &bytes).unwrap();
    let _ = server.cli(&["put", "f", "--file", file.to_str().unwrap()]).expect_code(0);
    assert!(server.cli(&["get", "f"]).expect_code(0).stdout == bytes);
    let _ = server.cli_with_input(&["put", "s", "-"], &bytes).expect_code(0);
    assert!(server.cli(&["get", "s"]).expect_code(0).stdout == bytes);
    let _ = server.cli(&["put", "e", ""]).expect_code(0);
    assert!(server.cli(&["get", "e"]).expect_code(0).stdout.is_empty());
    // Refusals by size are refusals; input that cannot be is bad input.
    fs::write(&file, vec![0; (1 << 20) + 1]).unwrap();
    let _ = server.cli(&["put", "big", "--file", file.to_str().unwrap()]).expect_code(4);
    let _ = server.cli(&["put", &"k".repeat(4097), "v"]).expect_code(2);
    let _ = server.cli(&["put", "k", "--file", "/no/such/file"]).expect_code(2);
    let _ = server.cli(&["get", "k", "--ns", "nobody"]).expect_code(4);
    let _ = server.cli(&["get", "k", "--timeout", "0s"]).expect_code(2);
}

#[test]
fn json_says_what_an_answer_was_worth() {
    let dir = scratch();
    let server = setup(&dir).start();
    let put = server.cli(&["put", "k", "v", "--json"]).expect_code(0).json();
    let version = put["version"].as_str().unwrap().to_owned();
    assert_eq!((&put["acks"], &put["primary"], &put["durable"]), (&1.into(), &1.into(), &1.into()));
    assert!(put.get("context").is_some());
    let get = server.cli(&["get", "k", "--json"]).expect_code(0).json();
    assert_eq!(get["values"][0]["value_base64"], STANDARD.encode("v"));
    assert_eq!(get["values"][0]["version"], version);
    assert_eq!(get["values"][0]["expires_at"], Value::Null);
    assert!(get["as_of"].as_str().unwrap().starts_with("20"), "{get}");
    assert_eq!(get["primaries_read"], 1);
    let absent = server.cli(&["get", "nothing", "--json"]).expect_code(1).json();
    assert_eq!(absent["values"], serde_json::json!([]));
    let del = server.cli(&["del", "k", "--if-version", &version, "--json"]).expect_code(0).json();
    assert!(del["version"].is_string());
}

#[test]
fn conditions_and_ttl_work_from_the_command_line() {
    let dir = scratch();
    let server = setup(&dir).start();
    let put = server.cli(&["put", "k", "1", "--if-absent", "--json"]).expect_code(0).json();
    let version = put["version"].as_str().unwrap();
    let again = server.cli(&["put", "k", "2", "--if-absent", "--json"]).expect_code(1).json();
    assert_eq!((&again["condition"], &again["version"]), (&false.into(), &version.into()));
    let _ = server.cli(&["put", "k", "2", "--if-version", version]).expect_code(0);
    let _ = server.cli(&["put", "k", "3", "--if-version", version]).expect_code(1);
    let _ = server.cli(&["del", "k", "--if-version", version]).expect_code(1);
    let _ = server.cli(&["put", "k", "3", "--if-version", "rubbish"]).expect_code(2);
    assert_eq!(server.cli(&["get", "k"]).expect_code(0).stdout, b"2");
    let _ = server.cli(&["put", "t", "v", "--ttl", "300ms"]).expect_code(0);
    thread::sleep(Duration::from_millis(400));
    let _ = server.cli(&["get", "t"]).expect_code(1);
    let _ = server.cli(&["put", "h", "v", "--ttl", "12h"]).expect_code(0);
    let get = server.cli(&["get", "h", "--json"]).expect_code(0).json();
    assert!(get["values"][0]["expires_at"].is_string(), "{get}");
    let _ = server.cli(&["put", "h", "v", "--ttl", "soon"]).expect_code(2);
}

#[test]
fn siblings_are_1_and_json_shows_them_and_a_context_replaces_them() {
    let dir = scratch();
    let server = setup(&dir).start();
    let _ = server.cli(&["ns", "create", "carts", "--n", "1", "--mode", "siblings"]).expect_code(0);
    for value in ["a", "b"] {
        let _ = server.cli(&["put", "k", value, "--ns", "carts"]).expect_code(0);
    }
    let ran = server.cli(&["get", "k", "--ns", "carts"]).expect_code(1);
    assert!(ran.stdout.is_empty() && ran.stderr.contains("2 concurrent values"), "{ran:?}");
    let both = server.cli(&["get", "k", "--ns", "carts", "--json"]).expect_code(1).json();
    assert_eq!(both["values"].as_array().unwrap().len(), 2);
    let context = both["context"].as_str().unwrap();
    let merged = ["put", "k", "ab", "--ns", "carts", "--context", context];
    let _ = server.cli(&merged).expect_code(0);
    assert_eq!(server.cli(&["get", "k", "--ns", "carts"]).expect_code(0).stdout, b"ab");
    let wrong = ["put", "other", "x", "--ns", "carts", "--context", context];
    let _ = server.cli(&wrong).expect_code(4);
    let _ = server.cli(&["put", "k", "x", "--context", "zz"]).expect_code(2);
}

#[test]
fn import_reports_bad_lines_by_number_and_strict_stops_at_the_first() {
    let dir = scratch();
    let server = setup(&dir).start();
    let input = b"{\"key\":\"a\",\"value\":\"1\"}\n\
        not json\n\
        {\"key\":\"b\",\"value_base64\":\"AP8=\"}\n\
        \n\
        {\"key\":\"\",\"value\":\"empty key\"}\n\
        {\"key\":\"c\",\"value\":\"3\",\"ttl\":\"12h\"}\n\
        {\"key\":\"d\"}\n\
        {\"key\":\"last\",\"value\":\"no newline\"}";
    let ran = server.cli_with_input(&["import", "-"], input).expect_code(2);
    let summary = ran.json();
    assert_eq!((&summary["written"], &summary["failed"]), (&4.into(), &3.into()));
    assert!(summary["seconds"].is_number());
    for line in ["line 2", "line 5", "line 7"] {
        assert!(ran.stderr.contains(line), "{}", ran.stderr);
    }
    assert_eq!(server.cli(&["get", "b"]).expect_code(0).stdout, [0, 255]);
    assert_eq!(server.cli(&["get", "last"]).expect_code(0).stdout, b"no newline");
    let _ = server.cli(&["del", "last"]).expect_code(0);
    let ran = server.cli_with_input(&["import", "-", "--strict"], input).expect_code(2);
    assert_eq!(ran.json()["failed"], 1);
    let _ = server.cli(&["get", "last"]).expect_code(1);
    // By its name, a file is tab-separated values.
    let tsv = dir.path().join("data.tsv");
    fs::write(&tsv, "tab\\tkey\tline\\nend\nplain\tvalue\n").unwrap();
    let summary = server.cli(&["import", tsv.to_str().unwrap()]).expect_code(0).json();
    assert_eq!(summary["written"], 2);
    assert_eq!(server.cli(&["get", "tab\tkey"]).expect_code(0).stdout, b"line\nend");
    let _ = server.cli(&["import", "/no/such/file.jsonl"]).expect_code(2);
}

#[test]
fn what_export_prints_import_reads_back() {
    let (dir, other) = (scratch(), scratch());
    let server = setup(&dir).start();
    let mut input = String::new();
    for number in 0..1_500u32 {
        let key = STANDARD.encode([&number.to_be_bytes()[..], &[0xff, 0, 0x0a]].concat());
        let size = usize::try_from(number).unwrap() % 900;
        let value = STANDARD.encode(vec![number.to_le_bytes()[0]; size]);
        input.push_str(&format!("{{\"key_base64\":\"{key}\",\"value_base64\":\"{value}\"}}\n"));
    }
    input.push_str("{\"key\":\"p\\u00e4ge\",\"value\":\"\\u2028 \\\"q\\\"\"}\n");
    let _ = server.cli_with_input(&["import", "-"], input.as_bytes()).expect_code(0);
    let exported = server.cli(&["export"]).expect_code(0);
    assert_eq!(lines(exported.text()).len(), 1_501);
    let second = setup(&other).start();
    let summary = second.cli_with_input(&["import", "-"], &exported.stdout).expect_code(0).json();
    assert_eq!((&summary["written"], &summary["failed"]), (&1_501.into(), &0.into()));
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let again = second.cli(&["export"]).expect_code(0);
    assert!(sorted(exported.text()) == sorted(again.text()));
    // The partitions make the whole.
    let ring = server.cli(&["ring", "--key", "p\u{e4}ge", "--json"]).expect_code(0).json();
    let partition = ring["partition"].to_string();
    let part = server.cli(&["export", "--partition", &partition]).expect_code(0);
    assert!(part.text().contains("p\u{e4}ge"), "{}", part.text());
    assert!(lines(part.text()).len() < 100);
    let _ = server.cli(&["export", "--partition", "4096"]).expect_code(2);
    // A reader that goes away ends it quietly.
    let address = server.client.to_string();
    let piped = std::process::Command::new("sh")
        .args(["-c", "\"$0\" export --addr \"$1\" | head -n 1"])
        .args([binary().as_os_str(), address.as_ref()])
        .output()
        .unwrap();
    assert!(piped.status.success() && piped.stderr.is_empty(), "{piped:?}");
}

#[test]
fn operators_documents_have_their_fields() {
    let dir = scratch();
    let server = setup(&dir).start();
    let _ = server.cli(&["put", "k", "v"]).expect_code(0);
    let status = server.cli(&["status", "--json"]).expect_code(0).json();
    let node = &status["nodes"][0];
    for field in
        ["id", "address", "dc", "rack", "state", "weight", "partitions", "bytes", "disk_level"]
    {
        assert!(!node[field].is_null(), "{field} in {node}");
    }
    assert_eq!((&node["state"], &node["partitions"]), (&"up".into(), &4096.into()));
    let stats = server.cli(&["stats", "--json"]).expect_code(0).json();
    assert_eq!(stats["shards"].as_array().unwrap().len(), 2);
    assert!(stats["shards"][0]["latency_us"]["write"]["p99"].is_number(), "{stats}");
    let ring = server.cli(&["ring", "--json"]).expect_code(0).json();
    assert!(!ring["rows"].as_array().unwrap().is_empty(), "{ring}");
    let key = server.cli(&["ring", "--key", "k", "--json"]).expect_code(0).json();
    assert!(key["token"].is_string() && key["replicas"].is_array(), "{key}");
    for table in [&["status"][..], &["stats"], &["ring", "--key", "k"], &["ns", "list"]] {
        assert!(server.cli(table).expect_code(0).text().lines().count() >= 2);
    }
    let _ = server.cli(&["ns", "create", "users", "--n", "1", "--ttl", "30d"]).expect_code(0);
    let _ = server.cli(&["ns", "create", "users"]).expect_code(1);
    let _ = server.cli(&["ns", "create", "no spaces"]).expect_code(2);
    let _ = server.cli(&["ns", "set", "users", "--ttl", "60d"]).expect_code(0);
    let names = server.cli(&["ns", "list", "--json"]).expect_code(0);
    assert!(names.text().contains("users") && names.text().contains("default"));
    let _ = server.cli(&["ns", "drop", "users"]).expect_code(0);
    let _ = server.cli(&["ns", "drop", "users"]).expect_code(1);
}

#[test]
fn doctor_tells_the_host_as_one_document() {
    let dir = scratch();
    let data = dir.path().join("data");
    let ran = annulus(["doctor", "--json", "--data-dir", data.to_str().unwrap()]);
    let report = ran.json();
    assert_eq!(ran.code == 0, report["can_serve"] == true, "{ran:?}");
    assert!(!report["findings"].as_array().unwrap().is_empty());
    assert!(!data.join("shard-000").exists(), "it changes nothing");
    let ran = annulus(["doctor", "--data-dir", data.to_str().unwrap()]);
    assert!(ran.text().contains("can serve here") || ran.text().contains("cannot serve here"));
}

#[test]
fn inspect_shows_a_store_and_finds_a_flipped_bit() {
    let dir = scratch();
    let server = setup(&dir).start();
    let input: String = (0..4_000)
        .map(|number| format!("{{\"key\":\"k{number}\",\"value\":\"{}\"}}\n", "v".repeat(1_500)))
        .collect();
    let _ = server.cli_with_input(&["import", "-"], input.as_bytes()).expect_code(0);
    // A stop ends a flush that is under way, and the log keeps the records instead.
    let is_flushed = |stats: &Value| {
        stats["shards"].as_array().unwrap().iter().all(|it| it["gauges"]["tables"] != 0)
    };
    assert!((0..5_000).any(|_| is_flushed(&server.stats())), "4,000 records fill a memtable");
    let (setup, _) = server.terminate();
    let data = setup.data_dir().to_str().unwrap();
    let documents = lines(annulus(["inspect", data, "--json"]).expect_code(0).text());
    let kinds: Vec<&str> = documents.iter().filter_map(|found| found["kind"].as_str()).collect();
    for kind in ["identity", "manifest", "log", "table", "namespaces"] {
        assert!(kinds.iter().any(|found| found.starts_with(kind)), "{kind} in {kinds:?}");
    }
    let _ = annulus(["inspect", data, "--verify"]).expect_code(0);
    let records = annulus(["inspect", data, "--records", "--json"]).expect_code(0);
    assert!(records.text().contains("k3999"));
    let tables: Vec<_> = fs::read_dir(setup.data_dir().join("shard-000/table"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let table = tables.first().expect("4,000 records fill a memtable");
    let whole = fs::read(table).unwrap();
    for at in [10, whole.len() / 2, whole.len() - 10] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(table, &damaged).unwrap();
        let ran = annulus(["inspect", data, "--verify"]).expect_code(1);
        let name = table.file_name().unwrap().to_str().unwrap();
        assert!(ran.text().contains(name), "byte {at}: {}", ran.text());
    }
    fs::write(table, whole).unwrap();
    let _ = annulus(["inspect", data, "--verify"]).expect_code(0);
    let _ = annulus(["inspect", "/no/such/file"]).expect_code(2);
    let _ = annulus(["inspect", dir.path().join("nothing").to_str().unwrap()]).expect_code(2);
}

#[test]
fn a_snapshot_is_a_directory_that_can_be_served() {
    let (dir, other) = (scratch(), scratch());
    let server = setup(&dir).start();
    let input: String =
        (0..2_000).map(|n| format!("{{\"key\":\"k{n}\",\"value\":\"before {n}\"}}\n")).collect();
    let _ = server.cli_with_input(&["import", "-"], input.as_bytes()).expect_code(0);
    let row = server.cli(&["snapshot", "create", "monday", "--json"]).expect_code(0).json();
    assert_eq!(row["name"], "monday");
    let path = row["path"].as_str().unwrap().to_owned();
    let _ = server.cli(&["snapshot", "create", "monday"]).expect_code(1);
    let _ = server.cli(&["snapshot", "create", "../evil"]).expect_code(2);
    let _ = server.cli(&["put", "k7", "after"]).expect_code(0);
    let list = server.cli(&["snapshot", "list", "--json"]).expect_code(0).json();
    assert_eq!(list["snapshots"][0]["name"], "monday", "{list}");
    // Copied away, as a backup would be; hard links are of the same disk.
    let copy = other.path().join("copy");
    let copied = std::process::Command::new("cp").arg("-a").arg(&path).arg(&copy).status().unwrap();
    assert!(copied.success());
    let _ = annulus(["inspect", copy.to_str().unwrap(), "--verify"]).expect_code(0);
    let old = Setup::new(&copy).start();
    assert_eq!(old.shards, 2);
    assert_eq!(old.cli(&["get", "k7"]).expect_code(0).stdout, b"before 7");
    assert_eq!(lines(old.cli(&["export"]).expect_code(0).text()).len(), 2_000);
    let _ = old.cli(&["put", "k8", "in the copy"]).expect_code(0);
    assert_eq!(server.cli(&["get", "k7"]).expect_code(0).stdout, b"after");
    assert_eq!(server.cli(&["get", "k8"]).expect_code(0).stdout, b"before 8");
    let _ = server.cli(&["snapshot", "delete", "monday"]).expect_code(0);
    let _ = server.cli(&["snapshot", "delete", "monday"]).expect_code(1);
    let server = server.kill_nine().start();
    assert_eq!(lines(server.cli(&["export"]).expect_code(0).text()).len(), 2_000);
}

#[test]
fn configuration_comes_from_flags_then_environment_then_file() {
    let dir = scratch();
    let config = dir.path().join("annulus.toml");
    fs::write(&config, "shards = 2\nmemory = \"256MiB\"\nsegment-size = \"1MiB\"\n").unwrap();
    let setup = Setup::bare(dir.path().join("data")).with("config", config.to_str().unwrap());
    let server = setup.start();
    assert_eq!(server.shards, 2);
    let _ = server.terminate();
    fs::write(&config, "shards = 2\nmemroy = \"1GiB\"\n").unwrap();
    let ran = setup.refusal();
    assert!(ran.code == 2 && ran.stderr.contains("memroy"), "{ran:?}");
    let ran = annulus_with_input(["serve", "--config", "/no/such.toml"], b"").expect_code(2);
    assert!(ran.stderr.contains("/no/such.toml"), "{}", ran.stderr);
}
