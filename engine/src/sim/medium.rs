//! What a simulated disk holds: bytes and names, each in a live and a durable state.
//!
//! Invariant: `durable` plus any subset of `pending`, applied in order, is what a crash may leave
//! of a file; and of each group of names that share changes, any prefix of the changes. So a
//! rename is atomic, a replaced name is never absent, and nothing else about order is promised
//! (ALICE, Pillai et al., OSDI 2014, found what real file systems reorder).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::Chance;

/// Unit of tearing, in bytes.
pub(super) const SECTOR: usize = 512;
/// Unit of space, in bytes.
const PAGE: u64 = 4096;

/// A change of a file's bytes.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
    Punch { offset: usize, len: usize },
}

#[derive(Clone, Debug)]
struct Pending {
    sequence: u64,
    /// Whether its operation has returned: only then a later sync covers it.
    returned: bool,
    change: Change,
}

/// One file's bytes.
#[derive(Debug, Default)]
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Pending>,
    next_sequence: u64,
    /// Pages that take space; a page that was never written or was punched takes none.
    pages: Vec<bool>,
    /// How many they are.
    pages_taken: u64,
    /// What each sector held before it was last overwritten.
    former: BTreeMap<usize, Vec<u8>>,
}

pub(super) type InodeRef = Rc<RefCell<Inode>>;

impl Inode {
    /// An empty file.
    pub(super) fn new(id: u64) -> Inode {
        Inode { id, ..Inode::default() }
    }

    /// Makes a change visible; its number for [`Inode::returned`] and [`Inode::persist_write`].
    pub(super) fn change(&mut self, change: Change) -> u64 {
        self.note_pages(&change);
        if let Change::Write { offset, bytes } = &change {
            self.keep_former(*offset, bytes.len());
        }
        apply(&mut self.live, &change);
        self.next_sequence += 1;
        self.pending.push(Pending { sequence: self.next_sequence, returned: false, change });
        self.next_sequence
    }

    /// Bytes of space that a write would take in addition.
    pub(super) fn growth(&self, offset: usize, len: usize) -> u64 {
        let new = page_range(offset, len).filter(|page| self.pages.get(*page) != Some(&true));
        PAGE * u64::try_from(new.count()).expect("a count fits 64 bits")
    }

    /// Bytes of space taken.
    pub(super) fn space(&self) -> u64 {
        PAGE * self.pages_taken
    }

    /// The operation that made this change has returned.
    pub(super) fn returned(&mut self, sequence: u64) {
        if let Some(pending) = self.pending.iter_mut().find(|p| p.sequence == sequence) {
            pending.returned = true;
        }
    }

    /// The changes that a sync which begins now must cover.
    pub(super) fn begin_sync(&self) -> Vec<u64> {
        self.pending.iter().filter(|p| p.returned).map(|p| p.sequence).collect()
    }

    /// A sync that covers these changes succeeds.
    pub(super) fn persist(&mut self, sequences: &[u64]) {
        self.settle(|pending| sequences.contains(&pending.sequence), |change| vec![change.clone()]);
    }

    /// A durable write succeeds; what it says of the length rests on earlier changes of it.
    pub(super) fn persist_write(&mut self, sequence: u64) {
        self.settle(
            |pending| {
                let is_write = matches!(pending.change, Change::Write { .. });
                pending.sequence == sequence || (!is_write && pending.sequence < sequence)
            },
            |change| vec![change.clone()],
        );
    }

    /// A sync that should have covered these changes fails: each is kept, dropped or torn, and
    /// none is pending any more, so that the next sync has nothing to report.
    pub(super) fn fail_sync(&mut self, sequences: &[u64], chance: &mut Chance) {
        self.settle(
            |pending| sequences.contains(&pending.sequence),
            |change| survivor(change, chance, Mood::Mixed),
        );
    }

