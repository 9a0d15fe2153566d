//! What the proxy knows of the mesh: a directory of Kubernetes manifests takes istiod's place.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;
use tracing::{info, warn};

use super::ca::Identity;
use super::policy::{self, PeerAuthentication, PeerAuthenticationSpec};

/// Where the agents publish what istiod would read from a pod's annotations.
const STATUS_DIR: &str = ".status";
const REDIRECTION: &str = "ambient.istio.io/redirection";
const POLL: Duration = Duration::from_millis(50);
/// As ztunnel (`proxy.rs`, `get_workload`).
const WAIT_FOR_WORKLOAD: Duration = Duration::from_secs(5);

/// Namespace and name.
type Key = (String, String);

/// A pod.
#[derive(Debug)]
pub(super) struct Pod {
    key: Key,
    pub(super) identity: Identity,
    pub(super) labels: BTreeMap<String, String>,
    ips: Vec<IpAddr>,
    /// By name.
    ports: BTreeMap<String, u16>,
}

#[derive(Debug)]
struct Service {
    key: Key,
    selector: BTreeMap<String, String>,
    ports: Vec<ServicePort>,
}

/// Everything in the directory at one moment.
#[derive(Debug, Default)]
pub(super) struct View {
    pods: BTreeMap<Key, Arc<Pod>>,
    pods_by_ip: HashMap<IpAddr, Arc<Pod>>,
    services_by_ip: HashMap<IpAddr, Arc<Service>>,
    pub(super) policies: Vec<PeerAuthentication>,
}

/// Where a connection has to go.
#[derive(Debug)]
pub(super) enum Route {
    /// To an address that is nobody's in the mesh.
    Passthrough,
    /// To this pod, at this address.
    Pod(Arc<Pod>, SocketAddr),
    /// To a service that has no endpoint, or not on this port.
    Nowhere(String),
}

/// The mesh, kept current.
#[derive(Debug)]
pub(super) struct Mesh {
    dir: Option<PathBuf>,
    view: watch::Receiver<Arc<View>>,
    turn: AtomicUsize,
}

impl Mesh {
    /// Follows the manifests in `dir` for as long as the mesh is in use; without a directory every
    /// address is unknown and every policy permissive.
    pub(super) fn follow(dir: Option<PathBuf>) -> anyhow::Result<Arc<Self>> {
        let (sender, view) = watch::channel(Arc::default());
        if let Some(dir) = dir.clone() {
            let mut directory = Directory { dir, files: BTreeMap::new() };
            if directory.scan()? {
                sender.send_replace(Arc::new(directory.view()));
            }
            tokio::spawn(async move {
                while tokio::time::timeout(POLL, sender.closed()).await.is_err() {
                    match directory.scan() {
                        Ok(true) => {
                            sender.send_replace(Arc::new(directory.view()));
                        }
                        Ok(false) => {}
                        Err(error) => warn!("{error:#}"),
                    }
                }
            });
        }
        Ok(Arc::new(Self { dir, view, turn: AtomicUsize::new(0) }))
    }

    pub(super) fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Waits until the workload itself is known, for as long as ztunnel does: before that its
    /// policies cannot be told.
    pub(super) async fn wait_for(&self, namespace: &str, name: &str) -> Option<Arc<View>> {
        if self.dir.is_none() {
            return Some(self.view());
        }
        let key = (namespace.to_owned(), name.to_owned());
        let mut view = self.view.clone();
        let known = view.wait_for(|view| view.pods.contains_key(&key));
        let known = tokio::time::timeout(WAIT_FOR_WORKLOAD, known).await;
        known.ok()?.ok().map(|view| view.clone())
    }

    /// Where a connection to `dst` has to go.
    pub(super) fn route(&self, view: &View, dst: SocketAddr) -> Route {
        if let Some(service) = view.services_by_ip.get(&dst.ip()) {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            return match view.endpoint(service, dst, turn) {
                Some((pod, addr)) => Route::Pod(pod, addr),
                None => Route::Nowhere(format!("{}/{}", service.key.0, service.key.1)),
            };
        }
        match view.pods_by_ip.get(&dst.ip()) {
            Some(pod) => Route::Pod(pod.clone(), dst),
            None => Route::Passthrough,
        }
    }

    /// Whether the pod takes HBONE, by what its agent has published; read afresh each time, so that
    /// nothing is stale once an agent has withdrawn it.
    pub(super) fn speaks_hbone(&self, pod: &Pod) -> bool {
        let Some(dir) = &self.dir else { return false };
        let file = dir.join(STATUS_DIR).join(format!("{}_{}.json", pod.key.0, pod.key.1));
        match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice::<Value>(&bytes)
                .is_ok_and(|v| v["metadata"]["annotations"][REDIRECTION] == "enabled"),
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    warn!("read {}: {error}", file.display());
                }
                false
            }
        }
    }
}

