//! What a shard has promised as a home of keys.
//!
//! Invariant: once a ballot is promised for a key, no record below it is taken in there, but such as
//! are chosen. Promises are in memory, which a crash takes: they are told only when a ceiling on
//! disk is not below them, and a life begins with that ceiling as its [floor](Promises::new). Where
//! there are too many, the least are forgotten into the floor of their partition; that is never
//! wrong, only stricter. What a key holds on disk is not known here: the caller reads it between
//! [`Promises::ask`] and [`Promises::grant`].

use std::collections::{BTreeMap, BTreeSet};

use annulus_engine::model::{PartitionId, Timestamp, Token};

/// Most promises of a shard that are remembered each by itself.
pub const PROMISES_MAX: usize = 16 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Promise {
    ballot: Timestamp,
    /// What the key holds was told with it, and has not changed since: ACCEPT may come.
    is_granted: bool,
}

/// See the module. By token: keys that share one share their promises.
#[derive(Clone, Debug)]
pub struct Promises {
    partition_bits: u32,
    floor: Timestamp,
    floors: BTreeMap<PartitionId, Timestamp>,
    purged: BTreeMap<PartitionId, Timestamp>,
    held: BTreeMap<Token, Promise>,
    order: BTreeSet<(Timestamp, Token)>,
    most: usize,
}

impl Promises {
    /// Of a life that begins: everything up to `floor` may have been promised before it.
    #[must_use]
    pub fn new(partition_bits: u32, floor: Timestamp) -> Promises {
        Promises {
            partition_bits,
            floor,
            floors: BTreeMap::new(),
            purged: BTreeMap::new(),
            held: BTreeMap::new(),
            order: BTreeSet::new(),
            most: PROMISES_MAX,
        }
    }

    /// The same, that remembers fewer.
    #[must_use]
    pub fn with_most(self, most: usize) -> Promises {
        Promises { most: most.max(1), ..self }
    }

    /// Up to which ballot everything counts as promised in the token's partition.
    #[must_use]
    pub fn floor_of(&self, token: Token) -> Timestamp {
        let own = self.floors.get(&token.partition(self.partition_bits));
        own.map_or(self.floor, |own| self.floor.max(*own))
    }

    /// Refuses ballots of a partition up to there from now on.
    pub fn raise(&mut self, partition: PartitionId, floor: Timestamp) {
        let own = self.floors.entry(partition).or_default();
        *own = (*own).max(floor);
    }

    /// Dead records of the partition at or below `floor` may go from now on.
    pub fn purge(&mut self, partition: PartitionId, floor: Timestamp) {
        let purged = self.purged.entry(partition).or_default();
        *purged = (*purged).max(floor);
    }

    /// Up to which stamp dead records of the token's partition may be gone.
    #[must_use]
    pub fn purged_of(&self, token: Token) -> Timestamp {
        let purged = self.purged.get(&token.partition(self.partition_bits));
        purged.copied().unwrap_or(Timestamp::ZERO)
    }

    /// A ballot is asked for: nothing below it is taken in from now on. To be granted when what the
    /// key holds has been read.
    ///
    /// # Errors
    /// The ballot that was promised; nothing changed.
    pub fn ask(&mut self, token: Token, ballot: Timestamp) -> Result<(), Timestamp> {
        let promised = self.promised(token);
        if ballot <= promised {
            return Err(promised);
        }
        self.put(token, Promise { ballot, is_granted: false });
        Ok(())
    }

    /// What the key holds, everything that the log had taken, is below the ballot and is told with
    /// the promise. `false` if a greater one was asked for meanwhile.
    #[must_use]
    pub fn grant(&mut self, token: Token, ballot: Timestamp) -> bool {
        match self.held.get_mut(&token) {
            Some(promise) if promise.ballot == ballot => {
                promise.is_granted = true;
                true
            }
            _ => false,
        }
    }

    /// Whether a record with this ballot is to be accepted: when the log has it, it is
    /// [`Promises::merged`].
    #[must_use]
    pub fn accepts(&self, token: Token, ballot: Timestamp) -> bool {
        let promise = self.held.get(&token);
        promise.is_some_and(|promise| promise.ballot == ballot && promise.is_granted)
    }

