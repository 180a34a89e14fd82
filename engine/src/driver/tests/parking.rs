//! Sleeping and waking under what a busy host does to a shard: pauses at any moment, and sleep
//! after sleep that only a timer ends.

#![expect(clippy::disallowed_methods, reason = "threads outside the shards wait in real time")]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::*;

/// Longer than any latency that was ever asked of the executor.
static DOZE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 12_000_000 };

/// Takes the core away from the thread that gets the signal, as a busy host does.
extern "C" fn doze(_: libc::c_int) {
    // SAFETY: a readable timespec, nothing to write back; allowed in a signal handler.
    unsafe { libc::nanosleep(&raw const DOZE, std::ptr::null_mut()) };
}

#[test]
fn a_shard_that_loses_its_core_at_any_moment_wakes_all_the_same() {
    const PAUSES: u64 = 500;
    // SAFETY: installs a handler that touches no memory, for a signal that nobody else uses.
    unsafe { libc::signal(libc::SIGURG, doze as extern "C" fn(libc::c_int) as usize) };
    let (asked, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let (tell, told) = mpsc::channel();
    let shared = (Arc::clone(&asked), Arc::clone(&seen), Arc::clone(&stop));
    let shard = start_shard(ThreadOptions::default(), move |ring, runtime| async move {
        let (asked, seen, stop) = shared;
        // SAFETY: no arguments, no memory.
        tell.send((ring.waker(), unsafe { libc::pthread_self() })).unwrap();
        let options = HostOptions { spin_us: 0, slice_us: 200 };
        host(&ring, &runtime, options, |_, _| {
            seen.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
            if stop.load(Ordering::SeqCst) { Turn::Stop } else { Turn::Idle }
        })
        .await
        .unwrap();
    })
    .unwrap();
    let (waker, thread) = told.recv().unwrap();
    let pausing = Arc::new(AtomicBool::new(true));
    let (still_pausing, turned) = (Arc::clone(&pausing), Arc::clone(&seen));
    let pauser = std::thread::spawn(move || {
        for pause in 0..PAUSES {
            // SAFETY: the shard's thread lives until this one has ended.
            unsafe { libc::pthread_kill(thread, libc::SIGURG) };
            std::thread::sleep(Duration::from_micros(12_500 + pause * 7));
            // A signal also wakes: the next one comes when the shard has woken without it.
            let before = turned.load(Ordering::SeqCst);
            let since = std::time::Instant::now();
            while turned.load(Ordering::SeqCst) == before
                && since.elapsed() < Duration::from_secs(7)
            {
                std::thread::yield_now();
            }
        }
        still_pausing.store(false, Ordering::SeqCst);
    });
    let mut round = 0;
    while pausing.load(Ordering::SeqCst) {
        round += 1;
        asked.store(round, Ordering::SeqCst);
        waker.wake();
        let since = std::time::Instant::now();
        while seen.load(Ordering::SeqCst) != round {
            assert!(since.elapsed() < Duration::from_secs(5), "wake {round}: it sleeps on");
            std::thread::yield_now();
        }
        // Time to fall asleep, of different length.
        for _ in 0..round % 16 * 16 {
            std::hint::spin_loop();
        }
    }
    pauser.join().unwrap();
    stop.store(true, Ordering::SeqCst);
    waker.wake();
    shard.join().unwrap().unwrap();
}

#[test]
fn a_shard_that_nobody_else_wakes_sleeps_as_often_as_it_likes() {
    // The executor counts the references to a task in 15 bits.
    const SLEEPS: u64 = 40_000;
    let turns = on_shard(|ring, runtime| async move {
        let (other, waker) = (runtime.clone(), ring.waker());
        runtime.spawn(Class::Background, async move {
            for _ in 0..SLEEPS {
                waker.wake();
                other.yield_now().await;
            }
        });
        let mut turns = 0;
        let options = HostOptions { spin_us: 0, slice_us: 200 };
        host(&ring, &runtime, options, |_, _| {
            turns += 1;
            if turns == SLEEPS { Turn::Stop } else { Turn::Idle }
        })
        .await
        .unwrap();
        turns
    });
    assert_eq!(turns, SLEEPS);
}

#[test]
fn another_thread_gets_a_turn_of_a_shard_that_is_parked_beside_a_busy_background_task() {
    let asked = Arc::new(AtomicBool::new(false));
    let (tell, told) = mpsc::channel();
    let for_shard = Arc::clone(&asked);
    let shard = start_shard(ThreadOptions::default(), move |ring, runtime| async move {
        tell.send(ring.waker()).unwrap();
        let (busy, worker) = (Rc::new(Cell::new(true)), runtime.clone());
        let still_busy = Rc::clone(&busy);
        runtime.spawn(Class::Background, async move {
            // It never waits for anything, and gives way after each step.
            while still_busy.get() {
                let end = worker.now().after_nanos(MS / 10);
                while worker.now() < end {}
                worker.yield_now().await;
            }
        });
        let begin = runtime.now();
        let options = HostOptions { spin_us: 0, slice_us: 200 };
        host(&ring, &runtime, options, |now, _| {
            let late = now.nanos_since(begin) > 20_000 * MS;
            if late || for_shard.load(Ordering::SeqCst) { Turn::Stop } else { Turn::Idle }
        })
        .await
        .unwrap();
        busy.set(false);
    })
    .unwrap();
    let waker = told.recv().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    asked.store(true, Ordering::SeqCst);
    let since = std::time::Instant::now();
    waker.wake();
    while !shard.is_finished() && since.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(shard.is_finished(), "no turn within {:?}", since.elapsed());
    shard.join().unwrap().unwrap();
}
