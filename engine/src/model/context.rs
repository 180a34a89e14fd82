//! Contexts as clients carry them: opaque bytes, bound to one key and signed.
//!
//! Invariant: a context that decodes was given out by this cluster for this very key. So nobody
//! can invent one, or drop another key's siblings with it. The signature is SipHash-2-4
//! (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012) under a secret of the
//! cluster; its input ends with namespace and token, which are not sent.
//!
//! | size     | field    | meaning                                                  |
//! |----------|----------|----------------------------------------------------------|
//! | 1        | format   | 1                                                        |
//! | varint   | epoch    | of the partition's replica set when it was given out     |
//! | 8        | stamp    | the greatest one read                                    |
//! | varint   | count    | entries, at most `CONTEXT_ENTRIES_MAX`                   |
//! | each     | entry    | origin (varint, rising), sequence (varint, not 0)        |
//! | 8        | checksum | SipHash-2-4 of all before it, namespace (4), token (8)   |

use super::limits::{SIBLINGS_MAX, VECTOR_ENTRIES_MAX};
use super::varint::{self, Reader};
use super::{Context, Dot, NamespaceId, OriginId, Timestamp, Token, VersionVector};

/// Most entries of a context: a full vector, and siblings of that many more origins.
pub const CONTEXT_ENTRIES_MAX: usize = VECTOR_ENTRIES_MAX + SIBLINGS_MAX;
/// Most bytes of an encoded context.
pub const CONTEXT_SIZE_MAX: usize = 1 + 10 + 8 + 2 + CONTEXT_ENTRIES_MAX * 15 + CHECKSUM_SIZE;

const FORMAT: u8 = 1;
const CHECKSUM_SIZE: usize = 8;

/// Why a context is refused. State: nothing was dropped or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadContext {
    /// The bytes have no context's form.
    #[error("not a context: {0}")]
    Malformed(&'static str),
    /// Altered, invented, or given out for another key or by another cluster.
    #[error("the context does not belong to this key; read the key again")]
    NotOfThisKey,
    /// It names a write that its origin has not made.
    #[error("the context covers write {sequence} of origin {origin}, which was never made", origin = .0.origin.0, sequence = .0.sequence)]
    NeverIssued(Dot),
}

/// The cluster's secret under which contexts are signed. Not printed.
#[derive(Clone, Copy)]
pub struct ContextSecret(pub [u64; 2]);

/// A context with the epoch in which it was given out. One of an earlier epoch is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundContext {
    /// What was read.
    pub context: Context,
    /// The partition's epoch at that time.
    pub epoch: u64,
}

impl BoundContext {
    /// Appends the context, signed for this key.
    pub fn encode(
        &self,
        secret: ContextSecret,
        namespace: NamespaceId,
        token: Token,
        out: &mut Vec<u8>,
    ) {
        let start = out.len();
        out.push(FORMAT);
        varint::put(out, self.epoch);
        out.extend_from_slice(&self.context.timestamp.0.to_le_bytes());
        varint::put(out, self.context.vector.len() as u64);
        for dot in self.context.vector.iter() {
            varint::put(out, u64::from(dot.origin.0));
            varint::put(out, dot.sequence);
        }
        let checksum = sign(secret, namespace, token, &out[start..]);
        out.extend_from_slice(&checksum.to_le_bytes());
    }

    /// The context in these bytes, if it was signed for this key.
    ///
    /// # Errors
    /// [`BadContext`]; what is wrong with the form is said only of what was signed here.
    pub fn decode(
        secret: ContextSecret,
        namespace: NamespaceId,
        token: Token,
        bytes: &[u8],
    ) -> Result<BoundContext, BadContext> {
        if bytes.len() > CONTEXT_SIZE_MAX {
            return Err(BadContext::Malformed("too long"));
        }
        let Some((body, checksum)) = bytes.split_last_chunk::<CHECKSUM_SIZE>() else {
            return Err(BadContext::Malformed("too short"));
        };
        let wanted = sign(secret, namespace, token, body).to_le_bytes();
        // Every byte is compared, so that the time taken says nothing about the first difference.
        if checksum.iter().zip(wanted).fold(0, |differ, (a, b)| differ | (a ^ b)) != 0 {
            return Err(BadContext::NotOfThisKey);
        }
        take_body(body)
    }

