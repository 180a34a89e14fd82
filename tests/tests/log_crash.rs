//! T1, T3, T5, T7, T14 to T16 for the commit log; see `log_story.rs`.

use annulus_tests::log_story::{LogStory, tell};

#[test]
fn a_crash_at_any_change_costs_nothing_acknowledged_and_leaves_no_hole() {
    for seed in 0..12 {
        println!("seed {seed}");
        tell(LogStory { seed, steps: 60, image_one_in: 1, faults: false, periodic: false });
    }
}

#[test]
fn many_lives_of_a_busy_log_are_read_back() {
    for seed in 100..140 {
        println!("seed {seed}");
        tell(LogStory { seed, steps: 400, image_one_in: 40, faults: false, periodic: false });
    }
}

#[test]
fn a_failing_disk_poisons_the_log_and_costs_nothing_acknowledged() {
    for seed in 200..260 {
        println!("seed {seed}");
        tell(LogStory { seed, steps: 200, image_one_in: 15, faults: true, periodic: false });
    }
}

#[test]
fn a_segment_that_could_not_be_opened_hides_nothing_behind_it() {
    // The name was there, the open after it failed, and the log went on in the segment behind:
    // replay took the empty segment for the end and gave up twelve acknowledged records.
    tell(LogStory { seed: 211, steps: 200, image_one_in: 15, faults: true, periodic: false });
}

#[test]
fn a_periodic_log_keeps_what_it_has_synced_and_loses_only_the_newest() {
    for seed in 300..320 {
        println!("seed {seed}");
        tell(LogStory {
            seed,
            steps: 200,
            image_one_in: 10,
            faults: seed % 2 == 0,
            periodic: true,
        });
    }
}

#[test]
fn a_periodic_log_never_spins_on_a_deadline_that_it_cannot_act_on() {
    // Seed 301: the deadline of the mark for quiet times had passed while records waited for
    // theirs, and the writer polled the clock without ever yielding: the shard hung.
    tell(LogStory { seed: 301, steps: 200, image_one_in: 50, faults: false, periodic: true });
}

#[test]
fn a_periodic_log_that_was_closed_cleanly_is_found_closed() {
    // Seed 1882389721645114: a mark of the quiet time was written without a sync, the close
    // record behind it with one; the power cut took the mark, and the close was not found.
    let seed = 1_882_389_721_645_114;
    tell(LogStory { seed, steps: 267, image_one_in: 56, faults: false, periodic: true });
}
