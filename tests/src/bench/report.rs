//! What was measured, as a document and as tables.

use std::fs;

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::stats::median;
use super::{Interval, LeftOut, Mode, Options, Sample, Workload};
use crate::netns::Family;

/// Everything, for `-o json`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    /// The version of this document's layout.
    pub api_version: &'static str,
    /// The kernel's release.
    pub kernel: String,
    /// The machine's processor.
    pub processor: String,
    /// How many of them.
    pub cores: usize,
    /// Tasks that wanted to run, on average over the last minute, when it began and when it ended: much
    /// more than the benchmark's own means that something else ran.
    pub load: [f64; 2],
    /// How many rounds.
    pub rounds: usize,
    /// What this kernel cannot run.
    pub left_out: Vec<LeftOut>,
    /// The medians.
    pub medians: Vec<Median>,
    /// The ratios of rates within rounds.
    pub ratios: Vec<Ratio>,
    /// All measurements.
    pub samples: Vec<Sample>,
}

/// The medians of one mode.
#[derive(Clone, Debug, Serialize)]
pub struct Median {
    /// In which family.
    pub family: Family,
    /// What ran.
    pub workload: Workload,
    /// What its rate counts.
    pub unit: &'static str,
    /// How the calls got to the server.
    pub mode: Mode,
    /// See [`Sample::rate`].
    pub rate: f64,
    /// See [`Sample::p50_us`].
    pub p50_us: Option<f64>,
    /// See [`Sample::p99_us`].
    pub p99_us: Option<f64>,
}

/// The rate of ours by that of another mode.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// In which family.
    pub family: Family,
    /// What ran.
    pub workload: Workload,
    /// The other mode.
    pub to: Mode,
    /// The ratio: above 1, ours is faster.
    pub ratio: Interval,
    /// Whether the interval is narrow enough to say something about a few percent.
    pub conclusive: bool,
}

impl Document {
    /// Works out medians and ratios; `load` is that of before and after.
    ///
    /// # Errors
    ///
    /// When the machine cannot be described.
    pub fn new(
        options: &Options,
        left_out: Vec<LeftOut>,
        load: [f64; 2],
        samples: Vec<Sample>,
    ) -> Result<Self> {
        let (mut medians, mut ratios) = (Vec::new(), Vec::new());
        for (family, workload) in kinds(&samples) {
            let of = |mode: Mode| {
                samples
                    .iter()
                    .filter(move |s| (s.family, s.workload, s.mode) == (family, workload, mode))
            };
            for &mode in &options.modes {
                let all = |value: &dyn Fn(&Sample) -> Option<f64>| {
                    median(&of(mode).filter_map(value).collect::<Vec<_>>())
                };
                medians.extend(all(&|s| Some(s.rate)).map(|rate| Median {
                    family,
                    workload,
                    unit: workload.unit(),
                    mode,
                    rate,
                    p50_us: all(&|s| s.p50_us),
                    p99_us: all(&|s| s.p99_us),
                }));
            }
            for &to in options.modes.iter().filter(|mode| **mode != Mode::Ours) {
                let within: Vec<f64> = of(Mode::Ours)
                    .filter_map(|ours| {
                        let other = of(to).find(|other| other.round == ours.round)?;
                        Some(ours.rate / other.rate)
                    })
                    .collect();
                ratios.extend(Interval::of(&within).map(|ratio| Ratio {
                    family,
                    workload,
                    to,
                    ratio,
                    conclusive: ratio.is_conclusive(),
                }));
            }
        }
        Ok(Self {
            api_version: "redirect-agent.bench/v1",
            kernel: read("/proc/sys/kernel/osrelease")?,
            processor: processor()?,
            cores: std::thread::available_parallelism().context("count the cores")?.get(),
            load,
            rounds: options.rounds,
            left_out,
            medians,
            ratios,
            samples,
        })
    }
}

/// What was measured, in the order of the workloads.
fn kinds(samples: &[Sample]) -> Vec<(Family, Workload)> {
    let mut kinds: Vec<_> = samples.iter().map(|s| (s.family, s.workload)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

/// The tables.
pub fn table(document: &Document) -> String {
    let mut medians = Table::new();
    medians.load_style(presets::NOTHING);
    medians.set_header(["FAMILY", "WORKLOAD", "MODE", "RATE", "UNIT", "P50 µs", "P99 µs"]);
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.1}"));
    for m in &document.medians {
        medians.add_row([
            m.family.as_str().to_owned(),
            m.workload.as_str().to_owned(),
            m.mode.as_str().to_owned(),
            format!("{:.0}", m.rate),
            m.unit.to_owned(),
            number(m.p50_us),
            number(m.p99_us),
        ]);
    }
    let mut ratios = Table::new();
    ratios.load_style(presets::NOTHING);
    ratios.set_header(["FAMILY", "WORKLOAD", "OURS / …", "RATIO", "95 %", ""]);
    for r in &document.ratios {
        let conclusion = if r.conclusive {
            ""
        } else {
            "no conclusion: it varies too much, or the rounds are too few"
        };
        ratios.add_row([
            r.family.as_str().to_owned(),
            r.workload.as_str().to_owned(),
            r.to.as_str().to_owned(),
            format!("{:.3}", r.ratio.median),
            format!("{:.3}–{:.3}", r.ratio.low, r.ratio.high),
            conclusion.to_owned(),
        ]);
    }
    let Document { kernel, processor, cores, load: [before, after], rounds, .. } = document;
    format!(
        "{medians}\n\n{ratios}\n\n{rounds} rounds, Linux {kernel}, {cores} × {processor}, load {before} before and {after} after\n"
    )
}

/// How busy the machine has been for a minute.
///
/// # Errors
///
/// When that cannot be read.
pub fn load() -> Result<f64> {
    let text = read("/proc/loadavg")?;
    let first = text.split_whitespace().next().unwrap_or_default();
    first.parse().context("read /proc/loadavg")
}

fn processor() -> Result<String> {
    let text = read("/proc/cpuinfo")?;
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = model.and_then(|line| line.split_once(':'));
    Ok(name.map_or("processor".to_owned(), |(_, name)| name.trim().to_owned()))
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(text.trim().to_owned())
}
