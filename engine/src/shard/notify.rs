//! A wake-up between tasks of one shard: "something changed, look again".
//!
//! Invariant: a task that took a [`Notify::ticket`] before it looked at the state misses no
//! later change, because waiting on an old ticket returns at once.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Counts changes and wakes whoever waits for the next one.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    changes: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

/// How many changes its holder had seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket(u64);

impl Notify {
    /// Marks this moment; take it before looking at the state.
    pub(crate) fn ticket(&self) -> Ticket {
        Ticket(self.changes.get())
    }

    /// Tells all waiting tasks to look again.
    pub(crate) fn notify(&self) {
        self.changes.set(self.changes.get() + 1);
        for waker in self.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }

    /// Waits for a change after `ticket`.
    pub(crate) async fn changed(&self, ticket: Ticket) {
        poll_fn(|cx| {
            if self.changes.get() != ticket.0 {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}
