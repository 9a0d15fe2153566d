//! The commands that ask the running agent, or tell it something.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, builder::PossibleValuesParser};
use redirect_ebpf::abi::Counter;

use super::{namespace, time};
use crate::{
    control::DEFAULT_SOCKET,
    explain::To,
    membership::{DEFAULT_EXCLUDED_NAMESPACE, PodKey},
    output::{Format, TextFormat},
    overrides::Target,
    selector::LabelSelector,
    verdicts,
};

/// How to reach the agent.
#[derive(Clone, Debug, Args)]
pub struct ControlSocket {
    /// The agent's control socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub control_socket: PathBuf,
}

/// How long something lasts.
#[derive(Clone, Debug, Args)]
pub struct For {
    /// Ends by itself after this time: 90s, 10m, 2h 30m, 1day.
    #[arg(long = "for", value_name = "TIME", value_parser = whole_seconds)]
    pub duration: Option<Duration>,
}

fn whole_seconds(s: &str) -> Result<Duration, String> {
    let duration = time(s)?;
    if duration < Duration::from_secs(1) {
        return Err("it must be a second or more".to_owned());
    }
    Ok(duration)
}

/// What goes with every change.
#[derive(Clone, Debug, Args)]
pub struct Doing {
    /// Why, for the agent's log and the pods' Events.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Return when the pods are where they should be; fail when they are not by then [1m].
    #[arg(
        long,
        value_name = "TIME",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1m",
        value_parser = whole_seconds
    )]
    pub wait: Option<Duration>,
}

/// After the help of `enroll`.
pub(super) const ENROLL_HELP: &str = "\
Examples:
  redirect-agent enroll shop/cart
  redirect-agent enroll shop --for 10m

Holds on this node only, over a restart of the agent, until `auto` or the end of --for. A pod's own
override counts before that of its namespace. Pods on the node's network, finished pods, pods with a
sidecar and pods of excluded namespaces stay out all the same.";

/// After the help of `unenroll`.
pub(super) const UNENROLL_HELP: &str = "\
Examples:
  redirect-agent unenroll shop/cart
  redirect-agent unenroll shop --for 10m --reason \"INC-4711, mTLS off for a test\"
  redirect-agent unenroll shop/cart --wait

Holds on this node only, over a restart of the agent, until `auto` or the end of --for. A pod's own
override counts before that of its namespace.";

