//! One step of a comparison: what we have of a node, what the other replica answered, what to ask
//! next. First the root, then its children, down to lists of keys.
//!
//! Invariant: every step goes deeper or ends, whatever the other replica answers. Both sides may
//! have cut their partitions differently: the sums of the finer side are added up.
//!
//! Sums travel as two numbers each. A question has one spare bit: with [`SUM_ONLY`] in its level
//! it asks for the node's own sum, not its children's, so that equal trees cost 16 bytes.

use std::cmp::Ordering;
use std::rc::Rc;

use annulus_engine::model::{Token, TokenRange};

use super::merkle::{FAN_OUT_BITS, LEVEL_MAX, Node};
use super::reading::{Detail, ENTRIES_MAX};
use super::sum::Sum;
use crate::message::TreeResult;

/// Bit of a question's level: asked for is the node's own sum.
pub const SUM_ONLY: u8 = 0x80;

/// What a replica asks another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// About which node.
    pub node: Node,
    /// Whether its own sum is asked for, not its children's.
    pub is_sum_only: bool,
}

impl Question {
    /// Where each comparison begins.
    pub const ROOT: Question = Question { node: Node::ROOT, is_sum_only: true };

    /// The question in a message.
    ///
    /// # Errors
    /// What is wrong with it: there is no such node.
    pub fn of_message(level: u8, index: u32) -> Result<Question, &'static str> {
        let node = Node::new(level & !SUM_ONLY, index).ok_or("no such node of a tree")?;
        Ok(Question { node, is_sum_only: level & SUM_ONLY != 0 })
    }

    /// The level as it stands in the message.
    #[must_use]
    pub fn level(self) -> u8 {
        self.node.level | if self.is_sum_only { SUM_ONLY } else { 0 }
    }
}

/// What this replica has of a node, at the moment of a question.
#[derive(Clone, Debug)]
pub enum Own {
    /// Sums of the tree: of the node alone, or of its 2, 4, 8 or 16 children.
    Sums(Vec<Sum>),
    /// What a scan of the node has read.
    Detail(Rc<Detail>),
}

impl Own {
    /// The answer to a question about it.
    #[must_use]
    pub fn answer(&self, question: Question) -> TreeResult {
        match self {
            Own::Sums(sums) => TreeResult::Different(flat(sums)),
            Own::Detail(detail) if question.is_sum_only => {
                TreeResult::Different(flat(&[detail.sum()]))
            }
            Own::Detail(detail) => match detail.entries() {
                Some(entries) if detail.is_short() => TreeResult::Leaf(
                    entries.iter().map(|(token, sum)| (*token, sum.digest())).collect(),
                ),
                _ => TreeResult::Different(flat(detail.children())),
            },
        }
    }

    fn sums(&self, question: Question) -> Vec<Sum> {
        match self {
            Own::Sums(sums) => sums.clone(),
            Own::Detail(detail) if question.is_sum_only => vec![detail.sum()],
            Own::Detail(detail) => detail.children().to_vec(),
        }
    }
}

/// The keys in which two replicas differ, by their tokens.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Keys {
    /// Only the other replica has them.
    pub missing_here: Vec<Token>,
    /// Only this replica has them.
    pub missing_there: Vec<Token>,
    /// Both have them, in different versions.
    pub differing: Vec<Token>,
}

