//! The policy's figures, from a simulation with real keys and no files, and its single decisions.

use std::collections::BTreeMap;

use super::*;
use crate::model::Timestamp;
use crate::tables::edit::TableSummary;
use crate::tables::layout::tests::table;
use proptest::prelude::*;

const KIB: u64 = 1024;
/// Records in a memtable; a record has 1 KiB, so a scaled-down memtable has 1 MiB.
const MEMTABLE: u64 = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Version {
    number: u64,
    live: bool,
}

/// A store without files: what each table holds, and what has been written.
struct Store {
    options: PlanOptions,
    layout: Layout,
    contents: BTreeMap<TableId, BTreeMap<u64, Version>>,
    memtable: BTreeMap<u64, Version>,
    writes: u64,
    bytes_written: u64,
    space_max: u64,
    depth_max: usize,
    step_max: u64,
}

impl Store {
    fn new(options: PlanOptions) -> Store {
        Store {
            options,
            layout: Layout::default(),
            contents: BTreeMap::new(),
            memtable: BTreeMap::new(),
            writes: 0,
            bytes_written: 0,
            space_max: 0,
            depth_max: 0,
            step_max: 0,
        }
    }

    fn write(&mut self, key: u64, live: bool) {
        self.writes += 1;
        let token = Token::of_key(&key.to_le_bytes(), 7).0;
        self.memtable.insert(token, Version { number: self.writes, live });
        if self.memtable.len() as u64 == MEMTABLE {
            self.flush();
            self.settle(Mode::Busy);
        }
    }

    fn flush(&mut self) {
        let records = std::mem::take(&mut self.memtable);
        if records.is_empty() {
            return;
        }
        let level = Level::Upper { order: self.layout.next_order };
        let added = vec![self.add(level, records)];
        self.commit(&TableSetEdit { added, ..TableSetEdit::default() });
    }

    fn settle(&mut self, mode: Mode) {
        while let Some(step) = plan(&self.layout, &self.options, WallMicros(0), mode) {
            self.run(&step);
        }
    }

    fn add(&mut self, level: Level, records: BTreeMap<u64, Version>) -> AddedTable {
        let id = self.contents.last_key_value().map_or(1, |(id, _)| id.0 + 1);
        let size = records.values().map(|v| if v.live { KIB } else { KIB / 16 }).sum();
        self.bytes_written += size;
        let ends = (*records.keys().next().unwrap(), *records.keys().next_back().unwrap());
        let mut added = table(id, level, ends, size);
        added.summary = TableSummary {
            record_count: records.len() as u64,
            tombstone_count: records.values().filter(|v| !v.live).count() as u64,
            ..added.summary
        };
        self.contents.insert(TableId(id), records);
        added
    }

    fn run(&mut self, step: &Step) {
        let mut merged: BTreeMap<u64, Version> = BTreeMap::new();
        let mut read: BTreeMap<TableId, u64> = BTreeMap::new();
        for entry in self.layout.entries() {
            let id = entry.id();
            if !step.upper.contains(&id) && !step.last.contains(&id) {
                continue;
            }
            let bounds = step.range.first.0..=step.range.last.0;
            for (&token, &version) in self.contents[&id].range(bounds) {
                if entry.live.contains(Token(token)) {
                    *read.entry(id).or_default() += if version.live { KIB } else { KIB / 16 };
                    let newest = merged.entry(token).or_insert(version);
                    *newest = if newest.number > version.number { *newest } else { version };
                }
            }
            assert!(
                !step.last.contains(&id)
                    || self.contents[&id].keys().all(|t| step.range.contains(Token(*t)))
            );
        }
        self.step_max = self.step_max.max(read.values().sum());
        if step.is_bottom() {
            merged.retain(|_, version| version.live);
        }
        let mut cutter =
            Cutter::new(self.options.partition_bits, self.options.table_size, step.bytes);
        let mut outputs = Vec::new();
        let mut current: BTreeMap<u64, Version> = BTreeMap::new();
        for (token, version) in merged {
            if cutter.starts_table(Token(token), KIB, current.len() as u64 * KIB) {
                outputs.push(self.add(step.into, std::mem::take(&mut current)));
            }
            current.insert(token, version);
        }
        if !current.is_empty() {
            outputs.push(self.add(step.into, current));
        }
        let new: u64 = outputs.iter().map(|table| table.summary.size).sum();
        self.space_max = self.space_max.max(self.space() + new);
        let edit = step.edit(&self.layout, outputs, &|id| read.get(&id).copied().unwrap_or(0));
        self.commit(&edit);
    }

