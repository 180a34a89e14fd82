//! Rounds between replicas: nothing is said of equal ones, and of others no more than differs.

use annulus_engine::model::{Record, Token, WallMicros};
use proptest::prelude::*;

use super::world::{PARTITION, World, quick};
use super::*;
use crate::repair::{RepairOptions, ScrubOptions, Suspicion};

/// The data of a replica is changed behind its back, and its tree read anew.
fn damage(world: &mut World, at: usize, change: impl Fn(&mut World, usize, Token)) -> Vec<Token> {
    let tokens: Vec<Token> = world.replicas[at].data.keys().copied().collect();
    let chosen: Vec<Token> = tokens.into_iter().filter(|_| world.roll(10) == 0).collect();
    for token in &chosen {
        change(world, at, *token);
        world.replicas[at].repairer.touch(*token);
    }
    chosen
}

fn lose(world: &mut World, at: usize, token: Token) {
    world.replicas[at].data.remove(&token);
}

fn age(world: &mut World, at: usize, token: Token) {
    let record = world.replicas[at].data.get_mut(&token).unwrap();
    record.timestamp.0 -= 1;
    record.value = b"an older write".to_vec();
}

#[test]
fn equal_replicas_compare_their_roots_and_read_nothing() {
    let mut world = World::new(&[0, 0], quick(), 1);
    (0..300).for_each(|key| world.write_everywhere(key));
    world.run(100);
    for replica in &world.replicas {
        let status = replica.repairer.status();
        assert!(status.equal >= 1 && status.rounds == status.equal, "{status:?}");
        assert_eq!((status.pairs, status.checked, status.differing), (1, 1, 0));
        assert_eq!((replica.scans, replica.faults), (0, 0));
        let round = replica.repairer.last_rounds().next().unwrap();
        // A question and an answer with the root's 16 bytes.
        assert!(round.bytes <= 120, "{}", round.bytes);
        assert_eq!(round.outcome, Outcome::Equal);
    }
}

#[test]
fn lost_and_old_records_are_found_and_repaired_over_a_bad_network() {
    for seed in 0..8 {
        // Trees of 1, 16 and 256 leaves.
        let mut world = World::new(&[500, 8_000, 100_000], quick(), seed);
        (0..2_000).for_each(|key| world.write_everywhere(key));
        world.run(60);
        let lost = damage(&mut world, 0, lose).len() + damage(&mut world, 1, age).len();
        assert!(lost > 0 && !world.agrees());
        (world.lost, world.doubled, world.delay_max) = (20, 20, 500_000_000);
        world.run(900);
        assert!(world.agrees(), "seed {seed}");
        assert!(world.faults() > 0);
        (world.lost, world.doubled) = (0, 0);
        world.run(200);
        for replica in &world.replicas {
            let status = replica.repairer.status();
            assert_eq!((status.differing, status.checked), (0, 2), "{status:?}");
        }
    }
}

/// Faults found, and rounds without one, among three replicas that are written to all the time.
fn faults_while_writes_go_on(seed: u64, are_histories_told: bool) -> (u64, u64) {
    // Rounds as frequent as the writes' delays are long.
    let options =
        RepairOptions { interval_nanos: 10_000_000, timeout_nanos: 40_000_000, ..quick() };
    let mut world = World::new(&[400, 3_000, 40_000], options, seed);
    world.replicas.iter_mut().for_each(|replica| replica.seen.is_not_told = !are_histories_told);
    (world.lost, world.doubled, world.delay_max) = (10, 10, 2_000_000);
    for step in 0..1_000 {
        let at = usize::try_from(world.roll(3)).unwrap();
        let key = world.roll(600);
        world.write(at, key);
        world.run_nanos(300_000);
        // Pauses, so that histories meet now and then.
        if step % 20 == 0 {
            world.run_nanos(20_000_000);
        }
    }
    world.run(1);
    assert!(world.agrees());
    assert!(world.replicas.iter().all(|replica| replica.unknown.is_empty()));
    let equal = world.replicas.iter().map(|replica| replica.repairer.status().equal).sum();
    (world.faults(), equal)
}

#[test]
fn replicas_of_equal_history_never_differ_while_writes_go_on() {
    for seed in 0..8 {
        let (faults, equal) = faults_while_writes_go_on(seed, true);
        assert_eq!(faults, 0, "seed {seed}");
        assert!(equal > 20, "seed {seed}: {equal}");
    }
}

#[test]
fn were_histories_not_compared_first_writes_under_way_would_look_like_faults() {
    let faults: u64 = (0..2).map(|seed| faults_while_writes_go_on(seed, false).0).sum();
    assert!(faults > 0);
}

