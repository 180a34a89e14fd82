//! The chapter's example, the laws of the sums, and what makes a tree answer or not.

use annulus_engine::model::{Dot, Kind, NamespaceId, OriginId, Record, Timestamp, WallMicros};
use proptest::prelude::*;

use super::*;

const SEED: HashSeed = HashSeed(42);
const NOW: Hour = Hour(10);
const HOUR_US: u64 = 3_600_000_000;

fn record(token: u64, sequence: u64) -> Record {
    Record {
        token: Token(token),
        namespace: NamespaceId(0),
        incarnation: 1,
        kind: Kind::Put,
        dot: Dot { origin: OriginId(1), sequence },
        timestamp: Timestamp::new(WallMicros(sequence), 0),
        expiry_ms: 0,
        key: token.to_le_bytes().to_vec(),
        value: sequence.to_le_bytes().to_vec(),
    }
}

/// A tree that has read these records.
fn tree_of<'a>(keys: u64, records: impl IntoIterator<Item = &'a Record>) -> MerkleTree {
    let mut tree = MerkleTree::empty(PartitionId(0), 0, keys, SEED);
    for record in records {
        tree.apply(None, Some(&record.as_ref()));
    }
    tree
}

/// "How to build a Merkle tree": the key space is 1 to 12.
#[test]
fn the_chapters_twelve_keys_in_four_buckets() {
    // Step 1: divide the key space into buckets: 1-3, 4-6, 7-9, 10-12.
    let bucket_of = |key: u64| (key - 1) / 3;
    let record_of = |key: u64, sequence| record(bucket_of(key) << 62 | key, sequence);
    // Steps 2 and 3: hash each key, one hash for each bucket.
    let server_one: Vec<Record> = (1..=12).map(|key| record_of(key, key)).collect();
    // Server 2 has an older write of key 8.
    let server_two: Vec<Record> =
        (1..=12).map(|key| record_of(key, if key == 8 { 0 } else { key })).collect();
    let one = tree_of(4 * KEYS_PER_LEAF, &server_one);
    let two = tree_of(4 * KEYS_PER_LEAF, &server_two);
    assert_eq!(one.leaf_bits(), 2);

    // Step 4: build the tree upwards till the root, from the sums of the children.
    let buckets = one.children(Node::ROOT, NOW).unwrap();
    assert_eq!(buckets.len(), 4);
    assert_eq!(one.sum(Node::ROOT, NOW).unwrap(), buckets.iter().copied().sum());

    // To compare two trees, start by comparing the root hashes: they disagree.
    let differs = |node: Node| one.sum(node, NOW) != two.sum(node, NOW);
    assert!(differs(Node::ROOT));
    // Then the left child hashes are compared, then the right child hashes.
    let (left, right) = (Node::ROOT.child(1, 0), Node::ROOT.child(1, 1));
    assert!(!differs(left) && differs(right));
    // So traverse the tree to find which buckets are not synchronized, and synchronize only those.
    let not_synchronized: Vec<u32> =
        (0..4).filter(|index| differs(Node { level: 2, index: *index })).collect();
    assert_eq!(not_synchronized, [2]);
    assert_eq!(bucket_of(8), 2);
    // If the root hashes match, both servers have the same data.
    assert_eq!(
        one.sum(Node::ROOT, NOW),
        tree_of(4 * KEYS_PER_LEAF, &server_one).sum(Node::ROOT, NOW)
    );
}

#[test]
fn a_leaf_has_about_512_keys_and_a_tree_at_most_4096_leaves() {
    let bits = |keys| MerkleTree::empty(PartitionId(0), 12, keys, SEED).leaf_bits();
    assert_eq!([bits(0), bits(512), bits(513), bits(1_000_000)], [0, 0, 1, 11]);
    assert_eq!([bits(1 << 21), bits(u64::MAX)], [12, 12]);
}

#[test]
fn a_node_holds_its_tokens_and_its_children_share_them_out() {
    let partition = PartitionId(5);
    let whole = Node::ROOT.range(partition, 4);
    assert_eq!(whole, partition.range(4));
    assert_eq!(Node::ROOT.range(PartitionId(0), 0), TokenRange::FULL);
    let mut next = whole.first.0;
    for index in 0..16 {
        let child = Node::ROOT.child(4, index);
        let range = child.range(partition, 4);
        assert_eq!(range.first.0, next);
        assert_eq!((Node::of(range.first, 4, 4), Node::of(range.last, 4, 4)), (child, child));
        next = range.last.0 + 1;
    }
    assert_eq!(next - 1, whole.last.0);
    assert_eq!(Node::new(4, 16), None);
    assert_eq!(Node::new(33, 0), None);
    let deep = Node::new(32, u32::MAX).unwrap();
    assert_eq!(deep.range(PartitionId(0xffff), 16).last, Token::MAX);
    assert_eq!(Node::of(Token::MAX, 16, 32), deep);
    assert_eq!(deep.ancestor(0), Node::ROOT);
}

