//! Reads the API server, page by page.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use futures_util::future::join_all;
use http::Request;
use k8s_openapi::api::core::v1 as k8s;
use kube::{
    Api, Client, Config, Error,
    api::{ApiResource, DynamicObject, ListParams, ObjectList, ObjectMeta},
    client::{Body, ClientBuilder, retry::RetryPolicy},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::time::timeout;
use tower::{buffer::BufferLayer, retry::RetryLayer};

use super::{
    object::{AgentSeen, EventSeen, NamespaceSeen, PodSeen},
    report::{NodeProblem, NodeRow},
    settings::{Settings, SettingsOverrides},
    snapshot::Snapshot,
};
use crate::{
    membership::PodKey,
    source::kube::{SERVER, chain, explain, limit, name},
};

/// How many requests may wait to be sent.
const BUFFER: usize = 64;
/// Restarts allowed when a list's continue token expires (410 Gone).
const RESTARTS: u32 = 3;
/// A finished pod has no traffic.
pub(super) const UNFINISHED: &str = "status.phase!=Succeeded,status.phase!=Failed";
/// The agents' own Events: `kube::runtime` writes them under this name.
const OF_AGENTS: &str = "reportingComponent=redirect-agent";
/// The label of the agents' pods, by the chart.
pub(super) const AGENTS: &str = "app=redirect-agent";
/// Nodes where the DaemonSet does not run.
const LABEL_OS: &str = "kubernetes.io/os";
/// How many agents that are not ready are asked why, and how long one may take.
const ASKED: usize = 20;
const ANSWER: Duration = Duration::from_secs(5);
/// The agent's port for health.
const PORT: u16 = 15014;
/// The longest answer that is shown.
const LONGEST_ANSWER: usize = 500;

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// The namespace; `None`: all.
    pub namespace: Option<String>,
    /// The agents' namespace, where their pods cannot be listed in all.
    pub agent_namespace: Option<String>,
    /// What the operator says in place of the agents.
    pub overrides: SettingsOverrides,
    /// Whether to ask agents that are not ready for `/readyz`.
    pub readyz: bool,
    /// How many objects a page has.
    pub chunk: u32,
}

/// The API server.
#[derive(Clone)]
pub struct Server {
    pub(super) client: Client,
    /// Takes every answer as it is: 503 is one of an agent that is not ready.
    no_retry: Client,
    pub(super) url: String,
}

impl Server {
    /// The one that the kubeconfig leads to, as for kubectl.
    ///
    /// # Errors
    ///
    /// When it leads to none.
    pub async fn open(path: Option<PathBuf>, context: Option<String>) -> Result<Self> {
        let config = config(path.as_deref(), context).await?;
        let url = config.cluster_url.to_string();
        let builder = || {
            let mut config = config.clone();
            limit(&mut config);
            ClientBuilder::try_from(config)
                .map_err(|error| anyhow!("{}", chain(&error)))
                .context("use the API server's address and credentials")
        };
        // A server that is busy, and says so, is asked again.
        let patient = RetryLayer::new(RetryPolicy::default());
        // What is asked again has to be cloned, and a buffer can be.
        let client = builder()?.with_layer(&BufferLayer::new(BUFFER)).with_layer(&patient).build();
        Ok(Self { client, no_retry: builder()?.build(), url })
    }

    /// The error in one line, with what to do about it.
    pub(super) fn failure(&self, what: &str, error: &Error) -> String {
        match error {
            Error::Api(status) if status.code == 403 => {
                format!("{what}: the API server forbids it: {}", status.message)
            }
            Error::Api(status) if status.code == 401 => format!(
                "{what}: the API server does not accept the credentials of the kubeconfig: {}; log in again, \
                 or give --kubeconfig or --context",
                status.message
            ),
            error => format!("{what}: {}", explain(error).replacen(SERVER, &self.url, 1)),
        }
    }

