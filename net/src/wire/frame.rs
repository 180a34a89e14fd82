//! The frame header: 24 bytes before every body, in both directions.
//!
//! Invariant: the header's checksum covers the position of the frame in the stream as well as
//! its bytes, so a frame that is lost, doubled or moved fails like a flipped bit; and the header
//! is checked by itself, so the body's size is trusted before the body has arrived. The body's
//! own checksum lies in the header and is covered by it.

use super::codec::Malformed;
use super::status::Status;

/// Size of the header of a frame, in bytes.
pub const HEADER_SIZE: usize = 24;
/// Largest body of one frame, in bytes. Longer messages are cut into slices.
pub const FRAME_BODY_MAX: usize = 32 << 10;
/// What a slice spends on saying where it belongs: total size and offset, 4 bytes each.
pub const SLICE_HEADER_SIZE: usize = 8;
/// Largest piece of a message in one slice, in bytes.
pub const SLICE_SIZE: usize = FRAME_BODY_MAX - SLICE_HEADER_SIZE;
/// Set in the opcode of every reply.
pub const REPLY: u8 = 0x80;

/// Flags of a frame. Bits without a name are zero, and refused otherwise.
pub mod flag {
    /// The body is a slice of a longer message.
    pub const SLICE: u8 = 1 << 0;
    /// Reply: the body begins with a row of the partition map, because the client's is old.
    pub const ROUTE: u8 = 1 << 1;
    /// The body is compressed with LZ4. Reserved: refused until the feature exists.
    pub const COMPRESSED: u8 = 1 << 2;
    /// Reply: the key is hot; the client should coalesce its concurrent reads.
    pub const HOT: u8 = 1 << 3;
    /// The flags that this version understands.
    pub const KNOWN: u8 = SLICE | ROUTE | HOT;
}

/// What a message asks for. A reply carries its request's opcode with [`REPLY`] set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// First message of a connection: versions, features, limits, the partition map.
    Hello = 1,
    /// Is anybody there? The body comes back.
    Ping = 2,
    /// Read a key.
    Get = 3,
    /// Write a key.
    Put = 4,
    /// Delete a key.
    Delete = 5,
    /// Several of the three above, each with its own result.
    Batch = 6,
    /// Records of a token range, page by page.
    Scan = 7,
    /// Counters, as JSON.
    Stats = 8,
    /// A named command with JSON both ways.
    Admin = 9,
    /// Server to client only, request id 0: the connection ends, and why.
    Close = 0x7f,
}

impl Opcode {
    /// The opcode with this number, the reply bit taken off.
    #[inline]
    #[must_use]
    pub fn from_u8(byte: u8) -> Option<Opcode> {
        Some(match byte & !REPLY {
            1 => Opcode::Hello,
            2 => Opcode::Ping,
            3 => Opcode::Get,
            4 => Opcode::Put,
            5 => Opcode::Delete,
            6 => Opcode::Batch,
            7 => Opcode::Scan,
            8 => Opcode::Stats,
            9 => Opcode::Admin,
            0x7f => Opcode::Close,
            _ => return None,
        })
    }

    /// The number of a request.
    #[inline]
    #[must_use]
    pub fn request(self) -> u8 {
        self as u8
    }

    /// The number of a reply.
    #[inline]
    #[must_use]
    pub fn reply(self) -> u8 {
        self as u8 | REPLY
    }
}

/// Header of a frame.
///
/// | offset | size | field           | meaning                                                  |
/// |--------|------|-----------------|----------------------------------------------------------|
/// | 0      | 4    | body_size       | bytes after this header, at most 32 KiB                  |
/// | 4      | 4    | request_id      | chosen by the client, unique among its unanswered ones   |
/// | 8      | 4    | time_or_window  | request: microseconds left, 0 = server's default; reply: requests the client may have unanswered |
/// | 12     | 2    | code            | request: routing hint; reply: [`Status`]                 |
/// | 14     | 1    | opcode          | [`Opcode`], with [`REPLY`] set in replies                |
/// | 15     | 1    | flags           | [`flag`]                                                 |
/// | 16     | 4    | body_checksum   | CRC32C of the body; 0 when it is empty                   |
/// | 20     | 4    | header_checksum | CRC32C of these 24 bytes, with the low 32 bits of the frame's stream position in this field's place |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FrameHeader {
    /// Bytes of the body that follows.
    pub body_size: u32,
    /// The request that this frame is, or answers.
    pub request_id: u32,
    /// Request: microseconds left until its deadline, 0 for the server's default. Reply: how many
    /// requests the client may have unanswered on this connection.
    pub time_or_window: u32,
    /// Request: bits 0..4 index of the replica chosen, bits 4..8 low bits of the partition's map
    /// version, rest 0. Reply: [`Status`].
    pub code: u16,
    /// See [`Opcode`].
    pub opcode: u8,
    /// See [`flag`].
    pub flags: u8,
    /// CRC32C of the body.
    pub body_checksum: u32,
}

