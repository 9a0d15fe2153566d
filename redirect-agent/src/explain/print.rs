//! The explanation as text.

use std::{
    fmt::{self, Write as _},
    net::SocketAddr,
};

use super::{
    Cause, Explanation, Finding, NodePart, Place, PodPart, Rule, ServicePart, Waypoint,
    service::LOOKED_AT, verdict::application_listens,
};
use crate::{
    membership::{LABEL_USE_WAYPOINT, Reason},
    output::printable,
    traffic::Traffic,
    zds::Answer,
};

/// The column after the headings.
const COLUMN: usize = 15;

/// The explanation as text for people.
pub fn text(explanation: &Explanation) -> String {
    let mut out = String::new();
    let _infallible = write(explanation, &mut out);
    out
}

fn write(explanation: &Explanation, out: &mut String) -> fmt::Result {
    let Explanation { node, pod, to, path, findings, verdict, .. } = explanation;
    write_pod(node, pod, out)?;
    if let Some(to) = to {
        writeln!(out)?;
        if let Some(service) = &to.service {
            write_service(service, out)?;
        }
        match &to.pod {
            Some(called) => write_pod(node, called, out)?,
            None if to.service.is_some() => {}
            None => writeln!(out, "{}: not known here", to.asked)?,
        }
        writeln!(out)?;
        let asked = format!("{} -> {}", pod.name, to.asked);
        match path {
            Some(path) => {
                line(out, "call", &format!("{asked}: {}", path.protocol))?;
                for why in &path.why {
                    line(out, "", why)?;
                }
            }
            None => line(out, "call", &format!("{asked}: unknown"))?,
        }
    }
    writeln!(out)?;
    write_finding(verdict, "verdict", out)?;
    for also in findings.iter().skip(1).filter(|f| f.cause != Cause::NothingFound) {
        write_finding(also, "also", out)?;
    }
    Ok(())
}

fn write_finding(finding: &Finding, word: &str, out: &mut String) -> fmt::Result {
    line(out, word, &format!("{}: {}", finding.area.as_str(), finding.cause.as_str()))?;
    line(out, "", &finding.message)?;
    for (n, next) in finding.next.iter().enumerate() {
        line(out, if n == 0 { "  next" } else { "" }, next)?;
    }
    Ok(())
}

/// A heading and its text. Text from objects must not contain control characters.
fn line(out: &mut String, word: &str, text: &str) -> fmt::Result {
    writeln!(out, "{word:<COLUMN$}{}", printable(text))
}

fn write_service(service: &ServicePart, out: &mut String) -> fmt::Result {
    let mut head = format!("Service {}", service.name);
    for ip in &service.ips {
        write!(head, ", {ip}")?;
    }
    if service.ips.is_empty() {
        head.push_str(", headless");
    }
    writeln!(out, "{}", printable(&head))?;
    write_waypoint(service.waypoint.as_ref(), out)?;
    for (n, endpoint) in service.endpoints.iter().take(LOOKED_AT).enumerate() {
        let pod = endpoint.pod.as_deref().unwrap_or("no pod");
        let at = match endpoint.port {
            Some(port) => SocketAddr::new(endpoint.ip, port).to_string(),
            None => endpoint.ip.to_string(),
        };
        let ready = if endpoint.ready { "ready" } else { "not ready" };
        let verdict = endpoint.verdict.map_or("not looked at", Cause::as_str);
        let shown = if endpoint.chosen { ", explained below" } else { "" };
        let word = if n == 0 { "  endpoints" } else { "" };
        line(out, word, &format!("{pod} at {at}, {ready}: {verdict}{shown}"))?;
    }
    let more = service.endpoints.len().saturating_sub(LOOKED_AT);
    if more > 0 {
        line(out, "", &format!("and {more} more, which were not looked at"))?;
    }
    writeln!(out)
}

fn write_waypoint(waypoint: Option<&Waypoint>, out: &mut String) -> fmt::Result {
    let Some(waypoint) = waypoint else { return Ok(()) };
    let gateway = waypoint.gateway.as_deref().unwrap_or("none, opted out");
    line(
        out,
        "  waypoint",
        &format!("{gateway}, by label {LABEL_USE_WAYPOINT} of {}", waypoint.object),
    )
}

fn write_pod(node: &NodePart, pod: &PodPart, out: &mut String) -> fmt::Result {
    let mut head = pod.name.clone();
    match pod.place {
        Place::Unknown => head.push_str(": not known here"),
        Place::LeftOut => head.push_str(": left out, because another pod has what it has"),
        Place::Manifest => write!(head, ", according to {}", node.source)?,
        Place::Here | Place::OtherNode => {
            let on = pod.node.as_deref().unwrap_or("no node");
            let other = if pod.place == Place::OtherNode { " (not this node)" } else { "" };
            write!(head, " on {on}{other}")?;
        }
    }
    if let Some(uid) = &pod.uid {
        write!(head, ", uid {uid}")?;
    }
    for ip in &pod.ips {
        write!(head, ", {ip}")?;
    }
    writeln!(out, "{}", printable(&head))?;
    for conflict in &pod.conflicts {
        line(out, "  conflict", conflict)?;
    }
    write_decision(node, pod, out)?;
    if let Some(state) = pod.state {
        let message = pod.message.as_ref().map_or_else(String::new, |m| format!(": {m}"));
        line(out, "  state", &format!("{}{message}", state.as_str()))?;
    }
    write_settings(pod, out)?;
    if pod.place == Place::Here {
        write_found(node, pod, out)?;
    }
    let redirection = pod.redirection.as_deref().map(|value| match value {
        "enabled" => "enabled: peers in the mesh use HBONE",
        _ => "pending: peers use plaintext until the proxy serves it",
    });
    if pod.place == Place::Here || pod.place == Place::OtherNode {
        let text = redirection.unwrap_or("no annotation: peers use plaintext");
        line(out, "  peers", &format!("ambient.istio.io/redirection: {text}"))?;
    }
    write_waypoint(pod.waypoint.as_ref(), out)?;
    for word in &pod.unknown_words {
        line(out, "  unknown", &word.to_string())?;
    }
    for entry in &pod.history {
        let times =
            if entry.count > 1 { format!(" ({} times)", entry.count) } else { String::new() };
        let text = format!("{} {}{times}: {}", entry.last, entry.kind.as_str(), entry.message);
        line(out, "  happened", &text)?;
    }
    Ok(())
}

