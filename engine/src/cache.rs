//! The block cache: hot blocks in memory, bounded in bytes, not washed out by a scan.
//!
//! Invariant: the blocks and their book-keeping never take more than the budget, and each block is
//! in exactly one of three lists: *small* (new), *main* (proven), *doomed* (of removed tables).
//! On the read path between the index and the device; one cache a shard.
//!
//! Follows Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023), S3-FIFO: a
//! block enters small, a tenth of the budget; one that is read again before it leaves moves to
//! main, the others leave only their key in *ghost*; a key that ghost remembers enters main at
//! once. Main is a FIFO with second chances, up to three. A hit moves nothing: it counts.

use std::collections::VecDeque;
use std::rc::Rc;

use ahash::{AHashMap, RandomState};

use crate::checksum;
use crate::sstable::{Block, TableId};

/// Bytes charged for each block beside its own: slot, map entries, ghost.
const ENTRY_OVERHEAD: usize = 128;
/// A hit counts up to this.
const FREQUENCY_MAX: u8 = 3;
/// Small's part of the budget is one in this many.
const SMALL_PART: usize = 10;
/// A block longer than one in this many of the budget is not kept.
const BLOCK_PART: usize = 8;
/// Blocks of removed tables that an insert gives up, so that their memory comes back by itself.
const DOOMED_A_TURN: usize = 8;
/// What a block takes at least, usually: the room for book-keeping is made for this.
const BLOCK_BYTES_EXPECTED: usize = 3 << 10;
/// No slot.
const NONE: u32 = u32::MAX;

/// Where a block is: table and offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    table: TableId,
    offset: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Small,
    Main,
}

/// A block in the cache, linked into its queue and into the list of its table.
#[derive(Debug)]
struct Slot {
    key: Key,
    block: Option<Rc<Block>>,
    bytes: usize,
    frequency: u8,
    queue: Queue,
    newer: u32,
    older: u32,
    table_next: u32,
    table_previous: u32,
}

/// A FIFO through the slots.
#[derive(Debug)]
struct Fifo {
    newest: u32,
    oldest: u32,
    bytes: usize,
    count: usize,
}

impl Fifo {
    const EMPTY: Fifo = Fifo { newest: NONE, oldest: NONE, bytes: 0, count: 0 };
}

/// What a cache has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups that found their block.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Blocks taken in.
    pub inserts: u64,
    /// Blocks given up for room.
    pub evictions: u64,
    /// Blocks in memory now.
    pub blocks: u64,
    /// Bytes charged now, never above the budget.
    pub bytes: u64,
}

/// The block cache of one shard.
#[derive(Debug)]
pub struct BlockCache {
    budget: usize,
    slots: Vec<Slot>,
    free: Vec<u32>,
    map: AHashMap<Key, u32>,
    /// First slot of each table's list.
    tables: AHashMap<TableId, u32>,
    small: Fifo,
    main: Fifo,
    /// Heads of the lists of removed tables.
    doomed: Vec<u32>,
    ghost: Ghost,
    stats: CacheStats,
}

/// Keys of blocks that left small unread, oldest first, and how often each is in the queue.
#[derive(Debug)]
struct Ghost {
    queue: VecDeque<Key>,
    keys: AHashMap<Key, u32>,
}

/// Fixed seeds: nothing depends on the order of these maps, and keys are not chosen by strangers.
fn hasher() -> RandomState {
    RandomState::with_seeds(0x51, 0x52, 0x53, 0x54)
}

impl Ghost {
    fn remember(&mut self, key: Key, limit: usize) {
        self.queue.push_back(key);
        *self.keys.entry(key).or_insert(0) += 1;
        while self.queue.len() > limit {
            let Some(oldest) = self.queue.pop_front() else { break };
            if let Some(times) = self.keys.get_mut(&oldest) {
                *times -= 1;
                if *times == 0 {
                    self.keys.remove(&oldest);
                }
            }
        }
    }

    fn remembers(&self, key: &Key) -> bool {
        self.keys.contains_key(key)
    }
}

impl BlockCache {
    /// A cache of at most `budget` bytes, book-keeping included; 0 keeps nothing.
    #[must_use]
    pub fn new(budget: usize) -> BlockCache {
        // Room from the start: growing would copy everything while a request waits. Untouched
        // memory costs nothing.
        let blocks = (budget / BLOCK_BYTES_EXPECTED).min(1 << 24);
        BlockCache {
            budget,
            slots: Vec::with_capacity(blocks),
            free: Vec::new(),
            map: AHashMap::with_capacity_and_hasher(blocks, hasher()),
            tables: AHashMap::with_hasher(hasher()),
            small: Fifo::EMPTY,
            main: Fifo::EMPTY,
            doomed: Vec::new(),
            ghost: Ghost { queue: VecDeque::new(), keys: AHashMap::with_hasher(hasher()) },
            stats: CacheStats::default(),
        }
    }

