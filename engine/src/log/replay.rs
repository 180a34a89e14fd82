//! Reading the log back: which records survived, and whether any is missing that must not be.
//!
//! Invariant: [`replay`] visits exactly a prefix of what was appended, or refuses with the file
//! and offset. A batch that fails its check is the log's *torn tail* unless something proves that
//! it was durable once: a later batch whose header says that the log was synced beyond it (each
//! says how far), a clean close, or a later life that began after it. Then it is *damage*: if the
//! caller accepts that, the valid rest is visited too, and what is lost is named (`loss.rs`).
//!
//! Later batches that are whole but prove nothing are no contradiction: several were in flight
//! when the crash came, and any of them may have survived. They were never acknowledged, and are
//! void.
//!
//! On the recovery path; the only state is the window over the file being read.

use std::collections::VecDeque;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use super::Lsn;
use super::format::{
    BATCH_HEADER_SIZE, BatchHeader, Control, Invalid, LogIdentity, Records, ReplayItem,
    SEGMENT_HEADER_SIZE, SegmentHeader, VERSION, parse_name, segment_name,
};
use super::loss::{Claim, Loss, OnDamage, batch_bytes, find_batch, find_claim, refusal};
use crate::buffer::AlignedBuf;
use crate::disk::{Disk, File, OpenMode};
use crate::error::{Error, Result};

/// Bytes of one read.
const READ_SIZE: usize = 1 << 20;
/// Reads under way while earlier bytes are parsed.
const READS_AHEAD: usize = 4;

/// Where the log ended, and what [`super::CommitLog::start`] needs to go on.
#[derive(Clone, Debug)]
pub struct ReplayEnd {
    /// The log that was read.
    pub identity: LogIdentity,
    /// Last record in the log; zero when there is none.
    pub last: Lsn,
    /// Number of the next record: above `last`, and not below where replay was asked to begin.
    pub next: Lsn,
    /// Whether the log was closed in good order.
    pub clean: bool,
    /// Records visited.
    pub records: u64,
    /// Bytes of segments read.
    pub bytes: u64,
    /// Where the log was cut, if anything was found beyond its end.
    pub torn: Option<TornTail>,
    /// What was durable once and is lost, if that was accepted.
    pub losses: Vec<Loss>,
    /// Segments that something is lost of. The log does not touch them; the caller keeps them
    /// aside, and removes them when all that could be read is in tables.
    pub damaged: Vec<PathBuf>,
    pub(super) life: u64,
    pub(super) next_segment: u64,
    pub(super) segments: Vec<OldSegment>,
    pub(super) unproven: Vec<Extent>,
}

/// Writes that a crash interrupted. They were not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The segment.
    pub path: PathBuf,
    /// Where the first batch is missing or torn.
    pub offset: u64,
}

/// A segment of an earlier life.
#[derive(Clone, Debug)]
pub(super) struct OldSegment {
    pub(super) path: PathBuf,
    /// Last valid record in it; zero when it is free.
    pub(super) last: Lsn,
}

/// Bytes that were read and are valid, but that nothing proves durable.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub(super) path: PathBuf,
    pub(super) offset: u64,
    pub(super) size: u64,
    last: Lsn,
}

impl ReplayEnd {
    /// The end of a log that has no segments; its first record will be `next`.
    #[must_use]
    pub fn fresh(identity: LogIdentity, next: Lsn) -> ReplayEnd {
        let next = next.max(Lsn(1));
        ReplayEnd {
            identity,
            last: Lsn(next.0 - 1),
            next,
            clean: true,
            records: 0,
            bytes: 0,
            torn: None,
            losses: Vec::new(),
            damaged: Vec::new(),
            life: 0,
            next_segment: 1,
            segments: Vec::new(),
            unproven: Vec::new(),
        }
    }

    /// Counts what follows as lost, up to `logged`: files at the log's end are missing in `dir`.
    pub(crate) fn lose_end(&mut self, dir: &Path, what: String, logged: Lsn) {
        let records = Some((self.last.next(), logged));
        let path = dir.to_owned();
        self.losses.push(Loss { path, offset: 0, what, records, bytes: 0 });
        self.last = logged;
        self.next = self.next.max(logged.next());
        self.clean = false;
    }
}

