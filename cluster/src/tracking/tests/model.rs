//! The models behind replication, run against the code that does it: seen-sets, key states,
//! tracking, the merge of records; under loss, doubling, reordering, skewed clocks, crashes that
//! take the end of a log, slow guests, syncs from helpers that are behind, and purges at any time.
//!
//! The oracle keeps whole histories. For every rule there is the schedule without it, in which the
//! same checker must find what the rule prevents: a test that cannot fail proves nothing.
//!
//! # The rule of sync
//! The helper sends every record (filled) that holds a dot which the needy has not seen; it may
//! pass over all that is stamped at or below `needy.lacks(helper)`. The needy merges, and adopts
//! what the helper had seen when the first page began. Why nothing is lost: take a dot that is
//! adopted without its record. The helper has a later state of its key. Either that holds some
//! unseen dot, and was sent; or the needy has seen every dot of it, so it has merged a state at
//! least as late; or the helper has purged it, and then it was on the disk of the needy before.
//! A write that replaced a missed one was stamped after it, so it is not passed over either.

use world::{Counts, World};

mod judge;
mod node;
mod world;

/// Which kind of namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    LastWrite,
    Siblings,
}

/// When a tombstone may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purge {
    /// At or below the purge floor.
    Floor,
    /// With all its dots and its stripped vector below what is stable.
    Stable,
    /// Now.
    AtOnce,
    /// When every holder has seen it.
    DotEverywhere,
    /// The same, for key states: their vector is not looked at.
    DotOnly,
    /// At or below what holders know of each other; guests are not asked.
    Holders,
}

/// The rules of a schedule: those of the code, or without one of them.
#[derive(Clone, Copy, Debug)]
struct Rules {
    mode: Mode,
    purge: Purge,
    holders: u32,
    guests: u32,
    guest_percent: u64,
    keys: u8,
    loss_percent: u64,
    slow_percent: u64,
    slow_guests: bool,
    crash_percent: u64,
    quiet_sync_percent: u64,
    compares_always: bool,
    is_lively: bool,
    syncs: bool,
    knows_all: bool,
    fills: bool,
    announces_undurable: bool,
    reuses_sequences: bool,
    replicates_events: bool,
    adopts_last: bool,
    skips_by_newest: bool,
    voids_at_once: bool,
    takes_old_lives: bool,
    writes_with_gaps: bool,
}

const RULES: Rules = Rules {
    mode: Mode::LastWrite,
    purge: Purge::Floor,
    holders: 3,
    guests: 2,
    guest_percent: 20,
    keys: 3,
    loss_percent: 20,
    slow_percent: 5,
    slow_guests: false,
    crash_percent: 0,
    quiet_sync_percent: 30,
    compares_always: false,
    is_lively: true,
    syncs: true,
    knows_all: false,
    fills: true,
    announces_undurable: false,
    reuses_sequences: false,
    replicates_events: false,
    adopts_last: false,
    skips_by_newest: false,
    voids_at_once: false,
    takes_old_lives: false,
    writes_with_gaps: false,
};

const SIBLINGS: Rules = Rules { mode: Mode::Siblings, ..RULES };

/// So long is searched for what a missing rule leads to.
const SEARCHED: u64 = 5000;

/// Runs schedules; gives what was wrong with each bad one.
fn run(rules: Rules, schedules: u64, steps: usize) -> (Vec<String>, Counts) {
    let mut bad = vec![];
    let mut sum = Counts::default();
    for seed in 0..schedules {
        let mut world = World::new(seed, rules);
        if let Err(what) = world.run(steps) {
            bad.push(format!("seed {seed}: {what}"));
        }
        let counts = &world.counts;
        sum.purged += counts.purged;
        sum.synced += counts.synced;
        sum.skipped += counts.skipped;
        sum.dropped += counts.dropped;
        sum.voided += counts.voided;
        sum.crashed += counts.crashed;
        sum.compared += counts.compared;
    }
    println!("{} of {schedules} are wrong, {sum:?}", bad.len());
    (bad, sum)
}

/// Nothing is wrong, and what should be tried was tried.
fn holds(rules: Rules, schedules: u64) -> Counts {
    let (bad, counts) = run(rules, schedules, 160);
    assert!(bad.is_empty(), "{} of {schedules} schedules, the first: {}", bad.len(), bad[0]);
    assert!(counts.purged > schedules / 2 && counts.synced > schedules / 4, "{counts:?}");
    counts
}

/// Nothing is wrong at the end, though not everything came to one.
fn holds_quietly(rules: Rules, schedules: u64) {
    let (bad, counts) = run(Rules { is_lively: false, ..rules }, schedules, 160);
    assert!(bad.is_empty(), "{} of {schedules} schedules, the first: {}", bad.len(), bad[0]);
    assert!(counts.purged > schedules / 2, "{counts:?}");
}

/// The checker finds what the missing rule prevents.
fn fails(rules: Rules) {
    let rules = Rules { is_lively: false, ..rules };
    let found = (0..SEARCHED).find_map(|seed| World::new(seed, rules).run(160).err());
    assert!(found.is_some(), "nothing found in {SEARCHED} schedules: is the rule needed?");
}

