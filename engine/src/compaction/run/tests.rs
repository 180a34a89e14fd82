//! Flush, compaction and the store of tables, end to end on the simulated disk, against a map.

use std::path::{Path, PathBuf};

use super::*;
use crate::compaction::flush::{FlushOptions, flush};
use crate::compaction::merge::PurgeAll;
use crate::log::Lsn;
use crate::model::{Dot, Kind, NamespaceId, OriginId, Record, Timestamp, WallMicros};
use crate::options::CompactionOptions;
use crate::sim::{
    Chance, Fault, Op, Rule, SimDisk, SimDiskOptions, SimExecutor, SimFile, SimRuntime,
};
use crate::tables::facts::Lost;
use crate::tables::manifest::Owner;
use crate::tables::store::{TABLE_DIR, quarantine_name};
use proptest::prelude::*;

const OWNER: Owner = Owner { cluster: 11, shard: 0 };
const KEYS: u64 = 400;

type Key = (Token, NamespaceId, Vec<u8>);
type Model = BTreeMap<Key, Record>;

struct World {
    executor: Rc<SimExecutor>,
    disk: SimDisk,
    dir: PathBuf,
    tables: Option<Tables<SimDisk>>,
    compactor: Option<Compactor<SimDisk, SimRuntime>>,
    stop: Rc<Cell<bool>>,
    chance: Chance,
    stamp: u64,
    memtable: Model,
    /// What each flush has led to, from nothing on.
    flushed: Vec<Model>,
}

fn options() -> CompactorOptions {
    let plan = PlanOptions {
        partition_bits: 4,
        table_size: 12 << 10,
        memtable_size: 4 << 10,
        runs_max: 6,
        tier_width: 4,
        ..PlanOptions::default()
    };
    let table = TableOptions { block_size: 1024, partition_bits: 4, ..TableOptions::default() };
    CompactorOptions { plan, upper: table.clone(), last: table }
}

impl World {
    fn new(seed: u64) -> World {
        let executor = Rc::new(SimExecutor::new(seed));
        let options = SimDiskOptions { latency_nanos_max: 1000, ..SimDiskOptions::seeded(seed) };
        let disk = SimDisk::new(&executor.runtime(), options);
        let dir = PathBuf::from("shard");
        executor.run(async {
            disk.create_dir(&dir).await.unwrap();
            disk.sync_dir(Path::new("")).await.unwrap();
            Tables::create(disk.clone(), &dir, OWNER).await.unwrap();
            disk.sync_dir(&dir).await.unwrap();
        });
        let mut world = World {
            executor,
            disk,
            dir,
            tables: None,
            compactor: None,
            stop: Rc::new(Cell::new(false)),
            chance: Chance::new(seed),
            stamp: 0,
            memtable: Model::new(),
            flushed: vec![Model::new()],
        };
        world.open().unwrap();
        world
    }

    fn open(&mut self) -> Result<()> {
        self.compactor = None;
        self.tables = None;
        let tables = self.executor.run(Tables::open(self.disk.clone(), &self.dir, OWNER))?;
        self.compactor = Some(Compactor::new(
            tables.clone(),
            self.executor.runtime(),
            options(),
            Rc::new(PurgeAll),
            Rc::new(RefCell::new(Pace::new(&CompactionOptions::default()))),
            Rc::clone(&self.stop),
        ));
        self.tables = Some(tables);
        Ok(())
    }

    fn tables(&self) -> &Tables<SimDisk> {
        self.tables.as_ref().unwrap()
    }

    fn compactor(&self) -> &Compactor<SimDisk, SimRuntime> {
        self.compactor.as_ref().unwrap()
    }

    /// Writes `count` random keys to the memtable; one in four deletes.
    fn write(&mut self, count: u64) {
        for _ in 0..count {
            self.stamp += 1;
            let key = self.chance.below(KEYS).to_be_bytes().to_vec();
            let live = !self.chance.one_in(4);
            let record = Record {
                // Four keys share a token.
                token: Token::of_key(&key[..7], 1 + u64::from(key[7] / 4)),
                namespace: NamespaceId(u32::from(key[7] % 2)),
                incarnation: 1,
                kind: if live { Kind::Put } else { Kind::Delete },
                dot: Dot { origin: OriginId(1), sequence: self.stamp },
                timestamp: Timestamp(self.stamp),
                expiry_ms: 0,
                value: if live { vec![b'v'; 20 + self.chance.index(300)] } else { Vec::new() },
                key,
            };
            self.memtable.insert((record.token, record.namespace, record.key.clone()), record);
        }
    }

