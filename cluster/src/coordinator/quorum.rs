//! How many must answer: the levels of a request and of its namespace, made into plain numbers.
//!
//! Stands before every operation: what comes out decides whether it may begin
//! ([`Requirement::may_be_met`]) and when it has succeeded ([`Requirement::is_met`]). Invariant: a
//! requirement that [`Requirement::write`] or [`Requirement::read`] gave can be met by its
//! copies; one that cannot is refused with the reason, before anything is done. Arithmetic only.

use annulus_net::wire::fields::{Level, OperationFlags};
use annulus_net::wire::request::Refusal;
use annulus_net::wire::status::Status;

/// Most copies of a record.
pub const COPIES_MAX: u8 = 16;

/// A majority of `n`.
#[must_use]
pub const fn majority(n: u8) -> u8 {
    n / 2 + 1
}

/// Whether every `r` of `n` have one in common with every `w` of `n`.
#[must_use]
pub const fn overlaps(n: u8, w: u8, r: u8) -> bool {
    w as u16 + r as u16 > n as u16
}

/// Names for common pairs of W and R, the chapter's four among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// W=1, R=1: fastest, and the least is promised.
    One,
    /// A majority each: reads see acknowledged writes, one of three may fail. W=2, R=2 at N=3.
    Quorum,
    /// All copies each: nobody may fail.
    All,
    /// W=1, R=N: fast writes, whose readers ask everybody.
    FastWrite,
    /// W=N, R=1: fast reads, whose writers wait for everybody.
    FastRead,
}

impl Preset {
    /// Every preset.
    pub const EACH: [Preset; 5] =
        [Preset::One, Preset::Quorum, Preset::All, Preset::FastWrite, Preset::FastRead];

    /// W and R of `n` copies.
    #[must_use]
    pub const fn of(self, n: u8) -> (u8, u8) {
        match self {
            Preset::One => (1, 1),
            Preset::Quorum => (majority(n), majority(n)),
            Preset::All => (n, n),
            Preset::FastWrite => (1, n),
            Preset::FastRead => (n, 1),
        }
    }
}

/// What a namespace says of requests that leave it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Copies that the namespace asks for.
    pub n: u8,
    /// Copies that there are: fewer than `n` in a cluster of fewer servers.
    pub copies: u8,
    /// W, as a number of `copies`.
    pub w: u8,
    /// R, as a number of `copies`.
    pub r: u8,
    /// Whether others may stand in for home replicas (availability `ap`).
    pub sloppy: bool,
    /// Whether a write is only acknowledged once it is synced (durability `sync`).
    pub synced: bool,
    /// Data centres over which the copies are spread.
    pub data_centres: u8,
}

/// What must come together. All four counts are of different servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Requirement {
    /// Copies of the record: home replicas.
    pub n: u8,
    /// W or R: servers that must acknowledge or answer.
    pub total: u8,
    /// PW or PR: of them, home replicas.
    pub primary: u8,
    /// DW: of them, with the write synced. 0 in a read.
    pub durable: u8,
    /// Whether others may stand in for home replicas.
    pub sloppy: bool,
}

/// What has come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Acks {
    /// Servers that have the write, or answered the read.
    pub total: u8,
    /// Of them, home replicas.
    pub primary: u8,
    /// Of them, with the write synced.
    pub durable: u8,
}

impl Requirement {
    /// Of a write with these levels W, PW and DW.
    ///
    /// Without a word of the request: PW is one home replica where others may stand in, DW is W
    /// where acknowledged means synced.
    ///
    /// # Errors
    /// [`Refusal`] when no outcome could meet it. The write has not started.
    pub fn write(
        defaults: &Defaults,
        w: Level,
        pw: Level,
        dw: Level,
        flags: OperationFlags,
    ) -> Result<Requirement, Refusal> {
        let sloppy = is_sloppy(defaults, flags)?;
        let total = needed(defaults, w, defaults.w)?;
        let primary = least(defaults, pw, u8::from(sloppy))?;
        let durable = least(defaults, dw, if defaults.synced { total } else { 0 })?;
        Ok(Requirement { n: defaults.copies, total, primary, durable, sloppy }.checked())
    }

