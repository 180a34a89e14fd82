//! Random operations on one shard against the model; see `engine_story.rs`.

use annulus_tests::engine_story::tell_model;
use annulus_tests::workload::Mix;

#[test]
fn every_answer_is_what_the_model_says() {
    for seed in 0..12 {
        println!("seed {seed}");
        tell_model(seed, 1_500, Mix::default());
    }
}

#[test]
fn few_hot_keys_with_many_versions() {
    for seed in 100..106 {
        println!("seed {seed}");
        tell_model(seed, 1_500, Mix { key_count: 6, ..Mix::default() });
    }
}

#[test]
fn many_keys_in_many_tables() {
    for seed in 200..203 {
        println!("seed {seed}");
        let mix = Mix { key_count: 2_000, value_size_max: 900, ..Mix::default() };
        tell_model(seed, 3_000, mix);
    }
}

#[test]
fn values_that_expire_everywhere() {
    for seed in 300..306 {
        println!("seed {seed}");
        tell_model(seed, 1_200, Mix { ttl_one_in: 1, ..Mix::default() });
    }
}
