//! The map's bytes: in the `NAMESPACES` file, in the register, and between nodes.
//!
//! Invariant: what decodes keeps all rules of `moves/mod.rs`, and encodes to the same bytes.
//!
//! Generation 4, next id 4, removed-at 4, founding 8, partition bits 1; count of members 2, each: id 4, state 1,
//! weight 4, address, data centre and rack as short bytes; count of layouts 1, each: count 2, then
//! id 4 and weight 4; holders and former: count 1, ids 4; whether there are places 1, then one byte
//! a partition: layout 3 bits, layout on the way to 3 bits, stage 2 bits.

use annulus_engine::model::token::PARTITION_BITS_MAX;
use annulus_net::wire::codec::{Malformed, Reader, Write};

use super::{ClusterMap, LAYOUTS_MAX, Layout, MEMBERS_MAX, MapMember, MemberState, Place, Stage};
use crate::member::{NodeId, Weight};
use crate::topology::NodeInfo;

/// Longest address, and longest name of a place, in bytes.
const TEXT_SIZE_MAX: usize = 255;

fn small(count: usize) -> u8 {
    u8::try_from(count).expect("a few")
}

fn count(count: usize) -> u16 {
    u16::try_from(count).expect("at most MEMBERS_MAX")
}

fn nodes(out: &mut Vec<u8>, nodes: &[NodeId]) {
    out.put_u8(small(nodes.len()));
    nodes.iter().for_each(|node| out.put_u32(node.0));
}

impl ClusterMap {
    /// Appends the map's bytes.
    ///
    /// # Panics
    /// When an address or a name is longer than 255 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.generation);
        out.put_u32(self.next_id);
        out.put_u32(self.removed_at);
        out.put_u64(self.founding);
        out.put_u8(u8::try_from(self.partition_bits).expect("at most 16"));
        out.put_u16(count(self.members.len()));
        for MapMember { info, state } in &self.members {
            out.put_u32(info.id.0);
            out.put_u8(*state as u8);
            out.put_u32(info.weight.0);
            for text in [&info.peer, &info.dc, &info.rack] {
                assert!(text.len() <= TEXT_SIZE_MAX, "checked when it was entered");
                out.put_short(text.as_bytes());
            }
        }
        out.put_u8(small(self.layouts.len()));
        for layout in &self.layouts {
            out.put_u16(count(layout.len()));
            for (node, weight) in layout {
                out.put_u32(node.0);
                out.put_u32(weight.0);
            }
        }
        nodes(out, &self.holders);
        nodes(out, &self.former);
        out.put_u8(u8::from(!self.places.is_empty()));
        self.places.iter().for_each(|place| out.put_u8(place.to_u8()));
    }

    /// Reads what [`ClusterMap::encode`] wrote.
    ///
    /// # Errors
    /// [`Malformed`] names the first rule broken.
    pub fn decode(reader: &mut Reader<'_>) -> Result<ClusterMap, Malformed> {
        let (generation, next_id, removed_at) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let founding = reader.u64()?;
        let partition_bits = u32::from(reader.u8()?);
        if partition_bits > PARTITION_BITS_MAX || generation == 0 || removed_at > generation {
            return Err(Malformed("no map has this generation or these partitions"));
        }
        let members = members(reader, next_id)?;
        let layouts = layouts(reader, &members)?;
        let holders = holders(reader, &members)?;
        let former = holders_or_none(reader, &members)?;
        let has_places = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Malformed("flag is neither 0 nor 1")),
        };
        let mut places = Vec::new();
        if has_places {
            let bytes = reader.bytes(1 << partition_bits)?;
            places = bytes.iter().map(|byte| Place::from_u8(*byte)).collect();
        }
        let number_of = |number: u8| usize::from(number) < layouts.len();
        let is_sound = |place: &Place| {
            number_of(place.at)
                && number_of(place.to)
                && (place.stage == Stage::Settled) == (place.at == place.to)
        };
        if !places.iter().all(is_sound) || (!has_places && layouts.len() != 1) {
            return Err(Malformed("a partition is on no layout"));
        }
        let map = ClusterMap {
            generation,
            next_id,
            removed_at,
            founding,
            partition_bits,
            members,
            layouts,
            places,
            holders,
            former,
        };
        Ok(map)
    }
}

