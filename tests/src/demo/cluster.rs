//! The stage: two nodes, ten pods, their manifests.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;

use super::Stop;
use super::node::Node;
use crate::app::{App, Behaviour};
use crate::hbone::{Identity, Record};
use crate::netns::Family;
use crate::topology::{Pod, Style, Topology};

/// Where applications listen.
pub(super) const APP_PORT: u16 = 8080;
/// Where nobody listens.
pub(super) const CLOSED_PORT: u16 = 8081;
/// The service's port.
const SERVICE_PORT: u16 = 80;
/// The pod that enters and leaves the mesh.
pub(super) const NEWCOMER: &str = "lab/newcomer";
const SOON: Duration = Duration::from_secs(20);

/// The nodes, and how their pods are wired.
pub(super) const NODES: [(&str, Style); 2] =
    [("node-a", Style::Routed), ("node-b", Style::Bridged)];

/// What tells a pod from the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// As its namespace says.
    Ordinary,
    /// With the label `istio.io/dataplane-mode: none`.
    OptedOut,
    /// With the annotation that the sidecar injector leaves.
    Sidecar,
}

/// A pod of the demo.
pub(super) struct Cast {
    /// `<namespace>/<name>`
    pub(super) pod: &'static str,
    pub(super) node: usize,
    pub(super) kind: Kind,
    /// Whether it is to be in the mesh.
    pub(super) enrolled: bool,
    /// Who it is, for the reader.
    pub(super) role: &'static str,
}

/// Everyone in the demo.
pub(super) const CAST: [Cast; 10] = [
    ordinary("shop/cart", 0, true, "in the mesh"),
    ordinary("shop/web", 0, true, "in the mesh, on the same node"),
    ordinary("shop/catalog", 1, true, "in the mesh, on the other node, behind the service"),
    ordinary("bank/vault", 1, true, "in the mesh; its namespace is STRICT: mTLS only"),
    Cast {
        pod: "shop/optout",
        node: 0,
        kind: Kind::OptedOut,
        enrolled: false,
        role: "label istio.io/dataplane-mode: none, in an ambient namespace",
    },
    Cast {
        pod: "shop/sidecar",
        node: 0,
        kind: Kind::Sidecar,
        enrolled: false,
        role: "has a sidecar, which speaks HBONE by itself",
    },
    ordinary("legacy/plain", 0, false, "not in the mesh"),
    ordinary("legacy/db", 1, false, "not in the mesh, on the other node"),
    ordinary("edge/gateway", 1, false, "not in the mesh, speaks HBONE by itself"),
    ordinary(NEWCOMER, 0, false, "gets a label later, and loses it again"),
];

const fn ordinary(pod: &'static str, node: usize, enrolled: bool, role: &'static str) -> Cast {
    Cast { pod, node, kind: Kind::Ordinary, enrolled, role }
}

const NAMESPACES: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: legacy}
---
apiVersion: v1
kind: Namespace
metadata: {name: edge}
---
apiVersion: v1
kind: Namespace
metadata: {name: lab}
";

const POLICY: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: bank}
spec: {mtls: {mode: STRICT}}
";

/// The demo's nodes and pods; all of it goes away when dropped.
pub(super) struct Cluster {
    // Dropped in this order: programs before the namespaces that they are in.
    _apps: Vec<App>,
    pub(super) nodes: Vec<Node>,
    pods: Vec<Pod>,
    manifests: PathBuf,
    ca_dir: PathBuf,
    pub(super) topology: Topology,
}

impl Cluster {
    /// Sets everything up and waits until every pod is where it should be.
    pub(super) fn start(stop: &Stop) -> Result<Self> {
        let mut topology = Topology::new(&NODES.map(|(_, style)| style))?;
        let mut pods = Vec::new();
        for cast in &CAST {
            stop.check()?;
            let (namespace, name) = cast.pod.split_once('/').context("split a pod's name")?;
            pods.push(topology.add_pod(cast.node, namespace, name)?);
        }
        let manifests = topology.dir().subdir("manifests")?;
        fs::write(manifests.join("namespaces.yaml"), NAMESPACES)?;
        fs::write(manifests.join("peer-authentication.yaml"), POLICY)?;
        fs::write(manifests.join("service.yaml"), service())?;
        for (cast, pod) in CAST.iter().zip(&pods) {
            fs::write(manifests.join(file_name(pod)), manifest(cast, pod, None))?;
        }
        let mut apps = Vec::new();
        for pod in &pods {
            let anywhere = SocketAddr::new(Family::V6.any(), APP_PORT);
            apps.push(App::start(&pod.netns, &pod.to_string(), anywhere, Behaviour::Echo)?);
        }
        let outside = SocketAddr::new(Family::V6.any(), APP_PORT);
        apps.push(App::start(topology.node(1), OUTSIDE, outside, Behaviour::Echo)?);

        let ca_dir = topology.dir().path().join("ca");
        let mut nodes = Vec::new();
        for (number, (name, _)) in NODES.into_iter().enumerate() {
            nodes.push(Node::start(&topology, number, name, &manifests, &ca_dir)?);
        }
        let mut cluster = Self { _apps: apps, nodes, pods, manifests, ca_dir, topology };
        cluster.settle(stop)?;
        Ok(cluster)
    }

