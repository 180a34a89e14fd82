//! A whole shard on a simulated disk without latency: what the CPU does, and nothing else.

use std::path::Path;

use annulus_engine::Error;
use annulus_engine::identity::Identity;
use annulus_engine::model::{OriginId, Record, WallMicros};
use annulus_engine::options::{Compression, Durability, Options, SpaceOptions};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::{Applied, Condition, Merge, Mutation, Shard};
use annulus_engine::sim::{SimDisk, SimDiskOptions, SimExecutor, SimRuntime};

/// The shard, and what runs it.
pub(crate) struct ShardFixture {
    /// Runs what awaits.
    pub(crate) executor: SimExecutor,
    /// The shard.
    pub(crate) shard: Shard<SimDisk, SimRuntime>,
}

impl ShardFixture {
    /// An empty shard.
    pub(crate) fn new() -> ShardFixture {
        let executor = SimExecutor::new(1);
        let disk = SimDiskOptions { latency_nanos_max: 0, ..SimDiskOptions::default() };
        let disk = SimDisk::new(&executor.runtime(), disk);
        let mut options = Options {
            compression: Compression::None,
            space: SpaceOptions { pace_below: 0, refuse_below: 0, reserve: 0 },
            ..Options::default()
        };
        options.log.durability = Durability::Periodic { window_ms: 1000 };
        options.log.segment_size = 16 << 20;
        let identity = Identity {
            cluster: 1,
            node: OriginId(1),
            shard: 0,
            shard_count: 1,
            hash_seed: crate::common::SEED,
            partition_bits: options.partition_bits,
            created: WallMicros(1),
        };
        let runtime = executor.runtime();
        let dir = Path::new("bench/shard-000");
        let shard = executor
            .run(Shard::open(disk, runtime, dir, &identity, options, None))
            .expect("a new shard");
        ShardFixture { executor, shard }
    }

    /// Writes a record's key and value; `None` when the log must be written first.
    pub(crate) fn try_put(&self, record: &Record) -> Option<Applied> {
        let mutation = Mutation {
            token: record.token,
            namespace: record.namespace,
            merge: Merge::LastWriteWins,
            key: &record.key,
            value: Some((&record.value).into()),
            expiry_ms: 0,
            context: None,
            condition: Condition::None,
        };
        match self.shard.apply(&mutation, WallMicros(1 << 40)) {
            Ok(applied) => Some(applied),
            Err(Error::Busy { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Lets the log, flushes and compactions do what waits.
    pub(crate) fn turn(&self) {
        self.executor.run_for_nanos(20_000_000);
    }

    /// Writes all records.
    pub(crate) fn fill(&self, records: &[Record]) {
        for record in records {
            while self.try_put(record).is_none() {
                self.turn();
            }
        }
        let end = self.executor.runtime().now().after_nanos(2_000_000_000);
        self.executor.run(self.executor.runtime().sleep_until(end));
    }
}
