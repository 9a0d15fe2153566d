//! Why a pod is in the mesh or not, which way a call takes, and what is at fault when it fails.
//!
//! Everything that is known is gathered ([`gather`], from the running agent; [`file`], from manifests alone)
//! into one document, [`Explanation`]. [`verdict`] judges it, with pure functions.

mod decision;
pub mod file;
pub mod gather;
pub mod listeners;
mod print;
mod service;
#[cfg(test)]
mod tests;
mod verdict;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

pub use self::print::text;
pub(crate) use self::verdict::application_listens;
use crate::{
    dataplane::PartKind,
    journal::Entry,
    membership::{PodKey, Reason},
    output::PodState,
    overrides::Moment,
    source::Whom,
    traffic::{Origin, Traffic},
    words::UnknownWord,
    zds::Answer,
};

/// How long the agent asks the source, and waits for its turn, before it explains with what it knows; of a
/// Service, however many endpoints it has. Whoever asks the agent has to wait a moment longer.
pub const WITHIN: Duration = Duration::from_secs(20);

/// The version of the document's shape.
pub const API_VERSION: &str = "redirect-agent/v1";

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The pod, or the one that calls.
    pub pod: PodKey,
    /// What it calls.
    #[serde(default)]
    pub to: Option<To>,
}

/// What is called: `NAMESPACE/NAME[:PORT]` of a pod or a Service, `NAME.NAMESPACE.svc[.DOMAIN][:PORT]` of a
/// Service, `10.0.0.2[:PORT]`, `fd00::2`, `[fd00::2]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct To {
    /// The pod, the Service, or the address.
    pub whom: Whom,
    /// The port, where one is named.
    pub port: Option<u16>,
}

impl FromStr for To {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if let Ok(ip) = s.parse::<IpAddr>() {
            return Ok(Self { whom: Whom::At(ip.to_canonical()), port: None });
        }
        if let Ok(at) = s.parse::<SocketAddr>() {
            let port = Some(at.port()).filter(|port| *port != 0).ok_or_else(|| no_port(s))?;
            return Ok(Self { whom: Whom::At(at.ip().to_canonical()), port: Some(port) });
        }
        let (name, port) = match s.split_once(':') {
            Some((name, port)) => {
                let port = port.parse().ok().filter(|port| *port != 0);
                (name, Some(port.ok_or_else(|| no_port(s))?))
            }
            None => (s, None),
        };
        if let Some(key) = service_of_host(name) {
            return Ok(Self { whom: Whom::Service(key), port });
        }
        let key = name.parse().map_err(|_| {
            format!(
                "{s:?} is none of NAMESPACE/POD[:PORT], NAMESPACE/SERVICE[:PORT], a host name like \
                 cart.shop.svc:80, and an address like 10.0.0.2:80 or [fd00::2]:80"
            )
        })?;
        Ok(Self { whom: Whom::Named(key), port })
    }
}

fn no_port(s: &str) -> String {
    format!("{s:?} has no port from 1 to 65535")
}

/// The Service that has this name in the cluster's DNS: `cart.shop.svc`, `cart.shop.svc.cluster.local`.
fn service_of_host(host: &str) -> Option<PodKey> {
    let mut labels = host.trim_end_matches('.').split('.');
    let (name, namespace) = (labels.next()?, labels.next()?);
    (labels.next() == Some("svc")).then(|| PodKey::new(namespace, name).ok()).flatten()
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.whom, self.port) {
            (Whom::Named(key), None) => key.fmt(f),
            (Whom::Named(key), Some(port)) => write!(f, "{key}:{port}"),
            (Whom::Service(key), None) => write!(f, "{}.{}.svc", key.name, key.namespace),
            (Whom::Service(key), Some(port)) => {
                write!(f, "{}.{}.svc:{port}", key.name, key.namespace)
            }
            (Whom::At(ip), None) => ip.fmt(f),
            (Whom::At(ip), Some(port)) => SocketAddr::new(*ip, port).fmt(f),
        }
    }
}

