//! The one checksum of files: CRC32C salted with the data's identity.
//!
//! Invariant: the checksum covers where the bytes belong (file id and offset) as well as what
//! they are, so a block of another file, or of this file's former life, or written to the wrong
//! place, fails its check like a flipped bit. CRC32C is Castagnoli's polynomial, in hardware.

/// Checksum of `bytes` that belong at `offset` of the file with id `file_id`.
#[inline]
#[must_use]
pub fn salted(file_id: u64, offset: u64, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(salt(file_id, offset), bytes)
}

/// Checksum of two parts that follow one another, at `offset` of the file with id `file_id`.
#[inline]
#[must_use]
pub fn salted_parts(file_id: u64, offset: u64, first: &[u8], second: &[u8]) -> u32 {
    crc32c::crc32c_append(salted(file_id, offset, first), second)
}

/// The checksum of what `sum` is the checksum of, and these bytes behind it.
#[inline]
#[must_use]
pub fn proceed(sum: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(sum, bytes)
}

/// The salt: a multiply spreads id and offset over 32 bits, so that neighbours differ in many.
#[inline]
fn salt(file_id: u64, offset: u64) -> u32 {
    let mixed = (file_id ^ offset.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    u32::try_from((mixed ^ (mixed >> 29)) >> 32).expect("shifted to 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_salt_tells_files_and_offsets_apart() {
        let sum = salted(1, 4096, b"block");
        assert_ne!(sum, salted(2, 4096, b"block"));
        assert_ne!(sum, salted(1, 8192, b"block"));
        assert_ne!(sum, salted(1, 4096, b"blocl"));
        assert_eq!(sum, salted_parts(1, 4096, b"bl", b"ock"));
        assert_eq!(sum, proceed(salted(1, 4096, b"bl"), b"ock"));
    }
}