    pub(super) fn pods(&self, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = ApiResource::erase::<k8s::Pod>(&());
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    pub(super) fn agents(&self, query: &Query) -> Api<k8s::Pod> {
        self.in_namespace(query.agent_namespace.as_deref())
    }

    fn in_namespace<K>(&self, namespace: Option<&str>) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
    {
        match namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }
}

async fn config(path: Option<&Path>, context: Option<String>) -> Result<Config> {
    let hint = "find the API server: give --kubeconfig PATH, or set $KUBECONFIG, as for kubectl";
    let failed = |error: &dyn std::error::Error| anyhow!("{}", chain(error));
    let kubeconfig = match (path, &context) {
        (None, None) => return Config::infer().await.map_err(|e| failed(&e)).context(hint),
        (None, Some(_)) => Kubeconfig::read().map_err(|e| failed(&e)).context(hint)?,
        (Some(path), _) => Kubeconfig::read_from(path)
            .map_err(|error| failed(&error))
            .with_context(|| format!("use the kubeconfig {}", path.display()))?,
    };
    let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    config.map_err(|error| failed(&error)).context("use the kubeconfig")
}

/// Reads everything. What is not indispensable and cannot be read becomes a note.
///
/// # Errors
///
/// When pods or namespaces cannot be listed.
pub async fn collect(server: &Server, query: &Query) -> Result<Snapshot> {
    let mut snapshot = Snapshot {
        server: server.url.clone(),
        namespace: query.namespace.clone(),
        ..Snapshot::default()
    };
    agents(server, query, &mut snapshot).await;
    settings(server, query, &mut snapshot).await;
    snapshot.namespaces = namespaces(server, query).await?;
    nodes(server, query, &mut snapshot).await;
    let reading = snapshot.settings.reading();
    let pods = server.pods(query.namespace.as_deref());
    let params = ListParams::default().fields(UNFINISHED);
    let read = |pod: DynamicObject| Some((name(&pod.metadata), PodSeen::read(pod, reading)));
    let found = pages(query.chunk, params, async |params| pods.list(params).await, read).await;
    snapshot.pods = found.map_err(|error| needed(server, "list pods", &error))?;
    look_into(server, query, &mut snapshot).await;
    Ok(snapshot)
}

/// Asks about what is unexpected: for the agents' Events, and agents for `/readyz`.
pub(super) async fn look_into(server: &Server, query: &Query, snapshot: &mut Snapshot) {
    let report = snapshot.report(SystemTime::now());
    if !report.unexpected.is_empty() {
        events(server, query, snapshot).await;
    }
    if query.readyz {
        readyz(server, snapshot, &report.nodes).await;
    }
}

/// Why what is indispensable cannot be read.
fn needed(server: &Server, what: &str, error: &Error) -> anyhow::Error {
    let hint = match error {
        Error::Api(status) if status.code == 403 => {
            "; this needs list on pods, and list on namespaces or, with -n, get"
        }
        _ => "",
    };
    anyhow!("{}{hint}", server.failure(what, error))
}

async fn agents(server: &Server, query: &Query, snapshot: &mut Snapshot) {
    let api = server.agents(query);
    let params = ListParams::default().labels(AGENTS);
    let read = |pod: k8s::Pod| Some((name(&pod.metadata), AgentSeen::read(&pod)?));
    match pages(query.chunk, params, async |params| api.list(params).await, read).await {
        Ok(agents) => {
            if agents.is_empty() {
                snapshot
                    .notes
                    .push(format!("no pod has the label {AGENTS}: is the agent installed?"));
            }
            snapshot.agents = Some(agents);
        }
        Err(error) => {
            let failed = server.failure("list the agents", &error);
            let hint = "whether nodes have an agent is unknown; give --agent-namespace";
            snapshot.notes.push(format!("{failed}; {hint}"));
        }
    }
}

/// The settings of the newest agent.
async fn settings(server: &Server, query: &Query, snapshot: &mut Snapshot) {
    let overrides = query.overrides.clone();
    let agents = snapshot.agents().into_iter().flat_map(BTreeMap::values);
    let Some(agent) = agents.max_by_key(|agent| agent.created).cloned() else {
        snapshot.settings = Settings::new(overrides, None);
        return;
    };
    let mut args = agent.args.clone();
    let maps: Api<k8s::ConfigMap> = server.in_namespace(Some(&agent.key.namespace));
    let needed = agent.args.needed_config_maps();
    for map in needed.into_iter().filter(|_| !overrides.is_complete()) {
        match maps.get_opt(map).await {
            Ok(found) => args.add(map, found.and_then(|map| map.data).unwrap_or_default()),
            Err(error) => {
                let failed = server.failure(&format!("get the agents' ConfigMap {map}"), &error);
                let hint = "give --excluded-namespaces and --enablement-selectors";
                snapshot.notes.push(format!("{failed}; {hint}"));
            }
        }
    }
    snapshot.settings = Settings::new(overrides, Some((agent.key.to_string(), &args)));
}

async fn namespaces(server: &Server, query: &Query) -> Result<BTreeMap<String, NamespaceSeen>> {
    let api: Api<k8s::Namespace> = Api::all(server.client.clone());
    let read = |metadata: ObjectMeta| Some((name(&metadata), NamespaceSeen::from(metadata)));
    let Some(namespace) = &query.namespace else {
        let page = async |params: &ListParams| api.list_metadata(params).await;
        let read = |namespace: kube::core::PartialObjectMeta<_>| read(namespace.metadata);
        let found = pages(query.chunk, ListParams::default(), page, read).await;
        return found.map_err(|error| needed(server, "list namespaces", &error));
    };
    let what = format!("get namespace {namespace}");
    let found = api.get_metadata_opt(namespace).await;
    let found = found.map_err(|error| needed(server, &what, &error))?;
    let found = found.with_context(|| format!("there is no namespace {namespace}"))?;
    Ok(read(found.metadata).into_iter().collect())
}

async fn nodes(server: &Server, query: &Query, snapshot: &mut Snapshot) {
    let api: Api<k8s::Node> = Api::all(server.client.clone());
    let page = async |params: &ListParams| api.list_metadata(params).await;
    let read = |node: kube::core::PartialObjectMeta<_>| Some((needs_agent(&node.metadata)?, ()));
    match pages(query.chunk, ListParams::default(), page, read).await {
        Ok(nodes) => snapshot.nodes = Some(nodes),
        Err(error) => {
            let failed = server.failure("list nodes", &error);
            snapshot.notes.push(format!("{failed}; nodes without pods and agents are not shown"));
        }
    }
}

/// The node's name, if the DaemonSet would run on it.
pub(super) fn needs_agent(metadata: &ObjectMeta) -> Option<String> {
    let os = metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_OS));
    os.is_none_or(|os| os == "linux").then(|| metadata.name.clone()).flatten()
}