crate::text::by_text!(To);

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// [`API_VERSION`].
    pub api_version: String,
    /// `Explanation`.
    pub kind: String,
    /// When this was so.
    pub time: Moment,
    /// The node that was asked.
    pub node: NodePart,
    /// The pod, or the one that calls.
    pub pod: PodPart,
    /// What is called.
    pub to: Option<Destination>,
    /// How the call goes.
    pub path: Option<Path>,
    /// What was found, the most likely cause first.
    pub findings: Vec<Finding>,
    /// The first of them.
    pub verdict: Finding,
}

/// The node, as far as it matters to each of its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePart {
    /// Its name; empty where only manifests were read.
    pub name: String,
    /// Where pods come from.
    pub source: String,
    /// How many proxies are connected; `None`: nobody was asked.
    pub proxies: Option<usize>,
    /// Since when none is, while none is.
    pub no_proxy_since: Option<Moment>,
    /// What the last one did; `None`: none was ever connected since the agent started.
    pub last_proxy: Option<String>,
    /// Namespaces whose label asks for the mesh.
    #[serde(skip)]
    pub mesh_namespaces: Vec<String>,
    /// Whether the pod's namespace, whose labels may decide, is in none of the manifests.
    #[serde(skip)]
    pub lacks_namespace: bool,
}

/// What is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// As it was asked for.
    pub asked: To,
    /// The Service, if it is one.
    pub service: Option<ServicePart>,
    /// Why it is unknown whether there is a Service, if it is.
    pub service_unknown: Option<String>,
    /// The pod, unless it is an address that no pod has. Of a Service, the endpoint that is worst off.
    pub pod: Option<PodPart>,
}

impl Destination {
    /// Where the caller's packets are addressed to, as far as is known.
    pub(crate) fn dialed(&self) -> (Option<IpAddr>, Option<u16>) {
        let first = |ips: &[IpAddr]| ips.first().copied();
        let ip = match (&self.asked.whom, &self.service) {
            (Whom::At(ip), _) => Some(*ip),
            (_, Some(service)) if !service.ips.is_empty() => first(&service.ips),
            _ => self.pod.as_ref().and_then(|pod| first(&pod.ips)),
        };
        (ip, self.asked.port)
    }

    /// Where they arrive: of a Service, at this endpoint.
    pub(crate) fn arrives_at(
        &self,
        endpoint: Option<&EndpointPart>,
    ) -> (Option<IpAddr>, Option<u16>) {
        match (&self.service, &self.asked.whom) {
            (Some(_), _) => match endpoint {
                Some(endpoint) => (Some(endpoint.ip), endpoint.port),
                None => (None, None),
            },
            (None, Whom::At(ip)) => (Some(*ip), self.asked.port),
            (None, _) => (None, self.asked.port),
        }
    }
}

/// A Service that is called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePart {
    /// `NAMESPACE/NAME`.
    pub name: String,
    /// Its cluster IPs; a headless Service has none.
    pub ips: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<u16>,
    /// The waypoint that its labels, or its namespace's, name.
    pub waypoint: Option<Waypoint>,
    /// The pods behind it.
    pub endpoints: Vec<EndpointPart>,
}

/// A pod behind a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointPart {
    /// The pod, if it is one.
    pub pod: Option<String>,
    /// Its address.
    pub ip: IpAddr,
    /// The port that the asked port of the Service leads to; `None`: it cannot be told.
    pub port: Option<u16>,
    /// Whether it gets new connections.
    pub ready: bool,
    /// What is wrong when it is called; `None`: it was not looked at.
    pub verdict: Option<Cause>,
    /// Whether it is the one that is explained in full.
    pub chosen: bool,
}

/// Where a pod is known from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// It is on this node.
    Here,
    /// It is on another node: only what the source says is known.
    OtherNode,
    /// It is in a manifest.
    Manifest,
    /// It is on this node and left out, because another pod has what it has.
    LeftOut,
    /// It is not known.
    #[default]
    Unknown,
}

