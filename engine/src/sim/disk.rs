//! `SimDisk`: the `Disk` contract of `disk.rs`, taken at its word, in memory.
//!
//! Invariant: nothing the contract leaves open is kind here. An operation is submitted at its
//! future's first poll and then runs as a task of its own to its end, even if the future is
//! dropped; its effect and its answer come at random moments, so concurrent operations end in
//! any order; what is not durable dies, tears or lives by the seed (`medium.rs`). Model of the
//! faults: `FoundationDB`'s `AsyncFileNonDurable`, `SQLite`'s crash and I/O-error sweeps.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use super::fault::{Fault, Op, OpRecord, Rule};
use super::medium::{Change, Entry, Inode, InodeRef, Names, SECTOR, is_parent, tear};
use super::{Chance, SimRuntime};
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode, Space, WriteMode};
use crate::error::{Error, Result};
use crate::runtime::{Class, Runtime};

/// Operations that [`SimDisk::op_log`] remembers.
const LOG_MAX: usize = 8192;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// What a simulated disk is like.
#[derive(Clone, Copy, Debug)]
pub struct SimDiskOptions {
    /// Chance of delays, of partial failures and of the seed of survivors' disks.
    pub seed: u64,
    /// What [`File::alignment`] says, in bytes; a power of two, at least 512. Default 512.
    pub alignment: usize,
    /// Size of the file system in bytes. Default 1 TiB.
    pub capacity: u64,
    /// Longest time of an operation without a fault, in nanoseconds; 0 for none. Default 100 us.
    pub latency_nanos_max: u64,
}

impl Default for SimDiskOptions {
    fn default() -> SimDiskOptions {
        SimDiskOptions { seed: 0, alignment: SECTOR, capacity: 1 << 40, latency_nanos_max: 100_000 }
    }
}

impl SimDiskOptions {
    /// The default disk with this seed.
    #[must_use]
    pub fn seeded(seed: u64) -> SimDiskOptions {
        SimDiskOptions { seed, ..SimDiskOptions::default() }
    }
}

struct Shared {
    runtime: SimRuntime,
    options: SimDiskOptions,
    capacity: Cell<u64>,
    chance: RefCell<Chance>,
    names: RefCell<Names>,
    /// Every file that a name or an open handle still holds.
    inodes: RefCell<Vec<Weak<RefCell<Inode>>>>,
    next_inode: Cell<u64>,
    locks: RefCell<BTreeSet<PathBuf>>,
    rules: RefCell<Vec<Rule>>,
    log: RefCell<VecDeque<OpRecord>>,
    op_count: Cell<u64>,
    dead: Cell<bool>,
}

/// The simulated `Disk`. Clones share it.
#[derive(Clone)]
pub struct SimDisk {
    shared: Rc<Shared>,
}

/// An open file of a [`SimDisk`].
#[derive(Clone)]
pub struct SimFile {
    disk: SimDisk,
    inode: InodeRef,
    path: Rc<PathBuf>,
    writable: bool,
}

/// Held while a directory of a [`SimDisk`] is locked.
pub struct SimLock {
    disk: SimDisk,
    dir: PathBuf,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.disk.shared.locks.borrow_mut().remove(&self.dir);
    }
}

/// What an operation may do: how far, and with which fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Go(Option<Fault>),
    Fail(i32),
    /// Take effect, then lose power.
    EffectThenCut,
    Cut,
}

