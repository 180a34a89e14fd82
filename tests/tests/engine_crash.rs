//! T1, T3, T5, T7: a crash at every change of the disk; see `engine_story.rs`.

use annulus_tests::engine_story::{CrashStory, tell_crash};
use annulus_tests::workload::Mix;

#[test]
fn a_crash_at_every_change_of_a_short_script() {
    let story =
        CrashStory { seed: 1, operations: 200, image_one_in: 1, survivors: 4, mix: Mix::script() };
    let images = tell_crash(story);
    println!("{images:?}");
    assert!(images.checked > 1_000 && images.cut > 50, "{images:?}");
}

#[test]
fn crashes_of_longer_scripts_with_much_compaction() {
    for seed in 10..16 {
        println!("seed {seed}");
        let mix = Mix { value_size_max: 1_500, ..Mix::script() };
        tell_crash(CrashStory { seed, operations: 900, image_one_in: 40, survivors: 1, mix });
    }
}
