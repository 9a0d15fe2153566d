//! How two modes compare, and whether that can be told.

use serde::Serialize;

use super::stats::median;
use super::{Interval, Mode, Options, Sample, Workload};
use crate::netns::Family;

/// More than this share of the machine's time in other hands: they may be why rounds differ.
const OTHERS: f64 = 0.05;
/// The same, in those of other machines.
const STEAL: f64 = 0.01;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// [`Sample::rate`]: more is better.
    Rate,
    /// [`Sample::cpu_us`]: less is better, as below.
    Cpu,
    /// [`Sample::p50_us`].
    P50,
    /// [`Sample::p99_us`].
    P99,
}

impl Metric {
    const ALL: [Self; 4] = [Self::Rate, Self::Cpu, Self::P50, Self::P99];

    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Cpu => "cpu",
            Self::P50 => "p50",
            Self::P99 => "p99",
        }
    }

    fn of(self, sample: &Sample) -> Option<f64> {
        match self {
            Self::Rate => Some(sample.rate),
            Self::Cpu => Some(sample.cpu_us),
            Self::P50 => sample.p50_us,
            Self::P99 => sample.p99_us,
        }
    }

    fn best(self, values: impl Iterator<Item = f64>) -> Option<f64> {
        values.reduce(if self == Self::Rate { f64::max } else { f64::min })
    }
}

/// What ours is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Other {
    /// A mode.
    Mode(Mode),
    /// The best of istio-cni's, in each round anew.
    BestOfIstioCni,
}

impl Other {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mode(mode) => mode.as_str(),
            Self::BestOfIstioCni => "istio-best",
        }
    }

    fn has(self, mode: Mode) -> bool {
        match self {
            Self::Mode(this) => mode == this,
            Self::BestOfIstioCni => mode.backend().is_some(),
        }
    }
}

impl Serialize for Other {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One mode by another.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// In which family.
    pub family: Family,
    /// What ran.
    pub workload: Workload,
    /// What is compared.
    pub metric: Metric,
    /// Which mode.
    pub of: Mode,
    /// By which other.
    pub to: Other,
    /// The ratio within rounds.
    pub ratio: Interval,
    /// Whether it says something about a few percent.
    pub conclusive: bool,
    /// Why it does not.
    pub doubts: Vec<Doubt>,
}

/// Why there is no conclusion.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doubt {
    /// There are too few rounds.
    FewRounds,
    /// The interval is too wide.
    Wide,
    /// Others had this share of the machine's time, from 0 to 1, in the median round.
    Others(f64),
    /// The hypervisor gave this share of it to other machines.
    Steal(f64),
}

/// All comparisons of what was measured.
pub(super) fn ratios(options: &Options, samples: &[Sample]) -> Vec<Ratio> {
    let mut all = Vec::new();
    for (of, to) in pairs(&options.modes) {
        for &family in &options.families {
            for &workload in &options.workloads {
                let these: Vec<_> = samples
                    .iter()
                    .filter(|s| (s.family, s.workload) == (family, workload))
                    .collect();
                all.extend(Metric::ALL.iter().filter_map(|&metric| {
                    let ratio = within_rounds(&these, metric, of, to)?;
                    let doubts = doubts(&these, metric, of, to, ratio);
                    let conclusive = doubts.is_empty();
                    Some(Ratio { family, workload, metric, of, to, ratio, conclusive, doubts })
                }));
            }
        }
    }
    all.sort_by_key(|r| (r.family, r.workload, r.metric));
    all
}

fn pairs(modes: &[Mode]) -> Vec<(Mode, Other)> {
    let has = |mode| modes.contains(&mode);
    let mut pairs = Vec::new();
    if has(Mode::Ours) {
        let others = modes.iter().filter(|mode| ![Mode::Ours, Mode::Outside].contains(*mode));
        pairs.extend(others.map(|mode| (Mode::Ours, Other::Mode(*mode))));
        if modes.iter().any(|mode| mode.backend().is_some()) {
            pairs.push((Mode::Ours, Other::BestOfIstioCni));
        }
    }
    if has(Mode::Outside) && has(Mode::None) {
        pairs.push((Mode::Outside, Other::Mode(Mode::None)));
    }
    pairs
}

