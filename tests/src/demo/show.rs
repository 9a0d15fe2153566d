//! The report as text, for people.

use std::fmt::Write as _;

use comfy_table::{ContentArrangement, Table, presets};

use super::Report;
use super::cluster::{CAST, NODES};
use super::evidence::{Over, Seen};
use super::kernel::{Footprint, PodsMap};
use super::live::{Live, Switch};
use super::rows::Row;
use super::toggles::Toggle;
use crate::hbone::TRUST_DOMAIN;

/// Columns of the terminal that are used.
const WIDTH: u16 = 118;

pub(super) fn stage() -> String {
    let rows = CAST
        .iter()
        .map(|cast| vec![cast.pod.to_owned(), NODES[cast.node].0.to_owned(), cast.role.to_owned()]);
    section(
        "The stage",
        "Two nodes, each a network namespace with its own redirect-agent and its own proxy (a stand-in \
         for ztunnel),\nand their pods. Each pod runs an application that says whom it sees.",
    ) + &table(&["pod", "node", "who it is"], rows)
}

pub(super) fn rows(rows: &[Row]) -> String {
    section(
        "Who reaches whom, over what",
        "HBONE: mTLS, in HTTP/2. Plaintext via proxy: in clear, through the proxy of the end that is in the \
         mesh. Direct: no\nproxy at all. Which of them it was is told from the packets on eth0 and from \
         the proxies' logs. The identity is what\nthe destination's proxy saw in the client's \
         certificate. The application has to see the client's own address.",
    ) + &calls(rows)
}

fn calls(rows: &[Row]) -> String {
    let header = ["from", "to", "", "over", "identity", "app saw", "expected", ""];
    table(
        &header,
        rows.iter().map(|row| {
            vec![
                row.from.clone(),
                row.to.clone(),
                row.family.to_owned(),
                over(&row.observed),
                identity(&row.observed),
                row.observed.app_saw.map_or_else(dash, |ip| ip.to_string()),
                match row.expected.identity {
                    Some(_) => format!("{}, {}", over(&row.expected), identity(&row.expected)),
                    None => over(&row.expected),
                },
                tick(row.ok),
            ]
        }),
    )
}

fn over(seen: &Seen) -> String {
    match (&seen.refused_by, seen.over) {
        (Some(by), over) => format!("{} ({by})", over.as_str()),
        (None, Over::Proxy) => "plaintext via proxy".to_owned(),
        (None, over) => over.as_str().to_owned(),
    }
}

/// `spiffe://cluster.local/ns/shop/sa/cart` as `shop/cart`.
fn identity(seen: &Seen) -> String {
    let Some(identity) = &seen.identity else { return dash() };
    let prefix = format!("spiffe://{TRUST_DOMAIN}/ns/");
    identity.strip_prefix(&prefix).unwrap_or(identity).replace("/sa/", "/")
}