impl Keys {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.missing_here.len() + self.missing_there.len() + self.differing.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a step of a comparison gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The node holds the same on both sides.
    Equal,
    /// These differ: ask for their children.
    Deeper(Vec<Node>),
    /// These keys differ.
    Keys(Keys),
    /// The other side has not seen the same writes, or must read first.
    NotComparable,
    /// No answer to this question.
    Malformed(&'static str),
}

/// Compares what both sides have of the node of a question. `range` is the node's tokens.
#[must_use]
pub fn compare(question: Question, range: TokenRange, own: &Own, answer: &TreeResult) -> Compared {
    match answer {
        TreeResult::Equal => Compared::Equal,
        TreeResult::NotComparable => Compared::NotComparable,
        TreeResult::Different(words) => compare_sums(question, &own.sums(question), words),
        TreeResult::Leaf(_) if question.is_sum_only => {
            Compared::Malformed("a list where one sum was asked for")
        }
        TreeResult::Leaf(list) => {
            let is_sorted = list.is_sorted_by(|(a, _), (b, _)| a < b);
            if !is_sorted || list.len() > ENTRIES_MAX {
                return Compared::Malformed("a list out of order or too long");
            }
            if list.iter().any(|(token, _)| !range.contains(*token)) {
                return Compared::Malformed("a list with tokens of elsewhere");
            }
            match own {
                Own::Detail(detail) => match detail.entries() {
                    Some(entries) => compare_lists(detail, entries, list),
                    None => compare_folded(question.node, range, detail.children(), list),
                },
                Own::Sums(sums) => compare_folded(question.node, range, sums, list),
            }
        }
    }
}

fn compare_sums(question: Question, own: &[Sum], words: &[u64]) -> Compared {
    let (pairs, rest) = words.as_chunks::<2>();
    let theirs: Vec<Sum> = pairs.iter().copied().map(Sum).collect();
    let counts = if question.is_sum_only { 1..=1 } else { 2..=1 << FAN_OUT_BITS };
    if !rest.is_empty() || !theirs.len().is_power_of_two() || !counts.contains(&theirs.len()) {
        return Compared::Malformed("another number of sums than was asked for");
    }
    let count = own.len().min(theirs.len());
    let (own, theirs) = (folded(own, count), folded(&theirs, count));
    let differs = |index: usize| own[index] != theirs[index];
    if question.is_sum_only {
        return if differs(0) { Compared::Deeper(vec![question.node]) } else { Compared::Equal };
    }
    deeper(question.node, count, differs)
}

/// Compares sums of ours with a list of theirs, in the lane that a list has.
fn compare_folded(node: Node, range: TokenRange, own: &[Sum], list: &[(Token, u64)]) -> Compared {
    let shift = (range.last.0 - range.first.0).count_ones() - own.len().ilog2();
    let mut theirs = vec![0u64; own.len()];
    for (token, digest) in list {
        let part = usize::try_from((token.0 - range.first.0) >> shift).expect("below 16");
        theirs[part] = theirs[part].wrapping_add(*digest);
    }
    deeper(node, own.len(), |index| own[index].digest() != theirs[index])
}

fn deeper(node: Node, count: usize, differs: impl Fn(usize) -> bool) -> Compared {
    let bits = u8::try_from(count.ilog2()).expect("at most 4");
    if node.level + bits > LEVEL_MAX {
        return Compared::Malformed("sums of nodes that are too deep");
    }
    let nodes: Vec<Node> = (0u32..)
        .zip(0..count)
        .filter(|(_, index)| differs(*index))
        .map(|(index, _)| node.child(bits, index))
        .collect();
    if nodes.is_empty() { Compared::Equal } else { Compared::Deeper(nodes) }
}

fn compare_lists(detail: &Detail, own: &[(Token, Sum)], theirs: &[(Token, u64)]) -> Compared {
    let mut end = detail.known_up_to();
    if let Some((last, _)) = theirs.last()
        && theirs.len() == ENTRIES_MAX
    {
        end = end.min(*last);
    }
    let mut keys = Keys::default();
    let mut own = own.iter().take_while(|(token, _)| *token <= end).peekable();
    let mut theirs = theirs.iter().take_while(|(token, _)| *token <= end).peekable();
    loop {
        let order = match (own.peek(), theirs.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((ours, _)), Some((other, _))) => ours.cmp(other),
        };
        match order {
            Ordering::Less => keys.missing_there.extend(own.next().map(|(token, _)| *token)),
            Ordering::Greater => keys.missing_here.extend(theirs.next().map(|(token, _)| *token)),
            Ordering::Equal => {
                if let (Some((token, sum)), Some((_, digest))) = (own.next(), theirs.next())
                    && sum.digest() != *digest
                {
                    keys.differing.push(*token);
                }
            }
        }
    }
    if keys.is_empty() { Compared::Equal } else { Compared::Keys(keys) }
}

/// The same sums, added up to `count`, both powers of two.
fn folded(sums: &[Sum], count: usize) -> Vec<Sum> {
    sums.chunks(sums.len() / count).map(|sums| sums.iter().copied().sum()).collect()
}

fn flat(sums: &[Sum]) -> Vec<u64> {
    sums.iter().flat_map(|sum| sum.0).collect()
}