    /// Moves the chosen pending changes, as `fate` leaves them, to the durable bytes.
    fn settle(
        &mut self,
        chosen: impl Fn(&Pending) -> bool,
        mut fate: impl FnMut(&Change) -> Vec<Change>,
    ) {
        let mut waiting: Vec<Pending> = Vec::new();
        for pending in std::mem::take(&mut self.pending) {
            if !chosen(&pending) {
                waiting.push(pending);
                continue;
            }
            for change in fate(&pending.change) {
                apply(&mut self.durable, &change);
                // What lies below a durable write can never come up again.
                if let Change::Write { offset, bytes } = &change {
                    waiting = cut_out(waiting, *offset, bytes.len());
                }
            }
        }
        self.pending = waiting;
    }

    /// What a crash leaves.
    pub(super) fn survivor(&self, chance: &mut Chance, mood: Mood) -> Inode {
        let mut bytes = self.durable.clone();
        for pending in &self.pending {
            for change in survivor(&pending.change, chance, mood) {
                apply(&mut bytes, &change);
            }
        }
        if mood == Mood::Mixed && !self.pending.is_empty() && chance.one_in(3) {
            // The length has a fate of its own, between what is durable and what was seen.
            let (low, high) = (self.durable.len(), self.live.len().max(bytes.len()));
            if low < high {
                let sectors = (high - low) / SECTOR;
                let len = low + SECTOR * chance.index(sectors + 1);
                bytes.resize(len, 0);
            }
        }
        let pages = vec![true; page_range(0, bytes.len()).len()];
        let mut survivor = Inode {
            id: self.id,
            live: bytes.clone(),
            durable: bytes,
            pending: Vec::new(),
            next_sequence: 0,
            pages,
            pages_taken: 0,
            former: self.former.clone(),
        };
        survivor.count_pages();
        survivor
    }

    /// Damages the file as it lies on the medium, behind everybody's back.
    pub(super) fn damage(&mut self, damage: impl Fn(&mut Vec<u8>)) {
        damage(&mut self.live);
        damage(&mut self.durable);
        self.pages.resize(page_range(0, self.live.len()).len(), true);
        self.count_pages();
    }

    fn count_pages(&mut self) {
        let taken = self.pages.iter().filter(|taken| **taken).count();
        self.pages_taken = u64::try_from(taken).expect("a count fits 64 bits");
    }

    /// What the sector held before it was last overwritten, if it was.
    pub(super) fn former(&self, sector: usize) -> Option<&[u8]> {
        self.former.get(&sector).map(Vec::as_slice)
    }

    fn keep_former(&mut self, offset: usize, len: usize) {
        let end = (offset + len).min(self.live.len());
        for start in (offset..end).step_by(SECTOR) {
            let old = &self.live[start..(start + SECTOR).min(end)];
            if old.iter().any(|byte| *byte != 0) {
                self.former.insert(start / SECTOR, old.to_vec());
            }
        }
    }

    fn note_pages(&mut self, change: &Change) {
        match change {
            Change::Write { offset, bytes } => {
                let range = page_range(*offset, bytes.len());
                if self.pages.len() < range.end {
                    self.pages.resize(range.end, false);
                }
                self.pages[range].fill(true);
            }
            Change::SetLen(len) => {
                self.pages.resize(page_range(0, *len).len(), false);
            }
            Change::Punch { offset, len } => {
                let page = usize::try_from(PAGE).expect("a page fits memory");
                let first = offset.div_ceil(page);
                let last = ((offset + len) / page).min(self.pages.len());
                if first < last {
                    self.pages[first..last].fill(false);
                }
            }
        }
        self.count_pages();
    }
}

fn page_range(offset: usize, len: usize) -> std::ops::Range<usize> {
    let page = usize::try_from(PAGE).expect("a page fits memory");
    offset / page..(offset + len).div_ceil(page)
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { offset, bytes: new } => {
            let end = offset + new.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset..end].copy_from_slice(new);
        }
        Change::SetLen(len) => bytes.resize(*len, 0),
        Change::Punch { offset, len } => {
            let end = (offset + len).min(bytes.len());
            if *offset < end {
                bytes[*offset..end].fill(0);
            }
        }
    }
}

