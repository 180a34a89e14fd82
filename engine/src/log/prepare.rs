//! The log's preparer task: keeps segments ready ahead of need, recycles and removes free ones.
//!
//! Invariant: segments become ready in the order of their ids, which is the order of their use.
//! A failure here harms no record: it is tried again, and poisons the log only when the writer
//! has nowhere to write.

use std::future::poll_fn;
use std::path::PathBuf;
use std::rc::Rc;
use std::task::Poll;

use super::segments::Segment;
use super::state::Shared;
use super::task::FULL_RETRY_NANOS;
use crate::disk::Disk;
use crate::error::Error;
use crate::runtime::Runtime;

/// Time before a segment is made again after a failure other than a full disk.
const FAULT_RETRY_NANOS: u64 = 1_000_000_000;

/// What the preparer does next.
enum Chore {
    Make { id: u64, recycled: Option<PathBuf> },
    Remove(PathBuf),
    Wait,
    End,
}

/// Keeps segments ready ahead of need, and removes free ones beyond what is kept.
pub(super) async fn prepare<D: Disk, R: Runtime>(shared: Rc<Shared<D, R>>) {
    loop {
        match shared.next_chore() {
            Chore::Make { id, recycled } => {
                let made = match &recycled {
                    Some(path) => shared.maker.recycle(path, id).await,
                    None => shared.maker.create(id, &|| shared.needs_no_segment()).await,
                };
                match made {
                    Ok(segment) => shared.add_ready(segment, recycled.is_none()),
                    // Given up: what is needed is looked at anew.
                    Err(_) if shared.needs_no_segment() => {}
                    Err(error) => {
                        let nanos = shared.note_failure(&error);
                        let now = shared.runtime.now();
                        shared.runtime.sleep_until(now.after_nanos(nanos)).await;
                    }
                }
            }
            Chore::Remove(path) => {
                // Best effort: what stays is found and freed at the next start.
                let _ = shared.maker.disk.remove(&path).await;
            }
            Chore::Wait => shared.wait_for_chore().await,
            Chore::End => break,
        }
    }
    shared.end_task();
}

impl<D: Disk, R: Runtime> Shared<D, R> {
    /// Whether a segment that is being made has become needless: on a slow disk its zeros would
    /// hold up the end.
    fn needs_no_segment(&self) -> bool {
        let state = self.state.borrow();
        state.stop || state.poison.is_some() || (state.closing && !state.starved)
    }

    fn next_chore(&self) -> Chore {
        let mut state = self.state.borrow_mut();
        let writer_ended = state.tasks == 1;
        if state.stop || state.poison.is_some() || writer_ended {
            return Chore::End;
        }
        let wanted =
            if state.closing { usize::from(state.starved) } else { self.options.segments_ready };
        if state.ready.len() < wanted {
            let id = state.next_segment;
            state.next_segment += 1;
            return Chore::Make { id, recycled: state.free.pop_front() };
        }
        if state.free.len() > self.options.segments_free_max {
            return state.free.pop_front().map_or(Chore::Wait, Chore::Remove);
        }
        Chore::Wait
    }

    /// Waits until [`Shared::nudge_preparer`].
    async fn wait_for_chore(&self) {
        let mut waited = false;
        poll_fn(|context| {
            if waited {
                return Poll::Ready(());
            }
            waited = true;
            self.state.borrow_mut().preparer = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn add_ready(&self, segment: Segment<D::File>, created: bool) {
        {
            let mut state = self.state.borrow_mut();
            state.room += segment.capacity;
            state.ready.push_back(segment);
            state.stats.segments_created += u64::from(created);
        }
        self.set_full(None);
        self.nudge_writer();
    }

    /// Notes why no segment could be made; says how long to wait before the next attempt.
    fn note_failure(&self, error: &Error) -> u64 {
        if error.is_full() {
            self.set_full(Some(error.to_string()));
            return FULL_RETRY_NANOS;
        }
        tracing::warn!(%error, "no log segment could be prepared");
        let starved = self.state.borrow().starved;
        if starved {
            self.poison(error);
        }
        FAULT_RETRY_NANOS
    }

    pub(super) fn end_task(&self) {
        self.state.borrow_mut().tasks -= 1;
        self.nudge_all();
    }
}
