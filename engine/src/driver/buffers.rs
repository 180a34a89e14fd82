//! Receive buffers lent to the kernel: it picks one when bytes arrive, so that idle connections
//! hold none.
//!
//! Invariant: each buffer is either the kernel's (in the ring of entries) or ours (`held`), and
//! only bytes of a held buffer are ever seen. Buffers go back with [`BufferRing::publish`], once
//! a turn. On the read path: before the frame decoder.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use super::ring::{Ring, WeakRing};
use crate::error::{Error, Result};

/// Anonymous memory, zeroed and page-aligned.
struct Mapping {
    memory: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> io::Result<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let memory = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        match NonNull::new(memory.cast::<u8>()) {
            Some(memory) if memory.as_ptr().cast() != libc::MAP_FAILED => {
                Ok(Mapping { memory, len })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, unmapped once.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.len) };
    }
}

/// A group of equal buffers from which receives of one ring take.
///
/// Before it is dropped, no receive with its group may be in flight: an owner that goes early
/// hands it to [`Ring::retain`].
pub struct BufferRing {
    ring: WeakRing,
    group: u16,
    count: u16,
    size: usize,
    tail: u16,
    held: Vec<bool>,
    entries: Mapping,
    buffers: Mapping,
}

impl BufferRing {
    /// Lends `count` (a power of two up to 32,768) buffers of `size` bytes to the kernel.
    ///
    /// # Errors
    /// `Io` when memory or the kernel refuses.
    pub fn new(ring: &Ring, count: u16, size: u32) -> Result<BufferRing> {
        assert!(count.is_power_of_two() && count <= 1 << 15, "the kernel's rule");
        let refused = |source| Error::io("provide receive buffers", "io_uring", source);
        let size_usize = size as usize;
        let entries_len = usize::from(count) * size_of::<BufRingEntry>();
        let entries = Mapping::new(entries_len).map_err(refused)?;
        let buffers = Mapping::new(usize::from(count) * size_usize).map_err(refused)?;
        // SAFETY: both mappings live in `Self`, whose `drop` unregisters before they go.
        let group = unsafe { ring.register_buffers(entries.memory.as_ptr() as u64, count) }
            .map_err(refused)?;
        let mut this = BufferRing {
            ring: ring.downgrade(),
            group,
            count,
            size: size_usize,
            tail: 0,
            held: vec![true; usize::from(count)],
            entries,
            buffers,
        };
        for id in 0..count {
            this.recycle(id);
        }
        this.publish();
        Ok(this)
    }

    /// The group's number, for receive entries.
    #[must_use]
    pub fn group(&self) -> u16 {
        self.group
    }

    /// The first `len` bytes of a buffer that a completion has named; it is ours until recycled.
    pub fn claim(&mut self, id: u16, len: usize) -> &[u8] {
        assert!(id < self.count && len <= self.size, "the kernel names buffers of this group");
        self.held[usize::from(id)] = true;
        // SAFETY: inside the mapping, which is zeroed and so initialised; the kernel writes to a
        // buffer only while it is in the ring of entries, and this one has been taken out.
        unsafe {
            let start = self.buffers.memory.as_ptr().add(usize::from(id) * self.size);
            std::slice::from_raw_parts(start, len)
        }
    }

    /// A look at the first `len` bytes of a buffer that a completion has named and that nobody has
    /// recycled since.
    #[must_use]
    pub fn look(&self, id: u16, len: usize) -> &[u8] {
        assert!(id < self.count && len <= self.size, "the kernel names buffers of this group");
        // SAFETY: as in `claim`: a named buffer is out of the ring of entries.
        unsafe {
            let start = self.buffers.memory.as_ptr().add(usize::from(id) * self.size);
            std::slice::from_raw_parts(start, len)
        }
    }

    /// Puts a held buffer back, visible to the kernel after [`BufferRing::publish`].
    pub fn recycle(&mut self, id: u16) {
        let held = &mut self.held[usize::from(id)];
        assert!(*held, "only a held buffer goes back, else two receives would share it");
        *held = false;
        let slot = usize::from(self.tail & (self.count - 1));
        // SAFETY: `slot < count` entries lie in the mapping, and the kernel does not read an
        // entry at or after the published tail. The address is inside the buffers' mapping.
        unsafe {
            let entry = &mut *self.entries.memory.as_ptr().cast::<BufRingEntry>().add(slot);
            let buffer = self.buffers.memory.as_ptr().add(usize::from(id) * self.size);
            entry.set_addr(buffer as u64);
            entry.set_len(u32::try_from(self.size).expect("made from a u32"));
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the kernel all recycled buffers.
    pub fn publish(&mut self) {
        // SAFETY: the tail lies in the first entry's reserved field, is aligned, and is shared
        // with the kernel, so it is written atomically.
        unsafe {
            let base = self.entries.memory.as_ptr().cast::<BufRingEntry>();
            let tail = BufRingEntry::tail(base).cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        if let Some(ring) = self.ring.upgrade() {
            // Fails only if never registered; the ring's own end unregisters too.
            let _ = ring.unregister_buffers(self.group);
        }
    }
}
