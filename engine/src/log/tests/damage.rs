//! Damage to files at rest: never a wrong record, never silence about what was durable.

use super::*;

/// A closed log of a few records, and its one segment.
fn closed_log(seed: u64) -> (SimExecutor, SimDisk, PathBuf) {
    let (executor, disk, runtime) = world(seed);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=6 {
            let lsn = log.append(&record(tag, 40).as_ref()).unwrap();
            if tag % 2 == 0 {
                log.wait_visible(lsn).await.unwrap();
            }
        }
        log.close().await.unwrap();
    });
    (executor, disk, dir().join("0000000001.log"))
}

#[test]
fn a_flipped_bit_anywhere_is_refused_or_harmless() {
    let (executor, disk, path) = closed_log(400);
    let (_, whole) = executor.run(read(&disk, Lsn(1))).unwrap();
    assert_eq!(whole.len(), 7);
    let used = 4096 + 4 * 512;
    let (mut refused, mut harmless, mut close_lost) = (0, 0, 0);
    for byte in (0..100).chain(4096..used + 64) {
        let bit = byte * 8 + byte % 8;
        disk.flip_bit(&path, bit);
        match executor.run(read(&disk, Lsn(1))) {
            Err(Error::Corrupt { path: named, offset, .. }) => {
                assert_eq!(named, path);
                // It names the batch that holds the bit, or the header.
                let batch = if byte < 4096 { 0 } else { byte / 512 * 512 };
                assert!(offset == batch || byte < 4096, "{byte}: {offset}");
                refused += 1;
            }
            Err(Error::Mismatch { .. }) => {
                assert!((8..12).contains(&byte), "only a newer version: byte {byte}");
                refused += 1;
            }
            Err(other) => panic!("byte {byte}: {other}"),
            Ok((end, seen)) if seen.len() == whole.len() => {
                assert_eq!(seen, whole, "byte {byte}");
                assert!(end.clean);
                harmless += 1;
            }
            Ok((end, seen)) => {
                // Only the close record itself may be missed: nothing says that it was there.
                assert_eq!(seen, whole[..6], "byte {byte}");
                assert!(!end.clean);
                close_lost += 1;
            }
        }
        disk.flip_bit(&path, bit);
    }
    // Each byte of each batch header and record counts; the padding does not.
    assert!(refused > 80 + 3 * 40 + 6 * 100, "{refused}");
    assert!(close_lost > 90 && harmless > 300, "{close_lost} {harmless}");
}

#[test]
fn zeroed_and_stale_sectors_are_refused_too() {
    let (executor, disk, path) = closed_log(401);
    for sector in [0u64, 8, 9, 10] {
        let before = disk.read_file(&path).unwrap();
        disk.overwrite(&path, sector * 512, &[0; 512]);
        let error = executor.run(read(&disk, Lsn(1))).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { offset, .. } if *offset == sector * 512));
        disk.overwrite(&path, 0, &before);
    }
    // A batch at another batch's place.
    disk.misdirect(&path, 9 * 512, &path, 8 * 512, 512);
    assert!(executor.run(read(&disk, Lsn(1))).is_err());
}

#[test]
fn damage_in_the_last_batch_is_known_once_the_log_was_quiet_or_began_again() {
    let (executor, disk, runtime) = world(402);
    let path = dir().join("0000000001.log");
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=3 {
            let lsn = log.append(&record(tag, 40).as_ref()).unwrap();
            log.wait_visible(lsn).await.unwrap();
        }
        // Just now nothing tells the last batch from a torn one.
        disk.flip_bit(&path, (4096 + 1024 + 60) * 8);
        assert_eq!(read(&disk, Lsn(1)).await.unwrap().0.last, Lsn(2));
        runtime.sleep_until(runtime.now().after_nanos(1_100_000_000)).await;
        let error = read(&disk, Lsn(1)).await.unwrap_err().to_string();
        assert!(error.contains("0000000001.log is damaged at offset 5120"), "{error}");
        assert!(error.contains("records 3 to 3 were durable"), "{error}");
        disk.flip_bit(&path, (4096 + 1024 + 60) * 8);
        drop(log);
        runtime.sleep_until(runtime.now().after_nanos(1_000_000)).await;
        // The note itself is damaged, but a new life has begun since.
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        log.close().await.unwrap();
        disk.overwrite(&path, 4096 + 1536, &[0; 512]);
        assert!(read(&disk, Lsn(1)).await.unwrap().0.clean);
        disk.flip_bit(&path, (4096 + 1024 + 60) * 8);
        assert!(matches!(read(&disk, Lsn(1)).await, Err(Error::Corrupt { .. })));
        // Records that are in tables are not missed.
        assert!(read(&disk, Lsn(4)).await.is_ok());
    });
}