    fn commit(&mut self, edit: &TableSetEdit) {
        self.layout = self.layout.apply(edit).unwrap();
        self.depth_max = self.depth_max.max(self.layout.arcs().depth_max());
        self.space_max = self.space_max.max(self.space());
    }

    /// Bytes on disk when consumed ranges are given back.
    fn space(&self) -> u64 {
        self.layout.entries().map(|entry| entry.live_bytes).sum()
    }

    fn get(&self, key: u64) -> Option<Version> {
        let token = Token::of_key(&key.to_le_bytes(), 7);
        let upper =
            self.layout.arcs().at(token).iter().map(|t| &self.layout.upper()[t.place as usize]);
        let last = self.layout.last_at(token).map(|place| &self.layout.last()[place]);
        upper.chain(last).find_map(|entry| self.contents[&entry.id()].get(&token.0).copied())
    }
}

fn options(space_target: f64, runs_max: usize) -> PlanOptions {
    PlanOptions {
        partition_bits: 10,
        table_size: MEMTABLE * KIB,
        memtable_size: MEMTABLE * KIB,
        space_target,
        runs_max,
        ..PlanOptions::default()
    }
}

/// Loads `memtables` memtables of keys.
fn loaded(memtables: u64, options: PlanOptions) -> (Store, u64) {
    let mut store = Store::new(options);
    let keys = memtables * MEMTABLE;
    (0..keys).for_each(|key| store.write(key, true));
    (store, keys)
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 20
}

/// Overwrites random keys, once the store's size to get into the stride and `rounds` times it
/// to measure: write amplification and space.
fn overwrite(store: &mut Store, keys: u64, rounds: u64) -> (f64, f64) {
    let mut state = 1;
    let mut number = store.writes;
    for count in 0..(1 + rounds) * keys {
        if count == keys {
            number = store.writes;
            (store.bytes_written, store.space_max, store.depth_max, store.step_max) = (0, 0, 0, 0);
        }
        store.write(random(&mut state) % keys, true);
    }
    let user = (store.writes - number) * KIB;
    (store.bytes_written as f64 / user as f64, store.space_max as f64 / (keys * KIB) as f64)
}

#[test]
fn random_overwrites_of_5_gib_write_under_3_bytes_a_byte_in_under_1_4_of_space() {
    // 80 memtables: 5 GiB with memtables of 64 MiB, scaled down by 64.
    let (mut store, keys) = loaded(80, options(0.30, 64));
    let (writes, space) = overwrite(&mut store, keys, 2);
    println!("writes {writes:.2} space {space:.3} depth {}", store.depth_max);
    assert!(writes <= 3.0, "write amplification {writes:.2}");
    assert!(space <= 1.40, "space {space:.3}");
    assert!(store.depth_max <= 64);
    // A step is a last-level table or two and their slices: no long stretch without a yield.
    assert!(store.step_max <= 4 * store.options.table_size, "{}", store.step_max);
}

#[test]
fn the_curve_of_space_against_writes() {
    for target in [0.20, 0.40] {
        let (mut store, keys) = loaded(48, options(target, 64));
        let (writes, space) = overwrite(&mut store, keys, 1);
        println!("target {target} writes {writes:.2} space {space:.3}");
        let theory = 1.0 + 1.0 / (2.0 * target);
        assert!((writes / theory - 1.0).abs() < 0.15, "{target}: {writes:.2}, theory {theory:.2}");
        assert!(space < 1.0 + target + 0.08, "{target}: {space:.3}");
    }
}

