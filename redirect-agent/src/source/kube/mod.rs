//! A cluster's API server as the source.
//!
//! It watches this node's pods, and those labels of all namespaces that matter for the decision. A watch that
//! breaks is resumed where it was, or after a new list. Until the list is complete, what was known stays.
//! Therefore nothing changes for any pod while the API server is away, and missed changes are caught up on.

mod events;
mod owner;
mod state;
mod watch;

pub(crate) use self::{
    state::{Identity, Kept, UNREACHABLE, name, read_pod},
    watch::follow,
};

use std::{
    collections::BTreeMap,
    error::Error as _,
    io,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub use self::owner::Owner;
pub use kube::Config;

use anyhow::{Context as _, Result, anyhow, ensure};
use http::Response;
use k8s_openapi::api::{core::v1 as k8s, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, Error, ResourceExt as _,
    api::{ApiResource, DynamicObject, ListParams, PartialObjectMeta, Patch, PatchParams},
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::watcher,
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch as channel},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tower::{limit::RateLimitLayer, util::MapResponseLayer};
use tracing::{info, warn};

use self::{
    events::{Intake, Scribe},
    state::State,
};
use super::{
    ANNOTATION_REDIRECTION, Event, Inventory, Problem, Redirection, Service, Source, Whom, report,
};
use crate::{
    membership::{self, Pod, is_dns_subdomain},
    metrics::Metrics,
};

/// The agent's name, as field manager and as reporter of events.
const NAME: &str = "redirect-agent";
/// Label of an EndpointSlice. Source: Kubernetes `discovery/v1`, LabelServiceName.
const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// How many Services are listed at once.
const PAGE: u32 = 500;
/// How many EndpointSlices of a Service are read; each has up to 1,000 endpoints.
const SLICES: u32 = 50;

/// What is watched, as problems name it.
const PODS: &str = "pods";
const NAMESPACES: &str = "namespaces";

/// If no response, and no event of a watch, arrives within this time, the connection is closed. Otherwise
/// kube would wait forever.
const READ_TIMEOUT: Duration = Duration::from_secs(90);
/// The API server ends a watch in order after this time, in seconds: on a quiet cluster nothing may
/// come for longer than [`READ_TIMEOUT`], not even a bookmark.
const WATCH_TIMEOUT: u32 = 60;
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one request may take, except a watch.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Rate of the watches' requests. kube's watcher asks again at once when a watch ends normally. If a server,
/// or a proxy in front of it, ends every watch at once, it must not be asked in a loop.
const WATCH_RATE: (u64, Duration) = (60, Duration::from_secs(30));
/// Rate of patches.
const PATCH_RATE: (u64, Duration) = (50, Duration::from_secs(1));
/// Rate of events, so that they do not delay patches.
const EVENT_RATE: (u64, Duration) = (10, Duration::from_secs(1));
/// How many updates may wait to be applied.
const QUEUE: usize = 256;

/// Placeholder for the API server's address in messages.
pub(crate) const SERVER: &str = "the API server";

/// The rights that the agent's service account may lack.
const ROLE: &str = "the agent's role needs: list, watch on pods and namespaces; patch on pods/status; \
                    create, patch on events in events.k8s.io; get on its own DaemonSet in apps";

/// A cluster. Its [`KubeWatcher`] keeps it current.
pub struct KubeSource {
    server: String,
    client: Client,
    inventory: channel::Receiver<Arc<Inventory>>,
    published: Published,
    events: Intake,
}

/// Keeps a [`KubeSource`] current.
pub struct KubeWatcher {
    state: State,
    inventory: channel::Sender<Arc<Inventory>>,
    published: Published,
    updates: mpsc::Receiver<Update>,
    /// The tasks that watch the API server. They end with this.
    followers: JoinSet<()>,
    scribe: Scribe,
}

/// What comes from the API server.
enum Update {
    Pod(watcher::Event<DynamicObject>),
    Namespace(watcher::Event<PartialObjectMeta<k8s::Namespace>>),
    /// Why something cannot be watched at the moment.
    Trouble(&'static str, String),
    /// The API server has answered a request for it.
    Answered(&'static str),
}

/// What each pod's annotation says, by uid. A pod that is missing here does not exist.
#[derive(Clone, Default)]
struct Published(Arc<Mutex<BTreeMap<String, Annotation>>>);

/// A pod's [`ANNOTATION_REDIRECTION`].
#[derive(Clone, Default)]
struct Annotation {
    /// As the watch last saw it. It may not have seen our last write yet.
    seen: Option<String>,
    written: Written,
}

/// What the agent wrote last.
#[derive(Clone, Default)]
enum Written {
    #[default]
    Nothing,
    Value {
        value: Option<Redirection>,
        /// What the watch saw before, until it sees this.
        unseen_since: Option<Option<String>>,
    },
    /// No answer came, so it is unknown whether it was written.
    Unknown,
}

/// How to reach the API server: by the kubeconfig at `path`, else by `$KUBECONFIG` or
/// `~/.kube/config`, else as a pod does, by its service account.
///
/// # Errors
///
/// When none of these leads to one; it says what to do.
pub async fn config(path: Option<&Path>) -> Result<Config> {
    match path {
        Some(path) => {
            let context = || format!("use the kubeconfig {}", path.display());
            let kubeconfig = Kubeconfig::read_from(path)
                .map_err(|error| anyhow!("{}", chain(&error)))
                .with_context(context)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| anyhow!("{}", chain(&error)))
                .with_context(context)
        }
        None => Config::infer().await.map_err(|error| anyhow!("{}", chain(&error))).context(
            "find the API server: run the agent in a pod with a service account, or give \
             --kubeconfig PATH; without a cluster, give --source dir:PATH",
        ),
    }
}

/// Follows the API server for the pods of the node `node`, and waits, for ever if need be, until
/// all of them, and the namespaces, have been listed once. Whenever that changes, `tell` is told what
/// stands in the way.
///
/// # Errors
///
/// When `config` or `node` cannot be used. That the API server does not answer, or refuses, is no
/// error: it is logged, and tried again.
pub async fn open(
    config: Config,
    node: &str,
    membership: &membership::Config,
    metrics: &Metrics,
    tell: impl Fn(&[Problem]),
) -> Result<(KubeSource, KubeWatcher)> {
    ensure!(
        is_dns_subdomain(node),
        "use node name {node:?}: it is not the name of a Kubernetes node; give --node-name"
    );
    let server = config.cluster_url.to_string();
    let (sender, mut updates) = mpsc::channel(QUEUE);
    // kube's watcher says nothing of a watch that goes on after a failure.
    let watching = |what| {
        let sender = sender.clone();
        client(config.clone(), WATCH_RATE, move || {
            // If the queue is full, what is in it says the same.
            let _full = sender.try_send(Update::Answered(what));
        })
    };
    let mut followers = JoinSet::new();
    let pods = ApiResource::erase::<k8s::Pod>(&());
    let pods = Api::<DynamicObject>::all_with(watching(PODS)?, &pods);
    let all = watcher::Config::default().timeout(WATCH_TIMEOUT);
    let of_this_node = all.clone().fields(&format!("spec.nodeName={node}"));
    let trouble = |what| {
        let metrics = metrics.clone();
        let server = server.clone();
        move |why: String| {
            metrics.watch_error(what);
            Update::Trouble(what, why.replacen(SERVER, &server, 1))
        }
    };
    let lost = trouble(PODS);
    let pod = move |event: Result<_, _>| event.map_or_else(&lost, Update::Pod);
    followers.spawn(watch::follow(pods, of_this_node, sender.clone(), pod));
    let namespaces = Api::<PartialObjectMeta<k8s::Namespace>>::all(watching(NAMESPACES)?);
    let lost = trouble(NAMESPACES);
    let namespace = move |event: Result<_, _>| event.map_or_else(&lost, Update::Namespace);
    followers.spawn(watch::follow(namespaces, all, sender.clone(), namespace));

    info!(server, node, "waiting for the pods of this node, and the namespaces");
    let mut state = State::new(node.to_owned(), membership.clone());
    let mut problems = Vec::new();
    while !state.is_complete() {
        let update = updates.recv().await.context("follow the API server")?;
        if take(&mut state, update) {
            let now = state.inventory().problems;
            report(&problems, &now);
            tell(&now);
            problems = now;
        }
    }
    let inventory = state.inventory();
    if inventory.pods.is_empty() {
        warn!("no pod is on node {node}; if that is not this node's name, give --node-name");
    }
    let published = Published::default();
    published.see(&state);
    let (inventory, receiver) = channel::channel(Arc::new(inventory));
    let (events, scribe) = events::channel(client(config.clone(), EVENT_RATE, || ())?, node);
    let source = KubeSource {
        server,
        client: client(config, PATCH_RATE, || ())?,
        inventory: receiver,
        published: published.clone(),
        events,
    };
    Ok((source, KubeWatcher { state, inventory, published, updates, followers, scribe }))
}

/// A client with a limited rate of requests, which leaves retries to us and calls `answered` whenever a
/// request succeeds.
fn client(
    mut config: Config,
    (requests, per): (u64, Duration),
    answered: impl Fn() + Clone + Send + 'static,
) -> Result<Client> {
    limit(&mut config);
    let builder = ClientBuilder::try_from(config)
        .map_err(|error| anyhow!("{}", chain(&error)))
        .context("use the API server's address and credentials")?;
    let look = MapResponseLayer::new(move |response: Response<_>| {
        if response.status().is_success() {
            answered();
        }
        response
    });
    Ok(builder.with_layer(&RateLimitLayer::new(requests, per)).with_layer(&look).build())
}

/// Limits how long a client waits, and leaves retries to us.
pub(crate) fn limit(config: &mut Config) {
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    // The time that a connection was idle before is not the server's.
    config.reset_reader_on_write = true;
}

/// Applies an update. Returns whether the inventory may have changed.
fn take(state: &mut State, update: Update) -> bool {
    match update {
        Update::Pod(event) => state.pod(event),
        Update::Namespace(event) => state.namespace(event),
        Update::Trouble(what, why) => state.trouble(what, Some(why)),
        Update::Answered(what) => state.trouble(what, None),
    }
}

impl KubeWatcher {
    /// Follows the API server until `shutdown`.
    ///
    /// # Errors
    ///
    /// Only when a task of it ends, which is a defect.
    pub async fn run(self, shutdown: CancellationToken) -> Result<()> {
        let KubeWatcher { mut state, inventory, published, mut updates, followers, scribe } = self;
        // Both end when this is left.
        let _followers = followers;
        let mut scribes = JoinSet::new();
        scribes.spawn(scribe.run());
        while let Some(update) = shutdown.run_until_cancelled(updates.recv()).await {
            let update = update.context("follow the API server: the watches have ended")?;
            let mut changed = take(&mut state, update);
            while let Ok(update) = updates.try_recv() {
                changed |= take(&mut state, update);
            }
            if !changed {
                continue;
            }
            // Readers that the inventory wakes ask what is published.
            published.see(&state);
            let new = state.inventory();
            inventory.send_if_modified(|current| {
                let modified = **current != new;
                if modified {
                    report(&current.problems, &new.problems);
                    *current = Arc::new(new);
                }
                modified
            });
        }
        Ok(())
    }
}

impl Published {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Annotation>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies what the watch has seen.
    fn see(&self, state: &State) {
        let mut published = self.lock();
        let mut before = std::mem::take(&mut *published);
        for (uid, seen) in state.redirections() {
            let mut written = before.remove(uid).unwrap_or_default().written;
            if let Written::Value { value, unseen_since } = &mut written
                && seen == value.map(Redirection::as_str)
            {
                *unseen_since = None;
            }
            let annotation = Annotation { seen: seen.map(str::to_owned), written };
            published.insert(uid.to_owned(), annotation);
        }
    }

    /// Whether `state` has to be written to the pod.
    fn differs(&self, uid: &str, state: Option<Redirection>) -> bool {
        self.lock().get(uid).is_some_and(|annotation| {
            let seen = annotation.seen.as_deref() == state.map(Redirection::as_str);
            !match &annotation.written {
                Written::Nothing => seen,
                Written::Value { value, unseen_since } => {
                    let unseen = unseen_since.as_ref().is_some_and(|old| *old == annotation.seen);
                    *value == state && (seen || unseen)
                }
                Written::Unknown => false,
            }
        })
    }

    /// Records what was written; `None`: possibly something.
    fn write(&self, uid: &str, value: Option<Option<Redirection>>) {
        if let Some(annotation) = self.lock().get_mut(uid) {
            annotation.written = match value {
                Some(value) => {
                    Written::Value { value, unseen_since: Some(annotation.seen.clone()) }
                }
                None => Written::Unknown,
            };
        }
    }
}

impl Source for KubeSource {
    fn describe(&self) -> String {
        format!("kube:{}", self.server)
    }

    fn inventory(&self) -> channel::Receiver<Arc<Inventory>> {
        self.inventory.clone()
    }

    /// Writes the annotation to the pod's status, with no other permission than that; a pod of that
    /// name with another uid is not touched.
    async fn publish(&self, pod: &Pod, state: Option<Redirection>) -> Result<()> {
        if self.is_published(pod, state) {
            return Ok(());
        }
        let patch = json!({
            "metadata": {
                "uid": pod.uid,
                "annotations": {ANNOTATION_REDIRECTION: state.map(Redirection::as_str)},
            }
        });
        let pods =
            Api::<PartialObjectMeta<k8s::Pod>>::namespaced(self.client.clone(), &pod.key.namespace);
        let params = PatchParams { field_manager: Some(NAME.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(&patch);
        let context = || format!("write annotation {ANNOTATION_REDIRECTION} of pod {}", pod.key);
        match in_time(pods.patch_status(&pod.key.name, &params, &patch)).await {
            Ok(_) => {
                self.published.write(&pod.uid, Some(state));
                Ok(())
            }
            Err(Failed::Request(Error::Api(status)))
                if status.code == 404 || is_of_another_pod(&status) =>
            {
                Ok(())
            }
            // The request was understood and refused, so nothing was written.
            Err(error @ Failed::Request(Error::Api(_))) => Err(error).with_context(context),
            Err(error) => {
                self.published.write(&pod.uid, None);
                Err(error).with_context(context)
            }
        }
    }

    fn is_published(&self, pod: &Pod, state: Option<Redirection>) -> bool {
        !self.published.differs(&pod.uid, state)
    }

    fn gone_is_deleted(&self) -> bool {
        true
    }

    /// Uses `list`, for which the agent has the right. The API server selects by a pod's first address only.
    async fn find(&self, whom: &Whom) -> Result<Option<Pod>> {
        let (pods, field) = match whom {
            Whom::Named(key) => (
                Api::<k8s::Pod>::namespaced(self.client.clone(), &key.namespace),
                format!("metadata.name={}", key.name),
            ),
            Whom::Service(_) => return Ok(None),
            Whom::At(ip) => {
                (Api::<k8s::Pod>::all(self.client.clone()), format!("status.podIP={ip}"))
            }
        };
        let params = ListParams::default().fields(&field);
        let listed = in_time(pods.list(&params)).await;
        let listed = listed.with_context(|| format!("list pods with {field}"))?;
        let pods = listed.items.iter().filter_map(|pod| Pod::try_from(pod).ok());
        Ok(pods.into_iter().find(|pod| whom.is(pod)))
    }

    async fn find_service(&self, whom: &Whom) -> Result<Option<Service>> {
        let object = match whom {
            Whom::Named(key) | Whom::Service(key) => {
                let services = Api::<k8s::Service>::namespaced(self.client.clone(), &key.namespace);
                let params = ListParams::default().fields(&format!("metadata.name={}", key.name));
                let listed = in_time(services.list(&params)).await;
                listed.with_context(|| format!("list Service {key}"))?.items.pop()
            }
            Whom::At(ip) => self.service_at(*ip).await?,
        };
        let Some(object) = object else { return Ok(None) };
        let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
        let slices = Api::<EndpointSlice>::namespaced(self.client.clone(), &namespace);
        // Of more, `explain` looks at the first ones only.
        let params =
            ListParams::default().labels(&format!("{LABEL_SERVICE_NAME}={name}")).limit(SLICES);
        let listed = in_time(slices.list(&params))
            .await
            .with_context(|| format!("list the EndpointSlices of Service {namespace}/{name}"))?;
        Ok(Service::new(&object, &listed.items))
    }

    fn record(&self, pod: &Pod, event: Event) {
        self.events.take(pod, event);
    }
}

impl KubeSource {
    /// Nothing selects a Service by all of its cluster IPs.
    async fn service_at(&self, ip: IpAddr) -> Result<Option<k8s::Service>> {
        let services = Api::<k8s::Service>::all(self.client.clone());
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let listed = in_time(services.list(&params)).await.context("list the Services")?;
            let more = listed.metadata.continue_;
            if let Some(found) = listed.items.into_iter().find(|object| Service::has(object, ip)) {
                return Ok(Some(found));
            }
            match more.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(None),
            }
        }
    }
}

/// Why a request has no answer that can be used.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("the API server took more than {REQUEST_TIMEOUT:?}")]
    Late,
    #[error("{}", explain(.0))]
    Request(Error),
}

async fn in_time<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failed> {
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(Failed::Request),
        Err(_) => Err(Failed::Late),
    }
}

