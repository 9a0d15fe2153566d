//! The report as text.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use super::report::{Counts, NodeRow, PodRow, Report, State};
use crate::{
    membership::PodKey,
    output::{Format, escaped, json, printable, table},
};

/// How many rows are shown of a table that may have thousands; `-o wide` shows all.
const SHOWN: usize = 50;

/// The names of columns, and then, if `states`, each state.
fn header(first: &[&str], states: bool) -> Vec<String> {
    let states = State::ALL.into_iter().filter(|_| states);
    let states = states.map(|state| state.as_str().to_ascii_uppercase());
    first.iter().map(|name| (*name).to_owned()).chain(states).collect()
}

/// Prints the report in `format`.
///
/// # Errors
///
/// When JSON cannot express it.
pub fn text(report: &Report, format: Format) -> anyhow::Result<String> {
    if format == Format::Json {
        return json(report);
    }
    let mut out = String::new();
    write(report, format == Format::Wide, &mut out)?;
    Ok(out)
}

fn write(report: &Report, wide: bool, out: &mut String) -> fmt::Result {
    let Report { server, settings, .. } = report;
    writeln!(out, "cluster {}, settings of {}", printable(server), printable(&settings.from))?;
    write!(out, "excluded namespaces: {}", settings.excluded_namespaces.join(", "))?;
    let selected = if settings.enablement_selectors { "; by enablement selectors" } else { "" };
    writeln!(out, "{selected}\n")?;
    let header = header(&["VERSION", "NODES", "READY"], true);
    let rows = report.versions.iter().map(|row| {
        let version = row.version.clone().unwrap_or_else(|| "no agent".to_owned());
        let mut cells = vec![version, row.nodes.to_string(), row.ready.to_string()];
        cells.extend(counts(&row.pods));
        cells
    });
    out.push_str(&table(&header, rows));
    write_nodes(report, wide, out)?;
    write_pods(report, wide, out)?;
    if !(report.unknown_words.is_empty() && report.notes.is_empty()) {
        writeln!(out)?;
    }
    for word in &report.unknown_words {
        writeln!(out, "unknown: {}", printable(&word.to_string()))?;
    }
    for note in &report.notes {
        writeln!(out, "note: {}", printable(note))?;
    }
    writeln!(out, "\n{}", summary(report))
}

fn counts(pods: &Counts) -> impl Iterator<Item = String> {
    pods.each().map(|(_, count)| count.to_string())
}

/// The nodes that have a problem, or, if it is to be wide, all.
fn write_nodes(report: &Report, wide: bool, out: &mut String) -> fmt::Result {
    let nodes: Vec<&NodeRow> =
        report.nodes.iter().filter(|node| wide || node.problem.is_some()).collect();
    if nodes.is_empty() {
        return Ok(());
    }
    let header = header(&["NODE", "AGENT", "VERSION", "SINCE", "PROBLEM"], wide);
    let shown = if wide { nodes.len() } else { SHOWN };
    let rows = nodes.iter().take(shown).map(|node| {
        let mut cells = vec![
            node.name.clone(),
            node.agent.as_ref().map_or(String::new(), PodKey::to_string),
            node.version.clone().unwrap_or_default(),
            node.since.map_or(String::new(), |since| since.to_string()),
            problem(node),
        ];
        if wide {
            cells.extend(counts(&node.pods));
        }
        cells
    });
    write!(out, "\n{}", table(&header, rows))?;
    more(nodes.len(), shown, out)
}

fn write_pods(report: &Report, wide: bool, out: &mut String) -> fmt::Result {
    let pods = &report.unexpected;
    if pods.is_empty() {
        return Ok(());
    }
    let mut header = vec!["NAMESPACE", "NAME", "NODE", "STATE", "REASON", "SINCE", "WHY"];
    if wide {
        header.push("NEXT");
    }
    let shown = if wide { pods.len() } else { SHOWN };
    let rows = pods.iter().take(shown).map(|pod| {
        let mut cells = vec![
            pod.namespace.clone(),
            pod.name.clone(),
            pod.node.clone().unwrap_or_default(),
            pod.state.as_str().to_owned(),
            pod.reason.to_string(),
            pod.since.map_or(String::new(), |since| since.to_string()),
            pod.message.clone(),
        ];
        if wide {
            cells.push(pod.next.clone().unwrap_or_default());
        }
        cells
    });
    write!(out, "\n{}", table(&header, rows))?;
    more(pods.len(), shown, out)?;
    match pods.iter().find_map(|pod| Some((pod, pod.next.as_ref()?))) {
        Some((PodRow { namespace, name, .. }, next)) if !wide => {
            writeln!(out, "next, for {namespace}/{name}: {}", printable(next))
        }
        _ => Ok(()),
    }
}

