//! `Tables`: the live tables with their files. Commits edits, opens at start, removes and gives
//! back what nobody reads any more, makes snapshots.
//!
//! Invariant: an edit is in the manifest before any reader sees it, and before any file that it
//! gives up is touched. So a crash leaves either files that no edit names yet (written, not
//! committed) or files that no edit names any more (committed, not removed); both are removed at
//! the next open, after every named file was found in its full length.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};

use futures_util::StreamExt;
use futures_util::lock::Mutex;

use super::edit::{Consumed, TableSetEdit};
use super::facts::{Facts, Lost};
use super::layout::Layout;
use super::manifest::{Manifest, Owner};
use super::ranges::Ranges;
use super::set::{LiveTable, TableSet};
use crate::disk::{Disk, File, OpenMode};
use crate::error::{Error, Result};
use crate::log::Lsn;
use crate::model::{Token, TokenRange};
use crate::sstable::{Table, TableId, TableIdentity, file_salt};

/// Directory of the tables inside a shard's directory.
pub const TABLE_DIR: &str = "table";
/// Tables opened at the same time.
const OPENS_IN_FLIGHT: usize = 16;
/// Ends the name of a table that was put aside.
const QUARANTINED: &str = ".damaged";
/// Ranges are given back in whole blocks of the file system, in bytes.
const PUNCH_UNIT: u64 = 4096;

/// What waits until no reader can reach it. In the order of the edits.
enum Garbage<F> {
    /// A file that is live no more; when nobody has the table open.
    Remove { id: TableId, watch: Weak<Table<F>> },
    /// The tokens of `gone` are consumed, from `fresh` on just now; when nobody has the table as
    /// it was before, nor, because entries of a table take turns, as it was earlier still.
    Punch { watch: Weak<LiveTable<F>>, table: Rc<Table<F>>, gone: TokenRange, fresh: Token },
}

impl<F: File> Garbage<F> {
    fn table(&self) -> TableId {
        match self {
            Garbage::Remove { id, .. } => *id,
            Garbage::Punch { table, .. } => table.id(),
        }
    }

    fn is_unreachable(&self) -> bool {
        match self {
            Garbage::Remove { watch, .. } => watch.strong_count() == 0,
            Garbage::Punch { watch, .. } => watch.strong_count() == 0,
        }
    }
}

type RemovalHook = Box<dyn Fn(TableId)>;

struct Inner<D: Disk> {
    disk: D,
    dir: PathBuf,
    owner: Owner,
    current: RefCell<Rc<TableSet<D::File>>>,
    manifest: Mutex<Manifest<D>>,
    next_table: Cell<u64>,
    next_order: Cell<u64>,
    garbage: RefCell<Vec<Garbage<D::File>>>,
    /// Tables of edits that failed: one of them may be in the manifest until it rolls.
    doubtful: RefCell<Vec<TableId>>,
    on_removed: RefCell<Option<RemovalHook>>,
    /// Says whether files must stay as they are, for readers that this set does not know.
    held: RefCell<Option<Box<dyn Fn() -> bool>>>,
    /// Another `Tables` has the directory now, or will: nothing is committed here any more.
    retired: Cell<bool>,
}

/// The file name of a table that was put aside because it cannot be opened. It is never removed.
#[must_use]
pub fn quarantine_name(id: TableId) -> String {
    format!("{}{QUARANTINED}", id.file_name())
}

/// The live tables of a shard. Clones share them.
pub struct Tables<D: Disk> {
    inner: Rc<Inner<D>>,
}

impl<D: Disk> Clone for Tables<D> {
    fn clone(&self) -> Tables<D> {
        Tables { inner: Rc::clone(&self.inner) }
    }
}

impl<D: Disk> Tables<D> {
    /// Makes an empty set in a new shard directory. The caller has just created `IDENTITY`.
    ///
    /// # Errors
    /// `Mismatch` when there is a manifest already, else of the disk.
    pub async fn create(disk: D, dir: &Path, owner: Owner) -> Result<Tables<D>> {
        disk.create_dir(&dir.join(TABLE_DIR)).await?;
        // Durable before the manifest has its name: a manifest without the directory beside it
        // is refused.
        disk.sync_dir(dir).await?;
        let mut layout = Layout::default();
        layout.next_table = 1;
        let manifest = Manifest::create(disk.clone(), dir, owner, &layout).await?;
        Ok(Tables::start(disk, dir, owner, manifest, TableSet::new(layout, &BTreeMap::new())))
    }

