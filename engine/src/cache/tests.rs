//! The cache against its invariants, and against what it is for.

use proptest::prelude::*;

use super::*;
use crate::buffer::AlignedBuf;
use crate::model::{NamespaceId, Token};
use crate::sim::Chance;
use crate::sstable::testing::{MemFile, block_on, identity, open, record, write};
use crate::sstable::{Table, TableOptions};

/// A table of one-record blocks with values of these lengths.
fn table_of(value_lens: &[usize]) -> Table<MemFile> {
    let file = MemFile::new(512);
    let one = |n: usize| record(n as u64, b"key", &vec![1; value_lens[n]]);
    let records: Vec<_> = (0..value_lens.len()).map(one).collect();
    write(&file, &records, TableOptions { block_size: 512, ..TableOptions::default() });
    open(&file).unwrap()
}

/// Blocks of about 1,060 bytes at rising offsets, as many as asked for.
fn blocks(count: usize) -> Vec<Rc<Block>> {
    let table = table_of(&vec![1000; count]);
    (0..count)
        .map(|n| Rc::new(block_on(table.read_block(table.index().handle(n))).unwrap()))
        .collect()
}

/// Every list, map and sum agrees with every other.
fn check(cache: &BlockCache) {
    let mut linked = 0;
    for (fifo, queue) in [(&cache.small, Queue::Small), (&cache.main, Queue::Main)] {
        let (mut at, mut newer, mut bytes, mut count) = (fifo.newest, NONE, 0, 0);
        while at != NONE {
            let slot = &cache.slots[at as usize];
            assert_eq!((slot.queue, slot.newer), (queue, newer));
            assert_eq!(cache.map.get(&slot.key), Some(&at));
            assert!(slot.block.is_some());
            bytes += slot.bytes;
            count += 1;
            (newer, at) = (at, slot.older);
        }
        assert_eq!((fifo.oldest, fifo.bytes, fifo.count), (newer, bytes, count));
        linked += count;
    }
    assert_eq!(linked, cache.map.len());
    assert_eq!(linked + cache.free.len(), cache.slots.len());
    let mut by_table = 0;
    for head in cache.tables.values().chain(&cache.doomed) {
        let (mut at, mut previous) = (*head, NONE);
        while at != NONE {
            assert_eq!(cache.slots[at as usize].table_previous, previous);
            by_table += 1;
            (previous, at) = (at, cache.slots[at as usize].table_next);
        }
    }
    assert_eq!(by_table, linked);
    assert!(cache.bytes() <= cache.budget());
    assert!(cache.ghost.queue.len() <= cache.slots.len() + 1);
    assert_eq!(cache.ghost.queue.len(), cache.ghost.keys.values().sum::<u32>() as usize);
}

