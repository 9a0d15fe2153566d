//! What was measured, as a document and as tables.

use std::fs;

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::held::{Held, UNIT};
use super::stats::median;
use super::{Cost, Interval, LeftOut, Measured, Mode, Options, Sample, Workload};
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
    /// The medians of what open connections cost.
    pub held_medians: Vec<HeldMedian>,
    /// The ratios of rates within rounds.
    pub ratios: Vec<Ratio>,
    /// All measurements.
    pub samples: Vec<Sample>,
    /// All measurements of open connections.
    pub held: Vec<Held>,
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
    /// What its processor time, and its programs' cost, is told for.
    pub per: &'static str,
    /// How the calls got to the server.
    pub mode: Mode,
    /// See [`Sample::rate`].
    pub rate: f64,
    /// See [`Sample::p50_us`].
    pub p50_us: Option<f64>,
    /// See [`Sample::p99_us`].
    pub p99_us: Option<f64>,
    /// See [`Sample::cpu_us`].
    pub cpu_us: f64,
    /// See [`Sample::programs`].
    pub programs: Option<Cost>,
}

/// The medians of one mode.
#[derive(Clone, Debug, Serialize)]
pub struct HeldMedian {
    /// In which family.
    pub family: Family,
    /// How the connections got to the server.
    pub mode: Mode,
    /// See [`Held::kernel_bytes`].
    pub kernel_bytes: f64,
    /// See [`Held::conntrack`].
    pub conntrack: f64,
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
        measured: Measured,
    ) -> Result<Self> {
        let Measured { samples, held } = measured;
        let (mut medians, mut ratios) = (Vec::new(), Vec::new());
        for (family, workload) in kinds(&samples) {
            let of = |mode: Mode| {
                samples
                    .iter()
                    .filter(move |s| (s.family, s.workload, s.mode) == (family, workload, mode))
            };
            medians.extend(
                options.modes.iter().filter_map(|&mode| median_of(&of(mode).collect::<Vec<_>>())),
            );
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
            api_version: "redirect-agent.bench/v2",
            kernel: read("/proc/sys/kernel/osrelease")?,
            processor: processor()?,
            cores: std::thread::available_parallelism().context("count the cores")?.get(),
            load,
            rounds: options.rounds,
            left_out,
            medians,
            held_medians: held_medians(options, &held),
            ratios,
            samples,
            held,
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

/// The medians of samples of one kind; `None` without samples.
fn median_of(samples: &[&Sample]) -> Option<Median> {
    let &Sample { family, workload, mode, .. } = *samples.first()?;
    let all = |value: &dyn Fn(&Sample) -> Option<f64>| {
        median(&samples.iter().filter_map(|s| value(s)).collect::<Vec<_>>())
    };
    let cost = |value: &dyn Fn(&Cost) -> f64| all(&|s| s.programs.as_ref().map(value));
    let programs = || {
        Some(Cost {
            runs: cost(&|c| c.runs)?,
            nanoseconds: cost(&|c| c.nanoseconds)?,
            packets: cost(&|c| c.packets)?,
        })
    };
    Some(Median {
        family,
        workload,
        unit: workload.unit(),
        per: workload.per(),
        mode,
        rate: all(&|s| Some(s.rate))?,
        p50_us: all(&|s| s.p50_us),
        p99_us: all(&|s| s.p99_us),
        cpu_us: all(&|s| Some(s.cpu_us))?,
        programs: programs(),
    })
}

fn held_medians(options: &Options, held: &[Held]) -> Vec<HeldMedian> {
    let mut all = Vec::new();
    for &family in &options.families {
        for &mode in &options.modes {
            let of = |value: &dyn Fn(&Held) -> f64| {
                let these = held.iter().filter(|h| (h.family, h.mode) == (family, mode));
                median(&these.map(value).collect::<Vec<_>>())
            };
            if let (Some(kernel_bytes), Some(conntrack)) =
                (of(&|h| h.kernel_bytes), of(&|h| h.conntrack))
            {
                all.push(HeldMedian { family, mode, kernel_bytes, conntrack });
            }
        }
    }
    all
}

/// The tables.
pub fn table(document: &Document) -> String {
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
    let mut text = String::new();
    for table in [medians(document), programs(document), held(document), ratios] {
        text += &format!("{table}\n\n");
    }
    for LeftOut { mode, reason } in &document.left_out {
        text += &format!("Without {}, which this kernel cannot run: {reason}\n", mode.as_str());
    }
    text + &format!(
        "{rounds} rounds, Linux {kernel}, {cores} × {processor}, load {before} before and {after} after\n"
    )
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    table
}

fn medians(document: &Document) -> Table {
    let mut table = new_table(&[
        "FAMILY", "WORKLOAD", "MODE", "RATE", "UNIT", "P50 µs", "P99 µs", "CPU µs", "PER",
    ]);
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.1}"));
    for m in &document.medians {
        table.add_row([
            m.family.as_str().to_owned(),
            m.workload.as_str().to_owned(),
            m.mode.as_str().to_owned(),
            format!("{:.0}", m.rate),
            m.unit.to_owned(),
            number(m.p50_us),
            number(m.p99_us),
            number(Some(m.cpu_us)),
            m.per.to_owned(),
        ]);
    }
    table
}

/// What BPF programs cost.
fn programs(document: &Document) -> Table {
    let mut table = new_table(&[
        "FAMILY",
        "WORKLOAD",
        "MODE",
        "PER",
        "PROGRAM RUNS",
        "PROGRAMS ns",
        "PACKETS",
        "ns PER PACKET",
    ]);
    for (m, cost) in document.medians.iter().filter_map(|m| Some((m, m.programs?))) {
        table.add_row([
            m.family.as_str().to_owned(),
            m.workload.as_str().to_owned(),
            m.mode.as_str().to_owned(),
            m.per.to_owned(),
            format!("{:.1}", cost.runs),
            format!("{:.0}", cost.nanoseconds),
            format!("{:.1}", cost.packets),
            format!("{:.1}", cost.nanoseconds / cost.packets),
        ]);
    }
    table
}

/// What open connections cost.
fn held(document: &Document) -> Table {
    let memory = format!("KERNEL MiB FOR {UNIT} OPEN");
    let conntrack = format!("CONNTRACK FOR {UNIT} OPEN");
    let mut table = new_table(&["FAMILY", "MODE", &memory, &conntrack]);
    for m in &document.held_medians {
        table.add_row([
            m.family.as_str().to_owned(),
            m.mode.as_str().to_owned(),
            format!("{:.1}", m.kernel_bytes / f64::from(1 << 20)),
            format!("{:.0}", m.conntrack),
        ]);
    }
    table
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
