//! The swarm: tells stories of new seeds until told to stop. A failure prints one line to replay.
//!
//! ```text
//! swarm                     new seeds for ever, from the time of day
//! swarm --seeds 200         the first 200 seeds
//! swarm --seeds 200 --first 5000    200 seeds from that one on
//! swarm --seed 1234         one seed again
//! swarm --seconds 600       new seeds for ten minutes
//! swarm --story log         only stories of this kind: log, model, crash,
//!                           concurrent, faults, damage, cluster, namespaces, registers,
//!                           members
//! ```
//!
//! Invariant: a story is a function of its kind and its seed, so the printed line is all that is
//! needed. The exit code is 1 when any story failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use annulus_engine::sim::Chance;
use annulus_tests::cluster_story::ClusterStory;
use annulus_tests::concurrent_story;
use annulus_tests::engine_story::{self, CrashStory};
use annulus_tests::faults;
use annulus_tests::log_story::{self, LogStory};
use annulus_tests::workload::Mix;

/// A kind of story: its name and how a seed becomes one.
type Kind = (&'static str, fn(u64));

const KINDS: &[Kind] = &[
    ("log", tell_log),
    ("model", tell_model),
    ("crash", tell_crash),
    ("concurrent", tell_concurrent),
    ("faults", tell_faults),
    ("damage", tell_damage),
    ("cluster", tell_cluster),
    ("namespaces", tell_namespaces),
    ("registers", tell_registers),
    ("members", tell_members),
];

/// What is being told, for the line that a panic prints even where panics abort.
static SEED: AtomicU64 = AtomicU64::new(0);
static KIND: AtomicU64 = AtomicU64::new(0);

fn tell_log(seed: u64) {
    let mut chance = Chance::new(seed);
    let story = LogStory {
        seed,
        steps: chance.between(20, 600),
        image_one_in: chance.between(1, 60),
        faults: chance.one_in(2),
        periodic: chance.one_in(4),
    };
    log_story::tell(story);
}

/// A mix of operations that suits a seed: few keys or many, small values or large.
fn draw_mix(chance: &mut Chance, mix: Mix) -> Mix {
    Mix {
        key_count: [5, 40, 300, 2_000][chance.index(4)],
        value_size_max: [20, 300, 2_000][chance.index(3)],
        large_value: [500, 20_000, 200_000][chance.index(3)],
        ttl_one_in: chance.below(8),
        ..mix
    }
}

fn tell_model(seed: u64) {
    let mut chance = Chance::new(seed);
    let operations = chance.index(1_500) + 100;
    engine_story::tell_model(seed, operations, draw_mix(&mut chance, Mix::default()));
}

fn tell_crash(seed: u64) {
    let mut chance = Chance::new(seed);
    let mix = Mix { ttl_one_in: 0, ..draw_mix(&mut chance, Mix::script()) };
    let operations = chance.index(600) + 50;
    let image_one_in = chance.between(5, 80);
    engine_story::tell_crash(CrashStory { seed, operations, image_one_in, survivors: 2, mix });
}

fn tell_concurrent(seed: u64) {
    let mut chance = Chance::new(seed);
    let crashes = chance.one_in(2);
    let mut mix = draw_mix(&mut chance, Mix::script());
    // What expires while a crash is looked at would look like a loss.
    mix.ttl_one_in = if crashes { 0 } else { 6 };
    let image_one_in = if crashes { chance.between(10, 80) } else { u64::MAX };
    let operations = chance.index(2_000) + 100;
    let clients = chance.index(30) + 2;
    concurrent_story::tell(
        CrashStory { seed, operations, image_one_in, survivors: 1, mix },
        clients,
    );
}

fn tell_faults(seed: u64) {
    let mut chance = Chance::new(seed);
    let mut rules = faults::draw_rules(&mut chance);
    rules.extend(faults::draw_rules(&mut chance));
    let operations = chance.index(600) + 60;
    let mix = draw_mix(&mut chance, Mix::default());
    engine_story::tell_faults(seed, operations, mix, &rules);
}

fn tell_damage(seed: u64) {
    engine_story::tell_damage(seed, 8, |_| true);
}

fn tell_cluster(seed: u64) {
    if let Err(found) = ClusterStory::draw(seed).tell() {
        panic!("{found}");
    }
}

fn tell_members(seed: u64) {
    if let Err(found) = ClusterStory::draw_with_members(seed).tell() {
        panic!("{found}");
    }
}

fn tell_namespaces(seed: u64) {
    if let Err(found) = ClusterStory::draw_with_operators(seed).tell() {
        panic!("{found}");
    }
}

fn tell_registers(seed: u64) {
    if let Err(found) = ClusterStory::draw_registers(seed).tell() {
        panic!("{found}");
    }
}

/// What was asked for.
#[derive(Debug)]
struct Plan {
    first: u64,
    count: Option<u64>,
    until: Option<SystemTime>,
    kinds: Vec<usize>,
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Plan, String> {
    let now = now();
    let since = now.duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?;
    let mut plan = Plan {
        first: since.as_secs() << 20,
        count: None,
        until: None,
        kinds: (0..KINDS.len()).collect(),
    };
    let mut first = None;
    let mut arguments = arguments;
    while let Some(flag) = arguments.next() {
        let value = arguments.next().ok_or(format!("{flag} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|error| format!("{flag} {value}: {error}"));
        match flag.as_str() {
            "--seeds" => plan.count = Some(number()?),
            "--first" => first = Some(number()?),
            "--seed" => (first, plan.count) = (Some(number()?), Some(1)),
            "--seconds" => plan.until = Some(now + Duration::from_secs(number()?)),
            "--story" => {
                let named = KINDS.iter().position(|(name, _)| *name == value);
                plan.kinds = vec![named.ok_or(format!("no story is called {value}"))?];
            }
            _ => return Err(format!("{flag} is not known; see the head of swarm.rs")),
        }
    }
    // A counted batch is the same batch each time.
    plan.first = first.unwrap_or(if plan.count.is_some() { 0 } else { plan.first });
    Ok(plan)
}

#[expect(clippy::disallowed_methods, reason = "the swarm itself runs in real time")]
fn now() -> SystemTime {
    SystemTime::now()
}

fn replay_line() -> String {
    let (kind, seed) = (KIND.load(Ordering::Relaxed), SEED.load(Ordering::Relaxed));
    let name = usize::try_from(kind).ok().and_then(|kind| KINDS.get(kind)).map_or("?", |k| k.0);
    format!("FAILED: cargo run -p annulus-tests --bin swarm -- --story {name} --seed {seed}")
}

fn main() -> ExitCode {
    let plan = match parse(std::env::args().skip(1)) {
        Ok(plan) => plan,
        Err(problem) => {
            eprintln!("swarm: {problem}");
            return ExitCode::from(2);
        }
    };
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        println!("{}", replay_line());
    }));
    let (mut told, mut failed) = (0u64, 0u64);
    for seed in plan.first.. {
        let enough = plan.count.is_some_and(|count| seed - plan.first >= count);
        if enough || plan.until.is_some_and(|until| now() >= until) {
            break;
        }
        for kind in &plan.kinds {
            SEED.store(seed, Ordering::Relaxed);
            KIND.store(u64::try_from(*kind).expect("a few kinds"), Ordering::Relaxed);
            told += 1;
            failed += u64::from(catch_unwind(AssertUnwindSafe(|| KINDS[*kind].1(seed))).is_err());
        }
    }
    println!("{told} stories, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