/// `enroll`, `unenroll`
#[derive(Debug, Args)]
pub struct OverrideArgs {
    /// For whom: NAMESPACE/POD, or NAMESPACE for all its pods.
    #[arg(value_name = "NAMESPACE[/POD]")]
    pub target: Target,
    /// See [`For`].
    #[command(flatten)]
    pub duration: For,
    /// See [`Doing`].
    #[command(flatten)]
    pub doing: Doing,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `auto`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent auto shop/cart
  redirect-agent auto shop

Takes back what was said for exactly that: `auto shop` leaves the override of shop/cart alone.")]
pub struct AutoArgs {
    /// For whom: NAMESPACE/POD, or NAMESPACE.
    #[arg(value_name = "NAMESPACE[/POD]")]
    pub target: Target,
    /// See [`Doing`].
    #[command(flatten)]
    pub doing: Doing,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `pause`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent pause
  redirect-agent pause --for 5m --wait=30s

Every pod of the node leaves the mesh as if its label were removed. Holds over a restart of the agent.")]
pub struct PauseArgs {
    /// See [`For`].
    #[command(flatten)]
    pub duration: For,
    /// See [`Doing`].
    #[command(flatten)]
    pub doing: Doing,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `log-level`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent log-level
  redirect-agent log-level debug --for 10m
  redirect-agent log-level info,redirect_agent::zds=debug
  redirect-agent log-level --reset

Until the agent ends, or until the end of --for. The environment variable RUST_LOG says what an agent
logs from its start (`logging.level` of the Helm chart).")]
pub struct LogLevelArgs {
    /// error, warn, info, debug, trace, or MODULE=LEVEL, several of them separated by commas. Without it, prints
    /// what is logged.
    #[arg(value_name = "FILTER", conflicts_with = "reset")]
    pub filter: Option<String>,
    /// Logs again what RUST_LOG says.
    #[arg(long)]
    pub reset: bool,
    /// Ends by itself after this time: 90s, 10m.
    #[arg(long = "for", value_name = "TIME", value_parser = whole_seconds, requires = "filter")]
    pub duration: Option<Duration>,
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: TextFormat,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `resume`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent resume")]
pub struct ResumeArgs {
    /// See [`Doing`].
    #[command(flatten)]
    pub doing: Doing,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `status`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent status
  redirect-agent status shop bank/vault -o wide
  redirect-agent status -l app=cart --watch
  redirect-agent status --not-ready --exit-code
  redirect-agent status -o json | jq '.pods[] | select(.state == \"failed\")'

A pod is ready when it is where it should be: enrolled, or bypassing. With --exit-code the exit
status is 1 when one of the pods is not ready, whether or not it is shown.")]
pub struct StatusArgs {
    /// Which pods: NAMESPACE/POD, or NAMESPACE for all its pods; every pod of the node by default.
    #[arg(value_name = "NAMESPACE[/POD]")]
    pub targets: Vec<Target>,
    /// Only pods whose labels match: app=cart, app!=cart, app in (a,b), app, !app; several are joined by
    /// commas.
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    pub selector: Option<LabelSelector>,
    /// Show only pods that are not ready.
    #[arg(long)]
    pub not_ready: bool,
    /// Go on, and print a line whenever a pod changes.
    #[arg(short, long)]
    pub watch: bool,
    /// Fail when a pod is not ready.
    #[arg(long, conflicts_with = "watch")]
    pub exit_code: bool,
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `explain`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent explain shop/cart
  redirect-agent explain shop/web shop/cart:8080
  redirect-agent explain shop/web 10.0.0.7:5432 -o json
  redirect-agent explain shop/cart --file manifests.yaml

Says rule by rule why the pod is in the mesh or not, what the kernel and the proxy have for it,
where its application listens, how a call goes, and who has to act when it fails: the
configuration, the redirector, the proxy, the application or the network. The agent asks its source
for 20 s at most: what is not known by then is not looked at. The exit status is 0 when the pod is
known; with --exit-code, only when nothing wrong was found, too.")]
pub struct ExplainArgs {
    /// The pod, or the one that calls.
    #[arg(value_name = "NAMESPACE/POD")]
    pub pod: PodKey,
    /// What it calls: a pod, a Service (cart.shop.svc, too), or an address, with a port where that matters.
    #[arg(value_name = "NAMESPACE/NAME[:PORT]|ADDRESS[:PORT]", conflicts_with = "file")]
    pub to: Option<To>,
    /// Ask these manifests, a file or a directory, and no agent: what will be decided for the pod, or for
    /// those of a Deployment of that name.
    #[arg(short, long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Namespaces that are never in the mesh, for --file.
    #[arg(
        long,
        value_name = "NAMESPACE,…",
        value_delimiter = ',',
        default_value = DEFAULT_EXCLUDED_NAMESPACE,
        value_parser = namespace
    )]
    pub excluded_namespaces: Vec<String>,
    /// Fail when something wrong was found.
    #[arg(long)]
    pub exit_code: bool,
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: TextFormat,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `observe`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent observe
  redirect-agent observe shop/web --to shop/cart --port 8080
  redirect-agent observe --refused --for 1m
  redirect-agent observe shop -o json --limit 100

A line for each connection, and for each packet that is refused or dropped: what `status` and the
metrics count. Packets of open connections are not shown. The datapath reports verdicts only
while somebody observes. When there are too many at once, some are dropped, and a line says how
many.")]
pub struct ObserveArgs {
    /// Only in these pods: NAMESPACE/POD, or NAMESPACE for all its pods.
    #[arg(value_name = "NAMESPACE[/POD]")]
    pub targets: Vec<Target>,
    /// Only packets to there: an address, a CIDR, or NAMESPACE[/POD] on this node.
    #[arg(long, value_name = "WHERE")]
    pub to: Option<verdicts::To>,
    /// Only packets to this port.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Only these verdicts; may be repeated.
    #[arg(long, value_name = "NAME", hide_possible_values = true, value_parser = verdict_names())]
    pub verdict: Vec<String>,
    /// Only what is refused or dropped.
    #[arg(long)]
    pub refused: bool,
    /// See [`For`].
    #[command(flatten)]
    pub duration: For,
    /// Ends after so many lines.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// How to print it: json is an object to a line.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: TextFormat,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `verify`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent verify shop/cart
  redirect-agent verify shop/cart --to 10.0.0.7:5432
  redirect-agent verify shop/cart -o json > cart.json
  redirect-agent verify --all

The agent opens a connection in the pod, in each family that it has, to an address that nobody has
(192.0.2.1 and 2001:db8::1, port 9), and one from the node to a port on which the application
listens, and says what the datapath did with them. They carry no data and are closed at once.

Results:
  captured      handed to the proxy, every one that could be made
  excluded      left alone, because settings say so
  bypassing     nothing of the agent saw it; the pod is not to be in the mesh
  refused       refused or dropped: it did not get past the proxy, nor to it
  not-captured  it should have been handed to the proxy, and was not
  partial       some captured or excluded, and others unknown
  unknown       cannot be told: no verdict, and nothing that shows where it went

The exit status is 0 for a pod that is to be in the mesh and is captured or excluded, and for one
that is not to be in the mesh and bypasses; otherwise it is 1. A connection to an application
that does not listen in that family cannot be made and does not count. The application may see a
connection that ends without data, as from a TCP probe; the proxy logs each connection.")]
pub struct VerifyArgs {
    /// The pod.
    #[arg(value_name = "NAMESPACE/POD", required_unless_present = "all", conflicts_with = "all")]
    pub pod: Option<PodKey>,
    /// Every pod of this node that is to be in the mesh.
    #[arg(long)]
    pub all: bool,
    /// What the pod connects to, instead of an address that nobody has.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "all", value_parser = endpoint)]
    pub to: Option<SocketAddr>,
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: TextFormat,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

fn endpoint(s: &str) -> Result<SocketAddr, String> {
    match s.parse::<SocketAddr>() {
        Ok(at) if at.port() > 0 => Ok(SocketAddr::new(at.ip().to_canonical(), at.port())),
        _ => Err("give an address and a port, like 10.0.0.7:5432 or [fd00::7]:5432".to_owned()),
    }
}

fn verdict_names() -> PossibleValuesParser {
    PossibleValuesParser::new(Counter::ALL.map(|(_, name)| name))
}
