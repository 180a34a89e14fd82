//! The `annulus` program: server and operator's tool. `src/cli/` has the commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    annulus::cli::run(std::env::args_os())
}
