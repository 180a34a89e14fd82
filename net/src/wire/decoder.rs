//! `FrameDecoder`: bytes in, whole and checked frames out. First step of the read path.
//!
//! Invariant: the frames are the same however the bytes are cut. A frame that is whole in the
//! given bytes is borrowed from them (no copy); only a frame cut by the end of the bytes is
//! gathered in `partial`, which never holds more than one frame (24 bytes + 32 KiB).

use super::frame::{FRAME_BODY_MAX, FrameError, FrameHeader, HEADER_SIZE};

/// A whole frame whose checksums are right.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The header.
    pub header: FrameHeader,
    /// The body, `header.body_size` bytes.
    pub body: &'a [u8],
    /// Header and body as they came.
    pub raw: &'a [u8],
}

/// Cuts one direction of a connection into frames.
#[derive(Debug)]
pub struct FrameDecoder {
    /// Stream position of the next frame: bytes of all frames taken before it.
    position: u64,
    /// The beginning of a frame that has not arrived in full.
    partial: Vec<u8>,
    /// `partial` is a frame that was handed out; it is cleared at the next call.
    handed_out: bool,
    /// Largest body accepted, in bytes; at most [`FRAME_BODY_MAX`].
    body_size_max: usize,
}

impl Default for FrameDecoder {
    fn default() -> FrameDecoder {
        FrameDecoder {
            position: 0,
            partial: Vec::new(),
            handed_out: false,
            body_size_max: FRAME_BODY_MAX,
        }
    }
}

/// Capacity that an empty `partial` may keep, so that idle connections stay small.
const PARTIAL_KEPT: usize = 512;

impl FrameDecoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> FrameDecoder {
        FrameDecoder::default()
    }

    /// Changes the largest body accepted, for frames whose header has not been read yet.
    pub fn set_body_size_max(&mut self, bytes: usize) {
        self.body_size_max = bytes.min(FRAME_BODY_MAX);
    }

    /// Takes the next whole frame from `input`, which moves on to what follows it. `None`: all
    /// bytes are consumed, and kept if they begin a frame.
    ///
    /// # Errors
    /// [`FrameError`]: the stream is broken; the decoder must not be used again.
    #[inline]
    pub fn next<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Frame<'a>>, FrameError> {
        if self.handed_out {
            self.handed_out = false;
            self.partial.clear();
            self.partial.shrink_to(PARTIAL_KEPT);
        }
        if !self.partial.is_empty() {
            return self.next_gathered(input);
        }
        let bytes = *input;
        let Some(head) = bytes.first_chunk::<HEADER_SIZE>() else {
            return self.gather(input);
        };
        let header = self.header(head)?;
        let size = header.frame_size();
        let Some((raw, rest)) = bytes.split_at_checked(size) else {
            return self.gather(input);
        };
        *input = rest;
        self.position = self.position.wrapping_add(size as u64);
        Ok(Some(checked(header, raw)?))
    }

    /// Whether a frame has begun and not ended.
    #[must_use]
    pub fn is_inside_frame(&self) -> bool {
        !self.partial.is_empty() && !self.handed_out
    }

    /// Bytes of memory held for an unfinished frame.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.partial.capacity()
    }

    /// Stream position of the next frame.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Both ends have agreed that the stream goes on at another position. Only between frames.
    pub fn set_position(&mut self, position: u64) {
        debug_assert!(!self.is_inside_frame(), "a frame has been checked already");
        self.position = position;
    }

    #[inline]
    fn header(&self, head: &[u8; HEADER_SIZE]) -> Result<FrameHeader, FrameError> {
        let header = FrameHeader::decode(head, self.position)?;
        if header.body_size as usize > self.body_size_max {
            return Err(FrameError::BodyTooBig);
        }
        Ok(header)
    }

    /// Keeps what is left of the input: the beginning of a frame, or nothing.
    #[cold]
    fn gather<'a>(&'a mut self, input: &mut &[u8]) -> Result<Option<Frame<'a>>, FrameError> {
        self.partial.extend_from_slice(std::mem::take(input));
        Ok(None)
    }

    /// Goes on with the frame in `partial`, taking no more than it needs.
    #[cold]
    fn next_gathered<'a>(&'a mut self, input: &mut &[u8]) -> Result<Option<Frame<'a>>, FrameError> {
        self.fill(input, HEADER_SIZE);
        let Some(head) = self.partial.first_chunk::<HEADER_SIZE>() else {
            return Ok(None);
        };
        // Checked again with each piece that arrives: at most once per receive, and the header
        // of a broken frame is refused before its body is waited for.
        let header = self.header(head)?;
        let size = header.frame_size();
        self.fill(input, size);
        if self.partial.len() < size {
            return Ok(None);
        }
        self.position = self.position.wrapping_add(size as u64);
        self.handed_out = true;
        Ok(Some(checked(header, &self.partial)?))
    }

    /// Moves bytes from the input until `partial` has `size` of them.
    fn fill(&mut self, input: &mut &[u8], size: usize) {
        let wanted = size.saturating_sub(self.partial.len()).min(input.len());
        let (head, rest) = input.split_at(wanted);
        self.partial.extend_from_slice(head);
        *input = rest;
    }
}