#[test]
fn plain_writes_converge_and_deletes_stay_deleted() {
    let counts = holds(RULES, 400);
    assert!(counts.dropped > 100, "guests must have been done: {counts:?}");
}

#[test]
fn siblings_converge_and_deletes_stay_deleted() {
    holds(SIBLINGS, 400);
}

#[test]
fn siblings_may_be_purged_by_what_is_stable() {
    holds(Rules { purge: Purge::Stable, ..SIBLINGS }, 300);
}

#[test]
fn five_holders_converge() {
    holds(Rules { holders: 5, guests: 1, ..RULES }, 100);
    holds(Rules { holders: 5, guests: 1, ..SIBLINGS }, 100);
}

#[test]
fn slow_guests_hold_back_the_purge_and_lose_nothing() {
    holds(Rules { slow_guests: true, guest_percent: 40, ..RULES }, 200);
    holds(Rules { slow_guests: true, guest_percent: 40, ..SIBLINGS }, 200);
}

#[test]
fn crashes_lose_nothing_that_was_durable_somewhere() {
    let crashes = Rules { crash_percent: 70, ..RULES };
    assert!(holds(crashes, 300).voided > 300);
    holds(Rules { mode: Mode::Siblings, ..crashes }, 300);
    // The gap of a guest is never void, so what is stable ends before it: the floor does not.
    holds_quietly(Rules { mode: Mode::Siblings, purge: Purge::Stable, ..crashes }, 300);
}

#[test]
fn equal_seen_is_equal_data() {
    for mode in [Mode::LastWrite, Mode::Siblings] {
        let rules = Rules { mode, compares_always: true, loss_percent: 10, ..RULES };
        assert!(holds(rules, 150).compared > 1000);
    }
}

#[test]
fn without_fill_replicas_diverge() {
    // Every message arrives, late; syncs would hide it.
    let late = Rules { slow_percent: 50, loss_percent: 0, keys: 2, guests: 0, ..SIBLINGS };
    let rules =
        Rules { syncs: false, knows_all: true, guest_percent: 0, purge: Purge::Stable, ..late };
    holds_quietly(rules, 300);
    fails(Rules { fills: false, ..rules });
}

#[test]
fn tombstones_purged_at_once_let_old_values_back() {
    fails(Rules { purge: Purge::AtOnce, ..RULES });
    fails(Rules { purge: Purge::AtOnce, ..SIBLINGS });
}

#[test]
fn that_all_have_the_tombstone_is_not_enough_where_the_last_write_wins() {
    fails(Rules { purge: Purge::DotEverywhere, knows_all: true, ..RULES });
}

#[test]
fn that_all_have_the_tombstones_dot_is_not_enough_for_siblings() {
    fails(Rules { purge: Purge::DotOnly, knows_all: true, ..SIBLINGS });
}

#[test]
fn without_the_promises_of_guests_their_late_writes_come_back() {
    fails(Rules { purge: Purge::Holders, slow_guests: true, guest_percent: 40, ..RULES });
}

#[test]
fn announcing_what_is_not_durable_brings_back_purged_values() {
    let rules = Rules { crash_percent: 25, keys: 2, guests: 0, guest_percent: 0, ..RULES };
    let rules = Rules { quiet_sync_percent: 2, ..rules };
    holds(rules, 200);
    fails(Rules { announces_undurable: true, ..rules });
}

#[test]
fn a_sequence_used_again_after_a_crash_loses_a_write() {
    fails(Rules { reuses_sequences: true, crash_percent: 70, ..RULES });
}

#[test]
fn writes_sent_as_events_are_lost() {
    fails(Rules { replicates_events: true, ..SIBLINGS });
}

#[test]
fn adopting_the_set_of_the_last_page_loses_what_came_behind_the_cursor() {
    fails(Rules { adopts_last: true, keys: 12, loss_percent: 40, ..RULES });
}

#[test]
fn passing_over_states_by_their_newest_dot_loses_the_others() {
    fails(Rules { skips_by_newest: true, ..SIBLINGS });
}

#[test]
fn a_gap_declared_void_without_asking_loses_what_others_have() {
    fails(Rules { voids_at_once: true, crash_percent: 70, ..RULES });
}

#[test]
fn siblings_written_by_who_does_not_know_all_his_own_writes_drop_those() {
    fails(Rules { writes_with_gaps: true, crash_percent: 70, ..SIBLINGS });
    let guests = Rules { guests: 1, guest_percent: 50, ..SIBLINGS };
    fails(Rules { writes_with_gaps: true, ..guests });
}

#[test]
fn a_message_of_an_earlier_life_after_the_void_splits_the_replicas() {
    let rules =
        Rules { crash_percent: 50, slow_percent: 90, loss_percent: 0, guests: 0, ..SIBLINGS };
    let rules = Rules { guest_percent: 0, ..rules };
    holds(rules, 200);
    fails(Rules { takes_old_lives: true, ..rules });
}