fn more(all: usize, shown: usize, out: &mut String) -> fmt::Result {
    match all.saturating_sub(shown) {
        0 => Ok(()),
        left => writeln!(out, "and {left} more: -o wide shows all"),
    }
}

/// The last line.
fn summary(report: &Report) -> String {
    let states = report.pods.each().filter(|(_, count)| *count > 0);
    let states: Vec<String> =
        states.map(|(state, count)| format!("{count} {}", state.as_str())).collect();
    let pods = match (report.pods.total(), report.pods.unexpected()) {
        (0, _) => "no pods".to_owned(),
        (all, 0) => format!("{}: {}", number(all, "pod"), states.join(", ")),
        (all, unexpected) => {
            let (pods, states) = (number(all, "pod"), states.join(", "));
            format!("{pods}: {states}; {unexpected} of {pods} not in the expected state")
        }
    };
    let ready: usize = report.versions.iter().map(|version| version.ready).sum();
    let nodes = number(report.nodes.len(), "node");
    let versions = report.versions.iter().filter(|version| version.version.is_some()).count();
    let versions = match versions {
        0 | 1 => String::new(),
        n => format!(", {n} versions of the agent"),
    };
    format!("{pods}; {nodes}, {ready} with a ready agent{versions}")
}

fn number(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A line for each pod and node that has become unexpected, is so in another way, or no longer is: for
/// people, or as a JSON object.
pub fn changes(before: &Report, after: &Report, format: Format) -> String {
    let (old, new) = (things(before), things(after));
    let mut out = String::new();
    for (object, thing) in &new {
        if old.get(object) != Some(thing) {
            line(after, object, Some(thing), format, &mut out);
        }
    }
    for object in old.keys().filter(|object| !new.contains_key(*object)) {
        line(after, object, None, format, &mut out);
    }
    out
}

/// What is unexpected: a pod's state, if it is a pod, and the particulars.
type Thing = (Option<State>, String);

/// Everything that is unexpected, by its name.
fn things(report: &Report) -> BTreeMap<String, Thing> {
    let pods = report.unexpected.iter().map(|pod| {
        let name = format!("pod {}/{}", pod.namespace, pod.name);
        (name, (Some(pod.state), pod.message.clone()))
    });
    let nodes = report
        .nodes
        .iter()
        .filter(|node| node.is_unexpected())
        .map(|node| (format!("node {}", node.name), (None, problem(node))));
    pods.chain(nodes).collect()
}

/// What is wrong with a node, in words.
fn problem(node: &NodeRow) -> String {
    match (node.problem, &node.message) {
        (None, _) => String::new(),
        (Some(problem), None) => problem.as_str().to_owned(),
        (Some(problem), Some(message)) => format!("{}: {message}", problem.as_str()),
    }
}

fn line(report: &Report, object: &str, thing: Option<&Thing>, format: Format, out: &mut String) {
    let time = report.time;
    let state = thing.and_then(|(state, _)| *state);
    let message = thing.map(|(_, message)| message.as_str());
    let text = if format == Format::Json {
        let unexpected = thing.is_some();
        let line = serde_json::json!({
            "time": time, "object": object, "unexpected": unexpected, "state": state, "message": message,
        });
        escaped(&line.to_string())
    } else {
        let state = state.map_or(String::new(), |state| format!("   {}", state.as_str()));
        let message = message.unwrap_or("resolved");
        printable(&format!("{time}   {object}{state}   {message}"))
    };
    out.push_str(&text);
    out.push('\n');
}