    /// Of a read with these levels R and PR.
    ///
    /// Without a word of the request: PR is one home replica where others may stand in, so that
    /// a server that has never held the key cannot say alone that it is absent.
    ///
    /// # Errors
    /// [`Refusal`] when no outcome could meet it.
    pub fn read(
        defaults: &Defaults,
        r: Level,
        pr: Level,
        flags: OperationFlags,
    ) -> Result<Requirement, Refusal> {
        let sloppy = is_sloppy(defaults, flags)?;
        let total = needed(defaults, r, defaults.r)?;
        let primary = least(defaults, pr, u8::from(sloppy))?;
        Ok(Requirement { n: defaults.copies, total, primary, durable: 0, sloppy }.checked())
    }

    /// Where only home replicas count, all that count are home replicas.
    fn checked(mut self) -> Requirement {
        debug_assert!((1..=COPIES_MAX).contains(&self.n), "copies are 1 to 16");
        if !self.sloppy {
            self.primary = self.primary.max(self.needed());
        }
        debug_assert!(self.needed() <= self.n, "each level was compared with the copies");
        self
    }

    /// Servers without which it cannot be met.
    #[must_use]
    pub fn needed(&self) -> u8 {
        self.total.max(self.primary).max(self.durable)
    }

    /// Whether this is enough.
    #[must_use]
    pub fn is_met(&self, acks: Acks) -> bool {
        acks.total >= self.total && acks.primary >= self.primary && acks.durable >= self.durable
    }

    /// Whether `total` servers, `primary` of them home replicas, could be enough.
    #[must_use]
    pub fn may_be_met(&self, total: u8, primary: u8) -> bool {
        total >= self.needed() && primary >= self.primary
    }
}

fn is_sloppy(defaults: &Defaults, flags: OperationFlags) -> Result<bool, Refusal> {
    let (sloppy, strict) = (OperationFlags::SLOPPY, OperationFlags::STRICT);
    if flags.has(sloppy) && flags.has(strict) {
        return Err(Refusal::bad("both sloppy and strict"));
    }
    Ok(flags.has(sloppy) || (defaults.sloppy && !flags.has(strict)))
}

/// W or R: at least one.
fn needed(defaults: &Defaults, level: Level, default: u8) -> Result<u8, Refusal> {
    match level {
        Level::None => Err(Refusal::bad("a level of none where at least one must answer")),
        _ => least(defaults, level, default.max(1)),
    }
}