/// The tests' side: faults, damage, crash, and looking at what lies there.
impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(runtime: &SimRuntime, options: SimDiskOptions) -> SimDisk {
        assert!(options.alignment.is_power_of_two() && options.alignment >= SECTOR);
        SimDisk::with_names(runtime, options, Names::default(), 0)
    }

    fn with_names(
        runtime: &SimRuntime,
        options: SimDiskOptions,
        names: Names,
        next_inode: u64,
    ) -> SimDisk {
        let mut inodes: Vec<Weak<RefCell<Inode>>> = Vec::new();
        for entry in names.live.values() {
            if let Entry::File(inode) = entry
                && !inodes.iter().any(|known| known.as_ptr() == Rc::as_ptr(inode))
            {
                inodes.push(Rc::downgrade(inode));
            }
        }
        SimDisk {
            shared: Rc::new(Shared {
                runtime: runtime.clone(),
                options,
                capacity: Cell::new(options.capacity),
                chance: RefCell::new(Chance::new(options.seed ^ 0x0D15_C000_0000_0001)),
                names: RefCell::new(names),
                inodes: RefCell::new(inodes),
                next_inode: Cell::new(next_inode),
                locks: RefCell::default(),
                rules: RefCell::default(),
                log: RefCell::default(),
                op_count: Cell::new(0),
                dead: Cell::new(false),
            }),
        }
    }

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

    fn new_inode(&self) -> InodeRef {
        let id = self.shared.next_inode.get();
        self.shared.next_inode.set(id + 1);
        let inode = Rc::new(RefCell::new(Inode::new(id)));
        self.shared.inodes.borrow_mut().push(Rc::downgrade(&inode));
        inode
    }

    /// Numbers and records an operation, lets its first half of time pass, and says its fate.
    async fn begin(&self, op: Op, path: &Path, offset: u64, len: usize) -> Verdict {
        let shared = &self.shared;
        shared.op_count.set(shared.op_count.get() + 1);
        let fault = shared.rules.borrow_mut().iter_mut().fold(None, |fault, rule| {
            // Every rule counts, also behind one that strikes.
            let struck = rule.strike(op, path);
            fault.or(struck)
        });
        {
            let mut log = shared.log.borrow_mut();
            if log.len() == LOG_MAX {
                log.pop_front();
            }
            let (number, path) = (shared.op_count.get(), path.to_owned());
            log.push_back(OpRecord { number, op, path, offset, len: to_u64(len), fault });
        }
        if fault == Some(Fault::Hang) {
            std::future::pending::<()>().await;
        }
        self.pass(if let Some(Fault::Delay(nanos)) = fault { nanos } else { 0 }).await;
        if shared.dead.get() {
            return Verdict::Fail(EIO);
        }
        match fault {
            Some(Fault::Eio) => Verdict::Fail(EIO),
            Some(Fault::NoSpace) => Verdict::Fail(ENOSPC),
            Some(Fault::PowerCut) if self.toss() => Verdict::EffectThenCut,
            Some(Fault::PowerCut) => Verdict::Cut,
            other => Verdict::Go(other),
        }
    }

    /// Lets the second half of an operation's time pass, between its effect and its answer.
    async fn end(&self, verdict: Verdict) -> bool {
        if verdict == Verdict::EffectThenCut {
            self.cut().await;
        }
        self.pass(0).await;
        !self.shared.dead.get()
    }

    async fn cut(&self) {
        self.shared.dead.set(true);
        self.shared.runtime.halt();
        std::future::pending::<()>().await;
    }

    async fn pass(&self, more_nanos: u64) {
        let max = self.shared.options.latency_nanos_max;
        let nanos = more_nanos + self.shared.chance.borrow_mut().between(0, max / 2);
        if nanos > 0 {
            let runtime = &self.shared.runtime;
            runtime.sleep_until(runtime.now().after_nanos(nanos)).await;
        }
    }

    fn toss(&self) -> bool {
        self.shared.chance.borrow_mut().one_in(2)
    }

    /// An operation whose effect is one step and cannot fail in part.
    async fn simple<T>(
        &self,
        op: Op,
        path: &Path,
        effect: impl FnOnce(&Shared) -> Result<T>,
    ) -> Result<T> {
        let verdict = self.begin(op, path, 0, 0).await;
        let answer = match verdict {
            Verdict::Fail(errno) => return Err(failure(op, path, errno)),
            Verdict::Cut => {
                self.cut().await;
                return Err(failure(op, path, EIO));
            }
            Verdict::Go(_) | Verdict::EffectThenCut => effect(&self.shared),
        };
        if self.end(verdict).await { answer } else { Err(failure(op, path, EIO)) }
    }

    /// Runs an operation to its end as a task, whatever becomes of the future that waits for it.
    fn detach<T: 'static>(
        &self,
        operation: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = T> + 'static {
        struct Slot<T> {
            answer: Option<T>,
            waker: Option<Waker>,
        }
        let runtime = self.shared.runtime.clone();
        let mut operation = Some(operation);
        let slot = Rc::new(RefCell::new(Slot { answer: None, waker: None }));
        std::future::poll_fn(move |context| {
            if let Some(operation) = operation.take() {
                let slot = slot.clone();
                runtime.spawn(Class::Foreground, async move {
                    let answer = operation.await;
                    let mut slot = slot.borrow_mut();
                    slot.answer = Some(answer);
                    if let Some(waker) = slot.waker.take() {
                        waker.wake();
                    }
                });
            }
            let mut slot = slot.borrow_mut();
            match slot.answer.take() {
                Some(answer) => Poll::Ready(answer),
                None => {
                    slot.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
    }

    fn named<T: 'static>(
        &self,
        op: Op,
        path: &Path,
        effect: impl FnOnce(&SimDisk, &Path) -> Result<T> + 'static,
    ) -> impl Future<Output = Result<T>> + 'static {
        let (disk, path) = (self.clone(), path.to_owned());
        self.detach(async move { disk.simple(op, &path, |_| effect(&disk, &path)).await })
    }

    /// An error unless the directory that is to hold `path` exists.
    fn check_parent(&self, op: Op, path: &Path) -> Result<()> {
        match path.parent() {
            Some(parent) if self.shared.names.borrow().is_dir(parent) => Ok(()),
            _ => Err(refusal(op, path, io::ErrorKind::NotFound)),
        }
    }
}