fn write_decision(node: &NodePart, pod: &PodPart, out: &mut String) -> fmt::Result {
    let Some(decision) = &pod.decision else { return Ok(()) };
    let side = match decision.reason {
        Reason::NotLabeled | Reason::NotSelected if node.lacks_namespace => {
            "not in the mesh, as far as the manifests show"
        }
        _ if decision.enrolled => "in the mesh",
        _ => "not in the mesh",
    };
    line(out, "  decision", &format!("{side}: {}", decision.reason.explain()))?;
    for rule in &decision.rules {
        line(out, "", &rule_text(rule))?;
    }
    Ok(())
}

fn rule_text(rule: &Rule) -> String {
    let Rule { object, asks, found, decides } = rule;
    let text = match (found, asks.starts_with("--")) {
        (Some(_), true) => format!("{object}: matched by {asks}"),
        (None, true) => format!("{object}: not matched by {asks}"),
        (Some(found), false) => format!("{object}: {asks} = {found:?}"),
        (None, false) if object.is_empty() => asks.clone(),
        (None, false) => format!("{object}: {asks} is not set"),
    };
    decides.as_ref().map_or_else(|| text.clone(), |side| format!("{text}  => {side}"))
}

fn write_settings(pod: &PodPart, out: &mut String) -> fmt::Result {
    let summary = pod.traffic.as_ref().map(Traffic::to_string).filter(|text| !text.is_empty());
    if let Some(summary) = &summary {
        line(out, "  settings", summary)?;
    }
    for (n, origin) in pod.settings.iter().enumerate() {
        let problem = origin.problem.as_ref().map_or_else(String::new, |p| format!("  => {p}"));
        let word = if n == 0 && summary.is_none() { "  settings" } else { "" };
        line(
            out,
            word,
            &format!("annotation {} = {:?}{problem}", origin.annotation, origin.value),
        )?;
    }
    Ok(())
}

/// What was found on the node.
fn write_found(node: &NodePart, pod: &PodPart, out: &mut String) -> fmt::Result {
    let kernel = match &pod.kernel {
        None => "nothing of ours".to_owned(),
        Some(kernel) => {
            let all = kernel.present.len() + kernel.missing.len();
            let captured = if kernel.captured { "redirected" } else { "not redirected yet" };
            let mut text =
                format!("{captured}; {}/{all}; netns {}", kernel.present.len(), kernel.netns);
            if !kernel.missing.is_empty() {
                write!(text, "; lacks {}", kernel.missing.join(", "))?;
            }
            if kernel.istio_cni {
                text.push_str("; istio-cni's rules, too");
            }
            text
        }
    };
    line(out, "  kernel", &kernel)?;
    line(out, "  proxy", &proxy(node, pod))?;
    if let Some(listens) = application_listens(pod) {
        let text = match listens.is_empty() {
            true => "does not listen".to_owned(),
            false => {
                let at: Vec<String> = listens.iter().map(ToString::to_string).collect();
                format!("listens at {}", at.join(", "))
            }
        };
        line(out, "  application", &text)?;
    }
    for ip in &pod.missing_addresses {
        line(out, "  address", &format!("{ip} is missing: no interface of the pod has it"))?;
    }
    let refused = |name: &str| {
        name.starts_with("refused") || name.starts_with("dropped") || name == "no_listener"
    };
    let counted = |wanted: bool| -> Vec<String> {
        let counters = pod.counters.iter().filter(|(name, _)| refused(name) == wanted);
        counters.map(|(name, value)| format!("{name}={value}")).collect()
    };
    for (word, counters) in [("  refused", counted(true)), ("  counted", counted(false))] {
        if !counters.is_empty() {
            line(out, word, &counters.join(" "))?;
        }
    }
    Ok(())
}

fn proxy(node: &NodePart, pod: &PodPart) -> String {
    let connected = match (node.proxies, node.no_proxy_since) {
        (Some(0), Some(since)) => return format!("none connected since {since}"),
        (Some(1) | None, _) => "1 connected".to_owned(),
        (Some(n), _) => format!("{n} connected"),
    };
    let serves = match &pod.proxy {
        Some(Answer::Added | Answer::Kept) => "serves the pod".to_owned(),
        Some(Answer::Refused(error)) => format!("refuses the pod: {error}"),
        None => "does not know the pod".to_owned(),
    };
    let deaf = match &pod.kernel {
        Some(kernel) if !kernel.proxy_does_not_listen.is_empty() => {
            format!("; does not listen on {}", kernel.proxy_does_not_listen.join(", "))
        }
        _ => String::new(),
    };
    format!("{connected}, {serves}{deaf}")
}
