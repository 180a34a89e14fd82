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
use super::medium::{Entry, Inode, InodeRef, Names, SECTOR, is_parent};
use super::{Chance, SimFile, SimRuntime};
use crate::disk::{Disk, OpenMode, Space};
use crate::error::{Error, Result};
use crate::runtime::{Class, Runtime};

/// Operations that [`SimDisk::op_log`] remembers.
const LOG_MAX: usize = 8192;
pub(super) const EIO: i32 = 5;
pub(super) const ENOSPC: i32 = 28;

/// What a simulated disk is like.
#[derive(Clone, Copy, Debug)]
pub struct SimDiskOptions {
    /// Chance of delays, of partial failures and of the seed of survivors' disks.
    pub seed: u64,
    /// What [`File::alignment`](crate::disk::File::alignment) says, in bytes; a power of two, at least 512. Default 512.
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

pub(super) struct Shared {
    pub(super) runtime: SimRuntime,
    pub(super) options: SimDiskOptions,
    pub(super) capacity: Cell<u64>,
    pub(super) chance: RefCell<Chance>,
    pub(super) names: RefCell<Names>,
    /// Every file that a name or an open handle still holds.
    pub(super) inodes: RefCell<Vec<Weak<RefCell<Inode>>>>,
    pub(super) next_inode: Cell<u64>,
    pub(super) locks: RefCell<BTreeSet<PathBuf>>,
    pub(super) rules: RefCell<Vec<Rule>>,
    pub(super) log: RefCell<VecDeque<OpRecord>>,
    pub(super) op_count: Cell<u64>,
    pub(super) observer: RefCell<Option<Observer>>,
    pub(super) dead: Cell<bool>,
}

/// Called at each moment between two changes of the disk.
pub(super) type Observer = Box<dyn FnMut(&SimDisk)>;

/// The simulated `Disk`. Clones share it.
#[derive(Clone)]
pub struct SimDisk {
    pub(super) shared: Rc<Shared>,
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
pub(super) enum Verdict {
    Go(Option<Fault>),
    Fail(i32),
    /// Take effect, then lose power.
    EffectThenCut,
    Cut,
}

/// The machinery of operations.
impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(runtime: &SimRuntime, options: SimDiskOptions) -> SimDisk {
        assert!(options.alignment.is_power_of_two() && options.alignment >= SECTOR);
        SimDisk::with_names(runtime, options, Names::default(), 0)
    }

    pub(super) fn with_names(
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
                observer: RefCell::default(),
                dead: Cell::new(false),
            }),
        }
    }

    pub(super) fn call_observer(&self) {
        // Taken out meanwhile, so that it may look at the disk in any way.
        let observer = self.shared.observer.borrow_mut().take();
        if let Some(mut observer) = observer {
            observer(self);
            self.shared.observer.borrow_mut().get_or_insert(observer);
        }
    }

    pub(super) fn new_inode(&self) -> InodeRef {
        let id = self.shared.next_inode.get();
        self.shared.next_inode.set(id + 1);
        let inode = Rc::new(RefCell::new(Inode::new(id)));
        self.shared.inodes.borrow_mut().push(Rc::downgrade(&inode));
        inode
    }

    /// Numbers and records an operation, lets its first half of time pass, and says its fate.
    pub(super) async fn begin(&self, op: Op, path: &Path, offset: u64, len: usize) -> Verdict {
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
        if op.changes() {
            self.call_observer();
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
    pub(super) async fn end(&self, op: Op, verdict: Verdict) -> bool {
        if op.changes() {
            self.call_observer();
        }
        if verdict == Verdict::EffectThenCut {
            self.cut().await;
        }
        self.pass(0).await;
        !self.shared.dead.get()
    }

    pub(super) async fn cut(&self) {
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

    pub(super) fn toss(&self) -> bool {
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
        if self.end(op, verdict).await { answer } else { Err(failure(op, path, EIO)) }
    }

    /// Runs an operation to its end as a task, whatever becomes of the future that waits for it.
    pub(super) fn detach<T: 'static>(
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

    pub(super) fn named<T: 'static>(
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

pub(super) fn failure(op: Op, path: &Path, errno: i32) -> Error {
    Error::io(format!("{op:?} (simulated)"), path, io::Error::from_raw_os_error(errno))
}

fn refusal(op: Op, path: &Path, kind: io::ErrorKind) -> Error {
    Error::io(format!("{op:?} (simulated)"), path, io::Error::from(kind))
}

pub(super) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a simulated file fits memory")
}

pub(super) fn to_u64(value: usize) -> u64 {
    u64::try_from(value).expect("a length fits 64 bits")
}

#[cfg(test)]
mod tests;
