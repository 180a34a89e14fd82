//! GET, PUT, DELETE: the keyed operations, alone in a frame or as entries of a batch.
//!
//! Invariant: the key is hashed here, once, and nowhere after; the token travels with it. What
//! an operation borrows lies in the receive buffer. Everything the cluster will ever need of a
//! request (levels, context, freshness, once-id) has its place already.
//!
//! | offset | size | field       | meaning                                                    |
//! |--------|------|-------------|------------------------------------------------------------|
//! | 0      | 4    | namespace   | id of the namespace                                        |
//! | 4      | 1    | level       | [`Level`] R of a get, W of a put or delete                  |
//! | 5      | 1    | primary     | [`Level`] PR or PW: how many of those must be home replicas |
//! | 6      | 1    | durable     | [`Level`] DW: how many must have synced; 0 in a get          |
//! | 7      | 1    | verb        | the opcode, 3 to 5                                         |
//! | 8      | 2    | flags       | [`OperationFlags`]                                          |
//! | 10     | 2    | key_size    | bytes, 1 to 4,096                                          |
//! | 12     | 4    | argument    | put: value's bytes; get: `max_staleness_ms`, 0 any; delete: 0 |
//! | 16     |      |             | optional fields in the order of their flags, key, value     |

use annulus_engine::model::{NamespaceId, Piece, Pieces, Token, Value, limits};

use super::codec::{Malformed, Reader, Write, size_u16, size_u32};
use super::fields::{Condition, Level, OnceId, OperationFlags, Ttl, Version};
use super::frame::Opcode;
use super::request::{DecodeContext, Refusal};
use super::status::Status;

/// Size of the fixed part, in bytes.
pub const OPERATION_HEADER_SIZE: usize = 16;
/// Longest context, in bytes: two varints an entry at their longest, stamp, epoch, signature.
pub const CONTEXT_SIZE_MAX: usize = 512;

/// Reads the value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Get<'a> {
    /// Hash of the key.
    pub token: Token,
    /// Namespace of the key.
    pub namespace: NamespaceId,
    /// The key.
    pub key: &'a [u8],
    /// R: how many replicas must answer.
    pub level: Level,
    /// PR: how many of them must be home replicas.
    pub primary: Level,
    /// Oldest acceptable answer, in milliseconds; 0 accepts any.
    pub max_staleness_ms: u32,
    /// HASHED, SLOPPY, STRICT, TRACE, `VERSION_ONLY`, `STALE_OK`.
    pub flags: OperationFlags,
}

/// How a write is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WriteOptions<'a> {
    /// W: how many replicas must have it.
    pub level: Level,
    /// PW: how many of them must be home replicas.
    pub primary: Level,
    /// DW: how many must have synced it.
    pub durable: Level,
    /// What must hold of the key.
    pub condition: Condition,
    /// What the client has read of the key, as the server encoded it; opaque to the client.
    pub context: Option<&'a [u8]>,
    /// Makes sending again harmless.
    pub once: Option<OnceId>,
    /// HASHED, SLOPPY, STRICT, TRACE. Flags that announce a field are set by the encoder.
    pub flags: OperationFlags,
}

/// Writes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put<'a> {
    /// Hash of the key.
    pub token: Token,
    /// Namespace of the key.
    pub namespace: NamespaceId,
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: Value<'a>,
    /// How long it lives.
    pub ttl: Ttl,
    /// How it is written.
    pub options: WriteOptions<'a>,
}

