//! Sizes, parts of a whole, and times as people write them: `64MiB`, `10%`, `200ms`, `30s`, `12h`.
//!
//! Invariant: what is printed parses back to the same value. Used by flags, environment and the
//! configuration file alike, so a value is written one way everywhere.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Size(pub u64);

/// Suffixes with their factors; the first of a factor is the one printed.
const SIZE_UNITS: [(&str, u64); 12] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let refuse = || format!("`{text}` is not a size; write for example 64MiB, 512KiB or 1000");
        let trimmed = text.trim();
        let (number, factor) = SIZE_UNITS
            .iter()
            .find_map(|(unit, factor)| strip_unit(trimmed, unit).map(|rest| (rest, *factor)))
            .or_else(|| strip_unit(trimmed, "B").map(|rest| (rest, 1)))
            .unwrap_or((trimmed, 1));
        let number = number.trim_end();
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
            return Err(refuse());
        }
        let too_large = || format!("`{text}` is larger than any size can be");
        let mut bytes = whole
            .parse::<u64>()
            .ok()
            .and_then(|whole| whole.checked_mul(factor))
            .ok_or_else(too_large)?;
        if !fraction.is_empty() {
            let digits = u32::try_from(fraction.len()).map_err(|_| refuse())?;
            let scale = 10u128.checked_pow(digits).ok_or_else(refuse)?;
            let part = fraction.parse::<u128>().map_err(|_| refuse())?;
            let product = part.checked_mul(u128::from(factor)).ok_or_else(refuse)?;
            let part = u64::try_from(product / scale).map_err(|_| refuse())?;
            bytes = bytes.checked_add(part).ok_or_else(too_large)?;
        }
        Ok(Size(bytes))
    }
}

/// `text` without the unit at its end, in either case of letters.
fn strip_unit<'a>(text: &'a str, unit: &str) -> Option<&'a str> {
    let at = text.len().checked_sub(unit.len())?;
    let (rest, end) = (text.get(..at)?, text.get(at..)?);
    end.eq_ignore_ascii_case(unit).then_some(rest)
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in &SIZE_UNITS[..4] {
            if self.0 >= *factor && self.0.is_multiple_of(*factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Size {
    /// For people: rounded to three digits, `1.46GiB`.
    #[must_use]
    pub fn rounded(self) -> String {
        for (unit, factor) in &SIZE_UNITS[..4] {
            if self.0 >= *factor {
                let hundredths = u128::from(self.0) * 100 / u128::from(*factor);
                let (whole, part) = (hundredths / 100, hundredths % 100);
                return if whole >= 100 || part == 0 {
                    format!("{whole}{unit}")
                } else {
                    format!("{whole}.{part:02}{unit}")
                };
            }
        }
        format!("{}B", self.0)
    }
}

/// A part of something: so many bytes, or so many percent of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Bytes, whatever the whole.
    Bytes(Size),
    /// Percent of the whole, at most 100.
    Percent(u8),
}

impl Part {
    /// In bytes, of a whole of so many.
    #[must_use]
    pub fn of(self, whole: u64) -> u64 {
        match self {
            Part::Bytes(size) => size.0,
            // Without the remainder twice, and without an overflow.
            Part::Percent(percent) => {
                whole / 100 * u64::from(percent) + whole % 100 * u64::from(percent) / 100
            }
        }
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Part, String> {
        match text.trim().strip_suffix('%') {
            None => text.parse().map(Part::Bytes).map_err(|error| format!("{error}, or 10%")),
            Some(percent) => match percent.trim_end().parse::<u8>() {
                Ok(percent @ 0..=100) => Ok(Part::Percent(percent)),
                _ => Err(format!("`{text}` is not a part; write for example 10% or 64MiB")),
            },
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Bytes(size) => size.fmt(f),
            Part::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A length of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        humantime::parse_duration(text.trim()).map(Span).map_err(|error| {
            format!("`{text}` is not a time ({error}); write for example 200ms, 30s or 12h")
        })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_duration(self.0))
    }
}

impl Span {
    /// Whole milliseconds, saturating.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Whole microseconds, saturating.
    #[must_use]
    pub fn as_micros(self) -> u64 {
        u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX)
    }
}

/// Reads a string with `FromStr`, or a plain number with `from_number`.
struct Text<T>(fn(u64) -> Option<T>, &'static str);

impl<T: FromStr<Err = String>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        (self.0)(number).ok_or_else(|| E::custom(format!("{number} lacks a unit: {}", self.1)))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::custom(format!("{number} is negative"))),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        deserializer.deserialize_any(Text(|n| Some(Size(n)), "a size such as \"64MiB\""))
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Part, D::Error> {
        let bytes = |n| Some(Part::Bytes(Size(n)));
        deserializer.deserialize_any(Text(bytes, "a part such as \"10%\" or \"64MiB\""))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        let zero = |n| (n == 0).then_some(Span(Duration::ZERO));
        deserializer.deserialize_any(Text(zero, "a time such as \"200ms\""))
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_binary_and_decimal_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("100B", 100),
            ("64MiB", 64 << 20),
            ("64mib", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2K", 2048),
            ("2kB", 2000),
            ("3 GB", 3_000_000_000),
        ] {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for text in ["", "MiB", "-1", "1.MiBx", "1e9", "99999999999TiB", "ä", "1.2.3K"] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(error.contains("size"), "{text}: {error}");
        }
    }

    #[test]
    fn a_part_is_bytes_or_percent_of_a_whole() {
        for (text, bytes) in [("10%", 100), ("0 %", 0), ("100%", 1000), ("64MiB", 64 << 20)] {
            let part: Part = text.parse().unwrap();
            assert_eq!(part.of(1000), bytes, "{text}");
            assert_eq!(part.to_string().parse(), Ok(part));
        }
        for text in ["101%", "-1%", "x%", "1.5%", "%"] {
            assert!(text.parse::<Part>().unwrap_err().contains("10%"), "{text}");
        }
        assert!("much".parse::<Part>().unwrap_err().contains("10%"));
    }

    #[test]
    fn what_is_printed_reads_back() {
        for bytes in [0, 1, 1000, 1024, 4096, (64 << 20) + 1, 64 << 20, 3 << 40] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
        for text in ["200ms", "30s", "12h", "50us", "0s"] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.to_string().parse(), Ok(span));
        }
        assert!("5".parse::<Span>().unwrap_err().contains("200ms"));
        assert_eq!(Size((1 << 30) + (1 << 29)).rounded(), "1.50GiB");
    }
}
