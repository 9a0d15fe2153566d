//! What was measured, for people.

use comfy_table::{Table, presets};

use super::held::UNIT;
use super::{Document, Doubt, Interval, LeftOut, Median, Metric, Mode, Other, Ratio, Workload};
use crate::netns::Family;

/// How tables are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// For a terminal.
    Plain,
    /// For a document.
    Markdown,
}

/// All tables.
pub fn tables(document: &Document, style: Style) -> String {
    let mut text = String::new();
    for mut table in [compared(document), medians(document), held(document), programs(document)] {
        let preset = match style {
            Style::Plain => presets::NOTHING,
            Style::Markdown => presets::ASCII_MARKDOWN,
        };
        table.load_style(preset);
        text += &format!("{table}\n\n");
    }
    text += &explain(document);
    for LeftOut { mode, reason } in &document.left_out {
        text += &format!("Without {}, which this kernel cannot run: {reason}\n", mode.as_str());
    }
    text + &caption(document) + "\n"
}

/// Where, when, and with which load.
pub(super) fn caption(document: &Document) -> String {
    let machine = &document.machine;
    let [before, after] = machine.load;
    format!(
        "{} rounds of {} s, Linux {}, {} × {}, {}, commit {}, load {before} before and {after} after",
        document.rounds,
        document.slice,
        machine.kernel,
        machine.cores,
        machine.processor,
        machine.date,
        machine.commit,
    )
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.set_header(header);
    table
}