/// Deletes a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delete<'a> {
    /// Hash of the key.
    pub token: Token,
    /// Namespace of the key.
    pub namespace: NamespaceId,
    /// The key.
    pub key: &'a [u8],
    /// How it is deleted.
    pub options: WriteOptions<'a>,
}

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are their types")]
pub enum Operation<'a> {
    Get(Get<'a>),
    Put(Put<'a>),
    Delete(Delete<'a>),
}

impl<'a> Operation<'a> {
    /// Reads one operation and hashes its key.
    ///
    /// # Errors
    /// [`Refusal`] with the status to answer; how much was read is then unspecified.
    #[inline]
    pub fn decode(
        reader: &mut Reader<'a>,
        context: &DecodeContext,
    ) -> Result<Operation<'a>, Refusal> {
        Raw::decode(reader, context)?.operation(context)
    }

    /// Reads a put that came in several pieces: its `head`, up to where `Request::value_of_put` says, and
    /// its value. Hashes the key.
    ///
    /// # Errors
    /// As [`Operation::decode`].
    pub fn decode_put(
        head: &'a [u8],
        value: &'a Pieces,
        context: &DecodeContext,
    ) -> Result<Operation<'a>, Refusal> {
        let mut reader = Reader::new(head);
        let (mut raw, value_size) = Raw::decode_head(&mut reader, context)?;
        reader.finish()?;
        if value.len() != value_size {
            return Err(Refusal::bad("body ends inside a field"));
        }
        raw.value = value.value();
        raw.operation(context)
    }

    /// Checks one operation without hashing its key.
    ///
    /// # Errors
    /// As [`Operation::decode`].
    pub(crate) fn check(reader: &mut Reader<'a>, context: &DecodeContext) -> Result<(), Refusal> {
        Raw::decode(reader, context).map(drop)
    }

    /// The operation's opcode.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        match self {
            Operation::Get(_) => Opcode::Get,
            Operation::Put(_) => Opcode::Put,
            Operation::Delete(_) => Opcode::Delete,
        }
    }

    /// Namespace of the key.
    #[must_use]
    pub fn namespace(&self) -> NamespaceId {
        match self {
            Operation::Get(get) => get.namespace,
            Operation::Put(put) => put.namespace,
            Operation::Delete(delete) => delete.namespace,
        }
    }

    /// Hash of the key.
    #[inline]
    #[must_use]
    pub fn token(&self) -> Token {
        match self {
            Operation::Get(get) => get.token,
            Operation::Put(put) => put.token,
            Operation::Delete(delete) => delete.token,
        }
    }

    /// The key and its namespace.
    #[must_use]
    pub fn key(&self) -> (NamespaceId, &'a [u8]) {
        match self {
            Operation::Get(get) => (get.namespace, get.key),
            Operation::Put(put) => (put.namespace, put.key),
            Operation::Delete(delete) => (delete.namespace, delete.key),
        }
    }

    /// Bytes that [`Operation::encode`] appends.
    #[must_use]
    pub fn size(&self) -> usize {
        let options = |options: &WriteOptions<'_>| {
            let version = if matches!(options.condition, Condition::IfVersion(_)) {
                Version::SIZE
            } else {
                0
            };
            let context = options.context.map_or(0, |context| 2 + context.len());
            version + context + if options.once.is_some() { 16 } else { 0 }
        };
        let body = match self {
            Operation::Get(get) => get.key.len(),
            Operation::Put(put) => {
                let ttl = if put.ttl == Ttl::Default { 0 } else { 8 };
                ttl + options(&put.options) + put.key.len() + put.value.len()
            }
            Operation::Delete(delete) => options(&delete.options) + delete.key.len(),
        };
        OPERATION_HEADER_SIZE + body
    }

    /// Appends the operation. The token is not sent: the server makes its own.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Operation::Get(get) => {
                out.put_u32(get.namespace.0);
                out.put(&[get.level.to_u8(), get.primary.to_u8(), 0, Opcode::Get.request()]);
                out.put_u16(get.flags.only(OperationFlags::GET).0);
                out.put_u16(size_u16(get.key.len()));
                out.put_u32(get.max_staleness_ms);
                out.put(get.key);
            }
            Operation::Put(put) => {
                let value_size = size_u32(put.value.len());
                encode_write(
                    out,
                    Opcode::Put,
                    put.namespace,
                    put.key,
                    &put.options,
                    put.ttl,
                    value_size,
                );
                put.value.copy_to(out);
            }
            Operation::Delete(delete) => {
                let options = &delete.options;
                encode_write(
                    out,
                    Opcode::Delete,
                    delete.namespace,
                    delete.key,
                    options,
                    Ttl::Default,
                    0,
                );
            }
        }
    }
}