    /// The budget in bytes.
    #[must_use]
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// Changes the budget; gives blocks up at once if it shrank.
    pub fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
        self.make_room(0);
    }

    /// Counts and bytes.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        CacheStats { blocks: self.map.len() as u64, bytes: self.bytes() as u64, ..self.stats }
    }

    /// Bytes charged, never above the budget.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.small.bytes + self.main.bytes
    }

    /// The block at this offset of the table, if it is here.
    #[inline]
    pub fn get(&mut self, table: TableId, offset: u64) -> Option<Rc<Block>> {
        let Some(&slot) = self.map.get(&Key { table, offset }) else {
            self.stats.misses += 1;
            return None;
        };
        self.stats.hits += 1;
        let slot = &mut self.slots[slot as usize];
        slot.frequency = (slot.frequency + 1).min(FREQUENCY_MAX);
        slot.block.clone()
    }

    /// Whether the block is here; counts as nothing.
    #[must_use]
    pub fn contains(&self, table: TableId, offset: u64) -> bool {
        self.map.contains_key(&Key { table, offset })
    }

    /// Takes a block in, giving others up for it. One that is here already, is too long for this
    /// cache, or comes from a scan, changes nothing.
    pub fn insert(&mut self, table: TableId, block: Rc<Block>) {
        let key = Key { table, offset: block.handle().offset };
        let bytes = block.size() + ENTRY_OVERHEAD;
        let fits = bytes <= self.budget / BLOCK_PART && !block.is_shared();
        if !fits || self.map.contains_key(&key) {
            return;
        }
        for _ in 0..DOOMED_A_TURN {
            if !self.drop_doomed() {
                break;
            }
        }
        self.make_room(bytes);
        let queue = if self.ghost.remembers(&key) { Queue::Main } else { Queue::Small };
        let slot = self.take_slot(key, block, bytes, queue);
        self.map.insert(key, slot);
        self.push_newest(slot);
        self.link_to_table(slot);
        self.stats.inserts += 1;
    }

    /// Forgets a table that was removed. O(1): its blocks are the first to go.
    pub fn remove_table(&mut self, table: TableId) {
        if let Some(head) = self.tables.remove(&table) {
            self.doomed.push(head);
        }
    }

    /// The blocks worth reading after a restart: tables and offsets, the best first.
    #[must_use]
    pub fn warm_list(&self) -> Vec<(TableId, u64)> {
        let mut list: Vec<(std::cmp::Reverse<u8>, TableId, u64)> =
            Vec::with_capacity(self.map.len());
        for (fifo, proven) in [(&self.main, 1), (&self.small, 0)] {
            let mut at = fifo.newest;
            while at != NONE {
                let slot = &self.slots[at as usize];
                if self.tables.contains_key(&slot.key.table) {
                    let rank = slot.frequency + proven;
                    list.push((std::cmp::Reverse(rank), slot.key.table, slot.key.offset));
                }
                at = slot.older;
            }
        }
        // Stable: within a rank main before small, newest first.
        list.sort_by_key(|entry| entry.0);
        list.into_iter().map(|(_, table, offset)| (table, offset)).collect()
    }

    /// Gives blocks up until `bytes` more fit the budget.
    fn make_room(&mut self, bytes: usize) {
        while self.bytes() > 0 && self.bytes() + bytes > self.budget {
            if self.drop_doomed() {
                continue;
            }
            let small_full = self.small.bytes > self.budget / SMALL_PART;
            if self.small.count > 0 && (small_full || self.main.count == 0) {
                self.evict_small();
            } else {
                self.evict_main();
            }
        }
    }

    fn evict_small(&mut self) {
        let slot = self.small.oldest;
        if self.slots[slot as usize].frequency > 1 {
            self.unlink(slot);
            let moved = &mut self.slots[slot as usize];
            moved.queue = Queue::Main;
            moved.frequency = 0;
            self.push_newest(slot);
        } else {
            let key = self.slots[slot as usize].key;
            let limit = self.main.count.max(self.small.count);
            self.ghost.remember(key, limit);
            self.evict(slot);
        }
    }

    fn evict_main(&mut self) {
        let slot = self.main.oldest;
        if self.slots[slot as usize].frequency > 0 {
            self.slots[slot as usize].frequency -= 1;
            self.unlink(slot);
            self.push_newest(slot);
        } else {
            self.evict(slot);
        }
    }

    fn evict(&mut self, slot: u32) {
        self.stats.evictions += 1;
        self.unlink_from_table(slot);
        self.release(slot);
    }

    /// Drops one block of a removed table; false when there is none.
    fn drop_doomed(&mut self) -> bool {
        let Some(head) = self.doomed.pop() else { return false };
        let next = self.slots[head as usize].table_next;
        if next != NONE {
            self.slots[next as usize].table_previous = NONE;
            self.doomed.push(next);
        }
        self.release(head);
        true
    }

    /// Takes a slot out of its queue and the map, and frees it and its block.
    fn release(&mut self, at: u32) {
        self.unlink(at);
        let slot = &mut self.slots[at as usize];
        slot.block = None;
        let key = slot.key;
        self.map.remove(&key);
        self.free.push(at);
    }

    fn take_slot(&mut self, key: Key, block: Rc<Block>, bytes: usize, queue: Queue) -> u32 {
        let slot = Slot {
            key,
            block: Some(block),
            bytes,
            frequency: 0,
            queue,
            newer: NONE,
            older: NONE,
            table_next: NONE,
            table_previous: NONE,
        };
        if let Some(at) = self.free.pop() {
            self.slots[at as usize] = slot;
            return at;
        }
        self.slots.push(slot);
        u32::try_from(self.slots.len() - 1).expect("below 2^32 blocks")
    }

    fn fifo(&mut self, queue: Queue) -> &mut Fifo {
        match queue {
            Queue::Small => &mut self.small,
            Queue::Main => &mut self.main,
        }
    }

    fn push_newest(&mut self, at: u32) {
        let (queue, bytes) = (self.slots[at as usize].queue, self.slots[at as usize].bytes);
        let fifo = self.fifo(queue);
        let older = std::mem::replace(&mut fifo.newest, at);
        if older == NONE {
            fifo.oldest = at;
        }
        fifo.bytes += bytes;
        fifo.count += 1;
        self.slots[at as usize].older = older;
        self.slots[at as usize].newer = NONE;
        if older != NONE {
            self.slots[older as usize].newer = at;
        }
    }

    fn unlink(&mut self, at: u32) {
        let slot = &self.slots[at as usize];
        let (queue, bytes, newer, older) = (slot.queue, slot.bytes, slot.newer, slot.older);
        if newer != NONE {
            self.slots[newer as usize].older = older;
        }
        if older != NONE {
            self.slots[older as usize].newer = newer;
        }
        let fifo = self.fifo(queue);
        if newer == NONE {
            fifo.newest = older;
        }
        if older == NONE {
            fifo.oldest = newer;
        }
        fifo.bytes -= bytes;
        fifo.count -= 1;
    }

    fn link_to_table(&mut self, at: u32) {
        let table = self.slots[at as usize].key.table;
        let next = self.tables.insert(table, at).unwrap_or(NONE);
        self.slots[at as usize].table_next = next;
        if next != NONE {
            self.slots[next as usize].table_previous = at;
        }
    }

    fn unlink_from_table(&mut self, at: u32) {
        let slot = &self.slots[at as usize];
        let (table, next, previous) = (slot.key.table, slot.table_next, slot.table_previous);
        if next != NONE {
            self.slots[next as usize].table_previous = previous;
        }
        if previous != NONE {
            self.slots[previous as usize].table_next = next;
        } else if next != NONE {
            self.tables.insert(table, next);
        } else {
            self.tables.remove(&table);
        }
    }
}

