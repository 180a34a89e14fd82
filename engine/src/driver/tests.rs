//! The drivers on the real kernel: files in a temporary folder, tasks and timers on a real shard.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::*;
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode, WriteMode};
use crate::error::Error;
use crate::model::Instant;
use crate::runtime::{Class, Runtime};

const MS: u64 = 1_000_000;

/// Runs a test on a shard's thread with a disk and a folder of its own.
fn on_disk<F, T>(test: impl FnOnce(RingDisk, PathBuf) -> F + Send + 'static) -> T
where
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    on_shard(|ring, runtime| async move {
        let folder = tempfile::tempdir().unwrap();
        let disk = RingDisk::new(&ring);
        drive(&ring, &runtime, test(disk, folder.path().to_owned())).await.unwrap()
    })
}

fn on_shard<F, T>(test: impl FnOnce(Ring, ShardRuntime) -> F + Send + 'static) -> T
where
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    start_shard(ThreadOptions::default(), test).unwrap().join().unwrap().unwrap()
}

fn filled(len: usize, salt: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(len);
    for (i, byte) in buf.iter_mut().enumerate() {
        *byte = (i % 251) as u8 ^ salt;
    }
    buf
}

async fn create(disk: &RingDisk, path: &Path) -> files::RingFile {
    disk.open(path, OpenMode::Create).await.unwrap()
}

#[test]
fn what_was_written_is_read_back() {
    on_disk(|disk, folder| async move {
        let file = create(&disk, &folder.join("a")).await;
        let unit = file.alignment();
        for (mode, salt) in [(WriteMode::Cached, 1), (WriteMode::Durable, 2)] {
            let (buf, written) = file.write_at(unit as u64, filled(8 * unit, salt), mode).await;
            written.unwrap();
            assert!(buf[..] == filled(8 * unit, salt)[..], "the buffer comes back whole");
            file.sync().await.unwrap();
            let read = file.read_at(unit as u64, 8 * unit).await.unwrap();
            assert!(read[..] == buf[..]);
        }
        assert_eq!(file.len().await.unwrap(), 9 * unit as u64);
        let hole = file.read_at(0, unit).await.unwrap();
        assert!(hole.iter().all(|&byte| byte == 0));
    });
}
