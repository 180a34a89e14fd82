//! What was asked of a register and what was told, and whether a plain variable could have said so.
//!
//! Wing and Gong's search ("Testing and verifying concurrent objects", 1993) with a memo, over
//! histories of at most 64 operations. Invariant: an operation that was answered stands between
//! its call and its answer; one that may be applied anywhere after its call, or nowhere; one that
//! was not started, nowhere.

use std::collections::BTreeSet;

use crate::register::{Applied, Change, State};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Read,
    Put(u64),
    Delete,
    Swap { from: Option<u64>, to: u64 },
}

/// What was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Read, or found otherwise than a swap expected.
    Value(Option<u64>),
    Made,
    NotStarted,
    Perhaps,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) ask: Ask,
    pub(crate) invoked: u64,
    pub(crate) returned: u64,
    pub(crate) told: Told,
}

fn value_of(state: &State) -> Option<u64> {
    state.value.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes))
}

impl Change for Ask {
    type Reply = Told;

    fn apply(&mut self, current: &State) -> Applied<Told> {
        let found = value_of(current);
        let value = match *self {
            Ask::Read => return Applied::Keep(Told::Value(found)),
            Ask::Swap { from, .. } if from != found => return Applied::Keep(Told::Value(found)),
            Ask::Put(to) | Ask::Swap { to, .. } => to.to_le_bytes().to_vec(),
            Ask::Delete => Vec::new(),
        };
        Applied::Write { version: current.version + 1, value, reply: Told::Made }
    }
}

/// Whether some order of the operations explains every answer.
pub(crate) fn is_linearizable(history: &[Operation]) -> bool {
    let asked: Vec<Operation> = history
        .iter()
        .filter(|it| it.told != Told::NotStarted && (it.ask, it.told) != (Ask::Read, Told::Perhaps))
        .copied()
        .collect();
    assert!(asked.len() <= 64, "histories are short");
    search(&asked, 0, None, &mut BTreeSet::new())
}

fn search(
    asked: &[Operation],
    done: u64,
    value: Option<u64>,
    seen: &mut BTreeSet<(u64, Option<u64>)>,
) -> bool {
    let left = || asked.iter().enumerate().filter(|(i, _)| done >> i & 1 == 0);
    let Some(first_return) =
        left().filter(|(_, it)| it.told != Told::Perhaps).map(|(_, it)| it.returned).min()
    else {
        return true;
    };
    if !seen.insert((done, value)) {
        return false;
    }
    left().filter(|(_, it)| it.invoked <= first_return).any(|(i, it)| {
        let after = match (it.ask, it.told) {
            (_, Told::Value(found)) => (found == value).then_some(value),
            (Ask::Read, _) => Some(value),
            (Ask::Put(to), _) => Some(Some(to)),
            (Ask::Delete, _) => Some(None),
            (Ask::Swap { from, to }, Told::Made) => (from == value).then_some(Some(to)),
            (Ask::Swap { from, to }, _) => Some(if from == value { Some(to) } else { value }),
        };
        // A swap that was told of another value must not have found the one it expected.
        let is_honest = !matches!((it.ask, it.told),
            (Ask::Swap { from, .. }, Told::Value(found)) if found == from);
        is_honest && after.is_some_and(|value| search(asked, done | 1 << i, value, seen))
    })
}

#[test]
fn the_search_knows_right_from_wrong() {
    let operation = |ask, invoked, returned, told| Operation { ask, invoked, returned, told };
    let put = |value, invoked, returned| operation(Ask::Put(value), invoked, returned, Told::Made);
    let read =
        |value, invoked, returned| operation(Ask::Read, invoked, returned, Told::Value(value));
    assert!(is_linearizable(&[put(1, 0, 9), read(None, 1, 2), read(Some(1), 3, 4)]));
    assert!(!is_linearizable(&[put(1, 0, 9), read(Some(1), 1, 2), read(None, 3, 4)]));
    assert!(!is_linearizable(&[put(1, 0, 1), put(2, 2, 3), read(Some(1), 4, 5)]));
    let perhaps = operation(Ask::Put(3), 2, 3, Told::Perhaps);
    assert!(is_linearizable(&[put(1, 0, 1), perhaps, read(Some(1), 4, 5), read(Some(3), 6, 7)]));
    assert!(!is_linearizable(&[
        perhaps,
        put(1, 4, 5),
        read(Some(3), 6, 7),
        read(Some(1), 8, 9),
        read(Some(3), 10, 11)
    ]));
    let never = operation(Ask::Put(3), 2, 3, Told::NotStarted);
    assert!(!is_linearizable(&[never, read(Some(3), 4, 5)]));
    let swap = |from, to, at| operation(Ask::Swap { from, to }, at, at + 1, Told::Made);
    assert!(is_linearizable(&[swap(None, 1, 0), swap(Some(1), 2, 2)]));
    assert!(!is_linearizable(&[swap(None, 1, 0), swap(None, 2, 2)]));
}
