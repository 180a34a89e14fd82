//! What to compact next: pure, from a [`Layout`] to at most one [`Step`].
//!
//! # The policy: clock-hand lazy leveling
//! A flush adds an upper table. The **last level** holds each key's oldest state once, in tables
//! of about `table_size` that do not overlap. A **hand** walks round the ring: a step takes the
//! next last-level table, merges *every* upper table's slice of that token range into it, writes
//! the range anew and declares the range consumed in the upper tables. So each step is small,
//! wherever the hand has just been only the last level is left, and space never doubles.
//!
//! # Why: its cost
//! Let `r` be upper bytes as a share of the last level. The hand lets a place gather slices for
//! one round, so the average is half of what it finds: a round takes in `2 r` of the data and
//! writes all of it once. Write amplification is `1 (flush) + 1 / (2 r)`, space is `1 + r`.
//! The simulation in the tests, with real keys, random overwrites, and 80 memtables of data (as
//! 5 GiB with memtables of 64 MiB), gives for flush and compaction together:
//!
//! | `space_target` | 0.20 | 0.25 | 0.30 | 0.35 | 0.50 |
//! |---|---|---|---|---|---|
//! | bytes written a byte | 3.45 | 2.97 | 2.64 | 2.42 | 2.00 |
//! | most space, a step's output included | 1.25 | 1.30 | 1.33 | 1.40 | 1.55 |
//!
//! Loading new keys writes 2.67 bytes a byte. At most 49 upper tables meet at a token, and half
//! of that on average; bounding them by 32 costs 3.11 bytes a byte, by 16 costs 3.58.
//!
//! Leveled compaction with a fanout of 10 writes each byte several times a level; plain tiering
//! needs space for a whole copy. "Lazy leveling" is from Dayan and Idreos, "Dostoevsky" (2018).
//!
//! # Tiers
//! A shard of many memtables would gather too many upper tables at a token (`2 r x data /
//! memtable`). Where more than `runs_max` meet, the `tier_width` adjacent ones with the fewest
//! bytes are merged into one, only over the stretch of the ring where the bound is broken.
//!
//! On a disk that is nearly full the plan looks for what fits: `plan/room.rs`.
//!
//! Invariant: a step's inputs are all the live slices it names, in one token range; a step into
//! the last level names every upper table with a live token in the range. Off both paths: the
//! compactor asks after each flush and step.

use crate::model::{Instant, Token, TokenRange, WallMicros};
use crate::options::Options;
use crate::sstable::TableId;
use crate::tables::arcs::Arcs;
use crate::tables::edit::{AddedTable, Consumed, Level, TableSetEdit};
use crate::tables::layout::{Entry, Layout, to_f64};

/// How compaction trades writes, space, and reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanOptions {
    /// Partitions on the ring are `2^partition_bits`; tables are cut where one begins.
    pub partition_bits: u32,
    /// Bytes aimed at for a table, 64 MiB by default. Larger: fewer files and filters; smaller:
    /// shorter steps and less space in flight.
    pub table_size: u64,
    /// Bytes of a memtable: what a flush adds.
    pub memtable_size: u64,
    /// Upper bytes allowed, as a share of the last level's, 0.30 by default. Space is one plus
    /// this, write amplification about one plus half its inverse.
    pub space_target: f64,
    /// Upper tables allowed at one token, 64 by default. Each costs a read one filter probe.
    pub runs_max: usize,
    /// Upper tables merged into one where there are too many, 12 by default.
    pub tier_width: usize,
    /// In idle time the hand sets out when upper bytes are above this share, 0.15 by default. It
    /// bounds what a store that is written in bursts pays: one rewrite each time so much came in.
    pub settle_start: f64,
    /// Once set out, it goes on until upper bytes are below this share, 0.02 by default.
    pub settle_target: f64,
    /// A last-level table is rewritten when this share of its records has expired since it was
    /// written, 0.5 by default.
    pub expired_target: f64,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            partition_bits: 12,
            table_size: 64 << 20,
            memtable_size: 64 << 20,
            space_target: 0.30,
            runs_max: 64,
            tier_width: 12,
            settle_start: 0.15,
            settle_target: 0.02,
            expired_target: 0.5,
        }
    }
}

