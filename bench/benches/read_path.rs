//! A get below the pump: found in memory, in a cached block, or absent behind filters.

mod common;
#[path = "common/shard.rs"]
mod shard;

use annulus_engine::model::Token;
use annulus_engine::shard::Probe;
use criterion::{Criterion, criterion_group, criterion_main};

use common::SEED;
use shard::ShardFixture;

fn reads(c: &mut Criterion) {
    let count = common::size(100_000, 3_000);
    let records: Vec<_> = (0..count as u64).map(|id| common::record(id, 100)).collect();
    let fixture = ShardFixture::new();
    fixture.fill(&records);
    let probe = |token: Token, key: &[u8]| {
        let found = fixture.shard.probe(token, common::NAMESPACE, key, |found| {
            found.map_or(0, |record| record.value.len())
        });
        if let Probe::Done(size) = found { Some(size) } else { None }
    };
    let mut state = 0;
    let mut present = |c: &mut Criterion, name: &str| {
        c.bench_function(name, |b| {
            b.iter(|| {
                let wanted = &records[common::next(&mut state, count)];
                probe(wanted.token, &wanted.key)
            });
        });
    };
    present(c, "read_path/memory");

    fixture.executor.run(fixture.shard.flush()).expect("the disk has no faults");
    let mut fold = common::Fold::default();
    for record in &records {
        let read = fixture.shard.get(record.token, record.namespace, &record.key);
        let found = fixture.executor.run(read).expect("a whole block").expect("it is there");
        fold.add_bytes(&found.value);
    }
    present(c, "read_path/cached_block");
    assert!(records.iter().all(|record| probe(record.token, &record.key) == Some(100)));

    let absent: Vec<_> = (0..count as u64).map(|id| common::key(id + (1 << 40))).collect();
    let mut state = 0;
    c.bench_function("read_path/absent", |b| {
        b.iter(|| {
            let key = &absent[common::next(&mut state, count)];
            probe(Token::of_key(key, SEED), key)
        });
    });
    fold.print("read_path");
}

criterion_group!(name = benches; config = common::criterion(); targets = reads);
criterion_main!(benches);
