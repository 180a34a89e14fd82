//! T11, T12, T14 to T16, T18: failing operations, a full disk, damaged, missing and foreign files.
//! The answer is right or a clear error; never wrong, never "absent" for what is there.

use annulus_engine::options::SpaceOptions;
use annulus_engine::sim::{Chance, Fault, Op, Rule};
use annulus_tests::engine_story::{
    single_faults, tell_damage, tell_faults, tell_foreign, tell_full,
};
use annulus_tests::workload::Mix;

fn mix() -> Mix {
    Mix { value_size_max: 900, weights: [20, 50, 10, 2, 2, 1, 2, 2, 2, 1], ..Mix::default() }
}

#[test]
fn one_failing_operation_of_each_kind_costs_nothing_acknowledged() {
    for nth in [1, 2, 3, 5, 9, 17, 40] {
        for (index, rule) in single_faults(nth).into_iter().enumerate() {
            println!("nth {nth} rule {index}: {rule:?}");
            tell_faults(nth, 240, mix(), &[rule]);
        }
    }
}

#[test]
fn an_operation_that_fails_for_ever_stops_what_needs_it_and_nothing_else() {
    for op in [Op::Read, Op::Write, Op::Sync, Op::SyncDir, Op::Rename, Op::Open, Op::Remove] {
        for place in ["table", "log", "MANIFEST"] {
            println!("{op:?} on {place}");
            let rule = Rule::nth(op, 2, Fault::Eio).on(place).forever();
            tell_faults(7, 240, mix(), &[rule]);
        }
    }
}

#[test]
fn several_mishaps_in_one_life() {
    for seed in 0..25 {
        println!("seed {seed}");
        let mut chance = Chance::new(seed);
        let rules: Vec<Rule> =
            (0..3).flat_map(|_| annulus_tests::faults::draw_rules(&mut chance)).collect();
        tell_faults(seed, 240, mix(), &rules);
    }
}

#[test]
fn damage_of_any_file_is_an_error_or_harmless_never_a_wrong_answer() {
    for kind in ["table/", "log/", "MANIFEST", "IDENTITY", "WARM"] {
        let verdicts = tell_damage(3, 60, |path| path.to_string_lossy().contains(kind));
        println!("{kind}: {verdicts:?}");
        assert!(verdicts.struck > 0, "{kind}: nothing was damaged");
    }
}

#[test]
fn files_in_wrong_places_are_refused_or_harmless() {
    let verdicts = tell_foreign(3);
    println!("{verdicts:?}");
    assert!(verdicts.struck >= 5 && verdicts.refused + verdicts.partial > 0, "{verdicts:?}");
}

#[test]
fn a_full_disk_refuses_writes_and_goes_on_when_space_returns() {
    for seed in 0..4 {
        println!("seed {seed}, space is kept back");
        let space =
            SpaceOptions { pace_below: 400 << 10, refuse_below: 300 << 10, reserve: 150 << 10 };
        tell_full(seed, space);
    }
}

#[test]
fn a_disk_that_gets_full_to_the_last_byte_loses_nothing() {
    for seed in 10..14 {
        println!("seed {seed}");
        tell_full(seed, SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 });
    }
}
