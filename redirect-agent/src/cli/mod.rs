//! The command line: every command with its options, its help and its examples.

mod bundle;
mod cluster;
mod control;
mod dirs;
mod flags;

use std::{env, ffi::OsString, net::IpAddr, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Result, anyhow};
use clap::{
    ArgAction, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
};
use clap_complete::Shell;
use ipnet::IpNet;

pub use self::{
    bundle::BundleArgs,
    cluster::{ClusterArgs, Plugin},
    control::{
        AutoArgs, ControlSocket, Doing, ExplainArgs, For, LogLevelArgs, ObserveArgs, OverrideArgs,
        PauseArgs, ResumeArgs, StatusArgs, VerifyArgs,
    },
    dirs::{BpffsDir, CniDirs, NodeDirs, PodDirs},
    flags::{Flag, Flags, Origin},
};
use crate::{
    cni::{self, entry::DaemonSet},
    enablement::Selectors,
    health,
    membership::{DEFAULT_EXCLUDED_NAMESPACE, NameError, check_namespace_name},
    output::Format,
    page::Audience,
    probes,
    traffic::{Ports, Selection, Selections, parse_range},
};

/// Puts pods of this node into the ambient mesh, with eBPF inside the pods and no iptables.
#[derive(Debug, Parser)]
#[command(
    name = "redirect-agent",
    version,
    propagate_version = true,
    after_long_help = "\
Examples:
  redirect-agent check
  redirect-agent run
  redirect-agent status
  redirect-agent explain shop/web shop/cart:8080
  redirect-agent unenroll shop/cart --for 10m
  redirect-agent cluster

The commands that change something are harmless when they are repeated. The exit status is 0 for
success, 1 for failure, and 2 for a command line that cannot be understood."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the agent of this node.
    Run(Box<RunArgs>),
    /// Redirects one network namespace, without an agent.
    Attach(AttachArgs),
    /// Puts one network namespace back to how it was before `attach`.
    Detach(DetachArgs),
    /// Puts pods into the mesh on this node, whatever their labels say.
    #[command(after_long_help = control::ENROLL_HELP)]
    Enroll(OverrideArgs),
    /// Takes pods out of the mesh on this node, whatever their labels say.
    #[command(after_long_help = control::UNENROLL_HELP)]
    Unenroll(OverrideArgs),
    /// Takes `enroll` or `unenroll` back: the labels decide again.
    Auto(AutoArgs),
    /// Lets every pod of this node bypass the mesh.
    Pause(PauseArgs),
    /// Ends `pause`.
    Resume(ResumeArgs),
    /// Shows every pod of this node: in the mesh or not, why, and what the kernel has for it.
    Status(StatusArgs),
    /// Says why a pod is in the mesh or not, how a call goes, and who has to act when it fails.
    Explain(ExplainArgs),
    /// Shows the datapath's verdicts as it makes them, connection by connection.
    Observe(ObserveArgs),
    /// Shows the maps that the agent has pinned, how full they are, and how to read them with bpftool.
    Maps(MapsArgs),
    /// Shows the pods of the whole cluster that should be in the mesh and are not, since when, and why.
    Cluster(Box<ClusterArgs>),
    /// Proves by real calls of a pod, and to it, that the datapath captures them.
    Verify(VerifyArgs),
    /// Shows what the running agent logs, or changes it.
    LogLevel(LogLevelArgs),
    /// Collects what a bug report about this node needs, in one archive.
    Bundle(Box<BundleArgs>),
    /// Says whether this node can run the agent.
    Check(CheckArgs),
    /// Puts every pod of this node back and removes all that the agent keeps in the kernel, and its CNI
    /// plugin.
    Cleanup(CleanupArgs),
    /// Removes istio-cni's rules from the pods of this node that the agent redirects.
    Takeover(TakeoverArgs),
    /// Prints completions for a shell.
    Completions(CompletionsArgs),
}

/// Where pods and namespaces come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// `kube`: the cluster's API server.
    Kube,
    /// `dir:PATH`: a directory of manifests.
    Dir(PathBuf),
}

impl Command {
    /// What this process was called for: a command, or, as kubectl's plugin, `cluster`. Ends the process when
    /// the command line asks for help, or cannot be understood.
    pub fn of_process() -> Self {
        if Plugin::is_called() {
            return Self::Cluster(Box::new(Plugin::of_process().cluster));
        }
        Self::read(env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// What a command line asks for.
    ///
    /// # Errors
    ///
    /// When it asks for help, or cannot be understood.
    pub fn read(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut cli = Cli::command();
        let matches = cli.try_get_matches_from_mut(line)?;
        let read = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut cli))?;
        let mut command = read.command;
        if let (Self::Run(args), Some(of_run)) = (&mut command, matches.subcommand_matches("run")) {
            args.flags = Flags::of_run(of_run);
        }
        Ok(command)
    }