/// Reads the log in `dir` and visits each surviving record from number `from` on, in order.
/// Records before `from` are in tables; segments that hold only such are not read.
///
/// # Errors
/// `Corrupt` (file, offset) when records are missing or damaged that were durable once;
/// `Mismatch` when the log belongs to another cluster or shard, or to a newer version; `Io`.
/// What was visited before an error must be thrown away. The files are unchanged.
pub async fn replay<D: Disk>(
    disk: &D,
    dir: &Path,
    identity: LogIdentity,
    from: Lsn,
    visit: &mut dyn FnMut(Lsn, ReplayItem<'_>),
) -> Result<ReplayEnd> {
    replay_with(disk, dir, identity, from, OnDamage::Refuse, visit, &mut || None).await
}

/// Work that must be done before replay goes on.
pub type Relief = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Like [`replay`], asking `relief` after each batch whether there is something to do first: so
/// that what was visited need not all be held in memory. Where damage is accepted, what the log
/// says behind it about writes that count as merged is not visited: they may be what is lost.
///
/// # Errors
/// As [`replay`], and those of the relief. Where damage is accepted, `Corrupt` only when the files
/// are not those of one log.
pub async fn replay_with<D: Disk>(
    disk: &D,
    dir: &Path,
    identity: LogIdentity,
    from: Lsn,
    on_damage: OnDamage,
    visit: &mut dyn FnMut(Lsn, ReplayItem<'_>),
    relief: &mut dyn FnMut() -> Option<Relief>,
) -> Result<ReplayEnd> {
    let names = match disk.list(dir).await {
        Ok(names) => names,
        Err(error) if error.is_not_found() => return Ok(ReplayEnd::fresh(identity, from)),
        Err(error) => return Err(error),
    };
    let mut ids: Vec<u64> = names.iter().filter_map(|name| parse_name(name)).collect();
    ids.sort_unstable();
    let mut segments: Vec<Found<D::File>> = Vec::with_capacity(ids.len());
    let newest = ids.last().copied();
    let mut end = ReplayEnd::fresh(identity, from);
    if ids.is_empty() && from > Lsn(1) {
        let what = format!("no log segment is here, but records up to {} were logged", from.0 - 1);
        let path = dir.to_owned();
        end.losses.push(Loss { path, offset: 0, what, records: None, bytes: 0 });
    }
    for id in ids {
        let found = match Found::open(disk, dir, identity, id).await {
            Ok(found) => found,
            Err(Error::Corrupt { offset, what, .. }) => {
                let path = dir.join(segment_name(id));
                let len = disk.open(&path, OpenMode::Read).await?.len().await?;
                let bytes = batch_bytes(len);
                end.losses.push(Loss { path: path.clone(), offset, what, records: None, bytes });
                end.damaged.push(path);
                continue;
            }
            Err(error) => return Err(error),
        };
        if found.len < found.header.size {
            let (offset, size) = (found.len, found.header.size);
            let what = format!("cut short: {offset} bytes are left of {size}");
            let (path, bytes) = (found.path.clone(), size - offset);
            end.losses.push(Loss { path: path.clone(), offset, what, records: None, bytes });
            end.damaged.push(path);
        }
        if let Some(before) = segments.last() {
            found.follows(before)?;
        }
        segments.push(found);
    }
    let mut walk = Walk {
        segments: &segments,
        identity,
        from: from.max(Lsn(1)),
        next: from.max(Lsn(1)),
        joined: false,
        on_damage,
        end,
        unproven: VecDeque::new(),
    };
    walk.run(&mut Visitor { visit, relief }).await?;
    let end = walk.finish(newest);
    if on_damage == OnDamage::Refuse && !end.losses.is_empty() {
        return Err(refusal(&end.losses, end.records));
    }
    Ok(end)
}

/// A segment as found on the disk, its header checked.
pub(super) struct Found<F> {
    pub(super) path: PathBuf,
    pub(super) file: F,
    pub(super) len: u64,
    header: SegmentHeader,
    pub(super) salt: u64,
    /// Number of the first record, if the first batch has a good header.
    first: Option<Lsn>,
}

impl<F: File> Found<F> {
    async fn open<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        identity: LogIdentity,
        id: u64,
    ) -> Result<Found<F>> {
        let path = dir.join(super::format::segment_name(id));
        let file = disk.open(&path, OpenMode::Read).await?;
        let len = file.len().await?;
        let bytes = file.read_at(0, 2 * SEGMENT_HEADER_SIZE).await?;
        let header = SegmentHeader::decode(&bytes)
            .map_err(|Invalid(what)| Error::corrupt(&path, 0, what))?;
        if header.version > VERSION {
            return Err(Error::Mismatch {
                path,
                what: format!("version {} of the log format; this is {VERSION}", header.version),
                remedy: "open it with the newer release that wrote it",
            });
        }
        if header.identity() != identity {
            return Err(Error::Mismatch {
                path,
                what: format!(
                    "a log of cluster {:032x} shard {}, not of cluster {:032x} shard {}",
                    header.identity().cluster,
                    header.shard,
                    identity.cluster,
                    identity.shard
                ),
                remedy: "put the file back where it came from",
            });
        }
        if header.segment_id != id {
            let what = format!("it says that it is segment {}", header.segment_id);
            return Err(Error::corrupt(path, 16, what));
        }
        let salt = identity.segment_salt(id, header.life);
        let offset = SEGMENT_HEADER_SIZE;
        let first = bytes
            .get(offset..)
            .and_then(|bytes| BatchHeader::decode(bytes, salt, offset as u64).ok())
            .map(|header| Lsn(header.first));
        Ok(Found { path, file, len, header, salt, first })
    }

    /// Whether the lives of two neighbours fit together.
    fn follows(&self, before: &Found<F>) -> Result<()> {
        let (new, old) = (&self.header, &before.header);
        let same = (new.life_after, new.life_first) == (old.life_after, old.life_first);
        let later = new.life_first > old.life_after && new.life_after >= old.life_after;
        if (new.life == old.life && same) || (new.life > old.life && later) {
            return Ok(());
        }
        let what = format!("life {} does not follow life {}", new.life, old.life);
        Err(Error::corrupt(&self.path, 24, what))
    }
}

/// The state of one replay.
struct Walk<'a, F> {
    segments: &'a [Found<F>],
    identity: LogIdentity,
    from: Lsn,
    /// The record expected next.
    next: Lsn,
    /// Whether a batch has been found yet, so that `next` is exact.
    joined: bool,
    on_damage: OnDamage,
    end: ReplayEnd,
    unproven: VecDeque<Extent>,
}

