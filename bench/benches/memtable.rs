//! The memtable: inserts, overwrites, lookups, the sorted drain, and its bytes a key.

mod common;

use std::hint::black_box;

use annulus_engine::memtable::Memtable;
use annulus_engine::model::{Timestamp, Token};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const VALUE_SIZE: usize = 100;

fn memtables(c: &mut Criterion) {
    let count = common::size(300_000, 5_000);
    let records: Vec<_> = (0..count as u64).map(|id| common::record(id, VALUE_SIZE)).collect();
    let filled = || {
        let mut memtable = Memtable::new(256 << 20);
        for record in &records {
            memtable.insert(&record.as_ref());
        }
        memtable
    };
    let mut group = c.benchmark_group("memtable");
    group.sample_size(10).throughput(Throughput::Elements(count as u64));
    group.bench_function("insert", |b| {
        b.iter_batched(|| (), |()| filled(), BatchSize::PerIteration)
    });
    group.bench_function("sorted", |b| {
        let memtable = filled();
        b.iter(|| memtable.sorted().map(|record| record.value.len()).sum::<usize>());
    });
    group.finish();

    let mut memtable = filled();
    let mut state = 0;
    c.bench_function("memtable/get", |b| {
        b.iter(|| {
            let wanted = &records[common::next(&mut state, count)];
            memtable.get(wanted.token, wanted.namespace, &wanted.key).map(|r| r.value.len())
        });
    });
    c.bench_function("memtable/absent", |b| {
        b.iter(|| {
            let token = Token(annulus_bench::keys::mix(common::next(&mut state, 1 << 40) as u64));
            memtable.get(black_box(token), common::NAMESPACE, b"k").is_none()
        });
    });
    let mut stamp = 1 << 50;
    c.bench_function("memtable/overwrite", |b| {
        b.iter(|| {
            stamp += 1;
            let mut record = records[common::next(&mut state, count)].as_ref();
            record.timestamp = Timestamp(stamp);
            memtable.insert(&record)
        });
    });

    let memtable = filled();
    let user = count * (16 + VALUE_SIZE);
    println!(
        "memtable: {:.1} bytes a key beyond key and value ({count} keys)",
        (memtable.bytes() - user) as f64 / count as f64
    );
    let mut fold = common::Fold::default();
    memtable.sorted().for_each(|record| fold.add_bytes(record.key));
    assert_eq!(memtable.len(), count);
    fold.print("memtable");
}

criterion_group!(name = benches; config = common::criterion(); targets = memtables);
criterion_main!(benches);