    /// Checks that no entry goes beyond what its origin is known to have written: `issued` gives
    /// that, or `None` for an origin of which nothing is known, which may then be any number.
    ///
    /// # Errors
    /// [`BadContext::NeverIssued`] with the first such entry.
    pub fn check_issued(&self, issued: impl Fn(OriginId) -> Option<u64>) -> Result<(), BadContext> {
        let beyond = |dot: &Dot| issued(dot.origin).is_some_and(|last| dot.sequence > last);
        match self.context.vector.iter().find(beyond) {
            Some(dot) => Err(BadContext::NeverIssued(dot)),
            None => Ok(()),
        }
    }
}

fn take_body(body: &[u8]) -> Result<BoundContext, BadContext> {
    let cut = BadContext::Malformed("cut short");
    let mut reader = Reader::new(body);
    if reader.byte() != Some(FORMAT) {
        return Err(BadContext::Malformed("its format is not 1"));
    }
    let epoch = reader.number().ok_or(cut)?;
    let timestamp = Timestamp(reader.fixed().ok_or(cut)?);
    let count = reader.length().filter(|count| *count <= CONTEXT_ENTRIES_MAX);
    let mut vector = VersionVector::new();
    let mut last = None;
    for _ in 0..count.ok_or(BadContext::Malformed("too many entries"))? {
        let origin = OriginId(reader.small().ok_or(cut)?);
        let sequence = reader.number().ok_or(cut)?;
        if sequence == 0 || last >= Some(origin) {
            return Err(BadContext::Malformed("entries out of order"));
        }
        last = Some(origin);
        vector.observe(Dot { origin, sequence });
    }
    if !reader.is_empty() {
        return Err(BadContext::Malformed("bytes follow it"));
    }
    Ok(BoundContext { context: Context { vector, timestamp }, epoch })
}

fn sign(secret: ContextSecret, namespace: NamespaceId, token: Token, body: &[u8]) -> u64 {
    let mut signed = Vec::with_capacity(body.len() + 12);
    signed.extend_from_slice(body);
    signed.extend_from_slice(&namespace.0.to_le_bytes());
    signed.extend_from_slice(&token.0.to_le_bytes());
    siphash(secret.0, &signed)
}

