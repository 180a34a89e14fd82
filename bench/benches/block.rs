//! A block: checking and unpacking it, finding a key in it, missing one.

mod common;

use annulus_engine::disk::File;
use annulus_engine::sstable::Codec;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

fn blocks(c: &mut Criterion) {
    let mut fold = common::Fold::default();
    for (size, codec) in
        [(100, Codec::None), (100, Codec::Lz4), (100, Codec::Zstd), (1000, Codec::None)]
    {
        let records = common::sorted_records(common::size(20_000, 2_000), size);
        let fixture = common::table(&records, codec);
        let table = &fixture.table;
        let handle = table.index().handle(table.index().block_count() / 2);
        let block = fixture.executor.run(table.read_block(handle)).expect("a whole block");
        let (offset, len) = table.read_range(handle);
        let bytes = fixture.executor.run(table.file().read_at(offset, len)).expect("a file");
        let name = format!("block/{codec:?}/{size}");
        c.bench_function(&format!("{name}/parse"), |b| {
            b.iter_batched(
                || bytes.clone(),
                |bytes| table.parse_block(bytes, handle).expect("a whole block").len(),
                BatchSize::SmallInput,
            );
        });
        let inside: Vec<_> = block.iter().map(|record| record.to_owned()).collect();
        let mut state = 0;
        c.bench_function(&format!("{name}/get"), |b| {
            b.iter(|| {
                let wanted = &inside[common::next(&mut state, inside.len())];
                block
                    .get(wanted.token, wanted.namespace, &wanted.key)
                    .map(|found| found.value.len())
            });
        });
        c.bench_function(&format!("{name}/miss"), |b| {
            b.iter(|| {
                let near = &inside[common::next(&mut state, inside.len())];
                block.get(near.token, near.namespace, b"another key").is_none()
            });
        });
        block.iter().for_each(|record| fold.add_bytes(&record.value.side_by_side()));
        fold.add(u64::from(handle.len));
    }
    fold.print("block");
}

criterion_group!(name = benches; config = common::criterion(); targets = blocks);
criterion_main!(benches);
