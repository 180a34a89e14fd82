//! The table's index: from a token to the one block that may hold it.

mod common;

use annulus_engine::sstable::Codec;
use criterion::{Criterion, criterion_group, criterion_main};

fn locate(c: &mut Criterion) {
    let count = common::size(200_000, 5_000);
    let records = common::sorted_records(count, 1000);
    let fixture = common::table(&records, Codec::None);
    let index = fixture.table.index();
    let mut state = 0;
    c.bench_function("index/locate", |b| {
        b.iter(|| {
            let record = &records[common::next(&mut state, count)];
            index.locate(record.token, record.namespace, &record.key)
        });
    });
    println!("index: {} blocks, {} bytes in memory", index.block_count(), index.size());
    let mut fold = common::Fold::default();
    for record in &records {
        let handle = index.locate(record.token, record.namespace, &record.key);
        fold.add(handle.expect("the record has a block").offset);
    }
    fold.print("index");
}

criterion_group!(name = benches; config = common::criterion(); targets = locate);
criterion_main!(benches);
