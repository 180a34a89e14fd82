//! Values that prove themselves, and the book of what each key may hold.
//!
//! A value names its key and its version and is filled from both, so any mixed-up, torn or stale
//! value is seen. Invariant of the book: a read that began after version `a` was acknowledged and
//! ended before version `b + 1` was sent may only return versions `a..=b`.

use crate::keys::{Stripe, mix};

/// Smallest value that can name its key and version, in bytes.
pub const VALUE_SIZE_MIN: usize = 16;

/// Writes the value of a key's version.
pub fn fill_value(id: u64, version: u32, size: usize, value: &mut Vec<u8>) {
    value.clear();
    value.extend_from_slice(&id.to_le_bytes());
    value.extend_from_slice(&u64::from(version).to_le_bytes());
    let mut state = mix(id ^ (u64::from(version) << 40));
    while value.len() < size {
        value.extend_from_slice(&state.to_le_bytes());
        state = state.rotate_left(17).wrapping_add(0x9E37_79B9_7F4A_7C15);
    }
    value.truncate(size);
}

/// The version that a value names, if it is a whole value of that key.
#[must_use]
pub fn read_value(id: u64, value: &[u8]) -> Option<u32> {
    let version = u64::from_le_bytes(value.get(8..16)?.try_into().ok()?);
    let version = u32::try_from(version).ok()?;
    let mut expected = Vec::with_capacity(value.len() + 8);
    fill_value(id, version, value.len(), &mut expected);
    (expected == value).then_some(version)
}

/// For each key of a stripe, by its number there, the last version sent and the last acknowledged.
#[derive(Debug)]
pub struct Book {
    stripe: Stripe,
    sent: Vec<u32>,
    acknowledged: Vec<u32>,
    /// Keys with a write on its way: a second one could be applied in either order.
    writing: Vec<bool>,
    wrong: u64,
    first_wrong: Option<String>,
}

fn index(id: u64) -> usize {
    usize::try_from(id).expect("the book has a row for each key")
}

impl Book {
    /// A book of the first `keys` keys of a stripe, none of them written yet.
    #[must_use]
    pub fn new(stripe: Stripe, keys: u64) -> Book {
        let rows = vec![0; index(keys)];
        let writing = vec![false; index(keys)];
        let (sent, acknowledged) = (rows.clone(), rows);
        Book { stripe, sent, acknowledged, writing, wrong: 0, first_wrong: None }
    }

    /// Adds a row for a key that is inserted, and for those before it.
    pub fn grow(&mut self, id: u64) {
        let rows = self.sent.len().max(index(id) + 1);
        self.sent.resize(rows, 0);
        self.acknowledged.resize(rows, 0);
        self.writing.resize(rows, false);
    }

    /// Whether a write of the key is on its way; another one must wait.
    #[must_use]
    pub fn is_writing(&self, id: u64) -> bool {
        self.writing[index(id)]
    }

    /// Whether any version of the key was acknowledged.
    #[must_use]
    pub fn is_written(&self, id: u64) -> bool {
        self.acknowledged[index(id)] > 0
    }

    /// The next version of a key; call it when the write is sent.
    pub fn next_version(&mut self, id: u64) -> u32 {
        self.writing[index(id)] = true;
        self.sent[index(id)] += 1;
        self.sent[index(id)]
    }

    /// A write was acknowledged.
    pub fn acknowledge(&mut self, id: u64, version: u32) {
        let row = &mut self.acknowledged[index(id)];
        *row = version.max(*row);
        self.writing[index(id)] = false;
    }

    /// A write was refused, or may be applied: the acknowledged version stays.
    pub fn give_up(&mut self, id: u64) {
        self.writing[index(id)] = false;
    }

    /// The least version that a read which starts now may return.
    #[must_use]
    pub fn floor(&self, id: u64) -> u32 {
        self.acknowledged[index(id)]
    }

    /// Checks a read's answer; `floor` is what [`Book::floor`] said when it was sent.
    pub fn check(&mut self, id: u64, floor: u32, value: Option<&[u8]>) {
        let name = self.stripe.id(id);
        let problem = match value.map(|value| read_value(name, value)) {
            None if floor == 0 => None,
            None => Some(format!("absent, but version {floor} was acknowledged")),
            Some(None) => Some("not a value that was ever written there".to_owned()),
            Some(Some(version)) if version < floor => {
                Some(format!("version {version}, but {floor} was acknowledged"))
            }
            Some(Some(version)) if version > self.sent[index(id)] => {
                Some(format!("version {version}, which was never sent"))
            }
            Some(Some(_)) => None,
        };
        if let Some(problem) = problem {
            self.wrong += 1;
            self.first_wrong.get_or_insert_with(|| format!("key {name}: {problem}"));
        }
    }

    /// How many answers were wrong, and the first one.
    #[must_use]
    pub fn verdict(&self) -> (u64, Option<&str>) {
        (self.wrong, self.first_wrong.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_wrong_answer_is_counted() {
        let mut book = Book::new(Stripe::WHOLE, 4);
        let mut value = Vec::new();
        let version = book.next_version(2);
        book.acknowledge(2, version);
        fill_value(2, version, 100, &mut value);
        book.check(2, book.floor(2), Some(&value));
        assert_eq!(book.verdict(), (0, None));

        book.check(2, 1, None);
        book.check(3, 0, Some(&value));
        value[50] ^= 1;
        book.check(2, 1, Some(&value));
        fill_value(2, 9, 100, &mut value);
        book.check(2, 1, Some(&value));
        assert_eq!(book.verdict().0, 4);
        assert_eq!(book.verdict().1, Some("key 2: absent, but version 1 was acknowledged"));
    }
}
