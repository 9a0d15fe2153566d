//! Where the agent learns about pods and namespaces, and where it reports what it did with them.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    dataplane::PartKind,
    membership::{Namespace, Pod, PodKey},
};

pub mod dir;
pub mod kube;
mod service;

pub use self::service::{Endpoint, Service, ServicePort};

/// The annotation that tells istiod whether a pod speaks HBONE.
/// Source: Istio `pkg/config/constants`, `AmbientRedirection`.
pub const ANNOTATION_REDIRECTION: &str = "ambient.istio.io/redirection";

/// Everything that a source knows: a reader needs no history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The namespaces, by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// The pods of this node. No two of them share a uid, or an address that both may be using.
    pub pods: BTreeMap<PodKey, Pod>,
    /// What could not be used, for the operator; in a stable order.
    pub problems: Vec<Problem>,
}

/// Something in the source that cannot be used; it affects nothing but the object it names.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The object: a file, a document of it, or a pod.
    pub object: String,
    /// What is wrong with it, and what the agent does about it.
    pub message: String,
    /// Set if the problem is a conflict of two pods.
    #[serde(skip)]
    pub conflict: Option<Box<Conflict>>,
}

/// Two pods that have the same uid, or the same address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The pod that cannot have it, or that has changed to it.
    pub pod: PodKey,
    /// The pod that has it.
    pub holder: PodKey,
    /// What both have: `its address 10.0.0.2`.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

/// Value of [`ANNOTATION_REDIRECTION`]; a pod that is not in the mesh has no such annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirection {
    /// Fully in the mesh: peers may speak HBONE to it.
    Enabled,
    /// Redirection is in place, the proxy does not serve the pod yet.
    Pending,
}

impl Redirection {
    /// The annotation's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Redirection::Enabled => "enabled",
            Redirection::Pending => "pending",
        }
    }
}

/// A source of pods and namespaces: a directory of manifests, or a cluster.
pub trait Source: Send + Sync + 'static {
    /// The source in short, for `status`: `dir:/etc/manifests`.
    fn describe(&self) -> String;

    /// What the source knows, kept current. The first value is complete.
    fn inventory(&self) -> watch::Receiver<Arc<Inventory>>;

    /// Writes that `pod` is redirected (or, with `None`, that it is not) where its peers' control plane reads
    /// it. Costs nothing if the pod is gone or this is written already.
    ///
    /// # Errors
    ///
    /// When it could not be written; doing it again is harmless.
    fn publish(
        &self,
        pod: &Pod,
        state: Option<Redirection>,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Whether that is written already, or the pod is gone.
    fn is_published(&self, pod: &Pod, state: Option<Redirection>) -> bool;

    /// Whether a pod that is gone from this source was deleted. What still runs of such a pod must not bypass
    /// the proxy. A pod that was merely removed from the source leaves the mesh in order.
    fn gone_is_deleted(&self) -> bool {
        false
    }

    /// What is written for `pod` now.
    fn published(&self, pod: &Pod) -> Option<Redirection> {
        let states = [Redirection::Enabled, Redirection::Pending];
        states.into_iter().find(|state| self.is_published(pod, Some(*state)))
    }

    /// Asks for a pod of any node.
    ///
    /// # Errors
    ///
    /// When it is unknown whether there is one.
    fn find(&self, whom: &Whom) -> impl Future<Output = anyhow::Result<Option<Pod>>> + Send;

    /// Asks for pods by their names. The answers are in the order of the names, each as of [`Source::find`].
    fn find_all(
        &self,
        keys: &[PodKey],
    ) -> impl Future<Output = Vec<anyhow::Result<Option<Pod>>>> + Send {
        let each = keys.iter().map(|key| {
            let whom = Whom::Named(key.clone());
            async move { self.find(&whom).await }
        });
        join_all(each)
    }

    /// Asks for a Service, by its name or one of its cluster IPs.
    ///
    /// # Errors
    ///
    /// When it is unknown whether there is one.
    fn find_service(
        &self,
        whom: &Whom,
    ) -> impl Future<Output = anyhow::Result<Option<Service>>> + Send;

    /// Reports to whoever looks at `pod` what happened to it. Never waits; what cannot be reported is logged
    /// and lost.
    fn record(&self, pod: &Pod, event: Event);
}

/// How a pod, or a Service, is named in a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whom {
    /// By its name: a pod, or a Service if there is no such pod.
    Named(PodKey),
    /// A Service by its name.
    Service(PodKey),
    /// By one of its addresses.
    At(IpAddr),
}

impl Whom {
    /// Whether it is this pod. A pod on the node's network has no address of its own.
    pub fn is(&self, pod: &Pod) -> bool {
        match self {
            Whom::Named(key) => pod.key == *key,
            Whom::Service(_) => false,
            Whom::At(ip) => !pod.host_network && !pod.phase.is_finished() && pod.ips.contains(ip),
        }
    }
}