    async fn flush(&mut self) -> Result<()> {
        let tables = self.tables().clone();
        let records: Vec<Record> = std::mem::take(&mut self.memtable).into_values().collect();
        let mut next = self.flushed.last().unwrap().clone();
        for record in &records {
            next.insert((record.token, record.namespace, record.key.clone()), record.clone());
        }
        let options = FlushOptions {
            table: options().upper,
            table_size: 24 << 10,
            order: tables.next_order(),
            released: Lsn(self.stamp),
            replicas: crate::shard::Replicas::new(4, &BTreeMap::new()),
        };
        let iter = records.iter().map(Record::as_ref);
        let runtime = self.executor.runtime();
        let done = flush(&tables, &runtime, &PurgeAll, iter, options, &self.stop).await?;
        done.expect("not stopped").commit(&tables, Lsn(0)).await?;
        self.flushed.push(next);
        Ok(())
    }

    fn write_and_flush(&mut self, count: u64) {
        self.write(count);
        let executor = Rc::clone(&self.executor);
        executor.run(self.flush()).unwrap();
    }

    /// Power fails; what the seed leaves is opened.
    fn crash_and_open(&mut self, seed: u64) -> Result<()> {
        self.compactor = None;
        self.tables = None;
        self.executor.kill_tasks();
        self.disk = self.disk.crash(seed);
        self.open()
    }

    fn step(&self, mode: Mode) -> Result<bool> {
        self.executor.run(self.compactor().step(mode))
    }

    fn settle(&self, mode: Mode) {
        while self.step(mode).unwrap() {}
    }

    /// Reads a key as a shard does; `stop_early` uses the greatest stamps.
    async fn get(set: &TableSet<SimFile>, key: &Key, stop_early: bool) -> Option<Record> {
        let mut best: Option<Record> = None;
        for candidate in set.candidates(key.0) {
            if let Some(found) = candidate.table.get(key.0, key.1, &key.2).await.unwrap() {
                let newer = best.as_ref().is_none_or(|best| best.timestamp < found.timestamp);
                if newer {
                    best = Some(found);
                }
            }
            if stop_early && best.as_ref().is_some_and(|best| best.timestamp > candidate.rest_max) {
                break;
            }
        }
        best.filter(|record| record.kind != Kind::Delete)
    }

    /// Whether each key reads as in the model, with and without stopping early.
    fn check(&self, set: &TableSet<SimFile>, model: &Model) {
        self.executor.run(async {
            for (key, expected) in model {
                let expected = Some(expected).filter(|record| record.kind != Kind::Delete);
                for stop_early in [false, true] {
                    let found = World::get(set, key, stop_early).await;
                    assert_eq!(found.as_ref(), expected, "{key:?} early {stop_early}");
                }
            }
        });
    }

    fn check_now(&self) {
        self.check(&self.tables().current(), self.flushed.last().unwrap());
    }

    fn table_files(&self) -> Vec<String> {
        self.executor.run(self.disk.list(&self.dir.join(TABLE_DIR))).unwrap()
    }

    /// Every table file is live, and every live table has its file.
    fn check_files(&self) {
        let set = self.tables().current();
        let mut live: Vec<_> = set.tables().map(|table| table.id().file_name()).collect();
        live.sort();
        assert_eq!(self.table_files(), live);
    }
}

#[test]
fn compaction_changes_no_answer_and_leaves_no_file() {
    for seed in 0..4 {
        let mut world = World::new(seed);
        for _ in 0..30 {
            world.write_and_flush(60);
            world.settle(Mode::Busy);
            world.check_now();
        }
        world.check_files();
        let steps = world.compactor().stats().steps;
        assert!(steps > 20, "{steps}");
        world.open().unwrap();
        world.check_now();
        world.settle(Mode::Drain);
        world.check_now();
        world.check_files();
        let set = world.tables().current();
        assert!(set.upper().is_empty());
        // Every tombstone is gone, and each live key is there once.
        let model = world.flushed.last().unwrap();
        let live = model.values().filter(|record| record.kind != Kind::Delete).count() as u64;
        assert_eq!(set.layout().stats().records, live);
    }
}