/// Removes the range from pending writes, splitting what reaches over it.
fn cut_out(waiting: Vec<Pending>, start: usize, len: usize) -> Vec<Pending> {
    let end = start + len;
    let mut left = Vec::with_capacity(waiting.len());
    for pending in waiting {
        let Change::Write { offset, bytes } = &pending.change else {
            left.push(pending);
            continue;
        };
        let (from, to) = (*offset, offset + bytes.len());
        if to <= start || end <= from {
            left.push(pending);
            continue;
        }
        let mut keep = |low: usize, high: usize| {
            if low < high {
                let bytes = bytes[low - from..high - from].to_vec();
                let change = Change::Write { offset: low, bytes };
                left.push(Pending { change, ..pending });
            }
        };
        keep(from, start.min(to));
        keep(end.max(from), to);
    }
    left
}

/// How a crash treats what is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    /// All of it is kept.
    Kind,
    /// All of it is lost.
    Cruel,
    /// Each part has its own fate.
    Mixed,
}

impl Mood {
    pub(super) fn draw(chance: &mut Chance) -> Mood {
        match chance.below(8) {
            0 => Mood::Kind,
            1 => Mood::Cruel,
            _ => Mood::Mixed,
        }
    }
}

/// What is left of a change that was not durable.
fn survivor(change: &Change, chance: &mut Chance, mood: Mood) -> Vec<Change> {
    match mood {
        Mood::Kind => return vec![change.clone()],
        Mood::Cruel => return Vec::new(),
        Mood::Mixed => {}
    }
    match (change, chance.below(3)) {
        (_, 0) => Vec::new(),
        (Change::Write { offset, bytes }, 1) => tear(*offset, bytes, chance),
        _ => vec![change.clone()],
    }
}

/// What is left of a torn write, in whole sectors: its beginning, its end, or any of them.
pub(super) fn tear(offset: usize, bytes: &[u8], chance: &mut Chance) -> Vec<Change> {
    let sectors = bytes.len().div_ceil(SECTOR);
    let cut = chance.index(sectors + 1);
    let manner = chance.below(3);
    let mut left = Vec::new();
    for (sector, part) in bytes.chunks(SECTOR).enumerate() {
        let kept = match manner {
            0 => sector < cut,
            1 => sector >= cut,
            _ => chance.one_in(2),
        };
        if kept {
            left.push(Change::Write { offset: offset + sector * SECTOR, bytes: part.to_vec() });
        }
    }
    left
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    Directory,
    File(InodeRef),
}

struct NameChange {
    sequence: u64,
    /// All of these happen or none.
    names: Vec<(PathBuf, Option<Entry>)>,
}

/// The names of a disk. The root, `/` or the empty path, always exists.
#[derive(Default)]
pub(super) struct Names {
    pub(super) live: BTreeMap<PathBuf, Entry>,
    durable: BTreeMap<PathBuf, Entry>,
    pending: Vec<NameChange>,
    next_sequence: u64,
}

impl Names {
    /// Changes names, all at once.
    pub(super) fn change(&mut self, names: Vec<(PathBuf, Option<Entry>)>) {
        for (path, entry) in &names {
            set(&mut self.live, path, entry);
        }
        self.pending.push(NameChange { sequence: self.next_sequence, names });
        self.next_sequence += 1;
    }

    /// The file with this name.
    pub(super) fn file(&self, path: &Path) -> Option<InodeRef> {
        match self.live.get(path) {
            Some(Entry::File(inode)) => Some(inode.clone()),
            _ => None,
        }
    }

    /// Whether this is a directory.
    pub(super) fn is_dir(&self, path: &Path) -> bool {
        is_root(path) || matches!(self.live.get(path), Some(Entry::Directory))
    }

    /// Mark for [`Names::sync_dir`]: changes from now on are not covered.
    pub(super) fn begin_sync(&self) -> u64 {
        self.next_sequence
    }

    /// Makes the changes in a directory from before `mark` durable.
    pub(super) fn sync_dir(&mut self, dir: &Path, mark: u64) {
        let groups = self.groups();
        let mut covered = vec![0u64; self.pending.len()];
        for (change, group) in self.pending.iter().zip(&groups) {
            let touches = change.names.iter().any(|(path, _)| is_parent(dir, path));
            if touches && change.sequence < mark {
                covered[*group] = change.sequence + 1;
            }
        }
        let mut left = Vec::new();
        for (change, group) in std::mem::take(&mut self.pending).into_iter().zip(groups) {
            if change.sequence < covered[group] {
                for (path, entry) in &change.names {
                    set(&mut self.durable, path, entry);
                }
            } else {
                left.push(change);
            }
        }
        self.pending = left;
    }