#[test]
fn a_write_lost_behind_the_trees_back_is_found_by_reading_and_then_repaired() {
    let options = RepairOptions {
        scrub: ScrubOptions { share_per_day_ppm: 1_000_000, ..ScrubOptions::default() },
        ..quick()
    };
    let mut world = World::new(&[0, 0], options, 3);
    (0..100).for_each(|key| world.write_everywhere(key));
    world.run(90);
    let token = *world.replicas[0].data.keys().next().unwrap();
    lose(&mut world, 0, token);
    world.run(600);
    // The counters still agree.
    assert_eq!((world.agrees(), world.faults()), (false, 0));
    world.replicas[0].repairer.start_all(Instant(world.now), true);
    world.run(200);
    assert!(world.agrees());
    assert_eq!(world.replicas[0].unknown, [Suspicion::Mismatch]);
    let status = world.replicas[0].repairer.status();
    assert_eq!((status.mismatches, status.scrub.demanded), (1, 0));
}

#[test]
fn a_range_that_cannot_be_read_is_unknown_and_the_rest_goes_on() {
    let mut world = World::new(&[5_000, 5_000], quick(), 4);
    (0..5_000).for_each(|key| world.write_everywhere(key));
    world.replicas[1].damaged = Some(Token(77));
    world.run(300);
    assert!(world.replicas[1].unknown.iter().all(|why| *why == Suspicion::Damaged));
    assert!(!world.replicas[1].unknown.is_empty() && world.replicas[0].unknown.is_empty());
    let tree = world.replicas[1].repairer.tree(PARTITION).unwrap();
    assert_eq!(tree.dirty_ranges(Node::ROOT).len(), 1);
    assert_eq!(world.faults(), 0);
    world.replicas[1].damaged = None;
    world.run(300);
    assert_eq!(world.replicas[1].repairer.status().checked, 1);
}

#[test]
fn a_leaf_with_more_keys_than_are_kept_apart_is_compared_part_by_part() {
    let mut world = World::new(&[500, 500], quick(), 12);
    (0..6_000).for_each(|key| world.write_everywhere(key));
    world.run(60);
    let tokens: Vec<Token> = world.replicas[0].data.keys().step_by(2_500).copied().collect();
    for (at, token) in tokens.into_iter().enumerate() {
        lose(&mut world, at % 2, token);
        world.replicas[at % 2].repairer.touch(token);
    }
    world.run(200);
    assert!(world.agrees());
    assert_eq!(world.replicas[0].repairer.tree(PARTITION).unwrap().leaf_bits(), 0);
}

#[test]
fn a_node_that_is_down_is_not_asked_and_one_that_is_silent_is_given_up() {
    let mut world = World::new(&[0, 0], quick(), 5);
    (0..10).for_each(|key| world.write_everywhere(key));
    let moment = world.moment();
    world.replicas[0].repairer.peer_down(NodeId(1), moment);
    world.lost = 100;
    world.run(200);
    let down = world.replicas[0].repairer.status();
    assert_eq!((down.bytes_sent, down.checked), (0, 0));
    assert!(down.unreachable > 1);
    let silent = world.replicas[1].repairer.status();
    assert!(silent.unreachable > 1 && silent.bytes_sent > 0);
    world.replicas[0].repairer.peer_up(NodeId(1));
    world.lost = 0;
    world.run(200);
    assert_eq!(world.replicas[0].repairer.status().checked, 1);
}

#[test]
fn a_partition_that_was_dropped_or_cut_anew_leaves_nothing_waiting() {
    let mut world = World::new(&[5_000, 5_000], quick(), 6);
    (0..5_000).for_each(|key| world.write_everywhere(key));
    world.run(30);
    let now = Instant(world.now);
    world.replicas[0].repairer.set_partition(PARTITION, 200_000, &[NodeId(1)], now);
    world.run(600);
    assert_eq!(world.replicas[0].repairer.status().checked, 1);
    assert!(world.replicas[0].repairer.tree(PARTITION).unwrap().leaf_bits() >= 9);
    world.replicas[0].repairer.drop_partition(PARTITION);
    world.run(200);
    let status = world.replicas[0].repairer.status();
    assert_eq!((status.pairs, status.open, status.tree_bytes), (0, 0, 0));
    assert_eq!(world.faults(), 0);
}