    /// The exit status when the command fails: of `cluster`, 1 is an answer.
    pub fn failure(&self) -> u8 {
        if matches!(self, Self::Cluster(_)) { 2 } else { 1 }
    }
}

impl FromStr for SourceSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<SourceSpec, String> {
        match s.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(SourceSpec::Dir(path.into())),
            None if s == "kube" => Ok(SourceSpec::Kube),
            _ => Err(
                "a source is kube, the cluster, or dir:PATH, a directory of Kubernetes manifests"
                    .to_owned(),
            ),
        }
    }
}

/// How to write the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object to a line.
    Json,
}

/// Whether to go ahead beside an agent.
#[derive(Debug, Args)]
pub struct Force {
    /// Goes ahead although another process uses the directory, such as an agent that hangs: they may undo
    /// each other's work.
    #[arg(long)]
    pub force: bool,
}

fn time(s: &str) -> Result<Duration, String> {
    humantime::parse_duration(s).map_err(|error| {
        format!("give numbers and units, such as 90s, 10m, 2h 30m or 1day ({error})")
    })
}

fn interval(s: &str) -> Result<Duration, String> {
    let interval = time(s)?;
    if interval < Duration::from_millis(100) {
        return Err("it must be 100ms or more".to_owned());
    }
    Ok(interval)
}

fn namespace(s: &str) -> Result<String, NameError> {
    check_namespace_name(s)?;
    Ok(s.to_owned())
}

/// What is redirected of the traffic of a pod.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Traffic")]
pub struct TrafficArgs {
    /// Redirect only calls to these ranges.
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', value_parser = parse_range)]
    pub include_outbound_ip_ranges: Option<Vec<IpNet>>,
    /// Do not redirect calls to these ranges.
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', value_parser = parse_range)]
    pub exclude_outbound_ip_ranges: Vec<IpNet>,
    /// Redirect only calls to these ports.
    #[arg(long, value_name = "PORTS,…", value_delimiter = ',')]
    pub include_outbound_ports: Option<Vec<Ports>>,
    /// Do not redirect calls to these ports: 3306, or 8000-8010.
    #[arg(long, value_name = "PORTS,…", value_delimiter = ',')]
    pub exclude_outbound_ports: Vec<Ports>,
    /// Redirect only calls of others to these ports.
    #[arg(long, value_name = "PORTS,…", value_delimiter = ',')]
    pub include_inbound_ports: Option<Vec<Ports>>,
    /// Do not redirect calls of others to these ports.
    #[arg(long, value_name = "PORTS,…", value_delimiter = ',')]
    pub exclude_inbound_ports: Vec<Ports>,
    /// Redirect only calls that come from these ranges.
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', value_parser = parse_range)]
    pub include_inbound_source_ip_ranges: Option<Vec<IpNet>>,
    /// Do not redirect calls that come from these ranges.
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', value_parser = parse_range)]
    pub exclude_inbound_source_ip_ranges: Vec<IpNet>,
    /// Redirect DNS, UDP and TCP to port 53, to the proxy's DNS.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set,
        env = "AMBIENT_DNS_CAPTURE",
        hide_env_values = true
    )]
    pub dns_capture: bool,
}

impl TrafficArgs {
    /// What they select.
    ///
    /// # Errors
    ///
    /// When a list is too long.
    pub fn selections(&self) -> Result<Selections> {
        let selections = Selections {
            outbound_ranges: Selection::new(
                self.include_outbound_ip_ranges.as_deref(),
                &self.exclude_outbound_ip_ranges,
            ),
            outbound_ports: Selection::new(
                self.include_outbound_ports.as_deref(),
                &self.exclude_outbound_ports,
            ),
            inbound_ports: Selection::new(
                self.include_inbound_ports.as_deref(),
                &self.exclude_inbound_ports,
            ),
            inbound_sources: Selection::new(
                self.include_inbound_source_ip_ranges.as_deref(),
                &self.exclude_inbound_source_ip_ranges,
            ),
        };
        selections.check().map_err(|why| anyhow!("read the flags: {why}"))?;
        Ok(selections)
    }
}