impl View {
    /// Whether `port` of a workload refuses plaintext.
    pub(super) fn is_strict(&self, namespace: &str, name: &str, port: u16) -> bool {
        let none = BTreeMap::new();
        let pod = self.pods.get(&(namespace.to_owned(), name.to_owned()));
        let labels = pod.map_or(&none, |pod| &pod.labels);
        policy::is_strict(&self.policies, namespace, labels, port)
    }

    /// The addresses of a service; `None` when there is no such service.
    pub(super) fn service_addresses(&self, namespace: &str, name: &str) -> Option<Vec<IpAddr>> {
        let is = |service: &Service| service.key.0 == namespace && service.key.1 == name;
        let addresses: Vec<IpAddr> =
            self.services_by_ip.iter().filter(|(_, s)| is(s)).map(|(ip, _)| *ip).collect();
        (!addresses.is_empty()).then_some(addresses)
    }

    fn endpoint(
        &self,
        service: &Service,
        dst: SocketAddr,
        turn: usize,
    ) -> Option<(Arc<Pod>, SocketAddr)> {
        let port = service.ports.iter().find(|port| port.port == dst.port() && port.is_tcp())?;
        let endpoints: Vec<_> = self
            .pods
            .values()
            .filter(|pod| pod.key.0 == service.key.0 && !service.selector.is_empty())
            .filter(|pod| policy::matches(&service.selector, &pod.labels))
            .filter_map(|pod| {
                let ip = pod.ips.iter().find(|ip| ip.is_ipv4() == dst.is_ipv4())?;
                let port = match &port.target_port {
                    None => port.port,
                    Some(TargetPort::Number(number)) => *number,
                    Some(TargetPort::Name(name)) => *pod.ports.get(name)?,
                };
                Some((pod.clone(), SocketAddr::new(*ip, port)))
            })
            .collect();
        endpoints.get(turn.checked_rem(endpoints.len())?).cloned()
    }
}

// --- The directory

/// A file's size, inode and time of change: what shows that it is another.
type Stamp = (u64, u64, i64, i64);

struct Directory {
    dir: PathBuf,
    files: BTreeMap<PathBuf, (Stamp, Vec<Object>)>,
}

#[derive(Clone, Debug)]
enum Object {
    Pod(Arc<Pod>),
    Service(Arc<Service>, Vec<IpAddr>),
    PeerAuthentication(PeerAuthentication),
}

impl Directory {
    /// Reads what has changed; whether anything has.
    ///
    /// A file that does not parse is reported and leaves what it said before in force, as an API
    /// server would have.
    fn scan(&mut self) -> anyhow::Result<bool> {
        let context = || format!("read manifests in {}", self.dir.display());
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.dir).with_context(context)? {
            let path = entry.with_context(context)?.path();
            // A file that has just been deleted or renamed is none.
            if let (true, Ok(data)) = (is_manifest(&path), fs::metadata(&path)) {
                found.insert(path, (data.len(), data.ino(), data.mtime(), data.mtime_nsec()));
            }
        }
        let before = self.files.len();
        self.files.retain(|path, _| found.contains_key(path));
        let mut changed = self.files.len() != before;
        for (path, stamp) in found {
            if self.files.get(&path).is_some_and(|(known, _)| *known == stamp) {
                continue;
            }
            let objects = match read(&path) {
                Ok(objects) => objects,
                Err(error) => {
                    warn!("{error:#}");
                    self.files.remove(&path).map(|(_, objects)| objects).unwrap_or_default()
                }
            };
            info!(file = %path.display(), objects = objects.len(), "manifest read");
            self.files.insert(path, (stamp, objects));
            changed = true;
        }
        Ok(changed)
    }

    fn view(&self) -> View {
        let mut view = View::default();
        for object in self.files.values().flat_map(|(_, objects)| objects) {
            match object {
                Object::Pod(pod) => {
                    for ip in &pod.ips {
                        view.pods_by_ip.insert(*ip, pod.clone());
                    }
                    view.pods.insert(pod.key.clone(), pod.clone());
                }
                Object::Service(service, ips) => {
                    for ip in ips {
                        view.services_by_ip.insert(*ip, service.clone());
                    }
                }
                Object::PeerAuthentication(policy) => view.policies.push(policy.clone()),
            }
        }
        view
    }
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(OsStr::to_str);
    !hidden && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn read(path: &Path) -> anyhow::Result<Vec<Object>> {
    let context = || format!("read manifest {}", path.display());
    let text = fs::read_to_string(path).with_context(context)?;
    // JSON is YAML, but a JSON parser says better what is wrong with JSON.
    let documents: Vec<Value> = if path.extension() == Some(OsStr::new("json")) {
        vec![serde_json::from_str(&text).with_context(context)?]
    } else {
        serde_saphyr::from_multiple(&text).with_context(context)?
    };
    let mut objects = Vec::new();
    for document in documents.into_iter().flat_map(items) {
        if let Some(object) = Object::read(document).with_context(context)? {
            objects.push(object);
        }
    }
    Ok(objects)
}

