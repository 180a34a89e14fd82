//! Client messages, borrowed from the receive buffer. Here the key gets its token.
//!
//! Invariant: decoding never allocates, and never looks at a field before its limit was checked.
//! A body that breaks a rule is refused with a status; the connection lives on, because the
//! frame around it was whole.

use annulus_engine::model::{Pieces, limits};

use super::batch::{self, Batch};
use super::codec::{Malformed, Reader, Write, size_u16};
use super::frame::Opcode;
use super::hello::Hello;
use super::operation::{
    CONTEXT_SIZE_MAX, Delete, Get, OPERATION_HEADER_SIZE, Operation, Put, put_head_size,
};
use super::scan::Scan;
use super::status::Status;

/// Most bytes of a PING's body.
pub const PING_SIZE_MAX: usize = 1024;
/// Longest name of an admin command, in bytes.
pub const COMMAND_SIZE_MAX: usize = 64;

/// What a decoder must know of its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeContext {
    /// Seed of the cluster's hash.
    pub hash_seed: u64,
    /// Longest value, in bytes.
    pub value_size_max: u32,
    /// Most operations of a batch.
    pub batch_count_max: u32,
    /// Most bytes of a batch or admin command.
    pub message_size_max: u32,
}

impl DecodeContext {
    /// Largest message that any request may need, in bytes.
    #[must_use]
    pub fn request_size_max(&self) -> usize {
        let put = OPERATION_HEADER_SIZE
            + 2
            + CONTEXT_SIZE_MAX
            + 20
            + 8
            + 16
            + limits::KEY_SIZE_MAX
            + self.value_size_max as usize;
        put.max(self.message_size_max as usize)
    }
}

/// Why a request is not carried out. It has not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {reason}")]
pub struct Refusal {
    /// The status to answer.
    pub status: Status,
    /// The first rule broken.
    pub reason: &'static str,
    /// The limit that was exceeded, or 0.
    pub detail: u64,
}

impl Refusal {
    /// A refusal without detail.
    #[must_use]
    pub fn new(status: Status, reason: &'static str) -> Refusal {
        Refusal { status, reason, detail: 0 }
    }

    /// A body that breaks the format's rules.
    #[cold]
    #[must_use]
    pub fn bad(reason: &'static str) -> Refusal {
        Refusal::new(Status::BAD_REQUEST, reason)
    }

    /// Something above its limit; `what` says what.
    #[cold]
    #[must_use]
    pub fn too_big(what: &'static str, limit: u64) -> Refusal {
        Refusal { status: Status::TOO_BIG, reason: what, detail: limit }
    }
}

impl From<Malformed> for Refusal {
    fn from(malformed: Malformed) -> Refusal {
        Refusal::bad(malformed.0)
    }
}

