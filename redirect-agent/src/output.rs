//! What the commands print: tables for people, JSON for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::IpAddr,
    time::SystemTime,
};

use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};

use crate::{
    explain::API_VERSION,
    membership::Reason,
    overrides::{Mode, Moment, Override, Pause, Target},
    probes::InForce,
    source::Problem,
    traffic::Traffic,
};

/// Why a pod is not in the mesh yet while no proxy is connected: true of all of them, and so said once.
pub const NO_PROXY: &str = "no proxy is connected";
/// How many things that a pod lacks are named in its row; more are counted.
const NAMED: usize = 2;

/// `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    Table,
    /// A table with every column.
    Wide,
    /// One JSON document.
    Json,
}

/// `-o`, of what is no table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TextFormat {
    /// Text for people.
    #[default]
    Text,
    /// One JSON document.
    Json,
}

/// What `status` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// When the agent started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Moment>,
    /// Where pods and namespaces come from: `dir:/etc/manifests`.
    pub source: String,
    /// What the agent waits for before it knows the pods; until then it shows none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// How many proxies are connected on the ZDS socket.
    pub proxies: u32,
    /// Since when the newest of them is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_since: Option<Moment>,
    /// Since when none is, while none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_proxy_since: Option<Moment>,
    /// Why the proxy's sockets are told by their mark alone, if they are: then an application with
    /// CAP_NET_RAW can pass for the proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark_alone: Option<String>,
    /// Set while the whole node bypasses.
    pub pause: Option<Pause>,
    /// The overrides in force on this node.
    #[serde(default)]
    pub overrides: Vec<NodeOverride>,
    /// Which connections reach pods past the proxy, as probes of kubelet.
    pub probes: InForce,
    /// What in the source cannot be used.
    pub problems: Vec<Problem>,
    /// Every pod of the node.
    pub pods: Vec<PodStatus>,
}

/// What the agent knows of a pod, and what the kernel has for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// The pod's addresses.
    pub ips: Vec<IpAddr>,
    /// Where the pod is.
    pub state: PodState,
    /// Since when, as far as this agent has seen it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Moment>,
    /// Why it should be there.
    pub reason: Reason,
    /// Why it is not where it should be, when it is not.
    pub message: Option<String>,
    /// The override in force for it.
    #[serde(rename = "override")]
    pub overridden: Option<OverrideStatus>,
    /// What of its traffic is redirected, where that is not everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
    /// The inode number of the pod's network namespace, when it is known.
    pub netns: Option<u32>,
    /// What the kernel has for the pod; `None`: nothing, as it should be for a pod that bypasses.
    pub kernel: Option<KernelStatus>,
    /// The pod's counters, by name.
    pub counters: BTreeMap<String, u64>,
}

/// Where a pod is on its way into or out of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    /// In the mesh, exactly as it should be: its new connections are redirected.
    Enrolled,
    /// In the mesh, and something is wrong: the message says what.
    Degraded,
    /// On its way in.
    Enrolling,
    /// Not in the mesh, untouched.
    Bypassing,
    /// On its way out.
    Leaving,
    /// Could not be brought to where it should be; it is tried again.
    Failed,
}

impl PodState {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            PodState::Enrolled => "enrolled",
            PodState::Degraded => "degraded",
            PodState::Enrolling => "enrolling",
            PodState::Bypassing => "bypassing",
            PodState::Leaving => "leaving",
            PodState::Failed => "failed",
        }
    }

    /// Whether the pod is where it should be.
    pub fn is_ready(self) -> bool {
        matches!(self, PodState::Enrolled | PodState::Bypassing)
    }
}

/// An override as it counts for one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverrideStatus {
    /// Which way.
    pub mode: Mode,
    /// What it was given for: the pod, or its namespace.
    pub target: Target,
    /// When it ends by itself.
    pub until: Option<Moment>,
}

/// An override of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeOverride {
    /// What it was given for.
    pub target: Target,
    /// How many pods of this node that is now.
    pub pods: usize,
    /// The override.
    #[serde(flatten)]
    pub found: Override,
}

impl fmt::Display for NodeOverride {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Override { mode, until, reason } = &self.found;
        write!(f, "override: {mode} {}", self.target)?;
        if let Some(until) = until {
            write!(f, " until {until}")?;
        }
        if let Some(reason) = reason {
            write!(f, " ({reason})")?;
        }
        match self.pods {
            0 => f.write_str(": no such pod on this node"),
            1 => f.write_str(": 1 pod"),
            n => write!(f, ": {n} pods"),
        }
    }
}

/// What the kernel has for a pod, as it was found there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelStatus {
    /// Everything is there that should be.
    pub complete: bool,
    /// What is there, each thing by a short name: `sk_lookup`, `tcx lo`, `rule ipv4`.
    pub present: Vec<String>,
    /// What should be there and is not.
    pub missing: Vec<String>,
}

