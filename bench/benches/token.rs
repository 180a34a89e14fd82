//! Hashing a key into its token, and the uses of the token's bits.

mod common;

use std::hint::black_box;

use annulus_engine::model::Token;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn of_key(c: &mut Criterion) {
    let mut group = c.benchmark_group("token");
    for size in [8, 16, 32, 128, 1024] {
        let key: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).expect("small")).collect();
        group.throughput(Throughput::Bytes(size));
        group.bench_function(format!("of_key/{size}"), |b| {
            b.iter(|| Token::of_key(black_box(&key), common::SEED));
        });
    }
    group.finish();
    c.bench_function("token/uses", |b| {
        let mut token = Token(1);
        b.iter(|| {
            token.0 = token.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let partition = token.partition(8).0;
            partition ^ token.filter_block(1000) ^ token.filter_bits()
        });
    });
    let mut fold = common::Fold::default();
    for id in 0..10_000 {
        let token = Token::of_key(&common::key(id), common::SEED);
        fold.add(token.0 ^ u64::from(token.partition(8).0) ^ token.slot(20) as u64);
    }
    fold.print("token");
}

criterion_group!(name = benches; config = common::criterion(); targets = of_key);
criterion_main!(benches);