#[test]
fn a_write_over_an_unknown_version_makes_its_leaf_dirty_until_it_is_read() {
    let records = [record(1, 1), record(u64::MAX, 2)];
    let mut tree = tree_of(2 * KEYS_PER_LEAF, &records);
    let before = tree.sum(Node::ROOT, NOW).unwrap();
    tree.touch(Token(1));
    assert_eq!(tree.sum(Node::ROOT, NOW), Err(Unclear::Dirty));
    assert_eq!(tree.children(Node::ROOT, NOW), Err(Unclear::Dirty));
    assert!(tree.sum(Node::ROOT.child(1, 1), NOW).is_ok());
    assert_eq!(
        tree.dirty_ranges(Node::ROOT),
        [TokenRange { first: Token(0), last: Token(u64::MAX / 2) }]
    );
    assert_eq!(tree.first_dirty(Node::ROOT, 1), Some(Node { level: 1, index: 0 }));
    assert_eq!(tree.recompute(0, NOW, [records[0].as_ref()]), Finished::Cleaned);
    assert_eq!(tree.sum(Node::ROOT, NOW), Ok(before));
    assert_eq!((tree.dirty_count(), tree.dirty_ranges(Node::ROOT)), (0, vec![]));
}

#[test]
fn neighbouring_dirty_leaves_are_read_as_one_range() {
    let tree = MerkleTree::unread(PartitionId(3), 4, 100_000, SEED);
    assert_eq!(tree.dirty_ranges(Node::ROOT), [PartitionId(3).range(4)]);
    let tree = MerkleTree::unread(PartitionId(0), 0, 100_000, SEED);
    assert_eq!(tree.dirty_ranges(Node::ROOT), [TokenRange::FULL]);
}

#[test]
fn a_write_while_a_leaf_is_read_makes_the_reading_void() {
    let mut tree = MerkleTree::unread(PartitionId(0), 0, 10, SEED);
    let mut reading = tree.begin_reading(Node::ROOT, NOW);
    reading.add(&record(1, 1).as_ref());
    tree.apply(None, Some(&record(2, 2).as_ref()));
    assert_eq!(tree.finish_reading(&reading, NOW), Finished::Overtaken);
    assert_eq!(tree.dirty_count(), 1);
}

#[test]
fn a_reading_that_disagrees_with_a_clean_leaf_is_told_and_then_believed() {
    let (kept, lost) = (record(1, 1), record(2, 2));
    let mut tree = tree_of(10, [&kept, &lost]);
    assert_eq!(tree.recompute(0, NOW, [kept.as_ref(), lost.as_ref()]), Finished::Agrees);
    assert_eq!(tree.recompute(0, NOW, [kept.as_ref()]), Finished::Differs);
    assert_eq!(tree.sum(Node::ROOT, NOW), tree_of(10, [&kept]).sum(Node::ROOT, NOW));
}

#[test]
fn replicas_that_purge_expired_values_at_different_times_agree() {
    let life_hours = 20;
    let expiring = Record { expiry_ms: life_hours * 3_600_000, ..record(1, 1) };
    let lasting = record(2, 2);
    let both = tree_of(10, [&expiring, &lasting]);
    let one = tree_of(10, [&lasting]);
    // It counts while no clock has come near its expiry.
    assert_ne!(both.sum(Node::ROOT, Hour(15)), one.sum(Node::ROOT, Hour(15)));
    for hour in 20..23 {
        assert_eq!(both.sum(Node::ROOT, Hour(hour)), one.sum(Node::ROOT, Hour(hour)));
    }
    let mut forgetful = both.clone();
    forgetful.forget_before(Hour(20));
    assert!(forgetful.bytes() < both.bytes());
    assert_eq!(forgetful.sum(Node::ROOT, Hour(20)), both.sum(Node::ROOT, Hour(20)));
    // A scan that began before the hour and ended after it may or may not have met the value.
    for records in [vec![expiring.as_ref(), lasting.as_ref()], vec![lasting.as_ref()]] {
        let mut tree = forgetful.clone();
        let mut reading = tree.begin_reading(Node::ROOT, Hour(19));
        records.iter().for_each(|record| reading.add(record));
        assert_eq!(tree.finish_reading(&reading, Hour(20)), Finished::Agrees);
    }
}

#[test]
fn a_crowd_of_lives_costs_memory_in_proportion_to_its_values_at_most() {
    let records: Vec<Record> = (0..2000)
        .map(|i| Record { expiry_ms: (i % 700) * 3_600_000 + 1, ..record(i, i * HOUR_US / 100) })
        .collect();
    let tree = tree_of(2000, &records);
    assert!(tree.bytes() <= 1000 + 2000 * 48, "{}", tree.bytes());
    let month: Vec<Record> = (0..2000)
        .map(|i| Record {
            expiry_ms: 720 * 3_600_000 + i * 1_296_000,
            ..record(i, i * HOUR_US * 36 / 100)
        })
        .collect();
    let tree = tree_of(2000, &month);
    assert!(tree.bytes() <= 1000 + 4 * 20 * 48, "{}", tree.bytes());
}