/// The frame, if its body is what was sent.
#[inline]
fn checked(header: FrameHeader, raw: &[u8]) -> Result<Frame<'_>, FrameError> {
    let body = &raw[HEADER_SIZE..];
    if crc32c::crc32c(body) != header.body_checksum {
        return Err(FrameError::BodyChecksum);
    }
    Ok(Frame { header, body, raw })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(bodies: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, body) in bodies.iter().enumerate() {
            let header = FrameHeader {
                body_size: u32::try_from(body.len()).unwrap(),
                request_id: u32::try_from(index).unwrap(),
                body_checksum: crc32c::crc32c(body),
                opcode: 2,
                ..FrameHeader::default()
            };
            let position = bytes.len() as u64;
            bytes.extend_from_slice(&header.encode(position));
            bytes.extend_from_slice(body);
        }
        bytes
    }

    fn take_all(decoder: &mut FrameDecoder, mut input: &[u8], frames: &mut Vec<(u32, Vec<u8>)>) {
        while let Some(frame) = decoder.next(&mut input).unwrap() {
            assert_eq!(frame.raw.len(), frame.header.frame_size());
            frames.push((frame.header.request_id, frame.body.to_vec()));
        }
        assert!(input.is_empty());
    }

    proptest! {
        #[test]
        fn split_anywhere_gives_the_same_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..6),
            cuts in prop::collection::vec(0usize..600, 0..10),
        ) {
            let bytes = stream(&bodies);
            let mut whole = Vec::new();
            take_all(&mut FrameDecoder::new(), &bytes, &mut whole);
            prop_assert_eq!(whole.len(), bodies.len());

            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.sort_unstable();
            let (mut pieces, mut decoder, mut start) = (Vec::new(), FrameDecoder::new(), 0);
            for cut in cuts.into_iter().chain([bytes.len()]) {
                take_all(&mut decoder, &bytes[start..cut], &mut pieces);
                start = cut;
            }
            prop_assert!(!decoder.is_inside_frame());
            prop_assert_eq!(pieces, whole);
        }

        #[test]
        fn random_bytes_never_panic_and_never_gather_more_than_a_frame(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)
        ) {
            let mut decoder = FrameDecoder::new();
            'pieces: for piece in &pieces {
                let mut input = &piece[..];
                loop {
                    match decoder.next(&mut input) {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'pieces,
                    }
                }
            }
            prop_assert!(decoder.memory() <= 2 * (HEADER_SIZE + FRAME_BODY_MAX));
        }

        #[test]
        fn any_flipped_bit_of_a_stream_is_found(bit in 0usize..(24 + 9) * 8) {
            let mut bytes = stream(&[b"nine byte".to_vec()]);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut input = &bytes[..];
            prop_assert!(FrameDecoder::new().next(&mut input).is_err());
        }
    }

    #[test]
    fn one_byte_at_a_time_gives_the_frames() {
        let bytes = stream(&[b"first".to_vec(), Vec::new(), vec![7; 1000]]);
        let (mut decoder, mut frames) = (FrameDecoder::new(), Vec::new());
        for byte in &bytes {
            take_all(&mut decoder, std::slice::from_ref(byte), &mut frames);
        }
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[2].1, vec![7; 1000]);
    }

    #[test]
    fn a_doubled_frame_is_found() {
        let bytes = stream(&[b"again".to_vec()]);
        let doubled = [&bytes[..], &bytes[..]].concat();
        let (mut decoder, mut input) = (FrameDecoder::new(), &doubled[..]);
        assert!(decoder.next(&mut input).unwrap().is_some());
        assert_eq!(decoder.next(&mut input).unwrap_err(), FrameError::HeaderChecksum);
    }
}