/// What there is to know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodPart {
    /// `NAMESPACE/NAME`.
    pub name: String,
    /// Where it is known from.
    pub place: Place,
    /// Its node.
    pub node: Option<String>,
    /// Its uid.
    pub uid: Option<String>,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Whether it is in the mesh, and why.
    pub decision: Option<DecisionPart>,
    /// Its annotations that are read for its traffic.
    pub settings: Vec<Origin>,
    /// What of its traffic is redirected, where that is not everything.
    pub traffic: Option<Traffic>,
    /// Where it is.
    pub state: Option<PodState>,
    /// Why it is not where it should be.
    pub message: Option<String>,
    /// What the kernel has for it.
    pub kernel: Option<KernelPart>,
    /// What the proxy says to it.
    pub proxy: Option<Answer>,
    /// Addresses of its that no interface of it has.
    pub missing_addresses: Vec<IpAddr>,
    /// Where its application listens; `None`: it could not be looked at.
    pub listens: Option<Vec<SocketAddr>>,
    /// The annotation `ambient.istio.io/redirection`, by which its peers choose HBONE.
    pub redirection: Option<String>,
    /// The waypoint that its labels name.
    pub waypoint: Option<Waypoint>,
    /// Its counters that are not 0.
    pub counters: BTreeMap<String, u64>,
    /// What is misspelled on it, or on its namespace.
    pub unknown_words: Vec<UnknownWord>,
    /// What it has that another pod has, too.
    pub conflicts: Vec<String>,
    /// What happened to it lately.
    pub history: Vec<Entry>,
    /// Pods of that name in other namespaces, where there is none of it in this one.
    pub elsewhere: Vec<String>,
}

/// Why a connection of a pod bypasses its proxy, although the pod is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bypass {
    /// It stays in the pod.
    InPod,
    /// Its destination is link-local, in fe80::/10.
    LinkLocal,
    /// Settings exclude it.
    Settings,
}

impl PodPart {
    /// Why a connection to this address, and this port if it is known, bypasses the pod's proxy, if it does.
    pub(crate) fn bypass_to(&self, ip: IpAddr, port: Option<u16>) -> Option<Bypass> {
        if ip.is_loopback() || self.ips.contains(&ip) {
            return Some(Bypass::InPod);
        }
        if matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            return Some(Bypass::LinkLocal);
        }
        let excludes = |traffic: &Traffic| !traffic.redirects_call_to(ip, port);
        self.traffic.as_ref().is_some_and(excludes).then_some(Bypass::Settings)
    }
}

/// Whether a pod is in the mesh, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DecisionPart {
    /// Whether it is to be in the mesh.
    pub enrolled: bool,
    /// Why.
    pub reason: Reason,
    /// Rule by rule; the last that decides counts.
    pub rules: Vec<Rule>,
}

/// One rule of the decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// What was looked at: `pod shop/cart`, `namespace shop`, `node`.
    pub object: String,
    /// What of it: `label istio.io/dataplane-mode`.
    pub asks: String,
    /// What was found.
    pub found: Option<String>,
    /// `in`, `out`, or nothing.
    pub decides: Option<String>,
}

/// What the kernel has for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KernelPart {
    /// The inode number of its network namespace.
    pub netns: u32,
    /// Whether its new connections are redirected.
    pub captured: bool,
    /// What is there.
    pub present: Vec<String>,
    /// What should be there and is not.
    pub missing: Vec<String>,
    /// The kinds of that.
    #[serde(skip)]
    pub missing_kinds: Vec<PartKind>,
    /// Where the proxy does not listen in the pod: its ports.
    pub proxy_does_not_listen: Vec<String>,
    /// Whether the proxy has its DNS in the pod.
    pub proxy_dns: bool,
    /// Whether istio-cni's rules are there, too.
    pub istio_cni: bool,
}

/// A waypoint that is named by a label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Waypoint {
    /// The Gateway: `NAMESPACE/NAME`; `None`: the label is `none`.
    pub gateway: Option<String>,
    /// The object with the label: `namespace shop`.
    pub object: String,
}

/// How a call goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// `HBONE` or `plaintext`.
    pub protocol: String,
    /// Whether the caller's proxy makes it.
    pub by_callers_proxy: bool,
    /// The port of the proxy's that it arrives at; `None`: at the application.
    pub to_proxy_port: Option<u16>,
    /// That, in words, with the reasons.
    pub why: Vec<String>,
}

/// Who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Area {
    /// Whoever wrote the labels and annotations.
    Configuration,
    /// Whoever runs this agent.
    Redirector,
    /// Whoever runs the proxy, or wrote its policies.
    Proxy,
    /// Whoever runs the application.
    Application,
    /// Whoever runs the network: CNI, addresses, policies of the network.
    Network,
    /// Nobody, as far as can be seen.
    None,
}

