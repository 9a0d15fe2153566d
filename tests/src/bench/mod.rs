//! The benchmark: what redirection costs, against the same traffic without it. `cargo xtask bench`.
//!
//! A pod calls a server on another node, through a proxy that only relays. Each mode gets fresh network
//! namespaces (connections in TIME_WAIT of the mode before would slow the proxy down), and within a round
//! the modes come in random order, so that what else the machine does hits all of them alike. Only ratios
//! within a round are compared.

mod relay;
mod report;
mod stage;
mod stats;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

pub use self::report::{Document, load, table};
use self::stage::on_stage;
pub use self::stats::Interval;
pub use self::workload::Workload;
use crate::istio_cni::Backend;
use crate::netns::{Family, Netns, TestDir};

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
    /// By another build of redirect-agent.
    Baseline,
}

impl Mode {
    /// All that need no other build.
    pub const DEFAULT: [Self; 6] = [
        Self::None,
        Self::Explicit,
        Self::Ours,
        Self::IstioNft,
        Self::IstioLegacy,
        Self::IstioNative,
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
            Mode::Baseline => "baseline",
        }
    }

    /// By which of istio-cni's backends.
    fn backend(self) -> Option<Backend> {
        match self {
            Mode::IstioNft => Some(Backend::IptablesNft),
            Mode::IstioLegacy => Some(Backend::IptablesLegacy),
            Mode::IstioNative => Some(Backend::NativeNftables),
            Mode::None | Mode::Explicit | Mode::Ours | Mode::Baseline => None,
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
    /// Calls, requests, or bytes per second.
    pub rate: f64,
    /// Latency of calls or requests, µs; `None` for bulk.
    pub p50_us: Option<f64>,
    /// The same.
    pub p99_us: Option<f64>,
}

/// Measures; `progress` hears of each mode of each round before it runs.
///
/// # Errors
///
/// When a namespace, the agent or a connection fails: then nothing was measured.
pub fn run(options: &Options, mut progress: impl FnMut(&str)) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for round in 0..options.rounds {
        let mut modes = options.modes.clone();
        fastrand::shuffle(&mut modes);
        for mode in modes {
            progress(&format!("round {} of {}: {}", round + 1, options.rounds, mode.as_str()));
            let found = measure(options, mode)
                .with_context(|| format!("measure mode {}", mode.as_str()))?;
            samples.extend(found.into_iter().map(|(family, workload, found)| Sample {
                round,
                mode,
                family,
                workload,
                rate: found.rate,
                p50_us: found.p50_us,
                p99_us: found.p99_us,
            }));
        }
    }
    Ok(samples)
}

type Measured = Vec<(Family, Workload, workload::Found)>;

/// One mode, in namespaces of its own.
fn measure(options: &Options, mode: Mode) -> Result<Measured> {
    on_stage(options, mode, |stage| {
        let mut all = Vec::new();
        for &family in &options.families {
            // Whatever happens once only is over by then.
            stage.run(family, Workload::Connect1, options.slice / 5)?;
            for &workload in &options.workloads {
                all.push((family, workload, stage.run(family, workload, options.slice)?));
            }
        }
        Ok(all)
    })
}