    /// Opens the set of a shard directory: replays the manifest, opens every table it names, then
    /// removes the table files that it does not name.
    ///
    /// A table whose footer or index is damaged is put aside: it leaves the set, its file gets
    /// another name and is kept, and the manifest says which tokens are lost with it.
    ///
    /// # Errors
    /// `Corrupt` when the manifest is missing or damaged, or a file that it names is missing. State:
    /// no table file has been removed.
    pub async fn open(disk: D, dir: &Path, owner: Owner) -> Result<Tables<D>> {
        let (mut manifest, mut layout) = Manifest::open(disk.clone(), dir, owner).await?;
        let table_dir = dir.join(TABLE_DIR);
        let names = disk.list(&table_dir).await?;
        let ids: Vec<TableId> =
            names.iter().filter_map(|name| TableId::from_file_name(name)).collect();
        let mut edit = TableSetEdit::default();
        let mut lost = layout.lost.clone();
        let opened = {
            let opens = layout.entries().map(|entry| {
                let id = entry.id();
                let (disk, table_dir) = (&disk, &table_dir);
                let is_there = ids.contains(&id);
                async move {
                    let opened = open_table(disk, table_dir, owner, id, Some(entry.summary.size));
                    (entry, is_there, opened.await)
                }
            });
            let mut opens = futures_util::stream::iter(opens).buffer_unordered(OPENS_IN_FLIGHT);
            let mut opened = BTreeMap::new();
            while let Some((entry, is_there, table)) = opens.next().await {
                match table {
                    Ok(table) => drop(opened.insert(table.id(), table)),
                    Err(error @ Error::Corrupt { .. }) if is_there => {
                        tracing::error!(%error, "a table cannot be opened and is put aside");
                        edit.removed.push(entry.id());
                        let max_timestamp = entry.summary.max_timestamp;
                        let lose = |range| Lost { table: entry.id(), range, max_timestamp };
                        lost.extend(entry.live.iter().map(lose));
                    }
                    Err(error) => return Err(error),
                }
            }
            opened
        };
        if !edit.removed.is_empty() {
            // First the edit: a file that the manifest names must be there.
            edit.facts.lost = Some(lost);
            layout = layout
                .apply(&edit)
                .map_err(|what| Error::Invalid { what: format!("table set edit: {what}") })?;
            manifest.append(&edit, &layout).await?;
        }
        for name in &names {
            let id = TableId::from_file_name(name);
            let path = table_dir.join(name);
            match id {
                Some(id) if opened.contains_key(&id) => {}
                Some(id) if layout.lost.iter().any(|lost| lost.table == id) => {
                    disk.rename(&path, &table_dir.join(quarantine_name(id))).await?;
                    disk.sync_dir(&table_dir).await?;
                }
                None if name.ends_with(QUARANTINED) => {}
                _ => {
                    tracing::info!(file = %path.display(), "removing a table that no edit names");
                    disk.remove(&path).await?;
                }
            }
        }
        // An orphan's number is not used again either.
        let used = ids.iter().map(|id| id.0 + 1).max().unwrap_or(0);
        layout.next_table = layout.next_table.max(used);
        let tables = Tables::start(disk, dir, owner, manifest, TableSet::new(layout, &opened));
        tables.give_back_again();
        Ok(tables)
    }

    fn start(
        disk: D,
        dir: &Path,
        owner: Owner,
        manifest: Manifest<D>,
        set: TableSet<D::File>,
    ) -> Tables<D> {
        let layout = set.layout();
        Tables {
            inner: Rc::new(Inner {
                disk,
                dir: dir.to_owned(),
                owner,
                next_table: Cell::new(layout.next_table),
                next_order: Cell::new(layout.next_order),
                current: RefCell::new(Rc::new(set)),
                manifest: Mutex::new(manifest),
                garbage: RefCell::new(Vec::new()),
                doubtful: RefCell::new(Vec::new()),
                on_removed: RefCell::new(None),
                held: RefCell::new(None),
                retired: Cell::new(false),
            }),
        }
    }