/// First bytes of an encoded warm list.
const WARM_MAGIC: [u8; 8] = *b"ANULWRM1";

/// Encodes a warm list as it is kept in a file: magic, checksum, count, then table and offset of
/// each block, little-endian.
#[must_use]
pub fn encode_warm_list(list: &[(TableId, u64)]) -> Vec<u8> {
    let mut bytes = WARM_MAGIC.to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&u32::try_from(list.len()).unwrap_or(u32::MAX).to_le_bytes());
    for (table, offset) in list.iter().take(u32::MAX as usize) {
        bytes.extend_from_slice(&table.0.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
    }
    let sum = checksum::salted(0, 0, &bytes[12..]);
    bytes[8..12].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Inverse of [`encode_warm_list`]; trailing zeros are fine. `None` when damaged: a warm list is
/// only a hint, and a start without one is a cold start.
#[must_use]
pub fn decode_warm_list(bytes: &[u8]) -> Option<Vec<(TableId, u64)>> {
    let rest = bytes.strip_prefix(&WARM_MAGIC)?;
    let (sum, covered) = rest.split_first_chunk::<4>()?;
    let (count, entries) = covered.split_first_chunk::<4>()?;
    let len = (u32::from_le_bytes(*count) as usize).checked_mul(16)?;
    let covered = covered.get(..4 + len)?;
    if checksum::salted(0, 0, covered) != u32::from_le_bytes(*sum) {
        return None;
    }
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let entries = entries[..len].chunks_exact(16);
    Some(entries.map(|entry| (TableId(number(&entry[..8])), number(&entry[8..]))).collect())
}

#[cfg(test)]
mod tests;
