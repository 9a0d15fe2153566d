//! What was measured, as a document and as tables.

use std::fs;

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::held::{Held, UNIT};
use super::ratios::ratios;
use super::stats::median;
use super::{
    Cost, Doubt, Interval, LeftOut, Measured, Metric, Mode, Options, Other, Ratio, Sample, Workload,
};
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
    /// The ratios within rounds.
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
        let mut medians = Vec::new();
        for (family, workload) in kinds(&samples) {
            for &mode in &options.modes {
                let these = samples
                    .iter()
                    .filter(|s| (s.family, s.workload, s.mode) == (family, workload, mode));
                medians.extend(median_of(&these.collect::<Vec<_>>()));
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
            ratios: ratios(options, &samples),
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
    let Document { kernel, processor, cores, load: [before, after], rounds, .. } = document;
    let mut text = String::new();
    for table in [medians(document), programs(document), held(document), compared(document)] {
        text += &format!("{table}\n\n");
    }
    text += &explain(document);
    for LeftOut { mode, reason } in &document.left_out {
        text += &format!("Without {}, which this kernel cannot run: {reason}\n", mode.as_str());
    }
    text + &format!(
        "{rounds} rounds, Linux {kernel}, {cores} × {processor}, load {before} before and {after} after\n"
    )
}

/// Ratios: one column for each pair, and no column for single backends of istio-cni.
fn compared(document: &Document) -> Table {
    let pair = |r: &Ratio| format!("{} / {}", r.of.as_str(), r.to.as_str());
    let shown: Vec<&Ratio> = document
        .ratios
        .iter()
        .filter(|r| !matches!(r.to, Other::Mode(mode) if mode.backend().is_some()))
        .collect();
    let mut pairs: Vec<String> = Vec::new();
    for pair in shown.iter().map(|r| pair(r)) {
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    let mut header = vec!["FAMILY", "WORKLOAD", "RATIO OF"];
    header.extend(pairs.iter().map(String::as_str));
    let mut table = new_table(&header);
    for row in shown.chunk_by(|a, b| kind(a) == kind(b)) {
        let Some(first) = row.first() else { continue };
        let mut cells = vec![first.family.as_str(), first.workload.as_str(), first.metric.as_str()];
        let found: Vec<String> = pairs
            .iter()
            .map(|wanted| {
                row.iter().find(|r| pair(r) == *wanted).map_or(String::new(), |r| cell(r))
            })
            .collect();
        cells.extend(found.iter().map(String::as_str));
        table.add_row(cells);
    }
    table
}

fn kind(ratio: &Ratio) -> (Family, Workload, Metric) {
    (ratio.family, ratio.workload, ratio.metric)
}

/// `1.034 1.021–1.050`, or `? 0.80–1.20` with the letters of the doubts.
fn cell(ratio: &Ratio) -> String {
    let Interval { median, low, high, .. } = ratio.ratio;
    if ratio.conclusive {
        return format!("{median:.3} {low:.3}–{high:.3}");
    }
    let letters: String = ratio.doubts.iter().map(|doubt| letter(*doubt)).collect();
    format!("? {low:.2}–{high:.2} {letters}")
}

fn letter(doubt: Doubt) -> char {
    match doubt {
        Doubt::FewRounds => 'r',
        Doubt::Wide => 'w',
        Doubt::Others(_) => 'o',
        Doubt::Steal(_) => 's',
    }
}

/// What the letters of [`cell`] mean, those that are there.
fn explain(document: &Document) -> String {
    let doubts = || document.ratios.iter().flat_map(|r| &r.doubts);
    let most = |value: fn(&Doubt) -> Option<f64>| doubts().filter_map(value).reduce(f64::max);
    let others = most(|d| if let Doubt::Others(share) = d { Some(*share) } else { None });
    let steal = most(|d| if let Doubt::Steal(share) = d { Some(*share) } else { None });
    let mut reasons = Vec::new();
    if doubts().any(|d| *d == Doubt::FewRounds) {
        reasons.push("r: the rounds are too few".to_owned());
    }
    if doubts().any(|d| *d == Doubt::Wide) {
        reasons.push("w: rounds differ too much".to_owned());
    }
    if let Some(share) = others {
        reasons.push(format!(
            "o: others took a part of the machine's time, up to {:.0} %",
            share * 100.0
        ));
    }
    if let Some(share) = steal {
        reasons.push(format!(
            "s: the hypervisor gave a part of it to other machines, up to {:.0} %",
            share * 100.0
        ));
    }
    if reasons.is_empty() {
        String::new()
    } else {
        format!("?: no conclusion. {}\n", reasons.join("; "))
    }
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
