//! Which pods are in the mesh, and why: one pure function, [`decide`].

mod decision;

use std::{
    collections::BTreeMap,
    fmt,
    net::{AddrParseError, IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use k8s_openapi::api::core::v1 as k8s;
use serde::{Deserialize, Serialize};

pub use self::decision::{Config, Decision, Line, Question, Reason, UnknownReason, decide, weigh};

/// The label on namespaces and pods that asks for a data plane mode.
/// Source: Istio `pkg/config/constants`, `DataplaneModeLabel`.
pub const LABEL_DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Value of [`LABEL_DATAPLANE_MODE`]: in the mesh.
/// Source: Istio `pkg/config/constants`, `DataplaneModeAmbient`.
pub const DATAPLANE_MODE_AMBIENT: &str = "ambient";
/// Value of [`LABEL_DATAPLANE_MODE`] on a pod: not in the mesh, whatever its namespace says.
/// Source: Istio `pkg/config/constants`, `DataplaneModeNone`.
pub const DATAPLANE_MODE_NONE: &str = "none";
/// Names the waypoint of a pod, or of those of a namespace. Source: Istio `api/label`, `IoIstioUseWaypoint`.
pub const LABEL_USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// The namespace of that waypoint. Source: Istio `api/label`, `IoIstioUseWaypointNamespace`.
pub const LABEL_USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// The annotation that the sidecar injector leaves on a pod. Source: Istio `annotation.SidecarStatus`.
pub const ANNOTATION_SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// On the API server's copy of a static pod, its mirror. Source: Kubernetes
/// `staging/src/k8s.io/api/core/v1/annotation_key_constants.go`, `MirrorPodAnnotationKey`.
const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";
/// The uid that kubelet itself knows a static pod by. Source: Kubernetes
/// `pkg/kubelet/types/pod_update.go`, `ConfigHashAnnotationKey`.
const ANNOTATION_HASH: &str = "kubernetes.io/config.hash";
/// The namespace that is excluded unless the operator says otherwise.
pub const DEFAULT_EXCLUDED_NAMESPACE: &str = "kube-system";

/// The name of a pod: `namespace/name` as text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PodKey {
    /// The pod's namespace, a DNS label.
    pub namespace: String,
    /// The pod's name, a DNS subdomain.
    pub name: String,
}

/// A name that Kubernetes would not accept.
///
/// Names become file names below the netns and status directories, so what is no DNS name is
/// refused before it gets there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text has no `/` between namespace and name.
    #[error("read pod name {0:?}: it is not of the form NAMESPACE/NAME")]
    NotQualified(String),
    /// The namespace is not a DNS label.
    #[error(
        "read namespace {0:?}: a namespace is at most 63 lower case letters, digits and `-`, and begins \
         and ends with a letter or digit"
    )]
    Namespace(String),
    /// The pod's name is not a DNS subdomain.
    #[error(
        "read pod name {0:?}: a name is at most 253 lower case letters, digits, `-` and `.`, and \
         each part between dots begins and ends with a letter or digit"
    )]
    Pod(String),
}

impl PodKey {
    /// The key of the pod `name` in `namespace`.
    ///
    /// # Errors
    ///
    /// When one of the two is not a name that Kubernetes accepts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Result<PodKey, NameError> {
        let namespace = namespace.into();
        let name = name.into();
        check_namespace_name(&namespace)?;
        if !is_dns_subdomain(&name) {
            return Err(NameError::Pod(name));
        }
        Ok(PodKey { namespace, name })
    }
}

/// Whether `name` can be the name of a namespace.
///
/// # Errors
///
/// When Kubernetes would not accept it.
pub fn check_namespace_name(name: &str) -> Result<(), NameError> {
    if name.len() > 63 || !is_dns_part(name) {
        return Err(NameError::Namespace(name.to_owned()));
    }
    Ok(())
}

/// Whether `name` is a DNS subdomain, as the names of pods and nodes are.
pub fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_part)
}

fn is_dns_part(part: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|b| alphanumeric(b) || *b == b'-')
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for PodKey {
    type Err = NameError;

    fn from_str(s: &str) -> Result<PodKey, NameError> {
        let (namespace, name) =
            s.split_once('/').ok_or_else(|| NameError::NotQualified(s.to_owned()))?;
        PodKey::new(namespace, name)
    }
}

