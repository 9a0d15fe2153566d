//! The benchmark. `cargo xtask bench` builds and runs it.

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use redirect_tests::bench::{self, Document, Machine, Mode, Options, Style, Workload};
use redirect_tests::demo::{self, NodeCommand};
use redirect_tests::netns::Family;

/// Measures what redirection costs, on real packets in network namespaces of its own
///
/// A pod calls a server through a proxy that only relays. Rounds alternate between the modes in random order,
/// and only ratios within a round are compared. The machine should be idle otherwise.
#[derive(Debug, Parser)]
#[command(
    name = "bench",
    bin_name = "cargo xtask bench",
    version,
    after_long_help = "\
Examples:
  cargo xtask bench
  cargo xtask bench --quick
  cargo xtask bench --chart docs/performance.svg --output markdown
  cargo xtask bench --rounds 20 --families ipv4 --workloads connect1,up -o json > bench.json
  cargo xtask bench --baseline /tmp/redirect-agent-of-last-week --modes ours,baseline"
)]
struct Cli {
    /// What to compare; by default everything, and with --baseline also `baseline`
    #[arg(long, value_enum, value_delimiter = ',')]
    modes: Vec<Mode>,
    /// Another build of redirect-agent to compare ours with
    #[arg(long, value_name = "PATH")]
    baseline: Option<PathBuf>,
    /// How often to measure everything
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: usize,
    /// How long each workload runs in each round, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    slice: f64,
    /// The families
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ipv4,ipv6")]
    families: Vec<Family>,
    /// What the application does; everything by default
    #[arg(long, value_enum, value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// How many connections to keep open at once, to see what they cost the kernel; 0 for none
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    held: usize,
    /// For its shape, not its numbers: one short round
    #[arg(long)]
    quick: bool,
    /// Also draw rates and processor time, by those of `explicit`, into this SVG file
    #[arg(long, value_name = "PATH")]
    chart: Option<PathBuf>,
    /// How to print
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Option<NodeCommand>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Table,
    Markdown,
    Json,
}

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    let done = match cli.command.take() {
        Some(command) => Err(command.carry_out()),
        None => measure(cli),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: Cli) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces and BPF programs need root: use `cargo xtask bench`");
    }
    let longest = 60.0;
    ensure!((0.01..=longest).contains(&cli.slice), "give a --slice from 0.01 to {longest} seconds");
    ensure!(cli.rounds > 0, "give at least one round");
    demo::leave_no_mounts()?;
    let mut modes = if cli.modes.is_empty() { Mode::DEFAULT.to_vec() } else { cli.modes };
    if cli.baseline.is_some() && !modes.contains(&Mode::Baseline) {
        modes.push(Mode::Baseline);
    }
    let left_out = bench::leave_out(&mut modes)?;
    for out in &left_out {
        eprintln!(
            "bench: without {}, which this kernel cannot run: {}",
            out.mode.as_str(),
            out.reason
        );
    }
    ensure!(!modes.is_empty(), "this kernel can run none of these modes");
    let options = Options {
        modes,
        baseline: cli.baseline,
        rounds: if cli.quick { 1 } else { cli.rounds },
        slice: Duration::from_secs_f64(if cli.quick { 0.05 } else { cli.slice }),
        families: cli.families,
        held: if cli.quick { cli.held.min(200) } else { cli.held },
        workloads: if cli.workloads.is_empty() { Workload::ALL.to_vec() } else { cli.workloads },
    };
    if let Some(chart) = &cli.chart {
        let explicit = options.modes.contains(&Mode::Explicit);
        ensure!(explicit, "the chart compares with `explicit`: give it with --modes");
        // Not after all that was measured.
        fs::write(chart, "").with_context(|| format!("write {}", chart.display()))?;
    }
    let machine = Machine::now()?;
    let measured = bench::run(&options, |what| eprintln!("bench: {what}"))?;
    let document = Document::new(&options, left_out, machine.ended()?, measured);
    if let Some(chart) = &cli.chart {
        fs::write(chart, bench::chart(&document))
            .with_context(|| format!("write {}", chart.display()))?;
    }
    let mut stdout = io::stdout().lock();
    match cli.output {
        Format::Table => write!(stdout, "{}", bench::tables(&document, Style::Plain))?,
        Format::Markdown => write!(stdout, "{}", bench::tables(&document, Style::Markdown))?,
        Format::Json => {
            serde_json::to_writer_pretty(&mut stdout, &document)?;
            writeln!(stdout)?;
        }
    }
    Ok(())
}