/// Prints `status` in `format`; pods by namespace and name, whatever their order in it. With `not_ready`,
/// those that are where they should be are counted and not shown.
///
/// # Errors
///
/// Never for what the agent sends; when JSON cannot express it.
pub fn status(status: &Status, format: Format, not_ready: bool) -> anyhow::Result<String> {
    let mut pods: Vec<&PodStatus> =
        status.pods.iter().filter(|pod| !(not_ready && pod.state.is_ready())).collect();
    if format == Format::Json {
        let pods = pods.into_iter().cloned().collect();
        return json(&status_document(Status { pods, ..status.clone() }));
    }
    pods.sort_by_key(|pod| (&pod.namespace, &pod.name));
    let wide = format == Format::Wide;
    let mut out = String::new();
    head(status, &mut out)?;
    let mut header =
        vec!["NAMESPACE", "NAME", "STATE", "REASON", "OVERRIDE", "IPS", "KERNEL", "COUNTERS"];
    if wide {
        header.extend(["SINCE", "UID", "NETNS", "SETTINGS"]);
    }
    out.push_str(&table(&header, pods.iter().map(|pod| row(pod, wide))));
    for pod in &pods {
        let said = status.no_proxy_since.is_some().then_some(NO_PROXY);
        if let Some(message) = pod.message.as_ref().filter(|message| Some(message.as_str()) != said)
        {
            writeln!(out, "{}/{}: {}", pod.namespace, pod.name, printable(message))?;
        }
    }
    for problem in &status.problems {
        writeln!(out, "problem: {}", printable(&problem.to_string()))?;
    }
    writeln!(out, "{}", summary(&status.pods))?;
    Ok(out)
}

/// What `status` prints as JSON; pods by namespace and name.
pub fn status_document(mut status: Status) -> Document<Status> {
    status.pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    Document::new("Status", status)
}

/// The node, and what holds for all of its pods.
fn head(status: &Status, out: &mut String) -> fmt::Result {
    writeln!(
        out,
        "node {}, redirect-agent {}, source {}, {}",
        status.node,
        status.version,
        printable(&status.source),
        proxies(status)
    )?;
    let before = no_proxy(status).into_iter().chain(status.mark_alone.clone());
    let after = waiting(status).into_iter().chain(status.pause.as_ref().map(paused));
    let overrides = status.overrides.iter().map(NodeOverride::to_string);
    for line in before.chain([status.probes.to_string()]).chain(after).chain(overrides) {
        writeln!(out, "{}", printable(&line))?;
    }
    Ok(())
}

/// How many proxies are connected.
pub(crate) fn proxies(status: &Status) -> String {
    match status.proxies {
        0 => "no proxy connected".to_owned(),
        1 => "1 proxy connected".to_owned(),
        n => format!("{n} proxies connected"),
    }
}

/// Since when no proxy is connected, and what that means.
pub(crate) fn no_proxy(status: &Status) -> Option<String> {
    let since = status.no_proxy_since?;
    Some(format!(
        "no proxy since {since}; new connections of pods in the mesh are refused; is ztunnel running on this \
         node?"
    ))
}

/// What the agent waits for, and what that means.
pub(crate) fn waiting(status: &Status) -> Option<String> {
    let waiting = status.waiting.as_ref()?;
    Some(format!("{waiting}; what is in the kernel stays in force"))
}

/// That the node is paused, until when, and why.
pub(crate) fn paused(pause: &Pause) -> String {
    let until = match pause.until {
        Some(until) => format!("until {until}"),
        None => "until `redirect-agent resume`".to_owned(),
    };
    let why = match &pause.reason {
        Some(reason) => format!(" ({reason})"),
        None => String::new(),
    };
    format!("PAUSED {until}{why}: every pod bypasses")
}

fn row(pod: &PodStatus, wide: bool) -> Vec<String> {
    let mut row = vec![
        pod.namespace.clone(),
        pod.name.clone(),
        pod.state.as_str().to_owned(),
        pod.reason.to_string(),
        pod.overridden.as_ref().map(overridden).unwrap_or_default(),
        pod.ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","),
        kernel(pod, wide),
        pod.counters
            .iter()
            .filter(|(_, value)| **value != 0)
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>()
            .join(" "),
    ];
    if wide {
        row.push(pod.since.map(|since| since.to_string()).unwrap_or_default());
        row.push(pod.uid.clone());
        row.push(pod.netns.map(|netns| netns.to_string()).unwrap_or_default());
        row.push(pod.traffic.as_ref().map(Traffic::to_string).unwrap_or_default());
    }
    row
}

/// What the kernel has for a pod: in a word, or of how many things how many. A pod on its way in or out lacks
/// nothing.
fn kernel(pod: &PodStatus, wide: bool) -> String {
    let Some(kernel) = &pod.kernel else { return "nothing".to_owned() };
    let (there, missing) = (kernel.present.len(), kernel.missing.len());
    let all = there + missing;
    let moves = matches!(pod.state, PodState::Enrolling | PodState::Leaving);
    match missing {
        _ if wide || moves => format!("{there}/{all}"),
        0 => "complete".to_owned(),
        1..=NAMED => format!("lacks {}", kernel.missing.join(", ")),
        _ => format!("lacks {missing} of {all}"),
    }
}