#[test]
fn many_runs_are_merged_in_tiers() {
    let mut world = World::new(9);
    // Too few bytes for the hand to be due, too many runs for a read.
    world.compactor.as_mut().unwrap().options.plan.memtable_size = 64 << 10;
    for _ in 0..30 {
        world.write_and_flush(4);
        world.settle(Mode::Busy);
        assert!(world.tables().current().layout().arcs().depth_max() <= 6);
    }
    assert!(world.compactor().stats().tier_steps > 3);
    world.check_now();
    world.check_files();
}

#[test]
fn a_reader_with_an_old_set_reads_on_while_its_tables_are_given_up() {
    let mut world = World::new(10);
    for _ in 0..6 {
        world.write_and_flush(100);
    }
    let (old, model) = (world.tables().current(), world.flushed.last().unwrap().clone());
    let files = world.table_files().len();
    world.settle(Mode::Drain);
    for _ in 0..6 {
        world.write_and_flush(100);
        world.settle(Mode::Drain);
    }
    // Nothing that the old set names was removed or punched.
    assert!(world.table_files().len() > files);
    world.check(&old, &model);
    drop(old);
    let tables = world.tables().clone();
    assert_eq!(world.executor.run(tables.collect_garbage()), 0);
    world.check_files();
    world.check_now();
}

#[test]
fn consumed_ranges_are_given_back_to_the_disk() {
    let mut world = World::new(11);
    // One big upper table, in which blocks of 4096 bytes can be punched.
    for _ in 0..8 {
        world.write(200);
    }
    world.write_and_flush(200);
    let whole = world.disk.used();
    // The hand takes the first part of the ring.
    assert!(world.step(Mode::Drain).unwrap());
    let set = world.tables().current();
    let upper: u64 = set.upper().iter().map(|table| table.entry().live_bytes).sum();
    let last: u64 = set.last().iter().map(|table| table.meta().size).sum();
    assert!(upper > 0 && last > 0, "half-way: {upper} {last}");
    assert!(world.disk.used() < whole + last / 2 + 8192, "{} {whole} {last}", world.disk.used());
    world.check_now();
    // A reopened shard does not look where the bytes are gone either.
    drop(set);
    world.open().unwrap();
    world.check_now();
}

#[test]
fn a_snapshot_stays_as_it_was_whatever_happens_to_the_shard() {
    let mut world = World::new(12);
    for _ in 0..5 {
        world.write_and_flush(100);
    }
    world.step(Mode::Drain).unwrap();
    let model = world.flushed.last().unwrap().clone();
    let to = PathBuf::from("snapshot");
    let tables = world.tables().clone();
    world.executor.run(async {
        world.disk.create_dir(&to).await.unwrap();
        tables.snapshot(&to).await.unwrap();
        world.disk.sync_dir(&to).await.unwrap();
        world.disk.sync_dir(Path::new("")).await.unwrap();
    });
    drop(tables);
    for _ in 0..5 {
        world.write_and_flush(100);
        world.settle(Mode::Drain);
    }
    world.open().unwrap();
    world.check_now();
    let opened = Tables::open(world.disk.clone(), &to, OWNER);
    let snapshot = world.executor.run(opened).unwrap();
    world.check(&snapshot.current(), &model);
}

#[test]
fn a_stop_ends_a_step_without_a_trace() {
    let mut world = World::new(13);
    for _ in 0..4 {
        world.write_and_flush(300);
    }
    let before = world.tables().current().layout().clone();
    world.stop.set(true);
    assert!(!world.step(Mode::Drain).unwrap());
    world.stop.set(false);
    let stop = Rc::clone(&world.stop);
    let runtime = world.executor.runtime();
    let setter = async move {
        // In the middle of the step's writes.
        runtime.sleep_until(runtime.now().after_nanos(1_000)).await;
        stop.set(true);
    };
    let (done, ()) =
        world.executor.run(futures_util::future::join(world.compactor().step(Mode::Drain), setter));
    assert!(!done.unwrap());
    assert_eq!(*world.tables().current().layout(), before);
    world.check_files();
    world.stop.set(false);
    world.settle(Mode::Drain);
    world.check_now();
}

#[test]
fn a_failing_disk_fails_the_step_and_nothing_else() {
    for fault in [Fault::Eio, Fault::NoSpace] {
        for op in [Op::Read, Op::Write, Op::Sync, Op::Open, Op::SyncDir, Op::Rename] {
            for nth in 1..8 {
                let mut world = World::new(20 + nth);
                for _ in 0..3 {
                    world.write_and_flush(100);
                }
                world.disk.inject(Rule::nth(op, nth, fault));
                let first = world.step(Mode::Drain);
                world.check_now();
                world.disk.clear_faults();
                world.settle(Mode::Drain);
                world.check_now();
                // What a failed step could not remove is removed at the next open.
                drop(first);
                world.open().unwrap();
                world.check_now();
                world.check_files();
            }
        }
    }
}

