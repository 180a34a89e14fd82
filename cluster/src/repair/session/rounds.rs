//! One round, from its first question to its end.

use annulus_engine::model::{PartitionId, Token};

use super::{Missing, Repairer};
use crate::message::PeerMessage;
use crate::repair::compare::{Compared, Own, Question};
use crate::repair::events::{Local, Moment, Output};
use crate::repair::merkle::{FAN_OUT_BITS, MerkleTree, Unclear};
use crate::repair::status::{LastRound, Outcome};
use crate::repair::walk::{FETCH_MAX, Pair, Step, Walk};

impl Repairer {
    /// Asks, reads or fetches what comes next of a comparison, or ends it.
    pub(super) fn advance(&mut self, mut walk: Walk, moment: Moment, local: &dyn Local) {
        let partition = walk.pair.0;
        walk.step = Step::Ready;
        loop {
            if walk.has_enough() {
                self.exchange(&mut walk, moment);
                if !matches!(walk.step, Step::Ready) {
                    break;
                }
            }
            let Some(question) = walk.todo.last().copied() else {
                let outcome = match (walk.is_partial, walk.differing()) {
                    (true, _) => Outcome::Partly,
                    (false, 0) => Outcome::Equal,
                    (false, _) => Outcome::Repaired,
                };
                return self.end(walk, outcome, moment);
            };
            let Some(seen_digest) = self.digest(partition, local) else {
                return self.end(walk, Outcome::NotComparable, moment);
            };
            match self.own(partition, question) {
                Ok(_) if walk.questions_left == 0 => {
                    walk.todo.clear();
                    walk.is_partial = true;
                }
                Ok(own) => {
                    walk.todo.pop();
                    walk.questions_left -= 1;
                    self.ask(&mut walk, question, own, seen_digest, moment);
                }
                Err(missing) => self.make_up(&mut walk, question, missing, moment),
            }
            if !matches!(walk.step, Step::Ready) {
                break;
            }
        }
        self.walks.insert(walk.pair, walk);
    }

    /// Reads what is missing for the next question, or leaves it out.
    fn make_up(&mut self, walk: &mut Walk, question: Question, missing: Missing, moment: Moment) {
        let partition = walk.pair.0;
        let wanted = match missing {
            Missing::Leaf(leaf) if walk.reads_left > 0 => {
                walk.reads_left -= 1;
                Some(leaf)
            }
            Missing::Detail if walk.details_left > 0 => {
                walk.details_left -= 1;
                Some(question.node)
            }
            _ => None,
        };
        let Some(node) = wanted else {
            walk.todo.pop();
            let leaf_bits = self.trees.get(&partition).map_or(0, MerkleTree::leaf_bits);
            let bits = leaf_bits.saturating_sub(question.node.level).min(FAN_OUT_BITS);
            walk.split(question.node, bits);
            return;
        };
        self.reads.want(partition, node);
        walk.step = match self.reads.is_wanted(partition, node) {
            true => Step::Reading(node),
            // Too much waits already.
            false => Step::Paused(moment.now.after_nanos(self.options.timeout_nanos)),
        };
    }

    /// What this replica has of the node of a question.
    pub(super) fn own(
        &mut self,
        partition: PartitionId,
        question: Question,
    ) -> Result<Own, Missing> {
        let tree = self.trees.get(&partition).ok_or(Missing::Nothing)?;
        let node = question.node;
        let sums = match question.is_sum_only {
            true => tree.sum(node, self.hour).map(|sum| vec![sum]),
            false => tree.children(node, self.hour),
        };
        match sums {
            Ok(sums) => Ok(Own::Sums(sums)),
            Err(Unclear::Dirty) => {
                let from = self.cursors.get(&partition).copied().unwrap_or(0);
                Err(tree.first_dirty(node, from).map_or(Missing::Nothing, Missing::Leaf))
            }
            Err(Unclear::BelowLeaves) => {
                let detail = self.reads.detail(partition, tree, node, self.hour);
                detail.map(Own::Detail).ok_or(Missing::Detail)
            }
        }
    }

    fn ask(&mut self, walk: &mut Walk, question: Question, own: Own, seen: u64, moment: Moment) {
        self.next_id += 1;
        let id = self.next_id;
        let message = PeerMessage::Tree {
            id,
            partition: walk.pair.0,
            seen_digest: seen,
            level: question.level(),
            index: question.node.index,
        };
        walk.bytes += self.send(walk.pair.1, message);
        walk.step = Step::Asked { id, question, own, sent_at: moment.now };
    }

