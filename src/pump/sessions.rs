//! The connections of a pump, found by the low half of their key.
//!
//! Invariant: a key finds only the connection it was given for; the low half is a small number
//! that sockets reuse, the high half tells its lives apart.

use annulus_net::server_connection::ServerConnection;

use super::ConnectionKey;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) wire: ServerConnection,
    /// Not receiving until answers have gone out.
    pub(super) paused: bool,
    /// In the pump's list of those that wait for their output to go out.
    pub(super) attended: bool,
    /// Bytes that waited for the socket when last looked at.
    pub(super) unsent: usize,
    /// Of admission: when it last sent something.
    pub(super) interval: u32,
}

impl Session {
    pub(super) fn new(wire: ServerConnection) -> Box<Session> {
        Box::new(Session { wire, paused: false, attended: false, unsent: 0, interval: 0 })
    }
}

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    slots: Vec<Option<(ConnectionKey, Box<Session>)>>,
    len: usize,
}

fn slot_of(key: ConnectionKey) -> usize {
    usize::try_from(key.0 & 0xffff_ffff).expect("a 64-bit host")
}

impl Sessions {
    pub(super) fn insert(&mut self, key: ConnectionKey, session: Box<Session>) {
        let slot = slot_of(key);
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        self.len += usize::from(self.slots[slot].is_none());
        self.slots[slot] = Some((key, session));
    }

    pub(super) fn take(&mut self, key: ConnectionKey) -> Option<Box<Session>> {
        let slot = self.slots.get_mut(slot_of(key))?;
        if slot.as_ref().is_none_or(|(owner, _)| *owner != key) {
            return None;
        }
        self.len -= 1;
        slot.take().map(|(_, session)| session)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, key: ConnectionKey) -> Option<&mut Session> {
        match self.slots.get_mut(slot_of(key))? {
            Some((owner, session)) if *owner == key => Some(session),
            _ => None,
        }
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (ConnectionKey, &mut Session)> {
        self.slots.iter_mut().flatten().map(|(key, session)| (*key, &mut **session))
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Session> {
        self.slots.iter().flatten().map(|(_, session)| &**session)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }
}
