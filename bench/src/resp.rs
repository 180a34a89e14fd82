//! The Redis protocol (RESP2), as much as GET and SET need: so that a rival is measured by the
//! same tool in the same run.
//!
//! Replies come in order, so outstanding requests wait in a queue.

use std::collections::VecDeque;

use crate::target::{Reply, Target, Write};

/// A RESP connection's state.
#[derive(Debug, Default)]
pub struct Resp {
    waiting: VecDeque<u32>,
    input: Vec<u8>,
}

fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// One reply at the start of `input`: how long it is, and what it says.
fn parse(input: &[u8]) -> Result<Option<(usize, Reply<'_>)>, String> {
    let Some(end) = input.windows(2).position(|pair| pair == b"\r\n") else { return Ok(None) };
    let (line, body) = (&input[1..end], end + 2);
    match input[0] {
        b'+' => Ok(Some((body, Reply::Written))),
        b'-' => Ok(Some((body, Reply::Refused(String::from_utf8_lossy(line).into_owned())))),
        b'$' if line == b"-1" => Ok(Some((body, Reply::Absent))),
        b'$' => {
            let size: usize = std::str::from_utf8(line)
                .ok()
                .and_then(|digits| digits.parse().ok())
                .ok_or_else(|| "a RESP bulk length is not a number".to_owned())?;
            let whole = body + size + 2;
            Ok((input.len() >= whole).then(|| (whole, Reply::Value(&input[body..body + size]))))
        }
        other => Err(format!("unexpected RESP type byte {other:#x}")),
    }
}

impl Target for Resp {
    fn start(&mut self, _out: &mut Vec<u8>) {}

    fn ready(&self) -> bool {
        true
    }

    fn get(&mut self, id: u32, key: &[u8], out: &mut Vec<u8>) {
        self.waiting.push_back(id);
        out.extend_from_slice(b"*2\r\n$3\r\nGET\r\n");
        bulk(out, key);
    }

    fn put(&mut self, id: u32, write: &Write<'_>, out: &mut Vec<u8>) {
        self.waiting.push_back(id);
        out.extend_from_slice(b"*3\r\n$3\r\nSET\r\n");
        bulk(out, write.key);
        bulk(out, write.value);
    }

    fn scan(&mut self, _id: u32, _key: &[u8], _count: u32, _out: &mut Vec<u8>) -> bool {
        false
    }

    fn receive(
        &mut self,
        bytes: &[u8],
        _out: &mut Vec<u8>,
        done: &mut dyn FnMut(u32, Reply<'_>),
    ) -> Result<(), String> {
        let buffered = !self.input.is_empty();
        if buffered {
            self.input.extend_from_slice(bytes);
        }
        let input = if buffered { &self.input[..] } else { bytes };
        let mut at = 0;
        while at < input.len() {
            let Some((size, reply)) = parse(&input[at..])? else { break };
            let id = self.waiting.pop_front().ok_or("a reply that nobody asked for")?;
            done(id, reply);
            at += size;
        }
        if buffered {
            self.input.drain(..at);
        } else {
            self.input.extend_from_slice(&bytes[at..]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_the_same_however_the_bytes_are_split() {
        let stream = b"+OK\r\n$5\r\nhe\r\no\r\n$-1\r\n-ERR no\r\n";
        for cut in 0..stream.len() {
            let (mut resp, mut out, mut seen) = (Resp::default(), Vec::new(), Vec::new());
            let write = Write { key: b"k", value: b"v" };
            resp.put(0, &write, &mut out);
            (1..3).for_each(|id| resp.get(id, b"k", &mut out));
            resp.put(3, &write, &mut out);
            for part in [&stream[..cut], &stream[cut..]] {
                let mut done = |id, reply: Reply<'_>| seen.push((id, format!("{reply:?}")));
                resp.receive(part, &mut Vec::new(), &mut done).unwrap();
            }
            let texts: Vec<_> = seen.iter().map(|(id, text)| (*id, text.as_str())).collect();
            assert_eq!(
                texts,
                [
                    (0, "Written"),
                    (1, "Value([104, 101, 13, 10, 111])"),
                    (2, "Absent"),
                    (3, "Refused(\"ERR no\")"),
                ]
            );
        }
    }
}