impl PlanOptions {
    /// The part of a shard's options that planning needs.
    #[must_use]
    pub fn of(options: &Options) -> PlanOptions {
        PlanOptions {
            partition_bits: options.partition_bits,
            table_size: options.compaction.table_size,
            memtable_size: to_u64_len(options.memtable_size),
            space_target: options.compaction.space_target,
            runs_max: options.compaction.runs_max,
            ..PlanOptions::default()
        }
    }
}

fn to_u64_len(size: usize) -> u64 {
    u64::try_from(size).expect("a length fits 64 bits")
}

/// How eager to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Clients are at work: only what the targets ask for.
    Busy,
    /// Nobody is waiting: set out to bring the upper tables down if there are enough of them.
    Idle,
    /// Nobody is waiting, and the hand has set out: go on.
    Settle,
    /// Until there is no upper table: an operator asked for it.
    Drain,
    /// The disk is nearly full: the same, beginning where most is given back.
    Relieve,
}

/// One compaction: small, and atomic by one edit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The tokens it rewrites.
    pub range: TokenRange,
    /// Upper tables whose live slice of the range it merges, newest first.
    pub upper: Vec<TableId>,
    /// Last-level tables it replaces, all inside the range.
    pub last: Vec<TableId>,
    /// Where its tables go.
    pub into: Level,
    /// Bytes it reads, estimated.
    pub bytes: u64,
    /// Where the hand stands afterwards, if the step moves it.
    pub hand: Option<Token>,
}

impl Step {
    /// Whether everything older than its inputs is among its inputs, so that a tombstone has
    /// nothing left to hide.
    #[must_use]
    pub fn is_bottom(&self) -> bool {
        self.into == Level::Last
    }

    /// The edit that replaces the inputs by `outputs`, on the layout as it is now: flushes may
    /// have added to it since the plan was made. `read` says how many bytes of each upper table
    /// the step has read.
    #[must_use]
    pub fn edit(
        &self,
        layout: &Layout,
        outputs: Vec<AddedTable>,
        read: &dyn Fn(TableId) -> u64,
    ) -> TableSetEdit {
        let mut edit = TableSetEdit {
            added: outputs,
            removed: self.last.clone(),
            hand: self.hand,
            ..TableSetEdit::default()
        };
        for entry in layout.upper().iter().filter(|entry| self.upper.contains(&entry.id())) {
            let mut left = entry.live.clone();
            left.subtract(&self.range);
            if left.is_empty() {
                edit.removed.push(entry.id());
            } else {
                let bytes = read(entry.id());
                edit.consumed.push(Consumed { table: entry.id(), range: self.range, bytes });
            }
        }
        edit
    }
}

/// A table in a range where it could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The table.
    pub table: TableId,
    /// The range of the step that failed for it.
    pub range: TokenRange,
    /// When a step may try it again.
    pub until: Instant,
}

/// What compaction leaves alone for now. Reads of what is whole go on, newer tables go on being
/// merged among themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Avoid {
    /// The places.
    pub places: Vec<Place>,
    /// Bytes that a step may write before it gives any back: no step begins that needs more.
    pub room: u64,
}

impl Default for Avoid {
    /// Nothing.
    fn default() -> Avoid {
        Avoid { places: Vec::new(), room: u64::MAX }
    }
}

impl Avoid {
    /// Whether this table cannot be an input of a step over this range.
    fn holds(&self, table: TableId, range: &TokenRange) -> bool {
        self.places.iter().any(|place| place.table == table && place.range.overlaps(range))
    }

    pub(super) fn forbids(&self, step: &Step) -> bool {
        !self.places.is_empty()
            && step.upper.iter().chain(&step.last).any(|&table| self.holds(table, &step.range))
    }

