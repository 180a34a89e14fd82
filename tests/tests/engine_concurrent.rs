//! Many clients at once on one shard; see `concurrent_story.rs`.

use annulus_tests::concurrent_story::tell;
use annulus_tests::engine_story::CrashStory;
use annulus_tests::workload::Mix;

#[test]
fn reads_and_scans_never_go_back_while_tables_come_and_go() {
    for seed in 0..8 {
        println!("seed {seed}");
        let mix = Mix { key_count: 60, value_size_max: 1_200, ttl_one_in: 8, ..Mix::script() };
        tell(CrashStory { seed, operations: 2_000, image_one_in: u64::MAX, survivors: 1, mix }, 12);
    }
}

#[test]
fn a_crash_among_many_clients_costs_nothing_acknowledged() {
    for seed in 20..26 {
        println!("seed {seed}");
        let mix = Mix { key_count: 40, value_size_max: 800, ..Mix::script() };
        let images =
            tell(CrashStory { seed, operations: 800, image_one_in: 25, survivors: 1, mix }, 16);
        assert!(images.checked > 5, "{images:?}");
    }
}