    /// Waits until the agents say that every pod is where it should be.
    fn settle(&mut self, stop: &Stop) -> Result<()> {
        for (number, node) in self.nodes.iter_mut().enumerate() {
            let wanted = CAST.iter().filter(|cast| cast.node == number);
            let wanted: Vec<_> = wanted.map(|cast| (cast.pod, state(cast.enrolled))).collect();
            let what = format!("all pods of {} where they should be", node.name);
            stop.wait_for(&what, SOON, || {
                let Some(status) = node.status_when_up()? else { return Ok(None) };
                let there = |(pod, state): &(&str, PodState)| {
                    status
                        .pods
                        .iter()
                        .any(|p| format!("{}/{}", p.namespace, p.name) == *pod && p.state == *state)
                };
                Ok(wanted.iter().all(there).then_some(()))
            })?;
        }
        Ok(())
    }

    /// The pod of this name.
    pub(super) fn pod(&self, name: &str) -> Result<&Pod> {
        let found = self.pods.iter().find(|pod| pod.to_string() == name);
        found.with_context(|| format!("find pod {name} in the demo"))
    }

    /// The node of the pod of this name.
    pub(super) fn node_of(&self, name: &str) -> Result<&Node> {
        Ok(&self.nodes[self.pod(name)?.node])
    }

    /// Who the pod of this name is in the mesh.
    pub(super) fn identity(&self, name: &str) -> Result<Identity> {
        let pod = self.pod(name)?;
        Ok(Identity::new(&pod.namespace, &pod.name))
    }

    /// The directory of the mesh's CA.
    pub(super) fn ca_dir(&self) -> &PathBuf {
        &self.ca_dir
    }

    /// What is no pod, and answers at [`APP_PORT`].
    pub(super) fn outside(&self, family: Family) -> IpAddr {
        self.topology.node_ip(1, family)
    }

    /// Puts a label on a pod, or takes it off, by replacing its manifest.
    pub(super) fn label(&self, name: &str, mode: Option<&str>) -> Result<()> {
        let cast = CAST.iter().find(|cast| cast.pod == name).context("find the pod's role")?;
        let pod = self.pod(name)?;
        let draft = self.manifests.join(format!(".{}.draft", file_name(pod)));
        fs::write(&draft, manifest(cast, pod, mode))?;
        fs::rename(&draft, self.manifests.join(file_name(pod)))
            .with_context(|| format!("edit the manifest of {name}"))
    }

    /// What the agents and the proxies have logged.
    pub(super) fn logs(&self) -> Result<String> {
        self.nodes.iter().map(Node::logs).collect()
    }

    /// What the proxies have seen so far, node by node.
    pub(super) fn connections(&self) -> Result<Vec<Vec<Record>>> {
        self.nodes.iter().map(Node::connections).collect()
    }
}

/// The name of the application that is outside of everything.
pub(super) const OUTSIDE: &str = "outside";

/// The state of a pod that is where it should be.
pub(super) fn state(enrolled: bool) -> PodState {
    if enrolled { PodState::Enrolled } else { PodState::Bypassing }
}

/// The service's address, which is no host's.
pub(super) fn service_addr(family: Family) -> SocketAddr {
    let ip = match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1).into(),
    };
    SocketAddr::new(ip, SERVICE_PORT)
}

fn file_name(pod: &Pod) -> String {
    format!("pod-{}-{}.yaml", pod.namespace, pod.name)
}

fn manifest(cast: &Cast, pod: &Pod, mode: Option<&str>) -> String {
    let Pod { namespace, name, v4, v6, .. } = pod;
    let mode = mode.or((cast.kind == Kind::OptedOut).then_some("none"));
    let label = mode.map(|mode| format!(", istio.io/dataplane-mode: {mode}")).unwrap_or_default();
    let annotations = match cast.kind {
        Kind::Sidecar => "{sidecar.istio.io/status: '{}'}",
        Kind::Ordinary | Kind::OptedOut => "{}",
    };
    format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata:\n\
         \x20 name: {name}\n\
         \x20 namespace: {namespace}\n\
         \x20 uid: uid-of-{namespace}-{name}\n\
         \x20 labels: {{app: {name}{label}}}\n\
         \x20 annotations: {annotations}\n\
         spec:\n\
         \x20 nodeName: {node}\n\
         \x20 serviceAccountName: {name}\n\
         status:\n\
         \x20 phase: Running\n\
         \x20 podIPs: [{{ip: '{v4}'}}, {{ip: '{v6}'}}]\n",
        node = NODES[cast.node].0,
    )
}

fn service() -> String {
    let [v4, v6] = [Family::V4, Family::V6].map(|family| service_addr(family).ip());
    format!(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: catalog, namespace: shop}}\n\
         spec:\n\
         \x20 clusterIPs: ['{v4}', '{v6}']\n\
         \x20 selector: {{app: catalog}}\n\
         \x20 ports: [{{port: {SERVICE_PORT}, targetPort: {APP_PORT}}}]\n"
    )
}
