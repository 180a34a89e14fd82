//! A put below the pump: stamp, log record, memtable. The log's own writes are not timed.

mod common;
#[path = "common/shard.rs"]
mod shard;

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};

use shard::ShardFixture;

/// Puts between two turns of the simulated shard.
const BATCH: u64 = 64;

#[expect(clippy::disallowed_methods, reason = "a bench measures time")]
fn writes(c: &mut Criterion) {
    let count = common::size(100_000, 2_000);
    let mut fold = common::Fold::default();
    for value_size in [100, 1000] {
        let records: Vec<_> = (0..count as u64).map(|id| common::record(id, value_size)).collect();
        let fixture = ShardFixture::new();
        fixture.fill(&records);
        let mut state = 0;
        c.bench_function(&format!("write_path/put_{value_size}"), |b| {
            b.iter_custom(|iterations| {
                let (mut taken, mut left) = (Duration::ZERO, iterations);
                while left > 0 {
                    let batch = left.min(BATCH);
                    let begin = Instant::now();
                    for _ in 0..batch {
                        let put = fixture.try_put(&records[common::next(&mut state, count)]);
                        assert!(put.is_some(), "64 records never fill the log's buffers");
                    }
                    taken += begin.elapsed();
                    left -= batch;
                    fixture.turn();
                }
                taken
            });
        });
        fold.add(fixture.shard.stats().memory_keys.min(1) as u64);
        let record = &records[count / 2];
        let read = fixture.shard.get(record.token, record.namespace, &record.key);
        let found = fixture.executor.run(read).expect("a whole block").expect("it is there");
        fold.add_bytes(&found.value);
    }
    fold.print("write_path");
}

criterion_group!(name = benches; config = common::criterion(); targets = writes);
criterion_main!(benches);