    /// Sends our records of the keys that differ, and asks for the other side's.
    fn exchange(&mut self, walk: &mut Walk, moment: Moment) {
        let (partition, to) = walk.pair;
        let push = walk.push.split_off(walk.push.len().saturating_sub(FETCH_MAX));
        if !push.is_empty() {
            self.counters.keys_pushed += push.len() as u64;
            self.outputs.push_back(Output::Push { to, partition, tokens: push });
        }
        let tokens = walk.fetch.split_off(walk.fetch.len().saturating_sub(FETCH_MAX));
        if !tokens.is_empty() {
            self.fetch(walk, tokens, moment);
        }
    }

    fn fetch(&mut self, walk: &mut Walk, tokens: Vec<Token>, moment: Moment) {
        let (partition, to) = walk.pair;
        self.next_id += 1;
        let id = self.next_id;
        let message = PeerMessage::Fetch { id, partition, tokens: tokens.clone() };
        walk.bytes += self.send(to, message);
        walk.step = Step::Fetching { id, tokens, sent_at: moment.now };
    }

    pub(super) fn compared(
        &mut self,
        mut walk: Walk,
        question: Question,
        compared: Compared,
        moment: Moment,
        local: &dyn Local,
    ) {
        match compared {
            Compared::Equal => {}
            Compared::Deeper(nodes) => {
                let deeper = |node| Question { node, is_sum_only: false };
                walk.todo.extend(nodes.into_iter().rev().map(deeper));
            }
            Compared::Keys(keys) => {
                self.counters.keys_differing += keys.len() as u64;
                walk.take_note(keys);
            }
            Compared::NotComparable => {
                walk.tries += 1;
                if walk.tries >= self.options.attempts_max {
                    return self.end(walk, Outcome::NotComparable, moment);
                }
                walk.todo.push(question);
                // The other side's writes are under way, or it reads. Longer each time.
                let pause = (self.options.timeout_nanos >> 6) << walk.tries.min(6);
                let pause = pause / 2 + self.chance(walk.pair) % (pause / 2).max(1);
                walk.step = Step::Paused(moment.now.after_nanos(pause));
                self.walks.insert(walk.pair, walk);
                return;
            }
            Compared::Malformed(what) => return self.end(walk, Outcome::Malformed(what), moment),
        }
        walk.tries = 0;
        self.advance(walk, moment, local);
    }

    /// Asks again what got no answer, and goes on with what has paused.
    pub(super) fn expire_walks(&mut self, moment: Moment, local: &dyn Local) {
        let timeout = self.options.timeout_nanos;
        let is_late = |walk: &&Walk| walk.wake_at(timeout) <= moment.now;
        let late: Vec<Pair> = self.walks.values().filter(is_late).map(|walk| walk.pair).collect();
        for pair in late {
            let Some(mut walk) = self.walks.remove(&pair) else { continue };
            let step = std::mem::replace(&mut walk.step, Step::Ready);
            if matches!(step, Step::Asked { .. } | Step::Fetching { .. }) {
                walk.tries += 1;
                if walk.tries >= self.options.attempts_max {
                    self.end(walk, Outcome::Unreachable, moment);
                    continue;
                }
            }
            match step {
                Step::Asked { question, .. } => walk.todo.push(question),
                Step::Fetching { tokens, .. } => {
                    self.fetch(&mut walk, tokens, moment);
                    self.walks.insert(pair, walk);
                    continue;
                }
                Step::Ready | Step::Reading(_) | Step::Paused(_) => {}
            }
            self.advance(walk, moment, local);
        }
    }

    pub(super) fn end(&mut self, walk: Walk, outcome: Outcome, moment: Moment) {
        let (partition, peer) = walk.pair;
        self.counters.rounds += 1;
        let [missing_here, missing_there, differing] = walk.found;
        if walk.differing() > 0 {
            self.counters.faults += 1;
            self.outputs.push_back(Output::Fault {
                partition,
                peer,
                missing_here,
                missing_there,
                differing,
            });
        }
        match outcome {
            Outcome::Equal => self.counters.equal += 1,
            Outcome::Repaired => {}
            Outcome::Partly => self.counters.partly += 1,
            Outcome::NotComparable => self.counters.not_comparable += 1,
            Outcome::Unreachable => self.counters.unreachable += 1,
            Outcome::Malformed(_) => self.counters.malformed += 1,
        }
        self.counters.last_round = Some(moment.wall);
        let (differing, bytes, ended) = (walk.differing(), walk.bytes, moment.wall);
        let last = LastRound { partition, peer, ended, outcome, differing, bytes };
        let before = self.pairs.insert(walk.pair, Some(last)).flatten();
        // Jittered by an eighth; soon after a difference, unless repair has not made it less.
        let is_getting_less = before.is_none_or(|b| b.differing == 0 || differing < b.differing);
        let is_soon = differing > 0 && is_getting_less;
        let interval = self.options.interval_nanos >> if is_soon { 4 } else { 0 };
        let wait = interval - interval / 16 + self.chance(walk.pair) % (interval / 8).max(1);
        self.due.insert((moment.now.after_nanos(wait), walk.pair));
    }
}