    /// Whether a record that nobody is known to have chosen may be merged into the replica.
    #[must_use]
    pub fn may_merge(&self, token: Token, timestamp: Timestamp) -> bool {
        timestamp > self.promised(token)
    }

    /// The log has a record: a promise not above it is kept, and any other ACCEPT would come too
    /// late.
    pub fn merged(&mut self, token: Token, timestamp: Timestamp) {
        if self.held.get(&token).is_some_and(|promise| promise.ballot <= timestamp) {
            self.remove(token);
        }
    }

    /// No ACCEPT of what was promised so far is taken any more; what is below stays refused.
    pub fn bar(&mut self) {
        self.held.values_mut().for_each(|promise| promise.is_granted = false);
    }

    /// How many are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    fn promised(&self, token: Token) -> Timestamp {
        let held = self.held.get(&token).map_or(Timestamp::ZERO, |promise| promise.ballot);
        self.floor_of(token).max(held)
    }

    fn put(&mut self, token: Token, promise: Promise) {
        self.remove(token);
        if self.held.len() >= self.most
            && let Some((ballot, least)) = self.order.first().copied()
        {
            self.remove(least);
            self.raise(least.partition(self.partition_bits), ballot);
        }
        self.held.insert(token, promise);
        self.order.insert((promise.ballot, token));
    }

    fn remove(&mut self, token: Token) {
        if let Some(promise) = self.held.remove(&token) {
            self.order.remove(&(promise.ballot, token));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Token = Token(7);

    fn promises() -> Promises {
        Promises::new(3, Timestamp(10))
    }

    #[test]
    fn only_the_ballot_that_was_granted_last_is_accepted_and_only_once() {
        let mut promises = promises();
        assert_eq!(promises.ask(T, Timestamp(10)), Err(Timestamp(10)));
        assert_eq!(promises.ask(T, Timestamp(11)), Ok(()));
        assert!(!promises.accepts(T, Timestamp(11)), "what the key holds was not told yet");
        assert!(promises.grant(T, Timestamp(11)));
        assert_eq!(promises.ask(T, Timestamp(11)), Err(Timestamp(11)));
        assert_eq!(promises.ask(T, Timestamp(13)), Ok(()));
        assert!(!promises.grant(T, Timestamp(11)) && !promises.accepts(T, Timestamp(11)));
        assert!(promises.grant(T, Timestamp(13)) && promises.accepts(T, Timestamp(13)));
        promises.merged(T, Timestamp(13));
        assert!(!promises.accepts(T, Timestamp(13)) && promises.is_empty());
    }

    #[test]
    fn nothing_below_a_promise_is_merged_and_what_is_above_ends_it() {
        let mut promises = promises();
        assert!(!promises.may_merge(T, Timestamp(10)) && promises.may_merge(T, Timestamp(11)));
        promises.ask(T, Timestamp(20)).unwrap();
        assert!(!promises.may_merge(T, Timestamp(19)) && promises.may_merge(T, Timestamp(21)));
        assert!(promises.grant(T, Timestamp(20)));
        promises.merged(T, Timestamp(21));
        assert!(!promises.accepts(T, Timestamp(20)));
    }

    #[test]
    fn a_barred_promise_still_keeps_out_what_is_below_it() {
        let mut promises = promises();
        promises.ask(T, Timestamp(20)).unwrap();
        assert!(promises.grant(T, Timestamp(20)));
        promises.bar();
        assert!(!promises.accepts(T, Timestamp(20)) && !promises.may_merge(T, Timestamp(19)));
    }

    #[test]
    fn what_is_forgotten_for_want_of_room_stays_promised() {
        let mut promises = promises().with_most(2);
        for (token, ballot) in [(1, 20), (2, 30), (3, 40)] {
            promises.ask(Token(token), Timestamp(ballot)).unwrap();
        }
        assert_eq!((promises.len(), promises.floor_of(Token(1))), (2, Timestamp(20)));
        assert!(!promises.grant(Token(1), Timestamp(20)));
        assert_eq!(promises.ask(Token(1), Timestamp(20)), Err(Timestamp(20)));
        // Another partition knows nothing of it.
        assert_eq!(promises.floor_of(Token(u64::MAX)), Timestamp(10));
    }
}