    /// What a crash leaves: of each group of connected changes a prefix; of each file its
    /// survivor, once however many names it has; nothing below a directory that is gone.
    pub(super) fn survivor(&self, chance: &mut Chance) -> Names {
        self.survivor_of(chance, None)
    }

    fn survivor_of(&self, chance: &mut Chance, forced: Option<Mood>) -> Names {
        let mood = forced.unwrap_or_else(|| Mood::draw(chance));
        let groups = self.groups();
        let mut sizes = vec![0usize; self.pending.len()];
        for group in &groups {
            sizes[*group] += 1;
        }
        let mut kept: Vec<usize> = sizes
            .iter()
            .map(|size| match mood {
                Mood::Kind => *size,
                Mood::Cruel => 0,
                Mood::Mixed => chance.index(size + 1),
            })
            .collect();
        let mut names = self.durable.clone();
        for (change, group) in self.pending.iter().zip(groups) {
            if kept[group] > 0 {
                kept[group] -= 1;
                for (path, entry) in &change.names {
                    set(&mut names, path, entry);
                }
            }
        }
        let mut survivors: BTreeMap<u64, InodeRef> = BTreeMap::new();
        let mut live: BTreeMap<PathBuf, Entry> = BTreeMap::new();
        // A parent sorts before what it holds, so one pass sees directories first.
        for (path, entry) in names {
            let parent = path.parent().expect("the root is never a name");
            if !is_root(parent) && !matches!(live.get(parent), Some(Entry::Directory)) {
                continue;
            }
            let entry = match entry {
                Entry::Directory => Entry::Directory,
                Entry::File(inode) => {
                    let inode = inode.borrow();
                    let copy = survivors.entry(inode.id).or_insert_with(|| {
                        let mood = forced.unwrap_or_else(|| Mood::draw(chance));
                        Rc::new(RefCell::new(inode.survivor(chance, mood)))
                    });
                    Entry::File(copy.clone())
                }
            };
            live.insert(path, entry);
        }
        Names { durable: live.clone(), live, pending: Vec::new(), next_sequence: 0 }
    }

    /// All names and bytes as seen now, durable.
    pub(super) fn copy(&self) -> Names {
        let all = Names { durable: self.live.clone(), ..Names::default() };
        all.survivor_of(&mut Chance::new(0), Some(Mood::Kind))
    }

    /// Adds a name behind everybody's back.
    pub(super) fn put_durably(&mut self, path: &Path, entry: Entry) {
        self.live.insert(path.to_owned(), entry.clone());
        self.durable.insert(path.to_owned(), entry);
    }

    /// Removes a name behind everybody's back.
    pub(super) fn remove_durably(&mut self, path: &Path) -> bool {
        self.durable.remove(path);
        self.live.remove(path).is_some()
    }

    /// For each pending change the number of its group: changes that share a name, directly or
    /// through others, are one group.
    fn groups(&self) -> Vec<usize> {
        let mut groups: Vec<usize> = (0..self.pending.len()).collect();
        let mut owner: BTreeMap<&Path, usize> = BTreeMap::new();
        for index in 0..self.pending.len() {
            for (path, _) in &self.pending[index].names {
                if let Some(earlier) = owner.insert(path, index) {
                    let (from, to) = (groups[index], groups[earlier]);
                    groups.iter_mut().filter(|g| **g == from).for_each(|g| *g = to);
                }
            }
        }
        groups
    }
}

/// Whether `path` lies directly in `dir`.
pub(super) fn is_parent(dir: &Path, path: &Path) -> bool {
    path.parent().is_some_and(|parent| parent == dir || (is_root(parent) && is_root(dir)))
}

pub(super) fn is_root(path: &Path) -> bool {
    path.parent().is_none()
}

fn set(names: &mut BTreeMap<PathBuf, Entry>, path: &Path, entry: &Option<Entry>) {
    match entry {
        Some(entry) => drop(names.insert(path.to_owned(), entry.clone())),
        None => drop(names.remove(path)),
    }
}
