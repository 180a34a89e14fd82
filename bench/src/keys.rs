//! Which key comes next: uniform, zipfian, latest. All from a seed.
//!
//! The zipfian generator is Gray et al., "Quickly generating billion-record synthetic databases"
//! (SIGMOD 1994), as YCSB uses it; ranks are scattered over the key space by a hash.

/// A small fast generator (splitmix64), seeded.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// A generator whose numbers depend on the seed alone.
    #[must_use]
    pub fn new(seed: u64) -> Chance {
        Chance(mix(seed))
    }

    /// The next 64 bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `bound`, which is above 0.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.next_u64()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("below bound")
    }

    /// A number in 0..1.
    #[inline]
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A bijection of 64 bits that looks like chance (splitmix64's finaliser).
#[inline]
#[must_use]
pub fn mix(x: u64) -> u64 {
    let mut h = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ (h >> 31)
}

/// How keys are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// Each key equally often.
    Uniform,
    /// The i-th most popular key with a weight of `1 / i^theta`, theta in 0..1.
    Zipf(f64),
    /// Zipfian over the newest keys.
    Latest,
}

impl std::str::FromStr for Distribution {
    type Err = String;
    fn from_str(text: &str) -> Result<Distribution, String> {
        match text.split_once(':') {
            None if text == "uniform" => Ok(Distribution::Uniform),
            None if text == "latest" => Ok(Distribution::Latest),
            None if text == "zipf" => Ok(Distribution::Zipf(0.99)),
            Some(("zipf", theta)) => match theta.parse::<f64>() {
                Ok(theta) if theta > 0.0 && theta < 1.0 => Ok(Distribution::Zipf(theta)),
                _ => {
                    Err(format!("zipf:{theta}: the exponent must be between 0 and 1, as zipf:0.99"))
                }
            },
            _ => Err(format!("{text}: must be uniform, zipf:0.99 or latest")),
        }
    }
}

/// Draws key ids in 0..count.
#[derive(Clone, Debug)]
pub struct KeyChooser {
    distribution: Distribution,
    count: u64,
    zipf: Zipf,
}

#[derive(Clone, Debug, Default)]
struct Zipf {
    theta: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    fn new(count: u64, theta: f64) -> Zipf {
        let zeta: f64 = (1..=count).map(|i| (i as f64).powf(-theta)).sum();
        let zeta2 = 1.0 + 0.5f64.powf(theta);
        let eta = (1.0 - (2.0 / count as f64).powf(1.0 - theta)) / (1.0 - zeta2 / zeta);
        Zipf { theta, zeta, eta }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "capped at count")]
    fn rank(&self, count: u64, chance: &mut Chance) -> u64 {
        let u = chance.unit();
        let scaled = u * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5f64.powf(self.theta) {
            return 1;
        }
        let power = (self.eta * u - self.eta + 1.0).powf(1.0 / (1.0 - self.theta));
        ((count as f64 * power) as u64).min(count - 1)
    }
}

impl KeyChooser {
    /// Draws from `count` (at least 1) keys. Costs O(count) once for zipfian distributions.
    #[must_use]
    pub fn new(distribution: Distribution, count: u64) -> KeyChooser {
        let zipf = match distribution {
            Distribution::Uniform => Zipf::default(),
            Distribution::Zipf(theta) => Zipf::new(count, theta),
            Distribution::Latest => Zipf::new(count, 0.99),
        };
        KeyChooser { distribution, count, zipf }
    }

    /// The next key id, when ids below `newest` (at least 1) exist.
    #[inline]
    pub fn next(&self, newest: u64, chance: &mut Chance) -> u64 {
        match self.distribution {
            Distribution::Uniform => chance.below(newest),
            Distribution::Zipf(_) => mix(self.zipf.rank(self.count, chance)) % newest,
            Distribution::Latest => newest - 1 - self.zipf.rank(self.count, chance).min(newest - 1),
        }
    }
}

/// A thread's share of the key space: of every `count` ids in a row, one.
///
/// Threads that must not meet (to check values, to write each key once, to insert new keys) count
/// their own ids from 0, and the stripe gives them their place among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// Which one, below `count`.
    pub index: u64,
    /// How many stripes there are, at least 1.
    pub count: u64,
}

impl Stripe {
    /// The whole key space.
    pub const WHOLE: Stripe = Stripe { index: 0, count: 1 };

    /// The id, among all, of this stripe's `own`-th.
    #[inline]
    #[must_use]
    pub fn id(&self, own: u64) -> u64 {
        own * self.count + self.index
    }

    /// How many ids below `keys` are of this stripe.
    #[must_use]
    pub fn keys(&self, keys: u64) -> u64 {
        (keys + self.count - 1 - self.index) / self.count
    }
}

/// Writes the key of an id: the id's digits, zero-padded in front to `size` bytes after a `k`.
pub fn write_key(id: u64, size: usize, key: &mut Vec<u8>) {
    key.clear();
    key.resize(size, b'0');
    let mut rest = id;
    for byte in key.iter_mut().rev() {
        *byte = b'0' + u8::try_from(rest % 10).expect("a digit");
        rest /= 10;
    }
    if size > 8
        && let Some(first) = key.first_mut()
    {
        *first = b'k';
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zipf_favours_few_keys_and_uniform_none() {
        let mut chance = Chance::new(1);
        let top = |distribution, chance: &mut Chance| {
            let chooser = KeyChooser::new(distribution, 1000);
            let mut counts = vec![0u32; 1000];
            for _ in 0..100_000 {
                let id = chooser.next(1000, chance);
                counts[usize::try_from(id).unwrap()] += 1;
            }
            counts.sort_unstable();
            counts[999]
        };
        assert!(top(Distribution::Zipf(0.99), &mut chance) > 8_000);
        assert!(top(Distribution::Uniform, &mut chance) < 200);
    }

    #[test]
    fn latest_stays_among_existing_keys() {
        let chooser = KeyChooser::new(Distribution::Latest, 1000);
        let mut chance = Chance::new(2);
        assert!((0..10_000).all(|_| chooser.next(10, &mut chance) < 10));
    }

    #[test]
    fn stripes_share_out_every_key_once() {
        for (keys, count) in [(10, 1), (10, 3), (3, 4), (12, 4)] {
            let of = |index| {
                let stripe = Stripe { index, count };
                (0..stripe.keys(keys)).map(move |own| stripe.id(own))
            };
            let mut all: Vec<u64> = (0..count).flat_map(of).collect();
            all.sort_unstable();
            assert_eq!(all, (0..keys).collect::<Vec<_>>());
        }
    }

    #[test]
    fn keys_have_the_size_asked_for_and_differ() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        write_key(123, 16, &mut a);
        write_key(124, 16, &mut b);
        assert_eq!(a, b"k000000000000123");
        assert_ne!(a, b);
    }

    #[test]
    fn a_bad_distribution_is_named() {
        let error = "zipf:2".parse::<Distribution>().unwrap_err();
        assert!(error.contains("between 0 and 1"), "{error}");
    }
}
