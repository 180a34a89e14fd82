//! The tests' side of `SimDisk`: faults to come, power cuts, damage, and looking at what lies there.
//!
//! Invariant: nothing here is an operation: it takes no time, has no number, and cannot fail.

use std::path::{Path, PathBuf};
use std::rc::Weak;

use super::disk::{to_u64, to_usize};
use super::fault::{Fault, OpRecord, Rule};
use super::medium::{Entry, InodeRef, SECTOR};
use super::{Chance, SimDisk, SimDiskOptions, SimRuntime};

impl SimDisk {
    /// The disk that is found after a power cut now, without faults or locks. This one, and each
    /// of its files, is dead: every operation fails. May be called again with other seeds.
    #[must_use]
    pub fn crash(&self, seed: u64) -> SimDisk {
        self.crash_onto(&self.shared.runtime, seed)
    }

    /// [`SimDisk::crash`], with the surviving disk running on another executor.
    #[must_use]
    pub fn crash_onto(&self, runtime: &SimRuntime, seed: u64) -> SimDisk {
        self.shared.dead.set(true);
        self.image_onto(runtime, seed)
    }

    /// What [`SimDisk::crash_onto`] would give now; this one lives on.
    #[must_use]
    pub fn image_onto(&self, runtime: &SimRuntime, seed: u64) -> SimDisk {
        let mut chance = Chance::new(seed);
        let names = self.shared.names.borrow().survivor(&mut chance);
        let options = SimDiskOptions { seed: chance.next_u64(), ..self.shared.options };
        let survivor = SimDisk::with_names(runtime, options, names, self.shared.next_inode.get());
        survivor.set_capacity(self.shared.capacity.get());
        survivor
    }

    /// A copy of the disk as seen now, all of it durable: what a kill of the process leaves.
    /// This one is not harmed.
    #[must_use]
    pub fn fork_onto(&self, runtime: &SimRuntime) -> SimDisk {
        let names = self.shared.names.borrow().copy();
        SimDisk::with_names(runtime, self.shared.options, names, self.shared.next_inode.get())
    }

    /// Has `observer` called just before and just after each change of the disk takes effect. So
    /// one run, with [`SimDisk::image_onto`], meets every state that a crash could leave.
    pub fn observe(&self, observer: impl FnMut(&SimDisk) + 'static) {
        *self.shared.observer.borrow_mut() = Some(Box::new(observer));
    }

    /// Adds a fault to come. The first rule that strikes decides.
    pub fn inject(&self, rule: Rule) {
        self.shared.rules.borrow_mut().push(rule);
    }

    /// Forgets all faults to come.
    pub fn clear_faults(&self) {
        self.shared.rules.borrow_mut().clear();
    }

    /// Cuts the power during operation `number` (as in [`SimDisk::op_count`]) and halts the
    /// executor; by chance the operation takes effect or not, but it never answers.
    pub fn cut_power_at(&self, number: u64) {
        let ahead = number.saturating_sub(self.op_count());
        assert!(ahead > 0, "operation {number} is in the past");
        self.inject(Rule::nth_of_any(ahead, Fault::PowerCut));
    }

