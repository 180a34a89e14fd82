//! Shard-to-shard messages: one bounded queue for each pair, and a wake-up that costs nothing
//! while the receiver is awake.
//!
//! Invariant: a message that was accepted is seen by the receiver's next [`MeshPort::drain`]
//! after its wake-up, and messages of one sender arrive in order. The sender pushes, then sets its
//! bit; the receiver clears the bits, then pops. On both paths, when a request arrives at a shard
//! that does not own its partition: one hop there, one back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use annulus_engine::driver::RingWaker;
use crossbeam_queue::ArrayQueue;

/// Queues between all shards of a process.
pub struct Mesh<T> {
    capacity: usize,
    shards: Vec<Inbox<T>>,
}

struct Inbox<T> {
    waker: OnceLock<RingWaker>,
    /// A bit for each sender that has pushed since the last drain.
    senders: Vec<AtomicU64>,
    /// One queue a sender, made when it first sends: n * n queues up front would be wasted memory.
    queues: Vec<OnceLock<ArrayQueue<T>>>,
}

impl<T> Mesh<T> {
    /// Queues between `shards` shards, each holding at most `capacity` messages.
    #[must_use]
    pub fn new(shards: usize, capacity: usize) -> Arc<Mesh<T>> {
        let inbox = || Inbox {
            waker: OnceLock::new(),
            senders: (0..shards.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            queues: (0..shards).map(|_| OnceLock::new()).collect(),
        };
        Arc::new(Mesh { capacity, shards: (0..shards).map(|_| inbox()).collect() })
    }

    /// The end of one shard. Messages sent to it before wait for its first drain.
    ///
    /// # Panics
    /// When the shard has joined before, or there is no such shard.
    #[must_use]
    pub fn join(self: &Arc<Self>, shard: usize, waker: RingWaker) -> MeshPort<T> {
        let fresh = self.shards[shard].waker.set(waker).is_ok();
        assert!(fresh, "a shard joins its mesh once");
        MeshPort { mesh: Arc::clone(self), shard }
    }
}

/// One shard's end of the mesh.
pub struct MeshPort<T> {
    mesh: Arc<Mesh<T>>,
    shard: usize,
}

impl<T> MeshPort<T> {
    /// This shard's number.
    #[must_use]
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// How many shards there are.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.mesh.shards.len()
    }

    /// Sends to a shard and wakes it.
    ///
    /// # Errors
    /// The message, when that shard's queue for us is full.
    pub fn send(&self, to: usize, message: T) -> Result<(), T> {
        let inbox = &self.mesh.shards[to];
        let queue =
            inbox.queues[self.shard].get_or_init(|| ArrayQueue::new(self.mesh.capacity.max(1)));
        queue.push(message)?;
        let (word, bit) = (&inbox.senders[self.shard / 64], 1 << (self.shard % 64));
        // A read-modify-write even if the bit seems set: it must not be reordered before the
        // push, and it makes the push visible to the swap in `drain`.
        word.fetch_or(bit, Ordering::AcqRel);
        if let Some(waker) = inbox.waker.get() {
            waker.wake();
        }
        Ok(())
    }

    /// Takes what has arrived, at most one full queue of each sender. Returns how many.
    pub fn drain(&self, mut receive: impl FnMut(usize, T)) -> usize {
        let inbox = &self.mesh.shards[self.shard];
        let mut count = 0;
        for (index, word) in inbox.senders.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut senders = word.swap(0, Ordering::AcqRel);
            while senders != 0 {
                let bit = senders.trailing_zeros();
                senders &= senders - 1;
                let from = index * 64 + bit as usize;
                let Some(queue) = inbox.queues[from].get() else { continue };
                let mut left = queue.len();
                while left > 0
                    && let Some(message) = queue.pop()
                {
                    left -= 1;
                    count += 1;
                    receive(from, message);
                }
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_engine::driver::{HostOptions, Ring, RingConfig, Turn, host, start_shard};

    fn port(mesh: &Arc<Mesh<u32>>, shard: usize) -> MeshPort<u32> {
        let ring = Ring::new(RingConfig::default()).unwrap();
        mesh.join(shard, ring.waker())
    }

    #[test]
    fn messages_of_one_sender_arrive_in_order_and_once() {
        let mesh = Mesh::new(70, 8);
        let (a, b) = (port(&mesh, 69), port(&mesh, 3));
        for i in 0..8 {
            a.send(3, i).unwrap();
        }
        let mut got = Vec::new();
        assert_eq!(b.drain(|from, message| got.push((from, message))), 8);
        assert_eq!(got, (0..8).map(|i| (69, i)).collect::<Vec<_>>());
        assert_eq!(b.drain(|_, _| ()), 0);
    }

    #[test]
    fn a_full_queue_gives_the_message_back() {
        let mesh = Mesh::new(2, 2);
        let a = port(&mesh, 0);
        a.send(1, 1).unwrap();
        a.send(1, 2).unwrap();
        assert_eq!(a.send(1, 3), Err(3));
    }

    #[test]
    fn two_parked_shards_wake_each_other_for_every_message() {
        const ROUNDS: u32 = 2000;
        let mesh = Mesh::<u32>::new(2, 4);
        let threads: Vec<_> = (0..2)
            .map(|shard| {
                let mesh = Arc::clone(&mesh);
                start_shard(Default::default(), move |ring, runtime| async move {
                    let port = mesh.join(shard, ring.waker());
                    let (mut last, mut begun) = (0, false);
                    let options = HostOptions { spin_us: 0, slice_us: 200 };
                    host(&ring, &runtime, options, |_, _| {
                        if shard == 0 && !begun {
                            begun = true;
                            port.send(1, 1).unwrap();
                        }
                        port.drain(|from, message| {
                            last = message;
                            if message < ROUNDS {
                                port.send(from, message + 1).unwrap();
                            }
                        });
                        if last + 1 >= ROUNDS { Turn::Stop } else { Turn::Idle }
                    })
                    .await
                    .unwrap();
                    last
                })
                .unwrap()
            })
            .collect();
        for thread in threads {
            assert!(thread.join().unwrap().unwrap() >= ROUNDS - 1);
        }
    }
}