impl Disk for SimDisk {
    type File = SimFile;
    type Lock = SimLock;

    fn open(&self, path: &Path, mode: OpenMode) -> impl Future<Output = Result<SimFile>> {
        self.named(Op::Open, path, move |disk, path| {
            let found = disk.shared.names.borrow().file(path);
            let inode = match (mode, found) {
                (OpenMode::Read | OpenMode::Write, Some(inode)) => inode,
                (OpenMode::Read | OpenMode::Write, None) => {
                    return Err(refusal(Op::Open, path, io::ErrorKind::NotFound));
                }
                (OpenMode::Create, Some(_)) => {
                    return Err(refusal(Op::Open, path, io::ErrorKind::AlreadyExists));
                }
                (OpenMode::Create, None) => {
                    disk.check_parent(Op::Open, path)?;
                    let inode = disk.new_inode();
                    let entry = Some(Entry::File(inode.clone()));
                    disk.shared.names.borrow_mut().change(vec![(path.to_owned(), entry)]);
                    inode
                }
            };
            let writable = mode != OpenMode::Read;
            Ok(SimFile { disk: disk.clone(), inode, path: Rc::new(path.to_owned()), writable })
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> impl Future<Output = Result<()>> {
        let to = to.to_owned();
        self.named(Op::Rename, from, move |disk, from| {
            let found = disk.shared.names.borrow().file(from);
            let inode = found.ok_or_else(|| refusal(Op::Rename, from, io::ErrorKind::NotFound))?;
            disk.check_parent(Op::Rename, &to)?;
            if from != to {
                let names = vec![(to, Some(Entry::File(inode))), (from.to_owned(), None)];
                disk.shared.names.borrow_mut().change(names);
            }
            Ok(())
        })
    }

    fn link(&self, from: &Path, to: &Path) -> impl Future<Output = Result<()>> {
        let from = from.to_owned();
        self.named(Op::Link, to, move |disk, to| {
            let found = disk.shared.names.borrow().file(&from);
            let inode = found.ok_or_else(|| refusal(Op::Link, &from, io::ErrorKind::NotFound))?;
            disk.check_parent(Op::Link, to)?;
            if disk.shared.names.borrow().live.contains_key(to) {
                return Err(refusal(Op::Link, to, io::ErrorKind::AlreadyExists));
            }
            let names = vec![(to.to_owned(), Some(Entry::File(inode)))];
            disk.shared.names.borrow_mut().change(names);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> impl Future<Output = Result<()>> {
        self.named(Op::Remove, path, |disk, path| {
            if disk.shared.names.borrow().file(path).is_none() {
                return Err(refusal(Op::Remove, path, io::ErrorKind::NotFound));
            }
            disk.shared.names.borrow_mut().change(vec![(path.to_owned(), None)]);
            Ok(())
        })
    }

    fn create_dir(&self, path: &Path) -> impl Future<Output = Result<()>> {
        self.named(Op::CreateDir, path, |disk, path| {
            let mut names = disk.shared.names.borrow_mut();
            let mut dirs: Vec<&Path> = path.ancestors().collect();
            dirs.retain(|dir| !names.is_dir(dir));
            if dirs.iter().any(|dir| names.live.contains_key(*dir)) {
                return Err(refusal(Op::CreateDir, path, io::ErrorKind::NotADirectory));
            }
            for dir in dirs.into_iter().rev() {
                names.change(vec![(dir.to_owned(), Some(Entry::Directory))]);
            }
            Ok(())
        })
    }

    fn list(&self, dir: &Path) -> impl Future<Output = Result<Vec<String>>> {
        self.named(Op::List, dir, |disk, dir| {
            let names = disk.shared.names.borrow();
            if !names.is_dir(dir) {
                return Err(refusal(Op::List, dir, io::ErrorKind::NotFound));
            }
            let files = names
                .live
                .iter()
                .filter(|(path, entry)| matches!(entry, Entry::File(_)) && is_parent(dir, path));
            let file_name = |path: &Path| path.file_name()?.to_str().map(str::to_owned);
            Ok(files.filter_map(|(path, _)| file_name(path)).collect())
        })
    }

    fn sync_dir(&self, dir: &Path) -> impl Future<Output = Result<()>> {
        let (disk, dir) = (self.clone(), dir.to_owned());
        self.detach(async move {
            let mark = disk.shared.names.borrow().begin_sync();
            disk.simple(Op::SyncDir, &dir, |shared| {
                if !shared.names.borrow().is_dir(&dir) {
                    return Err(refusal(Op::SyncDir, &dir, io::ErrorKind::NotFound));
                }
                shared.names.borrow_mut().sync_dir(&dir, mark);
                Ok(())
            })
            .await
        })
    }

    fn space(&self, path: &Path) -> impl Future<Output = Result<Space>> {
        self.named(Op::Space, path, |disk, _| {
            let total = disk.shared.capacity.get();
            Ok(Space { free: total.saturating_sub(disk.used()), total })
        })
    }

    fn lock(&self, dir: &Path) -> impl Future<Output = Result<SimLock>> {
        self.named(Op::Lock, dir, |disk, dir| {
            if !disk.shared.names.borrow().is_dir(dir) {
                return Err(refusal(Op::Lock, dir, io::ErrorKind::NotFound));
            }
            if !disk.shared.locks.borrow_mut().insert(dir.to_owned()) {
                return Err(Error::Mismatch {
                    path: dir.to_owned(),
                    what: "another process has this directory".to_owned(),
                    remedy: "stop the other process",
                });
            }
            Ok(SimLock { disk: disk.clone(), dir: dir.to_owned() })
        })
    }
}

impl SimFile {
    fn check_aligned(&self, offset: u64, len: usize) {
        let alignment = self.alignment();
        assert!(
            offset.is_multiple_of(to_u64(alignment)) && len.is_multiple_of(alignment),
            "{}: offset {offset} and length {len} must be multiples of {alignment}",
            self.path.display()
        );
    }

    async fn read(self, offset: u64, len: usize) -> Result<AlignedBuf> {
        let disk = &self.disk;
        let verdict = disk.begin(Op::Read, &self.path, offset, len).await;
        let fault = match verdict {
            Verdict::Fail(errno) => return Err(self.failure(Op::Read, errno)),
            Verdict::Cut | Verdict::EffectThenCut => {
                disk.cut().await;
                return Err(self.failure(Op::Read, EIO));
            }
            Verdict::Go(fault) => fault,
        };
        let buf = {
            let inode = self.inode.borrow();
            let offset = match fault {
                Some(Fault::Misdirect(by)) => offset.saturating_add_signed(by),
                _ => offset,
            };
            let start = to_usize(offset).min(inode.live.len());
            let end = start.saturating_add(len).min(inode.live.len());
            let mut buf = AlignedBuf::with_capacity(end - start);
            buf.extend_from_slice(&inode.live[start..end]);
            if fault == Some(Fault::FlipBit) && !buf.is_empty() {
                let bit = disk.shared.chance.borrow_mut().index(buf.len() * 8);
                buf[bit / 8] ^= 1 << (bit % 8);
            }
            buf
        };
        if disk.end(verdict).await { Ok(buf) } else { Err(self.failure(Op::Read, EIO)) }
    }

    async fn write(
        self,
        offset: u64,
        buf: AlignedBuf,
        mode: WriteMode,
    ) -> (AlignedBuf, Result<()>) {
        let disk = &self.disk;
        let mut verdict = disk.begin(Op::Write, &self.path, offset, buf.len()).await;
        let start = to_usize(offset);
        let full =
            disk.used() + self.inode.borrow().growth(start, buf.len()) > disk.shared.capacity.get();
        if full && matches!(verdict, Verdict::Go(_) | Verdict::EffectThenCut) {
            verdict = Verdict::Fail(ENOSPC);
        }
        match verdict {
            Verdict::Fail(errno) => {
                // What the caller cannot know: some of it may be there, and may survive.
                if !disk.is_dead() && !full && disk.toss() {
                    let parts = tear(start, &buf, &mut disk.shared.chance.borrow_mut());
                    let mut inode = self.inode.borrow_mut();
                    for part in parts {
                        inode.change(part);
                    }
                }
                return (buf, Err(self.failure(Op::Write, errno)));
            }
            Verdict::Cut => {
                disk.cut().await;
                return (buf, Err(self.failure(Op::Write, EIO)));
            }
            Verdict::Go(_) | Verdict::EffectThenCut => {}
        }
        let sequence =
            self.inode.borrow_mut().change(Change::Write { offset: start, bytes: buf.to_vec() });
        if !disk.end(verdict).await {
            return (buf, Err(self.failure(Op::Write, EIO)));
        }
        match mode {
            WriteMode::Cached => self.inode.borrow_mut().returned(sequence),
            WriteMode::Durable => self.inode.borrow_mut().persist_write(sequence),
        }
        (buf, Ok(()))
    }

    async fn sync_all(self) -> Result<()> {
        let disk = &self.disk;
        let covered = self.inode.borrow().begin_sync();
        let verdict = disk.begin(Op::Sync, &self.path, 0, 0).await;
        match verdict {
            Verdict::Fail(errno) => {
                if !disk.is_dead() {
                    let mut chance = disk.shared.chance.borrow_mut();
                    self.inode.borrow_mut().fail_sync(&covered, &mut chance);
                }
                return Err(self.failure(Op::Sync, errno));
            }
            Verdict::Cut => disk.cut().await,
            Verdict::Go(_) | Verdict::EffectThenCut => {
                self.inode.borrow_mut().persist(&covered);
            }
        }
        if disk.end(verdict).await { Ok(()) } else { Err(self.failure(Op::Sync, EIO)) }
    }

    /// A change of the file that is not a write: visible at once, durable after a sync.
    async fn alter(self, op: Op, offset: u64, len: u64, change: Change) -> Result<()> {
        let disk = &self.disk;
        let verdict = disk.begin(op, &self.path, offset, to_usize(len)).await;
        match verdict {
            Verdict::Fail(errno) => return Err(self.failure(op, errno)),
            Verdict::Cut => {
                disk.cut().await;
                return Err(self.failure(op, EIO));
            }
            Verdict::Go(_) | Verdict::EffectThenCut => {}
        }
        let sequence = self.inode.borrow_mut().change(change);
        if !disk.end(verdict).await {
            return Err(self.failure(op, EIO));
        }
        self.inode.borrow_mut().returned(sequence);
        Ok(())
    }

    fn failure(&self, op: Op, errno: i32) -> Error {
        failure(op, &self.path, errno)
    }
}

impl File for SimFile {
    fn alignment(&self) -> usize {
        self.disk.shared.options.alignment
    }

    fn read_at(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<AlignedBuf>> + 'static {
        self.check_aligned(offset, len);
        self.disk.detach(self.clone().read(offset, len))
    }

    fn write_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
        mode: WriteMode,
    ) -> impl Future<Output = (AlignedBuf, Result<()>)> + 'static {
        self.check_aligned(offset, buf.len());
        assert!(self.writable, "{} was opened for reading", self.path.display());
        self.disk.detach(self.clone().write(offset, buf, mode))
    }

    fn sync(&self) -> impl Future<Output = Result<()>> + 'static {
        self.disk.detach(self.clone().sync_all())
    }

    fn len(&self) -> impl Future<Output = Result<u64>> + 'static {
        let inode = self.inode.clone();
        self.disk.named(Op::Len, &self.path, move |_, _| Ok(to_u64(inode.borrow().live.len())))
    }

    fn set_len(&self, len: u64) -> impl Future<Output = Result<()>> + 'static {
        assert!(self.writable, "{} was opened for reading", self.path.display());
        let change = Change::SetLen(to_usize(len));
        self.disk.detach(self.clone().alter(Op::SetLen, 0, len, change))
    }

    fn punch(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>> + 'static {
        assert!(self.writable, "{} was opened for reading", self.path.display());
        let change = Change::Punch { offset: to_usize(offset), len: to_usize(len) };
        self.disk.detach(self.clone().alter(Op::Punch, offset, len, change))
    }
}

fn failure(op: Op, path: &Path, errno: i32) -> Error {
    Error::io(format!("{op:?} (simulated)"), path, io::Error::from_raw_os_error(errno))
}

fn refusal(op: Op, path: &Path, kind: io::ErrorKind) -> Error {
    Error::io(format!("{op:?} (simulated)"), path, io::Error::from(kind))
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a simulated file fits memory")
}

fn to_u64(value: usize) -> u64 {
    u64::try_from(value).expect("a length fits 64 bits")
}

#[cfg(test)]
mod tests;
