//! The benchmark: what redirection costs, against the same traffic without it. `cargo xtask bench`.
//!
//! A pod calls a server on another node, through a proxy that only relays. Each mode gets fresh network
//! namespaces (connections in TIME_WAIT of the mode before would slow the proxy down), and within a round
//! the modes come in random order, so that what else the machine does hits all of them alike. Only ratios
//! within a round are compared.

mod relay;
mod report;
mod stats;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

use self::relay::Relay;
pub use self::report::{Document, load, table};
pub use self::stats::Interval;
use self::workload::Server;
pub use self::workload::Workload;
use crate::netns::Family;
use crate::process::{Attached, binary};
use crate::topology::{Pod, Style, Topology};

/// How the pod's calls get to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Directly: there is no mesh.
    None,
    /// The application itself connects to the proxy on loopback: the limit of any redirection.
    Explicit,
    /// By redirect-agent.
    Ours,
    /// By another build of redirect-agent.
    Baseline,
}

impl Mode {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::None => "none",
            Mode::Explicit => "explicit",
            Mode::Ours => "ours",
            Mode::Baseline => "baseline",
        }
    }
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
    let mut topology = Topology::new(&[Style::Routed, Style::Routed])?;
    let client = topology.add_pod(0, "bench", "client")?;
    let server = topology.add_pod(1, "bench", "server")?;
    for pod in [&client, &server] {
        pod.netns.set_sysctl("net/ipv4/ip_local_port_range", "1024 65000")?;
    }
    let _server = Server::start(&server.netns)?;
    let _relay = match mode {
        Mode::None => None,
        Mode::Explicit => {
            Some(Relay::start(&client.netns, Some([server.v4.into(), server.v6.into()]))?)
        }
        Mode::Ours | Mode::Baseline => Some(Relay::start(&client.netns, None)?),
    };
    let agent = match mode {
        Mode::Ours => Some(binary("redirect-agent")?),
        Mode::Baseline => Some(options.baseline.clone().context("give --baseline PATH")?),
        Mode::None | Mode::Explicit => None,
    };
    let _attached = agent.map(|agent| Attached::by(agent, &topology, &client)).transpose()?;
    let mut all = Vec::new();
    for &family in &options.families {
        let to = target(mode, &server, family);
        // Whatever happens once only is over by then.
        workload::run(&client.netns, Workload::Connect1, to, options.slice / 5)?;
        for &workload in &options.workloads {
            let found = workload::run(&client.netns, workload, to, options.slice)
                .with_context(|| format!("run {} over {}", workload.as_str(), family.as_str()))?;
            all.push((family, workload, found));
        }
    }
    Ok(all)
}

/// Where the application connects to; the port stands for what the server does.
fn target(mode: Mode, server: &Pod, family: Family) -> workload::Target {
    match mode {
        Mode::Explicit => workload::Target::Relay(family.localhost()),
        Mode::None | Mode::Ours | Mode::Baseline => workload::Target::Server(server.ip(family)),
    }
}
