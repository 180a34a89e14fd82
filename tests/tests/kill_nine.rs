//! `kill -9` under load: what was acknowledged is there afterwards, and nothing wrong is.
//!
//! Writers keep to keys of their own and note each write before it is sent and when it is
//! acknowledged. After the restart a key must hold the last acknowledged write of it or one that
//! was sent later; whatever it holds must be exactly what was once sent (RELIABILITY P1 to P3,
//! T2). `ANNULUS_KILL_ROUNDS` sets the number of rounds, 12 unless said otherwise.

#![expect(clippy::unwrap_used, reason = "what is not there fails the test")]
#![expect(clippy::disallowed_methods, reason = "real processes are killed in real time")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use annulus_net::client::{BlockingNamespace, ReadOptions, WriteOptions};
use annulus_tests::server::{Setup, StopOnDrop, annulus, scratch};

const WRITERS: u64 = 3;
const KEYS_PER_WRITER: u64 = 400;

/// What one key may hold. Writes of a key are numbered from 1; an even one deletes.
#[derive(Clone, Debug, Default)]
struct Expected {
    /// The last number that was sent.
    sent: u64,
    /// The last number that was acknowledged.
    acknowledged: u64,
}

type Book = BTreeMap<u64, Expected>;

fn rounds() -> u64 {
    let given = std::env::var("ANNULUS_KILL_ROUNDS").ok();
    given.map_or(12, |text| text.parse().expect("ANNULUS_KILL_ROUNDS is a number"))
}

fn key_of(key: u64) -> Vec<u8> {
    format!("writer-{}-key-{key}", key % WRITERS).into_bytes()
}

/// The value says which write it is, and fills sizes from a few bytes to over a slice.
fn value_of(key: u64, number: u64) -> Vec<u8> {
    let size = match (key + number) % 50 {
        0 => 70_000,
        n if n < 10 => 3_000,
        n => 16 + usize::try_from(n).expect("below 50") * 8,
    };
    let mut value = [key.to_le_bytes(), number.to_le_bytes()].concat();
    let filler = key.wrapping_mul(31).wrapping_add(number).to_le_bytes()[0];
    value.resize(size, filler);
    value
}

fn is_delete(key: u64, number: u64) -> bool {
    (key + number).is_multiple_of(7)
}

/// Writes until the server is gone; pipelined, so that batches are under way at any moment.
fn write(keys: &BlockingNamespace, writer: u64, book: &mut Book, stop: &AtomicBool, seed: u64) {
    let mut pipeline = keys.pipeline::<(u64, u64)>(64);
    let mut state = seed.wrapping_mul(WRITERS).wrapping_add(writer) | 1;
    let note = |book: &mut Book, finished: Option<((u64, u64), Result<_, _>)>| {
        let Some(((key, number), result)) = finished else { return true };
        if result.is_ok() {
            let expected = book.get_mut(&key).expect("it was sent");
            expected.acknowledged = expected.acknowledged.max(number);
        }
        result.is_ok()
    };
    // The keys of the window: two writes of one key under way could be swapped by a retry.
    let mut recent = std::collections::VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let key = state % KEYS_PER_WRITER * WRITERS + writer;
        if recent.contains(&key) {
            continue;
        }
        recent.push_back(key);
        if recent.len() > 64 {
            recent.pop_front();
        }
        let expected = book.entry(key).or_default();
        expected.sent += 1;
        let number = expected.sent;
        // A write that fails is not sent again: whether it happened must stay one question.
        let options =
            WriteOptions { timeout: Some(Duration::from_secs(10)), ..WriteOptions::default() };
        let finished = if is_delete(key, number) {
            pipeline.delete((key, number), key_of(key), options)
        } else {
            pipeline.put((key, number), key_of(key), value_of(key, number), options)
        };
        if !note(book, finished) {
            break;
        }
    }
    while let Some(finished) = pipeline.finish_one() {
        note(book, Some(finished));
    }
}

/// Reads every key and compares; what is there is taken for the state from now on.
fn check(keys: &BlockingNamespace, book: &mut Book, round: u64) -> usize {
    let mut present = 0;
    for (&key, expected) in book.iter_mut() {
        let read = keys.read(&key_of(key), &ReadOptions::default()).unwrap();
        let about = format!("round {round}, key {key}, {expected:?}");
        assert!(read.values.len() <= 1, "{about}: siblings");
        let found = read.values.first().map(|sibling| {
            let number = sibling.value.get(8..16).expect("a value has its number");
            let number = u64::from_le_bytes(number.try_into().expect("8 bytes"));
            assert!(sibling.value == value_of(key, number), "{about}: never sent: {number}");
            assert!(!is_delete(key, number), "{about}: {number} was a delete");
            number
        });
        let may_be = expected.acknowledged..=expected.sent;
        match found {
            Some(number) => {
                assert!(may_be.contains(&number), "{about}: found {number}");
                expected.acknowledged = number;
                present += 1;
            }
            None => {
                let absent = |number| number == 0 || is_delete(key, number);
                let delete = may_be.rev().find(|number| absent(*number));
                assert!(delete.is_some(), "{about}: nothing found");
            }
        }
    }
    present
}

fn rounds_of_kills(setup: Setup, rounds: u64) {
    let mut setup = setup;
    let mut books: Vec<Book> = (0..WRITERS).map(|_| Book::new()).collect();
    let (mut acknowledged, mut slowest) = (0u64, Duration::ZERO);
    for round in 0..rounds {
        let begin = Instant::now();
        let server = setup.start();
        slowest = slowest.max(begin.elapsed());
        let keys = server.namespace();
        for book in &mut books {
            check(&keys, book, round);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let before: u64 = books.iter().flat_map(Book::values).map(|key| key.acknowledged).sum();
        setup = thread::scope(|scope| {
            for (writer, book) in books.iter_mut().enumerate() {
                let (keys, stop) = (server.namespace(), Arc::clone(&stop));
                let writer = u64::try_from(writer).expect("few");
                scope.spawn(move || write(&keys, writer, book, &stop, round * 7919 + 1));
            }
            // Different moments: some in the first batches, some after flushes.
            let _stopper = StopOnDrop(&stop);
            thread::sleep(Duration::from_millis(20 + round * 137 % 700));
            server.kill_nine()
        });
        let after: u64 = books.iter().flat_map(Book::values).map(|key| key.acknowledged).sum();
        acknowledged += after.saturating_sub(before);
        // The cheapest daily guard: every checksum of what the kill left behind.
        let data_dir = setup.data_dir().as_os_str();
        let _ = annulus(["inspect".as_ref(), data_dir, "--verify".as_ref()]).expect_code(0);
    }
    let server = setup.start();
    let keys = server.namespace();
    let present: usize = books.iter_mut().map(|book| check(&keys, book, rounds)).sum();
    println!("{rounds} kills, {acknowledged} acknowledged, {present} present, start {slowest:?}");
    assert!(acknowledged > rounds * 20, "the load was none: {acknowledged}");
    assert!(present > 0);
    let _ = server.terminate();
}

#[test]
fn whatever_was_acknowledged_survives_kills_under_load() {
    let dir = scratch();
    let setup = Setup::new(dir.path().join("data")).with("shards", "2");
    rounds_of_kills(setup, rounds());
}

#[test]
fn with_tiny_files_the_kills_meet_rolls_flushes_and_compactions() {
    let dir = scratch();
    let setup = Setup::new(dir.path().join("data"))
        .with("shards", "1")
        .with("segment-size", "256KiB")
        .with("memtable-size", "128KiB")
        .with("table-size", "256KiB");
    rounds_of_kills(setup, rounds());
}
