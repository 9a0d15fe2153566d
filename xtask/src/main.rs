//! The repository's own commands: `cargo xtask setup`, `test`, `demo`, `check`.
//!
//! Progress goes to stderr; stdout carries only what a command is asked to print.

mod process;
mod rust_src;
mod setup;

use clap::{Parser, Subcommand};

/// Sets up, builds, tests and shows the ambient redirector.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Brings everything that building and running needs; harmless when it is all there.
    Setup,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Setup => setup::everything(setup::Report::All),
    }
}
