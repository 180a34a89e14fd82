//! The server that a command talks to, and what its errors mean for the exit code.
//!
//! Invariant: the exit code says whether the request may have happened, as the client driver's
//! error does; that mapping is here and nowhere else.

use std::time::Duration;

use annulus_net::client::{BlockingClient, BlockingNamespace, ClientOptions, Error};
use annulus_net::wire::Status;
use serde::de::DeserializeOwned;

use super::arguments::{InNamespace, Server};
use super::{Exit, Failure};
use crate::commands::Command;

/// Time for a lone get, put or delete.
pub(crate) const TIMEOUT_SHORT: Duration = Duration::from_secs(1);
/// Time for what may wait for a disk or behind much else.
pub(crate) const TIMEOUT_LONG: Duration = Duration::from_secs(30);

/// Connects to the first address that answers.
pub(crate) fn connect(server: &Server, default: Duration) -> Result<BlockingClient, Failure> {
    let timeout = server.timeout.map_or(default, |span| span.0);
    if timeout.is_zero() {
        return Err(Failure::usage("--timeout must be above 0"));
    }
    let options = ClientOptions {
        timeout,
        connect_timeout: timeout.min(TIMEOUT_SHORT.saturating_mul(5)),
        name: "annulus-cli".to_owned(),
        ..ClientOptions::new(server.addr.iter().map(String::as_str))
    };
    BlockingClient::connect(options).map_err(failure)
}

/// Connects, and finds the namespace.
pub(crate) fn connect_to_namespace(
    server: &Server,
    namespace: &InNamespace,
    default: Duration,
) -> Result<BlockingNamespace, Failure> {
    connect(server, default)?.namespace(&namespace.ns).map_err(failure)
}

/// Runs a command at the server and reads its reply.
pub(crate) fn command<T: DeserializeOwned>(
    server: &Server,
    command: &Command,
) -> Result<T, Failure> {
    let reply = connect(server, TIMEOUT_LONG)?
        .admin(command.name(), &command.arguments(), None)
        .map_err(|error| command_failure(command, error))?;
    parse(&reply)
}

/// Reads a document that a server sent.
pub(crate) fn parse<T: DeserializeOwned>(reply: &str) -> Result<T, Failure> {
    serde_json::from_str(reply).map_err(|error| {
        let message = format!("the server's answer cannot be read: {error}");
        Failure::new(Exit::Unreachable, message)
    })
}

fn command_failure(command: &Command, error: Error) -> Failure {
    match &error {
        Error::Refused { status: Status::FAILED, message, .. } => {
            Failure::negative(message.clone())
        }
        Error::Refused { status: Status::BAD_REQUEST, message, .. } => {
            Failure::usage(message.clone())
        }
        // What only reads has no effect, whatever became of the answer.
        Error::MayBeApplied { message, .. } if !command.changes() => {
            Failure::new(Exit::Unreachable, message.clone())
        }
        _ => failure(error),
    }
}

/// What an error of the client means.
pub(crate) fn failure(error: Error) -> Failure {
    let exit = exit_of(&error);
    Failure::new(exit, error.to_string())
}

/// The exit code that an error of the client means.
pub(crate) fn exit_of(error: &Error) -> Exit {
    match error {
        Error::Unreachable { .. } | Error::Protocol { .. } => Exit::Unreachable,
        Error::NotStarted { .. } | Error::Refused { .. } | Error::NoNamespace { .. } => {
            Exit::NotStarted
        }
        Error::MayBeApplied { .. } => Exit::MayBeApplied,
        Error::ConditionFailed { .. } | Error::Siblings { .. } => Exit::Negative,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use annulus_net::wire::{Class, Version};

    fn refused(status: Status, detail: u64) -> Error {
        Error::Refused { status, detail, message: "because".into() }
    }

    #[test]
    fn exit_codes_say_what_may_have_happened() {
        let not_started = |status| Error::NotStarted {
            status,
            retry_after: Duration::ZERO,
            message: String::new(),
        };
        let may_be =
            Error::MayBeApplied { acks: 0, primary: 0, durable: 0, message: String::new() };
        let condition = Error::ConditionFailed { current: Version::default(), context: None };
        for (error, exit) in [
            (Error::Unreachable { what: String::new() }, 3),
            (not_started(Status::BUSY), 4),
            (not_started(Status::FULL), 4),
            (refused(Status::TOO_BIG, 9), 4),
            (refused(Status::BAD_CONTEXT, 0), 4),
            (Error::NoNamespace { name: "x".into() }, 4),
            (may_be, 5),
            (condition, 1),
            (Error::Siblings { count: 2 }, 1),
        ] {
            let class = error.class();
            let found = failure(error).exit as u8;
            assert_eq!(found, exit);
            assert_eq!(found == 5, class == Class::MayBeApplied);
        }
    }

    #[test]
    fn commands_tell_absence_from_bad_input() {
        let fail = |error| command_failure(&Command::NsList, error).exit;
        assert_eq!(fail(refused(Status::FAILED, 0)), Exit::Negative);
        assert_eq!(fail(refused(Status::DENIED, 0)), Exit::NotStarted);
        assert_eq!(fail(refused(Status::BAD_REQUEST, 0)), Exit::Usage);
    }
}
