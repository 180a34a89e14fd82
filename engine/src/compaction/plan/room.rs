//! Planning on a disk that is nearly full: no step begins whose output does not fit, and the one
//! that gives back most goes first.
//!
//! A step writes its output before it can give its inputs back. So where the free bytes do not
//! hold the output of the hand's next step, a smaller one elsewhere may still make room for it:
//! over tombstones, or expired records, of which little is written; or over a narrower range; or
//! among upper tables alone, which can be cut anywhere.
//!
//! Invariant: each choice leaves less to choose from, so it ends: a step into the last level leaves
//! no upper table in its range, one among upper tables leaves one of them.

use super::{
    Avoid, PlanOptions, Step, deepest_first, expired_share, hand_steps, step_over, to_u64,
};
use crate::model::{Token, TokenRange, WallMicros};
use crate::tables::edit::Level;
use crate::tables::layout::{Entry, Layout, to_f64};

/// How much smaller the ranges are that are tried when none of the usual size fits.
const SMALLER: [u64; 3] = [1, 4, 16];

/// A merge of upper tables is narrowed to no less than this part of a table: what it gives back must
/// be worth the tables that it makes.
const NARROWEST: u64 = 16;

/// What a step is expected to leave of what it reads, in bytes: tombstones hide a record each, and
/// what has expired goes. Overwritten records are not known beforehand, so they count as kept.
pub(super) fn output_of(layout: &Layout, step: &Step, now: WallMicros) -> u64 {
    if step.into != Level::Last {
        return step.bytes;
    }
    let hidden = hidden_in(layout, step);
    let last = last_of(layout, step);
    let expired: f64 =
        last.clone().map(|entry| expired_share(entry, now) * to_f64(entry.summary.size)).sum();
    let last: f64 = last.map(|entry| to_f64(entry.summary.size)).sum();
    to_u64(to_f64(step.bytes) - (hidden + expired).min(last))
}

fn last_of<'a>(layout: &'a Layout, step: &'a Step) -> impl Iterator<Item = &'a Entry> + Clone {
    let entries = layout.last().iter().map(AsRef::as_ref);
    entries.filter(|entry: &&Entry| step.last.contains(&entry.id()))
}

fn upper_of<'a>(layout: &'a Layout, step: &'a Step) -> impl Iterator<Item = &'a Entry> + Clone {
    let entries = layout.upper().iter().map(AsRef::as_ref);
    entries.filter(|entry: &&Entry| step.upper.contains(&entry.id()))
}

/// Bytes of the last level that the step's tombstones hide.
fn hidden_in(layout: &Layout, step: &Step) -> f64 {
    let tombstones: f64 = upper_of(layout, step)
        .map(|entry| {
            let width = entry.live.width();
            let within = entry.live.width_within(&step.range);
            if width > 0.0 { entry.live_tombstones() * within / width } else { 0.0 }
        })
        .sum();
    let last = last_of(layout, step);
    let records: f64 = last.clone().map(|entry| to_f64(entry.summary.record_count)).sum();
    let bytes: f64 = last.map(|entry| to_f64(entry.summary.size)).sum();
    if records > 0.0 { tombstones.min(records) * bytes / records } else { 0.0 }
}

/// Bytes that a step may give back, at most: what it is known not to write, and its upper bytes, if
/// all of them overwrite.
fn gain(layout: &Layout, step: &Step, now: WallMicros) -> f64 {
    let upper = upper_of(layout, step).map(|entry| entry.bytes_within(&step.range)).sum::<f64>();
    let kept = to_f64(output_of(layout, step, now));
    to_f64(step.bytes) - kept + upper.min((kept - upper).max(0.0))
}

/// Of the steps that fit, the one that gives back most.
pub(super) fn relief_step(
    layout: &Layout,
    options: &PlanOptions,
    now: WallMicros,
    avoid: &Avoid,
) -> Option<Step> {
    for part in SMALLER {
        let smaller = PlanOptions { table_size: (options.table_size / part).max(1), ..*options };
        let fitting = steps(layout, &smaller, now)
            .filter(|step| avoid.allows(layout, step, now))
            .map(|step| (gain(layout, &step, now), step));
        if let Some((_, best)) = fitting.max_by(|(a, _), (b, _)| a.total_cmp(b)) {
            return Some(best);
        }
    }
    upper_step(layout, options, avoid)
}

/// The hand's steps, and last-level tables in which something has expired.
fn steps<'a>(
    layout: &'a Layout,
    options: &'a PlanOptions,
    now: WallMicros,
) -> impl Iterator<Item = Step> + 'a {
    let expired = layout
        .last()
        .iter()
        .filter(move |entry| expired_share(entry, now) >= options.expired_target);
    hand_steps(layout, options)
        .chain(expired.map(|entry| step_over(layout, entry.summary.span, None)))
}

/// The last token of a share of a range; it need not end with a partition.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a rough cut of the range; the result is clamped to it"
)]
fn narrowed(range: &TokenRange, share: f64) -> Token {
    let width = (range.last.0 - range.first.0) as f64 * share;
    Token(range.first.0.saturating_add(width as u64)).min(range.last)
}

/// Merges all upper tables that meet where most do, in as wide a range as fits: what they overwrite
/// of one another is given back.
fn upper_step(layout: &Layout, options: &PlanOptions, avoid: &Avoid) -> Option<Step> {
    let arcs = layout.arcs();
    deepest_first(arcs, 2).into_iter().find_map(|arc| {
        let entries: Vec<&Entry> = arcs
            .tables_of(arc)
            .iter()
            .map(|table| &*layout.upper()[usize::try_from(table.place).expect("64-bit host")])
            .collect();
        let mut range = arcs.range(arc);
        let bytes_of =
            |range: &TokenRange| entries.iter().map(|entry| entry.bytes_within(range)).sum::<f64>();
        let whole = bytes_of(&range);
        if whole > to_f64(avoid.room) {
            if avoid.room < options.table_size / NARROWEST {
                return None;
            }
            range.last = narrowed(&range, to_f64(avoid.room) / whole);
        }
        let order = entries.iter().filter_map(|entry| match entry.level {
            Level::Upper { order } => Some(order),
            Level::Last => None,
        });
        let step = Step {
            range,
            upper: entries.iter().map(|entry| entry.id()).collect(),
            last: Vec::new(),
            into: Level::Upper { order: order.max()? },
            bytes: to_u64(bytes_of(&range)),
            hand: None,
        };
        (step.bytes <= avoid.room && !avoid.forbids(&step)).then_some(step)
    })
}