    /// Whether a step may begin: its inputs can be read, and what it leaves of them fits.
    pub(super) fn allows(&self, layout: &Layout, step: &Step, now: WallMicros) -> bool {
        !self.forbids(step) && room::output_of(layout, step, now) <= self.room
    }
}

/// How far the layout is from its targets.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Pressure {
    /// Upper bytes, and for each tombstone among them the record that it hides.
    pub upper: f64,
    /// Bytes of the last level.
    pub last: f64,
    /// Upper bytes from which the hand moves.
    pub allowed: f64,
    /// Bytes of a memtable: what a flush adds at once.
    pub memtable: f64,
}

impl Pressure {
    /// The pressure of a layout.
    #[must_use]
    pub fn of(layout: &Layout, options: &PlanOptions) -> Pressure {
        let sum = |entries: &[std::rc::Rc<Entry>], of: fn(&Entry) -> f64| -> f64 {
            entries.iter().map(|entry| of(entry)).sum()
        };
        let last = sum(layout.last(), |entry| to_f64(entry.live_bytes));
        let records = sum(layout.last(), |entry| to_f64(entry.summary.record_count));
        let hidden = sum(layout.upper(), Entry::live_tombstones).min(records);
        let hidden_bytes = if records > 0.0 { hidden * last / records } else { 0.0 };
        Pressure {
            upper: sum(layout.upper(), |entry| to_f64(entry.live_bytes)) + hidden_bytes,
            last,
            // A store of a few memtables may keep them all: space counts only beyond that.
            allowed: (options.space_target * last).max(4.0 * to_f64(options.memtable_size)),
            memtable: to_f64(options.memtable_size),
        }
    }

    /// The pressure that compaction can do something about: without what lies where it cannot go.
    #[must_use]
    pub fn around(layout: &Layout, options: &PlanOptions, avoid: &Avoid) -> Pressure {
        let mut pressure = Pressure::of(layout, options);
        let mut stuck = Vec::new();
        for Place { range, .. } in &avoid.places {
            if !stuck.contains(range) {
                stuck.push(*range);
                pressure.upper -= layout.upper_within(range);
            }
        }
        pressure.upper = pressure.upper.max(0.0);
        pressure
    }

    /// Bytes to be written until the upper tables are within what is allowed.
    #[must_use]
    pub fn debt(&self) -> f64 {
        let excess = self.upper - self.allowed;
        // The hand finds twice the average: one upper byte costs `last / (2 upper)` rewritten.
        if excess <= 0.0 { 0.0 } else { excess * (1.0 + self.last / (2.0 * self.upper)) }
    }

    /// Bytes written for a byte of new records in the long run, the flush included.
    #[must_use]
    pub fn write_amplification(&self) -> f64 {
        if self.allowed > 0.0 { 2.0 + self.last / (2.0 * self.allowed) } else { 2.0 }
    }
}

/// The next step, if one is due. Costs O(tables).
#[must_use]
pub fn plan(layout: &Layout, options: &PlanOptions, now: WallMicros, mode: Mode) -> Option<Step> {
    plan_around(layout, options, now, mode, &Avoid::default())
}

/// [`plan`], without steps that would read what cannot be read, or whose output would not fit.
#[must_use]
pub fn plan_around(
    layout: &Layout,
    options: &PlanOptions,
    now: WallMicros,
    mode: Mode,
    avoid: &Avoid,
) -> Option<Step> {
    if mode == Mode::Relieve
        && let Some(step) = room::relief_step(layout, options, now, avoid)
    {
        return Some(step);
    }
    if let Some(step) = tier_step(layout, options, avoid) {
        return Some(step);
    }
    let pressure = Pressure::around(layout, options, avoid);
    let hand_is_due = match mode {
        Mode::Busy => pressure.upper > pressure.allowed,
        Mode::Idle => pressure.upper > options.settle_start * pressure.last,
        Mode::Settle => pressure.upper > options.settle_target * pressure.last,
        Mode::Drain => !layout.upper().is_empty(),
        // All of them were looked at.
        Mode::Relieve => false,
    };
    if hand_is_due && let Some(step) = hand_step(layout, options, now, avoid) {
        return Some(step);
    }
    expiry_step(layout, options, now, avoid)
}

