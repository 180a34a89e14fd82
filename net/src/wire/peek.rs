//! A look ahead into received bytes: the tokens of the keys that will be asked for, so that their
//! memory is on its way before the first request is answered.
//!
//! Invariant: a hint and nothing else. Nothing is checked, any bytes will do, and whatever comes
//! out is only good for a prefetch. Costs about 8 ns a request and saves two cache misses.

use annulus_engine::model::Token;

use super::frame::HEADER_SIZE;
use super::operation::OPERATION_HEADER_SIZE;

/// Bits of an operation's flags that announce a field in front of the key.
const FIELDS: u16 = 0b1_1111_0000;

/// Calls `visit` with the token of each plain GET, PUT or DELETE frame in `bytes`, as if a frame
/// began at their start.
#[inline]
pub fn tokens(bytes: &[u8], hash_seed: u64, visit: &mut impl FnMut(Token)) {
    let mut rest = bytes;
    while let Some(head) = rest.first_chunk::<{ HEADER_SIZE + OPERATION_HEADER_SIZE }>() {
        let body_size = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if let 3..=5 = head[14]
            && u16::from_le_bytes([head[HEADER_SIZE + 8], head[HEADER_SIZE + 9]]) & FIELDS == 0
        {
            let key_size =
                usize::from(u16::from_le_bytes([head[HEADER_SIZE + 10], head[HEADER_SIZE + 11]]));
            let Some(key) = rest[head.len()..].get(..key_size) else { return };
            visit(Token::of_key(key, hash_seed));
        }
        let Some(next) = rest.get(HEADER_SIZE + body_size..) else { return };
        rest = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::FrameHeader;
    use crate::wire::operation::{Get, Operation};
    use annulus_engine::model::NamespaceId;
    use proptest::prelude::*;

    fn frame(key: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        let get = Get {
            token: Token::MIN,
            namespace: NamespaceId(0),
            key,
            level: Default::default(),
            primary: Default::default(),
            max_staleness_ms: 0,
            flags: Default::default(),
        };
        Operation::Get(get).encode(&mut body);
        let body_size = u32::try_from(body.len()).unwrap();
        let header = FrameHeader { body_size, opcode: 3, ..FrameHeader::default() };
        [&header.encode(0)[..], &body].concat()
    }

    #[test]
    fn the_tokens_are_those_of_the_keys() {
        let bytes = [frame(b"one"), frame(b"two"), frame(b"three")].concat();
        let mut seen = Vec::new();
        tokens(&bytes[..bytes.len() - 1], 7, &mut |token| seen.push(token));
        assert_eq!(seen, [Token::of_key(b"one", 7), Token::of_key(b"two", 7)]);
    }

    proptest! {
        #[test]
        fn any_bytes_will_do(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            tokens(&bytes, 1, &mut |_| {});
        }
    }
}