/// A client's message.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// First message of a connection. [`crate::server_connection`] answers it.
    Hello(Hello<'a>),
    /// The bytes come back. [`crate::server_connection`] answers it.
    Ping(&'a [u8]),
    /// Reads a key.
    Get(Get<'a>),
    /// Writes a key.
    Put(Put<'a>),
    /// Deletes a key.
    Delete(Delete<'a>),
    /// Several of the three.
    Batch(Batch<'a>),
    /// A page of records.
    Scan(Scan<'a>),
    /// Counters as JSON.
    Stats,
    /// A named command with JSON both ways.
    Admin(Admin<'a>),
}

/// A named command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admin<'a> {
    /// For example `ns.create`. Lower case, digits, dots.
    pub command: &'a str,
    /// Its arguments; checked to be UTF-8 only.
    pub json: &'a str,
}

impl<'a> Request<'a> {
    /// Reads the body of a request with this opcode.
    ///
    /// # Errors
    /// [`Refusal`] with the status to answer.
    #[inline]
    pub fn decode(
        opcode: u8,
        body: &'a [u8],
        context: &DecodeContext,
    ) -> Result<Request<'a>, Refusal> {
        match opcode {
            3..=5 => {
                if body.get(7) != Some(&opcode) {
                    return Err(Refusal::bad("verb and opcode differ"));
                }
                let mut reader = Reader::new(body);
                let operation = Operation::decode(&mut reader, context)?;
                reader.finish()?;
                Ok(operation.into())
            }
            _ => Request::decode_other(opcode, body, context),
        }
    }

    /// Where the value begins in the body of a put whose value should stay in pieces. `None` for
    /// every other body: whoever wants to read it needs it in one slice.
    #[must_use]
    pub fn value_of_put(opcode: u8, body: &Pieces, context: &DecodeContext) -> Option<usize> {
        let first = body.list().first()?.bytes();
        if opcode != Opcode::Put.request() || body.list().len() < 2 || first.get(7) != Some(&opcode)
        {
            return None;
        }
        put_head_size(first, context)
    }

    /// Reads a put that was taken apart where [`Request::value_of_put`] says.
    ///
    /// # Errors
    /// As [`Request::decode`].
    pub fn decode_put(
        head: &'a [u8],
        value: &'a Pieces,
        context: &DecodeContext,
    ) -> Result<Request<'a>, Refusal> {
        Operation::decode_put(head, value, context).map(Request::from)
    }

    fn decode_other(
        opcode: u8,
        body: &'a [u8],
        context: &DecodeContext,
    ) -> Result<Request<'a>, Refusal> {
        match Opcode::from_u8(opcode) {
            Some(Opcode::Hello) => Ok(Request::Hello(Hello::decode(body)?)),
            Some(Opcode::Ping) if body.len() > PING_SIZE_MAX => {
                Err(Refusal::too_big("ping", PING_SIZE_MAX as u64))
            }
            Some(Opcode::Ping) => Ok(Request::Ping(body)),
            Some(Opcode::Batch) => Ok(Request::Batch(Batch::decode(body, context)?)),
            Some(Opcode::Scan) => Ok(Request::Scan(Scan::decode(body)?)),
            Some(Opcode::Stats) if body.is_empty() => Ok(Request::Stats),
            Some(Opcode::Stats) => Err(Refusal::bad("stats with a body")),
            Some(Opcode::Admin) => Ok(Request::Admin(Admin::decode(body)?)),
            _ => Err(Refusal::new(Status::UNSUPPORTED, "unknown opcode")),
        }
    }
}

impl<'a> From<Operation<'a>> for Request<'a> {
    #[inline]
    fn from(operation: Operation<'a>) -> Request<'a> {
        match operation {
            Operation::Get(get) => Request::Get(get),
            Operation::Put(put) => Request::Put(put),
            Operation::Delete(delete) => Request::Delete(delete),
        }
    }
}

impl<'a> Admin<'a> {
    /// Reads the body: command's size (2 bytes), command, JSON to the end.
    fn decode(body: &'a [u8]) -> Result<Admin<'a>, Refusal> {
        let mut reader = Reader::new(body);
        let command = reader.name(COMMAND_SIZE_MAX)?;
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'.';
        if command.is_empty() || !command.bytes().all(plain) {
            return Err(Refusal::bad("admin command is not lower case letters, digits and dots"));
        }
        let json = std::str::from_utf8(reader.rest())
            .map_err(|_| Refusal::bad("admin arguments are not UTF-8"))?;
        Ok(Admin { command, json })
    }
}

/// A request as the client makes it, before it has a frame.
#[derive(Clone, Copy, Debug)]
pub enum Outgoing<'a> {
    /// First message of a connection.
    Hello(Hello<'a>),
    /// At most [`PING_SIZE_MAX`] bytes.
    Ping(&'a [u8]),
    /// A keyed operation; its token is not sent.
    Operation(Operation<'a>),
    /// Several keyed operations.
    Batch(&'a [Operation<'a>]),
    /// A page of records.
    Scan(Scan<'a>),
    /// Counters as JSON.
    Stats,
    /// A named command; at most [`COMMAND_SIZE_MAX`] bytes of name.
    Admin(Admin<'a>),
}

impl Outgoing<'_> {
    /// The opcode of the request.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        match self {
            Outgoing::Hello(_) => Opcode::Hello,
            Outgoing::Ping(_) => Opcode::Ping,
            Outgoing::Operation(operation) => operation.opcode(),
            Outgoing::Batch(_) => Opcode::Batch,
            Outgoing::Scan(_) => Opcode::Scan,
            Outgoing::Stats => Opcode::Stats,
            Outgoing::Admin(_) => Opcode::Admin,
        }
    }

    /// Bytes that [`Outgoing::encode`] appends.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Outgoing::Hello(hello) => hello.size(),
            Outgoing::Ping(bytes) => bytes.len(),
            Outgoing::Operation(operation) => operation.size(),
            Outgoing::Batch(operations) => batch::size(operations),
            Outgoing::Scan(scan) => scan.size(),
            Outgoing::Stats => 0,
            Outgoing::Admin(admin) => 2 + admin.command.len() + admin.json.len(),
        }
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Outgoing::Hello(hello) => hello.encode(out),
            Outgoing::Ping(bytes) => out.put(bytes),
            Outgoing::Operation(operation) => operation.encode(out),
            Outgoing::Batch(operations) => batch::encode(operations, out),
            Outgoing::Scan(scan) => scan.encode(out),
            Outgoing::Stats => {}
            Outgoing::Admin(admin) => {
                out.put_u16(size_u16(admin.command.len()));
                out.put(admin.command.as_bytes());
                out.put(admin.json.as_bytes());
            }
        }
    }
}