/// The hand's next step with something to merge.
fn hand_step(
    layout: &Layout,
    options: &PlanOptions,
    now: WallMicros,
    avoid: &Avoid,
) -> Option<Step> {
    hand_steps(layout, options).find(|step| avoid.allows(layout, step, now))
}

/// The hand's steps, at most once round the ring from where it stands; ranges without upper bytes
/// are passed over.
fn hand_steps<'a>(layout: &'a Layout, options: &'a PlanOptions) -> impl Iterator<Item = Step> + 'a {
    let mut start = layout.hand;
    let round = (0..layout.last().len() + 2 * layout.upper().len() + 3).map(move |_| {
        let range = step_range(layout, options, start);
        start = Token(range.last.0.wrapping_add(1));
        step_over(layout, range, Some(start))
    });
    round.filter(|step| !step.upper.is_empty())
}

/// A step that merges everything in a range into the last level.
pub(super) fn step_over(layout: &Layout, range: TokenRange, hand: Option<Token>) -> Step {
    let upper: Vec<_> = layout.upper().iter().filter(|entry| entry.live.overlaps(&range)).collect();
    let last: Vec<_> =
        layout.last().iter().filter(|entry| entry.summary.span.overlaps(&range)).collect();
    let bytes = upper.iter().map(|entry| entry.bytes_within(&range)).sum::<f64>()
        + last.iter().map(|entry| to_f64(entry.summary.size)).sum::<f64>();
    Step {
        range,
        upper: upper.iter().map(|entry| entry.id()).collect(),
        last: last.iter().map(|entry| entry.id()).collect(),
        into: Level::Last,
        bytes: to_u64(bytes),
        hand,
    }
}

/// The range of a step that starts at `start`: a last-level table or a few small ones, with the
/// empty stretch up to the next, never cutting a last-level table.
fn step_range(layout: &Layout, options: &PlanOptions, start: Token) -> TokenRange {
    let target = to_f64(options.table_size);
    let last = layout.last();
    let mut next = last.partition_point(|entry| entry.summary.span.last < start);
    let straddling = last.get(next).is_some_and(|entry| entry.summary.span.first < start);
    let first = if straddling { last[next].summary.span.first } else { start };
    // The end of what is taken so far; none yet means that only empty ring lies before `next`.
    let mut taken: Option<Token> = None;
    let mut bytes = 0.0;
    loop {
        let border = border_before(layout, options, next);
        let from = match taken {
            None => Some(first),
            Some(Token(u64::MAX)) => None,
            Some(token) => Some(Token(token.0 + 1)),
        };
        // The empty stretch before the next table: new keys for which no table stands there yet.
        if let Some(from) = from.filter(|&from| from <= border) {
            let gap = TokenRange { first: from, last: border };
            let weight = layout.upper_within(&gap);
            if weight > 2.0 * target {
                let end = taken.map(|token| end_of_partition(token, options).min(border));
                return TokenRange {
                    first,
                    last: end.unwrap_or(cut(&gap, target / weight, options)),
                };
            }
            bytes += weight;
            taken = Some(border);
        }
        let Some(entry) = last.get(next) else {
            return TokenRange { first, last: Token::MAX };
        };
        let with_next = bytes + to_f64(entry.summary.size);
        if let Some(end) = taken.filter(|_| bytes > 0.25 * target && with_next > 1.5 * target) {
            return TokenRange { first, last: end };
        }
        bytes = with_next;
        taken = Some(entry.summary.span.last);
        next += 1;
    }
}

