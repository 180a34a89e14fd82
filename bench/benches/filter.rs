//! The blocked bloom filter: present and absent keys, a table of the whole ring and one of 1/64
//! of it (whose tokens share their high bits).

mod common;

use annulus_bench::keys::mix;
use annulus_engine::model::Token;
use annulus_engine::sstable::BlockedBloom;
use criterion::{Criterion, criterion_group, criterion_main};

fn probes(c: &mut Criterion) {
    let count = common::size(1_000_000, 20_000);
    let mut fold = common::Fold::default();
    for (name, shift) in [("ring", 0), ("sixty_fourth", 6)] {
        let token = |id: u64| Token(mix(id) >> shift);
        let mut filter = BlockedBloom::with_capacity(count, 10);
        (0..count as u64).for_each(|id| filter.insert(token(id)));
        for (kind, from) in [("present", 0), ("absent", 1 << 40)] {
            let mut state = 0;
            c.bench_function(&format!("filter/{name}/{kind}"), |b| {
                b.iter(|| filter.may_contain(token(from + common::next(&mut state, count) as u64)));
            });
        }
        let missed = (0..count as u64).filter(|&id| !filter.may_contain(token(id))).count();
        let wrong =
            (0..count as u64).filter(|&id| filter.may_contain(token((1 << 40) + id))).count();
        assert_eq!(missed, 0, "no false negative");
        println!(
            "filter/{name}: {:.4} % false positives, {:.4} % by theory",
            wrong as f64 / count as f64 * 100.0,
            filter.expected_rate() * 100.0
        );
        fold.add(wrong as u64);
        fold.add(filter.size() as u64);
    }
    fold.print("filter");
}

criterion_group!(name = benches; config = common::criterion(); targets = probes);
criterion_main!(benches);
