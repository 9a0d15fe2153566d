//! The benchmark: what redirection costs, against the same traffic without it. `cargo xtask bench`.
//!
//! A pod calls a server on another node, through a proxy that only relays. Each mode gets fresh network
//! namespaces (connections in TIME_WAIT of the mode before would slow the proxy down), and within a round
//! the modes come in random order, so that what else the machine does hits all of them alike. Only ratios
//! within a round are compared.

mod chart;
mod held;
mod machine;
mod meter;
mod outside;
mod programs;
mod ratios;
mod relay;
mod report;
mod stage;
mod stats;
mod tables;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

pub use self::chart::chart;
pub use self::held::Held;
pub use self::machine::Machine;
pub use self::programs::{Cost, Place};
pub use self::ratios::{Doubt, Metric, Other, Ratio};
pub use self::report::{Document, HeldMedian, Median};
use self::stage::on_stage;
pub use self::stats::Interval;
pub use self::tables::{Style, tables};
pub use self::workload::Workload;
use crate::istio_cni::Backend;
use crate::netns::{Family, Netns, TestDir};

/// In how many rounds connections are kept open: their memory hardly varies.
const HELD_ROUNDS: usize = 3;

/// How the pod's calls get to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Directly: there is no mesh.
    None,
    /// The application itself connects to the proxy on loopback: the limit of any redirection.
    Explicit,
    /// By redirect-agent.
    Ours,
    /// By istio-cni's rules, with iptables-nft.
    IstioNft,
    /// By istio-cni's rules, with iptables-legacy.
    IstioLegacy,
    /// By istio-cni's rules, with native nftables.
    IstioNative,
    /// Directly, on a node with an agent and with a pod in the mesh: this pod is not.
    Outside,
    /// By another build of redirect-agent.
    Baseline,
}

impl Mode {
    /// All that need no other build.
    pub const DEFAULT: [Self; 7] = [
        Self::None,
        Self::Explicit,
        Self::Ours,
        Self::IstioNft,
        Self::IstioLegacy,
        Self::IstioNative,
        Self::Outside,
    ];

    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::None => "none",
            Mode::Explicit => "explicit",
            Mode::Ours => "ours",
            Mode::IstioNft => "istio-nft",
            Mode::IstioLegacy => "istio-legacy",
            Mode::IstioNative => "istio-native",
            Mode::Outside => "outside",
            Mode::Baseline => "baseline",
        }
    }

    /// By which of istio-cni's backends.
    fn backend(self) -> Option<Backend> {
        match self {
            Mode::IstioNft => Some(Backend::IptablesNft),
            Mode::IstioLegacy => Some(Backend::IptablesLegacy),
            Mode::IstioNative => Some(Backend::NativeNftables),
            Mode::None | Mode::Explicit | Mode::Ours | Mode::Outside | Mode::Baseline => None,
        }
    }
}

/// A mode that this kernel cannot run.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// Which.
    pub mode: Mode,
    /// What the kernel said.
    pub reason: String,
}

/// Takes out of `modes` those that the kernel cannot run.
///
/// # Errors
///
/// When a tool is not installed, or no namespace can be made to try in.
pub fn leave_out(modes: &mut Vec<Mode>) -> Result<Vec<LeftOut>> {
    let mut left_out = Vec::new();
    for (mode, backend) in modes.iter().filter_map(|mode| Some((*mode, mode.backend()?))) {
        backend.find_tools()?;
        let dir = TestDir::new()?;
        let netns = Netns::new(dir.path(), "probe")?;
        if let Err(error) = backend.redirect(&netns) {
            left_out.push(LeftOut { mode, reason: format!("{error:#}") });
        }
    }
    modes.retain(|mode| left_out.iter().all(|out| out.mode != *mode));
    Ok(left_out)
}

