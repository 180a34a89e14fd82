//! The catalogue's rules, its file's bytes, and crashes while it is saved.

use std::path::Path;

use annulus_engine::disk::Disk;
use annulus_engine::error::Result;

use super::*;

fn catalogue() -> Catalogue {
    let mut catalogue = Catalogue::new(Compression::Lz4);
    let settings = Settings {
        mode: Some(Mode::Siblings),
        dc: Some(BTreeMap::from([("east".into(), 3), ("west".into(), 2)])),
        ttl_ms: Some(60_000),
        w: Some(Level::Count(1)),
        ..Settings::default()
    };
    catalogue.create("carts", &settings, Compression::Zstd).unwrap();
    catalogue
}

fn decode(bytes: &[u8]) -> Result<Catalogue> {
    Catalogue::decode(bytes, Path::new(FILE_NAME))
}

#[test]
fn what_is_encoded_decodes_also_with_padding() {
    let catalogue = catalogue();
    let mut bytes = catalogue.encode();
    assert_eq!(decode(&bytes).unwrap(), catalogue);
    bytes.resize(4096, 0);
    assert_eq!(decode(&bytes).unwrap(), catalogue);
}

#[test]
fn the_bytes_of_the_first_format_stay_readable() {
    // Golden: the file of a node with `default` alone.
    let bytes = Catalogue::new(Compression::None).encode();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let golden = "414e4c534e4d535001000000\
        1b00000001000000000000000100000001000000\
        00000000000000000000000000000000000000000000000000000000c0d83304\
        00000000000000000000000003fefe0101000700\
        64656661756c74";
    assert_eq!(hex, golden);
}

#[test]
fn each_flipped_bit_and_each_cut_is_an_error() {
    let bytes = catalogue().encode();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&flipped).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn ids_are_never_given_twice() {
    let mut catalogue = catalogue();
    let first = catalogue.drop("carts").unwrap();
    let second = catalogue.create("carts", &Settings::default(), Compression::None).unwrap();
    assert!(second > first);
    assert!(catalogue.is_dropped(first) && !catalogue.is_dropped(second));
    let reread = decode(&catalogue.encode()).unwrap();
    assert!(reread.is_dropped(first) && !reread.is_dropped(NamespaceId(99)));
    assert!(reread.generation() == 4);
}

#[test]
fn settings_that_do_not_fit_are_refused_and_change_nothing() {
    let mut catalogue = catalogue();
    let before = catalogue.clone();
    let invalid = |settings: Settings| {
        let mut copy = before.clone();
        let refused = copy.set("carts", &settings);
        assert!(matches!(refused, Err(Refusal::Invalid(_))), "{settings:?}: {refused:?}");
        assert_eq!(copy, before);
    };
    let none = Settings::default;
    invalid(Settings { n: Some(0), ..none() });
    invalid(Settings { n: Some(17), ..none() });
    invalid(Settings { n: Some(3), ..none() });
    invalid(Settings { w: Some(Level::Count(6)), ..none() });
    invalid(Settings { mode: Some(Mode::Lww), ..none() });
    invalid(Settings { ttl_ms: Some(u64::MAX), ..none() });
    invalid(Settings { dc: Some(BTreeMap::from([("a b".into(), 3)])), ..none() });
    invalid(Settings { dc: Some(BTreeMap::from([("a".into(), 255), ("b".into(), 9)])), ..none() });
    assert!(matches!(catalogue.drop(DEFAULT_NAME), Err(Refusal::Invalid(_))));
    assert_eq!(catalogue.drop("x"), Err(Refusal::NotFound("x".into())));
    let again = catalogue.create("carts", &none(), Compression::None);
    assert_eq!(again, Err(Refusal::Exists("carts".into())));
    for name in ["", "a b", "a/b", "ä", &"x".repeat(65)] {
        assert!(catalogue.create(name, &none(), Compression::None).is_err(), "{name}");
    }
    assert_eq!(catalogue, before);
}

#[test]
fn a_linearizable_namespace_is_cp() {
    let mut catalogue = Catalogue::new(Compression::None);
    let settings = Settings { mode: Some(Mode::Linearizable), ..Settings::default() };
    let id = catalogue.create("bank", &settings, Compression::None).unwrap();
    assert_eq!(catalogue.get(id).unwrap().availability, Availability::Cp);
    let ap = Settings { availability: Some(Availability::Ap), ..Settings::default() };
    assert!(catalogue.set("bank", &ap).is_err());
}

#[test]
fn levels_count_replicas() {
    for (text, n, count) in
        [("one", 3, 1), ("quorum", 3, 2), ("quorum", 4, 3), ("all", 5, 5), ("2", 3, 2)]
    {
        let level: Level = text.parse().unwrap();
        assert_eq!((level.of(n), level.to_string().as_str()), (count, text));
    }
    for text in ["", "0", "17", "most", "-1"] {
        assert!(text.parse::<Level>().is_err(), "{text}");
    }
}

#[test]
fn a_crash_while_saving_leaves_the_old_or_the_new() {
    use annulus_engine::sim::{SimDisk, SimDiskOptions, SimExecutor};
    let (old, new) = (Catalogue::new(Compression::Lz4), catalogue());
    let dir = Path::new("data");
    for power_lost_at in 0..40 {
        let executor = SimExecutor::new(power_lost_at);
        let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
        executor.run(async {
            disk.create_dir(dir).await.unwrap();
            disk.sync_dir(Path::new("")).await.unwrap();
            old.save(&disk, dir).await.unwrap();
        });
        disk.cut_power_at(disk.op_count() + 1 + power_lost_at);
        let saved = executor.try_run(async { new.save(&disk, dir).await });
        let restarted = SimExecutor::new(1);
        let disk = disk.crash_onto(&restarted.runtime(), power_lost_at);
        let found = restarted.run(Catalogue::load(&disk, dir)).unwrap().unwrap();
        let durable = matches!(saved, Ok(Ok(())));
        assert!(found == new || (found == old && !durable), "at {power_lost_at}");
    }
}
