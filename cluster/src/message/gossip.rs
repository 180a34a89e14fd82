//! What members tell of each other, and its bytes: reports that a member makes of itself, and
//! claims about who is there, which anybody may pass on.
//!
//! Invariants: a message that carries gossip has at most [`GOSSIP_MESSAGE_SIZE_MAX`] bytes, whole;
//! nobody accuses itself, and two accusers are two. Not a word here says who is a member: claims
//! about strangers are read, and believed by nobody.
//!
//! ```text
//! gossip   count (1) | report ... | count (1) | claim ...
//! report   node (4) incarnation (8) heartbeat (8) vitals (6 x 8)
//! claim    0 node (4) incarnation (8)                     alive
//!          1 node (4) incarnation (8) reporter (4)        suspect
//!          2 node (4) incarnation (8) reporters (4, 4)    down; the smaller first
//! ```

use annulus_net::wire::codec::{Malformed, Reader, Write};

use crate::member::NodeId;

/// Largest message that carries gossip, in bytes: it fits one packet of any network.
pub const GOSSIP_MESSAGE_SIZE_MAX: usize = 1200;
/// Bytes of a report.
pub(crate) const REPORT_SIZE: usize = 68;
/// Most entries of a list: its count has one byte.
const COUNT_MAX: usize = 255;

/// What a member says about itself. None of it has a meaning here but that greater epochs are newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Vitals {
    /// Work it has, in the units of whoever sets it.
    pub load: u64,
    /// How hot its hottest keys are.
    pub heat: u64,
    /// How full its disk is.
    pub disk_level: u64,
    /// Of the oldest hint that it could not deliver.
    pub oldest_hint: u64,
    /// Newest settings that it knows.
    pub settings_epoch: u64,
    /// Newest list of members that it knows.
    pub members_epoch: u64,
}

/// A member's report of itself. Whoever made it was alive then, at this incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Who made it.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: u64,
    /// It counts up all the time, from 0 in each of its lives.
    pub heartbeat: u64,
    /// The rest.
    pub vitals: Vitals,
}

/// What is said of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is there.
    Alive,
    /// It did not answer `reporter`, nor those whom that one asked to try.
    Suspect {
        /// Who accuses.
        reporter: NodeId,
    },
    /// It did not answer either of them, and it did not contradict in time.
    Down {
        /// Two who accused, the smaller id first.
        reporters: [NodeId; 2],
    },
}

/// Something said of a member, at an incarnation: a greater one makes it history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// About whom.
    pub node: NodeId,
    /// Below `u64::MAX`, so that it can be contradicted.
    pub incarnation: u64,
    /// What.
    pub said: Said,
}

/// What rides on probes and on exchanges of gossip.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Gossip {
    /// Reports; the sender's own is the first.
    pub reports: Vec<Report>,
    /// Claims.
    pub claims: Vec<Claim>,
}

impl Claim {
    /// Bytes that it takes.
    pub(crate) fn size(&self) -> usize {
        match self.said {
            Said::Alive => 13,
            Said::Suspect { .. } => 17,
            Said::Down { .. } => 21,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(match self.said {
            Said::Alive => 0,
            Said::Suspect { .. } => 1,
            Said::Down { .. } => 2,
        });
        out.put_u32(self.node.0);
        out.put_u64(self.incarnation);
        match self.said {
            Said::Alive => {}
            Said::Suspect { reporter } => out.put_u32(reporter.0),
            Said::Down { reporters } => reporters.iter().for_each(|it| out.put_u32(it.0)),
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Claim, Malformed> {
        let kind = reader.u8()?;
        let node = NodeId(reader.u32()?);
        let incarnation = incarnation(reader)?;
        let said = match kind {
            0 => Said::Alive,
            1 => Said::Suspect { reporter: NodeId(reader.u32()?) },
            2 => Said::Down { reporters: [NodeId(reader.u32()?), NodeId(reader.u32()?)] },
            _ => return Err(Malformed("unknown kind of claim")),
        };
        match said {
            Said::Suspect { reporter } if reporter == node => {
                Err(Malformed("a member accuses itself"))
            }
            Said::Down { reporters } if reporters.contains(&node) => {
                Err(Malformed("a member accuses itself"))
            }
            Said::Down { reporters: [first, second] } if first >= second => {
                Err(Malformed("two reporters are not two, or not in order"))
            }
            said => Ok(Claim { node, incarnation, said }),
        }
    }
}

impl Report {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.node.0);
        out.put_u64(self.incarnation);
        out.put_u64(self.heartbeat);
        let Vitals { load, heat, disk_level, oldest_hint, settings_epoch, members_epoch } =
            self.vitals;
        for number in [load, heat, disk_level, oldest_hint, settings_epoch, members_epoch] {
            out.put_u64(number);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Report, Malformed> {
        Ok(Report {
            node: NodeId(reader.u32()?),
            incarnation: incarnation(reader)?,
            heartbeat: reader.u64()?,
            vitals: Vitals {
                load: reader.u64()?,
                heat: reader.u64()?,
                disk_level: reader.u64()?,
                oldest_hint: reader.u64()?,
                settings_epoch: reader.u64()?,
                members_epoch: reader.u64()?,
            },
        })
    }
}

impl Gossip {
    /// Appends its bytes.
    ///
    /// # Panics
    /// When a list is longer than its count can say, which no message of
    /// [`GOSSIP_MESSAGE_SIZE_MAX`] bytes has room for.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_count(out, self.reports.len());
        self.reports.iter().for_each(|report| report.encode(out));
        put_count(out, self.claims.len());
        self.claims.iter().for_each(|claim| claim.encode(out));
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Gossip, Malformed> {
        let count = usize::from(reader.u8()?);
        if count > reader.remaining() / REPORT_SIZE {
            return Err(Malformed("list is longer than the message"));
        }
        let reports = (0..count).map(|_| Report::decode(reader)).collect::<Result<_, _>>()?;
        let count = usize::from(reader.u8()?);
        if count > reader.remaining() / 13 {
            return Err(Malformed("list is longer than the message"));
        }
        let claims = (0..count).map(|_| Claim::decode(reader)).collect::<Result<_, _>>()?;
        Ok(Gossip { reports, claims })
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    assert!(count <= COUNT_MAX, "the size of the message bounds its lists");
    out.put_u8(u8::try_from(count).expect("just checked"));
}

fn incarnation(reader: &mut Reader<'_>) -> Result<u64, Malformed> {
    match reader.u64()? {
        u64::MAX => Err(Malformed("an incarnation that nobody can follow")),
        incarnation => Ok(incarnation),
    }
}
