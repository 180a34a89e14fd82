//! The peers' handshake: what shards of different nodes say before their first message.
//!
//! Invariant: both ends know that they belong to one cluster, agree on its members and on where
//! keys live, and mean each other, before a message is handled; whoever does not is refused by
//! its first frame, with a reason. Frames are those of clients, with opcodes of their own.
//!
//! PEER_HELLO, from the shard that dials, always of 80 bytes in version 1:
//!
//! | offset | size | field          | meaning                                                |
//! |--------|------|----------------|--------------------------------------------------------|
//! | 0      | 8    | magic          | `ANNULUSP`                                             |
//! | 8      | 2    | version        | 1                                                      |
//! | 10     | 1    | lane           | 0 foreground, 1 background                             |
//! | 11     | 1    | partition_bits | the ring has 2^bits partitions                         |
//! | 12     | 4    | node           | who dials                                              |
//! | 16     | 16   | cluster        | id of the cluster                                      |
//! | 32     | 8    | hash_seed      | of the cluster                                         |
//! | 40     | 8    | members_digest | of the members as the dialling node knows them         |
//! | 48     | 8    | life           | how often that node has started; never goes back       |
//! | 56     | 4    | shard          | which of its shards dials                              |
//! | 60     | 4    | shard_count    | how many it has                                        |
//! | 64     | 4    | wanted_node    | who should answer                                      |
//! | 68     | 4    | wanted_shard   | which of its shards                                    |
//! | 72     | 8    | reserved       | 0                                                      |
//!
//! PEER_WELCOME, the answer, 56 bytes:
//!
//! | offset | size | field       | meaning                                                   |
//! |--------|------|-------------|-----------------------------------------------------------|
//! | 0      | 16   | cluster     | id of the cluster                                         |
//! | 16     | 4    | node        | who answers                                               |
//! | 20     | 4    | shard       | which of its shards                                       |
//! | 24     | 4    | shard_count | how many it has                                           |
//! | 28     | 4    | reserved    | 0                                                         |
//! | 32     | 8    | life        | how often that node has started                           |
//! | 40     | 8    | session     | drawn by chance: the stream position of the first message |
//! | 48     | 8    | reserved    | 0                                                         |

use annulus_engine::model::OriginId;

use super::codec::{Malformed, Reader, Write};
use super::frame::{Opcode, REPLY};

/// Opcode of a message.
pub const PEER_MESSAGE: u8 = 0x40;
/// Opcode of the handshake; the answer has [`REPLY`] set.
pub const PEER_HELLO: u8 = 0x41;
/// Opcode of the answer.
pub const PEER_WELCOME: u8 = PEER_HELLO | REPLY;
/// Opcode of the last frame of a listener that ends a connection: `code` is the [`PeerRefusal`],
/// the body its text.
pub const PEER_CLOSE: u8 = Opcode::Close as u8 | REPLY;
/// First bytes of a PEER_HELLO.
pub const PEER_MAGIC: [u8; 8] = *b"ANNULUSP";
/// The version of the peers' protocol spoken here.
pub const PEER_VERSION: u16 = 1;
/// Lanes are numbered from 0 to below this.
pub const PEER_LANES: u8 = 2;
/// Size of a PEER_HELLO of this version, in bytes.
pub const PEER_HELLO_SIZE: usize = 80;
/// Size of a PEER_WELCOME, in bytes.
pub const PEER_WELCOME_SIZE: usize = 56;
/// Largest body before the handshake is done, in bytes: a later version's may be longer.
pub const PEER_HANDSHAKE_BODY_MAX: usize = 1024;