impl Operation<'_> {
    /// What [`Operation::encode`] appends, in pieces: those of a value that is in pieces are shared.
    #[must_use]
    pub fn to_pieces(&self) -> Pieces {
        let mut head = Vec::new();
        let Operation::Put(put) = self else {
            self.encode(&mut head);
            return head.into();
        };
        let Value::Pieces(value) = put.value else {
            self.encode(&mut head);
            return head.into();
        };
        let size = size_u32(value.len());
        encode_write(&mut head, Opcode::Put, put.namespace, put.key, &put.options, put.ttl, size);
        Pieces::new([&[Piece::new(head)], value.list()].concat())
    }
}

/// Appends everything of a write but the value.
fn encode_write(
    out: &mut Vec<u8>,
    verb: Opcode,
    namespace: NamespaceId,
    key: &[u8],
    options: &WriteOptions<'_>,
    ttl: Ttl,
    argument: u32,
) {
    let flags = options
        .flags
        .only(OperationFlags(0b1111))
        .with_if(options.condition == Condition::IfAbsent, OperationFlags::IF_ABSENT)
        .with_if(matches!(options.condition, Condition::IfVersion(_)), OperationFlags::IF_VERSION)
        .with_if(ttl != Ttl::Default, OperationFlags::TTL)
        .with_if(options.context.is_some(), OperationFlags::CONTEXT)
        .with_if(options.once.is_some(), OperationFlags::ONCE);
    out.put_u32(namespace.0);
    out.put(&[
        options.level.to_u8(),
        options.primary.to_u8(),
        options.durable.to_u8(),
        verb.request(),
    ]);
    out.put_u16(flags.0);
    out.put_u16(size_u16(key.len()));
    out.put_u32(argument);
    if let Condition::IfVersion(version) = options.condition {
        version.encode(out);
    }
    match ttl {
        Ttl::Default => {}
        Ttl::Never => out.put_u64(u64::MAX),
        Ttl::Millis(millis) => out.put_u64(millis),
    }
    if let Some(context) = options.context {
        out.put_short(context);
    }
    if let Some(once) = options.once {
        out.put_u64(once.client);
        out.put_u64(once.number);
    }
    out.put(key);
}

/// Bytes before the value of a put that begins with these bytes. `None` if it is no put, or breaks
/// a rule, or all before its value is not there.
pub(crate) fn put_head_size(bytes: &[u8], context: &DecodeContext) -> Option<usize> {
    let mut reader = Reader::new(bytes);
    let (raw, _) = Raw::decode_head(&mut reader, context).ok()?;
    (raw.verb == Opcode::Put).then(|| bytes.len() - reader.remaining())
}

/// An operation whose key is not hashed yet.
struct Raw<'a> {
    verb: Opcode,
    namespace: NamespaceId,
    level: Level,
    primary: Level,
    durable: Level,
    flags: OperationFlags,
    argument: u32,
    condition: Condition,
    ttl: Ttl,
    context: Option<&'a [u8]>,
    once: Option<OnceId>,
    key: &'a [u8],
    value: Value<'a>,
}

