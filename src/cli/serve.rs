//! `annulus serve`: configuration, logging, signals that must not kill, then `crate::serve`.
//!
//! Invariant: stdout stays empty but for the ready line, so logs go to stderr.

use std::io::{self, IsTerminal};

use annulus_tuning::host::Host;
use tracing_subscriber::EnvFilter;

use super::arguments::ServeArguments;
use super::{Exit, Failure, Outcome};
use crate::config::Config;

pub(super) fn run(arguments: ServeArguments) -> Outcome {
    let flags = arguments.flags.over_file(arguments.config.as_deref()).map_err(Failure::usage)?;
    let mut config = Config::resolve(flags, &Host::probe()).map_err(Failure::usage)?;
    config.accept_loss = arguments.accept_loss;
    let filter = EnvFilter::try_new(&config.log_level)
        .map_err(|error| Failure::usage(format!("log-level: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    crate::serve::serve(config).map(|()| Exit::Success).map_err(|error| {
        // The node did not start, or stopped on a failure that it has named.
        Failure::new(Exit::NotStarted, error.to_string())
    })
}
