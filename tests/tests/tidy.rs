//! The house rules that no compiler checks: layering, headers, forbidden words, dependencies.
//!
//! Each test reads the sources as text. What is forbidden is looked for in code only: comments
//! and literals are blanked out first (`code_of`). A rule that is in your way is changed here,
//! with its reason, in the commit that needs it.

#![expect(clippy::unwrap_used, reason = "a test that cannot read the sources fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files longer than this are reported: look for the second idea in them.
const LINES_REPORTED: usize = 600;

/// Which crates of the workspace a crate may depend on. `tests` and `bench` may use all.
const LAYERS: &[(&str, &[&str])] = &[
    ("annulus-engine", &[]),
    ("annulus-net", &["annulus-engine"]),
    ("annulus-cluster", &["annulus-engine", "annulus-net"]),
    ("annulus-tuning", &["annulus-engine"]),
    ("annulus", &["annulus-engine", "annulus-net", "annulus-cluster", "annulus-tuning"]),
];

/// Every direct dependency, with its licence. A new one needs a line here and a reason in the
/// workspace's `Cargo.toml`.
const DEPENDENCIES: &[(&str, &str)] = &[
    ("ahash", "MIT OR Apache-2.0"),
    ("axum", "MIT"),
    ("base64", "MIT OR Apache-2.0"),
    ("bytemuck", "Zlib OR Apache-2.0 OR MIT"),
    ("clap", "MIT OR Apache-2.0"),
    ("core_affinity", "MIT OR Apache-2.0"),
    ("crc32c", "Apache-2.0 OR MIT"),
    ("criterion", "Apache-2.0 OR MIT"),
    ("crossbeam-queue", "MIT OR Apache-2.0"),
    ("futures-channel", "MIT OR Apache-2.0"),
    ("futures-util", "MIT OR Apache-2.0"),
    ("glommio", "Apache-2.0 OR MIT"),
    ("hdrhistogram", "MIT OR Apache-2.0"),
    ("humantime", "MIT OR Apache-2.0"),
    ("hyper", "MIT"),
    ("hyper-util", "MIT"),
    ("indicatif", "MIT"),
    ("io-uring", "MIT OR Apache-2.0"),
    ("libc", "MIT OR Apache-2.0"),
    ("lz4_flex", "MIT"),
    ("mio", "MIT"),
    ("proptest", "MIT OR Apache-2.0"),
    ("serde", "MIT OR Apache-2.0"),
    ("serde_json", "MIT OR Apache-2.0"),
    ("sha2", "MIT OR Apache-2.0"),
    ("signal-hook", "MIT OR Apache-2.0"),
    ("socket2", "MIT OR Apache-2.0"),
    ("tempfile", "MIT OR Apache-2.0"),
    ("thiserror", "MIT OR Apache-2.0"),
    ("tokio", "MIT"),
    ("toml", "MIT OR Apache-2.0"),
    ("tracing", "MIT"),
    ("tracing-subscriber", "MIT"),
    ("twox-hash", "MIT"),
    ("zstd", "BSD-3-Clause"),
];

/// Licences that anything we build with, however deep, may be under.
const LICENCES: &[&str] = &[
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Packages under other licences, each with the reason why it may stay.
const LICENCE_EXCEPTIONS: &[(&str, &str)] = &[
    // Below glommio. File-level copyleft: binds changes of its own files, which we do not make.
    ("bitmaps", "MPL-2.0+"),
];

/// Places that may name the executor and the kernel interface.
const URING_PLACES: &[&str] =
    &["engine/src/driver/", "net/src/driver/", "src/serve.rs", "src/main.rs"];

struct Source {
    /// From the workspace's root, with `/`.
    path: String,
    text: String,
}

impl Source {
    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }
}

fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("tests lies in the workspace").to_owned()
}