/// Whoever is shown the records.
struct Visitor<'a> {
    visit: &'a mut dyn FnMut(Lsn, ReplayItem<'_>),
    relief: &'a mut dyn FnMut() -> Option<Relief>,
}

/// Where the walk is.
#[derive(Clone, Copy)]
struct Place {
    segment: usize,
    offset: u64,
}

impl Place {
    /// The first batch of a segment.
    fn start_of(segment: usize) -> Place {
        Place { segment, offset: SEGMENT_HEADER_SIZE as u64 }
    }
}

/// How the walk through one segment ended.
struct Stop {
    offset: u64,
    why: Invalid,
    /// Whether a batch of this life was begun there.
    begun: bool,
}

impl<F: File> Walk<'_, F> {
    async fn run(&mut self, visitor: &mut Visitor<'_>) -> Result<()> {
        let start = self.first_needed();
        for found in &self.segments[..start] {
            // All its records are before `from`.
            self.end.segments.push(OldSegment { path: found.path.clone(), last: Lsn::ZERO });
        }
        let mut index = start;
        while index < self.segments.len() {
            index = self.walk_life(index, visitor).await?;
        }
        Ok(())
    }

    /// Index of the first segment that may hold a record from `from` on.
    fn first_needed(&self) -> usize {
        let from = self.from;
        let starts = |index: &usize| {
            let found = &self.segments[*index];
            let begins_life =
                *index == 0 || self.segments[*index - 1].header.life != found.header.life;
            found.first.is_some_and(|first| first <= from)
                || (begins_life && found.header.life_first <= from.0)
        };
        (0..self.segments.len()).rev().find(starts).unwrap_or(0)
    }

    /// Walks the segments of one life from `index` on; gives the index after them.
    async fn walk_life(&mut self, index: usize, visitor: &mut Visitor<'_>) -> Result<usize> {
        let header = self.segments[index].header;
        let life = header.life;
        self.end.clean = false;
        let after_life = self.segments[index..]
            .iter()
            .position(|found| found.header.life != life)
            .map_or(self.segments.len(), |count| index + count);
        let whole = index == 0 || self.segments[index - 1].header.life != life;
        if whole && self.next.0 <= header.life_first {
            if header.life_after >= self.next.0 {
                self.note_missing(index, header.life_after);
            }
            // Nothing was logged between the lives: the numbers in between were skipped.
            self.next = Lsn(header.life_first);
        }
        self.joined = self.joined && whole && self.next.0 == header.life_first;
        // What the next life found here; the rest is void.
        let bound = self.segments.get(after_life).map(|found| Lsn(found.header.life_after));
        let mut at = Place::start_of(index);
        loop {
            let before = (self.joined, self.next);
            let stop = self.walk_segment(at, bound, visitor).await?;
            // A segment without valid records is free for use at once.
            let last = if (self.joined, self.next) == before { 0 } else { self.next.0 - 1 };
            self.leave(at.segment, Lsn(last));
            // A segment that was given its name but could not be opened was never written to:
            // the log went on in the one after it.
            let goes_on = self.segments[at.segment + 1..after_life]
                .iter()
                .position(|found| found.first == Some(self.next))
                .map(|between| Place::start_of(at.segment + 1 + between));
            let next = match goes_on {
                Some(next) => Some(next),
                None => self.judge(at.segment, after_life, &stop).await?,
            };
            let passed = next.map_or(after_life, |next| next.segment);
            for index in at.segment + 1..passed {
                self.leave(index, Lsn::ZERO);
            }
            let Some(next) = next else { break };
            at = next;
        }
        self.end.life = life;
        if bound.is_some() {
            // The next life began after it had made all this durable.
            self.unproven.clear();
            self.end.torn = None;
        }
        Ok(after_life)
    }

    /// Notes up to which record a segment is needed. It may be left twice, with damage in between.
    fn leave(&mut self, at: usize, last: Lsn) {
        let path = &self.segments[at].path;
        match self.end.segments.last_mut() {
            Some(left) if left.path == *path => left.last = left.last.max(last),
            _ => self.end.segments.push(OldSegment { path: path.clone(), last }),
        }
    }

    /// Visits the batches of one segment from `at` up to the first that is not the next of the log.
    async fn walk_segment(
        &mut self,
        at: Place,
        bound: Option<Lsn>,
        visitor: &mut Visitor<'_>,
    ) -> Result<Stop> {
        let found = &self.segments[at.segment];
        let record_salt = self.identity.record_salt(found.header.life);
        let mut window = Window::new(&found.file, at.offset, found.len);
        let mut offset = at.offset;
        let stop = loop {
            let stop = |why, begun| Stop { offset, why, begun };
            let bytes = window.get(offset, BATCH_HEADER_SIZE).await?;
            let header = match BatchHeader::decode(bytes, found.salt, offset) {
                Ok(header) => header,
                Err(why) => break stop(why, false),
            };
            let joins =
                if self.joined { header.first == self.next.0 } else { header.first <= self.next.0 };
            if !joins {
                break stop(Invalid("records are missing before this batch"), true);
            }
            if bound.is_some_and(|bound| header.first > bound.0) {
                break stop(Invalid("void: a later life began before it"), false);
            }
            let size = header.size();
            let Some(records) = window
                .get(offset, size)
                .await?
                .get(BATCH_HEADER_SIZE..BATCH_HEADER_SIZE + header.records_size())
            else {
                break stop(Invalid("batch cut off"), true);
            };
            if let Err(why) = check(records, &header, record_salt) {
                break stop(why, true);
            }
            self.joined = true;
            self.next = header.next();
            for item in Records::trusted(records, Lsn(header.first)) {
                let (lsn, item) = item.expect("the batch has just been checked");
                self.end.clean = item == ReplayItem::Control(Control::Close);
                if lsn >= self.from {
                    self.end.records += 1;
                    if self.is_shown(&item) {
                        (visitor.visit)(lsn, item);
                    }
                }
            }
            self.note_durable(at.segment, offset, &header);
            offset += size as u64;
            while let Some(relief) = (visitor.relief)() {
                relief.await?;
            }
        };
        self.end.bytes += offset;
        Ok(stop)
    }

    /// Whether the caller is to see an item: see [`replay_with`].
    fn is_shown(&self, item: &ReplayItem<'_>) -> bool {
        self.end.losses.is_empty()
            || (self.on_damage == OnDamage::Accept
                && !matches!(item, ReplayItem::Control(Control::Seen { .. })))
    }

    /// Keeps the list of extents that no batch so far has declared durable.
    fn note_durable(&mut self, at: usize, offset: u64, header: &BatchHeader) {
        while self.unproven.front().is_some_and(|extent| extent.last.0 <= header.synced) {
            self.unproven.pop_front();
        }
        if header.count > 0 {
            self.unproven.push_back(Extent {
                path: self.segments[at].path.clone(),
                offset,
                size: u64::from(header.size),
                last: Lsn(header.next().0 - 1),
            });
        }
    }

    /// Decides whether the life ends where its walk stopped, or whether a hole follows. Behind a
    /// hole gives the place where the log goes on, if it does.
    async fn judge(&mut self, at: usize, after_life: usize, stop: &Stop) -> Result<Option<Place>> {
        let Some(claim) = self.claim(at, after_life, stop).await? else { return Ok(None) };
        let life = self.segments[at].header.life;
        let record_salt = self.identity.record_salt(life);
        // Later batches that prove nothing and do not join are void, as behind any torn one.
        let first = if self.joined { self.next.0 } else { 1 };
        let wanted = first..=claim.synced + 1;
        let mut place = None;
        for (index, found) in self.segments.iter().enumerate().take(after_life).skip(at) {
            let start = if index == at { stop.offset } else { SEGMENT_HEADER_SIZE as u64 };
            if let Some((offset, first)) =
                find_batch(found, start, wanted.clone(), record_salt).await?
            {
                place = Some((Place { segment: index, offset }, first));
                break;
            }
        }
        let next = place.map_or(Lsn(claim.synced + 1), |(_, first)| first);
        let missing = self.next.max(self.from);
        if next > missing {
            let until = place.map_or(Place::start_of(after_life), |(place, _)| place);
            self.note_damage(at, until, stop, missing, Lsn(next.0 - 1), &claim);
        }
        if self.joined || next > self.next {
            (self.joined, self.next) = (true, next);
        }
        self.end.clean = false;
        Ok(place.map(|(place, _)| place))
    }

    /// What proves that more was durable than the walk has found; notes a torn tail if nothing does.
    async fn claim(&mut self, at: usize, after_life: usize, stop: &Stop) -> Result<Option<Claim>> {
        if let Some(next_life) = self.segments.get(after_life) {
            let synced = next_life.header.life_after;
            let by = next_life.path.file_name().unwrap_or_default().display().to_string();
            // Otherwise: what lies beyond has been void since the next life began.
            return Ok((synced >= self.next.0).then_some(Claim { synced, by, offset: 32 }));
        }
        let mut begun = stop.begun;
        let mut furthest: Option<Claim> = None;
        for index in at..after_life {
            let found = &self.segments[index];
            let start = if index == at { stop.offset } else { SEGMENT_HEADER_SIZE as u64 };
            let (claim, batches) = find_claim(found, start, self.next).await?;
            if claim.as_ref().map(|it| it.synced) > furthest.as_ref().map(|it| it.synced) {
                furthest = claim;
            }
            begun |= batches > 0;
        }
        if begun && furthest.is_none() {
            let path = self.segments[at].path.clone();
            self.end.torn = Some(TornTail { path, offset: stop.offset });
            self.end.clean = false;
        }
        Ok(furthest)
    }

    /// Takes note that records `first` to `last` are missing between the stop and `until`.
    fn note_damage(
        &mut self,
        at: usize,
        until: Place,
        stop: &Stop,
        first: Lsn,
        last: Lsn,
        claim: &Claim,
    ) {
        let Claim { synced, by, offset } = claim;
        let what = format!(
            "{}; records {} to {synced} were durable once ({by} says so at offset {offset})",
            stop.why.0, first.0,
        );
        let path = self.segments[at].path.clone();
        let mut bytes = 0;
        for index in at..self.segments.len().min(until.segment + 1) {
            let from = if index == at { stop.offset } else { SEGMENT_HEADER_SIZE as u64 };
            let is_last = index == until.segment;
            let to = if is_last { until.offset } else { self.segments[index].len };
            bytes += to.saturating_sub(from);
            let is_noted = self.end.damaged.contains(&self.segments[index].path);
            if (!is_last || to > from) && !is_noted {
                self.end.damaged.push(self.segments[index].path.clone());
            }
        }
        self.end.losses.push(Loss {
            path,
            offset: stop.offset,
            what,
            records: Some((first, last)),
            bytes,
        });
    }

    /// Takes note that the segments of the lives before this one are missing.
    fn note_missing(&mut self, index: usize, last: u64) {
        let path = self.segments[index].path.clone();
        let first = self.next;
        let what = format!(
            "records {} to {last}, which were durable once, lie in no segment before this one",
            first.0
        );
        self.end.losses.push(Loss {
            path,
            offset: 32,
            what,
            records: Some((first, Lsn(last))),
            bytes: 0,
        });
    }

    fn finish(self, newest: Option<u64>) -> ReplayEnd {
        let mut end = self.end;
        if let Some(newest) = newest {
            end.next_segment = newest + 1;
            end.last = Lsn(self.next.0 - 1);
            end.next = self.next.max(self.from);
        }
        end.unproven = self.unproven.into();
        if !end.losses.is_empty() {
            end.clean = false;
            // A segment that cannot be told may be of a later life; its number is not used again.
            end.life += end.damaged.len() as u64;
            end.last = end.last.max(Lsn(1));
            end.next = end.next.max(end.last.next());
            let damaged = &end.damaged;
            end.segments.retain(|old| !damaged.contains(&old.path));
            // Nothing is written to before all that could be read is in tables.
            end.segments.iter_mut().for_each(|old| old.last = end.last);
        }
        end
    }
}