impl<'a> Raw<'a> {
    #[inline]
    fn decode(reader: &mut Reader<'a>, limits: &DecodeContext) -> Result<Raw<'a>, Refusal> {
        let (mut raw, value_size) = Raw::decode_head(reader, limits)?;
        raw.value = Value::Whole(reader.bytes(value_size)?);
        Ok(raw)
    }

    /// Everything but the value, and the value's size.
    #[inline]
    fn decode_head(
        reader: &mut Reader<'a>,
        limits: &DecodeContext,
    ) -> Result<(Raw<'a>, usize), Refusal> {
        let head: [u8; OPERATION_HEADER_SIZE] = reader.array()?;
        let namespace = NamespaceId(u32::from_le_bytes([head[0], head[1], head[2], head[3]]));
        let flags = OperationFlags(u16::from_le_bytes([head[8], head[9]]));
        let key_size = usize::from(u16::from_le_bytes([head[10], head[11]]));
        let argument = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
        let (verb, allowed) = match head[7] {
            3 => (Opcode::Get, OperationFlags::GET),
            4 => (Opcode::Put, OperationFlags::PUT),
            5 => (Opcode::Delete, OperationFlags::DELETE),
            _ => return Err(Refusal::bad("verb is not get, put or delete")),
        };
        if flags.0 & !allowed.0 != 0 {
            return Err(Refusal::new(Status::UNSUPPORTED, "flag is unknown or not for this verb"));
        }
        if flags.has(OperationFlags::SLOPPY.with(OperationFlags::STRICT)) {
            return Err(Refusal::bad("both sloppy and strict"));
        }
        if key_size == 0 {
            return Err(Refusal::bad("key is empty"));
        }
        if key_size > limits::KEY_SIZE_MAX {
            return Err(Refusal::too_big("key", limits::KEY_SIZE_MAX as u64));
        }
        if key_size < 8 && flags.has(OperationFlags::HASHED) {
            return Err(Refusal::bad("hashed key is shorter than 8 bytes"));
        }
        let mut raw = Raw {
            verb,
            namespace,
            level: Level::from_u8(head[4])?,
            primary: Level::from_u8(head[5])?,
            durable: Level::from_u8(head[6])?,
            flags,
            argument,
            condition: Condition::Always,
            ttl: Ttl::Default,
            context: None,
            once: None,
            key: &[],
            value: Value::EMPTY,
        };
        let value_size = match verb {
            Opcode::Put => argument,
            Opcode::Delete if argument != 0 => return Err(Refusal::bad("delete with a value")),
            Opcode::Get if raw.durable != Level::Default => {
                return Err(Refusal::bad("get with a durable level"));
            }
            _ => 0,
        };
        if value_size > limits.value_size_max {
            return Err(Refusal::too_big("value", u64::from(limits.value_size_max)));
        }
        // The common case, a plain operation, has none of the optional fields.
        if flags.0 & !OperationFlags::CHOICES.0 != 0 {
            raw.optional_fields(reader)?;
        }
        raw.key = reader.bytes(key_size)?;
        Ok((raw, value_size as usize))
    }

    fn optional_fields(&mut self, reader: &mut Reader<'a>) -> Result<(), Refusal> {
        let flags = self.flags;
        if flags.has(OperationFlags::IF_ABSENT.with(OperationFlags::IF_VERSION)) {
            return Err(Refusal::bad("both if-absent and if-version"));
        }
        if flags.has(OperationFlags::IF_ABSENT) {
            self.condition = Condition::IfAbsent;
        }
        if flags.has(OperationFlags::IF_VERSION) {
            self.condition = Condition::IfVersion(Version::decode(reader)?);
        }
        if flags.has(OperationFlags::TTL) {
            self.ttl = match reader.u64()? {
                u64::MAX => Ttl::Never,
                0 => return Err(Refusal::bad("ttl of zero")),
                millis if millis > limits::TTL_MS_MAX => {
                    return Err(Refusal::too_big("ttl", limits::TTL_MS_MAX));
                }
                millis => Ttl::Millis(millis),
            };
        }
        if flags.has(OperationFlags::CONTEXT) {
            let context = reader.short_bytes()?;
            if context.len() > CONTEXT_SIZE_MAX {
                return Err(Refusal::too_big("context", CONTEXT_SIZE_MAX as u64));
            }
            self.context = Some(context);
        }
        if flags.has(OperationFlags::ONCE) {
            self.once = Some(OnceId { client: reader.u64()?, number: reader.u64()? });
        }
        Ok(())
    }

    #[inline]
    fn operation(self, decode: &DecodeContext) -> Result<Operation<'a>, Refusal> {
        let token = if self.flags.has(OperationFlags::HASHED) {
            Token::of_hashed_key(self.key).ok_or(Malformed("hashed key is too short"))?
        } else {
            Token::of_key(self.key, decode.hash_seed)
        };
        let Raw { namespace, key, .. } = self;
        Ok(match self.verb {
            Opcode::Get => Operation::Get(Get {
                token,
                namespace,
                key,
                level: self.level,
                primary: self.primary,
                max_staleness_ms: self.argument,
                flags: self.flags,
            }),
            Opcode::Put => Operation::Put(Put {
                token,
                namespace,
                key,
                value: self.value,
                ttl: self.ttl,
                options: self.options(),
            }),
            _ => Operation::Delete(Delete { token, namespace, key, options: self.options() }),
        })
    }

    #[inline]
    fn options(&self) -> WriteOptions<'a> {
        WriteOptions {
            level: self.level,
            primary: self.primary,
            durable: self.durable,
            condition: self.condition,
            context: self.context,
            once: self.once,
            flags: self.flags.only(OperationFlags(0b1111)),
        }
    }
}
