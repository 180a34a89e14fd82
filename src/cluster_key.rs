//! The key that makes the members of a cluster one cluster: its id, the seed of its hash and the
//! secret of its contexts all follow from it, so that no member has to hand them to another.
//!
//! Invariant: what follows from the key does not give it away, nor one result another (SHA-256 of
//! the key under a name for each). Clients learn the seed; the key and the secret stay here.

use std::path::Path;

use sha2::{Digest, Sha256};

/// Shortest key, in bytes.
pub const KEY_SIZE_MIN: usize = 16;

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(Vec<u8>);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

impl ClusterKey {
    /// The key in a file; blanks at its end do not count.
    ///
    /// # Errors
    /// The file cannot be read, or holds too little.
    pub fn read(path: &Path) -> Result<ClusterKey, String> {
        let bytes = std::fs::read(path)
            .map_err(|error| format!("cluster-key-file: {}: {error}", path.display()))?;
        let key = bytes.trim_ascii_end();
        if key.len() < KEY_SIZE_MIN {
            return Err(format!(
                "cluster-key-file: {} has {} bytes, but a key has {KEY_SIZE_MIN} or more",
                path.display(),
                key.len()
            ));
        }
        Ok(ClusterKey(key.to_vec()))
    }

    /// A key that is no secret, for members that share nothing but their list.
    #[must_use]
    pub fn of_members(digest: u64) -> ClusterKey {
        ClusterKey([&b"members:"[..], &digest.to_le_bytes()].concat())
    }

    fn derive(&self, name: &str) -> [u64; 2] {
        let hash = Sha256::new().chain_update(name).chain_update([0]).chain_update(&self.0);
        let bytes = hash.finalize();
        [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i])))
    }

    /// Id of the cluster.
    #[must_use]
    pub fn cluster(&self) -> u128 {
        let [low, high] = self.derive("annulus cluster");
        u128::from(high) << 64 | u128::from(low)
    }

    /// Seed of the keys' hash.
    #[must_use]
    pub fn hash_seed(&self) -> u64 {
        self.derive("annulus seed")[0]
    }

    /// Secret of the contexts.
    #[must_use]
    pub fn secret(&self) -> [u64; 2] {
        self.derive("annulus contexts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_makes_one_cluster_and_another_key_another() {
        let (a, b) = (ClusterKey::of_members(1), ClusterKey::of_members(2));
        assert_eq!(a.cluster(), ClusterKey::of_members(1).cluster());
        assert_ne!(a.cluster(), b.cluster());
        assert_ne!(a.hash_seed(), b.hash_seed());
        assert_ne!(a.secret()[0], a.hash_seed());
        assert_eq!(format!("{a:?}"), "ClusterKey(..)");
    }

    #[test]
    fn a_short_key_is_refused_and_a_line_end_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "0123456789abcde\n").unwrap();
        assert!(ClusterKey::read(&path).unwrap_err().contains("16 or more"));
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        let with_end = ClusterKey::read(&path).unwrap();
        std::fs::write(&path, "0123456789abcdef").unwrap();
        assert_eq!(ClusterKey::read(&path).unwrap(), with_end);
    }
}