pub(super) fn live(live: &Live) -> String {
    let mut out = section(
        &format!("A label goes on and off {}, which runs", live.pod),
        "Its manifest is edited under a constant load of new connections, and with long-lived connections \
         open.\nNone may fail or break. What was opened through the proxy may go on for the length of \
         the drain.",
    );
    out += &paragraph(&format!("The load: {}.", live.pairs.join(", ")));
    let switches = [("on", &live.enrollment), ("off", &live.unenrollment)];
    out += &table(
        &["label", "direction", "", "new connections", "failed", "slowest"],
        switches.iter().flat_map(|(label, switch)| {
            switch.new_connections.iter().map(|tally| {
                vec![
                    (*label).to_owned(),
                    tally.direction.to_owned(),
                    tally.family.to_owned(),
                    tally.made.to_string(),
                    tally.failed.to_string(),
                    format!("{} ms", tally.slowest_ms),
                ]
            })
        }),
    );
    let redirected = &live.redirected;
    let ms = |time: Option<u64>| time.map_or_else(|| "never".to_owned(), |ms| format!("{ms} ms"));
    out += &table(
        &["what", "observed", "expected", ""],
        [
            vec![
                "label edited -> status says enrolled".to_owned(),
                format!("{} ms", live.enrollment.status_after_ms),
                "less than 1000 ms".to_owned(),
                tick(live.enrollment.status_after_ms < 1000),
            ],
            vec![
                "label edited -> first connection redirected".to_owned(),
                ms(live.enrollment.first_redirected_after_ms),
                "less than 1000 ms".to_owned(),
                tick(live.enrollment.first_redirected_after_ms.is_some_and(|ms| ms < 1000)),
            ],
            old("enrollment", &live.enrollment),
            vec![
                "label removed -> last connection redirected".to_owned(),
                ms(live.unenrollment.last_redirected_after_ms),
                "less than 1000 ms".to_owned(),
                tick(live.unenrollment.last_redirected_after_ms.is_some_and(|ms| ms < 1000)),
            ],
            vec![
                "label removed -> status says bypassing".to_owned(),
                format!("{} ms", live.unenrollment.status_after_ms),
                format!("after the drain of {} ms, as some stay open", redirected.drain_ms),
                tick(live.unenrollment.status_after_ms >= redirected.drain_ms),
            ],
            old("unenrollment", &live.unenrollment),
            vec![
                "connections through the proxy at unenrollment".to_owned(),
                format!(
                    "{} open; ended after {} to {}, {} of them by a clean close; {} outlasted it",
                    redirected.open,
                    ms(redirected.first_end_after_ms),
                    ms(redirected.last_end_after_ms),
                    redirected.closed_cleanly,
                    redirected.outlasted,
                ),
                "go on until the drain is over, then end".to_owned(),
                tick(redirected.ok),
            ],
        ],
    );
    let failures = switches.iter().flat_map(|(_, switch)| {
        let new = switch.new_connections.iter().flat_map(|tally| &tally.failures);
        new.chain(&switch.old_connections.breaks)
    });
    for failure in failures {
        let _ = writeln!(out, "NOT OK: {failure}");
    }
    out
}

fn old(name: &str, switch: &Switch) -> Vec<String> {
    let old = &switch.old_connections;
    vec![
        format!("older connections broken by {name}"),
        format!("{} of {} ({} busy, {} idle)", old.broken, old.busy + old.idle, old.busy, old.idle),
        "0".to_owned(),
        tick(old.broken == 0),
    ]
}

pub(super) fn toggles(toggles: &[Toggle]) -> String {
    let mut out = section(
        "The toggles",
        "An operator overrides the labels on one node; here on node-a. Each command is given twice: the \
         second\nchanges nothing. After it the effect is looked at with calls.",
    );
    for toggle in toggles {
        let _ = writeln!(out, "\n$ {}", toggle.command);
        out += &paragraph(&toggle.printed);
        let again = toggle.printed_again.lines().next().unwrap_or_default();
        let _ = writeln!(out, " again: {again}");
        let _ = writeln!(out, " in effect after {} ms:", toggle.effect_after_ms);
        out += &calls(&toggle.rows);
    }
    out
}

/// What `redirect-agent status` printed, its columns made to fit.
pub(super) fn status(node: &str, printed: &str) -> String {
    let mut out = section(
        &format!("redirect-agent status, {node}"),
        "Every pod of the node: in the mesh or not, why, and what the kernel has for it. (Wrapped to fit.)",
    );
    // Columns are three blanks or more apart, and no cell has that many in it.
    let cells = |line: &str| -> Vec<String> {
        line.split("   ").map(str::trim).filter(|c| !c.is_empty()).map(str::to_owned).collect()
    };
    let is_header = |line: &&str| line.starts_with("NAMESPACE");
    let header = printed.lines().find(is_header).map(cells).unwrap_or_default();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut rows = Vec::new();
    for line in printed.lines().filter(|line| !is_header(line)) {
        let mut row = cells(line);
        if row.len() != header.len() {
            out += &paragraph(line);
            continue;
        }
        for (cell, name) in row.iter_mut().zip(&header) {
            match *name {
                "IPS" => *cell = cell.replace(',', ",\n"),
                "COUNTERS" | "OVERRIDE" => *cell = cell.replace(' ', "\n"),
                _ => {}
            }
        }
        rows.push(row);
    }
    out + &table(&header, rows)
}

