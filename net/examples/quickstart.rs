//! Puts, gets, compares and sets, scans. Needs a server: `annulus serve`, then
//! `cargo run -p annulus-net --example quickstart [ADDRESS]`.

use annulus_net::client::{
    BlockingClient, ClientOptions, Error, ReadOptions, ScanOptions, WriteOptions,
};
use annulus_net::wire::{Class, Condition, Ttl};

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7301".to_owned());
    let client = BlockingClient::connect(ClientOptions::new([address]))?;
    let users = client.namespace("default")?;

    let written = users.put(b"user:1", b"Ada")?;
    println!("version {} on {} nodes, {} synced", written.version, written.acks, written.durable);

    // A value that is gone after a minute.
    let options = WriteOptions { ttl: Ttl::Millis(60_000), ..WriteOptions::default() };
    users.put_with(b"session:1", b"secret", &options)?;

    // Compare and set: only if nobody has written since it was read.
    let read = users.read(b"user:1", &ReadOptions::default())?;
    if let Some(seen) = read.values.first() {
        let options = WriteOptions {
            condition: Condition::IfVersion(seen.version),
            context: read.context.clone(),
            ..WriteOptions::default()
        };
        match users.put_with(b"user:1", b"Ada Lovelace", &options) {
            Ok(written) => println!("updated to version {}", written.version),
            Err(Error::ConditionFailed { current, .. }) => println!("somebody wrote {current}"),
            Err(error) if error.class() == Class::MayBeApplied => {
                println!("unsure, read it again: {error}");
            }
            Err(error) => return Err(error),
        }
    }

    // Many writes under way at once.
    let mut pipeline = users.pipeline(64);
    for i in 0..1_000u32 {
        let key = format!("item:{i}").into_bytes();
        let options = WriteOptions::default();
        if let Some((tag, Err(error))) = pipeline.put(i, key, i.to_string().into_bytes(), options) {
            println!("item {tag}: {error}");
        }
    }
    while let Some((tag, outcome)) = pipeline.finish_one() {
        if let Err(error) = outcome {
            println!("item {tag}: {error}");
        }
    }

    let count = users.scan(ScanOptions::default()).filter(Result::is_ok).count();
    println!("{count} keys");
    users.delete(b"user:1")?;
    Ok(())
}
