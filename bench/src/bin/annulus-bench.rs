//! `annulus-bench`: a load generator for servers (`run`).

use std::process::ExitCode;

use annulus_bench::run;
use clap::{Parser, Subcommand};

/// Measures Annulus, and its rivals in the same way.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sends a load to a server and measures it.
    Run(run::RunArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => run::main(&args),
    }
}