crate::text::by_text!(PodKey);

/// `status.phase` of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Accepted, its containers do not all run yet; also a pod without a phase.
    Pending,
    /// At least one container runs.
    Running,
    /// All containers ended well; the pod's address may belong to another one by now.
    Succeeded,
    /// All containers ended, one of them badly; as for `Succeeded`.
    Failed,
    /// The node could not be asked, or a phase that this agent does not know.
    Unknown,
}

impl Phase {
    /// Whether the pod has run to its end: it has no network any more.
    pub fn is_finished(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed)
    }

    /// The name in Kubernetes.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
            Phase::Unknown => "Unknown",
        }
    }

    fn from_kubernetes(phase: Option<&str>) -> Phase {
        match phase {
            None | Some("" | "Pending") => Phase::Pending,
            Some("Running") => Phase::Running,
            Some("Succeeded") => Phase::Succeeded,
            Some("Failed") => Phase::Failed,
            Some(_) => Phase::Unknown,
        }
    }
}

/// What redirection needs to know of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub key: PodKey,
    /// `metadata.uid`, never empty.
    pub uid: String,
    /// `spec.serviceAccountName`, `default` when the pod names none.
    pub service_account: String,
    /// `spec.nodeName`; `None` while the pod is not bound to a node.
    pub node_name: Option<String>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.hostUsers`: unless it is false, the pod has no user namespace of its own.
    pub host_users: bool,
    /// `status.phase`.
    pub phase: Phase,
    /// `status.podIPs`, or `status.podIP` where that is empty; each once, in the pod's order.
    pub ips: Vec<IpAddr>,
    /// `metadata.deletionTimestamp` is set: the pod is on its way out, but may well still run.
    pub deleting: bool,
}

impl Pod {
    /// The uid that kubelet knows the pod by, and so the node: in the names of cgroups, and on the ZDS
    /// connection. That of a static pod is not its object's, which is made anew when somebody deletes
    /// it, while the pod runs on.
    pub fn kubelet_uid(&self) -> &str {
        self.static_uid().unwrap_or(&self.uid)
    }

    /// Whether the object is the mirror of a static pod.
    pub fn is_mirror(&self) -> bool {
        self.static_uid().is_some()
    }

    /// kubelet's uid of a static pod is a hash in hex. The API server's uids have dashes, and whoever creates a pod
    /// could name the one of another pod here.
    fn static_uid(&self) -> Option<&str> {
        let mirror = self.annotations.contains_key(ANNOTATION_MIRROR);
        let is_hash = |uid: &str| !uid.is_empty() && !uid.contains('-');
        let uid = self.annotations.get(ANNOTATION_HASH).filter(|uid| mirror && is_hash(uid));
        uid.map(String::as_str)
    }
}

/// What is wrong with a pod object that cannot become a [`Pod`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PodError {
    /// The name or the namespace is missing or not a valid one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is no uid.
    #[error("read metadata.uid: it is missing; the proxy knows a pod by its uid")]
    NoUid,
    /// One of the addresses is not one.
    #[error("read status.podIPs: {address:?} is not an IP address")]
    Address {
        /// The text found in place of an address.
        address: String,
        /// Why it is none.
        source: AddrParseError,
    },
    /// One of the addresses is one that no pod can have.
    #[error("read status.podIPs: {0} is not an address that a pod can have")]
    UnusableAddress(IpAddr),
}

impl TryFrom<&k8s::Pod> for Pod {
    type Error = PodError;

    fn try_from(pod: &k8s::Pod) -> Result<Pod, PodError> {
        let metadata = &pod.metadata;
        let key = PodKey::new(
            metadata.namespace.as_deref().unwrap_or("default"),
            metadata.name.as_deref().unwrap_or_default(),
        )?;
        let uid = metadata.uid.clone().filter(|uid| !uid.is_empty()).ok_or(PodError::NoUid)?;
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let non_empty = |s: &Option<String>| s.clone().filter(|s| !s.is_empty());
        let host_network = spec.and_then(|s| s.host_network).unwrap_or_default();
        let ips = status.map(addresses).transpose()?.unwrap_or_default();
        // The node's own address is the node's business.
        if let Some(ip) = ips.iter().find(|ip| !host_network && !can_be_a_pods(**ip)) {
            return Err(PodError::UnusableAddress(*ip));
        }
        Ok(Pod {
            key,
            uid,
            service_account: spec
                .and_then(|s| {
                    // `serviceAccount` is the field's deprecated name.
                    non_empty(&s.service_account_name).or_else(|| non_empty(&s.service_account))
                })
                .unwrap_or_else(|| "default".to_owned()),
            node_name: spec.and_then(|s| non_empty(&s.node_name)),
            labels: metadata.labels.clone().unwrap_or_default(),
            annotations: metadata.annotations.clone().unwrap_or_default(),
            host_network,
            host_users: spec.and_then(|s| s.host_users).unwrap_or(true),
            phase: Phase::from_kubernetes(status.and_then(|s| s.phase.as_deref())),
            ips,
            deleting: metadata.deletion_timestamp.is_some(),
        })
    }
}

fn addresses(status: &k8s::PodStatus) -> Result<Vec<IpAddr>, PodError> {
    let mut texts: Vec<&str> = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    if texts.is_empty() {
        texts.extend(status.pod_ip.as_deref().filter(|ip| !ip.is_empty()));
    }
    let mut addresses = Vec::with_capacity(texts.len());
    for text in texts {
        let address = text
            .parse::<IpAddr>()
            .map_err(|source| PodError::Address { address: text.to_owned(), source })?
            .to_canonical();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// Whether a pod in the mesh can have this address.
///
/// The kernel side leaves loopback, link-local IPv6 and multicast alone, so a pod that claimed such
/// an address would be enrolled in name only.
pub fn can_be_a_pods(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            !(a.is_loopback() || a.is_unspecified() || a.is_multicast() || a == Ipv4Addr::BROADCAST)
        }
        IpAddr::V6(a) => {
            !(a == Ipv6Addr::LOCALHOST
                || a.is_unspecified()
                || a.is_multicast()
                || a.is_unicast_link_local())
        }
    }
}

/// What redirection needs to know of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

impl TryFrom<&k8s::Namespace> for Namespace {
    type Error = NameError;

    fn try_from(namespace: &k8s::Namespace) -> Result<Namespace, NameError> {
        let name = namespace.metadata.name.clone().unwrap_or_default();
        check_namespace_name(&name)?;
        Ok(Namespace { name, labels: namespace.metadata.labels.clone().unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use redirect_ebpf::shown;

    use super::*;

    fn parse(pod: serde_json::Value) -> Result<Pod, PodError> {
        Pod::try_from(&serde_json::from_value::<k8s::Pod>(pod).unwrap())
    }

    #[test]
    fn bpftool_prints_every_reason_by_its_name() {
        let of = |name: &dyn fmt::Debug, code| format!("{name:?} {code}");
        let ours: Vec<_> = Reason::ALL.iter().map(|r| of(r, r.code())).collect();
        let shown: Vec<_> = shown::Reason::ALL.iter().map(|r| of(r, *r as u32)).collect();
        assert_eq!(ours, shown);
    }

    #[test]
    fn reasons_keep_their_names_and_numbers() {
        let table: Vec<String> = Reason::ALL.iter().map(|r| format!("{} {r}", r.code())).collect();
        assert_eq!(
            table,
            [
                "1 namespace-excluded",
                "2 host-network",
                "3 pod-finished",
                "4 sidecar",
                "5 pod-label-none",
                "6 pod-label-ambient",
                "7 namespace-label-ambient",
                "8 not-labeled",
                "9 override-enrolled",
                "10 override-bypass",
                "11 paused",
                "12 selected",
                "13 not-selected",
            ]
        );
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code()), Some(reason));
            assert_eq!(reason.as_str().parse(), Ok(reason));
            let json = serde_json::to_string(&reason).unwrap();
            assert_eq!(serde_json::from_str::<Reason>(&json).unwrap(), reason);
        }
        assert_eq!(Reason::from_code(0), None);
    }

    #[test]
    fn a_pod_name_that_could_leave_its_directory_is_refused() {
        assert_eq!(PodKey::new("shop", "cart-0.web").unwrap().to_string(), "shop/cart-0.web");
        for name in ["", ".", "..", "../cart", "a/b", "-a", "a-", "a..b", "A", "a_b", "a\0"] {
            assert_eq!(PodKey::new("shop", name), Err(NameError::Pod(name.to_owned())));
        }
        for namespace in ["", "..", "a.b", "a/b", "Shop", &"x".repeat(64)] {
            assert_eq!(
                PodKey::new(namespace, "cart"),
                Err(NameError::Namespace(namespace.to_owned()))
            );
        }
        assert_eq!("cart".parse::<PodKey>(), Err(NameError::NotQualified("cart".to_owned())));
        assert!("shop/a/b".parse::<PodKey>().is_err());
    }

    #[test]
    fn a_pod_is_read_from_its_kubernetes_object() {
        let pod = parse(serde_json::json!({
            "metadata": {
                "namespace": "shop", "name": "cart", "uid": "u-1",
                "labels": {"app": "cart"}, "annotations": {"note": "x"},
                "deletionTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"serviceAccountName": "cart", "nodeName": "n1", "hostUsers": false, "containers": []},
            "status": {
                "phase": "Running", "podIP": "10.0.0.9",
                "podIPs": [
                    {"ip": "10.0.0.2"}, {"ip": "fd00::2"}, {"ip": "FD00:0::2"},
                    {"ip": "::ffff:10.0.0.2"},
                ],
            },
        }))
        .unwrap();
        assert_eq!(pod.key.to_string(), "shop/cart");
        assert_eq!((pod.uid.as_str(), pod.service_account.as_str()), ("u-1", "cart"));
        assert_eq!(pod.node_name.as_deref(), Some("n1"));
        assert_eq!(pod.labels["app"], "cart");
        assert_eq!(pod.annotations["note"], "x");
        assert_eq!((pod.phase, pod.deleting, pod.host_network), (Phase::Running, true, false));
        assert!(!pod.host_users);
        let ips: Vec<IpAddr> = vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(pod.ips, ips);
    }

    #[test]
    fn a_static_pod_goes_by_the_uid_that_kubelet_knows() {
        let pod = |annotations: &[(&str, &str)]| {
            let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
            let metadata =
                serde_json::json!({"name": "etcd", "uid": "u-1", "annotations": annotations});
            parse(serde_json::json!({"metadata": metadata})).unwrap()
        };
        let (mirror, hash) = ((ANNOTATION_MIRROR, "abc"), (ANNOTATION_HASH, "abc"));
        let static_pod = pod(&[mirror, hash]);
        assert_eq!((static_pod.kubelet_uid(), static_pod.is_mirror()), ("abc", true));
        let others = (ANNOTATION_HASH, "5f0c1d5e-3c1a-4c6e-9f0e-0a1b2c3d4e5f");
        let empty = (ANNOTATION_HASH, "");
        for annotations in [&[][..], &[mirror], &[hash], &[mirror, empty], &[mirror, others]] {
            let other = pod(annotations);
            assert_eq!((other.kubelet_uid(), other.is_mirror()), ("u-1", false));
        }
    }

    #[test]
    fn what_a_pod_does_not_say_has_kubernetes_defaults() {
        let pod = parse(serde_json::json!({
            "metadata": {"name": "cart", "uid": "u-1"},
            "status": {"podIP": "10.0.0.2"},
        }))
        .unwrap();
        assert_eq!(pod.key.to_string(), "default/cart");
        assert_eq!((pod.service_account.as_str(), pod.node_name), ("default", None));
        assert!(pod.host_users);
        assert_eq!(pod.phase, Phase::Pending);
        assert_eq!(pod.ips, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_pod_with_no_uid_or_with_impossible_addresses_is_refused() {
        let with = |uid: &str, ip: &str| {
            parse(serde_json::json!({
                "metadata": {"name": "cart", "uid": uid}, "status": {"podIPs": [{"ip": ip}]},
            }))
        };
        assert!(with("u-1", "10.0.0.2").is_ok());
        assert_eq!(with("", "10.0.0.2"), Err(PodError::NoUid));
        assert!(matches!(with("u-1", "10.0.0.256"), Err(PodError::Address { .. })));
        for ip in [
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(matches!(with("u-1", ip), Err(PodError::UnusableAddress(_))), "{ip}");
        }
    }
}