#[test]
fn a_tree_is_made_coarser_for_nothing_and_finer_by_reading() {
    let records: Vec<Record> = (0..3000).map(|i| record(i << 52, i)).collect();
    let mut tree = tree_of(3000, &records);
    let root = tree.sum(Node::ROOT, NOW).unwrap();
    assert_eq!(tree.leaf_bits(), 3);
    assert!(!tree.resize(1500) && !tree.resize(6000));
    assert!(tree.resize(700));
    assert_eq!((tree.leaf_bits(), tree.sum(Node::ROOT, NOW)), (1, Ok(root)));
    assert!(tree.resize(3000));
    assert_eq!((tree.leaf_bits(), tree.dirty_count()), (3, 8));
}

/// A change of one key: to a version, or to nothing.
type Edit = (u64, Option<u64>);

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    // Few keys, so that they are overwritten; tokens all over the ring.
    prop::collection::vec((0u64..40, prop::option::weighted(0.8, 1u64..1000)), 0..200)
}

fn made(key: u64, sequence: u64) -> Record {
    let made = record(key.wrapping_mul(0x9E37_79B9_7F4A_7C15), sequence);
    match sequence % 5 {
        0 => Record { kind: Kind::Delete, value: Vec::new(), ..made },
        1 => Record { expiry_ms: sequence * 360_000, ..made },
        _ => made,
    }
}

proptest! {
    #[test]
    fn sums_are_a_commutative_group(a in any::<[u64; 2]>(), b in any::<[u64; 2]>(), c in any::<[u64; 2]>()) {
        let (a, b, c) = (Sum(a), Sum(b), Sum(c));
        prop_assert_eq!(a + b, b + a);
        prop_assert_eq!((a + b) + c, a + (b + c));
        prop_assert_eq!(a + Sum::ZERO, a);
        prop_assert_eq!(a + b - b, a);
    }

    #[test]
    fn kept_up_by_differences_a_tree_is_what_reading_everything_gives(
        edits in edits(), keys in 0u64..4000, hour in 0u32..120,
    ) {
        let mut tree = MerkleTree::empty(PartitionId(0), 0, keys, SEED);
        let mut data: BTreeMap<u64, Record> = BTreeMap::new();
        for (key, sequence) in edits {
            let new = sequence.map(|sequence| made(key, sequence));
            let old = data.remove(&key);
            tree.apply(old.as_ref().map(Record::as_ref).as_ref(), new.as_ref().map(Record::as_ref).as_ref());
            data.extend(new.map(|new| (key, new)));
        }
        let read = tree_of(keys, data.values());
        for level in 0..=tree.leaf_bits() {
            for index in 0..1 << level {
                let node = Node { level, index };
                prop_assert_eq!(tree.sum(node, Hour(hour)), read.sum(node, Hour(hour)));
            }
        }
        // And so does a scan of each leaf.
        for leaf in 0..1 << tree.leaf_bits() {
            let finished = tree.recompute(leaf, Hour(hour), data.values().map(Record::as_ref));
            prop_assert_eq!(finished, Finished::Agrees);
        }
    }

    #[test]
    fn the_order_of_writes_does_not_matter_and_a_finer_tree_answers_for_a_coarser(
        keys in prop::collection::btree_map(0u64..1000, 1u64..1000, 0..100),
        fine in 0u64..200_000, coarse in 0u64..200_000,
    ) {
        let (fine, coarse) = (fine.max(coarse), fine.min(coarse));
        let records: Vec<Record> = keys.iter().map(|(key, sequence)| made(*key, *sequence)).collect();
        let fine = tree_of(fine, &records);
        let coarse = tree_of(coarse, records.iter().rev());
        for level in 0..=coarse.leaf_bits() {
            for index in 0..1 << level {
                let node = Node { level, index };
                prop_assert_eq!(fine.sum(node, NOW), coarse.sum(node, NOW));
            }
        }
    }

    #[test]
    fn a_detail_agrees_with_the_tree_and_with_its_own_parts(
        keys in prop::collection::btree_map(0u64..1000, 1u64..1000, 0..100),
    ) {
        let records: Vec<Record> = keys.iter().map(|(key, sequence)| made(*key, *sequence)).collect();
        let tree = tree_of(2000, &records);
        for index in 0..1 << tree.leaf_bits() {
            let node = Node { level: tree.leaf_bits(), index };
            let mut reading = tree.begin_reading(node, NOW);
            records.iter().for_each(|record| reading.add(&record.as_ref()));
            let detail = reading.into_detail();
            prop_assert!(tree.is_current(&detail, NOW) && !tree.is_current(&detail, Hour(11)));
            prop_assert_eq!(Ok(detail.sum()), tree.sum(node, NOW));
            let listed: Sum = detail.entries().unwrap().iter().map(|(_, sum)| *sum).sum();
            prop_assert_eq!(listed, detail.sum());
            for child in 0..16 {
                let child_node = node.child(4, child);
                let narrowed = detail.narrowed(child_node, tree.range(child_node)).unwrap();
                prop_assert_eq!(narrowed.sum(), detail.children()[child as usize]);
            }
        }
    }
}
