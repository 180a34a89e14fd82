//! Records of registers that come late: by sync, repair and refilling, not from their proposer.
//!
//! Invariant: one is merged only where ACCEPT would be, above every promise of its key; or else the
//! key is mended, which merges what is known to be chosen. A home that has not caught up since it
//! lost its disk has promised nothing, and takes all.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use annulus_cluster::keys::Promises;
use annulus_engine::Result;
use annulus_engine::disk::Disk;
use annulus_engine::log::Lsn;
use annulus_engine::model::{NamespaceId, RecordRef, Timestamp, Token, WallMicros};
use annulus_engine::runtime::Runtime;
use annulus_engine::shard::Shard;

/// Most keys that wait to be mended. Others are found again.
const WANTED_MAX: usize = 1024;

type Key = (Token, NamespaceId, Vec<u8>);

/// Keys to be mended, each once, with the stamp of the newest record that came late.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    line: VecDeque<Key>,
    known: BTreeMap<Key, Timestamp>,
}

impl Wanted {
    fn push(&mut self, record: &RecordRef<'_>) {
        let key = (record.token, record.namespace, record.key.to_vec());
        if let Some(late) = self.known.get_mut(&key) {
            *late = record.timestamp.max(*late);
        } else if self.line.len() < WANTED_MAX {
            self.known.insert(key.clone(), record.timestamp);
            self.line.push_back(key);
        }
    }

    pub(super) fn take(&mut self) -> Option<(Key, Timestamp)> {
        let key = self.line.pop_front()?;
        let late = self.known.remove(&key)?;
        Some((key, late))
    }
}

/// What tasks that merge records ask first. Cheap to clone.
#[derive(Clone, Debug)]
pub(in crate::pump::replication) struct LateRecords {
    promises: Rc<RefCell<Promises>>,
    wanted: Rc<RefCell<Wanted>>,
}

impl LateRecords {
    pub(super) fn new(
        promises: &Rc<RefCell<Promises>>,
        wanted: &Rc<RefCell<Wanted>>,
    ) -> LateRecords {
        LateRecords { promises: Rc::clone(promises), wanted: Rc::clone(wanted) }
    }

    /// Merges a record of a linearizable namespace, if it may be; else its key will be mended, and
    /// there is `None`.
    ///
    /// # Errors
    /// As [`Shard::merge_again`].
    pub(in crate::pump::replication) fn merge<D: Disk, R: Runtime>(
        &self,
        shard: &Shard<D, R>,
        record: &RecordRef<'_>,
        wall: WallMicros,
    ) -> Result<Option<Lsn>> {
        let partition = record.token.partition(shard.identity().partition_bits);
        let is_allowed = self.promises.borrow().may_merge(record.token, record.timestamp)
            || !shard.is_founded(partition);
        if !is_allowed {
            self.wanted.borrow_mut().push(record);
            return Ok(None);
        }
        let lsn = shard.merge_again(record, wall)?;
        self.promises.borrow_mut().merged(record.token, record.timestamp);
        Ok(Some(lsn))
    }
}
