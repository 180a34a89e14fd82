//! Precedence, defaults, ranges, and that every option is told of everywhere.

use std::path::Path;

use super::*;
use clap::Parser;

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    flags: Flags,
}

fn host() -> Host {
    Host { cores_allowed: vec![0, 1], memory_machine: Some(8 << 30), ..Host::default() }
}

fn resolve(line: &str) -> Result<Config, String> {
    let line = Line::try_parse_from(format!("annulus {line}").split_whitespace())
        .map_err(|error| error.to_string())?;
    Config::resolve(line.flags, &host())
}

fn refusal(line: &str) -> String {
    resolve(line).expect_err(line)
}

#[test]
fn nothing_given_means_the_documented_defaults() {
    let config = resolve("").unwrap();
    assert_eq!(config.data_dir, PathBuf::from("./annulus-data"));
    assert_eq!(config.listen.to_string(), LISTEN_DEFAULT);
    assert_eq!(config.admin_listen.unwrap().to_string(), ADMIN_LISTEN_DEFAULT);
    assert_eq!((config.shard_count(None), config.shard_count(Some(5))), (2, 5));
    assert_eq!(config.memory, 4 << 30);
    assert_eq!(config.durability, Durability::Sync);
    assert_eq!(config.hint_size_max(1000), 100);
    assert!(config.budget(2).unwrap().sum() <= config.memory);
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let file = Flags::from_toml(
        "shards = 3\nmemory = \"1GiB\"\njoin = [\"a:1\", \"b:2\"]\ncores = \"0-1\"\nspin = 0",
    )
    .unwrap();
    let line = Line::try_parse_from(["annulus", "--shards", "1"]).unwrap();
    let config = Config::resolve(line.flags.or(file), &host()).unwrap();
    assert_eq!(config.shards, Some(1));
    assert_eq!(config.memory, 1 << 30);
    assert_eq!(config.join, ["a:1", "b:2"]);
    assert!(config.spin.is_zero());
    assert_eq!(config.weight, 100);
}

#[test]
fn room_for_others_is_bytes_or_a_part_of_the_disk() {
    for (line, bytes) in
        [("", 1 << 30), ("--hint-size-max 0", 0), ("--hint-size-max 64MiB", 64 << 20)]
    {
        assert_eq!(resolve(line).unwrap().hint_size_max(10 << 30), bytes, "{line}");
    }
    let file = Flags::from_toml("hint-size-max = \"50%\"").unwrap();
    assert_eq!(Config::resolve(file, &host()).unwrap().hint_size_max(1000), 500);
    assert!(refusal("--hint-size-max 101%").contains("10%"));
}

#[test]
fn every_option_is_a_flag_a_variable_and_a_key_of_one_name() {
    use clap::CommandFactory;
    let command = Line::command();
    for name in Flags::NAMES {
        let argument = command.get_arguments().find(|a| a.get_id() == name).unwrap();
        assert_eq!(argument.get_long(), Some(name.replace('_', "-").as_str()));
        let variable = format!("ANNULUS_{}", name.to_uppercase());
        assert_eq!(argument.get_env().unwrap(), variable.as_str());
        let help = argument.get_help().unwrap().to_string();
        let long = argument.get_long_help().map(ToString::to_string).unwrap_or(help);
        assert!(long.contains("[default:"), "{name}: {long}");
        let error = Flags::from_toml(&format!("{} = {{}}", name.replace('_', "-"))).unwrap_err();
        assert!(!error.contains("unknown field"), "{name}: {error}");
    }
}

#[test]
fn every_option_has_a_page() {
    let notes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tuning/notes");
    let index = std::fs::read_to_string(notes.join("README.md")).unwrap();
    for name in Flags::NAMES {
        let option = format!("`{}`", name.replace('_', "-"));
        let row = index.lines().find(|line| line.contains(&option)).expect(&option);
        let page = row.split(['(', ')']).nth(1).unwrap();
        let text = std::fs::read_to_string(notes.join(page)).unwrap();
        assert!(text.contains(&option), "{page} does not speak of {option}");
    }
}

#[test]
fn the_file_refuses_names_it_does_not_know_and_says_where() {
    let error = Flags::from_toml("memory = \"1GiB\"\nmemroy = \"2GiB\"\n").unwrap_err();
    assert!(error.contains("memroy") && error.contains("line 2"), "{error}");
    let error = Flags::from_toml("request-timeout = 5").unwrap_err();
    assert!(error.contains("lacks a unit"), "{error}");
}

#[test]
fn public_addresses_need_to_be_asked_for_by_name() {
    for option in ["listen", "peer-listen", "admin-listen"] {
        let error = refusal(&format!("--{option} 0.0.0.0:9000"));
        assert!(error.contains(option) && error.contains("--insecure-public"), "{error}");
        resolve(&format!("--{option} 0.0.0.0:9000 --insecure-public")).unwrap();
    }
    resolve("--listen [::1]:0 --peer-listen localhost:0 --admin-listen off").unwrap();
}

#[test]
fn the_engine_accepts_what_was_accepted_here() {
    for line in [
        "",
        "--durability periodic --periodic-window 5ms --memory 100MiB --shards 2",
        "--filter-bits 0 --background-rate 1MiB --disk-reserve 0 --value-size-max 16MiB",
        "--filter-bits 24 --segment-size 64KiB --table-size 64KiB --memtable-size 64KiB",
        "--block-size 512B --compression zstd --partition-bits 0 --cache-size 0",
    ] {
        let config = resolve(line).unwrap();
        for disk in [0, 1 << 30, 1 << 40] {
            let options = config.engine_options(config.shard_count(None), disk).unwrap();
            assert!(options.space.reserve <= disk / 64 || config.disk_reserve.is_some());
            assert!(options.log.pending_size_max > options.value_size_max);
        }
    }
}

#[test]
fn values_out_of_range_are_refused_with_the_range() {
    for (line, expected) in [
        ("--shards 0", "1 to 256"),
        ("--weight 0", "1 to 1000"),
        ("--partition-bits 17", "0 to 16"),
        ("--spin 1s", "0s to 1ms"),
        ("--block-size 1000", "multiple of 512"),
        ("--value-size-max 17MiB", "1B to 16MiB"),
        ("--segment-size 1000000B", "multiple of 4KiB"),
        ("--drain-timeout 10s", "0s to 9s"),
        ("--cores 7", "core 7"),
        ("--cores x", "list of cores"),
        ("--listen 7301", "HOST:PORT"),
        ("--listen 127.0.0.1:7302", "must differ"),
        ("--memory 20MiB", "does not suffice"),
        ("--rack a/b", "rack"),
        ("--join nowhere", "HOST:PORT"),
        ("--memory lots", "64MiB"),
    ] {
        let error = refusal(line);
        assert!(error.contains(expected), "{line}: {error}");
    }
}
