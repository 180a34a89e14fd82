//! Waiting for one of the log's counters: visible, durable, ended.
//!
//! Invariant: a waiter is woken when its number is reached and when the log ends, and leaves
//! nothing behind when it is dropped before.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Lsn;
use super::state::Shared;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::runtime::Runtime;

/// Waits for one of the log's counters.
pub(super) struct Wait<'a, D: Disk, R: Runtime> {
    shared: &'a Shared<D, R>,
    lsn: Lsn,
    reached: fn(&Shared<D, R>) -> u64,
    key: Option<(u64, u64)>,
}

impl<'a, D: Disk, R: Runtime> Wait<'a, D, R> {
    pub(super) fn new(
        shared: &'a Shared<D, R>,
        lsn: Lsn,
        reached: fn(&Shared<D, R>) -> u64,
    ) -> Wait<'a, D, R> {
        Wait { shared, lsn, reached, key: None }
    }

    fn register(&mut self, context: &Context<'_>) {
        let mut state = self.shared.state.borrow_mut();
        let key = *self.key.get_or_insert_with(|| {
            state.next_waiter += 1;
            (self.lsn.0, state.next_waiter)
        });
        state.waiters.insert(key, context.waker().clone());
    }

    /// Waits whatever happens to the log.
    pub(super) async fn until_ended(mut self) {
        std::future::poll_fn(|context| {
            if (self.reached)(self.shared) >= self.lsn.0 {
                return Poll::Ready(());
            }
            self.register(context);
            Poll::Pending
        })
        .await;
    }
}

impl<D: Disk, R: Runtime> Future for Wait<'_, D, R> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        if (self.reached)(self.shared) >= self.lsn.0 {
            return Poll::Ready(Ok(()));
        }
        let failed = {
            let state = self.shared.state.borrow();
            match &state.poison {
                Some(poison) => Some(poison.clone()),
                // Closed in good order: the number was never given out.
                None if state.tasks == 0 => Some(Error::Busy { what: "the commit log is closed" }),
                None => None,
            }
        };
        if let Some(error) = failed {
            return Poll::Ready(Err(error));
        }
        self.register(context);
        Poll::Pending
    }
}

impl<D: Disk, R: Runtime> Drop for Wait<'_, D, R> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.shared.state.borrow_mut().waiters.remove(&key);
        }
    }
}
