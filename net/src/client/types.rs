//! What a caller of the client gives and gets: options, results, errors.
//!
//! Invariant: every error says whether the request may have happened.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use annulus_engine::model::Timestamp;

use crate::wire::fields::{Condition, Level, OperationFlags, Ttl, Version};
use crate::wire::response::{Failure, ReadReply, WriteFacts};
use crate::wire::status::{Class, Status};

/// How a client connects and behaves.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// `host:port` of any nodes; the first that answers introduces the others. Each next one is
    /// tried when those before have not answered for a quarter of `connect_timeout`.
    pub addresses: Vec<String>,
    /// Time for an operation, retries included, unless the operation says otherwise. Default 1 s.
    pub timeout: Duration,
    /// Time for a connection to be made and greeted. Default 1 s.
    pub connect_timeout: Duration,
    /// Told to the server, for its logs. Default `annulus-client`.
    pub name: String,
    /// The cluster expected; 0 for any.
    pub cluster: u128,
    /// Seed of back-off and ids; `None` draws one.
    pub seed: Option<u64>,
    /// Retries allowed, hedges included, in percent of successes. Default 10.
    pub retry_percent: u32,
    /// Reads that may be sent once more to another node because they are late, in percent of
    /// reads. Default 5; 0 turns such hedges off.
    pub hedge_percent: u32,
    /// No read counts as late before. Above, it is late when it has taken longer than about 97 of
    /// 100 recent ones. Default 1 ms.
    pub hedge_after_min: Duration,
    /// No node is suspected before an answer has been outstanding for so long. Above, it is when
    /// it takes more than eight times as long as usual. Default 50 ms.
    pub suspect_after_min: Duration,
    /// First back-off; doubles with each retry, with full jitter. Default 5 ms.
    pub backoff: Duration,
    /// Longest back-off. Default 500 ms.
    pub backoff_max: Duration,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            addresses: vec!["127.0.0.1:7301".to_owned()],
            timeout: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            name: "annulus-client".to_owned(),
            cluster: 0,
            seed: None,
            retry_percent: 10,
            hedge_percent: 5,
            hedge_after_min: Duration::from_millis(1),
            suspect_after_min: Duration::from_millis(50),
            backoff: Duration::from_millis(5),
            backoff_max: Duration::from_millis(500),
        }
    }
}

impl ClientOptions {
    /// The defaults, with these addresses.
    #[must_use]
    pub fn new(addresses: impl IntoIterator<Item = impl Into<String>>) -> ClientOptions {
        ClientOptions {
            addresses: addresses.into_iter().map(Into::into).collect(),
            ..ClientOptions::default()
        }
    }
}

/// Named pairs of levels, for three replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// W=2, R=2: a read sees what was acknowledged before it, with one node down.
    Balanced,
    /// W=1, R=3: fast writes, slow reads that need every node.
    FastWrites,
    /// W=3, R=1: fast reads, slow writes that need every node.
    FastReads,
    /// W=1, R=1: fastest; a read may be old.
    Fastest,
}

impl Preset {
    /// W.
    #[must_use]
    pub fn write(self) -> Level {
        match self {
            Preset::Balanced => Level::Quorum,
            Preset::FastWrites | Preset::Fastest => Level::ONE,
            Preset::FastReads => Level::All,
        }
    }

    /// R.
    #[must_use]
    pub fn read(self) -> Level {
        match self {
            Preset::Balanced => Level::Quorum,
            Preset::FastWrites => Level::All,
            Preset::FastReads | Preset::Fastest => Level::ONE,
        }
    }
}

/// How to read.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// R.
    pub level: Level,
    /// PR.
    pub primary: Level,
    /// Oldest acceptable answer; `None` accepts any.
    pub max_staleness: Option<Duration>,
    /// HASHED, SLOPPY, STRICT, TRACE, VERSION_ONLY, STALE_OK.
    pub flags: OperationFlags,
    /// Time for the whole operation; `None` for the client's.
    pub timeout: Option<Duration>,
}

