//! Bounded readers and writers of little-endian fields over slices.
//!
//! Invariant: a [`Reader`] never reads past its slice and never allocates; what is missing is an
//! error that names the field's kind. No recursion, so no input can exhaust the stack.

/// Why a body could not be read: the first rule broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// Reads fields from the front of a slice.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader of the whole slice.
    #[inline]
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// Bytes not read yet.
    #[inline]
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Everything not read yet.
    #[inline]
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The next `size` bytes.
    ///
    /// # Errors
    /// [`Malformed`] when fewer are left; nothing is consumed.
    #[inline]
    pub fn bytes(&mut self, size: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) =
            self.rest.split_at_checked(size).ok_or(Malformed("body ends inside a field"))?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`Malformed`] when fewer are left; nothing is consumed.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(Malformed("body ends inside a field"))?;
        self.rest = rest;
        Ok(*head)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`Malformed`] when none is left.
    #[inline]
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    /// A 16-bit integer.
    ///
    /// # Errors
    /// [`Malformed`] when fewer than 2 bytes are left.
    #[inline]
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// A 32-bit integer.
    ///
    /// # Errors
    /// [`Malformed`] when fewer than 4 bytes are left.
    #[inline]
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A 64-bit integer.
    ///
    /// # Errors
    /// [`Malformed`] when fewer than 8 bytes are left.
    #[inline]
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A 128-bit integer.
    ///
    /// # Errors
    /// [`Malformed`] when fewer than 16 bytes are left.
    #[inline]
    pub fn u128(&mut self) -> Result<u128, Malformed> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    /// Bytes preceded by their count in 16 bits.
    ///
    /// # Errors
    /// [`Malformed`] when the count or the bytes are missing.
    #[inline]
    pub fn short_bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let size = usize::from(self.u16()?);
        self.bytes(size)
    }

    /// A name of at most `max` bytes: UTF-8 preceded by its size in 16 bits.
    ///
    /// # Errors
    /// [`Malformed`] when it is missing, too long, or not UTF-8.
    pub fn name(&mut self, max: usize) -> Result<&'a str, Malformed> {
        let bytes = self.short_bytes()?;
        if bytes.len() > max {
            return Err(Malformed("name is too long"));
        }
        std::str::from_utf8(bytes).map_err(|_| Malformed("name is not UTF-8"))
    }

    /// Checks that `size` bytes are zero and skips them.
    ///
    /// # Errors
    /// [`Malformed`] when they are missing or not zero.
    #[inline]
    pub fn reserved(&mut self, size: usize) -> Result<(), Malformed> {
        if self.bytes(size)?.iter().any(|&byte| byte != 0) {
            return Err(Malformed("reserved bytes are not zero"));
        }
        Ok(())
    }

    /// Checks that everything was read.
    ///
    /// # Errors
    /// [`Malformed`] when bytes are left.
    #[inline]
    pub fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed("bytes after the last field")) }
    }
}

/// Appends little-endian fields. The counterpart of [`Reader`], on any byte vector.
pub trait Write {
    /// Appends one byte.
    fn put_u8(&mut self, value: u8);
    /// Appends 16 bits.
    fn put_u16(&mut self, value: u16);
    /// Appends 32 bits.
    fn put_u32(&mut self, value: u32);
    /// Appends 64 bits.
    fn put_u64(&mut self, value: u64);
    /// Appends 128 bits.
    fn put_u128(&mut self, value: u128);
    /// Appends bytes.
    fn put(&mut self, bytes: &[u8]);
    /// Appends bytes preceded by their count in 16 bits; panics above 65,535.
    fn put_short(&mut self, bytes: &[u8]);
}

impl Write for Vec<u8> {
    #[inline]
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }
    #[inline]
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    #[inline]
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    #[inline]
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    #[inline]
    fn put_u128(&mut self, value: u128) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
    fn put_short(&mut self, bytes: &[u8]) {
        self.put_u16(size_u16(bytes.len()));
        self.put(bytes);
    }
}

/// A size that its limit keeps below 2^16.
#[inline]
#[must_use]
pub fn size_u16(size: usize) -> u16 {
    u16::try_from(size).expect("limited to 16 bits by its caller")
}

/// A size that its limit keeps below 2^32.
#[inline]
#[must_use]
pub fn size_u32(size: usize) -> u32 {
    u32::try_from(size).expect("limited to 32 bits by its caller")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_reads_back(a: u8, b: u16, c: u32, d: u64, e: u128, f: Vec<u8>) {
            let mut bytes = Vec::new();
            bytes.put_u8(a);
            bytes.put_u16(b);
            bytes.put_u32(c);
            bytes.put_u64(d);
            bytes.put_u128(e);
            bytes.put_short(&f);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.u8(), Ok(a));
            prop_assert_eq!(reader.u16(), Ok(b));
            prop_assert_eq!(reader.u32(), Ok(c));
            prop_assert_eq!(reader.u64(), Ok(d));
            prop_assert_eq!(reader.u128(), Ok(e));
            prop_assert_eq!(reader.short_bytes(), Ok(&f[..]));
            prop_assert_eq!(reader.finish(), Ok(()));
        }
    }

    #[test]
    fn a_missing_byte_consumes_nothing() {
        let mut reader = Reader::new(&[1, 2, 3]);
        assert!(reader.u32().is_err());
        assert_eq!(reader.remaining(), 3);
        assert!(reader.finish().is_err());
    }

    #[test]
    fn reserved_bytes_must_be_zero() {
        assert!(Reader::new(&[0, 0]).reserved(2).is_ok());
        assert!(Reader::new(&[0, 1]).reserved(2).is_err());
        assert!(Reader::new(&[0]).reserved(2).is_err());
    }
}
