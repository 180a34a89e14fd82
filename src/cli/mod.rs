//! The command line: arguments in, exit code out.
//!
//! Invariant: results go to stdout and nothing else does; everything else goes to stderr; the
//! exit code is one of [`Exit`], whose numbers scripts rely on. Each command is a file here, each
//! shows an example under `--help`.

mod admin;
mod arguments;
mod data;
#[cfg(feature = "uring")]
mod dev;
mod doctor;
mod export;
mod import;
mod lines;
mod namespace;
mod output;
mod remote;
#[cfg(feature = "uring")]
mod serve;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use arguments::{Arguments, Command};

/// How a command ended. The numbers are a contract with scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// Not found, or the condition does not hold, or damage was found.
    Negative = 1,
    /// Bad usage or bad input.
    Usage = 2,
    /// No server could be reached.
    Unreachable = 3,
    /// Refused, and not started.
    NotStarted = 4,
    /// May have been applied.
    MayBeApplied = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command ended without a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into() }
    }

    fn usage(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, message)
    }

    fn negative(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Negative, message)
    }
}

/// What a command comes to.
type Outcome = Result<Exit, Failure>;

/// Runs a command line and gives the process's exit code.
#[must_use]
pub fn run(line: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = Arguments::command()
        .try_get_matches_from(line)
        .and_then(|matches| Arguments::from_arg_matches(&matches));
    let arguments = match parsed {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help goes to stdout and is a success, what is wrong goes to stderr. A closed
            // terminal changes neither.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Success }.into();
        }
    };
    match dispatch(arguments.command) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            output::complain(&failure.message);
            failure.exit.into()
        }
    }
}

fn dispatch(command: Command) -> Outcome {
    match command {
        #[cfg(feature = "uring")]
        Command::Serve(arguments) => serve::run(*arguments),
        #[cfg(feature = "uring")]
        Command::Dev(arguments) => dev::run(arguments),
        Command::Doctor(arguments) => doctor::run(*arguments),
        Command::Put(arguments) => data::put(arguments),
        Command::Get(arguments) => data::get(arguments),
        Command::Del(arguments) => data::del(arguments),
        Command::Import(arguments) => import::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Ns(arguments) => namespace::run(arguments),
        Command::Ring(arguments) => admin::ring(arguments),
        Command::Stats(arguments) => admin::stats(arguments),
        Command::Repair(arguments) => admin::repair(arguments),
        Command::Status(arguments) => admin::status(arguments),
        Command::Decommission(arguments) => admin::decommission(arguments),
        Command::Replace(arguments) => admin::replace(arguments),
        Command::Snapshot(arguments) => admin::snapshot(arguments),
        Command::Inspect(arguments) => {
            crate::inspect::run(&arguments.path, arguments.options(), &mut output::Output::stdout())
                .map(|clean| if clean { Exit::Success } else { Exit::Negative })
                .map_err(|error| Failure::usage(error.to_string()))
        }
    }
}