/// How to write or delete.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// W.
    pub level: Level,
    /// PW.
    pub primary: Level,
    /// DW.
    pub durable: Level,
    /// Time to live; ignored by a delete.
    pub ttl: Ttl,
    /// What must hold of the key.
    pub condition: Condition,
    /// What was read of the key before.
    pub context: Option<Context>,
    /// HASHED, SLOPPY, STRICT, TRACE.
    pub flags: OperationFlags,
    /// Time for the whole operation; `None` for the client's.
    pub timeout: Option<Duration>,
}

/// What a client has read of a key, as the server encoded it. Opaque; as text it is hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Context(pub Vec<u8>);

impl Context {
    /// The context of these bytes, `None` if there are none.
    fn of(bytes: &[u8]) -> Option<Context> {
        (!bytes.is_empty()).then(|| Context(bytes.to_vec()))
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Context {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Context, String> {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let pair = |pair: &[u8]| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        };
        text.as_bytes()
            .chunks(2)
            .map(pair)
            .collect::<Option<Vec<u8>>>()
            .map(Context)
            .ok_or_else(|| "a context is an even number of hexadecimal digits".to_owned())
    }
}

/// One live value of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sibling {
    /// The value.
    pub value: Vec<u8>,
    /// The write it comes from.
    pub version: Version,
    /// Milliseconds since 2024-01-01 from which it is gone; 0: never.
    pub expiry_ms: u64,
}

/// The answer to a read.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Read {
    /// None: absent. More than one: concurrent writes, to be reconciled.
    pub values: Vec<Sibling>,
    /// To be given back with the next write of the key.
    pub context: Option<Context>,
    /// Every write at or below it is in the answer; zero when unknown.
    pub as_of: Timestamp,
    /// Replicas that answered.
    pub answers: u8,
    /// Of them, home replicas.
    pub primaries_read: u8,
    /// JSON, if asked for.
    pub trace: Option<String>,
}

impl Read {
    pub(crate) fn of(reply: &ReadReply<'_>) -> Read {
        let sibling = |value: &crate::wire::response::ValueRef<'_>| Sibling {
            value: value.value.to_vec(),
            version: value.version,
            expiry_ms: value.expiry_ms,
        };
        Read {
            values: reply.values.iter().map(sibling).collect(),
            context: Context::of(reply.facts.context),
            as_of: reply.facts.as_of,
            answers: reply.facts.answers,
            primaries_read: reply.facts.primaries,
            trace: text(reply.facts.trace),
        }
    }
}

/// The answer to a write that was done.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Written {
    /// Of this write.
    pub version: Version,
    /// Nodes that have it.
    pub acks: u8,
    /// Of them, home replicas.
    pub primary: u8,
    /// Of them, synced to disk.
    pub durable: u8,
    /// 0: synced before the answer; else within this many milliseconds.
    pub window_ms: u32,
    /// To be given back with the next write of the key.
    pub context: Option<Context>,
    /// JSON, if asked for.
    pub trace: Option<String>,
}

impl Written {
    pub(crate) fn of(facts: &WriteFacts<'_>) -> Written {
        Written {
            version: facts.version,
            acks: facts.acks,
            primary: facts.primary,
            durable: facts.durable,
            window_ms: facts.window_ms,
            context: Context::of(facts.context),
            trace: text(facts.trace),
        }
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    (!bytes.is_empty()).then(|| String::from_utf8_lossy(bytes).into_owned())
}

/// One operation of a batch.
#[derive(Clone, Debug)]
pub enum BatchOperation {
    /// Reads a key.
    Get {
        /// The key.
        key: Vec<u8>,
        /// How; its timeout is ignored.
        options: ReadOptions,
    },
    /// Writes a key.
    Put {
        /// The key.
        key: Vec<u8>,
        /// The value.
        value: Vec<u8>,
        /// How; its timeout is ignored.
        options: WriteOptions,
    },
    /// Deletes a key.
    Delete {
        /// The key.
        key: Vec<u8>,
        /// How; its timeout is ignored.
        options: WriteOptions,
    },
}

/// The result of one operation of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatchAnswer {
    /// Of a get.
    Read(Read),
    /// Of a put or delete.
    Written(Written),
}