pub(super) fn pods_maps(maps: &[PodsMap]) -> String {
    let mut out = section(
        "What the kernel knows of the pods",
        "Both addresses of every pod of the node, enrolled and bypassing; bpftool prints the fields' names.",
    );
    for map in maps {
        let _ = writeln!(out, "\n$ {}   ({}, {})", map.command, map.node, tick(map.ok));
        if let Some(first) = map.dump.get(0) {
            let (key, value) = (&first["formatted"]["key"], &first["formatted"]["value"]);
            let _ = writeln!(out, "  the first entry as it is: key {key}\n  value {value}");
        }
        out += &table(
            &["address", "pod", "pod_id", "decision", "reason", "flags"],
            map.entries.iter().map(|entry| {
                vec![
                    entry.address.clone(),
                    entry.pod.clone(),
                    entry.pod_id.to_string(),
                    if entry.enrolled { "enrolled" } else { "bypass" }.to_owned(),
                    entry.reason.clone(),
                    if entry.capture { "capture".to_owned() } else { dash() },
                ]
            }),
        );
    }
    out
}

pub(super) fn bypass_proof(footprints: &[Footprint]) -> String {
    let mut out = section(
        "Pods that bypass carry nothing",
        "Looked at from inside their network namespaces, and compared with a new one; a pod of the mesh \
         shows that\nthe same questions do find what is there.",
    );
    let listed =
        |list: &[String]| if list.is_empty() { "none".to_owned() } else { list.join("\n") };
    out += &table(
        &["pod", "BPF programs", "rules", "routes elsewhere", "netfilter", "sysctls", ""],
        footprints.iter().map(|found| {
            let kind = if found.enrolled { "in the mesh" } else { "bypasses" };
            vec![
                format!("{}\n{kind}", found.pod),
                listed(&found.programs),
                listed(&found.rules),
                listed(&found.routes),
                listed(&found.netfilter),
                listed(&found.sysctls),
                tick(found.ok),
            ]
        }),
    );
    if let Some(found) = footprints.first() {
        out += &paragraph(&format!("Looked at: {}.", found.looked_at.join("; ")));
    }
    out
}

pub(super) fn verdict(report: &Report) -> String {
    let Report { rows, live, toggles, bypass_proof, .. } = report;
    let good = rows.iter().filter(|row| row.ok).count();
    let mut out = format!(
        "{} of {} calls went as expected; the label's changes {}; {} of {} toggles had their effect; \
         {} of {} pods carry what they should. {} s.",
        good,
        rows.len(),
        if live.ok { "cost no connection" } else { "were NOT OK" },
        toggles.iter().filter(|toggle| toggle.ok).count(),
        toggles.len(),
        bypass_proof.iter().filter(|found| found.ok).count(),
        bypass_proof.len(),
        report.seconds,
    );
    out += if report.ok { " All is as expected." } else { " Something is NOT as expected." };
    let failed = rows.iter().chain(toggles.iter().flat_map(|t| &t.rows)).filter(|row| !row.ok);
    for row in failed {
        let _ = write!(
            out,
            "\nNOT OK: {} -> {} ({}): {:?}\n  expected {:?}\n  from {:?}",
            row.from, row.to, row.family, row.observed, row.expected, row.evidence
        );
    }
    out
}

fn section(title: &str, text: &str) -> String {
    format!("\n== {title}\n{text}\n\n")
}

fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = wrapping();
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    text(&table)
}

/// Text that fits.
pub(super) fn paragraph(words: &str) -> String {
    let mut table = wrapping();
    table.add_row([words]);
    text(&table)
}

fn wrapping() -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH);
    table
}

fn text(table: &Table) -> String {
    let mut out = String::new();
    for line in table.lines() {
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

fn tick(ok: bool) -> String {
    if ok { "ok" } else { "NOT OK" }.to_owned()
}

fn dash() -> String {
    "-".to_owned()
}
