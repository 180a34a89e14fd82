//! The simulated disk against the contract of `disk.rs`: what may and what must not survive.

use super::*;
use crate::buffer::AlignedBuf;
use crate::disk::{File, WriteMode};
use crate::sim::{SimExecutor, Stopped};

struct World {
    executor: SimExecutor,
    disk: SimDisk,
}

fn world(seed: u64) -> World {
    let executor = SimExecutor::new(seed);
    let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::seeded(seed));
    World { executor, disk }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(name)
}

fn filled(byte: u8, len: usize) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(len);
    buf.fill(byte);
    buf
}

impl World {
    /// A file whose name and first `len` bytes are durable.
    fn durable_file(&self, name: &str, byte: u8, len: usize) -> SimFile {
        self.executor.run(async {
            let file = self.disk.open(&path(name), OpenMode::Create).await.unwrap();
            file.write_at(0, filled(byte, len), WriteMode::Durable).await.1.unwrap();
            self.disk.sync_dir(&path("")).await.unwrap();
            file
        })
    }

    fn write(&self, file: &SimFile, offset: u64, byte: u8, len: usize) {
        let written =
            self.executor.run(file.write_at(offset, filled(byte, len), WriteMode::Cached));
        written.1.unwrap();
    }
}

#[test]
fn a_durable_write_survives_and_a_cached_one_may_be_kept_dropped_or_torn() {
    let (mut kept, mut dropped, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let world = world(1);
        let file = world.durable_file("a", 1, 4096);
        world.write(&file, 0, 2, 4096);
        let bytes = world.disk.crash(seed).read_file(&path("a")).unwrap();
        assert_eq!(bytes.len(), 4096);
        assert!(bytes.chunks(512).all(|sector| sector.iter().all(|b| *b == sector[0])));
        match bytes.iter().filter(|byte| **byte == 2).count() {
            4096 => kept += 1,
            0 => dropped += 1,
            _ => torn += 1,
        }
    }
    assert!(kept > 20 && dropped > 20 && torn > 20, "{kept} {dropped} {torn}");
}

#[test]
fn a_sync_makes_what_returned_before_it_durable_and_the_length_too() {
    for seed in 0..50 {
        let world = world(seed);
        let file = world.durable_file("a", 1, 512);
        world.write(&file, 512, 2, 8192);
        world.executor.run(file.sync()).unwrap();
        world.write(&file, 8192 + 512, 3, 512);
        let bytes = world.disk.crash(seed).read_file(&path("a")).unwrap();
        assert!(bytes.len() >= 8192 + 512);
        assert!(bytes[512..8704].iter().all(|byte| *byte == 2));
    }
}

#[test]
fn an_older_cached_write_never_comes_up_through_a_newer_durable_one() {
    for seed in 0..100 {
        let world = world(seed);
        let file = world.durable_file("a", 1, 4096);
        world.write(&file, 0, 2, 4096);
        let durable = file.write_at(1024, filled(3, 512), WriteMode::Durable);
        world.executor.run(durable).1.unwrap();
        let bytes = world.disk.crash(seed).read_file(&path("a")).unwrap();
        assert!(bytes[1024..1536].iter().all(|byte| *byte == 3));
    }
}

#[test]
fn a_name_is_durable_only_after_its_directory_is_synced() {
    let mut seen = [0; 2];
    for seed in 0..100 {
        let world = world(seed);
        world.executor.run(async {
            world.disk.create_dir(&path("data/deep")).await.unwrap();
            world.disk.sync_dir(&path("")).await.unwrap();
            world.disk.sync_dir(&path("data")).await.unwrap();
            let file = world.disk.open(&path("data/deep/a"), OpenMode::Create).await.unwrap();
            file.write_at(0, filled(1, 512), WriteMode::Durable).await.1.unwrap();
        });
        let survivor = world.disk.crash(seed);
        seen[survivor.files().len()] += 1;
        let listed = world.executor.run(survivor.list(&path("data/deep"))).unwrap();
        assert_eq!(listed.len(), survivor.files().len());
    }
    assert!(seen[0] > 20 && seen[1] > 20, "{seen:?}");
}

#[test]
fn a_replaced_name_is_old_or_new_but_never_absent() {
    let mut seen = [0; 3];
    for seed in 0..100 {
        let world = world(seed);
        world.durable_file("current", 1, 512);
        world.durable_file("next", 2, 512);
        world.executor.run(world.disk.rename(&path("next"), &path("current"))).unwrap();
        let survivor = world.disk.crash(seed);
        let byte = survivor.read_file(&path("current")).unwrap()[0];
        seen[usize::from(byte)] += 1;
        assert_eq!(survivor.read_file(&path("next")).is_some(), byte == 1);
    }
    assert!(seen[1] > 20 && seen[2] > 20, "{seen:?}");
}

