//! Every bound, and the relations between them, proved at compile time.

/// Longest key, in bytes. The shortest has one.
pub const KEY_SIZE_MAX: usize = 4096;
/// Longest value that a configuration may allow, in bytes.
pub const VALUE_SIZE_CEILING: usize = 16 << 20;
/// Longest value by default, in bytes.
pub const VALUE_SIZE_DEFAULT: usize = 1 << 20;
/// Most live siblings of one key; a write without context is refused beyond it.
pub const SIBLINGS_MAX: usize = 64;
/// Sum of sibling values of one key, in bytes, beyond which a write without context is refused.
pub const SIBLING_BYTES_MAX: usize = 4 << 20;
/// Entries of a version vector; beyond it the oldest harmless entry is dropped.
pub const VECTOR_ENTRIES_MAX: usize = 24;
/// Furthest a stamp may run ahead of this node's clock, in microseconds.
pub const CLOCK_OFFSET_MAX_US: u64 = 500_000;
/// Expiry is milliseconds since 2024-01-01 in a u64; the longest TTL keeps sums far from overflow.
pub const TTL_MS_MAX: u64 = 1 << 45;
/// Target size of an SSTable block, in bytes, before compression.
pub const BLOCK_SIZE_DEFAULT: usize = 4096;
/// Device alignment assumed for offsets and lengths of direct I/O, in bytes.
pub const DISK_ALIGNMENT: usize = 512;

// A key and its record header fit in one target block, so an index entry a block suffices.
const _: () = assert!(KEY_SIZE_MAX <= BLOCK_SIZE_DEFAULT);
// A block is a whole number of device sectors.
const _: () = assert!(BLOCK_SIZE_DEFAULT.is_multiple_of(DISK_ALIGNMENT));
// The default is allowed.
const _: () = assert!(VALUE_SIZE_DEFAULT <= VALUE_SIZE_CEILING);
// One value of the default limit never exceeds what siblings may hold.
const _: () = assert!(VALUE_SIZE_DEFAULT <= SIBLING_BYTES_MAX);