#[test]
fn a_damaged_input_fails_its_step_and_the_hand_moves_on() {
    let mut world = World::new(30);
    for _ in 0..6 {
        world.write_and_flush(200);
        world.settle(Mode::Drain);
    }
    world.write_and_flush(300);
    let set = world.tables().current();
    assert!(set.last().len() > 2);
    let victim = set.last()[0].id();
    let path = world.tables().identity(victim).path;
    drop(set);
    world.disk.flip_bit(&path, 8 * 100);
    let mut failed = 0;
    for _ in 0..20 {
        match world.step(Mode::Drain) {
            Ok(_) => {}
            Err(error @ Error::Corrupt { .. }) => {
                assert!(error.to_string().contains(&victim.file_name()), "{error}");
                failed += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(failed > 0);
    // Everything else has been merged: what is left of the upper tables is above the damage.
    let set = world.tables().current();
    assert!(set.table(victim).is_some());
    let left: u64 = set.upper().iter().map(|table| table.entry().live_bytes).sum();
    assert!(set.last().len() > 2 && left < 100 << 10, "{left}");
}

#[test]
fn a_damaged_run_does_not_keep_the_others_from_being_merged() {
    let mut world = World::new(32);
    // Too few bytes for the hand to be due, too many runs for a read.
    world.compactor.as_mut().unwrap().options.plan.memtable_size = 64 << 10;
    world.write_and_flush(40);
    world.write_and_flush(40);
    let victim = world.tables().current().upper()[0].id();
    let path = world.tables().identity(victim).path;
    world.disk.flip_bit(&path, 8 * 100);
    let mut failed = 0;
    for _ in 0..60 {
        world.write_and_flush(4);
        loop {
            match world.step(Mode::Busy) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Error::Corrupt { path: named, .. }) => {
                    assert_eq!(named, path);
                    failed += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!((1..=8).contains(&failed), "{failed}");
    let set = world.tables().current();
    assert!(set.table(victim).is_some());
    let depth = set.layout().arcs().depth_max();
    assert!(depth <= 8, "{depth} runs meet");
    drop(set);
    let stats = world.compactor().stats();
    assert!(stats.tier_steps > 10 && stats.avoided > 0, "{stats:?}");
    // Left alone for ten minutes, then tried again.
    let runtime = world.executor.runtime();
    world.executor.run(runtime.sleep_until(runtime.now().after_nanos(DAMAGE_NANOS)));
    assert!((0..40).any(|_| world.step(Mode::Drain).is_err()));
    // Until an operator puts the file back.
    world.disk.flip_bit(&path, 8 * 100);
    world.executor.run(runtime.sleep_until(runtime.now().after_nanos(DAMAGE_NANOS)));
    world.settle(Mode::Drain);
    assert_eq!(world.compactor().stats().avoided, 0);
    world.check_now();
    world.check_files();
}

#[test]
fn open_removes_what_no_edit_names_refuses_what_is_missing_and_puts_aside_what_is_damaged() {
    let mut world = World::new(31);
    world.write_and_flush(50);
    world.write_and_flush(50);
    let orphan = world.dir.join(TABLE_DIR).join(TableId(77).file_name());
    world.disk.write_file(&orphan, &[1; 512]);
    world.open().unwrap();
    world.check_files();
    // Its number is not used again.
    assert!(world.tables().next_table_id() > TableId(77));

    let summary = world.tables().current().upper()[0].entry().summary;
    let victim = summary.id;
    let path = world.tables().identity(victim).path;
    let bytes = world.disk.read_file(&path).unwrap();
    world.disk.write_file(&orphan, &[1; 512]);
    world.disk.remove_file(&path);
    let error = world.open().unwrap_err();
    assert!(error.to_string().contains("it is missing"), "{error}");
    // Nothing was removed while something is wrong.
    assert!(world.disk.read_file(&orphan).is_some());

    world.disk.write_file(&path, &bytes[..bytes.len() - 512]);
    for _ in 0..2 {
        world.open().unwrap();
        let set = world.tables().current();
        assert!(set.table(victim).is_none());
        let max_timestamp = summary.max_timestamp;
        let lost = Lost { table: victim, range: summary.span, max_timestamp };
        assert_eq!(set.layout().lost, [lost]);
        let aside = path.with_file_name(quarantine_name(victim));
        assert_eq!(world.disk.read_file(&aside).unwrap().len(), bytes.len() - 512);
        assert!(world.disk.read_file(&path).is_none());
    }
}

#[test]
fn a_crash_at_every_operation_loses_no_flush_that_was_committed() {
    let mut cut = 1;
    loop {
        let mut world = World::new(cut);
        for _ in 0..3 {
            world.write_and_flush(60);
        }
        world.settle(Mode::Busy);
        world.disk.cut_power_at(world.disk.op_count() + cut);
        let executor = Rc::clone(&world.executor);
        let mut attempted = world.flushed.last().unwrap().clone();
        let outcome = executor.try_run(async {
            for _ in 0..3 {
                world.write(60);
                attempted.extend(world.memtable.clone());
                world.flush().await?;
                while world.compactor().step(Mode::Drain).await? {}
            }
            Ok::<(), Error>(())
        });
        let ended = matches!(outcome, Ok(Ok(())));
        let acknowledged = world.flushed.last().unwrap().clone();
        world.crash_and_open(cut * 7).unwrap_or_else(|error| panic!("cut {cut}: {error}"));
        world.check_files();
        // The flush that was under way is there as a whole or not at all.
        let records = |world: &World| {
            let set = world.tables().current();
            let keys: Vec<Key> = attempted.keys().cloned().collect();
            world.executor.run(async move {
                let mut found = Vec::new();
                for key in &keys {
                    found.extend(World::get(&set, key, true).await);
                }
                found
            })
        };
        let live = |model: &Model| -> Vec<Record> {
            model.values().filter(|record| record.kind != Kind::Delete).cloned().collect()
        };
        let found = records(&world);
        assert!(found == live(&acknowledged) || found == live(&attempted), "cut {cut}");
        world.settle(Mode::Drain);
        assert_eq!(records(&world), found, "cut {cut}");
        world.check_files();
        if ended {
            assert!(cut > 100, "the sweep met {cut} operations");
            return;
        }
        cut += 1 + cut / 40;
    }
}

#[test]
fn expired_records_and_dropped_incarnations_leave_with_the_hand() {
    struct DropFirst;
    impl Retention for DropFirst {
        fn is_dropped(&self, record: &RecordRef<'_>) -> bool {
            record.namespace == NamespaceId(1)
        }
        fn is_purgeable(&self, record: &RecordRef<'_>, _: Lsn) -> bool {
            record.expiry_ms != 2
        }
    }
    let mut world = World::new(40);
    world.write(300);
    for (number, record) in (1u64..).zip(world.memtable.values_mut()) {
        record.kind = Kind::Put;
        // One in three expires in the past; one in three also, but a replica needs it.
        record.expiry_ms = number % 3;
    }
    let kept =
        world.memtable.values().filter(|r| r.namespace == NamespaceId(0) && r.expiry_ms != 1);
    let kept = kept.count() as u64;
    let executor = Rc::clone(&world.executor);
    executor.run(world.flush()).unwrap();
    executor.runtime().jump_wall(1_000_000);
    assert!(executor.runtime().wall() > WallMicros(2000));
    world.compactor.as_mut().unwrap().retention = Rc::new(DropFirst);
    world.settle(Mode::Drain);
    assert_eq!(world.tables().current().layout().stats().records, kept);
    let stats = world.compactor().stats().records;
    assert!(stats.dropped > 0 && stats.purged > 0 && stats.kept == kept, "{stats:?}");
}

#[test]
fn an_empty_memtable_flushes_to_an_edit_without_tables() {
    let mut world = World::new(41);
    let executor = Rc::clone(&world.executor);
    executor.run(world.flush()).unwrap();
    assert!(world.tables().current().upper().is_empty());
    assert!(world.table_files().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn any_run_of_flushes_steps_and_crashes_reads_as_the_map(
        seed: u64, moves in prop::collection::vec((0u8..8, 1u64..150), 1..25),
    ) {
        let mut world = World::new(seed);
        for (kind, count) in moves {
            match kind {
                0..=3 => world.write_and_flush(count),
                4 => drop(world.step(Mode::Busy).unwrap()),
                5 => drop(world.step(Mode::Idle).unwrap()),
                6 => drop(world.step(Mode::Drain).unwrap()),
                _ => {
                    // Everything is committed, so a crash changes nothing.
                    world.crash_and_open(count).unwrap();
                    world.check_files();
                }
            }
            world.check_now();
        }
    }
}