#[test]
fn a_failed_sync_forgets_and_the_next_one_succeeds() {
    let mut lost = 0;
    for seed in 0..100 {
        let world = world(seed);
        let file = world.durable_file("a", 1, 512);
        world.write(&file, 0, 2, 512);
        world.disk.inject(Rule::nth(Op::Sync, 1, Fault::Eio));
        assert!(world.executor.run(file.sync()).is_err());
        world.executor.run(file.sync()).unwrap();
        assert_eq!(world.disk.read_file(&path("a")).unwrap()[0], 2, "the cache still shows it");
        let byte = world.disk.crash(seed).read_file(&path("a")).unwrap()[0];
        lost += u32::from(byte == 1);
    }
    assert!((20..80).contains(&lost), "{lost}");
}

#[test]
fn a_rule_strikes_the_nth_match_and_counts_only_matches() {
    let world = world(1);
    let (a, b) = (world.durable_file("a", 1, 512), world.durable_file("b", 1, 512));
    world.disk.inject(Rule::nth(Op::Read, 2, Fault::Eio).on("b"));
    let read = |file: &SimFile| world.executor.run(file.read_at(0, 512)).is_ok();
    assert!(read(&b) && read(&a) && read(&a) && !read(&b) && read(&b));
    world.disk.inject(Rule::nth(Op::Read, 1, Fault::Eio).forever());
    assert!(!read(&a) && !read(&a));
    world.disk.clear_faults();
    assert!(read(&a));
    assert_eq!(world.disk.op_log().iter().filter(|record| record.fault.is_some()).count(), 3);
}

#[test]
fn a_full_disk_refuses_growth_but_not_overwriting_and_punching_gives_space_back() {
    let world = world(1);
    let file = world.durable_file("a", 1, 8192);
    world.disk.set_capacity(8192);
    let write =
        |offset| world.executor.run(file.write_at(offset, filled(2, 4096), WriteMode::Cached)).1;
    assert!(write(8192).unwrap_err().is_full());
    write(0).unwrap();
    world.executor.run(file.punch(0, 4096)).unwrap();
    write(8192).unwrap();
    assert_eq!(world.disk.used(), 8192);
    let space = world.executor.run(world.disk.space(&path(""))).unwrap();
    assert_eq!((space.free, space.total), (0, 8192));
    drop(file);
    world.executor.run(world.disk.remove(&path("a"))).unwrap();
    world.executor.run(world.disk.sync_dir(&path(""))).unwrap();
    assert_eq!(world.disk.used(), 0);
}

#[test]
fn a_power_cut_halts_at_its_operation_and_old_handles_are_dead() {
    let world = world(1);
    let file = world.durable_file("a", 1, 512);
    world.disk.cut_power_at(world.disk.op_count() + 3);
    let run = world.executor.try_run(async {
        for _ in 0..10 {
            file.write_at(0, filled(2, 512), WriteMode::Durable).await.1.unwrap();
        }
    });
    assert_eq!(run, Err(Stopped::Halted));
    assert!(world.disk.is_dead());
    world.executor.kill_tasks();
    let survivor = world.disk.crash(1);
    assert_eq!(survivor.read_file(&path("a")).unwrap()[0], 2, "two writes were durable");
    assert!(world.executor.run(file.read_at(0, 512)).is_err());
    assert!(world.executor.run(survivor.open(&path("a"), OpenMode::Read)).is_ok());
}

