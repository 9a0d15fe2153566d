//! The demo: two nodes, their agents and proxies, and who reaches whom, how. `cargo xtask demo`
//! builds and runs it.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;
use redirect_tests::demo::{self, Format, NodeCommand, Stop};

/// Shows the ambient redirector at work, on two nodes made out of network namespaces
///
/// Everything in it is real: the agents, the kernel programs, the packets. Only ztunnel is played by a
/// stand-in. Nothing is left behind, also when it is interrupted.
#[derive(Debug, Parser)]
#[command(name = "demo", bin_name = "cargo xtask demo", version)]
struct Cli {
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<NodeCommand>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = if cli.json { Format::Json } else { Format::Text };
    let done = match cli.command {
        Some(command) => Err(command.carry_out()),
        None => show(format),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything was as expected.
fn show(format: Format) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces and BPF programs need root: use `cargo xtask demo`");
    }
    demo::leave_no_mounts()?;
    let stop = Stop::on_signals()?;
    let report = demo::run(format, &stop)?;
    if format == Format::Json {
        let mut stdout = io::stdout().lock();
        serde_json::to_writer_pretty(&mut stdout, &report)?;
        writeln!(stdout)?;
    }
    Ok(report.ok)
}