/// The last token before last-level table `next`, at a partition's end where its neighbour allows.
fn border_before(layout: &Layout, options: &PlanOptions, next: usize) -> Token {
    let Some(entry) = layout.last().get(next) else { return Token::MAX };
    let first = entry.summary.span.first;
    let partition = first.partition(options.partition_bits).range(options.partition_bits).first;
    let before = next.checked_sub(1).map(|place| layout.last()[place].summary.span.last);
    let start = if before.is_none_or(|before| before < partition) { partition } else { first };
    Token(start.0.saturating_sub(1))
}

fn end_of_partition(token: Token, options: &PlanOptions) -> Token {
    token.partition(options.partition_bits).range(options.partition_bits).last
}

/// The end of a `share` of a range, rounded up to a partition's end.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a rough cut of the range; the result is clamped to it"
)]
fn cut(range: &TokenRange, share: f64, options: &PlanOptions) -> Token {
    let width = (range.last.0 - range.first.0) as f64 * share;
    let token = Token(range.first.0.saturating_add(width as u64));
    end_of_partition(token, options).min(range.last)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate, not negative"
)]
fn to_u64(bytes: f64) -> u64 {
    bytes as u64
}

/// Merges a few upper tables into one where too many meet.
fn tier_step(layout: &Layout, options: &PlanOptions, avoid: &Avoid) -> Option<Step> {
    let arcs = layout.arcs();
    if arcs.depth_max() <= options.runs_max {
        return None;
    }
    let depth = |arc: usize| arcs.tables_of(arc).len();
    let deepest = (0..arcs.len()).find(|&arc| depth(arc) == arcs.depth_max())?;
    let step = tier_step_at(layout, options, avoid, deepest);
    if step.is_some() || (avoid.places.is_empty() && avoid.room == u64::MAX) {
        return step;
    }
    let deep = deepest_first(arcs, options.runs_max + 1);
    deep.into_iter().find_map(|arc| tier_step_at(layout, options, avoid, arc))
}

/// The arcs in which at least so many upper tables meet, those with most of them first.
fn deepest_first(arcs: &Arcs, depth_min: usize) -> Vec<usize> {
    let depth = |arc: usize| arcs.tables_of(arc).len();
    let mut deep: Vec<usize> = (0..arcs.len()).filter(|&arc| depth(arc) >= depth_min).collect();
    deep.sort_by_key(|&arc| std::cmp::Reverse(depth(arc)));
    deep
}

/// Merges a few upper tables from arc `start` on.
fn tier_step_at(
    layout: &Layout,
    options: &PlanOptions,
    avoid: &Avoid,
    start: usize,
) -> Option<Step> {
    let arcs = layout.arcs();
    let depth = |arc: usize| arcs.tables_of(arc).len();
    let entry = |place: u32| &layout.upper()[usize::try_from(place).expect("64-bit host")];
    let here: Vec<u32> = arcs.tables_of(start).iter().map(|table| table.place).collect();
    let density = |place: &u32| to_f64(entry(*place).live_bytes) / entry(*place).live.width();
    // Of equally light windows the oldest: merged tables gather at the old end.
    let width = options.tier_width.min(here.len()).max(2);
    let weight = |window: &[u32]| window.iter().map(density).sum::<f64>();
    let is_whole = |window: &[u32], arc: usize| {
        let range = arcs.range(arc);
        avoid.places.is_empty() || !window.iter().any(|&at| avoid.holds(entry(at).id(), &range))
    };
    let lightest = |width: usize| {
        let windows = here.windows(width).rev().filter(|window| is_whole(window, start));
        windows.min_by(|a, b| weight(a).total_cmp(&weight(b)))
    };
    // Fewer than `width` only beside a table that cannot be read.
    let least = if avoid.places.is_empty() { width } else { 2 };
    let chosen = (least..=width).rev().find_map(lightest)?;

    let holds_all = |arc: usize| {
        chosen.iter().all(|place| arcs.tables_of(arc).iter().any(|table| table.place == *place))
    };
    let mut range = arcs.range(start);
    let bytes_of =
        |range: &TokenRange| chosen.iter().map(|p| entry(*p).bytes_within(range)).sum::<f64>();
    let limit = 2.0 * to_f64(options.table_size);
    for arc in start + 1..arcs.len() {
        let merges_on = depth(arc) * 8 >= options.runs_max * 7 && holds_all(arc);
        if !merges_on || !is_whole(chosen, arc) || bytes_of(&range) >= limit {
            break;
        }
        range.last = arcs.range(arc).last;
    }
    let most = limit.min(to_f64(avoid.room));
    if bytes_of(&range) > (2.0 * limit).min(to_f64(avoid.room)) {
        range.last = cut(&range, most / bytes_of(&range), options);
    }
    if bytes_of(&range) > to_f64(avoid.room) {
        return None;
    }
    let order = chosen.iter().map(|place| match entry(*place).level {
        Level::Upper { order } => order,
        Level::Last => unreachable!("arcs hold upper tables"),
    });
    Some(Step {
        range,
        upper: chosen.iter().map(|place| entry(*place).id()).collect(),
        last: Vec::new(),
        into: Level::Upper { order: order.max()? },
        bytes: to_u64(bytes_of(&range)),
        hand: None,
    })
}