    /// The set as it is now. Hold it for as long as tables of it are read.
    #[must_use]
    pub fn current(&self) -> Rc<TableSet<D::File>> {
        Rc::clone(&self.inner.current.borrow())
    }

    /// Called with each table that is live no more: for the block cache.
    pub fn on_removed(&self, hook: impl Fn(TableId) + 'static) {
        *self.inner.on_removed.borrow_mut() = Some(Box::new(hook));
    }

    /// Gives nothing of a file back, and removes none, while `held` says so: for readers of
    /// another `Tables` of the same directory.
    pub fn hold_files(&self, held: impl Fn() -> bool + 'static) {
        *self.inner.held.borrow_mut() = Some(Box::new(held));
    }

    /// Ends the commits of this object, after the one under way: the directory is about to be
    /// opened anew in this process. Reads go on.
    pub async fn retire(&self) {
        let _manifest = self.inner.manifest.lock().await;
        self.inner.retired.set(true);
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &D {
        &self.inner.disk
    }

    /// A number for a new table; never given twice.
    #[must_use]
    pub fn next_table_id(&self) -> TableId {
        TableId(self.inner.next_table.replace(self.inner.next_table.get() + 1))
    }

    /// The order of a new flush, above all earlier ones. Flushes take it in the order in which
    /// their memtables were sealed.
    #[must_use]
    pub fn next_order(&self) -> u64 {
        self.inner.next_order.replace(self.inner.next_order.get() + 1)
    }

    /// What identifies a table of this shard, its path and salt.
    #[must_use]
    pub fn identity(&self, id: TableId) -> TableIdentity {
        identity(&self.inner.dir.join(TABLE_DIR), self.inner.owner, id)
    }

    /// Creates the file of a new table.
    ///
    /// # Errors
    /// Of the disk.
    pub async fn create_file(&self, id: TableId) -> Result<D::File> {
        self.inner.disk.open(&self.identity(id).path, OpenMode::Create).await
    }

    /// Opens a table that was just written.
    ///
    /// # Errors
    /// `Corrupt` when it does not read back, else of the disk.
    pub async fn open_file(&self, id: TableId) -> Result<Rc<Table<D::File>>> {
        let inner = &self.inner;
        open_table(&inner.disk, &inner.dir.join(TABLE_DIR), inner.owner, id, None).await
    }

    /// Makes the names of new tables durable: before the edit that names them.
    ///
    /// # Errors
    /// Of the disk.
    pub async fn sync_dir(&self) -> Result<()> {
        self.inner.disk.sync_dir(&self.inner.dir.join(TABLE_DIR)).await
    }

    /// After a failed commit: makes it certain what the manifest names, and removes the tables of
    /// edits that failed. To be called before more tables are written, so that a manifest that
    /// cannot be written does not fill the disk with tables that nobody names.
    ///
    /// # Errors
    /// Of the disk. State: as before.
    pub async fn settle(&self) -> Result<()> {
        let inner = &self.inner;
        let mut manifest = inner.manifest.lock().await;
        if inner.doubtful.borrow().is_empty() || inner.retired.get() {
            return Ok(());
        }
        if manifest.is_doubtful() {
            let layout = self.current();
            manifest.roll(layout.layout()).await?;
        }
        let doubtful = inner.doubtful.take();
        drop(manifest);
        self.abandon(&doubtful).await;
        Ok(())
    }

    /// Removes table files that were never committed. Best effort: the next open does it too.
    pub async fn abandon(&self, ids: &[TableId]) {
        for &id in ids {
            let _ = self.inner.disk.remove(&self.identity(id).path).await;
        }
    }

    /// Makes one change durable and then visible. `opened` are the tables that it adds, written,
    /// synced, and named durably. `make` sees the layout as it is when its turn has come.
    ///
    /// # Errors
    /// Of the disk; state: as before, and the new tables' files are removed once the manifest is
    /// known not to name them. `Invalid` when the edit does not fit; state: as before.
    pub async fn commit(
        &self,
        opened: Vec<Rc<Table<D::File>>>,
        make: impl FnOnce(&Layout) -> TableSetEdit,
    ) -> Result<()> {
        self.commit_to(opened, make).await.map(drop)
    }

    /// [`Tables::commit`], returning the set that it led to.
    async fn commit_to(
        &self,
        opened: Vec<Rc<Table<D::File>>>,
        make: impl FnOnce(&Layout) -> TableSetEdit,
    ) -> Result<Rc<TableSet<D::File>>> {
        let inner = &self.inner;
        let mut manifest = inner.manifest.lock().await;
        if inner.retired.get() {
            inner.doubtful.borrow_mut().extend(opened.iter().map(|table| table.id()));
            return Err(Error::Busy { what: "the shard is being opened anew" });
        }
        let before = self.current();
        let mut edit = make(before.layout());
        edit.next_table = edit.next_table.max(inner.next_table.get());
        edit.next_order = edit.next_order.max(inner.next_order.get());
        let opened: BTreeMap<_, _> = opened.into_iter().map(|table| (table.id(), table)).collect();
        let layout = match before.layout().apply(&edit) {
            Ok(layout) => layout,
            Err(what) => {
                inner.doubtful.borrow_mut().extend(opened.keys());
                return Err(Error::Invalid { what: format!("table set edit: {what}") });
            }
        };
        if let Err(error) = manifest.append(&edit, &layout).await {
            inner.doubtful.borrow_mut().extend(opened.keys());
            return Err(error);
        }
        let after = Rc::new(before.with(layout, &opened));
        *inner.current.borrow_mut() = Rc::clone(&after);
        self.note_garbage(&before, &after, &edit);
        drop(before);
        // The manifest is certain again, and names none of these.
        let doubtful = inner.doubtful.take();
        drop(manifest);
        self.abandon(&doubtful).await;
        Ok(after)
    }

    /// Makes the manifest know that the log was durable up to here.
    ///
    /// # Errors
    /// Of the disk. State: as before.
    pub async fn note_logged(&self, logged: Lsn) -> Result<()> {
        if self.current().layout().logged >= logged {
            return Ok(());
        }
        let facts = Facts { logged, ..Facts::default() };
        self.commit(Vec::new(), |_| TableSetEdit { facts, ..TableSetEdit::default() }).await
    }

    fn note_garbage(
        &self,
        before: &TableSet<D::File>,
        after: &TableSet<D::File>,
        edit: &TableSetEdit,
    ) {
        let mut garbage = self.inner.garbage.borrow_mut();
        for Consumed { table, range, .. } in &edit.consumed {
            let (Some(old), Some(new)) = (before.table(*table), after.table(*table)) else {
                continue;
            };
            garbage.push(Garbage::Punch {
                watch: Rc::downgrade(old),
                table: Rc::clone(old.table()),
                gone: with_gone_before(&new.entry().live, new.entry().summary.span, *range),
                fresh: range.first,
            });
        }
        for &id in &edit.removed {
            let live = before.table(id).expect("the edit was applied to this set");
            // The file goes as a whole, so its ranges need not.
            garbage.retain(|it| it.table() != id);
            garbage.push(Garbage::Remove { id, watch: Rc::downgrade(live.table()) });
            if let Some(hook) = &*self.inner.on_removed.borrow() {
                hook(id);
            }
        }
    }

    /// After an open: a crash may have come between an edit and giving its ranges back.
    fn give_back_again(&self) {
        let mut garbage = self.inner.garbage.borrow_mut();
        for live in self.current().upper() {
            let mut gone = Ranges::of(live.entry().summary.span);
            live.entry().live.iter().for_each(|range| gone.subtract(&range));
            garbage.extend(gone.iter().map(|gone| Garbage::Punch {
                watch: Weak::new(),
                table: Rc::clone(live.table()),
                gone,
                fresh: gone.first,
            }));
        }
    }

    /// Removes files and gives back ranges that no reader can reach any more. Best effort: what
    /// fails is done at the next open. Returns the number of things that still wait.
    pub async fn collect_garbage(&self) -> usize {
        let inner = &self.inner;
        if inner.held.borrow().as_ref().is_some_and(|held| held()) {
            return inner.garbage.borrow().len();
        }
        let mut blocked = BTreeSet::new();
        let (ready, waiting): (Vec<_>, Vec<_>) = inner.garbage.take().into_iter().partition(|it| {
            let ready = it.is_unreachable() && !blocked.contains(&it.table());
            if !ready {
                blocked.insert(it.table());
            }
            ready
        });
        *inner.garbage.borrow_mut() = waiting;
        for garbage in ready {
            match garbage {
                Garbage::Remove { id, .. } => self.abandon(&[id]).await,
                Garbage::Punch { table, gone, fresh, .. } => {
                    // Under the manifest's lock no snapshot can begin to share the file.
                    let _lock = inner.manifest.lock().await;
                    let shared = self.current().table(table.id()).map(|live| live.entry().shared);
                    if shared == Some(false) {
                        punch(&table, gone, fresh).await;
                    }
                }
            }
        }
        inner.garbage.borrow().len()
    }

    /// Writes the set into a new directory: hard links of all tables, and a manifest. The caller
    /// has made `to`, adds its other files, and syncs the directory above. Returns the set.
    ///
    /// # Errors
    /// Of the disk. State: the live set is as before; `to` may hold part of the snapshot.
    pub async fn snapshot(&self, to: &Path) -> Result<Rc<TableSet<D::File>>> {
        let inner = &self.inner;
        let shared = |layout: &Layout| TableSetEdit {
            shared: layout.entries().filter(|e| !e.shared).map(|e| e.id()).collect(),
            ..TableSetEdit::default()
        };
        // From here on no byte of these files changes, also after a restart; holding the set keeps
        // their names.
        let set = self.commit_to(Vec::new(), shared).await?;
        let table_dir = to.join(TABLE_DIR);
        inner.disk.create_dir(&table_dir).await?;
        for live in set.tables() {
            let name = live.id().file_name();
            inner.disk.link(&inner.dir.join(TABLE_DIR).join(&name), &table_dir.join(&name)).await?;
        }
        inner.disk.sync_dir(&table_dir).await?;
        let mut layout = set.layout().clone();
        // Its log is another one.
        layout.logged = Lsn::ZERO;
        Manifest::create(inner.disk.clone(), to, inner.owner, &layout).await?;
        Ok(set)
    }

    /// Number and bytes of the current manifest file.
    pub async fn manifest_size(&self) -> (u64, u64) {
        let manifest = self.inner.manifest.lock().await;
        (manifest.id(), manifest.size())
    }
}

fn identity(table_dir: &Path, owner: Owner, id: TableId) -> TableIdentity {
    let salt = file_salt(owner.cluster, owner.shard, id);
    TableIdentity { id, salt, path: table_dir.join(id.file_name()) }
}

async fn open_table<D: Disk>(
    disk: &D,
    table_dir: &Path,
    owner: Owner,
    id: TableId,
    size: Option<u64>,
) -> Result<Rc<Table<D::File>>> {
    let identity = identity(table_dir, owner, id);
    let path = identity.path.clone();
    let file = match disk.open(&path, OpenMode::Write).await {
        Err(error) if error.is_not_found() => {
            return Err(Error::corrupt(
                path,
                0,
                "the manifest names this table, and it is missing",
            ));
        }
        file => file?,
    };
    let len = file.len().await?;
    if let Some(size) = size.filter(|&size| size != len) {
        let what = format!("the manifest says {size} bytes, the file has {len}");
        return Err(Error::corrupt(path, len.min(size), what));
    }
    Table::open(file, identity).await.map(Rc::new)
}

/// `range`, with what is gone just before it: the block on the border is gone as a whole.
fn with_gone_before(live: &Ranges, span: TokenRange, range: TokenRange) -> TokenRange {
    let first = live
        .iter()
        .filter(|part| part.last < range.first)
        .last()
        .map_or(span.first, |part| Token(part.last.0 + 1));
    TokenRange { first, last: range.last }
}

/// Gives the bytes of a consumed range back, in whole file system blocks; what lies before
/// `fresh` was given back before.
async fn punch<F: File>(table: &Table<F>, gone: TokenRange, fresh: Token) {
    let bytes = table.bytes_inside(gone);
    let mut start = bytes.start.next_multiple_of(PUNCH_UNIT);
    if gone.first < fresh {
        let before = TokenRange { first: gone.first, last: Token(fresh.0 - 1) };
        start = start.max(table.bytes_inside(before).end & !(PUNCH_UNIT - 1));
    }
    let end = bytes.end & !(PUNCH_UNIT - 1);
    if start < end
        && let Err(error) = table.file().punch(start, end - start).await
    {
        tracing::warn!(%error, table = table.id().0, "a consumed range was not given back");
    }
}
