//! `annulus-bench`: a load generator for servers (`run`), and the
//! engine without one (`embed`).

use std::process::ExitCode;

#[cfg(feature = "uring")]
use annulus_bench::embed;
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
    Run(Box<run::RunArgs>),
    /// Measures the engine of one shard in this process, without a network.
    #[cfg(feature = "uring")]
    Embed(embed::EmbedArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => run::main(&args),
        #[cfg(feature = "uring")]
        Command::Embed(args) => embed::main(&args),
    }
}