fn text(reader: &mut Reader<'_>) -> Result<String, Malformed> {
    let bytes = reader.short_bytes()?;
    if bytes.len() > TEXT_SIZE_MAX {
        return Err(Malformed("an address or name is too long"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed("a name is no text"))?;
    Ok(text.to_owned())
}

fn weight(reader: &mut Reader<'_>) -> Result<Weight, Malformed> {
    match Weight(reader.u32()?) {
        weight if weight > Weight(0) && weight <= Weight::MAX => Ok(weight),
        _ => Err(Malformed("no member weighs this")),
    }
}

fn members(reader: &mut Reader<'_>, next_id: u32) -> Result<Vec<MapMember>, Malformed> {
    let count = usize::from(reader.u16()?);
    if count == 0 || count > MEMBERS_MAX {
        return Err(Malformed("no cluster has so many members"));
    }
    let mut members: Vec<MapMember> = Vec::new();
    for _ in 0..count {
        let id = NodeId(reader.u32()?);
        let state = match reader.u8()? {
            1 => MemberState::Joining,
            2 => MemberState::Up,
            3 => MemberState::Leaving,
            4 => MemberState::Dead,
            _ => return Err(Malformed("unknown state of a member")),
        };
        let weight = weight(reader)?;
        let (peer, dc, rack) = (text(reader)?, text(reader)?, text(reader)?);
        let is_next = members.last().is_none_or(|last| last.info.id < id);
        if id == NodeId(0) || id.0 >= next_id || !is_next {
            return Err(Malformed("the members are out of order"));
        }
        let info = NodeInfo { id, peer, client: String::new(), dc, rack, weight };
        members.push(MapMember { info, state });
    }
    Ok(members)
}

fn is_member(members: &[MapMember], node: NodeId) -> bool {
    members.binary_search_by_key(&node, |member| member.info.id).is_ok()
}

fn layouts(reader: &mut Reader<'_>, members: &[MapMember]) -> Result<Vec<Layout>, Malformed> {
    let count = usize::from(reader.u8()?);
    if count == 0 || count > LAYOUTS_MAX {
        return Err(Malformed("a map has no layout, or too many"));
    }
    let mut layouts = Vec::with_capacity(count);
    for _ in 0..count {
        let nodes = reader.u16()?;
        let mut layout: Layout = Vec::new();
        for _ in 0..nodes {
            let carrier = (NodeId(reader.u32()?), weight(reader)?);
            let is_next = layout.last().is_none_or(|last| last.0 < carrier.0);
            if !is_next || !is_member(members, carrier.0) {
                return Err(Malformed("a layout names no member, or one twice"));
            }
            layout.push(carrier);
        }
        if layout.is_empty() {
            return Err(Malformed("a layout has nobody"));
        }
        layouts.push(layout);
    }
    Ok(layouts)
}

fn holders(reader: &mut Reader<'_>, members: &[MapMember]) -> Result<Vec<NodeId>, Malformed> {
    match holders_or_none(reader, members)? {
        holders if holders.is_empty() => Err(Malformed("nobody holds the register")),
        holders => Ok(holders),
    }
}

fn holders_or_none(
    reader: &mut Reader<'_>,
    members: &[MapMember],
) -> Result<Vec<NodeId>, Malformed> {
    let count = reader.u8()?;
    let mut holders: Vec<NodeId> = Vec::new();
    for _ in 0..count {
        let holder = NodeId(reader.u32()?);
        let is_next = holders.last().is_none_or(|last| *last < holder);
        if !is_next || !is_member(members, holder) {
            return Err(Malformed("a holder of the register is no member, or named twice"));
        }
        holders.push(holder);
    }
    Ok(holders)
}