/// How many pods there are, how many in each state, and how many not where they should be.
pub fn summary(pods: &[PodStatus]) -> String {
    let mut states = BTreeMap::new();
    for pod in pods {
        *states.entry(pod.state.as_str()).or_insert(0_usize) += 1;
    }
    let states: Vec<String> =
        states.into_iter().map(|(state, count)| format!("{count} {state}")).collect();
    let total = match pods.len() {
        0 => return "no pods".to_owned(),
        1 => "1 pod".to_owned(),
        n => format!("{n} pods"),
    };
    let ready = match pods.iter().filter(|pod| !pod.state.is_ready()).count() {
        0 => "all ready".to_owned(),
        n => format!("{n} not ready"),
    };
    format!("{total}: {}; {ready}", states.join(", "))
}

fn overridden(found: &OverrideStatus) -> String {
    match found.until {
        Some(until) => format!("{} {} until {until}", found.mode, found.target),
        None => format!("{} {}", found.mode, found.target),
    }
}

/// A pod that is not as it was.
#[derive(Clone, Copy, Debug)]
pub struct PodChange<'a> {
    /// As it was; `None`: it is new.
    pub before: Option<&'a PodStatus>,
    /// As it is; `None`: it is gone.
    pub after: Option<&'a PodStatus>,
}

/// The pods that differ in more than their counters and times, by namespace and name.
pub fn changes<'a>(
    before: &'a BTreeMap<(String, String), PodStatus>,
    after: &'a BTreeMap<(String, String), PodStatus>,
) -> impl Iterator<Item = PodChange<'a>> {
    let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let pods = names.into_iter().map(|name| (before.get(name), after.get(name)));
    let uncounted =
        |pod: &PodStatus| PodStatus { counters: BTreeMap::new(), since: None, ..pod.clone() };
    pods.filter(move |(before, after)| before.map(uncounted) != after.map(uncounted))
        .map(|(before, after)| PodChange { before, after })
}

impl PodChange<'_> {
    /// The change in a line: for people, or as one JSON object.
    ///
    /// # Errors
    ///
    /// As for [`json`].
    pub fn line(&self, now: SystemTime, format: Format) -> anyhow::Result<String> {
        let time = humantime::format_rfc3339_seconds(now).to_string();
        let state = |pod: Option<&PodStatus>| pod.map(|pod| pod.state);
        let Some(pod) = self.after.or(self.before) else { return Ok(String::new()) };
        if format == Format::Json {
            let before = state(self.before);
            let line = serde_json::json!({"time": time, "before": before, "pod": self.after});
            return Ok(escaped(&line.to_string()) + "\n");
        }
        let name = format!("{}/{}", pod.namespace, pod.name);
        let Some(after) = self.after else { return Ok(format!("{time}   {name}   gone\n")) };
        let was = match state(self.before) {
            Some(before) if before != after.state => format!(", was {}", before.as_str()),
            _ => String::new(),
        };
        let mut line =
            format!("{time}   {name}   {} ({}){was}", after.state.as_str(), after.reason);
        let kernel = kernel(after, false);
        if after.kernel.as_ref().is_some_and(|kernel| !kernel.complete) {
            let _infallible = write!(line, ", {kernel}");
        }
        if let Some(message) = &after.message {
            let _infallible = write!(line, ": {}", printable(message));
        }
        Ok(line + "\n")
    }
}

/// One JSON document, with a newline at its end.
///
/// # Errors
///
/// When JSON cannot express `value`.
pub fn json(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(escaped(&serde_json::to_string_pretty(value)?) + "\n")
}

/// JSON without raw control characters: of those, serde_json leaves U+007F to U+009F, which terminals obey, too.
pub fn escaped(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}' => {
                let _infallible = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// A JSON document that is read by itself: with its version and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Document<T> {
    api_version: &'static str,
    kind: &'static str,
    #[serde(flatten)]
    content: T,
}

impl<T> Document<T> {
    /// A document of this kind.
    pub fn new(kind: &'static str, content: T) -> Self {
        Self { api_version: API_VERSION, kind, content }
    }
}

/// A table without lines, a row to a line, as `kubectl` prints them; an empty cell is a `-`.
pub fn table(header: &[impl AsRef<str>], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().map(AsRef::as_ref));
    for row in rows {
        table.add_row(row.into_iter().map(|cell| match printable(&cell) {
            cell if cell.is_empty() => "-".to_owned(),
            cell => cell,
        }));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    let mut out = String::new();
    for line in table.lines() {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Text from a manifest must not move the terminal's cursor, or begin a line of its own.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