/// What to measure, and how often.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to compare.
    pub modes: Vec<Mode>,
    /// The other build, for [`Mode::Baseline`].
    pub baseline: Option<PathBuf>,
    /// How many rounds.
    pub rounds: usize,
    /// How long each workload runs in each round.
    pub slice: Duration,
    /// In which families.
    pub families: Vec<Family>,
    /// What to run.
    pub workloads: Vec<Workload>,
    /// How many connections to keep open at once, to see what they cost the kernel.
    pub held: usize,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// In which round.
    pub round: usize,
    /// How the calls got to the server.
    pub mode: Mode,
    /// In which family.
    pub family: Family,
    /// What ran.
    pub workload: Workload,
    /// Calls, requests, queries, or bytes per second.
    pub rate: f64,
    /// How many of [`Workload::per`] were done.
    pub done: f64,
    /// How many queries got no answer within half a second, and were asked again.
    pub lost: u64,
    /// Latency of calls, requests or queries, µs; `None` for bulk.
    pub p50_us: Option<f64>,
    /// The same.
    pub p99_us: Option<f64>,
    /// The processor time of the whole machine, all processors together, for each [`Workload::per`], µs.
    pub cpu_us: f64,
    /// The share of the machine's time, from 0 to 1, that others had meanwhile.
    pub others: f64,
    /// The share of the machine's time, from 0 to 1, that the hypervisor gave to other machines.
    pub steal: f64,
    /// How many connections the pod's namespace tracked at the end, of this workload and those before it.
    pub conntrack: u64,
    /// What BPF programs cost, in a slice of its own; `None` where there are none.
    pub programs: Option<Cost>,
}

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Workloads.
    pub samples: Vec<Sample>,
    /// Open connections.
    pub held: Vec<Held>,
}

/// Measures; `progress` hears of each mode of each round before it runs.
///
/// # Errors
///
/// When a namespace, the agent or a connection fails, or a connection went past the proxy: then nothing
/// was measured.
pub fn run(options: &Options, mut progress: impl FnMut(&str)) -> Result<Measured> {
    let mut all = Measured::default();
    let held = held::room_for(options.held)?;
    for round in 0..options.rounds {
        let mut modes = options.modes.clone();
        fastrand::shuffle(&mut modes);
        for mode in modes {
            progress(&format!("round {} of {}: {}", round + 1, options.rounds, mode.as_str()));
            let what = || format!("measure mode {}", mode.as_str());
            all.samples.extend(measure(options, round, mode).with_context(what)?);
            if round < HELD_ROUNDS && held > 0 {
                let found = on_stage(options, mode, |stage| {
                    let hold = |family| held::hold(stage, round, family, held);
                    options.families.iter().copied().map(hold).collect::<Result<Vec<_>>>()
                });
                all.held.extend(found.with_context(what)?);
            }
        }
    }
    Ok(all)
}

/// One mode, in namespaces of its own.
fn measure(options: &Options, round: usize, mode: Mode) -> Result<Vec<Sample>> {
    on_stage(options, mode, |stage| {
        let mut samples = Vec::new();
        for &family in &options.families {
            // Whatever happens once only is over by then.
            stage.run(family, Workload::Connect1, options.slice / 5)?;
            for &workload in &options.workloads {
                let found = stage.run(family, workload, options.slice)?;
                samples.push(Sample {
                    round,
                    mode,
                    family,
                    workload,
                    rate: found.rate,
                    done: found.done,
                    lost: found.lost,
                    p50_us: found.p50_us,
                    p99_us: found.p99_us,
                    cpu_us: found.spent.busy.as_secs_f64() * 1e6 / found.done,
                    others: found.spent.others,
                    steal: found.spent.steal,
                    conntrack: meter::conntrack(stage.netns())?,
                    programs: None,
                });
            }
        }
        for sample in &mut samples {
            sample.programs = stage.cost(sample.family, sample.workload, options.slice / 4)?;
        }
        Ok(samples)
    })
}