/// What is taken for kubelet's probes: it reaches the application past the proxy.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Probes")]
pub struct ProbeArgs {
    /// Let kubelet's own connections to pods past the proxy; they are told by its cgroup.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub kubelet_probes: bool,
    /// Let connections from these ranges past the proxy while kubelet is not found.
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',', value_parser = parse_range)]
    pub probe_sources: Vec<IpNet>,
    /// Let connections from where istio-cni makes probes come from past the proxy: 169.254.7.127 and
    /// fd16:9254:7127:1337:ffff:ffff:ffff:ffff. For as long as nodes are migrated.
    #[arg(long)]
    pub istio_probe_addresses: bool,
}

impl ProbeArgs {
    /// The same for [`probes::Probes`].
    pub fn settings(self) -> probes::Settings {
        probes::Settings {
            kubelet: self.kubelet_probes,
            sources: self.probe_sources,
            istio: self.istio_probe_addresses,
        }
    }
}

fn selectors(s: &str) -> Result<Selectors, String> {
    Selectors::read(s).map_err(|error| format!("{error:#}"))
}

/// `run`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent run
  redirect-agent run --kubeconfig /etc/kubernetes/redirect-agent.conf --node-name n1
  redirect-agent run --source dir:manifests --node-name n1 --log-format json

Stopping the agent changes nothing for the pods' traffic: what it set up stays in the kernel, and the
next one takes it over. `redirect-agent cleanup` puts everything back.")]
pub struct RunArgs {
    /// Where pods and namespaces come from: kube, the cluster, or dir:PATH, a directory of
    /// Kubernetes manifests.
    #[arg(long, value_name = "SOURCE", default_value = "kube")]
    pub source: SourceSpec,
    /// How to reach the cluster's API server; by default as $KUBECONFIG or ~/.kube/config say, or,
    /// in a pod, by its service account.
    #[arg(long, value_name = "PATH")]
    pub kubeconfig: Option<PathBuf>,
    /// This node's name, as in the pods' spec.nodeName; the host's name by default.
    #[arg(long, value_name = "NAME", env = "NODE_NAME", hide_env_values = true)]
    pub node_name: Option<String>,
    /// See [`PodDirs`].
    #[command(flatten)]
    pub pods: PodDirs,
    /// See [`BpffsDir`].
    #[command(flatten)]
    pub bpffs: BpffsDir,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
    /// Where the proxy connects to hear of pods (ZDS).
    #[arg(long, value_name = "PATH", default_value = "/var/run/ztunnel/ztunnel.sock")]
    pub zds_socket: PathBuf,
    /// Where the CNI plugin, ours or istio-cni's, asks whether a pod may start.
    #[arg(long, value_name = "PATH", default_value = cni::request::DEFAULT_SOCKET)]
    pub cni_socket: PathBuf,
    /// How long the CNI plugin waits at most until a pod is in the mesh; then the pod's start fails,
    /// and kubelet tries again.
    #[arg(long, value_name = "TIME", default_value = "25s", value_parser = interval)]
    pub cni_timeout: Duration,
    /// Namespaces whose pods are never in the mesh, separated by commas.
    #[arg(
        long,
        value_name = "NAMESPACE,…",
        value_delimiter = ',',
        default_value = DEFAULT_EXCLUDED_NAMESPACE,
        value_parser = namespace,
        env = "EXCLUDE_NAMESPACES",
        hide_env_values = true
    )]
    pub excluded_namespaces: Vec<String>,
    /// Read the sidecar's annotations for traffic, where ours are absent and mean the same.
    #[arg(long)]
    pub sidecar_annotations: bool,
    /// What puts pods into the mesh in place of the label istio.io/dataplane-mode: istio-cni's
    /// ambient.enablementSelectors, as YAML or as @FILE.
    #[arg(
        long,
        value_name = "YAML|@FILE",
        value_parser = selectors,
        env = "AMBIENT_ENABLEMENT_SELECTOR",
        hide_env_values = true
    )]
    pub enablement_selectors: Option<Selectors>,
    /// For how long new connections wait for a proxy that has stopped listening.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = time)]
    pub proxy_grace: Duration,
    /// How long a pod that leaves the mesh keeps its redirected connections at most.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    pub drain: Duration,
    /// How often the kernel is compared with what should be there, and repaired.
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = interval)]
    pub verify_interval: Duration,
    /// Redirect pods that istio-cni redirects, too: ours decide, until `takeover` removes istio-cni's
    /// rules. Without it such pods are left alone. istio-cni must not run on this node any more.
    #[arg(long)]
    pub beside_istio_cni: bool,
    /// Where to serve /healthz, /readyz and /metrics over HTTP: ADDRESS:PORT, or `off`.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15014")]
    pub health_address: health::Address,
    /// Serve a status page for browsers at / of the health address: to whoever connects over loopback, such
    /// as kubectl port-forward (`local`, also without a value), or to everybody (`all`).
    #[arg(
        long,
        value_name = "WHO",
        default_value_t = Audience::Off,
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "local"
    )]
    pub page: Audience,
    /// Install the CNI plugin, which holds a pod's start until the pod is in the mesh, or out of it, and
    /// keep it installed.
    #[arg(long)]
    pub install_cni: bool,
    /// See [`CniDirs`].
    #[command(flatten)]
    pub cni: CniDirs,
    /// The DaemonSet that runs the agent: its pods start without the agent, and an agent that ends
    /// because it was deleted puts everything back.
    #[arg(long, value_name = "NAMESPACE/NAME", env = "DAEMONSET", hide_env_values = true)]
    pub daemonset: Option<DaemonSet>,
    /// How to write the log.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// See [`TrafficArgs`].
    #[command(flatten)]
    pub traffic: TrafficArgs,
    /// See [`ProbeArgs`].
    #[command(flatten)]
    pub probes: ProbeArgs,
    /// All of them, as they were read.
    #[arg(skip)]
    pub flags: Flags,
}

