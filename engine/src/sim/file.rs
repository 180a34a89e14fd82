//! `SimFile`: reads, writes and syncs of one open file, with what may go wrong in their middle.
//!
//! Invariant: a change is visible from its effect on, counts for a later sync from its answer
//! on, and an operation that fails may have done part of its work.

use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;

use super::SimDisk;
use super::disk::{EIO, ENOSPC, Verdict, failure, to_u64, to_usize};
use super::fault::{Fault, Op};
use super::medium::{Change, InodeRef, tear};
use crate::buffer::AlignedBuf;
use crate::disk::{File, WriteMode};
use crate::error::{Error, Result};

/// An open file of a [`SimDisk`].
#[derive(Clone)]
pub struct SimFile {
    pub(super) disk: SimDisk,
    pub(super) inode: InodeRef,
    pub(super) path: Rc<PathBuf>,
    pub(super) writable: bool,
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
            Verdict::Fail(errno) => return Err(self.failure_at(Op::Read, offset, errno)),
            Verdict::Cut | Verdict::EffectThenCut => {
                disk.cut().await;
                return Err(self.failure_at(Op::Read, offset, EIO));
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
        if disk.end(Op::Read, verdict).await {
            Ok(buf)
        } else {
            Err(self.failure_at(Op::Read, offset, EIO))
        }
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
                return (buf, Err(self.failure_at(Op::Write, offset, errno)));
            }
            Verdict::Cut => {
                disk.cut().await;
                return (buf, Err(self.failure_at(Op::Write, offset, EIO)));
            }
            Verdict::Go(_) | Verdict::EffectThenCut => {}
        }
        let sequence =
            self.inode.borrow_mut().change(Change::Write { offset: start, bytes: buf.to_vec() });
        if !disk.end(Op::Write, verdict).await {
            return (buf, Err(self.failure_at(Op::Write, offset, EIO)));
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
        if disk.end(Op::Sync, verdict).await { Ok(()) } else { Err(self.failure(Op::Sync, EIO)) }
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
        if !disk.end(op, verdict).await {
            return Err(self.failure(op, EIO));
        }
        self.inode.borrow_mut().returned(sequence);
        Ok(())
    }

    /// As the production driver says it.
    fn failure_at(&self, op: Op, offset: u64, errno: i32) -> Error {
        let what = format!("{op:?} at offset {offset} of (simulated)");
        Error::io(what, self.path.as_path(), std::io::Error::from_raw_os_error(errno))
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
