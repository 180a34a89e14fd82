//! `annulus-bench`: a load generator for servers (`run`), the engine
//! without one (`embed`), and what values do to each other's turns (`turns`).

use std::process::ExitCode;

use annulus_bench::run;
#[cfg(feature = "uring")]
use annulus_bench::{embed, turns};
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
    /// Measures for how long values of each size keep a shard from serving others.
    #[cfg(feature = "uring")]
    Turns(turns::TurnsArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => run::main(&args),
        #[cfg(feature = "uring")]
        Command::Embed(args) => embed::main(&args),
        #[cfg(feature = "uring")]
        Command::Turns(args) => turns::main(&args),
    }
}