/// PW, PR or DW: at least none.
fn least(defaults: &Defaults, level: Level, default: u8) -> Result<u8, Refusal> {
    let Defaults { n, copies, data_centres, .. } = *defaults;
    let count = match level {
        Level::Default => default,
        Level::None => 0,
        Level::Count(count) => count,
        Level::All => copies,
        Level::Quorum | Level::Global => majority(copies),
        Level::Local | Level::Each if data_centres <= 1 => majority(copies),
        Level::Local | Level::Each => {
            return Err(Refusal::new(
                Status::UNSUPPORTED,
                "levels by data centre need placement by data centre",
            ));
        }
    };
    if count > copies {
        return Err(match level {
            Level::Count(_) if count > n => {
                Refusal::bad("more replicas are asked for than the namespace has copies")
            }
            _ => Refusal::new(
                Status::UNAVAILABLE,
                "more replicas are asked for than the cluster has servers",
            ),
        });
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(n: u8) -> Defaults {
        let (w, r) = Preset::Quorum.of(n);
        Defaults { n, copies: n, w, r, sloppy: false, synced: true, data_centres: 1 }
    }

    const LEVELS: [Level; 10] = [
        Level::Default,
        Level::None,
        Level::Count(1),
        Level::Count(2),
        Level::Count(3),
        Level::Count(4),
        Level::Count(5),
        Level::Count(6),
        Level::Quorum,
        Level::All,
    ];
    const FLAGS: [OperationFlags; 3] =
        [OperationFlags(0), OperationFlags::SLOPPY, OperationFlags::STRICT];

    /// Each count of servers that could come together out of `n` home replicas and `n` others.
    fn acks(n: u8) -> impl Iterator<Item = Acks> {
        (0..=2 * n).flat_map(move |total| {
            (0..=n.min(total)).flat_map(move |primary| {
                (0..=total).map(move |durable| Acks { total, primary, durable })
            })
        })
    }

    #[test]
    fn what_is_not_refused_can_be_met_and_by_no_less_than_asked_for() {
        let mut met = 0;
        for n in 1..=5 {
            for (w, pw, dw) in levels() {
                for flags in FLAGS {
                    let Ok(need) = Requirement::write(&defaults(n), w, pw, dw, flags) else {
                        let too_many = |level| matches!(level, Level::Count(c) if c > n);
                        assert!(too_many(w) || too_many(pw) || too_many(dw) || w == Level::None);
                        continue;
                    };
                    assert!(need.total >= 1 && need.needed() <= n);
                    assert!(need.is_met(Acks { total: n, primary: n, durable: n }));
                    for acks in acks(n).filter(|acks| need.is_met(*acks)) {
                        assert!(need.may_be_met(acks.total, acks.primary));
                        assert!(flags == OperationFlags::SLOPPY || acks.primary >= need.total);
                        assert!(acks.total >= need.needed());
                        met += 1;
                    }
                }
            }
        }
        assert!(met > 1000);
    }

    fn levels() -> impl Iterator<Item = (Level, Level, Level)> {
        LEVELS
            .iter()
            .flat_map(|w| LEVELS.iter().flat_map(|pw| LEVELS.iter().map(|dw| (*w, *pw, *dw))))
    }

    #[test]
    fn a_majority_is_the_least_that_meets_itself() {
        for n in 1..=5 {
            let most = majority(n);
            assert!(overlaps(n, most, most));
            assert!(!overlaps(n, most - 1, most - 1));
        }
    }

    #[test]
    fn overlap_means_that_no_two_sets_are_apart() {
        for n in 1u8..=5 {
            for (w, r) in (1..=n).flat_map(|w| (1..=n).map(move |r| (w, r))) {
                let sets = |size: u8| {
                    (0u32..1 << n).filter(move |set| set.count_ones() == u32::from(size))
                };
                let meet = sets(w).all(|writes| sets(r).all(|reads| writes & reads != 0));
                assert_eq!(meet, overlaps(n, w, r), "n={n} w={w} r={r}");
            }
        }
    }

    #[test]
    fn the_chapters_four_are_presets() {
        assert_eq!(Preset::Quorum.of(3), (2, 2));
        assert_eq!(Preset::FastWrite.of(3), (1, 3));
        assert_eq!(Preset::FastRead.of(3), (3, 1));
        assert_eq!(Preset::One.of(3), (1, 1));
        let strong = Preset::EACH.map(|preset| {
            let (w, r) = preset.of(3);
            overlaps(3, w, r)
        });
        assert_eq!(strong, [false, true, true, true, true]);
    }

    #[test]
    fn what_can_never_be_is_a_bad_request_and_what_more_servers_could_do_is_unavailable() {
        let small = Defaults { n: 3, copies: 1, w: 1, r: 1, ..defaults(3) };
        let read = |level| Requirement::read(&small, level, Level::Default, OperationFlags(0));
        assert_eq!(read(Level::Count(4)).unwrap_err().status, Status::BAD_REQUEST);
        assert_eq!(read(Level::Count(2)).unwrap_err().status, Status::UNAVAILABLE);
        assert_eq!(read(Level::Quorum).unwrap().total, 1);
        assert_eq!(read(Level::All).unwrap().total, 1);
        assert_eq!(read(Level::None).unwrap_err().status, Status::BAD_REQUEST);
    }

    #[test]
    fn a_sloppy_write_needs_one_home_replica_unless_told_otherwise() {
        let ap = Defaults { sloppy: true, ..defaults(3) };
        let write = |pw, flags| {
            Requirement::write(&ap, Level::Default, pw, Level::Default, flags).unwrap().primary
        };
        assert_eq!(write(Level::Default, OperationFlags(0)), 1);
        assert_eq!(write(Level::None, OperationFlags(0)), 0);
        assert_eq!(write(Level::None, OperationFlags::STRICT), 2);
        let both = OperationFlags::SLOPPY.with(OperationFlags::STRICT);
        assert!(Requirement::read(&ap, Level::Default, Level::Default, both).is_err());
    }

    #[test]
    fn levels_by_data_centre_are_majorities_where_there_is_one() {
        for level in [Level::Local, Level::Each, Level::Global] {
            let one = Requirement::read(&defaults(3), level, Level::Default, OperationFlags(0));
            assert_eq!(one.unwrap().total, 2);
        }
        let two = Defaults { data_centres: 2, ..defaults(3) };
        let read = |level| Requirement::read(&two, level, Level::Default, OperationFlags(0));
        assert_eq!(read(Level::Each).unwrap_err().status, Status::UNSUPPORTED);
        assert!(read(Level::Global).is_ok());
    }
}