impl FrameHeader {
    /// The header's bytes for a frame that starts at `position` of its stream.
    #[inline]
    #[must_use]
    pub fn encode(&self, position: u64) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..4].copy_from_slice(&self.body_size.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.request_id.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.time_or_window.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.code.to_le_bytes());
        bytes[14] = self.opcode;
        bytes[15] = self.flags;
        bytes[16..20].copy_from_slice(&self.body_checksum.to_le_bytes());
        let sum = checksum(&bytes, position);
        bytes[20..24].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Checks and reads the header of the frame that starts at `position` of its stream.
    ///
    /// # Errors
    /// [`FrameError`]: the stream cannot be trusted from here on; the connection must be closed.
    #[inline]
    pub fn decode(bytes: &[u8; HEADER_SIZE], position: u64) -> Result<FrameHeader, FrameError> {
        let four = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if checksum(bytes, position) != four(20) {
            return Err(FrameError::HeaderChecksum);
        }
        let header = FrameHeader {
            body_size: four(0),
            request_id: four(4),
            time_or_window: four(8),
            code: u16::from_le_bytes([bytes[12], bytes[13]]),
            opcode: bytes[14],
            flags: bytes[15],
            body_checksum: four(16),
        };
        if header.body_size as usize > FRAME_BODY_MAX {
            return Err(FrameError::BodyTooBig);
        }
        if header.flags & !flag::KNOWN != 0 {
            return Err(FrameError::UnknownFlags);
        }
        Ok(header)
    }

    /// The status of a reply.
    #[must_use]
    pub fn status(&self) -> Status {
        Status(self.code)
    }

    /// Whether the body is a slice of a longer message.
    #[inline]
    #[must_use]
    pub fn is_slice(&self) -> bool {
        self.flags & flag::SLICE != 0
    }

    /// Size of the frame, header and body, in bytes.
    #[inline]
    #[must_use]
    pub fn frame_size(&self) -> usize {
        HEADER_SIZE + self.body_size as usize
    }
}

/// The header's checksum: the position takes the place of the checksum itself, so that the sum
/// is over three whole words.
#[inline]
fn checksum(bytes: &[u8; HEADER_SIZE], position: u64) -> u32 {
    // Aligned, so that the hardware takes eight bytes a step from the first on.
    #[repr(align(8))]
    struct Words([u8; HEADER_SIZE]);
    let mut words = Words(*bytes);
    words.0[20..24].copy_from_slice(&position.to_le_bytes()[..4]);
    crc32c::crc32c(&words.0)
}

/// The stream of frames is broken: what follows cannot be trusted, the connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header, or its place in the stream, is not what was sent.
    #[error("frame header fails its checksum")]
    HeaderChecksum,
    /// The body is not what was sent.
    #[error("frame body fails its checksum")]
    BodyChecksum,
    /// The header announces more than a frame may hold.
    #[error("frame body is larger than the limit")]
    BodyTooBig,
    /// The header has flags that this version does not know.
    #[error("frame has unknown flags")]
    UnknownFlags,
    /// A slice contradicts the slices before it, or its message's announced size.
    #[error("slice does not continue its message")]
    BadSlice,
    /// A request where a reply belongs, or the other way round.
    #[error("frame goes the wrong way")]
    WrongDirection,
    /// Something else than HELLO came first.
    #[error("the first frame must be HELLO")]
    NoHello,
    /// The first frame is not a HELLO of this protocol.
    #[error("the HELLO is malformed")]
    BadHello,
}

impl From<Malformed> for FrameError {
    fn from(_: Malformed) -> FrameError {
        FrameError::BadSlice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> FrameHeader {
        FrameHeader {
            body_size: 36,
            request_id: 7,
            time_or_window: 1_000_000,
            code: 0x12,
            opcode: Opcode::Get.request(),
            flags: 0,
            body_checksum: 0xdead_beef,
        }
    }

    proptest! {
        #[test]
        fn a_header_reads_back(body_size in 0..=FRAME_BODY_MAX, request_id: u32, time: u32, code: u16,
                               opcode: u8, flags: u8, body_checksum: u32, position: u64) {
            let body_size = u32::try_from(body_size).unwrap();
            let header = FrameHeader { body_size, request_id, time_or_window: time, code, opcode,
                flags: flags & flag::KNOWN, body_checksum };
            prop_assert_eq!(FrameHeader::decode(&header.encode(position), position), Ok(header));
        }

        #[test]
        fn any_flipped_bit_is_found(bit in 0usize..HEADER_SIZE * 8) {
            let mut bytes = header().encode(99);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(FrameHeader::decode(&bytes, 99), Err(FrameError::HeaderChecksum));
        }

        #[test]
        fn a_frame_at_another_position_is_found(a: u32, b: u32) {
            prop_assume!(a != b);
            let bytes = header().encode(u64::from(a));
            prop_assert_eq!(FrameHeader::decode(&bytes, u64::from(b)), Err(FrameError::HeaderChecksum));
        }
    }

    #[test]
    fn limits_hold_even_when_the_checksum_is_right() {
        let large = FrameHeader { body_size: 1 + (32 << 10), ..header() };
        assert_eq!(FrameHeader::decode(&large.encode(0), 0), Err(FrameError::BodyTooBig));
        let strange = FrameHeader { flags: flag::COMPRESSED, ..header() };
        assert_eq!(FrameHeader::decode(&strange.encode(0), 0), Err(FrameError::UnknownFlags));
    }

    #[test]
    fn the_checksum_is_the_one_that_the_readme_names() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c::crc32c(b""), 0);
        // By hand: the position stands where the checksum goes.
        let bytes = header().encode(0x1_0000_0007);
        let mut by_hand = bytes;
        by_hand[20..].copy_from_slice(&7u32.to_le_bytes());
        assert_eq!(bytes[20..], crc32c::crc32c(&by_hand).to_le_bytes());
    }

    #[test]
    fn every_opcode_reads_back() {
        for byte in 0..=u8::MAX {
            if let Some(opcode) = Opcode::from_u8(byte) {
                assert_eq!(opcode.request(), byte & !REPLY);
                assert_eq!(opcode.reply(), byte | REPLY);
            }
        }
    }
}