fn sources() -> Vec<Source> {
    let (root, mut found) = (root(), Vec::new());
    let mut dirs = vec![root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    dirs.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                found.push(Source { path: relative, text: fs::read_to_string(&path).unwrap() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 50, "the sources are somewhere else");
    found
}

/// The text with comments and the insides of string literals blanked out, lines kept.
fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    let blank = |code: &mut String, part: &[u8]| {
        code.extend(part.iter().map(|byte| if *byte == b'\n' { '\n' } else { ' ' }));
    };
    while at < bytes.len() {
        let rest = &bytes[at..];
        let skipped = if rest.starts_with(b"//") {
            rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            find(rest, b"*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(hashes) = raw_string(bytes, at) {
            let open = hashes + 2;
            let close = [&b"\""[..], &b"#".repeat(hashes)].concat();
            find(&rest[open..], &close).map_or(rest.len(), |end| open + end + close.len())
        } else if rest[0] == b'"' {
            string_len(rest)
        } else if rest.starts_with(b"'\\") {
            rest[2..].iter().skip(1).position(|byte| *byte == b'\'').map_or(1, |end| end + 4)
        } else if rest.starts_with(b"'\"'") {
            3
        } else {
            0
        };
        if skipped > 0 {
            blank(&mut code, &rest[..skipped]);
            at += skipped;
        } else {
            code.push(if rest[0].is_ascii() { char::from(rest[0]) } else { ' ' });
            at += 1;
        }
    }
    code
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// Number of hashes of the raw string that begins at `at`, if one does.
fn raw_string(bytes: &[u8], at: usize) -> Option<usize> {
    let after_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if bytes[at] != b'r' || (after_word && bytes[at - 1] != b'b') {
        return None;
    }
    let hashes = bytes[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    (bytes.get(at + 1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn string_len(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// Line numbers, from 1, on which the code has `word` as a whole word.
fn lines_with(code: &str, word: &str) -> Vec<usize> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let has = |line: &str| {
        line.match_indices(word).any(|(at, found)| {
            let before = line[..at].chars().next_back();
            let after = line[at + found.len()..].chars().next();
            let goes_on_before = before.is_some_and(is_word) && word.starts_with(is_word);
            let goes_on_after = after.is_some_and(is_word) && word.ends_with(is_word);
            !goes_on_before && !goes_on_after
        })
    };
    code.lines().enumerate().filter(|(_, line)| has(line)).map(|(index, _)| index + 1).collect()
}

/// Everything found of what must not be there, one line each.
fn violations(
    chosen: impl Fn(&Source) -> bool,
    words: &[&str],
    allowed: impl Fn(&Source, usize) -> bool,
) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| chosen(source)) {
        let code = code_of(&source.text);
        for word in words {
            for line in lines_with(&code, word) {
                if !allowed(source, line) {
                    found.push(format!("{}:{line}: {word}", source.path));
                }
            }
        }
    }
    found
}

fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

fn manifest(path: &str) -> toml::Table {
    let text = fs::read_to_string(root().join(path)).unwrap();
    text.parse().unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn member_manifests() -> Vec<(String, toml::Table)> {
    let workspace = manifest("Cargo.toml");
    let members = workspace["workspace"]["members"].as_array().unwrap();
    let mut manifests = vec![("Cargo.toml".to_owned(), workspace.clone())];
    for member in members {
        let path = format!("{}/Cargo.toml", member.as_str().unwrap());
        manifests.push((path.clone(), manifest(&path)));
    }
    manifests
}

/// Dependencies of all kinds, by the table they stand in.
fn dependencies(manifest: &toml::Table) -> Vec<(String, String, toml::Value)> {
    let mut found = Vec::new();
    for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
        if let Some(entries) = manifest.get(table).and_then(toml::Value::as_table) {
            found.extend(
                entries.iter().map(|(name, how)| (table.to_owned(), name.clone(), how.clone())),
            );
        }
    }
    found
}

fn package_name(manifest: &toml::Table) -> String {
    manifest["package"]["name"].as_str().unwrap().to_owned()
}

#[test]
fn crates_depend_downwards_only() {
    let layers: BTreeMap<_, _> = LAYERS.iter().copied().collect();
    let mut found = Vec::new();
    for (path, manifest) in member_manifests() {
        let Some(allowed) = layers.get(package_name(&manifest).as_str()) else { continue };
        for (table, name, _) in dependencies(&manifest) {
            if name.starts_with("annulus") && !allowed.contains(&name.as_str()) {
                found.push(format!("{path}: {table}: {name}"));
            }
        }
    }
    assert_none("a crate may use only what lies below it", &found);
}

#[test]
fn only_crates_with_drivers_may_have_the_executor() {
    for (path, manifest) in member_manifests() {
        let name = package_name(&manifest);
        for (_, dependency, how) in dependencies(&manifest) {
            if dependency != "glommio" && dependency != "io-uring" {
                continue;
            }
            let allowed = ["annulus", "annulus-engine", "annulus-net"].contains(&name.as_str());
            assert!(allowed, "{path}: {dependency}");
            let optional = how.get("optional").and_then(toml::Value::as_bool);
            assert_eq!(optional, Some(true), "{path}: {dependency} must be optional");
        }
    }
}

#[test]
fn versions_and_reasons_stand_in_the_workspace() {
    let mut found = Vec::new();
    for (path, manifest) in member_manifests() {
        for (table, name, how) in dependencies(&manifest) {
            if how.get("workspace").and_then(toml::Value::as_bool) != Some(true) {
                found.push(format!("{path}: {table}: {name} has a version of its own"));
            }
        }
    }
    let text = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = text.split("[workspace.dependencies]").nth(1).unwrap();
    let section = section.split("\n[").next().unwrap();
    for line in section.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let name = line.split([' ', '=']).next().unwrap();
        if name.starts_with("annulus") {
            if !line.contains("default-features = false") {
                found.push(format!("Cargo.toml: {name} needs default-features = false"));
            }
        } else if line.rsplit_once('#').is_none_or(|(_, reason)| reason.trim().len() < 10) {
            found.push(format!("Cargo.toml: {name} has no reason beside it"));
        }
    }
    assert_none("one place for versions and reasons", &found);
}

#[test]
fn every_direct_dependency_is_on_the_list_and_no_line_of_the_list_is_stale() {
    let workspace = manifest("Cargo.toml");
    let used: Vec<&String> = workspace["workspace"]["dependencies"]
        .as_table()
        .unwrap()
        .keys()
        .filter(|name| !name.starts_with("annulus"))
        .collect();
    let listed: Vec<&str> = DEPENDENCIES.iter().map(|(name, _)| *name).collect();
    let missing: Vec<String> = used
        .iter()
        .filter(|name| !listed.contains(&name.as_str()))
        .map(ToString::to_string)
        .collect();
    assert_none("dependencies without a line in tidy.rs", &missing);
    let stale: Vec<String> = listed
        .iter()
        .filter(|name| !used.iter().any(|used| used == *name))
        .map(ToString::to_string)
        .collect();
    assert_none("lines in tidy.rs without a dependency", &stale);
}

#[test]
fn everything_we_build_with_has_a_permissive_licence() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--locked", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .expect("cargo runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let in_use: Vec<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["id"].as_str().unwrap())
        .collect();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        if !in_use.contains(&package["id"].as_str().unwrap()) {
            continue;
        }
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        if !is_permissive(licence) && !LICENCE_EXCEPTIONS.contains(&(name, licence)) {
            found.push(format!("{name}: {licence}"));
        }
        if let Some((_, listed)) = DEPENDENCIES.iter().find(|(listed, _)| *listed == name)
            && alternatives(listed) != alternatives(licence)
        {
            found.push(format!("{name}: tidy.rs says {listed}, the package says {licence}"));
        }
    }
    assert_none("licences", &found);
}

/// The alternatives of a licence expression, sorted; `/` is how `OR` used to be written.
fn alternatives(licence: &str) -> Vec<String> {
    let flat = licence.replace(['(', ')'], " ").replace('/', " OR ");
    let mut parts: Vec<String> = flat.split(" OR ").map(|part| part.trim().to_owned()).collect();
    parts.sort();
    parts
}

/// Whether one alternative has only listed licences in it. Brackets bind `OR` tighter than `AND`
/// in the few expressions that mix them, so each bracket must then have a listed alternative.
fn is_permissive(licence: &str) -> bool {
    if licence.contains('(') {
        return licence
            .split(" AND ")
            .all(|part| is_permissive(part.trim().trim_start_matches('(').trim_end_matches(')')));
    }
    alternatives(licence)
        .iter()
        .any(|part| part.split(" AND ").all(|one| LICENCES.contains(&one.trim())))
}

#[test]
fn the_executor_and_the_kernel_interface_are_named_in_their_places_only() {
    let found = violations(
        |source| !source.is_in(URING_PLACES) && !source.is_in(&["bench/rivals/"]),
        &["glommio", "io_uring"],
        |_, _| false,
    );
    assert_none("only drivers and the start-up know what drives us", &found);
}

#[test]
fn pure_crates_read_no_clock_draw_no_chance_and_do_no_io() {
    let words = [
        "Instant::now",
        "SystemTime",
        "std::fs",
        "std::net",
        "std::thread",
        "std::time",
        "async",
        "rand",
        "unsafe",
    ];
    let found = violations(|source| source.is_in(&["cluster/src/"]), &words, |_, _| false);
    assert_none("cluster is state machines", &found);
}

#[test]
fn net_opens_no_file_and_awaits_in_its_places_only() {
    let found = violations(
        |source| source.is_in(&["net/src/"]) && !source.is_in(&["net/src/driver/"]),
        &["std::fs", "SystemTime::now", "Instant::now"],
        // The blocking client is its own runtime, in its own threads.
        |source, _| source.is_in(&["net/src/client"]),
    );
    assert_none("net's logic is sans-I/O", &found);
    let places = ["net/src/driver/", "net/src/transport.rs", "net/src/client"];
    let found = violations(
        |source| source.is_in(&["net/src/"]) && !source.is_in(&places),
        &["async", "await"],
        |_, _| false,
    );
    assert_none("net awaits in client, transport and drivers only", &found);
}

#[test]
fn the_engine_knows_neither_sockets_nor_clocks_nor_files() {
    let found = violations(
        |source| source.is_in(&["engine/src/"]) && !source.is_in(&["engine/src/driver/"]),
        &["std::net", "std::fs", "std::thread", "Instant::now", "SystemTime", "thread_rng"],
        |_, _| false,
    );
    assert_none("the engine sees the world through Disk and Runtime", &found);
}

#[test]
fn net_and_cluster_use_only_the_lower_modules_meant_for_them() {
    let mut found = Vec::new();
    for source in sources() {
        let allowed: &[(&str, &[&str])] = if source.is_in(&["net/src/driver/"]) {
            continue;
        } else if source.is_in(&["net/src/"]) {
            &[("annulus_engine", &["model", "runtime"])]
        } else if source.is_in(&["cluster/src/"]) {
            &[("annulus_engine", &["model"]), ("annulus_net", &["wire"])]
        } else {
            continue;
        };
        for (index, line) in code_of(&source.text).lines().enumerate() {
            for (name, modules) in allowed {
                for (at, _) in line.match_indices(&format!("{name}::")) {
                    let rest = &line[at + name.len() + 2..];
                    if !modules.iter().any(|module| rest.starts_with(module)) {
                        found.push(format!("{}:{}: {}", source.path, index + 1, line.trim()));
                    }
                }
            }
        }
    }
    assert_none("a crate uses of the lower ones what its layer allows", &found);
}

#[test]
fn every_file_opens_with_what_it_is() {
    let found: Vec<String> = sources()
        .into_iter()
        .filter(|source| {
            let first = source.text.lines().next().unwrap_or("");
            !first.starts_with("//! ") || first.len() < 20
        })
        .map(|source| source.path)
        .collect();
    assert_none("files without a //! sentence", &found);
}

#[test]
fn nothing_is_left_undone_skipped_or_silenced() {
    let words = ["todo!", "unimplemented!", "#[ignore", "#[allow(", "#![allow(", "dbg!"];
    // Compiled into each bench, which uses a part of it: what is unused differs from one to the
    // next, and `expect` would fail where nothing is.
    let shared = ["bench/benches/common/"];
    let found = violations(|source| !source.is_in(&shared), &words, |_, _| false);
    assert_none("forbidden", &found);
}

#[test]
fn net_is_safe_outside_its_drivers() {
    let found = violations(
        |source| source.is_in(&["net/src/"]) && !source.is_in(&["net/src/driver/"]),
        &["unsafe"],
        |_, _| false,
    );
    assert_none("unsafe outside net's drivers", &found);
}

#[test]
fn long_files_are_reported() {
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > LINES_REPORTED {
            println!("{}: {lines} lines: is there a second idea in it?", source.path);
        }
    }
}

#[test]
fn the_scanner_sees_code_only() {
    let text =
        "let a = \"todo!\"; // todo!\n/* todo! */ let b = r#\"todo!\"#; let c = '\"'; todo!()";
    assert_eq!(lines_with(&code_of(text), "todo!"), [2]);
    assert!(lines_with("use strand::x;", "rand").is_empty());
    assert_eq!(lines_with("let q = '\\n'; rand()", "rand"), [1]);
}