#[test]
fn tiers_bound_the_tables_at_a_token() {
    for (runs_max, writes_max) in [(16, 5.0), (32, 4.0)] {
        let (mut store, keys) =
            loaded(80, PlanOptions { tier_width: 6, ..options(0.30, runs_max) });
        let (writes, space) = overwrite(&mut store, keys, 1);
        println!("runs {runs_max} writes {writes:.2} space {space:.3} depth {}", store.depth_max);
        // A flush adds one before the plan is asked.
        assert!(store.depth_max <= runs_max + 1, "{}", store.depth_max);
        assert!(writes <= writes_max, "runs {runs_max}: {writes:.2}");
        assert!(space <= 1.42, "runs {runs_max}: {space:.3}");
    }
}

#[test]
fn loading_new_keys_costs_a_few_writes_a_byte() {
    let (store, keys) = loaded(80, options(0.30, 64));
    let writes = store.bytes_written as f64 / (keys * KIB) as f64;
    println!("load: writes {writes:.2}");
    assert!(writes <= 4.0, "{writes:.2}");
}

#[test]
fn idle_time_brings_the_upper_tables_down_and_then_rests() {
    let (mut store, keys) = loaded(20, options(0.30, 64));
    overwrite(&mut store, keys, 0);
    store.settle(Mode::Idle);
    let pressure = Pressure::of(&store.layout, &store.options);
    assert!(pressure.upper <= 0.15 * pressure.last);
    store.settle(Mode::Settle);
    let pressure = Pressure::of(&store.layout, &store.options);
    assert!(pressure.upper <= 0.02 * pressure.last);
    assert_eq!(plan(&store.layout, &store.options, WallMicros(0), Mode::Settle), None);
    store.settle(Mode::Drain);
    assert!(store.layout.upper().is_empty());
    assert_eq!(store.space(), keys * KIB);
}

#[test]
fn deletes_bring_space_back_before_idle_time() {
    // Tombstones are small; they count for the records they hide, or nothing would move.
    let (mut store, keys) = loaded(40, options(0.30, 64));
    (0..keys).for_each(|key| store.write(key, false));
    assert!(store.space() < keys * KIB / 2, "{} of {}", store.space(), keys * KIB);
    store.flush();
    store.settle(Mode::Drain);
    assert_eq!(store.space(), 0);
}

#[test]
fn tables_are_cut_where_a_partition_begins() {
    let (mut store, keys) = loaded(24, options(0.30, 64));
    overwrite(&mut store, keys, 0);
    let bits = store.options.partition_bits;
    let spans: Vec<_> = store.layout.last().iter().map(|entry| entry.summary.span).collect();
    assert!(spans.len() > 12);
    for pair in spans.windows(2) {
        assert_ne!(pair[0].last.partition(bits), pair[1].first.partition(bits));
    }
    for entry in store.layout.last() {
        assert!(entry.summary.size <= 3 * store.options.table_size + 4 * KIB);
    }
}

#[test]
fn a_partition_larger_than_a_table_gets_several() {
    let (mut store, keys) = loaded(24, PlanOptions { partition_bits: 1, ..options(0.30, 64) });
    let (_, space) = overwrite(&mut store, keys, 1);
    assert!(store.layout.last().len() >= 8, "{}", store.layout.last().len());
    assert!(space < 1.5, "{space}");
}

#[test]
fn an_empty_layout_needs_nothing() {
    for mode in [Mode::Busy, Mode::Idle, Mode::Settle, Mode::Drain, Mode::Relieve] {
        assert_eq!(plan(&Layout::default(), &PlanOptions::default(), WallMicros(0), mode), None);
    }
    let pressure = Pressure::of(&Layout::default(), &PlanOptions::default());
    assert_eq!(pressure.debt(), 0.0);
}

