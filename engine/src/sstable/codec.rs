//! Packing and unpacking of block payloads.
//!
//! Invariant: unpacking writes at most the length that the block's checked header declares, and
//! that length is compared with `RAW_LEN_MAX` before anything is allocated. Used by `block.rs`.

use std::cell::RefCell;

use lz4_flex::block::CompressTable;
use zstd::bulk::{Compressor, Decompressor};

use super::format::{Codec, Invalid, RAW_LEN_MAX};

/// Packs payloads; one a writer, because the tables of a compressor are worth keeping.
pub(crate) struct Packer {
    lz4: CompressTable,
    zstd: Option<Compressor<'static>>,
    zstd_level: i32,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packer(zstd level {})", self.zstd_level)
    }
}

impl Packer {
    pub(crate) fn new(zstd_level: i32) -> Packer {
        Packer { lz4: CompressTable::large(), zstd: None, zstd_level }
    }

    /// Packs `raw` into `packed`, replacing its content. False when it did not get smaller.
    pub(crate) fn pack(&mut self, codec: Codec, raw: &[u8], packed: &mut Vec<u8>) -> bool {
        let written = match codec {
            Codec::None => None,
            Codec::Lz4 => {
                packed.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                lz4_flex::block::compress_into_with_table(raw, packed, &mut self.lz4).ok()
            }
            Codec::Zstd => self.pack_zstd(raw, packed),
        };
        packed.truncate(written.unwrap_or(0));
        written.is_some_and(|written| written < raw.len())
    }

    fn pack_zstd(&mut self, raw: &[u8], packed: &mut Vec<u8>) -> Option<usize> {
        if self.zstd.is_none() {
            self.zstd = Compressor::new(self.zstd_level).ok();
        }
        // Room for less than the raw bytes: what does not get smaller is not wanted.
        packed.resize(raw.len(), 0);
        self.zstd.as_mut()?.compress_to_buffer(raw, packed.as_mut_slice()).ok()
    }
}

thread_local! {
    /// A decompressor's tables are some 100 KiB: made once a shard.
    static UNPACKER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Unpacks `stored` to exactly `raw_len` bytes.
///
/// # Errors
/// The rule broken, when the bytes are no packed payload of that length.
pub(crate) fn unpack(codec: Codec, stored: &[u8], raw_len: usize) -> Result<Box<[u8]>, Invalid> {
    if raw_len > RAW_LEN_MAX {
        return Err("a block declares more bytes than any block may have");
    }
    let mut raw = vec![0; raw_len].into_boxed_slice();
    let written = match codec {
        Codec::None => return Err("an unpacked block needs no unpacking"),
        Codec::Lz4 => lz4_flex::block::decompress_into(stored, &mut raw).ok(),
        Codec::Zstd => UNPACKER.with_borrow_mut(|slot| {
            if slot.is_none() {
                *slot = Decompressor::new().ok();
            }
            slot.as_mut()?.decompress_to_buffer(stored, &mut raw[..]).ok()
        }),
    };
    match written {
        Some(written) if written == raw_len => Ok(raw),
        _ => Err("a packed block cannot be unpacked to its declared length"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_comes_back(
            seed in prop::collection::vec(any::<u8>(), 1..50), repeat in 1usize..200,
        ) {
            let raw = seed.repeat(repeat);
            for codec in [Codec::Lz4, Codec::Zstd] {
                let mut packed = Vec::new();
                if Packer::new(1).pack(codec, &raw, &mut packed) {
                    prop_assert!(packed.len() < raw.len());
                    let unpacked = unpack(codec, &packed, raw.len()).unwrap();
                    prop_assert_eq!(&unpacked[..], &raw[..]);
                    // A wrong declared length is refused, shorter or longer.
                    prop_assert!(unpack(codec, &packed, raw.len() - 1).is_err());
                    prop_assert!(unpack(codec, &packed, raw.len() + 1).is_err());
                }
            }
        }

        #[test]
        fn any_bytes_are_unpacked_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..300), raw_len in 0usize..5000,
        ) {
            let _ = unpack(Codec::Lz4, &bytes, raw_len);
            let _ = unpack(Codec::Zstd, &bytes, raw_len);
        }
    }

    #[test]
    fn a_bomb_is_refused_before_memory_is_taken() {
        let bytes = vec![0; 8 << 20];
        let mut packed = Vec::new();
        assert!(Packer::new(1).pack(Codec::Zstd, &bytes, &mut packed));
        assert!(unpack(Codec::Zstd, &packed, 4096).is_err());
        assert!(unpack(Codec::Zstd, &packed, RAW_LEN_MAX + 1).is_err());
    }
}
