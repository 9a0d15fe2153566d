//! What was measured, as a picture: SVG that is readable in light and dark.

use std::fmt::Write as _;

use super::ratios::within_rounds;
use super::tables::caption;
use super::{Document, Interval, Metric, Mode, Other, Workload};
use crate::netns::Family;

/// What is drawn, with the names of their colors below. The line at 1 is [`Mode::Explicit`].
const SHOWN: [(Mode, &str); 4] = [
    (Mode::Ours, "ours"),
    (Mode::IstioNft, "nft"),
    (Mode::IstioLegacy, "legacy"),
    (Mode::IstioNative, "native"),
];

/// Dark colors where the reader's are. Every color is written out: not every viewer knows variables.
const STYLE: &str = "\
text { fill: #1f2328; font-family: sans-serif; font-size: 12px }
.title { font-weight: bold; font-size: 14px } .small { font-size: 10px }
.middle { text-anchor: middle } .end { text-anchor: end }
.back { fill: #ffffff } .grid { stroke: #d1d9e0 } .line { stroke: #1f2328 }
.ours { fill: #0969da } .nft { fill: #bf8700 } .legacy { fill: #8250df } .native { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .back { fill: #0d1117 } .grid { stroke: #3d444d } .line { stroke: #e6edf3 }
.ours { fill: #4493f8 } .nft { fill: #d29922 } .legacy { fill: #ab7df8 } .native { fill: #3fb950 }
}
";

const WIDTH: f64 = 920.0;
const LEFT: f64 = 40.0;
const TOP: f64 = 70.0;
/// A panel: its bars, and the text around them.
const BARS: f64 = 120.0;
const PANEL: f64 = 180.0;
const BAR: f64 = 22.0;

/// Draws rate and processor time of each mode by those of [`Mode::Explicit`], with their intervals.
pub fn chart(document: &Document) -> String {
    let mut families: Vec<Family> = document.medians.iter().map(|m| m.family).collect();
    families.dedup();
    let panels: Vec<(Family, Metric)> = families
        .iter()
        .flat_map(|family| [(*family, Metric::Rate), (*family, Metric::Cpu)])
        .collect();
    let height = TOP + PANEL * panels.len() as f64 + 20.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"What redirection costs\">\n<style>\n{STYLE}</style>\n\
         <rect class=\"back\" width=\"100%\" height=\"100%\"/>\n"
    );
    text(
        &mut svg,
        10.0,
        20.0,
        "title",
        "What redirection costs: 1 is a client that connects to the proxy by itself",
    );
    let mut x = 10.0;
    for (mode, color) in SHOWN {
        let _ = writeln!(
            svg,
            "<rect class=\"{color}\" x=\"{x}\" y=\"32\" width=\"12\" height=\"12\"/>"
        );
        text(&mut svg, x + 18.0, 42.0, "", mode.as_str());
        x += 110.0;
    }
    text(&mut svg, x, 42.0, "", "thin lines: 95 % intervals of the median of rounds");
    for (number, (family, metric)) in panels.into_iter().enumerate() {
        panel(&mut svg, document, family, metric, TOP + PANEL * number as f64);
    }
    text(&mut svg, 10.0, height - 10.0, "small", &escaped(&caption(document)));
    svg + "</svg>\n"
}

fn panel(svg: &mut String, document: &Document, family: Family, metric: Metric, top: f64) {
    let what = match metric {
        Metric::Rate => "rate, more is better",
        _ => "processor time of the machine, less is better",
    };
    text(
        svg,
        LEFT,
        top,
        "title",
        &format!("{}: {what}", if family == Family::V4 { "IPv4" } else { "IPv6" }),
    );
    let groups: Vec<(Workload, Vec<(&str, Interval)>)> =
        Workload::ALL.into_iter().map(|w| (w, bars(document, family, w, metric))).collect();
    let highest = groups.iter().flat_map(|(_, bars)| bars).map(|(_, i)| i.high).fold(1.0, f64::max);
    // Whatever is above is cut off.
    let scale = BARS / (highest.min(3.0) * 1.1);
    let bottom = top + 20.0 + BARS;
    let y = |value: f64| bottom - value.min(BARS / scale) * scale;
    for value in [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0] {
        if value * scale <= BARS {
            let class = if value == 1.0 { "line" } else { "grid" };
            line(svg, class, (LEFT, y(value)), (WIDTH - 10.0, y(value)));
            text(svg, LEFT - 6.0, y(value) + 4.0, "small end", &value.to_string());
        }
    }
    let group_width = (WIDTH - LEFT - 10.0) / groups.len() as f64;
    for (number, (workload, bars)) in groups.iter().enumerate() {
        let middle = LEFT + group_width * (number as f64 + 0.5);
        text(svg, middle, bottom + 14.0, "middle", workload.as_str());
        for (place, (color, Interval { median, low, high, .. })) in bars.iter().enumerate() {
            let x = middle + BAR * (place as f64 - bars.len() as f64 / 2.0);
            let _ = writeln!(
                svg,
                "<rect class=\"{color}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{}\" height=\"{:.1}\"/>",
                x,
                y(*median),
                BAR - 2.0,
                bottom - y(*median),
            );
            let center = x + BAR / 2.0 - 1.0;
            line(svg, "line", (center, y(*low)), (center, y(*high)));
            text(svg, center, y(*high) - 3.0, "small middle", &format!("{median:.2}"));
        }
    }
}

fn bars(
    document: &Document,
    family: Family,
    workload: Workload,
    metric: Metric,
) -> Vec<(&'static str, Interval)> {
    let these: Vec<_> =
        document.samples.iter().filter(|s| (s.family, s.workload) == (family, workload)).collect();
    let of = |mode| within_rounds(&these, metric, mode, Other::Mode(Mode::Explicit));
    SHOWN.iter().filter_map(|(mode, color)| Some((*color, of(*mode)?))).collect()
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let _ = writeln!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
}

fn line(svg: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