/// The ratio of one metric in each round; `None` where one of the two was not measured.
pub(super) fn within_rounds(
    samples: &[&Sample],
    metric: Metric,
    of: Mode,
    to: Other,
) -> Option<Interval> {
    let ours = samples.iter().filter(|s| s.mode == of);
    let ratios = ours.filter_map(|ours| {
        let others = samples.iter().filter(|s| s.round == ours.round && to.has(s.mode));
        Some(metric.of(ours)? / metric.best(others.filter_map(|s| metric.of(s)))?)
    });
    Interval::of(&ratios.collect::<Vec<_>>())
}

fn doubts(samples: &[&Sample], metric: Metric, of: Mode, to: Other, ratio: Interval) -> Vec<Doubt> {
    let mut doubts = Vec::new();
    if !ratio.has_enough_rounds() {
        doubts.push(Doubt::FewRounds);
    } else if ratio.is_wide() {
        doubts.push(Doubt::Wide);
    }
    let share = |value: &dyn Fn(&Sample) -> f64| {
        let both = samples.iter().filter(|s| s.mode == of || to.has(s.mode));
        median(&both.map(|s| value(s)).collect::<Vec<_>>()).unwrap_or(0.0)
    };
    let (others, steal) = (share(&|s| s.others), share(&|s| s.steal));
    // What others use is in the processor time. Of everything else, the interval tells how much they hurt.
    let unsure = !doubts.is_empty();
    if others > OTHERS && (unsure || metric == Metric::Cpu) {
        doubts.push(Doubt::Others(others));
    }
    if steal > STEAL && unsure {
        doubts.push(Doubt::Steal(steal));
    }
    doubts
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sample(round: usize, mode: Mode, rate: f64, others: f64) -> Sample {
        Sample {
            round,
            mode,
            family: Family::V4,
            workload: Workload::Up,
            rate,
            done: rate,
            lost: 0,
            p50_us: None,
            p99_us: None,
            cpu_us: 1000.0 / rate,
            others,
            steal: 0.0,
            conntrack: 0,
            programs: None,
        }
    }

    fn ratios_of(samples: &[Sample]) -> Vec<Ratio> {
        let options = Options {
            modes: Mode::DEFAULT.to_vec(),
            baseline: None,
            rounds: 8,
            slice: Duration::ZERO,
            families: vec![Family::V4],
            workloads: vec![Workload::Up],
            held: 0,
        };
        ratios(&options, samples)
    }

    fn find(all: &[Ratio], metric: Metric, to: &str) -> Ratio {
        all.iter().find(|r| r.metric == metric && r.to.as_str() == to).unwrap().clone()
    }

    #[test]
    fn best_of_istio_cni_is_another_one_in_each_round() {
        let mut samples = Vec::new();
        for round in 0..8 {
            let (nft, legacy) = if round % 2 == 0 { (10.0, 8.0) } else { (8.0, 10.0) };
            samples.push(sample(round, Mode::Ours, 15.0, 0.0));
            samples.push(sample(round, Mode::IstioNft, nft, 0.0));
            samples.push(sample(round, Mode::IstioLegacy, legacy, 0.0));
        }
        let all = ratios_of(&samples);
        let rate = find(&all, Metric::Rate, "istio-best");
        assert!((rate.ratio.median - 1.5).abs() < 1e-9 && rate.conclusive, "{rate:?}");
        let cpu = find(&all, Metric::Cpu, "istio-best");
        assert!((cpu.ratio.median - 1.0 / 1.5).abs() < 1e-9 && cpu.conclusive, "{cpu:?}");
        let nft = find(&all, Metric::Rate, "istio-nft");
        assert!(!nft.conclusive && nft.doubts == [Doubt::Wide], "{nft:?}");
        assert!(!all.iter().any(|r| r.to.as_str() == "explicit"), "{all:?}");
    }

    #[test]
    fn load_of_others_is_in_processor_time_and_else_only_a_reason_for_spread() {
        let both = |round| {
            [sample(round, Mode::Ours, 10.0, 0.2), sample(round, Mode::Explicit, 10.0, 0.2)]
        };
        let all = ratios_of(&(0..8).flat_map(both).collect::<Vec<_>>());
        assert!(find(&all, Metric::Rate, "explicit").conclusive);
        assert_eq!(find(&all, Metric::Cpu, "explicit").doubts, [Doubt::Others(0.2)]);
        let all = ratios_of(&(0..2).flat_map(both).collect::<Vec<_>>());
        let few = find(&all, Metric::Rate, "explicit");
        assert_eq!(few.doubts, [Doubt::FewRounds, Doubt::Others(0.2)]);
    }
}