#[test]
fn a_table_whose_records_expired_is_rewritten_once() {
    let options = options(0.30, 64);
    let mut added = table(1, Level::Last, (0, 1 << 60), 1 << 20);
    added.summary = TableSummary {
        record_count: 100,
        expiring_count: 80,
        min_expiry_ms: 1_000,
        max_expiry_ms: 3_000,
        written_ms: 500,
        max_timestamp: Timestamp(1),
        ..added.summary
    };
    let layout_of = |added| {
        Layout::default()
            .apply(&TableSetEdit { added: vec![added], ..TableSetEdit::default() })
            .unwrap()
    };
    let at = |layout: &Layout, ms: u64| plan(layout, &options, WallMicros(ms * 1000), Mode::Busy);
    assert_eq!(at(&layout_of(added), 1_200), None);
    let step = at(&layout_of(added), 2_600).expect("60 % of the records are dead");
    assert_eq!((step.last, step.hand), (vec![TableId(1)], None));
    // Written anew and still full of expired records: a replica has not seen them yet.
    added.summary.written_ms = 3_100;
    assert_eq!(at(&layout_of(added), 9_000), None);
}

/// Four last-level tables of 8 MiB, a quarter of the ring each, and upper tables over them:
/// which quarters each covers, its bytes, and how many of its records are tombstones.
fn quarters(upper: &[(u64, u64, u64, u64)]) -> Layout {
    const QUARTER: u64 = 1 << 62;
    let ends = |first: u64, last: u64| (first * QUARTER, last * QUARTER + (QUARTER - 1));
    let mut added: Vec<_> = (0..4)
        .map(|it| table(it + 1, Level::Last, ends(it, it), 8 << 20))
        .map(|mut table| {
            table.summary.record_count = 1000;
            table
        })
        .collect();
    for (id, (first, last, bytes, tombstones)) in (5..).zip(upper) {
        let mut upper = table(id, Level::Upper { order: id - 5 }, ends(*first, *last), *bytes);
        upper.summary.record_count = 1000;
        upper.summary.tombstone_count = *tombstones;
        added.push(upper);
    }
    Layout::default().apply(&TableSetEdit { added, ..TableSetEdit::default() }).unwrap()
}

fn quarter_options() -> PlanOptions {
    PlanOptions { table_size: 8 << 20, memtable_size: 1 << 10, ..options(0.0001, 64) }
}

fn with_room(layout: &Layout, mode: Mode, room: u64) -> Option<Step> {
    let avoid = Avoid { room, ..Avoid::default() };
    plan_around(layout, &quarter_options(), WallMicros(0), mode, &avoid)
}

#[test]
fn a_step_whose_output_does_not_fit_is_passed_over_for_one_that_does() {
    // New data at the hand, tombstones for all of the last quarter.
    let layout = quarters(&[(0, 1, 2 << 20, 0), (3, 3, 1 << 20, 1000)]);
    let first = |mode, room| with_room(&layout, mode, room).map(|step| step.last[0].0);
    assert_eq!(first(Mode::Drain, u64::MAX), Some(1), "the hand's place");
    for mode in [Mode::Busy, Mode::Drain] {
        assert_eq!(first(mode, 9 << 20), Some(1));
        assert_eq!(first(mode, (9 << 20) - 1), Some(4), "{mode:?}: what is hidden is not written");
        assert_eq!(first(mode, (1 << 20) - 1), None, "{mode:?}");
    }
    // Its last-level table alone is larger than what is free, and there is nothing else.
    let layout = quarters(&[(0, 0, 1 << 20, 0)]);
    for mode in [Mode::Busy, Mode::Drain, Mode::Relieve] {
        assert!(with_room(&layout, mode, 9 << 20).is_some());
        assert_eq!(with_room(&layout, mode, 8 << 20), None, "{mode:?}");
    }
}