impl Area {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Area::Configuration => "configuration",
            Area::Redirector => "redirector",
            Area::Proxy => "proxy",
            Area::Application => "application",
            Area::Network => "network",
            Area::None => "none",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Who has to act.
    pub area: Area,
    /// What it is.
    pub cause: Cause,
    /// The pod that it is about.
    pub pod: Option<String>,
    /// What was found, in a sentence or two.
    pub message: String,
    /// What to type next.
    pub next: Vec<String>,
    /// How sure it is that this is the cause.
    #[serde(skip)]
    pub weight: Weight,
}

/// How a call goes, and what is wrong, the most likely cause first. There is always a finding.
type Judgment = (Option<Path>, Vec<Finding>);

/// How sure it is that a finding is the cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// It is wrong now.
    Wrong,
    /// It was wrong a while ago.
    Past,
    /// It may be meant so.
    #[default]
    Hint,
}

macro_rules! causes {
    ($($(#[$doc:meta])* $cause:ident = $name:literal,)*) => {
        /// What is wrong; of two that are equally sure, the first one here is the verdict.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Cause {
            $($(#[$doc])* $cause,)*
        }

        impl Cause {
            /// Every cause.
            pub const ALL: &[Cause] = &[$(Cause::$cause,)*];

            /// The name, in kebab case.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Cause::$cause => $name,)*
                }
            }
        }
    };
}

causes! {
    /// No pod of that name is known, and one of another namespace is; or another namespace is labeled.
    WrongNamespace = "wrong-namespace",
    /// No pod of that name is known.
    NoSuchPod = "no-such-pod",
    /// There is no such Service.
    NoSuchService = "no-such-service",
    /// The Service does not have that port.
    NoSuchServicePort = "no-such-service-port",
    /// The Service has no endpoint that gets new connections.
    NoReadyEndpoint = "no-ready-endpoint",
    /// Two pods have one address, or one uid.
    TwoPodsOneAddress = "two-pods-one-address",
    /// No interface of the pod has its address.
    AddressMissing = "address-missing",
    /// No proxy has been connected since the agent started.
    ProxyNeverConnected = "proxy-never-connected",
    /// The proxy was connected and is gone.
    ProxyAway = "proxy-away",
    /// The proxy refuses the pod.
    ProxyRefusesPod = "proxy-refuses-pod",
    /// The proxy does not listen in the pod.
    ProxyNotListening = "proxy-not-listening",
    /// A routing rule or a route of ours is not there.
    RuleDeleted = "rule-deleted",
    /// A program of ours is not attached.
    LinkDetached = "link-detached",
    /// A sysctl has another value.
    SysctlChanged = "sysctl-changed",
    /// An entry of a map is not there.
    MapChanged = "map-changed",
    /// The pod is on its way in or out, or could not be brought there.
    NotThereYet = "not-there-yet",
    /// The application listens on loopback only.
    ListensOnLoopback = "listens-on-loopback",
    /// The application does not listen on that port.
    NobodyListens = "nobody-listens",
    /// The key of the label is misspelled.
    MisspelledLabelKey = "misspelled-label-key",
    /// The value of the label is none.
    MisspelledLabelValue = "misspelled-label-value",
    /// The value of an annotation cannot be read.
    AnnotationValue = "annotation-value",
    /// The key of an annotation is not known.
    UnknownAnnotation = "unknown-annotation",
    /// DNS is captured, and the proxy has none.
    ProxyWithoutDns = "proxy-without-dns",
    /// The call is handed to the proxy in plaintext, which STRICT refuses.
    PlaintextToProxy = "plaintext-to-proxy",
    /// The redirector has no part in the call.
    OutsideTheMesh = "outside-the-mesh",
    /// Nobody has asked for the mesh.
    NotLabeled = "not-labeled",
    /// Nobody has asked for the mesh in the manifests, which do not include the namespace.
    NamespaceMissing = "namespace-missing",
    /// Something keeps the pod out of the mesh.
    KeptOut = "kept-out",
    /// The rest is to be seen on another node.
    OtherNode = "other-node",
    /// Nothing is wrong, as far as can be seen.
    NothingFound = "nothing-found",
}
