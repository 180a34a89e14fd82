//! How much each server carries when replicas spread over data centres and racks.
//!
//! Cluster, data centres, racks and servers are a tree. With `N` replicas and `G` data centres (or
//! racks, or servers) every partition has at most one replica in each when `N <= G`, and at least
//! one in each when `N >= G`. So each place of the tree takes between `least` and `most` replicas
//! of every partition, and what it should carry, its share, is its weight's part of all replicas
//! brought between `partitions * least` and `partitions * most`.
//!
//! Invariant: no server's share is more than [`STRETCH`] times its share by weight alone. A data
//! centre or rack too light for its part counts as one with the lightest other, and as many
//! mergers follow as that takes; without data centres and racks no share is stretched at all.
//! Which is why one server in a rack of its own, or with a misspelt one, is not sent a third of all
//! data.

use std::collections::BTreeSet;

use crate::member::Member;

/// The cap of a server in hundredths of its share.
const CAP_PERCENT: u128 = 102;

/// How many times its share by weight a server may have to carry for the spread's sake.
pub(super) const STRETCH: u128 = 2;

/// One replica, in the unit of shares.
pub(super) const ONE: u128 = 1 << 40;

/// The cluster, a data centre, a rack or a server.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Index of the place it is in; the cluster's is its own.
    pub(super) parent: usize,
    /// Replicas of one partition that it takes at least,
    pub(super) least: u64,
    /// and at most.
    pub(super) most: u64,
    /// Share by weight alone.
    fair: u128,
    /// Share as it is.
    share: u128,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Spread {
    /// The cluster, then data centres, then racks, then servers in the order of the members.
    pub(super) places: Vec<Place>,
    /// Index of the first server.
    pub(super) servers: usize,
    partitions: u64,
}

impl Spread {
    /// Shares of `partitions * copies` replicas among at least `copies` members.
    pub(super) fn new(members: &[Member], partitions: u64, copies: u64) -> Spread {
        let all = u128::from(partitions) * ONE;
        let fair: Vec<Claim> = members
            .iter()
            .map(|member| Claim { weight: member.weight.0.into(), least: 0, most: all })
            .collect();
        let fair = divide(all * u128::from(copies), &fair);
        let mut homes = homes(members);
        loop {
            let spread = Spread::of_homes(&homes, &fair, partitions, copies);
            let Some((kind, from)) = spread.too_light(&homes) else { return spread };
            let other = |home: &Home| match kind {
                Kind::Dc => (home.dc != from.dc).then_some(home.dc),
                Kind::Rack => (home.dc == from.dc && home.rack != from.rack).then_some(home.rack),
            };
            let weight = |place: usize| -> u128 {
                let of = homes.iter().zip(&fair).filter(|(home, _)| other(home) == Some(place));
                of.map(|(_, fair)| *fair).sum()
            };
            let others: BTreeSet<usize> = homes.iter().filter_map(other).collect();
            let lightest = others
                .into_iter()
                .min_by_key(|place| weight(*place))
                .expect("shares are fair where there is one data centre with one rack");
            for home in &mut homes {
                match kind {
                    Kind::Dc if home.dc == from.dc => home.dc = lightest,
                    Kind::Rack if home.rack == from.rack => home.rack = lightest,
                    _ => {}
                }
            }
        }
    }

    fn of_homes(homes: &[Home], fair: &[u128], partitions: u64, copies: u64) -> Spread {
        let dcs: Vec<usize> = distinct(homes.iter().map(|home| home.dc));
        let racks: Vec<Home> = distinct(homes.iter().copied());
        let servers = 1 + dcs.len() + racks.len();
        let place = |parent, among: usize| Place {
            parent,
            least: u64::from(copies >= among as u64),
            most: if copies <= among as u64 { 1 } else { copies },
            fair: 0,
            share: 0,
        };
        let index = |found: Result<usize, usize>| found.expect("every home is among them");
        let mut places = vec![Place { least: copies, most: copies, ..place(0, 1) }];
        places.extend(dcs.iter().map(|_| place(0, dcs.len())));
        places.extend(
            racks.iter().map(|rack| place(1 + index(dcs.binary_search(&rack.dc)), racks.len())),
        );
        places.extend(homes.iter().zip(fair).map(|(home, fair)| Place {
            parent: 1 + dcs.len() + index(racks.binary_search(home)),
            least: 0,
            most: 1,
            fair: *fair,
            share: 0,
        }));
        let mut spread = Spread { places, servers, partitions };
        spread.sum_up();
        spread.divide_down();
        spread
    }