/// Checks all records of a batch.
pub(super) fn check(
    records: &[u8],
    header: &BatchHeader,
    record_salt: u64,
) -> std::result::Result<(), Invalid> {
    let mut count = 0;
    for item in Records::checked(records, Lsn(header.first), record_salt) {
        item?;
        count += 1;
    }
    if count == header.count { Ok(()) } else { Err(Invalid("batch header counts other records")) }
}

type Read = Pin<Box<dyn Future<Output = Result<AlignedBuf>>>>;

/// A sliding window over a file, filled by large reads ahead of need.
pub(super) struct Window<'a, F> {
    file: &'a F,
    end: u64,
    ahead: FuturesOrdered<Read>,
    ask_next: u64,
    bytes: AlignedBuf,
    base: u64,
}

impl<F: File> Window<'_, F> {
    /// Reading starts at `start`, a multiple of every alignment or of the file's own.
    pub(super) fn new(file: &F, start: u64, end: u64) -> Window<'_, F> {
        // Rounded down, because direct reads start at multiples of the file's alignment.
        let base = start / SEGMENT_HEADER_SIZE as u64 * SEGMENT_HEADER_SIZE as u64;
        let bytes = AlignedBuf::with_capacity(0);
        Window { file, end, ahead: FuturesOrdered::new(), ask_next: base, bytes, base }
    }

    /// The bytes at `offset`: `size` of them, or fewer at the file's end. Offsets never go back.
    pub(super) async fn get(&mut self, offset: u64, size: usize) -> Result<&[u8]> {
        while self.bytes.len() < self.skip(offset) + size {
            while self.ahead.len() < READS_AHEAD && self.ask_next < self.end {
                self.ahead.push_back(Box::pin(self.file.read_at(self.ask_next, READ_SIZE)));
                self.ask_next += READ_SIZE as u64;
            }
            let Some(read) = self.ahead.next().await else { break };
            let read = read?;
            self.forget(self.skip(offset).min(self.bytes.len()));
            self.bytes.extend_from_slice(&read);
            if read.len() < READ_SIZE {
                // The end of the file; what was asked for beyond it is empty.
                self.ahead = FuturesOrdered::new();
                self.ask_next = self.end;
            }
        }
        let skip = self.skip(offset);
        let end = self.bytes.len().min(skip + size);
        Ok(self.bytes.get(skip..end).unwrap_or(&[]))
    }

    fn skip(&self, offset: u64) -> usize {
        usize::try_from(offset - self.base).expect("the window follows the offsets")
    }

    /// Drops the first `count` bytes of the window.
    fn forget(&mut self, count: usize) {
        if count > 0 {
            self.bytes.copy_within(count.., 0);
            self.bytes.truncate(self.bytes.len() - count);
            self.base += count as u64;
        }
    }
}