/// Whether the uid in a patch was not that of the pod: 409 from the precondition, 422 from the
/// validation of the field, whichever comes first.
fn is_of_another_pod(status: &kube::core::Status) -> bool {
    matches!(status.code, 409 | 422) && {
        let message = status.message.to_ascii_lowercase();
        message.contains("uid in precondition") || message.contains("metadata.uid")
    }
}

/// The error in one line, with what an operator can do about it.
pub(crate) fn explain(error: &Error) -> String {
    match error {
        Error::Api(status) if status.code == 403 => {
            format!("the API server forbids it: {}; {ROLE}", status.message)
        }
        Error::Api(status) if status.code == 401 => format!(
            "the API server does not know the agent: {}; look at the credentials in its kubeconfig, or \
             its service account's token",
            status.message
        ),
        Error::Api(status) => {
            format!("the API server answered {} {}: {}", status.code, status.reason, status.message)
        }
        error => match no_connection(error) {
            Some(why) => format!("{UNREACHABLE}{SERVER}: {}", why.kind()),
            None => chain(error),
        },
    }
}

/// Whether connecting to the API server failed.
fn is_unreachable(error: &Error) -> bool {
    no_connection(error).is_some()
}

/// Why connecting failed.
fn no_connection(error: &Error) -> Option<&io::Error> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            let kinds = [
                io::ErrorKind::ConnectionRefused,
                io::ErrorKind::HostUnreachable,
                io::ErrorKind::NetworkUnreachable,
            ];
            return kinds.contains(&error.kind()).then_some(error);
        }
        cause = error.source();
    }
    None
}

/// The error and its causes, each once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