/// `attach`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent attach --netns /var/run/netns/shop_cart
  redirect-agent attach --netns /proc/self/ns/net --address 10.0.0.2 --address fd00::2

What it sets up outlives the command. There has to be a proxy that listens in the namespace, else new
connections are refused.")]
pub struct AttachArgs {
    /// The network namespace.
    #[arg(long, value_name = "PATH")]
    pub netns: PathBuf,
    /// An address of the pod; all global ones of the namespace by default.
    #[arg(long, value_name = "IP")]
    pub address: Vec<IpAddr>,
    /// See [`BpffsDir`].
    #[command(flatten)]
    pub bpffs: BpffsDir,
    /// See [`Force`].
    #[command(flatten)]
    pub force: Force,
    /// See [`TrafficArgs`].
    #[command(flatten)]
    pub traffic: TrafficArgs,
}

/// `detach`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent detach --netns /var/run/netns/shop_cart")]
pub struct DetachArgs {
    /// The network namespace.
    #[arg(long, value_name = "PATH")]
    pub netns: PathBuf,
    /// See [`BpffsDir`].
    #[command(flatten)]
    pub bpffs: BpffsDir,
    /// See [`Force`].
    #[command(flatten)]
    pub force: Force,
}

/// `check`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent check
  redirect-agent check -o json

Tries what the agent does in a network namespace of its own, and changes nothing. The exit status is 0
when nothing that is needed is missing; what cannot be told counts as there.")]
pub struct CheckArgs {
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
    /// See [`CniDirs`].
    #[command(flatten)]
    pub cni: CniDirs,
    /// See [`BpffsDir`].
    #[command(flatten)]
    pub bpffs: BpffsDir,
}

/// `maps`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent maps
  redirect-agent maps -o json

Needs no running agent. ARCHITECTURE.md says what is in each map; links are pinned in the directory
`links` beside the maps: bpftool link show pinned DIR/links/POD_ID/lookup.")]
pub struct MapsArgs {
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
    /// See [`BpffsDir`].
    #[command(flatten)]
    pub bpffs: BpffsDir,
}

/// `cleanup`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent cleanup

For when the agent is to leave this node: stop it first. The overrides, and what the CNI plugin has
reported of pods, go, too. Doing it twice is harmless.")]
pub struct CleanupArgs {
    /// See [`NodeDirs`].
    #[command(flatten)]
    pub dirs: NodeDirs,
    /// See [`Force`].
    #[command(flatten)]
    pub force: Force,
}

/// `takeover`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent takeover --dry-run
  redirect-agent takeover
  redirect-agent takeover -o json

Run the agent with --beside-istio-cni first: its pods are then redirected by both, and ours decide. No
connection fails, and those that are open go on. Doing it again completes what was interrupted, and
removes what connections needed that have ended since.")]
pub struct TakeoverArgs {
    /// Only says what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// How to print it.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
    /// See [`PodDirs`].
    #[command(flatten)]
    pub pods: PodDirs,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}

/// `completions`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent completions bash > /etc/bash_completion.d/redirect-agent")]
pub struct CompletionsArgs {
    /// Which shell.
    pub shell: Shell,
}

impl CompletionsArgs {
    /// The completions, as the shell reads them.
    pub fn generate(&self) -> Vec<u8> {
        let mut out = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "redirect-agent", &mut out);
        if self.shell == Shell::Bash {
            // The labels of its commands do not match what it looks for when the program's name has a hyphen.
            // Source: clap-rs/clap#6421.
            let script = String::from_utf8_lossy(&out);
            return script.replace("redirect__subcmd__agent", "redirect__agent").into_bytes();
        }
        out
    }
}
