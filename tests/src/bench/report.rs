//! What was measured, as a document and as tables.

use serde::Serialize;

use super::machine::Machine;
use super::ratios::ratios;
use super::stats::median;
use super::{Cost, Held, LeftOut, Measured, Mode, Options, Place, Ratio, Sample, Workload};
use crate::netns::Family;

/// Everything, for `-o json`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    /// The version of this document's layout.
    pub api_version: &'static str,
    /// Where and when.
    #[serde(flatten)]
    pub machine: Machine,
    /// How many rounds.
    pub rounds: usize,
    /// How long each workload ran in each round, s.
    pub slice: f64,
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
    /// Of a million queries so many got no answer, in all rounds together; `None` for what asks none.
    pub lost_per_million: Option<f64>,
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
    /// Works out medians and ratios.
    pub fn new(
        options: &Options,
        left_out: Vec<LeftOut>,
        machine: Machine,
        measured: Measured,
    ) -> Self {
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
        Self {
            api_version: "redirect-agent.bench/v2",
            machine,
            rounds: options.rounds,
            slice: options.slice.as_secs_f64(),
            left_out,
            medians,
            held_medians: held_medians(options, &held),
            ratios: ratios(options, &samples),
            samples,
            held,
        }
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
        lost_per_million: (workload == Workload::Dns).then(|| {
            let lost: u64 = samples.iter().map(|s| s.lost).sum();
            lost as f64 * 1e6 / samples.iter().map(|s| s.done).sum::<f64>()
        }),
        programs: median_cost(samples),
    })
}

fn median_cost(samples: &[&Sample]) -> Option<Cost> {
    let costs: Vec<&Cost> = samples.iter().filter_map(|s| s.programs.as_ref()).collect();
    let of = |value: &dyn Fn(&Cost) -> Option<f64>| {
        median(&costs.iter().filter_map(|cost| value(cost)).collect::<Vec<_>>())
    };
    let places = costs.first()?.places.iter().map(|Place { place, .. }| {
        let this = |cost: &Cost| cost.places.iter().find(|p| p.place == *place).cloned();
        Some(Place {
            place: place.clone(),
            runs: of(&|cost| Some(this(cost)?.runs))?,
            nanoseconds: of(&|cost| Some(this(cost)?.nanoseconds))?,
        })
    });
    Some(Cost {
        runs: of(&|cost| Some(cost.runs))?,
        nanoseconds: of(&|cost| Some(cost.nanoseconds))?,
        packets: of(&|cost| Some(cost.packets))?,
        places: places.collect::<Option<_>>()?,
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
