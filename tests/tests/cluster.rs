//! Whole nodes in the simulated world, a fixed set of seeds; see `cluster_story.rs`.

use annulus_tests::cluster_story::ClusterStory;

#[test]
fn promises_hold_whatever_befalls_the_nodes() {
    let mut answered = 0;
    for seed in 0..60 {
        match ClusterStory::draw(seed).tell() {
            Ok(told) => answered += told.answered,
            Err(found) => panic!("{found}"),
        }
    }
    assert!(answered > 5_000, "{answered}");
}

#[test]
fn the_same_seed_gives_the_same_story() {
    for seed in [3, 8] {
        let story = ClusterStory::draw(seed);
        assert_eq!(story.tell(), story.tell());
    }
}