/// A log of several segments, not closed; the last record was a while ago.
fn long_log(seed: u64) -> (SimExecutor, SimDisk) {
    let (executor, disk, runtime) = world(seed);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=200 {
            log.append(&record(tag, 200).as_ref()).unwrap();
        }
        log.wait_visible(Lsn(200)).await.unwrap();
        runtime.sleep_until(runtime.now().after_nanos(1_100_000_000)).await;
    });
    (executor, disk)
}

fn segment(id: u64) -> PathBuf {
    dir().join(format!("{id:010}.log"))
}

#[test]
fn missing_cut_and_exchanged_segments_are_refused() {
    type Damage = (&'static str, fn(&SimDisk));
    let damages: [Damage; 6] = [
        ("missing first", |disk| assert!(disk.remove_file(&segment(1)))),
        ("missing middle", |disk| assert!(disk.remove_file(&segment(2)))),
        ("cut", |disk| disk.truncate(&segment(2), 9000)),
        ("emptied", |disk| disk.truncate(&segment(2), 0)),
        ("under another's name", |disk| {
            let bytes = disk.read_file(&segment(1)).unwrap();
            disk.write_file(&segment(2), &bytes);
        }),
        ("first batch of a segment", |disk| disk.overwrite(&segment(3), 4096, &[0; 512])),
    ];
    for (name, damage) in damages {
        let (executor, disk) = long_log(403);
        damage(&disk);
        let error = executor.run(read(&disk, Lsn(1))).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{name}: {error}");
    }
}

#[test]
fn another_log_and_a_newer_version_are_refused_by_name() {
    let (executor, disk) = long_log(404);
    let theirs = LogIdentity { shard: 4, ..IDENTITY };
    let result = executor.run(replay(&disk, &dir(), theirs, Lsn(1), &mut |_, _| {}));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("shard 3, not of") && error.contains("shard 4"), "{error}");
    disk.overwrite(&segment(1), 8, &2u32.to_le_bytes());
    let error = executor.run(read(&disk, Lsn(1))).unwrap_err().to_string();
    assert!(error.contains("version 2 of the log format"), "{error}");
}

#[test]
fn an_unreadable_segment_is_an_error_and_not_an_end() {
    let (executor, disk) = long_log(405);
    disk.inject(Rule::nth(Op::Read, 1, Fault::Eio).on("0000000002.log").forever());
    assert!(matches!(executor.run(read(&disk, Lsn(1))), Err(Error::Io { .. })));
}

#[test]
fn what_a_former_life_left_in_a_recycled_segment_is_never_read() {
    let (executor, disk, runtime) = world(406);
    executor.run(async {
        let (log, _) = open(&disk, &runtime, small()).await.unwrap();
        for tag in 1..=400 {
            let lsn = log.append(&record(tag, 200).as_ref()).unwrap();
            log.wait_visible(lsn).await.unwrap();
            log.release(lsn);
        }
        assert!(log.stats().segments_created < 5, "{:?}", log.stats());
        // The segments are full of former batches, at the same places and of the same sizes.
        let (end, seen) = read(&disk, Lsn(395)).await.unwrap();
        assert_eq!((end.last, seen.len()), (Lsn(400), 6));
        assert!(end.torn.is_none());
    });
}

proptest::proptest! {
    #[test]
    fn bytes_of_any_kind_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), salt: u64) {
        use super::super::format::{BatchHeader, Records, SegmentHeader};
        let _ = SegmentHeader::decode(&bytes);
        let _ = BatchHeader::decode(&bytes, salt, 4096);
        for item in Records::checked(&bytes, Lsn(1), salt) {
            let _ = item;
        }
        for item in Records::trusted(&bytes, Lsn(u64::MAX - 1)) {
            let _ = item;
        }
    }
}