    /// Whether the power has been cut or [`SimDisk::crash`] called.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.shared.dead.get()
    }

    /// Operations submitted so far.
    #[must_use]
    pub fn op_count(&self) -> u64 {
        self.shared.op_count.get()
    }

    /// The latest operations, oldest first, at most 8192.
    #[must_use]
    pub fn op_log(&self) -> Vec<OpRecord> {
        self.shared.log.borrow().iter().cloned().collect()
    }

    /// Makes the file system larger or smaller; what is written stays.
    pub fn set_capacity(&self, bytes: u64) {
        self.shared.capacity.set(bytes);
    }

    /// Space that files take, in bytes; pages never written or punched take none.
    #[must_use]
    pub fn used(&self) -> u64 {
        let mut inodes = self.shared.inodes.borrow_mut();
        inodes.retain(|inode| inode.strong_count() > 0);
        inodes.iter().filter_map(Weak::upgrade).map(|inode| inode.borrow().space()).sum()
    }

    /// All files by path, with their lengths.
    #[must_use]
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let names = self.shared.names.borrow();
        let files = names.live.iter().filter_map(|(path, entry)| match entry {
            Entry::File(inode) => Some((path.clone(), to_u64(inode.borrow().live.len()))),
            Entry::Directory => None,
        });
        files.collect()
    }

    /// A file's bytes as a reader would see them now.
    #[must_use]
    pub fn read_file(&self, path: &Path) -> Option<Vec<u8>> {
        let inode = self.shared.names.borrow().file(path)?;
        let bytes = inode.borrow().live.clone();
        Some(bytes)
    }

    /// Puts a file there, or replaces its bytes, durably; missing directories are made.
    pub fn write_file(&self, path: &Path, bytes: &[u8]) {
        let found = self.shared.names.borrow().file(path);
        let inode = found.unwrap_or_else(|| {
            let inode = self.new_inode();
            let mut names = self.shared.names.borrow_mut();
            let mut dirs: Vec<&Path> = path.ancestors().skip(1).collect();
            dirs.retain(|dir| !names.is_dir(dir));
            for dir in dirs.into_iter().rev() {
                names.put_durably(dir, Entry::Directory);
            }
            names.put_durably(path, Entry::File(inode.clone()));
            inode
        });
        inode.borrow_mut().damage(|held| {
            held.clear();
            held.extend_from_slice(bytes);
        });
    }

    /// Takes a file away, durably. False when there is none.
    pub fn remove_file(&self, path: &Path) -> bool {
        self.shared.names.borrow_mut().remove_durably(path)
    }

    /// Turns one bit of the file over, counted from its start.
    pub fn flip_bit(&self, path: &Path, bit: u64) {
        let (byte, mask) = (to_usize(bit / 8), 1u8 << (bit % 8));
        self.damage(path, |bytes| bytes[byte] ^= mask);
    }

    /// Replaces bytes of the file where they lie; it does not grow.
    pub fn overwrite(&self, path: &Path, offset: u64, new: &[u8]) {
        let start = to_usize(offset);
        self.damage(path, |bytes| bytes[start..start + new.len()].copy_from_slice(new));
    }

    /// Cuts the file, or extends it with zeros.
    pub fn truncate(&self, path: &Path, len: u64) {
        self.damage(path, |bytes| bytes.resize(to_usize(len), 0));
    }

    /// Puts the bytes of one place of a file at another place of the same length, of the same or
    /// another file: a write that went astray.
    pub fn misdirect(&self, from: &Path, from_offset: u64, to: &Path, to_offset: u64, len: u64) {
        let source = self.read_file(from).expect("the source exists");
        let start = to_usize(from_offset);
        self.overwrite(to, to_offset, &source[start..start + to_usize(len)]);
    }

    /// Puts back what a sector of 512 bytes held before it was last overwritten. False when it
    /// never held anything else.
    pub fn revert_sector(&self, path: &Path, sector: u64) -> bool {
        let inode = self.inode(path);
        let former = inode.borrow().former(to_usize(sector)).map(<[u8]>::to_vec);
        let Some(former) = former else { return false };
        let start = to_usize(sector) * SECTOR;
        if start + former.len() > inode.borrow().live.len() {
            return false;
        }
        self.overwrite(path, to_u64(start), &former);
        true
    }

    fn damage(&self, path: &Path, damage: impl Fn(&mut Vec<u8>)) {
        self.inode(path).borrow_mut().damage(damage);
    }

    fn inode(&self, path: &Path) -> InodeRef {
        let inode = self.shared.names.borrow().file(path);
        inode.unwrap_or_else(|| panic!("the simulated disk has no file {}", path.display()))
    }
}