/// Something that happened to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The particulars, in a sentence for people.
    pub message: String,
    /// What was put back, if that is what happened.
    pub repaired: Vec<PartKind>,
}

impl Event {
    /// An event of this kind.
    pub fn new(kind: EventKind, message: impl Into<String>) -> Event {
        Event { kind, message: message.into(), repaired: Vec::new() }
    }
}

/// The kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum EventKind {
    /// The pod is in the mesh now.
    Enrolled,
    /// The pod is no longer in the mesh.
    Unenrolled,
    /// The pod should be in the mesh, or out of it, and is not.
    EnrollmentFailed,
    /// Something that somebody changed in the pod was repaired.
    Repaired,
    /// An annotation of the pod has a value that cannot be used.
    InvalidAnnotation,
    /// An annotation of the pod, or a label of the pod or its namespace, is unknown.
    UnknownWord,
    /// An operator has overridden on the node whether the pod is in the mesh, or has ended that override.
    Overridden,
}

impl EventKind {
    /// The event's `reason`, in Kubernetes' spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Enrolled => "Enrolled",
            EventKind::Unenrolled => "Unenrolled",
            EventKind::EnrollmentFailed => "EnrollmentFailed",
            EventKind::Repaired => "Repaired",
            EventKind::InvalidAnnotation => "InvalidAnnotation",
            EventKind::UnknownWord => "UnknownWord",
            EventKind::Overridden => "Overridden",
        }
    }

    /// Whether somebody should look at it.
    pub fn is_warning(self) -> bool {
        !matches!(self, EventKind::Enrolled | EventKind::Unenrolled | EventKind::Overridden)
    }
}

/// Logs which problems are new, and which are solved.
fn report(before: &[Problem], after: &[Problem]) {
    for problem in after.iter().filter(|p| !before.contains(p)) {
        warn!(object = problem.object, "{}", problem.message);
    }
    for problem in before.iter().filter(|p| !after.contains(p)) {
        info!(object = problem.object, "no longer: {}", problem.message);
    }
}

/// Makes `candidates` the new pods, instead of `previous`, and leaves out those that could be taken for
/// another pod.
///
/// The proxy knows a pod by its uid and the kernel by its addresses, so two pods may share neither (a pod on
/// the node's network has no address of its own, and a finished one has given its up). An unchanged pod keeps
/// what it has, so that no new pod can displace it. Among new pods, the first by name wins. A pod whose
/// change would cause a conflict stays as it was.
pub fn without_conflicts(
    previous: &BTreeMap<PodKey, Pod>,
    candidates: BTreeMap<PodKey, Pod>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<PodKey, Pod> {
    let unchanged = |pod: &Pod| {
        previous
            .get(&pod.key)
            .is_some_and(|old| old.kubelet_uid() == pod.kubelet_uid() && old.ips == pod.ips)
    };
    let (incumbents, newcomers): (Vec<Pod>, Vec<Pod>) =
        candidates.into_values().partition(unchanged);
    let mut claims = Claims::default();
    let mut admitted = BTreeMap::new();
    for pod in incumbents.into_iter().chain(newcomers) {
        let pod = match claims.claim(&pod) {
            Ok(()) => pod,
            Err((holder, what)) => {
                let conflict = Conflict { pod: pod.key.clone(), holder, what };
                let old = previous
                    .get(&pod.key)
                    .filter(|old| old.kubelet_uid() == pod.kubelet_uid())
                    .filter(|old| claims.claim(old).is_ok());
                problems.push(Problem {
                    object: format!("pod {}", pod.key),
                    message: format!(
                        "{} is that of pod {}, too; {}",
                        conflict.what,
                        conflict.holder,
                        match old {
                            Some(_) => "this pod stays as it was before",
                            None => "this pod is left alone until one of the two changes",
                        }
                    ),
                    conflict: Some(Box::new(conflict)),
                });
                match old {
                    Some(old) => old.clone(),
                    None => continue,
                }
            }
        };
        admitted.insert(pod.key.clone(), pod);
    }
    admitted
}

/// Which pod has which uid and which address.
#[derive(Default)]
struct Claims {
    uids: BTreeMap<String, PodKey>,
    addresses: BTreeMap<IpAddr, PodKey>,
}

impl Claims {
    /// Records what `pod` has. If another pod has some of it, records nothing and returns which pod has what.
    fn claim(&mut self, pod: &Pod) -> Result<(), (PodKey, String)> {
        let uid = pod.kubelet_uid();
        if let Some(other) = self.uids.get(uid) {
            return Err((other.clone(), format!("its uid {uid}")));
        }
        let ips: &[IpAddr] =
            if pod.host_network || pod.phase.is_finished() { &[] } else { &pod.ips };
        for ip in ips {
            if let Some(other) = self.addresses.get(ip) {
                return Err((other.clone(), format!("its address {ip}")));
            }
        }
        self.uids.insert(uid.to_owned(), pod.key.clone());
        self.addresses.extend(ips.iter().map(|ip| (*ip, pod.key.clone())));
        Ok(())
    }
}