/// Rewrites a last-level table much of which has expired since it was written.
fn expiry_step(
    layout: &Layout,
    options: &PlanOptions,
    now: WallMicros,
    avoid: &Avoid,
) -> Option<Step> {
    let expired = |entry: &Entry| expired_share(entry, now);
    let worst = layout
        .last()
        .iter()
        .filter(|entry| !avoid.holds(entry.id(), &entry.summary.span))
        .max_by(|a, b| expired(a).total_cmp(&expired(b)))?;
    if expired(worst) < options.expired_target {
        return None;
    }
    let step = step_over(layout, worst.summary.span, None);
    avoid.allows(layout, &step, now).then_some(step)
}

/// The share of a table's records that has expired since it was written.
fn expired_share(entry: &Entry, now: WallMicros) -> f64 {
    let summary = &entry.summary;
    // What had expired before it was written is still there for a reason: it may not go yet.
    let from = to_f64(summary.min_expiry_ms.max(summary.written_ms));
    let (to, now) = (to_f64(summary.max_expiry_ms), to_f64(now.as_millis()));
    if summary.expiring_count == 0 || now <= from || to <= to_f64(summary.written_ms) {
        return 0.0;
    }
    let passed = if now >= to { 1.0 } else { (now - from) / (to - from) };
    passed * to_f64(summary.expiring_count) / to_f64(summary.record_count.max(1))
}

/// Where a compaction's output is cut into tables.
#[derive(Clone, Copy, Debug)]
pub struct Cutter {
    partition_bits: u32,
    table_size: u64,
    previous: Option<Token>,
    /// Bytes still to come, estimated.
    ahead: u64,
}

impl Cutter {
    /// For an output of about `expected` bytes.
    #[must_use]
    pub fn new(partition_bits: u32, table_size: u64, expected: u64) -> Cutter {
        Cutter { partition_bits, table_size, previous: None, ahead: expected }
    }

    /// Whether a new table starts with this record, after `written` bytes in the current one.
    /// `size` is the record's. At a partition's start where possible; never between equal tokens.
    pub fn starts_table(&mut self, token: Token, size: u64, written: u64) -> bool {
        let previous = self.previous.replace(token);
        let ahead = self.ahead;
        self.ahead = self.ahead.saturating_sub(size);
        let Some(previous) = previous.filter(|&previous| previous != token) else { return false };
        let border =
            previous.partition(self.partition_bits) != token.partition(self.partition_bits);
        let full = written >= self.table_size && (border || written >= self.table_size * 2);
        // A small rest is better off in this table than in one of its own.
        full && (ahead >= self.table_size / 3 || written >= self.table_size * 3)
    }
}

mod room;
#[cfg(test)]
mod tests;