#[test]
fn a_dropped_future_leaves_its_operation_running() {
    let world = world(1);
    let file = world.durable_file("a", 1, 512);
    world.executor.run(async {
        let mut write = Box::pin(file.write_at(0, filled(2, 512), WriteMode::Durable));
        std::future::poll_fn(|context| {
            assert!(write.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        drop(write);
    });
    world.executor.run_for_nanos(1_000_000);
    assert_eq!(world.disk.crash(1).read_file(&path("a")).unwrap()[0], 2);
}

#[test]
fn concurrent_operations_end_in_an_order_that_the_seed_decides() {
    let order = |seed| {
        let world = world(seed);
        let file = world.durable_file("a", 1, 4096);
        let ended = Rc::new(RefCell::new(Vec::new()));
        world.executor.run(async {
            let reads = (0..8usize).map(|index| {
                let (read, ended) = (file.read_at(0, 512), ended.clone());
                async move {
                    read.await.unwrap();
                    ended.borrow_mut().push(index);
                }
            });
            futures_util::future::join_all(reads).await;
        });
        ended.take()
    };
    assert_eq!(order(1), order(1));
    assert_ne!(order(1), order(2));
}

#[test]
fn damage_changes_what_is_read_and_what_survives() {
    let world = world(1);
    let file = world.durable_file("a", 1, 2048);
    world.executor.run(file.write_at(512, filled(2, 512), WriteMode::Durable)).1.unwrap();
    world.disk.flip_bit(&path("a"), 8);
    world.disk.misdirect(&path("a"), 512, &path("a"), 1536, 512);
    assert!(world.disk.revert_sector(&path("a"), 1));
    assert!(!world.disk.revert_sector(&path("a"), 2));
    let bytes = world.disk.read_file(&path("a")).unwrap();
    assert_eq!((bytes[0], bytes[1], bytes[512], bytes[1024], bytes[1536]), (1, 0, 1, 1, 2));
    world.disk.truncate(&path("a"), 512);
    assert_eq!(world.executor.run(file.read_at(0, 1024)).unwrap().len(), 512);
    assert_eq!(world.disk.crash(3).read_file(&path("a")).unwrap().len(), 512);
}

#[test]
fn reads_can_lie() {
    let world = world(1);
    let file = world.durable_file("a", 1, 1024);
    world.write(&file, 512, 2, 512);
    world.disk.inject(Rule::nth(Op::Read, 1, Fault::Misdirect(512)));
    world.disk.inject(Rule::nth(Op::Read, 2, Fault::FlipBit));
    assert_eq!(world.executor.run(file.read_at(0, 512)).unwrap()[0], 2);
    let flipped = world.executor.run(file.read_at(0, 512)).unwrap();
    assert_eq!(flipped.iter().filter(|byte| **byte != 1).count(), 1);
}

#[test]
fn a_link_is_a_second_name_of_one_file_also_after_a_crash() {
    let world = world(1);
    let file = world.durable_file("a", 1, 512);
    world.executor.run(async {
        world.disk.link(&path("a"), &path("b")).await.unwrap();
        world.disk.sync_dir(&path("")).await.unwrap();
        assert!(world.disk.link(&path("a"), &path("b")).await.is_err());
    });
    world.write(&file, 0, 2, 512);
    let survivor = world.disk.crash(1);
    assert_eq!(survivor.read_file(&path("a")), survivor.read_file(&path("b")));
    assert_eq!(survivor.used(), 4096);
}

#[test]
fn a_directory_has_one_owner_at_a_time() {
    let world = world(1);
    world.executor.run(async {
        world.disk.create_dir(&path("d")).await.unwrap();
        let lock = world.disk.lock(&path("d")).await.unwrap();
        assert!(matches!(world.disk.lock(&path("d")).await, Err(Error::Mismatch { .. })));
        drop(lock);
        let _lock = world.disk.lock(&path("d")).await.unwrap();
        world.disk.sync_dir(&path("")).await.unwrap();
        let survivor = world.disk.crash(1);
        assert!(survivor.lock(&path("d")).await.is_ok(), "a dead process holds nothing");
    });
}

#[test]
fn a_hung_operation_never_ends_and_a_delayed_one_is_late() {
    let world = world(1);
    let file = world.durable_file("a", 1, 512);
    world.disk.inject(Rule::nth(Op::Sync, 1, Fault::Delay(10_000_000_000)));
    world.disk.inject(Rule::nth(Op::Sync, 2, Fault::Hang));
    let start = world.executor.runtime().now();
    world.executor.run(file.sync()).unwrap();
    assert!(world.executor.runtime().now().nanos_since(start) >= 10_000_000_000);
    assert!(matches!(world.executor.try_run(file.sync()), Err(Stopped::Deadlock)));
}

#[test]
fn a_file_put_there_by_hand_is_found_and_durable() {
    let world = world(1);
    world.disk.write_file(&path("x/y/file"), b"one");
    world.disk.write_file(&path("x/y/file"), b"three");
    assert_eq!(world.executor.run(world.disk.list(&path("x/y"))).unwrap(), ["file"]);
    let survivor = world.disk.crash(1);
    assert_eq!(survivor.read_file(&path("x/y/file")).unwrap(), b"three");
    assert!(survivor.remove_file(&path("x/y/file")) && !survivor.remove_file(&path("x/y/file")));
}

#[test]
fn an_observer_meets_the_states_before_and_after_each_change() {
    let world = world(1);
    let file = world.durable_file("a", 1, 512);
    let seen = Rc::new(RefCell::new(Vec::new()));
    let (noted, runtime) = (seen.clone(), world.executor.runtime());
    world.disk.observe(move |disk| {
        let image = disk.image_onto(&runtime, 1);
        let now = disk.read_file(&path("a")).unwrap()[0];
        noted.borrow_mut().push((now, image.read_file(&path("a")).unwrap()[0]));
    });
    world.write(&file, 0, 2, 512);
    world.executor.run(file.sync()).unwrap();
    world.executor.run(file.read_at(0, 512)).unwrap();
    let seen = seen.take();
    assert_eq!(seen.iter().map(|(now, _)| *now).collect::<Vec<_>>(), [1, 2, 2, 2]);
    assert_eq!((seen[0].1, seen[3].1), (1, 2));
    assert!(!world.disk.is_dead());
}
