//! The repository's own commands: `cargo xtask setup`, `test`, `soak`, `demo`, `bench`, `check`, `manifests`, `book`,
//! `dist`.
//!
//! Progress goes to stderr; stdout carries only what a command is asked to print.

mod apt;
mod book;
mod check;
mod demo;
mod dist;
mod leftovers;
mod manifests;
mod process;
mod rust_src;
mod setup;
mod test;
mod vm;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{demo::Profile, test::Tests};

/// Sets up, tests and shows the ambient redirector.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring everything that building and running needs; harmless when it is all there
    Setup,
    /// Build and run all tests, as root, and look for what they left behind
    Test {
        /// Only this package's tests; may be given more than once
        #[arg(long, short, value_name = "NAME")]
        package: Vec<String>,
        /// Boot Debian's newest kernels of these versions in qemu, without root, and run the kernel
        /// tests there: 6.1,6.12,7
        #[arg(long, value_name = "VERSION,…", value_delimiter = ',', conflicts_with = "package")]
        vm: Vec<String>,
        /// What the test programs get: a part of the tests' names, --nocapture …
        #[arg(last = true, value_name = "FILTER")]
        harness: Vec<OsString>,
    },
    /// Flip labels, kill the agent and the proxy, and change settings at random, under load, as root;
    /// fails if a connection gets past the proxy or is lost
    Soak {
        /// For how long
        #[arg(long, default_value_t = 10)]
        minutes: u32,
        /// In which order; a run prints its own
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Build what it needs and run the demo, as root
    #[command(disable_help_flag = true)]
    Demo {
        /// What the demo gets: --json, --help …
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
        arguments: Vec<OsString>,
    },
    /// Build the release binaries and measure what redirection costs, as root
    #[command(disable_help_flag = true)]
    Bench {
        /// What the benchmark gets: --quick, --help …
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
        arguments: Vec<OsString>,
    },
    /// Run what needs no root: formatting, lints, and the rules for dependencies
    Check,
    /// Write deploy/redirect-agent.yaml and deploy/monitoring/alerts.yaml again, from the Helm chart
    Manifests,
    /// Build the documentation as a book, with mdbook, into target/book
    Book,
    /// Build the static binary and the image, into target/dist
    Dist {
        /// Build it twice, and compare
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Setup => setup::everything(setup::Report::All),
        Command::Test { vm, harness, .. } if !vm.is_empty() => vm::run_all(&vm, &harness),
        Command::Test { package: packages, harness, .. } => {
            test::run_all(&Tests { packages, harness, environment: Vec::new(), again: true })
        }
        Command::Soak { minutes, seed } => test::soak(minutes, seed),
        Command::Demo { arguments } => demo::become_program("demo", Profile::Dev, &arguments),
        Command::Bench { arguments } => demo::become_program("bench", Profile::Release, &arguments),
        Command::Check => check::run_all(),
        Command::Manifests => manifests::write(),
        Command::Book => book::build(),
        Command::Dist { check } => dist::make(check),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