/// What the agents have said about pods. Events last for an hour.
async fn events(server: &Server, query: &Query, snapshot: &mut Snapshot) {
    let api: Api<k8s::Event> = server.in_namespace(query.namespace.as_deref());
    let params = ListParams::default().fields(OF_AGENTS);
    let read = |event: k8s::Event| Some((name(&event.metadata), EventSeen::read(event)?));
    match pages(query.chunk, params, async |params| api.list(params).await, read).await {
        Ok(events) => snapshot.take_events(events.into_values()),
        Err(error) => {
            let failed = server.failure("list the agents' Events", &error);
            snapshot.notes.retain(|note| *note != failed);
            snapshot.notes.push(failed);
        }
    }
}

/// Asks agents that are not ready for what they wait.
async fn readyz(server: &Server, snapshot: &mut Snapshot, nodes: &[NodeRow]) {
    let not_ready = nodes.iter().filter(|node| node.problem == Some(NodeProblem::AgentNotReady));
    let agents: Vec<&PodKey> = not_ready.filter_map(|node| node.agent.as_ref()).collect();
    let answers = agents.iter().take(ASKED).map(|agent| async {
        let answer = match timeout(ANSWER, ask(&server.no_retry, agent)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => server.failure("get /readyz", &error),
            Err(_) => format!("/readyz did not answer within {ANSWER:?}"),
        };
        ((*agent).clone(), answer)
    });
    let answers = join_all(answers).await;
    snapshot.answers = answers.into_iter().collect();
}

async fn ask(client: &Client, agent: &PodKey) -> Result<String, Error> {
    let PodKey { namespace, name } = agent;
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:{PORT}/proxy/readyz");
    let request = Request::get(path).body(Body::empty()).map_err(Error::HttpError)?;
    let response = client.send(request).await?;
    let status = response.status();
    let body = response.into_body().collect_bytes().await?;
    let text: String = String::from_utf8_lossy(&body).chars().take(LONGEST_ANSWER).collect();
    // 503 with a line for each condition is the agent's own; the rest is the API server's, as a Status.
    let refusal = serde_json::from_str::<kube::core::Status>(&text).map(|status| status.message);
    let said = refusal.unwrap_or_else(|_| text.trim().replace('\n', ", "));
    Ok(format!("/readyz says {}: {said}", status.as_u16()))
}

/// Reads a list page by page; of each object what `read` makes of it, by its name.
async fn pages<K: Clone, T>(
    chunk: u32,
    params: ListParams,
    page: impl AsyncFn(&ListParams) -> Result<ObjectList<K>, Error>,
    read: impl Fn(K) -> Option<(String, T)>,
) -> Result<BTreeMap<String, T>, Error> {
    let first = params.limit(chunk);
    let (mut params, mut found, mut restarts) = (first.clone(), BTreeMap::new(), 0);
    loop {
        let list = match page(&params).await {
            // The version that the first page was of is gone.
            Err(Error::Api(status)) if status.code == 410 && restarts < RESTARTS => {
                restarts += 1;
                (params, found) = (first.clone(), BTreeMap::new());
                continue;
            }
            list => list?,
        };
        found.extend(list.items.into_iter().filter_map(&read));
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = first.clone().continue_token(&token),
            None => return Ok(found),
        }
    }
}