/// Bytes of messages, both ways, of the first round that compares `keys` keys of which `differing`
/// are lost on one side. The partition was compared before.
fn bytes_to_find(world: &World, differing: usize) -> u64 {
    let mut replicas = world.replicas.clone();
    let keys = replicas[1].data.len() as u64;
    let lost: Vec<(Token, Record)> = replicas[1]
        .data
        .iter()
        .map(|(t, r)| (*t, r.clone()))
        .step_by(replicas[1].data.len() / 1_000)
        .take(differing)
        .collect();
    assert_eq!(lost.len(), differing);
    for (token, record) in lost {
        replicas[1].data.remove(&token);
        // The tree that reading everything anew would give.
        replicas[1].repairer.apply(Some(&record.as_ref()), None);
    }
    let mut world = World::new(&[0, 0], quick(), 8);
    world.now = 1_000_000_000_000;
    world.replicas = replicas;
    let scans: u64 = world.replicas.iter().map(|replica| replica.scans).sum();
    // One side is enough.
    world.replicas[1].repairer.set_partition(PARTITION, keys, &[], Instant(world.now));
    world.replicas[0].repairer.start_all(Instant(world.now), false);
    while world.replicas[0].repairer.last_rounds().all(|r| r.ended.0 < 1_000_000_000) {
        world.run(1);
    }
    let round = *world.replicas[0].repairer.last_rounds().next().unwrap();
    assert_eq!(round.differing, differing as u64, "{round:?}");
    let read = world.replicas.iter().map(|replica| replica.scans).sum::<u64>() - scans;
    println!("{differing} differing: {} bytes, {read} scans", round.bytes);
    assert!(read <= 2 * differing as u64);
    assert!(world.agrees());
    round.bytes
}

#[test]
fn bytes_are_in_proportion_to_the_difference_not_to_the_data() {
    // Unoptimized, a tenth of it.
    let keys = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
    let mut world = World::new(&[keys], RepairOptions { reads_max: 4096, ..quick() }, 7);
    world.replicas[0].data = (0..keys)
        .map(|key| super::world::record(key, key * 7 + 1, 0, key))
        .map(|record| (record.token, record))
        .collect();
    world.replicas[0].repairer.set_partition(PARTITION, keys, &[NodeId(1)], Instant(0));
    // Reads its leaves; the other side is a copy.
    world.run(70);
    assert_eq!(world.replicas[0].repairer.tree(PARTITION).unwrap().dirty_count(), 0);
    world.replicas.push(world.replicas[0].clone());

    assert!(bytes_to_find(&world, 0) <= 120);
    let one = bytes_to_find(&world, 1);
    assert!(one <= 4096, "{one}");
    let thousand = bytes_to_find(&world, 1_000);
    assert!(thousand <= 4096 + 1_000 * 1_200, "{thousand}");
}

fn results() -> impl Strategy<Value = TreeResult> {
    let sums = prop::collection::vec(any::<u64>(), 0..40);
    let list = prop::collection::btree_map(any::<u64>(), any::<u64>(), 0..60);
    prop_oneof![
        Just(TreeResult::Equal),
        Just(TreeResult::NotComparable),
        sums.prop_map(TreeResult::Different),
        prop::collection::vec(any::<u64>(), 32).prop_map(TreeResult::Different),
        list.prop_map(|list| TreeResult::Leaf(
            list.into_iter().map(|(token, digest)| (Token(token), digest)).collect()
        )),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_the_other_side_answers_a_round_ends(
        results in prop::collection::vec(results(), 1..20),
        level in any::<u8>(), index in any::<u32>(),
    ) {
        let mut world = World::new(&[2_000, 0], quick(), 11);
        (0..200).for_each(|key| world.write_everywhere(key));
        let replica = &mut world.replicas[0];
        let mut moment = Moment { now: Instant(0), wall: WallMicros(0) };
        let mut turn = results.iter().cycle();
        let asked = TreeAsked { id: 1, partition: PARTITION, seen_digest: 0, level, index };
        replica.repairer.tree_asked(NodeId(1), asked, moment, &replica.seen);
        for _ in 0..3_000 {
            match replica.repairer.next_output() {
                Some(Output::Send { message: PeerMessage::Tree { id, .. }, .. }) => {
                    let result = turn.next().unwrap();
                    replica.repairer.tree_answered(NodeId(1), id, result, moment, &replica.seen);
                }
                Some(Output::Send { message: PeerMessage::Fetch { id, .. }, .. }) => {
                    replica.repairer.fetched(NodeId(1), id, 0, moment, &replica.seen);
                }
                Some(Output::Read { id, range, .. }) => {
                    for (_, record) in replica.data.range(range.first..=range.last) {
                        replica.repairer.read_record(id, &record.as_ref());
                    }
                    replica.repairer.read_done(id, 1, moment, &replica.seen);
                }
                Some(_) => {}
                None => {
                    moment.now = replica.repairer.wake_at().max(moment.now);
                    replica.repairer.poll(moment, &replica.seen);
                }
            }
            if replica.repairer.status().rounds > 0 {
                return Ok(());
            }
        }
        prop_assert!(false, "still asking: {:?}", replica.repairer.status());
    }
}