/// Ratios: one column for each pair, and no column for single backends of istio-cni.
fn compared(document: &Document) -> Table {
    let pair = |r: &Ratio| format!("{} / {}", r.of.as_str(), r.to.as_str());
    let shown: Vec<&Ratio> = document.ratios.iter().filter(|r| is_shown(r)).collect();
    let mut pairs: Vec<String> = Vec::new();
    for pair in shown.iter().map(|r| pair(r)) {
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    let mut header = vec!["family", "workload", "ratio of"];
    header.extend(pairs.iter().map(String::as_str));
    let mut table = new_table(&header);
    let kind = |r: &Ratio| (r.family, r.workload, r.metric);
    for row in shown.chunk_by(|a, b| kind(a) == kind(b)) {
        let Some(first) = row.first() else { continue };
        let found = pairs.iter().map(|wanted| {
            let ratio = row.iter().find(|r| pair(r) == *wanted);
            ratio.map_or_else(|| "-".to_owned(), |ratio| cell(ratio))
        });
        let names = [first.family.as_str(), first.workload.as_str(), first.metric.as_str()];
        table.add_row(names.map(str::to_owned).into_iter().chain(found));
    }
    table
}

/// The document has all of them. Latency is the rate's reciprocal, on average, but with one connection it is what is
/// asked for.
fn is_shown(ratio: &Ratio) -> bool {
    let is_of_one_backend = matches!(ratio.to, Other::Mode(mode) if mode.backend().is_some());
    let is_main = matches!(ratio.metric, Metric::Rate | Metric::Cpu);
    !is_of_one_backend && (is_main || ratio.workload == Workload::Request1)
}

/// `1.034 (1.021–1.050)`, or `? (0.80–1.20)` with the letters of the doubts.
fn cell(ratio: &Ratio) -> String {
    let Interval { median, low, high, .. } = ratio.ratio;
    if ratio.conclusive {
        return format!("{median:.3} ({low:.3}–{high:.3})");
    }
    let letters: String = ratio.doubts.iter().map(|doubt| letter(*doubt)).collect();
    format!("? ({low:.2}–{high:.2}) {letters}")
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
    let doubts = || document.ratios.iter().filter(|r| is_shown(r)).flat_map(|r| &r.doubts);
    let most = |share: fn(&Doubt) -> Option<f64>| doubts().filter_map(share).reduce(f64::max);
    let others = most(|d| if let Doubt::Others(share) = d { Some(*share) } else { None });
    let steal = most(|d| if let Doubt::Steal(share) = d { Some(*share) } else { None });
    let percent = |share: f64| share * 100.0;
    let reasons = [
        doubts().any(|d| *d == Doubt::FewRounds).then(|| "r: too few rounds".to_owned()),
        doubts().any(|d| *d == Doubt::Wide).then(|| "w: rounds differ too much".to_owned()),
        others.map(|s| format!("o: up to {:.0} % of the machine was used by others", percent(s))),
        steal.map(|s| format!("s: up to {:.0} % of the machine was stolen", percent(s))),
    ];
    let reasons: Vec<String> = reasons.into_iter().flatten().collect();
    if reasons.is_empty() {
        return String::new();
    }
    format!("?: no conclusion. {}.\n", reasons.join("; "))
}

/// Medians: one column for each mode.
fn medians(document: &Document) -> Table {
    let modes = modes(document);
    let mut header = vec!["family", "workload", "median"];
    header.extend(modes.iter().map(|mode| mode.as_str()));
    let mut table = new_table(&header);
    for group in document.medians.chunk_by(|a, b| (a.family, a.workload) == (b.family, b.workload))
    {
        let Some(first) = group.first() else { continue };
        for (what, value) in lines(first) {
            let cells = modes.iter().map(|mode| {
                let median = group.iter().find(|m| m.mode == *mode);
                median.and_then(value).unwrap_or_else(|| "-".to_owned())
            });
            let names = [first.family.as_str(), first.workload.as_str(), &what].map(str::to_owned);
            table.add_row(names.into_iter().chain(cells));
        }
    }
    table
}

type Value = fn(&Median) -> Option<String>;

/// What there is to say of a workload: its name with the unit, and the number.
fn lines(first: &Median) -> Vec<(String, Value)> {
    if first.p50_us.is_none() {
        return vec![
            ("GB/s".to_owned(), |m| Some(format!("{:.2}", m.rate / 1e9))),
            ("CPU ms per GB".to_owned(), |m| Some(format!("{:.0}", m.cpu_us / 1e3))),
        ];
    }
    let mut lines: Vec<(String, Value)> = vec![
        (first.unit.to_owned(), |m| Some(format!("{:.0}", m.rate))),
        ("p50 µs".to_owned(), |m| m.p50_us.map(|us| format!("{us:.0}"))),
        ("p99 µs".to_owned(), |m| m.p99_us.map(|us| format!("{us:.0}"))),
        (format!("CPU µs per {}", first.per), |m| Some(format!("{:.1}", m.cpu_us))),
    ];
    if first.lost_per_million.is_some() {
        let lost: Value = |m| m.lost_per_million.map(|lost| format!("{lost:.0}"));
        lines.push(("lost of a million".to_owned(), lost));
    }
    lines
}

fn modes(document: &Document) -> Vec<Mode> {
    let mut modes: Vec<Mode> = document.medians.iter().map(|m| m.mode).collect();
    modes.sort_unstable();
    modes.dedup();
    modes
}

/// What open connections cost.
fn held(document: &Document) -> Table {
    let modes = modes(document);
    let mut header = vec!["family".to_owned(), format!("for {UNIT} open connections")];
    header.extend(modes.iter().map(|mode| mode.as_str().to_owned()));
    let mut table = new_table(&header.iter().map(String::as_str).collect::<Vec<_>>());
    let mut families: Vec<Family> = document.held_medians.iter().map(|m| m.family).collect();
    families.dedup();
    for family in families {
        let of = |mode: &Mode| {
            document.held_medians.iter().find(|m| (m.family, m.mode) == (family, *mode))
        };
        let row = |what: &str, cell: &dyn Fn(&Mode) -> Option<String>| {
            let names = [family.as_str(), what].map(str::to_owned);
            let cells = modes.iter().map(|mode| cell(mode).unwrap_or_else(|| "-".to_owned()));
            names.into_iter().chain(cells).collect::<Vec<_>>()
        };
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        table.add_row(row("kernel memory, MiB", &|m| of(m).map(|h| mib(h.kernel_bytes))));
        table.add_row(row("conntrack entries", &|m| of(m).map(|h| format!("{:.0}", h.conntrack))));
    }
    table
}

/// What BPF programs cost.
fn programs(document: &Document) -> Table {
    let mut table = new_table(&[
        "family",
        "workload",
        "mode",
        "program",
        "runs",
        "ns",
        "ns per run",
        "packets",
    ]);
    for (m, cost) in document.medians.iter().filter_map(|m| Some((m, m.programs.as_ref()?))) {
        let mut row = |name: &str, runs: f64, ns: f64, packets: &str| {
            let each = if runs > 0.0 { format!("{:.0}", ns / runs) } else { "-".to_owned() };
            let names = [m.family.as_str(), m.workload.as_str(), m.mode.as_str(), name];
            let numbers = [format!("{runs:.1}"), format!("{ns:.0}"), each, packets.to_owned()];
            table.add_row(names.map(str::to_owned).into_iter().chain(numbers));
        };
        let packets = format!("{:.1}", cost.packets);
        row(&format!("all, per {}", m.per), cost.runs, cost.nanoseconds, &packets);
        for place in cost.places.iter().filter(|place| place.runs > 0.0) {
            row(&place.place, place.runs, place.nanoseconds, "");
        }
    }
    table
}
