//! Closing: what it waits for, and what it tells meanwhile.

use super::*;
use crate::runtime::Runtime;
use crate::shard::{BackgroundTask, ClosingStage};

#[test]
fn it_waits_for_no_log_segment_that_nobody_needs() {
    let mut world = World::new();
    world.options.log.segment_size = 64 << 20;
    let shard = world.open();
    world.put(&shard, "a", b"1");
    let before = world.disk.op_count();
    world.run(shard.close()).expect("it closes");
    let operations = world.disk.op_count() - before;
    assert!(operations < 40, "{operations} operations: the zeros of a segment are 64");
    drop(shard);
    let shard = world.open();
    assert_eq!(world.get(&shard, "a").as_deref(), Some(&b"1"[..]));
}

#[test]
fn it_does_not_wait_until_a_slow_compaction_may_go_on() {
    let mut world = World::new();
    // A chunk of a table may be written every few minutes.
    (world.options.compaction.rate_min, world.options.compaction.rate_max) = (1000, 1000);
    (world.options.memtable_size, world.options.compaction.table_size) = (512 << 10, 64 << 20);
    let shard = world.open();
    let mut chance = crate::sim::Chance::new(3);
    for i in 0..4000 {
        let mut value = vec![0; 1000];
        chance.fill(&mut value);
        world.put(&shard, &format!("key{i}"), &value);
    }
    let runtime = world.executor.runtime();
    // Until a step sleeps for its pace.
    world.run(runtime.sleep_until(runtime.now().after_nanos(5_000_000_000)));
    assert!(shard.stats().tables > 1, "{:?}", shard.stats());
    let begin = runtime.now();
    world.run(shard.close()).expect("it closes");
    let took = runtime.now().nanos_since(begin);
    assert!(took < 1_000_000_000, "{} ms", took / 1_000_000);
}

#[test]
fn it_tells_how_far_it_is() {
    let world = World::new();
    let shard = world.open();
    let all = BackgroundTask::ALL.iter().fold(0, |tasks, task| tasks | task.bit());
    assert_eq!(shard.closing().stage, ClosingStage::Open);
    assert_eq!(shard.closing().tasks & !all, 0);
    let mut seen = Vec::new();
    world
        .run(async {
            let mut closing = std::pin::pin!(shard.close());
            std::future::poll_fn(|context| {
                let polled = closing.as_mut().poll(context);
                let now = shard.closing();
                if seen.last() != Some(&now.stage) {
                    seen.push(now.stage);
                }
                assert!(now.stage <= ClosingStage::Tasks || now.tasks == 0, "{now:?}");
                polled
            })
            .await
        })
        .expect("it closes");
    use ClosingStage::{Closed, Log, Tasks, WarmList};
    assert_eq!(seen, [Tasks, Log, WarmList, Closed]);
    assert_eq!((shard.closing().log_pending_bytes, shard.closing().log_writes), (0, 0));
}