#[derive(Clone, Debug)]
enum Step {
    Read(u8, usize),
    Remove(u8),
    Budget(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (0u8..4, 0usize..60).prop_map(|(table, block)| Step::Read(table, block)),
        1 => (0u8..4).prop_map(Step::Remove),
        1 => (0usize..60_000).prop_map(Step::Budget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_lists_agree_and_the_bound_holds_after_each_step(
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let blocks = blocks(60);
        let mut cache = BlockCache::new(40_000);
        // Table ids are never reused.
        let mut generation = [0u64; 4];
        for step in steps {
            match step {
                Step::Read(table, block) => {
                    let id = TableId(u64::from(table) << 32 | generation[usize::from(table)]);
                    let block = &blocks[block];
                    match cache.get(id, block.handle().offset) {
                        Some(found) => prop_assert!(Rc::ptr_eq(&found, block)),
                        None => cache.insert(id, Rc::clone(block)),
                    }
                }
                Step::Remove(table) => {
                    let generation = &mut generation[usize::from(table)];
                    cache.remove_table(TableId(u64::from(table) << 32 | *generation));
                    *generation += 1;
                }
                Step::Budget(bytes) => cache.set_budget(bytes),
            }
            check(&cache);
        }
    }

    #[test]
    fn a_warm_list_comes_back_and_a_damaged_one_does_not(
        list in prop::collection::vec((any::<u64>().prop_map(TableId), any::<u64>()), 0..50),
        padding in 0usize..600, flip in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encode_warm_list(&list);
        let len = bytes.len();
        bytes.resize(len + padding, 0);
        prop_assert_eq!(decode_warm_list(&bytes), Some(list));
        bytes[flip.index(len)] ^= 1;
        prop_assert_eq!(decode_warm_list(&bytes), None);
        prop_assert_eq!(decode_warm_list(&bytes[..len - 1]), None);
    }
}

/// Reads a block through the cache; whether it was there.
fn read(cache: &mut BlockCache, table: u64, block: &Rc<Block>) -> bool {
    let hit = cache.get(TableId(table), block.handle().offset).is_some();
    if !hit {
        cache.insert(TableId(table), Rc::clone(block));
    }
    hit
}

#[test]
fn a_scan_does_not_wash_out_what_is_read_often() {
    let blocks = blocks(2000);
    let (hot, cold) = blocks.split_at(50);
    let mut cache = BlockCache::new(100 * (1060 + ENTRY_OVERHEAD + size_of::<Block>()));
    for _ in 0..4 {
        hot.iter().for_each(|block| {
            read(&mut cache, 1, block);
        });
    }
    for (n, block) in cold.iter().enumerate() {
        read(&mut cache, 1, block);
        read(&mut cache, 1, &hot[n % hot.len()]);
    }
    let kept = hot.iter().filter(|block| cache.contains(TableId(1), block.handle().offset)).count();
    assert_eq!(kept, hot.len());
}

#[test]
fn skewed_reads_hit_more_often_than_in_a_plain_fifo() {
    let blocks = blocks(1000);
    let mut cache = BlockCache::new(100 * (1060 + ENTRY_OVERHEAD + size_of::<Block>()));
    let mut chance = Chance::new(5);
    let mut fifo: VecDeque<usize> = VecDeque::new();
    let mut fifo_hits = 0;
    for _ in 0..30_000 {
        // The smallest of three: half of the reads go to a fifth of the blocks.
        let n = (0..4).map(|_| chance.index(blocks.len())).min().unwrap();
        read(&mut cache, 1, &blocks[n]);
        if fifo.contains(&n) {
            fifo_hits += 1;
        } else {
            fifo.push_back(n);
            if fifo.len() > 100 {
                fifo.pop_front();
            }
        }
    }
    let stats = cache.stats();
    assert_eq!(stats.hits + stats.misses, 30_000);
    assert!(stats.hits > fifo_hits * 11 / 10, "{} against {fifo_hits}", stats.hits);
}

#[test]
fn a_removed_table_is_the_first_to_go() {
    let blocks = blocks(40);
    let mut cache = BlockCache::new(1 << 20);
    for block in &blocks {
        read(&mut cache, 1, block);
        read(&mut cache, 2, block);
    }
    let full = cache.bytes();
    cache.remove_table(TableId(1));
    assert!(cache.warm_list().iter().all(|(table, _)| *table == TableId(2)));
    for block in &blocks[..5] {
        read(&mut cache, 3, block);
    }
    assert!(cache.bytes() < full, "memory comes back without pressure");
    assert!(blocks.iter().all(|block| cache.contains(TableId(2), block.handle().offset)));
    check(&cache);
}

#[test]
fn what_is_too_long_or_of_a_scan_is_not_kept() {
    let table = table_of(&[100_000]);
    let handle = table.index().handle(0);
    let mut cache = BlockCache::new(400_000);
    cache.insert(TableId(1), Rc::new(block_on(table.read_block(handle)).unwrap()));
    assert_eq!(cache.bytes(), 0, "a quarter of the cache for one block");

    let small = &blocks(1)[0];
    let bytes = block_on(crate::disk::File::read_at(table_of(&[1000]).file(), 0, 1536)).unwrap();
    let buf: Rc<AlignedBuf> = Rc::new(bytes);
    let shared = Block::parse_shared(&buf, 0, small.handle(), identity().salt).unwrap();
    assert!(shared.get(Token(0), NamespaceId(1), b"key").is_some());
    cache.insert(TableId(1), Rc::new(shared));
    assert_eq!(cache.bytes(), 0, "it would keep the scan's whole buffer");

    let mut nothing = BlockCache::new(0);
    nothing.insert(TableId(1), Rc::clone(small));
    assert_eq!(nothing.stats().blocks, 0);
}

#[test]
fn the_warm_list_begins_with_the_best() {
    let blocks = blocks(10);
    let mut cache = BlockCache::new(1 << 20);
    for block in &blocks {
        read(&mut cache, 1, block);
    }
    for _ in 0..3 {
        read(&mut cache, 1, &blocks[4]);
    }
    read(&mut cache, 1, &blocks[7]);
    let offsets: Vec<u64> = cache.warm_list().into_iter().map(|(_, offset)| offset).collect();
    assert_eq!(offsets.len(), 10);
    assert_eq!(offsets[..2], [blocks[4].handle().offset, blocks[7].handle().offset]);
}