macro_rules! refusals {
    ($($(#[doc = $doc:literal])* $name:ident = $number:literal, $label:literal, $text:literal;)*) => {
        /// Why a connection between peers was not made, or ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        #[repr(u8)]
        pub enum PeerRefusal {
            $($(#[doc = $doc])* #[error($text)] $name = $number,)*
        }

        impl PeerRefusal {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [PeerRefusal] = &[$(PeerRefusal::$name),*];

            /// A short name, for counters.
            #[must_use]
            pub fn label(self) -> &'static str {
                match self { $(PeerRefusal::$name => $label,)* }
            }
        }
    };
}

refusals! {
    /// The first frame is no PEER_HELLO: a client, or a stranger.
    NoHello = 0, "no_hello", "the first frame must be PEER_HELLO";
    /// The PEER_HELLO breaks the format's rules.
    BadHello = 1, "bad_hello", "the PEER_HELLO is malformed";
    /// Another version of the protocol.
    Version = 2, "version", "no common protocol version";
    /// Another cluster.
    Cluster = 3, "cluster", "this node belongs to another cluster";
    /// The members, the seed or the number of partitions differ.
    Digest = 4, "digest", "the nodes disagree about members, seed or partitions";
    /// Not a member, or the node itself, or another node was meant.
    Node = 5, "node", "not a member, or another node was meant";
    /// The node, or the dialling one by its own word, has no such shard.
    Shard = 6, "shard", "no such shard";
    /// No such lane.
    Lane = 7, "lane", "no such lane";
    /// An earlier life of a node that has started again since: a replay, or a copy of it.
    Life = 8, "life", "the node has started again since";
    /// A second PEER_HELLO.
    RepeatedHello = 9, "repeated_hello", "PEER_HELLO came twice";
    /// A frame fails its checksum: damaged, doubled, lost, or of another connection.
    Checksum = 10, "checksum", "a frame fails its checksum, or is of another connection";
    /// A frame or message is larger than the limit.
    TooBig = 11, "too_big", "a frame or message is larger than the limit";
    /// A slice contradicts the slices before it.
    BadSlice = 12, "bad_slice", "a slice does not continue its message";
    /// A frame that has no place there.
    Unexpected = 13, "unexpected", "a frame that has no place there";
    /// The handshake took too long.
    HandshakeTimeout = 14, "handshake_timeout", "the handshake was not finished in time";
    /// A frame or message was begun and not finished.
    MessageTimeout = 15, "message_timeout", "a message was not finished in time";
    /// Another connection of the same shard and lane took its place.
    Replaced = 16, "replaced", "a newer connection took its place";
    /// Too many connections whose handshake is not done.
    TooMany = 17, "too_many", "too many unfinished handshakes";
    /// The node is stopping.
    Draining = 18, "draining", "the node is stopping";
}

impl PeerRefusal {
    /// How many there are.
    pub const COUNT: usize = PeerRefusal::ALL.len();

    /// The number, as in a PEER_CLOSE.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The reason with this number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<PeerRefusal> {
        PeerRefusal::ALL.get(usize::from(number)).copied()
    }
}

/// The first frame of a shard that dials another node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is documented in the module's table")]
pub struct PeerHello {
    pub lane: u8,
    pub partition_bits: u8,
    pub node: OriginId,
    pub cluster: u128,
    pub hash_seed: u64,
    pub members_digest: u64,
    pub life: u64,
    pub shard: u32,
    pub shard_count: u32,
    pub wanted_node: OriginId,
    pub wanted_shard: u32,
}

impl PeerHello {
    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put(&PEER_MAGIC);
        out.put_u16(PEER_VERSION);
        out.put_u8(self.lane);
        out.put_u8(self.partition_bits);
        out.put_u32(self.node.0);
        out.put_u128(self.cluster);
        out.put_u64(self.hash_seed);
        out.put_u64(self.members_digest);
        out.put_u64(self.life);
        out.put_u32(self.shard);
        out.put_u32(self.shard_count);
        out.put_u32(self.wanted_node.0);
        out.put_u32(self.wanted_shard);
        out.put_u64(0);
    }

    /// Reads the body.
    ///
    /// # Errors
    /// `NoHello` for something else, `Version` for another version whatever its layout,
    /// `BadHello` for what breaks this one's rules.
    pub fn decode(body: &[u8]) -> Result<PeerHello, PeerRefusal> {
        let mut reader = Reader::new(body);
        if reader.array::<8>() != Ok(PEER_MAGIC) {
            return Err(PeerRefusal::NoHello);
        }
        match reader.u16() {
            Ok(PEER_VERSION) => {}
            Ok(_) => return Err(PeerRefusal::Version),
            Err(_) => return Err(PeerRefusal::BadHello),
        }
        PeerHello::fields(reader).map_err(|_| PeerRefusal::BadHello)
    }

    fn fields(mut reader: Reader<'_>) -> Result<PeerHello, Malformed> {
        let hello = PeerHello {
            lane: reader.u8()?,
            partition_bits: reader.u8()?,
            node: OriginId(reader.u32()?),
            cluster: reader.u128()?,
            hash_seed: reader.u64()?,
            members_digest: reader.u64()?,
            life: reader.u64()?,
            shard: reader.u32()?,
            shard_count: reader.u32()?,
            wanted_node: OriginId(reader.u32()?),
            wanted_shard: reader.u32()?,
        };
        reader.reserved(8)?;
        reader.finish()?;
        Ok(hello)
    }
}

/// The answer to a [`PeerHello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is documented in the module's table")]
pub struct PeerWelcome {
    pub cluster: u128,
    pub node: OriginId,
    pub shard: u32,
    pub shard_count: u32,
    pub life: u64,
    pub session: u64,
}

impl PeerWelcome {
    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u128(self.cluster);
        out.put_u32(self.node.0);
        out.put_u32(self.shard);
        out.put_u32(self.shard_count);
        out.put_u32(0);
        out.put_u64(self.life);
        out.put_u64(self.session);
        out.put_u64(0);
    }

    /// Reads the body.
    ///
    /// # Errors
    /// [`Malformed`]: this is no PEER_WELCOME.
    pub fn decode(body: &[u8]) -> Result<PeerWelcome, Malformed> {
        let mut reader = Reader::new(body);
        let (cluster, node) = (reader.u128()?, OriginId(reader.u32()?));
        let (shard, shard_count) = (reader.u32()?, reader.u32()?);
        reader.reserved(4)?;
        let (life, session) = (reader.u64()?, reader.u64()?);
        reader.reserved(8)?;
        reader.finish()?;
        Ok(PeerWelcome { cluster, node, shard, shard_count, life, session })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_hello_reads_back(bytes: [u8; 2], a: [u32; 5], b: [u64; 3], cluster: u128) {
            let hello = PeerHello {
                lane: bytes[0], partition_bits: bytes[1], node: OriginId(a[0]), cluster,
                hash_seed: b[0], members_digest: b[1], life: b[2], shard: a[1],
                shard_count: a[2], wanted_node: OriginId(a[3]), wanted_shard: a[4],
            };
            let mut body = Vec::new();
            hello.encode(&mut body);
            prop_assert_eq!(body.len(), PEER_HELLO_SIZE);
            prop_assert_eq!(PeerHello::decode(&body), Ok(hello));
            prop_assert!(PeerHello::decode(&body[..79]).is_err());
            body[75] = 1;
            prop_assert_eq!(PeerHello::decode(&body), Err(PeerRefusal::BadHello));
        }

        #[test]
        fn a_welcome_reads_back(cluster: u128, a: [u32; 3], b: [u64; 2]) {
            let welcome = PeerWelcome { cluster, node: OriginId(a[0]), shard: a[1],
                shard_count: a[2], life: b[0], session: b[1] };
            let mut body = Vec::new();
            welcome.encode(&mut body);
            prop_assert_eq!(body.len(), PEER_WELCOME_SIZE);
            prop_assert_eq!(PeerWelcome::decode(&body), Ok(welcome));
        }

        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = PeerHello::decode(&bytes);
            let _ = PeerWelcome::decode(&bytes);
        }
    }

    #[test]
    fn reasons_are_known_by_their_numbers_and_have_names_of_their_own() {
        let labels: std::collections::BTreeSet<&str> =
            PeerRefusal::ALL.iter().map(|refusal| refusal.label()).collect();
        assert_eq!(labels.len(), PeerRefusal::COUNT);
        for refusal in PeerRefusal::ALL {
            assert_eq!(PeerRefusal::from_number(refusal.number()), Some(*refusal));
        }
        assert_eq!(PeerRefusal::from_number(u16::MAX), None);
    }
}