    /// A place takes no less than its parts do, no more than they can, and weighs what they weigh.
    fn sum_up(&mut self) {
        for index in (0..self.servers).rev() {
            let (mut least, mut most, mut fair) = (0, 0, 0);
            for part in self.parts(index) {
                least += part.least;
                most += part.most;
                fair += part.fair;
            }
            let place = &mut self.places[index];
            place.least = place.least.max(least);
            place.most = place.most.min(most);
            place.fair = fair;
        }
    }

    fn divide_down(&mut self) {
        let all = u128::from(self.partitions) * ONE;
        self.places[0].share = self.places[0].fair;
        for index in 0..self.servers {
            let claims: Vec<Claim> = self
                .parts(index)
                .map(|part| Claim {
                    weight: part.fair,
                    least: all * u128::from(part.least),
                    most: all * u128::from(part.most),
                })
                .collect();
            let shares = divide(self.places[index].share, &claims);
            let parts = self.places.iter_mut().skip(1).filter(|part| part.parent == index);
            for (part, share) in parts.zip(shares) {
                part.share = share;
            }
        }
    }

    fn parts(&self, index: usize) -> impl Iterator<Item = &Place> {
        self.places.iter().skip(1).filter(move |part| part.parent == index)
    }

    /// What has to count as one with another, so that the worst stretched server is less so.
    fn too_light(&self, homes: &[Home]) -> Option<(Kind, Home)> {
        let stretched = |place: &Place| place.share > STRETCH * place.fair;
        let servers = &self.places[self.servers..];
        let (home, worst) = homes
            .iter()
            .zip(servers)
            .max_by(|(_, a), (_, b)| (a.share * b.fair).cmp(&(b.share * a.fair)))?;
        let dc = self.places[worst.parent].parent;
        let only_rack = self.parts(dc).count() == 1;
        let kind = if only_rack || stretched(&self.places[dc]) { Kind::Dc } else { Kind::Rack };
        stretched(worst).then_some((kind, *home))
    }

    /// How many partitions each server may carry: 1.02 of its share, rounded up, at most all.
    pub(super) fn caps(&self) -> Vec<u64> {
        let cap = |share: u128| {
            let cap = (CAP_PERCENT * share).div_ceil(100 * ONE);
            u64::try_from(cap).map_or(self.partitions, |cap| cap.min(self.partitions))
        };
        self.places[self.servers..].iter().map(|server| cap(server.share)).collect()
    }

    /// Shares of the servers by weight alone.
    #[cfg(test)]
    pub(super) fn fair(&self) -> impl Iterator<Item = u128> {
        self.places[self.servers..].iter().map(|server| server.fair)
    }
}

/// Where a server is: the number of its data centre, and that of its rack among all racks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Home {
    pub(super) dc: usize,
    pub(super) rack: usize,
}

enum Kind {
    Dc,
    Rack,
}

/// The members' homes, numbered in the order of their names.
pub(super) fn homes(members: &[Member]) -> Vec<Home> {
    let dcs = distinct(members.iter().map(|member| &member.dc));
    let racks = distinct(members.iter().map(|member| (&member.dc, &member.rack)));
    let home = |member: &Member| Home {
        dc: dcs.partition_point(|dc| **dc < member.dc),
        rack: racks.partition_point(|rack| *rack < (&member.dc, &member.rack)),
    };
    members.iter().map(home).collect()
}

pub(super) fn distinct<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.collect::<BTreeSet<T>>().into_iter().collect()
}

struct Claim {
    weight: u128,
    least: u128,
    most: u128,
}

/// Divides `total` by weight, but so that each part is between its bounds: those that are out of
/// them are brought in, the side that is further out first, and the rest divide what is left.
fn divide(total: u128, claims: &[Claim]) -> Vec<u128> {
    let mut parts: Vec<Option<u128>> = vec![None; claims.len()];
    loop {
        let (mut left, mut weights) = (total, 0);
        for (part, claim) in parts.iter().zip(claims) {
            match part {
                Some(part) => left = left.saturating_sub(*part),
                None => weights += claim.weight,
            }
        }
        let by_weight = |claim: &Claim| claim.weight * left / weights.max(1);
        let (mut over, mut under) = (0, 0);
        for (_, claim) in parts.iter().zip(claims).filter(|(part, _)| part.is_none()) {
            over += by_weight(claim).saturating_sub(claim.most);
            under += claim.least.saturating_sub(by_weight(claim));
        }
        for (part, claim) in parts.iter_mut().zip(claims).filter(|(part, _)| part.is_none()) {
            let by_weight = by_weight(claim);
            if over == 0 && under == 0 {
                *part = Some(by_weight);
            } else if by_weight > claim.most && over >= under {
                *part = Some(claim.most);
            } else if by_weight < claim.least && under >= over {
                *part = Some(claim.least);
            }
        }
        if over == 0 && under == 0 {
            return parts.into_iter().flatten().collect();
        }
    }
}