/// Result of a client's operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why there is no answer, and whether the request may have happened all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No server could be reached. Not started.
    #[error("no server reached: {what}")]
    Unreachable {
        /// Which address, and what the system said.
        what: String,
    },
    /// Not started, and never will be; trying again later or elsewhere may help. The client has
    /// tried again as often as its budget and the deadline allowed.
    #[error("not started: {status}: {message}")]
    NotStarted {
        /// Why.
        status: Status,
        /// Do not try again before.
        retry_after: Duration,
        /// For people.
        message: String,
    },
    /// Not started; the same request would be refused again.
    #[error("refused: {status}: {message}")]
    Refused {
        /// Why.
        status: Status,
        /// The limit that was exceeded, or what the status says.
        detail: u64,
        /// For people.
        message: String,
    },
    /// It happens once or not at all, possibly later.
    #[error("may be applied: {message}")]
    MayBeApplied {
        /// Nodes known to have it.
        acks: u8,
        /// Of them, home replicas.
        primary: u8,
        /// Of them, synced.
        durable: u8,
        /// For people.
        message: String,
    },
    /// The expected version or absence does not hold; nothing was written.
    #[error("condition false: the live version is {current}")]
    ConditionFailed {
        /// The live value's version; all zero when the key is absent.
        current: Version,
        /// What is known of the key now.
        context: Option<Context>,
    },
    /// One value was asked for and there are several; see `Namespace::read`, or set a resolver.
    #[error("{count} concurrent values; resolve them and write back with the context")]
    Siblings {
        /// How many.
        count: usize,
    },
    /// No namespace has this name.
    #[error("no namespace is named {name:?}")]
    NoNamespace {
        /// The name.
        name: String,
    },
    /// What the server sent is not the protocol. A read; nothing was changed.
    #[error("the server broke the protocol: {what}")]
    Protocol {
        /// The rule broken.
        what: String,
    },
}

impl Error {
    /// The error that a reply's status and body are.
    pub(crate) fn of(failure: &Failure<'_>) -> Error {
        let message = failure.message.to_owned();
        match failure.status.class() {
            Class::Refused => {
                Error::Refused { status: failure.status, detail: failure.detail, message }
            }
            Class::NotStarted => Error::NotStarted {
                status: failure.status,
                retry_after: Duration::from_millis(u64::from(failure.retry_after_ms)),
                message,
            },
            Class::Answered | Class::MayBeApplied => Error::MayBeApplied {
                acks: failure.acks,
                primary: failure.primary,
                durable: failure.durable,
                message,
            },
        }
    }

    pub(crate) fn not_started(status: Status, message: impl Into<String>) -> Error {
        Error::NotStarted { status, retry_after: Duration::ZERO, message: message.into() }
    }

    pub(crate) fn may_be_applied(message: impl Into<String>) -> Error {
        Error::MayBeApplied { acks: 0, primary: 0, durable: 0, message: message.into() }
    }

    /// The class of the error: what it says about the request's effect.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Error::Unreachable { .. } | Error::NotStarted { .. } => Class::NotStarted,
            Error::MayBeApplied { .. } => Class::MayBeApplied,
            Error::ConditionFailed { .. } | Error::Siblings { .. } => Class::Answered,
            Error::Refused { .. } | Error::NoNamespace { .. } | Error::Protocol { .. } => {
                Class::Refused
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_read_back_from_text() {
        let context = Context(vec![0, 0x1f, 0xff]);
        assert_eq!(context.to_string(), "001fff");
        assert_eq!("001fff".parse(), Ok(context));
        assert!("001".parse::<Context>().is_err());
        assert!("zz".parse::<Context>().is_err());
        assert!("é".parse::<Context>().is_err());
    }

    #[test]
    fn every_status_becomes_an_error_of_its_class() {
        for &status in Status::ALL {
            if status.class() != Class::Answered {
                assert_eq!(Error::of(&Failure::new(status, "")).class(), status.class());
            }
        }
    }
}
