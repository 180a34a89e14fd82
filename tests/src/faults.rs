//! Seeded mishaps: what goes wrong while running, and damage to files that lie there.
//!
//! Invariant: at most one kind of damage per run, and every kind of the test plan's T11 and T12
//! is here: a bit, a sector of zeros, an old version of a sector, a neighbour's sector, a cut
//! tail, foreign bytes at the end, an empty file, no file, another file of the same kind.

use std::path::Path;

use annulus_engine::sim::{Chance, Fault, Op, Rule, SimDisk};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Damage to one file as it lies on the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit, counted from the file's start, is turned over.
    FlipBit(u64),
    /// A sector of zeros.
    ZeroSector(u64),
    /// A page of zeros, by its first sector.
    ZeroPage(u64),
    /// A sector as it was before it was last overwritten.
    OldSector(u64),
    /// A sector that holds what its right neighbour holds.
    NeighbourSector(u64),
    /// The file ends here.
    Truncate(u64),
    /// Bytes after the end that nobody wrote.
    Extend(u64),
    /// The file is there but empty.
    Empty,
    /// The file is gone.
    Remove,
}

impl Damage {
    /// Every damage of a file of `len` bytes, taking one bit in `bit_stride`.
    #[must_use]
    pub fn all(len: u64, bit_stride: u64) -> Vec<Damage> {
        let mut all = vec![Damage::Empty, Damage::Remove, Damage::Extend(512), Damage::Extend(9)];
        let sectors = len / SECTOR;
        for sector in 0..sectors {
            all.push(Damage::ZeroSector(sector));
            all.push(Damage::OldSector(sector));
            if sector + 1 < sectors {
                all.push(Damage::NeighbourSector(sector));
            }
            if sector % 8 == 0 {
                all.push(Damage::ZeroPage(sector));
            }
            all.push(Damage::Truncate(sector * SECTOR));
        }
        all.extend([len.saturating_sub(1), len / 2 + 1].map(Damage::Truncate));
        // An odd stride meets every position in a byte.
        let stride = usize::try_from(bit_stride | 1).expect("a stride fits memory");
        all.extend((0..len * 8).step_by(stride).map(Damage::FlipBit));
        all
    }

    /// Does it. False when it would change nothing.
    pub fn strike(self, disk: &SimDisk, path: &Path) -> bool {
        let before = disk.read_file(path).expect("the file to damage exists");
        let len = u64::try_from(before.len()).expect("a length fits 64 bits");
        match self {
            Damage::FlipBit(bit) if bit < len * 8 => disk.flip_bit(path, bit),
            Damage::ZeroSector(sector) => zero(disk, path, sector * SECTOR, SECTOR, len),
            Damage::ZeroPage(sector) => zero(disk, path, sector * SECTOR, 8 * SECTOR, len),
            Damage::OldSector(sector) => return disk.revert_sector(path, sector),
            Damage::NeighbourSector(sector) if (sector + 2) * SECTOR <= len => {
                disk.misdirect(path, (sector + 1) * SECTOR, path, sector * SECTOR, SECTOR);
            }
            Damage::Truncate(end) if end < len => disk.truncate(path, end),
            Damage::Extend(by) => disk.write_file(path, &[&before[..], &garbage(by)].concat()),
            Damage::Empty => disk.truncate(path, 0),
            Damage::Remove => return disk.remove_file(path),
            Damage::FlipBit(_) | Damage::NeighbourSector(_) | Damage::Truncate(_) => return false,
        }
        disk.read_file(path).is_none_or(|after| after != before)
    }
}

fn zero(disk: &SimDisk, path: &Path, offset: u64, len: u64, file_len: u64) {
    let end = (offset + len).min(file_len);
    if offset < end {
        let len = usize::try_from(end - offset).expect("a page fits memory");
        disk.overwrite(path, offset, &vec![0; len]);
    }
}

fn garbage(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len).expect("a few sectors")];
    Chance::new(len).fill(&mut bytes);
    bytes
}

/// Faults of a running disk for one swarm run: mostly none, seldom several.
#[must_use]
pub fn draw_rules(chance: &mut Chance) -> Vec<Rule> {
    let count = [0, 0, 1, 1, 2][chance.index(5)];
    let draw = |_| {
        let op = match chance.below(8) {
            0 | 1 => Op::Read,
            2 | 3 => Op::Write,
            4 => Op::Sync,
            5 => Op::SyncDir,
            6 => Op::Rename,
            _ => Op::Open,
        };
        let fault = match chance.below(4) {
            0 => Fault::Delay(chance.between(1_000_000, 10_000_000_000)),
            1 if matches!(op, Op::Write | Op::Open) => Fault::NoSpace,
            _ => Fault::Eio,
        };
        Rule::nth(op, chance.between(1, 200), fault)
    };
    (0..count).map(draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_engine::sim::{SimDiskOptions, SimExecutor};

    #[test]
    fn every_damage_changes_the_file_or_says_that_it_did_not() {
        let executor = SimExecutor::new(1);
        let path = Path::new("d/file");
        let mut content = vec![0; 9 * 512];
        Chance::new(3).fill(&mut content);
        let mut struck = 0;
        for damage in Damage::all(9 * 512, 1001) {
            let disk = SimDisk::new(&executor.runtime(), SimDiskOptions::default());
            disk.write_file(path, &content);
            let changed = damage.strike(&disk, path);
            assert_eq!(changed, disk.read_file(path).as_deref() != Some(&content[..]));
            struck += u32::from(changed);
        }
        assert!(struck > 60, "{struck}");
    }
}
