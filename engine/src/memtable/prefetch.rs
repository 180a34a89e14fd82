//! Asks the processor for a cache line before it is needed.

/// Starts to load the line of the slice's first element, and waits for nothing.
#[inline]
pub(super) fn line<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch changes no state of the program and cannot fault, wherever the
        // address points; this one points into, or just beyond, a slice we borrow.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}