/// SipHash-2-4 of the bytes under the key.
fn siphash(key: [u64; 2], bytes: &[u8]) -> u64 {
    // The constants spell "somepseudorandomlygeneratedbytes" (the paper, 2.1).
    let mut state = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        compress(&mut state, u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    // The last byte is the length modulo 256.
    compress(&mut state, u64::from_le_bytes(last) | ((bytes.len() as u64) << 56));
    state[2] ^= 0xff;
    (0..4).for_each(|_| round(&mut state));
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

fn compress(state: &mut [u64; 4], word: u64) {
    state[3] ^= word;
    round(state);
    round(state);
    state[0] ^= word;
}

fn round([v0, v1, v2, v3]: &mut [u64; 4]) {
    *v0 = v0.wrapping_add(*v1);
    *v2 = v2.wrapping_add(*v3);
    *v1 = v1.rotate_left(13) ^ *v0;
    *v3 = v3.rotate_left(16) ^ *v2;
    *v0 = v0.rotate_left(32);
    *v2 = v2.wrapping_add(*v1);
    *v0 = v0.wrapping_add(*v3);
    *v1 = v1.rotate_left(17) ^ *v2;
    *v3 = v3.rotate_left(21) ^ *v0;
    *v2 = v2.rotate_left(32);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: ContextSecret = ContextSecret([1, 2]);
    const NAMESPACE: NamespaceId = NamespaceId(3);
    const TOKEN: Token = Token(0x0123_4567_89ab_cdef);

    fn contexts() -> impl Strategy<Value = BoundContext> {
        let dots = prop::collection::vec((any::<u32>(), any::<u64>(), 0u32..64), 0..20);
        (dots, any::<u64>(), any::<u64>()).prop_map(|(dots, stamp, epoch)| {
            let vector = dots
                .into_iter()
                .map(|(origin, sequence, shift)| Dot {
                    origin: OriginId(origin),
                    sequence: sequence >> shift,
                })
                .collect();
            BoundContext { context: Context { vector, timestamp: Timestamp(stamp) }, epoch }
        })
    }

    fn encode(context: &BoundContext) -> Vec<u8> {
        let mut out = b"before".to_vec();
        context.encode(SECRET, NAMESPACE, TOKEN, &mut out);
        out.split_off(6)
    }

    proptest! {
        #[test]
        fn a_context_comes_back_for_its_key_only(context in contexts(), bit in 0u32..64) {
            let bytes = encode(&context);
            prop_assert_eq!(BoundContext::decode(SECRET, NAMESPACE, TOKEN, &bytes), Ok(context));
            let refused = Err(BadContext::NotOfThisKey);
            let token = Token(TOKEN.0 ^ (1 << bit));
            prop_assert_eq!(BoundContext::decode(SECRET, NAMESPACE, token, &bytes), refused.clone());
            let namespace = NamespaceId(NAMESPACE.0 ^ (1 << (bit % 32)));
            prop_assert_eq!(BoundContext::decode(SECRET, namespace, TOKEN, &bytes), refused.clone());
            let secret = ContextSecret([1, 2 ^ (1 << bit)]);
            prop_assert_eq!(BoundContext::decode(secret, NAMESPACE, TOKEN, &bytes), refused);
        }

        #[test]
        fn an_altered_context_is_refused(context in contexts(), at: prop::sample::Index, bit in 0u32..8) {
            let mut bytes = encode(&context);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(BoundContext::decode(SECRET, NAMESPACE, TOKEN, &bytes).is_err());
            prop_assert!(BoundContext::decode(SECRET, NAMESPACE, TOKEN, &bytes[..at]).is_err());
        }

        #[test]
        fn a_signed_body_of_any_bytes_is_refused_or_is_what_encode_writes(mut body in prop::collection::vec(0u8..4, 1..40)) {
            // What a node of a later format, or with a bug, might sign.
            body[0] = FORMAT;
            let mut bytes = body.clone();
            bytes.extend_from_slice(&sign(SECRET, NAMESPACE, TOKEN, &body).to_le_bytes());
            if let Ok(context) = BoundContext::decode(SECRET, NAMESPACE, TOKEN, &bytes) {
                prop_assert_eq!(encode(&context), bytes);
            }
        }
    }

    #[test]
    fn the_longest_context_is_within_the_bound() {
        let dot = |i: usize| Dot {
            origin: OriginId(u32::MAX - u32::try_from(i).unwrap()),
            sequence: u64::MAX,
        };
        let vector = (0..CONTEXT_ENTRIES_MAX).map(dot).collect();
        let context = Context { vector, timestamp: Timestamp::MAX };
        let bytes = encode(&BoundContext { context, epoch: u64::MAX });
        assert!(bytes.len() <= CONTEXT_SIZE_MAX);
        assert!(BoundContext::decode(SECRET, NAMESPACE, TOKEN, &bytes).is_ok());
        let too_long = vec![1; CONTEXT_SIZE_MAX + 1];
        let refused = BoundContext::decode(SECRET, NAMESPACE, TOKEN, &too_long);
        assert_eq!(refused, Err(BadContext::Malformed("too long")));
    }

    #[test]
    fn a_write_that_was_never_made_is_refused_and_an_unknown_origin_kept() {
        let dot = |origin, sequence| Dot { origin: OriginId(origin), sequence };
        let vector = [dot(1, 10), dot(2, 1000)].into_iter().collect();
        let context = Context { vector, timestamp: Timestamp(0) };
        let bound = BoundContext { context, epoch: 0 };
        let issued = |last| move |origin| (origin == OriginId(1)).then_some(last);
        assert_eq!(bound.check_issued(issued(10)), Ok(()));
        assert_eq!(bound.check_issued(issued(9)), Err(BadContext::NeverIssued(dot(1, 10))));
    }

    #[test]
    fn siphash_gives_the_papers_example() {
        // Appendix A: key 00..0f, input 00..0e.
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let input: Vec<u8> = (0..15).collect();
        assert_eq!(siphash(key, &input), 0xa129_ca61_49be_45e5);
    }

    #[test]
    fn the_format_is_version_1() {
        let vector = [Dot { origin: OriginId(300), sequence: 2 }].into_iter().collect();
        let context = Context { vector, timestamp: Timestamp(0x0102) };
        let bytes = encode(&BoundContext { context, epoch: 130 });
        let body = [1, 0x82, 1, 2, 1, 0, 0, 0, 0, 0, 0, 1, 0xac, 2, 2];
        assert_eq!(bytes[..15], body);
        assert_eq!(bytes[15..], [83, 218, 215, 251, 5, 229, 70, 42]);
    }
}
