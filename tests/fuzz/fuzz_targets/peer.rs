//! See `targets::peer`.
#![no_main]

#[path = "../src/targets.rs"]
#[expect(dead_code, reason = "each binary runs one target")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::peer(data));