/// The items of a `List`, else the document itself.
fn items(mut document: Value) -> Vec<Value> {
    let is_list = document["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
    match document.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) if is_list => items,
        _ if document.is_null() => Vec::new(),
        _ => vec![document],
    }
}

impl Object {
    /// `None` for what does not matter here.
    fn read(document: Value) -> anyhow::Result<Option<Self>> {
        let Some(kind) = document["kind"].as_str().map(str::to_owned) else {
            anyhow::bail!("an object has no kind");
        };
        let context = || format!("read {kind} {}", document["metadata"]["name"]);
        let object = match kind.as_str() {
            "Pod" => PodManifest::deserialize(&document).with_context(context)?.into_object(),
            "Service" => {
                Some(ServiceManifest::deserialize(&document).with_context(context)?.into_object())
            }
            "PeerAuthentication" => {
                let manifest = PolicyManifest::deserialize(&document).with_context(context)?;
                Some(manifest.into_object())
            }
            _ => None,
        };
        Ok(object)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    creation_timestamp: Option<String>,
}

impl Metadata {
    fn key(&self) -> Key {
        let namespace = self.namespace.clone().unwrap_or_else(|| "default".to_owned());
        (namespace, self.name.clone())
    }
}

#[derive(Debug, Deserialize)]
struct PodManifest {
    metadata: Metadata,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    service_account_name: Option<String>,
    host_network: bool,
    containers: Vec<Container>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Container {
    ports: Vec<ContainerPort>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<IpAddr>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Debug, Deserialize)]
struct PodIp {
    ip: IpAddr,
}

impl PodManifest {
    /// `None` for a pod that has no address of its own, or none any more.
    fn into_object(self) -> Option<Object> {
        let finished = matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if self.spec.host_network || finished {
            return None;
        }
        let mut ips: Vec<_> = self.status.pod_ips.into_iter().map(|ip| ip.ip).collect();
        if ips.is_empty() {
            ips.extend(self.status.pod_ip);
        }
        let ports = self.spec.containers.into_iter().flat_map(|container| container.ports);
        let account = self.spec.service_account_name.unwrap_or_else(|| "default".to_owned());
        let key = self.metadata.key();
        Some(Object::Pod(Arc::new(Pod {
            identity: Identity::new(&key.0, account),
            key,
            labels: self.metadata.labels,
            ips,
            ports: ports.filter_map(|port| Some((port.name?, port.container_port))).collect(),
        })))
    }
}

#[derive(Debug, Deserialize)]
struct ServiceManifest {
    metadata: Metadata,
    #[serde(default)]
    spec: ServiceSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    selector: BTreeMap<String, String>,
    ports: Vec<ServicePort>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePort {
    port: u16,
    protocol: Option<String>,
    target_port: Option<TargetPort>,
}

impl ServicePort {
    fn is_tcp(&self) -> bool {
        self.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TargetPort {
    Number(u16),
    Name(String),
}

impl ServiceManifest {
    fn into_object(self) -> Object {
        // "None" is a headless service: it has no address.
        let ips = self.spec.cluster_ips.iter().chain(&self.spec.cluster_ip);
        let ips = ips.filter_map(|ip| ip.parse().ok()).collect();
        let service = Service {
            key: self.metadata.key(),
            selector: self.spec.selector,
            ports: self.spec.ports,
        };
        Object::Service(Arc::new(service), ips)
    }
}

#[derive(Debug, Deserialize)]
struct PolicyManifest {
    metadata: Metadata,
    #[serde(default)]
    spec: PeerAuthenticationSpec,
}

impl PolicyManifest {
    fn into_object(self) -> Object {
        let (namespace, name) = self.metadata.key();
        Object::PeerAuthentication(PeerAuthentication {
            namespace,
            name,
            created: self.metadata.creation_timestamp.unwrap_or_default(),
            spec: self.spec,
        })
    }
}