#[test]
fn with_little_space_what_gives_back_most_goes_first() {
    let layout = quarters(&[(0, 0, 3 << 20, 0), (2, 2, 1 << 20, 500), (3, 3, 1 << 20, 1000)]);
    let first = |room| with_room(&layout, Mode::Relieve, room).map(|step| step.last[0].0);
    assert_eq!(first(u64::MAX), Some(4));
    let mut without =
        layout.apply(&TableSetEdit { removed: vec![TableId(7)], ..TableSetEdit::default() });
    let layout = without.as_mut().unwrap();
    assert_eq!(with_room(layout, Mode::Relieve, u64::MAX).unwrap().last, [TableId(3)]);
}

#[test]
fn where_nothing_fits_the_last_level_upper_tables_are_merged_among_themselves() {
    let layout = quarters(&[(0, 3, 4 << 20, 0), (0, 3, 4 << 20, 0), (1, 3, 3 << 20, 0)]);
    for room in [1 << 20, 2 << 20] {
        let step = with_room(&layout, Mode::Relieve, room).expect("a small one");
        assert!(step.last.is_empty() && step.upper.len() == 3, "{step:?}");
        assert!(step.bytes <= room && step.bytes > room / 2, "{room}: {step:?}");
    }
    assert_eq!(with_room(&layout, Mode::Relieve, 64 << 10), None, "not worth a step");
    // With one table at each token there is nothing to overwrite.
    let layout = quarters(&[(0, 1, 4 << 20, 0), (2, 3, 4 << 20, 0)]);
    assert_eq!(with_room(&layout, Mode::Relieve, 2 << 20), None);
}

#[test]
fn on_a_full_disk_every_step_fits_and_deletes_give_all_of_it_back() {
    let (mut store, keys) = loaded(24, options(0.30, 64));
    store.settle(Mode::Drain);
    // The deletes come while nothing is compacted, and leave a quarter of a table's room.
    for key in 0..keys {
        let token = Token::of_key(&key.to_le_bytes(), 7).0;
        store.memtable.insert(token, Version { number: u64::MAX - 1, live: false });
        if store.memtable.len() as u64 == 4 * MEMTABLE {
            store.flush();
        }
    }
    store.flush();
    let disk = store.space() + MEMTABLE * KIB / 4;
    let mut steps = 0;
    loop {
        let room = disk - store.space();
        let avoid = Avoid { room, ..Avoid::default() };
        let now = WallMicros(0);
        let step = plan_around(&store.layout, &store.options, now, Mode::Relieve, &avoid);
        let Some(step) = step else { break };
        store.space_max = 0;
        store.run(&step);
        assert!(store.space_max <= disk, "step {steps}: {} of {disk}", store.space_max);
        steps += 1;
    }
    assert!(steps > 4, "{steps}");
    assert_eq!(store.space(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn whatever_is_written_stays_readable_and_every_plan_ends(
        seed: u64, space_target in 0.1f64..0.6, runs_max in 1usize..12, tier_width in 0usize..8,
        bits in 0u32..12, keys in 500u64..20_000, skew in any::<bool>(),
    ) {
        let options = PlanOptions {
            partition_bits: bits,
            memtable_size: 64 * KIB,
            table_size: 512 * KIB,
            tier_width,
            ..options(space_target, runs_max)
        };
        let mut store = Store::new(options);
        let mut model = BTreeMap::new();
        let mut state = seed;
        for _ in 0..keys {
            let key = random(&mut state) % if skew { keys / 10 + 1 } else { keys };
            let live = !random(&mut state).is_multiple_of(8);
            store.write(key, live);
            model.insert(key, live);
        }
        store.flush();
        store.settle(Mode::Busy);
        for mode in [Mode::Busy, Mode::Idle, Mode::Settle, Mode::Relieve, Mode::Drain] {
            store.settle(mode);
            for (&key, &live) in &model {
                prop_assert_eq!(store.get(key).is_some_and(|version| version.live), live);
            }
        }
    }
}
