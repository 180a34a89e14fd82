//! What is measured: one connection's protocol, as bytes in and bytes out.

use std::time::Duration;

/// A value to be written.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// Under this key.
    pub key: &'a [u8],
    /// This value.
    pub value: &'a [u8],
}

/// How a request ended.
#[derive(Debug)]
pub enum Reply<'a> {
    /// The key's value.
    Value(&'a [u8]),
    /// The key has none.
    Absent,
    /// The write was acknowledged.
    Written,
    /// A scan's records.
    Scanned(u32),
    /// Refused, certainly not done.
    NotStarted(String),
    /// Failed, perhaps done.
    MayBeApplied(String),
    /// Any other error.
    Refused(String),
}

/// One connection's protocol. Request ids are chosen by the caller and come back with replies.
pub trait Target {
    /// Writes what opens the connection.
    fn start(&mut self, out: &mut Vec<u8>);
    /// Whether requests may be sent.
    fn ready(&self) -> bool;
    /// Whether requests of this size can be carried out at all. Asked once, when ready.
    ///
    /// # Errors
    /// A sentence that names the limit.
    fn check_sizes(&self, _key_size: usize, _value_size: usize) -> Result<(), String> {
        Ok(())
    }
    /// Whether this connection is the one for the key.
    fn serves(&self, _key: &[u8]) -> bool {
        true
    }
    /// Connections with the same lane serve the same keys.
    fn lane(&self) -> usize {
        0
    }
    /// What time it is, and until when the requests that follow must be answered, both since some
    /// moment before the run. A target whose protocol knows no deadlines ignores it.
    fn set_time(&mut self, _now: Duration, _deadline: Duration) {}
    /// Asks for a key.
    fn get(&mut self, id: u32, key: &[u8], out: &mut Vec<u8>);
    /// Writes a key.
    fn put(&mut self, id: u32, write: &Write<'_>, out: &mut Vec<u8>);
    /// Asks for `count` records from the key's place on; false where the target cannot.
    fn scan(&mut self, id: u32, key: &[u8], count: u32, out: &mut Vec<u8>) -> bool;
    /// Takes what arrived; calls `done` for each whole reply.
    ///
    /// # Errors
    /// A sentence when the stream breaks the protocol.
    fn receive(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
        done: &mut dyn FnMut(u32, Reply<'_>),
    ) -> Result<(), String>;
}
